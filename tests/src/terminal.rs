//! `kubectl vip` at a real terminal.

use std::{
    fs::File,
    io::{Read as _, Write as _},
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Context, Result, anyhow};
use nix::pty::{Winsize, openpty};

use crate::{command, lab::Lab};

/// A command at a terminal of its own, which does 16 colours.
pub struct Terminal {
    keys: File,
    process: Child,
    reader: JoinHandle<()>,
    shown: Arc<Mutex<Vec<u8>>>,
}

impl Terminal {
    /// Starts `kubectl vip` with the words of a line.
    pub fn start(lab: &Lab, columns: u16, environment: &[(&str, &str)], line: &str) -> Result<Self> {
        Self::run(&lab.kubectl_command()?, columns, environment, line)
    }

    /// The same by a kubectl of the caller's.
    pub(crate) fn run(
        kubectl: &Command,
        columns: u16,
        environment: &[(&str, &str)],
        line: &str,
    ) -> Result<Self> {
        let size = Winsize { ws_row: 24, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 };
        let pair = openpty(&size, None)?;
        // The terminal is that of the session, so that its keys are signals.
        let mut session = Command::new("setsid");
        session.arg("--ctty").arg(kubectl.get_program()).args(kubectl.get_args());
        session.arg("vip").args(line.split_whitespace()).env("TERM", "xterm");
        let inherited = kubectl.get_envs().filter_map(|(name, value)| Some((name, value?)));
        session.envs(inherited).envs(environment.iter().copied());
        session.stdin(Stdio::from(pair.slave.try_clone()?));
        session.stdout(Stdio::from(pair.slave.try_clone()?));
        session.stderr(Stdio::from(pair.slave.try_clone()?));
        let process = command::spawn(&mut session)?;
        drop((pair.slave, session));
        let mut output = File::from(pair.master.try_clone()?);
        let shown = Arc::new(Mutex::new(Vec::new()));
        let screen = Arc::clone(&shown);
        let reader = thread::spawn(move || {
            let mut part = [0; 4096];
            // The other end's close is an error on Linux.
            while let Ok(length @ 1..) = output.read(&mut part) {
                screen.lock().unwrap_or_else(PoisonError::into_inner).extend(part.iter().take(length));
            }
        });
        Ok(Self { keys: File::from(pair.master), process, reader, shown })
    }

    /// Types.
    pub fn press(&mut self, keys: &str) -> Result<()> {
        Ok(self.keys.write_all(keys.as_bytes())?)
    }

    /// Waits until something has been shown.
    pub fn wait(&self, words: &str, limit: Duration) -> Result<()> {
        command::until(&format!("{words:?} on the screen"), limit, || {
            // A letter may have come in part.
            Ok(Self::text(&self.shown).is_ok_and(|text| text.contains(words)).then_some(()))
        })
    }

    fn text(shown: &Mutex<Vec<u8>>) -> Result<String> {
        let shown = shown.lock().unwrap_or_else(PoisonError::into_inner).clone();
        Ok(String::from_utf8(shown)?.replace("\r\n", "\n"))
    }

    /// Waits for its end: the exit code and all that was shown.
    pub fn end(mut self, limit: Duration) -> Result<(i32, String)> {
        let code = command::wait(&mut self.process, limit)?.context("it goes on for ever")?;
        drop(self.keys);
        self.reader.join().map_err(|_| anyhow!("the screen could not be read"))?;
        Ok((code, Self::text(&self.shown)?))
    }
}
