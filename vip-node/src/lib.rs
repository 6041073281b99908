//! What runs on a node: `vip-node vrrp` elects and binds, `vip-node agent` watches the API and programs the kernel.

pub mod agent;
pub mod args;
pub mod dataplane;
pub mod link;
pub mod log;
pub mod vrrp;
