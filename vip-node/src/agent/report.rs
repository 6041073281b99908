//! From what holds on this node to what is written into the objects' status. Pure: the time comes in.

use std::collections::BTreeSet;
use std::net::IpAddr;

use ipnet::IpNet;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use vip_core::api::{
    CONDITION_ANNOUNCED, CONDITION_CONFLICT, CONDITION_PROGRAMMED, DataplaneStatus, ForeignRouterStatus,
    InterfaceStatus, PeerStatus, Reason, VIPNodeStatus, VirtualIP, VirtualIPStatus, VirtualRouterStatus,
};
use vip_core::desired::{Trouble, VipPlan};
use vip_core::plan::ServiceKey;
use vip_core::vrrp::{Family, Lan};

use super::programmer::Programmed;
use super::view::{is_link_local, is_on_a_lan};
use crate::link::{Claim, Report, RouterReport};

mod depth;

pub use depth::{destinations, handover};

/// What a virtual IP's status says of one moment.
struct Verdict {
    holds: bool,
    reason: Reason,
    message: String,
}

/// The status of a virtual IP that this node owns, but for what [`handover`] and [`destinations`] add.
pub fn owned(
    vip: &VirtualIP,
    plan: &VipPlan,
    node: &str,
    interface: &str,
    conflict: Option<&Trouble>,
    programmed: &Programmed,
    now: &Time,
) -> VirtualIPStatus {
    let previous = vip.status.as_ref();
    let mine = previous.filter(|status| status.node.as_deref() == Some(node));
    let address = &vip.spec.address;
    let announced = Verdict {
        holds: true,
        reason: Reason::Active,
        message: format!("{node} answers for {address} on {interface}"),
    };
    VirtualIPStatus {
        first_announced: previous.and_then(|s| s.first_announced.clone()).or_else(|| Some(now.clone())),
        node: Some(node.to_owned()),
        since: mine.and_then(|status| status.since.clone()).or_else(|| Some(now.clone())),
        backends: plan.backends,
        conditions: vec![
            condition(vip, CONDITION_ANNOUNCED, announced, now),
            condition(vip, CONDITION_PROGRAMMED, programming(plan, programmed), now),
            condition(vip, CONDITION_CONFLICT, conflicting(conflict), now),
        ],
        ..VirtualIPStatus::default()
    }
}

/// The status of a virtual IP that no node owns because another machine, or a node by other means, uses the address.
pub fn in_use(
    vip: &VirtualIP,
    plan: &VipPlan,
    conflict: &Trouble,
    programmed: &Programmed,
    now: &Time,
) -> VirtualIPStatus {
    let announced = Verdict { holds: false, reason: Reason::AddressInUse, message: conflict.message.clone() };
    VirtualIPStatus {
        backends: plan.backends,
        conditions: vec![
            condition(vip, CONDITION_ANNOUNCED, announced, now),
            condition(vip, CONDITION_PROGRAMMED, programming(plan, programmed), now),
            condition(vip, CONDITION_CONFLICT, conflicting(Some(conflict)), now),
        ],
        ..past(vip)
    }
}

/// Another machine's claim in words, as this node hears it.
pub fn claimed(claim: &Claim, node: &str) -> Trouble {
    let Claim { address, interface, mac, .. } = claim;
    let machine = format!("{} ({interface} on {node})", mac_text(*mac));
    if claim.yielded {
        let message = format!(
            "{address} is used by {machine}: it is not bound; take the address from that machine, or exclude it from the pool"
        );
        Trouble::new(Reason::AddressInUse, message)
    } else {
        let message = format!(
            "{machine} claims {address}, which is bound here and is announced against it; take the address from that machine"
        );
        Trouble::new(Reason::AddressClaimed, message)
    }
}

/// Another owner of ours in words.
pub fn rivalled(address: &str, rival: IpAddr, lan: &Lan) -> Trouble {
    let other = lan.peer(rival).map_or_else(|| rival.to_string(), |peer| format!("{} ({rival})", peer.node));
    let message = format!(
        "{other} believes that it owns {address} too, so it does not hear this node's advertisements: look at what is between them; the \
         node of higher priority keeps the address"
    );
    Trouble::new(Reason::TwoOwners, message)
}

fn conflicting(conflict: Option<&Trouble>) -> Verdict {
    match conflict {
        Some(trouble) => Verdict { holds: true, reason: trouble.reason, message: trouble.message.clone() },
        None => Verdict {
            holds: false,
            reason: Reason::NoConflict,
            message: "no other machine was heard to use the address".to_owned(),
        },
    }
}

fn mac_text(mac: [u8; 6]) -> String {
    mac.map(|byte| format!("{byte:02x}")).join(":")
}

