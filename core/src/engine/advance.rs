//! Moving runs on: the outcomes of attempts, decided one by one and
//! committed together. This is the hot path.
//!
//! An attempt whose lease is gone writes nothing and is told so. A batch that
//! the database refuses is committed one by one, so that a bad outcome harms
//! only its own run, and that one fails with the reason.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::claim::StepWork;
use super::gates::{approval_of, waiting_on};
use super::items::{self, DecidedItem};
use super::nodes::{self, Beginning};
use super::{Engine, EngineError, repeating};
use crate::domain::artifact::{Artifact, take_out};
use crate::domain::event::{
    APPROVAL_REQUESTED, Event, PLAYBOOK_CANCELLED, PLAYBOOK_CLOSING, PLAYBOOK_COMPLETED, PLAYBOOK_FAILED,
    PLAYBOOK_SUSPENDED, RUBRIC_EVALUATED, STEP_COMPLETED, STEP_FAILED, STEP_STARTED,
};
use crate::domain::ids::{AgentId, ApprovalId, RunId};
use crate::domain::money::Nanos;
use crate::domain::outcome::{Failure, Fanning, Outcome};
use crate::domain::plan::{
    DeadReason, Decision, Draft, Ending, FAN_LOOK, Gate, Graded, Hold, JUNCTION, Letter, Next, Passed, Refusal,
    RunContext, Stage, Walk,
};
use crate::domain::playbook::Step;
use crate::domain::playbook::model::{OnFailure, STEP_TIMEOUT, StepKind};
use crate::domain::playbook::shape::Shape;
use crate::domain::run::{RunStatus, StepStatus};
use crate::domain::storable::{self, OUTPUT_BYTES_MAX};
use crate::failpoint;
use crate::store::approvals::{NewApproval, NewDeadLetter};
use crate::store::fans::{self, Lane, NewFan};
use crate::store::grades::{self, NewGrade};
use crate::store::jobs::{ClaimedJob, Lease, kind, queue};
use crate::store::signals::NewWait;
use crate::store::steps::{NextJob, Passing, RunChange, StepChange, StepCommit};
use crate::store::{StoreError, approvals, artifacts, events, jobs, signals, steps};

/// So much of what a run went past is told with a step's end.
const TOLD_MAX: usize = 50;
/// A pause is one, however short.
pub(super) const SLEEP_MIN: Duration = Duration::from_millis(1);

/// A finished attempt at a step.
#[derive(Debug)]
pub struct Finished {
    /// The job and its lease.
    pub job: ClaimedJob,
    /// The run.
    pub work: Box<StepWork>,
    /// How the attempt ended.
    pub outcome: Outcome,
    /// What of its cost is booked already.
    pub booked: Nanos,
    /// How long it took.
    pub took: Duration,
}

/// What became of a finished attempt.
#[derive(Debug)]
pub enum Committed {
    /// Written; this worker goes on with the next step, already leased.
    Continue(ClaimedJob, Box<StepWork>),
    /// Written; the job is no longer this worker's.
    Settled,
    /// The same, and the job is due later: nobody is told of timers, so whoever
    /// makes one looks again.
    Later,
    /// The lease was gone: nothing was written.
    Lost,
}

/// A decided attempt: what to write, and what to go on with.
#[derive(Debug)]
pub struct Decided {
    /// Under the attempt's lease.
    pub commit: StepCommit,
    /// What the run went past, and where it waits.
    pub passed: Passing,
    /// The event that the run waits for.
    pub wait: Option<NewWait>,
    /// The gate that the run has come to.
    pub approval: Option<NewApproval>,
    /// Why the step gave up.
    pub letter: Option<NewDeadLetter>,
    /// The items that the run waits for.
    pub fan: Option<NewFan>,
    /// The steps of its graph that begin.
    pub begin: Vec<Beginning>,
    /// Those that wait no more, since it fails.
    pub withdraw: Vec<i32>,
    /// Whatever is open of the run goes, as when somebody cancels it.
    pub drops: bool,
    /// The run's own job, where this is the attempt of a node.
    pub node_of: Option<i64>,
    /// The run ends, and others wait for that.
    pub frees: bool,
    /// A failure of the run is not its end: something is to be done first.
    pub closes: bool,
    /// What is kept of a draft, or of how the run has held its limits.
    pub grade: Option<NewGrade>,
    /// What of the run's own output is too large to be kept inline.
    pub apart: Vec<(Artifact, Vec<u8>)>,
    /// What is told behind the events of the commit.
    pub told: Vec<Event>,
    /// What this worker goes on with, once that is written.
    pub next: Option<(ClaimedJob, Box<StepWork>)>,
}

/// Commits finished attempts; one answer each, in order. `stay` allows this
/// worker to go on with the runs itself. An error means that nothing is known
/// to be written: the caller waits and calls [`commit_again`].
pub async fn commit(
    engine: &Engine,
    finished: Vec<Finished>,
    stay: bool,
) -> Result<Vec<Committed>, (EngineError, Pending)> {
    let decided = finished.into_iter().map(|finished| match finished.job.item {
        Some(item) => Of::Item(Box::new(items::decide(finished, item, stay, rand::random()))),
        None if finished.work.node_of(&finished.job).is_some() => {
            Of::Node(Box::new(decide(finished, false, rand::random())))
        }
        None => Of::Run(Box::new(decide(finished, stay, rand::random()))),
    });
    let decided = decided.collect();
    commit_again(engine, Pending { done: Vec::new(), decided, maybe_landed: false }).await
}

/// A decided attempt: of a run at its step, of a node of its graph, or at an item of
/// a step.
#[derive(Debug)]
enum Of {
    Run(Box<Decided>),
    Node(Box<Decided>),
    Item(Box<DecidedItem>),
}

/// What became of a commit.
#[derive(Debug, Clone, Copy, Default)]
struct Landed {
    /// It is written.
    held: bool,
    /// The item that a lane goes on with.
    item: Option<i32>,
    /// Others have something to do.
    wakes: bool,
}

impl Of {
    fn lease(&self) -> Lease {
        match self {
            Self::Run(decided) | Self::Node(decided) => decided.commit.lease,
            Self::Item(decided) => decided.commit.lease,
        }
    }

