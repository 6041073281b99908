//! A running `vip-node vrrp` in a host of a segment, told what to do over its socket as the agent would.

use std::{
    fs,
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use lab::{Host, command};
use vip_core::{
    api::VrrpState,
    vrrp::{Family, RouterConfig, RouterId, rank},
};
use vip_node::link::{self, Elect, Order, Report, Word};

/// The address of all elections here.
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 87, 2, 50);
/// Their virtual router identifier.
pub const VRID: u8 = 77;
/// How long anything may take.
pub const SOON: Duration = Duration::from_secs(10);

/// A running `vip-node vrrp` and the agent's end of its socket.
pub struct Vrrp<'a> {
    pub host: &'a Host,
    pub number: u8,
    process: Child,
    folder: PathBuf,
    reports: tokio::sync::watch::Receiver<Option<Report>>,
    orders: tokio::sync::mpsc::UnboundedSender<Order>,
    _runtime: tokio::runtime::Runtime,
}

impl<'a> Vrrp<'a> {
    pub fn start(host: &'a Host, number: u8) -> Result<Self> {
        let binary = binary()?;
        Self::launch(host, number, &mut Command::new(binary))
    }

    /// Starts it without a capability, such as `net_raw`.
    pub fn start_without(host: &'a Host, number: u8, capability: &str) -> Result<Self> {
        let drop = [format!("--bounding-set=-{capability}"), format!("--inh-caps=-{capability}")];
        Self::launch(host, number, Command::new("setpriv").args(drop).arg(binary()?))
    }

    fn launch(host: &'a Host, number: u8, command: &mut Command) -> Result<Self> {
        let folder = std::env::temp_dir().join(host.netns().name());
        fs::create_dir_all(&folder)?;
        let socket = folder.join("vrrp.sock");
        let _ = fs::remove_file(&socket);
        let log = fs::File::create(folder.join("vrrp.log"))?;
        let process = host.spawn(command.arg("vrrp").arg("--link").arg(&socket).stderr(log))?;
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let (publish, reports) = tokio::sync::watch::channel(None);
        let (orders, mut inbox) = tokio::sync::mpsc::unbounded_channel::<Order>();
        let deadline = Instant::now() + SOON;
        let (mut sender, mut receiver) = runtime.block_on(async {
            loop {
                match link::connect(&socket).await {
                    Ok(link) => return Ok(link),
                    Err(error) if Instant::now() > deadline => return Err(error),
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        })?;
        runtime.spawn(async move {
            while let Some(word) = receiver.recv().await {
                if let Word::Report(report) = word {
                    publish.send_replace(Some(*report));
                }
            }
        });
        runtime.spawn(async move {
            while let Some(order) = inbox.recv().await {
                if sender.send(&order).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { host, number, process, folder, reports, orders, _runtime: runtime })
    }

    /// Orders the election of `VIP`, with a rank among three nodes.
    pub fn elect(&self) -> Result<()> {
        let names = ["node-1", "node-2", "node-3"];
        self.elect_with(rank::priority(&format!("node-{}", self.number), names, VRID, None))
    }

    pub fn elect_with(&self, priority: u8) -> Result<()> {
        let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: VRID };
        let config = RouterConfig {
            id,
            priority,
            interval: Duration::from_millis(100),
            preempt: None,
            addresses: vec![VIP.into()],
            fresh: [].into(),
        };
        self.order(Order::Elect(Elect { routers: vec![config], ..Elect::default() }))
    }

    pub fn order(&self, order: Order) -> Result<()> {
        Ok(self.orders.send(order)?)
    }

    pub fn report(&self) -> Report {
        self.reports.borrow().clone().unwrap_or_default()
    }

    pub fn state(&self) -> VrrpState {
        self.report().routers.first().map_or(VrrpState::Init, |router| router.state)
    }

    pub fn refused(&self, kind: &str) -> u64 {
        self.report().refused.get(kind).copied().unwrap_or_default()
    }

    pub fn is_bound(&self) -> Result<bool> {
        Ok(self.host.exec("ip -oneline address show dev eth0")?.ok()?.stdout.contains(&format!(" {VIP}/32 ")))
    }

    pub fn signal(&self, name: &str) -> Result<()> {
        command::words(&["kill", &format!("-{name}"), &self.process.id().to_string()])?.ok().map(drop)
    }
}

fn binary() -> Result<PathBuf> {
    let binary = crate::program();
    ensure!(binary.exists(), "vip-node is not built: make build");
    Ok(binary)
}

impl Drop for Vrrp<'_> {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        if thread::panicking() {
            eprintln!("the log of host {}: {}", self.number, self.folder.join("vrrp.log").display());
        } else {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }
}
