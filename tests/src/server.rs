//! A server on a host of a segment: answers every HTTP request with a name, at all addresses of the host.

use std::{
    io::{self, Read as _, Write as _},
    net::{Ipv6Addr, SocketAddr, TcpListener, TcpStream},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result};
use socket2::{Domain, Socket, Type};

use crate::netns::Netns;

/// How many answer at once.
const WORKERS: usize = 4;
/// How many may wait for that: a second's worth, so that a busy machine loses none. It would look like a missing owner.
const BACKLOG: i32 = 1024;

/// Answers until it is dropped.
#[derive(Debug)]
pub struct Server {
    stop: Arc<AtomicBool>,
    workers: Vec<JoinHandle<()>>,
}

impl Server {
    /// Listens on port 80 over IPv4 and IPv6 in a namespace.
    pub fn start(netns: &Netns, name: &str) -> Result<Self> {
        let listener = netns.run(listen)?;
        let listener = Arc::new(listener.context("port 80 is taken")?);
        listener.set_nonblocking(true)?;
        let stop = Arc::new(AtomicBool::new(false));
        let body =
            format!("HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{name}", name.len());
        let workers = (0..WORKERS)
            .map(|_| {
                let (listener, stop, body) = (Arc::clone(&listener), Arc::clone(&stop), body.clone());
                thread::spawn(move || {
                    while !stop.load(Ordering::Relaxed) {
                        match listener.accept() {
                            Ok((stream, _)) => answer(stream, &body),
                            Err(_) => thread::sleep(Duration::from_millis(1)),
                        }
                    }
                })
            })
            .collect();
        Ok(Self { stop, workers })
    }
}

fn listen() -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::IPV6, Type::STREAM, None)?;
    socket.set_reuse_address(true)?;
    socket.bind(&SocketAddr::from((Ipv6Addr::UNSPECIFIED, 80)).into())?;
    socket.listen(BACKLOG)?;
    Ok(socket.into())
}

impl Drop for Server {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        for worker in self.workers.drain(..) {
            let _ = worker.join();
        }
    }
}

/// One request; a client that hangs up is its own business.
fn answer(mut stream: TcpStream, body: &str) {
    let mut request = [0; 1024];
    let _ = stream.set_nonblocking(false);
    let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
    let mut length = 0;
    while let Ok(read @ 1..) = stream.read(&mut request[length..]) {
        length += read;
        if request[..length].ends_with(b"\r\n\r\n") {
            let _ = stream.write_all(body.as_bytes());
            return;
        }
    }
}
