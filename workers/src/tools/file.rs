//! `file.read {path}` -> `{path, content, bytes}` and `file.write {path,
//! content}` -> `{path, bytes, sha256}`, inside the run's workspace.

use capx_core::domain::digest::{hex, sha256};
use capx_core::domain::outcome::Failure;
use serde_json::{Value, json};

use super::{only, text};
use crate::handlers::{Hands, StepCall};

pub(super) async fn read(hands: &Hands, call: StepCall<'_>) -> Result<Value, Failure> {
    only(&call.params, &["path"])?;
    let path = text(&call.params, "path")?.to_owned();
    let workspace = hands.workspaces.of(call.company, call.run);
    let bytes = blocking({
        let path = path.clone();
        move || workspace.read(&path)
    })
    .await?;
    let content = String::from_utf8(bytes).map_err(|_| Failure::invalid(format!("`{path}` is not UTF-8 text")))?;
    Ok(json!({"path": path, "bytes": content.len(), "content": content}))
}

pub(super) async fn write(hands: &Hands, call: StepCall<'_>) -> Result<Value, Failure> {
    only(&call.params, &["path", "content"])?;
    let path = text(&call.params, "path")?.to_owned();
    let content = match call.params.get("content") {
        Some(Value::String(text)) => text.clone(),
        // What a step before has made is written as JSON.
        Some(other) if !other.is_null() => other.to_string(),
        _ => return Err(Failure::invalid("params.content is required")),
    };
    let (bytes, digest) = (content.len(), hex(&sha256(&content)));
    let workspace = hands.workspaces.of(call.company, call.run);
    let key = call.idempotency_key;
    blocking({
        let path = path.clone();
        move || workspace.write(&path, content.as_bytes(), &key)
    })
    .await?;
    Ok(json!({"path": path, "bytes": bytes, "sha256": digest}))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Failure::transient(format!("the file's task ended early: {error}"))))
}
