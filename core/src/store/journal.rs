//! The calls of agents: each stands here before it is made, and what came of it before it
//! is used.

use chrono::NaiveDate;
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use super::jobs::Lease;
use crate::domain::ids::{AgentId, CompanyId, PlaybookId, RunId};
use crate::domain::money::Nanos;

/// Whose work a call belongs to. The same for all calls of an attempt.
#[derive(Debug, Clone)]
pub struct Work {
    /// The right to write.
    pub lease: Lease,
    /// Whose.
    pub company: CompanyId,
    /// Of which run.
    pub run: RunId,
    /// Which step of it.
    pub step: i32,
    /// The attempt, from 1.
    pub attempt: i32,
    /// Who works.
    pub agent: AgentId,
    /// The key of the work: the same over all tries of it.
    pub key: String,
    /// What it is booked as.
    pub category: &'static str,
}

/// A call, by its turn and its place in that; place 0 is the turn itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Place {
    /// Which turn, from 0.
    pub turn: u32,
    /// 0, or the number of the call that the turn has asked for.
    pub call: u32,
}

/// A call as it is stored.
#[derive(Debug, Clone)]
pub struct Entry {
    /// Which.
    pub place: Place,
    /// `begun`, `done` or `failed`.
    pub state: String,
    /// What came of it.
    pub response: Option<Value>,
    /// What it cost.
    pub cost: Nanos,
    /// The attempt at it was another than this.
    pub of_another: bool,
    /// The work was begun anew with it.
    pub fresh: bool,
}

/// All calls of a piece of work, in order.
pub async fn load(executor: impl Executor<'_, Database = Postgres>, work: &Work) -> Result<Vec<Entry>, StoreError> {
    let rows = sqlx::query!(
        r#"select turn, call, state, response, cost_nanos, fresh, (job_id, attempt) <> ($3, $4) as "of_another!"
         from journal where company_id = $1 and work = $2 order by turn, call"#,
        work.company.0,
        work.key,
        work.lease.job,
        work.attempt,
    )
    .fetch_all(executor)
    .await?;
    let number = |n: i32| u32::try_from(n).unwrap_or(0);
    Ok(rows
        .into_iter()
        .map(|row| Entry {
            place: Place { turn: number(row.turn), call: number(row.call) },
            state: row.state,
            response: row.response,
            cost: Nanos(row.cost_nanos),
            of_another: row.of_another,
            fresh: row.fresh,
        })
        .collect())
}

/// Notes that a call is to be made, and says which day it is; nothing when the lease is
/// gone, the call is over already, or stands otherwise than it did.
pub async fn begin(
    executor: impl Executor<'_, Database = Postgres>,
    work: &Work,
    place: Place,
    (name, key): (&str, &str),
    begun: &Begun,
) -> Result<Option<NaiveDate>, StoreError> {
    let Lease { job, epoch, session } = work.lease;
    let day = sqlx::query_scalar!(
        r#"with held as (
             select from jobs where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' for update
         )
         insert into journal as j (company_id, work, turn, call, name, state, key, run_id, step, agent_id, job_id, lease_epoch, attempt, fresh,
             reserved_nanos, kept_nanos, cost_nanos, day, month, directive_id, category, payer)
         select $4, $5, $6, $7, $8, 'begun', $9, $10, $11, $12, $1, $2, $13, $14, $15, $16, $21, $17, $18, $19, $20, $22 from held
         on conflict (company_id, work, turn, call) do update
         set name = excluded.name, state = 'begun', job_id = excluded.job_id, lease_epoch = excluded.lease_epoch,
             attempt = excluded.attempt, tries = j.tries + 1,
             reserved_nanos = excluded.reserved_nanos, kept_nanos = excluded.kept_nanos,
             cost_nanos = j.cost_nanos + excluded.cost_nanos, directive_id = excluded.directive_id, payer = excluded.payer,
             day = excluded.day, month = excluded.month, response = null, began_at = clock_timestamp(), ended_at = null
         where j.state <> 'done'
             -- Nobody has settled it since it was looked at.
             and ($23::bigint is null or (j.reserved_nanos, j.kept_nanos, j.lease_epoch) = ($23, $24, $25))
         returning (began_at at time zone 'utc')::date as "day!""#,
        job,
        epoch,
        session,
        work.company.0,
        work.key,
        i32::try_from(place.turn).unwrap_or(i32::MAX),
        i32::try_from(place.call).unwrap_or(i32::MAX),
        name,
        key,
        work.run.0,
        work.step,
        work.agent.0,
        work.attempt,
        begun.fresh,
        begun.reserved.0,
        begun.kept.0,
        begun.day,
        begun.month,
        begun.directive,
        work.category,
        begun.booked.0,
        begun.payer,
        begun.before.map(|before| before.reserved.0),
        begun.before.map(|before| before.kept.0),
        begun.before.map(|before| before.epoch),
    )
    .fetch_optional(executor)
    .await?;
    Ok(day)
}

