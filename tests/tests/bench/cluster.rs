//! What needs a cluster: what the product takes of a node, and what clients notice of its agents' ends.

#[path = "cluster/ends.rs"]
mod ends;
#[path = "cluster/flushes.rs"]
mod flushes;
#[path = "cluster/footprint.rs"]
mod footprint;

use std::time::Duration;

use anyhow::Result;
use lab::{Lab, Parts, product, workload::Workload};

pub use flushes::{WATCH, watch};

const NAMESPACE: &str = "bench";
/// How long anything may take.
const SOON: Duration = Duration::from_secs(60);

/// Measures in a lab of its own.
pub fn measure() -> Result<()> {
    footprint::size()?;
    product::in_lab("bench", Parts::Cluster, within)
}

fn within(lab: &Lab) -> Result<()> {
    let web = Workload::deploy(lab, NAMESPACE, "web", 3)?;
    lab.kubectl_for(Duration::from_secs(300), ["vip", "install", "--pool", "lab=10.87.2.50-10.87.2.199"])?
        .ok()?;
    lab.kubectl(["vip", "expose", "svc/web", "-n", NAMESPACE])?.ok()?;
    footprint::memory(lab)?;
    ends::killed(lab, &web)?;
    ends::rolled(lab)?;
    flushes::flushed(lab)
}

/// Exposes several Services and waits until each has an owner.
fn expose(lab: &Lab, services: impl Iterator<Item = String>) -> Result<()> {
    let mut words: Vec<String> =
        ["vip", "expose", "-n", NAMESPACE, "--timeout", "280s"].map(str::to_owned).into();
    words.extend(services.map(|service| format!("svc/{service}")));
    lab.kubectl_for(Duration::from_secs(300), &words)?.ok().map(drop)
}
