//! Accounts, keys and companies.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AccountId, CompanyId, KeyId};
use crate::domain::money::Nanos;

/// Finds an account by name, or makes it.
pub async fn account(
    executor: impl Executor<'_, Database = Postgres>,
    name: &str,
    tier: &str,
) -> Result<AccountId, StoreError> {
    Ok(AccountId(
        sqlx::query_scalar!(
            "insert into accounts (id, name, tier, operator) values ($1, $2, $3, not exists (select from accounts))
             on conflict (name) do update set name = excluded.name returning id",
            AccountId::new().0,
            name,
            tier,
        )
        .fetch_one(executor)
        .await?,
    ))
}

/// Whether an account runs the fleet.
pub async fn is_operator(tx: &mut PgConnection, account: AccountId) -> Result<bool, StoreError> {
    let operator = sqlx::query_scalar!("select operator from accounts where id = $1", account.0);
    Ok(operator.fetch_optional(tx).await?.unwrap_or(false))
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

/// Whether there is an active key with this hash.
pub async fn is_active_key(pool: &PgPool, hash: [u8; 32]) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select exists (select from api_keys where hash = $1 and revoked_at is null) as "is_active!""#,
        &hash[..],
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
    executor: impl Executor<'_, Database = Postgres>,
    account: AccountId,
    bound: Option<CompanyId>,
    company: CompanyId,
) -> Result<Option<CompanyRow>, StoreError> {
    if bound.is_some_and(|bound| bound != company) {
        return Ok(None);
    }
    let row = sqlx::query_as!(
        CompanyRow,
        r#"select c.id as company, c.account_id as account, c.name, c.description, c.status,
                  c.config, c.governance, c.created_at, c.updated_at,
                  (select count(*) from agents a where a.company_id = c.id and a.status <> 'removed') as "agent_count!"
           from companies c
           where c.id = $1 and c.account_id = $2"#,
        company.0,
        account.0,
    )
    .fetch_optional(executor)
    .await?;
    Ok(row)
}

/// One company, for those who work for it.
pub async fn company_by_id(tx: &mut PgConnection, company: CompanyId) -> Result<Option<CompanyRow>, StoreError> {
    Ok(sqlx::query_as!(
        CompanyRow,
        r#"select c.id as company, c.account_id as account, c.name, c.description, c.status,
                  c.config, c.governance, c.created_at, c.updated_at, 0::bigint as "agent_count!"
           from companies c where c.id = $1"#,
        company.0,
    )
    .fetch_optional(tx)
    .await?)
}

/// The same with all that it has spent: in one statement, since this is what is
/// asked for most.
pub async fn company_with_cost(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    company: CompanyId,
) -> Result<Option<(CompanyRow, Nanos)>, StoreError> {
    if bound.is_some_and(|bound| bound != company) {
        return Ok(None);
    }
    let row = sqlx::query!(
        r#"select c.id, c.account_id, c.name, c.description, c.status,
                  c.config, c.governance, c.created_at, c.updated_at,
                  (select count(*) from agents a where a.company_id = c.id and a.status <> 'removed') as "agent_count!",
                  least((select coalesce(sum(t.nanos), 0) from cost_totals t where t.company_id = c.id)
                      + (select coalesce(sum(d.nanos), 0) from cost_deltas d where d.company_id = c.id),
                      9223372036854775807)::bigint as "nanos!"
           from companies c
           where c.id = $1 and c.account_id = $2"#,
        company.0,
        account.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| {
        let company = CompanyRow {
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
        };
        (company, Nanos(row.nanos))
    }))
}

/// Whether an account has a company, and a key bound to one may see it.
pub async fn sees_company(
    executor: impl Executor<'_, Database = Postgres>,
    account: AccountId,
    bound: Option<CompanyId>,
    company: CompanyId,
) -> Result<bool, StoreError> {
    if bound.is_some_and(|bound| bound != company) {
        return Ok(false);
    }
    let found = sqlx::query_scalar!("select id from companies where id = $1 and account_id = $2", company.0, account.0)
        .fetch_optional(executor)
        .await?;
    Ok(found.is_some())
}

/// A page of an account's companies, newest first.
pub async fn companies(
    executor: impl Executor<'_, Database = Postgres>,
    account: AccountId,
    bound: Option<CompanyId>,
    status: Option<&str>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<CompanyRow>, StoreError> {
    let rows = sqlx::query_as!(
        CompanyRow,
        r#"select c.id as company, c.account_id as account, c.name, c.description, c.status,
                  c.config, c.governance, c.created_at, c.updated_at,
                  (select count(*) from agents a where a.company_id = c.id and a.status <> 'removed') as "agent_count!"
           from companies c
           where c.account_id = $1
               and ($2::uuid is null or c.id = $2)
               and ($3::text is null or c.status = $3)
               and ($4::uuid is null or c.id < $4)
           order by c.id desc
           limit $5"#,
        account.0,
        bound.map(|c| c.0),
        status,
        before,
        limit,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows)
}

/// The ids of an account's companies, newest first, at most `limit`.
pub async fn company_ids(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    limit: i64,
) -> Result<Vec<Uuid>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select id from companies where account_id = $1 and ($2::uuid is null or id = $2) order by id desc limit $3",
        account.0,
        bound.map(|company| company.0),
        limit,
    )
    .fetch_all(tx)
    .await?)
}

