//! The decisions of kubectl-vip: what the objects mean, who owns an address, what the kernel should hold.
//!
//! Nothing here reads a clock, opens a socket or talks to an API server. Time and the state of the world come in
//! as arguments, decisions go out as values, so that all of it runs in a unit test.

pub mod api;
pub mod checks;
pub mod desired;
pub mod plan;
pub mod pool;
pub mod validate;
pub mod vrrp;
