//! Who may do what, asked of the API server: what an installation takes, and what the agents need.

use std::collections::{BTreeMap, BTreeSet};

use futures::{StreamExt, TryStreamExt};
use k8s_openapi::api::authorization::v1::{
    ResourceAttributes, SelfSubjectAccessReview, SelfSubjectAccessReviewSpec, SubjectAccessReview,
    SubjectAccessReviewSpec,
};
use kube::api::PostParams;
use kube::core::DynamicObject;
use kube::{Api, Client, ResourceExt};
use serde_json::Value;
use vip_core::api::{DAEMONSET, VIPPool};

use crate::cluster::{Cluster, permitted, resource_of, title};
use crate::exit::Result;
use crate::manifests::is_kind;

/// So many requests are under way at once.
const AT_ONCE: usize = 16;
/// The role whose rules are what the agents need.
const AGENT_ROLE: &str = "kubectl-vip-agent";

/// Something that is not allowed.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lack {
    /// `daemonsets.apps`, `vipnodes.kubectl-vip.io/status`.
    pub resource: String,
    /// The namespace, if it is asked for one.
    pub namespace: Option<String>,
    /// The verbs, with commas between.
    pub verbs: String,
}

/// One question.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
struct Question {
    group: String,
    resource: String,
    subresource: Option<String>,
    namespace: Option<String>,
    verb: String,
}

impl Question {
    fn attributes(&self) -> ResourceAttributes {
        ResourceAttributes {
            group: Some(self.group.clone()),
            resource: Some(self.resource.clone()),
            subresource: self.subresource.clone(),
            namespace: self.namespace.clone(),
            verb: Some(self.verb.clone()),
            ..ResourceAttributes::default()
        }
    }

    fn title(&self) -> String {
        let group = if self.group.is_empty() { String::new() } else { format!(".{}", self.group) };
        let subresource = self.subresource.as_ref().map(|name| format!("/{name}")).unwrap_or_default();
        format!("{}{group}{subresource}", self.resource)
    }
}

/// Objects of the installation that are not there; `None` when the user may not look for some of them and none of the
/// others is missing.
pub async fn missing(
    cluster: &Cluster,
    objects: &[DynamicObject],
    is_installed: bool,
) -> Result<Option<Vec<String>>> {
    // The DaemonSet is judged by itself, and its namespace is there when it is.
    let ours = objects
        .iter()
        .filter(|object| is_installed && !is_kind(object, "DaemonSet") && !is_kind(object, "Namespace"));
    let looks = ours.map(|object| look(cluster.client.clone(), object));
    let seen: Vec<(String, Option<bool>)> =
        futures::stream::iter(looks).buffered(AT_ONCE).try_collect().await?;
    let is_hidden = seen.iter().any(|(_, is_there)| is_there.is_none());
    let missing: Vec<String> =
        seen.into_iter().filter(|(_, is_there)| *is_there == Some(false)).map(|(title, _)| title).collect();
    Ok(if is_hidden && missing.is_empty() { None } else { Some(missing) })
}

async fn look(client: Client, object: &DynamicObject) -> Result<(String, Option<bool>)> {
    let resource = resource_of(object);
    let api: Api<DynamicObject> = match object.namespace() {
        Some(namespace) => Api::namespaced_with(client, &namespace, &resource),
        None => Api::all_with(client, &resource),
    };
    let found = permitted(api.get_metadata_opt(&object.name_any()).await)?;
    Ok((title(object), found.map(|found| found.is_some())))
}

/// What the agents may not do of what their role is for; `None` when the user may not ask about others.
pub async fn agents_lack(
    cluster: &Cluster,
    objects: &[DynamicObject],
    namespace: &str,
    is_installed: bool,
) -> Result<Option<Vec<Lack>>> {
    let is_role = |object: &&DynamicObject| is_kind(object, "ClusterRole") && object.name_any() == AGENT_ROLE;
    let questions: Vec<Question> =
        objects.iter().filter(|_| is_installed).find(is_role).map(questions_of).unwrap_or_default();
    let groups =
        ["system:serviceaccounts", &format!("system:serviceaccounts:{namespace}")].map(str::to_owned);
    let reviews: Api<SubjectAccessReview> = Api::all(cluster.client.clone());
    let asked = questions.into_iter().map(async |question| {
        let review = SubjectAccessReview {
            spec: SubjectAccessReviewSpec {
                user: Some(format!("system:serviceaccount:{namespace}:{DAEMONSET}")),
                groups: Some(groups.to_vec()),
                resource_attributes: Some(question.attributes()),
                ..SubjectAccessReviewSpec::default()
            },
            ..SubjectAccessReview::default()
        };
        let answer = permitted(reviews.create(&PostParams::default(), &review).await)?;
        Result::Ok((question, answer.map(|answer| answer.status.is_some_and(|s| s.allowed))))
    });
    let answers: Vec<(Question, Option<bool>)> =
        futures::stream::iter(asked).buffered(AT_ONCE).try_collect().await?;
    if answers.iter().any(|(_, answer)| answer.is_none()) {
        return Ok(None);
    }
    Ok(Some(lacks(answers.into_iter().filter(|(_, answer)| *answer == Some(false)).map(|(q, _)| q))))
}

