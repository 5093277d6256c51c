//! Gates that wait for a person.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use super::jobs::{Lease, millis};
use crate::domain::ids::{AccountId, AgentId, ApprovalId, CompanyId, DeadLetterId, RunId, TaskId};
use crate::domain::plan::Refusal;
use crate::domain::playbook::model::OnTimeout;

/// A gate to be.
#[derive(Debug, Clone)]
pub struct NewApproval {
    /// Its id.
    pub approval: ApprovalId,
    /// Whose.
    pub company: CompanyId,
    /// Which run waits.
    pub run: RunId,
    /// Before which step.
    pub step: i32,
    /// The job that ends the wait.
    pub job: i64,
    /// Who asks.
    pub agent: Option<AgentId>,
    /// In which role.
    pub role: Option<String>,
    /// To do what.
    pub action: String,
    /// In which playbook.
    pub playbook: String,
    /// The step's own name.
    pub step_name: String,
    /// Exactly what is shown.
    pub context: Value,
    /// SHA-256 of that.
    pub digest: [u8; 32],
    /// When it decides itself.
    pub timeout: std::time::Duration,
    /// Who may decide; empty for anybody.
    pub reviewers: Vec<String>,
    /// What is decided at the end of its time.
    pub on_timeout: &'static str,
    /// When anybody may decide.
    pub escalates_after: Option<std::time::Duration>,
    /// The call that it is about.
    pub call: Option<String>,
    /// It is about an item of a list.
    pub in_list: bool,
}

