//! A Service grows and shrinks while clients ask: the kernels follow, each change is one message, and no request is lost.

use std::{collections::BTreeMap, fmt::Write as _, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Result, ensure};
use jiff::Timestamp;
use lab::{
    Lab, Server, command,
    ipvs_ear::{Fates, Service},
    product,
    workload::Workload,
};

use super::{
    SOON, check_alone, fates, installed, moved_since,
    services::{LEAVING, READY},
};

const NAMESPACE: &str = "growth";
/// Between two requests.
const EVERY: Duration = Duration::from_millis(100);
/// Endpoints beside the pods: addresses of a host on the LAN, at its port 80.
const PLAIN: u8 = 55;

/// Longer than a request takes.
const UNDER_WAY: Duration = Duration::from_secs(2);

/// What begins; and what is to end, which is set to 0 before it goes.
const BEGINNING: [Option<u32>; 1] = [Some(1)];
const END: [Option<u32>; 2] = [Some(0), None];

/// That of a plain endpoint.
fn address(n: u8) -> Ipv4Addr {
    Ipv4Addr::new(10, 87, 4, n)
}

/// The plain endpoints: a slice of them, or of none, and how they stand.
fn plain(lab: &Lab, count: u8, state: &str) -> Result<()> {
    let mut endpoints = String::new();
    for n in 1..=count {
        write!(endpoints, "{{addresses: [{}], conditions: {{{state}}}}}, ", address(n))?;
    }
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: plain, namespace: {NAMESPACE}, \
         labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nendpoints: [{endpoints}]\n\
         ports: [{{name: http, port: 80}}]\n"
    );
    lab.apply(&slice).map(drop)
}

/// Waits until all nodes have exactly the pods with weight 1, and so many plain endpoints with that one.
fn wait_table(lab: &Lab, pods: &Workload<'_>, vip: Ipv4Addr, plain: u8, weight: u32) -> Result<()> {
    let pods = pods.pods()?;
    let mut wanted: BTreeMap<String, u32> =
        pods.values().map(|pod| (format!("{}:8080", pod.address), 1)).collect();
    wanted.extend((1..=plain).map(|n| (format!("{}:80", address(n)), weight)));
    command::until(&format!("{} destinations", wanted.len()), SOON, || {
        let tables = lab.each_node(|node| product::table(&node, vip))?;
        ensure!(tables.iter().all(|table| table.get("TCP :80 wlc") == Some(&wanted)), "they have {tables:?}");
        Ok(Some(()))
    })
}

#[test]
fn from_three_to_sixty_backends_and_back_each_change_is_a_message_and_no_request_is_lost() {
    check_alone(|| {
        let lab = installed()?;
        for n in 1..=PLAIN {
            lab.netns().ip(&format!("address replace {}/32 dev lo", address(n)))?;
        }
        let _server = Server::start(lab.netns(), "plain")?;
        let pods = Workload::deploy(lab, NAMESPACE, "web", 3)?;
        // TCP alone, so that an endpoint is one destination.
        let one = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: growth}\n\
                   spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}\n";
        lab.kubectl(["delete", "service", "web", "-n", NAMESPACE])?.ok()?;
        lab.apply(one)?;
        lab.kubectl(["vip", "expose", "svc/web", "-n", NAMESPACE])?.ok()?;
        let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "web")?;
        let owner = product::wait_one_owner(lab, vip, SOON)?;
        wait_table(lab, &pods, vip, 0, 1)?;
        let began = Timestamp::now();
        let watch =
            lab.client().limit(Duration::from_secs(10)).watch(&format!("http://{vip}/hostname"), EVERY)?;
        watch.wait_answers(50, SOON)?;
        let before = pods.pods()?;
        fates::heard(lab, owner.number, || {
            pods.scale(5)?;
            wait_table(lab, &pods, vip, 0, 1)?;
            let most = pods.pods()?;
            plain(lab, PLAIN, READY)?;
            wait_table(lab, &pods, vip, PLAIN, 1)?;
            product::wait_backends(lab, vip, 5 + u32::from(PLAIN), SOON)?;
            // As gracefully as pods go: what is under way ends.
            plain(lab, PLAIN, LEAVING)?;
            wait_table(lab, &pods, vip, PLAIN, 0)?;
            thread::sleep(UNDER_WAY);
            plain(lab, 0, READY)?;
            wait_table(lab, &pods, vip, 0, 1)?;
            pods.scale(3)?;
            wait_table(lab, &pods, vip, 0, 1)?;
            let least = pods.pods()?;

            let service = Service { protocol: 6, at: (vip, 80).into() };
            let mut wanted: Fates = (1..=PLAIN)
                .map(|n| ((service, (address(n), 80).into()), [&BEGINNING[..], &END].concat()))
                .collect();
            for (name, pod) in &most {
                let began = if before.contains_key(name) { &[][..] } else { &BEGINNING };
                let ended = if least.contains_key(name) { &[][..] } else { &END };
                wanted.insert(
                    (service, (pod.address.parse::<Ipv4Addr>()?, 8080).into()),
                    [began, ended].concat(),
                );
            }
            wanted.retain(|_, fate| !fate.is_empty());
            Ok(wanted)
        })?;
        let report = watch.stop();
        println!("{report}");
        ensure!(report.failures == 0 || moved_since(lab, began)?, "{report}");
        lab.kubectl(["vip", "unexpose", "svc/web", "-n", NAMESPACE])?.ok()?;
        for n in 1..=PLAIN {
            lab.netns().ip(&format!("address del {}/32 dev lo", address(n)))?;
        }
        pods.remove()
    });
}
