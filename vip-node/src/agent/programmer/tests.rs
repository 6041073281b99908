//! The thread on a model kernel.

use super::*;
use crate::dataplane::Recorder;
use vip_core::api::{Backends, Reason};
use vip_core::plan::{Protocol, Settings, VirtualService};

fn key(port: u16) -> ServiceKey {
    ServiceKey { address: [10, 87, 2, 50].into(), protocol: Protocol::Tcp, port }
}

/// One service on port 80 with that many destinations.
fn tables(destinations: u8) -> Tables {
    let mut tables = Tables::default();
    tables.guarded.insert(key(80).address);
    tables.ledger.insert(key(80));
    let destinations = (1..=destinations).map(|n| (([10, 244, 1, n], 8080).into(), 1)).collect();
    let settings = Settings::new(Scheduler::Wlc, None);
    tables.services.insert(key(80), VirtualService { settings, destinations });
    tables
}

fn wait(programmer: &Programmer, what: impl Fn(&Programmed) -> bool) -> Programmed {
    let deadline = Instant::now() + Duration::from_secs(10);
    loop {
        let state = programmer.state().borrow().clone();
        if what(&state) {
            return state;
        }
        assert!(Instant::now() < deadline, "not in time: {state:?}");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn until(mut what: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !what() {
        assert!(Instant::now() < deadline, "not in time");
        std::thread::sleep(Duration::from_millis(5));
    }
}

fn worker(kernel: &Recorder, desired: Tables) -> Worker<Recorder> {
    let mut worker = Worker::new(kernel.clone(), watch::channel(Programmed::default()).0);
    worker.desired = Some((1, Arc::new(desired)));
    worker
}

/// A whole audit, and what follows from it.
fn audit(worker: &mut Worker<Recorder>) {
    let mut work = worker.begin_audit();
    while !work && worker.audit.is_under_way() {
        work = worker.look();
    }
    assert!(work && worker.attempt());
}

#[test]
fn one_endpoint_more_is_one_message_more() {
    let kernel = Recorder::default();
    let programmer = Programmer::start(kernel.clone()).unwrap();
    programmer.desire(1, Arc::new(tables(3)));
    let state = wait(&programmer, |s| s.generation == Some(1));
    assert!(state.serves(&[key(80)]) == Some(true));
    wait(&programmer, |s| *s.firewalls == kernel.clone().firewalls().unwrap());
    kernel.forget();
    programmer.desire(2, Arc::new(tables(4)));
    wait(&programmer, |s| s.generation == Some(2));
    assert_eq!(kernel.forget(), [Change::AddDestination(key(80), ([10, 244, 1, 4], 8080).into(), 1)]);
    programmer.clear();
    assert_eq!(kernel.tables(), Tables::default());
}

#[test]
fn a_successor_finds_everything_and_sends_nothing() {
    let kernel = Recorder::new(tables(3));
    let programmer = Programmer::start(kernel.clone()).unwrap();
    programmer.desire(1, Arc::new(tables(3)));
    wait(&programmer, |s| s.serves(&[key(80)]) == Some(true));
    assert_eq!(kernel.applied(), []);
}

#[test]
fn what_an_earlier_agent_left_is_told_once() {
    let kernel = Recorder::new(tables(3));
    let programmer = Programmer::start(kernel).unwrap();
    let mut found = None;
    until(|| {
        found = programmer.found();
        found.is_some()
    });
    assert_eq!((found, programmer.found()), (Some(tables(3)), None));
}

#[test]
fn what_others_flush_is_put_back_and_never_looks_lost() {
    let kernel = Recorder::default();
    let programmer = Programmer::start(kernel.clone()).unwrap();
    programmer.desire(1, Arc::new(tables(3)));
    wait(&programmer, |s| s.serves(&[key(80)]) == Some(true));
    // The rules of others are looked at once our entries are there.
    wait(&programmer, |s| !s.firewalls.is_empty());
    let mut states = programmer.state();
    kernel.meddle(|tables| tables.services.clear());
    until(|| kernel.tables() == tables(3));
    wait(&programmer, |s| s.repairs == 1);
    assert!(states.borrow_and_update().serves(&[key(80)]) == Some(true));
}

#[test]
fn a_change_right_after_a_flush_is_no_refusal() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, tables(3));
    assert!(worker.attempt());
    kernel.meddle(|tables| tables.services.clear());
    let looks = kernel.looks();
    worker.desired = Some((2, Arc::new(tables(4))));
    assert!(worker.attempt());
    // IPVS alone was read.
    assert_eq!((kernel.tables(), kernel.looks()), (tables(4), looks));
    assert!(worker.publish.borrow().serves(&[key(80)]) == Some(true));
}

