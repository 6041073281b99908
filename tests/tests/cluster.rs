//! The cluster tier: the product installed in a real three-node cluster, and what its users rely on. The tests share
//! one lab and cut its links, so they run one after another.

#[path = "cluster/failover.rs"]
mod failover;
#[path = "cluster/install.rs"]
mod install;
#[path = "cluster/lab.rs"]
mod lab_itself;
#[path = "cluster/neighbours.rs"]
mod neighbours;
#[path = "cluster/traffic.rs"]
mod traffic;

use std::{net::Ipv4Addr, time::Duration};

use anyhow::Result;
use lab::{
    Lab,
    product::{self, Owner},
    workload::Workload,
};

/// The pool of these tests.
const POOL: &str = "lab=10.87.2.0/24";

/// The lab with the product installed, if need be.
fn installed() -> Result<&'static Lab> {
    let lab = lab::cluster()?;
    let there = lab.kubectl(["get", "daemonset", "vip-node", "-n", "kubectl-vip"])?.success();
    if !there {
        lab.kubectl_for(Duration::from_secs(300), ["vip", "install", "--pool", POOL])?.ok()?;
    }
    Ok(lab)
}

/// A Service with three pods, one on each node, and its virtual IP with an owner.
struct Exposed {
    web: Workload<'static>,
    vip: Ipv4Addr,
    owner: Owner,
}

impl Exposed {
    fn new(lab: &'static Lab, namespace: &str) -> Result<Self> {
        let web = Workload::deploy(lab, namespace, "web", 3)?;
        lab.kubectl(["vip", "expose", "svc/web", "-n", namespace])?.ok()?;
        let vip = product::address_of(lab, namespace, "web")?;
        let owner = product::wait_one_owner(lab, vip, Duration::from_secs(20))?;
        product::wait_backends(lab, vip, 3, Duration::from_secs(20))?;
        Ok(Self { web, vip, owner })
    }

    fn url(&self) -> String {
        format!("http://{}/hostname", self.vip)
    }

    fn remove(self, lab: &Lab) -> Result<()> {
        lab.kubectl(["delete", "virtualip", &self.vip.to_string()])?.ok()?;
        self.web.remove()
    }
}

/// Runs a test body; when it fails, the agents' logs are saved and the folder of all logs is named.
fn check(body: impl FnOnce() -> Result<()>) {
    if let Err(error) = body() {
        let mut folder = String::new();
        if let Ok(lab) = lab::cluster() {
            product::collect_logs(lab);
            folder = format!("\nall logs: {}", lab.logs_dir().display());
        }
        panic!("{error:#}{folder}");
    }
}
