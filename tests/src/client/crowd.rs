//! What many clients do at once: requests all the time, and connections that stay open.

use std::{
    fmt, mem,
    net::{IpAddr, SocketAddr},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use anyhow::{Result, anyhow};

use super::{Client, Report, Watch};

/// Between two requests of one client.
const EVERY: Duration = Duration::from_millis(40);
/// Clients that send datagrams beside one that opens connections: an emulated machine carries no more of those, with kubelets
/// that start containers beside.
const DATAGRAMS: usize = 7;
/// What is late on a slow machine is no failure.
const LIMIT: Duration = Duration::from_secs(10);
/// Between two requests on a connection that stays open.
const PAUSE: Duration = Duration::from_secs(8);

/// Two hundred requests in a second: at port 80 by connections that are closed, at port 81 by datagrams.
#[derive(Debug)]
pub struct Requests(Vec<Watch>);

impl Requests {
    /// Starts them, and waits until they are answered.
    pub fn start(client: &Client, vip: IpAddr) -> Result<Self> {
        let mut urls = vec![format!("http://{}/hostname", SocketAddr::new(vip, 80))];
        urls.resize(1 + DATAGRAMS, format!("udp://{}/hostname", SocketAddr::new(vip, 81)));
        let watch = |url: String| {
            let watch = client.clone().limit(LIMIT).watch(&url, EVERY)?;
            watch.wait_answers(20, Duration::from_secs(60))?;
            Ok(watch)
        };
        urls.into_iter().map(watch).collect::<Result<_>>().map(Self)
    }

    /// Ends them, and says what each client saw, the one with connections first.
    pub fn stop(self) -> Vec<Report> {
        self.0.into_iter().map(Watch::stop).collect()
    }
}

/// Connections that stay open, each used now and then.
#[derive(Debug)]
pub struct Crowd {
    stop: Arc<AtomicBool>,
    members: Vec<JoinHandle<Result<()>>>,
}

/// What became of a [`Crowd`].
#[derive(Debug)]
pub struct Parting {
    /// How many there were.
    pub members: usize,
    /// Why connections broke, one word for each.
    pub broken: Vec<String>,
}

impl Crowd {
    /// Opens so many connections.
    pub fn gather(client: &Client, at: SocketAddr, count: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut members = Vec::new();
        for _ in 0..count {
            let mut connection = client.clone().limit(LIMIT).connect(at)?;
            let stop = Arc::clone(&stop);
            members.push(thread::spawn(move || {
                while !stop.load(Ordering::Relaxed) {
                    connection.get("hostname")?;
                    thread::park_timeout(PAUSE);
                }
                connection.get("hostname").map(drop)
            }));
        }
        Ok(Self { stop, members })
    }

    /// Uses each once more, and closes them.
    pub fn leave(mut self) -> Parting {
        self.end();
        let all = mem::take(&mut self.members);
        let members = all.len();
        let ended = all.into_iter().map(|member| member.join().unwrap_or_else(|_| Err(anyhow!("a panic"))));
        let broken = ended.filter_map(|end| end.err().map(|why| format!("{why:#}"))).collect();
        Parting { members, broken }
    }

    fn end(&self) {
        self.stop.store(true, Ordering::Relaxed);
        self.members.iter().for_each(|member| member.thread().unpark());
    }
}

impl Drop for Crowd {
    fn drop(&mut self) {
        self.end();
    }
}

impl fmt::Display for Parting {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of {} connections broke", self.broken.len(), self.members)?;
        self.broken.first().map_or(Ok(()), |why| write!(f, ": {why}"))
    }
}
