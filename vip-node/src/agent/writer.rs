//! Status and Events out. The loop leaves the newest word here; what the API server did not take is tried again.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Debug;
use std::time::{Duration, Instant};

use anyhow::anyhow;
use k8s_openapi::api::core::v1::ObjectReference;
use k8s_openapi::apimachinery::pkg::apis::meta::v1::OwnerReference;
use kube::api::{ObjectMeta, Patch, PatchParams, PostParams};
use kube::runtime::events::{Event, EventType, Recorder, Reporter};
use kube::{Api, Client, Resource};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};
use tokio::sync::{mpsc, watch};
use tracing::{info, warn};
use vip_core::api::{
    AGENT_MANAGER, VIPNode, VIPNodeStatus, VIPPool, VIPPoolStatus, VirtualIP, VirtualIPStatus,
};

use super::cluster::describe;

/// Longest wait for one answer.
const ANSWER: Duration = Duration::from_secs(5);
/// Pause after a failure.
const RETRY: Duration = Duration::from_secs(1);
/// After this time a value that the watch does not show yet is sent again.
const REPEAT: Duration = Duration::from_secs(5);

/// What should stand in the objects: only what differs from what the API server is known to hold.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Outbox {
    /// Virtual IPs that this node speaks for, by name.
    pub vips: BTreeMap<String, VirtualIPStatus>,
    /// Pools, where this node speaks for them.
    pub pools: BTreeMap<String, VIPPoolStatus>,
    /// This node.
    pub node: Option<(VIPNodeStatus, Option<OwnerReference>)>,
}

/// Something that happened.
#[derive(Debug)]
pub struct Happening {
    /// To what.
    pub about: ObjectReference,
    /// Whether somebody should look at it.
    pub warning: bool,
    /// A word.
    pub reason: String,
    /// A sentence.
    pub note: String,
}

/// The handle of the writer.
pub struct Writer {
    outbox: watch::Sender<Outbox>,
    happenings: mpsc::Sender<Happening>,
    heard: watch::Receiver<Option<Instant>>,
}

impl Writer {
    /// Starts to write, on tasks of the current runtime that never end.
    pub fn new(client: &Client, node: &str) -> Self {
        let (outbox, wanted) = watch::channel(Outbox::default());
        // Events are a courtesy: with the API server away, what does not fit is dropped.
        let (happenings, inbox) = mpsc::channel(256);
        let (answered, heard) = watch::channel(None);
        let task = Task { client: client.clone(), node: node.to_owned(), sent: HashMap::new(), answered };
        tokio::spawn(task.run(wanted));
        tokio::spawn(publish(client.clone(), node.to_owned(), inbox));
        Self { outbox, happenings, heard }
    }

    /// When the API server last answered what was written; `None`: not yet.
    pub fn heard(&self) -> watch::Receiver<Option<Instant>> {
        self.heard.clone()
    }

    /// Replaces what should be written.
    pub fn write(&self, outbox: Outbox) {
        self.outbox.send_if_modified(|last| {
            let news = *last != outbox;
            *last = outbox;
            news
        });
    }

    /// Tells of something that happened.
    pub fn tell(&self, happening: Happening) {
        let _ = self.happenings.try_send(happening);
    }
}

/// Writes one status at once, for the last word of a process that ends.
///
/// # Errors
/// When the API server refuses or does not answer in time.
pub async fn write_node(client: &Client, name: &str, status: &VIPNodeStatus) -> anyhow::Result<()> {
    patch_status::<VIPNode>(client, name, status).await
}

struct Task {
    client: Client,
    node: String,
    /// What was sent last to which object, and when.
    sent: HashMap<String, (Value, Instant)>,
    /// When it was last answered.
    answered: watch::Sender<Option<Instant>>,
}

impl Task {
    async fn run(mut self, mut wanted: watch::Receiver<Outbox>) {
        let mut failing = false;
        loop {
            let outbox = wanted.borrow_and_update().clone();
            let failure = self.deliver(&outbox, &wanted).await.err();
            match &failure {
                Some(error) if !failing => warn!("cannot write status, retrying: {error:#}"),
                None if failing => info!("status is written again"),
                _ => {}
            }
            failing = failure.is_some();
            let pause = if failing { RETRY } else { REPEAT };
            if failing {
                tokio::time::sleep(pause).await;
            } else if let Ok(Err(_)) = tokio::time::timeout(pause, wanted.changed()).await {
                return;
            }
        }
    }

