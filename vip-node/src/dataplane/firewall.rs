//! Firewalls of the node, as far as nftables shows them. IPVS takes packets behind them: where they drop what no rule of theirs
//! accepts, and nobody wrote one for virtual IPs, clients wait in vain. What they accept is theirs to know.

use std::collections::BTreeSet;

use nix::sys::socket::SockProtocol;

use super::DataplaneError;
use super::nat::{self, codec};
use super::netlink::{Socket, Trouble};

/// The families that may filter packets of a virtual IP (`NFPROTO_*`), by the words of `nft`.
const FAMILIES: [(u8, &str); 3] = [(1, "inet"), (2, "ip"), (10, "ip6")];
/// What arrives for the node, and what passes through it (`NF_INET_LOCAL_IN`, `NF_INET_FORWARD`).
const HOOKS: [u32; 2] = [1, 2];

/// The chains of other programs that drop by default what the node receives or forwards, in the words of `nft`: `inet filter
/// input`. By their policy, or by a last rule that lets nothing pass, as firewalld has it.
///
/// # Errors
/// When nftables is not there, not permitted, or does not answer.
pub fn dropping_chains() -> Result<BTreeSet<String>, DataplaneError> {
    look().map_err(|trouble| nat::unavailable(&trouble))
}

fn look() -> Result<BTreeSet<String>, Trouble> {
    let mut socket = Socket::open(SockProtocol::NetlinkNetFilter).map_err(Trouble::Errno)?;
    let mut found = BTreeSet::new();
    for (family, name) in FAMILIES {
        let chains = socket.dump(&codec::get_chains(family), codec::base_chain)?;
        for chain in chains.into_iter().filter(|chain| HOOKS.contains(&chain.hook) && chain.is_filter) {
            let drops = chain.drops || {
                let rules = socket
                    .dump(&codec::get_rules_of(family, &chain), |rule| codec::rule_ends(rule, &chain))?;
                rules.last().copied().unwrap_or_default()
            };
            if drops {
                found.insert(format!("{name} {} {}", chain.table, chain.name));
            }
        }
    }
    Ok(found)
}