    fn run(&self) -> RunId {
        match self {
            Self::Run(decided) | Self::Node(decided) => decided.commit.run,
            Self::Item(decided) => decided.commit.run,
        }
    }

    fn unstorable(self, error: &StoreError) -> Self {
        match self {
            Self::Run(decided) => Self::Run(Box::new(unstorable(*decided, error))),
            Self::Node(decided) => Self::Node(Box::new(unstorable(*decided, error))),
            Self::Item(decided) => Self::Item(Box::new(decided.unstorable(error))),
        }
    }

    fn answer(self, landed: Landed) -> Committed {
        if !landed.held {
            return Committed::Lost;
        }
        let next = match self {
            Self::Run(decided) | Self::Node(decided) => {
                if decided.next.is_none() && decided.commit.job.is_some_and(|job| !job.delay.is_zero()) {
                    return Committed::Later;
                }
                decided.next
            }
            Self::Item(decided) if decided.is_later() => return Committed::Later,
            Self::Item(decided) => landed.item.and_then(|item| decided.next(item)),
        };
        next.map_or(Committed::Settled, |(job, work)| Committed::Continue(job, work))
    }
}

/// Outcomes that are decided but perhaps not written.
pub struct Pending {
    /// What became of those before them.
    done: Vec<Committed>,
    decided: Vec<Of>,
    maybe_landed: bool,
}

impl std::fmt::Debug for Pending {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Pending({} attempts)", self.decided.len())
    }
}

/// Commits what an earlier call could not. Where that call's commit may have
/// landed unseen, the job's row tells (hazard H8).
pub async fn commit_again(engine: &Engine, mut pending: Pending) -> Result<Vec<Committed>, (EngineError, Pending)> {
    let mut landed = match write(engine, &pending.decided).await {
        Ok(landed) => landed,
        Err(EngineError::Store(error)) if error.is_about_data() => return one_by_one(engine, pending).await,
        Err(error) => {
            pending.maybe_landed = true;
            return Err((error, pending));
        }
    };
    if pending.maybe_landed {
        for (decided, landed) in pending.decided.iter().zip(&mut landed).filter(|(_, landed)| !landed.held) {
            match has_landed(engine, decided).await {
                Ok(found) => *landed = found,
                // What this call has written, the next one finds landed.
                Err(error) => return Err((error.into(), pending)),
            }
        }
    }
    // Of those that wait, some may have found what they waited for.
    if landed.iter().any(|landed| landed.wakes) {
        engine.waker.wake();
    }
    let mut done = pending.done;
    done.extend(pending.decided.into_iter().zip(landed).map(|(decided, landed)| decided.answer(landed)));
    Ok(done)
}

fn wakes(decided: &Decided) -> bool {
    let ready = decided.commit.job.as_ref().is_some_and(|job| !job.held && job.delay.is_zero());
    ready || decided.wait.is_some() || decided.fan.is_some() || !decided.begin.is_empty() || decided.frees
}

/// Whether an earlier commit of the same attempt is in, as far as it matters:
/// whether the job is now ours to go on with. Its row must carry the epoch,
/// the session and the step or item that only that commit gives; a mere retake of
/// the same has the same epoch. What is not ours any more needs no answer.
async fn has_landed(engine: &Engine, decided: &Of) -> Result<Landed, StoreError> {
    let Lease { job, epoch, session } = decided.lease();
    let in_hand = match decided {
        Of::Run(decided) => decided.commit.job.as_ref().is_some_and(|next| next.held),
        Of::Node(_) => false,
        Of::Item(decided) => decided.may_go_on(),
    };
    // Nobody may have been told of what it has made ready.
    let landed = Landed { held: true, item: None, wakes: true };
    if !in_hand {
        return Ok(landed);
    }
    let holder = jobs::holder_of(&engine.pool, job).await?;
    let ours = holder.filter(|now| (now.epoch, now.session) == (epoch + 1, Some(session)));
    Ok(match (decided, ours) {
        (Of::Run(decided), Some(now)) if decided.commit.job.as_ref().is_some_and(|next| next.step == now.step) => {
            landed
        }
        // A lane moves on to another item each time.
        (Of::Item(decided), Some(now)) if now.item != Some(decided.commit.item) => Landed { item: now.item, ..landed },
        // The last item of its fan took the lane with it.
        (Of::Item(_), None) if holder.is_none() => landed,
        _ => Landed::default(),
    })
}

/// A batch that the database refuses for what is in it: each by itself, so
/// that a bad outcome harms only its own run.
async fn one_by_one(engine: &Engine, pending: Pending) -> Result<Vec<Committed>, (EngineError, Pending)> {
    let Pending { mut done, decided, maybe_landed } = pending;
    let mut rest = decided.into_iter();
    while let Some(mut decided) = rest.next() {
        let mut written = write(engine, std::slice::from_ref(&decided)).await;
        if let Err(EngineError::Store(error)) = &written
            && error.is_about_data()
        {
            tracing::warn!(run.id = %decided.run(), job.id = decided.lease().job, %error, "a result could not be stored");
            decided = decided.unstorable(error);
            written = write(engine, std::slice::from_ref(&decided)).await;
        }
        let landed = match written {
            // Not even the failure can be stored: a fault of ours, which must
            // not hold up everybody else's. The job's deadline brings it back.
            Err(EngineError::Store(error)) if error.is_about_data() => {
                tracing::error!(run.id = %decided.run(), job.id = decided.lease().job, %error, "a failure could not be stored");
                Ok(Landed::default())
            }
            Ok(landed) => match landed.first().copied().unwrap_or_default() {
                landed if landed.held || !maybe_landed => Ok(landed),
                _ => has_landed(engine, &decided).await.map_err(EngineError::from),
            },
            Err(error) => Err(error),
        };
        match landed {
            Ok(landed) => {
                if landed.wakes {
                    engine.waker.wake();
                }
                done.push(decided.answer(landed));
            }
            Err(error) => {
                let decided = std::iter::once(decided).chain(rest).collect();
                return Err((error, Pending { done, decided, maybe_landed: true }));
            }
        }
    }
    Ok(done)
}

