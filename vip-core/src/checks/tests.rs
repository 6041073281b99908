//! Checks on simulated time: a pod answers or not, by its last octet.

use std::ops::Range;
use std::sync::Arc;

use super::*;
use crate::api::Backends;
use crate::desired::Node;
use crate::plan::{ServiceKey, Settings as Balancing, Tables, VirtualService};

const SECOND: Duration = Duration::from_secs(1);
const SETTINGS: Settings =
    Settings { interval: Duration::from_secs(5), timeout: SECOND, failures: 2, successes: 1 };

fn pod(number: u8) -> SocketAddr {
    SocketAddr::from(([10, 244, 1, number], 8080))
}

fn vip() -> IpAddr {
    IpAddr::from([10, 87, 2, 50])
}

fn key(protocol: Protocol, port: u16) -> ServiceKey {
    ServiceKey { address: vip(), protocol, port }
}

fn owned() -> BTreeSet<IpAddr> {
    BTreeSet::from([vip()])
}

/// One Service at 10.87.2.50, port 80 over TCP and port 53 over UDP, with that many pods.
fn desired(pods: u8) -> Desired {
    let service = |port| VirtualService {
        settings: Balancing::new(crate::api::Scheduler::Wlc, None),
        destinations: (1..=pods).map(|n| (SocketAddr::new(pod(n).ip(), port), 1)).collect(),
    };
    let keys = vec![key(Protocol::Tcp, 80), key(Protocol::Udp, 53)];
    let plan = VipPlan {
        name: vip().to_string(),
        address: Some(vip()),
        vrid: 100,
        preferred: None,
        fresh: false,
        contested: false,
        bare: false,
        keys: keys.clone(),
        parts: vec![Range { start: 0, end: 2 }],
        check: Some(SETTINGS),
        backends: Backends { ready: pods.into(), total: pods.into() },
        shunned: BTreeSet::new(),
        troubles: Vec::new(),
        candidate: Ok("eth0".to_owned()),
    };
    let services = [(keys[0], service(8080)), (keys[1], service(5353))].into();
    Desired { tables: Arc::new(Tables { services, ..Tables::default() }), vips: vec![plan] }
}

/// The checks of one node and the pods that it checks.
struct Scene {
    checks: Checks,
    desired: Desired,
    now: Duration,
    /// The pods that do not answer, by their last octet.
    dead: BTreeSet<u8>,
    /// What was probed, and when it was.
    probed: Vec<(Duration, SocketAddr)>,
}

impl Scene {
    fn new(pods: u8) -> Self {
        let mut scene = Self {
            checks: Checks::new(7),
            desired: desired(pods),
            now: Duration::ZERO,
            dead: BTreeSet::new(),
            probed: Vec::new(),
        };
        scene.want();
        scene
    }

    fn want(&mut self) {
        self.checks.want(self.now, &Checks::wanted(&self.desired, &owned()));
    }

    /// Lets time pass. A pod that answers does so at once, the others never do.
    fn pass(&mut self, time: Duration) {
        let end = self.now + time;
        let mut ends: BTreeMap<Duration, Vec<Probe>> = BTreeMap::new();
        while let Some(at) = [self.checks.next_deadline(), ends.keys().next().copied()]
            .into_iter()
            .flatten()
            .min()
            .filter(|at| *at <= end)
        {
            self.now = self.now.max(at);
            for probe in ends.remove(&at).unwrap_or_default() {
                self.checks.finish(self.now, &probe, Outcome::Failed);
            }
            for probe in self.checks.start(self.now) {
                self.probed.push((self.now, probe.to));
                let IpAddr::V4(address) = probe.to.ip() else { panic!("{probe:?}") };
                if self.dead.contains(&address.octets()[3]) {
                    ends.entry(self.now + probe.timeout).or_default().push(probe);
                } else {
                    self.checks.finish(self.now, &probe, Outcome::Answered);
                }
            }
        }
        // What is still under way fails now: each test passes time by whole probes.
        for probe in ends.into_values().flatten() {
            self.checks.finish(end, &probe, Outcome::Failed);
        }
        self.now = end;
    }

    /// The last octets of the pods that get connections over TCP and over UDP, how many count as ready, and the troubles.
    fn serving(&self) -> (Vec<u8>, Vec<u8>, u32, Vec<Reason>) {
        let mut desired = self.desired.clone();
        self.checks.apply(&mut desired, &owned());
        let serving = |key: ServiceKey| {
            let all = desired.tables.services[&key].destinations.iter();
            all.filter(|(_, weight)| **weight > 0)
                .map(|(to, _)| match to.ip() {
                    IpAddr::V4(address) => address.octets()[3],
                    IpAddr::V6(address) => address.octets()[15],
                })
                .collect()
        };
        let plan = &desired.vips[0];
        let troubles = plan.troubles.iter().map(|trouble| trouble.reason).collect();
        (serving(key(Protocol::Tcp, 80)), serving(key(Protocol::Udp, 53)), plan.backends.ready, troubles)
    }

