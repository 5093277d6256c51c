//! The life of a company: the one table of what may follow what.

/// What is asked of a company.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// Nothing new begins until it is resumed.
    Pause,
    /// The same, by its own name.
    Kill,
    /// It goes on.
    Resume,
    /// It never goes on.
    Stop,
}

/// What comes of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// The company's new status.
    Becomes(&'static str),
    /// It is so already.
    Stays,
    /// It cannot be; in the words after "the company".
    Refused(&'static str),
}

impl Change {
    /// Decides by the company's status.
    pub fn decide(self, status: &str) -> Verdict {
        use Verdict::{Becomes, Refused, Stays};
        match (self, status) {
            (Self::Pause | Self::Kill, "running" | "provisioning") => Becomes("paused"),
            (Self::Pause | Self::Kill, "paused") => Stays,
            (Self::Resume, "paused") => Becomes("running"),
            (Self::Resume, "running" | "provisioning") => Stays,
            (Self::Stop, "stopped") => Stays,
            (Self::Stop, _) => Becomes("stopped"),
            (_, _) => Refused("is stopped for good"),
        }
    }
}

/// Whether work of a company with this status may begin.
pub fn works(status: &str) -> bool {
    matches!(status, "provisioning" | "running")
}

/// Whether a company with this status may be deleted.
pub fn may_be_deleted(status: &str) -> bool {
    matches!(status, "paused" | "stopped")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stopped_company_stays_stopped() {
        for change in [Change::Pause, Change::Kill, Change::Resume] {
            assert!(matches!(change.decide("stopped"), Verdict::Refused(_)));
        }
        assert_eq!(Change::Stop.decide("stopped"), Verdict::Stays);
    }

    #[test]
    fn the_same_twice_changes_nothing() {
        for (change, before) in [
            (Change::Pause, "running"),
            (Change::Kill, "running"),
            (Change::Resume, "paused"),
            (Change::Stop, "paused"),
        ] {
            let Verdict::Becomes(after) = change.decide(before) else { panic!("{change:?} does nothing") };
            assert_eq!(change.decide(after), Verdict::Stays);
        }
    }
}
