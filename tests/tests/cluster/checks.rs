//! Active checks: what a new owner does about the pods of a node that is gone, long before Kubernetes notices.

use std::{collections::BTreeMap, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{Lab, command, product};

use super::failover::{Cut, EVERY};
use super::{Exposed, check, installed, web};

/// Kubernetes calls the endpoints of a lost node ready for 40 seconds: half of that is watched.
const WATCHED: Duration = Duration::from_secs(20);

/// Unplugs the owner, counts the requests that fail until the end, and looks at the new owner's kernel.
fn lose_the_owner(lab: &'static Lab, exposed: &Exposed, owner: u8) -> Result<Cut> {
    let pods = web(lab)?.pods()?;
    let lost =
        pods.values().find(|pod| pod.node == format!("node-{owner}")).context("no pod on the owner")?;
    let lost = format!("{}:8080", lost.address);
    let watch = lab.client().limit(Duration::from_secs(1)).watch(&exposed.url(), EVERY)?;
    watch.wait_answers(100, Duration::from_secs(15))?;
    let cut = Cut::new(lab, owner)?;
    let next = product::wait_other_owner(lab, exposed.vip, owner, Duration::from_secs(10))?;
    thread::sleep(WATCHED);
    let weights = product::destinations(&lab.node(next.number), exposed.vip, 80)?;
    let report = watch.stop();
    println!("{report}\n{weights:?} on {}", next.node);

    let expected: BTreeMap<String, u32> = pods
        .values()
        .map(|pod| format!("{}:8080", pod.address))
        .map(|pod| (pod.clone(), u32::from(pod != lost)))
        .collect();
    ensure!(weights == expected, "{}: {weights:?}, wanted {expected:?}", next.node);
    ensure!(report.longest_gap < Duration::from_secs(1), "{report}");
    // While nobody owned the address all requests fail, and those that were under way then.
    let unowned = usize::try_from(report.longest_gap.as_millis() / EVERY.as_millis())? + 2;
    let allowed = unowned + report.requests / 100;
    ensure!(report.failures <= allowed, "{} may fail: {report}", allowed);
    Ok(cut)
}

#[test]
fn the_pods_of_a_lost_owner_get_no_requests() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "suspects")?;
        let cut = lose_the_owner(lab, &exposed, exposed.owner.number)?;
        let told = ["{.status.backends.ready}", "{.status.conditions[?(@.type==\"Programmed\")].message}"];
        let told: Vec<String> =
            told.iter().map(|path| product::field(lab, exposed.vip, path)).collect::<Result<_>>()?;
        drop(cut);
        ensure!(told[0] == "2" && told[1].contains("does not pass its check"), "{told:?}");
        let owner = product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?;
        command::until("all pods to get requests again", Duration::from_secs(60), || {
            let weights = product::destinations(&lab.node(owner.number), exposed.vip, 80)?;
            Ok((weights.len() == 3 && weights.values().all(|weight| *weight == 1)).then_some(()))
        })?;

        lab.stop_apiserver()?;
        let without = lose_the_owner(lab, &exposed, owner.number);
        lab.start_apiserver()?;
        drop(without.context("with the API server down")?);
        product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?;
        exposed.remove(lab)
    });
}
