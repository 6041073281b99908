//! How long an address does not answer when its owner fails, side by side with keepalived: both on the same kind of bridge,
//! seen by the same client, in turns.
//!
//! A link that is cut just before an advert is missed almost an interval sooner than one that is cut just after it. That
//! is chance, and it is taken out: run by run the fault comes at another part of the interval, the same for both.

use std::{
    fmt, thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Host, Segment, command};
use nix::{
    sys::signal::{Signal, kill},
    unistd::Pid,
};

use crate::{
    adverts::{self, Ear},
    contender::{Contender, Running, Setup},
    probe::{Echo, Probe},
    vrrp::VRID,
};

/// Of the owner and of its successor.
const PRIORITIES: [u8; 2] = [254, 224];
const BOTH: [Contender; 2] = [Contender::VipNode, Contender::Keepalived];
const INTERVALS: [Duration; 3] =
    [Duration::from_millis(10), Duration::from_millis(100), Duration::from_secs(1)];
const SIZES: [u8; 2] = [1, 250];
/// What the owner is started earlier than its successor: less than an active down interval at a second, so that it passes for
/// both at once.
const HEAD_START: Duration = Duration::from_millis(800);
/// How often a measurement is tried.
const ATTEMPTS: u32 = 5;
/// How long the successor answers alone before a run is over.
const STEADY: Duration = Duration::from_millis(250);

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Fault {
    LinkCut,
    Kill,
    Stop,
    Handover,
}

/// One line or two of the table.
#[derive(Clone, Copy, Debug)]
struct Cell {
    fault: Fault,
    setup: Setup,
}

/// Prints the table; the whole matrix, or what is promised and a look at the rest.
pub fn compare(runs: u32, full: bool) -> Result<()> {
    println!(
        "outage of an address in ms, {runs} runs each, as a client sees it that asks every ms by UDP and knows the owner's"
    );
    println!(
        "MAC; with 250 addresses it asks the first and the last of the list. Both are alone with their VRRP: vip-node has"
    );
    println!("no agent here that would guard it, see `faults` for that.");
    if !full {
        println!(
            "Left out unless BENCH=full: SIGKILL, SIGSTOP and handover at 10 ms and 1 s, and with 250 addresses."
        );
    }
    println!("  {:43} vip-node            keepalived", "");
    println!(
        "  {:12} {:>8}  {:13}   median  largest     median  largest   ratio of the medians",
        "fault", "adverts", "addresses"
    );
    for cell in cells(full) {
        let mut gaps: [Vec<Vec<f64>>; 2] = Default::default();
        for run in 0..runs {
            let phase = (f64::from(run) + 0.5) / f64::from(runs);
            // Neither is always the first.
            let turn = usize::from(run % 2 == 1);
            for one in [turn, 1 - turn] {
                let outage = cell.measure(BOTH[one], phase)?;
                gaps[one].push(outage.iter().map(|gap| gap.as_secs_f64() * 1000.0).collect());
            }
        }
        cell.print(&gaps);
    }
    Ok(())
}

fn cells(full: bool) -> Vec<Cell> {
    let mut cells = Vec::new();
    for fault in [Fault::LinkCut, Fault::Kill, Fault::Stop, Fault::Handover] {
        for interval in INTERVALS {
            for vips in SIZES {
                let usual = interval == INTERVALS[1] && vips == SIZES[0];
                if full || fault == Fault::LinkCut || usual {
                    cells.push(Cell { fault, setup: Setup { interval, vips } });
                }
            }
        }
    }
    cells
}

impl Cell {
    /// The outage of each address that is asked; tried again when something was in the way.
    fn measure(self, contender: Contender, phase: f64) -> Result<Vec<Duration>> {
        let mut attempts = 0;
        loop {
            attempts += 1;
            match self.attempt(contender, phase) {
                Err(error) if attempts < ATTEMPTS => {
                    eprintln!("  once more, {} of {contender}: {error:#}", self.fault);
                }
                result => return result.with_context(|| format!("{} of {contender}", self.fault)),
            }
        }
    }

