//! VIP0nn: the cluster as a whole.

use super::{Code, Group, Severity, codes};

/// What an installation is refused for, and what may be left out of that.
pub static SKIPPABLE: [&Code; 4] = [&TOO_OLD, &KUBE_PROXY_IPVS, &POD_SECURITY, &ELSEWHERE];

codes! {
    TOO_OLD = "VIP001" Error Cluster "the API server is too old" {
        cause: "Kubernetes is older than 1.31. The rules that guard pools and virtual IPs are written for the API server itself, \
                and need its functions for IP addresses.",
        consequence: "The resource definitions are refused, so nothing can be installed.",
        remedies: ["upgrade the control plane to 1.31 or later"],
    }
    NOT_ALLOWED = "VIP002" Error Cluster "you lack a permission that install needs" {
        cause: "install applies resource definitions, admission policies, roles, a namespace and a DaemonSet by server-side apply. \
                The roles of your user do not allow all of that.",
        consequence: "install stops at the first object that is refused. What was applied before stays; running it again goes on.",
        remedies: [
            "ask for the role cluster-admin while you install: `kubectl create clusterrolebinding NAME --clusterrole=cluster-admin --user=USER`",
            "let somebody with that role apply the output of `kubectl vip install --dry-run=client -o yaml`",
        ],
    }
    KUBE_PROXY_IPVS = "VIP003" Error Cluster "kube-proxy runs in IPVS mode" {
        cause: "The ConfigMap kube-proxy in namespace kube-system says `mode: ipvs`, or the command line of kube-proxy does, or that of \
                k3s or RKE2 on a node, and excludeCIDRs lacks addresses of a pool.",
        consequence: "That mode owns all of the kernel's IPVS: it deletes the services of the virtual IPs whenever it looks. \
                      Traffic to them ends at the node.",
        remedies: [
            "use its nftables mode: `mode: nftables` in that ConfigMap, or `--proxy-mode=nftables`; then restart kube-proxy",
            "or keep its hands off: `ipvs: {excludeCIDRs: [...]}` or `--ipvs-exclude-cidrs` with the CIDRs of all pools",
        ],
    }
    POD_SECURITY = "VIP004" Error Cluster "the agents' namespace refuses their pods" {
        cause: "The label pod-security.kubernetes.io/enforce of the namespace is baseline or restricted. The agents use the network \
                of their node, which only `privileged` allows.",
        consequence: "The DaemonSet is there, but its pods are not created.",
        remedies: [
            "`kubectl label namespace NAMESPACE pod-security.kubernetes.io/enforce=privileged --overwrite`",
            "install into a namespace of its own, which install makes with the right label",
        ],
    }
    ELSEWHERE = "VIP005" Error Cluster "kubectl-vip is installed in another namespace already" {
        cause: "There is a DaemonSet vip-node in a namespace other than the one that was named.",
        consequence: "Two agents on a node would fight over its interfaces, IPVS and nftables; install refuses.",
        remedies: [
            "go on in that namespace: `--namespace NAMESPACE`",
            "or remove it first: `kubectl vip uninstall`",
        ],
    }
    AGENT_RIGHTS = "VIP006" Error Cluster "the agents lack a permission" {
        cause: "The ClusterRole kubectl-vip-agent or its binding was changed, or an older version of it is there.",
        consequence: "The agents do not see what they should serve, or cannot report it: status grows old, or Services are not found.",
        remedies: ["`kubectl vip install` applies the roles again; settings and pools stay as they are"],
    }
    INCOMPLETE = "VIP007" Error Cluster "a part of the installation is missing" {
        cause: "A definition, role, binding or admission policy was deleted, or an install was cut off.",
        consequence: "Without the admission policies the rules of pools and virtual IPs are not enforced; without roles the agents and \
                      users are refused.",
        remedies: ["`kubectl vip install` brings back what is missing; settings and pools stay as they are"],
    }
}
