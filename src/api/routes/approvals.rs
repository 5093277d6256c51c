//! Approvals: list, get, approve, reject.

use std::collections::HashMap;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::digest::hex;
use capx_core::domain::ids::{AgentId, ApprovalId, CompanyId, RunId, TaskId};
use capx_core::domain::task::Change;
use capx_core::engine::FieldProblem;
use capx_core::engine::asks;
use capx_core::engine::gates::{Verdict, decide};
use capx_core::engine::tasks as engine_tasks;
use capx_core::store::approvals::{self, ApprovalRow, Asked, Filter};
use capx_core::store::asks::{self as stored_asks, Ask};
use capx_core::store::tasks::TaskRow;
use capx_core::store::{agents, tasks, tenants};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Path, Query, limit, one_of};
use crate::api::command::Command;
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

/// What a person is asked for, or was: to open a gate, or to let a task be done.
#[derive(Debug, Serialize, ToSchema)]
struct Approval {
    /// `apr_…` of a gate, `tsk_…` of a task.
    id: String,
    /// The same.
    action_id: String,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// `pending`, `approved`, `rejected`, `expired` or `cancelled`.
    status: String,
    /// The task, where it is one.
    #[schema(required, value_type = Option<String>)]
    task_id: Option<TaskId>,
    /// The run, where it is a gate, as what follows.
    #[schema(required, value_type = Option<String>)]
    run_id: Option<RunId>,
    /// The step's id within the playbook.
    #[schema(required)]
    step: Option<String>,
    /// Its place, from 0.
    #[schema(required)]
    step_index: Option<i32>,
    agent: Asker,
    /// Playbook and step, e.g. `report/publish`.
    #[schema(required)]
    playbook: Option<String>,
    /// What would be done.
    action_type: String,
    /// `low`, `medium` or `high`: what is shown to a person is at least medium.
    risk: &'static str,
    /// In credits, where it is known.
    #[schema(required)]
    estimated_cost: Option<f64>,
    /// Exactly what is to be decided.
    context: Value,
    /// SHA-256 of that: send it along to decide about nothing else.
    #[serde(skip_serializing_if = "Option::is_none")]
    digest: Option<String>,
    /// The arguments that a person has put in the place of those that were asked about.
    #[serde(skip_serializing_if = "Option::is_none")]
    edited: Option<Value>,
    proposed_at: Time,
    /// When it decides itself, if it does.
    #[schema(required)]
    expires_at: Option<Time>,
    #[schema(required)]
    decided_at: Option<Time>,
    /// By which key.
    #[schema(required)]
    decided_by: Option<String>,
    /// What was said with it.
    #[schema(required)]
    note: Option<String>,
    /// Who may decide, by the names or ids of keys; anybody with the scope without.
    #[serde(skip_serializing_if = "Option::is_none")]
    reviewers: Option<Vec<String>>,
    /// Since when anybody may, since nobody had in time.
    #[serde(skip_serializing_if = "Option::is_none")]
    escalated_at: Option<Time>,
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
    fn of_gate(row: ApprovalRow) -> Self {
        let risk =
            row.context["risk"].as_str().and_then(|risk| ["low", "medium", "high"].into_iter().find(|r| *r == risk));
        Self {
            id: row.approval.to_string(),
            action_id: row.approval.to_string(),
            company_id: row.company,
            status: row.status,
            task_id: None,
            run_id: Some(row.run),
            playbook: Some(format!("{}/{}", row.playbook, row.step_name)),
            step: Some(row.step_name),
            step_index: Some(row.step),
            agent: Asker { id: row.agent, role: row.role },
            action_type: row.context["tool"].as_str().map_or(row.action, str::to_owned),
            risk: risk.unwrap_or("medium"),
            estimated_cost: row.context["estimated_cost"].as_f64(),
            digest: Some(hex(&row.digest)),
            edited: row.edited,
            context: row.context,
            proposed_at: Time(row.proposed_at),
            expires_at: Some(Time(row.expires_at)),
            decided_at: row.decided_at.map(Time),
            decided_by: row.decided_by,
            note: row.note,
            reviewers: row.reviewers,
            escalated_at: row.escalated_at.map(Time),
        }
    }

