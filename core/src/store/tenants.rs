//! Accounts, keys, companies and agents.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, AgentId, CompanyId, KeyId};

/// Finds an account by name, or makes it.
pub async fn account(
    executor: impl Executor<'_, Database = Postgres>,
    name: &str,
    tier: &str,
) -> Result<AccountId, StoreError> {
    Ok(AccountId(
        sqlx::query_scalar!(
            "insert into accounts (id, name, tier) values ($1, $2, $3)
             on conflict (name) do update set name = excluded.name returning id",
            AccountId::new().0,
            name,
            tier,
        )
        .fetch_one(executor)
        .await?,
    ))
}

/// A key to be stored: its hash, never itself.
#[derive(Debug)]
pub struct NewKey<'a> {
    /// Whose.
    pub account: AccountId,
    /// Bound to one company, or to the whole account.
    pub company: Option<CompanyId>,
    /// For people.
    pub name: &'a str,
    /// SHA-256 of the key.
    pub hash: [u8; 32],
    /// Its masked form.
    pub hint: &'a str,
    /// Spends credits and has effects.
    pub live: bool,
    /// What it may do.
    pub scopes: &'a [String],
}

/// Stores a key.
pub async fn insert_key(
    executor: impl Executor<'_, Database = Postgres>,
    key: &NewKey<'_>,
) -> Result<KeyId, StoreError> {
    let id = KeyId::new();
    sqlx::query!(
        "insert into api_keys (id, account_id, company_id, name, hash, hint, live, scopes)
         values ($1, $2, $3, $4, $5, $6, $7, $8)",
        id.0,
        key.account.0,
        key.company.map(|c| c.0),
        key.name,
        &key.hash[..],
        key.hint,
        key.live,
        key.scopes,
    )
    .execute(executor)
    .await?;
    Ok(id)
}

/// What a presented key stands for.
#[derive(Debug, Clone)]
pub struct KeyRow {
    /// The key.
    pub key: KeyId,
    /// Whose it is.
    pub account: AccountId,
    /// The one company it sees, when it is bound.
    pub company: Option<CompanyId>,
    /// Spends credits and has effects.
    pub live: bool,
    /// What it may do.
    pub scopes: Vec<String>,
    /// The account's tier.
    pub tier: String,
}

/// Looks a key up by its hash; a revoked one is not found.
pub async fn find_key(pool: &PgPool, hash: [u8; 32]) -> Result<Option<KeyRow>, StoreError> {
    let row = sqlx::query!(
        "select k.id, k.account_id, k.company_id, k.live, k.scopes, a.tier
         from api_keys k join accounts a on a.id = k.account_id
         where k.hash = $1 and k.revoked_at is null",
        &hash[..],
    )
    .fetch_optional(pool)
    .await?;
    Ok(row.map(|row| KeyRow {
        key: KeyId(row.id),
        account: AccountId(row.account_id),
        company: row.company_id.map(CompanyId),
        live: row.live,
        scopes: row.scopes,
        tier: row.tier,
    }))
}

/// Takes credits from an account; gives what is left.
pub async fn charge_credits(pool: &PgPool, account: AccountId, credits: i64) -> Result<i64, StoreError> {
    if credits == 0 {
        return Ok(sqlx::query_scalar!("select credits from accounts where id = $1", account.0)
            .fetch_one(pool)
            .await?);
    }
    Ok(sqlx::query_scalar!(
        "update accounts set credits = credits - $2 where id = $1 returning credits",
        account.0,
        credits,
    )
    .fetch_one(pool)
    .await?)
}

/// A company to be.
#[derive(Debug)]
pub struct NewCompany<'a> {
    /// Its id.
    pub company: CompanyId,
    /// Whose.
    pub account: AccountId,
    /// Display name.
    pub name: &'a str,
    /// What it does.
    pub description: Option<&'a str>,
    /// As sent.
    pub config: &'a Value,
    /// The template it came from.
    pub template: Option<&'a str>,
    /// The policy as sent.
    pub governance: Option<&'a Value>,
}

/// Stores a company in `provisioning`.
pub async fn insert_company(
    executor: impl Executor<'_, Database = Postgres>,
    new: &NewCompany<'_>,
) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        "insert into companies (id, account_id, name, description, status, config, template, governance)
         values ($1, $2, $3, $4, 'provisioning', $5, $6, $7) returning created_at",
        new.company.0,
        new.account.0,
        new.name,
        new.description,
        new.config,
        new.template,
        new.governance,
    )
    .fetch_one(executor)
    .await?)
}

/// A company as people read it.
#[derive(Debug, Clone)]
pub struct CompanyRow {
    /// Which.
    pub company: CompanyId,
    /// Whose.
    pub account: AccountId,
    /// Display name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// `provisioning`, `running`, `paused` or `stopped`.
    pub status: String,
    /// As sent, merged by later changes.
    pub config: Value,
    /// The policy as sent.
    pub governance: Option<Value>,
    /// Live agents.
    pub agent_count: i64,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
}

