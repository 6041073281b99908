//! `diff`: what `install` would change, found by a dry run on the API server, which fills in what nobody wrote.

use std::fmt::Write as _;
use std::time::Duration;

use kube::ResourceExt;
use kube::core::DynamicObject;
use serde_json::Value;
use similar::TextDiff;

use crate::cli::{DiffArgs, Document, DryRun};
use crate::cluster::{Cluster, is_conflict, present, title};
use crate::commands::install;
use crate::exit::{Failure, Result, is_missing_resource};
use crate::manifests::CRD;
use crate::output::{self, say};
use crate::prompt;

/// For how long a namespace that is being deleted is waited for.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What the API server writes, whatever is applied.
const VOLATILE: [&str; 5] = ["managedFields", "resourceVersion", "generation", "uid", "creationTimestamp"];
/// A second count of generations, which the API server keeps for a DaemonSet.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

/// What applying an object would change.
pub struct Difference {
    /// The object.
    title: String,
    /// Its kind.
    kind: String,
    /// Whether it is not there yet.
    is_new: bool,
    /// The lines that go and come, as `diff --unified` writes them.
    lines: String,
}

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &DiffArgs) -> Result<()> {
    say(format!("Comparing kubectl-vip {} with {}", super::VERSION, cluster.name()));
    let ready = install::planned(cluster, &args.wanted, TIMEOUT).await?;
    let mut objects = ready.objects;
    objects.extend(ready.pools);
    let found = differences(cluster, &objects, args.force_conflicts).await?;
    let text: String = found.iter().map(|difference| difference.lines.as_str()).collect();
    if text.is_empty() {
        return Ok(());
    }
    output::print(&text);
    Err(Failure::difference())
}

/// What applying these objects would change. Nothing is stored.
pub async fn differences(
    cluster: &Cluster,
    objects: &[DynamicObject],
    force: bool,
) -> Result<Vec<Difference>> {
    let mut found = Vec::new();
    for object in objects {
        let live = present(cluster.api_of(object).get(&object.name_any()).await)?;
        let merged = match cluster.apply(object, DryRun::Server, force).await {
            Ok(merged) => merged,
            Err(error) if is_conflict(&error) => return Err(install::conflict(object, error)),
            // Its namespace or its definition is to come with it.
            Err(kube::Error::Api(status))
                if live.is_none() && (status.is_not_found() || is_missing_resource(&status)) =>
            {
                object.clone()
            }
            Err(error) => return Err(error.into()),
        };
        let (title, kind) = (title(object), object.types.clone().unwrap_or_default().kind);
        let (before, after) = (live.as_ref().map(text).transpose()?.unwrap_or_default(), text(&merged)?);
        if before != after {
            found.push(Difference {
                lines: lines(&title, &before, &after),
                is_new: live.is_none(),
                title,
                kind,
            });
        }
    }
    Ok(found)
}

/// Shows, before they are made, changes of what is there already. Resource definitions are long, and only counted.
pub fn show(changes: &[Difference]) {
    let changed = || changes.iter().filter(|change| !change.is_new);
    if changed().next().is_none() {
        return;
    }
    for change in changes.iter().filter(|change| change.is_new) {
        say(format!("{} is new", change.title));
    }
    changed().filter(|change| change.kind != CRD).for_each(|change| say(change.lines.trim_end()));
    let definitions = changed().filter(|change| change.kind == CRD).count();
    if definitions > 0 {
        say(format!("{} changed; kubectl vip diff shows how", counted(definitions, "resource definition")));
    }
}

/// Asks before what is there already is changed.
pub fn confirm(command: &str, changes: &[Difference], yes: bool) -> Result<()> {
    let changed = || changes.iter().filter(|change| !change.is_new);
    match changed().count() {
        0 => Ok(()),
        count => {
            let agents = changed().any(|change| change.kind == "DaemonSet");
            let then = if agents { " and restarts the agents one by one" } else { "" };
            prompt::confirm(&format!("{command} changes {}{then}. Go on?", counted(count, "object")), yes)
        }
    }
}

fn counted(count: usize, what: &str) -> String {
    format!("{count} {what}{}", if count == 1 { "" } else { "s" })
}

/// An object as a person would write it.
fn text(object: &DynamicObject) -> Result<String> {
    let mut value = serde_json::to_value(object)
        .map_err(|error| Failure::new(format!("an object cannot be shown: {error}")))?;
    if let Some(fields) = value.as_object_mut() {
        fields.remove("status");
    }
    if let Some(metadata) = value.get_mut("metadata").and_then(Value::as_object_mut) {
        VOLATILE.iter().for_each(|field| drop(metadata.remove(*field)));
        if let Some(annotations) = metadata.get_mut("annotations").and_then(Value::as_object_mut) {
            annotations.remove(TEMPLATE_GENERATION);
        }
    }
    output::render_document(&value, Document::Yaml)
}

fn lines(title: &str, before: &str, after: &str) -> String {
    let mut text = String::new();
    let diff = TextDiff::from_lines(before, after);
    // Writing to a String does not fail.
    let _ = write!(
        text,
        "{}",
        diff.unified_diff().header(&format!("installed {title}"), &format!("new {title}"))
    );
    text
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_the_server_counts_is_no_difference() {
        let object = |generation: u32, image: &str| -> DynamicObject {
            serde_json::from_value(json!({
                "apiVersion": "apps/v1", "kind": "DaemonSet", "status": {"numberReady": generation},
                "metadata": {"name": "vip-node", "generation": generation, "uid": generation.to_string(),
                             "annotations": {"a": "b", TEMPLATE_GENERATION: generation.to_string()}},
                "spec": {"image": image, "paused": false},
            }))
            .unwrap()
        };
        assert_eq!(text(&object(1, "a")).unwrap(), text(&object(2, "a")).unwrap());
        let (before, after) = (text(&object(1, "a")).unwrap(), text(&object(2, "b")).unwrap());
        let shown = lines("daemonset.apps/vip-node", &before, &after);
        assert!(
            shown.starts_with("--- installed daemonset.apps/vip-node\n+++ new daemonset.apps/vip-node\n@@ "),
            "{shown}"
        );
        assert!(shown.contains("\n-  image: a\n+  image: b\n"), "{shown}");
        assert!(shown.contains("\n   paused: false\n"), "the lines around it are shown: {shown}");
    }
}
