//! The owner is cut off, the API server dies: the virtual IP goes on, and the pods that were lost get no requests.

use std::{
    collections::BTreeMap,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use jiff::Timestamp;
use lab::{
    Lab, command,
    product::{self, Owner},
    workload::Pod,
};

use super::{Exposed, SOON, answered, check_alone, installed, moved_since, web};

/// Between two requests of an impatient client.
const EVERY: Duration = Duration::from_millis(50);

/// Kubernetes calls the endpoints of a lost node ready for 40 seconds: half of that is watched.
const WATCHED: Duration = Duration::from_secs(20);

/// A node whose link is cut. It is plugged in again in any case: other tests need it.
struct Cut {
    lab: &'static Lab,
    node: u8,
}

impl Cut {
    fn new(lab: &'static Lab, node: u8) -> Result<Self> {
        let this = Self { lab, node };
        lab.unplug(node)?;
        Ok(this)
    }
}

impl Drop for Cut {
    /// Waits until Kubernetes believes in the node again and its pods are ready.
    fn drop(&mut self) {
        let Self { lab, node } = *self;
        let name = format!("node-{node}");
        let mended = lab.plug(node).and_then(|()| {
            command::until(&format!("{name} to be Ready"), Duration::from_secs(120), || {
                let ready = "jsonpath={.status.conditions[?(@.type==\"Ready\")].status}";
                let status = lab.kubectl(["get", "node", &name, "-o", ready])?.ok()?;
                Ok((status.text() == "True").then_some(()))
            })
        });
        if let Err(error) = mended.and_then(|()| web(lab)?.wait(3)) {
            eprintln!("{name} is not as it was before its link was cut: {error:#}");
        }
    }
}

/// Unplugs the owner and counts the requests that fail from then on. `look` is done when another owner serves.
fn lose_the_owner(
    lab: &'static Lab,
    exposed: &Exposed,
    pods: &BTreeMap<String, Pod>,
    look: impl FnOnce(&Owner) -> Result<()>,
) -> Result<Cut> {
    let client = lab.client().limit(Duration::from_secs(1));
    let watch = client.watch(&exposed.url(), EVERY)?;
    watch.wait_answers(100, SOON)?;
    // Not the one that it had at first: a machine that stands still for longer than its peers wait loses its addresses.
    let owner = product::wait_owner(lab, exposed.vip, SOON)?;
    let (lost, others): (Vec<_>, Vec<_>) = pods.values().partition(|pod| pod.node == owner.node);
    let weights_of = |pods: &[&Pod], weights: &BTreeMap<String, u32>| -> Vec<u32> {
        pods.iter().filter_map(|pod| weights.get(&format!("{}:8080", pod.address)).copied()).collect()
    };
    let stays = others.first().context("no pod on another node")?;
    let beside = client.watch(&stays.url(), EVERY)?;
    let (cut, since) = (Cut::new(lab, owner.number)?, Instant::now());
    let next = product::wait_other_owner(lab, exposed.vip, owner.number, SOON)?;
    command::until("the lost pod to get nothing", WATCHED, || {
        let weights = product::destinations(&lab.node(next.number), exposed.vip, 80)?;
        let (lost, others) = (weights_of(&lost, &weights), weights_of(&others, &weights));
        // On a slow machine Kubernetes may have noticed meanwhile: then it is gone.
        ensure!(lost.iter().all(|weight| *weight == 0) && others == [1, 1], "{weights:?} on {}", next.node);
        Ok(Some(()))
    })?;
    look(&next)?;
    thread::sleep(WATCHED.saturating_sub(since.elapsed()));
    let (report, beside) = (watch.stop(), beside.stop());
    println!("{report}; of a pod itself: {beside}");
    answered(&report, &beside)?;
    let allowed = report.bearable(EVERY) + report.requests / 100 + beside.failures;
    ensure!(report.failures <= allowed, "{allowed} may fail: {report}");
    Ok(cut)
}

#[test]
fn the_owner_is_unplugged_another_takes_over_within_a_second_and_the_lost_pods_get_nothing() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "unplug")?;
        let pods = web(lab)?.pods()?;
        drop(lose_the_owner(lab, &exposed, &pods, |next| {
            product::wait_status_owner(lab, exposed.vip, &next.node, SOON)?;
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

#[test]
fn the_api_server_hangs_then_is_down_for_a_minute_and_an_owner_is_lost_meanwhile() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "apidown")?;
        let pods = web(lab)?.pods()?;
        let began = Timestamp::now();
        let watch = lab.client().limit(Duration::from_secs(10)).watch(&exposed.url(), EVERY)?;
        watch.wait_answers(100, SOON)?;
        // No node can renew its lease: at the return Kubernetes calls all of them, and all endpoints, not ready.
        lab.pause_apiserver()?;
        thread::sleep(Duration::from_secs(30));
        lab.resume_apiserver()?;
        thread::sleep(Duration::from_secs(10));
        lab.stop_apiserver()?;
        let stopped = Instant::now();
        let outcome = (|| -> Result<Cut> {
            thread::sleep(Duration::from_secs(10));
            let report = watch.stop();
            // A machine that stands still for longer than its peers wait loses its addresses.
            let moved = moved_since(lab, began)?;
            ensure!(report.failures == 0 || moved, "with the API server hanging, back, and down: {report}");
            let cut = lose_the_owner(lab, &exposed, &pods, |_| Ok(()))?;
            thread::sleep(Duration::from_secs(60).saturating_sub(stopped.elapsed()));
            Ok(cut)
        })();
        lab.start_apiserver()?;
        drop(outcome?);
        product::wait_one_owner(lab, exposed.vip, SOON)?;
        exposed.remove(lab)
    });
}
