//! The owner dies, the API server dies, the agent dies: the virtual IP goes on.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, command, product};

use super::{Exposed, check, installed, web};

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
        watch.wait_answers(100, Duration::from_secs(15))?;
        let cut = Cut::new(lab, owner)?;
        let next = product::wait_other_owner(lab, exposed.vip, owner, Duration::from_secs(10))?;
        thread::sleep(Duration::from_secs(2));
        let report = watch.stop();
        ensure!(report.longest_gap < Duration::from_secs(1), "{report}");
        println!("longest gap {} ms, then {}", report.longest_gap.as_millis(), next.node);
        product::wait_status_owner(lab, exposed.vip, &next.node, Duration::from_secs(20))?;
        drop(cut);
        product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?;
        exposed.remove(lab)
    });
}

#[test]
fn the_api_server_is_down_for_a_minute_and_an_owner_is_lost_meanwhile() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "apidown")?;
        let owner = exposed.owner.number;
        let watch = lab.client().limit(Duration::from_secs(1)).watch(&exposed.url(), EVERY)?;
        watch.wait_answers(100, Duration::from_secs(15))?;
        lab.stop_apiserver()?;
        let stopped = Instant::now();
        let rest = Duration::from_secs(60);
        let outcome = (|| -> Result<Cut> {
            thread::sleep(Duration::from_secs(30));
            let before = watch.so_far();
            ensure!(before.failures == 0, "with the API server down: {before}");
            let cut = Cut::new(lab, owner)?;
            product::wait_other_owner(lab, exposed.vip, owner, Duration::from_secs(5))?;
            watch.wait_answers(100, Duration::from_secs(10))?;
            thread::sleep(rest.saturating_sub(stopped.elapsed()));
            Ok(cut)
        })();
        lab.start_apiserver()?;
        drop(outcome?);
        let report = watch.stop();
        ensure!(report.longest_gap < Duration::from_secs(1), "{report}");
        product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?;
        exposed.remove(lab)
    });
}

/// The agent's process on a node. All nodes share the machine's processes: its own is the one in its network.
fn agent(node: &Node<'_>) -> Result<u32> {
    let find = "me=$(readlink /proc/self/ns/net); for p in $(pgrep -x vip-node); do [ \"$(readlink /proc/$p/ns/net)\" = \"$me\" ] \
                && tr '\\0' ' ' < /proc/$p/cmdline | grep -q 'vip-node agent' && echo $p; done; true";
    let pid = node.exec(find)?.ok()?.stdout;
    pid.trim().parse().with_context(|| format!("not one agent on {}: {pid:?}", node.name()))
}

/// How often the agent of a node was started again.
fn restarts(lab: &Lab, node: &Node<'_>) -> Result<u32> {
    let count = "jsonpath={.items[0].status.containerStatuses[?(@.name==\"agent\")].restartCount}";
    let select = format!("--field-selector=spec.nodeName={}", node.name());
    let label = "app.kubernetes.io/name=kubectl-vip";
    let pods = lab.kubectl(["get", "pods", "-n", "kubectl-vip", "-l", label, &select, "-o", count])?;
    Ok(pods.ok()?.text().parse()?)
}

#[test]
fn the_agent_is_killed_and_nobody_notices() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "killed")?;
        let owner = lab.node(exposed.owner.number);
        let before = restarts(lab, &owner)?;
        let agent = agent(&owner)?;
        let watch = lab.client().watch(&exposed.url(), Duration::from_millis(10))?;
        watch.wait_answers(100, Duration::from_secs(15))?;
        lab.vm().exec(&format!("kill -9 {agent}"))?.ok()?;
        command::until("the kubelet to restart the agent", Duration::from_secs(60), || {
            Ok((restarts(lab, &owner)? > before).then_some(()))
        })?;
        let rollout = ["rollout", "status", "-n", "kubectl-vip", "daemonset/vip-node", "--timeout=80s"];
        lab.kubectl_for(Duration::from_secs(90), rollout)?.ok()?;
        thread::sleep(Duration::from_secs(3));
        let report = watch.stop();
        let owners = product::owners(lab, exposed.vip)?;
        ensure!(owners == [exposed.owner.clone()], "the virtual IP moved to {owners:?}; {report}");
        ensure!(report.failures == 0, "{report}");
        exposed.remove(lab)
    });
}
