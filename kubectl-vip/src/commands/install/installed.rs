//! What an installation is like: `install`, `diff` and `upgrade` keep of it what no flag names.

use k8s_openapi::api::apps::v1::DaemonSet;
use k8s_openapi::api::core::v1::Container;
use kube::{Api, ResourceExt};
use vip_core::api::{DAEMONSET, DEFAULT_NAMESPACE, VIPNode};

use crate::cluster::Cluster;
use crate::commands::{VERSION, version};
use crate::exit::{Failure, Result};
use crate::manifests::Settings;

/// What an install has left in the DaemonSet.
#[derive(Clone, Debug)]
pub struct Installed {
    /// Its settings, but for the image.
    pub settings: Settings,
    /// The image of the agents.
    pub image: String,
}

impl Installed {
    /// The installation that a command is about: the one in the namespace that is named, else the only one.
    ///
    /// # Errors
    /// When there are several and none is named, or who asks may see no DaemonSet.
    pub async fn find(cluster: &Cluster) -> Result<Option<Self>> {
        let named = cluster.namespace_named.then_some(cluster.namespace.as_str());
        let Some(mut sets) = cluster.list_agents().await? else {
            let namespace = named.unwrap_or(DEFAULT_NAMESPACE);
            let sets: Api<DaemonSet> = Api::namespaced(cluster.client.clone(), namespace);
            return Ok(sets.get_opt(DAEMONSET).await?.as_ref().map(Self::read));
        };
        sets.retain(|set| named.is_none() || set.namespace().as_deref() == named);
        only_one(sets.iter().filter_map(ResourceExt::namespace))?;
        Ok(sets.first().map(Self::read))
    }

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

    /// The namespace of the agents.
    pub fn namespace(&self) -> &str {
        self.settings.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE)
    }

    /// The version in the name of the image.
    fn version(&self) -> Option<String> {
        let (_, tag) = repository(&self.image)?;
        numbers(tag).map(|_| format!("v{}", tag.trim_start_matches('v')))
    }

    /// The image of this plugin's version, from the same registry; `None` when the name of the installed one does not say a
    /// version.
    pub fn next_image(&self) -> Option<String> {
        let (repository, _) = repository(&self.image)?;
        self.version().map(|_| format!("{repository}:{VERSION}"))
    }

    /// The versions of the agents that report, and that of the image, from the oldest to the newest.
    pub fn versions(&self, nodes: &[VIPNode]) -> Vec<String> {
        let mut versions: Vec<String> = version::versions(nodes).into_keys().collect();
        // Agents that have not reported yet run what their image says.
        versions.extend(self.version().filter(|version| !versions.contains(version)));
        versions.sort_by_key(|version| numbers(version));
        versions
    }
}

/// Refuses to choose one of several namespaces.
pub fn only_one(namespaces: impl Iterator<Item = String>) -> Result<()> {
    let places: Vec<String> = namespaces.collect();
    if places.len() < 2 {
        return Ok(());
    }
    Err(Failure::new(format!("kubectl-vip is installed more than once: in {}", places.join(", ")))
        .hint("choose one with --namespace"))
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
///
/// # Errors
/// When there are such agents.
pub fn refuse_newer(versions: &[String]) -> Result<()> {
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
    .hint("or go back to the plugin's version: kubectl vip upgrade --allow-downgrade"))
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
        assert_eq!(old.versions(&[]), ["v0.0.9"]);
        assert_eq!(old.next_image(), Some(format!("registry.example:5000/vip-node:{VERSION}")));
        let again = set(&Settings { image: given.image.clone(), ..old.settings });
        assert_eq!(again, set(&given));
    }

    #[test]
    fn an_image_without_a_version_leads_to_no_other() {
        for image in ["registry.example:5000/vip-node", "vip-node:latest", "vip-node:v0.1.0@sha256:00"] {
            let old = Installed { settings: Settings::default(), image: image.to_owned() };
            assert_eq!(old.next_image(), None, "{image}");
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
