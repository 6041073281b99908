//! Drawing addresses and giving them back.

use std::{collections::BTreeSet, thread, time::Duration};

use lab::{Output, command};
use serde_json::{Value, json};

use super::{
    USERS,
    agents::{ago, field, gone, node, owner, report},
    installed, namespace, pool, refused, said, vip,
};

#[test]
fn fifty_at_once_get_fifty_addresses_and_one_more_is_told() {
    let (lab, _guard) = installed();
    let names: Vec<String> = (1..=51).map(|number| format!("s{number}")).collect();
    let services: Vec<(&str, u16, &str)> = names.iter().map(|name| (name.as_str(), 80, "TCP")).collect();
    namespace(lab, "fifty", &services);
    lab.kubectl(["delete", "vippool", "fifty", "--ignore-not-found"]).unwrap();
    said(lab, "pool create fifty 10.98.50.1-10.98.50.50 --auto-assign=false --virtual-routers 170-219");

    let lines = thread::scope(|scope| {
        let running: Vec<_> = names[..50]
            .iter()
            .map(|name| {
                scope.spawn(move || {
                    said(lab, &format!("expose svc/{name} -n fifty --pool fifty --wait=false"))
                })
            })
            .collect();
        running.into_iter().map(|thread| thread.join().unwrap()).collect::<Vec<String>>()
    });
    let addresses: BTreeSet<&str> =
        lines.iter().map(|line| line.split_once("exposed: ").unwrap().1.split(' ').next().unwrap()).collect();
    assert_eq!(addresses.len(), 50, "{lines:#?}");

    let one_more = refused(lab, "expose svc/s51 -n fifty --pool fifty");
    assert!(
        one_more.starts_with(
            "Error: pool \"fifty\": 0 of 50 addresses free\nhint: kubectl vip pool set fifty --add RANGE"
        ),
        "{one_more}"
    );

    let all = lab.kubectl(["get", "virtualips", "-o", "json"]).unwrap();
    let all: Value = serde_json::from_str(&all.stdout).unwrap();
    let routers: BTreeSet<i64> = all["items"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|vip| vip["metadata"]["name"].as_str().unwrap().starts_with("10.98.50."))
        .map(|vip| vip["spec"]["virtualRouter"].as_i64().unwrap())
        .collect();
    assert_eq!(routers.len(), 50, "each has a virtual router of its own");
}

#[test]
fn requests_are_shown_as_kubectl_shows_them_and_are_few() {
    let (lab, _guard) = installed();
    namespace(lab, "few", &[("web", 80, "TCP")]);
    pool(lab, "few", "10.98.26.0/30");
    // An agent that may yet take it is waited for.
    report(lab, "few-1", &node("10.98.26.200/24", 26, &ago(0), "Backup"));
    let output = vip(lab, "expose svc/web -n few --pool few --timeout 5s -v 6").and_then(Output::ok).unwrap();
    gone(lab, &["few-1"]);
    assert!(output.stderr.contains("no owner yet: "), "{output:#?}");
    let requests: Vec<&str> = output.stderr.lines().filter(|line| line.ends_with(" milliseconds")).collect();
    assert!((2..=6).contains(&requests.len()), "{requests:#?}");
    assert!(requests[0].starts_with("GET https://") && requests[0].contains(" 200 OK in "), "{requests:#?}");
    let quiet = vip(lab, "expose svc/web -n few -v 5").and_then(Output::ok).unwrap();
    assert!(!quiet.stderr.contains(" milliseconds"), "{quiet:#?}");
}

