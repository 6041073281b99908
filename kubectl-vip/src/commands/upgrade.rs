//! `upgrade`: brings the agents to the version of this plugin with the settings that they were installed with.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Container;
use kube::ResourceExt;

use crate::cli::{DryRun, UpgradeArgs};
use crate::cluster::Cluster;
use crate::commands::{VERSION, diff, install, version};
use crate::exit::{Failure, Result};
use crate::manifests::Settings;
use crate::output::{self, say};
use crate::prompt;

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &UpgradeArgs) -> Result<()> {
    let set = installed(cluster).await?;
    let nodes = cluster.list_nodes().await?.unwrap_or_default();
    let old = Installed::read(&set);
    let mut versions: Vec<String> = version::versions(&nodes).into_keys().collect();
    // Agents that have not reported yet run what their image says.
    versions.extend(old.version().filter(|version| !versions.contains(version)));
    versions.sort_by_key(|version| numbers(version));
    if !args.allow_downgrade {
        refuse_newer(&versions)?;
    }
    let image = match &args.image {
        Some(image) => image.clone(),
        None => old.next_image()?,
    };
    let settings = Settings { image: Some(image), ..old.settings };
    let namespace = settings.namespace.clone().unwrap_or_default();
    let from = if versions.is_empty() { output::UNKNOWN.to_owned() } else { versions.join(", ") };
    say(format!("Upgrading kubectl-vip {from} -> {VERSION} in namespace {namespace} of {}", cluster.name()));

    let ready =
        install::checked_objects(cluster, &settings, args.rollout.timeout, &args.rollout.skip_checks).await?;
    let dry_run = args.rollout.change.dry_run;
    if dry_run != DryRun::Client {
        let changes = diff::differences(cluster, &ready.objects, args.rollout.force_conflicts).await?;
        for change in &changes {
            say(format!("  {} is {}", change.title, if change.is_new { "new" } else { "changed" }));
        }
        if changes.is_empty() {
            say("Nothing is to be changed.");
            // An upgrade that was cut off is finished by waiting.
            return match args.rollout.wait && dry_run == DryRun::None {
                true => install::agents(cluster, &namespace, args.rollout.timeout).await,
                false => Ok(()),
            };
        }
        if dry_run == DryRun::None {
            let (count, s) = (changes.len(), if changes.len() == 1 { "" } else { "s" });
            prompt::confirm(
                &format!("upgrade changes {count} object{s} and restarts the agents one by one. Go on?"),
                args.yes,
            )?;
        }
    }
    install::apply(cluster, ready, &args.rollout).await
}

/// The DaemonSet of the agents; with several, the one in the namespace that is named.
async fn installed(cluster: &Cluster) -> Result<DaemonSet> {
    let sets = cluster.list_agents().await?.ok_or_else(|| {
        Failure::new("the agents cannot be seen, so their settings are not known")
            .hint("kubectl auth can-i list daemonsets.apps -A")
    })?;
    let mut sets: Vec<DaemonSet> = sets
        .into_iter()
        .filter(|set| !cluster.namespace_named || set.namespace().as_deref() == Some(&cluster.namespace))
        .collect();
    if sets.len() > 1 {
        let places: Vec<String> = sets.iter().filter_map(ResourceExt::namespace).collect();
        return Err(Failure::new(format!(
            "kubectl-vip is installed more than once: in {}",
            places.join(", ")
        ))
        .hint("choose one with --namespace"));
    }
    sets.pop().ok_or_else(Failure::not_installed)
}

/// What an install has left in the DaemonSet.
struct Installed {
    settings: Settings,
    image: String,
}

impl Installed {
    fn read(set: &DaemonSet) -> Self {
        let pods = set.spec.as_ref().and_then(|spec| spec.template.spec.clone()).unwrap_or_default();
        let agent = pods.containers.iter().find(|container| container.name == "agent");
        let variable = |name: &str| agent.and_then(|agent| variable(agent, name));
        let settings = Settings {
            namespace: set.namespace(),
            image: None,
            // What the manifest says itself comes again, and does no harm twice.
            node_selector: pods.node_selector.clone().unwrap_or_default(),
            advert_interval: variable("VIP_ADVERT_INTERVAL"),
            unicast: variable("VIP_UNICAST").as_deref() == Some("true"),
        };
        let image = agent.and_then(|agent| agent.image.clone()).unwrap_or_default();
        Self { settings, image }
    }

