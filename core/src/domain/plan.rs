//! What becomes of a run after an attempt: pure decisions over the playbook,
//! where the run stands, and the outcome. The engine applies them.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value};

use super::backoff::RETRY_AFTER_MAX;
use super::digest;
use super::ids::{CompanyId, PlaybookId, RunId};
use super::outcome::{ErrorClass, Failure, Outcome};
use super::playbook::expr::{Reference, Scope};
use super::playbook::model::{Approval, Playbook, Step};

/// Deaths of workers under one step, without a checkpoint between, after
/// which it is put into quarantine (contract, "Defaults").
pub const CRASHES_MAX: i16 = 3;
/// With so many a job is a suspect: one more, and it is in quarantine.
pub const SUSPECT_CRASHES: i16 = CRASHES_MAX - 1;

/// What an attempt knows of its run. Built once when the run is claimed and
/// carried on while the same worker continues it.
#[derive(Debug, Clone)]
pub struct RunContext {
    /// Whose run it is.
    pub company: CompanyId,
    /// Which playbook.
    pub playbook_id: PlaybookId,
    /// Which run.
    pub run: RunId,
    /// The pinned version, checked.
    pub playbook: Arc<Playbook>,
    /// The parameters it was started with, defaults filled in.
    pub inputs: Arc<Value>,
    /// The outputs of finished steps that a later step or the run's output
    /// still refers to, by step index.
    pub outputs: HashMap<usize, Value>,
}

/// A gate that must open before a step may be tried.
#[derive(Debug, Clone, PartialEq)]
pub struct Gate {
    /// Which step waits.
    pub step: usize,
    /// Exactly what the approver is shown.
    pub context: Value,
    /// SHA-256 of that.
    pub digest: [u8; 32],
    /// How it is decided.
    pub approval: Approval,
}

/// What to do with the run and its job.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Keep the output; go on with the step `next`, behind a gate if one
    /// stands there.
    Advance {
        /// The next step's index.
        next: usize,
        /// What it must wait for.
        gate: Option<Gate>,
    },
    /// Keep the output; the run has ended well.
    Complete {
        /// The run's own output, where the playbook names one.
        output: Option<Value>,
    },
    /// Try the same step again after a delay.
    Retry {
        /// How long to wait.
        delay: Duration,
        /// Whether the try counts.
        charged: bool,
    },
    /// The step gives up and the run fails; it goes to the dead letters.
    Fail {
        /// Why it goes there.
        reason: DeadReason,
    },
    /// Give the job back untried.
    Release {
        /// When it may be taken again.
        delay: Duration,
    },
}

/// Why a job is a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DeadReason {
    /// Out of tries.
    Exhausted,
    /// Its class is not worth another try.
    Invalid,
    /// It killed its worker too often.
    Quarantined,
}

impl DeadReason {
    /// The word in the table.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Exhausted => "exhausted",
            Self::Invalid => "invalid",
            Self::Quarantined => "quarantined",
        }
    }
}

struct RunScope<'a> {
    context: &'a RunContext,
    run: Value,
}

impl Scope for RunScope<'_> {
    fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)> {
        match reference.name(0)? {
            "inputs" => Some((&self.context.inputs, 1)),
            "run" => Some((&self.run, 1)),
            "steps" => {
                let index = self.context.playbook.step_index(reference.name(1)?)?;
                let output = self.context.outputs.get(&index)?;
                // `steps.x.name` is `steps.x.output.name` for short.
                Some((output, if reference.name(2) == Some("output") { 3 } else { 2 }))
            }
            _ => None,
        }
    }
}

