//! `install`: applies the manifests and creates pools; running it again finishes what was left, and changes nothing else.

pub mod checks;
mod rollout;

pub use rollout::{agents, node_of};

use std::time::Duration;

use kube::ResourceExt;
use kube::core::DynamicObject;
use vip_core::api::{DEFAULT_NAMESPACE, VirtualIP, VirtualRouterRange};

use crate::cli::{Change, DryRun, InstallArgs, Rollout, Wanted as Flags};
use crate::cluster::{Cluster, is_conflict, present, title};
use crate::codes::{self, Code};
use crate::commands::VERSION;
use crate::commands::pool::lan::Lan;
use crate::commands::pool::{checked, draft};
use crate::exit::{Failure, Result};
use crate::manifests::{self, Settings};
use crate::output::{self, say};

/// A pool as it is asked for: `lab=192.168.10.240/28,10.0.0.9`.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Wanted {
    name: String,
    addresses: Vec<String>,
}

impl Wanted {
    fn parse(text: &str) -> Result<Self> {
        let (name, addresses) = text
            .split_once('=')
            .filter(|(name, addresses)| !name.is_empty() && !addresses.is_empty())
            .ok_or_else(|| {
                Failure::new(format!("--pool {text:?} is not NAME=RANGE"))
                    .hint("such as --pool lab=192.168.10.240/28")
            })?;
        let wanted = Self {
            name: name.to_owned(),
            addresses: addresses.split(',').map(|address| address.trim().to_owned()).collect(),
        };
        checked(&draft(&wanted.name, &wanted.addresses, ANY))?;
        Ok(wanted)
    }
}

/// Stands for virtual routers until they are chosen.
const ANY: VirtualRouterRange = VirtualRouterRange { first: 1, count: 1 };

/// What the flags ask for, checked before any cluster is touched.
struct Plan {
    settings: Settings,
    pools: Vec<Wanted>,
}

impl Plan {
    fn new(args: &Flags, namespace: Option<&str>) -> Result<Self> {
        let pools: Vec<Wanted> = args.pools.iter().map(|text| Wanted::parse(text)).collect::<Result<_>>()?;
        for (place, pool) in pools.iter().enumerate() {
            if pools[..place].iter().any(|other| other.name == pool.name) {
                return Err(Failure::new(format!("pool {:?} is named twice", pool.name))
                    .hint(format!("put its ranges together: --pool {}=RANGE,RANGE", pool.name)));
            }
        }
        if args.interface.is_some() && pools.is_empty() {
            return Err(Failure::new("--interface is for the pools that --pool creates, and there is none")
                .hint("kubectl vip pool create NAME RANGE --interface IF"));
        }
        let settings = Settings {
            namespace: namespace.map(str::to_owned),
            image: args.image.clone(),
            node_selector: args
                .node_selector
                .as_deref()
                .map(manifests::labels)
                .transpose()?
                .unwrap_or_default(),
            advert_interval: args.advert_interval.clone(),
            unicast: args.unicast,
        };
        Ok(Self { settings, pools })
    }

    /// The pools as objects; each keeps the virtual routers that it has, new ones get free ones.
    fn pools(&self, lan: &Lan, interface: Option<&str>) -> Result<Vec<DynamicObject>> {
        let mut lan = lan.clone();
        let mut objects = Vec::new();
        for wanted in &self.pools {
            let before = lan.pools.iter().find(|pool| pool.name_any() == wanted.name);
            let range = match before {
                Some(pool) => pool.spec.virtual_routers,
                None => lan.free_virtual_routers()?,
            };
            let pool = draft(&wanted.name, &wanted.addresses, range);
            lan.admit(&checked(&pool)?)?;
            // The next pool of the command line has to get along with this one.
            lan.pools.retain(|other| other.name_any() != wanted.name);
            lan.pools.push(pool);
            objects.push(manifests::pool(&wanted.name, &wanted.addresses, range, interface)?);
        }
        Ok(objects)
    }
}

/// `install --dry-run=client`: needs no cluster, and is the same each time.
pub fn show(args: &InstallArgs, namespace: Option<&str>) -> Result<()> {
    let plan = Plan::new(&args.wanted, namespace)?;
    let mut objects = manifests::render(&plan.settings)?;
    objects.extend(plan.pools(&Lan::default(), args.wanted.interface.as_deref())?);
    print(&objects, &args.rollout.change)
}

fn print(objects: &[DynamicObject], change: &Change) -> Result<()> {
    match change.output {
        Some(format) => output::objects(objects, format),
        None => {
            for object in objects {
                output::line(format!("{} serverside-applied{}", title(object), change.dry_run.suffix()));
            }
            Ok(())
        }
    }
}

