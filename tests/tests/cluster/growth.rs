//! A Service grows and shrinks while clients ask: the kernels follow, each change is one message, and no request is lost.

use std::{collections::BTreeMap, fmt::Write as _, net::Ipv4Addr, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{Lab, Node, Server, command, product, workload::Workload};

use super::{
    SOON, check_alone, installed,
    services::{LEAVING, READY},
};

const NAMESPACE: &str = "growth";
/// Between two requests.
const EVERY: Duration = Duration::from_millis(40);
/// Endpoints beside the pods: addresses of a host on the LAN, at its port 80.
const PLAIN: u8 = 55;

/// Longer than a request takes.
const UNDER_WAY: Duration = Duration::from_secs(2);

/// Counts the messages by which programs of a node change destinations in IPVS, until a file says that it is enough. All
/// netlink messages pass by an interface for listeners (`nlmon`).
const COUNT: &str = r#"
import collections, os, socket, struct, subprocess
subprocess.run('ip link add counter type nlmon && ip link set counter up', shell=True, check=True)
ear = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(3))
ear.setsockopt(socket.SOL_SOCKET, 33, 64 << 20)
ear.bind(('counter', 0))
open('/run/lab/counting', 'w').close()
counts = collections.Counter()
enough = False
while True:
    enough = enough or os.path.exists('/run/lab/counted')
    # What has been sent by then is still to be counted.
    ear.settimeout(0 if enough else 0.2)
    try:
        frame = ear.recv(1 << 20)
    except (TimeoutError, BlockingIOError):
        if enough:
            break
        continue
    at = 0
    while at + 20 <= len(frame):
        length, kind, flags = struct.unpack_from('=IHH', frame, at)
        # An answer of the kernel has no request in it.
        if length < 16 or not flags & 1:
            break
        if kind == FAMILY and length >= 20:
            counts[frame[at + 16]] += 1
        at += (length + 3) & ~3
subprocess.run('ip link del counter', shell=True)
print(counts[5], counts[6], counts[7])
"#;

/// Messages that add, set and delete destinations on a node while something is done.
fn counted(node: &Node<'_>, work: impl FnOnce() -> Result<()> + Send) -> Result<[usize; 3]> {
    node.exec("rm -f /run/lab/counting /run/lab/counted")?;
    thread::scope(|scope| {
        let counter = scope.spawn(|| {
            let family = "genl ctrl get name IPVS | sed -n 's/.*ID: \\(0x[0-9a-f]*\\).*/\\1/p'";
            let family = node.exec(family)?.ok()?;
            let program = COUNT.replace("FAMILY", family.text());
            node.exec_for(
                &format!("python3 -c \"{}\"", program.replace('"', "\\\"")),
                Duration::from_secs(400),
            )?
            .ok()
        });
        let outcome = command::until("the counter", SOON, || {
            Ok(node.exec("test -e /run/lab/counting")?.success().then_some(()))
        })
        .and_then(|()| work());
        node.exec("touch /run/lab/counted")?;
        let told = counter.join().ok().context("the counter ended badly")??;
        outcome?;
        let counts = told.stdout.split_whitespace().map(str::parse).collect::<Result<Vec<usize>, _>>()?;
        counts.try_into().ok().context("not three numbers")
    })
}

/// The plain endpoints: a slice of them, or of none, and how they stand.
fn plain(lab: &Lab, count: u8, state: &str) -> Result<()> {
    let mut endpoints = String::new();
    for n in 1..=count {
        write!(endpoints, "{{addresses: [{}], conditions: {{{state}}}}}, ", Ipv4Addr::new(10, 87, 4, n))?;
    }
    let slice = format!(
        "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: plain, namespace: {NAMESPACE}, \
         labels: {{kubernetes.io/service-name: web}}}}\naddressType: IPv4\nendpoints: [{endpoints}]\n\
         ports: [{{name: http, port: 80}}]\n"
    );
    lab.apply(&slice).map(drop)
}

/// Waits until all nodes have exactly the pods with weight 1, and so many plain endpoints with that one.
fn wait_table(lab: &Lab, pods: &Workload<'_>, vip: Ipv4Addr, plain: u8, weight: u32) -> Result<()> {
    let pods = pods.pods()?;
    let mut wanted: BTreeMap<String, u32> =
        pods.values().map(|pod| (format!("{}:8080", pod.address), 1)).collect();
    wanted.extend((1..=plain).map(|n| (format!("10.87.4.{n}:80"), weight)));
    command::until(&format!("{} destinations", wanted.len()), SOON, || {
        let tables = lab.each_node(|node| product::table(&node, vip))?;
        ensure!(tables.iter().all(|table| table.get("TCP :80 wlc") == Some(&wanted)), "they have {tables:?}");
        Ok(Some(()))
    })
}

#[test]
fn from_three_to_sixty_backends_and_back_each_change_is_a_message_and_no_request_is_lost() {
    check_alone(|| {
        let lab = installed()?;
        for n in 1..=PLAIN {
            lab.netns().ip(&format!("address replace 10.87.4.{n}/32 dev lo"))?;
        }
        let _server = Server::start(lab.netns(), "plain")?;
        let pods = Workload::deploy(lab, NAMESPACE, "web", 3)?;
        // TCP alone, so that an endpoint is one destination.
        let one = "apiVersion: v1\nkind: Service\nmetadata: {name: web, namespace: growth}\n\
                   spec: {selector: {app: web}, ports: [{name: http, port: 80, targetPort: http}]}\n";
        lab.kubectl(["delete", "service", "web", "-n", NAMESPACE])?.ok()?;
        lab.apply(one)?;
        lab.kubectl(["vip", "expose", "svc/web", "-n", NAMESPACE])?.ok()?;
        let vip: Ipv4Addr = product::address_of(lab, NAMESPACE, "web")?;
        let owner = product::wait_one_owner(lab, vip, SOON)?;
        wait_table(lab, &pods, vip, 0, 1)?;
        let watch =
            lab.client().limit(Duration::from_secs(10)).watch(&format!("http://{vip}/hostname"), EVERY)?;
        watch.wait_answers(50, SOON)?;
        let counts = counted(&lab.node(owner.number), || {
            pods.scale(5)?;
            wait_table(lab, &pods, vip, 0, 1)?;
            plain(lab, PLAIN, READY)?;
            wait_table(lab, &pods, vip, PLAIN, 1)?;
            product::wait_backends(lab, vip, 5 + u32::from(PLAIN), SOON)?;
            // As gracefully as pods go: what is under way ends.
            plain(lab, PLAIN, LEAVING)?;
            wait_table(lab, &pods, vip, PLAIN, 0)?;
            thread::sleep(UNDER_WAY);
            plain(lab, 0, READY)?;
            wait_table(lab, &pods, vip, 0, 1)?;
            pods.scale(3)?;
            wait_table(lab, &pods, vip, 0, 1)
        })?;
        let report = watch.stop();
        println!("messages that add, set and delete: {counts:?}; {report}");
        // A machine that stands still for longer than its peers wait loses its addresses.
        ensure!(report.failures == 0 || product::owners(lab, vip)? != [owner], "{report}");
        let more = 2 + usize::from(PLAIN);
        // What is to end is set to 0 before it goes.
        ensure!(counts == [more; 3], "{counts:?}");
        lab.kubectl(["vip", "unexpose", "svc/web", "-n", NAMESPACE])?.ok()?;
        for n in 1..=PLAIN {
            lab.netns().ip(&format!("address del 10.87.4.{n}/32 dev lo"))?;
        }
        pods.remove()
    });
}
