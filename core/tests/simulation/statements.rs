//! The statements that move jobs, each one atomic function with the guards of
//! its SQL.

use capx_core::domain::ids::CompanyId;
use capx_core::domain::plan::{CRASHES_MAX, SUSPECT_CRASHES};
use capx_core::domain::run::{RunStatus, StepStatus};
use capx_core::engine::advance::Decided;
use capx_core::store::approvals::NewApproval;
use capx_core::store::jobs::{ClaimedJob, DEADLINE_GRACE, Holder, Lease, kind, queue};
use capx_core::store::steps::StepCommit;
use uuid::Uuid;

use crate::database::{Approval, Asker, Database, Fence, Job, LEASE, Session, State, StepRow, ms};

/// A job whose worker died waits this long before its first retake.
const RETAKE: u64 = LEASE / 60;

impl Database {
    /// `claim.sql`, for one company. The only statement that does not wait for
    /// the disk.
    pub fn claim(&mut self, session: i64, room: usize) -> Vec<ClaimedJob> {
        if self.sessions[&session].ended {
            return Vec::new();
        }
        let now = self.now;
        let ready = self.jobs.iter_mut().filter(|(_, job)| job.state == State::Ready);
        let mut claimed = Vec::new();
        for (id, job) in ready.take(room) {
            self.unflushed.push((*id, job.clone()));
            job.state = State::Running;
            job.epoch += 1;
            job.attempt += 1;
            job.session = Some(session);
            job.deadline_at = Some(now + ms(job.timeout + DEADLINE_GRACE));
            claimed.push(claimed_job(*id, job, session));
        }
        claimed
    }

    /// Whether a lease's write would be taken now.
    pub fn passes(&self, lease: Lease) -> bool {
        let Some(job) = self.jobs.get(&lease.job) else { return false };
        let epoch = job.epoch == lease.epoch;
        let session = job.session == Some(lease.session);
        match self.fence {
            Fence::Full => epoch && session,
            Fence::OrUnheld => epoch && (session || job.session.is_none()),
            Fence::NoSession => epoch,
            Fence::NoEpoch => session,
            Fence::None => true,
        }
    }

    /// `advance::write`: `commit_steps.sql` and the gate, in one transaction.
    pub fn commit(&mut self, decided: &Decided) -> bool {
        let commit = &decided.commit;
        if !self.passes(commit.lease) {
            return false;
        }
        let run = self.jobs[&commit.lease.job].run;
        self.move_job(commit);
        self.flush();
        // `update runs … where status = 'running'`
        if self.runs[run].status != RunStatus::Running {
            return false;
        }
        self.runs[run].status = commit.change.status.unwrap_or(RunStatus::Running);
        self.runs[run].waiting_on = decided.approval.as_ref().map(|approval| approval.approval);
        if let Some(step) = &commit.checkpoint {
            let row = self.steps.entry((run, commit.step)).or_insert_with(blank);
            *row = StepRow {
                status: step.status,
                attempt: step.attempt,
                output: step.output.clone(),
                writes: row.writes + 1,
            };
        }
        if let Some(NewApproval { approval, step, timeout, .. }) = decided.approval {
            self.insert_approval(run, approval, step, timeout);
        }
        true
    }

    fn move_job(&mut self, commit: &StepCommit) {
        let Some(next) = &commit.job else {
            self.jobs.remove(&commit.lease.job);
            return;
        };
        let now = self.now;
        let job = self.jobs.get_mut(&commit.lease.job).expect("it has passed the fence");
        job.state = match (next.held, next.delay.is_zero()) {
            (true, _) => State::Running,
            (false, true) => State::Ready,
            (false, false) => State::Scheduled,
        };
        job.kind = next.kind.to_owned();
        job.step = next.step;
        job.due_at = now + ms(next.delay);
        job.epoch += 1;
        job.attempt = next.attempt;
        job.crash_count = next.crash_count;
        job.timeout = next.timeout;
        job.session = next.held.then_some(commit.lease.session);
        job.deadline_at = next.held.then(|| now + ms(next.timeout + DEADLINE_GRACE));
    }

    /// `jobs::settle`, of one job that is not a step: gone, or due again.
    pub fn settle(&mut self, lease: Lease, again_after: Option<u64>) {
        if !self.passes(lease) {
            return;
        }
        match again_after {
            None => drop(self.jobs.remove(&lease.job)),
            Some(delay) => {
                let job = self.jobs.get_mut(&lease.job).expect("it has passed the fence");
                job.due_at = self.now + delay;
                give_back(job, if delay > 0 { State::Scheduled } else { State::Ready });
            }
        }
        self.flush();
    }

    /// `jobs::promote`.
    pub fn promote(&mut self) {
        let now = self.now;
        let due = |job: &&mut Job| job.state == State::Scheduled && job.due_at <= now;
        if self.jobs.values_mut().filter(due).map(|job| job.state = State::Ready).count() > 0 {
            self.flush();
        }
    }

