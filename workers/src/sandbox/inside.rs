//! The first process of a sandbox's namespaces: builds a root that holds nothing but the
//! machine's programs, read only, and two directories in memory; takes every right away;
//! starts the program and gathers what it printed and left.

use std::collections::{HashMap, HashSet};
use std::ffi::CStr;
use std::fs;
use std::io::{Read, Write, stdin};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, mpsc};
use std::time::Duration;

use capx_core::domain::digest::sha256;
use landlock::{
    ABI, Access, AccessFs, AccessNet, CompatLevel, Compatible, Ruleset, RulesetAttr, RulesetCreatedAttr, RulesetStatus,
    Scope, path_beneath_rules,
};
use nix::sys::signal::{SigSet, Signal, kill};
use nix::sys::wait::{WaitStatus, waitpid};
use nix::unistd::Pid;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::fs::OFlags;
use rustix::io::Errno;
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
use crate::tools::workspace::{PATH_BYTES_MAX, TEMPORARY};

/// What is seen of the machine, read only: its programs and what they need to start.
const SEEN: &[&str] = &["/usr", "/bin", "/sbin", "/lib", "/lib32", "/lib64", "/etc/ld.so.cache", "/etc/alternatives"];
/// Of that, what is often somebody's own: applications are put there in containers.
const HIDDEN: &[&str] = &["/usr/src", "/usr/local/etc"];
/// The devices that there are.
const DEVICES: &[&str] = &["/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom"];
/// The program's directory.
const WORK: &str = "/work";
/// Another one, which is thrown away.
const SCRATCH: &str = "/tmp";
/// Room for the files that it is given, those that it makes of them, and the rounding to pages.
const WORK_SIZE: &CStr = c"size=160m,nr_inodes=16384,mode=755";
const SCRATCH_SIZE: &CStr = c"size=64m,nr_inodes=4096,mode=1777";
/// Where the new root is built.
const BUILT_AT: &str = "/tmp";
/// The bytes of all names of files together.
const NAMES_BYTES_MAX: usize = 1024 * 1024;
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
            let packed = wire::pack(&report, &report.files).or_else(|why| {
                let left = vec![format!("its files were not kept: {why}")];
                wire::pack(&Report { files: Vec::new(), removed: Vec::new(), left, ..report }, &[])
            });
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
    // The kernel lets none through to the first process of a namespace but those that the
    // standard library handles; here those come from the program. It starts with none blocked.
    SigSet::all().thread_block().map_err(no("signals"))?;
    // Whoever started it may have ended before that held.
    let alive = std::io::stderr();
    let mut end = [PollFd::new(&alive, PollFlags::empty())];
    if poll(&mut end, Some(&rustix::event::Timespec { tv_sec: 0, tv_nsec: 0 })).map_err(no("the parent's end"))? > 0 {
        return Err("the parent's end: it has come".into());
    }
    let mut order: Order = wire::unpack(&mut stdin().lock()).map_err(no("the order"))?;
    let files = std::mem::take(&mut order.files);
    build_root()?;
    let before = lay_out(files)?;
    give_up_rights()?;
    Ok(gather(perform(&order)?, &before))
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
    read_only(root)?;
    for hidden in HIDDEN.iter().filter(|path| inside(root, Path::new(path)).is_dir()) {
        let at = inside(root, Path::new(hidden));
        mount("tmpfs", &at, "tmpfs", still | MountFlags::RDONLY, Some(c"size=4k,mode=755")).map_err(no("a mask"))?;
    }
    for device in DEVICES {
        let at = inside(root, Path::new(device));
        fs::create_dir_all(root.join("dev")).and_then(|()| fs::write(&at, "")).map_err(no("devices"))?;
        mount_bind_recursive(*device, &at).map_err(no("devices"))?;
    }
    for (directory, options) in [(WORK, WORK_SIZE), (SCRATCH, SCRATCH_SIZE)] {
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
    Ok(mount_bind_recursive(path, &at)?)
}

