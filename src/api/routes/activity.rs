//! The activity feed: of a company, of an agent, of an account.

use std::collections::HashMap;

use axum::extract::State;
use axum::http::HeaderMap;
use axum::response::Response;
use capx_core::domain::event::{ACTIVITY_TYPES, activity_action, activity_type, resource, summary};
use capx_core::domain::ids::{AccountId, AgentId, CompanyId, EventId};
use capx_core::store::agents as stored_agents;
use capx_core::store::events::{self, FeedFilter, FeedRow, Place};
use chrono::Duration;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;
use uuid::Uuid;

use super::Routes;
use super::agents;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Path, Query, limit};
use crate::api::period;
use crate::api::reply::{Many, Page, Time, page, wrong_cursor};
use crate::api::stream::hub::Topic;
use crate::api::stream::{self, Filter};
use crate::api::{ApiError, ApiState, Shared, openapi};

fn types() -> utoipa::openapi::schema::Object {
    let names: Vec<&str> = ACTIVITY_TYPES.iter().map(|(activity, _)| *activity).collect();
    openapi::names(&names)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::ActivityRead, 1, routes!(of_company))
        .with(Scope::AgentsRead, 1, routes!(of_agent))
        .with(Scope::ActivityRead, 1, routes!(of_account))
        .with(Scope::ActivityRead, 1, routes!(stream_of_account))
        .with(Scope::AgentsRead, 1, routes!(logs))
        .with(Scope::AgentsRead, 1, routes!(heartbeats))
}

/// Something that happened.
#[derive(Debug, Serialize, ToSchema)]
pub(in crate::api) struct Activity {
    /// `evt_…`; the same on every delivery.
    #[schema(value_type = String)]
    id: EventId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// `heartbeat`, `task`, `playbook`, `error`, `governance`, `cost` or `tool_use`.
    r#type: &'static str,
    /// What happened to the resource, e.g. `created`.
    action: String,
    /// The dotted name, e.g. `task.created`.
    event: String,
    actor: Actor,
    /// In a sentence.
    summary: String,
    resource: Resource,
    /// Where it is about one.
    #[serde(skip_serializing_if = "Option::is_none")]
    task_id: Option<String>,
    timestamp: Time,
    /// What the event carries.
    #[schema(value_type = Object)]
    data: Value,
}

/// Who did it.
#[derive(Debug, Serialize, ToSchema)]
struct Actor {
    /// `agent` or `system`.
    r#type: &'static str,
    #[schema(required, value_type = Option<String>)]
    id: Option<AgentId>,
    #[schema(required)]
    role: Option<String>,
}

/// What it is about.
#[derive(Debug, Serialize, ToSchema)]
struct Resource {
    /// `company`, `agent`, `task`, `run` or `approval`.
    r#type: &'static str,
    id: String,
}

/// The agent that an event is about.
pub(in crate::api) fn agent_of(row: &FeedRow) -> Option<AgentId> {
    row.event.data.get("agent_id")?.as_str()?.parse().ok()
}

