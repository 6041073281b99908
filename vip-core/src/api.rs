//! The custom resources, group `kubectl-vip.io`, version `v1alpha1`, all cluster-scoped.
//!
//! These objects are the only state of the product. The rules that the API server can check are written here,
//! beside the fields they are about; `manifests/crd` is generated from this file.

#![allow(
    clippy::duplicated_attributes,
    reason = "each column has a type of its own, and several have the same"
)]

use std::net::IpAddr;

use k8s_openapi::apimachinery::pkg::apis::meta::v1::{Condition, Time};
use kube::{CustomResource, KubeSchema};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use self::rules::{LABEL_KEYS, NAMED_BY_ADDRESS, UNICAST, addresses_in_items, label_values};

mod owner;
mod rules;

pub use owner::{Destination, Handover, HandoverReason, MOST_DESTINATIONS};

/// The API group of every object of ours.
pub const GROUP: &str = "kubectl-vip.io";
/// Field manager of the plugin in server-side apply.
pub const PLUGIN_MANAGER: &str = "kubectl-vip";
/// Field manager and event source of the agent on a node.
pub const AGENT_MANAGER: &str = "vip-node";
/// Label that keeps a node from competing for addresses (set by kubeadm on control planes).
pub const EXCLUDE_LABEL: &str = "node.kubernetes.io/exclude-from-external-load-balancers";
/// Label of a VIPNode whose node gives its addresses away and takes none (set by `kubectl vip node drain`).
pub const DRAIN_LABEL: &str = "kubectl-vip.io/drain";
/// Namespace of the agents unless `install` is told another.
pub const DEFAULT_NAMESPACE: &str = "kubectl-vip";
/// Name of the DaemonSet, its ServiceAccount and its container image.
pub const DAEMONSET: &str = "vip-node";
/// An agent that has not renewed its VIPNode for this long is called silent (seconds).
pub const SILENT_AFTER_SECONDS: i64 = 30;
/// How often an agent renews its VIPNode (seconds).
pub const RENEW_SECONDS: u64 = 10;

