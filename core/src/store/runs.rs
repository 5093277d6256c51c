//! Runs: their start, and what people read of them.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use super::jobs::millis;
use super::steps::event_columns;
use crate::domain::event::Event;
use crate::domain::ids::{AccountId, AgentId, CompanyId, PlaybookId, RunId, VersionId};
use crate::domain::money::Nanos;
use crate::domain::run::RunStatus;

/// A run to be.
#[derive(Debug, Clone)]
pub struct NewRun {
    /// Whose.
    pub company: CompanyId,
    /// Which.
    pub run: RunId,
    /// Of which playbook.
    pub playbook: PlaybookId,
    /// The version it is pinned to.
    pub version: VersionId,
    /// Running, or suspended behind a first gate.
    pub status: RunStatus,
    /// What started it.
    pub trigger: &'static str,
    /// Its parameters, as JSON.
    pub params: String,
    /// What it waits for, as JSON.
    pub waiting_on: Option<String>,
    /// The step it begins with.
    pub first_step: i32,
    /// The run that it plays again.
    pub replay_of: Option<RunId>,
    /// Of the playbook's runs one has it: what started it.
    pub dedup_key: Option<String>,
    /// How urgent its work is, within the company: lower is earlier.
    pub priority: i16,
    /// The kind of its job.
    pub job_kind: &'static str,
    /// When the job may be taken.
    pub delay: Duration,
    /// How long its first attempt may take.
    pub timeout: Duration,
    /// What happened.
    pub events: Vec<Event>,
}

/// A run that was started.
#[derive(Debug, Clone, Copy)]
pub struct StartedRun {
    /// Which.
    pub run: RunId,
    /// Its job.
    pub job: i64,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
}

/// Starts many runs in one statement; they come back in any order.
pub async fn start(
    executor: impl Executor<'_, Database = Postgres>,
    runs: &[NewRun],
) -> Result<Vec<StartedRun>, StoreError> {
    let events = event_columns(runs.iter().map(|run| run.events.as_slice()));
    let [first, second, third] = &events;
    let rows = sqlx::query_file!(
        "src/store/sql/start_runs.sql",
        &runs.iter().map(|r| r.company.0).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.run.0).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.playbook.0).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.version.0).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.status.as_str().to_owned()).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.trigger.to_owned()).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.params.clone()).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.waiting_on.clone()).collect::<Vec<_>>() as &[Option<String>],
        &runs.iter().map(|r| r.job_kind.to_owned()).collect::<Vec<_>>(),
        &runs.iter().map(|r| millis(r.delay)).collect::<Vec<_>>(),
        &runs.iter().map(|r| millis(r.timeout)).collect::<Vec<_>>(),
        &runs.iter().map(|r| i32::try_from(r.events.len()).unwrap_or(i32::MAX)).collect::<Vec<_>>(),
        &first.ids as &[Option<Uuid>],
        &first.names as &[Option<String>],
        &first.data as &[Option<String>],
        &second.ids as &[Option<Uuid>],
        &second.names as &[Option<String>],
        &second.data as &[Option<String>],
        &third.ids as &[Option<Uuid>],
        &third.names as &[Option<String>],
        &third.data as &[Option<String>],
        &runs.iter().map(|r| r.first_step).collect::<Vec<_>>(),
        &runs.iter().map(|r| r.replay_of.map(|run| run.0)).collect::<Vec<_>>() as &[Option<Uuid>],
        &runs.iter().map(|r| r.dedup_key.clone()).collect::<Vec<_>>() as &[Option<String>],
        &runs.iter().map(|r| r.priority).collect::<Vec<_>>(),
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| StartedRun { run: RunId(row.id), job: row.job_id, at: row.started_at }).collect())
}

/// When runs began, in the order asked for.
pub async fn started_at(pool: &PgPool, runs: &[(CompanyId, RunId)]) -> Result<Vec<DateTime<Utc>>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select r.started_at as "at!"
           from unnest($1::uuid[], $2::uuid[]) with ordinality as k (company_id, id, place)
           join runs r on r.company_id = k.company_id and r.id = k.id
           order by k.place"#,
        &runs.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &runs.iter().map(|(_, run)| run.0).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?)
}

