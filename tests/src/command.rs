//! Running a program to its end, with a time limit, and what came out of it.

use std::{
    env,
    fmt::Write as _,
    io::Read,
    process::{Child, Command, Stdio},
    sync::mpsc,
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, bail};

use crate::paths;

/// How long an ordinary command may take.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Between two questions of who waits for an answer, at least and at most.
const PAUSE: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(1));

/// What a command left: its exit code (128 + signal when a signal ended it) and both of its outputs.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command as a person would write it.
    pub command: String,
    /// The exit code.
    pub code: i32,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Output {
    /// True for exit code 0.
    pub fn success(&self) -> bool {
        self.code == 0
    }

    /// The output of a command that succeeded; otherwise an error with all that it said.
    pub fn ok(self) -> Result<Self> {
        if self.success() {
            return Ok(self);
        }
        let mut text = format!("`{}` ended with exit code {}", self.command, self.code);
        for part in [self.stdout.trim_end(), self.stderr.trim_end()] {
            if !part.is_empty() {
                let _ = write!(text, "\n{part}");
            }
        }
        Err(anyhow!(text))
    }

    /// Standard output without the white space around it.
    pub fn text(&self) -> &str {
        self.stdout.trim()
    }
}

/// A command as a person would write it.
pub fn display(command: &Command) -> String {
    let mut text = command.get_program().to_string_lossy().into_owned();
    for argument in command.get_args() {
        let argument = argument.to_string_lossy();
        match argument.contains([' ', '\n', '"']) {
            true => text.push_str(&format!(" '{argument}'")),
            false => text.push_str(&format!(" {argument}")),
        }
    }
    text
}

/// Runs a command without input. Fails when it can't be started or takes longer than `limit` (then it is killed).
pub fn run(command: &mut Command, limit: Duration) -> Result<Output> {
    let name = display(command);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = spawn(command)?;
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    let Some(code) = wait(&mut child, limit)? else {
        bail!("`{name}` was still running after {limit:?} and was killed");
    };
    // A background process that keeps the pipe must not keep us.
    let rest = Duration::from_secs(2);
    let stdout = stdout.recv_timeout(rest).unwrap_or_default();
    let stderr = stderr.recv_timeout(rest).unwrap_or_default();
    Ok(Output { command: name, code, stdout, stderr })
}

/// Runs a command given as words, for at most a minute.
pub fn words(words: &[&str]) -> Result<Output> {
    let (program, arguments) = words.split_first().context("an empty command")?;
    run(Command::new(program).args(arguments), LIMIT)
}

/// Runs `ip` with the words of one line and wants success.
pub fn ip(line: &str) -> Result<Output> {
    run(Command::new("ip").args(line.split_whitespace()), LIMIT)?.ok()
}

/// Cargo in this repository, as if no other cargo had started this program: what that tells its programs makes build scripts
/// run again, and all that follows from them.
pub(crate) fn cargo() -> Command {
    let mut cargo = Command::new("cargo");
    cargo.current_dir(paths::repository());
    let told = |name: &str| name.starts_with("CARGO_PKG_") || name.starts_with("CARGO_MANIFEST_");
    for (name, _) in env::vars_os().filter(|(name, _)| name.to_str().is_some_and(told)) {
        cargo.env_remove(name);
    }
    cargo
}

/// Starts a command; the error names it.
pub fn spawn(command: &mut Command) -> Result<Child> {
    command.spawn().with_context(|| format!("can't start {}", command.get_program().to_string_lossy()))
}

/// Waits for a child; kills it and gives `None` when it takes longer than `limit`.
pub fn wait(child: &mut Child, limit: Duration) -> Result<Option<i32>> {
    use std::os::unix::process::ExitStatusExt;
    let deadline = Instant::now() + limit;
    let mut pause = Duration::from_millis(1);
    loop {
        if let Some(status) = child.try_wait()? {
            return Ok(Some(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0))));
        }
        if Instant::now() >= deadline {
            let _ = child.kill();
            let _ = child.wait();
            return Ok(None);
        }
        thread::sleep(pause);
        pause = (pause * 2).min(Duration::from_millis(20));
    }
}

/// Asks until the answer is there, and for no more than half of the time: who asks takes the processors from those who are to answer.
/// The error says what was waited for and the last reason it was not there.
pub fn until<T>(what: &str, limit: Duration, mut ask: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let deadline = Instant::now() + limit;
    let mut reason = None;
    loop {
        let asked = Instant::now();
        match ask() {
            Ok(Some(answer)) => return Ok(answer),
            Ok(None) => {}
            Err(error) => reason = Some(error),
        }
        if Instant::now() >= deadline {
            let text = format!("{what}: not within {limit:?}");
            return Err(reason.map_or_else(|| anyhow!(text.clone()), |reason| reason.context(text.clone())));
        }
        thread::sleep(asked.elapsed().clamp(PAUSE.0, PAUSE.1));
    }
}

fn collect(stream: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut data = Vec::new();
        if let Some(mut stream) = stream {
            let _ = stream.read_to_end(&mut data);
        }
        let _ = sender.send(String::from_utf8_lossy(&data).into_owned());
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_outputs_and_the_code() {
        let output = words(&["sh", "-c", "echo out; echo err >&2; exit 3"]).unwrap();
        assert_eq!((output.code, output.text(), output.stderr.trim()), (3, "out", "err"));
        let error = output.ok().unwrap_err().to_string();
        assert!(error.contains("exit code 3") && error.contains("err"), "{error}");
    }

    #[test]
    fn a_command_that_hangs_is_killed() {
        let error = run(Command::new("sleep").arg("60"), Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("still running"), "{error}");
    }

    #[test]
    fn waiting_has_an_end_and_a_reason() {
        let error =
            until("the moon", Duration::ZERO, || -> Result<Option<()>> { bail!("cloudy") }).unwrap_err();
        assert_eq!(format!("{error:#}"), "the moon: not within 0ns: cloudy");
    }
}
