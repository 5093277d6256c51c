//! The names of what can happen: the activity log, and what webhooks and
//! streams carry. A dotted name belongs to one coarse activity type.

use serde_json::Value;

use super::ids::EventId;
use super::playbook::problem::did_you_mean;

pub mod shape;

/// One thing that happened, before it is stored.
#[derive(Debug, Clone)]
pub struct Event {
    /// Its id; the same on every delivery.
    pub id: EventId,
    /// The dotted name.
    pub name: &'static str,
    /// What a reader needs to know; never secrets.
    pub data: Value,
}

impl Event {
    /// A new event.
    pub fn new(name: &'static str, data: Value) -> Self {
        Self { id: EventId::new(), name, data }
    }
}

/// A company was created.
pub const COMPANY_CREATED: &str = "company.created";
/// A company's status changed.
pub const COMPANY_STATUS_CHANGED: &str = "company.status_changed";
/// An agent's status changed.
pub const AGENT_STATE_CHANGED: &str = "agent.state_changed";
/// An agent beat.
pub const HEARTBEAT_FIRED: &str = "heartbeat.fired";
/// So much of a cap is spent: `data.percent` of `data.limit`.
pub const COSTS_THRESHOLD_REACHED: &str = "costs.threshold_reached";
/// A run began.
pub const PLAYBOOK_STARTED: &str = "playbook.started";
/// A run waits for its turn, among others of its playbook.
pub const PLAYBOOK_QUEUED: &str = "playbook.queued";
/// A run waits; `data.waiting_on` says for what.
pub const PLAYBOOK_SUSPENDED: &str = "playbook.suspended";
/// A run goes on after a wait.
pub const PLAYBOOK_RESUMED: &str = "playbook.resumed";
/// A run's steps are over; it is undone or closed before it ends.
pub const PLAYBOOK_CLOSING: &str = "playbook.closing";
/// A run ended well.
pub const PLAYBOOK_COMPLETED: &str = "playbook.completed";
/// A run gave up.
pub const PLAYBOOK_FAILED: &str = "playbook.failed";
/// A run was cancelled by hand.
pub const PLAYBOOK_CANCELLED: &str = "playbook.cancelled";
/// A run that was to start by itself could not; `data.reason` says why.
pub const PLAYBOOK_SKIPPED: &str = "playbook.skipped";
/// An attempt has been running for longer than a blink.
pub const STEP_STARTED: &str = "step.started";
/// A step's result is stored.
pub const STEP_COMPLETED: &str = "step.completed";
/// Steps were left out, since their conditions do not hold.
pub const STEP_SKIPPED: &str = "step.skipped";
/// A try of a step failed; `data.will_retry` says whether it was the last.
pub const STEP_FAILED: &str = "step.failed";
/// A task was begun by its agent.
pub const TASK_STARTED: &str = "task.started";
/// A task is done.
pub const TASK_COMPLETED: &str = "task.completed";
/// A task has failed.
pub const TASK_FAILED: &str = "task.failed";
/// A task was made.
pub const TASK_CREATED: &str = "task.created";
/// A task was changed by hand.
pub const TASK_UPDATED: &str = "task.updated";
/// A person let a task be done.
pub const TASK_APPROVED: &str = "task.approved";
/// A person refused a task.
pub const TASK_REJECTED: &str = "task.rejected";
/// A task was called off.
pub const TASK_CANCELLED: &str = "task.cancelled";
/// A task is to be tried again.
pub const TASK_RETRIED: &str = "task.retried";
/// An agent, or a step, has written to somebody.
pub const MESSAGE_SENT: &str = "message.sent";
/// Something was written into a memory.
pub const MEMORY_WRITTEN: &str = "memory.written";
/// Somebody was told of what is remembered, with the versions of it.
pub const MEMORY_READ: &str = "memory.read";
/// A client has sent a named event, for runs that wait for it.
pub const EVENT_RECEIVED: &str = "playbook.event_received";
/// The output of a step was held against its rubric, or a run against its limits.
pub const RUBRIC_EVALUATED: &str = "rubric.evaluated";
/// A gate waits for a person.
pub const APPROVAL_REQUESTED: &str = "approval.requested";
/// Nobody has decided about a gate in time, and anybody may now.
pub const APPROVAL_ESCALATED: &str = "approval.escalated";
/// A gate has waited for half of its time, or for nine tenths.
pub const APPROVAL_REMINDER: &str = "approval.reminder";
/// A gate was decided or ran out.
pub const APPROVAL_RESOLVED: &str = "approval.resolved";

/// A webhook is sent to no more, since nothing has worked for too long, or since it said so.
pub const WEBHOOK_DISABLED: &str = "webhook.disabled";

