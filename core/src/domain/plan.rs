//! What becomes of a run after an attempt: pure decisions over the playbook,
//! where the run stands, and the outcome. The engine applies them.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::backoff::RETRY_AFTER_MAX;
use super::budget::CREDIT;
use super::event::is_event_name;
use super::governance::{Action, Policy, Verdict};
use super::ids::{ApprovalId, CompanyId, PlaybookId, RunId};
use super::money::Nanos;
use super::outcome::{ErrorClass, Failure, Fanning, Outcome};
use super::playbook::expr::functions::written;
use super::playbook::expr::{self, Budget, Reference, Scope};
use super::playbook::load::TOOLS;
use super::playbook::model::{Approval, Mode, OnFailure, Pause, Playbook, Step, StepKind, WaitFor};
use super::run::StepStatus;
use super::{digest, duration};

mod call;
mod closing;
mod fan;
mod graph;
mod rubric;
mod size;
pub use call::{Child, DEPTH_MAX};
pub use closing::{Ending, Letter};
pub use fan::{FAILURES_TOLD, FAN_LOOK, Fanned, Item, ItemDecision};
pub use graph::{Node, Then, Turn};
pub use rubric::{Draft, Graded, Hold, Stage};
pub use size::RUN_BYTES_MAX;

/// The place of a run's job that is about no step: the run looks at all that is
/// stored of it, and decides where it goes on.
pub const JUNCTION: i32 = -1;

/// The longest `idempotency_key` of a run.
pub const KEY_CHARS_MAX: usize = 255;
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
    pub outputs: Arc<HashMap<usize, Value>>,
    /// Why steps have failed that the run went past, as far as anybody refers to
    /// them.
    pub failures: HashMap<usize, Value>,
    /// How often each `goto` has jumped.
    pub jumps: HashMap<usize, u32>,
    /// What has come for the steps that wait for an event; nothing yet, where
    /// there is none.
    pub waits: HashMap<usize, Option<Value>>,
    /// The item that the attempt is about, of a step that is done for a list.
    pub item: Option<Item>,
    /// How the items of the step at hand stand; nothing, where none has begun.
    pub fanned: Option<Fanned>,
    /// What the run comes to once it is closed, when its steps are over.
    pub ending: Option<Ending>,
    /// How often it has been closed before, and went on after all.
    pub closings: u32,
    /// The steps that are still to be undone, in the order in which they were done.
    pub undo: Vec<usize>,
    /// What became of the steps that close it.
    pub closed: HashMap<usize, StepStatus>,
    /// The run does a step of another.
    pub called: bool,
    /// The run that does the step at hand, where another one does.
    pub child: Option<Child>,
    /// Why the gate before the step at hand stayed shut.
    pub refused: Option<Refusal>,
    /// How the steps stand that have begun, at the junction of a graph.
    pub nodes: HashMap<usize, Node>,
    /// What those wait for that wait for a person, or an event, in the words of the API.
    pub waiting: HashMap<usize, Value>,
    /// The steps whose gates were opened before the run failed.
    pub opened: HashSet<usize>,
    /// What the step at hand has said, where it has a rubric.
    pub draft: Option<Draft>,
    /// What steps came to by their rubrics.
    pub scores: HashMap<usize, Value>,
    /// What the run has cost so far.
    pub spent: Nanos,
    /// What the run keeps of what its steps have said, in bytes; not less than it is.
    pub bytes: i64,
    /// How long ago it began, as of when it was loaded.
    pub age: Duration,
    /// What its company allows.
    pub policy: Arc<Policy>,
    /// A person has let it begin to have effects.
    pub reviewed: bool,
}

/// A gate that stayed shut.
#[derive(Debug, Clone)]
pub struct Refusal {
    /// Which.
    pub approval: ApprovalId,
    /// `rejected` or `expired`.
    pub status: String,
    /// What was said.
    pub words: Option<String>,
}

impl Refusal {
    /// What the step fails with.
    pub fn failure(&self) -> Failure {
        let Self { status, words, .. } = self;
        let said = words.as_ref().map(|words| format!(": {words}")).unwrap_or_default();
        Failure::new(ErrorClass::Governance, format!("the approval was {status}{said}"))
    }
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
    /// The call in the journal that it is about; nothing, where it is about a step.
    pub call: Option<String>,
}

