//! Completion through kubectl's own mechanism, and what else `kubectl vip completion` prints.

use std::{
    env, fs,
    os::unix::fs::PermissionsExt,
    path::Path,
    sync::Once,
    time::{Duration, Instant},
};

use lab::{Lab, Output, command, paths};

use super::{
    LIMIT,
    agents::{ago, gone, node, report},
    installed, namespace, pool, said,
};

/// What kubectl offers for the last word, a line for each, and what it tells the shell.
fn offered(lab: &Lab, words: &[&str]) -> Vec<String> {
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("completion");
    let shim = folder.join("kubectl_complete-vip");
    let mut kubectl = lab.kubectl_command().unwrap();
    let path = [folder.display().to_string(), paths::target().join("debug").display().to_string()];
    kubectl.env("PATH", format!("{}:{}", path.join(":"), env::var("PATH").unwrap()));
    assert!(shim.exists());
    let output =
        command::run(kubectl.args(["__complete", "vip"]).args(words), LIMIT).and_then(Output::ok).unwrap();
    // kubectl itself tells what it does.
    let mut talk = output.stderr.lines().filter(|line| !line.starts_with("[Debug] "));
    assert!(
        talk.all(|line| line.starts_with("Completion ended with directive")),
        "nothing is said: {output:#?}"
    );
    output.stdout.lines().map(str::to_owned).collect()
}

/// Wants exactly these lines, which are read from the cluster. A busy machine may take longer than anybody waits for a
/// completion, and gets none: then the key is pressed again.
#[track_caller]
fn names(lab: &Lab, words: &[&str], wanted: &[&str]) {
    let mut found = Vec::new();
    for _ in 0..5 {
        found = offered(lab, words);
        if found == wanted {
            return;
        }
    }
    panic!("{words:?} are completed by {found:#?}, not by {wanted:#?}");
}

/// Puts the program that kubectl asks where a person would; once, as another test may be running it.
fn shim(lab: &Lab) {
    static DONE: Once = Once::new();
    DONE.call_once(|| {
        let folder = Path::new(env!("CARGO_TARGET_TMPDIR")).join("completion");
        fs::create_dir_all(&folder).unwrap();
        let shim = folder.join("kubectl_complete-vip");
        fs::write(&shim, said(lab, "completion kubectl")).unwrap();
        fs::set_permissions(&shim, fs::Permissions::from_mode(0o755)).unwrap();
    });
}

#[test]
fn kubectl_completes_commands_flags_and_names_in_the_cluster() {
    let (lab, _guard) = installed();
    shim(lab);
    namespace(lab, "complete", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "complete", "10.98.20.1-10.98.20.4");
    report(lab, "complete-1", &node("10.98.20.200/24", 20, &ago(0), "Backup"));
    said(lab, "expose svc/web -n complete --ip 10.98.20.2 --wait=false");

    let all = offered(lab, &[""]);
    for line in
        ["expose\tGive a Service a virtual IP", "pool\tList, create and delete pools of addresses", ":4"]
    {
        assert!(all.iter().any(|one| one == line), "{line}: {all:#?}");
    }
    assert_eq!(offered(lab, &["un"]).len(), 3, "unexpose, uninstall and what the shell does");
    names(lab, &["expose", "-n", "complete", "svc/"], &["svc/api", "svc/web", ":4"]);
    names(lab, &["-n", "complete", "expose", "svc/w"], &["svc/web", ":4"]);
    names(lab, &["expose", "--namespace=complete", "svc", "a"], &["api", ":4"]);
    names(lab, &["status", "-n", "compl"], &["complete", ":4"]);
    names(lab, &["expose", "svc/api", "--pool", "compl"], &["complete\t10.98.20.1-10.98.20.4", ":4"]);
    names(lab, &["pool", "delete", "compl"], &["complete\t10.98.20.1-10.98.20.4", ":4"]);
    names(lab, &["move", "10.98.20.2", "--to", "complete-"], &["complete-1", ":4"]);
    names(lab, &["node", "drain", "complete-"], &["complete-1", ":4"]);
    names(lab, &["unexpose", "-n", "complete", "svc/"], &["svc/web\t10.98.20.2", ":4"]);
    names(lab, &["status", "10.98.20."], &["10.98.20.2\tcomplete/web", ":4"]);
    let context = lab.kubectl(["config", "current-context"]).unwrap().text().to_owned();
    assert!(offered(lab, &["status", "--context", ""]).contains(&context));
    assert_eq!(offered(lab, &["expose", "--kubeconfig", ""]), [":0"]);

    gone(lab, &["complete-1"]);
    said(lab, "unexpose svc/web -n complete");
    said(lab, "pool delete complete");
}

#[test]
fn a_cluster_that_does_not_answer_offers_nothing_and_keeps_nobody_waiting() {
    let (lab, _guard) = installed();
    shim(lab);
    // Takes connections and never speaks.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = format!("--server=https://{}", silent.local_addr().unwrap());
    let start = Instant::now();
    assert_eq!(offered(lab, &[&server, "status", "-n", ""]), [":4"]);
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    assert_eq!(offered(lab, &["--token=wrong", "--user=", "status", "--as=nobody", "-n", ""]), [":4"]);
}
