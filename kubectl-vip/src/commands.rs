//! The commands, a file each. This one connects and hands over.

mod check;
mod completion;
mod diff;
mod explain;
mod expose;
mod import;
mod install;
mod r#move;
pub mod node;
pub mod pool;
mod rebalance;
mod status;
mod unexpose;
mod uninstall;
mod upgrade;
mod version;

use crate::cli::{Cli, Command, DryRun, ImportCommand, NodeCommand, PoolCommand};
use crate::cluster::Cluster;
use crate::exit::{Failure, Result};
use crate::output;

/// The version of this plugin.
pub const VERSION: &str = concat!("v", env!("CARGO_PKG_VERSION"));

/// Does what the command line says.
pub async fn run(cli: Cli) -> Result<()> {
    output::begin(cli.color, cli.command.changes());
    match &cli.command {
        // Without a cluster: these are also for people who do not have one yet.
        Command::Install(args) if args.rollout.change.dry_run == DryRun::Client => {
            return install::show(args, cli.connection.namespace.as_deref());
        }
        Command::Version(args) => return version::run(args, &cli.connection).await,
        Command::Completion(args) => return completion::run(args),
        Command::Explain(args) => return explain::run(args),
        Command::Diff(_) => return connected(&cli).await.map_err(Failure::of_diff),
        _ => {}
    }
    connected(&cli).await
}

async fn connected(cli: &Cli) -> Result<()> {
    let cluster = Cluster::connect(&cli.connection).await?;
    on(&cluster, &cli.command).await.map_err(|failure| failure.at(&cluster.server))
}

async fn on(cluster: &Cluster, command: &Command) -> Result<()> {
    match command {
        Command::Install(args) => install::run(cluster, args).await,
        Command::Upgrade(args) => upgrade::run(cluster, args).await,
        Command::Diff(args) => diff::run(cluster, args).await,
        Command::Uninstall(args) => uninstall::run(cluster, args).await,
        Command::Expose(args) => expose::run(cluster, args).await,
        Command::Unexpose(args) => unexpose::run(cluster, args).await,
        Command::Status(args) => status::run(cluster, args).await,
        Command::Check(args) => check::run(cluster, args).await,
        Command::Pool(PoolCommand::List(args)) => pool::list(cluster, args).await,
        Command::Pool(PoolCommand::Create(args)) => pool::create(cluster, args).await,
        Command::Pool(PoolCommand::Set(args)) => pool::set(cluster, args).await,
        Command::Pool(PoolCommand::Delete(args)) => pool::delete(cluster, args).await,
        Command::Move(args) => r#move::run(cluster, args).await,
        Command::Rebalance(args) => rebalance::run(cluster, args).await,
        Command::Node(NodeCommand::List(args)) => node::list(cluster, args).await,
        Command::Node(NodeCommand::Drain(args)) => node::drain::run(cluster, args).await,
        Command::Node(NodeCommand::Undrain(args)) => node::drain::undo(cluster, args).await,
        Command::Import(ImportCommand::Configmap(args)) => import::run(cluster, args).await,
        // Done before connecting.
        Command::Version(_) | Command::Completion(_) | Command::Explain(_) => Ok(()),
    }
}
