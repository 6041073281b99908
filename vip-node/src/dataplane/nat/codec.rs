//! nftables messages in bytes. Numbers, names and meanings are those of `linux/netfilter/nfnetlink.h` and
//! `linux/netfilter/nf_tables.h`.

use super::super::netlink::{Attributes, Request, array, attribute, attributes, text};
use super::rules::{Chain, TABLE};
use super::sets::{Element, Set};

/// The verdict (linux/netfilter.h).
const NF_DROP: u32 = 0;
/// `NFNL_SUBSYS_NFTABLES`
const SUBSYSTEM: u16 = 10;
/// `NFPROTO_INET`: the table sees both families.
const INET: u8 = 1;

const NLM_F_CREATE: u16 = 0x400;
const NLM_F_APPEND: u16 = 0x800;

// NFNL_MSG_*, NFT_MSG_*
const BATCH_BEGIN: u16 = 0x10;
const BATCH_END: u16 = 0x11;
const NEW_TABLE: u16 = 0;
const GET_TABLE: u16 = 1;
const DELETE_TABLE: u16 = 2;
const NEW_CHAIN: u16 = 3;
const GET_CHAIN: u16 = 4;
const NEW_RULE: u16 = 6;
const GET_RULE: u16 = 7;
const NEW_SET: u16 = 9;
const NEW_ELEMENT: u16 = 12;
const GET_ELEMENT: u16 = 13;
const DELETE_ELEMENT: u16 = 14;

// NFTA_*: the table's name comes first in all of them.
const TABLE_NAME: u16 = 1;
const CHAIN_NAME: u16 = 3;
const CHAIN_HOOK: u16 = 4;
const CHAIN_POLICY: u16 = 5;
const CHAIN_TYPE: u16 = 7;
const HOOK_NUMBER: u16 = 1;
const HOOK_PRIORITY: u16 = 2;
const RULE_CHAIN: u16 = 2;
const RULE_EXPRESSIONS: u16 = 4;
const RULE_USERDATA: u16 = 7;
const SET_NAME: u16 = 2;
const SET_FLAGS: u16 = 3;
const SET_KEY_TYPE: u16 = 4;
const SET_KEY_LEN: u16 = 5;
const SET_DESCRIPTION: u16 = 9;
const SET_ID: u16 = 10;
const DESCRIPTION_PARTS: u16 = 2;
const PART_LEN: u16 = 1;
const ELEMENT_SET: u16 = 2;
const ELEMENT_LIST: u16 = 3;
const ELEMENT_KEY: u16 = 1;
const ELEMENT_KEY_END: u16 = 10;
const LIST_ITEM: u16 = 1;
const DATA_VALUE: u16 = 1;
const EXPRESSION_NAME: u16 = 1;
const EXPRESSION_DATA: u16 = 2;
const IMMEDIATE_DATA: u16 = 2;
const DATA_VERDICT: u16 = 2;
const VERDICT_CODE: u16 = 1;

/// `NFT_SET_INTERVAL | NFT_SET_CONCAT`
const RANGES_OF_PARTS: u32 = 0x4 | 0x80;

/// `NFTNL_UDATA_RULE_COMMENT` of libnftnl: what `nft` shows as a rule's comment.
const COMMENT: u8 = 0;

fn request(message: u16, flags: u16, attributes: Attributes) -> Request {
    Request { kind: SUBSYSTEM << 8 | message, flags, head: [INET, 0, 0, 0], attributes }
}

fn mark(kind: u16) -> Request {
    let [high, low] = SUBSYSTEM.to_be_bytes();
    Request { kind, flags: 0, head: [0, 0, high, low], attributes: Attributes::new() }
}

/// Opens a transaction.
pub(super) fn begin() -> Request {
    mark(BATCH_BEGIN)
}

/// Closes a transaction.
pub(super) fn end() -> Request {
    mark(BATCH_END)
}

