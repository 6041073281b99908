//! The control plane of a lab: etcd, API server, controller manager and scheduler, natively in the lab's namespace.

use std::{
    fs,
    net::Ipv4Addr,
    path::{Path, PathBuf},
    process::Command,
    time::Duration,
};

use anyhow::{Context, Result};
use nix::sys::signal::Signal;

use crate::{
    binaries,
    command::{self, Output},
    daemon::{Daemon, tail},
    guest::{NODES, address},
    lan::{GATEWAY, GATEWAY6},
    netns::Netns,
    pki::Authority,
};

const READY: Duration = Duration::from_secs(60);

/// The control plane of the lab in a folder.
pub(crate) struct ControlPlane<'a> {
    pub(crate) netns: &'a Netns,
    pub(crate) folder: &'a Path,
}

impl ControlPlane<'_> {
    /// Writes certificates and kubeconfigs. `outside` is where this machine reaches the API server.
    pub(crate) fn prepare(&self, outside: Ipv4Addr) -> Result<()> {
        let pki = self.pki();
        let authority = Authority::create(&pki)?;
        authority.write_token_keys()?;
        let names = [
            GATEWAY.to_string(),
            GATEWAY6.to_string(),
            outside.to_string(),
            "127.0.0.1".into(),
            "10.96.0.1".into(),
            "fd96::1".into(),
        ];
        let dns = ["localhost", "kubernetes", "kubernetes.default", "kubernetes.default.svc"];
        let names: Vec<String> = names.into_iter().chain(dns.map(str::to_owned)).collect();
        authority.write("server", &authority.sign("kube-apiserver", None, &names)?)?;
        let masters = Some("system:masters");
        authority.write("kubelet-client", &authority.sign("apiserver-kubelet-client", masters, &[])?)?;

        let inside = format!("https://{GATEWAY}:6443");
        let write = |file: PathBuf, server: &str, user: &str, group: Option<&str>, names: &[String]| {
            let identity = authority.sign(user, group, names)?;
            fs::write(&file, authority.kubeconfig(server, &identity).to_string())
                .with_context(|| format!("can't write {}", file.display()))
        };
        write(self.kubeconfig(), &format!("https://{outside}:6443"), "admin", masters, &[])?;
        for program in ["kube-controller-manager", "kube-scheduler"] {
            write(pki.join(format!("{program}.conf")), &inside, &format!("system:{program}"), None, &[])?;
        }
        for node in NODES {
            let name = format!("node-{node}");
            let names = [name.clone(), address(node).to_string()];
            let user = format!("system:node:{name}");
            write(pki.join(format!("{name}.conf")), &inside, &user, Some("system:nodes"), &names)?;
            // A kube-proxy usually has a ServiceAccount; here it has a name, and the role that comes with Kubernetes.
            write(pki.join(format!("{name}-proxy.conf")), &inside, "system:kube-proxy", None, &[])?;
        }
        Ok(())
    }

    /// Starts everything and waits until the API server is ready.
    pub(crate) fn start(&self) -> Result<()> {
        let mut etcd = yielding("etcd")?;
        etcd.arg("--data-dir").arg(self.folder.join("etcd")).args([
            "--unsafe-no-fsync",
            "--log-level",
            "warn",
        ]);
        etcd.args(["--listen-client-urls", ETCD, "--advertise-client-urls", ETCD]);
        etcd.args(["--listen-peer-urls", "http://127.0.0.1:2380"]);
        self.daemon("etcd").start(&mut etcd)?;
        self.start_apiserver()
    }

    /// Starts the API server, waits until it is ready, and starts what depends on it.
    pub(crate) fn start_apiserver(&self) -> Result<()> {
        let pki = |file: &str| self.pki().join(file).display().to_string();
        let mut server = yielding("kube-apiserver")?;
        for (flag, value) in [
            ("etcd-servers", ETCD.to_owned()),
            ("advertise-address", GATEWAY.to_string()),
            ("bind-address", "::".to_owned()),
            ("secure-port", "6443".to_owned()),
            ("client-ca-file", pki("ca.crt")),
            ("tls-cert-file", pki("server.crt")),
            ("tls-private-key-file", pki("server.key")),
            ("service-account-key-file", pki("sa.pub")),
            ("service-account-signing-key-file", pki("sa.key")),
            ("service-account-issuer", "https://kubernetes.default.svc".to_owned()),
            ("service-cluster-ip-range", "10.96.0.0/16,fd96::/112".to_owned()),
            ("authorization-mode", "Node,RBAC".to_owned()),
            ("enable-admission-plugins", "NodeRestriction".to_owned()),
            ("allow-privileged", "true".to_owned()),
            ("kubelet-preferred-address-types", "InternalIP".to_owned()),
            ("kubelet-client-certificate", pki("kubelet-client.crt")),
            ("kubelet-client-key", pki("kubelet-client.key")),
        ] {
            server.arg(format!("--{flag}={value}"));
        }
        self.daemon("kube-apiserver").start(&mut server)?;
        self.wait_ready().with_context(|| {
            let log = self.daemon("kube-apiserver").log();
            format!("the API server does not start; the end of {}:\n{}", log.display(), tail(&log, 5))
        })?;
        self.start_controllers()
    }

    fn start_controllers(&self) -> Result<()> {
        let pki = self.pki();
        for program in CONTROLLERS {
            let mut command = yielding(program)?;
            for flag in ["--kubeconfig", "--authentication-kubeconfig", "--authorization-kubeconfig"] {
                command.arg(flag).arg(pki.join(format!("{program}.conf")));
            }
            command.arg("--leader-elect=false");
            if program == "kube-controller-manager" {
                command.arg("--service-account-private-key-file").arg(pki.join("sa.key"));
                command.arg("--root-ca-file").arg(pki.join("ca.crt"));
                command.args(["--use-service-account-credentials", "--allocate-node-cidrs=false"]);
                // Half of what is usual: an emulated kubelet may be late by some seconds, and tests take the API server away for
                // thirty to have its node given up.
                command.args(["--node-monitor-period", "1s", "--node-monitor-grace-period", "25s"]);
            }
            self.daemon(program).start(&mut command)?;
        }
        Ok(())
    }

    /// Waits until the API server says that it is ready.
    pub(crate) fn wait_ready(&self) -> Result<()> {
        command::until("the API server's readiness", READY, || {
            if self.daemon("kube-apiserver").pid().is_none() {
                anyhow::bail!("it has ended");
            }
            self.kubectl(&["get", "--raw", "/readyz"])?.ok().map(Some)
        })?;
        Ok(())
    }

    /// Kills the API server: its connections break at once. The controllers go with it, for after a minute without an API
    /// server they take another one until they look again.
    pub(crate) fn stop_apiserver(&self) -> Result<()> {
        for program in CONTROLLERS {
            self.daemon(program).kill()?;
        }
        self.daemon("kube-apiserver").kill()
    }

    /// Sends a signal to the API server.
    pub(crate) fn signal_apiserver(&self, signal: Signal) -> Result<()> {
        self.daemon("kube-apiserver").signal(signal)
    }

    /// Runs kubectl with the administrator's kubeconfig.
    pub(crate) fn kubectl(&self, arguments: &[&str]) -> Result<Output> {
        let mut kubectl = Command::new(binaries::path("kubectl")?);
        command::run(kubectl.env("KUBECONFIG", self.kubeconfig()).args(arguments), command::LIMIT)
    }

    /// The administrator's kubeconfig, for this machine's shells.
    pub(crate) fn kubeconfig(&self) -> PathBuf {
        self.folder.join("kubeconfig")
    }

    fn pki(&self) -> PathBuf {
        self.folder.join("pki")
    }

    fn daemon<'a>(&'a self, name: &'a str) -> Daemon<'a> {
        Daemon { netns: self.netns, folder: self.folder, name }
    }
}

/// A program that leaves the processors to the nodes where both want them: elsewhere they have their own. An API server that goes on after
/// a while has all its clients to answer at once.
fn yielding(program: &str) -> Result<Command> {
    let mut nice = Command::new("nice");
    nice.args(["-n", "5"]).arg(binaries::path(program)?);
    Ok(nice)
}

/// What works only beside the API server.
const CONTROLLERS: [&str; 2] = ["kube-controller-manager", "kube-scheduler"];
const ETCD: &str = "http://127.0.0.1:2379";
