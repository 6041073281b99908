//! What a router does beyond the table of cases: leaving, offering, new settings. And what the tests of routers share.

use super::*;
use crate::vrrp::packet::MAX_LISTED;
use crate::vrrp::{Family, RouterId};

pub(super) const SECOND: Duration = Duration::from_secs(1);

pub(super) fn ip(last: u8) -> IpAddr {
    [10, 87, 0, last].into()
}

pub(super) fn config(priority: u8, preempt: Option<Duration>) -> RouterConfig {
    let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: 7 };
    RouterConfig {
        id,
        priority,
        interval: SECOND,
        preempt,
        addresses: vec![ip(50)],
        fresh: [].into(),
        contested: [].into(),
    }
}

pub(super) fn backup(priority: u8, preempt: Option<Duration>) -> Router {
    let mut router = Router::new(config(priority, preempt), ip(11));
    assert_eq!(router.start(Duration::ZERO), [Action::Enter(VrrpState::Backup)]);
    router
}

pub(super) fn master(priority: u8) -> Router {
    let mut router = backup(priority, None);
    let at = router.next_deadline().unwrap();
    router.timeout(at);
    assert_eq!(router.state(), VrrpState::Master);
    router
}

pub(super) fn heard(priority: u8, interval: u16) -> Advert {
    Advert { vrid: 7, priority, interval, addresses: vec![ip(50)] }
}

pub(super) fn kinds(actions: &[Action]) -> Vec<String> {
    actions
        .iter()
        .map(|action| match action {
            Action::Enter(state) => format!("{state:?}"),
            Action::Send(advert) => format!("send {}", advert.priority),
            Action::Tell(_, advert) => format!("tell {}", advert.priority),
            Action::Bind(_) => "bind".into(),
            Action::Announce(_) => "announce".into(),
            Action::Release(_) => "release".into(),
            Action::Yield(..) => "yield".into(),
            Action::Left => "left".into(),
        })
        .collect()
}

#[test]
fn priority_0_said_twice_is_not_waited_for_twice() {
    let mut router = backup(100, None);
    router.receive(SECOND, ip(9), &heard(200, 100));
    let skew = timers::skew(100, SECOND);
    for after in [0, 1, 500] {
        router.receive(SECOND + Duration::from_millis(after), ip(9), &heard(0, 100));
        assert_eq!(router.next_deadline(), Some(SECOND + skew));
        assert_eq!(router.master(), None);
    }
    // Nor does it delay what was about to happen.
    let mut router = backup(100, None);
    let down = timers::down(100, SECOND);
    router.receive(down - SECOND / 10, ip(9), &heard(0, 100));
    assert_eq!(router.next_deadline(), Some(down));
}

#[test]
fn the_goodbye_of_one_that_is_not_the_master_changes_nothing() {
    for preempt in [None, Some(SECOND)] {
        let mut router = backup(100, preempt);
        router.receive(SECOND, ip(9), &heard(200, 100));
        router.receive(SECOND, ip(12), &heard(0, 100));
        assert_eq!(router.master(), Some(ip(9)));
        // Still the timer runs: whatever was meant, the addresses are not left without an owner.
        assert_eq!(router.next_deadline(), Some(SECOND + timers::down(100, SECOND)));
        assert_eq!(kinds(&router.timeout(SECOND + timers::down(100, SECOND)))[0], "Master");
    }
}

#[test]
fn two_that_both_answer_do_not_make_a_storm() {
    // In the second between them: four answers to one that speaks every second, to one of 200 ms twenty.
    for (interval, answers) in [(100, 4), (20, 20)] {
        let mut router = master(100);
        let storm = (0..1000)
            .map(|i| router.receive(SECOND * 5 + Duration::from_millis(i), ip(12), &heard(99, interval)));
        assert_eq!(storm.filter(|actions| !actions.is_empty()).count(), answers);
    }
}

#[test]
fn leaving_is_make_before_break() {
    let mut router = master(100);
    assert_eq!(kinds(&router.leave(SECOND * 5)), ["send 0"]);
    assert_eq!(router.leave(SECOND * 5), []);
    assert_eq!(router.receive(SECOND * 5, ip(12), &heard(0, 100)), []);
    assert_eq!(kinds(&router.receive(SECOND * 5, ip(12), &heard(99, 100))), ["yield", "Init", "left"]);
    assert_eq!(router.timeout(SECOND * 9), []);

    // Alone it waits long enough for the last in rank, and says it once more to who has missed it.
    let mut alone = master(100);
    alone.leave(SECOND * 5);
    assert_eq!(kinds(&alone.timeout(SECOND * 6)), ["send 0"]);
    assert_eq!(alone.timeout(SECOND * 6 + SECOND / 5), []);
    assert_eq!(kinds(&alone.timeout(SECOND * 6 + SECOND / 4)), ["release", "Init", "left"]);

    assert_eq!(kinds(&backup(100, None).leave(SECOND)), ["Init", "left"]);
}

