//! The last known state of the cluster, kept on the node's disk: an agent that starts while the API server is away goes
//! on from there. Nothing but this file reads or writes it.
//!
//! The first line says whose state it is and carries the checksum of the rest; the rest is a [`View`] as JSON. The file is
//! replaced as a whole, so that a crash in the middle leaves the one before.

use std::fs::{self, File};
use std::io::{self, BufWriter, Read, Seek, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use ring::digest::{Context, SHA256, digest};
use serde::{Deserialize, Serialize};
use thiserror::Error;
use tokio::sync::watch;
use tracing::{info, warn};

use super::view::View;

/// Name of the file in its folder.
const FILE: &str = "cluster.state";
/// Changes when a [`View`] is written in another way.
const VERSION: u32 = 3;
/// A state that is older is not used: nobody knows who has been given the addresses since.
const OLDEST: Duration = Duration::from_secs(7 * 24 * 3600);
/// A file that is larger is none of ours.
const LONGEST: u64 = 256 << 20;

/// The first line.
#[derive(Debug, Serialize, Deserialize)]
struct Header {
    version: u32,
    node: String,
    /// What identifies the cluster, see [`Memory::new`].
    cluster: String,
    /// Seconds since 1970.
    written: u64,
    /// SHA-256 of the rest, hexadecimal.
    sha256: String,
}

/// Why a state is not used.
#[derive(Debug, Error)]
pub enum Refusal {
    /// There is none.
    #[error("there is none yet")]
    Missing,
    /// The disk does not give it.
    #[error("it cannot be read: {0}")]
    Unreadable(io::Error),
    /// It was cut short or changed.
    #[error("it is damaged: {0}")]
    Damaged(String),
    /// It was written by another version.
    #[error("its format is {0}, this version reads {VERSION}")]
    Version(u32),
    /// It is of another node or of another cluster.
    #[error("it is of {0}")]
    Foreign(String),
    /// Too much may have happened since.
    #[error("it is {0} days old")]
    Old(u64),
}

/// The file of one node in one cluster.
#[derive(Clone, Debug)]
pub struct Memory {
    path: PathBuf,
    node: String,
    cluster: String,
}

/// What was remembered, and how old it is.
#[derive(Debug)]
pub struct Remembered {
    /// The state.
    pub view: View,
    /// How long ago it was written.
    pub age: Duration,
}

impl Memory {
    /// The memory in a folder. `cluster` is anything that no other cluster has.
    pub fn new(folder: &Path, node: &str, cluster: &[u8]) -> Self {
        Self { path: folder.join(FILE), node: node.to_owned(), cluster: hash(cluster) }
    }

    /// What is remembered.
    ///
    /// # Errors
    /// Why it is not to be used.
    pub fn recall(&self, now: SystemTime) -> Result<Remembered, Refusal> {
        let mut text = Vec::new();
        match File::open(&self.path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Err(Refusal::Missing),
            Err(error) => return Err(Refusal::Unreadable(error)),
            Ok(file) => file.take(LONGEST).read_to_end(&mut text).map_err(Refusal::Unreadable)?,
        };
        self.parse(&text, now)
    }

    fn parse(&self, text: &[u8], now: SystemTime) -> Result<Remembered, Refusal> {
        let damaged = |why: &str| Refusal::Damaged(why.to_owned());
        let end = text.iter().position(|byte| *byte == b'\n').ok_or_else(|| damaged("it has no header"))?;
        let (head, body) = (&text[..end], &text[end + 1..]);
        let header: Header =
            serde_json::from_slice(head).map_err(|_| damaged("its header is none of ours"))?;
        if header.version != VERSION {
            return Err(Refusal::Version(header.version));
        }
        if header.node != self.node {
            return Err(Refusal::Foreign(format!("node {}", header.node)));
        }
        if header.cluster != self.cluster {
            return Err(Refusal::Foreign("another cluster".to_owned()));
        }
        if header.sha256 != hash(body) {
            return Err(damaged("its checksum is wrong"));
        }
        // A clock that was set back makes it look as if it came from the future: new enough.
        let written = UNIX_EPOCH + Duration::from_secs(header.written);
        let age = now.duration_since(written).unwrap_or_default();
        if age > OLDEST {
            return Err(Refusal::Old(age.as_secs() / 86_400));
        }
        let view = serde_json::from_slice(body).map_err(|error| Refusal::Damaged(error.to_string()))?;
        Ok(Remembered { view, age })
    }

    /// Writes a state in place of the one before.
    ///
    /// # Errors
    /// What the disk says; the one before is then still there.
    fn store(&self, view: &View, now: SystemTime) -> io::Result<()> {
        let written = now.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut header = Header {
            version: VERSION,
            node: self.node.clone(),
            cluster: self.cluster.clone(),
            written,
            sha256: hash(&[]),
        };
        let fresh = self.path.with_extension("new");
        let mut file = BufWriter::new(File::create(&fresh)?);
        // As long as the one with the right checksum, which is known at the end.
        header.write(&mut file)?;
        let mut body = Summed { file: &mut file, sum: Context::new(&SHA256) };
        serde_json::to_writer(&mut body, view)?;
        header.sha256 = hexadecimal(body.sum.finish().as_ref());
        file.rewind()?;
        header.write(&mut file)?;
        file.into_inner()?.sync_all()?;
        fs::rename(&fresh, &self.path)
    }

    /// Starts a thread that writes what it is given: a slow disk delays nobody.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn keep(self) -> io::Result<watch::Sender<View>> {
        let (publish, mut views) = watch::channel(View::default());
        std::thread::Builder::new().name("memory".into()).spawn(move || {
            let mut failing = false;
            while futures::executor::block_on(views.changed()).is_ok() {
                let view = views.borrow_and_update().clone();
                match self.store(&view, SystemTime::now()) {
                    Err(error) if !failing => {
                        failing = true;
                        let path = self.path.display();
                        warn!(%path, %error, "the cluster's state cannot be kept: after a restart without the API server this node would serve nothing");
                    }
                    Ok(()) if failing => {
                        failing = false;
                        info!("the cluster's state is kept again");
                    }
                    _ => {}
                }
            }
        })?;
        Ok(publish)
    }
}

