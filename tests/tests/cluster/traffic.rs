//! Requests through a virtual IP: who is answered, by whom, and what is refused.

use std::{
    collections::BTreeSet,
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context as _, Result, ensure};
use lab::{Lab, Node, command, guest, product, workload::Pod};
use serde_json::Value;

use super::{Exposed, NAMESPACE, SOON, check, check_alone, installed, neighbours::Replanted, undisturbed};

/// Asks until all pods have answered. A request without an answer ends it.
fn reach(who: &str, all: &BTreeSet<String>, mut ask: impl FnMut() -> Result<BTreeSet<String>>) -> Result<()> {
    let (mut reached, start) = (BTreeSet::new(), Instant::now());
    loop {
        reached.extend(ask().with_context(|| who.to_owned())?);
        if reached == *all {
            return Ok(());
        }
        // The pods of a node that stood still for a moment get nothing until they answer the owner again.
        ensure!(start.elapsed() < SOON, "{who} reached {reached:?} of {all:?}");
    }
}

/// The names in the answers to some requests from a client on the LAN.
fn ask_from_lan(lab: &Lab, url: &str) -> Result<BTreeSet<String>> {
    (0..12).map(|_| Ok(lab.client().get(url)?.body)).collect()
}

/// The names in the answers that a node gets over TCP. One process, and a connection for each.
fn ask_from_node(node: &Node<'_>, vip: Ipv4Addr) -> Result<BTreeSet<String>> {
    let urls = format!("http://{vip}/hostname ").repeat(9);
    names(node, &format!("curl -sS -m 5 -H 'Connection: close' -w '\\n' {urls}"))
}

/// The same over UDP.
fn ask_from_node_by_udp(node: &Node<'_>, vip: Ipv4Addr) -> Result<BTreeSet<String>> {
    let program = format!(
        "import socket\nfor i in range(9):\n s=socket.socket(socket.AF_INET,socket.SOCK_DGRAM); s.settimeout(5); \
         s.connect((\"{vip}\",81)); s.send(b\"hostname\"); print(s.recv(64).decode())"
    );
    names(node, &format!("python3 -c '{program}'"))
}

/// What a command on a node prints, as names.
fn names(node: &Node<'_>, command: &str) -> Result<BTreeSet<String>> {
    Ok(node.exec(command)?.ok()?.stdout.split_whitespace().map(str::to_owned).collect())
}

/// The names in the answers that a pod gets: agnhost, at `address:port`, asks on behalf of who asks it.
pub(super) fn ask_from_pod(
    lab: &Lab,
    node: &str,
    pod: &str,
    vip: impl Into<IpAddr>,
    protocol: &str,
    port: u16,
) -> Result<BTreeSet<String>> {
    let (number, vip): (u8, IpAddr) = (node.trim_start_matches("node-").parse()?, vip.into());
    let url =
        format!("http://{pod}/dial?host={vip}&port={port}&protocol={protocol}&request=hostname&tries=9");
    let answer = lab.node(number).exec(&format!("curl -sS -m 40 '{url}'"))?.ok()?;
    let answer: Value = serde_json::from_str(&answer.stdout)?;
    ensure!(answer["errors"].is_null(), "a pod on {node} over {protocol}: {}", answer["errors"]);
    let responses = answer["responses"].as_array().cloned().unwrap_or_default();
    Ok(responses.iter().filter_map(|one| one.as_str()).map(str::to_owned).collect())
}

#[test]
fn every_kind_of_client_reaches_the_pods_of_all_nodes_over_tcp_and_udp() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "traffic")?;
        let vip = exposed.vip;
        let pods = super::web(lab)?.pods()?;
        let all: BTreeSet<String> = pods.keys().cloned().collect();

        undisturbed(lab, vip, || {
            reach("TCP from the LAN", &all, || ask_from_lan(lab, &exposed.url()))?;
            reach("UDP from the LAN", &all, || ask_from_lan(lab, &format!("udp://{vip}:81/hostname")))?;
            for node in lab.nodes() {
                reach(&format!("TCP from {}", node.name()), &all, || ask_from_node(&node, vip))?;
                reach(&format!("UDP from {}", node.name()), &all, || ask_from_node_by_udp(&node, vip))?;
            }
            for pod in pods.values() {
                let dialler = format!("{}:8080", pod.address);
                for (protocol, port) in [("http", 80), ("udp", 81)] {
                    reach(&format!("{protocol} from a pod on {}", pod.node), &all, || {
                        ask_from_pod(lab, &pod.node, &dialler, vip, protocol, port)
                    })?;
                }
            }
            Ok(())
        })?;
        exposed.remove(lab)
    });
}

