//! IPv6 and both families at once: elected, announced, moved, with a client that asks all the time.

use std::{
    net::IpAddr,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Segment, Server, command};
use vip_core::vrrp::Lan;

use crate::vrrp::{SOON, VIP, VIP6, Vrrp, config};
use crate::{one_owner_of, settled_owner_of};

const PRIORITIES: [u8; 3] = [254, 224, 194];

/// Hosts 1 to 3 serve and compete for addresses.
fn three<'a>(segment: &'a Segment, addresses: &[IpAddr]) -> Result<Vec<(Vrrp<'a>, Server)>> {
    let mut all = Vec::new();
    for (number, priority) in (1..).zip(PRIORITIES) {
        let host = segment.host(number);
        let vrrp = Vrrp::start(host, number)?;
        vrrp.elect_all(addresses.iter().map(|vip| config(priority, &[*vip])).collect(), Lan::default())?;
        all.push((vrrp, Server::start(host.netns(), &number.to_string())?));
    }
    Ok(all)
}

fn url(address: IpAddr) -> String {
    match address {
        IpAddr::V4(four) => format!("http://{four}/"),
        IpAddr::V6(six) => format!("http://[{six}]/"),
    }
}

#[test]
fn an_ipv6_address_has_one_owner_and_moves_without_a_lost_request() -> Result<()> {
    let segment = Segment::new(4)?;
    let (all, _servers): (Vec<_>, Vec<_>) = three(&segment, &[VIP6.into()])?.into_iter().unzip();
    let owner = settled_owner_of(&all, VIP6.into())?;
    let shown = segment.host(all[owner].number).exec("ip -6 -oneline address show dev eth0")?.stdout;
    let line = shown.lines().find(|line| line.contains(&format!(" {VIP6}/128 "))).context("the address")?;
    ensure!(
        line.contains("deprecated") && line.contains("nodad") && line.contains("noprefixroute"),
        "{line}"
    );

    let client = segment.host(4).client().limit(Duration::from_millis(500));
    command::until("an answer", SOON, || client.get(&url(VIP6.into())).map(Some))?;
    let watch = client.watch(&url(VIP6.into()), Duration::from_millis(5))?;
    thread::sleep(Duration::from_millis(300));
    all[owner].signal("TERM")?;
    let rest: Vec<Vrrp<'_>> = all.into_iter().filter(|vrrp| vrrp.number as usize != owner + 1).collect();
    let next = settled_owner_of(&rest, VIP6.into())?;
    watch.wait_answers(200, SOON)?;
    let report = watch.stop();
    ensure!(report.failures == 0, "{report:?}");
    let name = rest[next].number.to_string();
    ensure!(report.by_answer.contains_key(&name), "the new owner {name} was never asked: {report:?}");
    Ok(())
}

#[test]
fn both_families_have_an_election_each_and_fail_over() -> Result<()> {
    let segment = Segment::new(4)?;
    let vips: [IpAddr; 2] = [VIP.into(), VIP6.into()];
    let (all, _servers): (Vec<_>, Vec<_>) = three(&segment, &vips)?.into_iter().unzip();
    let client = segment.host(4).client().limit(Duration::from_millis(300));
    for vip in vips {
        settled_owner_of(&all, vip)?;
        command::until("an answer", SOON, || client.get(&url(vip)).map(Some))?;
    }
    let owner = one_owner_of(&all, VIP6.into())?;
    segment.isolate(all[owner].number)?;
    let rest: Vec<Vrrp<'_>> = all.into_iter().filter(|vrrp| vrrp.number as usize != owner + 1).collect();
    for vip in vips {
        let next = settled_owner_of(&rest, vip)?;
        let answer = command::until("an answer", SOON, || client.get(&url(vip)).map(Some))?;
        ensure!(answer.body == rest[next].number.to_string(), "{vip} is answered by {}", answer.body);
    }
    Ok(())
}

#[test]
fn an_ipv6_address_that_another_program_deletes_is_back_at_once() -> Result<()> {
    let segment = Segment::new(1)?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    vrrp.elect_all(vec![config(200, &[VIP6.into()])], Lan::default())?;
    let all = [vrrp];
    one_owner_of(&all, VIP6.into())?;
    segment.host(1).exec(&format!("ip address del {VIP6}/128 dev eth0"))?.ok()?;
    command::until("the address", Duration::from_millis(100), || Ok(all[0].has(VIP6.into())?.then_some(())))?;
    // It is renewed as before: its lifetime does not end it.
    thread::sleep(Duration::from_secs(5));
    ensure!(all[0].has(VIP6.into())?, "the address was lost later");
    Ok(())
}

#[test]
fn killed_it_leaves_an_ipv6_address_to_the_kernel() -> Result<()> {
    let segment = Segment::new(1)?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    vrrp.elect_all(vec![config(200, &[VIP6.into()])], Lan::default())?;
    let all = [vrrp];
    one_owner_of(&all, VIP6.into())?;
    thread::sleep(Duration::from_millis(1500));
    all[0].signal("KILL")?;
    let killed = Instant::now();
    command::until("the kernel to remove the address", Duration::from_secs(6), || {
        Ok((!all[0].has(VIP6.into())?).then_some(()))
    })?;
    println!("gone after {} ms", killed.elapsed().as_millis());
    Ok(())
}
