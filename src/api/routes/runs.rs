//! Runs: start, list, get, wait for the end, follow.

use std::time::Duration;

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use capx_core::domain::company::works;
use capx_core::domain::ids::{AgentId, ApprovalId, CompanyId, PlaybookId, RunId};
use capx_core::domain::playbook::Playbook;
use capx_core::domain::playbook::model::StepKind;
use capx_core::domain::run::{RunStatus, StepStatus};
use capx_core::engine::start::{self, Decided, Started};
use capx_core::store::runs::{self, ItemCounts, JobRow, RunFilter, RunItemRow, RunRow, StepRow};
use capx_core::store::tenants::CompanyRow;
use capx_core::store::{approvals, children, grades};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Path, Query, limit};
use crate::api::command::Command;
use crate::api::reply::{Many, One, Time, cursor, id_cursor, page};
use crate::api::{ApiError, ApiState, Shared, openapi};

/// The longest that an answer is held for the end of a run.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Between two looks at a run that is waited for.
const WAIT_POLL: Duration = Duration::from_millis(100);

fn statuses() -> utoipa::openapi::schema::Object {
    let names: Vec<&str> = RunStatus::ALL.iter().map(|status| status.as_str()).collect();
    openapi::names(&names)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::PlaybooksWrite, 2, routes!(start))
        .with(Scope::PlaybooksWrite, 2, routes!(start_of_account))
        .with(Scope::PlaybooksRead, 1, routes!(list))
        .with(Scope::PlaybooksRead, 1, routes!(list_of_account))
        .with(Scope::PlaybooksRead, 1, routes!(one))
        .with(Scope::PlaybooksRead, 1, routes!(one_of_account))
        .with(Scope::PlaybooksRead, 1, routes!(stream))
}

/// What a run is started with.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct StartRunBody {
    /// Over the playbook's defaults.
    params: Option<Map<String, Value>>,
    /// The guide's word for the same.
    inputs: Option<Map<String, Value>>,
    #[schema(schema_with = priority_or_null, required = false)]
    priority: Option<String>,
}

impl Check for StartRunBody {}

/// How urgent a run may be, within its company, and the priority of its job.
const PRIORITIES: &[(&str, i16)] = &[("high", -1), ("normal", 0), ("low", 1)];

fn priority_or_null() -> utoipa::openapi::schema::Object {
    openapi::names_or_null(
        &["high", "normal", "low"],
        "How urgent it is among the company's runs; what waits for long is taken earlier all the same.",
    )
}

/// The priority of a run's job.
fn priority(given: Option<&str>) -> Result<i16, ApiError> {
    let Some(given) = given else { return Ok(0) };
    let known = PRIORITIES.iter().find(|(name, _)| *name == given);
    known.map(|(_, priority)| *priority).ok_or_else(|| ApiError::field("priority", "must be high, normal or low"))
}

/// What a run is started with, and of which playbook.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct StartAnyRunBody {
    /// `pb_…`
    playbook_id: Option<String>,
    /// Its name instead, together with `company_id` where the key sees more
    /// than one company.
    playbook: Option<String>,
    /// `co_…`
    company_id: Option<String>,
    /// Over the playbook's defaults.
    params: Option<Map<String, Value>>,
    /// The guide's word for the same.
    inputs: Option<Map<String, Value>>,
}

impl Check for StartAnyRunBody {}

