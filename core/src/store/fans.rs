//! Steps that are done for each item of a list: their fans, lanes and items.

use std::time::Duration;

use chrono::{DateTime, Utc};

use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use super::jobs::{DEADLINE_GRACE, Lease, kind, millis, queue};
use crate::domain::ids::{AgentId, CompanyId, RunId};
use crate::domain::money::Nanos;
use crate::domain::outcome::Fanning;
use crate::domain::plan::{FAILURES_TOLD, RUN_BYTES_MAX};

/// A fan to be opened, by the job that waits for it.
#[derive(Debug, Clone)]
pub struct NewFan {
    /// Whose.
    pub company: CompanyId,
    /// Of which run.
    pub run: RunId,
    /// For which step.
    pub step: i32,
    /// How often the run had jumped.
    pub round: i32,
    /// The run's job.
    pub job: i64,
    /// The items.
    pub fanning: Fanning,
    /// How long one attempt at an item may take.
    pub timeout: Duration,
    /// What the run keeps already, in bytes.
    pub bytes: i64,
}

/// Opens a fan and its lanes, in the transaction that lets the run's job wait. Of
/// an earlier round nothing stays.
pub async fn open(tx: &mut PgConnection, fan: &NewFan) -> Result<(), StoreError> {
    let size = fan.fanning.len();
    let lanes = size.min(fan.fanning.parallel as usize);
    sqlx::query!(
        "delete from run_items where company_id = $1 and run_id = $2 and step = $3 and round <> $4",
        fan.company.0,
        fan.run.0,
        fan.step,
        fan.round,
    )
    .execute(&mut *tx)
    .await?;
    let place = |n: usize| i32::try_from(n).unwrap_or(i32::MAX);
    sqlx::query!(
        "insert into run_fans (company_id, run_id, step, round, job_id, items, todo, begun, size, failures_max, lanes,
             bytes)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $8, $11)
         on conflict (company_id, run_id, step) do update
         set round = excluded.round, job_id = excluded.job_id, items = excluded.items, todo = excluded.todo,
             begun = excluded.begun, size = excluded.size, completed = 0, failed = 0,
             failures_max = excluded.failures_max, lanes = excluded.lanes, bytes = excluded.bytes",
        fan.company.0,
        fan.run.0,
        fan.step,
        fan.round,
        fan.job,
        place(fan.fanning.items as usize),
        fan.fanning.todo.as_deref(),
        place(lanes),
        place(size),
        place(fan.fanning.failures_max as usize),
        fan.bytes,
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "with lane as (
             insert into jobs (queue, kind, company_id, ref_id, step, item, state, timeout_ms)
             select $1, $2, $3, $4, $5, coalesce(($6::integer[])[n], n - 1), 'ready', $7
             from generate_series(1, $8::integer) n
             returning id
         )
         update run_fans
         set first_lane = coalesce((select min(id) from lane), 0),
             last_lane = coalesce((select max(id) from lane), 0)
         where company_id = $3 and run_id = $4 and step = $5",
        queue::STEPS,
        kind::ITEM,
        fan.company.0,
        fan.run.0,
        fan.step,
        fan.fanning.todo.as_deref(),
        millis(fan.timeout),
        place(lanes),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The fan of a step is forgotten, what its items have done is not: a retry opens
/// another for the rest. Lanes of this one go when they are next looked at.
pub async fn forget(tx: &mut PgConnection, company: CompanyId, run: RunId, step: i32) -> Result<(), StoreError> {
    sqlx::query!("delete from run_fans where company_id = $1 and run_id = $2 and step = $3", company.0, run.0, step,)
        .execute(tx)
        .await?;
    Ok(())
}

/// How the items of a step stand.
#[derive(Debug)]
pub struct FanRow {
    /// Which run.
    pub run: Uuid,
    /// Which step.
    pub step: i32,
    /// Of which round.
    pub round: i32,
    /// How many items.
    pub items: i32,
    /// Lanes at work.
    pub lanes: i32,
    /// Lanes that have a job; fewer only if one was lost.
    pub live: i64,
}

