//! Every kind of Service behind a virtual IP, one row each: asked by clients, and looked up in the kernels of all nodes.

use std::{
    collections::{BTreeMap, BTreeSet},
    net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr},
    sync::{Mutex, PoisonError},
    time::Duration,
};

use anyhow::{Context, Result, bail, ensure};
use lab::{Lab, command, image::AGNHOST, product};
use serde_json::Value;

use super::{SOON, check, installed, traffic::ask_from_pod};

/// The namespace of these Services and their pods.
const KINDS: &str = "kinds";
/// Requests until each of two pods has answered, but for once in a thousand times.
const TRIES: usize = 12;

/// Pods `a` on node-1, `b` on node-2, `host` in the network of node-3 and `never`, which never becomes ready, there too.
/// Their ports have the same names and other numbers.
fn pods() -> String {
    let pod = |name: &str, node: u8, base: u16, labels: &str, more: &str| {
        format!(
            "apiVersion: v1
kind: Pod
metadata: {{name: {name}, namespace: {KINDS}, labels: {{app: {name}{labels}}}}}
spec:
  nodeName: node-{node}
  terminationGracePeriodSeconds: 2
  {more}
  containers:
  - name: web
    image: {AGNHOST}
    imagePullPolicy: Never
    args: [netexec, --http-port={base}, --udp-port={udp}, --sctp-port={sctp}]
    ports: [{{name: http, containerPort: {base}}}, {{name: udp, containerPort: {udp}, protocol: UDP}},
            {{name: sctp, containerPort: {sctp}, protocol: SCTP}}]
    readinessProbe: {{httpGet: {{path: /{path}, port: http}}, periodSeconds: 2}}
---
",
            udp = base + 1,
            sctp = base + 2,
            path = if name == "never" { "nothing" } else { "healthz" },
        )
    };
    let namespace = format!("apiVersion: v1\nkind: Namespace\nmetadata: {{name: {KINDS}}}\n---\n");
    namespace
        + &pod("a", 1, 8080, ", tier: both", "")
        + &pod("b", 2, 9080, ", tier: both", "")
        + &pod("host", 3, 18080, "", "hostNetwork: true")
        + &pod("never", 3, 8080, "", "")
}

/// What the rows are checked with.
struct Scene {
    lab: &'static Lab,
    /// Addresses of the pods by name, IPv4 before IPv6.
    pods: BTreeMap<String, Vec<IpAddr>>,
}

/// A Service of one kind.
struct Row {
    name: &'static str,
    /// What its `spec` holds.
    spec: &'static str,
    /// More arguments of `expose`.
    flags: &'static [&'static str],
    check: fn(&Scene, Ipv4Addr) -> Result<()>,
}

