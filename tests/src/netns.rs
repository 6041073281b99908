//! Network namespaces: making them, running closures and programs in them, and ending everything that lives in one.

use std::{
    fs::{self, File},
    io,
    net::{Ipv4Addr, SocketAddrV4},
    os::unix::fs::MetadataExt,
    panic,
    path::PathBuf,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use socket2::{Domain, Protocol, Socket, Type};

use crate::command::{self, Output, ip};

/// A named network namespace, as `ip netns` makes them. It stays when this value goes.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Netns {
    name: String,
}

impl Netns {
    /// The namespace of that name, whether it exists or not.
    pub fn named(name: impl Into<String>) -> Self {
        Self { name: name.into() }
    }

    /// Makes a namespace with its loopback up.
    pub fn create(name: impl Into<String>) -> Result<Self> {
        let this = Self::named(name);
        ip(&format!("netns add {}", this.name))?;
        this.ip("link set lo up")?;
        Ok(this)
    }

    /// Its name.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Whether it exists.
    pub fn exists(&self) -> bool {
        self.path().exists()
    }

    /// Runs `ip` with the words of one line in it and wants success.
    pub fn ip(&self, line: &str) -> Result<Output> {
        ip(&format!("-n {} {line}", self.name))
    }

    /// Runs a closure on a thread of its own that is in this namespace.
    pub fn run<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        on_thread(|| self.enter().map(|()| work()))
    }

    /// Moves the calling thread into this namespace, for good.
    pub fn enter(&self) -> Result<()> {
        let file = File::open(self.path()).with_context(|| format!("no network namespace {}", self.name))?;
        setns(file, CloneFlags::CLONE_NEWNET).with_context(|| format!("can't enter namespace {}", self.name))
    }

    /// Runs a program in it to its end.
    pub fn exec(&self, command: &mut Command, limit: Duration) -> Result<Output> {
        self.run(|| command::run(command, limit))?
    }

    /// Starts a program in it.
    pub fn spawn(&self, command: &mut Command) -> Result<Child> {
        self.run(|| command::spawn(command))?
    }

    /// Makes ready to send datagrams of VRRP's protocol to its group over IPv4, with any TTL.
    pub fn injector(&self, interface: &str, ttl: u8) -> Result<Injector> {
        let open = || -> io::Result<Socket> {
            let socket = Socket::new(Domain::IPV4, Type::RAW, Some(Protocol::from(112)))?;
            socket.set_multicast_ttl_v4(ttl.into())?;
            socket.bind_device(Some(interface.as_bytes()))?;
            Ok(socket)
        };
        Ok(Injector(self.run(open)?.context("can't open a raw socket (are you root?)")?))
    }

    /// Whether a process is in this namespace. A zombie is nowhere.
    pub fn contains(&self, pid: u32) -> bool {
        let inode = |path: PathBuf| fs::metadata(path).map(|data| (data.dev(), data.ino())).ok();
        let ours = inode(self.path());
        ours.is_some() && ours == inode(format!("/proc/{pid}/ns/net").into())
    }

    /// All processes in it.
    pub fn processes(&self) -> Vec<u32> {
        let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
        let pids = entries.flatten().filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| self.contains(*pid)).collect()
    }

    /// Kills every process in it, waits until they are gone, and deletes it. Fine when there is none.
    pub fn destroy(&self) -> Result<()> {
        if !self.exists() {
            return Ok(());
        }
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let processes = self.processes();
            if processes.is_empty() {
                break;
            }
            if Instant::now() > deadline {
                bail!("processes {processes:?} in namespace {} do not end", self.name);
            }
            for pid in processes {
                signal(pid, Signal::SIGKILL);
            }
            thread::sleep(Duration::from_millis(30));
        }
        ip(&format!("netns delete {}", self.name))?;
        Ok(())
    }

    fn path(&self) -> PathBuf {
        PathBuf::from("/run/netns").join(&self.name)
    }
}

/// Sends what a host would send, and what it would not.
#[derive(Debug)]
pub struct Injector(Socket);

impl Injector {
    /// Sends a datagram.
    pub fn send(&self, payload: &[u8]) -> Result<()> {
        let group = SocketAddrV4::new(Ipv4Addr::new(224, 0, 0, 18), 0);
        self.0.send_to(payload, &group.into()).context("can't send")?;
        Ok(())
    }
}

/// Runs a closure in a network namespace of its own, which vanishes with it. Its loopback is up.
pub fn in_new_netns<T: Send>(work: impl FnOnce() -> T + Send) -> Result<T> {
    on_thread(|| {
        unshare(CloneFlags::CLONE_NEWNET).context("can't make a network namespace (are you root?)")?;
        ip("link set lo up")?;
        Ok(work())
    })
}

/// Sends a signal to a process; it may be gone already.
pub(crate) fn signal(pid: u32, signal: Signal) {
    let _ = kill(Pid::from_raw(pid.cast_signed()), signal);
}

fn on_thread<T: Send>(work: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    thread::scope(|scope| {
        let thread = thread::Builder::new().spawn_scoped(scope, work).map_err(|error| anyhow!(error))?;
        thread.join().unwrap_or_else(|panic| panic::resume_unwind(panic))
    })
}
