//! The first process of a sandbox's namespaces: builds a root that holds nothing but the
//! machine's programs, read only, and two directories in memory; takes every right away;
//! starts the program and gathers what it printed and left.

use std::collections::HashMap;
use std::fs;
use std::io::{Read, Write, stdin};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use capx_core::domain::digest::sha256;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    Scope, path_beneath_rules,
};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rustix::mount::{
    MountFlags, MountPropagationFlags, UnmountFlags, mount, mount_bind_recursive, mount_change, mount_remount, unmount,
};
use rustix::process::{Resource, Rlimit, pivot_root, set_parent_process_death_signal, setrlimit};
use rustix::thread::{
    CapabilitySet, CapabilitySets, capability_is_in_bounding_set, remove_capability_from_bounding_set,
    set_capabilities, set_no_new_privs,
};

use super::filter;
use super::limits::{
    FILES_BYTES_MAX, FILES_MAX, MEMORY_BYTES_MAX, OPEN_FILES_MAX, PRINTED_BYTES_END, PRINTED_BYTES_MAX, PROCESSES_MAX,
};
use super::outside::{no, refuse};
use super::wire::{self, File, Order, Printed, Report};

/// What is seen of the machine, read only: its programs and what they need to start.
const SEEN: &[&str] = &["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives"];
/// The devices that there are.
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];
/// The program's directory.
const WORK: &str = "/work";
/// Another one, which is thrown away.
const SCRATCH: &str = "/tmp";
/// Where the new root is built.
const BUILT_AT: &str = "/tmp";
/// How deep directories are looked through.
const DEPTH_MAX: usize = 32;
/// How long what was printed is waited for when the program and all that it started is gone.
const LAST_WORDS: Duration = Duration::from_secs(2);
/// The highest number of a capability that a kernel may know: a set has 64 places.
const CAPABILITIES: u32 = 64;

/// Is the process.
pub fn run() -> ExitCode {
    match work() {
        Ok(report) => {
            let packed = wire::pack(&report, &report.files);
            match packed.and_then(|packed| std::io::stdout().write_all(&packed)) {
                Ok(()) => ExitCode::SUCCESS,
                Err(_) => ExitCode::FAILURE,
            }
        }
        Err(why) => refuse(why),
    }
}

fn work() -> Result<Report, String> {
    set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(no("the parent's end"))?;
    let mut order: Order = wire::unpack(&mut stdin().lock()).map_err(no("the order"))?;
    let files = std::mem::take(&mut order.files);
    build_root()?;
    let before = lay_out(files)?;
    give_up_rights(order.millis)?;
    let ended = perform(order)?;
    Ok(gather(ended, &before))
}

fn build_root() -> Result<(), String> {
    let still = MountFlags::NOSUID | MountFlags::NODEV;
    let private = MountPropagationFlags::PRIVATE | MountPropagationFlags::REC;
    mount_change("/", private).map_err(no("private mounts"))?;
    mount("tmpfs", BUILT_AT, "tmpfs", still, Some(c"size=1m,nr_inodes=512,mode=755")).map_err(no("a root"))?;
    let root = Path::new(BUILT_AT);
    for seen in SEEN {
        show(root, Path::new(seen)).map_err(no("the machine's programs"))?;
    }
    for device in DEVICES {
        let at = inside(root, Path::new(device));
        fs::create_dir_all(root.join("dev")).and_then(|()| fs::write(&at, "")).map_err(no("devices"))?;
        mount_bind_recursive(*device, &at).map_err(no("devices"))?;
    }
    for (directory, options) in [(WORK, c"size=64m,nr_inodes=4096,mode=755"), (SCRATCH, c"size=64m,nr_inodes=4096")] {
        let at = inside(root, Path::new(directory));
        fs::create_dir_all(&at).map_err(no("directories"))?;
        mount("tmpfs", &at, "tmpfs", still, Some(options)).map_err(no("directories"))?;
    }
    std::env::set_current_dir(root).map_err(no("the root"))?;
    // The old root lies over the new one for a moment, and is taken off.
    pivot_root(".", ".").map_err(no("pivot_root"))?;
    unmount(".", UnmountFlags::DETACH).map_err(no("the old root"))?;
    std::env::set_current_dir("/").map_err(no("the root"))?;
    mount_remount("/", still | MountFlags::RDONLY, c"").map_err(no("a root that is read only"))
}

fn inside(root: &Path, path: &Path) -> PathBuf {
    root.join(path.strip_prefix("/").unwrap_or(path))
}