const ROWS: [Row; 13] = [
    Row {
        name: "named",
        spec: "selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.answer(&format!("http://{vip}/hostname"), &["a", "b"])
        },
    },
    Row {
        name: "numbered",
        spec: "selector: {app: a}, ports: [{port: 80, targetPort: 8080}]",
        flags: &["--scheduler", "rr"],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 rr", &[("a", 8080)])?;
            scene.answer(&format!("http://{vip}/hostname"), &["a"])
        },
    },
    Row {
        name: "dns",
        spec: "selector: {tier: both}, ports: [{name: t, port: 53, targetPort: http},
               {name: u, port: 53, targetPort: udp, protocol: UDP}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :53 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.table(vip, "UDP :53 wlc", &[("a", 8081), ("b", 9081)])?;
            scene.answer(&format!("http://{vip}:53/hostname"), &["a", "b"])?;
            scene.answer(&format!("udp://{vip}:53/hostname"), &["a", "b"])
        },
    },
    Row {
        name: "sctp",
        spec: "selector: {tier: both}, ports: [{port: 80, targetPort: sctp, protocol: SCTP}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "SCTP :80 wlc", &[("a", 8082), ("b", 9082)])?;
            // The LAN's client may have no SCTP: a pod asks.
            let asks = scene.pod("b", false)?.to_string();
            let reached = ask_from_pod(scene.lab, "node-2", &format!("{asks}:9080"), vip, "sctp", 80)?;
            ensure!(reached == names(&["a", "b"]), "{reached:?}");
            Ok(())
        },
    },
    Row {
        name: "affinity",
        spec: "selector: {tier: both}, sessionAffinity: ClientIP, ports: [{port: 80, targetPort: http}],
               sessionAffinityConfig: {clientIP: {timeoutSeconds: 600}}",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc persistent 600", &[("a", 8080), ("b", 9080)])?;
            scene.one_answers(&format!("http://{vip}/hostname"))
        },
    },
    Row {
        name: "persistence",
        spec: "selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &["--persistence", "30m"],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc persistent 1800", &[("a", 8080), ("b", 9080)])?;
            scene.one_answers(&format!("http://{vip}/hostname"))
        },
    },
    Row {
        name: "headless",
        spec: "clusterIP: None, selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.answer(&format!("http://{vip}/hostname"), &["a", "b"])
        },
    },
    Row {
        name: "unready",
        spec: "publishNotReadyAddresses: true, selector: {app: never}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("never", 8080)])?;
            scene.answer(&format!("http://{vip}/hostname"), &["never"])
        },
    },
    Row {
        name: "hosted",
        spec: "selector: {app: host}, ports: [{name: t, port: 80, targetPort: http},
               {name: u, port: 81, targetPort: udp, protocol: UDP}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("host", 18080)])?;
            scene.answer(&format!("http://{vip}/hostname"), &["node-3"])?;
            scene.answer(&format!("udp://{vip}:81/hostname"), &["node-3"])
        },
    },
    Row {
        name: "nobody",
        spec: "selector: {app: nobody}, ports: [{port: 80}]",
        flags: &["--wait=false"],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[])?;
            scene.condition(vip, "Programmed", "False NoEndpoints")?;
            product::wait_one_owner(scene.lab, vip, SOON)?;
            scene.refuses(vip, 80)
        },
    },
    Row {
        name: "local",
        spec: "type: LoadBalancer, externalTrafficPolicy: Local, selector: {tier: both}, ports: [{port: 80, targetPort: http}]",
        flags: &[],
        check: |scene, vip| {
            let owner = product::wait_one_owner(scene.lab, vip, SOON)?;
            let (own, port) = if owner.number == 1 { ("a", 8080) } else { ("b", 9080) };
            let found = product::table(&scene.lab.node(owner.number), vip)?;
            let wanted = scene.addresses(vip, &[(own, port)])?;
            ensure!(found.values().next() == Some(&wanted), "{} has {found:?}", owner.node);
            scene.answer(&format!("http://{vip}/hostname"), &[own])?;
            // The pod sees who asks.
            let answer = scene.lab.client().get(&format!("http://{vip}/clientip"))?;
            let seen: SocketAddr = answer.body.parse().with_context(|| answer.body.clone())?;
            ensure!(seen == answer.source, "the pod sees {seen}, the client is {}", answer.source);
            scene.condition(vip, "Programmed", "True Programmed")
        },
    },
    Row {
        name: "ranges",
        spec: "type: LoadBalancer, loadBalancerSourceRanges: [10.99.0.0/16], selector: {app: a},
               ports: [{port: 80, targetPort: http}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080)])?;
            scene.refuses(vip, 80)?;
            let range = r#"{"spec":{"loadBalancerSourceRanges":["10.99.0.0/16","10.87.0.1/32"]}}"#;
            scene.lab.kubectl(["patch", "service", "ranges", "-n", KINDS, "-p", range])?.ok()?;
            command::until("the client to be let in", SOON, || {
                Ok(scene.lab.client().get(&format!("http://{vip}/hostname")).ok().map(drop))
            })
        },
    },
    Row {
        name: "handmade",
        spec: "ports: [{name: http, port: 80}]",
        flags: &[],
        check: |scene, vip| {
            scene.table(vip, "TCP :80 wlc", &[("a", 8080), ("b", 9080)])?;
            scene.answer(&format!("http://{vip}/hostname"), &["a", "b"])
        },
    },
];

