//! What an agent takes, and how soon it follows, where there is much to do: two thousand Services of five endpoints. An emulated
//! machine bears that once, not three times: it has an agent on one node alone, and the Services are headless, so that each
//! kube-proxy leaves them alone.

use std::{
    collections::BTreeMap,
    fmt::Write as _,
    fs,
    io::{Read as _, Write as _},
    net::{IpAddr, Ipv4Addr, SocketAddr, TcpStream},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, command, product};
use serde_json::{Value, json};
use vip_core::plan::{Protocol, ServiceKey};

use super::{NAMESPACE, PLACE, SETTLE, bring, footprint};
use crate::{
    adverts::{ETHERNET, Ear, age},
    loader::Loader,
    slowdown::Slowdown,
};

/// The word that starts the half that runs on a node.
pub const CHANGE: &str = "change-endpoints";

const VIPS: u16 = 250;
/// Of each virtual IP: as many as one may have.
const SERVICES: u16 = 8;
const ENDPOINTS: u16 = 5;
/// Where the API server is asked in plain words by who is in the lab.
const PROXY: &str = "10.87.0.1:8001";
/// How often each change is made.
const TIMES: u16 = 50;
/// After each: what follows from it is written by then.
const QUIET: Duration = Duration::from_millis(500);
/// The API server's port, and the number of its transport.
const API: u16 = 6443;
const TCP: u8 = 6;
/// What a change may take from the event to the kernel, on the host.
const GOAL: Duration = Duration::from_millis(10);
/// How long nothing is changed.
const IDLE: Duration = Duration::from_secs(30);
const LIMIT: Duration = Duration::from_secs(600);

/// Measures in a cluster that has the product.
pub fn measure(lab: &Lab) -> Result<()> {
    println!(
        "{VIPS} virtual IPs with {SERVICES} Services of {ENDPOINTS} endpoints each, one agent, resident memory, MiB:"
    );
    let node = lab.node(1);
    let select =
        json!({"spec": {"template": {"spec": {"nodeSelector": {"kubernetes.io/hostname": node.name()}}}}});
    let patch = ["patch", "daemonset/vip-node", "-n", "kubectl-vip", "-p", &select.to_string()];
    lab.kubectl(patch)?.ok()?;
    product::wait_rollout(lab)?;
    fill(lab)?;
    thread::sleep(SETTLE);
    footprint::memory(&node, "owner")?;
    idle(&node)?;
    changes(lab, &node)
}

/// Makes them all, and waits until each has an owner with all of its backends.
fn fill(lab: &Lab) -> Result<()> {
    lab.apply(
        "apiVersion: kubectl-vip.io/v1alpha1
kind: VIPPool
metadata: {name: scale}
spec:
  addresses: [10.87.3.0/24]
  virtualRouters: {first: 200, count: 50}
",
    )?;
    // One kubectl makes no more than fifty requests a second.
    thread::scope(|scope| -> Result<()> {
        let parts: Vec<_> = (0..4).map(|part| scope.spawn(move || create(lab, part))).collect();
        parts.into_iter().try_for_each(|part| part.join().ok().context("a panic")?)
    })?;
    let clock = Instant::now();
    command::until("all of them to be programmed and announced", LIMIT, || {
        let status = "jsonpath={range .items[*]}{.status.node}/{.status.backends.ready} {end}";
        let told = lab.kubectl(["get", "virtualips", "-o", status])?.ok()?.stdout;
        let all = format!("/{}", SERVICES * ENDPOINTS);
        let owned = told.split_whitespace().filter(|word| word.ends_with(&all) && !word.starts_with('/'));
        let owned = owned.count();
        ensure!(owned == usize::from(VIPS), "{owned} are");
        Ok(Some(()))
    })?;
    println!("  (all announced {:.0} s after the last was made)", clock.elapsed().as_secs_f64());
    Ok(())
}

