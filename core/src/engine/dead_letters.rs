//! What gave up is tried again: one, or many at once.

use sqlx::{Acquire, PgConnection};

use super::retry::retry_run;
use super::{Engine, EngineError};
use crate::domain::ids::{AccountId, DeadLetterId};
use crate::store::StoreError;
use crate::store::dead_letters::{self, About, Letter, LetterFilter};
use crate::store::{deliveries, webhooks};

/// How many dead letters one request retries: it is one transaction.
pub const LETTERS_MAX: i64 = 200;

/// What became of them.
#[derive(Debug, Default)]
pub struct RetriedMany {
    /// They go on.
    pub retried: Vec<Letter>,
    /// They stay, and why.
    pub refused: Vec<(DeadLetterId, String)>,
    /// The last one looked at, when there may be more.
    pub beyond: Option<DeadLetterId>,
}

/// Tries a dead letter again, in the caller's transaction, who wakes workers after it: its run goes
/// on at the step that gave up, with its checkpoints and what was approved; its event is sent again.
pub async fn retry(engine: &Engine, tx: &mut PgConnection, letter: &Letter, by: &str) -> Result<(), EngineError> {
    match letter.about {
        About::Run(run) => retry_run(engine, tx, letter.company, run, by).await,
        About::Delivery(webhook, delivery) => {
            match webhooks::status_of(tx, webhook).await?.as_deref() {
                Some("active") => {}
                Some(_) => return Err(EngineError::Conflict("the webhook is disabled; enable it first".into())),
                None => return Err(EngineError::Conflict("the webhook was deleted; nothing can be sent to it".into())),
            }
            if deliveries::redeliver(tx, webhook, &[delivery.0]).await?.is_empty() {
                return Err(EngineError::Conflict("the delivery is no longer kept, or under way".into()));
            }
            Ok(())
        }
    }
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
    let picked = dead_letters::pick(tx, account, filter, limit).await?;
    let mut done = RetriedMany::default();
    if i64::try_from(picked.len()).is_ok_and(|found| found == limit) {
        done.beyond = picked.last().map(|letter| letter.id);
    }
    for letter in picked {
        let mut part = tx.begin().await.map_err(StoreError::from)?;
        match retry(engine, &mut part, &letter, by).await {
            Ok(()) => {
                part.commit().await.map_err(StoreError::from)?;
                done.retried.push(letter);
            }
            Err(
                refused @ (EngineError::Conflict(_)
                | EngineError::Governance(_)
                | EngineError::NotFound(_)
                | EngineError::Invalid(_)),
            ) => {
                part.rollback().await.map_err(StoreError::from)?;
                done.refused.push((letter.id, refused.to_string()));
            }
            Err(error) => return Err(error),
        }
    }
    Ok(done)
}
