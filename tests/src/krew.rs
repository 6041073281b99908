//! The release of the plugin for krew: an archive for each platform, the checksums of all, and the manifest filled in.
//!
//! The same binaries give the same bytes: entries are sorted and have no time, owner or permissions of their own.

use std::{
    collections::BTreeMap,
    env, fs,
    io::{Cursor, Write as _},
    path::{Path, PathBuf},
};

use anyhow::{Context, Result, bail, ensure};
use flate2::{Compression, GzBuilder};
use sha2::{Digest, Sha256};
use zip::{ZipWriter, write::SimpleFileOptions};

use crate::{command, paths};

/// The file with the checksums, as `sha256sum --check` reads it.
pub const CHECKSUMS: &str = "checksums.txt";
/// The manifest; krew wants the plugin's name.
pub const MANIFEST: &str = "vip.yaml";

/// What krew and Go call a machine, and what Rust calls it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Platform {
    /// krew's `os`.
    pub os: &'static str,
    /// krew's `arch`.
    pub arch: &'static str,
    /// The target for which a release is built.
    pub triple: &'static str,
}

/// The platforms of a release.
pub const PLATFORMS: [Platform; 5] = [
    Platform { os: "linux", arch: "amd64", triple: "x86_64-unknown-linux-musl" },
    Platform { os: "linux", arch: "arm64", triple: "aarch64-unknown-linux-musl" },
    Platform { os: "darwin", arch: "amd64", triple: "x86_64-apple-darwin" },
    Platform { os: "darwin", arch: "arm64", triple: "aarch64-apple-darwin" },
    Platform { os: "windows", arch: "amd64", triple: "x86_64-pc-windows-msvc" },
];

/// Where binaries come from and archives go.
#[derive(Clone, Debug, clap::Args)]
pub struct Options {
    /// Take the binaries from FOLDER/OS-ARCH/ instead of building the one of this machine
    #[arg(long, value_name = "FOLDER")]
    binaries: Option<PathBuf>,
    /// Where the archives, the checksums and the manifest go [default: krew/ of the build folder]
    #[arg(long, value_name = "FOLDER")]
    output: Option<PathBuf>,
}

impl Platform {
    /// This machine's.
    pub fn here() -> Result<Self> {
        let arch = match env::consts::ARCH {
            "x86_64" => "amd64",
            "aarch64" => "arm64",
            other => other,
        };
        let os = env::consts::OS;
        let here = PLATFORMS.into_iter().find(|platform| (platform.os, platform.arch) == (os, arch));
        here.with_context(|| format!("there is no release for {os}-{arch}"))
    }

    /// Its name in files and folders: `linux-amd64`.
    pub fn name(self) -> String {
        format!("{}-{}", self.os, self.arch)
    }

    /// The name of the plugin's binary.
    pub fn binary(self) -> &'static str {
        if self.os == "windows" { "kubectl-vip.exe" } else { "kubectl-vip" }
    }

    /// The name of its archive.
    pub fn archive(self) -> String {
        let ending = if self.os == "windows" { "zip" } else { "tar.gz" };
        format!("kubectl-vip-{}.{ending}", self.name())
    }
}

/// The version of the release, as krew wants it.
pub fn tag() -> String {
    format!("v{}", env!("CARGO_PKG_VERSION"))
}

/// `lab krew`: builds or takes the binaries, packs them, and says what came out.
pub fn run(options: &Options) -> Result<()> {
    let output = options.output.clone().unwrap_or_else(|| paths::target().join("krew"));
    let binaries = match &options.binaries {
        Some(folder) => found(folder)?,
        None => {
            let here = Platform::here()?;
            vec![(here, build(here)?)]
        }
    };
    release(&binaries, &output)?;
    print!("{}", fs::read_to_string(output.join(CHECKSUMS))?);
    let left: Vec<String> = PLATFORMS
        .iter()
        .filter(|platform| !binaries.iter().any(|(packed, _)| packed == *platform))
        .map(|platform| platform.name())
        .collect();
    if !left.is_empty() {
        println!("without {}: their binaries are built on machines of their own", left.join(", "));
    }
    println!("{}", output.display());
    Ok(())
}

/// Packs binaries and writes what goes with them into a folder, which holds nothing else afterwards.
pub fn release(binaries: &[(Platform, PathBuf)], output: &Path) -> Result<()> {
    ensure!(!binaries.is_empty(), "there is no binary to pack");
    match fs::remove_dir_all(output) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("can't empty {}", output.display()));
        }
        _ => fs::create_dir_all(output).with_context(|| format!("can't make {}", output.display()))?,
    }
    let license = fs::read(paths::repository().join("LICENSE")).context("no LICENSE")?;
    let template = fs::read_to_string(paths::repository().join("krew").join(MANIFEST));
    let template = template.with_context(|| format!("no krew/{MANIFEST}"))?;
    let mut sums = BTreeMap::new();
    for (platform, binary) in binaries {
        let program = fs::read(binary).with_context(|| format!("can't read {}", binary.display()))?;
        // Sorted.
        let files = [("LICENSE", 0o644, license.as_slice()), (platform.binary(), 0o755, program.as_slice())];
        let archive = if platform.os == "windows" { zip(&files)? } else { tar_gz(&files)? };
        let sum: String = Sha256::digest(&archive).iter().map(|byte| format!("{byte:02x}")).collect();
        fs::write(output.join(platform.archive()), archive)?;
        sums.insert(platform.archive(), sum);
    }
    let lines: String = sums.iter().map(|(name, sum)| format!("{sum}  {name}\n")).collect();
    fs::write(output.join(CHECKSUMS), lines)?;
    fs::write(output.join(MANIFEST), fill(&template, &tag(), &sums)?)?;
    Ok(())
}

