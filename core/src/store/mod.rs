//! The only room with SQL: a file a table family, hot statements as `.sql`
//! files beside it. A function takes a connection or a pool and is one
//! statement, or a few that its caller puts in one transaction.
//!
//! It deliberately decides nothing: which transition to make is decided in
//! [`crate::domain`] and arrives here as plain values.

use std::collections::HashMap;
use std::time::Duration;

use sqlx::postgres::{PgConnectOptions, PgPool, PgPoolOptions};

pub mod acting;
pub mod agents;
pub mod approvals;
pub mod artifacts;
pub mod asks;
pub mod audit;
pub mod beats;
pub mod budgets;
pub mod children;
pub mod dead_letters;
pub mod deliveries;
pub mod error;
pub mod events;
pub mod fans;
pub mod fleet;
pub mod flows;
pub mod grades;
pub mod grants;
pub mod hooks;
pub mod idempotency;
pub mod jobs;
pub mod journal;
pub mod kills;
pub mod memories;
pub mod messages;
pub mod months;
pub mod nodes;
pub mod pauses;
pub mod playbooks;
pub mod provider_gates;
pub mod purge;
pub mod redrives;
pub mod runs;
pub mod secrets;
pub mod sessions;
pub mod signals;
pub mod slots;
pub mod steps;
pub mod tasks;
pub mod tenancy;
pub mod tenants;
pub mod triggers;
pub mod upkeep;
pub mod usage;
pub mod webhooks;

pub use error::StoreError;

/// What a pool is for; decides as whom its statements run, and how they are
/// planned and bounded.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolKind {
    /// Whoever the address names: migrations, and questions before them.
    Owner,
    /// Requests of people and clients, over all tenants: bounded statements.
    Requests,
    /// The same behind the second wall: sees what belongs to the account that
    /// a transaction names, see [`tenancy`].
    Tenants,
    /// What requests have used of their limits. Its commits need not wait for
    /// the disk: a crash of the server gives back what was used last.
    Meter,
    /// The queue's few hot statements, whose plans must not change with the
    /// statistics of a table that is empty now and huge in an hour.
    Queue,
    /// The same for claims alone, whose commits need not wait for the disk: a
    /// claim that a crash of the server undoes leaves a job that is ready.
    Claims,
}

/// How long a request waits for a connection before it is told 503.
const REQUEST_ACQUIRE: Duration = Duration::from_secs(3);
/// How long a worker's task waits before it reports and tries again.
const QUEUE_ACQUIRE: Duration = Duration::from_secs(10);

/// Opens a pool; connections are made when needed, so this does not fail
/// while the database is away.
pub fn pool(url: &str, kind: PoolKind, connections_max: u32) -> Result<PgPool, StoreError> {
    let options = connect_options(url, kind)?;
    let acquire = match kind {
        PoolKind::Owner | PoolKind::Requests | PoolKind::Tenants | PoolKind::Meter => REQUEST_ACQUIRE,
        PoolKind::Queue | PoolKind::Claims => QUEUE_ACQUIRE,
    };
    Ok(PgPoolOptions::new()
        .max_connections(connections_max)
        .acquire_timeout(acquire)
        // A connection that died is found by its error, not by a ping before
        // every statement.
        .test_before_acquire(false)
        .connect_lazy_with(options))
}

