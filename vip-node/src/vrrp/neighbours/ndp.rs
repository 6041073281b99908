//! Neighbour discovery's bytes (RFC 4861), the IPv6 header included: unsolicited advertisements, the solicitations of
//! duplicate address detection (RFC 4862), and what others say. What fails one of the checks of RFC 4861 section 7.1
//! says nothing.

use std::net::{IpAddr, Ipv6Addr};

use vip_core::vrrp::packet::ones_complement;

use super::Claimed;

/// The next header of ICMPv6.
pub const ICMPV6: u8 = 58;
/// ICMPv6's type of a neighbour solicitation.
pub const SOLICITATION: u8 = 135;
/// ICMPv6's type of a neighbour advertisement.
pub const ADVERTISEMENT: u8 = 136;
/// The hop limit that proves that a packet was not routed.
pub const HOP_LIMIT: u8 = 255;
/// All nodes of the link.
pub const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);

/// The IPv6 header.
const HEADER: usize = 40;
/// Either message without options: type, code, checksum, flags or nothing, target.
const MESSAGE: usize = 24;
/// A link-layer address option of Ethernet: type, length in units of eight bytes, address.
const OPTION: usize = 8;
const SOURCE_LINK_LAYER: u8 = 1;
const TARGET_LINK_LAYER: u8 = 2;
/// Flags of an advertisement (RFC 4861 section 4.4).
const ROUTER: u8 = 0x80;
const SOLICITED: u8 = 0x40;
const OVERRIDE: u8 = 0x20;

/// An unsolicited advertisement to all nodes (RFC 4861 section 7.2.6): "the target is at this MAC, forget what you
/// knew". `source` is an address of the sending interface, `router` whether the node forwards.
pub fn advertisement(
    mac: [u8; 6],
    target: Ipv6Addr,
    source: Ipv6Addr,
    router: bool,
) -> [u8; HEADER + MESSAGE + OPTION] {
    let mut bytes = [0; HEADER + MESSAGE + OPTION];
    bytes[HEADER] = ADVERTISEMENT;
    bytes[HEADER + 4] = OVERRIDE | if router { ROUTER } else { 0 };
    bytes[HEADER + 8..HEADER + MESSAGE].copy_from_slice(&target.octets());
    bytes[HEADER + MESSAGE] = TARGET_LINK_LAYER;
    bytes[HEADER + MESSAGE + 1] = 1;
    bytes[HEADER + MESSAGE + 2..].copy_from_slice(&mac);
    finish(&mut bytes, source, ALL_NODES);
    bytes
}

/// A solicitation that asks whether anybody has the target, without claiming an address (RFC 4862 section 5.4.2).
pub fn solicitation(target: Ipv6Addr) -> [u8; HEADER + MESSAGE] {
    let mut bytes = [0; HEADER + MESSAGE];
    bytes[HEADER] = SOLICITATION;
    bytes[HEADER + 8..].copy_from_slice(&target.octets());
    finish(&mut bytes, Ipv6Addr::UNSPECIFIED, solicited_node(target));
    bytes
}

/// The group on which an address is asked for (RFC 4291 section 2.7.1).
pub fn solicited_node(address: Ipv6Addr) -> Ipv6Addr {
    let [.., x, y, z] = address.octets();
    let [high, low] = [u16::from_be_bytes([0xff, x]), u16::from_be_bytes([y, z])];
    Ipv6Addr::new(0xff02, 0, 0, 0, 0, 1, high, low)
}

/// Ethernet's address of a group (RFC 2464 section 7).
pub fn group_mac(group: Ipv6Addr) -> [u8; 6] {
    let [.., w, x, y, z] = group.octets();
    [0x33, 0x33, w, x, y, z]
}

/// Fills in the header and the checksum (RFC 4443 section 2.3).
fn finish(bytes: &mut [u8], source: Ipv6Addr, destination: Ipv6Addr) {
    let length = bytes.len() - HEADER;
    bytes[0] = 0x60;
    bytes[4..6].copy_from_slice(&u16::try_from(length).unwrap_or_default().to_be_bytes());
    bytes[6] = ICMPV6;
    bytes[7] = HOP_LIMIT;
    bytes[8..24].copy_from_slice(&source.octets());
    bytes[24..HEADER].copy_from_slice(&destination.octets());
    let sum = !checksum(&bytes[8..HEADER], &bytes[HEADER..]);
    bytes[HEADER + 2..HEADER + 4].copy_from_slice(&sum.to_be_bytes());
}

/// The sum over the pseudo-header (RFC 8200 section 8.1), of which the two addresses are given, and the message.
fn checksum(addresses: &[u8], message: &[u8]) -> u16 {
    let length = u32::try_from(message.len()).unwrap_or(u32::MAX).to_be_bytes();
    let header = u32::from(ones_complement(u32::from(ICMPV6), &length));
    let header = u32::from(ones_complement(header, addresses));
    ones_complement(header, message)
}

