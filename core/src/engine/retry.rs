//! Runs go on after a failure, and are played again.
//!
//! A retry keeps the run: what is done stays done, what a person has allowed
//! stays allowed, and the step that failed is tried anew. A replay is a new run
//! of the same version, linked to the old one, that takes over the checkpoints
//! before a step.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Map, Value, json};
use sqlx::PgConnection;

use super::advance::place as place_of;
use super::gates::waiting_on;
use super::start::{self, Beginning, Prepared, Started};
use super::{Engine, EngineError, FieldProblem};
use crate::domain::company::works;
use crate::domain::event::{APPROVAL_REQUESTED, Event, PLAYBOOK_RESUMED, PLAYBOOK_SUSPENDED};
use crate::domain::ids::{AccountId, ApprovalId, CompanyId, PlaybookId, RunId};
use crate::domain::plan::JUNCTION;
use crate::domain::playbook::model::{OnFailure, STEP_TIMEOUT, StepKind};
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::playbook::{Playbook, Step};
use crate::domain::run::{RunStatus, StepStatus};
use crate::store::jobs::kind;
use crate::store::runs::{Retry, StepRow};
use crate::store::slots::{self, Group};
use crate::store::{approvals, children, events, fans, grades, nodes, runs, steps, tenants};

/// Lets a failed run go on at its failed step, in the caller's transaction, who
/// wakes workers after it. A gate that was refused or ran out is asked for
/// again; one that was opened stays open.
pub async fn retry_run(
    engine: &Engine,
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    by: &str,
) -> Result<(), EngineError> {
    let status = runs::lock_with_job(tx, company, run).await?.ok_or(EngineError::NotFound("run"))?;
    if status != RunStatus::Failed {
        return Err(EngineError::Conflict(format!("the run is {}; only a failed one is retried", status.as_str())));
    }
    let company_status = tenants::company_status(&mut *tx, company).await?.unwrap_or_default();
    if !works(&company_status) {
        return Err(EngineError::Conflict(format!("the company is {company_status}; nothing is retried meanwhile")));
    }
    let row = runs::get(&mut *tx, company, run).await?.ok_or(EngineError::NotFound("run"))?;
    let step = runs::failed_step(tx, company, run)
        .await?
        .ok_or_else(|| EngineError::Conflict("the run failed at no step; replay it".into()))?;
    let plan = start::plan_of(engine, &mut *tx, company, row.version).await?;
    start::may_run(&mut *tx, company, &plan).await?;
    has_slot(tx, company, run, &plan).await?;
    let planned = plan.step(usize::try_from(step).unwrap_or(usize::MAX));
    let first_closing = place_of(plan.steps.len());
    let closing = step >= first_closing;
    if !closing {
        reopen(tx, company, run, &plan).await?;
    }
    let turns = plan.graph && !closing;
    // The junction of a graph asks by itself.
    let refused = match turns {
        true => None,
        false => approvals::latest_of(tx, company, run, step).await?.filter(|(_, status)| status != "approved"),
    };
    let gate = refused.map(|(old, _)| (old, ApprovalId::new()));
    let patience = planned.map_or(Duration::ZERO, |step| step.gate().timeout);
    let waiting = gate.map(|(_, id)| waiting_on(id));
    let retry = Retry {
        failed: step,
        step: if closing || turns { JUNCTION } else { step },
        reopens: !closing,
        kind: if gate.is_some() { kind::GATE_TIMEOUT } else { kind::STEP },
        delay: if gate.is_some() { patience } else { Duration::ZERO },
        timeout: planned.map_or(STEP_TIMEOUT, |step| step.timeout),
        waiting_on: waiting.as_ref().map(Value::to_string),
    };
    let mut anew = vec![step];
    if turns {
        // Several may have failed before the run had.
        let aborts = |(_, step): &(usize, &Step)| step.on_failure == OnFailure::Abort;
        let again: Vec<i32> = plan.steps.iter().enumerate().filter(aborts).map(|(at, _)| place_of(at)).collect();
        anew.extend(nodes::reset(tx, company, run, &again).await?);
    }
    for step in &anew {
        fans::forget(tx, company, run, *step).await?;
    }
    if plan.grades() {
        grades::reopen(tx, company, run, &anew).await?;
    }
    children::forget(tx, company, run).await?;
    let job = runs::retry(tx, company, run, &retry).await?.ok_or(EngineError::NotFound("run"))?;
    // What is done anew does not count twice.
    steps::recount(&mut *tx, &[(company, run)]).await?;
    let resumed = json!({"step": planned.map(|step| &step.id), "index": step, "by": by});
    events::append_to_run(&mut *tx, company, run, &Event::new(PLAYBOOK_RESUMED, resumed)).await?;
    if let Some((old, id)) = gate {
        let context = approvals::ask_again(tx, company, old, id, job, patience).await?;
        let requested = Event::new(APPROVAL_REQUESTED, json!({"approval_id": id, "context": context}));
        events::append_to_run(&mut *tx, company, run, &requested).await?;
        let suspended = Event::new(PLAYBOOK_SUSPENDED, json!({"waiting_on": waiting}));
        events::append_to_run(&mut *tx, company, run, &suspended).await?;
    }
    Ok(())
}

