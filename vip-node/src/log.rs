//! The log's way to where it is read, on a thread of its own: a reader that stalls must not keep an advertisement. Lines that find
//! no room meanwhile are left out and counted.

use std::io::{self, Write};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::time::Duration;

/// So many lines wait for their reader.
const LINES: usize = 1024;
/// How long the last lines may take.
const LAST: Duration = Duration::from_millis(500);

/// A writer that never waits. Each write is a line.
#[derive(Clone)]
pub struct Log {
    lines: SyncSender<Item>,
    left_out: Arc<AtomicU64>,
}

enum Item {
    Line(Vec<u8>),
    /// All before it is written.
    Mark(SyncSender<()>),
}

impl Log {
    /// Starts the thread that writes.
    ///
    /// # Errors
    /// When the system refuses a thread.
    pub fn start(target: impl Write + Send + 'static) -> io::Result<Self> {
        let (lines, queue) = sync_channel(LINES);
        let left_out = Arc::new(AtomicU64::new(0));
        let count = Arc::clone(&left_out);
        std::thread::Builder::new().name("log".into()).spawn(move || write(&queue, &count, target))?;
        Ok(Self { lines, left_out })
    }

    /// Waits until what was said so far is written, but not for a reader that stalls.
    pub fn finish(&self) {
        let (mark, written) = sync_channel(1);
        if self.lines.try_send(Item::Mark(mark)).is_ok() {
            let _ = written.recv_timeout(LAST);
        }
    }
}

impl Write for Log {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        if self.lines.try_send(Item::Line(line.to_vec())).is_err() {
            self.left_out.fetch_add(1, Ordering::Relaxed);
        }
        Ok(line.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Nobody is left to be told that the log cannot be written.
fn write(queue: &Receiver<Item>, left_out: &AtomicU64, mut target: impl Write) {
    for item in queue {
        match item {
            Item::Line(line) => {
                let _ = target.write_all(&line);
            }
            Item::Mark(written) => {
                let _ = written.try_send(());
            }
        }
        let count = left_out.swap(0, Ordering::Relaxed);
        if count > 0 {
            let _ = writeln!(target, "{count} lines of the log were left out, for it was not read");
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::{Condvar, Mutex};

    use super::*;

    /// A reader that stalls until it is told.
    #[derive(Clone, Default)]
    struct Stalled(Arc<(Mutex<Reading>, Condvar)>);

    #[derive(Default)]
    struct Reading {
        goes_on: bool,
        text: Vec<u8>,
    }

    impl Write for Stalled {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            let (state, told) = &*self.0;
            let mut state = told.wait_while(state.lock().unwrap(), |reading| !reading.goes_on).unwrap();
            state.text.extend(bytes);
            Ok(bytes.len())
        }

        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_reader_that_stalls_keeps_nobody_and_is_told_what_it_has_missed() {
        let reader = Stalled::default();
        let mut log = Log::start(reader.clone()).unwrap();
        for number in 0..5000 {
            log.write_all(format!("line {number}\n").as_bytes()).unwrap();
        }
        log.finish();
        let (state, told) = &*reader.0;
        state.lock().unwrap().goes_on = true;
        told.notify_all();
        let end = std::time::Instant::now() + Duration::from_secs(10);
        loop {
            let text = String::from_utf8(state.lock().unwrap().text.clone()).unwrap();
            let read = text.lines().filter(|line| line.starts_with("line ")).count();
            let missed = text
                .lines()
                .find_map(|line| line.strip_suffix(" lines of the log were left out, for it was not read"));
            if missed.and_then(|count| count.parse().ok()) == Some(5000 - read) {
                assert!((LINES..5000).contains(&read), "{read}");
                return;
            }
            assert!(std::time::Instant::now() < end, "{text}");
            std::thread::yield_now();
        }
    }
}
