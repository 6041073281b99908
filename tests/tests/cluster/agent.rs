//! The agent of a node in a real pod: killed, and started again by the kubelet.

use std::{
    net::{IpAddr, Ipv4Addr},
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use jiff::Timestamp;
use lab::{
    Agent, Crowd, Lab, Moment, Watch, command,
    ipvs_ear::{Fates, Service},
    product,
};

use super::{Exposed, NAMESPACE, SOON, check_alone, fates, installed, moved_since, web};

/// How long vrrp waits for an agent.
const GRACE: Duration = Duration::from_secs(30);
/// How long the API server hangs. At its return Kubernetes calls all endpoints not ready.
const HANG: Duration = Duration::from_secs(30);
const CONNECTIONS: usize = 50;

/// Between two requests of a client over TCP and of three over UDP: together twenty in a second. With more an emulated machine on a
/// slow host has no room for the kubelet that is to start the agent again; `make bench` asks two hundred.
const EVERY: Duration = Duration::from_millis(200);

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

/// Waits until no backend is out of service in a node's kernel.
fn wait_in_service(lab: &Lab, node: u8, vip: Ipv4Addr) -> Result<()> {
    command::until("all backends in service", SOON, || {
        let table = product::table(&lab.node(node), vip)?;
        ensure!(
            table.values().all(|to| to.len() == 3 && to.values().all(|weight| *weight == 1)),
            "{table:?}"
        );
        Ok(Some(()))
    })
}

#[test]
fn agents_are_killed_while_services_change_and_while_the_api_server_hangs_and_nobody_notices() {
    check_alone(|| {
        let lab = installed()?;
        let exposed = Exposed::new(lab, "killed")?;
        let vip = exposed.vip;
        let began = Timestamp::now();
        let udp = || format!("udp://{vip}:81/hostname");
        let watches = [exposed.url(), udp(), udp(), udp()].map(|url| steady(lab, &url));
        let crowd = Crowd::gather(&lab.client(), (vip, 80).into(), CONNECTIONS)?;

        // The owner's has not seen the change when it dies.
        let owner = exposed.owner.number;
        let mut away = Duration::ZERO;
        fates::heard(lab, owner, || {
            let agent = Agent::on(lab, owner);
            let before = agent.restarts()?;
            wait_in_service(lab, owner, vip)?;
            let paused = Instant::now();
            agent.kill_after(|| add_port(lab, "killed"))?;
            agent.wait_restart(before)?;
            away = paused.elapsed();
            product::wait_destinations(lab, vip, 82, 3, SOON)?;
            product::wait_rollout(lab)?;
            let service = Service { protocol: 6, at: (vip, 82).into() };
            let pods = web(lab)?.pods()?;
            pods.values()
                .map(|pod| Ok(((service, (pod.address.parse::<IpAddr>()?, 8080).into()), vec![Some(1)])))
                .collect()
        })?;

        // What the others find is what there should be: one goes on from what it remembers, the other hears at once that nothing is
        // ready.
        for (other, moment) in [(owner % 3 + 1, Moment::Beginning), ((owner + 1) % 3 + 1, Moment::End)] {
            fates::heard(lab, other, || {
                wait_in_service(lab, other, vip)?;
                let agent = Agent::on(lab, other);
                let before = agent.restarts()?;
                agent.kill_while_api_hangs(HANG, moment)?;
                agent.wait_restart(before)?;
                agent.first_steps()?;
                Ok(Fates::new())
            })?;
        }

        let reports = watches.into_iter().map(|watch| Ok(watch?.stop())).collect::<Result<Vec<_>>>()?;
        let parting = crowd.leave();
        let told = reports.iter().map(ToString::to_string).collect::<Vec<_>>().join("; ");
        println!("the owner's agent was away for {:.1} s; {parting}; {told}", away.as_secs_f64());
        let owner = product::wait_one_owner(lab, vip, SOON)?;
        // Where the kubelet is so slow that the agent is away for longer than vrrp waits, the address is offered to other
        // nodes, and connections end with it; so they do where a machine stands still for longer than its peers wait, and what is on
        // its way is lost where it is the owner that finds out.
        let (stayed, lost) = (owner == exposed.owner, product::was_lost(lab, vip)?);
        ensure!(
            stayed || lost || away > GRACE,
            "the virtual IP moved to {} after {away:?}; {told}",
            owner.node
        );
        let disturbed = !stayed || moved_since(lab, began)?;
        ensure!(disturbed || parting.broken.is_empty(), "{parting}");
        ensure!(disturbed || reports.iter().all(|report| report.failures == 0), "{told}");
        exposed.remove(lab)
    });
}
