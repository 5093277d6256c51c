//! Steps of runs that form a graph: each has a job of its own, its node, beside the
//! run's own job, which waits at the junction until one of them is over.

use std::time::Duration;

use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::{Lease, millis, queue};
use crate::domain::ids::{ApprovalId, CompanyId, RunId};
use crate::domain::run::StepStatus;

/// A step that begins.
#[derive(Debug, Clone)]
pub struct NewNode {
    /// Which.
    pub step: i32,
    /// The kind of its job.
    pub kind: &'static str,
    /// When that may be taken.
    pub delay: Duration,
    /// How long one attempt may take.
    pub timeout: Duration,
    /// How it stands until then.
    pub status: StepStatus,
}

/// Lets steps of a run begin, in the transaction of its turn; their jobs, in the same
/// order.
pub async fn begin(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    nodes: &[NewNode],
) -> Result<Vec<i64>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"with d as materialized (
               select d.*, nextval(pg_get_serial_sequence('jobs', 'id')) as job_id
               from unnest($3::integer[], $4::text[], $5::bigint[], $6::bigint[], $7::text[])
                   with ordinality as d (step, kind, delay_ms, timeout_ms, status, place)
           ),
           job as (
               insert into jobs (id, queue, kind, company_id, ref_id, step, state, due_at, timeout_ms)
               overriding system value
               select job_id, $8, kind, $1, $2, step, case when delay_ms > 0 then 'scheduled' else 'ready' end,
                   now() + delay_ms * interval '1 millisecond', timeout_ms
               from d
           ),
           row as (
               insert into run_steps (company_id, run_id, step, status, job_id, started_at)
               select $1, $2, step, status, job_id, case when status <> 'pending' then clock_timestamp() end from d
               -- A run that is retried has come here before.
               on conflict (company_id, run_id, step) do update
               set status = excluded.status, job_id = excluded.job_id, started_at = excluded.started_at, ended_at = null
           )
           select job_id as "job_id!" from d order by place"#,
        company.0,
        run.0,
        &nodes.iter().map(|node| node.step).collect::<Vec<_>>(),
        &nodes.iter().map(|node| node.kind.to_owned()).collect::<Vec<_>>(),
        &nodes.iter().map(|node| millis(node.delay)).collect::<Vec<_>>(),
        &nodes.iter().map(|node| millis(node.timeout)).collect::<Vec<_>>(),
        &nodes.iter().map(|node| node.status.as_str().to_owned()).collect::<Vec<_>>(),
        queue::STEPS,
    )
    .fetch_all(tx)
    .await?)
}

/// What a node finds of its run when it commits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Held {
    /// Its lease is gone.
    Lost,
    /// The run has ended, or is being closed: nothing of the node counts any more.
    Over,
    /// The run goes on.
    Open,
}

/// Locks a node by its lease, and its run, which goes on if it was suspended; `wakes`
/// brings the run's own job to the junction, and whoever has that in hand loses it.
/// Locks go node, the run's job, run.
pub async fn hold(
    tx: &mut PgConnection,
    lease: Lease,
    (company, run, run_job): (CompanyId, RunId, i64),
    wakes: bool,
) -> Result<Held, StoreError> {
    let held = sqlx::query_scalar!(
        "select id from jobs where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' for update",
        lease.job,
        lease.epoch,
        lease.session,
    )
    .fetch_optional(&mut *tx)
    .await?;
    if held.is_none() {
        return Ok(Held::Lost);
    }
    if wakes {
        sqlx::query!(
            "update jobs
             set state = 'ready', due_at = now(), lease_epoch = lease_epoch + 1, session_id = null, deadline_at = null,
                 attempt = 0, crash_count = least(crash_count, 2)
             where id = $1 and step = -1",
            run_job,
        )
        .execute(&mut *tx)
        .await?;
    }
    let open = sqlx::query_scalar!(
        r#"select ending is null and status in ('running', 'suspended') as "open!" from runs
           where company_id = $1 and id = $2 for update"#,
        company.0,
        run.0,
    )
    .fetch_optional(&mut *tx)
    .await?;
    if open != Some(true) {
        return Ok(Held::Over);
    }
    sqlx::query!(
        "update runs set status = 'running', waiting_on = null where company_id = $1 and id = $2 and status = 'suspended'",
        company.0,
        run.0,
    )
    .execute(tx)
    .await?;
    Ok(Held::Open)
}

/// What a run waits for at one of its steps.
#[derive(Debug)]
pub struct WaitingRow {
    /// Which run.
    pub run: Uuid,
    /// At which step.
    pub step: i32,
    /// Its gate.
    pub approval: Option<Uuid>,
    /// The event's name.
    pub event: Option<String>,
}

