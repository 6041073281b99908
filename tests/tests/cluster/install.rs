//! What `install` puts on the cluster: small, unprivileged, and fine to run twice.

use std::{fs, time::Duration};

use anyhow::{Result, ensure};
use lab::image;
use serde_json::{Value, json};

use super::{POOL, check, installed};

#[test]
fn the_image_is_small_and_its_containers_have_two_capabilities() {
    check(|| {
        let lab = installed()?;
        let size = fs::metadata(image::product_archive())?.len();
        ensure!(size <= 10_000_000, "the image has {size} bytes");
        let pods = lab.kubectl(["get", "pods", "-n", "kubectl-vip", "-o", "json"])?.ok()?;
        let pods: Value = serde_json::from_str(&pods.stdout)?;
        let items = pods["items"].as_array().cloned().unwrap_or_default();
        ensure!(items.len() == 3, "{} pods", items.len());
        for container in
            items.iter().flat_map(|pod| pod["spec"]["containers"].as_array().cloned().unwrap_or_default())
        {
            let context = &container["securityContext"];
            ensure!(
                context["capabilities"] == json!({"drop": ["ALL"], "add": ["NET_ADMIN", "NET_RAW"]}),
                "{context}"
            );
            ensure!(context["readOnlyRootFilesystem"] == true && context["privileged"] != true, "{context}");
        }
        Ok(())
    });
}

#[test]
fn a_second_install_changes_nothing() {
    check(|| {
        let lab = installed()?;
        let generation = || -> Result<String> {
            let path = "jsonpath={.metadata.generation}";
            Ok(lab.kubectl(["get", "daemonset", "vip-node", "-n", "kubectl-vip", "-o", path])?.ok()?.stdout)
        };
        let before = generation()?;
        lab.kubectl_for(Duration::from_secs(120), ["vip", "install", "--pool", POOL])?.ok()?;
        ensure!(generation()? == before, "the DaemonSet changed");
        Ok(())
    });
}
