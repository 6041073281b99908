//! The few sysctls that balancing to pods needs. A value that is right already is left alone, so that a node where they
//! were preset needs no writable directory.
//!
//! Those of IPVS are for both IP versions, whatever their names say. What they were before is kept in a file of the node,
//! and put back once nothing of ours is left. One is only looked at, [`FORWARDING6`].

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use tracing::warn;

use super::DataplaneError;
use super::kept::Kept;

/// A name below `net`, with `.` between its parts, and the value that it should have.
///
/// `vs.conntrack` lets connections through IPVS be masqueraded; `ip_forward` lets packets through to pods;
/// `vs.expire_quiescent_template` ends a client's persistence to a removed backend instead of sending it there for ever.
const WANTED: [(&str, &str); 4] = [
    ("net.ipv4.vs.conntrack", "1"),
    (FORWARDING, "1"),
    (EXPIRY, "0"),
    ("net.ipv4.vs.expire_quiescent_template", "1"),
];

/// Whether the kernel ends the connections to destinations that are removed (`ip_vs_ctl.c`: `expire_nodest_conn_work`, since Linux
/// 5.9). Clients of a backend that is gone need that, and those of all backends must be spared it when somebody else flushes IPVS:
/// their connections go on when the destinations are back. So it is 1 only while we remove some, see [`Sysctls::expiring`].
const EXPIRY: &str = "net.ipv4.vs.expire_nodest_conn";

/// Set and never put back: a network plugin or a container runtime that found it as it needs it has left it alone, and pods
/// would lose their network with it.
const FORWARDING: &str = "net.ipv4.ip_forward";

/// Lets packets of IPv6 through, the answers of pods to clients for one. It is not set here: an interface that forwards
/// ignores router advertisements unless its `accept_ra` is 2 (`Documentation/networking/ip-sysctl.rst`), so that a node
/// which has its default route from them would lose it. On nodes of a cluster with IPv6 the network plugin needs it too.
const FORWARDING6: (&str, &str) = ("net.ipv6.conf.all.forwarding", "1");

/// The file with the former values, a line with name and value for each.
const FILE: &str = "sysctls.state";

/// The sysctls of the node.
#[derive(Debug)]
pub(super) struct Sysctls {
    /// Shows `/proc/sys/net`.
    directory: PathBuf,
    /// Where former values are kept; `None`: nowhere, and nothing is put back.
    file: Option<Kept>,
}

