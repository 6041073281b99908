//! Both processes of the product on the hosts of a segment, with a real API server: who owns an address whatever is killed,
//! stopped, cut or claimed. The machine's own kernel has no IPVS, so the virtual IPs here are bare and the hosts serve by
//! themselves. The tests stop the API server, so they run one after another.

#[path = "agents/faults.rs"]
mod faults;
#[path = "agents/node.rs"]
mod node;
#[path = "agents/scene.rs"]
mod scene;

use std::{
    fs,
    net::{Ipv4Addr, Ipv6Addr},
    path::PathBuf,
    sync::OnceLock,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Report, Segment, command, paths};
use serde_json::{Value, json};
use vip_core::{
    api::name_of,
    vrrp::{
        Family,
        packet::{Advert, Checksum, group},
    },
};

use node::{Node, Part};
use scene::{SOON, Scene, VRID};

/// What the tests of this tier start.
fn program() -> PathBuf {
    paths::target().join("debug/vip-node")
}

/// The API server with the product installed.
fn server() -> Result<&'static Lab> {
    static DONE: OnceLock<Result<(), String>> = OnceLock::new();
    let lab = lab::api()?;
    let done = DONE.get_or_init(|| scene::install(lab).map_err(|error| format!("{error:#}")));
    done.clone().map_err(anyhow::Error::msg)?;
    Ok(lab)
}

/// A request that is under way while the address moves may break: the new owner does not know its connection and resets it, or
/// the old one can no longer send the answer. Nothing else may fail, and few of these at each move.
fn under_way(report: &Report) -> usize {
    let kinds = ["connection reset", "operation would block"];
    kinds.iter().filter_map(|kind| report.by_failure.get(*kind)).sum()
}

#[test]
fn no_request_fails_for_want_of_an_owner_when_an_address_moves_by_plan() -> Result<()> {
    let segment = Segment::new(4)?;
    let mut scene = Scene::new(server()?, &segment, 3, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 60);
    scene.reserve(vip)?;
    let first = scene.owner(vip)?;
    scene.wait_handover(vip, None, first, "First")?;
    let (begun, url) = (Instant::now(), format!("http://{vip}/"));
    let watch = scene.client().client().limit(faults::LIMIT).watch(&url, Duration::from_millis(1))?;
    watch.wait_answers(200, SOON)?;

    let second = (first + 1) % 3;
    let prefer = json!({"spec": {"preferredNode": scene.nodes[second].name}}).to_string();
    scene.lab.kubectl(["patch", "virtualip", &vip.to_string(), "--type=merge", "-p", &prefer])?.ok()?;
    scene.wait_handover(vip, Some(first), second, "Moved")?;
    ensure!(scene.owner(vip)? == second, "another node has the address");

    let drained = &scene.nodes[second].name;
    scene.lab.kubectl(["label", "vipnode", drained, "kubectl-vip.io/drain=true"])?.ok()?;
    let third = command::until("the drained node to give the address away", SOON, || {
        let owner = scene.owner(vip)?;
        Ok((owner != second).then_some(owner))
    })?;
    scene.wait_handover(vip, Some(second), third, "Drained")?;
    scene.lab.kubectl(["label", "vipnode", drained, "kubectl-vip.io/drain-"])?.ok()?;

    let excluded = &scene.nodes[third].name;
    let label = "node.kubernetes.io/exclude-from-external-load-balancers";
    scene.lab.kubectl(["label", "node", excluded, &format!("{label}=")])?.ok()?;
    let fourth = command::until("the excluded node to give the address away", SOON, || {
        let owner = scene.owner(vip)?;
        Ok((owner != third).then_some(owner))
    })?;
    scene.wait_status(vip, &scene.nodes[fourth].name)?;
    scene.lab.kubectl(["label", "node", excluded, &format!("{label}-")])?.ok()?;

    // As a DaemonSet rolls: one node after the other, the next when the one before takes part again.
    for index in 0..3 {
        scene.nodes[index].stop()?;
        scene.nodes[index].launch(Part::Vrrp)?;
        scene.nodes[index].launch(Part::Agent)?;
        let name = scene.nodes[index].name.clone();
        command::until(&format!("{name} to take part again"), SOON, || {
            let node = scene.object("vipnode", &name)?;
            let routers = node["status"]["virtualRouters"].as_array().cloned().unwrap_or_default();
            Ok(routers.iter().any(|router| router["state"] != "Init").then_some(()))
        })?;
    }
    scene.owner(vip)?;
    thread::sleep(Duration::from_secs(1));
    let lasted = begun.elapsed().as_millis();
    let report = watch.stop();
    let broken = under_way(&report);
    ensure!(report.failures == broken && broken <= 18, "{report}");
    ensure!(report.longest_gap < faults::LIMIT, "the address was without an owner: {report}");
    ensure!(report.requests as u128 * 10 >= lasted * 9, "in {lasted} ms only {report}");
    Ok(())
}

