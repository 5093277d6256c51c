//! What became of the items of a step that is done for a list.

use axum::extract::State;
use axum::response::Response;
use capx_core::domain::ids::{AgentId, RunId};
use capx_core::domain::playbook::problem::did_you_mean;
use capx_core::store::fans::{self, ItemFilter, ShownItem};
use capx_core::store::runs;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::runs::find;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Path, Query, limit};
use crate::api::reply::{Many, Page, Time, wrong_cursor};
use crate::api::{ApiError, Shared, openapi};

/// What the outputs of a page may come to, in bytes of JSON; it has one item at least.
const PAGE_BYTES_MAX: i64 = 4 * 1024 * 1024;

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::PlaybooksRead, 1, routes!(items))
}

fn statuses() -> utoipa::openapi::schema::Object {
    openapi::names(&["completed", "failed"])
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ItemsQuery {
    /// The id of the step; needed where several steps of the run have items.
    step: Option<String>,
    /// `completed` or `failed`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// Results of a page, or fewer where their outputs are large.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::number_cursor, required = false)]
    cursor: Option<String>,
}

/// An item that is over.
#[derive(Debug, Serialize, ToSchema)]
struct RunItemOf {
    /// Its place in the list, from 0.
    item: i32,
    /// `completed` or `failed`.
    status: String,
    #[schema(required, value_type = Option<String>)]
    agent_id: Option<AgentId>,
    /// In USD.
    cost: f64,
    /// Of the last attempt, in milliseconds.
    duration_ms: i64,
    /// Tries so far.
    attempts: i32,
    #[schema(required)]
    output: Option<Value>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
    completed_at: Time,
}

impl From<ShownItem> for RunItemOf {
    fn from(row: ShownItem) -> Self {
        Self {
            item: row.item,
            status: row.status,
            agent_id: row.agent,
            cost: row.cost.to_usd(),
            duration_ms: row.duration_ms,
            attempts: row.attempt,
            output: row.output,
            error: row.error,
            completed_at: Time(row.ended_at),
        }
    }
}

/// List the items of a step
///
/// Those that are over, in the order of the list.
#[utoipa::path(get, path = "/runs/{run}/items", tag = "Runs",
    params(("run" = String, Path, description = "`run_…`"), ItemsQuery),
    responses((status = 200, description = "A page.", body = Many<RunItemOf>)))]
async fn items(
    State(state): Shared,
    caller: Caller,
    Path(run): Path<String>,
    Query(query): Query<ItemsQuery>,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let after = match query.cursor.as_deref() {
        None => -1,
        // As it was made, and not in another form.
        Some(text) => text.parse().ok().filter(|n: &i32| *n >= 0 && n.to_string() == text).ok_or_else(wrong_cursor)?,
    };
    let status = query.status.as_deref();
    if status.is_some_and(|status| !["completed", "failed"].contains(&status)) {
        return Err(ApiError::field("status", "must be one of completed, failed"));
    }
    let run: RunId = run.parse().map_err(|_| ApiError::NotFound("run"))?;
    let mut tx = caller.read(&state).await?;
    let (company, playbook) = runs::locate(&mut *tx, caller.account, run).await?.ok_or(ApiError::NotFound("run"))?;
    let row = find(&mut tx, &caller, (company, playbook, run)).await?;
    let plans = state.engine.plans.get(&mut *tx, &[(company.0, row.version.0)]).await?;
    let steps = plans.get(&row.version.0).map(|plan| plan.steps.as_slice()).unwrap_or_default();
    let lists: Vec<(usize, &str)> =
        steps.iter().enumerate().filter(|(_, s)| s.fan.is_some()).map(|(at, s)| (at, s.id.as_str())).collect();
    let ids = || lists.iter().map(|(_, id)| *id);
    let names = || ids().collect::<Vec<_>>().join(", ");
    let step = match (query.step.as_deref(), lists.as_slice()) {
        (None, [(only, _)]) => *only,
        (None, []) => return Err(ApiError::field("step", "the run has no step with `for_each`")),
        (None, _) => return Err(ApiError::field("step", format!("is required; it is one of {}", names()))),
        (Some(id), _) => lists.iter().find(|(_, known)| *known == id).map(|(at, _)| *at).ok_or_else(|| {
            let hint = did_you_mean(id, ids()).unwrap_or_else(|| format!("those with `for_each` are: {}", names()));
            ApiError::field("step", format!("names no step with `for_each`; {hint}"))
        })?,
    };
    let filter = ItemFilter { step: i32::try_from(step).unwrap_or(i32::MAX), status, after };
    let (rows, more) = fans::page(&mut *tx, company, run, &filter, limit, PAGE_BYTES_MAX).await?;
    let cursor = rows.last().filter(|_| more).map(|row| row.item.to_string());
    caller.list(Page { data: rows.into_iter().map(RunItemOf::from).collect(), cursor })
}
