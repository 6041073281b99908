//! A client that asks addresses every millisecond by UDP, and the hosts that answer with their number.

use std::{
    io,
    net::{Ipv4Addr, UdpSocket},
    os::fd::OwnedFd,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use lab::Host;
use nix::sys::socket::{
    AddressFamily, SockFlag, SockType, SockaddrIn, bind, setsockopt, socket, sockopt::IpFreebind,
};
use std::os::fd::AsRawFd as _;

const PORT: u16 = 7;
/// Between two questions to an address.
const PACE: Duration = Duration::from_millis(1);
/// How often a thread that waits looks whether it is still wanted.
const LOOK: Duration = Duration::from_millis(100);

/// Answers from addresses, whether the host has them yet or not.
pub struct Echo {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<()>>,
}

/// Asks in the background.
pub struct Probe {
    stop: Arc<AtomicBool>,
    targets: Vec<Arc<Mutex<Vec<Answer>>>>,
    threads: Vec<JoinHandle<()>>,
}

/// An answer: when, and the number of the host.
#[derive(Clone, Copy, Debug)]
pub struct Answer {
    pub at: Instant,
    pub host: u8,
}

impl Echo {
    pub fn start(host: &Host, addresses: &[Ipv4Addr]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut threads = Vec::new();
        for address in addresses {
            let socket = host.run(|| freely_bound(*address))?.with_context(|| format!("no {address}"))?;
            socket.set_read_timeout(Some(LOOK))?;
            let (done, number) = (Arc::clone(&stop), host.number());
            threads.push(thread::spawn(move || {
                while !done.load(Ordering::Relaxed) {
                    if let Ok((_, client)) = socket.recv_from(&mut [0; 64]) {
                        // A host that lost the address in the meantime can't answer.
                        let _ = socket.send_to(&[number], client);
                    }
                }
            }));
        }
        Ok(Self { stop, threads })
    }
}

/// A socket at an address that the host may lack.
fn freely_bound(address: Ipv4Addr) -> Result<UdpSocket> {
    let socket: OwnedFd = socket(AddressFamily::Inet, SockType::Datagram, SockFlag::SOCK_CLOEXEC, None)?;
    setsockopt(&socket, IpFreebind, &true)?;
    let [a, b, c, d] = address.octets();
    bind(socket.as_raw_fd(), &SockaddrIn::new(a, b, c, d, PORT))?;
    Ok(socket.into())
}

impl Probe {
    /// Asks each address every millisecond from a host.
    pub fn start(host: &Host, addresses: &[Ipv4Addr]) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let (mut targets, mut threads, mut sockets) = (Vec::new(), Vec::new(), Vec::new());
        for address in addresses {
            let socket = host.run(|| -> io::Result<UdpSocket> {
                let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
                socket.connect((*address, PORT))?;
                Ok(socket)
            })??;
            socket.set_read_timeout(Some(LOOK))?;
            let answers: Arc<Mutex<Vec<Answer>>> = Arc::default();
            targets.push(Arc::clone(&answers));
            let (done, ear) = (Arc::clone(&stop), socket.try_clone()?);
            threads.push(thread::spawn(move || {
                let mut buffer = [0; 64];
                while !done.load(Ordering::Relaxed) {
                    // Errors are what is measured: nobody was there.
                    if let Ok(1..) = ear.recv(&mut buffer) {
                        lock(&answers).push(Answer { at: Instant::now(), host: buffer[0] });
                    }
                }
            }));
            sockets.push(socket);
        }
        let done = Arc::clone(&stop);
        threads.push(thread::spawn(move || {
            let mut next = Instant::now();
            while !done.load(Ordering::Relaxed) {
                for socket in &sockets {
                    let _ = socket.send(&[0]);
                }
                next += PACE;
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        }));
        Ok(Self { stop, targets, threads })
    }

    /// The last answer of each address.
    pub fn last(&self) -> Vec<Option<Answer>> {
        self.targets.iter().map(|answers| lock(answers).last().copied()).collect()
    }

    /// Of each address, the longest time between two answers of which the second came after that moment.
    pub fn gaps(&self, since: Instant) -> Vec<Duration> {
        let longest = |answers: &[Answer]| {
            let pairs = answers.windows(2).filter(|pair| pair[1].at > since);
            pairs.map(|pair| pair[1].at - pair[0].at).max().unwrap_or_default()
        };
        self.targets.iter().map(|answers| longest(&lock(answers))).collect()
    }
}

impl Drop for Echo {
    fn drop(&mut self) {
        end(&self.stop, &mut self.threads);
    }
}

impl Drop for Probe {
    fn drop(&mut self) {
        end(&self.stop, &mut self.threads);
    }
}

fn end(stop: &AtomicBool, threads: &mut Vec<JoinHandle<()>>) {
    stop.store(true, Ordering::Relaxed);
    for thread in threads.drain(..) {
        let _ = thread.join();
    }
}

fn lock(answers: &Mutex<Vec<Answer>>) -> MutexGuard<'_, Vec<Answer>> {
    answers.lock().unwrap_or_else(PoisonError::into_inner)
}
