//! One attempt: the handler under its deadline, its panic and its
//! cancellation, all turned into an outcome.

use std::panic::AssertUnwindSafe;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering::Relaxed};
use std::time::{Duration, Instant};

use capx_core::domain::ids::{AgentId, RunId, SignalId, WebhookId};
use capx_core::domain::money::Nanos;
use capx_core::domain::outcome::{ErrorClass, Failure, Outcome};
use capx_core::domain::plan::{CRASHES_MAX, FAN_LOOK, Gate, SUSPECT_CRASHES};
use capx_core::domain::playbook::Step;
use capx_core::domain::playbook::model::StepKind;
use capx_core::engine::advance::{self, Finished};
use capx_core::engine::beats::Beat;
use capx_core::engine::calls::Called;
use capx_core::engine::claim::{Claimed, StepWork, Work};
use capx_core::engine::deliveries::{self, Sending, Sent};
use capx_core::engine::{agents, beats, calls, cancel, gates, signals, slots, tenants, triggers};
use capx_core::failpoint;
use capx_core::store;
use capx_core::store::jobs::{self, ClaimedJob};
use futures_util::FutureExt;

use super::committer::{Attempted, PlainOutcome};
use super::load::{Held, Slot};
use super::{Assignment, Shared, kills, panics};
use crate::artifacts::Artifacts;
use crate::delivery;
use crate::journal::Journals;

/// An attempt that lives longer than this is shown as started; a shorter one
/// is over before anybody could look, and its `step.completed` carries how
/// long it took.
const BLINK: Duration = Duration::from_millis(200);
/// A kind that this version does not know is left to others for this long.
const UNKNOWN_DELAY: Duration = Duration::from_secs(30);
/// A system job that failed is tried again after this long.
const SYSTEM_DELAY: Duration = Duration::from_secs(2);

/// Runs an assignment to its outcome.
pub(super) async fn run(shared: &Arc<Shared>, assignment: Assignment) -> Attempted {
    let Assignment { claimed: Claimed { job, work }, mut held } = assignment;
    let work = match work {
        Work::Delivery(sending) => return deliver(shared, job, sending, held).await,
        work => work,
    };
    let mut slot = match shared.load.slot(is_suspect(&job, &work)).await {
        Ok(slot) => slot,
        Err(delay) => {
            held.leave();
            return give_back(job, work, held, delay);
        }
    };
    if let Some(observer) = &shared.observer {
        let _ = observer.send((job.lease.job, Instant::now()));
    }
    let plain = match work {
        Work::Step(work) => {
            let (began, mut made) = (Instant::now(), Made::default());
            // Boxed: what a tool or an adapter keeps is kilobytes, and apalis
            // moves the attempt's future about several times.
            let outcome = match calls(&work, &job) {
                Some((step, playbook)) => call(shared, &job, &work, (step, playbook)).await,
                None => Some(Box::pin(step(shared, &job, &work, began, &mut slot, &mut made)).await),
            };
            drop(slot);
            held.finish();
            let outcome = match outcome.filter(|_| !made.waits) {
                Some(Outcome::Asks(gate)) if job.item.is_some() => ask(shared, &job, &work, &gate).await,
                other => other,
            };
            let Some(outcome) = outcome else { return Attempted::Plain(job, PlainOutcome::Nothing, held) };
            let finished = Finished { job, work, outcome, booked: made.booked, took: began.elapsed() };
            return Attempted::Step(finished, held);
        }
        // A delivery is gone already, to be sent.
        Work::Noop | Work::Stale | Work::Delivery(_) => PlainOutcome::Done,
        Work::Unknown => {
            tracing::warn!(job.id = job.lease.job, job.kind = job.kind, "a kind of a newer version is left to others");
            PlainOutcome::Again { delay: UNKNOWN_DELAY, charged: false }
        }
        Work::Idle => PlainOutcome::Again { delay: FAN_LOOK, charged: false },
        Work::Wait(delay) => PlainOutcome::Again { delay, charged: false },
        Work::Disabled(webhook) => shared.watchdog.answer("a hold", Box::pin(hold(shared, &job, webhook))).await,
        Work::Killed => PlainOutcome::Again { delay: jobs::KILLED, charged: false },
        Work::Halted { stopped: false } => PlainOutcome::Again { delay: jobs::PARKED, charged: false },
        Work::Halted { stopped: true } => {
            shared.watchdog.answer("the end of a run", Box::pin(end_stopped(shared, &job))).await
        }
        Work::Queued => shared.watchdog.answer("an admission", Box::pin(admit(shared, &job, FAN_LOOK))).await,
        Work::Slot => shared.watchdog.answer("an admission", Box::pin(admit(shared, &job, Duration::ZERO))).await,
        Work::Heartbeat(Beat::Idle(idle)) => PlainOutcome::Idle(idle),
        Work::Heartbeat(Beat::Over) => PlainOutcome::Done,
        Work::Heartbeat(Beat::Later(delay)) => PlainOutcome::Again { delay, charged: false },
        Work::Heartbeat(Beat::Works) => shared.watchdog.answer("a beat", Box::pin(heartbeat(shared, &job))).await,
        Work::Resume => shared.watchdog.answer("a resumption", Box::pin(resume(shared, &job))).await,
        Work::Schedule => shared.watchdog.answer("a fire", Box::pin(fire(shared, &job))).await,
        Work::Signal => shared.watchdog.answer("an event", Box::pin(signal(shared, &job))).await,
        Work::Purge => shared.watchdog.answer("a purge", Box::pin(purge(shared, &job))).await,
        Work::GateTimeout => shared.watchdog.answer("a gate's end", Box::pin(gate_timeout(shared, &job))).await,
        Work::Provision => shared.watchdog.answer("a provisioning", Box::pin(provision(shared, &job))).await,
    };
    drop(slot);
    held.finish();
    Attempted::Plain(job, plain, held)
}

