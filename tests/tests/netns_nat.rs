//! The nftables table of a node, on this machine's own kernel: what it does to packets, and that nothing else is touched.
//! The product speaks netlink; here `nft` says what came of it.

#![allow(clippy::unwrap_used, reason = "what cannot go on has failed")]

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr};
use std::path::Path;
use std::process::Command;
use std::thread;

use lab::command::{Output, words};
use lab::netns::in_new_netns;
use lab::{Host, Segment};
use vip_core::plan::{Change, Protocol, ServiceKey};
use vip_node::dataplane::{Dataplane, DataplaneError, Kernel, Nat};

const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 87, 2, 50));

fn key(protocol: Protocol, port: u16) -> ServiceKey {
    ServiceKey { address: VIP, protocol, port }
}

/// The node's part: guards the address and opens TCP 80 and UDP 53.
fn program(nat: &mut Nat) {
    let changes =
        [Change::Guard(VIP), Change::Open(key(Protocol::Tcp, 80)), Change::Open(key(Protocol::Udp, 53))];
    assert_eq!(apply(nat, &changes), vec![]);
}

fn apply(nat: &mut Nat, changes: &[Change]) -> Vec<(usize, DataplaneError)> {
    nat.apply(&changes.iter().collect::<Vec<_>>()).unwrap()
}

fn nft(line: &str) -> String {
    let words_of: Vec<&str> = ["nft"].into_iter().chain(line.split_whitespace()).collect();
    words(&words_of).and_then(Output::ok).unwrap().stdout
}

fn isolated(work: impl FnOnce() + Send) {
    in_new_netns(work).unwrap();
}

#[test]
fn nft_shows_the_table_as_documented() {
    isolated(|| {
        program(&mut Nat::new());
        let shown = nft("--terse list table inet kubectl-vip");
        let words: Vec<&str> = shown.split_whitespace().collect();
        let expected = "table inet kubectl-vip { \
            set vips { type ipv4_addr } \
            set ports { type ipv4_addr . inet_proto . inet_service } \
            chain prerouting { type filter hook prerouting priority mangle; policy accept; \
                ip daddr @vips meta l4proto icmp accept comment \"ping and path MTU work (v1)\" \
                ip daddr . meta l4proto . th dport @ports accept comment \"exposed ports are open (v1)\" \
                ip daddr @vips ct state established,related accept comment \"what was let in stays in (v1)\" \
                ip daddr @vips fib daddr type local meta l4proto tcp reject with tcp reset \
                    comment \"a virtual IP is no door to the node (v1)\" \
                ip daddr @vips fib daddr type local reject comment \"a virtual IP is no door to the node (v1)\" } \
            chain postrouting { type nat hook postrouting priority srcnat; policy accept; \
                meta nfproto ipv4 ct direction original ct original ip daddr @vips masquerade fully-random \
                    comment \"answers of pods return through this node (v1)\" } }";
        assert_eq!(words, expected.split_whitespace().collect::<Vec<_>>(), "{shown}");
        nft("get element inet kubectl-vip vips { 10.87.2.50 }");
        nft("get element inet kubectl-vip ports { 10.87.2.50 . tcp . 80 , 10.87.2.50 . udp . 53 }");
    });
}

#[test]
fn the_ledger_is_there_for_the_next_process() {
    isolated(|| {
        program(&mut Nat::new());
        let mut next = Nat::new();
        let ledger = BTreeSet::from([key(Protocol::Tcp, 80), key(Protocol::Udp, 53)]);
        assert_eq!(next.observe().unwrap(), (BTreeSet::from([VIP]), ledger));
        // Done before is no failure, nor is gone before.
        program(&mut next);
        let close = Change::Close(key(Protocol::Tcp, 80));
        let other = Change::Open(key(Protocol::Tcp, 443));
        assert_eq!(apply(&mut next, &[close.clone(), Change::Close(key(Protocol::Udp, 1)), other]), vec![]);
        assert_eq!(apply(&mut next, &[close]), vec![]);
        let ledger = BTreeSet::from([key(Protocol::Tcp, 443), key(Protocol::Udp, 53)]);
        assert_eq!(Nat::new().observe().unwrap().1, ledger);
    });
}

#[test]
fn a_step_that_cannot_be_leaves_the_others_alone() {
    isolated(|| {
        let six: IpAddr = "fd87::2:50".parse().unwrap();
        let mut nat = Nat::new();
        let failed =
            apply(&mut nat, &[Change::Guard(VIP), Change::Guard(six), Change::Open(key(Protocol::Tcp, 1))]);
        assert_eq!(failed.len(), 1);
        assert_eq!(failed[0].0, 1);
        assert!(failed[0].1.to_string().contains("IPv6 is not supported"), "{}", failed[0].1);
        assert_eq!(
            Nat::new().observe().unwrap(),
            (BTreeSet::from([VIP]), BTreeSet::from([key(Protocol::Tcp, 1)]))
        );
    });
}