/// A run that goes on needs a slot like one that begins.
async fn has_slot(tx: &mut PgConnection, company: CompanyId, run: RunId, plan: &Playbook) -> Result<(), EngineError> {
    let (Some(rule), Some((playbook, key))) = (&plan.concurrency, slots::group_of(tx, company, run).await?) else {
        return Ok(());
    };
    let group = Group { company, playbook, key: &key };
    slots::lock(tx, group).await?;
    if slots::count(tx, group).await?.0 < u64::from(rule.limit) {
        return Ok(());
    }
    let message = format!("as many runs are under way with the concurrency key `{key}` as may be; retry it after them");
    Err(EngineError::Conflict(message))
}

/// The steps of a run go on: what has closed it will be done again. Where a step was
/// undone, it cannot.
async fn reopen(tx: &mut PgConnection, company: CompanyId, run: RunId, plan: &Playbook) -> Result<(), EngineError> {
    if plan.closing.is_empty() {
        return Ok(());
    }
    if let Some(undone) = undone(plan, &runs::steps(&mut *tx, company, run).await?, |_| true) {
        return Err(EngineError::Conflict(format!(
            "the step `{undone}` was undone when the run failed; replay the run"
        )));
    }
    Ok(runs::forget_closing(tx, company, run, place_of(plan.steps.len())).await?)
}

/// A step, of those that are to be kept, that a run has undone, or has tried to.
fn undone<'a>(plan: &'a Playbook, done: &[StepRow], kept: impl Fn(usize) -> bool) -> Option<&'a str> {
    let begun = |at: usize| done.iter().any(|row| usize::try_from(row.step) == Ok(at));
    let undone = plan.closing().filter(|(at, _)| begun(*at)).filter_map(|(_, step)| step.undoes);
    undone.filter(|of| kept(*of)).find_map(|of| plan.step(of)).map(|step| step.id.as_str())
}

/// Where a replay begins.
#[derive(Debug, Clone)]
pub enum FromStep {
    /// At the step with this id.
    Id(String),
    /// At the step in this place, from 0.
    Index(usize),
}

/// Which run is played again, and how.
#[derive(Debug)]
pub struct Replay {
    /// The run.
    pub of: RunId,
    /// Where it begins; without, at the first step.
    pub from: Option<FromStep>,
    /// Parameters that take the place of the old run's.
    pub params: Map<String, Value>,
}

