//! The plugin beside kubectl itself, with hundreds of virtual IPs.

use std::{
    fmt::Write as _,
    time::{Duration, Instant},
};

use anyhow::Result;
use lab::{Lab, Output, Parts, product};

const VIPS: u32 = 500;
const NAMESPACE: &str = "bench";
const RUNS: usize = 10;

/// Measures in a lab of its own, without nodes.
pub fn measure() -> Result<()> {
    product::in_lab("bench", Parts::Api, within)
}

fn within(lab: &Lab) -> Result<()> {
    lab.kubectl(["vip", "install", "--wait=false", "--pool", "lab=10.98.0.0/22"])?.ok()?;
    let mut manifest = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {NAMESPACE}}}\n");
    for n in 0..VIPS {
        let address = format!("10.98.{}.{}", n / 250, n % 250 + 1);
        write!(
            manifest,
            "---
apiVersion: v1
kind: Service
metadata: {{name: web-{n}, namespace: {NAMESPACE}}}
spec:
  selector: {{app: web}}
  ports:
  - {{port: 80}}
---
apiVersion: kubectl-vip.io/v1alpha1
kind: VirtualIP
metadata: {{name: {address}}}
spec:
  address: {address}
  virtualRouter: {}
  services:
  - {{namespace: {NAMESPACE}, name: web-{n}}}
",
            100 + n % 64
        )?;
    }
    lab.apply(&manifest)?;

    let theirs: &[&str] = &["get", "virtualips"];
    let ours: &[&str] = &["vip", "status", "-A"];
    let mut times: [Vec<Duration>; 2] = Default::default();
    for _ in 0..RUNS {
        for (words, times) in [theirs, ours].into_iter().zip(&mut times) {
            let clock = Instant::now();
            lab.kubectl(words)?.ok()?;
            times.push(clock.elapsed());
        }
    }
    let [theirs_took, ours_took] = times.map(|mut times| {
        times.sort_unstable();
        times[times.len() / 2].as_secs_f64() * 1000.0
    });
    println!("{VIPS} virtual IPs, median of {RUNS} runs in turns:");
    println!(
        "  kubectl vip status -A {ours_took:.0} ms, {} requests; kubectl get virtualips {theirs_took:.0} ms, {} requests; ratio {:.2}",
        requests(lab, ours)?,
        requests(lab, theirs)?,
        ours_took / theirs_took
    );
    lab.kubectl(["create", "service", "clusterip", "one", "--tcp=80", "-n", NAMESPACE])?.ok()?;
    let expose = ["vip", "expose", "svc/one", "-n", NAMESPACE, "--wait=false"];
    println!("  kubectl vip expose svc/one {} requests", requests(lab, &expose)?);
    Ok(())
}

/// How often a command asks the API server, by its own account.
fn requests(lab: &Lab, words: &[&str]) -> Result<usize> {
    let told = lab.kubectl(words.iter().copied().chain(["-v=6"])).and_then(Output::ok)?.stderr;
    Ok(told
        .lines()
        .filter(|line| {
            line.contains(" 200 OK") || line.contains(" 201 Created") || line.contains("status=\"20")
        })
        .count())
}
