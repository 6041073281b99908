//! What settles after faults: losses, delays, disorder, duplicates, partitions in both directions and in one, pauses,
//! deaths and restarts.

use std::time::Duration;

use super::segment::{Link, Random, Segment, config};
use super::{count, explore, holds, interval, lan};

/// Whatever happened: after the last fault, within two down intervals (of the last rank, at the longest interval) there is
/// exactly one owner, and it stays. Where routers preempt after a delay, that comes on top. An offer and a goodbye
/// are over when nobody has taken what was offered for long enough.
#[test]
fn after_the_last_fault_there_is_one_owner_and_it_stays() {
    explore(settles, &[], 5000);
}

fn settles(seed: u64, traced: bool) -> Result<(), String> {
    let mut random = Random(seed);
    let count = count(&mut random);
    let common = interval(&mut random);
    // During an upgrade intervals differ.
    let mixed = random.percent(20);
    let preempt = match random.below(5) {
        0 => Some(Duration::ZERO),
        1 => Some(random.time(common * 5)),
        _ => None,
    };
    let configs = (0..count)
        .map(|host| {
            let interval = if mixed { interval(&mut random) } else { common };
            config(host, count, interval, preempt)
        })
        .collect();
    let mut lan = Segment::new(configs, random, traced);
    let mut given_up = Duration::ZERO;
    for _ in 0..lan.random.below(16) {
        given_up = given_up.max(disturb(&mut lan));
        let time = lan.random.time(common * 4);
        lan.run(time);
    }

    lan.trace(|| "the last fault is over".to_owned());
    lan.link = Link::CALM;
    lan.partition(|_| 0);
    for host in 0..count {
        lan.resume(host);
        if lan.hosts[host].leaving {
            lan.kill(host);
        }
        lan.revive(host);
    }
    lan.run(given_up.saturating_sub(lan.now));
    lan.run(lan.down() * 2 + preempt.unwrap_or_default());
    let owner = lan.owner()?;
    lan.record();
    lan.run(lan.down() * 2);
    let record = lan.record();
    holds(lan.owner()? == owner, || format!("{owner} was displaced"))?;
    holds(record.shared + record.bare == Duration::ZERO, || format!("{record:?}"))
}

/// One fault. Returns until when a master may wait for a successor because of it.
fn disturb(lan: &mut Segment) -> Duration {
    let host = lan.random.index(lan.hosts.len());
    let owner = lan.owners().first().copied().unwrap_or(host);
    // What befalls the owner matters most.
    let host = if lan.random.percent(50) { owner } else { host };
    let bits = lan.random.below(u64::MAX);
    match lan.random.below(14) {
        0 => lan.link.loss = lan.random.below(90),
        1 => lan.link.flight = Link::SHORTEST + lan.random.time(Duration::from_millis(20)),
        2 => lan.link.doubled = lan.random.below(90),
        3 => lan.link.ordered = lan.random.percent(50),
        4 => lan.partition(|host| bits >> host & 1),
        5 => lan.partition(|host| u64::from(host != owner)),
        6 => (0..lan.hosts.len()).for_each(|to| {
            if bits >> to & 1 == 1 {
                lan.cut(host, to)
            }
        }),
        7 => (0..lan.hosts.len()).for_each(|from| {
            if bits >> from & 1 == 1 {
                lan.cut(from, host)
            }
        }),
        8 => lan.kill(host),
        9 => lan.pause(host),
        10 => (0..lan.hosts.len()).for_each(|host| lan.resume(host)),
        11 => (0..lan.hosts.len()).for_each(|host| lan.revive(host)),
        12 => lan.leave(host),
        _ => {
            lan.offer(host);
            let interval = lan.hosts[host].router.config().interval;
            return lan.now + (interval * 5 / 4).max(Duration::from_secs(1));
        }
    }
    Duration::ZERO
}

/// A partition, in one direction or in both, that is healed: within two down intervals one owner, and until then never
/// none. (Two take less than an interval to hear each other; one that could not hear had taken over by itself.)
#[test]
fn a_healed_partition_leaves_one_owner() {
    explore(heals, &[], 1500);
}

fn heals(seed: u64, traced: bool) -> Result<(), String> {
    let mut random = Random(seed);
    let (count, interval) = (count(&mut random), interval(&mut random));
    let mut lan = lan(count, interval, random, traced);
    lan.run(lan.down() * 2);
    let owner = lan.owner()?;
    let bits = lan.random.below(u64::MAX);
    match lan.random.below(3) {
        0 => lan.partition(|host| bits >> host & 1),
        1 => lan.partition(|host| u64::from(host == owner)),
        _ => (0..count * count).for_each(|link| {
            if lan.random.percent(30) {
                lan.cut(link / count, link % count);
            }
        }),
    }
    let time = lan.random.time(lan.down() * 5);
    lan.run(time);
    lan.record();
    lan.partition(|_| 0);
    lan.run(lan.down() * 2);
    let owner = lan.owner()?;
    let bare = lan.record().bare;
    holds(bare == Duration::ZERO, || format!("nobody had it for {bare:?}"))?;
    lan.run(lan.down());
    holds(lan.owner()? == owner, || format!("{owner} was displaced"))
}

/// A master that was paused for so long that it was replaced hears so before it speaks, even when its socket had no room for
/// anything: nobody else notices its return.
#[test]
fn a_paused_master_hears_first_that_it_was_replaced() {
    explore(listens, &[], 500);
}

fn listens(seed: u64, traced: bool) -> Result<(), String> {
    let mut random = Random(seed);
    let (count, interval) = (count(&mut random), interval(&mut random));
    let mut lan = lan(count, interval, random, traced);
    lan.run(lan.down() * 2);
    let first = lan.owner()?;
    lan.pause(first);
    let time = lan.down() + lan.random.time(interval * 50);
    lan.run(time);
    lan.resume(first);
    let second = lan.owner()?;
    lan.record();
    lan.run(lan.down() * 2);
    let record = lan.record();
    holds(lan.owner()? == second && record.shared + record.bare == Duration::ZERO, || {
        format!("{second} did not stay: {record:?}")
    })
}

/// Nodes that all stood still at once, as virtual machines on one host do, go on as before: the silence was their own.
#[test]
fn after_a_pause_of_all_nodes_the_owner_is_the_same() {
    explore(stands_still, &[], 500);
}

fn stands_still(seed: u64, traced: bool) -> Result<(), String> {
    let mut random = Random(seed);
    let (count, interval) = (count(&mut random), interval(&mut random));
    let mut lan = lan(count, interval, random, traced);
    lan.run(lan.down() * 2);
    let owner = lan.owner()?;
    for host in 0..count {
        lan.pause(host);
    }
    let time = lan.down() + interval / 2 + lan.random.time(interval * 50);
    lan.run(time);
    for host in 0..count {
        lan.resume(host);
    }
    lan.run(lan.down() * 2);
    let now = lan.owner()?;
    holds(now == owner, || format!("{now} took over from {owner}"))
}
