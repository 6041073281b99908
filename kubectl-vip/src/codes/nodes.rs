//! VIP1nn: agents and their nodes.

use super::{Code, Group, Severity, codes};

codes! {
    AGENTS = "VIP101" Error Nodes "agents are missing or not ready" {
        cause: "kubectl-vip is not installed, no node matches the DaemonSet, or pods of it do not start: an image that cannot be pulled, \
                a taint, a namespace that refuses them.",
        consequence: "Nodes without an agent own no virtual IP. Without any agent nothing elects and serves.",
        remedies: [
            "`kubectl vip install`, if it is not installed",
            "`kubectl get pods -n kubectl-vip -o wide` and `kubectl describe pod` on those that are not ready",
        ],
    }
    SILENT = "VIP102" Error Nodes "an agent is silent" {
        cause: "The agent has not renewed its VIPNode for more than 30 seconds: the node is down or cut off, the agent does not run, the \
                API server does not answer it, or the node's clock is behind.",
        consequence: "Nothing that it wrote is known to hold. If the node is dead, others have taken its addresses; if only the API is \
                      out of its reach, it goes on serving.",
        remedies: [
            "`kubectl get node NODE` and `kubectl get pods -n kubectl-vip -o wide --field-selector spec.nodeName=NODE`",
            "`kubectl logs` of both containers of that pod, with --previous",
            "`kubectl delete vipnode NODE`, if the node is gone for good",
        ],
    }
    KERNEL_REFUSED = "VIP103" Error Nodes "a node's kernel refuses what it should serve" {
        cause: "The kernel refused an IPVS service or an nftables rule; the message names it. Often a module is missing, such as that of a \
                scheduler, or nf_tables.",
        consequence: "The node leaves virtual IPs that it cannot serve to others.",
        remedies: [
            "`kubectl describe vipnode NODE` shows the kernel's answer",
            "on the node: `modprobe ip_vs_SCHEDULER nf_tables nft_masq`",
        ],
    }
    NO_IPVS = "VIP104" Error Nodes "a node's kernel has no IPVS" {
        cause: "The module ip_vs is not loaded and could not be loaded, or the kernel was built without it.",
        consequence: "The node owns no virtual IP that leads to a Service.",
        remedies: [
            "on the node: `modprobe ip_vs`, and `echo ip_vs > /etc/modules-load.d/kubectl-vip.conf` for the next boot",
            "some distributions ship it in a package of its own, such as linux-modules-extra or kernel-modules",
        ],
    }
    SYSCTL = "VIP105" Error Nodes "a sysctl is not as it must be" {
        cause: "A sysctl that serving needs is off and could not be set, such as net.ipv4.ip_forward or net.ipv6.conf.all.forwarding. \
                /proc/sys may be read-only for the agent, or another program sets it back.",
        consequence: "The kernel would not forward what arrives for a virtual IP, so the node leaves such addresses to others.",
        remedies: [
            "`kubectl describe vipnode NODE` names it; set it on the node in a file of /etc/sysctl.d",
            "look for other programs that set it: `grep -r forward /etc/sysctl.d /usr/lib/sysctl.d`",
        ],
    }
    NO_VRRP = "VIP106" Error Nodes "the process that elects does not answer" {
        cause: "The container vrrp of the agent's pod does not run, starts again and again, or hangs.",
        consequence: "The node takes part in no election and owns no virtual IP.",
        remedies: ["`kubectl logs -n kubectl-vip POD -c vrrp`, with --previous"],
    }
    CAPABILITY = "VIP107" Error Nodes "the agent lacks a capability" {
        cause: "NET_ADMIN, NET_RAW or another capability of the DaemonSet was removed, by an edit or by a policy of the cluster.",
        consequence: "The node can bind no address or change no IPVS.",
        remedies: [
            "`kubectl vip install` applies the DaemonSet again, with its settings",
            "let policy engines pass the namespace of the agents",
        ],
    }
    SKEW = "VIP108" Warning Nodes "agents are of another version than this plugin" {
        cause: "The plugin was updated and the agents were not, or the other way round, or a rollout has stopped half way.",
        consequence: "Commands that change something refuse when the two are more than one minor version apart; reading works.",
        remedies: [
            "`kubectl vip version` shows all versions",
            "`kubectl vip upgrade` brings the agents to the version of the plugin",
        ],
    }
    EXCLUDED = "VIP109" Warning Nodes "a label keeps a node from owning addresses" {
        cause: "The node has the label node.kubernetes.io/exclude-from-external-load-balancers, and is not of the control plane, to which \
                kubeadm gives it.",
        consequence: "The node's agent takes part in no election.",
        remedies: ["`kubectl label node NODE node.kubernetes.io/exclude-from-external-load-balancers-`"],
    }
    DRAINED = "VIP110" Warning Nodes "a node is drained" {
        cause: "`kubectl vip node drain` was used on it.",
        consequence: "It gives its addresses away and takes none, also when it is the last one.",
        remedies: ["`kubectl vip node undrain NODE`, when the work on it is done"],
    }
    CLOCK = "VIP111" Warning Nodes "a node's clock is wrong" {
        cause: "The times that the agent writes differ from those of the API server by more than 10 seconds.",
        consequence: "Ages and times of handovers are wrong, and the agent is called silent too late or too soon. Elections do not use the \
                      clock.",
        remedies: ["on the node: `timedatectl`, and look at chrony or systemd-timesyncd"],
    }
    NO_INTERFACE = "VIP112" Warning Nodes "a node has no interface for the addresses of a pool" {
        cause: "No interface of the node that is up has an address in the subnet of the pool, or the pool names an interface that the node \
                does not have there.",
        consequence: "The node cannot own addresses of that pool; others can.",
        remedies: [
            "`kubectl vip node list -o wide` shows the interfaces",
            "if the node is not on that LAN: keep it out with a nodeSelector of the pool",
            "give the interface an address of the subnet, or correct `interface` of the pool",
        ],
    }
    NO_CANDIDATE = "VIP113" Error Nodes "no node can own the addresses of a pool" {
        cause: "Each node is in the way of its own: no interface in the subnet, excluded by labels, drained or silent. Often the pool's \
                range is not of the LAN.",
        consequence: "Virtual IPs of that pool have no owner.",
        remedies: [
            "compare the range with the LAN: `kubectl vip pool list` and `kubectl vip node list -o wide`",
            "look at nodeSelector and interface of the pool: `kubectl get vippool POOL -o yaml`",
        ],
    }
    FIREWALL = "VIP114" Warning Nodes "a node's firewall drops by default" {
        cause: "A chain of the node's own firewall drops or rejects what no rule of it accepts, on what the node receives or what passes \
                through it. IPVS takes packets behind it.",
        consequence: "While no rule accepts them, clients of virtual IPs that the node owns wait in vain. Whether one does cannot be seen \
                      from here; elections are not concerned.",
        remedies: [
            "on the node: `nft add rule inet filter input ip daddr POOL accept`, and `ip6 daddr` for IPv6, in the chain that is named",
            "on the node, where what passes through is dropped too: `nft add rule inet filter forward ct state established,related accept`",
            "firewalld: `firewall-cmd --permanent --zone=ZONE --add-rich-rule='rule family=ipv4 destination address=POOL accept'`",
        ],
    }
}
