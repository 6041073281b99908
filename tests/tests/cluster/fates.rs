//! What an agent does to its kernel's destinations, as heard on the way: what was wanted of it, each once, and nothing else.

use std::{collections::BTreeSet, time::Duration};

use anyhow::{Result, ensure};
use jiff::{SignedDuration, Timestamp};
use lab::{
    Agent, Lab,
    ipvs_ear::{DELETE_SERVICE, Fates, SET_SERVICE, fates},
};

/// How long what is listened to may take.
const LONG: Duration = Duration::from_secs(1500);
/// Why an agent that owns an address takes a backend out of service for a while, as it says itself: on a slow machine a node
/// stands still now and then.
const SHUNNED: [&str; 2] = ["its endpoints are suspected", "the backend fails its check"];
/// Listens on a node while something is done that gives the destinations these fates; how often one was out of service meanwhile.
pub fn heard(lab: &Lab, node: u8, work: impl FnOnce() -> Result<Fates>) -> Result<usize> {
    let began = Timestamp::now();
    let (wanted, words) = lab.node(node).hear_ipvs(LONG, work)?;
    let refused = words.iter().filter(|word| word.answer.is_some_and(|errno| errno != 0)).count();
    ensure!(refused == 0, "the kernel refused {refused} times");
    let broken = words.iter().find(|word| [SET_SERVICE, DELETE_SERVICE].contains(&word.command));
    ensure!(broken.is_none(), "a service did not stay as it was: {broken:?}");
    let mut found = fates(&words);
    let messages: usize = found.values().map(Vec::len).sum();
    found.values_mut().for_each(settle);
    found.retain(|_, fate| !fate.is_empty());
    let other = wanted.keys().chain(found.keys()).filter(|one| wanted.get(one) != found.get(one));
    let other: BTreeSet<String> = other
        .map(|one| format!("{} {}: {:?}, not {:?}", one.0, one.1, found.get(one), wanted.get(one)))
        .collect();
    ensure!(other.is_empty(), "destinations were given other weights: {other:#?}");
    let shunned = (messages - found.values().map(Vec::len).sum::<usize>()) / 2;
    println!(
        "node-{node}: {messages} messages about destinations; {shunned} times one was out of service for a while"
    );
    if shunned > 0 {
        let log = Agent::on(lab, node).last_words(Timestamp::now().duration_since(began).unsigned_abs())?;
        let said = SHUNNED.iter().any(|why| log.contains(why)) || was_unready(lab, began)?;
        ensure!(said, "neither its agent nor a kubelet says why:\n{log}");
    }
    Ok(shunned)
}

/// Whether a kubelet found a pod other than the agents' not ready since then.
fn was_unready(lab: &Lab, since: Timestamp) -> Result<bool> {
    let select = "--field-selector=reason=Unhealthy,involvedObject.namespace!=kubectl-vip";
    let events =
        lab.kubectl(["get", "events", "-A", select, "-o", "jsonpath={.items[*].lastTimestamp}"])?.ok()?;
    // Their times are in whole seconds.
    let since = since - SignedDuration::from_secs(1);
    Ok(events
        .text()
        .split_whitespace()
        .filter_map(|time| time.parse::<Timestamp>().ok())
        .any(|time| time >= since))
}

/// Strikes out what was shunned and taken back: over TCP at weight 0, over UDP away.
fn settle(fate: &mut Vec<Option<u32>>) {
    let back = |pair: &[Option<u32>]| matches!(pair, [None | Some(0), Some(1)]);
    while let Some(at) = fate.windows(2).position(back) {
        fate.drain(at..at + 2);
    }
}
