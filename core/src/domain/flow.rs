//! How much another system is sent at once, by how it bears what it gets: as much as works, less as
//! soon as it does not, and nothing but one probe at a time where nothing works (hazard H20). Pure:
//! the times and the draw are given.

use std::time::Duration;

use super::delivery::Sign;

/// So much at once, of a system that nothing is known of.
pub const FIRST: i32 = 8;
/// The most at once.
pub const BEARS_MAX: i32 = 256;
/// After so many failures in a row the breaker opens.
pub const FAILURES_MAX: i32 = 5;
/// For so long, when it opens; twice as long each time that the probe fails too.
pub const OPEN: Duration = Duration::from_secs(1);
/// No longer than this, so that a system which is back is not left waiting.
pub const OPEN_MAX: Duration = Duration::from_secs(30);
/// What a failure or a success adds to the error rate, as a share of what it was.
const WEIGHT: f64 = 0.05;
/// From this error rate on, retries are held to their budget.
pub const FAILING: f64 = 0.1;
/// A first try allows so much of a retry, while the budget counts (hazard H20).
const RETRIES_A_TRY: f64 = 0.1;
/// And so many are allowed a second, or what failed would wait for ever where nothing new comes.
const RETRIES_A_SECOND: f64 = 1.0;
/// The most that is saved up.
const BUDGET_MAX: f64 = 100.0;

/// What is known of a system that is sent to.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Flow {
    /// So much at once works.
    pub bears: i32,
    /// Failures in a row.
    pub failures: i32,
    /// How often in a row the breaker has opened.
    pub opened: i32,
    /// The share of tries that failed lately.
    pub error_rate: f64,
    /// How many retries may go while that is high.
    pub retry_budget: f64,
}

impl Default for Flow {
    fn default() -> Self {
        Self { bears: FIRST, failures: 0, opened: 0, error_rate: 0.0, retry_budget: 0.0 }
    }
}

impl Flow {
    /// Whether there is nothing that one more success could change.
    pub fn is_at_its_best(&self) -> bool {
        self.bears == BEARS_MAX && self.failures == 0 && self.opened == 0 && self.error_rate < 1e-3
    }

    /// How many retries may go, so long after the last try was noted.
    pub fn retries(&self, since: Duration) -> usize {
        if self.error_rate < FAILING {
            return usize::MAX;
        }
        (self.retry_budget + RETRIES_A_SECOND * since.as_secs_f64()).min(BUDGET_MAX) as usize
    }

    /// Time has passed since the last try was noted.
    pub fn wait(&mut self, since: Duration) {
        self.retry_budget = (self.retry_budget + RETRIES_A_SECOND * since.as_secs_f64()).min(BUDGET_MAX);
    }

    /// Takes note of a try. Says for how long the breaker opens, where it does; one that is open
    /// is only told of tries that were under way.
    pub fn note(&mut self, sign: Sign, retry: bool, is_open: bool, draw: f64) -> Option<Duration> {
        let change = if retry { -1.0 } else { RETRIES_A_TRY };
        self.retry_budget = (self.retry_budget + change).clamp(0.0, BUDGET_MAX);
        let failed = if sign == Sign::Badly { 1.0 } else { 0.0 };
        self.error_rate += WEIGHT * (failed - self.error_rate);
        match sign {
            Sign::Well => {
                (self.failures, self.opened) = (0, 0);
                self.bears = (self.bears + 1).min(BEARS_MAX);
                None
            }
            // It answers: that is all there is to know.
            Sign::Refused => {
                (self.failures, self.opened) = (0, 0);
                None
            }
            Sign::Badly => {
                self.failures = self.failures.saturating_add(1);
                self.bears = (self.bears / 2).max(1);
                if self.failures < FAILURES_MAX || is_open {
                    return None;
                }
                // One at a time from now on, until something works.
                self.bears = 1;
                let time = OPEN.mul_f64(2f64.powi(self.opened.min(16))).min(OPEN_MAX);
                self.opened = self.opened.saturating_add(1);
                // Never sooner: one probe a second at the most.
                Some(time.mul_f64(1.0 + 0.2 * draw.clamp(0.0, 1.0)))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_breaker_opens_for_longer_each_time_and_closes_at_once() {
        let mut flow = Flow::default();
        let opens: Vec<Option<u64>> =
            (0..13).map(|_| flow.note(Sign::Badly, true, false, 0.0).map(|time| time.as_secs())).collect();
        let wanted = [None, None, None, None, Some(1), Some(2), Some(4), Some(8), Some(16), Some(30), Some(30)];
        assert_eq!(opens[..11], wanted);
        assert_eq!(flow.bears, 1, "one probe");
        assert_eq!(flow.note(Sign::Badly, true, true, 0.0), None, "it is open already");
        assert_eq!(flow.note(Sign::Well, true, false, 0.0), None);
        assert_eq!((flow.failures, flow.opened, flow.bears), (0, 0, 2));
        // What answers is there, whatever it says.
        assert_eq!(flow.note(Sign::Refused, false, false, 0.0), None);
        assert_eq!((flow.failures, flow.bears), (0, 2));
    }

    #[test]
    fn what_works_gets_more_up_to_the_most() {
        let mut flow = Flow::default();
        for _ in 0..300 {
            flow.note(Sign::Well, false, false, 0.0);
        }
        assert_eq!(flow.bears, BEARS_MAX);
        assert!(flow.is_at_its_best());
        flow.note(Sign::Badly, false, false, 0.0);
        assert_eq!(flow.bears, BEARS_MAX / 2);
    }

    #[test]
    fn retries_are_a_tenth_of_first_tries_while_it_fails() {
        let mut flow = Flow::default();
        assert_eq!(flow.retries(Duration::ZERO), usize::MAX, "nothing has failed");
        while flow.error_rate < FAILING {
            flow.note(Sign::Badly, false, false, 0.0);
        }
        let mut retried = 0;
        for _ in 0..10_000 {
            // Every other first try fails, and whatever is allowed is retried.
            flow.note(Sign::Badly, false, false, 0.0);
            flow.note(Sign::Well, false, false, 0.0);
            for _ in 0..flow.retries(Duration::ZERO).min(1_000) {
                flow.note(Sign::Badly, true, false, 0.0);
                retried += 1;
            }
        }
        assert!((1_900..=2_000).contains(&retried), "{retried} of 20,000");
        assert_eq!(Flow { retry_budget: 0.0, ..flow }.retries(Duration::from_secs(3)), 3, "or one a second");
    }

    proptest! {
        #[test]
        fn it_is_never_closed_for_good_and_never_unbounded(
            signs in proptest::collection::vec((0u8..3, any::<bool>(), any::<bool>(), 0.0f64..1.0), 0..400),
        ) {
            let mut flow = Flow::default();
            for (sign, retry, open, draw) in signs {
                let sign = [Sign::Well, Sign::Refused, Sign::Badly][usize::from(sign)];
                let opens = flow.note(sign, retry, open, draw);
                prop_assert!((1..=BEARS_MAX).contains(&flow.bears));
                prop_assert!(opens.is_none_or(|time| time >= OPEN && time <= OPEN_MAX.mul_f64(1.2)));
                prop_assert!((0.0..=1.0).contains(&flow.error_rate) && (0.0..=BUDGET_MAX).contains(&flow.retry_budget));
            }
        }
    }
}
