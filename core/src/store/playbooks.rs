//! Playbooks and their immutable versions.

use chrono::{DateTime, Utc};
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::{CompanyId, PlaybookId, VersionId};
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
    let version = sqlx::query_scalar!(
        r#"insert into playbook_versions (company_id, id, playbook_id, version, yaml, content_hash)
           select $1, $2, $3, coalesce(max(version), 0) + 1, $4, $5
           from playbook_versions where company_id = $1 and playbook_id = $3
           returning version"#,
        new.company.0,
        version_id.0,
        playbook.0,
        new.yaml,
        &new.hash[..],
    )
    .fetch_one(&mut *tx)
    .await?;
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

/// A playbook with its current version and what its runs have shown.
#[derive(Debug, Clone)]
pub struct PlaybookRow {
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
    /// Its text.
    pub yaml: String,
    /// When it was made.
    pub created_at: DateTime<Utc>,
    /// How many runs there were.
    pub run_count: i64,
    /// When the last began.
    pub last_run_at: Option<DateTime<Utc>>,
    /// What one cost, of those that ended.
    pub avg_run_cost: Nanos,
    /// How long one took, of those that ended, in seconds.
    pub avg_run_duration_s: i64,
}

/// What picks playbooks out of a company.
#[derive(Debug, Clone, Default)]
pub struct Filter<'a> {
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

/// A page of a company's playbooks, newest first.
pub async fn list(
    pool: &PgPool,
    company: CompanyId,
    filter: &Filter<'_>,
    limit: i64,
) -> Result<Vec<PlaybookRow>, StoreError> {
    let rows = sqlx::query!(
        r#"select p.id, p.name, p.description, p.status, p.tags, p.current_version_id, p.created_at,
                  v.version, v.yaml, s.run_count as "run_count!", s.last_run_at,
                  s.avg_cost as "avg_cost!", s.avg_duration_s as "avg_duration_s!"
           from playbooks p
           join playbook_versions v on v.company_id = p.company_id and v.id = p.current_version_id
           cross join lateral (
               select count(*) as run_count, max(started_at) as last_run_at,
                   coalesce(avg(cost_nanos) filter (where ended_at is not null), 0)::bigint as avg_cost,
                   coalesce(extract(epoch from avg(ended_at - started_at)), 0)::bigint as avg_duration_s
               from runs r where r.company_id = p.company_id and r.playbook_id = p.id
           ) s
           where p.company_id = $1
               and ($2::uuid is null or p.id = $2)
               and ($3::text is null or p.name = $3)
               and ($4::text is null or p.status = $4)
               and p.tags @> $5::text[]
               and ($6::uuid is null or p.id < $6)
           order by p.id desc
           limit $7"#,
        company.0,
        filter.playbook.map(|p| p.0),
        filter.name,
        filter.status,
        filter.tags,
        filter.before,
        limit,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows
        .into_iter()
        .map(|row| PlaybookRow {
            playbook: PlaybookId(row.id),
            name: row.name,
            description: row.description,
            status: row.status,
            tags: row.tags,
            version_id: VersionId(row.current_version_id),
            version: row.version,
            yaml: row.yaml,
            created_at: row.created_at,
            run_count: row.run_count,
            last_run_at: row.last_run_at,
            avg_run_cost: Nanos(row.avg_cost),
            avg_run_duration_s: row.avg_duration_s,
        })
        .collect())
}

/// What a start of a run needs: the playbook's status and current version.
pub async fn for_start(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    playbook: PlaybookId,
) -> Result<Option<(String, VersionId)>, StoreError> {
    let row = sqlx::query!(
        "select status, current_version_id from playbooks where company_id = $1 and id = $2",
        company.0,
        playbook.0,
    )
    .fetch_optional(executor)
    .await?;
    Ok(row.map(|row| (row.status, VersionId(row.current_version_id))))
}

/// The texts of some versions.
pub async fn versions(pool: &PgPool, companies: &[Uuid], versions: &[Uuid]) -> Result<Vec<(Uuid, String)>, StoreError> {
    let rows = sqlx::query!(
        "select v.id, v.yaml
         from unnest($1::uuid[], $2::uuid[]) as k (company_id, id)
         cross join lateral (
             select * from playbook_versions v where v.company_id = k.company_id and v.id = k.id offset 0
         ) v",
        companies,
        versions,
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|row| (row.id, row.yaml)).collect())
}
