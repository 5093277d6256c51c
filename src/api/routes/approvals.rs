//! Approvals: list, get, approve, reject.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::ids::{AgentId, ApprovalId, CompanyId, RunId};
use capx_core::engine::gates::{Verdict, decide};
use capx_core::store::approvals::{self, ApprovalRow, Filter};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Path, Query, limit, one_of};
use crate::api::reply::{Many, One, Page, Time, cursor, id_cursor, page};
use crate::api::{ApiError, ApiState, Shared, openapi};

/// What a filter by status may name.
const STATUSES: &[&str] = &["pending", "approved", "rejected", "expired", "cancelled"];
const WORDS_CHARS_MAX: usize = 10_000;

fn statuses() -> utoipa::openapi::schema::Object {
    openapi::names(STATUSES)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::ApprovalsRead, 1, routes!(list))
        .with(Scope::ApprovalsRead, 1, routes!(list_of_company))
        .with(Scope::ApprovalsRead, 1, routes!(one))
        .with(Scope::ApprovalsWrite, 2, routes!(approve))
        .with(Scope::ApprovalsWrite, 2, routes!(reject))
}

/// A gate that waits, or waited, for a person.
#[derive(Debug, Serialize, ToSchema)]
struct Approval {
    /// `apr_…`
    #[schema(value_type = String)]
    id: ApprovalId,
    /// The same.
    #[schema(value_type = String)]
    action_id: ApprovalId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// `pending`, `approved`, `rejected`, `expired` or `cancelled`.
    status: String,
    #[schema(value_type = String)]
    run_id: RunId,
    /// The step's id within the playbook.
    step: String,
    /// Its place, from 0.
    step_index: i32,
    agent: Asker,
    /// Playbook and step, e.g. `report/publish`.
    playbook: String,
    /// What would be done.
    action_type: String,
    /// In credits, where it is known.
    #[schema(required)]
    estimated_cost: Option<f64>,
    /// Exactly what is to be decided.
    context: Value,
    proposed_at: Time,
    /// When it decides itself.
    expires_at: Time,
    #[schema(required)]
    decided_at: Option<Time>,
    /// By which key.
    #[schema(required)]
    decided_by: Option<String>,
    /// What was said with it.
    #[schema(required)]
    note: Option<String>,
}

/// Who asks.
#[derive(Debug, Serialize, ToSchema)]
struct Asker {
    #[schema(required, value_type = Option<String>)]
    id: Option<AgentId>,
    #[schema(required)]
    role: Option<String>,
}

impl Approval {
    fn new(row: ApprovalRow) -> Self {
        Self {
            id: row.approval,
            action_id: row.approval,
            company_id: row.company,
            status: row.status,
            run_id: row.run,
            playbook: format!("{}/{}", row.playbook, row.step_name),
            step: row.step_name,
            step_index: row.step,
            agent: Asker { id: row.agent, role: row.role },
            action_type: row.action,
            estimated_cost: None,
            context: row.context,
            proposed_at: Time(row.proposed_at),
            expires_at: Time(row.expires_at),
            decided_at: row.decided_at.map(Time),
            decided_by: row.decided_by,
            note: row.note,
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `pending`, `approved`, `rejected`, `expired` or `cancelled`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

async fn listed(
    tx: &mut sqlx::PgConnection,
    caller: &Caller,
    company: Option<CompanyId>,
    query: &ListQuery,
) -> Result<Page<Approval>, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let filter = Filter {
        company,
        status: one_of("status", query.status.as_deref(), STATUSES)?,
        before: cursor(query.cursor.as_deref())?,
    };
    let rows = approvals::list(tx, caller.account, filter, limit + 1).await?;
    Ok(page(rows, limit, |row| id_cursor(row.approval.0), Approval::new))
}

/// List approvals
///
/// Of all companies that the key may see, newest first.
#[utoipa::path(get, path = "/approvals", tag = "Approvals", params(ListQuery),
    responses((status = 200, description = "A page.", body = Many<Approval>)))]
