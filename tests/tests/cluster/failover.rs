//! The owner is cut off, the API server dies: the virtual IP goes on.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use lab::{Lab, command, product};

use super::{Exposed, SOON, check, checks, installed, web};

/// Requests every 20 ms, as an impatient client would.
pub(super) const EVERY: Duration = Duration::from_millis(20);

/// A node whose link is cut. It is plugged in again in any case: other tests need it.
pub(super) struct Cut {
    lab: &'static Lab,
    node: u8,
}

impl Cut {
    pub(super) fn new(lab: &'static Lab, node: u8) -> Result<Self> {
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

#[test]
fn the_owner_is_unplugged_and_another_takes_over_within_a_second() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "unplug")?;
        let owner = exposed.owner.number;
        ensure!(product::bound_on(lab, exposed.vip)? == [owner], "bound on more than the owner");
        let watch = lab.client().limit(Duration::from_secs(1)).watch(&exposed.url(), EVERY)?;
        watch.wait_answers(100, SOON)?;
        let cut = Cut::new(lab, owner)?;
        let next = product::wait_other_owner(lab, exposed.vip, owner, SOON)?;
        thread::sleep(Duration::from_secs(2));
        let report = watch.stop();
        ensure!(report.longest_gap < Duration::from_secs(1), "{report}");
        println!("longest gap {} ms, then {}", report.longest_gap.as_millis(), next.node);
        product::wait_status_owner(lab, exposed.vip, &next.node, SOON)?;
        drop(cut);
        product::wait_one_owner(lab, exposed.vip, SOON)?;
        exposed.remove(lab)
    });
}

#[test]
fn the_api_server_is_down_for_a_minute_and_an_owner_is_lost_meanwhile() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "apidown")?;
        let pods = web(lab)?.pods()?;
        let watch = lab.client().limit(Duration::from_secs(1)).watch(&exposed.url(), EVERY)?;
        watch.wait_answers(100, SOON)?;
        lab.stop_apiserver()?;
        let stopped = Instant::now();
        let outcome = (|| -> Result<Cut> {
            thread::sleep(Duration::from_secs(30));
            let report = watch.stop();
            ensure!(report.failures == 0, "with the API server down: {report}");
            let cut = checks::lose_the_owner(lab, &exposed, &pods, exposed.owner.number, || Ok(()))?;
            thread::sleep(Duration::from_secs(60).saturating_sub(stopped.elapsed()));
            Ok(cut)
        })();
        lab.start_apiserver()?;
        drop(outcome?);
        product::wait_one_owner(lab, exposed.vip, SOON)?;
        exposed.remove(lab)
    });
}
