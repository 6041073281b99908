//! Commands that are cut off after any of their requests, by Ctrl-C or because the API server is gone: what was done is said,
//! and running them again finishes.

use std::{
    io::{self, BufRead as _, BufReader, Read as _},
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

use super::{exclusive, namespace, pool, said, vip};

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
                for (from, to) in [(&near, &far), (&far, &near)] {
                    let (mut from, mut to) = (from.try_clone().unwrap(), to.try_clone().unwrap());
                    thread::spawn(move || {
                        let _ = io::copy(&mut from, &mut to);
                        let _ = to.shutdown(Shutdown::Write);
                    });
                }
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

/// Address and port of the API server.
fn server(lab: &Lab) -> String {
    let url = "jsonpath={.clusters[0].cluster.server}";
    let url = lab.kubectl(["config", "view", "--minify", "-o", url]).and_then(Output::ok).unwrap().stdout;
    url.trim().trim_start_matches("https://").to_owned()
}

/// Runs a command and strikes when it has told of so many requests. `None` when it ended before.
fn struck(lab: &Lab, line: &str, after: usize, extra: &[String], strike: impl Fn(&Child)) -> Option<Output> {
    let mut kubectl = lab.kubectl_command().unwrap();
    kubectl.arg("vip").args(line.split_whitespace()).args(extra).args(["-v", "6"]);
    let mut child =
        command::spawn(kubectl.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped())).unwrap();
    let (mut requests, mut stderr, mut stdout) = (0, String::new(), String::new());
    let lines = BufReader::new(child.stderr.take().unwrap());
    for told in lines.lines().map_while(Result::ok) {
        if told.ends_with(" milliseconds") {
            requests += 1;
            if requests == after {
                strike(&child);
            }
        } else {
            stderr.push_str(&told);
            stderr.push('\n');
        }
    }
    child.stdout.take().unwrap().read_to_string(&mut stdout).unwrap();
    let status = child.wait().unwrap();
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or_default());
    (requests >= after).then(|| Output { command: line.to_owned(), code, stdout, stderr })
}

/// The API server is gone after so many requests.
fn deserted(lab: &Lab, line: &str, after: usize) -> Option<Output> {
    let relay = Relay::new(&server(lab));
    let to = [
        "--server".to_owned(),
        format!("https://127.0.0.1:{}", relay.port),
        "--tls-server-name".to_owned(),
        "kubernetes".to_owned(),
    ];
    struck(lab, line, after, &to, |_| relay.cut())
}

/// Ctrl-C after so many requests.
fn interrupted(lab: &Lab, line: &str, after: usize) -> Option<Output> {
    struck(lab, line, after, &[], |child| {
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

/// How many requests lie between two places at which the longer commands are cut.
const STEP: usize = 17;

/// The cluster is as an install leaves it.
#[track_caller]
fn nothing_differs(lab: &Lab, after: usize) {
    let diff = vip(lab, "diff").unwrap();
    assert_eq!((diff.code, diff.stdout.as_str()), (0, ""), "after {after} requests: {diff:#?}");
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
        nothing_differs(lab, after);
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

#[test]
fn ctrl_c_comes_at_each_stage_of_an_install() {
    let (lab, _alone) = exclusive();
    let mut stages = [0; 3];
    for after in (1..).step_by(STEP) {
        said(lab, "uninstall --yes");
        let output = interrupted(lab, "install", after).unwrap();
        assert_eq!(output.code, 130, "after {after} requests: {output:#?}");
        // What was applied is said, and nothing else is.
        for line in output.stdout.lines() {
            let title = line.strip_suffix(" serverside-applied").unwrap();
            let there = lab.kubectl(["get", title, "-n", "kubectl-vip"]).unwrap();
            assert!(there.success(), "after {after} requests: {there:#?}");
        }
        said(lab, "install --wait=false");
        nothing_differs(lab, after);
        let waits = output.stderr.contains("waiting for ");
        stages[usize::from(!output.stdout.is_empty()) + usize::from(waits)] += 1;
        if waits {
            break;
        }
    }
    assert!(stages.iter().all(|times| *times > 0), "before, while and after it applies: {stages:?}");
}
