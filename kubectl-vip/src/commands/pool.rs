//! `pool list|create|set|delete`.

pub mod lan;

use std::collections::{BTreeMap, BTreeSet};
use std::net::IpAddr;

use jiff::Timestamp;
use kube::ResourceExt;
use kube::api::{DeleteParams, Patch, PatchParams, PostParams};
use serde_json::json;
use vip_core::api::{PLUGIN_MANAGER, VIPPool, VIPPoolSpec, VirtualIP, VirtualRouterRange};
use vip_core::pool::{AddressSet, used};
use vip_core::validate::{CheckedPool, Fault};

use self::lan::{Lan, parse_range, range_text};
use crate::cli::{Change, DryRun, List, PoolCreateArgs, PoolDeleteArgs, PoolSetArgs};
use crate::cluster::{Cluster, is_conflict, title_of};
use crate::commands::version;
use crate::exit::{Failure, Result};
use crate::manifests;
use crate::output::{self, Form, Table};
use crate::suggest;

/// A pool with nothing but addresses and virtual routers.
pub fn draft(name: &str, addresses: &[String], virtual_routers: VirtualRouterRange) -> VIPPool {
    VIPPool::new(
        name,
        VIPPoolSpec {
            addresses: addresses.to_vec(),
            exclude: Vec::new(),
            auto_assign: true,
            namespaces: Vec::new(),
            virtual_routers,
            node_selector: BTreeMap::new(),
            interface: None,
        },
    )
}

/// Checks a pool by itself. A range that cannot be read speaks for itself, other faults name the pool.
pub fn checked(pool: &VIPPool) -> Result<CheckedPool> {
    AddressSet::parse(&pool.spec.addresses, &pool.spec.exclude)
        .map_err(|error| Failure::new(error.to_string()))?;
    CheckedPool::new(pool)
        .map_err(|Fault { why, .. }| Failure::new(format!("pool {:?}: {why}", pool.name_any())))
}

/// The addresses that virtual IPs have.
pub fn taken(vips: &[VirtualIP]) -> BTreeSet<IpAddr> {
    vips.iter().filter_map(|vip| vip.spec.address.parse().ok()).collect()
}

/// The pool of that name, or a sentence with the closest one.
pub fn named<'a>(pools: &'a [VIPPool], name: &str) -> Result<&'a VIPPool> {
    pools.iter().find(|pool| pool.name_any() == name).ok_or_else(|| {
        let known: Vec<String> = pools.iter().map(ResourceExt::name_any).collect();
        Failure::new(format!(
            "pool {name:?} not found{}",
            suggest::ending(name, known.iter().map(String::as_str))
        ))
        .hint("kubectl vip pool list")
    })
}

/// `pool list`.
pub async fn list(cluster: &Cluster, args: &List) -> Result<()> {
    let (pools, vips) = futures::join!(cluster.list_pools(), cluster.list_vips());
    let (mut pools, vips) = (pools?, vips?);
    pools.sort_by_key(ResourceExt::name_any);
    match Form::from(args.output) {
        Form::Names => {
            pools.iter().for_each(|pool| output::line(title_of::<VIPPool>(&pool.name_any())));
        }
        Form::Document(document) => {
            for pool in &mut pools {
                pool.metadata.managed_fields = None;
            }
            let list = json!({
                "apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VIPPoolList", "metadata": {}, "items": pools,
            });
            output::document(&list, document)?;
        }
        Form::Table { .. } if pools.is_empty() => output::say("No pools found."),
        Form::Table { wide } => {
            output::print(&table(&pools, &vips, wide, Timestamp::now()).render(args.no_headers));
        }
    }
    Ok(())
}

