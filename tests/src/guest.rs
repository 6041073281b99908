//! What runs inside the machine: prepares its kernel, makes a network namespace for each node, starts the nodes, and
//! serves commands. With `LAB_VM=no` the same runs in namespaces of this machine.

mod init;
mod node;

use std::{
    collections::BTreeMap,
    env, fs,
    net::{Ipv4Addr, Ipv6Addr, TcpListener},
    path::{Path, PathBuf},
    process::{Command, id},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::Duration,
};

use anyhow::{Context, Result};

pub(crate) use node::{FRUGAL, PROXY_MODE};

use crate::{
    command::{self, ip, words},
    exec,
    lan::{BRIDGE, MACHINE},
    netns::Netns,
};

/// The port at which commands are served.
pub(crate) const PORT: u16 = 9000;
/// The numbers of the nodes.
pub const NODES: [u8; 3] = [1, 2, 3];

const MODULES: &str = "virtio_net ip_vs ip_vs_rr ip_vs_wrr ip_vs_lc ip_vs_wlc ip_vs_sh ip_vs_mh veth bridge br_netfilter \
                       overlay nf_tables nf_conntrack nft_masq nft_chain_nat nft_ct dummy ipip sch_netem";

/// What to start.
#[derive(Clone, Debug, clap::Args)]
pub struct Guest {
    /// The lab's folder.
    #[arg(long)]
    folder: PathBuf,
    /// Start the nodes too.
    #[arg(long)]
    nodes: bool,
    /// On the kernel of the machine that runs the lab: it gets no modules and keeps its cgroups.
    #[arg(long)]
    own_kernel: bool,
}

/// One node.
#[derive(Clone, Debug, clap::Args)]
pub struct GuestNode {
    /// The lab's folder.
    #[arg(long)]
    folder: PathBuf,
    /// The node's number.
    number: u8,
}

/// The address of a node.
pub fn address(node: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 87, 0, 10 + node)
}

/// The IPv6 address of a node.
pub fn address6(node: u8) -> Ipv6Addr {
    Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(node))
}

/// The pods' network of a node, IPv4 and IPv6.
pub fn pod_networks(node: u8) -> (String, String) {
    (format!("10.244.{node}.0/24"), format!("fd10:244:{node}::/64"))
}

/// The MAC address of the machine's n-th network card.
pub(crate) fn mac(card: u8) -> String {
    format!("52:54:00:00:00:{:02x}", card + 1)
}

/// Runs until it is killed.
pub fn run(options: &Guest) -> Result<()> {
    if options.own_kernel {
        own_cgroup()?;
        ip(&format!("address add {MACHINE}/16 dev {BRIDGE}"))?;
        words(&["mount", "-t", "tmpfs", "none", "/run"])?.ok()?;
    } else {
        let mut modprobe = Command::new("modprobe");
        command::run(modprobe.arg("-a").args(MODULES.split_whitespace()), command::LIMIT)?.ok()?;
        let card = card(0)?;
        ip("link set lo up")?;
        ip(&format!("address add {MACHINE}/16 dev {card}"))?;
        ip(&format!("link set {card} up"))?;
    }
    let nodes = Arc::new(Mutex::new(BTreeMap::new()));
    let listener = TcpListener::bind((MACHINE, PORT)).context("can't listen for commands")?;
    if options.nodes {
        let nodes = Arc::clone(&nodes);
        let options = options.clone();
        thread::spawn(move || {
            if let Err(error) = start_nodes(&options, &nodes) {
                eprintln!("the nodes can't be started: {error:#}");
            }
        });
    }
    println!("serving commands at {MACHINE}:{PORT}");
    exec::serve(&listener, &nodes)
}

/// The first process of the machine: prepares it and runs [`run`] in a child.
pub fn run_init(arguments: &[String]) -> Result<()> {
    init::run(arguments)
}

/// Runs one node until it is killed.
pub fn run_node(options: &GuestNode) -> Result<()> {
    node::run(&options.folder, options.number)
}

