//! A node of the native lab: both processes of the product in a host of a segment, as in the pod, with a real API server.

use std::{
    fs,
    net::{IpAddr, SocketAddr},
    path::PathBuf,
    process::{Child, Command},
};

use anyhow::{Result, ensure};
use lab::{Host, Lab, Server, command, memory, product};
use serde_json::{Value, json};

/// The processes of a node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Vrrp,
    Agent,
}

/// A node. Everything of it goes when this value goes, its objects in the cluster as well.
pub struct Node<'a> {
    pub host: &'a Host,
    pub name: String,
    lab: &'a Lab,
    folder: PathBuf,
    interval: &'static str,
    vrrp: Option<Child>,
    agent: Option<Child>,
    _server: Server,
}

impl<'a> Node<'a> {
    /// Starts both processes on a host. `interval` is that of the advertisements.
    pub fn start(lab: &'a Lab, host: &'a Host, interval: &'static str) -> Result<Self> {
        let name = format!("native-{}", host.number());
        // Among the lab's logs, which are kept and named when something fails.
        let folder = lab.logs_dir().join("native").join(host.netns().name());
        fs::create_dir_all(folder.join("state"))?;
        fs::write(folder.join("kubeconfig"), credentials(lab, host, &name)?.to_string())?;
        let server = Server::start(host.netns(), &name)?;
        let mut this = Self { host, name, lab, folder, interval, vrrp: None, agent: None, _server: server };
        this.launch(Part::Vrrp)?;
        this.launch(Part::Agent)?;
        Ok(this)
    }

    /// Starts one of the processes, as the kubelet does when it has ended.
    pub fn launch(&mut self, part: Part) -> Result<()> {
        let mut program = Command::new(crate::program());
        let log = fs::OpenOptions::new().create(true).append(true).open(self.log(part))?;
        program.stderr(log).env("VIP_LINK", self.folder.join("vrrp.sock"));
        match part {
            Part::Vrrp => {
                program.arg("vrrp");
            }
            Part::Agent => {
                program.args(["agent", "--node", &self.name, "--advert-interval", self.interval]);
                program.arg("--kubeconfig").arg(self.folder.join("kubeconfig"));
                program.arg("--state-dir").arg(self.folder.join("state"));
            }
        }
        let child = self.host.spawn(&mut program)?;
        *self.process(part) = Some(child);
        Ok(())
    }

    /// Sends a signal such as `KILL`.
    pub fn signal(&mut self, part: Part, signal: &str) -> Result<()> {
        let Some(child) = self.process(part) else { return Ok(()) };
        command::words(&["kill", &format!("-{signal}"), &child.id().to_string()])?.ok().map(drop)
    }

    /// Lets the kernel kill a process for want of memory.
    pub fn starve(&mut self, part: Part) -> Result<()> {
        if let Some(mut child) = self.process(part).take() {
            memory::take_away(child.id())?;
            child.wait()?;
        }
        Ok(())
    }

    /// Kills a process without a word.
    pub fn kill(&mut self, part: Part) -> Result<()> {
        self.signal(part, "KILL")?;
        if let Some(mut child) = self.process(part).take() {
            child.wait()?;
        }
        Ok(())
    }

    /// Ends both as the kubelet does.
    pub fn stop(&mut self) -> Result<()> {
        for part in [Part::Vrrp, Part::Agent] {
            self.signal(part, "TERM")?;
        }
        for part in [Part::Vrrp, Part::Agent] {
            if let Some(mut child) = self.process(part).take() {
                ensure!(
                    command::wait(&mut child, std::time::Duration::from_secs(15))?.is_some(),
                    "it does not end"
                );
            }
        }
        Ok(())
    }

    /// Where the last known state is.
    pub fn state_dir(&self) -> PathBuf {
        self.folder.join("state")
    }

    /// The log of a process.
    pub fn log(&self, part: Part) -> PathBuf {
        self.folder.join(format!("{part:?}.log").to_lowercase())
    }

    /// Whether its kernel has an address.
    pub fn has(&self, address: IpAddr) -> Result<bool> {
        Ok(self
            .host
            .exec("ip -oneline address show dev eth0")?
            .ok()?
            .stdout
            .contains(&format!(" {address}/")))
    }

    fn process(&mut self, part: Part) -> &mut Option<Child> {
        match part {
            Part::Vrrp => &mut self.vrrp,
            Part::Agent => &mut self.agent,
        }
    }
}

impl Drop for Node<'_> {
    fn drop(&mut self) {
        for part in [Part::Agent, Part::Vrrp] {
            let _ = self.kill(part);
        }
        let _ = self.lab.kubectl(["delete", "vipnode,node", &self.name, "--ignore-not-found"]);
    }
}

/// The credentials of a node's agent, and the node itself, which no kubelet registers.
fn credentials(lab: &Lab, host: &Host, node: &str) -> Result<Value> {
    let object = json!({"apiVersion": "v1", "kind": "Node", "metadata": {"name": node}});
    lab.apply(&object.to_string())?;
    let mut config = product::agent_kubeconfig(lab, node)?;
    config["clusters"][0]["cluster"]["server"] =
        json!(format!("https://{}", SocketAddr::new(host.gateway(), 6443)));
    Ok(config)
}
