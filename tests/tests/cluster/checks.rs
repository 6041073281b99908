//! Active checks: what a new owner does about the pods of a node that is gone, long before Kubernetes notices.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use lab::{Lab, command, product, workload::Pod};

use super::failover::{Cut, EVERY};
use super::{Exposed, SOON, check, installed, web};

/// Kubernetes calls the endpoints of a lost node ready for 40 seconds: half of that is watched.
const WATCHED: Duration = Duration::from_secs(20);

/// Unplugs the owner and counts the requests that fail from then on. `look` is done when another owner serves.
pub(super) fn lose_the_owner(
    lab: &'static Lab,
    exposed: &Exposed,
    pods: &BTreeMap<String, Pod>,
    owner: u8,
    look: impl FnOnce() -> Result<()>,
) -> Result<Cut> {
    let (lost, others): (Vec<_>, Vec<_>) = pods.values().partition(|pod| pod.node == format!("node-{owner}"));
    let weights_of = |pods: &[&Pod], weights: &BTreeMap<String, u32>| -> Vec<u32> {
        pods.iter().filter_map(|pod| weights.get(&format!("{}:8080", pod.address)).copied()).collect()
    };
    let watch = lab.client().limit(Duration::from_secs(1)).watch(&exposed.url(), EVERY)?;
    watch.wait_answers(100, SOON)?;
    let (cut, since) = (Cut::new(lab, owner)?, Instant::now());
    let next = product::wait_other_owner(lab, exposed.vip, owner, SOON)?;
    command::until("the lost pod to get nothing", WATCHED, || {
        let weights = product::destinations(&lab.node(next.number), exposed.vip, 80)?;
        let (lost, others) = (weights_of(&lost, &weights), weights_of(&others, &weights));
        // On a slow machine Kubernetes may have noticed meanwhile: then it is gone.
        ensure!(lost.iter().all(|weight| *weight == 0) && others == [1, 1], "{weights:?} on {}", next.node);
        Ok(Some(()))
    })?;
    look()?;
    thread::sleep(WATCHED.saturating_sub(since.elapsed()));
    let report = watch.stop();
    println!("{report}");
    ensure!(report.longest_gap < Duration::from_secs(1), "{report}");
    // While nobody owned the address all requests fail, and those that were under way then.
    let unowned = usize::try_from(report.longest_gap.as_millis() / EVERY.as_millis())? + 2;
    let allowed = unowned + report.requests / 100;
    ensure!(report.failures <= allowed, "{allowed} may fail: {report}");
    Ok(cut)
}

#[test]
fn the_pods_of_a_lost_owner_get_no_requests() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "suspects")?;
        let pods = web(lab)?.pods()?;
        drop(lose_the_owner(lab, &exposed, &pods, exposed.owner.number, || {
            command::until("the status to tell", SOON, || {
                let ready = product::field(lab, exposed.vip, "{.status.backends.ready}")?;
                ensure!(ready == "2", "{ready} backends get connections");
                Ok(Some(()))
            })
        })?);
        let owner = product::wait_one_owner(lab, exposed.vip, SOON)?;
        command::until("all pods to get requests again", SOON, || {
            let weights = product::destinations(&lab.node(owner.number), exposed.vip, 80)?;
            Ok((weights.len() == 3 && weights.values().all(|weight| *weight == 1)).then_some(()))
        })?;
        exposed.remove(lab)
    });
}
