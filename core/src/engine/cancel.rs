//! Cancelling a run. Truthfully: a run that has ended stays as it ended.

use serde_json::json;
use sqlx::PgConnection;

use super::{Engine, EngineError};
use crate::domain::event::{APPROVAL_RESOLVED, Event, PLAYBOOK_CANCELLED};
use crate::domain::ids::{CompanyId, RunId};
use crate::domain::run::RunStatus;
use crate::store::{approvals, events, runs, signals};

/// Cancels a run; one that is cancelled already stays so.
///
/// The run's job goes with it, and with the job the lease of an attempt that
/// may be under way: its result matches nothing any more.
pub async fn cancel_run(tx: &mut PgConnection, company: CompanyId, run: RunId, by: &str) -> Result<(), EngineError> {
    let status = runs::lock_with_job(tx, company, run).await?.ok_or(EngineError::NotFound("run"))?;
    if status == RunStatus::Cancelled {
        return Ok(());
    }
    if status.is_terminal() {
        return Err(EngineError::Conflict(format!("the run has {} already", status.as_str())));
    }
    for gate in approvals::cancel_of(tx, company, run, by).await? {
        let resolved = Event::new(APPROVAL_RESOLVED, json!({"approval_id": gate, "decision": "cancelled", "by": by}));
        events::append_to_run(&mut *tx, company, run, &resolved).await?;
    }
    signals::forget(tx, company, run, None).await?;
    let cancelled = Event::new(PLAYBOOK_CANCELLED, json!({"by": by}));
    events::append_to_run(&mut *tx, company, run, &cancelled).await?;
    runs::end_by_hand(tx, company, run, RunStatus::Cancelled).await?;
    Ok(())
}

/// Ends a run whose company was stopped for good.
pub async fn end_stopped(engine: &Engine, company: CompanyId, run: RunId) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    match cancel_run(&mut tx, company, run, "system").await {
        Ok(()) => Ok(tx.commit().await?),
        // It has ended by itself.
        Err(EngineError::Conflict(_) | EngineError::NotFound(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
