//! A lab as a whole: up, down, and the handles that tests use.

use std::{
    env,
    ffi::OsStr,
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::{self, Command},
    sync::{
        OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{sys::signal::Signal, unistd::Uid};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::{
    arp::{self, ArpWatch},
    binaries,
    client::Client,
    command::{self, Output},
    control_plane::ControlPlane,
    daemon::Daemon,
    guest::{self, NODES, PROXY_MODE},
    image,
    lan::{self, BRIDGE},
    netns::Netns,
    paths, setup, store, vm,
};

/// Which parts of a lab to start.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, clap::ValueEnum)]
#[serde(rename_all = "lowercase")]
pub enum Parts {
    /// The control plane and the machine with its three nodes.
    Cluster,
    /// The control plane alone.
    Api,
    /// The machine alone, with no node in it.
    Machine,
}

impl Parts {
    fn control_plane(self) -> bool {
        self != Self::Machine
    }

    fn machine(self) -> bool {
        self != Self::Api
    }
}

/// A lab that runs.
#[derive(Clone, Debug)]
pub struct Lab {
    name: String,
    folder: PathBuf,
    netns: Netns,
    state: State,
}

/// What later runs must know of a lab.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct State {
    parts: Parts,
    outside: Ipv4Addr,
}

/// A node of the lab.
#[derive(Clone, Copy, Debug)]
pub struct Node<'a> {
    lab: &'a Lab,
    number: u8,
}

/// The machine that the nodes are in.
#[derive(Clone, Copy, Debug)]
pub struct VmHandle<'a> {
    lab: &'a Lab,
}

/// The running lab with a whole cluster: the one that `LAB` names, or `lab`.
pub fn cluster() -> Result<&'static Lab> {
    static CLUSTER: OnceLock<Result<Lab, String>> = OnceLock::new();
    let lab = CLUSTER.get_or_init(|| Lab::attach().map_err(|error| format!("{error:#}")));
    lab.as_ref().map_err(|error| anyhow!(error.clone()))
}

/// The running control plane for tests that need no node: the lab that `LAB_API` names, or else [`cluster`].
pub fn api() -> Result<&'static Lab> {
    static API: OnceLock<Result<Lab, String>> = OnceLock::new();
    let lab = API.get_or_init(|| {
        let name = env::var("LAB_API").map_or_else(|_| default_name(), Ok);
        name.and_then(|name| Lab::named(&name)).map_err(|error| format!("{error:#}"))
    });
    lab.as_ref().map_err(|error| anyhow!(error.clone()))
}

/// Takes every lab of this clone down, and labs of others whose namespace is left.
pub fn down_all() -> Result<()> {
    let folders = fs::read_dir(paths::target().join("lab")).map(|entries| entries.flatten().collect());
    let folders: Vec<fs::DirEntry> = folders.unwrap_or_default();
    for name in folders.iter().filter_map(|entry| entry.file_name().into_string().ok()) {
        if paths::check_name(&name).is_ok() {
            Lab::remove(&name)?;
        }
    }
    Ok(())
}

impl Lab {
    /// Starts a lab and waits until it is ready. What is left of an earlier lab of that name is removed first.
    pub fn up(name: &str, parts: Parts) -> Result<Self> {
        paths::check_name(name)?;
        if !Uid::effective().is_root() {
            bail!("the lab needs root, for its network namespaces: run it by sudo -E");
        }
        setup::check()?;
        Self::remove(name)?;
        let folder = paths::lab(name);
        let started = Self::start(name, parts, &folder);
        started.with_context(|| {
            format!("the lab {name} did not start; all logs are in {}", folder.join("logs").display())
        })
    }

    /// The running lab that `LAB` names, or `lab`.
    pub fn attach() -> Result<Self> {
        Self::named(&default_name()?)
    }

