//! Events on their way to webhooks: what is to be sent, and what came of it.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::{Lease, millis};
use crate::domain::ids::{CompanyId, DeadLetterId, DeliveryId, WebhookId};

/// What a claimed delivery needs.
#[derive(Debug, Clone)]
pub struct SendRow {
    /// The job.
    pub job: i64,
    /// Whether it is to be sent at all.
    pub is_pending: bool,
    /// Where it happened.
    pub company_id: Uuid,
    /// The dotted name.
    pub event: String,
    /// The event's id.
    pub event_id: Uuid,
    /// In which run.
    pub run_id: Option<Uuid>,
    /// What the event carries; nothing where it is gone.
    pub data: Option<Value>,
    /// When it happened.
    pub at: DateTime<Utc>,
    /// Where to.
    pub url: String,
    /// The webhook is not disabled.
    pub is_active: bool,
    /// What signs.
    pub secret: Vec<u8>,
    /// What signs too, for a while.
    pub old_secret: Option<Vec<u8>>,
    /// The time, in seconds since 1970.
    pub now_s: i64,
    /// Its events about one thing go one after another.
    pub is_ordered: bool,
    /// In how many seconds one is due that has to go before it.
    pub behind_s: Option<f64>,
    /// How the webhook bears what it is sent.
    pub flow: FlowRow,
}

/// How a webhook bears what it is sent, as it is stored.
#[derive(Debug, Clone)]
pub struct FlowRow {
    /// Whose.
    pub webhook_id: Uuid,
    /// So much at once works.
    pub bears: i32,
    /// Failures in a row.
    pub failures: i32,
    /// How often in a row the breaker has opened.
    pub opened: i32,
    /// The share of tries that failed lately.
    pub error_rate: f64,
    /// How many retries may go while that is high.
    pub retry_budget: f64,
    /// The breaker is open.
    pub is_open: bool,
    /// How long ago that was noted, in seconds.
    pub noted_s: f64,
    /// For how long nothing has worked, in seconds.
    pub failing_s: Option<f64>,
}

/// Loads what claimed deliveries need: of each its webhook, its id, and its job. What is not found
/// is over.
pub async fn load(
    pool: &PgPool,
    webhooks: &[Uuid],
    deliveries: &[Uuid],
    jobs: &[i64],
) -> Result<Vec<SendRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select n.job as "job!", d.status = 'pending' and d.job_id = n.job as "is_pending!", d.company_id, d.event,
               d.event_id, e.run_id as "run_id?", coalesce(d.data, e.data) as data, coalesce(e.at, d.created_at) as "at!",
               w.url, w.status = 'active' as "is_active!", w.ordered, w.secret,
               case when w.old_secret_until > clock_timestamp() then w.old_secret end as old_secret,
               extract(epoch from clock_timestamp())::bigint as "now_s!", before.due_s as "behind_s?",
               n.webhook_id as "webhook_id!", coalesce(f.bears, 1) as "bears!", coalesce(f.failures, 0) as "failures!",
               coalesce(f.opened, 0) as "opened!", coalesce(f.error_rate, 0) as "error_rate!",
               coalesce(f.retry_budget, 0) as "retry_budget!",
               coalesce(f.open_until > clock_timestamp(), false) as "is_open!",
               coalesce(extract(epoch from clock_timestamp() - f.noted_at), 0)::float8 as "noted_s!",
               extract(epoch from clock_timestamp() - f.failing_since)::float8 as failing_s
           from unnest($1::uuid[], $2::uuid[], $3::bigint[]) as n (webhook_id, id, job)
           cross join lateral (
               select * from deliveries d where d.webhook_id = n.webhook_id and d.id = n.id offset 0
           ) d
           cross join lateral (select * from webhooks w where w.id = n.webhook_id offset 0) w
           left join lateral (
               select * from flows f where f.queue = 'webhooks' and f.flow_id = n.webhook_id offset 0
           ) f on true
           left join lateral (
               select * from events e where e.company_id = d.company_id and e.xid = d.event_xid and e.id = d.event_id
               offset 0
           ) e on true
           left join lateral (
               select greatest(extract(epoch from j.due_at - clock_timestamp()), 0)::float8 as due_s
               from delivery_order o
               cross join lateral (select j.due_at from jobs j where j.id = o.job_id offset 0) j
               where o.webhook_id = n.webhook_id and o.about = coalesce(e.run_id, d.company_id)
                   and o.job_id < n.job
               order by o.job_id limit 1
           ) before on true"#,
        webhooks,
        deliveries,
        jobs,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| SendRow {
            job: row.job,
            is_pending: row.is_pending,
            company_id: row.company_id,
            event: row.event,
            event_id: row.event_id,
            run_id: row.run_id,
            data: row.data,
            at: row.at,
            url: row.url,
            is_active: row.is_active,
            secret: row.secret,
            old_secret: row.old_secret,
            now_s: row.now_s,
            is_ordered: row.ordered,
            behind_s: row.behind_s,
            flow: FlowRow {
                webhook_id: row.webhook_id,
                bears: row.bears,
                failures: row.failures,
                opened: row.opened,
                error_rate: row.error_rate,
                retry_budget: row.retry_budget,
                is_open: row.is_open,
                noted_s: row.noted_s,
                failing_s: row.failing_s,
            },
        })
        .collect())
}

