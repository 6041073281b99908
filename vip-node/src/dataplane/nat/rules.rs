//! The chains and rules of our table.
//!
//! What belongs to one IP version is in [`IPV4`] and [`IPV6`]; every rule exists once for each.

use super::super::netlink::Request;
use super::codec::{self, Connection, Expression, Meta, Register};
use super::sets::{SETS4, SETS6, Set, Sets, sets};

/// Its name.
pub(super) const TABLE: &str = "kubectl-vip";

/// Changes whenever [`requests`] makes another table than before, so that an agent replaces an older one's.
const VERSION: u32 = 4;

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
const OUTPUT: Chain = Chain { name: "output", kind: "filter", hook: 3, priority: -150 };
const POSTROUTING: Chain = Chain { name: "postrouting", kind: "nat", hook: 4, priority: 100 };

/// What differs between IP versions.
#[derive(Debug)]
struct Family {
    /// `NFPROTO_*`
    nfproto: u8,
    sets: &'static Sets,
    /// Where source and destination are in the IP header, and the length of an address in bytes.
    source: u32,
    destination: u32,
    length: u32,
    /// The protocol number of its ICMP.
    icmp: u8,
    original_destination: Connection,
}

static IPV4: Family = Family {
    nfproto: 2,
    sets: &SETS4,
    source: 12,
    destination: 16,
    length: 4,
    icmp: 1,
    original_destination: Connection::OriginalDestination,
};

static IPV6: Family = Family {
    nfproto: 10,
    sets: &SETS6,
    source: 8,
    destination: 24,
    length: 16,
    icmp: 58,
    original_destination: Connection::OriginalDestination6,
};

static FAMILIES: [&Family; 2] = [&IPV4, &IPV6];

