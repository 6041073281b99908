//! The few sysctls that balancing to pods needs. A value that is right already is left alone, so that a node where they
//! were preset needs no writable directory.

use std::fs;
use std::path::Path;

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

/// Sets what is not as it should be, in a directory that shows `/proc/sys/net`. `vs` is there only once IPVS is.
pub(super) fn set(directory: &Path) -> Result<(), DataplaneError> {
    for (name, value) in WANTED {
        let path = directory.join(name.trim_start_matches("net.").replace('.', "/"));
        if fs::read_to_string(&path).is_ok_and(|found| found.trim() == value) {
            continue;
        }
        fs::write(&path, value).map_err(|error| DataplaneError::SysctlNotSet {
            name,
            value,
            text: format!("{}: {error}", path.display()),
        })?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

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
}
