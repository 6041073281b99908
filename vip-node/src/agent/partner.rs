//! The agent's side of the link to `vip-node vrrp`: reconnects, repeats the last order, hands on the last report.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tracing::{info, warn};

use crate::link::{self, Elect, Order, Report, Word};

/// Pause between attempts to connect.
const RETRY: Duration = Duration::from_millis(500);

/// The other process of this node.
pub struct Partner {
    orders: watch::Sender<Option<Elect>>,
    /// What it said last; `None` while there is no connection.
    pub reports: watch::Receiver<Option<Report>>,
}

impl Partner {
    /// Starts to connect, on a task of the current runtime that never ends.
    pub fn new(socket: &Path) -> Self {
        let (orders, inbox) = watch::channel(None);
        let (publish, reports) = watch::channel(None);
        tokio::spawn(talk(socket.to_owned(), inbox, publish));
        Self { orders, reports }
    }

    /// States the elections to take part in from now on; whether that is news.
    pub fn order(&self, order: Elect) -> bool {
        self.orders.send_if_modified(|last| {
            let news = last.as_ref() != Some(&order);
            if news {
                *last = Some(order);
            }
            news
        })
    }
}

async fn talk(
    socket: PathBuf,
    mut inbox: watch::Receiver<Option<Elect>>,
    publish: watch::Sender<Option<Report>>,
) {
    let mut said = false;
    loop {
        match link::connect(&socket).await {
            Ok((sender, receiver)) => {
                info!("connected to vrrp");
                said = false;
                converse(sender, receiver, &mut inbox, &publish).await;
                warn!("the connection to vrrp is lost");
                publish.send_replace(None);
            }
            Err(error) if !said => {
                warn!(socket = %socket.display(), %error, "cannot reach vrrp, retrying");
                said = true;
            }
            Err(_) => {}
        }
        tokio::time::sleep(RETRY).await;
    }
}

/// Until the connection ends.
async fn converse(
    mut sender: link::OrderSender,
    mut receiver: link::ReportReceiver,
    inbox: &mut watch::Receiver<Option<Elect>>,
    publish: &watch::Sender<Option<Report>>,
) {
    // The order in force is repeated to a process that may be new.
    inbox.mark_changed();
    loop {
        tokio::select! {
            report = receiver.recv() => match report {
                Some(Word::Report(report)) => { publish.send_replace(Some(*report)); }
                Some(Word::Alive) => {}
                None => return,
            },
            changed = inbox.changed() => {
                let order = inbox.borrow_and_update().clone();
                if let Some(order) = order && sender.send(&Order::Elect(order)).await.is_err() {
                    return;
                }
                if changed.is_err() {
                    return;
                }
            }
        }
    }
}