fn table() -> Attributes {
    Attributes::new().text(TABLE_NAME, TABLE)
}

/// Makes the table unless it is there.
pub(super) fn new_table() -> Request {
    request(NEW_TABLE, NLM_F_CREATE, table())
}

/// Deletes the table with all that is in it.
pub(super) fn delete_table() -> Request {
    request(DELETE_TABLE, 0, table())
}

/// Asks whether the table is there.
pub(super) fn get_table() -> Request {
    request(GET_TABLE, 0, table())
}

/// Asks for the table's rules. No table: no rules.
pub(super) fn get_rules() -> Request {
    request(GET_RULE, 0, table())
}

/// A base chain of any table, as its kind of netfilter hook has it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(in super::super) struct BaseChain {
    pub(in super::super) table: String,
    pub(in super::super) name: String,
    /// `NF_INET_*`
    pub(in super::super) hook: u32,
    /// It is of the type that decides what passes.
    pub(in super::super) is_filter: bool,
    /// Its policy.
    pub(in super::super) drops: bool,
}

/// Asks for all chains of a family (`NFPROTO_*`).
pub(in super::super) fn get_chains(family: u8) -> Request {
    Request { head: [family, 0, 0, 0], ..request(GET_CHAIN, 0, Attributes::new()) }
}

/// A base chain in an answer.
pub(in super::super) fn base_chain(answer: &[u8]) -> Option<BaseChain> {
    let hook = attribute(answer, CHAIN_HOOK)?;
    Some(BaseChain {
        table: attribute(answer, TABLE_NAME).map(text)?,
        name: attribute(answer, CHAIN_NAME).map(text)?,
        hook: attribute(hook, HOOK_NUMBER).and_then(be32)?,
        is_filter: attribute(answer, CHAIN_TYPE).map(text)? == "filter",
        drops: attribute(answer, CHAIN_POLICY).and_then(be32) == Some(NF_DROP),
    })
}

/// Asks for the rules of a chain.
pub(in super::super) fn get_rules_of(family: u8, chain: &BaseChain) -> Request {
    let attributes = Attributes::new().text(TABLE_NAME, &chain.table).text(RULE_CHAIN, &chain.name);
    Request { head: [family, 0, 0, 0], ..request(GET_RULE, 0, attributes) }
}

/// Whether the rule in an answer lets nothing pass: it drops or rejects and asks for nothing before. `None`: a rule of another
/// chain.
pub(in super::super) fn rule_ends(answer: &[u8], chain: &BaseChain) -> Option<bool> {
    let of = |kind| attribute(answer, kind).map(text);
    if of(TABLE_NAME)? != chain.table || of(RULE_CHAIN)? != chain.name {
        return None;
    }
    let expressions = attribute(answer, RULE_EXPRESSIONS).unwrap_or_default();
    let mut ends = false;
    for (_, expression) in attributes(expressions) {
        let data = attribute(expression, EXPRESSION_DATA).unwrap_or_default();
        match attribute(expression, EXPRESSION_NAME).map(text).unwrap_or_default().as_str() {
            "counter" | "log" => {}
            "reject" => ends = true,
            "immediate" => {
                let verdict = attribute(data, IMMEDIATE_DATA).and_then(|data| attribute(data, DATA_VERDICT));
                ends = verdict.and_then(|verdict| attribute(verdict, VERDICT_CODE)).and_then(be32)
                    == Some(NF_DROP);
            }
            _ => return Some(false),
        }
    }
    Some(ends)
}

fn be32(payload: &[u8]) -> Option<u32> {
    array(payload, 0).map(u32::from_be_bytes)
}

