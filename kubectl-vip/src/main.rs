//! `kubectl vip`: virtual IPs for the Services of a bare-metal cluster.

mod cli;
mod cluster;
mod codes;
mod commands;
mod complete;
mod exit;
mod fitness;
mod judge;
mod manifests;
mod mirror;
mod output;
mod prompt;
mod suggest;
mod wait;

use std::ffi::OsString;
use std::process::ExitCode;

use clap::FromArgMatches;

fn main() -> ExitCode {
    let arguments: Vec<OsString> = std::env::args_os().collect();
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::code(Err(exit::Failure::new(format!("cannot start: {error}")))),
    };
    if let Some(words) = complete::asked(&arguments) {
        return exit::code(runtime.block_on(complete::run(&words)));
    }
    let arguments = cli::help::asked(arguments);
    let mut command = cli::help::command(&cli::help::called(arguments.first().map(OsString::as_os_str)));
    let parsed = command.try_get_matches_from_mut(&arguments);
    match parsed
        .and_then(|matches| cli::Cli::from_arg_matches(&matches).map_err(|error| error.format(&mut command)))
    {
        Ok(cli) => exit::code(runtime.block_on(commands::run(cli))),
        Err(error) => exit::usage(&error, &complete::path(&arguments)),
    }
}
