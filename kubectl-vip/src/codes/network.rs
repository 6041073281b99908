//! VIP4nn: the LAN.

use super::{Code, Group, Severity, codes};

codes! {
    DEAF = "VIP401" Error Network "a node does not hear the advertisements of another" {
        cause: "A firewall on the way drops protocol 112 or the multicast group (224.0.0.18, ff02::12), a switch filters multicast, or \
                the two are not on the same LAN though their subnets say so.",
        consequence: "The node believes that there is no owner and takes the address too.",
        remedies: [
            "on both nodes: `nft list ruleset` and `iptables -S INPUT`; let protocol 112 in",
            "on the node: `tcpdump -ni INTERFACE proto 112` shows what arrives",
            "if the LAN drops multicast: `kubectl vip install --unicast`, or a querier for IGMP snooping on the switch",
        ],
    }
    FOREIGN_ROUTER = "VIP402" Error Network "a router of others has one of our virtual routers" {
        cause: "keepalived or a router of the LAN speaks VRRP with an identifier that a virtual IP of ours has.",
        consequence: "Our agents do not obey it, but switches learn the same virtual MAC address in two places, and the other router may \
                      give way to us or fight.",
        remedies: [
            "give the pool others: `kubectl vip pool set POOL --virtual-routers FIRST-LAST`, then expose the Services again",
            "or change the identifier (virtual_router_id) of the other router",
        ],
    }
    AUTODETECTION = "VIP403" Warning Network "Calico may take a virtual IP for the address of a node" {
        cause: "calico-node finds the address of its node by `first-found`, which is also its default: the first address of the first \
                interface, and a virtual IP may be that one when the pod starts.",
        consequence: "Routes and tunnels to that node lead to the virtual IP, and break when it moves.",
        remedies: [
            "`kubectl set env daemonset/calico-node -n NAMESPACE IP_AUTODETECTION_METHOD=kubernetes-internal-ip`",
            "with the operator: nodeAddressAutodetectionV4: {kubernetes: NodeInternalIP} of the Installation",
        ],
    }
    MTU = "VIP404" Warning Network "nodes of one LAN have different MTUs" {
        cause: "Interfaces in the subnet of a virtual IP take packets of different sizes: jumbo frames are set on some nodes and not on others.",
        consequence: "Small packets pass and large ones may not. With some owners connections stall as soon as they carry much, with others they \
                      do not.",
        remedies: [
            "set one MTU on all of them, not larger than the switch takes: `ip link set INTERFACE mtu 1500`, and in the node's configuration",
            "on a node: `ping -M do -s SIZE CLIENT` finds out what passes",
        ],
    }
}
