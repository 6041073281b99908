//! A LAN segment for a single test: hosts (network namespaces) joined by a bridge, on this machine's own kernel.

use std::{
    fs,
    io::Write as _,
    net::{IpAddr, Ipv4Addr},
    process::{self, Child, ChildStdin, Command, Stdio},
    sync::atomic::{AtomicUsize, Ordering},
    time::Duration,
};

use anyhow::{Context, Result, bail};

use crate::{
    arp,
    client::Client,
    command::{self, Output},
    lab::Lab,
    lan::{GATEWAY, GATEWAY6},
    netns::{Injector, Netns},
};

/// Where frames are dropped: nftables' table in the namespace of the bridge.
const FILTER: &str = "bridge lab";

/// Hosts on one bridge. Everything of it, the processes included, goes when this value goes.
#[derive(Debug)]
pub struct Segment {
    bridge: Netns,
    hosts: Vec<Host>,
}

/// A host of a [`Segment`]: its card is `eth0`, its addresses are 10.87.0.(10+n)/16 and fd87::1n/64 as a node's.
#[derive(Debug)]
pub struct Host {
    number: u8,
    netns: Netns,
    /// Whether it has IPv4.
    dual: bool,
}

impl Segment {
    /// A segment with that many hosts, numbered from 1.
    pub fn new(hosts: u8) -> Result<Self> {
        Self::with(hosts, true)
    }

    /// One whose hosts have no IPv4 at all.
    pub fn new_v6(hosts: u8) -> Result<Self> {
        Self::with(hosts, false)
    }

    fn with(hosts: u8, dual: bool) -> Result<Self> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        let prefix = format!("seg-{}-{}", process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
        let bridge = Netns::named(format!("{prefix}-br"));
        // Made before it is filled, so that a failure half-way leaves nothing.
        let mut this = Self { bridge, hosts: Vec::new() };
        Netns::create(this.bridge.name())?;
        this.bridge.ip("link add br0 type bridge")?;
        this.bridge.ip("link set br0 up")?;
        for number in 1..=hosts {
            let netns = Netns::named(format!("{prefix}-{number}"));
            this.hosts.push(Host { number, netns: netns.clone(), dual });
            Netns::create(netns.name())?;
            this.add_card(number)?;
        }
        Ok(this)
    }

    /// Gives a host its card.
    pub fn add_card(&self, number: u8) -> Result<()> {
        let (port, netns) = (format!("p{number}"), self.host(number).netns());
        self.bridge.ip(&format!("link add {port} type veth peer name eth0 netns {}", netns.name()))?;
        self.bridge.ip(&format!("link set {port} master br0 up"))?;
        if self.host(number).dual {
            netns.ip(&format!("address add 10.87.0.{}/16 dev eth0", 10 + number))?;
        }
        netns.ip(&format!("address add fd87::{:x}/64 dev eth0 nodad", 0x10 + u16::from(number)))?;
        netns.ip("link set eth0 up").map(drop)
    }

    /// Takes a host's card away.
    pub fn remove_card(&self, number: u8) -> Result<()> {
        self.host(number).netns.ip("link delete eth0").map(drop)
    }

    /// Removes all segments of this process, before it ends without dropping them.
    pub fn remove_all() {
        let prefix = format!("seg-{}-", process::id());
        let names = fs::read_dir("/run/netns").into_iter().flatten().flatten();
        for name in names.filter_map(|entry| entry.file_name().into_string().ok()) {
            if name.starts_with(&prefix) {
                let _ = Netns::named(name).destroy();
            }
        }
    }

    /// A host by its number, from 1.
    ///
    /// # Panics
    /// When there is no such host.
    pub fn host(&self, number: u8) -> &Host {
        &self.hosts[usize::from(number) - 1]
    }

    /// All hosts.
    pub fn hosts(&self) -> &[Host] {
        &self.hosts
    }

    /// Cuts a host's link at the bridge. Its own card loses the carrier.
    pub fn unplug(&self, number: u8) -> Result<()> {
        self.bridge.ip(&format!("link set p{number} down")).map(drop)
    }

    /// Joins a host's link again.
    pub fn plug(&self, number: u8) -> Result<()> {
        self.bridge.ip(&format!("link set p{number} up")).map(drop)
    }

    /// Gives every host a way to the API server of a lab that does not go over the segment's bridge: what is cut there says
    /// nothing about the API server. They find it at its own address.
    pub fn connect(&self, lab: &Lab) -> Result<()> {
        static NEXT: AtomicUsize = AtomicUsize::new(0);
        for host in &self.hosts {
            let net = NEXT.fetch_add(1, Ordering::Relaxed);
            // Pairs of addresses that nothing else in the lab has.
            let (third, fourth) = (net / 128 % 256, net % 128 * 2);
            let far = format!("h{}x{net}", process::id() % 100_000);
            host.netns
                .ip(&format!("link add api0 type veth peer name {far} netns {}", lab.netns().name()))?;
            let (there, here, prefix) = match host.dual {
                true => (format!("172.31.{third}.{fourth}"), format!("172.31.{third}.{}", fourth + 1), "31"),
                false => (
                    format!("fd31::{third:x}:{fourth:x}"),
                    format!("fd31::{third:x}:{:x}", fourth + 1),
                    "127 nodad",
                ),
            };
            lab.netns().ip(&format!("link set {far} up"))?;
            host.netns.ip("link set api0 up")?;
            lab.netns().ip(&format!("address add {there}/{prefix} dev {far}"))?;
            host.netns.ip(&format!("address add {here}/{prefix} dev api0"))?;
            host.netns.ip(&format!("route add {} via {there} dev api0 onlink", host.gateway()))?;
        }
        Ok(())
    }

