//! Gates: a person's word before a step.
//!
//! While a gate is shut, the run's one job is the gate's timer, due when its
//! time ends; nothing else is held. A decision turns that job back into the
//! step's, or ends the run, in one transaction with its event. Two decisions,
//! or a decision and the timer, meet at the job's row lock: one wins.

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;

use super::claim::StepWork;
use super::{Engine, EngineError, repeating};
use crate::domain::audit::Entry;
use crate::domain::digest::hex;
use crate::domain::event::{
    APPROVAL_ESCALATED, APPROVAL_REMINDER, APPROVAL_REQUESTED, APPROVAL_RESOLVED, Event, PLAYBOOK_FAILED,
    PLAYBOOK_RESUMED,
};
use crate::domain::ids::{AccountId, AgentId, ApprovalId, CompanyId, RunId};
use crate::domain::plan::{Gate, RunContext, Stage};
use crate::domain::playbook::model::{APPROVAL_TIMEOUT, OnTimeout, STEP_TIMEOUT, Step};
use crate::failpoint;
use crate::store::approvals::{ApprovalRow, GateJob, NewApproval};
use crate::store::jobs::Lease;
use crate::store::{approvals, audit, events, grades, runs, tenants};

/// What a person says.
#[derive(Debug, Clone)]
pub enum Verdict {
    /// The step may run.
    Approve {
        /// Said with it.
        note: Option<String>,
        /// The arguments that the tool is given instead, where it is about a call of one.
        params: Option<Map<String, Value>>,
    },
    /// It may not; the run fails with the feedback.
    Reject {
        /// Why.
        feedback: String,
    },
}

impl Verdict {
    fn status(&self) -> &'static str {
        match self {
            Self::Approve { .. } => "approved",
            Self::Reject { .. } => "rejected",
        }
    }

    fn words(&self) -> Option<&str> {
        match self {
            Self::Approve { note, .. } => note.as_deref(),
            Self::Reject { feedback } => Some(feedback),
        }
    }
}

/// How a suspended run says what it waits for. When that began and ends
/// stands in the approval, by the database's clock.
pub(crate) fn waiting_on(approval: ApprovalId) -> Value {
    json!([{"type": "approval", "id": approval}])
}

/// The row of a gate.
pub(crate) fn approval_of(
    id: ApprovalId,
    gate: &Gate,
    context: &RunContext,
    job: i64,
    agent: Option<AgentId>,
) -> NewApproval {
    // A gate is made for a step that is there.
    let step = &context.playbook.steps[gate.step];
    NewApproval {
        approval: id,
        company: context.company,
        run: context.run,
        step: i32::try_from(gate.step).unwrap_or(i32::MAX),
        job,
        agent,
        role: step.role.clone(),
        action: step.action.clone(),
        playbook: context.playbook.name.clone(),
        step_name: step.id.clone(),
        context: gate.context.clone(),
        digest: gate.digest,
        timeout: gate.approval.timeout,
        reviewers: gate.approval.reviewers.clone(),
        on_timeout: gate.approval.on_timeout.as_str(),
        escalates_after: context.policy.escalates_after(),
        call: gate.call.clone(),
        in_list: context.item.is_some(),
    }
}

/// A person is asked about a call of an item's agent: the item's job waits for that, the others go
/// on. False when the lease is gone.
pub async fn ask_in_list(engine: &Engine, work: &StepWork, lease: Lease, gate: &Gate) -> Result<bool, EngineError> {
    let mut tx = engine.pool.begin().await?;
    if !approvals::park_item(&mut tx, lease, gate.approval.timeout).await? {
        return Ok(false);
    }
    let id = ApprovalId::new();
    let agent = work.agent(gate.step).map(|agent| agent.agent);
    approvals::insert(&mut *tx, &approval_of(id, gate, &work.context, lease.job, agent)).await?;
    let requested = Event::new(APPROVAL_REQUESTED, json!({"approval_id": id, "context": gate.context}));
    events::append_to_run(&mut *tx, work.context.company, work.context.run, &requested).await?;
    tx.commit().await?;
    Ok(true)
}

async fn find(
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    id: ApprovalId,
) -> Result<ApprovalRow, EngineError> {
    approvals::get(tx, account, bound, id).await?.ok_or(EngineError::NotFound("approval"))
}

