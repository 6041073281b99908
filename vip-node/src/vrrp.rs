//! `vip-node vrrp`: the small process that must never stop. It elects, binds and announces; it knows nothing of
//! Kubernetes, and nothing in it waits for anything but the kernel's rtnetlink.
//!
//! ```text
//!   agent --orders--> link --+                         +--> wire: advertisements, gratuitous ARP
//!   LAN --wire: packets------+--> elections (one loop) +--> address: bind, renew, release
//!   kernel --address---------+                         +--> link --reports--> agent
//! ```

mod address;
mod announce;
mod elections;
mod heard;
pub mod neighbours;
mod network;
mod wire;

use std::path::Path;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, sleep, sleep_until};
use tracing::{info, warn};

use self::elections::Elections;
use crate::args::VrrpArgs;
use crate::link::{Listener, Order, OrderReceiver, Report, ReportSender, Word};

/// A report is sent at least this often.
const HEARTBEAT: Duration = Duration::from_secs(1);

/// Runs until SIGTERM or SIGINT, and then until every address is handed over or released.
///
/// # Errors
/// When the socket or netlink cannot be opened. Everything later is reported and retried.
pub async fn run(args: VrrpArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
    let mut elections = Elections::new().await.context("cannot look at the interfaces by rtnetlink")?;
    let (publish, reports) = watch::channel(elections.report());
    let (orders, mut inbox) = mpsc::channel(4);
    listen(&args.link, orders, reports)?;
    info!(version = env!("CARGO_PKG_VERSION"), "vrrp started");

    let mut heartbeat = Instant::now();
    while !elections.is_over() {
        let order = tokio::select! {
            biased;
            () = elections.wait() => None,
            order = inbox.recv() => order,
            _ = terminate.recv() => { elections.stop().await; None }
            _ = interrupt.recv() => { elections.stop().await; None }
            () = sleep_until(heartbeat) => None,
        };
        elections.work().await;
        if let Some(Order::Elect(elect)) = order {
            elections.order(elect).await;
        }
        let report = elections.report();
        if Instant::now() >= heartbeat || *publish.borrow() != report {
            heartbeat = Instant::now() + HEARTBEAT;
            publish.send_replace(report);
        }
    }
    publish.send_replace(elections.report());
    // The last report gets its time to leave.
    sleep(Duration::from_millis(100)).await;
    info!("vrrp stopped, no address of ours is left");
    Ok(())
}

/// Listens for agents. A new one replaces the one before; without one, the last order stays in force.
fn listen(
    socket: &Path,
    orders: mpsc::Sender<Order>,
    reports: watch::Receiver<Report>,
) -> anyhow::Result<()> {
    let listener =
        Listener::bind(socket).with_context(|| format!("cannot listen at {}", socket.display()))?;
    tokio::spawn(async move {
        let mut current: Option<JoinHandle<()>> = None;
        loop {
            match listener.accept().await {
                Ok((sender, receiver)) => {
                    if let Some(before) = current.take() {
                        before.abort();
                    }
                    current = Some(tokio::spawn(converse(sender, receiver, orders.clone(), reports.clone())));
                }
                Err(error) => {
                    warn!(%error, "cannot take the agent's connection");
                    sleep(Duration::from_secs(1)).await;
                }
            }
        }
    });
    Ok(())
}

async fn converse(
    mut sender: ReportSender,
    mut receiver: OrderReceiver,
    orders: mpsc::Sender<Order>,
    mut reports: watch::Receiver<Report>,
) {
    info!("the agent is here");
    reports.mark_changed();
    loop {
        tokio::select! {
            order = receiver.recv() => match order {
                Some(order) => if orders.send(order).await.is_err() { return },
                None => break,
            },
            changed = reports.changed() => {
                let report = reports.borrow_and_update().clone();
                if sender.send(&Word::Report(Box::new(report))).await.is_err() || changed.is_err() {
                    break;
                }
            }
        }
    }
    info!("the agent is gone, its last order stays in force");
}
