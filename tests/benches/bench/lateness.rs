//! How late adverts are while both cores are busy and orders of thousands of objects come in, and in the lab's machine a refill
//! of IPVS as well. A takeover while the machine woke its threads in time is an error.

use std::{
    collections::BTreeMap,
    net::{IpAddr, Ipv4Addr},
    process::{Child, Command},
    sync::atomic::{AtomicBool, AtomicUsize, Ordering},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, ensure};
use lab::{Host, Segment, command};
use vip_core::vrrp::{Lan, Peer, RouterConfig, RouterId};

use crate::{
    adverts::{Ear, Heard},
    vrrp::{Vrrp, config},
};

/// Of hosts 1 to 3; the first is the owner, the others would take over.
const PRIORITIES: [u8; 3] = [254, 224, 194];
/// What orders hold thousands of.
const OBJECTS: u32 = 5000;
const QUIET: Duration = Duration::from_secs(5);
const STRESS: Duration = Duration::from_secs(15);
/// When the machine lets a thread sleep for so much too long, a takeover is its fault: two adverts and more are missing.
const HALTED: Duration = Duration::from_millis(200);
/// How long a busy process lasts, should nobody be left to end it.
const ABANDONED: Duration = Duration::from_secs(900);
/// How long it may take until everything is bound.
const PATIENCE: Duration = Duration::from_secs(30);

/// What the three elect and what is ordered again and again.
struct Load {
    name: &'static str,
    routers: u8,
    /// Addresses of each.
    vips: u32,
    what: What,
    /// Between two orders.
    every: Duration,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum What {
    Peers,
    Addresses,
}

const LOADS: [Load; 3] = [
    Load {
        name: "1 virtual router, 5,000 peers replaced four times a second",
        routers: 1,
        vips: 1,
        what: What::Peers,
        every: Duration::from_millis(250),
    },
    Load {
        name: "200 virtual routers, 5,000 peers replaced four times a second",
        routers: 200,
        vips: 1,
        what: What::Peers,
        every: Duration::from_millis(250),
    },
    Load {
        name: "20 virtual routers, their 5,000 addresses replaced every 3 s",
        routers: 20,
        vips: 250,
        what: What::Addresses,
        every: Duration::from_secs(3),
    },
];

/// In the lab's machine, which is slower.
const BESIDE: Load = Load {
    name: "1 virtual router, 5,000 peers replaced every 2 s",
    routers: 1,
    vips: 1,
    what: What::Peers,
    every: Duration::from_secs(2),
};

/// The same with a refill of IPVS beside it, on the owner's host.
pub fn beside(what: &str, work: impl FnOnce(&Host) -> Result<()> + Send) -> Result<()> {
    println!("adverts every 100 ms with all cores busy, and {what}:");
    BESIDE.run(work)
}

pub fn measure() -> Result<()> {
    println!(
        "lateness of adverts every 100 ms, by the kernel's time on another host, two backups listening;"
    );
    println!(
        "quiet for {} s, then {} s with all cores busy and orders to all three (with a refill of IPVS as well: `dataplane`):",
        QUIET.as_secs(),
        STRESS.as_secs()
    );
    LOADS.iter().try_for_each(|load| {
        load.run(|_| {
            thread::sleep(STRESS);
            Ok(())
        })
    })
}

impl Load {
    /// Quiet first, then under stress for as long as something is done on the owner's host.
    fn run(&self, work: impl FnOnce(&Host) -> Result<()> + Send) -> Result<()> {
        let segment = Segment::new(4)?;
        let all = self.start(&segment)?;
        thread::sleep(Duration::from_secs(1));
        let ear = Ear::open(segment.host(4))?;
        let end = Instant::now() + QUIET;
        let quiet = Lateness::of(&listen(&ear, || Instant::now() >= end)?, &segment)?;
        let hogs = Hogs::start()?;
        let (done, count) = (AtomicBool::new(false), AtomicUsize::new(0));
        let (heard, bare) = thread::scope(|scope| -> Result<(Vec<Heard>, Duration)> {
            let sleeper = scope.spawn(|| oversleep(&done));
            let orders = scope.spawn(|| self.order_again(&segment, &all, &done, &count));
            let listener = scope.spawn(|| listen(&ear, || done.load(Ordering::Relaxed)));
            let worked = work(segment.host(1));
            done.store(true, Ordering::Relaxed);
            worked?;
            orders.join().ok().context("the orders ended badly")??;
            let heard = listener.join().ok().context("the listener ended badly")??;
            Ok((heard, sleeper.join().ok().context("the sleeper ended badly")?))
        })?;
        drop(hogs);
        let stress = Lateness::of(&heard, &segment)?;
        println!("  {}:", self.name);
        println!("    quiet   {quiet}");
        println!("    stress  {stress}; {} orders", count.into_inner());
        println!(
            "    a bare thread that slept for 100 ms again and again meanwhile was up to {:.1} ms late",
            ms(bare)
        );
        ensure!(
            stress.takeovers == 0 || bare > HALTED,
            "{}: another host took over, and the machine is not to blame",
            self.name
        );
        Ok(())
    }

