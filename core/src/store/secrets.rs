//! Secrets of companies, as they are sealed.

use chrono::{DateTime, Utc};
use sqlx::{Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::StoreError;
use crate::domain::ids::CompanyId;
use crate::domain::secret::SECRETS_MAX;
use crate::domain::secret::seal::Sealed;

/// A secret as people read of it: never what it is.
#[derive(Debug, Clone)]
pub struct SecretRow {
    /// Its name in the company.
    pub name: String,
    /// The id of the key that opens it.
    pub key_id: String,
    /// When it was first set.
    pub created_at: DateTime<Utc>,
    /// When it was last set.
    pub updated_at: DateTime<Utc>,
    /// The id of the API key that has set it.
    pub updated_by: String,
}

/// Sets a secret, and whether it is new; `None` when the company has as many as it may.
pub async fn put(
    tx: &mut PgConnection,
    company: CompanyId,
    name: &str,
    sealed: &Sealed,
    by: &str,
) -> Result<Option<(SecretRow, bool)>, StoreError> {
    // Under a lock of its own, so that two at once do not both fit.
    let lock = format!("secrets of {company}");
    sqlx::query!("select pg_advisory_xact_lock(hashtextextended($1, 0))", lock).fetch_one(&mut *tx).await?;
    let row = sqlx::query!(
        r#"insert into company_secrets (company_id, name, key_id, sealed, updated_by)
           select $1, $2, $3, $4, $5
           where (select count(*) from company_secrets where company_id = $1 and name <> $2) < $6
           on conflict (company_id, name) do update
           set key_id = excluded.key_id, sealed = excluded.sealed, updated_by = excluded.updated_by,
               updated_at = clock_timestamp()
           returning name, key_id, created_at, updated_at, updated_by, xmax = 0 as "is_new!""#,
        company.0,
        name,
        sealed.key,
        sealed.bytes,
        by,
        SECRETS_MAX,
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| {
        let shown = SecretRow {
            name: row.name,
            key_id: row.key_id,
            created_at: row.created_at,
            updated_at: row.updated_at,
            updated_by: row.updated_by,
        };
        (shown, row.is_new)
    }))
}

/// A company's secrets by name, behind a name.
pub async fn list(
    tx: &mut PgConnection,
    company: CompanyId,
    after: Option<&str>,
    limit: i64,
) -> Result<Vec<SecretRow>, StoreError> {
    Ok(sqlx::query_as!(
        SecretRow,
        "select name, key_id, created_at, updated_at, updated_by from company_secrets
         where company_id = $1 and ($2::text is null or name > $2) order by name limit $3",
        company.0,
        after,
        limit,
    )
    .fetch_all(tx)
    .await?)
}

/// Forgets a secret; false when there is none of that name.
pub async fn delete(tx: &mut PgConnection, company: CompanyId, name: &str) -> Result<bool, StoreError> {
    let done = sqlx::query!("delete from company_secrets where company_id = $1 and name = $2", company.0, name);
    Ok(done.execute(tx).await?.rows_affected() == 1)
}

/// Those of some names that a company does not have.
pub async fn missing(
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    names: &[String],
) -> Result<Vec<String>, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select n as "name!" from unnest($2::text[]) n
           where not exists (select from company_secrets s where s.company_id = $1 and s.name = n)"#,
        company.0,
        names,
    )
    .fetch_all(executor)
    .await?)
}

/// The secrets of some companies.
pub async fn of_companies(pool: &PgPool, companies: &[Uuid]) -> Result<Vec<(CompanyId, String, Sealed)>, StoreError> {
    let rows = sqlx::query!(
        "select company_id, name, key_id, sealed from company_secrets where company_id = any ($1)",
        companies
    )
    .fetch_all(pool)
    .await?;
    let sealed = |key, bytes| Sealed { key, bytes };
    Ok(rows.into_iter().map(|row| (CompanyId(row.company_id), row.name, sealed(row.key_id, row.sealed))).collect())
}

/// A secret that another key than this one has sealed; it is locked.
pub async fn sealed_otherwise(
    tx: &mut PgConnection,
    key: &str,
) -> Result<Option<(CompanyId, String, Sealed)>, StoreError> {
    let row = sqlx::query!(
        "select company_id, name, key_id, sealed from company_secrets where key_id <> $1
         order by company_id, name limit 1 for update",
        key
    )
    .fetch_optional(tx)
    .await?;
    Ok(row.map(|row| (CompanyId(row.company_id), row.name, Sealed { key: row.key_id, bytes: row.sealed })))
}

/// Keeps a secret that is sealed anew.
pub async fn reseal(tx: &mut PgConnection, company: CompanyId, name: &str, sealed: &Sealed) -> Result<(), StoreError> {
    sqlx::query!(
        "update company_secrets set key_id = $3, sealed = $4 where company_id = $1 and name = $2",
        company.0,
        name,
        sealed.key,
        sealed.bytes,
    )
    .execute(tx)
    .await?;
    Ok(())
}