#[test]
fn a_short_interval_waits_a_second_for_the_successor() {
    let mut router = Router::new(RouterConfig { interval: SECOND / 4, ..config(255, None) }, ip(11));
    router.start(Duration::ZERO);
    let mut said = kinds(&router.leave(SECOND));
    while let Some(at) = router.next_deadline() {
        said.extend(kinds(&router.timeout(at)));
        assert!(at <= SECOND * 2);
    }
    assert_eq!(said, ["send 0", "send 0", "send 0", "send 0", "release", "Init", "left"]);
}

#[test]
fn a_long_interval_waits_no_longer_than_a_pod_may_take_to_end() {
    let mut router = Router::new(RouterConfig { interval: SECOND * 40, ..config(255, None) }, ip(11));
    router.start(Duration::ZERO);
    router.leave(SECOND);
    assert_eq!(router.next_deadline(), Some(SECOND * 11));
    assert_eq!(kinds(&router.timeout(SECOND * 11)), ["release", "Init", "left"]);
}

#[test]
fn an_offer_is_taken_by_a_successor() {
    let mut router = master(100);
    assert_eq!(kinds(&router.offer(SECOND * 4)), ["send 0"]);
    assert_eq!(router.offer(SECOND * 4), []);
    assert_eq!(router.state(), VrrpState::Master);
    assert_eq!(router.receive(SECOND * 4, ip(12), &heard(0, 100)), []);
    let now = SECOND * 5;
    assert_eq!(kinds(&router.receive(now, ip(9), &heard(1, 300))), ["yield", "Backup"]);
    assert_eq!(router.master(), Some(ip(9)));
    // It follows the successor and takes part as before.
    assert_eq!(router.next_deadline(), Some(now + timers::down(100, SECOND * 3)));
    let down = router.next_deadline().unwrap();
    assert_eq!(kinds(&router.timeout(down)), ["Master", "send 100", "bind", "announce"]);
    assert_eq!(kinds(&router.receive(down, ip(9), &heard(1, 100))), ["send 100", "announce"]);
}

#[test]
fn an_offer_that_nobody_takes_is_over() {
    let mut router = master(100);
    router.offer(SECOND * 4);
    assert_eq!(kinds(&router.timeout(SECOND * 5)), ["send 0"]);
    assert_eq!(kinds(&router.timeout(SECOND * 5 + SECOND / 4)), ["send 100"]);
    assert_eq!(router.next_deadline(), Some(SECOND * 6 + SECOND / 4));
    assert_eq!(kinds(&router.receive(SECOND * 6, ip(9), &heard(99, 100))), ["send 100", "announce"]);
}

#[test]
fn who_is_displaced_serves_until_a_busy_successor_can_have_bound_all_addresses() {
    let ms = Duration::from_millis;
    for (interval, serves) in
        [(ms(10), ms(300)), (ms(100), ms(300)), (ms(500), ms(500)), (SECOND * 5, SECOND)]
    {
        let mut router = Router::new(RouterConfig { interval, ..config(255, None) }, ip(11));
        router.start(SECOND);
        let actions = router.receive(SECOND, ip(12), &heard(255, 1));
        assert_eq!(actions[1], Action::Yield(vec![ip(50)], SECOND + serves), "{interval:?}");
    }
}

#[test]
fn only_a_master_has_something_to_offer() {
    assert_eq!(backup(100, None).offer(SECOND), []);
    assert_eq!(Router::new(config(100, None), ip(11)).offer(SECOND), []);
    let mut leaving = master(100);
    leaving.leave(SECOND * 4);
    assert_eq!(leaving.offer(SECOND * 4), []);
    assert_eq!(kinds(&leaving.receive(SECOND * 5, ip(9), &heard(1, 100))), ["yield", "Init", "left"]);
}

#[test]
fn an_offer_may_turn_into_leaving() {
    let mut router = master(100);
    router.offer(SECOND * 4);
    assert_eq!(router.leave(SECOND * 5), []);
    assert_eq!(kinds(&router.timeout(SECOND * 6)), ["release", "Init", "left"]);

    let mut router = master(100);
    router.offer(SECOND * 4);
    router.leave(SECOND * 4);
    assert_eq!(kinds(&router.receive(SECOND * 5, ip(9), &heard(1, 100))), ["yield", "Init", "left"]);

    let mut router = master(100);
    router.offer(SECOND * 4);
    assert_eq!(kinds(&router.stop()), ["release", "Init", "left"]);
}

