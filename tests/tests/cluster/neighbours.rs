//! Others on the same node: kube-proxy flushes the IPVS table.

use std::{net::Ipv4Addr, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{command, product};

use super::{NAMESPACE, check, installed, web};

/// How many addresses the Service has, each with two IPVS services of three destinations.
const ADDRESSES: u8 = 100;
/// How often kube-proxy is started again.
const ROUNDS: usize = 10;
/// Generous: an emulated machine beside other work.
const LIMIT: Duration = Duration::from_secs(1);

/// The addresses, all of one virtual router: what counts here is the size of the table.
fn addresses() -> impl Iterator<Item = Ipv4Addr> {
    (0..ADDRESSES).map(|n| Ipv4Addr::new(10, 87, 2, 100 + n))
}

/// Looks at the kernel's table without starting a process, and prints a line for each time that entries of ours were
/// missing: for how many milliseconds.
const WATCHER: &str = r#"
import os, time
gone, end = None, time.monotonic() + 300
while not os.path.exists("/run/lab/enough") and time.monotonic() < end:
    count = open("/proc/net/ip_vs").read().count(" 0A5702")
    now = time.monotonic()
    if count < WANTED and gone is None:
        gone = now
    elif count >= WANTED and gone is not None:
        print(round((now - gone) * 1000), flush=True)
        gone = None
    time.sleep(0.002)
"#;

#[test]
fn kube_proxy_flushes_ipvs_and_every_entry_is_back_within_a_second() {
    check(|| {
        let lab = installed()?;
        web(lab)?.add_service("flush", 80)?;
        let vip = |address: Ipv4Addr| {
            format!(
                "apiVersion: kubectl-vip.io/v1alpha1\nkind: VirtualIP\nmetadata: {{name: \"{address}\"}}\n\
                 spec: {{address: \"{address}\", virtualRouter: 160, services: [{{namespace: {NAMESPACE}, name: flush}}]}}\n---\n"
            )
        };
        lab.apply(&addresses().map(vip).collect::<String>())?;
        let last = addresses().last().context("no address")?;
        product::wait_destinations(lab, last, 80, 3, Duration::from_secs(60))?;
        let owner = product::wait_one_owner(lab, last, Duration::from_secs(60))?;
        let node = lab.node(owner.number);

        let wanted = usize::from(ADDRESSES) * 2;
        let watcher = WATCHER.replace("WANTED", &wanted.to_string());
        node.exec(&format!(
            "rm -f /run/lab/enough; cat > /run/lab/watcher.py << 'END'\n{watcher}END\n\
             setsid python3 /run/lab/watcher.py > /run/lab/away 2>&1 < /dev/null &"
        ))?
        .ok()?;
        let rounds = (0..ROUNDS).try_for_each(|round| {
            // Not in step with what the agent does now and then.
            thread::sleep(Duration::from_millis(1000 + 70 * round as u64));
            lab.restart_kube_proxy(owner.number)
        });
        thread::sleep(Duration::from_secs(2));
        node.exec("touch /run/lab/enough")?.ok()?;
        rounds?;
        let text = node.exec("sleep 0.5; cat /run/lab/away")?.ok()?.stdout;
        let away: Vec<u64> = text.lines().map(str::parse).collect::<Result<_, _>>().context(text.clone())?;
        println!("{wanted} services away after {ROUNDS} flushes, in ms: {away:?}");
        ensure!(!away.is_empty(), "kube-proxy did not flush the table: the test shows nothing");
        let longest = away.iter().max().copied().unwrap_or_default();
        ensure!(u128::from(longest) < LIMIT.as_millis(), "entries were away for {longest} ms: {away:?}");
        for address in [Ipv4Addr::new(10, 87, 2, 100), last] {
            let found = product::destinations(&node, address, 80)?;
            ensure!(found.len() == 3, "not every destination of {address} is back: {found:?}");
        }
        command::until("an answer", Duration::from_secs(10), || {
            lab.client().get(&format!("http://{last}/hostname")).map(Some)
        })?;
        let names: Vec<String> = addresses().map(|address| address.to_string()).collect();
        let delete = ["delete", "virtualip"].into_iter().chain(names.iter().map(String::as_str));
        lab.kubectl(delete)?.ok()?;
        lab.kubectl(["delete", "service", "flush", "-n", NAMESPACE, "--wait=false"])?.ok().map(drop)
    });
}
