//! Others on the same node: kube-proxy flushes the IPVS table.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use lab::product;

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
