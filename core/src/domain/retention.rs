//! How long what is over is kept. What is not over is kept, whatever the age.

use std::time::Duration;

/// What is kept for a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kept {
    /// Runs that ended well, or were cancelled, with their steps, events and calls.
    Runs,
    /// Runs that failed; they can be retried as long as they are there.
    FailedRuns,
    /// Events that belong to no run.
    Activity,
    /// Deliveries that were taken.
    Deliveries,
    /// Deliveries that were given up; they can be sent again as long as they are there, and what
    /// they tell of is kept with them.
    FailedDeliveries,
}

impl Kept {
    /// All of them.
    pub const ALL: [Self; 5] = [Self::Runs, Self::FailedRuns, Self::Activity, Self::Deliveries, Self::FailedDeliveries];

    /// Its name, as in the table and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Runs => "runs",
            Self::FailedRuns => "failed_runs",
            Self::Activity => "activity",
            Self::Deliveries => "deliveries",
            Self::FailedDeliveries => "failed_deliveries",
        }
    }

    /// How many days, unless the operator says otherwise (contract, "Defaults").
    pub fn default_days(self) -> i32 {
        match self {
            Self::Runs | Self::Deliveries => 30,
            Self::FailedRuns | Self::Activity | Self::FailedDeliveries => 90,
        }
    }

    /// No fewer than these: what is younger may still be asked for by who tries again. A delivery
    /// is tried for more than a day, and what a webhook missed in five days is made up for.
    pub fn least_days(self) -> i32 {
        match self {
            Self::Runs | Self::FailedRuns | Self::Deliveries | Self::FailedDeliveries => 3,
            Self::Activity => 7,
        }
    }
}

/// The most days: a hundred years.
pub const DAYS_MAX: i32 = 36_500;

/// Days as a duration.
pub fn days(days: i32) -> Duration {
    Duration::from_secs(u64::try_from(days).unwrap_or(0) * 24 * 3600)
}
