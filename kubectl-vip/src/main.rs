//! `kubectl vip`: virtual IPs for the Services of a bare-metal cluster.

mod cli;
mod cluster;
mod commands;
mod exit;
mod fitness;
mod manifests;
mod output;
mod prompt;
mod suggest;
mod wait;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    let cli = match cli::Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return exit::usage(&error),
    };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return exit::code(Err(exit::Failure::new(format!("cannot start: {error}")))),
    };
    exit::code(runtime.block_on(commands::run(cli)))
}