/// Stores a gate.
pub async fn insert(executor: impl Executor<'_, Database = Postgres>, new: &NewApproval) -> Result<(), StoreError> {
    sqlx::query!(
        "with step as (
             insert into run_steps (company_id, run_id, step, status, agent_id)
             select $2, $3, $4, 'pending_approval', $6 where $18
             -- A loop has come here before.
             on conflict (company_id, run_id, step) do update
             set status = excluded.status, agent_id = excluded.agent_id, ended_at = null
         )
         insert into approvals (id, company_id, run_id, step, job_id, status, agent_id, role, action, playbook,
                                step_name, context, digest, expires_at, reviewers, on_timeout, escalates_at, call_key)
         values ($1, $2, $3, $4, $5, 'pending', $6, $7, $8, $9, $10, $11, $12,
                 now() + $13::bigint * interval '1 millisecond', nullif($14::text[], '{}'), $15,
                 now() + $16::bigint * interval '1 millisecond', $17)",
        new.approval.0,
        new.company.0,
        new.run.0,
        new.step,
        new.job,
        new.agent.map(|a| a.0),
        new.role,
        new.action,
        new.playbook,
        new.step_name,
        new.context,
        &new.digest[..],
        millis(new.timeout),
        &new.reviewers,
        new.on_timeout,
        new.escalates_after.map(millis),
        new.call,
        // Of a list, the others go on.
        !new.in_list,
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// The job of an item becomes the timer of the gate that its agent waits at; false when the lease
/// is gone.
pub async fn park_item(tx: &mut PgConnection, lease: Lease, timeout: std::time::Duration) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update jobs
         set kind = 'gate_timeout', state = 'scheduled', due_at = now() + $4::bigint * interval '1 millisecond',
             lease_epoch = lease_epoch + 1, attempt = 0, session_id = null, deadline_at = null
         where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' and item is not null",
        lease.job,
        lease.epoch,
        lease.session,
        millis(timeout),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Nobody needs to decide any more about calls of runs that are over: some of those. What waits for
/// a person in a list has a job of its own, which the run's end leaves alone.
pub async fn cancel_orphans(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "update approvals set status = 'cancelled', decided_at = clock_timestamp(), decided_by = 'system'
         where (company_id, id) in (
             select a.company_id, a.id
             from (select * from approvals where status = 'pending' and call_key is not null offset 0) a
             cross join lateral (
                 select r.ended_at from runs r where r.company_id = a.company_id and r.id = a.run_id offset 0
             ) r
             where r.ended_at is not null
             limit 100
         ) and status = 'pending'",
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// A gate as people read it.
#[derive(Debug, Clone)]
pub struct ApprovalRow {
    /// Which.
    pub approval: ApprovalId,
    /// Whose.
    pub company: CompanyId,
    /// Which run waits.
    pub run: RunId,
    /// Before which step.
    pub step: i32,
    /// The job that ends the wait.
    pub job: i64,
    /// `pending`, `approved`, `rejected`, `expired` or `cancelled`.
    pub status: String,
    /// Who asks.
    pub agent: Option<AgentId>,
    /// In which role.
    pub role: Option<String>,
    /// To do what.
    pub action: String,
    /// In which playbook.
    pub playbook: String,
    /// The step's own name.
    pub step_name: String,
    /// Exactly what is shown.
    pub context: Value,
    /// When it was asked.
    pub proposed_at: DateTime<Utc>,
    /// When it decides itself.
    pub expires_at: DateTime<Utc>,
    /// When it was decided.
    pub decided_at: Option<DateTime<Utc>>,
    /// By which key.
    pub decided_by: Option<String>,
    /// What was said with it.
    pub note: Option<String>,
    /// Who may decide, where not anybody may.
    pub reviewers: Option<Vec<String>>,
    /// Since when anybody may, since nobody did.
    pub escalated_at: Option<DateTime<Utc>>,
    /// What is decided at the end of its time.
    pub on_timeout: Option<OnTimeout>,
    /// The call that it is about.
    pub call: Option<String>,
    /// The arguments that a person wanted instead.
    pub edited: Option<Value>,
    /// SHA-256 of what is shown.
    pub digest: Vec<u8>,
}

macro_rules! approval_row {
    ($row:expr) => {{
        let row = $row;
        ApprovalRow {
            approval: ApprovalId(row.id),
            company: CompanyId(row.company_id),
            run: RunId(row.run_id),
            step: row.step,
            job: row.job_id,
            status: row.status,
            agent: row.agent_id.map(AgentId),
            role: row.role,
            action: row.action,
            playbook: row.playbook,
            step_name: row.step_name,
            context: row.context,
            proposed_at: row.proposed_at,
            expires_at: row.expires_at,
            decided_at: row.decided_at,
            decided_by: row.decided_by,
            note: row.note,
            reviewers: row.reviewers,
            escalated_at: row.escalated_at,
            on_timeout: row.on_timeout.as_deref().and_then(OnTimeout::from_name),
            call: row.call_key,
            edited: row.edited,
            digest: row.digest,
        }
    }};
}

/// An approval that an account sees, of one company where the caller is bound
/// to it.
pub async fn get(
    executor: impl Executor<'_, Database = Postgres>,
    account: AccountId,
    bound: Option<CompanyId>,
    approval: ApprovalId,
) -> Result<Option<ApprovalRow>, StoreError> {
    let row = sqlx::query!(
        "select a.id, a.company_id, a.run_id, a.step, a.job_id, a.status, a.agent_id, a.role, a.action, a.playbook,
                a.step_name, a.context, a.proposed_at, a.expires_at, a.decided_at, a.decided_by, a.note, a.reviewers, a.escalated_at,
                a.on_timeout, a.call_key, a.edited, a.digest
         from (select * from approvals where id = $1 offset 0) a
         join companies c on c.id = a.company_id
         where c.account_id = $2 and a.company_id = coalesce($3, a.company_id)",
        approval.0,
        account.0,
        bound.map(|company| company.0),
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| approval_row!(row)))
}

/// What picks approvals.
#[derive(Debug, Clone, Copy, Default)]
pub struct Filter<'a> {
    /// Of one company.
    pub company: Option<CompanyId>,
    /// By status.
    pub status: Option<&'a str>,
    /// Older than this one.
    pub before: Option<Uuid>,
}

