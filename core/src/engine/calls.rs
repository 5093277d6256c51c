//! Steps that are done by runs of other playbooks: their start, in the transaction
//! that lets the step's own job wait. What ends such a run wakes that job, whoever it
//! is: a trigger of the database sees to it. Locks go from the called to the caller,
//! so that whoever cancels a run cancels what it has called first.

use serde_json::json;
use sqlx::PgConnection;

use super::claim::StepWork;
use super::retry::retry_run;
use super::start::{self, Decided};
use super::{Engine, EngineError, repeating};
use crate::domain::event::{Event, STEP_STARTED};
use crate::domain::ids::RunId;
use crate::domain::outcome::Failure;
use crate::domain::plan::DEPTH_MAX;
use crate::domain::playbook::Step;
use crate::failpoint;
use crate::store::StoreError;
use crate::store::children::{self, Call};
use crate::store::jobs::ClaimedJob;
use crate::store::slots::{self, Group};

/// What became of a call.
#[derive(Debug)]
pub enum Called {
    /// The job waits, or is no longer ours.
    Waits,
    /// Nothing was begun: the step fails.
    Refused(Failure),
}

/// Lets a run of another playbook do a step, or one that has failed at it go on.
pub async fn call(
    engine: &Engine,
    job: &ClaimedJob,
    work: &StepWork,
    (step, playbook): (&Step, &str),
) -> Result<Called, EngineError> {
    let called = repeating(|| call_once(engine, job, work, (step, playbook))).await;
    let refused = |failure: Failure| Ok(Called::Refused(failure));
    match called {
        Ok(called) => {
            engine.waker.wake();
            Ok(called)
        }
        Err(EngineError::Conflict(why) | EngineError::Governance(why)) => {
            refused(Failure::invalid(format!("`{playbook}` cannot be run: {why}")))
        }
        Err(EngineError::NotFound(_)) => refused(Failure::invalid(format!("there is no playbook `{playbook}`"))),
        Err(EngineError::Invalid(fields)) => {
            let fields: Vec<String> =
                fields.iter().map(|field| format!("{}: {}", field.field, field.message)).collect();
            refused(Failure::invalid(format!("`{playbook}` cannot be run: {}", fields.join("; "))))
        }
        Err(error) => Err(error),
    }
}

async fn call_once(
    engine: &Engine,
    job: &ClaimedJob,
    work: &StepWork,
    (step, playbook): (&Step, &str),
) -> Result<Called, EngineError> {
    let params = match work.context.params(step) {
        Ok(params) => params,
        Err(failure) => return Ok(Called::Refused(failure)),
    };
    let (company, run) = (job.company, work.context.run);
    let mut tx = engine.pool.begin().await?;
    if !children::park(&mut tx, job.lease).await? {
        return Ok(Called::Waits);
    }
    let depth = children::depth(&mut tx, company, run).await?.unwrap_or(0) + 1;
    if depth > DEPTH_MAX {
        let message = format!("runs call each other more than {DEPTH_MAX} deep");
        return Ok(Called::Refused(Failure::invalid(message)));
    }
    let call = Call {
        run,
        step: job.step,
        item: job.item.unwrap_or(-1),
        round: i32::try_from(work.context.round()).unwrap_or(i32::MAX),
    };
    let child = match go_on(engine, &mut tx, job, call).await? {
        Some(child) => child,
        None => {
            let id = children::playbook(&mut tx, company, playbook).await?.ok_or(EngineError::NotFound("playbook"))?;
            match start::decide(engine, &mut tx, None, (company, id), params, "playbook", None).await? {
                Decided::New(new) => {
                    let group = new.waits_for().map(|key| Group { company, playbook: id, key });
                    if let Some(group) = group
                        && slots::holds(&mut tx, run, group).await?
                    {
                        return Ok(Called::Refused(Failure::invalid(format!(
                            "a run of `{playbook}` would wait for one that waits for it; see its `concurrency`"
                        ))));
                    }
                    start::start_in(&mut tx, *new).await?.run
                }
                Decided::Known(known) => known.run,
            }
        }
    };
    if !children::link(&mut tx, company, call, (job.lease.job, job.attempt), child, depth).await? {
        children::unpark(&mut tx, job.lease.job).await?;
    }
    if job.item.is_none() {
        let told = json!({
            "step": step.id, "index": job.step, "action": step.action, "attempt": job.attempt, "child_run_id": child,
        });
        let started = Event::new(STEP_STARTED, told);
        children::mark(&mut tx, (company, run, job.step, job.attempt), job.lease.job, &started).await?;
    }
    // A lane outlives its run: one that was cancelled calls nobody any more.
    if job.item.is_some() && !children::goes_on(&mut tx, company, run).await? {
        return Ok(Called::Refused(Failure::invalid("the run has ended")));
    }
    if failpoint::reach("call.before_commit").await {
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    tx.commit().await?;
    failpoint::reach("call.after_commit").await;
    Ok(Called::Waits)
}

/// A run that has failed at the step before goes on at its failed step, where it can.
async fn go_on(
    engine: &Engine,
    tx: &mut PgConnection,
    job: &ClaimedJob,
    call: Call,
) -> Result<Option<RunId>, EngineError> {
    let Some(child) = children::failed(tx, job.company, call).await? else { return Ok(None) };
    match retry_run(engine, tx, job.company, child, "playbook").await {
        Ok(()) => Ok(Some(child)),
        // It has been undone, say.
        Err(EngineError::Conflict(_)) => Ok(None),
        Err(error) => Err(error),
    }
}
