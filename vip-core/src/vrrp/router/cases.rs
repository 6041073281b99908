//! The table of cases of the election, by number: what a router of priority 100 at an interval of 1 s does with what it
//! hears and when. Cases 1 to 9 are about bytes and stand beside the codec; 23, 26 and 27 need a kernel.

use std::time::Duration;

use super::tests::{SECOND, backup, config, heard, ip, kinds, master};
use super::*;

const TAKEOVER: [&str; 4] = ["Master", "send 100", "bind", "announce"];

/// Expects a takeover at a moment, and not a nanosecond before it.
#[track_caller]
fn takes_over(router: &mut Router, at: Duration) {
    assert_eq!(router.next_deadline(), Some(at));
    assert_eq!(router.timeout(at - Duration::from_nanos(1)), []);
    assert_eq!(
        kinds(&router.timeout(at))[..2],
        ["Master".to_owned(), format!("send {}", router.config.priority)]
    );
}

#[test]
fn case_11_the_masters_interval_is_learned() {
    let mut router = backup(100, None);
    router.receive(SECOND, ip(9), &heard(200, 300));
    // 3 x 3 s and the skew of our priority.
    assert_eq!(router.next_deadline(), Some(SECOND + Duration::from_nanos(9_000_000_000 + 1_828_125_000)));
    router.receive(SECOND, ip(9), &heard(0, 300));
    takes_over(&mut router, SECOND + timers::skew(100, SECOND * 3));
}

#[test]
fn case_12_silence_makes_a_master() {
    for (interval, down) in [(SECOND, 3_609_375_000), (SECOND / 10, 360_937_500)] {
        let mut router = Router::new(RouterConfig { interval, ..config(100, None) }, ip(11));
        router.start(Duration::ZERO);
        let at = Duration::from_nanos(down);
        assert_eq!(router.timeout(at - Duration::from_nanos(1)), []);
        assert_eq!(kinds(&router.timeout(at)), TAKEOVER);
        assert_eq!(router.next_deadline(), Some(at + interval));
    }
}

/// (case, priority heard after 1 s, preempting, when the timer then fires)
#[test]
fn cases_13_to_15_a_backup_and_what_it_hears() {
    let (down, skew) = (timers::down(100, SECOND), timers::skew(100, SECOND));
    assert_eq!(skew, Duration::from_nanos(609_375_000));
    let rows = [
        ("13 priority 0", 0, None, SECOND + skew),
        ("13 priority 0, preempting", 0, Some(Duration::ZERO), SECOND + skew),
        ("13 priority 0, preempting with a delay", 0, Some(SECOND * 2), SECOND + skew),
        ("14 lower priority, preempting: not reset", 99, Some(Duration::ZERO), down),
        ("14 lower priority, not preempting: reset", 99, None, SECOND + down),
        ("15 equal priority: reset", 100, None, SECOND + down),
        ("15 equal priority, preempting: reset", 100, Some(Duration::ZERO), SECOND + down),
        ("higher priority: reset", 101, Some(Duration::ZERO), SECOND + down),
    ];
    for (case, priority, preempt, fires) in rows {
        // No tie-break by address here.
        for from in [ip(9), ip(12)] {
            let mut router = backup(100, preempt);
            assert_eq!(router.receive(SECOND, from, &heard(priority, 100)), [], "{case}");
            assert_eq!(router.next_deadline(), Some(fires), "{case}");
        }
    }
}

/// (case, sender, priority heard, what a master of priority 100 at address 11 does)
#[test]
fn cases_16_to_19_a_master_and_what_it_hears() {
    let (low, high) = (ip(9), ip(12));
    let rows = [
        ("16 higher priority", low, 101, vec!["tell 100", "yield", "Backup"]),
        ("17 equal priority, greater address", high, 100, vec!["tell 100", "yield", "Backup"]),
        ("17 equal priority, smaller address", low, 100, vec!["send 100", "announce"]),
        ("18 lower priority", high, 99, vec!["send 100", "announce"]),
        ("19 priority 0", high, 0, vec!["send 100"]),
    ];
    let now = SECOND * 4 + SECOND / 2;
    for (case, from, priority, expected) in rows {
        let mut router = master(100);
        assert_eq!(kinds(&router.receive(now, from, &heard(priority, 300))), expected, "{case}");
        let (fires, master) = match router.state() {
            // The interval is learned too.
            VrrpState::Backup => (now + timers::down(100, SECOND * 3), Some(from)),
            _ => (now + SECOND, None),
        };
        assert_eq!((router.next_deadline(), router.master()), (Some(fires), master), "{case}");
    }
}

#[test]
fn case_20_a_priority_of_255_is_master_at_once() {
    let mut router = Router::new(config(255, None), ip(11));
    assert_eq!(kinds(&router.start(Duration::ZERO)), ["Master", "send 255", "bind", "announce"]);
}

