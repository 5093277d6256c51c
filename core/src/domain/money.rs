//! Money as integer nano-dollars: token prices lie under a micro-dollar, and
//! sums must always be equal. USD numbers exist only at the edge, in JSON.

use serde::{Deserialize, Serialize};

/// An amount in nano-dollars (1e-9 USD).
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Nanos(pub i64);

const NANOS_PER_USD: f64 = 1e9;

impl Nanos {
    /// Nothing.
    pub const ZERO: Self = Self(0);

    /// From USD, rounded to the nearest nano-dollar. `None` for a negative,
    /// non-finite or unrepresentable amount (the type ends at 9.2e9 USD).
    pub fn from_usd(usd: f64) -> Option<Self> {
        let nanos = (usd * NANOS_PER_USD).round();
        (nanos.is_finite() && (0.0..9.2e18).contains(&nanos)).then_some(Self(nanos as i64))
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
        for bad in [-0.01, f64::NAN, f64::INFINITY, 1e30] {
            assert_eq!(Nanos::from_usd(bad), None);
        }
    }
}
