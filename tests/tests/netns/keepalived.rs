//! keepalived as the peer: version 3, adverts every 100 ms, the same virtual router and address, over either family, by
//! multicast or unicast.

use std::{
    fs,
    net::{IpAddr, Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use anyhow::Result;
use lab::{Host, command};

use crate::vrrp::{VIP, VIP6, VRID};

/// The link-local address that an IPv6 virtual router of keepalived has beside others.
pub const LINK_LOCAL: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 2, 0x50);

/// The address of a keepalived that has nothing to do with ours.
pub const OTHER: Ipv4Addr = Ipv4Addr::new(10, 87, 2, 60);

/// A running keepalived.
pub struct Keepalived {
    process: Child,
    folder: PathBuf,
}

/// How it is set up.
#[derive(Clone, Default)]
pub struct Settings {
    pub priority: u8,
    pub ipv6: bool,
    /// Its own address and the only peer's.
    pub unicast: Option<(IpAddr, IpAddr)>,
    /// It has another virtual router and address than ours.
    pub other: bool,
    /// `v3_checksum_as_v2`, which only a newer one than the distribution's knows.
    pub plain_checksum: bool,
}

impl Keepalived {
    pub fn start(host: &Host, priority: u8) -> Result<Self> {
        Self::start_with(host, &Settings { priority, ..Settings::default() })
    }

    pub fn start_with(host: &Host, settings: &Settings) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("{}-keepalived", host.netns().name()));
        fs::create_dir_all(&folder)?;
        let config = folder.join("keepalived.conf");
        let mut more = String::new();
        if let Some((own, peer)) = settings.unicast {
            // Without it, it sends a hop limit of 64 over IPv6.
            more += &format!(" unicast_src_ip {own}\n unicast_ttl 255\n unicast_peer {{ {peer} }}\n");
        }
        let mut program = Command::new("keepalived");
        if settings.plain_checksum {
            program = Command::new(lab::keepalived::path()?);
            more += " v3_checksum_as_v2\n";
        }
        // Its first IPv6 address has to be link-local.
        let vips = match (settings.ipv6, settings.other) {
            (true, _) => format!("{LINK_LOCAL}/128\n {VIP6}/128"),
            (false, true) => format!("{OTHER}/32"),
            (false, false) => format!("{VIP}/32"),
        };
        let (priority, router) = (settings.priority, if settings.other { VRID + 1 } else { VRID });
        fs::write(
            &config,
            format!(
                "global_defs {{ vrrp_version 3\n vrrp_garp_master_delay 1\n }}\nvrrp_instance one {{\n state BACKUP\n interface eth0\n \
                 virtual_router_id {router}\n priority {priority}\n advert_int 0.1\n{more} virtual_ipaddress {{ {vips} }}\n}}\n"
            ),
        )?;
        let log = fs::File::create(folder.join("log"))?;
        program.args(["--dont-fork", "--log-console", "--use-file"]).arg(&config);
        program.arg("--pid").arg(folder.join("pid")).arg("--vrrp_pid").arg(folder.join("vrrp.pid"));
        let process = host.spawn(program.stdout(log.try_clone()?).stderr(log))?;
        Ok(Self { process, folder })
    }

    /// Ends it as its administrator would.
    pub fn stop(mut self) -> Result<()> {
        command::words(&["kill", &self.process.id().to_string()])?.ok()?;
        command::wait(&mut self.process, Duration::from_secs(5)).map(drop)
    }
}

impl Drop for Keepalived {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}
