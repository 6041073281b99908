//! What others send: foreign routers, routed and spoofed packets, strict checksums, firewalls, and machines that have or
//! claim an address of ours.

use std::{
    net::{IpAddr, Ipv4Addr},
    sync::atomic::{AtomicBool, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Host, Segment, command};
use nix::net::if_::if_nametoindex;
use vip_core::{
    api::VrrpState,
    vrrp::{
        ChecksumPolicy, Family, Lan, Peer, RouterConfig,
        packet::{Advert, Checksum, group, ones_complement},
    },
};
use vip_node::vrrp::neighbours::NeighbourSocket;

use crate::vrrp::{SOON, VIP, VIP6, VRID, Vrrp, config, has};
use crate::{one_owner, one_owner_of, settled_owner_of, still};

fn advert(host: &Host, priority: u8, address: Ipv4Addr) -> Vec<u8> {
    advert_in(host, VRID, priority, address, Checksum::PseudoHeader)
}

fn advert_in(host: &Host, vrid: u8, priority: u8, address: Ipv4Addr, form: Checksum) -> Vec<u8> {
    let advert = Advert { vrid, priority, interval: 10, addresses: vec![address.into()] };
    advert.encode(host.address().into(), group(Family::V4), form)
}

#[test]
fn an_owner_that_was_paused_among_many_routers_hears_who_took_over_before_it_speaks() -> Result<()> {
    let segment = Segment::new(3)?;
    let mut all = Vec::new();
    for (number, priority) in [(1, 254), (2, 224)] {
        let vrrp = Vrrp::start(segment.host(number), number)?;
        vrrp.elect_with(priority)?;
        all.push(vrrp);
        command::until("the owner", SOON, || Ok(all[0].is_bound()?.then_some(())))?;
    }
    // In the time that it takes to be replaced, more than fits a socket by default.
    let (stranger, done) = (segment.host(3), AtomicBool::new(false));
    let theirs = Ipv4Addr::new(10, 87, 9, 9);
    let foreign = (1..=250).filter(|vrid| *vrid != VRID);
    let adverts = foreign.map(|vrid| advert_in(stranger, vrid, 200, theirs, Checksum::PseudoHeader));
    let (adverts, injector): (Vec<_>, _) = (adverts.collect(), stranger.injector(255)?);
    thread::scope(|scope| -> Result<()> {
        let stream = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                adverts.iter().try_for_each(|advert| injector.send(advert))?;
                thread::sleep(Duration::from_millis(100));
            }
            Ok(())
        });
        let paused = || -> Result<()> {
            all[0].signal("STOP")?;
            thread::sleep(Duration::from_secs(1));
            ensure!(all[1].state() == VrrpState::Master, "nobody took over");
            all[0].signal("CONT")?;
            let end = Instant::now() + Duration::from_secs(2);
            while Instant::now() < end {
                ensure!(all[1].state() == VrrpState::Master, "the address moved a second time");
                thread::sleep(Duration::from_millis(5));
            }
            ensure!(one_owner(&all)? == 1, "the old owner has the address");
            Ok(())
        };
        let outcome = paused();
        done.store(true, Ordering::Relaxed);
        stream.join().ok().context("the stream ended badly")??;
        outcome
    })
}

/// Makes its sum right again.
fn sum(mut advert: Vec<u8>) -> Vec<u8> {
    advert[6..8].fill(0);
    let sum = !ones_complement(0, &advert);
    advert[6..8].copy_from_slice(&sum.to_be_bytes());
    advert
}

/// A peer of our own by its address.
fn peer(host: &Host) -> Peer {
    Peer { addresses: vec![host.address().into()], ..Peer::default() }
}

#[test]
fn what_is_foreign_or_was_routed_changes_nothing_and_is_counted() -> Result<()> {
    let segment = Segment::new(3)?;
    let (stranger, known) = (segment.host(2), segment.host(3));
    let all = [Vrrp::start(segment.host(1), 1)?];
    let lan = Lan { peers: [peer(known)].into_iter().collect(), ..Lan::default() };
    all[0].elect_all(vec![config(100, &[VIP.into()])], lan)?;
    one_owner(&all)?;
    // A router sends it on, whoever has sent it.
    known.inject(254, &advert(known, 255, VIP))?;
    stranger.inject(255, &advert(stranger, 255, Ipv4Addr::new(10, 87, 9, 9)))?;
    let mut damaged = advert(stranger, 255, VIP);
    damaged[8] ^= 1;
    stranger.inject(255, &damaged)?;
    command::until("the counters", SOON, || {
        let counts = ["ttl", "foreign", "checksum"].map(|kind| all[0].refused(kind));
        ensure!(counts == [1, 1, 1], "{counts:?}");
        Ok(Some(()))
    })?;
    ensure!(all[0].state() == VrrpState::Master, "it gave way");
    // The same from a sender that claims our address is obeyed: keepalived on its way out, say. Its interval is learned,
    // so that there is time to see it.
    let mut claim = advert(stranger, 255, VIP);
    claim[4..6].copy_from_slice(&[0x03, 0xe8]);
    stranger.inject(255, &sum(claim))?;
    command::until("it to give way", SOON, || Ok((!all[0].is_bound()?).then_some(())))
}

