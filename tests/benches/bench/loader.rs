//! The least that fills an IPVS table: the same messages, written one after the other and sent in batches. No plan, no
//! ledger, nothing is read back but an acknowledgement of each batch. And looks at what is there, which cost the kernel little.

use std::{
    collections::BTreeMap,
    net::{IpAddr, SocketAddr},
    os::fd::{AsRawFd as _, OwnedFd},
};

use anyhow::{Context, Result, ensure};
use nix::sys::socket::{AddressFamily, MsgFlags, SockFlag, SockProtocol, SockType, recv, send, socket};
use vip_core::plan::{ServiceKey, Tables};

const NEW_SERVICE: u8 = 1;
const NEW_DEST: u8 = 5;
const GET_DEST: u8 = 8;
const FLUSH: u8 = 17;
const NESTED: u16 = 0x8000;
/// Nothing but to be done, an acknowledgement, everything (linux/netlink.h).
const REQUEST: u16 = 1;
const ACK: u16 = 5;
const DUMP: u16 = 0x301;
/// The message that ends a dump.
const DONE: u16 = 3;
/// Messages in one send.
const BATCH: usize = 64;

/// The loader's socket.
pub struct Loader {
    socket: OwnedFd,
    family: u16,
}

impl Loader {
    /// Opens a socket in this thread's network namespace.
    pub fn open() -> Result<Self> {
        let kind = SockProtocol::NetlinkGeneric;
        let socket = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::empty(), kind)?;
        // CTRL_CMD_GETFAMILY by its name; the answer's first attribute with number 1 is the family's number.
        let lookup = message(0x10, 1, 3, &attribute(2, b"IPVS\0"));
        send(socket.as_raw_fd(), &lookup, MsgFlags::empty())?;
        let mut answer = [0; 8192];
        let length = recv(socket.as_raw_fd(), &mut answer, MsgFlags::empty())?;
        let attributes = attributes(answer.get(20..length).context("no answer")?);
        let id = attributes.iter().find(|(number, _)| *number == 1).and_then(|(_, body)| body.first_chunk());
        Ok(Self { family: u16::from_ne_bytes(*id.context("this kernel has no IPVS")?), socket })
    }

    /// The destinations of one service and their weights, IPv4 alone.
    pub fn destinations(&self, key: &ServiceKey) -> Result<Vec<(SocketAddr, u32)>> {
        self.dump(GET_DEST, &attribute(1 | NESTED, &name(key)), destination)
    }

    fn dump<T>(&self, command: u8, body: &[u8], read: impl Fn(&[u8]) -> Option<T>) -> Result<Vec<T>> {
        let ask = message(self.family, DUMP, command, body);
        send(self.socket.as_raw_fd(), &ask, MsgFlags::empty())?;
        let mut found = Vec::new();
        let mut buffer = [0; 32768];
        loop {
            let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
            let mut rest = buffer.get(..length).unwrap_or_default();
            while let Some(head) = rest.first_chunk::<20>() {
                let size = u32::from_ne_bytes([head[0], head[1], head[2], head[3]]) as usize;
                if u16::from_ne_bytes([head[4], head[5]]) == DONE {
                    return Ok(found);
                }
                found.extend(read(rest.get(20..size).unwrap_or_default()));
                rest = rest.get(size.next_multiple_of(4).max(20)..).unwrap_or_default();
            }
        }
    }

    /// Makes every service with its destinations; returns the number of messages.
    pub fn load(&self, tables: &Tables) -> Result<usize> {
        let mut messages = Vec::new();
        for (key, service) in &tables.services {
            let mut whole = name(key);
            whole.extend(attribute(6, b"wlc\0"));
            whole.extend(attribute(7, &[0, 0, 0, 0, 255, 255, 255, 255]));
            whole.extend(attribute(8, &[0; 4]));
            whole.extend(attribute(9, &[255; 4]));
            messages.push(message(self.family, REQUEST, NEW_SERVICE, &attribute(1 | NESTED, &whole)));
            for (to, weight) in &service.destinations {
                let mut destination = attribute(1, &address(to.ip()));
                destination.extend(attribute(2, &to.port().to_be_bytes()));
                for (number, value) in [(3, 0), (4, *weight), (5, 0), (6, 0)] {
                    destination.extend(attribute(number, &u32::to_ne_bytes(value)));
                }
                destination.extend(attribute(11, &2_u16.to_ne_bytes()));
                let body = [attribute(1 | NESTED, &name(key)), attribute(2 | NESTED, &destination)].concat();
                messages.push(message(self.family, REQUEST, NEW_DEST, &body));
            }
        }
        for batch in messages.chunks(BATCH) {
            self.send(batch)?;
        }
        Ok(messages.len())
    }

    /// Empties the whole table, as others do. For the bench's own namespace only.
    pub fn flush(&self) -> Result<()> {
        self.send(&[message(self.family, REQUEST, FLUSH, &[])])
    }

    /// Sends messages in one piece. The kernel tells every error by itself; only the last is to be acknowledged.
    fn send(&self, batch: &[Vec<u8>]) -> Result<()> {
        let Some((last, before)) = batch.split_last() else { return Ok(()) };
        let mut last = last.clone();
        last[6..8].copy_from_slice(&ACK.to_ne_bytes());
        send(self.socket.as_raw_fd(), &[before.concat(), last].concat(), MsgFlags::empty())?;
        let mut buffer = [0; 8192];
        let length = recv(self.socket.as_raw_fd(), &mut buffer, MsgFlags::empty())?;
        let errno =
            buffer.get(..length).and_then(|answer| answer.get(16..)).and_then(|body| body.first_chunk());
        let errno = i32::from_ne_bytes(*errno.context("no answer")?);
        ensure!(errno == 0, "the kernel said {errno}");
        Ok(())
    }
}

