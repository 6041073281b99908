//! A client that goes on asking, and what it saw.
//!
//! One thread keeps the beat, many wait for answers: a request that hangs does not delay the next one.

use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread::{self, JoinHandle},
    time::{Duration, Instant},
};

use anyhow::{Result, anyhow};

use super::{Response, Target};
use crate::{command, netns::Netns};

/// A client that is asking.
#[derive(Debug)]
pub struct Watch {
    stop: Arc<AtomicBool>,
    seen: Arc<Mutex<Seen>>,
    beat: Option<JoinHandle<()>>,
}

/// What a client saw.
#[derive(Clone, Debug, Default)]
pub struct Report {
    /// How many requests it made.
    pub requests: usize,
    /// How many had no answer, or a status that is not 200.
    pub failures: usize,
    /// The longest time from one answer to the next; the start and the end of the watch count as answers.
    pub longest_gap: Duration,
    /// How often each answer came.
    pub by_answer: BTreeMap<String, usize>,
    /// How often each kind of failure came.
    pub by_failure: BTreeMap<String, usize>,
}

impl Report {
    /// How many requests may fail because the owner changed: those made in the longest gap, and those under way before it.
    pub fn bearable(&self, every: Duration) -> usize {
        usize::try_from(self.longest_gap.as_millis() / every.as_millis().max(1)).unwrap_or(usize::MAX - 2) + 2
    }
}

#[derive(Debug)]
struct Seen {
    requests: usize,
    answers: Vec<Instant>,
    by_answer: BTreeMap<String, usize>,
    by_failure: BTreeMap<String, usize>,
    start: Instant,
}

impl Watch {
    pub(super) fn start(
        netns: Option<Netns>,
        target: Target,
        every: Duration,
        limit: Duration,
    ) -> Result<Self> {
        let (seen, stop) = (Seen::new(), Arc::new(AtomicBool::new(false)));
        // As many as can be waiting at once, and a few more.
        let count = usize::try_from(limit.as_millis() / every.as_millis().max(1))?.clamp(2, 500) + 4;
        let (sender, receiver) = mpsc::channel::<()>();
        let receiver = Arc::new(Mutex::new(receiver));
        let mut workers = Vec::new();
        for _ in 0..count {
            let (seen, receiver, target, netns) =
                (Arc::clone(&seen), Arc::clone(&receiver), target.clone(), netns.clone());
            let worker = thread::Builder::new().stack_size(128 * 1024);
            workers.push(worker.spawn(move || work(netns.as_ref(), &receiver, &target, limit, &seen))?);
        }
        let beat = {
            let (seen, stop) = (Arc::clone(&seen), Arc::clone(&stop));
            thread::spawn(move || {
                let mut next = Instant::now();
                while !stop.load(Ordering::Relaxed) {
                    lock(&seen).requests += 1;
                    if sender.send(()).is_err() {
                        break;
                    }
                    next += every;
                    thread::sleep(next.saturating_duration_since(Instant::now()));
                }
                drop(sender);
                for worker in workers {
                    let _ = worker.join();
                }
            })
        };
        Ok(Self { stop, seen, beat: Some(beat) })
    }

    pub(super) fn start_cold(netns: Option<Netns>, target: Target, every: Duration, limit: Duration) -> Self {
        let (seen, stop) = (Seen::new(), Arc::new(AtomicBool::new(false)));
        let (shared, done) = (Arc::clone(&seen), Arc::clone(&stop));
        let beat = thread::spawn(move || {
            let entered = netns.as_ref().map_or(Ok(()), Netns::enter);
            let address = target.address.ip().to_string();
            let ask = || -> Result<Response, String> {
                entered.as_ref().map_err(|error| format!("{error:#}"))?;
                let forget = command::words(&["ip", "neighbour", "flush", "to", &address]);
                forget.and_then(command::Output::ok).map_err(|error| format!("{error:#}"))?;
                target.ask(limit).map_err(|error| error.kind().to_string())
            };
            while !done.load(Ordering::Relaxed) {
                let next = Instant::now() + every;
                lock(&shared).requests += 1;
                let answer = ask();
                lock(&shared).note(answer);
                thread::sleep(next.saturating_duration_since(Instant::now()));
            }
        });
        Self { stop, seen, beat: Some(beat) }
    }

    /// What it saw so far.
    pub fn so_far(&self) -> Report {
        lock(&self.seen).report(Instant::now())
    }

