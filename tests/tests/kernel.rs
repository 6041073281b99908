//! The dataplane against a kernel with IPVS: runs in the lab's machine, a network namespace for each test. The product
//! speaks netlink; here `ipvsadm` and real connections say what came of it.

#![allow(clippy::unwrap_used, reason = "what cannot go on has failed")]

#[path = "kernel/clients.rs"]
mod clients;
#[path = "kernel/flush.rs"]
mod flush;
#[path = "kernel/ipv6.rs"]
mod ipv6;
#[path = "kernel/links.rs"]
mod links;
#[path = "kernel/path.rs"]
mod path;
#[path = "kernel/scale.rs"]
mod scale;
#[path = "kernel/traffic.rs"]
mod traffic;
#[allow(dead_code, reason = "the netns tier uses all of it")]
#[path = "netns/vrrp.rs"]
mod vrrp;

use std::collections::{BTreeMap, BTreeSet};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Instant;

use lab::command::{LIMIT, Output, words};
use lab::netns::in_new_netns;
use vip_core::api::{Reason, Scheduler};
use vip_core::plan::{Change, Plan, Protocol, ServiceKey, Settings, Tables, VirtualService, plan};
use vip_node::dataplane::{Dataplane, DataplaneError, Ipvs, Kernel, Sight};

/// The agent's program, which is beside this one in the machine.
fn program() -> PathBuf {
    std::env::current_exe().unwrap().with_file_name("vip-node")
}

const SYSCTLS: &str = "/proc/sys/net";
const VIP: Ipv4Addr = Ipv4Addr::new(10, 87, 2, 50);

fn key(port: u16) -> ServiceKey {
    ServiceKey { address: VIP.into(), protocol: Protocol::Tcp, port }
}

fn pod(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 244, 1, n], 8080))
}

/// A service with pods of weight 1, as the agent would have it.
fn service(pods: impl IntoIterator<Item = u8>) -> VirtualService {
    let destinations = pods.into_iter().map(|n| (pod(n), 1)).collect();
    VirtualService { settings: Settings::new(Scheduler::Wlc, None), destinations }
}

fn desired(services: impl IntoIterator<Item = (ServiceKey, VirtualService)>) -> Tables {
    let services: BTreeMap<_, _> = services.into_iter().collect();
    let ledger: BTreeSet<_> = services.keys().copied().collect();
    let guarded = ledger.iter().map(|key| key.address).collect();
    Tables { services, ledger, guarded, ..Tables::default() }
}

fn kernel() -> Kernel {
    Kernel::new(SYSCTLS)
}

/// Brings the kernel to what is desired without a single failure, and returns the steps.
fn converge(kernel: &mut Kernel, desired: &Tables) -> Vec<Change> {
    let Plan { changes, conflicts } = plan(desired, &kernel.observe().unwrap());
    assert_eq!(conflicts, vec![]);
    assert_eq!(kernel.apply(&changes), vec![]);
    changes
}

fn run(line: &str) -> String {
    words(&line.split_whitespace().collect::<Vec<_>>()).and_then(Output::ok).unwrap().stdout
}

/// The table in the words of `ipvsadm`'s own rules, sorted.
fn ipvsadm() -> Vec<String> {
    let mut lines: Vec<String> = run("ipvsadm -Sn").lines().map(|line| line.trim().to_owned()).collect();
    lines.sort();
    lines
}

fn isolated(work: impl FnOnce() + Send) {
    needs_ipvs();
    in_new_netns(work).unwrap();
}

fn needs_ipvs() {
    let here = lab::kernel::own_has_ipvs();
    assert!(here, "this kernel has no IPVS: `make test` runs these tests in the lab's machine");
}

#[test]
fn ipvsadm_shows_what_was_desired() {
    isolated(|| {
        let mut kernel = kernel();
        let desired = desired([(key(80), service([1, 2, 3]))]);
        assert_eq!(kernel.observe().unwrap(), Tables::default());
        assert_eq!(converge(&mut kernel, &desired).len(), 6);
        assert_eq!(
            ipvsadm(),
            [
                "-A -t 10.87.2.50:80 -s wlc",
                "-a -t 10.87.2.50:80 -r 10.244.1.1:8080 -m -w 1",
                "-a -t 10.87.2.50:80 -r 10.244.1.2:8080 -m -w 1",
                "-a -t 10.87.2.50:80 -r 10.244.1.3:8080 -m -w 1",
            ]
        );
        assert_eq!(kernel.observe().unwrap(), desired);
        assert_eq!(plan(&desired, &kernel.observe().unwrap()), Plan::default());
        // The next process finds the same.
        assert_eq!(self::kernel().observe().unwrap(), desired);
    });
}

