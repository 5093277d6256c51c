//! When a schedule fires: cron fields read as local time in an IANA zone, each
//! match an instant, with the two hours a year in which that is not one and the
//! same thing decided by the author.
//!
//! Everything is computed from the planned time, never from the moment at which
//! somebody got round to it, and what was missed is jumped over, not walked.

use std::time::Duration;

use croner::Cron;
use jiff::civil::DateTime;
use jiff::tz::{AmbiguousOffset, TimeZone};
use jiff::{SignedDuration, Timestamp, Unit, Zoned};

use super::digest::sha256;
use super::duration;

/// A schedule as it is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ScheduleSpec {
    /// Five fields, or `@daily` and its kin.
    pub cron: String,
    /// An IANA zone; UTC without.
    pub timezone: Option<String>,
    /// What becomes of times that a zone leaves out.
    pub gap: Gap,
    /// What becomes of times that a zone has twice; without, see [`Overlap`].
    pub overlap: Option<Overlap>,
    /// What becomes of fires that were missed.
    pub catch_up: CatchUp,
    /// It fires late by a part of this, always the same part.
    pub jitter: Duration,
}

/// What becomes of a time that does not exist, as when clocks go forward.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Gap {
    /// It fires when the gap is over, once for all that was in it.
    #[default]
    Shift,
    /// It does not fire.
    Skip,
}

/// What becomes of a time that comes twice, as when clocks go back. When nothing
/// is said, what fires in every hour goes on firing, and everything else fires the
/// first time only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Overlap {
    /// It fires the first time.
    First,
    /// It fires both times.
    Both,
}

/// What becomes of fires that nobody carried out, because nobody was there or the
/// company was paused.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum CatchUp {
    /// Nothing: only what is less than [`LATE_MAX`] late.
    None,
    /// One run for the last of them.
    #[default]
    Latest,
    /// A run for each, the last so many.
    All(u16),
}

/// The most missed fires that are made up for.
pub const CATCH_UP_MAX: u16 = 100;
/// A fire that is carried out within this time was not missed: a worker that died
/// is taken over from, and a deployment done, in less.
pub const LATE_MAX: Duration = Duration::from_secs(300);
/// The longest jitter.
pub const JITTER_MAX: Duration = Duration::from_secs(24 * 3600);

impl CatchUp {
    /// Reads `none`, `latest`, `all` or `all(10)`.
    pub fn parse(text: &str) -> Option<Self> {
        match text.trim() {
            "none" => Some(Self::None),
            "latest" => Some(Self::Latest),
            "all" => Some(Self::All(CATCH_UP_MAX)),
            text => {
                let count = text.strip_prefix("all(")?.strip_suffix(')')?.trim().parse().ok()?;
                (1..=CATCH_UP_MAX).contains(&count).then_some(Self::All(count))
            }
        }
    }

    /// As it is written.
    pub fn written(self) -> String {
        match self {
            Self::None => "none".into(),
            Self::Latest => "latest".into(),
            Self::All(CATCH_UP_MAX) => "all".into(),
            Self::All(count) => format!("all({count})"),
        }
    }
}

/// A schedule that can be asked.
#[derive(Debug, Clone)]
pub struct Schedule {
    cron: Cron,
    zone: TimeZone,
    gap: Gap,
    twice: bool,
    catch_up: CatchUp,
    jitter: Duration,
}

impl Schedule {
    /// Reads a schedule; the error is a sentence for its author.
    pub fn read(spec: &ScheduleSpec) -> Result<Self, String> {
        let text = spec.cron.trim();
        let words = text.split_whitespace().count();
        if !text.starts_with('@') && words != 5 {
            return Err(format!("`{text}` is no cron expression: five fields, found {words}"));
        }
        // The parser takes it for a set of nothing, whose next time is looked for minute by
        // minute to the end of all years.
        if text.split_whitespace().any(|field| field.split(',').any(str::is_empty)) {
            return Err(format!("`{text}` is no cron expression: nothing stands beside a comma"));
        }
        let cron: Cron = text.parse().map_err(|error| format!("`{text}` is no cron expression: {error}"))?;
        let zone = spec.timezone.as_deref().unwrap_or("UTC");
        let zone = TimeZone::get(zone).map_err(|_| format!("there is no time zone `{zone}`"))?;
        // `@hourly` has no hours to restrict; of the others only minutes have none.
        let hours = text.split_whitespace().nth(1).unwrap_or(if text == "@hourly" { "*" } else { "0" });
        let twice = spec.overlap.map_or_else(|| hours.starts_with('*'), |overlap| overlap == Overlap::Both);
        let schedule =
            Self { cron, zone, gap: spec.gap, twice, catch_up: spec.catch_up, jitter: spec.jitter.min(JITTER_MAX) };
        // Some read well and never fire, such as `0 0 31 2 *`.
        let from = Timestamp::from_second(1_767_225_600).unwrap_or_default();
        schedule.next_after(from).map(|_| schedule).ok_or_else(|| format!("`{text}` never fires"))
    }

