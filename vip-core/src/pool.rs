//! Address ranges and allocation: which addresses a pool holds, which one is next, which virtual router carries it.
//!
//! Sets are kept as sorted spans and walked lazily, so an IPv6 /64 costs as little as a single address. Nothing here
//! knows of objects other than by their plain values; `validate.rs` makes pools out of them.

use std::collections::BTreeSet;
use std::fmt;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr};

use crate::api::VirtualRouterRange;
use crate::vrrp::Family;

fn bits(family: Family) -> u32 {
    match family {
        Family::V4 => 32,
        Family::V6 => 128,
    }
}

fn address(family: Family, number: u128) -> IpAddr {
    match family {
        // A span of this family never holds more than 32 bits.
        Family::V4 => IpAddr::V4(Ipv4Addr::from_bits(number as u32)),
        Family::V6 => IpAddr::V6(Ipv6Addr::from_bits(number)),
    }
}

fn word(family: Family) -> &'static str {
    match family {
        Family::V4 => "IPv4",
        Family::V6 => "IPv6",
    }
}

fn number(address: IpAddr) -> u128 {
    match address {
        IpAddr::V4(a) => u128::from(a.to_bits()),
        IpAddr::V6(a) => a.to_bits(),
    }
}

/// A run of addresses of one family, both ends included.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Span {
    family: Family,
    first: u128,
    last: u128,
}

impl Span {
    /// The lowest address.
    pub fn first(&self) -> IpAddr {
        address(self.family, self.first)
    }

    /// The highest address.
    pub fn last(&self) -> IpAddr {
        address(self.family, self.last)
    }

    fn common(&self, other: &Self) -> Option<Self> {
        let (first, last) = (self.first.max(other.first), self.last.min(other.last));
        (self.family == other.family && first <= last).then_some(Self { family: self.family, first, last })
    }
}

impl fmt::Display for Span {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first())
        } else {
            write!(f, "{}-{}", self.first(), self.last())
        }
    }
}

/// What is wrong with the text of a range.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{text:?}: {why}")]
pub struct RangeError {
    /// The text as it was written.
    pub text: String,
    /// What is wrong with it.
    pub why: String,
}

/// A set of addresses of either family.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct AddressSet {
    /// Sorted, disjoint, and not adjacent.
    spans: Vec<Span>,
}

impl AddressSet {
    /// The addresses of a pool: `addresses` without `exclude`. Both hold CIDRs, ranges `first-last` and single
    /// addresses. Of an IPv4 CIDR up to /30 in `addresses` the network and broadcast addresses are left out;
    /// a CIDR in `exclude` takes away all that it spans.
    pub fn parse<S: AsRef<str>>(addresses: &[S], exclude: &[S]) -> Result<Self, RangeError> {
        let hosts =
            addresses.iter().map(|text| parse_entry(text.as_ref(), true)).collect::<Result<_, _>>()?;
        let without =
            exclude.iter().map(|text| parse_entry(text.as_ref(), false)).collect::<Result<_, _>>()?;
        Ok(Self::merged(hosts).minus(&Self::merged(without)))
    }

    /// All addresses of CIDRs, ranges and single addresses, network and broadcast addresses included.
    pub fn parse_whole<S: AsRef<str>>(addresses: &[S]) -> Result<Self, RangeError> {
        let spans =
            addresses.iter().map(|text| parse_entry(text.as_ref(), false)).collect::<Result<_, _>>()?;
        Ok(Self::merged(spans))
    }

    fn merged(mut spans: Vec<Span>) -> Self {
        spans.sort_unstable();
        let mut merged: Vec<Span> = Vec::with_capacity(spans.len());
        for span in spans {
            match merged.last_mut() {
                Some(open) if open.family == span.family && span.first <= open.last.saturating_add(1) => {
                    open.last = open.last.max(span.last);
                }
                _ => merged.push(span),
            }
        }
        Self { spans: merged }
    }

    /// This set without the addresses of another.
    pub fn minus(&self, other: &Self) -> Self {
        let mut rest = Vec::with_capacity(self.spans.len());
        for span in &self.spans {
            // What is left of the span, from here upwards; nothing once a hole has reached its end.
            let mut open = Some(*span);
            for hole in &other.spans {
                let Some(left) = open else { break };
                let Some(hole) = left.common(hole) else { continue };
                if hole.first > left.first {
                    rest.push(Span { last: hole.first - 1, ..left });
                }
                open = (hole.last < left.last).then(|| Span { first: hole.last + 1, ..left });
            }
            rest.extend(open);
        }
        Self { spans: rest }
    }

