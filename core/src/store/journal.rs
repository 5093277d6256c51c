//! The calls of agents: each stands here before it is made, and what came of it before it
//! is used.

use chrono::NaiveDate;
use serde_json::Value;
use sqlx::{Executor, Postgres};

use super::StoreError;
use super::jobs::Lease;
use crate::domain::ids::{AgentId, CompanyId, RunId};
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
/// gone, or the call is over already.
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
             reserved_nanos, kept_nanos, day, month)
         select $4, $5, $6, $7, $8, 'begun', $9, $10, $11, $12, $1, $2, $13, $14, $15, $16, $17, $18 from held
         on conflict (company_id, work, turn, call) do update
         set name = excluded.name, state = 'begun', job_id = excluded.job_id, lease_epoch = excluded.lease_epoch,
             attempt = excluded.attempt, tries = j.tries + 1,
             reserved_nanos = excluded.reserved_nanos, kept_nanos = j.kept_nanos + excluded.kept_nanos,
             day = excluded.day, month = excluded.month, response = null, began_at = clock_timestamp(), ended_at = null
         where j.state <> 'done'
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
    )
    .fetch_optional(executor)
    .await?;
    Ok(day)
}

/// How a call is begun.
#[derive(Debug, Clone, Default)]
pub struct Begun {
    /// The work is begun anew with it.
    pub fresh: bool,
    /// What is reserved for it,
    pub reserved: Nanos,
    /// and for one before of which nobody heard.
    pub kept: Nanos,
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
    /// The model that was paid.
    pub model: Option<String>,
    /// What was reserved is free again; else it stays so, since nobody knows what it cost.
    pub frees: bool,
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

/// Writes what came of a call, and books what it cost: on the ledger, the run and its step.
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
                 reserved_nanos = case when $14 then 0 else j.reserved_nanos end, ended_at = clock_timestamp()
             from held
             where j.company_id = $4 and j.work = $5 and j.turn = $6 and j.call = $7
                 and j.state = 'begun' and j.lease_epoch = $2
             returning j.company_id, j.run_id, j.step, j.agent_id
         ),
         spent as (
             insert into ledger (company_id, category, nanos, agent_id, run_id, step, model)
             select company_id, $11, $10, agent_id, run_id, step, $12 from entry where $10 > 0
             returning company_id, at, category, nanos, agent_id
         ),
         delta as (
             insert into cost_deltas (company_id, at, agent_id, category, nanos)
             select company_id, at, coalesce(agent_id, '00000000-0000-0000-0000-000000000000'), category, nanos from spent
         ),
         run as (
             update runs r set cost_nanos = r.cost_nanos + $10
             from entry
             where r.id = entry.run_id and r.company_id = entry.company_id and $10 > 0
                 and r.status not in ('completed', 'failed', 'cancelled')
             returning r.id
         ),
         step as (
             insert into run_steps as s (
                 company_id, run_id, step, status, agent_id, attempt, job_id, lease_epoch, cost_nanos, started_at
             )
             select company_id, run_id, step, 'running', agent_id, $13, $1, $2, $10, clock_timestamp()
             from entry where $10 > 0 and (select count(*) from run) > 0
             on conflict (company_id, run_id, step) do update set cost_nanos = s.cost_nanos + $10
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
        work.category,
        end.model,
        work.attempt,
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
