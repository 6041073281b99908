//! `expose`: draws an address of each family and binds it to a Service.
//!
//! All that can be refused is refused before anything is written, for all Services that are named. Whether another machine uses
//! an address its owner finds out, so that is heard while waiting for an owner.

mod bind;
pub mod choice;
pub mod service;
mod settle;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::core::v1::{Node, Service};
use kube::api::ListParams;
use kube::{Api, ResourceExt};
use vip_core::api::{ServiceRef, VIPNode, VirtualIP};
use vip_core::pool::parse_address;
use vip_core::validate::MAX_PERSISTENCE_SECONDS;
use vip_core::vrrp::Family;

use self::choice::{Applicant, World};
use crate::cli::target::Target;
use crate::cli::{DryRun, ExposeArgs};
use crate::cluster::{Cluster, permitted, silence};
use crate::commands::version;
use crate::exit::{Failure, Result};
use crate::output::{self, say};

/// How long an owner is looked for when nobody asked to wait.
const LOOK: Duration = Duration::from_secs(10);
/// How long `--wait` waits.
const WAIT: Duration = Duration::from_secs(60);

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &ExposeArgs) -> Result<()> {
    let names = Target::services(&args.service)?;
    if cluster.namespace.is_empty() {
        return Err(Failure::new("the namespace is empty: name it with -n"));
    }
    let ips = addresses(&args.ip)?;
    if names.len() > 1 && !ips.is_empty() && !args.share {
        return Err(Failure::new("several Services have the same address only when they share it")
            .hint("--share puts several Services on one address, on different ports"));
    }
    let persistence = args.persistence.map(persistence_seconds).transpose()?;

    let (services, pools, vips, nodes) = futures::join!(
        try_join_all(names.iter().map(|name| cluster.service(name))),
        cluster.list_pools(),
        cluster.list_vips(),
        cluster.list_nodes()
    );
    let (services, nodes) = (services?, nodes?);
    let mut world = World::new(pools?, vips?, nodes.as_deref().unwrap_or_default(), Timestamp::now());
    version::refuse_skew(nodes.as_deref().unwrap_or_default())?;
    if nodes.as_ref().is_none_or(Vec::is_empty) {
        world.add_hosts(&machines(cluster).await?);
    }
    let rehearsing = false;
    let mut expose =
        Expose { cluster, args, persistence, rehearsing, world, nodes, avoided: BTreeSet::new() };
    let mut plans = Vec::new();
    for service in services {
        plans.push(expose.plan(service, &ips).await?);
    }
    expose.rehearse(&plans).await?;
    let new = plans.iter().filter(|plan| !plan.wishes.is_empty());
    let new: Vec<String> = new.map(|plan| format!("service {}", plan.applicant.at)).collect();
    if args.change.dry_run == DryRun::None && !new.is_empty() {
        say(format!("Exposing {} in {}", new.join(", "), cluster.name()));
    }
    let mut done = Vec::new();
    let outcome = expose.carry_out(plans, &mut done).await;
    // Of a run that was cut off, what was done is said, and not waited for.
    let reported = expose.report(done, outcome.is_ok()).await;
    outcome.and(reported)
}

/// The addresses of `--ip`, one of each family at most.
fn addresses(texts: &[String]) -> Result<Vec<IpAddr>> {
    let mut all: Vec<IpAddr> = Vec::new();
    for text in texts {
        let address = parse_address(text).map_err(|error| Failure::new(format!("--ip {error}")))?;
        if let Some(other) = all.iter().find(|other| Family::of(**other) == Family::of(address)) {
            return Err(Failure::new(format!(
                "--ip {other},{address}: a Service gets one address of each family"
            )));
        }
        all.push(address);
    }
    Ok(all)
}

/// The nodes as Kubernetes knows them, for their addresses; none where they may not be read.
pub async fn machines(cluster: &Cluster) -> Result<Vec<Node>> {
    let nodes: Api<Node> = Api::all(cluster.client.clone());
    Ok(permitted(nodes.list(&ListParams::default()).await)?.map(|list| list.items).unwrap_or_default())
}

