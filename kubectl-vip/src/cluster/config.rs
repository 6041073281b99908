//! Where the cluster is and who is asking: kubeconfig files, flags over them, or the pod this runs in.
//!
//! Files of a `KUBECONFIG` list that do not exist are skipped, as kubectl does; the client library would fail.

use std::io::IsTerminal as _;
use std::path::{Path, PathBuf};
use std::time::Duration;

use kube::Config;
use kube::config::{
    AuthInfo, Cluster, Context, KubeConfigOptions, Kubeconfig, KubeconfigError, NamedAuthInfo, NamedCluster,
    NamedContext,
};
use secrecy::SecretString;

use super::{login, proxy};
use crate::cli::Connection;
use crate::exit::{Failure, Result, plain};
use crate::suggest;

/// A configuration, and the context that it comes from.
pub struct Source {
    /// What the client is made from.
    pub config: Config,
    /// Name of the context.
    pub context: Option<String>,
}

/// Finds the configuration for these flags.
pub async fn load(connection: &Connection) -> Result<Source> {
    let files = Files::find(connection)?;
    let in_pod = std::env::var_os("KUBERNETES_SERVICE_HOST").is_some();
    let mut source = match files.read()? {
        Some(kubeconfig) => from_kubeconfig(kubeconfig, connection, &files.names()).await?,
        None if connection.server.is_some() => {
            from_kubeconfig(Kubeconfig::default(), connection, &files.names()).await?
        }
        None if in_pod => {
            let config =
                Config::incluster().map_err(|e| Failure::new(format!("inside a pod, but {}", chain(&e))))?;
            Source { config, context: None }
        }
        None => return Err(files.missing()),
    };
    let config = &mut source.config;
    if let Some(user) = &connection.as_user {
        config.auth_info.impersonate = Some(user.clone());
    }
    if !connection.as_group.is_empty() {
        config.auth_info.impersonate_groups = Some(connection.as_group.clone());
    }
    if let Some(uid) = &connection.as_uid {
        config.auth_info.impersonate_uid = Some(uid.clone());
    }
    for (key, value) in &connection.as_user_extra {
        let extra = config.auth_info.impersonate_user_extra.get_or_insert_default();
        extra.entry(key.clone()).or_default().push(value.clone());
    }
    let user = &config.auth_info;
    if user.impersonate.is_none()
        && (user.impersonate_groups.is_some()
            || user.impersonate_uid.is_some()
            || user.impersonate_user_extra.is_some())
    {
        return Err(Failure::new(
            "--as-group, --as-uid and --as-user-extra impersonate a user: name it with --as",
        ));
    }
    if let Some(timeout) = connection.request_timeout.filter(|timeout| *timeout > Duration::ZERO) {
        config.connect_timeout = Some(timeout);
        config.read_timeout = Some(timeout);
        config.reset_reader_on_write = true;
    }
    Ok(source)
}

/// The names of all contexts, clusters or users of the kubeconfig.
pub fn names(connection: &Connection, kind: &str) -> Result<Vec<String>> {
    let kubeconfig = Files::find(connection)?.read()?.unwrap_or_default();
    Ok(match kind {
        "context" => kubeconfig.contexts.into_iter().map(|context| context.name).collect(),
        "cluster" => kubeconfig.clusters.into_iter().map(|cluster| cluster.name).collect(),
        _ => kubeconfig.auth_infos.into_iter().map(|user| user.name).collect(),
    })
}

/// The kubeconfig files that count, in their order.
#[derive(Debug)]
struct Files {
    paths: Vec<PathBuf>,
    origin: Origin,
}

#[derive(Debug, PartialEq, Eq)]
enum Origin {
    Flag,
    Environment,
    Home,
}

impl Files {
    fn find(connection: &Connection) -> Result<Self> {
        if let Some(path) = &connection.kubeconfig {
            if !path.exists() {
                return Err(Failure::new(format!("kubeconfig file {} does not exist", path.display())));
            }
            return Ok(Self { paths: vec![path.clone()], origin: Origin::Flag });
        }
        let listed: Vec<PathBuf> = std::env::var_os("KUBECONFIG")
            .map(|list| std::env::split_paths(&list).filter(|path| !path.as_os_str().is_empty()).collect())
            .unwrap_or_default();
        if !listed.is_empty() {
            return Ok(Self { paths: listed, origin: Origin::Environment });
        }
        let home = std::env::home_dir().map(|home| home.join(".kube").join("config"));
        Ok(Self { paths: home.into_iter().collect(), origin: Origin::Home })
    }

