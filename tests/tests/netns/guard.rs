//! An agent that is gone: its node stays owner for a while, then offers the addresses to a node that is fit.

use std::{
    thread,
    time::{Duration, Instant},
};

use anyhow::{Result, ensure};
use lab::{Segment, command};
use vip_core::{
    api::VrrpState,
    vrrp::{Lan, Peer, RouterConfig},
};
use vip_node::link::{self, Word};

use crate::vrrp::{SOON, VIP, Vrrp, config};
use crate::{one_owner, settled_owner_of};

const GRACE: [&str; 2] = ["--agent-grace", "2s"];

fn priority(vrrp: &Vrrp<'_>) -> u8 {
    vrrp.report().routers.first().map_or(0, |router| router.priority)
}

#[test]
fn without_its_agent_a_node_offers_the_address_to_another() -> Result<()> {
    let segment = Segment::new(2)?;
    let all = [1, 2].map(|number| Vrrp::start_with(segment.host(number), number, &GRACE));
    let [first, second] = all;
    let all = [first?, second?];
    all[0].elect_with(254)?;
    all[1].elect_with(224)?;
    let owner = one_owner(&all)?;
    all[owner].mute(true);
    thread::sleep(Duration::from_secs(1));
    ensure!(one_owner(&all)? == owner, "the address moved before the grace was over");
    command::until("another owner", SOON, || Ok((one_owner(&all)? != owner).then_some(())))?;
    ensure!(priority(&all[owner]) == 1, "it still competes: {:?}", all[owner].report());
    all[owner].mute(false);
    command::until("its old priority", SOON, || Ok((priority(&all[owner]) > 1).then_some(())))?;
    ensure!(one_owner(&all)? != owner, "the address moved a second time");
    Ok(())
}

#[test]
fn without_its_agent_a_node_that_is_alone_keeps_the_address() -> Result<()> {
    let segment = Segment::new(1)?;
    let all = [Vrrp::start_with(segment.host(1), 1, &GRACE)?];
    all[0].elect_with(254)?;
    one_owner(&all)?;
    all[0].mute(true);
    let lost = || Ok((priority(&all[0]) == 1).then_some(()));
    command::until("the loss to be noticed", SOON, lost)?;
    for _ in 0..10 {
        ensure!(all[0].is_bound()? && all[0].state() == VrrpState::Master, "the address was let go");
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[test]
fn where_no_agent_is_left_the_address_stays() -> Result<()> {
    let segment = Segment::new(2)?;
    let all = [1, 2].map(|number| Vrrp::start_with(segment.host(number), number, &GRACE));
    let [first, second] = all;
    let all = [first?, second?];
    all[0].elect_with(254)?;
    all[1].elect_with(224)?;
    settled_owner_of(&all, VIP.into())?;
    all.iter().for_each(|vrrp| vrrp.mute(true));
    command::until("the loss to be noticed", SOON, || {
        Ok(all.iter().all(|vrrp| priority(vrrp) == 1).then_some(()))
    })?;
    // Who notices first may still be relieved by one that has not.
    let owner = settled_owner_of(&all, VIP.into())?;
    // It is offered every 2 s.
    for _ in 0..25 {
        ensure!(all[owner].state() == VrrpState::Master, "the address moved");
        thread::sleep(Duration::from_millis(200));
    }
    // An agent that is back takes the next offer.
    all[1 - owner].mute(false);
    command::until("the other owner", SOON, || Ok((one_owner(&all)? != owner).then_some(())))
}

#[test]
fn an_order_that_cannot_be_taken_leaves_the_one_before_in_force() -> Result<()> {
    let segment = Segment::new(1)?;
    let all = [Vrrp::start(segment.host(1), 1)?];
    all[0].elect_with(254)?;
    one_owner(&all)?;
    let peers = (0..100_000).map(|n| Peer { node: format!("node-{n}"), ..Peer::default() }).collect();
    all[0].elect_all(vec![config(254, &[VIP.into()])], Lan { peers, ..Lan::default() })?;
    let why = command::until("the answer", SOON, || Ok(all[0].report().untaken))?;
    ensure!(why.contains("more than 4 MiB"), "{why}");
    ensure!(all[0].is_bound()? && all[0].state() == VrrpState::Master, "the address was let go");
    all[0].elect_with(253)?;
    command::until("another order", SOON, || Ok((priority(&all[0]) == 253).then_some(())))?;
    ensure!(all[0].report().untaken.is_none() && all[0].is_bound()?, "{:?}", all[0].report());
    Ok(())
}

#[test]
fn an_agent_that_does_not_read_for_a_while_is_not_turned_away() -> Result<()> {
    let segment = Segment::new(1)?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    let interval = Duration::from_millis(10);
    vrrp.elect_all(vec![RouterConfig { interval, ..config(200, &[VIP.into()]) }], Lan::default())?;
    let all = [vrrp];
    one_owner(&all)?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    runtime.block_on(async {
        let (_sender, mut receiver) = link::connect(&all[0].socket()).await?;
        ensure!(
            matches!(receiver.recv().await, Some(Word::Report(_))),
            "a talk begins with how things stand"
        );
        // More than the socket holds; what it does not hold is left out.
        tokio::time::sleep(Duration::from_secs(4)).await;
        let (mut words, begun) = (0, Instant::now());
        while begun.elapsed() < Duration::from_secs(1) {
            ensure!(receiver.recv().await.is_some(), "vrrp ended the talk");
            words += 1;
        }
        println!("{words} words after a pause of 4 s");
        ensure!((150..900).contains(&words), "{words} words in a second with a beat of 5 ms");
        Ok(())
    })
}
