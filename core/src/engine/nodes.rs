//! Runs whose steps form a graph: the turn that a run takes at its junction, and the
//! commits of its nodes.
//!
//! A turn is decided from what was loaded, and written under the lease of the run's
//! own job. A node that is over takes that job away from whoever has it in hand, so
//! that a turn which has not seen the node writes nothing, and is taken again.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::advance::{self, Decided, Facts, SLEEP_MIN, place};
use super::gates::approval_of;
use super::{Engine, EngineError};
use crate::domain::event::{APPROVAL_REQUESTED, APPROVAL_RESOLVED, Event, PLAYBOOK_SUSPENDED, STEP_SKIPPED};
use crate::domain::ids::ApprovalId;
use crate::domain::plan::{Ending, FAN_LOOK, Gate, Next, Then, Turn};
use crate::domain::playbook::model::{STEP_TIMEOUT, StepKind};
use crate::domain::run::{RunStatus, StepStatus};
use crate::store::approvals::NewApproval;
use crate::store::jobs::kind;
use crate::store::nodes::{self, Held, NewNode};
use crate::store::steps::{Passing, RunChange, StepChange};
use crate::store::{approvals, events, signals, steps};

/// So many steps that were left out are told in one event.
const TOLD_MAX: usize = 50;
/// How soon a run that fails looks whether all that waited is withdrawn.
const WITHDRAWN_LOOK: Duration = Duration::from_millis(50);

/// A step that begins, and its gate.
#[derive(Debug)]
pub struct Beginning {
    node: NewNode,
    gate: Option<NewApproval>,
}

impl Facts {
    /// The junction: steps begin, or the run ends.
    pub(super) fn turn(self, turn: Turn) -> Decided {
        let Turn { skipped, begin, then } = turn;
        let mut told = Vec::new();
        if !skipped.is_empty() {
            let ids: Vec<&str> = skipped.iter().take(TOLD_MAX).map(|at| self.id_of(*at)).collect();
            told.push(Event::new(STEP_SKIPPED, json!({"steps": ids, "count": skipped.len()})));
        }
        let skipped: Vec<i32> = skipped.into_iter().map(place).collect();
        let decided = match then {
            Then::Wait => self.waits(FAN_LOOK, false, begin, told),
            Then::Suspend => self.waits(FAN_LOOK, true, begin, told),
            Then::Withdraw(steps) => {
                let withdraw = steps.into_iter().map(place).collect();
                Decided { withdraw, ..self.waits(WITHDRAWN_LOOK, false, begin, told) }
            }
            Then::End { output } => self.complete(output, None, told),
            Then::Fail(step) => {
                let (error, letter) = self.work.context.failed_with(step);
                let ending = Ending { error: Some(error), letter, ..Ending::of(RunStatus::Failed) };
                self.end(ending, None, told)
            }
        };
        let passed = Passing { skipped, ..decided.passed };
        Decided { passed, ..decided }
    }

    fn id_of(&self, at: usize) -> &str {
        self.work.context.playbook.step(at).map_or("", |step| step.id.as_str())
    }

    /// The run's own job waits at the junction.
    fn waits(self, delay: Duration, suspended: bool, begin: Vec<Next>, mut told: Vec<Event>) -> Decided {
        let begin: Vec<Beginning> = begin.into_iter().filter_map(|next| self.beginning(next)).collect();
        let mut change = RunChange::default();
        if suspended {
            let waiting = Value::Array(self.waiting(&begin));
            told.push(Event::new(PLAYBOOK_SUSPENDED, json!({"waiting_on": waiting})));
            change.status = Some(RunStatus::Suspended);
            change.waiting_on = Some(waiting.to_string());
        }
        let job = self.next_job(false, kind::STEP, None, delay, 0);
        let commit = self.commit(Some(job), change, None, told);
        Decided { begin, ..self.plain(commit) }
    }

    /// What the nodes of a run wait for, those that begin too.
    fn waiting(&self, begin: &[Beginning]) -> Vec<Value> {
        let context = &self.work.context;
        let timer = |at: usize| json!({"type": "timer", "id": self.id_of(at), "index": at});
        let sleeps = |at: &usize| matches!(context.playbook.step(*at).map(|step| &step.kind), Some(StepKind::Sleep(_)));
        let asleep = context.nodes.iter().filter(|(at, node)| node.status == StepStatus::Waiting && sleeps(at));
        let mut waiting: Vec<(usize, Value)> = asleep.map(|(at, _)| (*at, timer(*at))).collect();
        waiting.extend(context.waiting.iter().map(|(at, waiting)| (*at, waiting.clone())));
        for begun in begin {
            let at = usize::try_from(begun.node.step).unwrap_or(usize::MAX);
            match &begun.gate {
                Some(gate) => waiting.push((at, json!({"type": "approval", "id": gate.approval}))),
                None if begun.node.kind == kind::TIMER => waiting.push((at, timer(at))),
                None => {}
            }
        }
        waiting.sort_by_key(|(at, _)| *at);
        waiting.into_iter().map(|(_, waiting)| waiting).collect()
    }

