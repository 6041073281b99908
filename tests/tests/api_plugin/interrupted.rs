//! Commands that are cut off after any of their requests, by Ctrl-C or because the API server is gone: what was done is said,
//! and running them again finishes.

use std::{
    io::{BufRead as _, BufReader, Read as _},
    net::{Shutdown, TcpListener, TcpStream},
    os::unix::process::ExitStatusExt as _,
    process::{Child, Stdio},
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread,
};

use lab::{Lab, Output, command};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use serde_json::json;

use super::{
    agents::{backups, gone},
    exclusive, join, namespace, pool, said, server, vip,
};

/// Stands between the plugin and the API server until it is cut.
struct Relay {
    port: u16,
    open: Arc<Mutex<Vec<TcpStream>>>,
    cut: Arc<AtomicBool>,
}

impl Relay {
    fn new(server: &str) -> Self {
        let server = server.to_owned();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let (open, cut) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let this = Self { port, open: Arc::clone(&open), cut: Arc::clone(&cut) };
        thread::spawn(move || {
            for near in listener.incoming().map_while(Result::ok) {
                if cut.load(Ordering::Relaxed) {
                    return;
                }
                let Ok(far) = TcpStream::connect(&server) else { continue };
                join(&near, &far);
                open.lock().unwrap_or_else(PoisonError::into_inner).extend([near, far]);
            }
        });
        this
    }

