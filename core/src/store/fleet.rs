//! What whoever runs the server looks at and turns: workers, queues, jobs.

use chrono::{DateTime, Utc};
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::queue as queues;

/// A live worker process.
#[derive(Debug, Clone)]
pub struct WorkerRow {
    /// Its session.
    pub id: i64,
    /// Host and process.
    pub worker: String,
    /// The program's version.
    pub version: String,
    /// What it serves.
    pub queues: Vec<String>,
    /// How much at once.
    pub slots: i32,
    /// `active` or `draining`.
    pub state: String,
    /// How long it lives without a beat.
    pub lease_ms: i64,
    /// When it started.
    pub started_at: DateTime<Utc>,
    /// When it last beat.
    pub beat_at: DateTime<Utc>,
    /// Jobs that it holds.
    pub jobs: i64,
    /// The same by kind.
    pub kinds: serde_json::Value,
}

/// The live workers of the fleet, newest first.
pub async fn workers(pool: &PgPool, before: Option<i64>, limit: i64) -> Result<Vec<WorkerRow>, StoreError> {
    Ok(sqlx::query_as!(
        WorkerRow,
        r#"select s.id, s.worker, s.version, s.queues, s.slots, s.state, s.lease_ms, s.started_at, s.beat_at,
               held.jobs as "jobs!", held.kinds as "kinds!"
           from worker_sessions s
           cross join lateral (
               select coalesce(sum(k.jobs), 0)::bigint as jobs, coalesce(jsonb_object_agg(k.kind, k.jobs), '{}') as kinds
               from (
                   select j.kind, count(*) as jobs from jobs j
                   where j.session_id = s.id and j.state = 'running' group by j.kind
               ) k
           ) held
           where s.ended_at is null and ($1::bigint is null or s.id < $1)
           order by s.id desc limit $2"#,
        before,
        limit,
    )
    .fetch_all(pool)
    .await?)
}

/// A queue.
#[derive(Debug, Clone)]
pub struct QueueRow {
    /// Its name.
    pub queue: String,
    /// Jobs that are ready, counted as far as [`DEPTH_MAX`].
    pub ready: i64,
    /// Jobs that workers hold.
    pub running: i64,
    /// Since when the job waits that has waited longest, of those that are next
    /// in their companies.
    pub oldest_at: Option<DateTime<Utc>>,
    /// How long that is, in seconds.
    pub oldest_s: Option<f64>,
    /// Jobs that were done in the last five whole minutes.
    pub done_5m: i64,
    /// The same in the last hour.
    pub done_1h: i64,
    /// Who paused it.
    pub paused_by: Option<String>,
    /// Why.
    pub reason: Option<String>,
    /// Since when.
    pub paused_at: Option<DateTime<Utc>>,
}

/// How far the jobs of a queue are counted, and how many flows are asked for
/// their next one: what is asked often must not cost what the backlog holds.
pub const DEPTH_MAX: i64 = 10_000;
const FLOWS_MAX: i32 = 1_000;

/// The queues that a live worker serves, that hold something, or are paused.
pub async fn queues(pool: &PgPool) -> Result<Vec<QueueRow>, StoreError> {
    Ok(sqlx::query_as!(
        QueueRow,
        r#"with recursive held as (
               (select queue from jobs where state = 'ready' order by queue limit 1)
               union all
               select following.queue
               from held
               cross join lateral (
                   select j.queue from jobs j where j.state = 'ready' and j.queue > held.queue order by j.queue limit 1
               ) following
           ),
           running as materialized (
               select j.queue, count(*) as jobs from jobs j where j.state = 'running' group by j.queue
           ),
           named as (
               select queue from held
               union select queue from running
               union select queue from queue_pauses
               union select unnest(s.queues) from worker_sessions s where s.ended_at is null
           )
           select n.queue as "queue!",
               (select count(*) from (
                   select from jobs j where j.state = 'ready' and j.queue = n.queue limit $1
               ) counted) as "ready!",
               coalesce((select r.jobs from running r where r.queue = n.queue), 0) as "running!",
               coalesce((select sum(k.done) from queue_counts k where k.queue = n.queue
                   and k.minute >= date_trunc('minute', now()) - interval '5 minutes'
                   and k.minute < date_trunc('minute', now())), 0)::bigint as "done_5m!",
               coalesce((select sum(k.done) from queue_counts k where k.queue = n.queue
                   and k.minute >= date_trunc('minute', now()) - interval '60 minutes'
                   and k.minute < date_trunc('minute', now())), 0)::bigint as "done_1h!",
               o.due_at as "oldest_at?",
               case when o.due_at is not null then greatest(extract(epoch from clock_timestamp() - o.due_at), 0) end::float8 as oldest_s,
               p.paused_by as "paused_by?", p.reason, p.since as "paused_at?"
           from named n
           left join queue_pauses p on p.queue = n.queue
           left join lateral (
               with recursive head as (
                   (select j.flow_id, j.due_at, 1 as place from jobs j
                    where j.state = 'ready' and j.queue = n.queue
                    order by j.flow_id, j.priority, j.id limit 1)
                   union all
                   select following.flow_id, following.due_at, head.place + 1
                   from head
                   cross join lateral (
                       select j.flow_id, j.due_at from jobs j
                       where j.state = 'ready' and j.queue = n.queue and j.flow_id > head.flow_id
                       order by j.flow_id, j.priority, j.id limit 1
                   ) following
                   where head.place < $2
               )
               select min(due_at) as due_at from head
           ) o on true
           order by n.queue"#,
        DEPTH_MAX,
        FLOWS_MAX,
    )
    .fetch_all(pool)
    .await?)
}

