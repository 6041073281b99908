//! Where an election can take place: the node's interfaces as they were seen last, and which of them are fit.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use vip_core::api::Reason;
use vip_core::vrrp::{Family, Lan, RouterConfig};

use super::address::Nic;

/// A carrier that came back has to last this long before it is trusted: switches take their time to forward.
const STABLE: Duration = Duration::from_secs(3);

/// The node's interfaces.
#[derive(Debug)]
pub struct Network {
    nics: BTreeMap<u32, Nic>,
    /// From when on a carrier that came back is trusted.
    stable: BTreeMap<u32, Duration>,
}

/// What an election needs of the node.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// Index of the interface.
    pub index: u32,
    /// The sender of the advertisements: IPv4: its primary address in the subnet of the virtual IPs; IPv6: its link-local
    /// address (RFC 9568 sections 5.1.1.1 and 5.1.2.1).
    pub source: IpAddr,
}

/// What keeps the node out of an election.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Obstacle {
    /// The word for it.
    pub reason: Reason,
    /// The sentence.
    pub message: String,
    /// When it will be gone by itself, if that is known.
    pub until: Option<Duration>,
}

/// What is new since the last look.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct News {
    /// Anything at all.
    pub any: bool,
    /// Interfaces with another hardware address than before.
    pub hardware: Vec<u32>,
}

impl Network {
    /// The interfaces at the start; a carrier that is there already is trusted.
    pub fn new(nics: BTreeMap<u32, Nic>) -> Self {
        Self { nics, stable: BTreeMap::new() }
    }

    /// All interfaces.
    pub fn nics(&self) -> impl Iterator<Item = &Nic> {
        self.nics.values()
    }

    /// Hardware address of an interface.
    pub fn mac(&self, index: u32) -> [u8; 6] {
        self.nics.get(&index).map(|nic| nic.mac).unwrap_or_default()
    }

    /// Takes note of the interfaces as they are now.
    pub fn update(&mut self, now: Duration, nics: BTreeMap<u32, Nic>) -> News {
        let mut news = News { any: nics != self.nics, hardware: Vec::new() };
        for nic in nics.values() {
            let before = self.nics.get(&nic.index);
            if nic.carrier && !before.is_some_and(|before| before.carrier) {
                self.stable.insert(nic.index, now + STABLE);
            }
            if before.is_some_and(|before| before.mac != nic.mac) {
                news.hardware.push(nic.index);
            }
        }
        self.stable.retain(|index, at| *at > now && nics.contains_key(index));
        self.nics = nics;
        news
    }

    /// Where an election can take place.
    ///
    /// # Errors
    /// What is in the way.
    pub fn place(&self, now: Duration, config: &RouterConfig) -> Result<Place, Obstacle> {
        if let Some(message) = config.fault() {
            return Err(Obstacle { reason: Reason::Invalid, message, until: None });
        }
        let name = &config.id.interface;
        let no = |message: String, until| Obstacle { reason: Reason::NoInterface, message, until };
        let Some(nic) = self.nics.values().find(|nic| nic.name == *name) else {
            return Err(no(format!("there is no interface {name}"), None));
        };
        if !nic.carrier {
            return Err(no(format!("interface {name} is down or has no carrier"), None));
        }
        if let Some(at) = self.stable.get(&nic.index).filter(|at| **at > now) {
            return Err(no(format!("the carrier of interface {name} has just come back"), Some(*at)));
        }
        let subnet =
            |address: &IpAddr| nic.addresses.iter().find(|net| is_wide(net) && net.contains(address));
        if let Some(stray) = config.addresses.iter().find(|address| subnet(address).is_none()) {
            return Err(no(format!("interface {name} has no address in the subnet of {stray}"), None));
        }
        let mut own = nic.addresses.iter().map(|net| net.addr());
        if let Some(address) = own.find(|address| config.addresses.contains(address)) {
            let message = format!("{address} is on {name} already, put there by another program");
            return Err(Obstacle { reason: Reason::Rejected, message, until: None });
        }
        let source = match config.id.family {
            Family::V4 => config.addresses.first().and_then(subnet).map(IpNet::addr),
            Family::V6 => nic.addresses.iter().map(IpNet::addr).find(is_link_local),
        };
        let source = source.ok_or_else(|| {
            no(format!("interface {name} has no link-local address to send advertisements from"), None)
        })?;
        Ok(Place { index: nic.index, source })
    }

