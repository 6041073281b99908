//! The sets of our table and what their elements mean.
//!
//! A set belongs to one IP version; those of both are the same but for their names and lengths.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use ipnet::{IpNet, Ipv4Net};
use vip_core::plan::{Protocol, ServiceKey, Tables};

use super::super::netlink::{array, octets};

/// A set.
#[derive(Debug)]
pub(super) struct Set {
    pub(super) name: &'static str,
    /// As `nft` numbers its types, six bits each; for it to print them.
    pub(super) key_type: u32,
    /// The parts of a key in bytes; each takes whole words of four.
    pub(super) parts: &'static [u32],
    /// Whether an element is all that is between two keys.
    pub(super) ranges: bool,
    /// Its number within a transaction.
    pub(super) id: u32,
    means: Means,
}

impl Set {
    /// The length of a key in bytes.
    pub(super) fn key_length(&self) -> u32 {
        self.parts.iter().map(|part| part.next_multiple_of(4)).sum()
    }
}

/// What an element of a set says.
#[derive(Clone, Copy, Debug)]
enum Means {
    Vip,
    Port,
    Limited(Limit),
    Range(Limit),
}

/// What is said of some clients of a service only.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Limit {
    /// Who is masqueraded.
    Direct,
    /// Who may connect.
    Restricted,
}

/// The sets of one IP version.
#[derive(Debug)]
pub(super) struct Sets {
    /// The guarded addresses.
    pub(super) vips: Set,
    /// The open ports.
    pub(super) ports: Set,
    /// Services whose clients are not masqueraded.
    pub(super) direct: Set,
    /// Clients of these that are masqueraded all the same.
    pub(super) near: Set,
    /// Services that not everybody may connect to.
    pub(super) restricted: Set,
    /// Who may.
    pub(super) sources: Set,
}

// The numbers of nft's types.
const TYPE_IPV4_ADDR: u32 = 7;
const TYPE_IPV6_ADDR: u32 = 8;
const TYPE_INET_PROTO: u32 = 12;
const TYPE_INET_SERVICE: u32 = 13;

/// The type of `address . inet_proto . inet_service`.
const fn port_type(address: u32) -> u32 {
    address << 12 | TYPE_INET_PROTO << 6 | TYPE_INET_SERVICE
}

/// The type of that with an address behind it.
const fn range_type(address: u32) -> u32 {
    port_type(address) << 6 | address
}

impl Sets {
    /// Sets for addresses of a type, of so many parts; numbered from `first`.
    const fn new(
        names: [&'static str; 6],
        address: u32,
        [vip, port, range]: [&'static [u32]; 3],
        first: u32,
    ) -> Self {
        const fn set(name: &'static str, key_type: u32, parts: &'static [u32], id: u32, means: Means) -> Set {
            Set { name, key_type, parts, ranges: matches!(means, Means::Range(_)), id, means }
        }
        let (to, from) = (port_type(address), range_type(address));
        let [vips, ports, direct, near, restricted, sources] = names;
        Self {
            vips: set(vips, address, vip, first, Means::Vip),
            ports: set(ports, to, port, first + 1, Means::Port),
            direct: set(direct, to, port, first + 2, Means::Limited(Limit::Direct)),
            near: set(near, from, range, first + 3, Means::Range(Limit::Direct)),
            restricted: set(restricted, to, port, first + 4, Means::Limited(Limit::Restricted)),
            sources: set(sources, from, range, first + 5, Means::Range(Limit::Restricted)),
        }
    }

    fn all(&self) -> [&Set; 6] {
        [&self.vips, &self.ports, &self.direct, &self.near, &self.restricted, &self.sources]
    }
}

pub(super) static SETS4: Sets = Sets::new(
    ["vips", "ports", "direct", "near", "restricted", "sources"],
    TYPE_IPV4_ADDR,
    [&[4], &[4, 1, 2], &[4, 1, 2, 4]],
    1,
);

pub(super) static SETS6: Sets = Sets::new(
    ["vips6", "ports6", "direct6", "near6", "restricted6", "sources6"],
    TYPE_IPV6_ADDR,
    [&[16], &[16, 1, 2], &[16, 1, 2, 16]],
    7,
);

/// All sets.
pub(super) fn sets() -> impl Iterator<Item = &'static Set> {
    [&SETS4, &SETS6].into_iter().flat_map(Sets::all)
}

/// An element of one of the sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Element {
    /// A guarded address.
    Vip(IpAddr),
    /// An open port.
    Port(ServiceKey),
    /// A service of which something is said of some clients only.
    Limited(Limit, ServiceKey),
    /// These clients.
    Range(Limit, ServiceKey, IpNet),
}

