//! `make bench`: figures with their baselines, measured in one run on one machine. A program, not a test: it asserts nothing
//! but that there was something to measure.
//!
//! `BENCH=full` measures every fault at every interval and size, `BENCH_RUNS=n` changes how often; sections can be chosen:
//! `cargo bench --package lab --bench bench -- outages faults loss lateness plugin dataplane flushes cluster`.

#[path = "bench/adverts.rs"]
mod adverts;
#[path = "bench/cluster.rs"]
mod cluster;
#[path = "bench/contender.rs"]
mod contender;
#[path = "bench/dataplane.rs"]
mod dataplane;
#[path = "../tests/agents/faults.rs"]
#[allow(dead_code, reason = "the tests of the api tier use more of it")]
mod faults;
#[path = "bench/lateness.rs"]
mod lateness;
#[path = "bench/loader.rs"]
mod loader;
#[path = "../tests/agents/node.rs"]
#[allow(dead_code, reason = "the tests of the api tier use more of it")]
mod node;
#[path = "bench/outage.rs"]
mod outage;
#[path = "bench/plugin.rs"]
mod plugin;
#[path = "bench/probe.rs"]
mod probe;
#[path = "../tests/agents/scene.rs"]
#[allow(dead_code, reason = "the tests of the api tier use more of it")]
mod scene;
#[path = "bench/slowdown.rs"]
mod slowdown;
#[path = "../tests/netns/timeline.rs"]
mod timeline;
#[path = "../tests/netns/vrrp.rs"]
#[allow(dead_code, reason = "the tests of the netns tier use more of it")]
mod vrrp;

use std::{
    env,
    net::Ipv4Addr,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, Parts, Segment, interrupt, paths, product};

use timeline::{Timeline, Trouble};

/// How often each outage is measured with each of the two.
const RUNS: u32 = 10;

/// A section's name and what it does.
type Section = (&'static str, fn() -> Result<()>);

/// What can be measured.
const SECTIONS: [Section; 8] = [
    ("outages", outages),
    ("faults", process_faults),
    ("loss", loss),
    ("lateness", lateness::measure),
    ("plugin", plugin::measure),
    ("dataplane", dataplane::measure),
    ("flushes", cluster::flushes),
    ("cluster", cluster::measure),
];

fn main() -> Result<()> {
    let words: Vec<String> = env::args().skip(1).collect();
    match words.split_first().map(|(first, rest)| (first.as_str(), rest)) {
        Some((dataplane::INSIDE, rest)) => return dataplane::run(rest),
        Some((cluster::CHANGE, rest)) => return cluster::change(rest),
        _ => {}
    }
    interrupt::on_interrupt(|| {
        Segment::remove_all();
        let _ = Lab::remove("bench");
    })?;
    let wanted: Vec<String> = words.into_iter().filter(|word| !word.starts_with('-')).collect();
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

/// How often something is measured.
fn runs() -> Result<u32> {
    match env::var("BENCH_RUNS") {
        Ok(text) => text.parse().ok().filter(|runs| *runs > 0).context("BENCH_RUNS is not a number of runs"),
        Err(_) => Ok(RUNS),
    }
}

/// Whether all is wanted, also what takes long.
fn full() -> bool {
    env::var("BENCH").is_ok_and(|word| word == "full")
}

fn outages() -> Result<()> {
    outage::compare(runs()?, full())
}

/// The owner's processes killed and stopped, and its plug pulled, with both processes of the product on each host.
fn process_faults() -> Result<()> {
    println!("three hosts with vrrp and agent, and an API server; adverts every 100 ms; of each fault");
    println!(
        "  warm, cold: of the requests of a client that knows the owner's MAC ({} ms apart), and of one that forgets it before",
        faults::WARM.as_millis()
    );
    println!(
        "  each ({} ms apart), how many failed, and the longest time without an answer",
        faults::COLD.as_millis()
    );
    println!("  ARP: how long at most nobody and how long two answered a host that asks every 20 ms");
    let lab: &'static Lab = Box::leak(Box::new(Lab::up("bench", Parts::Api)?));
    scene::install(lab)?;
    let segment = Segment::new(3 + faults::HOSTS)?;
    let mut scene = scene::Scene::new(lab, &segment, 3, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 66);
    scene.reserve(vip)?;
    for fault in faults::ALL {
        println!("{fault}: {}; goal: {}", fault.strike(&mut scene, vip)?, fault.goal());
    }
    unplugged(&scene, vip)?;
    drop(scene);
    Lab::remove("bench")
}

/// The owner's plug pulled again and again while the API server is away.
fn unplugged(scene: &scene::Scene<'_>, vip: Ipv4Addr) -> Result<()> {
    let runs = runs()?;
    scene.lab.stop_apiserver()?;
    let mut gaps = Vec::new();
    for _ in 0..runs {
        gaps.push(faults::unplug(scene, vip)?.1.longest_gap);
        // A carrier has to last before its node takes part again.
        thread::sleep(Duration::from_secs(4));
    }
    scene.lab.start_apiserver()?;
    gaps.sort_unstable();
    println!(
        "unplugged while the API server is away, {runs} times: the address did not answer for {} in the middle, {} at most; goal: 400 ms at most",
        ms(percentile(&gaps, 50)),
        ms(percentile(&gaps, 100))
    );
    Ok(())
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

/// A time of sorted ones: so many of a hundred took no longer.
fn percentile(sorted: &[Duration], percent: usize) -> Duration {
    sorted.get(sorted.len().saturating_sub(1) * percent / 100).copied().unwrap_or_default()
}

fn ms(time: Duration) -> String {
    format!("{:.1} ms", time.as_secs_f64() * 1000.0)
}

/// The agent as it is in the image; in the lab's machine it is beside this program.
fn program() -> PathBuf {
    let beside = env::current_exe().map(|exe| exe.with_file_name("vip-node")).unwrap_or_default();
    if beside.exists() {
        beside
    } else {
        paths::target().join("image/x86_64-unknown-linux-gnu/release/vip-node")
    }
}
