//! Agents: add, list, get, change, pause, resume, wake, remove.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::agent::roles::built_in;
use capx_core::domain::budget::CREDIT;
use capx_core::domain::ids::{AgentId, CompanyId};
use capx_core::engine::FieldProblem;
use capx_core::engine::agents as engine;
use capx_core::engine::tenants::add_agent;
use capx_core::store::agents::{self, AgentRow, NewAgent};
use capx_core::store::pauses;
use capx_core::store::usage;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::companies::Deleted;
use super::pauses::PauseBody;
use super::{Routes, agent_config};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit, one_of};
use crate::api::reply::{Many, One, Time, cursor, id_cursor, page};
use crate::api::{ApiError, Shared, openapi};

/// The adapters that an agent may have. Workers know them too: the two meet
/// in the database only, and a test compares them.
const ADAPTERS: &[&str] = &["claude", "anthropic", "gpt", "openai", "custom", "http"];
/// The longest role and instructions, in characters.
const ROLE_CHARS_MAX: usize = 64;
const INSTRUCTIONS_CHARS_MAX: usize = 20_000;
/// The longest name of a model, in characters.
const MODEL_CHARS_MAX: usize = 200;
/// Seconds between heartbeats when nothing else is said.
const HEARTBEAT_INTERVAL_S: i64 = 300;
/// What a filter by status may name.
const STATUSES: &[&str] = &["initializing", "active", "paused", "errored"];

fn statuses() -> utoipa::openapi::schema::Object {
    openapi::names(STATUSES)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::AgentsWrite, 3, routes!(add))
        .with(Scope::AgentsRead, 1, routes!(list))
        .with(Scope::AgentsRead, 1, routes!(one))
        .with(Scope::AgentsWrite, 2, routes!(update))
        .with(Scope::AgentsWrite, 1, routes!(remove))
        .with(Scope::AgentsWrite, 2, routes!(wake))
        .with(Scope::AgentsWrite, 2, routes!(pause))
        .with(Scope::AgentsWrite, 2, routes!(kill))
        .with(Scope::AgentsWrite, 2, routes!(resume))
}

fn adapters() -> utoipa::openapi::schema::Object {
    let mut schema = openapi::names(ADAPTERS);
    schema.description = Some("`anthropic`, `openai` and `http` mean `claude`, `gpt` and `custom`.".into());
    schema
}

/// An agent to be.
#[derive(Debug, Clone, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct AgentBody {
    /// Its address within the company, e.g. `researcher`.
    #[schema(min_length = 1, max_length = 64, pattern = "^[A-Za-z0-9_-]+$")]
    pub role: String,
    /// `claude`, `gpt` or `custom`; `anthropic`, `openai` and `http` mean the same.
    #[schema(schema_with = adapters)]
    pub adapter: String,
    /// How it behaves. A built-in role or a template brings its own.
    #[schema(min_length = 1, max_length = 20_000)]
    pub instructions: Option<String>,
    /// Which model, e.g. `claude-sonnet-4-6`.
    #[schema(min_length = 1, max_length = 200)]
    pub model: Option<String>,
    /// Credits a month.
    #[schema(minimum = 0)]
    pub budget: Option<i64>,
    /// `heartbeat_interval` (seconds), `budget_limit_daily` (USD), `tools`
    /// (names), and what its adapter takes, e.g. `endpoint`.
    pub config: Option<Map<String, Value>>,
}

impl AgentBody {
    /// One that a template brings.
    pub fn brought(role: &str, instructions: &str) -> Self {
        Self {
            role: role.to_owned(),
            adapter: "claude".to_owned(),
            instructions: Some(instructions.to_owned()),
            model: None,
            budget: None,
            config: None,
        }
    }

