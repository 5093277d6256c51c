//! What agents remember, as their owners see and mend it.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{AgentId, CompanyId, RunId};
use capx_core::engine::FieldProblem;
use capx_core::engine::deeds::{self, KEY_CHARS_MAX};
use capx_core::store::memories::{self, Memory};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use super::Routes;
use super::companies::Deleted;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit};
use crate::api::reply::{Many, One, Time, page};
use crate::api::{ApiError, Shared};

/// The longest search, in characters.
const SEARCH_CHARS_MAX: usize = 500;

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::AgentsRead, 1, routes!(list))
        .with(Scope::AgentsRead, 1, routes!(list_of_company))
        .with(Scope::AgentsRead, 1, routes!(one))
        .with(Scope::AgentsWrite, 2, routes!(write))
        .with(Scope::AgentsWrite, 2, routes!(write_of_company))
        .with(Scope::AgentsWrite, 1, routes!(forget))
}

/// Something that is remembered.
#[derive(Debug, Serialize, ToSchema)]
struct Remembered {
    key: String,
    /// `agent` or `company`.
    scope: &'static str,
    value: Value,
    /// How often it was written.
    version: i32,
    /// Who has written it, where it was an agent.
    #[schema(required, value_type = Option<String>)]
    agent_id: Option<AgentId>,
    /// In which run.
    #[schema(required, value_type = Option<String>)]
    run_id: Option<RunId>,
    written_at: Time,
}

impl Remembered {
    fn new(memory: Memory, company: CompanyId) -> Self {
        Self {
            scope: if memory.owner == company.0 { "company" } else { "agent" },
            key: memory.key,
            value: memory.value.unwrap_or_default(),
            version: memory.version,
            agent_id: memory.agent,
            run_id: memory.run,
            written_at: Time(memory.written_at),
        }
    }
}

/// The same with what it was before.
#[derive(Debug, Serialize, ToSchema)]
struct History {
    #[serde(flatten)]
    current: Remembered,
    /// The last versions, the newest first.
    versions: Vec<Remembered>,
}

/// Something to be remembered.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RememberBody {
    /// By what name.
    #[schema(min_length = 1, max_length = 200)]
    key: String,
    /// What; at most 64 KiB.
    value: Value,
}

impl Check for RememberBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let wrong = self.key.trim().is_empty() || self.key.chars().count() > KEY_CHARS_MAX;
        let key = wrong.then(|| FieldProblem::new("key", format!("must be 1 to {KEY_CHARS_MAX} characters")));
        let value = self.value.is_null().then(|| FieldProblem::new("value", "must not be null; DELETE forgets it"));
        key.into_iter().chain(value).collect()
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct MemoryQuery {
    /// Words that it must have, the best first; without, all by their keys.
    #[param(max_length = 500)]
    search: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before: its last key.
    #[param(max_length = 200)]
    cursor: Option<String>,
}

async fn listed(
    tx: &mut PgConnection,
    caller: &Caller,
    (company, owner): (CompanyId, Uuid),
    query: MemoryQuery,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 50, 200)?;
    let too_long = |text: &Option<String>, max: usize| text.as_ref().is_some_and(|text| text.chars().count() > max);
    if too_long(&query.search, SEARCH_CHARS_MAX) {
        return Err(ApiError::field("search", format!("must be at most {SEARCH_CHARS_MAX} characters")));
    }
    if too_long(&query.cursor, KEY_CHARS_MAX) {
        return Err(crate::api::reply::wrong_cursor());
    }
    let rows = match &query.search {
        // The best of all: there is no next page.
        Some(words) => memories::search(&mut *tx, company, &[owner], words, limit).await?,
        None => memories::list(&mut *tx, company, owner, query.cursor.as_deref(), limit + 1).await?,
    };
    caller.list(page(rows, limit, |row| row.key.clone(), |row| Remembered::new(row, company)))
}

/// List what an agent remembers
#[utoipa::path(get, path = "/companies/{company}/agents/{agent}/memory", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role"), MemoryQuery),
    responses((status = 200, description = "A page.", body = Many<Remembered>)))]
