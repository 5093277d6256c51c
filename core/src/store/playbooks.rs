//! Playbooks and their immutable versions.

use std::sync::Arc;

use chrono::{DateTime, Utc};
use sqlx::{Executor, PgConnection, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::governance::Policy;
use crate::domain::ids::{AccountId, CompanyId, PlaybookId, VersionId};
use crate::domain::money::Nanos;

/// A playbook to be, or a new version of one.
#[derive(Debug)]
pub struct NewPlaybook<'a> {
    /// Whose.
    pub company: CompanyId,
    /// Unique within the company.
    pub name: &'a str,
    /// For people.
    pub description: Option<&'a str>,
    /// For filters.
    pub tags: &'a [String],
    /// As written.
    pub yaml: &'a str,
    /// SHA-256 of that.
    pub hash: [u8; 32],
    /// Its steps.
    pub step_count: i32,
}

/// What became of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Upserted {
    /// The playbook.
    pub playbook: PlaybookId,
    /// Its version now.
    pub version: i32,
    /// Whether anything is new.
    pub changed: bool,
}

/// Stores a playbook; the same name in the same company is a new version
/// when the text changed, and nothing when it did not. Two statements and a
/// row lock: the caller gives a transaction.
pub async fn upsert(tx: &mut PgConnection, new: &NewPlaybook<'_>) -> Result<Upserted, StoreError> {
    let version_id = VersionId::new();
    let row = sqlx::query!(
        r#"insert into playbooks as p (company_id, id, name, description, status, tags, current_version_id)
           values ($1, $2, $3, $4, 'active', $5, $6)
           on conflict on constraint playbooks_name do update set name = excluded.name
           returning p.id, p.current_version_id, (xmax = 0) as "is_new!""#,
        new.company.0,
        PlaybookId::new().0,
        new.name,
        new.description,
        new.tags,
        version_id.0,
    )
    .fetch_one(&mut *tx)
    .await?;
    let playbook = PlaybookId(row.id);
    if !row.is_new {
        let current = sqlx::query!(
            "select version, content_hash from playbook_versions where company_id = $1 and id = $2",
            new.company.0,
            row.current_version_id,
        )
        .fetch_one(&mut *tx)
        .await?;
        if current.content_hash == new.hash {
            return Ok(Upserted { playbook, version: current.version, changed: false });
        }
    }
    let version = add_version(tx, playbook, version_id, new).await?;
    if !row.is_new {
        sqlx::query!(
            "update playbooks
             set current_version_id = $3, description = coalesce($4, description),
                 tags = case when cardinality($5::text[]) > 0 then $5 else tags end, updated_at = now()
             where company_id = $1 and id = $2",
            new.company.0,
            playbook.0,
            version_id.0,
            new.description,
            new.tags,
        )
        .execute(&mut *tx)
        .await?;
    }
    Ok(Upserted { playbook, version, changed: true })
}

/// Stores the next version of a playbook, whose row is locked.
async fn add_version(
    tx: &mut PgConnection,
    playbook: PlaybookId,
    version: VersionId,
    new: &NewPlaybook<'_>,
) -> Result<i32, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"insert into playbook_versions (company_id, id, playbook_id, version, yaml, content_hash, step_count)
           select $1, $2, $3, coalesce(max(version), 0) + 1, $4, $5, $6
           from playbook_versions where company_id = $1 and playbook_id = $3
           returning version"#,
        new.company.0,
        version.0,
        playbook.0,
        new.yaml,
        &new.hash[..],
        new.step_count,
    )
    .fetch_one(tx)
    .await?)
}

/// A playbook that is our own: it is not listed.
pub async fn keep_builtin(tx: &mut PgConnection, new: &NewPlaybook<'_>) -> Result<PlaybookId, StoreError> {
    let playbook = upsert(tx, new).await?.playbook;
    sqlx::query!(
        "update playbooks set builtin = true, triggers_of = current_version_id
         where company_id = $1 and id = $2 and not builtin",
        new.company.0,
        playbook.0,
    )
    .execute(tx)
    .await?;
    Ok(playbook)
}

