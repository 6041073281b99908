//! Whole LANs of routers on simulated time: what must hold whatever happens to the packets and to the hosts.
//!
//! Each property is tried on many schedules; a schedule is a seed. One that breaks is printed with its seed and its
//! timeline, and the seed is then kept with the property and runs first. `SCHEDULES=100` tries a hundred times as many.
//!
//! What VRRP itself cannot give: two routers that both have not yet heard each other's first advertisement own the address
//! together until one arrives. Ranks are spaced so that this takes a delay of an eighth of the interval; those beyond the
//! ninth rank all have priority 1 and do so whenever nobody better is left; of those the greatest address remains.

mod faults;
mod planned;
mod segment;

use std::time::Duration;

use segment::{Link, Random, Segment, config};

/// Tries a property on its known seeds and on `count` others.
fn explore(property: fn(u64, bool) -> Result<(), String>, known: &[u64], count: u64) {
    let more = std::env::var("SCHEDULES").ok().and_then(|more| more.parse().ok()).unwrap_or(1);
    for seed in known.iter().copied().chain(0..count * more) {
        if property(seed, false).is_err() {
            let again = property(seed, true);
            panic!("the schedule of seed {seed} breaks it: {again:?}");
        }
    }
}

/// An interval of 10 ms to 1 s, the short ones as often as the long ones.
fn interval(random: &mut Random) -> Duration {
    let steps = [1, 2, 5, 10, 20, 50, 100];
    Duration::from_millis(10 * steps[random.index(steps.len())])
}

/// 2 to 50 routers, mostly few.
fn count(random: &mut Random) -> usize {
    match random.below(20) {
        0 => 2 + random.index(49),
        1..=3 => 2 + random.index(19),
        _ => 2 + random.index(6),
    }
}

/// Routers that do not preempt, ranked, on a LAN.
fn lan(count: usize, interval: Duration, random: Random, traced: bool) -> Segment {
    let configs = (0..count).map(|host| config(host, count, interval, None)).collect();
    Segment::new(configs, random, traced)
}

/// What a property says when it does not hold.
fn holds(condition: bool, otherwise: impl FnOnce() -> String) -> Result<(), String> {
    if condition { Ok(()) } else { Err(otherwise()) }
}

#[test]
fn of_fifty_that_miss_their_master_one_takes_over() {
    explore(
        |seed, traced| {
            let tenth = Duration::from_millis(100);
            let mut lan = lan(50, tenth, Random(seed), traced);
            lan.link = Link { flight: Link::SHORTEST + Duration::from_micros(200), ..Link::CALM };
            let time = lan.down() * 2 + lan.random.time(tenth);
            lan.run(time);
            let first = lan.owner()?;
            lan.kill(first);
            lan.record();
            lan.run(lan.down());
            let second = lan.owner()?;
            let takers = lan.hosts.iter().filter(|host| host.takeovers > 0).count();
            // The dead one is counted too.
            holds(takers == 2 && second != first, || format!("{takers} takers"))?;
            let record = lan.record();
            holds(record.bare <= lan.down(), || format!("{record:?}"))?;
            lan.revive(first);
            lan.run(lan.down() * 2);
            holds(lan.owner()? == second, || "a living master was displaced".to_owned())
        },
        &[],
        100,
    );
}

#[test]
fn those_beyond_the_ninth_rank_take_over_together_and_one_remains() {
    explore(
        |seed, traced| {
            let mut lan = lan(50, Duration::from_millis(100), Random(seed), traced);
            lan.run(lan.down() * 2);
            let ranked = |lan: &Segment, host: usize| lan.hosts[host].router.config().priority > 1;
            for host in (0..50).filter(|host| ranked(&lan, *host)).collect::<Vec<_>>() {
                lan.kill(host);
            }
            lan.record();
            lan.run(lan.down());
            let record = lan.record();
            holds(record.shared <= lan.link.flight, || format!("{record:?}"))?;
            // The greatest of those that did not hear of another one in time.
            let owner = lan.owner()?;
            let takers = (0..50).filter(|host| !ranked(&lan, *host) && lan.hosts[*host].takeovers > 0);
            holds(takers.max() == Some(owner), || format!("{owner} remains"))
        },
        &[],
        50,
    );
}
