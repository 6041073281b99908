//! kube-proxy in nftables mode flushes the whole IPVS table when it starts: how long a hundred Services are away.

use std::{fmt::Write as _, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Result, bail, ensure};
use lab::{
    Lab, command,
    ipvs_ear::{FLUSH, NEW_DESTINATION, NEW_SERVICE, Word},
    product,
};

use super::{NAMESPACE, SOON, expose};
use crate::ms;

const SERVICES: u8 = 100;
/// Behind each of them.
const PODS: usize = 3;
/// The virtual routers that carry all of their addresses.
const ROUTERS: &str = "200-202";
/// How long an entry may be away.
const GOAL: Duration = Duration::from_millis(200);
const FLUSHES: u64 = 10;
/// How long all of it may take.
const LIMIT: Duration = Duration::from_secs(900);

/// Restarts kube-proxy again and again, and hears when what is back.
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
    // An election for each address would keep an emulated machine busy, and has nothing to do with this.
    lab.kubectl(["vip", "pool", "set", "lab", "--virtual-routers", ROUTERS])?.ok()?;
    expose(lab, (0..SERVICES).map(|n| format!("flushed-{n}")))?;
    let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "flushed-0")?;
    let owner = product::wait_one_owner(lab, vip, SOON)?;
    let node = lab.node(owner.number);
    command::until("all of them in the kernel", LIMIT, || {
        let lines = node.exec("ipvsadm -Ln")?.ok()?.stdout.lines().count();
        ensure!(lines >= usize::from(SERVICES) * (1 + PODS), "{lines} lines");
        Ok(Some(()))
    })?;

    let ((), words) = node.hear_ipvs(LIMIT, || {
        for turn in 1..=FLUSHES {
            // At no particular moment of what goes on every so often.
            thread::sleep(Duration::from_millis(turn * 7919 % 1000));
            lab.restart_kube_proxy(owner.number)?;
        }
        thread::sleep(Duration::from_secs(2));
        Ok(())
    })?;
    println!(
        "kube-proxy restarted {FLUSHES} times with {SERVICES} Services of {PODS} pods (goal {}); after each flush",
        ms(GOAL)
    );
    let is_flush = |word: &Word| word.command == FLUSH && word.answer.is_none();
    let flushes =
        words.chunk_by(|_, next| !is_flush(next)).filter(|after| after.first().is_some_and(is_flush));
    for after in flushes {
        println!("  {}", refill(after)?);
    }
    Ok(())
}

/// What came after a flush.
fn refill(words: &[Word]) -> Result<String> {
    let [flush, rest @ ..] = words else { bail!("no flush") };
    let adds = |word: &&Word| [NEW_SERVICE, NEW_DESTINATION].contains(&word.command);
    let (answers, requests): (Vec<&Word>, Vec<&Word>) =
        rest.iter().filter(adds).partition(|word| word.answer.is_some());
    let (Some(first), Some(last)) = (requests.first(), answers.last()) else { bail!("nothing was put back") };
    ensure!(
        answers.iter().all(|word| word.answer == Some(0)),
        "not everything could be put back: {answers:?}"
    );
    let since = |word: &Word| ms(word.at.saturating_sub(flush.at));
    Ok(format!(
        "{} entries put back, the first on its way after {}, all there after {}",
        requests.len(),
        since(first),
        since(last)
    ))
}
