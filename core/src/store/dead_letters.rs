//! Work that gave up, with the evidence.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::PgConnection;
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, CompanyId, DeadLetterId, DeliveryId, RunId, WebhookId};

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
    /// Which webhook it was for, of a delivery.
    pub webhook_id: Option<Uuid>,
    /// The same over all that failed for the same reason.
    pub fingerprint: String,
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
    /// Of one group.
    pub fingerprint: Option<&'a str>,
    /// Beyond this one: older in a list, newer for a retry of many.
    pub beyond: Option<Uuid>,
    /// Older than this.
    pub before: Option<Uuid>,
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
               l.webhook_id, l.fingerprint as "fingerprint!", l.created_at
           from companies c
           cross join lateral (
               select * from dead_letters l
               where l.company_id = c.id and ($3::text is null or l.reason = $3) and ($4::uuid is null or l.id < $4)
                   and ($6::text is null or l.fingerprint = $6)
               order by l.id desc limit $5
           ) l
           where c.account_id = $1 and ($2::uuid is null or c.id = $2)
           order by l.id desc limit $5"#,
        account.0,
        filter.company.map(|company| company.0),
        filter.reason,
        filter.beyond,
        limit,
        filter.fingerprint,
    )
    .fetch_all(tx)
    .await?)
}

/// Dead letters that failed for the same reason.
#[derive(Debug, Clone)]
pub struct GroupRow {
    /// What they have in common.
    pub fingerprint: String,
    /// What they were.
    pub kind: String,
    /// How many there are.
    pub count: i64,
    /// What went wrong with the last of them.
    pub error: Value,
    /// When the first of them gave up.
    pub first_at: DateTime<Utc>,
    /// When the last one did.
    pub last_at: DateTime<Utc>,
}

/// How many dead letters are grouped: the newest.
pub const GROUPED_MAX: i64 = 10_000;
/// How many groups are shown: the largest.
pub const GROUPS_MAX: i64 = 100;

/// The dead letters of the companies that an account sees, by why they failed: the largest group
/// first.
pub async fn groups(
    tx: &mut PgConnection,
    account: AccountId,
    company: Option<CompanyId>,
) -> Result<Vec<GroupRow>, StoreError> {
    Ok(sqlx::query_as!(
        GroupRow,
        r#"select l.fingerprint as "fingerprint!", l.kind as "kind!", count(*) as "count!",
               (array_agg(l.error order by l.id desc))[1] as "error!", min(l.created_at) as "first_at!",
               max(l.created_at) as "last_at!"
           from (
               select l.* from companies c
               cross join lateral (
                   select * from dead_letters l where l.company_id = c.id order by l.id desc limit $3
               ) l
               where c.account_id = $1 and ($2::uuid is null or c.id = $2)
               order by l.id desc limit $3
           ) l
           group by l.fingerprint, l.kind
           order by count(*) desc, l.fingerprint limit $4"#,
        account.0,
        company.map(|company| company.0),
        GROUPED_MAX,
        GROUPS_MAX,
    )
    .fetch_all(tx)
    .await?)
}

/// What is to be tried again of a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum About {
    /// A run goes on at its failed step.
    Run(RunId),
    /// An event is sent to a webhook again.
    Delivery(WebhookId, DeliveryId),
}

/// A dead letter that may be tried again.
#[derive(Debug, Clone, Copy)]
pub struct Letter {
    /// Which.
    pub id: DeadLetterId,
    /// Whose.
    pub company: CompanyId,
    /// What it is about.
    pub about: About,
}

fn letter(id: Uuid, company: Uuid, of: Uuid, webhook: Option<Uuid>) -> Letter {
    let about = match webhook {
        Some(webhook) => About::Delivery(WebhookId(webhook), DeliveryId(of)),
        None => About::Run(RunId(of)),
    };
    Letter { id: DeadLetterId(id), company: CompanyId(company), about }
}

/// A dead letter of an account that may be tried again.
pub async fn find(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    id: DeadLetterId,
) -> Result<Option<Letter>, StoreError> {
    let row = sqlx::query!(
        r#"select l.company_id, l.ref_id as "of!", l.webhook_id
           from (select * from dead_letters where id = $1 offset 0) l
           join companies c on c.id = l.company_id
           where c.account_id = $2 and ($3::uuid is null or c.id = $3) and l.kind in ('step', 'delivery')
               and l.ref_id is not null"#,
        id.0,
        account.0,
        bound.map(|company| company.0),
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| letter(id.0, row.company_id, row.of, row.webhook_id)))
}

/// Dead letters that a filter picks and that may be tried again, oldest first.
pub async fn pick(
    tx: &mut PgConnection,
    account: AccountId,
    filter: LetterFilter<'_>,
    limit: i64,
) -> Result<Vec<Letter>, StoreError> {
    let rows = sqlx::query!(
        r#"select l.id as "id!", l.company_id as "company!", l.ref_id as "of!", l.webhook_id
           from companies c
           cross join lateral (
               select * from dead_letters l
               where l.company_id = c.id and ($3::text is null or l.reason = $3)
                   and l.id > coalesce($4::uuid, '00000000-0000-0000-0000-000000000000')
                   and ($6::text is null or l.fingerprint = $6) and ($7::uuid is null or l.id < $7)
                   and l.kind in ('step', 'delivery') and l.ref_id is not null
               order by l.id limit $5
           ) l
           where c.account_id = $1 and ($2::uuid is null or c.id = $2)
           order by l.id limit $5"#,
        account.0,
        filter.company.map(|company| company.0),
        filter.reason,
        filter.beyond,
        limit,
        filter.fingerprint,
        filter.before,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().map(|row| letter(row.id, row.company, row.of, row.webhook_id)).collect())
}