/// The fans of some steps.
pub async fn load(pool: &PgPool, steps: &[(CompanyId, RunId, i32)]) -> Result<Vec<FanRow>, StoreError> {
    Ok(sqlx::query_as!(
        FanRow,
        r#"select f.run_id as run, f.step, f.round, f.items, f.lanes,
             (select count(*) from jobs j
              where j.id between f.first_lane and f.last_lane and j.ref_id = f.run_id and j.step = f.step
                  and j.item is not null) as "live!"
           from unnest($1::uuid[], $2::uuid[], $3::integer[]) as k (company_id, run_id, step)
           cross join lateral (
               select * from run_fans f
               where f.company_id = k.company_id and f.run_id = k.run_id and f.step = k.step offset 0
           ) f"#,
        &steps.iter().map(|(company, ..)| company.0).collect::<Vec<_>>(),
        &steps.iter().map(|(_, run, _)| run.0).collect::<Vec<_>>(),
        &steps.iter().map(|(.., step)| *step).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?)
}

/// What became of an item.
#[derive(Debug)]
pub struct ItemRow {
    /// Which run.
    pub run: Uuid,
    /// Which step.
    pub step: i32,
    /// Its place in the list.
    pub item: i32,
    /// Of which round.
    pub round: i32,
    /// It is done.
    pub done: bool,
    /// Its output.
    pub output: Option<Value>,
    /// The output's size in bytes.
    pub bytes: i64,
    /// Why it failed, of the first that did.
    pub error: Option<Value>,
}

/// What became of the items of some steps, in order; without their outputs from
/// where those of a step are over `bytes` together, and with the errors of the first
/// that failed, so that what is loaded is small whatever the list.
pub async fn load_items(
    pool: &PgPool,
    steps: &[(CompanyId, RunId, i32)],
    bytes: usize,
) -> Result<Vec<ItemRow>, StoreError> {
    Ok(sqlx::query_as!(
        ItemRow,
        r#"select i.run_id as run, i.step, i.item, i.round, i.status = 'completed' as "done!",
             case when i.total <= $4 then i.output end as output,
             coalesce(i.bytes, octet_length(i.output::text), 0)::bigint as "bytes!",
             case when i.failures <= $5 then i.error end as error
           from unnest($1::uuid[], $2::uuid[], $3::integer[]) as k (company_id, run_id, step)
           cross join lateral (
               select i.*, count(i.error) over (order by i.item) as failures,
                   sum(coalesce(i.bytes, octet_length(i.output::text), 0)) over (order by i.item) as total
               from run_items i
               where i.company_id = k.company_id and i.run_id = k.run_id and i.step = k.step
               order by i.item offset 0
           ) i"#,
        &steps.iter().map(|(company, ..)| company.0).collect::<Vec<_>>(),
        &steps.iter().map(|(_, run, _)| run.0).collect::<Vec<_>>(),
        &steps.iter().map(|(.., step)| *step).collect::<Vec<_>>(),
        i64::try_from(bytes).unwrap_or(i64::MAX),
        i64::try_from(FAILURES_TOLD).unwrap_or(i64::MAX),
    )
    .fetch_all(pool)
    .await?)
}

/// What the items of a step have said that are done, in order, as JSON, as far as `bytes`
/// allow.
pub async fn outputs(
    pool: &PgPool,
    (company, run): (CompanyId, RunId),
    step: i32,
    round: i32,
    bytes: usize,
) -> Result<Vec<(i32, String)>, StoreError> {
    let rows = sqlx::query!(
        r#"select i.item, coalesce(i.output::text, 'null') as "output!"
           from (
               select item, output, sum(octet_length(output::text) + 2) over (order by item) as total
               from run_items
               where company_id = $1 and run_id = $2 and step = $3 and round = $4 and status = 'completed'
           ) i
           where coalesce(i.total, 0) <= $5
           order by i.item"#,
        company.0,
        run.0,
        step,
        round,
        i64::try_from(bytes).unwrap_or(i64::MAX),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (row.item, row.output)).collect())
}

/// Which items of a run are looked for.
#[derive(Debug)]
pub struct ItemFilter<'a> {
    /// Of which step.
    pub step: i32,
    /// `completed` or `failed`; both without.
    pub status: Option<&'a str>,
    /// Behind this place.
    pub after: i32,
}

/// An item as people read it.
#[derive(Debug)]
pub struct ShownItem {
    /// Its place in the list.
    pub item: i32,
    /// `completed` or `failed`.
    pub status: String,
    /// Who did it.
    pub agent: Option<AgentId>,
    /// Tries so far.
    pub attempt: i32,
    /// What it cost.
    pub cost: Nanos,
    /// Its output.
    pub output: Option<Value>,
    /// Why it failed.
    pub error: Option<Value>,
    /// How long its last attempt took.
    pub duration_ms: i64,
    /// When it was over.
    pub ended_at: DateTime<Utc>,
}

/// Some items of a step, in order, as many as `limit` and as `bytes` of outputs allow, but
/// one at least; and whether there are more.
pub async fn page(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
    filter: &ItemFilter<'_>,
    limit: i64,
    bytes: i64,
) -> Result<(Vec<ShownItem>, bool), StoreError> {
    let rows = sqlx::query!(
        r#"select i.item as "item!", i.status as "status!", i.agent_id, i.attempt as "attempt!", i.cost_nanos as "cost!",
               i.output, i.error, i.duration_ms as "duration_ms!", i.ended_at as "ended_at!",
               i.found as "found!"
           from (
               select i.*, sum(coalesce(i.bytes, octet_length(i.output::text), 0)) over (order by i.item) as total,
                   row_number() over (order by i.item) as place, count(*) over () as found
               from (
                   select * from run_items
                   where company_id = $1 and run_id = $2 and step = $3 and item > $4 and ($5::text is null or status = $5)
                   order by item limit $6::bigint + 1
               ) i
           ) i
           where i.total <= $7 or i.place = 1
           order by i.item"#,
        company.0,
        run.0,
        filter.step,
        filter.after,
        filter.status,
        limit,
        bytes,
    )
    .fetch_all(executor)
    .await?;
    let found = rows.first().map_or(0, |row| row.found);
    let mut shown: Vec<ShownItem> = rows
        .into_iter()
        .map(|row| ShownItem {
            item: row.item,
            status: row.status,
            agent: row.agent_id.map(AgentId),
            attempt: row.attempt,
            cost: Nanos(row.cost),
            output: row.output,
            error: row.error,
            duration_ms: row.duration_ms,
            ended_at: row.ended_at,
        })
        .collect();
    shown.truncate(usize::try_from(limit).unwrap_or(usize::MAX));
    let more = found > shown.len() as i64;
    Ok((shown, more))
}

