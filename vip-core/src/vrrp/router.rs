//! The state machine of one virtual router on one node (RFC 9568 section 6.4). It sleeps on nothing and sends nothing: the
//! time comes in as an argument (since any fixed moment, monotonic), what to do goes out as [`Action`]s.
//!
//! Who calls it hands over all packets that are queued before it calls [`Router::timeout`]: a process that was paused as a
//! master must hear first that it was replaced.

use std::net::IpAddr;
use std::time::Duration;

use super::packet::Advert;
use super::{Cause, RouterConfig, timers};
use crate::api::VrrpState;

/// How long a master that gives up goes on serving while it waits for its successor's first advertisement; longer where
/// the interval is, because the last in rank takes over nearly an interval after it has heard priority 0.
const HANDOVER: Duration = Duration::from_secs(1);
/// The same where the master stays if nobody wants what it offers. It is shorter, so that the reserve can tell an offer from a
/// goodbye and still take over before who leaves lets go.
const OFFER: Duration = Duration::from_millis(500);
/// How long one that leaves waits at most: its pod is given 15 s to end. At intervals over 8 s the last in rank come too late.
const LEAVING: Duration = Duration::from_secs(10);
/// How long one that is displaced serves at most while its successor has not announced the addresses, unless the interval is longer: to
/// bind hundreds takes longer than the shortest intervals, and on a busy node the kernel needs a while until it answers for one of IPv6.
const DISPLACED: Duration = Duration::from_millis(300);
/// Advertisements that may be missed before a master is taken for dead (RFC 9568 section 6.1: Active_Down_Interval).
const MISSED: u32 = 3;
/// How long a takeover counts as fresh: until then the endpoints on the lost node are suspected where nothing else tells.
const FRESH: Duration = Duration::from_secs(60);

/// What is to be done, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// The state has changed.
    Enter(VrrpState),
    /// Send an advertisement to the group.
    Send(Advert),
    /// Send an advertisement to one router alone.
    Tell(IpAddr, Advert),
    /// Bind addresses to the interface.
    Bind(Vec<IpAddr>),
    /// Announce bound addresses (gratuitous ARP, RFC 9568 section 6.4.2).
    Announce(Vec<IpAddr>),
    /// Take addresses off the interface.
    Release(Vec<IpAddr>),
    /// Another router has these addresses now, or is binding them: take each off when that router announces it, and all at
    /// a time. Until it is announced, who talks to it talks to us.
    Yield(Vec<IpAddr>, Duration),
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
    /// When the advertisement timer (master) or the down timer (backup) fires.
    deadline: Option<Duration>,
    /// Who spoke as master last.
    master: Option<IpAddr>,
    silence: Silence,
    /// What others offer is taken only once they are gone.
    reserve: bool,
    lower: Option<Lower>,
    handover: Option<Handover>,
    /// The master whose silence made this one master, and when.
    lost: Option<(IpAddr, Duration)>,
    cause: Option<Cause>,
    /// When an advertisement that loses was answered last.
    answered: Option<Duration>,
    /// When this master has spoken last.
    spoken: Duration,
}

/// What a backup's down timer is made of (RFC 9568 section 6.1): `missed` intervals of silence since a moment, and the
/// skew of its priority.
#[derive(Clone, Copy, Debug)]
struct Silence {
    since: Duration,
    missed: u32,
    /// Active_Adver_Interval: our own until one was heard.
    interval: Duration,
    /// When the master said first that it gives up; it says so again each interval for as long as it still serves.
    given: Option<Duration>,
    /// It began anew after a pause of our own.
    again: bool,
}

impl Silence {
    /// Nothing has been heard since a moment.
    fn since(since: Duration, missed: u32, interval: Duration) -> Self {
        Self { since, missed, interval, given: None, again: false }
    }
}

/// A living master of lower priority, which a preempting backup does not obey.
#[derive(Clone, Copy, Debug)]
struct Lower {
    priority: u8,
    heard: Duration,
    interval: Duration,
}

