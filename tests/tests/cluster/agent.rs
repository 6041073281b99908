//! The agent of a node in a real pod: killed, and started again by the kubelet.

use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use lab::{Agent, Crowd, Lab, Watch, command, product};

use super::{Exposed, NAMESPACE, SOON, check_alone, installed};

/// How long vrrp waits for an agent.
const GRACE: Duration = Duration::from_secs(30);
/// How long the API server hangs: the agent is back by then, and goes on from what it remembers. At its return Kubernetes calls all
/// endpoints not ready.
const HANG: Duration = Duration::from_secs(30);
const CONNECTIONS: usize = 50;

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

/// Adds a port to a Service, and waits until its endpoints have it.
fn add_port(lab: &Lab, service: &str) -> Result<()> {
    let more =
        r#"[{"op":"add","path":"/spec/ports/-","value":{"name":"more","port":82,"targetPort":"http"}}]"#;
    lab.kubectl(["patch", "service", service, "-n", NAMESPACE, "--type=json", "-p", more])?.ok()?;
    let select = format!("kubernetes.io/service-name={service}");
    let ports = "jsonpath={.items[*].ports[*].name}";
    command::until("endpoints with one port more", SOON, || {
        let found =
            lab.kubectl(["get", "endpointslices", "-n", NAMESPACE, "-l", &select, "-o", ports])?.ok()?;
        Ok(found.text().contains("more").then_some(()))
    })
}

#[test]
fn agents_are_killed_while_services_change_and_while_the_api_server_hangs_and_nobody_notices() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "killed")?;
        let vip = exposed.vip;
        let udp = || format!("udp://{vip}:81/hostname");
        let watches = [exposed.url(), udp(), udp(), udp()].map(|url| steady(lab, &url));
        let crowd = Crowd::gather(&lab.client(), (vip, 80).into(), CONNECTIONS)?;

        // The owner's has not seen the change when it dies.
        let owner = Agent::on(lab, exposed.owner.number);
        let (before, paused) = (owner.restarts()?, Instant::now());
        owner.kill_after(|| add_port(lab, "killed"))?;
        owner.wait_restart(before)?;
        let away = paused.elapsed();
        // The port in the list of what is ours, a service and its three destinations.
        let steps = owner.first_steps()?;
        ensure!(steps == 5, "the owner's agent took {steps} steps");
        product::wait_destinations(lab, vip, 82, 3, SOON)?;
        product::wait_rollout(lab)?;

        let other = Agent::on(lab, exposed.owner.number % 3 + 1);
        // What it found is what there should be.
        let steps = other.kill_while_api_hangs(HANG)?;
        ensure!(steps == 0, "the other agent took {steps} steps");

        let reports = watches.into_iter().map(|watch| Ok(watch?.stop())).collect::<Result<Vec<_>>>()?;
        let parting = crowd.leave();
        let told = reports.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        println!("the owner's agent was away for {:.1} s; {parting}; {told}", away.as_secs_f64());
        let owners = product::owners(lab, vip)?;
        // Where the kubelet is so slow that the agent is away for longer than vrrp waits, the address is offered to other
        // nodes, and connections end with it.
        let stayed = owners == [exposed.owner.clone()];
        ensure!(stayed || away > GRACE, "the virtual IP moved to {owners:?} after {away:?}; {told}");
        ensure!(!stayed || parting.broken.is_empty(), "{parting}");
        ensure!(!stayed || reports.iter().all(|report| report.failures == 0), "{told}");
        exposed.remove(lab)
    });
}
