//! The node's interfaces and the virtual IPs bound to them, by rtnetlink.
//!
//! An address of ours carries our protocol number (`IFA_PROTO`, kernel 5.18) and a lifetime: when nobody renews it, the
//! kernel takes it off by itself. What has another protocol number is never changed.

mod conversation;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use ipnet::IpNet;
use rtnetlink::MulticastGroup;
use rtnetlink::packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE, NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, CacheInfo,
};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use tokio::io::unix::AsyncFd;

use conversation::{Conversation, Events};

/// Our `IFA_PROTO`: 0x70 is 112, VRRP's number as an IP protocol. The kernel's own end at 3 (`linux/if_addr.h`).
pub const PROTOCOL: u8 = 0x70;
/// Lifetime of a bound address: how long two nodes may have it when both processes of one of them died, in seconds.
pub const LIFETIME: u32 = 3;
/// How often it is renewed.
pub const RENEW: Duration = Duration::from_secs(1);
/// A network interface as the kernel has it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Nic {
    /// Its index.
    pub index: u32,
    /// Its name.
    pub name: String,
    /// Its hardware address.
    pub mac: [u8; 6],
    /// Whether it is up and has a carrier.
    pub carrier: bool,
    /// The largest packet that it takes, in bytes.
    pub mtu: u32,
    /// Its addresses that can be used, ours left out; those that are deprecated come last.
    pub addresses: Vec<IpNet>,
    /// Addresses that carry our mark.
    pub ours: BTreeSet<IpAddr>,
}

/// What happened to an interface or an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Somebody took one of our addresses off the interface with this index.
    Lost(u32, IpAddr),
    /// One of our addresses on the interface with this index can be used, or was renewed.
    Ready(u32, IpAddr),
    /// Something else: look again.
    Other,
}

/// The conversation with the kernel. What we ask has a socket of its own: an event that others caused carries their
/// sequence number, and could be taken for an answer.
pub struct Addresses {
    conversation: Conversation,
    events: AsyncFd<Events>,
}

/// One of our addresses, by the index of its interface.
pub type Key = (u32, IpAddr);

impl Addresses {
    /// Opens it.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn open() -> io::Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr, MulticastGroup::Ipv6Ifaddr];
        let events = Events::open(&groups.map(|group| group as u32))?;
        // SAFETY: the socket is owned and gives the same descriptor for as long as it lives.
        let events = unsafe { AsyncFd::register(events) }?;
        Ok(Self { conversation: Conversation::open()?, events })
    }

    /// Waits for a change. Dropping it loses nothing.
    pub async fn changed(&self) {
        // What is queued is read to its end before the next wait.
        if let Ok(mut guard) = self.events.readable().await {
            guard.clear_ready();
        }
    }

    /// The changes that are known.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn changes(&mut self) -> io::Result<Vec<Change>> {
        let mut changes = Vec::new();
        if self.events.get_mut().drain(|message| changes.extend(change(message)))? {
            changes.push(Change::Other);
        }
        Ok(changes)
    }

    /// All interfaces by index. Loopback is among them when it has addresses by which the node is known to others, each for itself.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn nics(&mut self) -> io::Result<BTreeMap<u32, Nic>> {
        let (mut nics, mut loopback) = (BTreeMap::new(), BTreeSet::new());
        for entry in self.conversation.dump(&RouteNetlinkMessage::GetLink(LinkMessage::default()))? {
            if let RouteNetlinkMessage::NewLink(link) = entry {
                if link.header.flags.contains(LinkFlags::Loopback) {
                    loopback.insert(link.header.index);
                }
                nics.insert(link.header.index, nic(&link));
            }
        }
        let mut addresses = self.addresses()?;
        addresses.sort_by_key(|address| flags(address).contains(AddressFlags::Deprecated));
        for address in addresses {
            let (Some(nic), Some(ip)) = (nics.get_mut(&address.header.index), ip_of(&address)) else {
                continue;
            };
            if is_ours(&address) {
                nic.ours.insert(ip);
            } else if loopback.contains(&nic.index) {
                nic.addresses.extend((!ip.is_loopback()).then(|| IpNet::from(ip)));
            } else if is_usable(&address)
                && let Ok(net) = IpNet::new(ip, address.header.prefix_len)
            {
                nic.addresses.push(net);
            }
        }
        nics.retain(|index, nic| !loopback.contains(index) || !nic.addresses.is_empty());
        Ok(nics)
    }

    /// All addresses that carry our mark.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn ours(&mut self) -> io::Result<BTreeSet<Key>> {
        let ours = self.addresses()?.into_iter().filter(is_ours);
        Ok(ours.filter_map(|address| Some((address.header.index, ip_of(&address)?))).collect())
    }

    fn addresses(&mut self) -> io::Result<Vec<AddressMessage>> {
        let entries = self.conversation.dump(&RouteNetlinkMessage::GetAddress(AddressMessage::default()))?;
        Ok(entries
            .into_iter()
            .filter_map(|entry| match entry {
                RouteNetlinkMessage::NewAddress(address) => Some(address),
                _ => None,
            })
            .collect())
    }

    /// Binds addresses; how each went. `AlreadyExists`: the interface has it already.
    ///
    /// # Errors
    /// When the conversation itself fails.
    pub fn bind(&mut self, addresses: &[Key]) -> io::Result<Vec<io::Result<()>>> {
        self.set(addresses, NLM_F_CREATE | NLM_F_EXCL)
    }

    /// Renews addresses that are ours; how each went.
    ///
    /// # Errors
    /// When the conversation itself fails.
    pub fn renew(&mut self, addresses: &[Key]) -> io::Result<Vec<io::Result<()>>> {
        self.set(addresses, NLM_F_CREATE | NLM_F_REPLACE)
    }

    fn set(&mut self, addresses: &[Key], flags: u16) -> io::Result<Vec<io::Result<()>>> {
        let request = |(index, address): &Key| {
            let mut message = message(*index, *address);
            let mut lifetime = CacheInfo::default();
            lifetime.ifa_valid = LIFETIME;
            // An IPv6 address is never to become the source of the node's own traffic, which it would outlive.
            lifetime.ifa_preferred = if address.is_ipv4() { LIFETIME } else { 0 };
            message.attributes.extend([
                AddressAttribute::CacheInfo(lifetime),
                AddressAttribute::Flags(AddressFlags::Noprefixroute | AddressFlags::Nodad),
                AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)),
            ]);
            (RouteNetlinkMessage::NewAddress(message), flags)
        };
        self.conversation.each(addresses.iter().map(request).collect())
    }

    /// Takes addresses of ours off; how each went. One that is gone already is no error.
    ///
    /// # Errors
    /// When the conversation itself fails.
    pub fn release(&mut self, addresses: &[Key]) -> io::Result<Vec<io::Result<()>>> {
        let request =
            |(index, address): &Key| (RouteNetlinkMessage::DelAddress(message(*index, *address)), 0);
        let results = self.conversation.each(addresses.iter().map(request).collect())?;
        let forgive = |result: io::Result<()>| match result {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(()),
            result => result,
        };
        Ok(results.into_iter().map(forgive).collect())
    }
}