#[test]
fn what_others_destroy_of_ours_is_put_back() {
    isolated(|| {
        let mut nat = Nat::new();
        program(&mut nat);
        let (tables, listed) = (nat.observe().unwrap(), nft("--terse list table inet kubectl-vip"));
        for harm in [
            "flush ruleset",
            "delete table inet kubectl-vip",
            "flush chain inet kubectl-vip prerouting",
            "flush set inet kubectl-vip ports",
            "insert rule inet kubectl-vip prerouting accept",
            "delete element inet kubectl-vip vips { 10.87.2.50 }",
        ] {
            nft(harm);
            assert_eq!(nat.observe().unwrap(), tables, "{harm}");
            assert_eq!(nft("--terse list table inet kubectl-vip"), listed, "{harm}");
        }
        nft("flush ruleset");
        assert!(!nat.is_there().unwrap());
    });
}

#[test]
fn an_older_table_is_replaced_and_its_ledger_kept() {
    isolated(|| {
        program(&mut Nat::new());
        let listed = nft("--terse list table inet kubectl-vip");
        // As an older agent may have left it: other rules, the same sets.
        nft("flush chain inet kubectl-vip prerouting");
        nft("flush chain inet kubectl-vip postrouting");
        nft("delete chain inet kubectl-vip postrouting");
        assert_eq!(Nat::new().observe().unwrap().1.len(), 2);
        assert_eq!(nft("--terse list table inet kubectl-vip"), listed);
    });
}

#[test]
fn nothing_is_made_before_it_is_needed_and_nothing_foreign_is_touched() {
    isolated(|| {
        nft("add table inet foreign");
        nft("add chain inet foreign input { type filter hook input priority 0 ; }");
        nft("add rule inet foreign input tcp dport 22 counter accept");
        nft("add table ip kubectl-vip");
        let before = nft("list ruleset");
        let mut nat = Nat::new();
        nat.observe().unwrap();
        assert_eq!(apply(&mut nat, &[Change::Close(key(Protocol::Tcp, 80)), Change::Unguard(VIP)]), vec![]);
        assert_eq!(nft("list ruleset"), before);
        program(&mut nat);
        assert_ne!(nft("list ruleset"), before);
        nat.remove().unwrap();
        nat.remove().unwrap();
        assert_eq!(nft("list ruleset"), before);
        // Nor does it come back by itself.
        nat.observe().unwrap();
        assert_eq!(nft("list ruleset"), before);
    });
}

#[test]
fn thousands_in_one_go() {
    isolated(|| {
        let mut nat = Nat::new();
        let keys = || (1..=3000).map(|port| key(Protocol::Tcp, port));
        assert_eq!(apply(&mut nat, &keys().map(Change::Open).collect::<Vec<_>>()), vec![]);
        assert_eq!(Nat::new().observe().unwrap().1.len(), 3000);
        nft("flush ruleset");
        assert_eq!(nat.observe().unwrap().1, keys().collect());
        assert_eq!(Nat::new().observe().unwrap().1.len(), 3000);
        for _ in 0..2 {
            assert_eq!(apply(&mut nat, &keys().map(Change::Close).collect::<Vec<_>>()), vec![]);
            assert_eq!(Nat::new().observe().unwrap().1.len(), 0);
        }
    });
}

/// This machine's kernel has no IPVS, as some nodes'.
#[test]
fn a_node_without_ipvs_is_told_so_and_left_alone() {
    if Path::new("/proc/net/ip_vs").exists() {
        return;
    }
    isolated(|| {
        let mut kernel = Kernel::new("/proc/sys/net");
        assert_eq!(kernel.observe(), Err(DataplaneError::IpvsUnavailable));
        assert_eq!(nft("list ruleset"), "");
        program(&mut Nat::new());
        kernel.remove_everything().unwrap();
        assert_eq!(nft("list ruleset"), "");
    });
}

const PYTHON: &str = "/usr/bin/python3";

/// Listens on TCP and UDP ports, answers with the client's address.
const SERVER: &str = r#"
import socket, threading, sys
def tcp(port):
    s = socket.socket(); s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1); s.bind(('0.0.0.0', port)); s.listen()
    while True:
        c, a = s.accept(); c.sendall(a[0].encode()); c.close()
def udp(address, port):
    s = socket.socket(type=socket.SOCK_DGRAM); s.bind((address, port))
    while True:
        d, a = s.recvfrom(99); s.sendto(a[0].encode(), a)
for p in map(int, sys.argv[2:]):
    threading.Thread(target=tcp, args=(p,)).start()
    for a in sys.argv[1].split(): threading.Thread(target=udp, args=(a, p)).start()
"#;

/// Asks one port of an address; prints the answer or the error's name.
const CLIENT: &str = r#"
import socket, sys
kind, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
s = socket.socket(type=socket.SOCK_STREAM if kind == 'tcp' else socket.SOCK_DGRAM); s.settimeout(2)
try:
    s.connect((address, port))
    if kind == 'udp': s.send(b'x')
    print(s.recv(99).decode())
