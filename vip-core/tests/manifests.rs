//! What the hand-written files of `manifests/` must agree with. What they do is tested against an API server.

#![allow(clippy::unwrap_used, reason = "all of this is tests")]

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

fn manifests() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../manifests")
}

#[test]
fn the_image_is_of_this_version() {
    let daemonset = std::fs::read_to_string(manifests().join("daemonset/daemonset.yaml")).unwrap();
    let images: Vec<&str> =
        daemonset.lines().filter_map(|line| line.trim().strip_prefix("image: ")).collect();
    let expected = concat!("ghcr.io/kubectl-vip/vip-node:v", env!("CARGO_PKG_VERSION"));
    assert_eq!(images, [expected; 2], "the image of both containers carries the version of the workspace");
}

#[test]
fn the_kustomization_names_every_file() {
    let text = std::fs::read_to_string(manifests().join("kustomization.yaml")).unwrap();
    let named: BTreeSet<String> =
        text.lines().filter_map(|line| line.strip_prefix("- ")).map(str::to_owned).collect();
    let mut found = BTreeSet::new();
    for folder in std::fs::read_dir(manifests()).unwrap().flatten().filter(|entry| entry.path().is_dir()) {
        for file in std::fs::read_dir(folder.path()).unwrap().flatten() {
            let (folder, file) = (folder.file_name(), file.file_name());
            found.insert(format!("{}/{}", folder.display(), file.display()));
        }
    }
    assert_eq!(named, found);
}