/// The status of a virtual IP that no node owns.
pub fn unowned(vip: &VirtualIP, plan: &VipPlan, programmed: &Programmed, now: &Time) -> VirtualIPStatus {
    let announced = match (&plan.candidate, plan.troubles.first()) {
        (Err(_), Some(trouble)) => {
            Verdict { holds: false, reason: trouble.reason, message: trouble.message.clone() }
        }
        (Err(trouble), None) => Verdict {
            holds: false,
            reason: Reason::NoCandidate,
            message: format!("no node owns {}; for one, {}", vip.spec.address, trouble.message),
        },
        (Ok(_), _) => {
            let detail =
                programmed.trouble.as_ref().map(|t| format!("; for one, {}", t.message)).unwrap_or_default();
            Verdict {
                holds: false,
                reason: Reason::NoCandidate,
                message: format!("no node owns {}{detail}", vip.spec.address),
            }
        }
    };
    let programmed = if plan.candidate.is_err() && !plan.troubles.is_empty() {
        Verdict { holds: false, reason: announced.reason, message: announced.message.clone() }
    } else {
        programming(plan, programmed)
    };
    VirtualIPStatus {
        backends: plan.backends,
        conditions: vec![
            condition(vip, CONDITION_ANNOUNCED, announced, now),
            condition(vip, CONDITION_PROGRAMMED, programmed, now),
        ],
        ..past(vip)
    }
}

/// What stays true when nobody owns a virtual IP.
fn past(vip: &VirtualIP) -> VirtualIPStatus {
    let previous = vip.status.as_ref();
    VirtualIPStatus {
        first_announced: previous.and_then(|status| status.first_announced.clone()),
        last_handover: previous.and_then(|status| status.last_handover.clone()),
        ..VirtualIPStatus::default()
    }
}

/// The status of a virtual IP whose object cannot be read.
pub fn malformed(plan: &VipPlan, now: &Time) -> VirtualIPStatus {
    let (reason, message) =
        plan.troubles.first().map_or((Reason::Invalid, ""), |t| (t.reason, t.message.as_str()));
    let condition = |type_: &str| Condition {
        last_transition_time: now.clone(),
        message: message.to_owned(),
        observed_generation: None,
        reason: reason.to_string(),
        status: "False".to_owned(),
        type_: type_.to_owned(),
    };
    VirtualIPStatus {
        conditions: vec![condition(CONDITION_ANNOUNCED), condition(CONDITION_PROGRAMMED)],
        ..VirtualIPStatus::default()
    }
}

/// Whether the kernel serves all that the virtual IP's Services ask for.
fn programming(plan: &VipPlan, programmed: &Programmed) -> Verdict {
    let no = |reason, message: &str| Verdict { holds: false, reason, message: message.to_owned() };
    if let Some(Trouble { reason, message }) = programmed.trouble.as_ref().filter(|_| !plan.bare) {
        return no(*reason, message);
    }
    if let Some(key) = plan.keys.iter().find(|key| programmed.conflicts.contains(key)) {
        return no(
            Reason::ForeignEntry,
            &format!("another program has an IPVS service at {key}, it is left alone"),
        );
    }
    if let Some(trouble) = plan.keys.iter().find_map(|key| programmed.refused.get(key)) {
        return no(trouble.reason, &trouble.message);
    }
    if let Some(trouble) = plan.troubles.first() {
        return no(trouble.reason, &trouble.message);
    }
    if let Some(trouble) = plan.keys.iter().find_map(|key| programmed.substituted.get(key)) {
        return no(trouble.reason, &trouble.message);
    }
    if plan.bare {
        let message = "a bare address: all ports of its node answer".to_owned();
        return Verdict { holds: true, reason: Reason::NoServices, message };
    }
    let shunned = match (plan.shunned.first(), plan.shunned.len()) {
        (None, _) => String::new(),
        (Some(one), 1) => format!("; {one} does not pass its check"),
        (Some(one), all) => format!("; {one} and {} more do not pass their checks", all - 1),
    };
    let message = format!("{} ports are sent to {} backends{shunned}", plan.keys.len(), plan.backends.ready);
    Verdict { holds: true, reason: Reason::Programmed, message }
}

fn condition(vip: &VirtualIP, type_: &str, verdict: Verdict, now: &Time) -> Condition {
    let status = if verdict.holds { "True" } else { "False" }.to_owned();
    let previous =
        vip.status.iter().flat_map(|s| &s.conditions).find(|c| c.type_ == type_ && c.status == status);
    Condition {
        last_transition_time: previous.map_or_else(|| now.clone(), |c| c.last_transition_time.clone()),
        message: verdict.message,
        observed_generation: vip.metadata.generation,
        reason: verdict.reason.to_string(),
        status,
        type_: type_.to_owned(),
    }
}