    /// Everything wrong with it. In the catalog's form instructions may be
    /// left out, as the template brings them.
    pub fn problems_at(&self, path: &str, with_defaults: bool) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        let at = |field: &str| if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
        let mut wrong = |field: &str, message: String| problems.push(FieldProblem::new(at(field), message));
        let role_ok = self.role.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        if self.role.is_empty() || self.role.len() > ROLE_CHARS_MAX || !role_ok || self.role.starts_with("ag_") {
            wrong(
                "role",
                format!("must be 1 to {ROLE_CHARS_MAX} letters, digits, `_` or `-`, not beginning with `ag_`"),
            );
        }
        if !ADAPTERS.contains(&self.adapter.as_str()) {
            let near = capx_core::domain::playbook::problem::did_you_mean(&self.adapter, ADAPTERS.iter().copied());
            let near = near.map(|hint| format!("; {hint}")).unwrap_or_default();
            wrong("adapter", format!("unknown adapter `{}`; use one of {}{near}", self.adapter, ADAPTERS.join(", ")));
        }
        match &self.instructions {
            Some(text) => problems
                .extend(instructions_problem(text).map(|message| FieldProblem::new(at("instructions"), message))),
            None if with_defaults || built_in(&self.role).is_some() => {}
            None => wrong("instructions", "is required".into()),
        }
        if self.model.as_deref().is_some_and(|model| model.is_empty() || model.chars().count() > MODEL_CHARS_MAX) {
            problems.push(FieldProblem::new(at("model"), format!("must be 1 to {MODEL_CHARS_MAX} characters")));
        }
        if self.budget.is_some_and(|budget| budget < 0) {
            problems.push(FieldProblem::new(at("budget"), "must be credits a month, 0 or more"));
        }
        if let Some(config) = &self.config {
            problems.extend(agent_config::problems(&at("config"), config));
        }
        problems
    }

    /// As the engine takes it, defaults filled in.
    pub fn into_new(self) -> NewAgent {
        let mut config = self.config.unwrap_or_default();
        if !config.contains_key("heartbeat") {
            config.entry("heartbeat_interval").or_insert_with(|| HEARTBEAT_INTERVAL_S.into());
        }
        let role = built_in(&self.role);
        let own = || {
            role.map_or_else(
                || format!("You are the {} of this company.", self.role),
                |role| role.instructions.to_owned(),
            )
        };
        let instructions = self.instructions.unwrap_or_else(own);
        NewAgent {
            agent: AgentId::new(),
            role: self.role,
            adapter: self.adapter,
            instructions,
            model: self.model,
            budget: self.budget,
            config: Value::Object(config),
        }
    }
}

fn instructions_problem(text: &str) -> Option<String> {
    let wrong = text.trim().is_empty() || text.chars().count() > INSTRUCTIONS_CHARS_MAX;
    wrong.then(|| format!("must be 1 to {INSTRUCTIONS_CHARS_MAX} characters"))
}

/// Changes of an agent; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UpdateAgentBody {
    /// How it behaves from its next heartbeat on.
    #[schema(min_length = 1, max_length = 20_000)]
    instructions: Option<String>,
    /// Which model.
    #[schema(min_length = 1, max_length = 200)]
    model: Option<String>,
    /// Credits a month.
    #[schema(minimum = 0)]
    budget: Option<i64>,
    /// Merged into the agent's.
    config: Option<Map<String, Value>>,
    /// Cannot be changed.
    role: Option<Value>,
    /// Cannot be changed.
    adapter: Option<Value>,
}

impl Check for AgentBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        self.problems_at("", false)
    }
}

impl Check for UpdateAgentBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        for (field, given) in [("role", &self.role), ("adapter", &self.adapter)] {
            if given.is_some() {
                problems.push(FieldProblem::new(field, "cannot be changed; add another agent and remove this one"));
            }
        }
        if let Some(message) = self.instructions.as_deref().and_then(instructions_problem) {
            problems.push(FieldProblem::new("instructions", message));
        }
        if self.model.as_deref().is_some_and(|model| model.is_empty() || model.chars().count() > MODEL_CHARS_MAX) {
            problems.push(FieldProblem::new("model", format!("must be 1 to {MODEL_CHARS_MAX} characters")));
        }
        if self.budget.is_some_and(|budget| budget < 0) {
            problems.push(FieldProblem::new("budget", "must be credits a month, 0 or more"));
        }
        if let Some(config) = &self.config {
            problems.extend(agent_config::problems("config", config));
        }
        problems
    }
}

/// An agent in a list.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct AgentItem {
    /// `ag_…`
    #[schema(value_type = String)]
    id: AgentId,
    /// Its address within the company.
    role: String,
    /// As sent.
    adapter: String,
    #[schema(required)]
    model: Option<String>,
    /// Credits a month.
    #[schema(required)]
    budget: Option<i64>,
    /// Credits of it that are used in this month.
    used: i64,
    /// `initializing`, `active`, `paused`, `errored` or `removed`.
    status: String,
    #[schema(required)]
    last_heartbeat: Option<Time>,
    /// All that it has spent, in USD.
    total_cost: f64,
    /// Why it is errored.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<String>,
    /// Why it is paused, where nobody has asked for it: its money is used up.
    #[serde(skip_serializing_if = "Option::is_none")]
    paused_reason: Option<String>,
    /// When it goes on by itself.
    #[serde(skip_serializing_if = "Option::is_none")]
    paused_until: Option<Time>,
}

impl AgentItem {
    fn new(row: AgentRow) -> Self {
        let (paused_reason, paused_until) = row.paused.map_or((None, None), |(reason, until)| (Some(reason), until));
        Self {
            id: row.agent,
            role: row.role,
            adapter: row.adapter,
            model: row.model,
            budget: row.budget,
            used: row.used.0 / CREDIT,
            status: row.status,
            last_heartbeat: row.last_heartbeat_at.map(Time),
            total_cost: row.cost.to_usd(),
            error: row.error,
            paused_reason,
            paused_until: paused_until.map(Time),
        }
    }

