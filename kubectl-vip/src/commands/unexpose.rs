//! `unexpose`: takes a Service off its address; the last one gives the address back.

use std::net::IpAddr;

use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams, Preconditions};
use serde_json::json;
use vip_core::api::{PLUGIN_MANAGER, ServiceRef, VirtualIP, name_of};

use crate::cli::target::Target;
use crate::cli::{Change, DryRun, UnexposeArgs};
use crate::cluster::{Cluster, is_conflict, present, serves};
use crate::commands::version;
use crate::exit::{Failure, Result};
use crate::output::{self, say};
use crate::suggest;

/// Another writer between reading and writing: read again, this often at most.
const TRIES: usize = 10;

/// Runs the command. What is named wrongly is told before anything is taken away.
pub async fn run(cluster: &Cluster, args: &UnexposeArgs) -> Result<()> {
    let targets = Target::all(&args.target)?;
    let (vips, nodes) = futures::join!(cluster.list_vips(), cluster.list_nodes());
    let vips = vips?;
    version::refuse_skew(&nodes?.unwrap_or_default())?;
    let of = |target: &Target| match target {
        Target::Service(name) => of_service(&vips, cluster, name),
        Target::Vip(address) => of_address(&vips, *address),
    };
    let found: Vec<Vec<VirtualIP>> = targets.iter().map(of).collect::<Result<_>>()?;
    let Change { dry_run, output } = args.change;
    if dry_run == DryRun::None {
        let all: Vec<&str> = found.iter().flatten().map(|vip| vip.spec.address.as_str()).collect();
        say(format!("Unexposing {} in {}", all.join(", "), cluster.name()));
    }
    let mut written = Vec::new();
    let outcome = carry_out(cluster, &targets, found, args, &mut written).await;
    if let (Some(format), false) = (output, written.is_empty()) {
        output::objects(&written, format)?;
    }
    outcome
}

/// Takes away what was found; `written` has what is done, whatever happens, each as it is now or was last.
async fn carry_out(
    cluster: &Cluster,
    targets: &[Target],
    found: Vec<Vec<VirtualIP>>,
    args: &UnexposeArgs,
    written: &mut Vec<VirtualIP>,
) -> Result<()> {
    let Change { dry_run, output } = args.change;
    for (target, vips) in targets.iter().zip(found) {
        for vip in vips {
            let line = match target {
                Target::Service(name) => {
                    let at = ServiceRef { namespace: cluster.namespace.clone(), name: name.clone() };
                    let (now, said) = take_away(cluster, &vip, &at, dry_run).await?;
                    written.push(output::bare(&now));
                    format!("service/{name} unexposed: {said}{}", dry_run.suffix())
                }
                Target::Vip(_) => {
                    release(cluster, &vip, dry_run).await?;
                    let services: Vec<String> = vip.spec.services.iter().map(ToString::to_string).collect();
                    let was = match services.as_slice() {
                        [] => String::new(),
                        all => format!(" (was {})", all.join(", ")),
                    };
                    written.push(output::bare(&vip));
                    format!("virtualip/{} released{was}{}", vip.name_any(), dry_run.suffix())
                }
            };
            if output.is_none() {
                output::line(line);
            }
        }
    }
    Ok(())
}

fn of_address(vips: &[VirtualIP], address: IpAddr) -> Result<Vec<VirtualIP>> {
    let vip = vips.iter().find(|vip| vip.name_any() == name_of(address));
    let vip = vip.ok_or_else(|| suggest::no_virtual_ip(address, vips))?;
    Ok(vec![vip.clone()])
}

fn of_service(vips: &[VirtualIP], cluster: &Cluster, name: &str) -> Result<Vec<VirtualIP>> {
    let at = ServiceRef { namespace: cluster.namespace.clone(), name: name.to_owned() };
    let exposed: Vec<VirtualIP> = vips.iter().filter(|vip| serves(vip, &at)).cloned().collect();
    if exposed.is_empty() {
        return Err(suggest::not_exposed(&at, vips));
    }
    Ok(exposed)
}

