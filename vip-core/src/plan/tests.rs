//! Plans on a model kernel.

use proptest::prelude::*;

use super::*;

fn key(n: u8) -> ServiceKey {
    ServiceKey {
        address: IpAddr::from([10, 87, 2, n / 4]),
        protocol: if n.is_multiple_of(2) { Protocol::Tcp } else { Protocol::Sctp },
        port: 80 + u16::from(n % 4 / 2),
    }
}

fn pod(n: u8) -> SocketAddr {
    SocketAddr::from(([10, 244, 1, n], 8080))
}

fn nets<const N: usize>(text: [&str; N]) -> BTreeSet<IpNet> {
    text.into_iter().map(|net| net.parse().unwrap()).collect()
}

fn settings() -> impl Strategy<Value = Settings> {
    (prop::sample::select(vec!["wlc", "rr"]), prop::sample::select(vec![None, Some(60)]))
        .prop_map(|(scheduler, persistence)| Settings { scheduler: scheduler.to_owned(), persistence })
}

fn service() -> impl Strategy<Value = VirtualService> {
    let destinations = prop::collection::btree_map((0..5u8).prop_map(pod), 0..3u32, 0..5);
    (settings(), destinations).prop_map(|(settings, destinations)| VirtualService { settings, destinations })
}

fn services() -> impl Strategy<Value = BTreeMap<ServiceKey, VirtualService>> {
    prop::collection::btree_map((0..12u8).prop_map(key), service(), 0..10)
}

fn addresses() -> impl Strategy<Value = BTreeSet<IpAddr>> {
    prop::collection::btree_set((0..12u8).prop_map(|n| key(n).address), 0..3)
}

fn ranges() -> impl Strategy<Value = BTreeMap<ServiceKey, BTreeSet<IpNet>>> {
    let net = (0..3u8).prop_map(|n| IpNet::new_assert([10, n, 0, 0].into(), 16));
    let nets = prop::collection::btree_set(net, 0..3);
    prop::collection::btree_map((0..12u8).prop_map(key), nets, 0..8)
}

/// What is said of clients concerns services that there are.
fn desired() -> impl Strategy<Value = Tables> {
    let kept = prop::collection::btree_set(((0..12u8).prop_map(key), (0..5u8).prop_map(pod)), 0..12);
    (services(), addresses(), ranges(), ranges(), kept).prop_map(
        |(services, guarded, mut direct, mut sources, mut kept)| {
            direct.retain(|key, _| services.contains_key(key));
            sources.retain(|key, _| services.contains_key(key));
            kept.retain(|(key, to)| {
                services.get(key).is_some_and(|service| !service.destinations.contains_key(to))
            });
            Tables { ledger: services.keys().copied().collect(), services, guarded, direct, sources, kept }
        },
    )
}

/// Anything goes: services of others, ledger entries without a service, guards and networks without either.
fn observed() -> impl Strategy<Value = Tables> {
    let ledger = prop::collection::btree_set((0..12u8).prop_map(key), 0..10);
    (services(), ledger, addresses(), ranges(), ranges()).prop_map(
        |(services, ledger, guarded, direct, sources)| Tables {
            services,
            ledger,
            guarded,
            direct,
            sources,
            ..Tables::default()
        },
    )
}

/// Services that are open now and will be: who may connect is what it was or what it is to be, nothing in between. For
/// those that open it is what it is to be at once.
fn open_as_wide_as_may_be(kernel: &Tables, observed: &Tables, desired: &Tables) -> bool {
    kernel.ledger.iter().all(|key| {
        let (now, before, after) =
            (kernel.sources.get(key), observed.sources.get(key), desired.sources.get(key));
        let old = now == before && observed.ledger.contains(key);
        old || (now == after && desired.services.contains_key(key))
    })
}

/// A service that is opened has its clients masqueraded, or not, as desired from the start.
fn masqueraded_from_the_start(kernel: &Tables, observed: &Tables, desired: &Tables) -> bool {
    let opened = kernel.ledger.difference(&observed.ledger);
    opened.into_iter().all(|key| kernel.direct.get(key) == desired.direct.get(key))
}

fn takes_connections(tables: &Tables, key: &ServiceKey) -> bool {
    tables.services.get(key).is_some_and(VirtualService::is_served)
}

fn has_destinations(tables: &Tables, key: &ServiceKey) -> bool {
    tables.services.get(key).is_some_and(|service| !service.destinations.is_empty())
}