#[test]
fn an_address_is_drawn_shown_and_given_back() {
    let (lab, _guard) = installed();
    namespace(lab, "draw", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "draw", "10.98.1.0/30");
    let tell = "(pool draw, owner <pending>, <pending> backends)";
    let web = format!("service/web exposed: 10.98.1.1 {tell}");
    assert_eq!(said(lab, "expose svc/web -n draw --pool draw --wait=false"), format!("{web}\n"));
    assert_eq!(said(lab, "expose service web -n draw"), format!("{web} (unchanged)\n"));
    assert_eq!(
        said(lab, "expose svc/api -n draw --pool draw --dry-run"),
        "service/api exposed: 10.98.1.2 (pool draw) (dry run)\n"
    );
    let yaml = said(
        lab,
        "expose svc/api -n draw --pool draw --dry-run=server -o yaml --scheduler rr --persistence 30m",
    );
    assert!(yaml.contains("scheduler: rr") && yaml.contains("persistenceSeconds: 1800"), "{yaml}");
    assert_eq!(
        said(lab, "unexpose svc/web -n draw --dry-run"),
        "service/web unexposed: 10.98.1.1 released (dry run)\n"
    );
    assert_eq!(said(lab, "unexpose svc/web -n draw"), "service/web unexposed: 10.98.1.1 released\n");
    assert_eq!(refused(lab, "unexpose svc/web -n draw"), "Error: service draw/web has no virtual IP");
    // What is written can be had as objects, and as names.
    for line in [
        "expose svc/web -n draw --pool draw --wait=false -o name",
        "unexpose svc/web -n draw --dry-run=server -o name",
        "unexpose 10.98.1.1 -o name",
    ] {
        assert_eq!(said(lab, line), "virtualip.kubectl-vip.io/10.98.1.1\n", "{line}");
    }
    // The cluster is named before it is changed, and only then.
    let place = lab.kubectl(["config", "current-context"]).unwrap().text().to_owned();
    for (line, words) in [
        ("expose svc/web -n draw --pool draw --wait=false", "Exposing service draw/web in context "),
        ("unexpose svc/web -n draw", "Unexposing 10.98.1.1 in context "),
        ("pool set draw --exclude 10.98.1.2 -o name", "Changing pool draw in context "),
    ] {
        let told = |line: &str| vip(lab, line).and_then(Output::ok).unwrap().stderr;
        let named = format!("{words}\"{place}\" (https://");
        assert!(!told(&format!("{line} --dry-run=server")).contains(&named), "{line}");
        assert!(told(line).starts_with(&named), "{line}");
    }
    pool(lab, "draw", "10.98.1.0/30");
    assert_eq!(
        said(lab, "expose svc/api -n draw --pool draw --wait=false"),
        format!("service/api exposed: 10.98.1.1 {tell}\n"),
        "the lowest address is free again"
    );
    assert_eq!(said(lab, "unexpose 10.98.1.1"), "virtualip/10.98.1.1 released (was draw/api)\n");
}

#[test]
fn several_services_share_an_address_on_different_ports() {
    let (lab, _guard) = installed();
    namespace(
        lab,
        "share",
        &[("web", 80, "TCP"), ("api", 80, "TCP"), ("dns", 53, "UDP"), ("mail", 25, "TCP")],
    );
    pool(lab, "share", "10.98.2.1-10.98.2.4");
    said(lab, "expose svc/web -n share --ip 10.98.2.3 --wait=false");
    assert_eq!(
        refused(lab, "expose svc/dns -n share --ip 10.98.2.3"),
        "Error: 10.98.2.3 belongs to service share/web\nhint: --share puts several Services on one address, on different ports"
    );
    assert_eq!(
        refused(lab, "expose svc/api -n share --ip 10.98.2.3 --share"),
        "Error: TCP port 80 of 10.98.2.3 belongs to service share/web, so service share/api cannot share the address"
    );
    let both = thread::scope(|scope| {
        ["dns", "mail"]
            .map(|name| {
                scope.spawn(move || {
                    said(lab, &format!("expose svc/{name} -n share --ip 10.98.2.3 --share --wait=false"))
                })
            })
            .map(|thread| thread.join().unwrap())
    });
    assert!(both.iter().all(|line| line.contains("exposed: 10.98.2.3 ")), "{both:?}");
    assert_eq!(
        said(lab, "expose svc/api -n share --pool share --share --wait=false").split(' ').nth(2),
        Some("10.98.2.1"),
        "no address has room for port 80"
    );
    let left = said(lab, "unexpose svc/web -n share");
    assert!(left.starts_with("service/web unexposed: 10.98.2.3 stays with share/"), "{left}");
    assert_eq!(
        said(lab, "unexpose svc/dns -n share"),
        "service/dns unexposed: 10.98.2.3 stays with share/mail\n"
    );
    assert_eq!(said(lab, "unexpose svc/mail -n share"), "service/mail unexposed: 10.98.2.3 released\n");
}