fn persistence_seconds(time: Duration) -> Result<u32> {
    u32::try_from(time.as_secs())
        .ok()
        .filter(|seconds| (1..=MAX_PERSISTENCE_SECONDS).contains(seconds))
        .ok_or_else(|| Failure::new("--persistence is 1s to 24h"))
}

struct Expose<'a> {
    cluster: &'a Cluster,
    args: &'a ExposeArgs,
    persistence: Option<u32>,
    /// Nothing is sent yet.
    rehearsing: bool,
    /// What there is, with what was written since.
    world: World,
    /// `None`: the user may not see them.
    nodes: Option<Vec<VIPNode>>,
    /// Addresses that other machines were found to use.
    avoided: BTreeSet<IpAddr>,
}

/// What one Service has and is to get.
#[derive(Clone)]
struct Plan {
    service: Service,
    applicant: Applicant,
    there: Vec<VirtualIP>,
    wishes: Vec<Wish>,
}

/// An address to be bound to a Service.
#[derive(Clone, Copy)]
enum Wish {
    /// This one.
    Address(IpAddr),
    /// Any of this family.
    Any(Family),
}

/// A Service and an address of its.
struct Exposed {
    at: ServiceRef,
    vip: VirtualIP,
    pool: String,
    origin: Origin,
    /// Whether the address is the Service's, as far as is known.
    bound: bool,
}

/// Where an address comes from.
enum Origin {
    /// The Service had it.
    Before,
    /// The Service had it, and its scheduler or persistence was another.
    Configured,
    /// From `--ip`.
    Named,
    /// It was drawn: for whom, and any of this family.
    Drawn(Box<(Service, Applicant, Family)>),
}

impl Expose<'_> {
    fn dry_run(&self) -> DryRun {
        if self.rehearsing { DryRun::Client } else { self.args.change.dry_run }
    }

    /// Does everything in mind first: where one address cannot be had, none is taken.
    async fn rehearse(&mut self, plans: &[Plan]) -> Result<()> {
        let world = self.world.clone();
        self.rehearsing = true;
        let outcome = self.carry_out(plans.to_vec(), &mut Vec::new()).await;
        (self.rehearsing, self.world) = (false, world);
        outcome
    }

    /// Addresses that may not be given out.
    fn taken(&self) -> BTreeSet<IpAddr> {
        let mut taken = self.world.taken();
        taken.extend(&self.avoided);
        taken
    }

    /// What is to be done for a Service, or why nothing can be.
    async fn plan(&self, service: Service, ips: &[IpAddr]) -> Result<Plan> {
        let applicant = Applicant {
            at: service::reference(&service),
            families: service::families(&service),
            alone: service::is_local(&service),
        };
        let there: Vec<VirtualIP> = self.world.of(&applicant.at).cloned().collect();
        if there.is_empty() {
            service::check(self.cluster, &service).await?;
        }
        let mut plan = Plan { service, applicant, there, wishes: Vec::new() };
        if ips.is_empty() {
            self.plan_any(&mut plan)?;
        }
        for ip in ips {
            match plan.in_family(Family::of(*ip)) {
                Some(vip) if vip.spec.address == ip.to_string() => {}
                Some(_) => return Err(plan.already()),
                None => {
                    self.world.pool_of_ip(*ip, &plan.applicant)?;
                    plan.wishes.push(Wish::Address(*ip));
                }
            }
        }
        if !ips.is_empty() {
            plan.there.retain(|vip| ips.iter().any(|ip| vip.spec.address == ip.to_string()));
        }
        let shared = |vip: &&VirtualIP| vip.spec.services.len() > 1 && !self.is_set(vip);
        match plan.there.iter().find(shared) {
            Some(vip) => Err(self.set_otherwise(vip)),
            None => Ok(plan),
        }
    }

    /// Of each family that the pools have, the Service gets an address.
    fn plan_any(&self, plan: &mut Plan) -> Result<()> {
        let wanted = self.args.pool.as_deref();
        let found = match self.world.pools_for(&plan.applicant, wanted) {
            Ok(found) => found,
            // It has what it asks for, from a pool that is no more, say.
            Err(_) if wanted.is_none() && !plan.there.is_empty() => return Ok(()),
            Err(failure) => return Err(failure),
        };
        for (family, _) in found {
            if let Some(vip) = plan.in_family(family) {
                if wanted.is_some() && self.world.pool_name(&vip.spec.address) != wanted {
                    return Err(plan.already());
                }
            } else {
                plan.wishes.push(Wish::Any(family));
            }
        }
        Ok(())
    }

    /// Writes what was planned; `done` has what has come to be, whatever happens.
    async fn carry_out(&mut self, plans: Vec<Plan>, done: &mut Vec<Exposed>) -> Result<()> {
        for Plan { service, applicant, there, wishes } in plans {
            for mut vip in there {
                let mut origin = Origin::Before;
                if !self.is_set(&vip) {
                    (vip, origin) = (self.configure(&vip).await?, Origin::Configured);
                    self.world.know(&vip);
                }
                // What an owner wrote that has fallen silent since is no news.
                if let Some(status) =
                    vip.status.as_mut().filter(|status| self.is_silent(status.node.as_deref()))
                {
                    status.node = None;
                }
                let pool = self.world.pool_name(&vip.spec.address).unwrap_or(output::NONE).to_owned();
                done.push(Exposed { at: applicant.at.clone(), vip, pool, origin, bound: true });
            }
            for wish in wishes {
                let ((vip, pool), origin) = match wish {
                    Wish::Address(ip) => (self.take(ip, &applicant, &service).await?, Origin::Named),
                    Wish::Any(family) => (
                        self.draw(family, &applicant, &service).await?,
                        Origin::Drawn(Box::new((service.clone(), applicant.clone(), family))),
                    ),
                };
                self.world.know(&vip);
                done.push(Exposed { at: applicant.at.clone(), vip, pool, origin, bound: true });
            }
        }
        Ok(())
    }

    fn is_silent(&self, owner: Option<&str>) -> bool {
        let (Some(owner), Some(nodes)) = (owner, &self.nodes) else { return false };
        let node = nodes.iter().find(|node| node.name_any() == owner);
        node.is_none_or(|node| silence(node, Timestamp::now()).is_some())
    }
}

