//! `status --watch`: the table again and again. On a terminal in place; into a pipe the lines that have changed, as
//! `kubectl get --watch` prints them.

use std::collections::BTreeMap;
use std::time::Duration;

use super::{Report, Row, Scope, View};
use crate::cli::StatusArgs;
use crate::cluster::Cluster;
use crate::exit::Result;
use crate::output::{self, say};

/// Between two looks.
const PAUSE: Duration = Duration::from_secs(1);
/// To the first cell of the screen, and all that follows cleared (ECMA-48: CUP, ED).
const CLEAR: &str = "\u{1b}[H\u{1b}[2J";

/// Goes on until it is interrupted. What cannot be read for a while is said, and read again.
pub async fn run(cluster: &Cluster, args: &StatusArgs, scope: &Scope, wide: bool) -> Result<()> {
    let in_place = output::is_screen();
    // The first look decides, as it does without --watch.
    let mut view = View::read(cluster).await?;
    let mut lines = Lines::default();
    let mut failing = String::new();
    loop {
        let shown = view.shown(scope);
        let report = view.report(scope, &shown);
        match in_place {
            true => {
                let trouble = if failing.is_empty() { String::new() } else { format!("\n{failing}\n") };
                output::print(&format!(
                    "{CLEAR}{}{trouble}",
                    report.text(scope, wide, args.list.no_headers, "")
                ));
            }
            false => output::print(&lines.news(&report, scope, wide, args.list.no_headers)),
        }
        tokio::time::sleep(PAUSE).await;
        match View::read(cluster).await {
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
                view.now = jiff::Timestamp::now();
            }
        }
    }
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
