//! What `install` applies: the files of `manifests/`, built into the plugin, and the few values that flags change.

use std::collections::BTreeMap;

use kube::ResourceExt;
use kube::core::DynamicObject;
use serde_json::{Value, json};
use vip_core::api::{DAEMONSET, DEFAULT_NAMESPACE, VIPPool};

use crate::exit::{Failure, Result};

/// The files in the order in which they are applied.
const FILES: [(&str, &str); 12] = [
    ("crd/virtualips.yaml", include_str!("../../manifests/crd/virtualips.yaml")),
    ("crd/vippools.yaml", include_str!("../../manifests/crd/vippools.yaml")),
    ("crd/vipnodes.yaml", include_str!("../../manifests/crd/vipnodes.yaml")),
    ("admission/virtualips.yaml", include_str!("../../manifests/admission/virtualips.yaml")),
    ("admission/vipnodes.yaml", include_str!("../../manifests/admission/vipnodes.yaml")),
    ("admission/vippools.yaml", include_str!("../../manifests/admission/vippools.yaml")),
    ("daemonset/namespace.yaml", include_str!("../../manifests/daemonset/namespace.yaml")),
    ("rbac/agent.yaml", include_str!("../../manifests/rbac/agent.yaml")),
    ("rbac/operator.yaml", include_str!("../../manifests/rbac/operator.yaml")),
    ("rbac/user.yaml", include_str!("../../manifests/rbac/user.yaml")),
    ("rbac/view.yaml", include_str!("../../manifests/rbac/view.yaml")),
    ("daemonset/daemonset.yaml", include_str!("../../manifests/daemonset/daemonset.yaml")),
];

/// The label that every object of ours has, and no other.
pub const LABEL: (&str, &str) = ("app.kubernetes.io/name", "kubectl-vip");
/// Kind of the resource definitions.
pub const CRD: &str = "CustomResourceDefinition";

/// The values that flags change.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Settings {
    /// Namespace of the agents.
    pub namespace: Option<String>,
    /// Image of both containers.
    pub image: Option<String>,
    /// Labels of the nodes that get an agent, beside those of the manifest.
    pub node_selector: BTreeMap<String, String>,
    /// Advertisement interval, as the agents read it.
    pub advert_interval: Option<String>,
    /// Whether the agents send to each other's addresses instead of the multicast group.
    pub unicast: bool,
}

/// The objects, in the order in which they are applied.
pub fn render(settings: &Settings) -> Result<Vec<DynamicObject>> {
    let mut objects = Vec::new();
    for (file, text) in FILES {
        let broken = |error: String| Failure::new(format!("manifest {file} is broken: {error}"));
        let documents: Vec<Value> =
            serde_saphyr::from_multiple(text).map_err(|error| broken(error.to_string()))?;
        for mut document in documents.into_iter().filter(|document| !document.is_null()) {
            change(&mut document, settings);
            objects.push(serde_json::from_value(document).map_err(|error| broken(error.to_string()))?);
        }
    }
    Ok(objects)
}

fn change(object: &mut Value, settings: &Settings) {
    let namespace = settings.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    let kind = object["kind"].as_str().unwrap_or_default().to_owned();
    let is_ours = |value: &Value| value.as_str() == Some(DEFAULT_NAMESPACE);
    if kind == "Namespace" && is_ours(&object["metadata"]["name"]) {
        object["metadata"]["name"] = json!(namespace);
    }
    if is_ours(&object["metadata"]["namespace"]) {
        object["metadata"]["namespace"] = json!(namespace);
    }
    for subject in object.get_mut("subjects").and_then(Value::as_array_mut).into_iter().flatten() {
        if is_ours(&subject["namespace"]) {
            subject["namespace"] = json!(namespace);
        }
    }
    if kind == "DaemonSet" {
        change_pods(&mut object["spec"]["template"]["spec"], settings);
    }
}

fn change_pods(pods: &mut Value, settings: &Settings) {
    for (label, value) in &settings.node_selector {
        pods["nodeSelector"][label] = json!(value);
    }
    for container in pods.get_mut("containers").and_then(Value::as_array_mut).into_iter().flatten() {
        if let Some(image) = &settings.image {
            container["image"] = json!(image);
        }
        if container["name"] != "agent" {
            continue;
        }
        let Some(variables) = container.get_mut("env").and_then(Value::as_array_mut) else { continue };
        for variable in variables.iter_mut().filter(|variable| variable["name"] == "VIP_ADVERT_INTERVAL") {
            if let Some(interval) = &settings.advert_interval {
                variable["value"] = json!(interval);
            }
        }
        if settings.unicast {
            variables.push(json!({"name": "VIP_UNICAST", "value": "true"}));
        }
    }
}

/// Whether this is the agents' DaemonSet.
pub fn is_agents(object: &DynamicObject) -> bool {
    object.types.as_ref().is_some_and(|types| types.kind == "DaemonSet") && object.name_any() == DAEMONSET
}

