//! The lab of kubectl-vip: a real three-node Kubernetes cluster on one machine, without a hypervisor or a registry.
//!
//! Everything of a lab lives in one network namespace, `vip-NAME`: the control plane (etcd, API server, controller
//! manager, scheduler) runs there natively, and a small virtual machine, whose kernel has IPVS, hangs on its bridge by
//! four taps: one for itself and one for each of the three nodes in it. Whoever is in that namespace is a host on the
//! nodes' LAN. Tests take hold of a running lab with [`cluster`] or [`api`] and use its handles:
//!
//! ```no_run
//! let lab = lab::cluster()?;
//! lab.kubectl(["get", "nodes"])?.ok()?;
//! lab.node(2).exec("ip address")?.ok()?;
//! lab.unplug(2)?;
//! println!("{}", lab.client().get("http://10.87.2.50/hostname")?.body);
//! # anyhow::Ok(())
//! ```
//!
//! Tests that need less use [`Segment`] (hosts joined by a bridge, on this machine's own kernel) or
//! [`netns::in_new_netns`] (one empty namespace for one closure).

mod agent;
pub mod arp;
pub mod binaries;
pub mod client;
pub mod command;
mod control_plane;
mod daemon;
pub mod demo;
mod exec;
pub mod guest;
pub mod image;
pub mod interrupt;
pub mod ipvs_ear;
pub mod keepalived;
pub mod kernel;
pub mod krew;
mod lab;
mod lan;
pub mod memory;
pub mod netns;
pub mod packets;
pub mod paths;
pub mod pictures;
mod pki;
pub mod product;
pub mod runner;
mod segment;
mod server;
pub mod setup;
mod store;
mod terminal;
mod vm;
pub mod workload;

pub use agent::{Agent, Moment};
pub use client::{Client, Crowd, Report, Requests, Response, Watch};
pub use command::Output;
pub use lab::{Lab, Node, Parts, VmHandle, api, cluster, down_all};
pub use segment::{Cutter, Host, Segment};
pub use server::Server;
pub use terminal::Terminal;
