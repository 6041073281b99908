//! The words of IPVS's netlink interface, in bytes. Numbers, names and meanings are those of `linux/ip_vs.h`.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use vip_core::plan::{Change, NOT_MASQUERADED, Protocol, ServiceKey, Settings};

use super::super::netlink::{Attributes, array, attribute, octets, text};

/// `IPVS_GENL_VERSION`
pub(super) const VERSION: u8 = 1;

/// `IPVS_CMD_*`. The flush is left out on purpose: the table is everybody's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Command {
    NewService = 1,
    SetService = 2,
    DeleteService = 3,
    GetService = 4,
    NewDestination = 5,
    SetDestination = 6,
    DeleteDestination = 7,
    GetDestination = 8,
}

// IPVS_CMD_ATTR_*
const SERVICE: u16 = 1;
const DESTINATION: u16 = 2;

// IPVS_SVC_ATTR_*
const SVC_AF: u16 = 1;
const SVC_PROTOCOL: u16 = 2;
const SVC_ADDR: u16 = 3;
const SVC_PORT: u16 = 4;
const SVC_FWMARK: u16 = 5;
const SVC_SCHED_NAME: u16 = 6;
const SVC_FLAGS: u16 = 7;
const SVC_TIMEOUT: u16 = 8;
const SVC_NETMASK: u16 = 9;

// IPVS_DEST_ATTR_*
const DEST_ADDR: u16 = 1;
const DEST_PORT: u16 = 2;
const DEST_FWD_METHOD: u16 = 3;
const DEST_WEIGHT: u16 = 4;
const DEST_U_THRESH: u16 = 5;
const DEST_L_THRESH: u16 = 6;
const DEST_ACTIVE_CONNS: u16 = 7;
const DEST_ADDR_FAMILY: u16 = 11;

/// `IP_VS_SVC_F_PERSISTENT`. The kernel adds 0x2 (hashed) by itself, which says nothing.
const PERSISTENT: u32 = 0x1;
/// `IP_VS_CONN_F_FWD_MASK` and `IP_VS_CONN_F_MASQ`
const FORWARDING_MASK: u32 = 0x7;
const MASQUERADE: u32 = 0;

const AF_INET: u16 = 2;
const AF_INET6: u16 = 10;

/// The message for a step; `None` for the steps that don't concern IPVS.
pub(super) fn step(change: &Change) -> Option<(Command, Attributes)> {
    Some(match change {
        Change::AddService(key, settings) => (Command::NewService, whole(key, settings)),
        Change::SetService(key, settings) => (Command::SetService, whole(key, settings)),
        Change::DeleteService(key) => (Command::DeleteService, name(key)),
        Change::AddDestination(key, to, weight) => (Command::NewDestination, weighted(key, to, *weight)),
        Change::SetDestination(key, to, weight) => (Command::SetDestination, weighted(key, to, *weight)),
        Change::DeleteDestination(key, to) => {
            (Command::DeleteDestination, name(key).nested(DESTINATION, &destination_name(to)))
        }
        Change::Guard(_)
        | Change::Unguard(_)
        | Change::Restrict(..)
        | Change::Unrestrict(_)
        | Change::Direct(..)
        | Change::Indirect(_)
        | Change::Open(_)
        | Change::Close(_) => return None,
    })
}

/// What names a service.
pub(super) fn name(key: &ServiceKey) -> Attributes {
    Attributes::new().nested(SERVICE, &service_name(key))
}

fn service_name(key: &ServiceKey) -> Attributes {
    Attributes::new()
        .u16(SVC_AF, family(key.address))
        .u16(SVC_PROTOCOL, u16::from(key.protocol.number()))
        .bytes(SVC_ADDR, &union(key.address))
        .be16(SVC_PORT, key.port)
}

/// A service with all that the kernel wants to know when it is made or changed.
fn whole(key: &ServiceKey, settings: &Settings) -> Attributes {
    let flags = if settings.persistence.is_some() { PERSISTENT } else { 0 };
    // An IPv4 mask as it is on the wire, but an IPv6 prefix length in the host's order. Persistence is for each client.
    let mask = if key.address.is_ipv4() { u32::MAX } else { 128 };
    let service = service_name(key)
        .text(SVC_SCHED_NAME, &settings.scheduler)
        .bytes(SVC_FLAGS, &[flags.to_ne_bytes(), u32::MAX.to_ne_bytes()].concat())
        .u32(SVC_TIMEOUT, settings.persistence.unwrap_or(0))
        .u32(SVC_NETMASK, mask);
    Attributes::new().nested(SERVICE, &service)
}

