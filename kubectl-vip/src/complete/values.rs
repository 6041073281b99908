//! The values that an argument may take: fixed ones, files, and names in the cluster and in the kubeconfig.
//!
//! What an argument is about is said by the name of its value in `cli.rs`.

use std::time::Duration;

use clap::{Arg, FromArgMatches};
use k8s_openapi::api::core::v1::Namespace;
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use vip_core::api::{Scheduler, VirtualIP};

use super::line::Line;
use super::{Candidate, Directive};
use crate::cli::{Cli, help};
use crate::cluster::{self, Cluster};
use crate::codes;
use crate::codes::cluster::SKIPPABLE;
use crate::exit::{Failure, Result};

/// How long somebody waits at the prompt before the cluster is given up.
const PATIENCE: Duration = Duration::from_secs(2);

/// The candidates for a value that begins with `current`; `before` is what stands in front of it in the same word.
pub async fn of(line: &Line<'_>, argument: &Arg, current: &str, before: &str) -> (Vec<Candidate>, Directive) {
    let named = argument
        .get_value_names()
        .and_then(|names| names.first())
        .map(|name| name.as_str())
        .unwrap_or_default();
    if named == "FILE" {
        return (Vec::new(), Directive::Files);
    }
    let fixed = fixed(argument, named);
    // Of a list, the last part is to be completed.
    let (head, tail) = match current.rfind(',').filter(|_| named.contains("[,")) {
        Some(comma) => current.split_at(comma + 1),
        None => ("", current),
    };
    let found = match fixed.is_empty() {
        false => fixed,
        true => tokio::time::timeout(PATIENCE, ask(line, argument, named, tail))
            .await
            .ok()
            .and_then(Result::ok)
            .unwrap_or_default(),
    };
    let offered = found
        .into_iter()
        .filter(|candidate| candidate.word.starts_with(tail) && !line.positionals.contains(&candidate.word))
        .map(|candidate| Candidate { word: format!("{before}{head}{}", candidate.word), ..candidate })
        .collect();
    (offered, Directive::Nothing)
}

fn fixed(argument: &Arg, named: &str) -> Vec<Candidate> {
    if argument.get_id() == "scheduler" {
        return Scheduler::ALL.iter().map(|scheduler| Candidate::new(scheduler.as_str(), "")).collect();
    }
    if named == "CODE[,...]" {
        return SKIPPABLE.iter().map(|code| Candidate::new(code.id, code.title)).collect();
    }
    if named == "CODE" {
        return codes::all().map(|code| Candidate::new(code.id, code.title)).collect();
    }
    if named == "BOOL" {
        return ["true", "false"].map(|word| Candidate::new(word, "")).to_vec();
    }
    let possible = argument.get_possible_values().into_iter();
    possible.map(|value| Candidate::new(value.get_name(), super::about(value.get_help()))).collect()
}

/// Asks the cluster, or the kubeconfig.
async fn ask(line: &Line<'_>, argument: &Arg, named: &str, current: &str) -> Result<Vec<Candidate>> {
    let words = [String::new()].into_iter().chain(line.global.clone()).chain(["version".to_owned()]);
    let matches = help::command("").try_get_matches_from(words).map_err(|_| Failure::new("not finished"))?;
    let connection = Cli::from_arg_matches(&matches).map_err(|_| Failure::new("not finished"))?.connection;
    let kind = match (argument.get_id().as_str(), named) {
        ("context" | "cluster" | "user", _) => {
            let names = cluster::names(&connection, argument.get_id().as_str())?;
            return Ok(names.into_iter().map(|name| Candidate::new(name, "")).collect());
        }
        (_, "NS" | "NS[,NS...]") => Kind::Namespaces,
        (_, "NODE") => Kind::Nodes,
        (_, "POOL") => Kind::Pools,
        (_, "svc/NAME" | "svc/NAME...") => Kind::Services,
        (_, "svc/NAME|VIP" | "VIP|svc/NAME") => Kind::VirtualIPs,
        _ => return Ok(Vec::new()),
    };
    let cluster = Cluster::connect(&connection).await?;
    // `svc/web`, or `svc web` in two words.
    let prefix = match (line.positionals.first().map(String::as_str), current.split_once('/')) {
        (Some("svc" | "service" | "services"), _) => String::new(),
        (_, Some((kind @ ("service" | "services"), _))) => format!("{kind}/"),
        _ => "svc/".to_owned(),
    };
    kind.list(&cluster, &prefix).await
}

#[derive(Clone, Copy)]
enum Kind {
    Namespaces,
    Nodes,
    Pools,
    Services,
    VirtualIPs,
}

impl Kind {
    async fn list(self, cluster: &Cluster, prefix: &str) -> Result<Vec<Candidate>> {
        let all = ListParams::default();
        Ok(match self {
            Self::Namespaces => {
                let namespaces: Api<Namespace> = Api::all(cluster.client.clone());
                let list = namespaces.list_metadata(&all).await?;
                list.items.iter().map(|namespace| Candidate::new(namespace.name_any(), "")).collect()
            }
            Self::Nodes => {
                let list = cluster.nodes().list_metadata(&all).await?;
                list.items.iter().map(|node| Candidate::new(node.name_any(), "")).collect()
            }
            Self::Pools => {
                let list = cluster.list_pools().await?;
                list.iter()
                    .map(|pool| Candidate::new(pool.name_any(), pool.spec.addresses.join(",")))
                    .collect()
            }
            Self::Services => {
                let list = cluster.services(&cluster.namespace).list_metadata(&all).await?;
                list.items
                    .iter()
                    .map(|service| Candidate::new(format!("{prefix}{}", service.name_any()), ""))
                    .collect()
            }
            Self::VirtualIPs => {
                let list = cluster.list_vips().await?;
                list.iter().flat_map(|vip| targets(vip, &cluster.namespace, prefix)).collect()
            }
        })
    }
}

/// A virtual IP by its address, and by those of its Services that are in this namespace.
fn targets(vip: &VirtualIP, namespace: &str, prefix: &str) -> Vec<Candidate> {
    let services: Vec<String> = vip.spec.services.iter().map(ToString::to_string).collect();
    let here = vip.spec.services.iter().filter(|service| service.namespace == namespace);
    let mut found: Vec<Candidate> = here
        .map(|service| Candidate::new(format!("{prefix}{}", service.name), vip.spec.address.clone()))
        .collect();
    found.push(Candidate::new(vip.spec.address.clone(), services.join(", ")));
    found
}
