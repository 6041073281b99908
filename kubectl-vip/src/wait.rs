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

/// For so long the API server may be silent, or too busy: it may be restarted just now.
const PATIENCE: Duration = Duration::from_secs(20);
/// For so long a look may take, also when the time is over before.
const LOOK: Duration = Duration::from_secs(2);

/// Looks until it is there or the time is over. `what` is what the line on stderr begins with.
pub async fn until<T>(
    what: &str,
    timeout: Duration,
    mut look: impl AsyncFnMut() -> Result<Look<T>>,
) -> Result<Ended<T>> {
    let deadline = Instant::now() + timeout;
    let (mut said, mut heard) = (String::new(), Instant::now());
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let looked = tokio::time::timeout(left.max(LOOK).min(PATIENCE), look())
            .await
            .unwrap_or_else(|_| Err(Failure::silence()));
        if !matches!(&looked, Err(failure) if failure.may_pass()) {
            heard = Instant::now();
        }
        let reason = match looked {
            Ok(Look::Done(value)) => return Ok(Ended::Done(value)),
            Ok(Look::NotYet(reason)) => reason,
            Err(failure)
                if failure.may_pass() && (heard.elapsed() < PATIENCE || Instant::now() >= deadline) =>
            {
                failure.sentence().to_owned()
            }
            Err(failure) => return Err(failure),
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

    #[tokio::test]
    async fn a_look_that_hangs_ends_with_the_wait() {
        let start = Instant::now();
        let never = until::<()>("it", Duration::from_millis(2100), async || {
            tokio::time::sleep(Duration::from_secs(600)).await;
            Ok(Look::Done(()))
        });
        let Ended::TimedOut(reason) = never.await.unwrap() else { panic!("it never comes") };
        assert_eq!(reason, "the API server does not answer: time is up");
        assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    }

    #[tokio::test]
    async fn goes_on_while_the_api_server_is_restarted() {
        let mut looks = 0;
        let ended = until("it", Duration::from_secs(5), async || {
            looks += 1;
            if looks == 2 {
                return Ok(Look::Done(7));
            }
            let cause = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
            Err(Failure::from(kube::Error::Service(Box::new(cause))))
        })
        .await
        .unwrap();
        assert!(matches!(ended, Ended::Done(7)));
        let refused =
            until::<()>("it", Duration::from_secs(5), async || Err(Failure::new("you may not"))).await;
        assert_eq!(
            refused.err(),
            Some(Failure::new("you may not")),
            "what will not change is not waited for"
        );
    }
}
