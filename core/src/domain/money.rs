//! Money as integer nano-dollars: token prices lie under a micro-dollar, and
//! sums must always be equal. USD numbers exist only at the edge, in JSON.

use serde::{Deserialize, Serialize};

/// An amount in nano-dollars (1e-9 USD).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub i64);

const NANOS_PER_USD: f64 = 1e9;
/// The most that one attempt may cost, in USD: what all attempts of the longest
/// run could cost then still fits into the type.
pub const COST_USD_MAX: f64 = 10_000.0;

impl Nanos {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// The cost of an attempt from USD, rounded to the nearest nano-dollar.
    /// `None` for a negative or non-finite amount, or one over
    /// [`COST_USD_MAX`].
    pub fn from_usd(usd: f64) -> Option<Self> {
        (0.0..=COST_USD_MAX).contains(&usd).then_some(Self((usd * NANOS_PER_USD).round() as i64))
    }

    /// What is left without a part of it.
    #[must_use]
    pub fn without(self, part: Self) -> Self {
        Self(self.0.saturating_sub(part.0).max(0))
    }

    /// USD for an answer, rounded to a micro-dollar.
    pub fn to_usd(self) -> f64 {
        (self.0 as f64 / 1e3).round() / 1e6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn usd_goes_in_and_comes_out() {
        assert_eq!(Nanos::from_usd(2.85), Some(Nanos(2_850_000_000)));
        assert_eq!(Nanos(2_850_000_000).to_usd(), 2.85);
        for bad in [-0.01, f64::NAN, f64::INFINITY, 1e30, COST_USD_MAX + 0.01] {
            assert_eq!(Nanos::from_usd(bad), None);
        }
    }
}
