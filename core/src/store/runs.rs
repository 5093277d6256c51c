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
use crate::domain::ids::{AgentId, CompanyId, PlaybookId, RunId, VersionId};
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
    pub duration_s: i64,
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
            params: row.params,
            waiting_on: row.waiting_on,
            output: row.output,
            error: row.error,
            cost: Nanos(row.cost_nanos),
            started_at: row.started_at,
            ended_at: row.ended_at,
            duration_s: row.duration_s,
        }
    }};
}

/// One run.
pub async fn get(pool: &PgPool, company: CompanyId, run: RunId) -> Result<Option<RunRow>, StoreError> {
    let row = sqlx::query!(
        r#"select id, playbook_id, version_id, status, params, waiting_on, output, error, cost_nanos,
                  started_at, ended_at,
                  extract(epoch from coalesce(ended_at, clock_timestamp()) - started_at)::bigint as "duration_s!"
           from runs where company_id = $1 and id = $2"#,
        company.0,
        run.0,
    )
    .fetch_optional(pool)
    .await?;
    row.map(|row| Ok(run_row!(row))).transpose()
}

/// A page of a playbook's runs, newest first, before a run.
pub async fn list(
    pool: &PgPool,
    company: CompanyId,
    playbook: PlaybookId,
    status: Option<RunStatus>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<RunRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select id, playbook_id, version_id, status, params, waiting_on, output, error, cost_nanos,
                  started_at, ended_at,
                  extract(epoch from coalesce(ended_at, clock_timestamp()) - started_at)::bigint as "duration_s!"
           from runs
           where company_id = $1 and playbook_id = $2
               and ($3::text is null or status = $3)
               and ($4::uuid is null or id < $4)
           order by id desc
           limit $5"#,
        company.0,
        playbook.0,
        status.map(RunStatus::as_str),
        before,
        limit,
    )
    .fetch_all(pool)
    .await?;
    rows.into_iter().map(|row| Ok(run_row!(row))).collect()
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
}

/// The steps of a run that have begun.
pub async fn steps(pool: &PgPool, company: CompanyId, run: RunId) -> Result<Vec<StepRow>, StoreError> {
    let rows = sqlx::query!(
        "select step, status, agent_id, attempt, cost_nanos, output, error, started_at, ended_at
         from run_steps where company_id = $1 and run_id = $2 order by step",
        company.0,
        run.0,
    )
    .fetch_all(pool)
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
        })
        .collect())
}

/// The live job of a run: what it is doing or waiting for right now.
#[derive(Debug, Clone)]
pub struct JobRow {
    /// `step` or `gate_timeout`.
    pub kind: String,
    /// The step it is about.
    pub step: i32,
    /// `ready`, `scheduled` or `running`.
    pub state: String,
    /// When it may be taken.
    pub due_at: DateTime<Utc>,
    /// Tries charged.
    pub attempt: i32,
}

/// The live job of a run, if it has one.
pub async fn job(pool: &PgPool, company: CompanyId, run: RunId) -> Result<Option<JobRow>, StoreError> {
    let row = sqlx::query!(
        "select j.kind, j.step, j.state, j.due_at, j.attempt
         from runs r join jobs j on j.id = r.job_id
         where r.company_id = $1 and r.id = $2",
        company.0,
        run.0,
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| JobRow {
        kind: row.kind,
        step: row.step,
        state: row.state,
        due_at: row.due_at,
        attempt: row.attempt,
    }))
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

/// What all the runs of a company have cost.
pub async fn company_cost(pool: &PgPool, company: CompanyId) -> Result<Nanos, StoreError> {
    Ok(Nanos(
        sqlx::query_scalar!(
            r#"select least(coalesce(sum(cost_nanos), 0), 9223372036854775807)::bigint as "cost!" from runs where company_id = $1"#,
            company.0,
        )
        .fetch_one(pool)
        .await?,
    ))
}