pub(super) fn one_of_both(
    params: Option<Map<String, Value>>,
    inputs: Option<Map<String, Value>>,
) -> Result<Map<String, Value>, ApiError> {
    match (params, inputs) {
        (Some(_), Some(_)) => Err(ApiError::field("inputs", "means the same as `params`; send one of them")),
        (params, inputs) => Ok(params.or(inputs).unwrap_or_default()),
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct WaitQuery {
    /// Seconds to hold the answer for the run's end.
    #[param(minimum = 0, maximum = 60)]
    wait: Option<u64>,
}

impl WaitQuery {
    fn patience(&self) -> Result<Duration, ApiError> {
        let wait = Duration::from_secs(self.wait.unwrap_or(0));
        if wait > WAIT_MAX {
            return Err(ApiError::field("wait", format!("must be from 0 to {} seconds", WAIT_MAX.as_secs())));
        }
        Ok(wait)
    }
}

/// A run in a list.
#[derive(Debug, Serialize, ToSchema)]
struct RunItem {
    /// `run_…`
    #[schema(value_type = String)]
    run_id: RunId,
    #[schema(value_type = String)]
    playbook_id: PlaybookId,
    /// `queued`, `running`, `suspended`, `completed`, `failed` or `cancelled`.
    status: &'static str,
    /// What it has cost, in USD.
    cost: f64,
    /// The same.
    total_cost: f64,
    /// How long it took or has taken, in seconds.
    #[schema(required)]
    duration: Option<i64>,
    #[schema(required)]
    started_at: Option<Time>,
    #[schema(required)]
    completed_at: Option<Time>,
}

/// A run.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct Run {
    #[serde(flatten)]
    item: RunItem,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// The run that this one plays again.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    replay_of: Option<RunId>,
    /// The run that it does a step of.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    parent_run_id: Option<RunId>,
    /// Its parameters, defaults filled in.
    #[schema(value_type = Object)]
    params: Value,
    /// Where it was just started, they are left out.
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<Vec<RunStep>>,
    /// How it has held the limits of its playbook's `rubric`: `score`, `passed`,
    /// `decision`, and `criteria` with `name`, `limit` and `value` each.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    rubric: Option<Value>,
    /// What a suspended or queued run waits for.
    #[serde(skip_serializing_if = "Option::is_none")]
    waiting_on: Option<Vec<Waiting>>,
    /// The run's output.
    #[serde(skip_serializing_if = "Option::is_none")]
    output: Option<Value>,
    /// Why it failed.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
}

/// What a run waits for.
#[derive(Debug, Serialize, ToSchema)]
struct Waiting {
    /// `approval`, `timer`, `event`, `company`, or, of a queued run, `concurrency`.
    r#type: &'static str,
    /// Of what it waits for: of a timer the step, of an event its name, of other runs
    /// the concurrency key.
    id: String,
    since: Time,
    /// When the wait ends by itself.
    #[schema(required)]
    expires_at: Option<Time>,
}

impl Waiting {
    /// Of a run that is queued behind others of its playbook.
    fn for_its_turn(run: &RunRow, since: Time) -> Self {
        let id = run.concurrency_key.clone().unwrap_or_default();
        Self { r#type: "concurrency", id, since, expires_at: None }
    }
}

/// A step of a run.
#[derive(Debug, Serialize, ToSchema)]
struct RunStep {
    /// From 0.
    index: usize,
    id: String,
    #[schema(required)]
    role: Option<String>,
    #[schema(required, value_type = Option<String>)]
    agent_id: Option<AgentId>,
    action: String,
    /// Of a step that closes the run: `compensate`, or `finally`.
    #[serde(skip_serializing_if = "Option::is_none")]
    closes: Option<&'static str>,
    /// `pending`, `running`, `waiting`, `pending_approval`, `completed`,
    /// `failed`, `skipped` or `cancelled`.
    status: &'static str,
    /// In USD.
    cost: f64,
    /// In seconds.
    #[schema(required)]
    duration: Option<i64>,
    /// Tries so far.
    attempts: i32,
    #[schema(required)]
    output: Option<Value>,
    /// What its output came to by its rubric, from 0 to 1.
    #[serde(skip_serializing_if = "Option::is_none")]
    score: Option<f64>,
    /// The same in full: `score`, `passed`, `decision`, `draft`, `criteria` with `name`,
    /// `score`, `threshold` and `passed` each, and `feedback`.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<Object>)]
    rubric: Option<Value>,
    /// What went wrong last.
    #[serde(skip_serializing_if = "Option::is_none")]
    error: Option<Value>,
    /// When the next try is due.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_attempt_at: Option<Time>,
    /// How its items stand, where it is done for a list.
    #[serde(skip_serializing_if = "Option::is_none")]
    items: Option<Items>,
    /// The run of another playbook that does it.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[schema(value_type = Option<String>)]
    child_run_id: Option<RunId>,
}

/// How the items of a step stand.
#[derive(Debug, Serialize, ToSchema)]
struct Items {
    /// How many there are.
    total: i32,
    /// Those that are done.
    completed: i32,
    /// Those that have failed.
    failed: i32,
    /// Those that are being done.
    running: i32,
}

impl From<ItemCounts> for Items {
    fn from(counts: ItemCounts) -> Self {
        Self { total: counts.total, completed: counts.completed, failed: counts.failed, running: counts.running }
    }
}

impl RunItem {
    fn new(row: &RunItemRow, halted: bool) -> Self {
        Self {
            run_id: row.run,
            playbook_id: row.playbook,
            status: shown_status(row.status, halted).as_str(),
            cost: row.cost.to_usd(),
            total_cost: row.cost.to_usd(),
            duration: row.duration_s,
            started_at: row.started_at.map(Time),
            completed_at: row.ended_at.map(Time),
        }
    }
}

/// A run of a company that is halted waits for the company.
fn shown_status(status: RunStatus, halted: bool) -> RunStatus {
    match status {
        RunStatus::Queued | RunStatus::Running if halted => RunStatus::Suspended,
        status => status,
    }
}

/// What was started, whatever it has come to in the meantime.
fn brief((company, playbook): (CompanyId, PlaybookId), started: Started) -> Run {
    let item = RunItem {
        run_id: started.run,
        playbook_id: playbook,
        status: started.status.as_str(),
        cost: 0.0,
        total_cost: 0.0,
        duration: Some(0),
        started_at: Some(Time(started.at)),
        completed_at: None,
    };
    Run {
        item,
        company_id: company,
        replay_of: None,
        parent_run_id: None,
        params: started.params,
        steps: None,
        rubric: None,
        waiting_on: None,
        output: None,
        error: None,
    }
}

/// Run a playbook
///
/// Answers at once, or with `wait` when the run has ended.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/run", tag = "Runs", request_body = StartRunBody,
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"), WaitQuery),
    responses((status = 201, description = "The run.", body = One<Run>),
        (status = 200, description = "The run that has the playbook's `idempotency_key` already.", body = One<Run>)))]