/// Makes a set.
pub(super) fn new_set(set: &Set) -> Request {
    let attributes = table()
        .text(SET_NAME, set.name)
        .be32(SET_KEY_TYPE, set.key_type)
        .be32(SET_KEY_LEN, set.key_length())
        .be32(SET_ID, set.id);
    if !set.ranges {
        return request(NEW_SET, NLM_F_CREATE, attributes);
    }
    let parts = set.parts.iter().fold(Attributes::new(), |list, bytes| {
        list.nested(LIST_ITEM, &Attributes::new().be32(PART_LEN, *bytes))
    });
    let description = Attributes::new().nested(DESCRIPTION_PARTS, &parts);
    let attributes = attributes.be32(SET_FLAGS, RANGES_OF_PARTS).nested(SET_DESCRIPTION, &description);
    request(NEW_SET, NLM_F_CREATE, attributes)
}

/// Makes a base chain.
pub(super) fn new_chain(chain: &Chain) -> Request {
    let hook =
        Attributes::new().be32(HOOK_NUMBER, chain.hook).bytes(HOOK_PRIORITY, &chain.priority.to_be_bytes());
    let attributes =
        table().text(CHAIN_NAME, chain.name).nested(CHAIN_HOOK, &hook).text(CHAIN_TYPE, chain.kind);
    request(NEW_CHAIN, NLM_F_CREATE, attributes)
}

/// Appends a rule: a list of expressions, and the comment by which it is known again.
pub(super) fn new_rule(chain: &str, expressions: &[Expression], comment: &str) -> Request {
    let list = expressions.iter().fold(Attributes::new(), |list, Expression(name, data)| {
        let item = Attributes::new().text(EXPRESSION_NAME, name).nested(EXPRESSION_DATA, data);
        list.nested(LIST_ITEM, &item)
    });
    let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
    let userdata = [&[COMMENT, length], comment.as_bytes(), &[0]].concat();
    let attributes =
        table().text(RULE_CHAIN, chain).nested(RULE_EXPRESSIONS, &list).bytes(RULE_USERDATA, &userdata);
    request(NEW_RULE, NLM_F_CREATE | NLM_F_APPEND, attributes)
}

/// A rule's chain and comment in an answer.
pub(super) fn rule_mark(answer: &[u8]) -> Option<(String, String)> {
    let chain = attribute(answer, RULE_CHAIN).map(text).unwrap_or_default();
    let comment = attribute(answer, RULE_USERDATA).and_then(comment).unwrap_or_default();
    Some((chain, comment))
}

/// The comment in a rule's user data, a list of (type, length, value) in bytes.
fn comment(mut userdata: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = userdata {
        let value = rest.get(..usize::from(*length))?;
        if *kind == COMMENT {
            return Some(text(value));
        }
        userdata = rest.get(value.len()..)?;
    }
    None
}

/// Adds an element to its set, or deletes it. One that is there already is no error.
pub(super) fn element(element: &Element, add: bool) -> Request {
    let value = |key: &[u8]| Attributes::new().bytes(DATA_VALUE, key);
    let mut item = Attributes::new().nested(ELEMENT_KEY, &value(&element.key()));
    if let Some(end) = element.end() {
        item = item.nested(ELEMENT_KEY_END, &value(&end));
    }
    let list = Attributes::new().nested(LIST_ITEM, &item);
    let attributes = table().text(ELEMENT_SET, element.set().name).nested(ELEMENT_LIST, &list);
    match add {
        true => request(NEW_ELEMENT, NLM_F_CREATE, attributes),
        false => request(DELETE_ELEMENT, 0, attributes),
    }
}

/// Asks for a set's elements.
pub(super) fn get_elements(set: &str) -> Request {
    request(GET_ELEMENT, 0, table().text(ELEMENT_SET, set))
}

/// A set's elements in an answer; what is no key of ours is left out.
pub(super) fn elements(answer: &[u8], set: &Set) -> Vec<Element> {
    let list = attribute(answer, ELEMENT_LIST).unwrap_or_default();
    let value = |item, key| attribute(item, key).and_then(|key| attribute(key, DATA_VALUE));
    attributes(list)
        .filter(|(kind, _)| *kind == LIST_ITEM)
        .filter_map(|(_, item)| Element::read(set, value(item, ELEMENT_KEY)?, value(item, ELEMENT_KEY_END)))
        .collect()
}