/// A master that gives up by priority 0 and goes on serving until its successor does.
#[derive(Clone, Copy, Debug)]
struct Handover {
    /// When it waits no longer.
    ends: Duration,
    /// Whether it then leaves, or goes on because nobody can do better.
    leaving: bool,
}

impl Router {
    /// A router in state Init. `source` is its primary address on the interface.
    pub fn new(config: RouterConfig, source: IpAddr) -> Self {
        let silence = Silence::since(Duration::ZERO, MISSED, config.interval);
        Self {
            config,
            source,
            state: VrrpState::Init,
            deadline: None,
            master: None,
            silence,
            reserve: false,
            lower: None,
            handover: None,
            lost: None,
            cause: None,
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

    /// The master whose silence made this one master less than a minute ago, if it was not heard since. One that said
    /// goodbye is not lost.
    pub fn lost(&self, now: Duration) -> Option<IpAddr> {
        self.lost.filter(|(_, since)| now < *since + FRESH).map(|(address, _)| address)
    }

    /// Why it is master, or was last.
    pub fn cause(&self) -> Option<Cause> {
        self.cause
    }

    /// When [`Router::timeout`] is to be called.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.deadline
    }

    /// Startup (section 6.4.1).
    pub fn start(&mut self, now: Duration) -> Vec<Action> {
        if self.config.priority == 255 {
            return self.become_master(now, Cause::Alone);
        }
        self.silence = Silence::since(now, MISSED, self.config.interval);
        self.state = VrrpState::Backup;
        self.deadline = Some(self.down());
        vec![Action::Enter(VrrpState::Backup)]
    }

    /// A timer fired: nothing happens before its time.
    pub fn timeout(&mut self, now: Duration) -> Vec<Action> {
        if self.deadline.is_none_or(|deadline| now < deadline) {
            return Vec::new();
        }
        match (self.state, self.handover) {
            (VrrpState::Init, _) => Vec::new(),
            (VrrpState::Backup, _) if self.has_slept(now) => {
                self.silence = Silence { since: now, again: true, ..self.silence };
                self.deadline = Some(self.down());
                Vec::new()
            }
            // (section 6.4.2: the Active_Down_Timer fires)
            (VrrpState::Backup, _) => {
                let lost = self.master.filter(|_| self.lower.is_none_or(|lower| now >= self.dead(lower)));
                let cause = match (lost, self.master) {
                    (Some(_), _) => Cause::Silence,
                    (None, Some(_)) => Cause::Preference,
                    // What said goodbye is waited for no longer.
                    (None, None) if self.silence.missed == 0 => Cause::Goodbye,
                    (None, None) => Cause::Alone,
                };
                let actions = self.become_master(now, cause);
                self.lost = lost.map(|master| (master, now));
                actions
            }
            (VrrpState::Master, Some(handover)) if now < handover.ends => self.give_up(now, handover),
            (VrrpState::Master, Some(Handover { leaving: true, .. })) => self.let_go(Action::Release),
            (VrrpState::Master, _) if self.may_be_replaced(now) => self.step_back(now),
            // (section 6.4.3: the Adver_Timer fires) And nobody took what was offered.
            (VrrpState::Master, _) => {
                self.handover = None;
                vec![self.advertise(now)]
            }
        }
    }

    /// An accepted advertisement from another router.
    pub fn receive(&mut self, now: Duration, from: IpAddr, advert: &Advert) -> Vec<Action> {
        self.lost = self.lost.filter(|(address, _)| *address != from);
        match (self.state, self.handover) {
            (VrrpState::Init, _) => Vec::new(),
            (VrrpState::Backup, _) => {
                self.listen(now, from, advert);
                Vec::new()
            }
            (VrrpState::Master, Some(_)) if advert.priority == 0 => Vec::new(),
            // Whoever sends a priority takes over; make before break ends with its announcements.
            (VrrpState::Master, Some(Handover { leaving, .. })) => {
                let until = now + HANDOVER;
                let release = |addresses| Action::Yield(addresses, until);
                match leaving {
                    true => self.let_go(release),
                    false => self.become_backup(now, from, advert, release),
                }
            }
            (VrrpState::Master, None) => self.defend(now, from, advert),
        }
    }

    /// A backup hears somebody (section 6.4.2).
    fn listen(&mut self, now: Duration, from: IpAddr, advert: &Advert) {
        if advert.priority == 0 {
            // One that was displaced says goodbye while the master that we follow lives: nobody is to take over.
            if self.master.is_none_or(|master| master == from) {
                self.master = None;
                self.lower = None;
                let given = self.silence.given.or(Some(now));
                self.silence = Silence { given, ..Silence::since(now, 0, self.silence.interval) };
                // Said twice, it must not take longer.
                let down = self.down();
                self.deadline = self.deadline.map(|at| if self.reserve { down } else { at.min(down) });
            }
            return;
        }
        self.master = Some(from);
        let interval = timers::from_centiseconds(advert.interval);
        if self.config.preempt.is_some() && advert.priority < self.config.priority {
            self.lower = Some(Lower { priority: advert.priority, heard: now, interval });
        } else {
            self.follow(now, interval);
        }
        self.deadline = Some(self.down());
    }

    /// A master hears somebody (section 6.4.3).
    fn defend(&mut self, now: Duration, from: IpAddr, advert: &Advert) -> Vec<Action> {
        if advert.priority == 0 {
            vec![self.advertise(now)]
        } else if self.was_silent(now) {
            self.become_backup(now, from, advert, Action::Release)
        } else if (advert.priority, from) > (self.config.priority, self.source) {
            // It may not have heard us so far, nor know that hosts believe us: a last word to nobody but it makes it announce
            // the addresses. Others would obey it.
            let last = Action::Tell(from, self.own_advert());
            let until = now + self.config.interval.clamp(DISPLACED, HANDOVER);
            let rest = self.become_backup(now, from, advert, |addresses| Action::Yield(addresses, until));
            [last].into_iter().chain(rest).collect()
        } else {
            self.cause = Some(Cause::Rank);
            self.answer(now, timers::from_centiseconds(advert.interval))
        }
    }

    /// New settings for the same election. The state is kept; a master binds what is new and releases what is gone, a
    /// backup counts as if it had had its new settings all the time.
    pub fn configure(&mut self, now: Duration, config: RouterConfig) -> Vec<Action> {
        if config == self.config {
            return Vec::new();
        }
        let old = std::mem::replace(&mut self.config, config);
        match self.state {
            VrrpState::Init => return Vec::new(),
            VrrpState::Backup => {
                self.wait_anew(now);
                return Vec::new();
            }
            VrrpState::Master => {}
        }
        let news = old.advert(old.priority, self.source) != self.own_advert();
        let missing_in = |there: &[IpAddr], here: &[IpAddr]| -> Vec<IpAddr> {
            here.iter().filter(|address| !there.contains(address)).copied().collect()
        };
        let added = missing_in(&old.addresses, &self.config.addresses);
        let removed = missing_in(&self.config.addresses, &old.addresses);
        let mut actions = Vec::new();
        // Who gives up has said its last word.
        if news && self.handover.is_none() {
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

    /// Whether this one takes what others offer only once they are gone: nothing is gained when it does so before, for it has as
    /// much reason to offer.
    pub fn hold_back(&mut self, reserve: bool) {
        self.reserve = reserve;
    }

    /// Leaves by plan. A master gives up by priority 0 (section 6.4.3: Shutdown) but serves until its successor does.
    pub fn leave(&mut self, now: Duration) -> Vec<Action> {
        match (self.state, &mut self.handover) {
            (VrrpState::Master, Some(handover)) => {
                handover.leaving = true;
                Vec::new()
            }
            (VrrpState::Master, None) => self.begin_handover(now, true),
            _ => self.let_go(Action::Release),
        }
    }

    /// Offers the addresses to whoever can serve them better. A master gives up by priority 0 and goes on as a backup when
    /// it hears a successor. When nobody speaks up it goes on as before. Who preempts takes back what it gave away, so it is
    /// to be configured not to.
    pub fn offer(&mut self, now: Duration) -> Vec<Action> {
        match (self.state, self.handover) {
            (VrrpState::Master, None) => self.begin_handover(now, false),
            _ => Vec::new(),
        }
    }

    /// Leaves at once, because it can serve no longer.
    pub fn stop(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.state == VrrpState::Master && self.handover.is_none() {
            actions.push(Action::Send(self.config.advert(0, self.source)));
        }
        actions.extend(self.let_go(Action::Release));
        actions
    }

    fn begin_handover(&mut self, now: Duration, leaving: bool) -> Vec<Action> {
        let interval = self.config.interval;
        let ends = now + if leaving { self::leaving(interval) } else { lasting(OFFER, interval) };
        let handover = Handover { ends, leaving };
        self.handover = Some(handover);
        self.give_up(now, handover)
    }

    /// Priority 0, again each interval: who has heard it has taken over by then, who has not is told once more.
    fn give_up(&mut self, now: Duration, handover: Handover) -> Vec<Action> {
        self.deadline = Some(handover.ends.min(now + self.config.interval));
        vec![Action::Send(self.config.advert(0, self.source))]
    }

    fn let_go(&mut self, release: impl FnOnce(Vec<IpAddr>) -> Action) -> Vec<Action> {
        let mut actions = Vec::new();
        if self.state == VrrpState::Master {
            actions.push(release(self.config.addresses.clone()));
        }
        if self.state != VrrpState::Init {
            actions.push(Action::Enter(VrrpState::Init));
        }
        self.state = VrrpState::Init;
        self.deadline = None;
        self.master = None;
        self.handover = None;
        self.lost = None;
        actions.push(Action::Left);
        actions
    }

    fn become_master(&mut self, now: Duration, cause: Cause) -> Vec<Action> {
        self.state = VrrpState::Master;
        self.master = None;
        self.lower = None;
        self.answered = None;
        self.cause = Some(cause);
        let addresses = self.config.addresses.clone();
        vec![
            Action::Enter(VrrpState::Master),
            self.advertise(now),
            Action::Bind(addresses.clone()),
            Action::Announce(addresses),
        ]
    }

    /// A master gives way.
    fn become_backup(
        &mut self,
        now: Duration,
        from: IpAddr,
        advert: &Advert,
        release: impl FnOnce(Vec<IpAddr>) -> Action,
    ) -> Vec<Action> {
        self.state = VrrpState::Backup;
        self.handover = None;
        self.lost = None;
        self.master = Some(from);
        self.follow(now, timers::from_centiseconds(advert.interval));
        self.deadline = Some(self.down());
        vec![release(self.config.addresses.clone()), Action::Enter(VrrpState::Backup)]
    }

    /// A master that may have been replaced listens before it speaks, for two intervals: what its successor has said so far
    /// may not have found room in the queue, and one of the next two advertisements may be lost.
    fn step_back(&mut self, now: Duration) -> Vec<Action> {
        self.state = VrrpState::Backup;
        self.handover = None;
        self.lost = None;
        self.silence = Silence::since(now, 2, self.config.interval);
        self.deadline = Some(self.down());
        vec![Action::Release(self.config.addresses.clone()), Action::Enter(VrrpState::Backup)]
    }

    /// A master is obeyed: its interval is learned, the down timer begins anew.
    fn follow(&mut self, heard: Duration, interval: Duration) {
        self.lower = None;
        self.silence = Silence::since(heard, MISSED, interval);
    }

    /// When a backup takes over. One that preempts waits for the delay too while a lower master is heard, and until that
    /// one is dead at most.
    fn down(&self) -> Duration {
        let Silence { since, missed, interval, given, .. } = self.silence;
        let skew = timers::skew(self.config.priority, interval);
        if let Some(given) = given.filter(|_| self.reserve) {
            // It was no offer when it lasts for longer than one, nor when it is not repeated.
            return (given + lasting(OFFER, interval)).min(since + interval * MISSED) + skew;
        }
        let down = since + interval * missed + skew;
        match (self.config.preempt, self.lower) {
            (Some(delay), Some(lower)) => self.dead(lower).clamp(down, down + delay),
            _ => down,
        }
    }

    /// When a lower master counts as dead.
    fn dead(&self, lower: Lower) -> Duration {
        lower.heard + timers::down(self.config.priority, lower.interval)
    }

    /// A backup's settings have changed.
    fn wait_anew(&mut self, now: Duration) {
        if let Some(lower) = self.lower
            && (self.config.preempt.is_none() || lower.priority >= self.config.priority)
        {
            self.follow(lower.heard, lower.interval);
        }
        if self.master.is_some() {
            self.deadline = Some(self.down());
            return;
        }
        // Nobody's interval could have been learned: the new settings say how long to wait, but never longer than before.
        if self.silence.interval != self.config.interval {
            self.silence = Silence { since: now, interval: self.config.interval, ..self.silence };
        }
        self.deadline = self.deadline.map(|deadline| deadline.min(self.down()));
    }

    /// Another router believes that it is master and is wrong: it hears us at once, and so do those who believed it. Two
    /// that both answer would go on without end, so this is done at most four times in an interval, the shorter of both.
    fn answer(&mut self, now: Duration, interval: Duration) -> Vec<Action> {
        let pause = self.config.interval.min(interval) / 4;
        if self.answered.is_some_and(|last| now < last + pause) {
            return Vec::new();
        }
        self.answered = Some(now);
        vec![self.advertise(now), Action::Announce(self.config.addresses.clone())]
    }

    fn advertise(&mut self, now: Duration) -> Action {
        self.spoken = now;
        self.deadline = Some(now + self.config.interval);
        Action::Send(self.own_advert())
    }

    fn own_advert(&self) -> Advert {
        self.config.advert(self.config.priority, self.source)
    }

    /// Whether this master was silent for so long (a paused process) that another one may be master by right, or that its
    /// addresses were released by the agent in its place. Then it gives way to whoever speaks, whatever the priorities:
    /// going on would move the addresses a second time.
    fn was_silent(&self, now: Duration) -> bool {
        now.saturating_sub(self.spoken) > self.config.interval * 2
    }

    /// Whether this backup was late itself (a paused process), so that the silence may be its own: where all nodes were paused, as
    /// virtual machines on one host are, the master lives and is about to speak. One listens anew once in a silence.
    fn has_slept(&self, now: Duration) -> bool {
        let late = self.deadline.is_some_and(|due| now.saturating_sub(due) >= self.silence.interval / 2);
        late && self.master.is_some() && self.lower.is_none() && !self.silence.again
    }

    /// Whether the advertisement that is due now comes so late that the others have missed as many as it takes. Before that
    /// nobody can have taken over, and to hold back would make them.
    fn may_be_replaced(&self, now: Duration) -> bool {
        self.deadline.is_some_and(|due| now.saturating_sub(due) >= self.config.interval * (MISSED - 1))
    }
}

/// How long a master that leaves serves at most while it waits for its successor.
pub fn leaving(interval: Duration) -> Duration {
    lasting(HANDOVER, interval).min(LEAVING)
}

/// How long a master waits for its successor, which may be the last in rank.
fn lasting(least: Duration, interval: Duration) -> Duration {
    least.max(interval * 5 / 4)
}

#[cfg(test)]
mod cases;
#[cfg(test)]
mod tests;