/// A run as people read it.
#[derive(Debug, Clone)]
pub struct RunRow {
    /// Which.
    pub run: RunId,
    /// Of which playbook.
    pub playbook: PlaybookId,
    /// The version it is pinned to.
    pub version: VersionId,
    /// Its status.
    pub status: RunStatus,
    /// The run that it plays again.
    pub replay_of: Option<RunId>,
    /// Its parameters.
    pub params: Value,
    /// What it waits for.
    pub waiting_on: Option<Value>,
    /// Its output.
    pub output: Option<Value>,
    /// Why it failed.
    pub error: Option<Value>,
    /// What it cost so far.
    pub cost: Nanos,
    /// When it began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// Its age or length by the database's clock, in seconds.
    pub duration_s: Option<i64>,
    /// Since when its company is halted, if it is and the run is open.
    pub halted_since: Option<DateTime<Utc>>,
    /// It does a step of another run.
    pub called: bool,
    /// What it has in common with others that are not to be under way at once.
    pub concurrency_key: Option<String>,
}

macro_rules! run_row {
    ($row:expr) => {{
        let row = $row;
        RunRow {
            run: RunId(row.id),
            playbook: PlaybookId(row.playbook_id),
            version: VersionId(row.version_id),
            status: RunStatus::from_name(&row.status)
                .ok_or_else(|| StoreError::Unreadable(format!("run status {}", row.status)))?,
            replay_of: row.replay_of.map(RunId),
            params: row.params,
            waiting_on: row.waiting_on,
            output: row.output,
            error: row.error,
            cost: Nanos(row.cost_nanos),
            started_at: row.started_at,
            ended_at: row.ended_at,
            duration_s: row.duration_s,
            halted_since: row.halted_since,
            called: row.called,
            concurrency_key: row.concurrency_key,
        }
    }};
}

/// One run.
pub async fn get(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
) -> Result<Option<RunRow>, StoreError> {
    let row = sqlx::query!(
        "select r.id, r.playbook_id, r.version_id, r.status, r.replay_of, r.params, r.waiting_on, r.output, r.error, r.cost_nanos,
                  r.started_at, r.ended_at, r.called, r.concurrency_key,
                  extract(epoch from coalesce(r.ended_at, clock_timestamp()) - r.started_at)::bigint as duration_s,
                  case when r.ended_at is null then case c.status when 'paused' then c.paused_at when 'stopped' then c.stopped_at end end as halted_since
           from runs r join companies c on c.id = r.company_id
           where r.company_id = $1 and r.id = $2",
        company.0,
        run.0,
    )
    .fetch_optional(executor)
    .await?;
    row.map(|row| Ok(run_row!(row))).transpose()
}

/// Where a run of an account belongs.
pub async fn locate(
    executor: impl Executor<'_, Database = Postgres>,
    account: AccountId,
    run: RunId,
) -> Result<Option<(CompanyId, PlaybookId)>, StoreError> {
    let row = sqlx::query!(
        "select r.company_id, r.playbook_id
         from runs r join companies c on c.id = r.company_id
         where r.id = $1 and c.account_id = $2",
        run.0,
        account.0,
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| (CompanyId(row.company_id), PlaybookId(row.playbook_id))))
}

/// The run of a playbook that was started under a key, if there is one. Whoever
/// asks for the same in another transaction waits for the end of this one.
pub async fn by_key(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    key: &str,
) -> Result<Option<RunRow>, StoreError> {
    sqlx::query!("select pg_advisory_xact_lock(hashtextextended($1, 0))", format!("{playbook} {key}"))
        .execute(&mut *tx)
        .await?;
    let run = sqlx::query_scalar!(
        "select id from runs where playbook_id = $1 and dedup_key = $2 and company_id = $3",
        playbook.0,
        key,
        company.0,
    )
    .fetch_optional(&mut *tx)
    .await?;
    match run {
        Some(run) => get(tx, company, RunId(run)).await,
        None => Ok(None),
    }
}

/// A run in a list, without what it was given and what came of it.
#[derive(Debug, Clone)]
pub struct RunItemRow {
    /// Which.
    pub run: RunId,
    /// Of which playbook.
    pub playbook: PlaybookId,
    /// Its status.
    pub status: RunStatus,
    /// What it cost so far.
    pub cost: Nanos,
    /// When it began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// Its age or length by the database's clock, in seconds.
    pub duration_s: Option<i64>,
}

