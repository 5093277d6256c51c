//! Agents.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AgentId, CompanyId};
use crate::domain::money::Nanos;

/// An agent to be.
#[derive(Debug, Clone)]
pub struct NewAgent {
    /// Its id.
    pub agent: AgentId,
    /// Its address within the company.
    pub role: String,
    /// `claude`, `gpt`, `custom` or a synonym, as sent.
    pub adapter: String,
    /// How it behaves.
    pub instructions: String,
    /// Which model.
    pub model: Option<String>,
    /// Credits a month.
    pub budget: Option<i64>,
    /// As sent.
    pub config: Value,
}

/// Stores an agent in `initializing`.
pub async fn insert_agent(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    new: &NewAgent,
) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        "insert into agents (company_id, id, role, adapter, instructions, model, budget, config, status)
         values ($1, $2, $3, $4, $5, $6, $7, $8, 'initializing') returning created_at",
        company.0,
        new.agent.0,
        new.role,
        new.adapter,
        new.instructions,
        new.model,
        new.budget,
        new.config,
    )
    .fetch_one(executor)
    .await?)
}

/// An agent.
#[derive(Debug, Clone)]
pub struct AgentRow {
    /// Whose.
    pub company: CompanyId,
    /// Which.
    pub agent: AgentId,
    /// Its address within the company.
    pub role: String,
    /// As sent.
    pub adapter: String,
    /// How it behaves.
    pub instructions: String,
    /// Which model.
    pub model: Option<String>,
    /// Credits a month.
    pub budget: Option<i64>,
    /// As sent.
    pub config: Value,
    /// `initializing`, `active`, `paused`, `errored` or `removed`.
    pub status: String,
    /// Why it is errored.
    pub error: Option<String>,
    /// How often it has beaten.
    pub heartbeat_count: i64,
    /// When it last did.
    pub last_heartbeat_at: Option<DateTime<Utc>>,
    /// Why it is paused, and until when, where nobody has asked for it.
    pub paused: Option<(String, Option<DateTime<Utc>>)>,
    /// Its kill switch is on.
    pub killed: bool,
    /// All that it has spent, where that was asked for,
    pub cost: Nanos,
    /// and what of it in this month.
    pub used: Nanos,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

macro_rules! agent_row {
    ($row:expr) => {{
        let row = $row;
        AgentRow {
            company: CompanyId(row.company_id),
            agent: AgentId(row.id),
            role: row.role,
            adapter: row.adapter,
            instructions: row.instructions,
            model: row.model,
            budget: row.budget,
            config: row.config,
            status: row.status,
            error: row.error,
            heartbeat_count: row.heartbeat_count,
            last_heartbeat_at: row.last_heartbeat_at,
            paused: row.paused_reason.map(|reason| (reason, row.paused_until)),
            killed: row.killed,
            cost: Nanos::ZERO,
            used: Nanos::ZERO,
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }};
}

/// What picks agents out of a company.
#[derive(Debug, Clone, Copy, Default)]
pub struct AgentFilter<'a> {
    /// One by role.
    pub role: Option<&'a str>,
    /// One by id; only so are removed ones found.
    pub agent: Option<AgentId>,
    /// By status.
    pub status: Option<&'a str>,
    /// Older than this one.
    pub before: Option<Uuid>,
}

/// A page of a company's agents, newest first. The agents of a company that is
/// paused or stopped are paused with it.
pub async fn agents(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    filter: AgentFilter<'_>,
    limit: i64,
) -> Result<Vec<AgentRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select a.company_id, a.id, a.role, a.adapter, a.instructions, a.model, a.budget, a.config, s.status as "status!",
                a.error, a.heartbeat_count, a.last_heartbeat_at, a.created_at, a.updated_at, a.paused_reason, a.paused_until,
                a.paused_by is not distinct from 'kill' as "killed!"
         from agents a
         join companies c on c.id = a.company_id
         cross join lateral (
             select case when a.status = 'active' and c.status in ('paused', 'stopped') then 'paused' else a.status end as status
         ) s
         where a.company_id = $1
             and ($2::text is null or a.role = $2)
             and ($3::uuid is null or a.id = $3)
             and ($3::uuid is not null or a.status <> 'removed')
             and ($4::text is null or s.status = $4)
             and ($5::uuid is null or a.id < $5)
         order by a.id desc
         limit $6"#,
        company.0,
        filter.role,
        filter.agent.map(|a| a.0),
        filter.status,
        filter.before,
        limit,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| agent_row!(row)).collect())
}

