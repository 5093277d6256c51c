//! When an agent beats: every so many seconds, or by a cron expression, always counted from
//! the beat that was planned before, so that beats neither drift nor pile up.

use std::time::Duration;

use jiff::Timestamp;
use serde_json::Value;

use super::schedule::{CatchUp, Gap, Schedule, ScheduleSpec};

/// Between beats, where an agent says nothing else.
pub const INTERVAL: Duration = Duration::from_secs(300);
/// The longest interval: a year.
pub const INTERVAL_MAX_S: u64 = 366 * 24 * 3600;
/// A beat comes early or late by at most this part of its interval.
const JITTER: f64 = 0.1;
/// The most that a beat takes on; what is left is the next one's, which follows at once.
pub const ITEMS_MAX: i32 = 50;
/// The longest that one beat goes on taking on more (contract, "Defaults").
pub const BEAT_MAX: Duration = Duration::from_secs(15 * 60);
/// An agent that was given something to do looks at it after this: what comes in a burst it
/// finds together.
pub const SOON: Duration = Duration::from_secs(5);
/// So many beats in a row that cost something and change the same, or nothing, stop an agent,
/// where its `config.breaker` names no other number.
pub const SAME_BEATS_MAX: i32 = 5;
/// Why an agent beats is told by so many reasons at most.
pub const REASONS_MAX: usize = 20;

/// By what an agent beats.
#[derive(Debug)]
pub enum Plan {
    /// Every so often.
    Every(Duration),
    /// At times.
    At(Box<Schedule>),
}

/// The next beat.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Next {
    /// When it is planned, in microseconds since 1970: what the one after it is counted from.
    pub planned_us: i64,
    /// How long until it comes.
    pub delay: Duration,
}

/// The schedule that a cron expression is, in a company's zone.
fn schedule(cron: &str, zone: Option<&str>) -> Result<Schedule, String> {
    Schedule::read(&ScheduleSpec {
        cron: cron.to_owned(),
        timezone: zone.map(str::to_owned),
        gap: Gap::default(),
        overlap: None,
        catch_up: CatchUp::None,
        jitter: Duration::ZERO,
    })
}

/// What is wrong with a cron expression for beats; nothing where it is fine.
pub fn cron_problem(cron: &str) -> Option<String> {
    schedule(cron, None).err()
}

impl Plan {
    /// As an agent's `config` says: `heartbeat` (cron), or `heartbeat_interval` (seconds).
    pub fn of(config: &Value, zone: Option<&str>) -> Self {
        if let Some(schedule) = config["heartbeat"].as_str().and_then(|cron| schedule(cron, zone).ok()) {
            return Self::At(Box::new(schedule));
        }
        let seconds = config["heartbeat_interval"].as_u64().filter(|seconds| *seconds > 0);
        Self::Every(seconds.map_or(INTERVAL, |seconds| Duration::from_secs(seconds.min(INTERVAL_MAX_S))))
    }

    /// The next beat, when it is `now` and one was planned: that one still, if an agent was
    /// woken before it, else the one after it. `draw` in `[0, 1)` is the jitter. What is past
    /// is jumped over.
    pub fn next(&self, planned_us: Option<i64>, now_us: i64, draw: f64) -> Next {
        let until = |us: i64| Duration::from_micros(u64::try_from(us - now_us).unwrap_or(0));
        match self {
            Self::Every(interval) => {
                let interval_us = i64::try_from(interval.as_micros()).unwrap_or(i64::MAX).max(1);
                let window = interval.mul_f64(JITTER);
                let planned_us = match planned_us {
                    None => now_us.saturating_add(interval_us),
                    Some(planned) if until(planned) > window => planned,
                    Some(planned) => {
                        let missed = ((now_us - planned) / interval_us).max(0);
                        planned.saturating_add((missed + 1).saturating_mul(interval_us))
                    }
                };
                // Early by a tenth at the most, late by as much.
                let jitter = window.mul_f64(draw.clamp(0.0, 1.0) * 2.0);
                Next { planned_us, delay: (until(planned_us) + jitter).saturating_sub(window) }
            }
            Self::At(schedule) => {
                let now = Timestamp::from_microsecond(now_us).unwrap_or_default();
                let planned = planned_us.filter(|planned| *planned > now_us);
                let planned = planned.or_else(|| Some(schedule.next_after(now)?.as_microsecond()));
                // Those of one minute do not all come in its first second.
                let spread = Duration::from_secs(1).mul_f64(draw.clamp(0.0, 1.0));
                match planned {
                    Some(planned_us) => Next { planned_us, delay: until(planned_us) + spread },
                    // It never fires again.
                    None => Next { planned_us: now_us, delay: Duration::from_secs(INTERVAL_MAX_S) },
                }
            }
        }
    }
}