impl RunRow {
    /// As a list shows it.
    pub fn item(&self) -> RunItemRow {
        RunItemRow {
            run: self.run,
            playbook: self.playbook,
            status: self.status,
            cost: self.cost,
            started_at: self.started_at,
            ended_at: self.ended_at,
            duration_s: self.duration_s,
        }
    }
}

/// What picks runs out of a company.
#[derive(Debug, Clone)]
pub struct RunFilter {
    /// Of this playbook.
    pub playbook: PlaybookId,
    /// With one of these statuses, as they are stored; all without.
    pub statuses: Option<Vec<RunStatus>>,
    /// Older than this one.
    pub before: Option<Uuid>,
}

/// A page of a playbook's runs, newest first.
pub async fn list(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    filter: &RunFilter,
    limit: i64,
) -> Result<Vec<RunItemRow>, StoreError> {
    let statuses = filter.statuses.as_deref();
    let open = statuses.is_some_and(|statuses| statuses.iter().all(|status| !status.is_terminal()));
    let names: Option<Vec<String>> =
        statuses.map(|statuses| statuses.iter().map(|status| status.as_str().to_owned()).collect());
    // Of one status an index has them in their order.
    let (one, names) = match names.as_deref() {
        Some([one]) => (Some(one.as_str()), None),
        names => (None, names),
    };
    let rows = sqlx::query!(
        "select id, status, cost_nanos, started_at, ended_at,
             extract(epoch from coalesce(ended_at, clock_timestamp()) - started_at)::bigint as duration_s
         from runs
         where company_id = $1 and playbook_id = $2
             and ($3::text[] is null or status = any ($3)) and ($7::text is null or status = $7)
             -- What follows from the status, for the index of open runs.
             and (not $4::boolean or ended_at is null)
             and ($5::uuid is null or id < $5)
         order by id desc
         limit $6",
        company.0,
        filter.playbook.0,
        names,
        open,
        filter.before,
        limit,
        one,
    )
    .fetch_all(executor)
    .await?;
    rows.into_iter()
        .map(|row| {
            Ok(RunItemRow {
                run: RunId(row.id),
                playbook: filter.playbook,
                status: RunStatus::from_name(&row.status)
                    .ok_or_else(|| StoreError::Unreadable(format!("run status {}", row.status)))?,
                cost: Nanos(row.cost_nanos),
                started_at: row.started_at,
                ended_at: row.ended_at,
                duration_s: row.duration_s,
            })
        })
        .collect()
}

