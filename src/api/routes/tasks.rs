//! Tasks: create, list, get, change, decide.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{AgentId, CompanyId, RunId, TaskId};
use capx_core::domain::task::{Change, PRIORITIES, STATUSES};
use capx_core::engine::FieldProblem;
use capx_core::engine::asks::Said;
use capx_core::engine::tasks::{self as engine, CreateTask};
use capx_core::store::tasks::{self, TaskChanges, TaskFilter, TaskRow};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::agents;
use super::approvals::{self, ApproveBody, RejectBody};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit, one_of};
use crate::api::period;
use crate::api::reply::{Many, One, Time, cursor, id_cursor, page};
use crate::api::{ApiError, ApiState, Shared, openapi};

const TITLE_CHARS_MAX: usize = 500;
const DESCRIPTION_CHARS_MAX: usize = 20_000;

fn statuses() -> utoipa::openapi::schema::Object {
    openapi::names(STATUSES)
}

fn priority() -> utoipa::openapi::schema::Object {
    openapi::names_or_null(PRIORITIES, "`medium` where nothing is said.")
}

fn priorities() -> utoipa::openapi::schema::Object {
    openapi::names(PRIORITIES)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::TasksWrite, 2, routes!(create))
        .with(Scope::CompaniesWrite, 2, routes!(direct))
        .with(Scope::TasksRead, 1, routes!(list))
        .with(Scope::TasksRead, 1, routes!(one))
        .with(Scope::TasksWrite, 2, routes!(update))
        .with(Scope::TasksWrite, 2, routes!(approve))
        .with(Scope::TasksWrite, 2, routes!(reject))
        .with(Scope::TasksWrite, 2, routes!(cancel))
        .with(Scope::TasksWrite, 2, routes!(retry))
}

/// A task to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateTaskBody {
    /// In short.
    #[schema(min_length = 1, max_length = 500)]
    title: String,
    /// What the agent is to do, in full.
    #[schema(max_length = 20_000)]
    description: Option<String>,
    /// `ag_…` or a role; else whoever has least to do.
    agent_id: Option<String>,
    /// `low`, `medium` (the default), `high` or `critical`.
    #[schema(schema_with = priority, required = false)]
    priority: Option<String>,
    /// Your own keys and values.
    metadata: Option<Map<String, Value>>,
    /// Tasks (`tsk_…`) that must be completed before it begins.
    #[schema(max_items = 20)]
    needs: Option<Vec<String>>,
}

/// Changes of a task; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UpdateTaskBody {
    /// In short.
    #[schema(min_length = 1, max_length = 500)]
    title: Option<String>,
    /// What the agent is to do, in full.
    #[schema(max_length = 20_000)]
    description: Option<String>,
    /// `ag_…` or a role.
    agent_id: Option<String>,
    /// `low`, `medium`, `high` or `critical`.
    #[schema(schema_with = priority, required = false)]
    priority: Option<String>,
    /// Merged into the task's.
    metadata: Option<Map<String, Value>>,
}

/// What the company is to reach.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct DirectiveBody {
    /// In a sentence or a page.
    #[schema(min_length = 1, max_length = 20_000)]
    objective: String,
    /// ISO 8601, until when.
    deadline: Option<String>,
    /// Credits that it may cost.
    #[schema(minimum = 0)]
    budget: Option<i64>,
}

/// A task.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Task {
    /// `tsk_…`
    #[schema(value_type = String)]
    id: TaskId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    #[schema(required, value_type = Option<String>)]
    agent_id: Option<AgentId>,
    title: String,
    #[schema(required)]
    description: Option<String>,
    /// `pending`, `pending_approval`, `in_progress`, `completed`, `rejected`,
    /// `failed` or `cancelled`.
    status: String,
    /// `low`, `medium`, `high` or `critical`.
    priority: String,
    #[schema(value_type = Object)]
    metadata: Value,
    /// Tasks that must be completed before it begins.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    #[schema(value_type = Vec<String>)]
    needs: Vec<TaskId>,
    /// The agent that has made it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    created_by: Option<AgentId>,
    /// What a person said when refusing it.
    #[serde(skip_serializing_if = "Option::is_none")]
    feedback: Option<String>,
    /// What came of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    result: Option<Value>,
    /// What went wrong.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
    /// The run that it came from.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    run_id: Option<RunId>,
    /// In USD.
    cost: f64,
    created_at: Time,
    updated_at: Time,
    #[serde(skip_serializing_if = "Option::is_none")]
    completed_at: Option<Time>,
}