/// Every name that is written today.
pub const NAMES: &[&str] = &[
    COMPANY_CREATED,
    COMPANY_STATUS_CHANGED,
    AGENT_STATE_CHANGED,
    HEARTBEAT_FIRED,
    COSTS_THRESHOLD_REACHED,
    PLAYBOOK_STARTED,
    PLAYBOOK_QUEUED,
    PLAYBOOK_SUSPENDED,
    PLAYBOOK_RESUMED,
    PLAYBOOK_CLOSING,
    PLAYBOOK_COMPLETED,
    PLAYBOOK_FAILED,
    PLAYBOOK_CANCELLED,
    PLAYBOOK_SKIPPED,
    STEP_STARTED,
    STEP_COMPLETED,
    STEP_FAILED,
    STEP_SKIPPED,
    TASK_CREATED,
    TASK_STARTED,
    TASK_COMPLETED,
    TASK_FAILED,
    TASK_UPDATED,
    TASK_APPROVED,
    TASK_REJECTED,
    TASK_CANCELLED,
    TASK_RETRIED,
    MESSAGE_SENT,
    MEMORY_WRITTEN,
    MEMORY_READ,
    EVENT_RECEIVED,
    RUBRIC_EVALUATED,
    APPROVAL_REQUESTED,
    APPROVAL_ESCALATED,
    APPROVAL_REMINDER,
    APPROVAL_RESOLVED,
    WEBHOOK_DISABLED,
];

/// Whether a pattern (`step.failed`, `step.*`, `*`) takes a name in.
pub fn matches(pattern: &str, name: &str) -> bool {
    match pattern.strip_suffix('*') {
        Some(prefix) => name.starts_with(prefix),
        None => pattern == name,
    }
}

/// What is wrong with a pattern, when it takes in nothing that happens.
pub fn pattern_problem(pattern: &str) -> Option<String> {
    let whole = pattern == "*" || pattern.ends_with(".*") || !pattern.contains('*');
    let all = || NAMES.iter().copied();
    if whole && all().any(|name| matches(pattern, name)) {
        return None;
    }
    let families = all().filter_map(|name| name.split_once('.')).map(|(family, _)| format!("{family}.*"));
    let known: Vec<String> = all().map(str::to_owned).chain(families).collect();
    let near = did_you_mean(pattern, known.iter().map(String::as_str));
    Some(near.map_or_else(
        || "no such event; write a name such as playbook.failed, a family such as step.*, or *".to_owned(),
        |near| format!("no such event; {near}"),
    ))
}

/// Whether data holds all that is asked for, as `@>` of Postgres has it: a map its
/// entries, a list something for each item, else the same; null asks for nothing.
pub fn holds(data: &Value, asked: &Value) -> bool {
    fn within(data: &Value, asked: &Value) -> bool {
        match (data, asked) {
            (Value::Object(data), Value::Object(asked)) => {
                asked.iter().all(|(name, asked)| data.get(name).is_some_and(|data| within(data, asked)))
            }
            (Value::Array(data), Value::Array(asked)) => {
                asked.iter().all(|asked| data.iter().any(|data| within(data, asked)))
            }
            (Value::Number(data), Value::Number(asked)) => data == asked || data.as_f64() == asked.as_f64(),
            (data, asked) => data == asked,
        }
    }
    asked.is_null() || within(data, asked)
}

/// Whether a client may call an event so: 1 to 200 letters, digits and `._-:/`.
pub fn is_event_name(name: &str) -> bool {
    let fits = |c: char| c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | ':' | '/');
    (1..=200).contains(&name.chars().count()) && name.chars().all(fits)
}

/// The activity types, each with the first parts of the dotted names that are
/// filed under it.
pub const ACTIVITY_TYPES: &[(&str, &[&str])] = &[
    ("heartbeat", &["heartbeat"]),
    ("task", &["task"]),
    ("playbook", &["playbook", "step", "rubric"]),
    ("error", &["error", "webhook"]),
    ("governance", &["approval", "governance", "agent", "company"]),
    ("cost", &["costs"]),
    ("tool_use", &["tool", "message", "memory"]),
];

/// The first part of a dotted name.
fn kind(name: &str) -> &str {
    name.split('.').next().unwrap_or_default()
}

/// The activity type that a dotted name is filed under.
pub fn activity_type(name: &str) -> &'static str {
    let filed = ACTIVITY_TYPES.iter().find(|(_, kinds)| kinds.contains(&kind(name)));
    filed.map_or("playbook", |(activity, _)| activity)
}

/// The activity action: the dotted name without its first part.
pub fn activity_action(name: &str) -> &str {
    name.split_once('.').map_or(name, |(_, action)| action)
}

/// What an event is about, as type and id. `company` and `run` are those that
/// it is stored with.
pub fn resource(name: &str, data: &Value, company: &str, run: Option<&str>) -> (&'static str, String) {
    let given = |field: &str| data.get(field).and_then(Value::as_str).map(str::to_owned);
    let about = match kind(name) {
        "task" => given("task_id").map(|id| ("task", id)),
        "approval" => given("approval_id").map(|id| ("approval", id)),
        "agent" | "heartbeat" => given("agent_id").map(|id| ("agent", id)),
        _ => None,
    };
    about.or_else(|| run.map(|id| ("run", id.to_owned()))).unwrap_or_else(|| ("company", company.to_owned()))
}