impl Scene {
    /// Creates the pods and waits for those that become ready.
    fn new(lab: &'static Lab) -> Result<Self> {
        {
            // Of two tests that create the same at once, one is told that it exists.
            static CREATION: Mutex<()> = Mutex::new(());
            let _held = CREATION.lock().unwrap_or_else(PoisonError::into_inner);
            lab.apply(&pods())?;
        }
        let mut pods = BTreeMap::new();
        for name in ["a", "b", "host", "never"] {
            let found = command::until(&format!("pod {name}"), Duration::from_secs(180), || {
                let pod = lab.kubectl(["get", "pod", name, "-n", KINDS, "-o", "json"])?.ok()?;
                let pod: Value = serde_json::from_str(&pod.stdout)?;
                let conditions = pod["status"]["conditions"].as_array().cloned().unwrap_or_default();
                let ready = conditions.iter().any(|c| c["type"] == "Ready" && c["status"] == "True");
                let running = pod["status"]["containerStatuses"][0]["state"]["running"].is_object();
                let addresses =
                    pod["status"]["podIPs"].as_array().filter(|_| ready || name == "never" && running);
                Ok(addresses.map(|all| {
                    all.iter().filter_map(|one| one["ip"].as_str()?.parse().ok()).collect::<Vec<IpAddr>>()
                }))
            })?;
            pods.insert(name.to_owned(), found);
        }
        Ok(Self { lab, pods })
    }

    /// Makes a Service.
    fn service(&self, name: &str, spec: &str) -> Result<()> {
        let meta = format!("{{name: {name}, namespace: {KINDS}}}");
        let service = format!("apiVersion: v1\nkind: Service\nmetadata: {meta}\nspec: {{{spec}}}\n");
        self.lab.apply(&service).map(drop)
    }

    /// Gives a Service a virtual IP.
    fn expose(&self, name: &str, flags: &[&str]) -> Result<Ipv4Addr> {
        let service = format!("svc/{name}");
        let words = ["vip", "expose", &service, "-n", KINDS].into_iter().chain(flags.iter().copied());
        self.lab.kubectl_for(Duration::from_secs(60), words)?.ok()?;
        product::address_of(self.lab, KINDS, name)
    }

    /// Takes all virtual IPs from a Service, and removes it.
    fn remove(&self, name: &str) -> Result<()> {
        self.lab.kubectl(["vip", "unexpose", &format!("svc/{name}"), "-n", KINDS])?.ok()?;
        self.lab.kubectl(["delete", "service", name, "-n", KINDS, "--wait=false"])?.ok().map(drop)
    }

    fn pod(&self, name: &str, six: bool) -> Result<IpAddr> {
        let mut addresses = self.pods.get(name).into_iter().flatten();
        addresses
            .find(|address| address.is_ipv6() == six)
            .copied()
            .with_context(|| format!("pod {name} has none"))
    }

    /// Destinations as the kernel shows them, each of weight 1.
    fn addresses(&self, vip: impl Into<IpAddr>, to: &[(&str, u16)]) -> Result<BTreeMap<String, u32>> {
        let six = vip.into().is_ipv6();
        to.iter()
            .map(|(name, port)| Ok((SocketAddr::new(self.pod(name, six)?, *port).to_string(), 1)))
            .collect()
    }

    /// Waits until every kernel has exactly these destinations at a port, given as `TCP :80 wlc`.
    fn table(&self, vip: impl Into<IpAddr>, head: &str, to: &[(&str, u16)]) -> Result<()> {
        let vip = vip.into();
        let wanted = self.addresses(vip, to)?;
        command::until(&format!("{head} of {vip} to be {wanted:?}"), SOON, || {
            let tables = self.lab.each_node(|node| product::table(&node, vip))?;
            ensure!(tables.iter().all(|table| table.get(head) == Some(&wanted)), "they have {tables:?}");
            Ok(Some(()))
        })
    }

    /// Asks until these, all of them and nobody else, have answered a run of requests. The slices of a Service that was deleted may
    /// outlive it, and go when it is there again: for that moment it has no endpoint.
    fn answer(&self, url: &str, who: &[&str]) -> Result<()> {
        let wanted = names(who);
        command::until(&format!("{url} to be answered by {wanted:?}"), SOON, || {
            let heard =
                (0..TRIES).map(|_| Ok(self.lab.client().get(url)?.body)).collect::<Result<BTreeSet<_>>>()?;
            ensure!(heard == wanted, "{heard:?} answer");
            Ok(Some(()))
        })
    }