/// Who a packet says has which address, `ethernet` being its sender's hardware address:
/// - an advertisement: its target, at the MAC of its option, or at its sender's;
/// - a solicitation from no address: its sender is about to take the target (RFC 4862 section 5.4.3);
/// - a solicitation from an address: that address, at the MAC of its option.
///
/// `None` when it says no such thing, or when a receiver must discard it (RFC 4861 sections 7.1.1 and 7.1.2).
pub fn claim(packet: &[u8], ethernet: [u8; 6]) -> Option<Claimed> {
    let header: &[u8; HEADER] = packet.first_chunk()?;
    let length = usize::from(u16::from_be_bytes([header[4], header[5]]));
    if header[0] >> 4 != 6 || header[6] != ICMPV6 || header[7] != HOP_LIMIT {
        return None;
    }
    // What follows in a short frame is padding.
    let message = packet.get(HEADER..HEADER + length)?;
    let (fixed, options) = message.split_first_chunk::<MESSAGE>()?;
    let target = Ipv6Addr::from(*fixed.last_chunk()?);
    if fixed[1] != 0 || target.is_multicast() || checksum(&header[8..], message) != 0xffff {
        return None;
    }
    let source = Ipv6Addr::from(*header[8..].first_chunk()?);
    let destination = Ipv6Addr::from(*header.last_chunk()?);
    let options = Options::parse(options)?;
    let (address, mac, tentative) = match fixed[0] {
        ADVERTISEMENT if destination.is_multicast() && fixed[4] & SOLICITED != 0 => return None,
        ADVERTISEMENT => (target, options.target.unwrap_or(ethernet), false),
        SOLICITATION if !source.is_unspecified() => (source, options.source?, false),
        SOLICITATION if options.has_source || destination != solicited_node(target) => return None,
        SOLICITATION => (target, ethernet, true),
        _ => return None,
    };
    Some(Claimed { address: IpAddr::V6(address), mac, tentative })
}

/// The options of a message that matter here.
#[derive(Default)]
struct Options {
    source: Option<[u8; 6]>,
    target: Option<[u8; 6]>,
    /// Whether there is a source link-layer address option, of whatever length.
    has_source: bool,
}