#[test]
fn a_stream_of_refused_packets_makes_a_backup_neither_late_nor_early() -> Result<()> {
    let segment = Segment::new(4)?;
    let (stranger, known) = (segment.host(3), segment.host(4));
    let lan = Lan { peers: [peer(segment.host(1)), peer(known)].into_iter().collect(), ..Lan::default() };
    let mut all = Vec::new();
    for (number, priority) in [(1, 254), (2, 224)] {
        let vrrp = Vrrp::start(segment.host(number), number)?;
        vrrp.elect_all(vec![config(priority, &[VIP.into()])], lan.clone())?;
        all.push(vrrp);
        command::until("the owner", SOON, || Ok(all[0].is_bound()?.then_some(())))?;
    }
    // Each of them would begin the wait anew, or end it, were it obeyed.
    let mut now = advert(known, 255, VIP);
    now[4..6].fill(0);
    let refused = [
        ("ttl", known.injector(254)?, advert(known, 255, VIP)),
        ("ttl", known.injector(254)?, advert(known, 0, VIP)),
        ("interval", known.injector(255)?, sum(now)),
        ("foreign", stranger.injector(255)?, advert(stranger, 255, Ipv4Addr::new(10, 87, 9, 9))),
    ];
    let done = AtomicBool::new(false);
    let took = thread::scope(|scope| -> Result<Duration> {
        let stream = scope.spawn(|| -> Result<()> {
            while !done.load(Ordering::Relaxed) {
                refused.iter().try_for_each(|(_, from, packet)| from.send(packet))?;
                thread::sleep(Duration::from_millis(10));
            }
            Ok(())
        });
        let takeover = || -> Result<Duration> {
            let end = Instant::now() + Duration::from_secs(1);
            while Instant::now() < end {
                ensure!(all[1].state() == VrrpState::Backup, "it took over while the owner lives");
                thread::sleep(Duration::from_millis(5));
            }
            all[0].signal("KILL")?;
            let killed = Instant::now();
            while all[1].state() != VrrpState::Master {
                ensure!(killed.elapsed() < SOON, "it never took over");
                thread::sleep(Duration::from_millis(5));
            }
            Ok(killed.elapsed())
        };
        let took = takeover();
        done.store(true, Ordering::Relaxed);
        stream.join().ok().context("the stream ended badly")??;
        took
    })?;
    println!("taken over after {} ms", took.as_millis());
    ensure!((150..1000).contains(&took.as_millis()), "taken over after {took:?}");
    for (kind, ..) in &refused {
        ensure!(all[1].refused(kind) > 50, "{kind}: {} were refused", all[1].refused(kind));
    }
    Ok(())
}

#[test]
fn routers_of_others_are_heard_before_the_first_election() -> Result<()> {
    let segment = Segment::new(2)?;
    let all = [Vrrp::start(segment.host(1), 1)?];
    let stranger = segment.host(2);
    let theirs = Ipv4Addr::new(10, 87, 9, 9);
    stranger.inject(255, &advert_in(stranger, 33, 120, theirs, Checksum::Plain))?;
    let foreign =
        command::until("the foreign router", SOON, || Ok(all[0].report().foreign.first().cloned()))?;
    ensure!(
        foreign.id.vrid == 33 && foreign.id.interface == "eth0" && foreign.priority == 120,
        "{foreign:?}"
    );
    ensure!(foreign.address == IpAddr::V4(stranger.address()), "{foreign:?}");
    // With our identifier and none of our addresses: reported and never obeyed.
    all[0].elect_with(100)?;
    one_owner(&all)?;
    stranger.inject(255, &advert(stranger, 255, theirs))?;
    let found = command::until("the foreign router", SOON, || {
        Ok(all[0].report().foreign.iter().find(|heard| heard.id.vrid == VRID).cloned())
    })?;
    ensure!(found.priority == 255, "{found:?}");
    ensure!(all[0].state() == VrrpState::Master, "it gave way");
    still(&all, 0)
}

