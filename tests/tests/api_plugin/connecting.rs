//! How the plugin finds its cluster and logs in: as kubectl does, and in words where it cannot.

use std::{
    fs,
    io::{BufRead as _, BufReader, Read as _, Write as _},
    net::{IpAddr, TcpListener, TcpStream},
    os::unix::fs::PermissionsExt as _,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use lab::{Lab, Output, Terminal, command, paths};
use serde_json::{Value, json};

use super::{
    LIMIT,
    agents::{ago, gone, node, report},
    installed, join, refused, scratch, server, vip,
};

/// A token of the ServiceAccount `default`, who may do nothing, and what is said to it.
fn nobody(lab: &Lab) -> (String, &'static str) {
    let token = lab.kubectl(["create", "token", "default", "-n", "default"]).and_then(Output::ok).unwrap();
    let said = "Error from server (Forbidden): user \"system:serviceaccount:default:default\" cannot list \
                vippools.kubectl-vip.io\nhint: kubectl auth can-i list vippools.kubectl-vip.io";
    (token.stdout.trim().to_owned(), said)
}

/// The lab's kubeconfig with another user.
fn kubeconfig(lab: &Lab, file: &Path, user: &Value) {
    let config = ["config", "view", "--minify", "--flatten", "-o", "json"];
    let config = lab.kubectl(config).and_then(Output::ok).unwrap().stdout;
    let mut config: Value = serde_json::from_str(&config).unwrap();
    config["users"][0]["user"] = user.clone();
    fs::write(file, config.to_string()).unwrap();
}

#[test]
fn what_is_configured_wrongly_is_named() {
    let (lab, _guard) = installed();
    let alone = |line: &str, kubeconfig: &str| {
        let mut kubectl = lab.kubectl_command().unwrap();
        kubectl
            .env("KUBECONFIG", kubeconfig)
            .env("HOME", "/nonexistent")
            .env_remove("KUBERNETES_SERVICE_HOST");
        let output = command::run(kubectl.arg("vip").args(line.split_whitespace()), LIMIT).unwrap();
        assert_eq!(output.code, 1, "{output:#?}");
        output.stderr.trim_end().to_owned()
    };
    assert_eq!(
        alone("status", ""),
        "Error: no cluster configured: $KUBECONFIG unset, ~/.kube/config not found\n\
         hint: name a kubeconfig file with --kubeconfig"
    );
    assert_eq!(
        alone("status", "/nonexistent/a:/nonexistent/b"),
        "Error: no cluster configured: $KUBECONFIG names /nonexistent/a not found, /nonexistent/b not found\n\
         hint: name a kubeconfig file with --kubeconfig"
    );
    assert_eq!(
        alone("status --kubeconfig /nonexistent/c", ""),
        "Error: kubeconfig file /nonexistent/c does not exist"
    );
    assert_eq!(
        alone("status --server https://127.0.0.1:1", ""),
        "Error: the API server at https://127.0.0.1:1 does not answer: connection refused"
    );
    let context = refused(lab, "status --context nowhere");
    assert!(context.starts_with("Error: context \"nowhere\" does not exist in "), "{context}");
    assert_eq!(
        refused(lab, "status --as bob"),
        "Error from server (Forbidden): user \"bob\" cannot list virtualips.kubectl-vip.io\n\
         hint: kubectl auth can-i list virtualips.kubectl-vip.io"
    );
    // A list with a file that is not there is as good as without it.
    let mut kubectl = lab.kubectl_command().unwrap();
    kubectl.env("KUBECONFIG", format!("/nonexistent/a:{}", lab.kubeconfig().display()));
    command::run(kubectl.args(["vip", "pool", "list"]), LIMIT).unwrap().ok().unwrap();
}

#[test]
fn an_exec_plugin_logs_in_and_is_told_whether_it_may_ask() {
    let (lab, _guard) = installed();
    let folder = scratch("exec");
    let (token, forbidden) = nobody(lab);
    let (info, plugin, config) = (folder.join("info"), folder.join("login"), folder.join("config"));
    let credential = json!({
        "apiVersion": "client.authentication.k8s.io/v1", "kind": "ExecCredential", "status": {"token": token},
    });
    let script =
        format!("#!/bin/sh\necho \"$KUBERNETES_EXEC_INFO\" > {}\necho '{credential}'\n", info.display());
    fs::write(&plugin, script).unwrap();
    fs::set_permissions(&plugin, fs::Permissions::from_mode(0o755)).unwrap();
    let exec = |command: &str, arguments: &[&str], mode: &str| {
        kubeconfig(
            lab,
            &config,
            &json!({"exec": {
                "apiVersion": "client.authentication.k8s.io/v1", "command": command, "args": arguments, "interactiveMode": mode,
                "installHint": "get it from the one who runs the cluster",
            }}),
        );
    };
    let asked = || refused(lab, &format!("pool list --kubeconfig {}", config.display()));
    let interactive = || {
        let info: Value = serde_json::from_str(&fs::read_to_string(&info).unwrap()).unwrap();
        info["spec"]["interactive"].as_bool().unwrap()
    };

    exec(plugin.to_str().unwrap(), &[], "IfAvailable");
    assert_eq!(asked(), forbidden);
    assert!(!interactive(), "there is no terminal");
    let line = format!("pool list --kubeconfig {}", config.display());
    let (code, screen) = Terminal::start(lab, 200, &[], &line).unwrap().end(LIMIT).unwrap();
    assert!(code == 1 && screen.contains("cannot list vippools") && interactive(), "{code}: {screen}");

    exec(plugin.to_str().unwrap(), &[], "Always");
    assert_eq!(
        asked(),
        format!(
            "Error: cannot log in: {plugin:?} of the kubeconfig asks at the terminal, and standard input is none"
        )
    );
    exec("no-such-login", &[], "Never");
    assert_eq!(
        asked(),
        "Error: cannot log in: \"no-such-login\" of the kubeconfig: executable not found\n\
         hint: get it from the one who runs the cluster"
    );
    exec("sh", &["-c", "echo who are you >&2; exit 3"], "Never");
    assert_eq!(
        asked(),
        "Error: cannot log in: \"sh\" of the kubeconfig failed with exit code 3: who are you"
    );
    exec("echo", &["hello"], "Never");
    let nonsense = asked();
    assert!(nonsense.starts_with("Error: cannot log in: failed to parse auth exec output: "), "{nonsense}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn flags_say_who_asks() {
    let (lab, _guard) = installed();
    let (token, forbidden) = nobody(lab);
    let folder = scratch("flags");
    let config = folder.join("config");
    kubeconfig(lab, &config, &json!({}));
    let line = format!("pool list --kubeconfig {} --token {token}", config.display());
    assert_eq!(refused(lab, &line), forbidden);

    // Only the agent of a node may write its VIPNode, and only what it knows of the pod in its token says which node that is.
    gone(lab, &["extra-1"]);
    report(lab, "extra-1", &node("10.98.28.201/24", 28, &ago(0), "Backup"));
    let line = "node drain extra-1 --dry-run=server --as system:serviceaccount:kubectl-vip:vip-node";
    let other = "--as-user-extra authentication.kubernetes.io/node-name=extra-2";
    let other = vip(lab, &format!("{line} {other}")).unwrap();
    assert!(other.code == 1 && other.stderr.contains("\nError from server (Forbidden): "), "{other:#?}");
    let own = "--as-user-extra authentication.kubernetes.io/node-name=extra-1";
    vip(lab, &format!("{line} {own}")).and_then(Output::ok).unwrap();
    gone(lab, &["extra-1"]);
    assert_eq!(
        refused(lab, "pool list --as-user-extra a=b"),
        "Error: --as-group, --as-uid and --as-user-extra impersonate a user: name it with --as"
    );
    fs::remove_dir_all(folder).unwrap();
}

/// How a proxy is told whom to connect to; it does, and says so.
type Ask = fn(&mut TcpStream) -> Option<TcpStream>;

/// A proxy that counts who asks to be connected.
fn proxy(ask: Ask) -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let count = Arc::new(AtomicUsize::new(0));
    let counter = Arc::clone(&count);
    thread::spawn(move || {
        for mut near in listener.incoming().map_while(Result::ok) {
            let Some(far) = ask(&mut near) else { continue };
            counter.fetch_add(1, Ordering::Relaxed);
            join(&near, &far);
        }
    });
    (port, count)
}

/// By HTTP: RFC 9110, 9.3.6.
fn connect(near: &mut TcpStream) -> Option<TcpStream> {
    let head = BufReader::new(near.try_clone().ok()?);
    let head: Vec<String> = head.lines().map_while(Result::ok).take_while(|line| !line.is_empty()).collect();
    let far = TcpStream::connect(head.first()?.strip_prefix("CONNECT ")?.split(' ').next()?).ok()?;
    near.write_all(b"HTTP/1.1 200 OK\r\n\r\n").ok()?;
    Some(far)
}

/// By SOCKS 5, without a login: RFC 1928.
fn socks(near: &mut TcpStream) -> Option<TcpStream> {
    fn take<const N: usize>(near: &mut TcpStream) -> Option<[u8; N]> {
        let mut bytes = [0; N];
        near.read_exact(&mut bytes).ok().map(|()| bytes)
    }
    let [_, methods] = take(near)?;
    near.read_exact(&mut vec![0; methods.into()]).ok()?;
    near.write_all(&[5, 0]).ok()?;
    let [_, _, _, kind] = take(near)?;
    let host = match kind {
        1 => IpAddr::from(take::<4>(near)?).to_string(),
        4 => IpAddr::from(take::<16>(near)?).to_string(),
        _ => {
            let [length] = take(near)?;
            let mut name = vec![0; length.into()];
            near.read_exact(&mut name).ok()?;
            String::from_utf8(name).ok()?
        }
    };
    let far = TcpStream::connect((host.as_str(), u16::from_be_bytes(take(near)?))).ok()?;
    near.write_all(&[5, 0, 0, 1, 0, 0, 0, 0, 0, 0]).ok()?;
    Some(far)
}

#[test]
fn a_proxy_is_used_unless_the_server_is_an_exception() {
    let (lab, _guard) = installed();
    let server = server(lab);
    let host = server.rsplit_once(':').unwrap().0.to_owned();
    let kinds: [(&str, Ask); 2] = [("http", connect), ("socks5", socks)];
    for (scheme, kind) in kinds {
        let (port, count) = proxy(kind);
        let ask = |except: &str| {
            let mut kubectl = lab.kubectl_command().unwrap();
            kubectl.env("HTTPS_PROXY", format!("{scheme}://127.0.0.1:{port}")).env("NO_PROXY", except);
            command::run(kubectl.args(["vip", "pool", "list"]), LIMIT).and_then(Output::ok).unwrap();
            count.swap(0, Ordering::Relaxed)
        };
        assert!(ask("example.org") > 0, "{scheme}");
        assert_eq!(ask(&format!("example.org,{host}/32")), 0, "{scheme}");
    }
}

#[test]
fn an_oidc_login_is_used_as_long_as_it_is_valid() {
    let (lab, _guard) = installed();
    let (token, forbidden) = nobody(lab);
    let folder = scratch("oidc");
    let config = folder.join("config");
    let login = |token: &str, more: &Value| {
        let mut provider =
            json!({"client-id": "kubernetes", "idp-issuer-url": "https://127.0.0.1:1", "id-token": token});
        provider.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
        kubeconfig(lab, &config, &json!({"auth-provider": {"name": "oidc", "config": provider}}));
        refused(lab, &format!("pool list --kubeconfig {}", config.display()))
    };
    // The token of a ServiceAccount is a JWT with a date, too.
    assert_eq!(login(&token, &json!({})), forbidden);
    // `{}`, `{"exp":1}` and no signature that anybody checks here.
    let (old, expired) = (
        "e30.eyJleHAiOjF9.bm9uZQ",
        "Error: cannot log in to the cluster: the OIDC token of the kubeconfig has expired, and",
    );
    let said = login(old, &json!({}));
    assert_eq!(said, format!("{expired} there is no refresh-token to renew it: log in again"));
    let said = login(old, &json!({"refresh-token": "x", "client-secret": "x"}));
    assert_eq!(said, format!("{expired} could not be renewed: Connection refused"));
    fs::remove_dir_all(folder).unwrap();
}

/// A server that answers each connection with the next of these, and with the last one for ever.
fn server_that_says(answers: Vec<String>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    thread::spawn(move || {
        let mut left = answers.iter().peekable();
        for mut near in listener.incoming().map_while(Result::ok) {
            // What is asked does not matter, it may even be TLS.
            let _ = near.read(&mut [0; 8192]);
            let Some(answer) = left.peek().copied() else { return };
            let _ = near.write_all(answer.as_bytes());
            if left.len() > 1 {
                left.next();
            }
        }
    });
    port
}

fn answer(status: &str, kind: &str, body: &str) -> String {
    let length = body.len();
    format!(
        "HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {length}\r\nConnection: close\r\n\r\n{body}"
    )
}

#[test]
fn what_is_no_api_server_or_busy_is_told_in_words() {
    let (lab, _guard) = installed();
    let ask = |scheme: &str, port: u16| {
        let line = format!("pool list --server {scheme}://127.0.0.1:{port}");
        command::run(lab.kubectl_command().unwrap().args(["vip"]).args(line.split(' ')), LIMIT).unwrap()
    };
    let list = r#"{"apiVersion": "kubectl-vip.io/v1alpha1", "kind": "List", "metadata": {}, "items": []}"#;
    let busy = answer("429 Too Many Requests", "text/plain", "later");
    let port = server_that_says(vec![busy, answer("200 OK", "application/json", list)]);
    let output = ask("http", port);
    assert_eq!((output.code, output.stderr.trim_end()), (0, "No pools found."), "{output:#?}");

    let page = "<html><body>Please log in</body></html>";
    let port = server_that_says(vec![answer("502 Bad Gateway", "text/html", page)]);
    let said = ask("http", port).stderr;
    assert_eq!(
        said.trim_end(),
        "Error from server (HTTP 502): a page in HTML: something else may stand in front of the API server"
    );
    let port = server_that_says(vec![answer("200 OK", "text/html", page)]);
    let said = ask("http", port).stderr;
    assert_eq!(
        said.trim_end(),
        format!(
            "Error: the API server at http://127.0.0.1:{port} answers what no API server says: is something else at this address?"
        )
    );
    let said = ask("https", port).stderr;
    assert_eq!(
        said.trim_end(),
        format!("Error: the API server at https://127.0.0.1:{port} does not speak TLS: is it http:// there?")
    );
}

#[test]
fn files_of_the_connection_and_names_that_cannot_be_are_told_in_words() {
    let (lab, _guard) = installed();
    let folder = scratch("words");
    let text = folder.join("text");
    fs::write(&text, "hello\n").unwrap();
    let said = refused(lab, &format!("pool list --kubeconfig {}", text.display()));
    assert_eq!(
        said,
        format!("Error: kubeconfig file {} cannot be read: it is no kubeconfig", text.display())
    );
    for line in [
        "pool list --certificate-authority /nonexistent/ca",
        "pool list --client-certificate /nonexistent/c --client-key /nonexistent/k",
        "pool list --kubeconfig /",
        "pool list -v high",
        "status -n a_b",
        "status svc/Web",
    ] {
        let said = refused(lab, line);
        for word in ["os error", "struct", "digit found", "uri", "NotFound", "IsADirectory"] {
            assert!(!said.contains(word), "{line}: {said}");
        }
    }
    // The first file chooses no context, so the second one may.
    let (empty, full) = (folder.join("empty"), lab.kubeconfig().display().to_string());
    let none = json!({"apiVersion": "v1", "kind": "Config", "current-context": "", "contexts": [], "clusters": [],
                      "users": []});
    fs::write(&empty, none.to_string()).unwrap();
    let mut kubectl = lab.kubectl_command().unwrap();
    kubectl.env("KUBECONFIG", format!("{}:{full}", empty.display()));
    command::run(kubectl.args(["vip", "pool", "list"]), LIMIT).unwrap().ok().unwrap();
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn certificates_and_the_order_of_kubeconfigs_are_kubectls() {
    let (lab, _guard) = installed();
    let folder = scratch("certificates");
    let view = |path: &str| {
        let path = format!("jsonpath={{{path}}}");
        lab.kubectl(["config", "view", "--raw", "--minify", "-o", &path]).and_then(Output::ok).unwrap().stdout
    };
    let file = |name: &str, path: &str| {
        let target = folder.join(name);
        let decode = format!("printf %s '{}' | base64 -d > {}", view(path), target.display());
        command::words(&["sh", "-c", &decode]).unwrap();
        target.display().to_string()
    };
    let authority = file("ca", ".clusters[0].cluster.certificate-authority-data");
    let certificate = file("crt", ".users[0].user.client-certificate-data");
    let key = file("key", ".users[0].user.client-key-data");
    let server = server(lab);
    let bare = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "bare",
        "contexts": [{"name": "bare", "context": {"cluster": "bare"}}],
        "clusters": [{"name": "bare", "cluster": {"server": format!("https://{server}")}}],
    });
    let config = folder.join("config");
    fs::write(&config, bare.to_string()).unwrap();
    let flags =
        format!("--certificate-authority {authority} --client-certificate {certificate} --client-key {key}");
    let line = format!("pool list --request-timeout 30s --kubeconfig {} {flags}", config.display());
    vip(lab, &line).and_then(Output::ok).unwrap();
    let other = refused(lab, &format!("{line} --as bob --as-uid 7"));
    assert!(other.starts_with("Error from server (Forbidden): user \"bob\" cannot list "), "{other}");
    // The first file that names a thing wins.
    let listed = |first: &str, second: &str| {
        let mut kubectl = lab.kubectl_command().unwrap();
        kubectl.env("KUBECONFIG", format!("{first}:{second}"));
        command::run(kubectl.args(["vip", "pool", "list"]), LIMIT).unwrap().code
    };
    let (config, whole) = (config.display().to_string(), lab.kubeconfig().display().to_string());
    assert_eq!((listed(&whole, &config), listed(&config, &whole)), (0, 1));
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn inside_a_pod_the_service_account_asks() {
    let (lab, _guard) = installed();
    let (token, forbidden) = nobody(lab);
    let (folder, server) = (scratch("pod"), server(lab));
    let (host, port) = server.rsplit_once(':').unwrap();
    let authority = "jsonpath={.clusters[0].cluster.certificate-authority-data}";
    let authority = lab.kubectl(["config", "view", "--raw", "--minify", "-o", authority]);
    let authority = authority.and_then(Output::ok).unwrap().stdout;
    // What the kubelet mounts, on a file system that only this process sees.
    let script = format!(
        "set -e; mount -t tmpfs none /run; mkdir -p /run/secrets/kubernetes.io/serviceaccount; \
         cd /run/secrets/kubernetes.io/serviceaccount; echo '{authority}' | base64 -d > ca.crt; printf %s '{token}' > token; \
         printf default > namespace; exec {} pool list",
        paths::target().join("debug/kubectl-vip").display()
    );
    let mut pod = std::process::Command::new("unshare");
    pod.args(["--mount", "sh", "-c", &script])
        .current_dir(&folder)
        .env("KUBECONFIG", "")
        .env("HOME", &folder);
    pod.env("KUBERNETES_SERVICE_HOST", host).env("KUBERNETES_SERVICE_PORT", port);
    let output = command::run(&mut pod, LIMIT).unwrap();
    assert_eq!((output.code, output.stderr.trim_end()), (1, forbidden), "{output:#?}");
    fs::remove_dir_all(folder).unwrap();
}

#[test]
fn a_server_with_a_certificate_of_somebody_unknown_is_not_trusted() {
    let (lab, _guard) = installed();
    let folder = scratch("unknown");
    let config = folder.join("config");
    let server = server(lab);
    let plain = json!({
        "apiVersion": "v1", "kind": "Config", "current-context": "it",
        "contexts": [{"name": "it", "context": {"cluster": "it"}}],
        "clusters": [{"name": "it", "cluster": {"server": format!("https://{server}")}}],
    });
    fs::write(&config, plain.to_string()).unwrap();
    let said = refused(lab, &format!("pool list --kubeconfig {}", config.display()));
    assert_eq!(
        said,
        format!(
            "Error: the API server at https://{server} is not trusted: its certificate is signed by an unknown authority\n\
             hint: name the authority's certificate with --certificate-authority"
        )
    );
    fs::remove_dir_all(folder).unwrap();
}
