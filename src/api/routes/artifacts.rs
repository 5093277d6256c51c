//! Artifacts: what steps have said that was too large to be kept inline.

use std::io;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::State;
use axum::http::HeaderValue;
use axum::http::header::{
    CACHE_CONTROL, CONTENT_DISPOSITION, CONTENT_LENGTH, CONTENT_SECURITY_POLICY, CONTENT_TYPE, ETAG,
    X_CONTENT_TYPE_OPTIONS,
};
use axum::response::Response;
use capx_core::domain::artifact::{Artifact, BINARY, is_digest};
use capx_core::domain::ids::CompanyId;
use capx_core::store::artifacts::{self as store, CHUNK_BYTES};
use utoipa_axum::routes;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::Path;
use crate::api::{ApiError, ApiState, Shared};

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::PlaybooksRead, 1, routes!(get))
}

/// Get an artifact
///
/// The bytes that a reference leads to, `{"artifact": "<sha256>", "bytes": n,
/// "content_type": "…"}` in an output, under the content type that they came with. They
/// are whatever a step has said: they come as a download, which no browser opens.
#[utoipa::path(get, path = "/companies/{company}/artifacts/{artifact}", tag = "Runs",
    params(("company" = String, Path, description = "`co_…`"),
        ("artifact" = String, Path, description = "Its SHA-256, in hexadecimal.")),
    responses((status = 200, description = "Its bytes.", body = Vec<u8>, content_type = "*/*"),
        (status = 304, description = "It is the one of `If-None-Match`.")))]
async fn get(
    State(state): Shared,
    caller: Caller,
    Path((company, artifact)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let mut tx = caller.look_up(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let found = match is_digest(&artifact) {
        true => store::find(&mut *tx, company, &artifact).await?,
        false => None,
    };
    drop(tx);
    let artifact = found.ok_or(ApiError::NotFound("artifact"))?;
    let tag = HeaderValue::try_from(format!("\"{}\"", artifact.sha256)).map_err(|_| ApiError::Internal)?;
    if let Some(unchanged) = caller.unchanged(&tag) {
        return Ok(unchanged);
    }
    let _ = caller.permit.charge(caller.credits);
    let content_type = HeaderValue::try_from(&artifact.content_type);
    let name = HeaderValue::try_from(format!("attachment; filename=\"{}\"", artifact.sha256));
    let bytes = artifact.bytes;
    let mut response = Response::new(body(Arc::clone(&state), caller, company, artifact));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, content_type.unwrap_or(HeaderValue::from_static(BINARY)));
    headers.insert(CONTENT_LENGTH, bytes.into());
    headers.insert(CONTENT_DISPOSITION, name.map_err(|_| ApiError::Internal)?);
    headers.insert(CONTENT_SECURITY_POLICY, HeaderValue::from_static("sandbox"));
    headers.insert(X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    // What a digest names never changes.
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("private, immutable, max-age=31536000"));
    headers.insert(ETAG, tag);
    Ok(response)
}

/// Chunk by chunk, so that neither memory nor a connection is held for a slow client.
fn body(state: Arc<ApiState>, caller: Caller, company: CompanyId, artifact: Artifact) -> Body {
    let chunks = artifact.bytes.div_ceil(CHUNK_BYTES);
    let given = Arc::new((state, caller, artifact));
    Body::from_stream(futures_util::stream::unfold(0, move |seq| {
        let given = Arc::clone(&given);
        async move {
            if seq >= chunks {
                return None;
            }
            // A task of its own: a client that goes away drops no call half-way.
            let read = tokio::spawn(async move { chunk(&given.0, &given.1, company, &given.2, seq).await });
            let chunk = read.await.unwrap_or_else(|error| Err(io::Error::other(error)));
            // After trouble the answer is cut off, and shorter than it said.
            let next = if chunk.is_ok() { seq + 1 } else { chunks };
            Some((chunk, next))
        }
    }))
}

async fn chunk(
    state: &ApiState,
    caller: &Caller,
    company: CompanyId,
    artifact: &Artifact,
    seq: usize,
) -> io::Result<Vec<u8>> {
    let mut tx = caller.look_up(state).await.map_err(io::Error::other)?;
    let chunk = store::chunk(&mut *tx, company, &artifact.sha256, seq).await.map_err(io::Error::other)?;
    chunk.ok_or_else(|| io::Error::other("the artifact is gone"))
}
