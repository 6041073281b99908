//! `lab pictures`: runs the commands that the documentation shows on a cluster of its own, at a terminal, and draws what they
//! say as SVG.

use std::{fmt::Write as _, fs, process::Command, thread, time::Duration};

use anyhow::{Context, Result, ensure};

use crate::{
    interrupt,
    lab::{self, Lab, Parts},
    paths, product,
    terminal::Terminal,
    workload::Workload,
};

const NAME: &str = "pictures";
const NAMESPACE: &str = "shop";
const COLUMNS: u16 = 110;
/// How long a command may take.
const LIMIT: Duration = Duration::from_secs(300);

/// In pixels.
const FONT: f32 = 14.0;
const LINE: f32 = 19.0;
/// The width of a character, as wide as those of common fonts get.
const CHARACTER: f32 = 8.5;
const MARGIN: f32 = 16.0;

/// Draws all pictures, or that of the help alone, which needs no cluster.
pub fn run(help_only: bool) -> Result<()> {
    product::build_programs()?;
    draw(&lab::kubectl()?, "help", "--help", 0)?;
    if help_only {
        return Ok(());
    }
    interrupt::on_interrupt(|| {
        if let Err(error) = Lab::remove(NAME) {
            eprintln!("error: {error:#}");
        }
    })?;
    product::build()?;
    product::in_lab(NAME, Parts::Cluster, story)
}

fn story(lab: &Lab) -> Result<()> {
    Workload::deploy(lab, NAMESPACE, "web", 3)?;
    let draw = |name, line, wanted| draw(&lab.kubectl_command()?, name, line, wanted);
    draw("install", "install --pool lab=10.87.2.50-10.87.2.59", 0)?;
    draw("expose", "expose svc/web -n shop", 0)?;

    // A Service without pods; later a pool of another LAN, and a node that is taken out.
    lab.kubectl(["create", "service", "clusterip", "api", "--tcp=80", "-n", NAMESPACE])?.ok()?;
    lab.kubectl(["vip", "expose", "svc/api", "-n", NAMESPACE, "--wait=false"])?.ok()?;
    let api = product::address_of::<std::net::Ipv4Addr>(lab, NAMESPACE, "api")?;
    product::wait_owner(lab, api, Duration::from_secs(60))?;
    // A trouble that has lasted looks like one.
    thread::sleep(Duration::from_secs(100));
    draw("status", "status -A", 0)?;
    draw("trouble", "status svc/api -n shop", 0)?;
    lab.kubectl(["vip", "pool", "create", "office", "192.168.10.240/28"])?.ok()?;
    lab.kubectl(["vip", "node", "drain", "node-3"])?.ok()?;
    draw("check", "check", 1)
}

/// Runs a command and draws its terminal.
fn draw(kubectl: &Command, name: &str, line: &str, wanted: i32) -> Result<()> {
    let (code, shown) = Terminal::run(kubectl, COLUMNS, &[], line)?.end(LIMIT)?;
    ensure!(code == wanted, "kubectl vip {line} ended with exit code {code}:\n{shown}");
    let folder = paths::repository().join("docs/pictures");
    fs::create_dir_all(&folder)?;
    let file = folder.join(format!("{name}.svg"));
    fs::write(&file, svg(&format!("kubectl vip {line}"), &shown))
        .with_context(|| format!("can't write {}", file.display()))?;
    println!("{}", file.display());
    Ok(())
}

/// The terminal of a command: its line after a prompt, and what it wrote.
fn svg(command: &str, shown: &str) -> String {
    let shown = format!("\x1b[1m$ {command}\x1b[0m\n{}", shown.trim_end());
    let lines: Vec<Vec<Piece>> = pieces(&shown);
    let characters = |line: &Vec<Piece>| line.iter().map(|piece| piece.text.chars().count()).sum::<usize>();
    let columns = lines.iter().map(characters).max().unwrap_or_default() as f32;
    let (width, height) = (columns * CHARACTER + 2.0 * MARGIN, lines.len() as f32 * LINE + 2.0 * MARGIN);
    let mut svg = format!(
        "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"{width:.0}\" height=\"{height:.0}\" \
         font-family=\"ui-monospace,Menlo,Consolas,'DejaVu Sans Mono',monospace\" font-size=\"{FONT}\">\n\
         <title>{}</title>\n\
         <rect width=\"100%\" height=\"100%\" rx=\"8\" fill=\"#1c2128\"/>\n",
        escaped(command)
    );
    for (n, line) in lines.iter().enumerate() {
        let y = MARGIN + LINE * (n as f32 + 0.75);
        let mut column = 0;
        for piece in line {
            // Each piece has its place and width, so that columns stay columns in every font.
            let (x, length) = (MARGIN + column as f32 * CHARACTER, piece.text.chars().count());
            column += length;
            if piece.text.trim().is_empty() {
                continue;
            }
            let weight = if piece.bold { " font-weight=\"bold\"" } else { "" };
            let _ = writeln!(
                svg,
                "<text x=\"{x:.1}\" y=\"{y:.1}\" textLength=\"{:.1}\" xml:space=\"preserve\" fill=\"{}\"{weight}>{}</text>",
                length as f32 * CHARACTER,
                piece.colour,
                escaped(&piece.text)
            );
        }
    }
    svg.push_str("</svg>\n");
    svg
}

/// Characters of one look.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Piece {
    text: String,
    colour: &'static str,
    bold: bool,
}

const PLAIN: &str = "#d0d7de";

/// The lines of a terminal; of control sequences only those of colour and weight are known, others are left out.
fn pieces(shown: &str) -> Vec<Vec<Piece>> {
    let (mut colour, mut bold) = (PLAIN, false);
    let mut lines = Vec::new();
    for line in shown.split('\n') {
        let mut found: Vec<Piece> = Vec::new();
        let mut parts = line.split("\x1b[");
        let first = parts.next().unwrap_or_default();
        let mut add = |text: &str, colour, bold| {
            if !text.is_empty() {
                found.push(Piece { text: text.to_owned(), colour, bold });
            }
        };
        add(first, colour, bold);
        for part in parts {
            let end = part.find(|c: char| c.is_ascii_alphabetic()).unwrap_or(part.len());
            let (codes, rest) = part.split_at(end);
            if rest.starts_with('m') {
                for code in codes.split(';') {
                    match code {
                        "" | "0" => (colour, bold) = (PLAIN, false),
                        "1" => bold = true,
                        "31" | "91" => colour = "#ff7b72",
                        "32" | "92" => colour = "#7ee787",
                        "33" | "93" => colour = "#e3b341",
                        "34" | "94" | "36" | "96" => colour = "#79c0ff",
                        "39" => colour = PLAIN,
                        _ => {}
                    }
                }
            }
            add(rest.get(1..).unwrap_or_default(), colour, bold);
        }
        lines.push(found);
    }
    lines
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn colours_and_columns_are_kept() {
        let drawn = svg("status", "NAME   X\n\x1b[31m! VIP301\x1b[0m a<b");
        assert!(drawn.contains(">$ status</text>") && drawn.contains("font-weight=\"bold\""), "{drawn}");
        assert!(drawn.contains("fill=\"#ff7b72\">! VIP301</text>"), "{drawn}");
        // Eight characters further.
        assert!(drawn.contains("<text x=\"84.0\"") && drawn.contains("> a&lt;b</text>"), "{drawn}");
        assert!(!drawn.contains('\x1b'), "{drawn}");
    }
}
