//! The beats of agents: what decides about one, and what becomes of its job.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{PgConnection, PgPool};
use uuid::Uuid;

use super::StoreError;
use super::jobs::{self, Lease, millis};
use crate::domain::event::Event;
use crate::domain::ids::{AgentId, CompanyId, RunId, TaskId};
use crate::domain::money::Nanos;

/// The unique key of an agent's one heartbeat.
pub fn key(agent: AgentId) -> String {
    format!("heartbeat:{}", agent.0)
}

/// How an agent stands when its heartbeat is at hand.
#[derive(Debug, Clone)]
pub struct Look {
    /// Which.
    pub agent: AgentId,
    /// The database's time, in microseconds since 1970.
    pub now_us: i64,
    /// Its own status.
    pub status: String,
    /// Its company's.
    pub company_status: String,
    /// Its `config`.
    pub config: Value,
    /// The company's time zone.
    pub zone: Option<String>,
    /// When the beat is planned.
    pub planned: Option<DateTime<Utc>>,
    /// Since when one is under way.
    pub began: Option<DateTime<Utc>>,
    /// Why it was woken.
    pub wakes: Value,
    /// A task waits that may begin, or a message.
    pub has_work: bool,
    /// A task of it has ended, and nobody has said so yet.
    pub has_ended: bool,
}

/// Looks at many agents at once, for nothing: no model is asked.
pub async fn look(pool: &PgPool, agents: &[(CompanyId, AgentId)]) -> Result<Vec<Look>, StoreError> {
    let rows = sqlx::query!(
        r#"select a.id, (extract(epoch from now()) * 1000000)::bigint as "now_us!", a.status, c.status as company_status,
                  a.config, c.config ->> 'timezone' as zone, a.beat_at, a.beat_began_at, a.wakes,
                  exists (
                      select from tasks t
                      where t.company_id = k.company_id and t.agent_id = k.agent_id and t.status = 'pending'
                          -- One that needs what will not be completed is over, too.
                          and not exists (
                              select from unnest(t.needs) n (id)
                              join tasks needed on needed.company_id = t.company_id and needed.id = n.id
                              where needed.status in ('pending', 'pending_approval', 'in_progress')
                          )
                  ) or exists (
                      select from messages m
                      where m.company_id = k.company_id and m.to_agent = k.agent_id and m.read_at is null
                  ) as "has_work!",
                  exists (
                      select from tasks t join runs r on r.company_id = t.company_id and r.id = t.run_id
                      where t.company_id = k.company_id and t.agent_id = k.agent_id and t.status = 'in_progress'
                          and r.status in ('completed', 'failed', 'cancelled')
                  ) as "has_ended!"
           from unnest($1::uuid[], $2::uuid[]) as k (company_id, agent_id)
           cross join lateral (
               select * from agents a where a.company_id = k.company_id and a.id = k.agent_id offset 0
           ) a
           join companies c on c.id = k.company_id"#,
        &agents.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &agents.iter().map(|(_, agent)| agent.0).collect::<Vec<_>>(),
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Look {
            agent: AgentId(row.id),
            now_us: row.now_us,
            status: row.status,
            company_status: row.company_status,
            config: row.config,
            zone: row.zone,
            planned: row.beat_at,
            began: row.beat_began_at,
            wakes: row.wakes,
            has_work: row.has_work,
            has_ended: row.has_ended,
        })
        .collect())
}

/// A beat in which there was nothing to do.
#[derive(Debug, Clone)]
pub struct Idle {
    /// The right to write.
    pub lease: Lease,
    /// Whose.
    pub company: CompanyId,
    /// Who.
    pub agent: AgentId,
    /// How often it had been woken when it was looked at.
    pub woken: i32,
    /// It beats; else it only looks again later.
    pub beats: bool,
    /// When the next one is planned.
    pub planned: DateTime<Utc>,
    /// How long until then.
    pub delay: std::time::Duration,
    /// What is told of it.
    pub event: Event,
}

