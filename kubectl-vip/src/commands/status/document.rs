//! The status as data, for programs: numbers and times instead of words for people, `null` for what nobody knows.

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use serde::Serialize;
use serde_json::{Value, json};
use vip_core::api::{ServiceRef, VirtualIP};
use vip_core::pool::used;
use vip_core::validate::{CheckedPool, check_pools, pool_of};

use super::detail::Detail;
use super::{Report, Scope, View};
use crate::commands::pool::taken;
use crate::commands::version::versions;
use crate::judge::{self, Judge, count};
use crate::output::{self, PENDING, UNKNOWN};

/// A Service at an address.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct Item<'a> {
    namespace: Option<&'a str>,
    service: Option<&'a str>,
    vip: &'a str,
    pool: Option<&'a str>,
    /// `None`: nobody, or nobody knows who.
    owner: Option<&'a str>,
    owner_since: Option<&'a Time>,
    backends: Option<Value>,
    status: &'a str,
    created: Option<&'a Time>,
    virtual_router: u8,
    scheduler: &'static str,
    persistence_seconds: Option<u32>,
    preferred_node: Option<&'a str>,
    #[serde(skip_serializing_if = "Option::is_none")]
    details: Option<Value>,
}

/// All that was read, of what was asked for; with `details`, in the order of `shown`, of what was named.
pub fn of(view: &View, scope: &Scope, shown: &[&VirtualIP], details: &[Detail], report: &Report) -> Value {
    let judge = Judge::new(view.nodes.as_deref(), view.now);
    let (pools, _) = check_pools(view.pools.iter().flatten());
    let mut items = Vec::new();
    for (place, vip) in shown.iter().enumerate() {
        let verdict = judge.judge(vip);
        let pool = vip.spec.address.parse().ok().and_then(|address| pool_of(&pools, address));
        for service in super::services(vip, scope) {
            let details = details.get(place).map(|detail| whole(vip, detail));
            items.push(item(vip, service, pool.map(|pool| pool.name.as_str()), &verdict, details));
        }
    }
    let taken = taken(&view.vips);
    let share = |pool: &CheckedPool| {
        json!({
            "name": pool.name,
            "used": used(&pool.addresses, &taken),
            "total": pool.addresses.len_u64(),
        })
    };
    let agents = view.agents.as_ref().map(|sets| {
        let (ready, desired) = count(sets);
        json!({"installed": !sets.is_empty(), "ready": ready, "desired": desired})
    });
    let hidden = [
        ("vippools.kubectl-vip.io", view.pools.is_none()),
        ("vipnodes.kubectl-vip.io", view.nodes.is_none()),
        ("daemonsets.apps", view.agents.is_none()),
        ("endpointslices.discovery.k8s.io", details.iter().any(|detail| detail.slices.is_none())),
        ("events", details.iter().any(|detail| detail.events.is_none())),
    ];
    let hidden: Vec<&str> =
        hidden.into_iter().filter(|(_, is_hidden)| *is_hidden).map(|(name, _)| name).collect();
    json!({
        "apiVersion": "cli.kubectl-vip.io/v1alpha1",
        "kind": "StatusList",
        "agents": agents,
        "versions": view.nodes.as_deref().map(|nodes| versions(nodes).into_keys().collect::<Vec<_>>()),
        "pools": view.pools.as_ref().map(|_| pools.iter().map(share).collect::<Vec<_>>()),
        "forbidden": hidden,
        "items": items,
        "problems": report.problems,
    })
}

fn item(
    vip: &VirtualIP,
    service: Option<&ServiceRef>,
    pool: Option<&str>,
    verdict: &judge::Verdict,
    details: Option<Value>,
) -> Value {
    let owner = Some(verdict.owner.as_str()).filter(|owner| ![PENDING, UNKNOWN].contains(owner));
    // What an owner wrote holds while it is known to be one.
    let status = vip.status.as_ref().filter(|_| owner.is_some());
    let item = Item {
        namespace: service.map(|service| service.namespace.as_str()),
        service: service.map(|service| service.name.as_str()),
        vip: &vip.spec.address,
        pool,
        owner,
        owner_since: status.and_then(|status| status.since.as_ref()),
        backends: status
            .filter(|_| service.is_some())
            .map(|status| json!({"ready": status.backends.ready, "total": status.backends.total})),
        // Without the time that people are told with it.
        status: verdict.status.split(" (").next().unwrap_or_default(),
        created: vip.metadata.creation_timestamp.as_ref(),
        virtual_router: vip.spec.virtual_router,
        scheduler: vip.spec.scheduler.as_str(),
        persistence_seconds: vip.spec.persistence_seconds,
        preferred_node: vip.spec.preferred_node.as_deref(),
        details,
    };
    json!(item)
}

/// The objects behind the details.
fn whole(vip: &VirtualIP, detail: &Detail) -> Value {
    json!({
        "virtualIP": output::bare(vip),
        "endpointSlices": detail.slices.as_ref().map(|all| all.iter().map(output::bare).collect::<Vec<_>>()),
        "events": detail.events.as_ref().map(|all| all.iter().map(output::bare).collect::<Vec<_>>()),
    })
}
