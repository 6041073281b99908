//! What the agent does when vrrp ends or hangs while it is master: its advertisements stop, so others take the addresses
//! over, and this node's kernel must not answer beside them.

use std::io;
use std::net::IpAddr;

use nix::net::if_::if_nametoindex;
use tracing::{info, warn};
use vip_core::api::VrrpState;
use vip_core::vrrp::{Family, packet};

use crate::link::{Elect, Report, RouterReport};
use crate::vrrp::address::Addresses;
use crate::vrrp::wire::Wire;

/// Gives away what vrrp held when it was heard last: the others learn it by an advertisement of priority 0 (RFC 9568
/// section 6.4.3), the kernel forgets the addresses. A vrrp that was only paused reads what happened before it says anything.
pub fn release(last: &Report, order: &Elect) {
    let held = last.routers.iter().filter(|r| r.state == VrrpState::Master && !r.bound.is_empty());
    let mut bound = Vec::new();
    for router in held {
        let interface = router.id.interface.as_str();
        let Ok(index) = if_nametoindex(interface) else { continue };
        if let Err(error) = say_goodbye(router, index, order) {
            warn!(vrid = router.id.vrid, interface, %error, "the others could not be told, they will find out by time-out");
        }
        bound.extend(router.bound.iter().map(|address| (index, *address)));
    }
    if bound.is_empty() {
        return;
    }
    match Addresses::open().and_then(|mut addresses| addresses.release(&bound)) {
        Ok(results) => {
            info!(count = bound.len(), "released the addresses of vrrp");
            for ((_, address), result) in bound.iter().zip(results) {
                if let Err(error) = result {
                    warn!(%address, %error, "could not be released, its lifetime will end");
                }
            }
        }
        Err(error) => warn!(%error, "the addresses of vrrp cannot be released, their lifetime will end"),
    }
}

fn say_goodbye(router: &RouterReport, index: u32, order: &Elect) -> io::Result<()> {
    let config = order.routers.iter().find(|config| config.id == router.id);
    let (Some(config), Some(source)) = (config, router.source) else { return Ok(()) };
    let mut wire = Wire::open(index, router.id.family)?;
    let advert = config.advert(0, source);
    let form = order.lan.checksum.sent();
    if !order.lan.unicast {
        return wire.advertise(source, &advert.encode(source, packet::group(router.id.family), form));
    }
    let peers = order.lan.peers.iter().flat_map(|peer| &peer.addresses);
    // One peer that cannot be reached keeps nothing from the others.
    let mut sent = Ok(());
    for peer in peers.filter(|peer| is_reachable(**peer, router.id.family)) {
        let bytes = advert.encode(source, *peer, form);
        sent = sent.and(wire.advertise_to(&router.id.interface, source, *peer, &bytes));
    }
    sent
}

/// Whether advertisements of a family can go to an address: over IPv6 only to link-local ones.
fn is_reachable(peer: IpAddr, family: Family) -> bool {
    match peer {
        IpAddr::V4(_) => family == Family::V4,
        IpAddr::V6(peer) => family == Family::V6 && peer.is_unicast_link_local(),
    }
}