/// What a person was asked for: to open a gate, or to let a task be done.
#[derive(Debug, Clone)]
pub enum Asked {
    /// A gate's approval.
    Gate(ApprovalId),
    /// A task.
    Task(TaskId),
}

/// A page of what a person was asked for in the companies that an account sees,
/// newest first: which, and of which company.
pub async fn list(
    executor: impl Executor<'_, Database = Postgres>,
    account: AccountId,
    filter: Filter<'_>,
    limit: i64,
) -> Result<Vec<(CompanyId, Asked)>, StoreError> {
    let rows = sqlx::query!(
        r#"select x.company_id as "company_id!", x.id as "id!", x.is_task as "is_task!"
           from companies c
           cross join lateral (
               (select a.company_id, a.id, false as is_task from approvals a
                where a.company_id = c.id and ($3::text is null or a.status = $3) and ($4::uuid is null or a.id < $4)
                order by a.id desc limit $5)
               union all
               (select t.company_id, t.id, true from tasks t
                where t.company_id = c.id and t.approval is not null
                    and ($3::text is null or t.approval = $3) and ($4::uuid is null or t.id < $4)
                order by t.id desc limit $5)
           ) x
           where c.account_id = $1 and ($2::uuid is null or c.id = $2)
           order by x.id desc
           limit $5"#,
        account.0,
        filter.company.map(|c| c.0),
        filter.status,
        filter.before,
        limit,
    )
    .fetch_all(executor)
    .await?;
    let asked = |id, is_task| if is_task { Asked::Task(TaskId(id)) } else { Asked::Gate(ApprovalId(id)) };
    Ok(rows.into_iter().map(|row| (CompanyId(row.company_id), asked(row.id, row.is_task))).collect())
}

/// Some approvals by their companies and ids, in no order.
pub async fn some(
    executor: impl Executor<'_, Database = Postgres>,
    approvals: &[(CompanyId, ApprovalId)],
) -> Result<Vec<ApprovalRow>, StoreError> {
    let rows = sqlx::query!(
        "select a.id, a.company_id, a.run_id, a.step, a.job_id, a.status, a.agent_id, a.role, a.action, a.playbook,
                a.step_name, a.context, a.proposed_at, a.expires_at, a.decided_at, a.decided_by, a.note, a.reviewers, a.escalated_at,
                a.on_timeout, a.call_key, a.edited, a.digest
         from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
         join approvals a on a.company_id = k.company_id and a.id = k.id",
        &approvals.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &approvals.iter().map(|(_, approval)| approval.0).collect::<Vec<_>>(),
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| approval_row!(row)).collect())
}

/// The gates that a run waits at: which, since when and until when.
pub async fn pending_of_run(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
) -> Result<Vec<(ApprovalId, DateTime<Utc>, DateTime<Utc>)>, StoreError> {
    let rows = sqlx::query!(
        "select id, proposed_at, expires_at from (select * from approvals where run_id = $2 offset 0) a
         where company_id = $1 and status = 'pending'
         order by step",
        company.0,
        run.0,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| (ApprovalId(row.id), row.proposed_at, row.expires_at)).collect())
}

/// The pending gate before a step, for the end of its time.
pub async fn pending_of(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
    (step, job): (i32, i64),
) -> Result<Option<ApprovalId>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select id from (select * from approvals where run_id = $2 and step = $3 offset 0) a
         -- Items of a list have a job each.
         where company_id = $1 and status = 'pending' and (call_key is null or job_id = $4)",
        company.0,
        run.0,
        step,
        job,
    )
    .fetch_optional(executor)
    .await?
    .map(ApprovalId))
}

/// The last gate before a step, whatever became of it. One about what the step has said
/// is none.
pub async fn latest_of(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    step: i32,
) -> Result<Option<(ApprovalId, String)>, StoreError> {
    let row = sqlx::query!(
        "select id, status from approvals
         where run_id = $1 and step = $2 and company_id = $3 and not context ? 'rubric' and call_key is null
         order by id desc limit 1",
        run.0,
        step,
        company.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| (ApprovalId(row.id), row.status)))
}