#[test]
fn both_processes_come_back_without_the_api_server_and_serve_from_what_they_knew() -> Result<()> {
    let segment = Segment::new(3)?;
    let mut scene = Scene::new(server()?, &segment, 2, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 61);
    scene.reserve(vip)?;
    let owner = scene.owner(vip)?;
    scene.wait_status(vip, &scene.nodes[owner].name)?;
    for node in &scene.nodes {
        let state = node.state_dir().join("cluster.state");
        // This address, not one of a test before.
        command::until("what is known to be on the disk", SOON, || {
            let text = fs::read_to_string(&state)?;
            let view: Value = serde_json::from_str(text.lines().nth(1).unwrap_or_default())?;
            let vips = view["objects"]["vips"].as_array().context("no virtual IPs")?;
            let announced = vips.iter().filter(|vip| vip["status"]["firstAnnounced"].is_string());
            let names: Vec<&Value> = announced.map(|vip| &vip["spec"]["address"]).collect();
            Ok((vips.len() == 1 && names == [&json!(vip.to_string())]).then_some(()))
        })?;
    }
    scene.lab.stop_apiserver()?;
    let outcome = (|| -> Result<()> {
        for node in &mut scene.nodes {
            node.kill(Part::Agent)?;
            node.kill(Part::Vrrp)?;
        }
        // The kernels have let go.
        command::until("nobody to have the address", SOON, || {
            Ok(scene.bound(vip)?.is_empty().then_some(()))
        })?;
        let damaged = scene.nodes[0].state_dir().join("cluster.state");
        let whole = fs::read(&damaged)?;
        fs::write(&damaged, &whole[..whole.len() - 1])?;
        for node in &mut scene.nodes {
            node.launch(Part::Vrrp)?;
            node.launch(Part::Agent)?;
        }
        let back = scene.owner(vip)?;
        ensure!(back == 1, "the node with the damaged state owns an address");
        let log = fs::read_to_string(scene.nodes[0].log(Part::Agent))?;
        ensure!(
            log.contains("the last known state is of no use: it is damaged: its checksum is wrong"),
            "{log}"
        );
        let answer = scene.client().client().get(&format!("http://{vip}/"))?;
        ensure!(answer.body == scene.nodes[1].name, "{answer:?}");
        let ready = scene.nodes[1].host.client().get("http://127.0.0.1:10212/readyz")?;
        let stale = "the API server has not answered yet: this node serves what it knew last";
        ensure!(ready.status == 503 && ready.body.contains(stale), "{ready:?}");
        Ok(())
    })();
    scene.lab.start_apiserver()?;
    outcome?;
    scene.wait_status(vip, &scene.nodes[1].name)
}

#[test]
fn without_any_ipv4_an_address_is_elected_announced_and_moved() -> Result<()> {
    let segment = Segment::new_v6(4)?;
    let scene = Scene::new(server()?, &segment, 3, "100ms")?;
    let vip = Ipv6Addr::new(0xfd87, 0, 0, 0, 0, 0, 2, 0x61);
    scene.reserve(vip)?;
    let first = scene.owner(vip)?;
    scene.wait_status(vip, &scene.nodes[first].name)?;
    let client = scene.client().client().limit(faults::LIMIT);
    let watch = client.watch(&format!("http://[{vip}]/"), faults::WARM)?;
    watch.wait_answers(50, SOON)?;
    let second = (first + 1) % 3;
    let prefer = json!({"spec": {"preferredNode": scene.nodes[second].name}}).to_string();
    scene.lab.kubectl(["patch", "virtualip", &name_of(vip.into()), "--type=merge", "-p", &prefer])?.ok()?;
    scene.wait_status(vip, &scene.nodes[second].name)?;
    ensure!(scene.owner(vip)? == second, "another node has the address");
    let report = watch.stop();
    let broken = under_way(&report);
    ensure!(report.failures == broken && broken <= 3, "{report}");
    // Each knows the others by their link-local addresses.
    command::until("all peers to be known", SOON, || {
        let peers = scene.object("vipnode", &scene.nodes[first].name)?["status"]["peers"].clone();
        let peers = peers.as_array().context("no peers")?;
        ensure!(!peers.is_empty() && peers.iter().all(|peer| peer["node"].is_string()), "{peers:?}");
        Ok(Some(()))
    })?;
    segment.isolate(scene.nodes[second].host.number())?;
    command::until("an answer from another node", SOON, || {
        let answer = client.get(&format!("http://[{vip}]/"))?;
        Ok((answer.body != scene.nodes[second].name).then_some(()))
    })
}

