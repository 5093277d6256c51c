//! Steps of runs: what an attempt needs to begin, and its commit.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::jobs::{DEADLINE_GRACE, Lease, millis};
use super::{StoreError, signals};
use crate::domain::event::Event;
use crate::domain::ids::{AgentId, CompanyId, RunId};
use crate::domain::money::Nanos;
use crate::domain::run::{RunStatus, StepStatus};

/// A run as an attempt needs it.
#[derive(Debug, Clone)]
pub struct LoadedRun {
    /// Whose.
    pub company: CompanyId,
    /// Which.
    pub run: RunId,
    /// Of which playbook.
    pub playbook: Uuid,
    /// The version it is pinned to.
    pub version: Uuid,
    /// What it was started with.
    pub params: Value,
    /// Its company's status.
    pub company_status: String,
    /// It was suspended, until what it waits for came: its job is due.
    pub waited: bool,
    /// What it comes to once it is closed, when its steps are over.
    pub ending: Option<Value>,
    /// How often it has been closed before.
    pub closings: i32,
    /// Its own job.
    pub job: i64,
    /// It does a step of another.
    pub called: bool,
    /// It waits for its turn.
    pub queued: bool,
    /// What it has cost so far.
    pub cost: Nanos,
    /// What it keeps of what its steps have said, in bytes.
    pub bytes: i64,
    /// How long ago it began.
    pub age: Duration,
    /// What the company's `governance` and `config.governance` say, where either does.
    pub policy: Option<(Option<Value>, Option<Value>)>,
    /// A person has let it begin to have effects.
    pub reviewed: bool,
    /// Its playbook was stopped at once.
    pub killed: bool,
}

/// Loads the runs that are to go on; one that has ended is left out.
pub async fn load_runs(pool: &PgPool, companies: &[Uuid], runs: &[Uuid]) -> Result<Vec<LoadedRun>, StoreError> {
    let rows = sqlx::query!(
        r#"select r.company_id, r.id, r.playbook_id, r.version_id, r.params, c.status as company_status,
             r.status = 'suspended' as "waited!", r.ending, r.closings, r.job_id, r.called,
             r.status = 'queued' as "queued!", r.cost_nanos, r.bytes,
             greatest(extract(epoch from clock_timestamp() - r.started_at) * 1000, 0)::bigint as "age_ms!",
             c.governance, c.policy, r.reviewed, p.killed_at is not null as "killed!"
         from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
         cross join lateral (
             select * from runs r where r.company_id = k.company_id and r.id = k.id offset 0
         ) r
         cross join lateral (
             select c.status, c.governance, c.config -> 'governance' as policy from companies c where c.id = k.company_id offset 0
         ) c
         left join lateral (
             select p.killed_at from playbooks p where p.company_id = r.company_id and p.id = r.playbook_id offset 0
         ) p on true
         where r.status in ('queued', 'running', 'suspended')"#,
        companies,
        runs,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| LoadedRun {
            company: CompanyId(row.company_id),
            run: RunId(row.id),
            playbook: row.playbook_id,
            version: row.version_id,
            params: row.params,
            company_status: row.company_status,
            waited: row.waited,
            ending: row.ending,
            closings: row.closings,
            job: row.job_id,
            called: row.called,
            queued: row.queued,
            cost: Nanos(row.cost_nanos),
            bytes: row.bytes,
            age: Duration::from_millis(u64::try_from(row.age_ms).unwrap_or(0)),
            policy: (row.governance.is_some() || row.policy.is_some()).then_some((row.governance, row.policy)),
            reviewed: row.reviewed,
            killed: row.killed,
        })
        .collect())
}