#[test]
fn sysctls_are_set() {
    isolated(|| {
        run("sysctl -qw net.ipv4.ip_forward=0");
        kernel().observe().unwrap();
        for (name, value) in [
            ("net.ipv4.vs.conntrack", "1"),
            ("net.ipv4.ip_forward", "1"),
            ("net.ipv4.vs.expire_nodest_conn", "0"),
            ("net.ipv4.vs.expire_quiescent_template", "1"),
        ] {
            assert_eq!(run(&format!("sysctl -n {name}")).trim(), value, "{name}");
        }
    });
}

#[test]
fn one_endpoint_more_is_one_message() {
    isolated(|| {
        let mut kernel = kernel();
        converge(&mut kernel, &desired([(key(80), service(1..=3)), (key(443), service(1..=3))]));
        let more = desired([(key(80), service(1..=4)), (key(443), service(1..=3))]);
        assert_eq!(converge(&mut kernel, &more), [Change::AddDestination(key(80), pod(4), 1)]);
        assert_eq!(kernel.observe().unwrap(), more);
        let fewer = desired([(key(80), service(2..=4)), (key(443), service(1..=3))]);
        assert_eq!(converge(&mut kernel, &fewer), [Change::DeleteDestination(key(80), pod(1))]);
        let mut drained = fewer.clone();
        drained.services.get_mut(&key(80)).unwrap().destinations.insert(pod(2), 0);
        assert_eq!(converge(&mut kernel, &drained), [Change::SetDestination(key(80), pod(2), 0)]);
        assert!(ipvsadm().contains(&"-a -t 10.87.2.50:80 -r 10.244.1.2:8080 -m -w 0".to_owned()));
        assert_eq!(kernel.observe().unwrap(), drained);
    });
}

#[test]
fn scheduler_and_persistence_change_in_place() {
    isolated(|| {
        let mut kernel = kernel();
        let mut wanted = desired([(key(80), service(1..=2))]);
        converge(&mut kernel, &wanted);
        for (scheduler, persistence, shown) in [
            (Scheduler::Wlc, Some(600), "-A -t 10.87.2.50:80 -s wlc -p 600"),
            (Scheduler::Rr, Some(600), "-A -t 10.87.2.50:80 -s rr -p 600"),
            (Scheduler::Mh, None, "-A -t 10.87.2.50:80 -s mh"),
        ] {
            let settings = Settings::new(scheduler, persistence);
            wanted.services.get_mut(&key(80)).unwrap().settings = settings.clone();
            assert_eq!(converge(&mut kernel, &wanted), [Change::SetService(key(80), settings)]);
            assert_eq!(ipvsadm()[0], shown);
            assert_eq!(kernel.observe().unwrap(), wanted);
        }
    });
}

#[test]
fn all_schedulers_of_the_api_are_the_kernels() {
    use Scheduler::{Dh, Fo, Lblc, Lblcr, Lc, Mh, Nq, Ovf, Rr, Sed, Sh, Wlc, Wrr};
    isolated(|| {
        // Debian builds its kernel without `twos`.
        let all = [Rr, Wrr, Lc, Wlc, Fo, Ovf, Lblc, Lblcr, Dh, Sh, Mh, Sed, Nq];
        let services = all.into_iter().zip(1..).map(|(scheduler, port)| {
            (key(port), VirtualService { settings: Settings::new(scheduler, None), ..service([1]) })
        });
        let wanted = desired(services);
        let mut kernel = kernel();
        let steps = plan(&wanted, &kernel.observe().unwrap()).changes;
        if !Path::new("/proc/sys/net/ipv4/vs/lblc_expiration").exists() {
            // Loading these on use can lock the kernel up.
            let failed = kernel.apply(&steps);
            assert_eq!(failed.len(), 4, "{failed:?}");
            assert!(
                failed[0].1.to_string().contains("run `modprobe ip_vs_lblc` on the node"),
                "{}",
                failed[0].1
            );
        }
        run("modprobe -a ip_vs_lblc ip_vs_lblcr");
        converge(&mut kernel, &wanted);
        assert_eq!(kernel.observe().unwrap(), wanted);
    });
}

#[test]
fn udp_and_tcp_share_a_port() {
    isolated(|| {
        let udp = ServiceKey { protocol: Protocol::Udp, ..key(53) };
        let wanted = desired([(key(53), service([1])), (udp, service([2]))]);
        let mut kernel = kernel();
        converge(&mut kernel, &wanted);
        assert_eq!(kernel.observe().unwrap(), wanted);
        assert!(ipvsadm().contains(&"-a -u 10.87.2.50:53 -r 10.244.1.2:8080 -m -w 1".to_owned()));
    });
}

