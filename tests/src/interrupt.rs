//! Ctrl-C: whatever was started is stopped before the program ends.

use std::{
    process::exit,
    sync::{Mutex, MutexGuard, PoisonError},
    thread,
};

use anyhow::{Context, Result};
use signal_hook::{
    consts::{SIGHUP, SIGINT, SIGTERM},
    iterator::Signals,
};

static STOPPING: Mutex<bool> = Mutex::new(false);

/// Calls `clean` on the first SIGINT, SIGTERM or SIGHUP and ends the program. While it cleans, nothing new is started.
pub fn on_interrupt(clean: impl FnOnce() + Send + 'static) -> Result<()> {
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGHUP]).context("can't listen for signals")?;
    thread::spawn(move || {
        if let Some(signal) = signals.forever().next() {
            *STOPPING.lock().unwrap_or_else(PoisonError::into_inner) = true;
            eprintln!("\ninterrupted: cleaning up");
            clean();
            exit(128 + signal);
        }
    });
    Ok(())
}

/// Held while a long-lived process is started, so that the clean-up can't miss it. Never returns once stopping.
pub(crate) fn gate() -> MutexGuard<'static, bool> {
    let guard = STOPPING.lock().unwrap_or_else(PoisonError::into_inner);
    if !*guard {
        return guard;
    }
    drop(guard);
    loop {
        thread::park();
    }
}