fn create(lab: &Lab, part: u16) -> Result<()> {
    let mut manifest = String::new();
    for vip in (0..VIPS).filter(|vip| vip % 4 == part) {
        let mut services = String::new();
        for n in (0..SERVICES).map(|n| vip * SERVICES + n) {
            write!(services, "\n  - {{namespace: {NAMESPACE}, name: scale-{n}}}")?;
            write!(
                manifest,
                "apiVersion: v1
kind: Service
metadata: {{name: scale-{n}, namespace: {NAMESPACE}}}
spec:
  clusterIP: None
  ports:
  - {{port: {}}}
---
{}
---
",
                port(n),
                slice(n, ENDPOINTS, true)
            )?;
        }
        let address = address(vip);
        write!(
            manifest,
            "apiVersion: kubectl-vip.io/v1alpha1
kind: VirtualIP
metadata: {{name: {address}}}
spec:
  address: {address}
  virtualRouter: {}
  healthCheck: {{type: None}}
  services:{services}
---
",
            200 + vip % 50
        )?;
    }
    let file = lab.shared_dir().join(format!("scale-{part}.yaml"));
    fs::write(&file, manifest)?;
    let words = ["create".as_ref(), "-f".as_ref(), file.as_os_str()];
    lab.kubectl_for(LIMIT, words)?.ok().map(drop)
}

fn address(vip: u16) -> Ipv4Addr {
    Ipv4Addr::from([10, 87, 3, vip as u8 + 1])
}

/// Of the Service with this number.
fn port(n: u16) -> u16 {
    1000 + n % SERVICES
}

/// An EndpointSlice with so many endpoints, the last of them ready or not.
fn slice(n: u16, count: u16, ready: bool) -> Value {
    let name = format!("scale-{n}");
    let endpoint = |pod: u16| {
        let [high, low] = n.to_be_bytes();
        json!({"addresses": [format!("10.{}.{high}.{low}", 200 + pod)], "conditions": {"ready": ready || pod < count}})
    };
    json!({
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": name, "namespace": NAMESPACE, "labels": {
            "kubernetes.io/service-name": name,
            // As Kubernetes has it: kube-proxy does not watch these.
            "service.kubernetes.io/headless": "",
        }},
        "ports": [{"port": 8080, "protocol": "TCP"}],
        "endpoints": (1..=count).map(endpoint).collect::<Vec<_>>(),
    })
}

/// The processor's time that both processes take while nothing happens.
fn idle(node: &Node<'_>) -> Result<()> {
    let processes = [node.process("agent")?, node.process("vrrp")?];
    let ticks = || -> Result<Vec<u64>> {
        let one = |process: &u32| {
            let stat = node.exec(&format!("cat /proc/{process}/stat"))?.ok()?.stdout;
            // After the name in parentheses (proc(5)): utime and stime are the 14th and 15th field of all.
            let rest = stat.rsplit_once(')').context("no name")?.1;
            rest.split_whitespace().skip(11).take(2).map(|word| Ok(word.parse::<u64>()?)).sum()
        };
        processes.iter().map(one).collect()
    };
    let (before, clock) = (ticks()?, Instant::now());
    thread::sleep(IDLE);
    let (after, took) = (ticks()?, clock.elapsed());
    // A hundred ticks are a second.
    let share = |index: usize| (after[index] - before[index]) as f64 / took.as_secs_f64();
    println!(
        "  while nothing changes: agent {:.1} %, vrrp {:.1} % of one of the machine's processors",
        share(0),
        share(1)
    );
    Ok(())
}

/// Single changes: how soon the kernel has them, and what the API server sends for one.
fn changes(lab: &Lab, node: &Node<'_>) -> Result<()> {
    bring(lab, node)?;
    let mut proxy = lab.kubectl_command()?;
    proxy.args(["proxy", "--address=10.87.0.1", "--port=8001", "--accept-hosts=.*", "--reject-methods=^$"]);
    proxy.stdout(std::process::Stdio::null());
    let mut proxy = lab.netns().spawn(&mut proxy)?;
    let agent = node.process("agent")?;
    let result = (|| {
        let before = received(node, agent)?;
        let words = format!("{PLACE}/bench {CHANGE} {}", Slowdown::word());
        print!("{}", node.exec_for(&words, LIMIT)?.ok()?.stdout);
        let bytes = received(node, agent)?.saturating_sub(before);
        println!(
            "  bytes from the API server to one agent for each change: {}",
            bytes / u64::from(TIMES * 4)
        );
        Ok(())
    })();
    proxy.kill()?;
    proxy.wait()?;
    result
}

/// What a process has received on its connections.
fn received(node: &Node<'_>, process: u32) -> Result<u64> {
    let text = node.exec("ss --tcp --info --processes --numeric --no-header --oneline")?.ok()?.stdout;
    let mine = text.lines().filter(|line| line.contains(&format!("pid={process},")));
    let counts = mine.flat_map(str::split_whitespace).filter_map(|word| word.strip_prefix("bytes_received:"));
    counts.map(|count| Ok(count.parse::<u64>()?)).sum()
}

