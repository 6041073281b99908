//! What to believe of an API server that was away. While it is away nobody can renew its Node, and once it is back the control
//! plane calls the nodes, and with them every endpoint in the cluster, not ready, until each kubelet was heard again: some
//! seconds in which no Service would have a backend, though nothing has happened to any of them.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use tokio::sync::watch;
use tracing::{info, warn};
use vip_core::api::{RENEW_SECONDS, ServiceRef};

/// An API server that has not answered for this long is away: each agent has something to write every [`RENEW_SECONDS`].
/// Kubernetes waits for twice as long before it calls a node not ready.
const AWAY: Duration = Duration::from_secs(2 * RENEW_SECONDS);
/// How long after its return an endpoint is still ready that was so before. A kubelet speaks every ten seconds, and within a
/// minute where its connection has to end first.
const GRACE: Duration = Duration::from_secs(60);

/// Holds endpoints ready that an API server which was away calls not ready.
pub struct Trust {
    /// When the API server answered last; `None`: not yet.
    heard: watch::Receiver<Option<Instant>>,
    /// Until then it is not believed that an endpoint is not ready.
    until: Option<Instant>,
    /// Services of which something else is believed than was said.
    held: BTreeSet<ServiceRef>,
}

impl Trust {
    /// Believes everything, as long as there are answers.
    pub fn new(heard: watch::Receiver<Option<Instant>>) -> Self {
        Self { heard, until: None, held: BTreeSet::new() }
    }

    /// An agent starts, and the last word of this node that the API server has is from that time; whether it may have been away.
    pub fn begin(&mut self, written: &Time, today: &Time, now: Instant) -> bool {
        let away = Duration::try_from(today.0.duration_since(written.0)).is_ok_and(|since| since > AWAY);
        if away {
            self.doubt(now);
        }
        away
    }

    /// This node goes on from what it remembers, for the API server does not answer.
    pub fn doubt(&mut self, now: Instant) {
        self.until = Some(now + GRACE);
    }

    /// To be asked before others; the Services that are to be read again, because what was said of them counts from now on.
    pub fn review(&mut self, now: Instant) -> BTreeSet<ServiceRef> {
        if self.heard.borrow().is_some_and(|at| now.duration_since(at) > AWAY) {
            self.doubt(now);
        }
        if self.until.is_none_or(|until| now < until) {
            return BTreeSet::new();
        }
        self.until = None;
        if !self.held.is_empty() {
            info!("endpoints that were held ready after the API server's return are what it says again");
        }
        std::mem::take(&mut self.held)
    }

    /// Puts what is believed of a Service's slices in the place of what was said.
    pub fn judge(
        &mut self,
        service: &ServiceRef,
        before: &[Arc<EndpointSlice>],
        said: &mut [Arc<EndpointSlice>],
        now: Instant,
    ) {
        if self.until.is_none_or(|until| now >= until) {
            return;
        }
        for slice in said {
            let old = before.iter().find(|old| old.metadata.name == slice.metadata.name);
            if let Some(believed) = old.and_then(|old| hold(old, slice)) {
                *slice = believed;
                if self.held.is_empty() {
                    warn!(
                        "the API server was away and now calls endpoints not ready that were: they are held ready for {GRACE:?} at most"
                    );
                }
                self.held.insert(service.clone());
            }
        }
    }
}

