//! Requests read strictly: a wrong type says which field, an unknown field
//! what was probably meant, and nothing half-read reaches a handler.

use std::sync::Arc;

use axum::extract::{FromRequest, FromRequestParts, Query, Request};
use axum::http::header::{CONTENT_LENGTH, CONTENT_TYPE};
use axum::http::request::Parts;
use capx_core::domain::playbook::problem::did_you_mean;
use capx_core::domain::storable;
use serde::de::DeserializeOwned;
use serde_json::Value;

use super::{ApiError, ApiState, BODY_BYTES_MAX};

/// A JSON body. An empty one counts as `{}`, for actions that need none.
#[derive(Debug)]
pub struct Body<T>(pub T);

impl<T: DeserializeOwned> FromRequest<Arc<ApiState>> for Body<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, state: &Arc<ApiState>) -> Result<Self, ApiError> {
        let declared =
            request.headers().get(CONTENT_LENGTH).and_then(|v| v.to_str().ok()).and_then(|v| v.parse::<usize>().ok());
        if declared.is_some_and(|length| length > BODY_BYTES_MAX) {
            return Err(ApiError::TooLarge);
        }
        let is_json = request.headers().get(CONTENT_TYPE).map(|value| {
            value.to_str().is_ok_and(|text| {
                let kind = text.split(';').next().unwrap_or_default().trim();
                kind.eq_ignore_ascii_case("application/json") || kind.to_ascii_lowercase().ends_with("+json")
            })
        });
        let bytes = axum::body::to_bytes(request.into_body(), BODY_BYTES_MAX);
        let bytes = tokio::time::timeout(state.limits.body, bytes)
            .await
            .map_err(|_| ApiError::TooSlow(state.limits.body))?
            // Over the limit, or the client broke off, who reads no answer.
            .map_err(|_| ApiError::TooLarge)?;
        if bytes.iter().all(u8::is_ascii_whitespace) {
            return read(Value::Object(serde_json::Map::new())).map(Self);
        }
        if is_json != Some(true) {
            return Err(ApiError::UnsupportedMediaType);
        }
        let value: Value = serde_json::from_slice(&bytes).map_err(|error| ApiError::Invalid {
            message: format!("the body is not valid JSON: {error}"),
            fields: Vec::new(),
        })?;
        storable::to_json(&value, usize::MAX)
            .map_err(|error| ApiError::Invalid { message: format!("the body {error}"), fields: Vec::new() })?;
        read(value).map(Self)
    }
}

fn read<T: DeserializeOwned>(value: Value) -> Result<T, ApiError> {
    if !value.is_object() {
        return Err(ApiError::Invalid { message: "the body must be a JSON object".into(), fields: Vec::new() });
    }
    serde_path_to_error::deserialize(value).map_err(|error| {
        let path = error.path().to_string();
        explain(&path, &error.into_inner().to_string())
    })
}

/// serde's words, turned into a field and a sentence for the caller.
fn explain(path: &str, said: &str) -> ApiError {
    // serde_path_to_error writes `agents[0].role`; the contract has dots.
    let path = path.replace('[', ".").replace(']', "");
    let quoted = || said.split('`').nth(1).unwrap_or_default().to_owned();
    let under = |name: &str| match path.as_str() {
        "" | "." => name.to_owned(),
        _ if path.ends_with(name) => path.clone(),
        _ => format!("{path}.{name}"),
    };
    if said.starts_with("unknown field") {
        let name = quoted();
        let known: Vec<&str> =
            said.split("expected").nth(1).unwrap_or_default().split('`').skip(1).step_by(2).collect();
        let hint = did_you_mean(&name, known.iter().copied()).unwrap_or_else(|| match known.as_slice() {
            [] => "it takes none".into(),
            known => format!("it takes {}", known.join(", ")),
        });
        return ApiError::field(under(&name), format!("unknown field; {hint}"));
    }
    if said.starts_with("missing field") {
        return ApiError::field(under(&quoted()), "is required");
    }
    let field = if path == "." { String::from("body") } else { path };
    ApiError::field(field, said)
}

/// The parts of a path.
#[derive(Debug)]
pub struct Path<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Path<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, ApiError> {
        let read = axum::extract::Path::from_request_parts(parts, state).await;
        read.map(|axum::extract::Path(parts)| Self(parts)).map_err(|error| ApiError::field("path", error.body_text()))
    }
}

/// Query parameters.
#[derive(Debug)]
pub struct Params<T>(pub T);

impl<T: DeserializeOwned + Send, S: Send + Sync> FromRequestParts<S> for Params<T> {
    type Rejection = ApiError;

    async fn from_request_parts(parts: &mut Parts, _: &S) -> Result<Self, ApiError> {
        Query::try_from_uri(&parts.uri).map(|Query(params)| Self(params)).map_err(|error| {
            let text = error.to_string();
            let said = text.rsplit_once("deserialize query string: ").map_or(text.as_str(), |(_, said)| said);
            match said.split_once(": ") {
                Some((field, message)) if !field.contains(' ') => ApiError::field(field, message),
                _ => explain("", said),
            }
        })
    }
}

/// A page's limit, checked.
pub fn limit(given: Option<i64>, default: i64, max: i64) -> Result<i64, ApiError> {
    match given.unwrap_or(default) {
        limit if (1..=max).contains(&limit) => Ok(limit),
        _ => Err(ApiError::field("limit", format!("must be from 1 to {max}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde::Deserialize;
    use serde_json::json;

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Inner {
        #[expect(dead_code, reason = "only read by serde")]
        role: String,
    }

    #[derive(Debug, Deserialize)]
    #[serde(deny_unknown_fields)]
    struct Outer {
        #[expect(dead_code, reason = "only read by serde")]
        name: String,
        #[expect(dead_code, reason = "only read by serde")]
        agents: Vec<Inner>,
    }

    fn field_of(value: Value) -> (String, String) {
        match read::<Outer>(value).expect_err("is refused") {
            ApiError::Invalid { fields, .. } => (fields[0].field.clone(), fields[0].message.clone()),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn a_wrong_field_is_named_by_its_path() {
        let (field, message) = field_of(json!({"name": "x", "agents": [{"role": 3}]}));
        assert_eq!(field, "agents.0.role");
        assert!(message.contains("expected a string"), "{message}");
        assert_eq!(field_of(json!({"agents": []})), ("name".into(), "is required".into()));
        let (field, message) = field_of(json!({"name": "x", "agents": [{"role": "x", "rol": 1}]}));
        assert_eq!((field.as_str(), message.as_str()), ("agents.0.rol", "unknown field; did you mean `role`?"));
    }
}
