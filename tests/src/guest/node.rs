//! One node: containerd, kubelet and kube-proxy in a network, mount and host name namespace of their own. Whatever of
//! them ends is started again, as a service manager would.

use std::{
    fs::{self, File},
    os::unix::{fs::symlink, net::UnixStream},
    path::Path,
    process::{Child, Command, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    mount::{MntFlags, MsFlags, mount, umount2},
    sched::{CloneFlags, unshare},
    unistd::sethostname,
};
use serde_json::json;

use super::{address, address6, pod_networks, sysctl};
use crate::{binaries, command, image, netns::Netns, store};

const SOCKET: &str = "/run/containerd/containerd.sock";

/// Has the mode in which kube-proxy starts.
pub(crate) const PROXY_MODE: &str = "/run/lab/proxy-mode";

/// For Go under emulation: there is plenty of memory, and collecting garbage costs; nine programs on two processors gain nothing from
/// threads of their own that look for work, and a signal to a thread that has run for ten milliseconds is no exception here.
pub(crate) const FRUGAL: [(&str, &str); 3] =
    [("GOGC", "400"), ("GOMAXPROCS", "1"), ("GODEBUG", "asyncpreemptoff=1")];

/// Starts a kube-proxy in the mode that the file says. In nftables mode it has no iptables, and so no rules of a former mode to
/// look for, by dozens of slow processes. It still flushes IPVS.
const PROXY: &str = r#"read -r mode < "$0"
[ "$mode" = nftables ] || PATH=$PATH:/usr/sbin
exec "$@" --proxy-mode "$mode""#;

/// Becomes the node and never ends.
pub(super) fn run(folder: &Path, number: u8) -> Result<()> {
    let name = format!("node-{number}");
    Netns::named(format!("n{number}")).enter()?;
    unshare(CloneFlags::CLONE_NEWNS | CloneFlags::CLONE_NEWUTS)?;
    sethostname(&name)?;
    mounts().context("can't mount the node's file systems")?;
    sysctl("net/ipv4/ip_forward", "1")?;
    sysctl("net/ipv6/conf/all/forwarding", "1")?;
    configure(folder, number, &name)?;
    store::link(&folder.join("store"), &folder.join("shared/store-is-filled"))?;

    let logs = folder.join("logs");
    let kubeconfig = folder.join("pki").join(format!("{name}.conf"));
    let mut containerd = Command::new("containerd");
    containerd.args(["--config", "/run/lab/containerd.toml"]);
    let mut kubelet = Command::new(binaries::path("kubelet")?);
    kubelet.args(["--config", "/run/lab/kubelet.json", "--root-dir", "/var/lib/kubelet"]);
    kubelet.args(["--hostname-override", &name, "--kubeconfig"]).arg(&kubeconfig);
    kubelet.arg(format!("--node-ip={},{}", address(number), address6(number)));
    // Each counts the machine's processes, those of all nodes.
    kubelet.args(["--housekeeping-interval", "60s"]);
    let proxy_kubeconfig = folder.join("pki").join(format!("{name}-proxy.conf"));
    let tools = Path::new("/run/lab/bin");
    for tool in ["nft", "modprobe"] {
        symlink(Path::new("/usr/sbin").join(tool), tools.join(tool))?;
    }
    fs::write(PROXY_MODE, "nftables\n")?;
    let mut proxy = Command::new("/bin/sh");
    proxy.args(["-c", PROXY, PROXY_MODE]).arg(binaries::path("kube-proxy")?);
    proxy.args(["--hostname-override", &name, "--kubeconfig"]).arg(&proxy_kubeconfig);
    proxy.args(["--cluster-cidr", "10.244.0.0/16,fd10:244::/32", "--iptables-localhost-nodeports=false"]);
    proxy.args(["--healthz-bind-address", "127.0.0.1:10256", "--metrics-bind-address", "127.0.0.1:10249"]);
    proxy.env("PATH", tools);
    proxy.args(["--conntrack-max-per-core", "0", "--conntrack-tcp-timeout-established", "0"]);
    proxy.args(["--conntrack-tcp-timeout-close-wait", "0"]);

    let mut units = vec![Unit::start("containerd", containerd, &logs, &name)?];
    command::until("containerd", Duration::from_secs(60), || Ok(UnixStream::connect(SOCKET).ok()))?;
    units.push(Unit::start("kubelet", kubelet, &logs, &name)?);
    units.push(Unit::start("kube-proxy", proxy, &logs, &name)?);
    println!("{name} is started");
    loop {
        for unit in &mut units {
            unit.keep()?;
        }
        thread::sleep(Duration::from_millis(100));
    }
}

/// A program of the node. Its process is noted in `/run/lab/NAME.pid`.
struct Unit {
    name: &'static str,
    command: Command,
    child: Child,
    started: Instant,
}

impl Unit {
    fn start(name: &'static str, mut command: Command, logs: &Path, node: &str) -> Result<Self> {
        let log = File::options().create(true).append(true).open(logs.join(format!("{node}-{name}.log")))?;
        command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).envs(FRUGAL);
        let child = command::spawn(&mut command)?;
        let this = Self { name, command, child, started: Instant::now() };
        this.note()?;
        Ok(this)
    }

    /// Starts it again when it has ended, at most once in a second.
    fn keep(&mut self) -> Result<()> {
        if self.started.elapsed() > Duration::from_secs(1) && self.child.try_wait()?.is_some() {
            self.child = command::spawn(&mut self.command)?;
            self.started = Instant::now();
            self.note()?;
        }
        Ok(())
    }

    fn note(&self) -> Result<()> {
        fs::write(format!("/run/lab/{}.pid", self.name), self.child.id().to_string())?;
        Ok(())
    }
}