    /// The running lab of that name.
    pub fn named(name: &str) -> Result<Self> {
        paths::check_name(name)?;
        let folder = paths::lab(name);
        let netns = lan::namespace(name);
        let state = fs::read(folder.join("state.json")).ok().filter(|_| netns.exists());
        let state = state.with_context(|| match name {
            DEFAULT => "no lab is running: make lab-up".to_owned(),
            _ => format!("no lab {name} is running: LAB={name} make lab-up"),
        })?;
        let state =
            serde_json::from_slice(&state).context("the lab's state.json is damaged: make lab-down")?;
        Ok(Self { name: name.to_owned(), folder, netns, state })
    }

    /// Ends it and removes everything but its logs.
    pub fn down(self) -> Result<()> {
        Self::remove(&self.name)
    }

    /// Removes the lab of that name, whatever is left of it. Fine when there is none.
    pub fn remove(name: &str) -> Result<()> {
        paths::check_name(name)?;
        lan::namespace(name).destroy()?;
        // Goes with the namespace, unless the namespace was never finished.
        let _ = command::words(&["ip", "link", "delete", &format!("vip-{name}")])?;
        let folder = paths::lab(name);
        for entry in
            fs::read_dir(&folder).map(|entries| entries.flatten().collect::<Vec<_>>()).unwrap_or_default()
        {
            let path = entry.path();
            match (entry.file_name() == "logs", path.is_dir()) {
                (true, _) => {}
                (_, true) => fs::remove_dir_all(&path)?,
                (_, false) => fs::remove_file(&path)?,
            }
        }
        Ok(())
    }

    fn start(name: &str, parts: Parts, folder: &Path) -> Result<Self> {
        let _ = fs::remove_dir_all(folder.join("logs"));
        for part in ["logs", "run", "shared/images"] {
            fs::create_dir_all(folder.join(part))
                .with_context(|| format!("can't make {}", folder.display()))?;
        }
        let clock = Instant::now();
        let say = |what: &str| println!("{:5.1} s  {what}", clock.elapsed().as_secs_f64());
        if parts.machine() {
            // The machine sees the host's files as of its boot, and outlives this build.
            fs::copy(program()?, folder.join("lab"))?;
        }
        let mut archives = Vec::new();
        if parts == Parts::Cluster {
            archives = image::lab_archives()?;
            archives.extend(Some(image::product_archive()).filter(|archive| archive.exists()));
        }
        let outside = lan::create(name)?;
        let lab = Self {
            name: name.into(),
            folder: folder.into(),
            netns: lan::namespace(name),
            state: State { parts, outside },
        };
        lab.control_plane().prepare(outside)?;
        if parts.machine() {
            lab.machine().start(parts == Parts::Cluster)?;
        }
        if parts == Parts::Cluster {
            let containerd = Daemon { netns: &lab.netns, folder, name: "containerd" };
            store::fill(&containerd, &folder.join("store"), &archives)?;
            // The machine sees this at once: that folder is not cached.
            fs::write(lab.shared_dir().join("store-is-filled"), "")?;
            say("the images are unpacked");
        }
        if parts.control_plane() {
            lab.control_plane().start()?;
            say("the control plane is ready");
        }
        if parts.machine() {
            lab.machine().wait_ready()?;
            say("the machine is booted");
        }
        fs::write(folder.join("state.json"), serde_json::to_vec_pretty(&lab.state)?)?;
        if parts == Parts::Cluster {
            lab.wait_nodes()?;
            say("three nodes are Ready");
        }
        Ok(lab)
    }

