//! Completion as kubectl asks for it: it runs `kubectl_complete-vip WORDS... WORD` and reads a candidate in each line, with
//! a description behind a tab, and `:NUMBER` at the end, which tells the shell what to do with them.
//!
//! Somebody waits at a prompt: what the cluster does not say in time is not offered, and no error is told.

mod line;
mod values;

use std::ffi::{OsStr, OsString};
use std::path::Path;

use clap::{Arg, Command, CommandFactory};

use self::line::Line;
use crate::cli::Cli;
use crate::exit::Result;
use crate::output;

/// The first word that asks for candidates, where no name of the program does.
pub const WORD: &str = "__complete";

/// What the shell does with the candidates; the numbers are those of kubectl's library (cobra).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Directive {
    /// Completes names of files when there is no candidate.
    Files = 0,
    /// Nothing else.
    Nothing = 4,
}

/// A candidate and what is said about it.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Candidate {
    word: String,
    about: String,
}

impl Candidate {
    fn new(word: impl Into<String>, about: impl Into<String>) -> Self {
        Self { word: word.into(), about: about.into() }
    }
}

/// The words to complete, when that is what the program was called for.
pub fn asked(arguments: &[OsString]) -> Option<Vec<String>> {
    let (program, rest) = arguments.split_first()?;
    let is_completer = Path::new(program)
        .file_stem()
        .and_then(OsStr::to_str)
        .is_some_and(|stem| stem.starts_with("kubectl_complete-"));
    let rest = match rest.split_first() {
        _ if is_completer => rest,
        Some((first, rest)) if first == WORD => rest,
        _ => return None,
    };
    Some(rest.iter().map(|word| word.to_string_lossy().into_owned()).collect())
}

/// The commands that a command line names, mistakes aside.
pub fn path(arguments: &[OsString]) -> Vec<String> {
    let mut root = Cli::command();
    root.build();
    let words: Vec<String> =
        arguments.iter().skip(1).map(|word| word.to_string_lossy().into_owned()).collect();
    Line::read(&root, &words).path.iter().map(|name| (*name).to_owned()).collect()
}

/// Prints the candidates for the last of these words.
pub async fn run(words: &[String]) -> Result<()> {
    let mut root = Cli::command();
    root.build();
    let (current, before) =
        words.split_last().map_or(("", &[][..]), |(last, before)| (last.as_str(), before));
    let line = Line::read(&root, before);
    let (mut candidates, directive) = candidates(&line, current).await;
    candidates.sort();
    candidates.dedup();
    let mut text = String::new();
    for candidate in candidates {
        text.push_str(&candidate.word);
        if let Some(about) = candidate.about.lines().next() {
            text.push('\t');
            text.push_str(about);
        }
        text.push('\n');
    }
    output::print(&format!("{text}:{}\n", directive as u8));
    Ok(())
}

async fn candidates(line: &Line<'_>, current: &str) -> (Vec<Candidate>, Directive) {
    if let Some(flag) = line.flag {
        return values::of(line, flag, current, "").await;
    }
    if line.flags_end {
        return positional(line, current).await;
    }
    if let Some((name, value)) = current.split_once('=').filter(|(name, _)| name.starts_with("--")) {
        let flag = line.long(&name[2..]);
        let Some(flag) = flag else { return (Vec::new(), Directive::Nothing) };
        return values::of(line, flag, value, &format!("{name}=")).await;
    }
    if current.starts_with('-') {
        return (flags(line.command, current), Directive::Nothing);
    }
    if line.positionals.is_empty() && line.command.has_subcommands() {
        return (commands(line.command, current), Directive::Nothing);
    }
    positional(line, current).await
}

async fn positional(line: &Line<'_>, current: &str) -> (Vec<Candidate>, Directive) {
    match line.positional() {
        Some(argument) => values::of(line, argument, current, "").await,
        None => (Vec::new(), Directive::Nothing),
    }
}

