//! The one model that every dialect of playbook loads into.

use std::time::Duration;

use serde_json::{Map, Value};

use super::expr::{Expr, Reference};
use super::rubric::{Limit, Measure, Rubric};
use super::shape::Shape;
use super::template::Template;
use crate::domain::backoff::Backoff;
use crate::domain::money::Nanos;
use crate::domain::outcome::ErrorClass;
use crate::domain::run::RunStatus;
use crate::domain::schedule::ScheduleSpec;

/// A checked playbook.
#[derive(Debug, Clone)]
pub struct Playbook {
    /// Unique within the company.
    pub name: String,
    /// For people.
    pub description: Option<String>,
    /// What starts a run, besides a person.
    pub trigger: Trigger,
    /// What a run can be given, in the order written.
    pub inputs: Vec<InputSpec>,
    /// Of all its runs one has what this comes to.
    pub idempotency_key: Option<Template>,
    /// How many of its runs may be under way at once.
    pub concurrency: Option<Concurrency>,
    /// How it may be run.
    pub execution: Execution,
    /// What one run may cost.
    pub budget: Option<Nanos>,
    /// The company's secrets that its tools are given, by name, each with what stands for
    /// it wherever else it would be seen.
    pub secrets: Map<String, Value>,
    /// In the order they run, unless they form a graph.
    pub steps: Vec<Step>,
    /// Each step runs when those are over that it needs.
    pub graph: bool,
    /// What is done when they are over: what undoes them, that of the last one first,
    /// then what is done in any case. Their places go on behind those of the steps.
    pub closing: Vec<Step>,
    /// The limits of the whole run, as written.
    pub rubric: Option<Value>,
    /// The same, to be held.
    pub limits: Vec<Limit>,
    /// What the run's `output` is made of.
    pub output: Option<Template>,
    /// Why it cannot be run, for a stored text that no longer loads.
    pub unreadable: Option<String>,
}

/// What starts a run.
#[derive(Debug, Clone, PartialEq)]
pub enum Trigger {
    /// A person or another playbook.
    Manual,
    /// The clock.
    Schedule(ScheduleSpec),
    /// A request to the company's webhook address.
    Webhook {
        /// The name at the end of that address.
        event: String,
    },
    /// A named event of the company.
    Event {
        /// Its name.
        event: String,
        /// What its data must hold; null for anything.
        matching: Value,
    },
}

impl Trigger {
    /// As answers show it; `null` for a manual one, which has none.
    pub fn to_json(&self) -> Value {
        match self {
            Self::Manual => Value::Null,
            Self::Schedule(spec) => spec.to_json(),
            Self::Webhook { event } => serde_json::json!({"type": "webhook", "event": event}),
            Self::Event { event, matching: Value::Null } => serde_json::json!({"type": "event", "event": event}),
            Self::Event { event, matching } => serde_json::json!({"type": "event", "event": event, "match": matching}),
        }
    }
}

/// One declared input.
#[derive(Debug, Clone, PartialEq)]
pub struct InputSpec {
    /// Its name.
    pub name: String,
    /// What it must be.
    pub shape: Shape,
    /// Whether a run needs it.
    pub required: bool,
    /// What it is when not given.
    pub default: Option<Value>,
    /// For people.
    pub description: Option<String>,
}

/// The types that an input can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InputKind {
    /// Anything.
    Any,
    /// Text.
    String,
    /// Any number.
    Number,
    /// A whole number.
    Integer,
    /// `true` or `false`.
    Boolean,
    /// A list.
    Array,
    /// A map.
    Object,
}

impl InputKind {
    /// Name and kind.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("any", Self::Any),
        ("string", Self::String),
        ("number", Self::Number),
        ("integer", Self::Integer),
        ("boolean", Self::Boolean),
        ("array", Self::Array),
        ("object", Self::Object),
    ];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        Self::NAMES.iter().find(|(_, kind)| *kind == self).map_or("any", |(name, _)| name)
    }

    /// Whether a value is of this kind.
    pub fn holds(self, value: &Value) -> bool {
        match self {
            Self::Any => true,
            Self::String => value.is_string(),
            Self::Number => value.is_number(),
            Self::Integer => value.is_i64() || value.is_u64(),
            Self::Boolean => value.is_boolean(),
            Self::Array => value.is_array(),
            Self::Object => value.is_object(),
        }
    }
}

