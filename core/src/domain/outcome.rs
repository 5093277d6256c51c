//! What an attempt can end with, and how failures are classed. The handler
//! states the class; nothing is guessed from an error's text.

use std::time::Duration;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::money::Nanos;
use super::plan::Gate;

/// Why a try failed, as far as retries care.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorClass {
    /// The other side or the network failed; it may work next time.
    Transient,
    /// The other side asked for less; `Retry-After` counts.
    RateLimited,
    /// The attempt ran out of its time.
    Timeout,
    /// The request itself is wrong: it will not get better by repeating.
    Invalid,
    /// A rule forbids it.
    Governance,
    /// What was done does not meet its rubric.
    Rubric,
    /// The worker died under it too often.
    Crash,
}

impl ErrorClass {
    /// Its name, as in JSON and in a playbook's `retry.on`.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Transient => "transient",
            Self::RateLimited => "rate_limited",
            Self::Timeout => "timeout",
            Self::Invalid => "invalid",
            Self::Governance => "governance",
            Self::Rubric => "rubric",
            Self::Crash => "crash",
        }
    }

    /// From its name.
    pub fn from_name(name: &str) -> Option<Self> {
        [Self::Transient, Self::RateLimited, Self::Timeout, Self::Invalid, Self::Governance, Self::Rubric, Self::Crash]
            .into_iter()
            .find(|class| class.as_str() == name)
    }
}

/// A failed try: what a person and a retry policy need to know.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Failure {
    /// The class that decides about retries.
    pub class: ErrorClass,
    /// One sentence for a person.
    pub message: String,
    /// What the other side asked us to wait; wins over the back-off and costs
    /// no try.
    #[serde(skip)]
    pub retry_after: Option<Duration>,
}

/// How long an error message is kept; the rest is cut with a mark.
pub const MESSAGE_CHARS_MAX: usize = 2_000;

impl Failure {
    /// A failure of a class; the message is cleaned of what cannot be stored.
    pub fn new(class: ErrorClass, message: impl Into<String>) -> Self {
        let mut message: String = message.into().replace('\0', "\u{fffd}");
        if let Some((cut, _)) = message.char_indices().nth(MESSAGE_CHARS_MAX) {
            message.truncate(cut);
            message.push('…');
        }
        Self { class, message, retry_after: None }
    }

    /// The request is wrong: no retry.
    pub fn invalid(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Invalid, message)
    }

    /// It may work next time.
    pub fn transient(message: impl Into<String>) -> Self {
        Self::new(ErrorClass::Transient, message)
    }
}

/// What a finished attempt hands to the engine.
#[derive(Debug, Clone)]
pub enum Outcome {
    /// It worked.
    Done {
        /// The step's output.
        output: Value,
        /// What it cost.
        cost: Nanos,
    },
    /// It did not.
    Failed {
        /// Why.
        failure: Failure,
        /// What was spent all the same.
        cost: Nanos,
    },
    /// It waits for an event; costs no try.
    Waits {
        /// The event's name.
        event: String,
        /// What its data must hold.
        matching: Value,
        /// How long.
        timeout: Duration,
    },
    /// A person is asked about something that it is about to do; costs no try.
    Asks(Box<Gate>),
    /// It is to be done for each item of a list; costs no try.
    Fans(Fanning),
    /// It was not tried to its end, through no fault of its own: the worker
    /// drains or cannot do this kind. Costs no try.
    Released {
        /// When it may be taken again.
        delay: Duration,
    },
}

/// The items of a step that are to be done, each by itself.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fanning {
    /// How many the list has.
    pub items: u32,
    /// The places of those to be done, where it is not all of them.
    pub todo: Option<Vec<i32>>,
    /// So many at once.
    pub parallel: u32,
    /// With more failures than this no other item begins.
    pub failures_max: u32,
}

impl Fanning {
    /// How many are to be done.
    pub fn len(&self) -> usize {
        self.todo.as_ref().map_or(self.items as usize, Vec::len)
    }

    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Outcome {
    /// A success without cost.
    pub fn done(output: Value) -> Self {
        Self::Done { output, cost: Nanos::ZERO }
    }

    /// What it cost.
    pub fn cost(&self) -> Nanos {
        match self {
            Self::Done { cost, .. } | Self::Failed { cost, .. } => *cost,
            Self::Waits { .. } | Self::Asks(_) | Self::Fans(_) | Self::Released { .. } => Nanos::ZERO,
        }
    }

    /// The same, having cost at least so much.
    #[must_use]
    pub fn having_cost(mut self, least: Nanos) -> Self {
        if let Self::Done { cost, .. } | Self::Failed { cost, .. } = &mut self {
            *cost = (*cost).max(least);
        }
        self
    }

    /// A failure without cost.
    pub fn failed(failure: Failure) -> Self {
        Self::Failed { failure, cost: Nanos::ZERO }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_message_is_bounded_and_storable() {
        let failure = Failure::invalid(format!("a\0{}", "ü".repeat(5_000)));
        assert!(!failure.message.contains('\0'));
        assert_eq!(failure.message.chars().count(), MESSAGE_CHARS_MAX + 1);
    }

    #[test]
    fn classes_have_names() {
        for name in ["transient", "rate_limited", "timeout", "invalid", "governance", "rubric", "crash"] {
            assert_eq!(ErrorClass::from_name(name).map(ErrorClass::as_str), Some(name));
        }
        assert_eq!(ErrorClass::from_name("oops"), None);
    }
}