/// How a call stood that holds money, or for which some is booked.
#[derive(Debug, Clone, Copy)]
pub struct Before {
    /// What is reserved for it.
    pub reserved: Nanos,
    /// What was booked for tries of it of which nobody heard.
    pub kept: Nanos,
    /// The epoch of the lease under which it was begun last.
    pub epoch: i64,
}

/// How a call is begun.
#[derive(Debug, Clone, Default)]
pub struct Begun {
    /// The work is begun anew with it.
    pub fresh: bool,
    /// What is reserved for it,
    pub reserved: Nanos,
    /// and booked just now for tries before of which nobody heard: less than nothing takes it back.
    pub booked: Nanos,
    /// What stays booked for such tries, and is taken back when it is answered under its key.
    pub kept: Nanos,
    /// Who is asked, where they know the call by its key.
    pub payer: Option<String>,
    /// How the call stood when that was decided.
    pub before: Option<Before>,
    /// The directive that it is counted for.
    pub directive: Option<Uuid>,
    /// In which day,
    pub day: Option<NaiveDate>,
    /// and month.
    pub month: Option<NaiveDate>,
}

/// What came of a call.
#[derive(Debug, Clone)]
pub struct End {
    /// Whether it is over for good; else it may be made again.
    pub done: bool,
    /// What it gave, or why it did not.
    pub response: Value,
    /// What it cost.
    pub cost: Nanos,
    /// What was reserved is free again; else it stays so, since nobody knows what it cost.
    pub frees: bool,
    /// Nobody knows what it cost: this is the most that it can have.
    pub unheard: bool,
}

/// What became of the end of a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It is written.
    Now,
    /// It was written before, and nobody was told.
    Before,
    /// The lease is gone.
    Lost,
}

/// Writes what came of a call. What it cost is booked by [`book`].
pub async fn end(
    executor: impl Executor<'_, Database = Postgres>,
    work: &Work,
    place: Place,
    end: &End,
) -> Result<Ended, StoreError> {
    let Lease { job, epoch, session } = work.lease;
    let row = sqlx::query!(
        r#"with held as (
             select id from jobs where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' for update
         ),
         entry as (
             update journal j
             set state = case when $8 then 'done' else 'failed' end, response = $9, cost_nanos = j.cost_nanos + $10,
                 reserved_nanos = case when $11 then 0 else j.reserved_nanos end, ended_at = clock_timestamp()
             from held
             where j.company_id = $4 and j.work = $5 and j.turn = $6 and j.call = $7
                 and j.state = 'begun' and j.lease_epoch = $2
             returning j.company_id
         )
         select exists (select from entry) as "now!", exists (
             select from journal j, held
             where j.company_id = $4 and j.work = $5 and j.turn = $6 and j.call = $7
                 and j.state <> 'begun' and j.lease_epoch = $2 and j.job_id = $1
         ) as "before!""#,
        job,
        epoch,
        session,
        work.company.0,
        work.key,
        i32::try_from(place.turn).unwrap_or(i32::MAX),
        i32::try_from(place.call).unwrap_or(i32::MAX),
        end.done,
        end.response,
        end.cost.0,
        end.frees,
    )
    .fetch_one(executor)
    .await?;
    Ok(match (row.now, row.before) {
        (true, _) => Ended::Now,
        (false, true) => Ended::Before,
        (false, false) => Ended::Lost,
    })
}

/// Money that a call has cost, or may have.
#[derive(Debug, Clone)]
pub struct Booking {
    /// Whose.
    pub company: CompanyId,
    /// In which run,
    pub run: RunId,
    /// and at which step of it.
    pub step: i32,
    /// Who has spent it.
    pub agent: Option<AgentId>,
    /// As what.
    pub category: String,
    /// How much; less than nothing takes back what was booked before.
    pub cost: Nanos,
    /// The model that was paid.
    pub model: Option<String>,
    /// Nobody has heard what it was: the most that it can be.
    pub unheard: bool,
    /// Whose attempt at the step it is: job, lease's epoch, attempt.
    pub by: (i64, i64, i32),
}