/// An expression of a rule: its name and its attributes.
#[derive(Clone, Debug)]
pub(super) struct Expression(&'static str, Attributes);

/// A register of four bytes (`NFT_REG32_00` and on). Longer values go on in the following ones.
#[derive(Clone, Copy, Debug)]
pub(super) struct Register(pub(super) u32);

impl Register {
    const BASE: u32 = 8;

    fn number(self) -> u32 {
        Self::BASE + self.0
    }
}

/// What packets are asked for by `meta`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Meta {
    /// `NFT_META_NFPROTO`: the IP version, as `NFPROTO_*`.
    Family = 15,
    /// `NFT_META_L4PROTO`: the transport.
    Transport = 16,
}

/// Loads a packet's property.
pub(super) fn meta(what: Meta, to: Register) -> Expression {
    Expression("meta", Attributes::new().be32(1, to.number()).be32(2, what as u32))
}

/// Loads bytes of the IP header.
pub(super) fn ip_header(offset: u32, length: u32, to: Register) -> Expression {
    payload(1, offset, length, to)
}

/// Loads bytes of the transport's header.
pub(super) fn transport_header(offset: u32, length: u32, to: Register) -> Expression {
    payload(2, offset, length, to)
}

fn payload(base: u32, offset: u32, length: u32, to: Register) -> Expression {
    let attributes = Attributes::new().be32(1, to.number()).be32(2, base).be32(3, offset).be32(4, length);
    Expression("payload", attributes)
}

/// Goes on only when a register holds a value.
pub(super) fn equal(register: Register, value: &[u8]) -> Expression {
    compare(register, 0, value)
}

/// Goes on only when a register does not hold a value.
pub(super) fn different(register: Register, value: &[u8]) -> Expression {
    compare(register, 1, value)
}

fn compare(register: Register, operator: u32, value: &[u8]) -> Expression {
    let value = Attributes::new().bytes(DATA_VALUE, value);
    Expression("cmp", Attributes::new().be32(1, register.number()).be32(2, operator).nested(3, &value))
}

/// Goes on only when a set has the value that begins in a register.
pub(super) fn lookup(set: &Set, register: Register) -> Expression {
    Expression("lookup", searched(set, register))
}

/// Goes on only when a set does not have it.
pub(super) fn lookup_none(set: &Set, register: Register) -> Expression {
    const NFT_LOOKUP_F_INV: u32 = 1;
    Expression("lookup", searched(set, register).be32(5, NFT_LOOKUP_F_INV))
}

fn searched(set: &Set, register: Register) -> Attributes {
    Attributes::new().text(1, set.name).be32(2, register.number()).be32(4, set.id)
}

/// Masks a register of four bytes.
pub(super) fn mask(register: Register, bits: u32) -> Expression {
    let value = |value: u32| Attributes::new().bytes(DATA_VALUE, &value.to_ne_bytes());
    let attributes = Attributes::new()
        .be32(1, register.number())
        .be32(2, register.number())
        .be32(3, 4)
        .nested(4, &value(bits))
        .nested(5, &value(0));
    Expression("bitwise", attributes)
}

/// What connections are asked for by `ct`.
#[derive(Clone, Copy, Debug)]
pub(super) enum Connection {
    /// `NFT_CT_STATE`: a bit.
    State = 0,
    /// `NFT_CT_DIRECTION`: 0 for the original direction, one byte.
    Direction = 1,
    /// `NFT_CT_PROTO_DST`: the port that the connection's first packet was sent to.
    OriginalPort = 12,
    /// `NFT_CT_DST_IP`: where the connection's first packet was sent to; IPv4 only.
    OriginalDestination = 20,
    /// `NFT_CT_DST_IP6`: the same for IPv6.
    OriginalDestination6 = 22,
}

