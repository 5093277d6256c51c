//! How long to wait before the next try: exponential with full jitter, so
//! that what failed together does not come back together.

use std::time::Duration;

/// How a step backs off between tries.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Backoff {
    /// The bound of the first delay.
    pub initial: Duration,
    /// What each further bound is multiplied by.
    pub factor: f64,
    /// The highest bound.
    pub max: Duration,
    /// Draw uniformly below the bound; else wait the bound itself.
    pub jitter: bool,
}

impl Default for Backoff {
    /// 1 s, doubling, at most 5 min, full jitter (contract, "Defaults").
    fn default() -> Self {
        Self { initial: Duration::from_secs(1), factor: 2.0, max: Duration::from_secs(300), jitter: true }
    }
}

/// A server's `Retry-After` is honoured up to this (hazard H20).
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);

impl Backoff {
    /// The delay after `failures` failed tries (1 = after the first), with
    /// `draw` in `[0, 1)` as the source of jitter.
    pub fn delay(&self, failures: u32, draw: f64) -> Duration {
        let exponent = f64::from(failures.saturating_sub(1));
        let bound_s = (self.initial.as_secs_f64() * self.factor.powf(exponent)).min(self.max.as_secs_f64());
        let share = if self.jitter { draw.clamp(0.0, 1.0) } else { 1.0 };
        Duration::from_secs_f64((bound_s * share).max(0.0))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn never_over_the_cap_and_never_negative(failures in 0u32..10_000, draw in 0.0f64..1.0) {
            let backoff = Backoff::default();
            let delay = backoff.delay(failures, draw);
            prop_assert!(delay <= backoff.max);
            // The jittered delay lies under the plain one.
            let plain = Backoff { jitter: false, ..backoff };
            prop_assert!(delay <= plain.delay(failures, draw));
        }
    }

    #[test]
    fn doubles_until_the_cap() {
        let plain = Backoff { jitter: false, ..Backoff::default() };
        let seconds: Vec<_> = (1..=10).map(|n| plain.delay(n, 0.3).as_secs()).collect();
        assert_eq!(seconds, [1, 2, 4, 8, 16, 32, 64, 128, 256, 300]);
    }
}