    /// The first fire after an instant; none in the years that can be told.
    pub fn next_after(&self, after: Timestamp) -> Option<Timestamp> {
        let mut local = after.to_zoned(self.zone.clone()).datetime();
        // What is said twice may come again after what is later by the clock.
        if let AmbiguousOffset::Fold { before, after } = self.zone.to_ambiguous_timestamp(local).offset() {
            local = local.checked_sub(before.duration_until(after).abs()).ok()?;
        }
        let mut from = utc(local.round(floor_to_minute()).ok()?)?;
        let mut best: Option<Timestamp> = None;
        let mut inclusive = true;
        loop {
            let matched = self.cron.find_next_occurrence(&from, inclusive).ok()?;
            let (first, second) = self.instants(matched.datetime())?;
            let later = [first, second].into_iter().flatten().filter(|instant| *instant > after);
            best = best.into_iter().chain(later).min();
            // What matches later comes later the first time, and the second.
            if best.is_some() && first.is_some_and(|first| first > after) {
                return best;
            }
            (from, inclusive) = (matched, false);
        }
    }

    /// When a local time is; none where the policy leaves it out, two where it
    /// comes twice. `None` at the end of time.
    fn instants(&self, local: DateTime) -> Option<(Option<Timestamp>, Option<Timestamp>)> {
        Some(match self.zone.to_ambiguous_timestamp(local).offset() {
            AmbiguousOffset::Unambiguous { offset } => (Some(offset.to_timestamp(local).ok()?), None),
            AmbiguousOffset::Fold { before, after } => {
                let second = if self.twice { Some(after.to_timestamp(local).ok()?) } else { None };
                (Some(before.to_timestamp(local).ok()?), second)
            }
            AmbiguousOffset::Gap { .. } if self.gap == Gap::Skip => (None, None),
            AmbiguousOffset::Gap { before, .. } => {
                let by_old_clock = before.to_timestamp(local).ok()?;
                let beyond = by_old_clock.checked_add(SignedDuration::from_nanos(1)).ok()?;
                (Some(self.zone.preceding(beyond).next()?.timestamp()), None)
            }
        })
    }

    /// The last fire after one instant and up to another: looked for backwards, in
    /// steps that double, so that a year without a scheduler costs what an hour
    /// does.
    pub fn last_within(&self, after: Timestamp, until: Timestamp) -> Option<Timestamp> {
        let mut reach = SignedDuration::from_hours(1);
        let mut end = until;
        loop {
            let begin = until.checked_sub(reach).ok().filter(|begin| *begin > after).unwrap_or(after);
            let mut last = None;
            let mut at = begin;
            while let Some(fire) = self.next_after(at).filter(|fire| *fire <= end) {
                (last, at) = (Some(fire), fire);
            }
            if last.is_some() || begin == after {
                return last;
            }
            (end, reach) = (begin, reach.checked_mul(2)?);
        }
    }

    /// What is to be carried out now of a fire that was due and of those after it,
    /// the earliest first.
    fn due(&self, first: Timestamp, now: Timestamp) -> Vec<Timestamp> {
        let before = first.checked_sub(SignedDuration::from_nanos(1)).unwrap_or(first);
        let late_max = SignedDuration::try_from(LATE_MAX).unwrap_or_default();
        let wanted = match self.catch_up {
            CatchUp::None | CatchUp::Latest => 1,
            CatchUp::All(count) => count,
        };
        let mut fires = Vec::new();
        let mut until = now;
        while fires.len() < usize::from(wanted)
            && let Some(fire) = self.last_within(before, until)
        {
            if self.catch_up == CatchUp::None && now.duration_since(fire) > late_max {
                break;
            }
            fires.push(fire);
            let Ok(earlier) = fire.checked_sub(SignedDuration::from_nanos(1)) else { break };
            until = earlier;
        }
        fires.reverse();
        fires
    }

