//! The queue's table: enqueue, claim, settle, and the timers and sweeps that
//! put rows back.

use std::time::Duration;

use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AgentId, CompanyId, PlaybookId};
use crate::domain::plan::{CRASHES_MAX, SUSPECT_CRASHES};

/// The kinds of job, as in the table.
pub mod kind {
    /// A step of a run.
    pub const STEP: &str = "step";
    /// A step whose run is suspended until the job is due, or made so.
    pub const TIMER: &str = "timer";
    /// A run that waited for its turn begins.
    pub const BEGIN: &str = "begin";
    /// A run has ended, and others of its kind may begin.
    pub const SLOT: &str = "slot";
    /// The end of a gate's time.
    pub const GATE_TIMEOUT: &str = "gate_timeout";
    /// A company's agents get ready.
    pub const PROVISION: &str = "provision";
    /// An agent beats.
    pub const HEARTBEAT: &str = "heartbeat";
    /// An agent whose money was used up goes on.
    pub const RESUME: &str = "resume";
    /// An event goes to the runs that wait for it.
    pub const SIGNAL: &str = "signal";
    /// A lane goes through the items of a step.
    pub const ITEM: &str = "item";
    /// A schedule fires.
    pub const SCHEDULE: &str = "schedule";
    /// An event goes to a webhook.
    pub const DELIVERY: &str = "delivery";
    /// What a deleted company held goes away.
    pub const PURGE: &str = "purge";
    /// Does nothing, durably: for benchmarks and checks of a queue.
    pub const NOOP: &str = "noop";

    /// Those that are about a run.
    pub const OF_RUNS: &[&str] = &[STEP, BEGIN, TIMER, GATE_TIMEOUT, ITEM];
}

/// The queues, as in the table.
pub mod queue {
    /// Steps of runs.
    pub const STEPS: &str = "steps";
    /// Everything else that is short.
    pub const SYSTEM: &str = "system";
    /// Events on their way to webhooks.
    pub const WEBHOOKS: &str = "webhooks";
    /// Benchmarks.
    pub const BENCH: &str = "bench";
    /// What a worker serves unless it is told otherwise.
    pub const ALL: &[&str] = &[STEPS, SYSTEM, WEBHOOKS];
}

/// A job to be.
#[derive(Debug, Clone)]
pub struct NewJob {
    /// Where it waits.
    pub queue: &'static str,
    /// What it is.
    pub kind: &'static str,
    /// Whose it is.
    pub company: CompanyId,
    /// What it is about.
    pub ref_id: Option<Uuid>,
    /// Which step of that.
    pub step: i32,
    /// Lower is taken earlier, within the company.
    pub priority: i16,
    /// When it may be taken.
    pub delay: Duration,
    /// How long one attempt may take.
    pub timeout: Duration,
    /// At most one live job of the company has it.
    pub unique_key: Option<String>,
}

impl NewJob {
    /// A job that is ready at once, with the default limits.
    pub fn new(queue: &'static str, kind: &'static str, company: CompanyId) -> Self {
        Self {
            queue,
            kind,
            company,
            ref_id: None,
            step: 0,
            priority: 0,
            delay: Duration::ZERO,
            timeout: crate::domain::playbook::model::STEP_TIMEOUT,
            unique_key: None,
        }
    }
}

/// What became of an enqueue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Enqueued {
    /// A new job.
    New(i64),
    /// A live job has the same unique key: this one.
    Existing(i64),
}

impl Enqueued {
    /// The job that is there now.
    pub fn id(self) -> i64 {
        match self {
            Self::New(id) | Self::Existing(id) => id,
        }
    }
}

/// Puts a job into the queue, in the caller's transaction.
pub async fn enqueue(executor: impl Executor<'_, Database = Postgres>, job: &NewJob) -> Result<Enqueued, StoreError> {
    let delay_ms = millis(job.delay);
    // The update that changes nothing makes the conflict return its row: a
    // keyed enqueue always says which job answers for the key.
    let row = sqlx::query!(
        r#"insert into jobs (queue, kind, company_id, ref_id, step, priority, state, due_at, timeout_ms, unique_key)
           values ($1, $2, $3, $4, $5, $6,
                   case when $7::bigint > 0 then 'scheduled' else 'ready' end,
                   now() + $7 * interval '1 millisecond', $8, $9)
           on conflict (company_id, unique_key) where unique_key is not null
               do update set unique_key = excluded.unique_key
           returning id, (xmax = 0) as "is_new!""#,
        job.queue,
        job.kind,
        job.company.0,
        job.ref_id,
        job.step,
        job.priority,
        delay_ms,
        millis(job.timeout),
        job.unique_key,
    )
    .fetch_one(executor)
    .await?;
    Ok(if row.is_new { Enqueued::New(row.id) } else { Enqueued::Existing(row.id) })
}