async fn list(State(state): Shared, caller: Caller, Query(query): Query<ListQuery>) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let page = listed(&mut tx, &caller, caller.company, &query).await?;
    caller.list(page)
}

/// List a company's approvals
///
/// Newest first.
#[utoipa::path(get, path = "/companies/{company}/approvals", tag = "Approvals",
    params(("company" = String, Path, description = "`co_…`"), ListQuery),
    responses((status = 200, description = "A page.", body = Many<Approval>)))]
async fn list_of_company(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let page = listed(&mut tx, &caller, Some(company), &query).await?;
    caller.list(page)
}

fn id_of(text: &str) -> Result<ApprovalId, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound("approval"))
}

/// Get an approval
#[utoipa::path(get, path = "/approvals/{approval}", tag = "Approvals",
    params(("approval" = String, Path, description = "`apr_…`")),
    responses((status = 200, description = "The approval.", body = One<Approval>), (status = 304, description = "Not changed.")))]
async fn one(State(state): Shared, caller: Caller, Path(approval): Path<String>) -> Result<Response, ApiError> {
    let id = id_of(&approval)?;
    let mut tx = caller.read(&state).await?;
    let row = approvals::get(&mut *tx, caller.account, caller.company, id).await?;
    caller.one(&Approval::new(row.ok_or(ApiError::NotFound("approval"))?))
}

/// What is said with an approval.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ApproveBody {
    /// Kept with the decision.
    #[schema(max_length = 10_000)]
    pub note: Option<String>,
}

impl ApproveBody {
    /// The note, checked.
    pub fn note(self) -> Result<Option<String>, ApiError> {
        bounded("note", self.note)
    }
}

/// What is said with a rejection.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct RejectBody {
    /// What the asker learns from it.
    #[schema(min_length = 1, max_length = 10_000)]
    pub feedback: String,
}

impl RejectBody {
    /// The feedback, checked.
    pub fn feedback(self) -> Result<String, ApiError> {
        if self.feedback.trim().is_empty() {
            return Err(ApiError::field("feedback", "must not be empty: it is what the asker learns from"));
        }
        Ok(bounded("feedback", Some(self.feedback))?.unwrap_or_default())
    }
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
    state: &ApiState,
    caller: &Caller,
    approval: &str,
    digest: [u8; 32],
    verdict: &Verdict,
) -> Result<Response, ApiError> {
    let id = id_of(approval)?;
    let mut command = caller.command(state, digest).await?;
    let by = caller.key.to_string();
    let row = decide(&state.engine, command.tx(), caller.account, caller.company, id, &by, verdict).await?;
    command.wake();
    command.finish(StatusCode::OK, Approval::new(row)).await
}

/// Approve
///
/// The same again changes nothing; after another decision it is a 409.
#[utoipa::path(post, path = "/approvals/{approval}/approve", tag = "Approvals", request_body = ApproveBody,
    params(("approval" = String, Path, description = "`apr_…`")),
    responses((status = 200, description = "It is approved.", body = One<Approval>)))]
async fn approve(
    State(state): Shared,
    caller: Caller,
    Path(approval): Path<String>,
    Body { body, digest }: Body<ApproveBody>,
) -> Result<Response, ApiError> {
    let verdict = Verdict::Approve { note: body.note()? };
    decided(&state, &caller, &approval, digest, &verdict).await
}

/// Reject
///
/// With feedback, which shows on the run and its step.
#[utoipa::path(post, path = "/approvals/{approval}/reject", tag = "Approvals", request_body = RejectBody,
    params(("approval" = String, Path, description = "`apr_…`")),
    responses((status = 200, description = "It is rejected.", body = One<Approval>)))]
async fn reject(
    State(state): Shared,
    caller: Caller,
    Path(approval): Path<String>,
    Body { body, digest }: Body<RejectBody>,
) -> Result<Response, ApiError> {
    let verdict = Verdict::Reject { feedback: body.feedback()? };
    decided(&state, &caller, &approval, digest, &verdict).await
}