/// Counts what some runs keep, exactly, and keeps that; how much it is. The items of a
/// step that is not over are not among it: they count when it is.
pub async fn recount(
    executor: impl Executor<'_, Database = Postgres>,
    runs: &[(CompanyId, RunId)],
) -> Result<Vec<(Uuid, i64)>, StoreError> {
    let rows = sqlx::query!(
        r#"update runs r
           set bytes = (
                   select coalesce(sum(coalesce(s.bytes, octet_length(s.output::text))), 0)::bigint from run_steps s
                   where s.company_id = r.company_id and s.run_id = r.id
               ) + (
                   select coalesce(sum(coalesce(i.bytes, octet_length(i.output::text))), 0)::bigint from run_items i
                   where i.company_id = r.company_id and i.run_id = r.id
                       and exists (
                           select from run_steps s
                           where s.company_id = i.company_id and s.run_id = i.run_id and s.step = i.step
                               and s.status in ('completed', 'failed')
                       )
               )
           from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
           where r.company_id = k.company_id and r.id = any (array[k.id])
           returning r.id, r.bytes"#,
        &runs.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &runs.iter().map(|(_, run)| run.0).collect::<Vec<_>>(),
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.bytes)).collect())
}

/// Lets runs go on whose time has come, each under the lease of its job; says
/// which. `events` are what is told of it.
pub async fn resume(
    pool: &PgPool,
    jobs: &[(Lease, CompanyId, RunId)],
    events: &[Event],
) -> Result<Vec<Uuid>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"with d as (
               select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::uuid[], $5::uuid[], $6::uuid[], $7::jsonb[])
                   as d (job_id, epoch, session, company_id, run_id, event_id, data)
           ),
           held as (
               select d.* from d
               cross join lateral (
                   select from jobs j
                   where j.id = d.job_id and j.lease_epoch = d.epoch and j.session_id = d.session and j.state = 'running'
                   for update
               ) j
           ),
           run as (
               update runs r set status = 'running', waiting_on = null, event_seq = r.event_seq + 1
               from held d
               where r.id = any (array[d.run_id]) and r.company_id is not distinct from d.company_id and r.status = 'suspended'
               returning d.*, r.event_seq
           ),
           event as (
               insert into events (company_id, id, run_id, seq, event, data)
               select company_id, event_id, run_id, event_seq, 'playbook.resumed', data from run
           )
           -- The job's lease decides, and not who lets the run go on: of a graph, others may
           -- have done so meanwhile.
           select run_id as "run_id!" from held"#,
        &jobs.iter().map(|(lease, ..)| lease.job).collect::<Vec<_>>(),
        &jobs.iter().map(|(lease, ..)| lease.epoch).collect::<Vec<_>>(),
        &jobs.iter().map(|(lease, ..)| lease.session).collect::<Vec<_>>(),
        &jobs.iter().map(|(_, company, _)| company.0).collect::<Vec<_>>(),
        &jobs.iter().map(|(.., run)| run.0).collect::<Vec<_>>(),
        &events.iter().map(|event| event.id.0).collect::<Vec<_>>(),
        &events.iter().map(|event| event.data.clone()).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?)
}

/// How a step of a run stands.
#[derive(Debug)]
pub struct StateRow {
    /// Which run.
    pub run: Uuid,
    /// Which step.
    pub step: i32,
    /// Its status.
    pub status: String,
    /// Its tries; of a `goto`, its jumps.
    pub attempt: i32,
    /// What went wrong last.
    pub error: Option<Value>,
    /// Its last job.
    pub job: Option<i64>,
    /// When it was over.
    pub ended_at: Option<DateTime<Utc>>,
}

/// How all steps of some runs stand that have begun.
pub async fn load_states(pool: &PgPool, runs: &[(CompanyId, RunId)]) -> Result<Vec<StateRow>, StoreError> {
    Ok(sqlx::query_as!(
        StateRow,
        r#"select s.run_id as run, s.step, s.status, s.attempt, s.error, s.job_id as job, s.ended_at
           from unnest($1::uuid[], $2::uuid[]) as k (company_id, run_id)
           cross join lateral (
               select * from run_steps s where s.company_id = k.company_id and s.run_id = k.run_id offset 0
           ) s"#,
        &runs.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &runs.iter().map(|(_, run)| run.0).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?)
}

/// The stored outputs of some steps of runs: run, step, output.
pub async fn load_outputs(
    pool: &PgPool,
    wanted: &[(CompanyId, RunId, usize)],
) -> Result<Vec<(Uuid, i32, Value)>, StoreError> {
    let rows = sqlx::query!(
        r#"select s.run_id, s.step, s.output as "output!"
           from unnest($1::uuid[], $2::uuid[], $3::integer[]) as k (company_id, run_id, step)
           cross join lateral (
               select * from run_steps s
               where s.company_id = k.company_id and s.run_id = k.run_id and s.step = k.step offset 0
           ) s
           where s.output is not null"#,
        &wanted.iter().map(|(company, ..)| company.0).collect::<Vec<_>>(),
        &wanted.iter().map(|(_, run, _)| run.0).collect::<Vec<_>>(),
        &wanted.iter().map(|(.., step)| i32::try_from(*step).unwrap_or(i32::MAX)).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (row.run_id, row.step, row.output)).collect())
}