    /// One that has just been made.
    pub fn of_new(new: &NewAgent) -> Self {
        Self {
            id: new.agent,
            role: new.role.clone(),
            adapter: new.adapter.clone(),
            model: new.model.clone(),
            budget: new.budget,
            used: 0,
            status: "initializing".into(),
            last_heartbeat: None,
            total_cost: 0.0,
            error: None,
            paused_reason: None,
            paused_until: None,
        }
    }
}

/// An agent.
#[derive(Debug, Serialize, ToSchema)]
struct Agent {
    #[serde(flatten)]
    item: AgentItem,
    /// `co_…`
    #[schema(value_type = String)]
    company_id: CompanyId,
    instructions: String,
    /// As sent, merged by later changes.
    #[schema(value_type = Object)]
    config: Value,
    heartbeat_count: i64,
    created_at: Time,
    updated_at: Time,
}

impl Agent {
    fn new(row: AgentRow) -> Self {
        Self {
            company_id: row.company,
            instructions: row.instructions.clone(),
            config: row.config.clone(),
            heartbeat_count: row.heartbeat_count,
            created_at: Time(row.created_at),
            updated_at: Time(row.updated_at),
            item: AgentItem::new(row),
        }
    }
}

/// Add an agent
///
/// It initializes at once, and joins the company's heartbeat when it is ready.
#[utoipa::path(post, path = "/companies/{company}/agents", tag = "Agents", request_body = AgentBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 201, description = "The agent.", body = One<Agent>)))]
async fn add(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<AgentBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let new = body.into_new();
    let created_at = add_agent(command.tx(), company, &new).await?;
    let agent = Agent {
        item: AgentItem::of_new(&new),
        company_id: company,
        instructions: new.instructions,
        config: new.config,
        heartbeat_count: 0,
        created_at: Time(created_at),
        updated_at: Time(created_at),
    };
    command.wake();
    command.finish(StatusCode::CREATED, agent).await
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `active`, `paused`, `errored` or `initializing`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

/// List agents
///
/// Those that are not removed, newest first.
#[utoipa::path(get, path = "/companies/{company}/agents", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ListQuery),
    responses((status = 200, description = "A page.", body = Many<AgentItem>)))]
async fn list(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let limit = limit(query.limit, 25, 100)?;
    let filter = agents::AgentFilter {
        status: one_of("status", query.status.as_deref(), STATUSES)?,
        before: cursor(query.cursor.as_deref())?,
        ..agents::AgentFilter::default()
    };
    let mut rows = agents::agents(&mut *tx, company, filter, limit + 1).await?;
    usage::add_agent_totals(&mut tx, company, &mut rows).await?;
    caller.list(page(rows, limit, |row| id_cursor(row.agent.0), AgentItem::new))
}

/// An agent of a company by the id or the role in the path.
pub(super) async fn find(tx: &mut PgConnection, company: CompanyId, agent: &str) -> Result<AgentRow, ApiError> {
    let id: Option<AgentId> = agent.parse().ok();
    let role = if id.is_some() { None } else { Some(agent) };
    let filter = agents::AgentFilter { role, agent: id, ..agents::AgentFilter::default() };
    let mut rows = agents::agents(&mut *tx, company, filter, 1).await?;
    usage::add_agent_totals(tx, company, &mut rows).await?;
    rows.pop().ok_or(ApiError::NotFound("agent"))
}

/// One that can still be told what to do.
async fn find_live(tx: &mut PgConnection, company: CompanyId, agent: &str) -> Result<AgentRow, ApiError> {
    let row = find(tx, company, agent).await?;
    if row.status == "removed" {
        return Err(ApiError::Conflict("the agent was removed; what it did can still be read".into()));
    }
    Ok(row)
}

/// Get an agent
///
/// By its id or its role.
#[utoipa::path(get, path = "/companies/{company}/agents/{agent}", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "The agent.", body = One<Agent>), (status = 304, description = "Not changed.")))]
async fn one(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    caller.one(&Agent::new(find(&mut tx, company, &agent).await?))
}

/// Update an agent
///
/// From its next heartbeat on; its memory stays. Role and adapter cannot change.
#[utoipa::path(patch, path = "/companies/{company}/agents/{agent}", tag = "Agents", request_body = UpdateAgentBody,
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "The agent.", body = One<Agent>)))]
async fn update(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Body { body, digest }: Body<UpdateAgentBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let row = find_live(command.tx(), company, &agent).await?;
    let changes = agents::AgentChanges {
        instructions: body.instructions.as_deref(),
        model: body.model.as_deref(),
        budget: body.budget,
        config: body.config.map(Value::Object),
    };
    agents::update_agent(command.tx(), company, row.agent, &changes).await?;
    let told =
        json!({"agent_id": row.agent, "config": changes.config, "budget": changes.budget, "model": changes.model});
    command.audit(company, "agent.changed", told).await?;
    // It may have more to spend now.
    engine::reconsider(command.tx(), company, Some(row.agent), false).await?;
    command.wake();
    let row = find(command.tx(), company, &row.agent.to_string()).await?;
    command.finish(StatusCode::OK, Agent::new(row)).await
}