    /// Whether the address is in the set.
    pub fn contains(&self, address: IpAddr) -> bool {
        self.position(address).is_some()
    }

    /// How many addresses of the set are below this one; `None` if it is not in the set.
    pub fn position(&self, address: IpAddr) -> Option<u128> {
        let (family, number) = (Family::of(address), number(address));
        let mut below = 0u128;
        for span in &self.spans {
            if span.family == family && (span.first..=span.last).contains(&number) {
                return Some(below.saturating_add(number - span.first));
            }
            below = below.saturating_add((span.last - span.first).saturating_add(1));
        }
        None
    }

    /// The number of addresses, at most `u128::MAX`.
    pub fn len(&self) -> u128 {
        self.spans
            .iter()
            .fold(0, |sum: u128, span| sum.saturating_add((span.last - span.first).saturating_add(1)))
    }

    /// The number of addresses, at most `u64::MAX`: as a pool's status counts them.
    pub fn len_u64(&self) -> u64 {
        u64::try_from(self.len()).unwrap_or(u64::MAX)
    }

    /// Whether there is no address in the set.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The runs of addresses in ascending order.
    pub fn spans(&self) -> &[Span] {
        &self.spans
    }

    /// Whether the set has addresses of this family.
    pub fn has(&self, family: Family) -> bool {
        self.spans.iter().any(|span| span.family == family)
    }

    /// The addresses in ascending order, IPv4 before IPv6, made one at a time.
    pub fn iter(&self) -> impl Iterator<Item = IpAddr> + '_ {
        self.spans.iter().flat_map(|span| (span.first..=span.last).map(|number| address(span.family, number)))
    }

    /// The lowest run of addresses that both sets have.
    pub fn overlap(&self, other: &Self) -> Option<Span> {
        self.spans.iter().find_map(|span| other.spans.iter().find_map(|theirs| span.common(theirs)))
    }

    /// Whether the two sets have an address in common.
    pub fn overlaps(&self, other: &Self) -> bool {
        self.overlap(other).is_some()
    }
}

impl fmt::Display for AddressSet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (place, span) in self.spans.iter().enumerate() {
            let comma = if place == 0 { "" } else { "," };
            write!(f, "{comma}{span}")?;
        }
        Ok(())
    }
}

/// One address, without zone and not an IPv6 address that stands for an IPv4 one.
pub fn parse_address(text: &str) -> Result<IpAddr, RangeError> {
    let wrong = |why: &str| RangeError { text: text.to_owned(), why: why.to_owned() };
    let address = text.parse::<IpAddr>().map_err(|_| wrong("not an IP address"))?;
    if let IpAddr::V6(v6) = address
        && let Some(v4) = v6.to_ipv4_mapped()
    {
        return Err(wrong(&format!("an IPv4-mapped address: write {v4}")));
    }
    Ok(address)
}

fn parse_entry(text: &str, hosts_only: bool) -> Result<Span, RangeError> {
    let wrong = |why: String| RangeError { text: text.to_owned(), why };
    let end = |part: &str| parse_address(part).map_err(|e| wrong(format!("{part:?} is {}", e.why)));
    if let Some((network, prefix)) = text.split_once('/') {
        let network = end(network)?;
        let family = Family::of(network);
        let bits = bits(family);
        let prefix = Some(prefix)
            .filter(|p| !p.is_empty() && p.len() <= 3 && p.bytes().all(|b| b.is_ascii_digit()))
            .and_then(|p| p.parse::<u32>().ok())
            .filter(|p| *p <= bits)
            .ok_or_else(|| wrong(format!("an {} prefix is 0 to {bits}", word(family))))?;
        let host_mask = if prefix == 0 { low_bits(bits) } else { low_bits(bits - prefix) };
        let first = number(network) & !host_mask;
        let edge = u128::from(hosts_only && family == Family::V4 && prefix <= 30);
        return Ok(Span { family, first: first + edge, last: (first | host_mask) - edge });
    }
    if let Some((first, last)) = text.split_once('-') {
        let (first, last) = (end(first)?, end(last)?);
        let family = Family::of(first);
        if family != Family::of(last) {
            return Err(wrong("both ends of a range must be of one family".to_owned()));
        }
        if first > last {
            return Err(wrong(format!("a range goes upwards: {last}-{first}")));
        }
        return Ok(Span { family, first: number(first), last: number(last) });
    }
    if text.parse::<IpAddr>().is_err() {
        return Err(wrong("not an address, a CIDR or a range first-last".to_owned()));
    }
    let address = parse_address(text)?;
    Ok(Span { family: Family::of(address), first: number(address), last: number(address) })
}

