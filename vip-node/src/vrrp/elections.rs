//! The elections of this node: which routers run, on which interface, and what their actions do to the world.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::IpAddr;
use std::time::{Duration, Instant};

use tokio::io::unix::AsyncFd;
use tracing::{info, warn};
use vip_core::api::{Reason, VrrpState};
use vip_core::vrrp::packet::{self, Advert, Context, Refusal};
use vip_core::vrrp::router::{Action, Router};
use vip_core::vrrp::{Family, Lan, RouterConfig, RouterId};

use super::address::{Addresses, Change, RENEW};
use super::announce::Announcer;
use super::heard::Heard;
use super::network::{Network, Obstacle, Place};
use super::wire::{Packet, Wire};
use crate::link::{Elect, Interface, Report, RouterReport};

/// After a failure on an interface; twice as long after the next, up to [`RETRY_MAX`].
const RETRY: Duration = Duration::from_secs(2);
const RETRY_MAX: Duration = Duration::from_secs(32);
/// Interfaces are looked at anew at least this often, should a message of the kernel have been lost.
const LOOK: Duration = Duration::from_secs(10);
/// So many packets of one interface are read before the timers are looked at: more than a socket's queue holds.
const BATCH: usize = 1000;

struct Running {
    router: Router,
    index: u32,
    bound: BTreeSet<IpAddr>,
}

/// What failed when an election was entered or its addresses were bound.
#[derive(Default)]
struct Failure {
    /// How often in a row.
    count: u32,
    /// It was the binding: that the next attempt gets as far as the socket does not mend it.
    binding: bool,
}

/// All that `vip-node vrrp` knows.
pub struct Elections {
    epoch: Instant,
    addresses: Addresses,
    /// What the kernel told and nobody has looked into yet.
    change: Option<Change>,
    network: Network,
    wires: BTreeMap<String, AsyncFd<Wire>>,
    /// A socket's queue was not read to its end.
    backlog: bool,
    /// What the agent said of the LAN last.
    lan: Lan,
    /// What the agent ordered last.
    ordered: BTreeMap<RouterId, RouterConfig>,
    running: BTreeMap<RouterId, Running>,
    troubles: BTreeMap<RouterId, (Reason, String)>,
    failures: BTreeMap<RouterId, Failure>,
    /// Whether the kernel keeps our mark on an address: known once one was bound.
    marks: bool,
    /// Elections that are not entered before this time; then it is tried again.
    barred: BTreeMap<RouterId, Duration>,
    announcer: Announcer,
    heard: Heard,
    renew: Duration,
    look: Duration,
    stopping: bool,
}

impl Elections {
    /// Looks at the node and removes what an earlier run left behind.
    ///
    /// # Errors
    /// When the kernel does not talk to us.
    pub async fn new() -> io::Result<Self> {
        let addresses = Addresses::open()?;
        let nics = addresses.nics().await?;
        for nic in nics.values() {
            for address in &nic.ours {
                info!(%address, interface = nic.name, "removing what an earlier run left");
                if let Err(error) = addresses.release(nic.index, *address).await {
                    warn!(%address, interface = nic.name, %error, "could not be removed");
                }
            }
        }
        Ok(Self {
            epoch: Instant::now(),
            addresses,
            change: None,
            network: Network::new(nics),
            wires: BTreeMap::new(),
            backlog: false,
            lan: Lan::default(),
            ordered: BTreeMap::new(),
            running: BTreeMap::new(),
            troubles: BTreeMap::new(),
            failures: BTreeMap::new(),
            marks: false,
            barred: BTreeMap::new(),
            announcer: Announcer::default(),
            heard: Heard::default(),
            renew: Duration::ZERO,
            look: LOOK,
            stopping: false,
        })
    }

    /// The elections to take part in from now on.
    pub async fn order(&mut self, order: Elect) {
        if !self.stopping {
            self.lan = order.lan;
            let ordered = order.routers.into_iter().map(|config| (config.id.clone(), config)).collect();
            let before = std::mem::replace(&mut self.ordered, ordered);
            // Other settings deserve another attempt at once.
            let same = |id: &RouterId| self.ordered.get(id) == before.get(id);
            self.failures.retain(|id, _| same(id));
            self.barred.retain(|id, _| same(id));
            self.settle().await;
        }
    }

