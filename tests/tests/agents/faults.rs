//! What can happen to the owner, and what clients see of it.

use std::{fmt, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Result, ensure};
use lab::{Report, arp::ArpWatch};

use crate::node::Part;
use crate::scene::{SOON, Scene};

/// Shorter than the second after which a lost SYN is sent again: what nobody received is a failure.
pub const LIMIT: Duration = Duration::from_millis(900);
/// Between two requests of a client that knows where the address was.
pub const WARM: Duration = Duration::from_millis(5);
/// And of those that ask first.
pub const COLD: Duration = Duration::from_millis(20);
/// How many hosts it takes beyond the nodes: a client of either kind, and one that only asks by ARP.
pub const HOSTS: u8 = 3;

/// A fault of the owner's node.
#[derive(Clone, Copy, Debug)]
pub struct Fault {
    parts: &'static [Part],
    what: What,
    /// Twice in a row, the second time when the process is back for half a second.
    pub times: u32,
}

/// What happens to a process.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum What {
    Killed,
    /// Stopped, and after some seconds it goes on.
    Stopped,
    /// Killed by the kernel.
    OutOfMemory,
}

const fn fault(parts: &'static [Part], what: What, times: u32) -> Fault {
    Fault { parts, what, times }
}

/// All of them, the mildest first.
pub const ALL: [Fault; 16] = [
    fault(&[Part::Agent], What::Killed, 1),
    fault(&[Part::Agent], What::Killed, 2),
    fault(&[Part::Agent], What::Stopped, 1),
    fault(&[Part::Agent], What::Stopped, 2),
    fault(&[Part::Agent], What::OutOfMemory, 1),
    fault(&[Part::Agent], What::OutOfMemory, 2),
    fault(&[Part::Vrrp], What::Killed, 1),
    fault(&[Part::Vrrp], What::Killed, 2),
    fault(&[Part::Vrrp], What::Stopped, 1),
    fault(&[Part::Vrrp], What::Stopped, 2),
    fault(&[Part::Vrrp], What::OutOfMemory, 1),
    fault(&[Part::Vrrp], What::OutOfMemory, 2),
    fault(&[Part::Vrrp, Part::Agent], What::Killed, 1),
    fault(&[Part::Vrrp, Part::Agent], What::Killed, 2),
    fault(&[Part::Vrrp, Part::Agent], What::Stopped, 1),
    fault(&[Part::Vrrp, Part::Agent], What::Stopped, 2),
];

/// What was seen from the moment of the fault until everything is as before.
#[derive(Debug)]
pub struct Measured {
    /// A client that knows where the address was.
    pub warm: Report,
    /// Clients that ask where it is first.
    pub cold: Report,
    /// How long nobody and how long two answered a host that asks by ARP.
    pub arp: lab::arp::Answers,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let parts: Vec<String> = self.parts.iter().map(|part| format!("{part:?}").to_lowercase()).collect();
        let what = match self.what {
            What::Killed => "SIGKILL",
            What::Stopped => "SIGSTOP",
            What::OutOfMemory => "OOM kill",
        };
        write!(f, "{what} of {}{}", parts.join(" and "), if self.times > 1 { ", twice" } else { "" })
    }
}

impl fmt::Display for Measured {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { warm, cold, arp } = self;
        for (name, report) in [("warm", warm), ("cold", cold)] {
            let (failures, requests) = (report.failures, report.requests);
            write!(f, "{name} {failures} of {requests} failed, gap {} ms; ", report.longest_gap.as_millis())?;
        }
        write!(f, "{arp}")
    }
}

impl Fault {
    /// Lets it happen to the owner's node, waits until everything runs again and there is one owner.
    pub fn strike(&self, scene: &mut Scene<'_>, vip: Ipv4Addr) -> Result<Measured> {
        let owner = scene.owner(vip)?;
        let url = format!("http://{vip}/");
        let warm = scene.client().client().limit(LIMIT).watch(&url, WARM)?;
        let cold = scene.beyond(2).client().limit(LIMIT).watch_cold(&url, COLD)?;
        // The answers to its questions are no news to the clients.
        let asker = scene.beyond(3);
        let arp = ArpWatch::start(asker.netns(), "eth0", asker.address(), vip);
        warm.wait_answers(50, SOON)?;
        cold.wait_answers(10, SOON)?;
        thread::sleep(Duration::from_millis(200));
        for _ in 0..self.times {
            let node = &mut scene.nodes[owner];
            for part in self.parts {
                match self.what {
                    What::Killed => node.kill(*part)?,
                    What::Stopped => node.signal(*part, "STOP")?,
                    What::OutOfMemory => node.starve(*part)?,
                }
            }
            // A kubelet takes a second to start a container again.
            thread::sleep(Duration::from_millis(if self.what == What::Stopped { 5000 } else { 1000 }));
            for part in self.parts {
                match self.what {
                    What::Stopped => node.signal(*part, "CONT")?,
                    What::Killed | What::OutOfMemory => node.launch(*part)?,
                }
            }
            thread::sleep(Duration::from_millis(500));
        }
        thread::sleep(Duration::from_secs(4));
        let measured = Measured { arp: arp.stop()?, cold: cold.stop(), warm: warm.stop() };
        scene.owner(vip)?;
        Ok(measured)
    }

    /// What is aimed at, with adverts every 100 ms.
    pub fn goal(&self) -> &'static str {
        match (self.parts.contains(&Part::Vrrp), self.parts.contains(&Part::Agent)) {
            (false, _) => "nothing at all",
            (true, false) => "nobody for 110 ms at most",
            (true, true) => "two for 3000 ms at most",
        }
    }

    /// What was promised, with room for a busy machine.
    pub fn judge(&self, measured: &Measured) -> Result<()> {
        let Measured { warm, cold, arp } = measured;
        let ms = Duration::from_millis;
        let (guarded, guarding) = (self.parts.contains(&Part::Vrrp), self.parts.contains(&Part::Agent));
        // Who guards vrrp ends it, sooner than the kernel would; the kernel ends both.
        let (none, several) = match (guarded, guarding) {
            (false, _) => (ms(100), ms(0)),
            (true, false) if self.what == What::Stopped => (ms(600), ms(500)),
            (true, false) => (ms(300), ms(500)),
            (true, true) => (ms(600), ms(3200)),
        };
        if !guarded {
            ensure!(warm.failures + cold.failures == 0, "the agent's end is to be noticed by nobody");
        }
        ensure!(arp.none <= none, "nobody answered for too long");
        ensure!(arp.several <= several, "two nodes answered for too long");
        // One that asked the wrong node may have waited for its answer in vain.
        ensure!(warm.longest_gap <= none + ms(500), "the address did not answer for too long");
        ensure!(cold.longest_gap <= several + 2 * LIMIT, "clients that came found nobody for too long");
        Ok(())
    }
}

/// Pulls the owner's plug, and puts it in again when there is another owner: that one, and what a client saw.
pub fn unplug(scene: &Scene<'_>, vip: Ipv4Addr) -> Result<(usize, Report)> {
    let owner = scene.owner(vip)?;
    let number = scene.nodes[owner].host.number();
    let watch = scene.client().client().limit(LIMIT).watch(&format!("http://{vip}/"), WARM)?;
    watch.wait_answers(50, SOON)?;
    scene.segment.unplug(number)?;
    let next = scene.owner(vip)?;
    ensure!(next != owner, "the node that was cut off still has the address");
    let report = watch.stop();
    scene.segment.plug(number)?;
    Ok((next, report))
}
