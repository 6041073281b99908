//! `status`: the virtual IPs, who owns them, what they lead to, and what is wrong.
//!
//! What the user may not read is marked `Forbidden`; the rest is shown.

mod detail;
mod document;
mod watch;

use futures::future::try_join_all;
use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::ResourceExt;
use vip_core::api::{ServiceRef, VIPNode, VIPPool, VirtualIP, name_of};
use vip_core::pool::used;
use vip_core::validate::{CheckedPool, check_pools, pool_of};

use self::detail::Detail;
use crate::cli::StatusArgs;
use crate::cli::target::Target;
use crate::cluster::{Cluster, permitted, title_of};
use crate::codes::Problem;
use crate::commands::pool::taken;
use crate::commands::version::versions;
use crate::exit::{Failure, Result};
use crate::judge::{self, Judge, count};
use crate::output::{self, Form, NONE, Table, say};
use crate::suggest;

/// What stands for that which may not be read.
const FORBIDDEN: &str = "Forbidden";

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &StatusArgs) -> Result<()> {
    let target = if args.target.is_empty() { None } else { Some(Target::parse(&args.target)?) };
    let scope = Scope::new(cluster, args, target);
    if args.watch {
        return match Form::from(args.list.output) {
            Form::Table { wide } => watch::run(cluster, args, &scope, wide).await,
            _ => Err(Failure::new("--watch prints a table").hint("leave --output out, or use -o wide")),
        };
    }
    let view = View::read(cluster).await?;
    let shown = view.shown(&scope);
    if let (true, Some(target)) = (shown.is_empty(), &scope.target) {
        return Err(not_found(cluster, target, &view.vips).await?);
    }
    let report = view.report(&scope, &shown);
    match Form::from(args.list.output) {
        Form::Names => {
            shown.iter().for_each(|vip| output::line(title_of::<VirtualIP>(&vip.name_any())));
        }
        Form::Document(format) => {
            let details = details(cluster, &scope, &shown).await?;
            output::document(&document::of(&view, &scope, &shown, &details, &report), format)?;
        }
        Form::Table { wide } => {
            let details = details(cluster, &scope, &shown).await?;
            let (head, rest) = (report.head(), report.rest(&view, &shown, &details));
            let table = report.table(&scope, wide, args.list.no_headers);
            match args.list.no_headers {
                false => output::print(&format!("{head}{table}{rest}")),
                // For programs there are only rows.
                true => {
                    output::print(&table);
                    say(format!("{head}{rest}").trim_end());
                }
            }
            if report.rows.is_empty() {
                say(scope.nothing());
            }
        }
    }
    Ok(())
}

/// Who asks for one wants to know all about it.
async fn details(cluster: &Cluster, scope: &Scope, shown: &[&VirtualIP]) -> Result<Vec<Detail>> {
    let named = shown.iter().filter(|_| scope.target.is_some());
    try_join_all(named.map(|vip| Detail::read(cluster, vip))).await
}

/// The Services of a virtual IP that are in question; a bare address has a line, too.
fn services<'a>(vip: &'a VirtualIP, scope: &Scope) -> Vec<Option<&'a ServiceRef>> {
    let services = vip.spec.services.iter();
    match vip.spec.services.is_empty() {
        true => vec![None],
        false => services.filter(|service| scope.has_service(service) || scope.all).map(Some).collect(),
    }
}

/// Why there is nothing to show of what was named: it is mistyped, or a Service that is not exposed.
async fn not_found(cluster: &Cluster, target: &Target, vips: &[VirtualIP]) -> Result<Failure> {
    let name = match target {
        Target::Vip(address) => return Ok(suggest::no_virtual_ip(*address, vips)),
        Target::Service(name) => name,
    };
    let at = ServiceRef { namespace: cluster.namespace.clone(), name: name.clone() };
    let expose =
        || suggest::not_exposed(&at, vips).hint(format!("kubectl vip expose svc/{name} -n {}", at.namespace));
    // Who may not read Services is not told whether there is one.
    match permitted(cluster.services(&at.namespace).get_opt(name).await)? {
        Some(Some(_)) => Ok(expose()),
        Some(None) => Ok(cluster.no_service(name).await),
        None => Ok(suggest::not_exposed(&at, vips)),
    }
}

