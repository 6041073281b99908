//! The IPVS table of this network namespace, over generic netlink.
//!
//! Each step is one message, acknowledged by itself. The table is everybody's: it is never flushed, and what is not in
//! our ledger is only ever read.

mod codec;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use nix::errno::Errno;
use nix::sys::socket::SockProtocol;
use vip_core::plan::{Change, ServiceKey, Settings, VirtualService};

use self::codec::Command;
use super::netlink::{Attributes, Request, Socket, Trouble, array, attribute};
use super::{DataplaneError, Destinations};

/// The controller of generic netlink (`linux/genetlink.h`): its message type, its command for looking up a family, the
/// attributes for a family's number and name.
const CONTROLLER: u16 = 0x10;
const GET_FAMILY: u8 = 3;
const FAMILY_ID: u16 = 1;
const FAMILY_NAME: u16 = 2;

/// Steps between two looks at which services could be made: 64 take some 2 ms.
const AT_ONCE: usize = 64;

/// Schedulers whose modules must be there before they are asked for. The kernel loads a scheduler on use while it holds the
/// lock of IPVS; these two then wait for the lock of all network namespaces, whose holder, where a namespace is just being
/// removed (any pod's end), waits for that of IPVS. All networking of the node hangs until it is reset (seen on 6.1).
const LOCKING: [&str; 2] = ["lblc", "lblcr"];

/// Whether one of [`LOCKING`] is in the kernel: each has a sysctl of its own.
fn is_loaded(scheduler: &str, sysctls: &Path) -> bool {
    sysctls.join(format!("ipv4/vs/{scheduler}_expiration")).exists()
}

/// The table.
#[derive(Debug)]
pub struct Ipvs {
    sysctls: PathBuf,
    /// Given up when something went wrong: an answer may still be on its way.
    link: Option<Link>,
}

/// A socket, and the number under which IPVS listens.
#[derive(Debug)]
struct Link {
    socket: Socket,
    family: u16,
}

impl Ipvs {
    /// Does nothing yet. The table is that of the network namespace of the thread that makes the first call.
    /// `sysctls`: where `/proc/sys/net` can be seen.
    pub fn new(sysctls: impl Into<PathBuf>) -> Self {
        Self { sysctls: sysctls.into(), link: None }
    }

    /// Finds IPVS. Asking for its name loads the module where loading is allowed: it carries the name as an alias.
    ///
    /// # Errors
    /// When the kernel has no IPVS.
    pub fn find(&mut self) -> Result<(), DataplaneError> {
        self.link().map(drop)
    }

    /// All services of address and port over TCP, UDP or SCTP, without their destinations.
    ///
    /// # Errors
    /// When IPVS is not there, not permitted, or does not answer.
    pub fn services(&mut self) -> Result<BTreeMap<ServiceKey, VirtualService>, DataplaneError> {
        let result = self.link().and_then(Link::services);
        self.checked(result)
    }

    /// The destinations of these services, each with its weight.
    ///
    /// # Errors
    /// When IPVS is not there, not permitted, or does not answer.
    pub fn destinations(
        &mut self,
        keys: &[ServiceKey],
    ) -> Result<Vec<(ServiceKey, Destinations)>, DataplaneError> {
        let result = self.link().and_then(|link| link.destinations(keys));
        self.checked(result)
    }

    /// The open connections of a service's destinations, where there are any.
    ///
    /// # Errors
    /// When IPVS is not there, not permitted, or does not answer.
    pub fn connections(&mut self, key: &ServiceKey) -> Result<Destinations, DataplaneError> {
        let result = self.link().and_then(|link| link.connections(key));
        self.checked(result)
    }

    /// One service's settings, if it is there.
    ///
    /// # Errors
    /// When IPVS is not there, not permitted, or does not answer.
    pub fn service(&mut self, key: &ServiceKey) -> Result<Option<Settings>, DataplaneError> {
        let result = self.link().and_then(|link| link.service(key));
        self.checked(result)
    }

    /// Takes the steps that concern IPVS, all in a few sends; returns those that failed, by index.
    ///
    /// # Errors
    /// A conversation that broke down: nobody knows how far it came.
    pub fn apply(&mut self, changes: &[&Change]) -> Result<Vec<(usize, DataplaneError)>, DataplaneError> {
        let dangerous: Vec<&str> =
            LOCKING.into_iter().filter(|name| !is_loaded(name, &self.sysctls)).collect();
        let result = self.link().and_then(|link| link.apply(changes, &dangerous));
        self.checked(result)
    }

    fn link(&mut self) -> Result<&mut Link, DataplaneError> {
        let link = match self.link.take() {
            Some(link) => link,
            None => Link::open()?,
        };
        Ok(self.link.insert(link))
    }

    fn checked<T>(&mut self, result: Result<T, DataplaneError>) -> Result<T, DataplaneError> {
        if result.is_err() {
            self.link = None;
        }
        result
    }
}

