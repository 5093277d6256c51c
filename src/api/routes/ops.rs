//! What operators see and repair: workers, dead letters.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::ids::{CompanyId, DeadLetterId, RunId};
use capx_core::engine::retry::retry_run;
use capx_core::store::fleet::{self, LetterFilter, LetterRow, WorkerRow};
use capx_core::store::tenants;
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Nothing, Path, Query, limit, one_of};
use crate::api::reply::{Many, One, Time, cursor, id_cursor, page, wrong_cursor};
use crate::api::{ApiError, Shared, openapi};

/// Why work gave up.
const REASONS: &[&str] = &["exhausted", "invalid", "quarantined"];

fn reasons() -> utoipa::openapi::schema::Object {
    openapi::names(REASONS)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::OpsRead, 1, routes!(workers)).with(Scope::OpsRead, 1, routes!(letters)).with(
        Scope::OpsWrite,
        2,
        routes!(retry),
    )
}

/// A live worker process.
#[derive(Debug, Serialize, ToSchema)]
struct Worker {
    /// Its number, another one after each start.
    id: String,
    /// Host and process.
    worker: String,
    version: String,
    queues: Vec<String>,
    /// Attempts at once.
    slots: i32,
    /// Jobs that it holds now.
    jobs: i64,
    /// `active` or `draining`.
    status: String,
    /// Seconds that it lives without a beat.
    lease: f64,
    started_at: Time,
    last_beat_at: Time,
}

impl From<WorkerRow> for Worker {
    fn from(row: WorkerRow) -> Self {
        Self {
            id: row.id.to_string(),
            worker: row.worker,
            version: row.version,
            queues: row.queues,
            slots: row.slots,
            jobs: row.jobs,
            status: row.state,
            lease: row.lease_ms as f64 / 1e3,
            started_at: Time(row.started_at),
            last_beat_at: Time(row.beat_at),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WorkersQuery {
    /// Results of a page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(pattern = "^[1-9][0-9]{0,17}$")]
    cursor: Option<String>,
}

/// List workers
///
/// The live worker processes of the fleet, newest first. For the account that
/// runs the server.
#[utoipa::path(get, path = "/workers", tag = "Operations", params(WorkersQuery),
    responses((status = 200, description = "A page.", body = Many<Worker>)))]
async fn workers(
    State(state): Shared,
    caller: Caller,
    Query(query): Query<WorkersQuery>,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 50, 200)?;
    let before = query.cursor.map(|text| text.parse::<i64>().ok().filter(|id| *id > 0).ok_or_else(wrong_cursor));
    let before = before.transpose()?;
    let mut tx = caller.read(&state).await?;
    if caller.company.is_some() || !tenants::is_operator(&mut tx, caller.account).await? {
        return Err(ApiError::NotOperator);
    }
    drop(tx);
    let rows = fleet::workers(&state.engine.pool, before, limit + 1).await?;
    caller.list(page(rows, limit, |row| row.id.to_string(), Worker::from))
}

/// Work that gave up.
#[derive(Debug, Serialize, ToSchema)]
struct DeadLetter {
    /// `dl_…`
    #[schema(value_type = String)]
    id: DeadLetterId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// The run that it was about.
    #[schema(required, value_type = Option<String>)]
    run_id: Option<RunId>,
    queue: String,
    /// `step`
    kind: String,
    /// The step's place, from 0.
    step_index: i32,
    /// `exhausted`: out of tries. `invalid`: not worth another. `quarantined`:
    /// its workers died under it.
    reason: String,
    /// Tries charged.
    attempts: i32,
    /// Deaths of workers.
    crashes: i32,
    /// What went wrong last.
    #[schema(value_type = Object)]
    error: Value,
    created_at: Time,
}

impl From<LetterRow> for DeadLetter {
    fn from(row: LetterRow) -> Self {
        Self {
            id: DeadLetterId(row.id),
            company_id: CompanyId(row.company_id),
            run_id: row.ref_id.filter(|_| row.kind == "step").map(RunId),
            queue: row.queue,
            kind: row.kind,
            step_index: row.step,
            reason: row.reason,
            attempts: row.attempt,
            crashes: row.crash_count,
            error: row.error,
            created_at: Time(row.created_at),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct LettersQuery {
    /// `co_…`
    company_id: Option<String>,
    /// `exhausted`, `invalid` or `quarantined`.
    #[param(schema_with = reasons, required = false)]
    reason: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

/// List dead letters
///
/// Steps that gave up, newest first, with the evidence. They go when their run
/// is retried.
#[utoipa::path(get, path = "/dead-letters", tag = "Operations", params(LettersQuery),
    responses((status = 200, description = "A page.", body = Many<DeadLetter>)))]
async fn letters(
    State(state): Shared,
    caller: Caller,
    Query(query): Query<LettersQuery>,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let reason = one_of("reason", query.reason.as_deref(), REASONS)?;
    let before = cursor(query.cursor.as_deref())?;
    let mut tx = caller.read(&state).await?;
    let company = match query.company_id.as_deref() {
        Some(id) => Some(caller.company_id(&mut tx, id).await?),
        None => caller.company,
    };
    let rows = fleet::letters(&mut tx, caller.account, LetterFilter { company, reason, before }, limit + 1).await?;
    caller.list(page(rows, limit, |row| id_cursor(row.id), DeadLetter::from))
}

/// A dead letter whose run goes on.
#[derive(Debug, Serialize, ToSchema)]
struct Retried {
    #[schema(value_type = String)]
    id: DeadLetterId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    #[schema(value_type = String)]
    run_id: RunId,
    /// Always true.
    retried: bool,
}

/// Retry a dead letter
///
/// Its run goes on at the step that gave up, as by the run's own `retry`.
#[utoipa::path(post, path = "/dead-letters/{letter}/retry", tag = "Operations",
    params(("letter" = String, Path, description = "`dl_…`")),
    responses((status = 200, description = "The run goes on.", body = One<Retried>)))]
async fn retry(
    State(state): Shared,
    caller: Caller,
    Path(letter): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let id: DeadLetterId = letter.parse().map_err(|_| ApiError::NotFound("dead letter"))?;
    let mut command = caller.command(&state, digest).await?;
    let (company, run) = fleet::run_of_letter(command.tx(), caller.account, caller.company, id)
        .await?
        .ok_or(ApiError::NotFound("dead letter"))?;
    retry_run(&state.engine, command.tx(), company, run, &caller.key.to_string()).await?;
    command.wake();
    command.finish(StatusCode::OK, Retried { id, company_id: company, run_id: run, retried: true }).await
}
