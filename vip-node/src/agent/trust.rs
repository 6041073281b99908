//! What to believe of an API server that was away. While it is away nobody can renew its Node, and once it is back the control
//! plane calls the nodes, and with them every endpoint in the cluster, not ready, until each kubelet was heard again: some
//! seconds in which no Service would have a backend, though nothing has happened to any of them.

use std::sync::Arc;
use std::time::{Duration, Instant};

use k8s_openapi::api::discovery::v1::{Endpoint, EndpointSlice};
use tokio::sync::watch;
use tracing::{info, warn};
use vip_core::api::RENEW_SECONDS;

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
    /// What it said, and what is believed instead.
    held: Vec<(Arc<EndpointSlice>, Arc<EndpointSlice>)>,
}

impl Trust {
    /// Believes everything, as long as there are answers.
    pub fn new(heard: watch::Receiver<Option<Instant>>) -> Self {
        Self { heard, until: None, held: Vec::new() }
    }

    /// This node goes on from what it remembers, for the API server does not answer.
    pub fn doubt(&mut self, now: Instant) {
        self.until = Some(now + GRACE);
    }

    /// Puts what is believed in the place of what the API server says. Both are in the order of their names; `before` is what
    /// was believed last.
    pub fn review(&mut self, before: &[Arc<EndpointSlice>], said: &mut [Arc<EndpointSlice>], now: Instant) {
        if self.heard.borrow().is_some_and(|at| now.duration_since(at) > AWAY) {
            self.doubt(now);
        }
        if self.until.is_none_or(|until| now >= until) {
            self.until = None;
            if !self.held.is_empty() {
                info!("endpoints that were held ready after the API server's return are what it says again");
                self.held.clear();
            }
            return;
        }
        let known = self.held.len();
        let held = std::mem::take(&mut self.held);
        let mut before = before.iter().peekable();
        for slice in said {
            while before.next_if(|old| name(old) < name(slice)).is_some() {}
            let old = before.next_if(|old| name(old) == name(slice));
            let believed = match held.iter().find(|(said, _)| Arc::ptr_eq(said, slice)) {
                Some((_, believed)) => Some(believed.clone()),
                None => old.and_then(|old| hold(old, slice)),
            };
            if let Some(believed) = believed {
                self.held.push((std::mem::replace(slice, believed.clone()), believed));
            }
        }
        if known == 0 && !self.held.is_empty() {
            warn!(
                "the API server was away and now calls endpoints not ready that were: they are held ready for {GRACE:?} at most"
            );
        }
    }
}

fn name(slice: &EndpointSlice) -> (Option<&str>, Option<&str>) {
    (slice.metadata.namespace.as_deref(), slice.metadata.name.as_deref())
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
        let other = slice("api", &[(9, "ra")]);
        let good = slice("web", &[(1, "ra"), (2, "ra"), (3, "ra"), (4, "xa"), (5, "ra")]);
        let mut believed = Vec::new();
        let mut look = |said: &[&Arc<EndpointSlice>], seconds| {
            let mut now: Vec<_> = said.iter().map(|slice| Arc::clone(slice)).collect();
            trust.review(&believed, &mut now, at(seconds));
            believed = now;
            believed.clone()
        };
        // While it answers, it is believed.
        assert!(Arc::ptr_eq(&look(&[&other, &good], 15)[1], &good));
        // It was away for long; then one pod ends, one is another with the same address, one was never ready.
        look(&[&other, &good], 40);
        let bad = slice("web", &[(1, "xa"), (2, "ta"), (3, "xb"), (4, "xa"), (5, "ra")]);
        answers.send_replace(Some(at(45)));
        let now = look(&[&other, &bad], 46);
        assert_eq!(ready(&now[1]), [true, false, false, false, true]);
        assert!(Arc::ptr_eq(&now[0], &other));
        // The same answer gives the same objects, and a newer one starts from what is believed.
        answers.send_replace(Some(at(56)));
        assert!(Arc::ptr_eq(&look(&[&other, &bad], 57)[1], &now[1]));
        let worse = slice("web", &[(1, "xa"), (5, "xa")]);
        assert_eq!(ready(&look(&[&worse], 58)[0]), [true, true]);
        answers.send_replace(Some(at(95)));
        assert_eq!(ready(&look(&[&worse], 99)[0]), [true, true]);
        assert!(Arc::ptr_eq(&look(&[&worse], 101)[0], &worse));
    }
}