/// Which virtual IPs were asked for.
struct Scope {
    namespace: String,
    all: bool,
    /// Addresses without a Service belong to no namespace: they are shown unless one was named.
    bare: bool,
    target: Option<Target>,
}

impl Scope {
    fn new(cluster: &Cluster, args: &StatusArgs, target: Option<Target>) -> Self {
        // An address is one of the cluster, not of a namespace.
        let by_address = matches!(target, Some(Target::Vip(_)));
        Self {
            namespace: cluster.namespace.clone(),
            all: args.all_namespaces || by_address,
            bare: args.all_namespaces || by_address || !cluster.namespace_named,
            target,
        }
    }

    fn has(&self, vip: &VirtualIP) -> bool {
        match &self.target {
            Some(Target::Vip(address)) => vip.name_any() == name_of(*address),
            Some(Target::Service(_)) => vip.spec.services.iter().any(|service| self.has_service(service)),
            None if vip.spec.services.is_empty() => self.bare,
            None => vip.spec.services.iter().any(|service| self.has_service(service)),
        }
    }

    fn has_service(&self, service: &ServiceRef) -> bool {
        let named = match &self.target {
            Some(Target::Service(name)) => service.name == *name,
            _ => true,
        };
        named && (self.all || service.namespace == self.namespace)
    }

    fn nothing(&self) -> String {
        match self.all {
            true => "No virtual IPs found.".to_owned(),
            false => format!("No virtual IPs found in {} namespace.", self.namespace),
        }
    }
}

/// All that was read.
struct View {
    vips: Vec<VirtualIP>,
    pools: Option<Vec<VIPPool>>,
    nodes: Option<Vec<VIPNode>>,
    agents: Option<Vec<DaemonSet>>,
    now: Timestamp,
}

/// One line of the table: a Service at an address.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Row {
    namespace: String,
    service: String,
    vip: String,
    pool: String,
    owner: String,
    backends: String,
    status: String,
    age: String,
    virtual_router: u8,
    scheduler: &'static str,
    owner_since: String,
}

/// What is printed.
struct Report {
    agents: String,
    /// Name and use of each; `None`: they may not be read.
    pools: Option<Vec<(String, String)>>,
    rows: Vec<Row>,
    problems: Vec<Problem>,
}

impl Row {
    /// Whether it says the same, whatever time has passed.
    fn is_same(&self, other: &Self) -> bool {
        let timeless = |row: &Self| Self { age: String::new(), owner_since: String::new(), ..row.clone() };
        timeless(self) == timeless(other)
    }
}

impl View {
    async fn read(cluster: &Cluster) -> Result<Self> {
        let everything = kube::api::ListParams::default();
        let pools = cluster.pools();
        let (vips, pools, nodes, agents) = futures::join!(
            cluster.list_vips(),
            pools.list(&everything),
            cluster.list_nodes(),
            cluster.list_agents()
        );
        Ok(Self {
            vips: vips?,
            pools: permitted(pools)?.map(|list| list.items),
            nodes: nodes?,
            agents: agents?,
            now: Timestamp::now(),
        })
    }

    fn shown(&self, scope: &Scope) -> Vec<&VirtualIP> {
        self.vips.iter().filter(|vip| scope.has(vip)).collect()
    }

