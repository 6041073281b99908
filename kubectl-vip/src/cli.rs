//! The command line: commands, their flags, and kubectl's connection flags, which may stand anywhere after `vip`.

mod answers;
pub mod duration;
pub mod help;
pub mod settings;
pub mod target;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Arg, Args, Parser, Subcommand, ValueEnum};
use vip_core::api::Scheduler;

pub use self::answers::{CheckArgs, CheckFormat, ExplainArgs, FailOn};
use self::duration::parse as duration;
pub use self::settings::{
    CompletionArgs, CompletionShell, DiffArgs, ImportArgs, ImportCommand, InstallArgs, Rollout, UpgradeArgs,
    VersionArgs, Wanted,
};
use crate::output::{Color, Format};

/// Virtual IPs for the Services of a bare-metal cluster.
///
/// A virtual IP is an address of the LAN that survives the death of any node: the agents elect an owner on the wire,
/// the owner answers for the address, and the kernel balances its traffic over the Service's pods.
#[derive(Debug, Parser)]
#[command(
    name = "kubectl-vip",
    bin_name = "kubectl vip",
    version,
    disable_help_subcommand = true,
    args = ignored(),
    after_help = "All of kubectl's connection flags may stand anywhere after `vip`; --help shows them."
)]
pub struct Cli {
    /// When to use colours
    #[arg(
        long,
        value_enum,
        global = true,
        default_value = "auto",
        value_name = "WHEN",
        hide_short_help = true
    )]
    pub color: Color,
    /// How to reach the cluster, and as whom.
    #[command(flatten)]
    pub connection: Connection,
    /// What to do.
    #[command(subcommand)]
    pub command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub enum Command {
    /// Install the agents, and create pools
    Install(InstallArgs),
    /// Bring the agents to the version of this plugin
    Upgrade(UpgradeArgs),
    /// Show what install would change
    Diff(DiffArgs),
    /// Release all addresses and remove everything of kubectl-vip
    Uninstall(UninstallArgs),
    /// Give a Service a virtual IP
    Expose(ExposeArgs),
    /// Take a virtual IP away from a Service
    Unexpose(UnexposeArgs),
    /// Show virtual IPs, their owners and backends, and what is wrong
    Status(StatusArgs),
    /// Look for everything that could be wrong, before or after an installation
    Check(CheckArgs),
    /// Say what a code means, where it comes from and what helps
    Explain(ExplainArgs),
    /// Move a virtual IP to a node, and keep it there while that node is fit
    Move(MoveArgs),
    /// Spread the virtual IPs over the nodes again
    Rebalance(RebalanceArgs),
    /// List, create and delete pools of addresses
    #[command(subcommand)]
    Pool(PoolCommand),
    /// List the nodes with an agent, and take them out of service
    #[command(subcommand)]
    Node(NodeCommand),
    /// Take addresses over from other software
    #[command(subcommand)]
    Import(ImportCommand),
    /// Print the versions of this plugin and of the agents
    Version(VersionArgs),
    /// Print what completes commands, flags and names
    Completion(CompletionArgs),
}

impl Command {
    /// Whether it changes something, and must not stop half way because nobody reads what it prints.
    pub fn changes(&self) -> bool {
        match self {
            Self::Install(_)
            | Self::Upgrade(_)
            | Self::Uninstall(_)
            | Self::Expose(_)
            | Self::Unexpose(_)
            | Self::Move(_)
            | Self::Rebalance(_)
            | Self::Import(_) => true,
            Self::Pool(command) => !matches!(command, PoolCommand::List(_)),
            Self::Node(command) => !matches!(command, NodeCommand::List(_)),
            Self::Diff(_)
            | Self::Status(_)
            | Self::Check(_)
            | Self::Explain(_)
            | Self::Version(_)
            | Self::Completion(_) => false,
        }
    }
}

const CONNECTION: &str = "Connection flags (as in kubectl)";

