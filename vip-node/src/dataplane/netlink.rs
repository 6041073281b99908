//! Netlink, the way to both IPVS and nftables: attributes, messages, and a socket that matches answers to questions.
//!
//! Reading is tolerant: what is cut off or unknown is left out, never a panic. Numbers are those of `linux/netlink.h`.

use std::net::IpAddr;
use std::os::fd::{AsRawFd, OwnedFd};

use nix::errno::Errno;
use nix::sys::socket::{
    AddressFamily, MsgFlags, NetlinkAddr, SockFlag, SockProtocol, SockType, bind, recvfrom, sendto,
    setsockopt, socket, sockopt,
};
use nix::sys::time::TimeVal;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_MULTI: u16 = 0x2;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_DUMP_INTR: u16 = 0x10;
const NLM_F_DUMP: u16 = 0x300;
const NLMSG_ERROR: u16 = 2;
const NLMSG_DONE: u16 = 3;
const NLA_F_NESTED: u16 = 0x8000;
const NLA_TYPE_MASK: u16 = 0x3fff;

const MESSAGE_HEADER: usize = 16;
const ATTRIBUTE_HEADER: usize = 4;
/// The kernel's dumps come in pieces of at most 32 KiB.
const BUFFER: usize = 64 * 1024;
/// How many answers may wait: each takes about a kilobyte of the socket's receive buffer, 208 KiB by default.
const AT_ONCE: usize = 64;
/// Bytes for a large transaction: some 40,000 set elements.
const LARGE: usize = 8 * 1024 * 1024;
/// A dump that somebody changes meanwhile is asked for again, so often.
const DUMP_TRIES: usize = 20;
/// More than any table that makes sense, less than what hurts.
const DUMP_MOST: usize = 1_000_000;
/// Seconds to wait for an answer. Loading a module is part of it.
const PATIENCE: i64 = 20;

/// Attributes being written.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Attributes(Vec<u8>);

impl Attributes {
    pub(super) fn new() -> Self {
        Self::default()
    }

    /// An attribute as it is; padded to four bytes as all are.
    pub(super) fn bytes(mut self, kind: u16, payload: &[u8]) -> Self {
        // Nothing here is near the limit of 64 KiB: lists are split by who writes them.
        let length = u16::try_from(ATTRIBUTE_HEADER + payload.len()).unwrap_or(u16::MAX);
        self.0.extend(length.to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(payload);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
        self
    }

    pub(super) fn byte(self, kind: u16, value: u8) -> Self {
        self.bytes(kind, &[value])
    }

    pub(super) fn u16(self, kind: u16, value: u16) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    pub(super) fn u32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_ne_bytes())
    }

    pub(super) fn be16(self, kind: u16, value: u16) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    pub(super) fn be32(self, kind: u16, value: u32) -> Self {
        self.bytes(kind, &value.to_be_bytes())
    }

    /// Text with its NUL.
    pub(super) fn text(self, kind: u16, value: &str) -> Self {
        self.bytes(kind, &[value.as_bytes(), &[0]].concat())
    }

    pub(super) fn nested(self, kind: u16, inner: &Attributes) -> Self {
        self.bytes(kind | NLA_F_NESTED, &inner.0)
    }

    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }
}

/// The attributes in received bytes, each with its kind. Ends at the first that is cut off.
pub(super) fn attributes(mut bytes: &[u8]) -> impl Iterator<Item = (u16, &[u8])> {
    std::iter::from_fn(move || {
        let length = usize::from(u16::from_ne_bytes(array(bytes, 0)?));
        let kind = u16::from_ne_bytes(array(bytes, 2)?) & NLA_TYPE_MASK;
        let payload = bytes.get(ATTRIBUTE_HEADER..length)?;
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((kind, payload))
    })
}

/// The first attribute of a kind.
pub(super) fn attribute(bytes: &[u8], kind: u16) -> Option<&[u8]> {
    attributes(bytes).find(|(found, _)| *found == kind).map(|(_, payload)| payload)
}

/// `N` bytes from an offset, if there are so many.
pub(super) fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

/// Text up to its NUL.
pub(super) fn text(payload: &[u8]) -> String {
    let end = payload.iter().position(|byte| *byte == 0).unwrap_or(payload.len());
    String::from_utf8_lossy(payload.get(..end).unwrap_or_default()).into_owned()
}

/// An address as bytes.
pub(super) fn octets(address: IpAddr) -> Vec<u8> {
    match address {
        IpAddr::V4(address) => address.octets().to_vec(),
        IpAddr::V6(address) => address.octets().to_vec(),
    }
}

/// What can go wrong on a socket.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Trouble {
    /// The kernel's own answer.
    Errno(Errno),
    /// The conversation: no answer, or one that makes no sense.
    Lost(String),
}

