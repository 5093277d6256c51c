//! What is done for all from time to time: whose turn it is, and what is old enough to go.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::millis;
use crate::domain::retention::Kept;

/// A part of the upkeep that is claimed: nobody else does it until it is due again.
#[derive(Debug, Clone)]
pub struct Claimed {
    /// Which.
    pub part: String,
    /// The claim's number.
    pub epoch: i64,
    /// Where it goes on.
    pub place: Option<Uuid>,
}

/// Claims a part that is due, of those that are named with how often they are: it is due again after
/// that, whatever becomes of the claim.
pub async fn claim(pool: &PgPool, parts: &[(&str, Duration)]) -> Result<Option<Claimed>, StoreError> {
    Ok(sqlx::query_as!(
        Claimed,
        r#"with due as (
               select u.part, p.every_ms
               from unnest($1::text[], $2::bigint[]) as p (part, every_ms)
               cross join lateral (
                   select u.part, u.due_at from upkeep u where u.part = p.part and u.due_at <= clock_timestamp()
                   for update skip locked
               ) u
               order by u.due_at limit 1
           )
           update upkeep u
           set epoch = u.epoch + 1, due_at = clock_timestamp() + due.every_ms * interval '1 millisecond'
           from due where u.part = due.part
           returning u.part, u.epoch, u.place"#,
        &parts.iter().map(|(part, _)| (*part).to_owned()).collect::<Vec<_>>(),
        &parts.iter().map(|(_, every)| millis(*every)).collect::<Vec<_>>(),
    )
    .fetch_optional(pool)
    .await?)
}

/// Makes the rows of parts that have none.
pub async fn know(pool: &PgPool, parts: &[(&str, Duration)]) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into upkeep (part) select p from unnest($1::text[]) p
         where not exists (select from upkeep u where u.part = p) on conflict do nothing",
        &parts.iter().map(|(part, _)| (*part).to_owned()).collect::<Vec<_>>(),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// What came of a claimed part, unless somebody else has it by now; `soon` where there is more to do.
pub async fn done(
    pool: &PgPool,
    claimed: &Claimed,
    place: Option<Uuid>,
    soon: bool,
    error: Option<&str>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update upkeep
         set place = $3, due_at = case when $4 then clock_timestamp() else due_at end,
             done_at = case when $5::text is null then clock_timestamp() else done_at end,
             failures = case when $5::text is null then 0 else failures + 1 end, error = $5
         where part = $1 and epoch = $2",
        claimed.part,
        claimed.epoch,
        place,
        soon,
        error,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// What the operator keeps for how many days, where that is not the default.
pub async fn retention(tx: &mut PgConnection) -> Result<Vec<(String, i32)>, StoreError> {
    let rows = sqlx::query!("select what, days from retention order by what").fetch_all(tx).await?;
    Ok(rows.into_iter().map(|row| (row.what, row.days)).collect())
}

/// Keeps something for so many days from now on.
pub async fn set_retention(tx: &mut PgConnection, what: Kept, days: i32, by: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into retention (what, days, set_by) values ($1, $2, $3)
         on conflict (what) do update set days = excluded.days, set_by = excluded.set_by, set_at = now()",
        what.as_str(),
        days,
        by,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// How many runs one statement looks at.
pub const RUNS_MAX: i64 = 500;

/// What a look at old runs came to.
#[derive(Debug, Clone, Copy)]
pub struct OldRuns {
    /// The last one looked at; nothing when there are no more.
    pub place: Option<Uuid>,
    /// How many went.
    pub gone: i64,
}

/// Looks at runs that began behind a place and before a time, oldest first, and lets those go that
/// ended long enough ago, with all that is theirs. One that is not over stays, however old; so does
/// the ledger, and what tasks, messages and memories say of them.
pub async fn forget_runs(
    pool: &PgPool,
    after: Option<Uuid>,
    keep: Duration,
    keep_failed: Duration,
) -> Result<OldRuns, StoreError> {
    let row = sqlx::query_file!("src/store/sql/forget_runs.sql", after, millis(keep), millis(keep_failed), RUNS_MAX)
        .fetch_one(pool)
        .await?;
    Ok(OldRuns { place: row.place, gone: row.gone })
}

/// How many events one statement forgets.
pub const EVENTS_MAX: i64 = 5_000;

/// Forgets events of one company that belong to no run and happened long ago; says how many. The
/// marks say which transactions those are.
pub async fn forget_events(pool: &PgPool, company: Uuid, keep: Duration) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "delete from events x using (
             select e.company_id, e.xid, e.id from events e
             where e.company_id = $1 and e.run_id is null
                 -- Of which a webhook may still be told.
                 and not exists (
                     select from companies c
                     join webhooks w on w.account_id = c.account_id
                     join deliveries d on d.webhook_id = w.id and d.id = delivery_id(e.id, w.id)
                     where c.id = e.company_id and d.status <> 'succeeded'
                 )
                 and e.xid < (
                     select oldest from event_marks
                     where at <= now() - $2::bigint * interval '1 millisecond' order by at desc limit 1
                 )
             order by e.xid, e.id limit $3
         ) e
         where x.company_id = e.company_id and x.xid = e.xid and x.id = e.id",
        company,
        millis(keep),
        EVENTS_MAX,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// The next company behind another, by its id.
pub async fn next_company(pool: &PgPool, after: Option<Uuid>) -> Result<Option<Uuid>, StoreError> {
    Ok(sqlx::query_scalar!("select id from companies where $1::uuid is null or id > $1 order by id limit 1", after,)
        .fetch_optional(pool)
        .await?)
}

/// How many rows of others one statement forgets.
pub const PRUNE_MAX: i64 = 5_000;

/// Forgets marks of times that nothing is kept of any more, and counts of queues older than a month.
pub async fn forget_marks(pool: &PgPool, keep: Duration) -> Result<u64, StoreError> {
    let marks = sqlx::query!(
        "delete from event_marks where at = any (array(
             select at from event_marks where at < now() - $1::bigint * interval '1 millisecond' order by at limit $2))",
        millis(keep),
        PRUNE_MAX,
    )
    .execute(pool)
    .await?;
    let counts =
        sqlx::query!("delete from queue_counts where minute < now() - interval '31 days'",).execute(pool).await?;
    Ok(marks.rows_affected().max(counts.rows_affected()))
}
