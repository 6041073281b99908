//! The state machine of one virtual router on one node (RFC 9568 section 6.4). It sleeps on nothing and sends nothing: the
//! time comes in as an argument (since any fixed moment, monotonic), what to do goes out as [`Action`]s.
//!
//! Who calls it hands over all packets that are queued before it calls [`Router::timeout`]: a process that was paused as a
//! master must hear first that it was replaced.

use std::net::IpAddr;
use std::time::Duration;

use super::packet::Advert;
use super::{RouterConfig, timers};
use crate::api::VrrpState;

/// How long a master that leaves goes on serving while it waits for its successor's first advertisement.
const HANDOVER: Duration = Duration::from_secs(1);

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The state has changed.
    Enter(VrrpState),
    /// Send an advertisement to the group.
    Send(Advert),
    /// Bind addresses to the interface.
    Bind(Vec<IpAddr>),
    /// Announce bound addresses (gratuitous ARP, RFC 9568 section 6.4.2).
    Announce(Vec<IpAddr>),
    /// Take addresses off the interface.
    Release(Vec<IpAddr>),
    /// The election is left; nothing more will come.
    Left,
}

/// One node's part in one election.
#[derive(Clone, Debug)]
pub struct Router {
    config: RouterConfig,
    /// Our primary address on the interface: the sender of our advertisements, and the tie-break.
    source: IpAddr,
    state: VrrpState,
    /// Active_Adver_Interval: our own until one was heard.
    interval: Duration,
    /// When the advertisement timer (master) or the down timer (backup) fires; when a master that leaves lets go.
    deadline: Option<Duration>,
    leaving: bool,
    master: Option<IpAddr>,
    /// When an advertisement that loses was answered last.
    answered: Option<Duration>,
    /// When a master has spoken last.
    spoken: Duration,
}

impl Router {
    /// A router in state Init. `source` is its primary address on the interface.
    pub fn new(config: RouterConfig, source: IpAddr) -> Self {
        let interval = config.interval;
        Self {
            config,
            source,
            state: VrrpState::Init,
            interval,
            deadline: None,
            leaving: false,
            master: None,
            answered: None,
            spoken: Duration::ZERO,
        }
    }

    /// What it was told.
    pub fn config(&self) -> &RouterConfig {
        &self.config
    }

    /// Its state.
    pub fn state(&self) -> VrrpState {
        self.state
    }

    /// Its primary address.
    pub fn source(&self) -> IpAddr {
        self.source
    }

    /// Who is master as far as it has heard; `None` when it is itself, or nobody is known.
    pub fn master(&self) -> Option<IpAddr> {
        self.master
    }

    /// When [`Router::timeout`] is to be called.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// Startup (section 6.4.1).
    pub fn start(&mut self, now: Duration) -> Vec<Action> {
        if self.config.priority == 255 {
            return self.become_master(now);
        }
        self.become_backup(now, None)
    }