/// Changes what is given of a playbook; another text is its next version.
pub async fn update(
    tx: &mut PgConnection,
    playbook: PlaybookId,
    new: &NewPlaybook<'_>,
    has_tags: bool,
    has_text: bool,
) -> Result<(), StoreError> {
    let current = sqlx::query_scalar!(
        "select v.content_hash from playbooks p
         join playbook_versions v on v.company_id = p.company_id and v.id = p.current_version_id
         where p.company_id = $1 and p.id = $2 for update of p",
        new.company.0,
        playbook.0,
    )
    .fetch_one(&mut *tx)
    .await?;
    let version = (has_text && current != new.hash).then(VersionId::new);
    if let Some(version) = version {
        add_version(&mut *tx, playbook, version, new).await?;
    }
    sqlx::query!(
        "update playbooks
         set current_version_id = coalesce($3, current_version_id), name = $4, description = coalesce($5, description),
             tags = case when $6 then $7 else tags end, updated_at = now()
         where company_id = $1 and id = $2",
        new.company.0,
        playbook.0,
        version.map(|v| v.0),
        new.name,
        new.description,
        has_tags,
        new.tags,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// Sets a playbook's status; says when.
pub async fn set_status(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    status: &str,
    killed: bool,
) -> Result<DateTime<Utc>, StoreError> {
    Ok(sqlx::query_scalar!(
        "update playbooks
         set killed_at = case when $4 then clock_timestamp() when $3 = 'active' then null else killed_at end,
             updated_at = case when status = $3 then updated_at else clock_timestamp() end, status = $3
         where company_id = $1 and id = $2 returning updated_at",
        company.0,
        playbook.0,
        status,
        killed,
    )
    .fetch_one(tx)
    .await?)
}

/// Deletes a playbook that has no runs; false when it has some. Its versions
/// stay, out of sight: a run that is starting at this moment needs one.
pub async fn delete(tx: &mut PgConnection, company: CompanyId, playbook: PlaybookId) -> Result<bool, StoreError> {
    let done = sqlx::query!(
        "delete from playbooks p
         where p.company_id = $1 and p.id = $2
             and not exists (select from runs r where r.playbook_id = $2 and r.company_id = $1)",
        company.0,
        playbook.0,
    )
    .execute(&mut *tx)
    .await?;
    Ok(done.rows_affected() == 1)
}

/// A version of a playbook.
#[derive(Debug, Clone)]
pub struct VersionRow {
    /// Its number.
    pub version: i32,
    /// Its text.
    pub yaml: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
}

/// A page of a playbook's versions, newest first, before a number.
pub async fn versions_of(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    before: i32,
    limit: i64,
) -> Result<Vec<VersionRow>, StoreError> {
    Ok(sqlx::query_as!(
        VersionRow,
        "select version, '' as \"yaml!\", created_at from playbook_versions
         where company_id = $1 and playbook_id = $2 and version < $3 order by version desc limit $4",
        company.0,
        playbook.0,
        before,
        limit,
    )
    .fetch_all(tx)
    .await?)
}

/// One version of a playbook.
pub async fn version(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    number: i32,
) -> Result<Option<VersionRow>, StoreError> {
    Ok(sqlx::query_as!(
        VersionRow,
        "select version, yaml, created_at from playbook_versions
         where company_id = $1 and playbook_id = $2 and version = $3",
        company.0,
        playbook.0,
        number,
    )
    .fetch_optional(tx)
    .await?)
}

/// A playbook with its current version and what its runs have shown.
#[derive(Debug, Clone)]
pub struct PlaybookRow {
    /// Whose.
    pub company: CompanyId,
    /// Which.
    pub playbook: PlaybookId,
    /// Its name.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// `active`, `paused` or `archived`.
    pub status: String,
    /// For filters.
    pub tags: Vec<String>,
    /// The current version.
    pub version_id: VersionId,
    /// Its number.
    pub version: i32,
    /// Its text, where it was asked for by its id.
    pub yaml: String,
    /// Its steps.
    pub step_count: i32,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// When it last changed.
    pub updated_at: DateTime<Utc>,
    /// How many runs there were, where that was asked for, as what follows.
    pub run_count: i64,
    /// When the last began.
    pub last_run_at: Option<DateTime<Utc>>,
    /// What one cost, of those that ended.
    pub avg_run_cost: Nanos,
    /// How long one took, of those that ended, in seconds.
    pub avg_run_duration_s: i64,
}

/// What picks playbooks.
#[derive(Debug, Clone, Default)]
pub struct Filter<'a> {
    /// Of an account.
    pub account: Option<AccountId>,
    /// Of one company.
    pub company: Option<CompanyId>,
    /// One by id.
    pub playbook: Option<PlaybookId>,
    /// One by name.
    pub name: Option<&'a str>,
    /// By status.
    pub status: Option<&'a str>,
    /// By tags, all of them.
    pub tags: &'a [String],
    /// Older than this one.
    pub before: Option<Uuid>,
}

/// A page of playbooks, newest first.
pub async fn list(
    executor: impl Executor<'_, Database = Postgres>,
    filter: &Filter<'_>,
    limit: i64,
) -> Result<Vec<PlaybookRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select p.company_id, p.id, p.name, p.description, p.status, p.tags, p.current_version_id, p.created_at,
                  p.updated_at, v.version, v.step_count,
                  -- Long, and only shown of one.
                  case when $3::uuid is not null then v.yaml else '' end as "yaml!"
           from (
               select p.* from companies c
               cross join lateral (
                   select p.* from playbooks p
                   where p.company_id = c.id
                       and ($3::uuid is not null or not p.builtin)
                       and ($3::uuid is null or p.id = $3)
                       and ($4::text is null or p.name = $4)
                       and ($5::text is null or p.status = $5)
                       and p.tags @> $6::text[]
                       and ($7::uuid is null or p.id < $7)
                   order by p.id desc
                   limit $8
               ) p
               where ($1::uuid is null or c.id = $1) and ($2::uuid is null or c.account_id = $2)
               order by p.id desc
               limit $8
           ) p
           join playbook_versions v on v.company_id = p.company_id and v.id = p.current_version_id
           order by p.id desc"#,
        filter.company.map(|c| c.0),
        filter.account.map(|a| a.0),
        filter.playbook.map(|p| p.0),
        filter.name,
        filter.status,
        filter.tags,
        filter.before,
        limit,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| PlaybookRow {
            company: CompanyId(row.company_id),
            playbook: PlaybookId(row.id),
            name: row.name,
            description: row.description,
            status: row.status,
            tags: row.tags,
            version_id: VersionId(row.current_version_id),
            version: row.version,
            yaml: row.yaml,
            step_count: row.step_count,
            created_at: row.created_at,
            updated_at: row.updated_at,
            run_count: 0,
            last_run_at: None,
            avg_run_cost: Nanos::ZERO,
            avg_run_duration_s: 0,
        })
        .collect())
}