    fn of_task(row: TaskRow, role: Option<String>, ask: Option<Ask>) -> Self {
        let (context, digest) = (asks::context(&row), hex(&asks::digest(&row)));
        let reviewers = ask.as_ref().and_then(|ask| ask.reviewers.clone());
        let decided_at = match row.approval.as_deref() {
            Some("approved") => row.approved_at,
            Some("pending") => None,
            _ => row.ended_at,
        };
        Self {
            id: row.task().to_string(),
            action_id: row.task().to_string(),
            company_id: CompanyId(row.company_id),
            task_id: Some(row.task()),
            run_id: None,
            playbook: None,
            step: None,
            step_index: None,
            agent: Asker { id: row.agent_id.map(AgentId), role },
            action_type: "task".into(),
            risk: if matches!(row.priority.as_str(), "high" | "critical") { "high" } else { "medium" },
            estimated_cost: None,
            context,
            digest: Some(digest),
            edited: None,
            proposed_at: Time(row.created_at),
            expires_at: ask.as_ref().map(|ask| Time(ask.expires_at)),
            decided_at: decided_at.map(Time),
            escalated_at: ask.as_ref().and_then(|ask| ask.escalated_at).map(Time),
            decided_by: ask.and_then(|ask| ask.decided_by),
            note: row.feedback,
            reviewers,
            status: row.approval.unwrap_or_default(),
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
    let listed = approvals::list(&mut *tx, caller.account, filter, limit + 1).await?;
    let mut shown = load(tx, &listed).await?;
    let rows: Vec<(Uuid, Approval)> = listed
        .iter()
        .filter_map(|(_, asked)| {
            let id = match asked {
                Asked::Gate(id) => id.0,
                Asked::Task(id) => id.0,
            };
            Some((id, shown.remove(&id)?))
        })
        .collect();
    Ok(page(rows, limit, |row| id_cursor(row.0), |row| row.1))
}

/// Loads what was listed.
async fn load(tx: &mut sqlx::PgConnection, listed: &[(CompanyId, Asked)]) -> Result<HashMap<Uuid, Approval>, ApiError> {
    let (mut gates, mut asked) = (Vec::new(), Vec::new());
    for (company, one) in listed {
        match one {
            Asked::Gate(id) => gates.push((*company, *id)),
            Asked::Task(id) => asked.push((*company, *id)),
        }
    }
    let mut shown = HashMap::new();
    if !gates.is_empty() {
        let rows = approvals::some(&mut *tx, &gates).await?;
        shown.extend(rows.into_iter().map(|row| (row.approval.0, Approval::of_gate(row))));
    }
    if !asked.is_empty() {
        let rows = tasks::some(&mut *tx, &asked).await?;
        let found = stored_asks::some(&mut *tx, &asked).await?;
        let mut found: HashMap<TaskId, Ask> = found.into_iter().map(|ask| (ask.task, ask)).collect();
        let about: Vec<_> =
            rows.iter().filter_map(|row| Some((CompanyId(row.company_id), AgentId(row.agent_id?)))).collect();
        let roles: HashMap<AgentId, String> = agents::roles(tx, &about).await?.into_iter().collect();
        shown.extend(rows.into_iter().map(|row| {
            let role = row.agent_id.and_then(|agent| roles.get(&AgentId(agent)).cloned());
            let ask = found.remove(&row.task());
            (row.id, Approval::of_task(row, role, ask))
        }));
    }
    Ok(shown)
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

fn id_of(text: &str) -> Result<Asked, ApiError> {
    let gate = text.parse().map(Asked::Gate);
    gate.or_else(|_| text.parse().map(Asked::Task)).map_err(|_| ApiError::NotFound("approval"))
}

/// A task that a person is asked about.
async fn asked_task(
    tx: &mut sqlx::PgConnection,
    caller: &Caller,
    task: TaskId,
) -> Result<(CompanyId, Approval), ApiError> {
    let company = tasks::company_of(&mut *tx, caller.account, caller.company, task).await?;
    let company = company.ok_or(ApiError::NotFound("approval"))?;
    let shown = load(tx, &[(company, Asked::Task(task))]).await?.remove(&task.0);
    Ok((company, shown.ok_or(ApiError::NotFound("approval"))?))
}

/// Get an approval
#[utoipa::path(get, path = "/approvals/{approval}", tag = "Approvals",
    params(("approval" = String, Path, description = "`apr_…`, or the task's `tsk_…`")),
    responses((status = 200, description = "The approval.", body = One<Approval>), (status = 304, description = "Not changed.")))]
async fn one(State(state): Shared, caller: Caller, Path(approval): Path<String>) -> Result<Response, ApiError> {
    let asked = id_of(&approval)?;
    let mut tx = caller.read(&state).await?;
    let shown = match asked {
        Asked::Gate(id) => {
            let row = approvals::get(&mut *tx, caller.account, caller.company, id).await?;
            Approval::of_gate(row.ok_or(ApiError::NotFound("approval"))?)
        }
        Asked::Task(task) => asked_task(&mut tx, &caller, task).await?.1,
    };
    caller.one(&shown)
}

/// What is said with an approval.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ApproveBody {
    /// Kept with the decision.
    #[schema(max_length = 10_000)]
    pub note: Option<String>,
    /// The `digest` of what you have seen: anything else is not approved.
    #[schema(max_length = 64)]
    pub digest: Option<String>,
    /// The arguments that the tool is given instead, where a call of one is asked about.
    pub params: Option<Map<String, Value>>,
}

impl Check for ApproveBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let note = self.note.as_deref().and_then(|note| too_long("note", note));
        let hex = |digest: &String| digest.len() == 64 && digest.chars().all(|c| c.is_ascii_hexdigit());
        let digest = self.digest.as_ref().filter(|digest| !hex(digest));
        let digest =
            digest.map(|_| FieldProblem::new("digest", "must be the `digest` of the approval, 64 hexadecimal digits"));
        note.into_iter().chain(digest).collect()
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

