//! The half that runs in the machine. Each figure is taken in a network namespace of its own, which has its own table.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::netns::in_new_netns;
use vip_core::{
    api::Scheduler,
    plan::{Change, Protocol, ServiceKey, Settings, Tables, VirtualService, plan},
};
use vip_node::dataplane::{Dataplane as _, Kernel};

use super::rival::Rival;
use crate::{lateness, loader::Loader, ms, percentile, slowdown::Slowdown};

/// Destinations of a service.
const DESTINATIONS: u16 = 5;
/// Services among which one entry changes, and how often.
const AMONG: u16 = 2000;
const TIMES: u8 = 200;
/// What one change may take on the host, and what one of a weight may take of keepalived's time.
const GOAL: (Duration, f64) = (Duration::from_millis(10), 0.01);
/// How often keepalived is asked for each change.
const RELOADS: u32 = 3;
/// How often everything is flushed while others listen to the adverts.
const FLUSHES: u8 = 3;
/// Endpoints that come and go then, how often, and for how long.
const FLAPPING: (u16, Duration, Duration) = (1000, Duration::from_millis(100), Duration::from_secs(10));

/// Measures and prints. The words: the host's for the slowdown, and how many services to load.
pub fn run(words: &[String]) -> Result<()> {
    let [host, services] = words else { anyhow::bail!("the host's time and a number of services, please") };
    let services: u16 = services.parse().context("the number of services")?;
    let slowdown = Slowdown::from_word(host)?;
    println!("the machine is {slowdown} times slower than its host (texts in a sorted map in both)");
    load(services)?;
    apart(|| change(slowdown))?;
    refill(services)?;
    adverts(services)
}

fn apart<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    in_new_netns(work)?
}

/// A hundred virtual IPs share the services.
fn desired(services: u16) -> Tables {
    let settings = Settings::new(Scheduler::Wlc, None);
    let services: BTreeMap<ServiceKey, VirtualService> = (0..services)
        .map(|n| {
            let address = IpAddr::from([10, 88, 0, (n % 100) as u8]);
            let destinations = (1..=DESTINATIONS).map(|pod| (pod_of(n, pod), 1)).collect();
            let key = ServiceKey { address, protocol: Protocol::Tcp, port: 1000 + n / 100 };
            (key, VirtualService { settings: settings.clone(), destinations })
        })
        .collect();
    let ledger: BTreeSet<ServiceKey> = services.keys().copied().collect();
    let guarded = ledger.iter().map(|key| key.address).collect();
    Tables { services, ledger, guarded, ..Tables::default() }
}

fn pod_of(service: u16, pod: u16) -> SocketAddr {
    SocketAddr::from(([10, 96 + pod as u8, (service / 250) as u8, (service % 250) as u8], 8080))
}

fn kernel() -> Kernel {
    Kernel::new("/proc/sys/net")
}

/// Reads the kernel, plans, and takes the steps, as the agent does; returns how many there were.
fn converge(kernel: &mut Kernel, desired: &Tables) -> Result<usize> {
    let changes = plan(desired, &kernel.observe()?).changes;
    take(kernel, &changes)?;
    Ok(changes.len())
}

fn take(kernel: &mut Kernel, changes: &[Change]) -> Result<()> {
    match kernel.apply(changes).into_iter().next() {
        Some((_, error)) => Err(error.into()),
        None => Ok(()),
    }
}

/// The bare loader, then ours. The loader's namespace outlives ours: what the kernel does at its end would slow ours down.
fn beside<A: Send, B: Send>(
    bare: impl FnOnce(&Loader) -> Result<A> + Send,
    ours: impl FnOnce() -> Result<B> + Send,
) -> Result<(A, B)> {
    apart(|| {
        let loader = Loader::open()?;
        let bare = bare(&loader)?;
        loader.flush()?;
        Ok((bare, apart(ours)?))
    })
}

fn load(services: u16) -> Result<()> {
    // The kernel fetches its modules at the first use of each, once.
    apart(|| converge(&mut kernel(), &desired(1)))?;
    let desired = desired(services);
    let ((sent, bare), (steps, ours)) = beside(
        |loader| {
            let clock = Instant::now();
            Ok((loader.load(&desired)?, clock.elapsed()))
        },
        || {
            let mut kernel = kernel();
            let clock = Instant::now();
            let steps = converge(&mut kernel, &desired)?;
            let ours = clock.elapsed();
            ensure!(plan(&desired, &kernel.observe()?).changes.is_empty(), "the kernel holds something else");
            Ok((steps, ours))
        },
    )?;
    println!(
        "cold load of {services} services x {DESTINATIONS}: {} with nftables, {steps} steps; bare loader {}, {sent} messages; ratio {:.2} (goal 1.5)",
        ms(ours),
        ms(bare),
        ratio(ours, bare)
    );
    let clock = Instant::now();
    let theirs = apart(|| Rival::start(&desired).map(|_| clock.elapsed()))?;
    println!("  keepalived, from its start: {}; ratio {:.4}", ms(theirs), ratio(ours, theirs));
    Ok(())
}

