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
    /// Decides by the task's status, and what a person has said: `pending`,
    /// `approved`, `rejected` or `cancelled`, or nothing where nobody is asked.
    pub fn decide(self, status: &str, approval: Option<&str>) -> Verdict {
        use Verdict::{Becomes, Refused, Stays};
        match (self, status) {
            (Self::Approve, "pending_approval") => Becomes("pending"),
            (Self::Approve, "pending" | "in_progress" | "completed") if approval == Some("approved") => Stays,
            (Self::Reject, "pending_approval") => Becomes("rejected"),
            (Self::Reject, "rejected") | (Self::Cancel, "cancelled") => Stays,
            (Self::Cancel, "pending" | "pending_approval" | "in_progress") => Becomes("cancelled"),
            // Called off before anybody had approved it.
            (Self::Retry, "cancelled") if approval == Some("cancelled") => Becomes("pending_approval"),
            (Self::Retry, "failed" | "cancelled") => Becomes("pending"),
            (Self::Retry, "pending" | "pending_approval" | "in_progress") => Stays,
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
                if let Verdict::Becomes(next) = change.decide(status, None) {
                    assert_eq!((change, next), (Change::Retry, "pending"), "{status}");
                    assert!(["failed", "cancelled"].contains(status));
                }
            }
        }
    }

    #[test]
    fn no_way_around_a_persons_word() {
        assert_eq!(Change::Cancel.decide("pending_approval", Some("pending")), Verdict::Becomes("cancelled"));
        assert_eq!(Change::Retry.decide("cancelled", Some("cancelled")), Verdict::Becomes("pending_approval"));
        assert_eq!(Change::Retry.decide("cancelled", Some("approved")), Verdict::Becomes("pending"));
        assert_eq!(Change::Retry.decide("rejected", Some("rejected")), Verdict::Refused);
    }

    #[test]
    fn the_same_word_twice_changes_nothing_and_the_other_is_refused() {
        for (change, before) in
            [(Change::Approve, "pending_approval"), (Change::Reject, "pending_approval"), (Change::Cancel, "pending")]
        {
            let Verdict::Becomes(after) = change.decide(before, None) else { panic!("{change:?} does nothing") };
            let said = (change == Change::Approve).then_some("approved");
            assert_eq!(change.decide(after, said), Verdict::Stays);
        }
        assert_eq!(Change::Reject.decide("pending", Some("approved")), Verdict::Refused);
        assert_eq!(Change::Approve.decide("rejected", Some("rejected")), Verdict::Refused);
    }
}
