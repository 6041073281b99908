//! The program `lab`: reads the command line and prints an error once.

use std::{env, path::PathBuf, process::ExitCode};

use anyhow::Result;
use clap::{Parser, Subcommand};
use lab::{
    Lab, Parts, binaries, demo, guest, image, interrupt, ipvs_ear, krew, pictures, product, runner, setup,
};

/// A three-node Kubernetes cluster on this machine, and the tests that run in it.
#[derive(Parser)]
#[command(name = "lab", version)]
struct Arguments {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Subcommand)]
enum Verb {
    /// Install what the lab needs: Debian packages, the machine's kernel, Kubernetes from source
    Setup,
    /// Build Kubernetes, etcd and agnhost into the cache, if they are not there
    Binaries,
    /// Build the image of vip-node
    Image,
    /// Pack the plugin for krew: archives, checksums, manifest
    Krew(krew::Options),
    /// Start a lab
    Up {
        #[command(flatten)]
        name: Name,
        /// What to start
        #[arg(long, value_enum, default_value = "cluster")]
        only: Parts,
    },
    /// End a lab and remove what it left
    Down {
        #[command(flatten)]
        name: Name,
        /// Every lab of this clone
        #[arg(long)]
        all: bool,
    },
    /// Load the image of vip-node, or another archive, into every node of a running lab
    Load {
        #[command(flatten)]
        name: Name,
        /// A docker archive
        archive: Option<PathBuf>,
    },
    /// Run a shell command on a node, or in the machine
    Exec {
        #[command(flatten)]
        name: Name,
        /// The number of the node; without it: the machine that the nodes are in
        #[arg(long)]
        node: Option<u8>,
        /// The command
        command: String,
    },
    /// Tell the product's story on a cluster of its own, every step checked
    Demo,
    /// Draw the pictures of the documentation from what the commands say on a cluster
    Pictures {
        /// Only that of `--help`, which needs no cluster
        #[arg(long)]
        help_only: bool,
    },
    /// Run the tests, all tiers or some
    Test(runner::Options),
    /// The first process in the machine
    #[command(hide = true)]
    GuestInit {
        /// The command to run
        #[arg(trailing_var_arg = true, allow_hyphen_values = true)]
        command: Vec<String>,
    },
    /// What runs in the machine
    #[command(hide = true)]
    Guest(guest::Guest),
    /// What runs in a node
    #[command(hide = true)]
    GuestNode(guest::GuestNode),
    /// Hears what is said to IPVS on a node
    #[command(hide = true)]
    IpvsEar,
}

#[derive(clap::Args)]
struct Name {
    /// The lab's name
    #[arg(long, env = "LAB", default_value = "lab")]
    name: String,
}

fn main() -> ExitCode {
    match run(Arguments::parse().command) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(verb: Verb) -> Result<ExitCode> {
    match verb {
        Verb::Setup => setup::install()?,
        Verb::Binaries => binaries::build()?,
        Verb::Image => drop(image::build_product()?),
        Verb::Krew(options) => krew::run(&options)?,
        Verb::Up { name, only } => up(&name.name, only)?,
        Verb::Down { all: true, .. } => lab::down_all()?,
        Verb::Down { name, .. } => Lab::remove(&name.name)?,
        Verb::Load { name, archive } => {
            Lab::named(&name.name)?.load(&archive.unwrap_or_else(image::product_archive))?;
        }
        Verb::Exec { name, node, command } => {
            let lab = Lab::named(&name.name)?;
            let output = match node {
                Some(node) => lab.node(node).exec(&command)?,
                None => lab.vm().exec(&command)?,
            };
            print!("{}", output.stdout);
            eprint!("{}", output.stderr);
            return Ok(ExitCode::from(u8::try_from(output.code).unwrap_or(u8::MAX)));
        }
        Verb::Demo => demo::run()?,
        Verb::Pictures { help_only } => pictures::run(help_only)?,
        Verb::Test(options) => return runner::run(&options),
        Verb::GuestInit { command } => guest::run_init(&command)?,
        Verb::Guest(options) => guest::run(&options)?,
        Verb::GuestNode(options) => guest::run_node(&options)?,
        Verb::IpvsEar => ipvs_ear::listen()?,
    }
    Ok(ExitCode::SUCCESS)
}

fn up(name: &str, only: Parts) -> Result<()> {
    let interrupted = name.to_owned();
    interrupt::on_interrupt(move || {
        if let Err(error) = Lab::remove(&interrupted) {
            eprintln!("error: {error:#}");
        }
    })?;
    match only {
        Parts::Cluster => product::build()?,
        Parts::Api => product::build_programs()?,
        Parts::Machine => {}
    }
    let lab = match Lab::up(name, only) {
        Ok(lab) => lab,
        Err(error) => {
            // Its processes go, its logs stay.
            Lab::remove(name)?;
            return Err(error);
        }
    };
    if only != Parts::Machine {
        println!("{}", hints(&lab)?);
    }
    Ok(())
}

fn hints(lab: &Lab) -> Result<String> {
    let kubectl = binaries::path("kubectl")?;
    let program = env::current_exe()?;
    let program = program.display();
    let debug = lab::paths::target().join("debug");
    let folders = [kubectl.parent(), Some(debug.as_path())].into_iter().flatten();
    let folders: Vec<String> = folders.map(|folder| folder.display().to_string()).collect();
    let (name, netns) = (lab.name(), lab.netns().name());
    Ok(format!(
        "
the lab {name} runs; in this shell:
  export KUBECONFIG={}
  export PATH={}:$PATH
  kubectl get nodes -o wide
  kubectl vip version
be a client on the LAN (10.87.0.1):   ip netns exec {netns} bash
run something on node-2:              {program} exec --name {name} --node 2 'ip address'
unplug node-2, and plug it in again:  ip -n {netns} link set tap2 down; ip -n {netns} link set tap2 up
load a new image of vip-node:         {program} image && {program} load --name {name}
the logs of everything:               {}
take it down:                         {program} down --name {name}",
        lab.kubeconfig().display(),
        folders.join(":"),
        lab.logs_dir().display(),
    ))
}
