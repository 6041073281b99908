//! `lab test`: runs the tiers of tests, the cheapest first, starts what each needs and takes it down again.

use std::{
    fs,
    io::Write as _,
    process::{self, ExitCode, Stdio},
    thread,
    time::{Duration, Instant},
};

use anyhow::{Context, Result, anyhow, ensure};

use crate::{
    command, interrupt,
    lab::{Lab, Parts},
    paths, product,
};

/// How long the tests in the machine may take.
const KERNEL: Duration = Duration::from_secs(600);

/// Which tests.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// The tiers to run; all when none is named
    tiers: Vec<Tier>,
}

/// The tiers, from the cheapest to the dearest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, clap::ValueEnum)]
enum Tier {
    /// Plain tests of every crate
    Unit,
    /// Network namespaces on this machine's own kernel
    Netns,
    /// A real API server without nodes
    Api,
    /// A kernel with IPVS in a virtual machine
    Kernel,
    /// Three nodes
    Cluster,
}

const ALL: [Tier; 5] = [Tier::Unit, Tier::Netns, Tier::Api, Tier::Kernel, Tier::Cluster];

/// What test programs said.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Count {
    passed: usize,
    failed: usize,
}

impl Count {
    fn add(&mut self, other: Self) {
        self.passed += other.passed;
        self.failed += other.failed;
    }

    /// Reads a line of libtest's. A test that was not run has not passed: ignored ones count as failed.
    fn read(&mut self, line: &str) {
        let Some((_, counts)) = line.strip_prefix("test result: ").and_then(|rest| rest.split_once(". "))
        else {
            return;
        };
        for (count, word) in counts.split("; ").filter_map(|part| part.split_once(' ')) {
            let count: usize = count.parse().unwrap_or_default();
            match word {
                "passed" => self.passed += count,
                "failed" | "ignored" => self.failed += count,
                _ => {}
            }
        }
    }
}