    fn suspect(&mut self, pods: &[u8]) {
        self.checks.suspect("node-2", pods.iter().map(|n| pod(*n).ip()).collect());
    }
}

#[test]
fn a_backend_that_fails_twice_gets_nothing_until_it_answers() {
    let mut scene = Scene::new(3);
    scene.dead.insert(2);
    assert_eq!(scene.serving(), (vec![1, 2, 3], vec![1, 2, 3], 3, vec![]), "what readiness says");
    // Its first failure is within an interval and a timeout, its second one within another.
    scene.pass(SECOND * 4);
    scene.pass(SECOND * 8);
    assert_eq!(scene.serving(), (vec![1, 3], vec![1, 3], 2, vec![]));
    scene.dead.clear();
    scene.pass(SECOND * 6);
    assert_eq!(scene.serving(), (vec![1, 2, 3], vec![1, 2, 3], 3, vec![]));
}

#[test]
fn thresholds_count_what_comes_in_a_row() {
    let settings = Settings { failures: 3, successes: 2, ..SETTINGS };
    let wanted = BTreeMap::from([(pod(1), settings)]);
    let mut checks = Checks::new(1);
    checks.want(Duration::ZERO, &wanted);
    let mut now = Duration::ZERO;
    let mut probe = |outcome| {
        now = now.max(checks.next_deadline().unwrap());
        let probe = checks.start(now)[0];
        checks.finish(now, &probe, outcome)
    };
    use Outcome::{Answered, Failed, Untold};
    for (outcome, verdict) in [
        (Failed, None),
        (Failed, None),
        (Answered, None),
        (Failed, None),
        (Failed, None),
        (Untold, None),
        (Failed, Some(Verdict::Failing)),
        (Answered, None),
        (Failed, None),
        (Answered, None),
        (Answered, Some(Verdict::Healthy)),
    ] {
        assert_eq!(probe(outcome), verdict, "{outcome:?}");
    }
}

#[test]
fn when_all_fail_all_are_kept_and_it_is_said() {
    let mut scene = Scene::new(2);
    scene.dead.extend([1, 2]);
    scene.pass(SECOND * 20);
    let both = vec![Reason::BackendsFailing; 2];
    assert_eq!(scene.serving(), (vec![1, 2], vec![1, 2], 2, both), "TCP and UDP");
    let mut desired = scene.desired.clone();
    scene.checks.apply(&mut desired, &owned());
    let node = Node { name: "node-1".to_owned(), ..Node::default() };
    let enter = |desired: &Desired| desired.elections(&node, &[], SECOND, |_| true);
    assert_eq!(enter(&desired), enter(&scene.desired), "it is no reason to give the address away");
    // One of them back: the other goes.
    scene.dead.remove(&1);
    scene.pass(SECOND * 6);
    assert_eq!(scene.serving(), (vec![1], vec![1], 1, vec![]));
}

#[test]
fn the_endpoints_of_a_silent_node_wait_for_one_answer() {
    let mut scene = Scene::new(4);
    scene.dead.insert(2);
    scene.suspect(&[2, 3]);
    assert_eq!(scene.serving(), (vec![1, 4], vec![1, 4], 2, vec![]), "at once");
    scene.pass(Duration::ZERO);
    assert_eq!(scene.probed, [(Duration::ZERO, pod(2)), (Duration::ZERO, pod(3))], "before all others");
    scene.pass(SECOND);
    assert_eq!(scene.serving(), (vec![1, 3, 4], vec![1, 3, 4], 3, vec![]));
    // That the node is heard again does not help a backend that fails.
    scene.pass(SECOND * 10);
    scene.checks.suspect_only(|_| false);
    assert_eq!(scene.serving().0, [1, 3, 4]);
}

#[test]
fn what_failed_before_a_restart_is_probed_before_it_serves_again() {
    let mut before = Scene::new(4);
    before.dead.extend([1, 2]);
    before.pass(SECOND * 20);
    let mut left = before.desired.clone();
    before.checks.apply(&mut left, &owned());
    let mut scene = Scene { checks: Checks::new(8), dead: BTreeSet::from([2]), ..before };
    // Another pod has ended meanwhile.
    scene.desired = desired(3);
    scene.checks.recall(&left.tables, &scene.desired.tables);
    scene.want();
    scene.probed.clear();
    assert_eq!(scene.serving(), (vec![3], vec![3], 1, vec![]));
    scene.pass(Duration::ZERO);
    assert_eq!(scene.probed, [(scene.now, pod(1)), (scene.now, pod(2))], "before all others");
    assert_eq!(scene.serving(), (vec![1, 3], vec![1, 3], 2, vec![]));
}