/// Where a job goes when its attempt is over.
#[derive(Debug, Clone)]
pub struct NextJob {
    /// Stays with this worker for the next step.
    pub held: bool,
    /// Its kind from now on.
    pub kind: &'static str,
    /// The step it is about.
    pub step: i32,
    /// When it may be taken.
    pub delay: Duration,
    /// How long that attempt may take.
    pub timeout: Duration,
    /// Tries charged so far.
    pub attempt: i32,
    /// Deaths of workers so far, since the last checkpoint.
    pub crash_count: i16,
}

/// What a commit does to the run besides counting its events.
#[derive(Debug, Clone, Default)]
pub struct RunChange {
    /// The new status, when it changes.
    pub status: Option<RunStatus>,
    /// What a suspended run waits for, as JSON.
    pub waiting_on: Option<String>,
    /// The run's output, as JSON.
    pub output: Option<String>,
    /// Why it failed, as JSON.
    pub error: Option<String>,
}

/// The row of the step that was attempted.
#[derive(Debug, Clone)]
pub struct StepChange {
    /// Its status now.
    pub status: StepStatus,
    /// Who did it.
    pub agent: Option<AgentId>,
    /// Which try it was.
    pub attempt: i32,
    /// Its output, as JSON.
    pub output: Option<String>,
    /// What went wrong, as JSON.
    pub error: Option<String>,
    /// How long the attempt took.
    pub took: Duration,
}

/// What becomes of the rows of steps that a run goes past or comes to wait at.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Passing {
    /// Steps that are left out: they say nothing any more.
    pub skipped: Vec<i32>,
    /// Each `goto` that has jumped, and how often so far.
    pub jumped: Vec<(i32, i32)>,
    /// Steps that are to be done again; what they said stays until they are.
    pub again: Vec<i32>,
    /// A step that waits for its time, or an event.
    pub waiting: Option<i32>,
    /// A step that waits for an event no more.
    pub received: Option<i32>,
    /// What the run comes to once it is closed.
    pub ending: Option<Value>,
}