/// Writes many beats in which there was nothing to do, of one session; says which leases
/// held. An agent that was woken meanwhile beats again at once.
pub async fn idle(pool: &PgPool, beats: &[Idle]) -> Result<Vec<i64>, StoreError> {
    let Some(session) = beats.first().map(|beat| beat.lease.session) else { return Ok(Vec::new()) };
    Ok(sqlx::query_scalar!(
        r#"with d as materialized (
               select * from unnest(
                   $1::bigint[], $2::bigint[], $3::uuid[], $4::uuid[], $5::integer[], $6::boolean[], $7::timestamptz[],
                   $8::bigint[], $9::uuid[], $10::text[], $11::text[]
               ) as d (job, epoch, company_id, agent_id, woken, beats, planned, delay_ms, event_id, event, data)
           ),
           job as (
               update jobs j
               set state = case when j.step <> d.woken or d.delay_ms = 0 then 'ready' else 'scheduled' end,
                   due_at = case when j.step <> d.woken then now()
                       else now() + d.delay_ms * interval '1 millisecond' end,
                   lease_epoch = j.lease_epoch + 1, attempt = 0, crash_count = 0, session_id = null, deadline_at = null
               from d
               where j.id = any (array[d.job]) and j.lease_epoch = d.epoch and j.session_id = $12
               returning d.*, j.step <> d.woken as woken_again
           ),
           agent as (
               update agents a
               set heartbeat_count = a.heartbeat_count + 1, last_heartbeat_at = clock_timestamp(), beat_at = job.planned,
                   wakes = case when job.woken_again then a.wakes else '[]' end
               from job
               where a.company_id = job.company_id and a.id = any (array[job.agent_id]) and job.beats
           ),
           told as (
               insert into events (company_id, id, event, data)
               select company_id, event_id, event, data::jsonb from job where beats
           )
           select job as "job!" from job"#,
        &beats.iter().map(|b| b.lease.job).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.lease.epoch).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.company.0).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.agent.0).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.woken).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.beats).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.planned).collect::<Vec<_>>(),
        &beats.iter().map(|b| millis(b.delay)).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.event.id.0).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.event.name.to_owned()).collect::<Vec<_>>(),
        &beats.iter().map(|b| b.event.data.to_string()).collect::<Vec<_>>(),
        session,
    )
    .fetch_all(pool)
    .await?)
}