/// Whether a queue is known: one of our own, which may be paused before a worker is
/// there; or some worker serves it, it holds a job, or it is paused.
pub async fn is_queue(tx: &mut PgConnection, queue: &str) -> Result<bool, StoreError> {
    if queues::ALL.contains(&queue) {
        return Ok(true);
    }
    Ok(sqlx::query_scalar!(
        r#"select exists (select from worker_sessions where ended_at is null and $1 = any (queues))
               or exists (select from jobs where state = 'ready' and queue = $1)
               or exists (select from queue_pauses where queue = $1) as "known!""#,
        queue,
    )
    .fetch_one(tx)
    .await?)
}

/// Nothing more is taken out of a queue; what is under way goes on. The first
/// word stays where it is paused already.
pub async fn pause_queue(tx: &mut PgConnection, queue: &str, by: &str, reason: Option<&str>) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into queue_pauses (queue, paused_by, reason) values ($1, $2, $3) on conflict do nothing",
        queue,
        by,
        reason,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Workers take from a queue again.
pub async fn resume_queue(tx: &mut PgConnection, queue: &str) -> Result<(), StoreError> {
    sqlx::query!("delete from queue_pauses where queue = $1", queue).execute(tx).await?;
    Ok(())
}

/// Who paused a queue, why, and since when.
#[derive(Debug, Clone)]
pub struct PauseRow {
    /// Who.
    pub paused_by: String,
    /// Why.
    pub reason: Option<String>,
    /// Since when.
    pub since: DateTime<Utc>,
}

/// The pause of a queue, if it is paused.
pub async fn pause_of(tx: &mut PgConnection, queue: &str) -> Result<Option<PauseRow>, StoreError> {
    Ok(sqlx::query_as!(PauseRow, "select paused_by, reason, since from queue_pauses where queue = $1", queue)
        .fetch_optional(tx)
        .await?)
}

/// A job that has been ready for so long is taken a step earlier, and again after as long: whatever is
/// more urgent comes meanwhile, everything has its turn.
pub const AGE: std::time::Duration = std::time::Duration::from_secs(60);
/// How many jobs one statement ages.
pub const AGE_MAX: i64 = 5_000;

/// Ages what is ready and has waited for long: what is less urgent than the rest, and the rest where
/// there is something more urgent. Says how many.
pub async fn age(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "with low as (
             select j.id from jobs j
             where j.state = 'ready' and j.priority > 0 and j.due_at < now() - $1::bigint * interval '1 millisecond'
             order by j.due_at limit $2
         ),
         passed as (
             select j.id
             from (select distinct queue, flow_id from jobs where state = 'ready' and priority < 0 limit $2) f
             cross join lateral (
                 select j.id from jobs j
                 where j.state = 'ready' and j.queue = f.queue and j.flow_id = f.flow_id and j.priority = 0
                     and j.due_at < now() - $1::bigint * interval '1 millisecond'
                 order by j.id limit 100
             ) j
         )
         update jobs set priority = priority - 1
         where id = any (array(select id from low union select id from passed limit $2)) and state = 'ready'",
        super::jobs::millis(AGE),
        AGE_MAX,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// Adds what went through queues in this minute, by queue: what was done, and what is to come again.
