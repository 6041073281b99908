//! What is printed: kubectl's tables, ages, and documents in JSON and YAML. stdout is data, stderr is talk.

use std::fmt::Write as _;
use std::io::{self, IsTerminal as _, Write as _};
use std::sync::{Mutex, PoisonError};

use clap::ValueEnum;
use jiff::Timestamp;
use serde::Serialize;

use crate::cli::{Document, Written};
use crate::exit::{self, Failure, Result};

/// What stands for a value that does not exist.
pub const NONE: &str = "<none>";
/// What stands for a value that is still to come.
pub const PENDING: &str = "<pending>";
/// What stands for a value that nobody can know now.
pub const UNKNOWN: &str = "<unknown>";

/// Formats of lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// A table with more columns
    Wide,
    /// JSON
    Json,
    /// YAML
    Yaml,
    /// One resource/name for each line
    Name,
}

/// A table as kubectl prints it: no frames, columns three spaces apart, nothing after the last one.
#[derive(Clone, Debug, Default)]
pub struct Table {
    headers: Vec<String>,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with these column names.
    pub fn new(headers: &[&'static str]) -> Self {
        Self::named(headers.iter().map(|header| (*header).to_owned()))
    }

    /// A table whose column names are data, too.
    pub fn named(headers: impl IntoIterator<Item = String>) -> Self {
        Self { headers: headers.into_iter().collect(), rows: Vec::new() }
    }

    /// Adds a row; an empty cell is `<none>`.
    pub fn row(&mut self, cells: impl IntoIterator<Item = String>) {
        self.rows.push(
            cells.into_iter().map(|cell| if cell.is_empty() { NONE.to_owned() } else { cell }).collect(),
        );
    }

    /// Whether it has no row.
    pub fn is_empty(&self) -> bool {
        self.rows.is_empty()
    }

    /// The lines of the table.
    pub fn render(&self, no_headers: bool) -> String {
        self.render_in(&self.widths(no_headers), no_headers)
    }

    /// How wide each column has to be.
    pub fn widths(&self, no_headers: bool) -> Vec<usize> {
        let width = |column: usize| {
            let cells = self.lines(no_headers).filter_map(move |line| line.get(column));
            cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
        };
        (0..self.headers.len()).map(width).collect()
    }

    fn lines(&self, no_headers: bool) -> impl Iterator<Item = &Vec<String>> {
        (!no_headers).then_some(&self.headers).into_iter().chain(&self.rows)
    }

    /// The lines of the table, its columns as wide as that.
    pub fn render_in(&self, widths: &[usize], no_headers: bool) -> String {
        let mut text = String::new();
        for cells in self.lines(no_headers) {
            let mut line = String::new();
            for (cell, width) in cells.iter().zip(widths) {
                // Writing to a String does not fail.
                let _ = write!(line, "{cell:<width$}   ");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

/// When colours are used.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Color {
    /// On a terminal that shows them, unless `NO_COLOR` is set
    #[default]
    Auto,
    /// Also into files and pipes
    Always,
    /// Nowhere
    Never,
}

/// What is known of stdout.
struct Stdout {
    /// When colours are used.
    color: Color,
    /// Whether what is done counts more than who reads of it.
    goes_on: bool,
    /// Why nothing more can be written.
    closed: Option<io::Error>,
}

static STDOUT: Mutex<Stdout> = Mutex::new(Stdout { color: Color::Auto, goes_on: false, closed: None });

/// How this run writes. What changes something `goes_on` when its reader goes away, and does not stop half way.
pub fn begin(color: Color, goes_on: bool) {
    let mut state = STDOUT.lock().unwrap_or_else(PoisonError::into_inner);
    (state.color, state.goes_on) = (color, goes_on);
}

/// Whether stdout is to be coloured.
pub fn is_colourful() -> bool {
    match STDOUT.lock().unwrap_or_else(PoisonError::into_inner).color {
        Color::Always => true,
        Color::Never => false,
        Color::Auto => is_screen() && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty()),
    }
}

/// Writes data to stdout. A command that only reads ends in silence when its reader goes away (`| head`).
pub fn print(text: &str) {
    let mut state = STDOUT.lock().unwrap_or_else(PoisonError::into_inner);
    if state.closed.is_some() {
        return;
    }
    let mut stdout = io::stdout().lock();
    let Err(error) = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) else { return };
    if !state.goes_on {
        std::process::exit(match unwritten(&error) {
            None => 0,
            Some(failure) => {
                say(failure.to_string());
                1
            }
        });
    }
    state.closed = Some(error);
}

/// What a run has to confess at its end: results that were lost, but for those that nobody wanted to read.
pub fn written() -> Result<()> {
    let state = STDOUT.lock().unwrap_or_else(PoisonError::into_inner);
    state.closed.as_ref().and_then(unwritten).map_or(Ok(()), Err)
}

fn unwritten(error: &io::Error) -> Option<Failure> {
    let lost = || Failure::new(format!("the output cannot be written: {}", exit::plain(&error.to_string())));
    (error.kind() != io::ErrorKind::BrokenPipe).then(lost)
}

/// Whether stdout is a terminal that understands more than plain text.
pub fn is_screen() -> bool {
    let is_dumb = std::env::var_os("TERM").is_some_and(|term| term == "dumb");
    io::stdout().is_terminal() && !is_dumb
}

/// Writes a line of data to stdout.
pub fn line(text: impl AsRef<str>) {
    print(&format!("{}\n", text.as_ref()));
}

/// Writes a line of talk to stderr, if anybody listens.
pub fn say(text: impl AsRef<str>) {
    mutter(&format!("{}\n", text.as_ref()));
}

/// Writes talk to stderr without ending the line.
pub fn mutter(text: &str) {
    // In one piece, and nothing can be said when stderr does not take it.
    let _ = io::stderr().write_all(text.as_bytes());
}

/// An object without what only the API server reads.
pub fn bare<K: kube::Resource + Clone>(object: &K) -> K {
    let mut object = object.clone();
    object.meta_mut().managed_fields = None;
    object
}

/// Prints objects that were written: one by itself, several as a list.
pub fn objects<T: Serialize>(objects: &[T], format: Written) -> Result<()> {
    let values = objects.iter().map(serde_json::to_value).collect::<std::result::Result<Vec<_>, _>>();
    let values = values.map_err(|error| Failure::new(format!("cannot print the result: {error}")))?;
    let format = match format {
        Written::Json => Document::Json,
        Written::Yaml => Document::Yaml,
        Written::Name => {
            values.iter().for_each(|value| line(name(value)));
            return Ok(());
        }
    };
    match values.as_slice() {
        [one] => document(one, format),
        many => document(
            &serde_json::json!({"apiVersion": "v1", "kind": "List", "metadata": {}, "items": many}),
            format,
        ),
    }
}

/// An object as kubectl names it: `vippool.kubectl-vip.io/lab`.
fn name(object: &serde_json::Value) -> String {
    let text = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let group = match text(&object["apiVersion"]).split_once('/') {
        Some((group, _)) => format!(".{group}"),
        None => String::new(),
    };
    format!("{}{group}/{}", text(&object["kind"]).to_lowercase(), text(&object["metadata"]["name"]))
}

/// Prints a document.
pub fn document(value: &impl Serialize, format: Document) -> Result<()> {
    print(&render_document(value, format)?);
    Ok(())
}

/// The text of a document, keys in alphabetical order as kubectl has them.
pub fn render_document(value: &impl Serialize, format: Document) -> Result<String> {
    let failed = |error: String| Failure::new(format!("cannot print the result: {error}"));
    // By way of a Value, whose keys are sorted.
    let value = serde_json::to_value(value).map_err(|e| failed(e.to_string()))?;
    let mut text = match format {
        Document::Json => {
            let mut bytes = Vec::new();
            let formatter = serde_json::ser::PrettyFormatter::with_indent(b"    ");
            let mut serializer = serde_json::Serializer::with_formatter(&mut bytes, formatter);
            value.serialize(&mut serializer).map_err(|e| failed(e.to_string()))?;
            String::from_utf8(bytes).map_err(|e| failed(e.to_string()))?
        }
        Document::Yaml => serde_saphyr::to_string(&value).map_err(|e| failed(e.to_string()))?,
    };
    if !text.ends_with('\n') {
        text.push('\n');
    }
    Ok(text)
}

/// What a list is printed as.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// A table, with more columns or less.
    Table {
        /// More columns.
        wide: bool,
    },
    /// One resource/name for each line.
    Names,
    /// A document.
    Document(Document),
}

impl From<Option<Format>> for Form {
    fn from(format: Option<Format>) -> Self {
        match format {
            None => Self::Table { wide: false },
            Some(Format::Wide) => Self::Table { wide: true },
            Some(Format::Name) => Self::Names,
            Some(Format::Json) => Self::Document(Document::Json),
            Some(Format::Yaml) => Self::Document(Document::Yaml),
        }
    }
}

/// How long ago something was, as kubectl writes it.
pub fn age(then: Timestamp, now: Timestamp) -> String {
    span(now.as_second() - then.as_second())
}

/// A number of seconds, as kubectl writes ages: two units at most, coarser the longer it is.
pub fn span(seconds: i64) -> String {
    const MINUTE: i64 = 60;
    const HOUR: i64 = 60 * MINUTE;
    const DAY: i64 = 24 * HOUR;
    let two = |big: i64, unit: char, rest: i64, small: char| match rest {
        0 => format!("{big}{unit}"),
        _ => format!("{big}{unit}{rest}{small}"),
    };
    match seconds {
        // Clocks differ a little.
        ..0 => "0s".to_owned(),
        0..120 => format!("{seconds}s"),
        _ if seconds < 10 * MINUTE => two(seconds / MINUTE, 'm', seconds % MINUTE, 's'),
        _ if seconds < 3 * HOUR => format!("{}m", seconds / MINUTE),
        _ if seconds < 8 * HOUR => two(seconds / HOUR, 'h', seconds % HOUR / MINUTE, 'm'),
        _ if seconds < 2 * DAY => format!("{}h", seconds / HOUR),
        _ if seconds < 8 * DAY => two(seconds / DAY, 'd', seconds % DAY / HOUR, 'h'),
        _ if seconds < 2 * 365 * DAY => format!("{}d", seconds / DAY),
        _ => format!("{}y", seconds / (365 * DAY)),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_as_kubectl_prints_it() {
        let mut table = Table::new(&["NAME", "VIP", "AGE"]);
        table.row(["web".into(), "192.168.10.241".into(), "5d".into()]);
        table.row(["checkout".into(), String::new(), "3m".into()]);
        assert_eq!(
            table.render(false),
            "NAME       VIP              AGE\nweb        192.168.10.241   5d\ncheckout   <none>           3m\n"
        );
        assert_eq!(table.render(true).lines().count(), 2);
    }

    #[test]
    fn ages_as_kubectl_writes_them() {
        for (seconds, text) in [
            (-3, "0s"),
            (0, "0s"),
            (119, "119s"),
            (120, "2m"),
            (130, "2m10s"),
            (601, "10m"),
            (3 * 3600, "3h"),
            (3 * 3600 + 300, "3h5m"),
            (30 * 3600, "30h"),
            (49 * 3600, "2d1h"),
            (9 * 86400, "9d"),
            (800 * 86400, "2y"),
        ] {
            assert_eq!(span(seconds), text);
        }
    }

    #[test]
    fn documents_are_sorted_and_end_with_a_line() {
        let value = serde_json::json!({"kind": "List", "apiVersion": "v1", "items": [{"b": 1, "a": "on"}]});
        assert_eq!(
            render_document(&value, Document::Yaml).unwrap(),
            "apiVersion: v1\nitems:\n- a: \"on\"\n  b: 1\nkind: List\n"
        );
        assert!(
            render_document(&value, Document::Json)
                .unwrap()
                .starts_with("{\n    \"apiVersion\": \"v1\",\n    \"items\"")
        );
    }
}