impl Plan {
    /// What the Service has of a family.
    fn in_family(&self, family: Family) -> Option<&VirtualIP> {
        self.there.iter().find(|vip| is_of(vip, family))
    }

    /// It has an address, and another one was asked for.
    fn already(&self) -> Failure {
        let at = &self.applicant.at;
        let addresses: Vec<&str> = self.there.iter().map(|vip| vip.spec.address.as_str()).collect();
        Failure::new(format!("service {at} is already exposed at {}", addresses.join(", ")))
            .hint(format!("kubectl vip unexpose svc/{} -n {}", at.name, at.namespace))
    }
}

fn is_of(vip: &VirtualIP, family: Family) -> bool {
    vip.spec.address.parse().is_ok_and(|address| Family::of(address) == family)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_address_of_each_family() {
        let read = |texts: &[&str]| {
            let texts: Vec<String> = texts.iter().map(|text| (*text).to_owned()).collect();
            addresses(&texts).map_err(|failure| failure.to_string())
        };
        assert_eq!(read(&["10.0.0.9", "fd87::9"]).unwrap().len(), 2);
        assert_eq!(
            read(&["10.0.0.9", "10.0.0.8"]).unwrap_err(),
            "Error: --ip 10.0.0.9,10.0.0.8: a Service gets one address of each family"
        );
        assert!(read(&["10.0.0"]).unwrap_err().starts_with("Error: --ip "));
    }

    #[test]
    fn persistence_is_at_most_a_day() {
        assert_eq!(persistence_seconds(Duration::from_secs(1800)), Ok(1800));
        assert!(persistence_seconds(Duration::from_millis(10)).is_err());
        assert!(persistence_seconds(Duration::from_secs(86_401)).is_err());
    }
}
