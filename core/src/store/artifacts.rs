//! Artifacts: large outputs, in chunks, once a company for the same bytes.

use sqlx::{Executor, PgConnection, PgPool, Postgres};

use super::StoreError;
use super::jobs::Lease;
use crate::domain::artifact::{Artifact, RUN_ARTIFACTS_BYTES_MAX};
use crate::domain::ids::{CompanyId, RunId};

/// How much one statement writes or reads, in bytes.
pub const CHUNK_BYTES: usize = 1024 * 1024;

/// What may be stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Admitted {
    /// Its chunks, then [`finish`].
    New,
    /// Nothing: the company has it.
    Known,
    /// Nothing: the lease is gone.
    Lost,
    /// Nothing: the run would have too much.
    Full,
}

/// Books an artifact for a run, under the lease of an attempt of it.
pub async fn admit(
    pool: &PgPool,
    lease: Lease,
    (company, run): (CompanyId, RunId),
    artifact: &Artifact,
) -> Result<Admitted, StoreError> {
    let row = sqlx::query!(
        r#"with held as materialized (
               select from jobs where id = $1 and lease_epoch = $2 and session_id = $3 and state = 'running'
           ),
           kept as materialized (
               select coalesce(sum(bytes), 0)::bigint as bytes from run_artifacts
               where company_id = $4 and run_id = $5 and sha256 <> $6
           ),
           booked as (
               insert into run_artifacts (company_id, run_id, sha256, bytes)
               select $4, $5, $6, $7 from held, kept where kept.bytes + $7 <= $8
               on conflict do nothing
           )
           select exists (select from held) as "held!", (select kept.bytes + $7 <= $8 from kept) as "fits!",
               exists (select from artifacts where company_id = $4 and sha256 = $6) as "known!""#,
        lease.job,
        lease.epoch,
        lease.session,
        company.0,
        run.0,
        artifact.sha256,
        size(artifact),
        RUN_ARTIFACTS_BYTES_MAX,
    )
    .fetch_one(pool)
    .await?;
    Ok(match (row.held, row.fits, row.known) {
        (false, ..) => Admitted::Lost,
        (_, false, _) => Admitted::Full,
        (.., true) => Admitted::Known,
        _ => Admitted::New,
    })
}

/// Stores a chunk, from 0 on; the same again is nothing.
pub async fn put_chunk(
    db: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    artifact: &Artifact,
    seq: usize,
    data: &[u8],
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into artifact_chunks (company_id, sha256, seq, data) values ($1, $2, $3, $4) on conflict do nothing",
        company.0,
        artifact.sha256,
        i32::try_from(seq).unwrap_or(i32::MAX),
        data,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// All chunks are there: from now on it can be read.
pub async fn finish(
    db: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    artifact: &Artifact,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into artifacts (company_id, sha256, bytes, content_type) values ($1, $2, $3, $4)
         on conflict do nothing",
        company.0,
        artifact.sha256,
        size(artifact),
        artifact.content_type,
    )
    .execute(db)
    .await?;
    Ok(())
}

/// Stores what a run gives as a whole, in the transaction that ends it: whatever its steps
/// have stored before.
pub async fn put(
    tx: &mut PgConnection,
    (company, run): (CompanyId, RunId),
    artifact: &Artifact,
    bytes: &[u8],
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into run_artifacts (company_id, run_id, sha256, bytes) values ($1, $2, $3, $4) on conflict do nothing",
        company.0,
        run.0,
        artifact.sha256,
        size(artifact),
    )
    .execute(&mut *tx)
    .await?;
    for (seq, chunk) in bytes.chunks(CHUNK_BYTES).enumerate() {
        put_chunk(&mut *tx, company, artifact, seq, chunk).await?;
    }
    finish(tx, company, artifact).await
}

/// An artifact of a company, as it was first stored.
pub async fn find(
    db: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    sha256: &str,
) -> Result<Option<Artifact>, StoreError> {
    let row = sqlx::query!(
        "select bytes, content_type from artifacts where company_id = $1 and sha256 = $2",
        company.0,
        sha256,
    )
    .fetch_optional(db)
    .await?;
    Ok(row.map(|row| Artifact {
        sha256: sha256.to_owned(),
        bytes: usize::try_from(row.bytes).unwrap_or(0),
        content_type: row.content_type,
    }))
}

/// A chunk of one, from 0 on; none behind the last.
pub async fn chunk(
    db: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    sha256: &str,
    seq: usize,
) -> Result<Option<Vec<u8>>, StoreError> {
    Ok(sqlx::query_scalar!(
        "select data from artifact_chunks where company_id = $1 and sha256 = $2 and seq = $3",
        company.0,
        sha256,
        i32::try_from(seq).unwrap_or(i32::MAX),
    )
    .fetch_optional(db)
    .await?)
}

fn size(artifact: &Artifact) -> i64 {
    i64::try_from(artifact.bytes).unwrap_or(i64::MAX)
}