impl Link {
    fn open() -> Result<Self, DataplaneError> {
        let mut socket =
            Socket::open(SockProtocol::NetlinkGeneric).map_err(|error| failed(&Trouble::Errno(error)))?;
        let lookup = Request {
            kind: CONTROLLER,
            flags: 0,
            head: [GET_FAMILY, 1, 0, 0],
            attributes: Attributes::new().text(FAMILY_NAME, "IPVS"),
        };
        let found = socket.ask(&lookup, |answer| attribute(answer, FAMILY_ID).and_then(|id| array(id, 0)));
        match found {
            Ok(ids) => match ids.first() {
                Some(id) => Ok(Self { socket, family: u16::from_ne_bytes(*id) }),
                None => Err(DataplaneError::IpvsUnavailable),
            },
            Err(Trouble::Errno(Errno::ENOENT)) => Err(DataplaneError::IpvsUnavailable),
            Err(trouble) => Err(failed(&trouble)),
        }
    }

    fn services(&mut self) -> Result<BTreeMap<ServiceKey, VirtualService>, DataplaneError> {
        let all = self.request(Command::GetService, Attributes::new());
        let found = self.socket.dump(&all, codec::service).map_err(|trouble| failed(&trouble))?;
        let service = |(key, settings)| (key, VirtualService { settings, ..VirtualService::default() });
        Ok(found.into_iter().map(service).collect())
    }

    fn destinations(
        &mut self,
        keys: &[ServiceKey],
    ) -> Result<Vec<(ServiceKey, Destinations)>, DataplaneError> {
        let read = |key: &ServiceKey| {
            let its = self.request(Command::GetDestination, codec::name(key));
            let found = self.socket.dump(&its, |answer| codec::destination(answer, key));
            Ok((*key, found.map_err(|trouble| failed(&trouble))?.into_iter().collect()))
        };
        keys.iter().map(read).collect()
    }

    fn connections(&mut self, key: &ServiceKey) -> Result<Destinations, DataplaneError> {
        let its = self.request(Command::GetDestination, codec::name(key));
        let found = self.socket.dump(&its, |answer| codec::connections(answer, key));
        let found = found.map_err(|trouble| failed(&trouble))?;
        Ok(found.into_iter().filter(|(_, count)| *count > 0).collect())
    }

    fn service(&mut self, key: &ServiceKey) -> Result<Option<Settings>, DataplaneError> {
        let request = self.request(Command::GetService, codec::name(key));
        match self.socket.ask(&request, codec::service) {
            Ok(found) => Ok(found.into_iter().next().map(|(_, settings)| settings)),
            Err(Trouble::Errno(Errno::ESRCH | Errno::ENOENT)) => Ok(None),
            Err(trouble) => Err(failed(&trouble)),
        }
    }

    /// `dangerous`: the schedulers that the kernel must not be asked for.
    fn apply(
        &mut self,
        changes: &[&Change],
        dangerous: &[&str],
    ) -> Result<Vec<(usize, DataplaneError)>, DataplaneError> {
        let mut failures = Vec::new();
        // Services that could not be made: at their address and port may be somebody else's, not to be given destinations.
        let mut unmade: BTreeSet<ServiceKey> = BTreeSet::new();
        let mut steps: Vec<(usize, &Change)> = Vec::new();
        for (index, change) in changes.iter().copied().enumerate() {
            let scheduler = match change {
                Change::AddService(_, settings) | Change::SetService(_, settings) => {
                    settings.scheduler.as_str()
                }
                _ => "",
            };
            if dangerous.contains(&scheduler) {
                let text = format!(
                    "the scheduler `{scheduler}` is not loaded, and loading it on use can hang the node's network"
                );
                let scheduler = scheduler.to_owned();
                failures.push((index, DataplaneError::SchedulerUnavailable { scheduler, text }));
                unmade.extend(change.key().filter(|_| matches!(change, Change::AddService(..))));
            } else {
                steps.push((index, change));
            }
        }
        for some in steps.chunks(AT_ONCE) {
            let (new, rest): (Vec<_>, Vec<_>) =
                some.iter().copied().partition(|(_, change)| matches!(change, Change::AddService(..)));
            let failed = self.send(&new)?;
            unmade.extend(failed.iter().filter_map(|(index, _)| changes.get(*index)?.key()));
            failures.extend(failed);
            let (vain, rest): (Vec<_>, Vec<_>) = rest
                .into_iter()
                .partition(|(_, change)| change.key().is_some_and(|key| unmade.contains(key)));
            failures.extend(
                vain.into_iter().map(|(index, change)| (index, DataplaneError::Skipped(change.clone()))),
            );
            failures.extend(self.send(&rest)?);
        }
        failures.sort_by_key(|(index, _)| *index);
        Ok(failures)
    }

