//! `-v 6`: a line for each request and its answer on stderr, as kubectl has it.

use std::fmt::Display;
use std::future::Future;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Instant;

use http::{Request, Response};
use kube::client::Body;
use tower_service::Service;

use crate::output::say;

/// The least verbosity at which requests are shown: kubectl's.
pub const REQUESTS: u8 = 6;

/// A client's service that tells what goes through it.
pub struct Traced<S> {
    /// What sends the requests.
    pub inner: S,
    /// URL of the API server; requests have only the path here.
    pub server: String,
    /// Whether it tells.
    pub told: bool,
}

impl<S, B> Service<Request<Body>> for Traced<S>
where
    S: Service<Request<Body>, Response = Response<B>>,
    S::Future: Send + 'static,
    S::Error: Display,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<S::Response, S::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), S::Error>> {
        self.inner.poll_ready(context)
    }

    fn call(&mut self, request: Request<Body>) -> Self::Future {
        let line = self.told.then(|| format!("{} {}{}", request.method(), self.server, request.uri()));
        let answer = self.inner.call(request);
        Box::pin(async move {
            let start = Instant::now();
            let answer = answer.await;
            if let Some(line) = line {
                let said = match &answer {
                    Ok(response) => response.status().to_string(),
                    Err(error) => format!("no answer ({error})"),
                };
                say(format!("{line} {said} in {} milliseconds", start.elapsed().as_millis()));
            }
            answer
        })
    }
}
