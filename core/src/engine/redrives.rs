//! Dead letters that are tried again at a rate: each second so many, until there are no more of those
//! that were there when it began.

use sqlx::Connection;
use uuid::Uuid;

use super::dead_letters::{LETTERS_MAX, retry_many};
use super::{Engine, EngineError};
use crate::domain::ids::{AccountId, CompanyId};
use crate::store::dead_letters::LetterFilter;
use crate::store::redrives::{self, RedriveRow};

/// The most dead letters of a second: what one transaction takes.
pub const RATE_MAX: i32 = LETTERS_MAX as i32;

/// A second's worth of each redrive that is under way.
pub async fn step(engine: &Engine) -> Result<(), EngineError> {
    for id in redrives::running(&engine.pool).await? {
        // One that fails holds up no other, and is tried again in a second.
        if let Err(error) = one(engine, id).await {
            tracing::warn!(%error, "a redrive waits");
        }
    }
    Ok(())
}

async fn one(engine: &Engine, id: Uuid) -> Result<(), EngineError> {
    let mut connection = engine.pool.acquire().await?;
    let mut tx = connection.begin().await?;
    let Some(row) = redrives::lock(&mut tx, id).await? else { return Ok(()) };
    if some(engine, &mut tx, &row).await? {
        redrives::end(&mut tx, id, "done").await?;
    }
    tx.commit().await?;
    engine.waker.wake();
    Ok(())
}

/// Retries some; true when there are no more.
async fn some(engine: &Engine, tx: &mut sqlx::PgConnection, row: &RedriveRow) -> Result<bool, EngineError> {
    let filter = LetterFilter {
        company: row.company_id.map(CompanyId),
        reason: row.reason.as_deref(),
        fingerprint: row.fingerprint.as_deref(),
        beyond: row.beyond,
        before: Some(row.id),
    };
    let account = AccountId(row.account_id);
    let done = retry_many(engine, tx, account, filter, i64::from(row.rate), &row.asked_by).await?;
    let last: Option<Uuid> = done.beyond.map(|id| id.0);
    let counts = (i64::try_from(done.retried.len()), i64::try_from(done.refused.len()));
    let counts = (counts.0.unwrap_or(0), counts.1.unwrap_or(0));
    let refusal = done.refused.last().map(|(_, why)| why.as_str());
    redrives::went(tx, row.id, last, counts, refusal).await?;
    Ok(last.is_none())
}
