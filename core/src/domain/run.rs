//! The states of runs and steps, and the one table of what may follow what.
//! SQL repeats the guard: an update names the states it may come from, and a
//! trigger refuses to change a terminal row.

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
        _ => None,
    }
}

impl RunStatus {
    /// Whether it never changes again.
    pub fn is_terminal(self) -> bool {
        matches!(self, Self::Completed | Self::Failed | Self::Cancelled)
    }

    /// The statuses from which an event is allowed, for a guarded update.
    pub fn sources(event: RunEvent) -> Vec<String> {
        Self::ALL
            .iter()
            .filter(|status| next(**status, event).is_some())
            .map(|status| status.as_str().to_owned())
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const EVENTS: [RunEvent; 6] =
        [RunEvent::Start, RunEvent::Suspend, RunEvent::Resume, RunEvent::Complete, RunEvent::Fail, RunEvent::Cancel];

    proptest! {
        #[test]
        fn no_order_of_events_leaves_a_terminal_state(order in prop::collection::vec(0usize..6, 0..40)) {
            let mut status = RunStatus::Queued;
            let mut ended = None;
            for event in order.into_iter().map(|i| EVENTS[i]) {
                if let Some(to) = next(status, event) {
                    prop_assert!(ended.is_none(), "{status:?} -> {to:?} after the end");
                    status = to;
                }
                if status.is_terminal() {
                    ended = Some(status);
                }
            }
        }
    }

    #[test]
    fn every_open_state_has_a_way_out_and_every_state_a_name() {
        for status in RunStatus::ALL {
            assert_eq!(RunStatus::from_name(status.as_str()), Some(*status));
            let exits = EVENTS.iter().filter(|e| next(*status, **e).is_some()).count();
            assert_eq!(exits == 0, status.is_terminal());
        }
        for status in StepStatus::ALL {
            assert_eq!(StepStatus::from_name(status.as_str()), Some(*status));
        }
    }

    #[test]
    fn guards_name_the_states_an_event_may_come_from() {
        assert_eq!(RunStatus::sources(RunEvent::Complete), ["running"]);
        assert_eq!(RunStatus::sources(RunEvent::Cancel), ["queued", "running", "suspended"]);
    }
}