impl Activity {
    /// Its activity type.
    pub fn kind(&self) -> &'static str {
        self.r#type
    }

    /// As cells of a table, the columns as [`super::exports`] names them.
    pub fn cells(&self) -> Vec<String> {
        vec![
            self.id.to_string(),
            self.timestamp.0.to_rfc3339_opts(chrono::SecondsFormat::Micros, true),
            self.company_id.to_string(),
            self.r#type.to_owned(),
            self.event.clone(),
            self.actor.r#type.to_owned(),
            self.actor.id.map(|id| id.to_string()).unwrap_or_default(),
            self.actor.role.clone().unwrap_or_default(),
            self.resource.r#type.to_owned(),
            self.resource.id.clone(),
            self.summary.clone(),
            self.data.to_string(),
        ]
    }

    /// An event as answers show it.
    pub fn new(row: FeedRow, roles: &HashMap<AgentId, String>) -> Self {
        let agent = agent_of(&row);
        let role = agent.and_then(|agent| roles.get(&agent).cloned());
        let event = row.event;
        let run = event.run.map(|run| run.to_string());
        let (kind, id) = resource(&event.event, &event.data, &row.company.to_string(), run.as_deref());
        Self {
            id: event.id,
            company_id: row.company,
            r#type: activity_type(&event.event),
            action: activity_action(&event.event).to_owned(),
            actor: Actor { r#type: if agent.is_some() { "agent" } else { "system" }, id: agent, role },
            summary: summary(&event.event, &event.data),
            task_id: (kind == "task").then(|| id.clone()),
            resource: Resource { r#type: kind, id },
            timestamp: Time(event.at),
            event: event.event,
            data: event.data,
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct FeedQuery {
    /// `heartbeat`, `task`, `playbook`, `error`, `governance`, `cost` or `tool_use`.
    #[param(schema_with = types, required = false)]
    r#type: Option<String>,
    /// `ag_…`
    agent_id: Option<String>,
    /// Events at this time (ISO 8601) or later.
    since: Option<String>,
    /// Events up to this time (ISO 8601).
    until: Option<String>,
    /// Server-sent events instead of a page: what happens next, or what
    /// happened behind `Last-Event-ID`, `cursor` or `since`.
    #[param(default = false)]
    stream: Option<bool>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::place_cursor, required = false)]
    cursor: Option<String>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct AgentFeedQuery {
    /// `heartbeat`, `task`, `error`, `tool_use`, or another type.
    #[param(schema_with = types, required = false)]
    r#type: Option<String>,
    /// Events at this time (ISO 8601) or later.
    since: Option<String>,
    /// Events up to this time (ISO 8601).
    until: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::place_cursor, required = false)]
    cursor: Option<String>,
}

/// The kinds of event that an activity type takes in.
fn kinds(given: Option<&str>) -> Result<Option<Vec<String>>, ApiError> {
    let Some(name) = given else { return Ok(None) };
    let known = ACTIVITY_TYPES.iter().find(|(activity, _)| *activity == name);
    let Some((_, kinds)) = known else {
        let names: Vec<_> = ACTIVITY_TYPES.iter().map(|(activity, _)| *activity).collect();
        return Err(ApiError::field("type", format!("must be one of {}", names.join(", "))));
    };
    Ok(Some(kinds.iter().map(|kind| (*kind).to_owned()).collect()))
}

/// A place as a cursor.
pub(in crate::api) fn place_cursor(place: Place) -> String {
    format!("{:x}-{}", place.xid, place.id.simple())
}

/// A cursor as a place.
pub(in crate::api) fn read_place(given: Option<&str>) -> Result<Option<Place>, ApiError> {
    let read = |text: &str| {
        let (xid, id) = text.split_once('-')?;
        let place = Place { xid: u64::from_str_radix(xid, 16).ok()?, id: Uuid::try_parse(id).ok()? };
        (place_cursor(place) == text && i64::try_from(place.xid).is_ok()).then_some(place)
    };
    given.map(|text| read(text).ok_or_else(wrong_cursor)).transpose()
}

struct Feed<'a> {
    account: AccountId,
    company: Option<CompanyId>,
    agent: Option<AgentId>,
    query: &'a FeedQuery,
    newest_first: bool,
    limits: (i64, i64),
}