/// Begins an agent's beats: its one job, due after a while.
pub async fn begin(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    planned: Option<DateTime<Utc>>,
    delay: std::time::Duration,
) -> Result<(), StoreError> {
    sqlx::query!(
        "with agent as (
             update agents set beat_at = coalesce($4, now()) where company_id = $1 and id = $2 and beat_at is null
         )
         insert into jobs (queue, kind, company_id, ref_id, state, due_at, unique_key)
         values ('system', 'heartbeat', $1, $2, case when $5::bigint = 0 then 'ready' else 'scheduled' end,
             now() + $5 * interval '1 millisecond', $3)
         on conflict (company_id, unique_key) where unique_key is not null do nothing",
        company.0,
        agent.0,
        key(agent),
        planned,
        millis(delay),
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Locks an agent's heartbeat before anything of its work: whoever changes that, and may
/// wake it, does so first.
pub async fn lock(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<(), StoreError> {
    sqlx::query!("select id from jobs where company_id = $1 and unique_key = $2 for update", company.0, key(agent))
        .fetch_optional(tx)
        .await?;
    Ok(())
}

/// Lets an agent beat after a moment, for a reason. One that beats just now looks once more
/// before it is done.
pub async fn wake(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    reason: &str,
    delay: std::time::Duration,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update jobs j
         set step = j.step + 1,
             state = case when j.state = 'scheduled' and $3::bigint = 0 then 'ready' else j.state end,
             due_at = case when j.state = 'scheduled' then least(j.due_at, now() + $3 * interval '1 millisecond')
                 else j.due_at end
         where j.company_id = $1 and j.unique_key = $2 and j.due_at < 'infinity'",
        company.0,
        key(agent),
        millis(delay),
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "update agents set wakes = wakes || to_jsonb($3::text)
         where company_id = $1 and id = $2 and not wakes ? $3 and jsonb_array_length(wakes) < $4",
        company.0,
        agent.0,
        reason,
        crate::domain::heartbeat::REASONS_MAX as i32,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// An agent in the middle of its heartbeat, locked.
#[derive(Debug, Clone)]
pub struct Beating {
    /// The database's time, in microseconds since 1970.
    pub now_us: i64,
    /// Its role.
    pub role: String,
    /// Its own status.
    pub status: String,
    /// Its company's.
    pub company_status: String,
    /// The company's `config`,
    pub company_config: Value,
    /// and its policy.
    pub governance: Option<Value>,
    /// Its `config`.
    pub config: Value,
    /// When the beat is planned.
    pub planned: Option<DateTime<Utc>>,
    /// Since when one is under way.
    pub began_us: Option<i64>,
    /// Why.
    pub reasons: Value,
    /// Why the next one is to come at once.
    pub wakes: Value,
    /// By which run it works now.
    pub run: Option<RunId>,
    /// How that stands.
    pub run_status: Option<String>,
    /// What of the beat is done.
    pub items: i32,
    /// How many tools were used.
    pub actions: i32,
    /// What it has cost.
    pub cost: Nanos,
}

/// Locks a heartbeat's job, then its agent; nothing when the lease is gone, or the agent.
pub async fn hold(
    tx: &mut PgConnection,
    lease: Lease,
    company: CompanyId,
    agent: AgentId,
) -> Result<Option<Beating>, StoreError> {
    if !jobs::hold_lease(tx, lease).await? {
        return Ok(None);
    }
    let row = sqlx::query!(
        r#"select (extract(epoch from clock_timestamp()) * 1000000)::bigint as "now_us!", a.role, a.status,
                  c.status as company_status, c.config as company_config, c.governance, a.config, a.beat_at,
                  (extract(epoch from a.beat_began_at) * 1000000)::bigint as began_us, a.beat_reasons, a.wakes, a.beat_run,
                  (select r.status from runs r where r.company_id = a.company_id and r.id = a.beat_run) as run_status,
                  a.beat_items, a.beat_actions, a.beat_cost_nanos
           from agents a join companies c on c.id = a.company_id
           where a.company_id = $1 and a.id = $2
           for update of a"#,
        company.0,
        agent.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| Beating {
        now_us: row.now_us,
        role: row.role,
        status: row.status,
        company_status: row.company_status,
        company_config: row.company_config,
        governance: row.governance,
        config: row.config,
        planned: row.beat_at,
        began_us: row.began_us,
        reasons: row.beat_reasons,
        wakes: row.wakes,
        run: row.beat_run.map(RunId),
        run_status: row.run_status,
        items: row.beat_items,
        actions: row.beat_actions,
        cost: Nanos(row.beat_cost_nanos),
    }))
}

/// The agent works by a run now, in a beat that has begun.
pub async fn works(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    run: RunId,
    task: Option<TaskId>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update runs
         set beat_of = $3, root_id = (select t.root_id from tasks t where t.company_id = $1 and t.id = $4)
         where company_id = $1 and id = $2",
        company.0,
        run.0,
        agent.0,
        task.map(|task| task.0),
    )
    .execute(&mut *tx)
    .await?;
    sqlx::query!(
        "update agents
         set beat_run = $3, beat_began_at = coalesce(beat_began_at, clock_timestamp()),
             beat_reasons = case when beat_began_at is null then wakes else beat_reasons end,
             wakes = case when beat_began_at is null then '[]' else wakes end
         where company_id = $1 and id = $2",
        company.0,
        agent.0,
        run.0,
    )
    .execute(&mut *tx)
    .await?;
    if let Some(task) = task {
        sqlx::query!(
            "update tasks set status = 'in_progress', run_id = $3, updated_at = clock_timestamp()
             where company_id = $1 and id = $2 and status = 'pending'",
            company.0,
            task.0,
            run.0,
        )
        .execute(tx)
        .await?;
    }
    Ok(())
}

/// The run that the agent works by is over, or waits for something: it goes on with the
/// rest.
pub async fn left(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<(), StoreError> {
    sqlx::query!(
        "update agents a
         set beat_run = null, beat_items = a.beat_items + 1,
             beat_actions = a.beat_actions + (
                 select count(*)::integer from journal j
                 where j.company_id = $1 and j.run_id = a.beat_run and j.call > 0 and j.state = 'done'
             ),
             beat_cost_nanos = a.beat_cost_nanos + coalesce(
                 (select r.cost_nanos from runs r where r.company_id = $1 and r.id = a.beat_run), 0)
         where a.company_id = $1 and a.id = $2",
        company.0,
        agent.0,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// What was done in a beat.
#[derive(Debug, Clone)]
pub struct Done {
    /// Pieces of work.
    pub items: i32,
    /// Tools that were used.
    pub actions: i32,
    /// What it has cost.
    pub cost: Nanos,
    /// Why it was.
    pub reasons: Value,
}

/// A beat is over, and another one planned; says what was done in it.
pub async fn over(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    planned: DateTime<Utc>,
) -> Result<Done, StoreError> {
    let row = sqlx::query!(
        r#"update agents a
           set heartbeat_count = a.heartbeat_count + 1, last_heartbeat_at = clock_timestamp(), beat_at = $3,
               beat_began_at = null, beat_run = null, beat_items = 0, beat_actions = 0, beat_cost_nanos = 0,
               beat_reasons = '[]', wakes = '[]'
           from (select * from agents where company_id = $1 and id = $2) was
           where a.company_id = $1 and a.id = $2
           returning was.beat_items, was.beat_actions, was.beat_cost_nanos,
               was.beat_reasons || was.wakes as "reasons!""#,
        company.0,
        agent.0,
        planned,
    )
    .fetch_one(tx)
    .await?;
    Ok(Done {
        items: row.beat_items,
        actions: row.beat_actions,
        cost: Nanos(row.beat_cost_nanos),
        reasons: row.reasons,
    })
}

/// By what an agent beats.
#[derive(Debug)]
pub struct How {
    /// Its `config`.
    pub config: Value,
    /// The company's time zone.
    pub zone: Option<String>,
    /// The database's time, in microseconds since 1970.
    pub now_us: i64,
}

/// By what an agent beats; nothing where there is no such agent.
pub async fn how(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<Option<How>, StoreError> {
    let row = sqlx::query!(
        r#"select a.config, c.config ->> 'timezone' as zone, (extract(epoch from now()) * 1000000)::bigint as "now_us!"
           from agents a join companies c on c.id = a.company_id
           where a.company_id = $1 and a.id = $2"#,
        company.0,
        agent.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| How { config: row.config, zone: row.zone, now_us: row.now_us }))
}

/// When the beat has begun that an agent was woken for, or when it was woken.
pub async fn begins(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select coalesce(
               a.beat_began_at,
               (select j.due_at from jobs j where j.company_id = $1 and j.unique_key = $3 and j.due_at <= now()),
               now()
           ) as "at!"
           from agents a where a.company_id = $1 and a.id = $2"#,
        company.0,
        agent.0,
        key(agent),
    )
    .fetch_one(tx)
    .await?)
}

/// Whether an agent has messages that nobody has read.
pub async fn has_messages(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select exists (
               select from messages where company_id = $1 and to_agent = $2 and read_at is null
           ) as "has!""#,
        company.0,
        agent.0,
    )
    .fetch_one(tx)
    .await?)
}

