//! One interface's sockets for one family: advertisements in and out.
//!
//! A packet socket hears what the host's firewall would drop, and sends past it. The group is joined all the same, for
//! switches that look. To a single peer advertisements go by a raw IP socket: the kernel knows the way.

mod datagram;

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, SocketAddr, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use vip_core::vrrp::Family;
use vip_core::vrrp::packet;

pub use datagram::Packet;

/// The sockets on one interface.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
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
        // Protocol 0: nothing is queued until the filter is in place and the socket is bound.
        // SAFETY: a plain system call; the result is checked before it becomes an owned descriptor.
        let fd = unsafe {
            libc::socket(libc::AF_PACKET, libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC, 0)
        };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a fresh descriptor that nobody else owns.
        let socket = unsafe { OwnedFd::from_raw_fd(fd) };
        only_vrrp(fd, family)?;
        let address = link_address(index, family, [0; 6]);
        // SAFETY: `address` is a valid sockaddr_ll and its size is given.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), socklen::<libc::sockaddr_ll>()) };
        check(bound as isize)?;
        Ok(Self { socket, index, family, _member: member, unicast: None })
    }

    /// Index of the interface.
    pub fn index(&self) -> u32 {
        self.index
    }

    /// The next packet that is queued; `None` when there is none.
    ///
    /// # Errors
    /// `NetworkDown` and the like when the interface is going away.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        let mut buffer = [0_u8; 2048];
        loop {
            let mut from = link_address(0, self.family, [0; 6]);
            let mut length = socklen::<libc::sockaddr_ll>();
            // SAFETY: buffer and address are valid for the sizes given.
            let received = unsafe {
                libc::recvfrom(
                    self.socket.as_raw_fd(),
                    buffer.as_mut_ptr().cast(),
                    buffer.len(),
                    0,
                    (&raw mut from).cast(),
                    &raw mut length,
                )
            };
            // Our own; one for another machine, on a card that hears everything; of a VLAN on top of this interface,
            // which its own socket hears.
            let astray = matches!(from.sll_pkttype, libc::PACKET_OUTGOING | libc::PACKET_OTHERHOST)
                || u32::try_from(from.sll_ifindex) != Ok(self.index);
            match check(received) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
                Ok(_) if astray => {}
                Ok(length) => {
                    if let Some(packet) = datagram::parse(buffer.get(..length).unwrap_or_default()) {
                        return Ok(Some(packet));
                    }
                }
            }
        }
    }

    /// Sends an advertisement's bytes to the group.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn advertise(&self, source: IpAddr, payload: &[u8]) -> io::Result<()> {
        let group = packet::group(self.family);
        let bytes = datagram::datagram(source, group, payload).ok_or(io::ErrorKind::InvalidInput)?;
        let address = link_address(self.index, self.family, group_mac(group));
        // SAFETY: `bytes` and `address` are valid for the sizes given.
        let sent = unsafe {
            libc::sendto(
                self.socket.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const address).cast(),
                socklen::<libc::sockaddr_ll>(),
            )
        };
        check(sent).map(drop)
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
    filter(socket.as_raw_fd(), &mut [statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0)])?;
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

/// Classic BPF: the IP header's protocol or next header is 112, or the packet is not queued.
fn only_vrrp(fd: RawFd, family: Family) -> io::Result<()> {
    let offset = if family == Family::V4 { 9 } else { 6 };
    filter(
        fd,
        &mut [
            statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, offset, 0, 0),
            statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, packet::PROTOCOL.into(), 0, 1),
            statement(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0),
            statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
        ],
    )
}

fn statement(code: u32, k: u32, jt: u8, jf: u8) -> libc::sock_filter {
    libc::sock_filter { code: code as u16, jt, jf, k }
}

fn filter(fd: RawFd, program: &mut [libc::sock_filter]) -> io::Result<()> {
    let length = u16::try_from(program.len()).map_err(io::Error::other)?;
    let filter = libc::sock_fprog { len: length, filter: program.as_mut_ptr() };
    // SAFETY: `filter` points to `program`, which lives until the call returns; the kernel copies it.
    let result = unsafe {
        libc::setsockopt(
            fd,
            libc::SOL_SOCKET,
            libc::SO_ATTACH_FILTER,
            (&raw const filter).cast(),
            socklen::<libc::sock_fprog>(),
        )
    };
    check(result as isize).map(drop)
}

fn link_address(index: u32, family: Family, mac: [u8; 6]) -> libc::sockaddr_ll {
    let mut address = [0; 8];
    address[..6].copy_from_slice(&mac);
    let protocol = if family == Family::V4 { libc::ETH_P_IP } else { libc::ETH_P_IPV6 };
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: u16::try_from(protocol).unwrap_or_default().to_be(),
        sll_ifindex: i32::try_from(index).unwrap_or_default(),
        sll_hatype: 0,
        sll_pkttype: 0,
        sll_halen: 6,
        sll_addr: address,
    }
}

fn socklen<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default()
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
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