    /// Sends what is news. One object that is refused does not keep the others from being written.
    async fn deliver(&mut self, outbox: &Outbox, wanted: &watch::Receiver<Outbox>) -> anyhow::Result<()> {
        let mut first_failure = Ok(());
        if let Some((status, owner)) = &outbox.node {
            let name = self.node.clone();
            let result = self.send::<VIPNode>(&name, status).await;
            let result = match result {
                Err(error) if is_missing(&error) => self.create_node(owner.clone(), status).await,
                other => other,
            };
            first_failure = first_failure.and(result);
        }
        for (name, status) in &outbox.vips {
            // A newer word is waiting: what is left of this one may be wrong by now.
            if wanted.has_changed().unwrap_or(false) {
                return first_failure;
            }
            let result = self.send::<VirtualIP>(name, status).await;
            first_failure = first_failure.and(ignore_missing(result));
        }
        for (name, status) in &outbox.pools {
            let result = self.send::<VIPPool>(name, status).await;
            first_failure = first_failure.and(ignore_missing(result));
        }
        first_failure
    }

    async fn send<K>(&mut self, name: &str, status: &impl Serialize) -> anyhow::Result<()>
    where
        K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
    {
        let key = format!("{}/{name}", K::plural(&()));
        let value = serde_json::to_value(status)?;
        if self.sent.get(&key).is_some_and(|(last, at)| *last == value && at.elapsed() < REPEAT) {
            return Ok(());
        }
        let result = patch_status::<K>(&self.client, name, status).await;
        // A refusal is an answer too, but not that of a proxy which finds nobody behind it.
        if result.as_ref().map_or_else(status_code, |()| Some(200)).is_some_and(|code| code < 500) {
            self.answered.send_replace(Some(Instant::now()));
        }
        result?;
        self.sent.insert(key, (value, Instant::now()));
        // Objects come and go; what was sent to them need not be remembered for ever.
        self.sent.retain(|_, (_, at)| at.elapsed() < REPEAT * 12);
        Ok(())
    }

    async fn create_node(
        &mut self,
        owner: Option<OwnerReference>,
        status: &VIPNodeStatus,
    ) -> anyhow::Result<()> {
        let metadata = ObjectMeta {
            name: Some(self.node.clone()),
            owner_references: owner.map(|owner| vec![owner]),
            ..ObjectMeta::default()
        };
        let node = VIPNode { metadata, ..VIPNode::new(&self.node, vip_core::api::VIPNodeSpec {}) };
        let params = PostParams { field_manager: Some(AGENT_MANAGER.to_owned()), ..PostParams::default() };
        match answer(Api::<VIPNode>::all(self.client.clone()).create(&params, &node)).await {
            Err(error) if !is_conflict(&error) => Err(error),
            _ => self.send::<VIPNode>(&self.node.clone(), status).await,
        }
    }
}

async fn patch_status<K>(client: &Client, name: &str, status: &impl Serialize) -> anyhow::Result<()>
where
    K: Resource<DynamicType = ()> + Clone + DeserializeOwned + Debug,
{
    // Server-side apply by one manager for all agents: what the last owner wrote and this one does not say goes away.
    let body = json!({
        "apiVersion": K::api_version(&()),
        "kind": K::kind(&()),
        "metadata": { "name": name },
        "status": status,
    });
    let api: Api<kube::api::DynamicObject> =
        Api::all_with(client.clone(), &kube::api::ApiResource::erase::<K>(&()));
    answer(api.patch_status(name, &PatchParams::apply(AGENT_MANAGER).force(), &Patch::Apply(&body))).await?;
    Ok(())
}

async fn answer<T>(call: impl Future<Output = kube::Result<T>>) -> anyhow::Result<T> {
    tokio::time::timeout(ANSWER, call)
        .await
        .map_err(|_| anyhow!("no answer from the API server in {ANSWER:?}"))?
        .map_err(Into::into)
}

fn status_code(error: &anyhow::Error) -> Option<u16> {
    match error.downcast_ref::<kube::Error>() {
        Some(kube::Error::Api(status)) => Some(status.code),
        _ => None,
    }
}

fn is_missing(error: &anyhow::Error) -> bool {
    status_code(error) == Some(404)
}

fn is_conflict(error: &anyhow::Error) -> bool {
    status_code(error) == Some(409)
}

/// An object that was deleted meanwhile needs no status.
fn ignore_missing(result: anyhow::Result<()>) -> anyhow::Result<()> {
    result.or_else(|error| if is_missing(&error) { Ok(()) } else { Err(error) })
}

async fn publish(client: Client, node: String, mut inbox: mpsc::Receiver<Happening>) {
    let reporter = Reporter { controller: AGENT_MANAGER.to_owned(), instance: Some(node) };
    let recorder = Recorder::new(client, reporter);
    while let Some(Happening { about, warning, reason, note }) = inbox.recv().await {
        let event = Event {
            type_: if warning { EventType::Warning } else { EventType::Normal },
            reason: reason.clone(),
            note: Some(note),
            action: reason,
            secondary: None,
        };
        match tokio::time::timeout(ANSWER, recorder.publish(&event, &about)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => warn!("an Event could not be written: {}", describe(&error)),
            Err(_) => warn!("an Event could not be written: no answer from the API server"),
        }
    }
}
