//! Others on the same node: kube-proxy flushes, and what is not ours stays as it is.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, command, product};

use super::{Exposed, check, installed};

#[test]
fn kube_proxy_flushes_ipvs_and_every_entry_is_back_within_a_second() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "flush")?;
        let node = lab.node(exposed.owner.number);
        let hex: String = exposed.vip.octets().iter().map(|byte| format!("{byte:02X}")).collect();
        // Reads the kernel's table without starting a process, some hundred times a second, and prints the times at
        // which our services were not all there.
        let look = format!(
            "end=$((SECONDS+40)); while [ $SECONDS -lt $end ] && ! [ -e /run/lab/enough ]; do n=0; \
             while read -r line; do case $line in *{hex}:*) n=$((n+1));; esac; done < /proc/net/ip_vs; \
             [ $n -lt 2 ] && echo $EPOCHREALTIME; done; true"
        );
        node.exec("rm -f /run/lab/enough")?.ok()?;
        let missing = std::thread::scope(|scope| -> Result<Vec<f64>> {
            let watcher = scope.spawn(|| node.exec(&look));
            let restarted = lab.restart_kube_proxy(exposed.owner.number);
            std::thread::sleep(Duration::from_secs(2));
            node.exec("touch /run/lab/enough")?.ok()?;
            restarted?;
            let output = watcher.join().ok().context("the watcher ended badly")??.ok()?;
            Ok(output.stdout.lines().filter_map(|line| line.replace(',', ".").parse().ok()).collect())
        })?;
        let (Some(first), Some(last)) = (missing.first(), missing.last()) else {
            anyhow::bail!("kube-proxy did not flush the table: the test shows nothing");
        };
        println!("away for {:.0} ms", (last - first) * 1000.0);
        ensure!(last - first < 1.0, "entries were away for {:.3} s", last - first);
        ensure!(product::destinations(&node, exposed.vip, 80)?.len() == 3, "not every destination is back");
        lab.client().get(&exposed.url())?;
        exposed.remove(lab)
    });
}

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
        for node in lab.nodes() {
            plant(&node)?;
        }
        let before: Vec<String> = lab.nodes().map(|node| foreign(&node)).collect::<Result<_>>()?;
        let exposed = Exposed::new(installed()?, "life")?;
        exposed.web.scale(1)?;
        product::wait_backends(lab, exposed.vip, 1, Duration::from_secs(20))?;
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
        exposed.web.remove()
    });
}