/// A request without its netlink header.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Request {
    /// The message type: a family of generic netlink, or a subsystem's message.
    pub(super) kind: u16,
    /// Flags beyond those that the socket sets itself (`NLM_F_CREATE` and the like).
    pub(super) flags: u16,
    /// The subsystem's own header, four bytes both for generic netlink and nfnetlink.
    pub(super) head: [u8; 4],
    pub(super) attributes: Attributes,
}

impl Request {
    fn write(&self, flags: u16, sequence: u32, out: &mut Vec<u8>) {
        let body = self.attributes.as_bytes();
        let length = u32::try_from(MESSAGE_HEADER + self.head.len() + body.len()).unwrap_or(u32::MAX);
        out.extend(length.to_ne_bytes());
        out.extend(self.kind.to_ne_bytes());
        out.extend((NLM_F_REQUEST | self.flags | flags).to_ne_bytes());
        out.extend(sequence.to_ne_bytes());
        out.extend(0u32.to_ne_bytes());
        out.extend(self.head);
        out.extend(body);
    }
}

/// Writes requests numbered from `first` on, only the last to be acknowledged; returns its number.
fn write_all(requests: &[Request], first: u32, out: &mut Vec<u8>) -> u32 {
    let mut last = first;
    for (n, request) in requests.iter().enumerate() {
        let flags = if n + 1 == requests.len() { NLM_F_ACK } else { 0 };
        last = first.wrapping_add(u32::try_from(n).unwrap_or(u32::MAX));
        request.write(flags, last, out);
    }
    last
}

/// A received message.
struct Received<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    payload: &'a [u8],
}

impl Received<'_> {
    /// The errno of an answer that says how it went, 0 for success; `None`: another kind of message.
    fn status(&self) -> Option<i32> {
        match self.kind {
            NLMSG_ERROR => {
                Some(array(self.payload, 0).map_or(Errno::EBADMSG as i32, |b| -i32::from_ne_bytes(b)))
            }
            // A dump that fails half-way ends with an error too.
            NLMSG_DONE => Some(array(self.payload, 0).map_or(0, |b| -i32::from_ne_bytes(b))),
            _ => None,
        }
    }

    /// What follows the subsystem's header.
    fn attributes(&self) -> &[u8] {
        self.payload.get(4..).unwrap_or_default()
    }
}

fn received(mut bytes: &[u8]) -> impl Iterator<Item = Received<'_>> {
    std::iter::from_fn(move || {
        let length = usize::try_from(u32::from_ne_bytes(array(bytes, 0)?)).ok()?;
        let message = Received {
            kind: u16::from_ne_bytes(array(bytes, 4)?),
            flags: u16::from_ne_bytes(array(bytes, 6)?),
            sequence: u32::from_ne_bytes(array(bytes, 8)?),
            payload: bytes.get(MESSAGE_HEADER..length)?,
        };
        bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(message)
    })
}

