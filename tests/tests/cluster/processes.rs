//! What can happen to the two processes of a node in a real pod: killed, out of memory, replaced by a new version.

use std::{thread, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, Report, Watch, arp::Answers, command, product};

use super::{Exposed, check, installed};

/// How long the kubelet may take to start a container again: from the second end on it waits, longer each time.
const RESTART: Duration = Duration::from_secs(300);
/// What the other tests of this tier ask for.
const STRICT: Duration = Duration::from_secs(2);
/// Longer than any takeover: what is late on a slow machine is no failure.
const PATIENT: Duration = Duration::from_secs(5);

/// A container of the pod on a node, `vrrp` or `agent`.
struct Container {
    lab: &'static Lab,
    node: Node<'static>,
    name: &'static str,
}

impl Container {
    /// Its process. All nodes share the machine's processes: its own is the one in its network.
    fn process(&self) -> Result<u32> {
        let find = format!(
            "me=$(readlink /proc/self/ns/net); for p in $(pgrep -x vip-node); do [ \"$(readlink /proc/$p/ns/net)\" = \"$me\" ] \
             && tr '\\0' ' ' < /proc/$p/cmdline | grep -q 'vip-node {}' && echo $p; done; true",
            self.name
        );
        let pid = self.node.exec(&find)?.ok()?.stdout;
        pid.trim().parse().with_context(|| format!("not one {} on {}: {pid:?}", self.name, self.node.name()))
    }

    /// How often it was started again.
    fn restarts(&self) -> Result<u32> {
        let count = format!(
            "jsonpath={{.items[0].status.containerStatuses[?(@.name==\"{}\")].restartCount}}",
            self.name
        );
        let select = format!("--field-selector=spec.nodeName={}", self.node.name());
        let label = "app.kubernetes.io/name=kubectl-vip";
        let pods =
            self.lab.kubectl(["get", "pods", "-n", "kubectl-vip", "-l", label, &select, "-o", &count])?;
        Ok(pods.ok()?.text().parse()?)
    }

    /// Waits until it was started once more than that, and runs.
    fn wait_restart(&self, before: u32) -> Result<()> {
        let what = format!("the kubelet to restart {} on {}", self.name, self.node.name());
        command::until(&what, RESTART, || {
            ensure!(self.restarts()? > before, "it was started again {before} times");
            self.process().map(Some)
        })?;
        Ok(())
    }

    /// Takes its memory away: its limit falls below what it uses. Gives how many processes the kernel killed for that.
    fn starve(&self) -> Result<u64> {
        let process = self.process()?;
        // The pod's group counts for those in it, and outlives the container.
        let starve = format!(
            "own=/sys/fs/cgroup$(cut -d: -f3 /proc/{process}/cgroup); \
             kills() {{ while read -r key value; do [ $key = oom_kill ] && echo $value; done < ${{own%/*}}/memory.events; }}; \
             before=$(kills); echo 0 > $own/memory.max; echo $(($(kills) - before))"
        );
        Ok(self.lab.vm().exec(&starve)?.ok()?.text().parse()?)
    }
}

/// Waits until every pod of the product runs its newest version and is ready.
fn wait_ready(lab: &Lab) -> Result<()> {
    let rollout = ["rollout", "status", "-n", "kubectl-vip", "daemonset/vip-node", "--timeout=280s"];
    lab.kubectl_for(Duration::from_secs(290), rollout)?.ok().map(drop)
}

/// A client that goes on asking as often as this machine carries with room for more, at most that often in a second. It
/// tells how often.
fn steady(lab: &Lab, url: &str, limit: Duration, most: u32) -> Result<(Watch, u32)> {
    let mut carried = None;
    for rate in [10, 25, 50, 100, 200, 500, 1000].into_iter().filter(|rate| *rate <= most) {
        // Twice as often, for a while.
        let trial = lab.client().limit(limit).watch(url, Duration::from_secs(1) / (rate * 2))?;
        thread::sleep(Duration::from_secs(2));
        let seen = trial.so_far();
        let answers: usize = seen.by_answer.values().sum();
        // What it asked last may still be under way.
        if seen.failures > 0 || answers + seen.requests / 10 < seen.requests {
            break;
        }
        carried = Some(rate);
    }
    let rate = carried.context("this machine does not carry 20 requests a second")?;
    let watch = lab.client().limit(limit).watch(url, Duration::from_secs(1) / rate)?;
    watch.wait_answers(20, Duration::from_secs(15))?;
    Ok((watch, rate))
}