    fn report(&self, scope: &Scope, shown: &[&VirtualIP]) -> Report {
        let judge = Judge::new(self.nodes.as_deref(), self.now);
        let (pools, _) = check_pools(self.pools.iter().flatten());
        let namespace = self.agents.iter().flatten().find_map(ResourceExt::namespace);
        let mut problems: Vec<Problem> = self.agents.as_deref().and_then(judge::agents).into_iter().collect();
        problems.extend(judge.nodes(namespace.as_deref()));
        problems.extend(self.pools.as_deref().map(judge::pools).unwrap_or_default());
        let mut rows = Vec::new();
        for vip in shown {
            let verdict = judge.judge(vip);
            let pool = match (&self.pools, vip.spec.address.parse()) {
                (None, _) => FORBIDDEN.to_owned(),
                (Some(_), Ok(address)) => {
                    pool_of(&pools, address).map_or_else(|| NONE.to_owned(), |pool| pool.name.clone())
                }
                (Some(_), Err(_)) => NONE.to_owned(),
            };
            for service in services(vip, scope) {
                rows.push(self.row(vip, service, &pool, &verdict));
            }
            problems.extend(verdict.problems);
        }
        let on_view: Vec<VirtualIP> = shown.iter().map(|vip| (*vip).clone()).collect();
        problems.extend(judge.split(&on_view));
        rows.sort_by(|a, b| (&a.namespace, &a.service).cmp(&(&b.namespace, &b.service)));
        problems.sort();
        Report { agents: self.agents_line(), pools: self.pool_use(&pools), rows, problems }
    }

    fn row(
        &self,
        vip: &VirtualIP,
        service: Option<&ServiceRef>,
        pool: &str,
        verdict: &judge::Verdict,
    ) -> Row {
        let age = vip.metadata.creation_timestamp.as_ref().map(|time| output::age(time.0, self.now));
        let since = vip.status.as_ref().and_then(|status| status.since.as_ref());
        // Since when is news of the owner, too: not to be repeated when nobody knows who that is.
        let since = since.filter(|_| verdict.owner != output::UNKNOWN && verdict.owner != output::PENDING);
        Row {
            namespace: service.map(|s| s.namespace.clone()).unwrap_or_default(),
            service: service.map(|s| s.name.clone()).unwrap_or_default(),
            vip: vip.spec.address.clone(),
            pool: pool.to_owned(),
            owner: verdict.owner.clone(),
            backends: verdict.backends.clone(),
            status: verdict.status.clone(),
            age: age.unwrap_or_default(),
            virtual_router: vip.spec.virtual_router,
            scheduler: vip.spec.scheduler.as_str(),
            owner_since: since.map(|time| output::age(time.0, self.now)).unwrap_or_default(),
        }
    }

    fn agents_line(&self) -> String {
        let versions: Vec<String> = versions(self.nodes.as_deref().unwrap_or_default()).into_keys().collect();
        let versions =
            if versions.is_empty() { String::new() } else { format!(", {}", versions.join(" and ")) };
        match &self.agents {
            None => format!("{FORBIDDEN}{versions}"),
            Some(sets) if sets.is_empty() => "not installed".to_owned(),
            Some(sets) => {
                let (ready, wanted) = count(sets);
                format!("{ready}/{wanted} ready{versions}")
            }
        }
    }

    fn pool_use(&self, pools: &[CheckedPool]) -> Option<Vec<(String, String)>> {
        self.pools.as_ref()?;
        let taken = taken(&self.vips);
        let share =
            |pool: &CheckedPool| format!("{}/{}", used(&pool.addresses, &taken), pool.addresses.len_u64());
        Some(pools.iter().map(|pool| (pool.name.clone(), share(pool))).collect())
    }
}

impl Report {
    /// The agents and the pools.
    fn head(&self) -> String {
        let pools = match self.pools.as_deref() {
            None => FORBIDDEN.to_owned(),
            Some([]) => NONE.to_owned(),
            Some(pools) => {
                let each: Vec<String> =
                    pools.iter().map(|(name, share)| format!("{name} {share} used")).collect();
                each.join(", ")
            }
        };
        format!("Agent: {}    Pools: {pools}\n", self.agents)
    }

    /// The virtual IPs, a line each.
    fn table(&self, scope: &Scope, wide: bool, no_headers: bool) -> String {
        match self.rows.is_empty() {
            true => String::new(),
            false => table(&self.rows, scope, wide).render(no_headers),
        }
    }

    /// The details of what was named, and the problems.
    fn rest(&self, view: &View, shown: &[&VirtualIP], details: &[Detail]) -> String {
        let mut text = String::new();
        for (vip, detail) in shown.iter().zip(details) {
            text.push_str(&detail.text(vip, view.nodes.as_deref(), view.now));
        }
        if !self.problems.is_empty() {
            text.push_str("\nProblems:\n");
        }
        for Problem { code, about, message, command } in &self.problems {
            text.push_str(&format!("! {code} {about}: {message}\n    {command}\n"));
        }
        text
    }
}

