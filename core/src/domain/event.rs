//! The names of what can happen: the activity log, and what webhooks and
//! streams carry. A dotted name belongs to one coarse activity type.

use serde_json::Value;

use super::ids::EventId;

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
/// A run began.
pub const PLAYBOOK_STARTED: &str = "playbook.started";
/// A run waits; `data.waiting_on` says for what.
pub const PLAYBOOK_SUSPENDED: &str = "playbook.suspended";
/// A run goes on after a wait.
pub const PLAYBOOK_RESUMED: &str = "playbook.resumed";
/// A run ended well.
pub const PLAYBOOK_COMPLETED: &str = "playbook.completed";
/// A run gave up.
pub const PLAYBOOK_FAILED: &str = "playbook.failed";
/// A run was cancelled by hand.
pub const PLAYBOOK_CANCELLED: &str = "playbook.cancelled";
/// An attempt has been running for longer than a blink.
pub const STEP_STARTED: &str = "step.started";
/// A step's result is stored.
pub const STEP_COMPLETED: &str = "step.completed";
/// A try of a step failed; `data.will_retry` says whether it was the last.
pub const STEP_FAILED: &str = "step.failed";
/// A gate waits for a person.
pub const APPROVAL_REQUESTED: &str = "approval.requested";
/// A gate was decided or ran out.
pub const APPROVAL_RESOLVED: &str = "approval.resolved";

/// The activity type that a dotted name is filed under.
pub fn activity_type(name: &str) -> &'static str {
    match name.split('.').next().unwrap_or_default() {
        "heartbeat" => "heartbeat",
        "task" => "task",
        "approval" | "governance" => "governance",
        "costs" => "cost",
        "agent" | "company" => "governance",
        "error" => "error",
        _ => "playbook",
    }
}

/// The activity action: the dotted name without its first part.
pub fn activity_action(name: &str) -> &str {
    name.split_once('.').map_or(name, |(_, action)| action)
}