/// One step.
#[derive(Debug, Clone)]
pub struct Step {
    /// Unique within the playbook; what `steps.ID.output` names.
    pub id: String,
    /// What it is: work, a jump, a pause.
    pub kind: StepKind,
    /// It is left out where this does not hold; a jump, not taken.
    pub condition: Option<Expr>,
    /// It is done once for each item of a list.
    pub fan: Option<Fan>,
    /// What becomes of the run when it gives up.
    pub on_failure: OnFailure,
    /// Whose work it is; a registered tool can do without.
    pub role: Option<String>,
    /// A tool's name, or what the role's agent is asked to do.
    pub action: String,
    /// The arguments, with templates.
    pub params: Map<String, Value>,
    /// The same, compiled.
    pub template: Template,
    /// When and how often it is tried again.
    pub retry: Retry,
    /// How long one attempt may take.
    pub timeout: Duration,
    /// How long nothing may come of it meanwhile.
    pub idle: Duration,
    /// A person must say yes before it is tried.
    pub approval: Option<Approval>,
    /// Overrides the agent's adapter.
    pub adapter: Option<String>,
    /// Overrides the agent's model.
    pub model: Option<String>,
    /// What it may cost.
    pub budget: Option<Nanos>,
    /// What it must say, each item of a list by itself.
    pub output: Option<Shape>,
    /// What its output must come up to.
    pub rubric: Option<Rubric>,
    /// The steps that must be over, in a graph.
    pub needs: Vec<usize>,
    /// The step that it undoes, where it does.
    pub undoes: Option<usize>,
    /// The last step that refers to its output, the run's own output counting
    /// as one more; `None` when nothing does. What is done when the steps are over
    /// does not count here.
    pub last_use: Option<usize>,
}

/// What a step is.
#[derive(Debug, Clone)]
pub enum StepKind {
    /// Something is done, by a tool or an agent.
    Work,
    /// The run goes on at another step, so often at most; then it goes past.
    Goto {
        /// Where.
        target: usize,
        /// How often at most.
        jumps_max: u32,
    },
    /// The run goes on later.
    Sleep(Pause),
    /// The run goes on when an event has come.
    WaitFor(WaitFor),
    /// A run of another playbook does it.
    Playbook(String),
}

/// A step that is done once for each item of a list.
#[derive(Debug, Clone)]
pub struct Fan {
    /// The list.
    pub items: Template,
    /// So many at once.
    pub parallel: u32,
    /// The longest list that it takes.
    pub items_max: u32,
    /// How many items must be done for the step to be done.
    pub min_success: MinSuccess,
    /// All items are tried, even when it is clear that too few will be done.
    pub goes_on: bool,
}

/// How many of the items must be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MinSuccess {
    /// So many, or all where there are fewer.
    Count(u32),
    /// So many in a hundred.
    Percent(u32),
}

/// The longest list of a `for_each` that says nothing else.
pub const ITEMS_MAX: u32 = 1_000;
/// The longest list that a `for_each` may ask for.
pub const ITEMS_MAX_MAX: u32 = 10_000;
/// The most items at once that a `for_each` may ask for.
pub const PARALLEL_MAX: u32 = 1_000;

impl Fan {
    /// How many of so many items may fail.
    pub fn may_fail(&self, items: u32) -> u32 {
        let wanted = match self.min_success {
            MinSuccess::Count(count) => count.min(items),
            MinSuccess::Percent(percent) => (u64::from(items) * u64::from(percent)).div_ceil(100) as u32,
        };
        items.saturating_sub(wanted)
    }
}

