//! ARP and neighbour discovery on a bridge, with the kernel as the neighbour: who has an address is heard, and what is
//! announced is believed.

#![allow(clippy::unwrap_used, reason = "what cannot go on has failed")]

use std::net::IpAddr;
use std::thread::sleep;
use std::time::{Duration, Instant};

use lab::{Host, Segment};
use vip_core::vrrp::Family;
use vip_node::vrrp::neighbours::{Claimed, NeighbourSocket, Prober, Received, Verdict};

const FAMILIES: [Family; 2] = [Family::V4, Family::V6];

/// A free address.
fn vip(family: Family) -> IpAddr {
    match family {
        Family::V4 => "10.87.2.50".parse().unwrap(),
        Family::V6 => "fd87::2:50".parse().unwrap(),
    }
}

/// A host's own address.
fn own(host: u8, family: Family) -> IpAddr {
    match family {
        Family::V4 => format!("10.87.0.{}", 10 + host).parse().unwrap(),
        Family::V6 => format!("fd87::{:x}", 0x10 + host).parse().unwrap(),
    }
}

fn mac(host: &Host) -> [u8; 6] {
    let bytes: Vec<u8> =
        host.mac().unwrap().split(':').map(|byte| u8::from_str_radix(byte, 16).unwrap()).collect();
    bytes.try_into().unwrap()
}

fn open(host: &Host, family: Family) -> NeighbourSocket {
    host.run(|| NeighbourSocket::open(nix::net::if_::if_nametoindex("eth0").unwrap(), family))
        .unwrap()
        .unwrap()
}

/// All claims that are queued.
fn heard(socket: &NeighbourSocket) -> Vec<Claimed> {
    let mut claims = Vec::new();
    loop {
        match socket.receive().unwrap() {
            Received::Claim(claim) => claims.push(claim),
            Received::Other => {}
            Received::Nothing => return claims,
        }
    }
}

/// Waits until an address is claimed.
fn wait_for(socket: &NeighbourSocket, address: IpAddr) -> Claimed {
    let start = Instant::now();
    loop {
        if let Some(claim) = heard(socket).into_iter().find(|claim| claim.address == address) {
            return claim;
        }
        assert!(start.elapsed() < Duration::from_secs(2), "nobody claims {address}");
        sleep(Duration::from_millis(1));
    }
}

/// Probes addresses to the end: the verdicts, in the order of the addresses, and how long it took.
fn probe(host: &Host, socket: &NeighbourSocket, addresses: &[IpAddr]) -> (Vec<Verdict>, Duration) {
    let mac = mac(host);
    let mut prober = Prober::default();
    let mut verdicts = Vec::new();
    let start = Instant::now();
    for address in addresses {
        prober.start(Duration::ZERO, "eth0", *address);
    }
    while let Some(deadline) = prober.next_deadline() {
        sleep(deadline.saturating_sub(start.elapsed()).min(Duration::from_millis(1)));
        let now = start.elapsed();
        for claim in heard(socket) {
            prober.heard(now, "eth0", claim.address, claim.mac);
        }
        for (_, address) in prober.due(now) {
            socket.probe(address, mac).unwrap();
        }
        for (_, address, verdict) in prober.verdicts(now) {
            socket.probed(address);
            verdicts.push((address, verdict));
        }
    }
    verdicts.sort_unstable_by_key(|(address, _)| *address);
    (verdicts.into_iter().map(|(_, verdict)| verdict).collect(), start.elapsed())
}

#[test]
fn a_probe_finds_who_has_an_address_and_hundreds_of_free_ones_take_no_longer() {
    let segment = Segment::new(2).unwrap();
    let (prober, owner) = (segment.host(1), segment.host(2));
    for family in FAMILIES {
        let socket = open(prober, family);
        let taken = own(2, family);
        let (verdicts, took) = probe(prober, &socket, &[taken, vip(family)]);
        assert_eq!(verdicts, [Verdict::InUse(mac(owner)), Verdict::Free], "{family:?}");
        assert!(took < Duration::from_millis(700), "{family:?}: {took:?}");

        let many: Vec<IpAddr> = (1..=250_u8)
            .map(|n| match vip(family) {
                IpAddr::V4(_) => IpAddr::from([10, 87, 3, n]),
                IpAddr::V6(_) => IpAddr::from([0xfd87, 0, 0, 0, 0, 0, 3, n.into()]),
            })
            .chain([taken])
            .collect();
        let (verdicts, took) = probe(prober, &socket, &many);
        let in_use: Vec<_> = verdicts.iter().filter(|verdict| **verdict != Verdict::Free).collect();
        assert_eq!((verdicts.len(), in_use), (251, vec![&Verdict::InUse(mac(owner))]), "{family:?}");
        assert!(took < Duration::from_millis(700), "{family:?}: {took:?}");
    }
}

#[test]
fn who_probes_the_same_address_at_the_same_time_is_heard_and_oneself_is_not() {
    let segment = Segment::new(2).unwrap();
    let (one, two) = (segment.host(1), segment.host(2));
    for family in FAMILIES {
        let (first, second) = (open(one, family), open(two, family));
        first.probe(vip(family), mac(one)).unwrap();
        second.probe(vip(family), mac(two)).unwrap();
        let expected = Claimed { address: vip(family), mac: mac(two), tentative: true };
        assert_eq!(wait_for(&first, vip(family)), expected);
        sleep(Duration::from_millis(50));
        assert_eq!(heard(&first).iter().find(|claim| claim.mac == mac(one)), None, "{family:?}: itself");
        // What is of the other family is refused.
        let other = if family == Family::V4 { Family::V6 } else { Family::V4 };
        assert!(first.probe(vip(other), mac(one)).is_err());
        assert!(first.announce(vip(other), mac(one), false, None).is_err());
    }
}

#[test]
fn what_is_announced_is_believed_by_who_knew_better_and_heard_by_the_former_owner() {
    let segment = Segment::new(3).unwrap();
    let (new, old, client) = (segment.host(1), segment.host(2), segment.host(3));
    for family in FAMILIES {
        let (address, prefix) = (vip(family), if family == Family::V4 { "32" } else { "128 nodad" });
        old.netns().ip(&format!("address add {address}/{prefix} dev eth0")).unwrap().ok().unwrap();
        client.exec(&format!("ping -c 1 -W 2 {address}")).unwrap().ok().unwrap();
        let known = || client.exec(&format!("ip neighbour show {address} dev eth0")).unwrap().stdout;
        assert!(known().contains(&old.mac().unwrap()), "{}", known());

        let (socket, former) = (open(new, family), open(old, family));
        let link_local = (family == Family::V6).then(|| "fe80::1".parse().unwrap());
        socket.announce(address, mac(new), true, link_local).unwrap();
        let start = Instant::now();
        while !known().contains(&new.mac().unwrap()) {
            assert!(start.elapsed() < Duration::from_secs(2), "still {}", known());
        }
        assert!(family == Family::V4 || known().contains("router"), "{}", known());
        let expected = Claimed { address, mac: mac(new), tentative: false };
        assert_eq!(wait_for(&former, address), expected);
    }
}
