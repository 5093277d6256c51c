//! Companies: create, list, get, change, pause, resume, stop, delete.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::governance;
use capx_core::domain::ids::{AccountId, CompanyId};
use capx_core::engine::FieldProblem;
use capx_core::engine::agents::reconsider;
use capx_core::engine::lifecycle::{self, Change};
use capx_core::engine::tenants::{CreateCompany, create_company_in};
use capx_core::store::pauses;
use capx_core::store::tenants::{self, CompanyRow};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::agents::{AgentBody, AgentItem};
use super::pauses::PauseBody;
use super::templates;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit, one_of};
use crate::api::reply::{Many, One, Time, cursor, id_cursor, page};
use crate::api::{ApiError, Shared, openapi};

/// The longest name of a company, in characters.
const NAME_CHARS_MAX: usize = 200;
/// The longest description, in characters.
const DESCRIPTION_CHARS_MAX: usize = 10_000;
/// The most agents of one request.
const AGENTS_MAX: usize = 100;
/// What a filter by status may name.
const STATUSES: &[&str] = &["running", "paused", "provisioning", "stopped"];
/// What `config` may hold.
const CONFIG_KEYS: &[&str] = &["governance", "budget_limit_daily", "timezone"];
/// What a policy may hold, in any of its documented forms.
fn statuses() -> utoipa::openapi::schema::Object {
    openapi::names(STATUSES)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::CompaniesRead, 1, routes!(list))
        .with(Scope::CompaniesWrite, 5, routes!(create))
        .with(Scope::CompaniesRead, 1, routes!(one))
        .with(Scope::CompaniesWrite, 2, routes!(update))
        .with(Scope::CompaniesWrite, 1, routes!(delete))
        .with(Scope::CompaniesWrite, 2, routes!(pause))
        .with(Scope::CompaniesWrite, 2, routes!(resume))
        .with(Scope::CompaniesWrite, 2, routes!(stop))
        .with(Scope::CompaniesWrite, 2, routes!(kill))
}

/// A company to be, from a template, from agents, or from both.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateCompanyBody {
    /// Display name.
    #[schema(min_length = 1, max_length = 200)]
    name: String,
    /// What the company does.
    #[schema(max_length = 10_000)]
    description: Option<String>,
    /// `governance` (`human_in_loop` or `autonomous`), `budget_limit_daily`
    /// (USD), `timezone` (IANA).
    config: Option<Map<String, Value>>,
    /// `default`, `research`, `content`, `support` or `saas-agency`: brings
    /// agents, which those given here overlay by role.
    template: Option<String>,
    /// The policy: a mode, or an object such as
    /// `{"spend_cap": 500, "approval_required": ["publish"], "kill_switch": true}`.
    governance: Option<Value>,
    /// At least one, unless a template brings some.
    #[serde(default)]
    #[schema(max_items = 100)]
    agents: Vec<AgentBody>,
}

/// Changes of a company; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UpdateCompanyBody {
    /// Display name.
    #[schema(min_length = 1, max_length = 200)]
    name: Option<String>,
    /// What the company does.
    #[schema(max_length = 10_000)]
    description: Option<String>,
    /// Merged into the company's: `governance`, `budget_limit_daily`, `timezone`.
    config: Option<Map<String, Value>>,
    /// The policy, in the place of what it was; null takes it away.
    #[serde(default, deserialize_with = "given")]
    #[schema(value_type = Option<Object>)]
    governance: Option<Value>,
}

/// What is there, be it null.
fn given<'de, D: serde::Deserializer<'de>>(deserializer: D) -> Result<Option<Value>, D::Error> {
    Value::deserialize(deserializer).map(Some)
}

/// A company in a list.
#[derive(Debug, Serialize, ToSchema)]
struct CompanyItem {
    /// `co_…`
    #[schema(value_type = String)]
    id: CompanyId,
    name: String,
    /// `provisioning`, `running`, `paused` or `stopped`.
    status: String,
    /// Agents that are not removed.
    agent_count: i64,
    created_at: Time,
}

