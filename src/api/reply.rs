//! Successes as the API tells them: data, and the meta that goes with it.

use axum::Json;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use capx_core::store::tenants;
use chrono::{DateTime, SecondsFormat, Utc};
use serde_json::{Map, Value, json};
use uuid::Uuid;

use super::auth::Caller;
use super::request::current_id;
use super::{ApiError, ApiState};

/// One page of a list.
#[derive(Debug)]
pub struct Page {
    /// The items.
    pub data: Vec<Value>,
    /// Where the next page begins; `None` on the last.
    pub cursor: Option<String>,
}

/// Cuts the one item too many that a list asks for, and makes the cursor from
/// the last one shown.
pub fn page<T>(mut rows: Vec<T>, limit: i64, id: impl Fn(&T) -> Uuid, show: impl Fn(T) -> Value) -> Page {
    let limit = usize::try_from(limit).unwrap_or(usize::MAX);
    let more = rows.len() > limit;
    rows.truncate(limit);
    let cursor = rows.last().filter(|_| more).map(|row| id(row).simple().to_string());
    Page { data: rows.into_iter().map(show).collect(), cursor }
}

/// Reads a cursor back.
pub fn cursor(given: Option<&str>) -> Result<Option<Uuid>, ApiError> {
    given
        .map(|text| Uuid::try_parse(text).map_err(|_| ApiError::field("cursor", "is not a cursor of this list")))
        .transpose()
}

/// A time as answers show it: whole seconds, UTC.
pub fn time(at: DateTime<Utc>) -> String {
    at.to_rfc3339_opts(SecondsFormat::Secs, true)
}

impl<S> Caller<S> {
    /// An answer that costs credits.
    pub async fn reply(
        &self,
        state: &ApiState,
        status: StatusCode,
        credits: i64,
        data: Value,
    ) -> Result<Response, ApiError> {
        self.answer(state, status, credits, data, Map::new()).await
    }

    /// A page of a list; every GET costs one credit.
    pub async fn list(&self, state: &ApiState, page: Page) -> Result<Response, ApiError> {
        let mut meta = Map::new();
        meta.insert("has_more".into(), page.cursor.is_some().into());
        meta.insert("cursor".into(), page.cursor.into());
        self.answer(state, StatusCode::OK, 1, Value::Array(page.data), meta).await
    }

    async fn answer(
        &self,
        state: &ApiState,
        status: StatusCode,
        credits: i64,
        data: Value,
        mut meta: Map<String, Value>,
    ) -> Result<Response, ApiError> {
        let credits = if self.live { credits } else { 0 };
        // What was done is done: an answer does not fail for its bookkeeping.
        let left = match tenants::charge_credits(&state.engine.pool, self.account, credits).await {
            Ok(left) => Some(left),
            Err(error) => {
                tracing::warn!(%error, credits, account.id = %self.account, "credits were not charged");
                None
            }
        };
        meta.insert("credits_used".into(), credits.into());
        meta.insert("credits_remaining".into(), left.into());
        meta.insert("request_id".into(), current_id().into());
        Ok((status, Json(json!({"success": true, "data": data, "meta": meta}))).into_response())
    }
}