/// A node's own /run, /var/lib, /var/log and /etc, and a /sys that shows its network namespace.
fn mounts() -> Result<()> {
    const NONE: Option<&str> = None;
    mount(NONE, "/", NONE, MsFlags::MS_REC | MsFlags::MS_PRIVATE, NONE)?;
    umount2("/sys", MntFlags::MNT_DETACH)?;
    mount(Some("sysfs"), "/sys", Some("sysfs"), MsFlags::empty(), NONE)?;
    mount(Some("cgroup2"), "/sys/fs/cgroup", Some("cgroup2"), MsFlags::empty(), NONE)?;
    for folder in ["/run", "/var/lib", "/var/log", "/etc/cni"] {
        fs::create_dir_all(folder)?;
        mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), NONE)?;
        mount(NONE, folder, NONE, MsFlags::MS_SHARED, NONE)?;
    }
    for folder in [
        "/run/lab/bin",
        "/run/netns",
        "/var/lib/kubelet",
        "/var/lib/cni",
        "/var/lib/containerd",
        "/var/log/pods",
        "/var/log/containers",
        "/etc/cni/net.d",
    ] {
        fs::create_dir_all(folder).with_context(|| format!("can't make {folder}"))?;
    }
    Ok(())
}

fn configure(folder: &Path, number: u8, name: &str) -> Result<()> {
    let (pods, pods6) = pod_networks(number);
    let cni = json!({"cniVersion": "1.0.0", "name": "lab", "plugins": [{
        "type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": false,
        // As every network plugin has it: a pod may be its own Service's answer.
        "hairpinMode": true,
        "ipam": {
            "type": "host-local",
            "ranges": [[{"subnet": pods}], [{"subnet": pods6}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}],
        },
    }]});
    fs::write("/etc/cni/net.d/10-lab.conflist", cni.to_string())?;
    fs::create_dir_all(format!("/sys/fs/cgroup/{name}"))?;
    let kubelet = json!({
        "apiVersion": "kubelet.config.k8s.io/v1beta1",
        "kind": "KubeletConfiguration",
        "containerRuntimeEndpoint": format!("unix://{SOCKET}"),
        "cgroupDriver": "cgroupfs",
        "cgroupRoot": format!("/{name}"),
        "failSwapOn": false,
        "makeIPTablesUtilChains": false,
        "enforceNodeAllocatable": ["pods"],
        "authentication": {
            "anonymous": {"enabled": false},
            "x509": {"clientCAFile": folder.join("pki/ca.crt")},
            "webhook": {"enabled": true},
        },
        "authorization": {"mode": "Webhook"},
        "resolvConf": "",
        // Without thresholds nothing is measured for them.
        "evictionHard": {"memory.available": "0%", "nodefs.available": "0%", "imagefs.available": "0%"},
        "nodeStatusUpdateFrequency": "4s",
        "localStorageCapacityIsolation": false,
    });
    fs::write("/run/lab/kubelet.json", kubelet.to_string())?;
    let containerd = format!(
        r#"version = 2
[timeouts]
  "io.containerd.timeout.shim.cleanup" = "60s"
  "io.containerd.timeout.shim.load" = "60s"
  "io.containerd.timeout.shim.shutdown" = "30s"
  "io.containerd.timeout.task.state" = "30s"
[plugins."io.containerd.grpc.v1.cri"]
  sandbox_image = "{pause}"
  disable_tcp_service = true
  stream_server_address = "127.0.0.1"
[plugins."io.containerd.grpc.v1.cri".cni]
  bin_dir = "/usr/lib/cni"
  conf_dir = "/etc/cni/net.d"
[plugins."io.containerd.grpc.v1.cri".containerd.runtimes.runc]
  runtime_type = "io.containerd.runc.v2"
"#,
        pause = image::PAUSE
    );
    fs::write("/run/lab/containerd.toml", containerd)?;
    Ok(())
}