impl Header {
    fn write(&self, file: &mut impl Write) -> io::Result<()> {
        serde_json::to_writer(&mut *file, self)?;
        file.write_all(b"\n")
    }
}

/// Sums up what goes through it: a state of thousands of Services is never in memory as text.
struct Summed<W> {
    file: W,
    sum: Context,
}

impl<W: Write> Write for Summed<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.file.write(bytes)?;
        self.sum.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

fn hash(bytes: &[u8]) -> String {
    hexadecimal(digest(&SHA256, bytes).as_ref())
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const NOW: SystemTime = UNIX_EPOCH;

    fn memory(folder: &Path, node: &str, cluster: &str) -> Memory {
        Memory::new(folder, node, cluster.as_bytes())
    }

    fn view() -> View {
        serde_json::from_value(json!({
            "objects": {
                "vips": [{"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "VirtualIP", "metadata": {"name": "10.87.2.50"},
                          "spec": {"address": "10.87.2.50", "virtualRouter": 7,
                                   "services": [{"namespace": "shop", "name": "web"}]}}],
                "pools": [],
                "services": [[{"namespace": "shop", "name": "web"},
                              {"service": {"spec": {"ports": [{"port": 80}]}}, "slices": []}]]
            },
            "peers": [{"node": "node-2", "addresses": ["10.87.0.12"], "macs": []}],
            "carried": {"10.87.0.12": {"node": "node-2", "interface": "eth0", "mac": [2, 0, 0, 0, 0, 2]}},
            "labels": {"edge": "yes"}, "drained": false
        }))
        .unwrap()
    }

    fn folder(name: &str) -> PathBuf {
        let folder = std::env::temp_dir().join(format!("vip-memory-{name}-{}", std::process::id()));
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn what_is_stored_is_recalled_and_what_is_not_ours_is_named() {
        let folder = folder("recall");
        let ours = memory(&folder, "node-1", "prod");
        assert!(matches!(ours.recall(NOW), Err(Refusal::Missing)));
        ours.store(&View::default(), NOW).unwrap();
        ours.store(&view(), NOW).unwrap();
        let back = ours.recall(NOW + Duration::from_secs(60)).unwrap();
        assert_eq!(back.age, Duration::from_secs(60));
        assert_eq!(serde_json::to_value(&back.view).unwrap(), serde_json::to_value(view()).unwrap());

        let words = |memory: &Memory, now| memory.recall(now).unwrap_err().to_string();
        assert_eq!(words(&memory(&folder, "node-2", "prod"), NOW), "it is of node node-1");
        assert_eq!(words(&memory(&folder, "node-1", "test"), NOW), "it is of another cluster");
        assert_eq!(words(&ours, NOW + OLDEST * 2), "it is 14 days old");
        let text = fs::read_to_string(folder.join(FILE)).unwrap();
        fs::write(folder.join(FILE), text.replace("\"version\":3", "\"version\":9")).unwrap();
        assert_eq!(words(&ours, NOW), "its format is 9, this version reads 3");
        fs::write(folder.join(FILE), &text[..text.len() - 1]).unwrap();
        assert_eq!(words(&ours, NOW), "it is damaged: its checksum is wrong");
        fs::remove_dir_all(&folder).unwrap();
    }

    proptest! {
        #[test]
        fn any_bytes_are_refused_or_whole(position in any::<prop::sample::Index>(), byte: u8, cut: bool) {
            let ours = memory(Path::new("/nowhere"), "node-1", "prod");
            let body = serde_json::to_vec(&view()).unwrap();
            let header = Header { version: VERSION, node: "node-1".into(), cluster: hash(b"prod"), written: 0, sha256: hash(&body) };
            let mut text = serde_json::to_vec(&header).unwrap();
            text.push(b'\n');
            text.extend(&body);
            let whole = text.clone();
            let at = position.index(text.len());
            if cut { text.truncate(at) } else { text[at] = byte }
            // What is changed in the header alone may still be a header.
            if let Ok(remembered) = ours.parse(&text, NOW) {
                prop_assert_eq!(serde_json::to_vec(&remembered.view).unwrap(), body);
                prop_assert!(text == whole || at < whole.len() - 1);
            }
        }
    }
}
