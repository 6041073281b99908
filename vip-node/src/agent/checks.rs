//! Makes the probes that [`Checks`] asks for: TCP connections straight to the backends, each a task of its own, so that
//! nobody waits for one.

use std::collections::hash_map::RandomState;
use std::collections::{BTreeMap, BTreeSet};
use std::hash::{BuildHasher, Hasher};
use std::io;
use std::time::{Duration, Instant};

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use kube::ResourceExt;
use nix::errno::Errno;
use tokio::net::TcpStream;
use tokio::task::{AbortHandle, JoinSet};
use tokio::time::{sleep, timeout};
use tracing::{info, warn};
use vip_core::checks::{Checks, Outcome, Probe, Verdict};
use vip_core::desired::Desired;
use vip_core::plan::Tables;
use vip_core::vrrp::Lan;

use super::view::View;
use crate::link::Report;

/// The checks of this node, and the probes that are under way.
pub struct Checker {
    epoch: Instant,
    checks: Checks,
    probes: JoinSet<(Probe, io::Result<()>)>,
    running: BTreeMap<u64, (Probe, AbortHandle)>,
    /// The nodes whose silence was noted, and when each had renewed its VIPNode by then.
    silent: BTreeMap<String, Option<Time>>,
}

impl Checker {
    /// Checks nothing yet.
    pub fn new() -> Self {
        Self {
            epoch: Instant::now(),
            checks: Checks::new(RandomState::new().build_hasher().finish()),
            probes: JoinSet::new(),
            running: BTreeMap::new(),
            silent: BTreeMap::new(),
        }
    }

    /// Goes on with the probes until a verdict has changed. May be dropped and called anew.
    pub async fn changed(&mut self) {
        loop {
            let now = self.epoch.elapsed();
            for probe in self.checks.start(now) {
                let task = self.probes.spawn(async move { (probe, connect(probe).await) });
                self.running.insert(probe.ticket, (probe, task));
            }
            let pause = self.checks.next_deadline().map(|at| at.saturating_sub(now));
            tokio::select! {
                Some(ended) = self.probes.join_next() => {
                    // What was aborted has no outcome.
                    let Ok((probe, result)) = ended else { continue };
                    if self.note(&probe, result) {
                        return;
                    }
                }
                () = sleep(pause.unwrap_or(Duration::MAX)), if pause.is_some() => {}
                else => std::future::pending().await,
            }
        }
    }

    /// Suspects what an earlier process has found failing, by what it has left in the kernel.
    pub fn recall(&mut self, found: &Tables, desired: &Desired) {
        self.checks.recall(found, &desired.tables);
    }

    /// What is held of the backends.
    pub fn checks(&self) -> &Checks {
        &self.checks
    }

    /// Brings the checks in line with what this node owns, and what they found into what it desires.
    pub fn turn(&mut self, view: &View, lan: &Lan, report: Option<&Report>, desired: &mut Desired) {
        let routers = report.map(|report| report.routers.as_slice()).unwrap_or_default();
        let lost: BTreeSet<&str> = routers
            .iter()
            .filter_map(|router| router.lost)
            .filter_map(|address| lan.peer(address))
            .map(|peer| peer.node.as_str())
            .collect();
        self.follow_silence(&lost, view);
        let owned = report.map(Report::bound).unwrap_or_default();
        self.checks.want(self.epoch.elapsed(), &Checks::wanted(desired, &owned));
        self.running.retain(|_, (probe, task)| {
            let awaited = self.checks.awaits(probe);
            if !awaited {
                task.abort();
            }
            awaited
        });
        self.checks.apply(desired, &owned);
    }

