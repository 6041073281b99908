//! What becomes of connections when somebody flushes IPVS, and when their backend is removed.

use std::io::{ErrorKind, Read, Write};
use std::net::{TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use lab::Segment;

use super::traffic::{IPV4, connect, say, serve};
use super::*;

/// Connections of each kind.
const EACH: usize = 25;
/// As long as the agent takes at most to see a flush and to put some services back.
const FLUSHED: Duration = Duration::from_millis(100);
/// How long a client of UDP goes on asking.
const PATIENCE: Duration = Duration::from_secs(3);

#[test]
fn connections_outlive_a_flush_by_others_and_end_with_their_backend() {
    needs_ipvs();
    let lan = Segment::new(4).unwrap();
    let (node, client) = (lan.host(1), lan.host(2));
    node.netns().ip(IPV4.bound).unwrap();
    let backends = [3, 4].map(|number| SocketAddr::new((IPV4.host)(number), 8080));
    serve(lan.host(3).netns(), backends[0], "one");
    serve(lan.host(4).netns(), backends[1], "two");
    let service = VirtualService {
        settings: Settings::new(Scheduler::Rr, None),
        destinations: backends.map(|backend| (backend, 1)).into(),
    };
    let udp = ServiceKey { protocol: Protocol::Udp, ..key(53) };
    let mut wanted = desired([(key(80), service.clone()), (udp, service)]);
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();

    let at = SocketAddr::new(VIP.into(), 80);
    let open = || -> Vec<TcpStream> {
        (0..EACH).map(|_| connect(client.netns(), at).unwrap()).inspect(|c| drop(say(c).unwrap())).collect()
    };
    let (busy, idle) = (open(), open());
    node.exec("ipvsadm -C").unwrap().ok().unwrap();
    for mut stream in &busy {
        stream.write_all(b"who?").unwrap();
    }
    thread::sleep(FLUSHED);
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();
    let broken = |stream: &&TcpStream| {
        let mut stream = *stream;
        !stream.read(&mut [0; 64]).is_ok_and(|length| length > 0)
    };
    let busy = busy.iter().filter(broken).count();
    let idle = idle.iter().filter(|stream| say(stream).is_err()).count();
    assert_eq!((busy, idle), (0, 0), "broken by the flush");

    let mine = |answer: &str| backends[usize::from(answer.starts_with("two"))];
    let stream = connect(client.netns(), at).unwrap();
    let gone = mine(&say(&stream).unwrap());
    let socket = client.run(|| UdpSocket::bind("0.0.0.0:4000").unwrap()).unwrap();
    socket.connect((VIP, 53)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let ask = || {
        socket.send(b"who?")?;
        let mut line = [0; 64];
        socket.recv(&mut line).map(|length| String::from_utf8_lossy(&line[..length]).into_owned())
    };
    let silent = mine(&ask().unwrap());
    wanted.apply(&Change::DeleteDestination(key(80), gone));
    wanted.apply(&Change::DeleteDestination(udp, silent));
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();
    assert_eq!(say(&stream).unwrap_err().kind(), ErrorKind::ConnectionReset);
    // One that keeps its port is sent to another backend.
    let tries = PATIENCE.as_millis() / 200;
    assert!((0..tries).any(|_| ask().is_ok()), "the client of UDP stays with a backend that is gone");
}
