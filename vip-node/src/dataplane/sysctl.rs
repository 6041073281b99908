//! The few sysctls that balancing to pods needs. A value that is right already is left alone, so that a node where they
//! were preset needs no writable directory.
//!
//! One is only looked at, [`FORWARDING6`]. Those of IPVS are for both IP versions, whatever their names say.

use std::fs;
use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use super::DataplaneError;

/// A name below `net`, with `.` between its parts, and the value that it should have.
///
/// `vs.conntrack` lets connections through IPVS be masqueraded; `ip_forward` lets packets through to pods; the other two end a
/// client's connection to a removed backend, and its persistence, instead of sending it there for ever.
const WANTED: [(&str, &str); 4] = [
    ("net.ipv4.vs.conntrack", "1"),
    ("net.ipv4.ip_forward", "1"),
    ("net.ipv4.vs.expire_nodest_conn", "1"),
    ("net.ipv4.vs.expire_quiescent_template", "1"),
];

/// Lets packets of IPv6 through, the answers of pods to clients for one. It is not set here: an interface that forwards
/// ignores router advertisements unless its `accept_ra` is 2 (`Documentation/networking/ip-sysctl.rst`), so that a node
/// which has its default route from them would lose it. On nodes of a cluster with IPv6 the network plugin needs it too.
const FORWARDING6: (&str, &str) = ("net.ipv6.conf.all.forwarding", "1");

/// Sets what is not as it should be, in a directory that shows `/proc/sys/net`. `vs` is there only once IPVS is.
pub(super) fn set(directory: &Path) -> Result<(), DataplaneError> {
    for (name, value) in WANTED {
        let path = path(directory, name);
        if fs::read_to_string(&path).is_ok_and(|found| found.trim() == value) {
            continue;
        }
        fs::write(&path, value).map_err(|error| DataplaneError::SysctlNotSet {
            name,
            value,
            text: format!("can't write {}: {error}", path.display()),
        })?;
    }
    Ok(())
}

/// Whether this node could serve virtual IPs of IPv6, in a directory that shows `/proc/sys/net`.
pub(super) fn check_ipv6(directory: &Path) -> Result<(), DataplaneError> {
    let (name, value) = FORWARDING6;
    let text = match fs::read_to_string(path(directory, name)) {
        Ok(found) if found.trim() == value => return Ok(()),
        Ok(_) => "virtual IPs of IPv6 need it; it is not set for you because interfaces whose accept_ra is not 2 then ignore \
                  router advertisements"
            .to_owned(),
        Err(error) if error.kind() == ErrorKind::NotFound => "the node has no IPv6".to_owned(),
        Err(error) => error.to_string(),
    };
    Err(DataplaneError::SysctlNotSet { name, value, text })
}

fn path(directory: &Path, name: &str) -> PathBuf {
    directory.join(name.trim_start_matches("net.").replace('.', "/"))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A directory with the four files.
    fn directory(name: &str, value: &str) -> PathBuf {
        let directory = std::env::temp_dir().join(format!("vip-sysctl-{name}-{}", std::process::id()));
        fs::create_dir_all(directory.join("ipv4/vs")).unwrap();
        for (name, _) in WANTED {
            fs::write(directory.join(name.trim_start_matches("net.").replace('.', "/")), value).unwrap();
        }
        directory
    }

    #[test]
    fn sets_what_differs() {
        let directory = directory("differs", "0\n");
        set(&directory).unwrap();
        assert_eq!(fs::read_to_string(directory.join("ipv4/vs/conntrack")).unwrap(), "1");
        assert_eq!(fs::read_to_string(directory.join("ipv4/ip_forward")).unwrap(), "1");
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn leaves_alone_what_is_right() {
        let directory = directory("right", "1\n");
        let written = || fs::metadata(directory.join("ipv4/ip_forward")).unwrap().modified().unwrap();
        let before = written();
        set(&directory).unwrap();
        assert_eq!(written(), before);
        fs::remove_dir_all(directory).unwrap();
    }

    #[test]
    fn names_what_it_cannot_set() {
        let directory = directory("missing", "0\n");
        fs::remove_dir_all(directory.join("ipv4/vs")).unwrap();
        let error = set(&directory).unwrap_err();
        assert!(error.to_string().contains("`sysctl -w net.ipv4.vs.conntrack=1`"), "{error}");
        assert_eq!(error.reason(), vip_core::api::Reason::SysctlNotSet);
        fs::remove_dir_all(directory).unwrap();
    }
    #[test]
    fn forwarding_of_ipv6_is_looked_at_and_never_set() {
        let directory = directory("ipv6", "1\n");
        let text = || check_ipv6(&directory).unwrap_err().to_string();
        assert!(text().contains("the node has no IPv6"), "{}", text());
        let file = directory.join("ipv6/conf/all/forwarding");
        fs::create_dir_all(file.parent().unwrap()).unwrap();
        fs::write(&file, "0\n").unwrap();
        set(&directory).unwrap();
        assert!(text().contains("run `sysctl -w net.ipv6.conf.all.forwarding=1`"), "{}", text());
        assert_eq!(fs::read_to_string(&file).unwrap(), "0\n");
        fs::write(&file, "1\n").unwrap();
        assert_eq!(check_ipv6(&directory), Ok(()));
        fs::remove_dir_all(directory).unwrap();
    }
}
