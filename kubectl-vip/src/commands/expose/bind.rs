//! Writing what was planned. The API server decides who gets an address: the name of a VirtualIP is its address, so the second
//! to create it is told that it exists, and takes the next one.

use std::net::IpAddr;

use k8s_openapi::api::core::v1::Service;
use kube::ResourceExt;
use kube::api::{Patch, PatchParams, PostParams};
use serde_json::json;
use vip_core::api::{PLUGIN_MANAGER, VirtualIP, VirtualIPSpec, name_of};
use vip_core::validate::{CheckedPool, MAX_SERVICES};
use vip_core::vrrp::Family;

use super::choice::{Applicant, belongs};
use super::service;
use super::{Expose, is_of};
use crate::cli::DryRun;
use crate::cluster::{is_conflict, present};
use crate::exit::{Failure, Result};
use crate::output::span;

/// After so many addresses taken by others in a row, the list of virtual IPs is read again.
const STALE_AFTER: usize = 3;

impl Expose<'_> {
    /// `--ip`: this address or none.
    pub(super) async fn take(
        &self,
        address: IpAddr,
        applicant: &Applicant,
        service: &Service,
    ) -> Result<(VirtualIP, String)> {
        let pool = self.world.pool_of_ip(address, applicant)?;
        if let Some(vip) = self.world.vip(address) {
            let vip = self.join(vip, applicant, service).await?;
            return Ok((vip, pool.name.clone()));
        }
        match self.create(pool, address, applicant).await? {
            Ok(vip) => Ok((vip, pool.name.clone())),
            Err(kube::Error::Api(status)) if status.is_already_exists() => {
                // Somebody was faster: it is theirs, or shared with them.
                let vip = self.cluster.vips().get(&name_of(address)).await?;
                let vip = self.join(&vip, applicant, service).await?;
                Ok((vip, pool.name.clone()))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// The lowest free address of a family in the pools in question.
    pub(super) async fn draw(
        &mut self,
        family: Family,
        applicant: &Applicant,
        service: &Service,
    ) -> Result<(VirtualIP, String)> {
        let wanted = self.args.pool.as_deref();
        if self.args.share
            && let Some((vip, pool)) = self.share_any(family, applicant, service).await?
        {
            return Ok((vip, pool));
        }
        let mut taken = self.taken();
        let mut lost = 0;
        loop {
            let pools = self.world.pools_of(applicant, wanted, family)?;
            let Some((pool, address)) = self.world.free(family, &pools, &taken) else {
                return Err(self.world.exhausted(family, &pools, &applicant.at.namespace, &taken));
            };
            match self.create(pool, address, applicant).await? {
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
                self.world.renew(pools?, vips?);
                taken = self.taken();
            }
        }
    }

    /// `--share` without `--ip`: the first address of this namespace's Services whose ports leave room.
    async fn share_any(
        &self,
        family: Family,
        applicant: &Applicant,
        service: &Service,
    ) -> Result<Option<(VirtualIP, String)>> {
        let world = &self.world;
        let pools = world.pools_of(applicant, self.args.pool.as_deref(), family)?;
        for vip in &world.vips {
            let ours = is_of(vip, family)
                && !vip.spec.services.is_empty()
                && vip.spec.services.len() < MAX_SERVICES
                && vip.spec.services.iter().all(|s| s.namespace == applicant.at.namespace)
                && self.is_set(vip);
            let pool =
                world.pool_name(&vip.spec.address).filter(|name| pools.iter().any(|p| p.name == *name));
            let (true, Some(pool)) = (ours, pool) else { continue };
            if self.clash(vip, applicant, service).await?.is_none() {
                return Ok(Some((self.join(vip, applicant, service).await?, pool.to_owned())));
            }
        }
        Ok(None)
    }

    /// Creates the virtual IP; the inner error is the API server's.
    async fn create(
        &self,
        pool: &CheckedPool,
        address: IpAddr,
        applicant: &Applicant,
    ) -> Result<kube::Result<VirtualIP>> {
        let vip = VirtualIP::new(
            &name_of(address),
            VirtualIPSpec {
                address: address.to_string(),
                services: vec![applicant.at.clone()],
                virtual_router: self.world.virtual_router(pool, address, applicant)?,
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
    async fn join(&self, vip: &VirtualIP, applicant: &Applicant, service: &Service) -> Result<VirtualIP> {
        const TRIES: usize = 10;
        let mut vip = vip.clone();
        for _ in 0..TRIES {
            if vip.spec.services.contains(&applicant.at) {
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
            if !self.is_set(&vip) {
                return Err(self.set_otherwise(&vip));
            }
            if let Some(clash) = self.clash(&vip, applicant, service).await? {
                return Err(Failure::new(clash));
            }
            let mut services = vip.spec.services.clone();
            services.push(applicant.at.clone());
            if self.dry_run() == DryRun::Client {
                vip.spec.services = services;
                return Ok(vip);
            }
            // With the version that was looked at: another Service cannot slip in between.
            let patch = json!({
                "metadata": {"resourceVersion": vip.metadata.resource_version},
                "spec": {"services": services},
            });
            match self.cluster.vips().patch(&vip.name_any(), &self.params(), &Patch::Merge(patch)).await {
                Ok(vip) => return Ok(vip),
                Err(kube::Error::Api(status))
                    if status.is_not_found() && self.dry_run() == DryRun::Server =>
                {
                    // This run would have made it.
                    vip.spec.services = services;
                    return Ok(vip);
                }
                Err(error) if is_conflict(&error) => vip = self.cluster.vips().get(&vip.name_any()).await?,
                Err(error) => return Err(error.into()),
            }
        }
        Err(Failure::new(format!("{} keeps changing: others write to it all the time", vip.spec.address))
            .hint("run the command again"))
    }

    /// Whether a virtual IP has the scheduler and the persistence that were asked for, if any were.
    pub(super) fn is_set(&self, vip: &VirtualIP) -> bool {
        self.args.scheduler.is_none_or(|wanted| wanted == vip.spec.scheduler)
            && self.persistence.is_none_or(|wanted| vip.spec.persistence_seconds == Some(wanted))
    }

    /// Others have the address, too, with a scheduler and a persistence that are not what was asked for.
    pub(super) fn set_otherwise(&self, vip: &VirtualIP) -> Failure {
        let spec = &vip.spec;
        let persistence = spec.persistence_seconds.map_or_else(
            || "no persistence of its own".to_owned(),
            |seconds| format!("persistence {}", span(i64::from(seconds))),
        );
        Failure::new(format!(
            "{} has scheduler {} and {persistence} for all its Services ({})",
            spec.address,
            spec.scheduler.as_str(),
            spec.services.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")
        ))
        .hint(format!(
            "leave --scheduler and --persistence out, or change them for all: kubectl edit virtualip {}",
            vip.name_any()
        ))
    }

    /// Gives a virtual IP that only this Service has the scheduler and the persistence that were asked for.
    pub(super) async fn configure(&self, vip: &VirtualIP) -> Result<VirtualIP> {
        let mut vip = vip.clone();
        vip.spec.scheduler = self.args.scheduler.unwrap_or(vip.spec.scheduler);
        vip.spec.persistence_seconds = self.persistence.or(vip.spec.persistence_seconds);
        if self.dry_run() == DryRun::Client {
            return Ok(vip);
        }
        let patch = json!({
            "metadata": {"resourceVersion": vip.metadata.resource_version},
            "spec": {"scheduler": vip.spec.scheduler, "persistenceSeconds": vip.spec.persistence_seconds},
        });
        Ok(self.cluster.vips().patch(&vip.name_any(), &self.params(), &Patch::Merge(patch)).await?)
    }

    fn params(&self) -> PatchParams {
        PatchParams {
            dry_run: self.dry_run() == DryRun::Server,
            field_manager: Some(PLUGIN_MANAGER.to_owned()),
            ..PatchParams::default()
        }
    }

    /// The sentence about a port that a Service of this address has already.
    async fn clash(
        &self,
        vip: &VirtualIP,
        applicant: &Applicant,
        service: &Service,
    ) -> Result<Option<String>> {
        let wanted = service::ports(service);
        for other in &vip.spec.services {
            // A Service that is gone, or that may not be read, cannot be compared; the agents report a clash as well.
            let services = self.cluster.services(&other.namespace);
            let Ok(Some(theirs)) = present(services.get(&other.name).await) else { continue };
            if let Some((protocol, port)) = service::ports(&theirs).intersection(&wanted).next() {
                return Ok(Some(format!(
                    "{protocol} port {port} of {} belongs to service {other}, so service {} cannot share the address",
                    vip.spec.address, applicant.at
                )));
            }
        }
        Ok(None)
    }
}
