//! The command line of `vip-node`.

use std::path::PathBuf;
use std::time::Duration;

use clap::{Parser, Subcommand};
use vip_core::vrrp::ChecksumPolicy;

/// The node's part of kubectl-vip.
#[derive(Debug, Parser)]
#[command(name = "vip-node", version)]
pub struct Args {
    /// Role of this process.
    #[command(subcommand)]
    pub role: Role,
}

/// The processes of a node, a container each.
#[derive(Debug, Subcommand)]
pub enum Role {
    /// Elect an owner for each virtual IP on the LAN, bind and announce
    Vrrp(VrrpArgs),
    /// Watch the API server, program IPVS and nftables, report
    Agent(AgentArgs),
}

/// Arguments of `vip-node vrrp`.
#[derive(Debug, clap::Args)]
pub struct VrrpArgs {
    /// Unix socket on which to listen for the agent
    #[arg(long, env = "VIP_LINK", default_value = "/run/kubectl-vip/vrrp.sock")]
    pub link: PathBuf,
    /// How long the agent may be silent before the addresses are offered to other nodes
    #[arg(long, env = "VIP_AGENT_GRACE", default_value = "30s", value_parser = grace)]
    pub agent_grace: Duration,
}

/// Arguments of `vip-node agent`.
#[derive(Debug, clap::Args)]
pub struct AgentArgs {
    /// Name of this node in the cluster
    #[arg(long, env = "NODE_NAME")]
    pub node: String,
    /// Unix socket on which vrrp listens
    #[arg(long, env = "VIP_LINK", default_value = "/run/kubectl-vip/vrrp.sock")]
    pub link: PathBuf,
    /// Kubeconfig file; without it the pod's service account is used
    #[arg(long, env = "KUBECONFIG")]
    pub kubeconfig: Option<PathBuf>,
    /// Advertisement interval, 10ms to 40s
    #[arg(long, env = "VIP_ADVERT_INTERVAL", default_value = "100ms", value_parser = interval)]
    pub advert_interval: Duration,
    /// Send advertisements to each peer by itself instead of to VRRP's multicast group
    #[arg(long, env = "VIP_UNICAST")]
    pub unicast: bool,
    /// Form of the checksum over IPv4: `either` sends keepalived's and accepts both
    #[arg(long, env = "VIP_CHECKSUM", default_value = "either", value_parser = checksum)]
    pub checksum: ChecksumPolicy,
    /// Where the node's network sysctls (/proc/sys/net) can be written
    #[arg(long, env = "VIP_SYSCTL_DIR", default_value = "/proc/sys/net")]
    pub sysctl_dir: PathBuf,
    /// Folder for the last known state of the cluster, from which an agent goes on that starts without the API server
    #[arg(long, env = "VIP_STATE_DIR", default_value = "/var/lib/kubectl-vip")]
    pub state_dir: PathBuf,
    /// Address and port of /healthz and /readyz
    #[arg(long, env = "VIP_HEALTH", default_value = "127.0.0.1:10212")]
    pub health: std::net::SocketAddr,
}

/// A form of the checksum, in the words of the help.
fn checksum(text: &str) -> Result<ChecksumPolicy, String> {
    match text {
        "either" => Ok(ChecksumPolicy::Either),
        "pseudo-header" => Ok(ChecksumPolicy::PseudoHeader),
        "plain" => Ok(ChecksumPolicy::Plain),
        _ => Err("one of either, pseudo-header, plain".to_owned()),
    }
}

/// An interval such as `100ms` or `1s`, a multiple of the protocol's centisecond.
fn interval(text: &str) -> Result<Duration, String> {
    let millis = millis(text)?;
    if !(10..=40_000).contains(&millis) {
        return Err("an advertisement interval is 10ms to 40s".to_owned());
    }
    if millis % 10 != 0 {
        return Err(
            "an advertisement interval is a multiple of 10ms (RFC 9568 counts centiseconds)".to_owned()
        );
    }
    Ok(Duration::from_millis(millis))
}

/// How long to wait for the agent: it says something each second.
fn grace(text: &str) -> Result<Duration, String> {
    match millis(text)? {
        millis @ 2000..=3_600_000 => Ok(Duration::from_millis(millis)),
        _ => Err("2s to 3600s".to_owned()),
    }
}

fn millis(text: &str) -> Result<u64, String> {
    let (number, unit) = text.split_at(text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len()));
    let number: u64 = number.parse().map_err(|_| "not a duration such as 100ms or 1s".to_owned())?;
    let millis = match unit {
        "ms" => Some(number),
        "s" => number.checked_mul(1000),
        _ => None,
    };
    millis.ok_or_else(|| "not a duration such as 100ms or 1s".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals() {
        assert_eq!(interval("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(interval("1s"), Ok(Duration::from_secs(1)));
        for bad in ["", "1", "1m", "5ms", "41s", "15ms", "-1s", "99999999999999999999s"] {
            assert!(interval(bad).is_err(), "{bad}");
        }
        assert_eq!(grace("30s"), Ok(Duration::from_secs(30)));
        for bad in ["", "1s", "3601s", "30m"] {
            assert!(grace(bad).is_err(), "{bad}");
        }
    }
}
