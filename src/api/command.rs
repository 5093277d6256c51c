//! Requests that change something: one transaction, with the answer beside the
//! effect, so that the same `Idempotency-Key` gets the same answer and no
//! second effect (hazard H18).

use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::audit::Entry;
use capx_core::domain::digest::sha256;
use capx_core::domain::ids::CompanyId;
use capx_core::failpoint;
use capx_core::store::StoreError;
use capx_core::store::audit;
use capx_core::store::idempotency::{self, Place};
use serde::Serialize;
use serde_json::Value;
use sqlx::{PgConnection, Postgres, Transaction};

use super::auth::Caller;
use super::reply::json;
use super::{ApiError, ApiState};

/// A change under way.
pub struct Command<'a> {
    state: &'a ApiState,
    caller: &'a Caller,
    tx: Transaction<'static, Postgres>,
    request_hash: [u8; 32],
    wakes: bool,
}

impl Caller {
    /// Begins a change. A request that was carried out already is answered
    /// here, as it was then; `digest` is its body's.
    pub async fn command<'a>(&'a self, state: &'a ApiState, digest: [u8; 32]) -> Result<Command<'a>, ApiError> {
        let mut tx = self.read(state).await?;
        let request_hash = digest;
        if let Some(place) = self.place() {
            if !idempotency::lock(&mut tx, place).await? {
                return Err(ApiError::Conflict(
                    "a request with this Idempotency-Key is still being carried out; try again in a moment".into(),
                ));
            }
            if let Some(stored) = idempotency::find(&mut tx, place).await? {
                if stored.request_hash != request_hash {
                    return Err(ApiError::Conflict(
                        "this Idempotency-Key was used for another request; use a new key for each request".into(),
                    ));
                }
                let status = StatusCode::from_u16(stored.status).map_err(|_| ApiError::Internal)?;
                return Err(ApiError::Replayed { status, body: stored.body });
            }
        }
        Ok(Command { state, caller: self, tx, request_hash, wakes: false })
    }

    fn place(&self) -> Option<Place<'_>> {
        let key = self.idempotency_key.as_deref()?;
        Some(Place { api_key: self.key, path: &self.path, idempotency_key: key })
    }

    /// Whether the answer must be stored beside the effect.
    pub fn is_idempotent(&self) -> bool {
        self.idempotency_key.is_some()
    }
}

impl Command<'_> {
    /// Where the change is made.
    pub fn tx(&mut self) -> &mut PgConnection {
        &mut self.tx
    }

    /// The change made work for workers.
    pub fn wake(&mut self) {
        self.wakes = true;
    }

    /// Writes down who has changed what, in the company's audit log.
    pub async fn audit(&mut self, company: CompanyId, kind: &'static str, data: Value) -> Result<(), ApiError> {
        let entry = Entry::new(kind, self.caller.key.to_string(), data);
        Ok(audit::append(&mut self.tx, company, &entry).await?)
    }

    /// Commits the change together with its answer.
    pub async fn finish(self, status: StatusCode, data: impl Serialize) -> Result<Response, ApiError> {
        let body = self.caller.body(data)?;
        self.commit(status, body, None).await
    }

    /// The same where the answer holds a secret that must not be stored: a
    /// request that comes again is told the rest.
    pub async fn finish_with_secret(
        self,
        status: StatusCode,
        shown: impl Serialize,
        kept: impl Serialize,
    ) -> Result<Response, ApiError> {
        let body = self.caller.body(shown)?;
        let kept = self.caller.body_again(kept)?;
        self.commit(status, body, Some(kept)).await
    }

    async fn commit(self, status: StatusCode, body: String, kept: Option<String>) -> Result<Response, ApiError> {
        let Self { state, caller, mut tx, request_hash, wakes } = self;
        let stored = async {
            if let Some(place) = caller.place() {
                idempotency::store(&mut tx, place, request_hash, status.as_u16(), kept.as_ref().unwrap_or(&body))
                    .await?;
            }
            if failpoint::reach("command.before_commit").await {
                return Err(StoreError::Unavailable(sqlx::Error::PoolClosed));
            }
            tx.commit().await?;
            if failpoint::reach("command.after_commit").await {
                // As if the answer had been lost on its way.
                return Err(StoreError::Unavailable(sqlx::Error::PoolClosed));
            }
            Ok(())
        };
        if let Err(error) = stored.await {
            // What is told as a failure costs nothing.
            let _ = caller.permit.charge(-caller.credits);
            return Err(error.into());
        }
        if wakes {
            state.engine.waker.wake();
        }
        Ok(json(status, body))
    }
}

/// What tells requests apart that carry the same key: method and body.
pub(super) fn request_digest(method: &axum::http::Method, body: &[u8]) -> [u8; 32] {
    let mut bytes = Vec::with_capacity(body.len() + 8);
    bytes.extend_from_slice(method.as_str().as_bytes());
    bytes.push(0);
    bytes.extend_from_slice(body);
    sha256(bytes)
}