/// Takes the Service off one address: what it is now, or was last, and what became of it in words.
async fn take_away(
    cluster: &Cluster,
    vip: &VirtualIP,
    at: &ServiceRef,
    dry_run: DryRun,
) -> Result<(VirtualIP, String)> {
    let mut vip = vip.clone();
    let address = vip.spec.address.clone();
    for _ in 0..TRIES {
        let rest: Vec<&ServiceRef> = vip.spec.services.iter().filter(|service| *service != at).collect();
        let written = if rest.is_empty() {
            try_release(cluster, &vip, dry_run).await
        } else {
            try_patch(cluster, &vip, &rest, dry_run).await
        };
        match written {
            Ok(()) => {
                let said = left(&address, rest.iter().copied());
                vip.spec.services.retain(|service| service != at);
                return Ok((vip, said));
            }
            Err(error) if is_conflict(&error) => match present(cluster.vips().get(&vip.name_any()).await)? {
                Some(again) if serves(&again, at) => vip = again,
                // Somebody else has done it meanwhile.
                gone => {
                    let said = left(&address, gone.iter().flat_map(|vip| &vip.spec.services));
                    return Ok((gone.unwrap_or(vip), said));
                }
            },
            Err(error) => return Err(error.into()),
        }
    }
    Err(Failure::new(format!("{address} keeps changing: others write to it all the time"))
        .hint("run the command again"))
}

/// What becomes of an address that these Services still have.
fn left<'a>(address: &str, services: impl IntoIterator<Item = &'a ServiceRef>) -> String {
    let services: Vec<String> = services.into_iter().map(ToString::to_string).collect();
    match services.is_empty() {
        true => format!("{address} released"),
        false => format!("{address} stays with {}", services.join(", ")),
    }
}

async fn try_patch(
    cluster: &Cluster,
    vip: &VirtualIP,
    rest: &[&ServiceRef],
    dry_run: DryRun,
) -> kube::Result<()> {
    if dry_run == DryRun::Client {
        return Ok(());
    }
    let patch =
        json!({"metadata": {"resourceVersion": vip.metadata.resource_version}, "spec": {"services": rest}});
    let params = PatchParams {
        dry_run: dry_run == DryRun::Server,
        field_manager: Some(PLUGIN_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    cluster.vips().patch(&vip.name_any(), &params, &Patch::Merge(patch)).await.map(|_| ())
}

/// Deletes a virtual IP as it was seen: a Service that was added meanwhile is a conflict.
async fn try_release(cluster: &Cluster, vip: &VirtualIP, dry_run: DryRun) -> kube::Result<()> {
    if dry_run == DryRun::Client {
        return Ok(());
    }
    // Only the content counts: the owner writes the status, and with it the version, at any time. The uid keeps a
    // successor of the same address safe, and a Service that joined meanwhile is found by looking once more.
    let Some(current) = cluster.vips().get_opt(&vip.name_any()).await? else { return Ok(()) };
    let version = if current.spec == vip.spec { &current } else { vip };
    let preconditions = Preconditions {
        resource_version: version.metadata.resource_version.clone(),
        uid: version.metadata.uid.clone(),
    };
    let params = DeleteParams {
        dry_run: dry_run == DryRun::Server,
        preconditions: Some(preconditions),
        ..DeleteParams::default()
    };
    match cluster.vips().delete(&vip.name_any(), &params).await {
        Ok(_) => Ok(()),
        Err(kube::Error::Api(status)) if status.is_not_found() => Ok(()),
        Err(error) => Err(error),
    }
}

/// Gives an address back that nobody has changed meanwhile.
pub async fn release(cluster: &Cluster, vip: &VirtualIP, dry_run: DryRun) -> Result<()> {
    for _ in 0..TRIES {
        match try_release(cluster, vip, dry_run).await {
            // Only the status has changed, or else somebody bound a Service: that is for the user to see first.
            Err(error) if is_conflict(&error) => {
                let again = cluster.vips().get(&vip.name_any()).await?;
                if again.spec != vip.spec {
                    return Err(Failure::new(format!("{} has changed meanwhile", vip.spec.address))
                        .hint(format!("look at it first: kubectl vip status {}", vip.spec.address)));
                }
            }
            done => return Ok(done?),
        }
    }
    Err(Failure::new(format!("{} keeps changing: others write to it all the time", vip.spec.address))
        .hint("run the command again"))
}