/// How many live agents a company has.
pub async fn live(tx: &mut PgConnection, company: CompanyId) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from agents where company_id = $1 and status <> 'removed'"#,
        company.0,
    )
    .fetch_one(tx)
    .await?)
}

/// The live agents of some companies.
pub async fn agents_of(
    executor: impl Executor<'_, Database = Postgres>,
    companies: &[Uuid],
) -> Result<Vec<AgentRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select company_id, id, role, adapter, instructions, model, budget, config, status, error,
                heartbeat_count, last_heartbeat_at, created_at, updated_at, paused_reason, paused_until,
                paused_by is not distinct from 'kill' as "killed!"
         from agents where company_id = any ($1) and status <> 'removed'"#,
        companies,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| agent_row!(row)).collect())
}

/// Ends the initializing of an agent; false when it was over.
pub async fn agent_initialized(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    agent: AgentId,
    error: Option<&str>,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update agents
         set status = case when $3::text is null then 'active' else 'errored' end, error = $3, updated_at = now()
         where company_id = $1 and id = $2 and status = 'initializing'",
        company.0,
        agent.0,
        error,
    )
    .execute(executor)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Changes of an agent; what is left out stays.
#[derive(Debug, Default)]
pub struct AgentChanges<'a> {
    /// How it behaves.
    pub instructions: Option<&'a str>,
    /// Which model.
    pub model: Option<&'a str>,
    /// Credits a month.
    pub budget: Option<i64>,
    /// Merged.
    pub config: Option<Value>,
}

/// Changes what is given of an agent.
pub async fn update_agent(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    changes: &AgentChanges<'_>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update agents
         set instructions = coalesce($3, instructions), model = coalesce($4, model), budget = coalesce($5, budget),
             config = config || coalesce($6::jsonb, '{}'::jsonb), updated_at = now()
         where company_id = $1 and id = $2",
        company.0,
        agent.0,
        changes.instructions,
        changes.model,
        changes.budget,
        changes.config,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Locks an agent; its own status and since when.
pub async fn lock_agent(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
) -> Result<Option<(String, DateTime<Utc>)>, StoreError> {
    let row = sqlx::query!(
        "select status, updated_at from agents where company_id = $1 and id = $2 for update",
        company.0,
        agent.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| (row.status, row.updated_at)))
}

/// Sets an agent's status, decided under its lock; says when.
pub async fn set_agent_status(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    status: &str,
    killed: bool,
) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        "update agents
         set status = $3, error = case when $3 = 'errored' then error end,
             paused_by = case when $4 then 'kill' end, paused_reason = case when $4 then 'it was stopped by its kill switch' end,
             paused_until = null, updated_at = clock_timestamp()
         where company_id = $1 and id = $2 and status <> 'removed' returning updated_at",
        company.0,
        agent.0,
        status,
        killed,
    )
    .fetch_one(tx)
    .await?)
}