fn message(index: u32, address: IpAddr) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.index = index;
    (message.header.family, message.header.prefix_len) = match address {
        IpAddr::V4(_) => (AddressFamily::Inet, 32),
        IpAddr::V6(_) => (AddressFamily::Inet6, 128),
    };
    message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
    message
}

/// What an event means.
fn change(message: NetlinkMessage<RouteNetlinkMessage>) -> Option<Change> {
    match message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(address)) if is_ours(&address) => {
            Some(Change::Lost(address.header.index, ip_of(&address)?))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(address)) if is_ours(&address) => {
            Some(Change::Ready(address.header.index, ip_of(&address)?))
        }
        NetlinkPayload::Overrun(_) | NetlinkPayload::InnerMessage(_) => Some(Change::Other),
        _ => None,
    }
}

fn is_ours(message: &AddressMessage) -> bool {
    message.attributes.contains(&AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)))
}

fn flags(message: &AddressMessage) -> AddressFlags {
    let all = message.attributes.iter().find_map(|attribute| match attribute {
        AddressAttribute::Flags(flags) => Some(*flags),
        _ => None,
    });
    all.unwrap_or_else(|| AddressFlags::from_bits_retain(message.header.flags.bits().into()))
}

/// Whether it can be spoken from: duplicate address detection has passed it (RFC 4862 section 5.4).
fn is_usable(message: &AddressMessage) -> bool {
    let flags = flags(message);
    let tentative = flags.contains(AddressFlags::Tentative) && !flags.contains(AddressFlags::Optimistic);
    !tentative && !flags.contains(AddressFlags::Dadfailed)
}

/// The address itself: `IFA_LOCAL` where there is one, for on a point-to-point link `IFA_ADDRESS` is the other end.
fn ip_of(message: &AddressMessage) -> Option<IpAddr> {
    let local = message
        .attributes
        .iter()
        .find_map(|a| if let AddressAttribute::Local(ip) = a { Some(*ip) } else { None });
    local.or_else(|| {
        message
            .attributes
            .iter()
            .find_map(|a| if let AddressAttribute::Address(ip) = a { Some(*ip) } else { None })
    })
}

fn nic(link: &LinkMessage) -> Nic {
    let mut nic = Nic {
        index: link.header.index,
        carrier: link.header.flags.contains(LinkFlags::Up | LinkFlags::LowerUp),
        ..Nic::default()
    };
    for attribute in &link.attributes {
        match attribute {
            LinkAttribute::IfName(name) => nic.name.clone_from(name),
            LinkAttribute::Mtu(mtu) => nic.mtu = *mtu,
            LinkAttribute::Address(mac) => nic.mac = mac.as_slice().try_into().unwrap_or_default(),
            _ => {}
        }
    }
    nic
}
