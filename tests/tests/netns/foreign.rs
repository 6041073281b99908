//! What others send: foreign routers, routed and spoofed packets, strict checksums, firewalls, and machines that have or
//! claim an address of ours.

use std::{
    net::{IpAddr, Ipv4Addr},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use lab::{Host, Segment, command};
use vip_core::{
    api::VrrpState,
    vrrp::{
        ChecksumPolicy, Family, Lan, RouterConfig,
        packet::{Advert, Checksum, group},
    },
};

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
fn what_is_foreign_or_was_routed_changes_nothing_and_is_counted() -> Result<()> {
    let segment = Segment::new(2)?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    vrrp.elect_with(100)?;
    let all = [vrrp];
    one_owner(&all)?;
    let stranger = segment.host(2);
    stranger.inject(254, &advert(stranger, 255, VIP))?;
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
    claim[4..8].copy_from_slice(&[0x03, 0xe8, 0, 0]);
    let sum = !vip_core::vrrp::packet::ones_complement(0, &claim);
    claim[6..8].copy_from_slice(&sum.to_be_bytes());
    stranger.inject(255, &claim)?;
    command::until("it to give way", SOON, || Ok((!all[0].is_bound()?).then_some(())))
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
    let segment = Segment::new(3)?;
    let all = [Vrrp::start(segment.host(1), 1)?];
    all[0].elect()?;
    one_owner(&all)?;
    let (stranger, client) = (segment.host(2), segment.host(3));
    stranger.exec(&format!("ip address add {VIP}/32 dev eth0"))?.ok()?;
    client.exec(&format!("ping -c1 -W1 {VIP}"))?;
    // It is not defended against for more than a second, so the client knows the owner again after that.
    for _ in 0..3 {
        stranger.exec(&format!("arping -U -c1 -w1 -I eth0 {VIP}"))?.ok()?;
        thread::sleep(Duration::from_millis(600));
    }
    let claim = command::until("the claim", SOON, || Ok(all[0].report().claims.first().cloned()))?;
    ensure!(!claim.yielded && claim.address == IpAddr::V4(VIP), "{claim:?}");
    ensure!(claim.mac.map(|byte| format!("{byte:02x}")).join(":") == stranger.mac()?, "{claim:?}");
    command::until("the count", SOON, || {
        let claims = all[0].report().claims;
        Ok(claims.first().is_some_and(|claim| claim.count > 1).then_some(()))
    })?;
    let owner = segment.host(1).mac()?;
    let known = client.exec(&format!("ip neighbour show {VIP}"))?.stdout;
    ensure!(known.contains(&owner), "the client believes the other one: {known}");
    ensure!(has(segment.host(1), VIP.into())?, "the owner gave way");
    Ok(())
}
