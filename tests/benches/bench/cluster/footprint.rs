//! What the product takes of a node: the image, and the memory of each process beside kube-proxy's.

use std::fs;

use anyhow::{Context, Result};
use lab::{Node, image};

pub fn size() -> Result<()> {
    let archive = image::product_archive();
    let bytes =
        fs::metadata(&archive).with_context(|| format!("no {}: make image", archive.display()))?.len();
    println!("image of vip-node: {:.2} MB", bytes as f64 / 1e6);
    Ok(())
}

/// Resident memory of each process on a node, and of kube-proxy beside them.
pub fn memory(node: &Node<'_>, role: &str) -> Result<()> {
    let (vrrp, agent, proxy) =
        (resident(node, "vrrp")?, resident(node, "agent")?, resident(node, "kube-proxy")?);
    println!(
        "  {} ({role:7})  vrrp {vrrp:5.1}   agent {agent:5.1}   kube-proxy {proxy:5.1}   ratio of both to kube-proxy {:.2}",
        node.name(),
        (vrrp + agent) / proxy
    );
    Ok(())
}

/// The resident memory of one of our processes or of kube-proxy, MiB.
fn resident(node: &Node<'_>, name: &str) -> Result<f64> {
    let status = node.exec(&format!("cat /proc/{}/status", node.process(name)?))?.ok()?.stdout;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).context("no VmRSS")?;
    let kilobytes: f64 = line.split_whitespace().next().context("no number")?.parse()?;
    Ok(kilobytes / 1024.0)
}
