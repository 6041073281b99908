//! Arguments of the commands that put the agents into a cluster, and of those that help on the way there.

use std::time::Duration;

use clap::{Args, Subcommand, ValueEnum};

use super::answers::code;
use super::duration::parse as duration;
use super::{Change, Document, switch};
use crate::codes::Code;
use crate::codes::cluster::SKIPPABLE;

/// What the agents and the first pools shall be like.
#[derive(Clone, Debug, Default, Args)]
pub struct Wanted {
    /// Create a pool: addresses as CIDRs, ranges first-last or single ones, with commas between; may be repeated
    #[arg(long = "pool", value_name = "NAME=RANGE[,RANGE...]")]
    pub pools: Vec<String>,
    /// Run agents only on nodes with these labels
    #[arg(long, value_name = "LABEL=VALUE[,...]")]
    pub node_selector: Option<String>,
    /// The only interface on which the pools' addresses may be bound
    #[arg(long, value_name = "NAME")]
    pub interface: Option<String>,
    /// Image of the agents
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    /// Interval of advertisements on the wire; a dead owner is noticed after three
    #[arg(long, value_name = "DURATION", value_parser = advert_interval)]
    pub advert_interval: Option<String>,
    /// Send advertisements to each node's address instead of the multicast group, for a LAN that drops multicast
    #[arg(long, num_args = 0..=1, require_equals = true, default_missing_value = "true", value_parser = switch,
          value_name = "BOOL")]
    pub unicast: Option<bool>,
}

/// How the objects are applied.
#[derive(Clone, Debug, Args)]
pub struct Rollout {
    /// Wait until the agents are ready
    #[arg(long, num_args = 0..=1, require_equals = true, default_value_t = true, default_missing_value = "true",
          value_parser = switch, action = clap::ArgAction::Set, value_name = "BOOL")]
    pub wait: bool,
    /// How long to wait
    #[arg(long, value_name = "DURATION", value_parser = duration, default_value = "5m")]
    pub timeout: Duration,
    /// Take over fields that another field manager has set
    #[arg(long)]
    pub force_conflicts: bool,
    /// Leave these checks out, by their codes
    #[arg(long, value_name = "CODE[,...]", value_delimiter = ',', value_parser = check)]
    pub skip_checks: Vec<&'static Code>,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `install`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip install --pool lab=192.168.10.240/28\n  \
    kubectl vip install --pool lab=10.0.0.10-10.0.0.20 --interface eth1 --node-selector role=edge\n  \
    kubectl vip install --unicast --advert-interval 200ms\n  \
    kubectl vip install --dry-run=client -o yaml > kubectl-vip.yaml\n\n\
    In a cluster that has it, everything that no flag names stays as it was installed: namespace, image, node selector, interval, \
    unicast and pools. What would change is shown first, and asked. --dry-run=client knows nothing of the cluster.")]
pub struct InstallArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub wanted: Wanted,
    /// Do not ask before what is there already is changed
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub rollout: Rollout,
}

/// Arguments of `diff`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip diff\n  kubectl vip diff --node-selector role=edge --unicast\n\n\
    What no flag names is as it was installed. The exit code is 0 without a difference, 1 with one, and more than 1 when \
    it cannot be told."
)]
pub struct DiffArgs {
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub wanted: Wanted,
    /// Count fields that another field manager has set as taken over
    #[arg(long)]
    pub force_conflicts: bool,
}

/// Arguments of `upgrade`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip upgrade --dry-run=server\n  kubectl vip upgrade\n  \
    kubectl vip upgrade --yes --image registry.example/vip-node:v0.2.0\n\n\
    The namespace, node selector, advertisement interval, unicast and registry of the install are kept, and pools are \
    left alone. Agents restart one node after the other, and each hands its addresses over first.")]
