//! The states of runs and steps, and the one table of what may follow what.
//! SQL repeats the guard: an update names the states it may come from, and a
//! trigger refuses every other transition (a test holds it against the table).

use serde::{Deserialize, Serialize};

macro_rules! states {
    ($(#[$doc:meta])* $name:ident { $($(#[$vdoc:meta])* $variant:ident = $text:literal,)+ }) => {
        $(#[$doc])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$vdoc])* #[serde(rename = $text)] $variant,)+
        }

        impl $name {
            /// Every state.
            pub const ALL: &'static [Self] = &[$(Self::$variant,)+];

            /// The word used in tables, JSON and pages.
            pub fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $text,)+ }
            }

            /// From that word.
            pub fn from_name(name: &str) -> Option<Self> {
                match name { $($text => Some(Self::$variant),)+ _ => None }
            }
        }
    };
}

states! {
    /// A run's status, as the API shows it.
    RunStatus {
        /// Waits to start.
        Queued = "queued",
        /// Executes its steps.
        Running = "running",
        /// Waits for an approval, an event, a timer or its company.
        Suspended = "suspended",
        /// All steps finished.
        Completed = "completed",
        /// A step failed and the run was aborted.
        Failed = "failed",
        /// Cancelled by hand.
        Cancelled = "cancelled",
    }
}

states! {
    /// A step's status, as the API shows it.
    StepStatus {
        /// Its turn has not come.
        Pending = "pending",
        /// An attempt has it.
        Running = "running",
        /// Waits for its next try.
        Waiting = "waiting",
        /// Waits for a person.
        PendingApproval = "pending_approval",
        /// Its output is stored.
        Completed = "completed",
        /// Gave up.
        Failed = "failed",
        /// Left out.
        Skipped = "skipped",
        /// The run was cancelled before it ended.
        Cancelled = "cancelled",
    }
}

/// What happens to a run.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum RunEvent {
    /// Its first step may be taken.
    Start,
    /// It must wait.
    Suspend,
    /// What it waited for has come.
    Resume,
    /// Its last step is done.
    Complete,
    /// A step gave up.
    Fail,
    /// Somebody cancelled it.
    Cancel,
    /// Somebody lets a failed run go on at its failed step.
    Retry,
    /// The same, where that step's gate is asked for again.
    RetryAtGate,
}

impl RunEvent {
    /// Every event.
    pub const ALL: [Self; 8] = [
        Self::Start,
        Self::Suspend,
        Self::Resume,
        Self::Complete,
        Self::Fail,
        Self::Cancel,
        Self::Retry,
        Self::RetryAtGate,
    ];
}

/// The transition table of runs: what an event makes of a status, or `None`
/// where it must not happen.
pub fn next(status: RunStatus, event: RunEvent) -> Option<RunStatus> {
    use {RunEvent as E, RunStatus as S};
    match (status, event) {
        (S::Queued, E::Start) => Some(S::Running),
        (S::Queued | S::Running, E::Suspend) => Some(S::Suspended),
        (S::Suspended, E::Resume) => Some(S::Running),
        (S::Running, E::Complete) => Some(S::Completed),
        // A suspended run fails when its gate is rejected or runs out.
        (S::Queued | S::Running | S::Suspended, E::Fail) => Some(S::Failed),
        (S::Queued | S::Running | S::Suspended, E::Cancel) => Some(S::Cancelled),
        (S::Failed, E::Retry) => Some(S::Running),
        (S::Failed, E::RetryAtGate) => Some(S::Suspended),
        _ => None,
    }
}

impl RunStatus {
    /// Whether it has ended: nothing happens any more, but for a person's retry of
    /// a failed one.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn only_a_retry_leaves_an_end_and_only_a_failure(order in prop::collection::vec(0usize..8, 0..40)) {
            let mut status = RunStatus::Queued;
            let mut ended = None;
            for event in order.into_iter().map(|i| RunEvent::ALL[i]) {
                if let Some(to) = next(status, event) {
                    let retried = matches!(event, RunEvent::Retry | RunEvent::RetryAtGate);
                    prop_assert_eq!(ended, retried.then_some(RunStatus::Failed), "{:?} -> {:?}", status, to);
                    status = to;
                }
                ended = status.is_terminal().then_some(status);
            }
        }
    }

    #[test]
    fn every_open_state_has_a_way_out_and_every_state_a_name() {
        for status in RunStatus::ALL {
            assert_eq!(RunStatus::from_name(status.as_str()), Some(*status));
            let exits = RunEvent::ALL.iter().filter(|e| next(*status, **e).is_some()).count();
            assert_eq!(exits == 0, status.is_terminal() && *status != RunStatus::Failed);
        }
        for status in StepStatus::ALL {
            assert_eq!(StepStatus::from_name(status.as_str()), Some(*status));
        }
    }
}