/// Puts jobs without unique keys into their queues in one statement; gives
/// their ids in order.
pub async fn enqueue_many(
    executor: impl Executor<'_, Database = Postgres>,
    jobs: &[NewJob],
) -> Result<Vec<i64>, StoreError> {
    debug_assert!(jobs.iter().all(|job| job.unique_key.is_none()), "a keyed job in a batch");
    Ok(sqlx::query_scalar!(
        r#"with n as materialized (
               select n.*, nextval(pg_get_serial_sequence('jobs', 'id')) as id
               from unnest($1::text[], $2::text[], $3::uuid[], $4::uuid[], $5::integer[], $6::smallint[],
                           $7::bigint[], $8::bigint[])
                   with ordinality as n (queue, kind, company_id, ref_id, step, priority, delay_ms, timeout_ms, place)
           ),
           job as (
               insert into jobs (id, queue, kind, company_id, ref_id, step, priority, state, due_at, timeout_ms)
               overriding system value
               select id, queue, kind, company_id, ref_id, step, priority,
                   case when delay_ms > 0 then 'scheduled' else 'ready' end,
                   now() + delay_ms * interval '1 millisecond', timeout_ms
               from n
           )
           select id as "id!" from n order by place"#,
        &jobs.iter().map(|j| j.queue.to_owned()).collect::<Vec<_>>(),
        &jobs.iter().map(|j| j.kind.to_owned()).collect::<Vec<_>>(),
        &jobs.iter().map(|j| j.company.0).collect::<Vec<_>>(),
        &jobs.iter().map(|j| j.ref_id).collect::<Vec<_>>() as &[Option<Uuid>],
        &jobs.iter().map(|j| j.step).collect::<Vec<_>>(),
        &jobs.iter().map(|j| j.priority).collect::<Vec<_>>(),
        &jobs.iter().map(|j| millis(j.delay)).collect::<Vec<_>>(),
        &jobs.iter().map(|j| millis(j.timeout)).collect::<Vec<_>>(),
    )
    .fetch_all(executor)
    .await?)
}

/// The most jobs of one bulk enqueue.
pub const BULK_MAX: usize = 10_000;

/// Puts many jobs of one kind into a queue at once; for each a company, and
/// what it is about. Unique keys are for single enqueues.
pub async fn enqueue_bulk(
    executor: impl Executor<'_, Database = Postgres>,
    queue: &str,
    kind: &str,
    delay: Duration,
    companies: &[Uuid],
    refs: &[Option<Uuid>],
) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "insert into jobs (queue, kind, company_id, ref_id, state, due_at)
         select $1, $2, n.company_id, n.ref_id,
                case when $3::bigint > 0 then 'scheduled' else 'ready' end,
                now() + $3 * interval '1 millisecond'
         from unnest($4::uuid[], $5::uuid[]) as n (company_id, ref_id)",
        queue,
        kind,
        millis(delay),
        companies,
        refs as &[Option<Uuid>],
    )
    .execute(executor)
    .await?;
    Ok(done.rows_affected())
}

/// The right to write what an attempt did: valid while the row has the epoch
/// and the session.
///
/// The session is part of it because a claim is not flushed before it counts:
/// one that a crash of the server has undone is made again, by another worker
/// with the same epoch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Lease {
    /// The job.
    pub job: i64,
    /// The attempt's epoch.
    pub epoch: i64,
    /// The worker's session.
    pub session: i64,
}

/// A claimed job.
#[derive(Debug, Clone)]
pub struct ClaimedJob {
    /// The right to write.
    pub lease: Lease,
    /// Where it came from.
    pub queue: String,
    /// What it is.
    pub kind: String,
    /// Whose it is.
    pub company: CompanyId,
    /// Whose share of the queue it is taken from: the company's, or a webhook's.
    pub flow: Uuid,
    /// What it is about.
    pub ref_id: Option<Uuid>,
    /// Which step of that.
    pub step: i32,
    /// Which item of the step, of a lane.
    pub item: Option<i32>,
    /// Its priority.
    pub priority: i16,
    /// Tries charged, this one included.
    pub attempt: i32,
    /// Deaths of workers since the last checkpoint.
    pub crash_count: i16,
    /// How long this attempt may take.
    pub timeout: Duration,
}

