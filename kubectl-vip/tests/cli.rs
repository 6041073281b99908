//! Runs of the program that need no cluster: help, dry runs, mistakes in the arguments, no cluster at all.

#![allow(clippy::unwrap_used, reason = "all of this is tests")]

use std::process::{Command, Output};

fn run(line: &str) -> Output {
    Command::new(env!("CARGO_BIN_EXE_kubectl-vip"))
        .args(line.split_whitespace())
        .env("KUBECONFIG", "")
        .env("HOME", "/nonexistent")
        .env_remove("KUBERNETES_SERVICE_HOST")
        .output()
        .unwrap()
}

fn stdout(line: &str) -> String {
    let output = run(line);
    assert!(output.status.success(), "{output:?}");
    String::from_utf8(output.stdout).unwrap()
}

/// What is said on stderr; wants exit code 1 and nothing on stdout.
fn refused(line: &str) -> String {
    let output = run(line);
    assert_eq!(output.status.code(), Some(1), "{output:?}");
    assert!(output.stdout.is_empty(), "{output:?}");
    String::from_utf8(output.stderr).unwrap()
}

#[test]
fn help_speaks_of_kubectl_vip_and_names_every_command() {
    let help = stdout("--help");
    assert!(help.contains("Usage: kubectl vip [OPTIONS] <COMMAND>"), "{help}");
    for command in [
        "install",
        "upgrade",
        "diff",
        "uninstall",
        "import",
        "completion",
        "expose",
        "unexpose",
        "status",
        "check",
        "explain",
        "move",
        "rebalance",
        "pool",
        "node",
        "version",
    ] {
        assert!(help.lines().any(|line| line.starts_with(&format!("  {command} "))), "{command}: {help}");
    }
    for flag in [
        "kubeconfig",
        "context",
        "cluster",
        "user",
        "namespace",
        "server",
        "token",
        "as",
        "as-group",
        "as-uid",
        "certificate-authority",
        "client-certificate",
        "client-key",
        "insecure-skip-tls-verify",
        "tls-server-name",
        "request-timeout",
    ] {
        assert!(help.contains(&format!("--{flag}")), "{flag}: {help}");
    }
    let short = stdout("expose -h");
    assert!(short.contains("kubectl vip expose svc/web -n shop"), "{short}");
    assert!(!short.contains("--client-key"), "the long list is for --help: {short}");
}

#[test]
fn a_client_dry_run_shows_each_object_and_is_the_same_each_time() {
    let lines = stdout("install --dry-run=client --pool lab=192.168.10.240/28");
    assert!(
        lines.starts_with(
            "customresourcedefinition.apiextensions.k8s.io/virtualips.kubectl-vip.io serverside-applied (dry run)\n"
        ),
        "definitions come first: {lines}"
    );
    assert!(
        lines.ends_with(
            "daemonset.apps/vip-node serverside-applied (dry run)\nvippool.kubectl-vip.io/lab serverside-applied (dry run)\n"
        ),
        "pools come last: {lines}"
    );
    for format in ["yaml", "json"] {
        let line = format!(
            "install --dry-run=client -o {format} --namespace edge --image registry.example/vip:1 --node-selector role=edge \
             --advert-interval 1s --interface eth1 --pool lab=192.168.10.240/28,192.168.10.9"
        );
        let text = stdout(&line);
        assert_eq!(text, stdout(&line));
        for word in ["registry.example/vip:1", "1000ms", "eth1", "192.168.10.9", "edge"] {
            assert!(text.contains(word), "{word}");
        }
        assert!(!text.contains("ghcr.io"), "no container keeps another image");
    }
}

#[test]
fn mistakes_are_told_before_any_cluster_is_looked_for() {
    for (line, sentence) in [
        (
            "install --dry-run --pool lab=192.168.10.240/33",
            "Error: \"192.168.10.240/33\": an IPv4 prefix is 0 to 32\n",
        ),
        (
            "install --dry-run --pool lab",
            "Error: --pool \"lab\" is not NAME=RANGE\nhint: such as --pool lab=192.168.10.240/28\n",
        ),
        (
            "install --dry-run --interface eth1",
            "Error: --interface is for the pools that --pool creates, and there is none\n\
             hint: kubectl vip pool create NAME RANGE --interface IF\n",
        ),
        (
            "install --dry-run --node-selector edge",
            "Error: \"edge\" is not a label: write LABEL=VALUE[,LABEL=VALUE]\n",
        ),
        (
            "status",
            "Error: no cluster configured: $KUBECONFIG unset, ~/.kube/config not found\n\
             hint: name a kubeconfig file with --kubeconfig\n",
        ),
        ("status --kubeconfig /nonexistent/x", "Error: kubeconfig file /nonexistent/x does not exist\n"),
        (
            "status -s https://127.0.0.1:1",
            "Error: the API server at https://127.0.0.1:1 does not answer: connection refused\n",
        ),
        (
            "status -s https://127.0.0.1:1 --as-group admins",
            "Error: --as-group, --as-uid and --as-user-extra impersonate a user: name it with --as\n",
        ),
    ] {
        assert_eq!(refused(line), sentence, "{line}");
    }
    for (line, words) in [
        ("expsoe svc/web", "Error: unrecognized subcommand 'expsoe'"),
        ("expsoe svc/web", "'expose'"),
        ("expose", "svc/NAME"),
        ("expose svc/web --pool a --ip 10.0.0.1", "cannot be used with"),
        ("expose svc/web --scheduler random", "an IPVS scheduler is one of rr"),
        ("expose svc/web --persistence soon", "is not a duration such as 90s"),
        ("install --skip-checks VIP3", "there is no such code"),
        ("install --advert-interval 1ms", "an advertisement interval is 10ms to 40s"),
        ("status --dry-run", "unexpected argument '--dry-run'"),
    ] {
        let said = refused(line);
        assert!(said.starts_with("Error: ") && said.contains(words), "{line}: {said}");
    }
}