async fn read(tx: &mut PgConnection, feed: Feed<'_>) -> Result<Page<Activity>, ApiError> {
    let query = feed.query;
    let limit = limit(query.limit, feed.limits.0, feed.limits.1)?;
    let kinds = kinds(query.r#type.as_deref())?;
    let (since, until) = period::range(query.since.as_deref(), query.until.as_deref())?;
    let filter = FeedFilter {
        account: feed.account,
        company: feed.company,
        kinds: kinds.as_deref(),
        agent: feed.agent,
        since,
        // Its whole second.
        before: until.map(|until| until + Duration::seconds(1)),
        after: read_place(query.cursor.as_deref())?,
    };
    let rows = events::feed(&mut *tx, filter, feed.newest_first, limit + 1).await?;
    let roles = roles(tx, &rows).await?;
    Ok(page(rows, limit, |row| place_cursor(row.place), |row| Activity::new(row, &roles)))
}

/// The roles of the agents that events are about.
async fn roles(tx: &mut PgConnection, rows: &[FeedRow]) -> Result<HashMap<AgentId, String>, ApiError> {
    let mut about: Vec<_> = rows.iter().filter_map(|row| Some((row.company, agent_of(row)?))).collect();
    about.sort_unstable();
    about.dedup();
    Ok(stored_agents::roles(tx, &about).await?.into_iter().collect())
}

/// Events as answers show them.
pub(super) async fn shown(tx: &mut PgConnection, rows: Vec<FeedRow>) -> Result<Vec<Activity>, ApiError> {
    let roles = roles(tx, &rows).await?;
    Ok(rows.into_iter().map(|row| Activity::new(row, &roles)).collect())
}

/// A company's activity
///
/// Oldest first; with `stream=true` as server-sent events.
#[utoipa::path(get, path = "/companies/{company}/activity", tag = "Activity",
    params(("company" = String, Path, description = "`co_…`"), FeedQuery),
    responses((status = 200, description = "A page.", content((Many<Activity> = "application/json"), (String = "text/event-stream")))))]
async fn of_company(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<FeedQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let agent = match query.agent_id.as_deref() {
        Some(agent) => Some(agents::find(&mut tx, company, agent).await?.agent),
        None => None,
    };
    if query.stream == Some(true) {
        drop(tx);
        let filter = Filter { agent, ..filter(Topic::Company(company), &query)? };
        return stream::open(&state, caller, filter, &headers, query.cursor.as_deref()).await;
    }
    let (account, company) = (caller.account, Some(company));
    let feed = Feed { account, company, agent, query: &query, newest_first: false, limits: (50, 200) };
    let page = read(&mut tx, feed).await?;
    caller.list(page)
}

/// An agent's activity
///
/// Newest first.
#[utoipa::path(get, path = "/companies/{company}/agents/{agent}/activity", tag = "Activity",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role"), AgentFeedQuery),
    responses((status = 200, description = "A page.", body = Many<Activity>)))]
async fn of_agent(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Query(query): Query<AgentFeedQuery>,
) -> Result<Response, ApiError> {
    told_of(&state, &caller, &company, &agent, query).await
}

/// A page of what is told of an agent, newest first.
async fn told_of(
    state: &ApiState,
    caller: &Caller,
    company: &str,
    agent: &str,
    query: AgentFeedQuery,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(state).await?;
    let company = caller.company_id(&mut tx, company).await?;
    let agent = agents::find(&mut tx, company, agent).await?.agent;
    let AgentFeedQuery { r#type, since, until, limit, cursor } = query;
    let query = FeedQuery { r#type, agent_id: None, since, until, stream: None, limit, cursor };
    let (account, company, agent) = (caller.account, Some(company), Some(agent));
    let feed = Feed { account, company, agent, query: &query, newest_first: true, limits: (25, 100) };
    let page = read(&mut tx, feed).await?;
    caller.list(page)
}

/// All activity
///
/// Of the companies that the key may see, newest first.
#[utoipa::path(get, path = "/activity", tag = "Activity", params(FeedQuery),
    responses((status = 200, description = "A page.", body = Many<Activity>)))]
async fn of_account(
    State(state): Shared,
    caller: Caller,
    Query(query): Query<FeedQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let agent = match query.agent_id.as_deref() {
        Some(agent) => Some(agent.parse().map_err(|_| ApiError::NotFound("agent"))?),
        None => None,
    };
    let (account, company) = (caller.account, caller.company);
    let feed = Feed { account, company, agent, query: &query, newest_first: true, limits: (50, 200) };
    let page = read(&mut tx, feed).await?;
    caller.list(page)
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct HeartbeatsQuery {
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::place_cursor, required = false)]
    cursor: Option<String>,
}

