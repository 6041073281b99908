//! ARP's bytes (RFC 826), without the Ethernet header: announcements and probes of RFC 5227, and what others say. Only
//! IPv4 over Ethernet; anything else is none of our business.

use std::net::{IpAddr, Ipv4Addr};

use super::Claimed;

/// The length of a message, in bytes. What follows in a short frame is padding.
pub const LENGTH: usize = 28;
/// Ethernet, IPv4, lengths 6 and 4.
const KIND: [u8; 6] = [0, 1, 8, 0, 6, 4];
const REQUEST: [u8; 2] = [0, 1];
const REPLY: [u8; 2] = [0, 2];

/// What a message is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operation {
    /// Asks who has the target address; an announcement and a probe are requests as well.
    Request,
    /// Answers.
    Reply,
}

/// A message that was received.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arp {
    /// What it is.
    pub operation: Operation,
    /// The sender's hardware address.
    pub mac: [u8; 6],
    /// The sender's address; unspecified in a probe.
    pub sender: Ipv4Addr,
    /// The address that it asks for, or the address of the one who asked.
    pub target: Ipv4Addr,
}

impl Arp {
    /// Takes a message apart; `None` when it is cut short, not of IPv4 over Ethernet, or neither request nor reply.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; LENGTH] = bytes.first_chunk()?;
        let address = |at: usize| Some(Ipv4Addr::from(*bytes.get(at..)?.first_chunk::<4>()?));
        if bytes[..6] != KIND {
            return None;
        }
        let operation = match [bytes[6], bytes[7]] {
            REQUEST => Operation::Request,
            REPLY => Operation::Reply,
            _ => return None,
        };
        Some(Self { operation, mac: *bytes[8..].first_chunk()?, sender: address(14)?, target: address(24)? })
    }

    /// Who it says has which address: its sender the sender's address, whatever else the message is about (RFC 5227
    /// section 2.4); and who sends a probe is about to take the target (section 2.1.1).
    pub fn claim(&self) -> Option<Claimed> {
        let (address, tentative) = match self.operation {
            _ if !self.sender.is_unspecified() => (self.sender, false),
            Operation::Request if !self.target.is_unspecified() => (self.target, true),
            _ => return None,
        };
        Some(Claimed { address: IpAddr::V4(address), mac: self.mac, tentative })
    }
}

/// A gratuitous request, sent to all (RFC 5227 section 2.3, RFC 9568 section 6.4.2): "the address is at this MAC".
pub fn gratuitous(mac: [u8; 6], address: Ipv4Addr) -> [u8; LENGTH] {
    request(mac, address, address)
}

/// A probe, sent to all (RFC 5227 section 2.1.1): asks for the address without claiming any.
pub fn probe(mac: [u8; 6], address: Ipv4Addr) -> [u8; LENGTH] {
    request(mac, Ipv4Addr::UNSPECIFIED, address)
}

fn request(mac: [u8; 6], sender: Ipv4Addr, target: Ipv4Addr) -> [u8; LENGTH] {
    let mut bytes = [0; LENGTH];
    bytes[..6].copy_from_slice(&KIND);
    bytes[6..8].copy_from_slice(&REQUEST);
    bytes[8..14].copy_from_slice(&mac);
    bytes[14..18].copy_from_slice(&sender.octets());
    // Target hardware address: ignored, zero.
    bytes[24..].copy_from_slice(&target.octets());
    bytes
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
    const VIP: Ipv4Addr = Ipv4Addr::new(10, 87, 2, 50);

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn case_26_the_bytes_of_a_gratuitous_arp_and_of_a_probe() {
        let announced = gratuitous(MAC, VIP);
        assert_eq!(hex(&announced), "00010800060400015254000000010a5702320000000000000a570232");
        let arp = Arp { operation: Operation::Request, mac: MAC, sender: VIP, target: VIP };
        assert_eq!(Arp::parse(&announced), Some(arp));
        assert_eq!(arp.claim(), Some(Claimed { address: VIP.into(), mac: MAC, tentative: false }));

        let probed = probe(MAC, VIP);
        assert_eq!(hex(&probed), "0001080006040001525400000001000000000000000000000a570232");
        let claim = Arp::parse(&probed).and_then(|arp| arp.claim());
        assert_eq!(claim, Some(Claimed { address: VIP.into(), mac: MAC, tentative: true }));
    }

    #[test]
    fn the_sender_of_requests_and_replies_claims_its_own_address_and_no_other() {
        let other = Ipv4Addr::new(10, 87, 0, 11);
        for (operation, code) in [(Operation::Request, 1), (Operation::Reply, 2)] {
            let mut bytes = request(MAC, other, VIP).to_vec();
            bytes[7] = code;
            // Padding up to the shortest frame.
            bytes.resize(46, 0);
            let arp = Arp::parse(&bytes).unwrap();
            assert_eq!(arp, Arp { operation, mac: MAC, sender: other, target: VIP });
            assert_eq!(arp.claim(), Some(Claimed { address: other.into(), mac: MAC, tentative: false }));
        }
    }

    #[test]
    fn what_is_no_arp_of_ipv4_over_ethernet_is_left_alone() {
        let good = gratuitous(MAC, VIP);
        for length in 0..LENGTH {
            assert_eq!(Arp::parse(&good[..length]), None, "{length} bytes");
        }
        for at in 0..8 {
            let mut bytes = good;
            bytes[at] ^= 0x10;
            assert_eq!(Arp::parse(&bytes), None, "byte {at}");
        }
        let nobody = Ipv4Addr::UNSPECIFIED;
        let empty = Arp { operation: Operation::Request, mac: MAC, sender: nobody, target: nobody };
        assert_eq!(empty.claim(), None);
        assert_eq!(Arp { operation: Operation::Reply, target: VIP, ..empty }.claim(), None);
    }

    proptest! {
        #[test]
        fn any_bytes_of_arp_are_survived(
            random in proptest::collection::vec(any::<u8>(), 0..64),
            changes in proptest::collection::vec((0..LENGTH, any::<u8>()), 0..4),
            length in 0..=LENGTH,
        ) {
            let mut altered = gratuitous(MAC, VIP);
            for (at, value) in changes {
                altered[at] = value;
            }
            for bytes in [&random[..], &altered[..], &altered[..length]] {
                let arp = Arp::parse(bytes);
                prop_assert!(arp.is_none() || bytes.len() >= LENGTH);
                arp.and_then(|arp| arp.claim());
            }
        }
    }
}