#[test]
fn the_agent_is_killed_and_nobody_notices() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "killed")?;
        let agent = Container { lab, node: lab.node(exposed.owner.number), name: "agent" };
        let (before, process) = (agent.restarts()?, agent.process()?);
        let (watch, _) = steady(lab, &exposed.url(), STRICT, 100)?;
        lab.vm().exec(&format!("kill -9 {process}"))?.ok()?;
        agent.wait_restart(before)?;
        wait_ready(lab)?;
        thread::sleep(Duration::from_secs(3));
        let report = watch.stop();
        let owners = product::owners(lab, exposed.vip)?;
        ensure!(owners == [exposed.owner.clone()], "the virtual IP moved to {owners:?}; {report}");
        ensure!(report.failures == 0, "{report}");
        exposed.remove(lab)
    });
}

/// Takes the memory of a container of the owner away, twice in a row, under a client that asks all the time.
fn starve_twice(lab: &'static Lab, exposed: &Exposed, name: &'static str) -> Result<(Report, Answers)> {
    let container = Container { lab, node: lab.node(exposed.owner.number), name };
    let (watch, rate) = steady(lab, &exposed.url(), STRICT, 100)?;
    let arp = lab.arp_watch(exposed.vip);
    for _ in 0..2 {
        let before = container.restarts()?;
        let kills = container.starve()?;
        ensure!(kills > 0, "the kernel killed nothing for want of memory");
        container.wait_restart(before)?;
    }
    wait_ready(lab)?;
    // By then the address of a process that is gone has left its kernel.
    thread::sleep(Duration::from_secs(4));
    let (report, answers) = (watch.stop(), arp.stop()?);
    println!(
        "{name} out of memory, twice, at {rate} requests/s: {} of {} requests failed, longest gap {} ms; {answers}",
        report.failures,
        report.requests,
        report.longest_gap.as_millis()
    );
    Ok((report, answers))
}

#[test]
fn the_agent_is_out_of_memory_and_no_request_fails() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "oom-agent")?;
        let (report, _) = starve_twice(lab, &exposed, "agent")?;
        let owner = product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?;
        ensure!(report.failures == 0, "{report}; the owner was {:?} and is {owner:?}", exposed.owner);
        exposed.remove(lab)
    });
}

#[test]
fn vrrp_is_out_of_memory_and_there_is_one_owner() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "oom-vrrp")?;
        let (report, answers) = starve_twice(lab, &exposed, "vrrp")?;
        product::wait_one_owner(lab, exposed.vip, Duration::from_secs(20))?;
        // The kernel ends the address of a process that is gone after three seconds.
        ensure!(answers.several <= Duration::from_millis(3200), "two nodes answered for too long: {answers}");
        ensure!(report.longest_gap < Duration::from_secs(1), "{report}");
        exposed.remove(lab)
    });
}

/// How many requests are under way at a time when so many begin each second.
fn under_way(lab: &Lab, url: &str, rate: u32) -> Result<usize> {
    let mut took = (0..9).map(|_| Ok(lab.client().get(url)?.took)).collect::<Result<Vec<_>>>()?;
    took.sort_unstable();
    Ok((took[took.len() / 2].as_secs_f64() * f64::from(rate)).ceil() as usize)
}

#[test]
fn the_daemonset_is_rolled_and_no_request_fails_for_want_of_an_owner() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "rolled")?;
        let (watch, rate) = steady(lab, &exposed.url(), PATIENT, 1000)?;
        let under_way = under_way(lab, &exposed.url(), rate)?;
        let arp = lab.arp_watch(exposed.vip);
        lab.kubectl(["rollout", "restart", "-n", "kubectl-vip", "daemonset/vip-node"])?.ok()?;
        wait_ready(lab)?;
        let last = product::wait_one_owner(lab, exposed.vip, Duration::from_secs(60))?;
        let (report, answers) = (watch.stop(), arp.stop()?);
        println!(
            "the DaemonSet rolled at {rate} requests/s, {under_way} of them under way at a time, {} to {}: {} of {} requests \
             failed {:?}, longest gap {} ms; {answers}",
            exposed.owner.node,
            last.node,
            report.failures,
            report.requests,
            report.by_failure,
            report.longest_gap.as_millis()
        );
        // What is under way while the address moves may end with a reset: the new owner does not know its connection. Nothing
        // else may fail, and each of the three nodes gives the address away once at most.
        let resets = report.by_failure.get("connection reset").copied().unwrap_or_default();
        ensure!(report.failures == resets && resets <= 3 * under_way, "{report}");
        exposed.remove(lab)
    });
}