/// What a run is told of one message, and of what came of one task before it, in bytes of
/// JSON: all that there may be of both are less than the parameters of a run may have.
pub const TOLD_BYTES_MAX: usize = 8 * 1024;

/// A text, or what of it is told.
pub fn brief(text: &str) -> String {
    let mut bytes = 0;
    let over = text.char_indices().find(|(_, c)| {
        // As JSON writes it.
        bytes += match c {
            '"' | '\\' | '\n' | '\r' | '\t' => 2,
            c if c.is_control() => 6,
            c => c.len_utf8(),
        };
        bytes > TOLD_BYTES_MAX
    });
    match over {
        None => text.to_owned(),
        Some((at, _)) => format!("{} [cut: {at} of {} bytes are told]", &text[..at], text.len()),
    }
}

/// A value, or the first of it as text.
pub fn brief_value(value: serde_json::Value) -> serde_json::Value {
    let text = value.to_string();
    if text.len() <= TOLD_BYTES_MAX { value } else { brief(&text).into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    const S: i64 = 1_000_000;

    #[test]
    fn beats_are_counted_from_the_plan() {
        let plan = Plan::of(&json!({"heartbeat_interval": 60}), None);
        let at = |planned: i64, now: i64| plan.next(Some(planned * S), now * S, 0.5);
        assert_eq!(at(100, 101), Next { planned_us: 160 * S, delay: Duration::from_secs(59) });
        // Early by its jitter, and woken long before.
        assert_eq!(at(100, 95).planned_us, 160 * S);
        assert_eq!(at(100, 50), Next { planned_us: 100 * S, delay: Duration::from_secs(50) });
        // One that took 130 s is followed by the next that is planned, not by two.
        assert_eq!(at(100, 230), Next { planned_us: 280 * S, delay: Duration::from_secs(50) });
        assert!(matches!(Plan::of(&json!({}), None), Plan::Every(INTERVAL)));
    }

    #[test]
    fn cron_is_read_in_the_companys_zone() {
        let plan = Plan::of(&json!({"heartbeat": "0 9 * * *"}), Some("Asia/Tokyo"));
        let next = plan.next(None, 1_780_272_000 * S, 0.0);
        // 2026-06-01T00:00Z is nine o'clock there: the next one is tomorrow's.
        assert_eq!(next.planned_us, (1_780_272_000 + 86_400) * S);
        assert!(cron_problem("61 * * * *").is_some() && cron_problem("*/5 * * * *").is_none());
    }

    proptest! {
        #[test]
        fn the_next_beat_is_ahead_and_within_reach(interval in 1u64..100_000, planned in 0i64..1_000_000_000, late in 0i64..1_000_000, draw in 0.0f64..1.0) {
            let plan = Plan::Every(Duration::from_secs(interval));
            let now = planned + late;
            let next = plan.next(Some(planned * S), now * S, draw);
            prop_assert!(next.planned_us > now * S);
            prop_assert_eq!((next.planned_us - planned * S) % (interval as i64 * S), 0);
            prop_assert!(next.delay <= Duration::from_secs(interval).mul_f64(1.1001));
        }
    }

    #[test]
    fn what_is_told_is_bounded_as_json() {
        assert_eq!(brief("short \u{1}"), "short \u{1}");
        for text in ["x".repeat(100_000), "\u{1}".repeat(100_000), "\"\u{20ac}".repeat(50_000)] {
            let told = brief(&text);
            assert!(told.contains("[cut: ") && serde_json::json!(told).to_string().len() < TOLD_BYTES_MAX + 100);
            let value = brief_value(serde_json::json!({"a": text}));
            assert!(value.is_string() && value.to_string().len() < 2 * TOLD_BYTES_MAX + 100);
        }
        assert_eq!(brief_value(serde_json::json!({"a": 1})), serde_json::json!({"a": 1}));
    }
}