/// One endpoint more, one less, one with another weight: from the desired tables to the kernel's acknowledgement.
fn change(slowdown: Slowdown) -> Result<()> {
    let mut desired = desired(AMONG);
    let mut kernel = kernel();
    converge(&mut kernel, &desired)?;
    let mut mirror = kernel.observe()?;
    let (key, service) = desired.services.iter().nth(usize::from(AMONG / 2)).context("no services")?;
    let (key, known) = (*key, *service.destinations.keys().next().context("no destinations")?);
    let extra = SocketAddr::from(([10, 200, 0, 1], 8080));
    let mut took: [Vec<Duration>; 3] = Default::default();
    for n in 0..TIMES {
        let weight = 2 + u32::from(n % 2);
        let changes = [
            Change::AddDestination(key, extra, 1),
            Change::SetDestination(key, known, weight),
            Change::DeleteDestination(key, extra),
        ];
        for (change, took) in changes.iter().zip(&mut took) {
            desired.apply(change);
            let clock = Instant::now();
            let steps = plan(&desired, &mirror).changes;
            take(&mut kernel, &steps)?;
            steps.iter().for_each(|step| mirror.apply(step));
            took.push(clock.elapsed());
            ensure!(steps == [change.clone()], "{change} took {} messages", steps.len());
        }
    }
    let mut theirs = apart(|| {
        let mut tables = self::desired(AMONG);
        let rival = Rival::start(&tables)?;
        let mut took: [Vec<Duration>; 3] = Default::default();
        for weight in 2..2 + RELOADS {
            let changes = [
                (Change::AddDestination(key, extra, 1), extra, Some(1)),
                (Change::SetDestination(key, known, weight), known, Some(weight)),
                (Change::DeleteDestination(key, extra), extra, None),
            ];
            for ((change, to, wanted), took) in changes.iter().zip(&mut took) {
                tables.apply(change);
                took.push(rival.reload(&tables, &key, *to, *wanted)?);
            }
        }
        Ok(took)
    })?;
    for ((what, ours), theirs) in
        ["added", "with another weight", "removed"].into_iter().zip(&mut took).zip(&mut theirs)
    {
        println!(
            "one endpoint {what} among {AMONG} x {DESTINATIONS}, {TIMES} times: 1 message, {}",
            slowdown.tell(ours, GOAL.0)
        );
        theirs.sort_unstable();
        let median = percentile(theirs, 50);
        println!(
            "  keepalived, by its configuration and SIGHUP, {RELOADS} times: p50 {}; ratio of the medians {:.4} (goal {})",
            ms(median),
            ratio(percentile(ours, 50), median),
            GOAL.1
        );
    }
    Ok(())
}

/// Everything is gone: what is bound here comes first, then the rest.
fn refill(services: u16) -> Result<()> {
    let desired = desired(services);
    let (bare, (first, mine, ours)) = beside(
        |loader| {
            loader.load(&desired)?;
            loader.flush()?;
            let clock = Instant::now();
            loader.load(&desired)?;
            Ok(clock.elapsed())
        },
        || {
            let mut kernel = kernel();
            converge(&mut kernel, &desired)?;
            Loader::open()?.flush()?;
            // Not the first of the plan by itself.
            let owned = BTreeSet::from([IpAddr::from([10, 88, 0, 77])]);
            let is_owned = |change: &&Change| change.key().is_some_and(|key| owned.contains(&key.address));
            let clock = Instant::now();
            let changes = plan(&desired, &kernel.observe()?).first(&owned).changes;
            let (mine, rest) = changes.split_at(changes.iter().take_while(is_owned).count());
            take(&mut kernel, mine)?;
            let first = clock.elapsed();
            take(&mut kernel, rest)?;
            Ok((first, mine.len(), clock.elapsed()))
        },
    )?;
    println!(
        "refill of {services} services x {DESTINATIONS} after a flush: {}, what is bound here ({mine} steps) after {}; bare loader {}; ratio {:.2} (goal 1.2)",
        ms(ours),
        ms(first),
        ms(bare),
        ratio(ours, bare)
    );
    Ok(())
}

/// Adverts of an owner whose whole table is loaded, flushed and filled, while its machine has other work too.
fn adverts(services: u16) -> Result<()> {
    let desired = desired(services);
    let (extra, every, flapping) = FLAPPING;
    let mut crowded = desired.clone();
    if let Some(service) = crowded.services.values_mut().next() {
        service.destinations.extend((0..extra).map(|n| (pod_of(n, 100), 1)));
    }
    let what = format!(
        "{services} services x {DESTINATIONS} loaded and {FLUSHES} times flushed and filled, {extra} endpoints that come and go for \
         {} s, and all deleted",
        flapping.as_secs()
    );
    lateness::beside(&what, |owner| {
        owner.run(|| {
            let mut kernel = kernel();
            converge(&mut kernel, &desired)?;
            for _ in 0..FLUSHES {
                Loader::open()?.flush()?;
                converge(&mut kernel, &desired)?;
            }
            let since = Instant::now();
            for tables in [&crowded, &desired].into_iter().cycle().take_while(|_| since.elapsed() < flapping)
            {
                let next = Instant::now() + every;
                converge(&mut kernel, tables)?;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
            // Everything is deleted at once.
            converge(&mut kernel, &Tables::default()).map(drop)
        })?
    })
}

fn ratio(a: Duration, b: Duration) -> f64 {
    a.as_secs_f64() / b.as_secs_f64()
}
