//! The owner dies, the API server dies, the agent dies: the virtual IP goes on.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, command, product};
use serde_json::Value;

use super::{Exposed, check, installed, web};

/// Requests every 20 ms, as an impatient client would.
const EVERY: Duration = Duration::from_millis(20);

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

/// The process of a role on a node. All nodes share the machine's processes: its own is the one in its network.
fn process(node: &Node<'_>, role: &str) -> Result<u32> {
    let find = format!(
        "me=$(readlink /proc/self/ns/net); for p in $(pgrep -x vip-node); do [ \"$(readlink /proc/$p/ns/net)\" = \"$me\" ] \
         && tr '\\0' ' ' < /proc/$p/cmdline | grep -q 'vip-node {role}' && echo $p; done"
    );
    let pid = node.exec(&find)?.ok()?.stdout;
    pid.trim().parse().with_context(|| format!("not one {role} on {}: {pid:?}", node.name()))
}

/// How often a container of a node's pod was started again, and why the last one ended.
fn restarts(lab: &Lab, node: &Node<'_>, container: &str) -> Result<(u32, String)> {
    let select = format!("--field-selector=spec.nodeName={}", node.name());
    let pods = [
        "get",
        "pods",
        "-n",
        "kubectl-vip",
        "-l",
        "app.kubernetes.io/name=kubectl-vip",
        &select,
        "-o",
        "json",
    ];
    let pods: Value = serde_json::from_str(&lab.kubectl(pods)?.ok()?.stdout)?;
    let all = pods["items"][0]["status"]["containerStatuses"].as_array().cloned().unwrap_or_default();
    let status = all.into_iter().find(|status| status["name"] == container).context("no such container")?;
    let count = u32::try_from(status["restartCount"].as_u64().unwrap_or_default())?;
    let reason = status["lastState"]["terminated"]["reason"].as_str().unwrap_or_default().to_owned();
    Ok((count, reason))
}

/// Waits until a container was started again and the pods are ready.
fn wait_restart(lab: &Lab, node: &Node<'_>, container: &str, before: u32) -> Result<()> {
    command::until(&format!("the kubelet to restart {container}"), Duration::from_secs(60), || {
        Ok((restarts(lab, node, container)?.0 > before).then_some(()))
    })?;
    let rollout = ["rollout", "status", "-n", "kubectl-vip", "daemonset/vip-node", "--timeout=80s"];
    lab.kubectl_for(Duration::from_secs(90), rollout)?.ok().map(drop)
}

#[test]
fn the_agent_is_killed_and_nobody_notices() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "killed")?;
        let owner = lab.node(exposed.owner.number);
        let before = restarts(lab, &owner, "agent")?.0;
        let agent = process(&owner, "agent")?;
        let watch = lab.client().watch(&exposed.url(), Duration::from_millis(10))?;
        watch.wait_answers(100, Duration::from_secs(15))?;
        lab.vm().exec(&format!("kill -9 {agent}"))?.ok()?;
        wait_restart(lab, &owner, "agent", before)?;
        thread::sleep(Duration::from_secs(3));
        let report = watch.stop();
        ensure!(
            product::owners(lab, exposed.vip)? == [exposed.owner.clone()],
            "the virtual IP moved; {report}"
        );
        ensure!(report.failures == 0, "{report}");
        exposed.remove(lab)
    });
}

#[test]
fn a_process_that_runs_out_of_memory_costs_nothing_or_a_moment() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "memory")?;
        for role in ["agent", "vrrp"] {
            let owner = lab.node(product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?.number);
            let before = restarts(lab, &owner, role)?.0;
            let victim = process(&owner, role)?;
            let watch = lab.client().limit(Duration::from_secs(1)).watch(&exposed.url(), EVERY)?;
            watch.wait_answers(100, Duration::from_secs(15))?;
            // A limit below what it uses already: the kernel kills it.
            let starve = format!(
                "echo 100000 > /sys/fs/cgroup$(cut -d: -f3 /proc/{victim}/cgroup)/memory.max; while [ -e /proc/{victim}/exe ]; do :; done"
            );
            lab.vm().exec(&starve)?;
            wait_restart(lab, &owner, role, before)?;
            let reason = restarts(lab, &owner, role)?.1;
            ensure!(reason == "OOMKilled", "{role} ended by {reason}");
            let report = watch.stop();
            println!(
                "{role} out of memory: {} of {} failed, longest gap {} ms",
                report.failures,
                report.requests,
                report.longest_gap.as_millis()
            );
            ensure!(report.longest_gap < Duration::from_secs(1), "{role}: {report}");
        }
        product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?;
        exposed.remove(lab)
    });
}
