//! What clients of a virtual IP notice when agents are killed, and when they are replaced one after another.

use std::{
    net::Ipv4Addr,
    time::{Duration, Instant},
};

use anyhow::Result;
use lab::{Agent, Crowd, Lab, Moment, Requests, product, workload::Workload};

use super::{NAMESPACE, SOON};

const CONNECTIONS: usize = 50;
/// The steps to a new virtual IP: its guard, and for each of two ports its entry in the list of what is ours, a service and
/// three destinations.
const MISSED: usize = 1 + 2 * (1 + 1 + 3);
/// Longer than Kubernetes lets a node be silent: at the return it calls all of them, and all endpoints, not ready.
const HANG: Duration = Duration::from_secs(30);

/// The agents of the owner and of another node are killed, the latter while the API server hangs.
pub fn killed(lab: &Lab, web: &Workload<'_>) -> Result<()> {
    let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "web")?;
    let before = product::wait_one_owner(lab, vip, SOON)?;
    web.add_service("missed", 80)?;
    let requests = Requests::start(&lab.client(), vip.into())?;
    let crowd = Crowd::gather(&lab.client(), (vip, 80).into(), CONNECTIONS)?;
    let arp = lab.arp_watch(vip);
    println!("agents killed, 200 requests a second and {CONNECTIONS} connections that stay open:");

    let agent = Agent::on(lab, before.number);
    let restarts = agent.restarts()?;
    let miss =
        || lab.kubectl(["vip", "expose", "svc/missed", "-n", NAMESPACE, "--wait=false"])?.ok().map(drop);
    agent.kill_after(miss)?;
    let clock = Instant::now();
    agent.wait_restart(restarts)?;
    println!(
        "  the owner's, away for {:.0} s, missed a new virtual IP with two ports of three pods: {} steps (the difference is \
         {MISSED})",
        clock.elapsed().as_secs_f64(),
        agent.first_steps()?
    );

    let other = Agent::on(lab, before.number % 3 + 1);
    other.kill_while_api_hangs(HANG, Moment::Beginning)?;
    println!(
        "  another node's, while the API server hangs: {} steps (the difference is 0)",
        other.first_steps()?
    );

    let after = product::wait_one_owner(lab, vip, SOON)?;
    println!("  from {} to {}, {}; {}", before.node, after.node, arp.stop()?, crowd.leave());
    tell(requests);
    lab.kubectl(["vip", "unexpose", "svc/missed", "-n", NAMESPACE])?.ok().map(drop)
}

/// The agents are replaced one after another.
pub fn rolled(lab: &Lab) -> Result<()> {
    let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "web")?;
    let before = product::wait_one_owner(lab, vip, SOON)?;
    let requests = Requests::start(&lab.client(), vip.into())?;
    let (arp, clock) = (lab.arp_watch(vip), Instant::now());
    lab.kubectl(["rollout", "restart", "-n", "kubectl-vip", "daemonset/vip-node"])?.ok()?;
    product::wait_rollout(lab)?;
    let took = clock.elapsed();
    let after = product::wait_one_owner(lab, vip, SOON)?;
    println!("kubectl rollout restart of the agents, {:.0} s, 200 requests a second:", took.as_secs_f64());
    println!("  from {} to {}; {}", before.node, after.node, arp.stop()?);
    tell(requests);
    Ok(())
}

fn tell(requests: Requests) {
    for (n, report) in requests.stop().into_iter().enumerate() {
        println!("  {}: {report}", if n == 0 { "TCP" } else { "UDP" });
    }
}
