//! Runs that do a step of another run.

use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::{Lease, millis};
use crate::domain::event::Event;
use crate::domain::ids::{CompanyId, PlaybookId, RunId, TaskId};
use crate::domain::plan::FAN_LOOK;

/// The place of a run that does a step of another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Call {
    /// The other run.
    pub run: RunId,
    /// Whose step it does.
    pub step: i32,
    /// For this item of a list, else -1.
    pub item: i32,
    /// How often the other run had jumped.
    pub round: i32,
}

/// A run that does a step.
#[derive(Debug)]
pub struct ChildRow {
    /// The place in the question.
    pub place: i64,
    /// Which.
    pub child: Uuid,
    /// How it stands.
    pub status: String,
    /// What it has come to.
    pub output: Option<Value>,
    /// Why it failed.
    pub error: Option<Value>,
}

/// The runs that do some steps at an attempt, by their place in the question.
pub async fn load(pool: &PgPool, calls: &[(CompanyId, Call, i32)]) -> Result<Vec<ChildRow>, StoreError> {
    Ok(sqlx::query_as!(
        ChildRow,
        r#"select k.place as "place!", r.id as "child!", r.status as "status!", r.output, r.error
           from unnest($1::uuid[], $2::uuid[], $3::integer[], $4::integer[], $5::integer[], $6::integer[])
               with ordinality as k (company_id, run_id, step, item, round, attempt, place)
           cross join lateral (
               select c.child_id from run_children c
               where c.company_id = k.company_id and c.run_id = k.run_id and c.step = k.step and c.item = k.item
                   and c.round = k.round and c.attempt = k.attempt
               order by c.child_id desc limit 1
           ) c
           cross join lateral (
               select * from runs r where r.company_id = k.company_id and r.id = c.child_id offset 0
           ) r"#,
        &calls.iter().map(|(company, ..)| company.0).collect::<Vec<_>>(),
        &calls.iter().map(|(_, call, _)| call.run.0).collect::<Vec<_>>(),
        &calls.iter().map(|(_, call, _)| call.step).collect::<Vec<_>>(),
        &calls.iter().map(|(_, call, _)| call.item).collect::<Vec<_>>(),
        &calls.iter().map(|(_, call, _)| call.round).collect::<Vec<_>>(),
        &calls.iter().map(|(.., attempt)| *attempt).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?)
}

/// Locks the job of a step by its lease, and lets it wait at no cost for what does the
/// step; false when the lease is gone.
pub async fn park(tx: &mut PgConnection, lease: Lease) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update jobs
         set state = 'scheduled', due_at = now() + $4::bigint * interval '1 millisecond', lease_epoch = lease_epoch + 1,
             attempt = greatest(attempt - 1, 0), session_id = null, deadline_at = null
         where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running'",
        lease.job,
        lease.epoch,
        lease.session,
        millis(FAN_LOOK),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The caller goes on at once: what it waits for is over.
pub async fn unpark(tx: &mut PgConnection, job: i64) -> Result<(), StoreError> {
    sqlx::query!("update jobs set state = 'ready', due_at = now() where id = $1 and state = 'scheduled'", job)
        .execute(tx)
        .await?;
    Ok(())
}

/// The last failed run that has done a step before, to be gone on with.
pub async fn failed(tx: &mut PgConnection, company: CompanyId, call: Call) -> Result<Option<RunId>, StoreError> {
    let child = sqlx::query_scalar!(
        "select c.child_id from run_children c
         join runs r on r.company_id = c.company_id and r.id = c.child_id
         where c.company_id = $1 and c.run_id = $2 and c.step = $3 and c.item = $4 and c.round = $5 and r.status = 'failed'
         order by c.child_id desc limit 1",
        company.0,
        call.run.0,
        call.step,
        call.item,
        call.round,
    )
    .fetch_optional(tx)
    .await?;
    Ok(child.map(RunId))
}

/// A run does a step from now on, at an attempt whose job waits for it; its depth is
/// one more than that of whom it works for, or more. False when it is over already, and
/// so wakes nobody any more: its row is locked, so that whoever ends it comes before or
/// after this.
pub async fn link(
    tx: &mut PgConnection,
    company: CompanyId,
    call: Call,
    (job, attempt): (i64, i32),
    child: RunId,
    depth: i16,
) -> Result<bool, StoreError> {
    sqlx::query!(
        "insert into run_children (company_id, run_id, step, item, round, attempt, job_id, child_id)
         values ($1, $2, $3, $4, $5, $6, $7, $8)
         on conflict (company_id, run_id, step, item, round, child_id) do update
         set attempt = excluded.attempt, job_id = excluded.job_id",
        company.0,
        call.run.0,
        call.step,
        call.item,
        call.round,
        attempt,
        job,
        child.0,
    )
    .execute(&mut *tx)
    .await?;
    let open = sqlx::query!(
        "update runs
         set called = true, depth = greatest(depth, $3),
             root_id = (select above.root_id from runs above where above.company_id = $1 and above.id = $4)
         where company_id = $1 and id = $2 and status in ('queued', 'running', 'suspended')",
        company.0,
        child.0,
        depth,
        call.run.0,
    )
    .execute(tx)
    .await?;
    Ok(open.rows_affected() == 1)
}

/// Whether a run goes on, and is not being closed; whoever ends it waits for the caller's
/// transaction.
pub async fn goes_on(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<bool, StoreError> {
    let found = sqlx::query_scalar!(
        "select id from runs
         where company_id = $1 and id = $2 and status in ('running', 'suspended') and ending is null
         for share",
        company.0,
        run.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(found.is_some())
}

/// A step is under way, by another run.
pub async fn mark(
    tx: &mut PgConnection,
    (company, run, step, attempt): (CompanyId, RunId, i32, i32),
    job: i64,
    event: &Event,
) -> Result<(), StoreError> {
    sqlx::query!(
        "with run as (
             update runs set event_seq = event_seq + 1 where company_id = $1 and id = $2 returning event_seq
         ),
         event as (
             insert into events (company_id, id, run_id, seq, event, data)
             select $1, $6, $2, event_seq, $7, $8 from run
         )
         insert into run_steps (company_id, run_id, step, status, attempt, job_id, started_at)
         values ($1, $2, $3, 'running', $4, $5, clock_timestamp())
         on conflict (company_id, run_id, step) do update
         set status = 'running', attempt = excluded.attempt, job_id = excluded.job_id, started_at = excluded.started_at,
             ended_at = null",
        company.0,
        run.0,
        step,
        attempt,
        job,
        event.id.0,
        event.name,
        event.data,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// What a run's steps were done by counts no more for its next attempts: they begin
/// others, or let those go on that have failed.
pub async fn forget(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<(), StoreError> {
    sqlx::query!("update run_children set attempt = 0 where company_id = $1 and run_id = $2", company.0, run.0)
        .execute(tx)
        .await?;
    Ok(())
}

/// The open runs that do steps of a run.
pub async fn open_of(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<Vec<RunId>, StoreError> {
    let open = sqlx::query_scalar!(
        "select distinct r.id from run_children c
         join runs r on r.company_id = c.company_id and r.id = c.child_id
         where c.company_id = $1 and c.run_id = $2 and r.status in ('queued', 'running', 'suspended')
         order by r.id",
        company.0,
        run.0,
    )
    .fetch_all(tx)
    .await?;
    Ok(open.into_iter().map(RunId).collect())
}

/// A run was begun by an agent in the course of another: it serves the same directive, and stands
/// below it.
pub async fn follow(
    tx: &mut PgConnection,
    company: CompanyId,
    (child, above): (RunId, RunId),
    depth: i16,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update runs
         set depth = greatest(depth, $4),
             root_id = (select above.root_id from runs above where above.company_id = $1 and above.id = $3)
         where company_id = $1 and id = $2",
        company.0,
        child.0,
        above.0,
        depth,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// How many runs of a company are open that agents have begun; no more than are counted.
pub async fn open_by_agents(tx: &mut PgConnection, company: CompanyId, limit: i64) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from (
               select from runs
               where company_id = $1 and trigger = 'agent' and ended_at is null limit $2
           ) open"#,
        company.0,
        limit,
    )
    .fetch_one(tx)
    .await?)
}

/// The playbooks of the runs that some runs do steps for, at any height: run, playbook, and
/// whether that was stopped at once.
pub async fn above(pool: &PgPool, runs: &[(CompanyId, RunId)]) -> Result<Vec<(Uuid, PlaybookId, bool)>, StoreError> {
    let rows = sqlx::query!(
        r#"with recursive above (company_id, run_id, id) as (
               select k.company_id, k.run_id, k.run_id from unnest($1::uuid[], $2::uuid[]) as k (company_id, run_id)
               union
               select above.company_id, above.run_id, c.run_id from above
               join run_children c on c.child_id = above.id and c.company_id = above.company_id
           )
           select above.run_id as "run_id!", r.playbook_id, p.killed_at is not null as "killed!" from above
           cross join lateral (
               select * from runs r where r.company_id = above.company_id and r.id = above.id offset 0
           ) r
           cross join lateral (
               select * from playbooks p where p.company_id = r.company_id and p.id = r.playbook_id offset 0
           ) p
           where above.id <> above.run_id"#,
        &runs.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &runs.iter().map(|(_, run)| run.0).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (row.run_id, PlaybookId(row.playbook_id), row.killed)).collect())
}

/// The task of the directive that a run serves.
pub async fn root(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<Option<TaskId>, StoreError> {
    let root = sqlx::query_scalar!("select root_id from runs where company_id = $1 and id = $2", company.0, run.0)
        .fetch_optional(tx)
        .await?;
    Ok(root.flatten().map(TaskId))
}

/// How deep a run is below others, by whom it is called.
pub async fn depth(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<Option<i16>, StoreError> {
    Ok(sqlx::query_scalar!("select depth from runs where company_id = $1 and id = $2", company.0, run.0)
        .fetch_optional(tx)
        .await?)
}

/// The playbook of a name, if there is one.
pub async fn playbook(tx: &mut PgConnection, company: CompanyId, name: &str) -> Result<Option<PlaybookId>, StoreError> {
    let found = sqlx::query_scalar!("select id from playbooks where company_id = $1 and name = $2", company.0, name)
        .fetch_optional(tx)
        .await?;
    Ok(found.map(PlaybookId))
}

/// The runs that do steps of a run, and the steps: of each the last.
pub async fn shown(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<Vec<(i32, RunId)>, StoreError> {
    let rows = sqlx::query!(
        "select distinct on (step) step, child_id from run_children
         where company_id = $1 and run_id = $2 and item = -1
         order by step, child_id desc",
        company.0,
        run.0,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().map(|row| (row.step, RunId(row.child_id))).collect())
}

/// The run that a run does a step of, if there is one.
pub async fn caller(tx: &mut PgConnection, company: CompanyId, child: RunId) -> Result<Option<RunId>, StoreError> {
    let found = sqlx::query_scalar!(
        "select run_id from run_children where child_id = $2 and company_id = $1 order by run_id limit 1",
        company.0,
        child.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(found.map(RunId))
}
