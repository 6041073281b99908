//! `install`: applies the manifests and creates pools; running it again finishes what was left, and keeps what no flag names.

pub mod checks;
mod installed;
mod rollout;

pub use installed::{Installed, only_one, refuse_newer};
pub use rollout::{agents, node_of};

use std::collections::BTreeMap;
use std::slice;
use std::time::Duration;

use kube::ResourceExt;
use kube::core::DynamicObject;
use vip_core::api::{DEFAULT_NAMESPACE, VIPPool, VirtualRouterRange};
use vip_core::pool::AddressSet;

use crate::cli::{Change, DryRun, InstallArgs, Rollout, Wanted as Flags};
use crate::cluster::{Cluster, is_conflict, title};
use crate::codes::{self, Code};
use crate::commands::pool::lan::Lan;
use crate::commands::pool::{checked, draft};
use crate::commands::{VERSION, diff};
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
struct Plan<'a> {
    flags: &'a Flags,
    node_selector: Option<BTreeMap<String, String>>,
    pools: Vec<Wanted>,
}

impl<'a> Plan<'a> {
    fn new(flags: &'a Flags) -> Result<Self> {
        let pools: Vec<Wanted> = flags.pools.iter().map(|text| Wanted::parse(text)).collect::<Result<_>>()?;
        for (place, pool) in pools.iter().enumerate() {
            if pools[..place].iter().any(|other| other.name == pool.name) {
                return Err(Failure::new(format!("pool {:?} is named twice", pool.name))
                    .hint(format!("put its ranges together: --pool {}=RANGE,RANGE", pool.name)));
            }
        }
        if flags.interface.is_some() && pools.is_empty() {
            return Err(Failure::new("--interface is for the pools that --pool creates, and there is none")
                .hint("kubectl vip pool create NAME RANGE --interface IF"));
        }
        let node_selector = flags.node_selector.as_deref().map(manifests::labels).transpose()?;
        Ok(Self { flags, node_selector, pools })
    }

    /// The settings: what the flags say, else those of the installation.
    fn settings(&self, namespace: Option<&str>, before: Option<&Installed>) -> Settings {
        let flags = self.flags;
        let kept = before.map(|before| before.settings.clone()).unwrap_or_default();
        Settings {
            namespace: namespace.map(str::to_owned).or(kept.namespace),
            // An image that says a version follows that of the plugin, with the manifests.
            image: flags.image.clone().or_else(|| {
                let before = before?;
                before.next_image().or_else(|| Some(before.image.clone()).filter(|image| !image.is_empty()))
            }),
            node_selector: self.node_selector.clone().unwrap_or(kept.node_selector),
            advert_interval: flags.advert_interval.clone().or(kept.advert_interval),
            unicast: flags.unicast.unwrap_or(kept.unicast),
        }
    }

    /// The pools. One that is there already keeps what it has, and gets the addresses that it lacks.
    fn pools(&self, lan: &Lan) -> Result<Vec<VIPPool>> {
        let mut lan = lan.clone();
        let mut pools = Vec::new();
        for wanted in &self.pools {
            let before = lan.pools.iter().find(|pool| pool.name_any() == wanted.name);
            let mut pool = match before {
                Some(pool) => grown(pool, &wanted.addresses),
                None => draft(&wanted.name, &wanted.addresses, lan.free_virtual_routers()?),
            };
            if let Some(interface) = &self.flags.interface {
                pool.spec.interface = Some(interface.clone());
            }
            lan.admit(&checked(&pool)?)?;
            pools.push(pool.clone());
            // The next pool of the command line has to get along with this one.
            lan.pools.retain(|other| other.name_any() != wanted.name);
            lan.pools.push(pool);
        }
        Ok(pools)
    }
}

/// A pool with these addresses, too.
fn grown(pool: &VIPPool, more: &[String]) -> VIPPool {
    let mut pool = pool.clone();
    for range in more {
        let has = |addresses: &[String]| AddressSet::parse_whole(addresses).ok();
        let lacking = has(&pool.spec.addresses).zip(has(slice::from_ref(range)));
        if lacking.is_none_or(|(old, new)| !new.minus(&old).is_empty()) {
            pool.spec.addresses.push(range.clone());
        }
    }
    pool
}