/// kubectl's connection flags.
#[derive(Clone, Debug, Default, Args)]
pub struct Connection {
    /// Path to the kubeconfig file
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION, hide_short_help = true)]
    pub kubeconfig: Option<PathBuf>,
    /// The kubeconfig context to use
    #[arg(long, global = true, value_name = "NAME", help_heading = CONNECTION, hide_short_help = true)]
    pub context: Option<String>,
    /// The kubeconfig cluster to use
    #[arg(long, global = true, value_name = "NAME", help_heading = CONNECTION, hide_short_help = true)]
    pub cluster: Option<String>,
    /// The kubeconfig user to use
    #[arg(long, global = true, value_name = "NAME", help_heading = CONNECTION, hide_short_help = true)]
    pub user: Option<String>,
    /// Namespace of the Services (install: of the agents)
    #[arg(short, long, global = true, value_name = "NS", value_parser = target::name, help_heading = CONNECTION)]
    pub namespace: Option<String>,
    /// Address and port of the API server
    #[arg(short, long, global = true, value_name = "URL", help_heading = CONNECTION, hide_short_help = true)]
    pub server: Option<String>,
    /// Bearer token for the API server
    #[arg(long, global = true, value_name = "TOKEN", help_heading = CONNECTION, hide_short_help = true)]
    pub token: Option<String>,
    /// Name for the API server's basic authentication
    #[arg(long, global = true, value_name = "NAME", help_heading = CONNECTION, hide_short_help = true)]
    pub username: Option<String>,
    /// Password for the API server's basic authentication
    #[arg(long, global = true, value_name = "PASSWORD", help_heading = CONNECTION, hide_short_help = true)]
    pub password: Option<String>,
    /// User to impersonate
    #[arg(long = "as", global = true, value_name = "USER", help_heading = CONNECTION, hide_short_help = true)]
    pub as_user: Option<String>,
    /// Group to impersonate; may be repeated
    #[arg(long, global = true, value_name = "GROUP", help_heading = CONNECTION, hide_short_help = true)]
    pub as_group: Vec<String>,
    /// UID to impersonate
    #[arg(long, global = true, value_name = "UID", help_heading = CONNECTION, hide_short_help = true)]
    pub as_uid: Option<String>,
    /// Something more about the user to impersonate; may be repeated
    #[arg(long, global = true, value_name = "KEY=VALUE", value_parser = pair, help_heading = CONNECTION, hide_short_help = true)]
    pub as_user_extra: Vec<(String, String)>,
    /// File with the certificate authority of the API server
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION, hide_short_help = true)]
    pub certificate_authority: Option<PathBuf>,
    /// File with the client certificate
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION, hide_short_help = true)]
    pub client_certificate: Option<PathBuf>,
    /// File with the key of the client certificate
    #[arg(long, global = true, value_name = "FILE", help_heading = CONNECTION, hide_short_help = true)]
    pub client_key: Option<PathBuf>,
    /// Do not check the certificate of the API server: insecure
    #[arg(long, global = true, num_args = 0..=1, require_equals = true, default_missing_value = "true",
          value_parser = switch, value_name = "BOOL", help_heading = CONNECTION, hide_short_help = true)]
    pub insecure_skip_tls_verify: Option<bool>,
    /// Name that the certificate of the API server must have
    #[arg(long, global = true, value_name = "NAME", help_heading = CONNECTION, hide_short_help = true)]
    pub tls_server_name: Option<String>,
    /// How long to wait for one answer of the API server; 0 waits forever
    #[arg(long, global = true, value_name = "DURATION", value_parser = duration, help_heading = CONNECTION,
          hide_short_help = true)]
    pub request_timeout: Option<Duration>,
    /// How much to tell on stderr: from 6 on, every request to the API server
    #[arg(short = 'v', long = "v", global = true, value_name = "LEVEL", value_parser = level, default_value_t = 0, hide_default_value = true,
          help_heading = CONNECTION, hide_short_help = true)]
    pub verbosity: u8,
}

/// Flags of kubectl that have no meaning here: they are accepted, so that its aliases and scripts work.
fn ignored() -> Vec<Arg> {
    let flag = |name: &'static str| Arg::new(name).long(name).global(true).hide(true);
    let valued = ["cache-dir", "kuberc", "vmodule", "log-flush-frequency", "profile", "profile-output"];
    let switches = ["disable-compression", "match-server-version", "warnings-as-errors"];
    let valued = valued.map(|name| flag(name).value_name("VALUE"));
    let switches = switches.map(|name| {
        flag(name).num_args(0..=1).require_equals(true).default_missing_value("true").value_parser(switch)
    });
    valued.into_iter().chain(switches).collect()
}

