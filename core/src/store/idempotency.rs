//! Answers that are given again to a request that comes again.

use sqlx::{PgConnection, PgPool};

use super::StoreError;
use crate::domain::ids::KeyId;

/// What an `Idempotency-Key` is unique within.
#[derive(Debug, Clone, Copy)]
pub struct Place<'a> {
    /// Who asked.
    pub api_key: KeyId,
    /// For what.
    pub path: &'a str,
    /// As it was sent.
    pub idempotency_key: &'a str,
}

/// An answer that was given.
#[derive(Debug)]
pub struct Stored {
    /// SHA-256 of method and body of the request.
    pub request_hash: [u8; 32],
    /// The HTTP status.
    pub status: u16,
    /// The whole body.
    pub body: String,
}

/// Takes a place until the transaction ends; false when another request has it.
pub async fn lock(tx: &mut PgConnection, place: Place<'_>) -> Result<bool, StoreError> {
    Ok(sqlx::query_scalar!(
        r#"select pg_try_advisory_xact_lock(hashtextextended($1::text || chr(10) || $2 || chr(10) || $3, 0)) as "got!""#,
        place.api_key.to_string(),
        place.path,
        place.idempotency_key,
    )
    .fetch_one(tx)
    .await?)
}

/// The answer at a place, for a day. Asked after the lock was taken, by a
/// statement of its own: it must see what the lock's last holder has committed.
pub async fn find(tx: &mut PgConnection, place: Place<'_>) -> Result<Option<Stored>, StoreError> {
    let row = sqlx::query!(
        "select request_hash, status, body from idempotency_keys
         where api_key_id = $1 and path = $2 and idempotency_key = $3 and created_at > now() - interval '24 hours'",
        place.api_key.0,
        place.path,
        place.idempotency_key,
    )
    .fetch_optional(tx)
    .await?;
    let unreadable = || StoreError::Unreadable("an idempotency key".into());
    row.map(|row| {
        Ok(Stored {
            request_hash: row.request_hash.try_into().map_err(|_| unreadable())?,
            status: u16::try_from(row.status).map_err(|_| unreadable())?,
            body: row.body,
        })
    })
    .transpose()
}

/// Stores an answer, over one that is older than a day.
pub async fn store(
    tx: &mut PgConnection,
    place: Place<'_>,
    request_hash: [u8; 32],
    status: u16,
    body: &str,
) -> Result<(), StoreError> {
    sqlx::query!(
        "insert into idempotency_keys (api_key_id, path, idempotency_key, request_hash, status, body)
         values ($1, $2, $3, $4, $5, $6)
         on conflict (api_key_id, path, idempotency_key) do update
         set request_hash = excluded.request_hash, status = excluded.status, body = excluded.body, created_at = now()",
        place.api_key.0,
        place.path,
        place.idempotency_key,
        &request_hash[..],
        i16::try_from(status).unwrap_or(i16::MAX),
        body,
    )
    .execute(tx)
    .await?;
    Ok(())
}

/// How many answers one statement forgets.
pub const PRUNE_MAX: i64 = 1_000;

/// Forgets answers that nobody may ask for any more; says how many.
pub async fn prune(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "delete from idempotency_keys where ctid = any (array(
             select ctid from idempotency_keys where created_at < now() - interval '25 hours' order by created_at limit $1))",
        PRUNE_MAX,
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}
