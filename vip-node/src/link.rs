//! What the two processes of a node say to each other over a Unix socket, one JSON document a line.
//!
//! `vip-node vrrp` listens, `vip-node agent` connects and may come and go: what it said last stays in force.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::Duration;

use ipnet::IpNet;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader};
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::time::timeout;
use tracing::warn;
use vip_core::api::{Reason, VrrpState};
use vip_core::vrrp::{Cause, Lan, RouterConfig, RouterId};

/// From the agent to vrrp.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Order {
    /// All the elections to take part in.
    Elect(Elect),
    /// The agent's loop still turns: said once a second.
    Alive,
}

/// All the elections to take part in.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Elect {
    /// What they have in common.
    pub lan: Lan,
    /// One that was there before and is missing is left: with a priority-0 advertisement, then without its addresses.
    pub routers: Vec<RouterConfig>,
}

/// From vrrp to the agent.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Word {
    /// The whole state: at each change, and several times a minute.
    Report(Box<Report>),
    /// The loop that sends the advertisements still turns: said several times in each advertisement interval.
    Alive,
}

/// How things stand in vrrp.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Report {
    /// The node's interfaces, virtual IPs not among their addresses.
    pub interfaces: Vec<Interface>,
    /// The elections, as ordered.
    pub routers: Vec<RouterReport>,
    /// Routers of our elections lately heard.
    pub peers: Vec<Heard>,
    /// Routers of others lately heard: of identifiers that are not ours, or with none of our addresses.
    pub foreign: Vec<Heard>,
    /// Other machines that claimed an address of ours lately, by ARP or neighbour discovery.
    pub claims: Vec<Claim>,
    /// Refused advertisements by kind since the start.
    pub refused: BTreeMap<String, u64>,
    /// Set once the process was asked to end: the elections are being left.
    pub stopping: bool,
}

impl Report {
    /// All addresses that are bound here.
    pub fn bound(&self) -> BTreeSet<IpAddr> {
        self.routers.iter().flat_map(|router| &router.bound).copied().collect()
    }
}

/// An interface.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Interface {
    /// Name, such as `eth0`.
    pub name: String,
    /// Hardware address.
    pub mac: [u8; 6],
    /// Addresses with their prefix lengths, virtual IPs left out.
    pub addresses: Vec<IpNet>,
    /// Whether it is up and has a carrier.
    pub carrier: bool,
    /// The largest packet that it takes, in bytes.
    pub mtu: u32,
}

/// How an election stands.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct RouterReport {
    /// The election.
    pub id: RouterId,
    /// This node's state in it.
    pub state: VrrpState,
    /// This node's priority in it.
    pub priority: u8,
    /// The address that this node advertises from.
    pub source: Option<IpAddr>,
    /// Source address of the master's last advertisement, unless it is us.
    pub master: Option<IpAddr>,
    /// Why this node is master in it, or was last.
    pub cause: Option<Cause>,
    /// The master whose silence made this node master lately, as long as it is not heard again.
    pub lost: Option<IpAddr>,
    /// Another router of ours that goes on as master although this node is master and answers it: it does not hear us.
    pub rival: Option<IpAddr>,
    /// Addresses that are bound here now.
    pub bound: Vec<IpAddr>,
    /// What keeps the node from taking part or from binding: a word and a sentence.
    pub trouble: Option<(Reason, String)>,
}

/// Another machine's claim on an address of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Claim {
    /// The address.
    pub address: IpAddr,
    /// The interface on which it was claimed.
    pub interface: String,
    /// The hardware address of the machine.
    pub mac: [u8; 6],
    /// Whether the address is left to it: it answered before the address was ever bound.
    pub yielded: bool,
    /// How often it was heard.
    pub count: u64,
}

/// A router that was heard.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Heard {
    /// The election that it spoke in.
    pub id: RouterId,
    /// Its address.
    pub address: IpAddr,
    /// Priority of its last advertisement.
    pub priority: u8,
}

/// Longest line that is read, in bytes: some hundred virtual routers with some hundred addresses fit.
const LONGEST: u64 = 4 << 20;
/// How long an order may take to be taken before vrrp counts as hung.
const WRITE_LIMIT: Duration = Duration::from_secs(2);

/// The agent's end for orders.
#[derive(Debug)]
pub struct OrderSender(OwnedWriteHalf);