#[test]
fn case_21_of_two_with_priority_255_the_greater_address_remains() {
    let [mut low, mut high] = [11, 12].map(|last| Router::new(config(255, None), ip(last)));
    let [said_low, said_high] = [&mut low, &mut high].map(|router| router.start(Duration::ZERO));
    let advert = |actions: &[Action]| match &actions[1] {
        Action::Send(advert) => advert.clone(),
        other => panic!("{other:?}"),
    };
    let millisecond = Duration::from_millis(1);
    assert_eq!(
        kinds(&low.receive(millisecond, ip(12), &advert(&said_high))),
        ["tell 255", "yield", "Backup"]
    );
    assert_eq!(kinds(&high.receive(millisecond, ip(11), &advert(&said_low))), ["send 255", "announce"]);
    assert_eq!((low.state(), high.state()), (VrrpState::Backup, VrrpState::Master));
}

#[test]
fn case_22_a_master_that_stops_says_so_and_then_releases() {
    assert_eq!(kinds(&master(100).stop()), ["send 0", "release", "Init", "left"]);
    let mut router = master(100);
    assert_eq!(kinds(&router.leave(SECOND * 4)), ["send 0"]);
    let took = SECOND * 4 + timers::skew(1, SECOND);
    assert_eq!(kinds(&router.receive(took, ip(9), &heard(1, 100))), ["yield", "Init", "left"]);
}

#[test]
fn case_24_a_master_that_was_paused_reads_first() {
    let resumed = SECOND * 9;
    // Replaced meanwhile: what was queued is read, and then there is nothing to send.
    let mut router = master(100);
    assert_eq!(kinds(&router.receive(resumed, ip(9), &heard(1, 100))), ["release", "Backup"]);
    assert_eq!(router.timeout(resumed), []);
    // Nothing was queued, or there was no room for it: it listens before it speaks, and goes on when nobody else does.
    let mut router = master(100);
    assert_eq!(kinds(&router.timeout(resumed)), ["release", "Backup"]);
    takes_over(&mut router, resumed + SECOND * 2 + timers::skew(100, SECOND));
    let mut router = master(100);
    router.timeout(resumed);
    assert_eq!(router.receive(resumed + SECOND, ip(9), &heard(1, 100)), []);
    assert_eq!(router.next_deadline(), Some(resumed + SECOND + timers::down(100, SECOND)));
    assert_eq!(kinds(&master(100).receive(resumed, ip(9), &heard(0, 100))), ["send 100"]);
    // Before three advertisements are missed nobody can have taken over.
    let mut late = master(100);
    let due = late.next_deadline().unwrap();
    assert_eq!(kinds(&late.timeout(due + SECOND * 2 - Duration::from_nanos(1))), ["send 100"]);
    let mut late = master(100);
    assert_eq!(kinds(&late.timeout(due + SECOND * 2)), ["release", "Backup"]);
    // Two intervals are no pause.
    let mut late = master(100);
    let spoken = late.next_deadline().unwrap() - SECOND;
    assert_eq!(kinds(&late.receive(spoken + SECOND * 2, ip(9), &heard(1, 100))), ["send 100", "announce"]);
    let mut silent = master(100);
    let after = spoken + SECOND * 2 + Duration::from_nanos(1);
    assert_eq!(kinds(&silent.receive(after, ip(9), &heard(1, 100))), ["release", "Backup"]);
}

#[test]
fn case_25_a_preempt_delay_counts_while_a_lower_master_is_heard() {
    let delay = SECOND * 2;
    let down = timers::down(100, SECOND);
    let speak = |router: &mut Router, until: u32| {
        for second in 1..=until {
            assert_eq!(router.receive(SECOND * second, ip(9), &heard(50, 100)), []);
            assert_eq!(router.timeout(SECOND * second), []);
        }
    };
    let mut router = backup(100, Some(delay));
    speak(&mut router, 5);
    assert_eq!(router.master(), Some(ip(9)));
    takes_over(&mut router, down + delay);

    // Dead during the delay: the ordinary silence after its last word, and not a moment longer.
    let mut router = backup(100, Some(delay));
    speak(&mut router, 1);
    takes_over(&mut router, SECOND + down);

    // Never heard: no delay.
    takes_over(&mut backup(100, Some(delay)), down);

    // Its goodbye: no delay.
    let mut router = backup(100, Some(delay));
    speak(&mut router, 4);
    router.receive(SECOND * 4, ip(9), &heard(0, 100));
    takes_over(&mut router, SECOND * 4 + timers::skew(100, SECOND));

    // A master that is obeyed ends the count.
    let mut router = backup(100, Some(delay));
    speak(&mut router, 4);
    router.receive(SECOND * 4, ip(12), &heard(200, 100));
    takes_over(&mut router, SECOND * 4 + down);
}
