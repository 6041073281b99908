//! The plugin at a real terminal: what it asks, how it is interrupted, and what it writes there.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    process::{Child, Command, Stdio},
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use lab::{Lab, command};
use nix::pty::{Winsize, openpty};

use super::{LIMIT, installed, namespace, pool, said};

/// `kubectl vip` at a terminal of its own.
struct Terminal {
    keys: File,
    process: Child,
    screen: JoinHandle<Vec<u8>>,
}

impl Terminal {
    fn start(lab: &Lab, columns: u16, environment: &[(&str, &str)], line: &str) -> Self {
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None).unwrap();
        let kubectl = lab.kubectl_command().unwrap();
        // The terminal is that of the session, so that its keys are signals.
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(kubectl.get_program()).args(kubectl.get_args());
        session.arg("vip").args(line.split_whitespace()).env("TERM", "xterm");
        let inherited = kubectl.get_envs().filter_map(|(name, value)| Some((name, value?)));
        session.envs(inherited).envs(environment.iter().copied());
        let [stdin, stdout, stderr] = [(); 3].map(|()| Stdio::from(pair.slave.try_clone().unwrap()));
        session.stdin(stdin).stdout(stdout).stderr(stderr);
        let process = command::spawn(&mut session).unwrap();
        drop((pair.slave, session));
        let mut output = File::from(pair.master.try_clone().unwrap());
        let screen = thread::spawn(move || {
            let (mut all, mut part) = (Vec::new(), [0; 4096]);
            // The other end's close is an error on Linux.
            while let Ok(length @ 1..) = output.read(&mut part) {
                all.extend_from_slice(&part[..length]);
            }
            all
        });
        Self { keys: File::from(pair.master), process, screen }
    }

    fn press(&mut self, keys: &str) {
        self.keys.write_all(keys.as_bytes()).unwrap();
    }

    /// The exit code and all that was shown.
    fn end(mut self) -> (i32, String) {
        let code = command::wait(&mut self.process, LIMIT).unwrap().expect("it goes on for ever");
        drop(self.keys);
        (code, String::from_utf8(self.screen.join().unwrap()).unwrap().replace("\r\n", "\n"))
    }
}

#[test]
fn a_question_is_answered_at_the_terminal_and_ctrl_c_changes_nothing() {
    let (lab, _guard) = installed();
    let ask = |keys: &str| {
        let mut terminal = Terminal::start(lab, 80, &[], "uninstall");
        // What is typed ahead waits in the terminal, a signal does not.
        thread::sleep(Duration::from_secs(2));
        terminal.press(keys);
        terminal.end()
    };
    for (keys, code, last) in [
        ("n\n", 1, "Error: nothing changed: not confirmed"),
        ("\n", 1, "Error: nothing changed: not confirmed"),
        ("what?\nn\n", 1, "Error: nothing changed: not confirmed"),
        ("\x04", 1, "Error: nothing changed: no answer"),
        ("\x03", 130, "^C"),
    ] {
        let (found, screen) = ask(keys);
        assert!(screen.contains(". Go on? [y/N] "), "{screen}");
        assert!(screen.trim_end().ends_with(last), "{keys:?}: {screen}");
        assert_eq!(found, code, "{keys:?}: {screen}");
        assert!(!screen.contains('\x1b'), "{screen:?}");
    }
    assert!(lab.kubectl(["get", "daemonset", "vip-node", "-n", "kubectl-vip"]).unwrap().success());
}

#[test]
fn ctrl_c_while_it_waits_leaves_what_was_said_to_be_done() {
    let (lab, _guard) = installed();
    namespace(lab, "terminal", &[("web", 80, "TCP")]);
    pool(lab, "terminal", "10.98.23.1");
    let mut terminal = Terminal::start(lab, 80, &[], "expose svc/web -n terminal --pool terminal --wait");
    let start = Instant::now();
    command::until("the address", Duration::from_secs(30), || {
        Ok(lab.kubectl(["get", "virtualip", "10.98.23.1"])?.success().then_some(()))
    })
    .unwrap();
    thread::sleep(Duration::from_secs(1));
    terminal.press("\x03");
    let (code, screen) = terminal.end();
    assert!(code == 130 && start.elapsed() < Duration::from_secs(50), "{code}: {screen}");
    assert!(screen.contains("waiting for an owner of 10.98.23.1: "), "{screen}");
    assert_eq!(
        said(lab, "expose svc/web -n terminal --wait=false"),
        "service/web exposed: 10.98.23.1 (pool terminal, owner <pending>, <pending> backends) (unchanged)\n"
    );
    said(lab, "unexpose svc/web -n terminal");
    said(lab, "pool delete terminal");
}

#[test]
fn colours_are_for_terminals_that_show_them_and_tables_do_not_depend_on_the_width() {
    let (lab, _guard) = installed();
    let shown = |columns, environment: &[(&str, &str)], line: &str| {
        Terminal::start(lab, columns, environment, line).end().1
    };
    assert!(shown(80, &[], "check").contains('\x1b'));
    for plain in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        assert!(!shown(80, &[plain], "check").contains('\x1b'), "{plain:?}");
    }
    pool(lab, "columns", "10.98.25.1-10.98.25.9,10.98.25.17");
    for columns in [40, 200] {
        let table = shown(columns, &[], "pool list");
        let row = table.lines().find(|line| line.starts_with("columns ")).map(str::split_whitespace).unwrap();
        let row: Vec<&str> = row.collect();
        assert_eq!(row[1..6], ["10.98.25.1-10.98.25.9,10.98.25.17", "10", "0", "10", "<all>"], "{table}");
    }
    said(lab, "pool delete columns");
}