/// Loads a connection's property.
pub(super) fn connection(what: Connection, to: Register) -> Expression {
    let attributes = Attributes::new().be32(1, to.number()).be32(2, what as u32);
    Expression(
        "ct",
        match what {
            Connection::OriginalPort | Connection::OriginalDestination | Connection::OriginalDestination6 => {
                attributes.byte(3, 0)
            }
            Connection::State | Connection::Direction => attributes,
        },
    )
}

/// Loads the type of the packet's destination (`RTN_*`), as the routing table has it.
pub(super) fn destination_type(to: Register) -> Expression {
    const ADDRESS_TYPE: u32 = 3;
    const DESTINATION: u32 = 2;
    Expression("fib", Attributes::new().be32(1, to.number()).be32(2, ADDRESS_TYPE).be32(3, DESTINATION))
}

/// Ends the chain with a yes.
pub(super) fn accept() -> Expression {
    let verdict = Attributes::new().be32(1, 1);
    let data = Attributes::new().nested(2, &verdict);
    Expression("immediate", Attributes::new().be32(1, 0).nested(2, &data))
}

/// Refuses by a TCP reset.
pub(super) fn reject_by_reset() -> Expression {
    Expression("reject", Attributes::new().be32(1, 1).byte(2, 0))
}

/// Refuses by an ICMP (or ICMPv6) error, port unreachable.
pub(super) fn reject_by_icmp() -> Expression {
    Expression("reject", Attributes::new().be32(1, 2).byte(2, 1))
}

/// Gives the packet an address of this node and a random port as its source.
pub(super) fn masquerade_fully_random() -> Expression {
    const NF_NAT_RANGE_PROTO_RANDOM_FULLY: u32 = 0x10;
    Expression("masq", Attributes::new().be32(1, NF_NAT_RANGE_PROTO_RANDOM_FULLY))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use vip_core::plan::{Protocol, ServiceKey};

    use super::super::sets::{Limit, sets};
    use super::*;
    use crate::dataplane::netlink::noise::nearly;

    /// Bytes from nowhere, and rules and elements with some bytes changed or cut off.
    fn answer() -> impl Strategy<Value = Vec<u8>> {
        let mut whole: Vec<Vec<u8>> =
            vec![new_rule("postrouting", &[accept()], "clients 1").attributes.as_bytes().to_vec()];
        let input = Chain { name: "input", kind: "filter", hook: 1, priority: 0 };
        whole.push(new_chain(&input).attributes.as_bytes().to_vec());
        for address in [[10, 87, 2, 50].into(), std::net::IpAddr::from([0xfd87, 0, 0, 0, 0, 0, 2, 0x50])] {
            whole.push(element(&Element::Vip(address), true).attributes.as_bytes().to_vec());
            let key = ServiceKey { address, protocol: Protocol::Sctp, port: 80 };
            let range = Element::Range(Limit::Restricted, key, ipnet::IpNet::from(address));
            whole.push(element(&range, true).attributes.as_bytes().to_vec());
        }
        nearly(whole, 200)
    }

    proptest! {
        #[test]
        fn any_bytes_are_elements_and_a_mark_or_nothing(bytes in answer()) {
            for set in sets() {
                let found = elements(&bytes, set);
                prop_assert!(found.len() <= bytes.len() / 8);
                for found in found {
                    let again = elements(element(&found, true).attributes.as_bytes(), set);
                    prop_assert_eq!(again, [found]);
                }
            }
            let (chain, comment) = rule_mark(&bytes).unwrap_or_default();
            prop_assert!(chain.len() + comment.len() <= bytes.len() * 3);
            if let Some(chain) = base_chain(&bytes) {
                prop_assert!(chain.table.len() + chain.name.len() <= bytes.len() * 3);
                rule_ends(&bytes, &chain);
            }
        }
    }
}
