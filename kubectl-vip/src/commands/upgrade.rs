//! `upgrade`: brings the agents to the version of this plugin with the settings that they were installed with.

use crate::cli::{DryRun, UpgradeArgs};
use crate::cluster::Cluster;
use crate::commands::install::{self, Installed};
use crate::commands::{VERSION, diff};
use crate::exit::{Failure, Result};
use crate::manifests::Settings;
use crate::output::{self, say};

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &UpgradeArgs) -> Result<()> {
    let old = Installed::find(cluster).await?.ok_or_else(Failure::not_installed)?;
    let versions = old.versions(&cluster.list_nodes().await?.unwrap_or_default());
    if !args.allow_downgrade {
        install::refuse_newer(&versions)?;
    }
    let image = args.image.clone().or_else(|| old.next_image()).ok_or_else(|| {
        Failure::new(format!("the agents run image {:?}, whose name does not say a version", old.image))
            .hint("name the image of the new version: --image REF")
    })?;
    let namespace = old.namespace().to_owned();
    let settings = Settings { image: Some(image), ..old.settings };
    let from = if versions.is_empty() { output::UNKNOWN.to_owned() } else { versions.join(", ") };
    say(format!("Upgrading kubectl-vip {from} -> {VERSION} in namespace {namespace} of {}", cluster.name()));

    let rollout = &args.rollout;
    let ready =
        install::checked_objects(cluster, &settings, &[], rollout.timeout, &rollout.skip_checks).await?;
    let dry_run = rollout.change.dry_run;
    // A dry run of the client asks the API server for nothing, not even for a comparison.
    if dry_run != DryRun::Client {
        let changes = diff::differences(cluster, &ready.objects, rollout.force_conflicts).await?;
        if changes.is_empty() {
            say("Nothing is to be changed.");
            // An upgrade that was cut off is finished by waiting.
            return match rollout.wait && dry_run == DryRun::None {
                true => install::agents(cluster, &namespace, rollout.timeout).await,
                false => Ok(()),
            };
        }
        diff::show(&changes);
        if dry_run == DryRun::None {
            diff::confirm("upgrade", &changes, args.yes)?;
        }
    }
    install::apply(cluster, ready, rollout).await
}