async fn start(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Query(wait): Query<WaitQuery>,
    Body { body, digest }: Body<StartRunBody>,
) -> Result<Response, ApiError> {
    let patience = wait.patience()?;
    let params = one_of_both(body.params, body.inputs)?;
    let priority = priority(body.priority.as_deref())?;
    let company: CompanyId = company.parse().map_err(|_| ApiError::NotFound("company"))?;
    let playbook: PlaybookId = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    if caller.company.is_some_and(|bound| bound != company) {
        return Err(ApiError::NotFound("company"));
    }
    let command = caller.command(&state, digest).await?;
    started(&state, &caller, command, (company, playbook), (params, priority), patience).await
}

async fn started(
    state: &ApiState,
    caller: &Caller,
    mut command: Command<'_>,
    (company, playbook): (CompanyId, PlaybookId),
    (params, priority): (Map<String, Value>, i16),
    patience: Duration,
) -> Result<Response, ApiError> {
    let account = Some(caller.account);
    let decided =
        start::decide(&state.engine, command.tx(), account, (company, playbook), params, "manual", None).await?;
    let (run, status, answer) = match decided {
        Decided::Known(run) => {
            let answer = command.finish(StatusCode::OK, brief((company, playbook), run.clone())).await?;
            (run, StatusCode::OK, Some(answer))
        }
        Decided::New(new) if caller.is_idempotent() || new.is_keyed() => {
            // The start, and beside it the answer: a repeat is told of this run.
            let run = start::start_in(command.tx(), new.with_priority(priority)).await?;
            command.wake();
            let answer = command.finish(StatusCode::CREATED, brief((company, playbook), run.clone())).await?;
            (run, StatusCode::CREATED, Some(answer))
        }
        Decided::New(new) => {
            drop(command);
            // Together with those of other requests.
            (start::start_decided(&state.engine, new.with_priority(priority)).await?, StatusCode::CREATED, None)
        }
    };
    let charged = answer.is_some();
    if patience.is_zero() {
        return answer.map_or_else(|| caller.created(brief((company, playbook), run)), Ok);
    }
    // The run is committed: an error now would make the client start another.
    let answer = match shown(state, caller, (company, playbook, run.run), patience).await {
        Ok(shown) => shown,
        Err(_) => brief((company, playbook), run),
    };
    if charged { caller.again(status, answer) } else { caller.created(answer) }
}

