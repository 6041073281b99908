//! Commands inside the virtual machine: the protocol, its client and its server.
//!
//! One connection is one command. The client sends one line of JSON ([`Request`]); the server answers with frames: a
//! kind (1 standard output, 2 standard error, 3 the end), a length of four bytes, and that many bytes; the end carries
//! the exit code. When the client hangs up, the command is killed with all that it started.

use std::{
    collections::BTreeMap,
    fs::File,
    io::{BufRead, BufReader, Read, Write},
    net::{SocketAddr, TcpListener, TcpStream},
    os::unix::process::CommandExt,
    process::{Child, Command, Stdio},
    sync::{Arc, Mutex, PoisonError},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, bail};
use nix::{
    sched::{CloneFlags, setns, unshare},
    sys::signal::{Signal, killpg},
    unistd::Pid,
};
use serde::{Deserialize, Serialize};

use crate::command::Output;

const STDOUT: u8 = 1;
const STDERR: u8 = 2;
const END: u8 = 3;

/// A command for a shell, in the network and mount namespaces of a node or in the machine's own.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Request {
    pub(crate) node: Option<u8>,
    pub(crate) command: String,
}

/// Runs a command at a server. `show` gets the output as it comes, true for standard error.
pub(crate) fn call(
    server: SocketAddr,
    request: &Request,
    limit: Duration,
    mut show: impl FnMut(bool, &[u8]),
) -> Result<Output> {
    let what = || format!("`{}` in the machine", request.command);
    let mut stream = TcpStream::connect_timeout(&server, Duration::from_secs(5))
        .with_context(|| format!("the machine does not answer at {server}"))?;
    let mut line = serde_json::to_vec(request)?;
    line.push(b'\n');
    stream.write_all(&line)?;
    let deadline = Instant::now() + limit;
    let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
    loop {
        let (kind, data) = frame(&mut stream, deadline).with_context(what)?;
        match kind {
            STDOUT => {
                show(false, &data);
                stdout.extend(data);
            }
            STDERR => {
                show(true, &data);
                stderr.extend(data);
            }
            END => {
                let code = i32::from_be_bytes(data.try_into().ok().context("an end without a code")?);
                return Ok(Output {
                    command: request.command.clone(),
                    code,
                    stdout: String::from_utf8_lossy(&stdout).into_owned(),
                    stderr: String::from_utf8_lossy(&stderr).into_owned(),
                });
            }
            other => bail!("{}: a frame of kind {other}", what()),
        }
    }
}

/// Serves commands for ever. `nodes` has the process whose namespaces are a node's.
pub(crate) fn serve(listener: &TcpListener, nodes: &Arc<Mutex<BTreeMap<u8, u32>>>) -> Result<()> {
    loop {
        let (stream, _) = listener.accept()?;
        let nodes = Arc::clone(nodes);
        thread::spawn(move || {
            if let Err(error) = answer(&stream, &nodes) {
                let _ = send(&stream, STDERR, format!("{error:#}\n").as_bytes());
                let _ = send(&stream, END, &127_i32.to_be_bytes());
            }
        });
    }
}

fn answer(stream: &TcpStream, nodes: &Mutex<BTreeMap<u8, u32>>) -> Result<()> {
    let mut line = String::new();
    BufReader::new(stream).read_line(&mut line)?;
    let request: Request = serde_json::from_str(&line).context("not a request")?;
    if let Some(node) = request.node {
        let node = nodes.lock().unwrap_or_else(PoisonError::into_inner).get(&node).copied();
        enter(node.context("there is no such node")?)?;
    }
    let words: Vec<&str> = if is_plain(&request.command) {
        request.command.split_whitespace().collect()
    } else {
        vec!["bash", "-c", &request.command]
    };
    let (program, arguments) = words.split_first().context("no command")?;
    let mut command = Command::new(program);
    command.args(arguments).current_dir("/").process_group(0);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().with_context(|| format!("can't start {program}"))?;
    let code = relay(stream, &mut child);
    let _ = killpg(Pid::from_raw(child.id().cast_signed()), Signal::SIGKILL);
    send(stream, END, &code?.to_be_bytes())?;
    Ok(())
}

/// Whether a command is words and nothing that a shell would do something about. Programs take long to start in an emulated
/// machine, and a shell would be one more.
fn is_plain(command: &str) -> bool {
    command.bytes().all(|byte| byte.is_ascii_alphanumeric() || b" -_./:,@".contains(&byte))
}