/// `-A`, where everything is of the whole cluster anyway.
fn all_namespaces() -> Arg {
    Arg::new("all-namespaces").short('A').long("all-namespaces").hide(true).action(clap::ArgAction::SetTrue)
}

/// Reads a yes or no in the forms that kubectl takes.
pub fn switch(text: &str) -> Result<bool, String> {
    match text {
        "1" | "t" | "T" | "true" | "TRUE" | "True" => Ok(true),
        "0" | "f" | "F" | "false" | "FALSE" | "False" => Ok(false),
        _ => Err("it is true or false".to_owned()),
    }
}

/// Reads a verbosity.
fn level(text: &str) -> Result<u8, String> {
    text.parse().map_err(|_| "a level is a number, from 6 on it shows requests".to_owned())
}

/// Reads `KEY=VALUE`.
fn pair(text: &str) -> Result<(String, String), String> {
    let (key, value) =
        text.split_once('=').filter(|(key, _)| !key.is_empty()).ok_or("it is not KEY=VALUE")?;
    Ok((key.to_owned(), value.to_owned()))
}

/// `--dry-run`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum DryRun {
    /// Change the cluster
    #[default]
    None,
    /// Send nothing that changes the cluster
    Client,
    /// Let the API server check everything and store nothing
    Server,
}

impl DryRun {
    /// What stands after the line of an object, as kubectl writes it.
    pub fn suffix(self) -> &'static str {
        match self {
            Self::None => "",
            Self::Client => " (dry run)",
            Self::Server => " (server dry run)",
        }
    }
}

/// Flags of every command that changes something.
#[derive(Clone, Debug, Default, Args)]
pub struct Change {
    /// Show what would be done: with `client` nothing is sent, with `server` nothing is stored
    #[arg(long, value_enum, default_value = "none", num_args = 0..=1, require_equals = true,
          default_missing_value = "client", value_name = "HOW")]
    pub dry_run: DryRun,
    /// Print the objects instead of a line for each
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Written>,
}

/// Formats of what a command has written.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Written {
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// One resource/name for each line
    Name,
}

/// Formats of whole objects.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Document {
    /// JSON
    Json,
    /// YAML
    Yaml,
}

/// The output of what deletes.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Named {
    /// One resource/name for each line
    Name,
}

/// Arguments of `uninstall`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip uninstall\n  kubectl vip uninstall --yes --keep-crds")]
pub struct UninstallArgs {
    /// Keep the resource definitions, and with them pools and virtual IPs, for a later install
    #[arg(long)]
    pub keep_crds: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    /// How long to wait for the agents to clean their nodes
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "2m")]
    pub timeout: Duration,
    /// Show what would be deleted
    #[arg(long, value_enum, default_value = "none", num_args = 0..=1, require_equals = true,
          default_missing_value = "client", value_name = "HOW")]
    pub dry_run: DryRun,
    /// Print the names alone
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Named>,
}

