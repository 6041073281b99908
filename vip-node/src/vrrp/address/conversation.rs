//! Two rtnetlink sockets: one that is asked, one that hears what others do. The kernel works in the caller's own time and
//! has answered when the request is sent, so nothing here waits.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use rtnetlink::packet_core::{
    NLM_F_ACK, NLM_F_DUMP, NLM_F_DUMP_INTR, NLM_F_REQUEST, NetlinkMessage, NetlinkPayload,
};
use rtnetlink::packet_route::RouteNetlinkMessage;
use rtnetlink::sys::{Socket, SocketAddr, protocols::NETLINK_ROUTE};

/// The kernel's answers to a dump come in pieces of at most 32 KiB.
const BUFFER: usize = 64 * 1024;
/// How many answers may wait: each takes about a kilobyte of the socket's receive buffer, 208 KiB by default.
const AT_ONCE: usize = 64;
/// Events that may wait while this process is paused, in bytes; with more, everything is looked at anew.
const EVENTS: usize = 1 << 20;
/// A dump that somebody changes meanwhile is asked for again, so often.
const DUMP_TRIES: usize = 5;

/// A socket to ask with.
pub(super) struct Conversation {
    socket: Socket,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Conversation {
    pub(super) fn open() -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        // An error comes back without the request.
        socket.set_cap_ack(true)?;
        socket.set_non_blocking(true)?;
        Ok(Self { socket, sequence: 0, buffer: vec![0; BUFFER] })
    }

    /// Sends requests that stand each for itself, and returns how each went. The order is kept.
    pub(super) fn each(
        &mut self,
        requests: Vec<(RouteNetlinkMessage, u16)>,
    ) -> io::Result<Vec<io::Result<()>>> {
        let mut results = Vec::with_capacity(requests.len());
        let mut requests = requests.into_iter().peekable();
        while requests.peek().is_some() {
            let first = self.sequence.wrapping_add(1);
            let mut bytes = Vec::new();
            for (message, flags) in requests.by_ref().take(AT_ONCE) {
                self.write(message, NLM_F_ACK | flags, &mut bytes);
            }
            self.send(&bytes)?;
            let count = self.sequence.wrapping_sub(first).wrapping_add(1);
            let mut answers: Vec<Option<io::Result<()>>> = (0..count).map(|_| None).collect();
            let mut open = count;
            while open > 0 {
                self.hear(|message| {
                    let index = usize::try_from(message.header.sequence_number.wrapping_sub(first));
                    if let NetlinkPayload::Error(error) = &message.payload
                        && let Some(answer) = index.ok().and_then(|index| answers.get_mut(index))
                    {
                        open -= u32::from(answer.is_none());
                        *answer = Some(error.code.map_or(Ok(()), |_| Err(error.to_io())));
                    }
                })?;
            }
            results.extend(answers.into_iter().flatten());
        }
        Ok(results)
    }

    /// Asks for a whole table.
    pub(super) fn dump(&mut self, request: &RouteNetlinkMessage) -> io::Result<Vec<RouteNetlinkMessage>> {
        for _ in 0..DUMP_TRIES {
            let mut bytes = Vec::new();
            self.write(request.clone(), NLM_F_DUMP, &mut bytes);
            self.send(&bytes)?;
            let (mut entries, mut done, mut interrupted) = (Vec::new(), None, false);
            while done.is_none() {
                let sequence = self.sequence;
                self.hear(|message| {
                    if message.header.sequence_number != sequence {
                        return;
                    }
                    interrupted |= message.header.flags & NLM_F_DUMP_INTR != 0;
                    match message.payload {
                        NetlinkPayload::Error(error) => done = Some(Err(error.to_io())),
                        NetlinkPayload::Done(_) => done = Some(Ok(())),
                        NetlinkPayload::InnerMessage(entry) => entries.push(entry),
                        _ => {}
                    }
                })?;
            }
            if !interrupted {
                return done.unwrap_or(Ok(())).map(|()| entries);
            }
        }
        Err(io::Error::other("a table that changes all the time"))
    }