    /// The files merged, the first to name a thing wins; `None` when there are none.
    fn read(&self) -> Result<Option<Kubeconfig>> {
        let mut merged: Option<Kubeconfig> = None;
        for path in self.paths.iter().filter(|path| path.exists()) {
            let unreadable =
                |error| Failure::new(format!("kubeconfig file {} cannot be read: {error}", path.display()));
            let mut next = Kubeconfig::read_from(path).map_err(|error| match error {
                KubeconfigError::Parse(error) => {
                    let text = error.to_string();
                    // What it is instead does not matter. Of YAML that is broken the first line says where.
                    let is_other =
                        ["expected struct", "expected mapping"].iter().any(|word| text.contains(word));
                    let place = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
                    unreadable(if is_other { "it is no kubeconfig".to_owned() } else { place.to_owned() })
                }
                error => unreadable(chain(&error)),
            })?;
            // An empty name chooses nothing, as with kubectl, and leaves the choice to the next file.
            next.current_context = next.current_context.filter(|name| !name.is_empty());
            merged = Some(match merged {
                Some(before) => before.merge(next).map_err(|e| unreadable(chain(&e)))?,
                None => next,
            });
        }
        Ok(merged.filter(|config| !config.contexts.is_empty() || !config.clusters.is_empty()))
    }

    fn names(&self) -> String {
        self.paths.iter().map(|path| path.display().to_string()).collect::<Vec<_>>().join(", ")
    }

    fn missing(&self) -> Failure {
        let state = |path: &Path| if path.exists() { "is empty" } else { "not found" };
        let why = match self.origin {
            Origin::Home => {
                let state = self.paths.first().map_or("not found", |path| state(path));
                format!("$KUBECONFIG unset, ~/.kube/config {state}")
            }
            Origin::Environment => {
                let states: Vec<String> =
                    self.paths.iter().map(|path| format!("{} {}", path.display(), state(path))).collect();
                format!("$KUBECONFIG names {}", states.join(", "))
            }
            Origin::Flag => format!("{} is empty", self.names()),
        };
        Failure::new(format!("no cluster configured: {why}")).hint("name a kubeconfig file with --kubeconfig")
    }
}

/// One context with the flags laid over it.
async fn from_kubeconfig(kubeconfig: Kubeconfig, flags: &Connection, files: &str) -> Result<Source> {
    let chosen =
        flags.context.clone().or_else(|| kubeconfig.current_context.clone()).filter(|name| !name.is_empty());
    let context = match &chosen {
        Some(name) => find(name, "context", files, &kubeconfig.contexts, |c| &c.name, |c| c.context.clone())?,
        None if flags.server.is_some() || flags.cluster.is_some() => Context::default(),
        None => {
            let known: Vec<&str> = kubeconfig.contexts.iter().map(|c| c.name.as_str()).collect();
            return Err(Failure::new(format!(
                "no context is chosen in {files} (it has {})",
                known.join(", ")
            ))
            .hint("choose one with --context, or kubectl config use-context"));
        }
    };
    let cluster_name = flags.cluster.clone().unwrap_or_else(|| context.cluster.clone());
    let cluster = match cluster_name.is_empty() && flags.server.is_some() {
        true => Cluster::default(),
        false => {
            find(&cluster_name, "cluster", files, &kubeconfig.clusters, |c| &c.name, |c| c.cluster.clone())?
        }
    };
    // A context may name a user that is not there: kubectl goes on without credentials, unless a flag names it.
    let user = match (&flags.user, &context.user) {
        (Some(name), _) => {
            find(name, "user", files, &kubeconfig.auth_infos, |u| &u.name, |u| u.auth_info.clone())?
        }
        (None, Some(name)) => kubeconfig
            .auth_infos
            .iter()
            .find(|user| &user.name == name)
            .and_then(|user| user.auth_info.clone())
            .unwrap_or_default(),
        (None, None) => AuthInfo::default(),
    };
    let (cluster, mut user) = (with_cluster_flags(cluster, flags), with_user_flags(user, flags));
    login::settle(&mut user, std::io::stdin().is_terminal())?;
    if cluster.server.as_deref().unwrap_or_default().is_empty() {
        return Err(Failure::new(format!("cluster {cluster_name:?} in {files} has no server"))
            .hint("name it with --server"));
    }

    let url = cluster.server.clone().unwrap_or_default();
    let proxy = proxy::choose(cluster.proxy_url.as_deref(), &url, |name| std::env::var(name).ok())?;
    let only = "chosen".to_owned();
    let effective = Kubeconfig {
        clusters: vec![NamedCluster { name: only.clone(), cluster: Some(cluster), ..Default::default() }],
        auth_infos: vec![NamedAuthInfo { name: only.clone(), auth_info: Some(user), ..Default::default() }],
        contexts: vec![NamedContext {
            name: only.clone(),
            context: Some(Context { cluster: only.clone(), user: Some(only.clone()), ..context }),
            ..Default::default()
        }],
        current_context: Some(only),
        ..Default::default()
    };
    let mut config = Config::from_custom_kubeconfig(effective, &KubeConfigOptions::default())
        .await
        .map_err(|error| Failure::new(format!("{}: {}", chosen.as_deref().unwrap_or(&url), chain(&error))))?;
    config.proxy_url = proxy;
    Ok(Source { config, context: chosen })
}

fn find<T, V>(
    name: &str,
    kind: &str,
    files: &str,
    list: &[T],
    name_of: impl Fn(&T) -> &String,
    value: impl Fn(&T) -> Option<V>,
) -> Result<V> {
    list.iter().find(|entry| name_of(entry) == name).and_then(value).ok_or_else(|| {
        let known = list.iter().map(|entry| name_of(entry).as_str());
        Failure::new(format!("{kind} {name:?} does not exist in {files}{}", suggest::ending(name, known)))
    })
}

