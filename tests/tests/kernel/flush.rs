//! What becomes of connections when somebody flushes IPVS, and when their backend is removed: both depend on
//! `net.ipv4.vs.expire_nodest_conn`, and this is why it is 1.

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
/// How long a client is watched for.
const PATIENCE: Duration = Duration::from_secs(3);

/// What clients have seen.
#[derive(Debug, PartialEq, Eq)]
struct Seen {
    /// Connections broken by a flush, of those that sent something while IPVS was empty.
    busy: usize,
    /// Of those that did not.
    idle: usize,
    /// What a client on a connection to a backend that was removed is told.
    removed: Option<ErrorKind>,
    /// Whether a client of UDP that keeps its port is sent to another backend when its own was removed.
    moved: bool,
}

#[test]
fn what_a_flush_and_a_removed_backend_do_to_connections() {
    needs_ipvs();
    let expired = watch("1");
    println!("expire_nodest_conn=1: {expired:?}");
    // The kernel expires every connection of what is gone, a tick later: all are told to connect again, at once.
    assert_eq!(
        expired,
        Seen { busy: EACH, idle: EACH, removed: Some(ErrorKind::ConnectionReset), moved: true }
    );
    let kept = watch("0");
    println!("expire_nodest_conn=0: {kept:?}");
    // A flush would do no harm, and each backend that goes would leave its clients without an answer, those of UDP too.
    assert_eq!(kept, Seen { busy: 0, idle: 0, removed: Some(ErrorKind::WouldBlock), moved: false });
}

fn watch(value: &str) -> Seen {
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
    let wanted = desired([(key(80), service.clone()), (udp, service)]);
    node.run(|| converge(&mut kernel(), &wanted)).unwrap();
    node.exec(&format!("sysctl -w net.ipv4.vs.expire_nodest_conn={value}")).unwrap().ok().unwrap();
    // Without a look at the kernel, which would set it again.
    let take = |changes: &[Change]| {
        let changes: Vec<&Change> = changes.iter().collect();
        assert_eq!(node.run(|| Ipvs::new(SYSCTLS).apply(&changes)).unwrap().unwrap(), vec![]);
    };

    let at = SocketAddr::new(VIP.into(), 80);
    let open = || -> Vec<TcpStream> {
        (0..EACH).map(|_| connect(client.netns(), at).unwrap()).inspect(|c| drop(say(c).unwrap())).collect()
    };
    let (busy, idle) = (open(), open());
    node.exec("ipvsadm -C").unwrap().ok().unwrap();
    for mut stream in &busy {
        let _ = stream.write_all(b"who?");
    }
    thread::sleep(FLUSHED);
    let flushed = Tables { services: BTreeMap::new(), ..wanted.clone() };
    take(&plan(&wanted, &flushed).changes);
    let broken = |stream: &&TcpStream| {
        let mut stream = *stream;
        !stream.read(&mut [0; 64]).is_ok_and(|length| length > 0)
    };
    let busy = busy.iter().filter(broken).count();
    let idle = idle.iter().filter(|stream| say(stream).is_err()).count();

    let stream = connect(client.netns(), at).unwrap();
    let mine = |answer: &str| backends[usize::from(answer.starts_with("two"))];
    take(&[Change::DeleteDestination(key(80), mine(&say(&stream).unwrap()))]);
    let socket = client.run(|| UdpSocket::bind("0.0.0.0:4000").unwrap()).unwrap();
    socket.connect((VIP, 53)).unwrap();
    socket.set_read_timeout(Some(Duration::from_millis(200))).unwrap();
    let ask = || {
        socket.send(b"who?")?;
        let mut line = [0; 64];
        socket.recv(&mut line).map(|length| String::from_utf8_lossy(&line[..length]).into_owned())
    };
    take(&[Change::DeleteDestination(udp, mine(&ask().unwrap()))]);
    let tries = PATIENCE.as_millis() / 200;
    Seen {
        busy,
        idle,
        removed: say(&stream).err().map(|error| error.kind()),
        moved: (0..tries).any(|_| ask().is_ok()),
    }
}
