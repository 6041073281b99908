//! The contents of our table: its sets, chains and rules, and what the sets' elements mean.
//!
//! What belongs to one IP version is in [`IPV4`] and [`IPV6`]; every rule exists once for each.

use std::collections::BTreeSet;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use vip_core::plan::{Protocol, ServiceKey};

use super::super::netlink::{Request, array, octets};
use super::codec::{self, Connection, Expression, Meta, Register};

/// Its name.
pub(super) const TABLE: &str = "kubectl-vip";

/// Changes whenever [`requests`] makes another table than before, so that an agent replaces an older one's.
const VERSION: u32 = 2;

/// A set.
#[derive(Debug)]
pub(super) struct Set {
    pub(super) name: &'static str,
    /// As `nft` numbers its types, six bits each; for it to print them.
    pub(super) key_type: u32,
    /// Bytes; each part of a key takes whole words of four.
    pub(super) key_length: u32,
    /// Its number within a transaction.
    pub(super) id: u32,
}

/// A base chain.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) name: &'static str,
    pub(super) kind: &'static str,
    /// `NF_INET_*`
    pub(super) hook: u32,
    /// `NF_IP_PRI_*`
    pub(super) priority: i32,
}

const PREROUTING: Chain = Chain { name: "prerouting", kind: "filter", hook: 0, priority: -150 };
const POSTROUTING: Chain = Chain { name: "postrouting", kind: "nat", hook: 4, priority: 100 };

/// What differs between IP versions.
#[derive(Debug)]
struct Family {
    /// `NFPROTO_*`
    nfproto: u8,
    /// The guarded addresses.
    vips: Set,
    /// The open ports.
    ports: Set,
    /// Where the destination is in the IP header, and its length in bytes.
    destination: (u32, u32),
    /// The protocol number of its ICMP.
    icmp: u8,
    original_destination: Connection,
}

// The numbers of nft's types.
const TYPE_IPV4_ADDR: u32 = 7;
const TYPE_IPV6_ADDR: u32 = 8;
const TYPE_INET_PROTO: u32 = 12;
const TYPE_INET_SERVICE: u32 = 13;

static IPV4: Family = Family {
    nfproto: 2,
    vips: Set { name: "vips", key_type: TYPE_IPV4_ADDR, key_length: 4, id: 1 },
    ports: Set { name: "ports", key_type: port_type(TYPE_IPV4_ADDR), key_length: 12, id: 2 },
    destination: (16, 4),
    icmp: 1,
    original_destination: Connection::OriginalDestination,
};

static IPV6: Family = Family {
    nfproto: 10,
    vips: Set { name: "vips6", key_type: TYPE_IPV6_ADDR, key_length: 16, id: 3 },
    ports: Set { name: "ports6", key_type: port_type(TYPE_IPV6_ADDR), key_length: 24, id: 4 },
    destination: (24, 16),
    icmp: 58,
    original_destination: Connection::OriginalDestination6,
};

static FAMILIES: [&Family; 2] = [&IPV4, &IPV6];

/// The type of `address . inet_proto . inet_service`.
const fn port_type(address: u32) -> u32 {
    address << 12 | TYPE_INET_PROTO << 6 | TYPE_INET_SERVICE
}

/// An element of one of the sets.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Element {
    /// A guarded address.
    Vip(IpAddr),
    /// An open port.
    Port(ServiceKey),
}

impl Element {
    /// The set that it belongs to.
    pub(super) fn set(&self) -> &'static Set {
        match self {
            Self::Vip(address) => &family(*address).vips,
            Self::Port(key) => &family(key.address).ports,
        }
    }

    /// Its key's bytes.
    pub(super) fn key(&self) -> Vec<u8> {
        match self {
            Self::Vip(address) => octets(*address),
            Self::Port(key) => {
                let [high, low] = key.port.to_be_bytes();
                [octets(key.address), vec![key.protocol.number(), 0, 0, 0, high, low, 0, 0]].concat()
            }
        }
    }

    /// The element that a key of a set means.
    pub(super) fn read(set: &Set, key: &[u8]) -> Option<Self> {
        let family =
            FAMILIES.into_iter().find(|family| [family.vips.name, family.ports.name].contains(&set.name))?;
        let (_, length) = family.destination;
        let (address, rest) = key.split_at_checked(length as usize)?;
        let address = match length {
            4 => Ipv4Addr::from(array::<4>(address, 0)?).into(),
            _ => Ipv6Addr::from(array::<16>(address, 0)?).into(),
        };
        if set.name == family.vips.name {
            return Some(Self::Vip(address));
        }
        let protocol = Protocol::of(*rest.first()?)?;
        Some(Self::Port(ServiceKey { address, protocol, port: u16::from_be_bytes(array(rest, 4)?) }))
    }
}