/// `install`.
pub async fn run(cluster: &Cluster, args: &InstallArgs) -> Result<()> {
    let plan = Plan::new(&args.wanted, named(cluster))?;
    let namespace = named(cluster).unwrap_or(DEFAULT_NAMESPACE);
    say(format!("Installing kubectl-vip {VERSION} in namespace {namespace} of {}", cluster.name()));
    let ready =
        prepare(cluster, &plan, &args.wanted, args.rollout.timeout, &args.rollout.skip_checks).await?;
    apply(cluster, ready, &args.rollout).await
}

/// The namespace on the command line.
fn named(cluster: &Cluster) -> Option<&str> {
    cluster.namespace_named.then_some(cluster.namespace.as_str())
}

/// Objects that may be applied to the cluster.
pub struct Ready {
    /// All but the pools, in their order.
    pub objects: Vec<DynamicObject>,
    /// The pools.
    pub pools: Vec<DynamicObject>,
    /// The namespace of the agents.
    pub namespace: String,
}

/// What `install` with these flags applies, whether or not the cluster is fit for it.
pub async fn planned(cluster: &Cluster, flags: &Flags, timeout: Duration) -> Result<Ready> {
    prepare(cluster, &Plan::new(flags, named(cluster))?, flags, timeout, codes::cluster::ALL).await
}

async fn prepare(
    cluster: &Cluster,
    plan: &Plan,
    flags: &Flags,
    timeout: Duration,
    skip: &[&'static Code],
) -> Result<Ready> {
    let mut ready = checked_objects(cluster, &plan.settings, timeout, skip).await?;
    let lan = if plan.pools.is_empty() { Lan::default() } else { Lan::read(cluster).await? };
    ready.pools = plan.pools(&lan, flags.interface.as_deref())?;
    keep_addresses(cluster, plan).await?;
    Ok(ready)
}

/// The objects with these settings, for a cluster in which they can work.
pub async fn checked_objects(
    cluster: &Cluster,
    settings: &Settings,
    timeout: Duration,
    skip: &[&'static Code],
) -> Result<Ready> {
    let namespace = settings.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    checks::run(cluster, namespace, skip).await?;
    let mut objects = manifests::render(settings)?;
    if checks::foreign_namespace(cluster, namespace, timeout).await? {
        say(format!(
            "namespace {namespace} is not of kubectl-vip: it is left as it is, and must allow privileged pods"
        ));
        objects.retain(|object| !manifests::is_kind(object, "Namespace"));
    }
    Ok(Ready { objects, pools: Vec::new(), namespace: namespace.to_owned() })
}

/// Applies the objects and waits for the agents, as asked.
pub async fn apply(cluster: &Cluster, ready: Ready, how: &Rollout) -> Result<()> {
    let mut run = Run { cluster, how, applied: Vec::new() };
    let outcome = run.apply_all(ready).await;
    if how.change.output.is_some() {
        print(&run.applied, &how.change)?;
    }
    outcome
}

/// A pool that is there already must not lose addresses that are in use.
async fn keep_addresses(cluster: &Cluster, plan: &Plan) -> Result<()> {
    if plan.pools.is_empty() {
        return Ok(());
    }
    let Some(vips) = present(cluster.vips().list(&Default::default()).await)? else { return Ok(()) };
    let Some(pools) = present(cluster.pools().list(&Default::default()).await)? else { return Ok(()) };
    for wanted in &plan.pools {
        let Some(before) = pools.iter().find(|pool| pool.name_any() == wanted.name) else { continue };
        let Ok(old) = checked(before) else { continue };
        let mut raw = before.clone();
        raw.spec.addresses = wanted.addresses.clone();
        let new = checked(&raw)?;
        let is_lost = |vip: &&VirtualIP| {
            vip.spec.address.parse().is_ok_and(|a| old.addresses.contains(a) && !new.addresses.contains(a))
        };
        let lost: Vec<&str> = vips.iter().filter(is_lost).map(|vip| vip.spec.address.as_str()).collect();
        if !lost.is_empty() {
            return Err(Failure::new(format!(
                "pool {:?} has virtual IPs that {} would leave out: {}",
                wanted.name,
                wanted.addresses.join(","),
                lost.join(", ")
            ))
            .hint("name all ranges of the pool, or leave --pool out: it exists already"));
        }
    }
    Ok(())
}

struct Run<'a> {
    cluster: &'a Cluster,
    how: &'a Rollout,
    applied: Vec<DynamicObject>,
}

impl Run<'_> {
    async fn apply_all(&mut self, ready: Ready) -> Result<()> {
        let Ready { objects, pools, namespace } = ready;
        let stored = self.how.change.dry_run == DryRun::None;
        let (definitions, rest): (Vec<_>, Vec<_>) =
            objects.into_iter().partition(|object| manifests::is_kind(object, manifests::CRD));
        let names: Vec<String> = definitions.iter().map(ResourceExt::name_any).collect();
        for object in definitions {
            self.apply(object).await?;
        }
        if stored {
            rollout::definitions(self.cluster, &names, self.how.timeout).await?;
        }
        for object in rest {
            self.apply(object).await?;
        }
        // With a dry run the definitions may be missing: then the API server cannot check a pool.
        if stored || checks::has_definitions(self.cluster).await? {
            for object in pools {
                self.apply(object).await?;
            }
        } else {
            for object in pools {
                say(format!(
                    "{}: not checked by the server, its definition is not there yet",
                    title(&object)
                ));
                self.done(object);
            }
        }
        if stored && self.how.wait {
            agents(self.cluster, &namespace, self.how.timeout).await?;
        }
        Ok(())
    }

    async fn apply(&mut self, object: DynamicObject) -> Result<()> {
        let dry_run = self.how.change.dry_run;
        match self.cluster.apply(&object, dry_run, self.how.force_conflicts).await {
            Ok(mut stored) => {
                stored.metadata.managed_fields = None;
                self.done(stored);
                Ok(())
            }
            Err(error) if is_conflict(&error) => Err(conflict(&object, error)),
            // With a dry run, an object in a namespace that is not there yet cannot be checked.
            Err(kube::Error::Api(status))
                if dry_run == DryRun::Server && status.is_not_found() && object.namespace().is_some() =>
            {
                say(format!("{}: not checked by the server, its namespace is not there yet", title(&object)));
                self.done(object);
                Ok(())
            }
            Err(error) => Err(error.into()),
        }
    }

    fn done(&mut self, object: DynamicObject) {
        if self.how.change.output.is_none() {
            output::line(format!(
                "{} serverside-applied{}",
                title(&object),
                self.how.change.dry_run.suffix()
            ));
        }
        self.applied.push(object);
    }
}

