//! The activity log: what has no run is appended here; what belongs to a run
//! is written by the statement that moves the run on.

use chrono::{DateTime, Duration, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::event::Event;
use crate::domain::ids::{AccountId, AgentId, CompanyId, EventId, RunId};

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
    executor: impl Executor<'_, Database = Postgres>,
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
    .fetch_all(executor)
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

/// A place in the log: what is below it has been told.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub struct Place {
    /// The transaction that wrote the event.
    pub xid: u64,
    /// The event.
    pub id: Uuid,
}

/// An event of a company's log.
#[derive(Debug, Clone)]
pub struct FeedRow {
    /// Whose.
    pub company: CompanyId,
    /// Where it stands.
    pub place: Place,
    /// The event.
    pub event: EventRow,
}

/// What picks events.
#[derive(Debug, Clone, Copy)]
pub struct FeedFilter<'a> {
    /// Of this account's companies.
    pub account: AccountId,
    /// Of one of them alone.
    pub company: Option<CompanyId>,
    /// Whose dotted name begins with one of these; all without.
    pub kinds: Option<&'a [String]>,
    /// About this agent.
    pub agent: Option<AgentId>,
    /// At this time or later.
    pub since: Option<DateTime<Utc>>,
    /// Before this time.
    pub before: Option<DateTime<Utc>>,
    /// Behind this place, in the direction of the page.
    pub after: Option<Place>,
}

/// The kinds of event that are most of the log.
const COMMON: &[&str] = &["step", "playbook", "rubric"];

impl FeedFilter<'_> {
    /// Whether the kinds that are wanted have an index of their own.
    fn is_rare(&self) -> bool {
        self.kinds.is_some_and(|kinds| kinds.iter().all(|kind| !COMMON.contains(&kind.as_str())))
    }
}

macro_rules! feed_rows {
    ($rows:expr) => {
        $rows
            .into_iter()
            .map(|row| {
                let xid = row.xid.parse().map_err(|_| StoreError::Unreadable("a transaction id".into()))?;
                let event = EventRow {
                    id: EventId(row.id),
                    run: row.run_id.map(RunId),
                    seq: row.seq,
                    event: row.event,
                    data: row.data,
                    at: row.at,
                };
                let place = Place { xid, id: event.id.0 };
                Ok(FeedRow { company: CompanyId(row.company_id), place, event })
            })
            .collect()
    };
}

