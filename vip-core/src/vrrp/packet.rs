//! Advertisements and their bytes (RFC 9568 section 5). Nothing here is trusted: whatever arrives is either a whole
//! and valid advertisement, or refused for one named reason.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use thiserror::Error;

use super::{Family, timers};

/// The IP protocol number of VRRP.
pub const PROTOCOL: u8 = 112;
/// The TTL or hop limit that proves that a packet was not routed.
pub const HOP_LIMIT: u8 = 255;
/// How many addresses an advertisement of ours lists; the others ride along.
pub const MAX_LISTED: usize = 20;

const VERSION: u8 = 3;
const ADVERTISEMENT: u8 = 1;
const HEADER: usize = 8;

/// The group to which advertisements go (RFC 9568 sections 5.1.1.2 and 5.1.2.2).
pub fn group(family: Family) -> IpAddr {
    match family {
        Family::V4 => IpAddr::V4(Ipv4Addr::new(224, 0, 0, 18)),
        Family::V6 => IpAddr::V6(Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 0x12)),
    }
}

/// An advertisement.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Advert {
    /// Virtual router identifier, 1 to 255.
    pub vrid: u8,
    /// Priority; 0 means that the sender gives up.
    pub priority: u8,
    /// Interval of the sender's advertisements, centiseconds, 1 to 4095.
    pub interval: u16,
    /// The addresses that it speaks for, at least one, all of one family.
    pub addresses: Vec<IpAddr>,
}

/// The two forms of the checksum over IPv4: RFC 9568 section 5.2.8 has no pseudo-header there, keepalived has one.
/// Over IPv6 there is always one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Checksum {
    /// With the addresses, protocol and length of the IP header.
    PseudoHeader,
    /// Over VRRP's own bytes.
    Plain,
}

/// What the IP header and the configuration say about a packet.
#[derive(Clone, Copy, Debug)]
pub struct Context {
    /// Its sender; tells the family.
    pub source: IpAddr,
    /// Where it was sent to.
    pub destination: IpAddr,
    /// Our own address where advertisements come by unicast too; `None`: only the group is right.
    pub local: Option<IpAddr>,
    /// TTL or hop limit.
    pub hop_limit: u8,
    /// The only form of checksum to accept over IPv4; `None`: either.
    pub checksum: Option<Checksum>,
}

/// Why a packet is refused. It then changes nothing but a counter.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Error)]
pub enum Refusal {
    /// Cut short, or a fragment: nobody can tell what it says.
    #[error("it is no whole datagram")]
    Malformed,
    /// It may have been routed (RFC 9568 section 7.1; so in all below).
    #[error("its TTL is {0}, not 255")]
    HopLimit(u8),
    /// Sent neither to VRRP's group nor, where unicast is spoken, to us.
    #[error("it was sent to {0}")]
    Destination(IpAddr),
    /// Another version of the protocol.
    #[error("its version is {0}, not 3")]
    Version(u8),
    /// Not an advertisement.
    #[error("its type is {0}, not 1")]
    Type(u8),
    /// Shorter than its header or its address list, or longer.
    #[error("its length of {0} bytes does not fit its address count")]
    Length(usize),
    /// Damaged.
    #[error("its checksum is wrong")]
    Checksum,
    /// Identifier 0, or one that no router here has.
    #[error("no virtual router here has its identifier {0}")]
    Vrid(u8),
    /// It speaks for no address.
    #[error("it lists no address")]
    Count,
    /// Interval 0 would make a backup take over without end.
    #[error("its interval is 0")]
    Interval,
    /// The first IPv6 address must be link-local (RFC 9568 section 5.2.9).
    #[error("its first address {0} is not link-local")]
    NotLinkLocal(Ipv6Addr),
    /// Neither a known peer nor with an address of ours.
    #[error("its sender is unknown and lists none of our addresses")]
    Foreign,
    /// It carries our own source address: a loop on the LAN, or a duplicate address.
    #[error("its sender has our own address")]
    Own,
}

