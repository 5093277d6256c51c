//! What whoever runs the server sees and turns: workers, queues, jobs.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::store::fleet::{self, JobFilter, JobRow, PauseRow, QueueRow, WorkerRow};
use capx_core::store::jobs::kind;
use capx_core::store::{sessions, tenancy, tenants};
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::pauses::PauseBody;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Nothing, Path, Query, limit, one_of};
use crate::api::command::Command;
use crate::api::reply::{All, Many, One, Page, Time, page, wrong_cursor};
use crate::api::{ApiError, ApiState, Shared, openapi};

const STATES: &[&str] = &["ready", "scheduled", "running"];

fn states() -> utoipa::openapi::schema::Object {
    openapi::names(STATES)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::OpsRead, 1, routes!(workers))
        .with(Scope::OpsWrite, 2, routes!(drain))
        .with(Scope::OpsRead, 1, routes!(queues))
        .with(Scope::OpsWrite, 2, routes!(pause))
        .with(Scope::OpsWrite, 2, routes!(resume))
        .with(Scope::OpsRead, 1, routes!(jobs))
}

/// Only the account that runs the server sees what all its tenants share.
pub(super) async fn operator(caller: &Caller, tx: &mut PgConnection) -> Result<(), ApiError> {
    if caller.company.is_some() || !tenants::is_operator(tx, caller.account).await? {
        return Err(ApiError::NotOperator);
    }
    Ok(())
}

/// Begins a change of the server itself.
pub(super) async fn operation<'a>(
    caller: &'a Caller,
    state: &'a ApiState,
    digest: [u8; 32],
) -> Result<Command<'a>, ApiError> {
    let mut command = caller.command(state, digest).await?;
    operator(caller, command.tx()).await?;
    tenancy::serve_all(command.tx()).await?;
    Ok(command)
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
    /// The same by kind, e.g. `{"step": 3}`; `GET /jobs?worker_id=` lists them.
    #[schema(value_type = Object)]
    running: serde_json::Value,
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
            running: row.kinds,
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
    let before = number_cursor(query.cursor.as_deref())?;
    operator(&caller, &mut *caller.read(&state).await?).await?;
    let rows = fleet::workers(&state.engine.pool, before, limit + 1).await?;
    caller.list(page(rows, limit, |row| row.id.to_string(), Worker::from))
}

/// Reads the cursor of a list that goes by number.
fn number_cursor(given: Option<&str>) -> Result<Option<i64>, ApiError> {
    let read = |text: &str| text.parse::<i64>().ok().filter(|id| *id > 0).ok_or_else(wrong_cursor);
    given.map(read).transpose()
}

/// Reads a worker's number.
fn number_of_worker(given: Option<&str>) -> Result<Option<i64>, ApiError> {
    let read = |text: &str| text.parse().ok().filter(|id: &i64| *id > 0).ok_or(ApiError::NotFound("worker"));
    given.map(read).transpose()
}

/// A worker that was asked to drain.
#[derive(Debug, Serialize, ToSchema)]
struct Draining {
    id: String,
    /// `draining`: it takes no more jobs, brings to an end what it has, gives back
    /// what does not end in its drain time, and its process ends.
    status: String,
}

/// Drain a worker
///
/// It hears so with its next beat, a sixth of its lease away at most; no attempt is
/// charged for what it gives back. For the account that runs the server.
#[utoipa::path(post, path = "/workers/{worker}/drain", tag = "Operations",
    params(("worker" = String, Path, description = "The worker's `id`.")),
    responses((status = 200, description = "It drains.", body = One<Draining>)))]
async fn drain(
    State(state): Shared,
    caller: Caller,
    Path(worker): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = operation(&caller, &state, digest).await?;
    let id: i64 = worker.parse().map_err(|_| ApiError::NotFound("worker"))?;
    let status = sessions::drain(command.tx(), id).await?.ok_or(ApiError::NotFound("worker"))?;
    if status != "draining" {
        return Err(ApiError::Conflict(match status.as_str() {
            "dead" => "the worker was declared dead; others have taken its jobs over".into(),
            _ => "the worker has ended already".to_owned(),
        }));
    }
    command.finish(StatusCode::OK, Draining { id: id.to_string(), status }).await
}

