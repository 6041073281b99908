//! Adverts as another host of the LAN hears them, with the kernel's time of each.

use std::{
    io::IoSliceMut,
    net::Ipv4Addr,
    os::fd::{AsRawFd as _, OwnedFd},
    time::{Duration, Instant, SystemTime, UNIX_EPOCH},
};

use anyhow::{Context, Result, bail};
use lab::Host;
use nix::{
    errno::Errno,
    sys::{
        socket::{
            AddressFamily, ControlMessageOwned, MsgFlags, SockFlag, SockProtocol, SockType, recvmsg,
            setsockopt, socket,
            sockopt::{RcvBufForce, ReceiveTimeout, ReceiveTimestampns},
        },
        time::{TimeSpec, TimeVal},
    },
};

/// Ethernet's header, before IPv4's.
const ETHERNET: usize = 14;
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
    /// Hears what comes in from now on.
    pub fn open(host: &Host) -> Result<Self> {
        let opened = host.run(|| {
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthIp)
        })?;
        let socket = opened.context("can't open a packet socket (are you root?)")?;
        setsockopt(&socket, ReceiveTimestampns, &true)?;
        setsockopt(&socket, RcvBufForce, &(16 << 20))?;
        setsockopt(&socket, ReceiveTimeout, &TimeVal::new(0, 50_000))?;
        Ok(Self { socket })
    }

    /// The next advert, waited for until then.
    pub fn hear(&self, deadline: Instant) -> Result<Option<Heard>> {
        let mut frame = [0; 2048];
        while Instant::now() < deadline {
            let mut space = nix::cmsg_space!(TimeSpec);
            let mut parts = [IoSliceMut::new(&mut frame)];
            let got = recvmsg::<()>(self.socket.as_raw_fd(), &mut parts, Some(&mut space), MsgFlags::empty());
            let (at, length) = match got {
                Ok(message) => {
                    let at = message.cmsgs()?.find_map(|one| match one {
                        ControlMessageOwned::ScmTimestampns(at) => Some(Duration::from(at)),
                        _ => None,
                    });
                    (at.context("a frame without a time")?, message.bytes)
                }
                Err(Errno::EAGAIN | Errno::EINTR) => continue,
                Err(error) => bail!("can't hear: {error}"),
            };
            let advert = read(&frame[..length], at);
            if advert.is_some() {
                return Ok(advert);
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
