//! `check`: looks at everything that could be wrong, and gives a verdict on each.
//!
//! [`facts`] reads, the groups judge, [`print`] prints. What the user may not read is marked `Forbidden`, and the rest
//! is judged. `install` refuses by the same judgements.

pub mod cluster;
mod facts;
pub mod kube_proxy;
mod network;
mod nodes;
mod objects;
mod peers;
mod print;
mod rights;

use serde::Serialize;

use self::facts::Facts;
use crate::cli::{CheckArgs, FailOn};
use crate::cluster::Cluster;
use crate::codes::{Code, Group, Problem, Severity};
use crate::exit::{Failure, Result};

/// What came of looking at one thing, from good to bad.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Verdict {
    /// It is as it should be.
    Ok,
    /// The user may not read what it takes to tell.
    #[serde(rename = "Forbidden")]
    Forbidden,
    /// Something does not work as it could.
    Warning,
    /// Something does not work.
    Error,
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Line {
    #[serde(serialize_with = "word")]
    group: Group,
    verdict: Verdict,
    #[serde(skip_serializing_if = "Option::is_none")]
    code: Option<&'static Code>,
    #[serde(skip_serializing_if = "String::is_empty")]
    about: String,
    message: String,
    #[serde(skip_serializing_if = "String::is_empty")]
    command: String,
}

fn word<S: serde::Serializer>(group: &Group, serializer: S) -> std::result::Result<S::Ok, S::Error> {
    serializer.serialize_str(group.word())
}

impl From<Problem> for Line {
    fn from(problem: Problem) -> Self {
        let verdict = match problem.code.severity {
            Severity::Warning => Verdict::Warning,
            Severity::Error => Verdict::Error,
        };
        let Problem { code, about, message, command } = problem;
        Self { group: code.group, verdict, code: Some(code), about, message, command }
    }
}

/// The lines so far.
#[derive(Debug, Default)]
pub struct Report {
    lines: Vec<Line>,
    peers: Vec<peers::Row>,
}

impl Report {
    /// Something is well: told unless there are problems with it.
    fn verdict(
        &mut self,
        group: Group,
        well: impl Into<String>,
        problems: impl IntoIterator<Item = Problem>,
    ) {
        let before = self.lines.len();
        self.lines.extend(problems.into_iter().map(Line::from));
        if self.lines.len() == before {
            self.plain(group, Verdict::Ok, well.into());
        }
    }

    /// What may not be read, and what was not checked for that.
    fn forbidden(&mut self, group: Group, what: &str) {
        self.plain(group, Verdict::Forbidden, what.to_owned());
    }

    fn plain(&mut self, group: Group, verdict: Verdict, message: String) {
        let (about, command) = (String::new(), String::new());
        self.lines.push(Line { group, verdict, code: None, about, message, command });
    }

    fn count(&self, verdict: Verdict) -> usize {
        self.lines.iter().filter(|line| line.verdict == verdict).count()
    }

    /// The groups in their order, each with the good news first; nothing is said twice.
    fn settle(mut self) -> Self {
        self.lines.sort_by(|a, b| {
            (a.group, a.verdict, a.code, &a.about).cmp(&(b.group, b.verdict, b.code, &b.about))
        });
        self.lines.dedup();
        self
    }
}

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &CheckArgs) -> Result<()> {
    let facts = Facts::read(cluster, args.pre).await?;
    let report = judge(&facts);
    print::report(&report, args.output.unwrap_or_default())?;
    let (errors, warnings) = (report.count(Verdict::Error), report.count(Verdict::Warning));
    let failed = errors > 0 || (args.fail_on == FailOn::Warning && warnings > 0);
    match failed {
        false => Ok(()),
        true => Err(Failure::new(format!(
            "{} and {} found",
            counted(errors, "error"),
            counted(warnings, "warning")
        ))
        .hint("kubectl vip explain CODE")),
    }
}

/// All judgements on what was read.
fn judge(facts: &Facts) -> Report {
    let mut report = Report::default();
    cluster::judge(facts, &mut report);
    nodes::judge(facts, &mut report);
    network::judge(facts, &mut report);
    objects::judge(facts, &mut report);
    report.settle()
}

/// `1 pool`, `2 pools`.
fn counted(count: usize, what: &str) -> String {
    let plural = if count == 1 { "" } else { "s" };
    format!("{count} {what}{plural}")
}