/// Sends an event to a webhook.
async fn deliver(shared: &Shared, job: ClaimedJob, sending: Box<Sending>, mut held: Held) -> Attempted {
    let given_back = |job, held, delay| Attempted::Plain(job, PlainOutcome::Again { delay, charged: false }, held);
    let wire = match shared.load.wire() {
        Ok(wire) => wire,
        Err(delay) => {
            held.leave();
            return given_back(job, held, delay);
        }
    };
    held.on_wire();
    let sent = tokio::select! {
        sent = delivery::send(&shared.hands.egress, &sending) => Some(sent),
        // Others may send it too from now on: the webhook knows it by its id.
        () = shared.lost.cancelled() => None,
    };
    failpoint::reach("delivery.sent").await;
    drop(wire);
    held.finish();
    let Some(delivery::Outcome { answer, said, error, took }) = sent else {
        return given_back(job, held, Duration::ZERO);
    };
    Attempted::Delivery(Sent { job, sending, answer, took, said, error }, held)
}

async fn hold(shared: &Shared, job: &ClaimedJob, webhook: WebhookId) -> PlainOutcome {
    let look = deliveries::DISABLED_LOOK.mul_f64(rand::random_range(0.75..1.25));
    match store::deliveries::hold(&shared.engine.pool, job.lease, webhook, look).await {
        Ok(true) => PlainOutcome::Nothing,
        // It was enabled at this moment.
        Ok(false) => PlainOutcome::Again { delay: Duration::ZERO, charged: false },
        Err(error) => {
            tracing::warn!(%error, webhook.id = %webhook, "a delivery waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

/// The playbook whose run is to do a step, where there is none yet.
fn calls<'a>(work: &'a StepWork, job: &ClaimedJob) -> Option<(&'a Step, &'a str)> {
    let step = work.context.playbook.step(usize::try_from(job.step).ok()?)?;
    let StepKind::Playbook(playbook) = &step.kind else { return None };
    // A step that is done for a list is called for by its items, and one whose gate
    // stayed shut by nobody. What is wrong with a condition is told by the handler.
    let asks = (step.fan.is_none() || work.context.item.as_ref().is_some_and(|item| !item.list.is_empty()))
        && work.context.child.is_none()
        && work.context.refused.is_none()
        && work.context.holds(step).is_ok()
        && job.crash_count < CRASHES_MAX;
    asks.then_some((step, playbook))
}

/// Lets another run do a step; what the attempt ends with, where that cannot be.
async fn call(shared: &Shared, job: &ClaimedJob, work: &StepWork, of: (&Step, &str)) -> Option<Outcome> {
    if shared.lost.is_cancelled() {
        return Some(Outcome::Released { delay: SYSTEM_DELAY });
    }
    match shared.watchdog.answer("a call", Box::pin(calls::call(&shared.engine, job, work, of))).await {
        // Its transaction has moved the job on.
        Ok(Called::Waits) => None,
        Ok(Called::Refused(failure)) => Some(Outcome::failed(failure)),
        Err(error) => {
            tracing::warn!(%error, run.id = %work.run(), "a call waits");
            Some(Outcome::Released { delay: SYSTEM_DELAY })
        }
    }
}

/// A person is asked about a call of an item; what the attempt ends with, where that cannot be.
async fn ask(shared: &Shared, job: &ClaimedJob, work: &StepWork, gate: &Gate) -> Option<Outcome> {
    let asked = gates::ask_in_list(&shared.engine, work, job.lease, gate);
    match shared.watchdog.answer("a question", Box::pin(asked)).await {
        // Its transaction has moved the job on, or somebody else has.
        Ok(_) => None,
        Err(error) => {
            tracing::warn!(%error, run.id = %work.run(), "a question waits");
            Some(Outcome::Released { delay: SYSTEM_DELAY })
        }
    }
}

/// Whether one more death would put the job into quarantine.
fn is_suspect(job: &ClaimedJob, work: &Work) -> bool {
    matches!(work, Work::Step(_)) && job.crash_count == SUSPECT_CRASHES
}

/// No slot came free in time: somebody else may have one.
fn give_back(job: ClaimedJob, work: Work, held: Held, delay: Duration) -> Attempted {
    match work {
        Work::Step(work) => {
            let outcome = Outcome::Released { delay };
            Attempted::Step(Finished { job, work, outcome, booked: Nanos::ZERO, took: Duration::ZERO }, held)
        }
        _ => Attempted::Plain(job, PlainOutcome::Again { delay, charged: false }, held),
    }
}

/// What an attempt has done to the database by itself.
#[derive(Debug, Default)]
struct Made {
    /// So much of what it has spent is booked.
    booked: Nanos,
    /// The job waits for its agent, and is no longer ours.
    waits: bool,
}

async fn step(
    shared: &Arc<Shared>,
    job: &ClaimedJob,
    work: &StepWork,
    began: Instant,
    slot: &mut Slot,
    made: &mut Made,
) -> Outcome {
    if shared.lost.is_cancelled() {
        // Others may have it already: nothing begins any more.
        return Outcome::Released { delay: Duration::ZERO };
    }
    tokio::select! {
        () = shared.kills.seen(job, work) => {}
        () = shared.lost.cancelled() => return Outcome::Released { delay: Duration::ZERO },
    }
    if shared.kills.forbid(job, work) {
        return Outcome::Released { delay: kills::LOOK };
    }
    if job.crash_count >= CRASHES_MAX {
        return Outcome::failed(Failure::new(
            ErrorClass::Crash,
            format!("its worker died {} times in a row while it ran; it is put into quarantine", job.crash_count),
        ));
    }
    if job.crash_count == SUSPECT_CRASHES {
        let charged = jobs::charge_suspect(&shared.engine.pool, job.lease);
        if !shared.watchdog.answer("a charge", charged).await.unwrap_or(false) {
            return Outcome::Released { delay: SYSTEM_DELAY };
        }
    }
    failpoint::reach("attempt.before_handler").await;
    let secrets = work.secrets.as_ref().and_then(|opened| opened.as_ref().ok().cloned());
    let artifacts = Artifacts {
        pool: &shared.engine.pool,
        watchdog: &shared.watchdog,
        lease: job.lease,
        company: job.company,
        run: work.context.run,
    };
    let journals = Journals {
        engine: &shared.engine,
        watchdog: &shared.watchdog,
        job,
        run: work.context.run,
        booked: AtomicI64::new(0),
        held: AtomicBool::new(false),
    };
    let handler = panics::given(secrets.clone(), shared.hands.step(job, work, &artifacts, &journals));
    let handler = AssertUnwindSafe(handler).catch_unwind();
    // The company's limit holds whatever the playbook allows.
    let policed = work.context.policy.task_max.filter(|max| *max < job.timeout);
    let time = policed.unwrap_or(job.timeout);
    let handler = tokio::time::timeout(time, handler);
    tokio::pin!(handler);
    // A handler that is done at once needs no timers.
    let mut ended = (&mut handler).now_or_never();
    if ended.is_none() {
        let kill = shared.kills.watch(job, work);
        ended = tokio::select! {
            ended = &mut handler => Some(ended),
            () = kill.killed() => None,
            () = shared.lost.cancelled() => None,
            () = watch(shared, job, work, began) => None,
            () = slot.share() => None,
        };
    }
    failpoint::reach("attempt.after_handler").await;
    let outcome = match ended {
        Some(Ok(Ok(outcome))) => outcome,
        Some(Ok(Err(panic))) => {
            let said = panics::said(panic.as_ref());
            Outcome::failed(Failure::transient(format!("the handler panicked: {said}")))
        }
        Some(Err(_)) => Outcome::failed(match policed {
            Some(max) => Failure::new(
                ErrorClass::Governance,
                format!("execution_policy.max_task_duration ended it after {max:?}"),
            ),
            None => Failure::new(ErrorClass::Timeout, format!("the attempt took longer than {time:?}")),
        }),
        None => Outcome::Released { delay: Duration::ZERO },
    };
    // Money that was spent is, even if nothing came of it.
    *made = Made { booked: journals.booked(), waits: journals.held.load(Relaxed) };
    let outcome = outcome.having_cost(made.booked);
    // Whatever comes of it holds no secret that it was given.
    let outcome = match secrets {
        Some(secrets) => secrets.redact(outcome),
        None => outcome,
    };
    artifacts.keep(outcome).await
}

/// Shows a long attempt as started, then waits for ever. The write is a task
/// of its own: the attempt may end while it is under way.
async fn watch(shared: &Arc<Shared>, job: &ClaimedJob, work: &StepWork, began: Instant) {
    tokio::time::sleep(BLINK).await;
    if let Some(started) = advance::Started::of(job, work) {
        let engine = shared.engine.clone();
        let watchdog = shared.watchdog.clone();
        tokio::spawn(async move {
            let marked = advance::mark_started(&engine, &started, began);
            if let Err(error) = watchdog.answer("a mark", marked).await {
                tracing::debug!(%error, "an attempt could not be shown as started");
            }
        });
    }
    std::future::pending().await
}

async fn gate_timeout(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    let Some(run) = job.ref_id else { return PlainOutcome::Done };
    match gates::expire(&shared.engine, job.lease, job.company, RunId(run), job.step).await {
        // The list is over, and nobody is asked any more.
        Ok(false) if job.item.is_some() => PlainOutcome::Done,
        // Its transaction has moved the job on, or a person's has.
        Ok(_) => PlainOutcome::Nothing,
        Err(error) => {
            tracing::warn!(%error, job.id = job.lease.job, "a gate's end waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

async fn provision(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    match tenants::provision(&shared.engine, job.company, |agent| shared.hands.cannot_work(agent)).await {
        Ok(()) => PlainOutcome::Done,
        Err(error) => {
            tracing::warn!(%error, company.id = %job.company, "a provisioning waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

async fn end_stopped(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    let Some(run) = job.ref_id else { return PlainOutcome::Done };
    match cancel::end_stopped(&shared.engine, job.company, RunId(run)).await {
        // The run's job went with it; a lane is another.
        Ok(()) if job.item.is_some() => PlainOutcome::Done,
        Ok(()) => PlainOutcome::Nothing,
        Err(error) => {
            tracing::warn!(%error, run.id = %RunId(run), "the end of a stopped company's run waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

/// Lets those begin that there are slots for. A run that waits looks again after a
/// while, should it have been forgotten.
async fn admit(shared: &Shared, job: &ClaimedJob, again: Duration) -> PlainOutcome {
    let Some(run) = job.ref_id else { return PlainOutcome::Done };
    match slots::admit(&shared.engine, job.company, RunId(run)).await {
        Ok(()) if again.is_zero() => PlainOutcome::Done,
        // If it begins, its job is somebody else's.
        Ok(()) => PlainOutcome::Again { delay: again, charged: false },
        Err(error) => {
            tracing::warn!(%error, run.id = %RunId(run), "an admission waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

async fn heartbeat(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    let Some(agent) = job.ref_id else { return PlainOutcome::Done };
    match beats::work(&shared.engine, job, AgentId(agent)).await {
        // Its transaction has settled the job.
        Ok(()) => PlainOutcome::Nothing,
        Err(error) => {
            tracing::warn!(%error, agent.id = %AgentId(agent), "a beat waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

async fn resume(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    let Some(agent) = job.ref_id else { return PlainOutcome::Done };
    match agents::period_over(&shared.engine, job.company, AgentId(agent)).await {
        Ok(None) => PlainOutcome::Done,
        // It was paused anew for another period, or its company's time zone has changed.
        Ok(Some(delay)) => PlainOutcome::Again { delay, charged: false },
        Err(error) => {
            tracing::warn!(%error, agent.id = %AgentId(agent), "a resumption waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

async fn fire(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    match triggers::fire(&shared.engine, job).await {
        // Its transaction has settled the job.
        Ok(()) => PlainOutcome::Nothing,
        Err(error) => {
            tracing::warn!(%error, job.id = job.lease.job, "a fire waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

async fn signal(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    let Some(signal) = job.ref_id else { return PlainOutcome::Done };
    match signals::deliver(&shared.engine, job.company, SignalId(signal)).await {
        Ok(true) => PlainOutcome::Done,
        // The company is paused.
        Ok(false) => PlainOutcome::Again { delay: jobs::PARKED, charged: false },
        Err(error) => {
            tracing::warn!(%error, signal.id = %SignalId(signal), "an event waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}

async fn purge(shared: &Shared, job: &ClaimedJob) -> PlainOutcome {
    match store::purge::some(&shared.engine.pool, job.company).await {
        Ok(true) => PlainOutcome::Again { delay: Duration::ZERO, charged: false },
        Ok(false) => PlainOutcome::Done,
        Err(error) => {
            tracing::warn!(%error, company.id = %job.company, "a purge waits");
            PlainOutcome::Again { delay: SYSTEM_DELAY, charged: false }
        }
    }
}
