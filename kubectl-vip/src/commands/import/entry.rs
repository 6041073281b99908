//! An entry of kube-keepalived-vip's ConfigMap.

use std::net::IpAddr;

use vip_core::api::ServiceRef;
use vip_core::pool::parse_address;

/// How kube-keepalived-vip sends traffic to the pods.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// By the node, in both directions.
    Nat,
    /// By the node on the way there, straight on the way back.
    Dr,
    /// By HAProxy, with a PROXY protocol header.
    Proxy,
}

/// An address and what answers there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Entry {
    /// The address.
    pub address: IpAddr,
    /// The Service; none: whoever listens on the node.
    pub service: Option<ServiceRef>,
    /// How traffic gets to its pods.
    pub method: Method,
}

impl Entry {
    /// Reads a key and its value; the error is why it cannot be used.
    pub fn parse(key: &str, value: &str) -> Result<Self, String> {
        let address = parse_address(key.trim()).map_err(|error| error.to_string())?;
        let value = value.trim();
        if value.is_empty() {
            return Ok(Self { address, service: None, method: Method::Nat });
        }
        let (service, method) = match value.split_once(':') {
            Some((service, method)) => (service, method),
            None => (value, "NAT"),
        };
        let method = match method {
            "NAT" | "" => Method::Nat,
            "DR" => Method::Dr,
            "PROXY" => Method::Proxy,
            other => return Err(format!("{other:?} is none of the methods NAT, DR and PROXY")),
        };
        match service.split_once('/') {
            Some((namespace, name)) if !namespace.is_empty() && !name.is_empty() && !name.contains('/') => {
                let service = ServiceRef { namespace: namespace.to_owned(), name: name.to_owned() };
                Ok(Self { address, service: Some(service), method })
            }
            _ => Err(format!("{service:?} is not namespace/service")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_forms_that_kube_keepalived_vip_reads() {
        let parsed = |value: &str| {
            let entry = Entry::parse("10.4.0.50", value).unwrap();
            (entry.service.map(|service| service.to_string()), entry.method)
        };
        let web = Some("shop/web".to_owned());
        assert_eq!(parsed("shop/web"), (web.clone(), Method::Nat));
        assert_eq!(parsed("shop/web:NAT"), (web.clone(), Method::Nat));
        assert_eq!(parsed("shop/web:DR\n"), (web.clone(), Method::Dr));
        assert_eq!(parsed("shop/web:PROXY"), (web, Method::Proxy));
        assert_eq!(parsed(""), (None, Method::Nat));
    }

    #[test]
    fn what_it_would_have_ignored_is_told() {
        let why = |key: &str, value: &str| Entry::parse(key, value).unwrap_err();
        assert_eq!(why("10.4.0.50", "web"), r#""web" is not namespace/service"#);
        assert_eq!(why("10.4.0.50", "shop/web:udp"), r#""udp" is none of the methods NAT, DR and PROXY"#);
        assert!(why("10.4.0.999", "shop/web").contains("10.4.0.999"));
    }
}
