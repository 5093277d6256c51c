//! Durations as people write them in playbooks and flags: `100ms`, `2s`, `5m`,
//! `1h`, `1d`. A bare number is refused: seconds or minutes is a guess.

use std::time::Duration;

/// The longest accepted duration: ten years, more than any playbook waits.
pub const DURATION_MAX: Duration = Duration::from_secs(10 * 366 * 86_400);

/// Why a text is no duration, in words for its author.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidDuration {
    /// Not a number followed by a unit.
    #[error("`{0}` is not a duration; write a number and a unit, such as 100ms, 2s, 5m, 1h or 1d")]
    Malformed(String),
    /// Longer than [`DURATION_MAX`].
    #[error("`{0}` is longer than ten years")]
    TooLong(String),
}

/// The units, the largest first, in milliseconds.
const UNITS: &[(&str, u64)] = &[("d", 86_400_000), ("h", 3_600_000), ("m", 60_000), ("s", 1_000), ("ms", 1)];

/// A duration as it is written for short, to the millisecond: `1m`, not `60s`.
pub fn written(duration: Duration) -> String {
    let ms = u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    let fits = |(_, unit): &&(&str, u64)| ms > 0 && ms.is_multiple_of(*unit);
    let (unit, size) = UNITS.iter().find(fits).unwrap_or(&("s", 1_000));
    format!("{}{unit}", ms / size)
}

/// Reads a duration.
pub fn parse(text: &str) -> Result<Duration, InvalidDuration> {
    let malformed = || InvalidDuration::Malformed(text.to_owned());
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(malformed)?;
    let (number, unit) = text.split_at(unit_at);
    let number: u64 = number.parse().map_err(|_| malformed())?;
    let (_, unit_ms) = UNITS.iter().find(|(name, _)| *name == unit).ok_or_else(malformed)?;
    number
        .checked_mul(*unit_ms)
        .map(Duration::from_millis)
        .filter(|d| *d <= DURATION_MAX)
        .ok_or_else(|| InvalidDuration::TooLong(text.to_owned()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reads_every_unit() {
        for (text, ms) in [("100ms", 100), ("2s", 2_000), ("5m", 300_000), ("1h", 3_600_000), ("1d", 86_400_000)] {
            assert_eq!(parse(text), Ok(Duration::from_millis(ms)));
            assert_eq!(written(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn writes_the_largest_unit_that_fits() {
        for (ms, text) in [(0, "0s"), (1, "1ms"), (1_500, "1500ms"), (90_000, "90s"), (120_000, "2m")] {
            assert_eq!(written(Duration::from_millis(ms)), text);
        }
    }

    #[test]
    fn refuses_what_leaves_a_doubt() {
        for bad in ["", "5", "s", "-1s", "1.5s", "1 s", "1S", "10w", "5m30s", "٣s"] {
            assert!(matches!(parse(bad), Err(InvalidDuration::Malformed(_))), "{bad}");
        }
        assert!(matches!(parse("4000d"), Err(InvalidDuration::TooLong(_))));
        assert!(parse("99999999999999999999d").is_err());
    }
}
