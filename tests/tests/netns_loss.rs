//! One owner again after frames were lost: in one direction, by chance, and with a host cut off.

#[path = "netns/timeline.rs"]
mod timeline;
#[path = "netns/vrrp.rs"]
#[allow(dead_code, reason = "the other tests of this tier use more of it")]
mod vrrp;

use std::{net::UdpSocket, path::PathBuf, thread, time::Duration};

use anyhow::{Context, Result, ensure};
use lab::{Host, Segment, paths};

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

/// How many of some datagrams come through.
fn passed(from: &Host, to: &Host) -> Result<usize> {
    const SENT: usize = 200;
    let ear = to.run(|| UdpSocket::bind((to.address(), 0)))??;
    ear.set_read_timeout(Some(Duration::from_millis(100)))?;
    let mouth = from.run(|| UdpSocket::bind((from.address(), 0)))??;
    for _ in 0..SENT {
        mouth.send_to(b"x", ear.local_addr()?)?;
    }
    Ok((0..SENT).take_while(|_| ear.recv(&mut [0]).is_ok()).count())
}

#[test]
fn the_bridge_drops_what_it_is_told_to() -> Result<()> {
    let segment = Segment::new(2)?;
    let (one, two) = (segment.host(1), segment.host(2));
    for (from, to) in [(one, two), (two, one)] {
        // They know each other's MAC from now on.
        from.exec(&format!("ip neighbour replace {} lladdr {} dev eth0", to.address(), to.mac()?))?.ok()?;
        ensure!(passed(from, to)? == 200, "something is lost without a reason");
    }
    segment.deafen(1)?;
    ensure!((passed(one, two)?, passed(two, one)?) == (200, 0), "host 1 is not deaf");
    segment.heal()?;
    segment.mute(1)?;
    ensure!((passed(one, two)?, passed(two, one)?) == (0, 200), "host 1 is not mute");
    segment.heal()?;
    segment.lose(50)?;
    let some = passed(one, two)?;
    ensure!((40..160).contains(&some), "{some} of 200 came through");
    segment.heal()?;
    segment.heal()?;
    ensure!((passed(one, two)?, passed(two, one)?) == (200, 200), "it is not healed");
    Ok(())
}