#[test]
fn a_backup_that_knows_no_master_waits_as_its_new_settings_say() {
    let mut router = Router::new(RouterConfig { interval: SECOND * 40, ..config(100, None) }, ip(11));
    router.start(Duration::ZERO);
    router.configure(SECOND, config(200, None));
    assert_eq!(router.next_deadline(), Some(SECOND + timers::down(200, SECOND)));
    // Never longer than before.
    router.configure(SECOND * 2, RouterConfig { interval: SECOND * 40, ..config(200, None) });
    assert_eq!(router.next_deadline(), Some(SECOND + timers::down(200, SECOND)));
}

#[test]
fn a_backup_that_knows_a_master_counts_from_its_last_word_with_its_new_priority() {
    let mut router = backup(200, None);
    router.receive(SECOND, ip(9), &heard(254, 300));
    for priority in [100, 250, 1, 200] {
        // Its own interval is of no account while it has learned one.
        let new = RouterConfig { interval: SECOND * u32::from(priority), ..config(priority, None) };
        assert_eq!(router.configure(SECOND * 2, new), []);
        assert_eq!(router.next_deadline(), Some(SECOND + timers::down(priority, SECOND * 3)));
    }
}

#[test]
fn a_backup_that_is_told_to_preempt_takes_over_from_the_lower_master_it_followed() {
    for delay in [Duration::ZERO, SECOND * 2] {
        let mut router = backup(100, None);
        router.receive(SECOND, ip(9), &heard(50, 100));
        router.configure(SECOND + SECOND / 2, config(100, Some(delay)));
        for second in 2..=4 {
            router.receive(SECOND * second, ip(9), &heard(50, 100));
        }
        let at = SECOND + timers::down(100, SECOND) + delay;
        assert_eq!(router.next_deadline().unwrap(), at.min(SECOND * 4 + timers::down(100, SECOND)));
        router.receive(SECOND * 5 - SECOND / 2, ip(9), &heard(50, 100));
        assert_eq!(router.next_deadline(), Some(at));
        assert_eq!(kinds(&router.timeout(at))[0], "Master");
    }
}

#[test]
fn a_backup_that_is_told_not_to_preempt_follows_the_master_it_has_heard() {
    let heard_at = SECOND * 3;
    for new in [config(100, None), config(40, Some(Duration::ZERO))] {
        let mut router = backup(100, Some(Duration::ZERO));
        router.receive(heard_at, ip(9), &heard(50, 200));
        router.configure(heard_at + SECOND / 2, new.clone());
        assert_eq!(router.next_deadline(), Some(heard_at + timers::down(new.priority, SECOND * 2)));
    }
}

#[test]
fn intervals_that_differ_during_an_upgrade_do_not_flap() {
    let tenth = SECOND / 10;
    // The master is at 100 ms and dies. A router of 1 s takes over as it has learned, and says its own interval.
    let [mut slow, mut quick] = [(200, SECOND, 12), (100, tenth, 11)].map(|(priority, interval, last)| {
        let mut router = Router::new(RouterConfig { interval, ..config(priority, None) }, ip(last));
        router.start(Duration::ZERO);
        router.receive(SECOND, ip(9), &heard(254, 10));
        router
    });
    let at = slow.next_deadline().unwrap();
    assert_eq!(at, SECOND + timers::down(200, tenth));
    let actions = slow.timeout(at);
    let Action::Send(first) = &actions[1] else { panic!("{actions:?}") };
    assert_eq!(first.interval, 100);
    // Its first advertisement is enough for the quick one to wait for the next.
    quick.receive(at, ip(12), first);
    assert_eq!(quick.timeout(at + SECOND), []);
    assert_eq!(quick.next_deadline(), Some(at + timers::down(100, SECOND)));

    // The other way round: the quick one becomes master and speaks often; the slow one learns it.
    slow.stop();
    let at = quick.next_deadline().unwrap();
    assert_eq!(kinds(&quick.timeout(at))[0], "Master");
    assert_eq!(quick.next_deadline(), Some(at + tenth));
    let mut slow = Router::new(config(200, None), ip(12));
    slow.start(at);
    slow.receive(at + tenth, ip(11), &heard(100, 10));
    assert_eq!(slow.next_deadline(), Some(at + tenth + timers::down(200, tenth)));
}