impl Element {
    /// The service that it says something of.
    pub(super) fn service(&self) -> Option<&ServiceKey> {
        match self {
            Self::Vip(_) => None,
            Self::Port(key) | Self::Limited(_, key) | Self::Range(_, key, _) => Some(key),
        }
    }

    /// The set that it belongs to.
    pub(super) fn set(&self) -> &'static Set {
        let address = match self {
            Self::Vip(address) => *address,
            Self::Port(key) | Self::Limited(_, key) | Self::Range(_, key, _) => key.address,
        };
        let sets = if address.is_ipv4() { &SETS4 } else { &SETS6 };
        match self {
            Self::Vip(_) => &sets.vips,
            Self::Port(_) => &sets.ports,
            Self::Limited(Limit::Direct, _) => &sets.direct,
            Self::Limited(Limit::Restricted, _) => &sets.restricted,
            Self::Range(Limit::Direct, ..) => &sets.near,
            Self::Range(Limit::Restricted, ..) => &sets.sources,
        }
    }

    /// Its key's bytes; of a range, those of its first address.
    pub(super) fn key(&self) -> Vec<u8> {
        match self {
            Self::Vip(address) => octets(*address),
            Self::Port(key) | Self::Limited(_, key) => port(key),
            Self::Range(_, key, net) => [port(key), octets(net.network())].concat(),
        }
    }

    /// The key of a range's last address.
    pub(super) fn end(&self) -> Option<Vec<u8>> {
        match self {
            Self::Range(_, key, net) => Some([port(key), octets(net.broadcast())].concat()),
            _ => None,
        }
    }

    /// The element that a key of a set means; of a range, its first and last key.
    pub(super) fn read(set: &Set, key: &[u8], end: Option<&[u8]>) -> Option<Self> {
        let length = *set.parts.first()? as usize;
        let (first, rest) = key.split_at_checked(length)?;
        let address = address(first, length)?;
        if let Means::Vip = set.means {
            return Some(Self::Vip(address));
        }
        let (port, rest) = rest.split_at_checked(8)?;
        let protocol = Protocol::of(*port.first()?)?;
        let service = ServiceKey { address, protocol, port: u16::from_be_bytes(array(port, 4)?) };
        match set.means {
            Means::Vip | Means::Port => Some(Self::Port(service)),
            Means::Limited(limit) => Some(Self::Limited(limit, service)),
            Means::Range(limit) => {
                let (same, last) = end.unwrap_or(key).split_at_checked(length + 8)?;
                let net = net(self::address(rest, length)?, self::address(last, length)?)?;
                key.starts_with(same).then_some(Self::Range(limit, service, net))
            }
        }
    }

    /// The ranges of a service among elements.
    pub(super) fn ranges_of(
        elements: &BTreeSet<Self>,
        limit: Limit,
        key: ServiceKey,
    ) -> impl Iterator<Item = IpNet> {
        // The first of all networks.
        let from = Self::Range(limit, key, Ipv4Net::default().into());
        elements.range(from..).map_while(move |element| match element {
            Self::Range(of, service, net) if (*of, *service) == (limit, key) => Some(*net),
            _ => None,
        })
    }
}

/// The bytes of a service's key: each part is padded to whole words.
fn port(key: &ServiceKey) -> Vec<u8> {
    let [high, low] = key.port.to_be_bytes();
    [octets(key.address), vec![key.protocol.number(), 0, 0, 0, high, low, 0, 0]].concat()
}

fn address(bytes: &[u8], length: usize) -> Option<IpAddr> {
    Some(match length {
        4 => Ipv4Addr::from(array::<4>(bytes, 0)?).into(),
        _ => Ipv6Addr::from(array::<16>(bytes, 0)?).into(),
    })
}