#[test]
fn a_port_that_is_not_exposed_is_refused_at_the_virtual_ip_only() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "ports")?;
        let owner = lab.node(exposed.owner.number);
        // A server on port 22 of every address of the owner, as sshd would be.
        thread::scope(|scope| -> Result<()> {
            scope.spawn(|| owner.exec("timeout 50 busybox nc -ll -p 22 -e /bin/true"));
            let outcome = [22, 10250].into_iter().try_for_each(|port| {
                let at = |address: Ipv4Addr| SocketAddr::from((address, port));
                command::until(&format!("port {port} of the node"), SOON, || {
                    Ok((!lab.client().tcp_refused(at(owner.address()))?).then_some(()))
                })?;
                ensure!(lab.client().tcp_refused(at(exposed.vip))?, "port {port} answers at the virtual IP");
                let from_owner =
                    owner.exec(&format!("timeout 5 bash -c 'exec 3<>/dev/tcp/{}/{port}'", exposed.vip))?;
                ensure!(from_owner.stderr.contains("refused"), "from the owner itself: {from_owner:?}");
                Ok(())
            });
            owner.exec("pkill -f 'nc -ll -p 22'")?;
            outcome
        })?;
        let udp = lab.client().limit(Duration::from_secs(2)).udp(SocketAddr::from((exposed.vip, 9)), "x");
        ensure!(udp.is_err(), "UDP port 9 answers at the virtual IP");
        let ping = lab.netns().exec(
            std::process::Command::new("ping").args(["-c1", "-W3", &exposed.vip.to_string()]),
            command::LIMIT,
        )?;
        ensure!(ping.success(), "the virtual IP does not answer to ping: {ping:?}");
        exposed.remove(lab)
    });
}

/// How a node and a pod on it fare with an HTTP request: the words of curl, and those of agnhost.
fn try_from(node: &Node<'_>, pod: &Pod, at: SocketAddr) -> Result<[String; 2]> {
    let (host, port) = (at.ip(), at.port());
    let dial = format!(
        "http://{}:8080/dial?host={host}&port={port}&protocol=http&request=hostname&tries=1",
        pod.address
    );
    let words = format!(
        "curl -sS -m 5 -o /dev/null -w 'answered' http://{at}/hostname 2>&1; echo; curl -sS -m 9 '{dial}'"
    );
    let told = node.exec(&words)?.stdout;
    let (own, of_pod) = told.trim().split_once('\n').unwrap_or((&told, ""));
    Ok([own.to_owned(), of_pod.to_owned()])
}

#[test]
fn node_ports_and_the_kubelet_answer_at_nodes_only_whoever_asks_in_whatever_family() {
    check(|| only_what_is_exposed_answers(installed()?, "nodeport"));
}

#[test]
fn beside_a_kube_proxy_in_iptables_mode_only_what_is_exposed_answers_too() {
    check_alone(|| {
        let lab = installed()?;
        let _replanted = Replanted(lab);
        lab.with_kube_proxy_in("iptables", || {
            command::until("the rules of that mode", 3 * SOON, || {
                let rules = lab.each_node(|node| Ok(node.exec("iptables-save -t nat")?.ok()?.stdout))?;
                Ok(rules.iter().all(|rules| rules.contains("KUBE-NODEPORTS")).then_some(()))
            })?;
            only_what_is_exposed_answers(lab, "iptables")
        })
    });
}

