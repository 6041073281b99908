//! The election on the wire: real `vip-node vrrp` processes in namespaces on one bridge, told what to do over their
//! socket as the agent would, with keepalived, firewalls and foreign packets beside them.

#[path = "netns/coexistence.rs"]
mod coexistence;
#[path = "netns/company.rs"]
mod company;
#[path = "netns/families.rs"]
mod families;
#[path = "netns/foreign.rs"]
mod foreign;
#[path = "netns/guard.rs"]
mod guard;
#[path = "netns/keepalived.rs"]
mod keepalived;
#[path = "netns/timing.rs"]
mod timing;
#[path = "netns/vrrp.rs"]
mod vrrp;

use std::{
    net::IpAddr,
    path::PathBuf,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail, ensure};
use lab::{Segment, command, paths};
use vip_core::api::{Reason, VrrpState};
use vip_node::link::{Elect, Order};

use vrrp::{SOON, VIP, Vrrp};

/// A new owner announces an address for so long, then seldom.
const ANNOUNCED: Duration = Duration::from_millis(5200);

/// What the tests of this tier start.
fn program() -> PathBuf {
    paths::target().join("debug/vip-node")
}

/// Three hosts that elect.
fn three(segment: &Segment) -> Result<Vec<Vrrp<'_>>> {
    let all: Vec<Vrrp<'_>> =
        (1..=3).map(|number| Vrrp::start(segment.host(number), number)).collect::<Result<_>>()?;
    all.iter().try_for_each(Vrrp::elect)?;
    Ok(all)
}

