//! What the providers' APIs have in common: an account, a POST with JSON, an answer that
//! comes as JSON or as events, and what their refusals mean.

use std::fmt;
use std::time::Duration;

use capx_core::domain::agent::message::Reply;
use capx_core::domain::digest::{hex, sha256};
use capx_core::domain::outcome::{ErrorClass, Failure};
use reqwest::Method;
use serde_json::Value;

use super::sse::Events;
use super::{ANSWER_BYTES_MAX, Ask, Trouble};
use crate::egress::{Answer, Call, Egress, Open, Unanswered};

/// The longest that a provider's gate is closed for by one refusal.
const CLOSED_MAX: Duration = Duration::from_secs(3_600);
/// How long it is closed where the refusal does not say.
const CLOSED_DEFAULT: Duration = Duration::from_secs(5);

/// An account with a provider.
#[derive(Clone)]
pub struct Account {
    key: String,
    base: String,
}

impl fmt::Debug for Account {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Account({})", self.base)
    }
}

impl Account {
    /// The account of a key, at an address.
    pub fn new(key: impl Into<String>, base: &str) -> Self {
        Self { key: key.into(), base: base.trim_end_matches('/').to_owned() }
    }

    pub(super) fn key(&self) -> &str {
        &self.key
    }

    pub(super) fn base(&self) -> &str {
        &self.base
    }

    /// The account without its key, for the gate that all workers share.
    pub(super) fn digest(&self) -> String {
        hex(&sha256(format!("{}\0{}", self.base, self.key)))[..16].to_owned()
    }
}

/// Puts a reply together out of the events of a stream.
pub(super) trait Assembly {
    /// Takes the data of one event; true when it was the last one.
    fn take(&mut self, data: &str) -> Result<bool, Trouble>;
    /// All of them have come.
    fn finish(self) -> Result<Reply, Trouble>;
    /// The same of an answer that comes as a whole.
    fn whole(body: &[u8]) -> Result<Reply, Trouble>;
}

/// Asks, and reads the answer in whichever form it comes.
pub(super) async fn post<A: Assembly + Default>(
    egress: &Egress,
    ask: &Ask<'_>,
    url: String,
    headers: Vec<(String, String)>,
    body: &Value,
) -> Result<Reply, Trouble> {
    let call = Call {
        method: Method::POST,
        url,
        headers,
        body: Some((body.to_string().into_bytes(), "application/json".to_owned())),
        idempotency_key: ask.key.to_owned(),
        timeout: ask.timeout,
        idle: ask.idle,
        limit: ANSWER_BYTES_MAX,
        large: None,
        trusted: true,
    };
    let open = egress.open(call).await.map_err(|Unanswered { failure, sent }| Trouble {
        failure,
        closed_for: None,
        maybe_paid: sent,
        quota: false,
        fatal: false,
    })?;
    if open.status >= 400 {
        return Err(refusal(&open.whole().await.map_err(unanswered)?));
    }
    if open.header("content-type").is_some_and(|kind| kind.starts_with("text/event-stream")) {
        return stream(open, A::default()).await;
    }
    A::whole(&open.whole().await.map_err(unanswered)?.body)
}

async fn stream<A: Assembly>(mut open: Open, mut assembly: A) -> Result<Reply, Trouble> {
    let mut events = Events::default();
    while let Some(bytes) = open.next().await.map_err(unanswered)? {
        for data in events.take(bytes.as_ref()).map_err(malformed)? {
            if assembly.take(&data)? {
                return assembly.finish();
            }
        }
    }
    Err(unanswered(Failure::transient("the model's answer broke off in the middle")))
}

/// Something went wrong on the way back.
fn unanswered(failure: Failure) -> Trouble {
    Trouble { failure, closed_for: None, maybe_paid: true, quota: false, fatal: false }
}

/// The answer is no such answer: it may have been paid for, and would be no better again.
pub(super) fn malformed(why: impl fmt::Display) -> Trouble {
    let failure = Failure::invalid(format!("the provider's answer cannot be read: {why}"));
    Trouble { failure, closed_for: None, maybe_paid: true, quota: false, fatal: false }
}

