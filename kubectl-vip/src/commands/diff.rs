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
use crate::exit::{Failure, Result};
use crate::output::{self, say};

/// For how long a namespace that is being deleted is waited for.
const TIMEOUT: Duration = Duration::from_secs(60);
/// What the API server writes, whatever is applied.
const VOLATILE: [&str; 5] = ["managedFields", "resourceVersion", "generation", "uid", "creationTimestamp"];
/// A second count of generations, which the API server keeps for a DaemonSet.
const TEMPLATE_GENERATION: &str = "deprecated.daemonset.template.generation";

/// What applying an object would change.
pub struct Difference {
    /// The object.
    pub title: String,
    /// Whether it is not there yet.
    pub is_new: bool,
    /// The lines that go and come, as `diff --unified` writes them.
    pub lines: String,
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
            Err(kube::Error::Api(status)) if live.is_none() && status.is_not_found() => object.clone(),
            Err(error) => return Err(error.into()),
        };
        let title = title(object);
        let (before, after) = (live.as_ref().map(text).transpose()?.unwrap_or_default(), text(&merged)?);
        if before != after {
            found.push(Difference { lines: lines(&title, &before, &after), is_new: live.is_none(), title });
        }
    }
    Ok(found)
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