    /// Three that elect, with everything bound by the first.
    fn start<'a>(&self, segment: &'a Segment) -> Result<Vec<Vrrp<'a>>> {
        let mut all = Vec::new();
        for (number, priority) in (1..).zip(PRIORITIES) {
            let vrrp = Vrrp::start(segment.host(number), number)?;
            let (routers, lan) = self.order(segment, priority, 0)?;
            vrrp.elect_all(routers, lan)?;
            all.push(vrrp);
            let owner: &Vrrp<'_> = &all[0];
            command::until("the owner to have all addresses", PATIENCE, || {
                let bound: usize = owner.report().routers.iter().map(|router| router.bound.len()).sum();
                Ok((bound == usize::from(self.routers) * self.vips as usize).then_some(()))
            })?;
        }
        Ok(all)
    }

    /// Orders to all of them, again and again until it is over; counts them.
    fn order_again(
        &self,
        segment: &Segment,
        all: &[Vrrp<'_>],
        done: &AtomicBool,
        count: &AtomicUsize,
    ) -> Result<()> {
        for turn in 1.. {
            let next = Instant::now() + self.every;
            for (vrrp, priority) in all.iter().zip(PRIORITIES) {
                let (routers, lan) = self.order(segment, priority, turn)?;
                vrrp.elect_all(routers, lan)?;
            }
            count.fetch_add(1, Ordering::Relaxed);
            while Instant::now() < next {
                thread::sleep(Duration::from_millis(10));
                if done.load(Ordering::Relaxed) {
                    return Ok(());
                }
            }
        }
        Ok(())
    }

    /// What a node's agent says; turn by turn with other objects.
    fn order(&self, segment: &Segment, priority: u8, turn: u32) -> Result<(Vec<RouterConfig>, Lan)> {
        let addresses = if self.what == What::Addresses { turn % 2 } else { 0 };
        let first = u32::from(Ipv4Addr::new(10, 87, 16, 0)) + addresses * 2 * OBJECTS;
        let router = |index: u8| {
            let vips: Vec<IpAddr> = (0..self.vips)
                .map(|n| Ipv4Addr::from(first + u32::from(index) * self.vips + n).into())
                .collect();
            let id = RouterId { vrid: index + 1, ..config(1, &vips).id };
            RouterConfig { id, ..config(priority, &vips) }
        };
        let mut peers: Vec<Peer> = segment
            .hosts()
            .iter()
            .map(|host| Peer {
                node: format!("node-{}", host.number()),
                addresses: vec![host.address().into()],
                macs: Vec::new(),
            })
            .collect();
        if self.what == What::Peers {
            let base = u32::from(Ipv4Addr::new(10, 88, 0, 0)) + turn % 2 * 2 * OBJECTS;
            peers.extend((0..OBJECTS).map(|n| Peer {
                node: format!("worker-{}", base + n),
                addresses: vec![Ipv4Addr::from(base + n).into()],
                macs: Vec::new(),
            }));
        }
        Ok(((0..self.routers).map(router).collect(), Lan { peers: peers.into(), ..Lan::default() }))
    }
}

/// What comes in until it is over.
fn listen(ear: &Ear, over: impl Fn() -> bool) -> Result<Vec<Heard>> {
    let start = Instant::now();
    let mut heard = Vec::new();
    while !over() {
        let advert = ear.hear(Instant::now() + Duration::from_millis(200))?;
        // What came before is still queued.
        heard.extend(advert.filter(|advert| crate::adverts::age(advert.at) <= start.elapsed()));
    }
    Ok(heard)
}

/// How late the owner's adverts were, and those of others.
struct Lateness {
    adverts: usize,
    largest: Duration,
    /// Of a hundred, one is later.
    rare: Duration,
    takeovers: usize,
}

impl Lateness {
    fn of(heard: &[Heard], segment: &Segment) -> Result<Self> {
        let owner = segment.host(1).address();
        let interval = config(1, &[]).interval;
        let mut times: BTreeMap<u8, Vec<Duration>> = BTreeMap::new();
        // Whoever sends: the silence before another host takes over is part of it.
        for advert in heard.iter().filter(|advert| advert.priority > 0) {
            times.entry(advert.vrid).or_default().push(advert.at);
        }
        let gaps =
            times.values().flat_map(|times| times.windows(2).map(|pair| pair[1].saturating_sub(pair[0])));
        let mut late: Vec<Duration> = gaps.map(|gap| gap.saturating_sub(interval)).collect();
        late.sort_unstable();
        ensure!(!late.is_empty(), "no adverts were heard");
        Ok(Self {
            adverts: late.len(),
            largest: late[late.len() - 1],
            rare: late[(late.len() - 1) * 99 / 100],
            takeovers: heard.iter().filter(|advert| advert.source != owner && advert.priority > 0).count(),
        })
    }
}

impl std::fmt::Display for Lateness {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { adverts, largest, rare, takeovers } = self;
        write!(
            f,
            "largest {:5.1} ms, 99 % below {:5.1} ms, of {adverts:5} adverts; {takeovers} of another host",
            ms(*largest),
            ms(*rare)
        )
    }
}

/// How late the machine wakes a thread that does nothing else: the baseline.
fn oversleep(done: &AtomicBool) -> Duration {
    let interval = config(1, &[]).interval;
    let mut largest = Duration::ZERO;
    while !done.load(Ordering::Relaxed) {
        let start = Instant::now();
        thread::sleep(interval);
        largest = largest.max(start.elapsed().saturating_sub(interval));
    }
    largest
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// A busy process for each core.
struct Hogs(Vec<Child>);

impl Hogs {
    fn start() -> Result<Self> {
        let mut this = Self(Vec::new());
        for _ in 0..thread::available_parallelism()?.get() {
            // It ends by itself, should nobody be left to end it.
            let limit = ABANDONED.as_secs().to_string();
            this.0.push(command::spawn(Command::new("timeout").args([
                limit.as_str(),
                "sh",
                "-c",
                "while :; do :; done",
            ]))?);
        }
        Ok(this)
    }
}

impl Drop for Hogs {
    fn drop(&mut self) {
        for hog in &mut self.0 {
            // `timeout` passes it on to the shell.
            let _ = command::words(&["kill", &hog.id().to_string()]);
            let _ = hog.wait();
        }
    }
}