/// Locks a run by way of its job, which every use case locks first; its status.
pub async fn lock_with_job(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
) -> Result<Option<RunStatus>, StoreError> {
    sqlx::query!(
        "select from jobs where id = (select job_id from runs where company_id = $1 and id = $2) for update",
        company.0,
        run.0,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let status =
        sqlx::query_scalar!("select status from runs where company_id = $1 and id = $2 for update", company.0, run.0)
            .fetch_optional(tx)
            .await?;
    status
        .map(|status| {
            RunStatus::from_name(&status).ok_or_else(|| StoreError::Unreadable(format!("run status {status}")))
        })
        .transpose()
}

/// Ends a run that is locked and open, and lets its job go.
pub async fn end_by_hand(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    status: RunStatus,
) -> Result<(), StoreError> {
    sqlx::query!(
        "with ended as (
             update runs set status = $3, waiting_on = null, ended_at = clock_timestamp()
             where company_id = $1 and id = $2 and status in ('queued', 'running', 'suspended')
             returning company_id, playbook_id, job_id, cost_nanos, started_at, ended_at
         ),
         counted as (
             insert into run_deltas (company_id, playbook_id, started, ended, cost_nanos, duration_ms)
             select company_id, playbook_id, 0, 1, cost_nanos,
                 coalesce(extract(epoch from ended_at - started_at) * 1000, 0)::bigint
             from ended
         )
         delete from jobs where id = (select job_id from ended)",
        company.0,
        run.0,
        status.as_str(),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Lets a run that is locked and open go on with what closes it, by its own job under
/// a new epoch; false when it is being closed in that way already.
pub async fn close_by_hand(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    ending: &Value,
    timeout: Duration,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "with closing as (
             update runs set status = 'running', waiting_on = null, ending = $3
             where company_id = $1 and id = $2 and status in ('running', 'suspended')
                 and ending ->> 'status' is distinct from 'cancelled'
             returning job_id
         )
         update jobs
         set kind = 'step', step = -1, state = 'ready', due_at = now(), lease_epoch = lease_epoch + 1, attempt = 0,
             crash_count = 0, session_id = null, deadline_at = null, timeout_ms = $4
         where id = (select job_id from closing)",
        company.0,
        run.0,
        ending,
        millis(timeout),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Of what has closed a run nothing stays: it will be done again.
pub async fn forget_closing(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    first: i32,
) -> Result<(), StoreError> {
    sqlx::query!(
        "delete from run_steps where company_id = $1 and run_id = $2 and step >= $3",
        company.0,
        run.0,
        first,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The step at which a run failed.
pub async fn failed_step(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<Option<i32>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select s.step from runs r
         join run_steps s on s.company_id = r.company_id and s.run_id = r.id
         where r.company_id = $1 and r.id = $2 and s.status = 'failed' and s.step = (r.error ->> 'index')::integer",
        company.0,
        run.0,
    )
    .fetch_optional(tx)
    .await?)
}

/// How a failed run goes on.
#[derive(Debug)]
pub struct Retry<'a> {
    /// The step that has failed.
    pub failed: i32,
    /// The place of its job.
    pub step: i32,
    /// Its steps go on, so that it will be closed anew.
    pub reopens: bool,
    /// With a job of this kind.
    pub kind: &'a str,
    /// When the job may be taken.
    pub delay: Duration,
    /// How long one attempt may take.
    pub timeout: Duration,
    /// What it waits for at its gate, as JSON.
    pub waiting_on: Option<String>,
}

/// Lets a failed run that is locked go on with a new job; says which. What it
/// had added to the sums of ended runs is taken back, and its dead letters go.
pub async fn retry(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    retry: &Retry<'_>,
) -> Result<Option<i64>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"with failed as (
               select company_id, id, playbook_id, cost_nanos, started_at, ended_at
               from runs where company_id = $1 and id = $2 and status = 'failed'
           ),
           counted as (
               insert into run_deltas (company_id, playbook_id, started, ended, cost_nanos, duration_ms)
               select company_id, playbook_id, 0, -1, -cost_nanos,
                   -coalesce(extract(epoch from ended_at - started_at) * 1000, 0)::bigint
               from failed
           ),
           letters as (
               delete from dead_letters l using failed where l.company_id = failed.company_id and l.ref_id = failed.id
           ),
           step as (
               update run_steps s
               set status = case when $7::text is null then 'pending' else 'pending_approval' end, ended_at = null
               from failed
               where s.company_id = failed.company_id and s.run_id = failed.id and s.step = $8 and s.status = 'failed'
           ),
           job as (
               insert into jobs (queue, kind, company_id, ref_id, step, state, due_at, timeout_ms)
               select 'steps', $4, company_id, id, $3,
                   case when $5::bigint > 0 then 'scheduled' else 'ready' end,
                   now() + $5 * interval '1 millisecond', $6
               from failed
               returning id
           )
           update runs
           set status = case when $7::text is null then 'running' else 'suspended' end,
               waiting_on = $7::jsonb, job_id = job.id, error = null, ended_at = null,
               ending = case when not $9 then ending end,
               closings = closings + ($9 and ending is not null)::integer
           from job
           where company_id = $1 and runs.id = $2 and status = 'failed'
           returning job_id"#,
        company.0,
        run.0,
        retry.step,
        retry.kind,
        millis(retry.delay),
        millis(retry.timeout),
        retry.waiting_on,
        retry.failed,
        retry.reopens,
    )
    .fetch_optional(tx)
    .await?)
}