fn table(rows: &[Row], scope: &Scope, wide: bool) -> Table {
    let mut headers = vec!["SERVICE", "VIP", "POOL", "OWNER", "BACKENDS", "STATUS", "AGE"];
    if scope.all {
        headers.insert(0, "NAMESPACE");
    }
    if wide {
        headers.extend(["VRID", "OWNER-SINCE", "SCHEDULER"]);
    }
    let mut table = Table::new(&headers);
    for row in rows {
        let mut cells = Vec::new();
        if scope.all {
            cells.push(row.namespace.clone());
        }
        for cell in [&row.service, &row.vip, &row.pool, &row.owner, &row.backends, &row.status, &row.age] {
            cells.push(cell.clone());
        }
        if wide {
            cells.extend([row.virtual_router.to_string(), row.owner_since.clone(), row.scheduler.to_owned()]);
        }
        table.row(cells);
    }
    table
}

#[cfg(test)]
mod tests {
    use serde_json::json;
    use vip_core::api::VirtualRouterRange;

    use super::*;
    use crate::commands::pool::draft;

    fn view() -> View {
        let vip = |address: &str, services: serde_json::Value, reason: &str, ready: u32| {
            serde_json::from_value(json!({
                "metadata": {"name": address, "creationTimestamp": "2026-01-01T00:00:00Z"},
                "spec": {"address": address, "virtualRouter": 100, "services": services},
                "status": {
                    "node": "node-2", "since": "2026-01-05T00:00:00Z", "backends": {"ready": ready, "total": 3},
                    "conditions": [
                        {"type": "Announced", "status": "True", "reason": "Active", "message": "",
                         "lastTransitionTime": "2026-01-05T00:00:00Z"},
                        {"type": "Programmed", "status": if ready > 0 { "True" } else { "False" }, "reason": reason,
                         "message": "", "lastTransitionTime": "2026-01-05T23:46:00Z"},
                    ],
                },
            }))
            .unwrap()
        };
        let node = serde_json::from_value(json!({
            "metadata": {"name": "node-2"},
            "status": {"renewTime": "2026-01-05T23:59:58Z", "agentVersion": "0.1.0", "dataplane": {"ready": true}},
        }))
        .unwrap();
        let agents = serde_json::from_value(json!({
            "metadata": {"name": "vip-node", "namespace": "kubectl-vip"},
            "status": {"currentNumberScheduled": 3, "numberMisscheduled": 0, "numberReady": 3, "desiredNumberScheduled": 3},
        }))
        .unwrap();
        let range = VirtualRouterRange { first: 100, count: 64 };
        View {
            vips: vec![
                vip("192.168.10.241", json!([{"namespace": "shop", "name": "web"}]), "Programmed", 3),
                vip("192.168.10.242", json!([{"namespace": "shop", "name": "api"}]), "NoEndpoints", 0),
                vip("192.168.10.243", json!([]), "NoServices", 1),
            ],
            pools: Some(vec![draft("lab", &["192.168.10.240/28".to_owned()], range)]),
            nodes: Some(vec![node]),
            agents: Some(vec![agents]),
            now: "2026-01-06T00:00:00Z".parse().unwrap(),
        }
    }

    fn scope(all: bool) -> Scope {
        Scope { namespace: "shop".to_owned(), all, bare: all, target: None }
    }

    fn text(view: &View, scope: &Scope) -> String {
        let shown = view.shown(scope);
        let report = view.report(scope, &shown);
        format!("{}{}{}", report.head(), report.table(scope, false, false), report.rest(view, &shown, &[]))
    }

    #[test]
    fn as_the_manual_shows_it() {
        assert_eq!(
            text(&view(), &scope(true)),
            "Agent: 3/3 ready, v0.1.0    Pools: lab 3/14 used\n\
             NAMESPACE   SERVICE   VIP              POOL   OWNER    BACKENDS   STATUS        AGE\n\
             <none>      <none>    192.168.10.243   lab    node-2   <none>     Active        5d\n\
             shop        api       192.168.10.242   lab    node-2   0/3        NoEndpoints   5d\n\
             shop        web       192.168.10.241   lab    node-2   3/3        Active        5d\n\
             \n\
             Problems:\n\
             ! VIP301 shop/api: no ready endpoints for 14m\n    \
                 kubectl get endpointslices -n shop -l kubernetes.io/service-name=api\n"
        );
    }