    /// What a scheduler does that comes to a planned fire at an instant: the fires
    /// to carry out, and the one to plan; none at the end of time.
    pub fn reach(&self, first: Timestamp, now: Timestamp) -> (Vec<Timestamp>, Option<Timestamp>) {
        if first > now {
            return (Vec::new(), Some(first));
        }
        (self.due(first, now), self.next_after(now))
    }

    /// How late it fires, always: a part of its jitter, drawn from a seed, so that
    /// the distances between its fires stay and those of many schedules do not
    /// come at once.
    pub fn delay(&self, seed: &[u8]) -> Duration {
        let ms = u64::try_from(self.jitter.as_millis()).unwrap_or(0);
        if ms == 0 {
            return Duration::ZERO;
        }
        let digest = sha256(seed);
        let draw = u64::from_be_bytes(digest[..8].try_into().unwrap_or_default());
        Duration::from_millis(draw % ms)
    }
}

impl ScheduleSpec {
    /// One in UTC with the usual policies.
    pub fn new(cron: &str) -> Self {
        Self {
            cron: cron.to_owned(),
            timezone: None,
            gap: Gap::default(),
            overlap: None,
            catch_up: CatchUp::default(),
            jitter: Duration::ZERO,
        }
    }

    /// As answers show it: what is said, and not what goes without saying.
    pub fn to_json(&self) -> serde_json::Value {
        let mut shown = serde_json::json!({"type": "schedule", "schedule": self.cron});
        let mut say = |name: &str, value: Option<String>| {
            if let Some(value) = value {
                shown[name] = value.into();
            }
        };
        say("timezone", self.timezone.clone());
        say("dst_gap", (self.gap == Gap::Skip).then(|| "skip".into()));
        say("dst_overlap", self.overlap.map(|o| if o == Overlap::Both { "both".into() } else { "first".into() }));
        say("catch_up", (self.catch_up != CatchUp::default()).then(|| self.catch_up.written()));
        say("jitter", (!self.jitter.is_zero()).then(|| duration::written(self.jitter)));
        shown
    }
}

fn floor_to_minute() -> jiff::civil::DateTimeRound {
    jiff::civil::DateTimeRound::new().smallest(Unit::Minute).mode(jiff::RoundMode::Floor)
}