/// What a step waits for.
#[derive(Debug, Clone)]
pub struct WaitFor {
    /// The event's name.
    pub event: Template,
    /// What its data must hold.
    pub matching: Template,
    /// How long; then the step fails.
    pub timeout: Duration,
}

/// How long a step waits for an event when it says nothing else.
pub const WAIT_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// How long a step sleeps.
#[derive(Debug, Clone)]
pub enum Pause {
    /// As written.
    Fixed(Duration),
    /// As it turns out: a text such as `2h`, or a number of seconds.
    Computed(Template),
}

/// What the names of our own playbooks begin with, and nobody else's.
pub const OWN: char = '@';

/// How a playbook may be run.
#[derive(Debug, Clone, Default)]
pub struct Execution {
    /// Whether a person is asked.
    pub mode: Mode,
    /// What all its runs may cost in a month.
    pub spend_cap: Option<Nanos>,
    /// Who is told when a person is asked.
    pub notify: Vec<String>,
}

/// Whether a person is asked before a playbook does anything.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Mode {
    /// Nobody is.
    #[default]
    Auto,
    /// Before its first step.
    Review,
    /// It does not run.
    Blocked,
}

impl Mode {
    /// Name and mode.
    pub const NAMES: &'static [(&'static str, Self)] =
        &[("auto", Self::Auto), ("review", Self::Review), ("blocked", Self::Blocked)];
}

/// How many runs with the same key may be under way at once.
#[derive(Debug, Clone)]
pub struct Concurrency {
    /// What they have in common; nothing, where it is all of the playbook's.
    pub key: Option<Template>,
    /// So many.
    pub limit: u32,
    /// What becomes of one more.
    pub on_conflict: OnConflict,
}

/// The most runs at once that a playbook may ask for.
pub const CONCURRENCY_MAX: u32 = 10_000;

/// What becomes of a run when as many are under way as may be.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnConflict {
    /// It waits for its turn.
    #[default]
    Queue,
    /// It is refused.
    Reject,
    /// The oldest are cancelled for it.
    CancelRunning,
    /// It waits instead of those that have waited.
    ReplacePending,
    /// It is the last one that waits or is under way.
    Coalesce,
}

impl OnConflict {
    /// Name and rule.
    pub const NAMES: &'static [(&'static str, Self)] = &[
        ("queue", Self::Queue),
        ("reject", Self::Reject),
        ("cancel_running", Self::CancelRunning),
        ("replace_pending", Self::ReplacePending),
        ("coalesce", Self::Coalesce),
    ];
}

/// What becomes of a run when a step of it gives up.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum OnFailure {
    /// It fails.
    #[default]
    Abort,
    /// It goes on with the next step.
    Continue,
    /// It goes on at a later one.
    Goto(usize),
}

/// How often all the jumps of a playbook together may take steps again, and how
/// many steps a run has at most.
pub const RUN_STEPS_MAX: usize = 10_000;

/// The hard limit of one attempt when the step names none.
pub const STEP_TIMEOUT: Duration = Duration::from_secs(3600);
/// How long nothing may come of an attempt when the step names no limit at all.
pub const IDLE_TIMEOUT: Duration = Duration::from_secs(600);
/// Tries of a step for transient classes when it names none.
pub const MAX_ATTEMPTS: u32 = 5;
/// The most tries a step may ask for.
pub const MAX_ATTEMPTS_MAX: u32 = 100;
/// When an approval is rejected by itself.
pub const APPROVAL_TIMEOUT: Duration = Duration::from_secs(24 * 3600);

/// When and how often a failed step is tried again.
#[derive(Debug, Clone, PartialEq)]
pub struct Retry {
    /// Tries in all, the first included.
    pub max_attempts: u32,
    /// The pause between them.
    pub backoff: Backoff,
    /// Which classes are worth another try.
    pub on: Vec<ErrorClass>,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_attempts: MAX_ATTEMPTS,
            backoff: Backoff::default(),
            on: vec![ErrorClass::Transient, ErrorClass::RateLimited, ErrorClass::Timeout],
        }
    }
}

