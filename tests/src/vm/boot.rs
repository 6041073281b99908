//! How the machine boots: an unpacked kernel, an initial file system of one static busybox with a few modules, and a
//! root that is this machine's own file tree, read-only and cached, under a writable layer in memory.

use std::{
    collections::BTreeSet,
    env, fs,
    io::{Read, Seek, SeekFrom, Write},
    path::{Path, PathBuf},
    process::{Command, Stdio},
};

use anyhow::{Context, Result};

use crate::{
    guest::{self, NODES},
    kernel, paths,
};

/// What the root needs; the kernel has none of it built in.
const MODULES: [&str; 5] = ["virtio_pci", "9pnet_virtio", "9p", "overlay", "virtio_net"];

/// Quiet, and without what costs time under emulation: a clock that traps, protections against other tenants, and
/// deeper page tables. `tsc=reliable`: emulated processors read this machine's one clock.
const KERNEL_LINE: &str = "console=ttyS0 quiet loglevel=4 panic=-1 tsc=reliable clocksource=tsc mitigations=off no5lvl \
                           preempt=none audit=0 nowatchdog systemd.unified_cgroup_hierarchy=1";

/// A folder that the machine may write, and that it sees at the same path.
pub(super) struct Shared<'a> {
    pub(super) tag: &'a str,
    pub(super) path: &'a Path,
}

