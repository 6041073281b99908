//! `completion`: what makes a shell, or kubectl, complete the words of this program.

use clap::CommandFactory;
use clap_complete::Shell;

use crate::cli::{Cli, CompletionArgs, CompletionShell};
use crate::complete::WORD;
use crate::exit::{Failure, Result};
use crate::output;

/// The name of the program in the scripts.
const PROGRAM: &str = "kubectl-vip";

/// Runs the command.
pub fn run(args: &CompletionArgs) -> Result<()> {
    let shell = match args.shell {
        CompletionShell::Kubectl => {
            output::print(&format!(
                "#!/bin/sh\n# kubectl asks this program for the words after `kubectl vip`.\nexec {PROGRAM} {WORD} \"$@\"\n"
            ));
            return Ok(());
        }
        CompletionShell::Bash => Shell::Bash,
        CompletionShell::Zsh => Shell::Zsh,
        CompletionShell::Fish => Shell::Fish,
        CompletionShell::Powershell => Shell::PowerShell,
    };
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), PROGRAM, &mut script);
    let script =
        String::from_utf8(script).map_err(|error| Failure::new(format!("the script is broken: {error}")))?;
    output::print(&script);
    Ok(())
}
