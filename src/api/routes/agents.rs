//! Agents: add, list, get.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use capx_core::domain::ids::AgentId;
use capx_core::engine::FieldProblem;
use capx_core::engine::tenants::add_agent;
use capx_core::store::tenants::{self, AgentRow, NewAgent};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Routes;
use crate::api::auth::{AgentsRead, AgentsWrite, Caller};
use crate::api::body::{Body, Params, Path, limit};
use crate::api::reply::{cursor, page, time};
use crate::api::{ApiError, Shared};

/// The adapters that an agent may have. Workers know them too: the two meet
/// in the database only, and a test compares them.
const ADAPTERS: &[&str] = &["claude", "anthropic", "gpt", "openai", "custom", "http"];
/// The roles that bring their own instructions.
const BUILT_IN_ROLES: &[&str] = &["strategist", "engineer", "marketer", "support", "designer"];
/// The longest role and instructions, in characters.
const ROLE_CHARS_MAX: usize = 64;
const INSTRUCTIONS_CHARS_MAX: usize = 20_000;
/// Seconds between heartbeats when nothing else is said.
const HEARTBEAT_INTERVAL_S: i64 = 300;

pub(in crate::api) fn routes() -> Routes {
    Routes::new()
        .route("/companies/{company}/agents", get(list).post(add))
        .route("/companies/{company}/agents/{agent}", get(one))
}

/// An agent as requests describe it.
#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct AgentBody {
    pub role: String,
    adapter: String,
    instructions: Option<String>,
    model: Option<String>,
    budget: Option<i64>,
    config: Option<Map<String, Value>>,
}

impl AgentBody {
    /// Everything wrong with it. In the catalog's form instructions may be
    /// left out, as the template brings them.
    pub fn problems(&self, path: &str, with_defaults: bool) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        let mut wrong = |field: &str, message: String| {
            let field = if path.is_empty() { field.to_owned() } else { format!("{path}.{field}") };
            problems.push(FieldProblem::new(field, message));
        };
        let role_ok = self.role.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '-'));
        if self.role.is_empty() || self.role.len() > ROLE_CHARS_MAX || !role_ok || self.role.starts_with("ag_") {
            wrong(
                "role",
                format!("must be 1 to {ROLE_CHARS_MAX} letters, digits, `_` or `-`, not beginning with `ag_`"),
            );
        }
        if !ADAPTERS.contains(&self.adapter.as_str()) {
            wrong("adapter", format!("unknown adapter `{}`; use one of {}", self.adapter, ADAPTERS.join(", ")));
        }
        match self.instructions.as_deref().map(str::trim) {
            Some(text) if !text.is_empty() && text.chars().count() <= INSTRUCTIONS_CHARS_MAX => {}
            Some(_) => wrong("instructions", format!("must be 1 to {INSTRUCTIONS_CHARS_MAX} characters")),
            None if with_defaults || BUILT_IN_ROLES.contains(&self.role.as_str()) => {}
            None => wrong("instructions", "is required".into()),
        }
        if self.budget.is_some_and(|budget| budget < 0) {
            wrong("budget", "must be credits a month, 0 or more".into());
        }
        let config = self.config.iter().flatten();
        for (name, value) in config {
            let fault = match name.as_str() {
                "heartbeat_interval" if value.as_i64().is_none_or(|s| s < 1) => "must be whole seconds, 1 or more",
                "budget_limit_daily" if value.as_f64().is_none_or(|usd| usd < 0.0) => {
                    "must be an amount in USD, 0 or more"
                }
                "tools" if !value.as_array().is_some_and(|tools| tools.iter().all(Value::is_string)) => {
                    "must be a list of names"
                }
                "endpoint" if !value.is_string() => "must be a URL",
                _ => continue,
            };
            wrong(&format!("config.{name}"), fault.into());
        }
        problems
    }

    /// As the engine takes it, defaults filled in.
    pub fn into_new(self) -> NewAgent {
        let mut config = self.config.unwrap_or_default();
        config.entry("heartbeat_interval").or_insert_with(|| HEARTBEAT_INTERVAL_S.into());
        let instructions = self.instructions.unwrap_or_else(|| format!("You are the {} of this company.", self.role));
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

async fn add(
    State(state): Shared,
    caller: Caller<AgentsWrite>,
    Path(company): Path<String>,
    Body(body): Body<AgentBody>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?;
    let problems = body.problems("", false);
    if !problems.is_empty() {
        return Err(ApiError::fields(problems));
    }
    let new = body.into_new();
    let created_at = add_agent(&state.engine, company.company, &new).await?;
    let data = json!({
        "id": new.agent, "company_id": company.company, "role": new.role, "adapter": new.adapter,
        "status": "initializing", "instructions": new.instructions, "model": new.model, "budget": new.budget,
        "config": new.config, "created_at": time(created_at),
    });
    caller.reply(&state, StatusCode::CREATED, 3, data).await
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
    caller: Caller<AgentsRead>,
    Path(company): Path<String>,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?;
    let limit = limit(params.limit, 25, 100)?;
    let statuses = ["initializing", "active", "paused", "errored"];
    if let Some(status) = params.status.as_deref()
        && !statuses.contains(&status)
    {
        return Err(ApiError::field("status", format!("must be one of {}", statuses.join(", "))));
    }
    let after = cursor(params.cursor.as_deref())?;
    let rows =
        tenants::agents(&state.engine.pool, company.company, None, None, params.status.as_deref(), after, limit + 1)
            .await?;
    let page = page(rows, limit, |row| row.agent.0, |row| agent_summary(&row));
    caller.list(&state, page).await
}

async fn one(
    State(state): Shared,
    caller: Caller<AgentsRead>,
    Path((company, agent)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?;
    let id: Option<AgentId> = agent.parse().ok();
    let role = if id.is_some() { None } else { Some(agent.as_str()) };
    let row = tenants::agents(&state.engine.pool, company.company, role, id, None, None, 1)
        .await?
        .pop()
        .ok_or(ApiError::NotFound("agent"))?;
    let mut data = agent_summary(&row);
    data["company_id"] = json!(row.company);
    data["instructions"] = row.instructions.into();
    data["config"] = row.config;
    data["heartbeat_count"] = 0.into();
    data["created_at"] = time(row.created_at).into();
    data["updated_at"] = time(row.updated_at).into();
    caller.reply(&state, StatusCode::OK, 1, data).await
}

/// An agent in a list.
fn agent_summary(row: &AgentRow) -> Value {
    let mut data = json!({
        "id": row.agent, "role": row.role, "adapter": row.adapter, "model": row.model, "budget": row.budget,
        "used": 0, "status": row.status, "last_heartbeat": null, "total_cost": 0.0,
    });
    if let Some(error) = &row.error {
        data["error"] = error.clone().into();
    }
    data
}

/// The same of one that has just been made.
pub(super) fn new_agent_summary(new: &NewAgent) -> Value {
    json!({
        "id": new.agent, "role": new.role, "adapter": new.adapter, "model": new.model, "budget": new.budget,
        "used": 0, "status": "initializing", "last_heartbeat": null, "total_cost": 0.0,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use capx_workers::adapters::Adapter;

    #[test]
    fn every_adapter_is_one_that_workers_know() {
        assert!(ADAPTERS.iter().all(|name| Adapter::from_name(name).is_some()));
        assert!(Adapter::NAMES.iter().all(|name| ADAPTERS.contains(name)));
    }
}
