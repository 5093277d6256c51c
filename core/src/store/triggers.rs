//! What starts runs by itself: schedules with their one job each, and events.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use super::jobs::{Lease, kind, queue};
use crate::domain::ids::{CompanyId, PlaybookId, VersionId};
use crate::domain::webhook::Secret;

/// The key of the one job of a schedule.
fn job_key(playbook: PlaybookId) -> String {
    format!("schedule:{playbook}")
}

/// A playbook whose triggers are to be set.
#[derive(Debug)]
pub struct Current {
    /// `active`, `paused` or `archived`.
    pub status: String,
    /// Its version now.
    pub version: VersionId,
    /// The text of that.
    pub yaml: String,
    /// The time now.
    pub now: DateTime<Utc>,
}

/// The playbook as it is now; its row is locked, and then the job of its schedule,
/// before anything else of it.
pub async fn lock(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
) -> Result<Option<Current>, StoreError> {
    let row = sqlx::query!(
        r#"select p.status, v.id as version, v.yaml, clock_timestamp() as "now!"
           from playbooks p
           join playbook_versions v on v.company_id = p.company_id and v.id = p.current_version_id
           where p.company_id = $1 and p.id = $2 for update of p"#,
        company.0,
        playbook.0,
    )
    .fetch_optional(&mut *tx)
    .await?;
    sqlx::query!(
        "select id from jobs where company_id = $1 and unique_key = $2 for update",
        company.0,
        job_key(playbook),
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| Current { status: row.status, version: VersionId(row.version), yaml: row.yaml, now: row.now }))
}

/// Sets a playbook's schedule; the next fire stays where it is planned when the
/// schedule has not changed. Gives that fire.
pub async fn set_schedule(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    spec: &Value,
    next_at: DateTime<Utc>,
) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"insert into triggers as t (company_id, playbook_id, kind, spec, next_at) values ($1, $2, 'schedule', $3, $4)
           on conflict (company_id, playbook_id) do update
           set kind = 'schedule', event = null, spec = excluded.spec, secret = null, old_secret = null,
               old_secret_until = null, secret_shown = false,
               next_at = case when t.spec = excluded.spec then t.next_at else excluded.next_at end
           returning t.next_at as "next_at!""#,
        company.0,
        playbook.0,
        spec,
        next_at,
    )
    .fetch_one(tx)
    .await?)
}

/// Makes the job of a schedule due; whoever has it in hand loses it.
pub async fn plan(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    due_at: DateTime<Utc>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into jobs as j (queue, kind, company_id, ref_id, state, due_at, unique_key)
         values ($1, $2, $3, $4, 'scheduled', $5, $6)
         on conflict (company_id, unique_key) where unique_key is not null do update
         set state = 'scheduled', due_at = excluded.due_at, lease_epoch = j.lease_epoch + 1, attempt = 0,
             crash_count = 0, session_id = null, deadline_at = null",
        queue::SYSTEM,
        kind::SCHEDULE,
        company.0,
        playbook.0,
        due_at,
        job_key(playbook),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The schedule of a playbook rests: its next fire stays planned, nothing is due.
pub async fn rest(tx: &mut PgConnection, company: CompanyId, playbook: PlaybookId) -> Result<(), StoreError> {
    sqlx::query!("delete from jobs where company_id = $1 and unique_key = $2", company.0, job_key(playbook))
        .execute(tx)
        .await?;
    Ok(())
}

/// Sets the event that starts a playbook; what signs its requests stays, where it has that.
pub async fn set_event(
    tx: &mut PgConnection,
    (company, playbook): (CompanyId, PlaybookId),
    kind: &str,
    event: &str,
    secret: Option<&Secret>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into triggers as t (company_id, playbook_id, kind, event, secret) values ($1, $2, $3, $4, $5)
         on conflict (company_id, playbook_id) do update
         set kind = excluded.kind, event = excluded.event, spec = null, next_at = null, last_at = null,
             secret = case when excluded.secret is not null then coalesce(t.secret, excluded.secret) end,
             old_secret = case when excluded.secret is not null then t.old_secret end,
             old_secret_until = case when excluded.secret is not null then t.old_secret_until end,
             secret_shown = t.secret_shown and t.secret is not null and excluded.secret is not null",
        company.0,
        playbook.0,
        kind,
        event,
        secret.map(<[u8; 32]>::as_slice),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Nothing starts a playbook by itself any more.
pub async fn clear(tx: &mut PgConnection, company: CompanyId, playbook: PlaybookId) -> Result<(), StoreError> {
    sqlx::query!("delete from triggers where company_id = $1 and playbook_id = $2", company.0, playbook.0)
        .execute(&mut *tx)
        .await?;
    rest(tx, company, playbook).await
}

/// Notes for which version a playbook's triggers are.
pub async fn note_version(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    version: VersionId,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update playbooks set triggers_of = $3 where company_id = $1 and id = $2 and triggers_of is distinct from $3",
        company.0,
        playbook.0,
        version.0,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// How many playbooks are looked after at once.
pub const LAGGING_MAX: i64 = 100;

/// Playbooks whose triggers are not those of their current version: they come
/// from before there were any.
pub async fn lagging(pool: &PgPool) -> Result<Vec<(CompanyId, PlaybookId)>, StoreError> {
    let rows = sqlx::query!(
        "select company_id, id from playbooks where triggers_of is distinct from current_version_id
         order by company_id, id limit $1",
        LAGGING_MAX,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (CompanyId(row.company_id), PlaybookId(row.id))).collect())
}

/// Locks the job of a schedule by its lease; the time now, or `None` when the
/// lease is gone.
pub async fn hold(tx: &mut PgConnection, lease: Lease) -> Result<Option<DateTime<Utc>>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select clock_timestamp() as "now!" from jobs where id = $1 and lease_epoch = $2 and session_id = $3 for update"#,
        lease.job,
        lease.epoch,
        lease.session,
    )
    .fetch_optional(tx)
    .await?)
}

