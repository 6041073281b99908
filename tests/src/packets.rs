//! Packet sockets, with the kernel's time of each packet.

use std::{
    io::IoSliceMut,
    os::fd::{AsRawFd as _, OwnedFd},
    time::Duration,
};

use anyhow::{Context, Result, bail};
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, ControlMessageOwned, LinkAddr, MsgFlags, SockFlag, SockProtocol, SockType,
            recvmsg, setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimestampns},
        },
        time::TimeSpec,
    },
};

/// A packet that was heard.
#[derive(Clone, Copy, Debug)]
pub struct Packet<'a> {
    /// When the kernel passed it on, by the machine's clock of the day.
    pub at: Duration,
    /// What it is, as its interface says: `ETH_P_*` (linux/if_ether.h), or `NETLINK_*` at an interface that tells of netlink.
    pub protocol: u16,
    /// Its bytes with its link's header, as many as there was room for.
    pub bytes: &'a [u8],
}

/// Hears packets of that protocol in the namespace of this thread from now on; as many bytes may wait as `buffer` says.
/// Takes root.
pub fn open(protocol: SockProtocol, buffer: usize) -> Result<OwnedFd> {
    let opened = socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, protocol);
    let socket = opened.context("can't open a packet socket (are you root?)")?;
    setsockopt(&socket, ReceiveTimestampns, &true)?;
    setsockopt(&socket, RcvBufForce, &buffer)?;
    Ok(socket)
}

/// The next packet, in `room`; none if there is none by the time at which the socket gives up.
pub fn next<'a>(socket: &OwnedFd, room: &'a mut [u8], flags: MsgFlags) -> Result<Option<Packet<'a>>> {
    let mut space = nix::cmsg_space!(TimeSpec);
    let mut parts = [IoSliceMut::new(room)];
    let message = match recvmsg::<LinkAddr>(socket.as_raw_fd(), &mut parts, Some(&mut space), flags) {
        Ok(message) => message,
        Err(Errno::EAGAIN | Errno::EINTR) => return Ok(None),
        Err(error) => bail!("can't hear: {error}"),
    };
    let at = message.cmsgs()?.find_map(|one| match one {
        ControlMessageOwned::ScmTimestampns(at) => Some(Duration::from(at)),
        _ => None,
    });
    let at = at.context("a packet without a time")?;
    let protocol = message.address.map_or(0, |from| u16::from_be(from.protocol()));
    let length = message.bytes;
    Ok(Some(Packet { at, protocol, bytes: room.get(..length).unwrap_or_default() }))
}