/// A local time as if it were one of UTC, where each exists once.
fn utc(local: DateTime) -> Option<Zoned> {
    local.to_zoned(TimeZone::UTC).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn schedule(spec: ScheduleSpec) -> Schedule {
        Schedule::read(&spec).expect("reads")
    }

    fn at(text: &str) -> Timestamp {
        text.parse().expect("a time")
    }

    fn berlin(cron: &str) -> ScheduleSpec {
        ScheduleSpec { timezone: Some("Europe/Berlin".into()), ..ScheduleSpec::new(cron) }
    }

    fn fires(schedule: &Schedule, from: &str, count: usize) -> Vec<String> {
        let next = |at: &Timestamp| schedule.next_after(*at);
        let first = next(&at(from));
        std::iter::successors(first, next).take(count).map(|fire| fire.to_string()).collect()
    }

    #[test]
    fn a_time_in_the_gap_fires_when_it_is_over_or_not_at_all() {
        let spec = berlin("30 2 * * *");
        let shifted = fires(&schedule(spec.clone()), "2026-03-28T12:00:00Z", 2);
        assert_eq!(shifted, ["2026-03-29T01:00:00Z", "2026-03-30T00:30:00Z"]);
        let skipped = fires(&schedule(ScheduleSpec { gap: Gap::Skip, ..spec }), "2026-03-28T12:00:00Z", 1);
        assert_eq!(skipped, ["2026-03-30T00:30:00Z"]);
        // However many were in it.
        let many = fires(&schedule(berlin("*/20 2,3 * * *")), "2026-03-28T12:00:00Z", 3);
        assert_eq!(many, ["2026-03-29T01:00:00Z", "2026-03-29T01:20:00Z", "2026-03-29T01:40:00Z"]);
    }

    #[test]
    fn a_time_that_comes_twice_fires_once_unless_it_is_every_hours() {
        let spec = berlin("30 2 * * *");
        let once = fires(&schedule(spec.clone()), "2026-10-24T12:00:00Z", 2);
        assert_eq!(once, ["2026-10-25T00:30:00Z", "2026-10-26T01:30:00Z"]);
        let both = fires(&schedule(ScheduleSpec { overlap: Some(Overlap::Both), ..spec }), "2026-10-24T12:00:00Z", 2);
        assert_eq!(both, ["2026-10-25T00:30:00Z", "2026-10-25T01:30:00Z"]);
        let hourly = fires(&schedule(berlin("*/30 * * * *")), "2026-10-24T23:45:00Z", 5);
        let wanted = ["00:00", "00:30", "01:00", "01:30", "02:00"].map(|time| format!("2026-10-25T{time}:00Z"));
        assert_eq!(hourly, wanted);
        assert_eq!(fires(&schedule(berlin("@hourly")), "2026-10-25T00:00:00Z", 1), ["2026-10-25T01:00:00Z"]);
    }

    #[test]
    fn a_lost_day_fires_at_the_next_ones_beginning() {
        let spec = ScheduleSpec { timezone: Some("Pacific/Apia".into()), ..ScheduleSpec::new("0 9 * * *") };
        let lost = fires(&schedule(spec), "2011-12-29T18:00:00Z", 3);
        // The 29th in the old day count, then the 30th, which did not come.
        assert_eq!(lost, ["2011-12-29T19:00:00Z", "2011-12-30T10:00:00Z", "2011-12-30T19:00:00Z"]);
    }

    #[test]
    fn what_was_missed_is_made_up_for_as_asked() {
        let with = |catch_up| schedule(ScheduleSpec { catch_up, ..ScheduleSpec::new("0 * * * *") });
        let (first, now) = (at("2026-01-01T00:00:00Z"), at("2026-06-01T10:30:00Z"));
        let hours =
            |fires: Vec<Timestamp>| fires.iter().map(|fire| fire.to_string()[8..13].to_owned()).collect::<Vec<_>>();
        assert_eq!(hours(with(CatchUp::None).due(first, now)), Vec::<String>::new());
        assert_eq!(hours(with(CatchUp::None).due(first, at("2026-06-01T10:02:00Z"))), ["01T10"]);
        assert_eq!(hours(with(CatchUp::Latest).due(first, now)), ["01T10"]);
        assert_eq!(hours(with(CatchUp::All(3)).due(first, now)), ["01T08", "01T09", "01T10"]);
        assert_eq!(hours(with(CatchUp::All(3)).due(at("2026-06-01T10:00:00Z"), now)), ["01T10"]);
        // A leap day, over years.
        let rare = schedule(ScheduleSpec::new("0 0 29 2 *"));
        assert_eq!(rare.due(at("2012-02-29T00:00:00Z"), now), [at("2024-02-29T00:00:00Z")]);
    }

    #[test]
    fn policies_are_read_as_they_are_written() {
        for text in ["none", "latest", "all", "all(1)", "all(99)"] {
            assert_eq!(CatchUp::parse(text).expect(text).written(), text);
        }
        for bad in ["", "al", "all()", "all(0)", "all(101)", "all(-1)", "all(3", "latest(2)"] {
            assert_eq!(CatchUp::parse(bad), None, "{bad}");
        }
        for (cron, zone, said) in [
            ("* * * *", "UTC", "five fields, found 4"),
            (", * * * *", "UTC", "nothing stands beside a comma"),
            ("0 0 31 2 *", "UTC", "never fires"),
            ("@sometimes", "UTC", "is no cron expression"),
            ("0 0 * * *", "Europe/Berln", "there is no time zone `Europe/Berln`"),
        ] {
            let spec = ScheduleSpec { timezone: Some(zone.into()), ..ScheduleSpec::new(cron) };
            assert!(Schedule::read(&spec).expect_err(cron).contains(said), "{cron}");
        }
    }

    #[test]
    fn jitter_is_the_same_each_time_and_spread() {
        let spec = ScheduleSpec { jitter: Duration::from_secs(60), ..ScheduleSpec::new("@daily") };
        let schedule = schedule(spec);
        let delays: std::collections::HashSet<Duration> = (0..50u8).map(|seed| schedule.delay(&[seed])).collect();
        assert!(delays.len() > 45 && delays.iter().all(|delay| *delay < Duration::from_secs(60)));
        assert_eq!(schedule.delay(b"x"), schedule.delay(b"x"));
    }
}
