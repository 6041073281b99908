//! A Service that grows to sixty backends and shrinks again, while clients ask.

use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::Duration;

use lab::Segment;

use super::*;

/// Addresses of the backends: one host has them all.
fn backend(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 87, 3, n], 8080))
}

/// As many backends as said get connections; of those up to `all`, the others keep what they have.
fn wanted(ready: u8, all: u8) -> Tables {
    let destinations = (1..=all).map(|n| (backend(n), u32::from(n <= ready))).collect();
    let settings = Settings::new(Scheduler::Rr, None);
    desired([(key(80), VirtualService { settings, destinations })])
}

#[test]
fn no_request_is_lost_from_three_to_sixty_and_back() {
    needs_ipvs();
    let lan = Segment::new(3).unwrap();
    let (node, client, pods) = (lan.host(1), lan.host(2), lan.host(3));
    node.netns().ip("address add 10.87.2.50/32 dev eth0").unwrap();
    let lines: String =
        (1..=60).map(|n| format!("ip address add {}/16 dev eth0;", backend(n).ip())).collect();
    pods.exec(&lines).unwrap().ok().unwrap();
    let listener = pods.run(|| TcpListener::bind(("0.0.0.0", 8080)).unwrap()).unwrap();
    thread::spawn(move || {
        for stream in listener.incoming() {
            let mut stream = stream.unwrap();
            thread::spawn(move || {
                let mut line = [0; 8];
                if stream.read(&mut line).is_ok_and(|length| length > 0) {
                    let _ = stream.write_all(b"here");
                }
            });
        }
    });
    node.run(|| converge(&mut kernel(), &wanted(3, 3))).unwrap();

    let (stop, asked) = (AtomicBool::new(false), AtomicUsize::new(0));
    let lost = thread::scope(|scope| {
        let clients: Vec<_> = (0..4)
            .map(|_| {
                scope.spawn(|| {
                    client.run(|| {
                        let mut lost = Vec::new();
                        while !stop.load(Ordering::Relaxed) {
                            asked.fetch_add(1, Ordering::Relaxed);
                            lost.extend(ask().err());
                        }
                        lost
                    })
                })
            })
            .collect();
        let hundred_more = || {
            let end = asked.load(Ordering::Relaxed) + 100;
            while asked.load(Ordering::Relaxed) < end {
                thread::sleep(Duration::from_millis(5));
            }
        };
        let steps: Vec<usize> = [wanted(60, 60), wanted(3, 60), wanted(3, 3)]
            .iter()
            .map(|tables| {
                let steps = node.run(|| converge(&mut kernel(), tables)).unwrap().len();
                hundred_more();
                steps
            })
            .collect();
        stop.store(true, Ordering::Relaxed);
        // One message for each backend that comes, ends, or goes.
        assert_eq!(steps, [57, 57, 57]);
        clients.into_iter().flat_map(|client| client.join().unwrap().unwrap()).collect::<Vec<_>>()
    });
    assert!(lost.is_empty(), "{} of {} requests: {}", lost.len(), asked.load(Ordering::Relaxed), lost[0]);
}

fn ask() -> std::io::Result<()> {
    let limit = Duration::from_secs(10);
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((VIP, 80)), limit)?;
    stream.set_read_timeout(Some(limit))?;
    stream.write_all(b"who?")?;
    let mut line = [0; 8];
    match stream.read(&mut line)? {
        0 => Err(std::io::ErrorKind::UnexpectedEof.into()),
        _ => Ok(()),
    }
}
