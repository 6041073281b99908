//! A running `vip-node vrrp` in a host of a segment, told what to do over its socket as the agent would.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::{Child, Command},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use lab::{Host, command};
use vip_core::{
    api::VrrpState,
    vrrp::{Family, Lan, RouterConfig, RouterId, rank},
};
use vip_node::link::{self, Elect, Order, Report, Word};

/// The address of all elections over IPv4 here.
pub const VIP: Ipv4Addr = Ipv4Addr::new(10, 87, 2, 50);
/// The address of all elections over IPv6 here.
pub const VIP6: Ipv6Addr = Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 2, 0x50);
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
    /// The agent says nothing any more.
    mute: Arc<AtomicBool>,
    _runtime: tokio::runtime::Runtime,
}

impl<'a> Vrrp<'a> {
    pub fn start(host: &'a Host, number: u8) -> Result<Self> {
        Self::start_with(host, number, &[])
    }

    /// Starts it with more arguments.
    pub fn start_with(host: &'a Host, number: u8, args: &[&str]) -> Result<Self> {
        Self::launch(host, number, Command::new(binary()?).arg("vrrp").args(args))
    }

    /// Starts it without a capability, such as `net_raw`.
    pub fn start_without(host: &'a Host, number: u8, capability: &str) -> Result<Self> {
        let drop = [format!("--bounding-set=-{capability}"), format!("--inh-caps=-{capability}")];
        Self::launch(host, number, Command::new("setpriv").args(drop).arg(binary()?).arg("vrrp"))
    }

    fn launch(host: &'a Host, number: u8, command: &mut Command) -> Result<Self> {
        let folder = std::env::temp_dir().join(host.netns().name());
        fs::create_dir_all(&folder)?;
        let socket = folder.join("vrrp.sock");
        let _ = fs::remove_file(&socket);
        let log = fs::File::create(folder.join("vrrp.log"))?;
        let process = host.spawn(command.arg("--link").arg(&socket).stderr(log))?;
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
        let mute = Arc::new(AtomicBool::new(false));
        let silent = Arc::clone(&mute);
        runtime.spawn(async move {
            let mut alive = tokio::time::interval(Duration::from_secs(1));
            loop {
                let order = tokio::select! {
                    order = inbox.recv() => match order { Some(order) => order, None => return },
                    _ = alive.tick() => Order::Alive,
                };
                if !silent.load(Ordering::Relaxed) && sender.send(&order).await.is_err() {
                    return;
                }
            }
        });
        Ok(Self { host, number, process, folder, reports, orders, mute, _runtime: runtime })
    }

    /// Orders the election of `VIP`, with a rank among three nodes.
    pub fn elect(&self) -> Result<()> {
        let names = ["node-1", "node-2", "node-3"];
        self.elect_with(rank::priority(&format!("node-{}", self.number), names, VRID, None))
    }

    pub fn elect_with(&self, priority: u8) -> Result<()> {
        self.elect_all(vec![config(priority, &[VIP.into()])], Lan::default())
    }

    pub fn elect_all(&self, routers: Vec<RouterConfig>, lan: Lan) -> Result<()> {
        self.order(Order::Elect(Elect { lan, routers }))
    }

    /// From now on the agent is as good as gone, or it is back.
    pub fn mute(&self, mute: bool) {
        self.mute.store(mute, Ordering::Relaxed);
    }

    /// Where it listens.
    pub fn socket(&self) -> PathBuf {
        self.folder.join("vrrp.sock")
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
        self.has(VIP.into())
    }

    /// Whether the host has an address.
    pub fn has(&self, address: IpAddr) -> Result<bool> {
        has(self.host, address)
    }

    /// Its state in the election of an address.
    pub fn state_for(&self, address: IpAddr) -> VrrpState {
        let report = self.report();
        let mut routers = report.routers.iter().filter(|router| router.id.family == Family::of(address));
        routers.next().map_or(VrrpState::Init, |router| router.state)
    }

    /// What it said so far.
    pub fn log(&self) -> Result<String> {
        Ok(fs::read_to_string(self.folder.join("vrrp.log"))?)
    }

    pub fn signal(&self, name: &str) -> Result<()> {
        command::words(&["kill", &format!("-{name}"), &self.process.id().to_string()])?.ok().map(drop)
    }
}

/// An election with adverts every 100 ms.
pub fn config(priority: u8, addresses: &[IpAddr]) -> RouterConfig {
    let family = addresses.first().map_or(Family::V4, |address| Family::of(*address));
    RouterConfig {
        id: RouterId { interface: "eth0".into(), family, vrid: VRID },
        priority,
        interval: Duration::from_millis(100),
        preempt: None,
        addresses: addresses.to_vec(),
        fresh: [].into(),
        contested: [].into(),
    }
}

/// Whether a host has an address.
pub fn has(host: &Host, address: IpAddr) -> Result<bool> {
    let shown = host.exec("ip -oneline address show")?.ok()?.stdout;
    let length = if address.is_ipv4() { 32 } else { 128 };
    Ok(shown.contains(&format!(" {address}/{length} ")))
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
