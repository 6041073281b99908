//! The other agents on the LAN, and how this one speaks with them.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::ops::Deref;
use std::sync::Arc;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::packet;

/// What all elections of a node have in common.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Lan {
    /// The other agents.
    pub peers: Peers,
    /// Whether advertisements go to each peer by itself instead of to the group.
    pub unicast: bool,
    /// The form of the checksum over IPv4.
    pub checksum: ChecksumPolicy,
}

/// Another agent: a sender that is obeyed whatever addresses it lists.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Peer {
    /// Its node.
    pub node: String,
    /// The node's addresses.
    pub addresses: Vec<IpAddr>,
    /// The hardware addresses of its interfaces.
    pub macs: Vec<[u8; 6]>,
}

/// The other agents, found by what their nodes have: every packet asks for its sender. A copy costs nothing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Peers(Arc<Index>);

#[derive(Debug, Default, PartialEq, Eq)]
struct Index {
    peers: Vec<Peer>,
    /// Places in the list.
    of: BTreeMap<IpAddr, usize>,
    macs: BTreeSet<[u8; 6]>,
}

impl Peers {
    /// The first that has an address.
    pub fn at(&self, address: IpAddr) -> Option<&Peer> {
        self.0.peers.get(*self.0.of.get(&address)?)
    }

    /// Whether one has an interface with a hardware address.
    pub fn have(&self, mac: [u8; 6]) -> bool {
        self.0.macs.contains(&mac)
    }
}

impl Deref for Peers {
    type Target = [Peer];

    fn deref(&self) -> &[Peer] {
        &self.0.peers
    }
}

impl From<Vec<Peer>> for Peers {
    fn from(peers: Vec<Peer>) -> Self {
        let mut of = BTreeMap::new();
        for (place, peer) in peers.iter().enumerate() {
            for address in &peer.addresses {
                of.entry(*address).or_insert(place);
            }
        }
        let macs = peers.iter().flat_map(|peer| &peer.macs).copied().collect();
        Self(Arc::new(Index { peers, of, macs }))
    }
}

impl FromIterator<Peer> for Peers {
    fn from_iter<T: IntoIterator<Item = Peer>>(peers: T) -> Self {
        Vec::from_iter(peers).into()
    }
}

impl Lan {
    /// The peer that has an address.
    pub fn peer(&self, address: IpAddr) -> Option<&Peer> {
        self.peers.at(address)
    }
}

impl Serialize for Peers {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        self.0.peers.serialize(serializer)
    }
}

impl<'de> Deserialize<'de> for Peers {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        Vec::deserialize(deserializer).map(|peers: Vec<Peer>| peers.into())
    }
}

/// Which form of the checksum over IPv4 is sent and which is accepted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum ChecksumPolicy {
    /// Sent with the pseudo-header, as keepalived does by default; either is accepted.
    #[default]
    Either,
    /// Only with the pseudo-header.
    PseudoHeader,
    /// Only without it (RFC 9568 section 5.2.8; keepalived's `v3_checksum_as_v2`).
    Plain,
}

impl ChecksumPolicy {
    /// The form that is sent.
    pub fn sent(self) -> packet::Checksum {
        match self {
            Self::Either | Self::PseudoHeader => packet::Checksum::PseudoHeader,
            Self::Plain => packet::Checksum::Plain,
        }
    }

    /// The only form that is accepted; `None`: either.
    pub fn accepted(self) -> Option<packet::Checksum> {
        match self {
            Self::Either => None,
            strict => Some(strict.sent()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn peers_are_found_by_what_they_have_also_after_a_journey() {
        let peer = |node: &str, address: u8| Peer {
            node: node.into(),
            addresses: vec![[10, 87, 0, address].into(), [172, 17, 0, 1].into()],
            macs: vec![[address; 6]],
        };
        let lan = Lan { peers: vec![peer("a", 1), peer("b", 2)].into(), ..Lan::default() };
        let text = serde_json::to_string(&lan).unwrap();
        assert!(
            text.starts_with(r#"{"peers":[{"node":"a","addresses":["10.87.0.1","172.17.0.1"]"#),
            "{text}"
        );
        let back: Lan = serde_json::from_str(&text).unwrap();
        assert_eq!(back, lan);
        for lan in [lan, back] {
            let at = |address: [u8; 4]| lan.peers.at(address.into()).map(|peer| peer.node.as_str());
            assert_eq!(
                [at([10, 87, 0, 2]), at([172, 17, 0, 1]), at([10, 87, 0, 3])],
                [Some("b"), Some("a"), None]
            );
            assert_eq!([lan.peers.have([2; 6]), lan.peers.have([3; 6])], [true, false]);
        }
    }
}