    /// Waits until it has had that many answers from now on.
    pub fn wait_answers(&self, count: usize, limit: Duration) -> Result<()> {
        let before = lock(&self.seen).answers.len();
        let deadline = Instant::now() + limit;
        loop {
            let answers = lock(&self.seen).answers.len() - before;
            if answers >= count {
                return Ok(());
            }
            if Instant::now() > deadline {
                return Err(anyhow!("{answers} answers within {limit:?}; {}", self.so_far()));
            }
            thread::sleep(Duration::from_millis(5));
        }
    }

    /// Asks no more, waits for what was asked, and reports.
    pub fn stop(mut self) -> Report {
        let end = Instant::now();
        self.end();
        lock(&self.seen).report(end)
    }

    fn end(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(beat) = self.beat.take() {
            let _ = beat.join();
        }
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.end();
    }
}

impl Seen {
    fn new() -> Arc<Mutex<Self>> {
        Arc::new(Mutex::new(Self {
            requests: 0,
            answers: Vec::new(),
            by_answer: BTreeMap::new(),
            by_failure: BTreeMap::new(),
            start: Instant::now(),
        }))
    }

    /// What came of a request, just now.
    fn note(&mut self, answer: Result<Response, String>) {
        match answer {
            Ok(answer) if answer.status == 200 => {
                self.answers.push(Instant::now());
                *self.by_answer.entry(answer.body).or_default() += 1;
            }
            Ok(answer) => *self.by_failure.entry(format!("status {}", answer.status)).or_default() += 1,
            Err(reason) => *self.by_failure.entry(reason).or_default() += 1,
        }
    }

    fn report(&self, end: Instant) -> Report {
        let mut times = self.answers.clone();
        times.push(self.start);
        times.push(end.max(self.start));
        times.sort_unstable();
        let gaps = times.windows(2).map(|pair| pair[1] - pair[0]);
        Report {
            requests: self.requests,
            failures: self.by_failure.values().sum(),
            longest_gap: gaps.max().unwrap_or_default(),
            by_answer: self.by_answer.clone(),
            by_failure: self.by_failure.clone(),
        }
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { requests, failures, longest_gap, by_answer, by_failure } = self;
        write!(f, "{requests} requests, {failures} failed, longest gap {} ms", longest_gap.as_millis())?;
        for (what, count) in by_answer.iter().chain(by_failure) {
            write!(f, "\n{count:6}  {what}")?;
        }
        Ok(())
    }
}

fn work(
    netns: Option<&Netns>,
    receiver: &Mutex<mpsc::Receiver<()>>,
    target: &Target,
    limit: Duration,
    seen: &Mutex<Seen>,
) {
    let entered = netns.map_or(Ok(()), Netns::enter);
    loop {
        let next = receiver.lock().unwrap_or_else(PoisonError::into_inner).recv();
        if next.is_err() {
            return;
        }
        let answer = match &entered {
            Ok(()) => target.ask(limit).map_err(|error| error.kind().to_string()),
            Err(error) => Err(format!("{error:#}")),
        };
        lock(seen).note(answer);
    }
}

fn lock(seen: &Mutex<Seen>) -> std::sync::MutexGuard<'_, Seen> {
    seen.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::net::UdpSocket;

    #[test]
    fn a_gap_is_seen() {
        let server = UdpSocket::bind("127.0.0.1:0").unwrap();
        let address = server.local_addr().unwrap();
        server.set_read_timeout(Some(Duration::from_secs(3))).unwrap();
        thread::spawn(move || {
            let (start, mut buffer) = (Instant::now(), [0; 64]);
            while let Ok((length, peer)) = server.recv_from(&mut buffer) {
                let quiet =
                    (Duration::from_millis(200)..Duration::from_millis(500)).contains(&start.elapsed());
                if !quiet {
                    let _ = server.send_to(&buffer[..length], peer);
                }
            }
        });
        let target = Target { udp: true, address, path: "hello".into() };
        let watch =
            Watch::start(None, target, Duration::from_millis(10), Duration::from_millis(100)).unwrap();
        thread::sleep(Duration::from_millis(800));
        let report = watch.stop();
        let gap = report.longest_gap.as_millis();
        assert!((280..450).contains(&gap), "{report}");
        assert!(report.failures > 10 && report.by_answer["hello"] > 30, "{report}");
    }
}