/// One attempt at an item, decided.
#[derive(Debug, Clone)]
pub struct ItemCommit {
    /// The right to write it.
    pub lease: Lease,
    /// Whose run.
    pub company: CompanyId,
    /// Which run.
    pub run: RunId,
    /// Which step.
    pub step: i32,
    /// Which item.
    pub item: i32,
    /// What became of it.
    pub end: ItemEnd,
    /// Who did it.
    pub agent: Option<AgentId>,
    /// Which try it was.
    pub attempt: i32,
    /// How long the attempt took.
    pub took: Duration,
    /// What was spent, and is to be booked.
    pub cost: Nanos,
    /// What was spent besides, and is booked already.
    pub booked: Nanos,
}

/// What becomes of an item.
#[derive(Debug, Clone)]
pub enum ItemEnd {
    /// It is over, and its lane goes on with another.
    Over {
        /// Its output, as JSON, or why it failed.
        result: Result<String, String>,
        /// The lane stays with this worker.
        stay: bool,
    },
    /// It is tried again.
    Again {
        /// When.
        delay: Duration,
        /// Tries charged so far.
        attempt: i32,
    },
}

/// What became of a lane.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Lane {
    /// Its lease held.
    pub held: bool,
    /// The item that it goes on with.
    pub next: Option<i32>,
    /// The run's job was woken, of this or another lane of the batch.
    pub woken: bool,
}

/// Commits attempts at items of one session in one statement; one answer each.
pub async fn commit(
    executor: impl Executor<'_, Database = Postgres>,
    commits: &[&ItemCommit],
) -> Result<Vec<Lane>, StoreError> {
    let Some(session) = commits.first().map(|commit| commit.lease.session) else { return Ok(Vec::new()) };
    let over = |c: &&&ItemCommit| match &c.end {
        ItemEnd::Over { result, .. } => Some(result.clone()),
        ItemEnd::Again { .. } => None,
    };
    let again = |c: &&&ItemCommit| match c.end {
        ItemEnd::Again { delay, attempt } => Some((millis(delay), attempt)),
        ItemEnd::Over { .. } => None,
    };
    let status = |c| over(&c).map(|result| if result.is_ok() { "completed" } else { "failed" }.to_owned());
    let rows = sqlx::query_file!(
        "src/store/sql/commit_items.sql",
        &commits.iter().map(|c| c.lease.job).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.lease.epoch).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.company.0).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.run.0).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.step).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.item).collect::<Vec<_>>(),
        &commits.iter().map(|c| again(&c).map(|(delay, _)| delay)).collect::<Vec<_>>() as &[Option<i64>],
        &commits.iter().map(|c| again(&c).map(|(_, attempt)| attempt)).collect::<Vec<_>>() as &[Option<i32>],
        &commits.iter().map(|c| matches!(c.end, ItemEnd::Over { stay: true, .. })).collect::<Vec<_>>(),
        &commits.iter().map(status).collect::<Vec<_>>() as &[Option<String>],
        &commits.iter().map(|c| c.agent.map(|agent| agent.0)).collect::<Vec<_>>() as &[Option<Uuid>],
        &commits.iter().map(|c| c.attempt).collect::<Vec<_>>(),
        &commits.iter().map(|c| over(&c).and_then(Result::ok)).collect::<Vec<_>>() as &[Option<String>],
        &commits.iter().map(|c| over(&c).and_then(Result::err)).collect::<Vec<_>>() as &[Option<String>],
        &commits.iter().map(|c| millis(c.took)).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.cost.0).collect::<Vec<_>>(),
        session,
        millis(DEADLINE_GRACE),
        RUN_BYTES_MAX,
        &commits.iter().map(|c| c.booked.0).collect::<Vec<_>>(),
    )
    .fetch_all(executor)
    .await?;
    let mut lanes = vec![Lane::default(); commits.len()];
    for row in rows {
        if let Some(lane) = usize::try_from(row.place - 1).ok().and_then(|at| lanes.get_mut(at)) {
            *lane = Lane { held: true, next: row.next_item, woken: row.woken };
        }
    }
    Ok(lanes)
}
