//! VIP3nn: the Services behind the addresses.

use super::{Code, Group, Severity, codes};

codes! {
    NO_ENDPOINTS = "VIP301" Warning Objects "a Service has no ready endpoint" {
        cause: "No pod matches the Service's selector, or none of them is ready, or the address is of a family that the pods do not have.",
        consequence: "Connections to the virtual IP are refused.",
        remedies: [
            "`kubectl get endpointslices -n NAMESPACE -l kubernetes.io/service-name=SERVICE`",
            "`kubectl get pods -n NAMESPACE -l SELECTOR`, and `kubectl describe pod` on those that are not ready",
        ],
    }
    GONE = "VIP302" Error Objects "a virtual IP leads to a Service that does not exist" {
        cause: "The Service was deleted and the virtual IP was left.",
        consequence: "The address stays taken and answers nothing.",
        remedies: ["`kubectl vip unexpose ADDRESS`, or create the Service again: it is served at once"],
    }
    UNSUPPORTED = "VIP303" Error Objects "a Service is of a kind that no address can serve" {
        cause: "It is an ExternalName, has no ports, or has a port of a protocol that is not served.",
        consequence: "The virtual IP leads nowhere, or lacks that port.",
        remedies: ["`kubectl get service -n NAMESPACE SERVICE -o yaml`: give it a selector and ports"],
    }
    PORT_CLASH = "VIP304" Error Objects "two Services at one address want the same port" {
        cause: "Services share a virtual IP, and a port was added to one of them that the other has.",
        consequence: "The first one named in the virtual IP has the port; the other is not served there.",
        remedies: [
            "change the port of one Service",
            "or give it an address of its own: `kubectl vip unexpose svc/NAME`, then `kubectl vip expose svc/NAME`",
        ],
    }
    FOREIGN_ENTRY = "VIP305" Error Objects "another program has an IPVS service at our address and port" {
        cause: "keepalived, kube-proxy in IPVS mode or a person with ipvsadm made it.",
        consequence: "It is left alone, and traffic goes where it says.",
        remedies: [
            "on the node: `ipvsadm -Ln` shows it, `ipvsadm -D -t ADDRESS:PORT` removes it once its maker is gone",
        ],
    }
    MALFORMED = "VIP306" Error Objects "a virtual IP breaks a rule that admission should have caught" {
        cause: "It was written past the admission policies, or while they were missing.",
        consequence: "The agents leave it alone; all others are served.",
        remedies: [
            "`kubectl get virtualip NAME -o yaml`; delete it and expose the Service again",
            "`kubectl vip install` brings missing policies back",
        ],
    }
    POLICY = "VIP307" Warning Objects "a NetworkPolicy may keep the traffic of a virtual IP out" {
        cause: "The pods of the Service are isolated by a NetworkPolicy that lets in only certain pods or namespaces. What comes by a \
                virtual IP has the address of the node that owns it.",
        consequence: "The network plugin may drop it: connections time out, though endpoints are ready.",
        remedies: ["add an ipBlock with the addresses of the nodes to the `from` of that NetworkPolicy"],
    }
    SCHEDULER = "VIP308" Warning Objects "a kernel lacks the scheduler of a virtual IP" {
        cause: "The virtual IP names an IPVS scheduler whose module, ip_vs_SCHEDULER, the owner's kernel does not have.",
        consequence: "The default scheduler is used instead; connections are spread in another way than was asked for.",
        remedies: [
            "on the nodes: `modprobe ip_vs_SCHEDULER`, or install the package that has it",
            "or name another one: `kubectl vip unexpose svc/NAME`, then `kubectl vip expose svc/NAME --scheduler SCHEDULER`",
        ],
    }
    FAILING = "VIP309" Warning Objects "no backend of a Service passes its check" {
        cause: "Pods that Kubernetes calls ready do not answer the checks that the virtual IP asks for, or not from its owner.",
        consequence: "All of them are kept, so clients are sent to backends that may not answer.",
        remedies: [
            "`kubectl describe virtualip ADDRESS` names what fails and how",
            "`kubectl logs` of those pods; correct the checks of the virtual IP if the pods are well",
        ],
    }
}