/// Plays a run again as a new one of the same version, in the caller's
/// transaction, who wakes workers after it.
pub async fn replay_run(
    engine: &Engine,
    tx: &mut PgConnection,
    account: AccountId,
    (company, playbook): (CompanyId, PlaybookId),
    replay: Replay,
) -> Result<Started, EngineError> {
    let (_, policy) = start::may_start(&mut *tx, Some(account), company, playbook).await?;
    let old = runs::get(&mut *tx, company, replay.of).await?.filter(|old| old.playbook == playbook);
    let old = old.ok_or(EngineError::NotFound("run"))?;
    let plan = start::plan_of(engine, &mut *tx, company, old.version).await?;
    start::may_run(&mut *tx, company, &plan).await?;
    let from = place(&plan, replay.from.as_ref())?;
    let done = runs::steps(&mut *tx, company, replay.of).await?;
    let Before { outputs, failures, kept } = match replay.from {
        Some(_) => before(&plan, &done, from)?,
        // From the beginning nothing is kept, of a graph neither.
        None => Before::default(),
    };
    let params = match old.params {
        Value::Object(mut params) if !replay.params.is_empty() => {
            params.extend(replay.params);
            start::checked_params(&plan, params)?
        }
        // As they were checked then.
        params => params,
    };
    let scores = grades::shown(&mut *tx, company, replay.of).await?.into_iter();
    let scores = scores.filter_map(|(step, told)| Some((usize::try_from(step).ok()?, told["score"].clone())));
    start::policy_allows(&policy, &plan)?;
    let scores = scores.collect();
    let beginning = Beginning { step: from, outputs, failures, scores, replay_of: Some(replay.of), policy };
    let new: Prepared = start::prepare((company, playbook, old.version), plan, params, "replay", beginning);
    // Before the run's own rows, of which the gate's may be one.
    runs::copy_checkpoints(tx, company, replay.of, new.run(), &kept).await?;
    steps::recount(&mut *tx, &[(company, new.run())]).await?;
    if new.grades() {
        grades::copy(tx, company, replay.of, new.run(), &kept).await?;
    }
    start::start_in(tx, new).await
}

/// The place of the step to begin with.
fn place(plan: &Playbook, from: Option<&FromStep>) -> Result<usize, EngineError> {
    let wrong = |message: String| EngineError::Invalid(vec![FieldProblem::new("from_step", message)]);
    match from {
        None => Ok(0),
        Some(FromStep::Index(at)) if *at < plan.steps.len() => Ok(*at),
        Some(FromStep::Index(_)) => Err(wrong(format!("the run's version has {} steps, from 0", plan.steps.len()))),
        Some(FromStep::Id(id)) => plan.step_index(id).filter(|at| *at < plan.steps.len()).ok_or_else(|| {
            let ids = plan.steps.iter().map(|step| step.id.as_str());
            let hint = did_you_mean(id, ids).unwrap_or_else(|| "it names a step of the run's version".into());
            wrong(format!("no such step; {hint}"))
        }),
    }
}

/// What the steps before a place have left.
#[derive(Default)]
struct Before {
    outputs: HashMap<usize, Value>,
    failures: HashMap<usize, Value>,
    /// The steps whose checkpoints are taken over. A `goto` jumps as often again.
    kept: Vec<i32>,
}

/// Whether a replay from a place may take over what a step has done.
fn keeps(plan: &Playbook, from: usize, at: usize) -> bool {
    match plan.graph {
        true => at != from && !plan.comes_before(from, at),
        false => at < from,
    }
}

/// All the steps before a place must be over: done, left out, or failed and gone
/// past.
fn before(plan: &Playbook, done: &[StepRow], from: usize) -> Result<Before, EngineError> {
    if let Some(undone) = undone(plan, done, |at| keeps(plan, from, at)) {
        let message = format!("the step `{undone}` was undone in that run; replay from it, or before");
        return Err(EngineError::Conflict(message));
    }
    let mut before = Before { outputs: HashMap::new(), failures: HashMap::new(), kept: Vec::new() };
    let kept = plan.steps.iter().enumerate().filter(|(at, _)| keeps(plan, from, *at));
    for (at, step) in kept {
        if matches!(step.kind, StepKind::Goto { .. }) {
            continue;
        }
        let row = done.iter().find(|row| usize::try_from(row.step) == Ok(at));
        let status = row.and_then(|row| StepStatus::from_name(&row.status));
        match (row, status) {
            (Some(row), Some(StepStatus::Completed)) if step.last_use.is_some() => {
                before.outputs.insert(at, row.output.clone().unwrap_or(Value::Null));
            }
            (Some(_), Some(StepStatus::Completed | StepStatus::Skipped)) => {}
            (Some(row), Some(StepStatus::Failed)) if step.on_failure != OnFailure::Abort => {
                before.failures.insert(at, row.error.clone().unwrap_or(Value::Null));
            }
            // What the step does not need is done anew where it is not over.
            _ if plan.graph && !plan.comes_before(at, from) => continue,
            _ => {
                let message = format!("step `{}` has not completed in that run; replay from it, or before", step.id);
                return Err(EngineError::Conflict(message));
            }
        }
        before.kept.push(place_of(at));
    }
    Ok(before)
}