/// Another field manager has set a field of the object.
pub fn conflict(object: &DynamicObject, error: kube::Error) -> Failure {
    let why = Failure::from(error).to_string();
    let why = why.trim_start_matches("Error from server (Conflict): ");
    Failure::new(format!("Error from server (Conflict): {}: {why}", title(object)))
        .hint("take the fields over: --force-conflicts")
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn pools(texts: &[&str]) -> Result<Vec<DynamicObject>> {
        let pools = texts.iter().map(|text| Wanted::parse(text)).collect::<Result<_>>()?;
        Plan { settings: Settings::default(), pools }.pools(&Lan::default(), Some("eth1"))
    }

    #[test]
    fn pools_of_the_command_line() {
        let objects = pools(&["lab=192.168.10.240/28,192.168.10.9", "edge=10.0.0.1-10.0.0.4"]).unwrap();
        assert_eq!(
            serde_json::to_value(&objects[0]).unwrap(),
            json!({
                "apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPool", "metadata": {"name": "lab"},
                "spec": {"addresses": ["192.168.10.240/28", "192.168.10.9"], "interface": "eth1",
                         "virtualRouters": {"first": 100, "count": 64}},
            })
        );
        assert_eq!(objects[1].data["spec"]["virtualRouters"]["first"], 164);
    }

    #[test]
    fn mistakes_in_pools() {
        let said =
            |texts: &[&str]| pools(texts).err().map_or_else(String::new, |failure| failure.to_string());
        assert_eq!(
            said(&["lab=192.168.10.240/33"]),
            r#"Error: "192.168.10.240/33": an IPv4 prefix is 0 to 32"#
        );
        assert!(said(&["lab"]).starts_with(r#"Error: --pool "lab" is not NAME=RANGE"#));
        assert_eq!(said(&["lab=192.168.10.240/28,fd87::2:0/112"]), "");
        assert!(said(&["lab=fd87::/129"]).contains("an IPv6 prefix is 0 to 128"));
        assert!(said(&["lab=fe80::1"]).contains("a link-local address"));
        assert!(said(&["a=10.0.0.1-10.0.0.9", "b=10.0.0.9"]).contains(r#"pool "b" overlaps pool "a""#));
        assert!(said(&["a=10.0.0.0/28,"]).contains("not an address"));
    }
}