    /// Interfaces on which others can be heard: their names and indices.
    pub fn audible(&self, family: Family) -> impl Iterator<Item = (&str, u32)> {
        let usable = move |nic: &&Nic| {
            nic.carrier && nic.addresses.iter().any(|net| is_wide(net) && Family::of(net.addr()) == family)
        };
        self.nics.values().filter(usable).map(|nic| (nic.name.as_str(), nic.index))
    }

    /// The peers' addresses on the segment of an interface.
    pub fn peers<'a>(
        &'a self,
        index: u32,
        family: Family,
        lan: &'a Lan,
    ) -> impl Iterator<Item = IpAddr> + 'a {
        let own = self.nics.get(&index).map(|nic| nic.addresses.as_slice()).unwrap_or_default();
        let near = move |address: &IpAddr| match family {
            Family::V4 => address.is_ipv4() && own.iter().any(|net| is_wide(net) && net.contains(address)),
            Family::V6 => is_link_local(address),
        };
        let all = lan.peers.iter().flat_map(|peer| &peer.addresses).copied();
        all.filter(move |address| near(address) && !own.iter().any(|net| net.addr() == *address))
    }

    /// Whether an interface has an address.
    pub fn has(&self, interface: &str, address: IpAddr) -> bool {
        let mut nics = self.nics.values().filter(|nic| nic.name == interface);
        nics.any(|nic| nic.addresses.iter().any(|net| net.addr() == address))
    }

    /// Whether an interface is there and does not have an address of ours.
    pub fn is_missing(&self, index: u32, address: IpAddr) -> bool {
        self.nics.get(&index).is_some_and(|nic| !nic.ours.contains(&address))
    }

    /// Whether an interface has an address, by itself alone, that is not marked as ours.
    pub fn is_foreign(&self, index: u32, address: IpAddr) -> bool {
        let single = |net: &&IpNet| net.addr() == address && !is_wide(net);
        self.nics.get(&index).is_some_and(|nic| nic.addresses.iter().any(|net| single(&net)))
    }
}

/// Whether it is of a subnet and no single address.
fn is_wide(net: &IpNet) -> bool {
    net.prefix_len() < net.max_prefix_len()
}

fn is_link_local(address: &IpAddr) -> bool {
    matches!(address, IpAddr::V6(six) if six.is_unicast_link_local())
}

#[cfg(test)]
mod tests {
    use super::*;
    use vip_core::vrrp::{Peer, RouterId};

    const NOW: Duration = Duration::from_secs(100);

    fn nic(change: impl FnOnce(&mut Nic)) -> Network {
        let mut nic = Nic {
            index: 2,
            name: "eth0".into(),
            carrier: true,
            mtu: 1500,
            addresses: ["fe80::1/64", "10.87.0.11/16", "fd87::11/64"].map(|net| net.parse().unwrap()).into(),
            ..Nic::default()
        };
        change(&mut nic);
        Network::new(BTreeMap::from([(nic.index, nic)]))
    }

    fn config(addresses: &[&str]) -> RouterConfig {
        let addresses: Vec<IpAddr> = addresses.iter().map(|address| address.parse().unwrap()).collect();
        let family = addresses.first().map_or(Family::V4, |address| Family::of(*address));
        let id = RouterId { interface: "eth0".into(), family, vrid: 7 };
        RouterConfig {
            id,
            priority: 100,
            interval: NOW / 100,
            preempt: None,
            addresses,
            fresh: [].into(),
            contested: [].into(),
        }
    }

