//! The node's interfaces and the virtual IPs bound to them, by rtnetlink.
//!
//! An address of ours carries our protocol number (`IFA_PROTO`, kernel 5.18) and a lifetime: when nobody renews it, the
//! kernel takes it off by itself. What has another protocol number is never changed.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::Duration;

use futures::channel::mpsc::UnboundedReceiver;
use futures::{FutureExt, StreamExt, TryStreamExt};
use ipnet::IpNet;
use rtnetlink::packet_core::{NetlinkMessage, NetlinkPayload};
use rtnetlink::packet_route::address::{
    AddressAttribute, AddressFlags, AddressMessage, AddressProtocol, CacheInfo,
};
use rtnetlink::packet_route::link::{LinkAttribute, LinkFlags, LinkMessage};
use rtnetlink::packet_route::{AddressFamily, RouteNetlinkMessage};
use rtnetlink::sys::SocketAddr;
use rtnetlink::{Handle, MulticastGroup};

/// Our `IFA_PROTO`: 0x70 is 112, VRRP's number as an IP protocol. The kernel's own end at 3 (`linux/if_addr.h`).
pub const PROTOCOL: u8 = 0x70;
/// Lifetime of a bound address: how long two nodes may have it when both processes of one of them died, in seconds.
pub const LIFETIME: u32 = 3;
/// How often it is renewed.
pub const RENEW: Duration = Duration::from_secs(1);
/// How long to wait before rtnetlink is opened again.
const REOPEN: Duration = Duration::from_millis(100);

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
    /// Its addresses, ours left out.
    pub addresses: Vec<IpNet>,
    /// Addresses that carry our mark.
    pub ours: BTreeSet<IpAddr>,
}

/// What happened to an interface or an address.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Change {
    /// Somebody took one of our addresses off the interface with this index.
    Lost(u32, IpAddr),
    /// Something else: look again.
    Other,
}

/// The conversation with the kernel. What we ask has a socket of its own: an event that others caused carries their
/// sequence number, and could be taken for an answer.
pub struct Addresses {
    handle: Handle,
    messages: UnboundedReceiver<(NetlinkMessage<RouteNetlinkMessage>, SocketAddr)>,
}

impl Addresses {
    /// Opens it, on tasks of the current runtime.
    ///
    /// # Errors
    /// When the kernel gives no netlink socket.
    pub fn open() -> io::Result<Self> {
        let groups = [MulticastGroup::Link, MulticastGroup::Ipv4Ifaddr];
        let (events, _, messages) = rtnetlink::new_multicast_connection(&groups)?;
        let (answers, handle, _) = rtnetlink::new_connection()?;
        tokio::spawn(events);
        tokio::spawn(answers);
        Ok(Self { handle, messages })
    }

    /// Waits for the next change. Dropping it loses nothing.
    pub async fn changed(&mut self) -> Change {
        loop {
            match self.messages.next().await {
                Some((message, _)) => {
                    if let Some(change) = change(message) {
                        return change;
                    }
                }
                None => {
                    // The kernel ended the conversation: begin another, and look at everything anew.
                    tokio::time::sleep(REOPEN).await;
                    if let Ok(another) = Self::open() {
                        *self = another;
                        return Change::Other;
                    }
                }
            }
        }
    }

    /// A change that is known already.
    pub fn queued(&mut self) -> Option<Change> {
        loop {
            let (message, _) = self.messages.next().now_or_never()??;
            if let Some(change) = change(message) {
                return Some(change);
            }
        }
    }