/// A part of the machine at the same place, read only; a link as the link that it is.
fn show(root: &Path, path: &Path) -> std::io::Result<()> {
    let Ok(found) = fs::symlink_metadata(path) else { return Ok(()) };
    let at = inside(root, path);
    if let Some(above) = at.parent() {
        fs::create_dir_all(above)?;
    }
    if found.is_symlink() {
        return symlink(fs::read_link(path)?, at);
    }
    if found.is_dir() {
        fs::create_dir_all(&at)?
    } else {
        fs::write(&at, "")?
    }
    mount_bind_recursive(path, &at)?;
    let flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
    Ok(mount_remount(&at, flags, c"")?)
}

/// Puts the files in their places, and gives what they were.
fn lay_out(files: Vec<File>) -> Result<HashMap<String, [u8; 32]>, String> {
    let mut before = HashMap::new();
    for file in files {
        let at = Path::new(WORK).join(&file.path);
        if let Some(above) = at.parent() {
            fs::create_dir_all(above).map_err(no("the files"))?;
        }
        fs::write(&at, &file.bytes).map_err(no("the files"))?;
        fs::set_permissions(&at, fs::Permissions::from_mode(0o755)).map_err(no("the files"))?;
        before.insert(file.path, sha256(&file.bytes));
    }
    Ok(before)
}

/// From here on this process, too, can do no more than the program: it reads pipes and
/// files, and starts it.
fn give_up_rights(millis: u64) -> Result<(), String> {
    for capability in (0..CAPABILITIES).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
        if capability_is_in_bounding_set(capability).unwrap_or(false) {
            remove_capability_from_bounding_set(capability).map_err(no("capabilities"))?;
        }
    }
    let none = CapabilitySet::empty();
    set_capabilities(None, CapabilitySets { effective: none, permitted: none, inheritable: none })
        .map_err(no("capabilities"))?;
    set_no_new_privs(true).map_err(no("no_new_privs"))?;
    for (resource, most) in [
        (Resource::Core, 0),
        (Resource::Nofile, OPEN_FILES_MAX),
        (Resource::Nproc, PROCESSES_MAX),
        (Resource::Fsize, FILES_BYTES_MAX),
        // A process that turns for as long as it may has used no more than this.
        (Resource::Cpu, (millis / 1_000).saturating_add(2)),
    ] {
        setrlimit(resource, Rlimit { current: Some(most), maximum: Some(most) }).map_err(no("limits"))?;
    }
    let paths = landlocked().map_err(no("landlock"))?;
    if paths != RulesetStatus::FullyEnforced && paths != RulesetStatus::PartiallyEnforced {
        return Err("landlock: the kernel does not enforce it".into());
    }
    filter::apply().map_err(no("seccomp"))
}

fn landlocked() -> Result<RulesetStatus, landlock::RulesetError> {
    // All of files, as kernels know it from 6.2 on, or nothing is run; sockets and signals
    // where they can be had, since other layers hold them as well.
    let files = ABI::V3;
    let seen = SEEN.iter().filter(|path| Path::new(path).exists());
    let status = Ruleset::default()
        .set_compatibility(CompatLevel::HardRequirement)
        .handle_access(AccessFs::from_all(files))?
        .set_compatibility(CompatLevel::BestEffort)
        .handle_access(AccessNet::from_all(ABI::V4))?
        .scope(Scope::from_all(ABI::V6))?
        .create()?
        .add_rules(path_beneath_rules(seen, AccessFs::from_read(files)))?
        .add_rules(path_beneath_rules(DEVICES, AccessFs::ReadFile | AccessFs::WriteFile))?
        .add_rules(path_beneath_rules([WORK, SCRATCH], AccessFs::from_all(files)))?
        .restrict_self()?;
    Ok(status.ruleset)
}

/// How a program ended.
struct Ended {
    report: Report,
}

fn perform(order: Order) -> Result<Ended, String> {
    let mut report = Report::default();
    let Some(program) = order.argv.first() else { return Err("there is no program to run".into()) };
    let limited = format!("ulimit -v {} && exec \"$@\"", MEMORY_BYTES_MAX / 1_024);
    // The limit of memory is the program's alone: this process may need more than that for
    // the files.
    let started = Command::new("/bin/sh")
        .args(["-c", &limited, program])
        .args(&order.argv)
        .env_clear()
        .envs([("PATH", "/usr/local/bin:/usr/bin:/bin"), ("HOME", WORK), ("TMPDIR", SCRATCH), ("LANG", "C.UTF-8")])
        .current_dir(WORK)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn();
    let mut child = started.map_err(no("the program"))?;
    if let Some(mut input) = child.stdin.take() {
        let text = order.stdin;
        std::thread::spawn(move || input.write_all(text.as_bytes()));
    }
    let (stdout, stderr) = (Pipe::read(child.stdout.take()), Pipe::read(child.stderr.take()));
    report.timed_out = ended_late(&mut child, Duration::from_millis(order.millis));
    let status = child.wait().map_err(no("the program"))?;
    (report.exit_code, report.signal) = (status.code(), status.signal());
    (report.stdout, report.stderr) = (stdout.printed(), stderr.printed());
    Ok(Ended { report })
}

