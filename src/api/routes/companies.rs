//! Companies: create, list, get.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use capx_core::domain::ids::{AccountId, CompanyId};
use capx_core::engine::FieldProblem;
use capx_core::engine::tenants::{CreateCompany, create_company};
use capx_core::store::tenants::{self, CompanyRow};
use chrono::{DateTime, Utc};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Routes;
use super::agents::{AgentBody, new_agent_summary};
use crate::api::auth::{Caller, CompaniesRead, CompaniesWrite};
use crate::api::body::{Body, Params, Path, limit};
use crate::api::reply::{cursor, page, time};
use crate::api::{ApiError, Shared};

/// The longest name of a company, in characters.
const NAME_CHARS_MAX: usize = 200;
/// The most agents of one request.
const AGENTS_MAX: usize = 100;
const STATUSES: &[&str] = &["running", "paused", "provisioning", "stopped"];
const TEMPLATES: &[&str] = &["default", "research", "content", "support", "saas-agency"];

pub(in crate::api) fn routes() -> Routes {
    Routes::new().route("/companies", get(list).post(create)).route("/companies/{company}", get(one))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateBody {
    name: String,
    description: Option<String>,
    config: Option<Map<String, Value>>,
    template: Option<String>,
    governance: Option<Value>,
    #[serde(default)]
    agents: Vec<AgentBody>,
}

impl CreateBody {
    fn check(&self) -> Result<(), ApiError> {
        let mut problems = Vec::new();
        if self.name.trim().is_empty() || self.name.chars().count() > NAME_CHARS_MAX {
            problems.push(FieldProblem::new("name", format!("must be 1 to {NAME_CHARS_MAX} characters")));
        }
        if let Some(template) = self.template.as_deref()
            && !TEMPLATES.contains(&template)
        {
            problems.push(FieldProblem::new("template", format!("unknown; use one of {}", TEMPLATES.join(", "))));
        }
        if self.agents.is_empty() {
            problems.push(FieldProblem::new("agents", "at least one agent is required"));
        }
        if self.agents.len() > AGENTS_MAX {
            problems.push(FieldProblem::new("agents", format!("at most {AGENTS_MAX} in one request")));
        }
        let mut roles = std::collections::HashSet::new();
        for (at, agent) in self.agents.iter().enumerate() {
            let with_defaults = self.template.is_some() || self.governance.is_some();
            problems.extend(agent.problems(&format!("agents.{at}"), with_defaults));
            if !roles.insert(agent.role.as_str()) {
                problems.push(FieldProblem::new(format!("agents.{at}.role"), "another agent has this role already"));
            }
        }
        if let Some(config) = &self.config {
            problems.extend(config_problems(config));
        }
        if problems.is_empty() { Ok(()) } else { Err(ApiError::fields(problems)) }
    }
}

fn config_problems(config: &Map<String, Value>) -> Vec<FieldProblem> {
    let mut problems = Vec::new();
    if let Some(zone) = config.get("timezone") {
        let known = zone.as_str().is_some_and(|name| jiff::tz::TimeZone::get(name).is_ok());
        if !known {
            problems.push(FieldProblem::new("config.timezone", "must be an IANA time zone such as America/New_York"));
        }
    }
    if let Some(limit) = config.get("budget_limit_daily")
        && !limit.as_f64().is_some_and(|usd| usd >= 0.0)
    {
        problems.push(FieldProblem::new("config.budget_limit_daily", "must be an amount in USD, 0 or more"));
    }
    if let Some(Value::String(mode)) = config.get("governance")
        && !["human_in_loop", "autonomous"].contains(&mode.as_str())
    {
        problems.push(FieldProblem::new("config.governance", "must be human_in_loop or autonomous"));
    }
    problems
}

async fn create(
    State(state): Shared,
    caller: Caller<CompaniesWrite>,
    Body(body): Body<CreateBody>,
) -> Result<Response, ApiError> {
    body.check()?;
    if caller.company.is_some() {
        return Err(ApiError::Conflict(
            "this key is bound to one company; create companies with a key of the account".into(),
        ));
    }
    let request = CreateCompany {
        name: body.name.trim().to_owned(),
        description: body.description,
        config: body.config.map_or_else(|| json!({}), Value::Object),
        governance: body.governance,
        template: body.template,
        agents: body.agents.into_iter().map(AgentBody::into_new).collect(),
    };
    let (company, created_at) = create_company(&state.engine, caller.account, &request).await?;
    let data = show_new(company, caller.account, request, created_at);
    caller.reply(&state, StatusCode::CREATED, 5, data).await
}

/// A company as it was made, from what was sent: read back, it could be told
/// as an error though it exists, and would be made twice.
fn show_new(company: CompanyId, account: AccountId, request: CreateCompany, created_at: DateTime<Utc>) -> Value {
    let agents: Vec<Value> = request.agents.iter().map(new_agent_summary).collect();
    let mut data = show(&CompanyRow {
        company,
        account,
        name: request.name,
        description: request.description,
        status: "provisioning".into(),
        config: request.config,
        governance: request.governance,
        agent_count: i64::try_from(agents.len()).unwrap_or(i64::MAX),
        created_at,
        updated_at: created_at,
    });
    data["agents"] = agents.into();
    data
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
    caller: Caller<CompaniesRead>,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    let limit = limit(params.limit, 25, 100)?;
    if let Some(status) = params.status.as_deref()
        && !STATUSES.contains(&status)
    {
        return Err(ApiError::field("status", format!("must be one of {}", STATUSES.join(", "))));
    }
    let before = cursor(params.cursor.as_deref())?;
    let rows = tenants::companies(
        &state.engine.pool,
        caller.account,
        caller.company,
        params.status.as_deref(),
        before,
        limit + 1,
    )
    .await?;
    let page = page(
        rows,
        limit,
        |row| row.company.0,
        |row| {
            json!({
                "id": row.company, "name": row.name, "status": row.status, "agent_count": row.agent_count,
                "created_at": time(row.created_at),
            })
        },
    );
    caller.list(&state, page).await
}

async fn one(
    State(state): Shared,
    caller: Caller<CompaniesRead>,
    Path(company): Path<String>,
) -> Result<Response, ApiError> {
    let row = caller.company(&state, &company).await?;
    let cost = capx_core::store::runs::company_cost(&state.engine.pool, row.company).await?;
    let mut data = show(&row);
    data["total_cost"] = cost.to_usd().into();
    caller.reply(&state, StatusCode::OK, 1, data).await
}

fn show(row: &CompanyRow) -> Value {
    json!({
        "id": row.company, "name": row.name, "description": row.description, "status": row.status,
        "config": row.config, "governance": row.governance, "agent_count": row.agent_count,
        "url": format!("{}.capx.ai", slug(&row.name)),
        "created_at": time(row.created_at), "updated_at": time(row.updated_at),
    })
}

fn slug(name: &str) -> String {
    let words = name.to_lowercase();
    let words = words.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-")
}
