//! A command line that is not finished: which command it is at, and what the next word would be.

use clap::{Arg, ArgAction, Command};

/// The words before the one to complete.
pub struct Line<'a> {
    /// The command that they have come to.
    pub command: &'a Command,
    /// Names of the commands on the way there.
    pub path: Vec<&'a str>,
    /// Words that are neither commands nor flags.
    pub positionals: Vec<String>,
    /// The flag whose value comes next.
    pub flag: Option<&'a Arg>,
    /// Whether `--` was written.
    pub flags_end: bool,
    /// The flags that may stand with every command, with their values, as they were written.
    pub global: Vec<String>,
}

impl<'a> Line<'a> {
    /// Reads the words with the arguments of a command that is built.
    pub fn read(root: &'a Command, words: &[String]) -> Self {
        let mut line = Self {
            command: root,
            path: Vec::new(),
            positionals: Vec::new(),
            flag: None,
            flags_end: false,
            global: Vec::new(),
        };
        words.iter().for_each(|word| line.word(word));
        // One whose value is to be completed has none yet.
        if line.flag.is_some_and(Arg::is_global_set) {
            line.global.pop();
        }
        line
    }

    fn word(&mut self, word: &str) {
        if let Some(flag) = self.flag.take() {
            if flag.is_global_set() {
                self.global.push(word.to_owned());
            }
            return;
        }
        if self.flags_end {
            self.positionals.push(word.to_owned());
            return;
        }
        if word == "--" {
            self.flags_end = true;
            return;
        }
        let (flag, has_value) = match word.strip_prefix("--") {
            Some(long) => match long.split_once('=') {
                Some((name, _)) => (self.long(name), true),
                None => (self.long(long), false),
            },
            None if word.starts_with('-') && word.len() > 1 => {
                let mut letters = word.chars().skip(1);
                (letters.next().and_then(|letter| self.short(letter)), letters.next().is_some())
            }
            None => return self.plain(word),
        };
        let Some(flag) = flag else { return };
        if flag.is_global_set() {
            self.global.push(word.to_owned());
        }
        let takes =
            matches!(flag.get_action(), ArgAction::Set | ArgAction::Append) && !flag.is_require_equals_set();
        if takes && !has_value {
            self.flag = Some(flag);
        }
    }

    fn plain(&mut self, word: &str) {
        match self.command.find_subcommand(word) {
            Some(command) if self.positionals.is_empty() => {
                self.command = command;
                self.path.push(command.get_name());
            }
            _ => self.positionals.push(word.to_owned()),
        }
    }

    /// The flag of that name.
    pub fn long(&self, name: &str) -> Option<&'a Arg> {
        self.command.get_arguments().find(|argument| argument.get_long() == Some(name))
    }

    fn short(&self, letter: char) -> Option<&'a Arg> {
        self.command.get_arguments().find(|argument| argument.get_short() == Some(letter))
    }

    /// The argument that the next word would be; the last one may take several.
    pub fn positional(&self) -> Option<&'a Arg> {
        let all: Vec<&Arg> = self.command.get_positionals().collect();
        let last = all.last().copied()?;
        // So many of the words before are the last one's.
        let its = (self.positionals.len() + 1).saturating_sub(all.len());
        let many = last.get_num_args().is_some_and(|range| its < range.max_values());
        all.get(self.positionals.len()).copied().or_else(|| many.then_some(last))
    }
}
