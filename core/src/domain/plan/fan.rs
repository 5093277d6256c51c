//! A step that is done for each item of a list: what its items come to.
//!
//! The run's own job waits while lanes go through the items, so many at once: a
//! lane is a job that does one item after another. When the last lane has ended,
//! the run's job finds here what became of them all.

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};

use super::RunContext;
use crate::domain::artifact::Artifact;
use crate::domain::outcome::{ErrorClass, Failure, Fanning, Outcome};
use crate::domain::playbook::expr;
use crate::domain::playbook::model::{Fan, Step};

/// How long a run waits for its items before it looks whether it was forgotten.
/// It is woken when they are done.
pub const FAN_LOOK: Duration = Duration::from_secs(3600);
/// So many failures of items are told.
pub const FAILURES_TOLD: usize = 5;

/// The item that an attempt is about.
#[derive(Debug, Clone)]
pub struct Item {
    /// Its place in the list, from 0.
    pub index: usize,
    /// The same as a value, for `${index}`.
    pub shown: Value,
    /// The list.
    pub list: Arc<Vec<Value>>,
}

impl Item {
    /// An item of a list.
    pub fn new(index: usize, list: Arc<Vec<Value>>) -> Self {
        Self { index, shown: index.into(), list }
    }
}

/// How the items of a step stand.
#[derive(Debug, Clone)]
pub enum Fanned {
    /// Lanes are at work.
    Open,
    /// Some are done from before the run failed; the others are to be done.
    Begun {
        /// Which are done, in order.
        done: Vec<i32>,
        /// What they have said, in bytes.
        bytes: i64,
    },
    /// No lane is at work any more.
    Over {
        /// How many there are.
        items: u32,
        /// What was done, by place; without the outputs, where they are too large
        /// to be kept together.
        outputs: Vec<(i32, Option<Value>)>,
        /// What failed, by place, with the reasons of the first few.
        failures: Vec<(i32, Value)>,
        /// What all of them have said, in bytes.
        bytes: i64,
    },
}

/// What becomes of an item after an attempt.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ItemDecision {
    /// It is done.
    Done,
    /// It gives up.
    Failed,
    /// It is tried again after a delay.
    Retry {
        /// How long to wait.
        delay: Duration,
        /// Whether the try counts.
        charged: bool,
    },
}

impl RunContext {
    /// The list that a step is done for.
    pub fn list(&self, fan: &Fan) -> Result<Vec<Value>, Failure> {
        let wrong = |what: String| Failure::invalid(format!("for_each: {what}"));
        match fan.items.render(&self.scope()).map_err(|error| wrong(error.to_string()))? {
            Value::Array(list) if list.len() > fan.items_max as usize => {
                Err(wrong(format!("{} items, over the limit of {}; set `max_items`", list.len(), fan.items_max)))
            }
            Value::Array(list) => Ok(list),
            other => Err(wrong(match Artifact::of(&other) {
                Some(artifact) => {
                    format!("the list is an artifact, of {} bytes, which no items are read from", artifact.bytes)
                }
                None => format!("must be a list, not {}", expr::kind_of(&other)),
            })),
        }
    }

    /// An attempt of the run itself at a step that is done for a list.
    pub fn fan(&self, fan: &Fan) -> Outcome {
        match &self.fanned {
            Some(Fanned::Open) => Outcome::Released { delay: FAN_LOOK },
            Some(Fanned::Over { items, outputs, failures, bytes }) => match self.fits(*bytes) {
                Ok(()) => over(fan, *items, outputs, failures),
                Err(failure) => Outcome::failed(failure),
            },
            Some(Fanned::Begun { done, .. }) => self.open(fan, done),
            None => self.open(fan, &[]),
        }
    }

    /// How many items are over whose outputs are too large together to be here, of how
    /// many that are done.
    pub fn outputs_apart(&self) -> Option<(u32, usize)> {
        match &self.fanned {
            Some(Fanned::Over { items, outputs, .. }) if outputs.iter().any(|(_, output)| output.is_none()) => {
                Some((*items, outputs.len()))
            }
            _ => None,
        }
    }

    /// What the items have said that are over, in bytes.
    pub fn items_bytes(&self) -> i64 {
        match &self.fanned {
            Some(Fanned::Over { bytes, .. }) => *bytes,
            _ => 0,
        }
    }

    /// What the run keeps while items are done: with what some have said before it
    /// failed, which it counts when all are over.
    pub fn bytes_begun(&self) -> i64 {
        match &self.fanned {
            Some(Fanned::Begun { bytes, .. }) => self.bytes.saturating_add(*bytes),
            _ => self.bytes,
        }
    }

    fn open(&self, fan: &Fan, done: &[i32]) -> Outcome {
        let list = match self.list(fan) {
            Ok(list) if list.is_empty() => return Outcome::done(json!([])),
            Ok(list) => list,
            Err(failure) => return Outcome::failed(failure),
        };
        let items = u32::try_from(list.len()).unwrap_or(u32::MAX);
        let all = 0..i32::try_from(items).unwrap_or(i32::MAX);
        let todo = (!done.is_empty()).then(|| all.filter(|item| done.binary_search(item).is_err()).collect());
        let failures_max = if fan.goes_on { items } else { fan.may_fail(items) };
        Outcome::Fans(Fanning { items, todo, parallel: fan.parallel, failures_max })
    }

    /// What becomes of an item after an attempt; `attempt` counts the tries
    /// charged, this one included.
    pub fn decide_item(&self, step: &Step, attempt: u32, outcome: &Outcome, draw: f64) -> ItemDecision {
        match outcome {
            Outcome::Done { .. } => ItemDecision::Done,
            Outcome::Released { delay } => ItemDecision::Retry { delay: *delay, charged: false },
            Outcome::Failed { failure, .. } => match super::again(step, attempt, failure, draw) {
                Ok((delay, charged)) => ItemDecision::Retry { delay, charged },
                Err(_) => ItemDecision::Failed,
            },
            // No item is a step that waits or has items of its own.
            Outcome::Waits { .. } | Outcome::Asks(_) | Outcome::Fans(_) => ItemDecision::Failed,
        }
    }
}

/// What a step comes to whose items are all over: their outputs in the order of the
/// list, null for what failed.
fn over(fan: &Fan, items: u32, outputs: &[(i32, Option<Value>)], failures: &[(i32, Value)]) -> Outcome {
    let may_fail = fan.may_fail(items);
    if failures.len() > may_fail as usize {
        return Outcome::failed(too_few(items, may_fail, outputs.len(), failures));
    }
    let mut list = vec![Value::Null; items as usize];
    for (item, output) in outputs {
        let place = usize::try_from(*item).ok().and_then(|item| list.get_mut(item));
        // Those that are too large to be here become an artifact.
        if let (Some(place), Some(output)) = (place, output) {
            place.clone_from(output);
        }
    }
    Outcome::done(Value::Array(list))
}

fn too_few(items: u32, may_fail: u32, done: usize, failures: &[(i32, Value)]) -> Failure {
    let message = |error: &Value| error["message"].as_str().unwrap_or("it failed").to_owned();
    let told: Vec<String> =
        failures.iter().take(FAILURES_TOLD).map(|(item, error)| format!("item {item}: {}", message(error))).collect();
    let code = failures.first().and_then(|(_, error)| error["code"].as_str());
    let class = code.and_then(ErrorClass::from_name).unwrap_or(ErrorClass::Invalid);
    let counts = format!("{} of {items} items failed, where {may_fail} may, and {done} were done", failures.len());
    Failure::new(class, format!("{counts}; {}", told.join("; ")))
}
