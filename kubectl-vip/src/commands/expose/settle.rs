//! After the writing: waiting for owners, what they find out about an address, and what is said in the end.

use std::net::IpAddr;
use std::time::Instant;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Condition;
use kube::ResourceExt;
use vip_core::api::{CONDITION_ANNOUNCED, CONDITION_CONFLICT, Reason, ServiceRef, VirtualIP};

use super::{Expose, Exposed, LOOK, Origin, WAIT};
use crate::cli::DryRun;
use crate::commands::unexpose::release;
use crate::exit::{Failure, Result};
use crate::mirror::Mirror;
use crate::output::{self, PENDING, say};
use crate::wait::{self, Ended, Look};

/// How waiting for an owner ended.
enum Settled {
    /// Somebody owns it, or nobody was to wait.
    Well,
    /// Nobody does, and why.
    Late(String),
    /// Another machine uses the address: whose.
    InUse(String),
}

impl Expose<'_> {
    /// Waits for owners as asked, and prints what there is.
    pub(super) async fn report(&mut self, done: Vec<Exposed>, patient: bool) -> Result<()> {
        let change = &self.args.change;
        let timeout = self.args.timeout.unwrap_or(if self.args.wait == Some(true) { WAIT } else { LOOK });
        let deadline = Instant::now() + timeout;
        let (mut shown, mut failed) = (Vec::new(), None);
        if patient {
            self.tell(&done);
        }
        for mut exposed in done {
            let what = match exposed.origin {
                Origin::Before => Some(" (unchanged)".to_owned()),
                Origin::Configured => Some(format!(" (configured){}", change.dry_run.suffix())),
                Origin::Named | Origin::Drawn(_) => None,
            };
            if let Some(what) = what {
                let Exposed { at, vip, pool, .. } = exposed;
                shown.push((format!("{}{what}", sentence(&at, &vip, &pool)), vip));
                continue;
            }
            if change.dry_run != DryRun::None {
                let Exposed { at, vip, pool, .. } = exposed;
                let (address, suffix) = (&vip.spec.address, change.dry_run.suffix());
                shown.push((format!("service/{} exposed: {address} (pool {pool}){suffix}", at.name), vip));
                continue;
            }
            match self.settle(&mut exposed, patient, deadline).await {
                Err(failure) => {
                    failed.get_or_insert(failure);
                    if !exposed.bound {
                        continue;
                    }
                }
                Ok(Some(reason)) => {
                    let address = &exposed.vip.spec.address;
                    if self.args.wait == Some(true) {
                        let failure = wait::timed_out(&format!("an owner of {address}"), timeout, &reason);
                        failed.get_or_insert(failure);
                    } else {
                        say(format!("no owner yet: {reason}; see: kubectl vip status {address}"));
                    }
                }
                Ok(None) => {}
            }
            let Exposed { at, vip, pool, .. } = exposed;
            shown.push((sentence(&at, &vip, &pool), vip));
        }
        match change.output {
            None => shown.into_iter().for_each(|(line, _)| output::line(line)),
            Some(format) => {
                let objects: Vec<VirtualIP> = shown.iter().map(|(_, vip)| output::bare(vip)).collect();
                // Where nothing was done, there is an error.
                if !objects.is_empty() {
                    output::objects(&objects, format)?;
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }

    /// Says what was written, before it is waited for in turn: a run that is cut off has said all that it did.
    fn tell(&self, done: &[Exposed]) {
        let is_new = |exposed: &&Exposed| matches!(exposed.origin, Origin::Named | Origin::Drawn(_));
        let new: Vec<String> = done
            .iter()
            .filter(is_new)
            .map(|exposed| format!("{} to service {}", exposed.vip.spec.address, exposed.at))
            .collect();
        if new.len() > 1 && self.dry_run() == DryRun::None && self.args.wait != Some(false) {
            say(format!("bound: {}", new.join(", ")));
        }
    }

    /// Waits for an owner; an address that another machine uses is given back, and another one drawn. Why there is no owner yet.
    async fn settle(
        &mut self,
        exposed: &mut Exposed,
        patient: bool,
        deadline: Instant,
    ) -> Result<Option<String>> {
        if !patient || self.args.wait == Some(false) {
            return Ok(None);
        }
        loop {
            let whose = match self.owned(&mut exposed.vip, deadline).await? {
                Settled::Well => return Ok(None),
                Settled::Late(reason) => return Ok(Some(reason)),
                Settled::InUse(whose) => whose,
            };
            if exposed.vip.spec.services.len() > 1 {
                return Ok(Some(whose));
            }
            let address = exposed.vip.spec.address.clone();
            release(self.cluster, &exposed.vip, DryRun::None).await?;
            exposed.bound = false;
            self.world.vips.retain(|other| other.name_any() != exposed.vip.name_any());
            let Origin::Drawn(wish) = &exposed.origin else {
                return Err(Failure::new(format!("{whose}; service {} is not exposed", exposed.at))
                    .hint(format!("kubectl vip pool set {} --exclude {address}", exposed.pool)));
            };
            say(format!("{whose}: next free address taken instead"));
            self.avoided.extend(address.parse::<IpAddr>());
            let (service, applicant, family) = wish.as_ref();
            (exposed.vip, exposed.pool) = self.draw(*family, applicant, service).await?;
            exposed.bound = true;
            self.world.know(&exposed.vip);
        }
    }

    /// The virtual IP once it is decided who has it, or as it was last.
    async fn owned(&self, vip: &mut VirtualIP, deadline: Instant) -> Result<Settled> {
        if self.args.wait.is_none() && self.nodes.as_ref().is_some_and(Vec::is_empty) {
            return Ok(Settled::Late("no vip-node has reported to the cluster".to_owned()));
        }
        let mut mirror = Mirror::of(self.cluster.vips(), vip);
        let left = deadline.saturating_duration_since(Instant::now());
        let ended = wait::until(&format!("an owner of {}", vip.spec.address), left, async || {
            let now = mirror.look().await?.next().cloned();
            *vip = now.ok_or_else(|| {
                Failure::new(format!("virtual IP {} was deleted meanwhile", vip.spec.address))
            })?;
            Ok(look(vip))
        })
        .await?;
        Ok(match ended {
            Ended::Done(settled) => settled,
            Ended::TimedOut(reason) => Settled::Late(reason),
        })
    }
}

/// Whether somebody owns and announces the address, or why not.
fn look(vip: &VirtualIP) -> Look<Settled> {
    let status = vip.status.clone().unwrap_or_default();
    let condition =
        |kind: &str| -> Option<&Condition> { status.conditions.iter().find(|found| found.type_ == kind) };
    let in_use = Reason::AddressInUse.to_string();
    if let Some(conflict) = condition(CONDITION_CONFLICT)
        && conflict.status == "True"
        && conflict.reason == in_use
    {
        // What follows is advice for an address that is to stay.
        let whose = conflict.message.split(": ").next().unwrap_or_default();
        return Look::Done(Settled::InUse(whose.to_owned()));
    }
    match (&status.node, condition(CONDITION_ANNOUNCED)) {
        (Some(_), Some(condition)) if condition.status == "True" => Look::Done(Settled::Well),
        (_, Some(condition)) => Look::NotYet(format!("{}: {}", condition.reason, condition.message)),
        (_, None) => Look::NotYet("no node has taken it".to_owned()),
    }
}

/// `service/web exposed: 192.168.10.241 (pool lab, owner node-2, 3 backends)`.
fn sentence(at: &ServiceRef, vip: &VirtualIP, pool: &str) -> String {
    let status = vip.status.clone().unwrap_or_default();
    let owner = status.node.as_deref().unwrap_or(PENDING);
    let backends = match (status.node.is_some(), status.backends.ready, status.backends.total) {
        (false, ..) => format!("{PENDING} backends"),
        (true, 1, 1) => "1 backend".to_owned(),
        (true, ready, total) if ready == total => format!("{total} backends"),
        (true, ready, total) => format!("{ready}/{total} backends"),
    };
    format!("service/{} exposed: {} (pool {pool}, owner {owner}, {backends})", at.name, vip.spec.address)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn vip(status: serde_json::Value) -> VirtualIP {
        serde_json::from_value(json!({
            "metadata": {"name": "192.168.10.241"},
            "spec": {"address": "192.168.10.241", "virtualRouter": 100, "services": [{"namespace": "shop", "name": "web"}]},
            "status": status,
        }))
        .unwrap()
    }

    fn said(status: serde_json::Value) -> String {
        let vip = vip(status);
        sentence(&vip.spec.services[0], &vip, "lab")
    }

    #[test]
    fn what_is_printed() {
        assert_eq!(
            said(json!({"node": "node-2", "backends": {"ready": 3, "total": 3}})),
            "service/web exposed: 192.168.10.241 (pool lab, owner node-2, 3 backends)"
        );
        assert!(
            said(json!({"node": "node-2", "backends": {"ready": 1, "total": 3}})).ends_with("1/3 backends)")
        );
        assert!(
            said(json!({"node": "node-2", "backends": {"ready": 1, "total": 1}})).ends_with("1 backend)")
        );
        assert!(said(json!({})).ends_with("owner <pending>, <pending> backends)"));
    }

    #[test]
    fn an_owner_is_one_that_announces() {
        let condition = |kind: &str, status: &str, reason: &str, message: &str| {
            json!({"type": kind, "status": status, "reason": reason, "message": message,
                   "lastTransitionTime": "2026-01-01T00:00:00Z"})
        };
        let announced =
            |status: &str| json!([condition("Announced", status, "NoCandidate", "no node has the subnet")]);
        let well = look(&vip(json!({"node": "n", "conditions": announced("True")})));
        assert!(matches!(well, Look::Done(Settled::Well)));
        let Look::NotYet(reason) = look(&vip(json!({"conditions": announced("False")}))) else {
            panic!("nobody owns it")
        };
        assert_eq!(reason, "NoCandidate: no node has the subnet");
        assert!(matches!(look(&vip(json!({}))), Look::NotYet(_)));

        let used = "fd87::5 is used by 52:54:00:aa:bb:cc (eth0 on node-2): it is not bound; exclude it";
        let used = json!([condition("Conflict", "True", "AddressInUse", used)]);
        let Look::Done(Settled::InUse(whose)) = look(&vip(json!({"conditions": used}))) else {
            panic!("another machine has it")
        };
        assert_eq!(whose, "fd87::5 is used by 52:54:00:aa:bb:cc (eth0 on node-2)");
    }
}