fn family(address: IpAddr) -> &'static Family {
    match address {
        IpAddr::V4(_) => &IPV4,
        IpAddr::V6(_) => &IPV6,
    }
}

/// Guarded addresses and ledger.
pub(super) fn sort(elements: &BTreeSet<Element>) -> (BTreeSet<IpAddr>, BTreeSet<ServiceKey>) {
    let mut sorted = (BTreeSet::new(), BTreeSet::new());
    for element in elements {
        match element {
            Element::Vip(address) => sorted.0.insert(*address),
            Element::Port(key) => sorted.1.insert(*key),
        };
    }
    sorted
}

/// All sets.
pub(super) fn sets() -> impl Iterator<Item = &'static Set> {
    FAMILIES.into_iter().flat_map(|family| [&family.vips, &family.ports])
}

/// The messages that fill an empty table with sets, chains and rules.
pub(super) fn requests() -> Vec<Request> {
    let sets = sets().map(codec::new_set);
    let chains = [codec::new_chain(&PREROUTING), codec::new_chain(&POSTROUTING)];
    let rules = rules();
    let rules = rules.iter().map(|(chain, rule, comment)| codec::new_rule(chain, rule, comment));
    sets.chain(chains).chain(rules).collect()
}

/// Chain and comment of every rule, as a dump of the table shows them: chain by chain as they were made.
pub(super) fn marks() -> Vec<(String, String)> {
    rules().into_iter().map(|(chain, _, comment)| (chain.to_owned(), comment)).collect()
}

/// Chain, expressions and comment of every rule.
fn rules() -> Vec<(&'static str, Vec<Expression>, String)> {
    let mut all = Vec::new();
    let mut add = |chain: &'static Chain, rule: Vec<Expression>, comment: &str| {
        all.push((chain.name, rule, format!("{comment} (v{VERSION})")));
    };
    for family in FAMILIES {
        add(&PREROUTING, family.icmp_passes(), "ping, path MTU and neighbours work");
    }
    for family in FAMILIES {
        add(&PREROUTING, family.open_ports_pass(), "exposed ports are open");
    }
    for family in FAMILIES {
        add(&PREROUTING, family.connections_go_on(), "what was let in stays in");
    }
    for family in FAMILIES {
        add(&PREROUTING, family.tcp_is_reset(), "a virtual IP is no door to the node");
        add(&PREROUTING, family.rest_is_refused(), "a virtual IP is no door to the node");
    }
    for family in FAMILIES {
        add(&POSTROUTING, family.clients_are_masqueraded(), "answers of pods return through this node");
    }
    all
}

/// `RTN_LOCAL`
const LOCAL: u32 = 2;
/// `NF_CT_STATE_BIT(IP_CT_ESTABLISHED) | NF_CT_STATE_BIT(IP_CT_RELATED)`
const ESTABLISHED_OR_RELATED: u32 = 0x2 | 0x4;
const TCP: u8 = 6;

impl Family {
    /// Packets of this IP version with their destination in the first register.
    fn destination(&self) -> Vec<Expression> {
        let (offset, length) = self.destination;
        vec![
            codec::meta(Meta::Family, Register(0)),
            codec::equal(Register(0), &[self.nfproto]),
            codec::ip_header(offset, length, Register(0)),
        ]
    }

    /// Packets to a guarded address.
    fn to_a_vip(&self) -> Vec<Expression> {
        [self.destination(), vec![codec::lookup(&self.vips, Register(0))]].concat()
    }