/// The gates that stayed shut, by run and step: of each step the last one before it, or
/// the last about what it has said.
pub async fn refusals(
    pool: &PgPool,
    steps: &[(CompanyId, RunId, i32, bool)],
) -> Result<Vec<((Uuid, i32), Refusal)>, StoreError> {
    let rows = sqlx::query!(
        r#"select k.run_id as "run!", k.step as "step!", a.id, a.status, a.note
         from unnest($1::uuid[], $2::uuid[], $3::integer[], $4::boolean[]) as k (company_id, run_id, step, of_draft)
         cross join lateral (
             select a.* from approvals a
             where a.run_id = k.run_id and a.step = k.step and a.company_id = k.company_id
                 and (a.context ? 'rubric') = k.of_draft and a.call_key is null
             order by a.id desc limit 1
         ) a
         where a.status in ('rejected', 'expired')"#,
        &steps.iter().map(|(company, ..)| company.0).collect::<Vec<_>>(),
        &steps.iter().map(|(_, run, ..)| run.0).collect::<Vec<_>>(),
        &steps.iter().map(|(.., step, _)| *step).collect::<Vec<_>>(),
        &steps.iter().map(|(.., of_draft)| *of_draft).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?;
    let refusal = |id, status, words| Refusal { approval: ApprovalId(id), status, words };
    Ok(rows.into_iter().map(|row| ((row.run, row.step), refusal(row.id, row.status, row.note))).collect())
}

/// Asks again what a gate has asked, word for word.
pub async fn ask_again(
    tx: &mut PgConnection,
    company: CompanyId,
    old: ApprovalId,
    new: ApprovalId,
    job: i64,
    timeout: std::time::Duration,
) -> Result<Option<Value>, StoreError> {
    Ok(sqlx::query_scalar!(
        "insert into approvals (id, company_id, run_id, step, job_id, status, agent_id, role, action, playbook,
                                step_name, context, digest, expires_at, reviewers, on_timeout, escalates_at)
         select $3, company_id, run_id, step, $4, 'pending', agent_id, role, action, playbook, step_name, context, digest,
             now() + $5::bigint * interval '1 millisecond', reviewers, on_timeout, now() + (escalates_at - proposed_at)
         from approvals where company_id = $1 and id = $2
         returning context",
        company.0,
        old.0,
        new.0,
        job,
        millis(timeout),
    )
    .fetch_optional(tx)
    .await?)
}

