//! How an event is brought to a webhook: what is sent, when it is tried again, and what an answer
//! means. Pure: the draw and the times are given.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};

use super::backoff::RETRY_AFTER_MAX;
use super::ids::{CompanyId, EventId, RunId};

/// How long after each failed try the next one comes (contract, "Webhooks out"): after the last of
/// them it is given up.
pub const SCHEDULE: [Duration; 7] = {
    const fn minutes(minutes: u64) -> Duration {
        Duration::from_secs(60 * minutes)
    }
    [Duration::from_secs(5), minutes(5), minutes(30), minutes(120), minutes(300), minutes(600), minutes(600)]
};
/// How far a delay may be off its schedule, to both sides: what failed together does not come back
/// together.
pub const JITTER: f64 = 0.1;
/// A webhook has to answer in this time.
pub const TIMEOUT: Duration = Duration::from_secs(15);
/// The rest of an answer is waited for so long once its status is there: that one decides.
pub const BODY_TIMEOUT: Duration = Duration::from_secs(1);
/// So much of an answer is kept, in bytes; what is larger is not read to its end.
pub const ANSWER_BYTES_MAX: usize = 2_048;
/// A webhook that nothing has worked for in this time is disabled.
pub const FAILING_MAX: Duration = Duration::from_secs(5 * 24 * 3600);
/// A test's type: it tells of nothing that happened.
pub const TEST: &str = "webhook.test";

/// What a webhook is told.
#[derive(Debug, Clone)]
pub struct Told {
    /// The same over all tries, and for all webhooks.
    pub event: EventId,
    /// The dotted name.
    pub name: String,
    /// Where it happened.
    pub company: CompanyId,
    /// In which run.
    pub run: Option<RunId>,
    /// When.
    pub at: DateTime<Utc>,
    /// What the event carries.
    pub data: Value,
}

impl Told {
    /// The body that is sent and signed: `{id, type, company_id, timestamp, data}`, the same bytes on
    /// every try. A run's id is part of `data`, as in the activity log.
    pub fn body(&self) -> Vec<u8> {
        let mut data = match &self.data {
            Value::Object(data) => data.clone(),
            Value::Null => Map::new(),
            other => Map::from_iter([("value".to_owned(), other.clone())]),
        };
        if let Some(run) = self.run {
            data.entry("run_id").or_insert_with(|| json!(run));
        }
        let at = self.at.to_rfc3339_opts(chrono::SecondsFormat::Millis, true);
        let body = json!({
            "id": self.event, "type": self.name, "company_id": self.company, "timestamp": at, "data": data,
        });
        body.to_string().into_bytes()
    }
}

/// What came of a try.
#[derive(Debug, Clone, PartialEq)]
pub enum Answer {
    /// A status, and what `Retry-After` asks for.
    Status(u16, Option<Duration>),
    /// None in time, or the way was blocked.
    None,
    /// It may not be reached from here, ever.
    Refused,
}

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum Verdict {
    /// The webhook has it.
    Succeeded,
    /// It is tried again after this.
    Again(Duration),
    /// It is given up.
    Failed,
    /// It is given up, and the webhook wants no more.
    Gone,
}

/// How a webhook bears what it is sent, by one answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Sign {
    /// It took it.
    Well,
    /// It is there, and does not want this one.
    Refused,
    /// It is not there, or has too much to do.
    Badly,
}

impl Answer {
    /// What is to be done after so many tries; `draw` in `[0, 1)` is the source of jitter.
    pub fn verdict(&self, tries: u32, draw: f64) -> Verdict {
        let asked = match self {
            Self::Status(200..=299, _) => return Verdict::Succeeded,
            Self::Status(410, _) => return Verdict::Gone,
            Self::Refused => return Verdict::Failed,
            Self::Status(_, asked) => asked.map(|asked| asked.min(RETRY_AFTER_MAX)),
            Self::None => None,
        };
        let at = usize::try_from(tries.saturating_sub(1)).unwrap_or(usize::MAX);
        let Some(delay) = SCHEDULE.get(at) else { return Verdict::Failed };
        let jittered = delay.mul_f64(1.0 - JITTER + 2.0 * JITTER * draw.clamp(0.0, 1.0));
        Verdict::Again(jittered.max(asked.unwrap_or_default()))
    }

    /// What it says about the webhook.
    pub fn sign(&self) -> Sign {
        match self {
            Self::Status(200..=299, _) => Sign::Well,
            Self::Status(408 | 425 | 429 | 500.., _) | Self::None => Sign::Badly,
            Self::Status(..) | Self::Refused => Sign::Refused,
        }
    }
}