/// How many agents of a company work in this moment besides one: those whose beats are under way
/// and not paused, and those whose calls are. Until the transaction's end nobody else of the company counts them.
pub async fn others_at_work(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<i64, StoreError> {
    sqlx::query!(
        "select pg_advisory_xact_lock(hashtextextended('agents at work ' || $1::text, 0))",
        company.to_string()
    )
    .execute(&mut *tx)
    .await?;
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from (
               select id from agents where company_id = $1 and beat_run is not null and id <> $2 and status = 'active'
               union
               select j.agent_id from journal j
               join jobs b on b.id = j.job_id and b.lease_epoch = j.lease_epoch and b.state = 'running'
               where j.company_id = $1 and j.state = 'begun' and j.agent_id <> $2
           ) others"#,
        company.0,
        agent.0,
    )
    .fetch_one(tx)
    .await?)
}

/// A message to an agent.
#[derive(Debug, Clone)]
pub struct Message {
    /// Which.
    pub id: Uuid,
    /// In which role its sender works; a person has none.
    pub from: Option<String>,
    /// Where it was sent to.
    pub channel: Option<String>,
    /// What it says.
    pub body: String,
    /// When it was sent.
    pub at: DateTime<Utc>,
}

/// Takes an agent's messages that nobody has read, the oldest first.
pub async fn take_messages(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    limit: i64,
) -> Result<Vec<Message>, StoreError> {
    let rows = sqlx::query!(
        r#"with taken as (
               update messages m set read_at = clock_timestamp()
               where m.company_id = $1 and m.id = any (array(
                   select id from messages
                   where company_id = $1 and to_agent = $2 and read_at is null
                   order by id limit $3))
               returning m.*
           )
           select t.id, (select a.role from agents a where a.company_id = $1 and a.id = t.from_agent) as sender,
                  t.channel, t.body, t.created_at
           from taken t order by t.id"#,
        company.0,
        agent.0,
        limit,
    )
    .fetch_all(tx)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| Message { id: row.id, from: row.sender, channel: row.channel, body: row.body, at: row.created_at })
        .collect())
}