#[test]
fn who_may_not_update_a_service_is_refused_by_the_api_server_in_one_sentence() {
    let (lab, _guard) = installed();
    namespace(lab, "rights", &[("web", 80, "TCP")]);
    pool(lab, "rights", "10.98.3.1-10.98.3.4");
    let kubectl = |words: &[&str]| lab.kubectl(words).and_then(Output::ok).unwrap();
    kubectl(&["delete", "role,rolebinding", "reader", "writer", "-n", "rights", "--ignore-not-found"]);
    let grant = |name: &str, verbs: &str| {
        let (verbs, role) = (format!("--verb={verbs}"), format!("--role={name}"));
        kubectl(&["create", "role", name, &verbs, "--resource=services", "-n", "rights"]);
        kubectl(&["create", "rolebinding", name, &role, "--user=bob", "-n", "rights"]);
    };
    // The API server takes notice of a right a moment after it was given or taken.
    let expose = format!("expose svc/web -n rights --pool rights --wait=false --as bob --as-group {USERS}");
    let comes = |what: &str, words: &str| {
        command::until(what, Duration::from_secs(20), || {
            let output = vip(lab, &expose)?;
            let error = output.stderr.find("Error").map_or("", |start| output.stderr[start..].trim_end());
            Ok((error == words).then_some(output))
        })
        .unwrap()
    };
    let refused = comes(
        "a refusal to read",
        "Error from server (Forbidden): user \"bob\" cannot get services in \"rights\"\n\
         hint: kubectl auth can-i get services -n rights",
    );
    assert_eq!(refused.code, 1);
    grant("reader", "get,list");
    let refused = comes(
        "a refusal to bind",
        "Error from server (Forbidden): user \"bob\" cannot update services in \"rights\" (service web), \
         so it cannot bind virtual IP 10.98.3.1 to it\n\
         hint: kubectl auth can-i update services -n rights",
    );
    assert_eq!(refused.code, 1);
    grant("writer", "get,list,update,patch");
    assert_eq!(comes("an address", "").code, 0);
    let unexpose = format!("unexpose svc/web -n rights --as bob --as-group {USERS}");
    assert_eq!(said(lab, &unexpose), "service/web unexposed: 10.98.3.1 released\n");
}

#[test]
fn several_services_at_once_or_none_of_them() {
    let (lab, _guard) = installed();
    namespace(lab, "several", &[("web", 80, "TCP"), ("api", 80, "TCP"), ("dns", 53, "UDP")]);
    pool(lab, "several", "10.98.24.0/29");
    let tell = "(pool several, owner <pending>, <pending> backends)";
    let expose = "-n several --pool several --wait=false";
    assert_eq!(
        refused(lab, &format!("expose svc/web svc/apl {expose}")).lines().next().unwrap().split(" (").next(),
        Some("Error: services \"apl\" not found")
    );
    assert_eq!(
        refused(lab, "unexpose svc/web -n several"),
        "Error: service several/web has no virtual IP",
        "it was exposed all the same"
    );
    assert_eq!(
        said(lab, &format!("expose svc/web svc/api {expose}")),
        format!("service/web exposed: 10.98.24.1 {tell}\nservice/api exposed: 10.98.24.2 {tell}\n")
    );
    assert_eq!(
        said(lab, &format!("expose svc web api dns {expose}")),
        format!(
            "service/web exposed: 10.98.24.1 {tell} (unchanged)\nservice/api exposed: 10.98.24.2 {tell} (unchanged)\n\
             service/dns exposed: 10.98.24.3 {tell}\n"
        )
    );
    let list: Value =
        serde_json::from_str(&said(lab, &format!("expose svc web dns {expose} -o json"))).unwrap();
    assert_eq!((list["kind"].as_str(), list["items"].as_array().map(Vec::len)), (Some("List"), Some(2)));
    assert_eq!(
        refused(lab, "expose svc/web svc/dns -n several --ip 10.98.24.4"),
        "Error: several Services have the same address only when they share it\n\
         hint: --share puts several Services on one address, on different ports"
    );
    // What is named wrongly is told before anything is taken away.
    assert_eq!(
        refused(lab, "unexpose svc/web svc/dsn -n several"),
        "Error: service several/dsn has no virtual IP; did you mean \"dns\"?"
    );
    assert_eq!(
        said(lab, "unexpose svc/web svc/dns 10.98.24.2 -n several"),
        "service/web unexposed: 10.98.24.1 released\nservice/dns unexposed: 10.98.24.3 released\n\
         virtualip/10.98.24.2 released (was several/api)\n"
    );
    assert_eq!(
        said(lab, "expose svc/web svc/dns -n several --ip 10.98.24.4 --share --wait=false").lines().count(),
        2
    );
    assert_eq!(
        said(lab, "unexpose svc web dns -n several"),
        "service/web unexposed: 10.98.24.4 stays with several/dns\nservice/dns unexposed: 10.98.24.4 released\n"
    );
    said(lab, "pool delete several");
}

