//! A timer that is exact to the microsecond: the runtime's own counts in milliseconds, a tenth of the shortest
//! advertisement interval.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::time::Duration;

use nix::sys::time::TimeSpec;
use nix::sys::timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags};
use tokio::io::unix::AsyncFd;

/// A timer of the kernel.
pub struct Timer(AsyncFd<Clock>);

struct Clock(TimerFd);

impl AsRawFd for Clock {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Timer {
    /// A timer that is not set.
    ///
    /// # Errors
    /// When the process is out of file descriptors.
    pub fn new() -> io::Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let clock = Clock(TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?);
        // SAFETY: the clock owns its descriptor and gives the same one for as long as it lives.
        Ok(Self(unsafe { AsyncFd::register(clock) }?))
    }

    /// Waits for some time. Dropping it loses nothing.
    ///
    /// # Errors
    /// What the kernel says.
    pub async fn sleep(&self, time: Duration) -> io::Result<()> {
        // Zero would mean never.
        let time = TimeSpec::from_duration(time.max(Duration::from_nanos(1)));
        self.0.get_ref().0.set(Expiration::OneShot(time), TimerSetTimeFlags::empty())?;
        let mut guard = self.0.readable().await?;
        guard.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;

    #[tokio::test(flavor = "current_thread")]
    async fn it_is_never_early_and_never_a_millisecond_by_rule() {
        let timer = Timer::new().unwrap();
        let mut late = Vec::new();
        for micros in (0..3000).step_by(150) {
            let (time, begun) = (Duration::from_micros(micros), Instant::now());
            timer.sleep(time).await.unwrap();
            late.push(begun.elapsed().checked_sub(time).expect("it fires too early"));
        }
        late.sort();
        assert!(late[late.len() / 4] < Duration::from_micros(900), "{late:?}");
    }
}
