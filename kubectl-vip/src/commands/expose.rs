//! `expose`: draws an address and binds it to a Service.
//!
//! The API server decides who gets an address: the name of a VirtualIP is its address, so the second to create it is
//! told that it exists, and takes the next one.

pub mod choice;
pub mod service;

use std::net::IpAddr;
use std::time::Duration;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use vip_core::api::{
    CONDITION_ANNOUNCED, PLUGIN_MANAGER, ServiceRef, VIPNode, VirtualIP, VirtualIPSpec, name_of,
};
use vip_core::pool::parse_address;
use vip_core::validate::{CheckedPool, MAX_PERSISTENCE_SECONDS, MAX_SERVICES};
use vip_core::vrrp::Family;

use self::choice::{Applicant, World, belongs};
use crate::cli::target::Target;
use crate::cli::{DryRun, ExposeArgs};
use crate::cluster::{Cluster, is_conflict, present, silence};
use crate::commands::version;
use crate::exit::{Failure, Result};
use crate::output::{self, PENDING, say};
use crate::wait::{self, Ended, Look};

/// How long an owner is looked for when nobody asked to wait.
const LOOK: Duration = Duration::from_secs(10);
/// How long `--wait` waits.
const WAIT: Duration = Duration::from_secs(60);
/// After so many addresses taken by others in a row, the list of virtual IPs is read again.
const STALE_AFTER: usize = 3;

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &ExposeArgs) -> Result<()> {
    let name = Target::service(&args.service)?;
    if cluster.namespace.is_empty() {
        return Err(Failure::new("the namespace is empty: name it with -n"));
    }
    let persistence = args.persistence.map(persistence_seconds).transpose()?;

    let (service, pools, vips, nodes) = futures::join!(
        cluster.service(&name),
        cluster.list_pools(),
        cluster.list_vips(),
        cluster.list_nodes()
    );
    let service = service?;
    let nodes = nodes?;
    let world = World::new(pools?, vips?, nodes.as_deref().unwrap_or_default(), Timestamp::now());
    version::refuse_skew(nodes.as_deref().unwrap_or_default())?;
    let applicant = Applicant {
        at: service::reference(&service),
        families: service::families(&service),
        alone: service::is_local(&service),
    };
    let expose = Expose { cluster, args, applicant, persistence, nodes };

    let exposed: Vec<&VirtualIP> = world.of(&expose.applicant.at).collect();
    if let Some(vip) = exposed.first() {
        return expose.already(&world, vip, &exposed);
    }
    service::check(cluster, &service).await?;
    let (vip, pool) = match &args.ip {
        Some(ip) => expose.take(&world, ip, &service).await?,
        None => expose.draw(world, &service).await?,
    };
    expose.report(vip, &pool).await
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
    applicant: Applicant,
    persistence: Option<u32>,
    /// `None`: the user may not see them.
    nodes: Option<Vec<VIPNode>>,
}