/// A virtual IP: a reservation of one address of the LAN and the Services that answer there.
///
/// Its name is its address (IPv6: eight groups with `-` for `:`), so an address is given out once.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "kubectl-vip.io",
    version = "v1alpha1",
    kind = "VirtualIP",
    plural = "virtualips",
    shortname = "vip",
    category = "kubectl-vip",
    status = "VirtualIPStatus",
    derive = "PartialEq",
    doc = "A virtual IP address of the LAN and the Services that answer at it",
    printcolumn(name = "Namespace", type_ = "string", json_path = ".spec.services[0].namespace", description = "Namespace of the first Service"),
    printcolumn(name = "Service", type_ = "string", json_path = ".spec.services[0].name", description = "The first Service"),
    printcolumn(name = "Node", type_ = "string", json_path = ".status.node"),
    printcolumn(name = "Ready", type_ = "integer", json_path = ".status.backends.ready", description = "Backends that receive new connections"),
    printcolumn(name = "Total", type_ = "integer", json_path = ".status.backends.total", description = "Backends known"),
    printcolumn(name = "Announced", type_ = "string", json_path = ".status.conditions[?(@.type==\"Announced\")].status"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.conditions[?(@.type==\"Announced\")].reason"),
    printcolumn(name = "VRID", type_ = "integer", json_path = ".spec.virtualRouter", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp"),
    validation = Rule::new(NAMED_BY_ADDRESS)
        .message("the name of a VirtualIP is its address; for IPv6 all eight groups, joined by '-' instead of ':'")
        .field_path(".spec.address"),
)]
#[serde(rename_all = "camelCase")]
pub struct VirtualIPSpec {
    /// The address, in canonical form.
    #[schemars(length(max = 39))]
    #[x_kube(validation = Rule::new("isIP(self) && ip.isCanonical(self)").message("address must be one IP address in canonical form"))]
    #[x_kube(validation = Rule::new(UNICAST).message("address must be a unicast address of the LAN"))]
    #[x_kube(validation = Rule::new("self == oldSelf").message("address cannot change: delete the VirtualIP and create another"))]
    pub address: String,

    /// The Services that answer at this address, on different ports. None: a bare address, all ports of the owner open.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 8))]
    #[x_kube(merge_strategy = ListMerge::Map(vec!["namespace".into(), "name".into()]))]
    pub services: Vec<ServiceRef>,

    /// Virtual router identifier (VRID). Virtual IPs of one virtual router move together.
    #[schemars(range(min = 1, max = 255))]
    pub virtual_router: u8,

    /// The node that should own the address whenever it is fit. Unset: an owner keeps it for as long as it lives.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 253), pattern("^[a-z0-9]([-.a-z0-9]*[a-z0-9])?$"))]
    pub preferred_node: Option<String>,

    /// The IPVS scheduler that spreads connections over the backends.
    #[serde(default)]
    pub scheduler: Scheduler,

    /// Seconds for which a client stays with its backend; overrides the Service's session affinity.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(range(min = 1, max = 86400))]
    pub persistence_seconds: Option<u32>,

    /// How the owner finds out by itself that a backend is dead. Unset: a TCP connection every 5 seconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub health_check: Option<HealthCheck>,
}

/// The active check of each TCP backend, made by the owner of the address alone.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.timeoutSeconds <= self.intervalSeconds").message("timeoutSeconds (3 unless set) must not be longer than intervalSeconds"))]
pub struct HealthCheck {
    /// `TCP` connects to the backend's port; `None` goes by the readiness that Kubernetes tells, and by nothing else.
    #[serde(rename = "type", default)]
    pub type_: HealthCheckType,
    /// Seconds from one check of a backend to the next.
    #[schemars(range(min = 1, max = 300))]
    #[serde(default = "HealthCheck::interval")]
    pub interval_seconds: u32,
    /// Seconds after which a check without an answer has failed; at most the interval.
    #[schemars(range(min = 1, max = 60))]
    #[serde(default = "HealthCheck::timeout")]
    pub timeout_seconds: u32,
    /// Checks that fail in a row before a backend gets no more new connections.
    #[schemars(range(min = 1, max = 10))]
    #[serde(default = "HealthCheck::failures")]
    pub failure_threshold: u32,
    /// Checks that succeed in a row before it gets them again.
    #[schemars(range(min = 1, max = 10))]
    #[serde(default = "HealthCheck::successes")]
    pub success_threshold: u32,
}

impl HealthCheck {
    fn interval() -> u32 {
        5
    }

    fn timeout() -> u32 {
        3
    }

    fn failures() -> u32 {
        2
    }

    fn successes() -> u32 {
        1
    }
}

impl Default for HealthCheck {
    fn default() -> Self {
        Self {
            type_: HealthCheckType::default(),
            interval_seconds: Self::interval(),
            timeout_seconds: Self::timeout(),
            failure_threshold: Self::failures(),
            success_threshold: Self::successes(),
        }
    }
}

/// What a check does.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub enum HealthCheckType {
    /// Connects to the backend's port.
    #[default]
    #[serde(rename = "TCP")]
    Tcp,
    /// Nothing.
    None,
}

/// A Service, by namespace and name.
#[derive(Clone, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ServiceRef {
    /// Namespace of the Service.
    #[schemars(length(min = 1, max = 63), pattern("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub namespace: String,
    /// Name of the Service.
    #[schemars(length(min = 1, max = 63), pattern("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))]
    pub name: String,
}

impl std::fmt::Display for ServiceRef {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

/// The schedulers of the kernel's IPVS (`net/netfilter/ipvs/ip_vs_*.c`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "lowercase")]
#[allow(missing_docs, reason = "the names are the kernel's and explain themselves to those who choose one")]
pub enum Scheduler {
    Rr,
    Wrr,
    Lc,
    #[default]
    Wlc,
    Fo,
    Ovf,
    Lblc,
    Lblcr,
    Dh,
    Sh,
    Mh,
    Sed,
    Nq,
    Twos,
}

impl Scheduler {
    /// All of them.
    pub const ALL: [Self; 14] = [
        Self::Rr,
        Self::Wrr,
        Self::Lc,
        Self::Wlc,
        Self::Fo,
        Self::Ovf,
        Self::Lblc,
        Self::Lblcr,
        Self::Dh,
        Self::Sh,
        Self::Mh,
        Self::Sed,
        Self::Nq,
        Self::Twos,
    ];