    fn beginning(&self, next: Next) -> Option<Beginning> {
        let (step, kind, delay, status, gate) = match next {
            Next::Step(step) => (step, kind::STEP, Duration::ZERO, StepStatus::Pending, None),
            Next::Sleep { step, delay } => (step, kind::TIMER, delay.max(SLEEP_MIN), StepStatus::Waiting, None),
            Next::Gate(gate) => {
                let timeout = gate.approval.timeout;
                (gate.step, kind::GATE_TIMEOUT, timeout, StepStatus::PendingApproval, Some(gate))
            }
            Next::End { .. } | Next::Closed | Next::Junction => return None,
        };
        let context = &self.work.context;
        let timeout = context.playbook.step(step).map_or(STEP_TIMEOUT, |step| step.timeout);
        let agent = self.work.agent(step).map(|agent| agent.agent);
        // Of which job it is, is known when that is made.
        let gate = gate.map(|gate: Gate| approval_of(ApprovalId::new(), &gate, context, 0, agent));
        Some(Beginning { node: NewNode { step: place(step), kind, delay, timeout, status }, gate })
    }

    /// The step of a node is over: the run sees to what follows.
    pub(super) fn node_over(self, checkpoint: Option<StepChange>, events: Vec<Event>) -> Decided {
        let commit = self.commit(None, RunChange::default(), checkpoint, events);
        self.plain(commit)
    }
}

/// Whether the run's own job has to look at what a node has done: it is over, or waits
/// for something outside.
pub(super) fn wakes_run(decided: &Decided) -> bool {
    decided.commit.job.is_none() || decided.passed.waiting.is_some()
}

/// Writes an attempt of a node; false when its lease was gone.
pub(super) async fn commit(engine: &Engine, decided: &Decided) -> Result<bool, EngineError> {
    let Some(run_job) = decided.node_of else { return Ok(false) };
    let mut tx = engine.pool.begin().await?;
    if let Some(wait) = &decided.wait {
        // Before any job's.
        signals::lock(&mut tx, wait.company, &wait.name).await?;
    }
    let of = (decided.commit.company, decided.commit.run, run_job);
    match nodes::hold(&mut tx, decided.commit.lease, of, wakes_run(decided)).await? {
        Held::Lost => return Ok(false),
        Held::Over => approvals::delete_job(&mut tx, decided.commit.lease.job).await?,
        Held::Open => {
            let held = steps::commit(&mut *tx, std::slice::from_ref(&decided.commit)).await?;
            if held != [true] {
                return Ok(false);
            }
            advance::beside(&mut tx, decided).await?;
        }
    }
    tx.commit().await?;
    Ok(true)
}

/// The part of a turn that is written beside its commit.
pub(super) async fn turn(tx: &mut PgConnection, decided: &Decided) -> Result<(), EngineError> {
    let (company, run) = (decided.commit.company, decided.commit.run);
    if decided.drops {
        approvals::cancel_of(&mut *tx, company, run, "system").await?;
        signals::forget(&mut *tx, company, run, None).await?;
        nodes::drop_all(tx, company, run).await?;
    }
    if !decided.withdraw.is_empty() {
        for gate in nodes::withdraw(tx, company, run, &decided.withdraw, "system").await? {
            let resolved = json!({"approval_id": gate, "decision": "cancelled", "by": "system"});
            events::append_to_run(&mut *tx, company, run, &Event::new(APPROVAL_RESOLVED, resolved)).await?;
        }
    }
    if decided.begin.is_empty() {
        return Ok(());
    }
    let new: Vec<NewNode> = decided.begin.iter().map(|begun| begun.node.clone()).collect();
    let jobs = nodes::begin(tx, company, run, &new).await?;
    for (begun, job) in decided.begin.iter().zip(jobs) {
        let Some(gate) = &begun.gate else { continue };
        approvals::insert(&mut *tx, &NewApproval { job, ..gate.clone() }).await?;
        let requested = json!({"approval_id": gate.approval, "context": gate.context});
        events::append_to_run(&mut *tx, company, run, &Event::new(APPROVAL_REQUESTED, requested)).await?;
    }
    Ok(())
}
