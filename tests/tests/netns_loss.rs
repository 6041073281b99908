//! One owner again after frames were lost: in one direction, by chance, and with a host cut off.

#[path = "bench/timeline.rs"]
mod timeline;
#[path = "netns/vrrp.rs"]
#[allow(dead_code, reason = "the other tests of this tier use more of it")]
mod vrrp;

use std::{path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::paths;

use timeline::{Timeline, Trouble, twice_down};

/// What the tests start.
fn program() -> PathBuf {
    paths::target().join("debug/vip-node")
}

#[test]
fn after_any_loss_there_is_one_owner_again() -> Result<()> {
    let troubles =
        [Trouble::Deaf(1), Trouble::Deaf(2), Trouble::Mute(1), Trouble::Lossy(20), Trouble::Apart(1)];
    thread::scope(|scope| {
        let all =
            troubles.map(|trouble| scope.spawn(move || Timeline::record(trouble, Duration::from_secs(2))));
        for one in all {
            let timeline = one.join().ok().context("a recording ended badly")??;
            println!("{timeline}");
            let settled = timeline.settled().context("never one owner")?;
            // Twice the active down interval on a machine that has time for it.
            ensure!(settled < twice_down() * 5, "one owner only after {} ms", settled.as_millis());
        }
        Ok(())
    })
}