/// A slice whose endpoints are as ready as they were, if that makes a difference. What ends, ends.
fn hold(before: &EndpointSlice, said: &EndpointSlice) -> Option<Arc<EndpointSlice>> {
    let is_ready = |endpoint: &Endpoint| endpoint.conditions.as_ref().is_none_or(|c| c.ready != Some(false));
    let uid = |endpoint: &Endpoint| endpoint.target_ref.as_ref().and_then(|target| target.uid.clone());
    let mut believed = said.clone();
    let mut differs = false;
    for endpoint in believed.endpoints.iter_mut().filter(|endpoint| !is_ready(endpoint)) {
        if endpoint.conditions.as_ref().is_some_and(|conditions| conditions.terminating == Some(true)) {
            continue;
        }
        let old = before
            .endpoints
            .iter()
            .find(|old| is_ready(old) && old.addresses == endpoint.addresses && uid(old) == uid(endpoint));
        if let Some(old) = old {
            endpoint.conditions.clone_from(&old.conditions);
            differs = true;
        }
    }
    differs.then(|| Arc::new(believed))
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    /// Endpoints by their last number; r: ready, t: terminating, the last letter: which pod it is.
    fn slice(name: &str, endpoints: &[(u8, &str)]) -> Arc<EndpointSlice> {
        let endpoints: Vec<_> = endpoints
            .iter()
            .map(|(n, word)| {
                json!({"addresses": [format!("10.244.1.{n}")],
                    "conditions": {"ready": word.contains('r'), "terminating": word.contains('t')},
                    "targetRef": {"uid": word.chars().last().map(String::from)}})
            })
            .collect();
        let text = json!({"metadata": {"namespace": "shop", "name": name}, "addressType": "IPv4",
            "endpoints": endpoints});
        Arc::new(serde_json::from_value(text).unwrap())
    }

    fn ready(slice: &EndpointSlice) -> Vec<bool> {
        slice.endpoints.iter().map(|e| e.conditions.as_ref().unwrap().ready.unwrap()).collect()
    }

    #[test]
    fn after_an_absence_what_was_ready_is_so_for_a_minute() {
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let (answers, heard) = watch::channel(Some(at(0)));
        let mut trust = Trust::new(heard);
        let service = ServiceRef { namespace: "shop".into(), name: "web".into() };
        let good = slice("web", &[(1, "ra"), (2, "ra"), (3, "ra"), (4, "xa"), (5, "ra")]);
        let mut believed: Vec<Arc<EndpointSlice>> = Vec::new();
        // What is believed, and how many Services are to be read again.
        let mut look = |said: &Arc<EndpointSlice>, seconds| {
            let again = trust.review(at(seconds)).len();
            let mut now = vec![slice("api", &[]), said.clone()];
            trust.judge(&service, &believed, &mut now, at(seconds));
            believed.clone_from(&now);
            (now[1].clone(), again)
        };
        // While it answers, it is believed.
        let (now, _) = look(&good, 15);
        assert!(Arc::ptr_eq(&now, &good));
        // It was away for long; then one pod ends, one is another with the same address, one was never ready.
        look(&good, 40);
        let bad = slice("web", &[(1, "xa"), (2, "ta"), (3, "xb"), (4, "xa"), (5, "ra")]);
        answers.send_replace(Some(at(45)));
        assert_eq!(ready(&look(&bad, 46).0), [true, false, false, false, true]);
        answers.send_replace(Some(at(56)));
        let worse = slice("web", &[(1, "xa"), (5, "xa")]);
        assert_eq!(ready(&look(&worse, 58).0), [true, true]);
        answers.send_replace(Some(at(95)));
        let (now, again) = look(&worse, 99);
        assert_eq!((ready(&now), again), (vec![true, true], 0));
        let (now, again) = look(&worse, 101);
        assert!(Arc::ptr_eq(&now, &worse));
        assert_eq!((again, trust.review(at(102)).len()), (1, 0));
    }

    #[test]
    fn what_was_not_written_of_for_long_is_doubted_at_the_start() {
        let time = |text: &str| Time(text.parse().unwrap());
        let written = time("2026-01-01T00:00:00Z");
        let (_answers, heard) = watch::channel(None);
        let mut trust = Trust::new(heard);
        for believed in ["2026-01-01T00:00:20Z", "2025-12-31T23:00:00Z"] {
            assert!(!trust.begin(&written, &time(believed), Instant::now()), "{believed}");
        }
        assert!(trust.until.is_none());
        assert!(trust.begin(&written, &time("2026-01-01T00:00:21Z"), Instant::now()));
        assert!(trust.until.is_some());
    }
}