async fn list(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Query(query): Query<MemoryQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let agent = super::agents::find(&mut tx, company, &agent).await?.agent;
    listed(&mut tx, &caller, (company, agent.0), query).await
}

/// List what all of a company remember together
#[utoipa::path(get, path = "/companies/{company}/memory", tag = "Companies",
    params(("company" = String, Path, description = "`co_…`"), MemoryQuery),
    responses((status = 200, description = "A page.", body = Many<Remembered>)))]
async fn list_of_company(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<MemoryQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    listed(&mut tx, &caller, (company, company.0), query).await
}

/// Get something that an agent remembers
///
/// With its last versions, and the runs that have written them.
#[utoipa::path(get, path = "/companies/{company}/agents/{agent}/memory/{key}", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role"),
        ("key" = String, Path, description = "Its name.")),
    responses((status = 200, description = "It.", body = One<History>), (status = 304, description = "Not changed.")))]
async fn one(
    State(state): Shared,
    caller: Caller,
    Path((company, agent, key)): Path<(String, String, String)>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let agent = super::agents::find(&mut tx, company, &agent).await?.agent;
    let versions = memories::versions(&mut *tx, company, agent.0, &key).await?;
    let current = versions.first().filter(|memory| memory.value.is_some()).cloned();
    let current = current.ok_or(ApiError::NotFound("memory"))?;
    let versions = versions.into_iter().map(|memory| Remembered::new(memory, company)).collect();
    caller.one(&History { current: Remembered::new(current, company), versions })
}

async fn written(
    state: &crate::api::ApiState,
    caller: &Caller,
    (company, agent): (String, Option<String>),
    body: RememberBody,
    digest: [u8; 32],
) -> Result<Response, ApiError> {
    let mut command = caller.command(state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let owner = match &agent {
        Some(agent) => super::agents::find(command.tx(), company, agent).await?.agent.0,
        None => company.0,
    };
    deeds::write(command.tx(), (company, owner), &body.key, Some(&body.value), (None, None, None)).await?;
    let row = memories::get(command.tx(), company, &[owner], &body.key).await?.ok_or(ApiError::NotFound("memory"))?;
    command.finish(StatusCode::OK, Remembered::new(row, company)).await
}

/// Let an agent remember something
///
/// In the place of what it has remembered under the key; the last versions are kept.
#[utoipa::path(post, path = "/companies/{company}/agents/{agent}/memory", tag = "Agents", request_body = RememberBody,
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role")),
    responses((status = 200, description = "It is remembered.", body = One<Remembered>)))]
async fn write(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Body { body, digest }: Body<RememberBody>,
) -> Result<Response, ApiError> {
    written(&state, &caller, (company, Some(agent)), body, digest).await
}

/// Let all of a company remember something
#[utoipa::path(post, path = "/companies/{company}/memory", tag = "Companies", request_body = RememberBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 200, description = "It is remembered.", body = One<Remembered>)))]
async fn write_of_company(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<RememberBody>,
) -> Result<Response, ApiError> {
    written(&state, &caller, (company, None), body, digest).await
}

/// Let an agent forget something
#[utoipa::path(delete, path = "/companies/{company}/agents/{agent}/memory/{key}", tag = "Agents",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role"),
        ("key" = String, Path, description = "Its name.")),
    responses((status = 200, description = "It is forgotten.", body = One<Deleted<String>>)))]
async fn forget(
    State(state): Shared,
    caller: Caller,
    Path((company, agent, key)): Path<(String, String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let agent = super::agents::find(command.tx(), company, &agent).await?.agent;
    if memories::get(command.tx(), company, &[agent.0], &key).await?.is_none() {
        return Err(ApiError::NotFound("memory"));
    }
    deeds::write(command.tx(), (company, agent.0), &key, None, (None, None, None)).await?;
    command.finish(StatusCode::OK, Deleted { id: key, deleted: true }).await
}
