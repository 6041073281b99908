//! VIP2nn: pools, and who owns which address.

use super::{Code, Group, Severity, codes};

codes! {
    UNOWNED = "VIP201" Error Objects "no node owns a virtual IP" {
        cause: "No agent can or may take it: none is on its LAN, labels keep them out, they are drained, or their kernels cannot serve it. \
                A new virtual IP has no owner for a moment.",
        consequence: "Nobody answers at the address.",
        remedies: [
            "`kubectl vip node list -o wide` shows interfaces and what is wrong with each node",
            "`kubectl vip check` names what keeps each node out",
        ],
    }
    OWNER_UNKNOWN = "VIP202" Error Objects "nobody knows who owns a virtual IP" {
        cause: "The last owner has been silent for more than 30 seconds and no other node has said that it took over.",
        consequence: "The address may be served by the silent node, or by nobody. No earlier good news is repeated.",
        remedies: [
            "find out why the owner is silent: `kubectl vip explain VIP102`",
            "`arping ADDRESS` from a machine of the LAN shows whether and from where it answers",
        ],
    }
    TWO_OWNERS = "VIP203" Error Network "two nodes own the same address" {
        cause: "They do not hear each other's advertisements: a firewall drops protocol 112 or the group 224.0.0.18, a switch filters \
                multicast (IGMP snooping without a querier), or a VLAN is cut in two.",
        consequence: "Clients reach one or the other; connections break when their caches change.",
        remedies: [
            "`kubectl vip check` shows who does not hear whom",
            "on the nodes: let protocol 112 in, such as `nft insert rule inet filter input ip protocol vrrp accept`",
            "if the LAN drops multicast: `kubectl vip install --unicast`",
        ],
    }
    REJECTED = "VIP204" Error Objects "a virtual IP is not allowed by any pool" {
        cause: "No pool holds the address, or its pool does not allow the namespace of the Service, or it is new and its virtual router is none \
                of its pool.",
        consequence: "No node binds it.",
        remedies: [
            "`kubectl vip pool list`, then add the address: `kubectl vip pool set POOL --add ADDRESS`",
            "or take it away and expose the Service again: `kubectl vip unexpose ADDRESS`",
        ],
    }
    POOLS = "VIP205" Error Objects "a pool is malformed, or two pools want the same" {
        cause: "Two pools hold the same address or the same virtual router, or a pool cannot be read. It was written past admission, or \
                before the admission policies were there.",
        consequence: "For an address in two pools the first by name counts. With a virtual router of two pools, addresses of both move \
                      together and may lack an owner.",
        remedies: [
            "`kubectl vip pool list -o wide` shows ranges and virtual routers",
            "`kubectl vip pool set POOL --exclude RANGE` or `--virtual-routers FIRST-LAST`",
        ],
    }
    NOT_SERVED = "VIP206" Error Objects "a virtual IP is not announced or not programmed" {
        cause: "The owner's kernel or network refused something; the message says what.",
        consequence: "The address does not answer, or some of its ports do not.",
        remedies: [
            "`kubectl describe virtualip ADDRESS` shows the conditions and Events",
            "`kubectl logs -n kubectl-vip POD` of the owner, both containers",
        ],
    }
    IN_USE = "VIP207" Error Network "another machine uses the address of a virtual IP" {
        cause: "Before the first use an owner asks on the LAN whether somebody has the address, and another machine answered. Or a node of the \
                cluster has the address itself: as its own, or because another program put it there.",
        consequence: "The address is not bound: that machine keeps it.",
        remedies: [
            "find the machine by its hardware address, which the message names, and give it another address",
            "or exclude the address from the pool: `kubectl vip pool set POOL --exclude ADDRESS`, and expose the Service again",
        ],
    }
    CLAIMED = "VIP208" Error Network "another machine claims the address of a virtual IP" {
        cause: "After it was bound, a machine that is none of ours announced the same address: a DHCP server whose range overlaps the pool, \
                a copied virtual machine, another load balancer.",
        consequence: "The owner defends the address by announcing it again; clients may reach the wrong machine for moments.",
        remedies: [
            "find the machine by its hardware address, which the message names",
            "take the pool's addresses out of the range of the DHCP server",
        ],
    }
    STRAY = "VIP209" Warning Objects "a virtual IP is not on the node it is pinned to" {
        cause: "The node of `kubectl vip move --to` is down, drained, silent or cannot serve the address.",
        consequence: "Another node serves the address; it goes back when the node is fit again.",
        remedies: [
            "`kubectl vip node list -o wide` shows what is wrong with the node",
            "`kubectl vip move ADDRESS --unpin` ends the wish",
        ],
    }
    FULL = "VIP210" Warning Objects "a pool has no free address" {
        cause: "All addresses of the pool are virtual IPs.",
        consequence: "The next `kubectl vip expose` that draws from it fails.",
        remedies: [
            "`kubectl vip pool set POOL --add RANGE`",
            "`kubectl vip status -A` shows what has them; `kubectl vip unexpose` gives one back",
        ],
    }
    FOREIGN_RANGE = "VIP211" Error Objects "a pool holds addresses that belong to something else" {
        cause: "The range of the pool holds the address of a node, or overlaps the network of the pods or of the Services.",
        consequence: "An agent refuses to bind an address of a node. One of the cluster's own networks is not reached from the LAN.",
        remedies: [
            "leave the address out: `kubectl vip pool set POOL --exclude ADDRESS`",
            "make another pool of addresses of the LAN that nobody else gives out, and delete this one",
        ],
    }
    UNBALANCED = "VIP212" Warning Objects "few nodes own most of the virtual IPs" {
        cause: "Virtual IPs stay where they are when a node comes back, so after failures and restarts they gather on some nodes.",
        consequence: "Those nodes carry more traffic than they need to, and their failure interrupts more.",
        remedies: ["`kubectl vip rebalance --dry-run`, then `kubectl vip rebalance`"],
    }
    STRAY_ROUTER = "VIP213" Warning Objects "a virtual IP has a virtual router that is none of its pool" {
        cause: "It was written by hand, or its pool got other virtual routers later.",
        consequence: "Another pool may give the same virtual router out: addresses of both then move together, and some may lack an owner. One \
                      that was never announced is not bound.",
        remedies: [
            "expose the Service again: `kubectl vip unexpose ADDRESS`, then `kubectl vip expose` with `--ip ADDRESS`",
            "or give the pool its virtual routers back: `kubectl vip pool set POOL --virtual-routers FIRST-LAST`",
        ],
    }
}