    /// A timer fired: nothing happens before its time.
    pub fn timeout(&mut self, now: Duration) -> Vec<Action> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        match self.state {
            _ if self.leaving => self.let_go(),
            VrrpState::Init => Vec::new(),
            // (section 6.4.2: the Active_Down_Timer fires)
            VrrpState::Backup => self.become_master(now),
            // (section 6.4.3: the Adver_Timer fires)
            VrrpState::Master => vec![self.advertise(now)],
        }
    }

    /// An accepted advertisement from another router.
    pub fn receive(&mut self, now: Duration, from: IpAddr, advert: &Advert) -> Vec<Action> {
        let interval = timers::from_centiseconds(advert.interval);
        match self.state {
            _ if self.leaving => {
                // Whoever sends a priority takes over; make before break ends here.
                if advert.priority > 0 { self.let_go() } else { Vec::new() }
            }
            VrrpState::Init => Vec::new(),
            VrrpState::Backup => {
                if advert.priority == 0 {
                    self.deadline = Some(now + timers::skew(self.config.priority, self.interval));
                    self.master = None;
                } else if self.config.preempt.is_none() || advert.priority >= self.config.priority {
                    self.follow(now, from, interval);
                }
                Vec::new()
            }
            VrrpState::Master => {
                if advert.priority == 0 {
                    vec![self.advertise(now)]
                } else if (advert.priority, from) > (self.config.priority, self.source)
                    || self.was_silent(now)
                {
                    let mut actions = self.become_backup(now, Some((from, interval)));
                    actions.insert(0, Action::Release(self.config.addresses.clone()));
                    actions
                } else {
                    self.answer(now)
                }
            }
        }
    }

    /// New settings for the same election. The state is kept; a master binds what is new and releases what is gone.
    pub fn configure(&mut self, now: Duration, config: RouterConfig) -> Vec<Action> {
        if config == self.config {
            return Vec::new();
        }
        let old = std::mem::replace(&mut self.config, config);
        if self.state == VrrpState::Backup && self.master.is_none() {
            // No master whose interval could have been learned: the new settings say how long to wait.
            let down = now + timers::down(self.config.priority, self.config.interval);
            self.interval = self.config.interval;
            self.deadline = self.deadline.map(|deadline| deadline.min(down));
        }
        if self.state != VrrpState::Master || self.leaving {
            return Vec::new();
        }
        let news = old.advert(old.priority) != self.config.advert(self.config.priority);
        let missing_in = |there: &[IpAddr], here: &[IpAddr]| -> Vec<IpAddr> {
            here.iter().filter(|address| !there.contains(address)).copied().collect()
        };
        let added = missing_in(&old.addresses, &self.config.addresses);
        let removed = missing_in(&self.config.addresses, &old.addresses);
        let mut actions = Vec::new();
        if news {
            actions.push(self.advertise(now));
        }
        if !added.is_empty() {
            actions.extend([Action::Bind(added.clone()), Action::Announce(added)]);
        }
        if !removed.is_empty() {
            actions.push(Action::Release(removed));
        }
        actions
    }

    /// Leaves by plan. A master gives up by priority 0 (section 6.4.3: Shutdown) but serves until its successor is heard.
    pub fn leave(&mut self, now: Duration) -> Vec<Action> {
        if self.leaving {
            return Vec::new();
        }
        if self.state != VrrpState::Master {
            return self.let_go();
        }
        self.leaving = true;
        self.deadline = Some(now + HANDOVER);
        vec![Action::Send(self.config.advert(0))]
    }

    /// Leaves at once, because it can serve no longer.
    pub fn stop(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.state == VrrpState::Master && !self.leaving {
            actions.push(Action::Send(self.config.advert(0)));
        }
        actions.extend(self.let_go());
        actions
    }

    fn let_go(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.state == VrrpState::Master {
            actions.push(Action::Release(self.config.addresses.clone()));
        }
        if self.state != VrrpState::Init {
            actions.push(Action::Enter(VrrpState::Init));
        }
        self.state = VrrpState::Init;
        self.deadline = None;
        self.master = None;
        actions.push(Action::Left);
        actions
    }

    fn become_master(&mut self, now: Duration) -> Vec<Action> {
        self.state = VrrpState::Master;
        self.master = None;
        self.answered = None;
        let addresses = self.config.addresses.clone();
        vec![
            Action::Enter(VrrpState::Master),
            self.advertise(now),
            Action::Bind(addresses.clone()),
            Action::Announce(addresses),
        ]
    }

    fn become_backup(&mut self, now: Duration, heard: Option<(IpAddr, Duration)>) -> Vec<Action> {
        self.state = VrrpState::Backup;
        match heard {
            Some((master, interval)) => self.follow(now, master, interval),
            None => {
                self.interval = self.config.interval;
                self.deadline = Some(now + timers::down(self.config.priority, self.interval));
            }
        }
        vec![Action::Enter(VrrpState::Backup)]
    }

    fn follow(&mut self, now: Duration, master: IpAddr, interval: Duration) {
        self.master = Some(master);
        self.interval = interval;
        self.deadline = Some(now + timers::down(self.config.priority, interval));
    }

    /// Another router believes that it is master and is wrong: it hears us at once, and so do those who believed it. Two
    /// that both answer would go on without end, so this is done at most four times in an interval.
    fn answer(&mut self, now: Duration) -> Vec<Action> {
        if self.answered.is_some_and(|last| now < last + self.config.interval / 4) {
            return Vec::new();
        }
        self.answered = Some(now);
        vec![self.advertise(now), Action::Announce(self.config.addresses.clone())]
    }

    fn advertise(&mut self, now: Duration) -> Action {
        self.spoken = now;
        self.deadline = Some(now + self.config.interval);
        Action::Send(self.config.advert(self.config.priority))
    }

    /// Whether this master was silent for so long (a paused process) that another one may be master by right. Then it
    /// gives way to whoever speaks, whatever the priorities: going on would move the addresses a second time.
    fn was_silent(&self, now: Duration) -> bool {
        now.saturating_sub(self.spoken) > self.config.interval * 3
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;
    use crate::vrrp::{Family, RouterId, packet::MAX_LISTED};

    const SECOND: Duration = Duration::from_secs(1);

    fn ip(last: u8) -> IpAddr {
        [10, 87, 0, last].into()
    }

    fn config(priority: u8, preempt: bool) -> RouterConfig {
        let id = RouterId { interface: "eth0".into(), family: Family::V4, vrid: 7 };
        RouterConfig {
            id,
            priority,
            interval: SECOND,
            preempt: preempt.then_some(Duration::ZERO),
            addresses: vec![ip(50)],
            fresh: BTreeSet::new(),
        }
    }

    fn backup(priority: u8, preempt: bool) -> Router {
        let mut router = Router::new(config(priority, preempt), ip(11));
        assert_eq!(router.start(Duration::ZERO), [Action::Enter(VrrpState::Backup)]);
        router
    }

    fn master(priority: u8) -> Router {
        let mut router = backup(priority, false);
        let at = router.next_deadline().unwrap();
        router.timeout(at);
        assert_eq!(router.state(), VrrpState::Master);
        router
    }

    fn heard(priority: u8, interval: u16) -> Advert {
        Advert { vrid: 7, priority, interval, addresses: vec![ip(50)] }
    }

    fn kinds(actions: &[Action]) -> Vec<String> {
        actions
            .iter()
            .map(|action| match action {
                Action::Enter(state) => format!("{state:?}"),
                Action::Send(advert) => format!("send {}", advert.priority),
                Action::Bind(_) => "bind".into(),
                Action::Announce(_) => "announce".into(),
                Action::Release(_) => "release".into(),
                Action::Left => "left".into(),
            })
            .collect()
    }

    #[test]
    fn silence_makes_a_master_after_the_down_interval() {
        for (interval, down) in [(SECOND, 3_609_375_000), (SECOND / 10, 360_937_500)] {
            let mut router = Router::new(RouterConfig { interval, ..config(100, false) }, ip(11));
            router.start(Duration::ZERO);
            let at = Duration::from_nanos(down);
            assert_eq!(router.next_deadline(), Some(at));
            assert_eq!(router.timeout(at - Duration::from_nanos(1)), []);
            assert_eq!(kinds(&router.timeout(at)), ["Master", "send 100", "bind", "announce"]);
            assert_eq!(router.next_deadline(), Some(at + interval));
        }
    }

    #[test]
    fn a_priority_of_255_is_master_at_once() {
        let mut router = Router::new(config(255, false), ip(11));
        assert_eq!(kinds(&router.start(Duration::ZERO)), ["Master", "send 255", "bind", "announce"]);
    }

    #[test]
    fn a_backup_and_what_it_hears() {
        // (priority heard, preempting, the timer's new time; none: not reset)
        let down = timers::down(100, SECOND);
        for (priority, preempt, expected) in [
            (0, false, Some(timers::skew(100, SECOND))),
            (0, true, Some(timers::skew(100, SECOND))),
            (99, true, None),
            (99, false, Some(down)),
            (100, true, Some(down)),
            (101, true, Some(down)),
        ] {
            let mut router = backup(100, preempt);
            assert_eq!(router.receive(SECOND, ip(9), &heard(priority, 100)), []);
            let expected = expected.map_or(down, |after| SECOND + after);
            assert_eq!(router.next_deadline(), Some(expected), "{priority} {preempt}");
        }
    }

    #[test]
    fn the_masters_interval_is_learned() {
        let mut router = backup(100, false);
        router.receive(SECOND, ip(9), &heard(200, 300));
        assert_eq!(router.next_deadline(), Some(SECOND + Duration::from_nanos(10_828_125_000)));
        router.receive(SECOND, ip(9), &heard(0, 300));
        assert_eq!(router.next_deadline(), Some(SECOND + timers::skew(100, SECOND * 3)));
    }

    #[test]
    fn a_master_and_what_it_hears() {
        for (from, priority, expected) in [
            (ip(9), 101, vec!["release", "Backup"]),
            (ip(12), 100, vec!["release", "Backup"]),
            (ip(9), 100, vec!["send 100", "announce"]),
            (ip(12), 99, vec!["send 100", "announce"]),
            (ip(12), 0, vec!["send 100"]),
        ] {
            let mut router = master(100);
            assert_eq!(
                kinds(&router.receive(SECOND * 4, from, &heard(priority, 100))),
                expected,
                "{from} {priority}"
            );
        }
    }

    #[test]
    fn a_master_that_was_silent_gives_way_to_whoever_speaks_and_goes_on_when_nobody_does() {
        let late = SECOND * 9;
        assert_eq!(kinds(&master(100).receive(late, ip(9), &heard(1, 100))), ["release", "Backup"]);
        assert_eq!(kinds(&master(100).timeout(late)), ["send 100"]);
        assert_eq!(kinds(&master(100).receive(late, ip(9), &heard(0, 100))), ["send 100"]);
    }

    #[test]
    fn a_backup_that_knows_no_master_waits_as_its_new_settings_say() {
        let mut router = Router::new(RouterConfig { interval: SECOND * 40, ..config(100, false) }, ip(11));
        router.start(Duration::ZERO);
        router.configure(SECOND, config(200, false));
        assert_eq!(router.next_deadline(), Some(SECOND + timers::down(200, SECOND)));
        router.receive(SECOND, ip(9), &heard(200, 300));
        router.configure(SECOND * 2, config(100, false));
        assert_eq!(router.next_deadline(), Some(SECOND + timers::down(200, SECOND * 3)));
    }

    #[test]
    fn two_that_both_answer_do_not_make_a_storm() {
        let mut router = master(100);
        let storm =
            (0..1000).map(|i| router.receive(SECOND * 5 + Duration::from_millis(i), ip(12), &heard(99, 100)));
        assert_eq!(storm.filter(|actions| !actions.is_empty()).count(), 4);
    }

    #[test]
    fn leaving_is_make_before_break() {
        let mut router = master(100);
        assert_eq!(kinds(&router.leave(SECOND * 5)), ["send 0"]);
        assert_eq!(router.leave(SECOND * 5), []);
        assert_eq!(router.receive(SECOND * 5, ip(12), &heard(0, 100)), []);
        assert_eq!(kinds(&router.receive(SECOND * 5, ip(12), &heard(99, 100))), ["release", "Init", "left"]);

        let mut alone = master(100);
        alone.leave(SECOND * 5);
        assert_eq!(alone.timeout(SECOND * 5 + SECOND / 2), []);
        assert_eq!(kinds(&alone.timeout(SECOND * 6)), ["release", "Init", "left"]);

        assert_eq!(kinds(&backup(100, false).leave(SECOND)), ["Init", "left"]);
        assert_eq!(kinds(&master(100).stop()), ["send 0", "release", "Init", "left"]);
    }

    #[test]
    fn a_master_keeps_its_state_when_its_addresses_change() {
        let mut router = master(100);
        let new = RouterConfig { addresses: vec![ip(51), ip(52)], ..config(100, false) };
        let actions = router.configure(SECOND * 5, new.clone());
        assert_eq!(kinds(&actions), ["send 100", "bind", "announce", "release"]);
        assert_eq!(actions[1], Action::Bind(vec![ip(51), ip(52)]));
        assert_eq!(actions[3], Action::Release(vec![ip(50)]));
        assert_eq!(router.configure(SECOND * 5, new.clone()), []);
        // What only this node has to know is no news for the others.
        assert_eq!(router.configure(SECOND * 5, RouterConfig { fresh: [ip(52)].into(), ..new }), []);
    }

    #[test]
    fn an_advertisement_lists_the_first_addresses() {
        let addresses: Vec<IpAddr> = (1..=100).map(ip).collect();
        let mut router = Router::new(RouterConfig { addresses, ..config(255, false) }, ip(200));
        let actions = router.start(Duration::ZERO);
        let Action::Send(advert) = &actions[1] else { panic!("{actions:?}") };
        assert_eq!(advert.addresses.len(), MAX_LISTED);
    }
}
