//! Many dead letters are tried again at once.

use sqlx::{Acquire, PgConnection};

use super::retry::retry_run;
use super::{Engine, EngineError};
use crate::domain::ids::{AccountId, CompanyId, DeadLetterId, RunId};
use crate::store::StoreError;
use crate::store::dead_letters::{self, LetterFilter};

/// How many dead letters one request retries: it is one transaction.
pub const LETTERS_MAX: i64 = 200;

/// What became of them.
#[derive(Debug, Default)]
pub struct RetriedMany {
    /// Their runs go on.
    pub retried: Vec<(DeadLetterId, CompanyId, RunId)>,
    /// They stay, and why.
    pub refused: Vec<(DeadLetterId, String)>,
    /// The last one looked at, when there may be more.
    pub beyond: Option<DeadLetterId>,
}

/// Retries what a filter picks, oldest first, in the caller's transaction, who
/// wakes workers after it. One that cannot be retried stays and holds up none.
pub async fn retry_many(
    engine: &Engine,
    tx: &mut PgConnection,
    account: AccountId,
    filter: LetterFilter<'_>,
    limit: i64,
    by: &str,
) -> Result<RetriedMany, EngineError> {
    let picked = dead_letters::runs_of(tx, account, filter, limit).await?;
    let mut done = RetriedMany::default();
    if i64::try_from(picked.len()).is_ok_and(|found| found == limit) {
        done.beyond = picked.last().map(|(id, ..)| *id);
    }
    for (id, company, run) in picked {
        let mut part = tx.begin().await.map_err(StoreError::from)?;
        match retry_run(engine, &mut part, company, run, by).await {
            Ok(()) => {
                part.commit().await.map_err(StoreError::from)?;
                done.retried.push((id, company, run));
            }
            Err(
                refused @ (EngineError::Conflict(_)
                | EngineError::Governance(_)
                | EngineError::NotFound(_)
                | EngineError::Invalid(_)),
            ) => {
                part.rollback().await.map_err(StoreError::from)?;
                done.refused.push((id, refused.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
