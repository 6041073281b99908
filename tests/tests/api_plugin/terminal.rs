//! The plugin at a real terminal: what it asks, how it is interrupted, and what it writes there.

use std::{
    thread,
    time::{Duration, Instant},
};

use lab::{Terminal, command};

use super::{
    LIMIT,
    agents::{ago, gone, node, owner, report},
    installed, namespace, pool, said, vip,
};

#[test]
fn a_question_is_answered_at_the_terminal_and_ctrl_c_changes_nothing() {
    let (lab, _guard) = installed();
    let ask = |keys: &str| {
        let mut terminal = Terminal::start(lab, 80, &[], "uninstall").unwrap();
        // What is typed ahead waits in the terminal, a signal does not.
        thread::sleep(Duration::from_secs(2));
        terminal.press(keys).unwrap();
        terminal.end(LIMIT).unwrap()
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
    let mut terminal =
        Terminal::start(lab, 80, &[], "expose svc/web -n terminal --pool terminal --wait").unwrap();
    let start = Instant::now();
    command::until("the address", Duration::from_secs(30), || {
        Ok(lab.kubectl(["get", "virtualip", "10.98.23.1"])?.success().then_some(()))
    })
    .unwrap();
    thread::sleep(Duration::from_secs(1));
    terminal.press("\x03").unwrap();
    let (code, screen) = terminal.end(LIMIT).unwrap();
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
fn a_watch_is_drawn_in_place_until_ctrl_c() {
    const HOME: &str = "\x1b[H";
    let (lab, _guard) = installed();
    namespace(lab, "drawn", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "drawn", "10.98.81.1-10.98.81.4");
    said(lab, "expose svc/web -n drawn --pool drawn --wait=false");
    report(lab, "drawn-1", &node("10.98.81.200/24", 81, &ago(0), "Master"));
    let mut terminal = Terminal::start(lab, 80, &[], "status svc/web -n drawn -w").unwrap();
    terminal.wait("<pending>   <pending>   Pending ", LIMIT).unwrap();
    owner(lab, "10.98.81.1", "drawn-1");
    terminal.wait("Announced", LIMIT).unwrap();
    terminal.press("\x03").unwrap();
    let (code, screen) = terminal.end(LIMIT).unwrap();
    assert_eq!(code, 130, "{screen}");
    let frames: Vec<&str> = screen.split(HOME).skip(1).collect();
    let has = |frame: &&str, words: &[&str]| words.iter().all(|word| frame.contains(word));
    // The details of what was named are there, and change with it.
    let row = "web       10.98.81.1   drawn   <pending>   <pending>   Pending ";
    assert!(has(frames.first().unwrap(), &[row, "Virtual router 81 of 10.98.81.1"]), "{screen}");
    let last = frames.iter().rfind(|frame| frame.contains("drawn-1"));
    assert!(last.is_some_and(|frame| has(frame, &["CONDITION", "Announced"])), "{screen}");
    // 24 rows, the last one for the cursor.
    assert!(frames.iter().all(|frame| frame.lines().count() <= 24), "{screen}");
    gone(lab, &["drawn-1"]);
    said(lab, "unexpose svc/web -n drawn");
    said(lab, "pool delete drawn");
}

#[test]
fn colours_are_for_terminals_that_show_them_and_tables_do_not_depend_on_the_width() {
    let (lab, _guard) = installed();
    let shown = |columns, environment: &[(&str, &str)], line: &str| {
        Terminal::start(lab, columns, environment, line).unwrap().end(LIMIT).unwrap().1
    };
    assert!(shown(80, &[], "check").contains('\x1b'));
    for plain in [("NO_COLOR", "1"), ("TERM", "dumb")] {
        assert!(!shown(80, &[plain], "check").contains('\x1b'), "{plain:?}");
    }
    for (how, coloured) in [("always", true), ("never", false)] {
        assert_eq!(
            vip(lab, &format!("check --color {how}")).unwrap().stdout.contains('\x1b'),
            coloured,
            "{how}"
        );
    }
    assert!(!shown(80, &[], "check --color=never").contains('\x1b'));
    pool(lab, "columns", "10.98.25.1-10.98.25.9,10.98.25.17");
    for columns in [40, 200] {
        let table = shown(columns, &[], "pool list");
        let row = table.lines().find(|line| line.starts_with("columns ")).map(str::split_whitespace).unwrap();
        let row: Vec<&str> = row.collect();
        assert_eq!(row[1..6], ["10.98.25.1-10.98.25.9,10.98.25.17", "10", "0", "10", "<all>"], "{table}");
    }
    said(lab, "pool delete columns");
}
