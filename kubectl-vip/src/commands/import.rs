//! `import configmap`: takes over the addresses that kube-keepalived-vip was given, and says what cannot be taken over.
//!
//! Its ConfigMap has an address in each key, and in the value `namespace/service`, with `:NAT`, `:DR` or `:PROXY` behind
//! it, or nothing for an address without a Service.

mod entry;

use std::collections::BTreeMap;
use std::net::IpAddr;

use jiff::Timestamp;
use k8s_openapi::api::core::v1::ConfigMap;
use kube::Api;
use kube::api::PostParams;
use vip_core::api::{PLUGIN_MANAGER, Scheduler, ServiceRef, VirtualIP, VirtualIPSpec, name_of};
use vip_core::validate::pool_of;
use vip_core::vrrp::Family;

use self::entry::{Entry, Method};
use super::expose::choice::{Applicant, World, belongs, not_for};
use super::expose::{machines, service};
use crate::cli::{DryRun, ImportArgs};
use crate::cluster::{Cluster, names_of, title_of};
use crate::commands::version;
use crate::exit::{Failure, Result};
use crate::output::{self, say};
use crate::suggest;

/// For how long kube-keepalived-vip keeps a client with its backend: it writes `persistence_timeout 1800` for each Service.
const PERSISTENCE_SECONDS: u32 = 1800;

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &ImportArgs) -> Result<()> {
    let (namespace, name) = match args.configmap.split_once('/') {
        Some((namespace, name)) => (namespace, name),
        None => (cluster.namespace.as_str(), args.configmap.as_str()),
    };
    if namespace.is_empty() || name.is_empty() || name.contains('/') {
        return Err(Failure::new(format!("{:?} is not the NAMESPACE/NAME of a ConfigMap", args.configmap)));
    }
    let maps: Api<ConfigMap> = Api::namespaced(cluster.client.clone(), namespace);
    let (map, pools, vips, nodes) =
        futures::join!(maps.get_opt(name), cluster.list_pools(), cluster.list_vips(), cluster.list_nodes());
    let Some(map) = map? else {
        let known = names_of(&maps).await;
        return Err(Failure::new(format!(
            "configmaps {name:?} not found (namespace {namespace}, context {}){}",
            cluster.place(),
            suggest::ending(name, known.iter().map(String::as_str))
        ))
        .hint("kube-keepalived-vip names it in its flag --services-configmap"));
    };
    let nodes = nodes?.unwrap_or_default();
    version::refuse_skew(&nodes)?;
    say(format!("Importing configmap {namespace}/{name} into {}", cluster.name()));

    let mut world = World::new(pools?, vips?, &nodes, Timestamp::now());
    world.add_hosts(&machines(cluster).await?);
    let mut import = Import { cluster, args, world, made: Vec::new(), outside: Vec::new(), refused: 0 };
    let data = map.data.unwrap_or_default();
    let all = data.len();
    for (key, value) in in_order(data) {
        import.one(&key, &value).await?;
    }
    import.finish(all)
}

/// The entries by address: numbers count as numbers.
fn in_order(data: BTreeMap<String, String>) -> Vec<(String, String)> {
    let mut entries: Vec<(String, String)> = data.into_iter().collect();
    entries.sort_by_key(|(key, _)| key.trim().parse::<IpAddr>().ok());
    entries
}

struct Import<'a> {
    cluster: &'a Cluster,
    args: &'a ImportArgs,
    world: World,
    made: Vec<VirtualIP>,
    /// Addresses that no pool has.
    outside: Vec<IpAddr>,
    refused: usize,
}

