//! What people are asked about tasks.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::millis;
use crate::domain::ids::{CompanyId, TaskId};
use crate::domain::playbook::model::Approval;

/// A question about a task.
#[derive(Debug, Clone)]
pub struct Ask {
    /// Whose.
    pub company: CompanyId,
    /// About which.
    pub task: TaskId,
    /// When it decides itself.
    pub expires_at: DateTime<Utc>,
    /// `reject`, `approve` or `escalate`.
    pub on_timeout: String,
    /// Who may decide; anybody with the scope without.
    pub reviewers: Option<Vec<String>>,
    /// Since when anybody may.
    pub escalated_at: Option<DateTime<Utc>>,
    /// By whom it was decided.
    pub decided_by: Option<String>,
}

/// Asks about a task, or once more.
pub async fn insert(
    tx: &mut PgConnection,
    (company, task): (CompanyId, TaskId),
    how: &Approval,
    escalates_after: Option<std::time::Duration>,
) -> Result<(), StoreError> {
    let reviewers = (!how.reviewers.is_empty()).then_some(how.reviewers.as_slice());
    sqlx::query!(
        "insert into task_asks as a (company_id, task_id, expires_at, on_timeout, reviewers, escalates_at)
         values ($1, $2, clock_timestamp() + $3::bigint * interval '1 millisecond', $4, $5,
             clock_timestamp() + $6::bigint * interval '1 millisecond')
         on conflict (company_id, task_id) do update
         set asked_at = clock_timestamp(), expires_at = excluded.expires_at, on_timeout = excluded.on_timeout,
             reviewers = excluded.reviewers, escalates_at = excluded.escalates_at, escalated_at = null, reminded = 0,
             decided_at = null, decided_by = null",
        company.0,
        task.0,
        millis(how.timeout),
        how.on_timeout.as_str(),
        reviewers,
        escalates_after.map(millis),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The questions about some tasks.
pub async fn some(tx: &mut PgConnection, tasks: &[(CompanyId, TaskId)]) -> Result<Vec<Ask>, StoreError> {
    let rows = sqlx::query!(
        "select a.company_id, a.task_id, a.expires_at, a.on_timeout, a.reviewers, a.escalated_at, a.decided_by
         from unnest($1::uuid[], $2::uuid[]) as k (company_id, task_id)
         join task_asks a on a.company_id = k.company_id and a.task_id = k.task_id",
        &tasks.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &tasks.iter().map(|(_, task)| task.0).collect::<Vec<_>>(),
    )
    .fetch_all(tx)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Ask {
            company: CompanyId(row.company_id),
            task: TaskId(row.task_id),
            expires_at: row.expires_at,
            on_timeout: row.on_timeout,
            reviewers: row.reviewers,
            escalated_at: row.escalated_at,
            decided_by: row.decided_by,
        })
        .collect())
}

/// Somebody has decided, or nobody needs to any more.
pub async fn decided(tx: &mut PgConnection, company: CompanyId, task: TaskId, by: &str) -> Result<(), StoreError> {
    sqlx::query!(
        "update task_asks set decided_at = clock_timestamp(), decided_by = $3
         where company_id = $1 and task_id = $2 and decided_at is null",
        company.0,
        task.0,
        by,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// So many are looked at together.
pub const LOOK_MAX: i64 = 100;

/// Questions whose time is over; some of them.
pub async fn expired(pool: &PgPool) -> Result<Vec<(CompanyId, TaskId)>, StoreError> {
    let rows = sqlx::query!(
        "select company_id, task_id from task_asks
         where decided_at is null and expires_at <= clock_timestamp() order by expires_at limit $1",
        LOOK_MAX,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (CompanyId(row.company_id), TaskId(row.task_id))).collect())
}

/// Whether the time of a question is over, under its lock; of what nobody was asked it never is.
pub async fn is_over(tx: &mut PgConnection, company: CompanyId, task: TaskId) -> Result<bool, StoreError> {
    let over = sqlx::query_scalar!(
        r#"select expires_at <= clock_timestamp() as "over!" from task_asks
           where company_id = $1 and task_id = $2 and decided_at is null for update"#,
        company.0,
        task.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(over.unwrap_or(false))
}

/// What is decided about a question whose time is over, under the lock of its task; nothing when it
/// is not, or somebody was quicker.
pub async fn lock_expired(
    tx: &mut PgConnection,
    company: CompanyId,
    task: TaskId,
) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select case when on_timeout = 'escalate' and escalated_at is not null then 'reject' else on_timeout end as "what!"
           from task_asks
           where company_id = $1 and task_id = $2 and decided_at is null and expires_at <= clock_timestamp()
           for update"#,
        company.0,
        task.0,
    )
    .fetch_optional(tx)
    .await?)
}

/// Anybody may decide from now on, within as much time again.
pub async fn escalate(tx: &mut PgConnection, company: CompanyId, task: TaskId) -> Result<(), StoreError> {
    sqlx::query!(
        "update task_asks set escalated_at = clock_timestamp(), expires_at = clock_timestamp() + (expires_at - asked_at)
         where company_id = $1 and task_id = $2",
        company.0,
        task.0,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A question that people are reminded of.
#[derive(Debug)]
pub struct Reminder {
    /// Whose.
    pub company: CompanyId,
    /// About which task.
    pub task: Uuid,
    /// Of how much of its time, in percent.
    pub percent: i16,
    /// When it decides itself.
    pub expires_at: DateTime<Utc>,
    /// Who may decide.
    pub reviewers: Option<Vec<String>>,
    /// Anybody may from now on.
    pub escalated: bool,
}

/// Takes questions of whose time half has passed, or nine tenths, and those about which anybody may
/// decide now.
pub async fn take_reminders(tx: &mut PgConnection) -> Result<Vec<Reminder>, StoreError> {
    let rows = sqlx::query!(
        r#"with due as materialized (
               select company_id, task_id, s.percent,
                   coalesce(escalates_at < clock_timestamp() and escalated_at is null, false) as escalates
               from task_asks a
               cross join lateral (
                   select case
                       when clock_timestamp() > a.asked_at + (a.expires_at - a.asked_at) * 0.9 then 90
                       when clock_timestamp() > a.asked_at + (a.expires_at - a.asked_at) * 0.5 then 50
                       else 0
                   end::smallint as percent
               ) s
               where a.decided_at is null
                   and (s.percent > a.reminded or (a.escalates_at < clock_timestamp() and a.escalated_at is null))
               order by a.task_id limit $1
               for update of a skip locked
           )
           update task_asks a
           set reminded = greatest(a.reminded, due.percent),
               escalated_at = case when due.escalates then clock_timestamp() else a.escalated_at end
           from due where a.company_id = due.company_id and a.task_id = due.task_id
           returning a.company_id, a.task_id, a.reminded, a.expires_at, a.reviewers, due.escalates as "escalates!""#,
        LOOK_MAX,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Reminder {
            company: CompanyId(row.company_id),
            task: row.task_id,
            percent: row.reminded,
            expires_at: row.expires_at,
            reviewers: row.reviewers,
            escalated: row.escalates,
        })
        .collect())
}