#[test]
fn a_strict_checksum_refuses_the_other_form() -> Result<()> {
    let segment = Segment::new(2)?;
    let stranger = segment.host(2);
    for (policy, refused, obeyed) in [
        (ChecksumPolicy::Plain, Checksum::PseudoHeader, Checksum::Plain),
        (ChecksumPolicy::PseudoHeader, Checksum::Plain, Checksum::PseudoHeader),
    ] {
        let all = [Vrrp::start(segment.host(1), 1)?];
        let lan = Lan { checksum: policy, ..Lan::default() };
        all[0].elect_all(vec![config(100, &[VIP.into()])], lan)?;
        one_owner(&all)?;
        stranger.inject(255, &advert_in(stranger, VRID, 255, VIP, refused))?;
        command::until("the counter", SOON, || Ok((all[0].refused("checksum") == 1).then_some(())))?;
        ensure!(all[0].state() == VrrpState::Master, "{policy:?}: it gave way");
        stranger.inject(255, &advert_in(stranger, VRID, 255, VIP, obeyed))?;
        command::until("the master", SOON, || {
            let report = all[0].report();
            Ok(report.peers.iter().any(|peer| peer.priority == 255).then_some(()))
        })?;
    }
    Ok(())
}

#[test]
fn a_firewall_that_drops_vrrp_does_not_split_them() -> Result<()> {
    let segment = Segment::new(2)?;
    for host in segment.hosts() {
        let drop_all = "nft add table inet fw; nft add chain inet fw in '{ type filter hook input priority 0; policy drop; }'; \
                        nft add rule inet fw in meta l4proto 112 drop; nft add chain inet fw out '{ type filter hook output priority 0; }'; \
                        nft add rule inet fw out meta l4proto 112 drop";
        host.exec(drop_all)?.ok()?;
    }
    let vips: [IpAddr; 2] = [VIP.into(), VIP6.into()];
    let mut all = Vec::new();
    for (number, priority) in [(1, 254), (2, 224)] {
        let vrrp = Vrrp::start(segment.host(number), number)?;
        vrrp.elect_all(vips.map(|vip| config(priority, &[vip])).into(), Lan::default())?;
        all.push(vrrp);
    }
    for vip in vips {
        let owner = settled_owner_of(&all, vip)?;
        for _ in 0..5 {
            thread::sleep(Duration::from_millis(200));
            ensure!(one_owner_of(&all, vip)? == owner, "the owner of {vip} changed");
        }
    }
    Ok(())
}

#[test]
fn a_fresh_address_that_is_in_use_is_left_alone_and_others_are_bound() -> Result<()> {
    let segment = Segment::new(2)?;
    let stranger = segment.host(2);
    let free: [IpAddr; 2] = [Ipv4Addr::new(10, 87, 2, 51).into(), "fd87::2:51".parse()?];
    let used: [IpAddr; 2] = [VIP.into(), VIP6.into()];
    stranger
        .exec(&format!("ip address add {VIP}/16 dev eth0; ip address add {VIP6}/64 dev eth0 nodad"))?
        .ok()?;
    let all = [Vrrp::start(segment.host(1), 1)?];
    let routers = [0, 1].map(|family| {
        let addresses = [used[family], free[family]];
        let fresh = addresses.into_iter().collect();
        RouterConfig { fresh, ..config(200, &addresses) }
    });
    all[0].elect_all(routers.into(), Lan::default())?;
    for family in [0, 1] {
        command::until("the free address", SOON, || Ok(all[0].has(free[family])?.then_some(())))?;
        let claim = command::until("the claim", SOON, || {
            Ok(all[0].report().claims.into_iter().find(|claim| claim.address == used[family]))
        })?;
        ensure!(claim.yielded && claim.interface == "eth0", "{claim:?}");
        let mac = claim.mac.map(|byte| format!("{byte:02x}")).join(":");
        ensure!(mac == stranger.mac()?, "{claim:?}");
        ensure!(!all[0].has(used[family])?, "an address in use was bound");
    }
    Ok(())
}