/// Waits until exactly one is master and exactly that one has the address.
fn one_owner(all: &[Vrrp<'_>]) -> Result<usize> {
    one_owner_of(all, VIP.into())
}

fn one_owner_of(all: &[Vrrp<'_>], address: IpAddr) -> Result<usize> {
    command::until("one owner", SOON, || {
        let is_master = |i: &usize| all[*i].state_for(address) == VrrpState::Master;
        let masters: Vec<usize> = (0..all.len()).filter(is_master).collect();
        let mut bound = Vec::new();
        for (index, vrrp) in all.iter().enumerate() {
            if vrrp.has(address)? {
                bound.push(index);
            }
        }
        match masters.as_slice() {
            [one] if bound == [*one] => Ok(Some(*one)),
            _ => bail!("masters {masters:?}, bound on {bound:?}"),
        }
    })
}

/// The owner once nothing has moved for a second: who was started first may have been master for a moment.
fn settled_owner_of(all: &[Vrrp<'_>], address: IpAddr) -> Result<usize> {
    command::until("an owner that stays", SOON, || {
        let owner = one_owner_of(all, address)?;
        thread::sleep(Duration::from_secs(1));
        Ok(Some(owner).filter(|owner| one_owner_of(all, address).is_ok_and(|again| again == *owner)))
    })
}

/// The settled owner is still the only one after some seconds.
fn still(all: &[Vrrp<'_>], owner: usize) -> Result<()> {
    let end = Instant::now() + Duration::from_secs(2);
    while Instant::now() < end {
        ensure!(one_owner(all)? == owner, "the owner changed");
        thread::sleep(Duration::from_millis(200));
    }
    Ok(())
}

#[test]
fn one_owner_and_another_when_its_link_is_cut() -> Result<()> {
    let segment = Segment::new(4)?;
    let all = three(&segment)?;
    let client = segment.host(4);
    let owner = one_owner(&all)?;
    ensure!(
        client.arp_owner(VIP, Duration::from_millis(300))? == [all[owner].host.mac()?],
        "the owner does not answer ARP"
    );

    // The card keeps its carrier: the owner cannot know that it is alone.
    segment.isolate(all[owner].number)?;
    let cut = Instant::now();
    let rest: Vec<usize> = (0..3).filter(|index| *index != owner).collect();
    let next = command::until("a successor", SOON, || {
        Ok(rest.iter().copied().find(|i| all[*i].state() == VrrpState::Master))
    })?;
    println!("taken over after {} ms", cut.elapsed().as_millis());
    ensure!(
        client.arp_owner(VIP, Duration::from_millis(300))? == [all[next].host.mac()?],
        "the successor does not answer ARP"
    );
    // Nobody announces the address now, and a host believes one that will not have it.
    thread::sleep((cut + ANNOUNCED).saturating_duration_since(Instant::now()));
    client.netns().ip(&format!("neighbour replace {VIP} lladdr 02:00:00:00:00:99 nud stale dev eth0"))?;
    segment.rejoin(all[owner].number)?;
    let settled = one_owner(&all)?;
    still(&all, settled)?;
    let mac = all[settled].host.mac()?;
    let known = client.exec(&format!("ip neighbour show {VIP}"))?.stdout;
    ensure!(known.contains(&mac), "after healing the address was not announced: {known}");
    ensure!(client.arp_owner(VIP, Duration::from_millis(300))? == [mac], "after healing another one answers");
    Ok(())
}

#[test]
fn a_lost_carrier_releases_the_address_and_is_trusted_again_later() -> Result<()> {
    let segment = Segment::new(3)?;
    let all = three(&segment)?;
    let owner = one_owner(&all)?;
    segment.unplug(all[owner].number)?;
    // The kernel tells of a lost carrier at most once a second.
    let next =
        command::until("another owner", SOON, || Ok(Some(one_owner(&all)?).filter(|next| *next != owner)))?;
    let trouble = command::until("a reason", SOON, || {
        Ok(all[owner].report().routers.first().and_then(|r| r.trouble.clone()))
    })?;
    ensure!(trouble.1.contains("carrier"), "{trouble:?}");
    segment.plug(all[owner].number)?;
    command::until("the old owner to take part again", SOON, || {
        Ok((all[owner].state() == VrrpState::Backup).then_some(()))
    })?;
    still(&all, next)
}

#[test]
fn an_interface_that_is_gone_is_missed_by_the_others_and_used_again_when_it_is_back() -> Result<()> {
    let segment = Segment::new(3)?;
    let all = three(&segment)?;
    let owner = settled_owner_of(&all, VIP.into())?;
    segment.remove_card(all[owner].number)?;
    let next =
        command::until("another owner", SOON, || Ok(Some(one_owner(&all)?).filter(|next| *next != owner)))?;
    let trouble = command::until("a reason", SOON, || {
        Ok(all[owner].report().routers.first().and_then(|router| router.trouble.clone()))
    })?;
    ensure!(trouble.1.contains("there is no interface eth0"), "{trouble:?}");
    // The kernel knows it by another number now.
    segment.add_card(all[owner].number)?;
    command::until("the old owner to take part again", SOON, || {
        Ok((all[owner].state() == VrrpState::Backup).then_some(()))
    })?;
    still(&all, next)?;
    segment.isolate(all[next].number)?;
    let rest: Vec<&Vrrp<'_>> = all.iter().filter(|vrrp| vrrp.number != all[next].number).collect();
    command::until("a successor", SOON, || {
        Ok((rest.iter().filter(|vrrp| vrrp.is_bound().unwrap_or_default()).count() == 1).then_some(()))
    })
}

#[test]
fn of_two_with_the_highest_priority_one_remains_and_the_mistake_is_told() -> Result<()> {
    let segment = Segment::new(2)?;
    let all = [Vrrp::start(segment.host(1), 1)?, Vrrp::start(segment.host(2), 2)?];
    all.iter().try_for_each(|vrrp| vrrp.elect_with(255))?;
    let owner = settled_owner_of(&all, VIP.into())?;
    still(&all, owner)?;
    let said =
        |vrrp: &Vrrp<'_>| -> Result<bool> { Ok(vrrp.log()?.contains("two routers have priority 255")) };
    ensure!(said(&all[0])? && said(&all[1])?, "nobody says that one of them is misconfigured");
    Ok(())
}

#[test]
fn a_planned_end_hands_over_without_a_gap() -> Result<()> {
    let segment = Segment::new(4)?;
    let all = three(&segment)?;
    let owner = one_owner(&all)?;
    segment.host(4).exec(&format!("ping -c1 -W2 {VIP}"))?.ok()?;
    let pings = thread::scope(|scope| -> Result<command::Output> {
        let ping = scope.spawn(|| segment.host(4).exec(&format!("ping -i 0.01 -w 2 -q {VIP}")));
        thread::sleep(Duration::from_millis(500));
        all[owner].signal("TERM")?;
        ping.join().ok().context("ping ended badly")?
    })?;
    let rest: Vec<&Vrrp<'_>> = all.iter().filter(|vrrp| vrrp.number != all[owner].number).collect();
    ensure!(rest.iter().filter(|vrrp| vrrp.state() == VrrpState::Master).count() == 1, "nobody took over");
    ensure!(!all[owner].is_bound()?, "the old owner kept the address");
    ensure!(pings.stdout.contains(" 0% packet loss"), "{}", pings.stdout);
    Ok(())
}

#[test]
fn killed_it_leaves_the_address_to_the_kernel_and_restarted_it_cleans_up() -> Result<()> {
    let segment = Segment::new(3)?;
    let mut all = three(&segment)?;
    let owner = one_owner(&all)?;
    let number = all[owner].number;
    segment.host(number).exec("ip address add 10.87.2.99/32 dev eth0")?.ok()?;
    all[owner].signal("KILL")?;
    let killed = Instant::now();
    command::until("the kernel to remove the address", Duration::from_secs(6), || {
        Ok((!all[owner].is_bound()?).then_some(()))
    })?;
    println!("gone after {} ms", killed.elapsed().as_millis());
    drop(all.remove(owner));
    let next = one_owner(&all)?;

    all[next].signal("KILL")?;
    let number = all[next].number;
    drop(all.remove(next));
    let again = Vrrp::start(segment.host(number), number)?;
    ensure!(!again.is_bound()?, "the leftover of the run before is still there");
    let foreign = segment.host(1).exec("ip -oneline address show dev eth0")?.stdout
        + &segment.host(2).exec("ip -oneline address show dev eth0")?.stdout
        + &segment.host(3).exec("ip -oneline address show dev eth0")?.stdout;
    ensure!(foreign.contains("10.87.2.99/32"), "an address of somebody else was removed");
    Ok(())
}

#[test]
fn an_address_that_another_program_deletes_is_back_at_once() -> Result<()> {
    let segment = Segment::new(1)?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    vrrp.elect()?;
    let all = [vrrp];
    one_owner(&all)?;
    segment.host(1).exec(&format!("ip address del {VIP}/32 dev eth0"))?.ok()?;
    command::until("the address", Duration::from_millis(100), || Ok(all[0].is_bound()?.then_some(())))?;
    still(&all, 0)
}

#[test]
fn an_address_that_the_interface_has_already_is_not_taken() -> Result<()> {
    let segment = Segment::new(1)?;
    segment.host(1).exec(&format!("ip address add {VIP}/32 dev eth0"))?.ok()?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    vrrp.elect()?;
    let trouble = command::until("a reason", SOON, || {
        Ok(vrrp.report().routers.first().and_then(|r| r.trouble.clone()))
    })?;
    ensure!(trouble.1.contains("another program"), "{trouble:?}");
    vrrp.order(Order::Elect(Elect::default()))?;
    thread::sleep(Duration::from_millis(500));
    ensure!(vrrp.is_bound()?, "an address of somebody else was removed");
    Ok(())
}

#[test]
fn an_address_that_another_program_takes_for_itself_is_left_to_it() -> Result<()> {
    let segment = Segment::new(1)?;
    let all = [Vrrp::start(segment.host(1), 1)?];
    all[0].elect()?;
    one_owner(&all)?;
    // Awake it would put the address back between the two.
    all[0].signal("STOP")?;
    segment
        .host(1)
        .exec(&format!("ip address del {VIP}/32 dev eth0; ip address add {VIP}/32 dev eth0"))?
        .ok()?;
    thread::sleep(Duration::from_millis(1500));
    all[0].signal("CONT")?;
    let trouble = command::until("a reason", SOON, || {
        Ok(all[0].report().routers.first().and_then(|router| router.trouble.clone()))
    })?;
    ensure!(trouble.1.contains("another program"), "{trouble:?}");
    thread::sleep(Duration::from_secs(4));
    let shown = segment.host(1).exec("ip -oneline address show dev eth0")?.stdout;
    let line = shown.lines().find(|line| line.contains(&format!(" {VIP}/32 "))).unwrap_or_default();
    ensure!(line.contains("valid_lft forever"), "its address was changed or removed: {shown}");
    Ok(())
}

#[test]
fn an_owner_that_was_paused_hears_first_who_took_over() -> Result<()> {
    let segment = Segment::new(3)?;
    let all = three(&segment)?;
    let owner = one_owner(&all)?;
    all[owner].signal("STOP")?;
    let rest: Vec<usize> = (0..3).filter(|index| *index != owner).collect();
    let next = command::until("a successor", SOON, || {
        Ok(rest.iter().copied().find(|i| all[*i].state() == VrrpState::Master))
    })?;
    // Long enough for the kernel to take the address off the paused one.
    thread::sleep(Duration::from_secs(4));
    ensure!(!all[owner].is_bound()?, "the address outlived its lifetime");
    all[owner].signal("CONT")?;
    command::until("the old owner to step back", SOON, || {
        Ok((all[owner].state() == VrrpState::Backup).then_some(()))
    })?;
    still(&all, next)
}

#[test]
fn an_election_that_is_left_and_ordered_again_is_entered_again() -> Result<()> {
    let segment = Segment::new(1)?;
    let all = [Vrrp::start(segment.host(1), 1)?];
    all[0].elect()?;
    one_owner(&all)?;
    // It is still handing over when it is wanted again.
    all[0].order(Order::Elect(Elect::default()))?;
    all[0].elect()?;
    command::until("the address to go", SOON, || Ok((!all[0].is_bound()?).then_some(())))?;
    one_owner(&all)?;
    Ok(())
}

#[test]
fn a_takeover_is_announced_on_the_wire() -> Result<()> {
    let segment = Segment::new(2)?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    let capture =
        "timeout 20 tcpdump -ni eth0 -c 5 -e arp and arp[14:4] = 0x0a570232 and arp[24:4] = 0x0a570232 2>&1";
    let seen = thread::scope(|scope| -> Result<command::Output> {
        let sniffer = scope.spawn(|| segment.host(2).exec(capture));
        thread::sleep(Duration::from_secs(1));
        vrrp.elect()?;
        sniffer.join().ok().context("tcpdump ended badly")?
    })?;
    let announcements = seen.stdout.lines().filter(|line| {
        line.contains("> ff:ff:ff:ff:ff:ff")
            && line.contains(&format!("who-has {VIP}"))
            && line.contains("tell")
    });
    ensure!(announcements.count() == 5, "{}", seen.stdout);
    let mac = segment.host(1).mac()?;
    ensure!(seen.stdout.contains(&mac), "{mac} is not in {}", seen.stdout);
    Ok(())
}

#[test]
fn without_the_capabilities_it_says_so_and_goes_on() -> Result<()> {
    let segment = Segment::new(1)?;
    for capability in ["NET_RAW", "NET_ADMIN"] {
        let vrrp = Vrrp::start_without(segment.host(1), 1, &capability.to_lowercase())?;
        vrrp.elect()?;
        let trouble = command::until("a reason", SOON, || {
            Ok(vrrp.report().routers.first().and_then(|router| router.trouble.clone()))
        })?;
        ensure!(trouble.0 == Reason::NotPermitted && trouble.1.contains(capability), "{trouble:?}");
    }
    Ok(())
}

#[test]
fn a_report_names_interfaces_without_the_virtual_ips() -> Result<()> {
    let segment = Segment::new(1)?;
    let vrrp = Vrrp::start(segment.host(1), 1)?;
    vrrp.elect()?;
    let all = [vrrp];
    one_owner(&all)?;
    thread::sleep(Duration::from_millis(1200));
    let report = all[0].report();
    let addresses: Vec<IpAddr> =
        report.interfaces.iter().flat_map(|i| &i.addresses).map(|net| net.addr()).collect();
    ensure!(addresses.contains(&IpAddr::V4(segment.host(1).address())), "{addresses:?}");
    ensure!(!addresses.contains(&IpAddr::V4(VIP)), "{addresses:?}");
    Ok(())
}