impl Task {
    pub fn new(row: TaskRow) -> Self {
        Self {
            id: row.task(),
            company_id: CompanyId(row.company_id),
            agent_id: row.agent_id.map(AgentId),
            run_id: row.run(),
            cost: row.cost().to_usd(),
            needs: row.needs.iter().copied().map(TaskId).collect(),
            created_by: row.created_by.map(AgentId),
            title: row.title,
            description: row.description,
            status: row.status,
            priority: row.priority,
            metadata: row.metadata,
            feedback: row.feedback,
            result: row.result,
            error: row.error,
            created_at: Time(row.created_at),
            updated_at: Time(row.updated_at),
            completed_at: row.ended_at.map(Time),
        }
    }
}

fn problems(title: Option<&str>, description: Option<&str>, priority: Option<&str>) -> Vec<FieldProblem> {
    let mut problems = Vec::new();
    if title.is_some_and(|title| title.trim().is_empty() || title.chars().count() > TITLE_CHARS_MAX) {
        problems.push(FieldProblem::new("title", format!("must be 1 to {TITLE_CHARS_MAX} characters")));
    }
    if description.is_some_and(|text| text.chars().count() > DESCRIPTION_CHARS_MAX) {
        problems.push(FieldProblem::new("description", format!("must be at most {DESCRIPTION_CHARS_MAX} characters")));
    }
    if priority.is_some_and(|priority| !PRIORITIES.contains(&priority)) {
        problems.push(FieldProblem::new("priority", format!("must be one of {}", PRIORITIES.join(", "))));
    }
    problems
}

impl Check for CreateTaskBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        problems(Some(&self.title), self.description.as_deref(), self.priority.as_deref())
    }
}

impl Check for DirectiveBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        if self.objective.trim().is_empty() || self.objective.chars().count() > DESCRIPTION_CHARS_MAX {
            problems.push(FieldProblem::new("objective", format!("must be 1 to {DESCRIPTION_CHARS_MAX} characters")));
        }
        if self.budget.is_some_and(|budget| budget < 0) {
            problems.push(FieldProblem::new("budget", "must be credits, 0 or more"));
        }
        if let Some(Err(message)) = self.deadline.as_deref().map(period::time) {
            problems.push(FieldProblem::new("deadline", message));
        }
        problems
    }
}

impl Check for UpdateTaskBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        problems(self.title.as_deref(), self.description.as_deref(), self.priority.as_deref())
    }
}

/// Tasks that a body names.
fn needed(ids: Vec<String>) -> Result<Vec<TaskId>, ApiError> {
    let read = |(at, id): (usize, String)| {
        let problem =
            |_| FieldProblem::new(format!("needs.{at}"), format!("`{id}` is no task's id, which begins with `tsk_`"));
        id.parse().map_err(problem)
    };
    let read: Vec<Result<TaskId, FieldProblem>> = ids.into_iter().enumerate().map(read).collect();
    let (ids, problems): (Vec<_>, Vec<_>) = read.into_iter().partition(Result::is_ok);
    match problems.is_empty() {
        true => Ok(ids.into_iter().flatten().collect()),
        false => Err(ApiError::fields(problems.into_iter().filter_map(Result::err).collect())),
    }
}

/// An agent that a body names: one of the company's that is not removed.
async fn assignee(tx: &mut PgConnection, company: CompanyId, agent: Option<&str>) -> Result<Option<AgentId>, ApiError> {
    let Some(agent) = agent else { return Ok(None) };
    let row = agents::find(tx, company, agent).await?;
    if row.status == "removed" {
        return Err(ApiError::Conflict("the agent was removed; give the task to another one".into()));
    }
    Ok(Some(row.agent))
}