pub struct UpgradeArgs {
    /// Image of the agents [default: this version, from the registry of the installed one]
    #[arg(long, value_name = "REF")]
    pub image: Option<String>,
    /// Go on although the agents are newer than this plugin
    #[arg(long)]
    pub allow_downgrade: bool,
    /// Do not ask
    #[arg(short, long)]
    pub yes: bool,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub rollout: Rollout,
}

/// The commands of `import`.
#[derive(Debug, Subcommand)]
pub enum ImportCommand {
    /// Take over the addresses of kube-keepalived-vip
    #[command(visible_alias = "cm")]
    Configmap(ImportArgs),
}

/// Arguments of `import configmap`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip import configmap kube-system/vip-configmap --dry-run=server\n  \
    kubectl vip import configmap kube-system/vip-configmap\n\n\
    Stop kube-keepalived-vip before its addresses are imported: two owners of one address disturb each other. What is \
    imported already stays as it is, so the command may be repeated."
)]
pub struct ImportArgs {
    /// The ConfigMap that kube-keepalived-vip was given as --services-configmap
    #[arg(value_name = "NS/NAME")]
    pub configmap: String,
    #[command(flatten)]
    #[allow(missing_docs, reason = "documented where it is defined")]
    pub change: Change,
}

/// Arguments of `completion`.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  kubectl vip completion kubectl > ~/.local/bin/kubectl_complete-vip && chmod +x \
    ~/.local/bin/kubectl_complete-vip\n  source <(kubectl vip completion bash)\n\n\
    `kubectl` is for those who call `kubectl vip` and have kubectl's own completion: it asks the program \
    kubectl_complete-vip on the PATH, also for names in the cluster. The others complete commands and flags of \
    `kubectl-vip` called by its own name."
)]
pub struct CompletionArgs {
    /// What to complete in
    #[arg(value_enum, value_name = "SHELL")]
    pub shell: CompletionShell,
}

/// What `completion` prints.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum CompletionShell {
    /// The program that kubectl asks
    Kubectl,
    /// A script for bash
    Bash,
    /// A script for zsh
    Zsh,
    /// A script for fish
    Fish,
    /// A script for PowerShell
    Powershell,
}

/// Arguments of `version`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  kubectl vip version\n  kubectl vip version --client")]
pub struct VersionArgs {
    /// Only the version of this plugin; needs no cluster
    #[arg(long)]
    pub client: bool,
    /// Format of the output
    #[arg(short, long, value_enum, value_name = "FORMAT")]
    pub output: Option<Document>,
}

/// Reads the code of a check that an install makes.
fn check(text: &str) -> Result<&'static Code, String> {
    let code = code(text)?;
    if SKIPPABLE.contains(&code) {
        return Ok(code);
    }
    let made: Vec<&str> = SKIPPABLE.iter().map(|code| code.id).collect();
    Err(format!("no installation is refused for {code}, only for {}", made.join(", ")))
}

/// Checks an advertisement interval and keeps its text: the agents read it as it is written.
fn advert_interval(text: &str) -> Result<String, String> {
    let interval = duration(text)?;
    if !(Duration::from_millis(10)..=Duration::from_secs(40)).contains(&interval) {
        return Err("an advertisement interval is 10ms to 40s".to_owned());
    }
    if interval.subsec_micros() % 10_000 != 0 {
        return Err("an advertisement interval is a multiple of 10ms".to_owned());
    }
    Ok(format!("{}ms", interval.as_millis()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_checks_that_are_made_are_left_out() {
        assert_eq!(check("vip003").map(|code| code.id), Ok("VIP003"));
        assert_eq!(
            check("VIP301").unwrap_err(),
            "no installation is refused for VIP301, only for VIP001, VIP003, VIP004, VIP005"
        );
    }

    #[test]
    fn advertisement_intervals() {
        assert_eq!(advert_interval("1s"), Ok("1000ms".to_owned()));
        assert_eq!(advert_interval("100ms"), Ok("100ms".to_owned()));
        for bad in ["5ms", "41s", "15ms", "1h", "x"] {
            assert!(advert_interval(bad).is_err(), "{bad}");
        }
    }
}