/// What an agent has changed since a moment, without what differs each time: tasks that ended,
/// tasks and messages for others, what it remembers.
pub async fn changed(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    since: DateTime<Utc>,
) -> Result<Value, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select coalesce(jsonb_agg(x.what order by x.what), '[]') as "changed!" from (
               select jsonb_build_array('task', t.title, t.description, t.status, t.error ->> 'message') as what from tasks t
               where t.company_id = $1 and t.agent_id = $2 and t.ended_at >= $3
               union all
               select jsonb_build_array('gave', t.title, t.description) from tasks t
               where t.company_id = $1 and t.created_by = $2 and t.created_at >= $3
               union all
               select jsonb_build_array('wrote', m.channel, m.to_agent, left(m.body, 1000)) from messages m
               where m.company_id = $1 and m.from_agent = $2 and m.created_at >= $3
               union all
               select jsonb_build_array('remembered', m.key, left(m.value::text, 1000)) from memories m
               where m.company_id = $1 and m.agent_id = $2 and m.written_at >= $3
           ) x"#,
        company.0,
        agent.0,
        since,
    )
    .fetch_one(tx)
    .await?)
}

/// Notes what a beat has changed; how often in a row it was the same.
pub async fn note_change(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    digest: &[u8],
) -> Result<i32, StoreError> {
    Ok(sqlx::query_scalar!(
        "update agents
         set beat_repeats = case when beat_digest = $3 then beat_repeats + 1 else 1 end, beat_digest = $3
         where company_id = $1 and id = $2 returning beat_repeats",
        company.0,
        agent.0,
        digest,
    )
    .fetch_one(tx)
    .await?)
}