/// What a start of a run needs.
#[derive(Debug)]
pub struct ForStart {
    /// The playbook's status.
    pub status: String,
    /// Its current version.
    pub version: VersionId,
    /// Its company's status.
    pub company_status: String,
    /// What that allows.
    pub policy: Arc<Policy>,
}

/// What a start of a run needs, in one look.
pub async fn for_start(
    executor: impl Executor<'_, Database = Postgres>,
    account: Option<AccountId>,
    company: CompanyId,
    playbook: PlaybookId,
) -> Result<Option<ForStart>, StoreError> {
    let row = sqlx::query!(
        "select p.status, p.current_version_id, c.status as company_status, c.governance, c.config
         from playbooks p join companies c on c.id = p.company_id
         where p.company_id = $1 and p.id = $2 and ($3::uuid is null or c.account_id = $3)",
        company.0,
        playbook.0,
        account.map(|account| account.0),
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| ForStart {
        status: row.status,
        version: VersionId(row.current_version_id),
        company_status: row.company_status,
        policy: Arc::new(Policy::of(row.governance.as_ref(), &row.config)),
    }))
}

/// The texts of some versions.
pub async fn versions(
    executor: impl Executor<'_, Database = Postgres>,
    companies: &[Uuid],
    versions: &[Uuid],
) -> Result<Vec<(Uuid, String)>, StoreError> {
    let rows = sqlx::query!(
        "select v.id, v.yaml
         from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
         cross join lateral (
             select * from playbook_versions v where v.company_id = k.company_id and v.id = k.id offset 0
         ) v",
        companies,
        versions,
    )
    .fetch_all(executor)
    .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.yaml)).collect())
}