/// What a run comes upon next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// A step that may be tried at once.
    Step(usize),
    /// A step behind a gate.
    Gate(Gate),
    /// A pause: its step may be tried when it is over.
    Sleep {
        /// The step.
        step: usize,
        /// How long.
        delay: Duration,
    },
    /// Nothing: the steps have ended well.
    End {
        /// The run's own output, where the playbook names one.
        output: Option<Value>,
    },
    /// Nothing: what closes the run is done, too.
    Closed,
    /// To be decided at the junction: others may be under way.
    Junction,
}

/// What a run went past without trying it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Passed {
    /// A step whose condition does not hold.
    Skipped(usize),
    /// A `goto` that jumped back.
    Jumped {
        /// The `goto`.
        step: usize,
        /// Where to.
        target: usize,
        /// How often so far, this time included.
        jumps: u32,
    },
}

/// The way from one try to the next.
#[derive(Debug, Clone, PartialEq)]
pub struct Walk {
    /// In order.
    pub passed: Vec<Passed>,
    /// Where it leads.
    pub next: Next,
}

/// What to do with the run and its job.
#[derive(Debug, Clone, PartialEq)]
pub enum Decision {
    /// Keep the output; go on.
    Advance(Walk),
    /// The step gives up and the run goes on without it.
    GoPast(Walk),
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
    /// The run waits for an event, or for the end of its time.
    Wait {
        /// The event's name.
        event: String,
        /// What its data must hold.
        matching: Value,
        /// How long.
        timeout: Duration,
    },
    /// Lanes go through the items of the step; the run waits for them.
    Fan(Fanning),
    /// Give the job back untried.
    Release {
        /// When it may be taken again.
        delay: Duration,
    },
}

/// Why a job is a dead letter.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
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

impl RunContext {
    /// A run of which nothing is known yet but what it was started with.
    pub fn new(
        company: CompanyId,
        playbook_id: PlaybookId,
        run: RunId,
        playbook: Arc<Playbook>,
        inputs: Arc<Value>,
    ) -> Self {
        Self {
            company,
            playbook_id,
            run,
            playbook,
            inputs,
            outputs: Arc::default(),
            failures: HashMap::new(),
            jumps: HashMap::new(),
            waits: HashMap::new(),
            item: None,
            fanned: None,
            ending: None,
            closings: 0,
            undo: Vec::new(),
            closed: HashMap::new(),
            called: false,
            child: None,
            refused: None,
            nodes: HashMap::new(),
            waiting: HashMap::new(),
            opened: HashSet::new(),
            draft: None,
            scores: HashMap::new(),
            spent: Nanos::ZERO,
            bytes: 0,
            age: Duration::ZERO,
            policy: Arc::default(),
            reviewed: false,
        }
    }
}

struct RunScope<'a> {
    context: &'a RunContext,
    run: Value,
    /// What secrets are, or what stands for them.
    secrets: &'a Map<String, Value>,
}

impl Scope for RunScope<'_> {
    fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)> {
        match reference.name(0)? {
            "inputs" => Some((&self.context.inputs, 1)),
            "run" => Some((&self.run, 1)),
            "secrets" => self.secrets.get(reference.name(1)?).map(|secret| (secret, 2)),
            "item" => self.context.item.as_ref().and_then(|item| Some((item.list.get(item.index)?, 1))),
            "index" => self.context.item.as_ref().map(|item| (&item.shown, 1)),
            "steps" => self.step(self.context.playbook.step_index(reference.name(1)?)?, reference.name(2)),
            _ => None,
        }
    }
}

impl RunScope<'_> {
    /// What is known of a step under a name.
    fn step(&self, index: usize, name: Option<&str>) -> Option<(&Value, usize)> {
        let output = self.context.outputs.get(&index);
        match name {
            Some("output") => output.map(|output| (output, 3)),
            // Why it failed, or null: a condition may ask that of any step.
            Some("error") if output.and_then(|output| output.get("error")).is_none() => {
                Some((self.context.failures.get(&index).unwrap_or(&Value::Null), 3))
            }
            Some("score") if output.is_some() && self.context.scores.contains_key(&index) => {
                self.context.scores.get(&index).map(|score| (score, 3))
            }
            // `steps.x.name` is `steps.x.output.name` for short.
            _ => output.map(|output| (output, 2)),
        }
    }
}

