//! A node that has more than one LAN, and one that has a keepalived with addresses of its own beside ours.

use std::{
    net::{IpAddr, Ipv4Addr},
    thread,
    time::Duration,
};

use anyhow::{Result, ensure};
use lab::{Host, Segment, command};
use vip_core::vrrp::{Lan, RouterConfig};

use crate::keepalived::{Keepalived, OTHER, Settings};
use crate::one_owner;
use crate::vrrp::{SOON, VIP, Vrrp, config, has};

/// On the second LAN.
const SECOND: IpAddr = IpAddr::V4(Ipv4Addr::new(10, 88, 2, 50));

fn on_second_card(host: &Host) -> Result<bool> {
    let shown = host.exec("ip -oneline address show")?.ok()?.stdout;
    let line = shown.lines().find(|line| line.contains(&format!(" {SECOND}/32 ")));
    ensure!(line.is_none_or(|line| line.contains(" eth1 ")), "on another card: {line:?}");
    Ok(line.is_some())
}

#[test]
fn each_address_is_elected_and_lost_on_the_card_of_its_own_lan() -> Result<()> {
    let segment = Segment::new(3)?;
    let [one, two, switch] = [1, 2, 3].map(|number| segment.host(number));
    switch.netns().ip("link add br1 type bridge")?;
    switch.netns().ip("link set br1 up")?;
    for host in [one, two] {
        let (port, name) = (format!("port{}", host.number()), host.netns().name());
        switch.netns().ip(&format!("link add {port} type veth peer name eth1 netns {name}"))?;
        switch.netns().ip(&format!("link set {port} master br1 up"))?;
        host.netns().ip(&format!("address add 10.88.0.{}/16 dev eth1", 10 + host.number()))?;
        host.netns().ip("link set eth1 up")?;
    }
    let both = [Vrrp::start(one, 1)?, Vrrp::start(two, 2)?];
    for (vrrp, priority) in both.iter().zip([200, 100]) {
        let mut second: RouterConfig = config(priority, &[SECOND]);
        second.id.interface = "eth1".into();
        vrrp.elect_all(vec![config(priority, &[VIP.into()]), second], Lan::default())?;
    }
    let owned = |by: &Vrrp<'_>| -> Result<(bool, bool)> { Ok((by.is_bound()?, on_second_card(by.host)?)) };
    let wait = |wanted: [(bool, bool); 2]| {
        command::until(&format!("{wanted:?}"), SOON, || {
            let found = [owned(&both[0])?, owned(&both[1])?];
            ensure!(found == wanted, "{found:?}");
            Ok(Some(()))
        })
    };
    wait([(true, true), (false, false)])?;
    // The second LAN loses its cable at host 1; the first goes on there.
    one.netns().ip("link set eth1 down")?;
    wait([(true, false), (false, true)])
}

#[test]
fn a_keepalived_on_the_same_host_keeps_its_addresses_when_ours_ends_and_ours_when_it_does() -> Result<()> {
    let segment = Segment::new(2)?;
    let other = || -> Result<bool> { has(segment.host(1), OTHER.into()) };
    let theirs = Keepalived::start_with(
        segment.host(1),
        &Settings { priority: 200, other: true, ..Settings::default() },
    )?;
    command::until("keepalived's address", SOON, || Ok(other()?.then_some(())))?;
    let mut ours = vec![Vrrp::start(segment.host(1), 1)?, Vrrp::start(segment.host(2), 2)?];
    for (vrrp, priority) in ours.iter().zip([200, 100]) {
        vrrp.elect_with(priority)?;
    }
    command::until("both on host 1", SOON, || Ok((one_owner(&ours)? == 0 && other()?).then_some(())))?;

    // Ours ends for good and takes its own address only.
    let first = ours.remove(0);
    first.signal("TERM")?;
    command::until("host 2 to be the owner", SOON, || {
        Ok((ours[0].is_bound()? && !first.is_bound()?).then_some(()))
    })?;
    thread::sleep(Duration::from_millis(500));
    ensure!(other()?, "keepalived's address went with ours");
    drop(first);

    let again = Vrrp::start(segment.host(1), 1)?;
    again.elect_with(254)?;
    ours.push(again);
    ours[0].signal("TERM")?;
    command::until("host 1 to be the owner again", SOON, || Ok(ours[1].is_bound()?.then_some(())))?;
    theirs.stop()?;
    command::until("keepalived's address to go", SOON, || Ok((!other()?).then_some(())))?;
    ensure!(ours[1].is_bound()?, "our address went with keepalived's");
    Ok(())
}