    fn wait_nodes(&self) -> Result<()> {
        command::until("three Ready nodes", Duration::from_secs(240), || {
            let nodes = self.kubectl(["get", "nodes", "-o", "json"])?.ok()?;
            let nodes: Value = serde_json::from_str(&nodes.stdout)?;
            let ready = |node: &&Value| {
                let conditions = node["status"]["conditions"].as_array();
                conditions.is_some_and(|all| {
                    all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
                })
            };
            let count = nodes["items"].as_array().map_or(0, |nodes| nodes.iter().filter(ready).count());
            if count < NODES.len() {
                bail!("{count} of {} nodes are Ready", NODES.len());
            }
            Ok(Some(()))
        })
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The network namespace that is the LAN: a program in it is a host beside the nodes, at 10.87.0.1 and fd87::1.
    pub fn netns(&self) -> &Netns {
        &self.netns
    }

    /// The administrator's kubeconfig; it works in any shell of this machine.
    pub fn kubeconfig(&self) -> PathBuf {
        self.control_plane().kubeconfig()
    }

    /// Where the logs of everything are.
    pub fn logs_dir(&self) -> PathBuf {
        self.folder.join("logs")
    }

    /// A folder that this machine and the virtual one see at the same path, both writing.
    pub fn shared_dir(&self) -> PathBuf {
        self.folder.join("shared")
    }

    /// A kubectl command to which arguments, environment and input may be added. It finds the plugin that was built.
    pub fn kubectl_command(&self) -> Result<Command> {
        let mut kubectl = kubectl()?;
        kubectl.env("KUBECONFIG", self.kubeconfig());
        Ok(kubectl)
    }

    /// Runs kubectl as the administrator, for a minute at most.
    pub fn kubectl<S: AsRef<OsStr>>(&self, arguments: impl IntoIterator<Item = S>) -> Result<Output> {
        self.kubectl_for(command::LIMIT, arguments)
    }

    /// Runs kubectl as the administrator with a time limit of the caller's.
    pub fn kubectl_for<S: AsRef<OsStr>>(
        &self,
        limit: Duration,
        arguments: impl IntoIterator<Item = S>,
    ) -> Result<Output> {
        command::run(self.kubectl_command()?.args(arguments), limit)
    }

    /// Applies a manifest given as YAML or JSON and wants success.
    pub fn apply(&self, manifest: &str) -> Result<Output> {
        // Tests run beside each other, and some apply the same.
        static COUNT: AtomicUsize = AtomicUsize::new(0);
        let one = format!("apply-{}-{}.yaml", process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let file = self.folder.join("run").join(one);
        fs::write(&file, manifest)?;
        let output = self.kubectl([OsStr::new("apply"), OsStr::new("-f"), file.as_os_str()]);
        fs::remove_file(&file)?;
        output?.ok()
    }

    /// A node, by its number 1 to 3; its name in Kubernetes is `node-1` and so on.
    pub fn node(&self, number: u8) -> Node<'_> {
        Node { lab: self, number }
    }

    /// All nodes.
    pub fn nodes(&self) -> impl Iterator<Item = Node<'_>> {
        NODES.into_iter().map(|number| self.node(number))
    }

    /// Asks all nodes at once: in an emulated machine each command takes long. The answers come in the nodes' order.
    pub fn each_node<T: Send>(&self, ask: impl Fn(Node<'_>) -> Result<T> + Sync) -> Result<Vec<T>> {
        let ask = &ask;
        thread::scope(|scope| {
            let asked: Vec<_> = self.nodes().map(|node| scope.spawn(move || ask(node))).collect();
            asked.into_iter().map(|one| one.join().map_err(|_| anyhow!("asking a node panicked"))?).collect()
        })
    }

    /// The machine that the nodes are in.
    pub fn vm(&self) -> VmHandle<'_> {
        VmHandle { lab: self }
    }

    /// A client on the LAN.
    pub fn client(&self) -> Client {
        Client::new(Some(self.netns.clone()))
    }

    /// Cuts a node's link to the LAN. The node's own network card keeps its carrier, as with a switch that fails.
    pub fn unplug(&self, node: u8) -> Result<()> {
        self.netns.ip(&format!("link set tap{node} down")).map(drop)
    }

    /// Joins a node's link to the LAN again.
    pub fn plug(&self, node: u8) -> Result<()> {
        self.netns.ip(&format!("link set tap{node} up")).map(drop)
    }

