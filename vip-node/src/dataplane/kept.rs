//! Files of the node whose content holds for one boot: what tells of the kernel's state means nothing once that is gone.

use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

/// Changes with every start of the node.
const BOOT: &str = "/proc/sys/kernel/random/boot_id";

/// A file: the boot in which it was written, then its lines.
#[derive(Clone, Debug)]
pub(super) struct Kept(PathBuf);

impl Kept {
    pub(super) fn new(folder: &Path, name: &str) -> Self {
        Self(folder.join(name))
    }

    pub(super) fn path(&self) -> &Path {
        &self.0
    }

    /// What was written in this boot; nothing of what cannot be read.
    pub(super) fn lines(&self) -> Vec<String> {
        let text = fs::read_to_string(&self.0).unwrap_or_default();
        let mut lines = text.lines().map(str::to_owned);
        match boot().is_ok_and(|boot| lines.next() == Some(boot)) {
            true => lines.collect(),
            false => Vec::new(),
        }
    }

    /// Replaces the file as a whole or not at all.
    pub(super) fn write(&self, lines: impl IntoIterator<Item = String>) -> io::Result<()> {
        let mut text = boot()? + "\n";
        for line in lines {
            text += &line;
            text.push('\n');
        }
        let fresh = self.0.with_extension("new");
        fs::write(&fresh, text)?;
        fs::rename(fresh, &self.0)
    }

    pub(super) fn remove(&self) -> io::Result<()> {
        match fs::remove_file(&self.0) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }
}

fn boot() -> io::Result<String> {
    fs::read_to_string(BOOT).map(|id| id.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_kept_holds_for_one_boot() {
        let folder = std::env::temp_dir().join(format!("vip-kept-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        let kept = Kept::new(&folder, "some.state");
        assert_eq!(kept.lines(), Vec::<String>::new());
        kept.write(["one".to_owned(), "two".to_owned()]).unwrap();
        assert_eq!(kept.lines(), ["one", "two"]);
        let text = fs::read_to_string(kept.path()).unwrap();
        fs::write(kept.path(), text.replacen(&boot().unwrap(), "another", 1)).unwrap();
        assert_eq!(kept.lines(), Vec::<String>::new());
        kept.remove().unwrap();
        kept.remove().unwrap();
        fs::remove_dir(&folder).unwrap();
    }
}