#[test]
fn an_owner_that_is_unplugged_while_the_api_server_is_away_is_replaced_once() -> Result<()> {
    let segment = Segment::new(4)?;
    let scene = Scene::new(server()?, &segment, 3, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 64);
    scene.reserve(vip)?;
    let owner = scene.owner(vip)?;
    scene.wait_status(vip, &scene.nodes[owner].name)?;
    scene.lab.stop_apiserver()?;
    let outcome = (|| -> Result<usize> {
        let (next, report) = faults::unplug(&scene, vip)?;
        println!("longest gap {} ms", report.longest_gap.as_millis());
        ensure!(report.longest_gap < Duration::from_secs(1), "{report}");
        // Longer than a carrier has to last before its node takes part again.
        for _ in 0..10 {
            thread::sleep(Duration::from_millis(500));
            ensure!(scene.owner(vip)? == next, "the address moved a second time");
        }
        Ok(next)
    })();
    scene.lab.start_apiserver()?;
    scene.wait_handover(vip, Some(owner), outcome?, "OwnerSilent")
}

#[test]
fn an_address_that_another_machine_uses_is_never_bound_and_its_machine_is_named() -> Result<()> {
    let segment = Segment::new(4)?;
    let scene = Scene::new(server()?, &segment, 2, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 62);
    let other = segment.host(4);
    other.netns().ip(&format!("address add {vip}/32 dev eth0"))?;
    scene.reserve(vip)?;
    let name = vip.to_string();
    let conflict = command::until("the condition Conflict", SOON, || {
        ensure!(scene.bound(vip)?.is_empty(), "it is bound on {:?}", scene.bound(vip)?);
        let found = scene.object("virtualip", &name)?;
        let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.into_iter().find(|c| c["type"] == "Conflict" && c["status"] == "True"))
    })?;
    let mac = other.mac()?;
    let words = conflict["message"].as_str().context("no message")?;
    let mut all = scene.nodes.iter().map(|node| format!("{vip} is used by {mac} (eth0 on {}): ", node.name));
    ensure!(all.any(|start| words.starts_with(&start)), "{words}");
    scene.event("AddressInUse", &mac)?;

    // When the machine has left the address, it is bound. When it comes back, it is defended and told.
    other.netns().ip(&format!("address delete {vip}/32 dev eth0"))?;
    let limit = Duration::from_secs(60);
    command::until("the address to be bound", limit, || Ok((scene.bound(vip)?.len() == 1).then_some(())))?;
    other.netns().ip(&format!("address add {vip}/32 dev eth0"))?;
    other.exec(&format!("arping -c 2 -A -I eth0 {vip}"))?.ok()?;
    let owner = scene.bound(vip)?;
    ensure!(owner.len() == 1, "bound on {owner:?}");
    scene.event("AddressClaimed", &mac)?;
    Ok(())
}

#[test]
fn an_address_that_another_program_takes_off_is_put_back_and_told() -> Result<()> {
    let segment = Segment::new(3)?;
    let scene = Scene::new(server()?, &segment, 2, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 69);
    scene.reserve(vip)?;
    let owner = scene.owner(vip)?;
    let node = &scene.nodes[owner];
    scene.wait_status(vip, &node.name)?;
    node.host.netns().ip(&format!("address delete {vip}/32 dev eth0"))?;
    scene.event("Repaired", &format!("{vip} was taken off {} by another program", node.name))?;
    ensure!(scene.bound(vip)? == [owner], "bound on {:?}", scene.bound(vip)?);
    Ok(())
}

