//! Which proxy leads to the API server: the kubeconfig's, else `HTTPS_PROXY` unless `NO_PROXY` has the server.
//!
//! The client library compares `NO_PROXY` with the proxy instead of the server, so the choice is made here, by the
//! rules of Go's `http.ProxyFromEnvironment`, which are kubectl's.

use std::net::IpAddr;

use http::Uri;
use ipnet::IpNet;

use crate::exit::{Failure, Result};

/// The proxy for a server; `env` reads an environment variable.
pub fn choose(
    configured: Option<&str>,
    server: &str,
    env: impl Fn(&str) -> Option<String>,
) -> Result<Option<Uri>> {
    let read = |upper: &str, lower: &str| {
        env(upper).filter(|v| !v.is_empty()).or_else(|| env(lower).filter(|v| !v.is_empty()))
    };
    if let Some(proxy) = configured.filter(|proxy| !proxy.is_empty()) {
        return parse(proxy, "proxy-url of the kubeconfig").map(Some);
    }
    let server: Uri =
        server.parse().map_err(|_| Failure::new(format!("{server:?} is not the URL of an API server")))?;
    let names = match server.scheme_str() {
        Some("http") => ("HTTP_PROXY", "http_proxy"),
        _ => ("HTTPS_PROXY", "https_proxy"),
    };
    let Some(proxy) = read(names.0, names.1) else { return Ok(None) };
    let host = server.host().unwrap_or_default().trim_matches(['[', ']']).to_lowercase();
    let port = server.port_u16().unwrap_or(if names.0 == "HTTP_PROXY" { 80 } else { 443 });
    if is_local(&host) || read("NO_PROXY", "no_proxy").is_some_and(|list| excepts(&list, &host, port)) {
        return Ok(None);
    }
    parse(&proxy, names.0).map(Some)
}

fn parse(text: &str, origin: &str) -> Result<Uri> {
    let scheme = if text.contains("://") { "" } else { "http://" };
    format!("{scheme}{text}")
        .parse()
        .map_err(|_| Failure::new(format!("{origin}: {text:?} is not the URL of a proxy")))
}

fn is_local(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// Whether a `NO_PROXY` list has the host: `*`, addresses, CIDRs, domains with their subdomains, each with a port or not.
fn excepts(list: &str, host: &str, port: u16) -> bool {
    let address = host.parse::<IpAddr>().ok();
    list.split(',').map(|entry| entry.trim().to_lowercase()).filter(|entry| !entry.is_empty()).any(|entry| {
        if entry == "*" {
            return true;
        }
        if let Ok(network) = entry.parse::<IpNet>() {
            return address.is_some_and(|address| network.contains(&address));
        }
        let entry = match entry.rsplit_once(':') {
            Some((name, number)) if entry.parse::<IpAddr>().is_err() && number.parse::<u16>().is_ok() => {
                if number.parse() != Ok(port) {
                    return false;
                }
                name.to_owned()
            }
            _ => entry,
        };
        let name = entry.trim_matches(['[', ']']);
        if let Ok(excepted) = name.parse::<IpAddr>() {
            return address == Some(excepted);
        }
        match name.strip_prefix("*.").or_else(|| name.strip_prefix('.')) {
            // A leading dot means subdomains only.
            Some(domain) => host.ends_with(&format!(".{domain}")),
            None => host == name || host.ends_with(&format!(".{name}")),
        }
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn chosen(server: &str, no_proxy: &str) -> Option<String> {
        let env = |name: &str| match name {
            "HTTPS_PROXY" => Some("proxy.example:3128".to_owned()),
            "no_proxy" => Some(no_proxy.to_owned()),
            _ => None,
        };
        choose(None, server, env).unwrap().map(|uri| uri.to_string())
    }

    #[test]
    fn no_proxy_is_compared_with_the_server() {
        let proxy = Some("http://proxy.example:3128/".to_owned());
        assert_eq!(chosen("https://10.0.0.1:6443", ""), proxy);
        assert_eq!(chosen("https://10.0.0.1:6443", "10.0.0.0/8"), None);
        assert_eq!(chosen("https://10.0.0.1:6443", "10.0.0.1:6443"), None);
        assert_eq!(chosen("https://10.0.0.1:6443", "10.0.0.1:443, 10.0.0.2,,"), proxy);
        assert_eq!(chosen("https://api.lab.example:6443", "LAB.example"), None);
        assert_eq!(chosen("https://api.lab.example", ".lab.example"), None);
        assert_eq!(chosen("https://lab.example", ".lab.example"), proxy);
        assert_eq!(chosen("https://notlab.example", "lab.example"), proxy);
        assert_eq!(chosen("https://[fd00::1]:6443", "fd00::/8"), None);
        assert_eq!(chosen("https://x.example", "*"), None);
        assert_eq!(chosen("https://127.0.0.1:6443", ""), None, "never for this machine");
        assert_eq!(chosen("http://x.example", ""), None, "HTTPS_PROXY is for https");
    }

    #[test]
    fn the_kubeconfig_wins() {
        let env = |_: &str| Some("*".to_owned());
        let uri = choose(Some("http://10.0.0.9:3128"), "https://10.0.0.1", env).unwrap();
        assert_eq!(uri.unwrap().to_string(), "http://10.0.0.9:3128/");
        assert!(choose(Some("http://a b"), "https://10.0.0.1", env).is_err());
    }
}
