//! A packet socket on one interface, for one protocol of Ethernet: it hears what the host's firewall would drop, and
//! sends past it. It knows nothing of what it carries.

use std::io;
use std::mem::{size_of, zeroed};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, FromRawFd, OwnedFd, RawFd};
use std::time::{Duration, SystemTime};

/// What a socket queues, in bytes as the kernel counts them (it doubles the number): several seconds of two hundred virtual
/// routers, so that a process that was paused hears what happened meanwhile. The default holds a hundred advertisements or
/// two, and what comes after them is dropped.
const QUEUE: libc::c_int = 4 << 20;

/// An instruction of a filter in classic BPF.
pub type Instruction = libc::sock_filter;

/// A frame that was received, without its Ethernet header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame<'a> {
    /// Its sender's hardware address, by the Ethernet header.
    pub source: [u8; 6],
    /// Whether it came in by the socket's own interface; else by a VLAN on top of that one, which has its own socket.
    pub own: bool,
    /// Whether it was sent to this host; else a card that hears everything has heard it.
    pub here: bool,
    /// How long ago it arrived, by the wall clock: after that was set, anything.
    pub age: Duration,
    /// What it carries, padding included, cut at the buffer's size.
    pub bytes: &'a [u8],
}

/// The socket.
#[derive(Debug)]
pub struct PacketSocket {
    fd: OwnedFd,
    index: i32,
    protocol: u16,
}

impl PacketSocket {
    /// Opens it on an interface for a protocol (`ETH_P_*`). Frames that the filter returns 0 for are not queued, nor
    /// are frames that this host sends. It does not block.
    ///
    /// # Errors
    /// `PermissionDenied` without NET_RAW; else what the kernel says.
    pub fn open(index: u32, protocol: i32, filter: &mut [Instruction]) -> io::Result<Self> {
        let index = i32::try_from(index).map_err(io::Error::other)?;
        let protocol = u16::try_from(protocol).map_err(io::Error::other)?;
        // Protocol 0: nothing is queued until the filter is in place and the socket is bound.
        let kind = libc::SOCK_DGRAM | libc::SOCK_NONBLOCK | libc::SOCK_CLOEXEC;
        // SAFETY: a plain system call; the result is checked before it becomes an owned descriptor.
        let fd = unsafe { libc::socket(libc::AF_PACKET, kind, 0) };
        if fd < 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: `fd` is a fresh descriptor that nobody else owns.
        let this = Self { fd: unsafe { OwnedFd::from_raw_fd(fd) }, index, protocol };
        let on: libc::c_int = 1;
        this.set(libc::SOL_PACKET, libc::PACKET_IGNORE_OUTGOING, &on)?;
        this.set(libc::SOL_SOCKET, libc::SO_TIMESTAMPNS, &on)?;
        // Without NET_ADMIN the system's limit holds (net.core.rmem_max).
        this.set(libc::SOL_SOCKET, libc::SO_RCVBUFFORCE, &QUEUE)
            .or_else(|_| this.set(libc::SOL_SOCKET, libc::SO_RCVBUF, &QUEUE))?;
        if !filter.is_empty() {
            let len = libc::c_ushort::try_from(filter.len()).map_err(io::Error::other)?;
            let program = libc::sock_fprog { len, filter: filter.as_mut_ptr() };
            this.set(libc::SOL_SOCKET, libc::SO_ATTACH_FILTER, &program)?;
        }
        let address = this.link_address([0; 6]);
        // SAFETY: `address` is a valid sockaddr_ll and its size is given.
        let bound = unsafe { libc::bind(fd, (&raw const address).cast(), socklen::<libc::sockaddr_ll>()) };
        check(bound as isize)?;
        Ok(this)
    }

    /// The next frame that is queued; `None` when there is none.
    ///
    /// # Errors
    /// `NetworkDown` and the like when the interface is going away.
    pub fn receive<'a>(&self, buffer: &'a mut [u8]) -> io::Result<Option<Frame<'a>>> {
        let mut from = self.link_address([0; 6]);
        // Room for one timestamp, aligned as its header has to be.
        let mut control = [0_u64; 8];
        let mut part = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
        // SAFETY: all zeroes are a message header without any parts.
        let mut message: libc::msghdr = unsafe { zeroed() };
        message.msg_name = (&raw mut from).cast();
        message.msg_namelen = socklen::<libc::sockaddr_ll>();
        message.msg_iov = &raw mut part;
        message.msg_iovlen = 1;
        message.msg_control = control.as_mut_ptr().cast();
        message.msg_controllen = size_of_val(&control);
        // SAFETY: the header points to buffers that live here, with their sizes.
        let received = unsafe { libc::recvmsg(self.fd.as_raw_fd(), &raw mut message, 0) };
        match check(received) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(None),
            Err(error) => Err(error),
            Ok(length) => Ok(Some(Frame {
                source: from.sll_addr.first_chunk().copied().unwrap_or_default(),
                own: from.sll_ifindex == self.index,
                here: from.sll_pkttype != libc::PACKET_OTHERHOST,
                age: arrival(&message)
                    .and_then(|at| SystemTime::now().duration_since(at).ok())
                    .unwrap_or_default(),
                bytes: buffer.get(..length).unwrap_or_default(),
            })),
        }
    }

    /// Sends a frame to a hardware address, from the interface's own.
    ///
    /// # Errors
    /// What the kernel says: `WouldBlock` and `ENOBUFS` when it has no room.
    pub fn send(&self, to: [u8; 6], bytes: &[u8]) -> io::Result<()> {
        let address = self.link_address(to);
        // SAFETY: `bytes` and `address` are valid for the sizes given.
        let sent = unsafe {
            libc::sendto(
                self.fd.as_raw_fd(),
                bytes.as_ptr().cast(),
                bytes.len(),
                0,
                (&raw const address).cast(),
                socklen::<libc::sockaddr_ll>(),
            )
        };
        check(sent).map(drop)
    }

    fn link_address(&self, mac: [u8; 6]) -> libc::sockaddr_ll {
        let mut address = [0; 8];
        address[..6].copy_from_slice(&mac);
        libc::sockaddr_ll {
            sll_family: libc::AF_PACKET as u16,
            sll_protocol: self.protocol.to_be(),
            sll_ifindex: self.index,
            sll_hatype: 0,
            sll_pkttype: 0,
            sll_halen: 6,
            sll_addr: address,
        }
    }

    fn set<T>(&self, level: libc::c_int, name: libc::c_int, value: &T) -> io::Result<()> {
        let value = std::ptr::from_ref(value).cast();
        // SAFETY: `value` is valid for the size of its type, which the option asks for; the kernel copies it, and what
        // a filter's program points to, before the call returns.
        let result = unsafe { libc::setsockopt(self.fd.as_raw_fd(), level, name, value, socklen::<T>()) };
        check(result as isize).map(drop)
    }
}

