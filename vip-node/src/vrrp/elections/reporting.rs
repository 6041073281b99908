//! What the agent is told, and when: the whole state when it has changed, a sign of life always.

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;
use std::time::Duration;

use vip_core::api::VrrpState;
use vip_core::vrrp::RouterId;

use super::Elections;
use crate::link::{Interface, Report, RouterReport};

/// A report is made at least this often: what was heard is forgotten with time.
const REPEAT: Duration = Duration::from_secs(10);
/// Reports are not made more often than this, ...
const SPACING: Duration = Duration::from_millis(5);
/// ... and for the sake of a counter not more often than this.
const PATIENCE: Duration = Duration::from_millis(500);
/// The longest and the shortest time between two signs of life.
const BEAT: Duration = Duration::from_millis(500);
const BEAT_MIN: Duration = Duration::from_millis(5);

/// Whether there is something to report.
#[derive(Debug, Default)]
pub(super) struct News {
    now: bool,
    later: Option<Duration>,
    /// When the last report was made.
    told: Option<Duration>,
}

impl News {
    /// Something has changed.
    pub(super) fn now(&mut self) {
        self.now = true;
    }

    /// A counter has changed.
    pub(super) fn later(&mut self, now: Duration) {
        self.later.get_or_insert(now + PATIENCE);
    }

    /// When the next report is due.
    fn due(&self) -> Duration {
        let Some(told) = self.told else { return Duration::ZERO };
        let repeat = told + REPEAT;
        let later = self.later.map_or(repeat, |later| later.min(repeat));
        if self.now { told + SPACING } else { later.max(told + SPACING) }
    }

    fn tell(&mut self, now: Duration) {
        *self = Self { told: Some(now), ..Self::default() };
    }
}

impl Elections {
    /// When [`Elections::report`] has something.
    pub fn report_due(&self) -> Duration {
        self.news.due()
    }

    /// How often a sign of life is to be given: twice in the shortest advertisement interval of those where this node is
    /// master. Who owns nothing can do no harm by hanging.
    pub fn beat(&self) -> Duration {
        let routers = self.running.values().map(|running| &running.router);
        let masters = routers.filter(|router| router.state() == VrrpState::Master);
        masters.map(|router| router.config().interval / 2).min().unwrap_or(BEAT).clamp(BEAT_MIN, BEAT)
    }

    /// What the agent is told.
    pub fn report(&mut self) -> Report {
        let now = self.now();
        self.news.tell(now);
        let mut bound: BTreeMap<&RouterId, Vec<IpAddr>> = BTreeMap::new();
        for ((_, address), id) in self.bindings.all().chain(self.bindings.handed()) {
            bound.entry(id).or_default().push(address);
        }
        let all: BTreeSet<&IpAddr> = bound.values().flatten().collect();
        let interfaces = self.network.nics().map(|nic| Interface {
            name: nic.name.clone(),
            mac: nic.mac,
            addresses: nic.addresses.iter().filter(|net| !all.contains(&net.addr())).copied().collect(),
            carrier: nic.carrier,
            mtu: nic.mtu,
        });
        let ids: BTreeSet<&RouterId> =
            self.ordered.keys().chain(self.running.keys()).chain(bound.keys().copied()).collect();
        let routers = ids.into_iter().map(|id| {
            let router = self.running.get(id).map(|running| &running.router);
            RouterReport {
                id: id.clone(),
                state: router.map_or(VrrpState::Init, |router| router.state()),
                priority: router
                    .map(|router| router.config())
                    .or(self.ordered.get(id))
                    .map_or(0, |config| config.priority),
                source: router.map(|router| router.source()),
                master: router.and_then(|router| router.master()),
                cause: router.and_then(|router| router.cause()),
                lost: router.and_then(|router| router.lost(now)),
                rival: self.running.get(id).and_then(|running| running.rival(now)),
                bound: bound.get(id).cloned().unwrap_or_default(),
                trouble: self.troubles.get(id).cloned(),
            }
        });
        Report {
            interfaces: interfaces.collect(),
            routers: routers.collect(),
            peers: self.heard.peers(now),
            foreign: self.heard.foreign(now),
            claims: self.claims.report(now),
            refused: self.heard.refused(),
            repaired: self.repaired.clone(),
            untaken: self.untaken.clone(),
            stopping: self.stopping,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn changes_are_told_at_once_and_counters_in_time() {
        let at = Duration::from_millis;
        let mut news = News::default();
        assert_eq!(news.due(), Duration::ZERO, "the first one");
        news.tell(at(1000));
        assert_eq!(news.due(), at(11_000));
        news.later(at(2000));
        news.later(at(2400));
        assert_eq!(news.due(), at(2500));
        news.now();
        assert_eq!(news.due(), at(1005));
        news.tell(at(2100));
        assert_eq!(news.due(), at(12_100));
    }
}