fn table(pools: &[VIPPool], vips: &[VirtualIP], wide: bool, now: Timestamp) -> Table {
    let mut headers = vec!["NAME", "ADDRESSES", "TOTAL", "USED", "FREE", "NAMESPACES", "AGE"];
    if wide {
        headers.extend(["VIRTUAL-ROUTERS", "AUTO", "INTERFACE", "NODE-SELECTOR", "EXCLUDE"]);
    }
    let mut table = Table::new(&headers);
    let taken = taken(vips);
    for pool in pools {
        let spec = &pool.spec;
        let (total, in_use, free) = match CheckedPool::new(pool) {
            Ok(checked) => {
                let (total, in_use) = (checked.addresses.len_u64(), used(&checked.addresses, &taken));
                (total.to_string(), in_use.to_string(), total.saturating_sub(in_use).to_string())
            }
            Err(_) => ("Invalid".to_owned(), String::new(), String::new()),
        };
        let age = pool.metadata.creation_timestamp.as_ref().map(|time| output::age(time.0, now));
        let namespaces =
            if spec.namespaces.is_empty() { "<all>".to_owned() } else { spec.namespaces.join(",") };
        let mut row = vec![
            pool.name_any(),
            spec.addresses.join(","),
            total,
            in_use,
            free,
            namespaces,
            age.unwrap_or_default(),
        ];
        if wide {
            let selector: Vec<String> =
                spec.node_selector.iter().map(|(label, value)| format!("{label}={value}")).collect();
            row.extend([
                range_text(spec.virtual_routers),
                spec.auto_assign.to_string(),
                spec.interface.clone().unwrap_or_default(),
                selector.join(","),
                spec.exclude.join(","),
            ]);
        }
        table.row(row);
    }
    table
}

/// `pool create`.
pub async fn create(cluster: &Cluster, args: &PoolCreateArgs) -> Result<()> {
    let mut pool = draft(&args.name, &args.ranges, VirtualRouterRange { first: 1, count: 1 });
    pool.spec.exclude = args.exclude.clone();
    pool.spec.namespaces = args.namespaces.clone();
    pool.spec.interface = args.interface.clone();
    pool.spec.auto_assign = args.auto_assign;
    if let Some(selector) = &args.node_selector {
        pool.spec.node_selector = manifests::labels(selector)?;
    }
    // Mistakes that need no cluster come first.
    checked(&pool)?;
    let wanted = args.virtual_routers.as_deref().map(parse_range).transpose()?;

    let lan = Lan::read(cluster).await?;
    version::refuse_skew(&lan.agents)?;
    if lan.pools.iter().any(|other| other.name_any() == args.name) {
        return Err(Failure::new(format!("pool {:?} already exists", args.name))
            .hint(format!("kubectl vip pool set {} --add RANGE", args.name)));
    }
    pool.spec.virtual_routers = match wanted {
        Some(range) => range,
        None => lan.free_virtual_routers()?,
    };
    lan.admit(&checked(&pool)?)?;

    let change = &args.change;
    announce(cluster, "Creating", &args.name, change.dry_run);
    let params = PostParams {
        dry_run: change.dry_run == DryRun::Server,
        field_manager: Some(PLUGIN_MANAGER.to_owned()),
    };
    let pool = match change.dry_run {
        DryRun::Client => pool,
        DryRun::None | DryRun::Server => cluster.pools().create(&params, &pool).await?,
    };
    report(&pool, "created", change)
}

/// `pool set`.
pub async fn set(cluster: &Cluster, args: &PoolSetArgs) -> Result<()> {
    // Another change between reading and writing: read again. People do not collide here twice.
    const TRIES: usize = 3;
    let mut tries = 0;
    let wanted = args.virtual_routers.as_deref().map(parse_range).transpose()?;
    loop {
        tries += 1;
        let lan = Lan::read(cluster).await?;
        version::refuse_skew(&lan.agents)?;
        let mut pool = named(&lan.pools, &args.name)?.clone();
        add_missing(&mut pool.spec.addresses, &args.add);
        add_missing(&mut pool.spec.exclude, &args.exclude);
        pool.spec.virtual_routers = wanted.unwrap_or(pool.spec.virtual_routers);
        lan.admit(&checked(&pool)?)?;
        if args.change.dry_run == DryRun::Client {
            return report(&pool, "configured", &args.change);
        }
        if tries == 1 {
            announce(cluster, "Changing", &args.name, args.change.dry_run);
        }
        let patch = json!({
            "metadata": {"resourceVersion": pool.metadata.resource_version},
            "spec": {
                "addresses": pool.spec.addresses,
                "exclude": pool.spec.exclude,
                "virtualRouters": pool.spec.virtual_routers,
            },
        });
        let params = PatchParams {
            dry_run: args.change.dry_run == DryRun::Server,
            field_manager: Some(PLUGIN_MANAGER.to_owned()),
            ..PatchParams::default()
        };
        match cluster.pools().patch(&args.name, &params, &Patch::Merge(patch)).await {
            Ok(pool) => return report(&pool, "configured", &args.change),
            Err(error) if is_conflict(&error) && tries < TRIES => {}
            Err(error) => return Err(error.into()),
        }
    }
}

fn add_missing(list: &mut Vec<String>, more: &[String]) {
    for entry in more {
        if !list.contains(entry) {
            list.push(entry.clone());
        }
    }
}