/// The messages that fill an empty table with sets, chains and rules.
pub(super) fn requests() -> Vec<Request> {
    let sets = sets().map(codec::new_set);
    let chains = [&PREROUTING, &OUTPUT, &POSTROUTING].map(codec::new_chain);
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
        add(&PREROUTING, family.allowed_clients_pass(), "exposed to some");
    }
    for family in FAMILIES {
        add(&PREROUTING, family.connections_go_on(), "what was let in stays in");
    }
    for family in FAMILIES {
        for rule in refused(&family.to_a_local_vip()) {
            add(&PREROUTING, rule, "a virtual IP is no door to the node");
        }
    }
    for family in FAMILIES {
        for rule in refused(&family.to_others_only()) {
            add(&OUTPUT, rule, "exposed to some");
        }
        for rule in refused(&family.to_a_shut_port()) {
            add(&OUTPUT, rule, "a virtual IP is no door to the node");
        }
    }
    for family in FAMILIES {
        add(&POSTROUTING, family.some_are_not_masqueraded(), "answers of this node's pods return through it");
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

/// Two rules: what begins like this is refused, TCP by a reset.
fn refused(packets: &[Expression]) -> [Vec<Expression>; 2] {
    let tcp = [
        codec::meta(Meta::Transport, Register(0)),
        codec::equal(Register(0), &[TCP]),
        codec::reject_by_reset(),
    ];
    [[packets, &tcp].concat(), [packets, &[codec::reject_by_icmp()]].concat()]
}

/// Packets of connections that are not known yet.
fn new() -> [Expression; 3] {
    [
        codec::connection(Connection::State, Register(0)),
        codec::mask(Register(0), ESTABLISHED_OR_RELATED),
        codec::equal(Register(0), &0u32.to_ne_bytes()),
    ]
}

impl Family {
    /// Packets of this IP version.
    fn packets(&self) -> Vec<Expression> {
        vec![codec::meta(Meta::Family, Register(0)), codec::equal(Register(0), &[self.nfproto])]
    }

    /// Packets of this IP version with their destination in the first register.
    fn destination(&self) -> Vec<Expression> {
        let destination = codec::ip_header(self.destination, self.length, Register(0));
        [self.packets(), vec![destination]].concat()
    }

    /// Packets to a guarded address.
    fn to_a_vip(&self) -> Vec<Expression> {
        [self.destination(), vec![codec::lookup(&self.sets.vips, Register(0))]].concat()
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

    /// The register behind `address . protocol . port`.
    fn behind_the_port(&self) -> Register {
        Register(self.length.div_ceil(4) + 2)
    }

    /// `address . protocol . port` of a packet's destination from the first register on.
    fn service(&self) -> Vec<Expression> {
        let words = self.length.div_ceil(4);
        let port = vec![
            codec::meta(Meta::Transport, Register(words)),
            codec::transport_header(2, 2, Register(words + 1)),
        ];
        [self.destination(), port].concat()
    }

    /// Packets to an open port, with `address . protocol . port` from the first register on.
    fn to_a_port(&self) -> Vec<Expression> {
        [self.service(), vec![codec::lookup(&self.sets.ports, Register(0))]].concat()
    }

    /// The source of a packet behind what its service is known by, in a set or in none of its ranges.
    fn source_is(&self, set: &Set, inside: bool) -> [Expression; 2] {
        let lookup = if inside { codec::lookup } else { codec::lookup_none };
        [codec::ip_header(self.source, self.length, self.behind_the_port()), lookup(set, Register(0))]
    }

    fn open_ports_pass(&self) -> Vec<Expression> {
        let to_all = [codec::lookup_none(&self.sets.restricted, Register(0)), codec::accept()];
        [self.to_a_port(), to_all.to_vec()].concat()
    }

    /// Ranges of a service that is restricted no longer, should there be any, do no harm.
    fn allowed_clients_pass(&self) -> Vec<Expression> {
        let from = self.source_is(&self.sets.sources, true).to_vec();
        [self.to_a_port(), from, vec![codec::accept()]].concat()
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

    /// New connections to a service whose clients have to be others. What the node itself sends never passes the other
    /// chain: IPVS balances it on its way out.
    fn to_others_only(&self) -> Vec<Expression> {
        let restricted = vec![codec::lookup(&self.sets.restricted, Register(0))];
        let from = self.source_is(&self.sets.sources, false).to_vec();
        [self.to_a_port(), restricted, from, new().to_vec()].concat()
    }

    /// New connections of the node itself to a port of a bound address that is not open. Most of them would pass the other chain
    /// too, but kube-proxy in iptables mode sends those to a NodePort elsewhere on their way out.
    fn to_a_shut_port(&self) -> Vec<Expression> {
        let no_icmp =
            vec![codec::meta(Meta::Transport, Register(0)), codec::different(Register(0), &[self.icmp])];
        let shut = vec![codec::lookup_none(&self.sets.ports, Register(0))];
        [self.to_a_local_vip(), no_icmp, self.service(), shut, new().to_vec()].concat()
    }

    /// Packets of this IP version on their way to a server, with where the connection was first sent to in the first
    /// register: IPVS has changed the packet's destination by now.
    fn first_sent_to(&self) -> Vec<Expression> {
        let original = vec![
            codec::connection(Connection::Direction, Register(0)),
            codec::equal(Register(0), &[0]),
            codec::connection(self.original_destination, Register(0)),
        ];
        [self.packets(), original].concat()
    }

    fn some_are_not_masqueraded(&self) -> Vec<Expression> {
        let words = self.length.div_ceil(4);
        let service = vec![
            codec::meta(Meta::Transport, Register(words)),
            codec::connection(Connection::OriginalPort, Register(words + 1)),
            codec::lookup(&self.sets.direct, Register(0)),
        ];
        let from = self.source_is(&self.sets.near, false).to_vec();
        [self.first_sent_to(), service, from, vec![codec::accept()]].concat()
    }

    fn clients_are_masqueraded(&self) -> Vec<Expression> {
        let all = [codec::lookup(&self.sets.vips, Register(0)), codec::masquerade_fully_random()];
        [self.first_sent_to(), all.to_vec()].concat()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rules_are_known_by_their_comments() {
        // Sets and chains come first.
        let before = sets().count() + 3;
        for (request, mark) in requests().iter().skip(before).zip(marks()) {
            assert_eq!(codec::rule_mark(request.attributes.as_bytes()), Some(mark));
        }
        assert_eq!(requests().len(), before + marks().len());
    }
}
