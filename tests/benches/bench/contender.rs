//! The two that are compared, set up alike: one virtual router, the same interval, addresses and priorities, no preemption.

use std::{
    fmt, fs,
    net::Ipv4Addr,
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use anyhow::{Context, Result};
use lab::Host;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vip_core::vrrp::{Lan, RouterConfig};

use crate::vrrp::{VIP, VRID, Vrrp, config};

/// Who takes part.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Contender {
    VipNode,
    Keepalived,
}

/// What both are told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Setup {
    pub interval: Duration,
    /// How many addresses.
    pub vips: u8,
}

/// One that runs in a host. What is left of it ends with the host's segment.
pub struct Running<'a> {
    host: &'a Host,
    program: Program<'a>,
}

enum Program<'a> {
    VipNode { _vrrp: Vrrp<'a> },
    Keepalived { process: Child, folder: PathBuf },
}

impl Setup {
    /// The addresses, in the order in which they are told.
    pub fn addresses(&self) -> Vec<Ipv4Addr> {
        (0..self.vips).map(|n| Ipv4Addr::from(u32::from(VIP) + 256 + u32::from(n))).collect()
    }
}

impl Contender {
    pub fn start(self, host: &Host, priority: u8, setup: Setup) -> Result<Running<'_>> {
        let program = match self {
            Self::VipNode => {
                let vrrp = Vrrp::start(host, host.number())?;
                let addresses: Vec<_> = setup.addresses().into_iter().map(Into::into).collect();
                let router = RouterConfig { interval: setup.interval, ..config(priority, &addresses) };
                vrrp.elect_all(vec![router], Lan::default())?;
                Program::VipNode { _vrrp: vrrp }
            }
            Self::Keepalived => keepalived(host, priority, setup)?,
        };
        Ok(Running { host, program })
    }
}

fn keepalived(host: &Host, priority: u8, setup: Setup) -> Result<Program<'static>> {
    let folder = std::env::temp_dir().join(format!("{}-keepalived", host.netns().name()));
    fs::create_dir_all(&folder)?;
    let file = folder.join("keepalived.conf");
    let addresses: String = setup.addresses().iter().map(|address| format!("  {address}/32\n")).collect();
    let interval = setup.interval.as_secs_f64();
    fs::write(
        &file,
        format!(
            "global_defs {{\n vrrp_version 3\n}}\nvrrp_instance one {{\n state BACKUP\n nopreempt\n interface eth0\n \
             virtual_router_id {VRID}\n priority {priority}\n advert_int {interval}\n virtual_ipaddress {{\n{addresses} }}\n}}\n"
        ),
    )?;
    let log = fs::File::create(folder.join("log"))?;
    let mut program = Command::new("keepalived");
    program.args(["--dont-fork", "--log-console", "--vrrp", "--use-file"]).arg(&file);
    program.arg("--pid").arg(folder.join("pid")).arg("--vrrp_pid").arg(folder.join("vrrp.pid"));
    let process = host.spawn(program.stdout(log.try_clone()?).stderr(log))?;
    Ok(Program::Keepalived { process, folder })
}

impl Running<'_> {
    /// All of its processes.
    pub fn processes(&self) -> Vec<Pid> {
        self.host.netns().processes().into_iter().map(|pid| Pid::from_raw(pid.cast_signed())).collect()
    }

    /// The process that an administrator would end.
    pub fn main(&self) -> Result<Pid> {
        match &self.program {
            Program::VipNode { .. } => self.processes().first().copied().context("vip-node has ended"),
            Program::Keepalived { process, .. } => Ok(Pid::from_raw(process.id().cast_signed())),
        }
    }
}

impl Drop for Running<'_> {
    fn drop(&mut self) {
        for process in self.processes() {
            let _ = kill(process, Signal::SIGKILL);
        }
        if let Program::Keepalived { process, folder } = &mut self.program {
            let _ = process.wait();
            let _ = fs::remove_dir_all(folder);
        }
    }
}

impl fmt::Display for Contender {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::VipNode => "vip-node",
            Self::Keepalived => "keepalived",
        })
    }
}