/// An agent's heartbeats
///
/// Newest first.
#[utoipa::path(get, path = "/companies/{company}/agents/{agent}/heartbeats", tag = "Activity",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role"), HeartbeatsQuery),
    responses((status = 200, description = "A page.", body = Many<Activity>)))]
async fn heartbeats(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Query(HeartbeatsQuery { limit, cursor }): Query<HeartbeatsQuery>,
) -> Result<Response, ApiError> {
    let query = AgentFeedQuery { r#type: Some("heartbeat".into()), since: None, until: None, limit, cursor };
    told_of(&state, &caller, &company, &agent, query).await
}

/// What a stream shows, as far as its query says.
fn filter(topic: Topic, query: &FeedQuery) -> Result<Filter, ApiError> {
    kinds(query.r#type.as_deref())?;
    if query.until.is_some() {
        return Err(ApiError::field("until", "is for pages: a stream has no end"));
    }
    let mut known = ACTIVITY_TYPES.iter().map(|(activity, _)| *activity);
    Ok(Filter {
        kind: query.r#type.as_deref().and_then(|name| known.find(|activity| *activity == name)),
        since: period::since("since", query.since.as_deref())?,
        ..Filter::all(topic)
    })
}

/// Stream all activity
///
/// Server-sent events of the companies that the key may see: what happens next,
/// or what happened behind `Last-Event-ID`, `cursor` or `since`.
#[utoipa::path(get, path = "/activity/stream", tag = "Activity", params(FeedQuery),
    responses((status = 200, description = "The stream.", body = String, content_type = "text/event-stream")))]
async fn stream_of_account(
    State(state): Shared,
    caller: Caller,
    Query(query): Query<FeedQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let agent = match query.agent_id.as_deref() {
        Some(agent) => Some(agent.parse().map_err(|_| ApiError::NotFound("agent"))?),
        None => None,
    };
    let topic = caller.company.map_or(Topic::Account(caller.account), Topic::Company);
    let filter = Filter { agent, ..filter(topic, &query)? };
    stream::open(&state, caller, filter, &headers, query.cursor.as_deref()).await
}

/// Stream an agent's log
///
/// Server-sent events about it: what happens next, or what happened behind
/// `Last-Event-ID`, `cursor` or `since`.
#[utoipa::path(get, path = "/companies/{company}/agents/{agent}/logs", tag = "Activity",
    params(("company" = String, Path, description = "`co_…`"), ("agent" = String, Path, description = "`ag_…` or a role"), AgentFeedQuery),
    responses((status = 200, description = "The stream.", body = String, content_type = "text/event-stream")))]
async fn logs(
    State(state): Shared,
    caller: Caller,
    Path((company, agent)): Path<(String, String)>,
    Query(query): Query<AgentFeedQuery>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let agent = agents::find(&mut tx, company, &agent).await?.agent;
    drop(tx);
    let AgentFeedQuery { r#type, since, until, limit, cursor } = query;
    let query = FeedQuery { r#type, agent_id: None, since, until, stream: Some(true), limit, cursor };
    let filter = Filter { agent: Some(agent), ..filter(Topic::Company(company), &query)? };
    stream::open(&state, caller, filter, &headers, query.cursor.as_deref()).await
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_place_is_read_as_it_was_written_and_no_other_way() {
        let place = Place { xid: 748_123, id: Uuid::now_v7() };
        let cursor = place_cursor(place);
        assert_eq!(read_place(Some(&cursor)).expect("a cursor"), Some(place));
        let forged = [
            "",
            "-",
            "1",
            "zz-0",
            &format!("0{cursor}"),
            &cursor.to_uppercase(),
            &format!("ffffffffffffffff-{}", place.id.simple()),
        ];
        for forged in forged {
            assert!(read_place(Some(forged)).is_err(), "{forged}");
        }
    }
}
