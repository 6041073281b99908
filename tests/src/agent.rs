//! The agent of a node in its pod: killed, and started again by the kubelet.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};

use crate::{Lab, Node, command, product};

/// How long the kubelet may take to start a container again: from the second end on it waits, longer each time.
const RESTART: Duration = Duration::from_secs(600);
/// How long anything else may take.
const SOON: Duration = Duration::from_secs(60);

/// When an agent is killed while the API server hangs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Moment {
    /// So that the next has to begin without it.
    Beginning,
    /// So that it is back before the next begins, and says what it thinks of nodes that it has not heard of.
    End,
}

/// The agent's container in the pod on a node.
pub struct Agent<'a> {
    lab: &'a Lab,
    node: Node<'a>,
}

impl<'a> Agent<'a> {
    /// That of a node, by its number.
    pub fn on(lab: &'a Lab, node: u8) -> Self {
        Self { lab, node: lab.node(node) }
    }

    /// Its process.
    pub fn process(&self) -> Result<u32> {
        self.node.process("agent")
    }

    /// Stops its process where it is, so that it does not see what is done then, and ends it without a word.
    pub fn kill_after(&self, unseen: impl FnOnce() -> Result<()>) -> Result<()> {
        let process = self.process()?;
        self.lab.vm().exec(&format!("kill -STOP {process}"))?.ok()?;
        let outcome = unseen();
        self.lab.vm().exec(&format!("kill -9 {process}"))?.ok()?;
        outcome
    }

    /// Ends its process without a word.
    pub fn kill(&self) -> Result<()> {
        self.lab.vm().exec(&format!("kill -9 {}", self.process()?))?.ok().map(drop)
    }

    /// Ends its process and waits for the next, without the API server's help.
    pub fn kill_and_wait(&self) -> Result<()> {
        let before = self.process()?;
        self.kill()?;
        command::until("another agent", SOON, || Ok(self.process().ok().filter(|now| *now != before)))?;
        Ok(())
    }

    /// Ends its process while the API server hangs, for that long at least; then waits until all agents are ready.
    pub fn kill_while_api_hangs(&self, hang: Duration, moment: Moment) -> Result<()> {
        let clock = Instant::now();
        self.lab.pause_apiserver()?;
        let outcome = match moment {
            Moment::Beginning => self.kill_and_wait(),
            Moment::End => {
                thread::sleep(hang);
                self.kill()
            }
        };
        thread::sleep(hang.saturating_sub(clock.elapsed()));
        self.lab.resume_apiserver()?;
        outcome?;
        product::wait_rollout(self.lab)
    }

    /// How often it was started again.
    pub fn restarts(&self) -> Result<u32> {
        let count = "jsonpath={.items[0].status.containerStatuses[?(@.name==\"agent\")].restartCount}";
        let select = format!("--field-selector=spec.nodeName={}", self.node.name());
        let label = "app.kubernetes.io/name=kubectl-vip";
        let pods =
            self.lab.kubectl(["get", "pods", "-n", "kubectl-vip", "-l", label, &select, "-o", count])?;
        Ok(pods.ok()?.text().parse()?)
    }

    /// Waits until it was started once more than that, and runs.
    pub fn wait_restart(&self, before: u32) -> Result<()> {
        let what = format!("the kubelet to restart the agent on {}", self.node.name());
        command::until(&what, RESTART, || {
            ensure!(self.restarts()? > before, "it was started again {before} times");
            self.process().map(Some)
        })?;
        Ok(())
    }

    /// The steps that it took at its first look at the kernel, as its log has them.
    pub fn first_steps(&self) -> Result<usize> {
        command::until(&format!("the agent on {} to look at the kernel", self.node.name()), SOON, || {
            let log = self.log(&[])?;
            let mut lines = log.lines().filter(|line| line.contains("steps to what they should be"));
            let words = lines.next().into_iter().flat_map(str::split_whitespace);
            let steps = words.filter_map(|word| word.strip_prefix("steps=")?.parse().ok()).next();
            Ok(steps)
        })
    }

    /// What it has logged in that time, and the process before this one, if there was one.
    pub fn last_words(&self, time: Duration) -> Result<String> {
        let since = format!("--since={}s", time.as_secs() + 1);
        let earlier = self.log(&[&since, "--previous"]).unwrap_or_default();
        Ok(earlier + &self.log(&[&since])?)
    }

    fn log(&self, which: &[&str]) -> Result<String> {
        let select = format!("--field-selector=spec.nodeName={}", self.node.name());
        let name = self.lab.kubectl(["get", "pods", "-n", "kubectl-vip", &select, "-o", "name"])?.ok()?;
        let log = ["logs", "-n", "kubectl-vip", name.text(), "-c", "agent"];
        Ok(self.lab.kubectl(log.iter().chain(which))?.ok()?.stdout)
    }
}
