//! The release for krew, read by programs of others: every rule of krew for archives and manifests, and the plugin that
//! comes out of an archive.
//!
//! `KREW_RELEASE` names the folder of a release to be checked; without it one is packed from the plugin of this build.

use std::{
    collections::BTreeSet,
    env, fs,
    path::{Path, PathBuf},
    process::Command,
    sync::OnceLock,
};

use lab::{
    Output, binaries, command,
    krew::{self, CHECKSUMS, MANIFEST, Platform},
    paths,
};
use serde_json::Value;

use super::{LIMIT, scratch};

/// What an archive holds: the kind of the file and its permissions as `ls` writes them, its name.
type Listing = Vec<(String, String)>;

fn run(program: &str, arguments: &[&str]) -> String {
    command::run(Command::new(program).args(arguments), LIMIT).and_then(Output::ok).unwrap().stdout
}

fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// The release in question.
fn release() -> &'static Path {
    static RELEASE: OnceLock<PathBuf> = OnceLock::new();
    RELEASE
        .get_or_init(|| env::var_os("KREW_RELEASE").map_or_else(|| packed(&scratch("krew")), PathBuf::from))
}

/// Packs this build, and for Windows something that is not looked into.
fn packed(folder: &Path) -> PathBuf {
    let plugin = folder.join("kubectl-vip");
    let built = paths::target().join("debug/kubectl-vip");
    run("strip", &["-o", text(&plugin), text(&built)]);
    let windows = folder.join("kubectl-vip.exe");
    fs::write(&windows, "not a program").unwrap();
    let other = krew::PLATFORMS.into_iter().find(|platform| platform.os == "windows").unwrap();
    let release = folder.join("release");
    krew::release(&[(Platform::here().unwrap(), plugin), (other, windows)], &release).unwrap();
    release
}

fn list(archive: &Path) -> Listing {
    if archive.extension().is_some_and(|ending| ending == "zip") {
        let script = "import stat, sys, zipfile\n\
                      for i in zipfile.ZipFile(sys.argv[1]).infolist(): print(stat.filemode(i.external_attr >> 16), i.filename)";
        let lines = run("python3", &["-c", script, text(archive)]);
        return lines
            .lines()
            .map(|line| line.split_once(' ').unwrap())
            .map(|(mode, name)| (mode.to_owned(), name.to_owned()))
            .collect();
    }
    let lines = run("tar", &["--list", "--verbose", "--gzip", "--numeric-owner", "--file", text(archive)]);
    let parts = |line: &str| {
        let words: Vec<&str> = line.split_whitespace().collect();
        assert_eq!(words[1], "0/0", "nobody's user is in it: {line}");
        (words[0].to_owned(), words[5..].join(" "))
    };
    lines.lines().map(parts).collect()
}

#[test]
fn archives_and_manifest_follow_krews_rules() {
    let release = release();
    let manifest: Value =
        serde_saphyr::from_str(&fs::read_to_string(release.join(MANIFEST)).unwrap()).unwrap();
    assert_eq!(manifest["apiVersion"], "krew.googlecontainertools.github.com/v1alpha2");
    assert_eq!(manifest["kind"], "Plugin");
    let name = manifest["metadata"]["name"].as_str().unwrap();
    assert_eq!(format!("{name}.yaml"), MANIFEST);
    let spec = &manifest["spec"];
    assert_eq!(spec["version"], krew::tag().as_str());
    let numbers: Vec<u32> = krew::tag()[1..].split('.').map(|number| number.parse().unwrap()).collect();
    assert!(krew::tag().starts_with('v') && numbers.len() == 3, "vX.Y.Z");
    let short = spec["shortDescription"].as_str().unwrap();
    assert!(short.chars().count() <= 50 && !short.contains('\n') && !short.ends_with('.'), "{short}");
    assert!(spec["homepage"].as_str().unwrap().starts_with("https://"));
    assert!(spec["description"].as_str().is_some_and(|text| !text.is_empty()));
    let known = ["version", "homepage", "shortDescription", "description", "caveats", "platforms"];
    assert!(spec.as_object().unwrap().keys().all(|key| known.contains(&key.as_str())), "{spec}");

    let mut named = BTreeSet::from([CHECKSUMS.to_owned(), MANIFEST.to_owned()]);
    let mut selectors = BTreeSet::new();
    for platform in spec["platforms"].as_array().unwrap() {
        let labels = &platform["selector"]["matchLabels"];
        let (os, arch) = (labels["os"].as_str().unwrap(), labels["arch"].as_str().unwrap());
        assert!(
            ["linux", "darwin", "windows"].contains(&os) && ["amd64", "arm64"].contains(&arch),
            "{labels}"
        );
        assert!(selectors.insert((os, arch)), "{os}-{arch} is there twice");
        let uri = platform["uri"].as_str().unwrap();
        let (folder, archive) = uri.rsplit_once('/').unwrap();
        assert!(folder.starts_with("https://") && folder.ends_with(&krew::tag()), "{uri}");
        assert_eq!(archive.ends_with(".zip"), os == "windows", "{archive}");
        assert!(archive.ends_with(".zip") || archive.ends_with(".tar.gz"), "{archive}");
        let path = release.join(archive);
        let sum = run("sha256sum", &[text(&path)]);
        assert_eq!(platform["sha256"].as_str().unwrap(), sum.split(' ').next().unwrap());
        let bin = platform["bin"].as_str().unwrap();
        let expected = [("-rw-r--r--", "LICENSE"), ("-rwxr-xr-x", bin)];
        let expected: Listing = expected.map(|(mode, name)| (mode.to_owned(), name.to_owned())).to_vec();
        assert_eq!(list(&path), expected, "{archive}: two plain files, no links");
        named.insert(archive.to_owned());
    }
    let there: BTreeSet<String> = fs::read_dir(release)
        .unwrap()
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    assert_eq!(there, named, "a release holds what its manifest names");
    let mut check = Command::new("sha256sum");
    check.current_dir(release).args(["--check", "--strict", CHECKSUMS]);
    command::run(&mut check, LIMIT).and_then(Output::ok).unwrap();
}

