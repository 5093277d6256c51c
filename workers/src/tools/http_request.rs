//! `http.request {method, url, headers?, body?}` -> `{status, headers, body}`.
//! A status of 400 or above fails the step; it is repeated only by `retry`,
//! with the same `Idempotency-Key`.

use capx_core::domain::outcome::Failure;
use reqwest::Method;
use serde_json::{Map, Value, json};

use super::{only, text};
use crate::egress::Call;
use crate::handlers::{Hands, StepCall};

pub(super) async fn run(hands: &Hands, call: StepCall<'_>) -> Result<Value, Failure> {
    let params = &call.params;
    only(params, &["method", "url", "headers", "body"])?;
    let method = match params.get("method") {
        None | Some(Value::Null) => Method::GET,
        Some(_) => text(params, "method")?
            .to_uppercase()
            .parse()
            .map_err(|_| Failure::invalid("params.method is no HTTP method"))?,
    };
    let mut answer = hands
        .egress
        .call(Call {
            method,
            url: text(params, "url")?.to_owned(),
            headers: headers(params.get("headers"))?,
            body: body(params.get("body")),
            idempotency_key: call.idempotency_key,
            timeout: call.timeout,
            idle: call.idle,
        })
        .await?;
    let is_json = answer.headers.iter().any(|(name, value)| name == "content-type" && value.contains("json"));
    // As it came: a mask in the place of a number would be no JSON.
    let parsed = if is_json { serde_json::from_slice(&answer.body).ok() } else { None };
    // Before an excerpt cuts one in two.
    if let Some(secrets) = call.secrets {
        secrets.redactor().bytes(&mut answer.body);
    }
    if let Some(failure) = answer.failure() {
        return Err(failure);
    }
    let body = match parsed {
        Some(value) => value,
        None => Value::String(String::from_utf8_lossy(&answer.body).into_owned()),
    };
    let headers: Map<String, Value> = answer.headers.into_iter().map(|(name, value)| (name, value.into())).collect();
    Ok(json!({"status": answer.status, "headers": headers, "body": body}))
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

fn body(value: Option<&Value>) -> Option<(Vec<u8>, &'static str)> {
    match value {
        None | Some(Value::Null) => None,
        Some(Value::String(text)) => Some((text.clone().into_bytes(), "text/plain; charset=utf-8")),
        Some(other) => Some((other.to_string().into_bytes(), "application/json")),
    }
}