    /// From now on nobody answers.
    fn cut(&self) {
        if self.cut.swap(true, Ordering::Relaxed) {
            return;
        }
        // Wakes the listener, which goes.
        let _ = TcpStream::connect(("127.0.0.1", self.port));
        for end in self.open.lock().unwrap_or_else(PoisonError::into_inner).drain(..) {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

impl Drop for Relay {
    fn drop(&mut self) {
        self.cut();
    }
}

/// Runs a command and strikes when `now` says so of a line on stderr and of the number of requests told of. `None` when it never
/// did.
fn struck(
    lab: &Lab,
    line: &str,
    extra: &[String],
    now: impl Fn(usize, &str) -> bool,
    strike: impl Fn(&Child),
) -> Option<Output> {
    let mut kubectl = lab.kubectl_command().unwrap();
    kubectl.arg("vip").args(line.split_whitespace()).args(extra).args(["-v", "6"]);
    let mut child =
        command::spawn(kubectl.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped())).unwrap();
    let (mut requests, mut stderr, mut stdout) = (0, String::new(), String::new());
    let mut hit = false;
    let lines = BufReader::new(child.stderr.take().unwrap());
    for told in lines.lines().map_while(Result::ok) {
        let request = told.ends_with(" milliseconds");
        requests += usize::from(request);
        if !hit && now(requests, &told) {
            hit = true;
            strike(&child);
        }
        if !request {
            stderr.push_str(&told);
            stderr.push('\n');
        }
    }
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let status = child.wait().unwrap();
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    hit.then(|| Output { command: line.to_owned(), code, stdout, stderr })
}

/// The API server is gone after so many requests.
fn deserted(lab: &Lab, line: &str, after: usize) -> Option<Output> {
    let relay = Relay::new(&server(lab));
    struck(lab, line, &through(&relay), |requests, _| requests == after, |_| relay.cut())
}

/// The flags that lead the plugin to it.
fn through(relay: &Relay) -> [String; 4] {
    [
        "--server".to_owned(),
        format!("https://127.0.0.1:{}", relay.port),
        "--tls-server-name".to_owned(),
        "kubernetes".to_owned(),
    ]
}

/// Ctrl-C when `now` says so.
fn interrupted(lab: &Lab, line: &str, now: impl Fn(usize, &str) -> bool) -> Option<Output> {
    struck(lab, line, &[], now, |child| {
        let pid = Pid::from_raw(child.id().try_into().unwrap());
        kill(pid, Signal::SIGINT).unwrap();
    })
}

#[track_caller]
fn ended_in_words(output: &Output, after: usize) {
    let Output { code, stderr, .. } = output;
    assert_eq!(*code, 1, "after {after} requests: {output:#?}");
    let last = stderr.lines().rfind(|line| !line.starts_with("hint: ")).unwrap_or_default();
    let words = last.starts_with("Error: ") && last.contains("the API server at https://127.0.0.1:");
    assert!(words && !stderr.contains("panicked"), "after {after} requests: {stderr}");
}

#[test]
fn the_api_server_is_gone_in_the_middle_of_expose() {
    let (lab, _alone) = exclusive();
    namespace(lab, "gone", &[("web", 80, "TCP")]);
    pool(lab, "gone", "10.98.27.0/30");
    let line = "expose svc/web -n gone --pool gone --wait=false";
    let mut strikes = 0;
    for after in 1.. {
        let Some(output) = deserted(lab, line, after).filter(|output| output.code != 0) else { break };
        ended_in_words(&output, after);
        strikes += 1;
        assert!(said(lab, line).starts_with("service/web exposed: 10.98.27.1 (pool gone"), "after {after}");
        assert_eq!(said(lab, "unexpose svc/web -n gone"), "service/web unexposed: 10.98.27.1 released\n");
    }
    assert!(strikes > 1, "it ended before the API server was gone");
    said(lab, "unexpose svc/web -n gone");
    said(lab, "pool delete gone");
}

#[test]
fn what_was_exposed_is_said_when_the_wait_for_an_owner_is_cut_off() {
    let (lab, _alone) = exclusive();
    namespace(lab, "waits", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "waits", "10.98.79.1-10.98.79.4");
    let line = "expose svc/web svc/api -n waits --pool waits --wait --timeout 90s";
    let waiting = |_: usize, line: &str| line.starts_with("waiting for an owner of 10.98.79.1: ");
    let stopped = interrupted(lab, line, waiting).expect("it waits");
    assert_eq!(stopped.code, 130, "{stopped:#?}");
    let bound = "bound: 10.98.79.1 to service waits/web, 10.98.79.2 to service waits/api\n";
    assert!(stopped.stderr.contains(bound), "{stopped:#?}");
    said(lab, "unexpose svc/web svc/api -n waits");

    let relay = Relay::new(&server(lab));
    let deserted = struck(lab, line, &through(&relay), waiting, |_| relay.cut()).expect("it waits");
    ended_in_words(&deserted, 0);
    let tell = "(pool waits, owner <pending>, <pending> backends)";
    assert_eq!(
        deserted.stdout,
        format!("service/web exposed: 10.98.79.1 {tell}\nservice/api exposed: 10.98.79.2 {tell}\n")
    );
    said(lab, "unexpose svc/web svc/api -n waits");
    said(lab, "pool delete waits");
}

/// The label of a drained node.
const DRAINED: &str = r".metadata.labels.kubectl-vip\.io/drain";
/// The image of the agents.
const IMAGE: &str = ".spec.template.spec.containers[0].image";

#[test]
fn the_api_server_is_gone_in_the_middle_of_whatever_changes_something() {
    let (lab, _alone) = exclusive();
    namespace(lab, "middle", &[("web", 80, "TCP")]);
    pool(lab, "middle", "10.98.26.0/30");
    let map = json!({
        "apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": "middle", "namespace": "middle"},
        "data": {"10.98.26.2": "middle/web"},
    });
    lab.apply(&map.to_string()).unwrap();
    let expose = "expose svc/web -n middle --pool middle --wait=false";
    let (create, delete) = ("pool create far 10.98.26.8/30 --virtual-routers 27", "pool delete far");
    let (drain, undrain) = ("node drain middle-1 --yes --wait=false", "node undrain middle-1");
    let unpin = "move svc/web -n middle --unpin --wait=false";
    let moved = "move svc/web -n middle --to middle-2 --wait=false";
    let old = "install --wait=false --yes --image example.org/vip-node:v0.0.9";
    // The command, what comes before it, and the object, the field and its value that it leaves.
    let (import, set) = ("import configmap middle/middle", "pool set far --exclude 10.98.26.8");
    let cases: [(&str, &[&str], &str, &str, &str); 10] = [
        ("unexpose svc/web -n middle", &[expose], "virtualip/10.98.26.1", ".metadata.name", ""),
        (import, &["unexpose 10.98.26.2"], "virtualip/10.98.26.2", ".metadata.name", "10.98.26.2"),
        ("unexpose 10.98.26.2", &[import], "virtualip/10.98.26.2", ".metadata.name", ""),
        (create, &[delete], "vippool/far", ".spec.virtualRouters.first", "27"),
        (set, &[], "vippool/far", ".spec.exclude[*]", "10.98.26.8"),
        (delete, &[create], "vippool/far", ".metadata.name", ""),
        (moved, &[expose, unpin], "virtualip/10.98.26.1", ".spec.preferredNode", "middle-2"),
        (drain, &[undrain], "vipnode/middle-1", DRAINED, "true"),
        (undrain, &[drain], "vipnode/middle-1", DRAINED, ""),
        (
            "upgrade --yes --wait=false",
            &[old],
            "-n=kubectl-vip daemonset/vip-node",
            IMAGE,
            "example.org/vip-node:v0.1.0",
        ),
    ];
    for (line, before, object, path, value) in cases {
        backups(lab, "middle", &["10.98.26.201/24", "10.98.26.202/24"], 26);
        let is_done = || {
            let path = format!("jsonpath={{{path}}}");
            let get = ["get", "--ignore-not-found", "-o", &path].into_iter().chain(object.split(' '));
            lab.kubectl(get).and_then(Output::ok).unwrap().stdout == value
        };
        let step = if line.starts_with("upgrade") { STEP } else { 2 };
        let mut strikes = 0;
        for after in (1..).step_by(step) {
            for before in before {
                vip(lab, before).unwrap();
            }
            let Some(output) = deserted(lab, line, after).filter(|output| output.code != 0) else { break };
            ended_in_words(&output, after);
            strikes += 1;
            // The answer that was lost may have been that it is done: then it is refused now.
            let again = vip(lab, line).unwrap();
            assert!(is_done(), "{line} after {after}: {again:#?}");
        }
        assert!(strikes > 0 && is_done(), "{line}: {strikes}");
    }
    gone(lab, &["middle-1", "middle-2"]);
    vip(lab, "unexpose svc/web -n middle").unwrap();
    said(lab, "pool delete middle");
    // With it goes the image.
    said(lab, "uninstall --yes");
}

/// How many requests lie between two places at which the longer commands are cut.
const STEP: usize = 19;

/// The cluster is as an install leaves it.
#[track_caller]
fn nothing_differs(lab: &Lab, when: &str) {
    let diff = vip(lab, "diff").unwrap();
    assert_eq!((diff.code, diff.stdout.as_str()), (0, ""), "{when}: {diff:#?}");
}

#[test]
fn the_api_server_is_gone_in_the_middle_of_uninstall_and_of_install() {
    let (lab, _alone) = exclusive();
    let mut strikes = [0; 2];
    for after in (1..).step_by(STEP) {
        let uninstalled = deserted(lab, "uninstall --yes", after).filter(|output| output.code != 0);
        said(lab, "uninstall --yes");
        let left = lab.kubectl(["get", "namespace", "kubectl-vip", "--ignore-not-found"]);
        assert_eq!(left.and_then(Output::ok).unwrap().stdout, "", "after {after} requests");
        let installed = deserted(lab, "install --wait=false", after).filter(|output| output.code != 0);
        said(lab, "install --wait=false");
        nothing_differs(lab, &format!("after {after} requests"));
        if uninstalled.is_none() && installed.is_none() {
            break;
        }
        for (output, strikes) in [uninstalled, installed].iter().zip(&mut strikes) {
            if let Some(output) = output {
                ended_in_words(output, after);
                *strikes += 1;
            }
        }
    }
    assert!(strikes.iter().all(|strikes| *strikes > 1), "{strikes:?}");
}

/// Whether a line tells of an apply. What would change is asked for before, for each object.
fn applies(line: &str) -> bool {
    line.starts_with("PATCH ") && !line.contains("dryRun=All")
}

#[test]
fn ctrl_c_comes_at_each_stage_of_an_install() {
    let (lab, _alone) = exclusive();
    let first: fn(usize, &str) -> bool = |requests, _| requests == 1;
    let applying: fn(usize, &str) -> bool = |_, line| applies(line);
    let later: fn(usize, &str) -> bool = |requests, line| requests > 3 * STEP && applies(line);
    // No kubelet is there to start one.
    let waiting: fn(usize, &str) -> bool = |_, line| line.starts_with("waiting for daemonset/vip-node: ");
    for (stage, now, applied) in [
        ("at its first request", first, 0..=0),
        ("when it begins to apply", applying, 0..=2),
        ("when it has applied some", later, 1..=STEP),
        ("when it waits for the agents", waiting, STEP - 2..=99),
    ] {
        said(lab, "uninstall --yes");
        let output = interrupted(lab, "install", now).unwrap_or_else(|| panic!("it was never {stage}"));
        assert_eq!(output.code, 130, "{stage}: {output:#?}");
        let titles: Vec<&str> =
            output.stdout.lines().map(|line| line.strip_suffix(" serverside-applied").unwrap()).collect();
        assert!(applied.contains(&titles.len()), "{stage}: {titles:#?}");
        // What is said to be applied is there.
        for title in titles {
            let there = lab.kubectl(["get", title, "-n", "kubectl-vip"]).unwrap();
            assert!(there.success(), "{stage}: {there:#?}");
        }
        said(lab, "install --wait=false");
        nothing_differs(lab, stage);
    }
}