/// A company.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Company {
    /// `co_…`
    #[schema(value_type = String)]
    id: CompanyId,
    name: String,
    #[schema(required)]
    description: Option<String>,
    /// `provisioning`, `running`, `paused` or `stopped`.
    status: String,
    /// As sent, merged by later changes.
    #[schema(value_type = Object)]
    config: Value,
    /// The policy as sent.
    #[schema(required)]
    governance: Option<Value>,
    /// Agents that are not removed.
    agent_count: i64,
    /// The agents, where the company has just been made.
    #[serde(skip_serializing_if = "Option::is_none")]
    agents: Option<Vec<AgentItem>>,
    /// All that was spent, in USD; where one company is asked for.
    #[serde(skip_serializing_if = "Option::is_none")]
    total_cost: Option<f64>,
    /// The company's address.
    url: String,
    created_at: Time,
    updated_at: Time,
}

impl Company {
    fn new(row: CompanyRow) -> Self {
        Self {
            id: row.company,
            url: format!("{}.capx.ai", slug(&row.name)),
            name: row.name,
            description: row.description,
            status: row.status,
            config: row.config,
            governance: row.governance,
            agent_count: row.agent_count,
            agents: None,
            total_cost: None,
            created_at: Time(row.created_at),
            updated_at: Time(row.updated_at),
        }
    }
}

/// A company that was paused.
#[derive(Debug, Serialize, ToSchema)]
struct Paused {
    #[schema(value_type = String)]
    id: CompanyId,
    /// `paused`
    status: &'static str,
    paused_at: Time,
}

/// A company that goes on.
#[derive(Debug, Serialize, ToSchema)]
struct Resumed {
    #[schema(value_type = String)]
    id: CompanyId,
    /// `running`
    status: &'static str,
    resumed_at: Time,
}

/// A company that was stopped for good.
#[derive(Debug, Serialize, ToSchema)]
struct Stopped {
    #[schema(value_type = String)]
    id: CompanyId,
    /// `stopped`
    status: &'static str,
    stopped_at: Time,
}

/// Something that was deleted.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Deleted<T> {
    #[schema(value_type = String)]
    pub id: T,
    /// Always true.
    pub deleted: bool,
}

fn slug(name: &str) -> String {
    let words = name.to_lowercase();
    let words = words.split(|c: char| !c.is_ascii_alphanumeric()).filter(|word| !word.is_empty());
    words.collect::<Vec<_>>().join("-")
}

fn check_name(name: &str, problems: &mut Vec<FieldProblem>) {
    if name.trim().is_empty() || name.chars().count() > NAME_CHARS_MAX {
        problems.push(FieldProblem::new("name", format!("must be 1 to {NAME_CHARS_MAX} characters")));
    }
}

fn check_description(description: Option<&str>, problems: &mut Vec<FieldProblem>) {
    if description.is_some_and(|text| text.chars().count() > DESCRIPTION_CHARS_MAX) {
        let message = format!("must be at most {DESCRIPTION_CHARS_MAX} characters");
        problems.push(FieldProblem::new("description", message));
    }
}

fn check_keys(path: &str, given: &Map<String, Value>, known: &[&str], problems: &mut Vec<FieldProblem>) {
    for name in given.keys().filter(|name| !known.contains(&name.as_str())) {
        let hint = capx_core::domain::playbook::problem::did_you_mean(name, known.iter().copied())
            .unwrap_or_else(|| format!("it takes {}", known.join(", ")));
        problems.push(FieldProblem::new(format!("{path}.{name}"), format!("unknown field; {hint}")));
    }
}

fn check_config(config: &Map<String, Value>, problems: &mut Vec<FieldProblem>) {
    check_keys("config", config, CONFIG_KEYS, problems);
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
    if let Some(policy) = config.get("governance") {
        check_governance("config.governance", policy, problems);
    }
}

fn check_governance(path: &str, policy: &Value, problems: &mut Vec<FieldProblem>) {
    let found = governance::check::problems(path, policy);
    problems.extend(found.into_iter().map(|(field, message)| FieldProblem::new(field, message)));
}

