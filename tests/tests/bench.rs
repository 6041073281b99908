//! `make bench`: figures with their baselines, measured in one run on one machine. A program, not a test: it asserts nothing
//! but that there was something to measure.
//!
//! `BENCH=full` measures every fault at every interval and size, `BENCH_RUNS=n` changes how often; sections can be chosen:
//! `cargo test --package lab --test bench -- outages faults loss lateness cluster`.

#[path = "bench/adverts.rs"]
mod adverts;
#[path = "bench/contender.rs"]
mod contender;
#[path = "agents/faults.rs"]
#[allow(dead_code, reason = "the tests of the api tier use more of it")]
mod faults;
#[path = "bench/lateness.rs"]
mod lateness;
#[path = "agents/node.rs"]
#[allow(dead_code, reason = "the tests of the api tier use more of it")]
mod node;
#[path = "bench/outage.rs"]
mod outage;
#[path = "bench/probe.rs"]
mod probe;
#[path = "agents/scene.rs"]
#[allow(dead_code, reason = "the tests of the api tier use more of it")]
mod scene;
#[path = "bench/timeline.rs"]
mod timeline;
#[path = "netns/vrrp.rs"]
#[allow(dead_code, reason = "the tests of the netns tier use more of it")]
mod vrrp;

use std::{
    collections::BTreeMap,
    env, fs,
    net::Ipv4Addr,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, Parts, Segment, image, interrupt, paths, product, workload::Workload};

use timeline::{Timeline, Trouble};

/// How often each outage is measured with each of the two.
const RUNS: u32 = 10;

/// A section's name and what it does.
type Section = (&'static str, fn() -> Result<()>);

/// What can be measured.
const SECTIONS: [Section; 5] = [
    ("outages", outages),
    ("faults", process_faults),
    ("loss", loss),
    ("lateness", lateness::measure),
    ("cluster", cluster),
];

fn main() -> Result<()> {
    interrupt::on_interrupt(|| {
        Segment::remove_all();
        let _ = Lab::remove("bench");
    })?;
    let wanted: Vec<String> = env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    if let Some(unknown) = wanted.iter().find(|word| SECTIONS.iter().all(|(name, _)| name != word)) {
        bail!("{unknown}: no such section; there are {}", SECTIONS.map(|(name, _)| name).join(", "));
    }
    product::build()?;
    for (name, measure) in SECTIONS {
        if wanted.is_empty() || wanted.iter().any(|word| word == name) {
            let clock = Instant::now();
            println!("\n== {name} ==");
            measure()?;
            println!("({:.0} s)", clock.elapsed().as_secs_f64());
        }
    }
    Ok(())
}

fn outages() -> Result<()> {
    let runs = match env::var("BENCH_RUNS") {
        Ok(text) => {
            text.parse().ok().filter(|runs| *runs > 0).context("BENCH_RUNS is not a number of runs")?
        }
        Err(_) => RUNS,
    };
    outage::compare(runs, env::var("BENCH").is_ok_and(|word| word == "full"))
}

/// The owner's processes killed and stopped: what a client that knows the owner sees, and one that asks who it is.
fn process_faults() -> Result<()> {
    println!(
        "three hosts and an API server, adverts every 100 ms, a request and an ARP question every 5 and 20 ms"
    );
    let lab: &'static Lab = Box::leak(Box::new(Lab::up("bench", Parts::Api)?));
    scene::install(lab)?;
    let segment = Segment::new(4)?;
    let mut scene = scene::Scene::new(lab, &segment, 3, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 66);
    scene.reserve(vip)?;
    for fault in faults::ALL {
        println!("{fault}: {}", fault.strike(&mut scene, vip)?);
    }
    drop(scene);
    Lab::remove("bench")
}

/// Owners under loss.
fn loss() -> Result<()> {
    println!("owners under loss: three hosts, adverts every 100 ms, host 1 is the owner");
    let troubles = [
        (Trouble::Deaf(1), 5),
        (Trouble::Deaf(2), 5),
        (Trouble::Mute(1), 5),
        (Trouble::Lossy(20), 30),
        (Trouble::Apart(1), 30),
    ];
    thread::scope(|scope| {
        let all = troubles.map(|(trouble, seconds)| {
            scope.spawn(move || Timeline::record(trouble, Duration::from_secs(seconds)))
        });
        let mut slowest = Duration::ZERO;
        for one in all {
            let timeline = one.join().ok().context("a recording ended badly")??;
            println!("{timeline}");
            slowest = slowest.max(timeline.settled().unwrap_or(Duration::MAX));
        }
        ensure!(slowest < Duration::MAX, "not always one owner after healing");
        println!("one owner after healing: {} ms at the slowest", slowest.as_millis());
        Ok(())
    })
}

/// What needs a cluster, and the size of the image.
fn cluster() -> Result<()> {
    size()?;
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
