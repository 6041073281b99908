//! How much slower the lab's machine is than its host: what is measured inside is told as it is and divided by it.

use std::{
    collections::BTreeMap,
    fmt,
    hint::black_box,
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use crate::{ms, percentile};

/// The machine's time for a little work, as a multiple of the host's.
#[derive(Clone, Copy, Debug)]
pub struct Slowdown(f64);

impl Slowdown {
    /// What the host says to a program in the machine.
    pub fn word() -> String {
        spin().as_nanos().to_string()
    }

    /// In the machine, from the host's word.
    pub fn from_word(word: &str) -> Result<Self> {
        let host: f64 = word.parse().context("the host's time is no number")?;
        Ok(Self(spin().as_nanos() as f64 / host))
    }

    /// The middle and the end of many times, beside what the end should be on the host.
    pub fn tell(self, took: &mut [Duration], goal: Duration) -> String {
        took.sort_unstable();
        let p99 = percentile(took, 99);
        format!(
            "p50 {}, p99 {}, divided by the slowdown {:.2} ms (goal {})",
            ms(percentile(took, 50)),
            ms(p99),
            p99.as_secs_f64() * 1000.0 / self.0,
            ms(goal)
        )
    }
}

impl fmt::Display for Slowdown {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:.1}", self.0)
    }
}

/// A little of what agents do, the fastest of ten times: texts are written, kept in order, and looked up. Arithmetic in
/// registers alone would say that an emulated processor is hardly slower.
fn spin() -> Duration {
    let text = |n: u32| n.wrapping_mul(2_654_435_761).to_string();
    let once = || {
        let clock = Instant::now();
        let known: BTreeMap<String, u32> = (0..5000).map(|n| (text(n), n)).collect();
        black_box((0..5000).filter(|n| known.contains_key(&text(n * 3))).count());
        clock.elapsed()
    };
    (0..10).map(|_| once()).min().unwrap_or_default()
}