impl Passing {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Writes what a run goes past, in the transaction that moves it.
pub async fn pass(tx: &mut PgConnection, company: CompanyId, run: RunId, passed: &Passing) -> Result<(), StoreError> {
    if let Some(step) = passed.received {
        signals::forget(tx, company, run, Some(step)).await?;
    }
    if let Some(ending) = &passed.ending {
        sqlx::query!("update runs set ending = $3 where company_id = $1 and id = $2", company.0, run.0, ending)
            .execute(&mut *tx)
            .await?;
    }
    if !passed.again.is_empty() {
        sqlx::query!(
            "update run_steps set status = 'pending', ended_at = null
             where company_id = $1 and run_id = $2 and step = any ($3) and status in ('completed', 'failed', 'skipped')",
            company.0,
            run.0,
            &passed.again,
        )
        .execute(&mut *tx)
        .await?;
    }
    let skipped = passed.skipped.iter().map(|step| (*step, StepStatus::Skipped, 0));
    let jumped = passed.jumped.iter().map(|(step, jumps)| (*step, StepStatus::Completed, *jumps));
    let waiting = passed.waiting.iter().map(|step| (*step, StepStatus::Waiting, 0));
    let rows: Vec<_> = skipped.chain(jumped).chain(waiting).collect();
    if rows.is_empty() {
        return Ok(());
    }
    sqlx::query!(
        "insert into run_steps as s (company_id, run_id, step, status, attempt, started_at, ended_at)
         select $1, $2, p.step, p.status, p.attempt, clock_timestamp(),
             case when p.status <> 'waiting' then clock_timestamp() end
         from unnest($3::integer[], $4::text[], $5::integer[]) as p (step, status, attempt)
         on conflict (company_id, run_id, step) do update
         set status = excluded.status, attempt = excluded.attempt, started_at = excluded.started_at,
             ended_at = excluded.ended_at,
             output = case when excluded.status <> 'skipped' then s.output end,
             error = case when excluded.status <> 'skipped' then s.error end",
        company.0,
        run.0,
        &rows.iter().map(|(step, ..)| *step).collect::<Vec<_>>(),
        &rows.iter().map(|(_, status, _)| status.as_str().to_owned()).collect::<Vec<_>>(),
        &rows.iter().map(|(.., attempt)| *attempt).collect::<Vec<_>>(),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// One attempt's commit, decided.
#[derive(Debug, Clone)]
pub struct StepCommit {
    /// The right to write it.
    pub lease: Lease,
    /// Whose run.
    pub company: CompanyId,
    /// Which run.
    pub run: RunId,
    /// Which step was attempted.
    pub step: i32,
    /// `None`: the job's row goes.
    pub job: Option<NextJob>,
    /// The run.
    pub change: RunChange,
    /// The step's row; `None` leaves it.
    pub checkpoint: Option<StepChange>,
    /// What was spent.
    pub cost: Nanos,
    /// By how much what the run keeps grows, in bytes.
    pub bytes: i64,
    /// What happened, in order.
    pub events: Vec<Event>,
}

/// Commits many attempts of one session in one statement; says of each whether its lease
/// held. An attempt whose lease is gone has written nothing.
pub async fn commit(
    executor: impl Executor<'_, Database = Postgres>,
    commits: &[StepCommit],
) -> Result<Vec<bool>, StoreError> {
    let events: [EventColumns; EVENTS_MAX] = event_columns(commits.iter().map(|c| c.events.as_slice()));
    let [first, second, third] = &events;
    let Some(session) = commits.first().map(|commit| commit.lease.session) else { return Ok(Vec::new()) };
    let each = |f: &dyn Fn(&StepCommit) -> Option<String>| commits.iter().map(f).collect::<Vec<_>>();
    let job = |f: fn(&NextJob) -> i64| commits.iter().map(|c| c.job.as_ref().map(f)).collect::<Vec<_>>();
    let step = |f: fn(&StepChange) -> Option<String>| {
        commits.iter().map(|c| c.checkpoint.as_ref().and_then(f)).collect::<Vec<_>>()
    };
    let job_state = |c: &StepCommit| {
        c.job.as_ref().map(|job| match (job.held, job.delay.is_zero()) {
            (true, _) => "running".to_owned(),
            (false, true) => "ready".to_owned(),
            (false, false) => "scheduled".to_owned(),
        })
    };
    let places = sqlx::query_file_scalar!(
        "src/store/sql/commit_steps.sql",
        &commits.iter().map(|c| c.lease.job).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.lease.epoch).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.company.0).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.run.0).collect::<Vec<_>>(),
        &commits.iter().map(|c| c.step).collect::<Vec<_>>(),
        &each(&job_state) as &[Option<String>],
        &each(&|c| c.job.as_ref().map(|job| job.kind.to_owned())) as &[Option<String>],
        &commits.iter().map(|c| c.job.as_ref().map(|job| job.step)).collect::<Vec<_>>() as &[Option<i32>],
        &job(|j| millis(j.delay)) as &[Option<i64>],
        &job(|j| millis(j.timeout)) as &[Option<i64>],
        &commits.iter().map(|c| c.job.as_ref().map(|job| job.attempt)).collect::<Vec<_>>() as &[Option<i32>],
        &commits.iter().map(|c| c.job.as_ref().map(|job| job.crash_count)).collect::<Vec<_>>() as &[Option<i16>],
        &each(&|c| c.change.status.map(|s| s.as_str().to_owned())) as &[Option<String>],
        &each(&|c| c.change.waiting_on.clone()) as &[Option<String>],
        &each(&|c| c.change.output.clone()) as &[Option<String>],
        &each(&|c| c.change.error.clone()) as &[Option<String>],
        &commits.iter().map(|c| c.cost.0).collect::<Vec<_>>(),
        &step(|s| Some(s.status.as_str().to_owned())) as &[Option<String>],
        &commits.iter().map(|c| c.checkpoint.as_ref().and_then(|s| s.agent.map(|a| a.0))).collect::<Vec<_>>()
            as &[Option<Uuid>],
        &commits.iter().map(|c| c.checkpoint.as_ref().map_or(0, |s| s.attempt)).collect::<Vec<_>>(),
        &step(|s| s.output.clone()) as &[Option<String>],
        &step(|s| s.error.clone()) as &[Option<String>],
        &commits.iter().map(|c| c.checkpoint.as_ref().map_or(0, |s| millis(s.took))).collect::<Vec<_>>(),
        &commits.iter().map(|c| i32::try_from(c.events.len()).unwrap_or(i32::MAX)).collect::<Vec<_>>(),
        &first.ids as &[Option<Uuid>],
        &first.names as &[Option<String>],
        &first.data as &[Option<String>],
        &second.ids as &[Option<Uuid>],
        &second.names as &[Option<String>],
        &second.data as &[Option<String>],
        &third.ids as &[Option<Uuid>],
        &third.names as &[Option<String>],
        &third.data as &[Option<String>],
        millis(DEADLINE_GRACE),
        session,
        &commits.iter().map(|c| c.bytes).collect::<Vec<_>>(),
    )
    .fetch_all(executor)
    .await?;
    let mut held = vec![false; commits.len()];
    for place in places {
        if let Some(slot) = usize::try_from(place - 1).ok().and_then(|at| held.get_mut(at)) {
            *slot = true;
        }
    }
    Ok(held)
}