/// Books money: on the ledger, the run and its step. A run that is over counts it too.
pub async fn book(executor: impl Executor<'_, Database = Postgres>, booking: &Booking) -> Result<(), StoreError> {
    let (job, epoch, attempt) = booking.by;
    sqlx::query!(
        "with spent as (
             insert into ledger (company_id, category, nanos, agent_id, run_id, step, model, unheard)
             values ($1, $2, $3, $4, $5, $6, $7, $8)
             returning company_id, at, category, nanos, agent_id
         ),
         delta as (
             insert into cost_deltas (company_id, at, agent_id, category, nanos)
             select company_id, at, coalesce(agent_id, '00000000-0000-0000-0000-000000000000'), category, nanos from spent
         ),
         run as (
             update runs r set cost_nanos = r.cost_nanos + $3 where r.company_id = $1 and r.id = $5
             returning r.playbook_id, r.status, r.status in ('completed', 'failed', 'cancelled') as is_over
         ),
         total as (
             insert into run_deltas (company_id, playbook_id, started, ended, cost_nanos, duration_ms)
             select $1, playbook_id, 0, 0, $3, 0 from run where is_over
         )
         insert into run_steps as s (
             company_id, run_id, step, status, agent_id, attempt, job_id, lease_epoch, cost_nanos, started_at, ended_at
         )
         select $1, $5, $6, case when not is_over then 'running' when status = 'cancelled' then 'cancelled' else 'failed' end,
             $4, $11, $9, $10, $3, clock_timestamp(), case when is_over then clock_timestamp() end
         from run
         on conflict (company_id, run_id, step) do update set cost_nanos = s.cost_nanos + $3",
        booking.company.0,
        booking.category,
        booking.cost.0,
        booking.agent.map(|agent| agent.0),
        booking.run.0,
        booking.step,
        booking.model,
        booking.unheard,
        job,
        epoch,
        attempt,
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// A call that holds money, and that nobody makes any more.
#[derive(Debug, Clone)]
pub struct Unheard {
    /// Whose.
    pub company: CompanyId,
    /// The key of the work that it belongs to,
    pub work: String,
    /// and its place in that.
    pub place: Place,
    /// The model, or the tool.
    pub name: String,
    /// Of which run,
    pub run: RunId,
    /// which step,
    pub step: i32,
    /// and which playbook.
    pub playbook: PlaybookId,
    /// Who has made it.
    pub agent: AgentId,
    /// The directive that it is counted for.
    pub directive: Option<Uuid>,
    /// What it is booked as.
    pub category: String,
    /// What it holds.
    pub reserved: Nanos,
    /// In which day,
    pub day: NaiveDate,
    /// and month.
    pub month: NaiveDate,
    /// Whose attempt it was: job, lease's epoch, attempt.
    pub by: (i64, i64, i32),
}

/// So many calls are looked at together.
pub const UNHEARD_MAX: i64 = 100;

/// Calls that hold money for longer than so many seconds, and whose attempt is over.
pub async fn unheard(pool: &PgPool, after_seconds: i64) -> Result<Vec<Unheard>, StoreError> {
    let rows = sqlx::query!(
        r#"select j.company_id, j.work, j.turn, j.call, j.name, j.run_id, j.step, r.playbook_id, j.agent_id as "agent_id!",
               j.directive_id, j.category, j.reserved_nanos, j.day as "day!", j.month as "month!", j.job_id, j.lease_epoch, j.attempt
           from (select * from journal where reserved_nanos > 0 offset 0) j
           cross join lateral (
               select r.playbook_id from runs r where r.company_id = j.company_id and r.id = j.run_id offset 0
           ) r
           where j.agent_id is not null and j.day is not null and j.month is not null
               and j.began_at < clock_timestamp() - $1::bigint * interval '1 second'
               and not exists (
                   select from jobs b where b.id = j.job_id and b.state = 'running' and b.lease_epoch = j.lease_epoch
               )
           order by j.company_id, j.began_at
           limit $2"#,
        after_seconds,
        UNHEARD_MAX,
    )
    .fetch_all(pool)
    .await?;
    let number = |n: i32| u32::try_from(n).unwrap_or(0);
    Ok(rows
        .into_iter()
        .map(|row| Unheard {
            company: CompanyId(row.company_id),
            work: row.work,
            place: Place { turn: number(row.turn), call: number(row.call) },
            name: row.name,
            run: RunId(row.run_id),
            step: row.step,
            playbook: PlaybookId(row.playbook_id),
            agent: AgentId(row.agent_id),
            directive: row.directive_id,
            category: row.category,
            reserved: Nanos(row.reserved_nanos),
            day: row.day,
            month: row.month,
            by: (row.job_id, row.lease_epoch, row.attempt),
        })
        .collect())
}

/// Turns what a call holds into what it has cost; false when it was begun anew meanwhile, or is
/// over.
pub async fn keep(tx: &mut PgConnection, call: &Unheard) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update journal
         set kept_nanos = kept_nanos + reserved_nanos, cost_nanos = cost_nanos + reserved_nanos, reserved_nanos = 0
         where company_id = $1 and work = $2 and turn = $3 and call = $4 and reserved_nanos = $5 and lease_epoch = $6",
        call.company.0,
        call.work,
        i32::try_from(call.place.turn).unwrap_or(i32::MAX),
        i32::try_from(call.place.call).unwrap_or(i32::MAX),
        call.reserved.0,
        call.by.1,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}
