//! The cluster tier: the product installed in a real three-node cluster, and what its users rely on. The tests share
//! one lab. Those that take from it what others need, a link or the API server, have it for themselves.

#[path = "cluster/agent.rs"]
mod agent;
#[path = "cluster/check.rs"]
mod check_itself;
#[path = "cluster/failover.rs"]
mod failover;
#[path = "cluster/fates.rs"]
mod fates;
#[path = "cluster/growth.rs"]
mod growth;
#[path = "cluster/install.rs"]
mod install;
#[path = "cluster/ipv6.rs"]
mod ipv6;
#[path = "cluster/lab.rs"]
mod lab_itself;
#[path = "cluster/neighbours.rs"]
mod neighbours;
#[path = "cluster/services.rs"]
mod services;
#[path = "cluster/traffic.rs"]
mod traffic;
#[path = "cluster/uninstall.rs"]
mod uninstall;

use std::{
    fs::File,
    io::Write as _,
    net::Ipv4Addr,
    sync::{Mutex, PoisonError, RwLock},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use jiff::Timestamp;
use lab::{
    Lab, Report,
    product::{self, Owner},
    workload::Workload,
};

/// The namespace of the tests' Services.
const NAMESPACE: &str = "shop";
/// The pool of these tests.
const POOL: &str = "lab=10.87.2.0/24,fd87::2:0/112";

/// How long what comes soon may take on a slow machine.
const SOON: Duration = Duration::from_secs(60);

/// Held for writing by tests that have the lab for themselves, for reading by all others.
static LAB: RwLock<()> = RwLock::new(());

/// What is not ours on each node, as it was before the product came.
static PLANTED: Mutex<Vec<String>> = Mutex::new(Vec::new());

/// The lab with the product installed, if need be, and beside it what is not ours on every node.
fn installed() -> Result<&'static Lab> {
    let lab = lab::cluster()?;
    let mut planted = PLANTED.lock().unwrap_or_else(PoisonError::into_inner);
    if planted.is_empty() {
        *planted =
            lab.each_node(|node| neighbours::plant(&node).and_then(|()| neighbours::foreign(&node)))?;
    }
    let there = lab.kubectl(["get", "daemonset", "vip-node", "-n", "kubectl-vip"])?.success();
    if !there {
        lab.kubectl_for(Duration::from_secs(300), ["vip", "install", "--pool", POOL])?.ok()?;
    }
    Ok(lab)
}

fn planted() -> Vec<String> {
    PLANTED.lock().unwrap_or_else(PoisonError::into_inner).clone()
}

/// Three pods, one on each node, that all tests share: starting pods is what takes longest.
fn web(lab: &'static Lab) -> Result<Workload<'static>> {
    static WEB: Mutex<Option<Workload<'static>>> = Mutex::new(None);
    let mut web = WEB.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(web) = &*web {
        return Ok(web.clone());
    }
    let deployed = Workload::deploy(lab, NAMESPACE, "web", 3)?;
    *web = Some(deployed.clone());
    Ok(deployed)
}

/// A Service of its own for the shared pods, and its virtual IP with an owner.
struct Exposed {
    service: String,
    vip: Ipv4Addr,
    owner: Owner,
}

impl Exposed {
    fn new(lab: &'static Lab, service: &str) -> Result<Self> {
        web(lab)?.add_service(service, 80)?;
        lab.kubectl(["vip", "expose", &format!("svc/{service}"), "-n", NAMESPACE])?.ok()?;
        let vip = product::address_of(lab, NAMESPACE, service)?;
        let owner = product::wait_one_owner(lab, vip, SOON)?;
        product::wait_backends(lab, vip, 3, SOON)?;
        product::wait_destinations(lab, vip, 80, 3, SOON)?;
        Ok(Self { service: service.to_owned(), vip, owner })
    }

    fn url(&self) -> String {
        format!("http://{}/hostname", self.vip)
    }

    fn remove(self, lab: &Lab) -> Result<()> {
        lab.kubectl(["vip", "unexpose", &format!("svc/{}", self.service), "-n", NAMESPACE])?.ok()?;
        lab.kubectl(["delete", "service", &self.service, "-n", NAMESPACE, "--wait=false"])?.ok().map(drop)
    }
}

/// Adds the test that ends to the list of when each ran, for who reads the other logs.
fn note(lab: &Lab, began: Timestamp) {
    let seconds = began.duration_until(Timestamp::now()).as_secs_f64();
    let line = format!("{began:.3} {seconds:6.1} s  {}\n", thread::current().name().unwrap_or_default());
    let list = File::options().create(true).append(true).open(lab.logs_dir().join("tests.log"));
    if let Err(error) = list.and_then(|mut list| list.write_all(line.as_bytes())) {
        eprintln!("tests.log: {error}");
    }
}

/// Asks for something that a change of owners would break. A machine that stands still for longer than its peers wait loses
/// its addresses: then it is asked once more.
fn undisturbed<T>(lab: &Lab, vip: Ipv4Addr, ask: impl Fn() -> Result<T>) -> Result<T> {
    let before = product::wait_owner(lab, vip, SOON)?;
    ask().or_else(|error| {
        let owner = product::wait_owner(lab, vip, SOON)?;
        if owner == before {
            return Err(error);
        }
        println!("{vip} went from {} to {} meanwhile: {error:#}", before.node, owner.node);
        ask()
    })
}

/// Whether a node became master of a virtual router since then, as its vrrp says, also while the API server is away. Unasked that is
/// done by one that stood still for a moment and finds that nobody took its place, and by its successor where somebody did.
fn moved_since(lab: &Lab, since: Timestamp) -> Result<bool> {
    let look = "grep -h ' Master ' /var/log/pods/kubectl-vip_vip-node-*/vrrp/*.log; true";
    let logs = lab.each_node(|node| Ok(node.exec(look)?.ok()?.stdout))?;
    let mut times = logs.iter().flat_map(|log| log.lines()).filter_map(|line| line.split(' ').next());
    Ok(times.any(|time| time.parse::<Timestamp>().is_ok_and(|time| time > since)))
}

/// Wants a client of a virtual IP to have had an answer in every second, but for the time that the machine stood still: then a client
/// of one of the pods had none either.
fn answered(client: &Report, beside: &Report) -> Result<()> {
    let gap = Duration::from_secs(1) + beside.longest_gap;
    ensure!(
        client.longest_gap < gap,
        "{gap:?} without an answer are borne: {client}; of a pod itself: {beside}"
    );
    Ok(())
}

/// Runs a test that others may run beside.
fn check(body: impl FnOnce() -> Result<()>) {
    let _held = LAB.read().unwrap_or_else(PoisonError::into_inner);
    run(body);
}

/// Runs a test alone.
fn check_alone(body: impl FnOnce() -> Result<()>) {
    let _held = LAB.write().unwrap_or_else(PoisonError::into_inner);
    run(body);
}

/// Runs a test body and notes when, beside the other logs; when it fails, the agents' logs are saved too and the folder of
/// all is named.
fn run(body: impl FnOnce() -> Result<()>) {
    let began = Timestamp::now();
    let result = body();
    if let Ok(lab) = lab::cluster() {
        note(lab, began);
    }
    if let Err(error) = result {
        let mut folder = String::new();
        if let Ok(lab) = lab::cluster() {
            product::collect_logs(lab);
            folder = format!("\nall logs: {}", lab.logs_dir().display());
        }
        panic!("{error:#}{folder}");
    }
}