impl RunContext {
    fn scope(&self) -> RunScope<'_> {
        self.scope_with(&self.playbook.secrets)
    }

    fn scope_with<'a>(&'a self, secrets: &'a Map<String, Value>) -> RunScope<'a> {
        let mut run = serde_json::json!({
            "id": self.run,
            "playbook": self.playbook.name,
            "company_id": self.company,
        });
        if let Some(ending) = &self.ending {
            run["status"] = ending.status.as_str().into();
            run["error"] = ending.told_error();
        }
        RunScope { context: self, run, secrets }
    }

    /// The parameters of a step, every reference looked up. Where a playbook
    /// declares no inputs, a run's parameters override the step parameters of
    /// the same name. What stands for a secret stands there.
    pub fn params(&self, step: &Step) -> Result<Map<String, Value>, Failure> {
        self.params_with(step, &self.playbook.secrets)
    }

    /// The same with secrets, for a tool.
    pub fn params_with(&self, step: &Step, secrets: &Map<String, Value>) -> Result<Map<String, Value>, Failure> {
        let scope = self.scope_with(secrets);
        let rendered = step.template.render(&scope).map_err(|error| Failure::invalid(format!("params: {error}")))?;
        let Value::Object(mut params) = rendered else {
            return Err(Failure::invalid("params: not a map"));
        };
        // Who starts a run has no say in where a secret goes.
        if self.playbook.inputs.is_empty()
            && !self.playbook.gives_secrets(step)
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
        let playbook = &self.playbook;
        self.failures.remove(&step);
        let outputs = Arc::make_mut(&mut self.outputs);
        if self.ending.is_none() {
            outputs.retain(|earlier, _| playbook.step(*earlier).is_some_and(|earlier| earlier.last_use > Some(step)));
        }
        if playbook.step(step).is_some_and(|step| step.last_use.is_some()) {
            outputs.insert(step, output.clone());
        }
    }

    /// The gate before a step, when it has one. A step whose parameters do
    /// not render gets none: it fails when it is tried, with the reason.
    pub fn gate(&self, index: usize) -> Option<Gate> {
        let step = self.playbook.steps.get(index)?;
        let (approval, rule) = match &step.approval {
            Some(approval) => (approval.clone(), None),
            None => self.asked_by_policy(step).map(|(approval, rule)| (approval, Some(rule)))?,
        };
        // One gate for all items: the list is shown, and what is done with each.
        let (params, items) = match &step.fan {
            Some(fan) => (step.params.clone(), Some(self.list(fan).ok()?)),
            None => (self.params(step).ok()?, None),
        };
        let mut context = serde_json::json!({
            "playbook": self.playbook.name,
            "step": step.id,
            "role": step.role,
            "action": step.action,
            "params": params,
            "message": approval.message,
        });
        if let Some(items) = items {
            context["for_each"] = items.into();
        }
        let action = action_of(step);
        context["risk"] = action.risk().as_str().into();
        context["estimated_cost"] = (action.estimate.0 as f64 / CREDIT as f64).into();
        if let Some(rule) = rule {
            context["rule"] = rule.into();
        }
        if !self.playbook.execution.notify.is_empty() {
            context["notify"] = self.playbook.execution.notify.clone().into();
        }
        let digest = digest::sha256(context.to_string());
        Some(Gate { step: index, context, digest, approval, call: None })
    }

    /// How a person is asked about a step by the company's policy, or by the playbook's mode,
    /// and by which rule. What agents find to do by themselves are tasks, which have their own
    /// approval.
    fn asked_by_policy(&self, step: &Step) -> Option<(Approval, String)> {
        if !matches!(step.kind, StepKind::Work) || self.playbook.is_own() {
            return None;
        }
        let action = action_of(step);
        let rule = match self.policy.decide(&action) {
            Verdict::Ask { rule } => rule,
            // It fails when it is tried, with the reason.
            Verdict::Deny { .. } => return None,
            Verdict::Allow => {
                let first = self.playbook.execution.mode == Mode::Review && !self.reviewed;
                if !first || !Policy::has_effect(&action) {
                    return None;
                }
                "execution.mode: review".to_owned()
            }
        };
        Some((self.policy.approval(&rule), rule))
    }

    /// Whether a person may be asked about steps that do not say so themselves.
    pub fn may_be_asked_about(&self, step: &Step) -> bool {
        step.approval.is_some() || self.policy.asks() || self.playbook.execution.mode == Mode::Review
    }

    /// What becomes of the run after an attempt at `step`. `attempt` counts
    /// the tries charged, this one included; `draw` in `[0, 1)` is the jitter.
    pub fn decide(&mut self, step: usize, attempt: u32, outcome: &Outcome, draw: f64) -> Decision {
        let child = self.child.take();
        match outcome {
            Outcome::Released { delay } => {
                self.child = child;
                Decision::Release { delay: *delay }
            }
            Outcome::Waits { event, matching, timeout } => {
                Decision::Wait { event: event.clone(), matching: matching.clone(), timeout: *timeout }
            }
            // Decided before: the run waits at the gate.
            Outcome::Asks(_) => Decision::Release { delay: Duration::ZERO },
            Outcome::Fans(fanning) => Decision::Fan(fanning.clone()),
            // The items have had their tries.
            Outcome::Failed { failure, .. } if self.fanned.is_some() => {
                self.fanned = None;
                self.give_up(step, failure, DeadReason::Exhausted)
            }
            Outcome::Failed { failure, .. } => self.after_failure(step, attempt, failure, draw),
            Outcome::Done { output, .. } => {
                self.remember(step, output);
                self.waits.remove(&step);
                self.fanned = None;
                self.note_closed(step, StepStatus::Completed);
                Decision::Advance(self.after(step))
            }
        }
    }

    /// Where a run begins: at a step, or at the junction of its graph.
    pub fn begins_at(&mut self, step: usize) -> Walk {
        match self.playbook.graph {
            true => Walk { passed: Vec::new(), next: Next::Junction },
            false => self.walk(step),
        }
    }

    /// Goes on after a step that is over.
    fn after(&mut self, step: usize) -> Walk {
        match &self.ending {
            Some(_) => self.close(),
            None if self.playbook.graph => Walk { passed: Vec::new(), next: Next::Junction },
            None => self.walk(step.saturating_add(1)),
        }
    }

    /// Whether a place is that behind the last step, which versions before there was a
    /// junction have given to runs that had nothing left to do.
    pub fn is_past_all(&self, step: usize) -> bool {
        step == self.playbook.steps.len() && self.ending.is_none()
    }

    /// Goes on from what is stored, when no step is at hand.
    pub fn junction(&mut self) -> Walk {
        self.after(self.playbook.steps.len())
    }

    /// Goes on from a place until there is something to try or to wait for: leaves
    /// out steps whose conditions do not hold, and jumps where a `goto` says so.
    /// A step whose condition gives no value is tried, and fails with the reason.
    ///
    /// It ends: each turn goes one step on, and each `goto` jumps once. The second
    /// time nothing would have been done in between, nor could it be otherwise.
    pub fn walk(&mut self, from: usize) -> Walk {
        let playbook = Arc::clone(&self.playbook);
        let (mut at, mut passed, mut budget) = (from, Vec::new(), Budget::default());
        let next = loop {
            let Some(step) = playbook.steps.get(at) else { break Next::End { output: self.output() } };
            let holds = match self.holds_within(step, &mut budget) {
                Ok(holds) => holds,
                Err(_) => break Next::Step(at),
            };
            match &step.kind {
                StepKind::Goto { target, jumps_max } => {
                    let jumps = self.jumps.get(&at).copied().unwrap_or(0) + 1;
                    let jumped = |passed: &Passed| matches!(passed, Passed::Jumped { step, .. } if *step == at);
                    if holds && jumps <= *jumps_max && !passed.iter().any(jumped) {
                        self.jumps.insert(at, jumps);
                        passed.push(Passed::Jumped { step: at, target: *target, jumps });
                        at = *target;
                        continue;
                    }
                }
                _ if !holds => {
                    self.leave_out(at);
                    passed.push(Passed::Skipped(at));
                }
                StepKind::Sleep(pause) => match self.pause(pause) {
                    Ok(delay) => break Next::Sleep { step: at, delay },
                    Err(_) => break Next::Step(at),
                },
                StepKind::WaitFor(_) => break Next::Step(at),
                StepKind::Work | StepKind::Playbook(_) => break self.gate(at).map_or(Next::Step(at), Next::Gate),
            }
            at += 1;
        };
        Walk { passed, next }
    }

    /// Whether a step's condition holds; without one it does.
    pub fn holds(&self, step: &Step) -> Result<bool, Failure> {
        self.holds_within(step, &mut Budget::default())
    }

    fn holds_within(&self, step: &Step, budget: &mut Budget) -> Result<bool, Failure> {
        let Some(condition) = &step.condition else { return Ok(true) };
        condition.holds(&self.scope(), budget.renew()).map_err(|error| Failure::invalid(format!("if: {error}")))
    }

    /// How long a step sleeps.
    pub fn pause(&self, pause: &Pause) -> Result<Duration, Failure> {
        let wrong = |what: String| Failure::invalid(format!("sleep: {what}"));
        let template = match pause {
            Pause::Fixed(delay) => return Ok(*delay),
            Pause::Computed(template) => template,
        };
        match template.render(&self.scope()).map_err(|error| wrong(error.to_string()))? {
            Value::String(text) => duration::parse(&text).map_err(|error| wrong(error.to_string())),
            Value::Number(seconds) => Duration::try_from_secs_f64(seconds.as_f64().unwrap_or(-1.0))
                .ok()
                .filter(|delay| *delay <= duration::DURATION_MAX)
                .ok_or_else(|| wrong(format!("{seconds} is no number of seconds from 0 to ten years"))),
            other => Err(wrong(format!("must be a duration such as 2h, or seconds, not {}", expr::kind_of(&other)))),
        }
    }

    /// An attempt at a step that waits: what has come is its output; without, it
    /// begins to wait, or its time is over.
    pub fn wait(&self, at: usize, wait: &WaitFor) -> Outcome {
        if let Some(Some(data)) = self.waits.get(&at) {
            return Outcome::done(data.clone());
        }
        let (event, matching) = match (wait.event.render(&self.scope()), wait.matching.render(&self.scope())) {
            (Ok(event), Ok(matching)) => (written(&event), matching),
            (Err(error), _) | (_, Err(error)) => {
                return Outcome::failed(Failure::invalid(format!("wait_for: {error}")));
            }
        };
        if !is_event_name(&event) {
            let short: String = event.chars().take(100).collect();
            return Outcome::failed(Failure::invalid(format!("wait_for: `{short}` cannot be an event's name")));
        }
        match self.waits.get(&at) {
            Some(_) => {
                let message = format!("no event `{event}` came within {:?}", wait.timeout);
                Outcome::failed(Failure::new(ErrorClass::Timeout, message))
            }
            None => Outcome::Waits { event, matching, timeout: wait.timeout },
        }
    }

    /// The run's own output. One that does not render is told as such: all the
    /// steps are done, so the run is not failed for it.
    fn output(&self) -> Option<Value> {
        let rendered = self.playbook.output.as_ref()?.render(&self.scope());
        Some(rendered.unwrap_or_else(|error| serde_json::json!({"error": error.to_string()})))
    }

    /// A step that is left out says nothing any more, as in its row.
    fn leave_out(&mut self, at: usize) {
        Arc::make_mut(&mut self.outputs).remove(&at);
        self.failures.remove(&at);
    }

    /// What the run is the only one of its playbook for, where that is said.
    pub fn idempotency_key(&self) -> Result<Option<String>, Failure> {
        let wrong = |what: String| Failure::invalid(format!("idempotency_key: {what}"));
        let Some(template) = &self.playbook.idempotency_key else { return Ok(None) };
        let key = match template.render(&self.scope()).map_err(|error| wrong(error.to_string()))? {
            key @ (Value::String(_) | Value::Number(_) | Value::Bool(_)) => written(&key),
            other => return Err(wrong(format!("must be text, not {}", expr::kind_of(&other)))),
        };
        match key.trim() {
            "" => Err(wrong("is empty".into())),
            key if key.chars().count() > KEY_CHARS_MAX => Err(wrong(format!("is over {KEY_CHARS_MAX} characters"))),
            key => Ok(Some(key.to_owned())),
        }
    }

    /// What the run has in common with others that are not to be under way at once.
    pub fn concurrency_key(&self) -> Result<Option<String>, Failure> {
        let wrong = |what: String| Failure::invalid(format!("concurrency: {what}"));
        let Some(rule) = &self.playbook.concurrency else { return Ok(None) };
        let Some(template) = &rule.key else { return Ok(Some(String::new())) };
        let key = template.render(&self.scope()).map_err(|error| wrong(error.to_string()))?;
        let key = written(&key).trim().to_owned();
        if key.chars().count() > KEY_CHARS_MAX {
            return Err(wrong(format!("the key is over {KEY_CHARS_MAX} characters")));
        }
        Ok(Some(key))
    }

    /// How often the run has jumped: the effects of a step that it comes to again
    /// are others.
    pub fn round(&self) -> u32 {
        let closings = if self.ending.is_some() { self.closings } else { 0 };
        self.jumps.values().sum::<u32>() + closings
    }

    /// The step gives up: the run with it, unless it goes past.
    fn give_up(&mut self, at: usize, failure: &Failure, reason: DeadReason) -> Decision {
        // A junction is none.
        let is_step = self.playbook.step(at).is_some();
        if self.ending.is_some() {
            // The others are done all the same.
            if is_step {
                let told = serde_json::json!({"code": failure.class.as_str(), "message": failure.message});
                self.failures.insert(at, told);
                self.note_closed(at, StepStatus::Failed);
            }
            return Decision::GoPast(self.close());
        }
        if self.playbook.graph && is_step {
            // Whether the run fails is decided where all its steps are seen.
            return Decision::GoPast(self.after(at));
        }
        let to = match self.playbook.steps.get(at).map(|step| step.on_failure) {
            None | Some(OnFailure::Abort) => return Decision::Fail { reason },
            Some(OnFailure::Continue) => at + 1,
            Some(OnFailure::Goto(target)) => target,
        };
        Arc::make_mut(&mut self.outputs).remove(&at);
        self.waits.remove(&at);
        let told = serde_json::json!({"code": failure.class.as_str(), "message": failure.message});
        self.failures.insert(at, told);
        // A `goto` has no say: how often it has jumped stays.
        let works = |step: &usize| !matches!(self.playbook.steps[*step].kind, StepKind::Goto { .. });
        let left_out: Vec<usize> = (at + 1..to).filter(works).collect();
        left_out.iter().for_each(|step| self.leave_out(*step));
        let mut walk = self.walk(to);
        walk.passed.splice(0..0, left_out.into_iter().map(Passed::Skipped));
        Decision::GoPast(walk)
    }

    fn after_failure(&mut self, at: usize, attempt: u32, failure: &Failure, draw: f64) -> Decision {
        if failure.class == ErrorClass::Crash {
            return self.give_up(at, failure, DeadReason::Quarantined);
        }
        if self.refused.is_some() {
            return self.give_up(at, failure, DeadReason::Invalid);
        }
        let playbook = Arc::clone(&self.playbook);
        let Some(step) = playbook.step(at) else {
            return Decision::Fail { reason: DeadReason::Invalid };
        };
        match again(step, attempt, failure, draw) {
            Ok((delay, charged)) => Decision::Retry { delay, charged },
            Err(reason) => self.give_up(at, failure, reason),
        }
    }
}

/// What a step does, as a policy sees it.
pub fn action_of(step: &Step) -> Action<'_> {
    match TOOLS.contains(&step.action.as_str()) {
        true => Action::of_tool(&step.action),
        false => Action::of_agent(&step.action, step.budget),
    }
}

/// When a failed attempt is made again, and whether it is charged; or why it is
/// not.
fn again(step: &Step, attempt: u32, failure: &Failure, draw: f64) -> Result<(Duration, bool), DeadReason> {
    if failure.class == ErrorClass::Crash {
        return Err(DeadReason::Quarantined);
    }
    if !step.retry.on.contains(&failure.class) {
        return Err(DeadReason::Invalid);
    }
    // A server that names a time is obeyed, and costs no try.
    // One that names next to none is treated like any failure, or it could
    // keep us calling for ever.
    if let Some(after) = failure.retry_after.filter(|after| *after >= step.retry.backoff.initial) {
        return Ok((after.min(RETRY_AFTER_MAX), false));
    }
    if attempt >= step.retry.max_attempts {
        return Err(DeadReason::Exhausted);
    }
    Ok((step.retry.backoff.delay(attempt, draw), true))
}

#[cfg(test)]
mod tests;