#[test]
fn what_the_sentinel_has_not_seen_is_found_when_a_step_fails() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, many(3));
    assert!(worker.attempt());
    let last = key(1002);
    kernel.meddle(|tables| drop(tables.services.remove(&last)));
    let mut wanted = many(3);
    wanted.services.get_mut(&last).unwrap().destinations.insert(([10, 245, 0, 1], 80).into(), 1);
    worker.desired = Some((2, Arc::new(wanted.clone())));
    assert!(worker.attempt());
    assert_eq!(kernel.tables(), wanted);
    assert!(worker.publish.borrow().refused.is_empty());
}

#[test]
fn the_sentinel_asks_for_each_in_its_turn() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, many(3));
    assert!(worker.attempt());
    kernel.meddle(|tables| drop(tables.services.remove(&key(1002))));
    assert_eq!([0; 3].map(|_| worker.is_lost()), [false, false, true]);
}

#[test]
fn what_is_bound_here_is_put_back_first() {
    let kernel = Recorder::default();
    let mut wanted = tables(1);
    let mine = ServiceKey { address: [10, 87, 2, 99].into(), ..key(80) };
    wanted.ledger.insert(mine);
    wanted.services.insert(mine, wanted.services[&key(80)].clone());
    let mut worker = worker(&kernel, wanted);
    worker.owned.insert(mine.address);
    assert!(worker.attempt());
    kernel.meddle(|tables| tables.services.clear());
    kernel.forget();
    audit(&mut worker);
    let order: Vec<ServiceKey> = kernel.forget().iter().filter_map(|change| change.key().copied()).collect();
    assert_eq!(order, [mine, mine, key(80), key(80)]);
}

#[test]
fn an_entry_of_somebody_else_is_reported_and_left_alone() {
    let mut foreign = tables(1);
    foreign.ledger.clear();
    foreign.guarded.clear();
    let kernel = Recorder::new(foreign.clone());
    let programmer = Programmer::start(kernel.clone()).unwrap();
    programmer.desire(1, Arc::new(tables(3)));
    let state = wait(&programmer, |s| s.generation == Some(1));
    assert!(state.conflicts.contains(&key(80)) && state.serves(&[key(80)]) != Some(true));
    assert_eq!(kernel.tables().services, foreign.services);
}

#[test]
fn a_kernel_without_ipvs_is_a_trouble_until_it_has_it() {
    let kernel = Recorder::default();
    kernel.fail(Some(DataplaneError::IpvsUnavailable));
    let programmer = Programmer::start(kernel.clone()).unwrap();
    programmer.desire(1, Arc::new(tables(3)));
    let state = wait(&programmer, |s| s.generation == Some(1));
    assert_eq!(state.trouble.as_ref().map(|t| t.reason), Some(Reason::IPVSUnavailable));
    assert!(state.serves(&[]) != Some(true));
    kernel.fail(None);
    wait(&programmer, |s| s.serves(&[key(80)]) == Some(true));
}

#[test]
fn connections_are_counted_for_some_services_at_a_time_and_only_of_what_is_bound_here() {
    let kernel = Recorder::default();
    let mut wanted = many(40);
    let other = ServiceKey { address: [10, 87, 2, 99].into(), ..key(80) };
    wanted.ledger.insert(other);
    wanted.services.insert(other, wanted.services[&key(1000)].clone());
    let mut worker = worker(&kernel, wanted);
    assert!(worker.attempt());
    worker.owned.insert(key(80).address);
    let mut state = worker.publish.subscribe();
    let mut counted = || {
        worker.count();
        let all = worker.publish.borrow().connections.keys().map(|(key, _)| *key).collect::<BTreeSet<_>>();
        (all.len(), all.contains(&key(1000)), all.contains(&other))
    };
    assert_eq!(counted(), (32, true, false));
    assert_eq!(counted(), (40, true, false), "those that are left, and the first again");
    assert!(!state.has_changed().unwrap(), "nobody is woken for it");
    worker.owned.clear();
    worker.count();
    assert!(state.borrow_and_update().connections.is_empty());
}

#[test]
fn one_failed_look_is_not_a_trouble_yet() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, tables(1));
    assert!(worker.attempt());
    worker.mirror = None;
    kernel.fail(Some(DataplaneError::IpvsUnavailable));
    assert!(!worker.attempt());
    assert!(worker.publish.borrow().serves(&[key(80)]) == Some(true));
    assert!(!worker.attempt());
    assert!(worker.publish.borrow().serves(&[key(80)]) != Some(true));
}

