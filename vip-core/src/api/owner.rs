//! What the owner of a virtual IP tells of it in depth: how it came there, and each backend.

use std::fmt;
use std::net::SocketAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::Time;
use schemars::JsonSchema;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Deserializer, Serialize};

use crate::checks::Verdict;
use crate::plan::Protocol;

/// Destinations that are told one by one: some hundred bytes each, in each object that has as many.
pub const MOST_DESTINATIONS: usize = 16;

/// One backend of one port, as IPVS has it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Destination {
    /// Transport of the port.
    pub protocol: Protocol,
    /// Port of the virtual IP.
    pub port: u16,
    /// Address and port of the backend.
    #[schemars(with = "String", length(max = 64))]
    pub to: SocketAddr,
    /// Share of the new connections; 0: it gets none and keeps what it has.
    pub weight: u32,
    /// Open connections. Counted now and then, and written when a quarter of them or more has changed.
    #[serde(default, skip_serializing_if = "is_none")]
    pub connections: u32,
    /// What the owner's own checks found; unset: they are switched off.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub check: Option<Verdict>,
}

/// How a virtual IP came to its owner.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Handover {
    /// The node that owned it before; unset: none did.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub from: Option<String>,
    /// The node that has owned it since.
    pub to: String,
    /// When.
    pub at: Time,
    /// Why, in one word.
    pub reason: HandoverReason,
}

/// Why a virtual IP came to its owner.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HandoverReason {
    /// No node had owned it before.
    First,
    /// Nobody owned it.
    Unowned,
    /// The owner was not heard any more.
    OwnerSilent,
    /// The owner gave it up by itself: it was stopped, or could not serve any more.
    OwnerLeft,
    /// The node of the owner was drained.
    Drained,
    /// The new owner is the preferred node.
    Moved,
    /// Both believed that they owned it, and the new owner has the higher priority.
    HigherPriority,
}

impl fmt::Display for Handover {
    /// As the end of a sentence about the virtual IP.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { from, to, reason, .. } = self;
        if let Some(from) = from {
            write!(f, "from {from} ")?;
        }
        write!(f, "to {to}: ")?;
        let owner = from.as_deref().unwrap_or("the owner");
        match reason {
            HandoverReason::First => f.write_str("no node had owned it before"),
            HandoverReason::Unowned => f.write_str("nobody owned it"),
            HandoverReason::OwnerSilent => write!(f, "{owner} was not heard any more"),
            HandoverReason::OwnerLeft => {
                write!(f, "{owner} gave it up (stopped, or it could not serve any more)")
            }
            HandoverReason::Drained => write!(f, "{owner} was drained"),
            HandoverReason::Moved => write!(f, "{to} is its preferred node"),
            HandoverReason::HigherPriority => {
                write!(f, "both believed that they owned it, and {to} has the higher priority")
            }
        }
    }
}

/// What a later version wrote may be in other words: no reason to refuse the whole object, which is served.
pub(super) fn leniently<'de, D: Deserializer<'de>, T: DeserializeOwned + Default>(
    deserializer: D,
) -> Result<T, D::Error> {
    let value = serde_json::Value::deserialize(deserializer)?;
    Ok(serde_json::from_value(value).unwrap_or_default())
}

/// Whether there is nothing to write.
#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde gives a reference")]
pub(super) fn is_none(count: &u32) -> bool {
    *count == 0
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use crate::api::VirtualIPStatus;

    #[test]
    fn words_of_a_later_version_do_no_harm() {
        let destination = json!({"protocol": "TCP", "port": 80, "to": "10.244.1.2:8080", "weight": 1});
        let status = |reason: &str, check: &str| -> VirtualIPStatus {
            let mut destination = destination.clone();
            destination["check"] = json!(check);
            let handover = json!({"to": "node-1", "at": "2026-01-01T00:00:00Z", "reason": reason});
            let status = json!({"node": "node-1", "lastHandover": handover, "destinations": [destination]});
            serde_json::from_value(status).unwrap()
        };
        let known = status("First", "Healthy");
        assert!(known.last_handover.is_some());
        assert_eq!(known.destinations.len(), 1);
        let later = status("Eclipse", "Lukewarm");
        assert_eq!((later.last_handover, later.destinations), (None, Vec::new()));
        assert_eq!(later.node.as_deref(), Some("node-1"));
    }
}