/// Run any playbook
///
/// The same by the playbook's id, or by its name in a company.
#[utoipa::path(post, path = "/playbooks/run", tag = "Runs", request_body = StartAnyRunBody, params(WaitQuery),
    responses((status = 201, description = "The run.", body = One<Run>),
        (status = 200, description = "The run that has the playbook's `idempotency_key` already.", body = One<Run>)))]
async fn start_of_account(
    State(state): Shared,
    caller: Caller,
    Query(wait): Query<WaitQuery>,
    Body { body, digest }: Body<StartAnyRunBody>,
) -> Result<Response, ApiError> {
    let patience = wait.patience()?;
    let params = one_of_both(body.params, body.inputs)?;
    let company: Option<CompanyId> = match body.company_id.as_deref() {
        Some(id) => Some(id.parse().map_err(|_| ApiError::NotFound("company"))?),
        None => None,
    };
    let (id, name) = match (&body.playbook_id, &body.playbook) {
        (Some(id), None) => (Some(id.parse().map_err(|_| ApiError::NotFound("playbook"))?), None),
        (None, Some(name)) => (None, Some(name.as_str())),
        (None, None) => {
            return Err(ApiError::field("playbook_id", "is required, or the playbook's name as `playbook`"));
        }
        _ => return Err(ApiError::field("playbook", "and `playbook_id` name the same thing; send one of them")),
    };
    let mut command = caller.command(&state, digest).await?;
    let found = find_any(command.tx(), &caller, company, id, name).await?;
    started(&state, &caller, command, found, (params, 0), patience).await
}

async fn find_any(
    tx: &mut PgConnection,
    caller: &Caller,
    company: Option<CompanyId>,
    id: Option<PlaybookId>,
    name: Option<&str>,
) -> Result<(CompanyId, PlaybookId), ApiError> {
    use capx_core::store::playbooks::{self, Filter};
    let filter = Filter {
        account: Some(caller.account),
        company: company.or(caller.company),
        playbook: id,
        name,
        ..Filter::default()
    };
    let mut found = playbooks::list(tx, &filter, 2).await?;
    if found.len() > 1 {
        return Err(ApiError::field("company_id", "is required: several companies have a playbook of this name"));
    }
    let row = found.pop().ok_or(ApiError::NotFound("playbook"))?;
    if company.is_some_and(|company| company != row.company) || caller.company.is_some_and(|bound| bound != row.company)
    {
        return Err(ApiError::NotFound("playbook"));
    }
    Ok((row.company, row.playbook))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// `queued`, `running`, `suspended`, `completed`, `failed` or `cancelled`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

async fn listed(
    tx: &mut PgConnection,
    caller: &Caller,
    company: &CompanyRow,
    playbook: PlaybookId,
    query: ListQuery,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let status = match query.status.as_deref() {
        None => None,
        Some(name) => Some(RunStatus::from_name(name).ok_or_else(|| {
            let names: Vec<_> = RunStatus::ALL.iter().map(|s| s.as_str()).collect();
            ApiError::field("status", format!("must be one of {}", names.join(", ")))
        })?),
    };
    let halted = !works(&company.status);
    let statuses = status.map(|shown| {
        let stored = RunStatus::ALL.iter().copied();
        stored.filter(|stored| shown_status(*stored, halted) == shown).collect()
    });
    let filter = RunFilter { playbook, statuses, before: cursor(query.cursor.as_deref())? };
    let rows = runs::list(tx, company.company, &filter, limit + 1).await?;
    caller.list(page(rows, limit, |row| id_cursor(row.run.0), |row| RunItem::new(&row, halted)))
}

/// List a playbook's runs
///
/// Newest first.
#[utoipa::path(get, path = "/companies/{company}/playbooks/{playbook}/runs", tag = "Runs",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"), ListQuery),
    responses((status = 200, description = "A page.", body = Many<RunItem>)))]
