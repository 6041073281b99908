//! The loop, turn by turn, with a kernel in memory and an API server that does not answer.

use std::path::PathBuf;

use serde_json::{Value, json};
use vip_core::plan::Tables;
use vip_core::vrrp::ChecksumPolicy;

use super::*;
use crate::dataplane::Recorder;

fn agent(kernel: &Recorder) -> Agent {
    let nowhere = PathBuf::from("/nowhere");
    let args = AgentArgs {
        node: "node-1".into(),
        link: nowhere.clone(),
        kubeconfig: None,
        advert_interval: Duration::from_millis(100),
        unicast: false,
        checksum: ChecksumPolicy::Either,
        sysctl_dir: nowhere.clone(),
        state_dir: nowhere,
        health: ([127, 0, 0, 1], 0).into(),
    };
    let client = Client::try_from(kube::Config::new("http://127.0.0.1:1".parse().unwrap())).unwrap();
    Agent::new(args, &client, b"lab", kernel.clone()).unwrap()
}

/// A cluster whose virtual IPs have these addresses and a Service.
fn view(addresses: &[&str]) -> View {
    let vip = |address: &&str| -> Value {
        json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP", "metadata": {"name": address},
            "spec": {"address": address, "virtualRouter": 100, "services": [{"namespace": "shop", "name": "web"}]}})
    };
    let pool = json!({"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool", "metadata": {"name": "lab"},
        "spec": {"addresses": ["10.87.0.0/16"], "virtualRouters": {"first": 100, "count": 64}}});
    let service = json!({"service": {"spec": {"ports": [{"port": 80}]}}, "slices": []});
    serde_json::from_value(json!({
        "objects": {"vips": addresses.iter().map(vip).collect::<Vec<_>>(), "pools": [pool],
                    "services": [[{"namespace": "shop", "name": "web"}, service]]},
        "peers": [], "carried": {}, "labels": {}, "drained": false
    }))
    .unwrap()
}

/// What vrrp says of a node with one interface.
fn report(address: &str) -> Report {
    let eth0 = Interface {
        name: "eth0".into(),
        mac: [2; 6],
        addresses: vec![address.parse().unwrap()],
        carrier: true,
        mtu: 1500,
    };
    Report { interfaces: vec![eth0], ..Report::default() }
}

#[tokio::test(flavor = "current_thread")]
async fn nothing_is_shut_before_the_node_knows_its_own_addresses() {
    let left = Tables { guarded: [[10, 87, 2, 50].into()].into(), ..Tables::default() };
    let kernel = Recorder::new(left.clone());
    let mut agent = agent(&kernel);
    agent.view = Some(view(&["10.87.0.11", "10.87.2.50"]));
    let mut state = agent.programmer.state();
    // One that starts again, too, finds things as they were.
    for _ in 0..3 {
        agent.turn(None, &Programmed::default());
        sleep(Duration::from_millis(100)).await;
    }
    assert!(agent.found.is_some(), "it has not seen the kernel");
    assert_eq!(kernel.tables(), left);
    agent.turn(Some(&report("10.87.0.11/16")), &Programmed::default());
    state.wait_for(|state| state.generation == Some(1)).await.unwrap();
    assert_eq!(kernel.tables().guarded, left.guarded);
    // A restart of vrrp changes nothing of that.
    agent.turn(None, &Programmed::default());
    sleep(Duration::from_millis(200)).await;
    assert_eq!(kernel.tables().guarded, left.guarded);
}

#[test]
fn the_ends_of_the_pods_links_are_nobodys_news() {
    let nic = |name: String, addresses: &[&str]| Interface {
        name,
        mac: [2; 6],
        addresses: addresses.iter().map(|net| net.parse().unwrap()).collect(),
        carrier: true,
        mtu: 1500,
    };
    let told = |pods: u8| {
        let eth0 = nic("eth0".into(), &["10.87.0.11/16", "fe80::11/64"]);
        let dummy = nic("dummy0".into(), &["10.87.2.50/32", "10.87.2.51/32"]);
        let ends = (0..pods).map(|n| nic(format!("veth{n}"), &["fe80::1/64", "169.254.1.1/32"]));
        let report =
            Report { interfaces: [eth0, dummy].into_iter().chain(ends).collect(), ..Report::default() };
        let vips = [[10, 87, 2, 50].into()].into();
        let now = now();
        let status = report::node(Some(&report), &Programmed::default(), &Lan::default(), &vips, None, &now);
        let carriers = view::carriers("node-1", &report.interfaces, &BTreeMap::new());
        (view::places(&report.interfaces), carriers, status.interfaces)
    };
    let few = told(0);
    assert_eq!(few, told(200));
    let names: Vec<&str> = few.0.iter().map(|(name, _)| name.as_str()).collect();
    assert_eq!((names, few.1.len()), (vec!["eth0"], 3));
    // Of a single address the others need to know only when it keeps a virtual IP from being bound.
    assert_eq!((few.2.len(), few.2[0].addresses.len()), (2, 2));
    assert_eq!(few.2[1].addresses, ["10.87.2.50/32"]);
}

#[test]
fn a_node_that_is_new_to_the_others_waits_until_they_know_it() {
    let start = Instant::now();
    let mut debut = Debut::default();
    assert!(debut.is_over(true, start), "it was there before");
    assert!(!debut.is_over(false, start));
    assert!(!debut.is_over(true, start + SPREAD / 2));
    assert!(debut.is_over(true, start + SPREAD));
}

#[tokio::test(flavor = "current_thread")]
async fn the_kernel_is_cleaned_only_after_a_vrrp_that_has_left_or_is_not_there() {
    let limit = Duration::from_millis(50);
    let (publish, reports) = watch::channel(None);
    assert!(has_left(reports.clone(), true, limit).await, "it said that it stops, and went");
    assert!(has_left(reports.clone(), false, limit).await, "nobody was there for the whole time");
    let said = |stopping| Some(Report { stopping, ..Report::default() });
    let hearing = async {
        tokio::task::yield_now().await;
        publish.send_replace(said(false));
    };
    let (left, ()) = tokio::join!(has_left(reports.clone(), false, limit), hearing);
    assert!(!left, "it was about to say that it serves");
    let hearing = async {
        publish.send_replace(said(true));
        tokio::task::yield_now().await;
        publish.send_replace(None);
    };
    let (left, ()) = tokio::join!(has_left(reports.clone(), false, limit), hearing);
    assert!(left);
}