fn destination(message: &[u8]) -> Option<(SocketAddr, u32)> {
    let all = nested(message, 2)?;
    let value = |wanted| all.get(&wanted).copied();
    let ip = IpAddr::from(*value(1)?.first_chunk::<4>()?);
    let port = u16::from_be_bytes(*value(2)?.first_chunk()?);
    Some((SocketAddr::new(ip, port), u32::from_ne_bytes(*value(4)?.first_chunk()?)))
}

/// The attributes in one of a message's.
fn nested(message: &[u8], number: u16) -> Option<BTreeMap<u16, &[u8]>> {
    let outer = attributes(message).into_iter().find(|(found, _)| *found == number)?;
    Some(attributes(outer.1).into_iter().collect())
}

/// The attributes of a message, by their numbers.
fn attributes(mut rest: &[u8]) -> Vec<(u16, &[u8])> {
    let mut all = Vec::new();
    while let Some(head) = rest.first_chunk::<4>() {
        let size = usize::from(u16::from_ne_bytes([head[0], head[1]])).max(4);
        let number = u16::from_ne_bytes([head[2], head[3]]) & !NESTED;
        all.push((number, rest.get(4..size).unwrap_or_default()));
        rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
    }
    all
}

fn name(key: &ServiceKey) -> Vec<u8> {
    let mut name = attribute(1, &2_u16.to_ne_bytes());
    name.extend(attribute(2, &u16::from(key.protocol.number()).to_ne_bytes()));
    name.extend(attribute(3, &address(key.address)));
    name.extend(attribute(4, &key.port.to_be_bytes()));
    name
}

fn address(ip: IpAddr) -> [u8; 16] {
    let mut bytes = [0; 16];
    if let IpAddr::V4(ip) = ip {
        bytes[..4].copy_from_slice(&ip.octets());
    }
    bytes
}

fn attribute(number: u16, value: &[u8]) -> Vec<u8> {
    let length = (value.len() + 4) as u16;
    let mut bytes = [length.to_ne_bytes(), number.to_ne_bytes()].concat();
    bytes.extend(value);
    bytes.resize(bytes.len().next_multiple_of(4), 0);
    bytes
}

/// A message of generic netlink with its two headers. `flags`: 1 is a request; [`ACK`], [`DUMP`].
fn message(kind: u16, flags: u16, command: u8, body: &[u8]) -> Vec<u8> {
    let mut bytes = (20 + body.len() as u32).to_ne_bytes().to_vec();
    bytes.extend(kind.to_ne_bytes());
    bytes.extend(flags.to_ne_bytes());
    bytes.extend([0; 8]);
    bytes.extend([command, 1, 0, 0]);
    bytes.extend(body);
    bytes
}