    #[test]
    fn what_is_in_the_way() {
        let fit = nic(|_| {});
        let vip = config(&["10.87.2.50"]);
        assert_eq!(fit.place(NOW, &vip), Ok(Place { index: 2, source: [10, 87, 0, 11].into() }));
        let six = Place { index: 2, source: "fe80::1".parse().unwrap() };
        assert_eq!(fit.place(NOW, &config(&["fd87::50"])), Ok(six));
        assert_eq!(fit.place(NOW, &config(&["fe80::50", "fd87::50"])), Ok(six));
        let of_ours = |nic: &mut Nic| nic.addresses.push("10.87.2.50/32".parse().unwrap());
        let rows = [
            (nic(|nic| nic.name = "eth1".into()), vip.clone(), "there is no interface eth0"),
            (nic(|nic| nic.carrier = false), vip.clone(), "no carrier"),
            (nic(|nic| nic.addresses.clear()), vip.clone(), "no address in the subnet of 10.87.2.50"),
            (nic(|_| {}), config(&["10.87.2.50", "10.88.0.1"]), "no address in the subnet of 10.88.0.1"),
            (
                nic(|_| {}),
                config(&["10.87.0.11"]),
                "10.87.0.11 is on eth0 already, put there by another program",
            ),
            (nic(of_ours), vip.clone(), "10.87.2.50 is on eth0 already, put there by another program"),
            (nic(|_| {}), config(&["fd88::50"]), "no address in the subnet of fd88::50"),
            (
                nic(|nic| nic.addresses = vec!["fd87::11/64".parse().unwrap()]),
                config(&["fd87::50"]),
                "no link-local address",
            ),
            (nic(|_| {}), config(&["fd87::50", "10.87.2.50"]), "not of the virtual router's address family"),
            (nic(|_| {}), config(&[]), "needs an address"),
        ];
        for (network, config, sentence) in rows {
            let obstacle = network.place(NOW, &config).unwrap_err();
            assert!(obstacle.message.contains(sentence), "{obstacle:?}");
        }
        let network = nic(of_ours);
        assert!(network.is_foreign(2, vip.addresses[0]));
        assert!(!network.is_foreign(2, [10, 87, 0, 11].into()), "a VIP of ours may be beside a wider one");
    }

    #[test]
    fn a_carrier_that_came_back_is_trusted_when_it_lasts() {
        let mut network = nic(|_| {});
        let vip = config(&["10.87.2.50"]);
        assert!(network.place(NOW, &vip).is_ok(), "at the start it is trusted");
        let with = |carrier| nic(|nic| nic.carrier = carrier).nics;
        assert!(network.update(NOW, with(false)).any);
        network.update(NOW, with(true));
        let obstacle = network.place(NOW, &vip).unwrap_err();
        assert_eq!(obstacle.until, Some(NOW + STABLE));
        // Lost again meanwhile: the wait starts anew.
        network.update(NOW + STABLE / 2, with(false));
        network.update(NOW + STABLE / 2, with(true));
        assert!(network.place(NOW + STABLE, &vip).is_err());
        assert!(network.place(NOW + STABLE * 2, &vip).is_ok());
        assert_eq!(network.update(NOW + STABLE * 2, with(true)), News::default());
    }

    #[test]
    fn who_is_on_the_segment() {
        let network = nic(|_| {});
        let addresses = ["10.87.0.11", "10.87.0.12", "10.88.0.12", "fe80::1", "fe80::2", "fd87::12"];
        let peer = Peer { addresses: addresses.map(|ip| ip.parse().unwrap()).into(), ..Peer::default() };
        let lan = Lan { peers: vec![peer].into(), ..Lan::default() };
        let near = |family| network.peers(2, family, &lan).collect::<Vec<_>>();
        assert_eq!(near(Family::V4), ["10.87.0.12".parse::<IpAddr>().unwrap()]);
        assert_eq!(near(Family::V6), ["fe80::2".parse::<IpAddr>().unwrap()]);
        assert!(network.has("eth0", "10.87.0.11".parse().unwrap()));
        assert!(!network.has("eth1", "10.87.0.11".parse().unwrap()));
        assert_eq!(network.audible(Family::V4).collect::<Vec<_>>(), [("eth0", 2)]);
        let bare = nic(|nic| nic.addresses = vec!["10.87.2.50/32".parse().unwrap()]);
        assert_eq!(bare.audible(Family::V4).count(), 0);
    }

    #[test]
    fn another_hardware_address_is_news() {
        let mut network = nic(|_| {});
        let news = network.update(NOW, nic(|nic| nic.mac = [2, 0, 0, 0, 0, 1]).nics);
        assert_eq!(news, News { any: true, hardware: vec![2] });
    }
}
