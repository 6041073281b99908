//! Arguments of the commands that answer questions: `check` and `explain`.

use clap::{Args, ValueEnum};

use crate::codes::{self, Code};

/// Arguments of `check`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip check\n  kubectl vip check --pre\n  kubectl vip check -o short --fail-on warning\n  \
    kubectl vip explain VIP301\n\n\
    Exit codes: 0 when all is well, or well enough for --fail-on; 1 when it is not, or the cluster could not be asked. What you \
    may not read is marked Forbidden and does not count."
)]
pub struct CheckArgs {
    /// Before an installation: also whether you may install, and no word about agents that are not there yet
    #[arg(long)]
    pub pre: bool,
    /// Format of the output [default: table]
    #[arg(short, long, value_enum, value_name = "FORMAT", hide_default_value = true)]
    pub output: Option<CheckFormat>,
    /// What makes the exit code 1
    #[arg(long, value_enum, value_name = "VERDICT", default_value = "error")]
    pub fail_on: FailOn,
}

/// Formats of `check`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum CheckFormat {
    /// All verdicts, by groups
    #[default]
    Table,
    /// Only what is not well, a line each
    Short,
    /// A document for programs
    Json,
}

/// `--fail-on`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum FailOn {
    /// An error
    Error,
    /// An error or a warning
    Warning,
}

/// Arguments of `explain`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip explain\n  kubectl vip explain VIP301\n  kubectl vip explain 301"
)]
pub struct ExplainArgs {
    /// The code; without one, all codes are listed
    #[arg(value_name = "CODE")]
    pub code: Option<String>,
}

/// Reads a code.
pub fn code(text: &str) -> Result<&'static Code, String> {
    codes::find(text).map_err(|closest| format!("there is no such code{closest}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn codes_of_the_command_line() {
        assert_eq!(code("vip003").map(|code| code.id), Ok("VIP003"));
        assert!(code("VIP03").unwrap_err().starts_with("there is no such code; did you mean"));
    }
}