fn commands(command: &Command, current: &str) -> Vec<Candidate> {
    let shown = command.get_subcommands().filter(|command| !command.is_hide_set());
    shown
        .filter(|command| command.get_name().starts_with(current))
        .map(|command| Candidate::new(command.get_name(), about(command.get_about())))
        .collect()
}

fn flags(command: &Command, current: &str) -> Vec<Candidate> {
    let named = |argument: &Arg| Some((format!("--{}", argument.get_long()?), about(argument.get_help())));
    command
        .get_arguments()
        .filter(|argument| !argument.is_hide_set())
        .filter_map(named)
        .filter(|(flag, _)| flag.starts_with(current))
        .map(|(flag, about)| Candidate::new(flag, about))
        .collect()
}

fn about(text: Option<&clap::builder::StyledStr>) -> String {
    text.map(ToString::to_string).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The candidates for the last word of a line, where no cluster is asked.
    fn offered(line: &str) -> (Vec<String>, Directive) {
        let words: Vec<String> = line.split(' ').map(str::to_owned).collect();
        let (current, before) = words.split_last().unwrap();
        let mut root = Cli::command();
        root.build();
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        let (candidates, directive) = runtime.block_on(candidates(&Line::read(&root, before), current));
        (candidates.into_iter().map(|candidate| candidate.word).collect(), directive)
    }

    #[test]
    fn commands_and_flags() {
        let (all, directive) = offered("");
        assert!(all.contains(&"expose".to_owned()) && !all.contains(&"help".to_owned()), "{all:?}");
        assert_eq!(directive, Directive::Nothing);
        assert_eq!(offered("une").0, ["unexpose"]);
        assert_eq!(offered("-n shop une").0, ["unexpose"]);
        assert_eq!(offered("--namespace shop une").0, ["unexpose"]);
        assert_eq!(offered("pool cr").0, ["create"]);
        assert_eq!(offered("expose --sche").0, ["--scheduler"]);
        assert_eq!(offered("expose svc/web --kubec").0, ["--kubeconfig"]);
        assert_eq!(offered("nonsense "), (Vec::new(), Directive::Nothing));
    }

    #[test]
    fn values_that_are_known_without_a_cluster() {
        assert_eq!(offered("status -o ").0, ["wide", "json", "yaml", "name"]);
        assert_eq!(offered("install --dry-run=s").0, ["--dry-run=server"]);
        assert_eq!(offered("expose svc/web --scheduler w").0, ["wrr", "wlc"]);
        assert_eq!(offered("completion z").0, ["zsh"]);
        assert_eq!(offered("status --kubeconfig "), (Vec::new(), Directive::Files));
        assert_eq!(offered("explain VIP40").0.first().map(String::as_str), Some("VIP401"));
        assert_eq!(
            offered("install --skip-checks VIP004,VIP00").0,
            ["VIP004,VIP001", "VIP004,VIP003", "VIP004,VIP004", "VIP004,VIP005"]
        );
        assert_eq!(offered("install --wait=").0, ["--wait=true", "--wait=false"]);
    }

    #[test]
    fn a_flag_without_its_value_is_not_passed_on() {
        let mut root = Cli::command();
        root.build();
        let words: Vec<String> = ["--context", "lab", "status", "-n"].map(str::to_owned).to_vec();
        let line = Line::read(&root, &words);
        assert_eq!(line.global, ["--context", "lab"]);
        assert_eq!(
            (line.path, line.flag.map(|flag| flag.get_id().as_str())),
            (vec!["status"], Some("namespace"))
        );
    }

    #[test]
    fn called_by_either_name() {
        let asked = |words: &[&str]| asked(&words.iter().map(OsString::from).collect::<Vec<_>>());
        assert_eq!(
            asked(&["/x/kubectl_complete-vip", "pool", ""]),
            Some(vec!["pool".to_owned(), String::new()])
        );
        assert_eq!(asked(&["kubectl-vip", "__complete", ""]), Some(vec![String::new()]));
        assert_eq!(asked(&["kubectl-vip", "pool", "__complete"]), None);
    }
}
