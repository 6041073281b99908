//! What can happen to the owner's processes, and what a client sees of it.

use std::{fmt, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Result, ensure};
use lab::{Report, arp::ArpWatch};

use crate::node::Part;
use crate::scene::{SOON, Scene};

/// Shorter than the second after which a lost SYN is sent again: what nobody received is a failure.
const LIMIT: Duration = Duration::from_millis(900);

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
        let Self { warm, arp } = self;
        write!(
            f,
            "{} of {} requests failed, longest gap {} ms; {arp}",
            warm.failures,
            warm.requests,
            warm.longest_gap.as_millis()
        )
    }
}

impl Fault {
    /// Lets it happen to the owner's node, waits until everything runs again and there is one owner.
    pub fn strike(&self, scene: &mut Scene<'_>, vip: Ipv4Addr) -> Result<Measured> {
        let owner = scene.owner(vip)?;
        let client = scene.client();
        let url = format!("http://{vip}/");
        let watch = client.client().limit(LIMIT).watch(&url, Duration::from_millis(5))?;
        watch.wait_answers(50, SOON)?;
        let arp = ArpWatch::start(client.netns(), "eth0", client.address(), vip);
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
        let measured = Measured { arp: arp.stop()?, warm: watch.stop() };
        scene.owner(vip)?;
        Ok(measured)
    }

    /// What was promised.
    pub fn judge(&self, measured: &Measured) -> Result<()> {
        let Measured { warm, arp } = measured;
        if !self.parts.contains(&Part::Vrrp) {
            ensure!(warm.failures == 0, "the agent's end is to be noticed by nobody");
        }
        ensure!(arp.several <= Duration::from_millis(3200), "two nodes answered for too long");
        ensure!(warm.longest_gap < Duration::from_secs(4), "nobody answered for too long");
        Ok(())
    }
}
