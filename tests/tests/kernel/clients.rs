//! What depends on the client: who may connect, whose address a pod sees, and what a host's firewall has to let through.

use std::io::ErrorKind;
use std::net::{IpAddr, TcpListener, TcpStream};
use std::time::Duration;

use ipnet::IpNet;
use lab::netns::Netns;
use lab::{Host, Segment};
use socket2::{Domain, Socket, Type};

use super::traffic::{IPV4, IPV6, Version, answer, ask_by_udp, connect, say, serve};
use super::*;

/// TCP 80 of an address and UDP 53, both to one backend.
fn both(version: &Version, backend: SocketAddr) -> Tables {
    let service =
        VirtualService { settings: Settings::new(Scheduler::Wlc, None), destinations: [(backend, 1)].into() };
    desired(keys(version).map(|key| (key, service.clone())))
}

fn keys(version: &Version) -> [ServiceKey; 2] {
    let tcp = ServiceKey { address: version.vip, protocol: Protocol::Tcp, port: 80 };
    [tcp, ServiceKey { protocol: Protocol::Udp, port: 53, ..tcp }]
}

/// A node that has the virtual IP and forwards. It refuses as often as it is asked, not once a second.
fn make_owner(node: &Host, version: &Version) {
    node.netns().ip(version.bound).unwrap();
    let forwards = "net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1";
    let refuses = "net.ipv4.icmp_ratelimit=0 net.ipv6.icmp.ratelimit=0";
    node.exec(&format!("sysctl -w {forwards} {refuses}")).unwrap().ok().unwrap();
}

#[test]
fn only_allowed_clients_connect() {
    only_allowed(&IPV4);
}

#[test]
fn only_allowed_clients_connect_over_ipv6() {
    only_allowed(&IPV6);
}

fn only_allowed(version: &Version) {
    needs_ipvs();
    let lan = Segment::new(4).unwrap();
    let [node, one, two, backend] = [1, 2, 3, 4].map(|number| lan.host(number));
    let (tcp, udp) = (SocketAddr::new(version.vip, 80), SocketAddr::new(version.vip, 53));
    let pod = SocketAddr::new((version.host)(4), 8080);
    make_owner(node, version);
    serve(backend.netns(), pod, "pod");
    let alone = |number: u8| BTreeSet::from([IpNet::from((version.host)(number))]);
    let all: IpNet = IpNet::new((version.host)(0), 16).unwrap().trunc();

    let mut wanted = both(version, pod);
    let mut allow = |ranges: Option<BTreeSet<IpNet>>| {
        for key in keys(version) {
            match &ranges {
                Some(ranges) => wanted.sources.insert(key, ranges.clone()),
                None => wanted.sources.remove(&key),
            };
        }
        let steps = node.run(|| converge(&mut kernel(), &wanted)).unwrap();
        // Another process reads what this one wrote.
        assert_eq!(node.run(|| kernel().observe().unwrap()).unwrap(), wanted);
        steps
    };
    let may = |host: &Host| {
        let connected = connect(host.netns(), tcp);
        let by_udp = ask_by_udp(host.netns(), udp);
        assert_eq!(connected.is_ok(), by_udp.is_ok());
        match connected {
            Ok(stream) => say(&stream).is_ok(),
            Err(error) => {
                for error in [error, by_udp.unwrap_err()] {
                    // The second is what the node's own processes are told.
                    let at_once = [ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied];
                    assert!(at_once.contains(&error.kind()), "{error}");
                }
                false
            }
        }
    };

    allow(Some(alone(2)));
    assert_eq!([one, two, node].map(may), [true, false, false]);
    let open = connect(one.netns(), tcp).unwrap();
    assert!(say(&open).is_ok());
    // Others are allowed, in ranges that overlap with those before.
    for (ranges, expected) in [
        (Some([all].into()), [true, true, true]),
        (Some(alone(3)), [false, true, false]),
        (Some(BTreeSet::new()), [false, false, false]),
        (None, [true, true, true]),
    ] {
        assert_eq!(allow(ranges.clone()).len(), 2, "one step for each service");
        assert!(say(&open).is_ok(), "a connection goes on when its client would not be let in any more");
        assert_eq!([one, two, node].map(may), expected, "{ranges:?}");
    }
}

