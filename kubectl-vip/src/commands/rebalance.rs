//! `rebalance`: moves virtual IPs to the nodes that would have been first to own them, had all been there from the start.
//!
//! Nodes that come back do not take what they owned before, so that nothing moves without need. A virtual IP is moved
//! by pinning it for as long as the move takes; then it stays without a pin.

use std::time::Duration;

use jiff::Timestamp;
use kube::ResourceExt;
use vip_core::api::VirtualIP;
use vip_core::vrrp::rank;

use crate::cli::{DryRun, RebalanceArgs};
use crate::cluster::Cluster;
use crate::commands::r#move::pin;
use crate::commands::version;
use crate::exit::{Failure, Result};
use crate::fitness::{Fitness, View};
use crate::output::{self, Table, say};
use crate::wait::{self, Ended};

/// Runs the command.
pub async fn run(cluster: &Cluster, args: &RebalanceArgs) -> Result<()> {
    let view = View::read(cluster).await?;
    version::refuse_skew(&view.nodes)?;
    let fitness = Fitness::new(&view, Timestamp::now());
    let routers = fitness.routers(&view.vips);
    let steps = plan(&routers, &fitness);
    let pinned: Vec<&str> =
        routers.iter().filter(|vips| is_pinned(vips)).flat_map(|v| addresses(v)).collect();
    if !pinned.is_empty() {
        say(format!("pinned, and so not moved: {}", pinned.join(", ")));
    }
    if steps.is_empty() {
        say("nothing to do: every virtual IP is where it belongs, or pinned, or without an owner");
        return Ok(());
    }
    let shows = args.change.output.is_none();
    if shows {
        output::print(&table(&steps).render(args.no_headers));
    }
    if args.change.dry_run == DryRun::Server {
        for step in &steps {
            pin::rehearse(cluster, &step.vips, Some(step.to)).await?;
        }
    }
    if args.change.dry_run != DryRun::None {
        say(format!("nothing moved{}", args.change.dry_run.suffix()));
        return match args.change.output {
            Some(format) => output::objects(&steps.iter().flat_map(Step::bare).collect::<Vec<_>>(), format),
            None => Ok(()),
        };
    }
    say(format!("Moving {} in {}", count(&steps), cluster.name()));
    let mut moved = Vec::new();
    let outcome = take_all(cluster, args, &steps, &mut moved).await;
    if let (Some(format), false) = (args.change.output, moved.is_empty()) {
        output::objects(&moved, format)?;
    }
    outcome
}

/// Moves one virtual router after the other; `moved` has what has arrived, whatever happens.
async fn take_all(
    cluster: &Cluster,
    args: &RebalanceArgs,
    steps: &[Step<'_>],
    moved: &mut Vec<VirtualIP>,
) -> Result<()> {
    let interrupt = tokio::signal::ctrl_c();
    tokio::pin!(interrupt);
    for (place, step) in steps.iter().enumerate() {
        let done = tokio::select! {
            done = step.take(cluster, args.timeout) => done,
            _ = &mut interrupt => Err(Failure::new("interrupted")),
        };
        // Whatever became of the move, the pin goes; who cannot wait for that interrupts again.
        let left = tokio::select! {
            left = step.release(cluster) => left,
            _ = tokio::signal::ctrl_c() => Err(step.still_pinned(Failure::new("interrupted"))),
        };
        match (done, left) {
            (Ok(()), Ok(())) => {
                if args.change.output.is_none() {
                    step.say_moved();
                }
                moved.extend(step.bare());
            }
            (Err(failure), Ok(())) => {
                let rest = &steps[place..];
                return Err(failure.hint(format!(
                    "no pin is left; not moved: {}; to go on: kubectl vip rebalance",
                    rest.iter().flat_map(|step| addresses(&step.vips)).collect::<Vec<_>>().join(", ")
                )));
            }
            (_, Err(failure)) => return Err(failure),
        }
    }
    Ok(())
}

/// One virtual router on its way.
struct Step<'a> {
    vips: Vec<&'a VirtualIP>,
    from: &'a str,
    to: &'a str,
}

fn plan<'a>(routers: &[Vec<&'a VirtualIP>], fitness: &'a Fitness) -> Vec<Step<'a>> {
    let step = |vips: &Vec<&'a VirtualIP>| {
        let from = vips.iter().find_map(|vip| pin::owner(vip))?;
        let first = vips.first()?;
        let to = *rank::order(fitness.fit(vips), first.spec.virtual_router).first()?;
        (!is_pinned(vips) && from != to).then(|| Step { vips: vips.clone(), from, to })
    };
    routers.iter().filter_map(step).collect()
}

fn is_pinned(vips: &[&VirtualIP]) -> bool {
    vips.iter().any(|vip| vip.spec.preferred_node.is_some())
}

fn addresses<'a>(vips: &[&'a VirtualIP]) -> Vec<&'a str> {
    vips.iter().map(|vip| vip.spec.address.as_str()).collect()
}

