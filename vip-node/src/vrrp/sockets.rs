//! The sockets on the node's interfaces: advertisements are heard wherever others may speak, neighbours only where an
//! election runs.

use std::collections::BTreeSet;
use std::collections::btree_map::{BTreeMap, Entry};
use std::io;
use std::os::fd::{AsFd, AsRawFd};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::io::unix::AsyncFd;
use tracing::debug;
use vip_core::vrrp::{Family, RouterId};

use super::neighbours::NeighbourSocket;
use super::network::Network;
use super::wire::{Packet, Wire};

/// At most so many sockets for interfaces on which no election runs.
const LIMIT: usize = 32;

/// An interface's name and a family.
pub type Place = (String, Family);

/// All sockets.
#[derive(Default)]
pub struct Sockets {
    wires: BTreeMap<Place, AsyncFd<Wire>>,
    neighbours: BTreeMap<Place, (u32, AsyncFd<NeighbourSocket>)>,
}

impl Sockets {
    /// Opens what an election needs on the interface with an index.
    ///
    /// # Errors
    /// `PermissionDenied` without NET_RAW; else what the kernel says.
    pub fn open(&mut self, id: &RouterId, index: u32) -> io::Result<()> {
        let place = (id.interface.clone(), id.family);
        if self.wires.get(&place).is_none_or(|wire| wire.get_ref().index() != index) {
            self.wires.insert(place.clone(), register(Wire::open(index, id.family)?)?);
        }
        if self.neighbours.get(&place).is_none_or(|(of, _)| *of != index) {
            self.neighbours.insert(place, (index, register(NeighbourSocket::open(index, id.family)?)?));
        }
        Ok(())
    }

    /// Listens on all interfaces that can be heard on, and closes what is of no use any more.
    pub fn listen(&mut self, network: &Network, used: &BTreeSet<Place>) {
        let all = [Family::V4, Family::V6].into_iter();
        let audible: BTreeMap<Place, u32> = all
            .flat_map(|family| {
                network.audible(family).map(move |(name, index)| ((name.to_owned(), family), index))
            })
            .take(LIMIT)
            .collect();
        self.neighbours.retain(|place, _| used.contains(place));
        self.wires.retain(|place, wire| {
            used.contains(place) || audible.get(place) == Some(&wire.get_ref().index())
        });
        for (place, index) in audible {
            if let Entry::Vacant(free) = self.wires.entry(place) {
                match Wire::open(index, free.key().1).and_then(register) {
                    Ok(wire) => drop(free.insert(wire)),
                    // An election on it says so aloud.
                    Err(error) => debug!(interface = free.key().0, %error, "cannot listen for other routers"),
                }
            }
        }
    }

    /// Waits until something is queued anywhere.
    pub async fn readable(&self) {
        std::future::poll_fn(|context| {
            // All are asked, so that each of them wakes us.
            let mut ready = false;
            for wire in self.wires.values() {
                ready |= is_ready(wire, context);
            }
            for (_, socket) in self.neighbours.values() {
                ready |= is_ready(socket, context);
            }
            if ready { Poll::Ready(()) } else { Poll::Pending }
        })
        .await;
    }

    /// Where advertisements are heard.
    pub fn keys(&self) -> Vec<Place> {
        self.wires.keys().cloned().collect()
    }

    /// Where neighbours are heard.
    pub fn neighbour_keys(&self) -> Vec<Place> {
        self.neighbours.keys().cloned().collect()
    }

    /// The next packet of VRRP's protocol that is queued, if it is a whole one, and how long ago it arrived.
    ///
    /// # Errors
    /// `NetworkDown` and the like when the interface is going away.
    pub fn receive(&self, place: &Place) -> io::Result<Option<(Option<Packet>, Duration)>> {
        self.wires.get(place).map_or(Ok(None), |wire| wire.get_ref().receive())
    }

    /// Where an election sends its advertisements.
    pub fn wire(&mut self, id: &RouterId) -> Option<&mut Wire> {
        self.wires.get_mut(&(id.interface.clone(), id.family)).map(AsyncFd::get_mut)
    }

    /// The neighbours on an interface, and its index.
    pub fn neighbours(&self, interface: &str, family: Family) -> Option<(u32, &NeighbourSocket)> {
        self.neighbours.get(&(interface.to_owned(), family)).map(|(index, socket)| (*index, socket.get_ref()))
    }
}

/// Whether something is queued. What is queued is read to its end before the next wait.
fn is_ready<T: AsRawFd>(socket: &AsyncFd<T>, context: &mut Context<'_>) -> bool {
    match socket.poll_read_ready(context) {
        Poll::Ready(Ok(mut guard)) => {
            guard.clear_ready();
            true
        }
        Poll::Ready(Err(_)) => true,
        Poll::Pending => false,
    }
}

/// Hands a socket to the runtime.
fn register<T: AsRawFd + AsFd>(socket: T) -> io::Result<AsyncFd<T>> {
    // SAFETY: the sockets of this module own their descriptor and give the same one for as long as they live.
    Ok(unsafe { AsyncFd::register(socket) }?)
}
