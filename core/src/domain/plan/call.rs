//! A step that is done by a run of another playbook.

use serde_json::Value;

use super::RunContext;
use crate::domain::ids::RunId;
use crate::domain::outcome::{ErrorClass, Failure, Outcome};
use crate::domain::run::RunStatus;

/// How deep runs may call each other.
pub const DEPTH_MAX: i16 = 8;

/// The run that does the step at hand.
#[derive(Debug, Clone)]
pub struct Child {
    /// Which.
    pub run: RunId,
    /// How it stands.
    pub status: RunStatus,
    /// What it has come to.
    pub output: Option<Value>,
    /// Why it failed.
    pub error: Option<Value>,
}

impl RunContext {
    /// What the run that does a step has come to; `None` while there is none. One that
    /// is under way ends the wait by itself.
    pub fn called(&self, playbook: &str) -> Option<Outcome> {
        let child = self.child.as_ref()?;
        let failed = |class, said: &str| {
            Outcome::failed(Failure::new(class, format!("the run {} of `{playbook}` {said}", child.run)))
        };
        Some(match child.status {
            RunStatus::Completed => Outcome::done(child.output.clone().unwrap_or(Value::Null)),
            RunStatus::Failed => {
                let error = child.error.as_ref();
                let class = error.and_then(|error| ErrorClass::from_name(error["code"].as_str()?));
                let message = error.and_then(|error| error["message"].as_str()).unwrap_or("it gave no reason");
                let step = error.and_then(|error| error["step"].as_str()).unwrap_or_default();
                failed(class.unwrap_or(ErrorClass::Invalid), &format!("failed at `{step}`: {message}"))
            }
            RunStatus::Cancelled => failed(ErrorClass::Invalid, "was cancelled"),
            RunStatus::Queued | RunStatus::Running | RunStatus::Suspended => {
                Outcome::Released { delay: super::FAN_LOOK }
            }
        })
    }
}
