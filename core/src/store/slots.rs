//! How many runs of a playbook with one key are under way, and who waits for them.

use sqlx::PgConnection;

use super::StoreError;
use crate::domain::event::Event;
use crate::domain::ids::{CompanyId, PlaybookId, RunId, VersionId};

/// Runs of one playbook with one key.
#[derive(Debug, Clone, Copy)]
pub struct Group<'a> {
    /// Whose.
    pub company: CompanyId,
    /// Of which playbook.
    pub playbook: PlaybookId,
    /// What they have in common.
    pub key: &'a str,
}

/// Whoever decides about a group waits for others that do, until its transaction ends.
/// Taken before any lock of a row.
pub async fn lock(tx: &mut PgConnection, group: Group<'_>) -> Result<(), StoreError> {
    let name = format!("slots {} {}", group.playbook, group.key);
    sqlx::query!("select pg_advisory_xact_lock(hashtextextended($1, 0))", name).execute(tx).await?;
    Ok(())
}

/// How many of a group are under way, and how many wait.
pub async fn count(tx: &mut PgConnection, group: Group<'_>) -> Result<(u64, u64), StoreError> {
    let row = sqlx::query!(
        r#"select count(*) filter (where status <> 'queued') as "running!", count(*) filter (where status = 'queued') as "queued!"
           from runs
           where playbook_id = $1 and concurrency_key = $2 and company_id = $3 and ended_at is null"#,
        group.playbook.0,
        group.key,
        group.company.0,
    )
    .fetch_one(tx)
    .await?;
    Ok((row.running.unsigned_abs(), row.queued.unsigned_abs()))
}

/// The open runs of a group, those that wait or those that are under way, oldest first.
pub async fn open(
    tx: &mut PgConnection,
    group: Group<'_>,
    queued: bool,
    limit: i64,
) -> Result<Vec<(RunId, VersionId)>, StoreError> {
    let rows = sqlx::query!(
        "select id, version_id from runs
         where playbook_id = $1 and concurrency_key = $2 and company_id = $3 and ended_at is null
             and (status = 'queued') = $4
         order by id
         limit $5",
        group.playbook.0,
        group.key,
        group.company.0,
        queued,
        limit,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().map(|row| (RunId(row.id), VersionId(row.version_id))).collect())
}

/// The newest open run of a group: one that waits, else one that is under way.
pub async fn newest(tx: &mut PgConnection, group: Group<'_>) -> Result<Option<RunId>, StoreError> {
    let run = sqlx::query_scalar!(
        "select id from runs
         where playbook_id = $1 and concurrency_key = $2 and company_id = $3 and ended_at is null
         order by (status = 'queued') desc, id desc
         limit 1",
        group.playbook.0,
        group.key,
        group.company.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(run.map(RunId))
}

/// A run that was just made belongs to a group.
pub async fn join(tx: &mut PgConnection, run: RunId, group: Group<'_>) -> Result<(), StoreError> {
    sqlx::query!(
        "update runs set concurrency_key = $3 where company_id = $1 and id = $2",
        group.company.0,
        run.0,
        group.key,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A run that waits begins, if it still waits: by its job, which whoever has it in hand
/// loses. Locks go job, then run.
pub async fn admit(tx: &mut PgConnection, company: CompanyId, run: RunId, started: &Event) -> Result<bool, StoreError> {
    sqlx::query!(
        "select from jobs where id = (select job_id from runs where company_id = $1 and id = $2) for update",
        company.0,
        run.0,
    )
    .fetch_optional(&mut *tx)
    .await?;
    let done = sqlx::query!(
        "with begun as (
             update runs set status = 'running', started_at = clock_timestamp(), event_seq = event_seq + 1
             where company_id = $1 and id = $2 and status = 'queued'
             returning job_id, event_seq
         ),
         event as (
             insert into events (company_id, id, run_id, seq, event, data)
             select $1, $3, $2, event_seq, $4, $5 from begun
         )
         update jobs
         set state = 'ready', due_at = now(), lease_epoch = lease_epoch + 1, session_id = null, deadline_at = null, attempt = 0
         where id = (select job_id from begun)",
        company.0,
        run.0,
        started.id.0,
        started.name,
        started.data,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The group of a run.
pub async fn group_of(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
) -> Result<Option<(PlaybookId, String)>, StoreError> {
    let row = sqlx::query!(
        r#"select playbook_id, concurrency_key as "key!" from runs
           where company_id = $1 and id = $2 and concurrency_key is not null"#,
        company.0,
        run.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| (PlaybookId(row.playbook_id), row.key)))
}

/// Whether a run, or one that waits for it, belongs to a group.
pub async fn holds(tx: &mut PgConnection, run: RunId, group: Group<'_>) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"with recursive above (id, depth) as (
               select $2::uuid, 0
               union
               select c.run_id, above.depth + 1 from above
               join run_children c on c.child_id = above.id and c.company_id = $1
               where above.depth < 100
           )
           select exists (
               select from above join runs r on r.company_id = $1 and r.id = above.id
               where r.playbook_id = $3 and r.concurrency_key = $4 and r.ended_at is null
           ) as "holds!""#,
        group.company.0,
        run.0,
        group.playbook.0,
        group.key,
    )
    .fetch_one(tx)
    .await?)
}