/// Runs the tiers. The last line is `N passed, N failed`.
pub fn run(options: &Options) -> Result<ExitCode> {
    let names = ALL.iter().flat_map(|tier| tier.lab_names());
    let names: Vec<String> = names.collect();
    interrupt::on_interrupt(move || {
        for name in names {
            if let Err(error) = Lab::remove(&name) {
                eprintln!("error: {error:#}");
            }
        }
    })?;
    let tiers = if options.tiers.is_empty() { ALL.to_vec() } else { options.tiers.clone() };
    let mut total = Count::default();
    let mut summary = Vec::new();
    for tier in ALL.into_iter().filter(|tier| tiers.contains(tier)) {
        println!("\n== {tier:?} ==");
        let clock = Instant::now();
        let count = tier.run().unwrap_or_else(|error| {
            println!("error: {error:#}");
            Count { passed: 0, failed: 1 }
        });
        summary.push(format!(
            "{:8} {:4} passed {:3} failed {:6.0} s",
            format!("{tier:?}"),
            count.passed,
            count.failed,
            clock.elapsed().as_secs_f64()
        ));
        total.add(count);
    }
    println!("\n{}", summary.join("\n"));
    if total.passed == 0 {
        total.failed = total.failed.max(1);
    }
    println!("{} passed, {} failed", total.passed, total.failed);
    Ok(if total.failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

impl Tier {
    /// The labs of this tier in this run; runs beside each other have their own.
    fn lab_names(self) -> Vec<String> {
        let letters = match self {
            Self::Unit | Self::Netns => "",
            Self::Api => "abdef",
            Self::Kernel => "k",
            Self::Cluster => "c",
        };
        letters.chars().map(|letter| format!("t{letter}{}", process::id())).collect()
    }

    fn run(self) -> Result<Count> {
        match self {
            Self::Unit => {
                let mut count = cargo(&["--workspace", "--exclude", "lab"], &[], None)?;
                count.add(cargo(&["--package", "lab", "--lib", "--bins"], &[], None)?);
                Ok(count)
            }
            Self::Netns => {
                product::build_programs()?;
                let of = |names: &[&'static str]| -> Vec<&str> {
                    let tests = names.iter().flat_map(|name| ["--test", name]);
                    ["--package", "lab"].into_iter().chain(tests).collect()
                };
                // They wait more than they compute.
                let four: &[&str] = &["--test-threads=4"];
                let selections = [of(&["netns"]), of(&["netns_loss", "netns_nat", "netns_neighbours"])];
                at_once(&selections, |_, selection| cargo(selection, four, None))
            }
            Self::Api => {
                product::build_programs()?;
                let objects = ["--package", "lab", "--test", "api_admission", "--test", "api_plugin"];
                let plugin = ["--package", "lab", "--test", "api_plugin"];
                let agents = ["--package", "lab", "--test", "agents"];
                // Agents are for labs of their own, one after another: they stop the API server, and nodes that others played
                // would be their peers. One test of theirs takes as long as all others.
                let longest = "whatever_is_killed";
                // Those that install and uninstall want to be alone, so they have labs too.
                let (alone, cut_off) = (["install::", "upgrade::"], "interrupted::");
                let others: Vec<&str> = ["--test-threads=4"]
                    .into_iter()
                    .chain(alone.iter().chain([&cut_off]).flat_map(|name| ["--skip", name]))
                    .collect();
                let alone: Vec<&str> = ["--test-threads=1"].into_iter().chain(alone).collect();
                self.beside_each_other(&[
                    (&objects, &others),
                    (&plugin, &alone),
                    (&plugin, &["--test-threads=1", cut_off]),
                    (&agents, &["--test-threads=1", "--skip", longest]),
                    (&agents, &["--test-threads=1", longest]),
                ])
            }
            Self::Kernel => {
                product::build_programs()?;
                let program = kernel_program()?;
                self.within(0, Parts::Machine, |lab| in_machine(lab, &program))
            }
            Self::Cluster => {
                product::build()?;
                let tests = ["--package", "lab", "--test", "cluster"];
                // A compiler beside the machine would take its processors.
                let built = cargo(&[&tests[..], &["--no-run"]].concat(), &[], None)?;
                ensure!(built.failed == 0, "the tests do not build");
                self.within(0, Parts::Cluster, |lab| {
                    cargo(&tests, &["--test-threads=2"], Some(("LAB", lab.name())))
                })
            }
        }
    }

    /// Runs selections of tests at once, each in its own lab with an API server. None may be empty.
    fn beside_each_other(self, selections: &[(&[&str], &[&str])]) -> Result<Count> {
        at_once(selections, |index, (selection, arguments)| {
            self.within(index, Parts::Api, |lab| {
                let count = cargo(selection, arguments, Some(("LAB_API", lab.name())))?;
                ensure!(count != Count::default(), "no test is called {arguments:?}");
                Ok(count)
            })
        })
    }

    /// A lab for as long as the work takes. Its logs are kept, and named, only when something failed.
    fn within(self, index: usize, parts: Parts, work: impl FnOnce(&Lab) -> Result<Count>) -> Result<Count> {
        let name = &self.lab_names()[index];
        let result = Lab::up(name, parts).and_then(|lab| work(&lab));
        Lab::remove(name)?;
        let folder = paths::lab(name);
        if matches!(&result, Ok(count) if count.failed == 0) {
            fs::remove_dir_all(&folder).with_context(|| format!("can't remove {}", folder.display()))?;
        } else {
            println!("all logs are in {}", folder.join("logs").display());
        }
        result
    }
}

/// Does the same with each of them, by its index, all at once.
fn at_once<T: Sync>(all: &[T], run: impl Fn(usize, &T) -> Result<Count> + Sync) -> Result<Count> {
    let run = &run;
    thread::scope(|scope| {
        let running: Vec<_> =
            all.iter().enumerate().map(|(index, one)| scope.spawn(move || run(index, one))).collect();
        let mut total = Count::default();
        for one in running {
            total.add(one.join().map_err(|_| anyhow!("a thread of the tests has panicked"))??);
        }
        Ok(total)
    })
}

/// Runs `cargo test`, shows what it prints when it is at its end, and counts.
fn cargo(selection: &[&str], arguments: &[&str], variable: Option<(&str, &str)>) -> Result<Count> {
    let mut cargo = command::cargo();
    cargo.args(["test", "--quiet", "--no-fail-fast"]).args(selection);
    if !selection.contains(&"--test") && !selection.contains(&"--lib") {
        cargo.args(["--lib", "--bins", "--tests"]);
    }
    cargo.arg("--").args(arguments);
    if let Some((name, value)) = variable {
        cargo.env(name, value);
    }
    let output = cargo.stdin(Stdio::null()).stderr(Stdio::inherit()).output().context("can't start cargo")?;
    let text = String::from_utf8_lossy(&output.stdout);
    print!("{text}");
    let mut count = Count::default();
    text.lines().for_each(|line| count.read(line));
    if !output.status.success() && count.failed == 0 {
        println!("`{}` ended with an error", command::display(&cargo));
        count.failed = 1;
    }
    Ok(count)
}

/// Builds the program with the kernel's tests and gives its path.
fn kernel_program() -> Result<String> {
    let mut cargo = command::cargo();
    cargo.args([
        "test",
        "--quiet",
        "--package",
        "lab",
        "--test",
        "kernel",
        "--no-run",
        "--message-format=json",
    ]);
    let output = cargo.stderr(Stdio::inherit()).output().context("can't start cargo")?;
    let messages = String::from_utf8_lossy(&output.stdout).into_owned();
    let messages = messages.lines().filter_map(|line| serde_json::from_str::<serde_json::Value>(line).ok());
    let programs = messages.filter(|message| message["target"]["name"] == "kernel");
    programs
        .filter_map(|message| message["executable"].as_str().map(str::to_owned))
        .next_back()
        .context("the kernel's tests do not build")
}

/// Runs a test program in the machine, which sees files of this one only in the shared folder.
fn in_machine(lab: &Lab, program: &str) -> Result<Count> {
    let there = lab.shared_dir().join("kernel-tests");
    fs::copy(program, &there).context("can't copy the tests into the machine")?;
    let agent = "vip-node";
    fs::copy(paths::target().join("debug").join(agent), lab.shared_dir().join(agent))
        .context("can't copy the agent into the machine")?;
    let mut count = Count::default();
    let mut text = Vec::new();
    // From the machine's memory: the pages of a program in the shared folder are fetched one by one.
    let folder = lab.shared_dir();
    let command = format!(
        "cp {} {} /run/ && /run/kernel-tests --test-threads=2",
        there.display(),
        folder.join(agent).display()
    );
    let output = lab.vm().exec_for(&command, KERNEL, |_, bytes| {
        let _ = std::io::stdout().write_all(bytes);
        text.extend_from_slice(bytes);
    })?;
    String::from_utf8_lossy(&text).lines().for_each(|line| count.read(line));
    if !output.success() && count.failed == 0 {
        println!("the tests in the machine ended with exit code {}", output.code);
        count.failed = 1;
    }
    Ok(count)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_counted_and_ignored_tests_have_not_passed() {
        let mut count = Count::default();
        count.read(
            "test result: ok. 32 passed; 0 failed; 1 ignored; 0 measured; 0 filtered out; finished in 0.81s",
        );
        count.read("test result: FAILED. 3 passed; 2 failed; 0 ignored; 0 measured; 9 filtered out; finished in 0.81s");
        count.read("running 3 tests");
        assert_eq!(count, Count { passed: 35, failed: 3 });
    }
}
