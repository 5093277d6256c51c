//! What every request passes: an id, a task of its own, a log line.
//!
//! The handler runs in a task of its own, so that a client that goes away
//! drops nobody's database call half-way (hazard H6): what was begun is
//! finished, only the answer is lost. Nor does a request that hangs on a dead
//! connection hold its client for ever, or, should it never end, go unnoticed.

use std::sync::Arc;
use std::time::Instant;

use axum::extract::{MatchedPath, Request, State};
use axum::http::{HeaderValue, header::HeaderName};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use capx_core::domain::ids::RequestId;

use super::{ApiError, ApiState, Shared, URI_BYTES_MAX};

/// The header that carries a request's id both ways.
pub(super) const REQUEST_ID: HeaderName = HeaderName::from_static("x-request-id");
const REQUEST_ID_CHARS_MAX: usize = 128;

tokio::task_local! {
    static CURRENT: String;
}

/// The id of the request that this task serves.
pub(super) fn current_id() -> String {
    CURRENT.try_with(Clone::clone).unwrap_or_default()
}

/// The middleware.
pub(super) async fn pass(State(state): Shared, request: Request, next: Next) -> Response {
    let given = request
        .headers()
        .get(REQUEST_ID)
        .and_then(|value| value.to_str().ok())
        .filter(|id| (1..=REQUEST_ID_CHARS_MAX).contains(&id.len()) && id.bytes().all(|b| b.is_ascii_graphic()));
    let id = given.map_or_else(|| RequestId::new().to_string(), str::to_owned);
    let method = request.method().clone();
    // The pattern, not the path: paths are unbounded, and may hold names.
    let route = request.extensions().get::<MatchedPath>().map_or("none", |path| path.as_str()).to_owned();
    let began = Instant::now();
    let too_long = request.uri().path_and_query().is_some_and(|path| path.as_str().len() > URI_BYTES_MAX);
    let has_nul = request.uri().path_and_query().is_some_and(|path| path.as_str().contains("%00"));
    let handler = async move {
        if too_long {
            return ApiError::UriTooLong.into_response();
        }
        if has_nul {
            return ApiError::field("path", "must not hold a NUL character").into_response();
        }
        next.run(request).await
    };
    let limit = state.limits.answer;
    let task = tokio::spawn(CURRENT.scope(id.clone(), watched(state, route.clone(), handler)));
    let failed = |error: ApiError| CURRENT.sync_scope(id.clone(), || error.into_response());
    // Only the waiting is given up: the task goes on.
    let mut response = match tokio::time::timeout(limit, task).await {
        Ok(Ok(response)) => response,
        Ok(Err(error)) => {
            tracing::error!(request.id = id, route, %error, "a handler panicked");
            failed(ApiError::Internal)
        }
        Err(_) => {
            tracing::error!(request.id = id, route, "no answer after {limit:?}; is the database reachable?");
            metrics::counter!("capx_http_unanswered_total").increment(1);
            failed(ApiError::Unanswered(limit))
        }
    };
    if let Ok(value) = HeaderValue::from_str(&id) {
        response.headers_mut().insert(REQUEST_ID, value);
    }
    let status = response.status().as_u16();
    let took = began.elapsed();
    metrics::histogram!("capx_http_request_seconds", "route" => route.clone(), "status" => status.to_string())
        .record(took.as_secs_f64());
    tracing::debug!(request.id = id, %method, route, status, took_ms = took.as_millis() as u64, "request");
    response
}

/// A request in its task; should it not end, this process is of no more use.
async fn watched(state: Arc<ApiState>, route: String, handler: impl Future<Output = Response>) -> Response {
    tokio::pin!(handler);
    let limit = state.limits.unanswered;
    if let Ok(response) = tokio::time::timeout(limit, &mut handler).await {
        return response;
    }
    tracing::error!(request.id = current_id(), route, "a request has not ended after {limit:?}; the process gives up");
    state.wedged.cancel();
    state.stopping.cancel();
    handler.await
}