fn destination_name(to: &SocketAddr) -> Attributes {
    Attributes::new()
        .bytes(DEST_ADDR, &union(to.ip()))
        .be16(DEST_PORT, to.port())
        .u16(DEST_ADDR_FAMILY, family(to.ip()))
}

fn weighted(key: &ServiceKey, to: &SocketAddr, weight: u32) -> Attributes {
    let destination = destination_name(to)
        .u32(DEST_FWD_METHOD, MASQUERADE)
        .u32(DEST_WEIGHT, weight)
        .u32(DEST_U_THRESH, 0)
        .u32(DEST_L_THRESH, 0);
    name(key).nested(DESTINATION, &destination)
}

/// A service in an answer. `None` for what can't be ours: by firewall mark, of another transport, or cut off.
pub(super) fn service(answer: &[u8]) -> Option<(ServiceKey, Settings)> {
    let service = attribute(answer, SERVICE)?;
    if attribute(service, SVC_FWMARK).is_some() {
        return None;
    }
    let protocol = u16::from_ne_bytes(array(attribute(service, SVC_PROTOCOL)?, 0)?);
    let protocol = u8::try_from(protocol).ok().and_then(Protocol::of)?;
    let family = u16::from_ne_bytes(array(attribute(service, SVC_AF)?, 0)?);
    let address = address(attribute(service, SVC_ADDR)?, family)?;
    let port = u16::from_be_bytes(array(attribute(service, SVC_PORT)?, 0)?);
    let flags = attribute(service, SVC_FLAGS).and_then(|bytes| array(bytes, 0)).map_or(0, u32::from_ne_bytes);
    let timeout =
        attribute(service, SVC_TIMEOUT).and_then(|bytes| array(bytes, 0)).map_or(0, u32::from_ne_bytes);
    let settings = Settings {
        scheduler: attribute(service, SVC_SCHED_NAME).map(text).unwrap_or_default(),
        persistence: (flags & PERSISTENT != 0).then_some(timeout),
    };
    Some((ServiceKey { address, protocol, port }, settings))
}

/// A destination in an answer, with its weight.
pub(super) fn destination(answer: &[u8], key: &ServiceKey) -> Option<(SocketAddr, u32)> {
    let destination = attribute(answer, DESTINATION)?;
    let weight = match number(destination, DEST_FWD_METHOD)? & FORWARDING_MASK {
        MASQUERADE => number(destination, DEST_WEIGHT)?,
        _ => NOT_MASQUERADED,
    };
    Some((place(destination, key)?, weight))
}

/// A destination in an answer, with the number of its open connections.
pub(super) fn connections(answer: &[u8], key: &ServiceKey) -> Option<(SocketAddr, u32)> {
    let destination = attribute(answer, DESTINATION)?;
    Some((place(destination, key)?, number(destination, DEST_ACTIVE_CONNS)?))
}

fn place(destination: &[u8], key: &ServiceKey) -> Option<SocketAddr> {
    let af =
        attribute(destination, DEST_ADDR_FAMILY).and_then(|bytes| array(bytes, 0)).map(u16::from_ne_bytes);
    let address = address(attribute(destination, DEST_ADDR)?, af.unwrap_or(family(key.address)))?;
    let port = u16::from_be_bytes(array(attribute(destination, DEST_PORT)?, 0)?);
    Some(SocketAddr::new(address, port))
}

fn number(destination: &[u8], kind: u16) -> Option<u32> {
    attribute(destination, kind).and_then(|bytes| array(bytes, 0)).map(u32::from_ne_bytes)
}

fn family(address: IpAddr) -> u16 {
    if address.is_ipv4() { AF_INET } else { AF_INET6 }
}

/// `union nf_inet_addr`: 16 bytes, an IPv4 address in the first four.
fn union(address: IpAddr) -> [u8; 16] {
    let mut bytes = [0; 16];
    for (byte, octet) in bytes.iter_mut().zip(octets(address)) {
        *byte = octet;
    }
    bytes
}

