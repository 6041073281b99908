//! The rules of the resources that take more than a line, as the API server evaluates them: CEL, and parts of schemas.
//!
//! The API server refuses a resource whose rules might cost too much, going by the longest strings and lists that the
//! schema admits. So each of these has a bound, and what looks clumsy here is cheap.

use schemars::Schema;

/// CEL: the name of an object agrees with its address. What is no address at all is another rule's business.
pub(super) const NAMED_BY_ADDRESS: &str = "!isIP(self.spec.address) || (self.spec.address.contains(':') \
? self.metadata.name.matches('^(0|[1-9a-f][0-9a-f]{0,3})(-(0|[1-9a-f][0-9a-f]{0,3})){7}$') \
&& isIP(self.metadata.name.replace('-', ':')) \
&& ip(self.metadata.name.replace('-', ':')) == ip(self.spec.address) \
: self.metadata.name == self.spec.address)";

/// CEL: an address that a host can have. Go, and so CEL, counts the networks 0 and 240 (class E) as unicast.
pub(super) const UNICAST: &str = "!isIP(self) || (ip(self).isGlobalUnicast() \
&& !cidr('0.0.0.0/8').containsIP(ip(self)) && !cidr('240.0.0.0/4').containsIP(ip(self)))";

/// The rules for an entry of a list of addresses, each with its message.
pub(super) fn addresses_in_items(list: &mut Schema) {
    let rules = serde_json::json!([
        { "rule": ADDRESSES, "message": "must be an address, a CIDR or a range first-last" },
        { "rule": ASCENDING, "message": "a range must be of one family and go upwards" },
    ]);
    if let Some(items) = list.get_mut("items").and_then(|items| items.as_object_mut()) {
        items.insert("x-kubernetes-validations".to_owned(), rules);
    }
}

/// CEL: an address, a CIDR or two addresses joined by `-`.
pub(super) const ADDRESSES: &str =
    "isIP(self) || isCIDR(self) || (self.split('-').size() == 2 && self.split('-').all(end, isIP(end)))";

/// CEL: the ends of a range are of one family and in order. The order of IPv6 is checked by the agents: CEL can neither
/// compare addresses nor, within the API server's limits, take them apart.
pub(super) const ASCENDING: &str = "!self.contains('-') || !self.split('-').all(end, isIP(end)) \
|| self.split('-').all(end, ip(end).family() == 6) \
|| (self.split('-').all(end, ip(end).family() == 4) && self.split('-').map(end, \
int(end.split('.')[0]) * 16777216 + int(end.split('.')[1]) * 65536 + int(end.split('.')[2]) * 256 \
+ int(end.split('.')[3])).isSorted())";

/// CEL: keys of labels.
pub(super) const LABEL_KEYS: &str = "self.all(key, \
key.matches('^([a-z0-9]([-a-z0-9.]*[a-z0-9])?/)?[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?$'))";

/// The form of the values of labels.
pub(super) fn label_values(map: &mut Schema) {
    if let Some(values) = map.get_mut("additionalProperties").and_then(|values| values.as_object_mut()) {
        values.insert("maxLength".to_owned(), 63.into());
        values.insert("pattern".to_owned(), "^([A-Za-z0-9]([-A-Za-z0-9_.]*[A-Za-z0-9])?)?$".into());
    }
}
