//! What closes a run when its steps are over: it undoes what it has done, where it did
//! not end well, the last step first, and does what is done in any case. Each of
//! that is a step like any other, and one that fails does not hold up the others.

use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{DeadReason, Next, Passed, RunContext, Walk};
use crate::domain::playbook::expr::Budget;
use crate::domain::playbook::model::{OnFailure, Playbook};
use crate::domain::run::{RunStatus, StepStatus};

/// What a run comes to once it is closed, as it is stored meanwhile.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ending {
    /// Completed, failed or cancelled.
    pub status: RunStatus,
    /// The run's output.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub output: Option<Value>,
    /// Why it failed.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<Value>,
    /// What goes to the dead letters.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub letter: Option<Letter>,
    /// Who cancelled it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub by: Option<String>,
}

/// What a dead letter says of the attempt that was the last.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Letter {
    /// Why the step gave up.
    pub reason: DeadReason,
    /// Tries charged.
    pub attempt: i32,
    /// Deaths of workers.
    pub crash_count: i32,
}

impl Ending {
    /// Of a run whose steps have ended so.
    pub fn of(status: RunStatus) -> Self {
        Self { status, output: None, error: None, letter: None, by: None }
    }

    /// Why the run does not end well, for what closes it; null where it does.
    pub fn told_error(&self) -> Value {
        match (&self.error, self.status) {
            (Some(error), _) => error.clone(),
            (None, RunStatus::Cancelled) => json!({"code": "cancelled", "message": "the run was cancelled"}),
            (None, _) => Value::Null,
        }
    }
}

impl Playbook {
    /// Whether a run whose steps have ended so may still have something to do.
    pub fn closes(&self, status: RunStatus) -> bool {
        self.closing.iter().any(|step| step.undoes.is_none() || status != RunStatus::Completed)
    }
}

impl RunContext {
    /// What closes the run next.
    pub(super) fn close(&mut self) -> Walk {
        let mut passed = Vec::new();
        let ended_well = self.ending.as_ref().is_some_and(|ending| ending.status == RunStatus::Completed);
        if let Some(undone) = self.undo.last().filter(|_| !ended_well)
            && let Some((at, _)) = self.playbook.closing().find(|(_, step)| step.undoes == Some(*undone))
        {
            return Walk { passed, next: Next::Step(at) };
        }
        let playbook = std::sync::Arc::clone(&self.playbook);
        let mut budget = Budget::default();
        for (at, step) in playbook.closing().filter(|(_, step)| step.undoes.is_none()) {
            if self.closed.contains_key(&at) {
                continue;
            }
            // One that gives no value is tried, and fails with the reason.
            if self.holds_within(step, &mut budget).unwrap_or(true) {
                return Walk { passed, next: Next::Step(at) };
            }
            self.closed.insert(at, StepStatus::Skipped);
            passed.push(Passed::Skipped(at));
        }
        Walk { passed, next: Next::Closed }
    }

    /// A step that closes the run is over.
    pub(super) fn note_closed(&mut self, at: usize, status: StepStatus) {
        if self.ending.is_none() {
            return;
        }
        self.closed.insert(at, status);
        let undone = self.playbook.step(at).and_then(|step| step.undoes);
        self.undo.retain(|step| Some(*step) != undone);
    }

    /// What the run has come to when all is done that closes it: a failure of that is
    /// one of the run, unless it is forgiven.
    pub fn closed_as(&self) -> Ending {
        let mut ending = self.ending.clone().unwrap_or_else(|| Ending::of(RunStatus::Failed));
        let failed = |at: &usize| self.closed.get(at) == Some(&StepStatus::Failed);
        let failed: Vec<_> = self.playbook.closing().filter(|(at, _)| failed(at)).collect();
        let told = |undoes: bool| -> Vec<&str> {
            let of_kind = failed.iter().filter(|(_, step)| step.undoes.is_some() == undoes);
            of_kind.map(|(_, step)| step.id.strip_suffix(".compensate").unwrap_or(&step.id)).collect()
        };
        if let Some(error) = &mut ending.error {
            for (name, steps) in [("not_compensated", told(true)), ("finally_failed", told(false))] {
                if !steps.is_empty() {
                    error[name] = json!(steps);
                }
            }
        }
        let fatal = failed.iter().find(|(_, step)| step.on_failure == OnFailure::Abort);
        if let (RunStatus::Completed, Some((at, step))) = (ending.status, fatal) {
            let why = self.failures.get(at).cloned().unwrap_or(Value::Null);
            ending.status = RunStatus::Failed;
            ending.error = Some(json!({
                "code": why["code"], "message": why["message"], "step": step.id, "index": at, "finally": true,
            }));
            ending.letter = Some(Letter { reason: DeadReason::Exhausted, attempt: 0, crash_count: 0 });
        }
        ending
    }
}
