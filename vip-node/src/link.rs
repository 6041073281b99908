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
use tokio::task::{JoinHandle, spawn_blocking};
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
    /// How often each address was taken off by another program, and put back, since the start.
    pub repaired: BTreeMap<IpAddr, u64>,
    /// Why the agent's last order could not be taken: the one before it stands.
    pub untaken: Option<String>,
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
const LONGEST: usize = 4 << 20;
/// Longer lines are taken apart on a thread of their own, for signs of life pass through the same runtime.
const LONG: usize = 16 << 10;
/// How long an order may take to be taken before vrrp counts as hung.
const WRITE_LIMIT: Duration = Duration::from_secs(2);

/// The agent's end for orders.
#[derive(Debug)]
pub struct OrderSender(OwnedWriteHalf);

/// The agent's end for reports.
#[derive(Debug)]
pub struct ReportReceiver(Lines<Word>);

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
    /// The next word; `None` when vrrp is gone. What cannot be taken is left out. A call may be dropped and made anew.
    pub async fn recv(&mut self) -> Option<Word> {
        loop {
            match self.0.next().await? {
                Ok(word) => return Some(word),
                Err(why) => warn!("a report of vrrp could not be taken, the one before it stands: {why}"),
            }
        }
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
pub struct OrderReceiver(Lines<Order>);

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
    /// The next order, or why it cannot be taken; `None` when the agent is gone. A call may be dropped and made anew.
    pub async fn recv(&mut self) -> Option<Result<Order, String>> {
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
struct Lines<T> {
    stream: BufReader<OwnedReadHalf>,
    line: Vec<u8>,
    /// The line has no room, its rest is skipped.
    skipping: bool,
    /// A long line that is being taken apart.
    parsing: Option<JoinHandle<Result<T, String>>>,
}

impl<T: DeserializeOwned + Send + 'static> Lines<T> {
    fn new(stream: OwnedReadHalf) -> Self {
        Self { stream: BufReader::new(stream), line: Vec::new(), skipping: false, parsing: None }
    }

    /// The next message, or why it cannot be taken; `None` at the end.
    async fn next(&mut self) -> Option<Result<T, String>> {
        if self.parsing.is_none() {
            match self.line().await? {
                Ok(line) if line.len() < LONG => return Some(parse(&line)),
                Ok(line) => self.parsing = Some(spawn_blocking(move || parse(&line))),
                Err(why) => return Some(Err(why)),
            }
        }
        let parsed = self.parsing.as_mut()?.await;
        self.parsing = None;
        Some(parsed.unwrap_or_else(|error| Err(error.to_string())))
    }

    async fn line(&mut self) -> Option<Result<Vec<u8>, String>> {
        loop {
            let room = (LONGEST - self.line.len()) as u64;
            (&mut self.stream).take(room).read_until(b'\n', &mut self.line).await.ok()?;
            let whole = self.line.ends_with(b"\n");
            if !whole && self.line.len() < LONGEST {
                return None;
            }
            let line = std::mem::take(&mut self.line);
            match (whole, std::mem::replace(&mut self.skipping, !whole)) {
                (false, _) => {}
                (true, true) => return Some(Err(format!("it has more than {} MiB", LONGEST >> 20))),
                (true, false) => return Some(Ok(line)),
            }
        }
    }
}

fn parse<T: DeserializeOwned>(line: &[u8]) -> Result<T, String> {
    serde_json::from_slice(line).map_err(|error| format!("it is of another form than is known here: {error}"))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vip_core::vrrp::Peer;

    use super::*;

    proptest! {
        #[test]
        fn any_bytes_are_an_order_and_a_word_or_a_reason(bytes in prop::collection::vec(any::<u8>(), 0..64), at: prop::sample::Index) {
            let report = Report { untaken: Some("why".to_owned()), ..Report::default() };
            let said = [line(&Order::Elect(Elect::default())), line(&Word::Report(Box::new(report)))];
            for mut line in said.map(Result::unwrap) {
                let at = at.index(line.len());
                let end = line.len().min(at + bytes.len());
                line.splice(at..end, bytes.iter().copied());
                for bytes in [&line, &bytes] {
                    // What is taken is what was said: said again, it is the same.
                    if let Ok(order) = parse::<Order>(bytes) {
                        prop_assert_eq!(parse(&super::line(&order).unwrap()), Ok(order));
                    }
                    if let Ok(word) = parse::<Word>(bytes) {
                        prop_assert_eq!(parse(&super::line(&word).unwrap()), Ok(word));
                    }
                }
            }
        }
    }

    #[tokio::test(flavor = "current_thread")]
    async fn orders_and_reports_arrive_and_what_cannot_be_taken_ends_nothing() {
        let folder = std::env::temp_dir().join(format!("vip-link-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let socket = folder.join("vrrp.sock");
        let _stale = UnixListener::bind(&socket).unwrap();
        let listener = Listener::bind(&socket).unwrap();
        let (agent, vrrp) = tokio::join!(connect(&socket), listener.accept());
        let ((mut orders, mut reports), (mut report, mut order)) = (agent.unwrap(), vrrp.unwrap());
        orders.send(&Order::Alive).await.unwrap();
        assert_eq!(order.recv().await, Some(Ok(Order::Alive)));
        let said = Word::Report(Box::new(Report { stopping: true, ..Report::default() }));
        report.0.write_all(b"{\"Sing\":1}\n").await.unwrap();
        report.send(&said).await.unwrap();
        assert_eq!(reports.recv().await, Some(said));

        let peer = |node: usize| Peer { node: format!("node-{node}"), ..Peer::default() };
        let elect = |peers: usize| {
            let lan = Lan { peers: (0..peers).map(peer).collect(), ..Lan::default() };
            Order::Elect(Elect { lan, routers: Vec::new() })
        };
        let (large, too_large) = (elect(10_000), elect(100_000));
        assert!(line(&too_large).unwrap().len() > LONGEST);
        let said = async {
            orders.0.write_all(b"{\"Obey\":1}\n").await.unwrap();
            for order in [&large, &too_large, &Order::Alive] {
                orders.send(order).await.unwrap();
            }
            drop(orders);
        };
        let heard = async {
            let why = order.recv().await.unwrap().unwrap_err();
            assert!(why.contains("Obey"), "{why}");
            assert_eq!(order.recv().await, Some(Ok(large.clone())));
            assert_eq!(order.recv().await, Some(Err("it has more than 4 MiB".to_owned())));
            assert_eq!(order.recv().await, Some(Ok(Order::Alive)));
            assert_eq!(order.recv().await, None);
        };
        tokio::join!(said, heard);
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
