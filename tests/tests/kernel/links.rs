//! The LAN on something else than a card: a bond, a VLAN, a bridge. What elects and binds is the product's own process.

use std::time::Duration;

use lab::command::until;
use lab::{Host, Segment};
use vip_core::api::VrrpState;

use crate::vrrp::{SOON, Vrrp};

/// Puts an interface of a kind between a host and its card, under the card's old name.
fn wrap(host: &Host, kind: &str, join: &str) {
    let six = 0x10 + u16::from(host.number());
    for line in [
        "link set eth0 down",
        "link set eth0 name port0",
        "address flush dev port0",
        kind,
        join,
        "link set port0 up",
        "link set eth0 up",
        &format!("address add {}/16 dev eth0", host.address()),
        &format!("address add fd87::{six:x}/64 dev eth0 nodad"),
    ] {
        if !line.is_empty() {
            host.netns().ip(line).unwrap();
        }
    }
}

#[test]
fn the_lan_may_be_a_bond_a_vlan_or_a_bridge() {
    for (kind, join) in [
        ("link add eth0 type bond mode active-backup miimon 50", "link set port0 master eth0"),
        ("link add link port0 name eth0 type vlan id 7", ""),
        ("link add eth0 type bridge", "link set port0 master eth0"),
    ] {
        let segment = Segment::new(2).unwrap();
        segment.hosts().iter().for_each(|host| wrap(host, kind, join));
        let both: Vec<Vrrp<'_>> =
            (1..=2).map(|number| Vrrp::start(segment.host(number), number).unwrap()).collect();
        both.iter().for_each(|vrrp| vrrp.elect().unwrap());
        let owner = until(&format!("one owner on: {kind}"), SOON, || {
            let masters: Vec<usize> =
                (0..2).filter(|index| both[*index].state() == VrrpState::Master).collect();
            let bound: Vec<usize> =
                (0..2).filter(|index| both[*index].is_bound().is_ok_and(|bound| bound)).collect();
            Ok((masters.len() == 1 && bound == masters).then(|| masters[0]))
        })
        .unwrap();
        let (host, other) = (both[owner].host, &both[1 - owner]);
        let answering = other.host.arp_owner(super::VIP, Duration::from_millis(500)).unwrap();
        assert_eq!(answering, [host.mac().unwrap()], "{kind}");
        // What is below loses its carrier, and with it what stands on it.
        segment.unplug(host.number()).unwrap();
        until(&format!("a successor on: {kind}"), SOON, || {
            Ok((other.is_bound()? && !both[owner].is_bound()?).then_some(()))
        })
        .unwrap();
    }
}