impl AsRawFd for PacketSocket {
    fn as_raw_fd(&self) -> RawFd {
        self.fd.as_raw_fd()
    }
}

impl AsFd for PacketSocket {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// A filter that queues a frame when each of these bytes, by their offset in what it carries, is one of the values.
pub fn only(bytes: &[(u32, &[u8])]) -> Vec<Instruction> {
    let instruction = |code: u32, k: u32, jt: u8, jf: u8| Instruction { code: code as u16, jt, jf, k };
    let mut program = Vec::new();
    for (offset, values) in bytes {
        program.push(instruction(libc::BPF_LD | libc::BPF_B | libc::BPF_ABS, *offset, 0, 0));
        for (left, value) in (0..values.len()).rev().zip(*values) {
            // A hit jumps over the values that are left and over the refusal.
            let hit = u8::try_from(left + 1).unwrap_or(u8::MAX);
            program.push(instruction(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, u32::from(*value), hit, 0));
        }
        program.push(instruction(libc::BPF_RET | libc::BPF_K, 0, 0, 0));
    }
    program.push(instruction(libc::BPF_RET | libc::BPF_K, u32::MAX, 0, 0));
    program
}

/// When the kernel took a frame from the card, by the wall clock.
fn arrival(message: &libc::msghdr) -> Option<SystemTime> {
    // SAFETY: the kernel has filled the control buffer and said how far; the macros stay within that.
    let time = unsafe {
        let header = libc::CMSG_FIRSTHDR(message).as_ref()?;
        if (header.cmsg_level, header.cmsg_type) != (libc::SOL_SOCKET, libc::SCM_TIMESTAMPNS) {
            return None;
        }
        libc::CMSG_DATA(header).cast::<libc::timespec>().read_unaligned()
    };
    let seconds = Duration::from_secs(time.tv_sec.try_into().ok()?);
    Some(SystemTime::UNIX_EPOCH + seconds + Duration::from_nanos(time.tv_nsec.try_into().ok()?))
}

fn socklen<T>() -> libc::socklen_t {
    libc::socklen_t::try_from(size_of::<T>()).unwrap_or_default()
}

fn check(result: isize) -> io::Result<usize> {
    usize::try_from(result).map_err(|_| io::Error::last_os_error())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What the kernel would answer to a frame: `None` when the program leaves its own bounds.
    fn run(program: &[Instruction], frame: &[u8]) -> Option<u32> {
        let (mut at, mut loaded) = (0, 0);
        loop {
            let instruction = program.get(at)?;
            at += 1;
            match u32::from(instruction.code) {
                code if code == libc::BPF_LD | libc::BPF_B | libc::BPF_ABS => {
                    match frame.get(instruction.k as usize) {
                        Some(byte) => loaded = u32::from(*byte),
                        None => return Some(0),
                    }
                }
                code if code == libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K => {
                    at += usize::from(if loaded == instruction.k { instruction.jt } else { instruction.jf });
                }
                code if code == libc::BPF_RET | libc::BPF_K => return Some(instruction.k),
                _ => return None,
            }
        }
    }

    #[test]
    fn a_filter_lets_pass_what_has_one_of_the_values_at_each_place() {
        let program = only(&[(0, &[7]), (2, &[135, 136, 200])]);
        for value in [135, 136, 200] {
            assert_eq!(run(&program, &[7, 0, value]), Some(u32::MAX), "{value}");
            assert_eq!(run(&program, &[8, 0, value]), Some(0), "{value}");
        }
        assert_eq!(run(&program, &[7, 0, 134]), Some(0));
        assert_eq!(run(&program, &[7, 0]), Some(0), "cut short");
        assert_eq!(run(&only(&[]), &[]), Some(u32::MAX));
    }
}
