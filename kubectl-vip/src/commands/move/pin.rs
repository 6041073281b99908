//! Pins: the node that a virtual IP prefers, set, taken away, and waited for.

use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{ListParams, Patch, PatchParams};
use serde_json::json;
use vip_core::api::{PLUGIN_MANAGER, VirtualIP};

use crate::cli::DryRun;
use crate::cluster::Cluster;
use crate::exit::{Failure, Result};
use crate::fitness;
use crate::wait::{self, Ended, Look};

/// Makes one virtual IP prefer a node, or none.
pub async fn set(
    cluster: &Cluster,
    vip: &VirtualIP,
    node: Option<&str>,
    dry_run: DryRun,
) -> Result<VirtualIP> {
    if dry_run == DryRun::Client {
        let mut vip = vip.clone();
        vip.spec.preferred_node = node.map(str::to_owned);
        return Ok(vip);
    }
    let params = PatchParams {
        dry_run: dry_run == DryRun::Server,
        field_manager: Some(PLUGIN_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patch = json!({"spec": {"preferredNode": node}});
    Ok(cluster.vips().patch(&vip.name_any(), &params, &Patch::Merge(patch)).await?)
}

/// Asks the API server beforehand whether all of these may be written: what moves together is pinned whole or not at all.
pub async fn rehearse(cluster: &Cluster, vips: &[&VirtualIP], node: Option<&str>) -> Result<()> {
    for vip in vips {
        set(cluster, vip, node, DryRun::Server).await?;
    }
    Ok(())
}

/// Waits until the node owns all of these; else the last reason why it does not.
pub async fn arrived(
    cluster: &Cluster,
    vips: &[&VirtualIP],
    node: &str,
    timeout: Duration,
) -> Result<Ended<()>> {
    let addresses: Vec<&str> = vips.iter().map(|vip| vip.spec.address.as_str()).collect();
    let what = format!("{} to move to {node}", addresses.join(", "));
    wait::until(&what, timeout, async || {
        let everything = ListParams::default();
        let (api, nodes) = (cluster.vips(), cluster.nodes());
        let (now_there, target) = futures::join!(api.list(&everything), nodes.get_opt(node));
        let now_there = now_there?.items;
        let mut missing = Vec::new();
        for vip in vips {
            let found = now_there.iter().find(|other| other.name_any() == vip.name_any());
            let found = found.ok_or_else(|| {
                Failure::new(format!("virtual IP {} was deleted meanwhile", vip.spec.address))
            })?;
            match owner(found) {
                Some(owner) if owner == node => {}
                Some(owner) => missing.push(format!("{} is still on {owner}", vip.spec.address)),
                None => missing.push(format!("{} has no owner", vip.spec.address)),
            }
        }
        if missing.is_empty() {
            return Ok(Look::Done(()));
        }
        // Why the node does not come forward is worth knowing, but not worth failing for.
        let target = target.ok().flatten().and_then(|target| fitness::unready(&target, Timestamp::now()));
        missing.extend(target.map(|unfit| unfit.why));
        Ok(Look::NotYet(missing.join(", ")))
    })
    .await
}

/// The node that owns a virtual IP by its status.
pub fn owner(vip: &VirtualIP) -> Option<&str> {
    vip.status.as_ref()?.node.as_deref()
}
