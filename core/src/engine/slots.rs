//! Runs of a playbook that are not to be under way at once. Whoever starts one decides
//! under the lock of their group; what ends one leaves a job (a trigger of the
//! database sees to it), and that lets the next begin.

use serde_json::json;
use sqlx::PgConnection;

use super::cancel::cancel_run;
use super::{Engine, EngineError, repeating, start};
use crate::domain::event::{Event, PLAYBOOK_STARTED};
use crate::domain::ids::{CompanyId, RunId};
use crate::domain::playbook::model::{Concurrency, OnConflict};
use crate::failpoint;
use crate::store::StoreError;
use crate::store::slots::{self, Group};

/// How many runs of a group may wait.
pub const QUEUED_MAX: u64 = 1_000;
/// So many begin in one transaction.
const ADMIT_MAX: i64 = 100;

/// What becomes of a start.
#[derive(Debug)]
pub enum Entry {
    /// There is a slot.
    Begins,
    /// It waits for one.
    Waits,
    /// It is this run.
    Is(RunId),
}

/// Decides about a start in its transaction, under the lock of its group.
pub async fn enter(
    engine: &Engine,
    tx: &mut PgConnection,
    group: Group<'_>,
    rule: &Concurrency,
) -> Result<Entry, EngineError> {
    slots::lock(tx, group).await?;
    let (mut running, queued) = slots::count(tx, group).await?;
    let limit = u64::from(rule.limit);
    if running < limit && queued == 0 {
        return Ok(Entry::Begins);
    }
    match rule.on_conflict {
        OnConflict::Queue if queued >= QUEUED_MAX => {
            return Err(EngineError::Conflict(format!("{queued} runs wait for the others of `{}` already", group.key)));
        }
        OnConflict::Queue => {}
        OnConflict::Reject => {
            let one = if running == 1 { "a run is" } else { "runs are" };
            let message = format!("{one} under way with the concurrency key `{}`, of which {limit} may be", group.key);
            return Err(EngineError::Conflict(message));
        }
        OnConflict::Coalesce => {
            if let Some(run) = slots::newest(tx, group).await? {
                return Ok(Entry::Is(run));
            }
        }
        OnConflict::ReplacePending => {
            for (run, _) in slots::open(tx, group, true, ADMIT_MAX).await? {
                cancel(engine, tx, group.company, run).await?;
            }
        }
        OnConflict::CancelRunning => {
            let over = (running + 1).saturating_sub(limit);
            let over = i64::try_from(over).unwrap_or(i64::MAX);
            for (run, _) in slots::open(tx, group, false, over).await? {
                cancel(engine, tx, group.company, run).await?;
            }
            // One that is closed before it ends is still under way.
            running = slots::count(tx, group).await?.0;
        }
    }
    Ok(if running < limit && slots::count(tx, group).await?.1 == 0 { Entry::Begins } else { Entry::Waits })
}

async fn cancel(engine: &Engine, tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<(), EngineError> {
    match Box::pin(cancel_run(engine, tx, company, run, "concurrency")).await {
        // It has ended by itself.
        Ok(()) | Err(EngineError::Conflict(_) | EngineError::NotFound(_)) => Ok(()),
        Err(error) => Err(error),
    }
}

/// Lets those begin that a run's group has slots for.
pub async fn admit(engine: &Engine, company: CompanyId, run: RunId) -> Result<(), EngineError> {
    while repeating(|| admit_once(engine, company, run)).await? {
        engine.waker.wake();
    }
    Ok(())
}

/// Whether there may be more to begin.
async fn admit_once(engine: &Engine, company: CompanyId, run: RunId) -> Result<bool, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some((playbook, key)) = slots::group_of(&mut tx, company, run).await? else { return Ok(false) };
    let group = Group { company, playbook, key: &key };
    slots::lock(&mut tx, group).await?;
    let (mut running, _) = slots::count(&mut tx, group).await?;
    let waiting = slots::open(&mut tx, group, true, ADMIT_MAX).await?;
    let mut admitted = 0_i64;
    for (next, version) in &waiting {
        let plan = start::plan_of(engine, &mut *tx, company, *version).await?;
        // Each by the version that it is pinned to; one that says nothing any more
        // waits for nobody.
        if plan.concurrency.as_ref().is_some_and(|rule| running >= u64::from(rule.limit)) {
            break;
        }
        let told = json!({"playbook_id": playbook, "playbook": plan.name, "after": "concurrency"});
        if slots::admit(&mut tx, company, *next, &Event::new(PLAYBOOK_STARTED, told)).await? {
            running += 1;
        }
        admitted += 1;
    }
    if failpoint::reach("admit.before_commit").await {
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    tx.commit().await?;
    failpoint::reach("admit.after_commit").await;
    Ok(admitted == ADMIT_MAX)
}
