//! `status --watch`: the table again and again. On a terminal in place; into a pipe the lines that have changed, as
//! `kubectl get --watch` prints them.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use jiff::Timestamp;
use k8s_openapi::api::apps::v1::DaemonSet;
use kube::api::ListParams;
use terminal_size::{Height, Width, terminal_size};
use vip_core::api::{VIPNode, VIPPool, VirtualIP};

use super::detail::Detail;
use super::{Report, Row, Scope, View, details, not_found};
use crate::cli::StatusArgs;
use crate::cluster::{Cluster, permitted};
use crate::exit::Result;
use crate::mirror::Mirror;
use crate::output::{self, say};

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// Details are read again when a line of the table changes, and after so long.
const DETAILS: Duration = Duration::from_secs(5);
/// To the first cell of the screen (ECMA-48: CUP).
const HOME: &str = "\u{1b}[H";
/// The rest of the line, and the rest of the screen, cleared (EL, ED).
const CLEAR_LINE: &str = "\u{1b}[K";
const CLEAR_REST: &str = "\u{1b}[J";

/// Goes on until it is interrupted. What cannot be read for a while is said, and read again.
pub async fn run(cluster: &Cluster, args: &StatusArgs, scope: &Scope, wide: bool) -> Result<()> {
    let in_place = output::is_screen();
    let mut sight = Sight::new(cluster);
    // The first look decides, as it does without --watch.
    let mut view = sight.look().await?;
    if let (true, Some(target)) = (view.shown(scope).is_empty(), &scope.target) {
        return Err(not_found(cluster, target, &view.vips).await?);
    }
    let mut lines = Lines::default();
    let mut depth = Depth::default();
    let mut failing = String::new();
    loop {
        let shown = view.shown(scope);
        let report = view.report(scope, &shown);
        if in_place {
            if failing.is_empty() {
                depth.renew(cluster, scope, &shown, &report).await;
            }
            let mut text = report.head();
            match report.rows.is_empty() {
                true => text.push_str(&format!("{}\n", scope.nothing())),
                false => text.push_str(&report.table(scope, wide, args.list.no_headers)),
            }
            text.push_str(&report.rest(&view, &shown, &depth.details));
            if !failing.is_empty() {
                text.push_str(&format!("\n{failing}\n"));
            }
            output::print(&frame(&text, terminal_size()));
        } else {
            output::print(&lines.news(&report, scope, wide, args.list.no_headers));
        }
        tokio::time::sleep(PAUSE).await;
        match sight.look().await {
            Ok(fresh) => {
                view = fresh;
                failing.clear();
            }
            Err(failure) => {
                let sentence = failure.to_string();
                if !in_place && sentence != failing {
                    say(&sentence);
                }
                failing = sentence;
                view.now = Timestamp::now();
            }
        }
    }
}

/// All that a status is made of, kept up to date.
struct Sight {
    vips: Mirror<VirtualIP>,
    pools: Mirror<VIPPool>,
    nodes: Mirror<VIPNode>,
    agents: Mirror<DaemonSet>,
}

impl Sight {
    fn new(cluster: &Cluster) -> Self {
        let (agents, ours) = cluster.agents();
        Self {
            vips: Mirror::new(cluster.vips(), ListParams::default()),
            pools: Mirror::new(cluster.pools(), ListParams::default()),
            nodes: Mirror::new(cluster.nodes(), ListParams::default()),
            agents: Mirror::new(agents, ours),
        }
    }

    async fn look(&mut self) -> Result<View> {
        let (vips, pools, nodes, agents) =
            futures::join!(self.vips.look(), self.pools.look(), self.nodes.look(), self.agents.look());
        let mut vips: Vec<VirtualIP> = vips?.cloned().collect();
        vips.sort_by_key(|vip| vip.spec.address.parse::<std::net::IpAddr>().ok());
        Ok(View {
            vips,
            pools: permitted(pools)?.map(|all| all.cloned().collect()),
            nodes: permitted(nodes)?.map(|all| all.cloned().collect()),
            agents: permitted(agents)?.map(|all| all.cloned().collect()),
            now: Timestamp::now(),
        })
    }
}

/// The details of what was named.
#[derive(Default)]
struct Depth {
    details: Vec<Detail>,
    rows: Vec<Row>,
    read: Option<Instant>,
}

impl Depth {
    /// Reads them again if it is time. They may be missing for a while, or old: the table goes on.
    async fn renew(&mut self, cluster: &Cluster, scope: &Scope, shown: &[&VirtualIP], report: &Report) {
        let is_same = self.rows.len() == report.rows.len()
            && self.rows.iter().zip(&report.rows).all(|(before, row)| before.is_same(row));
        if is_same && self.read.is_some_and(|read| read.elapsed() < DETAILS) {
            return;
        }
        if let Ok(fresh) = details(cluster, scope, shown).await {
            (self.details, self.rows, self.read) = (fresh, report.rows.clone(), Some(Instant::now()));
        }
    }
}