/// What `Retry-After` asks for: seconds, or a date, which is held against the answer's own `Date` and
/// not against a clock of ours. Nothing where it cannot be read, or is over.
pub fn retry_after(value: &str, date: Option<&str>) -> Option<Duration> {
    let value = value.trim();
    if value.bytes().all(|byte| byte.is_ascii_digit()) && !value.is_empty() {
        // More digits than fit ask for more than anybody gets.
        return Some(value.parse().map_or(RETRY_AFTER_MAX, Duration::from_secs));
    }
    let read = |text: &str| DateTime::parse_from_rfc2822(text.trim()).ok();
    (read(value)? - read(date?)?).to_std().ok()
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_schedule_takes_more_than_a_day_and_ends() {
        let total: Duration = SCHEDULE.iter().sum();
        assert_eq!(total.as_secs(), 5 + 300 + 1_800 + 7_200 + 18_000 + 36_000 + 36_000);
        let failed = Answer::Status(500, None);
        for (tries, wanted) in (1..).zip(SCHEDULE) {
            assert_eq!(failed.verdict(tries, 0.5), Verdict::Again(wanted), "after {tries}");
        }
        assert_eq!(failed.verdict(8, 0.5), Verdict::Failed);
    }

    #[test]
    fn an_answer_is_taken_for_what_it_is() {
        assert_eq!(Answer::Status(204, None).verdict(1, 0.0), Verdict::Succeeded);
        assert_eq!(Answer::Status(410, None).verdict(1, 0.0), Verdict::Gone);
        assert_eq!(Answer::Refused.verdict(1, 0.0), Verdict::Failed);
        for status in [100, 301, 302, 307, 400, 404, 429, 500, 503] {
            assert!(matches!(Answer::Status(status, None).verdict(1, 0.0), Verdict::Again(_)), "{status}");
        }
        let asked = |seconds| Answer::Status(503, Some(Duration::from_secs(seconds))).verdict(1, 0.5);
        assert_eq!(asked(99_999_999), Verdict::Again(RETRY_AFTER_MAX));
        assert_eq!(asked(1), Verdict::Again(SCHEDULE[0]), "not sooner than the schedule has it");
        assert_eq!((Answer::None.sign(), Answer::Status(404, None).sign()), (Sign::Badly, Sign::Refused));
    }

    #[test]
    fn retry_after_is_seconds_or_a_date_by_the_answers_own_clock() {
        let of = |value: &str, date: Option<&str>| retry_after(value, date).map(|asked| asked.as_secs());
        assert_eq!((of("120", None), of(" 0 ", None)), (Some(120), Some(0)));
        assert_eq!(of("99999999999999999999999", None), Some(RETRY_AFTER_MAX.as_secs()));
        let (now, later) = ("Wed, 21 Oct 2015 07:28:00 GMT", "Wed, 21 Oct 2015 07:29:30 GMT");
        assert_eq!(of(later, Some(now)), Some(90));
        for nothing in [of(now, Some(later)), of(later, None), of("-1", None), of("soon", None), of("", None)] {
            assert_eq!(nothing, None);
        }
        assert_eq!(of("Thu, 01 Jan 1970 00:00:00 GMT", Some(now)), None);
    }

    #[test]
    fn the_body_is_what_the_contract_says() {
        let told = Told {
            event: EventId(uuid::Uuid::nil()),
            name: "step.failed".into(),
            company: CompanyId(uuid::Uuid::nil()),
            run: Some(RunId(uuid::Uuid::nil())),
            at: DateTime::from_timestamp(1_614_265_330, 250_000_000).expect("a time"),
            data: json!({"step": "a"}),
        };
        let body: Value = serde_json::from_slice(&told.body()).expect("JSON");
        let zeros = "0".repeat(26);
        let wanted = json!({
            "id": format!("evt_{zeros}"), "type": "step.failed", "company_id": format!("co_{zeros}"),
            "timestamp": "2021-02-25T15:02:10.250Z", "data": {"step": "a", "run_id": format!("run_{zeros}")},
        });
        assert_eq!(body, wanted);
        assert_eq!(told.body(), told.body());
    }

    proptest! {
        #[test]
        fn a_delay_is_near_its_schedule_and_bounded(tries in 0u32..20, draw in 0.0f64..1.0, asked in proptest::option::of(0u64..u64::MAX)) {
            let answer = Answer::Status(500, asked.map(Duration::from_secs));
            match answer.verdict(tries, draw) {
                Verdict::Again(delay) => {
                    let at = SCHEDULE[tries.saturating_sub(1) as usize];
                    prop_assert!(delay >= at.mul_f64(0.89) && delay <= RETRY_AFTER_MAX.max(at.mul_f64(1.11)));
                }
                other => prop_assert!(other == Verdict::Failed && tries > 7),
            }
        }

        #[test]
        fn any_retry_after_is_read_or_none(value in ".{0,40}", date in proptest::option::of(".{0,40}")) {
            let _ = retry_after(&value, date.as_deref());
        }
    }
}