async fn list(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_row(&mut tx, &company).await?;
    let playbook = super::playbooks::find(&mut tx, company.company, &playbook).await?.playbook;
    listed(&mut tx, &caller, &company, playbook, query).await
}

/// List any playbook's runs
///
/// The same by the playbook's id alone.
#[utoipa::path(get, path = "/playbooks/{playbook}/runs", tag = "Runs",
    params(("playbook" = String, Path, description = "`pb_…`"), ListQuery),
    responses((status = 200, description = "A page.", body = Many<RunItem>)))]
async fn list_of_account(
    State(state): Shared,
    caller: Caller,
    Path(playbook): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let id: PlaybookId = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    let mut tx = caller.read(&state).await?;
    let (company, playbook) = find_any(&mut tx, &caller, None, Some(id), None).await?;
    let company = caller.company_row(&mut tx, &company.to_string()).await?;
    listed(&mut tx, &caller, &company, playbook, query).await
}

/// Get a run
///
/// With its steps; with `wait` when it has ended or the time is up.
#[utoipa::path(get, path = "/companies/{company}/playbooks/{playbook}/runs/{run}", tag = "Runs",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"),
        ("run" = String, Path, description = "`run_…`"), WaitQuery),
    responses((status = 200, description = "The run.", body = One<Run>), (status = 304, description = "Not changed.")))]
async fn one(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook, run)): Path<(String, String, String)>,
    Query(wait): Query<WaitQuery>,
) -> Result<Response, ApiError> {
    let ids = ids(&company, &playbook, &run)?;
    caller.one(&shown(&state, &caller, ids, wait.patience()?).await?)
}

/// Get any run
///
/// The same by the run's id alone.
#[utoipa::path(get, path = "/runs/{run}", tag = "Runs",
    params(("run" = String, Path, description = "`run_…`"), WaitQuery),
    responses((status = 200, description = "The run.", body = One<Run>), (status = 304, description = "Not changed.")))]
async fn one_of_account(
    State(state): Shared,
    caller: Caller,
    Path(run): Path<String>,
    Query(wait): Query<WaitQuery>,
) -> Result<Response, ApiError> {
    let patience = wait.patience()?;
    let run: RunId = run.parse().map_err(|_| ApiError::NotFound("run"))?;
    let mut tx = caller.look_up(&state).await?;
    let found = runs::locate(&mut *tx, caller.account, run).await?;
    drop(tx);
    let (company, playbook) = found.ok_or(ApiError::NotFound("run"))?;
    caller.one(&shown(&state, &caller, (company, playbook, run), patience).await?)
}

pub(super) type Ids = (CompanyId, PlaybookId, RunId);

pub(super) fn ids(company: &str, playbook: &str, run: &str) -> Result<Ids, ApiError> {
    Ok((
        company.parse().map_err(|_| ApiError::NotFound("company"))?,
        playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?,
        run.parse().map_err(|_| ApiError::NotFound("run"))?,
    ))
}

pub(super) async fn find(
    tx: &mut PgConnection,
    caller: &Caller,
    (company, playbook, run): Ids,
) -> Result<RunRow, ApiError> {
    caller.company_id(tx, &company.to_string()).await?;
    let row = runs::get(tx, company, run).await?;
    row.filter(|row| row.playbook == playbook).ok_or(ApiError::NotFound("run"))
}

/// A run with its steps, once it has ended or the time is up. No transaction is
/// open in between.
async fn shown(state: &ApiState, caller: &Caller, ids: Ids, patience: Duration) -> Result<Run, ApiError> {
    let until = tokio::time::Instant::now() + patience;
    loop {
        let mut tx = caller.look_up(state).await?;
        let row = find(&mut tx, caller, ids).await?;
        let held = !row.status.is_terminal() && tokio::time::Instant::now() < until && !state.stopping.is_cancelled();
        if !held {
            return show(state, &mut tx, ids.0, row).await;
        }
        drop(tx);
        tokio::time::sleep(WAIT_POLL).await;
    }
}

