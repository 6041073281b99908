//! The nftables table of a node, on this machine's own kernel: what it does to packets, and that nothing else is touched.
//! The product speaks netlink; here `nft` says what came of it.

#![allow(clippy::unwrap_used, reason = "what cannot go on has failed")]

use std::collections::BTreeSet;
use std::io::{ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream};
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use ipnet::IpNet;
use lab::command::{LIMIT, Output, until, words};
use lab::netns::in_new_netns;
use lab::{Host, Segment};
use vip_core::plan::{Change, Protocol, ServiceKey, Tables};
use vip_node::dataplane::{Dataplane, DataplaneError, Kernel, Nat};

const VIP: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 87, 2, 50));
const VIP6: IpAddr = IpAddr::V6(Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 2, 0x50));

fn key(protocol: Protocol, port: u16) -> ServiceKey {
    ServiceKey { address: VIP, protocol, port }
}

fn key6(protocol: Protocol, port: u16) -> ServiceKey {
    ServiceKey { address: VIP6, protocol, port }
}

/// The node's part: guards the addresses and opens TCP 80 and UDP 53 of each.
fn program(nat: &mut Nat) {
    let changes = [key, key6].into_iter().flat_map(|key| {
        let (tcp, udp) = (key(Protocol::Tcp, 80), key(Protocol::Udp, 53));
        [Change::Guard(tcp.address), Change::Open(tcp), Change::Open(udp)]
    });
    assert_eq!(apply(nat, &changes.collect::<Vec<_>>()), vec![]);
}