/// Whether this is an object of that kind.
pub fn is_kind(object: &DynamicObject, kind: &str) -> bool {
    object.types.as_ref().is_some_and(|types| types.kind == kind)
}

/// A pool for server-side apply: only the fields that `install` decides, so that all others stay as they are.
pub fn pool(pool: &VIPPool) -> DynamicObject {
    let resource = kube::core::ApiResource::erase::<VIPPool>(&());
    let mut spec = json!({"addresses": pool.spec.addresses, "virtualRouters": pool.spec.virtual_routers});
    if let Some(interface) = &pool.spec.interface {
        spec["interface"] = json!(interface);
    }
    DynamicObject::new(&pool.name_any(), &resource).data(json!({"spec": spec}))
}

/// Labels as they are written after `--node-selector`: `role=edge,zone=a`.
pub fn labels(text: &str) -> Result<BTreeMap<String, String>> {
    text.split(',')
        .map(|pair| match pair.trim().split_once('=') {
            Some((label, value)) if !label.is_empty() && !value.starts_with('=') && !label.ends_with('!') => {
                Ok((label.to_owned(), value.to_owned()))
            }
            _ => Err(Failure::new(format!("{pair:?} is not a label: write LABEL=VALUE[,LABEL=VALUE]"))),
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn find<'a>(objects: &'a [DynamicObject], kind: &str) -> &'a DynamicObject {
        objects.iter().find(|object| is_kind(object, kind)).unwrap()
    }

    #[test]
    fn every_file_that_kubectl_would_apply_is_here() {
        let kustomization = include_str!("../../manifests/kustomization.yaml");
        let mut listed: Vec<&str> = kustomization
            .lines()
            .filter_map(|line| line.trim().strip_prefix("- "))
            .filter(|entry| entry.ends_with(".yaml"))
            .collect();
        let mut built_in: Vec<&str> = FILES.iter().map(|(file, _)| *file).collect();
        listed.sort_unstable();
        built_in.sort_unstable();
        assert_eq!(listed, built_in);
    }

    #[test]
    fn defaults_change_nothing() {
        let rendered = render(&Settings::default()).unwrap();
        let raw: Vec<DynamicObject> = FILES
            .iter()
            .flat_map(|(_, text)| serde_saphyr::from_multiple::<Value>(text).unwrap())
            .filter(|document| !document.is_null())
            .map(|document| serde_json::from_value(document).unwrap())
            .collect();
        assert_eq!(serde_json::to_value(rendered).unwrap(), serde_json::to_value(raw).unwrap());
    }

    #[test]
    fn all_objects_carry_the_label_by_which_uninstall_knows_them() {
        for object in render(&Settings::default()).unwrap() {
            assert_eq!(
                object.labels().get(LABEL.0).map(String::as_str),
                Some(LABEL.1),
                "{}",
                object.name_any()
            );
        }
    }

    #[test]
    fn flags_reach_every_place() {
        let settings = Settings {
            namespace: Some("edge".into()),
            image: Some("registry.example/vip:1".into()),
            node_selector: labels("role=edge,zone=").unwrap(),
            advert_interval: Some("1000ms".into()),
            unicast: true,
        };
        let objects = render(&settings).unwrap();
        let text = serde_json::to_string(&objects).unwrap();
        assert!(!text.contains(r#""namespace":"kubectl-vip""#), "the old namespace is gone");
        assert_eq!(find(&objects, "Namespace").name_any(), "edge");
        assert_eq!(find(&objects, "ClusterRoleBinding").data["subjects"][0]["namespace"], "edge");
        let agents = objects.iter().find(|object| is_agents(object)).unwrap();
        assert_eq!(agents.namespace().as_deref(), Some("edge"));
        let pods = &agents.data["spec"]["template"]["spec"];
        assert_eq!(pods["nodeSelector"], json!({"kubernetes.io/os": "linux", "role": "edge", "zone": ""}));
        let containers = pods["containers"].as_array().unwrap();
        assert_eq!(containers.len(), 2);
        assert!(containers.iter().all(|container| container["image"] == "registry.example/vip:1"));
        assert!(text.contains(r#"{"name":"VIP_ADVERT_INTERVAL","value":"1000ms"}"#));
        assert_eq!(text.matches(r#"{"name":"VIP_UNICAST","value":"true"}"#).count(), 1, "the agent alone");
    }

    #[test]
    fn the_image_is_of_this_version() {
        let text = serde_json::to_string(&render(&Settings::default()).unwrap()).unwrap();
        assert!(text.contains(concat!("ghcr.io/kubectl-vip/vip-node:v", env!("CARGO_PKG_VERSION"))));
    }

    #[test]
    fn labels_are_pairs() {
        assert!(labels("role").unwrap_err().to_string().contains("not a label"));
        assert!(labels("a==b").is_err());
        assert!(labels("a!=b").is_err());
        assert!(labels("").is_err());
    }
}
