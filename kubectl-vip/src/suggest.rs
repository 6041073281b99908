//! "Did you mean": the name closest to a mistyped one.

use std::net::IpAddr;

use vip_core::api::{ServiceRef, VirtualIP};

use crate::exit::Failure;

/// The name that is close enough to be what was meant.
pub fn closest<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    // Two slips, or one in three letters: "wbe" is "web", "shop" is not "lab".
    let most = (typed.chars().count() / 3).max(2);
    known
        .into_iter()
        .map(|name| (strsim::damerau_levenshtein(typed, name), name))
        .filter(|(distance, name)| *distance <= most && *distance < name.chars().count())
        .min()
        .map(|(_, name)| name)
}

/// The end of a sentence: `; did you mean "web"?`, or nothing.
pub fn ending<'a>(typed: &str, known: impl IntoIterator<Item = &'a str>) -> String {
    closest(typed, known).map_or_else(String::new, |name| format!("; did you mean {name:?}?"))
}

/// There is no such virtual IP.
pub fn no_virtual_ip(address: IpAddr, vips: &[VirtualIP]) -> Failure {
    let known = ending(&address.to_string(), vips.iter().map(|vip| vip.spec.address.as_str()));
    Failure::new(format!("virtual IP {address} not found{known}")).hint("kubectl vip status -A")
}

/// A Service has no virtual IP: perhaps another one of its namespace was meant that has one.
pub fn not_exposed(at: &ServiceRef, vips: &[VirtualIP]) -> Failure {
    let exposed = vips.iter().flat_map(|vip| &vip.spec.services).filter(|s| s.namespace == at.namespace);
    let known = ending(&at.name, exposed.map(|service| service.name.as_str()));
    Failure::new(format!("service {at} has no virtual IP{known}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn slips_of_the_finger() {
        assert_eq!(ending("wbe", ["api", "web", "website"]), r#"; did you mean "web"?"#);
        assert_eq!(closest("chekout", ["checkout", "cart"]), Some("checkout"));
        assert_eq!(closest("shop", ["lab"]), None);
        assert_eq!(closest("ab", ["c", "cd"]), None);
        assert_eq!(ending("x", []), "");
    }
}
