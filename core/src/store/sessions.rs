//! Worker sessions: one row a process, one beat for everything it runs.

use std::time::Duration;

use sqlx::{Connection, Executor, PgConnection, PgPool, Postgres};

use super::StoreError;
use super::jobs::millis;

/// What a worker says of itself.
#[derive(Debug, Clone)]
pub struct NewSession<'a> {
    /// Host and process, for people.
    pub worker: &'a str,
    /// The program's version.
    pub version: &'a str,
    /// What it serves.
    pub queues: &'a [String],
    /// How much at once.
    pub slots: i32,
    /// How long it lives without a beat.
    pub lease: Duration,
}

/// Opens a session: an identity of its own for every start of a worker.
pub async fn open(
    executor: impl Executor<'_, Database = Postgres>,
    session: &NewSession<'_>,
) -> Result<i64, StoreError> {
    Ok(sqlx::query_scalar!(
        "insert into worker_sessions (worker, version, queues, slots, lease_ms, state)
         values ($1, $2, $3, $4, $5, 'active') returning id",
        session.worker,
        session.version,
        session.queues,
        session.slots,
        millis(session.lease),
    )
    .fetch_one(executor)
    .await?)
}

/// What a beat hears.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Beat {
    /// The lease is renewed.
    Renewed,
    /// The same, and the worker is to let go of its work and end.
    Drain,
    /// The session has been declared dead, which no beat undoes.
    Dead,
}

/// Renews the lease; says of itself whether the worker is draining.
pub async fn beat(connection: &mut PgConnection, id: i64, draining: bool) -> Result<Beat, StoreError> {
    let state = sqlx::query_scalar!(
        "update worker_sessions
         set beat_at = clock_timestamp(), state = case when $2 then 'draining' else state end
         where id = $1 and ended_at is null
         returning state",
        id,
        draining,
    )
    .fetch_optional(connection)
    .await?;
    Ok(match state.as_deref() {
        None => Beat::Dead,
        Some("draining") => Beat::Drain,
        Some(_) => Beat::Renewed,
    })
}

/// Asks a worker to drain; it hears so with its next beat. Gives its state now,
/// `None` where there never was such a session.
pub async fn drain(connection: &mut PgConnection, id: i64) -> Result<Option<String>, StoreError> {
    Ok(sqlx::query_scalar!(
        "update worker_sessions set state = case when state = 'active' then 'draining' else state end
         where id = $1 returning state",
        id,
    )
    .fetch_optional(connection)
    .await?)
}

/// Ends a session whose worker has let go of everything.
pub async fn end(pool: &PgPool, id: i64) -> Result<(), StoreError> {
    sqlx::query!(
        "update worker_sessions set state = 'ended', ended_at = clock_timestamp()
         where id = $1 and ended_at is null",
        id,
    )
    .execute(pool)
    .await?;
    Ok(())
}

/// Declares dead whoever has not beaten for a lease; says whom. A session in
/// the middle of a claim is left for the next sweep.
pub async fn bury(pool: &PgPool) -> Result<Vec<i64>, StoreError> {
    Ok(sqlx::query_scalar!(
        "with silent as (
             select id from worker_sessions
             where ended_at is null
                 and beat_at < clock_timestamp() - lease_ms * interval '1 millisecond'
             for update skip locked
         )
         update worker_sessions s set state = 'dead', ended_at = clock_timestamp()
         from silent where s.id = silent.id and s.ended_at is null
         returning s.id",
    )
    .fetch_all(pool)
    .await?)
}

/// How long an ended session is kept for people to look at.
pub const KEEP: Duration = Duration::from_secs(24 * 3600);

/// Forgets sessions that ended long ago.
pub async fn prune(pool: &PgPool) -> Result<u64, StoreError> {
    let done = sqlx::query!(
        "delete from worker_sessions where id = any (array(
             select id from worker_sessions
             where ended_at < now() - $1::bigint * interval '1 millisecond' limit 1000))",
        millis(KEEP),
    )
    .execute(pool)
    .await?;
    Ok(done.rows_affected())
}

/// The beat's own connection.
pub async fn connect(url: &str) -> Result<PgConnection, StoreError> {
    let options = super::connect_options(url, super::PoolKind::Queue)?;
    Ok(PgConnection::connect_with(&options).await?)
}