impl Sysctls {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, file: None }
    }

    /// Keeps former values in a folder of the node.
    pub(super) fn remember_in(&mut self, folder: &Path) {
        self.file = Some(Kept::new(folder, FILE));
    }

    /// Sets what is not as it should be. `vs` is there only once IPVS is.
    pub(super) fn set(&self) -> Result<(), DataplaneError> {
        for (name, value) in WANTED {
            let path = self.path(name);
            let found = fs::read_to_string(&path).map(|text| text.trim().to_owned());
            let is_right = found.as_ref().is_ok_and(|found| found == value);
            // Whether one can be written shows only when it is.
            if is_right && name != EXPIRY {
                continue;
            }
            if let Ok(found) = &found
                && !is_right
                && name != FORWARDING
                && let Err(error) = self.remember(name, found)
            {
                warn!(name, found, %error, "a sysctl will not be put back: its value cannot be kept");
            }
            let Err(error) = fs::write(&path, value) else { continue };
            // Where it stays 1, connections end when somebody flushes IPVS, and nothing else is amiss.
            let does = name == EXPIRY && found.is_ok_and(|found| found == "1");
            if !does {
                return Err(DataplaneError::SysctlNotSet {
                    name,
                    value: if name == EXPIRY { "1" } else { value },
                    text: format!("can't write {}: {error}", path.display()),
                });
            }
        }
        Ok(())
    }

    /// Does work that removes destinations, and has the kernel end their connections.
    pub(super) fn expiring<T>(&self, work: impl FnOnce() -> T) -> T {
        let path = self.path(EXPIRY);
        // One that cannot be set is 1 already.
        let is_set = fs::write(&path, "1").is_ok();
        let result = work();
        if is_set && let Err(error) = fs::write(&path, "0") {
            warn!(name = EXPIRY, %error, "a sysctl stays 1 until the next look: connections would end with a flush of IPVS");
        }
        result
    }

    /// Puts back what was set in this boot and is still as it was set: what somebody has changed since is theirs.
    pub(super) fn put_back(&self) -> Result<(), DataplaneError> {
        let Some(file) = &self.file else { return Ok(()) };
        for (name, former) in self.former() {
            let Some((name, value)) = WANTED.into_iter().find(|(wanted, _)| *wanted == name) else {
                continue;
            };
            let path = self.path(name);
            if !fs::read_to_string(&path).is_ok_and(|found| found.trim() == value) {
                continue;
            }
            fs::write(&path, &former).map_err(|error| DataplaneError::SysctlNotPutBack {
                name,
                text: format!("can't write {former} to {}: {error}", path.display()),
                value: former,
            })?;
        }
        file.remove().map_err(|error| {
            DataplaneError::Broken("sysctls", format!("can't remove {}: {error}", file.path().display()))
        })
    }

    /// Whether this node could serve virtual IPs of IPv6.
    pub(super) fn check_ipv6(&self) -> Result<(), DataplaneError> {
        let (name, value) = FORWARDING6;
        let text = match fs::read_to_string(self.path(name)) {
            Ok(found) if found.trim() == value => return Ok(()),
            Ok(_) => {
                "virtual IPs of IPv6 need it; it is not set for you because interfaces whose accept_ra is not 2 then ignore \
                 router advertisements"
                    .to_owned()
            }
            Err(error) if error.kind() == ErrorKind::NotFound => "the node has no IPv6".to_owned(),
            Err(error) => error.to_string(),
        };
        Err(DataplaneError::SysctlNotSet { name, value, text })
    }

    /// Keeps a value, unless one of this boot is known already: that was there before ours.
    fn remember(&self, name: &str, value: &str) -> io::Result<()> {
        let Some(file) = &self.file else { return Ok(()) };
        let mut former = self.former();
        if former.contains_key(name) {
            return Ok(());
        }
        former.insert(name.to_owned(), value.to_owned());
        file.write(former.iter().map(|(name, value)| format!("{name} {value}")))
    }

    /// The values before ours, of this boot.
    fn former(&self) -> BTreeMap<String, String> {
        let lines = self.file.as_ref().map(Kept::lines).unwrap_or_default();
        let pairs = lines.iter().filter_map(|line| line.split_once(' '));
        pairs.map(|(name, value)| (name.to_owned(), value.to_owned())).collect()
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.join(name.trim_start_matches("net.").replace('.', "/"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the four files, which is its own folder for former values.
    fn sysctls(name: &str, value: &str) -> Sysctls {
        let directory = std::env::temp_dir().join(format!("vip-sysctl-{name}-{}", std::process::id()));
        fs::create_dir_all(directory.join("ipv4/vs")).unwrap();
        let mut sysctls = Sysctls::new(directory.clone());
        for (name, _) in WANTED {
            fs::write(sysctls.path(name), value).unwrap();
        }
        sysctls.remember_in(&directory);
        sysctls
    }

    impl Sysctls {
        fn read(&self, name: &str) -> String {
            fs::read_to_string(self.path(name)).unwrap()
        }

        fn gone(&self) {
            fs::remove_dir_all(&self.directory).unwrap();
        }
    }

    const CONNTRACK: &str = "net.ipv4.vs.conntrack";
    const TEMPLATE: &str = "net.ipv4.vs.expire_quiescent_template";

    #[test]
    fn sets_what_differs_and_puts_it_back() {
        let sysctls = sysctls("differs", "0\n");
        // Those of others are left alone, also when they are the same by chance.
        fs::write(sysctls.path(TEMPLATE), "1").unwrap();
        sysctls.set().unwrap();
        assert!(WANTED.iter().all(|(name, value)| sysctls.read(name) == *value));
        // Set again after somebody changed it: what was there at first counts.
        fs::write(sysctls.path(CONNTRACK), "7").unwrap();
        sysctls.set().unwrap();
        sysctls.put_back().unwrap();
        assert_eq!([CONNTRACK, TEMPLATE, FORWARDING].map(|name| sysctls.read(name)), ["0", "1", "1"]);
        // Nothing is left to put back.
        fs::write(sysctls.path(CONNTRACK), "1").unwrap();
        sysctls.put_back().unwrap();
        assert_eq!(sysctls.read(CONNTRACK), "1");
        sysctls.gone();
    }

    #[test]
    fn what_others_changed_since_and_what_an_earlier_boot_left_stays() {
        let sysctls = sysctls("others", "0\n");
        sysctls.set().unwrap();
        fs::write(sysctls.path(CONNTRACK), "2").unwrap();
        sysctls.put_back().unwrap();
        assert_eq!([CONNTRACK, TEMPLATE].map(|name| sysctls.read(name)), ["2", "0"]);
        sysctls.set().unwrap();
        let file = sysctls.file.clone().unwrap().path().to_owned();
        let text = fs::read_to_string(&file).unwrap();
        assert_eq!(
            text.lines().skip(1).collect::<Vec<_>>(),
            ["net.ipv4.vs.conntrack 2", "net.ipv4.vs.expire_quiescent_template 0"]
        );
        fs::write(&file, format!("another{text}")).unwrap();
        sysctls.put_back().unwrap();
        assert_eq!(sysctls.read(TEMPLATE), "1");
        assert!(!file.exists());
        sysctls.gone();
    }

    #[test]
    fn leaves_alone_what_is_right() {
        let sysctls = sysctls("right", "1\n");
        fs::write(sysctls.path(EXPIRY), "0").unwrap();
        let written = || fs::metadata(sysctls.path(FORWARDING)).unwrap().modified().unwrap();
        let before = written();
        sysctls.set().unwrap();
        assert_eq!(written(), before);
        assert!(!sysctls.file.as_ref().unwrap().path().exists());
        sysctls.gone();
    }

    #[test]
    fn connections_end_only_while_something_is_removed() {
        let sysctls = sysctls("expiring", "1\n");
        sysctls.set().unwrap();
        assert_eq!(sysctls.read(EXPIRY), "0");
        assert_eq!(sysctls.expiring(|| sysctls.read(EXPIRY)), "1");
        assert_eq!(sysctls.read(EXPIRY), "0");
        sysctls.put_back().unwrap();
        assert_eq!(sysctls.read(EXPIRY), "1", "as it was");
        // A file that cannot be written: a folder in its place can't even be read.
        fs::remove_file(sysctls.path(EXPIRY)).unwrap();
        fs::create_dir(sysctls.path(EXPIRY)).unwrap();
        let words = sysctls.set().unwrap_err().to_string();
        assert!(words.contains("`sysctl -w net.ipv4.vs.expire_nodest_conn=1`"), "{words}");
        sysctls.gone();
    }

    #[test]
    fn names_what_it_cannot_set() {
        let sysctls = sysctls("missing", "0\n");
        fs::remove_dir_all(sysctls.directory.join("ipv4/vs")).unwrap();
        let error = sysctls.set().unwrap_err();
        assert!(error.to_string().contains("`sysctl -w net.ipv4.vs.conntrack=1`"), "{error}");
        assert_eq!(error.reason(), vip_core::api::Reason::SysctlNotSet);
        sysctls.gone();
    }

    #[test]
    fn what_cannot_be_kept_is_set_all_the_same() {
        let mut sysctls = sysctls("unkept", "0\n");
        sysctls.remember_in(Path::new("/proc/nowhere"));
        sysctls.set().unwrap();
        assert_eq!(sysctls.read(CONNTRACK), "1");
        sysctls.gone();
    }

    #[test]
    fn forwarding_of_ipv6_is_looked_at_and_never_set() {
        let sysctls = sysctls("ipv6", "1\n");
        let text = || sysctls.check_ipv6().unwrap_err().to_string();
        assert!(text().contains("the node has no IPv6"), "{}", text());
        let file = sysctls.path(FORWARDING6.0);
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "0\n").unwrap();
        sysctls.set().unwrap();
        assert!(text().contains("run `sysctl -w net.ipv6.conf.all.forwarding=1`"), "{}", text());
        assert_eq!(fs::read_to_string(&file).unwrap(), "0\n");
        fs::write(&file, "1\n").unwrap();
        assert_eq!(sysctls.check_ipv6(), Ok(()));
        sysctls.gone();
    }
}
