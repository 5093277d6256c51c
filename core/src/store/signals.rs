//! Named events that clients send, and the runs that wait for them.
//!
//! Whoever sends an event and whoever begins to wait for one of its name take
//! the same lock first ([`lock`]), before any job's: so one of them sees the
//! other, and no event is lost in between (hazard H12).

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::millis;
use crate::domain::ids::{CompanyId, RunId, SignalId};

/// Takes the lock of an event's name until the transaction ends.
pub async fn lock(tx: &mut PgConnection, company: CompanyId, name: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "select pg_advisory_xact_lock(hashtextextended('event ' || $1::text || ' ' || $2::text, 0))",
        company.to_string(),
        name,
    )
    .fetch_one(tx)
    .await?;
    Ok(())
}

/// An event that was sent.
#[derive(Debug)]
pub struct NewSignal<'a> {
    /// Its id.
    pub signal: SignalId,
    /// Of which company.
    pub company: CompanyId,
    /// To this run alone.
    pub run: Option<RunId>,
    /// Its name.
    pub name: &'a str,
    /// What it says.
    pub data: &'a Value,
    /// The sender's own id.
    pub client_id: Option<&'a str>,
}

/// A stored event.
#[derive(Debug, Clone)]
pub struct SignalRow {
    /// Which.
    pub id: Uuid,
    /// To this run alone.
    pub run_id: Option<Uuid>,
    /// Its name.
    pub name: String,
    /// The sender's own id.
    pub client_id: Option<String>,
    /// When it came.
    pub received_at: DateTime<Utc>,
}

/// Stores an event; `None` when the sender's id is known already.
pub async fn insert(tx: &mut PgConnection, new: &NewSignal<'_>) -> Result<Option<SignalRow>, StoreError> {
    Ok(sqlx::query_as!(
        SignalRow,
        "insert into signals (company_id, id, run_id, name, data, client_id)
         values ($1, $2, $3, $4, $5, $6)
         on conflict (company_id, client_id) where client_id is not null do nothing
         returning id, run_id, name, client_id, received_at",
        new.company.0,
        new.signal.0,
        new.run.map(|run| run.0),
        new.name,
        new.data,
        new.client_id,
    )
    .fetch_optional(tx)
    .await?)
}

/// The event that a sender has given an id.
pub async fn by_client_id(
    tx: &mut PgConnection,
    company: CompanyId,
    client_id: &str,
) -> Result<Option<SignalRow>, StoreError> {
    Ok(sqlx::query_as!(
        SignalRow,
        "select id, run_id, name, client_id, received_at from signals where company_id = $1 and client_id = $2",
        company.0,
        client_id,
    )
    .fetch_optional(tx)
    .await?)
}

/// A run that begins to wait.
#[derive(Debug, Clone)]
pub struct NewWait {
    /// Whose.
    pub company: CompanyId,
    /// Which run.
    pub run: RunId,
    /// At which step.
    pub step: i32,
    /// The job that ends the wait.
    pub job: i64,
    /// The event's name.
    pub name: String,
    /// What its data must hold.
    pub matching: Value,
}

/// Begins a wait under the name's lock, in the transaction that has moved the
/// run there. An event that has come since the run began, and that the run has
/// not taken before, ends it at once; says whether one did.
pub async fn park(tx: &mut PgConnection, wait: &NewWait) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"with signal as (
               select s.id, s.data
               from (select started_at from runs where company_id = $1 and id = $2) r
               cross join lateral (
                   select * from signals s
                   where s.company_id = $1 and s.name = $5 and s.received_at >= r.started_at
                       and (s.run_id is null or s.run_id = $2)
                       -- Nothing asked for is found in anything, not in maps alone.
                       and ($6::jsonb = '{}' or s.data @> $6)
                       and not exists (select from signals_taken t where t.run_id = $2 and t.signal_id = s.id)
                   order by s.received_at, s.id limit 1
               ) s
           ),
           wait as (
               insert into waits (company_id, run_id, step, job_id, name, match, signal_id, data)
               values ($1, $2, $3, $4, $5, $6, (select id from signal), (select data from signal))
               on conflict (run_id, step) do update
               set job_id = excluded.job_id, name = excluded.name, match = excluded.match,
                   signal_id = excluded.signal_id, data = excluded.data
               returning signal_id
           ),
           taken as (
               insert into signals_taken (company_id, run_id, signal_id) select $1, $2, id from signal
           ),
           job as (
               update jobs set state = 'ready', due_at = now() where id = $4 and exists (select from signal)
           )
           select signal_id is not null as "come!" from wait"#,
        wait.company.0,
        wait.run.0,
        wait.step,
        wait.job,
        wait.name,
        wait.matching,
    )
    .fetch_one(tx)
    .await?)
}

/// Runs that one delivery wakes.
pub const DELIVERED_MAX: i64 = 500;

/// What became of a delivery.
#[derive(Debug, Clone, Copy)]
pub struct Delivered {
    /// Runs that go on.
    pub woken: i64,
    /// There may be more whose jobs come after this one.
    pub more: Option<i64>,
}