/// Connection settings of a kind, for connections outside a pool.
pub fn connect_options(url: &str, kind: PoolKind) -> Result<PgConnectOptions, StoreError> {
    let options: PgConnectOptions = url.parse().map_err(StoreError::from)?;
    let options = options.application_name(match kind {
        PoolKind::Owner | PoolKind::Requests | PoolKind::Tenants | PoolKind::Meter => "capx",
        PoolKind::Queue | PoolKind::Claims => "capx-queue",
    });
    let common =
        [("jit", "off"), ("timezone", "UTC"), ("idle_in_transaction_session_timeout", "60s"), ("lock_timeout", "10s")];
    // The server lets go of a client that a network has swallowed, with its
    // locks; what becomes of our end, a watchdog sees to.
    let vanished = [
        ("tcp_keepalives_idle", "30"),
        ("tcp_keepalives_interval", "10"),
        ("tcp_keepalives_count", "3"),
        ("tcp_user_timeout", "60s"),
    ];
    let options = options.options(common).options(vanished);
    // Planned once, by index, whatever the statistics say: a sequential scan
    // chosen while the table was empty would be kept when it holds millions.
    let pinned = [
        ("plan_cache_mode", "force_generic_plan"),
        ("enable_seqscan", "off"),
        ("enable_bitmapscan", "off"),
        ("enable_mergejoin", "off"),
    ];
    // Planned anew each time: which filters are set decides which index serves.
    let anew = [("plan_cache_mode", "force_custom_plan")];
    let (short, long) = ([("statement_timeout", "15s")], [("statement_timeout", "60s")]);
    let no_wait = [("synchronous_commit", "off")];
    let system = [("role", SYSTEM_ROLE)];
    Ok(match kind {
        // A migration takes the time that it takes.
        PoolKind::Owner => options.options([("plan_cache_mode", "force_custom_plan")]),
        PoolKind::Requests => options.options(system).options(anew).options(short),
        PoolKind::Tenants => options.options([("role", TENANT_ROLE)]).options(pinned).options(short),
        PoolKind::Meter => options.options(system).options(no_wait).options(short),
        PoolKind::Queue => options.options(system).options(pinned).options(long),
        PoolKind::Claims => options.options(system).options(pinned).options(no_wait).options(long),
    })
}

/// The roles that the migrations make: one sees everything, one a tenant.
const SYSTEM_ROLE: &str = "capx_system";
const TENANT_ROLE: &str = "capx_api";

static MIGRATOR: sqlx::migrate::Migrator = sqlx::migrate!("../migrations");

/// Brings the schema up to this version; concurrent callers wait for one
/// another.
pub async fn migrate(pool: &PgPool) -> Result<(), StoreError> {
    sqlx::raw_sql(include_str!("sql/own_roles.sql")).execute(pool).await?;
    MIGRATOR.run(pool).await.map_err(StoreError::from)
}

/// What a process must know before it serves.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SchemaState {
    /// Every migration of this version is applied.
    Current,
    /// Some are missing: `capx migrate` is needed.
    Behind,
}

/// Whether the schema is as new as this program.
pub async fn schema_state(pool: &PgPool) -> Result<SchemaState, StoreError> {
    let known =
        sqlx::query_scalar::<_, bool>("select to_regclass('_sqlx_migrations') is not null").fetch_one(pool).await;
    match known {
        Ok(true) => {}
        Ok(false) => return Ok(SchemaState::Behind),
        // The role that the pool runs as comes by a migration.
        Err(sqlx::Error::Database(error))
            if ["22023", "42501"].contains(&error.code().as_deref().unwrap_or_default()) =>
        {
            tracing::debug!(%error, "the database does not know this program's role");
            return Ok(SchemaState::Behind);
        }
        Err(error) => return Err(error.into()),
    }
    let applied: HashMap<i64, Vec<u8>> = sqlx::query_as("select version, checksum from _sqlx_migrations where success")
        .fetch_all(pool)
        .await?
        .into_iter()
        .collect();
    for migration in MIGRATOR.iter().filter(|migration| migration.migration_type.is_up_migration()) {
        match applied.get(&migration.version) {
            None => return Ok(SchemaState::Behind),
            Some(checksum) if checksum[..] != migration.checksum[..] => {
                return Err(StoreError::OtherSchema(migration.version));
            }
            Some(_) => {}
        }
    }
    Ok(SchemaState::Current)
}

/// Server settings under which an acknowledged row may be lost, each with its
/// value; empty on a durable server (hazard H24).
pub async fn unsafe_settings(pool: &PgPool) -> Result<Vec<String>, StoreError> {
    let rows: Vec<(String, String)> = sqlx::query_as(
        "select name, setting from pg_settings
         where name in ('fsync', 'full_page_writes', 'synchronous_commit') and setting = 'off'",
    )
    .fetch_all(pool)
    .await?;
    Ok(rows.into_iter().map(|(name, value)| format!("{name}={value}")).collect())
}
