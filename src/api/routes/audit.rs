//! A company's audit log.

use axum::extract::State;
use axum::response::Response;
use capx_core::domain::audit::Link;
use capx_core::domain::digest::hex;
use capx_core::store::audit;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Path, Query, limit};
use crate::api::reply::{Many, Time, page, wrong_cursor};
use crate::api::{ApiError, Shared};

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::ActivityRead, 1, routes!(audited))
}

/// An entry of the audit log.
#[derive(Debug, Serialize, ToSchema)]
struct Audited {
    /// Its place in the company's chain, from 1.
    seq: i64,
    timestamp: Time,
    /// What happened, e.g. `approval.resolved`.
    kind: String,
    /// Who did it: a key, an agent, or `system`.
    actor: String,
    #[schema(value_type = Object)]
    data: Value,
    /// SHA-256 over it and the hash before it.
    hash: String,
    /// The hash of the entry before it.
    prev: String,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AuditQuery {
    /// Results of a page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before: its last place.
    #[param(pattern = "^[0-9]{1,18}$", required = false)]
    cursor: Option<String>,
}

/// A company's audit log
///
/// What was decided and done, by whom, newest first: each entry is tied to the one before it,
/// and `capx audit verify` holds the whole against that.
#[utoipa::path(get, path = "/companies/{company}/audit", tag = "Activity",
    params(("company" = String, Path, description = "`co_…`"), AuditQuery),
    responses((status = 200, description = "A page.", body = Many<Audited>)))]
async fn audited(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<AuditQuery>,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 50, 200)?;
    let before = match query.cursor.as_deref() {
        None => i64::MAX,
        Some(cursor) => cursor.parse().map_err(|_| wrong_cursor())?,
    };
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let rows = audit::before(&mut *tx, company, before, limit + 1).await?;
    let shown = |link: Link| Audited {
        seq: link.seq,
        timestamp: Time(chrono::DateTime::from_timestamp_micros(link.at_us).unwrap_or_default()),
        kind: link.kind,
        actor: link.actor,
        data: serde_json::from_str(&link.data).unwrap_or_default(),
        hash: hex(&link.hash),
        prev: hex(&link.prev),
    };
    caller.list(page(rows, limit, |link| link.seq.to_string(), shown))
}