#[test]
fn of_several_services_none_is_exposed_when_one_cannot_be() {
    let (lab, _guard) = installed();
    namespace(lab, "whole", &[("web", 80, "TCP"), ("api", 80, "TCP"), ("dns", 53, "UDP")]);
    pool(lab, "whole", "10.98.76.1");
    let refuses = |line: &str, sentence: &str| {
        let error = refused(lab, line);
        assert!(error.starts_with(sentence), "{line}: {error}");
        let nothing = vip(lab, "status -n whole -o name").and_then(Output::ok).unwrap();
        assert_eq!(nothing.stdout, "", "{line}");
    };
    for dry_run in ["", " --dry-run", " --dry-run=server"] {
        refuses(
            &format!("expose svc/web svc/api -n whole --pool whole --wait=false{dry_run}"),
            "Error: pool \"whole\": 0 of 1 addresses free",
        );
        refuses(
            &format!("expose svc/web svc/api -n whole --ip 10.98.76.1 --share --wait=false{dry_run}"),
            "Error: TCP port 80 of 10.98.76.1 belongs to service whole/web, so service whole/api cannot share the address",
        );
    }
    let both = said(lab, "expose svc/web svc/dns -n whole --ip 10.98.76.1 --share --dry-run=server");
    assert_eq!(
        both,
        "service/web exposed: 10.98.76.1 (pool whole) (server dry run)\n\
         service/dns exposed: 10.98.76.1 (pool whole) (server dry run)\n"
    );
    said(lab, "pool delete whole");
}

#[test]
fn scheduler_and_persistence_are_set_on_what_is_exposed_and_not_for_others() {
    let (lab, _guard) = installed();
    namespace(lab, "set", &[("web", 80, "TCP"), ("dns", 53, "UDP")]);
    pool(lab, "set", "10.98.77.1-10.98.77.4");
    let expose = |rest: &str| said(lab, &format!("expose {rest} -n set --pool set --wait=false"));
    let tell = "(pool set, owner <pending>, <pending> backends)";
    expose("svc/web");
    assert_eq!(
        expose("svc/web --scheduler rr --dry-run"),
        format!("service/web exposed: 10.98.77.1 {tell} (configured) (dry run)\n")
    );
    assert_eq!(field(lab, "virtualip/10.98.77.1", ".spec.scheduler"), "wlc");
    assert_eq!(
        expose("svc/web --scheduler rr --persistence 30m"),
        format!("service/web exposed: 10.98.77.1 {tell} (configured)\n")
    );
    assert_eq!(
        field(lab, "virtualip/10.98.77.1", "['.spec.scheduler','.spec.persistenceSeconds']"),
        "rr 1800"
    );
    assert_eq!(
        expose("svc/web --scheduler rr"),
        format!("service/web exposed: 10.98.77.1 {tell} (unchanged)\n")
    );
    let otherwise = |services: &str| {
        format!(
            "Error: 10.98.77.1 has scheduler rr and persistence 30m for all its Services ({services})\n\
             hint: leave --scheduler and --persistence out, or change them for all: kubectl edit virtualip 10.98.77.1"
        )
    };
    assert_eq!(
        refused(lab, "expose svc/dns -n set --ip 10.98.77.1 --share --scheduler sh"),
        otherwise("set/web")
    );
    said(lab, "expose svc/dns -n set --ip 10.98.77.1 --share --wait=false");
    assert_eq!(refused(lab, "expose svc/web -n set --persistence 1m"), otherwise("set/web, set/dns"));
    said(lab, "unexpose svc/web svc/dns -n set");
    said(lab, "pool delete set");
}