/// The query of a page: how what is behind its beginning compares, its order, and whether each kind
/// is looked for by itself, in the order of its index.
macro_rules! page {
    ($behind:literal, $order:literal, $each:literal, $of_each:literal, $given:expr) => {{
        let (filter, kinds, rare, limit): (&FeedFilter<'_>, _, _, i64) = $given;
        let place = filter.after;
        sqlx::query!(
            r#"select e.company_id, e.xid::text as "xid!", e.id, e.run_id, e.seq, e.event, e.data, e.at
               from (
                   select e.* from companies c
                   cross join lateral (
                       select e.* from "#
                + $each
                + r#" cross join lateral (
                           select e.* from events e
                           where e.company_id = c.id
                               and e.xid < pg_snapshot_xmin(pg_current_snapshot())
                               and ($2::text is null or (e.xid, e.id) "#
                + $behind
                + r#" ($2::text::xid8, $3::uuid))
                               and ($4::text[] is null or split_part(e.event, '.', 1) = any ($4)) "#
                + $of_each
                + r#"
                               and ($6::text is null or e.agent = $6)
                               and ($7::timestamptz is null or e.at >= $7)
                               and ($8::timestamptz is null or e.at < $8)
                               and e.xid >= coalesce((select oldest from event_marks where at <= $7 order by at desc limit 1), '0')
                               and e.xid < coalesce((select newest from event_marks where at >= $8::timestamptz + interval '1 minute' order by at limit 1), '9223372036854775807')
                           "#
                + $order
                + r#" limit $9
                       ) e
                       "#
                + $order
                + r#" limit $9
                   ) e
                   where c.account_id = $1 and ($10::uuid is null or c.id = $10)
                   "#
                + $order
                + " limit $9) e "
                + $order,
            filter.account.0,
            place.map(|place| place.xid.to_string()),
            place.map(|place| place.id),
            kinds,
            rare,
            filter.agent.map(|agent| agent.to_string()),
            filter.since,
            filter.before,
            limit,
            filter.company.map(|company| company.0),
        )
    }};
    ($behind:literal, $order:literal, all, $given:expr) => {
        page!($behind, $order, "(select where $5::text[] is null) k", "", $given)
    };
    ($behind:literal, $order:literal, each, $given:expr) => {
        page!($behind, $order, "(select distinct kind from unnest($5::text[]) as u (kind)) k", "and e.rare_kind = k.kind", $given)
    };
}

/// A page of the log, oldest or newest first. Only what no open transaction can
/// still come before is shown, so that a reader who goes by places never skips
/// an event (hazard H4). A time is turned into transactions by the marks, so
/// that a range of times is a range of the index; a minute later than they say,
/// since an event's time may be a little older than its transaction.
pub async fn feed(
    tx: &mut PgConnection,
    filter: FeedFilter<'_>,
    newest_first: bool,
    limit: i64,
) -> Result<Vec<FeedRow>, StoreError> {
    let (all, each) = if filter.is_rare() { (None, filter.kinds) } else { (filter.kinds, None) };
    let given = (&filter, all, each, limit);
    match (newest_first, filter.is_rare()) {
        (true, false) => feed_rows!(page!("<", "order by e.xid desc, e.id desc", all, given).fetch_all(tx).await?),
        (true, true) => feed_rows!(page!("<", "order by e.xid desc, e.id desc", each, given).fetch_all(tx).await?),
        (false, false) => feed_rows!(page!(">", "order by e.xid, e.id", all, given).fetch_all(tx).await?),
        (false, true) => feed_rows!(page!(">", "order by e.xid, e.id", each, given).fetch_all(tx).await?),
    }
}

/// How often an agent has beaten from a time until before another.
pub async fn heartbeats(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    since: DateTime<Utc>,
    end: DateTime<Utc>,
) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from events e
           where e.company_id = $1 and e.agent = $2 and e.event = 'heartbeat.fired'
               and e.at >= $3 and e.at < $4
               and e.xid >= coalesce((select oldest from event_marks where at <= $3 order by at desc limit 1), '0')
               and e.xid < coalesce((select newest from event_marks where at >= $4::timestamptz + interval '1 minute' order by at limit 1), '9223372036854775807')"#,
        company.0,
        agent.to_string(),
        since,
        end,
    )
    .fetch_one(tx)
    .await?)
}

/// Events of some companies, and of all companies of some accounts, that came
/// after the place where each of them has got to; with them the transaction
/// below which nothing can come any more.
pub async fn tail(
    pool: &PgPool,
    companies: &[(Uuid, Place)],
    accounts: &[(Uuid, Place)],
    limit: i64,
) -> Result<(u64, Vec<Tailed>), StoreError> {
    let columns = |topics: &[(Uuid, Place)]| {
        let ids: Vec<Uuid> = topics.iter().map(|(id, _)| *id).collect();
        let xids: Vec<String> = topics.iter().map(|(_, place)| place.xid.to_string()).collect();
        let events: Vec<Uuid> = topics.iter().map(|(_, place)| place.id).collect();
        (ids, xids, events)
    };
    let (company_ids, company_xids, company_events) = columns(companies);
    let (account_ids, account_xids, account_events) = columns(accounts);
    let rows = sqlx::query!(
        r#"with mark as materialized (select pg_snapshot_xmin(pg_current_snapshot()) as xid)
           select m.xid::text as "mark!", e.topic, e.company_id as "company_id?", e.xid::text, e.id as "id?", e.run_id, e.seq,
               e.event as "event?", e.data as "data?", e.at as "at?"
           from mark m
           left join lateral (
               select t.id as topic, e.company_id, e.xid, e.id, e.run_id, e.seq, e.event, e.data, e.at
               from unnest($1::uuid[], $2::text[], $3::uuid[]) as t (id, xid, event_id)
               cross join lateral (
                   select * from events e
                   where e.company_id = t.id and (e.xid, e.id) > (t.xid::xid8, t.event_id) and e.xid < m.xid
                   order by e.xid, e.id limit $7
               ) e
               union all
               select t.id, e.company_id, e.xid, e.id, e.run_id, e.seq, e.event, e.data, e.at
               from unnest($4::uuid[], $5::text[], $6::uuid[]) as t (id, xid, event_id)
               cross join lateral (
                   select e.*
                   from companies c
                   cross join lateral (
                       select * from events e
                       where e.company_id = c.id and (e.xid, e.id) > (t.xid::xid8, t.event_id) and e.xid < m.xid
                       order by e.xid, e.id limit $7
                   ) e
                   where c.account_id = t.id
                   order by e.xid, e.id limit $7
               ) e
           ) e on true
           order by e.topic, e.xid, e.id"#,
        &company_ids,
        &company_xids,
        &company_events,
        &account_ids,
        &account_xids,
        &account_events,
        limit,
    )
    .fetch_all(pool)
    .await?;
    let xid = |text: &str| text.parse::<u64>().map_err(|_| StoreError::Unreadable("a transaction id".into()));
    let mark = rows.first().map_or(Ok(0), |row| xid(&row.mark))?;
    let mut tailed = Vec::with_capacity(rows.len());
    for row in rows {
        let (Some(topic), Some(company), Some(place), Some(id)) = (row.topic, row.company_id, row.xid, row.id) else {
            continue;
        };
        let (Some(event), Some(data), Some(at)) = (row.event, row.data, row.at) else { continue };
        let place = Place { xid: xid(&place)?, id };
        let event = EventRow { id: EventId(id), run: row.run_id.map(RunId), seq: row.seq, event, data, at };
        tailed.push(Tailed { topic, row: FeedRow { company: CompanyId(company), place, event } });
    }
    Ok((mark, tailed))
}