    fn write(&mut self, message: RouteNetlinkMessage, flags: u16, bytes: &mut Vec<u8>) {
        self.sequence = self.sequence.wrapping_add(1);
        let mut message = NetlinkMessage::from(message);
        message.header.flags = NLM_F_REQUEST | flags;
        message.header.sequence_number = self.sequence;
        message.finalize();
        let start = bytes.len();
        bytes.resize(start + message.buffer_len().next_multiple_of(4), 0);
        message.serialize(&mut bytes[start..]);
    }

    fn send(&self, bytes: &[u8]) -> io::Result<()> {
        match self.socket.send_to(bytes, &SocketAddr::new(0, 0), 0)? {
            sent if sent == bytes.len() => Ok(()),
            _ => Err(io::ErrorKind::WriteZero.into()),
        }
    }

    fn hear(&mut self, heard: impl FnMut(NetlinkMessage<RouteNetlinkMessage>)) -> io::Result<()> {
        match receive(&self.socket, &mut self.buffer, heard) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                Err(io::Error::other("the kernel has not answered"))
            }
            result => result,
        }
    }
}

/// A socket that hears of changes.
pub(super) struct Events {
    socket: Socket,
    buffer: Vec<u8>,
}

impl Events {
    pub(super) fn open(groups: &[u32]) -> io::Result<Self> {
        let mut socket = Socket::new(NETLINK_ROUTE)?;
        socket.bind_auto()?;
        socket.set_non_blocking(true)?;
        socket.set_rx_buf_sz(i32::try_from(EVENTS).map_err(io::Error::other)?)?;
        for group in groups {
            socket.add_membership(*group)?;
        }
        Ok(Self { socket, buffer: vec![0; BUFFER] })
    }

    /// Hands over all that is queued; whether some was lost.
    pub(super) fn drain(
        &mut self,
        mut heard: impl FnMut(NetlinkMessage<RouteNetlinkMessage>),
    ) -> io::Result<bool> {
        let mut lost = false;
        loop {
            match receive(&self.socket, &mut self.buffer, &mut heard) {
                Ok(()) => {}
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(lost),
                Err(error) if error.raw_os_error() == Some(libc::ENOBUFS) => lost = true,
                Err(error) => return Err(error),
            }
        }
    }
}

impl AsRawFd for Events {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Events {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// Receives one datagram. What others than the kernel say, and what cannot be understood, is left out.
fn receive(
    socket: &Socket,
    buffer: &mut [u8],
    mut heard: impl FnMut(NetlinkMessage<RouteNetlinkMessage>),
) -> io::Result<()> {
    let mut room = &mut buffer[..];
    let (length, from) = socket.recv_from(&mut room, 0)?;
    if from.port_number() != 0 {
        return Ok(());
    }
    for message in messages(buffer.get(..length).unwrap_or_default()) {
        heard(message);
    }
    Ok(())
}

/// The messages in a datagram. Ends at the first whose length makes no sense.
fn messages(mut bytes: &[u8]) -> impl Iterator<Item = NetlinkMessage<RouteNetlinkMessage>> {
    const HEADER: usize = 16;
    std::iter::from_fn(move || {
        loop {
            let length = usize::try_from(u32::from_ne_bytes(*bytes.first_chunk()?)).ok()?;
            let message = bytes.get(..length).filter(|message| message.len() >= HEADER)?;
            bytes = bytes.get(length.next_multiple_of(4)..).unwrap_or_default();
            if let Ok(message) = NetlinkMessage::deserialize(message) {
                return Some(message);
            }
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn any_bytes_are_survived() {
        use proptest::prelude::*;
        proptest!(|(bytes in proptest::collection::vec(any::<u8>(), 0..200), kind in 16_u16..24)| {
            messages(&bytes).count();
            let mut framed = u32::try_from(bytes.len() + 16).unwrap().to_ne_bytes().to_vec();
            framed.extend(kind.to_ne_bytes());
            framed.extend([0; 10]);
            framed.extend(&bytes);
            messages(&framed).count();
        });
    }
}