#[test]
fn a_service_without_backends_refuses_every_time() {
    refuses(&IPV4);
}

#[test]
fn a_service_without_backends_refuses_every_time_over_ipv6() {
    refuses(&IPV6);
}

/// By resets, whose number no kernel limits: errors of ICMP are few, and a client that gets none waits.
fn refuses(version: &Version) {
    needs_ipvs();
    let lan = Segment::new(3).unwrap();
    let [node, client, backend] = [1, 2, 3].map(|number| lan.host(number));
    make_owner(node, version);
    node.exec("sysctl -w net.ipv4.icmp_ratelimit=1000 net.ipv6.icmp.ratelimit=1000").unwrap().ok().unwrap();
    let pod = SocketAddr::new((version.host)(3), 8080);
    serve(backend.netns(), pod, "pod");
    let (tcp, udp) = (SocketAddr::new(version.vip, 80), SocketAddr::new(version.vip, 53));
    let mut wanted = both(version, pod);
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();
    let open = connect(client.netns(), tcp).unwrap();
    assert!(say(&open).is_ok());

    // The backend ends, as the core has it: its connections go on, and nobody else may connect.
    for key in keys(version) {
        wanted.apply(&Change::SetDestination(key, pod, 0));
        wanted.sources.insert(key, BTreeSet::new());
    }
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();
    for from in [client, node] {
        for n in 0..20 {
            let error = connect(from.netns(), tcp).map(drop).unwrap_err();
            let at_once = [ErrorKind::ConnectionRefused, ErrorKind::PermissionDenied];
            assert!(at_once.contains(&error.kind()), "attempt {n}: {error}");
        }
    }
    assert_eq!(ask_by_udp(client.netns(), udp).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    assert!(say(&open).is_ok(), "an open connection went on before");
}

/// A namespace behind a bridge of a node, as a network plugin makes one for a pod.
struct Pod(Netns);

impl Pod {
    fn new(node: &Host, number: u16) -> Self {
        let pod = Self(Netns::create(format!("{}-pod{number}", node.netns().name())).unwrap());
        let name = pod.0.name();
        let ip = |line: &str| node.netns().ip(line).unwrap();
        ip(&format!("link add pod{number} type veth peer name eth0 netns {name}"));
        ip(&format!("link set pod{number} master cni0 up"));
        for line in [
            &format!("address add 10.244.1.{number}/24 dev eth0"),
            &format!("address add fd10:244:1::{number}/64 dev eth0 nodad"),
            "link set eth0 up",
            "route add default via 10.244.1.1",
            "-6 route add default via fd10:244:1::1",
        ] {
            pod.0.ip(line).unwrap();
        }
        pod
    }
}

impl Drop for Pod {
    fn drop(&mut self) {
        self.0.destroy().unwrap();
    }
}

#[test]
fn pods_see_their_clients() {
    see_clients(&IPV4, "10.244.1.0/24");
}

#[test]
fn pods_see_their_clients_over_ipv6() {
    see_clients(&IPV6, "fd10:244:1::/64");
}

fn see_clients(version: &Version, pods: &str) {
    needs_ipvs();
    let lan = Segment::new(2).unwrap();
    let (node, client) = (lan.host(1), lan.host(2));
    make_owner(node, version);
    for line in [
        "link add cni0 type bridge",
        "address add 10.244.1.1/24 dev cni0",
        "address add fd10:244:1::1/64 dev cni0 nodad",
        "link set cni0 up",
    ] {
        node.netns().ip(line).unwrap();
    }
    let (pod, other) = (Pod::new(node, 7), Pod::new(node, 8));
    let pods: IpNet = pods.parse().unwrap();
    let number = |number: u128| match pods.network() {
        IpAddr::V4(net) => IpAddr::from((u32::from(net) + number as u32).to_be_bytes()),
        IpAddr::V6(net) => IpAddr::from((u128::from(net) + number).to_be_bytes()),
    };
    let at = SocketAddr::new(number(7), 8080);
    serve(&pod.0, at, "pod");
    let (tcp, udp) = (SocketAddr::new(version.vip, 80), SocketAddr::new(version.vip, 53));
    let ask = |from: &Netns| {
        let answers = connect(from, tcp).and_then(|stream| say(&stream)).map_err(|error| error.kind());
        assert_eq!(ask_by_udp(from, udp).map_err(|error| error.kind()).is_ok(), answers.is_ok());
        answers
    };
    let mut wanted = both(version, at);
    let mut near = |ranges: Option<BTreeSet<IpNet>>| {
        for key in keys(version) {
            match &ranges {
                Some(ranges) => wanted.direct.insert(key, ranges.clone()),
                None => wanted.direct.remove(&key),
            };
        }
        node.run(|| converge(&mut kernel(), &wanted)).unwrap();
        assert_eq!(node.run(|| kernel().observe().unwrap()).unwrap(), wanted);
    };
    let sees = |address: IpAddr| Ok(format!("pod {address}"));

    near(None);
    let gateway = number(1);
    assert_eq!([client.netns(), &other.0].map(ask), [sees(gateway), sees(gateway)]);
    near(Some([pods].into()));
    assert_eq!(ask(client.netns()), sees((version.host)(2)));
    assert_eq!(ask(&other.0), sees(gateway));
    assert!(ask(node.netns()).is_ok(), "the node itself");
}

/// IPPROTO_SCTP
const SCTP: i32 = 132;

#[test]
fn sctp_is_balanced() {
    needs_ipvs();
    run("modprobe sctp");
    let lan = Segment::new(3).unwrap();
    let (node, client, backend) = (lan.host(1), lan.host(2), lan.host(3));
    make_owner(node, &IPV4);
    let socket = || Socket::new(Domain::IPV4, Type::STREAM, Some(SCTP.into())).unwrap();
    let at = SocketAddr::new((IPV4.host)(3), 8080);
    let listener: TcpListener = backend
        .run(|| {
            let socket = socket();
            socket.bind(&at.into()).unwrap();
            socket.listen(8).unwrap();
            socket.into()
        })
        .unwrap();
    answer(listener, "pod");
    let key = |port| ServiceKey { address: VIP.into(), protocol: Protocol::Sctp, port };
    let service =
        VirtualService { settings: Settings::new(Scheduler::Wlc, None), destinations: [(at, 1)].into() };
    let wanted = desired([(key(3868), service)]);
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();
    assert_eq!(node.run(|| kernel().observe().unwrap()).unwrap(), wanted);
    assert_eq!(node.run(ipvsadm).unwrap()[0], "-A --sctp-service 10.87.2.50:3868 -s wlc");
    let connect = |port: u16| {
        client
            .run(|| {
                let socket = socket();
                socket.connect_timeout(&SocketAddr::new(VIP.into(), port).into(), Duration::from_secs(10))?;
                Ok::<TcpStream, std::io::Error>(socket.into())
            })
            .unwrap()
    };
    let stream = connect(3868).unwrap();
    for _ in 0..3 {
        assert_eq!(say(&stream).unwrap(), format!("pod {}", (IPV4.host)(1)));
    }
    assert!(connect(3869).is_err(), "a port that is not exposed");
}

/// Traffic to a virtual IP meets the chains of a node's own traffic, and pods' answers those of forwarded traffic.
#[test]
fn a_firewall_that_drops_by_default_needs_two_rules() {
    needs_ipvs();
    let lan = Segment::new(3).unwrap();
    let (node, client, backend) = (lan.host(1), lan.host(2), lan.host(3));
    make_owner(node, &IPV4);
    let pod = SocketAddr::new((IPV4.host)(3), 8080);
    serve(backend.netns(), pod, "pod");
    node.run(|| converge(&mut kernel(), &both(&IPV4, pod))).unwrap();
    let ask =
        || connect(client.netns(), SocketAddr::new(VIP.into(), 80)).and_then(|stream| say(&stream)).is_ok();
    let nft = |line: &str| node.netns().run(|| run(&format!("nft {line}"))).unwrap();
    assert!(ask());
    nft("add table inet firewall");
    for chain in ["input", "forward"] {
        nft(&format!(
            "add chain inet firewall {chain} {{ type filter hook {chain} priority filter ; policy drop ; }}"
        ));
    }
    assert!(!ask());
    nft("add rule inet firewall input ip daddr 10.87.2.0/24 accept");
    assert!(!ask());
    nft("add rule inet firewall forward ct state established,related accept");
    assert!(ask());
}