    /// Drops everything a host sends and hears, while its card keeps the carrier: the port leaves the bridge.
    pub fn isolate(&self, number: u8) -> Result<()> {
        self.bridge.ip(&format!("link set p{number} nomaster")).map(drop)
    }

    /// Undoes [`Segment::isolate`].
    pub fn rejoin(&self, number: u8) -> Result<()> {
        self.bridge.ip(&format!("link set p{number} master br0")).map(drop)
    }

    /// Lets a host hear nothing; it is heard as before.
    pub fn deafen(&self, number: u8) -> Result<()> {
        self.filter(&format!("oifname p{number} drop"))
    }

    /// Lets nobody hear a host; it hears as before.
    pub fn mute(&self, number: u8) -> Result<()> {
        self.filter(&format!("iifname p{number} drop"))
    }

    /// Loses that many of a hundred frames by chance; of one to several hosts, each copy for itself.
    pub fn lose(&self, percent: u8) -> Result<()> {
        self.filter(&format!("numgen random mod 100 < {percent} drop"))
    }

    /// Undoes [`Segment::deafen`], [`Segment::mute`] and [`Segment::lose`].
    pub fn heal(&self) -> Result<()> {
        // To add what is there is no error; to delete what is not there is one.
        self.nft(&format!("add table {FILTER}; delete table {FILTER}"))
    }

    /// Makes [`Segment::isolate`] ready for a moment that is known to some 0.1 ms.
    pub fn cutter(&self, number: u8) -> Result<Cutter> {
        let mut ip = Command::new("ip");
        ip.args(["-n", self.bridge.name(), "-batch", "-"]).stdin(Stdio::piped());
        let mut ip = command::spawn(&mut ip)?;
        let input = ip.stdin.take().context("no input")?;
        Ok(Cutter { ip, input, port: format!("p{number}") })
    }

    fn filter(&self, rule: &str) -> Result<()> {
        self.nft(&format!(
            "add table {FILTER}; add chain {FILTER} forward {{ type filter hook forward priority 0; }}; \
             add rule {FILTER} forward {rule}"
        ))
    }

    fn nft(&self, text: &str) -> Result<()> {
        self.bridge.exec(Command::new("nft").arg(text), command::LIMIT)?.ok().map(drop)
    }
}

/// A host's link, about to be cut.
#[derive(Debug)]
pub struct Cutter {
    ip: Child,
    input: ChildStdin,
    port: String,
}

impl Cutter {
    /// Cuts it now, as [`Segment::isolate`] does.
    pub fn cut(mut self) -> Result<()> {
        writeln!(self.input, "link set {} nomaster", self.port)?;
        drop(self.input);
        match command::wait(&mut self.ip, command::LIMIT)? {
            Some(0) => Ok(()),
            code => bail!("`ip` could not cut {}: exit code {code:?}", self.port),
        }
    }
}

impl Drop for Segment {
    fn drop(&mut self) {
        for netns in self.hosts.iter().map(|host| &host.netns).chain([&self.bridge]) {
            if let Err(error) = netns.destroy() {
                eprintln!("{} is left behind: {error:#}", netns.name());
            }
        }
    }
}

impl Host {
    /// Its number, from 1.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Its network namespace.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// Where it finds the API server, see [`Segment::connect`].
    pub fn gateway(&self) -> IpAddr {
        if self.dual { GATEWAY.into() } else { GATEWAY6.into() }
    }

    /// Its address over IPv4.
    pub fn address(&self) -> Ipv4Addr {
        Ipv4Addr::new(10, 87, 0, 10 + self.number)
    }

    /// The MAC address of its card.
    pub fn mac(&self) -> Result<String> {
        let text = self.netns.ip("-oneline link show eth0")?.stdout;
        let mac = text.split_whitespace().skip_while(|word| *word != "link/ether").nth(1);
        Ok(mac.context("a card without a MAC address")?.to_owned())
    }

    /// Runs a shell command in it, for a minute at most.
    pub fn exec(&self, line: &str) -> Result<Output> {
        self.netns.exec(Command::new("bash").args(["-c", line]), command::LIMIT)
    }

    /// Starts a program in it. It is killed with the segment at the latest.
    pub fn spawn(&self, program: &mut Command) -> Result<Child> {
        self.netns.spawn(program)
    }

    /// Sends bytes as an IPv4 datagram of VRRP's protocol to its group, with any TTL.
    pub fn inject(&self, ttl: u8, payload: &[u8]) -> Result<()> {
        self.injector(ttl)?.send(payload)
    }

    /// Makes [`Host::inject`] ready for many.
    pub fn injector(&self, ttl: u8) -> Result<Injector> {
        self.netns.injector("eth0", ttl)
    }

    /// Runs a closure on a thread that is in it.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        self.netns.run(work)
    }

    /// A client in it.
    pub fn client(&self) -> Client {
        Client::new(Some(self.netns.clone()))
    }

    /// The MAC addresses that answer it by ARP for an address within `window`.
    pub fn arp_owner(&self, address: Ipv4Addr, window: Duration) -> Result<Vec<String>> {
        self.netns.run(|| arp::owners("eth0", self.address(), address, window))?
    }
}
