//! Adverts on time: at the shortest interval, and while hundreds of addresses are bound.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Host, Segment, command};
use vip_core::{
    api::VrrpState,
    vrrp::{Lan, RouterConfig, RouterId},
};

use crate::settled_owner_of;
use crate::vrrp::{SOON, VIP, VRID, Vrrp, config};

const INTERVAL: Duration = Duration::from_millis(10);

/// The times between adverts of an identifier as another host hears them, ascending, in microseconds.
fn gaps(host: &Host, vrid: u8, count: usize) -> Result<Vec<u64>> {
    let capture =
        format!("timeout 20 tcpdump -ni eth0 -tt -c {count} 'ip proto 112 and ip[21] = {vrid}' 2>/dev/null");
    let seen = host.exec(&capture)?.stdout;
    let times: Vec<f64> =
        seen.lines().filter_map(|line| line.split_whitespace().next()?.parse().ok()).collect();
    let mut gaps: Vec<u64> =
        times.windows(2).map(|pair| ((pair[1] - pair[0]) * 1e6).max(0.0) as u64).collect();
    gaps.sort_unstable();
    ensure!(gaps.len() + 1 >= count, "only {} adverts were seen", gaps.len() + 1);
    Ok(gaps)
}

/// The time from an owner's first advert to the last address's first announcement.
fn announced(host: &Host, owner: &Vrrp<'_>, vips: &[IpAddr]) -> Result<Duration> {
    let (mac, sender) = (owner.host.mac()?, owner.host.address());
    let capture = format!(
        "timeout 6 tcpdump -ni eth0 -tt 'ether src {mac} and (arp or (ip src {sender} and ip proto 112 and ip[21] = {}))' 2>/dev/null",
        VRID
    );
    let seen = host.exec(&capture)?.stdout;
    let time = |line: &str| line.split_whitespace().next()?.parse::<f64>().ok();
    let begun =
        seen.lines().find(|line| line.contains("VRRP")).and_then(time).context("no advert was seen")?;
    let mut known = BTreeSet::new();
    let mut last = begun;
    for line in seen.lines() {
        let target = line.split_once("who-has ").and_then(|(_, rest)| rest.split([' ', ',']).next());
        let vip = target.and_then(|target| target.parse().ok()).filter(|vip| vips.contains(vip));
        if vip.is_some_and(|vip| known.insert(vip)) {
            last = time(line).context("a line without a time")?;
        }
    }
    ensure!(known.len() == vips.len(), "{} addresses were announced", known.len());
    Ok(Duration::from_secs_f64((last - begun).max(0.0)))
}

fn print(what: &str, gaps: &[u64]) {
    let at = |percent: usize| gaps[(gaps.len() - 1) * percent / 100];
    println!("{what}: gaps of {} to {} us, median {}, 99 % below {}", at(0), at(100), at(50), at(99));
}

fn many(count: u16) -> Vec<IpAddr> {
    (0..count).map(|n| Ipv4Addr::from(u32::from(VIP) + 256 + u32::from(n)).into()).collect()
}

#[test]
fn adverts_every_10_ms_are_on_time_and_fail_over_fast() -> Result<()> {
    let segment = Segment::new(3)?;
    let mut all = Vec::new();
    for (number, priority) in [(1, 254), (2, 224)] {
        let vrrp = Vrrp::start(segment.host(number), number)?;
        vrrp.elect_all(
            vec![RouterConfig { interval: INTERVAL, ..config(priority, &[VIP.into()]) }],
            Lan::default(),
        )?;
        all.push(vrrp);
    }
    let owner = settled_owner_of(&all, VIP.into())?;
    let gaps = gaps(segment.host(3), VRID, 300)?;
    print("adverts every 10 ms", &gaps);
    let median = gaps[gaps.len() / 2];
    ensure!((9_800..10_500).contains(&median), "the median of the gaps is {median} us");
    segment.isolate(all[owner].number)?;
    let cut = Instant::now();
    command::until("a successor", SOON, || Ok((all[1 - owner].state() == VrrpState::Master).then_some(())))?;
    println!("taken over after {} ms", cut.elapsed().as_millis());
    Ok(())
}

