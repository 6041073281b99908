//! Who answers ARP for an address: asked and heard on a packet socket, past the kernel's own cache.

use std::{
    fmt,
    net::Ipv4Addr,
    os::fd::AsRawFd,
    panic,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};
use nix::{
    ifaddrs::getifaddrs,
    sys::socket::{
        AddressFamily, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType, SockaddrLike, bind, recv, send,
        setsockopt, socket, sockopt::ReceiveTimeout,
    },
    sys::time::TimeVal,
};

use crate::netns::Netns;

const ETHERTYPE: [u8; 2] = [0x08, 0x06];
const BROADCAST: [u8; 6] = [0xff; 6];

/// The MAC addresses that claim `address` on an interface of this thread's namespace, in the order they were heard.
pub fn owners(interface: &str, sender: Ipv4Addr, address: Ipv4Addr, window: Duration) -> Result<Vec<String>> {
    let link = link(interface)?;
    let mac = link.addr().context("an interface without a MAC address")?;
    let socket = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthAll)
        .context("can't open a packet socket (are you root?)")?;
    bind(socket.as_raw_fd(), &link).with_context(|| format!("can't listen on {interface}"))?;
    send(socket.as_raw_fd(), &request(mac, sender, address), MsgFlags::empty())
        .context("can't ask by ARP")?;
    let deadline = Instant::now() + window;
    let mut owners = Vec::new();
    let mut frame = [0; 2048];
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        if left < Duration::from_micros(1) {
            return Ok(owners);
        }
        setsockopt(
            &socket,
            ReceiveTimeout,
            &TimeVal::new(left.as_secs().cast_signed(), left.subsec_micros().into()),
        )?;
        let Ok(length) = recv(socket.as_raw_fd(), &mut frame, MsgFlags::empty()) else { continue };
        if let Some(owner) = claim(&frame[..length], address).filter(|owner| !owners.contains(owner)) {
            owners.push(owner);
        }
    }
}

/// A host that goes on asking, as one that knows no answer yet would, and counts who answers.
#[derive(Debug)]
pub struct ArpWatch {
    stop: Arc<AtomicBool>,
    asking: JoinHandle<Result<Answers>>,
}

/// How long nobody and how long more than one answered, at the longest.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Answers {
    /// Nobody.
    pub none: Duration,
    /// More than one.
    pub several: Duration,
}

/// Between two questions.
const PACE: Duration = Duration::from_millis(20);

impl ArpWatch {
    /// Asks from a namespace, at that interface of it, until stopped.
    pub fn start(netns: &Netns, interface: &str, sender: Ipv4Addr, address: Ipv4Addr) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (netns, interface, done) = (netns.clone(), interface.to_owned(), Arc::clone(&stop));
        let asking = thread::spawn(move || {
            netns.enter()?;
            let mut tally = Tally::default();
            while !done.load(Ordering::Relaxed) {
                let answers = owners(&interface, sender, address, PACE)?.len();
                tally.add(Instant::now(), answers);
            }
            Ok(tally.longest)
        });
        Self { stop, asking }
    }

    /// Asks no more.
    pub fn stop(self) -> Result<Answers> {
        self.stop.store(true, Ordering::Relaxed);
        self.asking.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    }
}

impl fmt::Display for Answers {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "ARP: nobody for {} ms, two for {} ms", self.none.as_millis(), self.several.as_millis())
    }
}

/// Adds up what each question gave.
#[derive(Default)]
struct Tally {
    longest: Answers,
    none_since: Option<Instant>,
    several_since: Option<Instant>,
}

impl Tally {
    fn add(&mut self, now: Instant, answers: usize) {
        let Self { longest, none_since, several_since } = self;
        for (holds, since, longest) in [
            (answers == 0, none_since, &mut longest.none),
            (answers > 1, several_since, &mut longest.several),
        ] {
            // A state lasts from the end of the question before it.
            let start = since.get_or_insert(now);
            if holds {
                *longest = (*longest).max(now - *start);
            } else {
                *since = Some(now);
            }
        }
    }
}

fn link(interface: &str) -> Result<LinkAddr> {
    let mut all = getifaddrs()?.filter(|one| one.interface_name == interface).filter_map(|one| one.address);
    let found = all.find_map(|address| match address.family() {
        Some(AddressFamily::Packet) => address.as_link_addr().copied(),
        _ => None,
    });
    found.with_context(|| format!("no interface {interface}"))
}

fn request(mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> Vec<u8> {
    // Ethernet, IPv4, lengths 6 and 4, operation 1.
    const HEAD: [u8; 8] = [0, 1, 0x08, 0, 6, 4, 0, 1];
    let parts: [&[u8]; 8] =
        [&BROADCAST, &mac, &ETHERTYPE, &HEAD, &mac, &sender.octets(), &[0; 6], &target.octets()];
    parts.concat()
}

/// The sender of an ARP reply, or of an announcement, for that address.
fn claim(frame: &[u8], address: Ipv4Addr) -> Option<String> {
    let arp = frame.get(..42)?;
    let announced = arp[28..32] == address.octets();
    let reply = arp[21] == 2 || arp[38..42] == address.octets();
    (arp[12..14] == ETHERTYPE && announced && reply).then(|| {
        let mac: Vec<String> = arp[22..28].iter().map(|byte| format!("{byte:02x}")).collect();
        mac.join(":")
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const VIP: Ipv4Addr = Ipv4Addr::new(10, 87, 2, 50);

    #[test]
    fn the_longest_silence_and_the_longest_quarrel_are_kept() {
        let (start, ms) = (Instant::now(), Duration::from_millis);
        let mut tally = Tally::default();
        for (at, answers) in [(0, 1), (20, 0), (40, 0), (60, 1), (80, 2), (100, 1), (120, 0), (140, 1)] {
            tally.add(start + ms(at), answers);
        }
        assert_eq!(tally.longest, Answers { none: ms(40), several: ms(20) });
    }

    #[test]
    fn a_reply_is_a_claim_and_a_question_is_not() {
        let mut frame = request([2, 0, 0, 0, 0, 1], Ipv4Addr::new(10, 87, 0, 1), VIP);
        assert_eq!(claim(&frame, VIP), None);
        frame[21] = 2;
        frame[28..32].copy_from_slice(&VIP.octets());
        assert_eq!(claim(&frame, VIP).unwrap(), "02:00:00:00:00:01");
        assert_eq!(claim(&frame[..30], VIP), None);
    }
}