/// A gate before a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Approval {
    /// Who may decide; empty = whoever holds the scope.
    pub reviewers: Vec<String>,
    /// When it decides itself.
    pub timeout: Duration,
    /// What it then decides.
    pub on_timeout: OnTimeout,
    /// What the approver reads.
    pub message: Option<String>,
}

/// What a gate does when nobody decides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnTimeout {
    /// The step does not run, the run fails.
    Reject,
    /// The step runs.
    Approve,
    /// Anybody may decide then, within as much time again; then it is rejected.
    Escalate,
}

impl OnTimeout {
    /// The word in playbooks and tables.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Reject => "reject",
            Self::Approve => "approve",
            Self::Escalate => "escalate",
        }
    }

    /// From that.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Reject, Self::Approve, Self::Escalate].into_iter().find(|rule| rule.as_str() == name)
    }
}

impl Default for Approval {
    fn default() -> Self {
        Self { reviewers: Vec::new(), timeout: APPROVAL_TIMEOUT, on_timeout: OnTimeout::Reject, message: None }
    }
}

impl Step {
    /// How a gate at it is decided: as it says, or as any.
    pub fn gate(&self) -> Approval {
        self.approval.clone().unwrap_or_default()
    }

    /// Every path that it looks up.
    pub fn references(&self) -> Vec<&Reference> {
        let mut found = self.template.references();
        found.extend(self.condition.iter().flat_map(Expr::references));
        found.extend(self.fan.iter().flat_map(|fan| fan.items.references()));
        let criteria = self.rubric.iter().flat_map(|rubric| &rubric.criteria);
        found.extend(criteria.filter_map(|criterion| criterion.check.as_ref()).flat_map(Expr::references));
        match &self.kind {
            StepKind::Sleep(Pause::Computed(template)) => found.extend(template.references()),
            StepKind::WaitFor(wait) => {
                found.extend(wait.event.references());
                found.extend(wait.matching.references());
            }
            _ => {}
        }
        found
    }

    /// The loop that it closes, from its first step to itself, when it stands at
    /// a place.
    pub fn jumps_back_from(&self, at: usize) -> Option<(usize, usize)> {
        match self.kind {
            StepKind::Goto { target, .. } => Some((target, at)),
            _ => None,
        }
    }
}

impl Playbook {
    /// Whether it is one of our own, by which agents do what they find in their beats.
    pub fn is_own(&self) -> bool {
        self.name.starts_with(OWN)
    }

    /// Stands for a stored text that no longer loads.
    pub fn unreadable(reason: String) -> Self {
        Self {
            name: String::new(),
            description: None,
            trigger: Trigger::Manual,
            inputs: Vec::new(),
            idempotency_key: None,
            concurrency: None,
            execution: Execution::default(),
            budget: None,
            secrets: Map::new(),
            steps: Vec::new(),
            graph: false,
            closing: Vec::new(),
            rubric: None,
            limits: Vec::new(),
            output: None,
            unreadable: Some(reason),
        }
    }

    /// The step in a place, of those that close a run too.
    pub fn step(&self, at: usize) -> Option<&Step> {
        self.steps.get(at).or_else(|| self.closing.get(at.checked_sub(self.steps.len())?))
    }

    /// The steps that close a run, with their places.
    pub fn closing(&self) -> impl Iterator<Item = (usize, &Step)> {
        self.closing.iter().enumerate().map(|(at, step)| (self.steps.len() + at, step))
    }

    /// The steps whose outputs a run at `step` still needs: of those before it,
    /// and, where it may have jumped back, of those behind it too.
    pub fn needed_at(&self, step: usize) -> Vec<usize> {
        if self.graph {
            return self.step(step).map(|step| self.looked_up_by(step)).unwrap_or_default();
        }
        let reach = if self.jumps() { self.steps.len() } else { step };
        let done = self.steps.iter().enumerate().take(reach);
        done.filter(|(_, earlier)| earlier.last_use >= Some(step)).map(|(index, _)| index).collect()
    }