impl Check for CreateCompanyBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        check_name(&self.name, &mut problems);
        check_description(self.description.as_deref(), &mut problems);
        let template = self.template.as_deref();
        if let Some(name) = template
            && templates::agents(name).is_none()
        {
            let message = format!("unknown; use one of {}", templates::NAMES.join(", "));
            problems.push(FieldProblem::new("template", message));
        }
        if self.agents.is_empty() && template.is_none() {
            problems
                .push(FieldProblem::new("agents", "at least one agent is required, or a `template` that brings some"));
        }
        if self.agents.len() > AGENTS_MAX {
            problems.push(FieldProblem::new("agents", format!("at most {AGENTS_MAX} in one request")));
        }
        let mut roles = std::collections::HashSet::new();
        for (at, agent) in self.agents.iter().take(AGENTS_MAX).enumerate() {
            let with_defaults = template.is_some() || self.governance.is_some();
            problems.extend(agent.problems_at(&format!("agents.{at}"), with_defaults));
            if !roles.insert(agent.role.as_str()) {
                problems.push(FieldProblem::new(format!("agents.{at}.role"), "another agent has this role already"));
            }
        }
        if let Some(config) = &self.config {
            check_config(config, &mut problems);
        }
        if let Some(policy) = &self.governance {
            check_governance("governance", policy, &mut problems);
        }
        problems
    }
}

impl Check for UpdateCompanyBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        if let Some(name) = &self.name {
            check_name(name, &mut problems);
        }
        check_description(self.description.as_deref(), &mut problems);
        if let Some(config) = &self.config {
            check_config(config, &mut problems);
        }
        if let Some(policy) = self.governance.as_ref().filter(|policy| !policy.is_null()) {
            check_governance("governance", policy, &mut problems);
        }
        problems
    }
}

impl CreateCompanyBody {
    fn into_request(self) -> CreateCompany {
        let mut agents = self.agents;
        for brought in self.template.as_deref().and_then(templates::agents).unwrap_or_default() {
            match agents.iter_mut().find(|agent| agent.role == brought.role) {
                Some(given) => given.instructions = given.instructions.take().or(brought.instructions),
                None => agents.push(brought),
            }
        }
        CreateCompany {
            name: self.name.trim().to_owned(),
            description: self.description,
            config: self.config.map_or_else(|| Value::Object(Map::new()), Value::Object),
            governance: self.governance,
            template: self.template,
            agents: agents.into_iter().map(AgentBody::into_new).collect(),
        }
    }
}

/// Create a company
///
/// It begins in `provisioning` and is `running` once its agents are initialized.
#[utoipa::path(post, path = "/companies", tag = "Companies", request_body = CreateCompanyBody,
    responses((status = 201, description = "The company.", body = One<Company>)))]
async fn create(
    State(state): Shared,
    caller: Caller,
    Body { body, digest }: Body<CreateCompanyBody>,
) -> Result<Response, ApiError> {
    if caller.company.is_some() {
        return Err(ApiError::Conflict(
            "this key is bound to one company; create companies with a key of the account".into(),
        ));
    }
    let mut command = caller.command(&state, digest).await?;
    let request = body.into_request();
    let (company, created_at) = create_company_in(command.tx(), caller.account, &request).await?;
    command.wake();
    command.finish(StatusCode::CREATED, new_company(company, caller.account, request, created_at)).await
}

fn new_company(company: CompanyId, account: AccountId, request: CreateCompany, created_at: DateTime<Utc>) -> Company {
    let agents: Vec<AgentItem> = request.agents.iter().map(AgentItem::of_new).collect();
    let mut shown = Company::new(CompanyRow {
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
    shown.agents = Some(agents);
    shown
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `running`, `paused`, `provisioning` or `stopped`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

/// List companies
///
/// Those that the key may see, newest first.
#[utoipa::path(get, path = "/companies", tag = "Companies", params(ListQuery),
    responses((status = 200, description = "A page.", body = Many<CompanyItem>)))]
async fn list(State(state): Shared, caller: Caller, Query(query): Query<ListQuery>) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let status = one_of("status", query.status.as_deref(), STATUSES)?;
    let before = cursor(query.cursor.as_deref())?;
    let mut tx = caller.read(&state).await?;
    let rows = tenants::companies(&mut *tx, caller.account, caller.company, status, before, limit + 1).await?;
    let page = page(
        rows,
        limit,
        |row| id_cursor(row.company.0),
        |row| CompanyItem {
            id: row.company,
            name: row.name,
            status: row.status,
            agent_count: row.agent_count,
            created_at: Time(row.created_at),
        },
    );
    caller.list(page)
}

/// Get a company
#[utoipa::path(get, path = "/companies/{company}", tag = "Companies", params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "The company.", body = One<Company>), (status = 304, description = "Not changed.")))]
async fn one(State(state): Shared, caller: Caller, Path(company): Path<String>) -> Result<Response, ApiError> {
    let mut tx = caller.look_up(&state).await?;
    let company: CompanyId = company.parse().map_err(|_| ApiError::NotFound("company"))?;
    let (row, cost) = tenants::company_with_cost(&mut tx, caller.account, caller.company, company)
        .await?
        .ok_or(ApiError::NotFound("company"))?;
    let mut shown = Company::new(row);
    shown.total_cost = Some(cost.to_usd());
    caller.one(&shown)
}