fn report(pool: &VIPPool, verb: &str, change: &Change) -> Result<()> {
    match change.output {
        Some(format) => output::objects(&[output::bare(pool)], format),
        None => {
            output::line(format!(
                "{} {verb}{}",
                title_of::<VIPPool>(&pool.name_any()),
                change.dry_run.suffix()
            ));
            Ok(())
        }
    }
}

/// `pool delete`.
pub async fn delete(cluster: &Cluster, args: &PoolDeleteArgs) -> Result<()> {
    let (pools, vips, nodes) =
        futures::join!(cluster.list_pools(), cluster.list_vips(), cluster.list_nodes());
    let (pools, vips) = (pools?, vips?);
    version::refuse_skew(&nodes?.unwrap_or_default())?;
    let pool = named(&pools, &args.name)?;
    // A broken pool holds nothing.
    if let Ok(checked) = CheckedPool::new(pool) {
        let inside: Vec<String> = vips
            .iter()
            .filter(|vip| vip.spec.address.parse().is_ok_and(|address| checked.addresses.contains(address)))
            .map(in_use_by)
            .collect();
        if !inside.is_empty() {
            return Err(Failure::new(format!(
                "pool {:?} is in use: {} of its addresses are virtual IPs: {}",
                args.name,
                inside.len(),
                inside.join(", ")
            ))
            .hint("take them away first: kubectl vip unexpose VIP"));
        }
    }
    let dry_run = args.change.dry_run;
    announce(cluster, "Deleting", &args.name, dry_run);
    if dry_run != DryRun::Client {
        let params = DeleteParams { dry_run: dry_run == DryRun::Server, ..DeleteParams::default() };
        cluster.pools().delete(&args.name, &params).await?;
    }
    report(pool, "deleted", &args.change)
}

/// Names the cluster before it is changed.
fn announce(cluster: &Cluster, what: &str, name: &str, dry_run: DryRun) {
    if dry_run == DryRun::None {
        output::say(format!("{what} pool {name} in {}", cluster.name()));
    }
}

fn in_use_by(vip: &VirtualIP) -> String {
    let services: Vec<String> = vip.spec.services.iter().map(ToString::to_string).collect();
    match services.is_empty() {
        true => vip.spec.address.clone(),
        false => format!("{} ({})", vip.spec.address, services.join(", ")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_table_counts_what_is_taken() {
        let mut lab =
            draft("lab", &["192.168.10.240/28".to_owned()], VirtualRouterRange { first: 100, count: 64 });
        lab.spec.namespaces = vec!["shop".to_owned()];
        let broken =
            draft("old", &["10.0.0.9-10.0.0.1".to_owned()], VirtualRouterRange { first: 1, count: 1 });
        let vip: VirtualIP = serde_json::from_value(json!({
            "metadata": {"name": "192.168.10.241"}, "spec": {"address": "192.168.10.241", "virtualRouter": 100},
        }))
        .unwrap();
        assert_eq!(
            table(&[lab, broken], &[vip], false, Timestamp::UNIX_EPOCH).render(false),
            "NAME   ADDRESSES           TOTAL     USED     FREE     NAMESPACES   AGE\n\
             lab    192.168.10.240/28   14        1        13       shop         <none>\n\
             old    10.0.0.9-10.0.0.1   Invalid   <none>   <none>   <all>        <none>\n"
        );
    }

    #[test]
    fn a_bad_range_speaks_for_itself() {
        let pool = draft("lab", &["192.168.10.240/33".to_owned()], VirtualRouterRange { first: 1, count: 1 });
        assert_eq!(
            checked(&pool).unwrap_err().to_string(),
            r#"Error: "192.168.10.240/33": an IPv4 prefix is 0 to 32"#
        );
        let loopback = draft("lab", &["127.0.0.1".to_owned()], VirtualRouterRange { first: 1, count: 1 });
        assert_eq!(
            checked(&loopback).unwrap_err().to_string(),
            r#"Error: pool "lab": 127.0.0.1 is a loopback address, not a unicast address of the LAN"#
        );
    }

    #[test]
    fn an_unknown_pool_gets_a_suggestion() {
        let pools = [draft("edge", &["10.0.0.1".to_owned()], VirtualRouterRange { first: 1, count: 1 })];
        assert!(
            named(&pools, "egde")
                .unwrap_err()
                .to_string()
                .contains(r#"pool "egde" not found; did you mean "edge"?"#)
        );
    }
}
