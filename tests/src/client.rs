//! A client that is a host on the LAN: single requests over HTTP and UDP, and one that goes on asking.
//!
//! Addresses are `http://HOST[:PORT]/PATH` and `udp://HOST:PORT/PAYLOAD` (the payload is what agnhost understands, for
//! instance `hostname`).

mod crowd;
mod http;
mod watch;

use std::{
    io,
    net::{IpAddr, SocketAddr, TcpStream, UdpSocket},
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};

pub use crowd::{Crowd, Parting, Requests};
pub use http::Connection;
pub use watch::{Report, Watch};

use crate::netns::Netns;

/// How long a request may take unless told otherwise.
const LIMIT: Duration = Duration::from_secs(2);

/// A client in a network namespace, or in this thread's own.
#[derive(Clone, Debug)]
pub struct Client {
    netns: Option<Netns>,
    limit: Duration,
}

/// An answer.
#[derive(Clone, Debug)]
pub struct Response {
    /// The HTTP status; 200 for any answer over UDP.
    pub status: u16,
    /// The body without white space around it.
    pub body: String,
    /// The client's own address and port.
    pub source: SocketAddr,
    /// From the start of the connection to the end of the answer.
    pub took: Duration,
}

/// What a URL says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) udp: bool,
    pub(crate) address: SocketAddr,
    pub(crate) path: String,
}

impl Client {
    /// A client in that namespace; `None`: where it is called.
    pub fn new(netns: Option<Netns>) -> Self {
        Self { netns, limit: LIMIT }
    }

    /// The same client with another time limit for each request (2 s by default).
    pub fn limit(mut self, limit: Duration) -> Self {
        self.limit = limit;
        self
    }

    /// One request on a connection of its own.
    pub fn get(&self, url: &str) -> Result<Response> {
        let target = Target::parse(url)?;
        self.inside(|| target.ask(self.limit))?.with_context(|| format!("no answer from {url}"))
    }

    /// Sends one datagram and waits for one.
    pub fn udp(&self, address: SocketAddr, payload: &str) -> Result<Response> {
        self.get(&format!("udp://{address}/{payload}"))
    }

    /// A connection that stays open, for request after request.
    pub fn connect(&self, address: SocketAddr) -> Result<Connection> {
        let stream = self.inside(|| TcpStream::connect_timeout(&address, self.limit))?;
        Connection::new(stream.with_context(|| format!("can't connect to {address}"))?, self.limit)
    }

    /// Whether a connection is refused at once: an error unless it is refused or accepted within the time limit.
    pub fn tcp_refused(&self, address: SocketAddr) -> Result<bool> {
        match self.inside(|| TcpStream::connect_timeout(&address, self.limit))? {
            Ok(_) => Ok(false),
            Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => Ok(true),
            Err(error) => Err(error).with_context(|| format!("{address} neither accepts nor refuses")),
        }
    }

    /// Goes on asking in the background, each time on a connection of its own, until it is stopped.
    pub fn watch(&self, url: &str, every: Duration) -> Result<Watch> {
        Watch::start(self.netns.clone(), Target::parse(url)?, every, self.limit)
    }

    /// Goes on asking as clients would that come for the first time: one request after another, and before each the host
    /// forgets who has the address.
    pub fn watch_cold(&self, url: &str, every: Duration) -> Result<Watch> {
        Ok(Watch::start_cold(self.netns.clone(), Target::parse(url)?, every, self.limit))
    }

    fn inside<T: Send>(&self, work: impl FnOnce() -> T + Send) -> Result<T> {
        match &self.netns {
            Some(netns) => netns.run(work),
            None => Ok(work()),
        }
    }
}

impl Target {
    pub(crate) fn parse(url: &str) -> Result<Self> {
        let (scheme, rest) = url.split_once("://").with_context(|| format!("{url} is not a URL"))?;
        let (host, path) = rest.split_once('/').unwrap_or((rest, ""));
        let udp = match scheme {
            "http" => false,
            "udp" => true,
            _ => bail!("{url}: neither http nor udp"),
        };
        let bare = host.trim_start_matches('[').trim_end_matches(']').parse::<IpAddr>();
        let address = match bare {
            Ok(address) => SocketAddr::new(address, 80),
            Err(_) => host.parse().with_context(|| format!("{url}: {host} is not an address"))?,
        };
        Ok(Self { udp, address, path: path.to_owned() })
    }

    /// Asks from this thread's namespace.
    pub(crate) fn ask(&self, limit: Duration) -> io::Result<Response> {
        let start = Instant::now();
        let (status, body, source) = match self.udp {
            true => self.ask_udp(limit)?,
            false => self.ask_http(limit)?,
        };
        Ok(Response { status, body, source, took: start.elapsed() })
    }

    fn ask_http(&self, limit: Duration) -> io::Result<(u16, String, SocketAddr)> {
        let deadline = Instant::now() + limit;
        let mut stream = TcpStream::connect_timeout(&self.address, limit)?;
        let source = stream.local_addr()?;
        let (status, body) = http::request(&mut stream, self.address, &self.path, false, deadline)?;
        Ok((status, body, source))
    }

    fn ask_udp(&self, limit: Duration) -> io::Result<(u16, String, SocketAddr)> {
        let any: IpAddr = match self.address {
            SocketAddr::V4(_) => IpAddr::from([0; 4]),
            SocketAddr::V6(_) => IpAddr::from([0; 16]),
        };
        let socket = UdpSocket::bind((any, 0))?;
        socket.connect(self.address)?;
        socket.set_read_timeout(Some(limit))?;
        socket.send(self.path.as_bytes())?;
        let mut buffer = [0; 2048];
        let length = socket.recv(&mut buffer)?;
        Ok((200, String::from_utf8_lossy(&buffer[..length]).trim().to_owned(), socket.local_addr()?))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls() {
        let parse = |url| Target::parse(url).unwrap();
        let target = parse("http://10.87.2.50/hostname");
        assert_eq!((target.address, target.path.as_str()), ("10.87.2.50:80".parse().unwrap(), "hostname"));
        assert_eq!(parse("http://[fd87::50]:8080").address, "[fd87::50]:8080".parse().unwrap());
        assert_eq!(parse("http://[fd87::50]/").address, "[fd87::50]:80".parse().unwrap());
        assert!(parse("udp://10.87.2.50:81/hostname").udp);
        assert!(Target::parse("https://10.87.2.50/").is_err());
        assert!(Target::parse("http://example/").is_err());
    }
}