/// Gives a run some checkpoints of another; they cost nothing again.
pub async fn copy_checkpoints(
    tx: &mut PgConnection,
    company: CompanyId,
    from: RunId,
    to: RunId,
    steps: &[i32],
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into run_steps (company_id, run_id, step, status, agent_id, attempt, output, bytes, error, started_at, ended_at)
         select company_id, $3, step, status, agent_id, attempt, output, bytes, error, started_at, ended_at
         from run_steps where company_id = $1 and run_id = $2 and step = any ($4)",
        company.0,
        from.0,
        to.0,
        steps,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A step's row.
#[derive(Debug, Clone)]
pub struct StepRow {
    /// Its place in the playbook.
    pub step: i32,
    /// Its status.
    pub status: String,
    /// Who did it.
    pub agent: Option<AgentId>,
    /// Tries so far.
    pub attempt: i32,
    /// What it cost.
    pub cost: Nanos,
    /// Its output.
    pub output: Option<Value>,
    /// What went wrong last.
    pub error: Option<Value>,
    /// When its last attempt began.
    pub started_at: Option<DateTime<Utc>>,
    /// When it ended.
    pub ended_at: Option<DateTime<Utc>>,
    /// How its items stand, where it is done for a list.
    pub items: Option<ItemCounts>,
}

/// How the items of a step stand.
#[derive(Debug, Clone, Copy)]
pub struct ItemCounts {
    /// How many there are.
    pub total: i32,
    /// Those that are done.
    pub completed: i32,
    /// Those that have failed.
    pub failed: i32,
    /// Those that are being done.
    pub running: i32,
}

/// The steps of a run that have begun.
pub async fn steps(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
) -> Result<Vec<StepRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select s.step, s.status, s.agent_id, s.attempt, s.cost_nanos, s.output, s.error, s.started_at, s.ended_at,
             f.items as "items?", f.items - f.size + f.completed as completed, f.failed as "failed?",
             case when s.status = 'running' then f.lanes else 0 end as lanes
           from run_steps s
           left join run_fans f on f.company_id = s.company_id and f.run_id = s.run_id and f.step = s.step
           where s.company_id = $1 and s.run_id = $2 order by s.step"#,
        company.0,
        run.0,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| StepRow {
            step: row.step,
            status: row.status,
            agent: row.agent_id.map(AgentId),
            attempt: row.attempt,
            cost: Nanos(row.cost_nanos),
            output: row.output,
            error: row.error,
            started_at: row.started_at,
            ended_at: row.ended_at,
            items: row.items.map(|total| ItemCounts {
                total,
                completed: row.completed.unwrap_or(0),
                failed: row.failed.unwrap_or(0),
                running: row.lanes.unwrap_or(0),
            }),
        })
        .collect())
}

/// The live job of a run: what it is doing or waiting for right now.
#[derive(Debug, Clone)]
pub struct JobRow {
    /// `step`, `timer` or `gate_timeout`.
    pub kind: String,
    /// The step it is about.
    pub step: i32,
    /// `ready`, `scheduled` or `running`.
    pub state: String,
    /// When it may be taken; `None` while its company is halted.
    pub due_at: Option<DateTime<Utc>>,
    /// Tries charged.
    pub attempt: i32,
}

/// The live job of a run, if it has one.
pub async fn job(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
) -> Result<Option<JobRow>, StoreError> {
    let row = sqlx::query!(
        "select j.kind, j.step, j.state, nullif(j.due_at, 'infinity') as due_at, j.attempt
         from runs r join jobs j on j.id = r.job_id
         where r.company_id = $1 and r.id = $2",
        company.0,
        run.0,
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| JobRow {
        kind: row.kind,
        step: row.step,
        state: row.state,
        due_at: row.due_at,
        attempt: row.attempt,
    }))
}

/// When the last thing happened to a run.
pub async fn last_told(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
) -> Result<Option<DateTime<Utc>>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select at from events where company_id = $1 and run_id = $2 order by seq desc limit 1",
        company.0,
        run.0,
    )
    .fetch_optional(executor)
    .await?)
}

/// The live jobs of the steps of a run that form a graph.
pub async fn node_jobs(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
) -> Result<Vec<JobRow>, StoreError> {
    let rows = sqlx::query!(
        "select j.kind, j.step, j.state, nullif(j.due_at, 'infinity') as due_at, j.attempt
         from run_steps s
         join jobs j on j.id = s.job_id and j.step = s.step
         where s.company_id = $1 and s.run_id = $2 and s.status not in ('completed', 'failed', 'skipped', 'cancelled')",
        company.0,
        run.0,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| JobRow {
            kind: row.kind,
            step: row.step,
            state: row.state,
            due_at: row.due_at,
            attempt: row.attempt,
        })
        .collect())
}

/// Runs that neither end nor can be woken: always none, else a fault of ours
/// (hazard H3). For checks and the metric that watches for it.
pub async fn stranded(connection: &mut PgConnection) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from runs r
           where r.status in ('queued', 'running', 'suspended')
               and not exists (select from jobs j where j.id = r.job_id)"#,
    )
    .fetch_one(connection)
    .await?)
}