    /// Suspects the endpoints of a node that fell silent, until it is heard again: by its advertisements or by its VIPNode.
    fn follow_silence(&mut self, lost: &BTreeSet<&str>, view: &View) {
        let renewed = |node: &str| {
            let object = view.nodes.iter().find(|object| object.name_any() == node)?;
            object.status.as_ref()?.renew_time.clone()
        };
        self.silent.retain(|node, _| lost.contains(node.as_str()));
        for node in lost {
            if !self.silent.contains_key(*node) {
                let pods = view.objects.endpoints_on(node);
                info!(
                    node,
                    endpoints = pods.len(),
                    "took over from a node that fell silent: its endpoints are suspected"
                );
                self.silent.insert((*node).to_owned(), renewed(node));
                self.checks.suspect(node, pods);
            }
        }
        let silent = &self.silent;
        self.checks.suspect_only(|node| silent.get(node).is_some_and(|before| *before == renewed(node)));
    }

    /// Takes a result, and says whether it changes anything.
    fn note(&mut self, probe: &Probe, result: io::Result<()>) -> bool {
        self.running.remove(&probe.ticket);
        let outcome = match &result {
            Ok(()) => Outcome::Answered,
            Err(error) if is_ours(error) => Outcome::Untold,
            Err(_) => Outcome::Failed,
        };
        let verdict = self.checks.finish(self.epoch.elapsed(), probe, outcome);
        match (verdict, result) {
            (Some(Verdict::Healthy), _) => info!(backend = %probe.to, "the backend passes its check again"),
            (Some(_), Err(error)) => warn!(backend = %probe.to, %error, "the backend fails its check"),
            _ => {}
        }
        verdict.is_some()
    }
}

async fn connect(probe: Probe) -> io::Result<()> {
    match timeout(probe.timeout, TcpStream::connect(probe.to)).await {
        // Closed by a reset: one that is closed in peace stays in conntrack for two minutes, and there are many.
        Ok(result) => result?.set_zero_linger(),
        Err(_) => {
            Err(io::Error::new(io::ErrorKind::TimedOut, format!("no answer within {:?}", probe.timeout)))
        }
    }
}

/// Whether an error says nothing of the backend: this node lacks what it takes to connect.
fn is_ours(error: &io::Error) -> bool {
    let Some(number) = error.raw_os_error() else { return false };
    let lacking =
        [Errno::EMFILE, Errno::ENFILE, Errno::ENOBUFS, Errno::ENOMEM, Errno::EADDRNOTAVAIL, Errno::EPERM];
    lacking.contains(&Errno::from_raw(number))
}

#[cfg(test)]
mod tests {
    use std::io::Read;
    use std::net::{SocketAddr, TcpListener};

    use vip_core::checks::Settings;
    use vip_core::plan::Protocol;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn a_probe_leaves_no_connection_behind() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let probe = Probe { to: listener.local_addr().unwrap(), timeout: Duration::from_secs(5), ticket: 1 };
        connect(probe).await.unwrap();
        let (mut stream, _) = listener.accept().unwrap();
        assert_eq!(stream.read(&mut [0]).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
    }

    #[tokio::test(flavor = "current_thread")]
    async fn connections_tell_who_answers() {
        let listen = |address: &str| TcpListener::bind(address).unwrap();
        let (four, six, shut) = (listen("127.0.0.1:0"), listen("[::1]:0"), listen("127.0.0.1:0"));
        let address = |listener: &TcpListener| listener.local_addr().unwrap();
        let (good, shut_at) = ([address(&four), address(&six)], address(&shut));
        let interval = Duration::from_millis(100);
        let settings = Settings { interval, timeout: interval, failures: 2, successes: 1 };
        let wanted = |all: &[SocketAddr]| all.iter().map(|to| (*to, settings)).collect::<BTreeMap<_, _>>();

        let mut checker = Checker::new();
        checker.checks.want(Duration::ZERO, &wanted(&[good[0], good[1], shut_at]));
        // No probe tells of a good one: its verdict stands.
        assert!(timeout(interval * 3, checker.changed()).await.is_err());
        drop(shut);
        checker.changed().await;
        assert_eq!(checker.checks.verdict(Protocol::Tcp, shut_at), Verdict::Failing);
        let back = TcpListener::bind(shut_at).unwrap();
        checker.changed().await;
        drop(back);
        for to in [good[0], good[1], shut_at] {
            assert_eq!(checker.checks.verdict(Protocol::Tcp, to), Verdict::Healthy, "{to}");
        }
    }
}