#[test]
fn an_address_that_a_node_has_by_other_means_is_bound_by_none_and_the_node_is_named() -> Result<()> {
    let segment = Segment::new(3)?;
    let scene = Scene::new(server()?, &segment, 2, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 68);
    let other = &scene.nodes[1];
    other.host.netns().ip(&format!("address add {vip}/32 dev eth0"))?;
    scene.reserve(vip)?;
    let conflict = command::until("the condition Conflict", SOON, || {
        ensure!(!scene.nodes[0].has(vip.into())?, "another node has bound it");
        let found = scene.object("virtualip", &vip.to_string())?;
        let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.into_iter().find(|c| c["type"] == "Conflict" && c["status"] == "True"))
    })?;
    let who = format!("{vip} is used by node {} ({} on eth0): ", other.name, other.host.mac()?);
    let words = conflict["message"].as_str().context("no message")?;
    ensure!(conflict["reason"] == "AddressInUse" && words.starts_with(&who), "{conflict}");
    other.host.netns().ip(&format!("address delete {vip}/32 dev eth0"))?;
    let owner = scene.owner(vip)?;
    scene.wait_status(vip, &scene.nodes[owner].name)
}

#[test]
fn a_router_of_others_is_told_and_not_obeyed() -> Result<()> {
    let segment = Segment::new(3)?;
    let scene = Scene::new(server()?, &segment, 2, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 67);
    scene.reserve(vip)?;
    let owner = scene.owner(vip)?;
    scene.wait_status(vip, &scene.nodes[owner].name)?;
    let other = scene.client();
    let advert = Advert { vrid: VRID, priority: 255, interval: 10, addresses: vec![[10, 87, 9, 9].into()] };
    let bytes = advert.encode(other.address().into(), group(Family::V4), Checksum::PseudoHeader);
    other.inject(255, &bytes)?;
    let who = format!("{} advertises virtual router {VRID} with priority 255", other.address());
    scene.event("ForeignRouter", &who)?;
    ensure!(scene.owner(vip)? == owner, "it was obeyed");
    let counted = || {
        Ok((scene.object("vipnode", &scene.nodes[owner].name)?["status"]["refused"]["foreign"] == 1)
            .then_some(()))
    };
    command::until("it to be counted", SOON, counted)
}

#[test]
fn two_owners_are_told_and_the_better_one_remains_when_they_hear_each_other_again() -> Result<()> {
    let segment = Segment::new(4)?;
    let scene = Scene::new(server()?, &segment, 3, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 65);
    scene.reserve(vip)?;
    let first = scene.owner(vip)?;
    let priorities: Vec<u64> = command::until("all nodes to take part", SOON, || {
        let priority = |node: &Node<'_>| -> Result<Option<u64>> {
            let object = scene.object("vipnode", &node.name)?;
            Ok(object["status"]["virtualRouters"][0]["priority"].as_u64())
        };
        scene.nodes.iter().map(priority).collect::<Result<Option<Vec<u64>>>>()
    })?;
    // Of the best and the worst, the worst is made deaf: the others go on, and so does it.
    let best = (0..3).max_by_key(|index| priorities[*index]).context("no node")?;
    let worst = (0..3).min_by_key(|index| priorities[*index]).context("no node")?;
    let prefer = json!({"spec": {"preferredNode": scene.nodes[best].name}}).to_string();
    if first != best {
        scene.lab.kubectl(["patch", "virtualip", &vip.to_string(), "--type=merge", "-p", &prefer])?.ok()?;
    }
    scene.wait_status(vip, &scene.nodes[best].name)?;
    segment.deafen(scene.nodes[worst].host.number())?;
    let note = scene.event("TwoOwners", &vip.to_string())?;
    ensure!(note.starts_with(&scene.nodes[worst].name), "{note}");
    ensure!(scene.bound(vip)?.len() == 2, "one of them gave way already");
    segment.heal()?;
    ensure!(scene.owner(vip)? == best, "the worse one remains");
    scene.wait_handover(vip, Some(worst), best, "HigherPriority")?;
    command::until("the conflict to be over", SOON, || {
        let found = scene.object("virtualip", &vip.to_string())?;
        let conditions = found["status"]["conditions"].as_array().cloned().unwrap_or_default();
        Ok(conditions.iter().any(|c| c["type"] == "Conflict" && c["status"] == "False").then_some(()))
    })
}

#[test]
fn whatever_is_killed_or_stopped_there_is_one_owner_and_it_answers() -> Result<()> {
    let segment = Segment::new(3 + faults::HOSTS)?;
    let mut scene = Scene::new(server()?, &segment, 3, "100ms")?;
    let vip = Ipv4Addr::new(10, 87, 2, 63);
    scene.reserve(vip)?;
    // Each of them twice in a row: what one leaves behind meets the next.
    for fault in faults::ALL.into_iter().filter(|fault| fault.times == 2) {
        let measured = fault.strike(&mut scene, vip)?;
        println!("{fault}: {measured}; goal: {}", fault.goal());
        fault.judge(&measured).with_context(|| format!("{fault}: {measured}"))?;
    }
    Ok(())
}
