//! What needs a cluster: what the product takes of a node, and what clients notice of its agents' ends.

#[path = "cluster/ends.rs"]
mod ends;
#[path = "cluster/flushes.rs"]
mod flushes;
#[path = "cluster/footprint.rs"]
mod footprint;
#[path = "cluster/scale.rs"]
mod scale;

use std::{env, fs, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Context, Result};
use lab::{Lab, Node, Parts, product, workload::Workload};

pub use scale::{CHANGE, change};

const NAMESPACE: &str = "bench";
/// After the last change, before memory is looked at.
const SETTLE: Duration = Duration::from_secs(20);
/// Where programs and words to them are on a node.
const PLACE: &str = "/run/lab";
/// How long anything may take.
const SOON: Duration = Duration::from_secs(60);

/// Measures in a lab of its own.
pub fn measure() -> Result<()> {
    footprint::size()?;
    product::in_lab("bench", Parts::Cluster, within)
}

/// The same, of flushes alone.
pub fn flushes() -> Result<()> {
    product::in_lab("bench", Parts::Cluster, |lab| installed(lab).and_then(|_| flushes::flushed(lab)))
}

/// Three pods, and the product with a pool.
fn installed(lab: &Lab) -> Result<Workload<'_>> {
    let web = Workload::deploy(lab, NAMESPACE, "web", 3)?;
    lab.kubectl_for(Duration::from_secs(300), ["vip", "install", "--pool", "lab=10.87.2.50-10.87.2.199"])?
        .ok()?;
    Ok(web)
}

fn within(lab: &Lab) -> Result<()> {
    let web = installed(lab)?;
    lab.kubectl(["vip", "expose", "svc/web", "-n", NAMESPACE])?.ok()?;
    let owner = product::wait_one_owner(lab, product::address_of::<Ipv4Addr>(lab, NAMESPACE, "web")?, SOON)?;
    thread::sleep(SETTLE);
    println!("resident memory with one virtual IP, MiB:");
    for node in lab.nodes() {
        footprint::memory(&node, if node.number() == owner.number { "owner" } else { "standby" })?;
    }
    ends::killed(lab, &web)?;
    ends::rolled(lab)?;
    scale::measure(lab)
}

/// Puts this program on a node, where it runs its other half.
fn bring(lab: &Lab, node: &Node<'_>) -> Result<()> {
    let program = lab.shared_dir().join("bench");
    fs::copy(env::current_exe()?, &program).context("can't copy the program into the machine")?;
    node.exec(&format!("cp {} {PLACE}/bench", program.display()))?.ok().map(drop)
}

/// Exposes several Services and waits until each has an owner.
fn expose(lab: &Lab, services: impl Iterator<Item = String>) -> Result<()> {
    let mut words: Vec<String> =
        ["vip", "expose", "-n", NAMESPACE, "--timeout", "280s"].map(str::to_owned).into();
    words.extend(services.map(|service| format!("svc/{service}")));
    lab.kubectl_for(Duration::from_secs(300), &words)?.ok().map(drop)
}