#[test]
fn the_same_binaries_give_the_same_bytes() {
    let folder = scratch("krew-twice");
    let (old, new) = (folder.join("old"), folder.join("new"));
    fs::write(&old, "program").unwrap();
    run("cp", &[text(&old), text(&new)]);
    // Times and permissions of the files say nothing.
    run("touch", &["--date=2001-01-01", text(&old)]);
    run("chmod", &["700", text(&old)]);
    for (binary, output) in [(&old, "one"), (&new, "two")] {
        let binaries = krew::PLATFORMS.map(|platform| (platform, binary.clone()));
        krew::release(&binaries, &folder.join(output)).unwrap();
    }
    run("diff", &["--recursive", text(&folder.join("one")), text(&folder.join("two"))]);
}

#[test]
fn an_archive_is_a_working_plugin_in_an_empty_root() {
    let archive = release().join(Platform::here().unwrap().archive());
    let root = scratch("krew-root");
    run("tar", &["--extract", "--gzip", "--file", text(&archive), "--directory", text(&root)]);
    let plugin = root.join("kubectl-vip");
    let sections = run("readelf", &["--sections", "--wide", text(&plugin)]);
    assert!(!sections.contains(".symtab") && !sections.contains(".debug_info"), "stripped: {sections}");
    let license = fs::read_to_string(root.join("LICENSE")).unwrap();
    assert_eq!(license, fs::read_to_string(paths::repository().join("LICENSE")).unwrap());

    // The libraries that it names, none for one of a release.
    let libraries = command::run(Command::new("ldd").arg(&plugin), LIMIT).unwrap().stdout;
    for library in libraries.split_whitespace().filter(|word| word.starts_with('/')) {
        let copy = root.join(library.trim_start_matches('/'));
        fs::create_dir_all(copy.parent().unwrap()).unwrap();
        fs::copy(library, copy).unwrap();
    }
    let inside = |words: &[&str]| run("chroot", &[&[text(&root), "/kubectl-vip"], words].concat());
    assert_eq!(inside(&["version", "--client"]), format!("Client Version: {}\n", krew::tag()));
    assert!(
        inside(&["install", "--dry-run=client"])
            .contains("daemonset.apps/vip-node serverside-applied (dry run)\n")
    );

    let mut kubectl = Command::new(binaries::path("kubectl").unwrap());
    let listed = command::run(kubectl.args(["plugin", "list"]).env("PATH", &root), LIMIT).unwrap();
    assert_eq!((listed.code, listed.stderr.as_str()), (0, ""), "kubectl has nothing to complain about");
    assert!(listed.stdout.lines().any(|line| line == text(&plugin)), "{listed:#?}");
    let mut kubectl = Command::new(binaries::path("kubectl").unwrap());
    let help = command::run(kubectl.args(["vip", "expose", "--help"]).env("PATH", &root), LIMIT).unwrap();
    assert!(help.stdout.contains("Usage: kubectl vip expose [OPTIONS] <svc/NAME>"), "{help:#?}");
}

#[test]
fn the_workflow_builds_every_platform() {
    let workflow = paths::repository().join(".github/workflows/release.yml");
    let workflow: Value = serde_saphyr::from_str(&fs::read_to_string(workflow).unwrap()).unwrap();
    let rows = workflow["jobs"]["build"]["strategy"]["matrix"]["include"].as_array().unwrap();
    let built: BTreeSet<(String, &str)> = rows
        .iter()
        .map(|row| (row["platform"].as_str().unwrap().to_owned(), row["target"].as_str().unwrap()))
        .collect();
    let wanted: BTreeSet<(String, &str)> =
        krew::PLATFORMS.iter().map(|platform| (platform.name(), platform.triple)).collect();
    assert_eq!(built, wanted);
    let template = fs::read_to_string(paths::repository().join("krew").join(MANIFEST)).unwrap();
    for platform in krew::PLATFORMS {
        assert_eq!(
            template.matches(&format!("/{}\"", platform.archive())).count(),
            1,
            "{}",
            platform.archive()
        );
    }
}