/// Decides a gate that is still pending, with what was said and edited; false when somebody
/// else has.
pub async fn decide(
    tx: &mut PgConnection,
    company: CompanyId,
    approval: ApprovalId,
    by: &str,
    (status, note, edited): (&str, Option<&str>, Option<&Value>),
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update approvals set status = $3, decided_at = clock_timestamp(), decided_by = $4, note = $5, edited = $6
         where company_id = $1 and id = $2 and status = 'pending'
             -- A word that comes after the end waits for the timer to say so. By
             -- the clock, under the job's lock: a transaction that began earlier
             -- may come later, and must not decide what another found over.
             and ($3 = 'expired' or $4 = 'system' or expires_at > clock_timestamp())",
        company.0,
        approval.0,
        status,
        by,
        note,
        edited,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// How many gates people are reminded of at once.
pub const REMIND_MAX: i64 = 500;

/// A gate that people are reminded of.
#[derive(Debug, Clone)]
pub struct Reminder {
    /// Whose.
    pub company: CompanyId,
    /// Which.
    pub approval: ApprovalId,
    /// Which run waits.
    pub run: RunId,
    /// So much of its time has passed, in percent.
    pub percent: i16,
    /// When it decides itself.
    pub expires_at: DateTime<Utc>,
    /// Who may decide.
    pub reviewers: Option<Vec<String>>,
    /// From now on anybody may.
    pub escalated: bool,
}

/// Takes gates of whose time half has passed, or nine tenths, and those about which anybody
/// may decide now, since nobody has in the time that the policy names.
pub async fn take_reminders(tx: &mut PgConnection) -> Result<Vec<Reminder>, StoreError> {
    let rows = sqlx::query!(
        r#"with due as materialized (
               select company_id, id, s.percent,
                   coalesce(escalates_at < clock_timestamp(), false) and escalated_at is null as escalates
               from approvals a
               cross join lateral (
                   select case
                       when clock_timestamp() > a.proposed_at + (a.expires_at - a.proposed_at) * 0.9 then 90
                       when clock_timestamp() > a.proposed_at + (a.expires_at - a.proposed_at) * 0.5 then 50
                       else 0
                   end::smallint as percent
               ) s
               where a.status = 'pending'
                   and (s.percent > a.reminded or (a.escalates_at < clock_timestamp() and a.escalated_at is null))
               order by a.id limit $1
               for update of a skip locked
           )
           update approvals a
           set reminded = greatest(a.reminded, due.percent),
               escalated_at = case when due.escalates then clock_timestamp() else a.escalated_at end
           from due where a.company_id = due.company_id and a.id = due.id
           returning a.company_id, a.id, a.run_id, a.reminded, a.expires_at, a.reviewers, due.escalates as "escalates!""#,
        REMIND_MAX,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Reminder {
            company: CompanyId(row.company_id),
            approval: ApprovalId(row.id),
            run: RunId(row.run_id),
            percent: row.reminded,
            expires_at: row.expires_at,
            reviewers: row.reviewers,
            escalated: row.escalates,
        })
        .collect())
}

/// Anybody may decide from now on, within as much time again: the gate's timer starts
/// anew. False when it has done so before, or somebody was quicker.
pub async fn escalate(
    tx: &mut PgConnection,
    company: CompanyId,
    approval: ApprovalId,
    lease: Lease,
    timeout: std::time::Duration,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "with gate as (
             update approvals
             set escalated_at = clock_timestamp(), expires_at = clock_timestamp() + $6::bigint * interval '1 millisecond'
             where company_id = $1 and id = $2 and status = 'pending' and escalated_at is null
             returning job_id
         )
         update jobs
         set state = 'scheduled', due_at = now() + $6 * interval '1 millisecond', lease_epoch = lease_epoch + 1,
             attempt = 0, session_id = null, deadline_at = null
         where id = (select job_id from gate) and id = $3 and lease_epoch = $4 and session_id = $5",
        company.0,
        approval.0,
        lease.job,
        lease.epoch,
        lease.session,
        millis(timeout),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Nobody needs to decide any more about a run that is cancelled.
pub async fn cancel_of(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    by: &str,
) -> Result<Vec<ApprovalId>, StoreError> {
    let gates = sqlx::query_scalar!(
        "update approvals set status = 'cancelled', decided_at = clock_timestamp(), decided_by = $3
         where company_id = $1 and run_id = $2 and status = 'pending' returning id",
        company.0,
        run.0,
        by,
    )
    .fetch_all(tx)
    .await?;
    Ok(gates.into_iter().map(ApprovalId).collect())
}

/// Locks the job that waits at a gate: every use case takes job, then run.
/// `None` when it waits no more. With a lease, only under that lease.
pub async fn lock_gate_job(
    tx: &mut PgConnection,
    job: i64,
    lease: Option<Lease>,
) -> Result<Option<GateJob>, StoreError> {
    let found = sqlx::query_scalar!(
        "select item from jobs
         where id = $1 and kind = 'gate_timeout'
             and ($2::bigint is null or (lease_epoch = $2 and session_id = $3))
         for update",
        job,
        lease.map(|l| l.epoch),
        lease.map(|l| l.session),
    )
    .fetch_optional(tx)
    .await?;
    Ok(found.map(|item| if item.is_some() { GateJob::OfItem } else { GateJob::OfStep }))
}

