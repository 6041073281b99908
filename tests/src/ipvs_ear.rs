//! What the programs of a node say to IPVS, with the kernel's time of each word. All netlink messages of a network namespace
//! pass by an interface for listeners (`nlmon`), so nobody is kept waiting by who listens.

use std::{
    collections::{BTreeMap, HashMap},
    fmt, fs,
    io::{Write as _, stdout},
    net::{IpAddr, SocketAddr},
    os::fd::AsRawFd as _,
    path::Path,
    thread,
    time::Duration,
};

use anyhow::{Context, Result, ensure};
use nix::{
    libc,
    net::if_::if_nametoindex,
    sys::socket::{LinkAddr, MsgFlags, SockProtocol, SockaddrLike as _, bind},
};
use serde::{Deserialize, Serialize};

use crate::{
    command::{self, ip, words},
    lab::Node,
    packets,
};

/// `IPVS_CMD_*` (linux/ip_vs.h).
pub const NEW_SERVICE: u8 = 1;
/// Changes a service.
pub const SET_SERVICE: u8 = 2;
/// Removes a service.
pub const DELETE_SERVICE: u8 = 3;
/// Adds a destination.
pub const NEW_DESTINATION: u8 = 5;
/// Changes a destination.
pub const SET_DESTINATION: u8 = 6;
/// Removes a destination.
pub const DELETE_DESTINATION: u8 = 7;
/// Removes everything.
pub const FLUSH: u8 = 17;

/// Where the interface is, and the file that is there as long as there is somebody who listens.
const INTERFACE: &str = "ipvs-ear";
const SIGN: &str = "/run/lab/ipvs-ear";
/// The largest piece of what is of interest, a part of a dump; of others the begin will do.
const PIECE: usize = 64 << 10;
/// From one look into the queue to the next: who is woken by each word takes the processor from those who talk.
const PAUSE: Duration = Duration::from_millis(200);
/// NETLINK_GENERIC, as the protocol of a frame.
const GENERIC: u16 = 16;
/// The bytes of `struct genlmsghdr`, the command first (linux/genetlink.h).
const GENERIC_HEADER: usize = 4;
/// NLMSG_ERROR, which is what acknowledges too, and NLM_F_REQUEST (linux/netlink.h).
const ANSWER: u16 = 2;
const REQUEST: u16 = 1;

/// A request, or the answer to one. Of requests that are sent together some are answered only if they fail.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Word {
    /// When the kernel passed it on, by the machine's clock of the day.
    pub at: Duration,
    /// What is asked for, such as [`NEW_SERVICE`].
    pub command: u8,
    /// Of an answer: the errno, 0 for success.
    pub answer: Option<i32>,
    /// Of a request: the service of address and port that it is about.
    pub service: Option<Service>,
    /// Of a request: the destination that it is about, and its weight where that is said.
    pub destination: Option<(SocketAddr, Option<u32>)>,
}

/// A virtual service.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Service {
    /// The number of its transport.
    pub protocol: u8,
    /// Its address and port.
    pub at: SocketAddr,
}

/// As `ipvsadm` writes it.
impl fmt::Display for Service {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let transport = match self.protocol {
            6 => "TCP",
            17 => "UDP",
            132 => "SCTP",
            _ => "?",
        };
        write!(f, "{transport} {}", self.at)
    }
}

/// What becomes of destinations: of each, the weights that it is given in turn; `None`: it is taken away.
pub type Fates = BTreeMap<(Service, SocketAddr), Vec<Option<u32>>>;

/// What the requests among these words do to destinations.
pub fn fates(words: &[Word]) -> Fates {
    let mut fates = Fates::new();
    for word in words {
        if let (Some(service), Some((to, weight))) = (word.service, word.destination)
            && [NEW_DESTINATION, SET_DESTINATION, DELETE_DESTINATION].contains(&word.command)
        {
            let weight = weight.filter(|_| word.command != DELETE_DESTINATION);
            fates.entry((service, to)).or_default().push(weight);
        }
    }
    fates
}

impl Node<'_> {
    /// What programs of the node say to IPVS while something is done, and what comes of that. For `limit` at most.
    pub fn hear_ipvs<T>(&self, limit: Duration, work: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Word>)> {
        thread::scope(|scope| {
            let command = format!("{} ipvs-ear", self.program().display());
            let ear = scope.spawn(move || self.exec_for(&command, limit)?.ok());
            let outcome = command::until("the listener", command::LIMIT, || {
                ensure!(!ear.is_finished(), "it has ended");
                Ok(self.exec(&format!("test -e {SIGN}"))?.success().then_some(()))
            })
            .and_then(|()| work());
            self.exec(&format!("rm -f {SIGN}"))?;
            let told = ear.join().ok().context("the listener panicked")??;
            let words = told.stdout.lines().map(serde_json::from_str).collect::<Result<_, _>>()?;
            Ok((outcome?, words))
        })
    }
}

/// On the node: tells what is said, a [`Word`] in each line, until somebody removes the sign.
pub fn listen() -> Result<()> {
    let family = family()?;
    ip(&format!("link add {INTERFACE} type nlmon"))?;
    ip(&format!("link set {INTERFACE} up"))?;
    let outcome = hear(family);
    ip(&format!("link delete {INTERFACE}"))?;
    outcome
}