/// Update a company
///
/// Only what is given changes; `config` is merged. A changed governance mode
/// takes effect at the next heartbeat cycle.
#[utoipa::path(patch, path = "/companies/{company}", tag = "Companies", request_body = UpdateCompanyBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "The company.", body = One<Company>)))]
async fn update(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<UpdateCompanyBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let config = body.config.map(Value::Object);
    let name = body.name.as_deref().map(str::trim);
    let governance = body.governance.as_ref();
    tenants::update_company(command.tx(), company, (name, body.description.as_deref()), config.as_ref(), governance)
        .await?;
    command
        .audit(company, "company.changed", json!({"name": name, "config": config, "governance": governance}))
        .await?;
    // Its agents may have more to spend now.
    reconsider(command.tx(), company, None, false).await?;
    command.wake();
    let row = caller.company_row(command.tx(), &company.to_string()).await?;
    command.finish(StatusCode::OK, Company::new(row)).await
}

/// Delete a company
///
/// For good, with its agents, tasks, playbooks and runs. It must be paused or
/// stopped.
#[utoipa::path(delete, path = "/companies/{company}", tag = "Companies", params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "It is gone.", body = One<Deleted<String>>)))]
async fn delete(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let id = caller.company_id(command.tx(), &company).await?;
    lifecycle::delete(command.tx(), id).await?;
    command.finish(StatusCode::OK, Deleted { id, deleted: true }).await
}

/// Pause a company
///
/// Agents finish their current cycle; runs in flight wait; nothing new begins.
#[utoipa::path(post, path = "/companies/{company}/pause", tag = "Companies", request_body = PauseBody, params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "It is paused.", body = One<Paused>)))]
async fn pause(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<PauseBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let id = caller.company_id(command.tx(), &company).await?;
    let at = lifecycle::change(command.tx(), id, Change::Pause).await?;
    pauses::set(command.tx(), id, ("company", id.0), &caller.key.to_string(), body.reason.as_deref()).await?;
    command.audit(id, "company.paused", json!({"reason": body.reason})).await?;
    command.finish(StatusCode::OK, Paused { id, status: "paused", paused_at: Time(at) }).await
}

/// Resume a company
///
/// Agents beat again, schedules fire again, and runs go on where they were.
#[utoipa::path(post, path = "/companies/{company}/resume", tag = "Companies", params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "It is running.", body = One<Resumed>)))]
async fn resume(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let id = caller.company_id(command.tx(), &company).await?;
    let at = lifecycle::change(command.tx(), id, Change::Resume).await?;
    pauses::clear(command.tx(), id, ("company", id.0)).await?;
    command.audit(id, "company.resumed", json!({})).await?;
    command.wake();
    command.finish(StatusCode::OK, Resumed { id, status: "running", resumed_at: Time(at) }).await
}

/// Stop a company
///
/// For good: it can be read and deleted, and never runs again.
#[utoipa::path(post, path = "/companies/{company}/stop", tag = "Companies", params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "It is stopped.", body = One<Stopped>)))]
async fn stop(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let id = caller.company_id(command.tx(), &company).await?;
    let at = lifecycle::change(command.tx(), id, Change::Stop).await?;
    command.audit(id, "company.stopped", json!({})).await?;
    command.finish(StatusCode::OK, Stopped { id, status: "stopped", stopped_at: Time(at) }).await
}

/// Kill switch of a company
///
/// Nothing new begins from here on; the state is kept, and `resume` lifts it.
#[utoipa::path(post, path = "/companies/{company}/kill", tag = "Companies", params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "It is paused.", body = One<Paused>)))]
async fn kill(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let id = caller.company_id(command.tx(), &company).await?;
    let at = lifecycle::change(command.tx(), id, Change::Kill).await?;
    let by = caller.key.to_string();
    pauses::set(command.tx(), id, ("company", id.0), &by, Some("the kill switch")).await?;
    command.audit(id, "company.killed", json!({})).await?;
    command.finish(StatusCode::OK, Paused { id, status: "paused", paused_at: Time(at) }).await
}