#[test]
fn a_master_keeps_its_state_when_its_addresses_change() {
    let mut router = master(100);
    let new = RouterConfig { addresses: vec![ip(51), ip(52)], ..config(100, None) };
    let actions = router.configure(SECOND * 5, new.clone());
    assert_eq!(kinds(&actions), ["send 100", "bind", "announce", "release"]);
    assert_eq!(actions[1], Action::Bind(vec![ip(51), ip(52)]));
    assert_eq!(actions[3], Action::Release(vec![ip(50)]));
    assert_eq!(router.configure(SECOND * 5, new.clone()), []);
    // What only this node has to know is no news for the others.
    assert_eq!(router.configure(SECOND * 5, RouterConfig { fresh: [ip(52)].into(), ..new }), []);
}

#[test]
fn a_master_that_gives_up_says_nothing_of_new_addresses_but_serves_them() {
    let mut router = master(100);
    router.offer(SECOND * 5);
    let new = RouterConfig { addresses: vec![ip(51)], ..config(200, None) };
    assert_eq!(kinds(&router.configure(SECOND * 5, new)), ["bind", "announce", "release"]);
    assert_eq!(router.stop()[0], Action::Release(vec![ip(51)]));
}

#[test]
fn an_advertisement_lists_the_first_addresses() {
    let addresses: Vec<IpAddr> = (1..=100).map(ip).collect();
    let mut router = Router::new(RouterConfig { addresses, ..config(255, None) }, ip(200));
    let actions = router.start(Duration::ZERO);
    let Action::Send(advert) = &actions[1] else { panic!("{actions:?}") };
    assert_eq!(advert.addresses.len(), MAX_LISTED);
}

#[test]
fn over_ipv6_a_link_local_address_comes_first() {
    let id = RouterId { family: Family::V6, ..config(100, None).id };
    let six = |text: &str| text.parse::<IpAddr>().unwrap();
    let (global, source) = (six("2001:db8::100"), six("fe80::1"));
    let listed = |addresses: Vec<IpAddr>, source| {
        RouterConfig { id: id.clone(), addresses, ..config(100, None) }.advert(100, source).addresses
    };
    // The sender's, or one that is a virtual IP itself, wherever it stands.
    assert_eq!(listed(vec![global], source), [source, global]);
    assert_eq!(listed(vec![global, six("fe80::100")], source), [six("fe80::100"), global]);
    assert_eq!(
        listed(vec![six("fe80::100"), six("fe80::101")], source),
        [six("fe80::100"), six("fe80::101")]
    );
    let many = (0..300_u16).map(|n| IpAddr::from([0x2001, 0xdb8, 0, 0, 0, 0, 0, n])).collect();
    let listed = listed(many, source);
    assert_eq!((listed.len(), listed[0]), (MAX_LISTED, source));
}

#[test]
fn a_takeover_knows_its_cause_and_whose_silence_it_was() {
    let after = |preempt: Option<Duration>, adverts: &[(u64, u8)]| {
        let mut router = backup(100, preempt);
        for (at, priority) in adverts {
            router.receive(Duration::from_millis(*at), ip(9), &heard(*priority, 100));
        }
        let at = router.next_deadline().unwrap();
        router.timeout(at);
        assert_eq!(router.state(), VrrpState::Master);
        (router, at)
    };
    let (mut router, at) = after(None, &[(0, 200), (1000, 200)]);
    assert_eq!((router.lost(at), router.cause()), (Some(ip(9)), Some(Cause::Silence)));
    assert_eq!(router.lost(at + FRESH), None, "long ago");
    router.receive(at, ip(12), &heard(50, 100));
    assert_eq!(router.lost(at), Some(ip(9)), "another one is heard");
    assert_eq!(router.cause(), Some(Cause::Rank), "two had believed to be master");
    router.receive(at, ip(9), &heard(50, 100));
    assert_eq!((router.state(), router.lost(at)), (VrrpState::Master, None), "it lives");

    let (router, at) = after(None, &[]);
    assert_eq!((router.lost(at), router.cause()), (None, Some(Cause::Alone)), "nobody was there");
    let (router, at) = after(None, &[(0, 200), (1000, 0)]);
    assert_eq!((router.lost(at), router.cause()), (None, Some(Cause::Goodbye)), "it said goodbye");
    let (router, at) =
        after(Some(Duration::ZERO), &[(0, 50), (1000, 50), (2000, 50), (3000, 50), (3500, 50)]);
    assert_eq!(
        (router.lost(at), router.cause()),
        (None, Some(Cause::Preference)),
        "it lives, and has to give way"
    );
    let (router, at) = after(Some(SECOND * 20), &[(0, 50)]);
    assert_eq!(
        (router.lost(at), router.cause()),
        (Some(ip(9)), Some(Cause::Silence)),
        "one of lower priority has died"
    );

    let (mut router, at) = after(None, &[(0, 200)]);
    router.receive(at, ip(12), &heard(200, 100));
    assert_eq!((router.state(), router.lost(at)), (VrrpState::Backup, None));
}