/// An event, and whom it was asked for.
#[derive(Debug, Clone)]
pub struct Tailed {
    /// The company or the account.
    pub topic: Uuid,
    /// The event.
    pub row: FeedRow,
}

/// The transaction below which nothing can come any more: where a reader begins
/// who wants what happens next.
pub async fn mark_of_now(tx: &mut PgConnection) -> Result<Place, StoreError> {
    let xid =
        sqlx::query_scalar!(r#"select pg_snapshot_xmin(pg_current_snapshot())::text as "xid!""#).fetch_one(tx).await?;
    let xid = xid.parse().map_err(|_| StoreError::Unreadable("a transaction id".into()))?;
    Ok(Place { xid, id: Uuid::nil() })
}

/// How far the clock of whoever made an event's id may be off, in minutes: as a
/// rule, and at the worst.
const CLOCKS_OFF_MIN: [i64; 2] = [5, 180];

/// Where an event of an account, or of one of its companies, stands, by its id:
/// looked for around the time that its id names, within the marks.
pub async fn place_of(
    tx: &mut PgConnection,
    account: AccountId,
    company: Option<CompanyId>,
    event: EventId,
) -> Result<Option<Place>, StoreError> {
    let around = event.0.get_timestamp().and_then(|t| DateTime::from_timestamp(i64::try_from(t.to_unix().0).ok()?, 0));
    let Some(around) = around else { return Ok(None) };
    for off in CLOCKS_OFF_MIN.map(Duration::minutes) {
        let (Some(from), Some(to)) = (around.checked_sub_signed(off), around.checked_add_signed(off)) else {
            return Ok(None);
        };
        let found = sqlx::query_scalar!(
            r#"select e.xid::text as "xid!"
               from companies c
               join events e on e.company_id = c.id
               where c.account_id = $1 and ($2::uuid is null or c.id = $2) and e.id = $3
                   and e.xid >= coalesce((select oldest from event_marks where at <= $4 order by at desc limit 1), '0')
                   and e.xid < coalesce((select newest from event_marks where at >= $5::timestamptz + interval '1 minute' order by at limit 1), '9223372036854775807')
               limit 1"#,
            account.0,
            company.map(|company| company.0),
            event.0,
            from,
            to,
        )
        .fetch_optional(&mut *tx)
        .await?;
        if let Some(xid) = found {
            let xid = xid.parse().map_err(|_| StoreError::Unreadable("a transaction id".into()))?;
            return Ok(Some(Place { xid, id: event.0 }));
        }
    }
    Ok(None)
}

/// The number of an event within its run.
pub async fn number_of(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    event: EventId,
) -> Result<Option<i64>, StoreError> {
    let seq = sqlx::query_scalar!(
        "select seq from events where company_id = $1 and run_id = $2 and id = $3",
        company.0,
        run.0,
        event.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(seq.flatten())
}