/// One company of an account; a key bound to another company does not see it.
pub async fn company(
    pool: &PgPool,
    account: AccountId,
    bound: Option<CompanyId>,
    company: CompanyId,
) -> Result<Option<CompanyRow>, StoreError> {
    Ok(companies_where(pool, account, bound, Some(company), None, None, 1).await?.pop())
}

/// A page of an account's companies, newest first.
pub async fn companies(
    pool: &PgPool,
    account: AccountId,
    bound: Option<CompanyId>,
    status: Option<&str>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<CompanyRow>, StoreError> {
    companies_where(pool, account, bound, None, status, before, limit).await
}

async fn companies_where(
    pool: &PgPool,
    account: AccountId,
    bound: Option<CompanyId>,
    only: Option<CompanyId>,
    status: Option<&str>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<CompanyRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select c.id, c.account_id, c.name, c.description, c.status, c.config, c.governance, c.created_at,
                  c.updated_at,
                  (select count(*) from agents a where a.company_id = c.id and a.status <> 'removed') as "agent_count!"
           from companies c
           where c.account_id = $1
               and ($2::uuid is null or c.id = $2)
               and ($3::uuid is null or c.id = $3)
               and ($4::text is null or c.status = $4)
               and ($5::uuid is null or c.id < $5)
           order by c.id desc
           limit $6"#,
        account.0,
        bound.map(|c| c.0),
        only.map(|c| c.0),
        status,
        before,
        limit,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| CompanyRow {
            company: CompanyId(row.id),
            account: AccountId(row.account_id),
            name: row.name,
            description: row.description,
            status: row.status,
            config: row.config,
            governance: row.governance,
            agent_count: row.agent_count,
            created_at: row.created_at,
            updated_at: row.updated_at,
        })
        .collect())
}

/// A company's status, where the caller has no account at hand.
pub async fn company_status(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar!("select status from companies where id = $1", company.0).fetch_optional(executor).await?)
}

/// Whose a company is.
pub async fn account_of(pool: &PgPool, company: CompanyId) -> Result<Option<AccountId>, StoreError> {
    Ok(sqlx::query_scalar!("select account_id from companies where id = $1", company.0)
        .fetch_optional(pool)
        .await?
        .map(AccountId))
}

/// Ends the provisioning of a company; false when it was over.
pub async fn company_provisioned(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update companies set status = 'running', updated_at = now() where id = $1 and status = 'provisioning'",
        company.0,
    )
    .execute(executor)
    .await?;
    Ok(done.rows_affected() == 1)
}

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
            created_at: row.created_at,
            updated_at: row.updated_at,
        }
    }};
}

/// A page of a company's agents, oldest first, after an agent. A role or an
/// id picks one; removed agents are found by id only.
pub async fn agents(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    role: Option<&str>,
    agent: Option<AgentId>,
    status: Option<&str>,
    after: Option<Uuid>,
    limit: i64,
) -> Result<Vec<AgentRow>, StoreError> {
    let rows = sqlx::query!(
        "select company_id, id, role, adapter, instructions, model, budget, config, status, error, created_at, updated_at
         from agents
         where company_id = $1
             and ($2::text is null or role = $2)
             and ($3::uuid is null or id = $3)
             and ($3::uuid is not null or status <> 'removed')
             and ($4::text is null or status = $4)
             and ($5::uuid is null or id > $5)
         order by id
         limit $6",
        company.0, role, agent.map(|a| a.0), status, after, limit,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| agent_row!(row)).collect())
}

/// The live agents of some companies.
pub async fn agents_of(pool: &PgPool, companies: &[Uuid]) -> Result<Vec<AgentRow>, StoreError> {
    let rows = sqlx::query!(
        "select company_id, id, role, adapter, instructions, model, budget, config, status, error, created_at, updated_at
         from agents where company_id = any ($1) and status <> 'removed'",
        companies,
    )
    .fetch_all(pool)
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

/// A key in a list, masked.
#[derive(Debug, Clone)]
pub struct ListedKey {
    /// The key.
    pub key: KeyId,
    /// For people.
    pub name: String,
    /// The account's name.
    pub account: String,
    /// Its masked form.
    pub hint: String,
    /// What it may do.
    pub scopes: Vec<String>,
    /// Whether it was revoked.
    pub revoked: bool,
}

/// The keys, newest first, at most a thousand.
pub async fn list_keys(pool: &PgPool) -> Result<Vec<ListedKey>, StoreError> {
    let rows = sqlx::query!(
        r#"select k.id, k.name, a.name as account, k.hint, k.scopes, k.revoked_at is not null as "revoked!"
           from api_keys k join accounts a on a.id = k.account_id
           order by k.id desc limit 1000"#,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| ListedKey {
            key: KeyId(row.id),
            name: row.name,
            account: row.account,
            hint: row.hint,
            scopes: row.scopes,
            revoked: row.revoked,
        })
        .collect())
}

/// Revokes a key; false when there is no such active one.
pub async fn revoke_key(pool: &PgPool, key: KeyId) -> Result<bool, StoreError> {
    let done = sqlx::query!("update api_keys set revoked_at = now() where id = $1 and revoked_at is null", key.0)
        .execute(pool)
        .await?;
    Ok(done.rows_affected() == 1)
}