impl Refusal {
    /// The name of the counter.
    pub fn kind(self) -> &'static str {
        match self {
            Self::Malformed => "malformed",
            Self::HopLimit(_) => "ttl",
            Self::Destination(_) => "destination",
            Self::Version(_) => "version",
            Self::Type(_) => "type",
            Self::Length(_) => "length",
            Self::Checksum => "checksum",
            Self::Vrid(_) => "vrid",
            Self::Count => "count",
            Self::Interval => "interval",
            Self::NotLinkLocal(_) => "link-local",
            Self::Foreign => "foreign",
            Self::Own => "own",
        }
    }
}

impl Advert {
    /// The bytes after the IP header. The checksum covers `source` and `destination` where its form says so.
    pub fn encode(&self, source: IpAddr, destination: IpAddr, checksum: Checksum) -> Vec<u8> {
        let count = u8::try_from(self.addresses.len()).unwrap_or(u8::MAX);
        let mut bytes = Vec::with_capacity(HEADER + 16 * usize::from(count));
        bytes.extend([VERSION << 4 | ADVERTISEMENT, self.vrid, self.priority, count]);
        bytes.extend(self.interval.min(timers::MAX_CENTISECONDS).to_be_bytes());
        bytes.extend([0, 0]);
        for address in self.addresses.iter().take(count.into()) {
            match address {
                IpAddr::V4(address) => bytes.extend(address.octets()),
                IpAddr::V6(address) => bytes.extend(address.octets()),
            }
        }
        let sum = match checksum {
            Checksum::Plain if source.is_ipv4() => ones_complement(0, &bytes),
            _ => ones_complement(pseudo_header(source, destination, bytes.len()), &bytes),
        };
        bytes[6..8].copy_from_slice(&(!sum).to_be_bytes());
        bytes
    }
}

/// Reads the bytes after the IP header, checked in the order of RFC 9568 section 7.1.
///
/// # Errors
/// The first check that fails.
pub fn decode(bytes: &[u8], context: &Context) -> Result<Advert, Refusal> {
    if context.hop_limit != HOP_LIMIT {
        return Err(Refusal::HopLimit(context.hop_limit));
    }
    let family = Family::of(context.source);
    if context.destination != group(family) && Some(context.destination) != context.local {
        return Err(Refusal::Destination(context.destination));
    }
    let [first, vrid, priority, count, high, low, _, _, list @ ..] = bytes else {
        return Err(Refusal::Length(bytes.len()));
    };
    if first >> 4 != VERSION {
        return Err(Refusal::Version(first >> 4));
    }
    if first & 0xf != ADVERTISEMENT {
        return Err(Refusal::Type(first & 0xf));
    }
    let size = match family {
        Family::V4 => 4,
        Family::V6 => 16,
    };
    if list.len() != usize::from(*count) * size {
        return Err(Refusal::Length(bytes.len()));
    }
    if !intact(bytes, context) {
        return Err(Refusal::Checksum);
    }
    if *vrid == 0 {
        return Err(Refusal::Vrid(0));
    }
    if *count == 0 {
        return Err(Refusal::Count);
    }
    // The upper four bits are reserved and ignored (section 5.2.6).
    let interval = u16::from_be_bytes([*high, *low]) & timers::MAX_CENTISECONDS;
    if interval == 0 {
        return Err(Refusal::Interval);
    }
    let addresses: Vec<IpAddr> = list.chunks_exact(size).map(address).collect();
    if let Some(IpAddr::V6(first)) = addresses.first()
        && !first.is_unicast_link_local()
    {
        return Err(Refusal::NotLinkLocal(*first));
    }
    Ok(Advert { vrid: *vrid, priority: *priority, interval, addresses })
}

