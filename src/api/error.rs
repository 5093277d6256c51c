//! Failures as the API tells them: the one place that chooses a status.

use std::time::Duration;

use axum::Json;
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use capx_core::engine::{EngineError, FieldProblem};
use capx_core::store::StoreError;
use serde_json::{Map, Value, json};

use super::request::current_id;

/// How long a client is asked to wait while the database is away.
const UNAVAILABLE_RETRY_S: u32 = 2;

/// A failed request.
#[derive(Debug)]
pub enum ApiError {
    /// 400: the request is wrong; which fields, where that is known.
    Invalid {
        /// In one sentence.
        message: String,
        /// Each wrong field.
        fields: Vec<FieldProblem>,
    },
    /// 401: no key, or none that is valid.
    Unauthorized(&'static str),
    /// 403: the key lacks this scope.
    Forbidden(&'static str),
    /// 403: what the account that runs the server may do alone.
    NotOperator,
    /// 404: there is no such thing for this caller.
    NotFound(&'static str),
    /// 405.
    MethodNotAllowed,
    /// 408: the body did not come in this time.
    TooSlow(Duration),
    /// 409: the state of things forbids it.
    Conflict(String),
    /// 413: the body is too large.
    TooLarge,
    /// 415: the body is not JSON.
    UnsupportedMediaType,
    /// 414: the address is too long.
    UriTooLong,
    /// 422: a rule of the company forbids it; which one.
    Governance(String),
    /// 429: a limit; which one, and how long it lasts.
    RateLimited {
        /// In one sentence.
        message: String,
        /// Until it is worth trying again.
        retry_after: Duration,
    },
    /// No failure: the answer that the same request had before.
    Replayed {
        /// Its status.
        status: StatusCode,
        /// Its body.
        body: String,
    },
    /// 500: a fault of ours; details are in the log under the request's id.
    Internal,
    /// 503: the database is away.
    Unavailable,
    /// 503: no answer came in this time, and what was asked goes on.
    Unanswered(Duration),
}

impl ApiError {
    /// A wrong field.
    pub fn field(field: impl Into<String>, message: impl Into<String>) -> Self {
        Self::fields(vec![FieldProblem::new(field, message)])
    }

    /// Wrong fields.
    pub fn fields(fields: Vec<FieldProblem>) -> Self {
        let message = match fields.as_slice() {
            [one] => format!("{}: {}", one.field, one.message.lines().next().unwrap_or_default()),
            many => format!("{} fields are wrong", many.len()),
        };
        Self::Invalid { message, fields }
    }

    fn status(&self) -> (StatusCode, &'static str) {
        match self {
            Self::Invalid { .. } => (StatusCode::BAD_REQUEST, "invalid_request"),
            Self::Unauthorized(_) => (StatusCode::UNAUTHORIZED, "unauthorized"),
            Self::Forbidden(_) | Self::NotOperator => (StatusCode::FORBIDDEN, "forbidden"),
            Self::NotFound(_) => (StatusCode::NOT_FOUND, "not_found"),
            Self::MethodNotAllowed => (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed"),
            Self::TooSlow(_) => (StatusCode::REQUEST_TIMEOUT, "request_timeout"),
            Self::Conflict(_) => (StatusCode::CONFLICT, "conflict"),
            Self::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "payload_too_large"),
            Self::UnsupportedMediaType => (StatusCode::UNSUPPORTED_MEDIA_TYPE, "unsupported_media_type"),
            Self::UriTooLong => (StatusCode::URI_TOO_LONG, "uri_too_long"),
            Self::Governance(_) => (StatusCode::UNPROCESSABLE_ENTITY, "governance_block"),
            Self::RateLimited { .. } => (StatusCode::TOO_MANY_REQUESTS, "rate_limit_exceeded"),
            Self::Replayed { status, .. } => (*status, "replayed"),
            Self::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal_error"),
            Self::Unavailable | Self::Unanswered(_) => (StatusCode::SERVICE_UNAVAILABLE, "unavailable"),
        }
    }

    fn message(&self) -> String {
        match self {
            Self::Invalid { message, .. }
            | Self::Conflict(message)
            | Self::Governance(message)
            | Self::RateLimited { message, .. } => message.clone(),
            Self::Replayed { .. } => String::new(),
            Self::UriTooLong => format!("the address is longer than {} bytes", super::URI_BYTES_MAX),
            Self::Unauthorized(why) => (*why).to_owned(),
            Self::Forbidden(scope) => format!("the key lacks the scope `{scope}`"),
            Self::NotOperator => "only keys of the account that runs the server see this".into(),
            Self::NotFound(what) => format!("there is no such {what}, or the key does not reach it"),
            Self::MethodNotAllowed => "this path does not take this method".into(),
            Self::TooSlow(limit) => {
                format!("the body did not come within {limit:?}; nothing was done, so send the request again")
            }
            Self::TooLarge => format!("the body is larger than {} bytes", super::BODY_BYTES_MAX),
            Self::UnsupportedMediaType => "send JSON, with `Content-Type: application/json`".into(),
            Self::Internal => "something went wrong on our side; report it with the request id".into(),
            Self::Unavailable => "the database is away; try again in a moment".into(),
            Self::Unanswered(limit) => format!(
                "the database has not answered within {limit:?}; the request may still be carried out, so look before you send it again"
            ),
        }
    }
}

impl From<EngineError> for ApiError {
    fn from(error: EngineError) -> Self {
        match error {
            EngineError::NotFound(what) => Self::NotFound(what),
            EngineError::Conflict(message) => Self::Conflict(message),
            EngineError::Governance(message) => Self::Governance(message),
            EngineError::Invalid(fields) => Self::fields(fields),
            EngineError::Store(error) => error.into(),
        }
    }
}

impl From<StoreError> for ApiError {
    fn from(error: StoreError) -> Self {
        if error.is_passing() {
            tracing::warn!(%error, request.id = current_id(), "the database is away or contended");
            return Self::Unavailable;
        }
        if let StoreError::Conflict { constraint } = &error
            && let Some(field) = constraint.strip_suffix("_size")
        {
            return Self::field(field, "is larger than 64 KiB with what it is merged into");
        }
        tracing::error!(%error, request.id = current_id(), "a request failed");
        Self::Internal
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        if let Self::Replayed { status, body } = self {
            let mut response = super::reply::json(status, body);
            response.headers_mut().insert("idempotent-replayed", HeaderValue::from_static("true"));
            return response;
        }
        let (status, code) = self.status();
        let mut error = Map::new();
        error.insert("code".into(), code.into());
        error.insert("message".into(), self.message().into());
        error.insert("docs".into(), format!("https://capx.ai/docs/api#{}", code.replace('_', "-")).into());
        if let Self::Invalid { fields, .. } = &self
            && !fields.is_empty()
        {
            let fields = fields.iter().map(|f| json!({"field": f.field, "message": f.message}));
            error.insert("fields".into(), Value::Array(fields.collect()));
        }
        let body = json!({"success": false, "error": error, "meta": {"request_id": current_id()}});
        let mut response = (status, Json(body)).into_response();
        // Not for what may still be carried out: it would invite to ask twice.
        if matches!(self, Self::Unavailable) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(UNAVAILABLE_RETRY_S));
        }
        if let Self::RateLimited { retry_after, .. } = &self {
            // Whole seconds, and not before the time.
            let seconds = retry_after.as_secs_f64().ceil().max(1.0) as u64;
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(seconds));
        }
        if status == StatusCode::UNAUTHORIZED {
            response.headers_mut().insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
        }
        response
    }
}

/// No route matches.
pub(super) async fn no_such_route() -> ApiError {
    ApiError::NotFound("path")
}

/// The route takes other methods.
pub(super) async fn no_such_method() -> ApiError {
    ApiError::MethodNotAllowed
}
