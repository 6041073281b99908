//! What a host hears on its LAN, adverts above all, with the kernel's time of each.

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
        let opened =
            socket(AddressFamily::Packet, SockType::Raw, SockFlag::SOCK_CLOEXEC, SockProtocol::EthIp);
        let socket = opened.context("can't open a packet socket (are you root?)")?;
        setsockopt(&socket, ReceiveTimestampns, &true)?;
        setsockopt(&socket, RcvBufForce, &(16 << 20))?;
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
            let found = read(&frame[..length], at);
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