    #[test]
    fn as_programs_read_it() {
        let mut view = view();
        let read = |view: &View| {
            let (scope, shown) = (scope(true), view.shown(&scope(true)));
            let report = view.report(&scope, &shown);
            document::of(view, &scope, &shown, &[], &report)
        };
        let document = read(&view);
        assert_eq!(document["agents"], json!({"installed": true, "ready": 3, "desired": 3}));
        assert_eq!(document["pools"], json!([{"name": "lab", "used": 3, "total": 14}]));
        assert_eq!((&document["versions"], &document["forbidden"]), (&json!(["v0.1.0"]), &json!([])));
        assert_eq!(
            document["items"][0],
            json!({
                "namespace": "shop", "service": "web", "vip": "192.168.10.241", "pool": "lab", "owner": "node-2",
                "ownerSince": "2026-01-05T00:00:00Z", "backends": {"ready": 3, "total": 3}, "status": "Active",
                "created": "2026-01-01T00:00:00Z", "virtualRouter": 100, "scheduler": "wlc",
                "persistenceSeconds": null, "preferredNode": null,
            })
        );
        assert_eq!(document["items"][2]["service"], json!(null), "a bare address");
        // Of an owner that is silent nothing holds.
        view.now = "2026-01-06T00:02:00Z".parse().unwrap();
        (view.pools, view.agents) = (None, None);
        let document = read(&view);
        let item = &document["items"][0];
        assert_eq!([&item["owner"], &item["ownerSince"], &item["backends"]], [&json!(null); 3]);
        assert_eq!(item["status"], "Unknown");
        assert_eq!([&document["pools"], &document["agents"]], [&json!(null); 2]);
        assert_eq!(document["forbidden"], json!(["vippools.kubectl-vip.io", "daemonsets.apps"]));
    }

    #[test]
    fn one_namespace_has_no_column_for_it() {
        let text = text(&view(), &scope(false));
        assert!(text.contains("\nSERVICE   VIP "), "{text}");
        assert!(!text.contains("192.168.10.243"), "a bare address is of no namespace");
        let other = Scope { namespace: "bank".to_owned(), all: false, bare: false, target: None };
        assert_eq!(other.nothing(), "No virtual IPs found in bank namespace.");
        assert!(!view().vips.iter().any(|vip| other.has(vip)));
    }

    #[test]
    fn what_may_not_be_read_is_marked() {
        let mut view = view();
        view.pools = None;
        view.agents = None;
        view.nodes = None;
        let text = text(&view, &scope(true));
        assert!(text.starts_with("Agent: Forbidden    Pools: Forbidden\n"), "{text}");
        assert!(text.contains("192.168.10.241   Forbidden   node-2   3/3        Active"), "{text}");
    }

    #[test]
    fn pools_that_want_the_same_are_a_problem() {
        let mut view = view();
        let range = VirtualRouterRange { first: 163, count: 9 };
        view.pools.as_mut().unwrap().push(draft("other", &["10.0.0.1".to_owned()], range));
        let text = text(&view, &scope(true));
        let sentence =
            "! VIP205 VIPPool other: virtual router 163 of pool \"other\" belongs to pool \"lab\" (100-163)";
        assert!(text.contains(sentence), "{text}");
    }

    #[test]
    fn targets() {
        let by = |target: Target| Scope { target: Some(target), ..scope(true) };
        let count = |scope: &Scope| view().vips.iter().filter(|vip| scope.has(vip)).count();
        assert_eq!(count(&by(Target::Vip("192.168.10.243".parse().unwrap()))), 1);
        assert_eq!(count(&by(Target::Service("web".to_owned()))), 1);
        assert_eq!(count(&by(Target::Service("wbe".to_owned()))), 0);
    }
}
