//! `manifests/crd` holds the types of `vip-core::api` as the API server reads them. Here the two are compared, and
//! rewritten when `UPDATE_CRDS` is set.

#![allow(clippy::unwrap_used, reason = "all of this is tests")]

use std::path::Path;

use k8s_openapi::apiextensions_apiserver::pkg::apis::apiextensions::v1::CustomResourceDefinition;
use kube::CustomResourceExt;
use vip_core::api::{VIPNode, VIPPool, VirtualIP};

const HEADER: &str =
    "# Generated from vip-core/src/api.rs by `UPDATE_CRDS=1 cargo test -p vip-core --test crds`.\n";

#[test]
fn files_hold_the_types() {
    for crd in [VirtualIP::crd(), VIPPool::crd(), VIPNode::crd()] {
        compare(crd);
    }
}

fn compare(mut crd: CustomResourceDefinition) {
    let labels =
        ["name", "part-of"].map(|key| (format!("app.kubernetes.io/{key}"), "kubectl-vip".to_owned()));
    crd.metadata.labels = Some(labels.into());
    let path = Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../manifests/crd")
        .join(format!("{}.yaml", crd.spec.names.plural));
    let wanted = format!("{HEADER}{}", serde_saphyr::to_string(&crd).unwrap());
    if std::env::var_os("UPDATE_CRDS").is_some() {
        std::fs::write(&path, &wanted).unwrap();
    }
    let found = std::fs::read_to_string(&path).unwrap_or_default();
    assert!(
        found == wanted,
        "{} is not what the types say; run `UPDATE_CRDS=1 cargo test -p vip-core --test crds` and commit the result",
        path.display()
    );
}
