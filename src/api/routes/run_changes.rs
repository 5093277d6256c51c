//! What is done to runs that are there: cancel, retry, replay.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::engine::cancel::cancel_run;
use capx_core::engine::retry::{FromStep, Replay, replay_run, retry_run};
use serde::Deserialize;
use serde_json::{Map, Value};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::Routes;
use super::runs::{Run, find, ids, one_of_both, show};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path};
use crate::api::reply::One;
use crate::api::{ApiError, Shared};

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::PlaybooksWrite, 2, routes!(cancel)).with(Scope::PlaybooksWrite, 2, routes!(retry)).with(
        Scope::PlaybooksWrite,
        2,
        routes!(replay),
    )
}

/// Cancel a run
///
/// One that has ended stays as it is: a 409 says how it ended. An attempt that
/// is under way may still have an effect; its result is not taken. A run whose
/// playbook has `compensate` or `finally` does that first, and is `cancelled` then;
/// cancelled once more, it ends at once.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/runs/{run}/cancel", tag = "Runs",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"),
        ("run" = String, Path, description = "`run_…`")),
    responses((status = 200, description = "It is cancelled, or is about to be.", body = One<Run>)))]
async fn cancel(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook, run)): Path<(String, String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let ids = ids(&company, &playbook, &run)?;
    let mut command = caller.command(&state, digest).await?;
    let row = find(command.tx(), &caller, ids).await?;
    cancel_run(&state.engine, command.tx(), ids.0, row.run, &caller.key.to_string()).await?;
    command.wake();
    let row = find(command.tx(), &caller, ids).await?;
    let shown = show(&state, command.tx(), ids.0, row).await?;
    command.finish(StatusCode::OK, shown).await
}

/// Retry a failed run
///
/// It goes on at the step that failed: what is done stays done, and what a
/// person has allowed stays allowed; a gate that was refused or ran out is asked
/// for again. A run that has not failed is a 409.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/runs/{run}/retry", tag = "Runs",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"),
        ("run" = String, Path, description = "`run_…`")),
    responses((status = 200, description = "It goes on.", body = One<Run>)))]
async fn retry(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook, run)): Path<(String, String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let ids = ids(&company, &playbook, &run)?;
    let mut command = caller.command(&state, digest).await?;
    find(command.tx(), &caller, ids).await?;
    retry_run(&state.engine, command.tx(), ids.0, ids.2, &caller.key.to_string()).await?;
    command.wake();
    let row = find(command.tx(), &caller, ids).await?;
    let shown = show(&state, command.tx(), ids.0, row).await?;
    command.finish(StatusCode::OK, shown).await
}

/// How a run is played again.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ReplayBody {
    /// The step to begin with, by its id or its place from 0; those before it
    /// keep what they have done in the old run. The first one without.
    from_step: Option<StepName>,
    /// Over the old run's parameters.
    params: Option<Map<String, Value>>,
    /// The guide's word for the same.
    inputs: Option<Map<String, Value>>,
}

impl Check for ReplayBody {}

/// A step's id, or its place from 0.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(untagged, expecting = "a step's id, or its place from 0")]
enum StepName {
    Place(u16),
    Id(String),
}

/// Replay a run
///
/// A new run of the same version with the same parameters, linked to the old
/// one by `replay_of`.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/runs/{run}/replay", tag = "Runs",
    request_body = ReplayBody,
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"),
        ("run" = String, Path, description = "`run_…`")),
    responses((status = 201, description = "The new run.", body = One<Run>)))]
async fn replay(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook, run)): Path<(String, String, String)>,
    Body { body, digest }: Body<ReplayBody>,
) -> Result<Response, ApiError> {
    let ids = ids(&company, &playbook, &run)?;
    let from = body.from_step.map(|step| match step {
        StepName::Place(at) => FromStep::Index(at.into()),
        StepName::Id(id) => FromStep::Id(id),
    });
    let replay = Replay { of: ids.2, from, params: one_of_both(body.params, body.inputs)? };
    let mut command = caller.command(&state, digest).await?;
    find(command.tx(), &caller, ids).await?;
    let started = replay_run(&state.engine, command.tx(), caller.account, (ids.0, ids.1), replay).await?;
    command.wake();
    let row = find(command.tx(), &caller, (ids.0, ids.1, started.run)).await?;
    let shown = show(&state, command.tx(), ids.0, row).await?;
    command.finish(StatusCode::CREATED, shown).await
}