#[test]
fn the_version_of_the_client_needs_no_cluster() {
    let version = concat!("v", env!("CARGO_PKG_VERSION"));
    assert_eq!(stdout("version --client"), format!("Client Version: {version}\n"));
    assert_eq!(stdout("version --client -o json"), format!("{{\n    \"clientVersion\": \"{version}\"\n}}\n"));
    let both = run("version");
    assert_eq!(both.status.code(), Some(1));
    assert_eq!(String::from_utf8(both.stdout).unwrap(), format!("Client Version: {version}\n"));
}

#[test]
fn a_failure_of_diff_is_not_a_difference() {
    for line in ["diff", "diff --bogus", "-n shop diff --pool lab"] {
        let output = run(line);
        assert_eq!((output.status.code(), output.stdout.len()), (Some(2), 0), "{line}: {output:?}");
    }
}

#[test]
fn the_picture_of_the_help_shows_what_the_help_says() {
    let picture = std::fs::read_to_string("../docs/pictures/help.svg").unwrap();
    let pieces = picture.lines().filter(|line| line.starts_with("<text ")).map(|line| {
        let text = line.split_once('>').unwrap().1.strip_suffix("</text>").unwrap();
        text.replace("&lt;", "<").replace("&gt;", ">").replace("&amp;", "&")
    });
    let shown: String = pieces.collect();
    // A terminal has other line ends than a pipe.
    let letters = |text: &str| text.split_whitespace().collect::<String>();
    let said = format!("$ kubectl vip --help {}", stdout("--help"));
    assert!(
        letters(&shown) == letters(&said),
        "docs/pictures/help.svg is old: `target/debug/lab pictures --help-only` draws it again"
    );
}

#[test]
fn help_says_what_was_called() {
    let folder = std::path::Path::new(env!("CARGO_TARGET_TMPDIR"));
    let other = folder.join("lan-vip");
    let _ = std::fs::remove_file(&other);
    std::fs::hard_link(env!("CARGO_BIN_EXE_kubectl-vip"), &other).unwrap();
    let help = |program: &std::path::Path, name: &str| {
        let mut command = Command::new(program);
        #[cfg(unix)]
        std::os::unix::process::CommandExt::arg0(&mut command, name);
        String::from_utf8(command.args(["pool", "create", "--help"]).output().unwrap().stdout).unwrap()
    };
    let plugin = std::path::Path::new(env!("CARGO_BIN_EXE_kubectl-vip"));
    for (text, name) in [
        (help(plugin, "/usr/local/bin/kubectl-vip"), "kubectl vip"),
        (help(plugin, "kubectl-vip"), "kubectl-vip"),
        (help(&other, "lan-vip"), "lan-vip"),
    ] {
        assert!(text.contains(&format!("Usage: {name} pool create [OPTIONS] <NAME> <RANGE>...")), "{text}");
        assert!(text.contains(&format!("\n  {name} pool create lab 192.168.10.240/28\n")), "{text}");
    }
}

#[test]
fn completion_scripts_are_those_of_their_shells() {
    for (shell, mark) in [
        ("bash", " -o bashdefault -o default kubectl-vip\n"),
        ("zsh", "#compdef kubectl-vip"),
        ("fish", "complete -c kubectl-vip"),
        ("powershell", "Register-ArgumentCompleter -Native -CommandName 'kubectl-vip'"),
        ("kubectl", "#!/bin/sh\n"),
    ] {
        let script = stdout(&format!("completion {shell}"));
        assert!(script.contains(mark), "{shell}: {mark} is missing");
        assert_eq!(script.contains("scheduler"), shell != "kubectl", "{shell}");
    }
    // No terminal, no cluster, nothing on stderr.
    let offered = run("__complete expose --po");
    assert!(offered.stderr.is_empty() && offered.status.success(), "{offered:?}");
    assert_eq!(String::from_utf8(offered.stdout).unwrap(), "--pool\tDraw the address from this pool\n:4\n");
}