    /// Leaves every election by plan; nothing is entered any more.
    pub async fn stop(&mut self) {
        self.stopping = true;
        self.ordered.clear();
        self.settle().await;
    }

    /// Whether all was left after [`Elections::stop`].
    pub fn is_over(&self) -> bool {
        self.stopping && self.running.is_empty()
    }

    /// Waits until something is to be done: a packet, a change of an interface, a timer. Dropping it loses nothing.
    pub async fn wait(&mut self) {
        let deadline = self.epoch + self.next_deadline();
        tokio::select! {
            biased;
            () = readable(&self.wires) => {}
            change = self.addresses.changed() => self.change = Some(change),
            () = tokio::time::sleep_until(deadline.into()) => {}
        }
    }

    /// Does what is due. Everything that was received is read before any timer is looked at: a process that was paused
    /// learns first what happened meanwhile.
    pub async fn work(&mut self) {
        self.receive().await;
        self.follow_changes().await;
        let now = self.now();
        let due: Vec<RouterId> = self
            .running
            .iter()
            .filter(|(_, running)| running.router.next_deadline().is_some_and(|at| at <= now))
            .map(|(id, _)| id.clone())
            .collect();
        for id in due {
            let actions = self.running.get_mut(&id).map(|running| running.router.timeout(now));
            self.act(&id, actions.unwrap_or_default()).await;
        }
        if now >= self.look {
            self.look().await;
        }
        if now >= self.renew {
            self.renew_all().await;
        }
        if self.barred.values().any(|at| *at <= now) {
            self.settle().await;
        }
        for (id, address) in self.announcer.due(now) {
            if let (Some(wire), IpAddr::V4(address)) = (self.wires.get(&id.interface), address)
                && let Some(running) = self.running.get(&id)
                && let Err(error) = wire.get_ref().announce(self.network.mac(running.index), address)
            {
                warn!(%address, interface = id.interface, %error, "could not be announced");
            }
        }
    }

    /// What the agent is told.
    pub fn report(&self) -> Report {
        let now = self.now();
        let bound: BTreeSet<IpAddr> =
            self.running.values().flat_map(|running| &running.bound).copied().collect();
        let interfaces = self.network.nics().map(|nic| Interface {
            name: nic.name.clone(),
            mac: nic.mac,
            addresses: nic.addresses.iter().filter(|net| !bound.contains(&net.addr())).copied().collect(),
            carrier: nic.carrier,
        });
        let ids: BTreeSet<&RouterId> = self.ordered.keys().chain(self.running.keys()).collect();
        let routers = ids.into_iter().map(|id| {
            let running = self.running.get(id);
            RouterReport {
                id: id.clone(),
                state: running.map_or(VrrpState::Init, |r| r.router.state()),
                priority: running
                    .map(|r| r.router.config())
                    .or(self.ordered.get(id))
                    .map_or(0, |config| config.priority),
                master: running.and_then(|r| r.router.master()),
                bound: running.map(|r| r.bound.iter().copied().collect()).unwrap_or_default(),
                trouble: self.troubles.get(id).cloned(),
            }
        });
        Report {
            interfaces: interfaces.collect(),
            routers: routers.collect(),
            peers: self.heard.peers(now),
            foreign: Vec::new(),
            claims: Vec::new(),
            refused: self.heard.refused(),
            stopping: self.stopping,
        }
    }

    fn now(&self) -> Duration {
        self.epoch.elapsed()
    }

    fn next_deadline(&self) -> Duration {
        let now = self.now();
        if self.backlog || self.change.is_some() {
            return now;
        }
        let routers = self.running.values().filter_map(|running| running.router.next_deadline());
        let barred = self.barred.values().copied();
        routers
            .chain(self.announcer.next_deadline())
            .chain(barred)
            .chain([self.renew, self.look])
            .min()
            .unwrap_or(now)
    }

