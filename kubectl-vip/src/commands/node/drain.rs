//! `node drain` and `node undrain`: a label on the VIPNode, which the node's agent obeys.

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams};
use serde_json::json;
use vip_core::api::{DRAIN_LABEL, PLUGIN_MANAGER, VIPNode, VirtualIP};

use crate::cli::{Change, DrainArgs, DryRun, UndrainArgs};
use crate::cluster::{Cluster, silence};
use crate::commands::r#move::pin;
use crate::commands::version;
use crate::exit::Result;
use crate::fitness::{Fitness, View, is_drained};
use crate::output::{self, say, span};
use crate::prompt;
use crate::wait::{self, Ended, Look};

/// `node drain`.
pub async fn run(cluster: &Cluster, args: &DrainArgs) -> Result<()> {
    let name = &args.node;
    let view = View::read(cluster).await?;
    version::refuse_skew(&view.nodes)?;
    let node = view.node(name)?;
    let owned = owned(&view.vips, name);
    let stranded = stranded(&owned, &view, name);
    if is_drained(node) {
        tell(node, "already drained", &args.change)?;
    } else {
        say(format!("Draining {name} in {}", cluster.name()));
        if !stranded.is_empty() {
            let lost = stranded.join(", ");
            if args.change.dry_run == DryRun::None {
                let question = format!(
                    "no other node can take {lost}: nobody would answer there until {name} is undrained. Go on?"
                );
                prompt::confirm(&question, args.yes)?;
            } else {
                say(format!("warning: no other node can take {lost}"));
            }
        }
        let node = label(cluster, node, true, args.change.dry_run).await?;
        tell(&node, &format!("drained{}", args.change.dry_run.suffix()), &args.change)?;
    }
    if args.change.dry_run != DryRun::None {
        if !owned.is_empty() {
            say(format!("it would give away {}", addresses(&owned).join(", ")));
        }
        return Ok(());
    }
    if let Some(seconds) = silence(node, Timestamp::now()) {
        say(format!(
            "warning: the agent on {name} has been silent for {}: it obeys when it is back",
            span(seconds)
        ));
        return Ok(());
    }
    match args.wait.wait {
        true => empty(cluster, args, &stranded).await,
        false => Ok(()),
    }
}

/// Waits until the node owns nothing any more.
async fn empty(cluster: &Cluster, args: &DrainArgs, stranded: &[&str]) -> Result<()> {
    let name = &args.node;
    let what = format!("{name} to give its addresses away");
    let ended = wait::until(&what, args.wait.timeout, async || {
        let vips = cluster.list_vips().await?;
        let left = addresses(&owned(&vips, name));
        let left: Vec<String> = left
            .into_iter()
            .map(|address| match stranded.contains(&address) {
                true => format!("{address} (no other node can take it)"),
                false => address.to_owned(),
            })
            .collect();
        Ok(if left.is_empty() {
            Look::Done(())
        } else {
            Look::NotYet(format!("it still owns {}", left.join(", ")))
        })
    })
    .await?;
    match ended {
        Ended::Done(()) => {
            say(format!("{name} owns no virtual IP"));
            Ok(())
        }
        Ended::TimedOut(reason) => Err(wait::timed_out(&what, args.wait.timeout, &reason)
            .hint(format!("it stays drained; to end that: kubectl vip node undrain {name}"))),
    }
}

/// `node undrain`.
pub async fn undo(cluster: &Cluster, args: &UndrainArgs) -> Result<()> {
    let name = &args.node;
    let view = View::read(cluster).await?;
    version::refuse_skew(&view.nodes)?;
    let node = view.node(name)?;
    if !is_drained(node) {
        return tell(node, "already undrained", &args.change);
    }
    if args.change.dry_run == DryRun::None {
        say(format!("Undraining {name} in {}", cluster.name()));
    }
    let node = label(cluster, node, false, args.change.dry_run).await?;
    tell(&node, &format!("undrained{}", args.change.dry_run.suffix()), &args.change)?;
    let is_theirs = |vip: &&VirtualIP| vip.spec.preferred_node.as_ref() == Some(name);
    let back: Vec<&VirtualIP> = view.vips.iter().filter(is_theirs).collect();
    if !back.is_empty() {
        say(format!("pinned to {name}, and so coming back: {}", addresses(&back).join(", ")));
    }
    Ok(())
}

/// The line about a node, or the node.
fn tell(node: &VIPNode, what: &str, change: &Change) -> Result<()> {
    match change.output {
        Some(format) => output::objects(&[output::bare(node)], format),
        None => {
            output::line(format!("vipnode/{} {what}", node.name_any()));
            Ok(())
        }
    }
}

async fn label(cluster: &Cluster, node: &VIPNode, drained: bool, dry_run: DryRun) -> Result<VIPNode> {
    if dry_run == DryRun::Client {
        let mut node = node.clone();
        match drained {
            true => drop(node.labels_mut().insert(DRAIN_LABEL.to_owned(), "true".to_owned())),
            false => drop(node.labels_mut().remove(DRAIN_LABEL)),
        }
        return Ok(node);
    }
    let params = PatchParams {
        dry_run: dry_run == DryRun::Server,
        field_manager: Some(PLUGIN_MANAGER.to_owned()),
        ..PatchParams::default()
    };
    let patch = json!({"metadata": {"labels": {DRAIN_LABEL: drained.then_some("true")}}});
    Ok(cluster.nodes().patch(&node.name_any(), &params, &Patch::Merge(patch)).await?)
}

/// The virtual IPs that a node owns by their status.
fn owned<'a>(vips: &'a [VirtualIP], node: &str) -> Vec<&'a VirtualIP> {
    vips.iter().filter(|vip| pin::owner(vip) == Some(node)).collect()
}

/// Those of the node's addresses that no other node could own.
fn stranded<'a>(owned: &[&'a VirtualIP], view: &'a View, node: &str) -> Vec<&'a str> {
    let fitness = Fitness::new(view, Timestamp::now());
    let routers = fitness.routers(&view.vips);
    let has_no_other = |vip: &&&VirtualIP| {
        // They go together, so one node has to be fit for all.
        let router = routers.iter().find(|vips| vips.contains(*vip));
        router.is_none_or(|vips| fitness.fit(vips).iter().all(|other| *other == node))
    };
    owned.iter().filter(has_no_other).map(|vip| vip.spec.address.as_str()).collect()
}

fn addresses<'a>(vips: &[&'a VirtualIP]) -> Vec<&'a str> {
    vips.iter().map(|vip| vip.spec.address.as_str()).collect()
}
