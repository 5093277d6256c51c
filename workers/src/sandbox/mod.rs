//! Programs that a model or an author wrote, run where they can reach nothing (hazard S14).
//!
//! Nothing is shared with the program: it gets a copy of the run's files and gives one back,
//! over pipes. So it may be run again whenever its end was not heard of, and whatever user
//! it runs as needs no right to the workspace. The worker starts itself with [`COMMAND`]
//! ([`outside`]): that takes new namespaces and starts itself once more as their first
//! process ([`inside`]), which builds a root of its own, takes every right away and starts
//! the program. One layer that does not hold, and the program is not started.

use std::path::PathBuf;
use std::process::{ExitCode, Stdio};
use std::sync::Arc;
use std::time::Duration;

use capx_core::domain::outcome::{ErrorClass, Failure};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::process::Command;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

#[cfg(target_os = "linux")]
mod filter;
#[cfg(target_os = "linux")]
mod inside;
#[cfg(target_os = "linux")]
mod outside;
mod wire;

pub use wire::{File, Order, Printed, Report};

/// What the worker's own program is called with to be the sandbox.
pub const COMMAND: &str = "__sandbox";
/// The second of its two processes.
#[cfg(target_os = "linux")]
const INSIDE: &str = "inside";

/// Programs at once, by worker.
const PROGRAMS_MAX: usize = 4;
/// How much longer than its program a sandbox may take.
const AROUND: Duration = Duration::from_secs(10);

/// All that a program may use.
pub mod limits {
    /// Bytes that its files and what it leaves may have together, and how many they may be.
    pub const FILES_BYTES_MAX: u64 = 64 * 1024 * 1024;
    /// See [`FILES_BYTES_MAX`].
    pub const FILES_MAX: usize = 2_000;
    /// Bytes of address space, by process.
    pub const MEMORY_BYTES_MAX: u64 = 1024 * 1024 * 1024;
    /// Processes and threads at once.
    pub const PROCESSES_MAX: u64 = 32;
    /// Open files, by process.
    pub const OPEN_FILES_MAX: u64 = 256;
    /// Bytes that are kept of what it prints, by stream; the rest is read and thrown away.
    pub const PRINTED_BYTES_MAX: usize = 256 * 1024;
    /// What may be printed before it is stopped, in bytes.
    pub const PRINTED_BYTES_END: u64 = 64 * 1024 * 1024;
}

/// Where programs are run.
#[derive(Debug, Clone)]
pub struct Sandbox {
    program: PathBuf,
    room: Arc<Semaphore>,
}

/// To be called first of all in `main`: where the process was started to be a sandbox, it is
/// one, and this gives what it ends with.
pub fn enter() -> Option<ExitCode> {
    let mut args = std::env::args_os().skip(1);
    if args.next()? != COMMAND {
        return None;
    }
    #[cfg(target_os = "linux")]
    return Some(match args.next() {
        Some(which) if which == INSIDE => inside::run(),
        _ => outside::run(),
    });
    // Only Linux has the layers; elsewhere a sandbox ends without a word, and nothing is run.
    #[cfg(not(target_os = "linux"))]
    Some(ExitCode::FAILURE)
}

impl Sandbox {
    /// By the program that calls [`enter`] in its `main`.
    pub fn new(program: impl Into<PathBuf>) -> Self {
        Self { program: program.into(), room: Arc::new(Semaphore::new(PROGRAMS_MAX)) }
    }

    /// Whether every layer holds on this machine, and a program runs behind them.
    ///
    /// # Errors
    /// Which does not.
    pub async fn probe(&self) -> Result<(), Failure> {
        let argv = vec!["/bin/sh".to_owned(), "-c".to_owned(), "echo runs".to_owned()];
        let report = self.run(Order { argv, ..Order::default() }, Duration::from_secs(10)).await?;
        match (report.exit_code, report.stdout.text.as_str()) {
            (Some(0), "runs\n") => Ok(()),
            _ => Err(Failure::invalid(format!("the sandbox starts no program: {}", report.stderr.text))),
        }
    }

    /// Waits until one more program may run here.
    ///
    /// # Errors
    /// Where the worker ends before.
    pub async fn turn(&self) -> Result<Turn, Failure> {
        let room = Arc::clone(&self.room).acquire_owned().await;
        Ok(Turn { program: self.program.clone(), _room: room.map_err(|_| Failure::transient("the worker stops"))? })
    }

    /// Waits for a turn, and runs a program.
    ///
    /// # Errors
    /// As [`Turn::run`] has them.
    pub async fn run(&self, order: Order, time: Duration) -> Result<Report, Failure> {
        self.turn().await?.run(order, time).await
    }
}

/// The right to run one program.
#[derive(Debug)]
pub struct Turn {
    program: PathBuf,
    _room: OwnedSemaphorePermit,
}

impl Turn {
    /// Runs a program to its end, or to the end of its time.
    ///
    /// # Errors
    /// Where it was not run, or nothing was heard of its end. A program that fails is no
    /// error here.
    pub async fn run(self, mut order: Order, time: Duration) -> Result<Report, Failure> {
        order.millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        let packed = apart(move || wire::pack(&order, &order.files)).await;
        let sent = packed.map_err(|error| Failure::invalid(error.to_string()))?;
        let mut command = Command::new(&self.program);
        // In a group of its own: a Ctrl-C is the worker's, which drains.
        command
            .arg(COMMAND)
            .env_clear()
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::null());
        // Its end is that of all inside: see `outside::outlives`.
        let mut child = command
            .kill_on_drop(true)
            .spawn()
            .map_err(|error| Failure::transient(format!("the sandbox does not start: {error}")))?;
        let (Some(mut input), Some(output)) = (child.stdin.take(), child.stdout.take()) else {
            return Err(Failure::transient("the sandbox has no pipes"));
        };
        let talk = async {
            // One that refuses may do so before it has read everything.
            let _ = input.write_all(&sent).await;
            let _ = input.flush().await;
            drop(sent);
            let mut answer = Vec::new();
            output.take(wire::MESSAGE_BYTES_MAX).read_to_end(&mut answer).await.map(|_| answer)
        };
        let answer = tokio::time::timeout(time.saturating_add(AROUND), talk)
            .await
            .map_err(|_| Failure::new(ErrorClass::Timeout, "the sandbox did not end in its time"))?
            .map_err(|error| Failure::transient(format!("the sandbox: {error}")))?;
        let mut report: Report = apart(move || wire::unpack(&mut answer.as_slice()))
            .await
            .map_err(|error| Failure::transient(format!("the sandbox ended without a word: {error}")))?;
        match report.refused.take() {
            Some(why) => Err(Failure::invalid(format!("the sandbox does not hold here, so nothing was run: {why}"))),
            None => Ok(report),
        }
    }
}

/// Work on many bytes, where it holds up nobody.
async fn apart<T: Send + 'static>(work: impl FnOnce() -> std::io::Result<T> + Send + 'static) -> std::io::Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(std::io::Error::other(error)))
}