/// What some runs wait for, but for times.
pub async fn waiting(pool: &PgPool, runs: &[(CompanyId, RunId)]) -> Result<Vec<WaitingRow>, StoreError> {
    Ok(sqlx::query_as!(
        WaitingRow,
        r#"select k.run_id as "run!", w.step as "step!", w.approval, w.event
           from unnest($1::uuid[], $2::uuid[]) as k (company_id, run_id)
           cross join lateral (
               select a.step, a.id as approval, null::text as event from approvals a
               where a.run_id = k.run_id and a.company_id = k.company_id and a.status = 'pending'
               union all
               select w.step, null, w.name from waits w
               where w.run_id = k.run_id and w.company_id is not distinct from k.company_id and w.signal_id is null
           ) w"#,
        &runs.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &runs.iter().map(|(_, run)| run.0).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?)
}

/// The steps of some runs whose gates were opened, with their runs.
pub async fn opened(pool: &PgPool, runs: &[(CompanyId, RunId)]) -> Result<Vec<(Uuid, i32)>, StoreError> {
    let rows = sqlx::query!(
        r#"select k.run_id as "run!", a.step as "step!"
           from unnest($1::uuid[], $2::uuid[]) as k (company_id, run_id)
           cross join lateral (
               select distinct on (a.step) a.step, a.status from approvals a
               where a.run_id = k.run_id and a.company_id = k.company_id and not a.context ? 'rubric'
               order by a.step, a.id desc
           ) a
           where a.status = 'approved'"#,
        &runs.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &runs.iter().map(|(_, run)| run.0).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (row.run, row.step)).collect())
}

/// Steps of a run that is locked wait no more; those that somebody has in hand are left
/// to him. The gates that were closed with them.
pub async fn withdraw(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    steps: &[i32],
    by: &str,
) -> Result<Vec<ApprovalId>, StoreError> {
    let gates = sqlx::query_scalar!(
        "with waiting as (
             select j.id, j.step from jobs j
             where j.id = any (
                     select s.job_id from run_steps s where s.company_id = $1 and s.run_id = $2 and s.step = any ($3)
                 )
                 and j.step = any ($3) and j.state <> 'running'
             for update of j skip locked
         ),
         job as (
             delete from jobs using waiting where jobs.id = waiting.id
         ),
         row as (
             update run_steps s set status = 'cancelled', ended_at = clock_timestamp()
             from waiting
             where s.company_id = $1 and s.run_id = $2 and s.step = waiting.step
         ),
         wait as (
             delete from waits w using waiting where w.run_id = $2 and w.step = waiting.step
         )
         update approvals a set status = 'cancelled', decided_at = clock_timestamp(), decided_by = $4
         from waiting
         where a.company_id = $1 and a.run_id = $2 and a.step = waiting.step and a.status = 'pending'
         returning a.id",
        company.0,
        run.0,
        steps,
        by,
    )
    .fetch_all(tx)
    .await?;
    Ok(gates.into_iter().map(ApprovalId).collect())
}

/// Locks the nodes of a run that are open, before its own job: whoever ends a run by
/// hand comes in the same order as they do.
pub async fn lock_all(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<(), StoreError> {
    sqlx::query!(
        "select from jobs
         where id in (
             select s.job_id from run_steps s
             join runs r on r.company_id = s.company_id and r.id = s.run_id
             where s.company_id = $1 and s.run_id = $2 and s.job_id <> r.job_id
                 and s.status in ('pending', 'running', 'waiting', 'pending_approval')
         )
         order by id
         for update",
        company.0,
        run.0,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The nodes of a run that has ended, or is about to be closed, go, and their leases
/// with them. One that has begun since the others were locked, and is in somebody's
/// hand, goes with that.
pub async fn drop_all(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<(), StoreError> {
    sqlx::query!(
        "with node as (
             select j.id from jobs j
             where j.id in (
                 select s.job_id from run_steps s
                 join runs r on r.company_id = s.company_id and r.id = s.run_id
                 where s.company_id = $1 and s.run_id = $2 and s.job_id <> r.job_id
                     and s.status in ('pending', 'running', 'waiting', 'pending_approval')
             )
             for update skip locked
         ),
         row as (
             update run_steps set status = 'cancelled', ended_at = clock_timestamp()
             where company_id = $1 and run_id = $2
                 and status in ('pending', 'running', 'waiting', 'pending_approval')
         )
         delete from jobs using node where jobs.id = node.id",
        company.0,
        run.0,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Of a failed run, what was withdrawn, and those of some steps that have failed, are as
/// if they had not begun; which those are.
pub async fn reset(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    steps: &[i32],
) -> Result<Vec<i32>, StoreError> {
    Ok(sqlx::query_scalar!(
        "update run_steps set status = 'pending', job_id = null, ended_at = null
         where company_id = $1 and run_id = $2
             and (status = 'cancelled' or (status = 'failed' and step = any ($3)))
         returning step",
        company.0,
        run.0,
        steps,
    )
    .fetch_all(tx)
    .await?)
}