/// Arguments of `expose`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip expose svc/web -n shop\n  kubectl vip expose svc/web svc/api --pool edge\n  \
    kubectl vip expose svc/web --ip 192.168.10.243\n  kubectl vip expose svc/web --ip 192.168.10.243,fd00:10::243\n  \
    kubectl vip expose svc/mail --ip 192.168.10.243 --share\n\n\
    A Service gets an address of each family in its spec.ipFamilies of which the pools have any."
)]
pub struct ExposeArgs {
    /// The Services: svc/NAME... or svc NAME...
    #[arg(required = true, num_args = 1.., value_name = "svc/NAME")]
    pub service: Vec<String>,
    /// Draw the address from this pool
    #[arg(long, value_name = "POOL", conflicts_with = "ip")]
    pub pool: Option<String>,
    /// Take this address, or one of each family
    #[arg(long, value_name = "ADDRESS[,ADDRESS]", value_delimiter = ',')]
    pub ip: Vec<String>,
    /// Share the address of other Services, on other ports
    #[arg(long)]
    pub share: bool,
    /// IPVS scheduler
    #[arg(long, value_name = "NAME", value_parser = scheduler)]
    pub scheduler: Option<Scheduler>,
    /// How long a client stays with its backend
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub persistence: Option<Duration>,
    /// Wait until a node owns the address: true fails when none does in time, false does not wait at all
    /// [default: look for 10s]
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch,
          value_name = "BOOL")]
    pub wait: Option<bool>,
    /// How long to wait [default: 10s, with --wait 1m]
    #[arg(long, value_name = "DURATION", value_parser = duration)]
    pub timeout: Option<Duration>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `unexpose`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip unexpose svc/web -n shop\n  kubectl vip unexpose svc/web svc/api -n shop\n  \
    kubectl vip unexpose 192.168.10.241"
)]
pub struct UnexposeArgs {
    /// The Services (svc/NAME) or the virtual IPs
    #[arg(required = true, num_args = 1.., value_name = "svc/NAME|VIP")]
    pub target: Vec<String>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `move`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip move 192.168.10.241 --to node-2\n  \
    kubectl vip move svc/web -n shop --to node-2\n  kubectl vip move 192.168.10.241 --unpin\n\n\
    A virtual IP that was moved is pinned: it goes back to that node whenever the node is fit. --unpin ends that and \
    leaves it where it is.")]
pub struct MoveArgs {
    /// The virtual IP, or the Service (svc/NAME) whose virtual IPs are meant
    #[arg(required = true, num_args = 1..=2, value_name = "VIP|svc/NAME")]
    pub target: Vec<String>,
    /// The node that should own it
    #[arg(long, value_name = "NODE", required_unless_present = "unpin", conflicts_with = "unpin")]
    pub to: Option<String>,
    /// Prefer no node any more; the virtual IP stays where it is
    #[arg(long)]
    pub unpin: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub wait: Wait,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `rebalance`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip rebalance --dry-run\n  kubectl vip rebalance\n\n\
    Virtual IPs that `kubectl vip move` has pinned to a node stay there.")]
pub struct RebalanceArgs {
    /// How long to wait for each move
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "30s")]
    pub timeout: Duration,
    /// Leave the line of column names out
    #[arg(long)]
    pub no_headers: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Flags of every command that moves virtual IPs and then waits for their new owner.
#[derive(Clone, Debug, Args)]
pub struct Wait {
    /// Wait until that has happened
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
          value_parser = switch, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "30s")]
    pub timeout: Duration,
}

/// Arguments of `status`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip status -A\n  kubectl vip status svc/web -n shop\n  \
    kubectl vip status 192.168.10.241 -o yaml\n  kubectl vip status -A --watch")]
pub struct StatusArgs {
    /// Only this Service (svc/NAME) or virtual IP
    #[arg(num_args = 0..=2, value_name = "svc/NAME|VIP")]
    pub target: Vec<String>,
    /// Services of all namespaces
    #[arg(short = 'A', long)]
    pub all_namespaces: bool,
    /// Go on: in place on a terminal, line by line into a pipe
    #[arg(short, long)]
    pub watch: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub list: List,
}

/// Flags of every command that prints a table.
#[derive(Clone, Debug, Default, Args)]
pub struct List {
    /// Format of the output
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Format>,
    /// Leave the line of column names out
    #[arg(long)]
    pub no_headers: bool,
}

/// The commands of `pool`.
#[derive(Debug, Subcommand)]
pub enum PoolCommand {
    /// List the pools
    #[command(visible_alias = "ls", arg = all_namespaces(),
              after_help = "Examples:\n  kubectl vip pool list\n  kubectl vip pool list -o wide")]
    List(List),
    /// Create a pool of addresses of the LAN
    Create(PoolCreateArgs),
    /// Change a pool: add addresses, or keep some from being given out
    Set(PoolSetArgs),
    /// Delete a pool that no virtual IP uses
    #[command(visible_alias = "rm")]
    Delete(PoolDeleteArgs),
}

/// Arguments of `pool create`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip pool create lab 192.168.10.240/28\n  \
    kubectl vip pool create edge 10.0.0.10-10.0.0.20 10.0.0.30 --namespaces shop,bank --virtual-routers 50-60")]