/// Pauses an agent whose money is used up; false when it is not active.
pub async fn pause_for_money(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    reason: &str,
    until: Option<DateTime<Utc>>,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update agents
         set status = 'paused', paused_by = 'budget', paused_reason = $3, paused_until = $4,
             updated_at = clock_timestamp()
         where company_id = $1 and id = $2 and status = 'active'",
        company.0,
        agent.0,
        reason,
        until,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// An agent cannot work, for a reason; false when it is not active.
pub async fn fail(tx: &mut PgConnection, company: CompanyId, agent: AgentId, why: &str) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update agents set status = 'errored', error = $3, updated_at = clock_timestamp()
         where company_id = $1 and id = $2 and status = 'active'",
        company.0,
        agent.0,
        why,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Pauses an agent that goes round in circles; false when it is not active.
pub async fn break_off(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    reason: &str,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update agents
         set status = 'paused', paused_by = 'breaker', paused_reason = $3, paused_until = null, beat_repeats = 0,
             updated_at = clock_timestamp()
         where company_id = $1 and id = $2 and status = 'active'",
        company.0,
        agent.0,
        reason,
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Agents whose money was used up go on: all, one, or those whose next period has begun.
pub async fn resume_for_money(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: Option<AgentId>,
    only_due: bool,
) -> Result<Vec<AgentId>, StoreError> {
    let agents = sqlx::query_scalar!(
        "update agents
         set status = 'active', paused_by = null, paused_reason = null, paused_until = null,
             updated_at = clock_timestamp()
         where company_id = $1 and ($2::uuid is null or id = $2) and status = 'paused' and paused_by = 'budget'
             and (not $3 or paused_until <= clock_timestamp())
         returning id",
        company.0,
        agent.map(|agent| agent.0),
        only_due,
    )
    .fetch_all(tx)
    .await?;
    Ok(agents.into_iter().map(AgentId).collect())
}

/// How long an agent stays paused whose money is used up, in milliseconds, rounded up.
pub async fn paused_for_ms(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
) -> Result<Option<i64>, StoreError> {
    let left = sqlx::query_scalar!(
        r#"select (ceil(extract(epoch from paused_until - clock_timestamp()) * 1000))::bigint as "left!" from agents
           where company_id = $1 and id = $2 and status = 'paused' and paused_by = 'budget' and paused_until is not null"#,
        company.0,
        agent.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(left.map(|left| left.max(1)))
}

/// Agents that should have gone on by now, since their money's period is over; some of them.
pub async fn overdue(pool: &PgPool) -> Result<Vec<(CompanyId, AgentId)>, StoreError> {
    let rows = sqlx::query!(
        "select company_id, id from agents
         where paused_by = 'budget' and paused_until < clock_timestamp() - interval '30 seconds' limit 100",
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (CompanyId(row.company_id), AgentId(row.id))).collect())
}

/// What the dearest call of an agent has cost.
pub async fn dearest_of(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
) -> Result<Option<Nanos>, StoreError> {
    let dearest =
        sqlx::query_scalar!("select dearest_nanos from agents where company_id = $1 and id = $2", company.0, agent.0)
            .fetch_optional(tx)
            .await?;
    Ok(dearest.flatten().map(Nanos))
}

/// Remembers what the dearest call of an agent has cost.
pub async fn dearest(tx: &mut PgConnection, company: CompanyId, agent: AgentId, cost: Nanos) -> Result<(), StoreError> {
    sqlx::query!(
        "update agents set dearest_nanos = greatest(coalesce(dearest_nanos, 0), $3)
         where company_id = $1 and id = $2",
        company.0,
        agent.0,
        cost.0,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// The roles of some agents, removed ones too.
pub async fn roles(
    tx: &mut PgConnection,
    agents: &[(CompanyId, AgentId)],
) -> Result<Vec<(AgentId, String)>, StoreError> {
    let rows = sqlx::query!(
        "select a.id, a.role
         from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
         join agents a on a.company_id = k.company_id and a.id = k.id",
        &agents.iter().map(|(company, _)| company.0).collect::<Vec<_>>(),
        &agents.iter().map(|(_, agent)| agent.0).collect::<Vec<_>>(),
    )
    .fetch_all(tx)
    .await?;
    Ok(rows.into_iter().map(|row| (AgentId(row.id), row.role)).collect())
}
