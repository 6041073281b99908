//! kube-proxy in nftables mode flushes the whole IPVS table when it starts: how long a hundred Services are away.

use std::{
    fmt::Write as _,
    net::Ipv4Addr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lab::{Crowd, Lab, command, product};

use super::{NAMESPACE, PLACE, SOON, bring, expose};
use crate::{loader::Loader, slowdown::Slowdown};

/// The word that starts the half that runs on a node.
pub const WATCH: &str = "watch-ipvs";

const SERVICES: u8 = 100;
/// How long an entry may be away, on the host.
const GOAL: Duration = Duration::from_millis(200);
/// Connections through the node's table meanwhile, that stay open.
const CONNECTIONS: usize = 50;
/// Behind each of them.
const PODS: usize = 3;
const FLUSHES: u64 = 10;
/// The watcher ends by itself, should nobody end it.
const LIMIT: Duration = Duration::from_secs(900);

/// Restarts kube-proxy again and again while another process reads the kernel's table.
pub fn flushed(lab: &Lab) -> Result<()> {
    let mut manifest = String::new();
    for n in 0..SERVICES {
        write!(
            manifest,
            "apiVersion: v1
kind: Service
metadata: {{name: flushed-{n}, namespace: {NAMESPACE}}}
spec:
  selector: {{app: web}}
  ports:
  - {{name: http, port: 80, targetPort: http}}
---
"
        )?;
    }
    lab.apply(&manifest)?;
    expose(lab, (0..SERVICES).map(|n| format!("flushed-{n}")))?;
    let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "flushed-0")?;
    let owner = product::wait_one_owner(lab, vip, SOON)?;
    let node = lab.node(owner.number);
    command::until("all of them in the kernel", LIMIT, || {
        let lines = node.exec("ipvsadm -Ln")?.ok()?.stdout.lines().count();
        ensure!(lines >= usize::from(SERVICES) * (1 + PODS), "{lines} lines");
        Ok(Some(()))
    })?;

    bring(lab, &node)?;
    node.exec(&format!("rm -f {PLACE}/enough"))?.ok()?;
    let crowd = Crowd::gather(&lab.client(), (vip, 80).into(), CONNECTIONS)?;
    let told = thread::scope(|scope| -> Result<String> {
        let watcher =
            scope.spawn(|| node.exec_for(&format!("{PLACE}/bench {WATCH} {}", Slowdown::word()), LIMIT));
        let restarted = (1..=FLUSHES).try_for_each(|turn| {
            // At no particular moment of what goes on every so often.
            thread::sleep(Duration::from_millis(turn * 7919 % 1000));
            lab.restart_kube_proxy(owner.number)
        });
        thread::sleep(Duration::from_secs(2));
        node.exec(&format!("touch {PLACE}/enough"))?.ok()?;
        restarted?;
        Ok(watcher.join().ok().context("the watcher ended badly")??.ok()?.stdout)
    })?;
    println!("kube-proxy restarted {FLUSHES} times with {SERVICES} Services of {PODS} pods:");
    println!("  {}", told.trim());
    println!("  {}", crowd.leave());
    Ok(())
}

/// The half on the node: looks at the table of its network namespace until told otherwise.
pub fn watch(words: &[String]) -> Result<()> {
    let slowdown = Slowdown::from_word(words.first().context("the host's time, please")?)?;
    let enough = std::path::Path::new(PLACE).join("enough");
    let kernel = Loader::open()?;
    let services = kernel.services()?;
    let entries = || {
        let there = services.iter().map(|key| Ok(1 + kernel.destinations(key)?.len()));
        there.sum::<Result<usize>>()
    };
    let all = entries()?;
    let mut absences = Vec::new();
    let mut gone: Option<Instant> = None;
    let (start, mut last) = (Instant::now(), Instant::now());
    let mut slowest = Duration::ZERO;
    while start.elapsed() < LIMIT && !enough.exists() {
        // Destinations are counted once all services are there again.
        let absent = kernel.services()?.len() < services.len() || gone.is_some() && entries()? < all;
        slowest = slowest.max(last.elapsed());
        last = Instant::now();
        if absent {
            gone.get_or_insert_with(Instant::now);
        } else if let Some(since) = gone.take() {
            absences.push(since.elapsed().as_millis());
        }
        // Seldom enough to leave the processors to who repairs.
        thread::sleep(Duration::from_millis(10));
    }
    if gone.is_some() {
        bail!("{} of {all} entries did not come back", all - entries()?);
    }
    println!(
        "{all} entries, not all there {} times, for {absences:?} ms (goal {} ms, in a machine that is {slowdown} times slower than \
         its host {} ms); the slowest look took {} ms",
        absences.len(),
        GOAL.as_millis(),
        slowdown.times(GOAL).as_millis(),
        slowest.as_millis()
    );
    Ok(())
}