/// Locks what is known of some webhooks, in an order that everybody keeps.
pub async fn lock_flows(tx: &mut PgConnection, webhooks: &[Uuid]) -> Result<Vec<FlowRow>, StoreError> {
    Ok(sqlx::query_as!(
        FlowRow,
        r#"select flow_id as "webhook_id!", coalesce(bears, 1) as "bears!", failures, opened, error_rate, retry_budget,
               coalesce(open_until > clock_timestamp(), false) as "is_open!",
               extract(epoch from clock_timestamp() - noted_at)::float8 as "noted_s!",
               extract(epoch from clock_timestamp() - failing_since)::float8 as failing_s
           from flows where queue = 'webhooks' and flow_id = any ($1)
           order by flow_id for update"#,
        webhooks,
    )
    .fetch_all(tx)
    .await?)
}

/// What is known of a webhook now.
#[derive(Debug, Clone)]
pub struct FlowChange {
    /// Which, with what is stored of it.
    pub flow: FlowRow,
    /// The breaker opens for so long.
    pub opens_ms: Option<i64>,
    /// Something has worked, or nothing has.
    pub worked: bool,
}

/// Writes what is known of webhooks that are locked.
pub async fn write_flows(tx: &mut PgConnection, changes: &[FlowChange]) -> Result<(), StoreError> {
    fn column<T>(changes: &[FlowChange], of: impl Fn(&FlowChange) -> T) -> Vec<T> {
        changes.iter().map(of).collect()
    }
    sqlx::query!(
        "update flows f
         set bears = c.bears, failures = c.failures, opened = c.opened, error_rate = c.error_rate,
             retry_budget = c.retry_budget, noted_at = clock_timestamp(),
             open_until = case
                 when c.opens_ms is not null then clock_timestamp() + c.opens_ms * interval '1 millisecond'
                 when not c.worked then f.open_until
             end,
             failing_since = case
                 when not c.worked then coalesce(f.failing_since, now())
                 when c.failures > 0 then now()
             end
         from unnest($1::uuid[], $2::integer[], $3::integer[], $4::integer[], $5::float8[], $6::float8[], $7::bigint[],
                 $8::boolean[])
             as c (webhook_id, bears, failures, opened, error_rate, retry_budget, opens_ms, worked)
         where f.queue = 'webhooks' and f.flow_id = any (array[c.webhook_id])",
        &column(changes, |change| change.flow.webhook_id),
        &column(changes, |change| change.flow.bears),
        &column(changes, |change| change.flow.failures),
        &column(changes, |change| change.flow.opened),
        &column(changes, |change| change.flow.error_rate),
        &column(changes, |change| change.flow.retry_budget),
        &column(changes, |change| change.opens_ms) as &[Option<i64>],
        &column(changes, |change| change.worked),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A try of a delivery, and what becomes of it.
#[derive(Debug, Clone)]
pub struct Tried {
    /// The right to write.
    pub lease: Lease,
    /// Where to.
    pub webhook: WebhookId,
    /// Which.
    pub delivery: DeliveryId,
    /// Whose.
    pub company: CompanyId,
    /// `pending`, `succeeded` or `failed`.
    pub status: &'static str,
    /// When it is tried again, where it is.
    pub delay_ms: Option<i64>,
    /// The answer's status.
    pub answered: Option<i32>,
    /// How long it took.
    pub latency_ms: i32,
    /// How the answer begins.
    pub answer: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
    /// Why it is given up, where it is: `exhausted` or `invalid`.
    pub given_up: Option<&'static str>,
}

/// Writes tries of one session; says which leases held.
pub async fn settle(tx: &mut PgConnection, tried: &[Tried]) -> Result<Vec<i64>, StoreError> {
    fn column<T>(tried: &[Tried], of: impl Fn(&Tried) -> T) -> Vec<T> {
        tried.iter().map(of).collect()
    }
    let Some(session) = tried.first().map(|one| one.lease.session) else { return Ok(Vec::new()) };
    Ok(sqlx::query_file_scalar!(
        "src/store/sql/settle_deliveries.sql",
        &column(tried, |one| one.lease.job),
        &column(tried, |one| one.lease.epoch),
        &column(tried, |one| one.webhook.0),
        &column(tried, |one| one.delivery.0),
        &column(tried, |one| one.company.0),
        &column(tried, |one| one.status.to_owned()),
        &column(tried, |one| one.delay_ms) as &[Option<i64>],
        &column(tried, |one| one.answered) as &[Option<i32>],
        &column(tried, |one| one.latency_ms),
        &column(tried, |one| one.answer.clone()) as &[Option<String>],
        &column(tried, |one| one.error.clone()) as &[Option<String>],
        &column(tried, |one| one.given_up.map(|_| DeadLetterId::new().0)) as &[Option<Uuid>],
        &column(tried, |one| one.given_up.map(str::to_owned)) as &[Option<String>],
        session,
    )
    .fetch_all(tx)
    .await?)
}

/// Of ordered webhooks: what is over makes place, and the next about the same thing is due. One
/// that waits for a try of its own goes on waiting.
pub async fn next_in_order(tx: &mut PgConnection, webhooks: &[Uuid], jobs: &[i64]) -> Result<(), StoreError> {
    sqlx::query!(
        "with over as (
             delete from delivery_order o using unnest($1::uuid[], $2::bigint[]) as d (webhook_id, job)
             where o.webhook_id = any (array[d.webhook_id]) and o.job_id = d.job
             returning o.webhook_id, o.about, o.job_id
         ),
         next as (
             select n.job_id
             from over
             cross join lateral (
                 select o.job_id from delivery_order o
                 where o.webhook_id = over.webhook_id and o.about = over.about and o.job_id > over.job_id
                 order by o.job_id limit 1
             ) n
         )
         update jobs j set state = 'ready', due_at = now()
         where j.id = any (array(select job_id from next)) and j.state = 'scheduled' and j.attempt = 0",
        webhooks,
        jobs,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// A delivery of a disabled webhook waits until that is enabled; it looks for itself after a while.
/// False when the webhook is enabled, or the lease is gone.
pub async fn hold(pool: &PgPool, lease: Lease, webhook: WebhookId, look: Duration) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "with disabled as (
             -- Whoever enables it comes before this, or finds the job waiting.
             select from webhooks where id = $4 and status = 'disabled' for share
         )
         update jobs
         set state = 'scheduled', due_at = now() + $5::bigint * interval '1 millisecond', lease_epoch = lease_epoch + 1,
             attempt = greatest(attempt - 1, 0), session_id = null, deadline_at = null, held_for = $4
         where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' and exists (select from disabled)",
        lease.job,
        lease.epoch,
        lease.session,
        webhook.0,
        millis(look),
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// A delivery as people read it.
#[derive(Debug, Clone)]
pub struct DeliveryRow {
    /// Which.
    pub id: Uuid,
    /// Whose.
    pub company_id: Uuid,
    /// The dotted name.
    pub event: String,
    /// The event's id.
    pub event_id: Uuid,
    /// `pending`, `succeeded` or `failed`.
    pub status: String,
    /// Tries so far.
    pub attempts: i32,
    /// What was answered last.
    pub last_status: Option<i32>,
    /// What went wrong last.
    pub last_error: Option<String>,
    /// When it is tried next.
    pub next_at: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it was over.
    pub ended_at: Option<DateTime<Utc>>,
}

/// What picks deliveries of a webhook.
#[derive(Debug, Clone, Copy, Default)]
pub struct DeliveryFilter<'a> {
    /// In this state.
    pub status: Option<&'a str>,
    /// Of events that this pattern takes in.
    pub event: Option<&'a str>,
    /// Of events at this time or later.
    pub since: Option<Uuid>,
    /// Of events before this time.
    pub until: Option<Uuid>,
    /// Beyond this one.
    pub beyond: Option<Uuid>,
}

/// The least id of a delivery of an event at a time: theirs begin with it.
pub fn least_id(at: DateTime<Utc>) -> Uuid {
    let ms = u128::try_from(at.timestamp_millis()).unwrap_or(0);
    Uuid::from_u128(ms << 80)
}

/// How many rows one page looks at: what its filters leave out counts too.
pub const LOOKED_AT_MAX: i64 = 10_000;

/// A page of a webhook's deliveries, newest first, and where the next one begins.
pub async fn list(
    tx: &mut PgConnection,
    webhook: WebhookId,
    filter: DeliveryFilter<'_>,
    limit: i64,
) -> Result<(Vec<DeliveryRow>, Option<Uuid>), StoreError> {
    let rows = sqlx::query_as!(
        DeliveryRow,
        r#"select d.id as "id!", d.company_id as "company_id!", d.event as "event!", d.event_id as "event_id!",
               d.status as "status!", d.attempts as "attempts!", d.last_status, d.last_error,
               (select j.due_at from jobs j where j.id = d.job_id and isfinite(j.due_at)) as next_at,
               d.created_at as "created_at!", d.ended_at
           from (
               select * from deliveries
               where webhook_id = $1 and ($2::uuid is null or id < $2) and ($5::uuid is null or id >= $5)
                   and ($6::uuid is null or id < $6) and ($3::text is distinct from 'failed' or failed_at is not null)
               order by id desc limit $8
           ) d
           where ($3::text is null or d.status = $3)
               and ($4::text is null or webhook_takes(array[$4], d.event))
           order by d.id desc limit $7"#,
        webhook.0,
        filter.beyond,
        filter.status,
        filter.event,
        filter.since,
        filter.until,
        limit,
        LOOKED_AT_MAX,
    )
    .fetch_all(&mut *tx)
    .await?;
    let next = if i64::try_from(rows.len()).is_ok_and(|found| found == limit) {
        rows.last().map(|row| row.id)
    } else {
        sqlx::query_scalar!(
            "select id from deliveries
             where webhook_id = $1 and ($2::uuid is null or id < $2) and ($3::uuid is null or id >= $3)
                 and ($4::uuid is null or id < $4) and ($6::text is distinct from 'failed' or failed_at is not null)
             order by id desc offset $5 limit 1",
            webhook.0,
            filter.beyond,
            filter.since,
            filter.until,
            LOOKED_AT_MAX - 1,
            filter.status,
        )
        .fetch_optional(tx)
        .await?
    };
    Ok((rows, next))
}

/// One delivery of a webhook.
pub async fn get(
    tx: &mut PgConnection,
    webhook: WebhookId,
    delivery: DeliveryId,
) -> Result<Option<DeliveryRow>, StoreError> {
    Ok(sqlx::query_as!(
        DeliveryRow,
        r#"select d.id, d.company_id, d.event, d.event_id, d.status, d.attempts, d.last_status, d.last_error,
               (select j.due_at from jobs j where j.id = d.job_id and isfinite(j.due_at)) as next_at, d.created_at,
               d.ended_at
           from deliveries d where d.webhook_id = $1 and d.id = $2"#,
        webhook.0,
        delivery.0,
    )
    .fetch_optional(tx)
    .await?)
}

/// A try of a delivery.
#[derive(Debug, Clone)]
pub struct AttemptRow {
    /// From 1.
    pub number: i32,
    /// When it ended.
    pub at: DateTime<Utc>,
    /// The answer's status.
    pub status: Option<i32>,
    /// How long it took.
    pub latency_ms: i32,
    /// How the answer begins.
    pub answer: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
}

/// The last tries of a delivery, oldest first.
pub async fn attempts(
    tx: &mut PgConnection,
    webhook: WebhookId,
    delivery: DeliveryId,
    limit: i64,
) -> Result<Vec<AttemptRow>, StoreError> {
    Ok(sqlx::query_as!(
        AttemptRow,
        r#"select number as "number!", at as "at!", status, latency_ms as "latency_ms!", answer, error
           from (
               select * from delivery_attempts where webhook_id = $1 and delivery_id = $2 order by number desc limit $3
           ) a order by number"#,
        webhook.0,
        delivery.0,
        limit,
    )
    .fetch_all(tx)
    .await?)
}

/// Deliveries that are to be sent again.
#[derive(Debug, Default)]
pub struct Again {
    /// Which.
    pub sent: Vec<Uuid>,
    /// The last one looked at, where there may be more.
    pub beyond: Option<Uuid>,
}

/// Sends deliveries again: what is over gets a job, what waits for its next try is due, what is
/// under way is left. The schedule begins anew, the numbers of tries go on; dead letters go.
pub async fn redeliver(
    tx: &mut PgConnection,
    webhook: WebhookId,
    deliveries: &[Uuid],
) -> Result<Vec<Uuid>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"with d as materialized (
               select d.id, d.company_id, d.status, d.job_id as old_job, e.run_id,
                   nextval(pg_get_serial_sequence('jobs', 'id')) as job_id
               from (
                   select * from deliveries where webhook_id = $1 and id = any ($2) order by id for update
               ) d
               -- What was a company's goes with it.
               join companies c on c.id = d.company_id
               left join events e on e.company_id = d.company_id and e.xid = d.event_xid and e.id = d.event_id
           ),
           due as (
               update jobs j set state = 'ready', due_at = now(), attempt = 0, held_for = null
               where j.id = any (array(select old_job from d where status = 'pending')) and j.state = 'scheduled'
               returning j.ref_id
           ),
           anew as (
               update deliveries x
               set status = 'pending', job_id = d.job_id, ended_at = null, failed_at = null
               from d where x.webhook_id = $1 and x.id = d.id and d.status <> 'pending'
               returning x.id, x.company_id, x.job_id
           ),
           job as (
               insert into jobs (id, queue, kind, company_id, ref_id, webhook_id, state, timeout_ms)
               overriding system value
               select job_id, 'webhooks', 'delivery', company_id, id, $1, 'ready', 60000 from anew
           ),
           turn as (
               insert into delivery_order (webhook_id, about, job_id)
               select $1, coalesce(d.run_id, d.company_id), d.job_id
               from d join anew on anew.id = d.id
               where exists (select from webhooks w where w.id = $1 and w.ordered)
           ),
           letter as (
               delete from dead_letters l using anew
               where l.company_id = anew.company_id and l.kind = 'delivery' and l.ref_id = anew.id and l.webhook_id = $1
           )
           select ref_id as "id!" from due union all select id from anew"#,
        webhook.0,
        deliveries,
    )
    .fetch_all(tx)
    .await?)
}