/// Moves this thread, and so what it starts, to the namespaces of a process.
fn enter(process: u32) -> Result<()> {
    // Threads of one process may differ in their mounts when they share no working directory.
    unshare(CloneFlags::CLONE_FS)?;
    let namespaces = ["net", "uts", "mnt"].map(|kind| File::open(format!("/proc/{process}/ns/{kind}")));
    for namespace in namespaces {
        setns(namespace?, CloneFlags::empty())?;
    }
    Ok(())
}

/// Sends both outputs until the command ends or the client hangs up.
fn relay(stream: &TcpStream, child: &mut Child) -> Result<i32> {
    use std::os::unix::process::ExitStatusExt;
    let writer = Mutex::new(stream);
    let send_all = |kind: u8, source: Option<&mut dyn Read>| {
        let Some(source) = source else { return };
        let mut buffer = [0; 16 * 1024];
        while let Ok(length) = source.read(&mut buffer) {
            let writer = writer.lock().unwrap_or_else(PoisonError::into_inner);
            if length == 0 || send(*writer, kind, &buffer[..length]).is_err() {
                return;
            }
        }
    };
    let (mut stdout, mut stderr) = (child.stdout.take(), child.stderr.take());
    let group = Pid::from_raw(child.id().cast_signed());
    thread::scope(|scope| {
        let outputs = [
            scope.spawn(|| send_all(STDOUT, stdout.as_mut().map(|s| s as &mut dyn Read))),
            scope.spawn(|| send_all(STDERR, stderr.as_mut().map(|s| s as &mut dyn Read))),
        ];
        stream.set_read_timeout(Some(Duration::from_millis(20)))?;
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            // The client sends nothing more: an answer to this read is its end.
            let gone = match (&*stream).read(&mut [0; 1]) {
                Ok(_) => true,
                Err(error) => {
                    !matches!(error.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
                }
            };
            if gone {
                let _ = killpg(group, Signal::SIGKILL);
                break child.wait()?;
            }
        };
        // Something in the background may still hold the pipes: it gets a moment, then its end.
        let deadline = Instant::now() + Duration::from_millis(500);
        while outputs.iter().any(|output| !output.is_finished()) {
            if Instant::now() > deadline {
                let _ = killpg(group, Signal::SIGKILL);
                break;
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0)))
    })
}

fn send(mut stream: &TcpStream, kind: u8, data: &[u8]) -> std::io::Result<()> {
    let mut message = vec![kind];
    message.extend(u32::try_from(data.len()).unwrap_or(u32::MAX).to_be_bytes());
    message.extend(data);
    stream.write_all(&message)
}

fn frame(stream: &mut TcpStream, deadline: Instant) -> Result<(u8, Vec<u8>)> {
    let mut head = [0; 5];
    fill(stream, &mut head, deadline)?;
    let [kind, length @ ..] = head;
    let mut data = vec![0; u32::from_be_bytes(length) as usize];
    fill(stream, &mut data, deadline)?;
    Ok((kind, data))
}

fn fill(stream: &mut TcpStream, buffer: &mut [u8], deadline: Instant) -> Result<()> {
    let left = deadline.saturating_duration_since(Instant::now()).max(Duration::from_millis(1));
    stream.set_read_timeout(Some(left))?;
    stream.read_exact(buffer).context("no end within the time limit, or the machine is gone")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(command: &str, limit: Duration) -> Result<Output> {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let server = listener.local_addr().unwrap();
        thread::spawn(move || serve(&listener, &Arc::default()));
        call(server, &Request { node: None, command: command.into() }, limit, |_, _| {})
    }

    #[test]
    fn outputs_apart_and_the_exit_code() {
        let output = run("echo out; echo err >&2; exit 7", Duration::from_secs(10)).unwrap();
        assert_eq!((output.code, output.text(), output.stderr.trim()), (7, "out", "err"));
    }

    #[test]
    fn a_background_process_does_not_hold_the_answer() {
        let output = run("sleep 60 & echo done", Duration::from_secs(10)).unwrap();
        assert_eq!((output.code, output.text()), (0, "done"));
    }

    #[test]
    fn the_limit_holds() {
        assert!(run("sleep 60", Duration::from_millis(100)).is_err());
    }
}