/// Decides a gate in the caller's transaction, who wakes workers after it. The
/// same decision again changes nothing; the other one, or one after the end of
/// its time, is a conflict that says who was first.
pub async fn decide(
    engine: &Engine,
    tx: &mut PgConnection,
    account: AccountId,
    bound: Option<CompanyId>,
    id: ApprovalId,
    by: &str,
    verdict: &Verdict,
) -> Result<ApprovalRow, EngineError> {
    let gate = find(tx, account, bound, id).await?;
    if gate.status == "pending" {
        let (step, goes_on) = step_of(engine, tx, gate.company, gate.run, gate.step).await?;
        let goes_on = goes_on || gate.call.is_some();
        let edited = match verdict {
            Verdict::Approve { params: Some(params), .. } => Some(edit(&gate, params)?),
            _ => None,
        };
        let words = verdict.words();
        let decision = Decision { step, goes_on, gate, lease: None, by, status: verdict.status(), words, edited };
        apply(tx, &decision).await?;
    }
    // Ours, or that of whoever was first.
    let gate = find(tx, account, bound, id).await?;
    if gate.status == verdict.status() {
        return Ok(gate);
    }
    if gate.status == "pending" {
        return Err(EngineError::Conflict("the approval's time is over".into()));
    }
    let at = gate.decided_at.map(|at: DateTime<Utc>| at.format(" at %FT%TZ").to_string()).unwrap_or_default();
    Err(EngineError::Conflict(format!("the approval was {} already{at}", gate.status)))
}

/// A decision about a pending gate, with all that it takes to apply it: a
/// transaction must not wait for another connection.
struct Decision<'a> {
    gate: ApprovalRow,
    step: Option<Step>,
    /// The run does not end with a refusal.
    goes_on: bool,
    lease: Option<Lease>,
    by: &'a str,
    status: &'a str,
    words: Option<&'a str>,
    edited: Option<Value>,
}

/// What a tool is given instead of what was asked about.
fn edit(gate: &ApprovalRow, params: &Map<String, Value>) -> Result<Value, EngineError> {
    match gate.call {
        Some(_) => Ok(Value::Object(params.clone())),
        None => Err(EngineError::Conflict(
            "only the arguments of a tool's call can be edited; reject the step with feedback, or approve it as it is"
                .into(),
        )),
    }
}

/// Applies a decision to a pending gate; false when it is too late.
async fn apply(tx: &mut PgConnection, decision: &Decision<'_>) -> Result<bool, EngineError> {
    let Decision { gate, step, goes_on, lease, by, status, words, edited } = decision;
    let Some(job) = approvals::lock_gate_job(tx, gate.job, *lease).await? else { return Ok(false) };
    let said = (*status, *words, edited.as_ref());
    if !approvals::decide(tx, gate.company, gate.approval, by, said).await? {
        return Ok(false);
    }
    let resolved = Event::new(
        APPROVAL_RESOLVED,
        json!({"approval_id": gate.approval, "decision": status, "by": by, "feedback": words, "edited": edited}),
    );
    events::append_to_run(&mut *tx, gate.company, gate.run, &resolved).await?;
    let decided = json!({
        "approval_id": gate.approval, "run_id": gate.run, "step": gate.step_name, "agent_id": gate.agent,
        "action": gate.context.get("tool").cloned().unwrap_or_else(|| gate.action.as_str().into()), "decision": status,
        "words": words, "edited": edited, "digest": hex(&gate.digest), "estimated_cost": gate.context.get("estimated_cost"),
    });
    audit::append(tx, gate.company, &Entry::new("approval.resolved", *by, decided)).await?;
    if is_of_draft(gate) {
        let stage = match *status {
            "approved" => Stage::Accepted,
            "rejected" => Stage::Rejected,
            _ => Stage::Expired,
        };
        grades::settle(tx, gate.company, gate.run, gate.step, stage, *words).await?;
    }
    // A refusal is an attempt that fails, where it is not the end of the run.
    if *status == "approved" || *goes_on {
        let timeout = step.as_ref().map_or(STEP_TIMEOUT, |step| step.timeout);
        approvals::release_gate_job(tx, gate.job, timeout).await?;
        if job == GateJob::OfItem {
            return Ok(true);
        }
        let resumed = Event::new(PLAYBOOK_RESUMED, json!({"approval_id": gate.approval}));
        events::append_to_run(&mut *tx, gate.company, gate.run, &resumed).await?;
        let reviewed = *status == "approved" && gate.call.is_none();
        approvals::resume_run(tx, gate.company, gate.run, gate.step, reviewed).await?;
        return Ok(true);
    }
    let message = match words {
        Some(words) => format!("the approval was {status}: {words}"),
        None => format!("the approval was {status}"),
    };
    let error = json!({
        "code": "governance", "message": message, "step": gate.step_name, "index": gate.step,
        "feedback": words, "approval_id": gate.approval,
    });
    let failed = Event::new(PLAYBOOK_FAILED, json!({"error": error}));
    events::append_to_run(&mut *tx, gate.company, gate.run, &failed).await?;
    approvals::delete_job(tx, gate.job).await?;
    Ok(approvals::fail_run(tx, gate.company, gate.run, gate.step, &error).await?)
}

