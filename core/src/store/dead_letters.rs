//! Work that gave up, with the evidence.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, CompanyId, DeadLetterId, RunId};

/// A job that gave up.
#[derive(Debug, Clone)]
pub struct LetterRow {
    /// Which.
    pub id: Uuid,
    /// Whose.
    pub company_id: Uuid,
    /// Where it came from.
    pub queue: String,
    /// What it was.
    pub kind: String,
    /// What it was about.
    pub ref_id: Option<Uuid>,
    /// Which step of that.
    pub step: i32,
    /// `exhausted`, `invalid` or `quarantined`.
    pub reason: String,
    /// Tries charged.
    pub attempt: i32,
    /// Deaths of workers.
    pub crash_count: i32,
    /// What went wrong last.
    pub error: Value,
    /// When it gave up.
    pub created_at: DateTime<Utc>,
}

/// What picks dead letters.
#[derive(Debug, Clone, Copy, Default)]
pub struct LetterFilter<'a> {
    /// Of one company.
    pub company: Option<CompanyId>,
    /// By why they gave up.
    pub reason: Option<&'a str>,
    /// Beyond this one: older in a list, newer for a retry of many.
    pub beyond: Option<Uuid>,
}

/// A page of the dead letters of the companies that an account sees, newest
/// first.
pub async fn letters(
    tx: &mut PgConnection,
    account: AccountId,
    filter: LetterFilter<'_>,
    limit: i64,
) -> Result<Vec<LetterRow>, StoreError> {
    Ok(sqlx::query_as!(
        LetterRow,
        r#"select l.id, l.company_id, l.queue, l.kind, l.ref_id, l.step, l.reason, l.attempt, l.crash_count, l.error,
               l.created_at
           from companies c
           cross join lateral (
               select * from dead_letters l
               where l.company_id = c.id and ($3::text is null or l.reason = $3) and ($4::uuid is null or l.id < $4)
               order by l.id desc limit $5
           ) l
           where c.account_id = $1 and ($2::uuid is null or c.id = $2)
           order by l.id desc limit $5"#,
        account.0,
        filter.company.map(|company| company.0),
        filter.reason,
        filter.beyond,
        limit,
    )
    .fetch_all(tx)
    .await?)
}

/// The run that a dead letter of an account is about.
pub async fn run_of_letter(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    letter: DeadLetterId,
) -> Result<Option<(CompanyId, RunId)>, StoreError> {
    let row = sqlx::query!(
        r#"select l.company_id, l.ref_id as "run!"
           from (select * from dead_letters where id = $1 offset 0) l
           join companies c on c.id = l.company_id
           where c.account_id = $2 and ($3::uuid is null or c.id = $3) and l.kind = 'step' and l.ref_id is not null"#,
        letter.0,
        account.0,
        bound.map(|company| company.0),
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| (CompanyId(row.company_id), RunId(row.run))))
}

/// The runs of dead letters that a filter picks, oldest first.
pub async fn runs_of(
    tx: &mut PgConnection,
    account: AccountId,
    filter: LetterFilter<'_>,
    limit: i64,
) -> Result<Vec<(DeadLetterId, CompanyId, RunId)>, StoreError> {
    let rows = sqlx::query!(
        r#"select l.id as "id!", l.company_id as "company!", l.ref_id as "run!"
           from companies c
           cross join lateral (
               select * from dead_letters l
               where l.company_id = c.id and ($3::text is null or l.reason = $3) and ($4::uuid is null or l.id > $4)
                   and l.kind = 'step' and l.ref_id is not null
               order by l.id limit $5
           ) l
           where c.account_id = $1 and ($2::uuid is null or c.id = $2)
           order by l.id limit $5"#,
        account.0,
        filter.company.map(|company| company.0),
        filter.reason,
        filter.beyond,
        limit,
    )
    .fetch_all(tx)
    .await?;
    let of = |row: (Uuid, Uuid, Uuid)| (DeadLetterId(row.0), CompanyId(row.1), RunId(row.2));
    Ok(rows.into_iter().map(|row| of((row.id, row.company, row.run))).collect())
}
