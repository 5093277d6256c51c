//! The outer process of a sandbox: gives up its user and takes new namespaces, then waits
//! for the inner one.

use std::fs;
use std::io::{Write, stdin};
use std::os::fd::AsFd;
use std::process::{Command, ExitCode, Stdio};

use nix::sched::{CloneFlags, unshare};
use nix::unistd::{Gid, Uid, close, getegid, geteuid, setgroups, setresgid, setresuid};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{DumpableBehavior, nice, set_dumpable_behavior};

use super::wire::{self, Order, Report};
use super::{COMMAND, INSIDE};

/// Whose a sandbox of a worker is that runs as root: nobody's.
const NOBODY: u32 = 65_534;
/// How much a program stands behind others for the processor.
const NICE: i32 = 10;

/// Is the process.
pub fn run() -> ExitCode {
    match ready().and_then(wait) {
        Ok(code) => code,
        Err(why) => refuse(why),
    }
}

/// Tells the worker why nothing was run.
pub fn refuse(why: String) -> ExitCode {
    let report = Report { refused: Some(why), ..Report::default() };
    let told = wire::pack(&report, &[]).and_then(|packed| std::io::stdout().write_all(&packed));
    if told.is_ok() { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

/// What a layer that does not hold is told as.
pub fn no<E: std::fmt::Display>(layer: &'static str) -> impl Fn(E) -> String {
    move |error| format!("{layer}: {error}")
}

fn ready() -> Result<Vec<u8>, String> {
    let order: Order = wire::unpack(&mut stdin().lock()).map_err(no("the order"))?;
    close_others()?;
    let (mut uid, mut gid) = (geteuid(), getegid());
    if uid.is_root() {
        (uid, gid) = (Uid::from_raw(NOBODY), Gid::from_raw(NOBODY));
        setgroups(&[]).map_err(no("setgroups"))?;
        setresgid(gid, gid, gid).map_err(no("setresgid"))?;
        setresuid(uid, uid, uid).map_err(no("setresuid"))?;
        // Its own maps are not its own any more without this.
        set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(no("dumpable"))?;
    }
    let apart = CloneFlags::CLONE_NEWUSER
        | CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWPID;
    unshare(apart).map_err(no("namespaces"))?;
    let map = |name: &str, line: String| fs::write(format!("/proc/self/{name}"), line).map_err(no("the user's map"));
    map("setgroups", "deny".into())?;
    map("uid_map", format!("0 {uid} 1"))?;
    map("gid_map", format!("0 {gid} 1"))?;
    // Where memory ends, it ends for the program first; a machine that forbids to ask for
    // that may run it all the same.
    let _ = fs::write("/proc/self/oom_score_adj", "1000");
    let _ = nice(NICE);
    wire::pack(&order, &order.files).map_err(no("the order"))
}

/// Files that the worker's own parent has left open are not the program's.
fn close_others() -> Result<(), String> {
    for fd in others()? {
        // The one by which they were listed is closed already.
        let _ = close(fd);
    }
    // That one is there again.
    match others()?.len() {
        0 | 1 => Ok(()),
        more => Err(format!("open files: {more} cannot be closed")),
    }
}

fn others() -> Result<Vec<i32>, String> {
    let listed = fs::read_dir("/proc/self/fd").map_err(no("open files"))?;
    let numbers = listed.map(|entry| {
        let name = entry.map_err(no("open files"))?.file_name();
        name.to_str().and_then(|name| name.parse().ok()).ok_or_else(|| "open files: no number".to_owned())
    });
    numbers.filter(|fd| !matches!(fd, Ok(0..=2))).collect()
}

fn wait(order: Vec<u8>) -> Result<ExitCode, String> {
    // Not by its path, which nobody may be allowed to walk.
    let mut child = Command::new("/proc/self/exe")
        .args([COMMAND, INSIDE])
        .env_clear()
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(no("the first process inside"))?;
    if let Some(mut input) = child.stdin.take() {
        // Where it is gone, it has said why.
        let _ = input.write_all(&order);
    }
    drop(order);
    if let Some(alive) = child.stderr.take()
        && !outlives(&alive)?
    {
        let _ = child.kill();
    }
    let ended = child.wait().map_err(no("the first process inside"))?;
    Ok(if ended.success() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Whether the first process inside ends before the worker does, which holds the other end
/// of this one's input as long as it lives. With this process ends the first one inside, and
/// with that one everything in its namespace.
fn outlives(inside: &impl AsFd) -> Result<bool, String> {
    let input = stdin();
    let mut ends = [PollFd::new(&input, PollFlags::IN), PollFd::new(inside, PollFlags::empty())];
    // A thread would be simpler, but there can be none any more: its processes would be in
    // another namespace than its own.
    while poll(&mut ends, None).map_err(no("poll"))? == 0 {}
    Ok(ends[0].revents().is_empty())
}