/// A queue.
#[derive(Debug, Serialize, ToSchema)]
struct Queue {
    name: String,
    /// Jobs that are ready; 10000 stands for so many or more.
    depth: i64,
    /// Jobs that workers hold.
    running: i64,
    /// Since when the job waits that has waited longest of those that come next
    /// in their companies.
    #[schema(required)]
    oldest_at: Option<Time>,
    /// How long that is, in seconds.
    #[schema(required)]
    oldest_age: Option<f64>,
    /// Jobs that were done a second, over the last five whole minutes.
    rate_5m: f64,
    /// The same over the last hour.
    rate_1h: f64,
    /// Nothing is taken out of it.
    paused: bool,
    /// The key that paused it.
    #[schema(required)]
    paused_by: Option<String>,
    /// Why.
    #[schema(required)]
    reason: Option<String>,
    #[schema(required)]
    paused_at: Option<Time>,
}

impl From<QueueRow> for Queue {
    fn from(row: QueueRow) -> Self {
        Self {
            name: row.queue,
            depth: row.ready,
            running: row.running,
            oldest_at: row.oldest_at.map(Time),
            oldest_age: row.oldest_s.map(|age| (age * 1e3).round() / 1e3),
            rate_5m: (row.done_5m as f64 / 300.0 * 1e3).round() / 1e3,
            rate_1h: (row.done_1h as f64 / 3_600.0 * 1e3).round() / 1e3,
            paused: row.paused_at.is_some(),
            paused_by: row.paused_by,
            reason: row.reason,
            paused_at: row.paused_at.map(Time),
        }
    }
}

/// List queues
///
/// Those that a live worker serves, that hold ready jobs, or that are paused. For
/// the account that runs the server.
#[utoipa::path(get, path = "/queues", tag = "Operations",
    responses((status = 200, description = "All of them.", body = All<Queue>)))]
async fn queues(State(state): Shared, caller: Caller) -> Result<Response, ApiError> {
    operator(&caller, &mut *caller.read(&state).await?).await?;
    caller.all(fleet::queues(&state.engine.pool).await?.into_iter().map(Queue::from).collect())
}

/// Whether a queue is paused.
#[derive(Debug, Serialize, ToSchema)]
struct QueueStatus {
    name: String,
    /// Nothing is taken out of it.
    paused: bool,
    /// The key that paused it.
    #[schema(required)]
    paused_by: Option<String>,
    /// Why.
    #[schema(required)]
    reason: Option<String>,
    #[schema(required)]
    paused_at: Option<Time>,
}

impl QueueStatus {
    fn new(name: String, pause: Option<PauseRow>) -> Self {
        let paused_at = pause.as_ref().map(|pause| Time(pause.since));
        let (paused_by, reason) = pause.map(|pause| (pause.paused_by, pause.reason)).unzip();
        Self { name, paused: paused_at.is_some(), paused_by, reason: reason.flatten(), paused_at }
    }
}

/// Pause a queue
///
/// Nothing more is taken out of it, by any worker, a second from now at the latest;
/// what is under way goes on. Kept until it is resumed. For the account that runs
/// the server.
#[utoipa::path(post, path = "/queues/{queue}/pause", tag = "Operations", request_body = PauseBody,
    params(("queue" = String, Path, description = "The queue's name.")),
    responses((status = 200, description = "It is paused.", body = One<QueueStatus>)))]
async fn pause(
    State(state): Shared,
    caller: Caller,
    Path(queue): Path<String>,
    Body { body, digest }: Body<PauseBody>,
) -> Result<Response, ApiError> {
    let mut command = operation(&caller, &state, digest).await?;
    known(command.tx(), &queue).await?;
    fleet::pause_queue(command.tx(), &queue, &caller.key.to_string(), body.reason.as_deref()).await?;
    let pause = fleet::pause_of(command.tx(), &queue).await?;
    command.finish(StatusCode::OK, QueueStatus::new(queue, pause)).await
}

/// Resume a queue
///
/// For the account that runs the server.
#[utoipa::path(post, path = "/queues/{queue}/resume", tag = "Operations",
    params(("queue" = String, Path, description = "The queue's name.")),
    responses((status = 200, description = "It is not paused.", body = One<QueueStatus>)))]