proptest! {
    #[test]
    fn leads_to_what_is_desired_and_leaves_others_alone(
        desired in desired(), observed in observed(), owned in addresses(),
    ) {
        let plan = plan(&desired, &observed).first(&owned);
        let others: BTreeMap<_, _> =
            observed.services.iter().filter(|(key, _)| foreign(&observed, key)).map(|(k, v)| (*k, v.clone())).collect();

        let mut kernel = observed.clone();
        for change in &plan.changes {
            // What our own table says of the clients of one is not theirs.
            let forgets = matches!(change, Change::Indirect(_) | Change::Unrestrict(_));
            let touches = change.key().is_some_and(|key| others.contains_key(key));
            prop_assert!(forgets || !touches, "{change} touches a foreign entry");
            kernel.apply(change);
            prop_assert!(open_as_wide_as_may_be(&kernel, &observed, &desired), "{change} lets others in");
            prop_assert!(masqueraded_from_the_start(&kernel, &observed, &desired), "{change} is early");
            for (key, service) in &kernel.services {
                let meant = [&observed, &desired].map(|tables| tables.services.get(key).map(|s| &s.settings));
                prop_assert!(meant.contains(&Some(&service.settings)), "{key} is balanced otherwise after {change}");
                prop_assert!(kernel.ledger.contains(key) || others.contains_key(key), "{key} is in no ledger");
                for holds in [takes_connections, has_destinations] {
                    if holds(&observed, key) && holds(&desired, key) {
                        prop_assert!(holds(&kernel, key), "{key} is deaf after {change}");
                    }
                }
            }
        }

        let conflicts: Vec<_> = desired.services.keys().filter(|key| others.contains_key(key)).copied().collect();
        prop_assert_eq!(&plan.conflicts, &conflicts);
        let mut expected = desired.clone();
        expected.services.extend(others);
        expected.ledger.retain(|key| !conflicts.contains(key));
        expected.direct.retain(|key, _| !conflicts.contains(key));
        expected.sources.retain(|key, _| !conflicts.contains(key));
        for (key, to) in std::mem::take(&mut expected.kept).iter().filter(|(key, _)| !conflicts.contains(key)) {
            let old = observed.services.get(key);
            if old.is_some_and(|service| service.destinations.contains_key(to)) {
                expected.services.get_mut(key).unwrap().destinations.insert(*to, 0);
            }
        }
        prop_assert_eq!(&kernel, &expected);
        prop_assert_eq!(super::plan(&desired, &kernel).changes, vec![]);
    }

    /// Steps are for different things, so none could be saved.
    #[test]
    fn takes_the_fewest_steps(desired in desired(), observed in observed()) {
        let changes = plan(&desired, &observed).changes;
        for (n, change) in changes.iter().enumerate() {
            let mut without = observed.clone();
            let mut with = observed.clone();
            changes.iter().enumerate().filter(|(m, _)| *m != n).for_each(|(_, c)| without.apply(c));
            changes.iter().for_each(|c| with.apply(c));
            prop_assert_ne!(with, without, "{} was not needed", change);
        }
    }

    #[test]
    fn one_endpoint_is_one_step(desired in desired(), chosen in any::<prop::sample::Index>(), weight in 0..3u32) {
        prop_assume!(!desired.services.is_empty());
        let key = *chosen.get(&desired.services.keys().collect::<Vec<_>>());
        let mut more = desired.clone();
        more.apply(&Change::AddDestination(*key, pod(99), weight));
        prop_assert_eq!(plan(&more, &desired).changes, vec![Change::AddDestination(*key, pod(99), weight)]);
        prop_assert_eq!(plan(&desired, &more).changes, vec![Change::DeleteDestination(*key, pod(99))]);
    }
}

#[test]
fn order_from_nothing_and_back() {
    let service = VirtualService {
        settings: Settings::new(Scheduler::Wlc, None),
        destinations: BTreeMap::from([(pod(1), 1), (pod(2), 1)]),
    };
    let desired = Tables {
        services: BTreeMap::from([(key(0), service.clone()), (key(1), service)]),
        ledger: BTreeSet::from([key(0), key(1)]),
        guarded: BTreeSet::from([key(0).address]),
        direct: BTreeMap::from([(key(1), nets(["10.244.1.0/24"]))]),
        sources: BTreeMap::from([(key(1), nets(["192.0.2.0/24", "10.0.0.0/8"]))]),
        ..Tables::default()
    };
    let words = |plan: Plan| plan.changes.iter().map(Change::to_string).collect::<Vec<_>>();
    assert_eq!(
        words(plan(&desired, &Tables::default())),
        [
            "guard 10.87.2.0",
            "open TCP 10.87.2.0:80",
            "restrict SCTP 10.87.2.0:80 to 10.0.0.0/8, 192.0.2.0/24",
            "masquerade clients of SCTP 10.87.2.0:80 only in 10.244.1.0/24",
            "open SCTP 10.87.2.0:80",
            "add service TCP 10.87.2.0:80 wlc",
            "add 10.244.1.1:8080 to TCP 10.87.2.0:80 with weight 1",
            "add 10.244.1.2:8080 to TCP 10.87.2.0:80 with weight 1",
            "add service SCTP 10.87.2.0:80 wlc",
            "add 10.244.1.1:8080 to SCTP 10.87.2.0:80 with weight 1",
            "add 10.244.1.2:8080 to SCTP 10.87.2.0:80 with weight 1",
        ]
    );
    assert_eq!(
        words(plan(&Tables::default(), &desired)),
        [
            "delete service TCP 10.87.2.0:80",
            "delete service SCTP 10.87.2.0:80",
            "close TCP 10.87.2.0:80",
            "close SCTP 10.87.2.0:80",
            "masquerade all clients of SCTP 10.87.2.0:80",
            "restrict SCTP 10.87.2.0:80 no longer",
            "unguard 10.87.2.0",
        ]
    );
}

