//! Questions to a person: asked only where somebody can see and answer them.
//!
//! A line is read, as kubectl does: that works on every terminal, and Ctrl-C ends the program and nothing else.

use std::io::{self, BufRead, IsTerminal};

use crate::exit::{Failure, Result};
use crate::output::{mutter, say};

/// Asks on stderr; `yes` is the flag that answers. Fails when there is nobody to ask, or the answer is no.
pub fn confirm(question: &str, yes: bool) -> Result<()> {
    if yes {
        return Ok(());
    }
    if !io::stdin().is_terminal() || !io::stderr().is_terminal() {
        let (what, _) = question.rsplit_once(". ").unwrap_or((question, ""));
        return Err(Failure::new(format!("nothing changed: {what}, and there is no terminal to ask at"))
            .hint("say yes beforehand: --yes"));
    }
    match ask(question, &mut io::stdin().lock()) {
        Ok(Some(true)) => Ok(()),
        Ok(Some(false)) => Err(Failure::new("nothing changed: not confirmed")),
        Ok(None) => Err(Failure::new("nothing changed: no answer")),
        Err(error) => Err(Failure::new(format!("nothing changed: no answer ({error})"))),
    }
}

/// Asks until the answer is one; `None` at the end of the input.
fn ask(question: &str, input: &mut impl BufRead) -> io::Result<Option<bool>> {
    loop {
        mutter(&format!("{question} [y/N] "));
        let mut line = String::new();
        if input.read_line(&mut line)? == 0 {
            say("");
            return Ok(None);
        }
        match line.trim().to_ascii_lowercase().as_str() {
            "y" | "yes" => return Ok(Some(true)),
            "" | "n" | "no" => return Ok(Some(false)),
            _ => say("Answer y for yes, or n for no."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_yes_is_yes() {
        let ask = |lines: &str| ask("Go on?", &mut lines.as_bytes()).unwrap();
        for lines in ["y\n", "Yes\n", " YES \r\n", "yep\ny\n"] {
            assert_eq!(ask(lines), Some(true), "{lines:?}");
        }
        for lines in ["\n", "n\n", "No\n", "what\nn\n"] {
            assert_eq!(ask(lines), Some(false), "{lines:?}");
        }
        assert_eq!(ask(""), None);
        assert_eq!(ask("maybe\n"), None);
    }
}