/// How many flows of a queue one claim deals out to.
pub const FLOWS_A_CLAIM: i32 = 64;
/// After its deadline a job is left to its own worker for this long, as that
/// one knows best; then any worker takes it away.
pub const DEADLINE_GRACE: Duration = Duration::from_secs(10);

/// In the order in which they should begin.
fn in_order(mut jobs: Vec<ClaimedJob>) -> Vec<ClaimedJob> {
    jobs.sort_unstable_by_key(|job| (job.priority, job.lease.job));
    jobs
}

/// Where a queue's next look begins: after this flow.
#[derive(Debug, Clone)]
pub struct Turn {
    /// Which queue.
    pub queue: String,
    /// The flow that was served last; nil for the first one.
    pub after: Uuid,
}

impl Turn {
    /// From the first flow on.
    pub fn first(queue: &str) -> Self {
        Self { queue: queue.to_owned(), after: Uuid::nil() }
    }
}

/// How far a look has come in a queue.
#[derive(Debug, Clone)]
pub struct Walked {
    /// Which queue.
    pub queue: String,
    /// The last flow that it came to, taken from or not.
    pub last: Uuid,
    /// How many there were.
    pub flows: usize,
    /// How many of them were not held back by their own limits.
    pub open: usize,
}

/// What a look at everything has taken.
#[derive(Debug, Default)]
pub struct Looked {
    /// The jobs, in the order in which they should begin.
    pub jobs: Vec<ClaimedJob>,
    /// How many flows had something ready that might be taken, those of each queue
    /// by itself: more than have got a share where there was not room for all.
    pub tenants: usize,
    /// How far it has come, in queues that had something ready.
    pub walked: Vec<Walked>,
}

/// Takes up to `room` jobs: of each queue from its turn on, the first queue
/// first where there is not room for all.
pub async fn claim(pool: &PgPool, session: i64, turns: &[Turn], room: i64) -> Result<Looked, StoreError> {
    let rows = sqlx::query_file!(
        "src/store/sql/claim.sql",
        session,
        &turns.iter().map(|turn| turn.queue.clone()).collect::<Vec<_>>(),
        &turns.iter().map(|turn| turn.after).collect::<Vec<_>>(),
        FLOWS_A_CLAIM,
        room,
        millis(DEADLINE_GRACE),
    )
    .fetch_all(pool)
    .await?;
    let count = |count: i64| usize::try_from(count).unwrap_or(0);
    let mut looked = Looked::default();
    if let Some(row) = rows.first() {
        looked.tenants = count(row.tenants);
        let places = row.queues.iter().zip(&row.lasts).zip(row.walked.iter().zip(&row.open));
        looked.walked = places
            .map(|((queue, last), (flows, open))| Walked {
                queue: queue.clone(),
                last: *last,
                flows: count(*flows),
                open: count(*open),
            })
            .collect();
    }
    let jobs = rows.into_iter().filter_map(|row| {
        Some(ClaimedJob {
            lease: Lease { job: row.id?, epoch: row.lease_epoch?, session },
            queue: row.queue?,
            kind: row.kind?,
            company: CompanyId(row.company_id?),
            flow: row.flow_id?,
            ref_id: row.ref_id,
            step: row.step?,
            item: row.item,
            priority: row.priority?,
            attempt: row.attempt?,
            crash_count: row.crash_count?,
            timeout: Duration::from_millis(row.timeout_ms?.max(0) as u64),
        })
    });
    looked.jobs = in_order(jobs.collect());
    Ok(looked)
}

/// Where a flow's ready work goes on.
#[derive(Debug, Clone)]
pub struct Tenant {
    /// In which queue.
    pub queue: String,
    /// Whose share it is.
    pub flow: Uuid,
    /// After this priority
    pub priority: i16,
    /// and this job.
    pub job: i64,
}

