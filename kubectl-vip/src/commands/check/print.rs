//! How a report is printed: all of it by groups, only what is not well, or a document for programs.

use serde_json::json;

use super::{Report, Verdict};
use crate::cli::{CheckFormat, Document};
use crate::codes::Group;
use crate::exit::Result;
use crate::output::{self, Table};

/// Columns before the message.
const MARGIN: usize = 10;

impl Verdict {
    fn word(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Forbidden => "Forbidden",
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }

    /// The escape sequence of its colour.
    fn colour(self) -> &'static str {
        match self {
            Self::Ok => "\x1b[32m",
            Self::Forbidden | Self::Warning => "\x1b[33m",
            Self::Error => "\x1b[31m",
        }
    }
}

/// Prints the report.
pub fn report(report: &Report, format: CheckFormat) -> Result<()> {
    match format {
        CheckFormat::Table => output::print(&report.text(output::is_colourful())),
        CheckFormat::Short => output::print(&report.short(output::is_colourful())),
        CheckFormat::Json => output::document(&report.document(), Document::Json)?,
    }
    Ok(())
}

fn painted(verdict: Verdict, width: usize, colourful: bool) -> String {
    let word = verdict.word();
    match colourful {
        true => format!("{}{word:<width$}\x1b[0m", verdict.colour()),
        false => format!("{word:<width$}"),
    }
}

impl Report {
    /// Everything, by groups.
    fn text(&self, colourful: bool) -> String {
        let mut text = String::new();
        for group in Group::ALL {
            let lines: Vec<_> = self.lines.iter().filter(|line| line.group == group).collect();
            if lines.is_empty() {
                continue;
            }
            if !text.is_empty() {
                text.push('\n');
            }
            text.push_str(&format!("{}\n", group.word()));
            for line in lines {
                text.push_str(&format!(
                    "  {} {}\n",
                    painted(line.verdict, MARGIN, colourful),
                    line.sentence()
                ));
                if !line.command.is_empty() {
                    text.push_str(&format!("  {:MARGIN$} {}\n", "", line.command));
                }
            }
            if group == Group::Network && self.peers.len() > 1 {
                text.push_str("  who hears whom (a row for each listener, a column for each speaker; - is silence by right):\n");
                for line in self.matrix().render(false).lines() {
                    text.push_str(&format!("  {:MARGIN$} {line}\n", ""));
                }
            }
        }
        text
    }

    /// Only what is not well, a line each.
    fn short(&self, colourful: bool) -> String {
        let bad = self.lines.iter().filter(|line| line.verdict != Verdict::Ok);
        bad.map(|line| format!("{} {}\n", painted(line.verdict, 0, colourful), line.sentence())).collect()
    }

    fn matrix(&self) -> Table {
        let headers =
            ["LISTENER".to_owned()].into_iter().chain(self.peers.iter().map(|row| row.node.clone()));
        let mut table = Table::named(headers);
        for row in &self.peers {
            let cell = |speaker: &super::peers::Row| match row.hears.get(&speaker.node) {
                Some(true) => "yes".to_owned(),
                Some(false) => "NO".to_owned(),
                None => "-".to_owned(),
            };
            table.row([row.node.clone()].into_iter().chain(self.peers.iter().map(cell)));
        }
        table
    }

    fn document(&self) -> serde_json::Value {
        json!({
            "apiVersion": "cli.kubectl-vip.io/v1alpha1",
            "kind": "CheckReport",
            "summary": {
                "ok": self.count(Verdict::Ok),
                "forbidden": self.count(Verdict::Forbidden),
                "warnings": self.count(Verdict::Warning),
                "errors": self.count(Verdict::Error),
            },
            "items": self.lines,
            "peers": self.peers,
        })
    }
}

impl super::Line {
    fn sentence(&self) -> String {
        match self.code {
            Some(code) => format!("{code} {}: {}", self.about, self.message),
            None => self.message.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use super::super::peers::Row;
    use super::*;
    use crate::codes::{Problem, nodes};

    fn faulty() -> Report {
        let mut report = Report::default();
        report.verdict(Group::Cluster, "the API server is v1.33.1", None);
        report.forbidden(Group::Cluster, "namespaces: pod security is not checked");
        let problem = Problem {
            code: &nodes::SILENT,
            about: "node-2".to_owned(),
            message: "the agent has been silent for 60s".to_owned(),
            command: "kubectl describe vipnode node-2".to_owned(),
        };
        report.verdict(Group::Nodes, "", [problem]);
        report.verdict(Group::Network, "all that speak are heard", None);
        report.peers =
            ["node-1", "node-2"].map(|node| Row { node: node.to_owned(), hears: BTreeMap::new() }).to_vec();
        report.peers[1].hears.insert("node-1".to_owned(), false);
        report.settle()
    }

    #[test]
    fn the_whole_report() {
        assert_eq!(
            faulty().text(false),
            "cluster\n\
             \x20 ok         the API server is v1.33.1\n\
             \x20 Forbidden  namespaces: pod security is not checked\n\
             \n\
             nodes\n\
             \x20 error      VIP102 node-2: the agent has been silent for 60s\n\
             \x20            kubectl describe vipnode node-2\n\
             \n\
             network\n\
             \x20 ok         all that speak are heard\n\
             \x20 who hears whom (a row for each listener, a column for each speaker; - is silence by right):\n\
             \x20            LISTENER   node-1   node-2\n\
             \x20            node-1     -        -\n\
             \x20            node-2     NO       -\n"
        );
        assert!(faulty().text(true).contains("  \x1b[31merror     \x1b[0m VIP102 node-2"));
    }

    #[test]
    fn what_is_not_well_and_the_document() {
        assert_eq!(
            faulty().short(false),
            "Forbidden namespaces: pod security is not checked\nerror VIP102 node-2: the agent has been silent for 60s\n"
        );
        let document = faulty().document();
        assert_eq!(document["summary"], json!({"ok": 2, "forbidden": 1, "warnings": 0, "errors": 1}));
        assert_eq!(
            document["items"][2],
            json!({"group": "nodes", "verdict": "error", "code": "VIP102", "about": "node-2",
                   "message": "the agent has been silent for 60s", "command": "kubectl describe vipnode node-2"})
        );
        assert_eq!(document["peers"][1], json!({"node": "node-2", "hears": {"node-1": false}}));
    }
}