#[test]
fn who_is_masqueraded_changes_when_the_destinations_fit() {
    let service = |n| VirtualService {
        settings: Settings::new(Scheduler::Wlc, None),
        destinations: BTreeMap::from([(pod(n), 1)]),
    };
    let all = Tables {
        services: BTreeMap::from([(key(0), service(1))]),
        ledger: BTreeSet::from([key(0)]),
        ..Tables::default()
    };
    let mut direct = all.clone();
    direct.services.insert(key(0), service(2));
    direct.direct.insert(key(0), nets([]));
    let (add, delete) =
        (|n| Change::AddDestination(key(0), pod(n), 1), |n| Change::DeleteDestination(key(0), pod(n)));
    assert_eq!(plan(&direct, &all).changes, [add(2), delete(1), Change::Direct(key(0), nets([]))]);
    assert_eq!(plan(&all, &direct).changes, [Change::Indirect(key(0)), add(1), delete(2)]);
}

#[test]
fn what_only_stays_where_it_is_gets_weight_0_and_is_never_added() {
    let service = |weights: &[(u8, u32)]| VirtualService {
        settings: Settings::new(Scheduler::Wlc, None),
        destinations: weights.iter().map(|(n, weight)| (pod(*n), *weight)).collect(),
    };
    let tables = |weights: &[(u8, u32)]| Tables {
        services: BTreeMap::from([(key(0), service(weights))]),
        ledger: BTreeSet::from([key(0)]),
        ..Tables::default()
    };
    let mut desired = tables(&[(1, 1)]);
    desired.kept = BTreeSet::from([(key(0), pod(2)), (key(1), pod(3))]);
    let steps = |weights| plan(&desired, &tables(weights)).changes;
    assert_eq!(steps(&[(1, 1), (2, 1)]), [Change::SetDestination(key(0), pod(2), 0)]);
    assert_eq!(steps(&[(1, 1), (2, 0)]), []);
    assert_eq!(steps(&[(1, 1)]), []);
    assert_eq!(steps(&[(1, 1), (3, 1)]), [Change::DeleteDestination(key(0), pod(3))]);
}

#[test]
fn what_an_earlier_agent_left_is_added_and_nothing_is_taken_away() {
    let service = |pods: &[u8]| VirtualService {
        settings: Settings::new(Scheduler::Wlc, None),
        destinations: pods.iter().map(|n| (pod(*n), 1)).collect(),
    };
    let tables = |services: &[(u8, &[u8])]| Tables {
        services: services.iter().map(|(n, pods)| (key(*n), service(pods))).collect(),
        ledger: services.iter().map(|(n, _)| key(*n)).collect(),
        guarded: services.iter().map(|(n, _)| key(*n).address).collect(),
        ..Tables::default()
    };
    let mut found = tables(&[(0, &[1, 2]), (1, &[1, 3]), (4, &[1])]);
    // Somebody else's.
    found.services.insert(key(8), service(&[1]));
    found.direct.insert(key(4), nets([]));
    let mut known = tables(&[(0, &[1, 4]), (1, &[]), (5, &[1])]);
    known.kept.insert((key(0), pod(2)));
    known.sources.insert(key(1), nets([]));
    let mut adopted = known.clone();
    adopted.adopt(&found);
    let mut expected = tables(&[(0, &[1, 4]), (1, &[1, 3]), (4, &[1]), (5, &[1])]);
    expected.kept = known.kept;
    expected.direct = found.direct.clone();
    assert_eq!(adopted, expected);
    let steps = plan(&adopted, &found).changes;
    let lost = |change: &Change| {
        matches!(change, Change::DeleteDestination(..) | Change::DeleteService(_) | Change::Close(_))
    };
    assert!(!steps.iter().any(lost), "{steps:?}");
}

#[test]
fn a_flushed_table_is_filled_again_and_a_changed_scheduler_set() {
    let service = VirtualService {
        settings: Settings::new(Scheduler::Wlc, None),
        destinations: BTreeMap::from([(pod(1), 1)]),
    };
    let desired = Tables {
        services: BTreeMap::from([(key(0), service)]),
        ledger: BTreeSet::from([key(0)]),
        ..Tables::default()
    };
    let mut flushed = desired.clone();
    flushed.services.clear();
    assert_eq!(
        plan(&desired, &flushed).changes,
        [
            Change::AddService(key(0), Settings::new(Scheduler::Wlc, None)),
            Change::AddDestination(key(0), pod(1), 1)
        ]
    );
    let mut other = desired.clone();
    let persistent = Settings::new(Scheduler::Rr, Some(60));
    other.apply(&Change::SetService(key(0), persistent.clone()));
    other.apply(&Change::SetDestination(key(0), pod(1), NOT_MASQUERADED));
    assert_eq!(
        plan(&desired, &other).changes,
        [
            Change::SetService(key(0), Settings::new(Scheduler::Wlc, None)),
            Change::SetDestination(key(0), pod(1), 1)
        ]
    );
}