    /// `sessions::bury`: how many were silent for a lease.
    pub fn bury(&mut self) -> u32 {
        let now = self.now;
        let silent = |session: &&mut Session| !session.ended && session.beat_at + LEASE < now;
        let buried = self.sessions.values_mut().filter(silent).map(|session| session.ended = true).count();
        if buried > 0 {
            self.flush();
        }
        buried as u32
    }

    /// `reclaim.sql`: the jobs taken back, as they were.
    pub fn reclaim(&mut self) -> Vec<(i64, Job)> {
        let (now, sessions) = (self.now, &self.sessions);
        let mut reclaimed = Vec::new();
        for (id, job) in &mut self.jobs {
            let (Some(session), Some(deadline)) = (job.session, job.deadline_at) else { continue };
            if sessions[&session].ended || deadline < now {
                reclaimed.push((*id, job.clone()));
                job.state = State::Scheduled;
                job.session = None;
                job.deadline_at = None;
                job.attempt = (job.attempt - 1).max(0);
                job.due_at = now + RETAKE * 2u64.pow(job.crash_count.unsigned_abs().into()).min(60);
                job.crash_count = job.crash_count.max((job.crash_count + 1).min(SUSPECT_CRASHES));
            }
        }
        if !reclaimed.is_empty() {
            self.flush();
        }
        reclaimed
    }

    /// `jobs::charge_suspect`.
    pub fn charge_suspect(&mut self, lease: Lease) -> bool {
        let passes = self.passes(lease);
        if let Some(job) = self.jobs.get_mut(&lease.job).filter(|_| passes) {
            job.crash_count = CRASHES_MAX;
        }
        passes
    }

    /// `jobs::holder_of`.
    pub fn holder_of(&self, job: i64) -> Option<Holder> {
        self.jobs.get(&job).map(|job| Holder { epoch: job.epoch, session: job.session, step: job.step, item: None })
    }

    /// `jobs::give_back_unknown`.
    pub fn give_back_unknown(&mut self, session: i64, in_hand: &[i64]) -> u32 {
        let mut given = 0;
        for (id, job) in &mut self.jobs {
            if job.session == Some(session) && !in_hand.contains(id) {
                give_back(job, State::Ready);
                given += 1;
            }
        }
        if given > 0 {
            self.flush();
        }
        given
    }

    /// `gates::apply`, for the pending gate of a run: whether it was applied.
    pub fn decide_gate(&mut self, id: i64, asker: Asker, status: &'static str) -> bool {
        let held = match asker {
            Asker::Person => true,
            Asker::Timer(lease) => self.passes(lease),
        };
        let now = self.now;
        let Some(job) = self.jobs.get_mut(&id).filter(|job| held && job.kind == kind::GATE_TIMEOUT) else {
            return false;
        };
        let pending = |a: &&mut Approval| a.run == job.run && a.step == job.step && a.status == "pending";
        let in_time = |a: &&mut Approval| matches!(asker, Asker::Timer(_)) || a.expires_at > now;
        let Some(approval) = self.approvals.iter_mut().filter(pending).find(in_time) else { return false };
        let run = &mut self.runs[job.run];
        if run.status != RunStatus::Suspended {
            return false;
        }
        approval.status = status;
        run.waiting_on = None;
        let row = self.steps.get_mut(&(job.run, job.step)).expect("a gate's step");
        if status == "approved" {
            row.status = StepStatus::Pending;
            run.status = RunStatus::Running;
            job.kind = kind::STEP.to_owned();
            job.due_at = now;
            job.attempt = 0;
            job.timeout = run.playbook.steps[job.step as usize].timeout;
            give_back(job, State::Ready);
        } else {
            row.status = StepStatus::Failed;
            run.status = RunStatus::Failed;
            self.jobs.remove(&id);
        }
        self.flush();
        true
    }
}

/// Nobody's any more, under a new epoch and without a charge.
fn give_back(job: &mut Job, state: State) {
    job.state = state;
    job.epoch += 1;
    job.attempt = (job.attempt - 1).max(0);
    job.session = None;
    job.deadline_at = None;
}

fn blank() -> StepRow {
    StepRow { status: StepStatus::Pending, attempt: 0, output: None, writes: 0 }
}

fn claimed_job(id: i64, job: &Job, session: i64) -> ClaimedJob {
    ClaimedJob {
        lease: Lease { job: id, epoch: job.epoch, session },
        queue: queue::STEPS.to_owned(),
        kind: job.kind.clone(),
        company: CompanyId(Uuid::nil()),
        flow: Uuid::nil(),
        ref_id: Some(Uuid::from_u128(job.run as u128)),
        step: job.step,
        item: None,
        priority: 0,
        attempt: job.attempt,
        crash_count: job.crash_count,
        timeout: job.timeout,
    }
}
