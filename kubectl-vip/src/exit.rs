//! How a run ends: errors as sentences, hints, and the exit code.
//!
//! Every failure is 1, usage included, as with kubectl; `diff` keeps 1 for a difference and fails with 2. What the API server or the connection says is put into words
//! here; commands add what only they know.

use std::fmt;
use std::process::ExitCode;

use clap::error::ErrorKind;
use kube::client::AuthError;
use kube::client::oidc_errors::{self, RefreshInitError};
use kube::core::Status;

use crate::output;

/// How sentences about it begin.
const API_SERVER: &str = "the API server";

/// What commands return.
pub type Result<T> = std::result::Result<T, Failure>;

/// Why a command gave up: a sentence, and what would help.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Failure {
    message: String,
    hints: Vec<String>,
    /// The connection failed, before any answer.
    unreachable: bool,
    /// The server answered that it cannot just now.
    busy: bool,
    /// The exit code.
    code: u8,
}

impl Failure {
    /// A failure in one sentence.
    pub fn new(message: impl Into<String>) -> Self {
        Self { message: message.into(), hints: Vec::new(), unreachable: false, busy: false, code: 1 }
    }

    /// Adds what would help: a command or a flag.
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hints.push(hint.into());
        self
    }

    /// What `diff` ends with when it has shown a difference: nothing is left to say.
    pub fn difference() -> Self {
        Self::new("")
    }

    /// A failure of `diff`, where 1 means something else.
    pub fn of_diff(mut self) -> Self {
        if !self.message.is_empty() {
            self.code = 2;
        }
        self
    }

    /// Names the server when the connection is what failed.
    pub fn at(mut self, server: &str) -> Self {
        if self.unreachable {
            self.unreachable = false;
            self.message = self.message.replacen(API_SERVER, &format!("{API_SERVER} at {server}"), 1);
        }
        self
    }

    /// Whether the connection failed, so that going on makes no sense.
    pub fn is_unreachable(&self) -> bool {
        self.unreachable
    }

    /// Nothing was heard of the API server in time.
    pub fn silence() -> Self {
        Self { unreachable: true, ..Self::new(format!("{API_SERVER} does not answer: time is up")) }
    }

    /// Whether the server may be well again in a while: it is restarted, or has too much to do.
    pub fn may_pass(&self) -> bool {
        self.unreachable || self.busy
    }

    /// The sentence without its hints, for a line about one of many.
    pub fn sentence(&self) -> &str {
        &self.message
    }

    /// The cluster has no kubectl-vip.
    pub fn not_installed() -> Self {
        Self::new("no vip-node found in any namespace").hint("kubectl vip install")
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let prefix = if self.message.starts_with("Error from server") { "" } else { "Error: " };
        write!(f, "{prefix}{}", self.message)?;
        for hint in &self.hints {
            write!(f, "\nhint: {hint}")?;
        }
        Ok(())
    }
}

impl From<kube::Error> for Failure {
    fn from(error: kube::Error) -> Self {
        match error {
            kube::Error::Api(status) => from_status(&status),
            kube::Error::Service(error) => connection(error.as_ref()),
            kube::Error::HyperError(error) => connection(&error),
            kube::Error::Auth(error) => login(&error),
            // Such as the page of a proxy that wants a login.
            kube::Error::SerdeError(_) => Self {
                unreachable: true,
                ..Self::new(format!(
                    "{API_SERVER} answers what no API server says: is something else at this address?"
                ))
            },
            kube::Error::BuildRequest(_) | kube::Error::HttpError(_) => {
                Self::new("a name on the command line has characters that no name has")
            }
            error => Self::new(plain(&error.to_string())),
        }
    }
}

/// A cause without the number by which programs know it: `No such file or directory (os error 2)`.
pub fn plain(text: &str) -> String {
    let mut text = text.to_owned();
    while let Some((start, rest)) = text.split_once(" (os error ") {
        let Some((_, end)) = rest.split_once(')') else { break };
        text = format!("{start}{end}");
    }
    text
}