    /// A client stays with its backend.
    fn one_answers(&self, url: &str) -> Result<()> {
        let heard =
            (0..TRIES).map(|_| Ok(self.lab.client().get(url)?.body)).collect::<Result<BTreeSet<_>>>()?;
        ensure!(heard.len() == 1, "{heard:?} answer");
        Ok(())
    }

    /// Waits until connections are refused at once.
    fn refuses(&self, vip: Ipv4Addr, port: u16) -> Result<()> {
        command::until(&format!("{vip}:{port} to refuse"), SOON, || {
            Ok(self.lab.client().tcp_refused((vip, port).into())?.then_some(()))
        })
    }

    /// Waits until a condition is as said, as `True Active`.
    fn condition(&self, vip: impl Into<IpAddr>, kind: &str, wanted: &str) -> Result<()> {
        let vip = vip.into();
        let condition = format!(".status.conditions[?(@.type==\"{kind}\")]");
        let path = format!("{{{condition}.status}} {{{condition}.reason}}");
        command::until(&format!("{kind} of {vip} to be {wanted}"), SOON, || {
            let found = product::field(self.lab, vip, &path)?;
            if found != wanted {
                bail!("it is {found:?}");
            }
            Ok(Some(()))
        })
    }
}

fn names(who: &[&str]) -> BTreeSet<String> {
    who.iter().map(|name| (*name).to_owned()).collect()
}

/// EndpointSlices that nobody but their author looks after, one endpoint in both.
fn slices(scene: &Scene) -> Result<String> {
    let slice = |name: &str, endpoints: &str, port: u16| {
        format!(
            "apiVersion: discovery.k8s.io/v1\nkind: EndpointSlice\nmetadata: {{name: {name}, namespace: {KINDS}, \
             labels: {{kubernetes.io/service-name: handmade}}}}\naddressType: IPv4\nendpoints: [{endpoints}]\n\
             ports: [{{name: http, port: {port}}}]\n---\n"
        )
    };
    let a = format!("{{addresses: [{}]}}", scene.pod("a", false)?);
    let b = format!("{{addresses: [{}]}}", scene.pod("b", false)?);
    Ok(slice("one", &a, 8080) + &slice("two", &format!("{a}, {a}"), 8080) + &slice("three", &b, 9080))
}

#[test]
fn every_kind_of_service_is_served() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        scene.lab.apply(&slices(&scene)?)?;
        let mut failures = Vec::new();
        for row in &ROWS {
            let exposed = scene.service(row.name, row.spec).and_then(|()| scene.expose(row.name, row.flags));
            let outcome = exposed.and_then(|vip| (row.check)(&scene, vip).and(scene.remove(row.name)));
            if let Err(error) = outcome {
                failures.push(format!("{}: {error:#}", row.name));
            }
        }
        ensure!(failures.is_empty(), "{} of {} rows:\n{}", failures.len(), ROWS.len(), failures.join("\n"));
        Ok(())
    });
}

