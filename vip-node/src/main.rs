//! The program `vip-node`: picks the role, sets up the log, prints an error once.

use std::env;
use std::io;
use std::process::ExitCode;

use clap::Parser;
use tracing::{Level, error};
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use vip_node::args::{Args, Role};
use vip_node::{agent, log::Log, vrrp};

fn main() -> ExitCode {
    let args = Args::parse();
    // Libraries speak of their own troubles, which the roles report in their own words.
    let ours = || Targets::new().with_target("vip_node", Level::INFO);
    let filter = env::var("RUST_LOG").ok().and_then(|text| text.parse().ok()).unwrap_or_else(ours);
    let log = match Log::start(io::stderr()) {
        Ok(log) => log,
        Err(error) => {
            eprintln!("cannot start the thread that writes the log: {error}");
            return ExitCode::FAILURE;
        }
    };
    let writer = log.clone();
    let layer = tracing_subscriber::fmt::layer().with_writer(move || writer.clone());
    tracing_subscriber::registry().with(layer.with_target(false).compact()).with(filter).init();
    let code = match run(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            error!("{failure:#}");
            ExitCode::FAILURE
        }
    };
    log.finish();
    code
}

fn run(args: Args) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    match args.role {
        Role::Vrrp(args) => runtime.block_on(vrrp::run(args)),
        Role::Agent(args) => runtime.block_on(agent::run(args)),
    }
}
