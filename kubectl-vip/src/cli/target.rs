//! What a command is about: a Service (`svc/web`, `svc web`) or a virtual IP (`192.168.10.241`).

use std::net::IpAddr;
use std::slice;

use vip_core::pool::parse_address;

use crate::exit::{Failure, Result};

/// A Service of the namespace in question, or a virtual IP.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Target {
    /// Name of a Service.
    Service(String),
    /// An address.
    Vip(IpAddr),
}

impl Target {
    /// Reads one or two words.
    pub fn parse(words: &[String]) -> Result<Self> {
        let (kind, name) = match words {
            [one] => match one.split_once('/') {
                Some((kind, name)) => (kind, name),
                None => return vip(one).ok_or_else(|| unclear(one)),
            },
            [kind, name] => (kind.as_str(), name.as_str()),
            _ => return Err(Failure::new("name one Service (svc/NAME) or one virtual IP")),
        };
        match kind.to_ascii_lowercase().as_str() {
            _ if kind.contains('/') => Err(Failure::new("name one Service (svc/NAME) or one virtual IP")),
            _ if name.is_empty() || name.contains('/') => Err(unclear(&words.join(" "))),
            "svc" | "service" | "services" => self::name(name)
                .map(Self::Service)
                .map_err(|why| Failure::new(format!("{name:?} is not the name of a Service: {why}"))),
            "vip" | "virtualip" | "virtualips" | "virtualip.kubectl-vip.io" | "virtualips.kubectl-vip.io" => {
                vip(name).ok_or_else(|| Failure::new(format!("{name:?} is not an IP address")))
            }
            other => Err(Failure::new(format!("there are no virtual IPs for a {other:?}"))
                .hint(format!("name the Service: svc/{name}"))),
        }
    }

    /// Reads several, as kubectl does: `svc/web svc/api`, or a kind and then names, `svc web api`. Each counts once.
    pub fn all(words: &[String]) -> Result<Vec<Self>> {
        let targets: Vec<Self> = match words {
            [kind, _, ..] if !kind.contains('/') && vip(kind).is_none() => {
                let names = words[1..].iter().map(|name| Self::parse(&[kind.clone(), name.clone()]));
                names.collect::<Result<_>>()?
            }
            _ => words.iter().map(|word| Self::parse(slice::from_ref(word))).collect::<Result<_>>()?,
        };
        let mut all = Vec::new();
        targets.into_iter().for_each(|target| {
            if !all.contains(&target) {
                all.push(target);
            }
        });
        Ok(all)
    }

    /// Reads the names of Services, and nothing else.
    pub fn services(words: &[String]) -> Result<Vec<String>> {
        let name = |target| match target {
            Self::Service(name) => Ok(name),
            Self::Vip(address) => Err(Failure::new(format!("{address} is an address, not a Service"))
                .hint(format!("kubectl vip expose svc/NAME --ip {address}"))),
        };
        Self::all(words)?.into_iter().map(name).collect()
    }
}

/// Reads the name of a Service or a namespace.
pub fn name(text: &str) -> std::result::Result<String, String> {
    // Older objects may have names that the rules of today refuse: only what no name ever had is stopped.
    let fits = |letter: char| letter.is_ascii_lowercase() || letter.is_ascii_digit() || "-.".contains(letter);
    match text.chars().find(|letter| !fits(*letter)) {
        None => Ok(text.to_owned()),
        Some(letter) => Err(format!("names have lower case letters, digits and `-`, not {letter:?}")),
    }
}

fn vip(text: &str) -> Option<Target> {
    // The name of an IPv6 VirtualIP has `-` for `:`.
    parse_address(text).or_else(|_| parse_address(&text.replace('-', ":"))).ok().map(Target::Vip)
}

fn unclear(text: &str) -> Failure {
    let failure = Failure::new(format!("{text:?} names neither a Service (svc/NAME) nor a virtual IP"));
    // The commonest slip: what could be the name of a Service is no address.
    let is_name = text.starts_with(|c: char| c.is_ascii_lowercase())
        && text.chars().all(|c| c.is_ascii_lowercase() || c.is_ascii_digit() || c == '-');
    if is_name { failure.hint(format!("if it is a Service: svc/{text}")) } else { failure }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &[&str]) -> std::result::Result<Target, String> {
        let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
        Target::parse(&words).map_err(|failure| failure.to_string())
    }

    #[test]
    fn kubectls_ways_to_name_a_thing() {
        let web = Ok(Target::Service("web".to_owned()));
        for words in [&["svc/web"][..], &["service/web"], &["svc", "web"], &["services", "web"]] {
            assert_eq!(parse(words), web, "{words:?}");
        }
        let vip = Ok(Target::Vip("10.0.0.9".parse().unwrap()));
        for words in [&["10.0.0.9"][..], &["vip/10.0.0.9"], &["vip", "10.0.0.9"]] {
            assert_eq!(parse(words), vip, "{words:?}");
        }
        assert_eq!(parse(&["fd87-0-0-0-0-0-2-50"]), Ok(Target::Vip("fd87::2:50".parse().unwrap())));
    }

    #[test]
    fn several_at_once() {
        let all = |words: &[&str]| {
            let words: Vec<String> = words.iter().map(|w| (*w).to_owned()).collect();
            Target::all(&words).map_err(|failure| failure.to_string())
        };
        let both = Ok(["web", "api"].map(|name| Target::Service(name.to_owned())).to_vec());
        assert_eq!(all(&["svc/web", "service/api", "svc/web"]), both);
        assert_eq!(all(&["svc", "web", "api"]), both);
        assert_eq!(all(&["10.0.0.9", "svc/web"]).unwrap().len(), 2);
        assert!(all(&["svc/web", "api"]).unwrap_err().contains("\"api\" names neither"));
    }

    #[test]
    fn others_are_told_how() {
        assert_eq!(
            parse(&["web"]).unwrap_err(),
            "Error: \"web\" names neither a Service (svc/NAME) nor a virtual IP\nhint: if it is a Service: svc/web"
        );
        assert_eq!(
            parse(&["deploy/web"]).unwrap_err(),
            "Error: there are no virtual IPs for a \"deploy\"\nhint: name the Service: svc/web"
        );
        assert!(parse(&["svc/"]).is_err());
        assert!(parse(&["svc/a/b"]).is_err());
        assert_eq!(
            parse(&["svc/a", "svc/b"]).unwrap_err(),
            "Error: name one Service (svc/NAME) or one virtual IP"
        );
        assert_eq!(
            parse(&["svc/my web"]).unwrap_err(),
            "Error: \"my web\" is not the name of a Service: names have lower case letters, digits and `-`, not ' '"
        );
        assert!(parse(&["vip/web"]).unwrap_err().contains("not an IP address"));
    }
}
