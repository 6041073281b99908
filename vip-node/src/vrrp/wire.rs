//! One interface's sockets for one family: advertisements in and out.
//!
//! A packet socket hears what the host's firewall would drop, and sends past it. The group is joined all the same, for
//! switches that look. To a single peer advertisements go by a raw IP socket: the kernel knows the way.

mod datagram;

use std::io;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};
use std::time::Duration;

use socket2::{Domain, InterfaceIndexOrAddress, Protocol, SockFilter, Socket, Type};
use vip_core::vrrp::Family;
use vip_core::vrrp::packet;

use super::socket::{PacketSocket, only};

pub use datagram::Packet;

/// The sockets on one interface.
#[derive(Debug)]
pub struct Wire {
    socket: PacketSocket,
    index: u32,
    family: Family,
    /// Keeps the membership in the group.
    _member: Socket,
    /// Opened with the first advertisement to a single peer.
    unicast: Option<Socket>,
}

impl Wire {
    /// Opens the sockets.
    ///
    /// # Errors
    /// `PermissionDenied` without NET_RAW; else what the kernel says.
    pub fn open(index: u32, family: Family) -> io::Result<Self> {
        let member = member(index, family)?;
        let (protocol, next) = match family {
            Family::V4 => (libc::ETH_P_IP, 9),
            Family::V6 => (libc::ETH_P_IPV6, 6),
        };
        // The IP header's protocol or next header is VRRP's, or the packet is not queued.
        let socket = PacketSocket::open(index, protocol, &mut only(&[(next, &[packet::PROTOCOL])]))?;
        Ok(Self { socket, index, family, _member: member, unicast: None })
    }

    /// Index of the interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The next packet that is queued, and how long ago it arrived; `None` when there is none. One that is no whole datagram of
    /// VRRP's is `None` itself.
    ///
    /// # Errors
    /// `NetworkDown` and the like when the interface is going away.
    pub fn receive(&self) -> io::Result<Option<(Option<Packet>, Duration)>> {
        let mut buffer = [0_u8; 2048];
        while let Some(frame) = self.socket.receive(&mut buffer)? {
            // One of a VLAN on top of this interface is heard by that one's own socket.
            if frame.own && frame.here {
                return Ok(Some((datagram::parse(frame.bytes), frame.age)));
            }
        }
        Ok(None)
    }

    /// Sends an advertisement's bytes to the group.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn advertise(&self, source: IpAddr, payload: &[u8]) -> io::Result<()> {
        let group = packet::group(self.family);
        let bytes = datagram::datagram(source, group, payload).ok_or(io::ErrorKind::InvalidInput)?;
        self.socket.send(group_mac(group), &bytes)
    }

    /// Sends an advertisement's bytes to a single peer on the interface of that name.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn advertise_to(
        &mut self,
        interface: &str,
        source: IpAddr,
        peer: IpAddr,
        payload: &[u8],
    ) -> io::Result<()> {
        let bytes = datagram::datagram(source, peer, payload).ok_or(io::ErrorKind::InvalidInput)?;
        let to = match peer {
            IpAddr::V4(_) => SocketAddr::new(peer, 0),
            IpAddr::V6(peer) => SocketAddrV6::new(peer, 0, 0, self.index).into(),
        };
        let socket = match &mut self.unicast {
            Some(socket) => socket,
            none => none.insert(raw(interface, self.family)?),
        };
        socket.send_to(&bytes, &to.into()).map(drop)
    }
}

impl AsRawFd for Wire {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for Wire {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

/// A socket that is a member of the group.
fn member(index: u32, family: Family) -> io::Result<Socket> {
    let (socket, joined) = match packet::group(family) {
        IpAddr::V4(group) => {
            let socket = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
            let joined = socket.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index));
            (socket, joined)
        }
        IpAddr::V6(group) => {
            let socket = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
            let joined = socket.join_multicast_v6(&group, index);
            (socket, joined)
        }
    };
    match joined {
        // An interface without multicast still hears by the packet socket.
        Err(error) if error.raw_os_error() != Some(libc::ENODEV) => Err(error),
        _ => Ok(socket),
    }
}

/// A raw IP socket to send with, headers and all. What arrives by it is dropped, for the packet socket has it too; but as
/// there is a socket, the kernel tells no sender that nobody speaks the protocol.
fn raw(interface: &str, family: Family) -> io::Result<Socket> {
    let domain = if family == Family::V4 { Domain::IPV4 } else { Domain::IPV6 };
    let socket = Socket::new(domain, Type::RAW, Some(Protocol::from(i32::from(packet::PROTOCOL))))?;
    // Returns 0 for whatever comes.
    socket.attach_filter(&[SockFilter::new((libc::BPF_RET | libc::BPF_K) as u16, 0, 0, 0)])?;
    socket.set_nonblocking(true)?;
    match family {
        Family::V4 => socket.set_header_included_v4(true)?,
        Family::V6 => socket.set_header_included_v6(true)?,
    }
    socket.bind_device(Some(interface.as_bytes()))?;
    Ok(socket)
}

/// Ethernet's multicast address of a group (RFC 1112 section 6.4, RFC 2464 section 7).
fn group_mac(group: IpAddr) -> [u8; 6] {
    match group {
        IpAddr::V4(group) => {
            let [_, b, c, d] = group.octets();
            [0x01, 0x00, 0x5e, b & 0x7f, c, d]
        }
        IpAddr::V6(group) => {
            let [.., a, b, c, d] = group.octets();
            [0x33, 0x33, a, b, c, d]
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hardware_addresses_of_the_groups() {
        assert_eq!(group_mac(packet::group(Family::V4)), [0x01, 0, 0x5e, 0, 0, 0x12]);
        assert_eq!(group_mac(packet::group(Family::V6)), [0x33, 0x33, 0, 0, 0, 0x12]);
    }
}
