//! What clients of a virtual IP notice when agents are killed, and when they are replaced one after another.

use std::{
    collections::BTreeMap,
    net::{Ipv4Addr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};
use lab::{Agent, Lab, Watch, product, workload::Workload};

use super::{NAMESPACE, SOON};

/// Between two requests of one client.
const EVERY: Duration = Duration::from_millis(40);
/// Clients that send datagrams beside one that opens connections: an emulated machine carries no more of those, with kubelets
/// that start containers beside.
const DATAGRAMS: usize = 7;
/// What is late on a slow machine is no failure.
const LIMIT: Duration = Duration::from_secs(10);
const CONNECTIONS: usize = 50;
/// Longer than Kubernetes lets a node be silent: at the return it calls all of them, and all endpoints, not ready.
const HANG: Duration = Duration::from_secs(30);

/// The agents of the owner and of another node are killed, the latter while the API server hangs.
pub fn killed(lab: &Lab, web: &Workload<'_>) -> Result<()> {
    let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "web")?;
    let before = product::wait_one_owner(lab, vip, SOON)?;
    web.add_service("missed", 80)?;
    let (clients, crowd) = (Clients::new(lab, vip)?, Crowd::new(lab, (vip, 80).into())?);
    let arp = lab.arp_watch(vip);
    println!("agents killed, 200 requests a second and {CONNECTIONS} connections that stay open:");

    let agent = Agent::on(lab, before.number);
    let (restarts, clock) = (agent.restarts()?, Instant::now());
    agent.kill()?;
    lab.kubectl(["vip", "expose", "svc/missed", "-n", NAMESPACE, "--wait=false"])?.ok()?;
    agent.wait_restart(restarts)?;
    println!(
        "  the owner's, away for {:.0} s, missed a new virtual IP with two ports of three pods: {} steps",
        clock.elapsed().as_secs_f64(),
        agent.first_steps()?
    );

    let other = Agent::on(lab, before.number % 3 + 1);
    let clock = Instant::now();
    lab.pause_apiserver()?;
    let again = other.kill_and_wait();
    thread::sleep(HANG.saturating_sub(clock.elapsed()));
    lab.resume_apiserver()?;
    again?;
    product::wait_rollout(lab)?;
    println!("  another node's, while the API server hangs: {} steps", other.first_steps()?);

    let after = product::wait_one_owner(lab, vip, SOON)?;
    println!("  from {} to {}, {}; {}", before.node, after.node, arp.stop()?, crowd.leave());
    clients.tell();
    lab.kubectl(["vip", "unexpose", "svc/missed", "-n", NAMESPACE])?.ok().map(drop)
}

/// The agents are replaced one after another.
pub fn rolled(lab: &Lab) -> Result<()> {
    let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "web")?;
    let before = product::wait_one_owner(lab, vip, SOON)?;
    let clients = Clients::new(lab, vip)?;
    let (arp, clock) = (lab.arp_watch(vip), Instant::now());
    lab.kubectl(["rollout", "restart", "-n", "kubectl-vip", "daemonset/vip-node"])?.ok()?;
    product::wait_rollout(lab)?;
    let took = clock.elapsed();
    let after = product::wait_one_owner(lab, vip, SOON)?;
    println!("kubectl rollout restart of the agents, {:.0} s, 200 requests a second:", took.as_secs_f64());
    println!("  from {} to {}; {}", before.node, after.node, arp.stop()?);
    clients.tell();
    Ok(())
}

/// They go on asking: one by connections that it closes, the others by datagrams.
struct Clients(Vec<Watch>);

impl Clients {
    fn new(lab: &Lab, vip: Ipv4Addr) -> Result<Self> {
        let mut urls = vec![format!("http://{vip}/hostname")];
        urls.resize(1 + DATAGRAMS, format!("udp://{vip}:81/hostname"));
        let watch = |url: String| {
            let watch = lab.client().limit(LIMIT).watch(&url, EVERY)?;
            watch.wait_answers(20, SOON)?;
            Ok(watch)
        };
        urls.into_iter().map(watch).collect::<Result<_>>().map(Self)
    }

    fn tell(self) {
        for (n, watch) in self.0.into_iter().enumerate() {
            println!("  {}: {}", if n == 0 { "TCP" } else { "UDP" }, watch.stop());
        }
    }
}

/// Connections that stay open, each used now and then.
struct Crowd {
    stop: Arc<AtomicBool>,
    members: Vec<JoinHandle<Result<()>>>,
}

impl Crowd {
    fn new(lab: &Lab, at: SocketAddr) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut members = Vec::new();
        for _ in 0..CONNECTIONS {
            let mut connection = lab.client().limit(LIMIT).connect(at)?;
            let stop = Arc::clone(&stop);
            members.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    connection.get("hostname")?;
                    thread::park_timeout(Duration::from_secs(8));
                }
                Ok(())
            }));
        }
        Ok(Self { stop, members })
    }

    /// How many broke, and how.
    fn leave(self) -> String {
        self.stop.store(true, Ordering::Relaxed);
        self.members.iter().for_each(|member| member.thread().unpark());
        let mut broken: BTreeMap<String, u32> = BTreeMap::new();
        for member in self.members {
            if let Err(why) = member.join().unwrap_or_else(|_| Err(anyhow!("a panic"))) {
                *broken.entry(format!("{why:#}")).or_default() += 1;
            }
        }
        let mut words = format!("{} connections broke", broken.values().sum::<u32>());
        broken.iter().for_each(|(why, count)| words += &format!("\n    {count}: {why}"));
        words
    }
}
