//! The tables and their server. The clock is the server's, in milliseconds.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capx_core::domain::ids::{ApprovalId, CompanyId, PlaybookId, RunId};
use capx_core::domain::plan::RunContext;
use capx_core::domain::playbook::Playbook;
use capx_core::domain::run::{RunStatus, StepStatus};
use capx_core::engine::claim::StepWork;
use capx_core::store::jobs::{ClaimedJob, Lease, kind};
use serde_json::{Value, json};
use uuid::Uuid;

/// How long a session lives without a beat.
pub const LEASE: u64 = 3_000;
/// What a write asks of the job's row. All but the first are mutations, by
/// which the simulation shows that it can fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Fence {
    /// The product's: `lease_epoch = $epoch and session_id = $s`.
    Full,
    /// Also what was taken back and is nobody's yet.
    OrUnheld,
    /// The epoch alone.
    NoSession,
    /// The session alone.
    NoEpoch,
    /// The row is there.
    None,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    Ready,
    Scheduled,
    Running,
}

#[derive(Debug, Clone)]
pub struct Job {
    pub run: usize,
    pub kind: String,
    pub step: i32,
    pub state: State,
    pub due_at: u64,
    pub epoch: i64,
    pub session: Option<i64>,
    pub deadline_at: Option<u64>,
    pub timeout: Duration,
    pub attempt: i32,
    pub crash_count: i16,
}

#[derive(Debug, Clone)]
pub struct Run {
    pub playbook: Arc<Playbook>,
    pub status: RunStatus,
    pub waiting_on: Option<ApprovalId>,
}

/// A checkpoint. `writes` tells a row that was written again, the same or not.
#[derive(Debug, Clone, PartialEq)]
pub struct StepRow {
    pub status: StepStatus,
    pub attempt: i32,
    pub output: Option<String>,
    pub writes: u32,
}

#[derive(Debug, Clone)]
pub struct Approval {
    pub id: ApprovalId,
    pub run: usize,
    pub step: i32,
    pub status: &'static str,
    pub expires_at: u64,
}

#[derive(Debug, Clone, Copy)]
pub struct Session {
    pub beat_at: u64,
    pub ended: bool,
}

/// Who asks for a gate's decision.
#[derive(Debug, Clone, Copy)]
pub enum Asker {
    Person,
    Timer(Lease),
}

pub struct Database {
    pub now: u64,
    pub fence: Fence,
    pub jobs: BTreeMap<i64, Job>,
    pub runs: Vec<Run>,
    pub steps: BTreeMap<(usize, i32), StepRow>,
    pub approvals: Vec<Approval>,
    pub sessions: BTreeMap<i64, Session>,
    /// Claims that a crash of the server may still undo: the rows before them.
    pub unflushed: Vec<(i64, Job)>,
    /// What should never happen and did, where no row tells.
    pub broken: Option<String>,
}

pub fn ms(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).expect("a simulated duration")
}

impl Database {
    pub fn new(fence: Fence) -> Self {
        Self {
            now: 0,
            fence,
            jobs: BTreeMap::new(),
            runs: Vec::new(),
            steps: BTreeMap::new(),
            approvals: Vec::new(),
            sessions: BTreeMap::new(),
            unflushed: Vec::new(),
            broken: None,
        }
    }

    /// A commit that waits for the disk takes all before it along.
    pub fn flush(&mut self) {
        self.unflushed.clear();
    }

    /// A crash of the server: the last of the claims that are not on disk are
    /// undone.
    pub fn crash(&mut self, undone: usize) {
        for (id, before) in self.unflushed.split_off(self.unflushed.len() - undone).into_iter().rev() {
            self.jobs.insert(id, before);
        }
        self.flush();
    }

    /// How many claims are not on disk.
    pub fn unflushed(&self) -> usize {
        self.unflushed.len()
    }

    /// `engine::start`: the run and its one job, behind a first gate if there
    /// is one.
    pub fn start(&mut self, playbook: &Arc<Playbook>) {
        let run = self.runs.len();
        self.runs.push(Run { playbook: Arc::clone(playbook), status: RunStatus::Running, waiting_on: None });
        let gate = self.context(run).gate(0).map(|gate| gate.approval.timeout);
        self.jobs.insert(
            run as i64,
            Job {
                run,
                kind: if gate.is_some() { kind::GATE_TIMEOUT } else { kind::STEP }.to_owned(),
                step: 0,
                state: if gate.is_some() { State::Scheduled } else { State::Ready },
                due_at: self.now + gate.map_or(0, ms),
                epoch: 0,
                session: None,
                deadline_at: None,
                timeout: playbook.steps[0].timeout,
                attempt: 0,
                crash_count: 0,
            },
        );
        if let Some(timeout) = gate {
            let id = ApprovalId::new();
            self.runs[run].status = RunStatus::Suspended;
            self.runs[run].waiting_on = Some(id);
            self.insert_approval(run, id, 0, timeout);
        }
        self.flush();
    }

    /// `approvals::insert`, whose keys are unique.
    pub fn insert_approval(&mut self, run: usize, id: ApprovalId, step: i32, timeout: Duration) {
        let row = StepRow { status: StepStatus::PendingApproval, attempt: 0, output: None, writes: 0 };
        if self.steps.insert((run, step), row).is_some() {
            self.broken = Some(format!("run {run} step {step}: a gate where there is a row already"));
        }
        let expires_at = self.now + ms(timeout);
        self.approvals.push(Approval { id, run, step, status: "pending", expires_at });
    }

    fn context(&self, run: usize) -> RunContext {
        RunContext::new(
            CompanyId(Uuid::nil()),
            PlaybookId(Uuid::nil()),
            RunId(Uuid::from_u128(run as u128)),
            Arc::clone(&self.runs[run].playbook),
            Arc::new(json!({})),
        )
    }

    /// `claim::load`: what an attempt needs; `None` when its run is not
    /// running.
    pub fn load(&self, job: &ClaimedJob) -> Option<StepWork> {
        let run = run_of(job);
        if self.runs[run].status != RunStatus::Running {
            return None;
        }
        let mut context = self.context(run);
        for ((_, step), row) in self.steps.range((run, 0)..(run + 1, 0)) {
            if let (StepStatus::Completed, Some(output)) = (row.status, &row.output) {
                let output: Value = serde_json::from_str(output).expect("an output");
                context.remember(*step as usize, &output);
            }
        }
        Some(StepWork {
            above: None,
            context,
            secrets: None,
            agents: Arc::default(),
            run_job: job.lease.job,
            chain: 0,
            chain_began: Instant::now(),
        })
    }

    pub fn open_session(&mut self) -> i64 {
        let id = self.sessions.len() as i64;
        self.sessions.insert(id, Session { beat_at: self.now, ended: false });
        self.flush();
        id
    }

    /// `sessions::beat`.
    pub fn beat(&mut self, session: i64) -> bool {
        let now = self.now;
        let alive = self.sessions.get_mut(&session).filter(|session| !session.ended);
        let renewed = alive.map(|session| session.beat_at = now).is_some();
        self.flush();
        renewed
    }
}

/// Which run a job is of.
pub fn run_of(job: &ClaimedJob) -> usize {
    job.ref_id.expect("a run").as_u128() as usize
}