fn start_nodes(options: &Guest, nodes: &Mutex<BTreeMap<u8, u32>>) -> Result<()> {
    for (key, value) in [("fs/inotify/max_user_instances", "8192"), ("fs/inotify/max_user_watches", "524288")]
    {
        sysctl(key, value)?;
    }
    sysctl("net/ipv4/ip_forward", "1")?;
    delegate(Path::new("/sys/fs/cgroup"))?;
    let program = env::current_exe()?;
    for number in NODES {
        network(number, options.own_kernel)?;
        let mut node = Command::new(&program);
        node.args(["guest-node", "--folder"]).arg(&options.folder).arg(number.to_string());
        let child = command::spawn(&mut node)?;
        nodes.lock().unwrap_or_else(PoisonError::into_inner).insert(number, child.id());
    }
    Ok(())
}

/// The namespace of a node with its network card, addresses and the routes to the other nodes' pods.
fn network(number: u8, own_kernel: bool) -> Result<()> {
    let netns = Netns::create(format!("n{number}"))?;
    if own_kernel {
        ip(&format!("link add tap{number} type veth peer name eth0 netns n{number}"))?;
        ip(&format!("link set tap{number} master {BRIDGE} up"))?;
    } else {
        ip(&format!("link set {} netns n{number} name eth0", card(number)?))?;
    }
    let mut lines = vec![
        "link set eth0 up".to_owned(),
        format!("address add {}/16 dev eth0", address(number)),
        format!("address add {}/64 dev eth0 nodad", address6(number)),
        "route add default via 10.87.0.1".to_owned(),
        "-6 route add default via fd87::1".to_owned(),
    ];
    for other in NODES.into_iter().filter(|other| *other != number) {
        let (pods, pods6) = pod_networks(other);
        lines.push(format!("route add {pods} via {}", address(other)));
        lines.push(format!("-6 route add {pods6} via {}", address6(other)));
    }
    for line in lines {
        netns.ip(&line)?;
    }
    Ok(())
}

/// Takes the processes out of a cgroup's root and switches all controllers on below it: kubelet insists on all of them.
fn delegate(root: &Path) -> Result<()> {
    let rest = root.join("rest");
    fs::create_dir_all(&rest)?;
    // The shell that started us may fork meanwhile.
    for _ in 0..5 {
        for pid in fs::read_to_string(root.join("cgroup.procs"))?.lines() {
            let _ = fs::write(rest.join("cgroup.procs"), pid);
        }
    }
    for controller in fs::read_to_string(root.join("cgroup.controllers"))?.split_whitespace() {
        fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"))
            .with_context(|| format!("can't switch the cgroup controller {controller} on"))?;
    }
    Ok(())
}

/// On the machine's own kernel: a cgroup for the lab, seen as the root by a mount of its own.
fn own_cgroup() -> Result<()> {
    let root = Path::new("/sys/fs/cgroup");
    for controller in fs::read_to_string(root.join("cgroup.controllers"))?.split_whitespace() {
        let _ = fs::write(root.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    let own = root.join(format!("kubectl-vip-lab-{}", id()));
    fs::create_dir_all(&own)?;
    fs::write(own.join("cgroup.procs"), "0")?;
    nix::sched::unshare(nix::sched::CloneFlags::CLONE_NEWCGROUP)?;
    words(&["mount", "-t", "cgroup2", "none", "/sys/fs/cgroup"])?.ok()?;
    Ok(())
}

/// The name of the network card with the n-th MAC address.
fn card(number: u8) -> Result<String> {
    command::until("the machine's network cards", Duration::from_secs(10), || {
        let entries = fs::read_dir("/sys/class/net")?.flatten();
        let mut found = entries.filter(|entry| {
            fs::read_to_string(entry.path().join("address"))
                .is_ok_and(|address| address.trim() == mac(number))
        });
        Ok(found.next().and_then(|entry| entry.file_name().into_string().ok()))
    })
}

fn sysctl(key: &str, value: &str) -> Result<()> {
    fs::write(Path::new("/proc/sys").join(key), value).with_context(|| format!("can't set {key}"))
}
