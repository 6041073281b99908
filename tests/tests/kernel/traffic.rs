//! Connections through IPVS, as clients and backends see them.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv6Addr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use lab::Segment;
use lab::command::until;
use lab::netns::Netns;

use super::*;

/// Answers every connection, and every datagram, with a name and the client's address; connections stay open.
pub(super) fn serve(netns: &Netns, at: SocketAddr, name: &'static str) {
    let (tcp, udp) = netns.run(|| (TcpListener::bind(at).unwrap(), UdpSocket::bind(at).unwrap())).unwrap();
    answer(tcp, name);
    thread::spawn(move || {
        let mut line = [0; 64];
        while let Ok((_, client)) = udp.recv_from(&mut line) {
            udp.send_to(format!("{name} {}", client.ip()).as_bytes(), client).unwrap();
        }
    });
}

/// Answers on connections with a name and the client's address.
pub(super) fn answer(listener: TcpListener, name: &'static str) {
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let client = stream.peer_addr().unwrap().ip();
                let mut line = [0; 64];
                while stream.read(&mut line).is_ok_and(|length| length > 0) {
                    stream.write_all(format!("{name} {client}").as_bytes()).unwrap();
                }
            });
        }
    });
}

pub(super) fn say(mut stream: &TcpStream) -> std::io::Result<String> {
    let mut line = [0; 64];
    stream.write_all(b"who?")?;
    let length = stream.read(&mut line)?;
    Ok(String::from_utf8_lossy(&line[..length]).into_owned())
}

pub(super) fn connect(from: &Netns, to: SocketAddr) -> std::io::Result<TcpStream> {
    from.run(|| {
        let stream = TcpStream::connect_timeout(&to, Duration::from_secs(3))?;
        stream.set_read_timeout(Some(Duration::from_secs(3)))?;
        Ok(stream)
    })
    .unwrap()
}

pub(super) fn ask_by_udp(from: &Netns, to: SocketAddr) -> std::io::Result<String> {
    from.run(|| {
        let socket = UdpSocket::bind((any(to.ip()), 0))?;
        socket.connect(to)?;
        socket.set_read_timeout(Some(Duration::from_secs(3)))?;
        socket.send(b"who?")?;
        let mut line = [0; 64];
        let length = socket.recv(&mut line)?;
        Ok(String::from_utf8_lossy(&line[..length]).into_owned())
    })
    .unwrap()
}

/// The address that stands for all of the host's.
fn any(like: IpAddr) -> IpAddr {
    match like {
        IpAddr::V4(_) => Ipv4Addr::UNSPECIFIED.into(),
        IpAddr::V6(_) => Ipv6Addr::UNSPECIFIED.into(),
    }
}

/// What differs between IP versions.
pub(super) struct Version {
    pub(super) vip: IpAddr,
    /// How to bind the virtual IP.
    pub(super) bound: &'static str,
    /// The address of a host by its number.
    pub(super) host: fn(u8) -> IpAddr,
}

pub(super) const IPV4: Version = Version {
    vip: IpAddr::V4(VIP),
    bound: "address add 10.87.2.50/32 dev eth0",
    host: |number| IpAddr::V4(Ipv4Addr::new(10, 87, 0, 10 + number)),
};

pub(super) const IPV6: Version = Version {
    vip: IpAddr::V6(Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 2, 0x50)),
    bound: "address add fd87::2:50/128 dev eth0 nodad preferred_lft 0",
    host: |number| IpAddr::V6(Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 0, 0x10 + u16::from(number))),
};

#[test]
fn over_ipv4() {
    traffic(&IPV4);
}

#[test]
fn over_ipv6() {
    traffic(&IPV6);
}

/// Every client reaches both backends through the node, which is all that the backends see; what is not exposed is shut.
fn traffic(version: &Version) {
    needs_ipvs();
    let lan = Segment::new(4).unwrap();
    let (node, client, one, two) = (lan.host(1), lan.host(2), lan.host(3), lan.host(4));
    let at = |port: u16| SocketAddr::new(version.vip, port);
    let backends = [3, 4].map(|number| SocketAddr::new((version.host)(number), 8080));
    node.netns().ip(version.bound).unwrap();
    if version.vip.is_ipv6() {
        node.exec("sysctl -w net.ipv6.conf.all.forwarding=1").unwrap().ok().unwrap();
    }
    serve(one.netns(), backends[0], "one");
    serve(two.netns(), backends[1], "two");
    let balanced = VirtualService {
        settings: Settings::new(Scheduler::Rr, None),
        destinations: backends.map(|backend| (backend, 1)).into(),
    };
    let key = |port: u16| ServiceKey { address: version.vip, protocol: Protocol::Tcp, port };
    let udp = ServiceKey { protocol: Protocol::Udp, ..key(53) };
    let empty = VirtualService { settings: Settings::new(Scheduler::Wlc, None), ..VirtualService::default() };
    let mut wanted = desired([(key(80), balanced.clone()), (udp, balanced.clone()), (key(81), empty)]);
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();
    let own_port = node.run(|| TcpListener::bind((any(version.vip), 22)).unwrap()).unwrap();
    thread::spawn(move || own_port.incoming().for_each(drop));
    let names = ["one", "two"].map(|name| format!("{name} {}", (version.host)(1)));

    for from in [client, node, one] {
        let tcp: BTreeSet<String> =
            (0..4).map(|_| say(&connect(from.netns(), at(80)).unwrap()).unwrap()).collect();
        let by_udp: BTreeSet<String> = (0..4).map(|_| ask_by_udp(from.netns(), at(53)).unwrap()).collect();
        let expected = BTreeSet::from(names.clone());
        assert_eq!((tcp, by_udp), (expected.clone(), expected));
        for shut in [22, 53, 81, 8080] {
            let error = connect(from.netns(), at(shut)).map(drop).unwrap_err();
            assert_eq!(error.kind(), std::io::ErrorKind::ConnectionRefused, "port {shut}");
        }
    }

    // A backend that drains keeps its connection and gets no new ones.
    let old: Vec<TcpStream> = (0..2).map(|_| connect(client.netns(), at(80)).unwrap()).collect();
    let answers: Vec<String> = old.iter().map(|stream| say(stream).unwrap()).collect();
    wanted.apply(&Change::SetDestination(key(80), backends[0], 0));
    assert_eq!(node.run(|| converge(&mut kernel(), &wanted)).unwrap().len(), 1);
    for _ in 0..4 {
        assert_eq!(say(&connect(client.netns(), at(80)).unwrap()).unwrap(), names[1]);
    }
    for (stream, name) in old.iter().zip(&answers) {
        assert_eq!(&say(stream).unwrap(), name, "a connection moved or broke");
    }

    // The agent's death and its next start change nothing; a service more or less does no harm to the others.
    let mut more = wanted.clone();
    more.services.insert(key(82), balanced);
    for wanted in [&more, &wanted] {
        node.run(|| converge(&mut kernel(), wanted)).unwrap();
        for (stream, name) in old.iter().zip(&answers) {
            assert_eq!(&say(stream).unwrap(), name);
        }
    }

    node.run(|| kernel().remove_everything().unwrap()).unwrap();
    assert_eq!(node.exec("ipvsadm -Sn; nft list ruleset").unwrap().text(), "");
    until(
        "an address without services is the node's own",
        LIMIT,
        || Ok(connect(client.netns(), at(22)).ok()),
    )
    .unwrap();
}