/// Create a task
///
/// Where the company's governance is `human_in_loop`, it waits for approval.
#[utoipa::path(post, path = "/companies/{company}/tasks", tag = "Tasks", request_body = CreateTaskBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 201, description = "The task.", body = One<Task>)))]
async fn create(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<CreateTaskBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_row(command.tx(), &company).await?;
    let request = CreateTask {
        agent: assignee(command.tx(), company.company, body.agent_id.as_deref()).await?,
        title: body.title,
        description: body.description,
        priority: body.priority.unwrap_or_else(|| "medium".to_owned()),
        metadata: Value::Object(body.metadata.unwrap_or_default()),
        needs: needed(body.needs.unwrap_or_default())?,
        by: None,
        call: None,
        parent: None,
    };
    let row = engine::create(command.tx(), &company, &request).await?;
    command.wake();
    command.finish(StatusCode::CREATED, Task::new(row)).await
}

/// Give a directive
///
/// A task for the strategist, who breaks it into tasks for others.
#[utoipa::path(post, path = "/companies/{company}/directives", tag = "Tasks", request_body = DirectiveBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 201, description = "The strategist's task.", body = One<Task>)))]
async fn direct(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<DirectiveBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_row(command.tx(), &company).await?;
    let strategist = match agents::find(command.tx(), company.company, "strategist").await {
        Ok(row) => row.agent,
        Err(ApiError::NotFound(_)) => {
            return Err(ApiError::Conflict(
                "the company has no strategist, who takes directives; add an agent with that role".into(),
            ));
        }
        Err(error) => return Err(error),
    };
    let title: String = body.objective.chars().take(TITLE_CHARS_MAX).collect();
    let mut metadata = Map::new();
    metadata.insert("directive".into(), true.into());
    metadata.insert("deadline".into(), body.deadline.into());
    metadata.insert("budget".into(), body.budget.into());
    let request = CreateTask {
        title,
        description: Some(body.objective),
        agent: Some(strategist),
        priority: "high".into(),
        metadata: Value::Object(metadata),
        needs: Vec::new(),
        by: None,
        call: None,
        parent: None,
    };
    let row = engine::create(command.tx(), &company, &request).await?;
    command.wake();
    command.finish(StatusCode::CREATED, Task::new(row)).await
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `pending`, `pending_approval`, `in_progress`, `completed`, `rejected`,
    /// `failed` or `cancelled`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// `ag_…` or a role.
    agent_id: Option<String>,
    /// `low`, `medium`, `high` or `critical`.
    #[param(schema_with = priorities, required = false)]
    priority: Option<String>,
    /// Made at this time (ISO 8601) or later.
    since: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

/// List tasks
///
/// Newest first.
#[utoipa::path(get, path = "/companies/{company}/tasks", tag = "Tasks",
    params(("company" = String, Path, description = "`co_…`"), ListQuery),
    responses((status = 200, description = "A page.", body = Many<Task>)))]
async fn list(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let limit = limit(query.limit, 25, 100)?;
    let agent = match query.agent_id.as_deref() {
        Some(agent) => Some(agents::find(&mut tx, company, agent).await?.agent),
        None => None,
    };
    let filter = TaskFilter {
        task: None,
        status: one_of("status", query.status.as_deref(), STATUSES)?,
        agent,
        priority: one_of("priority", query.priority.as_deref(), PRIORITIES)?,
        since: period::since("since", query.since.as_deref())?,
        before: cursor(query.cursor.as_deref())?,
    };
    let rows = tasks::list(&mut tx, company, filter, limit + 1).await?;
    caller.list(page(rows, limit, |row| id_cursor(row.id), Task::new))
}

fn id_of(text: &str) -> Result<TaskId, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound("task"))
}

/// Get a task
#[utoipa::path(get, path = "/companies/{company}/tasks/{task}", tag = "Tasks",
    params(("company" = String, Path, description = "`co_…`"), ("task" = String, Path, description = "`tsk_…`")),
    responses((status = 200, description = "The task.", body = One<Task>), (status = 304, description = "Not changed.")))]
