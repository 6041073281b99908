//! A narrow link on the way to the client: who sends too much through a virtual IP is told, and sends less.

use std::io::{Read, Write};
use std::net::TcpListener;
use std::thread;

use lab::Segment;
use lab::netns::Netns;

use super::traffic::{IPV4, IPV6, Version, connect};
use super::*;

/// What a pod sends at once: enough for full packets.
const ANSWER: usize = 1 << 20;
/// What the link carries; IPv6 wants 1280 at least.
const NARROW: &str = "1300";

/// A client two hops away: a router that is a host of the segment, and behind it a link whose far end takes full packets, so
/// that the client asks for them.
struct Client(Netns);

impl Client {
    fn new(router: &lab::Host) -> Self {
        let client = Self(Netns::create(format!("{}-client", router.netns().name())).unwrap());
        let name = client.0.name();
        for line in [
            &format!("link add far0 type veth peer name eth0 netns {name}"),
            &format!("link set far0 mtu {NARROW} up"),
            "address add 10.99.1.1/24 dev far0",
            "address add fd99:1::1/64 dev far0 nodad",
        ] {
            router.netns().ip(line).unwrap();
        }
        for line in [
            "address add 10.99.1.2/24 dev eth0",
            "address add fd99:1::2/64 dev eth0 nodad",
            "link set eth0 up",
            "route add default via 10.99.1.1",
            "-6 route add default via fd99:1::1",
        ] {
            client.0.ip(line).unwrap();
        }
        client
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.0.destroy().unwrap();
    }
}

#[test]
fn a_narrow_link_to_the_client_is_heard_of() {
    narrow(&IPV4);
}

#[test]
fn a_narrow_link_to_the_client_is_heard_of_over_ipv6() {
    narrow(&IPV6);
}

fn narrow(version: &Version) {
    needs_ipvs();
    let lan = Segment::new(3).unwrap();
    let (node, router, backend) = (lan.host(1), lan.host(2), lan.host(3));
    for host in [node, router] {
        host.exec("sysctl -w net.ipv4.ip_forward=1 net.ipv6.conf.all.forwarding=1").unwrap().ok().unwrap();
    }
    node.netns().ip(version.bound).unwrap();
    let client = Client::new(router);
    let (net, via) = if version.vip.is_ipv6() {
        ("-6 route add fd99:1::/64", (version.host)(2))
    } else {
        ("route add 10.99.1.0/24", (version.host)(2))
    };
    node.netns().ip(&format!("{net} via {via}")).unwrap();

    let at = SocketAddr::new((version.host)(3), 8080);
    let listener = backend.run(|| TcpListener::bind(at).unwrap()).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            stream.unwrap().write_all(&vec![b'x'; ANSWER]).unwrap();
        }
    });
    let key = ServiceKey { address: version.vip, protocol: Protocol::Tcp, port: 80 };
    let service =
        VirtualService { settings: Settings::new(Scheduler::Wlc, None), destinations: [(at, 1)].into() };
    node.run(|| converge(&mut kernel(), &desired([(key, service)]))).unwrap();

    let mut stream = connect(&client.0, SocketAddr::new(version.vip, 80)).unwrap();
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    assert_eq!(answer.len(), ANSWER);
    // The router did say so, or the test shows nothing.
    let counter = if version.vip.is_ipv6() { "Icmp6OutPktTooBigs" } else { "IpFragFails" };
    let said = router.exec(&format!("nstat -asz {counter}")).unwrap().ok().unwrap().stdout;
    let count =
        said.lines().find_map(|line| line.strip_prefix(counter)?.split_whitespace().next()?.parse().ok());
    assert!(count > Some(0), "{said}");
}
