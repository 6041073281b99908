//! `make bench`: figures with their baselines, measured in one run on one machine. A program, not a test: it asserts nothing
//! but that there was something to measure.

#[path = "netns/keepalived.rs"]
#[allow(dead_code, reason = "the tests of the netns tier use more of it")]
mod keepalived;
#[path = "netns/vrrp.rs"]
#[allow(dead_code, reason = "the tests of the netns tier use more of it")]
mod vrrp;

use std::{
    collections::BTreeMap,
    fs,
    path::PathBuf,
    process::Command,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Client, Host, Lab, Parts, Segment, command, image, interrupt, paths, product, workload::Workload};

use keepalived::Keepalived;
use vrrp::{VIP, Vrrp};

/// How often each failover is measured, alternating between the two.
const RUNS: usize = 5;

fn main() -> Result<()> {
    interrupt::on_interrupt(|| {
        let _ = Lab::remove("bench");
    })?;
    product::build()?;
    size()?;
    failover()?;
    let lab = Lab::up("bench", Parts::Cluster)?;
    let measured = memory(&lab);
    if measured.is_err() {
        product::collect_logs(&lab);
    }
    lab.down()?;
    measured
}

/// The agent as it is in the image.
fn program() -> PathBuf {
    paths::target().join("image/x86_64-unknown-linux-gnu/release/vip-node")
}

fn size() -> Result<()> {
    let archive = image::product_archive();
    let bytes =
        fs::metadata(&archive).with_context(|| format!("no {}: make image", archive.display()))?.len();
    println!("image of vip-node: {:.2} MB", bytes as f64 / 1e6);
    Ok(())
}

/// The owner's link is cut while a client on the same bridge asks every millisecond: the longest time without an answer.
fn failover() -> Result<()> {
    let (mut ours, mut theirs) = (Vec::new(), Vec::new());
    for _ in 0..RUNS {
        let segment = Segment::new(3)?;
        let vrrps: Vec<Vrrp<'_>> =
            [1, 2].into_iter().map(|n| Vrrp::start(segment.host(n), n)).collect::<Result<_>>()?;
        for (vrrp, priority) in vrrps.iter().zip([254, 224]) {
            vrrp.elect_with(priority)?;
        }
        ours.push(cut(&segment)?);
        drop(vrrps);

        let segment = Segment::new(3)?;
        let peers = [Keepalived::start(segment.host(1), 254)?, Keepalived::start(segment.host(2), 224)?];
        theirs.push(cut(&segment)?);
        drop(peers);
    }
    let (ours, theirs) = (Figures::of(ours), Figures::of(theirs));
    println!(
        "owner's link cut, adverts every 100 ms, {RUNS} runs each, longest gap of a client asking every ms:"
    );
    println!("  vip-node    {ours}");
    println!("  keepalived  {theirs}");
    println!("  ratio of the medians: {:.2}", ours.median / theirs.median);
    Ok(())
}

/// The gap in milliseconds.
fn cut(segment: &Segment) -> Result<f64> {
    // Answers from the address itself, there or not yet.
    let echo = format!(
        "import socket\ns=socket.socket(socket.AF_INET,socket.SOCK_DGRAM)\ns.setsockopt(0,15,1)\ns.bind(('{VIP}',7))\n\
         while True:\n d,a=s.recvfrom(64); s.sendto(d,a)"
    );
    let mut servers = [segment.host(1), segment.host(2)]
        .map(|host| host.spawn(Command::new("python3").args(["-c", &echo])));
    let client: Client = segment.host(3).client().limit(Duration::from_millis(100));
    let owner = command::until("an owner", Duration::from_secs(15), || {
        let macs = segment.host(3).arp_owner(VIP, Duration::from_millis(100))?;
        let one = |host: &&Host| host.mac().is_ok_and(|mac| macs == [mac]);
        Ok(segment.hosts().iter().position(|host| one(&host)).and_then(|index| u8::try_from(index + 1).ok()))
    })?;
    let watch = client.watch(&format!("udp://{VIP}:7/x"), Duration::from_millis(1))?;
    watch.wait_answers(300, Duration::from_secs(15))?;
    segment.isolate(owner)?;
    thread::sleep(Duration::from_secs(2));
    let report = watch.stop();
    for server in servers.iter_mut().flatten() {
        let _ = server.kill();
        let _ = server.wait();
    }
    ensure!(report.longest_gap > Duration::from_millis(50), "nothing was cut: {report}");
    Ok(report.longest_gap.as_secs_f64() * 1000.0)
}

/// Resident memory of each process on each node with one virtual IP, and of kube-proxy beside them.
fn memory(lab: &Lab) -> Result<()> {
    let _web = Workload::deploy(lab, "bench", "web", 3)?;
    lab.kubectl_for(Duration::from_secs(300), ["vip", "install", "--pool", "lab=10.87.2.50-10.87.2.59"])?
        .ok()?;
    lab.kubectl(["vip", "expose", "svc/web", "-n", "bench"])?.ok()?;
    let vip = product::address_of(lab, "bench", "web")?;
    let owner = product::wait_one_owner(lab, vip, Duration::from_secs(30))?;
    let settled = Instant::now() + Duration::from_secs(20);
    thread::sleep(settled.saturating_duration_since(Instant::now()));
    println!("resident memory with one virtual IP, MB:");
    for node in lab.nodes() {
        let look = "me=$(readlink /proc/self/ns/net); for p in $(pgrep -x 'vip-node|kube-proxy'); do \
            [ \"$(readlink /proc/$p/ns/net)\" = \"$me\" ] && echo $(tr '\\0' ' ' < /proc/$p/cmdline | cut -d' ' -f1-2) $(grep VmRSS /proc/$p/status); done; true";
        let text = node.exec(look)?.ok()?.stdout;
        let mut sizes = BTreeMap::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let name = ["vrrp", "agent", "kube-proxy"]
                .into_iter()
                .find(|name| words.iter().take(2).any(|word| word.ends_with(name)));
            let kilobytes = words.iter().rev().find_map(|word| word.parse::<f64>().ok());
            if let (Some(name), Some(kilobytes)) = (name, kilobytes) {
                sizes.insert(name, kilobytes / 1024.0);
            }
        }
        let size = |name: &str| {
            sizes.get(name).copied().with_context(|| format!("no {name} on {}: {text}", node.name()))
        };
        let (vrrp, agent, proxy) = (size("vrrp")?, size("agent")?, size("kube-proxy")?);
        let role = if node.number() == owner.number { "owner" } else { "standby" };
        println!(
            "  {} ({role:7})  vrrp {vrrp:5.1}   agent {agent:5.1}   kube-proxy {proxy:5.1}   ratio of both to kube-proxy {:.2}",
            node.name(),
            (vrrp + agent) / proxy
        );
    }
    Ok(())
}

/// What several runs gave, in milliseconds.
struct Figures {
    median: f64,
    least: f64,
    most: f64,
}

impl Figures {
    fn of(mut runs: Vec<f64>) -> Self {
        runs.sort_by(f64::total_cmp);
        let at = |index: usize| runs.get(index).copied().unwrap_or_default();
        Self { median: at(runs.len() / 2), least: at(0), most: at(runs.len().saturating_sub(1)) }
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "median {:.0} ms, {:.0} to {:.0}", self.median, self.least, self.most)
    }
}
