//! Objects kept up to date by a watch, so that looking at them often costs the API server next to nothing.
//!
//! Who may list and not watch gets lists, at a slower pace.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::time::{Duration, Instant};

use futures::stream::BoxStream;
use futures::{FutureExt, StreamExt};
use kube::api::{ListParams, WatchEvent, WatchParams};
use kube::{Api, Resource, ResourceExt};
use serde::de::DeserializeOwned;

/// Between two lists.
const PACE: Duration = Duration::from_secs(1);
/// HTTP: what the watch would go on from is too long ago.
const GONE: u16 = 410;

/// Namespace and name.
type Key = (Option<String>, String);

/// Objects of one kind.
pub struct Mirror<K> {
    api: Api<K>,
    which: ListParams,
    objects: BTreeMap<Key, K>,
    /// Where a watch begins; `None`: the objects have to be listed.
    version: Option<String>,
    events: Option<BoxStream<'static, kube::Result<WatchEvent<K>>>>,
    listed: Option<Instant>,
}

impl<K> Mirror<K>
where
    K: Resource + Clone + DeserializeOwned + Debug + Send + 'static,
{
    /// Of those that are chosen. Nothing is read yet.
    pub fn new(api: Api<K>, which: ListParams) -> Self {
        Self { api, which, objects: BTreeMap::new(), version: None, events: None, listed: None }
    }

    /// Of a single object, from what was read of it.
    pub fn of(api: Api<K>, object: &K) -> Self {
        let name = object.name_any();
        let which = ListParams::default().fields(&format!("metadata.name={name}"));
        let objects = BTreeMap::from([(key(object), object.clone())]);
        Self { objects, version: object.resource_version(), ..Self::new(api, which) }
    }

    /// What there is now.
    pub async fn look(&mut self) -> kube::Result<impl Iterator<Item = &K>> {
        if self.events.is_none() {
            self.begin().await?;
        }
        while let Some(event) = self.events.as_mut().and_then(|events| events.next().now_or_never()) {
            match event {
                Some(Ok(event)) => self.take(event)?,
                // A watch ends now and then, and goes on from where it was.
                None => self.events = None,
                Some(Err(error)) => {
                    self.events = None;
                    return Err(error);
                }
            }
        }
        Ok(self.objects.values())
    }

    async fn begin(&mut self) -> kube::Result<()> {
        let version = match self.version.clone() {
            Some(version) => version,
            None if self.listed.is_some_and(|listed| listed.elapsed() < PACE) => return Ok(()),
            None => {
                let list = self.api.list(&self.which).await?;
                self.objects = list.items.into_iter().map(|object| (key(&object), object)).collect();
                self.listed = Some(Instant::now());
                list.metadata.resource_version.unwrap_or_default()
            }
        };
        let params = WatchParams {
            label_selector: self.which.label_selector.clone(),
            field_selector: self.which.field_selector.clone(),
            ..WatchParams::default()
        };
        match self.api.watch(&params, &version).await {
            Ok(events) => (self.events, self.version) = (Some(events.boxed()), Some(version)),
            Err(kube::Error::Api(status)) if status.is_forbidden() || status.code == GONE => {
                self.version = None
            }
            Err(error) => return Err(error),
        }
        Ok(())
    }

    fn take(&mut self, event: WatchEvent<K>) -> kube::Result<()> {
        match event {
            WatchEvent::Added(object) | WatchEvent::Modified(object) => {
                self.version = object.resource_version();
                self.objects.insert(key(&object), object);
            }
            WatchEvent::Deleted(object) => {
                self.version = object.resource_version();
                self.objects.remove(&key(&object));
            }
            WatchEvent::Bookmark(bookmark) => self.version = Some(bookmark.metadata.resource_version),
            WatchEvent::Error(status) => {
                (self.events, self.version) = (None, None);
                if status.code != GONE {
                    return Err(kube::Error::Api(status));
                }
            }
        }
        Ok(())
    }
}

fn key(object: &impl ResourceExt) -> Key {
    (object.namespace(), object.name_any())
}
