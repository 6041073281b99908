//! The agent's end of the link to `vip-node vrrp`, on a thread of its own: repeats the last order, hands on the last
//! report, and is vrrp's guard. When vrrp ends or hangs, its addresses are given away at once.
//!
//! Nothing else runs on this thread: thousands of objects or a slow kernel must not look like a vrrp that hangs.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::{Instant, sleep};
use tracing::{info, warn};
use vip_core::api::VrrpState;

use super::guard;
use crate::link::{self, Elect, Order, OrderSender, Report, ReportReceiver, Word};

/// Pause between attempts to connect: as long as vrrp is gone nobody elects here.
const RETRY: Duration = Duration::from_millis(50);
/// The silence after which vrrp is taken for hung, where it is master in no election.
const IDLE: Duration = Duration::from_secs(5);
/// Silence is counted in so many naps of this process: one during which it was paused itself counts as no longer than the
/// others, for vrrp may have been paused with it.
const NAPS: u32 = 4;

/// The other process of this node.
pub struct Partner {
    orders: watch::Sender<Option<Elect>>,
    beats: watch::Sender<()>,
    /// What it said last; `None` while there is no connection, or nothing is heard on it.
    pub reports: watch::Receiver<Option<Report>>,
}

impl Partner {
    /// Starts to connect, on a thread that never ends.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(socket: &Path) -> io::Result<Self> {
        let (orders, inbox) = watch::channel(None);
        let (beats, pulse) = watch::channel(());
        let (publish, reports) = watch::channel(None);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let link = Link { socket: socket.to_owned(), inbox, pulse, publish };
        std::thread::Builder::new().name("partner".into()).spawn(move || runtime.block_on(link.run()))?;
        Ok(Self { orders, beats, reports })
    }

    /// States the elections to take part in from now on.
    pub fn order(&self, order: Elect) {
        self.orders.send_if_modified(|last| {
            let news = last.as_ref() != Some(&order);
            if news {
                *last = Some(order);
            }
            news
        });
    }

    /// Tells vrrp that the agent's loop still turns.
    pub fn beat(&self) {
        self.beats.send_replace(());
    }
}

struct Link {
    socket: PathBuf,
    inbox: watch::Receiver<Option<Elect>>,
    pulse: watch::Receiver<()>,
    publish: watch::Sender<Option<Report>>,
}

impl Link {
    async fn run(self) {
        let mut said = false;
        loop {
            match link::connect(&self.socket).await {
                Ok((sender, receiver)) => {
                    info!("connected to vrrp");
                    said = false;
                    let writing = tokio::spawn(write(sender, self.inbox.clone(), self.pulse.clone()));
                    self.listen(receiver).await;
                    writing.abort();
                    warn!("the connection to vrrp is lost");
                    self.publish.send_replace(None);
                }
                Err(error) if !said => {
                    warn!(socket = %self.socket.display(), %error, "cannot reach vrrp, retrying");
                    said = true;
                }
                Err(_) => {}
            }
            sleep(RETRY).await;
        }
    }

    /// Until the connection ends.
    async fn listen(&self, mut receiver: ReportReceiver) {
        let mut last = Report::default();
        let mut heard = Instant::now();
        let mut naps = 0;
        let mut hung = false;
        loop {
            let nap = self.patience(&last) / NAPS;
            tokio::select! {
                biased;
                word = receiver.recv() => {
                    (heard, naps) = (Instant::now(), 0);
                    match word {
                        Some(Word::Report(report)) => last = *report,
                        Some(Word::Alive) if !hung => continue,
                        Some(Word::Alive) => {}
                        None => break,
                    }
                    if hung {
                        info!("vrrp is heard again");
                    }
                    hung = false;
                    self.publish.send_replace(Some(last.clone()));
                }
                () = sleep(nap), if !hung => {
                    naps += 1;
                    if naps < NAPS {
                        continue;
                    }
                    hung = true;
                    warn!(silent = ?heard.elapsed(), "vrrp hangs");
                    self.publish.send_replace(None);
                    self.release(&last);
                }
            }
        }
        self.release(&last);
    }

    /// How long vrrp may be silent. As a master it speaks twice in each advertisement interval, by the loop that also
    /// advertises. After four intervals another node has taken over, whatever its priority: until then what the kernel holds
    /// still serves, and a vrrp that was only late loses nothing.
    fn patience(&self, last: &Report) -> Duration {
        let owns = last.routers.iter().any(|router| router.state == VrrpState::Master);
        let order = self.inbox.borrow();
        let interval = order.iter().flat_map(|order| &order.routers).map(|router| router.interval).min();
        interval.filter(|_| owns).map_or(IDLE, |interval| interval * 4)
    }

    fn release(&self, last: &Report) {
        let order = self.inbox.borrow().clone().unwrap_or_default();
        guard::release(last, &order);
    }
}

/// Writes orders and beats until the connection ends. The order in force is repeated to a process that may be new.
async fn write(
    mut sender: OrderSender,
    mut inbox: watch::Receiver<Option<Elect>>,
    mut pulse: watch::Receiver<()>,
) {
    inbox.mark_changed();
    loop {
        let order = tokio::select! {
            changed = inbox.changed() => match (changed, inbox.borrow_and_update().clone()) {
                (Err(_), _) => return,
                (Ok(()), None) => continue,
                (Ok(()), Some(order)) => Order::Elect(order),
            },
            changed = pulse.changed() => match changed {
                Err(_) => return,
                Ok(()) => Order::Alive,
            },
        };
        if sender.send(&order).await.is_err() {
            return;
        }
    }
}
