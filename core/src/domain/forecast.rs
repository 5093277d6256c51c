//! What a company will spend, from what it has spent on whole days.

use super::money::Nanos;

/// Days that a forecast looks back on.
pub const WINDOW_DAYS: usize = 14;
/// What half of the window may differ by and still count as the same.
const STABLE_WITHIN: f64 = 0.1;
/// The normal distribution's quantile for an interval of 80 %.
const QUANTILE_80: f64 = 1.281_6;
/// Days of the longer estimates.
const WEEK: f64 = 7.0;
const MONTH: f64 = 30.0;

/// A forecast; amounts in USD.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Forecast {
    /// The mean of the window's days.
    pub daily_avg: f64,
    /// Seven of them.
    pub weekly_estimate: f64,
    /// Thirty of them.
    pub monthly_estimate: f64,
    /// Where the month's sum lies with 80 %, were days independent.
    pub monthly_low: f64,
    /// The same, above.
    pub monthly_high: f64,
    /// From 0 to 1: one less the standard error of the mean, relative to it.
    pub confidence: f64,
    /// `rising`, `falling` or `stable`: the later half of the window by the
    /// earlier one.
    pub trend: &'static str,
}

/// Forecasts from what was spent on each day of the window, oldest first; days
/// before the company's first are left out.
pub fn forecast(days: &[Nanos]) -> Forecast {
    let usd: Vec<f64> = days.iter().map(|day| day.to_usd()).collect();
    let n = usd.len().max(1) as f64;
    // From a positive zero: an empty sum of floats is the negative one.
    let mean = usd.iter().fold(0.0, |sum, day| sum + day) / n;
    let variance = usd.iter().map(|day| (day - mean).powi(2)).sum::<f64>() / (n - 1.0).max(1.0);
    let deviation = variance.sqrt();
    let margin = QUANTILE_80 * deviation * MONTH.sqrt();
    let confidence = match (usd.len(), mean > 0.0) {
        // Nothing is known yet.
        (0 | 1, _) => 0.0,
        (_, false) => 1.0,
        (_, true) => (1.0 - deviation / n.sqrt() / mean).clamp(0.0, 1.0),
    };
    Forecast {
        daily_avg: mean,
        weekly_estimate: mean * WEEK,
        monthly_estimate: mean * MONTH,
        monthly_low: (mean * MONTH - margin).max(0.0),
        monthly_high: mean * MONTH + margin,
        confidence,
        trend: trend(&usd),
    }
}

fn trend(days: &[f64]) -> &'static str {
    let (before, after) = days.split_at(days.len() / 2);
    let mean = |days: &[f64]| days.iter().sum::<f64>() / days.len().max(1) as f64;
    let (before, after) = (mean(before), mean(after));
    if days.len() < 2 || (before - after).abs() <= STABLE_WITHIN * before {
        "stable"
    } else if after > before {
        "rising"
    } else {
        "falling"
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn days(usd: &[f64]) -> Vec<Nanos> {
        usd.iter().map(|usd| Nanos::from_usd(*usd).expect("an amount")).collect()
    }

    #[test]
    fn even_days_are_sure_and_stable() {
        let f = forecast(&days(&[5.75; 14]));
        assert_eq!((f.daily_avg, f.weekly_estimate, f.monthly_estimate), (5.75, 40.25, 172.5));
        assert_eq!((f.confidence, f.trend), (1.0, "stable"));
        assert_eq!((f.monthly_low, f.monthly_high), (172.5, 172.5));
    }

    #[test]
    fn uneven_days_are_less_sure_and_tell_their_direction() {
        let rising: Vec<f64> = (1..=14).map(f64::from).collect();
        let f = forecast(&days(&rising));
        assert_eq!(f.trend, "rising");
        assert!(f.confidence > 0.5 && f.confidence < 1.0, "{f:?}");
        assert!(f.monthly_low < f.monthly_estimate && f.monthly_estimate < f.monthly_high);
        let falling: Vec<f64> = rising.into_iter().rev().collect();
        assert_eq!(forecast(&days(&falling)).trend, "falling");
    }

    #[test]
    fn nothing_spent_and_nothing_known_are_told_apart() {
        let unknown = forecast(&[]);
        assert_eq!(unknown.confidence, 0.0);
        for amount in [unknown.daily_avg, unknown.weekly_estimate, unknown.monthly_estimate, unknown.monthly_high] {
            assert!(amount == 0.0 && amount.is_sign_positive());
        }
        assert_eq!(forecast(&days(&[0.0; 14])).confidence, 1.0);
        assert_eq!(forecast(&days(&[0.0; 14])).trend, "stable");
    }
}