/// When a playbook is planned to start by itself, if it is.
pub async fn next_at(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    playbook: PlaybookId,
) -> Result<Option<DateTime<Utc>>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select next_at from triggers where company_id = $1 and playbook_id = $2",
        company.0,
        playbook.0,
    )
    .fetch_optional(executor)
    .await?
    .flatten())
}

/// A schedule has fired: its next fire is planned.
pub async fn fired(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    last_at: Option<DateTime<Utc>>,
    next_at: DateTime<Utc>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update triggers set last_at = coalesce($3, last_at), next_at = $4 where company_id = $1 and playbook_id = $2",
        company.0,
        playbook.0,
        last_at,
        next_at,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// How many playbooks are looked at together that one event starts.
pub const STARTED_MAX: i64 = 100;

/// A playbook that an event starts.
#[derive(Debug)]
pub struct ByEvent {
    /// Which.
    pub playbook: PlaybookId,
    /// The data that the event brings.
    pub data: Value,
    /// It has been started by this event already.
    pub started: bool,
}

/// The playbooks of a company that an event starts, after one of them.
pub async fn started_by(
    pool: &PgPool,
    company: CompanyId,
    signal: Uuid,
    after: PlaybookId,
) -> Result<Vec<ByEvent>, StoreError> {
    let rows = sqlx::query!(
        r#"select t.playbook_id as "playbook_id!", s.data as "data!", exists (
             select from runs r where r.playbook_id = t.playbook_id and r.dedup_key = 'event:' || s.id
         ) as "started!"
         from (select * from signals where company_id = $1 and id = $2 and run_id is null offset 0) s
         cross join lateral (
             select * from triggers t
             where t.company_id = $1 and t.kind = 'event' and t.event = s.name and t.playbook_id > $4
             union all
             -- A request that a playbook's own secret has signed.
             select t.* from triggers t
             where t.company_id = $1 and t.kind = 'webhook' and t.playbook_id > $4
                 and t.playbook_id = case when s.name ~ '^hook:[0-9a-f-]{36}$' then substr(s.name, 6)::uuid end
             order by playbook_id limit $3
         ) t
         order by t.playbook_id"#,
        company.0,
        signal,
        STARTED_MAX,
        after.0,
    )
    .fetch_all(pool)
    .await?;
    let by_event = rows.into_iter().map(|row| ByEvent {
        playbook: PlaybookId(row.playbook_id),
        data: row.data,
        started: row.started,
    });
    Ok(by_event.collect())
}
