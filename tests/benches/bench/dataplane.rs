//! The kernel's tables at size, in the lab's machine: loading them, changing one entry, filling them again after a flush, and
//! the adverts meanwhile.
//!
//! The program copies itself into the machine and runs its second half ([`inside`]) there. The baseline is a
//! [`loader`](crate::loader) that sends the same messages to IPVS and does nothing else.

#[path = "dataplane/inside.rs"]
mod inside;
#[path = "dataplane/rival.rs"]
mod rival;

use std::{env, fs, io::Write as _, time::Duration};

use anyhow::{Context, Result};
use lab::{Lab, Parts, product};

pub use inside::run;

use crate::slowdown::Slowdown;

/// The word that starts the half that runs in the machine.
pub const INSIDE: &str = "dataplane-inside";
/// How long all of it may take in an emulated machine.
const LIMIT: Duration = Duration::from_secs(1800);

/// Measures in a machine of its own.
pub fn measure() -> Result<()> {
    product::in_lab("bench", Parts::Machine, within)
}

fn within(lab: &Lab) -> Result<()> {
    let there = lab.shared_dir();
    for (program, name) in [(env::current_exe()?, "bench"), (crate::program(), "vip-node")] {
        fs::copy(&program, there.join(name))
            .with_context(|| format!("can't copy {} into the machine", program.display()))?;
    }
    // From the machine's memory: the pages of a program in the shared folder are fetched one by one.
    let services = if crate::full() { 5000 } else { 1000 };
    let command = format!(
        "cp {0}/bench {0}/vip-node /run && /run/bench {INSIDE} {1} {services}",
        there.display(),
        Slowdown::word()
    );
    let output = lab.vm().exec_for(&command, LIMIT, |_, bytes| {
        let _ = std::io::stdout().write_all(bytes);
    })?;
    output.ok().map(drop)
}