/// Remove an agent
///
/// It finishes its current cycle; its history and costs stay.
#[utoipa::path(delete, path = "/companies/{company}/agents/{agent}", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "It is removed.", body = One<Deleted<String>>)))]
async fn remove(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let id = find(command.tx(), company, &agent).await?.agent;
    engine::change(command.tx(), company, id, engine::Change::Remove).await?;
    command.audit(company, "agent.removed", json!({"agent_id": id})).await?;
    command.finish(StatusCode::OK, Deleted { id, deleted: true }).await
}

/// An agent that was woken.
#[derive(Debug, Serialize, ToSchema)]
struct Woken {
    #[schema(value_type = String)]
    id: AgentId,
    /// Its status.
    status: String,
    /// Always true: the cycle that was asked for, or one that is under way.
    wake_triggered: bool,
    heartbeat_started_at: Time,
}

/// Wake an agent
///
/// A heartbeat at once, outside of its schedule. In the middle of one nothing
/// more is queued.
#[utoipa::path(post, path = "/companies/{company}/agents/{agent}/wake", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "It beats.", body = One<Woken>)))]
async fn wake(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_row(command.tx(), &company).await?;
    let row = find_live(command.tx(), company.company, &agent).await?;
    let at = engine::wake(command.tx(), &company.status, &row).await?;
    command.wake();
    let woken = Woken { id: row.agent, status: row.status, wake_triggered: true, heartbeat_started_at: Time(at) };
    command.finish(StatusCode::OK, woken).await
}

/// An agent whose status changed.
#[derive(Debug, Serialize, ToSchema)]
struct AgentStatus {
    #[schema(value_type = String)]
    id: AgentId,
    role: String,
    /// Its status now.
    status: &'static str,
    updated_at: Time,
}

/// Changes an agent's status, and says to what; the change is in the audit log under its name.
async fn change(
    state: &crate::api::ApiState,
    caller: &Caller,
    (company, agent): (String, String),
    (digest, reason): ([u8; 32], Option<&str>),
    (change, audited, status): (engine::Change, &'static str, &'static str),
) -> Result<Response, ApiError> {
    let mut command = caller.command(state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let row = find_live(command.tx(), company, &agent).await?;
    let at = engine::change(command.tx(), company, row.agent, change).await?;
    command.audit(company, audited, json!({"agent_id": row.agent, "reason": reason})).await?;
    let paused = ("agent", row.agent.0);
    if change == engine::Change::Resume {
        pauses::clear(command.tx(), company, paused).await?;
        command.wake();
    } else {
        pauses::set(command.tx(), company, paused, &caller.key.to_string(), reason).await?;
    }
    let shown = AgentStatus { id: row.agent, role: row.role, status, updated_at: Time(at) };
    command.finish(StatusCode::OK, shown).await
}

/// Pause an agent
///
/// It finishes its current cycle and keeps its state.
#[utoipa::path(post, path = "/companies/{company}/agents/{agent}/pause", tag = "Agents", request_body = PauseBody,
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "It is paused.", body = One<AgentStatus>)))]
async fn pause(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { body, digest }: Body<PauseBody>,
) -> Result<Response, ApiError> {
    change(&state, &caller, path, (digest, body.reason.as_deref()), (engine::Change::Pause, "agent.paused", "paused"))
        .await
}

/// Kill switch of an agent
///
/// It stops at once, in the middle of what it does; its state is kept, and `resume` lifts it.
#[utoipa::path(post, path = "/companies/{company}/agents/{agent}/kill", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "It is paused.", body = One<AgentStatus>)))]
async fn kill(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    change(&state, &caller, path, (digest, None), (engine::Change::Kill, "agent.killed", "paused")).await
}

/// Resume an agent
///
/// One that is paused, or errored for a reason that is mended.
#[utoipa::path(post, path = "/companies/{company}/agents/{agent}/resume", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "It goes on.", body = One<AgentStatus>)))]
async fn resume(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    change(&state, &caller, path, (digest, None), (engine::Change::Resume, "agent.resumed", "active")).await
}

#[cfg(test)]
mod tests {
    use super::*;
    use capx_workers::adapters::{NAMES, Providers};

    #[test]
    fn every_adapter_is_one_that_workers_know() {
        assert_eq!(ADAPTERS, NAMES);
        assert!(NAMES.iter().all(|name| Providers::offline().adapter(name).is_ok()));
    }
}