    /// Kills the API server and the controllers; every connection to it breaks.
    pub fn stop_apiserver(&self) -> Result<()> {
        self.control_plane().stop_apiserver()
    }

    /// Starts the API server again, waits until it is ready, and starts the controllers.
    pub fn start_apiserver(&self) -> Result<()> {
        self.control_plane().start_apiserver()
    }

    /// Freezes the API server: connections stay and nothing answers.
    pub fn pause_apiserver(&self) -> Result<()> {
        self.control_plane().signal_apiserver(Signal::SIGSTOP)
    }

    /// Lets a frozen API server go on.
    pub fn resume_apiserver(&self) -> Result<()> {
        self.control_plane().signal_apiserver(Signal::SIGCONT)
    }

    /// Kills kube-proxy on a node and waits until its successor has done its first round.
    pub fn restart_kube_proxy(&self, node: u8) -> Result<()> {
        self.node(node).exec("kill -9 $(cat /run/lab/kube-proxy.pid)")?.ok()?;
        thread::sleep(Duration::from_millis(300));
        self.wait_kube_proxy(node)
    }

    /// Has kube-proxy on every node start in another mode, `nftables` or `iptables`, for the time of some work.
    pub fn with_kube_proxy_in<T>(&self, mode: &str, work: impl FnOnce() -> Result<T>) -> Result<T> {
        let start = |mode: &str| {
            self.each_node(|node| {
                node.exec(&format!("echo {mode} > {PROXY_MODE}"))?.ok()?;
                self.restart_kube_proxy(node.number)
            })
        };
        let outcome = start(mode).and_then(|_| work());
        start("nftables")?;
        // Who has no iptables leaves its rules, and nobody else has any.
        self.each_node(|node| {
            node.exec(
                "nft list tables | grep -E ' ip6? (nat|filter|mangle)$' | while read -r table; do nft delete $table; done",
            )?
            .ok()
        })?;
        outcome
    }

    /// Waits until kube-proxy on a node says that its rules are in the kernel.
    pub fn wait_kube_proxy(&self, node: u8) -> Result<()> {
        // No curl: each process is slow in there.
        let ask = "exec 3<>/dev/tcp/127.0.0.1/10256 && printf 'GET /healthz HTTP/1.0\\r\\n\\r\\n' >&3 && read -r _ code _ <&3 \
                   && [ \"$code\" = 200 ]";
        command::until(&format!("kube-proxy on node-{node}"), Duration::from_secs(120), || {
            self.node(node).exec(ask)?.ok().map(Some)
        })?;
        Ok(())
    }

    /// The MAC addresses that answer ARP for an address, asked once and heard for `window`.
    pub fn arp_owner(&self, address: Ipv4Addr, window: Duration) -> Result<Vec<String>> {
        self.netns.run(|| arp::owners(BRIDGE, lan::GATEWAY, address, window))?
    }

    /// A host on the LAN that goes on asking who has an address.
    pub fn arp_watch(&self, address: Ipv4Addr) -> ArpWatch {
        ArpWatch::start(&self.netns, BRIDGE, lan::GATEWAY, address)
    }

    /// The number of the node whose network card has that MAC address.
    pub fn node_of_mac(&self, mac: &str) -> Option<u8> {
        NODES.into_iter().find(|node| guest::mac(*node) == mac)
    }

    /// Loads the product's image, or any archive, into every node of a running lab.
    pub fn load(&self, archive: &Path) -> Result<()> {
        let file = archive.file_name().context("an archive without a name")?;
        let shared = self.shared_dir().join("images").join(file);
        fs::copy(archive, &shared).with_context(|| format!("can't copy {}", archive.display()))?;
        for node in self.nodes() {
            node.exec(&format!("ctr -n k8s.io images import {}", shared.display()))?.ok()?;
        }
        Ok(())
    }

    fn control_plane(&self) -> ControlPlane<'_> {
        ControlPlane { netns: &self.netns, folder: &self.folder }
    }

    fn machine(&self) -> vm::Vm<'_> {
        vm::Vm { netns: &self.netns, folder: &self.folder }
    }
}

