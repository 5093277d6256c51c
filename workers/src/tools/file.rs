//! `file.read {path}` -> `{path, content, bytes}` and `file.write {path,
//! content}` -> `{path, bytes, sha256}`, inside the run's workspace. Content that is
//! large, or no text, is an artifact; a reference to one is written as its bytes.

use capx_core::domain::artifact::{Artifact, BINARY};
use capx_core::domain::digest::{hex, sha256};
use capx_core::domain::outcome::Failure;
use capx_core::domain::storable::OUTPUT_BYTES_MAX;
use serde_json::{Value, json};

use super::{ToolCall, blocking, only, text};
use crate::egress::room_for;
use crate::handlers::Hands;

pub(super) async fn read(hands: &Hands, call: ToolCall<'_>) -> Result<Value, Failure> {
    only(&call.params, &["path"])?;
    let path = text(&call.params, "path")?.to_owned();
    let workspace = hands.workspaces.of(call.company, call.run);
    let file = blocking({
        let path = path.clone();
        move || workspace.file(&path)
    })
    .await?;
    let _room = room_for(file.bytes).await;
    // A file may hold what a step before was given.
    let secrets = call.secrets.cloned();
    let read = blocking(move || {
        let mut bytes = file.read()?;
        if let Some(secrets) = secrets {
            secrets.redactor().bytes(&mut bytes);
        }
        let is_text = bytes.len() <= OUTPUT_BYTES_MAX && !bytes.contains(&0);
        match is_text.then(|| std::str::from_utf8(&bytes).ok()).flatten() {
            Some(text) => Ok((bytes.len(), Ok(text.to_owned()))),
            None => Ok((bytes.len(), Err((Artifact::of_bytes(&bytes, BINARY), bytes)))),
        }
    });
    let (bytes, content) = read.await?;
    let content = match content {
        Ok(text) => Value::String(text),
        Err((artifact, bytes)) => call.artifacts.put(artifact, bytes).await?,
    };
    Ok(json!({"path": path, "bytes": bytes, "content": content}))
}

pub(super) async fn write(hands: &Hands, call: ToolCall<'_>) -> Result<Value, Failure> {
    only(&call.params, &["path", "content"])?;
    let path = text(&call.params, "path")?.to_owned();
    let given = call.params.get("content");
    let (content, _room) = match (call.artifacts.given(given).await?, given) {
        (Some(given), _) => (given.bytes, given.room),
        (None, Some(Value::String(text))) => (text.clone().into_bytes(), None),
        // What a step before has made is written as JSON.
        (None, Some(other)) if !other.is_null() => (other.to_string().into_bytes(), None),
        _ => return Err(Failure::invalid("params.content is required")),
    };
    let workspace = hands.workspaces.of(call.company, call.run);
    let (bytes, key) = (content.len(), call.idempotency_key);
    let digest = blocking({
        let path = path.clone();
        move || {
            workspace.write(&path, &content, &key)?;
            Ok(hex(&sha256(&content)))
        }
    });
    Ok(json!({"path": path, "bytes": bytes, "sha256": digest.await?}))
}