/// A netlink socket. It asks one thing at a time and waits for the answer.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    pub(super) fn open(protocol: SockProtocol) -> Result<Self, Errno> {
        let fd = socket(AddressFamily::Netlink, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol)?;
        bind(fd.as_raw_fd(), &NetlinkAddr::new(0, 0))?;
        setsockopt(&fd, sockopt::ReceiveTimeout, &TimeVal::new(PATIENCE, 0))?;
        // A transaction goes out in one piece, and all its errors come at once. Without the capability the default must do.
        let _ = setsockopt(&fd, sockopt::SndBufForce, &LARGE);
        let _ = setsockopt(&fd, sockopt::RcvBufForce, &LARGE);
        Ok(Self { fd, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Asks one question and returns what `read` makes of the answers' attributes; `None` of it leaves one out.
    pub(super) fn ask<T>(
        &mut self,
        request: &Request,
        mut read: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Trouble> {
        let sequence = self.send(request, NLM_F_ACK)?;
        let mut answers = Vec::new();
        self.listen(|message| {
            if message.sequence != sequence {
                return Ok(false);
            }
            match message.status() {
                Some(0) => Ok(true),
                Some(error) => Err(Trouble::Errno(Errno::from_raw(error))),
                None => {
                    answers.extend(read(message.attributes()));
                    Ok(false)
                }
            }
        })?;
        Ok(answers)
    }

    /// Asks for a whole table.
    pub(super) fn dump<T>(
        &mut self,
        request: &Request,
        mut read: impl FnMut(&[u8]) -> Option<T>,
    ) -> Result<Vec<T>, Trouble> {
        for _ in 0..DUMP_TRIES {
            let sequence = self.send(request, NLM_F_DUMP)?;
            let mut entries = Vec::new();
            let mut interrupted = false;
            self.listen(|message| {
                if message.sequence != sequence {
                    return Ok(false);
                }
                interrupted |= message.flags & NLM_F_DUMP_INTR != 0;
                match message.status() {
                    Some(0) => return Ok(true),
                    Some(error) => return Err(Trouble::Errno(Errno::from_raw(error))),
                    None => entries.extend(read(message.attributes())),
                }
                if entries.len() > DUMP_MOST {
                    return Err(Trouble::Lost(format!("a table of more than {DUMP_MOST} entries")));
                }
                Ok(message.flags & NLM_F_MULTI == 0)
            })?;
            if !interrupted {
                return Ok(entries);
            }
        }
        Err(Trouble::Lost("a table that changes all the time".to_owned()))
    }

    /// Sends many requests that stand each for itself. Returns the errors, by the requests' indices. Of those that go out in one
    /// piece the kernel takes one after the other and tells every error: only the last is to be acknowledged.
    pub(super) fn each(&mut self, requests: &[Request]) -> Result<Vec<(usize, Errno)>, Trouble> {
        let mut failed = Vec::new();
        for (n, chunk) in requests.chunks(AT_ONCE).enumerate() {
            let first = self.take(chunk.len());
            let mut bytes = Vec::new();
            let last = write_all(chunk, first, &mut bytes);
            self.write(&bytes)?;
            self.listen(|message| {
                let index = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
                let Some(status) = message.status().filter(|_| index < chunk.len()) else { return Ok(false) };
                if status != 0 {
                    failed.push((n * AT_ONCE + index, Errno::from_raw(status)));
                }
                Ok(message.sequence == last)
            })?;
        }
        Ok(failed)
    }

    /// Sends requests between two marks as a transaction: all or none. Returns the errors by the requests' indices, none if
    /// it was done. An error of the transaction as a whole is an `Err`.
    pub(super) fn transaction(
        &mut self,
        requests: &[Request],
        begin: &Request,
        end: &Request,
    ) -> Result<Vec<(usize, Errno)>, Trouble> {
        if requests.is_empty() {
            return Ok(Vec::new());
        }
        let mut bytes = Vec::new();
        let first = self.take(requests.len() + 2);
        begin.write(0, first, &mut bytes);
        // Its acknowledgement comes last, in failure too.
        let last = write_all(requests, first.wrapping_add(1), &mut bytes);
        end.write(0, self.sequence, &mut bytes);
        self.write(&bytes)?;

        let mut failed = Vec::new();
        self.listen(|message| {
            let index = usize::try_from(message.sequence.wrapping_sub(first)).unwrap_or(usize::MAX);
            let Some(status) = message.status().filter(|_| index < requests.len() + 2) else {
                return Ok(false);
            };
            match (index.checked_sub(1), status) {
                (_, 0) => {}
                (Some(index), error) if index < requests.len() => {
                    failed.push((index, Errno::from_raw(error)))
                }
                (_, error) => return Err(Trouble::Errno(Errno::from_raw(error))),
            }
            Ok(message.sequence == last)
        })?;
        Ok(failed)
    }

    /// Sends a request and returns its number.
    fn send(&mut self, request: &Request, flags: u16) -> Result<u32, Trouble> {
        let sequence = self.take(1);
        let mut bytes = Vec::new();
        request.write(flags, sequence, &mut bytes);
        self.write(&bytes)?;
        Ok(sequence)
    }

    /// Takes the next numbers and returns the first.
    fn take(&mut self, count: usize) -> u32 {
        let first = self.sequence.wrapping_add(1);
        self.sequence = self.sequence.wrapping_add(u32::try_from(count).unwrap_or(u32::MAX));
        first
    }

    fn write(&self, bytes: &[u8]) -> Result<(), Trouble> {
        let kernel = NetlinkAddr::new(0, 0);
        match sendto(self.fd.as_raw_fd(), bytes, &kernel, MsgFlags::empty()) {
            Ok(sent) if sent == bytes.len() => Ok(()),
            Ok(sent) => Err(Trouble::Lost(format!("{sent} of {} bytes sent", bytes.len()))),
            Err(error) => Err(Trouble::Lost(error.desc().to_owned())),
        }
    }

    /// Receives until `heard` has what it waits for. Messages of others than the kernel don't count.
    fn listen(&mut self, mut heard: impl FnMut(&Received) -> Result<bool, Trouble>) -> Result<(), Trouble> {
        loop {
            let (length, from) = match recvfrom::<NetlinkAddr>(self.fd.as_raw_fd(), &mut self.buffer) {
                Ok(received) => received,
                Err(Errno::EINTR) => continue,
                Err(Errno::EAGAIN) => return Err(Trouble::Lost(format!("no answer for {PATIENCE} s"))),
                Err(error) => return Err(Trouble::Lost(error.desc().to_owned())),
            };
            if from.is_none_or(|from| from.pid() != 0) {
                continue;
            }
            // The rest of a datagram is read even when the answer is known: the next one starts with the next question.
            let mut done = false;
            for message in received(self.buffer.get(..length).unwrap_or_default()) {
                done = done || heard(&message)?;
            }
            if done {
                return Ok(());
            }
        }
    }
}

/// What the tests of the codecs feed to them.
#[cfg(test)]
pub(super) mod noise {
    use proptest::prelude::*;

    /// Bytes from nowhere, and valid messages with some bytes changed, cut off below a length.
    pub(in super::super) fn nearly(valid: Vec<Vec<u8>>, below: usize) -> impl Strategy<Value = Vec<u8>> {
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        let near = (0..valid.len(), changes, 0..below).prop_map(move |(which, changes, length)| {
            let mut bytes = valid[which].clone();
            for (index, value) in changes {
                let index = index.index(bytes.len());
                bytes[index] = value;
            }
            bytes.truncate(length);
            bytes
        });
        prop_oneof![prop::collection::vec(any::<u8>(), 0..200), near]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::noise::nearly;
    use super::*;

    #[test]
    fn attributes_are_padded_and_found_again() {
        let inner = Attributes::new().u16(1, 7).byte(2, 9);
        let outer = Attributes::new().text(3, "wlc").nested(4, &inner).be16(5, 80);
        assert_eq!(
            outer.as_bytes(),
            [
                8, 0, 3, 0, b'w', b'l', b'c', 0, 20, 0, 4, 0x80, 6, 0, 1, 0, 7, 0, 0, 0, 5, 0, 2, 0, 9, 0, 0,
                0, 6, 0, 5, 0, 0, 80, 0, 0
            ]
        );
        let found: Vec<u16> = attributes(outer.as_bytes()).map(|(kind, _)| kind).collect();
        assert_eq!(found, [3, 4, 5]);
        assert_eq!(attribute(outer.as_bytes(), 4), Some(inner.as_bytes()));
        assert_eq!(attribute(outer.as_bytes(), 3).map(text).as_deref(), Some("wlc"));
    }

    #[test]
    fn a_request_carries_its_header() {
        let request =
            Request { kind: 0x1c, flags: 0x400, head: [1, 1, 0, 0], attributes: Attributes::new().u16(1, 2) };
        let mut bytes = Vec::new();
        request.write(NLM_F_ACK, 5, &mut bytes);
        assert_eq!(
            bytes,
            [28, 0, 0, 0, 0x1c, 0, 5, 4, 5, 0, 0, 0, 0, 0, 0, 0, 1, 1, 0, 0, 6, 0, 1, 0, 2, 0, 0, 0]
        );
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        let whole = Attributes::new().u32(1, 1).u32(2, 2);
        for length in 0..whole.as_bytes().len() {
            assert!(attributes(&whole.as_bytes()[..length]).count() < 2);
        }
        // A length below the header's would never end.
        assert_eq!(attributes(&[0, 0, 1, 0, 1, 1, 1, 1]).count(), 0);
    }

    /// Bytes from nowhere, and messages of the kernel's with some bytes changed or cut off.
    fn datagram() -> impl Strategy<Value = Vec<u8>> {
        let attributes = Attributes::new().text(1, "wlc").nested(2, &Attributes::new().u32(1, 7)).be16(3, 80);
        let mut whole = Vec::new();
        for kind in [0x1c, NLMSG_ERROR, NLMSG_DONE] {
            let attributes = attributes.clone();
            Request { kind, flags: NLM_F_MULTI, head: [1, 1, 0, 0], attributes }.write(0, 5, &mut whole);
        }
        let length = whole.len() + 1;
        nearly(vec![whole], length)
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_to_their_end(bytes in datagram()) {
            // No more messages than have room in it, and no more attributes than have room in a message.
            let mut rest = bytes.len();
            for message in received(&bytes) {
                prop_assert!(MESSAGE_HEADER + message.payload.len() <= rest);
                rest = rest.saturating_sub((MESSAGE_HEADER + message.payload.len()).next_multiple_of(4));
                let _ = message.status();
                let mut rest = message.payload.len();
                for (_, payload) in attributes(message.attributes()) {
                    prop_assert!(ATTRIBUTE_HEADER + payload.len() <= rest);
                    rest = rest.saturating_sub((ATTRIBUTE_HEADER + payload.len()).next_multiple_of(4));
                    prop_assert!(text(payload).len() <= payload.len() * 3);
                }
            }
        }
    }
}