/// An address of 4 or 16 bytes.
fn address(bytes: &[u8]) -> IpAddr {
    match <[u8; 4]>::try_from(bytes) {
        Ok(octets) => IpAddr::from(octets),
        Err(_) => IpAddr::from(<[u8; 16]>::try_from(bytes).unwrap_or_default()),
    }
}

fn intact(bytes: &[u8], context: &Context) -> bool {
    let whole = 0xffff;
    let with_header =
        || ones_complement(pseudo_header(context.source, context.destination, bytes.len()), bytes) == whole;
    let plain = || ones_complement(0, bytes) == whole;
    match (context.source, context.checksum) {
        (IpAddr::V6(_), _) | (_, Some(Checksum::PseudoHeader)) => with_header(),
        (_, Some(Checksum::Plain)) => plain(),
        (_, None) => with_header() || plain(),
    }
}

/// The sum over the pseudo-header (RFC 768 for IPv4, RFC 8200 section 8.1 for IPv6).
fn pseudo_header(source: IpAddr, destination: IpAddr, length: usize) -> u32 {
    let mut bytes = Vec::with_capacity(40);
    for address in [source, destination] {
        match address {
            IpAddr::V4(address) => bytes.extend(address.octets()),
            IpAddr::V6(address) => bytes.extend(address.octets()),
        }
    }
    bytes.extend(u32::try_from(length).unwrap_or(u32::MAX).to_be_bytes());
    bytes.extend([0, 0, 0, PROTOCOL]);
    u32::from(ones_complement(0, &bytes))
}

