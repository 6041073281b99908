//! `diff` and `upgrade`: what is shown, what is kept, what is refused.

use lab::{Lab, Output, command, paths};

use super::{LIMIT, exclusive, refused, said, vip};

const FLAGS: &str = "--advert-interval 1s --unicast --node-selector role=edge";

/// Installs afresh: nobody else has set a field.
fn install(lab: &Lab, flags: &str) {
    said(lab, "uninstall --yes");
    said(lab, &format!("install --wait=false {flags}"));
}

/// The exit code of `diff` and what it shows.
fn diff(lab: &Lab, flags: &str) -> (i32, String) {
    let output = vip(lab, &format!("diff {flags}")).unwrap();
    (output.code, if output.code > 1 { output.stderr } else { output.stdout })
}

fn agents(lab: &Lab, path: &str) -> String {
    let path = format!("jsonpath={{{path}}}");
    let get = ["get", "daemonset", "vip-node", "-n", "kubectl-vip", "-o", &path];
    lab.kubectl(get).and_then(Output::ok).unwrap().stdout
}

#[test]
fn the_manifests_the_dry_run_and_the_installed_are_one_and_the_same() {
    let (lab, _guard) = exclusive();
    install(lab, "");
    assert_eq!(diff(lab, ""), (0, String::new()));

    let folder = paths::repository().join("manifests").display().to_string();
    let shown = said(lab, "install --dry-run=client -o yaml");
    let file = std::path::Path::new(env!("CARGO_TARGET_TMPDIR")).join("same.yaml");
    std::fs::write(&file, shown).unwrap();
    let file = file.display().to_string();
    // The plain `apply` of both, compared on the server.
    lab.kubectl(["apply", "--dry-run=server", "-f", &file]).and_then(Output::ok).unwrap();
    for source in [["-k", &folder], ["-f", &file]] {
        let compare = ["diff", "--server-side", "--field-manager=other"];
        let found = lab.kubectl(compare.iter().copied().chain(source)).unwrap();
        assert_eq!((found.code, found.stdout.as_str()), (0, ""), "{found:#?}");
    }
    lab.kubectl(["apply", "--server-side", "-k", &folder]).and_then(Output::ok).unwrap();
    assert_eq!(diff(lab, ""), (0, String::new()));
}

#[test]
fn a_difference_is_shown_and_a_failure_is_something_else() {
    let (lab, _guard) = exclusive();
    install(lab, FLAGS);
    assert_eq!(diff(lab, FLAGS), (0, String::new()));
    assert_eq!(diff(lab, ""), (0, String::new()), "what no flag names stays");
    let defaults = "--unicast=false --advert-interval 100ms --node-selector kubernetes.io/os=linux";
    let (code, text) = diff(lab, &format!("{defaults} --pool other=10.98.64.0/30"));
    assert_eq!(code, 1, "{text}");
    for line in [
        "--- installed daemonset.apps/vip-node",
        "+++ new daemonset.apps/vip-node",
        "-        - name: VIP_UNICAST",
        "-          value: 1000ms",
        "+          value: 100ms",
        "-        role: edge",
        "+++ new vippool.kubectl-vip.io/other",
        "+  - 10.98.64.0/30",
    ] {
        assert!(text.lines().any(|one| one == line), "{line}: {text}");
    }
    assert!(!text.contains("clusterrole"), "what stays is not shown: {text}");
    assert_eq!(agents(lab, ".spec.template.spec.nodeSelector.role"), "edge", "nothing is changed");

    assert_eq!(diff(lab, "--kubeconfig /nonexistent").0, 2);
    assert_eq!(diff(lab, "--bogus").0, 2);
    let (code, said) = diff(lab, "--as bob");
    assert!(code == 2 && said.contains("Error from server (Forbidden): user \"bob\" cannot"), "{said}");
}

#[test]
fn an_upgrade_keeps_the_settings_and_asks_first() {
    let (lab, _guard) = exclusive();
    install(lab, &format!("--image registry.example/vip-node:v0.0.9 {FLAGS}"));
    let unasked = refused(lab, "upgrade");
    for words in [
        "-> v0.1.0 in namespace kubectl-vip of context ",
        "\n-        image: registry.example/vip-node:v0.0.9\n+        image: registry.example/vip-node:v0.1.0\n",
        "upgrade changes 1 object and restarts the agents one by one, and there is no terminal to ask at\nhint: say yes beforehand: --yes",
    ] {
        assert!(unasked.contains(words), "{words}: {unasked}");
    }
    for (flag, suffix) in [("--dry-run=server", "(server dry run)"), ("--dry-run", "(dry run)")] {
        let dry = said(lab, &format!("upgrade {flag}"));
        assert!(dry.contains(&format!("daemonset.apps/vip-node serverside-applied {suffix}\n")), "{dry}");
    }
    let image = ".spec.template.spec.containers[*].image";
    assert_eq!(agents(lab, image), "registry.example/vip-node:v0.0.9 registry.example/vip-node:v0.0.9");

    let done = said(lab, "upgrade --yes --wait=false");
    assert!(
        done.contains("daemonset.apps/vip-node serverside-applied\n")
            && !done.contains("vippool.kubectl-vip.io/"),
        "{done}"
    );
    assert_eq!(agents(lab, image), "registry.example/vip-node:v0.1.0 registry.example/vip-node:v0.1.0");
    let kept = diff(lab, &format!("--image registry.example/vip-node:v0.1.0 {FLAGS}"));
    assert_eq!(kept, (0, String::new()), "the settings are those of the install");
    let again = vip(lab, "upgrade --wait=false").and_then(Output::ok).unwrap();
    assert!(again.stdout.is_empty() && again.stderr.ends_with("Nothing is to be changed.\n"), "{again:#?}");
}

#[test]
fn an_upgrade_never_goes_back_by_itself() {
    let (lab, _guard) = exclusive();
    install(lab, "--image registry.example/vip-node:v9.0.0");
    assert_eq!(
        refused(lab, "upgrade --yes"),
        "Error: plugin v0.1.0, agent v9.0.0: the agents are newer, nothing changed\n\
         hint: bring the plugin up first: kubectl krew upgrade vip\n\
         hint: or go back to the plugin's version: kubectl vip upgrade --allow-downgrade"
    );
    let install = refused(lab, "install --yes");
    assert!(
        install.contains("\nError: plugin v0.1.0, agent v9.0.0: the agents are newer, nothing changed\n"),
        "{install}"
    );
    said(lab, "upgrade --yes --allow-downgrade --wait=false");
    said(lab, "install --wait=false --yes --image registry.example/vip-node:latest");
    let unnamed = refused(lab, "upgrade --yes");
    assert!(
        unnamed.contains("\"registry.example/vip-node:latest\", whose name does not say a version"),
        "{unnamed}"
    );

    said(lab, "uninstall --yes");
    assert_eq!(
        refused(lab, "upgrade --yes"),
        "Error: no vip-node found in any namespace\nhint: kubectl vip install"
    );
    let all = diff(lab, "");
    assert_eq!(all.0, 1, "what is not there is all new");
    assert!(all.1.contains("+++ new daemonset.apps/vip-node\n"), "{}", all.1);
    let mut kubectl = lab.kubectl_command().unwrap();
    let nothing = command::run(kubectl.args(["get", "namespace", "kubectl-vip"]), LIMIT).unwrap();
    assert!(!nothing.success(), "diff stores nothing");
}