#[test]
fn one_refused_service_does_not_keep_the_others_out() {
    let kernel = Recorder::default();
    kernel.refuse(key(81), true);
    let mut wanted = tables(1);
    wanted.ledger.insert(key(81));
    wanted.services.insert(key(81), VirtualService::default());
    let programmer = Programmer::start(kernel.clone()).unwrap();
    programmer.desire(1, Arc::new(wanted));
    let state = wait(&programmer, |s| s.generation == Some(1));
    assert!(state.serves(&[key(80)]) == Some(true) && state.serves(&[key(81)]) != Some(true));
    kernel.meddle(|tables| tables.services.clear());
    until(|| kernel.tables().services.contains_key(&key(80)));
    kernel.refuse(key(81), false);
    wait(&programmer, |s| s.serves(&[key(81)]) == Some(true));
}

#[test]
fn beside_one_that_is_refused_a_change_is_no_look_at_everything() {
    let kernel = Recorder::default();
    kernel.refuse(key(1001), true);
    let mut worker = worker(&kernel, many(3));
    assert!(!worker.attempt());
    let (looks, other) = (kernel.looks(), ([10, 245, 0, 1], 80).into());
    kernel.forget();
    let mut wanted = many(3);
    for weight in 1..=3 {
        wanted.services.get_mut(&key(1000)).unwrap().destinations.insert(other, weight);
        worker.desired = Some((1 + u64::from(weight), Arc::new(wanted.clone())));
        assert!(!worker.attempt());
        assert!(worker.publish.borrow().refused.contains_key(&key(1001)));
    }
    assert_eq!((kernel.forget().len(), kernel.looks()), (3, looks));
    kernel.refuse(key(1001), false);
    assert!(worker.attempt());
    assert_eq!((kernel.tables(), kernel.looks()), (wanted, looks));
}

#[test]
fn a_missing_scheduler_is_replaced_until_it_is_there() {
    let kernel = Recorder::default();
    kernel.lack(Some("mh"));
    let mut wanted = tables(2);
    wanted.services.get_mut(&key(80)).unwrap().settings.scheduler = "mh".to_owned();
    let mut worker = worker(&kernel, wanted.clone());
    assert!(worker.attempt());
    assert_eq!(kernel.tables(), tables(2));
    let state = worker.publish.borrow().clone();
    assert!(state.serves(&[key(80)]) == Some(true) && state.refused.is_empty());
    let trouble = &state.substituted[&key(80)];
    assert_eq!(trouble.reason, Reason::SchedulerUnavailable);
    assert!(trouble.message.ends_with("; until then wlc is used"), "{}", trouble.message);
    kernel.lack(None);
    kernel.forget();
    audit(&mut worker);
    assert_eq!((kernel.tables(), kernel.forget().len()), (wanted, 1));
    assert!(worker.publish.borrow().substituted.is_empty());
}

/// Services on that many ports from 1,000 on, with four destinations each.
fn many(services: u16) -> Tables {
    let service = tables(4).services[&key(80)].clone();
    let services: BTreeMap<_, _> = (0..services).map(|n| (key(1000 + n), service.clone())).collect();
    let ledger = services.keys().copied().collect();
    Tables { services, ledger, ..tables(0) }
}

#[test]
fn what_is_newer_is_taken_up_in_the_middle_of_a_refill() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, many(1000));
    worker.newest.store(2, Ordering::Release);
    assert!(worker.attempt());
    assert_eq!(kernel.forget().len(), AT_ONCE);
    assert_eq!(worker.publish.borrow().generation, None);
    worker.desired = Some((2, Arc::new(tables(3))));
    assert!(worker.attempt());
    assert_eq!(kernel.tables(), tables(3));
    assert_eq!(worker.publish.borrow().generation, Some(2));
}

#[test]
fn what_takes_long_to_put_back_is_given_up_until_it_is() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, many(1000));
    assert!(worker.attempt());
    let serves = |worker: &Worker<Recorder>, port| worker.publish.borrow().serves(&[key(port)]);
    kernel.meddle(|tables| tables.services.clear());
    worker.newest.store(2, Ordering::Release);
    assert!(worker.attempt());
    assert_eq!([1000, 1999].map(|port| serves(&worker, port)), [Some(true); 2], "for a moment nobody minds");
    worker.under_way = worker.under_way.and_then(|since| since.checked_sub(LONG));
    worker.desired = Some((2, Arc::new(many(1001))));
    worker.newest.store(3, Ordering::Release);
    assert!(worker.attempt());
    let told = [1000, 1999, 2000].map(|port| serves(&worker, port));
    assert_eq!(told, [Some(true), Some(false), None], "put back, not yet, and never tried");
    worker.newest.store(2, Ordering::Release);
    assert!(worker.attempt());
    assert_eq!([1000, 1999, 2000].map(|port| serves(&worker, port)), [Some(true); 3]);
}