impl Node<'_> {
    /// Its number.
    pub fn number(&self) -> u8 {
        self.number
    }

    /// Its name in Kubernetes.
    pub fn name(&self) -> String {
        format!("node-{}", self.number)
    }

    /// Its address on the LAN.
    pub fn address(&self) -> Ipv4Addr {
        guest::address(self.number)
    }

    /// The MAC address of its network card.
    pub fn mac(&self) -> String {
        guest::mac(self.number)
    }

    /// The program `lab` as the node sees it.
    pub(crate) fn program(&self) -> PathBuf {
        self.lab.folder.join("lab")
    }

    /// Runs a shell command in the node's network, mount and host name namespaces, for a minute at most.
    pub fn exec(&self, command: &str) -> Result<Output> {
        self.exec_for(command, command::LIMIT)
    }

    /// The same for so long at most.
    pub fn exec_for(&self, command: &str, limit: Duration) -> Result<Output> {
        self.lab.machine().exec(Some(self.number), command, limit, |_, _| {})
    }

    /// One of our processes, by its word (`agent`, `vrrp`), or `kube-proxy`. All nodes share the machine's processes: it is the
    /// one in the node's network.
    pub fn process(&self, name: &str) -> Result<u32> {
        let find = "me=$(readlink /proc/self/ns/net); for p in $(pgrep -x 'vip-node|kube-proxy'); do \
                    [ \"$(readlink /proc/$p/ns/net)\" = \"$me\" ] && echo $p $(tr '\\0' ' ' < /proc/$p/cmdline); done; true";
        let text = self.exec(find)?.ok()?.stdout;
        let of_that_name =
            |line: &&str| line.split_whitespace().skip(1).take(2).any(|word| word.ends_with(name));
        let mut found = text.lines().filter(of_that_name);
        match (found.next().and_then(|line| line.split_whitespace().next()), found.next()) {
            (Some(process), None) => Ok(process.parse()?),
            _ => bail!("not one {name} on {}: {text}", self.name()),
        }
    }
}

impl VmHandle<'_> {
    /// Runs a shell command in the machine itself, for a minute at most.
    pub fn exec(&self, command: &str) -> Result<Output> {
        self.exec_for(command, command::LIMIT, |_, _| {})
    }

    /// Runs a shell command in the machine itself; `show` gets the output as it comes, true for standard error.
    pub fn exec_for(
        &self,
        command: &str,
        limit: Duration,
        show: impl FnMut(bool, &[u8]) + Send,
    ) -> Result<Output> {
        self.lab.machine().exec(None, command, limit, show)
    }
}

/// A kubectl command without a cluster. It finds the plugin that was built.
pub(crate) fn kubectl() -> Result<Command> {
    let mut kubectl = Command::new(binaries::path("kubectl")?);
    let path = env::var("PATH").unwrap_or_default();
    kubectl.env("PATH", format!("{}:{path}", paths::target().join("debug").display()));
    Ok(kubectl)
}

const DEFAULT: &str = "lab";

/// The name of the lab that is meant when none is given: `LAB`, or `lab`.
fn default_name() -> Result<String> {
    let name = env::var("LAB").unwrap_or_else(|_| DEFAULT.into());
    paths::check_name(&name)?;
    Ok(name)
}

/// The program `lab`, from itself or from a test beside it.
fn program() -> Result<PathBuf> {
    let own = env::current_exe()?;
    let name = own.file_name().unwrap_or_default().to_string_lossy();
    // A build meanwhile has replaced the file, and the kernel says so; the program that runs is still there.
    if name.trim_end_matches(" (deleted)") == "lab" {
        return Ok(PathBuf::from("/proc/self/exe"));
    }
    let beside = own.parent().and_then(Path::parent).map(|folder| folder.join("lab"));
    beside.filter(|path| path.exists()).context("the program lab is not built: cargo build -p lab")
}