/// Whether it is about what a step has said, and not about whether it may begin.
fn is_of_draft(gate: &ApprovalRow) -> bool {
    gate.context.get("rubric").is_some()
}

/// The step that a gate stands before, by the version the run is pinned to, and
/// whether the run goes on when the gate stays shut.
async fn step_of(
    engine: &Engine,
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    step: i32,
) -> Result<(Option<Step>, bool), EngineError> {
    let Some(row) = runs::get(&mut *tx, company, run).await? else { return Ok((None, false)) };
    let plans = engine.plans.get(tx, &[(company.0, row.version.0)]).await?;
    let index = usize::try_from(step).unwrap_or(usize::MAX);
    let plan = plans.get(&row.version.0);
    Ok((plan.and_then(|plan| plan.step(index)).cloned(), plan.is_some_and(|plan| plan.takes_refusals(index))))
}

/// Reminds people of gates that wait for long, and lets anybody decide where the policy says
/// so.
pub async fn remind(engine: &Engine) -> Result<(), EngineError> {
    approvals::cancel_orphans(&engine.pool).await?;
    loop {
        let mut tx = engine.pool.begin().await?;
        let reminders = approvals::take_reminders(&mut tx).await?;
        for reminder in &reminders {
            let told = json!({
                "approval_id": reminder.approval, "run_id": reminder.run, "percent": reminder.percent,
                "expires_at": reminder.expires_at, "reviewers": reminder.reviewers,
            });
            let name = if reminder.escalated { APPROVAL_ESCALATED } else { APPROVAL_REMINDER };
            events::append(&mut *tx, reminder.company, &[Event::new(name, told)]).await?;
        }
        tx.commit().await?;
        if reminders.len() < approvals::REMIND_MAX as usize {
            return Ok(());
        }
    }
}

/// A gate's time is over: it decides itself, as its step says. False when a
/// person was quicker.
pub async fn expire(
    engine: &Engine,
    lease: Lease,
    company: CompanyId,
    run: RunId,
    step: i32,
) -> Result<bool, EngineError> {
    let done = repeating(|| expire_once(engine, lease, company, run, step)).await?;
    engine.waker.wake();
    Ok(done)
}

/// Nobody has decided in time: anybody may now.
async fn escalate(
    engine: &Engine,
    gate: &ApprovalRow,
    lease: Lease,
    timeout: std::time::Duration,
) -> Result<bool, EngineError> {
    let mut tx = engine.pool.begin().await?;
    if approvals::lock_gate_job(&mut tx, gate.job, Some(lease)).await?.is_none()
        || !approvals::escalate(&mut tx, gate.company, gate.approval, lease, timeout).await?
    {
        return Ok(false);
    }
    let told = json!({"approval_id": gate.approval, "reviewers": gate.reviewers});
    events::append_to_run(&mut *tx, gate.company, gate.run, &Event::new(APPROVAL_ESCALATED, told)).await?;
    tx.commit().await?;
    Ok(true)
}

async fn expire_once(
    engine: &Engine,
    lease: Lease,
    company: CompanyId,
    run: RunId,
    step: i32,
) -> Result<bool, EngineError> {
    let Some(id) = approvals::pending_of(&engine.pool, company, run, (step, lease.job)).await? else {
        return Ok(false);
    };
    let Some(account) = tenants::account_of(&engine.pool, company).await? else { return Ok(false) };
    let mut connection = engine.pool.acquire().await?;
    let gate = find(&mut connection, account, Some(company), id).await?;
    let (step, goes_on) = step_of(engine, &mut connection, company, run, step).await?;
    drop(connection);
    let goes_on = goes_on || gate.call.is_some();
    // What was made before that was stored says so in its step.
    let on_timeout = gate.on_timeout.or_else(|| step.as_ref().map(|step| step.gate().on_timeout));
    if let (Some(OnTimeout::Escalate), None) = (on_timeout, gate.escalated_at) {
        let time = (gate.expires_at - gate.proposed_at).to_std().unwrap_or(APPROVAL_TIMEOUT);
        return escalate(engine, &gate, lease, time).await;
    }
    let (status, words) = match on_timeout {
        Some(OnTimeout::Approve) => ("approved", "nobody decided in time; the step is approved by its own rule"),
        _ => ("expired", "nobody decided in time"),
    };
    let decision =
        Decision { gate, step, goes_on, lease: Some(lease), by: "system", status, words: Some(words), edited: None };
    let mut tx = engine.pool.begin().await?;
    let applied = apply(&mut tx, &decision).await?;
    if applied {
        if failpoint::reach("expire.before_commit").await {
            return Err(EngineError::Conflict("failpoint".into()));
        }
        tx.commit().await?;
        failpoint::reach("expire.after_commit").await;
    }
    Ok(applied)
}
