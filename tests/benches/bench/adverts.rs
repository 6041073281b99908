//! What a host hears on its LAN, adverts above all, with the kernel's time of each.

use std::{
    net::Ipv4Addr,
    os::fd::OwnedFd,
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::Result;
use lab::{Host, packets};
use nix::sys::{
    socket::{MsgFlags, SockProtocol, setsockopt, sockopt::ReceiveTimeout},
    time::TimeVal,
};

/// Ethernet's header, before IPv4's.
pub const ETHERNET: usize = 14;
/// VRRP's protocol number.
const VRRP: u8 = 112;

/// An advert over IPv4.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Heard {
    /// By the clock of the day.
    pub at: Duration,
    pub source: Ipv4Addr,
    pub vrid: u8,
    pub priority: u8,
}

/// A packet socket in a host.
pub struct Ear {
    socket: OwnedFd,
}

impl Ear {
    /// Hears what comes in at a host from now on.
    pub fn open(host: &Host) -> Result<Self> {
        host.run(Self::here)?
    }

    /// Hears what comes in where this thread is.
    pub fn here() -> Result<Self> {
        let socket = packets::open(SockProtocol::EthIp, 16 << 20)?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 50_000))?;
        Ok(Self { socket })
    }

    /// The next advert, waited for until then.
    pub fn hear(&self, deadline: Instant) -> Result<Option<Heard>> {
        self.find(deadline, read)
    }

    /// The first frame in which there is something, by its bytes and its time by the clock of the day; waited for until then.
    pub fn find<T>(
        &self,
        deadline: Instant,
        read: impl Fn(&[u8], Duration) -> Option<T>,
    ) -> Result<Option<T>> {
        let mut frame = [0; 2048];
        while Instant::now() < deadline {
            let Some(heard) = packets::next(&self.socket, &mut frame, MsgFlags::empty())? else { continue };
            let found = read(heard.bytes, heard.at);
            if found.is_some() {
                return Ok(found);
            }
        }
        Ok(None)
    }
}

/// How long ago that was.
pub fn age(at: Duration) -> Duration {
    SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().saturating_sub(at)
}

fn read(frame: &[u8], at: Duration) -> Option<Heard> {
    let packet = frame.get(ETHERNET..)?;
    let header = usize::from(packet.first()? & 0xf) * 4;
    if *packet.get(9)? != VRRP {
        return None;
    }
    let source = Ipv4Addr::from(<[u8; 4]>::try_from(packet.get(12..16)?).ok()?);
    let advert = packet.get(header..)?;
    Some(Heard { at, source, vrid: *advert.get(1)?, priority: *advert.get(2)? })
}
