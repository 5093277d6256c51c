//! The life of a task: the one table of what may follow what by hand.

use super::event::{TASK_APPROVED, TASK_CANCELLED, TASK_REJECTED, TASK_RETRIED};

/// The states.
pub const STATUSES: &[&str] =
    &["pending", "pending_approval", "in_progress", "completed", "rejected", "failed", "cancelled"];
/// How urgent a task is, from the least.
pub const PRIORITIES: &[&str] = &["low", "medium", "high", "critical"];

/// What is asked of a task.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It may be done.
    Approve,
    /// It may not.
    Reject,
    /// Nobody needs it any more.
    Cancel,
    /// Once more.
    Retry,
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The task's new status.
    Becomes(&'static str),
    /// It is so already.
    Stays,
    /// Its status forbids it.
    Refused,
}

impl Change {
    /// Decides by the task's status, and whether a person has approved it.
    pub fn decide(self, status: &str, approved: bool) -> Verdict {
        use Verdict::{Becomes, Refused, Stays};
        match (self, status) {
            (Self::Approve, "pending_approval") => Becomes("pending"),
            (Self::Approve, "pending" | "in_progress" | "completed") if approved => Stays,
            (Self::Reject, "pending_approval") => Becomes("rejected"),
            (Self::Reject, "rejected") | (Self::Cancel, "cancelled") => Stays,
            (Self::Cancel, "pending" | "pending_approval" | "in_progress") => Becomes("cancelled"),
            (Self::Retry, "failed" | "cancelled") => Becomes("pending"),
            (Self::Retry, "pending" | "in_progress") => Stays,
            _ => Refused,
        }
    }

    /// Its name in a sentence: "cannot be …".
    pub fn participle(self) -> &'static str {
        match self {
            Self::Approve => "approved",
            Self::Reject => "rejected",
            Self::Cancel => "cancelled",
            Self::Retry => "retried",
        }
    }

    /// What is told of it.
    pub fn event(self) -> &'static str {
        match self {
            Self::Approve => TASK_APPROVED,
            Self::Reject => TASK_REJECTED,
            Self::Cancel => TASK_CANCELLED,
            Self::Retry => TASK_RETRIED,
        }
    }
}

/// Whether a task with this status is over.
pub fn is_over(status: &str) -> bool {
    matches!(status, "completed" | "rejected" | "failed" | "cancelled")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_failed_or_was_called_off_comes_back() {
        for status in STATUSES.iter().filter(|status| is_over(status)) {
            for change in [Change::Approve, Change::Reject, Change::Cancel, Change::Retry] {
                if let Verdict::Becomes(next) = change.decide(status, false) {
                    assert_eq!((change, next), (Change::Retry, "pending"), "{status}");
                    assert!(["failed", "cancelled"].contains(status));
                }
            }
        }
    }

    #[test]
    fn the_same_word_twice_changes_nothing_and_the_other_is_refused() {
        for (change, before) in
            [(Change::Approve, "pending_approval"), (Change::Reject, "pending_approval"), (Change::Cancel, "pending")]
        {
            let Verdict::Becomes(after) = change.decide(before, false) else { panic!("{change:?} does nothing") };
            assert_eq!(change.decide(after, change == Change::Approve), Verdict::Stays);
        }
        assert_eq!(Change::Reject.decide("pending", true), Verdict::Refused);
        assert_eq!(Change::Approve.decide("rejected", false), Verdict::Refused);
    }
}
