//! Dead letters that are tried again, so many a second.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, CompanyId, RedriveId};

/// A redrive.
#[derive(Debug, Clone)]
pub struct RedriveRow {
    /// Which.
    pub id: Uuid,
    /// Whose.
    pub account_id: Uuid,
    /// Of one company's dead letters alone.
    pub company_id: Option<Uuid>,
    /// Of those that gave up for this.
    pub reason: Option<String>,
    /// Of one group.
    pub fingerprint: Option<String>,
    /// So many a second.
    pub rate: i32,
    /// By which key.
    pub asked_by: String,
    /// `running`, `done` or `cancelled`.
    pub status: String,
    /// The last letter that was looked at.
    pub beyond: Option<Uuid>,
    /// How many go on.
    pub retried: i64,
    /// How many stay.
    pub refused: i64,
    /// Why the last of those stays.
    pub last_refusal: Option<String>,
    /// When it began.
    pub created_at: DateTime<Utc>,
    /// When it was over.
    pub ended_at: Option<DateTime<Utc>>,
}

/// A redrive to be.
#[derive(Debug, Clone, Copy)]
pub struct NewRedrive<'a> {
    /// Its id: dead letters that are newer are not its.
    pub id: RedriveId,
    /// Whose.
    pub account: AccountId,
    /// Of one company's dead letters alone.
    pub company: Option<CompanyId>,
    /// Of those that gave up for this.
    pub reason: Option<&'a str>,
    /// Of one group.
    pub fingerprint: Option<&'a str>,
    /// So many a second.
    pub rate: i32,
    /// By which key.
    pub by: &'a str,
}

/// How many redrives of an account may be under way.
pub const RUNNING_MAX: i64 = 5;

/// Begins a redrive; `None` when as many are under way as may be.
pub async fn insert(tx: &mut PgConnection, new: &NewRedrive<'_>) -> Result<Option<RedriveRow>, StoreError> {
    Ok(sqlx::query_as!(
        RedriveRow,
        "insert into redrives (id, account_id, company_id, reason, fingerprint, rate, asked_by)
         select $1, $2, $3, $4, $5, $6, $7
         where (select count(*) from redrives where account_id = $2 and status = 'running') < $8
         returning *",
        new.id.0,
        new.account.0,
        new.company.map(|company| company.0),
        new.reason,
        new.fingerprint,
        new.rate,
        new.by,
        RUNNING_MAX,
    )
    .fetch_optional(tx)
    .await?)
}

/// One redrive of an account.
pub async fn get(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    id: RedriveId,
) -> Result<Option<RedriveRow>, StoreError> {
    Ok(sqlx::query_as!(
        RedriveRow,
        "select * from redrives where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)",
        id.0,
        account.0,
        bound.map(|company| company.0),
    )
    .fetch_optional(tx)
    .await?)
}

/// Ends a redrive that is under way; false when it is not.
pub async fn end(tx: &mut PgConnection, id: Uuid, status: &str) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update redrives set status = $2, ended_at = now() where id = $1 and status = 'running'",
        id,
        status,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Those that are under way.
pub async fn running(pool: &PgPool) -> Result<Vec<Uuid>, StoreError> {
    Ok(sqlx::query_scalar!("select id from redrives where status = 'running' order by id limit 100")
        .fetch_all(pool)
        .await?)
}

/// Locks one that is under way, unless somebody else is at it.
pub async fn lock(tx: &mut PgConnection, id: Uuid) -> Result<Option<RedriveRow>, StoreError> {
    Ok(sqlx::query_as!(
        RedriveRow,
        "select * from redrives where id = $1 and status = 'running' for update skip locked",
        id,
    )
    .fetch_optional(tx)
    .await?)
}

/// Notes how far one has got.
pub async fn went(
    tx: &mut PgConnection,
    id: Uuid,
    beyond: Option<Uuid>,
    (retried, refused): (i64, i64),
    last_refusal: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update redrives
         set beyond = coalesce($2, beyond), retried = retried + $3, refused = refused + $4,
             last_refusal = coalesce($5, last_refusal)
         where id = $1",
        id,
        beyond,
        retried,
        refused,
        last_refusal,
    )
    .execute(tx)
    .await?;
    Ok(())
}
