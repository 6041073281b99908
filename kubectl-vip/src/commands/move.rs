//! `move`: makes virtual IPs prefer a node, which takes them over, or ends that.
//!
//! Virtual IPs of one virtual router have one owner: they are pinned together, or not at all.

pub mod pin;

use jiff::Timestamp;
use kube::ResourceExt;
use vip_core::api::{ServiceRef, VirtualIP, name_of};

use crate::cli::target::Target;
use crate::cli::{DryRun, MoveArgs};
use crate::cluster::{Cluster, serves};
use crate::commands::version;
use crate::exit::Result;
use crate::fitness::{Fitness, View};
use crate::output::{self, say};
use crate::suggest;
use crate::wait::{self, Ended};

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &MoveArgs) -> Result<()> {
    let target = Target::parse(&args.target)?;
    let view = View::read(cluster).await?;
    version::refuse_skew(&view.nodes)?;
    let wanted = wanted(&view.vips, &target, &cluster.namespace)?;
    let fitness = Fitness::new(&view, Timestamp::now());
    let routers: Vec<Vec<&VirtualIP>> = fitness
        .routers(&view.vips)
        .into_iter()
        .filter(|vips| vips.iter().any(|vip| wanted.contains(vip)))
        .collect();
    let all: Vec<&VirtualIP> = routers.iter().flatten().copied().collect();
    if let Some(node) = &args.to {
        view.node(node)?;
        if let Some(unfit) = all.iter().find_map(|vip| fitness.unfit(node, vip)) {
            return Err(unfit.into());
        }
    }
    for vips in &routers {
        if let Some(sentence) = together(vips, &wanted) {
            say(sentence);
        }
    }
    if args.change.dry_run == DryRun::None && all.len() > 1 {
        pin::rehearse(cluster, &all, args.to.as_deref()).await?;
    }
    if args.change.dry_run == DryRun::None {
        let addresses: Vec<&str> = all.iter().map(|vip| vip.spec.address.as_str()).collect();
        say(format!("Moving {} in {}", addresses.join(", "), cluster.name()));
    }
    let mut written = Vec::new();
    for vip in &all {
        let stored = match vip.spec.preferred_node == args.to {
            true => (*vip).clone(),
            false => pin::set(cluster, vip, args.to.as_deref(), args.change.dry_run).await?,
        };
        if args.change.output.is_none() {
            output::line(format!("{}{}", sentence(vip, args.to.as_deref()), args.change.dry_run.suffix()));
        }
        written.push(output::bare(&stored));
    }
    let outcome = match &args.to {
        Some(node) if args.change.dry_run == DryRun::None && args.wait.wait => {
            follow(cluster, args, &all, node).await
        }
        _ => Ok(()),
    };
    // What was written is printed, also when the wait for it ends badly.
    if let Some(format) = args.change.output {
        output::objects(&written, format)?;
    }
    outcome
}

/// Waits for the new owner.
async fn follow(cluster: &Cluster, args: &MoveArgs, vips: &[&VirtualIP], node: &str) -> Result<()> {
    if let Ended::TimedOut(reason) = pin::arrived(cluster, vips, node, args.wait.timeout).await? {
        return Err(wait::timed_out(&format!("the move to {node}"), args.wait.timeout, &reason).hint(
            format!("it stays pinned; to end that: kubectl vip move {} --unpin", args.target.join(" ")),
        ));
    }
    for vip in vips.iter().filter(|_| args.change.output.is_none()) {
        match pin::owner(vip) {
            Some(owner) if owner == node => {}
            Some(owner) => {
                output::line(format!("virtualip/{} moved from {owner} to {node}", vip.name_any()));
            }
            None => output::line(format!("virtualip/{} moved to {node}", vip.name_any())),
        }
    }
    Ok(())
}

/// The virtual IPs that the command line means.
fn wanted<'a>(vips: &'a [VirtualIP], target: &Target, namespace: &str) -> Result<Vec<&'a VirtualIP>> {
    match target {
        Target::Vip(address) => {
            let name = name_of(*address);
            let found: Vec<&VirtualIP> = vips.iter().filter(|vip| vip.name_any() == name).collect();
            if found.is_empty() {
                return Err(suggest::no_virtual_ip(*address, vips));
            }
            Ok(found)
        }
        Target::Service(name) => {
            let at = ServiceRef { namespace: namespace.to_owned(), name: name.clone() };
            let found: Vec<&VirtualIP> = vips.iter().filter(|vip| serves(vip, &at)).collect();
            if found.is_empty() {
                return Err(suggest::not_exposed(&at, vips)
                    .hint(format!("kubectl vip expose svc/{name} -n {namespace}")));
            }
            Ok(found)
        }
    }
}