impl Options {
    /// `None` when one has no length or reaches beyond the end (RFC 4861 section 4.6).
    fn parse(mut bytes: &[u8]) -> Option<Self> {
        let mut options = Self::default();
        while let [kind, units, ..] = *bytes {
            let (option, rest) = bytes.split_at_checked(usize::from(units) * 8)?;
            // An option without a length is empty here.
            let value = option.get(2..)?;
            // Only Ethernet's are of this length.
            let mac = <[u8; 6]>::try_from(value).ok();
            match kind {
                SOURCE_LINK_LAYER => {
                    options.source = mac;
                    options.has_source = true;
                }
                TARGET_LINK_LAYER => options.target = mac,
                _ => {}
            }
            bytes = rest;
        }
        bytes.is_empty().then_some(options)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MAC: [u8; 6] = [0x52, 0x54, 0, 0, 0, 1];
    const ETHERNET: [u8; 6] = [0x52, 0x54, 0, 0, 0, 2];
    const VIP: Ipv6Addr = Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 2, 0x50);
    const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);

    /// A message with options in a packet that is right but for what the change does, the checksum made right again.
    fn packet(message: &[u8], source: Ipv6Addr, destination: Ipv6Addr) -> Vec<u8> {
        let mut bytes = vec![0; HEADER];
        bytes.extend(message);
        bytes[HEADER + 2..HEADER + 4].fill(0);
        finish(&mut bytes, source, destination);
        bytes
    }

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    fn claimed(address: Ipv6Addr, mac: [u8; 6], tentative: bool) -> Option<Claimed> {
        Some(Claimed { address: address.into(), mac, tentative })
    }

    #[test]
    fn case_26_the_bytes_of_an_unsolicited_advertisement() {
        let bytes = advertisement(MAC, VIP, LINK_LOCAL, true);
        let expected = "6000000000203aff\
                        fe800000000000000000000000000001ff020000000000000000000000000001\
                        880087eea0000000fd870000000000000000000000020050\
                        0201525400000001";
        assert_eq!(hex(&bytes), expected);
        assert_eq!(advertisement(MAC, VIP, LINK_LOCAL, false)[HEADER + 4], 0x20, "override only");
        assert_eq!(claim(&bytes, ETHERNET), claimed(VIP, MAC, false));
        assert_eq!(group_mac(ALL_NODES), [0x33, 0x33, 0, 0, 0, 1]);
    }

    #[test]
    fn case_26_the_bytes_of_a_solicitation_from_no_address() {
        let bytes = solicitation(VIP);
        let expected = "6000000000183aff\
                        00000000000000000000000000000000ff0200000000000000000001ff020050\
                        87007c7c00000000fd870000000000000000000000020050";
        assert_eq!(hex(&bytes), expected);
        assert_eq!(claim(&bytes, ETHERNET), claimed(VIP, ETHERNET, true));
        assert_eq!(group_mac(solicited_node(VIP)), [0x33, 0x33, 0xff, 2, 0, 0x50]);
    }

    #[test]
    fn who_has_what_is_read_from_options_of_any_order() {
        let sent = advertisement(MAC, VIP, LINK_LOCAL, false);
        let message = &sent[HEADER..];
        let without = packet(&message[..MESSAGE], LINK_LOCAL, ALL_NODES);
        assert_eq!(claim(&without, ETHERNET), claimed(VIP, ETHERNET, false));
        // A nonce (RFC 3971) before it, and padding after the packet.
        let mut more = message[..MESSAGE].to_vec();
        more.extend([14, 1, 1, 2, 3, 4, 5, 6]);
        more.extend(&message[MESSAGE..]);
        let mut more = packet(&more, LINK_LOCAL, ALL_NODES);
        more.extend([0; 9]);
        assert_eq!(claim(&more, ETHERNET), claimed(VIP, MAC, false));
        // An answer to one node, with a link-layer address that is not Ethernet's.
        let mut long = message[..MESSAGE].to_vec();
        long[4] |= SOLICITED;
        long.extend([TARGET_LINK_LAYER, 2]);
        long.extend([7; 14]);
        assert_eq!(claim(&packet(&long, VIP, LINK_LOCAL), ETHERNET), claimed(VIP, ETHERNET, false));
    }

    #[test]
    fn who_asks_from_an_address_claims_that_address() {
        let asked = Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 0, 0x11);
        let mut message = solicitation(asked)[HEADER..].to_vec();
        assert_eq!(claim(&packet(&message, VIP, solicited_node(asked)), ETHERNET), None, "no option, no MAC");
        message.extend([SOURCE_LINK_LAYER, 1]);
        message.extend(MAC);
        let with = packet(&message, VIP, solicited_node(asked));
        assert_eq!(claim(&with, ETHERNET), claimed(VIP, MAC, false));
    }

    #[test]
    fn what_a_receiver_must_discard_says_nothing() {
        let refused = |bytes: &[u8], why: &str| assert_eq!(claim(bytes, ETHERNET), None, "{why}");
        let sent = advertisement(MAC, VIP, LINK_LOCAL, true);
        let change = |at: usize, value: u8| {
            let mut message = sent[HEADER..].to_vec();
            message[at] = value;
            packet(&message, LINK_LOCAL, ALL_NODES)
        };
        refused(&change(0, 134), "a router advertisement");
        refused(&change(1, 1), "a code");
        refused(&change(4, 0xe0), "solicited, but sent to all");
        refused(&change(8, 0xff), "a group as the target");
        refused(&change(MESSAGE + 1, 0), "an option without a length");
        refused(&change(MESSAGE + 1, 2), "an option beyond the end");
        for length in 0..sent.len() {
            refused(&sent[..length], "cut short");
        }
        refused(&packet(&sent[HEADER..HEADER + 23], LINK_LOCAL, ALL_NODES), "less than 24 bytes");
        refused(&packet(&sent[HEADER..sent.len() - 7], LINK_LOCAL, ALL_NODES), "half of an option's head");
        for (at, value, why) in
            [(0, 0x40, "not IPv6"), (6, 17, "not ICMPv6"), (7, 254, "routed"), (42, 1, "checksum")]
        {
            let mut bytes = sent;
            bytes[at] = value;
            refused(&bytes, why);
        }

        let asked = solicitation(VIP);
        refused(
            &packet(&asked[HEADER..], Ipv6Addr::UNSPECIFIED, ALL_NODES),
            "not to the solicited-node group",
        );
        let mut message = asked[HEADER..].to_vec();
        message.extend([SOURCE_LINK_LAYER, 1]);
        message.extend(MAC);
        let with = packet(&message, Ipv6Addr::UNSPECIFIED, solicited_node(VIP));
        refused(&with, "a source link-layer address from no address");
    }

    proptest! {
        #[test]
        fn any_bytes_of_neighbour_discovery_are_survived(
            random in proptest::collection::vec(any::<u8>(), 0..128),
            options in proptest::collection::vec(any::<u8>(), 0..64),
            changes in proptest::collection::vec((0..HEADER + MESSAGE, any::<u8>()), 0..4),
            length in 0..=HEADER + MESSAGE + OPTION,
            kind in SOLICITATION..=ADVERTISEMENT,
        ) {
            claim(&random, ETHERNET);
            // Random options under a right checksum.
            let mut message = advertisement(MAC, VIP, LINK_LOCAL, true)[HEADER..HEADER + MESSAGE].to_vec();
            message[0] = kind;
            message.extend(options);
            let mut whole = packet(&message, LINK_LOCAL, ALL_NODES);
            claim(&whole, ETHERNET);
            for (at, value) in &changes {
                whole[*at] = *value;
            }
            claim(&whole, ETHERNET);
            let mut altered = advertisement(MAC, VIP, LINK_LOCAL, true);
            for (at, value) in &changes {
                altered[*at] = *value;
            }
            claim(&altered, ETHERNET);
            claim(&altered[..length], ETHERNET);
        }
    }
}