/// The rules of a role, one by one.
fn questions_of(role: &DynamicObject) -> Vec<Question> {
    let texts = |rule: &Value, field: &str| -> Vec<String> {
        let list = rule[field].as_array().into_iter().flatten();
        list.filter_map(Value::as_str).map(str::to_owned).collect()
    };
    let mut questions = Vec::new();
    for rule in role.data["rules"].as_array().into_iter().flatten() {
        for group in texts(rule, "apiGroups") {
            for name in texts(rule, "resources") {
                let (resource, subresource) = match name.split_once('/') {
                    Some((resource, subresource)) => (resource.to_owned(), Some(subresource.to_owned())),
                    None => (name, None),
                };
                questions.extend(texts(rule, "verbs").into_iter().map(|verb| Question {
                    group: group.clone(),
                    resource: resource.clone(),
                    subresource: subresource.clone(),
                    namespace: None,
                    verb,
                }));
            }
        }
    }
    questions
}

/// What the user may not do of what `install` does: it applies each object, so it creates and patches.
pub async fn user_lacks(cluster: &Cluster, objects: &[DynamicObject], is_asked: bool) -> Result<Vec<Lack>> {
    let mut questions = BTreeSet::new();
    let pools = kube::core::ApiResource::erase::<VIPPool>(&());
    let applied = objects.iter().map(|object| (resource_of(object), object.namespace()));
    for (resource, namespace) in applied.chain([(pools, None)]).filter(|_| is_asked) {
        for verb in ["create", "patch"] {
            questions.insert(Question {
                group: resource.group.clone(),
                resource: resource.plural.clone(),
                subresource: None,
                namespace: namespace.clone(),
                verb: verb.to_owned(),
            });
        }
    }
    let reviews: Api<SelfSubjectAccessReview> = Api::all(cluster.client.clone());
    let asked = questions.into_iter().map(async |question| {
        let review = SelfSubjectAccessReview {
            spec: SelfSubjectAccessReviewSpec {
                resource_attributes: Some(question.attributes()),
                ..SelfSubjectAccessReviewSpec::default()
            },
            ..SelfSubjectAccessReview::default()
        };
        let answer = reviews.create(&PostParams::default(), &review).await?;
        Result::Ok((question, answer.status.is_some_and(|status| status.allowed)))
    });
    let answers: Vec<(Question, bool)> = futures::stream::iter(asked).buffered(AT_ONCE).try_collect().await?;
    Ok(lacks(answers.into_iter().filter(|(_, is_allowed)| !is_allowed).map(|(question, _)| question)))
}

/// Refusals by resource.
fn lacks(refused: impl Iterator<Item = Question>) -> Vec<Lack> {
    let mut by_resource: BTreeMap<(String, Option<String>), Vec<String>> = BTreeMap::new();
    for question in refused {
        by_resource.entry((question.title(), question.namespace)).or_default().push(question.verb);
    }
    let lack = |((resource, namespace), verbs): (_, Vec<String>)| Lack {
        resource,
        namespace,
        verbs: verbs.join(","),
    };
    by_resource.into_iter().map(lack).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::manifests::{Settings, render};

    #[test]
    fn what_the_agents_need_is_what_their_role_says() {
        let objects = render(&Settings::default()).unwrap();
        let role = objects
            .iter()
            .find(|object| is_kind(object, "ClusterRole") && object.name_any() == AGENT_ROLE)
            .unwrap();
        let questions = questions_of(role);
        let refused = questions.iter().filter(|question| {
            question.resource == "services" || question.subresource.is_some() && question.verb == "patch"
        });
        let lacks = lacks(refused.cloned());
        assert_eq!(
            (lacks[0].resource.as_str(), lacks[0].verbs.as_str()),
            ("services", "get,list,watch"),
            "{lacks:?}"
        );
        assert!(lacks.iter().any(|lack| lack.resource == "virtualips.kubectl-vip.io/status"), "{lacks:?}");
    }
}