async fn one(
    State(state): Shared,
    caller: Caller,
    Path((company, task)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let filter = TaskFilter { task: Some(id_of(&task)?), ..TaskFilter::default() };
    let row = tasks::list(&mut tx, company, filter, 1).await?.pop().ok_or(ApiError::NotFound("task"))?;
    caller.one(&Task::new(row))
}

/// Update a task
///
/// As long as it is not over; `metadata` is merged.
#[utoipa::path(patch, path = "/companies/{company}/tasks/{task}", tag = "Tasks", request_body = UpdateTaskBody,
    params(("company" = String, Path, description = "`co_…`"), ("task" = String, Path, description = "`tsk_…`")),
    responses((status = 200, description = "The task.", body = One<Task>)))]
async fn update(
    State(state): Shared,
    caller: Caller,
    Path((company, task)): Path<(String, String)>,
    Body { body, digest }: Body<UpdateTaskBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let agent = assignee(command.tx(), company, body.agent_id.as_deref()).await?;
    let changes = TaskChanges {
        title: body.title.as_deref(),
        description: body.description.as_deref(),
        agent,
        priority: body.priority.as_deref(),
        metadata: body.metadata.map(Value::Object),
    };
    let row = engine::update(command.tx(), company, id_of(&task)?, &changes).await?;
    command.wake();
    command.finish(StatusCode::OK, Task::new(row)).await
}

async fn changed(
    state: &ApiState,
    caller: &Caller,
    (company, task): (String, String),
    digest: [u8; 32],
    change: Change,
    (feedback, shown): (Option<&str>, Option<&str>),
) -> Result<Response, ApiError> {
    let mut command = caller.command(state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let task = id_of(&task)?;
    if matches!(change, Change::Approve | Change::Reject) {
        approvals::may_decide_task(&mut command, caller, (company, task)).await?;
    }
    let said = Said { by: &caller.key.to_string(), words: feedback, shown };
    let row = engine::change(&state.engine, command.tx(), (company, task), change, said).await?;
    command.wake();
    command.finish(StatusCode::OK, Task::new(row)).await
}

/// Approve a task
///
/// One that waits for it; the same again changes nothing.
#[utoipa::path(post, path = "/companies/{company}/tasks/{task}/approve", tag = "Tasks", request_body = ApproveBody,
    params(("company" = String, Path, description = "`co_…`"), ("task" = String, Path, description = "`tsk_…`")),
    responses((status = 200, description = "The task.", body = One<Task>)))]
async fn approve(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { body, digest }: Body<ApproveBody>,
) -> Result<Response, ApiError> {
    if body.params.is_some() {
        return Err(ApiError::field("params", "a task has none: change it by PATCH, then approve it"));
    }
    let said = (body.note.as_deref(), body.digest.as_deref());
    changed(&state, &caller, path, digest, Change::Approve, said).await
}

/// Reject a task
///
/// With feedback, which shows on the task.
#[utoipa::path(post, path = "/companies/{company}/tasks/{task}/reject", tag = "Tasks", request_body = RejectBody,
    params(("company" = String, Path, description = "`co_…`"), ("task" = String, Path, description = "`tsk_…`")),
    responses((status = 200, description = "The task.", body = One<Task>)))]
async fn reject(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { body, digest }: Body<RejectBody>,
) -> Result<Response, ApiError> {
    let feedback = body.feedback;
    changed(&state, &caller, path, digest, Change::Reject, (Some(&feedback), None)).await
}

/// Cancel a task
///
/// One that is not over.
#[utoipa::path(post, path = "/companies/{company}/tasks/{task}/cancel", tag = "Tasks",
    params(("company" = String, Path, description = "`co_…`"), ("task" = String, Path, description = "`tsk_…`")),
    responses((status = 200, description = "The task.", body = One<Task>)))]
async fn cancel(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    changed(&state, &caller, path, digest, Change::Cancel, (None, None)).await
}

/// Retry a task
///
/// One that failed or was cancelled is pending again.
#[utoipa::path(post, path = "/companies/{company}/tasks/{task}/retry", tag = "Tasks",
    params(("company" = String, Path, description = "`co_…`"), ("task" = String, Path, description = "`tsk_…`")),
    responses((status = 200, description = "The task.", body = One<Task>)))]
async fn retry(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    changed(&state, &caller, path, digest, Change::Retry, (None, None)).await
}