#[test]
fn others_are_never_touched() {
    isolated(|| {
        for line in [
            "-A -t 10.87.2.99:80 -s rr",
            "-a -t 10.87.2.99:80 -r 10.244.9.1:80 -m -w 7",
            "-A -t 10.87.2.50:443 -s lc -p 60",
            "-a -t 10.87.2.50:443 -r 10.244.9.2 -g -w 3",
            "-A -f 7 -s mh -b mh-port",
            "-a -f 7 -r 10.244.9.3 -i -w 1",
            "-A --sctp-service 10.87.2.50:80 -s rr",
            "-A -t [fd87::99]:80 -s sh",
            "-a -t [fd87::99]:80 -r [fd87::1]:80 -m -w 1",
        ] {
            run(&format!("ipvsadm {line}"));
        }
        run("nft add table inet foreign");
        let (before, ruleset) = (ipvsadm(), run("nft list ruleset"));
        let untouched = || before.iter().all(|line| ipvsadm().contains(line));

        let mut kernel = kernel();
        let wanted = desired([(key(80), service(1..=2)), (key(443), service(1..=2))]);
        for wanted in [wanted, desired([(key(443), service([1])), (key(8080), service([1]))])] {
            let Plan { changes, conflicts } = plan(&wanted, &kernel.observe().unwrap());
            assert_eq!(conflicts, [key(443)], "somebody else's service at our address is reported");
            assert_eq!(kernel.apply(&changes), vec![]);
            assert!(untouched());
            assert!(!kernel.observe().unwrap().ledger.contains(&key(443)));
            assert!(plan(&wanted, &kernel.observe().unwrap()).changes.is_empty());
        }
        assert_eq!(ipvsadm().len(), before.len() + 2);
        kernel.remove_everything().unwrap();
        assert_eq!((ipvsadm(), run("nft list ruleset")), (before.clone(), ruleset));
        kernel.remove_everything().unwrap();
        assert_eq!(ipvsadm(), before);
    });
}

#[test]
fn what_was_flushed_is_seen_and_put_back() {
    isolated(|| {
        let mut kernel = kernel();
        let wanted = desired([(key(80), service(1..=3)), (key(443), service(1..=3))]);
        converge(&mut kernel, &wanted);
        let full = ipvsadm();
        assert_eq!(kernel.sentinel(&key(80)), Ok(Sight::Both));
        assert_eq!(kernel.sentinel(&key(81)), Ok(Sight::Table));

        run("ipvsadm -C");
        run("ipvsadm -A -t 10.99.0.1:80 -s rr");
        assert_eq!(kernel.sentinel(&key(80)), Ok(Sight::Table));
        let reread = kernel.reread_ipvs(wanted.clone()).unwrap();
        assert_eq!(reread, kernel.observe().unwrap());
        assert_eq!(reread.services.len(), 1);
        run("ipvsadm -C");
        let steps = converge(&mut kernel, &wanted);
        assert_eq!(steps.len(), 8, "the ledger is still there: {steps:?}");
        assert_eq!(ipvsadm(), full);

        // Without its table the process still knows what is its own.
        run("nft flush ruleset");
        assert_eq!(kernel.sentinel(&key(80)), Ok(Sight::Nothing));
        assert_eq!(converge(&mut kernel, &wanted), vec![]);
        assert_eq!(kernel.sentinel(&key(80)), Ok(Sight::Both));
        assert_eq!(ipvsadm(), full);

        run("nft flush ruleset");
        run("ipvsadm -C");
        converge(&mut kernel, &wanted);
        assert_eq!(kernel.observe().unwrap(), wanted);
    });
}

#[test]
fn what_others_change_of_ours_is_put_right() {
    isolated(|| {
        let mut kernel = kernel();
        let wanted = desired([(key(80), service(1..=3))]);
        converge(&mut kernel, &wanted);
        let full = ipvsadm();
        for harm in [
            "-e -t 10.87.2.50:80 -r 10.244.1.1:8080 -m -w 9",
            "-d -t 10.87.2.50:80 -r 10.244.1.2:8080",
            "-a -t 10.87.2.50:80 -r 10.244.1.77:8080 -m",
            "-E -t 10.87.2.50:80 -s rr -p 30",
            // A direct route wants the port of the service.
            "-a -t 10.87.2.50:80 -r 10.244.1.3:80 -g",
        ] {
            run(&format!("ipvsadm {harm}"));
            assert_ne!(ipvsadm(), full);
            assert_eq!(converge(&mut kernel, &wanted).len(), 1, "{harm}");
            assert_eq!(ipvsadm(), full, "{harm}");
        }
    });
}

