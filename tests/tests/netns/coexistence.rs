//! Beside keepalived: both checksum forms, both families, multicast and unicast, both ways round, and its replacement.

use std::{
    net::{IpAddr, Ipv6Addr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Host, Segment, command};
use vip_core::vrrp::{ChecksumPolicy, Lan, Peer};

use crate::keepalived::{Keepalived, LINK_LOCAL, Settings};
use crate::vrrp::{SOON, VIP, VIP6, Vrrp, config, has};
use crate::{one_owner_of, settled_owner_of};

/// The addresses of keepalived's virtual router, the one that is looked at last.
fn addresses(settings: &Settings) -> Vec<IpAddr> {
    if settings.ipv6 { vec![LINK_LOCAL.into(), VIP6.into()] } else { vec![VIP.into()] }
}

/// Ours on host 1, keepalived on host 2; each is master once and goes, and once keepalived takes over from ours that runs.
fn both_ways_round(segment: &Segment, settings: &Settings, lan: &Lan) -> Result<()> {
    let vips = addresses(settings);
    let vip = vips[vips.len() - 1];
    for (ours, theirs, first) in [(200, 100, 1), (100, 200, 2), (100, 200, 1)] {
        let start =
            || Keepalived::start_with(segment.host(2), &Settings { priority: theirs, ..settings.clone() });
        let mut keepalived = if first == 2 { Some(start()?) } else { None };
        if first == 2 {
            wait_owner(segment, vip, 2)?;
        }
        let alone = [Vrrp::start(segment.host(1), 1)?];
        alone[0].elect_all(vec![config(ours, &vips)], lan.clone())?;
        if first == 1 {
            wait_owner(segment, vip, 1)?;
            keepalived = Some(start()?);
        }
        let keepalived = keepalived.context("keepalived was not started")?;
        let owner = if ours > theirs { 1 } else { 2 };
        wait_owner(segment, vip, owner)?;
        let (none, both) = watch(segment, vip, Duration::from_secs(1))?;
        ensure!(none + both == 0, "{ours} against {theirs}: {none} times nobody, {both} times both had it");
        // What came before ours was told of the election is counted as that of an unknown virtual router.
        let mut refused = alone[0].report().refused;
        refused.retain(|kind, count| kind != "vrid" && *count > 0);
        ensure!(refused.is_empty(), "{ours} against {theirs}: refused {refused:?}");
        if owner == 2 {
            keepalived.stop()?;
            one_owner_of(&alone, vip)?;
        } else {
            // Ours ends, keepalived takes over.
            alone[0].elect_all(Vec::new(), lan.clone())?;
            wait_owner(segment, vip, 2)?;
            keepalived.stop()?;
        }
    }
    Ok(())
}

/// Waits until that host has the address, and nothing moves.
fn wait_owner(segment: &Segment, vip: IpAddr, number: u8) -> Result<()> {
    command::until(&format!("host {number} to be the owner"), SOON, || {
        Ok((settle(segment, vip)? == number).then_some(()))
    })
}

/// The host that has the address, after a while in which nothing moved.
fn settle(segment: &Segment, vip: IpAddr) -> Result<u8> {
    command::until("one owner", SOON, || {
        let owner = owner(segment, vip)?;
        thread::sleep(Duration::from_millis(700));
        Ok(owner.filter(|one| self::owner(segment, vip).is_ok_and(|again| again == Some(*one))))
    })
}

fn owner(segment: &Segment, vip: IpAddr) -> Result<Option<u8>> {
    Ok(match (has(segment.host(1), vip)?, has(segment.host(2), vip)?) {
        (true, false) => Some(1),
        (false, true) => Some(2),
        _ => None,
    })
}

/// How often neither and how often both of the hosts had the address.
fn watch(segment: &Segment, vip: IpAddr, time: Duration) -> Result<(usize, usize)> {
    let (end, mut none, mut both) = (Instant::now() + time, 0, 0);
    while Instant::now() < end {
        match (has(segment.host(1), vip)?, has(segment.host(2), vip)?) {
            (true, true) => both += 1,
            (false, false) => none += 1,
            _ => {}
        }
    }
    Ok((none, both))
}

/// Its link-local address, once it can be used.
fn link_local(host: &Host) -> Result<Ipv6Addr> {
    command::until("a link-local address", SOON, || {
        let shown = host.exec("ip -6 -oneline address show dev eth0 scope link -tentative")?.stdout;
        let word = shown.split_whitespace().find_map(|word| word.strip_suffix("/64"));
        Ok(word.map(str::parse).transpose()?)
    })
}

#[test]
fn beside_keepalived_there_is_one_owner() -> Result<()> {
    both_ways_round(&Segment::new(2)?, &Settings::default(), &Lan::default())
}

#[test]
fn beside_keepalived_without_the_pseudo_header() -> Result<()> {
    let settings = Settings { plain_checksum: true, ..Settings::default() };
    // Such a keepalived checks no sum, so that ours may send either form.
    for checksum in [ChecksumPolicy::Plain, ChecksumPolicy::Either] {
        both_ways_round(&Segment::new(2)?, &settings, &Lan { checksum, ..Lan::default() })?;
    }
    // It is the other form indeed: who wants none but the usual one refuses it.
    let segment = Segment::new(2)?;
    let _keepalived = Keepalived::start_with(segment.host(2), &Settings { priority: 200, ..settings })?;
    let strict = Vrrp::start(segment.host(1), 1)?;
    let lan = Lan { checksum: ChecksumPolicy::PseudoHeader, ..Lan::default() };
    strict.elect_all(vec![config(100, &[VIP.into()])], lan)?;
    command::until("an advert to be refused", SOON, || Ok((strict.refused("checksum") > 0).then_some(())))
}

#[test]
fn beside_keepalived_over_ipv6() -> Result<()> {
    let segment = Segment::new(2)?;
    for host in segment.hosts() {
        link_local(host)?;
    }
    both_ways_round(&segment, &Settings { ipv6: true, ..Settings::default() }, &Lan::default())
}

#[test]
fn beside_keepalived_by_unicast() -> Result<()> {
    for ipv6 in [false, true] {
        let segment = Segment::new(2)?;
        let address = |number| -> Result<IpAddr> {
            let host = segment.host(number);
            Ok(if ipv6 { link_local(host)?.into() } else { host.address().into() })
        };
        let (ours, theirs) = (address(1)?, address(2)?);
        let peer = Peer { addresses: vec![theirs], ..Peer::default() };
        let lan = Lan { peers: vec![peer].into(), unicast: true, ..Lan::default() };
        let settings = Settings { ipv6, unicast: Some((theirs, ours)), ..Settings::default() };
        both_ways_round(&segment, &settings, &lan)?;
    }
    Ok(())
}

#[test]
fn by_unicast_three_elect_one() -> Result<()> {
    let segment = Segment::new(3)?;
    let peers: Vec<Peer> = segment
        .hosts()
        .iter()
        .map(|host| Peer { addresses: vec![host.address().into()], ..Peer::default() })
        .collect();
    let lan = Lan { peers: peers.into(), unicast: true, ..Lan::default() };
    let mut all = Vec::new();
    for (number, priority) in [(1, 254), (2, 224), (3, 194)] {
        let vrrp = Vrrp::start(segment.host(number), number)?;
        vrrp.elect_all(vec![config(priority, &[VIP.into()])], lan.clone())?;
        all.push(vrrp);
    }
    let owner = settled_owner_of(&all, VIP.into())?;
    let seen = segment
        .host(3)
        .exec("timeout 1 tcpdump -ni eth0 -c 3 ip proto 112 and dst 224.0.0.18 2>/dev/null")?;
    ensure!(seen.stdout.trim().is_empty(), "somebody speaks to the group: {}", seen.stdout);
    segment.isolate(all[owner].number)?;
    let number = all[owner].number;
    let rest: Vec<Vrrp<'_>> = all.into_iter().filter(|vrrp| vrrp.number != number).collect();
    settled_owner_of(&rest, VIP.into()).map(drop)
}

#[test]
fn keepalived_is_replaced_without_two_owners() -> Result<()> {
    let segment = Segment::new(2)?;
    let keepalived = Keepalived::start(segment.host(2), 100)?;
    command::until("keepalived", SOON, || Ok(has(segment.host(2), VIP.into())?.then_some(())))?;
    let alone = [Vrrp::start(segment.host(1), 1)?];
    alone[0].elect_with(200)?;
    let (none, both) = watch(&segment, VIP.into(), Duration::from_secs(2))?;
    ensure!(none + both == 0 && !alone[0].is_bound()?, "{none} times nobody, {both} times both");
    // What is left of both while one goes and the other comes: never the address on two hosts.
    let both = thread::scope(|scope| -> Result<usize> {
        let watching = scope.spawn(|| watch(&segment, VIP.into(), Duration::from_secs(3)));
        thread::sleep(Duration::from_millis(300));
        keepalived.stop()?;
        Ok(watching.join().ok().context("the watch ended badly")??.1)
    })?;
    ensure!(both == 0, "{both} times both had the address");
    one_owner_of(&alone, VIP.into()).map(drop)
}