/// Hands an event to some of the runs that wait for it, each under its job's
/// lock: to those whose jobs come after one.
pub async fn deliver(pool: &PgPool, company: CompanyId, signal: SignalId, after: i64) -> Result<Delivered, StoreError> {
    let mut tx = pool.begin().await?;
    // An attempt that finds the time over at this moment has lost its lease.
    let delivered = sqlx::query!(
        r#"with signal as (
               select id, run_id, name, data, received_at from signals where company_id = $1 and id = $2
           ),
           open as (
               select w.run_id, w.step, w.job_id
               from signal s
               cross join lateral (
                   select * from waits w
                   where w.company_id = $1 and w.name = s.name and w.signal_id is null
                       and w.job_id > $4 and (s.run_id is null or s.run_id = w.run_id)
                       and (w.match = '{}' or s.data @> w.match) offset 0
               ) w
               -- The job may come late: a run that began since knows nothing of it.
               cross join lateral (
                   select from runs r
                   where r.company_id = w.company_id and r.id = w.run_id and r.started_at <= s.received_at offset 0
               ) r
               where not exists (select from signals_taken t where t.signal_id = s.id and t.run_id = w.run_id)
               order by w.job_id
               limit $3
           ),
           held as (
               select open.*
               from open
               cross join lateral (
                   select from jobs j
                   where j.id = open.job_id and j.ref_id = open.run_id and j.step = open.step
                   for update
               ) j
           ),
           -- What waits now may be another wait than was seen: it has looked itself.
           wait as (
               update waits w set signal_id = d.id, data = d.data
               from (select held.*, s.id, s.data, s.name from held cross join signal s) d
               -- Asked by its data, so that no index of open waits is walked for it.
               where w.run_id = any (array[d.run_id]) and w.step = any (array[d.step]) and w.data is null
                   and w.job_id = d.job_id and w.name = d.name
               returning w.run_id, w.job_id
           ),
           job as (
               update jobs j
               set state = 'ready', due_at = now(), lease_epoch = j.lease_epoch + 1, attempt = 0, crash_count = 0,
                   session_id = null, deadline_at = null
               from wait
               where j.id = any (array[wait.job_id])
           ),
           stale as (
               -- What waits with no job waits no more.
               delete from waits w using open
               where w.run_id = any (array[open.run_id]) and w.step = any (array[open.step])
                   and not exists (select from jobs j where j.id = open.job_id offset 0)
           ),
           taken as (
               insert into signals_taken (company_id, run_id, signal_id) select $1, wait.run_id, $2 from wait
           )
           select count(*) as "open!", coalesce(max(job_id), 0) as "last!", (select count(*) from wait) as "woken!"
           from open"#,
        company.0,
        signal.0,
        DELIVERED_MAX,
        after,
    )
    .fetch_one(&mut *tx)
    .await?;
    tx.commit().await?;
    let more = delivered.open == DELIVERED_MAX;
    Ok(Delivered { woken: delivered.woken, more: more.then_some(delivered.last) })
}

/// How a wait stands.
#[derive(Debug)]
pub struct WaitRow {
    /// Of which run.
    pub run: Uuid,
    /// At which step.
    pub step: i32,
    /// What has come.
    pub data: Option<Value>,
}

/// The waits of some runs.
pub async fn of_runs(pool: &PgPool, runs: &[Uuid]) -> Result<Vec<WaitRow>, StoreError> {
    Ok(sqlx::query_as!(
        WaitRow,
        r#"select w.run_id as run, w.step, w.data
           from unnest($1::uuid[]) as k (run_id)
           cross join lateral (select * from waits w where w.run_id = k.run_id offset 0) w"#,
        runs,
    )
    .fetch_all(pool)
    .await?)
}

/// A run waits no more, at one step or at all.
pub async fn forget(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    step: Option<i32>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "delete from waits where run_id = $1 and company_id is not distinct from $2 and ($3::integer is null or step = $3)",
        run.0,
        company.0,
        step,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// How long an event is kept for runs that come to wait for it.
pub const KEEP: std::time::Duration = std::time::Duration::from_secs(7 * 24 * 3600);

/// Events that one statement forgets.
pub const PRUNE_MAX: i64 = 1_000;

/// Forgets events that came long ago, some at a time; says how many.
pub async fn prune(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "with old as (
             select s.company_id, s.id from signals s
             where s.received_at < now() - $1::bigint * interval '1 millisecond'
                 -- What came while its company was paused has not been handed to anybody yet.
                 and not exists (
                     select from companies c
                     where c.id = s.company_id and (c.status = 'paused' or c.updated_at > now() - interval '1 hour')
                 )
             limit $2
         ),
         taken as (
             delete from signals_taken t using old where t.signal_id = old.id
         )
         delete from signals s using old where s.company_id = old.company_id and s.id = old.id",
        millis(KEEP),
        PRUNE_MAX,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}
