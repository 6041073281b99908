//! `lab demo`: the product's story on a real cluster, by the commands that a user would type. Every claim is checked:
//! what does not happen ends the demo with an error.

use std::{
    collections::{BTreeMap, BTreeSet},
    env,
    io::{self, IsTerminal as _, Write as _},
    net::Ipv4Addr,
    process::Stdio,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;

use crate::{
    command, interrupt,
    lab::{Lab, Parts},
    product::{self, Owner},
    workload::Workload,
};

/// The namespace of the demo's Service.
const NAMESPACE: &str = "shop";
/// What the pool of the demo holds.
const POOL: &str = "lab=10.87.2.50-10.87.2.59";

/// Starts a cluster of its own, tells the story, and takes the cluster down.
pub fn run() -> Result<()> {
    let name = "demo";
    interrupt::on_interrupt(move || {
        if let Err(error) = Lab::remove(name) {
            eprintln!("error: {error:#}");
        }
    })?;
    product::build()?;
    say(
        "A three-node Kubernetes cluster is being started on this machine: a control plane, and a virtual machine\n\
         whose kernel has IPVS, with three nodes in it. This takes a minute or two.",
    );
    let lab = Lab::up(name, Parts::Cluster)?;
    let logs = lab.logs_dir();
    let result = story(&lab);
    if result.is_err() {
        product::collect_logs(&lab);
    }
    Lab::remove(name)?;
    result
        .with_context(|| format!("the demo did not go as it should; all logs are in {}", logs.display()))?;
    say("That was kubectl-vip. For a cluster to play with:  make lab-up");
    Ok(())
}

fn story(lab: &Lab) -> Result<()> {
    show(lab, "kubectl get nodes -o wide")?;
    let web = Workload::deploy(lab, NAMESPACE, "web", 3)?;
    show(lab, "kubectl get pods -n shop -o wide")?;

    say("Install the agents, and give them ten addresses of the LAN to hand out.");
    show(lab, &format!("kubectl vip install --pool {POOL}"))?;
    show(lab, "kubectl get pods -n kubectl-vip -o wide")?;

    say("Give the Service an address of its own.");
    show(lab, "kubectl vip expose svc/web -n shop")?;
    let vip = product::address_of(lab, NAMESPACE, "web")?;
    let owner = product::wait_owner(lab, vip, Duration::from_secs(20))?;
    show(lab, "kubectl vip status -A")?;
    show(lab, "kubectl get vip,vippool,vipnode")?;

    say("A client on the LAN asks that address. Pods on all three nodes answer.");
    answers(lab, &web, vip)?;
    fail_over(lab, vip, owner)?;

    say("The backends follow the pods.");
    for replicas in [9, 1] {
        show(lab, &format!("kubectl scale -n shop deployment/web --replicas={replicas}"))?;
        web.wait(replicas)?;
        product::wait_backends(lab, vip, replicas, Duration::from_secs(30))?;
        show(lab, "kubectl vip status -n shop")?;
        same_everywhere(lab, vip, replicas)?;
    }

    say("Take everything away again.");
    show(lab, "kubectl vip uninstall --yes")?;
    for node in lab.nodes() {
        let left = product::leftovers(&node)?;
        ensure!(left.is_empty(), "left behind on {}: {}", node.name(), left.join("; "));
        println!("{}: no address, no IPVS service and no nftables table of kubectl-vip is left", node.name());
    }
    ensure!(
        product::cluster_leftovers(lab)?.is_empty(),
        "left behind in the cluster: {:?}",
        product::cluster_leftovers(lab)?
    );
    println!("the cluster: no object of kubectl-vip is left");
    Ok(())
}

/// Eight requests, and the node that each was answered from.
fn answers(lab: &Lab, web: &Workload<'_>, vip: Ipv4Addr) -> Result<()> {
    let pods = web.pods()?;
    let mut nodes = BTreeSet::new();
    announce(&format!("for i in 1 2 3 4 5 6 7 8; do curl http://{vip}/hostname; done"));
    for _ in 0..8 {
        let answer = lab.client().get(&format!("http://{vip}/hostname"))?;
        let pod =
            pods.get(&answer.body).with_context(|| format!("{} is no pod of the Service", answer.body))?;
        println!("{}  ({})", pod.name, pod.node);
        nodes.insert(pod.node.clone());
    }
    ensure!(nodes.len() == 3, "pods of {} nodes answered, not of 3", nodes.len());
    Ok(())
}

/// The owner loses its link while a client asks every 20 ms.
fn fail_over(lab: &Lab, vip: Ipv4Addr, owner: Owner) -> Result<()> {
    say(&format!(
        "{} owns {vip}. Its network cable is pulled now, while a client asks every 20 ms.",
        owner.node
    ));
    let watch = lab
        .client()
        .limit(Duration::from_secs(1))
        .watch(&format!("http://{vip}/hostname"), Duration::from_millis(20))?;
    watch.wait_answers(50, Duration::from_secs(10))?;
    announce(&format!("ip link set tap{} down", owner.number));
    lab.unplug(owner.number)?;
    let pulled = Instant::now();
    let next = product::wait_other_owner(lab, vip, owner.number, Duration::from_secs(10))?;
    thread::sleep(Duration::from_secs(2).saturating_sub(pulled.elapsed()));
    let report = watch.stop();
    println!("the longest time without an answer: {} ms", report.longest_gap.as_millis());
    ensure!(report.longest_gap < Duration::from_secs(1), "the client waited too long: {report}");
    println!("{} answers for {vip} now", next.node);
    product::wait_status_owner(lab, vip, &next.node, Duration::from_secs(20))?;
    show(lab, "kubectl vip status -n shop")?;

    say(&format!("{} is plugged in again. There is still one owner.", owner.node));
    announce(&format!("ip link set tap{} up", owner.number));
    lab.plug(owner.number)?;
    let settled = product::wait_one_owner(lab, vip, Duration::from_secs(20))?;
    println!("{} answers for {vip}, no other node does", settled.node);
    wait_ready(lab)
}

/// All nodes are Ready: Kubernetes takes some seconds to believe in a node again.
fn wait_ready(lab: &Lab) -> Result<()> {
    command::until("three Ready nodes", Duration::from_secs(60), || {
        let nodes: Value = serde_json::from_str(&lab.kubectl(["get", "nodes", "-o", "json"])?.ok()?.stdout)?;
        let ready = nodes["items"].as_array().is_some_and(|nodes| {
            nodes.iter().all(|node| {
                let conditions = node["status"]["conditions"].as_array();
                conditions.is_some_and(|all| {
                    all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True")
                })
            })
        });
        Ok(ready.then_some(()))
    })
}

/// Every node's kernel holds the same backends.
fn same_everywhere(lab: &Lab, vip: Ipv4Addr, backends: u32) -> Result<()> {
    let mut counts = BTreeMap::new();
    for node in lab.nodes() {
        counts.insert(node.name(), product::destinations(&node, vip, 80)?.len());
    }
    if counts.values().any(|count| *count != backends as usize) {
        bail!("destinations by node: {counts:?}, wanted {backends} on each");
    }
    Ok(())
}

/// A sentence for the reader, and time to read it.
fn say(text: &str) {
    println!("\n# {}", text.replace('\n', "\n# "));
    pause();
}

/// A command line as the reader would type it.
fn announce(line: &str) {
    println!("\n$ {line}");
    pause();
}

/// Shows a command, runs it with its real output, and wants success.
fn show(lab: &Lab, line: &str) -> Result<()> {
    announce(line);
    let mut kubectl = lab.kubectl_command()?;
    kubectl.args(line.split_whitespace().skip(1)).stdin(Stdio::null());
    let mut child = command::spawn(&mut kubectl)?;
    let code = command::wait(&mut child, Duration::from_secs(300))?;
    ensure!(
        code == Some(0),
        "`{line}` ended with {}",
        code.map_or("a time-out".to_owned(), |code| format!("exit code {code}"))
    );
    Ok(())
}

/// On a terminal a reader gets time; a log does not need it.
fn pause() {
    let _ = io::stdout().flush();
    if io::stdout().is_terminal() && env::var_os("CI").is_none() {
        thread::sleep(Duration::from_millis(1500));
    }
}