/// An event in a sentence.
pub fn summary(name: &str, data: &Value) -> String {
    let text = |field: &str| data.get(field).and_then(Value::as_str).unwrap_or_default();
    let why = data.pointer("/error/message").and_then(Value::as_str).unwrap_or_default();
    match name {
        COMPANY_CREATED => format!("Created company: {}", text("name")),
        COMPANY_STATUS_CHANGED => format!("Company is {}", text("to")),
        AGENT_STATE_CHANGED => format!("Agent is {}", text("to")),
        HEARTBEAT_FIRED => "Heartbeat".to_owned(),
        COSTS_THRESHOLD_REACHED => format!("Spent {} % of {}", data["percent"], text("rule")),
        PLAYBOOK_STARTED => format!("Started playbook: {}", text("playbook")),
        PLAYBOOK_SUSPENDED => "Run waits".to_owned(),
        PLAYBOOK_RESUMED => "Run goes on".to_owned(),
        PLAYBOOK_COMPLETED => "Run completed".to_owned(),
        PLAYBOOK_FAILED => format!("Run failed: {why}"),
        PLAYBOOK_CANCELLED => "Run cancelled".to_owned(),
        STEP_STARTED => format!("Started step: {}", text("step")),
        STEP_COMPLETED => format!("Completed step: {}", text("step")),
        STEP_FAILED => format!("Step failed: {}", text("step")),
        TASK_CREATED => format!("Created task: {}", text("title")),
        TASK_STARTED => format!("Began task: {}", text("title")),
        TASK_COMPLETED => format!("Completed task: {}", text("title")),
        TASK_FAILED => format!("Task failed: {}", text("title")),
        TASK_UPDATED => format!("Changed task: {}", text("title")),
        TASK_APPROVED => format!("Approved task: {}", text("title")),
        TASK_REJECTED => format!("Rejected task: {}", text("title")),
        TASK_CANCELLED => format!("Cancelled task: {}", text("title")),
        MESSAGE_SENT => format!("Sent message: {}", text("text")),
        MEMORY_WRITTEN => format!("Remembered: {}", text("key")),
        MEMORY_READ => format!("Looked up in memory: {}", data["read"].as_array().map_or(0, Vec::len)),
        TASK_RETRIED => format!("Retried task: {}", text("title")),
        EVENT_RECEIVED => format!("Received event: {}", text("name")),
        RUBRIC_EVALUATED => match text("step") {
            "" => format!("Limits of the run: {}", text("decision")),
            step => format!("Rubric of step {step}: {}, score {}", text("decision"), data["score"]),
        },
        APPROVAL_REQUESTED => match data.pointer("/context/step").and_then(Value::as_str) {
            Some(step) => format!("Approval requested: {step}"),
            None => "Approval requested".to_owned(),
        },
        WEBHOOK_DISABLED => format!("Disabled webhook: {}", text("reason")),
        APPROVAL_RESOLVED => format!("Approval {}", text("decision")),
        other => other.replace(['.', '_'], " "),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn every_name_is_filed_once() {
        let mut kinds: Vec<&str> = ACTIVITY_TYPES.iter().flat_map(|(_, kinds)| kinds.iter().copied()).collect();
        let all = kinds.len();
        kinds.sort_unstable();
        kinds.dedup();
        assert_eq!(kinds.len(), all);
        assert_eq!(activity_type(TASK_CREATED), "task");
        assert_eq!(activity_type(STEP_FAILED), "playbook");
        assert_eq!(activity_type(APPROVAL_REQUESTED), "governance");
        assert_eq!((activity_action(TASK_CREATED), activity_action("x")), ("created", "x"));
    }

    #[test]
    fn patterns_take_in_what_happens() {
        for good in ["*", "costs.threshold_reached", "rubric.*", "step.*", "step.failed", "company.created"] {
            assert_eq!(pattern_problem(good), None, "{good}");
        }
        assert!(pattern_problem("step.faild").is_some_and(|said| said.contains("`step.failed`")));
        assert!(pattern_problem("steps.*").is_some_and(|said| said.contains("`step.*`")));
        for bad in ["", "st*", "*.failed", "nothing", "step.*.x"] {
            assert!(pattern_problem(bad).is_some(), "{bad}");
        }
        assert!(matches("step.*", "step.failed") && !matches("step.*", "steps.x") && !matches("step", "step.failed"));
    }

    #[test]
    fn an_event_is_about_the_narrowest_thing_it_names() {
        assert_eq!(resource(TASK_CREATED, &json!({"task_id": "tsk_1"}), "co_1", None), ("task", "tsk_1".into()));
        assert_eq!(resource(STEP_COMPLETED, &json!({}), "co_1", Some("run_1")), ("run", "run_1".into()));
        assert_eq!(resource(COMPANY_CREATED, &json!({}), "co_1", None), ("company", "co_1".into()));
    }
}
