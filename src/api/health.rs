//! Whether the process is up, whether it can serve, and what it counts.

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use capx_core::store::{self, SchemaState};
use serde_json::json;

use super::{Shared, request};

pub(super) async fn healthz() -> Response {
    Json(json!({"status": "ok", "version": env!("CARGO_PKG_VERSION")})).into_response()
}

pub(super) async fn readyz(State(state): Shared) -> Response {
    let why = if state.stopping.is_cancelled() {
        Some("shutting down".to_owned())
    } else {
        match store::schema_state(&state.engine.pool).await {
            Ok(SchemaState::Current) => None,
            Ok(SchemaState::Behind) => Some("the database is not migrated; run `capx migrate`".to_owned()),
            Err(error) => {
                tracing::debug!(%error, request.id = request::current_id(), "not ready");
                Some("the database is away".to_owned())
            }
        }
    };
    match why {
        None => Json(json!({"status": "ready"})).into_response(),
        Some(why) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "not ready", "reason": why}))).into_response()
        }
    }
}

pub(super) async fn metrics(State(state): Shared) -> String {
    state.metrics.render()
}