    /// The kernel's name, as in `ipvsadm -s`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Rr => "rr",
            Self::Wrr => "wrr",
            Self::Lc => "lc",
            Self::Wlc => "wlc",
            Self::Fo => "fo",
            Self::Ovf => "ovf",
            Self::Lblc => "lblc",
            Self::Lblcr => "lblcr",
            Self::Dh => "dh",
            Self::Sh => "sh",
            Self::Mh => "mh",
            Self::Sed => "sed",
            Self::Nq => "nq",
            Self::Twos => "twos",
        }
    }
}

/// What the owner of a virtual IP says about it.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtualIPStatus {
    /// The node that owns the address and answers for it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Since when that node owns it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub since: Option<Time>,
    /// When a node announced it for the first time. Unset: an owner probes first whether another machine uses the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub first_announced: Option<Time>,
    /// How it came to the node that owned it last.
    #[serde(default, skip_serializing_if = "Option::is_none", deserialize_with = "owner::leniently")]
    pub last_handover: Option<Handover>,
    /// What IPVS sends to.
    #[serde(default)]
    pub backends: Backends,
    /// The same one by one, as the owner has it: at most 16, those first that something speaks against.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "owner::leniently")]
    #[schemars(length(max = 16))]
    pub destinations: Vec<Destination>,
    /// How many more there are.
    #[serde(default, skip_serializing_if = "owner::is_none")]
    pub more_destinations: u32,
    /// `Announced`, `Programmed` and `Conflict`; reasons are words of `Reason`.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(extend("x-kubernetes-list-type" = "map", "x-kubernetes-list-map-keys" = ["type"]))]
    pub conditions: Vec<Condition>,
}

/// How many backends there are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct Backends {
    /// Those that get new connections (weight above 0).
    pub ready: u32,
    /// All that IPVS knows or could know.
    pub total: u32,
}

/// Condition: the owner has bound the address and announced it on the LAN.
pub const CONDITION_ANNOUNCED: &str = "Announced";
/// Condition: the owner's kernel sends the address's traffic to the backends.
pub const CONDITION_PROGRAMMED: &str = "Programmed";
/// Condition: another machine of the LAN uses the address, or claims it.
pub const CONDITION_CONFLICT: &str = "Conflict";

/// The reason of a condition or of a node's trouble: one word for a program, the message beside it for a person.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize, JsonSchema)]
pub enum Reason {
    /// The address is bound, announced and served.
    Active,
    /// All of the Service is in the kernel.
    Programmed,
    /// A bare address: nothing to program.
    NoServices,
    /// The Service does not exist.
    ServiceNotFound,
    /// The Service has no ready endpoint.
    NoEndpoints,
    /// The Service sends clients to pods of the owner only (`externalTrafficPolicy: Local`), and the node has none that is
    /// ready.
    NoLocalEndpoint,
    /// No backend of a Service passes its check: all of them are kept.
    BackendsFailing,
    /// The Service has no ports, or is of a kind that no address can serve.
    ServiceNotSupported,
    /// Two Services of one address want the same port.
    PortClash,
    /// Another program has an IPVS service at our address and port.
    ForeignEntry,
    /// No pool holds the address, or its pool does not allow the namespace.
    Rejected,
    /// The object breaks a rule that admission should have caught.
    Invalid,
    /// Two pools hold the address: the first by name counts.
    PoolsOverlap,
    /// No node can take part in the election.
    NoCandidate,
    /// No interface of the node is in the address's subnet.
    NoInterface,
    /// The node's labels keep it out.
    NodeExcluded,
    /// The node is drained: it takes no address.
    NodeDrained,
    /// Another machine of the LAN uses the address: it is not bound.
    AddressInUse,
    /// Another machine of the LAN claims an address that is bound here: it is defended.
    AddressClaimed,
    /// Another node of ours believes that it owns the address too.
    TwoOwners,
    /// Nobody else uses the address.
    NoConflict,
    /// The kernel has no IPVS.
    IPVSUnavailable,
    /// The kernel refused a change to IPVS or nftables.
    KernelRefused,
    /// The kernel lacks the scheduler that the object names: the default one is used meanwhile.
    SchedulerUnavailable,
    /// The process lacks a capability.
    NotPermitted,
    /// A sysctl could not be set.
    SysctlNotSet,
    /// The process that elects and binds does not answer.
    VrrpUnavailable,
    /// The agent has just started.
    Starting,
    /// The dataplane is as it should be.
    Ready,
}

impl std::fmt::Display for Reason {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The variants are the words of conditions.
        write!(f, "{self:?}")
    }
}