    /// All interfaces by index, loopback left out.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn nics(&self) -> io::Result<BTreeMap<u32, Nic>> {
        let mut nics = BTreeMap::new();
        let mut links = self.handle.link().get().execute();
        while let Some(link) = links.try_next().await.map_err(to_io)? {
            if !link.header.flags.contains(LinkFlags::Loopback) {
                nics.insert(link.header.index, nic(&link));
            }
        }
        let mut addresses = self.handle.address().get().execute();
        while let Some(address) = addresses.try_next().await.map_err(to_io)? {
            let (Some(nic), Some(ip)) = (nics.get_mut(&address.header.index), ip_of(&address)) else {
                continue;
            };
            if is_ours(&address) {
                nic.ours.insert(ip);
            } else if let Ok(net) = IpNet::new(ip, address.header.prefix_len) {
                nic.addresses.push(net);
            }
        }
        Ok(nics)
    }

    /// All IPv4 addresses that carry our mark, with the index of their interface.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn ours(&self) -> io::Result<BTreeSet<(u32, IpAddr)>> {
        let mut request = self.handle.address().get();
        request.message_mut().header.family = AddressFamily::Inet;
        let mut addresses = request.execute();
        let mut ours = BTreeSet::new();
        while let Some(address) = addresses.try_next().await.map_err(to_io)? {
            if let Some(ip) = ip_of(&address).filter(|_| is_ours(&address)) {
                ours.insert((address.header.index, ip));
            }
        }
        Ok(ours)
    }

    /// Binds an address, or renews it when it is ours already.
    ///
    /// # Errors
    /// `AlreadyExists` when the interface has it from somebody else; else what the kernel says.
    pub async fn bind(&self, index: u32, address: IpAddr, renew: bool) -> io::Result<()> {
        let request = self.handle.address().add(index, address, host_prefix(address));
        let mut request = if renew { request.replace() } else { request };
        let message = request.message_mut();
        let mut lifetime = CacheInfo::default();
        lifetime.ifa_valid = LIFETIME;
        lifetime.ifa_preferred = LIFETIME;
        message.attributes.retain(|a| !matches!(a, AddressAttribute::Broadcast(_)));
        message.attributes.extend([
            AddressAttribute::CacheInfo(lifetime),
            AddressAttribute::Flags(AddressFlags::Noprefixroute),
            AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)),
        ]);
        request.execute().await.map_err(to_io)
    }

    /// Takes an address of ours off. One that is gone already is no error.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn release(&self, index: u32, address: IpAddr) -> io::Result<()> {
        let mut message = AddressMessage::default();
        message.header.index = index;
        message.header.prefix_len = host_prefix(address);
        message.header.family = match address {
            IpAddr::V4(_) => AddressFamily::Inet,
            IpAddr::V6(_) => AddressFamily::Inet6,
        };
        message.attributes = vec![AddressAttribute::Local(address), AddressAttribute::Address(address)];
        match self.handle.address().del(message).execute().await.map_err(to_io) {
            Err(error) if matches!(error.raw_os_error(), Some(libc::EADDRNOTAVAIL | libc::ENODEV)) => Ok(()),
            result => result,
        }
    }
}

/// What an event means; the echo of our own work means nothing.
fn change(message: NetlinkMessage<RouteNetlinkMessage>) -> Option<Change> {
    match message.payload {
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::DelAddress(address)) if is_ours(&address) => {
            Some(Change::Lost(address.header.index, ip_of(&address)?))
        }
        NetlinkPayload::InnerMessage(RouteNetlinkMessage::NewAddress(address)) if is_ours(&address) => None,
        // Events were lost, or it is one of an interface or an address of others.
        NetlinkPayload::Overrun(_) | NetlinkPayload::InnerMessage(_) => Some(Change::Other),
        _ => None,
    }
}

fn host_prefix(address: IpAddr) -> u8 {
    if address.is_ipv4() { 32 } else { 128 }
}

fn is_ours(message: &AddressMessage) -> bool {
    message.attributes.contains(&AddressAttribute::Protocol(AddressProtocol::Other(PROTOCOL)))
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
            LinkAttribute::Address(mac) => nic.mac = mac.as_slice().try_into().unwrap_or_default(),
            _ => {}
        }
    }
    nic
}

/// The kernel's error number, where there is one.
fn to_io(error: rtnetlink::Error) -> io::Error {
    match error {
        rtnetlink::Error::NetlinkError(message) => message.to_io(),
        other => io::Error::other(other.to_string()),
    }
}