/// The sentence of the innermost cause: the layers above it only say that something below them failed.
fn innermost(error: &(dyn std::error::Error + 'static)) -> String {
    let mut cause = error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

/// Credentials that could not be had, or not be renewed while the command ran.
fn login(error: &AuthError) -> Failure {
    let why = match error {
        AuthError::AuthExecRun { cmd, out } => {
            let said = String::from_utf8_lossy(&out.stderr);
            format!("{cmd:?} of the kubeconfig failed: {}", said.trim())
        }
        AuthError::Oidc(error) => expired(error),
        error => plain(&innermost(error)),
    };
    Failure::new(format!("cannot log in to the cluster: {why}"))
}

/// What the kubeconfig's OIDC login lacks.
fn expired(error: &oidc_errors::Error) -> String {
    const EXPIRED: &str = "the OIDC token of the kubeconfig has expired";
    match error {
        oidc_errors::Error::RefreshInit(RefreshInitError::MissingField(field)) => {
            format!("{EXPIRED}, and there is no {field} to renew it: log in again")
        }
        oidc_errors::Error::RefreshInit(_) | oidc_errors::Error::Refresh(_) => {
            format!("{EXPIRED}, and could not be renewed: {}", plain(&innermost(error)))
        }
        error => format!("the OIDC token of the kubeconfig: {}", plain(&innermost(error))),
    }
}

fn connection(error: &(dyn std::error::Error + 'static)) -> Failure {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<AuthError>() {
            return login(error);
        }
        cause = error.source();
    }
    let text = innermost(error);
    let failure = match text.strip_prefix("invalid peer certificate: ") {
        Some(why) => distrust(why),
        None => Failure::new(format!("{API_SERVER} {}", unanswered(&text))),
    };
    Failure { unreachable: true, ..failure }
}

/// Why the certificate of the API server is not accepted, from the words of the TLS library.
fn distrust(why: &str) -> Failure {
    let (said, hint) = if why == "UnknownIssuer" {
        (
            "its certificate is signed by an unknown authority",
            Some("name the authority's certificate with --certificate-authority"),
        )
    } else if why.contains("CaUsedAsEndEntity") {
        ("its certificate is that of an authority (CA:TRUE), not of a server", None)
    } else if why.starts_with("certificate expired") || why == "Expired" {
        ("its certificate has expired", None)
    } else if why.starts_with("certificate not valid yet") || why == "NotValidYet" {
        ("its certificate is not valid yet", Some("compare the clocks of both machines"))
    } else if why.starts_with("certificate not valid for name") || why == "NotValidForName" {
        (why, Some("the name that it has may be given with --tls-server-name"))
    } else {
        return Failure::new(format!("{API_SERVER} is not trusted: its certificate: {}", spaced(why)));
    };
    let failure = Failure::new(format!("{API_SERVER} is not trusted: {said}"));
    match hint {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}

/// Why there was no answer, from the words of the connection.
fn unanswered(text: &str) -> String {
    if text == "deadline has elapsed" {
        return "does not answer: time is up".to_owned();
    }
    // The first bytes of an answer in plain text are no TLS.
    if text.contains("InvalidContentType") {
        return "does not speak TLS: is it http:// there?".to_owned();
    }
    match text.split_once("received fatal alert: ") {
        Some((_, alert)) => format!("refuses the TLS connection: {}", spaced(alert)),
        None => format!("does not answer: {}", plain(text).to_lowercase()),
    }
}

/// The words of a name such as `CertificateRequired`, and nothing that was put around it for programs.
fn spaced(name: &str) -> String {
    let name = name.rsplit('(').next().unwrap_or(name).trim_end_matches(')');
    let mut words = String::new();
    for letter in name.chars() {
        if letter.is_uppercase() && words.ends_with(char::is_lowercase) {
            words.push(' ');
        }
        words.extend(letter.to_lowercase());
    }
    words
}

fn from_status(status: &Status) -> Failure {
    if status.code == 401 {
        return Failure::new("Error from server (Unauthorized): you must be logged in to the server")
            .hint("kubectl auth whoami shows whether the credentials of this context still hold");
    }
    if status.is_forbidden() {
        return forbidden(&status.message);
    }
    if is_missing_resource(status) {
        return Failure::not_installed();
    }
    let reason = match status.reason.as_str() {
        "" | "Failed to parse error data" => format!("HTTP {}", status.code),
        reason => reason.to_owned(),
    };
    // A proxy's page is for a browser.
    let message = match status.message.trim_start().starts_with('<') {
        true => "a page in HTML: something else may stand in front of the API server",
        false => status.message.as_str(),
    };
    let failure = Failure::new(format!("Error from server ({reason}): {message}"));
    Failure { busy: matches!(status.code, 429 | 500 | 503 | 504), ..failure }
}

/// Whether the API server does not know the resource at all: our definitions are not there.
pub fn is_missing_resource(status: &Status) -> bool {
    status.code == 404
        && (status.message == "404 page not found"
            || status.message.contains("could not find the requested resource"))
}

/// RBAC's and our policies' refusals, in one sentence each.
fn forbidden(message: &str) -> Failure {
    let (sentence, check) = if let Some((_, ours)) = message.split_once("denied request: ") {
        (ours.to_owned(), policy_check(ours))
    } else if let Some(refusal) = Refusal::parse(message) {
        (refusal.sentence(), Some(refusal.check()))
    } else {
        (message.to_owned(), None)
    };
    let failure = Failure::new(format!("Error from server (Forbidden): {sentence}"));
    match check {
        Some(check) => failure.hint(check),
        None => failure,
    }
}

/// What to ask the API server about a refusal of our policies: `user "bob" cannot update services in "shop" ...`.
fn policy_check(sentence: &str) -> Option<String> {
    let (_, rest) = sentence.split_once(" cannot ")?;
    let mut words = rest.split(' ');
    let (verb, resource) = (words.next()?, words.next()?);
    let namespace = match (words.next(), words.next()) {
        (Some("in"), Some(namespace)) => format!(" -n {}", namespace.trim_matches(['"', ','])),
        _ => String::new(),
    };
    let resource = resource.trim_end_matches(',');
    Some(format!("kubectl auth can-i {verb} {resource}{namespace}"))
}

/// RBAC's sentence, taken apart.
struct Refusal<'a> {
    user: &'a str,
    verb: &'a str,
    resource: String,
    namespace: Option<&'a str>,
}

impl<'a> Refusal<'a> {
    fn parse(message: &'a str) -> Option<Self> {
        let (_, rest) = message.split_once("User \"")?;
        let (user, rest) = rest.split_once("\" cannot ")?;
        let (verb, rest) = rest.split_once(" resource \"")?;
        let (resource, rest) = rest.split_once("\" in API group \"")?;
        let (group, rest) = rest.split_once('"')?;
        let namespace = rest
            .split_once("in the namespace \"")
            .and_then(|(_, rest)| rest.split_once('"'))
            .map(|(namespace, _)| namespace);
        let resource = if group.is_empty() { resource.to_owned() } else { format!("{resource}.{group}") };
        Some(Self { user, verb, resource, namespace })
    }

    fn sentence(&self) -> String {
        let place = self.namespace.map_or_else(String::new, |namespace| format!(" in {namespace:?}"));
        format!("user {:?} cannot {} {}{place}", self.user, self.verb, self.resource)
    }

    fn check(&self) -> String {
        let place = self.namespace.map_or_else(String::new, |namespace| format!(" -n {namespace}"));
        format!("kubectl auth can-i {} {}{place}", self.verb, self.resource)
    }
}

/// Prints what went wrong, once, and gives the exit code.
pub fn code(result: Result<()>) -> ExitCode {
    match result.and_then(|()| output::written()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(failure) => {
            if !failure.message.is_empty() {
                output::say(failure.to_string());
            }
            ExitCode::from(failure.code)
        }
    }
}

/// Prints help, version or a mistake in the arguments of the commands of this path.
pub fn usage(error: &clap::Error, path: &[String]) -> ExitCode {
    // Help is what is asked for by a command that only has others below it.
    if error.kind() == ErrorKind::DisplayHelpOnMissingArgumentOrSubcommand {
        output::print(&error.render().to_string());
        return ExitCode::SUCCESS;
    }
    if error.use_stderr() {
        let text = error.render().to_string();
        output::mutter(&text.strip_prefix("error: ").map_or(text.clone(), |rest| format!("Error: {rest}")));
        return ExitCode::from(if path.first().is_some_and(|name| name == "diff") { 2 } else { 1 });
    }
    // Nothing can be said when stdout does not take it.
    let _ = error.print();
    ExitCode::SUCCESS
}

#[cfg(test)]
mod tests {
    use super::*;

    fn shown(code: u16, reason: &str, message: &str) -> String {
        let status = Status::failure(message, reason).with_code(code);
        Failure::from(kube::Error::Api(status.boxed())).to_string()
    }

    #[test]
    fn rbac_refusals_are_one_sentence_and_one_command() {
        assert_eq!(
            shown(
                403,
                "Forbidden",
                r#"services "web" is forbidden: User "bob" cannot patch resource "services" in API group "" in the namespace "shop""#
            ),
            "Error from server (Forbidden): user \"bob\" cannot patch services in \"shop\"\nhint: kubectl auth can-i patch services -n shop"
        );
        assert_eq!(
            shown(
                403,
                "Forbidden",
                r#"virtualips.kubectl-vip.io is forbidden: User "bob" cannot list resource "virtualips" in API group "kubectl-vip.io" at the cluster scope"#
            ),
            "Error from server (Forbidden): user \"bob\" cannot list virtualips.kubectl-vip.io\nhint: kubectl auth can-i list virtualips.kubectl-vip.io"
        );
    }

    #[test]
    fn refusals_of_our_policies_keep_our_words() {
        assert_eq!(
            shown(
                403,
                "Forbidden",
                r#"virtualips.kubectl-vip.io "10.0.0.9" is forbidden: ValidatingAdmissionPolicy 'kubectl-vip-services' with binding 'kubectl-vip-services' denied request: user "bob" cannot update services in "shop" (service web), so it cannot bind virtual IP 10.0.0.9 to it"#
            ),
            "Error from server (Forbidden): user \"bob\" cannot update services in \"shop\" (service web), so it cannot bind virtual IP 10.0.0.9 to it\n\
             hint: kubectl auth can-i update services -n shop"
        );
    }

    #[test]
    fn other_answers_keep_the_servers_words() {
        assert_eq!(
            shown(409, "AlreadyExists", r#"vippools.kubectl-vip.io "lab" already exists"#),
            r#"Error from server (AlreadyExists): vippools.kubectl-vip.io "lab" already exists"#
        );
        assert_eq!(
            shown(404, "Failed to parse error data", "404 page not found"),
            "Error: no vip-node found in any namespace\nhint: kubectl vip install"
        );
        assert!(shown(401, "Unauthorized", "Unauthorized").contains("must be logged in"));
        assert_eq!(
            shown(502, "Failed to parse error data", "bad gateway"),
            "Error from server (HTTP 502): bad gateway"
        );
    }

    #[test]
    fn what_libraries_say_is_put_into_words() {
        let said = |text: &str| {
            let cause = std::io::Error::other(text.to_owned());
            Failure::from(kube::Error::Service(Box::new(cause))).to_string()
        };
        for (text, words) in [
            (
                "received corrupt message of type InvalidContentType",
                "does not speak TLS: is it http:// there?",
            ),
            ("received fatal alert: CertificateRequired", "refuses the TLS connection: certificate required"),
            ("Connection reset by peer (os error 104)", "does not answer: connection reset by peer"),
            (
                "invalid peer certificate: Other(OtherError(CaUsedAsEndEntity))",
                "is not trusted: its certificate is that of an authority (CA:TRUE), not of a server",
            ),
            (
                "invalid peer certificate: certificate expired: verification time 7 (UNIX), but it is not",
                "is not trusted: its certificate has expired",
            ),
            ("invalid peer certificate: BadSignature", "is not trusted: its certificate: bad signature"),
        ] {
            assert_eq!(said(text), format!("Error: the API server {words}"));
        }
        assert_eq!(
            shown(502, "Failed to parse error data", "<html><body>502</body></html>"),
            "Error from server (HTTP 502): a page in HTML: something else may stand in front of the API server"
        );
        assert_eq!(plain("a: No such file (os error 2): b (os error 3)"), "a: No such file: b");
    }

    #[test]
    fn credentials_that_cannot_be_renewed_are_no_silence_of_the_server() {
        let failure = Failure::from(kube::Error::Service(Box::new(AuthError::UnrefreshableTokenResponse)));
        let said = failure.to_string();
        assert!(said.starts_with("Error: cannot log in to the cluster: ") && !failure.may_pass(), "{said}");
    }

    #[test]
    fn a_server_that_is_busy_may_be_asked_again() {
        let failure = |code: u16| {
            let status = Status::failure("it is late", "Late").with_code(code);
            Failure::from(kube::Error::Api(status.boxed()))
        };
        assert!([429, 500, 503, 504].iter().all(|code| failure(*code).may_pass()));
        assert!([400, 403, 404, 409, 422].iter().all(|code| !failure(*code).may_pass()));
    }

    #[test]
    fn a_silent_server_is_named() {
        let cause = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let failure = Failure::from(kube::Error::Service(Box::new(cause))).at("https://10.0.0.1:6443");
        assert_eq!(
            failure.to_string(),
            "Error: the API server at https://10.0.0.1:6443 does not answer: connection refused"
        );
    }
}