/// Addresses of the LAN that may be given out, and to whom.
#[derive(CustomResource, KubeSchema, Clone, Debug, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "kubectl-vip.io",
    version = "v1alpha1",
    kind = "VIPPool",
    plural = "vippools",
    shortname = "vippool",
    category = "kubectl-vip",
    status = "VIPPoolStatus",
    derive = "PartialEq",
    doc = "A pool of addresses of the LAN from which virtual IPs are drawn",
    printcolumn(name = "Addresses", type_ = "string", json_path = ".spec.addresses"),
    printcolumn(name = "Total", type_ = "integer", json_path = ".status.total"),
    printcolumn(name = "Allocated", type_ = "integer", json_path = ".status.allocated"),
    printcolumn(name = "Available", type_ = "integer", json_path = ".status.available"),
    printcolumn(name = "Auto", type_ = "boolean", json_path = ".spec.autoAssign", priority = "1"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
#[serde(rename_all = "camelCase")]
pub struct VIPPoolSpec {
    /// CIDRs, ranges `first-last` and single addresses. Of an IPv4 CIDR the network and broadcast addresses are left out.
    #[schemars(length(min = 1, max = 32), inner(length(max = 79)), transform = addresses_in_items)]
    pub addresses: Vec<String>,

    /// Addresses of the pool that are not given out, in the same forms.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(length(max = 32), inner(length(max = 79)), transform = addresses_in_items)]
    pub exclude: Vec<String>,

    /// Whether `expose` may draw from this pool without naming it.
    #[serde(default = "yes")]
    pub auto_assign: bool,

    /// Namespaces whose Services may draw from this pool; none named: all.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[schemars(
        length(max = 64),
        inner(length(min = 1, max = 63), pattern("^[a-z0-9]([-a-z0-9]*[a-z0-9])?$"))
    )]
    pub namespaces: Vec<String>,

    /// The virtual router identifiers that this pool may use on the LAN.
    pub virtual_routers: VirtualRouterRange,

    /// Labels that a node must have to compete for the addresses of this pool.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    #[schemars(extend("maxProperties" = 8), transform = label_values)]
    #[x_kube(validation = Rule::new(LABEL_KEYS).message("each key must be the key of a label"))]
    pub node_selector: std::collections::BTreeMap<String, String>,

    /// The only interface on which the addresses may be bound; none named: the one whose subnet holds the address.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[schemars(length(min = 1, max = 15), pattern("^[^/:\\s]+$"))]
    pub interface: Option<String>,
}

fn yes() -> bool {
    true
}

/// A run of virtual router identifiers: `first`, `first + 1`, ..., `count` of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, KubeSchema)]
#[serde(rename_all = "camelCase")]
#[x_kube(validation = Rule::new("self.first + self.count <= 256").message("virtual router identifiers end at 255: first + count must be at most 256"))]
pub struct VirtualRouterRange {
    /// The first identifier.
    #[schemars(range(min = 1, max = 255))]
    pub first: u8,
    /// How many.
    #[schemars(range(min = 1, max = 255))]
    pub count: u8,
}

impl VirtualRouterRange {
    /// All identifiers of the range, those beyond 255 left out.
    pub fn iter(self) -> impl Iterator<Item = u8> {
        (u16::from(self.first)..u16::from(self.first) + u16::from(self.count))
            .filter_map(|v| u8::try_from(v).ok())
    }
}

/// How full a pool is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VIPPoolStatus {
    /// Addresses that may be given out.
    pub total: u64,
    /// Addresses that are given out.
    pub allocated: u64,
    /// Addresses that are left.
    pub available: u64,
}

/// One node as its own agent sees it; written by that agent alone.
#[derive(CustomResource, KubeSchema, Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[kube(
    group = "kubectl-vip.io",
    version = "v1alpha1",
    kind = "VIPNode",
    plural = "vipnodes",
    shortname = "vipnode",
    category = "kubectl-vip",
    status = "VIPNodeStatus",
    no_spec,
    derive = "PartialEq",
    doc = "A node as the agent that runs there sees it; written by that agent alone",
    printcolumn(name = "Ready", type_ = "boolean", json_path = ".status.dataplane.ready"),
    printcolumn(name = "Reason", type_ = "string", json_path = ".status.dataplane.reason"),
    printcolumn(name = "Version", type_ = "string", json_path = ".status.agentVersion"),
    printcolumn(name = "Renewed", type_ = "date", json_path = ".status.renewTime"),
    printcolumn(name = "Age", type_ = "date", json_path = ".metadata.creationTimestamp")
)]
pub struct VIPNodeSpec {}

