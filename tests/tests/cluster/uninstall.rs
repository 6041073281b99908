//! `uninstall`: nothing of ours is left, and what is not ours was never touched.

use std::{net::Ipv6Addr, time::Duration};

use anyhow::ensure;
use lab::product;

use super::{Exposed, NAMESPACE, SOON, check_alone, installed, neighbours, planted, undisturbed, web};

#[test]
fn a_whole_life_leaves_what_is_foreign_alone_and_nothing_of_ours_behind() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "life")?;
        undisturbed(lab, exposed.vip, || lab.client().get(&exposed.url()))?;
        web(lab)?.add_service_of("life6", 80, "IPv6")?;
        lab.kubectl(["vip", "expose", "svc/life6", "-n", NAMESPACE])?.ok()?;
        let vip6: Ipv6Addr = product::address_of(lab, NAMESPACE, "life6")?;
        product::wait_one_owner(lab, vip6, SOON)?;
        product::wait_destinations(lab, vip6, 80, 3, SOON)?;
        ensure!(
            product::leftovers(&lab.node(1))?.iter().any(|line| line.contains("fd87::2:")),
            "IPv6 is overlooked"
        );
        lab.kubectl_for(Duration::from_secs(180), ["vip", "uninstall", "--yes"])?.ok()?;
        let after = lab.each_node(|node| neighbours::foreign(&node))?;
        let before = planted();
        ensure!(before == after, "foreign things changed: {before:?} -> {after:?}");
        lab.each_node(|node| {
            neighbours::uproot(&node)?;
            let left = product::leftovers(&node)?;
            ensure!(left.is_empty(), "left on {}: {left:?}", node.name());
            Ok(())
        })?;
        let left = product::cluster_leftovers(lab)?;
        ensure!(left.is_empty(), "left in the cluster: {left:?}");
        Ok(())
    });
}