/// Takes up to `room` jobs of some flows, from where each goes on: of each the share that it would
/// have among so many.
pub async fn claim_on(
    pool: &PgPool,
    session: i64,
    tenants: &[&Tenant],
    shared_by: usize,
    room: i64,
) -> Result<Vec<ClaimedJob>, StoreError> {
    let rows = sqlx::query_file!(
        "src/store/sql/claim_on.sql",
        session,
        &tenants.iter().map(|t| t.queue.clone()).collect::<Vec<_>>(),
        &tenants.iter().map(|t| t.flow).collect::<Vec<_>>(),
        &tenants.iter().map(|t| t.priority).collect::<Vec<_>>(),
        &tenants.iter().map(|t| t.job).collect::<Vec<_>>(),
        room,
        millis(DEADLINE_GRACE),
        i64::try_from(shared_by).unwrap_or(i64::MAX),
    )
    .fetch_all(pool)
    .await?;
    let flow = |flow: Option<Uuid>, company: Uuid| flow.unwrap_or(company);
    let jobs = rows.into_iter().map(|row| ClaimedJob {
        lease: Lease { job: row.id, epoch: row.lease_epoch, session },
        queue: row.queue,
        kind: row.kind,
        company: CompanyId(row.company_id),
        flow: flow(row.flow_id, row.company_id),
        ref_id: row.ref_id,
        step: row.step,
        item: row.item,
        priority: row.priority,
        attempt: row.attempt,
        crash_count: row.crash_count,
        timeout: Duration::from_millis(row.timeout_ms.max(0) as u64),
    });
    Ok(in_order(jobs.collect()))
}

/// What an idle worker sees when it looks.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Outlook {
    /// Something is ready in one of its queues.
    pub ready: bool,
    /// How long until the next timer is due; zero or less when one is.
    pub next_due_s: Option<f64>,
    /// A worker has been silent for longer than its lease.
    pub silence: bool,
    /// There are webhooks: what is committed makes jobs of its own.
    pub tells: bool,
    /// Dead letters are tried again, so many a second.
    pub redrives: bool,
}

/// Looks without taking.
pub async fn look(pool: &PgPool, queues: &[String]) -> Result<Outlook, StoreError> {
    let row = sqlx::query!(
        r#"select exists (
               select from unnest($1::text[]) as q (queue)
               where exists (select from jobs j where j.state = 'ready' and j.queue = q.queue)
                   and not exists (select from queue_pauses p where p.queue = q.queue)
           ) as "ready!",
           (select (extract(epoch from due_at) - extract(epoch from now()))::float8
            from jobs where state = 'scheduled' order by due_at limit 1) as next_due_s,
           exists (
               select from worker_sessions
               where ended_at is null and beat_at < clock_timestamp() - lease_ms * interval '1 millisecond'
           ) as "silence!",
           exists (select from webhooks where status = 'active') as "tells!",
           exists (select from redrives where status = 'running') as "redrives!""#,
        queues,
    )
    .fetch_one(pool)
    .await?;
    Ok(Outlook {
        ready: row.ready,
        next_due_s: row.next_due_s,
        silence: row.silence,
        tells: row.tells,
        redrives: row.redrives,
    })
}

/// How many due timers one statement makes ready.
pub const PROMOTE_MAX: i64 = 1_000;

