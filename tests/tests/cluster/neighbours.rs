//! Others on the same node: what they have is left to them, and kube-proxy flushes the IPVS table.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::{
    Lab, Node,
    command::{self, Output},
    product,
};

use super::{Exposed, SOON, check_alone, installed};

/// Makes an IPVS service, an address and an nftables table that are not ours; those of an earlier run go first.
pub(super) fn plant(node: &Node<'_>) -> Result<()> {
    uproot(node)?;
    let commands = "ip address add 10.99.0.1/32 dev lo && ipvsadm -A -t 10.99.0.1:80 -s rr && ipvsadm -a -t 10.99.0.1:80 -r 10.99.0.2:80 -m \
                    && nft add table inet foreign && nft add set inet foreign s '{ type ipv4_addr; elements = { 10.87.2.200 } }'";
    node.exec(commands).and_then(Output::ok).map(drop)
}

/// All of it, as the kernel has it.
pub(super) fn foreign(node: &Node<'_>) -> Result<String> {
    let look = "ip -oneline address show dev lo | grep -o 10.99.0.1/32; ipvsadm -Sn | grep 10.99.0; nft list table inet foreign";
    Ok(node.exec(look)?.ok()?.stdout)
}

/// Takes it away.
pub(super) fn uproot(node: &Node<'_>) -> Result<()> {
    node.exec("ip address del 10.99.0.1/32 dev lo; ipvsadm -D -t 10.99.0.1:80; nft delete table inet foreign")
        .map(drop)
}

/// What is foreign is on every node again when this ends, however it ends: it is looked at after all tests, and a kube-proxy
/// that starts flushes what is foreign as well.
pub(super) struct Replanted<'a>(pub &'a Lab);

impl Drop for Replanted<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.each_node(|node| plant(&node)) {
            eprintln!("what is foreign is not on every node again: {error:#}");
        }
    }
}

#[test]
fn kube_proxy_flushes_ipvs_and_every_entry_is_back_within_a_second() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "flush")?;
        let node = lab.node(exposed.owner.number);
        let _replanted = Replanted(lab);
        // Prints when one of our services is gone and when it is there again with its destinations. /proc/net/ip_vs would be
        // quicker to read, but leaves entries out while other namespaces have some.
        let look = format!(
            "end=$((SECONDS+40)); was=; while [ $SECONDS -lt $end ] && ! [ -e /run/lab/enough ]; do \
             now=; [ $(ipvsadm -Ln -t {}:80 2> /dev/null | grep -c Masq) = 3 ] || now=gone; \
             [ \"$now\" = \"$was\" ] || echo $EPOCHREALTIME; was=$now; sleep 0.01; done",
            exposed.vip
        );
        node.exec("rm -f /run/lab/enough")?.ok()?;
        let turns = std::thread::scope(|scope| -> Result<Vec<f64>> {
            let watcher = scope.spawn(|| node.exec(&look));
            let restarted = lab.restart_kube_proxy(exposed.owner.number);
            std::thread::sleep(Duration::from_secs(2));
            node.exec("touch /run/lab/enough")?.ok()?;
            restarted?;
            let output = watcher.join().ok().context("the watcher ended badly")??.ok()?;
            Ok(output.stdout.lines().filter_map(|line| line.replace(',', ".").parse().ok()).collect())
        })?;
        // Ours may be back before anybody looks, what is foreign is not.
        let left = node.exec("ipvsadm -Sn")?.ok()?.stdout;
        ensure!(!left.contains("10.99.0.1:80"), "kube-proxy did not flush the table: the test shows nothing");
        for turn in turns.chunks(2) {
            let [gone, back] = turn else { anyhow::bail!("the entries did not come back") };
            println!("away for {:.0} ms", (back - gone) * 1000.0);
            ensure!(back - gone < 1.0, "entries were away for {:.3} s", back - gone);
        }
        ensure!(product::destinations(&node, exposed.vip, 80)?.len() == 3, "not every destination is back");
        lab.client().get(&exposed.url())?;
        let about = format!("reason=Repaired,involvedObject.name={}", node.name());
        command::until("an Event of the repair", SOON, || {
            let events =
                lab.kubectl(["get", "events", "-A", "--field-selector", &about, "-o", "name"])?.ok()?;
            Ok((!events.text().is_empty()).then_some(()))
        })?;
        exposed.remove(lab)
    });
}