pub struct PoolCreateArgs {
    /// Name of the pool
    pub name: String,
    /// CIDRs, ranges first-last or single addresses
    #[arg(required = true, value_name = "RANGE", value_delimiter = ',')]
    pub ranges: Vec<String>,
    /// Virtual router identifiers that the pool may use on the LAN [default: 64 free ones from 100 up]
    #[arg(long, value_name = "FIRST-LAST")]
    pub virtual_routers: Option<String>,
    /// Addresses of the pool that are not given out
    #[arg(long, value_name = "RANGE", value_delimiter = ',')]
    pub exclude: Vec<String>,
    /// Namespaces whose Services may draw from the pool [default: all]
    #[arg(long, value_name = "NS[,NS...]", value_delimiter = ',')]
    pub namespaces: Vec<String>,
    /// The only interface on which the addresses may be bound
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// Labels that a node must have to own addresses of the pool
    #[arg(long, value_name = "LABEL=VALUE[,...]")]
    pub node_selector: Option<String>,
    /// Whether `expose` may draw from the pool without naming it
    #[arg(long, default_value_t = true, value_parser = switch, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub auto_assign: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `pool set`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip pool set lab --add 192.168.11.0/28\n  \
    kubectl vip pool set lab --exclude 192.168.10.250\n  kubectl vip pool set lab --virtual-routers 164-227")]
pub struct PoolSetArgs {
    /// Name of the pool
    #[arg(value_name = "POOL")]
    pub name: String,
    /// Add these addresses
    #[arg(long, value_name = "RANGE", value_delimiter = ',',
          required_unless_present_any = ["exclude", "virtual_routers"])]
    pub add: Vec<String>,
    /// Give these addresses out no more
    #[arg(long, value_name = "RANGE", value_delimiter = ',')]
    pub exclude: Vec<String>,
    /// Virtual router identifiers for the virtual IPs to come; those that there are keep theirs
    #[arg(long, value_name = "FIRST-LAST")]
    pub virtual_routers: Option<String>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `pool delete`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip pool delete lab\n  kubectl vip pool delete lab --dry-run=server"
)]
pub struct PoolDeleteArgs {
    /// Name of the pool
    #[arg(value_name = "POOL")]
    pub name: String,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// The commands of `node`.
#[derive(Debug, Subcommand)]
pub enum NodeCommand {
    /// List the nodes with an agent, and the addresses that each owns
    #[command(visible_alias = "ls", arg = all_namespaces(),
              after_help = "Examples:\n  kubectl vip node list\n  kubectl vip node list -o yaml")]
    List(List),
    /// Give the addresses of a node to others, and keep it from taking any
    Drain(DrainArgs),
    /// Let a drained node own addresses again
    Undrain(UndrainArgs),
}

/// Arguments of `node drain`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip node drain node-2\n  kubectl vip node drain node-2 --dry-run\n\n\
    Only virtual IPs go: pods stay, and `kubectl drain` knows nothing of this."
)]
pub struct DrainArgs {
    /// Name of the node
    #[arg(value_name = "NODE")]
    pub node: String,
    /// Do not ask when addresses would be left without an owner
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub wait: Wait,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `node undrain`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip node undrain node-2")]
pub struct UndrainArgs {
    /// Name of the node
    #[arg(value_name = "NODE")]
    pub node: String,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

fn scheduler(text: &str) -> Result<Scheduler, String> {
    serde_json::from_value(serde_json::Value::String(text.to_owned())).map_err(|_| {
        "an IPVS scheduler is one of rr, wrr, lc, wlc, fo, ovf, lblc, lblcr, dh, sh, mh, sed, nq, twos"
            .to_owned()
    })
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn connection_flags_stand_anywhere() {
        for line in [
            "kubectl-vip -n shop --context lab expose svc/web",
            "kubectl-vip expose -n shop svc/web --context=lab",
            "kubectl-vip expose svc/web --namespace shop --context lab",
        ] {
            let cli = Cli::try_parse_from(line.split(' ')).unwrap();
            assert_eq!(cli.connection.namespace.as_deref(), Some("shop"), "{line}");
            assert_eq!(cli.connection.context.as_deref(), Some("lab"), "{line}");
        }
        let cli = Cli::try_parse_from([
            "kubectl-vip",
            "pool",
            "list",
            "--as",
            "bob",
            "--as-group=a",
            "--as-group=b",
        ]);
        assert_eq!(cli.unwrap().connection.as_group, ["a", "b"]);
    }

    #[test]
    fn dry_run_takes_its_value_with_an_equals_sign() {
        let parse = |line: &str| match Cli::try_parse_from(line.split(' ')).unwrap().command {
            Command::Unexpose(args) => args.change.dry_run,
            _ => DryRun::None,
        };
        assert_eq!(parse("kubectl-vip unexpose svc/web"), DryRun::None);
        assert_eq!(parse("kubectl-vip unexpose --dry-run svc/web"), DryRun::Client);
        assert_eq!(parse("kubectl-vip unexpose svc/web --dry-run=server"), DryRun::Server);
    }

    #[test]
    fn a_move_goes_to_a_node_or_ends_a_pin() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.command);
        let moved = |line: &str| match parse(line).unwrap() {
            Command::Move(args) => (args.to, args.unpin, args.wait.wait, args.wait.timeout.as_secs()),
            _ => panic!("{line} is no move"),
        };
        let to = Some("node-2".to_owned());
        assert_eq!(moved("kubectl-vip move 10.0.0.9 --to node-2"), (to.clone(), false, true, 30));
        assert_eq!(
            moved("kubectl-vip move svc web --to=node-2 --wait=false --timeout 2m"),
            (to, false, false, 120)
        );
        assert_eq!(moved("kubectl-vip move svc/web --unpin"), (None, true, true, 30));
        for bad in ["move 10.0.0.9", "move --to node-2", "move 10.0.0.9 --to node-2 --unpin"] {
            assert!(parse(&format!("kubectl-vip {bad}")).is_err(), "{bad}");
        }
    }