impl Check for RejectBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let empty = self.feedback.trim().is_empty();
        let empty = empty.then(|| FieldProblem::new("feedback", "must not be empty: it is what the asker learns from"));
        empty.or_else(|| too_long("feedback", &self.feedback)).into_iter().collect()
    }
}

fn too_long(field: &str, words: &str) -> Option<FieldProblem> {
    let long = words.chars().count() > WORDS_CHARS_MAX;
    long.then(|| FieldProblem::new(field, format!("must be at most {WORDS_CHARS_MAX} characters")))
}

/// Where an approval names its reviewers, one of them decides, or a key with the scope `*`:
/// whoever may do everything is not locked out by a name in a file.
async fn may_review(
    command: &mut Command<'_>,
    caller: &Caller,
    reviewers: Option<Vec<String>>,
) -> Result<(), ApiError> {
    let Some(names) = reviewers else { return Ok(()) };
    let Some(key) = tenants::grant_of(command.tx(), caller.key).await? else { return Ok(()) };
    let id = caller.key.to_string();
    if key.scopes.iter().any(|scope| scope == "*") || names.iter().any(|name| *name == key.name || *name == id) {
        return Ok(());
    }
    Err(ApiError::Governance(format!("only {} may decide about this approval", names.join(", "))))
}

async fn may_decide(
    command: &mut Command<'_>,
    caller: &Caller,
    id: ApprovalId,
    shown: Option<&str>,
) -> Result<(), ApiError> {
    let Some(gate) = approvals::get(command.tx(), caller.account, caller.company, id).await? else { return Ok(()) };
    if shown.is_some_and(|shown| shown != hex(&gate.digest)) {
        return Err(ApiError::Conflict("what would be done is not what `digest` stands for; look at it again".into()));
    }
    may_review(command, caller, gate.reviewers.filter(|_| gate.escalated_at.is_none())).await
}

/// The same for a task that waits for it.
pub(super) async fn may_decide_task(
    command: &mut Command<'_>,
    caller: &Caller,
    (company, task): (CompanyId, TaskId),
) -> Result<(), ApiError> {
    let ask = stored_asks::some(command.tx(), &[(company, task)]).await?.pop();
    may_review(command, caller, ask.filter(|ask| ask.escalated_at.is_none()).and_then(|ask| ask.reviewers)).await
}

async fn decided(
    state: &ApiState,
    caller: &Caller,
    approval: &str,
    digest: [u8; 32],
    (verdict, shown): (&Verdict, Option<&str>),
) -> Result<Response, ApiError> {
    let (asked, by) = (id_of(approval)?, caller.key.to_string());
    let mut command = caller.command(state, digest).await?;
    let shown = match asked {
        Asked::Gate(id) => {
            may_decide(&mut command, caller, id, shown).await?;
            let row = decide(&state.engine, command.tx(), caller.account, caller.company, id, &by, verdict).await?;
            Approval::of_gate(row)
        }
        Asked::Task(task) => {
            let (company, _) = asked_task(command.tx(), caller, task).await?;
            let (change, feedback) = match verdict {
                Verdict::Approve { params: Some(_), .. } => {
                    return Err(ApiError::field("params", "a task has none: change it by PATCH, then approve it"));
                }
                Verdict::Approve { note, .. } => (Change::Approve, note.as_deref()),
                Verdict::Reject { feedback } => (Change::Reject, Some(feedback.as_str())),
            };
            may_decide_task(&mut command, caller, (company, task)).await?;
            let said = asks::Said { by: &by, words: feedback, shown };
            engine_tasks::change(&state.engine, command.tx(), (company, task), change, said).await?;
            asked_task(command.tx(), caller, task).await?.1
        }
    };
    command.wake();
    command.finish(StatusCode::OK, shown).await
}

/// Approve
///
/// The same again changes nothing; after another decision it is a 409.
#[utoipa::path(post, path = "/approvals/{approval}/approve", tag = "Approvals", request_body = ApproveBody,
    params(("approval" = String, Path, description = "`apr_…`, or the task's `tsk_…`")),
    responses((status = 200, description = "It is approved.", body = One<Approval>)))]
async fn approve(
    State(state): Shared,
    caller: Caller,
    Path(approval): Path<String>,
    Body { body, digest }: Body<ApproveBody>,
) -> Result<Response, ApiError> {
    let verdict = Verdict::Approve { note: body.note, params: body.params };
    decided(&state, &caller, &approval, digest, (&verdict, body.digest.as_deref())).await
}

/// Reject
///
/// With feedback, which shows on the run and its step.
#[utoipa::path(post, path = "/approvals/{approval}/reject", tag = "Approvals", request_body = RejectBody,
    params(("approval" = String, Path, description = "`apr_…`, or the task's `tsk_…`")),
    responses((status = 200, description = "It is rejected.", body = One<Approval>)))]
async fn reject(
    State(state): Shared,
    caller: Caller,
    Path(approval): Path<String>,
    Body { body, digest }: Body<RejectBody>,
) -> Result<Response, ApiError> {
    let verdict = Verdict::Reject { feedback: body.feedback };
    decided(&state, &caller, &approval, digest, (&verdict, None)).await
}
