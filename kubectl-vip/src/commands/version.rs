//! `version`: this plugin and the agents. Also: which agents this plugin may change things for.

use std::collections::BTreeMap;

use kube::ResourceExt;
use serde_json::json;
use vip_core::api::VIPNode;

use crate::cli::{Connection, VersionArgs};
use crate::cluster::Cluster;
use crate::commands::VERSION;
use crate::exit::{Failure, Result};
use crate::output;

/// Runs the command.
pub async fn run(args: &VersionArgs, connection: &Connection) -> Result<()> {
    // What is known without a cluster is printed in any case.
    let agents = match args.client {
        true => Ok(None),
        false => agents(connection).await.map(Some),
    };
    match args.output {
        Some(format) => {
            let versions = agents.as_ref().ok().and_then(Option::as_ref);
            let mut document = json!({"clientVersion": VERSION});
            if let Some(versions) = versions {
                document["agentVersions"] = json!(versions);
            }
            output::document(&document, format)?;
        }
        None => {
            output::line(format!("Client Version: {VERSION}"));
            if let Ok(Some(versions)) = &agents {
                output::line(format!("Agent Version: {}", shown(versions)));
            }
        }
    }
    agents.map(|_| ())
}

async fn agents(connection: &Connection) -> Result<BTreeMap<String, Vec<String>>> {
    let cluster = Cluster::connect(connection).await?;
    let nodes = cluster.nodes().list(&Default::default()).await;
    let nodes = nodes.map_err(|error| Failure::from(error).at(&cluster.server))?.items;
    Ok(versions(&nodes))
}

/// The versions of the agents, with a `v`, and the nodes that run each.
pub fn versions(nodes: &[VIPNode]) -> BTreeMap<String, Vec<String>> {
    let mut versions: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for node in nodes {
        let version = node.status.as_ref().map(|status| status.agent_version.as_str()).unwrap_or_default();
        if !version.is_empty() {
            versions
                .entry(format!("v{}", version.trim_start_matches('v')))
                .or_default()
                .push(node.name_any());
        }
    }
    versions
}

fn shown(versions: &BTreeMap<String, Vec<String>>) -> String {
    match versions.len() {
        0 => output::NONE.to_owned(),
        1 => versions.keys().next().cloned().unwrap_or_default(),
        _ => {
            let each: Vec<String> =
                versions.iter().map(|(version, nodes)| format!("{version} ({})", nodes.join(", "))).collect();
            each.join(", ")
        }
    }
}

/// A plugin changes nothing for agents that are more than one minor version away: they may not know what it writes.
pub fn refuse_skew(nodes: &[VIPNode]) -> Result<()> {
    let Some(mine) = major_minor(VERSION) else { return Ok(()) };
    for version in versions(nodes).keys() {
        let Some(theirs) = major_minor(version) else { continue };
        if theirs.0 != mine.0 || theirs.1.abs_diff(mine.1) > 1 {
            return Err(Failure::new(format!(
                "plugin {VERSION}, agent {version}: nothing changed; reading still works"
            ))
            .hint("bring both to one version: kubectl krew upgrade vip, or kubectl vip upgrade"));
        }
    }
    Ok(())
}

fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    Some((parts.next()?.parse().ok()?, parts.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use vip_core::api::VIPNodeStatus;

    use super::*;

    fn node(name: &str, version: &str) -> VIPNode {
        let mut node = VIPNode::new(name, vip_core::api::VIPNodeSpec::default());
        node.status = Some(VIPNodeStatus { agent_version: version.to_owned(), ..Default::default() });
        node
    }

    #[test]
    fn versions_of_the_agents() {
        assert_eq!(shown(&versions(&[node("a", "0.1.0"), node("b", "v0.1.0")])), "v0.1.0");
        assert_eq!(shown(&versions(&[node("a", "0.1.0"), node("b", "0.2.0")])), "v0.1.0 (a), v0.2.0 (b)");
        assert_eq!(shown(&versions(&[VIPNode::new("a", vip_core::api::VIPNodeSpec::default())])), "<none>");
    }

    #[test]
    fn agents_that_are_too_far_away() {
        assert_eq!(refuse_skew(&[node("a", VERSION)]), Ok(()));
        assert_eq!(refuse_skew(&[]), Ok(()));
        let far = refuse_skew(&[node("a", "0.9.0")]).unwrap_err().to_string();
        assert!(far.starts_with(&format!(
            "Error: plugin {VERSION}, agent v0.9.0: nothing changed; reading still works"
        )));
    }
}