/// The command that runs the machine in the foreground. `init` is the program that runs in it, with its arguments.
pub(super) fn command(folder: &Path, shared: &[Shared<'_>], init: &str) -> Result<Command> {
    let kernel = kernel::find()?;
    let initramfs = folder.join("run/initramfs");
    fs::write(&initramfs, archive(&kernel, shared, init)?)?;
    let mut qemu = Command::new("qemu-system-x86_64");
    qemu.args(["-name", "kubectl-vip-lab", "-machine", "q35", "-smp", "2", "-m", "8G"]);
    match env::var("LAB_ACCEL").as_deref() {
        Ok("kvm") => qemu.args(["-accel", "kvm", "-cpu", "host"]),
        _ => qemu.args(["-accel", "tcg,thread=multi", "-cpu", "max"]),
    };
    qemu.args(["-nodefaults", "-display", "none", "-no-reboot", "-serial", "stdio", "-monitor", "none"]);
    qemu.arg("-kernel").arg(unpacked(&kernel).unwrap_or(kernel)).arg("-initrd").arg(initramfs);
    qemu.args(["-append", KERNEL_LINE]);
    share(&mut qemu, "host", Path::new("/"), ",readonly=on,multidevs=remap");
    for one in shared {
        share(&mut qemu, one.tag, one.path, "");
    }
    for card in 0..=u8::try_from(NODES.len())? {
        qemu.arg("-netdev").arg(format!("tap,id=n{card},ifname=tap{card},script=no,downscript=no"));
        qemu.arg("-device").arg(format!("virtio-net-pci,netdev=n{card},romfile=,mac={}", guest::mac(card)));
    }
    Ok(qemu)
}

fn share(qemu: &mut Command, tag: &str, path: &Path, options: &str) {
    qemu.arg("-fsdev").arg(format!("local,id={tag},path={},security_model=none{options}", path.display()));
    qemu.arg("-device").arg(format!("virtio-9p-pci,fsdev={tag},mount_tag={tag}"));
}

/// The kernel without its compression: unpacking it takes seconds under emulation, and nothing here.
fn unpacked(kernel: &Path) -> Result<PathBuf> {
    const XZ: &[u8] = b"\xfd7zXZ\0";
    let name = kernel
        .file_name()
        .context("a kernel without a name")?
        .to_string_lossy()
        .replace("vmlinuz", "vmlinux");
    let file = paths::cache().join(name);
    if file.exists() {
        return Ok(file);
    }
    let mut packed = fs::File::open(kernel)?;
    let mut data = Vec::new();
    packed.read_to_end(&mut data)?;
    let start = data
        .windows(XZ.len())
        .position(|window| window == XZ)
        .context("a kernel that is not packed by xz")?;
    packed.seek(SeekFrom::Start(start as u64))?;
    let fresh = file.with_extension(format!("{}.new", std::process::id()));
    // It complains of what follows the packed part.
    let mut xz = Command::new("xz");
    xz.args(["--decompress", "--stdout"])
        .stdin(packed)
        .stdout(fs::File::create(&fresh)?)
        .stderr(Stdio::null());
    xz.status().context("can't start xz")?;
    let mut head = [0; 4];
    fs::File::open(&fresh)?.read_exact(&mut head).context("an empty kernel")?;
    anyhow::ensure!(head == *b"\x7fELF", "the unpacked kernel is no ELF file");
    fs::rename(&fresh, &file)?;
    Ok(file)
}

/// The initial file system, as a cpio archive.
fn archive(kernel: &Path, shared: &[Shared<'_>], init: &str) -> Result<Vec<u8>> {
    let mut cpio = Cpio::default();
    for folder in ["bin", "dev", "proc", "host", "memory", "root", "modules"] {
        cpio.add(folder, 0o040_755, &[])?;
    }
    let busybox = ["/bin/busybox", "/usr/bin/busybox"].into_iter().find(|path| Path::new(path).exists());
    cpio.add("bin/busybox", 0o100_755, &fs::read(busybox.context("no busybox: run `make setup`")?)?)?;
    let mut script = String::from("#!/bin/busybox sh\nb=/bin/busybox\n");
    for (number, module) in modules(kernel)?.iter().enumerate() {
        let name = format!("modules/{number}.ko");
        cpio.add(
            &name,
            0o100_644,
            &fs::read(module).with_context(|| format!("can't read {}", module.display()))?,
        )?;
        script += &format!("$b insmod /{name} || echo \"can't load {}\"\n", module.display());
    }
    const NINE_P: &str = "trans=virtio,version=9p2000.L,msize=512000,access=any";
    script += &format!("$b mount -t 9p -o ro,{NINE_P},cache=loose host /host || exec $b sh\n");
    script += "$b mount -t tmpfs -o size=100% tmpfs /memory; $b mkdir /memory/upper /memory/work\n";
    script +=
        "$b mount -t overlay -o lowerdir=/host,upperdir=/memory/upper,workdir=/memory/work overlay /root\n";
    for Shared { tag, path } in shared {
        script += &format!("$b mount -t 9p -o rw,{NINE_P},cache=none {tag} /root{}\n", path.display());
    }
    // The same folders there as here.
    for variable in ["HOME", "XDG_CACHE_HOME", "KUBEBUILDER_ASSETS"] {
        if let Ok(value) = env::var(variable) {
            script += &format!("export {variable}='{value}'\n");
        }
    }
    script += &format!("exec $b switch_root /root {init}\n");
    cpio.add("init", 0o100_755, script.as_bytes())?;
    cpio.finish()
}

/// The modules with all that they need, in the order of loading.
fn modules(kernel: &Path) -> Result<Vec<PathBuf>> {
    let release =
        kernel.file_name().and_then(|name| name.to_str()).and_then(|name| name.strip_prefix("vmlinuz-"));
    let root =
        Path::new("/lib/modules").join(release.context("a kernel that is not called vmlinuz-RELEASE")?);
    let index = fs::read_to_string(root.join("modules.dep")).context("no list of the kernel's modules")?;
    order(&index).map(|paths| paths.into_iter().map(|path| root.join(path)).collect())
}

fn order(index: &str) -> Result<Vec<String>> {
    let (mut seen, mut order) = (BTreeSet::new(), Vec::new());
    for module in MODULES {
        let line = index.lines().find_map(|line| {
            line.split_once(':').filter(|(path, _)| path.rsplit('/').next() == Some(&format!("{module}.ko")))
        });
        let (path, needs) = line.with_context(|| format!("the kernel has no module {module}"))?;
        // The list of each module is complete; what is needed first comes last.
        for path in needs.split_whitespace().rev().chain([path]) {
            if seen.insert(path) {
                order.push(path.to_owned());
            }
        }
    }
    Ok(order)
}

/// A cpio archive in the form "newc", which the kernel reads.
#[derive(Default)]
struct Cpio {
    data: Vec<u8>,
    entries: u32,
}

impl Cpio {
    fn add(&mut self, name: &str, mode: u32, content: &[u8]) -> Result<()> {
        self.entries += 1;
        let size = u32::try_from(content.len())?;
        let length = u32::try_from(name.len() + 1)?;
        // Inode, mode, user, group, links, time, size, four device numbers, length of the name, checksum.
        let fields = [self.entries, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, length, 0];
        write!(self.data, "070701")?;
        for field in fields {
            write!(self.data, "{field:08x}")?;
        }
        write!(self.data, "{name}\0")?;
        self.pad();
        self.data.extend_from_slice(content);
        self.pad();
        Ok(())
    }

    fn finish(mut self) -> Result<Vec<u8>> {
        self.add("TRAILER!!!", 0, &[])?;
        Ok(self.data)
    }

    fn pad(&mut self) {
        self.data.resize(self.data.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_module_needs_comes_before_it() {
        let index = "k/virtio_pci.ko: k/legacy.ko k/virtio.ko k/ring.ko\nk/9pnet_virtio.ko: k/9pnet.ko k/virtio.ko k/ring.ko\n\
                     k/9p.ko: k/9pnet.ko\nk/overlay.ko:\nk/virtio_net.ko: k/virtio.ko k/ring.ko\n";
        let order = order(index).unwrap();
        let at = |name: &str| order.iter().position(|path| path.ends_with(name)).unwrap();
        assert_eq!(order.len(), 9);
        assert!(
            at("/ring.ko") < at("/virtio.ko")
                && at("/virtio.ko") < at("/virtio_pci.ko")
                && at("/9pnet.ko") < at("/9p.ko")
        );
    }

    #[test]
    fn an_archive_is_aligned_and_ends() {
        let mut cpio = Cpio::default();
        cpio.add("init", 0o100_755, b"x").unwrap();
        let data = cpio.finish().unwrap();
        assert!(data.starts_with(b"070701") && data.len() % 4 == 0);
        assert!(data.windows(10).any(|window| window == b"TRAILER!!!"));
    }
}