fn found(folder: &Path) -> Result<Vec<(Platform, PathBuf)>> {
    let all = PLATFORMS.map(|platform| (platform, folder.join(platform.name()).join(platform.binary())));
    let there: Vec<_> = all.into_iter().filter(|(_, path)| path.exists()).collect();
    ensure!(!there.is_empty(), "{} has no folder OS-ARCH with a binary", folder.display());
    Ok(there)
}

/// Builds the plugin so that it needs nothing of the machine that it runs on: with musl, where its std is installed.
fn build(platform: Platform) -> Result<PathBuf> {
    let sysroot = command::words(&["rustc", "--print", "sysroot"])?.ok()?;
    let has = |triple: &str| Path::new(sysroot.text()).join("lib/rustlib").join(triple).join("lib").exists();
    let glibc = platform.triple.replace("-musl", "-gnu");
    let triple = if has(platform.triple) { platform.triple } else { &glibc };
    let target = paths::target().join("release-plugin");
    let mut cargo = command::cargo();
    cargo.args(["build", "--locked", "--release", "--package", "kubectl-vip", "--target", triple]);
    cargo.arg("--target-dir").arg(&target);
    if triple.ends_with("-gnu") {
        cargo.env("RUSTFLAGS", "-C target-feature=+crt-static");
    }
    // The C of our dependencies asks nothing of a C library, so any compiler does.
    let compiler = format!("CC_{}", triple.replace('-', "_"));
    if triple.ends_with("-musl")
        && env::var_os(&compiler).is_none()
        && command::words(&["musl-gcc", "-v"]).is_err()
    {
        cargo.env(compiler, "cc");
    }
    if !cargo.status().context("can't start cargo")?.success() {
        bail!("kubectl-vip does not build for {triple}");
    }
    Ok(target.join(triple).join("release").join(platform.binary()))
}

/// A file of an archive: its name, permissions and contents.
type File<'a> = (&'a str, u32, &'a [u8]);

fn tar_gz(files: &[File<'_>]) -> Result<Vec<u8>> {
    // Without a time and a name in its head.
    let gzip = GzBuilder::new().mtime(0).write(Vec::new(), Compression::best());
    let mut tar = tar::Builder::new(gzip);
    for (name, mode, contents) in files {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Regular);
        header.set_size(u64::try_from(contents.len())?);
        header.set_mode(*mode);
        header.set_mtime(0);
        tar.append_data(&mut header, name, *contents)?;
    }
    Ok(tar.into_inner()?.finish()?)
}

fn zip(files: &[File<'_>]) -> Result<Vec<u8>> {
    let mut zip = ZipWriter::new(Cursor::new(Vec::new()));
    for (name, mode, contents) in files {
        let options = SimpleFileOptions::default()
            .compression_method(zip::CompressionMethod::Deflated)
            .last_modified_time(zip::DateTime::default())
            .unix_permissions(*mode);
        zip.start_file(*name, options)?;
        zip.write_all(contents)?;
    }
    Ok(zip.finish()?.into_inner())
}

/// The manifest for these archives, by name with their checksums: the template as krew-release-bot would fill it in, without
/// its comments and without the platforms that have no archive.
fn fill(template: &str, tag: &str, sums: &BTreeMap<String, String>) -> Result<String> {
    let mut text = String::new();
    let mut platforms = template.lines().filter(|line| !line.starts_with('#')).peekable();
    while let Some(line) = platforms.next() {
        let mut block = vec![line];
        if line.starts_with("  - ") {
            while let Some(next) = platforms.next_if(|next| next.starts_with("    ")) {
                block.push(next);
            }
        }
        if let Some(lines) =
            block.iter().map(|line| fill_line(line, tag, sums)).collect::<Result<Option<Vec<_>>>>()?
        {
            text.extend(lines.iter().flat_map(|line| [line.as_str(), "\n"]));
        }
    }
    ensure!(!text.contains("{{"), "krew/{MANIFEST} has a function that is not known here");
    Ok(text)
}

/// A line filled in; `None` when it is of an archive that is not there.
fn fill_line(line: &str, tag: &str, sums: &BTreeMap<String, String>) -> Result<Option<String>> {
    let Some((indent, call)) = line.split_once("{{ addURIAndSha \"") else {
        return Ok(Some(line.replace("{{ .TagName }}", tag)));
    };
    let (uri, _) = call.split_once("\" .TagName").with_context(|| format!("not understood: {line}"))?;
    let uri = uri.replace("{{ .TagName }}", tag);
    let name = uri.rsplit('/').next().unwrap_or_default();
    Ok(sums.get(name).map(|sum| format!("{indent}uri: {uri}\n{indent}sha256: {sum}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn platforms_without_an_archive_are_left_out() {
        let template = "# how\nversion: {{ .TagName }}\nplatforms:\n  - selector: a\n    {{ addURIAndSha \
                        \"https://x/{{ .TagName }}/a.zip\" .TagName | indent 4 }}\n    bin: a\n  - selector: b\n    \
                        {{ addURIAndSha \"https://x/{{ .TagName }}/b.zip\" .TagName | indent 4 }}\n    bin: b\n";
        let sums = BTreeMap::from([("b.zip".to_owned(), "00ff".to_owned())]);
        assert_eq!(
            fill(template, "v1.2.3", &sums).unwrap(),
            "version: v1.2.3\nplatforms:\n  - selector: b\n    uri: https://x/v1.2.3/b.zip\n    sha256: 00ff\n    bin: b\n"
        );
        let error = fill("{{ other }}\n", "v1", &sums).unwrap_err().to_string();
        assert!(error.contains("not known"), "{error}");
    }
}
