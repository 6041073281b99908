//! Exec plugins of a kubeconfig: what the client library leaves out of what kubectl does, and failures in words.

use std::io;

use kube::client::AuthError;
use kube::config::{AuthInfo, ExecConfig, ExecInteractiveMode};

use super::config::chain;
use crate::exit::{Failure, Result, plain};

/// Lets an exec plugin ask at the terminal only if there is one, as client-go does.
///
/// # Errors
/// When the plugin wants a terminal always.
pub fn settle(user: &mut AuthInfo, terminal: bool) -> Result<()> {
    let Some(exec) = user.exec.as_mut().filter(|_| !terminal) else { return Ok(()) };
    if exec.interactive_mode == Some(ExecInteractiveMode::Always) {
        return Err(Failure::new(format!(
            "cannot log in: {:?} of the kubeconfig asks at the terminal, and standard input is none",
            command(exec)
        )));
    }
    exec.interactive_mode = Some(ExecInteractiveMode::Never);
    Ok(())
}

/// Why no client could be made for a server.
pub fn failure(error: &kube::Error, exec: Option<&ExecConfig>, server: &str) -> Failure {
    match (error, exec) {
        (kube::Error::Auth(AuthError::AuthExecStart(error)), Some(exec)) => {
            let why = match error.kind() {
                io::ErrorKind::NotFound => "executable not found".to_owned(),
                _ => plain(&error.to_string()),
            };
            let failure =
                Failure::new(format!("cannot log in: {:?} of the kubeconfig: {why}", command(exec)));
            match exec.install_hint.as_deref().map(str::trim).filter(|hint| !hint.is_empty()) {
                Some(hint) => failure.hint(hint),
                None => failure,
            }
        }
        (kube::Error::Auth(AuthError::AuthExecRun { out, .. }), Some(exec)) => {
            let said = String::from_utf8_lossy(&out.stderr);
            let said = said.trim();
            let separator = if said.is_empty() { "" } else { ": " };
            let how = out.status.code().map_or_else(
                || "was ended by a signal".to_owned(),
                |code| format!("failed with exit code {code}"),
            );
            Failure::new(format!(
                "cannot log in: {:?} of the kubeconfig {how}{separator}{said}",
                command(exec)
            ))
        }
        (kube::Error::Auth(error), _) => Failure::new(format!("cannot log in: {}", chain(error))),
        (error, _) => Failure::new(format!("cannot connect to {server}: {}", chain(error))),
    }
}

fn command(exec: &ExecConfig) -> &str {
    exec.command.as_deref().unwrap_or_default()
}