impl RunContext {
    fn scope(&self) -> RunScope<'_> {
        let run = serde_json::json!({
            "id": self.run,
            "playbook": self.playbook.name,
            "company_id": self.company,
        });
        RunScope { context: self, run }
    }

    /// The parameters of a step, every reference looked up. Where a playbook
    /// declares no inputs, a run's parameters override the step parameters of
    /// the same name.
    pub fn params(&self, step: &Step) -> Result<Map<String, Value>, Failure> {
        let rendered =
            step.template.render(&self.scope()).map_err(|error| Failure::invalid(format!("params: {error}")))?;
        let Value::Object(mut params) = rendered else {
            return Err(Failure::invalid("params: not a map"));
        };
        if self.playbook.inputs.is_empty()
            && let Value::Object(given) = self.inputs.as_ref()
        {
            for (name, value) in params.iter_mut() {
                if let Some(over) = given.get(name) {
                    value.clone_from(over);
                }
            }
        }
        Ok(params)
    }

    /// Remembers an output when something later needs it, and forgets those
    /// that nothing needs any more.
    pub fn remember(&mut self, step: usize, output: &Value) {
        let steps = &self.playbook.steps;
        self.outputs.retain(|earlier, _| steps.get(*earlier).is_some_and(|earlier| earlier.last_use > Some(step)));
        if steps.get(step).is_some_and(|step| step.last_use.is_some()) {
            self.outputs.insert(step, output.clone());
        }
    }

    /// The gate before a step, when it has one. A step whose parameters do
    /// not render gets none: it fails when it is tried, with the reason.
    pub fn gate(&self, index: usize) -> Option<Gate> {
        let step = self.playbook.steps.get(index)?;
        let approval = step.approval.clone()?;
        let params = self.params(step).ok()?;
        let context = serde_json::json!({
            "playbook": self.playbook.name,
            "step": step.id,
            "role": step.role,
            "action": step.action,
            "params": params,
            "message": approval.message,
        });
        let digest = digest::sha256(context.to_string());
        Some(Gate { step: index, context, digest, approval })
    }

    /// What becomes of the run after an attempt at `step`. `attempt` counts
    /// the tries charged, this one included; `draw` in `[0, 1)` is the jitter.
    pub fn decide(&mut self, step: usize, attempt: u32, outcome: &Outcome, draw: f64) -> Decision {
        match outcome {
            Outcome::Released { delay } => Decision::Release { delay: *delay },
            Outcome::Failed { failure, .. } => self.after_failure(step, attempt, failure, draw),
            Outcome::Done { output, .. } => {
                self.remember(step, output);
                let next = step + 1;
                if next < self.playbook.steps.len() {
                    return Decision::Advance { next, gate: self.gate(next) };
                }
                let rendered = self.playbook.output.as_ref().map(|t| t.render(&self.scope()));
                match rendered {
                    None => Decision::Complete { output: None },
                    // An output that does not render is told as such: all the
                    // steps are done, so the run is not failed for it.
                    Some(Err(error)) => {
                        Decision::Complete { output: Some(serde_json::json!({"error": error.to_string()})) }
                    }
                    Some(Ok(value)) => Decision::Complete { output: Some(value) },
                }
            }
        }
    }

    fn after_failure(&self, step: usize, attempt: u32, failure: &Failure, draw: f64) -> Decision {
        if failure.class == ErrorClass::Crash {
            return Decision::Fail { reason: DeadReason::Quarantined };
        }
        let Some(step) = self.playbook.steps.get(step) else {
            return Decision::Fail { reason: DeadReason::Invalid };
        };
        if !step.retry.on.contains(&failure.class) {
            return Decision::Fail { reason: DeadReason::Invalid };
        }
        // A server that names a time is obeyed, and costs no try.
        // One that names next to none is treated like any failure, or it could
        // keep us calling for ever.
        if let Some(after) = failure.retry_after.filter(|after| *after >= step.retry.backoff.initial) {
            return Decision::Retry { delay: after.min(RETRY_AFTER_MAX), charged: false };
        }
        if attempt >= step.retry.max_attempts {
            return Decision::Fail { reason: DeadReason::Exhausted };
        }
        Decision::Retry { delay: step.retry.backoff.delay(attempt, draw), charged: true }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::playbook;
    use proptest::prelude::*;
    use serde_json::json;

    fn context(yaml: &str, inputs: Value) -> RunContext {
        RunContext {
            company: CompanyId::new(),
            playbook_id: PlaybookId::new(),
            run: RunId::new(),
            playbook: Arc::new(playbook::load(yaml).expect("loads")),
            inputs: Arc::new(inputs),
            outputs: HashMap::new(),
        }
    }

    const THREE: &str = "name: x\nsteps:\n  - {id: a, role: w, action: t, retry: {max_attempts: 3, jitter: false}}\n  - {id: b, role: w, action: t, params: {v: '${steps.a.output.n}'}}\n  - {id: c, role: w, action: t, params: {v: 1}, approval: required}\noutput: '${steps.b.output}'\n";

    #[test]
    fn steps_follow_one_another_to_the_end() {
        let mut run = context(THREE, json!({}));
        let done = |v| Outcome::done(json!({"n": v}));
        assert_eq!(run.decide(0, 1, &done(7), 0.0), Decision::Advance { next: 1, gate: None });
        let step = run.playbook.steps[1].clone();
        assert_eq!(run.params(&step), Ok(json!({"v": 7}).as_object().cloned().expect("a map")));
        let Decision::Advance { next: 2, gate: Some(gate) } = run.decide(1, 1, &done(8), 0.0) else {
            panic!("a gate stands before c")
        };
        assert_eq!(gate.context["params"], json!({"v": 1}));
        assert_eq!(run.decide(2, 1, &done(9), 0.0), Decision::Complete { output: Some(json!({"n": 8})) });
        // Only what is still referred to is carried along.
        assert_eq!(run.outputs.keys().collect::<Vec<_>>(), [&1]);
    }

    #[test]
    fn run_parameters_override_where_no_inputs_are_declared() {
        let run = context(
            "name: x\nsteps:\n  - {role: w, action: t, params: {topic: a, depth: b}}\n",
            json!({"topic": "z", "extra": 1}),
        );
        let params = run.params(&run.playbook.steps[0]).expect("renders");
        assert_eq!(Value::Object(params), json!({"topic": "z", "depth": "b"}));
    }

    #[test]
    fn classes_decide_about_retries() {
        let mut run = context(THREE, json!({}));
        let failed = |class| Outcome::failed(Failure::new(class, "x"));
        assert_eq!(
            run.decide(0, 2, &failed(ErrorClass::Transient), 0.0),
            Decision::Retry { delay: Duration::from_secs(2), charged: true }
        );
        assert_eq!(
            run.decide(0, 3, &failed(ErrorClass::Transient), 0.0),
            Decision::Fail { reason: DeadReason::Exhausted }
        );
        assert_eq!(run.decide(0, 1, &failed(ErrorClass::Invalid), 0.0), Decision::Fail { reason: DeadReason::Invalid });
        assert_eq!(
            run.decide(0, 1, &failed(ErrorClass::Crash), 0.0),
            Decision::Fail { reason: DeadReason::Quarantined }
        );
        let mut asked = Failure::new(ErrorClass::RateLimited, "slow down");
        asked.retry_after = Some(Duration::from_secs(99_999_999));
        assert_eq!(
            run.decide(0, 3, &Outcome::failed(asked.clone()), 0.0),
            Decision::Retry { delay: RETRY_AFTER_MAX, charged: false }
        );
        asked.retry_after = Some(Duration::ZERO);
        let hurried = Outcome::failed(asked);
        assert!(!matches!(run.decide(0, 3, &hurried, 0.0), Decision::Retry { charged: false, .. }));
    }

    proptest! {
        /// However the attempts fall out, a run ends: tries are bounded, and
        /// each success moves it on by exactly one step.
        #[test]
        fn every_run_ends_within_its_tries(fates in prop::collection::vec(0u8..3, 200)) {
            let mut run = context(THREE, json!({}));
            let (mut step, mut attempt, mut ended) = (0usize, 0u32, false);
            for fate in fates {
                attempt += 1;
                let outcome = match fate {
                    0 => Outcome::done(json!({"n": 1})),
                    1 => Outcome::failed(Failure::new(ErrorClass::Transient, "x")),
                    _ => Outcome::failed(Failure::new(ErrorClass::Timeout, "x")),
                };
                match run.decide(step, attempt, &outcome, 0.5) {
                    Decision::Advance { next, .. } => {
                        prop_assert_eq!(next, step + 1);
                        (step, attempt) = (next, 0);
                    }
                    Decision::Complete { .. } => { prop_assert_eq!(step, 2); ended = true; break }
                    Decision::Fail { .. } => { ended = true; break }
                    Decision::Retry { .. } => prop_assert!(attempt < run.playbook.steps[step].retry.max_attempts),
                    Decision::Release { .. } => prop_assert!(false),
                }
            }
            prop_assert!(ended);
        }
    }
}
