//! The use cases: one function, one transaction, which decides with
//! [`crate::domain`] and applies with [`crate::store`].
//!
//! Whatever must happen later is a row of the queue, written by the
//! transaction that made it necessary. No transaction is open while anything
//! outside the database is called, and every transaction locks a job before
//! its run.

use sqlx::PgPool;

use crate::store::StoreError;

pub mod acting;
pub mod advance;
pub mod agents;
pub mod asks;
pub mod batch;
pub mod beats;
pub mod calls;
pub mod cancel;
pub mod claim;
pub mod dead_letters;
pub mod deeds;
pub mod deliveries;
pub mod enqueue;
pub mod gates;
pub mod hooks;
pub mod items;
pub mod keys;
pub mod lifecycle;
mod load;
mod nodes;
pub mod plans;
pub mod playbooks;
pub mod redrives;
pub mod retry;
pub mod secrets;
pub mod signals;
pub mod slots;
pub mod spending;
pub mod start;
pub mod sweep;
pub mod tasks;
pub mod tenants;
pub mod triggers;
pub mod upkeep;
pub mod wake;

pub use plans::Plans;
pub use wake::Waker;

/// What every use case needs: the database, the playbooks already read, and a
/// way to wake workers after a commit. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Engine {
    /// The database.
    pub pool: PgPool,
    /// The same for claims, which need not wait for the disk.
    pub claims: PgPool,
    /// Playbooks already read and checked.
    pub plans: Plans,
    /// Wakes idle workers.
    pub waker: Waker,
    /// What seals and opens secrets.
    pub keyring: secrets::Keyring,
    /// Starts of runs by many callers at once, committed together.
    starts: Option<start::Starts>,
}

impl Engine {
    /// An engine over a pool, which wakes nobody: workers poll all the same.
    pub fn new(pool: PgPool) -> Self {
        let keyring = secrets::Keyring::default();
        Self { claims: pool.clone(), pool, plans: Plans::default(), waker: Waker::silent(), keyring, starts: None }
    }

    /// The same with keys for secrets.
    #[must_use]
    pub fn with_keyring(mut self, keyring: secrets::Keyring) -> Self {
        self.keyring = keyring;
        self
    }

    /// The same, claiming over a pool of its own.
    #[must_use]
    pub fn with_claims(mut self, claims: PgPool) -> Self {
        self.claims = claims;
        self
    }

    /// The same for a process that many callers start runs in: what arrives
    /// while one commit is under way goes into the next. Wakes whom the engine
    /// wakes so far.
    #[must_use]
    pub fn with_group_commit(mut self) -> Self {
        self.starts = Some(start::group_commit(self.pool.clone(), self.waker.clone()));
        self
    }

    /// The same, waking workers after commits.
    #[must_use]
    pub fn with_waker(mut self, waker: Waker) -> Self {
        self.waker = waker;
        self
    }
}

/// One wrong field of a request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FieldProblem {
    /// Dotted path, e.g. `agents.0.role`.
    pub field: String,
    /// What is wrong and what to write instead.
    pub message: String,
}

impl FieldProblem {
    /// A problem of a field.
    pub fn new(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self { field: field.into(), message: message.into() }
    }
}

/// Why a use case did nothing.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// There is no such thing, or not for this caller.
    #[error("{0} not found")]
    NotFound(&'static str),
    /// The state of things forbids it; the sentence says what to do.
    #[error("{0}")]
    Conflict(String),
    /// A rule of the company or the playbook forbids it; the sentence names the rule.
    #[error("{0}")]
    Governance(String),
    /// The request is wrong.
    #[error("invalid request")]
    Invalid(Vec<FieldProblem>),
    /// The database.
    #[error(transparent)]
    Store(#[from] StoreError),
}

impl From<sqlx::Error> for EngineError {
    fn from(error: sqlx::Error) -> Self {
        Self::Store(StoreError::from(error))
    }
}

/// How often a transaction that got in another's way is repeated.
const CONTENDED_TRIES: u32 = 5;

/// Repeats a transaction that was in another's way, a few times with a
/// growing pause.
pub(crate) async fn repeating<T, F>(mut transaction: impl FnMut() -> F) -> Result<T, EngineError>
where
    F: Future<Output = Result<T, EngineError>>,
{
    let mut tries = 1;
    loop {
        match transaction().await {
            Err(EngineError::Store(StoreError::Contended(error))) if tries < CONTENDED_TRIES => {
                tracing::debug!(%error, tries, "repeating a transaction");
                let pause = rand::random_range(1..=10u64) * u64::from(tries);
                tokio::time::sleep(std::time::Duration::from_millis(pause)).await;
                tries += 1;
            }
            other => return other,
        }
    }
}