/// What an agent knows of its node.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VIPNodeStatus {
    /// When this was written; older than 30 seconds means that nothing here is known to hold.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub renew_time: Option<Time>,
    /// Version of the agent.
    #[serde(default)]
    pub agent_version: String,
    /// Interfaces that could carry a virtual IP.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<InterfaceStatus>,
    /// The virtual routers that the node takes part in.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub virtual_routers: Vec<VirtualRouterStatus>,
    /// Senders of accepted advertisements, lately heard.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub peers: Vec<PeerStatus>,
    /// Virtual routers of others on the same LAN, lately heard: their identifiers are not for us.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub foreign_routers: Vec<ForeignRouterStatus>,
    /// Advertisements that were refused since vrrp started, by reason.
    #[serde(default, skip_serializing_if = "std::collections::BTreeMap::is_empty")]
    pub refused: std::collections::BTreeMap<String, u64>,
    /// Whether the node can serve.
    #[serde(default)]
    pub dataplane: DataplaneStatus,
    /// Chains of the node's own firewall that drop what no rule of theirs accepts, such as `inet filter input`.
    #[serde(default, skip_serializing_if = "std::collections::BTreeSet::is_empty")]
    pub firewalls: std::collections::BTreeSet<String>,
}

/// An interface of a node.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct InterfaceStatus {
    /// Name, such as `eth0`.
    pub name: String,
    /// Hardware address, such as `52:54:00:00:00:01`.
    pub mac: String,
    /// Addresses with prefix lengths, virtual IPs left out.
    pub addresses: Vec<String>,
    /// Whether the link has a carrier.
    pub carrier: bool,
    /// The largest packet that the link takes, in bytes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mtu: Option<u32>,
}

/// A virtual router on a node.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct VirtualRouterStatus {
    /// Interface of the election.
    pub interface: String,
    /// Address family: 4 or 6.
    pub family: u8,
    /// Virtual router identifier (VRID).
    pub virtual_router: u8,
    /// State of the election here.
    pub state: VrrpState,
    /// Priority with which this node competes.
    pub priority: u8,
    /// Since when it is in this state.
    pub since: Time,
}

/// The states of RFC 9568 section 6.4 (there: Initialize, Backup, Active).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[allow(missing_docs, reason = "the names are the protocol's")]
pub enum VrrpState {
    Init,
    Backup,
    Master,
}

/// A router that is none of ours.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct ForeignRouterStatus {
    /// Its address.
    pub address: String,
    /// Interface it was heard on.
    pub interface: String,
    /// Address family: 4 or 6.
    pub family: u8,
    /// Virtual router it speaks for.
    pub virtual_router: u8,
    /// Priority of its last advertisement.
    pub priority: u8,
}

/// A sender of advertisements.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct PeerStatus {
    /// The node whose agent it is, where that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub node: Option<String>,
    /// Its address.
    pub address: String,
    /// Interface it was heard on.
    pub interface: String,
    /// Virtual router it spoke for.
    pub virtual_router: u8,
    /// Priority of its last advertisement.
    pub priority: u8,
}

/// Whether a node's kernel can serve virtual IPs, and if not, why.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
#[serde(rename_all = "camelCase")]
pub struct DataplaneStatus {
    /// All that is wanted is in the kernel.
    pub ready: bool,
    /// One word of `Reason`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub reason: Option<Reason>,
    /// What is wrong and what to do, one sentence.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub message: Option<String>,
}

/// The name of the VirtualIP for an address: the address itself, IPv6 as eight groups joined by `-`.
pub fn name_of(address: IpAddr) -> String {
    match address {
        IpAddr::V4(a) => a.to_string(),
        IpAddr::V6(a) => a.segments().map(|group| format!("{group:x}")).join("-"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_valid_for_kubernetes() {
        assert_eq!(name_of("10.87.2.50".parse().unwrap()), "10.87.2.50");
        assert_eq!(name_of("fd87::2:50".parse().unwrap()), "fd87-0-0-0-0-0-2-50");
    }
}