/// A Service of type NodePort is asked at its virtual IPs and at nodes, from the LAN, from nodes and from pods.
fn only_what_is_exposed_answers(lab: &'static Lab, service: &str) -> Result<()> {
    let pods = super::web(lab)?.pods()?;
    let manifest = format!(
        "apiVersion: v1\nkind: Service\nmetadata: {{name: {service}, namespace: {NAMESPACE}}}\nspec: {{type: NodePort, \
             ipFamilyPolicy: RequireDualStack, selector: {{app: web}}, ports: [{{port: 80, targetPort: http}}]}}\n"
    );
    lab.apply(&manifest)?;
    let svc = format!("svc/{service}");
    lab.kubectl(["vip", "expose", &svc, "-n", NAMESPACE])?.ok()?;
    let vips: [IpAddr; 2] = [
        product::address_of::<Ipv4Addr>(lab, NAMESPACE, service)?.into(),
        product::address_of::<Ipv6Addr>(lab, NAMESPACE, service)?.into(),
    ];
    let port = ["get", "service", service, "-n", NAMESPACE, "-o", "jsonpath={.spec.ports[0].nodePort}"];
    let port: u16 = lab.kubectl(port)?.ok()?.text().parse()?;
    for vip in vips {
        let owner = product::wait_one_owner(lab, vip, SOON)?;
        product::wait_destinations(lab, vip, 80, 3, SOON)?;
        let six = vip.is_ipv6();
        let own = |node: u8| {
            if six { guest::address6(node).into() } else { IpAddr::from(guest::address(node)) }
        };
        let (shut, open) = (
            [port, 10250],
            [SocketAddr::new(vip, 80), (own(owner.number), port).into(), (own(owner.number), 10250).into()],
        );
        for at in open {
            command::until(&format!("{at} to accept"), SOON, || {
                Ok((!lab.client().tcp_refused(at)?).then_some(()))
            })?;
        }
        for port in shut {
            ensure!(lab.client().tcp_refused((vip, port).into())?, "port {port} answers at {vip}");
        }
        lab.each_node(|node| {
            let pod = pods.values().find(|pod| pod.node == node.name()).cloned();
            let pod = pod.ok_or_else(|| anyhow::anyhow!("no pod on {}", node.name()))?;
            for at in open {
                let [own, of_pod] = try_from(&node, &pod, at)?;
                ensure!(
                    own == "answered" && of_pod.contains("responses"),
                    "{at} from {}: {own}, {of_pod}",
                    node.name()
                );
            }
            for port in shut {
                let [own, of_pod] = try_from(&node, &pod, SocketAddr::new(vip, port))?;
                let refused = own.contains("refused") || own.contains("Failed to connect");
                ensure!(
                    refused && of_pod.contains("connection refused"),
                    "{vip}, port {port}, from {}: {own}, {of_pod}",
                    node.name()
                );
            }
            Ok(())
        })?;
    }
    lab.kubectl(["vip", "unexpose", &svc, "-n", NAMESPACE])?.ok()?;
    lab.kubectl(["delete", "service", service, "-n", NAMESPACE, "--wait=false"])?.ok().map(drop)
}

#[test]
fn two_services_share_an_address_on_different_ports() {
    check(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "share")?;
        let admin = "apiVersion: v1\nkind: Service\nmetadata: {name: admin, namespace: shop}\n\
                     spec: {selector: {app: web}, ports: [{name: http, port: 8000, targetPort: http}]}\n";
        lab.apply(admin)?;
        lab.kubectl([
            "vip",
            "expose",
            "svc/admin",
            "-n",
            NAMESPACE,
            "--share",
            "--ip",
            &exposed.vip.to_string(),
        ])?
        .ok()?;
        let url = format!("http://{}:8000/hostname", exposed.vip);
        command::until("an answer on the second port", SOON, || lab.client().get(&url).map(Some))?;
        undisturbed(lab, exposed.vip, || lab.client().get(&exposed.url()))?;
        lab.kubectl(["vip", "unexpose", "svc/admin", "-n", NAMESPACE])?.ok()?;
        command::until("the second port to be refused", SOON, || {
            Ok(lab.client().tcp_refused(SocketAddr::from((exposed.vip, 8000)))?.then_some(()))
        })?;
        undisturbed(lab, exposed.vip, || lab.client().get(&exposed.url()))?;
        exposed.remove(lab)
    });
}
