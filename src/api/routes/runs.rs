//! Runs: start, list, get, and waiting for one to end.

use std::time::Duration;

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::{get, post};
use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::playbook::Playbook;
use capx_core::domain::run::{RunStatus, StepStatus};
use capx_core::engine::start::{Started, start_run};
use capx_core::store::approvals::{self, Filter};
use capx_core::store::runs::{self, JobRow, RunRow, StepRow};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::Routes;
use crate::api::auth::{Caller, PlaybooksRead, PlaybooksWrite};
use crate::api::body::{Body, Params, Path, limit};
use crate::api::reply::{cursor, page, time};
use crate::api::{ApiError, ApiState, Shared};

/// The longest that an answer is held for the end of a run.
const WAIT_MAX: Duration = Duration::from_secs(60);
/// Between two looks at a run that is waited for.
const WAIT_POLL: Duration = Duration::from_millis(100);

pub(in crate::api) fn routes() -> Routes {
    Routes::new()
        .route("/companies/{company}/playbooks/{playbook}/run", post(start))
        .route("/companies/{company}/playbooks/{playbook}/runs", get(list))
        .route("/companies/{company}/playbooks/{playbook}/runs/{run}", get(one))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct StartBody {
    params: Option<Map<String, Value>>,
    /// The guide's word for the same.
    inputs: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct WaitParams {
    wait: Option<u64>,
}

impl WaitParams {
    fn patience(&self) -> Result<Duration, ApiError> {
        let wait = Duration::from_secs(self.wait.unwrap_or(0));
        if wait > WAIT_MAX {
            return Err(ApiError::field("wait", format!("must be from 0 to {} seconds", WAIT_MAX.as_secs())));
        }
        Ok(wait)
    }
}

async fn start(
    State(state): Shared,
    caller: Caller<PlaybooksWrite>,
    Path((company, playbook)): Path<(String, String)>,
    Params(wait): Params<WaitParams>,
    Body(body): Body<StartBody>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?.company;
    let playbook: PlaybookId = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    let patience = wait.patience()?;
    let params = match (body.params, body.inputs) {
        (Some(_), Some(_)) => return Err(ApiError::field("inputs", "means the same as `params`; send one of them")),
        (params, inputs) => params.or(inputs).unwrap_or_default(),
    };
    let started = start_run(&state.engine, company, playbook, params, "manual").await?;
    let data = if patience.is_zero() {
        brief(playbook, &started)
    } else {
        // The run is committed: an error now would make the client start
        // another one.
        let shown = show(&state, &caller, company, playbook, started.run, patience).await;
        shown.unwrap_or_else(|_| brief(playbook, &started))
    };
    caller.reply(&state, StatusCode::CREATED, 2, data).await
}

/// What was started, whatever it has come to in the meantime.
fn brief(playbook: PlaybookId, started: &Started) -> Value {
    json!({
        "run_id": started.run, "playbook_id": playbook, "status": started.status, "params": started.params,
        "started_at": time(started.at),
    })
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
    caller: Caller<PlaybooksRead>,
    Path((company, playbook)): Path<(String, String)>,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?.company;
    let playbook: PlaybookId = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    super::playbooks::find(&state, company, playbook).await?;
    let limit = limit(params.limit, 25, 100)?;
    let status = match params.status.as_deref() {
        None => None,
        Some(name) => Some(RunStatus::from_name(name).ok_or_else(|| {
            let names: Vec<_> = RunStatus::ALL.iter().map(|s| s.as_str()).collect();
            ApiError::field("status", format!("must be one of {}", names.join(", ")))
        })?),
    };
    let before = cursor(params.cursor.as_deref())?;
    let rows = runs::list(&state.engine.pool, company, playbook, status, before, limit + 1).await?;
    let page = page(rows, limit, |row| row.run.0, |row| summary(&row));
    caller.list(&state, page).await
}

/// What every form of a run shows.
fn summary(row: &RunRow) -> Value {
    json!({
        "run_id": row.run, "playbook_id": row.playbook, "status": row.status, "cost": row.cost.to_usd(),
        "total_cost": row.cost.to_usd(), "duration": row.duration_s, "started_at": row.started_at.map(time),
        "completed_at": row.ended_at.map(time),
    })
}

async fn one(
    State(state): Shared,
    caller: Caller<PlaybooksRead>,
    Path((company, playbook, run)): Path<(String, String, String)>,
    Params(wait): Params<WaitParams>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?.company;
    let playbook: PlaybookId = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    let run: RunId = run.parse().map_err(|_| ApiError::NotFound("run"))?;
    let data = show(&state, &caller, company, playbook, run, wait.patience()?).await?;
    caller.reply(&state, StatusCode::OK, 1, data).await
}

/// A run with its steps, once it has ended or the time is up.
async fn show<S>(
    state: &ApiState,
    caller: &Caller<S>,
    company: CompanyId,
    playbook: PlaybookId,
    run: RunId,
    patience: Duration,
) -> Result<Value, ApiError> {
    let pool = &state.engine.pool;
    let until = tokio::time::Instant::now() + patience;
    let row = loop {
        let row = runs::get(pool, company, run)
            .await?
            .filter(|row| row.playbook == playbook)
            .ok_or(ApiError::NotFound("run"))?;
        let held = !row.status.is_terminal() && tokio::time::Instant::now() < until && !state.stopping.is_cancelled();
        if !held {
            break row;
        }
        tokio::time::sleep(WAIT_POLL).await;
    };
    let plans = state.engine.plans.get(pool, &[(company.0, row.version.0)]).await?;
    let steps = runs::steps(pool, company, run).await?;
    let job = runs::job(pool, company, run).await?;
    let mut data = summary(&row);
    data["params"] = row.params.clone();
    if let Some(plan) = plans.get(&row.version.0) {
        data["steps"] = step_list(plan, &row, &steps, job.as_ref());
    }
    if row.status == RunStatus::Suspended {
        data["waiting_on"] = waiting_on(state, caller, company, run).await?;
    }
    if let Some(output) = row.output {
        data["output"] = output;
    }
    if let Some(error) = row.error {
        data["error"] = error;
    }
    Ok(data)
}

async fn waiting_on<S>(
    state: &ApiState,
    caller: &Caller<S>,
    company: CompanyId,
    run: RunId,
) -> Result<Value, ApiError> {
    let filter = Filter { company: Some(company), run: Some(run), status: Some("pending"), ..Filter::default() };
    let gates = approvals::list(&state.engine.pool, caller.account, filter, 100).await?;
    Ok(gates
        .into_iter()
        .map(|gate| {
            json!({
                "type": "approval", "id": gate.approval, "since": time(gate.proposed_at),
                "expires_at": time(gate.expires_at),
            })
        })
        .collect())
}

/// The playbook's steps with what has become of each.
fn step_list(plan: &Playbook, run: &RunRow, rows: &[StepRow], job: Option<&JobRow>) -> Value {
    plan.steps
        .iter()
        .enumerate()
        .map(|(index, step)| {
            let row = rows.iter().find(|row| usize::try_from(row.step) == Ok(index));
            let job = job.filter(|job| job.kind == "step" && usize::try_from(job.step) == Ok(index));
            let status = step_status(run.status, row, job);
            let duration = row.and_then(|r| Some((r.ended_at? - r.started_at?).num_seconds().max(0)));
            let mut data = json!({
                "index": index, "id": step.id, "role": step.role, "agent_id": row.and_then(|r| r.agent),
                "action": step.action, "status": status, "cost": row.map_or(0.0, |r| r.cost.to_usd()),
                "duration": duration, "attempts": job.map_or_else(|| row.map_or(0, |r| r.attempt), |j| j.attempt),
                "output": row.and_then(|r| r.output.clone()),
            });
            if let Some(error) = row.and_then(|r| r.error.clone()) {
                data["error"] = error;
            }
            if let Some(job) = job.filter(|job| job.state == "scheduled") {
                data["next_attempt_at"] = time(job.due_at).into();
            }
            data
        })
        .collect()
}

/// A step's status: its own row, corrected by what its job is doing now.
fn step_status(run: RunStatus, row: Option<&StepRow>, job: Option<&JobRow>) -> &'static str {
    let stored = row.and_then(|row| StepStatus::from_name(&row.status));
    if let Some(done @ (StepStatus::Completed | StepStatus::Failed | StepStatus::PendingApproval)) = stored {
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