pub(super) async fn show(
    state: &ApiState,
    tx: &mut PgConnection,
    company: CompanyId,
    row: RunRow,
) -> Result<Run, ApiError> {
    let steps = runs::steps(&mut *tx, company, row.run).await?;
    let plans = state.engine.plans.get(&mut *tx, &[(company.0, row.version.0)]).await?;
    let plan = plans.get(&row.version.0);
    let mut jobs: Vec<JobRow> = runs::job(&mut *tx, company, row.run).await?.into_iter().collect();
    if plan.is_some_and(|plan| plan.graph) && !row.status.is_terminal() {
        jobs.extend(runs::node_jobs(&mut *tx, company, row.run).await?);
    }
    let waiting_on = match shown_status(row.status, row.halted_since.is_some()) {
        RunStatus::Suspended => Some(waiting_on(&mut *tx, company, &row, &steps, &jobs).await?),
        RunStatus::Queued => {
            Some(row.started_at.map(|since| Waiting::for_its_turn(&row, Time(since))).into_iter().collect())
        }
        _ => None,
    };
    let parent_run_id = match row.called {
        true => children::caller(&mut *tx, company, row.run).await?,
        false => None,
    };
    let mut steps = plan.map(|plan| step_list(plan, &row, &steps, &jobs));
    if plan.is_some_and(|plan| plan.calls()) {
        for (step, child) in children::shown(&mut *tx, company, row.run).await? {
            let at = usize::try_from(step).ok();
            if let Some(step) = steps.as_mut().and_then(|steps| steps.get_mut(at?)) {
                step.child_run_id = Some(child);
            }
        }
    }
    let mut rubric = None;
    if plan.is_some_and(|plan| plan.grades() || !plan.limits.is_empty()) {
        for (step, told) in grades::shown(&mut *tx, company, row.run).await? {
            if step == grades::RUN {
                rubric = Some(told);
            } else if let Some(step) =
                usize::try_from(step).ok().and_then(|at| steps.as_mut().and_then(|steps| steps.get_mut(at)))
            {
                step.score = told["score"].as_f64();
                step.rubric = Some(told);
            }
        }
    }
    let item = RunItem::new(&row.item(), row.halted_since.is_some());
    Ok(Run {
        item,
        company_id: company,
        replay_of: row.replay_of,
        parent_run_id,
        params: row.params,
        steps,
        rubric,
        waiting_on,
        output: row.output,
        error: row.error,
    })
}