    /// Packets to a guarded address that is bound here.
    fn to_a_local_vip(&self) -> Vec<Expression> {
        let local =
            vec![codec::destination_type(Register(0)), codec::equal(Register(0), &LOCAL.to_ne_bytes())];
        [self.to_a_vip(), local].concat()
    }

    /// Echo, packets too big, and of IPv6 the questions of neighbours that know the address already; those of others go to
    /// a multicast address.
    fn icmp_passes(&self) -> Vec<Expression> {
        let icmp = [
            codec::meta(Meta::Transport, Register(0)),
            codec::equal(Register(0), &[self.icmp]),
            codec::accept(),
        ];
        [self.to_a_vip(), icmp.to_vec()].concat()
    }

    fn open_ports_pass(&self) -> Vec<Expression> {
        let words = self.destination.1.div_ceil(4);
        let port = [
            codec::meta(Meta::Transport, Register(words)),
            codec::transport_header(2, 2, Register(words + 1)),
            codec::lookup(&self.ports, Register(0)),
            codec::accept(),
        ];
        [self.destination(), port.to_vec()].concat()
    }

    fn connections_go_on(&self) -> Vec<Expression> {
        let state = [
            codec::connection(Connection::State, Register(0)),
            codec::mask(Register(0), ESTABLISHED_OR_RELATED),
            codec::different(Register(0), &0u32.to_ne_bytes()),
            codec::accept(),
        ];
        [self.to_a_vip(), state.to_vec()].concat()
    }

    fn tcp_is_reset(&self) -> Vec<Expression> {
        let tcp = [
            codec::meta(Meta::Transport, Register(0)),
            codec::equal(Register(0), &[TCP]),
            codec::reject_by_reset(),
        ];
        [self.to_a_local_vip(), tcp.to_vec()].concat()
    }

    fn rest_is_refused(&self) -> Vec<Expression> {
        [self.to_a_local_vip(), vec![codec::reject_by_icmp()]].concat()
    }

    /// By where the connection was first sent to: IPVS has changed the packet's destination by now.
    fn clients_are_masqueraded(&self) -> Vec<Expression> {
        vec![
            codec::meta(Meta::Family, Register(0)),
            codec::equal(Register(0), &[self.nfproto]),
            codec::connection(Connection::Direction, Register(0)),
            codec::equal(Register(0), &[0]),
            codec::connection(self.original_destination, Register(0)),
            codec::lookup(&self.vips, Register(0)),
            codec::masquerade_fully_random(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn key() -> ServiceKey {
        ServiceKey { address: [10, 87, 2, 50].into(), protocol: Protocol::Udp, port: 8080 }
    }

    /// Its key is the address's bytes, and for a port these.
    fn key_is(key: ServiceKey, address: &[u8]) {
        let port = Element::Port(key);
        assert_eq!(port.key(), [address, &[17, 0, 0, 0, 0x1f, 0x90, 0, 0]].concat());
        let vip = Element::Vip(key.address);
        assert_eq!(vip.key(), address);
        for element in [port, vip] {
            assert_eq!(element.key().len(), element.set().key_length as usize);
            assert_eq!(Element::read(element.set(), &element.key()), Some(element));
            let request = codec::element(&element, true);
            assert_eq!(codec::elements(request.attributes.as_bytes(), element.set()), [element]);
            for short in 0..element.key().len() - 2 {
                assert_eq!(Element::read(element.set(), &element.key()[..short]), None);
            }
        }
    }

    #[test]
    fn golden_keys() {
        key_is(key(), &[10, 87, 2, 50]);
        let six = ServiceKey { address: "fd87::2:50".parse().unwrap(), ..key() };
        key_is(six, &[0xfd, 0x87, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x50]);
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
    fn rules_are_known_by_their_comments() {
        // Four sets and two chains come first.
        for (request, mark) in requests().iter().skip(6).zip(marks()) {
            assert_eq!(codec::rule_mark(request.attributes.as_bytes()), Some(mark));
        }
        assert_eq!(requests().len(), 6 + marks().len());
    }

    proptest! {
        #[test]
        fn random_bytes_are_no_trouble(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            for set in sets() {
                let _ = (Element::read(set, &bytes), codec::elements(&bytes, set));
            }
            let _ = codec::rule_mark(&bytes);
        }
    }
}
