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

/// Reads a duration.
pub fn parse(text: &str) -> Result<Duration, InvalidDuration> {
    let malformed = || InvalidDuration::Malformed(text.to_owned());
    let unit_at = text.find(|c: char| !c.is_ascii_digit()).ok_or_else(malformed)?;
    let (number, unit) = text.split_at(unit_at);
    let number: u64 = number.parse().map_err(|_| malformed())?;
    let unit_ms: u64 = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(malformed()),
    };
    number
        .checked_mul(unit_ms)
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
