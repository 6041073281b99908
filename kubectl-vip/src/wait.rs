//! Waiting: looks again and again, says on stderr what is still missing whenever that changes, and gives up in words.

use std::time::{Duration, Instant};

use crate::cluster::POLL;
use crate::exit::{Failure, Result};
use crate::output::say;

/// What one look found.
pub enum Look<T> {
    /// It is there.
    Done(T),
    /// It is not there yet, and why.
    NotYet(String),
}

/// How waiting ended.
pub enum Ended<T> {
    /// It came.
    Done(T),
    /// Time ran out; the last reason.
    TimedOut(String),
}

/// Looks until it is there or the time is over. `what` is what the line on stderr begins with.
pub async fn until<T>(
    what: &str,
    timeout: Duration,
    mut look: impl AsyncFnMut() -> Result<Look<T>>,
) -> Result<Ended<T>> {
    let deadline = Instant::now() + timeout;
    let mut said = String::new();
    loop {
        let reason = match look().await? {
            Look::Done(value) => return Ok(Ended::Done(value)),
            Look::NotYet(reason) => reason,
        };
        if Instant::now() >= deadline {
            return Ok(Ended::TimedOut(reason));
        }
        if reason != said {
            say(format!("waiting for {what}: {reason}"));
            said = reason;
        }
        tokio::time::sleep(POLL.min(deadline.saturating_duration_since(Instant::now()))).await;
    }
}

/// The sentence of a wait that has to succeed.
pub fn timed_out(what: &str, timeout: Duration, reason: &str) -> Failure {
    Failure::new(format!(
        "timed out after {} waiting for {what}: {reason}",
        crate::output::span(i64::try_from(timeout.as_secs()).unwrap_or(i64::MAX))
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn ends_with_the_value_or_the_last_reason() {
        let mut looks = 0;
        let ended = until("it", Duration::from_secs(5), async || {
            looks += 1;
            Ok(if looks == 2 { Look::Done(7) } else { Look::NotYet("not yet".to_owned()) })
        })
        .await
        .unwrap();
        assert!(matches!(ended, Ended::Done(7)));

        let never =
            until::<()>("it", Duration::ZERO, async || Ok(Look::NotYet("no node".to_owned()))).await.unwrap();
        let Ended::TimedOut(reason) = never else { panic!("it never comes") };
        assert_eq!(
            timed_out("it", Duration::from_secs(300), &reason).to_string(),
            "Error: timed out after 5m waiting for it: no node"
        );
    }
}