/// Waits for a program; where its time is over before, ends it. In both cases nothing that
/// it has started goes on.
fn ended_late(child: &mut Child, time: Duration) -> bool {
    let over = Arc::new(AtomicBool::new(false));
    let (tell, told) = mpsc::channel::<()>();
    let watch = std::thread::spawn({
        let over = Arc::clone(&over);
        move || {
            if told.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                over.store(true, Ordering::SeqCst);
                end_all();
            }
        }
    });
    let _ = child.wait();
    drop(tell);
    let _ = watch.join();
    end_all();
    over.load(Ordering::SeqCst)
}

/// Everything in the namespace but this process.
fn end_all() {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
}

/// What comes over a pipe, as far as it has come.
struct Pipe {
    kept: Arc<Mutex<(Vec<u8>, bool)>>,
    done: mpsc::Receiver<()>,
}

impl Pipe {
    fn read(from: Option<impl Read + Send + 'static>) -> Self {
        let kept = Arc::new(Mutex::new((Vec::new(), false)));
        let (tell, done) = mpsc::channel();
        let into = Arc::clone(&kept);
        std::thread::spawn(move || {
            let Some(mut from) = from else { return };
            let (mut buffer, mut total) = (vec![0; 64 * 1024], 0_u64);
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                total += read as u64;
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                let room = PRINTED_BYTES_MAX.saturating_sub(kept.0.len()).min(read);
                kept.0.extend_from_slice(&buffer[..room]);
                kept.1 |= room < read;
                if total > PRINTED_BYTES_END {
                    end_all();
                    break;
                }
            }
            let _ = tell.send(());
        });
        Self { kept, done }
    }

    fn printed(&self) -> Printed {
        let _ = self.done.recv_timeout(LAST_WORDS);
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        Printed { text: String::from_utf8_lossy(&kept.0).into_owned(), cut: kept.1 }
    }
}

/// Adds what has changed of the files.
fn gather(ended: Ended, before: &HashMap<String, [u8; 32]>) -> Report {
    let mut report = ended.report;
    let mut found = Found::default();
    found.look(Path::new(WORK), 0);
    report.removed = before.keys().filter(|path| !found.seen.contains(*path)).cloned().collect();
    report.removed.sort();
    report.files =
        found.files.into_iter().filter(|file| before.get(&file.path) != Some(&sha256(&file.bytes))).collect();
    report.left = found.left;
    report
}

#[derive(Default)]
struct Found {
    seen: std::collections::HashSet<String>,
    files: Vec<File>,
    left: Vec<String>,
    bytes: u64,
}

impl Found {
    fn look(&mut self, directory: &Path, depth: usize) {
        let Ok(entries) = fs::read_dir(directory) else { return };
        for entry in entries.flatten() {
            let path = entry.path();
            let name = path.strip_prefix(WORK).unwrap_or(&path).to_str().map(ToOwned::to_owned);
            let Some(name) = name.filter(|name| !name.chars().any(char::is_control)) else {
                self.leave("a name that is no plain text");
                continue;
            };
            match entry.file_type() {
                Ok(kind) if kind.is_dir() && depth + 1 < DEPTH_MAX => self.look(&path, depth + 1),
                Ok(kind) if kind.is_file() => self.keep(&path, name),
                _ => self.leave(&format!("`{name}` is no regular file, or too deep")),
            }
        }
    }

    fn keep(&mut self, path: &Path, name: String) {
        self.seen.insert(name.clone());
        let room = FILES_BYTES_MAX - self.bytes;
        let no_link = rustix::fs::OFlags::NOFOLLOW.bits().cast_signed();
        let Ok(file) = fs::File::options().read(true).custom_flags(no_link).open(path) else { return };
        let mut bytes = Vec::new();
        let read = file.take(room + 1).read_to_end(&mut bytes).unwrap_or(usize::MAX);
        if read as u64 > room || self.files.len() >= FILES_MAX {
            return self.leave(&format!("`{name}` is more than the workspace holds"));
        }
        self.bytes += read as u64;
        self.files.push(File::new(name, bytes));
    }

    fn leave(&mut self, why: &str) {
        const LEFT_MAX: usize = 20;
        if self.left.len() < LEFT_MAX {
            self.left.push(why.to_owned());
        }
    }
}
