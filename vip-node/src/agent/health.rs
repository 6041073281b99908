//! `/healthz` and `/readyz` for the kubelet.

use std::convert::Infallible;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tracing::warn;

/// A loop that has not turned for this long hangs: it turns once a second when nothing happens.
const HUNG: Duration = Duration::from_secs(15);

/// What the probes are told, shared with the loop.
#[derive(Clone)]
pub struct Health(Arc<Mutex<State>>);

struct State {
    turned: Instant,
    unready: Option<String>,
}

impl Health {
    /// Alive and not ready yet.
    pub fn new() -> Self {
        Self(Arc::new(Mutex::new(State { turned: Instant::now(), unready: Some("starting".to_owned()) })))
    }

    /// The loop turned; `unready` says why the node is not ready, in a sentence.
    pub fn turn(&self, unready: Option<String>) {
        let mut state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        *state = State { turned: Instant::now(), unready };
    }

    fn answer(&self, path: &str) -> (StatusCode, String) {
        let state = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let hung = state.turned.elapsed() > HUNG;
        match (path, &state.unready) {
            ("/healthz" | "/readyz", _) if hung => {
                (StatusCode::SERVICE_UNAVAILABLE, "the agent's loop hangs\n".to_owned())
            }
            ("/readyz", Some(why)) => (StatusCode::SERVICE_UNAVAILABLE, format!("{why}\n")),
            ("/healthz" | "/readyz", _) => (StatusCode::OK, "ok\n".to_owned()),
            _ => (StatusCode::NOT_FOUND, "there are /healthz and /readyz\n".to_owned()),
        }
    }

    /// Answers until the process ends; a taken port is retried, for the predecessor may still be leaving.
    pub async fn serve(self, address: SocketAddr) {
        let mut said = false;
        let listener = loop {
            match TcpListener::bind(address).await {
                Ok(listener) => break listener,
                Err(error) => {
                    if !said {
                        warn!(%address, %error, "cannot listen for probes, retrying");
                        said = true;
                    }
                    tokio::time::sleep(Duration::from_secs(1)).await;
                }
            }
        };
        loop {
            let Ok((stream, _)) = listener.accept().await else {
                tokio::time::sleep(Duration::from_millis(100)).await;
                continue;
            };
            let health = self.clone();
            tokio::spawn(async move {
                let service = service_fn(|request: Request<Incoming>| {
                    let (status, body) = health.answer(request.uri().path());
                    async move {
                        let mut response = Response::new(Full::new(Bytes::from(body)));
                        *response.status_mut() = status;
                        Ok::<_, Infallible>(response)
                    }
                });
                let connection = hyper::server::conn::http1::Builder::new()
                    .serve_connection(TokioIo::new(stream), service);
                // A probe that hangs up is no event.
                let _ = tokio::time::timeout(Duration::from_secs(10), connection).await;
            });
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn alive_is_not_ready() {
        let health = Health::new();
        assert_eq!(health.answer("/healthz").0, StatusCode::OK);
        assert_eq!(health.answer("/readyz").0, StatusCode::SERVICE_UNAVAILABLE);
        health.turn(None);
        assert_eq!(health.answer("/readyz").0, StatusCode::OK);
        health.turn(Some("no IPVS".to_owned()));
        assert_eq!(health.answer("/readyz").1, "no IPVS\n");
    }
}