/// The failure that takes the place of a result the database refuses.
fn unstorable(decided: Decided, error: &StoreError) -> Decided {
    let Decided { commit, closes, node_of, .. } = decided;
    let attempt = commit.checkpoint.as_ref().map_or(0, |step| step.attempt);
    let failure = Failure::invalid(format!("the result could not be stored: {error}"));
    let error = json!({"code": "invalid", "message": failure.message, "index": commit.step});
    let step = commit.checkpoint.map(|step| StepChange {
        status: StepStatus::Failed,
        output: None,
        error: Some(error.to_string()),
        ..step
    });
    let letter = Letter { reason: DeadReason::Invalid, attempt, crash_count: 0 };
    let ending = Ending { error: Some(error.clone()), letter: Some(letter), ..Ending::of(RunStatus::Failed) };
    let commit = StepCommit { checkpoint: step, cost: Nanos::ZERO, ..commit };
    let decided = Decided { closes, node_of, ..Decided::new(commit) };
    if node_of.is_some() {
        // Whether the run fails is decided at its junction.
        return Decided {
            commit: StepCommit { job: None, change: RunChange::default(), events: Vec::new(), ..decided.commit },
            ..decided
        };
    }
    if closes {
        let job = NextJob {
            held: false,
            kind: kind::STEP,
            step: JUNCTION,
            delay: Duration::ZERO,
            timeout: STEP_TIMEOUT,
            attempt: 0,
            crash_count: 0,
        };
        let events = vec![closing_event(&ending)];
        let commit = StepCommit { job: Some(job), change: RunChange::default(), events, ..decided.commit };
        let passed = Passing { ending: Some(json!(ending)), ..Passing::default() };
        return Decided { commit, passed, ..decided };
    }
    let letter = NewDeadLetter {
        company: decided.commit.company,
        queue: queue::STEPS.to_owned(),
        kind: kind::STEP.to_owned(),
        ref_id: Some(decided.commit.run.0),
        step: decided.commit.step,
        reason: DeadReason::Invalid.as_str(),
        attempt,
        crash_count: 0,
        error: error.clone(),
    };
    let change = RunChange { status: Some(RunStatus::Failed), error: Some(error.to_string()), ..RunChange::default() };
    let events = vec![Event::new(PLAYBOOK_FAILED, json!({"error": error}))];
    let commit = StepCommit { job: None, change, events, ..decided.commit };
    Decided { commit, letter: Some(letter), ..decided }
}

async fn write(engine: &Engine, decided: &[Of]) -> Result<Vec<Landed>, EngineError> {
    repeating(|| write_once(engine, decided)).await
}

