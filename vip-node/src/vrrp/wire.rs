//! One interface's packet socket: advertisements in and out, announcements out.
//!
//! A packet socket hears what the host's firewall would drop, and sends past it. The group is joined all the same, for
//! switches that look.

use std::io;
use std::mem::size_of;
use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};

use socket2::{Domain, InterfaceIndexOrAddress, Protocol, Socket, Type};
use vip_core::vrrp::packet::{self, HOP_LIMIT, ones_complement};

use super::announce::gratuitous_arp;

/// Ethernet's multicast address of 224.0.0.18 (RFC 1112 section 6.4).
const GROUP_MAC: [u8; 6] = [0x01, 0x00, 0x5e, 0x00, 0x00, 0x12];
const BROADCAST_MAC: [u8; 6] = [0xff; 6];
/// The header that we send: no options.
const IPV4_HEADER: usize = 20;
/// Internetwork control (RFC 4594), as keepalived sends.
const TRAFFIC_CLASS: u8 = 0xc0;

/// A received packet of VRRP's protocol, not checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Sender by the IP header.
    pub source: Ipv4Addr,
    /// Receiver by the IP header.
    pub destination: Ipv4Addr,
    /// TTL.
    pub hop_limit: u8,
    /// What follows the IP header.
    pub payload: Vec<u8>,
}

/// The sockets on one interface.
#[derive(Debug)]
pub struct Wire {
    socket: OwnedFd,
    index: i32,
    /// Keeps the membership in the group.
    _member: Socket,
}

impl Wire {
    /// Opens the sockets.
    ///
    /// # Errors
    /// `PermissionDenied` without NET_RAW; else what the kernel says.
    pub fn open(index: u32) -> io::Result<Self> {
        let group = match packet::group(vip_core::vrrp::Family::V4) {
            IpAddr::V4(group) => group,
            IpAddr::V6(_) => return Err(io::ErrorKind::Unsupported.into()),
        };
        let member = Socket::new(Domain::IPV4, Type::DGRAM, Some(Protocol::UDP))?;
        match member.join_multicast_v4_n(&group, &InterfaceIndexOrAddress::Index(index)) {
            // An interface without multicast still hears by the packet socket.
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => return Err(error),
            _ => {}
        }
        let index = i32::try_from(index).map_err(io::Error::other)?;
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
        only_vrrp(fd)?;
        let address = link_address(index, libc::ETH_P_IP, [0; 6]);
        // SAFETY: `address` is a valid sockaddr_ll and its size is given.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), socklen::<libc::sockaddr_ll>()) };
        check(bound as isize)?;
        Ok(Self { socket, index, _member: member })
    }

    /// The next packet that is queued; `None` when there is none.
    ///
    /// # Errors
    /// `NetworkDown` and the like when the interface is going away.
    pub fn receive(&self) -> io::Result<Option<Packet>> {
        let mut buffer = [0_u8; 2048];
        loop {
            let mut from = link_address(0, 0, [0; 6]);
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
            match check(received) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => return Ok(None),
                Err(error) => return Err(error),
                // Our own, or of a VLAN on top of this interface, which its own socket hears.
                Ok(_) if from.sll_pkttype == libc::PACKET_OUTGOING || from.sll_ifindex != self.index => {}
                Ok(length) => {
                    if let Some(packet) = parse(buffer.get(..length).unwrap_or_default()) {
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
    pub fn advertise(&self, source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> io::Result<()> {
        self.send(libc::ETH_P_IP, GROUP_MAC, &datagram(source, destination, payload))
    }

    /// Sends a gratuitous ARP for an address, which is at this hardware address.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn announce(&self, mac: [u8; 6], address: Ipv4Addr) -> io::Result<()> {
        self.send(libc::ETH_P_ARP, BROADCAST_MAC, &gratuitous_arp(mac, address))
    }

    fn send(&self, protocol: i32, to: [u8; 6], bytes: &[u8]) -> io::Result<()> {
        let address = link_address(self.index, protocol, to);
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

/// An IPv4 datagram of VRRP's protocol.
fn datagram(source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IPV4_HEADER];
    let length = u16::try_from(IPV4_HEADER + payload.len()).unwrap_or(u16::MAX);
    bytes[0] = 0x45;
    bytes[1] = TRAFFIC_CLASS;
    bytes[2..4].copy_from_slice(&length.to_be_bytes());
    bytes[8] = HOP_LIMIT;
    bytes[9] = packet::PROTOCOL;
    bytes[12..16].copy_from_slice(&source.octets());
    bytes[16..20].copy_from_slice(&destination.octets());
    let sum = !ones_complement(0, &bytes);
    bytes[10..12].copy_from_slice(&sum.to_be_bytes());
    bytes.extend(payload);
    bytes
}

/// Takes an IPv4 datagram apart; `None` when it is cut short or no VRRP. What follows it in a short frame is padding.
fn parse(bytes: &[u8]) -> Option<Packet> {
    let header = usize::from(bytes.first()? & 0xf) * 4;
    let length = usize::from(u16::from_be_bytes(bytes.get(2..4)?.try_into().ok()?));
    let address =
        |at: usize| -> Option<Ipv4Addr> { Some(<[u8; 4]>::try_from(bytes.get(at..at + 4)?).ok()?.into()) };
    if bytes[0] >> 4 != 4 || header < IPV4_HEADER || *bytes.get(9)? != packet::PROTOCOL {
        return None;
    }
    Some(Packet {
        source: address(12)?,
        destination: address(16)?,
        hop_limit: bytes[8],
        payload: bytes.get(header..length)?.to_vec(),
    })
}

/// Classic BPF: byte 9 of the IP header is 112, or the packet is not queued.
fn only_vrrp(fd: RawFd) -> io::Result<()> {
    let statement = |code: u32, k: u32, jt: u8, jf: u8| libc::sock_filter { code: code as u16, jt, jf, k };
    let mut program = [
        statement(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, 9, 0, 0),
        statement(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, packet::PROTOCOL.into(), 0, 1),
        statement(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0),
        statement(libc::BPF_RET | libc::BPF_K, 0, 0, 0),
    ];
    let filter = libc::sock_fprog { len: 4, filter: program.as_mut_ptr() };
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

fn link_address(index: i32, protocol: i32, mac: [u8; 6]) -> libc::sockaddr_ll {
    let mut address = [0; 8];
    address[..6].copy_from_slice(&mac);
    libc::sockaddr_ll {
        sll_family: libc::AF_PACKET as u16,
        sll_protocol: u16::try_from(protocol).unwrap_or_default().to_be(),
        sll_ifindex: index,
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
    fn what_is_built_is_taken_apart() {
        let (source, destination) = (Ipv4Addr::new(10, 9, 0, 1), Ipv4Addr::new(224, 0, 0, 18));
        let mut bytes = datagram(source, destination, b"payload");
        assert_eq!(ones_complement(0, &bytes[..IPV4_HEADER]), 0xffff);
        bytes.extend([0; 13]);
        let expected = Packet { source, destination, hop_limit: 255, payload: b"payload".to_vec() };
        assert_eq!(parse(&bytes), Some(expected));
        for length in 0..IPV4_HEADER + 7 {
            assert_eq!(parse(&bytes[..length]), None, "{length}");
        }
    }

    #[test]
    fn any_bytes_are_survived() {
        use proptest::prelude::*;
        proptest!(|(bytes in proptest::collection::vec(any::<u8>(), 0..64))| { parse(&bytes); });
    }
}
