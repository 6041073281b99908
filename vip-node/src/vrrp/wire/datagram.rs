//! The bytes of VRRP's IP datagrams, both families, as they are on the wire. What is received is not trusted.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vip_core::vrrp::packet::{self, HOP_LIMIT, ones_complement};

/// The headers that we send: no options, no extensions.
const IPV4_HEADER: usize = 20;
const IPV6_HEADER: usize = 40;
/// Internetwork control (RFC 4594), as keepalived sends.
const TRAFFIC_CLASS: u8 = 0xc0;

/// A received packet of VRRP's protocol, not checked.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Packet {
    /// Sender by the IP header.
    pub source: IpAddr,
    /// Receiver by the IP header.
    pub destination: IpAddr,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// What follows the IP header.
    pub payload: Vec<u8>,
}

/// A datagram of VRRP's protocol; `None` when the addresses are of two families.
pub fn datagram(source: IpAddr, destination: IpAddr, payload: &[u8]) -> Option<Vec<u8>> {
    match (source, destination) {
        (IpAddr::V4(source), IpAddr::V4(destination)) => Some(over_v4(source, destination, payload)),
        (IpAddr::V6(source), IpAddr::V6(destination)) => Some(over_v6(source, destination, payload)),
        _ => None,
    }
}

fn over_v4(source: Ipv4Addr, destination: Ipv4Addr, payload: &[u8]) -> Vec<u8> {
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

fn over_v6(source: Ipv6Addr, destination: Ipv6Addr, payload: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0; IPV6_HEADER];
    bytes[0] = 0x60 | TRAFFIC_CLASS >> 4;
    bytes[1] = TRAFFIC_CLASS << 4;
    bytes[4..6].copy_from_slice(&u16::try_from(payload.len()).unwrap_or(u16::MAX).to_be_bytes());
    bytes[6] = packet::PROTOCOL;
    bytes[7] = HOP_LIMIT;
    bytes[8..24].copy_from_slice(&source.octets());
    bytes[24..40].copy_from_slice(&destination.octets());
    bytes.extend(payload);
    bytes
}

/// Takes a datagram apart; `None` when it is cut short, a fragment or no VRRP. What follows it in a short frame is
/// padding.
pub fn parse(bytes: &[u8]) -> Option<Packet> {
    match bytes.first()? >> 4 {
        4 => parse_v4(bytes),
        6 => parse_v6(bytes),
        _ => None,
    }
}

fn parse_v4(bytes: &[u8]) -> Option<Packet> {
    let header = usize::from(bytes.first()? & 0xf) * 4;
    let length = usize::from(u16::from_be_bytes(array(bytes, 2)?));
    // "More fragments" or an offset.
    let fragment = u16::from_be_bytes(array(bytes, 6)?) & 0x3fff != 0;
    if header < IPV4_HEADER || fragment || *bytes.get(9)? != packet::PROTOCOL {
        return None;
    }
    Some(Packet {
        source: array::<4>(bytes, 12)?.into(),
        destination: array::<4>(bytes, 16)?.into(),
        hop_limit: *bytes.get(8)?,
        payload: bytes.get(header..length)?.to_vec(),
    })
}

fn parse_v6(bytes: &[u8]) -> Option<Packet> {
    let length = usize::from(u16::from_be_bytes(array(bytes, 4)?));
    if *bytes.get(6)? != packet::PROTOCOL {
        return None;
    }
    Some(Packet {
        source: array::<16>(bytes, 8)?.into(),
        destination: array::<16>(bytes, 24)?.into(),
        hop_limit: *bytes.get(7)?,
        payload: bytes.get(IPV6_HEADER..IPV6_HEADER + length)?.to_vec(),
    })
}

fn array<const N: usize>(bytes: &[u8], offset: usize) -> Option<[u8; N]> {
    bytes.get(offset..)?.first_chunk().copied()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn what_is_built_is_taken_apart() {
        for (source, destination, header) in
            [("10.9.0.1", "224.0.0.18", IPV4_HEADER), ("fe80::1", "ff02::12", IPV6_HEADER)]
        {
            let (source, destination) = (source.parse().unwrap(), destination.parse().unwrap());
            let mut bytes = datagram(source, destination, b"payload").unwrap();
            bytes.extend([0; 13]);
            let expected = Packet { source, destination, hop_limit: 255, payload: b"payload".to_vec() };
            assert_eq!(parse(&bytes), Some(expected));
            for length in 0..header + 7 {
                assert_eq!(parse(&bytes[..length]), None, "{length}");
            }
        }
        assert_eq!(datagram([10, 9, 0, 1].into(), "ff02::12".parse().unwrap(), b""), None);
    }

    #[test]
    fn an_ipv4_header_has_its_checksum_and_a_fragment_is_no_packet() {
        let mut bytes = datagram([10, 9, 0, 1].into(), [224, 0, 0, 18].into(), b"payload").unwrap();
        assert_eq!(ones_complement(0, &bytes[..IPV4_HEADER]), 0xffff);
        bytes[6] = 0x20;
        assert_eq!(parse(&bytes), None);
        bytes[6] = 0x40;
        assert!(parse(&bytes).is_some(), "that it may not be fragmented is no fault");
    }

    proptest! {
        #[test]
        fn any_bytes_are_survived_over_ipv4(mut bytes in prop::collection::vec(any::<u8>(), 1..64)) {
            parse(&bytes);
            bytes[0] = 0x40 | bytes[0] & 0xf;
            parse(&bytes);
        }

        #[test]
        fn any_bytes_are_survived_over_ipv6(mut bytes in prop::collection::vec(any::<u8>(), 1..96)) {
            bytes[0] = 0x60 | bytes[0] & 0xf;
            parse(&bytes);
            if bytes.len() > 6 {
                bytes[6] = packet::PROTOCOL;
                parse(&bytes);
            }
        }
    }
}