/// A delivery to be made.
#[derive(Debug, Clone)]
pub struct NewDelivery<'a> {
    /// Whose.
    pub company: CompanyId,
    /// The dotted name.
    pub event: &'a str,
    /// The event's id.
    pub event_id: Uuid,
    /// Where the event stands: the transaction that wrote it.
    pub xid: Option<u64>,
    /// A test's data.
    pub data: Option<&'a Value>,
}

/// Makes a delivery of an event, unless there is one; says which, and whether it is new.
pub async fn insert(
    tx: &mut PgConnection,
    webhook: WebhookId,
    new: &NewDelivery<'_>,
) -> Result<(DeliveryId, bool), StoreError> {
    let row = sqlx::query!(
        r#"with n as materialized (
               select delivery_id($3, $1) as id, nextval(pg_get_serial_sequence('jobs', 'id')) as job_id
           ),
           delivery as (
               insert into deliveries (webhook_id, id, company_id, event, event_id, event_xid, data, job_id)
               select $1, n.id, $2, $4, $3, $5::text::xid8, $6, n.job_id from n
               on conflict do nothing
               returning id, job_id
           ),
           turn as (
               insert into delivery_order (webhook_id, about, job_id)
               select $1, coalesce(e.run_id, $2), d.job_id
               from delivery d
               join webhooks w on w.id = $1 and w.ordered
               left join events e on e.company_id = $2 and e.xid = $5::text::xid8 and e.id = $3
           ),
           job as (
               insert into jobs (id, queue, kind, company_id, ref_id, webhook_id, state, timeout_ms)
               overriding system value
               select job_id, 'webhooks', 'delivery', $2, id, $1, 'ready', 60000 from delivery
               returning id
           )
           select n.id as "id!", exists (select from job) as "is_new!" from n"#,
        webhook.0,
        new.company.0,
        new.event_id,
        new.event,
        new.xid.map(|xid| xid.to_string()),
        new.data,
    )
    .fetch_one(tx)
    .await?;
    Ok((DeliveryId(row.id), row.is_new))
}