except Exception as e: print(type(e).__name__)
"#;

fn serve(host: &Host, addresses: &str, ports: &[&str]) {
    // Over UDP a server has to answer from the address that was asked.
    let mut server = Command::new(PYTHON);
    let server = server.args(["-c", SERVER, &format!("127.0.0.1 {addresses}")]).args(ports);
    let mut server = host.spawn(server).unwrap();
    // It is killed with its host.
    thread::spawn(move || server.wait());
    lab::command::until("the server", lab::command::LIMIT, || {
        Ok((ask(host, "udp", "127.0.0.1", ports[ports.len() - 1]) == "127.0.0.1").then_some(()))
    })
    .unwrap();
}

fn ask(host: &Host, kind: &str, address: &str, port: &str) -> String {
    let mut client = Command::new(PYTHON);
    client.args(["-c", CLIENT, kind, address, port]);
    host.netns().exec(&mut client, lab::command::LIMIT).unwrap().text().to_owned()
}

#[test]
fn a_virtual_ip_is_no_door_to_the_node() {
    let lan = Segment::new(2).unwrap();
    let (node, client) = (lan.host(1), lan.host(2));
    node.netns().ip("address add 10.87.2.50/32 dev eth0").unwrap();
    serve(node, "10.87.2.50 10.87.0.11", &["80", "53", "22"]);
    node.run(|| program(&mut Nat::new())).unwrap();
    for asker in [client, node] {
        let own = asker.address().to_string();
        assert_eq!(ask(asker, "tcp", "10.87.2.50", "80"), own);
        assert_eq!(ask(asker, "udp", "10.87.2.50", "53"), own);
        // Open over one transport only.
        assert_eq!(ask(asker, "udp", "10.87.2.50", "80"), "ConnectionRefusedError");
        assert_eq!(ask(asker, "tcp", "10.87.2.50", "53"), "ConnectionRefusedError");
        // Closed at the VIP, open at the node.
        assert_eq!(ask(asker, "tcp", "10.87.2.50", "22"), "ConnectionRefusedError");
        assert_eq!(ask(asker, "udp", "10.87.2.50", "22"), "ConnectionRefusedError");
        assert_eq!(ask(asker, "tcp", "10.87.0.11", "22"), own);
        assert_eq!(ask(asker, "udp", "10.87.0.11", "22"), own);
        asker.exec("ping -c 1 -W 2 10.87.2.50").unwrap().ok().unwrap();
    }
    // A port that closes and opens again.
    let change = |change: Change| node.run(|| assert_eq!(apply(&mut Nat::new(), &[change]), vec![])).unwrap();
    change(Change::Close(key(Protocol::Tcp, 80)));
    assert_eq!(ask(client, "tcp", "10.87.2.50", "80"), "ConnectionRefusedError");
    change(Change::Open(key(Protocol::Tcp, 80)));
    assert_eq!(ask(client, "tcp", "10.87.2.50", "80"), "10.87.0.12");
    // An address that is not guarded is a node's like any other.
    change(Change::Unguard(VIP));
    assert_eq!(ask(client, "tcp", "10.87.2.50", "22"), "10.87.0.12");
}

/// What IPVS does to a packet's destination is done by a foreign table here.
#[test]
fn clients_of_a_virtual_ip_are_masqueraded_and_no_others() {
    let lan = Segment::new(3).unwrap();
    let (node, client, backend) = (lan.host(1), lan.host(2), lan.host(3));
    node.netns().ip("address add 10.87.2.50/32 dev eth0").unwrap();
    node.exec("echo 1 > /proc/sys/net/ipv4/ip_forward; echo 0 > /proc/sys/net/ipv4/conf/all/send_redirects")
        .unwrap();
    serve(backend, "10.87.0.13", &["8080", "9090"]);
    let dnat = "add table ip foreign; \
        add chain ip foreign prerouting { type nat hook prerouting priority -100 ; }; \
        add rule ip foreign prerouting ip daddr 10.87.2.50 tcp dport 80 dnat to 10.87.0.13:8080; \
        add rule ip foreign prerouting ip daddr 10.87.0.11 tcp dport 81 dnat to 10.87.0.13:9090";
    node.exec(&format!("nft '{dnat}'")).unwrap().ok().unwrap();
    // Without us the backend answers the client directly, from an address it never asked.
    assert_ne!(ask(client, "tcp", "10.87.2.50", "80"), "10.87.0.12");
    node.run(|| program(&mut Nat::new())).unwrap();
    assert_eq!(ask(client, "tcp", "10.87.2.50", "80"), "10.87.0.11");
    // The same node's other business keeps its addresses: there the backend still answers past it.
    assert_ne!(ask(client, "tcp", "10.87.0.11", "81"), "10.87.0.11");
    node.run(|| Nat::new().remove()).unwrap().unwrap();
    assert_ne!(ask(client, "tcp", "10.87.2.50", "80"), "10.87.0.11");
}