/// `install --dry-run=client`: needs no cluster, and is the same each time.
pub fn show(args: &InstallArgs, namespace: Option<&str>) -> Result<()> {
    let plan = Plan::new(&args.wanted)?;
    let mut objects = manifests::render(&plan.settings(namespace, None))?;
    objects.extend(plan.pools(&Lan::default())?.iter().map(manifests::pool));
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
    let plan = Plan::new(&args.wanted)?;
    let before = Installed::find(cluster).await?;
    let settings = plan.settings(named(cluster), before.as_ref());
    say(format!(
        "Installing kubectl-vip {VERSION} in namespace {} of {}",
        settings.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE),
        cluster.name()
    ));
    // Who names an image knows what it is.
    if let Some(before) = before.filter(|_| args.wanted.image.is_none()) {
        refuse_newer(&before.versions(&cluster.list_nodes().await?.unwrap_or_default()))?;
    }
    let rollout = &args.rollout;
    let ready = prepare(cluster, &plan, &settings, rollout.timeout, &rollout.skip_checks).await?;
    let all: Vec<DynamicObject> = ready.objects.iter().chain(&ready.pools).cloned().collect();
    let changes = diff::differences(cluster, &all, rollout.force_conflicts).await?;
    diff::show(&changes);
    if rollout.change.dry_run == DryRun::None {
        diff::confirm("install", &changes, args.yes)?;
    }
    apply(cluster, ready, rollout).await
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
    let plan = Plan::new(flags)?;
    let settings = plan.settings(named(cluster), Installed::find(cluster).await?.as_ref());
    prepare(cluster, &plan, &settings, timeout, codes::cluster::ALL).await
}

async fn prepare(
    cluster: &Cluster,
    plan: &Plan<'_>,
    settings: &Settings,
    timeout: Duration,
    skip: &[&'static Code],
) -> Result<Ready> {
    let lan = if plan.pools.is_empty() { Lan::default() } else { Lan::read(cluster).await? };
    checked_objects(cluster, settings, &plan.pools(&lan)?, timeout, skip).await
}

/// The objects with these settings and pools, for a cluster in which they can work.
pub async fn checked_objects(
    cluster: &Cluster,
    settings: &Settings,
    pools: &[VIPPool],
    timeout: Duration,
    skip: &[&'static Code],
) -> Result<Ready> {
    let namespace = settings.namespace.as_deref().unwrap_or(DEFAULT_NAMESPACE);
    checks::run(cluster, namespace, pools, skip).await?;
    let mut objects = manifests::render(settings)?;
    if checks::foreign_namespace(cluster, namespace, timeout).await? {
        say(format!(
            "namespace {namespace} is not of kubectl-vip: it is left as it is, and must allow privileged pods"
        ));
        objects.retain(|object| !manifests::is_kind(object, "Namespace"));
    }
    let pools = pools.iter().map(manifests::pool).collect();
    Ok(Ready { objects, pools, namespace: namespace.to_owned() })
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
        let flags = Flags { interface: Some("eth1".to_owned()), ..Flags::default() };
        let pools = Plan { flags: &flags, node_selector: None, pools }.pools(&Lan::default())?;
        Ok(pools.iter().map(manifests::pool).collect())
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
    fn a_pool_that_is_there_grows_and_loses_nothing() {
        let range = VirtualRouterRange { first: 7, count: 2 };
        let mut lab = draft("lab", &["10.0.0.0/28".to_owned(), "10.0.1.0/28".to_owned()], range);
        lab.spec.exclude = vec!["10.0.0.9".to_owned()];
        lab.spec.interface = Some("eth0".to_owned());
        let wanted = vec![Wanted::parse("lab=10.0.0.0-10.0.0.7,10.0.0.8-10.0.0.20").unwrap()];
        let plan = Plan { flags: &Flags::default(), node_selector: None, pools: wanted };
        let mut lan = Lan::default();
        lan.pools.push(lab);
        let pools = plan.pools(&lan).unwrap();
        assert_eq!(
            manifests::pool(&pools[0]).data["spec"],
            json!({"addresses": ["10.0.0.0/28", "10.0.1.0/28", "10.0.0.8-10.0.0.20"], "interface": "eth0",
                   "virtualRouters": {"first": 7, "count": 2}})
        );
    }

    #[test]
    fn what_no_flag_names_is_kept() {
        let before = Installed {
            settings: Settings {
                namespace: Some("edge".into()),
                image: None,
                node_selector: manifests::labels("role=edge").unwrap(),
                advert_interval: Some("1000ms".into()),
                unicast: true,
            },
            image: "registry.example/vip-node:v0.0.1".into(),
        };
        let settings =
            |flags: Flags, before: &Installed| Plan::new(&flags).unwrap().settings(None, Some(before));
        let image = Some(format!("registry.example/vip-node:{VERSION}"));
        let kept = settings(Flags::default(), &before);
        assert_eq!(kept, Settings { image: image.clone(), ..before.settings.clone() });
        let named = Flags {
            node_selector: Some("role=core".into()),
            advert_interval: Some("50ms".into()),
            unicast: Some(false),
            ..Flags::default()
        };
        let changed = settings(named, &before);
        let core = manifests::labels("role=core").unwrap();
        assert_eq!((changed.node_selector, changed.unicast, changed.image), (core, false, image));
        let tagged = Installed { image: "vip-node:latest".into(), ..before };
        assert_eq!(settings(Flags::default(), &tagged).image.as_deref(), Some("vip-node:latest"));
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