/// Changes what is given of a company; `config` is merged.
pub async fn update_company(
    tx: &mut PgConnection,
    company: CompanyId,
    (name, description): (Option<&str>, Option<&str>),
    config: Option<&Value>,
    governance: Option<&Value>,
) -> Result<(), StoreError> {
    sqlx::query!(
        "update companies
         set name = coalesce($2, name), description = coalesce($3, description),
             config = config || coalesce($4::jsonb, '{}'::jsonb),
             governance = case when $5::jsonb is null then governance else nullif($5::jsonb, 'null') end, updated_at = now()
         where id = $1",
        company.0,
        name,
        description,
        config,
        governance,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Locks a company; its status, and since when it has it as far as answers
/// tell that.
pub async fn lock_company(
    tx: &mut PgConnection,
    company: CompanyId,
) -> Result<Option<(String, DateTime<Utc>)>, StoreError> {
    let row = sqlx::query!(
        r#"select status, case status when 'paused' then coalesce(paused_at, updated_at)
                                      when 'stopped' then coalesce(stopped_at, updated_at)
                                      else updated_at end as "since!"
           from companies where id = $1 for update"#,
        company.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| (row.status, row.since)))
}

/// Sets a company's status, decided under its lock; says when.
pub async fn set_company_status(
    tx: &mut PgConnection,
    company: CompanyId,
    status: &str,
    killed: bool,
) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        "update companies
         set updated_at = case when status = $2 then updated_at else clock_timestamp() end,
             paused_at = case when $2 = 'paused' and status <> 'paused' then clock_timestamp() else paused_at end,
             killed_at = case when $3 then clock_timestamp() end, status = $2,
             stopped_at = case when $2 = 'stopped' then clock_timestamp() end
         where id = $1 and status <> 'stopped' returning updated_at",
        company.0,
        status,
        killed,
    )
    .fetch_one(tx)
    .await?)
}

/// Takes a company out of sight, and the keys that were bound to it.
pub async fn delete_company(tx: &mut PgConnection, company: CompanyId) -> Result<(), StoreError> {
    sqlx::query!("update api_keys set revoked_at = now() where company_id = $1 and revoked_at is null", company.0)
        .execute(&mut *tx)
        .await?;
    sqlx::query!("delete from companies where id = $1", company.0).execute(tx).await?;
    Ok(())
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
    /// The one company it sees, when it is bound.
    pub company: Option<CompanyId>,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// The keys, newest first, at most a thousand.
pub async fn list_keys(pool: &PgPool) -> Result<Vec<ListedKey>, StoreError> {
    let rows = sqlx::query!(
        r#"select k.id, k.name, a.name as account, k.hint, k.scopes, k.revoked_at is not null as "revoked!", k.company_id, k.created_at
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
            company: row.company_id.map(CompanyId),
            created_at: row.created_at,
        })
        .collect())
}

/// A page of an account's keys, newest first; of one company's where the caller
/// is bound to it.
pub async fn keys_of(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    before: Option<Uuid>,
    limit: i64,
) -> Result<Vec<ListedKey>, StoreError> {
    let rows = sqlx::query!(
        r#"select k.id, k.name, a.name as account, k.hint, k.scopes, k.revoked_at is not null as "revoked!", k.company_id,
               k.created_at
           from api_keys k join accounts a on a.id = k.account_id
           where k.account_id = $1 and ($2::uuid is null or k.company_id = $2) and ($3::uuid is null or k.id < $3)
           order by k.id desc limit $4"#,
        account.0,
        bound.map(|company| company.0),
        before,
        limit,
    )
    .fetch_all(tx)
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
            company: row.company_id.map(CompanyId),
            created_at: row.created_at,
        })
        .collect())
}

/// How many active keys are bound to a company.
pub async fn active_keys(tx: &mut PgConnection, company: CompanyId) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from api_keys where company_id = $1 and revoked_at is null"#,
        company.0,
    )
    .fetch_one(tx)
    .await?)
}

/// Revokes a key of an account; false when it has no such key. One that is
/// revoked stays so.
pub async fn revoke_key_of(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    key: KeyId,
) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "update api_keys set revoked_at = coalesce(revoked_at, now())
         where id = $1 and account_id = $2 and ($3::uuid is null or company_id = $3)",
        key.0,
        account.0,
        bound.map(|company| company.0),
    )
    .execute(tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Revokes a key; false when there is no such active one.
pub async fn revoke_key(executor: impl Executor<'_, Database = Postgres>, key: KeyId) -> Result<bool, StoreError> {
    let done = sqlx::query!("update api_keys set revoked_at = now() where id = $1 and revoked_at is null", key.0)
        .execute(executor)
        .await?;
    Ok(done.rows_affected() == 1)
}

/// What a key may do and for whom.
#[derive(Debug)]
pub struct KeyGrant {
    /// Whose it is.
    pub account: AccountId,
    /// The one company it sees, when it is bound.
    pub company: Option<CompanyId>,
    /// For people.
    pub name: String,
    /// Spends credits and has effects.
    pub live: bool,
    /// What it may do.
    pub scopes: Vec<String>,
}

/// What an active key may do.
pub async fn grant_of(tx: &mut PgConnection, key: KeyId) -> Result<Option<KeyGrant>, StoreError> {
    let row = sqlx::query!(
        "select account_id, company_id, name, live, scopes from api_keys
         where id = $1 and revoked_at is null for update",
        key.0,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| KeyGrant {
        account: AccountId(row.account_id),
        company: row.company_id.map(CompanyId),
        name: row.name,
        live: row.live,
        scopes: row.scopes,
    }))
}