/// The half on the node: makes one change after the other, when all is quiet, and looks for each in the kernel's table. The event
/// has arrived with the API server's first word on the connection that hears first most often: the watch of the only program on
/// the node to which such a change is told.
pub fn change(words: &[String]) -> Result<()> {
    let slowdown = Slowdown::from_word(words.first().context("the host's time, please")?)?;
    let (loader, ear) = (Loader::open()?, Ear::here()?);
    let mut changes: Vec<(&str, Vec<(u16, Duration)>)> = Vec::new();
    for turn in 0..TIMES {
        let n = turn * 37 % (VIPS * SERVICES);
        let key = ServiceKey {
            address: IpAddr::from(address(n / SERVICES)),
            protocol: Protocol::Tcp,
            port: port(n),
        };
        let steps = [
            ("one endpoint added", ENDPOINTS + 1, true, Some(1)),
            ("not ready any more", ENDPOINTS + 1, false, Some(0)),
            ("ready again", ENDPOINTS + 1, true, Some(1)),
            ("removed", ENDPOINTS, true, None),
        ];
        for (what, count, ready, wanted) in steps {
            let [high, low] = n.to_be_bytes();
            let to = SocketAddr::from(([10, 200 + ENDPOINTS as u8 + 1, high, low], 8080));
            let start = Instant::now();
            patch(n, &slice(n, count, ready))?;
            while loader.destinations(&key)?.iter().find(|(at, _)| *at == to).map(|(_, weight)| *weight)
                != wanted
            {
                ensure!(start.elapsed() < LIMIT, "{what}: not in the kernel");
                thread::sleep(Duration::from_millis(1));
            }
            let done = Instant::now();
            let mut heard = Vec::new();
            let word = |frame: &[u8], at| Some((listener(frame)?, age(at)));
            while let Some((port, age)) = ear.find(done + QUIET, word)? {
                let before = age.checked_sub(done.elapsed()).filter(|_| age < start.elapsed());
                heard.extend(before.map(|before| (port, before)));
            }
            changes.push((what, heard));
        }
    }
    let mut firsts: BTreeMap<u16, usize> = BTreeMap::new();
    for (port, _) in changes.iter().filter_map(|(_, heard)| heard.first()) {
        *firsts.entry(*port).or_default() += 1;
    }
    let (watch, _) = firsts.iter().max_by_key(|(_, count)| **count).context("no word from the API server")?;
    let mut took: BTreeMap<&str, Vec<Duration>> = BTreeMap::new();
    for (what, heard) in &changes {
        let of_watch = heard.iter().find(|(port, _)| port == watch);
        let (_, before) = of_watch.or(heard.first()).context("a change of which nothing was heard")?;
        took.entry(what).or_default().push(*before);
    }
    println!(
        "  from the event's arrival at the node to the kernel, {TIMES} times each; the machine is {slowdown} times slower than its host:"
    );
    for (what, mut took) in took {
        println!("  {what:20} {}", slowdown.tell(&mut took, GOAL));
    }
    Ok(())
}

/// The port to which an API server says something with a frame.
fn listener(frame: &[u8]) -> Option<u16> {
    let packet = frame.get(ETHERNET..)?;
    let number = |at: usize| Some(u16::from_be_bytes(*packet.get(at..)?.first_chunk()?));
    let header = usize::from(packet.first()? & 0xf) * 4;
    let data = usize::from(packet.get(header + 12)? >> 4) * 4;
    let empty = usize::from(number(2)?) == header + data;
    let is_word = *packet.get(9)? == TCP && !empty && number(header)? == API;
    is_word.then(|| number(header + 2))?
}

/// Replaces an EndpointSlice.
fn patch(n: u16, slice: &Value) -> Result<()> {
    let slice = slice.to_string();
    let mut stream = TcpStream::connect(PROXY).with_context(|| format!("can't connect to {PROXY}"))?;
    stream.set_nodelay(true)?;
    let request = format!(
        "PATCH /apis/discovery.k8s.io/v1/namespaces/{NAMESPACE}/endpointslices/scale-{n} HTTP/1.1\r\nHost: lab\r\n\
         Content-Type: application/merge-patch+json\r\nContent-Length: {}\r\nConnection: close\r\n\r\n{slice}",
        slice.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut answer = [0; 16];
    stream.read_exact(&mut answer)?;
    ensure!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    Ok(())
}