    /// Brings what runs in line with what was ordered and with what the interfaces allow.
    async fn settle(&mut self) {
        let now = self.now();
        self.barred.retain(|id, at| *at > now && self.ordered.contains_key(id));
        self.troubles.retain(|id, _| self.ordered.contains_key(id));
        self.failures.retain(|id, _| self.ordered.contains_key(id));
        for id in
            self.running.keys().filter(|id| !self.ordered.contains_key(*id)).cloned().collect::<Vec<_>>()
        {
            let actions = self.running.get_mut(&id).map(|running| running.router.leave(now));
            self.act(&id, actions.unwrap_or_default()).await;
        }
        for config in self.ordered.values().cloned().collect::<Vec<_>>() {
            if self.barred.contains_key(&config.id) {
                continue;
            }
            match self.network.place(now, &config) {
                Ok(place) => self.enter(config, place).await,
                Err(obstacle) => self.bar(&config.id, obstacle).await,
            }
        }
        let used: BTreeSet<String> = self.running.keys().map(|id| id.interface.clone()).collect();
        self.wires.retain(|name, _| used.contains(name));
    }

    async fn enter(&mut self, config: RouterConfig, place: Place) {
        let id = config.id.clone();
        let now = self.now();
        if let Some(running) = self.running.get_mut(&id) {
            if running.index == place.index && running.router.source() == IpAddr::V4(place.source) {
                let actions = running.router.configure(now, config);
                return self.act(&id, actions).await;
            }
            // Another card or another address of ours: a new router.
            let actions = running.router.stop();
            self.act(&id, actions).await;
            self.wires.remove(&id.interface);
        }
        if !self.wires.contains_key(&id.interface) {
            // SAFETY: the wire owns its socket and gives the same descriptor for as long as it lives.
            match Wire::open(place.index).and_then(|wire| Ok(unsafe { AsyncFd::register(wire) }?)) {
                Ok(wire) => {
                    self.wires.insert(id.interface.clone(), wire);
                }
                Err(error) => {
                    let (reason, hint) = permission(&error, "NET_RAW");
                    let message = format!("cannot open a packet socket on {}: {error}{hint}", id.interface);
                    return self.fail(&id, reason, message, false).await;
                }
            }
        }
        if !self.failures.get(&id).is_some_and(|failure| failure.binding) {
            self.recover(&id);
        }
        let mut router = Router::new(config, place.source.into());
        let actions = router.start(now);
        self.running.insert(id.clone(), Running { router, index: place.index, bound: BTreeSet::new() });
        self.act(&id, actions).await;
    }

    /// Nothing is in the way any more.
    fn recover(&mut self, id: &RouterId) {
        self.failures.remove(id);
        if self.troubles.remove(id).is_some() {
            info!(vrid = id.vrid, interface = id.interface, "can take part again");
        }
    }

    /// Takes no part in an election for a while, longer from time to time.
    async fn fail(&mut self, id: &RouterId, reason: Reason, message: String, binding: bool) {
        let failure = self.failures.entry(id.clone()).or_default();
        let wait = RETRY_MAX.min(RETRY * 2_u32.saturating_pow(failure.count));
        *failure = Failure { count: failure.count + 1, binding };
        let until = Some(self.now() + wait);
        self.bar(id, Obstacle { reason, message, until }).await;
    }

    /// Takes no part in an election and says why, once.
    async fn bar(&mut self, id: &RouterId, obstacle: Obstacle) {
        if let Some(running) = self.running.get_mut(id) {
            let actions = running.router.stop();
            Box::pin(self.act(id, actions)).await;
        }
        if let Some(until) = obstacle.until {
            self.barred.insert(id.clone(), until);
        }
        let trouble = (obstacle.reason, obstacle.message);
        if self.troubles.get(id) != Some(&trouble) {
            warn!(vrid = id.vrid, interface = id.interface, "takes no part: {}", trouble.1);
            self.troubles.insert(id.clone(), trouble);
        }
    }

    async fn act(&mut self, id: &RouterId, actions: Vec<Action>) {
        for action in actions {
            match action {
                Action::Enter(state) => info!(vrid = id.vrid, interface = id.interface, "{state:?}"),
                Action::Send(advert) => self.send(id, &advert),
                Action::Bind(addresses) => {
                    if let Err((reason, message)) = self.bind(id, &addresses).await {
                        return self.fail(id, reason, message, true).await;
                    }
                    self.recover(id);
                }
                Action::Announce(addresses) => {
                    let now = self.now();
                    self.announcer.announce(now, id, &addresses);
                }
                Action::Release(addresses) => self.release(id, &addresses).await,
                Action::Left => self.forget(id).await,
            }
        }
    }