#[test]
fn of_what_was_not_tried_yet_the_last_word_stands() {
    let vip = |name: &str, ports: &[u16]| VipPlan {
        keys: ports.iter().map(|port| key(*port)).collect(),
        ..plan_of(name)
    };
    let vips = [vip("old", &[80]), vip("grown", &[80, 81]), vip("new", &[82]), vip("refused", &[80, 83])];
    let trouble = Trouble::new(Reason::KernelRefused, "as the test wants");
    let state = Programmed {
        present: Arc::new([key(80)].into()),
        refused: Arc::new([(key(83), trouble.clone())].into()),
        ..Programmed::default()
    };
    let last = ["grown", "refused", "deleted"].map(str::to_owned).into();
    assert_eq!(state.serving(&vips, &last), ["grown", "old"].map(str::to_owned).into());
    let broken = Programmed { trouble: Some(trouble), ..state };
    assert_eq!(broken.serving(&vips, &last), BTreeSet::new());
}

/// A virtual IP of which only the name is of interest.
fn plan_of(name: &str) -> VipPlan {
    VipPlan {
        name: name.to_owned(),
        address: None,
        vrid: 100,
        preferred: None,
        fresh: false,
        contested: false,
        bare: false,
        keys: Vec::new(),
        parts: Vec::new(),
        check: None,
        backends: Backends::default(),
        shunned: BTreeSet::new(),
        troubles: Vec::new(),
        candidate: Ok("eth0".to_owned()),
    }
}

#[test]
fn a_change_waits_for_one_piece_of_an_audit_and_the_audit_goes_on() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, many(1000));
    assert!(worker.attempt());
    let (first, last, other) = (key(1000), key(1999), ([10, 245, 0, 1], 80).into());
    kernel.meddle(|tables| tables.services.get_mut(&last).unwrap().destinations.clear());
    kernel.forget();
    assert!(!worker.begin_audit());
    assert!(!worker.look() && !worker.look(), "the first services are as they should be");
    let mut wanted = many(1000);
    wanted.services.get_mut(&first).unwrap().destinations.insert(other, 1);
    worker.desired = Some((2, Arc::new(wanted.clone())));
    assert!(worker.attempt());
    assert_eq!(kernel.forget(), [Change::AddDestination(first, other, 1)]);
    while !worker.look() {
        assert!(worker.audit.is_under_way(), "the last service was not looked at");
    }
    assert!(worker.attempt());
    assert_eq!((kernel.forget().len(), kernel.tables()), (4, wanted));
}

#[test]
fn a_flush_in_the_middle_of_an_audit_is_no_refusal() {
    let kernel = Recorder::default();
    let mut worker = worker(&kernel, many(1000));
    assert!(worker.attempt());
    assert!(!worker.begin_audit() && !worker.look());
    kernel.meddle(|tables| tables.services.clear());
    assert!(worker.look() && worker.attempt());
    assert_eq!(kernel.tables(), many(1000));
    assert!(worker.publish.borrow().refused.is_empty());
}

#[test]
fn a_refusal_keeps_from_what_depends_on_it_in_later_portions() {
    let kernel = Recorder::default();
    kernel.refuse(key(1000), true);
    let mut worker = worker(&kernel, many(1000));
    assert!(!worker.attempt());
    let mut others = many(1000);
    others.services.remove(&key(1000));
    others.ledger.remove(&key(1000));
    assert_eq!(kernel.tables(), others);
    let state = worker.publish.borrow().clone();
    assert!(state.refused[&key(1000)].message.ends_with("as the test wants"));
}

#[test]
fn a_thousand_endpoints_that_come_and_go_and_five_thousand_services_deleted_at_once() {
    let kernel = Recorder::default();
    let programmer = Programmer::start(kernel.clone()).unwrap();
    let mut crowd = many(5000);
    programmer.desire(1, Arc::new(crowd.clone()));
    let some: Vec<_> =
        (0..1000u32).map(|n| (([10, 245, (n / 250) as u8, (n % 250) as u8], 80).into(), 1)).collect();
    for generation in 2..12 {
        let destinations = &mut crowd.services.get_mut(&key(1000)).unwrap().destinations;
        match generation % 2 {
            0 => destinations.extend(some.iter().copied()),
            _ => destinations.retain(|to, _| some.iter().all(|(other, _)| other != to)),
        }
        programmer.desire(generation, Arc::new(crowd.clone()));
    }
    wait(&programmer, |s| s.generation == Some(11));
    assert_eq!(kernel.tables(), many(5000));
    programmer.desire(12, Arc::new(tables(1)));
    wait(&programmer, |s| s.generation == Some(12));
    assert_eq!(kernel.tables(), tables(1));
}