impl Import<'_> {
    async fn one(&mut self, key: &str, value: &str) -> Result<()> {
        let outcome = match Entry::parse(key, value) {
            Ok(entry) => self.take(&entry).await,
            Err(why) => Err(Failure::new(why)),
        };
        let Err(failure) = outcome else { return Ok(()) };
        if failure.is_unreachable() {
            return Err(failure);
        }
        self.refused += 1;
        say(format!("{key}: not imported: {}", failure.sentence()));
        Ok(())
    }

    async fn take(&mut self, entry: &Entry) -> Result<()> {
        let address = entry.address;
        if let Some(vip) = self.world.vip(address) {
            let same = match &entry.service {
                Some(service) => vip.spec.services.contains(service),
                None => vip.spec.services.is_empty(),
            };
            if !same {
                return Err(Failure::new(belongs(vip)));
            }
            self.said(entry, "unchanged");
            self.made.push(vip.clone());
            return Ok(());
        }
        let applicant = match &entry.service {
            Some(at) => self.applicant(at, address).await?,
            None => Applicant {
                at: ServiceRef { namespace: String::new(), name: String::new() },
                families: vec![Family::of(address)],
                alone: false,
            },
        };
        self.world.refuse_host(address)?;
        let Some(pool) = pool_of(&self.world.pools, address) else {
            self.outside.push(address);
            return Err(Failure::new("it is in no pool"));
        };
        if entry.service.is_some() && !pool.allows(&applicant.at.namespace) {
            return Err(not_for(pool, &applicant.at.namespace));
        }
        let virtual_router = self.world.virtual_router(pool, address, &applicant)?;
        let vip = VirtualIP::new(
            &name_of(address),
            VirtualIPSpec {
                address: address.to_string(),
                services: entry.service.iter().cloned().collect(),
                virtual_router,
                scheduler: Scheduler::Wlc,
                persistence_seconds: entry.service.is_some().then_some(PERSISTENCE_SECONDS),
                preferred_node: None,
                health_check: None,
            },
        );
        let vip = self.create(vip).await?;
        // The next one has to get along with it.
        self.world.vips.push(vip.clone());
        self.made.push(vip);
        self.said(entry, "created");
        match entry.method {
            Method::Nat => {}
            Method::Dr => say(format!(
                "{address}: DR is not taken over: replies go back by way of the owner, and the pods see the client's address \
                 with externalTrafficPolicy: Local only"
            )),
            Method::Proxy => say(format!(
                "{address}: PROXY is not taken over: the pods get no PROXY protocol header, so they must not expect one \
                 (nginx: use-proxy-protocol: \"false\")"
            )),
        }
        if entry.service.is_none() {
            say(format!("{address}: it has no Service: all ports of its owner are open there, as before"));
        }
        Ok(())
    }

    /// The Service, if a virtual IP may lead to it.
    async fn applicant(&self, at: &ServiceRef, address: IpAddr) -> Result<Applicant> {
        let found = self.cluster.services(&at.namespace).get_opt(&at.name).await?;
        let Some(found) = found else { return Err(Failure::new(format!("service {at} does not exist"))) };
        service::check(self.cluster, &found).await?;
        let families = service::families(&found);
        if !families.contains(&Family::of(address)) {
            return Err(Failure::new(format!(
                "service {at} cannot be reached over the family of the address"
            )));
        }
        Ok(Applicant { at: at.clone(), families, alone: service::is_local(&found) })
    }

    async fn create(&self, vip: VirtualIP) -> Result<VirtualIP> {
        let params = PostParams {
            dry_run: self.args.change.dry_run == DryRun::Server,
            field_manager: Some(PLUGIN_MANAGER.to_owned()),
        };
        match self.args.change.dry_run {
            DryRun::Client => Ok(vip),
            DryRun::None | DryRun::Server => Ok(self.cluster.vips().create(&params, &vip).await?),
        }
    }

    fn said(&self, entry: &Entry, what: &str) {
        if self.args.change.output.is_none() {
            let service = entry.service.as_ref().map_or_else(|| output::NONE.to_owned(), ToString::to_string);
            output::line(format!(
                "{} {what} ({service}){}",
                title_of::<VirtualIP>(&name_of(entry.address)),
                self.args.change.dry_run.suffix()
            ));
        }
    }

    fn finish(self, all: usize) -> Result<()> {
        if let Some(format) = self.args.change.output {
            output::objects(&self.made.iter().map(output::bare).collect::<Vec<VirtualIP>>(), format)?;
        }
        if all == 0 {
            say("The ConfigMap has no entries.");
        }
        if self.refused == 0 {
            return Ok(());
        }
        let mut failure =
            Failure::new(format!("{} of {all} entries are not imported, see above", self.refused));
        if !self.outside.is_empty() {
            let list: Vec<String> = self.outside.iter().map(ToString::to_string).collect();
            let list = list.join(",");
            failure = failure.hint(match self.world.pools.first() {
                Some(pool) => format!(
                    "kubectl vip pool set {} --add {list}, or a pool of their own: kubectl vip pool create NAME {list}",
                    pool.name
                ),
                None => format!("kubectl vip pool create NAME {list}"),
            });
        }
        Err(failure.hint("run the command again afterwards: what is imported stays as it is"))
    }
}