async fn waiting_on(
    tx: &mut PgConnection,
    company: CompanyId,
    run: &RunRow,
    steps: &[StepRow],
    jobs: &[JobRow],
) -> Result<Vec<Waiting>, ApiError> {
    let gates = approvals::pending_of_run(&mut *tx, company, run.run).await?;
    let gate = |(id, since, until): (ApprovalId, _, _)| Waiting {
        r#type: "approval",
        id: id.to_string(),
        since: Time(since),
        expires_at: Some(Time(until)),
    };
    let mut waiting: Vec<_> = gates.into_iter().map(gate).collect();
    // What else it waits for stands in the run, and since when in the step.
    let others = run.waiting_on.as_ref().and_then(Value::as_array).into_iter().flatten();
    for other in others {
        let r#type = match other["type"].as_str() {
            Some("timer") => "timer",
            Some("event") => "event",
            _ => continue,
        };
        // Of a graph it says at which step.
        let at = other["index"].as_i64();
        let job = jobs.iter().find(|job| job.kind == "timer" && at.is_none_or(|at| i64::from(job.step) == at));
        let step = job.and_then(|job| steps.iter().find(|step| step.step == job.step));
        // A pause has no row, but of a graph: it began when it was told of.
        let since = match (r#type, at) {
            ("timer", None) => runs::last_told(&mut *tx, company, run.run).await?,
            _ => step.and_then(|step| step.started_at),
        };
        if let Some(since) = since {
            waiting.push(Waiting {
                r#type,
                id: other["id"].as_str().unwrap_or_default().to_owned(),
                since: Time(since),
                expires_at: job.and_then(|job| job.due_at).map(Time),
            });
        }
    }
    if let Some(since) = run.halted_since {
        waiting.push(Waiting { r#type: "company", id: company.to_string(), since: Time(since), expires_at: None });
    }
    Ok(waiting)
}

/// The playbook's steps with what has become of each.
fn step_list(plan: &Playbook, run: &RunRow, rows: &[StepRow], jobs: &[JobRow]) -> Vec<RunStep> {
    // Of what closes a run, that which it has come to.
    let begun = |at: &usize| rows.iter().any(|row| usize::try_from(row.step) == Ok(*at));
    let steps = plan.steps.iter().enumerate().chain(plan.closing().filter(|(at, _)| begun(at)));
    steps
        .map(|(index, step)| {
            let row = rows.iter().find(|row| usize::try_from(row.step) == Ok(index));
            let job = jobs
                .iter()
                .find(|job| ["step", "timer"].contains(&job.kind.as_str()) && usize::try_from(job.step) == Ok(index));
            let items = row.and_then(|row| row.items);
            // It waits for its lanes or another run, not for a time.
            let begun = row.is_some_and(|row| row.status == StepStatus::Running.as_str());
            let called = begun && matches!(step.kind, StepKind::Playbook(_));
            let busy = called || items.is_some_and(|items| items.running > 0);
            let busy = busy && run.status == RunStatus::Running;
            RunStep {
                index,
                id: step.id.clone(),
                role: step.role.clone(),
                agent_id: row.and_then(|row| row.agent),
                action: step.action.clone(),
                closes: (index >= plan.steps.len())
                    .then(|| if step.undoes.is_some() { "compensate" } else { "finally" }),
                status: if busy { StepStatus::Running.as_str() } else { step_status(run.status, row, job) },
                cost: row.map_or(0.0, |row| row.cost.to_usd()),
                duration: row.and_then(|row| Some((row.ended_at? - row.started_at?).num_seconds().max(0))),
                attempts: job.map_or_else(|| row.map_or(0, |row| row.attempt), |job| job.attempt),
                output: row.and_then(|row| row.output.clone()),
                score: None,
                rubric: None,
                error: row.and_then(|row| row.error.clone()),
                items: items.map(Items::from),
                child_run_id: None,
                next_attempt_at: job
                    .filter(|job| job.state == "scheduled" && !busy)
                    .and_then(|job| job.due_at)
                    .map(Time),
            }
        })
        .collect()
}

/// A step's status: its own row, corrected by what its job is doing now.
fn step_status(run: RunStatus, row: Option<&StepRow>, job: Option<&JobRow>) -> &'static str {
    let stored = row.and_then(|row| StepStatus::from_name(&row.status));
    use StepStatus::{Cancelled, Completed, Failed, PendingApproval, Skipped};
    if let Some(done @ (Completed | Failed | Skipped | PendingApproval | Cancelled)) = stored {
        return done.as_str();
    }
    match (run, job.map(|job| job.state.as_str())) {
        (RunStatus::Cancelled, _) => StepStatus::Cancelled,
        (RunStatus::Failed | RunStatus::Completed, _) => StepStatus::Skipped,
        (_, Some("running")) => StepStatus::Running,
        (_, Some("scheduled")) => StepStatus::Waiting,
        _ => StepStatus::Pending,
    }
    .as_str()
}

/// Stream a run's events
///
/// Server-sent events from its first on, or from behind `Last-Event-ID`; the
/// stream ends with the run.
#[utoipa::path(get, path = "/companies/{company}/playbooks/{playbook}/runs/{run}/events", tag = "Runs",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"),
        ("run" = String, Path, description = "`run_…`")),
    responses((status = 200, description = "The stream.", body = String, content_type = "text/event-stream")))]
async fn stream(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook, run)): Path<(String, String, String)>,
    headers: HeaderMap,
) -> Result<Response, ApiError> {
    let ids = ids(&company, &playbook, &run)?;
    let mut tx = caller.read(&state).await?;
    find(&mut tx, &caller, ids).await?;
    drop(tx);
    crate::api::stream::open_run(&state, caller, ids.0, ids.2, &headers).await
}
