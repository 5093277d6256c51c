//! The activity log: what has no run is appended here; what belongs to a run
//! is written by the statement that moves the run on.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::event::Event;
use crate::domain::ids::{CompanyId, EventId, RunId};

/// Appends events of a company that belong to no run.
pub async fn append(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    events: &[Event],
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into events (company_id, id, event, data)
         select $1, e.id, e.name, e.data::jsonb
         from unnest($2::uuid[], $3::text[], $4::text[]) as e (id, name, data)",
        company.0,
        &events.iter().map(|e| e.id.0).collect::<Vec<_>>(),
        &events.iter().map(|e| e.name.to_owned()).collect::<Vec<_>>(),
        &events.iter().map(|e| e.data.to_string()).collect::<Vec<_>>(),
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// Appends an event of a run, numbered under the run's lock.
pub async fn append_to_run(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    run: RunId,
    event: &Event,
) -> Result<(), StoreError> {
    sqlx::query!(
        "with r as (
             update runs set event_seq = event_seq + 1
             where company_id = $1 and id = $2 and status in ('queued', 'running', 'suspended')
             returning event_seq
         )
         insert into events (company_id, id, run_id, seq, event, data)
         select $1, $3, $2, r.event_seq, $4, $5 from r",
        company.0,
        run.0,
        event.id.0,
        event.name,
        event.data,
    )
    .execute(executor)
    .await?;
    Ok(())
}

/// Sets a mark for ranges of times, unless there is a young one.
pub async fn mark(pool: &PgPool) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into event_marks
         select where not exists (select from event_marks where at > clock_timestamp() - interval '1 minute')",
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// One stored event.
#[derive(Debug, Clone)]
pub struct EventRow {
    /// Which.
    pub id: EventId,
    /// Of which run.
    pub run: Option<RunId>,
    /// Its number within the run.
    pub seq: Option<i64>,
    /// The dotted name.
    pub event: String,
    /// What a reader needs to know.
    pub data: Value,
    /// When.
    pub at: DateTime<Utc>,
}

/// The events of a run after a number, in order.
pub async fn of_run(
    pool: &PgPool,
    company: CompanyId,
    run: RunId,
    after: i64,
    limit: i64,
) -> Result<Vec<EventRow>, StoreError> {
    let rows = sqlx::query!(
        "select id, run_id, seq, event, data, at from events
         where company_id = $1 and run_id = $2 and seq > $3 order by seq limit $4",
        company.0,
        run.0,
        after,
        limit,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| EventRow {
            id: EventId(row.id),
            run: row.run_id.map(RunId),
            seq: row.seq,
            event: row.event,
            data: row.data,
            at: row.at,
        })
        .collect())
}

/// Where a company's log is read from: below it, everything has been told.
pub type Cursor = (String, Uuid);

/// The events of a company after a cursor, oldest first, with each one's own
/// cursor. Only what no open transaction can still come before is shown, so
/// that a reader who goes by the cursor never skips an event (hazard H4).
pub async fn of_company(
    pool: &PgPool,
    company: CompanyId,
    after: Option<&Cursor>,
    limit: i64,
) -> Result<Vec<(Cursor, EventRow)>, StoreError> {
    let (xid, id) = match after {
        Some((xid, id)) => (Some(xid.as_str()), Some(*id)),
        None => (None, None),
    };
    let rows = sqlx::query!(
        r#"select xid::text as "xid!", id, run_id, seq, event, data, at from events
           where company_id = $1
               and xid < pg_snapshot_xmin(pg_current_snapshot())
               and ($2::text is null or (xid, id) > ($2::text::xid8, $3::uuid))
           order by xid, id limit $4"#,
        company.0,
        xid,
        id,
        limit,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| {
            let event = EventRow {
                id: EventId(row.id),
                run: row.run_id.map(RunId),
                seq: row.seq,
                event: row.event,
                data: row.data,
                at: row.at,
            };
            ((row.xid, row.id), event)
        })
        .collect())
}
