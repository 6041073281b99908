//! keepalived as the peer: version 3, adverts every 100 ms, the same virtual router and address.

use std::{
    fs,
    path::PathBuf,
    process::{Child, Command},
    time::Duration,
};

use anyhow::Result;
use lab::{Host, command};

use crate::vrrp::{VIP, VRID};

/// A running keepalived.
pub struct Keepalived {
    process: Child,
    folder: PathBuf,
}

impl Keepalived {
    pub fn start(host: &Host, priority: u8) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("{}-keepalived", host.netns().name()));
        fs::create_dir_all(&folder)?;
        let config = folder.join("keepalived.conf");
        fs::write(
            &config,
            format!(
                "global_defs {{ vrrp_version 3\n vrrp_garp_master_delay 1\n }}\nvrrp_instance one {{\n state BACKUP\n interface eth0\n \
                 virtual_router_id {VRID}\n priority {priority}\n advert_int 0.1\n virtual_ipaddress {{ {VIP}/32 }}\n}}\n"
            ),
        )?;
        let log = fs::File::create(folder.join("log"))?;
        let mut program = Command::new("keepalived");
        program.args(["--dont-fork", "--log-console", "--vrrp", "--use-file"]).arg(&config);
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