    #[test]
    fn nodes_are_drained_by_name() {
        let parse = |line: &str| Cli::try_parse_from(line.split(' ')).map(|cli| cli.command);
        let Ok(Command::Node(NodeCommand::Drain(args))) = parse("kubectl-vip node drain node-2 --yes") else {
            panic!("a drain")
        };
        assert_eq!((args.node.as_str(), args.yes, args.change.dry_run), ("node-2", true, DryRun::None));
        let Ok(Command::Node(NodeCommand::Undrain(args))) =
            parse("kubectl-vip node undrain node-2 --dry-run=server")
        else {
            panic!("an undrain")
        };
        assert_eq!((args.node.as_str(), args.change.dry_run), ("node-2", DryRun::Server));
        let Ok(Command::Rebalance(args)) = parse("kubectl-vip rebalance --dry-run --timeout 5s") else {
            panic!("a rebalance")
        };
        assert_eq!((args.timeout.as_secs(), args.change.dry_run), (5, DryRun::Client));
        assert!(parse("kubectl-vip node drain").is_err());
    }

    #[test]
    fn every_command_has_examples_of_itself() {
        fn leaves(command: &clap::Command, path: &str) {
            let path = format!("{path} {}", command.get_name());
            if command.has_subcommands() {
                return command.get_subcommands().for_each(|one| leaves(one, &path));
            }
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            let examples = help.strip_prefix("Examples:\n").unwrap_or_default();
            let examples: Vec<&str> = examples.lines().take_while(|line| !line.is_empty()).collect();
            assert!(examples.iter().any(|line| line.contains(&path)), "{path}: {help}");
        }
        Cli::command().get_subcommands().for_each(|command| leaves(command, "kubectl vip"));
    }

    #[test]
    fn what_kubectl_takes_is_taken() {
        for line in [
            "--cache-dir /tmp --vmodule=a=1 status --disable-compression=false",
            "status -A --warnings-as-errors --kuberc x --profile none --log-flush-frequency 5s",
            "pool list -A",
            "node ls --all-namespaces --match-server-version",
            "--username u --password p pool list --color=never",
        ] {
            let words = ["kubectl-vip"].into_iter().chain(line.split(' '));
            assert!(Cli::try_parse_from(words).is_ok(), "{line}");
        }
        assert!(
            [("1", true), ("T", true), ("False", false)].iter().all(|(text, is)| switch(text) == Ok(*is))
        );
        for bad in ["status -n a_b", "status -v high", "expose svc/web --wait=maybe"] {
            let words = ["kubectl-vip"].into_iter().chain(bad.split(' '));
            let said = Cli::try_parse_from(words).unwrap_err().to_string();
            assert!(!said.contains("digit found"), "{said}");
        }
    }

    #[test]
    fn schedulers() {
        assert_eq!(scheduler("wrr"), Ok(Scheduler::Wrr));
        assert!(scheduler("random").unwrap_err().contains("twos"));
    }
}