pub async fn count(pool: &PgPool, counts: &[(String, i64, i64)]) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into queue_counts as q (queue, minute, done, again)
         select c.queue, date_trunc('minute', now()), c.done, c.again
         from unnest($1::text[], $2::bigint[], $3::bigint[]) as c (queue, done, again)
         order by c.queue
         on conflict (queue, minute) do update set done = q.done + excluded.done, again = q.again + excluded.again",
        &counts.iter().map(|(queue, ..)| queue.clone()).collect::<Vec<_>>(),
        &counts.iter().map(|(_, done, _)| *done).collect::<Vec<_>>(),
        &counts.iter().map(|(_, _, again)| *again).collect::<Vec<_>>(),
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// A job.
#[derive(Debug, Clone)]
pub struct JobRow {
    /// Which.
    pub id: i64,
    /// Where it waits.
    pub queue: String,
    /// What it is.
    pub kind: String,
    /// Whose it is.
    pub company_id: Uuid,
    /// What it is about.
    pub ref_id: Option<Uuid>,
    /// Which step of that.
    pub step: i32,
    /// `ready`, `scheduled` or `running`.
    pub state: String,
    /// Lower is taken earlier, within the company.
    pub priority: i16,
    /// Tries charged.
    pub attempt: i32,
    /// Deaths of workers.
    pub crash_count: i16,
    /// The worker that holds it.
    pub session_id: Option<i64>,
    /// When it may be taken; none while its company is halted.
    pub due_at: Option<DateTime<Utc>>,
    /// When it is taken away from its worker.
    pub deadline_at: Option<DateTime<Utc>>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// What picks jobs.
#[derive(Debug, Clone, Copy, Default)]
pub struct JobFilter<'a> {
    /// Of one company.
    pub company: Option<Uuid>,
    /// In one queue.
    pub queue: Option<&'a str>,
    /// In one state.
    pub state: Option<&'a str>,
    /// Of one kind.
    pub kind: Option<&'a str>,
    /// In the hands of this worker.
    pub session: Option<i64>,
    /// Older than this one.
    pub before: Option<i64>,
}

/// How many jobs one page looks at: what its filters leave out counts too.
pub const LOOKED_AT_MAX: i64 = 10_000;

/// A page of jobs, newest first, and the job after which the next one begins:
/// `None` where nothing is left. A page may be short of its limit, since a
/// filter costs no more than [`LOOKED_AT_MAX`] rows.
pub async fn jobs(pool: &PgPool, filter: JobFilter<'_>, limit: i64) -> Result<(Vec<JobRow>, Option<i64>), StoreError> {
    let mut tx = pool.begin().await?;
    let rows = sqlx::query_as!(
        JobRow,
        r#"select j.id as "id!", j.queue as "queue!", j.kind as "kind!", j.company_id as "company_id!", j.ref_id,
               j.step as "step!", j.state as "state!", j.priority as "priority!", j.attempt as "attempt!",
               j.crash_count as "crash_count!", j.session_id,
               case when isfinite(j.due_at) then j.due_at end as "due_at?", j.deadline_at, j.created_at as "created_at!"
           from (select * from jobs where $5::bigint is null or id < $5 order by id desc limit $6) j
           where ($1::uuid is null or j.company_id = $1) and ($2::text is null or j.queue = $2)
               and ($3::text is null or j.state = $3) and ($4::text is null or j.kind = $4)
               and ($8::bigint is null or j.session_id = $8)
           order by j.id desc limit $7"#,
        filter.company,
        filter.queue,
        filter.state,
        filter.kind,
        filter.before,
        LOOKED_AT_MAX,
        limit,
        filter.session,
    )
    .fetch_all(&mut *tx)
    .await?;
    let next = if i64::try_from(rows.len()).is_ok_and(|found| found == limit) {
        rows.last().map(|row| row.id)
    } else {
        // The last of those looked at, if there were that many.
        sqlx::query_scalar!(
            "select id from jobs where $1::bigint is null or id < $1 order by id desc offset $2 limit 1",
            filter.before,
            LOOKED_AT_MAX - 1,
        )
        .fetch_optional(&mut *tx)
        .await?
    };
    Ok((rows, next))
}

/// What an operator is alarmed by, besides queues.
#[derive(Debug, Clone)]
pub struct Gauges {
    /// Workers that beat.
    pub workers: i64,
    /// Dead letters, counted as far as [`DEPTH_MAX`].
    pub dead_letters: i64,
    /// Active webhooks for which nothing has worked for an hour.
    pub webhooks_failing: i64,
    /// Webhooks that are sent to no more.
    pub webhooks_disabled: i64,
    /// Parts of the upkeep that did not work the last time.
    pub upkeep_failing: i64,
    /// How long the oldest transaction is open, in seconds.
    pub oldest_snapshot_s: f64,
}

/// Reads them.
pub async fn gauges(pool: &PgPool) -> Result<Gauges, StoreError> {
    Ok(sqlx::query_as!(
        Gauges,
        r#"select
               (select count(*) from worker_sessions
                where ended_at is null and beat_at > clock_timestamp() - lease_ms * interval '1 millisecond') as "workers!",
               (select count(*) from (select from dead_letters limit $1) l) as "dead_letters!",
               (select count(*) from flows f join webhooks w on w.id = f.webhook_id
                where w.status = 'active' and f.failing_since < now() - interval '1 hour') as "webhooks_failing!",
               (select count(*) from webhooks where status = 'disabled') as "webhooks_disabled!",
               (select count(*) from upkeep where error is not null) as "upkeep_failing!",
               coalesce((select extract(epoch from clock_timestamp() - min(xact_start)) from pg_stat_activity
                where datname = current_database() and backend_xmin is not null), 0)::float8 as "oldest_snapshot_s!""#,
        DEPTH_MAX,
    )
    .fetch_one(pool)
    .await?)
}