    fn attempt(self, contender: Contender, phase: f64) -> Result<Vec<Duration>> {
        let Self { fault, setup } = self;
        let segment = Segment::new(3)?;
        let [owner, successor, client] = [1, 2, 3].map(|number| segment.host(number));
        let asked = asked(setup);
        let _echoes = [Echo::start(owner, &asked)?, Echo::start(successor, &asked)?];
        let ear = Ear::open(client)?;
        let first = contender.start(owner, PRIORITIES[0], setup)?;
        let patience = setup.interval * 10 + Duration::from_secs(10);
        let probe = Probe::start(client, &asked)?;
        let answers_of = |host: &Host| {
            probe.last().iter().all(|last| last.is_some_and(|answer| answer.host == host.number()))
        };
        thread::sleep(HEAD_START);
        let _second = contender.start(successor, PRIORITIES[1], setup)?;
        command::until("the owner's answers", patience, || Ok(answers_of(owner).then_some(())))?;
        // Until the successor has started and heard the owner.
        thread::sleep(Duration::from_millis(600));
        ensure!(answers_of(owner), "the owner did not stay the owner");

        let strike = fault.prepare(&segment, &first)?;
        let struck = at_phase(&ear, setup.interval, phase, patience)?;
        strike()?;
        let deadline = Instant::now() + patience;
        let mut since = None;
        while since.is_none_or(|since: Instant| since.elapsed() < STEADY) {
            ensure!(Instant::now() < deadline, "the successor does not answer");
            since = answers_of(successor).then(|| since.unwrap_or_else(Instant::now));
            thread::sleep(Duration::from_millis(5));
        }
        ensure!(
            fault == Fault::Handover || !went_on(&ear, struck, patience)?,
            "the fault came after the advert that it was to forestall"
        );
        Ok(probe.gaps(struck))
    }

    fn print(self, gaps: &[Vec<Vec<f64>>; 2]) {
        let which = if self.setup.vips == 1 { vec![""] } else { vec!["the first", "the last"] };
        for (index, name) in which.iter().enumerate() {
            let [(ours, our_most), (theirs, their_most)] = gaps.each_ref().map(|runs| {
                let mut runs: Vec<f64> = runs.iter().filter_map(|run| run.get(index).copied()).collect();
                runs.sort_by(f64::total_cmp);
                (median(&runs), runs.last().copied().unwrap_or_default())
            });
            println!(
                "  {:12} {:>5} ms  {:3} {name:9} {ours:8.1} {our_most:8.1}   {theirs:8.1} {their_most:8.1}   {:6.3}",
                self.fault.to_string(),
                self.setup.interval.as_millis(),
                self.setup.vips,
                ours / theirs
            );
        }
    }
}

/// The first and the last.
fn asked(setup: Setup) -> Vec<std::net::Ipv4Addr> {
    let all = setup.addresses();
    let mut ends: Vec<_> = all.first().into_iter().chain(all.last()).copied().collect();
    ends.dedup();
    ends
}

/// The middle of sorted numbers.
fn median(sorted: &[f64]) -> f64 {
    let at = |index: usize| sorted.get(index).copied().unwrap_or_default();
    f64::midpoint(at(sorted.len().saturating_sub(1) / 2), at(sorted.len() / 2))
}

/// Waits for that part of an interval after one of the owner's adverts, and gives the moment.
fn at_phase(ear: &Ear, interval: Duration, phase: f64, patience: Duration) -> Result<Instant> {
    let wanted = interval.mul_f64(phase);
    // What was heard before is too old to count from.
    let fresh = wanted.max(Duration::from_millis(2));
    let deadline = Instant::now() + patience;
    loop {
        let heard = ear.hear(deadline)?.context("the owner sends no adverts")?;
        let age = adverts::age(heard.at);
        if heard.vrid == VRID && heard.priority == PRIORITIES[0] && age < fresh {
            thread::sleep(wanted.saturating_sub(age));
            return Ok(Instant::now());
        }
    }
}

/// Whether the owner went on after the fault: a busy machine was late with it. One that was asked to leave may.
fn went_on(ear: &Ear, struck: Instant, patience: Duration) -> Result<bool> {
    let deadline = Instant::now() + patience;
    loop {
        let heard = ear.hear(deadline)?.context("the successor sends no adverts")?;
        if heard.vrid == VRID && adverts::age(heard.at) < struck.elapsed() {
            return Ok(heard.priority == PRIORITIES[0]);
        }
    }
}

impl Fault {
    /// All that takes time, so that what is left does not.
    fn prepare<'a>(
        self,
        segment: &Segment,
        owner: &'a Running<'a>,
    ) -> Result<Box<dyn FnOnce() -> Result<()> + 'a>> {
        let signal = |signal: Signal, processes: Vec<Pid>| -> Box<dyn FnOnce() -> Result<()>> {
            Box::new(move || Ok(processes.iter().try_for_each(|process| kill(*process, signal))?))
        };
        Ok(match self {
            Self::LinkCut => {
                let cutter = segment.cutter(1)?;
                Box::new(move || cutter.cut())
            }
            Self::Kill => signal(Signal::SIGKILL, owner.processes()),
            Self::Stop => signal(Signal::SIGSTOP, owner.processes()),
            Self::Handover => signal(Signal::SIGTERM, vec![owner.main()?]),
        })
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::LinkCut => "link cut",
            Self::Kill => "SIGKILL",
            Self::Stop => "SIGSTOP",
            Self::Handover => "handover",
        })
    }
}