    /// Takes steps that don't depend on each other, each with its index; returns those that failed.
    fn send(&mut self, steps: &[(usize, &Change)]) -> Result<Vec<(usize, DataplaneError)>, DataplaneError> {
        let messages: Vec<(usize, &Change, Request)> = steps
            .iter()
            .filter_map(|(index, change)| {
                let (command, attributes) = codec::step(change)?;
                Some((*index, *change, self.request(command, attributes)))
            })
            .collect();
        let requests: Vec<Request> = messages.iter().map(|(.., request)| request.clone()).collect();
        let refused = self.socket.each(&requests).map_err(|trouble| failed(&trouble))?;
        let mut failures = Vec::new();
        for (n, errno) in refused {
            let Some((index, change, _)) = messages.get(n) else { continue };
            if let Err(error) = self.settle(change, errno) {
                failures.push((*index, error));
            }
        }
        Ok(failures)
    }

    /// Whether an error is one at all: a step may have been taken before.
    fn settle(&mut self, change: &Change, errno: Errno) -> Result<(), DataplaneError> {
        match (change, errno) {
            (Change::DeleteService(_), Errno::ESRCH)
            | (Change::DeleteDestination(..), Errno::ESRCH | Errno::ENOENT) => return Ok(()),
            (Change::AddService(key, settings), Errno::EEXIST)
                if self.service(key)?.as_ref() == Some(settings) =>
            {
                return Ok(());
            }
            (Change::AddDestination(key, to, weight), Errno::EEXIST) => {
                let again = Change::SetDestination(*key, *to, *weight);
                return match self.send(&[(0, &again)])?.pop() {
                    Some((_, error)) => Err(error),
                    None => Ok(()),
                };
            }
            (Change::AddService(_, settings) | Change::SetService(_, settings), Errno::ENOENT) => {
                let scheduler = settings.scheduler.clone();
                let text = format!("the kernel has no scheduler `{scheduler}`");
                return Err(DataplaneError::SchedulerUnavailable { scheduler, text });
            }
            (_, Errno::EPERM) => return Err(DataplaneError::NotPermitted("IPVS")),
            _ => {}
        }
        Err(DataplaneError::Refused { change: change.clone(), text: meaning(change, errno) })
    }

    fn request(&self, command: Command, attributes: Attributes) -> Request {
        Request { kind: self.family, flags: 0, head: [command as u8, codec::VERSION, 0, 0], attributes }
    }
}

/// The kernel's error for a step, in words. The numbers mean other things here than their names say.
fn meaning(change: &Change, errno: Errno) -> String {
    match (change, errno) {
        (Change::AddService(..), Errno::EEXIST) => {
            "another program has made a service at the same address and port".to_owned()
        }
        (Change::AddDestination(..) | Change::SetDestination(..) | Change::SetService(..), Errno::ESRCH) => {
            "the virtual service is gone".to_owned()
        }
        (Change::SetDestination(..), Errno::ENOENT) => "the destination is gone".to_owned(),
        // With `ipv6.disable=1` (seen on 6.1), or without CONFIG_IP_VS_IPV6.
        (_, Errno::EAFNOSUPPORT) => "the node has no IPv6, or its IPVS was built without it".to_owned(),
        (_, errno) => format!("{} ({errno:?})", errno.desc()),
    }
}

fn failed(trouble: &Trouble) -> DataplaneError {
    match trouble {
        Trouble::Errno(Errno::EPERM) => DataplaneError::NotPermitted("IPVS"),
        Trouble::Errno(errno) => DataplaneError::Broken("IPVS", errno.desc().to_owned()),
        Trouble::Lost(text) => DataplaneError::Broken("IPVS", text.clone()),
    }
}

#[cfg(test)]
mod tests {
    use vip_core::plan::Protocol;

    use super::*;

    #[test]
    fn a_kernel_without_ipvs_is_named() {
        if Path::new("/proc/net/ip_vs").exists() {
            return;
        }
        // Where the module exists and may be loaded, asking has just loaded it.
        match Ipvs::new("/proc/sys/net").find() {
            Ok(()) => assert!(Path::new("/proc/net/ip_vs").exists()),
            Err(error) => {
                assert_eq!(error, DataplaneError::IpvsUnavailable);
                assert!(error.to_string().contains("modprobe ip_vs"));
            }
        }
    }

    #[test]
    fn errors_are_put_in_words() {
        let key = ServiceKey { address: [10, 87, 2, 50].into(), protocol: Protocol::Tcp, port: 80 };
        let add = Change::AddService(key, Settings::default());
        assert!(meaning(&add, Errno::EEXIST).contains("another program"));
        assert!(meaning(&add, Errno::EAFNOSUPPORT).contains("the node has no IPv6"));
        assert_eq!(meaning(&Change::DeleteService(key), Errno::EINVAL), "Invalid argument (EINVAL)");
    }
}