#[test]
fn hundreds_of_addresses_move_at_once_and_no_advert_is_late() -> Result<()> {
    let segment = Segment::new(3)?;
    let (vips, extra) = (many(250), [IpAddr::from([10, 87, 7, 7])]);
    let other = RouterId { vrid: 78, ..config(1, &extra).id };
    let mut all = Vec::new();
    for (number, priorities) in [(1, (254, 224)), (2, (224, 254))] {
        let vrrp = Vrrp::start(segment.host(number), number)?;
        let big = RouterConfig { interval: INTERVAL, ..config(priorities.0, &vips) };
        let small = RouterConfig { id: other.clone(), interval: INTERVAL, ..config(priorities.1, &extra) };
        vrrp.elect_all(vec![big, small], Lan::default())?;
        all.push(vrrp);
    }
    let bound =
        |vrrp: &Vrrp<'_>| vrrp.report().routers.iter().map(|router| router.bound.len()).sum::<usize>();
    command::until("all addresses", SOON, || Ok((bound(&all[0]) + bound(&all[1]) == 251).then_some(())))?;
    let owner = usize::from(bound(&all[1]) > 1);
    // The other election's adverts go out while the addresses of this one are bound.
    let (gaps, announced) = thread::scope(|scope| -> Result<(Vec<u64>, Duration)> {
        let adverts = scope.spawn(|| gaps(segment.host(3), 78, 200));
        let announcements = scope.spawn(|| announced(segment.host(3), &all[1 - owner], &vips));
        thread::sleep(Duration::from_millis(700));
        segment.isolate(all[owner].number)?;
        command::until("all addresses", SOON, || Ok((bound(&all[1 - owner]) == 251).then_some(())))?;
        let gaps = adverts.join().ok().context("tcpdump ended badly")??;
        Ok((gaps, announcements.join().ok().context("tcpdump ended badly")??))
    })?;
    println!("250 addresses are announced {} us after the first advert", announced.as_micros());
    ensure!(announced < Duration::from_millis(200), "that is late");
    print("adverts of the other election", &gaps);
    let most = gaps[(gaps.len() - 1) * 90 / 100];
    ensure!(
        most < 30_000,
        "a tenth of the adverts came after {most} us and more: a backup would have taken over"
    );
    ensure!(all[1 - owner].has(vips[249])?, "the last address is missing");
    Ok(())
}

#[test]
fn two_hundred_elections_move_at_once() -> Result<()> {
    let segment = Segment::new(3)?;
    let routers = |priority: u8| -> Vec<RouterConfig> {
        let all = many(200).into_iter().zip(1..);
        all.map(|(vip, vrid)| RouterConfig {
            id: RouterId { vrid, ..config(1, &[vip]).id },
            ..config(priority, &[vip])
        })
        .collect()
    };
    let owned =
        |vrrp: &Vrrp<'_>| vrrp.report().routers.iter().filter(|router| router.bound.len() == 1).count();
    let mut all = Vec::new();
    for (number, priority) in [(1, 254), (2, 224)] {
        let vrrp = Vrrp::start(segment.host(number), number)?;
        vrrp.elect_all(routers(priority), Lan::default())?;
        all.push(vrrp);
        command::until("200 masters", SOON, || Ok((owned(&all[0]) == 200).then_some(())))?;
    }
    let gaps = gaps(segment.host(3), 100, 20)?;
    print("one of 200 elections with adverts every 100 ms", &gaps);
    let median = gaps[gaps.len() / 2];
    ensure!((99_000..102_000).contains(&median), "the median of the gaps is {median} us");
    ensure!((owned(&all[0]), owned(&all[1])) == (200, 0), "some have moved");

    segment.isolate(1)?;
    let cut = Instant::now();
    while owned(&all[1]) < 200 {
        ensure!(cut.elapsed() < SOON, "only {} have moved", owned(&all[1]));
        thread::sleep(Duration::from_millis(5));
    }
    println!("200 elections have moved after {} ms", cut.elapsed().as_millis());
    ensure!(cut.elapsed() < Duration::from_secs(2), "that is late");
    // Healed, the better one has them all.
    segment.rejoin(1)?;
    command::until("one owner of each", SOON, || {
        Ok(((owned(&all[0]), owned(&all[1])) == (200, 0)).then_some(()))
    })
}
