//! What can go wrong with the database, by what the caller can do about it.
//! Each tells its cause in its own words and so names no source: else a chain
//! of errors would tell it twice.

use sqlx::error::ErrorKind;

/// A failed statement.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// A constraint refused the write; its name says which.
    #[error("conflict with {constraint}")]
    Conflict {
        /// The constraint's name.
        constraint: String,
    },
    /// The database is away or shutting down: the caller may try later.
    #[error("the database is not available: {0}")]
    Unavailable(sqlx::Error),
    /// Two transactions were in each other's way: repeat the whole of it.
    #[error("the transaction must be repeated: {0}")]
    Contended(sqlx::Error),
    /// A migration failed.
    #[error("migration: {0}")]
    Migrate(sqlx::migrate::MigrateError),
    /// The tables are not those that this version's migrations make.
    #[error(
        "the tables were made by a version of capx that was never released (migration {0} differs); use an empty database, or with `capx dev` another --data-dir"
    )]
    OtherSchema(i64),
    /// A stored value that this version cannot read.
    #[error("unreadable row: {0}")]
    Unreadable(String),
    /// A fault of ours.
    #[error("query: {0}")]
    Query(sqlx::Error),
}

impl From<sqlx::migrate::MigrateError> for StoreError {
    fn from(error: sqlx::migrate::MigrateError) -> Self {
        match error {
            sqlx::migrate::MigrateError::VersionMismatch(version) => Self::OtherSchema(version),
            other => Self::Migrate(other),
        }
    }
}

impl From<sqlx::Error> for StoreError {
    fn from(error: sqlx::Error) -> Self {
        match &error {
            sqlx::Error::Io(_)
            | sqlx::Error::Tls(_)
            | sqlx::Error::PoolTimedOut
            | sqlx::Error::PoolClosed
            | sqlx::Error::Protocol(_)
            | sqlx::Error::WorkerCrashed => Self::Unavailable(error),
            sqlx::Error::Database(db) => match db.code().as_deref() {
                Some("40001" | "40P01" | "55P03") => Self::Contended(error),
                // 08 connection, 53 out of resources, 57 shutdown, start-up and
                // statement timeouts, 58 the server's own trouble with its
                // files, 25P idle transactions, 25006 a standby.
                Some(code)
                    if code.starts_with("08")
                        || code.starts_with("53")
                        || code.starts_with("57")
                        || code.starts_with("58")
                        || code.starts_with("25P")
                        || code == "25006" =>
                {
                    Self::Unavailable(error)
                }
                _ if matches!(db.kind(), ErrorKind::UniqueViolation | ErrorKind::CheckViolation) => {
                    Self::Conflict { constraint: db.constraint().unwrap_or("unknown").to_owned() }
                }
                _ => Self::Query(error),
            },
            _ => Self::Query(error),
        }
    }
}

impl StoreError {
    /// Whether the database refused what was to be written, so that the same
    /// will be refused again: data exceptions, program limits, constraints on
    /// the data. Everything else is trouble that passes or is mended.
    pub fn is_about_data(&self) -> bool {
        match self {
            Self::Conflict { constraint } => !constraint.starts_with("jobs_"),
            Self::Query(sqlx::Error::Database(error)) => {
                error.code().is_some_and(|code| code.starts_with("22") || code.starts_with("54"))
            }
            Self::Query(sqlx::Error::Encode(_)) => true,
            _ => false,
        }
    }

    /// Whether the same call may work later without anybody changing
    /// anything.
    pub fn is_passing(&self) -> bool {
        matches!(self, Self::Unavailable(_) | Self::Contended(_))
    }
}
