//! Questions to a person: asked only where somebody can see and answer them.

use std::io::IsTerminal;

use dialoguer::Confirm;

use crate::exit::{Failure, Result};

/// Asks on stderr; `yes` is the flag that answers. Fails when there is nobody to ask, or the answer is no.
pub fn confirm(question: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !std::io::stdin().is_terminal() || !std::io::stderr().is_terminal() {
        let (what, _) = question.rsplit_once(". ").unwrap_or((question, ""));
        return Err(Failure::new(format!("nothing changed: {what}, and there is no terminal to ask at"))
            .hint("say yes beforehand: --yes"));
    }
    match Confirm::new().with_prompt(question).default(false).interact() {
        Ok(true) => Ok(()),
        Ok(false) => Err(Failure::new("nothing changed: not confirmed")),
        Err(error) => Err(Failure::new(format!("nothing changed: no answer ({error})"))),
    }
}