fn address(union: &[u8], family: u16) -> Option<IpAddr> {
    match family {
        AF_INET => Some(Ipv4Addr::from(array::<4>(union, 0)?).into()),
        AF_INET6 => Some(Ipv6Addr::from(array::<16>(union, 0)?).into()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use vip_core::api::Scheduler;

    use super::*;
    use crate::dataplane::netlink::noise::nearly;

    fn key() -> ServiceKey {
        ServiceKey { address: [10, 87, 2, 50].into(), protocol: Protocol::Tcp, port: 80 }
    }

    fn pod() -> SocketAddr {
        SocketAddr::from(([10, 244, 1, 7], 8080))
    }

    #[rustfmt::skip]
    const SERVICE_NAME: [u8; 44] = [
        6, 0, 1, 0, 2, 0, 0, 0, // AF
        6, 0, 2, 0, 6, 0, 0, 0, // protocol
        20, 0, 3, 0, 10, 87, 2, 50, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, // address
        6, 0, 4, 0, 0, 80, 0, 0, // port
    ];

    #[test]
    fn golden_new_service() {
        let add = Change::AddService(key(), Settings::new(Scheduler::Wlc, Some(300)));
        let (command, attributes) = step(&add).unwrap();
        #[rustfmt::skip]
        let settings = [
            8, 0, 6, 0, b'w', b'l', b'c', 0,
            12, 0, 7, 0, 1, 0, 0, 0, 255, 255, 255, 255,
            8, 0, 8, 0, 44, 1, 0, 0,
            8, 0, 9, 0, 255, 255, 255, 255,
        ];
        assert_eq!(command as u8, 1);
        assert_eq!(attributes.as_bytes(), [&[84, 0, 1, 0x80], &SERVICE_NAME[..], &settings].concat());
    }

    #[test]
    fn golden_new_destination() {
        let (command, attributes) = step(&Change::AddDestination(key(), pod(), 3)).unwrap();
        #[rustfmt::skip]
        let destination = [
            72, 0, 2, 0x80,
            20, 0, 1, 0, 10, 244, 1, 7, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0,
            6, 0, 2, 0, 0x1f, 0x90, 0, 0,
            6, 0, 11, 0, 2, 0, 0, 0,
            8, 0, 3, 0, 0, 0, 0, 0,
            8, 0, 4, 0, 3, 0, 0, 0,
            8, 0, 5, 0, 0, 0, 0, 0,
            8, 0, 6, 0, 0, 0, 0, 0,
        ];
        assert_eq!(command as u8, 5);
        assert_eq!(attributes.as_bytes(), [&[48, 0, 1, 0x80], &SERVICE_NAME[..], &destination].concat());
    }

    fn six() -> ServiceKey {
        ServiceKey { address: "fd87::2:50".parse().unwrap(), protocol: Protocol::Udp, port: 53 }
    }

    #[test]
    fn golden_ipv6() {
        let add = Change::AddService(six(), Settings::new(Scheduler::Rr, Some(60)));
        #[rustfmt::skip]
        let service = [
            6, 0, 1, 0, 10, 0, 0, 0,
            6, 0, 2, 0, 17, 0, 0, 0,
            20, 0, 3, 0, 0xfd, 0x87, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0x50,
            6, 0, 4, 0, 0, 53, 0, 0,
            7, 0, 6, 0, b'r', b'r', 0, 0,
            12, 0, 7, 0, 1, 0, 0, 0, 255, 255, 255, 255,
            8, 0, 8, 0, 60, 0, 0, 0,
            8, 0, 9, 0, 128, 0, 0, 0, // a prefix length
        ];
        assert_eq!(step(&add).unwrap().1.as_bytes(), [&[84, 0, 1, 0x80], &service[..]].concat());
        let pod = SocketAddr::from(([0xfd10, 0x244, 1, 0, 0, 0, 0, 7], 8080));
        #[rustfmt::skip]
        let destination = [
            40, 0, 2, 0x80,
            20, 0, 1, 0, 0xfd, 0x10, 2, 0x44, 0, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 7,
            6, 0, 2, 0, 0x1f, 0x90, 0, 0,
            6, 0, 11, 0, 10, 0, 0, 0,
        ];
        let delete = Change::DeleteDestination(six(), pod);
        let expected = [&[48, 0, 1, 0x80], &service[..44], &destination].concat();
        assert_eq!(step(&delete).unwrap().1.as_bytes(), expected);
    }

    #[test]
    fn what_is_written_is_read_back() {
        for key in [key(), six()] {
            for settings in [Settings::new(Scheduler::Mh, None), Settings::new(Scheduler::Rr, Some(10_800))] {
                assert_eq!(service(whole(&key, &settings).as_bytes()), Some((key, settings)));
            }
            let pod = SocketAddr::new(key.address, 9376);
            assert_eq!(destination(weighted(&key, &pod, 0).as_bytes(), &key), Some((pod, 0)));
            let busy = destination_name(&pod).u32(DEST_ACTIVE_CONNS, 7).u32(DEST_ACTIVE_CONNS + 1, 9);
            let busy = Attributes::new().nested(DESTINATION, &busy);
            assert_eq!(connections(busy.as_bytes(), &key), Some((pod, 7)));
        }
    }

    /// As the kernel answers: more attributes, in its order, with its own flag.
    #[test]
    fn a_service_as_the_kernel_shows_it() {
        let shown = Attributes::new()
            .u16(SVC_AF, AF_INET)
            .u16(SVC_PROTOCOL, 6)
            .bytes(SVC_ADDR, &union(key().address))
            .be16(SVC_PORT, 80)
            .text(SVC_SCHED_NAME, "wlc")
            .bytes(SVC_FLAGS, &[2, 0, 0, 0, 255, 255, 255, 255])
            .u32(SVC_TIMEOUT, 0)
            .u32(SVC_NETMASK, u32::MAX)
            .nested(10, &Attributes::new().u32(1, 5))
            .u32(99, 1);
        let shown = Attributes::new().nested(SERVICE, &shown);
        assert_eq!(service(shown.as_bytes()), Some((key(), Settings::new(Scheduler::Wlc, None))));
    }

    #[test]
    fn what_others_have_is_left_out_or_marked() {
        let marked = Attributes::new().u16(SVC_AF, AF_INET).u32(SVC_FWMARK, 7).text(SVC_SCHED_NAME, "rr");
        assert_eq!(service(Attributes::new().nested(SERVICE, &marked).as_bytes()), None);
        let esp = Attributes::new()
            .u16(SVC_AF, 2)
            .u16(SVC_PROTOCOL, 50)
            .bytes(SVC_ADDR, &[0; 16])
            .be16(SVC_PORT, 9);
        assert_eq!(service(Attributes::new().nested(SERVICE, &esp).as_bytes()), None);
        let odd =
            Attributes::new().u16(SVC_AF, 7).u16(SVC_PROTOCOL, 6).bytes(SVC_ADDR, &[0; 16]).be16(SVC_PORT, 9);
        assert_eq!(service(Attributes::new().nested(SERVICE, &odd).as_bytes()), None);
        let tunnel = destination_name(&pod()).u32(DEST_FWD_METHOD, 2).u32(DEST_WEIGHT, 1);
        let tunnel = Attributes::new().nested(DESTINATION, &tunnel);
        assert_eq!(destination(tunnel.as_bytes(), &key()), Some((pod(), NOT_MASQUERADED)));
    }

    #[test]
    fn what_is_cut_off_is_left_out() {
        let settings = Settings::new(Scheduler::Wlc, None);
        let whole = whole(&key(), &settings);
        for length in 0..whole.as_bytes().len() {
            assert_eq!(service(&whole.as_bytes()[..length]), None);
        }
        let short = Attributes::new().u16(SVC_AF, AF_INET6).u16(SVC_PROTOCOL, 6).bytes(SVC_ADDR, &[1; 5]);
        assert_eq!(service(Attributes::new().nested(SERVICE, &short.be16(SVC_PORT, 1)).as_bytes()), None);
    }

    /// Bytes from nowhere, and a service with its destination with some bytes changed or cut off.
    fn answer() -> impl Strategy<Value = Vec<u8>> {
        let settings = Settings::new(Scheduler::Wlc, Some(300));
        let whole = [key(), six()].map(|key| {
            let pod = SocketAddr::new(key.address, 9376);
            // A destination comes with its service's name, which stands before it.
            let service = attribute(whole(&key, &settings).as_bytes(), SERVICE).map(<[u8]>::to_vec);
            let to = attribute(weighted(&key, &pod, 3).as_bytes(), DESTINATION).map(<[u8]>::to_vec);
            let parts = Attributes::new().bytes(SERVICE, &service.unwrap()).bytes(DESTINATION, &to.unwrap());
            parts.as_bytes().to_vec()
        });
        nearly(whole.to_vec(), 300)
    }

    proptest! {
        #[test]
        fn any_bytes_are_a_service_and_a_destination_or_nothing(bytes in answer()) {
            if let Some((key, settings)) = service(&bytes) {
                prop_assert!(settings.scheduler.len() <= bytes.len() * 3);
                // What was understood is what would be written.
                prop_assert_eq!(service(whole(&key, &settings).as_bytes()), Some((key, settings)));
            }
            for key in [key(), six()] {
                let places = [destination(&bytes, &key), connections(&bytes, &key)].map(|found| found.map(|(to, _)| to));
                prop_assert!(places.contains(&None) || places[0] == places[1]);
                if let Some((to, weight)) = destination(&bytes, &key) && weight != NOT_MASQUERADED {
                    prop_assert_eq!(destination(weighted(&key, &to, weight).as_bytes(), &key), Some((to, weight)));
                }
            }
        }
    }
}