/// The network that has these as its first and last address. Ours are networks; a range that is none is somebody else's.
fn net(first: IpAddr, last: IpAddr) -> Option<IpNet> {
    let differ = octets(first).into_iter().zip(octets(last)).map(|(a, b)| a ^ b);
    let same = differ.fold((0, true), |(bits, all), byte| match all {
        true => (bits + byte.leading_zeros(), byte == 0),
        false => (bits, false),
    });
    let net = IpNet::new(first, u8::try_from(same.0).ok()?).ok()?;
    (net.network() == first && net.broadcast() == last).then_some(net)
}

/// What elements say, as tables without services.
pub(super) fn sort(elements: &BTreeSet<Element>) -> Tables {
    let mut tables = Tables::default();
    for element in elements {
        match element {
            Element::Vip(address) => {
                tables.guarded.insert(*address);
            }
            Element::Port(key) => {
                tables.ledger.insert(*key);
            }
            Element::Limited(limit, key) => {
                let of = match limit {
                    Limit::Direct => &mut tables.direct,
                    Limit::Restricted => &mut tables.sources,
                };
                of.insert(*key, Element::ranges_of(elements, *limit, *key).collect());
            }
            // Said with its service. Without it, it has no effect.
            Element::Range(..) => {}
        }
    }
    tables
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::codec;
    use super::*;

    fn key() -> ServiceKey {
        ServiceKey { address: [10, 87, 2, 50].into(), protocol: Protocol::Sctp, port: 8080 }
    }

    const PORT: [u8; 8] = [132, 0, 0, 0, 0x1f, 0x90, 0, 0];

    /// Its key is the address's bytes, and for a port these; for a range the first address follows.
    fn key_is(key: ServiceKey, address: &[u8], net: &str, bounds: [&[u8]; 2]) {
        let port = [address, &PORT].concat();
        let mut known = vec![(Element::Vip(key.address), address.to_vec(), None)];
        known.push((Element::Port(key), port.clone(), None));
        for limit in [Limit::Direct, Limit::Restricted] {
            known.push((Element::Limited(limit, key), port.clone(), None));
            let [first, last] = bounds.map(|bound| [port.as_slice(), bound].concat());
            known.push((Element::Range(limit, key, net.parse().unwrap()), first, Some(last)));
        }
        for (element, first, last) in known {
            assert_eq!((element.key(), element.end()), (first.clone(), last.clone()));
            assert_eq!(first.len(), element.set().key_length() as usize);
            assert_eq!(Element::read(element.set(), &first, last.as_deref()), Some(element));
            let request = codec::element(&element, true);
            assert_eq!(codec::elements(request.attributes.as_bytes(), element.set()), [element]);
            for short in 0..first.len() - 2 {
                assert_eq!(Element::read(element.set(), &first[..short], last.as_deref()), None);
            }
        }
    }

    #[test]
    fn golden_keys() {
        key_is(key(), &[10, 87, 2, 50], "192.0.2.128/25", [&[192, 0, 2, 128], &[192, 0, 2, 255]]);
        key_is(key(), &[10, 87, 2, 50], "0.0.0.0/0", [&[0; 4], &[255; 4]]);
        let six = ServiceKey { address: "fd87::2:50".parse().unwrap(), ..key() };
        let address = [0xfd, 0x87, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x50];
        key_is(six, &address, "fd87::2:50/128", [&address, &address]);
        key_is(six, &address, "::/0", [&[0; 16], &[255; 16]]);
    }

    #[test]
    fn a_range_that_is_no_network_is_not_ours() {
        let key = |last: &[u8]| [&[10, 87, 2, 50], &PORT[..], last].concat();
        let read = |first: &[u8], last: &[u8]| Element::read(&SETS4.sources, &key(first), Some(&key(last)));
        assert!(read(&[10, 0, 0, 0], &[10, 0, 0, 255]).is_some());
        for (first, last) in [
            ([10, 0, 0, 1], [10, 0, 0, 255]),
            ([10, 0, 0, 0], [10, 0, 0, 254]),
            ([10, 0, 1, 0], [10, 0, 0, 0]),
        ] {
            assert_eq!(read(&first, &last), None);
        }
        let other = [&[10, 87, 2, 51], &PORT[..], &[10, 0, 0, 0]].concat();
        assert_eq!(Element::read(&SETS4.sources, &key(&[10, 0, 0, 0]), Some(&other)), None);
        // One address may come without an end.
        assert!(Element::read(&SETS4.sources, &key(&[10, 0, 0, 0]), None).is_some());
    }

    #[test]
    fn golden_element() {
        let request = codec::element(&Element::Vip(key().address), true);
        assert_eq!(request.kind, 0xa0c);
        #[rustfmt::skip]
        let bytes = [
            16, 0, 1, 0, b'k', b'u', b'b', b'e', b'c', b't', b'l', b'-', b'v', b'i', b'p', 0,
            9, 0, 2, 0, b'v', b'i', b'p', b's', 0, 0, 0, 0,
            20, 0, 3, 0x80, 16, 0, 1, 0x80, 12, 0, 1, 0x80, 8, 0, 1, 0, 10, 87, 2, 50,
        ];
        assert_eq!(request.attributes.as_bytes(), bytes);
    }

    #[test]
    fn golden_range_and_its_set() {
        let net = "192.0.2.0/24".parse().unwrap();
        let request = codec::element(&Element::Range(Limit::Restricted, key(), net), false);
        assert_eq!(request.kind, 0xa0e);
        #[rustfmt::skip]
        let bytes = [
            16, 0, 1, 0, b'k', b'u', b'b', b'e', b'c', b't', b'l', b'-', b'v', b'i', b'p', 0,
            12, 0, 2, 0, b's', b'o', b'u', b'r', b'c', b'e', b's', 0,
            56, 0, 3, 0x80, 52, 0, 1, 0x80,
            24, 0, 1, 0x80, 20, 0, 1, 0, 10, 87, 2, 50, 132, 0, 0, 0, 0x1f, 0x90, 0, 0, 192, 0, 2, 0,
            24, 0, 10, 0x80, 20, 0, 1, 0, 10, 87, 2, 50, 132, 0, 0, 0, 0x1f, 0x90, 0, 0, 192, 0, 2, 255,
        ];
        assert_eq!(request.attributes.as_bytes(), bytes);
        #[rustfmt::skip]
        let bytes = [
            16, 0, 1, 0, b'k', b'u', b'b', b'e', b'c', b't', b'l', b'-', b'v', b'i', b'p', 0,
            12, 0, 2, 0, b's', b'o', b'u', b'r', b'c', b'e', b's', 0,
            8, 0, 4, 0, 0, 0x1c, 0xc3, 0x47, 8, 0, 5, 0, 0, 0, 0, 16, 8, 0, 10, 0, 0, 0, 0, 6,
            // An interval of concatenated parts, and the bytes that each takes.
            8, 0, 3, 0, 0, 0, 0, 0x84, 56, 0, 9, 0x80, 52, 0, 2, 0x80,
            12, 0, 1, 0x80, 8, 0, 1, 0, 0, 0, 0, 4, 12, 0, 1, 0x80, 8, 0, 1, 0, 0, 0, 0, 1,
            12, 0, 1, 0x80, 8, 0, 1, 0, 0, 0, 0, 2, 12, 0, 1, 0x80, 8, 0, 1, 0, 0, 0, 0, 4,
        ];
        assert_eq!(codec::new_set(&SETS4.sources).attributes.as_bytes(), bytes);
    }

    #[test]
    fn only_what_is_said_of_a_service_counts() {
        let net = |text: &str| text.parse::<IpNet>().unwrap();
        let other = ServiceKey { port: 1, ..key() };
        let range = |key, text| Element::Range(Limit::Restricted, key, net(text));
        let elements = BTreeSet::from([
            Element::Limited(Limit::Restricted, key()),
            range(key(), "0.0.0.0/8"),
            range(key(), "192.0.2.0/24"),
            range(other, "10.0.0.0/8"),
            Element::Range(Limit::Direct, key(), net("10.0.0.0/8")),
        ]);
        let sources = [(key(), [net("0.0.0.0/8"), net("192.0.2.0/24")].into())].into();
        assert_eq!(sort(&elements), Tables { sources, ..Tables::default() });
    }

    proptest! {
        #[test]
        fn random_bytes_are_no_trouble(bytes in prop::collection::vec(any::<u8>(), 0..200), at in 0..200usize) {
            let (key, end) = bytes.split_at(at.min(bytes.len()));
            for set in sets() {
                let _ = (Element::read(set, key, Some(end)), codec::elements(&bytes, set));
            }
        }
    }
}
