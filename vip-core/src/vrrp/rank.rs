//! Which node comes first for which virtual router, so that nobody has to configure priorities.
//!
//! Rendezvous hashing: every node gets a number for every virtual router, the greatest is first. A node that comes or
//! goes moves only what it gains or loses. Agents of different versions must agree: the hash is written out here and
//! must never change.

/// The priority of the first node. 255 is left to the owner of an address in the sense of RFC 9568.
const FIRST: u8 = 254;
/// Neighbouring ranks are this far apart: at an interval of 100 ms their down intervals differ by 12 ms, enough for the
/// first advertisement of the quicker one to reach the slower one in time.
const SPACING: u8 = 30;

/// The priority with which `own` competes for a virtual router among `nodes` (whether `own` is listed or not). A
/// `preferred` node that is one of them comes first.
pub fn priority<'a>(
    own: &'a str,
    nodes: impl IntoIterator<Item = &'a str>,
    vrid: u8,
    preferred: Option<&str>,
) -> u8 {
    let mut order = order(nodes.into_iter().chain([own]), vrid);
    // Stable: all others keep their order.
    order.sort_by_key(|node| Some(*node) != preferred);
    let rank = order.iter().position(|node| *node == own).unwrap_or(0);
    let below = u8::try_from(rank).unwrap_or(u8::MAX).checked_mul(SPACING);
    below.and_then(|below| FIRST.checked_sub(below)).unwrap_or(1).max(1)
}

/// The nodes in the order in which they should own a virtual router; a name that is given twice counts once.
pub fn order<'a>(nodes: impl IntoIterator<Item = &'a str>, vrid: u8) -> Vec<&'a str> {
    let mut ranked: Vec<(u64, &str)> = nodes.into_iter().map(|node| (weight(node, vrid), node)).collect();
    ranked.sort_unstable_by(|a, b| b.cmp(a));
    ranked.dedup();
    ranked.into_iter().map(|(_, node)| node).collect()
}

/// FNV-1a over the name, a zero and the identifier, then the finalizer of MurmurHash3, because FNV alone leaves names
/// that differ in the last character close together.
fn weight(node: &str, vrid: u8) -> u64 {
    let mut hash = node.bytes().chain([0, vrid]).fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xff51_afd7_ed55_8ccd);
    hash = (hash ^ (hash >> 33)).wrapping_mul(0xc4ce_b9fe_1a85_ec53);
    hash ^ (hash >> 33)
}

#[cfg(test)]
mod tests {
    use super::*;

    const NODES: [&str; 3] = ["node-1", "node-2", "node-3"];

    #[test]
    fn golden_values() {
        assert_eq!(weight("node-1", 1), 2_657_345_811_416_196_945);
        assert_eq!(weight("node-2", 1), 12_465_305_810_819_866_133);
        assert_eq!(weight("worker-a.example.org", 255), 3_562_938_803_617_231_984);
        assert_eq!(order(NODES, 1), ["node-2", "node-3", "node-1"]);
        assert_eq!(order(NODES, 2), ["node-2", "node-3", "node-1"]);
    }

    #[test]
    fn priorities_are_spaced() {
        let names: Vec<String> = (0..20).map(|n| format!("n{n}")).collect();
        let all: Vec<&str> = names.iter().map(String::as_str).collect();
        let priorities: Vec<u8> = order(all.iter().copied(), 7)
            .into_iter()
            .map(|node| priority(node, all.iter().copied(), 7, None))
            .collect();
        assert_eq!(priorities[..9], [254, 224, 194, 164, 134, 104, 74, 44, 14]);
        assert!(priorities[9..].iter().all(|p| *p == 1), "{priorities:?}");
        let many: Vec<String> = (0..600).map(|n| format!("n{n}")).collect();
        let last = order(many.iter().map(String::as_str), 7)[599];
        assert_eq!(priority(last, many.iter().map(String::as_str), 7, None), 1);
    }

    #[test]
    fn a_preferred_node_comes_first_and_the_others_keep_their_order() {
        let priorities = |preferred| NODES.map(|node| priority(node, NODES, 1, preferred));
        assert_eq!(priorities(None), [194, 254, 224]);
        assert_eq!(priorities(Some("node-1")), [254, 224, 194]);
        assert_eq!(priorities(Some("gone")), priorities(None));
    }

    #[test]
    fn a_node_counts_once_and_counts_itself() {
        assert_eq!(priority("alone", [], 1, None), 254);
        assert_eq!(priority("alone", ["alone", "alone"], 1, None), 254);
        assert_eq!(order(["b", "a", "b"], 9).len(), 2);
    }

    #[test]
    fn routers_spread_over_the_nodes_and_only_a_lost_node_moves_them() {
        let mut first = [0; 3];
        for vrid in 1..=255 {
            let before = order(NODES, vrid);
            first[NODES.iter().position(|node| *node == before[0]).unwrap()] += 1;
            let after = order(NODES.into_iter().filter(|node| *node != "node-3"), vrid);
            assert_eq!(after, before.into_iter().filter(|node| *node != "node-3").collect::<Vec<_>>());
        }
        assert!(first.iter().all(|count| (60..=110).contains(count)), "{first:?}");
    }
}