fn hear(family: u16) -> Result<()> {
    let socket = packets::open(SockProtocol::EthAll, 64 << 20)?;
    bind(socket.as_raw_fd(), &interface()?)?;
    fs::write(SIGN, "")?;
    let mut asked = HashMap::new();
    let mut words = Vec::new();
    let mut piece = vec![0; PIECE];
    loop {
        // What was said by then is in the queue.
        let is_enough = !Path::new(SIGN).exists();
        while let Some(heard) = packets::next(&socket, &mut piece, MsgFlags::MSG_DONTWAIT)? {
            if heard.protocol == GENERIC {
                words.extend(understand(heard.bytes, family, heard.at, &mut asked));
            }
        }
        if is_enough {
            break;
        }
        thread::sleep(PAUSE);
    }
    let mut out = stdout().lock();
    for word in words {
        writeln!(out, "{}", serde_json::to_string(&word)?)?;
    }
    Ok(())
}

/// The interface as a place to listen at: it has no hardware address by which it could be looked up.
fn interface() -> Result<LinkAddr> {
    // SAFETY: all zeroes are an address.
    let mut address: libc::sockaddr_ll = unsafe { std::mem::zeroed() };
    address.sll_family = libc::AF_PACKET as u16;
    address.sll_protocol = (libc::ETH_P_ALL as u16).to_be();
    address.sll_ifindex = if_nametoindex(INTERFACE)?.cast_signed();
    let length = size_of_val(&address) as u32;
    // SAFETY: the address is whole, and its length is given.
    let made = unsafe { LinkAddr::from_raw((&raw const address).cast(), Some(length)) };
    made.context("no address of an interface")
}

/// The words in a piece: requests to the family, and answers to those that were heard, which `asked` has by their numbers.
fn understand(piece: &[u8], family: u16, at: Duration, asked: &mut HashMap<u32, u8>) -> Vec<Word> {
    let mut words = Vec::new();
    let mut rest = piece;
    while let Some(message) = Message::read(rest) {
        if message.kind == family && message.flags & REQUEST != 0 {
            if let Some([command, ..]) = message.body.first_chunk::<GENERIC_HEADER>() {
                asked.insert(message.number, *command);
                let (service, destination) = subject(&message.body[GENERIC_HEADER..]);
                words.push(Word { at, command: *command, answer: None, service, destination });
            }
        } else if message.kind == ANSWER
            && let Some(errno) = message.body.first_chunk()
            && let Some(command) = asked.remove(&message.number)
        {
            let answer = Some(-i32::from_ne_bytes(*errno));
            words.push(Word { at, command, answer, service: None, destination: None });
        }
        rest = rest.get(message.length.next_multiple_of(4)..).unwrap_or_default();
    }
    words
}

/// What a request is about, by its attributes (`IPVS_CMD_ATTR_*`, `IPVS_SVC_ATTR_*`, `IPVS_DEST_ATTR_*` of linux/ip_vs.h).
fn subject(body: &[u8]) -> (Option<Service>, Option<(SocketAddr, Option<u32>)>) {
    let told = attributes(body);
    let Some(service) = told.get(&1).map(|bytes| attributes(bytes)) else { return (None, None) };
    let number = |bytes: Option<&&[u8]>| Some(u16::from_ne_bytes(*bytes?.first_chunk()?));
    let family = number(service.get(&1));
    let socket = |address: Option<&&[u8]>, port: Option<&&[u8]>| {
        let port = u16::from_be_bytes(*port?.first_chunk()?);
        let address = match family.map(i32::from) {
            Some(libc::AF_INET) => IpAddr::from(*address?.first_chunk::<4>()?),
            Some(libc::AF_INET6) => IpAddr::from(*address?.first_chunk::<16>()?),
            _ => return None,
        };
        Some(SocketAddr::new(address, port))
    };
    let to = told.get(&2).map(|bytes| attributes(bytes)).and_then(|destination| {
        let weight = destination.get(&4).and_then(|bytes| bytes.first_chunk()).copied();
        let to = socket(destination.get(&1), destination.get(&2))?;
        Some((to, weight.map(u32::from_ne_bytes)))
    });
    let service = number(service.get(&2)).zip(socket(service.get(&3), service.get(&4)));
    let service =
        service.and_then(|(protocol, at)| Some(Service { protocol: protocol.try_into().ok()?, at }));
    (service, to)
}

/// Attributes of netlink by their types.
fn attributes(mut bytes: &[u8]) -> BTreeMap<u16, &[u8]> {
    let mut found = BTreeMap::new();
    while let Some([a, b, c, d]) = bytes.first_chunk() {
        let length = usize::from(u16::from_ne_bytes([*a, *b]));
        let Some(value) = bytes.get(4..length) else { break };
        // The two highest bits say how it is written.
        found.insert(u16::from_ne_bytes([*c, *d]) & 0x3fff, value);
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
    }
    found
}

/// A message of netlink.
struct Message<'a> {
    length: usize,
    kind: u16,
    flags: u16,
    number: u32,
    body: &'a [u8],
}

impl<'a> Message<'a> {
    /// The first of several.
    fn read(bytes: &'a [u8]) -> Option<Self> {
        let length = u32::from_ne_bytes(*bytes.first_chunk()?) as usize;
        let short = |at: usize| Some(u16::from_ne_bytes(*bytes.get(at..)?.first_chunk()?));
        Some(Self {
            length,
            kind: short(4)?,
            flags: short(6)?,
            number: u32::from_ne_bytes(*bytes.get(8..)?.first_chunk()?),
            body: bytes.get(16..length)?,
        })
    }
}

/// The number under which IPVS listens.
fn family() -> Result<u16> {
    let told = words(&["genl", "ctrl", "get", "name", "IPVS"])?.ok()?.stdout;
    let id = told.split_whitespace().skip_while(|word| *word != "ID:").nth(1);
    let id = id.and_then(|id| u16::from_str_radix(id.strip_prefix("0x")?, 16).ok());
    id.with_context(|| format!("no number of IPVS in: {told}"))
}