/// What a refusal means. Both providers name it in `error.type` or `error.code`.
fn refusal(answer: &Answer) -> Trouble {
    let body: Value = serde_json::from_slice(&answer.body).unwrap_or_default();
    let text = |name: &str| body.pointer(name).and_then(Value::as_str).unwrap_or_default();
    let kind = match text("/error/code") {
        "" => text("/error/type"),
        code => code,
    };
    let mut failure = answer.failure().unwrap_or_else(|| Failure::transient("no answer"));
    if !text("/error/message").is_empty() {
        failure = Failure {
            message: format!("the provider answered {}: {}", answer.status, text("/error/message")),
            ..failure
        };
    }
    // No money left is no matter of waiting a few seconds.
    let quota = matches!(kind, "insufficient_quota" | "billing_error" | "billing_not_active") || answer.status == 402;
    if quota {
        let failure = Failure { class: ErrorClass::Invalid, retry_after: None, ..failure };
        return Trouble { failure, closed_for: None, maybe_paid: false, quota: true, fatal: false };
    }
    let closed_for = matches!(answer.status, 429 | 503 | 529).then(|| wait(answer));
    if closed_for.is_some() {
        failure.class = ErrorClass::RateLimited;
        failure.retry_after = closed_for;
    }
    Trouble { failure, closed_for, maybe_paid: false, quota: false, fatal: false }
}

/// How long a refusal asks everybody to wait: `retry-after-ms`, `retry-after` in seconds, or
/// OpenAI's resets, `x-ratelimit-reset-requests: 1m2.5s`. Dates are not read: they would have
/// to be judged by our own clock.
fn wait(answer: &Answer) -> Duration {
    let number = |name: &str| answer.header(name).and_then(|value| value.trim().parse::<f64>().ok());
    let resets = ["x-ratelimit-reset-requests", "x-ratelimit-reset-tokens"];
    let reset = || resets.iter().filter_map(|name| answer.header(name).and_then(spans)).reduce(f64::max);
    let seconds = number("retry-after-ms").map(|ms| ms / 1e3).or_else(|| number("retry-after")).or_else(reset);
    match seconds.filter(|seconds| seconds.is_finite() && *seconds >= 0.0) {
        Some(seconds) => Duration::from_secs_f64(seconds.min(CLOSED_MAX.as_secs_f64())),
        None => CLOSED_DEFAULT,
    }
}

/// `1h2m3.5s` and `120ms` in seconds.
fn spans(text: &str) -> Option<f64> {
    let (mut rest, mut sum) = (text.trim(), 0.0);
    while !rest.is_empty() {
        let digits = rest.find(|c: char| !c.is_ascii_digit() && c != '.')?;
        let unit_end = rest[digits..].find(|c: char| c.is_ascii_digit()).map_or(rest.len(), |at| digits + at);
        let factor = match &rest[digits..unit_end] {
            "h" => 3_600.0,
            "m" => 60.0,
            "s" => 1.0,
            "ms" => 1e-3,
            _ => return None,
        };
        sum += rest[..digits].parse::<f64>().ok()? * factor;
        rest = &rest[unit_end..];
    }
    Some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answer(status: u16, headers: &[(&str, &str)], body: &str) -> Answer {
        let headers = headers.iter().map(|(n, v)| ((*n).to_owned(), (*v).to_owned())).collect();
        Answer { status, headers, body: body.as_bytes().to_vec(), large: None }
    }

    #[test]
    fn refusals_say_for_how_long_everybody_waits() {
        for (headers, seconds) in [
            (&[("retry-after", "7")][..], 7.0),
            (&[("retry-after-ms", "250"), ("retry-after", "1")], 0.25),
            (&[("x-ratelimit-reset-requests", "1s"), ("x-ratelimit-reset-tokens", "6m0.5s")], 360.5),
            (&[("retry-after", "-3")], 5.0),
            (&[("retry-after", "99999999")], 3_600.0),
            (&[("retry-after", "Wed, 21 Oct 2026 07:28:00 GMT")], 5.0),
            (&[], 5.0),
        ] {
            let trouble = refusal(&answer(429, headers, "{}"));
            assert_eq!(trouble.closed_for.map(|wait| wait.as_secs_f64()), Some(seconds), "{headers:?}");
            assert_eq!(trouble.failure.class, ErrorClass::RateLimited);
        }
        assert!(refusal(&answer(529, &[], "{}")).closed_for.is_some());
    }

    #[test]
    fn what_waiting_does_not_mend_is_not_waited_for() {
        let body = r#"{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}"#;
        let trouble = refusal(&answer(429, &[], body));
        assert_eq!((trouble.closed_for, trouble.failure.class), (None, ErrorClass::Invalid));
        assert!(trouble.failure.message.contains("You exceeded your quota"));
        let body = r#"{"type": "error", "error": {"type": "authentication_error", "message": "invalid x-api-key"}}"#;
        let trouble = refusal(&answer(401, &[], body));
        assert_eq!(trouble.failure.class, ErrorClass::Invalid);
        assert!(trouble.failure.message.contains("invalid x-api-key"));
    }

    #[test]
    fn a_key_is_in_no_log() {
        assert!(!format!("{:?}", Account::new("sk-secret", "https://api.example.com/")).contains("secret"));
    }
}
