//! What the lab's clusters serve: agnhost behind a Service, as many pods as wanted, spread over the nodes.

use std::{collections::BTreeMap, time::Duration};

use anyhow::{Context, Result, bail};
use serde_json::Value;

use crate::{command, guest::FRUGAL, image::AGNHOST, lab::Lab};

/// How long pods may take to come and go on a slow machine, under load.
pub const SLOW: Duration = Duration::from_secs(300);

/// A Deployment, and as many Services for its pods as wanted: `/hostname` over TCP at port 80 and `hostname` over UDP at
/// port 81 answer with the name of the pod.
#[derive(Clone, Debug)]
pub struct Workload<'a> {
    lab: &'a Lab,
    namespace: String,
    name: String,
}

/// A pod of a [`Workload`].
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Pod {
    /// Its name, which is what it answers.
    pub name: String,
    /// The node that it is on.
    pub node: String,
    /// Its address.
    pub address: String,
}

impl Pod {
    /// Where it says its name itself, past every Service.
    pub fn url(&self) -> String {
        format!("http://{}:8080/hostname", self.address)
    }
}

impl<'a> Workload<'a> {
    /// Creates it in a namespace, which is created too, with a Service of its name, and waits until all pods are ready.
    pub fn deploy(lab: &'a Lab, namespace: &str, name: &str, replicas: u32) -> Result<Self> {
        let this = Self { lab, namespace: namespace.into(), name: name.into() };
        lab.apply(&this.manifest(replicas))?;
        this.add_service(name, 80)?;
        this.wait(replicas)?;
        Ok(this)
    }

    /// Adds a Service for its pods, with that TCP port and UDP at 81.
    pub fn add_service(&self, service: &str, port: u16) -> Result<()> {
        self.add_service_of(service, port, "IPv4")
    }

    /// The same for a Service of one family, `IPv4` or `IPv6`.
    pub fn add_service_of(&self, service: &str, port: u16, family: &str) -> Result<()> {
        let Self { namespace, name, .. } = self;
        let manifest = format!(
            "apiVersion: v1
kind: Service
metadata: {{name: {service}, namespace: {namespace}}}
spec:
  ipFamilies: [{family}]
  selector: {{app: {name}}}
  ports:
  - {{name: http, port: {port}, targetPort: http}}
  - {{name: udp, port: 81, targetPort: udp, protocol: UDP}}
"
        );
        self.lab.apply(&manifest).map(drop)
    }

    fn manifest(&self, replicas: u32) -> String {
        let Self { namespace, name, .. } = self;
        format!(
            "apiVersion: v1
kind: Namespace
metadata: {{name: {namespace}}}
---
apiVersion: apps/v1
kind: Deployment
metadata: {{name: {name}, namespace: {namespace}}}
spec:
  replicas: {replicas}
  selector: {{matchLabels: {{app: {name}}}}}
  template:
    metadata: {{labels: {{app: {name}}}}}
    spec:
      terminationGracePeriodSeconds: 15
      topologySpreadConstraints:
      - maxSkew: 1
        topologyKey: kubernetes.io/hostname
        whenUnsatisfiable: DoNotSchedule
        nodeTaintsPolicy: Honor
        labelSelector: {{matchLabels: {{app: {name}}}}}
      containers:
      - name: web
        image: {AGNHOST}
        imagePullPolicy: Never
        # It goes on answering until all have heard that it ends.
        args: [netexec, --http-port=8080, --udp-port=8081, --delay-shutdown=10]
        ports: [{{name: http, containerPort: 8080}}, {{name: udp, containerPort: 8081, protocol: UDP}}]
        env: [{env}]
        readinessProbe: {{httpGet: {{path: /healthz, port: http}}, periodSeconds: 5, timeoutSeconds: 5}}
",
            env = FRUGAL.map(|(name, value)| format!("{{name: {name}, value: {value:?}}}")).join(", ")
        )
    }

    /// Sets the number of pods and waits until they are ready and the others are gone.
    pub fn scale(&self, replicas: u32) -> Result<()> {
        let (target, count) = (format!("deployment/{}", self.name), format!("--replicas={replicas}"));
        self.lab.kubectl(["scale", "-n", &self.namespace, &target, &count])?.ok()?;
        self.wait(replicas)
    }

    /// Waits until that many pods are ready and there is no other.
    pub fn wait(&self, replicas: u32) -> Result<()> {
        let what = format!("{replicas} ready pods of {}/{}", self.namespace, self.name);
        command::until(&what, SLOW, || {
            let (ready, all) = self.count()?;
            if (ready, all) != (replicas as usize, replicas as usize) {
                bail!("{ready} of {all} are ready");
            }
            Ok(Some(()))
        })
    }

    /// Its pods by name.
    pub fn pods(&self) -> Result<BTreeMap<String, Pod>> {
        let pods = self.list()?;
        let items = pods["items"].as_array().context("no list of pods")?;
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        let pods = items.iter().map(|pod| Pod {
            name: text(&pod["metadata"]["name"]),
            node: text(&pod["spec"]["nodeName"]),
            address: text(&pod["status"]["podIP"]),
        });
        Ok(pods.map(|pod| (pod.name.clone(), pod)).collect())
    }

    /// Removes it and its namespace, without waiting.
    pub fn remove(&self) -> Result<()> {
        self.lab
            .kubectl(["delete", "namespace", &self.namespace, "--wait=false", "--ignore-not-found"])?
            .ok()
            .map(drop)
    }

    fn count(&self) -> Result<(usize, usize)> {
        let pods = self.list()?;
        let items = pods["items"].as_array().context("no list of pods")?;
        let ready = |pod: &&Value| {
            let conditions = pod["status"]["conditions"].as_array();
            let ready = conditions
                .is_some_and(|all| all.iter().any(|one| one["type"] == "Ready" && one["status"] == "True"));
            ready && pod["metadata"]["deletionTimestamp"].is_null()
        };
        Ok((items.iter().filter(ready).count(), items.len()))
    }

    fn list(&self) -> Result<Value> {
        let label = format!("app={}", self.name);
        let pods =
            self.lab.kubectl(["get", "pods", "-n", &self.namespace, "-l", &label, "-o", "json"])?.ok()?;
        Ok(serde_json::from_str(&pods.stdout)?)
    }
}
