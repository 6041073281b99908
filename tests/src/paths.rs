//! Where things are: the repository, the build folder, the cache that outlives a clone, the folder of a lab.

use std::{
    env,
    path::{Path, PathBuf},
};

use anyhow::{Result, bail};

/// The root of the repository.
pub fn repository() -> PathBuf {
    // Cargo says it to what it runs; what is run by hand knows where it was built.
    let tests = env::var_os("CARGO_MANIFEST_DIR")
        .map(PathBuf::from)
        .filter(|folder| folder.join("kubernetes/go.mod").exists());
    let tests = tests.unwrap_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")));
    tests.parent().map(Path::to_owned).unwrap_or(tests)
}

/// Cargo's build folder: the one that this program lies in.
pub fn target() -> PathBuf {
    let program = env::current_exe().unwrap_or_default();
    let marked = program.ancestors().find(|folder| folder.join("CACHEDIR.TAG").exists());
    marked.map_or_else(|| repository().join("target"), Path::to_owned)
}

/// What is expensive to make and the same for every clone: `${XDG_CACHE_HOME:-~/.cache}/kubectl-vip-lab`.
pub fn cache() -> PathBuf {
    env::var_os("XDG_CACHE_HOME")
        .map(PathBuf::from)
        .filter(|path| path.is_absolute())
        .or_else(|| env::var_os("HOME").map(|home| Path::new(&home).join(".cache")))
        .unwrap_or_else(|| PathBuf::from("/var/cache"))
        .join("kubectl-vip-lab")
}

/// The folder of the lab of that name.
pub fn lab(name: &str) -> PathBuf {
    target().join("lab").join(name)
}

/// A name becomes part of interface names, which have 15 characters.
pub fn check_name(name: &str) -> Result<()> {
    let fits = (1..=10).contains(&name.len())
        && name.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-');
    if !fits {
        bail!("the lab's name {name:?} does not do: 1 to 10 of the characters a-z, 0-9 and -");
    }
    Ok(())
}

/// A hash that is the same on every machine and for every compiler (FNV-1a).
pub fn fingerprint(data: &[u8]) -> u64 {
    data.iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_fit() {
        assert!(check_name("lab").is_ok());
        assert!(check_name("a-2").is_ok());
        for bad in ["", "Lab", "a/b", "elevenchars", "a b"] {
            assert!(check_name(bad).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn the_fingerprint_is_fnv() {
        assert_eq!(fingerprint(b"a"), 0xaf63_dc4c_8601_ec8c);
    }
}