/// The agent's end for reports.
#[derive(Debug)]
pub struct ReportReceiver(Lines);

/// Connects the agent to vrrp.
///
/// # Errors
/// When nobody listens there.
pub async fn connect(socket: &Path) -> io::Result<(OrderSender, ReportReceiver)> {
    let (read, write) = UnixStream::connect(socket).await?.into_split();
    Ok((OrderSender(write), ReportReceiver(Lines::new(read))))
}

impl OrderSender {
    /// Sends an order.
    ///
    /// # Errors
    /// When vrrp is gone or does not read.
    pub async fn send(&mut self, order: &Order) -> io::Result<()> {
        match timeout(WRITE_LIMIT, self.0.write_all(&line(order)?)).await {
            Ok(result) => result,
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }
}

impl ReportReceiver {
    /// The next word; `None` when vrrp is gone or what it says cannot be understood. A call may be dropped and made anew.
    pub async fn recv(&mut self) -> Option<Word> {
        self.0.next().await
    }
}

/// vrrp's end: listens for agents.
#[derive(Debug)]
pub struct Listener(UnixListener);

/// vrrp's end for reports.
#[derive(Debug)]
pub struct ReportSender(OwnedWriteHalf);

/// vrrp's end for orders.
#[derive(Debug)]
pub struct OrderReceiver(Lines);

impl Listener {
    /// Listens at a path, where the socket of an earlier run may be left.
    ///
    /// # Errors
    /// When the folder is missing or not writable.
    pub fn bind(socket: &Path) -> io::Result<Self> {
        match std::fs::remove_file(socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
        let listener = UnixListener::bind(socket)?;
        std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
        Ok(Self(listener))
    }

    /// Waits for an agent.
    ///
    /// # Errors
    /// When the system is out of file descriptors.
    pub async fn accept(&self) -> io::Result<(ReportSender, OrderReceiver)> {
        let (read, write) = self.0.accept().await?.0.into_split();
        Ok((ReportSender(write), OrderReceiver(Lines::new(read))))
    }
}

impl ReportSender {
    /// Says something, and waits until the agent takes it.
    ///
    /// # Errors
    /// When the agent is gone.
    pub async fn send(&mut self, word: &Word) -> io::Result<()> {
        self.0.write_all(&line(word)?).await
    }
}

impl OrderReceiver {
    /// The next order; `None` when the agent is gone or what it says cannot be understood. A call may be dropped and
    /// made anew.
    pub async fn recv(&mut self) -> Option<Order> {
        self.0.next().await
    }
}

fn line(message: &impl Serialize) -> io::Result<Vec<u8>> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    Ok(line)
}

/// Messages by the line. What was read of a line stays here when a call is dropped.
#[derive(Debug)]
struct Lines {
    stream: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
}

impl Lines {
    fn new(stream: OwnedReadHalf) -> Self {
        Self { stream: BufReader::new(stream), line: Vec::new() }
    }

    async fn next<T: DeserializeOwned>(&mut self) -> Option<T> {
        let room = LONGEST.saturating_sub(self.line.len() as u64);
        (&mut self.stream).take(room).read_until(b'\n', &mut self.line).await.ok()?;
        let line = std::mem::take(&mut self.line);
        match serde_json::from_slice(&line) {
            Ok(message) => Some(message),
            Err(error) => {
                if !line.is_empty() {
                    warn!(%error, "the other process says what cannot be understood: is it of another version?");
                }
                None
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn orders_and_reports_arrive_and_nonsense_ends_the_talk() {
        let folder = std::env::temp_dir().join(format!("vip-link-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let socket = folder.join("vrrp.sock");
        let _stale = UnixListener::bind(&socket).unwrap();
        let listener = Listener::bind(&socket).unwrap();
        let (agent, vrrp) = tokio::join!(connect(&socket), listener.accept());
        let ((mut orders, mut reports), (mut report, mut order)) = (agent.unwrap(), vrrp.unwrap());
        orders.send(&Order::Alive).await.unwrap();
        assert_eq!(order.recv().await, Some(Order::Alive));
        let said = Word::Report(Box::new(Report { stopping: true, ..Report::default() }));
        report.send(&said).await.unwrap();
        assert_eq!(reports.recv().await, Some(said));
        orders.0.write_all(b"{\"Obey\":1}\n").await.unwrap();
        assert_eq!(order.recv().await, None);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