/// A text that takes the place of what is on the screen: no more of it than fits.
fn frame(text: &str, size: Option<(Width, Height)>) -> String {
    let (columns, rows) = size
        .map_or((usize::MAX, usize::MAX), |(width, height)| (usize::from(width.0), usize::from(height.0)));
    let height = |line: &str| line.chars().count().div_ceil(columns.max(1)).max(1);
    let all: Vec<&str> = text.lines().collect();
    let mut frame = HOME.to_owned();
    // The cursor stands on the last row.
    let mut left = rows.saturating_sub(1);
    for (place, line) in all.iter().enumerate() {
        let rest: usize = all[place..].iter().map(|line| height(line)).sum();
        if rest > left && height(line) >= left {
            frame.push_str(&format!("... {} more lines{CLEAR_LINE}\n", all.len() - place));
            break;
        }
        left -= height(line);
        frame.push_str(&format!("{line}{CLEAR_LINE}\n"));
    }
    frame + CLEAR_REST
}

/// What was printed so far.
#[derive(Default)]
struct Lines {
    widths: Vec<usize>,
    rows: BTreeMap<[String; 3], Row>,
}

impl Lines {
    /// The lines for what is new since the last look: changed, or gone.
    fn news(&mut self, report: &Report, scope: &Scope, wide: bool, no_headers: bool) -> String {
        let first = self.widths.is_empty();
        let now: BTreeMap<[String; 3], Row> = report.rows.iter().map(|row| (key(row), row.clone())).collect();
        let mut fresh: Vec<Row> = Vec::new();
        for (key, row) in &now {
            if self.rows.get(key).is_none_or(|before| !before.is_same(row)) {
                fresh.push(row.clone());
            }
        }
        for (_, gone) in self.rows.iter().filter(|(key, _)| !now.contains_key(*key)) {
            fresh.push(Row { status: "Released".to_owned(), owner: output::NONE.to_owned(), ..gone.clone() });
        }
        self.rows = now;
        let table = super::table(&fresh, scope, wide);
        let widths = table.widths(no_headers);
        self.widths.resize(widths.len(), 0);
        self.widths.iter_mut().zip(widths).for_each(|(known, width)| *known = width.max(*known));
        table.render_in(&self.widths, no_headers || !first)
    }
}

fn key(row: &Row) -> [String; 3] {
    [row.namespace.clone(), row.service.clone(), row.vip.clone()]
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_more_is_drawn_than_the_screen_has_room_for() {
        let drawn = |text: &str, columns, rows| {
            let text = frame(text, Some((Width(columns), Height(rows))));
            let text = text.strip_prefix(HOME).and_then(|text| text.strip_suffix(CLEAR_REST)).unwrap();
            text.replace(CLEAR_LINE, "")
        };
        let text = "a\nb\nc\nd\n";
        assert_eq!(drawn(text, 80, 24), text);
        assert_eq!(drawn(text, 80, 5), text, "with the row of the cursor");
        assert_eq!(drawn(text, 80, 4), "a\nb\n... 2 more lines\n");
        assert_eq!(
            drawn("1234567890\nb\nc\n", 4, 5),
            "1234567890\n... 2 more lines\n",
            "a line may take several rows"
        );
        assert_eq!(drawn(text, 80, 1), "... 4 more lines\n");
        assert_eq!(frame("a\n", None), "\u{1b}[Ha\u{1b}[K\n\u{1b}[J");
    }

    fn row(service: &str, owner: &str, age: &str) -> Row {
        Row {
            namespace: "shop".to_owned(),
            service: service.to_owned(),
            vip: "10.0.0.1".to_owned(),
            pool: "lab".to_owned(),
            owner: owner.to_owned(),
            backends: "3/3".to_owned(),
            status: "Active".to_owned(),
            age: age.to_owned(),
            virtual_router: 1,
            scheduler: "wlc",
            owner_since: age.to_owned(),
        }
    }

    #[test]
    fn only_what_changes_is_printed_again_under_the_same_columns() {
        let scope = Scope { namespace: "shop".to_owned(), all: false, bare: false, target: None };
        let mut lines = Lines::default();
        let mut news = |rows: Vec<Row>| {
            let report = Report { agents: String::new(), pools: None, rows, problems: Vec::new() };
            lines.news(&report, &scope, false, false)
        };
        assert_eq!(
            news(vec![row("web", "node-1", "5s"), row("checkout", "node-2", "5s")]),
            "SERVICE    VIP        POOL   OWNER    BACKENDS   STATUS   AGE\n\
             checkout   10.0.0.1   lab    node-2   3/3        Active   5s\n\
             web        10.0.0.1   lab    node-1   3/3        Active   5s\n"
        );
        assert_eq!(news(vec![row("web", "node-1", "6s"), row("checkout", "node-2", "6s")]), "");
        assert_eq!(
            news(vec![row("web", "node-2", "7s"), row("checkout", "node-2", "7s")]),
            "web        10.0.0.1   lab    node-2   3/3        Active   7s\n"
        );
        assert_eq!(
            news(vec![row("checkout", "node-2", "8s")]),
            "web        10.0.0.1   lab    <none>   3/3        Released   7s\n"
        );
        assert_eq!(news(vec![row("checkout", "node-2", "9s")]), "");
    }
}