fn with_cluster_flags(mut cluster: Cluster, flags: &Connection) -> Cluster {
    if let Some(server) = &flags.server {
        let scheme = if server.contains("://") { "" } else { "https://" };
        cluster.server = Some(format!("{scheme}{server}"));
    }
    if let Some(file) = &flags.certificate_authority {
        cluster.certificate_authority = Some(file.display().to_string());
        cluster.certificate_authority_data = None;
    }
    if let Some(skip) = flags.insecure_skip_tls_verify {
        cluster.insecure_skip_tls_verify = Some(skip);
    }
    if let Some(name) = &flags.tls_server_name {
        cluster.tls_server_name = Some(name.clone());
    }
    cluster
}

fn with_user_flags(mut user: AuthInfo, flags: &Connection) -> AuthInfo {
    if let Some(token) = &flags.token {
        user.token = Some(SecretString::from(token.clone()));
        user.token_file = None;
        user.exec = None;
        user.auth_provider = None;
    }
    if let Some(name) = &flags.username {
        user.username = Some(name.clone());
    }
    if let Some(password) = &flags.password {
        user.password = Some(SecretString::from(password.clone()));
    }
    if flags.username.is_some() || flags.password.is_some() {
        user.token = None;
        user.token_file = None;
        user.exec = None;
        user.auth_provider = None;
    }
    if let Some(file) = &flags.client_certificate {
        user.client_certificate = Some(file.display().to_string());
        user.client_certificate_data = None;
    }
    if let Some(file) = &flags.client_key {
        user.client_key = Some(file.display().to_string());
        user.client_key_data = None;
    }
    user
}

/// An error and its causes in one line, without saying the same twice, in words for people.
pub fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        let next = cause.to_string();
        if !text.contains(&next) {
            text = format!("{text}: {next}");
        }
        source = cause.source();
    }
    plain(&text)
}

#[cfg(test)]
mod tests {
    use super::*;

    const FILE: &str = r#"
apiVersion: v1
kind: Config
current-context: prod
contexts:
- name: prod
  context: {cluster: p, user: alice, namespace: shop}
- name: lab
  context: {cluster: l, user: nobody}
clusters:
- name: p
  cluster: {server: "https://10.0.0.1:6443", proxy-url: "http://10.0.0.9:3128"}
- name: l
  cluster: {server: "https://10.0.0.2:6443"}
users:
- name: alice
  user: {token: secret, as-uid: "7"}
"#;

    async fn load_with(flags: Connection) -> std::result::Result<Source, String> {
        let kubeconfig = Kubeconfig::from_yaml(FILE).unwrap();
        from_kubeconfig(kubeconfig, &flags, "FILE").await.map_err(|failure| failure.to_string())
    }

    #[tokio::test]
    async fn flags_lie_over_the_file() {
        let plain = load_with(Connection::default()).await.unwrap();
        assert_eq!(plain.config.cluster_url.to_string(), "https://10.0.0.1:6443/");
        assert_eq!(plain.config.default_namespace, "shop");
        assert_eq!(plain.context.as_deref(), Some("prod"));
        assert_eq!(plain.config.auth_info.impersonate_uid.as_deref(), Some("7"));
        assert_eq!(
            plain.config.proxy_url.map(|url| url.to_string()).as_deref(),
            Some("http://10.0.0.9:3128/")
        );

        let other = load_with(Connection {
            context: Some("lab".into()),
            server: Some("10.0.0.3:6443".into()),
            token: Some("t".into()),
            insecure_skip_tls_verify: Some(true),
            ..Default::default()
        })
        .await
        .unwrap();
        assert_eq!(other.config.cluster_url.to_string(), "https://10.0.0.3:6443/");
        assert!(other.config.accept_invalid_certs);
        assert!(other.config.auth_info.token.is_some());
        assert_eq!(other.config.default_namespace, "default");
    }

    #[tokio::test]
    async fn names_that_are_not_there_get_a_suggestion() {
        let context = Connection { context: Some("prdo".into()), ..Default::default() };
        assert_eq!(
            load_with(context).await.err().unwrap(),
            r#"Error: context "prdo" does not exist in FILE; did you mean "prod"?"#
        );
        let cluster = Connection { cluster: Some("x".into()), ..Default::default() };
        assert_eq!(load_with(cluster).await.err().unwrap(), r#"Error: cluster "x" does not exist in FILE"#);
        let user = Connection { user: Some("alcie".into()), ..Default::default() };
        assert!(load_with(user).await.err().unwrap().ends_with(r#"did you mean "alice"?"#));
    }

    #[test]
    fn nothing_configured() {
        let files = Files { paths: vec![PathBuf::from("/nonexistent/.kube/config")], origin: Origin::Home };
        assert_eq!(
            files.missing().to_string(),
            "Error: no cluster configured: $KUBECONFIG unset, ~/.kube/config not found\nhint: name a kubeconfig file with --kubeconfig"
        );
        assert!(files.read().unwrap().is_none());
    }
}
