//! The agent of a node in a real pod: killed, and started again by the kubelet.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, Watch, command, product};

use super::{Exposed, SOON, check_alone, installed};

/// How long the kubelet may take to start a container again: from the second end on it waits, longer each time.
const RESTART: Duration = Duration::from_secs(300);

/// How long vrrp waits for an agent.
const GRACE: Duration = Duration::from_secs(30);

/// Between two requests of a client over TCP and of three over UDP: together a hundred in a second. More over TCP leave an emulated
/// machine no room for the kubelet that is to start the agent again.
const EVERY: Duration = Duration::from_millis(40);

/// The agent's container in the pod on a node.
struct Agent {
    lab: &'static Lab,
    node: Node<'static>,
}

impl Agent {
    /// Its process. All nodes share the machine's processes: its own is the one in its network.
    fn process(&self) -> Result<u32> {
        let find = "me=$(readlink /proc/self/ns/net); for p in $(pgrep -x vip-node); do [ \"$(readlink /proc/$p/ns/net)\" = \"$me\" ] \
                    && tr '\\0' ' ' < /proc/$p/cmdline | grep -q 'vip-node agent' && echo $p; done; true";
        let pid = self.node.exec(find)?.ok()?.stdout;
        pid.trim().parse().with_context(|| format!("not one agent on {}: {pid:?}", self.node.name()))
    }

    /// How often it was started again.
    fn restarts(&self) -> Result<u32> {
        let count = "jsonpath={.items[0].status.containerStatuses[?(@.name==\"agent\")].restartCount}";
        let select = format!("--field-selector=spec.nodeName={}", self.node.name());
        let label = "app.kubernetes.io/name=kubectl-vip";
        let pods =
            self.lab.kubectl(["get", "pods", "-n", "kubectl-vip", "-l", label, &select, "-o", count])?;
        Ok(pods.ok()?.text().parse()?)
    }

    /// Waits until it was started once more than that, and runs.
    fn wait_restart(&self, before: u32) -> Result<()> {
        let what = format!("the kubelet to restart the agent on {}", self.node.name());
        command::until(&what, RESTART, || {
            ensure!(self.restarts()? > before, "it was started again {before} times");
            self.process().map(Some)
        })?;
        Ok(())
    }

    /// The steps that it took at its first look at the kernel, as its log has them.
    fn first_steps(&self) -> Result<usize> {
        command::until(&format!("the agent on {} to look at the kernel", self.node.name()), SOON, || {
            let select = format!("--field-selector=spec.nodeName={}", self.node.name());
            let name = self.lab.kubectl(["get", "pods", "-n", "kubectl-vip", &select, "-o", "name"])?.ok()?;
            let log = self.lab.kubectl(["logs", "-n", "kubectl-vip", name.text(), "-c", "agent"])?.ok()?;
            let mut lines = log.stdout.lines().filter(|line| line.contains("steps to what they should be"));
            let words = lines.next().into_iter().flat_map(str::split_whitespace);
            let steps = words.filter_map(|word| word.strip_prefix("steps=")?.parse().ok()).next();
            Ok(steps)
        })
    }
}

/// Waits until every pod of the product runs its newest version and is ready.
fn wait_ready(lab: &Lab) -> Result<()> {
    let rollout = ["rollout", "status", "-n", "kubectl-vip", "daemonset/vip-node", "--timeout=280s"];
    lab.kubectl_for(Duration::from_secs(290), rollout)?.ok().map(drop)
}

/// A client that goes on asking.
fn steady(lab: &Lab, url: &str) -> Result<Watch> {
    // What is late on a slow machine is no failure.
    let watch = lab.client().limit(Duration::from_secs(10)).watch(url, EVERY)?;
    watch.wait_answers(50, SOON)?;
    Ok(watch)
}

#[test]
fn it_is_killed_and_nobody_notices() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "killed")?;
        let agent = Agent { lab, node: lab.node(exposed.owner.number) };
        let (before, process) = (agent.restarts()?, agent.process()?);
        let udp = || format!("udp://{}:81/hostname", exposed.vip);
        let clients = [exposed.url(), udp(), udp(), udp()];
        let watches = clients.map(|url| steady(lab, &url));
        let killed = Instant::now();
        lab.vm().exec(&format!("kill -9 {process}"))?.ok()?;
        agent.wait_restart(before)?;
        let away = killed.elapsed();
        wait_ready(lab)?;
        // What it found is what there should be.
        let steps = agent.first_steps()?;
        ensure!(steps == 0, "the agent took {steps} steps");
        let reports = watches.into_iter().map(|watch| Ok(watch?.stop())).collect::<Result<Vec<_>>>()?;
        let told = reports.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        println!("{told}");
        let owners = product::owners(lab, exposed.vip)?;
        // Where the kubelet is so slow that the agent is away for longer than vrrp waits, the address is offered to other
        // nodes.
        let stayed = owners == [exposed.owner.clone()];
        ensure!(stayed || away > GRACE, "the virtual IP moved to {owners:?} after {away:?}; {told}");
        ensure!(!stayed || reports.iter().all(|report| report.failures == 0), "{told}");
        exposed.remove(lab)
    });
}
