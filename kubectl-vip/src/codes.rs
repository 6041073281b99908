//! The codes of everything that `status`, `check` and `install` complain about: one home for what each means.
//!
//! `explain` prints these texts and `docs/troubleshooting.md` is made of them. A code is never given a second meaning.

pub mod addresses;
pub mod cluster;
pub mod network;
pub mod nodes;
pub mod services;

use std::fmt::{self, Write as _};

use serde::{Serialize, Serializer};

use crate::suggest;

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Severity {
    /// Something does not work as it could.
    Warning,
    /// Something does not work.
    Error,
}

impl Severity {
    /// The word for it.
    pub fn word(self) -> &'static str {
        match self {
            Self::Warning => "warning",
            Self::Error => "error",
        }
    }
}

/// The part of `check` that finds it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Group {
    /// The API server, rights, and what runs beside us.
    Cluster,
    /// Agents, kernels, labels and interfaces.
    Nodes,
    /// The LAN: who hears whom, and who else is there.
    Network,
    /// Pools, virtual IPs and Services.
    Objects,
}

impl Group {
    /// All groups in the order in which they are printed.
    pub const ALL: [Self; 4] = [Self::Cluster, Self::Nodes, Self::Network, Self::Objects];

    /// Its name.
    pub fn word(self) -> &'static str {
        match self {
            Self::Cluster => "cluster",
            Self::Nodes => "nodes",
            Self::Network => "network",
            Self::Objects => "objects",
        }
    }
}

/// A code, and all that there is to say about it in general.
#[derive(Debug)]
pub struct Code {
    /// `VIPnnn`.
    pub id: &'static str,
    /// How bad it is.
    pub severity: Severity,
    /// Where `check` shows it.
    pub group: Group,
    /// What it is, in one line.
    pub title: &'static str,
    /// Where it comes from.
    pub cause: &'static str,
    /// What follows from it.
    pub consequence: &'static str,
    /// What helps, the likeliest first.
    pub remedies: &'static [&'static str],
}

/// Defines codes, and the list `ALL` of those of a file.
macro_rules! codes {
    ($($name:ident = $id:literal $severity:ident $group:ident $title:literal {
        cause: $cause:literal, consequence: $consequence:literal, remedies: $remedies:expr $(,)?
    })*) => {
        $(
            #[doc = $title]
            pub static $name: Code = Code {
                id: $id, severity: Severity::$severity, group: Group::$group, title: $title,
                cause: $cause, consequence: $consequence, remedies: &$remedies,
            };
        )*
        /// All codes of this file, by number.
        pub static ALL: &[&Code] = &[$(&$name),*];
    };
}
use codes;

impl PartialEq for Code {
    fn eq(&self, other: &Self) -> bool {
        self.id == other.id
    }
}

impl Eq for Code {}

impl PartialOrd for Code {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Code {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.id.cmp(other.id)
    }
}

impl fmt::Display for Code {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.id)
    }
}

impl Serialize for Code {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(self.id)
    }
}

/// What is wrong: a code to look up, a sentence, and the one command that helps.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Problem {
    /// The code.
    pub code: &'static Code,
    /// What it is about: `shop/web`, `node-2`, `pool lab`.
    pub about: String,
    /// What is wrong.
    pub message: String,
    /// A command that shows more or repairs it.
    pub command: String,
}

/// All codes, by number.
pub fn all() -> impl Iterator<Item = &'static Code> {
    [cluster::ALL, nodes::ALL, addresses::ALL, services::ALL, network::ALL].into_iter().flatten().copied()
}

/// The code that is meant by `VIP301`, `vip301` or `301`; else the end of a sentence with the closest one.
pub fn find(typed: &str) -> Result<&'static Code, String> {
    let upper = typed.trim().to_uppercase();
    let id = if upper.starts_with("VIP") { upper } else { format!("VIP{upper}") };
    all().find(|code| code.id == id).ok_or_else(|| suggest::ending(&id, all().map(|code| code.id)))
}

impl Code {
    /// All that there is to say, for a terminal.
    pub fn explanation(&self) -> String {
        let mut text = format!("{} ({}): {}\n", self.id, self.severity.word(), self.title);
        for (head, body) in [("Cause", self.cause), ("Consequence", self.consequence)] {
            // Writing to a String does not fail.
            let _ = write!(text, "\n{head}:\n{}\n", wrapped(body, "  ", "  "));
        }
        text.push_str("\nRemedies:\n");
        for remedy in self.remedies {
            text.push_str(&wrapped(remedy, "  - ", "    "));
            text.push('\n');
        }
        text
    }

    /// The same for the documentation.
    #[cfg(test)]
    fn markdown(&self) -> String {
        let mut text = format!(
            "### {}\n\n**{}** ({})\n\n*Cause:* {}\n\n*Consequence:* {}\n\n*Remedies:*\n\n",
            self.id,
            self.title,
            self.severity.word(),
            self.cause,
            self.consequence
        );
        for remedy in self.remedies {
            let _ = writeln!(text, "- {remedy}");
        }
        text
    }
}