    /// The version in the name of the image.
    fn version(&self) -> Option<String> {
        let (_, tag) = repository(&self.image)?;
        numbers(tag).map(|_| format!("v{}", tag.trim_start_matches('v')))
    }

    /// The image of this plugin's version, from the same registry.
    fn next_image(&self) -> Result<String> {
        match (repository(&self.image), self.version()) {
            (Some((repository, _)), Some(_)) => Ok(format!("{repository}:{VERSION}")),
            _ => Err(Failure::new(format!(
                "the agents run image {:?}, whose name does not say a version",
                self.image
            ))
            .hint("name the image of the new version: --image REF")),
        }
    }
}

fn variable(container: &Container, name: &str) -> Option<String> {
    container.env.iter().flatten().find(|variable| variable.name == name)?.value.clone()
}

/// A reference to an image, taken apart: `ghcr.io/kubectl-vip/vip-node` and `v0.1.0`. A digest names no version.
fn repository(image: &str) -> Option<(&str, &str)> {
    image.rsplit_once(':').filter(|(_, tag)| !tag.contains('/') && !image.contains('@'))
}

/// The numbers of a version, and whether it is a release: `v1.2.3-rc.1` comes before `v1.2.3`.
fn numbers(version: &str) -> Option<(u32, u32, u32, bool)> {
    let (numbers, early) = match version.trim_start_matches('v').split_once('-') {
        Some((numbers, _)) => (numbers, true),
        None => (version.trim_start_matches('v'), false),
    };
    let mut parts = numbers.split('.').map(|part| part.parse().ok());
    match (parts.next(), parts.next(), parts.next(), parts.next()) {
        (Some(Some(major)), Some(Some(minor)), Some(Some(patch)), None) => {
            Some((major, minor, patch, !early))
        }
        _ => None,
    }
}

/// Agents that are newer than this plugin may have left what the older ones do not understand.
fn refuse_newer(versions: &[String]) -> Result<()> {
    let newer: Vec<&str> =
        versions.iter().map(String::as_str).filter(|version| numbers(version) > numbers(VERSION)).collect();
    if newer.is_empty() {
        return Ok(());
    }
    Err(Failure::new(format!(
        "plugin {VERSION}, agent {}: the agents are newer, nothing changed",
        newer.join(", ")
    ))
    .hint("bring the plugin up first: kubectl krew upgrade vip")
    .hint("or go back to the plugin's version: --allow-downgrade"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests;

    fn set(settings: &Settings) -> DaemonSet {
        let objects = manifests::render(settings).unwrap();
        let set = objects.into_iter().find(manifests::is_agents).unwrap();
        serde_json::from_value(serde_json::to_value(set).unwrap()).unwrap()
    }

    #[test]
    fn the_settings_of_an_install_come_back() {
        let given = Settings {
            namespace: Some("edge".into()),
            image: Some("registry.example:5000/vip-node:v0.0.9".into()),
            node_selector: manifests::labels("role=edge,kubernetes.io/os=linux").unwrap(),
            advert_interval: Some("1000ms".into()),
            unicast: true,
        };
        let old = Installed::read(&set(&given));
        assert_eq!(old.version().as_deref(), Some("v0.0.9"));
        assert_eq!(old.next_image(), Ok(format!("registry.example:5000/vip-node:{VERSION}")));
        let again = set(&Settings { image: given.image.clone(), ..old.settings });
        assert_eq!(again, set(&given));
    }

    #[test]
    fn an_image_without_a_version_has_to_be_named() {
        for image in ["registry.example:5000/vip-node", "vip-node:latest", "vip-node:v0.1.0@sha256:00"] {
            let old = Installed { settings: Settings::default(), image: image.to_owned() };
            let said = old.next_image().unwrap_err().to_string();
            assert!(said.contains(image) && said.contains("hint: name the image"), "{said}");
        }
    }

    #[test]
    fn agents_that_are_newer_are_left_alone() {
        assert_eq!(refuse_newer(&[VERSION.to_owned(), "v0.0.9".to_owned()]), Ok(()));
        let said = refuse_newer(&["v9.0.0".to_owned()]).unwrap_err().to_string();
        assert!(
            said.contains("agent v9.0.0: the agents are newer") && said.contains("--allow-downgrade"),
            "{said}"
        );
        assert!(numbers("v1.2.3-rc.1") < numbers("v1.2.3") && numbers("1.10.0") > numbers("v1.9.9"));
        assert_eq!(numbers("latest"), None);
    }
}
