//! `uninstall`: nothing of ours is left, and what is not ours was never touched.

use std::{net::Ipv6Addr, time::Duration};

use anyhow::{Result, ensure};
use lab::{Lab, Node, command, product};

use super::{Exposed, NAMESPACE, SOON, check, installed, web};

/// Makes an IPVS service, an address and an nftables table that are not ours.
fn plant(node: &Node<'_>) -> Result<()> {
    let commands = "ip address add 10.99.0.1/32 dev lo && ipvsadm -A -t 10.99.0.1:80 -s rr && ipvsadm -a -t 10.99.0.1:80 -r 10.99.0.2:80 -m \
                    && nft add table inet foreign && nft add set inet foreign s '{ type ipv4_addr; elements = { 10.87.2.200 } }'";
    node.exec(commands).and_then(command::Output::ok).map(drop)
}

fn foreign(node: &Node<'_>) -> Result<String> {
    let look = "ip -oneline address show dev lo | grep -o 10.99.0.1/32; ipvsadm -Sn | grep 10.99.0; nft list table inet foreign";
    Ok(node.exec(look)?.ok()?.stdout)
}

fn uproot(node: &Node<'_>) -> Result<()> {
    node.exec("ip address del 10.99.0.1/32 dev lo; ipvsadm -D -t 10.99.0.1:80; nft delete table inet foreign")
        .map(drop)
}

fn uninstall(lab: &Lab) -> Result<()> {
    lab.kubectl_for(Duration::from_secs(180), ["vip", "uninstall", "--yes"])?.ok().map(drop)
}

#[test]
fn a_whole_life_leaves_what_is_foreign_alone_and_nothing_of_ours_behind() {
    check(|| {
        let lab = lab::cluster()?;
        uninstall(lab)?;
        for node in lab.nodes() {
            plant(&node)?;
        }
        let before: Vec<String> = lab.nodes().map(|node| foreign(&node)).collect::<Result<_>>()?;
        let exposed = Exposed::new(installed()?, "life")?;
        lab.client().get(&exposed.url())?;
        web(lab)?.add_service_of("life6", 80, "IPv6")?;
        lab.kubectl(["vip", "expose", "svc/life6", "-n", NAMESPACE])?.ok()?;
        let vip6: Ipv6Addr = product::address_of(lab, NAMESPACE, "life6")?;
        product::wait_one_neighbour(lab, vip6, SOON)?;
        product::wait_destinations(lab, vip6, 80, 3, SOON)?;
        ensure!(
            product::leftovers(&lab.node(1))?.iter().any(|line| line.contains("fd87::2:")),
            "IPv6 is overlooked"
        );
        uninstall(lab)?;
        let after: Vec<String> = lab.nodes().map(|node| foreign(&node)).collect::<Result<_>>()?;
        ensure!(before == after, "foreign things changed: {before:?} -> {after:?}");
        for node in lab.nodes() {
            uproot(&node)?;
            let left = product::leftovers(&node)?;
            ensure!(left.is_empty(), "left on {}: {left:?}", node.name());
        }
        let left = product::cluster_leftovers(lab)?;
        ensure!(left.is_empty(), "left in the cluster: {left:?}");
        Ok(())
    });
}