#[test]
fn a_successor_binds_what_its_predecessor_had_and_probes_what_that_did_not_have() -> Result<()> {
    let segment = Segment::new(3)?;
    let used: [IpAddr; 2] = [51, 52].map(|n| Ipv4Addr::new(10, 87, 2, n).into());
    let claim = used.map(|address| format!("ip address add {address}/32 dev eth0")).join("; ");
    segment.host(3).exec(&claim)?.ok()?;
    let all = [Vrrp::start(segment.host(1), 1)?, Vrrp::start(segment.host(2), 2)?];
    let order = |node: usize, addresses: &[IpAddr], contested: &[IpAddr]| {
        let fresh = addresses.iter().copied().collect();
        let contested = contested.iter().copied().collect();
        let router = RouterConfig { fresh, contested, ..config(200, addresses) };
        all[node].elect_all(vec![router], Lan::default())
    };
    // The owner has one address and leaves the other to the stranger.
    let both = [VIP.into(), used[0]];
    order(0, &both, &[])?;
    command::until("the owner", SOON, || Ok(all[0].is_bound()?.then_some(())))?;
    command::until("the claim", SOON, || Ok(all[0].report().claims.first().map(drop)))?;
    order(1, &both, &[used[0]])?;
    thread::sleep(Duration::from_millis(500));
    all[0].elect_all(Vec::new(), Lan::default())?;
    command::until("the successor", SOON, || Ok(all[1].is_bound()?.then_some(())))?;
    // One that is new to it after that is probed too.
    order(1, &[VIP.into(), used[0], used[1]], &[used[0]])?;
    let claims = command::until("both claims", SOON, || {
        let claims = all[1].report().claims;
        Ok((claims.len() == 2).then_some(claims))
    })?;
    ensure!(claims.iter().all(|claim| claim.yielded), "{claims:?}");
    for address in used {
        ensure!(!all[1].has(address)?, "{address}, which is in use, was bound");
    }
    Ok(())
}

#[test]
fn a_foreign_claim_is_counted_and_answered() -> Result<()> {
    claimed(VIP.into(), |stranger| stranger.exec(&format!("arping -U -c1 -w1 -I eth0 {VIP}"))?.ok().map(drop))
}

#[test]
fn a_foreign_claim_of_an_ipv6_address_is_counted_and_answered() -> Result<()> {
    claimed(VIP6.into(), |stranger| {
        let mac = bytes(&stranger.mac()?)?;
        let announce = || -> Result<()> {
            let socket = NeighbourSocket::open(if_nametoindex("eth0")?, Family::V6)?;
            Ok(socket.announce(VIP6.into(), mac, false, None)?)
        };
        stranger.run(announce)?
    })
}

/// A hardware address as it is on the wire.
fn bytes(mac: &str) -> Result<[u8; 6]> {
    let bytes = mac.split(':').map(|byte| u8::from_str_radix(byte, 16)).collect::<Result<Vec<u8>, _>>()?;
    bytes.try_into().ok().context("not six bytes")
}

fn claimed(vip: IpAddr, claim: impl Fn(&Host) -> Result<()>) -> Result<()> {
    let segment = Segment::new(3)?;
    let all = [Vrrp::start(segment.host(1), 1)?];
    all[0].elect_all(vec![config(200, &[vip])], Lan::default())?;
    one_owner_of(&all, vip)?;
    let (stranger, client) = (segment.host(2), segment.host(3));
    let length = if vip.is_ipv4() { "32" } else { "128 nodad" };
    client.exec(&format!("ping -c1 -W1 {vip}"))?.ok()?;
    stranger.exec(&format!("ip address add {vip}/{length} dev eth0"))?.ok()?;
    // It is not defended against for more than a second, so the client knows the owner again after that.
    for _ in 0..3 {
        claim(stranger)?;
        thread::sleep(Duration::from_millis(600));
    }
    let claim = command::until("the claim", SOON, || Ok(all[0].report().claims.first().cloned()))?;
    ensure!(!claim.yielded && claim.address == vip, "{claim:?}");
    ensure!(claim.mac == bytes(&stranger.mac()?)?, "{claim:?}");
    command::until("the count", SOON, || {
        let claims = all[0].report().claims;
        Ok(claims.first().is_some_and(|claim| claim.count > 1).then_some(()))
    })?;
    let owner = segment.host(1).mac()?;
    let known = client.exec(&format!("ip neighbour show {vip}"))?.stdout;
    ensure!(known.contains(&owner), "the client believes the other one: {known}");
    ensure!(has(segment.host(1), vip)?, "the owner gave way");
    Ok(())
}
