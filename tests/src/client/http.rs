//! As much HTTP/1.1 as asking a test server takes: one GET, a body with a length, in chunks, or up to the end.

use std::{
    io::{self, Read, Write},
    net::{SocketAddr, TcpStream},
    time::{Duration, Instant},
};

use anyhow::{Context, Result};

use super::Response;

/// A connection that stays open.
#[derive(Debug)]
pub struct Connection {
    stream: TcpStream,
    limit: Duration,
}

impl Connection {
    pub(super) fn new(stream: TcpStream, limit: Duration) -> Result<Self> {
        stream.set_nodelay(true)?;
        Ok(Self { stream, limit })
    }

    /// One more request on this connection.
    pub fn get(&mut self, path: &str) -> Result<Response> {
        let (peer, source) = (self.stream.peer_addr()?, self.stream.local_addr()?);
        let start = Instant::now();
        let (status, body) =
            request(&mut self.stream, peer, path.trim_start_matches('/'), true, start + self.limit)
                .with_context(|| format!("the connection to {peer} is broken"))?;
        Ok(Response { status, body, source, took: start.elapsed() })
    }
}

/// One GET: the status and the body.
pub(super) fn request(
    stream: &mut TcpStream,
    host: SocketAddr,
    path: &str,
    keep: bool,
    deadline: Instant,
) -> io::Result<(u16, String)> {
    let connection = if keep { "keep-alive" } else { "close" };
    let text = format!("GET /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: {connection}\r\n\r\n");
    stream.set_write_timeout(Some(left(deadline)?))?;
    stream.write_all(text.as_bytes())?;
    let mut data = Vec::new();
    loop {
        if let Some(answer) = parse(&data, false) {
            return Ok(answer);
        }
        let mut buffer = [0; 4096];
        stream.set_read_timeout(Some(left(deadline)?))?;
        match stream.read(&mut buffer)? {
            0 => return parse(&data, true).ok_or_else(|| io::ErrorKind::UnexpectedEof.into()),
            length => data.extend_from_slice(&buffer[..length]),
        }
    }
}

fn left(deadline: Instant) -> io::Result<Duration> {
    let left = deadline.saturating_duration_since(Instant::now());
    if left.is_zero() { Err(io::ErrorKind::TimedOut.into()) } else { Ok(left) }
}

/// The answer, if it is complete; `end`: nothing more will come.
fn parse(data: &[u8], end: bool) -> Option<(u16, String)> {
    let split = data.windows(4).position(|window| window == b"\r\n\r\n")?;
    let head = String::from_utf8_lossy(&data[..split]).to_ascii_lowercase();
    let rest = &data[split + 4..];
    let status = head.split_whitespace().nth(1)?.parse().ok()?;
    let header =
        |name: &str| head.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':')).map(str::trim);
    let body = if let Some(length) = header("content-length") {
        rest.get(..length.parse().ok()?)?.to_vec()
    } else if header("transfer-encoding") == Some("chunked") {
        chunks(rest)?
    } else if end {
        rest.to_vec()
    } else {
        return None;
    };
    Some((status, String::from_utf8_lossy(&body).trim().to_owned()))
}

fn chunks(mut data: &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let line = data.windows(2).position(|window| window == b"\r\n")?;
        let length =
            usize::from_str_radix(str::from_utf8(&data[..line]).ok()?.split(';').next()?.trim(), 16).ok()?;
        let chunk = data.get(line + 2..line + 2 + length)?;
        if length == 0 {
            return Some(body);
        }
        body.extend_from_slice(chunk);
        data = data.get(line + 2 + length + 2..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::parse;

    #[test]
    fn bodies() {
        let with_length = b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nweb\n";
        assert_eq!(parse(with_length, false).unwrap(), (200, "web".into()));
        assert_eq!(parse(&with_length[..40], false), None);
        let chunked = b"HTTP/1.1 404 x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n";
        assert_eq!(parse(chunked, false).unwrap(), (404, "abc".into()));
        let open = b"HTTP/1.1 200 OK\r\n\r\nabc";
        assert_eq!(parse(open, false), None);
        assert_eq!(parse(open, true).unwrap(), (200, "abc".into()));
    }
}