/// A number whose lowest `bits` bits are ones, 0 to 128 of them.
fn low_bits(bits: u32) -> u128 {
    u128::MAX.checked_shr(128 - bits).unwrap_or(0)
}

/// The addresses of a pool that may be given out, lowest first. Taking one is up to the caller: by creating the
/// VirtualIP of that name, and going on to the next candidate when somebody else was faster.
pub fn next_free<'a>(pool: &'a AddressSet, taken: &'a BTreeSet<IpAddr>) -> impl Iterator<Item = IpAddr> + 'a {
    pool.iter().filter(|address| !taken.contains(address))
}

/// How many of the taken addresses are in the pool.
pub fn used(pool: &AddressSet, taken: &BTreeSet<IpAddr>) -> u64 {
    taken.iter().filter(|address| pool.contains(**address)).count() as u64
}

/// The virtual router for a new virtual IP: the one that carries the fewest, so each has its own while there are enough.
/// `None` when all of the range are to be avoided.
///
/// `in_use` has the virtual router of every virtual IP of the same family, `avoid` those that are spoken for by others
/// of the LAN. Among equals the one at the place of the address in its pool (`position`) comes first, and the ones above
/// it next, around the end: addresses given out at the same moment by people who do not see each other get virtual
/// routers of their own, too.
pub fn choose_virtual_router(
    range: VirtualRouterRange,
    in_use: impl IntoIterator<Item = u8>,
    avoid: &BTreeSet<u8>,
    position: u128,
) -> Option<u8> {
    let mut carried = [0u32; 256];
    for id in in_use {
        carried[usize::from(id)] += 1;
    }
    let ids: Vec<u8> = range.iter().collect();
    // The remainder is at most 255.
    let start = (position % ids.len().max(1) as u128) as usize;
    let (before, from) = ids.split_at(start);
    let candidates = from.iter().chain(before).copied().filter(|id| !avoid.contains(id));
    candidates.min_by_key(|id| carried[usize::from(*id)])
}