#[test]
fn the_ledger_outlives_a_table_that_is_deleted_while_no_agent_runs() {
    isolated(|| {
        let folder = std::env::temp_dir().join(format!("vip-ledger-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let nat = || {
            let mut nat = Nat::new();
            nat.remember_in(&folder);
            nat
        };
        program(&mut nat());
        nft("delete table inet kubectl-vip");
        let ledger = programmed().ledger;
        assert_eq!(nat().observe().unwrap().ledger, ledger);
        assert_eq!(Nat::new().observe().unwrap().ledger, ledger, "it is in the kernel again");
        // Where there is a table, it alone counts.
        let closed = key(Protocol::Tcp, 80);
        apply(&mut Nat::new(), &[Change::Close(closed)]);
        assert!(!nat().observe().unwrap().ledger.contains(&closed));
        nat().remove().unwrap();
        assert_eq!(nat().observe().unwrap(), Tables::default());
        std::fs::remove_dir(&folder).unwrap();
    });
}

/// What the table says after that.
fn programmed() -> Tables {
    let keys = [key, key6].into_iter().flat_map(|key| [key(Protocol::Tcp, 80), key(Protocol::Udp, 53)]);
    Tables { guarded: [VIP, VIP6].into(), ledger: keys.collect(), ..Tables::default() }
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
fn firewalls_that_drop_by_default_are_named() {
    isolated(|| {
        let mut kernel = Kernel::new("/proc/sys/net");
        let mut found = || kernel.firewalls().unwrap().into_iter().collect::<Vec<_>>();
        program(&mut Nat::new());
        nft("add table inet open");
        nft("add chain inet open input { type filter hook input priority 0; policy accept; }");
        nft("add rule inet open input tcp dport 22 drop");
        nft("add chain inet open nat { type nat hook input priority 100; }");
        nft("add chain inet open output { type filter hook output priority 0; policy drop; }");
        assert_eq!(found(), Vec::<String>::new());
        nft("add table ip filter");
        nft("add chain ip filter INPUT { type filter hook input priority 0; policy drop; }");
        nft("add chain inet open forward { type filter hook forward priority 0; policy accept; }");
        nft("add rule inet open forward ct state established accept");
        nft("add rule inet open forward counter log reject with icmpx type admin-prohibited");
        assert_eq!(found(), ["inet open forward", "ip filter INPUT"]);
        nft("add rule inet open forward accept");
        nft("delete table ip filter");
        assert_eq!(found(), Vec::<String>::new());
        nft("add table ip6 raw");
        nft("add chain ip6 raw last { type filter hook input priority 50; }");
        nft("add rule ip6 raw last drop");
        assert_eq!(found(), ["ip6 raw last"]);
    });
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
            set direct { type ipv4_addr . inet_proto . inet_service } \
            set near { type ipv4_addr . inet_proto . inet_service . ipv4_addr flags interval } \
            set restricted { type ipv4_addr . inet_proto . inet_service } \
            set sources { type ipv4_addr . inet_proto . inet_service . ipv4_addr flags interval } \
            set vips6 { type ipv6_addr } \
            set ports6 { type ipv6_addr . inet_proto . inet_service } \
            set direct6 { type ipv6_addr . inet_proto . inet_service } \
            set near6 { type ipv6_addr . inet_proto . inet_service . ipv6_addr flags interval } \
            set restricted6 { type ipv6_addr . inet_proto . inet_service } \
            set sources6 { type ipv6_addr . inet_proto . inet_service . ipv6_addr flags interval } \
            chain prerouting { type filter hook prerouting priority mangle; policy accept; \
            ip daddr @vips meta l4proto icmp accept comment \"ping, path MTU and neighbours work (v4)\" \
            ip6 daddr @vips6 meta l4proto ipv6-icmp accept comment \"ping, path MTU and neighbours work (v4)\" \
            ip daddr . meta l4proto . th dport @ports ip daddr . meta l4proto . th dport != @restricted accept comment \"exposed ports are open (v4)\" \
            ip daddr . meta l4proto . th dport @ports ip daddr . meta l4proto . th dport . ip saddr @sources accept comment \"exposed to some (v4)\" \
            ip6 daddr . meta l4proto . th dport @ports6 ip6 daddr . meta l4proto . th dport != @restricted6 accept comment \"exposed ports are open (v4)\" \
            ip6 daddr . meta l4proto . th dport @ports6 ip6 daddr . meta l4proto . th dport . ip6 saddr @sources6 accept comment \"exposed to some (v4)\" \
            ip daddr @vips ct state established,related accept comment \"what was let in stays in (v4)\" \
            ip6 daddr @vips6 ct state established,related accept comment \"what was let in stays in (v4)\" \
            ip daddr @vips fib daddr type local meta l4proto tcp reject with tcp reset comment \"a virtual IP is no door to the node (v4)\" \
            ip daddr @vips fib daddr type local reject comment \"a virtual IP is no door to the node (v4)\" \
            ip6 daddr @vips6 fib daddr type local meta l4proto tcp reject with tcp reset comment \"a virtual IP is no door to the node (v4)\" \
            ip6 daddr @vips6 fib daddr type local reject comment \"a virtual IP is no door to the node (v4)\" } \
            chain output { type filter hook output priority mangle; policy accept; \
            ip daddr . meta l4proto . th dport @ports ip daddr . meta l4proto . th dport @restricted ip daddr . meta l4proto . th dport . ip saddr != @sources ct state ! established,related meta l4proto tcp reject with tcp reset comment \"exposed to some (v4)\" \
            ip daddr . meta l4proto . th dport @ports ip daddr . meta l4proto . th dport @restricted ip daddr . meta l4proto . th dport . ip saddr != @sources ct state ! established,related reject comment \"exposed to some (v4)\" \
            ip daddr @vips fib daddr type local meta l4proto != icmp ip daddr . meta l4proto . th dport != @ports ct state ! established,related meta l4proto tcp reject with tcp reset comment \"a virtual IP is no door to the node (v4)\" \
            ip daddr @vips fib daddr type local meta l4proto != icmp ip daddr . meta l4proto . th dport != @ports ct state ! established,related reject comment \"a virtual IP is no door to the node (v4)\" \
            ip6 daddr . meta l4proto . th dport @ports6 ip6 daddr . meta l4proto . th dport @restricted6 ip6 daddr . meta l4proto . th dport . ip6 saddr != @sources6 ct state ! established,related meta l4proto tcp reject with tcp reset comment \"exposed to some (v4)\" \
            ip6 daddr . meta l4proto . th dport @ports6 ip6 daddr . meta l4proto . th dport @restricted6 ip6 daddr . meta l4proto . th dport . ip6 saddr != @sources6 ct state ! established,related reject comment \"exposed to some (v4)\" \
            ip6 daddr @vips6 fib daddr type local meta l4proto != ipv6-icmp ip6 daddr . meta l4proto . th dport != @ports6 ct state ! established,related meta l4proto tcp reject with tcp reset comment \"a virtual IP is no door to the node (v4)\" \
            ip6 daddr @vips6 fib daddr type local meta l4proto != ipv6-icmp ip6 daddr . meta l4proto . th dport != @ports6 ct state ! established,related reject comment \"a virtual IP is no door to the node (v4)\" } \
            chain postrouting { type nat hook postrouting priority srcnat; policy accept; \
            ct direction original ct original ip daddr . meta l4proto . ct original proto-dst @direct ct original ip daddr . meta l4proto . ct original proto-dst . ip saddr != @near accept comment \"answers of this node's pods return through it (v4)\" \
            ct direction original ct original ip6 daddr . meta l4proto . ct original proto-dst @direct6 ct original ip6 daddr . meta l4proto . ct original proto-dst . ip6 saddr != @near6 accept comment \"answers of this node's pods return through it (v4)\" \
            meta nfproto ipv4 ct direction original ct original ip daddr @vips masquerade fully-random comment \"answers of pods return through this node (v4)\" \
            meta nfproto ipv6 ct direction original ct original ip6 daddr @vips6 masquerade fully-random comment \"answers of pods return through this node (v4)\" } }";
        assert_eq!(words, expected.split_whitespace().collect::<Vec<_>>(), "{shown}");
        nft("get element inet kubectl-vip vips { 10.87.2.50 }");
        nft("get element inet kubectl-vip ports { 10.87.2.50 . tcp . 80 , 10.87.2.50 . udp . 53 }");
        nft("get element inet kubectl-vip vips6 { fd87::2:50 }");
        nft("get element inet kubectl-vip ports6 { fd87::2:50 . tcp . 80 , fd87::2:50 . udp . 53 }");
    });
}

#[test]
fn the_ledger_is_there_for_the_next_process() {
    isolated(|| {
        program(&mut Nat::new());
        let mut next = Nat::new();
        assert_eq!(next.observe().unwrap(), programmed());
        // Done before is no failure, nor is gone before.
        program(&mut next);
        for key in [key, key6] {
            let close = Change::Close(key(Protocol::Tcp, 80));
            let other = Change::Open(key(Protocol::Tcp, 443));
            let never = Change::Close(key(Protocol::Udp, 1));
            assert_eq!(apply(&mut next, &[close.clone(), never, other]), vec![]);
            assert_eq!(apply(&mut next, &[close]), vec![]);
        }
        let ledger =
            [key, key6].into_iter().flat_map(|key| [key(Protocol::Tcp, 443), key(Protocol::Udp, 53)]);
        assert_eq!(Nat::new().observe().unwrap().ledger, ledger.collect());
    });
}

fn ranges<const N: usize>(text: [&str; N]) -> BTreeSet<IpNet> {
    text.into_iter().map(|net| net.parse().unwrap()).collect()
}

#[test]
fn what_is_said_of_clients_is_there_for_the_next_process() {
    isolated(|| {
        let (one, two) = (key(Protocol::Sctp, 80), key6(Protocol::Tcp, 80));
        let mut expected = Tables::default();
        // Ranges that overlap with those that they take the place of; none at all.
        for step in [
            Change::Restrict(one, ranges(["10.0.0.0/8", "192.0.2.7/32"])),
            Change::Restrict(two, ranges(["2001:db8::/32", "fd87::/16"])),
            Change::Restrict(one, ranges(["10.1.0.0/16", "192.0.2.0/24"])),
            Change::Direct(one, ranges([])),
            Change::Direct(two, ranges(["fd10:244:1::/64"])),
            Change::Restrict(one, ranges(["0.0.0.0/0"])),
            Change::Restrict(two, ranges([])),
            Change::Direct(two, ranges([])),
            Change::Unrestrict(one),
            Change::Indirect(two),
            Change::Unrestrict(two),
            Change::Indirect(one),
        ] {
            // Each by a process that has not seen the one before.
            for _ in 0..2 {
                assert_eq!(apply(&mut Nat::new(), std::slice::from_ref(&step)), vec![], "{step}");
            }
            expected.apply(&step);
            assert_eq!(Nat::new().observe().unwrap(), expected, "{step}");
        }
        assert!(!nft("list table inet kubectl-vip").contains("elements"));
    });
}

#[test]
fn a_service_that_cannot_be_restricted_is_not_opened() {
    isolated(|| {
        let (bad, good) = (key(Protocol::Tcp, 80), key(Protocol::Tcp, 81));
        // A range of the other family makes no sense to the kernel.
        let wrong = ranges(["2001:db8::/32"]);
        let steps = [
            Change::Guard(VIP),
            Change::Restrict(bad, wrong),
            Change::Open(bad),
            Change::Restrict(good, ranges(["192.0.2.0/24"])),
            Change::Open(good),
        ];
        let failed = apply(&mut Nat::new(), &steps);
        assert!(matches!(failed[0], (1, DataplaneError::Refused { .. })), "{failed:?}");
        assert_eq!(failed[1..], [(2, DataplaneError::Skipped(Change::Open(bad)))]);
        assert_eq!(Nat::new().observe().unwrap().ledger, BTreeSet::from([good]));
    });
}

#[test]
fn what_others_destroy_of_ours_is_put_back() {
    isolated(|| {
        let mut nat = Nat::new();
        program(&mut nat);
        for key in [key, key6] {
            let key = key(Protocol::Tcp, 80);
            let net = BTreeSet::from([IpNet::from(key.address)]);
            let steps = [Change::Restrict(key, net.clone()), Change::Direct(key, net)];
            assert_eq!(apply(&mut nat, &steps), vec![]);
        }
        let (tables, listed) = (nat.observe().unwrap(), nft("--terse list table inet kubectl-vip"));
        for harm in [
            "flush ruleset",
            "delete table inet kubectl-vip",
            "flush chain inet kubectl-vip prerouting",
            "flush set inet kubectl-vip ports",
            "flush set inet kubectl-vip ports6",
            "flush set inet kubectl-vip restricted",
            "flush set inet kubectl-vip sources6",
            "flush set inet kubectl-vip near",
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
        assert_eq!(Nat::new().observe().unwrap(), programmed());
        assert_eq!(nft("--terse list table inet kubectl-vip"), listed);
    });
}

#[test]
fn a_table_that_knew_no_ipv6_is_replaced() {
    isolated(|| {
        let mut nat = Nat::new();
        program(&mut nat);
        let listed = nft("--terse list table inet kubectl-vip");
        nft("flush table inet kubectl-vip");
        nft("delete set inet kubectl-vip vips6");
        nft("delete set inet kubectl-vip ports6");
        let mut next = Nat::new();
        let ledger = BTreeSet::from([key(Protocol::Tcp, 80), key(Protocol::Udp, 53)]);
        let tables = next.observe().unwrap();
        assert_eq!((tables.guarded, tables.ledger), ([VIP].into(), ledger));
        program(&mut next);
        assert_eq!(next.observe().unwrap(), programmed());
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
        assert_eq!(Nat::new().observe().unwrap().ledger.len(), 3000);
        nft("flush ruleset");
        assert_eq!(nat.observe().unwrap().ledger, keys().collect());
        assert_eq!(Nat::new().observe().unwrap().ledger.len(), 3000);
        for _ in 0..2 {
            assert_eq!(apply(&mut nat, &keys().map(Change::Close).collect::<Vec<_>>()), vec![]);
            assert_eq!(Nat::new().observe().unwrap().ledger.len(), 0);
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
def family(address):
    return socket.AF_INET6 if ':' in address else socket.AF_INET
def tcp(address, port):
    s = socket.create_server((address, port), family=family(address))
    while True:
        c, a = s.accept(); c.sendall(a[0].encode()); c.close()
def udp(address, port):
    s = socket.socket(family(address), socket.SOCK_DGRAM); s.bind((address, port))
    while True:
        d, a = s.recvfrom(99); s.sendto(a[0].encode(), a)
for p in map(int, sys.argv[2:]):
    for a in ('0.0.0.0', '::'): threading.Thread(target=tcp, args=(a, p)).start()
    for a in sys.argv[1].split(): threading.Thread(target=udp, args=(a, p)).start()
"#;

/// Asks one port of an address; prints the answer or the error's name.
const CLIENT: &str = r#"
import socket, sys
kind, address, port = sys.argv[1], sys.argv[2], int(sys.argv[3])
s = socket.socket(socket.AF_INET6 if ':' in address else socket.AF_INET,
                  socket.SOCK_STREAM if kind == 'tcp' else socket.SOCK_DGRAM); s.settimeout(2)
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
    until("the server", LIMIT, || {
        Ok((ask(host, "udp", "127.0.0.1", ports[ports.len() - 1]) == "127.0.0.1").then_some(()))
    })
    .unwrap();
}

fn ask(host: &Host, kind: &str, address: &str, port: &str) -> String {
    let mut client = Command::new(PYTHON);
    client.args(["-c", CLIENT, kind, address, port]);
    host.netns().exec(&mut client, LIMIT).unwrap().text().to_owned()
}

/// What differs between IP versions.
#[derive(Clone, Copy)]
struct Version {
    vip: IpAddr,
    /// How to bind the virtual IP.
    bound: &'static str,
    /// The address of a host by its number.
    host: fn(u8) -> IpAddr,
    /// Settings of a node that forwards, and does not send its clients elsewhere.
    forwards: &'static str,
}

const IPV4: Version = Version {
    vip: VIP,
    bound: "address add 10.87.2.50/32 dev eth0",
    host: |number| IpAddr::from([10, 87, 0, 10 + number]),
    forwards: "net.ipv4.ip_forward=1 net.ipv4.conf.all.send_redirects=0",
};

const IPV6: Version = Version {
    vip: VIP6,
    bound: "address add fd87::2:50/128 dev eth0 nodad preferred_lft 0",
    host: |number| IpAddr::from([0xfd87, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(number)]),
    forwards: "net.ipv6.conf.all.forwarding=1",
};

impl Version {
    fn host(self, number: u8) -> String {
        (self.host)(number).to_string()
    }

    fn key(self, protocol: Protocol, port: u16) -> ServiceKey {
        ServiceKey { address: self.vip, protocol, port }
    }
}

#[test]
fn a_virtual_ip_is_no_door_to_the_node() {
    no_door(IPV4);
}

#[test]
fn a_virtual_ip_of_ipv6_is_no_door_to_the_node() {
    no_door(IPV6);
}

fn no_door(version: Version) {
    let lan = Segment::new(2).unwrap();
    let (node, client) = (lan.host(1), lan.host(2));
    let (vip, own) = (version.vip.to_string(), version.host(1));
    node.netns().ip(version.bound).unwrap();
    serve(node, &format!("{vip} {own}"), &["80", "53", "22"]);
    node.run(|| {
        program(&mut Nat::new());
        nft("add table inet proxy");
        for (hook, priority) in [("prerouting", -100), ("output", -100)] {
            nft(&format!("add chain inet proxy {hook} {{ type nat hook {hook} priority {priority} ; }}"));
            nft(&format!("add rule inet proxy {hook} fib daddr type local tcp dport 30080 redirect to :22"));
        }
    })
    .unwrap();
    for (asker, number) in [(client, 2), (node, 1)] {
        let from = version.host(number);
        // Over IPv6 a host asks an address of its own from that address (RFC 6724, rule 1).
        let to_vip = if number == 1 && version.vip.is_ipv6() { &vip } else { &from };
        assert_eq!(&ask(asker, "tcp", &vip, "80"), to_vip);
        assert_eq!(&ask(asker, "udp", &vip, "53"), to_vip);
        // What the node itself sends by datagrams is refused as it is sent.
        let refused = if number == 1 { "PermissionError" } else { "ConnectionRefusedError" };
        // Open over one transport only.
        assert_eq!(ask(asker, "udp", &vip, "80"), refused);
        assert_eq!(ask(asker, "tcp", &vip, "53"), "ConnectionRefusedError");
        // Closed at the VIP, open at the node.
        assert_eq!(ask(asker, "tcp", &vip, "22"), "ConnectionRefusedError");
        assert_eq!(ask(asker, "udp", &vip, "22"), refused);
        assert_eq!(ask(asker, "tcp", &own, "22"), from);
        assert_eq!(ask(asker, "udp", &own, "22"), from);
        // As kube-proxy sends a NodePort elsewhere.
        assert_eq!(ask(asker, "tcp", &own, "30080"), from);
        assert_eq!(ask(asker, "tcp", &vip, "30080"), "ConnectionRefusedError");
        asker.exec(&format!("ping -c 1 -W 2 {vip}")).unwrap().ok().unwrap();
    }
    // A port that closes and opens again.
    let change = |change: Change| node.run(|| assert_eq!(apply(&mut Nat::new(), &[change]), vec![])).unwrap();
    change(Change::Close(version.key(Protocol::Tcp, 80)));
    assert_eq!(ask(client, "tcp", &vip, "80"), "ConnectionRefusedError");
    change(Change::Open(version.key(Protocol::Tcp, 80)));
    assert_eq!(ask(client, "tcp", &vip, "80"), version.host(2));
    // An address that is not guarded is a node's like any other.
    change(Change::Unguard(version.vip));
    assert_eq!(ask(client, "tcp", &vip, "22"), version.host(2));
}

/// A neighbour that knows the address asks it, and no multicast address, whether it is still there.
#[test]
fn a_virtual_ip_of_ipv6_answers_its_neighbours() {
    let lan = Segment::new(2).unwrap();
    let (node, client) = (lan.host(1), lan.host(2));
    node.netns().ip(IPV6.bound).unwrap();
    node.run(|| program(&mut Nat::new())).unwrap();
    let ping = || client.exec("ping -c 1 -W 2 fd87::2:50").unwrap().ok().unwrap();
    ping();
    let mac = node.mac().unwrap();
    client.netns().ip(&format!("neighbour replace fd87::2:50 lladdr {mac} dev eth0 nud probe")).unwrap();
    until("the answer to a probe", LIMIT, || {
        let state = client.netns().ip("neighbour show fd87::2:50")?.stdout;
        assert!(!state.contains("FAILED"), "{state}");
        Ok(state.contains("REACHABLE").then_some(()))
    })
    .unwrap();
    client.netns().ip("neighbour flush dev eth0").unwrap();
    ping();
}

#[test]
fn connections_outlive_their_port() {
    let lan = Segment::new(2).unwrap();
    let (node, client) = (lan.host(1), lan.host(2));
    for version in [IPV4, IPV6] {
        node.netns().ip(version.bound).unwrap();
        let at = SocketAddr::new(version.vip, 80);
        let listener = node.run(|| TcpListener::bind(at).unwrap()).unwrap();
        let mut nat = node.run(|| {
            let mut nat = Nat::new();
            program(&mut nat);
            nat
        });
        let nat = nat.as_mut().unwrap();
        let connect = || client.run(|| TcpStream::connect_timeout(&at, LIMIT)).unwrap();
        let mut stream = connect().unwrap();
        let (mut accepted, _) = listener.accept().unwrap();
        let mut both_ways = || {
            let mut byte = [0];
            stream.write_all(b"x").unwrap();
            accepted.read_exact(&mut byte).unwrap();
            accepted.write_all(b"y").unwrap();
            stream.read_exact(&mut byte).unwrap();
            byte
        };
        assert_eq!(both_ways(), *b"y");
        let close = Change::Close(version.key(Protocol::Tcp, 80));
        assert_eq!(apply(nat, &[close]), vec![]);
        assert_eq!(both_ways(), *b"y");
        assert_eq!(connect().map(drop).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    }
}

/// Ranges change all the time, and some overlap with those before: who is in all of them always gets in, and who is in none
/// never does.
#[test]
fn who_may_connect_changes_without_a_moment_in_between() {
    let lan = Segment::new(4).unwrap();
    let [node, inside, outside] = [1, 2, 4].map(|number| lan.host(number));
    for (version, wide, narrow) in
        [(IPV4, "10.87.0.12/31", "10.87.0.12/32"), (IPV6, "fd87::12/127", "fd87::12/128")]
    {
        node.netns().ip(version.bound).unwrap();
        let at = SocketAddr::new(version.vip, 80);
        let listener = node.run(|| TcpListener::bind(at).unwrap()).unwrap();
        thread::spawn(move || listener.incoming().for_each(drop));
        let (key, other) = (version.key(Protocol::Tcp, 80), IpNet::from(version.vip));
        let [wide, narrow] = [wide, narrow].map(|net| net.parse::<IpNet>().unwrap());
        node.run(|| {
            let steps = [Change::Guard(version.vip), Change::Restrict(key, [wide].into()), Change::Open(key)];
            assert_eq!(apply(&mut Nat::new(), &steps), vec![]);
        })
        .unwrap();
        let done = AtomicBool::new(false);
        let may = |host: &Host| host.run(|| TcpStream::connect_timeout(&at, LIMIT).map(drop)).unwrap();
        let tries = || (0..60).map(|_| (may(inside).is_ok(), may(outside).is_ok())).collect::<BTreeSet<_>>();
        let seen = thread::scope(|scope| {
            scope.spawn(|| {
                node.run(|| {
                    let mut nat = Nat::new();
                    while !done.load(Ordering::Relaxed) {
                        for ranges in [[narrow].into(), [narrow, other].into(), [wide].into()] {
                            assert_eq!(apply(&mut nat, &[Change::Restrict(key, ranges)]), vec![]);
                        }
                    }
                })
                .unwrap();
            });
            let seen = tries();
            done.store(true, Ordering::Relaxed);
            seen
        });
        assert_eq!(seen, BTreeSet::from([(true, false)]));
        // Without a single range nobody gets in, the node itself included; without the restriction everybody.
        let change =
            |change: Change| node.run(|| assert_eq!(apply(&mut Nat::new(), &[change]), vec![])).unwrap();
        change(Change::Restrict(key, BTreeSet::new()));
        assert!([inside, outside, node].into_iter().all(|host| may(host).is_err()));
        change(Change::Unrestrict(key));
        assert!([inside, outside, node].into_iter().all(|host| may(host).is_ok()));
    }
}

/// What IPVS does to a packet's destination is done by a foreign table here.
#[test]
fn clients_of_a_virtual_ip_are_masqueraded_and_no_others() {
    masqueraded(IPV4, "ip");
}

#[test]
fn clients_of_a_virtual_ip_of_ipv6_are_masqueraded_and_no_others() {
    masqueraded(IPV6, "ip6");
}

fn masqueraded(version: Version, ip: &str) {
    let lan = Segment::new(3).unwrap();
    let (node, client, backend) = (lan.host(1), lan.host(2), lan.host(3));
    let (vip, own, asker) = (version.vip.to_string(), version.host(1), version.host(2));
    let to = |port: u16| SocketAddr::new((version.host)(3), port);
    node.netns().ip(version.bound).unwrap();
    node.exec(&format!("sysctl -w {}", version.forwards)).unwrap().ok().unwrap();
    serve(backend, &version.host(3), &["8080", "9090"]);
    let dnat = format!(
        "add table {ip} foreign; \
        add chain {ip} foreign prerouting {{ type nat hook prerouting priority -100 ; }}; \
        add rule {ip} foreign prerouting {ip} daddr {vip} tcp dport 80 dnat to {}; \
        add rule {ip} foreign prerouting {ip} daddr {own} tcp dport 81 dnat to {}",
        to(8080),
        to(9090)
    );
    node.exec(&format!("nft '{dnat}'")).unwrap().ok().unwrap();
    // Without us the backend answers the client directly, from an address it never asked.
    assert_ne!(ask(client, "tcp", &vip, "80"), asker);
    node.run(|| program(&mut Nat::new())).unwrap();
    assert_eq!(ask(client, "tcp", &vip, "80"), own);
    // The same node's other business keeps its addresses: there the backend still answers past it.
    assert_ne!(ask(client, "tcp", &own, "81"), own);
    node.run(|| Nat::new().remove()).unwrap().unwrap();
    assert_ne!(ask(client, "tcp", &vip, "80"), own);
}
