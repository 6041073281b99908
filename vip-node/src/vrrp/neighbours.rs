//! Which hardware address has which IP address, as the neighbours on a LAN tell each other: by ARP over IPv4 (RFC 826,
//! RFC 5227), by neighbour discovery over IPv6 (RFC 4861, RFC 4862).
//!
//! ```text
//!   NeighbourSocket  announce, probe ---> LAN ---> receive: who claims what      one for each interface and family
//!   Prober           is an address in use, before it is bound for the first time  pure, time is given
//!   Claims           who else claims addresses of ours, and when to defend them   pure, time is given
//!   arp, ndp         the bytes                                                    pure
//! ```
//!
//! When an address that is ours is announced is not decided here.

pub mod arp;
pub mod claims;
pub mod ndp;
pub mod prober;

use std::collections::BTreeSet;
use std::io;
use std::net::{IpAddr, Ipv6Addr};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, RawFd};

use socket2::{Domain, Protocol, Socket, Type};
use vip_core::vrrp::{Family, Lan};

use self::arp::Arp;
pub use self::claims::Claims;
pub use self::prober::{Prober, Verdict};
use super::socket::{PacketSocket, only};

const BROADCAST_MAC: [u8; 6] = [0xff; 6];
/// More than a frame of Ethernet carries.
const BUFFER: usize = 2048;

/// Somebody says that an address is at a MAC.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Claimed {
    /// The address.
    pub address: IpAddr,
    /// The hardware address of the machine.
    pub mac: [u8; 6],
    /// It asks whether the address is free, in order to take it: a claim to whoever probes the address as well, while the
    /// owner of an address has nothing to fear of it: its kernel answers, and the other one is warned.
    pub tentative: bool,
}

/// What was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Received {
    /// A claim.
    Claim(Claimed),
    /// A frame that claims nothing. There may be more.
    Other,
    /// Nothing: the queue is empty.
    Nothing,
}

/// Whether a hardware address is one of this node's or of a peer's: what those say is no conflict.
pub fn is_friend(mac: [u8; 6], own: &BTreeSet<[u8; 6]>, lan: &Lan) -> bool {
    own.contains(&mac) || lan.peers.have(mac)
}

/// The neighbours on one interface, in one family. What this node sends itself is not heard.
#[derive(Debug)]
pub struct NeighbourSocket {
    socket: PacketSocket,
    index: u32,
    /// IPv6: keeps memberships in the groups of the addresses that are being probed.
    member: Option<Socket>,
}

impl NeighbourSocket {
    /// Opens the socket on the interface with an index. It does not block.
    ///
    /// # Errors
    /// `PermissionDenied` without NET_RAW; IPv6: when the kernel has none; else what the kernel says.
    pub fn open(index: u32, family: Family) -> io::Result<Self> {
        let (socket, member) = match family {
            Family::V4 => (PacketSocket::open(index, libc::ETH_P_ARP, &mut [])?, None),
            Family::V6 => {
                // In the IPv6 header the next header and the hop limit, after it ICMPv6's type.
                let types = [ndp::SOLICITATION, ndp::ADVERTISEMENT];
                let mut filter = only(&[(6, &[ndp::ICMPV6]), (7, &[ndp::HOP_LIMIT]), (40, &types)]);
                let member = Socket::new(Domain::IPV6, Type::DGRAM, Some(Protocol::UDP))?;
                (PacketSocket::open(index, libc::ETH_P_IPV6, &mut filter)?, Some(member))
            }
        };
        Ok(Self { socket, index, member })
    }

    /// The next frame that is queued. Call it until it is [`Received::Nothing`], or so often that nothing else waits.
    ///
    /// # Errors
    /// `NetworkDown` and the like when the interface is going away: reported once.
    pub fn receive(&self) -> io::Result<Received> {
        let mut buffer = [0; BUFFER];
        let Some(frame) = self.socket.receive(&mut buffer)? else { return Ok(Received::Nothing) };
        let claim = match self.member {
            _ if !frame.own => None,
            None => Arp::parse(frame.bytes).and_then(|arp| arp.claim()),
            Some(_) => ndp::claim(frame.bytes, frame.source),
        };
        Ok(claim.map_or(Received::Other, Received::Claim))
    }

    /// Tells all neighbours that an address is at a MAC, the interface's own: a gratuitous ARP request, or an
    /// unsolicited neighbour advertisement. IPv6: `router` whether the node forwards; the interface's link-local address
    /// is the sender, without one the announced address is.
    ///
    /// # Errors
    /// `InvalidInput` for an address of the other family; else what the kernel says.
    pub fn announce(
        &self,
        address: IpAddr,
        mac: [u8; 6],
        router: bool,
        link_local: Option<Ipv6Addr>,
    ) -> io::Result<()> {
        match (address, &self.member) {
            (IpAddr::V4(address), None) => self.socket.send(BROADCAST_MAC, &arp::gratuitous(mac, address)),
            (IpAddr::V6(address), Some(_)) => {
                let source = link_local.unwrap_or(address);
                let bytes = ndp::advertisement(mac, address, source, router);
                self.socket.send(ndp::group_mac(ndp::ALL_NODES), &bytes)
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// Asks all neighbours whether they have an address, without claiming it: an ARP probe, or a solicitation as in
    /// duplicate address detection. `mac` is the interface's own. Whoever has the address, or asks for it as well, is then
    /// heard; IPv6: that needs a membership in a group, kept until [`NeighbourSocket::probed`].
    ///
    /// # Errors
    /// `InvalidInput` for an address of the other family; else what the kernel says.
    pub fn probe(&self, address: IpAddr, mac: [u8; 6]) -> io::Result<()> {
        match (address, &self.member) {
            (IpAddr::V4(address), None) => self.socket.send(BROADCAST_MAC, &arp::probe(mac, address)),
            (IpAddr::V6(address), Some(member)) => {
                let group = ndp::solicited_node(address);
                let joined = match member.join_multicast_v6(&group, self.index) {
                    // It is a member already, by an earlier probe.
                    Err(error) if error.raw_os_error() == Some(libc::EADDRINUSE) => Ok(()),
                    result => result,
                };
                // Who has the address answers to all nodes, and is heard without a membership.
                self.socket.send(ndp::group_mac(group), &ndp::solicitation(address))?;
                joined
            }
            _ => Err(io::ErrorKind::InvalidInput.into()),
        }
    }

    /// The verdict on a probed address is there: leaves its group. Other probed addresses of the same group, which are
    /// those with the same last three bytes, join it again by their next probe.
    pub fn probed(&self, address: IpAddr) {
        if let (IpAddr::V6(address), Some(member)) = (address, &self.member) {
            // It fails only for a group that was left already.
            let _ = member.leave_multicast_v6(&ndp::solicited_node(address), self.index);
        }
    }
}

impl AsRawFd for NeighbourSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.socket.as_raw_fd()
    }
}

impl AsFd for NeighbourSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use vip_core::vrrp::Peer;

    use super::*;

    #[test]
    fn a_nodes_own_cards_and_those_of_peers_are_no_strangers() {
        let peer = Peer { macs: vec![[1; 6], [2; 6]], ..Peer::default() };
        let lan = Lan { peers: vec![Peer::default(), peer].into(), ..Lan::default() };
        let own = BTreeSet::from([[3; 6], [4; 6]]);
        for (mac, friend) in [([1; 6], true), ([2; 6], true), ([4; 6], true), ([5; 6], false)] {
            assert_eq!(is_friend(mac, &own, &lan), friend, "{mac:?}");
        }
    }
}