/// Makes ready what is due; says how many.
pub async fn promote(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        // What is locked here is scheduled; to say so twice would let the update
        // go through all timers instead of by its key.
        "update jobs set state = 'ready'
         where id = any (array(
             select id from jobs where state = 'scheduled' and due_at <= now()
             order by due_at limit $1 for update skip locked))",
        PROMOTE_MAX,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// Again only when somebody says so: [`unpark`].
pub const PARKED: Duration = Duration::MAX;

/// What to do with a job that is not a step, under its lease.
#[derive(Debug, Clone, Copy)]
pub struct Settle {
    /// The right to write.
    pub lease: Lease,
    /// `None`: it is done, the row goes. Else it is due again after this.
    pub again_after: Option<Duration>,
    /// Whether the try counts.
    pub charged: bool,
}

/// Settles many of one session at once; says which leases held.
pub async fn settle(
    executor: impl Executor<'_, Database = Postgres>,
    items: &[Settle],
) -> Result<Vec<i64>, StoreError> {
    let ids: Vec<i64> = items.iter().map(|item| item.lease.job).collect();
    let epochs: Vec<i64> = items.iter().map(|item| item.lease.epoch).collect();
    let Some(session) = items.first().map(|item| item.lease.session) else { return Ok(Vec::new()) };
    if items.iter().all(|item| item.again_after.is_none()) {
        let rows = sqlx::query_scalar!(
            "delete from jobs j using unnest($1::bigint[], $2::bigint[]) as d (id, epoch)
             where j.id = any (array[d.id]) and j.lease_epoch = d.epoch and j.session_id = $3
             returning j.id",
            &ids,
            &epochs,
            session,
        )
        .fetch_all(executor)
        .await?;
        return Ok(rows);
    }
    let delays: Vec<Option<i64>> = items.iter().map(|item| item.again_after.map(millis)).collect();
    let charged: Vec<bool> = items.iter().map(|item| item.charged).collect();
    let rows = sqlx::query_scalar!(
        r#"with d as (
               select * from unnest($1::bigint[], $2::bigint[], $3::bigint[], $4::boolean[])
                   as d (id, epoch, delay_ms, charged)
           ),
           gone as (
               delete from jobs j using d
               where j.id = any (array[d.id]) and j.lease_epoch = d.epoch and j.session_id = $5
                   and d.delay_ms is null
               returning j.id
           ),
           again as (
               update jobs j
               set state = case when d.delay_ms > 0 then 'scheduled' else 'ready' end,
                   due_at = case
                       when d.delay_ms = 9223372036854775807 then 'infinity'
                       else now() + d.delay_ms * interval '1 millisecond'
                   end,
                   lease_epoch = j.lease_epoch + 1,
                   attempt = case when d.charged then j.attempt else greatest(j.attempt - 1, 0) end,
                   session_id = null,
                   deadline_at = null
               from d
               where j.id = any (array[d.id]) and j.lease_epoch = d.epoch and j.session_id = $5
                   and d.delay_ms is not null
               returning j.id
           )
           select id as "id!" from gone union all select id from again"#,
        &ids,
        &epochs,
        &delays as &[Option<i64>],
        &charged,
        session,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows)
}

/// A job taken from a dead session or a hung attempt.
#[derive(Debug, Clone, Copy)]
pub struct Reclaimed {
    /// The job.
    pub job: i64,
    /// Deaths so far.
    pub crash_count: i16,
}

/// How many jobs one sweep takes back.
pub const RECLAIM_MAX: i64 = 1_000;

/// Takes back what the dead held; the first delay is `base`.
pub async fn reclaim(pool: &PgPool, base: Duration) -> Result<Vec<Reclaimed>, StoreError> {
    let rows = sqlx::query_file!("src/store/sql/reclaim.sql", RECLAIM_MAX, millis(base) as f64, SUSPECT_CRASHES)
        .fetch_all(pool)
        .await?;
    Ok(rows.into_iter().map(|row| Reclaimed { job: row.id, crash_count: row.crash_count }).collect())
}

/// Charges a suspect with the death of its worker before it begins, so that
/// only what really ran can come to quarantine, and nothing that was merely in
/// the same hands. Whatever the attempt comes to takes the charge back; false
/// when its lease is gone.
pub async fn charge_suspect(pool: &PgPool, lease: Lease) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update jobs set crash_count = $4 where id = $1 and lease_epoch = $2 and session_id = $3",
        lease.job,
        lease.epoch,
        lease.session,
        CRASHES_MAX,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Who has a job, for a lease whose commit may or may not have landed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Holder {
    /// The epoch now.
    pub epoch: i64,
    /// The session that holds it.
    pub session: Option<i64>,
    /// The step it is about.
    pub step: i32,
    /// The item of the step, of a lane.
    pub item: Option<i32>,
}

/// Who has a job; `None` when it is gone.
pub async fn holder_of(pool: &PgPool, job: i64) -> Result<Option<Holder>, StoreError> {
    Ok(sqlx::query!("select lease_epoch, session_id, step, item from jobs where id = $1", job)
        .fetch_optional(pool)
        .await?
        .map(|row| Holder { epoch: row.lease_epoch, session: row.session_id, step: row.step, item: row.item }))
}

/// Gives back what a session holds without knowing it: a claim committed, and
/// its answer was lost. `in_hand` is what the session knows of.
pub async fn give_back_unknown(pool: &PgPool, session: i64, in_hand: &[i64]) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "update jobs
         set state = 'ready', session_id = null, deadline_at = null, lease_epoch = lease_epoch + 1,
             attempt = greatest(attempt - 1, 0)
         where state = 'running' and session_id = $1 and id <> all ($2)",
        session,
        in_hand,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// A duration as the statements take it.
