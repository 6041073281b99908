//! `vip-node vrrp`: the small process that must never stop. It elects, binds and announces; it knows nothing of
//! Kubernetes, and nothing in it waits for anything but the kernel's rtnetlink.
//!
//! ```text
//!   agent --orders--> link --+                         +--> wire: advertisements
//!   LAN --wire: packets------+                         +--> neighbours: announcements, probes
//!   LAN --neighbours: claims-+--> elections (one loop) +--> address: bind, renew, release
//!   kernel --address---------+                         +--> link --reports, signs of life--> agent
//! ```

pub(crate) mod address;
mod announce;
mod bindings;
mod elections;
mod heard;
pub mod neighbours;
mod network;
mod socket;
mod sockets;
mod timer;
pub(crate) mod wire;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use tokio::time::sleep;
use tracing::{info, warn};

use self::elections::Elections;
use crate::args::VrrpArgs;
use crate::link::{Listener, Order, OrderReceiver, Report, ReportSender, Word};

/// What came from the agent: an order, or why it cannot be taken.
type Said = Result<Order, String>;

/// What the agent is to hear: the last state, and how often the loop has turned. What it has not read meanwhile is
/// left out.
#[derive(Clone, Default)]
struct Saying {
    report: Arc<Report>,
    beats: u64,
}

/// Runs until SIGTERM or SIGINT, and then until every address is handed over or released.
///
/// # Errors
/// When the socket or netlink cannot be opened. Everything later is reported and retried.
pub async fn run(args: VrrpArgs) -> anyhow::Result<()> {
    let mut terminate = signal(SignalKind::terminate()).context("signals")?;
    let mut interrupt = signal(SignalKind::interrupt()).context("signals")?;
    let mut elections =
        Elections::new(args.agent_grace).context("cannot look at the interfaces by rtnetlink")?;
    let (publish, sayings) = watch::channel(Saying::default());
    let (orders, mut inbox) = mpsc::channel(4);
    listen(&args.link, orders, sayings)?;
    info!(version = env!("CARGO_PKG_VERSION"), "vrrp started");

    let mut beat = Duration::ZERO;
    while !elections.is_over() {
        let (mut queued, mut stop) = (Vec::new(), false);
        tokio::select! {
            biased;
            _ = terminate.recv() => stop = true,
            _ = interrupt.recv() => stop = true,
            order = inbox.recv() => queued.extend(order),
            () = elections.wait(beat.min(elections.report_due())) => {}
        }
        while let Ok(order) = inbox.try_recv() {
            queued.push(order);
        }
        elections.work(queued, stop);
        let now = elections.now();
        if now >= elections.report_due() {
            let report = Arc::new(elections.report());
            publish.send_modify(|saying| saying.report = report);
        }
        // An election that was just entered may want more of them.
        beat = beat.min(now + elections.beat());
        if now >= beat {
            beat = now + elections.beat();
            publish.send_modify(|saying| saying.beats += 1);
        }
    }
    let report = Arc::new(elections.report());
    publish.send_modify(|saying| saying.report = report);
    // The last report gets its time to leave.
    sleep(Duration::from_millis(100)).await;
    info!("vrrp stopped, no address of ours is left");
    Ok(())
}

/// Listens for agents, on a thread of its own: an order with thousands of addresses takes longer to read than an
/// advertisement may be late.
fn listen(socket: &Path, orders: mpsc::Sender<Said>, sayings: watch::Receiver<Saying>) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let listener = {
        let _entered = runtime.enter();
        Listener::bind(socket).with_context(|| format!("cannot listen at {}", socket.display()))?
    };
    std::thread::Builder::new()
        .name("link".into())
        .spawn(move || runtime.block_on(receive(&listener, &orders, &sayings)))?;
    Ok(())
}

/// A new agent replaces the one before; without one, the last order stays in force for a while.
async fn receive(listener: &Listener, orders: &mpsc::Sender<Said>, sayings: &watch::Receiver<Saying>) {
    let mut current: Option<JoinHandle<()>> = None;
    loop {
        match listener.accept().await {
            Ok((sender, receiver)) => {
                if let Some(before) = current.take() {
                    before.abort();
                }
                current = Some(tokio::spawn(converse(sender, receiver, orders.clone(), sayings.clone())));
            }
            Err(error) => {
                warn!(%error, "cannot take the agent's connection");
                sleep(Duration::from_secs(1)).await;
            }
        }
    }
}

async fn converse(
    sender: ReportSender,
    mut receiver: OrderReceiver,
    orders: mpsc::Sender<Said>,
    sayings: watch::Receiver<Saying>,
) {
    info!("the agent is here");
    let obey = async {
        while let Some(order) = receiver.recv().await {
            if orders.send(order).await.is_err() {
                return;
            }
        }
    };
    tokio::select! {
        () = obey => {}
        () = say(sender, sayings) => {}
    }
    info!("the agent is gone, its last order stays in force");
}

/// Says what is new, beginning with how things stand. An agent that does not read is waited for: it would take the end of
/// the conversation for ours.
async fn say(mut sender: ReportSender, mut sayings: watch::Receiver<Saying>) {
    let mut said: Option<Arc<Report>> = None;
    loop {
        let Saying { report, .. } = sayings.borrow_and_update().clone();
        let news = said.as_ref().is_none_or(|said| !Arc::ptr_eq(said, &report));
        let word = if news { Word::Report(Box::new(Report::clone(&report))) } else { Word::Alive };
        if sender.send(&word).await.is_err() {
            return;
        }
        said = Some(report);
        if sayings.changed().await.is_err() {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::{BufRead, BufReader, Write};
    use std::os::unix::net::UnixStream;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::time::Instant;

    use vip_core::vrrp::{Lan, Peer};

    use super::*;
    use crate::link::Elect;

    #[test]
    fn signs_of_life_pass_while_a_large_order_is_taken_apart() {
        let folder = std::env::temp_dir().join(format!("vip-beats-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let (orders, mut inbox) = mpsc::channel(4);
        let (publish, sayings) = watch::channel(Saying::default());
        listen(&folder.join("vrrp.sock"), orders, sayings).unwrap();
        let addresses = vec![[10, 87, 0, 11].into(); 4];
        let peer =
            |number| Peer { node: format!("node-{number}"), addresses: addresses.clone(), macs: Vec::new() };
        let lan = Lan { peers: (0..30_000).map(peer).collect(), ..Lan::default() };
        let mut order = serde_json::to_vec(&Order::Elect(Elect { lan, routers: Vec::new() })).unwrap();
        let begun = Instant::now();
        serde_json::from_slice::<Order>(&order).unwrap();
        let work = begun.elapsed();
        order.push(b'\n');

        let talk = UnixStream::connect(folder.join("vrrp.sock")).unwrap();
        let over = AtomicBool::new(false);
        let longest = std::thread::scope(|scope| {
            scope.spawn(|| {
                while !over.load(Ordering::Relaxed) {
                    publish.send_modify(|saying| saying.beats += 1);
                    std::thread::sleep(Duration::from_millis(2));
                }
            });
            scope.spawn(|| (&talk).write_all(&order).unwrap());
            let (mut longest, mut last) = (Duration::ZERO, Instant::now());
            for word in BufReader::new(&talk).lines() {
                word.unwrap();
                longest = longest.max(last.elapsed());
                last = Instant::now();
                if inbox.try_recv().is_ok() {
                    break;
                }
            }
            over.store(true, Ordering::Relaxed);
            longest
        });
        assert!(longest < work / 2, "{longest:?} of silence, and the order takes {work:?}");
        std::fs::remove_dir_all(&folder).unwrap();
    }
}