/// How many one statement forgets.
pub const PRUNE_MAX: i64 = 5_000;

/// Forgets deliveries of one webhook that were over long ago, with their tries; all of them where the
/// webhook is gone. Says how many. What is pending stays.
pub async fn prune(pool: &PgPool, webhook: Uuid, keep: Duration, keep_failed: Duration) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "with old as (
             select d.id, d.company_id, d.status from deliveries d
             where d.webhook_id = $1
                 -- What is younger is not looked at, unless the webhook is gone.
                 and d.id < case
                     when exists (select from webhooks w where w.id = $1) then $5
                     else 'ffffffff-ffff-ffff-ffff-ffffffffffff'::uuid
                 end
                 and (
                     (d.status = 'succeeded' and d.ended_at < now() - $2::bigint * interval '1 millisecond')
                     or (d.status = 'failed' and d.ended_at < now() - $3::bigint * interval '1 millisecond')
                     or not exists (select from webhooks w where w.id = $1)
                 )
             order by d.id limit $4
             -- One that is sent again at this moment stays.
             for update skip locked
         ),
         tries as (
             delete from delivery_attempts a where a.webhook_id = $1 and a.delivery_id = any (array(select id from old))
         ),
         letters as (
             delete from dead_letters l using old
             where l.company_id = old.company_id and l.ref_id = old.id and l.webhook_id = $1
         ),
         turns as (
             delete from delivery_order o where o.webhook_id = $1 and not exists (select from webhooks w where w.id = $1)
         )
         delete from deliveries d where d.webhook_id = $1 and d.id = any (array(select id from old))",
        webhook,
        millis(keep),
        millis(keep_failed),
        PRUNE_MAX,
        least_id(Utc::now() - keep.min(keep_failed)),
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// The next webhook behind another that deliveries are kept of; it may be gone.
pub async fn next_webhook(pool: &PgPool, after: Option<Uuid>) -> Result<Option<Uuid>, StoreError> {
    let after = after.unwrap_or(Uuid::nil());
    Ok(sqlx::query_scalar!(
        "select webhook_id from deliveries where webhook_id > $1 order by webhook_id limit 1",
        after
    )
    .fetch_optional(pool)
    .await?)
}
