//! The LAN of a lab: a network namespace with a bridge and a tap for each network card of the machine, joined to this
//! machine's own network by a veth pair, so that `kubectl` works from any shell.

use std::{
    collections::HashSet,
    fs::File,
    net::{Ipv4Addr, Ipv6Addr},
};

use anyhow::{Context, Result};

use crate::{
    command::{ip, words},
    guest::{NODES, address, address6, pod_networks},
    netns::Netns,
    paths,
};

/// The bridge.
pub(crate) const BRIDGE: &str = "br0";
/// The address of the lab's side on the LAN: the API server and the client.
pub(crate) const GATEWAY: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 1);
/// The same over IPv6.
pub(crate) const GATEWAY6: Ipv6Addr = Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 0, 1);
/// The address of the machine itself, where it takes commands.
pub(crate) const MACHINE: Ipv4Addr = Ipv4Addr::new(10, 87, 0, 2);

/// The namespace of the lab of that name.
pub(crate) fn namespace(lab: &str) -> Netns {
    Netns::named(format!("vip-{lab}"))
}

/// Makes the LAN; gives the address at which this machine reaches it.
pub(crate) fn create(lab: &str) -> Result<Ipv4Addr> {
    let netns = Netns::create(format!("vip-{lab}"))?;
    netns.ip(&format!("link add {BRIDGE} type bridge"))?;
    netns.ip(&format!("address add {GATEWAY}/16 dev {BRIDGE}"))?;
    netns.ip(&format!("address add {GATEWAY6}/64 dev {BRIDGE} nodad"))?;
    netns.ip(&format!("link set {BRIDGE} up"))?;
    for card in 0..=NODES.len() {
        netns.ip(&format!("tuntap add tap{card} mode tap"))?;
        netns.ip(&format!("link set tap{card} master {BRIDGE} up"))?;
    }
    // As a router of that LAN would have them: the way to the pods.
    for node in NODES {
        let (pods, pods6) = pod_networks(node);
        netns.ip(&format!("route add {pods} via {}", address(node)))?;
        netns.ip(&format!("-6 route add {pods6} via {}", address6(node)))?;
    }
    join(lab, &netns)
}

/// The pair to this machine's own namespace, with a link-local network that is free.
fn join(lab: &str, netns: &Netns) -> Result<Ipv4Addr> {
    let lock = File::create("/run/kubectl-vip-lab.lock").context("can't write to /run")?;
    lock.lock()?;
    let taken = words(&["ip", "-4", "-oneline", "address", "show"])?.ok()?.stdout;
    let taken: HashSet<&str> = taken.split([' ', '/']).filter(|word| word.starts_with("169.254.")).collect();
    let seed = paths::fingerprint(lab.as_bytes());
    let ours = |attempt: u64| {
        // The first and the last of the 256 networks are reserved.
        let slot = seed.wrapping_add(attempt) % (254 * 64);
        let third = u8::try_from(1 + slot / 64).unwrap_or(1);
        let fourth = u8::try_from(slot % 64 * 4).unwrap_or(0);
        (Ipv4Addr::new(169, 254, third, fourth + 1), Ipv4Addr::new(169, 254, third, fourth + 2))
    };
    let mut pairs = (0..1000).map(ours);
    let free = pairs.find(|(host, lab)| {
        !taken.contains(host.to_string().as_str()) && !taken.contains(lab.to_string().as_str())
    });
    let (host, inside) = free.context("no free link-local network for the lab")?;
    ip(&format!("link add vip-{lab} type veth peer name host netns {}", netns.name()))?;
    ip(&format!("address add {host}/30 dev vip-{lab}"))?;
    ip(&format!("link set vip-{lab} up"))?;
    netns.ip(&format!("address add {inside}/30 dev host"))?;
    netns.ip("link set host up")?;
    Ok(inside)
}
