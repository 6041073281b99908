//! The agent of a node in a real pod: killed, and started again by the kubelet.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::{Agent, Lab, Watch, product};

use super::{Exposed, SOON, check_alone, installed};

/// How long vrrp waits for an agent.
const GRACE: Duration = Duration::from_secs(30);

/// Between two requests of a client over TCP and of three over UDP: together forty in a second. A hundred leave an emulated machine on
/// a slow host no room for the kubelet that is to start the agent again; `make bench` asks two hundred.
const EVERY: Duration = Duration::from_millis(100);

/// A client that goes on asking.
fn steady(lab: &Lab, url: &str) -> Result<Watch> {
    // What is late on a slow machine is no failure.
    let watch = lab.client().limit(Duration::from_secs(10)).watch(url, EVERY)?;
    watch.wait_answers(50, SOON)?;
    Ok(watch)
}

#[test]
fn it_is_killed_and_nobody_notices() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "killed")?;
        let agent = Agent::on(lab, exposed.owner.number);
        let before = agent.restarts()?;
        let udp = || format!("udp://{}:81/hostname", exposed.vip);
        let clients = [exposed.url(), udp(), udp(), udp()];
        let watches = clients.map(|url| steady(lab, &url));
        let killed = Instant::now();
        agent.kill()?;
        agent.wait_restart(before)?;
        let away = killed.elapsed();
        product::wait_rollout(lab)?;
        // What it found is what there should be.
        let steps = agent.first_steps()?;
        ensure!(steps == 0, "the agent took {steps} steps");
        let reports = watches.into_iter().map(|watch| Ok(watch?.stop())).collect::<Result<Vec<_>>>()?;
        let told = reports.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        println!("{told}");
        let owners = product::owners(lab, exposed.vip)?;
        // Where the kubelet is so slow that the agent is away for longer than vrrp waits, the address is offered to other
        // nodes.
        let stayed = owners == [exposed.owner.clone()];
        ensure!(stayed || away > GRACE, "the virtual IP moved to {owners:?} after {away:?}; {told}");
        ensure!(!stayed || reports.iter().all(|report| report.failures == 0), "{told}");
        exposed.remove(lab)
    });
}