#[test]
fn what_changes_about_a_service_is_followed() {
    check(|| {
        let scene = Scene::new(installed()?)?;
        let lab = scene.lab;
        let web = "selector: {tier: both}, ports: [{port: 80, targetPort: http}]";
        scene.service("changing", web)?;
        let vip = scene.expose("changing", &[])?;
        let both = [("a", 8080), ("b", 9080)];
        scene.table(vip, "TCP :80 wlc", &both)?;

        // Its port gets another number.
        scene.service("changing", "selector: {tier: both}, ports: [{port: 8000, targetPort: http}]")?;
        scene.table(vip, "TCP :8000 wlc", &both)?;
        scene.answer(&format!("http://{vip}:8000/hostname"), &["a", "b"])?;
        scene.refuses(vip, 80)?;

        // It is deleted, and made again.
        lab.kubectl(["delete", "service", "changing", "-n", KINDS])?.ok()?;
        scene.condition(vip, "Programmed", "False ServiceNotFound")?;
        scene.refuses(vip, 8000)?;
        scene.service("changing", web)?;
        scene.condition(vip, "Programmed", "True Programmed")?;
        scene.answer(&format!("http://{vip}/hostname"), &["a", "b"])?;

        // A second address for it.
        let second: Ipv4Addr = "10.87.2.250".parse()?;
        let more = |services: &str| {
            format!(
                "apiVersion: kubectl-vip.io/v1alpha1\nkind: VirtualIP\nmetadata: {{name: \"{second}\"}}\n\
                 spec: {{address: \"{second}\", virtualRouter: 155, services: [{services}]}}\n"
            )
        };
        let changing = format!("{{namespace: {KINDS}, name: changing}}");
        lab.apply(&more(&changing))?;
        scene.table(second, "TCP :80 wlc", &both)?;
        product::wait_one_owner(lab, second, SOON)?;
        scene.answer(&format!("http://{second}/hostname"), &["a", "b"])?;
        scene.answer(&format!("http://{vip}/hostname"), &["a", "b"])?;

        // A Service that wants the same port there.
        scene.service(
            "rival",
            "selector: {app: a}, ports: [{name: http, port: 80, targetPort: http},\
             {name: more, port: 81, targetPort: http}]",
        )?;
        lab.apply(&more(&format!("{changing}, {{namespace: {KINDS}, name: rival}}")))?;
        scene.condition(second, "Programmed", "False PortClash")?;
        scene.table(second, "TCP :80 wlc", &both)?;
        scene.table(second, "TCP :81 wlc", &[("a", 8080)])?;
        lab.kubectl(["delete", "virtualip", &second.to_string()])?.ok()?;
        lab.kubectl(["delete", "service", "rival", "-n", KINDS])?.ok()?;
        scene.remove("changing")?;

        // One for DNS over TCP and one for DNS over UDP, at one address.
        scene.service("dns-tcp", "selector: {app: a}, ports: [{port: 53, targetPort: http}]")?;
        scene
            .service("dns-udp", "selector: {app: b}, ports: [{port: 53, targetPort: udp, protocol: UDP}]")?;
        let dns = scene.expose("dns-tcp", &[])?;
        let same = scene.expose("dns-udp", &["--share", "--ip", &dns.to_string()])?;
        ensure!(same == dns, "{same} is not {dns}");
        scene.table(dns, "TCP :53 wlc", &[("a", 8080)])?;
        scene.table(dns, "UDP :53 wlc", &[("b", 9081)])?;
        scene.answer(&format!("http://{dns}:53/hostname"), &["a"])?;
        scene.answer(&format!("udp://{dns}:53/hostname"), &["b"])?;
        scene.remove("dns-udp")?;
        scene.remove("dns-tcp")?;

        // Each address of a Service of both families has the endpoints of its own.
        let dual =
            "ipFamilyPolicy: RequireDualStack, selector: {tier: both}, ports: [{port: 80, targetPort: http}]";
        scene.service("dual", dual)?;
        let four = scene.expose("dual", &[])?;
        let six: Ipv6Addr = "fd87::2:aa".parse()?;
        lab.apply(&format!(
            "apiVersion: kubectl-vip.io/v1alpha1\nkind: VirtualIP\nmetadata: {{name: fd87-0-0-0-0-0-2-aa}}\n\
             spec: {{address: \"{six}\", virtualRouter: 156, services: [{{namespace: {KINDS}, name: dual}}]}}\n"
        ))?;
        for vip in [IpAddr::from(four), six.into()] {
            scene.table(vip, "TCP :80 wlc", &both)?;
        }
        product::wait_one_owner(lab, six, SOON)?;
        scene.answer(&format!("http://{four}/hostname"), &["a", "b"])?;
        scene.answer(&format!("http://[{six}]/hostname"), &["a", "b"])?;
        scene.remove("dual")?;

        scene.service("elsewhere", "type: ExternalName, externalName: example.org")?;
        let refused = lab.kubectl(["vip", "expose", "svc/elsewhere", "-n", KINDS])?;
        ensure!(
            !refused.success() && refused.stderr.contains("; ExternalName is not supported"),
            "{refused:?}"
        );
        Ok(())
    });
}