/// Makes everything that is mounted below the new root read only: a bind takes in what is
/// mounted inside, but a remount is of one mount.
fn read_only(root: &Path) -> Result<(), String> {
    let mounts = fs::read_to_string("/proc/self/mountinfo").map_err(no("the machine's mounts"))?;
    // `36 35 98:0 /mnt1 /mnt2 rw,noexec …`: see proc_pid_mountinfo(5).
    for line in mounts.lines() {
        let mut fields = line.split(' ').skip(4);
        let (Some(point), Some(options)) = (fields.next(), fields.next()) else { continue };
        if !Path::new(point).starts_with(root) || Path::new(point) == root {
            continue;
        }
        let mut flags = MountFlags::BIND | MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV;
        // What is locked must be said again.
        flags.set(MountFlags::NOEXEC, options.split(',').any(|option| option == "noexec"));
        // Its blanks are written as `\040`; one that is not found under its name is refused.
        mount_remount(point.replace("\\040", " "), flags, c"").map_err(no("read only mounts"))?;
    }
    Ok(())
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
fn give_up_rights() -> Result<(), String> {
    for capability in (0..CAPABILITIES).map(|number| CapabilitySet::from_bits_retain(1 << number)) {
        match capability_is_in_bounding_set(capability) {
            Ok(true) => remove_capability_from_bounding_set(capability).map_err(no("capabilities"))?,
            // A number that this kernel has no capability for.
            Ok(false) | Err(Errno::INVAL) => {}
            Err(error) => return Err(no("capabilities")(error)),
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
        (Resource::Memlock, 0),
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

fn perform(order: &Order) -> Result<Report, String> {
    let Some(program) = order.argv.first() else { return Err("there is no program to run".into()) };
    // Threads of this process count as processes: they are there before any of the program's.
    let pipes = || std::io::pipe().map_err(no("pipes"));
    let ((input, mut fed), (stdout, out), (stderr, err)) = (pipes()?, pipes()?, pipes()?);
    let text = order.stdin.clone();
    thread(move || drop(fed.write_all(text.as_bytes())))?;
    let (stdout, stderr) = (Pipe::read(stdout)?, Pipe::read(stderr)?);
    let over = Arc::new(AtomicBool::new(false));
    let (tell, told) = mpsc::channel::<Duration>();
    thread({
        let over = Arc::clone(&over);
        move || {
            let Ok(time) = told.recv() else { return };
            if told.recv_timeout(time) == Err(mpsc::RecvTimeoutError::Timeout) {
                over.store(true, Ordering::SeqCst);
                end_all();
            }
        }
    })?;
    // Limits that are the program's alone: this process may need more for the files.
    let limits = format!("ulimit -t {} && ulimit -v {}", order.millis / 1_000 + 2, MEMORY_BYTES_MAX / 1_024);
    let mut command = Command::new("/bin/sh");
    command
        .args(["-c", &format!("{limits} && exec \"$@\""), program])
        .args(&order.argv)
        .env_clear()
        .envs([("PATH", "/usr/local/bin:/usr/bin:/bin"), ("HOME", WORK), ("TMPDIR", SCRATCH), ("LANG", "C.UTF-8")])
        .current_dir(WORK)
        .stdin(input)
        .stdout(out)
        .stderr(err);
    let child = command.spawn().map_err(no("the program"))?;
    // Its ends of the pipes are closed here.
    drop(command);
    let _ = tell.send(Duration::from_millis(order.millis));
    let mut report = Report::default();
    (report.exit_code, report.signal) = reap(child.id());
    drop(tell);
    // Nothing that it has started goes on, or writes while its files are gathered.
    end_all();
    reap(0);
    report.timed_out = over.load(Ordering::SeqCst);
    (report.stdout, report.stderr) = (stdout.printed(), stderr.printed());
    Ok(report)
}

/// A thread; an error, where there can be none.
fn thread(work: impl FnOnce() + Send + 'static) -> Result<(), String> {
    std::thread::Builder::new().spawn(work).map(drop).map_err(no("a thread"))
}

/// Buries whoever ends, as the first process of a namespace does, until a process has: how
/// that ended. Of 0: until there is none.
fn reap(of: u32) -> (Option<i32>, Option<i32>) {
    loop {
        match waitpid(None, None) {
            Ok(WaitStatus::Exited(pid, code)) if pid.as_raw().unsigned_abs() == of => return (Some(code), None),
            Ok(WaitStatus::Signaled(pid, signal, _)) if pid.as_raw().unsigned_abs() == of => {
                return (None, Some(signal as i32));
            }
            Ok(_) | Err(nix::errno::Errno::EINTR) => {}
            Err(_) => return (None, None),
        }
    }
}

/// Everything in the namespace but this process.
fn end_all() {
    let _ = kill(Pid::from_raw(-1), Signal::SIGKILL);
}

/// What comes over a pipe, as far as it has come.
struct Pipe {
    kept: Arc<Mutex<(Vec<u8>, Printed)>>,
    done: mpsc::Receiver<()>,
}

impl Pipe {
    fn read(mut from: impl Read + Send + 'static) -> Result<Self, String> {
        let kept = Arc::new(Mutex::new((Vec::new(), Printed::default())));
        let (tell, done) = mpsc::channel();
        let into = Arc::clone(&kept);
        thread(move || {
            let (mut buffer, mut total) = (vec![0; 64 * 1024], 0_u64);
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                total += read as u64;
                let mut kept = into.lock().unwrap_or_else(PoisonError::into_inner);
                let room = PRINTED_BYTES_MAX.saturating_sub(kept.0.len()).min(read);
                kept.0.extend_from_slice(&buffer[..room]);
                kept.1.cut |= room < read;
                if total > PRINTED_BYTES_END {
                    kept.1.flooded = true;
                    end_all();
                    break;
                }
            }
            let _ = tell.send(());
        })?;
        Ok(Self { kept, done })
    }

    fn printed(&self) -> Printed {
        let _ = self.done.recv_timeout(LAST_WORDS);
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        Printed { text: String::from_utf8_lossy(&kept.0).into_owned(), ..kept.1.clone() }
    }
}

/// Adds what has changed of the files.
fn gather(mut report: Report, before: &HashMap<String, [u8; 32]>) -> Report {
    let mut found = Found::default();
    found.look(Path::new(WORK), 0);
    // What could not be looked at is not removed.
    let gone = |path: &&String| {
        !found.seen.contains(*path) && !found.unread.iter().any(|unread| Path::new(path).starts_with(unread))
    };
    report.removed = before.keys().filter(gone).cloned().collect();
    report.removed.sort();
    report.files =
        found.files.into_iter().filter(|file| before.get(&file.path) != Some(&sha256(&file.bytes))).collect();
    report.files.sort_by(|one, other| one.path.cmp(&other.path));
    report.left = found.left;
    report
}

#[derive(Default)]
struct Found {
    seen: HashSet<String>,
    /// Directories that could not be looked through.
    unread: Vec<PathBuf>,
    files: Vec<File>,
    left: Vec<String>,
    bytes: u64,
    names: usize,
}

impl Found {
    fn look(&mut self, directory: &Path, depth: usize) {
        // The program may have taken the right to from itself.
        let _ = fs::set_permissions(directory, fs::Permissions::from_mode(0o755));
        let listed = fs::read_dir(directory).and_then(Iterator::collect::<std::io::Result<Vec<_>>>);
        let Ok(entries) = listed else {
            self.unread.push(directory.strip_prefix(WORK).unwrap_or(directory).to_owned());
            return self.leave("a directory that cannot be read");
        };
        for entry in entries {
            let path = entry.path();
            let name = path.strip_prefix(WORK).unwrap_or(&path).to_str().map(ToOwned::to_owned);
            let Some(name) = name.filter(|name| is_kept(name)) else {
                self.leave("a name that is no plain text, too long, or not for programs");
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
        self.names += name.len();
        let _ = fs::set_permissions(path, fs::Permissions::from_mode(0o644));
        let no_link = (OFlags::NOFOLLOW | OFlags::NONBLOCK).bits().cast_signed();
        let room = FILES_BYTES_MAX - self.bytes;
        let mut bytes = Vec::new();
        let opened = fs::File::options().read(true).custom_flags(no_link).open(path);
        match opened.and_then(|file| file.take(room + 1).read_to_end(&mut bytes)) {
            Err(error) => self.leave(&format!("`{name}`: {error}")),
            Ok(read) if read as u64 > room || self.files.len() >= FILES_MAX || self.names > NAMES_BYTES_MAX => {
                self.leave(&format!("`{name}` is more than the workspace holds"));
            }
            Ok(read) => {
                self.bytes += read as u64;
                self.files.push(File::new(name, bytes));
            }
        }
    }

    fn leave(&mut self, why: &str) {
        const LEFT_MAX: usize = 20;
        if self.left.len() < LEFT_MAX {
            self.left.push(why.to_owned());
        }
    }
}

/// Whether a workspace takes a file of that name.
fn is_kept(name: &str) -> bool {
    name.len() <= PATH_BYTES_MAX
        && !name.chars().any(char::is_control)
        && !name.split('/').any(|part| part.starts_with(TEMPORARY))
}