async fn resume(
    State(state): Shared,
    caller: Caller,
    Path(queue): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = operation(&caller, &state, digest).await?;
    known(command.tx(), &queue).await?;
    fleet::resume_queue(command.tx(), &queue).await?;
    command.wake();
    command.finish(StatusCode::OK, QueueStatus::new(queue, None)).await
}

/// A slip in a name must not pause nothing.
pub(super) async fn known(tx: &mut PgConnection, queue: &str) -> Result<(), ApiError> {
    // No name that the database can hold has one.
    let storable = !queue.contains('\0');
    if storable && fleet::is_queue(tx, queue).await? { Ok(()) } else { Err(ApiError::NotFound("queue")) }
}

/// A job: work that is ready, due later, or in a worker's hands.
#[derive(Debug, Serialize, ToSchema)]
struct Job {
    /// Its number.
    id: String,
    queue: String,
    /// What it is, e.g. `step`.
    kind: String,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// The run that it moves on.
    #[schema(required, value_type = Option<String>)]
    run_id: Option<RunId>,
    /// The step's place, from 0; -1 where a run is between its steps.
    step_index: i32,
    /// `ready`, `scheduled` or `running`.
    status: String,
    /// Lower is taken earlier, within the company.
    priority: i16,
    /// Tries charged.
    attempts: i32,
    /// Deaths of workers since the last checkpoint.
    crashes: i16,
    /// The worker that holds it.
    #[schema(required)]
    worker_id: Option<String>,
    /// When it may be taken; null while its company is halted.
    #[schema(required)]
    due_at: Option<Time>,
    /// When it is taken away from its worker.
    #[schema(required)]
    deadline_at: Option<Time>,
    created_at: Time,
}

impl From<JobRow> for Job {
    fn from(row: JobRow) -> Self {
        let of_run = kind::OF_RUNS.contains(&row.kind.as_str());
        Self {
            id: row.id.to_string(),
            queue: row.queue,
            kind: row.kind,
            company_id: CompanyId(row.company_id),
            run_id: row.ref_id.filter(|_| of_run).map(RunId),
            step_index: row.step,
            status: row.state,
            priority: row.priority,
            attempts: row.attempt,
            crashes: row.crash_count,
            worker_id: row.session_id.map(|id| id.to_string()),
            due_at: row.due_at.map(Time),
            deadline_at: row.deadline_at.map(Time),
            created_at: Time(row.created_at),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct JobsQuery {
    /// `co_…`
    company_id: Option<String>,
    /// A queue's name.
    queue: Option<String>,
    /// `ready`, `scheduled` or `running`.
    #[param(schema_with = states, required = false)]
    status: Option<String>,
    /// E.g. `step`.
    kind: Option<String>,
    /// In the hands of this worker.
    #[param(pattern = "^[1-9][0-9]{0,17}$")]
    worker_id: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(pattern = "^[1-9][0-9]{0,17}$")]
    cursor: Option<String>,
}

/// List jobs
///
/// What is ready, due later, or in a worker's hands, newest first; what is done has no
/// job. A page looks at 10,000 jobs at most, so that a filter may leave it short, or
/// empty, with more to come. For the account that runs the server.
#[utoipa::path(get, path = "/jobs", tag = "Operations", params(JobsQuery),
    responses((status = 200, description = "A page.", body = Many<Job>)))]
async fn jobs(State(state): Shared, caller: Caller, Query(query): Query<JobsQuery>) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 50, 200)?;
    let before = number_cursor(query.cursor.as_deref())?;
    one_of("status", query.status.as_deref(), STATES)?;
    operator(&caller, &mut *caller.read(&state).await?).await?;
    let company = query.company_id.as_deref().map(|id| id.parse::<CompanyId>());
    let company = company.transpose().map_err(|_| ApiError::NotFound("company"))?;
    let filter = JobFilter {
        company: company.map(|company| company.0),
        queue: query.queue.as_deref(),
        state: query.status.as_deref(),
        kind: query.kind.as_deref(),
        session: number_of_worker(query.worker_id.as_deref())?,
        before,
    };
    let (rows, next) = fleet::jobs(&state.engine.pool, filter, limit).await?;
    caller.list(Page { data: rows.into_iter().map(Job::from).collect(), cursor: next.map(|id| id.to_string()) })
}