#[test]
fn the_address_of_a_node_is_not_given_out() {
    let (lab, _guard) = installed();
    namespace(lab, "machine", &[("web", 80, "TCP")]);
    gone(lab, &["machine-1"]);
    pool(lab, "machine", "10.98.78.1-10.98.78.4");
    // A node that came after the pool.
    report(lab, "machine-1", &node("10.98.78.1/24", 78, &ago(0), "Backup"));
    assert_eq!(
        refused(lab, "expose svc/web -n machine --ip 10.98.78.1"),
        "Error: 10.98.78.1 is the address of node machine-1: as a virtual IP it would cut that off\n\
         hint: keep it out of the pool: kubectl vip pool set machine --exclude 10.98.78.1"
    );
    let drawn = said(lab, "expose svc/web -n machine --pool machine --dry-run");
    assert_eq!(drawn, "service/web exposed: 10.98.78.2 (pool machine) (dry run)\n");
    gone(lab, &["machine-1"]);
    said(lab, "pool delete machine");
}

#[test]
fn an_address_that_another_machine_uses_is_given_back() {
    const WHOSE: &str = "10.98.29.1 is used by 52:54:00:aa:bb:cc (eth0 on used-1)";
    let (lab, _guard) = installed();
    namespace(lab, "used", &[("web", 80, "TCP"), ("api", 80, "TCP")]);
    pool(lab, "used", "10.98.29.1-10.98.29.3");
    let exists = |address: &str| {
        command::until(address, Duration::from_secs(30), || {
            Ok(lab.kubectl(["get", "virtualip", address])?.success().then_some(()))
        })
        .unwrap();
    };
    let use_it = || {
        exists("10.98.29.1");
        let status = json!({"status": {"conditions": [{
            "type": "Conflict", "status": "True", "reason": "AddressInUse", "lastTransitionTime": ago(0),
            "message": format!("{WHOSE}: it is not bound; take the address from that machine, or exclude it from the pool"),
        }]}});
        let patch = ["--subresource=status", "--type=merge", "-p", &status.to_string()];
        let patch = ["patch", "virtualip", "10.98.29.1"].into_iter().chain(patch);
        lab.kubectl(patch).and_then(Output::ok).unwrap();
    };
    let drawn = thread::scope(|scope| {
        let running = scope.spawn(|| vip(lab, "expose svc/web -n used --pool used --wait --timeout 60s"));
        use_it();
        exists("10.98.29.2");
        owner(lab, "10.98.29.2", "used-1");
        running.join().unwrap().and_then(Output::ok).unwrap()
    });
    assert_eq!(drawn.stdout, "service/web exposed: 10.98.29.2 (pool used, owner used-1, 3 backends)\n");
    assert!(drawn.stderr.contains(&format!("{WHOSE}: next free address taken instead\n")), "{drawn:#?}");

    let named = thread::scope(|scope| {
        let running =
            scope.spawn(|| refused(lab, "expose svc/api -n used --ip 10.98.29.1 --wait --timeout 60s"));
        use_it();
        running.join().unwrap()
    });
    let error = format!(
        "Error: {WHOSE}; service used/api is not exposed\nhint: kubectl vip pool set used --exclude 10.98.29.1"
    );
    assert!(named.ends_with(&error), "{named}");
    assert!(!lab.kubectl(["get", "virtualip", "10.98.29.1"]).unwrap().success(), "it is given back");
    said(lab, "unexpose svc/web -n used");
    said(lab, "pool delete used");
}