/// The status of this node. `vips` has the virtual IPs that cannot be bound because nodes have the addresses: whoever has one says so.
/// Other interfaces than those on a LAN are not told.
pub fn node(
    report: Option<&Report>,
    programmed: &Programmed,
    lan: &Lan,
    vips: &BTreeSet<IpAddr>,
    previous: Option<&VIPNodeStatus>,
    now: &Time,
) -> VIPNodeStatus {
    let routers = report.map(|r| r.routers.as_slice()).unwrap_or_default();
    let mut status = VIPNodeStatus {
        renew_time: Some(now.clone()),
        agent_version: format!("v{}", env!("CARGO_PKG_VERSION")),
        virtual_routers: routers.iter().map(|router| router_status(router, previous, now)).collect(),
        dataplane: dataplane(report, programmed),
        firewalls: programmed.firewalls.as_ref().clone(),
        ..VIPNodeStatus::default()
    };
    for interface in report.iter().flat_map(|r| &r.interfaces) {
        let on_a_lan = is_on_a_lan(interface);
        let matters = |net: &&IpNet| on_a_lan || vips.contains(&net.addr());
        let addresses: Vec<String> =
            interface.addresses.iter().filter(matters).map(ToString::to_string).collect();
        if addresses.is_empty() {
            continue;
        }
        status.interfaces.push(InterfaceStatus {
            name: interface.name.clone(),
            mac: mac_text(interface.mac),
            addresses,
            carrier: interface.carrier,
            mtu: Some(interface.mtu),
        });
    }
    for peer in report.iter().flat_map(|r| &r.peers) {
        status.peers.push(PeerStatus {
            node: lan.peer(peer.address).map(|peer| peer.node.clone()),
            address: peer.address.to_string(),
            interface: peer.id.interface.clone(),
            virtual_router: peer.id.vrid,
            priority: peer.priority,
        });
    }
    for foreign in report.iter().flat_map(|r| &r.foreign) {
        status.foreign_routers.push(ForeignRouterStatus {
            address: foreign.address.to_string(),
            interface: foreign.id.interface.clone(),
            family: family(foreign.id.family),
            virtual_router: foreign.id.vrid,
            priority: foreign.priority,
        });
    }
    status.refused = report.map(|report| report.refused.clone()).unwrap_or_default();
    status
}

/// An address family as it is written into status.
pub fn family(family: Family) -> u8 {
    match family {
        Family::V4 => 4,
        Family::V6 => 6,
    }
}

fn router_status(router: &RouterReport, previous: Option<&VIPNodeStatus>, now: &Time) -> VirtualRouterStatus {
    let mut status = VirtualRouterStatus {
        interface: router.id.interface.clone(),
        family: family(router.id.family),
        virtual_router: router.id.vrid,
        state: router.state,
        priority: router.priority,
        since: now.clone(),
    };
    let same = previous.iter().flat_map(|p| &p.virtual_routers).find(|p| {
        (&p.interface, p.family, p.virtual_router, p.state)
            == (&status.interface, status.family, status.virtual_router, status.state)
    });
    if let Some(same) = same {
        status.since = same.since.clone();
    }
    status
}

/// Whether this node can serve, and if not, why.
pub fn dataplane(report: Option<&Report>, programmed: &Programmed) -> DataplaneStatus {
    let not = |reason, message: String| DataplaneStatus {
        ready: false,
        reason: Some(reason),
        message: Some(message),
    };
    if let Some(trouble) = &programmed.trouble {
        return not(trouble.reason, trouble.message.clone());
    }
    let Some(report) = report else {
        return not(Reason::VrrpUnavailable, "the process that elects and binds does not answer".to_owned());
    };
    if let Some(why) = &report.untaken {
        let message =
            format!("vrrp could not take the agent's last order, so the one before it stands: {why}");
        return not(Reason::VrrpUnavailable, message);
    }
    if let Some((reason, message)) = report.routers.iter().find_map(|router| router.trouble.clone()) {
        return not(reason, message);
    }
    // A node without IPv6 is not broken because others have virtual IPs of it.
    let has_family = |key: &ServiceKey| {
        let mut nets = report.interfaces.iter().flat_map(|interface| &interface.addresses);
        nets.any(|net| net.addr().is_ipv4() == key.address.is_ipv4() && !is_link_local(net.addr()))
    };
    if let Some((key, trouble)) = programmed.refused.iter().find(|(key, _)| has_family(key)) {
        return not(trouble.reason, format!("{key}: {}", trouble.message));
    }
    if programmed.generation.is_none() {
        return not(
            Reason::Starting,
            "the agent has just started and is about to look at the kernel".to_owned(),
        );
    }
    DataplaneStatus { ready: true, reason: Some(Reason::Ready), message: None }
}
