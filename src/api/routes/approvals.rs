//! Approvals: list, get, approve, reject.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use capx_core::domain::ids::ApprovalId;
use capx_core::engine::gates::{Verdict, decide};
use capx_core::store::approvals::{self, ApprovalRow, Filter};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Routes;
use crate::api::auth::{ApprovalsRead, ApprovalsWrite, Caller};
use crate::api::body::{Body, Params, Path, limit};
use crate::api::reply::{cursor, page, time};
use crate::api::{ApiError, Shared};

const STATUSES: &[&str] = &["pending", "approved", "rejected", "expired", "cancelled"];
const WORDS_CHARS_MAX: usize = 10_000;

pub(in crate::api) fn routes() -> Routes {
    Routes::new()
        .route("/approvals", get(list))
        .route("/companies/{company}/approvals", get(list_of_company))
        .route("/approvals/{approval}", get(one))
        .route("/approvals/{approval}/approve", post(approve))
        .route("/approvals/{approval}/reject", post(reject))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListParams {
    status: Option<String>,
    limit: Option<i64>,
    cursor: Option<String>,
}

async fn list(
    State(state): Shared,
    caller: Caller<ApprovalsRead>,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    // A key that is bound to a company sees that one's only.
    let filter = Filter { company: caller.company, ..Filter::default() };
    listed(&state, caller, filter, &params).await
}

async fn list_of_company(
    State(state): Shared,
    caller: Caller<ApprovalsRead>,
    Path(company): Path<String>,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?.company;
    let filter = Filter { company: Some(company), ..Filter::default() };
    listed(&state, caller, filter, &params).await
}

async fn listed(
    state: &crate::api::ApiState,
    caller: Caller<ApprovalsRead>,
    filter: Filter<'_>,
    params: &ListParams,
) -> Result<Response, ApiError> {
    let limit = limit(params.limit, 25, 100)?;
    if let Some(status) = params.status.as_deref()
        && !STATUSES.contains(&status)
    {
        return Err(ApiError::field("status", format!("must be one of {}", STATUSES.join(", "))));
    }
    let filter = Filter { status: params.status.as_deref(), before: cursor(params.cursor.as_deref())?, ..filter };
    let rows = approvals::list(&state.engine.pool, caller.account, filter, limit + 1).await?;
    let page = page(rows, limit, |row| row.approval.0, |row| show(&row));
    caller.list(state, page).await
}

fn id_of(text: &str) -> Result<ApprovalId, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound("approval"))
}

async fn one(
    State(state): Shared,
    caller: Caller<ApprovalsRead>,
    Path(approval): Path<String>,
) -> Result<Response, ApiError> {
    let row = approvals::get(&state.engine.pool, caller.account, caller.company, id_of(&approval)?)
        .await?
        .ok_or(ApiError::NotFound("approval"))?;
    caller.reply(&state, StatusCode::OK, 1, show(&row)).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ApproveBody {
    note: Option<String>,
}

async fn approve(
    State(state): Shared,
    caller: Caller<ApprovalsWrite>,
    Path(approval): Path<String>,
    Body(body): Body<ApproveBody>,
) -> Result<Response, ApiError> {
    let verdict = Verdict::Approve { note: bounded("note", body.note)? };
    decided(&state, &caller, id_of(&approval)?, &verdict).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct RejectBody {
    feedback: String,
}

async fn reject(
    State(state): Shared,
    caller: Caller<ApprovalsWrite>,
    Path(approval): Path<String>,
    Body(body): Body<RejectBody>,
) -> Result<Response, ApiError> {
    if body.feedback.trim().is_empty() {
        return Err(ApiError::field("feedback", "must not be empty: it is what the asker learns from"));
    }
    let feedback = bounded("feedback", Some(body.feedback))?.unwrap_or_default();
    decided(&state, &caller, id_of(&approval)?, &Verdict::Reject { feedback }).await
}

fn bounded(field: &str, words: Option<String>) -> Result<Option<String>, ApiError> {
    match words {
        Some(words) if words.chars().count() > WORDS_CHARS_MAX => {
            Err(ApiError::field(field, format!("must be at most {WORDS_CHARS_MAX} characters")))
        }
        words => Ok(words),
    }
}

async fn decided(
    state: &crate::api::ApiState,
    caller: &Caller<ApprovalsWrite>,
    id: ApprovalId,
    verdict: &Verdict,
) -> Result<Response, ApiError> {
    let by = caller.key.to_string();
    let row = decide(&state.engine, caller.account, caller.company, id, &by, verdict).await?;
    caller.reply(state, StatusCode::OK, 2, show(&row)).await
}

fn show(row: &ApprovalRow) -> Value {
    json!({
        "id": row.approval, "action_id": row.approval, "company_id": row.company, "status": row.status,
        "run_id": row.run, "step": row.step_name, "step_index": row.step,
        "agent": {"id": row.agent, "role": row.role}, "playbook": format!("{}/{}", row.playbook, row.step_name),
        "action_type": row.action, "estimated_cost": null, "context": row.context,
        "proposed_at": time(row.proposed_at), "expires_at": time(row.expires_at),
        "decided_at": row.decided_at.map(time), "decided_by": row.decided_by, "note": row.note,
    })
}
