//! What must hold after every event, seen from outside: the tables now against
//! the tables before.

use std::collections::BTreeMap;

use capx_core::domain::ids::ApprovalId;
use capx_core::domain::run::{self, RunEvent, RunStatus, StepStatus};
use capx_core::store::jobs::{Lease, kind};

use crate::database::{Database, Job, Run, State, StepRow};

const EVENTS: [RunEvent; 6] =
    [RunEvent::Start, RunEvent::Suspend, RunEvent::Resume, RunEvent::Complete, RunEvent::Fail, RunEvent::Cancel];

/// A write that may still come: under which lease, about which step.
#[derive(Debug, Clone, Copy)]
pub struct Claimant {
    pub lease: Lease,
    pub step: i32,
    pub gate: bool,
}

/// What the tables were.
#[derive(Default)]
pub struct Checker {
    runs: Vec<(RunStatus, Option<ApprovalId>)>,
    completed: BTreeMap<(usize, i32), StepRow>,
}

macro_rules! ensure {
    ($holds:expr, $($what:tt)+) => { if !$holds { return Err(format!($($what)+)); } };
}

impl Checker {
    pub fn check(&mut self, db: &Database, claimants: &[Claimant]) -> Result<(), String> {
        if let Some(broken) = &db.broken {
            return Err(broken.clone());
        }
        self.checkpoints(db)?;
        for (id, run) in db.runs.iter().enumerate() {
            self.transition(id, run)?;
            self.has_its_job(db, id, run)?;
        }
        for (id, job) in &db.jobs {
            row_is_sound(db, *id, job)?;
            fence_is_narrow(db, *id, job, claimants)?;
        }
        Ok(())
    }

    /// A completed step is never written again.
    fn checkpoints(&mut self, db: &Database) -> Result<(), String> {
        for (key, before) in &self.completed {
            let now = db.steps.get(key);
            ensure!(now == Some(before), "{key:?}: completed as {before:?}, then written as {now:?}");
        }
        if self.completed.len() < db.steps.len() {
            let completed = db.steps.iter().filter(|(_, row)| row.status == StepStatus::Completed);
            self.completed = completed.map(|(key, row)| (*key, row.clone())).collect();
        }
        Ok(())
    }

    /// Runs go the ways of the table, and a terminal one nowhere.
    fn transition(&mut self, id: usize, run: &Run) -> Result<(), String> {
        let now = (run.status, run.waiting_on);
        let Some(before) = self.runs.get_mut(id) else {
            self.runs.push(now);
            return Ok(());
        };
        let (from, to) = (before.0, now.0);
        let allowed = from == to || EVENTS.iter().any(|event| run::next(from, *event) == Some(to));
        ensure!(allowed, "run {id}: {from:?} -> {to:?}");
        ensure!(!from.is_terminal() || *before == now, "run {id}: changed after its end");
        *before = now;
        Ok(())
    }

    /// An open run has its one job, about its first step that is not done: a
    /// gate's timer while it waits.
    fn has_its_job(&self, db: &Database, id: usize, run: &Run) -> Result<(), String> {
        let jobs: Vec<&Job> = db.jobs.values().filter(|job| job.run == id).collect();
        let waits = run.status == RunStatus::Suspended;
        ensure!(waits == run.waiting_on.is_some(), "run {id}: {:?} for {:?}", run.status, run.waiting_on);
        if run.status.is_terminal() {
            ensure!(jobs.is_empty(), "run {id}: over, and has a job");
            return Ok(());
        }
        let [job] = jobs[..] else { return Err(format!("run {id}: {:?}, with {} jobs", run.status, jobs.len())) };
        let wanted = if waits { kind::GATE_TIMEOUT } else { kind::STEP };
        ensure!(job.kind == wanted, "run {id}: {:?}, with a job of kind {}", run.status, job.kind);
        let done = self.completed.range((id, 0)..(id + 1, 0)).count();
        ensure!(job.step as usize == done, "run {id}: {done} steps done, and a job for step {}", job.step);
        let mut pending = db.approvals.iter().filter(|approval| approval.run == id && approval.status == "pending");
        let gate = pending.next().map(|approval| approval.id);
        ensure!(
            gate == run.waiting_on && pending.next().is_none(),
            "run {id}: waits for {:?}, {gate:?}",
            run.waiting_on
        );
        Ok(())
    }
}

fn row_is_sound(db: &Database, id: i64, job: &Job) -> Result<(), String> {
    let held = job.session.is_some() && job.deadline_at.is_some();
    ensure!((job.state == State::Running) == held, "job {id}: {:?} without a holder", job.state);
    let step = &db.runs[job.run].playbook.steps[job.step as usize];
    let tries = job.attempt.unsigned_abs();
    ensure!(tries <= step.retry.max_attempts || job.kind != kind::STEP, "job {id}: {tries} tries");
    Ok(())
}

/// Of all that may still write, one at most may write to a job that runs; and
/// whatever may is about the step where the run stands.
fn fence_is_narrow(db: &Database, id: i64, job: &Job, claimants: &[Claimant]) -> Result<(), String> {
    let mut passing = claimants.iter().filter(|claimant| claimant.lease.job == id && db.passes(claimant.lease));
    let mut first: Option<&Claimant> = None;
    passing.try_for_each(|claimant| {
        let apt = claimant.step == job.step && claimant.gate == (job.kind == kind::GATE_TIMEOUT);
        ensure!(apt, "job {id} is about step {}, and {claimant:?} may write to it", job.step);
        let first = *first.get_or_insert(claimant);
        let alone = job.state != State::Running || first.lease == claimant.lease;
        ensure!(alone, "job {id} runs, and both {first:?} and {claimant:?} may write to it");
        Ok(())
    })
}