async fn write_once(engine: &Engine, decided: &[Of]) -> Result<Vec<Landed>, EngineError> {
    let (mut runs, mut nodes, mut items) = (Vec::new(), Vec::new(), Vec::new());
    for of in decided {
        match of {
            Of::Run(decided) => runs.push(decided.as_ref()),
            Of::Node(decided) => nodes.push(decided.as_ref()),
            Of::Item(decided) => items.push(&decided.commit),
        }
    }
    if failpoint::reach("commit.before").await {
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    let plain = runs.iter().all(|d| d.is_plain());
    // One by one: two of a run would not see each other. What is written of them
    // when another fails is found as such, since their leases are gone.
    let mut kept = Vec::with_capacity(nodes.len());
    for node in nodes {
        kept.push(nodes::commit(engine, node).await?);
    }
    let (held, lanes) = if runs.is_empty() && items.is_empty() {
        (Vec::new(), Vec::new())
    } else if items.is_empty() && plain {
        let commits: Vec<StepCommit> = runs.iter().map(|d| d.commit.clone()).collect();
        (steps::commit(&engine.pool, &commits).await?, Vec::new())
    } else if runs.is_empty() {
        (Vec::new(), fans::commit(&engine.pool, &items).await?)
    } else {
        let mut tx = engine.pool.begin().await?;
        let held = write_runs(&mut tx, &runs).await?;
        let lanes = fans::commit(&mut *tx, &items).await?;
        tx.commit().await?;
        (held, lanes)
    };
    if failpoint::reach("commit.after").await {
        // As if the answer had been lost on its way.
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    let (mut held, mut kept, mut lanes) = (held.into_iter(), kept.into_iter(), lanes.into_iter());
    Ok(decided
        .iter()
        .map(|of| match of {
            Of::Run(decided) => {
                let held = held.next().unwrap_or(false);
                Landed { held, item: None, wakes: held && wakes(decided) }
            }
            Of::Node(decided) => {
                let held = kept.next().unwrap_or(false);
                Landed { held, item: None, wakes: held && (nodes::wakes_run(decided) || wakes(decided)) }
            }
            Of::Item(decided) => {
                let lane: Lane = lanes.next().unwrap_or_default();
                let left = (lane.next.is_some() && !decided.may_go_on()) || decided.is_given_back();
                Landed { held: lane.held, item: lane.next, wakes: lane.woken || left }
            }
        })
        .collect())
}

async fn write_runs(tx: &mut PgConnection, decided: &[&Decided]) -> Result<Vec<bool>, EngineError> {
    // Before any job's, and in one order.
    let mut names: Vec<_> = decided.iter().filter_map(|d| d.wait.as_ref()).map(|w| (w.company, &w.name)).collect();
    names.sort_unstable_by_key(|(company, name)| (company.0, *name));
    names.dedup();
    for (company, name) in names {
        signals::lock(tx, company, name).await?;
    }
    let commits: Vec<StepCommit> = decided.iter().map(|d| d.commit.clone()).collect();
    let held = steps::commit(&mut *tx, &commits).await?;
    for (decided, _) in decided.iter().zip(&held).filter(|(_, held)| **held) {
        beside(tx, decided).await?;
    }
    Ok(held)
}

/// What is written beside a commit, where there is more than it writes itself.
pub(super) async fn beside(tx: &mut PgConnection, decided: &Decided) -> Result<(), EngineError> {
    let (company, run) = (decided.commit.company, decided.commit.run);
    steps::pass(tx, company, run, &decided.passed).await?;
    if let Some(wait) = &decided.wait {
        signals::park(tx, wait).await?;
    }
    if let Some(approval) = &decided.approval {
        approvals::insert(&mut *tx, approval).await?;
    }
    if let Some(letter) = &decided.letter {
        approvals::bury_letter(&mut *tx, letter).await?;
    }
    if let Some(fan) = &decided.fan {
        fans::open(tx, fan).await?;
    }
    if let Some(grade) = &decided.grade {
        grades::put(tx, company, run, grade).await?;
    }
    for (artifact, bytes) in &decided.apart {
        artifacts::put(tx, (company, run), artifact, bytes).await?;
    }
    for event in &decided.told {
        events::append_to_run(&mut *tx, company, run, event).await?;
    }
    nodes::turn(tx, decided).await?;
    Ok(())
}

impl Decided {
    /// A commit and nothing beside it.
    fn new(commit: StepCommit) -> Self {
        Self {
            commit,
            passed: Passing::default(),
            wait: None,
            approval: None,
            letter: None,
            fan: None,
            begin: Vec::new(),
            withdraw: Vec::new(),
            drops: false,
            node_of: None,
            frees: false,
            closes: false,
            grade: None,
            apart: Vec::new(),
            told: Vec::new(),
            next: None,
        }
    }

    /// One statement writes it.
    fn is_plain(&self) -> bool {
        let alone = self.passed.is_empty() && self.begin.is_empty() && self.withdraw.is_empty();
        let alone = alone && self.apart.is_empty() && !self.drops;
        alone && self.approval.is_none() && self.letter.is_none() && self.fan.is_none() && self.grade.is_none()
    }
}

/// One attempt: pure, but for the ids of its events. `draw` in `[0, 1)` is the
/// jitter.
pub fn decide(finished: Finished, stay: bool, draw: f64) -> Decided {
    let Finished { job, mut work, outcome, booked, took } = finished;
    let declared = usize::try_from(job.step).ok().and_then(|at| work.context.playbook.step(at));
    // Of a list, each item was held to it; and what grades or settles a draft is not the
    // step's output.
    let says = work.context.to_grade().or_else(|| work.context.to_settle()).is_none();
    let declared = declared.filter(|step| says && step.fan.is_none()).and_then(|step| step.output.as_ref());
    let (outcome, output) = storable_outcome(outcome, declared);
    let step = usize::try_from(job.step).unwrap_or(usize::MAX);
    let attempt = u32::try_from(job.attempt).unwrap_or(0);
    work.context.spent.0 = work.context.spent.0.saturating_add(outcome.cost().0);
    let agent = work.agent(step).or_else(|| work.judge(step)).map(|agent| agent.agent);
    let (outcome, graded) = work.context.grade(step, outcome);
    let output = match (&outcome, &graded) {
        (Outcome::Done { output, .. }, Some(_)) => Some(output.to_string()),
        _ => output,
    };
    let (outcome, output) = work.context.keep(outcome, output);
    if let Some(Graded { holds: Some(hold), .. }) = &graded {
        let hold = hold.clone();
        let facts = Facts { job, work, outcome, output, booked, took, agent, refused: None, graded, stay };
        return match hold {
            Hold::Again => facts.again(),
            Hold::Ask(gate) => facts.escalate(&gate),
        };
    }
    if let Outcome::Asks(gate) = &outcome {
        let gate = gate.as_ref().clone();
        let facts = Facts { job, work, outcome, output, booked, took, agent, refused: None, graded, stay };
        return facts.escalate(&gate);
    }
    let decision = match &outcome {
        Outcome::Done { .. } if job.kind == kind::BEGIN => Decision::Advance(work.context.begins_at(step)),
        Outcome::Done { .. } if job.step == JUNCTION || work.context.is_past_all(step) => {
            Decision::Advance(work.context.junction())
        }
        _ => work.context.decide(step, attempt, &outcome, draw),
    };
    let turn = (job.step == JUNCTION && matches!(outcome, Outcome::Done { .. }) && work.context.takes_turns())
        .then(|| work.context.turn());
    // It was about this step and no other.
    let refused = work.context.refused.take();
    let facts = Facts { job, work, outcome, output, booked, took, agent, refused, graded, stay };
    if let Some(turn) = turn {
        return facts.turn(turn);
    }
    match decision {
        Decision::Advance(walk) => facts.go_on(walk, StepStatus::Completed),
        Decision::GoPast(walk) => facts.go_on(walk, StepStatus::Failed),
        Decision::Retry { delay, charged } => facts.retry(delay, charged),
        Decision::Fail { reason } => facts.fail(reason),
        Decision::Wait { event, matching, timeout } => facts.park(event, matching, timeout),
        Decision::Fan(fanning) => facts.fan_out(fanning),
        Decision::Release { delay } => facts.release(delay),
    }
}

/// What cannot be stored, or is not what the step declares, becomes a failure with the
/// reason (hazard H17).
pub(super) fn storable_outcome(outcome: Outcome, declared: Option<&Shape>) -> (Outcome, Option<String>) {
    match outcome {
        Outcome::Done { output, cost } if declared.is_some_and(|shape| shape.problem(&output).is_some()) => {
            let problem = declared.and_then(|shape| shape.problem(&output)).unwrap_or_default();
            let failure = Failure::invalid(format!("the step's output is not as declared: {problem}"));
            (Outcome::Failed { failure, cost }, None)
        }
        Outcome::Done { output, cost } => match storable::to_json(&output, OUTPUT_BYTES_MAX) {
            Ok(text) => (Outcome::Done { output, cost }, Some(text)),
            Err(error) => {
                let failure = Failure::invalid(format!("the step's output {error}"));
                (Outcome::Failed { failure, cost }, None)
            }
        },
        other => (other, None),
    }
}

pub(super) struct Facts {
    pub(super) job: ClaimedJob,
    pub(super) work: Box<StepWork>,
    outcome: Outcome,
    output: Option<String>,
    /// What of the cost is booked already.
    booked: Nanos,
    took: Duration,
    agent: Option<AgentId>,
    refused: Option<Refusal>,
    graded: Option<Graded>,
    stay: bool,
}

impl Facts {
    fn cost(&self) -> Nanos {
        self.outcome.cost()
    }

    fn failure(&self) -> Option<&Failure> {
        match &self.outcome {
            Outcome::Failed { failure, .. } => Some(failure),
            _ => None,
        }
    }

    fn step(&self) -> Option<&Step> {
        // A run that only begins is at no step yet.
        let at = (self.job.kind != kind::BEGIN).then_some(self.job.step)?;
        self.work.context.playbook.step(usize::try_from(at).ok()?)
    }

    fn step_id(&self) -> &str {
        self.step().map_or("", |step| &step.id)
    }

    fn completed_event(&self) -> Event {
        let step = self.step();
        let mut data = json!({
            "step": self.step_id(), "index": self.job.step, "agent_id": self.agent,
            "role": step.and_then(|s| s.role.as_deref()), "action": step.map(|s| s.action.as_str()),
            "attempt": self.job.attempt, "cost": self.cost().to_usd(), "duration_ms": jobs::millis(self.took),
        });
        if let Some(evaluation) = self.graded.as_ref().and_then(|graded| graded.draft.evaluation.as_ref()) {
            data["score"] = evaluation["score"].clone();
        }
        Event::new(STEP_COMPLETED, data)
    }

    /// What the draft at hand came to, where that is news.
    fn evaluated_event(&self) -> Option<Event> {
        let graded = self.graded.as_ref().filter(|graded| graded.is_news)?;
        let mut data = graded.draft.evaluation.clone()?;
        data["step"] = self.step_id().into();
        data["index"] = self.job.step.into();
        data["agent_id"] = json!(self.work.judge(usize::try_from(self.job.step).ok()?).map(|agent| agent.agent));
        Some(Event::new(RUBRIC_EVALUATED, data))
    }

    /// What is kept of the draft at hand.
    fn grade(&self) -> Option<NewGrade> {
        let draft = self.graded.as_ref()?.draft.clone();
        let round = i32::try_from(self.work.context.round()).unwrap_or(i32::MAX);
        Some(NewGrade { step: self.job.step, round, draft })
    }

    fn error_json(&self) -> serde_json::Value {
        let failure = self.failure();
        let mut error = json!({
            "code": failure.map(|f| f.class.as_str()), "message": failure.map(|f| f.message.as_str()),
            "step": self.step_id(), "index": self.job.step, "attempt": self.job.attempt,
        });
        if let Some(refused) = &self.refused {
            error["feedback"] = refused.words.clone().into();
            error["approval_id"] = json!(refused.approval);
        }
        error
    }

    fn failed_event(&self, will_retry: Option<Duration>) -> Event {
        let mut data = self.error_json();
        data["agent_id"] = self.agent.map(|agent| agent.to_string()).into();
        data["will_retry"] = will_retry.is_some().into();
        data["retry_in_ms"] = will_retry.map(jobs::millis).into();
        Event::new(STEP_FAILED, data)
    }

    /// How the step has ended, and what the run went past after it. A run that
    /// went past all its steps has ended without one.
    fn ended_events(&self, ended: StepStatus, passed: &[Passed]) -> Vec<Event> {
        if self.step().is_none() {
            return Vec::new();
        }
        let mut event = match ended {
            StepStatus::Completed => self.completed_event(),
            _ => self.failed_event(None),
        };
        if ended == StepStatus::Failed {
            let aborts = self.step().is_none_or(|step| step.on_failure == OnFailure::Abort);
            event.data["goes_on"] = (!aborts || self.work.context.ending.is_some()).into();
        }
        if let Some(told) = told(&self.work.context, passed) {
            event.data["passed"] = told;
        }
        std::iter::once(event).chain(self.evaluated_event()).collect()
    }

    fn checkpoint(&self, status: StepStatus) -> Option<StepChange> {
        self.step()?;
        Some(StepChange {
            status,
            agent: self.agent,
            // Of a `goto` it is how often it has jumped.
            attempt: match self.step()?.kind {
                StepKind::Goto { .. } => self.jumps(),
                _ => self.job.attempt,
            },
            output: if status == StepStatus::Completed { self.output.clone() } else { None },
            error: self.failure().map(|_| self.error_json().to_string()),
            took: self.took,
        })
    }

    pub(super) fn commit(
        &self,
        job: Option<NextJob>,
        change: RunChange,
        checkpoint: Option<StepChange>,
        events: Vec<Event>,
    ) -> StepCommit {
        let said = checkpoint.as_ref().and_then(|step| step.output.as_ref()).map_or(0, String::len);
        StepCommit {
            lease: self.job.lease,
            company: self.job.company,
            run: self.work.context.run,
            step: self.job.step,
            job,
            change,
            checkpoint,
            cost: self.cost().without(self.booked),
            bytes: i64::try_from(said).unwrap_or(i64::MAX) + self.work.context.items_bytes(),
            events,
        }
    }

    pub(super) fn plain(self, commit: StepCommit) -> Decided {
        let context = &self.work.context;
        // While it is being closed, a step that fails is not the end either.
        let closes = context.ending.is_some() || context.playbook.closes(RunStatus::Failed);
        Decided { closes, node_of: self.work.node_of(&self.job), grade: self.grade(), ..Decided::new(commit) }
    }

    fn jumps(&self) -> i32 {
        let at = usize::try_from(self.job.step).unwrap_or(usize::MAX);
        let jumps = self.work.context.jumps.get(&at).copied().unwrap_or(0);
        i32::try_from(jumps).unwrap_or(i32::MAX)
    }

    /// The step has done with waiting for an event, if it did.
    fn waited(&self) -> Option<i32> {
        let waits = matches!(self.step()?.kind, StepKind::WaitFor(_));
        waits.then_some(self.job.step)
    }

    /// The job of the run from now on, at a step or at none.
    pub(super) fn next_job(
        &self,
        held: bool,
        kind: &'static str,
        next: impl Into<Option<usize>>,
        delay: Duration,
        attempt: i32,
    ) -> NextJob {
        let next = next.into();
        let planned = next.and_then(|next| self.work.context.playbook.step(next));
        let timeout = planned.map_or(STEP_TIMEOUT, |step| step.timeout);
        let step = next.map_or(JUNCTION, place);
        // Deaths are counted from checkpoint to checkpoint.
        let crash_count = if step == self.job.step { self.job.crash_count } else { 0 };
        NextJob { held, kind, step, delay, timeout, attempt, crash_count }
    }

    /// On to what the walk has come upon. What it went past is told with the end
    /// of the step, and written beside it.
    fn go_on(self, walk: Walk, ended: StepStatus) -> Decided {
        let mut passed = passing(&walk.passed);
        let limits = self.stops_for_limits(&walk.next);
        passed.received = self.waited();
        let events = self.ended_events(ended, &walk.passed);
        let checkpoint = self.checkpoint(ended);
        let decided = match walk.next {
            _ if limits => self.by_junction(checkpoint, events),
            Next::Step(next) => self.advance(next, checkpoint, events),
            Next::Gate(gate) => self.wait_at(&gate, checkpoint, events),
            Next::Sleep { step, delay } => self.sleep(step, delay, checkpoint, events),
            Next::End { output } => self.complete(output, checkpoint, events),
            Next::Closed => self.closed(checkpoint, events),
            Next::Junction => self.node_over(checkpoint, events),
        };
        // What closes the run is written by whoever has decided to.
        passed.ending = decided.passed.ending.clone();
        Decided { passed, ..decided }
    }

    /// Whether the run is to be held against its limits next, which is done at the
    /// junction: its steps are over, or it has broken one.
    fn stops_for_limits(&self, next: &Next) -> bool {
        let context = &self.work.context;
        let limited = !context.playbook.limits.is_empty() && !context.playbook.graph && context.ending.is_none();
        limited && self.job.step != JUNCTION && (matches!(next, Next::End { .. }) || context.is_over_limit())
    }

    fn by_junction(self, checkpoint: Option<StepChange>, events: Vec<Event>) -> Decided {
        let job = self.next_job(false, kind::STEP, None, Duration::ZERO, 0);
        let commit = self.commit(Some(job), RunChange::default(), checkpoint, events);
        self.plain(commit)
    }

    /// The next step: by this worker when it may stay, else by the queue.
    fn advance(mut self, next: usize, checkpoint: Option<StepChange>, events: Vec<Event>) -> Decided {
        let grade = self.grade();
        let held = self.stay && self.work.may_stay();
        let mut job = self.next_job(held, kind::STEP, next, Duration::ZERO, i32::from(held));
        // Even of a loop of one step: a checkpoint lies in between.
        job.crash_count = 0;
        let timeout = job.timeout;
        let commit = self.commit(Some(job), RunChange::default(), checkpoint, events);
        if !held {
            return self.plain(commit);
        }
        self.work.chain += 1;
        let next_job = ClaimedJob {
            lease: Lease { epoch: self.job.lease.epoch + 1, ..self.job.lease },
            kind: kind::STEP.to_owned(),
            step: commit.job.as_ref().map_or(0, |job| job.step),
            attempt: 1,
            crash_count: 0,
            timeout,
            ..self.job
        };
        let closes = self.work.context.ending.is_some() || self.work.context.playbook.closes(RunStatus::Failed);
        Decided { closes, grade, next: Some((next_job, self.work)), ..Decided::new(commit) }
    }

    /// The run holds nothing while it waits, but for the one job that ends the
    /// wait.
    fn suspend(self, job: NextJob, waiting: &Value, checkpoint: Option<StepChange>, mut events: Vec<Event>) -> Decided {
        if self.work.node_of(&self.job).is_some() {
            // Others may be under way.
            let commit = self.commit(Some(job), RunChange::default(), checkpoint, events);
            return self.plain(commit);
        }
        let pauses = waiting[0]["type"] == "timer";
        Self::tell_wait(&mut events, waiting, pauses);
        let change = RunChange {
            status: Some(RunStatus::Suspended),
            waiting_on: Some(waiting.to_string()),
            ..RunChange::default()
        };
        let commit = self.commit(Some(job), change, checkpoint, events);
        self.plain(commit)
    }

    /// The next step waits for a person: the job becomes the gate's timer.
    fn wait_at(self, gate: &Gate, checkpoint: Option<StepChange>, mut events: Vec<Event>) -> Decided {
        let id = ApprovalId::new();
        let job = self.next_job(false, kind::GATE_TIMEOUT, gate.step, gate.approval.timeout, 0);
        let requested = Event::new(APPROVAL_REQUESTED, json!({"approval_id": id, "context": gate.context}));
        // A commit has room for the end of a step, what it came to, and where the run waits.
        let told = if events.len() < 2 {
            events.push(requested);
            Vec::new()
        } else {
            vec![requested]
        };
        let agent = self.work.agent(gate.step).map(|agent| agent.agent);
        let approval = approval_of(id, gate, &self.work.context, self.job.lease.job, agent);
        Decided { approval: Some(approval), told, ..self.suspend(job, &waiting_on(id), checkpoint, events) }
    }

    /// The same step again: to grade what it has said, or to have it say something else.
    fn again(self) -> Decided {
        let step = usize::try_from(self.job.step).ok();
        let mut job = self.next_job(false, kind::STEP, step, Duration::ZERO, 0);
        // A draft is kept: what comes of it begins anew.
        job.crash_count = 0;
        let (events, checkpoint) = (self.evaluated_event().into_iter().collect(), self.checkpoint(StepStatus::Running));
        let commit = self.commit(Some(job), RunChange::default(), checkpoint, events);
        self.plain(commit)
    }

    /// A person decides about what the step has said.
    fn escalate(self, gate: &Gate) -> Decided {
        let (events, checkpoint) = (self.evaluated_event().into_iter().collect(), self.checkpoint(StepStatus::Running));
        let (node, step) = (self.work.node_of(&self.job).is_some(), self.job.step);
        let decided = self.wait_at(gate, checkpoint, events);
        // The run of a node looks whether all that is under way waits.
        let passed = Passing { waiting: node.then_some(step), ..decided.passed };
        Decided { passed, ..decided }
    }

    /// The next step is a pause: its job is due when that is over.
    fn sleep(self, step: usize, delay: Duration, checkpoint: Option<StepChange>, events: Vec<Event>) -> Decided {
        let job = self.next_job(false, kind::TIMER, step, delay.max(SLEEP_MIN), 0);
        let waiting = sleeping(&self.work.context, step);
        self.suspend(job, &waiting, checkpoint, events)
    }

    /// A run that is suspended says so: a pause with the event before it, since many
    /// may sleep for long.
    fn tell_wait(events: &mut Vec<Event>, waiting: &Value, pauses: bool) {
        match events.last_mut().filter(|_| pauses) {
            Some(last) => last.data["sleeps"] = waiting[0]["id"].clone(),
            None => events.push(Event::new(PLAYBOOK_SUSPENDED, json!({"waiting_on": waiting}))),
        }
    }

    pub(super) fn complete(
        self,
        mut output: Option<Value>,
        checkpoint: Option<StepChange>,
        mut events: Vec<Event>,
    ) -> Decided {
        let limits = self.work.context.limits(output.as_ref());
        // A template makes little enough to be written with the commit.
        let apart = output.as_mut().map(take_out).unwrap_or_default();
        // All the steps are done, so the run is not failed for an output that
        // cannot be kept; it says why there is none.
        let output = output.map(|value| match storable::to_json(&value, OUTPUT_BYTES_MAX) {
            Ok(_) => value,
            Err(error) => json!({"error": format!("the run's output {error}")}),
        });
        let mut ending = Ending { output, ..Ending::of(RunStatus::Completed) };
        let Some((told, kept)) = limits else {
            return Decided { apart, ..self.end(ending, checkpoint, events) };
        };
        events.push(Event::new(RUBRIC_EVALUATED, told.clone()));
        let stage = if kept.is_ok() { Stage::Passed } else { Stage::Blocked };
        if let Err(failure) = kept {
            ending.status = RunStatus::Failed;
            ending.error = Some(json!({"code": failure.class.as_str(), "message": failure.message}));
        }
        let draft = Draft { stage, count: 0, returns: 0, output: None, evaluation: Some(told) };
        let grade = NewGrade { step: grades::RUN, round: 0, draft };
        Decided { apart, grade: Some(grade), ..self.end(ending, checkpoint, events) }
    }

    /// The steps are over: the run ends, or what closes it begins.
    pub(super) fn end(self, ending: Ending, checkpoint: Option<StepChange>, mut events: Vec<Event>) -> Decided {
        if !self.work.context.playbook.closes(ending.status) {
            return self.over(ending, checkpoint, events);
        }
        // What is to be undone stands in the run's rows.
        let job = self.next_job(false, kind::STEP, None, Duration::ZERO, 0);
        events.push(closing_event(&ending));
        let commit = self.commit(Some(job), RunChange::default(), checkpoint, events);
        let passed = Passing { received: self.waited(), ending: Some(json!(ending)), ..Passing::default() };
        Decided { passed, ..self.plain(commit) }
    }

    /// What closes the run is done, too.
    fn closed(self, checkpoint: Option<StepChange>, events: Vec<Event>) -> Decided {
        let ending = self.work.context.closed_as();
        self.over(ending, checkpoint, events)
    }

    /// The run has ended, and with it its job.
    fn over(self, ending: Ending, checkpoint: Option<StepChange>, mut events: Vec<Event>) -> Decided {
        let Ending { status, output, error, letter, by } = ending;
        let context = &self.work.context;
        events.push(match status {
            RunStatus::Completed => Event::new(
                PLAYBOOK_COMPLETED,
                json!({"playbook_id": context.playbook_id, "step_count": context.playbook.steps.len()}),
            ),
            RunStatus::Cancelled => Event::new(PLAYBOOK_CANCELLED, json!({"by": by})),
            _ => Event::new(PLAYBOOK_FAILED, json!({"error": error})),
        });
        let letter = letter.map(|letter| NewDeadLetter {
            company: self.job.company,
            queue: self.job.queue.clone(),
            kind: kind::STEP.to_owned(),
            ref_id: self.job.ref_id,
            step: error
                .as_ref()
                .and_then(|error| error["index"].as_i64())
                .and_then(|at| i32::try_from(at).ok())
                .unwrap_or(self.job.step),
            reason: letter.reason.as_str(),
            attempt: letter.attempt,
            crash_count: letter.crash_count,
            error: error.clone().unwrap_or_default(),
        });
        let change = RunChange {
            status: Some(status),
            output: output.map(|output| output.to_string()),
            error: error.map(|error| error.to_string()),
            ..RunChange::default()
        };
        let frees = context.called || context.playbook.concurrency.is_some();
        let commit = self.commit(None, change, checkpoint, events);
        Decided { letter, frees, ..self.plain(commit) }
    }

    fn retry(self, delay: Duration, charged: bool) -> Decided {
        let attempt = if charged { self.job.attempt } else { (self.job.attempt - 1).max(0) };
        let step = usize::try_from(self.job.step).ok();
        let job = self.next_job(false, kind::STEP, step, delay, attempt);
        let events = vec![self.failed_event(Some(delay))];
        let commit = self.commit(Some(job), RunChange::default(), self.checkpoint(StepStatus::Waiting), events);
        // One that waits for an event begins to wait anew.
        let passed = Passing { received: self.waited(), ..Passing::default() };
        Decided { passed, ..self.plain(commit) }
    }

    fn fail(self, reason: DeadReason) -> Decided {
        let letter = Letter { reason, attempt: self.job.attempt, crash_count: i32::from(self.job.crash_count) };
        let ending = Ending {
            error: Some(self.error_json()),
            // A person has said no: there is nothing to look into.
            letter: self.refused.is_none().then_some(letter),
            ..Ending::of(RunStatus::Failed)
        };
        let events = std::iter::once(self.failed_event(None)).chain(self.evaluated_event()).collect();
        let (checkpoint, received) = (self.checkpoint(StepStatus::Failed), self.waited());
        // Nobody comes back to a junction that gives up.
        let drops = self.job.step == JUNCTION;
        let decided = self.end(ending, checkpoint, events);
        Decided { passed: Passing { received, ..decided.passed }, drops, ..decided }
    }

    /// Lanes go through the items; the run's job waits for them. It is woken by the
    /// last one, and looks by itself should it be forgotten.
    fn fan_out(self, fanning: Fanning) -> Decided {
        let at = usize::try_from(self.job.step).ok();
        // With all items done before the run was retried, nobody is left to wake it.
        let delay = if fanning.is_empty() { Duration::ZERO } else { FAN_LOOK };
        let job = self.next_job(false, kind::STEP, at, delay, (self.job.attempt - 1).max(0));
        let fan = NewFan {
            company: self.job.company,
            run: self.work.context.run,
            step: self.job.step,
            round: i32::try_from(self.work.context.round()).unwrap_or(i32::MAX),
            job: self.job.lease.job,
            fanning,
            timeout: self.step().map_or(self.job.timeout, |step| step.timeout),
            bytes: self.work.context.bytes_begun(),
        };
        let step = self.step();
        let told = json!({
            "step": self.step_id(), "index": self.job.step, "agent_id": self.agent, "attempt": 1,
            "role": step.and_then(|s| s.role.as_deref()), "action": step.map(|s| s.action.as_str()),
            "items": fan.fanning.items,
        });
        let events = vec![Event::new(STEP_STARTED, told)];
        let checkpoint = self.checkpoint(StepStatus::Running).map(|step| StepChange { attempt: 1, ..step });
        let commit = self.commit(Some(job), RunChange::default(), checkpoint, events);
        Decided { fan: Some(fan), ..self.plain(commit) }
    }

    /// The run waits for an event: its job is due when its time is over, or made
    /// ready by whoever brings the event.
    fn park(self, event: String, matching: Value, timeout: Duration) -> Decided {
        let step = usize::try_from(self.job.step).ok();
        let job = self.next_job(false, kind::TIMER, step, timeout.max(SLEEP_MIN), (self.job.attempt - 1).max(0));
        let waiting = json!([{"type": "event", "id": event}]);
        let wait = NewWait {
            company: self.job.company,
            run: self.work.context.run,
            step: self.job.step,
            job: self.job.lease.job,
            name: event,
            matching,
        };
        let passed = Passing { waiting: Some(self.job.step), ..Passing::default() };
        Decided { wait: Some(wait), passed, ..self.suspend(job, &waiting, None, Vec::new()) }
    }

    fn release(self, delay: Duration) -> Decided {
        let step = usize::try_from(self.job.step).ok();
        // A run that has not begun has yet to.
        let kind = if self.job.kind == kind::BEGIN { kind::BEGIN } else { kind::STEP };
        let job = self.next_job(false, kind, step, delay, (self.job.attempt - 1).max(0));
        let commit = self.commit(Some(job), RunChange::default(), None, Vec::new());
        self.plain(commit)
    }
}

fn closing_event(ending: &Ending) -> Event {
    Event::new(PLAYBOOK_CLOSING, json!({"status": ending.status.as_str(), "error": ending.error, "by": ending.by}))
}

/// How a run that sleeps says what it waits for. Until when stands in its job, by the
/// database's clock, and since when in the event that tells of it; the step has no row
/// yet, so that a year costs few.
pub(super) fn sleeping(context: &RunContext, step: usize) -> Value {
    json!([{"type": "timer", "id": context.playbook.step(step).map(|step| step.id.as_str())}])
}

/// What a run went past, as rows: the last word about each step.
pub(super) fn passing(passed: &[Passed]) -> Passing {
    let mut skipped = BTreeSet::new();
    let mut again = BTreeSet::new();
    let mut jumped = BTreeMap::new();
    for passed in passed {
        match passed {
            Passed::Skipped(step) => {
                again.remove(step);
                skipped.insert(*step);
            }
            Passed::Jumped { step, target, jumps } => {
                again.extend(*target..*step);
                skipped.retain(|skipped| !(target..step).contains(&skipped));
                jumped.insert(*step, i32::try_from(*jumps).unwrap_or(i32::MAX));
            }
        }
    }
    // How often a jump was taken stays with it.
    again.retain(|step| !jumped.contains_key(step));
    Passing {
        skipped: skipped.into_iter().map(place).collect(),
        jumped: jumped.into_iter().map(|(step, jumps)| (place(step), jumps)).collect(),
        again: again.into_iter().map(place).collect(),
        ..Passing::default()
    }
}

/// What a run went past, as events tell it.
pub(super) fn told(context: &RunContext, passed: &[Passed]) -> Option<Value> {
    let id = |step: &usize| context.playbook.step(*step).map_or("", |step| step.id.as_str());
    let told = passed.iter().map(|passed| match passed {
        Passed::Skipped(step) => json!({"skipped": id(step)}),
        Passed::Jumped { target, jumps, .. } => json!({"back_to": id(target), "jumps": jumps}),
    });
    // Enough to see what it was; the steps say the rest.
    (!passed.is_empty()).then(|| told.take(TOLD_MAX).collect())
}

pub(super) fn place(step: usize) -> i32 {
    i32::try_from(step).unwrap_or(i32::MAX)
}

/// What is shown of an attempt that lives longer than a blink.
#[derive(Debug)]
pub struct Started {
    job: ClaimedJob,
    run: RunId,
    agent: Option<AgentId>,
    event: Event,
}

impl Started {
    /// Of an attempt at a step.
    pub fn of(job: &ClaimedJob, work: &StepWork) -> Option<Self> {
        if job.item.is_some() {
            // The step has been shown so since its lanes are there.
            return None;
        }
        let index = usize::try_from(job.step).ok()?;
        let step = work.context.playbook.step(index)?;
        let agent = work.agent(index).map(|agent| agent.agent);
        let event = Event::new(
            STEP_STARTED,
            json!({
                "step": step.id, "index": job.step, "role": step.role, "action": step.action,
                "agent_id": agent, "attempt": job.attempt,
            }),
        );
        Some(Self { job: job.clone(), run: work.context.run, agent, event })
    }
}

/// Writes that an attempt has begun, for those who watch; under its lease.
pub async fn mark_started(engine: &Engine, started: &Started, began: Instant) -> Result<(), EngineError> {
    let Started { job, run, agent, event } = started;
    steps::mark_started(&engine.pool, job, *run, *agent, began.elapsed(), event).await?;
    Ok(())
}
