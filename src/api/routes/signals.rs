//! Named events that clients send to a company or to one of its runs.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::event::is_event_name;
use capx_core::domain::ids::{CompanyId, RunId, SignalId};
use capx_core::domain::storable::{self, OUTPUT_BYTES_MAX};
use capx_core::engine::signals::{Send, send};
use capx_core::engine::{FieldProblem, hooks};
use capx_core::store::signals::SignalRow;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::Routes;
use super::runs::{find, ids};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Path};
use crate::api::command::Command;
use crate::api::reply::{One, Time};
use crate::api::{ApiError, Shared};

const ID_CHARS_MAX: usize = 255;

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::PlaybooksWrite, 2, routes!(to_company)).with(Scope::PlaybooksWrite, 2, routes!(to_run))
}

/// An event to be sent.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct EventBody {
    /// What `wait_for` names: letters, digits and `._-:/`.
    #[schema(min_length = 1, max_length = 200)]
    name: String,
    /// What it says; the output of the steps that waited for it.
    #[serde(default)]
    data: Value,
    /// Yours: an event that is sent again with the same id changes nothing.
    #[schema(min_length = 1, max_length = 255)]
    id: Option<String>,
}

/// An event that was taken.
#[derive(Debug, Serialize, ToSchema)]
struct TakenEvent {
    /// `sig_…`
    #[schema(value_type = String)]
    id: SignalId,
    name: String,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// The run that it was sent to, if it was to one.
    #[schema(required, value_type = Option<String>)]
    run_id: Option<RunId>,
    /// The sender's id.
    #[schema(required)]
    client_id: Option<String>,
    received_at: Time,
}

impl TakenEvent {
    fn new(company: CompanyId, row: SignalRow) -> Self {
        Self {
            id: SignalId(row.id),
            name: row.name,
            company_id: company,
            run_id: row.run_id.map(RunId),
            client_id: row.client_id,
            received_at: Time(row.received_at),
        }
    }
}

impl Check for EventBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        if !is_event_name(&self.name) {
            let message = "must be 1 to 200 letters, digits, `.`, `_`, `-`, `:` or `/`";
            problems.push(FieldProblem::new("name", message));
        }
        if self.name.starts_with(hooks::PREFIX) {
            problems.push(FieldProblem::new("name", "`hook:` is for requests to webhooks"));
        }
        if self.id.as_ref().is_some_and(|id| id.starts_with(hooks::PREFIX)) {
            problems.push(FieldProblem::new("id", "`hook:` is for requests to webhooks"));
        }
        if self.id.as_ref().is_some_and(|id| !(1..=ID_CHARS_MAX).contains(&id.chars().count())) {
            problems.push(FieldProblem::new("id", format!("must be 1 to {ID_CHARS_MAX} characters")));
        }
        if let Err(error) = storable::to_json(&self.data, OUTPUT_BYTES_MAX) {
            problems.push(FieldProblem::new("data", error.to_string()));
        }
        problems
    }
}

async fn taken(
    mut command: Command<'_>,
    company: CompanyId,
    run: Option<RunId>,
    body: &EventBody,
) -> Result<Response, ApiError> {
    let event = Send { run, name: &body.name, data: &body.data, client_id: body.id.as_deref() };
    let (row, new) = send(command.tx(), company, &event).await?;
    let status = if new { StatusCode::CREATED } else { StatusCode::OK };
    command.wake();
    command.finish(status, TakenEvent::new(company, row)).await
}

/// Send an event
///
/// Every run of the company that waits for it goes on, and so does one that
/// comes to wait for it within seven days, if it had begun before.
#[utoipa::path(post, path = "/companies/{company}/events", tag = "Runs", request_body = EventBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 201, description = "It is taken.", body = One<TakenEvent>),
        (status = 200, description = "It was taken before.", body = One<TakenEvent>)))]
async fn to_company(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<EventBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_row(command.tx(), &company).await?;
    if company.status == "stopped" {
        return Err(ApiError::Conflict("the company is stopped; nothing goes on in it".into()));
    }
    taken(command, company.company, None, &body).await
}

/// Send an event to a run
///
/// To this run alone. One that has ended is a 409.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/runs/{run}/events", tag = "Runs",
    request_body = EventBody,
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"),
        ("run" = String, Path, description = "`run_…`")),
    responses((status = 201, description = "It is taken.", body = One<TakenEvent>),
        (status = 200, description = "It was taken before.", body = One<TakenEvent>)))]
async fn to_run(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook, run)): Path<(String, String, String)>,
    Body { body, digest }: Body<EventBody>,
) -> Result<Response, ApiError> {
    let ids = ids(&company, &playbook, &run)?;
    let mut command = caller.command(&state, digest).await?;
    find(command.tx(), &caller, ids).await?;
    taken(command, ids.0, Some(ids.2), &body).await
}