#[test]
fn suspects_serve_where_nothing_better_does() {
    let mut scene = Scene::new(2);
    scene.dead.insert(1);
    scene.pass(SECOND * 20);
    assert_eq!(scene.serving().0, [2]);
    scene.suspect(&[2]);
    assert_eq!(scene.serving(), (vec![2], vec![2], 1, vec![]), "a suspect is better than one that fails");
}

#[test]
fn destinations_that_no_connection_can_probe_are_suspected_until_the_node_is_heard() {
    let mut scene = Scene::new(3);
    Arc::make_mut(&mut scene.desired.tables).services.remove(&key(Protocol::Tcp, 80));
    scene.want();
    scene.suspect(&[2]);
    let udp = |scene: &Scene| {
        let mut desired = scene.desired.clone();
        scene.checks.apply(&mut desired, &owned());
        let destinations = &desired.tables.services[&key(Protocol::Udp, 53)].destinations;
        destinations.iter().map(|(to, weight)| (to.ip(), *weight)).collect::<Vec<_>>()
    };
    let serve = |pods: &[u8]| pods.iter().map(|n| (pod(*n).ip(), 1)).collect::<Vec<_>>();
    // Gone and not at weight 0, where a client that goes on sending would stay with it.
    assert_eq!(udp(&scene), serve(&[1, 3]));
    scene.checks.suspect_only(|node| node == "node-2");
    assert_eq!(udp(&scene), serve(&[1, 3]));
    scene.checks.suspect_only(|_| false);
    assert_eq!(udp(&scene), serve(&[1, 2, 3]));
}

#[test]
fn an_answer_that_is_older_than_the_silence_counts_for_nothing() {
    let mut scene = Scene::new(1);
    let at = scene.checks.next_deadline().unwrap();
    let old = scene.checks.start(at)[0];
    scene.suspect(&[1]);
    assert!(!scene.checks.awaits(&old));
    assert_eq!(scene.checks.finish(at, &old, Outcome::Answered), None);
    assert_eq!(scene.checks.verdict(Protocol::Tcp, pod(1)), Verdict::Suspected);
}

#[test]
fn only_what_is_owned_and_wanted_is_checked() {
    let mut scene = Scene::new(2);
    scene.dead.insert(1);
    scene.pass(SECOND * 20);
    let mut elsewhere = scene.desired.clone();
    scene.checks.apply(&mut elsewhere, &BTreeSet::new());
    assert_eq!(elsewhere, scene.desired, "readiness alone counts for an address that is elsewhere");
    assert_eq!(Checks::wanted(&scene.desired, &BTreeSet::new()), BTreeMap::new());
    let mut unchecked = scene.desired.clone();
    unchecked.vips[0].check = None;
    assert_eq!(Checks::wanted(&unchecked, &owned()), BTreeMap::new());
    scene.checks.want(scene.now, &BTreeMap::new());
    assert_eq!(scene.checks.next_deadline(), None);
    // What comes back is new.
    scene.want();
    assert_eq!(scene.serving().0, [1, 2]);
}

#[test]
fn probes_are_spread_and_never_too_many() {
    let mut scene = Scene::new(250);
    scene.pass(SECOND * 60);
    let mut by_pod: BTreeMap<SocketAddr, Vec<Duration>> = BTreeMap::new();
    for (at, to) in &scene.probed {
        by_pod.entry(*to).or_default().push(*at);
    }
    assert_eq!(by_pod.len(), 250);
    for times in by_pod.values() {
        assert!(times[0] <= SETTINGS.interval + SECOND / 10, "{times:?}");
        for pair in times.windows(2) {
            let between = pair[1] - pair[0];
            let bounds = SETTINGS.interval * 9 / 10..=SETTINGS.interval * 11 / 10 + SECOND / 10;
            assert!(bounds.contains(&between), "{between:?}");
        }
    }
    let busiest = (0..60).map(|second| scene.probed.iter().filter(|(at, _)| at.as_secs() == second).count());
    assert!(busiest.max() < Some(100), "250 in 5 seconds are 50 a second");

    let mut checks = Checks::new(3);
    checks.want(Duration::ZERO, &(1..=250).map(|n| (pod(n), SETTINGS)).collect());
    let mut started = 0;
    for millisecond in 0..20_000 {
        let now = Duration::from_millis(millisecond);
        let probes = checks.start(now);
        assert!(probes.len() <= BATCH);
        started += probes.len();
    }
    assert_eq!(started, AT_ONCE, "none of them ends");
    assert_eq!(checks.next_deadline(), None);
}