fn count(steps: &[Step]) -> String {
    match steps.iter().map(|step| step.vips.len()).sum() {
        1 => "1 virtual IP".to_owned(),
        many => format!("{many} virtual IPs"),
    }
}

fn table(steps: &[Step]) -> Table {
    let mut table = Table::new(&["VIP", "FROM", "TO"]);
    for step in steps {
        for address in addresses(&step.vips) {
            table.row([address.to_owned(), step.from.to_owned(), step.to.to_owned()]);
        }
    }
    table
}

impl Step<'_> {
    /// Pins the virtual IPs and waits until they have arrived.
    async fn take(&self, cluster: &Cluster, timeout: Duration) -> Result<()> {
        for vip in &self.vips {
            pin::set(cluster, vip, Some(self.to), DryRun::None).await?;
        }
        match pin::arrived(cluster, &self.vips, self.to, timeout).await? {
            Ended::Done(()) => Ok(()),
            Ended::TimedOut(reason) => {
                Err(wait::timed_out(&format!("the move to {}", self.to), timeout, &reason))
            }
        }
    }

    /// Takes the pins away again, except what somebody else has pinned elsewhere meanwhile.
    async fn release(&self, cluster: &Cluster) -> Result<()> {
        for vip in &self.vips {
            let failed = |failure: Failure| self.still_pinned(failure);
            let now = cluster.vips().get_opt(&vip.name_any()).await.map_err(|error| failed(error.into()))?;
            // One that was deleted meanwhile has no pin.
            let Some(now) = now else { continue };
            if now.spec.preferred_node.as_deref() == Some(self.to) {
                pin::set(cluster, &now, None, DryRun::None).await.map_err(failed)?;
            }
        }
        Ok(())
    }

    /// What to do about pins that may be left.
    fn still_pinned(&self, failure: Failure) -> Failure {
        let all = addresses(&self.vips);
        failure.hint(format!(
            "{} may still be pinned to {}: kubectl vip move {} --unpin",
            all.join(", "),
            self.to,
            all.first().copied().unwrap_or_default()
        ))
    }

    fn bare(&self) -> Vec<VirtualIP> {
        self.vips.iter().map(|vip| output::bare(*vip)).collect()
    }

    fn say_moved(&self) {
        for vip in &self.vips {
            output::line(format!("virtualip/{} moved from {} to {}", vip.name_any(), self.from, self.to));
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use serde_json::json;

    use super::*;

    #[test]
    fn only_what_is_elsewhere_and_not_pinned_moves() {
        let vip = |address: &str, router: u8, owner: Option<&str>, pin: Option<&str>| -> VirtualIP {
            serde_json::from_value(json!({
                "metadata": {"name": address},
                "spec": {"address": address, "virtualRouter": router, "preferredNode": pin},
                "status": {"node": owner},
            }))
            .unwrap()
        };
        let node = |name: &str, drained: bool| {
            let labels = if drained { json!({vip_core::api::DRAIN_LABEL: "true"}) } else { json!({}) };
            serde_json::from_value(json!({
                "metadata": {"name": name, "labels": labels},
                "status": {"renewTime": "2026-01-01T00:00:00Z", "dataplane": {"ready": true},
                           "interfaces": [{"name": "eth0", "mac": "m", "addresses": ["10.0.0.9/24"], "carrier": true}]},
            }))
            .unwrap()
        };
        let pool = crate::commands::pool::draft(
            "lab",
            &["10.0.0.0/24".to_owned()],
            vip_core::api::VirtualRouterRange { first: 1, count: 9 },
        );
        // Of these nodes, node-2 comes first for the virtual routers 1 and 2, and node-3 next.
        let mut view = View {
            vips: vec![
                vip("10.0.0.101", 1, Some("node-1"), None),
                vip("10.0.0.102", 1, Some("node-1"), None),
                vip("10.0.0.103", 2, Some("node-2"), None),
                vip("10.0.0.104", 3, None, None),
                vip("10.0.0.105", 4, Some("node-9"), Some("node-9")),
            ],
            nodes: vec![node("node-1", false), node("node-2", false), node("node-3", false)],
            pools: vec![pool],
            labels: Some(BTreeMap::new()),
        };
        let text = |view: &View| {
            let fitness = Fitness::new(view, "2026-01-01T00:00:01Z".parse().unwrap());
            let steps = plan(&fitness.routers(&view.vips), &fitness);
            (table(&steps).render(true), count(&steps))
        };
        assert_eq!(
            text(&view),
            (
                "10.0.0.101   node-1   node-2\n10.0.0.102   node-1   node-2\n".to_owned(),
                "2 virtual IPs".to_owned()
            )
        );
        view.nodes[1] = node("node-2", true);
        assert_eq!(
            text(&view).0,
            "10.0.0.101   node-1   node-3\n10.0.0.102   node-1   node-3\n10.0.0.103   node-2   node-3\n"
        );
    }
}
