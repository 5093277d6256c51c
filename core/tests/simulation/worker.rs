//! A worker as the database sees it: a session, what it has in hand, and what
//! it asks. Its death is the end of a life; what it has sent may still arrive.

use std::collections::BTreeMap;
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capx_core::domain::outcome::{ErrorClass, Failure, Outcome};
use capx_core::domain::plan::CRASHES_MAX;
use capx_core::engine::advance::Decided;
use capx_core::engine::claim::StepWork;
use capx_core::store::jobs::{ClaimedJob, Holder, Lease, kind};
use serde_json::json;

use crate::check::Claimant;
use crate::random::Random;

/// Which worker, in which of its lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Life {
    pub worker: usize,
    pub life: u32,
}

/// What a worker asks of the server; an attempt is named by its number.
#[derive(Debug, Clone)]
pub enum Request {
    GiveBackUnknown { session: i64, in_hand: Vec<i64> },
    Claim { session: i64, room: usize },
    Commit(u64, Rc<Decided>),
    Holder(u64, i64),
    Expire(u64, ClaimedJob),
    Settle(u64, ClaimedJob, Option<u64>),
}

/// What it hears: `None` when the answer was lost.
#[derive(Debug)]
pub enum Answer {
    GivenBack(i64, Option<()>),
    Claimed(i64, Option<Vec<ClaimedJob>>),
    Committed(u64, Option<bool>),
    Held(u64, Option<Option<Holder>>),
    Expired(u64, Option<bool>),
    Settled(u64, Option<()>),
}

impl Request {
    /// What is heard when nothing is heard.
    pub fn unanswered(&self) -> Answer {
        match self {
            Self::GiveBackUnknown { session, .. } => Answer::GivenBack(*session, None),
            Self::Claim { session, .. } => Answer::Claimed(*session, None),
            Self::Commit(id, _) => Answer::Committed(*id, None),
            Self::Holder(id, _) => Answer::Held(*id, None),
            Self::Expire(id, _) => Answer::Expired(*id, None),
            Self::Settle(id, ..) => Answer::Settled(*id, None),
        }
    }

    /// The write that this is, under a lease.
    pub fn claimant(&self) -> Option<Claimant> {
        match self {
            Self::Commit(_, decided) => {
                Some(Claimant { lease: decided.commit.lease, step: decided.commit.step, gate: false })
            }
            Self::Expire(_, job) | Self::Settle(_, job, _) => Some(claimant(job)),
            _ => None,
        }
    }
}

fn claimant(job: &ClaimedJob) -> Claimant {
    Claimant { lease: job.lease, step: job.step, gate: job.kind == kind::GATE_TIMEOUT }
}

impl Answer {
    /// The same, lost on its way.
    pub fn lost(self) -> Self {
        match self {
            Self::GivenBack(session, _) => Self::GivenBack(session, None),
            Self::Claimed(session, _) => Self::Claimed(session, None),
            Self::Committed(id, _) => Self::Committed(id, None),
            Self::Held(id, _) => Self::Held(id, None),
            Self::Expired(id, _) => Self::Expired(id, None),
            Self::Settled(id, _) => Self::Settled(id, None),
        }
    }
}

/// A claimed job in hand.
pub struct Attempt {
    /// The lease as it was claimed, which names it in hand.
    pub claimed: Lease,
    /// The job under its present lease.
    pub job: ClaimedJob,
    /// What it needs; `None` once it is decided, and for what is not a step.
    pub work: Option<Box<StepWork>>,
    pub decided: Option<Rc<Decided>>,
    /// An earlier commit may be in.
    pub maybe_landed: bool,
    /// The handler will run into its deadline.
    pub hangs: bool,
    /// It has reached the world outside.
    pub reached: bool,
}

impl Attempt {
    pub fn new(job: ClaimedJob, work: Option<StepWork>) -> Self {
        let claimed = job.lease;
        Self {
            claimed,
            job,
            work: work.map(Box::new),
            decided: None,
            maybe_landed: false,
            hangs: false,
            reached: false,
        }
    }

    pub fn claimant(&self) -> Claimant {
        claimant(&self.job)
    }

    /// Whether its handler does not come to its end.
    pub fn is_stopped(&self) -> bool {
        self.hangs || (self.work.is_some() && self.job.crash_count >= CRASHES_MAX)
    }

    /// Whether the job, as its row says, is what a landed commit has made of
    /// it: the rule of `advance::has_landed`.
    pub fn has_landed(&self, holder: Option<Holder>) -> bool {
        let Some(next) = self.decided.as_ref().and_then(|decided| decided.commit.job.as_ref()) else { return true };
        let Lease { epoch, session, .. } = self.job.lease;
        holder.is_some_and(|now| (now.epoch, now.session, now.step) == (epoch + 1, Some(session), next.step))
    }

    /// Whether a commit leaves the job with this worker.
    pub fn stays(&self) -> bool {
        self.decided.as_ref().is_some_and(|decided| decided.next.is_some())
    }

    /// The next step under the next epoch, once the commit is in.
    pub fn next(self) -> Option<Self> {
        let decided = self.decided?;
        let (job, work) = decided.next.as_ref()?;
        let work = StepWork {
            above: None,
            run_job: job.lease.job,
            secrets: None,
            context: work.context.clone(),
            agents: Arc::clone(&work.agents),
            chain: work.chain,
            chain_began: Instant::now(),
        };
        Some(Self { claimed: self.claimed, ..Self::new(job.clone(), Some(work)) })
    }
}

/// A process that works.
#[derive(Default)]
pub struct Worker {
    pub life: u32,
    pub alive: bool,
    pub session: i64,
    /// When the last beat that succeeded was sent.
    pub renewed: u64,
    pub frozen_until: u64,
    /// When what the session holds was last compared with what is in hand;
    /// none after a claim that may have committed without its answer.
    pub compared: Option<u64>,
    pub attempts: BTreeMap<u64, Attempt>,
}

impl Worker {
    /// `Load::in_hand`.
    pub fn in_hand(&self, session: i64) -> Vec<i64> {
        let leases = self.attempts.values().map(|attempt| attempt.claimed);
        leases.filter(|lease| lease.session == session).map(|lease| lease.job).collect()
    }

    /// `Load::hold`: not twice under the same lease.
    pub fn holds(&self, lease: Lease) -> bool {
        self.attempts.values().any(|attempt| attempt.claimed == lease)
    }
}

/// How a handler ends.
pub fn outcome(random: &mut Random, calm: bool, step: i32) -> Outcome {
    let failed = |class| Outcome::failed(Failure::new(class, "simulated"));
    match if calm { 0 } else { random.below(100) } {
        0..75 => Outcome::done(json!({"text": format!("of step {step}")})),
        75..87 => failed(ErrorClass::Transient),
        87..90 => failed(ErrorClass::Timeout),
        90..94 => {
            let mut failure = Failure::new(ErrorClass::RateLimited, "simulated");
            failure.retry_after = Some(Duration::from_millis(random.below(2_000)));
            Outcome::failed(failure)
        }
        94..96 => failed(ErrorClass::Invalid),
        _ => Outcome::Released { delay: Duration::from_millis(random.below(500)) },
    }
}
