//! Cancelling a run. Truthfully: a run that has ended stays as it ended.

use serde_json::json;
use sqlx::PgConnection;

use super::{Engine, EngineError};
use crate::domain::event::{APPROVAL_RESOLVED, Event, PLAYBOOK_CANCELLED, PLAYBOOK_CLOSING};
use crate::domain::ids::{CompanyId, RunId};
use crate::domain::plan::Ending;
use crate::domain::playbook::model::STEP_TIMEOUT;
use crate::domain::run::RunStatus;
use crate::store::{approvals, children, events, nodes, runs, signals};

/// Cancels a run, in the caller's transaction, who wakes workers after it; one that
/// is cancelled already stays so.
///
/// The run's job goes with it, and with the job the lease of an attempt that
/// may be under way: its result matches nothing any more. A run that has something
/// to undo, or to do in any case, does that first; one that is being closed since
/// somebody has cancelled it ends at once.
pub async fn cancel_run(
    engine: &Engine,
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    by: &str,
) -> Result<(), EngineError> {
    cancel(tx, company, run, by, Some(engine)).await
}

async fn cancel(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    by: &str,
    closes: Option<&Engine>,
) -> Result<(), EngineError> {
    cancel_called(tx, company, run, by, closes).await?;
    nodes::lock_all(tx, company, run).await?;
    let status = runs::lock_with_job(tx, company, run).await?.ok_or(EngineError::NotFound("run"))?;
    if status == RunStatus::Cancelled {
        return Ok(());
    }
    // What it has called since the first look.
    cancel_called(tx, company, run, by, closes).await?;
    if status.is_terminal() {
        return Err(EngineError::Conflict(format!("the run has {} already", status.as_str())));
    }
    for gate in approvals::cancel_of(tx, company, run, by).await? {
        let resolved = Event::new(APPROVAL_RESOLVED, json!({"approval_id": gate, "decision": "cancelled", "by": by}));
        events::append_to_run(&mut *tx, company, run, &resolved).await?;
    }
    signals::forget(tx, company, run, None).await?;
    nodes::drop_all(tx, company, run).await?;
    if let Some(engine) = closes
        && close(engine, tx, company, run, by).await?
    {
        return Ok(());
    }
    let cancelled = Event::new(PLAYBOOK_CANCELLED, json!({"by": by}));
    events::append_to_run(&mut *tx, company, run, &cancelled).await?;
    runs::end_by_hand(tx, company, run, RunStatus::Cancelled).await?;
    Ok(())
}

/// Cancels what a run has called, where a person cancels it: what is stopped with its
/// company ends by itself.
async fn cancel_called(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    by: &str,
    closes: Option<&Engine>,
) -> Result<(), EngineError> {
    if closes.is_none() {
        return Ok(());
    }
    for child in children::open_of(tx, company, run).await? {
        match Box::pin(cancel(tx, company, child, by, closes)).await {
            // It has ended by itself.
            Ok(()) | Err(EngineError::Conflict(_) | EngineError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

/// Lets a run that is locked do what closes it, before it is cancelled; false where
/// there is nothing of that, or that is what is cancelled.
async fn close(
    engine: &Engine,
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    by: &str,
) -> Result<bool, EngineError> {
    let Some(row) = runs::get(&mut *tx, company, run).await? else { return Ok(false) };
    let plans = engine.plans.get(&mut *tx, &[(company.0, row.version.0)]).await?;
    let ending = Ending { by: Some(by.to_owned()), ..Ending::of(RunStatus::Cancelled) };
    if !plans.get(&row.version.0).is_some_and(|plan| plan.closes(ending.status)) {
        return Ok(false);
    }
    if !runs::close_by_hand(tx, company, run, &json!(ending), STEP_TIMEOUT).await? {
        return Ok(false);
    }
    let closing = json!({"status": ending.status.as_str(), "by": by});
    events::append_to_run(&mut *tx, company, run, &Event::new(PLAYBOOK_CLOSING, closing)).await?;
    Ok(true)
}

/// Ends a run whose company was stopped for good: nothing of it begins any more.
pub async fn end_stopped(engine: &Engine, company: CompanyId, run: RunId) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    match cancel(&mut tx, company, run, "system", None).await {
        Ok(()) => Ok(tx.commit().await?),
        // It has ended by itself.
        Err(EngineError::Conflict(_) | EngineError::NotFound(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