    /// Whether a step must be over before another begins, in a graph.
    pub fn comes_before(&self, step: usize, other: usize) -> bool {
        let (mut seen, mut left) = (vec![false; self.steps.len()], vec![other]);
        while let Some(at) = left.pop() {
            for need in self.steps.get(at).into_iter().flat_map(|step| &step.needs) {
                if *need == step {
                    return true;
                }
                if !std::mem::replace(&mut seen[*need], true) {
                    left.push(*need);
                }
            }
        }
        false
    }

    /// The steps whose outputs are needed at the junction of a graph, where some have
    /// begun.
    pub fn needed_to_turn(&self, begun: impl Fn(usize) -> bool) -> Vec<usize> {
        let asks = |step: &Step| {
            let computed = matches!(step.kind, StepKind::Sleep(Pause::Computed(_)));
            step.condition.is_some() || step.approval.is_some() || computed
        };
        let open = self.steps.iter().enumerate().filter(|(at, _)| !begun(*at)).map(|(_, step)| step);
        let mut needed: Vec<usize> = open.filter(|step| asks(step)).flat_map(|step| self.looked_up_by(step)).collect();
        let of_steps = |reference: &&Reference| reference.name(0) == Some("steps");
        let output = self.output.iter().flat_map(Template::references).filter(of_steps);
        needed.extend(output.filter_map(|reference| self.step_index(reference.name(1)?)));
        if self.limits_what_is_said() {
            needed.extend(0..self.steps.len());
        }
        needed.sort_unstable();
        needed.dedup();
        needed
    }

    /// Whether a limit of its runs is about what their steps say.
    pub fn limits_what_is_said(&self) -> bool {
        self.limits.iter().any(|limit| matches!(limit.measure, Measure::Said(_)))
    }

    /// Whether a step of it has a rubric.
    pub fn grades(&self) -> bool {
        self.steps.iter().any(|step| step.rubric.is_some())
    }

    /// The steps whose outputs are needed to close a run.
    pub fn needed_to_close(&self) -> Vec<usize> {
        let mut needed: Vec<usize> = self.closing.iter().flat_map(|step| self.looked_up_by(step)).collect();
        needed.sort_unstable();
        needed.dedup();
        needed
    }

    /// The steps that a step looks something up of.
    fn looked_up_by(&self, step: &Step) -> Vec<usize> {
        let of_steps = |reference: &&Reference| reference.name(0) == Some("steps");
        let references = step.references().into_iter().filter(of_steps);
        references.filter_map(|reference| self.step_index(reference.name(1)?)).collect()
    }

    /// Whether a run may come to a step more than once.
    pub fn jumps(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.kind, StepKind::Goto { .. }))
    }

    /// Whether runs of other playbooks do steps of it.
    pub fn calls(&self) -> bool {
        self.steps.iter().any(|step| matches!(step.kind, StepKind::Playbook(_)))
    }

    /// Whether a step of it may fail without the run.
    pub fn forgives(&self) -> bool {
        self.steps.iter().any(|step| step.on_failure != OnFailure::Abort)
    }

    /// Whether a step of it is given a secret.
    pub fn gives_secrets(&self, step: &Step) -> bool {
        let secret = |reference: &&Reference| reference.name(0) == Some("secrets");
        !self.secrets.is_empty() && step.template.references().iter().any(secret)
    }

    /// Whether a run of it goes on when the gate before a step stays shut: past the
    /// step, or to what closes the run.
    pub fn takes_refusals(&self, step: usize) -> bool {
        let aborts = self.step(step).is_none_or(|step| step.on_failure == OnFailure::Abort);
        !aborts || self.graph || self.closes(RunStatus::Failed)
    }

    /// The step with an id, of those that close a run too.
    pub fn step_index(&self, id: &str) -> Option<usize> {
        self.steps.iter().chain(&self.closing).position(|step| step.id == id)
    }
}