/// What waits at a gate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GateJob {
    /// The step.
    OfStep,
    /// An item of its list, and the others go on.
    OfItem,
}

/// The gate is open: its job becomes the step's, ready at once, under a new
/// epoch, so that a timer that is just firing has lost its lease.
pub async fn release_gate_job(tx: &mut PgConnection, job: i64, timeout: std::time::Duration) -> Result<(), StoreError> {
    sqlx::query!(
        "update jobs
         set kind = case when item is null then 'step' else 'item' end, state = 'ready', due_at = now(),
             lease_epoch = lease_epoch + 1, attempt = 0, crash_count = 0,
             session_id = null, deadline_at = null, timeout_ms = $2
         where id = $1",
        job,
        millis(timeout),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Drops a job whose run is over.
pub async fn delete_job(tx: &mut PgConnection, job: i64) -> Result<(), StoreError> {
    sqlx::query!("delete from jobs where id = $1", job).execute(tx).await?;
    Ok(())
}

/// A run goes on, if it was suspended, at a step that waited for a person.
/// `reviewed` notes that a person has let it begin to have effects.
pub async fn resume_run(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    step: i32,
    reviewed: bool,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update runs set status = 'running', waiting_on = null, reviewed = reviewed or $3
         where company_id = $1 and id = $2 and status = 'suspended'",
        company.0,
        run.0,
        reviewed,
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "update run_steps set status = 'pending'
         where company_id = $1 and run_id = $2 and step = $3 and status = 'pending_approval'",
        company.0,
        run.0,
        step,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A suspended run ends because its gate stayed shut.
pub async fn fail_run(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    step: i32,
    error: &Value,
) -> Result<bool, StoreError> {
    sqlx::query!(
        "update run_steps set status = 'failed', error = $4, ended_at = clock_timestamp()
         where company_id = $1 and run_id = $2 and step = $3 and status = 'pending_approval'",
        company.0,
        run.0,
        step,
        error,
    )
    .execute(&mut *tx)
    .await?;
    let done = sqlx::query!(
        "with ended as (
             update runs set status = 'failed', waiting_on = null, error = $3, ended_at = clock_timestamp()
             where company_id = $1 and id = $2 and status = 'suspended'
             returning company_id, playbook_id, cost_nanos, started_at, ended_at
         )
         insert into run_deltas (company_id, playbook_id, started, ended, cost_nanos, duration_ms)
         select company_id, playbook_id, 0, 1, cost_nanos,
             coalesce(extract(epoch from ended_at - started_at) * 1000, 0)::bigint
         from ended",
        company.0,
        run.0,
        error,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// A job that gave up, with the evidence.
#[derive(Debug, Clone)]
pub struct NewDeadLetter {
    /// Whose.
    pub company: CompanyId,
    /// Where it came from.
    pub queue: String,
    /// What it was.
    pub kind: String,
    /// What it was about.
    pub ref_id: Option<Uuid>,
    /// Which step of that.
    pub step: i32,
    /// Why it gave up.
    pub reason: &'static str,
    /// Tries charged.
    pub attempt: i32,
    /// Deaths of workers.
    pub crash_count: i32,
    /// What went wrong last.
    pub error: Value,
}

/// Keeps a dead letter.
pub async fn bury_letter(
    executor: impl Executor<'_, Database = Postgres>,
    letter: &NewDeadLetter,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into dead_letters (company_id, id, queue, kind, ref_id, step, reason, attempt, crash_count, error)
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)",
        letter.company.0,
        DeadLetterId::new().0,
        letter.queue,
        letter.kind,
        letter.ref_id,
        letter.step,
        letter.reason,
        letter.attempt,
        letter.crash_count,
        letter.error,
    )
    .execute(executor)
    .await?;
    Ok(())
}