#[test]
fn steps_taken_twice_are_no_failures() {
    isolated(|| {
        let mut kernel = kernel();
        let wanted = desired([(key(80), service(1..=3))]);
        let steps = plan(&wanted, &kernel.observe().unwrap()).changes;
        assert_eq!(kernel.apply(&steps), vec![]);
        assert_eq!(kernel.apply(&steps), vec![]);
        assert_eq!(kernel.observe().unwrap(), wanted);
        let back = plan(&Tables::default(), &wanted).changes;
        let gone = [Change::DeleteDestination(key(80), pod(1))];
        for steps in [&gone[..], &gone, &back, &gone, &back] {
            assert_eq!(kernel.apply(steps), vec![]);
        }
        assert_eq!(kernel.observe().unwrap(), Tables::default());
    });
}

#[test]
fn a_service_that_somebody_made_meanwhile_stays_theirs() {
    isolated(|| {
        let mut kernel = kernel();
        let steps =
            plan(&desired([(key(80), service([1])), (key(81), service([1]))]), &kernel.observe().unwrap())
                .changes;
        run("ipvsadm -A -t 10.87.2.50:80 -s sh");
        let failed = kernel.apply(&steps);
        let text: Vec<String> = failed.iter().map(|(_, error)| error.to_string()).collect();
        assert_eq!(failed.len(), 2, "{text:?}");
        assert!(text[0].contains("another program has made a service"), "{text:?}");
        assert!(text[1].contains("an earlier step for the same service failed"), "{text:?}");
        let observed = kernel.observe().unwrap();
        assert_eq!(observed.ledger, BTreeSet::from([key(81)]), "the port of theirs is shut again");
        assert_eq!(
            ipvsadm(),
            [
                "-A -t 10.87.2.50:80 -s sh",
                "-A -t 10.87.2.50:81 -s wlc",
                "-a -t 10.87.2.50:81 -r 10.244.1.1:8080 -m -w 1",
            ]
        );
    });
}

#[test]
fn an_unknown_scheduler_is_named_and_harms_nobody_else() {
    isolated(|| {
        let mut kernel = kernel();
        let mut wanted = desired([(key(80), service([1])), (key(81), service([1]))]);
        wanted.services.get_mut(&key(80)).unwrap().settings.scheduler = "magic".to_owned();
        let steps = plan(&wanted, &kernel.observe().unwrap()).changes;
        let failed = kernel.apply(&steps);
        assert_eq!(failed.len(), 2);
        assert_eq!(failed[0].1.reason(), Reason::SchedulerUnavailable);
        let text = failed[0].1.to_string();
        assert!(text.contains("no scheduler `magic`"), "{text}");
        assert_eq!(kernel.observe().unwrap(), desired([(key(81), service([1]))]));
        // A change of an existing service leaves it as it was, its destinations still follow.
        let mut wanted = desired([(key(81), service(1..=2))]);
        wanted.services.get_mut(&key(81)).unwrap().settings.scheduler = "magic".to_owned();
        let steps = plan(&wanted, &kernel.observe().unwrap()).changes;
        assert_eq!(kernel.apply(&steps).len(), 1);
        assert_eq!(kernel.observe().unwrap(), desired([(key(81), service(1..=2))]));
    });
}

#[test]
fn two_thousand_destinations_in_one_go() {
    isolated(|| {
        let services = (0..500u16).map(|n| (key(1000 + n), service(1..=4)));
        let wanted = desired(services);
        let mut kernel = kernel();
        let start = Instant::now();
        assert_eq!(converge(&mut kernel, &wanted).len(), 1 + 500 + 500 + 2000);
        let (load, start) = (start.elapsed(), Instant::now());
        assert_eq!(kernel.observe().unwrap(), wanted);
        println!("500 services with 4 destinations each: load {load:?}, read {:?}", start.elapsed());
        assert_eq!(converge(&mut kernel, &Tables::default()).len(), 500 + 500 + 1);
        assert_eq!(ipvsadm(), Vec::<String>::new());
    });
}

#[test]
fn without_the_capability() {
    if std::env::var_os("WITHOUT_NET_ADMIN").is_some() {
        let mut kernel = kernel();
        assert!(matches!(kernel.observe(), Err(DataplaneError::NotPermitted(_))));
        assert_eq!(Ipvs::new(SYSCTLS).services(), Err(DataplaneError::NotPermitted("IPVS")));
        let failed = kernel.apply(&[Change::Guard(VIP.into())]);
        assert_eq!(failed, [(0, DataplaneError::NotPermitted("nftables"))]);
        assert!(failed[0].1.to_string().contains("NET_ADMIN"));
        return;
    }
    // IPVS and its sysctls are there already on a node where this happens.
    isolated(|| {
        kernel().observe().unwrap();
        let own = std::env::current_exe().unwrap();
        let mut again = std::process::Command::new("setpriv");
        again.args(["--bounding-set=-net_admin", "--inh-caps=-net_admin"]).arg(own);
        again.args(["--exact", "without_the_capability"]).env("WITHOUT_NET_ADMIN", "1");
        lab::command::run(&mut again, LIMIT).and_then(Output::ok).unwrap();
    });
}
