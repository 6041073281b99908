//! The cluster tier: what needs a control plane and three real nodes. It runs against the lab that `LAB` names.

#[path = "cluster/lab.rs"]
mod lab_itself;