/// Says which others share the virtual router.
fn together(vips: &[&VirtualIP], wanted: &[&VirtualIP]) -> Option<String> {
    let (named, others): (Vec<&VirtualIP>, Vec<&VirtualIP>) =
        vips.iter().copied().partition(|vip| wanted.contains(vip));
    if others.is_empty() {
        return None;
    }
    let addresses: Vec<&str> = named.iter().map(|vip| vip.spec.address.as_str()).collect();
    let others: Vec<String> = others
        .iter()
        .map(|vip| {
            let services: Vec<String> = vip.spec.services.iter().map(ToString::to_string).collect();
            let services =
                if services.is_empty() { String::new() } else { format!(" ({})", services.join(", ")) };
            format!("{}{services}", vip.spec.address)
        })
        .collect();
    let router = vips.first().map_or(0, |vip| vip.spec.virtual_router);
    Some(format!(
        "virtual router {router} of {} moves as one, with {}",
        addresses.join(", "),
        others.join(", ")
    ))
}

/// What is done about one virtual IP.
fn sentence(vip: &VirtualIP, to: Option<&str>) -> String {
    let name = vip.name_any();
    match (to, vip.spec.preferred_node.as_deref()) {
        (Some(node), Some(before)) if node == before => {
            format!("virtualip/{name} pinned to {node} (unchanged)")
        }
        (Some(node), Some(before)) => format!("virtualip/{name} pinned to {node} (was {before})"),
        (Some(node), None) => format!("virtualip/{name} pinned to {node}"),
        (None, Some(before)) => format!("virtualip/{name} unpinned (was {before})"),
        (None, None) => format!("virtualip/{name} unpinned (unchanged)"),
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vip(address: &str, service: &str, preferred: Option<&str>) -> VirtualIP {
        serde_json::from_value(json!({
            "metadata": {"name": address},
            "spec": {"address": address, "virtualRouter": 7, "preferredNode": preferred,
                     "services": [{"namespace": "shop", "name": service}]},
        }))
        .unwrap()
    }

    #[test]
    fn which_virtual_ips_are_meant() {
        let vips = [vip("10.0.0.1", "web", None), vip("10.0.0.2", "web", None), vip("10.0.0.3", "api", None)];
        let find = |target: Target| {
            wanted(&vips, &target, "shop")
                .map(|found| found.iter().map(|vip| vip.name_any()).collect::<Vec<_>>())
                .map_err(|failure| failure.to_string())
        };
        assert_eq!(find(Target::Service("web".into())).unwrap(), ["10.0.0.1", "10.0.0.2"]);
        assert_eq!(find(Target::Vip("10.0.0.3".parse().unwrap())).unwrap(), ["10.0.0.3"]);
        assert_eq!(
            find(Target::Vip("10.0.1.3".parse().unwrap())).unwrap_err(),
            "Error: virtual IP 10.0.1.3 not found; did you mean \"10.0.0.3\"?\nhint: kubectl vip status -A"
        );
        assert_eq!(
            find(Target::Service("wbe".into())).unwrap_err(),
            "Error: service shop/wbe has no virtual IP; did you mean \"web\"?\nhint: kubectl vip expose svc/wbe -n shop"
        );
    }

    #[test]
    fn what_rides_along_is_named() {
        let (one, two) = (vip("10.0.0.1", "web", None), vip("10.0.0.3", "api", None));
        assert_eq!(together(&[&one], &[&one]), None);
        assert_eq!(
            together(&[&one, &two], &[&one]).unwrap(),
            "virtual router 7 of 10.0.0.1 moves as one, with 10.0.0.3 (shop/api)"
        );
    }

    #[test]
    fn what_is_printed() {
        let said = |preferred, to| sentence(&vip("10.0.0.1", "web", preferred), to);
        assert_eq!(said(None, Some("n2")), "virtualip/10.0.0.1 pinned to n2");
        assert_eq!(said(Some("n1"), Some("n2")), "virtualip/10.0.0.1 pinned to n2 (was n1)");
        assert_eq!(said(Some("n2"), Some("n2")), "virtualip/10.0.0.1 pinned to n2 (unchanged)");
        assert_eq!(said(Some("n2"), None), "virtualip/10.0.0.1 unpinned (was n2)");
        assert_eq!(said(None, None), "virtualip/10.0.0.1 unpinned (unchanged)");
    }
}
