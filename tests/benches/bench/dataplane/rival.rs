//! A keepalived that holds the same services: how long it needs to load them, and to change one destination, as its users have
//! to ask for it: by its configuration and SIGHUP.

use std::{
    fmt::Write as _,
    fs,
    net::SocketAddr,
    path::PathBuf,
    process::{Child, Command},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::command;
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};
use vip_core::plan::{ServiceKey, Tables};

/// Reading thousands of services takes it long in an emulated machine.
const PATIENCE: Duration = Duration::from_secs(300);
/// Between two looks at the kernel.
const LOOK: Duration = Duration::from_millis(20);

/// A running keepalived, without its VRRP, in the network namespace of the thread that started it.
pub struct Rival {
    process: Child,
    folder: PathBuf,
}

impl Rival {
    /// Starts it and waits until the kernel holds everything.
    pub fn start(tables: &Tables) -> Result<Self> {
        let folder = std::env::temp_dir().join(format!("keepalived-{}", std::process::id()));
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("conf"), configuration(tables)?)?;
        let log = fs::File::create(folder.join("log"))?;
        let mut program = Command::new("keepalived");
        program.args(["--dont-fork", "--log-console", "--check", "--use-file"]).arg(folder.join("conf"));
        program.arg("--pid").arg(folder.join("pid")).arg("--checkers_pid").arg(folder.join("checkers.pid"));
        let process =
            program.stdout(log.try_clone()?).stderr(log).spawn().context("can't start keepalived")?;
        let rival = Self { process, folder };
        let wanted: usize = tables.services.values().map(|service| 1 + service.destinations.len()).sum();
        command::until("keepalived's entries in the kernel", PATIENCE, || {
            // Not by /proc/net/ip_vs, which leaves entries out while other namespaces have some.
            let output = Command::new("ipvsadm").args(["--list", "--numeric"]).output()?;
            // Three lines of titles.
            let found = String::from_utf8(output.stdout)?.lines().count().saturating_sub(3);
            ensure!(found == wanted, "{found} of {wanted}");
            Ok(Some(()))
        })?;
        Ok(rival)
    }

    /// From the signal until the kernel has what is new in these tables: a destination with this weight, or one less.
    pub fn reload(
        &self,
        tables: &Tables,
        service: &ServiceKey,
        to: SocketAddr,
        wanted: Option<u32>,
    ) -> Result<Duration> {
        fs::write(self.folder.join("conf"), configuration(tables)?)?;
        let clock = Instant::now();
        kill(Pid::from_raw(self.process.id().cast_signed()), Signal::SIGHUP)?;
        while weight_of(service, to)? != wanted {
            ensure!(clock.elapsed() < PATIENCE, "keepalived did not follow");
            thread::sleep(LOOK);
        }
        Ok(clock.elapsed())
    }
}

impl Drop for Rival {
    fn drop(&mut self) {
        let _ = kill(Pid::from_raw(self.process.id().cast_signed()), Signal::SIGTERM);
        let _ = self.process.wait();
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The weight of a destination in the kernel, by `ipvsadm`.
fn weight_of(service: &ServiceKey, to: SocketAddr) -> Result<Option<u32>> {
    let name = format!("{}:{}", service.address, service.port);
    let output = Command::new("ipvsadm").args(["--list", "--numeric", "--tcp-service", &name]).output();
    let text = String::from_utf8(output.context("can't start ipvsadm")?.stdout)?;
    let to = to.to_string();
    let words = text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
    let mut line = words.filter(|words| words.get(1) == Some(&to.as_str()));
    Ok(line.next().and_then(|words| words.get(3)?.parse().ok()))
}

fn configuration(tables: &Tables) -> Result<String> {
    let mut text = String::from("global_defs {\n}\n");
    for (key, service) in &tables.services {
        writeln!(
            text,
            "virtual_server {} {} {{\n lvs_sched wlc\n lvs_method NAT\n protocol TCP",
            key.address, key.port
        )?;
        for (to, weight) in &service.destinations {
            writeln!(text, " real_server {} {} {{\n  weight {weight}\n }}", to.ip(), to.port())?;
        }
        text.push_str("}\n");
    }
    Ok(text)
}