/// The most events of one commit or start.
pub const EVENTS_MAX: usize = 3;

/// The first, second or third event of each row, as columns.
#[derive(Debug, Default)]
pub(crate) struct EventColumns {
    pub ids: Vec<Option<Uuid>>,
    pub names: Vec<Option<String>>,
    pub data: Vec<Option<String>>,
}

/// Events as columns; a row has at most [`EVENTS_MAX`].
pub(crate) fn event_columns<'a>(rows: impl Iterator<Item = &'a [Event]>) -> [EventColumns; EVENTS_MAX] {
    let mut columns: [EventColumns; EVENTS_MAX] = Default::default();
    for row in rows {
        debug_assert!(row.len() <= EVENTS_MAX, "a commit with {} events", row.len());
        for (at, column) in columns.iter_mut().enumerate() {
            let event = row.get(at);
            column.ids.push(event.map(|e| e.id.0));
            column.names.push(event.map(|e| e.name.to_owned()));
            column.data.push(event.map(|e| e.data.to_string()));
        }
    }
    columns
}

/// Writes that an attempt has begun, if its lease still holds.
pub async fn mark_started(
    executor: impl Executor<'_, Database = Postgres>,
    job: &super::jobs::ClaimedJob,
    run: RunId,
    agent: Option<AgentId>,
    ago: Duration,
    event: &Event,
) -> Result<(), StoreError> {
    sqlx::query!(
        "with held as (
             select id from jobs where id = $1 and lease_epoch = $2 and session_id = $12 and state = 'running' for update
         ),
         run as (
             update runs set event_seq = event_seq + 1
             from held
             where company_id = $3 and runs.id = $4 and status = 'running'
             returning event_seq
         ),
         step as (
             insert into run_steps as s (company_id, run_id, step, status, agent_id, attempt, job_id, lease_epoch, started_at)
             select $3, $4, $5, 'running', $6, $7, $1, $2, clock_timestamp() - $8 * interval '1 millisecond' from run
             on conflict (company_id, run_id, step) do update
             set status = 'running', agent_id = excluded.agent_id, attempt = excluded.attempt,
                 job_id = excluded.job_id, lease_epoch = excluded.lease_epoch, started_at = excluded.started_at
         )
         insert into events (company_id, id, run_id, seq, event, data, at)
         select $3, $9, $4, run.event_seq, $10, $11, clock_timestamp() - $8 * interval '1 millisecond' from run",
        job.lease.job, job.lease.epoch, job.company.0, run.0, job.step, agent.map(|a| a.0), job.attempt,
        millis(ago) as f64, event.id.0, event.name, event.data, job.lease.session,
    )
    .execute(executor)
    .await?;
    Ok(())
}