pub(crate) fn millis(duration: Duration) -> i64 {
    i64::try_from(duration.as_millis()).unwrap_or(i64::MAX)
}

/// Locks a job under its lease; false when that is gone.
pub async fn hold_lease(tx: &mut PgConnection, lease: Lease) -> Result<bool, StoreError> {
    let held = sqlx::query!(
        "select id from jobs where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' for update",
        lease.job,
        lease.epoch,
        lease.session,
    )
    .fetch_optional(tx)
    .await?;
    Ok(held.is_some())
}

/// A job waits for its agent, at no cost: whoever lets that go on makes it due. It is looked at
/// again after a while, should nobody. False when the agent goes on already, or the lease is gone.
pub async fn hold(
    tx: &mut PgConnection,
    lease: Lease,
    (company, agent): (CompanyId, AgentId),
    look: Duration,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "with paused as (
             -- Whoever lets it go on comes before this, or finds the job waiting.
             select from agents where company_id = $6 and id = $4 and status = 'paused' for share
         )
         update jobs
         set state = 'scheduled', due_at = now() + $5::bigint * interval '1 millisecond', lease_epoch = lease_epoch + 1,
             attempt = greatest(attempt - 1, 0), session_id = null, deadline_at = null, held_for = $4,
             -- What a suspect was charged with before it began is taken back.
             crash_count = least(crash_count, 2)
         where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running' and exists (select from paused)",
        lease.job,
        lease.epoch,
        lease.session,
        agent.0,
        millis(look),
        company.0,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Jobs that wait for an agent are due.
pub async fn unhold(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "update jobs
         set held_for = null, due_at = now(), state = 'ready'
         where id = any (array(
             -- One that is locked is under way, and looks for itself.
             select id from jobs
             where company_id = $1 and held_for = $2 and state = 'scheduled' and due_at < 'infinity'
             for update skip locked))",
        company.0,
        agent.0,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected())
}

/// After this a job is looked at again whose playbook was stopped at once, should nobody wake
/// it.
pub const KILLED: Duration = Duration::from_secs(30);

/// Jobs of a playbook's runs, and of those that do steps of them, go on that were put off since it
/// was stopped at once.
pub async fn unkill(tx: &mut PgConnection, company: CompanyId, playbook: PlaybookId) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "with recursive below (id) as (
             select r.id from runs r where r.playbook_id = $2 and r.company_id = $1 and r.ended_at is null
             union
             select c.child_id from below
             join run_children c on c.company_id = $1 and c.run_id = below.id
             join runs r on r.company_id = $1 and r.id = c.child_id and r.ended_at is null
         )
         update jobs set due_at = now(), state = 'ready'
         where id = any (array(
             select j.id from below join jobs j on j.company_id = $1 and j.ref_id = below.id
             where j.state = 'scheduled' and j.kind = 'step' and j.due_at < now() + $3::bigint * interval '1 millisecond'
             for update of j skip locked))",
        company.0,
        playbook.0,
        millis(KILLED),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected())
}

/// How many parked jobs one statement makes ready.
pub const UNPARK_MAX: i64 = 1_000;

/// Work of a company that waits because the company was halted is ready again;
/// says how much of it.
pub async fn unpark(executor: impl Executor<'_, Database = Postgres>, company: CompanyId) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "update jobs set state = 'ready', due_at = now()
         where id = any (array(
             select id from jobs where company_id = $1 and due_at = 'infinity' limit $2 for update skip locked))",
        company.0,
        UNPARK_MAX,
    )
    .execute(executor)
    .await?;
    Ok(done.rows_affected())
}

/// Companies that are not paused and yet have parked work: more than one
/// statement took back, or parked by whoever had not heard yet.
pub async fn parked_in_vain(pool: &PgPool) -> Result<Vec<CompanyId>, StoreError> {
    let companies = sqlx::query_scalar!(
        r#"with recursive parked as (
               (select company_id from jobs where due_at = 'infinity' order by company_id limit 1)
               union all
               select following.company_id
               from parked
               cross join lateral (
                   select j.company_id from jobs j
                   where j.due_at = 'infinity' and j.company_id > parked.company_id
                   order by j.company_id limit 1
               ) following
           )
           select p.company_id as "company!" from parked p
           where not exists (select from companies c where c.id = p.company_id and c.status = 'paused')"#,
    )
    .fetch_all(pool)
    .await?;
    Ok(companies.into_iter().map(CompanyId).collect())
}
