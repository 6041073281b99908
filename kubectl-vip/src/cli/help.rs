//! Help that looks as kubectl's does: commands in groups, and the name by which the program was called.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::path::Path;

use clap::{Command, CommandFactory};

use super::Cli;

/// How help and examples are written.
const WRITTEN: &str = "kubectl vip";
/// The commands in their groups; one that is in none is shown after them.
const GROUPS: [(&str, &[&str]); 4] = [
    ("Install Commands", &["install", "upgrade", "diff", "uninstall", "import"]),
    ("Service Commands", &["expose", "unexpose", "status"]),
    ("Operating Commands", &["pool", "node", "move", "rebalance"]),
    ("Troubleshooting and Other Commands", &["check", "explain", "version", "completion"]),
];

/// The name by which the program was called. kubectl starts a plugin by its whole path, a person by its name.
pub fn called(program: Option<&OsStr>) -> String {
    let program = Path::new(program.unwrap_or_default());
    let stem = program.file_stem().unwrap_or_default().to_string_lossy();
    match stem.strip_prefix("kubectl-") {
        Some(plugin) if program.components().count() > 1 => {
            format!("kubectl {}", plugin.replace('-', " ").replace('_', "-"))
        }
        _ if stem.is_empty() => WRITTEN.to_owned(),
        _ => stem.into_owned(),
    }
}

/// `help COMMAND` is `COMMAND --help`.
pub fn asked(mut arguments: Vec<OsString>) -> Vec<OsString> {
    if arguments.get(1).is_some_and(|word| word == "help") {
        arguments.remove(1);
        arguments.push("--help".into());
    }
    arguments
}

/// The command line of a program that was called so.
pub fn command(called: &str) -> Command {
    let root = Cli::command();
    let template = format!(
        "{{about-with-newline}}\n{{usage-heading}} {{usage}}\n\n{}Options, which may stand anywhere after `vip`:\n{{options}}\
         {{after-help}}",
        groups(&root)
    );
    named(root, called).bin_name(called.to_owned()).help_template(template)
}

fn groups(root: &Command) -> String {
    let known = |command: &&Command| GROUPS.iter().any(|(_, names)| names.contains(&command.get_name()));
    let shown = || root.get_subcommands().filter(|command| !command.is_hide_set());
    let width = shown().map(|command| command.get_name().len()).max().unwrap_or(0);
    let others: Vec<&str> = shown().filter(|command| !known(command)).map(Command::get_name).collect();
    let mut text = String::new();
    for (title, names) in
        GROUPS.iter().map(|(title, names)| (*title, *names)).chain([("Other Commands", &others[..])])
    {
        let commands: Vec<&Command> =
            names.iter().filter_map(|name| shown().find(|command| command.get_name() == *name)).collect();
        if commands.is_empty() {
            continue;
        }
        // Writing to a String does not fail.
        let _ = writeln!(text, "{title}:");
        for command in commands {
            let about = command.get_about().map(ToString::to_string).unwrap_or_default();
            let _ = writeln!(text, "  {:width$}   {about}", command.get_name());
        }
        text.push('\n');
    }
    text
}

/// Examples speak of the program by that name, too.
fn named(mut command: Command, called: &str) -> Command {
    if called == WRITTEN {
        return command;
    }
    if let Some(text) = command.get_after_help().map(ToString::to_string) {
        command = command.after_help(text.replace(WRITTEN, called));
    }
    command.mut_subcommands(|command| named(command, called))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_name_is_that_of_the_call() {
        for (program, name) in [
            ("/root/.krew/bin/kubectl-vip", "kubectl vip"),
            ("./kubectl-vip", "kubectl vip"),
            ("kubectl-vip", "kubectl-vip"),
            ("kubectl-vip.exe", "kubectl-vip"),
            ("/opt/kubectl-my_vip", "kubectl my-vip"),
            ("/opt/vip", "vip"),
            ("", "kubectl vip"),
        ] {
            assert_eq!(called(Some(OsStr::new(program))), name, "{program}");
        }
        let mut expose = command("vip").find_subcommand("expose").unwrap().clone();
        let help = expose.render_help().to_string();
        assert!(help.contains("  vip expose svc/web -n shop") && !help.contains("kubectl vip"), "{help}");
    }

    #[test]
    fn every_command_is_in_one_group() {
        let help = command(WRITTEN).render_help().to_string();
        for subcommand in Cli::command().get_subcommands().filter(|command| !command.is_hide_set()) {
            let line = format!("\n  {} ", subcommand.get_name());
            assert_eq!(help.matches(&line).count(), 1, "{line}: {help}");
        }
        assert!(
            !help.contains("Other Commands:\n  ") || help.contains("Troubleshooting and Other Commands"),
            "{help}"
        );
    }
}