/// Text in lines of at most 100 columns.
fn wrapped(text: &str, first: &str, rest: &str) -> String {
    const WIDTH: usize = 100;
    let mut done = String::new();
    let mut line = first.to_owned();
    let mut is_empty = true;
    for word in text.split_whitespace() {
        if !is_empty && line.chars().count() + 1 + word.chars().count() > WIDTH {
            done.push_str(&line);
            done.push('\n');
            line = rest.to_owned();
            is_empty = true;
        }
        if !is_empty {
            line.push(' ');
        }
        line.push_str(word);
        is_empty = false;
    }
    done + &line
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::path::{Path, PathBuf};

    use super::*;

    #[test]
    fn codes_are_found_as_people_write_them() {
        for typed in ["VIP301", "vip301", "301", " Vip301 "] {
            assert_eq!(find(typed).map(|code| code.id), Ok("VIP301"), "{typed}");
        }
        assert!(find("VIP31").unwrap_err().starts_with("; did you mean \"VIP"));
        assert_eq!(find("endpoints").unwrap_err(), "");
    }

    #[test]
    fn each_code_has_a_text_and_none_has_two() {
        let ids: Vec<&str> = all().map(|code| code.id).collect();
        let unique: BTreeSet<&str> = ids.iter().copied().collect();
        assert_eq!(ids.len(), unique.len());
        for code in all() {
            for text in [code.title, code.cause, code.consequence] {
                assert!(!text.trim().is_empty(), "{code}");
            }
            assert!(!code.remedies.is_empty(), "{code}");
            assert!(code.title.len() <= 80, "{code}: a title is one line");
            let number = code.id.strip_prefix("VIP").unwrap_or_default();
            assert!(number.len() == 3 && number.bytes().all(|byte| byte.is_ascii_digit()), "{code}");
        }
    }

    #[test]
    fn explanations_fit_a_terminal() {
        for code in all() {
            let text = code.explanation();
            assert!(text.lines().all(|line| line.chars().count() <= 100), "{text}");
            for head in ["\nCause:\n  ", "\nConsequence:\n  ", "\nRemedies:\n  - "] {
                assert!(text.contains(head), "{text}");
            }
        }
        assert_eq!(wrapped("a b", "- ", "  "), "- a b");
        let long = wrapped(&"word ".repeat(30), "- ", "  ");
        assert_eq!(long.lines().count(), 2);
        assert!(long.lines().nth(1).is_some_and(|line| line.starts_with("  word")));
    }

    /// `docs/troubleshooting.md` by code. Written anew when `UPDATE_DOCS` is set.
    #[test]
    fn the_documentation_says_the_same() {
        const BEGIN: &str =
            "<!-- codes: from kubectl-vip/src/codes by `UPDATE_DOCS=1 cargo test -p kubectl-vip codes` -->\n";
        let path = root().join("docs/troubleshooting.md");
        let found = std::fs::read_to_string(&path).unwrap_or_default();
        let (head, _) = found.split_once(BEGIN).expect("the mark at which the codes begin");
        let mut wanted = format!("{head}{BEGIN}");
        for (first, ending) in [
            ("VIP0", "The cluster"),
            ("VIP1", "Agents and nodes"),
            ("VIP2", "Pools and addresses"),
            ("VIP3", "Services"),
            ("VIP4", "The network"),
        ] {
            wanted.push_str(&format!("\n## {ending}\n"));
            for code in all().filter(|code| code.id.starts_with(first)) {
                wanted.push_str(&format!("\n{}", code.markdown()));
            }
        }
        assert_eq!(wanted.matches("\n### VIP").count(), all().count(), "each code is in one of the chapters");
        if std::env::var_os("UPDATE_DOCS").is_some() {
            std::fs::write(&path, &wanted).unwrap();
        }
        let found = std::fs::read_to_string(&path).unwrap();
        assert!(
            found == wanted,
            "docs/troubleshooting.md is old: UPDATE_DOCS=1 cargo test -p kubectl-vip codes"
        );
    }

    /// A code that no test provokes may be one that nothing can find. To explain it or to leave it out provokes nothing.
    #[test]
    fn each_code_is_provoked_by_a_test() {
        let mut tests = String::new();
        for file in files(&root().join("tests/tests")) {
            tests.push_str(&std::fs::read_to_string(file).unwrap());
        }
        for file in files(&root().join("kubectl-vip/src")) {
            let text = std::fs::read_to_string(&file).unwrap();
            let is_registry =
                file.ends_with("codes.rs") || file.parent().is_some_and(|p| p.ends_with("codes"));
            let own = text.split_once("#[cfg(test)]\nmod tests").map(|(_, tests)| tests);
            tests.push_str(own.filter(|_| !is_registry).unwrap_or_default());
        }
        let provoke = |line: &&str| !line.contains("explain") && !line.contains("--skip-checks");
        let tests: String = tests.lines().filter(provoke).collect();
        let missing: Vec<&str> = all().map(|code| code.id).filter(|id| !tests.contains(id)).collect();
        assert!(missing.is_empty(), "no test provokes {missing:?}");
    }

    fn root() -> PathBuf {
        Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
    }

    fn files(folder: &Path) -> Vec<PathBuf> {
        let mut found = Vec::new();
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                found.extend(files(&path));
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
        found
    }
}
