//! "Did you mean": the name closest to a mistyped one.

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
