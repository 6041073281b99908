//! What the product takes of a node: the image, and the memory of each process beside kube-proxy's.

use std::{collections::BTreeMap, fs, thread, time::Duration};

use anyhow::{Context, Result};
use lab::{Lab, image, product};

use super::{NAMESPACE, SOON};

/// After the last change.
const SETTLE: Duration = Duration::from_secs(20);

pub fn size() -> Result<()> {
    let archive = image::product_archive();
    let bytes =
        fs::metadata(&archive).with_context(|| format!("no {}: make image", archive.display()))?.len();
    println!("image of vip-node: {:.2} MB", bytes as f64 / 1e6);
    Ok(())
}

/// Resident memory of each process on each node with one virtual IP, and of kube-proxy beside them.
pub fn memory(lab: &Lab) -> Result<()> {
    let vip = product::address_of(lab, NAMESPACE, "web")?;
    let owner = product::wait_one_owner(lab, vip, SOON)?;
    thread::sleep(SETTLE);
    println!("resident memory with one virtual IP, MB:");
    print(lab, owner.number)
}

fn print(lab: &Lab, owner: u8) -> Result<()> {
    for node in lab.nodes() {
        let look = "me=$(readlink /proc/self/ns/net); for p in $(pgrep -x 'vip-node|kube-proxy'); do \
            [ \"$(readlink /proc/$p/ns/net)\" = \"$me\" ] && echo $(tr '\\0' ' ' < /proc/$p/cmdline | cut -d' ' -f1-2) $(grep VmRSS /proc/$p/status); done; true";
        let text = node.exec(look)?.ok()?.stdout;
        let mut sizes = BTreeMap::new();
        for line in text.lines() {
            let words: Vec<&str> = line.split_whitespace().collect();
            let name = ["vrrp", "agent", "kube-proxy"]
                .into_iter()
                .find(|name| words.iter().take(2).any(|word| word.ends_with(name)));
            let kilobytes = words.iter().rev().find_map(|word| word.parse::<f64>().ok());
            if let (Some(name), Some(kilobytes)) = (name, kilobytes) {
                sizes.insert(name, kilobytes / 1024.0);
            }
        }
        let size = |name: &str| {
            sizes.get(name).copied().with_context(|| format!("no {name} on {}: {text}", node.name()))
        };
        let (vrrp, agent, proxy) = (size("vrrp")?, size("agent")?, size("kube-proxy")?);
        let role = if node.number() == owner { "owner" } else { "standby" };
        println!(
            "  {} ({role:7})  vrrp {vrrp:5.1}   agent {agent:5.1}   kube-proxy {proxy:5.1}   ratio of both to kube-proxy {:.2}",
            node.name(),
            (vrrp + agent) / proxy
        );
    }
    Ok(())
}
