//! `http.request {method, url, headers?, body?}` -> `{status, headers, body}`.
//! A status of 400 or above fails the step; it is repeated only by `retry`,
//! with the same `Idempotency-Key`. A body that is large, or no text, is an artifact;
//! a reference to one sends its bytes.

use std::sync::Arc;

use capx_core::domain::artifact::{ARTIFACT_BYTES_MAX, Artifact, BINARY};
use capx_core::domain::outcome::Failure;
use capx_core::domain::storable::{self, OUTPUT_BYTES_MAX, json_bytes};
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{ToolCall, blocking, only, text};
use crate::egress::{Answer, Call, LARGE_BYTES};
use crate::handlers::Hands;

/// What of an output is left for the status and the headers, in bytes.
const HEADERS_BYTES: usize = 32 * 1024;

pub(super) async fn run(hands: &Hands, call: ToolCall<'_>) -> Result<Value, Failure> {
    let params = &call.params;
    only(params, &["method", "url", "headers", "body"])?;
    let method = match params.get("method") {
        None | Some(Value::Null) => Method::GET,
        Some(_) => text(params, "method")?
            .to_uppercase()
            .parse()
            .map_err(|_| Failure::invalid("params.method is no HTTP method"))?,
    };
    let given = params.get("body");
    let (body, room) = match call.artifacts.given(given).await? {
        Some(given) => (Some((given.bytes, given.content_type)), given.room),
        None => (body(given), None),
    };
    let mut answer = hands
        .egress
        .call(Call {
            method,
            url: text(params, "url")?.to_owned(),
            headers: headers(params.get("headers"))?,
            body,
            idempotency_key: call.idempotency_key.clone(),
            timeout: call.timeout,
            idle: call.idle,
            limit: ARTIFACT_BYTES_MAX,
            large: room,
            trusted: false,
        })
        .await?;
    let told = |name: &str| answer.headers.iter().find(|(it, _)| it == name).map(|(_, value)| value.clone());
    let content_type = told("content-type").unwrap_or_else(|| BINARY.to_owned());
    // As it came: a mask in the place of a number would be no JSON.
    let parsed = inline_json(&content_type, &answer.body);
    // Before an excerpt cuts one in two.
    if let Some(secrets) = call.secrets {
        let (secrets, mut bytes) = (Arc::clone(secrets), std::mem::take(&mut answer.body));
        answer.body = blocking(move || {
            secrets.redactor().bytes(&mut bytes);
            Ok(bytes)
        })
        .await?;
    }
    if let Some(failure) = answer.failure() {
        return Err(failure);
    }
    let Answer { status, headers, body: bytes, large } = answer;
    let body = match parsed.map_or_else(|| inline_text(&content_type, bytes), Ok) {
        Ok(body) => body,
        Err(bytes) => {
            let (artifact, bytes) = blocking(move || Ok((Artifact::of_bytes(&bytes, &content_type), bytes))).await?;
            call.artifacts.put(artifact, bytes).await?
        }
    };
    drop(large);
    let headers: Map<String, Value> = headers.into_iter().map(|(name, value)| (name, value.into())).collect();
    Ok(json!({"status": status, "headers": headers, "body": body}))
}

/// A body as the JSON that it says it is, where that can be kept.
fn inline_json(content_type: &str, body: &[u8]) -> Option<Value> {
    if !content_type.contains("json") || body.len() > LARGE_BYTES {
        return None;
    }
    // In its place, since it counts how deep that is.
    let mut output = json!({"body": serde_json::from_slice::<Value>(body).ok()?});
    storable::to_json(&output, OUTPUT_BYTES_MAX - HEADERS_BYTES).ok()?;
    Some(output["body"].take())
}

/// A body as text, where it is text and small; else as it was.
fn inline_text(content_type: &str, body: Vec<u8>) -> Result<Value, Vec<u8>> {
    if body.len() > OUTPUT_BYTES_MAX || body.contains(&0) {
        return Err(body);
    }
    let text = match String::from_utf8(body) {
        Ok(text) => text,
        // Of another character set: most of it can be read.
        Err(error) if content_type.starts_with("text/") => String::from_utf8_lossy(error.as_bytes()).into_owned(),
        Err(error) => return Err(error.into_bytes()),
    };
    match Value::String(text) {
        value if json_bytes(&value) <= OUTPUT_BYTES_MAX - HEADERS_BYTES => Ok(value),
        Value::String(text) => Err(text.into_bytes()),
        other => Ok(other),
    }
}

fn headers(value: Option<&Value>) -> Result<Vec<(String, String)>, Failure> {
    match value {
        None | Some(Value::Null) => Ok(Vec::new()),
        Some(Value::Object(map)) => map
            .iter()
            .map(|(name, value)| match value {
                Value::String(text) => Ok((name.clone(), text.clone())),
                Value::Number(number) => Ok((name.clone(), number.to_string())),
                _ => Err(Failure::invalid(format!("params.headers.{name} must be text"))),
            })
            .collect(),
        Some(_) => Err(Failure::invalid("params.headers must be a map")),
    }
}

fn body(value: Option<&Value>) -> Option<(Vec<u8>, String)> {
    match value {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some((text.clone().into_bytes(), "text/plain; charset=utf-8".to_owned())),
        Some(other) => Some((other.to_string().into_bytes(), "application/json".to_owned())),
    }
}
