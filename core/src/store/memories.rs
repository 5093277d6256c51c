//! What agents remember.

use chrono::{DateTime, Utc};
use serde_json::Value;
use sqlx::{Executor, PgConnection, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{AgentId, CompanyId, RunId};

/// Something that is remembered.
#[derive(Debug, Clone)]
pub struct Memory {
    /// Whose: an agent, or its company.
    pub owner: Uuid,
    /// By what name.
    pub key: String,
    /// How often it was written, this time included.
    pub version: i32,
    /// What; nothing, where it was forgotten.
    pub value: Option<Value>,
    /// Who has written it.
    pub agent: Option<AgentId>,
    /// In which run.
    pub run: Option<RunId>,
    /// When.
    pub written_at: DateTime<Utc>,
}

macro_rules! memories {
    ($rows:expr) => {
        $rows
            .into_iter()
            .map(|row| Memory {
                owner: row.owner_id,
                key: row.key,
                version: row.version,
                value: row.value,
                agent: row.agent_id.map(AgentId),
                run: row.run_id.map(RunId),
                written_at: row.written_at,
            })
            .collect()
    };
}

/// Who writes what.
#[derive(Debug)]
pub struct NewMemory<'a> {
    /// Whose.
    pub company: CompanyId,
    /// An agent, or the company.
    pub owner: Uuid,
    /// By what name.
    pub key: &'a str,
    /// What; nothing, to forget it.
    pub value: Option<&'a Value>,
    /// By whom.
    pub agent: Option<AgentId>,
    /// In which run.
    pub run: Option<RunId>,
    /// The call that writes it.
    pub call: Option<&'a str>,
}

/// Locks what somebody remembers, so that two writers count on.
pub async fn lock(tx: &mut PgConnection, owner: Uuid) -> Result<(), StoreError> {
    sqlx::query!("select pg_advisory_xact_lock(hashtextextended('memory:' || $1::uuid, 0))", owner).execute(tx).await?;
    Ok(())
}

/// How many names somebody remembers things by.
pub async fn count(tx: &mut PgConnection, company: CompanyId, owner: Uuid) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select count(*) as "count!" from memories
           where company_id = $1 and owner_id = $2 and is_current and value is not null"#,
        company.0,
        owner,
    )
    .fetch_one(tx)
    .await?)
}

/// The version that a call has written, where it has.
pub async fn by_call(tx: &mut PgConnection, company: CompanyId, call: &str) -> Result<Option<i32>, StoreError> {
    Ok(sqlx::query_scalar!("select version from memories where company_id = $1 and call_key = $2", company.0, call,)
        .fetch_optional(tx)
        .await?)
}

/// Writes the next version of something, and lets go of versions older than the last few;
/// says which version it is.
pub async fn write(tx: &mut PgConnection, new: &NewMemory<'_>, keep: i32) -> Result<i32, StoreError> {
    sqlx::query!(
        "update memories set is_current = false where company_id = $1 and owner_id = $2 and key = $3 and is_current",
        new.company.0,
        new.owner,
        new.key,
    )
    .execute(&mut *tx)
    .await?;
    let version = sqlx::query_scalar!(
        r#"insert into memories (company_id, owner_id, key, version, value, is_current, agent_id, run_id, call_key)
           select $1, $2, $3, coalesce(max(version), 0) + 1, $4, true, $5, $6, $7
           from memories where company_id = $1 and owner_id = $2 and key = $3
           returning version"#,
        new.company.0,
        new.owner,
        new.key,
        new.value,
        new.agent.map(|agent| agent.0),
        new.run.map(|run| run.0),
        new.call,
    )
    .fetch_one(&mut *tx)
    .await?;
    sqlx::query!(
        "delete from memories where company_id = $1 and owner_id = $2 and key = $3 and version <= $4",
        new.company.0,
        new.owner,
        new.key,
        version - keep,
    )
    .execute(tx)
    .await?;
    Ok(version)
}

/// Something by its name, of the first owner that has it.
pub async fn get(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    owners: &[Uuid],
    key: &str,
) -> Result<Option<Memory>, StoreError> {
    let rows = sqlx::query!(
        "select owner_id, key, version, value, agent_id, run_id, written_at from memories
         where company_id = $1 and owner_id = any ($2) and key = $3 and is_current and value is not null
         order by array_position($2, owner_id) limit 1",
        company.0,
        owners,
        key,
    )
    .fetch_all(executor)
    .await?;
    let mut found: Vec<Memory> = memories!(rows);
    Ok(found.pop())
}

/// The last versions of something, the newest first.
pub async fn versions(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    owner: Uuid,
    key: &str,
) -> Result<Vec<Memory>, StoreError> {
    let rows = sqlx::query!(
        "select owner_id, key, version, value, agent_id, run_id, written_at from memories
         where company_id = $1 and owner_id = $2 and key = $3 order by version desc",
        company.0,
        owner,
        key,
    )
    .fetch_all(executor)
    .await?;
    Ok(memories!(rows))
}

/// What somebody remembers, by names from one on.
pub async fn list(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    owner: Uuid,
    after: Option<&str>,
    limit: i64,
) -> Result<Vec<Memory>, StoreError> {
    let rows = sqlx::query!(
        "select owner_id, key, version, value, agent_id, run_id, written_at from memories
         where company_id = $1 and owner_id = $2 and is_current and value is not null and ($3::text is null or key > $3)
         order by key limit $4",
        company.0,
        owner,
        after,
        limit,
    )
    .fetch_all(executor)
    .await?;
    Ok(memories!(rows))
}

/// What was written last, newest first.
pub async fn latest(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    owners: &[Uuid],
    limit: i64,
) -> Result<Vec<Memory>, StoreError> {
    let rows = sqlx::query!(
        "select owner_id, key, version, value, agent_id, run_id, written_at from memories
         where company_id = $1 and owner_id = any ($2) and is_current and value is not null
         order by written_at desc limit $3",
        company.0,
        owners,
        limit,
    )
    .fetch_all(executor)
    .await?;
    Ok(memories!(rows))
}

/// What has the words of a search in it, the best first.
pub async fn search(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    owners: &[Uuid],
    words: &str,
    limit: i64,
) -> Result<Vec<Memory>, StoreError> {
    let rows = sqlx::query!(
        "select owner_id, key, version, value, agent_id, run_id, written_at
         from memories, websearch_to_tsquery('simple', $3) q
         where company_id = $1 and owner_id = any ($2) and is_current and value is not null and words @@ q
         order by ts_rank(words, q) desc, written_at desc limit $4",
        company.0,
        owners,
        words,
        limit,
    )
    .fetch_all(executor)
    .await?;
    Ok(memories!(rows))
}