impl Expose<'_> {
    fn dry_run(&self) -> DryRun {
        self.args.change.dry_run
    }

    /// The Service has an address: says where, unless another one was asked for.
    fn already(&self, world: &World, vip: &VirtualIP, all: &[&VirtualIP]) -> Result<()> {
        let addresses: Vec<&str> = all.iter().map(|vip| vip.spec.address.as_str()).collect();
        let has = |ip: &str| parse_address(ip).is_ok_and(|ip| addresses.contains(&ip.to_string().as_str()));
        let other_ip = self.args.ip.as_deref().is_some_and(|ip| !has(ip));
        let pool = world.pool_name(&vip.spec.address);
        let other_pool = self.args.pool.is_some() && self.args.pool.as_deref() != pool;
        if other_ip || other_pool {
            return Err(Failure::new(format!(
                "service {} is already exposed at {}",
                self.applicant.at,
                addresses.join(", ")
            ))
            .hint(format!(
                "kubectl vip unexpose svc/{} -n {}",
                self.applicant.at.name, self.applicant.at.namespace
            )));
        }
        if let Some(format) = self.args.change.output {
            return output::document(&output::bare(vip), format);
        }
        // What an owner wrote that has fallen silent since is no news.
        let mut vip = vip.clone();
        if let Some(status) = vip.status.as_mut().filter(|status| self.is_silent(status.node.as_deref())) {
            status.node = None;
        }
        output::line(format!(
            "{} (unchanged)",
            sentence(&self.applicant.at, &vip, pool.unwrap_or(output::NONE))
        ));
        Ok(())
    }

    fn is_silent(&self, owner: Option<&str>) -> bool {
        let (Some(owner), Some(nodes)) = (owner, &self.nodes) else { return false };
        let node = nodes.iter().find(|node| node.name_any() == owner);
        node.is_none_or(|node| silence(node, Timestamp::now()).is_some())
    }

    /// `--ip`: this address or none.
    async fn take(&self, world: &World, ip: &str, service: &Service) -> Result<(VirtualIP, String)> {
        let (address, pool) = world.pool_of_ip(ip, &self.applicant)?;
        if let Some(vip) = world.vip(address) {
            let vip = self.join(vip, service).await?;
            return Ok((vip, pool.name.clone()));
        }
        match self.create(world, pool, address).await? {
            Ok(vip) => Ok((vip, pool.name.clone())),
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                // Somebody was faster: it is theirs, or shared with them.
                let vip = self.cluster.vips().get(&name_of(address)).await?;
                let vip = self.join(&vip, service).await?;
                Ok((vip, pool.name.clone()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The lowest free address of the pools in question.
    async fn draw(&self, mut world: World, service: &Service) -> Result<(VirtualIP, String)> {
        let wanted = self.args.pool.as_deref();
        if self.args.share
            && let Some((vip, pool)) = self.share_any(&world, service).await?
        {
            return Ok((vip, pool));
        }
        let mut taken = world.taken();
        let mut lost = 0;
        loop {
            let (family, pools) = world.pools_for(&self.applicant, wanted)?;
            let Some((pool, address)) = world.free(family, &pools, &taken) else {
                return Err(world.exhausted(family, &pools, &self.applicant.at.namespace, &taken));
            };
            match self.create(&world, pool, address).await? {
                Ok(vip) => return Ok((vip, pool.name.clone())),
                Err(kube::Error::Api(status)) if status.is_already_exists() => {
                    taken.insert(address);
                    lost += 1;
                }
                Err(error) => return Err(error.into()),
            }
            if lost >= STALE_AFTER {
                lost = 0;
                let (pools, vips) = futures::join!(self.cluster.list_pools(), self.cluster.list_vips());
                let nodes = self.nodes.as_deref().unwrap_or_default();
                world = World::new(pools?, vips?, nodes, Timestamp::now());
                taken = world.taken();
            }
        }
    }

    /// `--share` without `--ip`: the first address of this namespace's Services whose ports leave room.
    async fn share_any(&self, world: &World, service: &Service) -> Result<Option<(VirtualIP, String)>> {
        let (family, pools) = world.pools_for(&self.applicant, self.args.pool.as_deref())?;
        for vip in &world.vips {
            let ours = vip.spec.address.parse().is_ok_and(|address| Family::of(address) == family)
                && !vip.spec.services.is_empty()
                && vip.spec.services.len() < MAX_SERVICES
                && vip.spec.services.iter().all(|s| s.namespace == self.applicant.at.namespace);
            let pool =
                world.pool_name(&vip.spec.address).filter(|name| pools.iter().any(|p| p.name == *name));
            let (true, Some(pool)) = (ours, pool) else { continue };
            if self.clash(vip, service).await?.is_none() {
                return Ok(Some((self.join(vip, service).await?, pool.to_owned())));
            }
        }
        Ok(None)
    }

    /// Creates the virtual IP; the inner error is the API server's.
    async fn create(
        &self,
        world: &World,
        pool: &CheckedPool,
        address: IpAddr,
    ) -> Result<kube::Result<VirtualIP>> {
        let vip = VirtualIP::new(
            &name_of(address),
            VirtualIPSpec {
                address: address.to_string(),
                services: vec![self.applicant.at.clone()],
                virtual_router: world.virtual_router(pool, address, &self.applicant)?,
                scheduler: self.args.scheduler.unwrap_or_default(),
                persistence_seconds: self.persistence,
                preferred_node: None,
                health_check: None,
            },
        );
        let params = PostParams {
            dry_run: self.dry_run() == DryRun::Server,
            field_manager: Some(PLUGIN_MANAGER.to_owned()),
        };
        match self.dry_run() {
            DryRun::Client => Ok(Ok(vip)),
            DryRun::None | DryRun::Server => Ok(self.cluster.vips().create(&params, &vip).await),
        }
    }

    /// Adds the Service to an address that others have.
    async fn join(&self, vip: &VirtualIP, service: &Service) -> Result<VirtualIP> {
        const TRIES: usize = 10;
        let mut vip = vip.clone();
        for _ in 0..TRIES {
            if vip.spec.services.contains(&self.applicant.at) {
                return Ok(vip);
            }
            if !self.args.share || vip.spec.services.is_empty() {
                let failure = Failure::new(belongs(&vip));
                return Err(match vip.spec.services.is_empty() {
                    true => failure,
                    false => failure.hint("--share puts several Services on one address, on different ports"),
                });
            }
            if vip.spec.services.len() >= MAX_SERVICES {
                return Err(Failure::new(format!(
                    "{} has {MAX_SERVICES} Services, more do not fit one address",
                    vip.spec.address
                )));
            }
            if let Some(clash) = self.clash(&vip, service).await? {
                return Err(Failure::new(clash));
            }
            let mut services = vip.spec.services.clone();
            services.push(self.applicant.at.clone());
            if self.dry_run() == DryRun::Client {
                vip.spec.services = services;
                return Ok(vip);
            }
            // With the version that was looked at: another Service cannot slip in between.
            let patch = json!({
                "metadata": {"resourceVersion": vip.metadata.resource_version},
                "spec": {"services": services},
            });
            let params = PatchParams {
                dry_run: self.dry_run() == DryRun::Server,
                field_manager: Some(PLUGIN_MANAGER.to_owned()),
                ..PatchParams::default()
            };
            match self.cluster.vips().patch(&vip.name_any(), &params, &Patch::Merge(patch)).await {
                Ok(vip) => return Ok(vip),
                Err(error) if is_conflict(&error) => vip = self.cluster.vips().get(&vip.name_any()).await?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(Failure::new(format!("{} keeps changing: others write to it all the time", vip.spec.address))
            .hint("run the command again"))
    }

    /// The sentence about a port that a Service of this address has already.
    async fn clash(&self, vip: &VirtualIP, service: &Service) -> Result<Option<String>> {
        let wanted = service::ports(service);
        for other in &vip.spec.services {
            // A Service that is gone, or that may not be read, cannot be compared; the agents report a clash as well.
            let services = self.cluster.services(&other.namespace);
            let Ok(Some(theirs)) = present(services.get(&other.name).await) else { continue };
            if let Some((protocol, port)) = service::ports(&theirs).intersection(&wanted).next() {
                return Ok(Some(format!(
                    "{protocol} port {port} of {} belongs to service {other}, so service {} cannot share the address",
                    vip.spec.address, self.applicant.at
                )));
            }
        }
        Ok(None)
    }

    /// Waits for an owner as asked, and prints the result.
    async fn report(&self, vip: VirtualIP, pool: &str) -> Result<()> {
        let change = &self.args.change;
        if change.dry_run != DryRun::None {
            match change.output {
                Some(format) => output::document(&output::bare(&vip), format)?,
                None => output::line(format!(
                    "service/{} exposed: {} (pool {pool}){}",
                    self.applicant.at.name,
                    vip.spec.address,
                    change.dry_run.suffix()
                )),
            }
            return Ok(());
        }
        let (vip, missing) = self.settled(vip).await?;
        match change.output {
            Some(format) => output::document(&output::bare(&vip), format)?,
            None => output::line(sentence(&self.applicant.at, &vip, pool)),
        }
        match missing {
            None => Ok(()),
            Some((reason, timeout)) if self.args.wait == Some(true) => {
                Err(wait::timed_out(&format!("an owner of {}", vip.spec.address), timeout, &reason))
            }
            Some((reason, _)) => {
                say(format!("no owner yet: {reason}; see: kubectl vip status {}", vip.spec.address));
                Ok(())
            }
        }
    }

    /// The virtual IP once somebody owns it, or as it was last and why nobody does.
    async fn settled(&self, vip: VirtualIP) -> Result<(VirtualIP, Option<(String, Duration)>)> {
        if self.args.wait == Some(false) {
            return Ok((vip, None));
        }
        let timeout = self.args.timeout.unwrap_or(if self.args.wait == Some(true) { WAIT } else { LOOK });
        if self.args.wait.is_none() && self.nodes.as_ref().is_some_and(Vec::is_empty) {
            return Ok((vip, Some(("no vip-node has reported to the cluster".to_owned(), timeout))));
        }
        let (vips, name) = (self.cluster.vips(), vip.name_any());
        let mut last = vip;
        let ended = wait::until(&format!("an owner of {}", last.spec.address), timeout, async || {
            last = vips.get(&name).await?;
            Ok(look(&last))
        })
        .await?;
        match ended {
            Ended::Done(()) => Ok((last, None)),
            Ended::TimedOut(reason) => Ok((last, Some((reason, timeout)))),
        }
    }
}

/// Whether somebody owns and announces the address, or why not.
fn look(vip: &VirtualIP) -> Look<()> {
    let status = vip.status.clone().unwrap_or_default();
    let announced = status.conditions.iter().find(|condition| condition.type_ == CONDITION_ANNOUNCED);
    match (&status.node, announced) {
        (Some(_), Some(condition)) if condition.status == "True" => Look::Done(()),
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
        let announced = |status: &str| {
            json!([{"type": "Announced", "status": status, "reason": "NoCandidate", "message": "no node has the subnet",
                    "lastTransitionTime": "2026-01-01T00:00:00Z"}])
        };
        assert!(matches!(look(&vip(json!({"node": "n", "conditions": announced("True")}))), Look::Done(())));
        let Look::NotYet(reason) = look(&vip(json!({"conditions": announced("False")}))) else {
            panic!("nobody owns it")
        };
        assert_eq!(reason, "NoCandidate: no node has the subnet");
        assert!(matches!(look(&vip(json!({}))), Look::NotYet(_)));
    }

    #[test]
    fn persistence_is_at_most_a_day() {
        assert_eq!(persistence_seconds(Duration::from_secs(1800)), Ok(1800));
        assert!(persistence_seconds(Duration::from_millis(10)).is_err());
        assert!(persistence_seconds(Duration::from_secs(86_401)).is_err());
    }
}