/// A range of virtual routers for a new pool that touches none of those taken: 64 of them from 100 upwards, else
/// below 100 (where other people's routers often are), else half as many. `None` when all 255 are taken.
pub fn free_virtual_routers(taken: &BTreeSet<u8>) -> Option<VirtualRouterRange> {
    const LOWEST_OF_OURS: u8 = 100;
    let fits = |first: u8, count: u8| {
        first.checked_add(count - 1).is_some_and(|last| taken.range(first..=last).next().is_none())
    };
    [64, 32, 16, 8, 4, 2, 1].into_iter().find_map(|count| {
        (LOWEST_OF_OURS..=255)
            .chain((1..=LOWEST_OF_OURS - 1).rev())
            .find(|first| fits(*first, count))
            .map(|first| VirtualRouterRange { first, count })
    })
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn ip(text: &str) -> IpAddr {
        text.parse().unwrap()
    }

    fn set(addresses: &[&str], exclude: &[&str]) -> AddressSet {
        AddressSet::parse(addresses, exclude).unwrap()
    }

    fn why(text: &str) -> String {
        AddressSet::parse(&[text], &[]).unwrap_err().to_string()
    }

    #[test]
    fn an_ipv4_cidr_loses_network_and_broadcast() {
        assert_eq!(set(&["192.168.10.240/28"], &[]).to_string(), "192.168.10.241-192.168.10.254");
        assert_eq!(set(&["192.168.10.247/28"], &[]).to_string(), "192.168.10.241-192.168.10.254");
        assert_eq!(set(&["10.0.0.4/30"], &[]).to_string(), "10.0.0.5-10.0.0.6");
        assert_eq!(set(&["10.0.0.4/31"], &[]).to_string(), "10.0.0.4-10.0.0.5");
        assert_eq!(set(&["10.0.0.4/32"], &[]).to_string(), "10.0.0.4");
        assert_eq!(set(&["0.0.0.0/0"], &[]).len(), (1 << 32) - 2);
        assert_eq!(
            AddressSet::parse_whole(&["10.244.0.0/16"]).unwrap().to_string(),
            "10.244.0.0-10.244.255.255"
        );
    }

    #[test]
    fn an_ipv6_cidr_is_whole_and_lazy() {
        let v6 = set(&["fd87::/64"], &[]);
        assert_eq!(v6.len(), 1 << 64);
        assert_eq!(v6.len_u64(), u64::MAX);
        assert_eq!(v6.iter().nth(2), Some(ip("fd87::2")));
        assert_eq!(v6.position(ip("fd87::1:0")), Some(65536));
        assert_eq!(set(&["::/0"], &[]).len(), u128::MAX);
        assert_eq!(
            set(&["::/0"], &["::-fe00::"]).to_string(),
            "fe00::1-ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff"
        );
        assert!(v6.has(Family::V6) && !v6.has(Family::V4));
    }

    #[test]
    fn entries_are_sorted_merged_and_cut() {
        let pool = set(
            &["fd00::9", "10.0.0.9", "10.0.0.4-10.0.0.8", "10.0.0.1-10.0.0.2"],
            &["10.0.0.6-10.0.0.7", "10.0.0.1", "10.9.0.0/16"],
        );
        assert_eq!(pool.to_string(), "10.0.0.2,10.0.0.4-10.0.0.5,10.0.0.8-10.0.0.9,fd00::9");
        assert_eq!(pool.len(), 6);
        assert!(pool.contains(ip("10.0.0.5")));
        assert!(!pool.contains(ip("10.0.0.6")));
        assert!(!pool.contains(ip("::a00:5")), "families do not mix");
        assert_eq!(
            pool.iter().map(|a| pool.position(a)).collect::<Vec<_>>(),
            (0..6).map(Some).collect::<Vec<_>>()
        );
        assert!(set(&["10.0.0.1"], &["10.0.0.0/24"]).is_empty());
        assert_eq!(
            set(&["10.0.0.0/24"], &["10.0.0.0/25"]).to_string(),
            "10.0.0.128-10.0.0.254",
            "exclude is whole"
        );
    }

    #[test]
    fn mistakes_are_named() {
        assert_eq!(why("192.168.10.240/33"), r#""192.168.10.240/33": an IPv4 prefix is 0 to 32"#);
        assert_eq!(why("fd00::/129"), r#""fd00::/129": an IPv6 prefix is 0 to 128"#);
        assert_eq!(why("10.0.0.0/"), r#""10.0.0.0/": an IPv4 prefix is 0 to 32"#);
        assert_eq!(why("10.0.0.0/+8"), r#""10.0.0.0/+8": an IPv4 prefix is 0 to 32"#);
        assert_eq!(why("lab"), r#""lab": not an address, a CIDR or a range first-last"#);
        assert_eq!(why(""), r#""": not an address, a CIDR or a range first-last"#);
        assert_eq!(why("10.0.0.300/24"), r#""10.0.0.300/24": "10.0.0.300" is not an IP address"#);
        assert_eq!(why("10.0.0.1-9"), r#""10.0.0.1-9": "9" is not an IP address"#);
        assert_eq!(
            why("10.0.0.9-10.0.0.1"),
            r#""10.0.0.9-10.0.0.1": a range goes upwards: 10.0.0.1-10.0.0.9"#
        );
        assert_eq!(
            why("10.0.0.9-fd00::1"),
            r#""10.0.0.9-fd00::1": both ends of a range must be of one family"#
        );
        assert_eq!(why("::ffff:10.0.0.1"), r#""::ffff:10.0.0.1": an IPv4-mapped address: write 10.0.0.1"#);
        assert!(why("fe80::1%eth0").contains("not an address"));
        assert!(AddressSet::parse(&["10.0.0.1"], &["x"]).is_err());
    }

    #[test]
    fn overlaps_name_the_first_common_run() {
        let lab = set(&["192.168.10.240/28"], &[]);
        assert_eq!(
            lab.overlap(&set(&["192.168.10.250-192.168.11.3"], &[])).unwrap().to_string(),
            "192.168.10.250-192.168.10.254"
        );
        assert!(
            !lab.overlaps(&set(&["192.168.10.240"], &[])),
            "the network address belongs to nobody's pool"
        );
        assert!(!lab.overlaps(&set(&["fd00::/8"], &[])));
    }

    #[test]
    fn candidates_come_lowest_first() {
        let pool = set(&["10.0.0.0/29"], &["10.0.0.2"]);
        let taken = BTreeSet::from([ip("10.0.0.1"), ip("10.0.0.4"), ip("10.9.9.9")]);
        let free: Vec<_> = next_free(&pool, &taken).map(|a| a.to_string()).collect();
        assert_eq!(free, ["10.0.0.3", "10.0.0.5", "10.0.0.6"]);
        assert_eq!(used(&pool, &taken), 2);
    }

    #[test]
    fn a_virtual_router_of_its_own_while_there_are_enough() {
        let choose = |first, count, in_use: &[u8], position| {
            let range = VirtualRouterRange { first, count };
            choose_virtual_router(range, in_use.iter().copied(), &BTreeSet::new(), position)
        };
        assert_eq!(choose(100, 3, &[], 0), Some(100));
        assert_eq!(choose(100, 3, &[100], 0), Some(101));
        assert_eq!(choose(100, 3, &[100, 101, 7], 0), Some(102));
        assert_eq!(choose(100, 3, &[100, 101, 102], 0), Some(100), "then they are shared");
        assert_eq!(choose(100, 3, &[100, 101, 102, 100], 0), Some(101), "evenly");
        assert_eq!(choose(100, 3, &[], 4), Some(101), "by place in the pool");
        assert_eq!(choose(100, 3, &[102], 2), Some(100), "around the end");
        assert_eq!(choose(255, 9, &[255], 8), Some(255));
        assert_eq!(choose(255, 0, &[], 8), None);
    }

    #[test]
    fn a_virtual_router_of_others_is_never_chosen() {
        let choose = |in_use: &[u8], avoid: &[u8]| {
            let range = VirtualRouterRange { first: 100, count: 3 };
            choose_virtual_router(range, in_use.iter().copied(), &avoid.iter().copied().collect(), 0)
        };
        assert_eq!(choose(&[], &[100]), Some(101));
        assert_eq!(
            choose(&[102, 102], &[100, 101, 7]),
            Some(102),
            "sharing ours is better than taking theirs"
        );
        assert_eq!(choose(&[], &[100, 101, 102]), None);
    }

    #[test]
    fn new_pools_get_virtual_routers_of_their_own() {
        let (mut taken, mut ids, mut said) = (BTreeSet::new(), 0, Vec::new());
        while let Some(range) = free_virtual_routers(&taken) {
            taken.extend(range.iter());
            ids += usize::from(range.count);
            said.push((range.first, range.count));
        }
        assert_eq!(said[..4], [(100, 64), (164, 64), (36, 64), (4, 32)]);
        assert_eq!((taken.len(), ids), (255, 255), "all, and none twice");
        assert_eq!(
            free_virtual_routers(&BTreeSet::from([112])),
            Some(VirtualRouterRange { first: 113, count: 64 }),
            "past one that somebody else has"
        );
    }

    proptest! {
        /// Against the obvious set of numbers: contents, order, positions and differences.
        #[test]
        fn agrees_with_a_plain_set(
            addresses in prop::collection::vec((0u8..60, 0u8..12), 1..6),
            exclude in prop::collection::vec((0u8..60, 0u8..12), 0..6),
        ) {
            let text = |spans: &[(u8, u8)]| {
                spans.iter().map(|(a, n)| format!("10.0.0.{a}-10.0.0.{}", a + n)).collect::<Vec<_>>()
            };
            let plain = |spans: &[(u8, u8)]| {
                spans.iter().flat_map(|(a, n)| *a..=a + n).collect::<BTreeSet<u8>>()
            };
            let pool = AddressSet::parse(&text(&addresses), &text(&exclude)).unwrap();
            let expected: Vec<IpAddr> = plain(&addresses)
                .difference(&plain(&exclude))
                .map(|n| IpAddr::V4(Ipv4Addr::new(10, 0, 0, *n)))
                .collect();
            prop_assert_eq!(pool.iter().collect::<Vec<_>>(), expected.clone());
            prop_assert_eq!(pool.len(), expected.len() as u128);
            for n in 0..80 {
                let address = IpAddr::V4(Ipv4Addr::new(10, 0, 0, n));
                prop_assert_eq!(pool.contains(address), expected.contains(&address));
            }
            let shown = pool.to_string();
            let again: Vec<&str> = shown.split(',').filter(|s| !s.is_empty()).collect();
            prop_assert_eq!(AddressSet::parse_whole(&again).unwrap(), pool);
        }

        /// No text makes the parser panic, and what it accepts it can print and read again.
        #[test]
        fn any_text(text in "[0-9a-f:./-]{0,24}") {
            if let Ok(pool) = AddressSet::parse_whole(&[text.as_str()]) {
                let shown = pool.to_string();
                prop_assert_eq!(AddressSet::parse_whole(&[shown.as_str()]).unwrap(), pool);
            }
        }
    }
}