/// The one's complement sum of 16-bit words (RFC 1071), starting from another sum.
pub fn ones_complement(start: u32, bytes: &[u8]) -> u16 {
    let mut sum = u64::from(start);
    for word in bytes.chunks(2) {
        sum += u64::from(u16::from_be_bytes([word[0], word.get(1).copied().unwrap_or(0)]));
    }
    while sum > 0xffff {
        sum = (sum & 0xffff) + (sum >> 16);
    }
    sum as u16
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn bytes(hex: &str) -> Vec<u8> {
        (0..hex.len()).step_by(2).map(|i| u8::from_str_radix(&hex[i..i + 2], 16).unwrap()).collect()
    }

    fn v4() -> Context {
        Context {
            source: "10.9.0.1".parse().unwrap(),
            destination: group(Family::V4),
            local: None,
            hop_limit: 255,
            checksum: None,
        }
    }

    fn v6() -> Context {
        Context { source: "fe80::1".parse().unwrap(), destination: group(Family::V6), ..v4() }
    }

    fn advert() -> Advert {
        Advert { vrid: 7, priority: 100, interval: 100, addresses: vec!["10.9.0.100".parse().unwrap()] }
    }

    const PLAIN: &str = "31076401006460260a090064";
    const PSEUDO: &str = "310764010064758d0a090064";
    const IPV6: &str = "3107640200643e29fe80000000000000000000000000010020010db8000000000000000000000100";

    /// The golden bytes with some of them changed and the plain checksum made right again.
    fn altered(changes: &[(usize, u8)], length: usize) -> Vec<u8> {
        let mut bytes = bytes(PLAIN);
        bytes.resize(length, 0);
        for (index, value) in changes {
            bytes[*index] = *value;
        }
        bytes[6..8].fill(0);
        let sum = !ones_complement(0, &bytes);
        bytes[6..8].copy_from_slice(&sum.to_be_bytes());
        bytes
    }

    #[test]
    fn case_1_golden_vectors() {
        let context = v4();
        let encode = |form| advert().encode(context.source, context.destination, form);
        assert_eq!(encode(Checksum::Plain), bytes(PLAIN));
        assert_eq!(encode(Checksum::PseudoHeader), bytes(PSEUDO));
        assert_eq!(decode(&bytes(PLAIN), &context), Ok(advert()));
        assert_eq!(decode(&bytes(PSEUDO), &context), Ok(advert()));
        let six = Advert {
            addresses: vec!["fe80::100".parse().unwrap(), "2001:db8::100".parse().unwrap()],
            ..advert()
        };
        assert_eq!(six.encode(v6().source, v6().destination, Checksum::Plain), bytes(IPV6));
        assert_eq!(decode(&bytes(IPV6), &v6()), Ok(six));
    }

    #[test]
    fn case_2_every_flipped_bit_of_the_payload_is_seen() {
        for bit in 8 * 8..12 * 8 {
            let mut bytes = bytes(PSEUDO);
            bytes[bit / 8] ^= 1 << (bit % 8);
            assert_eq!(decode(&bytes, &v4()), Err(Refusal::Checksum), "bit {bit}");
        }
    }

    #[test]
    fn case_3_strict_checksums() {
        let strict = |form| Context { checksum: Some(form), ..v4() };
        assert!(decode(&bytes(PLAIN), &strict(Checksum::Plain)).is_ok());
        assert!(decode(&bytes(PSEUDO), &strict(Checksum::PseudoHeader)).is_ok());
        assert_eq!(decode(&bytes(PSEUDO), &strict(Checksum::Plain)), Err(Refusal::Checksum));
        assert_eq!(decode(&bytes(PLAIN), &strict(Checksum::PseudoHeader)), Err(Refusal::Checksum));
    }

    #[test]
    fn cases_4_to_9_refusals() {
        let global = "2001:db8::1".parse::<Ipv6Addr>().unwrap();
        let wrong = Advert { addresses: vec![global.into()], ..advert() };
        let wrong = wrong.encode(v6().source, v6().destination, Checksum::PseudoHeader);
        let unicast: IpAddr = "10.9.0.2".parse().unwrap();
        let rows: [(&str, Vec<u8>, Context, Refusal); 13] = [
            ("4 TTL", bytes(PLAIN), Context { hop_limit: 254, ..v4() }, Refusal::HopLimit(254)),
            ("4 hop limit", bytes(IPV6), Context { hop_limit: 1, ..v6() }, Refusal::HopLimit(1)),
            (
                "destination",
                bytes(PLAIN),
                Context { destination: unicast, ..v4() },
                Refusal::Destination(unicast),
            ),
            ("5 version", altered(&[(0, 0x21)], 12), v4(), Refusal::Version(2)),
            ("5 type", altered(&[(0, 0x32)], 12), v4(), Refusal::Type(2)),
            ("6 seven bytes", bytes(PLAIN)[..7].to_vec(), v4(), Refusal::Length(7)),
            ("6 list cut short", altered(&[], 11), v4(), Refusal::Length(11)),
            ("6 bytes left over", altered(&[], 16), v4(), Refusal::Length(16)),
            ("7 count 0", altered(&[(3, 0)], 8), v4(), Refusal::Count),
            ("7 interval 0", altered(&[(5, 0)], 12), v4(), Refusal::Interval),
            ("7 reserved bits are no interval", altered(&[(4, 0xf0), (5, 0)], 12), v4(), Refusal::Interval),
            ("VRID 0", altered(&[(1, 0)], 12), v4(), Refusal::Vrid(0)),
            ("9 global first", wrong, v6(), Refusal::NotLinkLocal(global)),
        ];
        for (name, bytes, context, refusal) in rows {
            assert_eq!(decode(&bytes, &context), Err(refusal), "{name}");
        }
    }

    #[test]
    fn unicast_is_for_us_or_for_nobody() {
        let [ours, other]: [IpAddr; 2] = ["10.9.0.2", "10.9.0.3"].map(|address| address.parse().unwrap());
        for form in [Checksum::Plain, Checksum::PseudoHeader] {
            let bytes = advert().encode(v4().source, ours, form);
            let unicast = Context { destination: ours, local: Some(ours), ..v4() };
            assert_eq!(decode(&bytes, &unicast), Ok(advert()));
            let elsewhere = Context { local: Some(other), ..unicast };
            assert_eq!(decode(&bytes, &elsewhere), Err(Refusal::Destination(ours)));
        }
        assert_eq!(decode(&bytes(PSEUDO), &Context { local: Some(ours), ..v4() }), Ok(advert()));
    }

    #[test]
    fn case_8_reserved_bits_are_ignored() {
        assert_eq!(decode(&altered(&[(4, 0xf0)], 12), &v4()), Ok(advert()));
    }

    #[test]
    fn each_refusal_has_its_own_counter() {
        let any = IpAddr::V4(Ipv4Addr::UNSPECIFIED);
        let all = [
            Refusal::HopLimit(1),
            Refusal::Destination(any),
            Refusal::Version(2),
            Refusal::Type(2),
            Refusal::Length(1),
            Refusal::Checksum,
            Refusal::Vrid(0),
            Refusal::Count,
            Refusal::Interval,
            Refusal::NotLinkLocal(Ipv6Addr::UNSPECIFIED),
            Refusal::Foreign,
            Refusal::Own,
        ];
        let kinds: std::collections::BTreeSet<_> = all.iter().map(|refusal| refusal.kind()).collect();
        assert_eq!(kinds.len(), all.len());
    }

    /// Bytes from nowhere, and valid advertisements with some bytes changed or cut off; over IPv6 or not.
    fn wire() -> impl Strategy<Value = (Vec<u8>, bool)> {
        let whole = [PLAIN, PSEUDO, IPV6].map(bytes);
        let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..4);
        let near = (0..3_usize, changes, 0..44_usize, any::<bool>()).prop_map(
            move |(kind, changes, length, right)| {
                let mut bytes = whole[kind].clone();
                for (index, value) in changes {
                    let index = index.index(bytes.len());
                    bytes[index] = value;
                }
                bytes.truncate(length);
                let six = kind == 2;
                // With the checksum made right again, what comes after it is reached.
                if right && bytes.len() >= HEADER {
                    let context = if six { v6() } else { v4() };
                    let start = pseudo_header(context.source, context.destination, bytes.len());
                    bytes[6..8].fill(0);
                    let sum = !ones_complement(start, &bytes);
                    bytes[6..8].copy_from_slice(&sum.to_be_bytes());
                }
                (bytes, six)
            },
        );
        prop_oneof![(prop::collection::vec(any::<u8>(), 0..64), any::<bool>()), near]
    }

    proptest! {
        #[test]
        fn any_bytes_make_an_advertisement_or_a_refusal((bytes, six) in wire()) {
            let context = if six { v6() } else { v4() };
            if let Ok(advert) = decode(&bytes, &context) {
                // What was accepted says what was in the bytes, and takes no more memory than they do.
                let size = if six { 16 } else { 4 };
                prop_assert_eq!(bytes.len(), HEADER + advert.addresses.len() * size);
                prop_assert!(advert.vrid > 0 && (1..=timers::MAX_CENTISECONDS).contains(&advert.interval));
                let mut plain = bytes.clone();
                plain[4] &= 0xf;
                let again = advert.encode(context.source, context.destination, Checksum::Plain);
                prop_assert_eq!((&again[..6], &again[8..]), (&plain[..6], &plain[8..]));
            }
        }

        #[test]
        fn what_is_sent_is_read(vrid in 1u8.., priority: u8, interval in 1u16..4096, list in prop::collection::vec(any::<u32>(), 1..255), plain: bool) {
            let addresses = list.into_iter().map(|bits| IpAddr::V4(bits.into())).collect();
            let sent = Advert { vrid, priority, interval, addresses };
            let form = if plain { Checksum::Plain } else { Checksum::PseudoHeader };
            let bytes = sent.encode(v4().source, v4().destination, form);
            prop_assert_eq!(decode(&bytes, &v4()), Ok(sent));
        }
    }
}