    /// An election was left. If it was ordered again meanwhile, it is entered anew.
    async fn forget(&mut self, id: &RouterId) {
        let rest: Vec<IpAddr> =
            self.running.get(id).map(|running| running.bound.iter().copied().collect()).unwrap_or_default();
        self.release(id, &rest).await;
        self.running.remove(id);
        if self.ordered.contains_key(id) {
            self.barred.insert(id.clone(), self.now());
        }
    }

    fn send(&self, id: &RouterId, advert: &Advert) {
        let (Some(running), Some(wire)) = (self.running.get(id), self.wires.get(&id.interface)) else {
            return;
        };
        let (source, group) = (running.router.source(), packet::group(id.family));
        let bytes = advert.encode(source, group, self.lan.checksum.sent());
        if let (IpAddr::V4(source), IpAddr::V4(group)) = (source, group)
            && let Err(error) = wire.get_ref().advertise(source, group, &bytes)
        {
            // A link that just went down says so by the kernel's own message.
            tracing::debug!(vrid = id.vrid, interface = id.interface, %error, "an advertisement was not sent");
        }
    }

    async fn bind(&mut self, id: &RouterId, addresses: &[IpAddr]) -> Result<(), (Reason, String)> {
        let Some(running) = self.running.get_mut(id) else { return Ok(()) };
        for address in addresses {
            match self.addresses.bind(running.index, *address, false).await {
                Ok(()) => {
                    running.bound.insert(*address);
                }
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                    let message =
                        format!("{address} is on {} already, put there by another program", id.interface);
                    return Err((Reason::Rejected, message));
                }
                Err(error) => {
                    let (reason, hint) = permission(&error, "NET_ADMIN");
                    return Err((
                        reason,
                        format!("cannot bind {address} to {}: {error}{hint}", id.interface),
                    ));
                }
            }
            if !self.marks {
                self.marks =
                    self.addresses.ours().await.is_ok_and(|ours| ours.contains(&(running.index, *address)));
                if !self.marks {
                    let message = "the kernel keeps no mark on an address (IFA_PROTO, since Linux 5.18): virtual IPs                                    could not be told from the addresses of others";
                    return Err((Reason::KernelRefused, message.to_owned()));
                }
            }
        }
        Ok(())
    }

    async fn release(&mut self, id: &RouterId, addresses: &[IpAddr]) {
        let Some(running) = self.running.get_mut(id) else { return };
        for address in addresses {
            self.announcer.forget(*address);
            if running.bound.remove(address)
                && let Err(error) = self.addresses.release(running.index, *address).await
            {
                warn!(%address, interface = id.interface, %error, "could not be released, its lifetime will end");
            }
        }
    }

    /// Somebody took an address of ours off: it is put back at once, unless it was us.
    async fn put_back(&mut self, index: u32, address: IpAddr) {
        let owner = self
            .running
            .iter()
            .find(|(_, running)| running.index == index && running.bound.contains(&address));
        let Some((id, _)) = owner else { return };
        let id = id.clone();
        info!(%address, interface = id.interface, "was taken off by another program, putting it back");
        match self.addresses.bind(index, address, false).await {
            // It is there already: renewed by us meanwhile, or put there by the other program for itself.
            Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {
                if self.addresses.ours().await.is_ok_and(|ours| ours.contains(&(index, address))) {
                    return;
                }
                if let Some(running) = self.running.get_mut(&id) {
                    running.bound.remove(&address);
                }
                let message =
                    format!("{address} is on {} already, put there by another program", id.interface);
                return self.fail(&id, Reason::Rejected, message, true).await;
            }
            Err(error) => {
                warn!(%address, interface = id.interface, %error, "could not be put back, retrying");
            }
            Ok(()) => {}
        }
        let now = self.now();
        self.announcer.announce(now, &id, &[address]);
    }

    /// Renews what is still ours: renewing an address that another program has put in its place would take it over.
    async fn renew_all(&mut self) {
        let ours = self.addresses.ours().await;
        let mut lost = Vec::new();
        for (id, running) in &self.running {
            for address in &running.bound {
                if ours.as_ref().is_ok_and(|ours| !ours.contains(&(running.index, *address))) {
                    lost.push((running.index, *address));
                } else if let Err(error) = self.addresses.bind(running.index, *address, true).await {
                    warn!(%address, interface = id.interface, %error, "could not be renewed");
                }
            }
        }
        for (index, address) in lost {
            self.put_back(index, address).await;
        }
        self.renew = self.now() + RENEW;
    }

    /// Follows all changes that are known: many at once need one look.
    async fn follow_changes(&mut self) {
        let mut other = false;
        while let Some(change) = self.change.take().or_else(|| self.addresses.queued()) {
            match change {
                Change::Lost(index, address) => self.put_back(index, address).await,
                Change::Other => other = true,
            }
        }
        if other {
            self.look().await;
        }
    }

    async fn look(&mut self) {
        let now = self.now();
        self.look = now + LOOK;
        let nics = match self.addresses.nics().await {
            Ok(nics) => nics,
            Err(error) => return warn!(%error, "cannot look at the interfaces"),
        };
        let news = self.network.update(now, nics);
        for (id, running) in &mut self.running {
            // What another program has made its own (`ip address replace`) is not for us to remove.
            running.bound.retain(|address| !self.network.is_foreign(running.index, *address));
            if news.hardware.contains(&running.index) {
                let bound: Vec<IpAddr> = running.bound.iter().copied().collect();
                self.announcer.announce(now, id, &bound);
            }
        }
        if news.any {
            self.settle().await;
        }
    }

    async fn receive(&mut self) {
        let names: Vec<String> = self.wires.keys().cloned().collect();
        self.backlog = false;
        for name in names {
            let mut read = 0;
            while let Some(wire) = self.wires.get(&name) {
                if read == BATCH {
                    self.backlog = true;
                    break;
                }
                read += 1;
                match wire.get_ref().receive() {
                    Ok(Some(packet)) => {
                        if let Err(refusal) = self.accept(&name, packet).await {
                            self.heard.refuse(refusal);
                        }
                    }
                    Ok(None) => break,
                    // The socket reports once that its interface went down; the kernel's message tells the rest.
                    Err(error) => {
                        tracing::debug!(interface = name, %error, "cannot receive");
                        break;
                    }
                }
            }
        }
    }

    async fn accept(&mut self, interface: &str, packet: Packet) -> Result<(), Refusal> {
        let source = IpAddr::V4(packet.source);
        let context = Context {
            source,
            destination: packet.destination.into(),
            hop_limit: packet.hop_limit,
            checksum: self.lan.checksum.accepted(),
        };
        let advert = packet::decode(&packet.payload, &context)?;
        let id = RouterId { interface: interface.to_owned(), family: Family::V4, vrid: advert.vrid };
        let now = self.now();
        let running = self.running.get_mut(&id).ok_or(Refusal::Vrid(advert.vrid))?;
        if source == running.router.source() {
            return Err(Refusal::Own);
        }
        if self.lan.peer(source).is_none() && !running.router.config().is_claimed_by(&advert) {
            return Err(Refusal::Foreign);
        }
        let actions = running.router.receive(now, source, &advert);
        self.heard.accept(now, &id, source, advert.priority);
        self.act(&id, actions).await;
        Ok(())
    }
}

/// Waits until a packet is queued on any interface.
async fn readable(wires: &BTreeMap<String, AsyncFd<Wire>>) {
    std::future::poll_fn(|context| {
        let mut ready = std::task::Poll::Pending;
        for wire in wires.values() {
            if let std::task::Poll::Ready(guard) = wire.poll_read_ready(context) {
                // What is queued is read to its end before the next wait.
                if let Ok(mut guard) = guard {
                    guard.clear_ready();
                }
                ready = std::task::Poll::Ready(());
            }
        }
        ready
    })
    .await;
}

/// The word for an error, and what to do about it.
fn permission(error: &io::Error, capability: &str) -> (Reason, String) {
    match error.kind() {
        io::ErrorKind::PermissionDenied => {
            (Reason::NotPermitted, format!("; the container needs the capability {capability}"))
        }
        _ => (Reason::NoInterface, String::new()),
    }
}
