//! One try of a delivery: an event is sent to a webhook, signed, and its answer is read as far as it
//! is kept.

use std::time::{Duration, Instant};

use capx_core::domain::delivery::{ANSWER_BYTES_MAX, Answer, BODY_TIMEOUT, TIMEOUT, retry_after};
use capx_core::domain::outcome::{ErrorClass, Failure};
use capx_core::domain::webhook;
use capx_core::engine::deliveries::Sending;
use reqwest::Method;

use crate::egress::{Call, Egress, Open};

/// What came of a try.
#[derive(Debug)]
pub struct Outcome {
    /// The answer.
    pub answer: Answer,
    /// How it begins.
    pub said: Option<String>,
    /// What went wrong.
    pub error: Option<String>,
    /// How long it took.
    pub took: Duration,
}

/// Sends an event to a webhook.
pub async fn send(egress: &Egress, sending: &Sending) -> Outcome {
    let began = Instant::now();
    let outcome = |answer, said, error| Outcome { answer, said, error, took: began.elapsed() };
    if sending.is_gone {
        return outcome(Answer::Refused, None, Some("the event is no longer kept".to_owned()));
    }
    let opened = match egress.permits_webhook(&sending.url) {
        Ok(()) => egress.open(call(sending)).await.map_err(|unanswered| unanswered.failure),
        Err(refused) => Err(refused),
    };
    let mut open = match opened {
        Ok(open) => open,
        Err(Failure { class: ErrorClass::Governance | ErrorClass::Invalid, message, .. }) => {
            return outcome(Answer::Refused, None, Some(message));
        }
        Err(failure) => return outcome(Answer::None, None, Some(failure.message)),
    };
    let asked = open.header("retry-after").and_then(|value| retry_after(value, open.header("date")));
    let status = open.status;
    let said = beginning(&mut open, TIMEOUT.saturating_sub(began.elapsed()).min(BODY_TIMEOUT)).await;
    let error = (!(200..300).contains(&status)).then(|| match status {
        300..=399 => format!("the answer was {status}: redirects are not followed"),
        _ => format!("the answer was {status}"),
    });
    outcome(Answer::Status(status, asked), Some(said).filter(|said| !said.is_empty()), error)
}

fn call(sending: &Sending) -> Call {
    let body = sending.told.body();
    let id = sending.told.event.to_string();
    let secrets: Vec<&[u8]> = sending.secrets.iter().map(Vec::as_slice).collect();
    let signature = webhook::sign(&secrets, &id, sending.now_s, &body);
    let headers = vec![
        ("webhook-id".to_owned(), id.clone()),
        ("webhook-timestamp".to_owned(), sending.now_s.to_string()),
        ("webhook-signature".to_owned(), signature),
    ];
    Call {
        method: Method::POST,
        url: sending.url.clone(),
        headers,
        body: Some((body, "application/json".to_owned())),
        idempotency_key: id,
        timeout: TIMEOUT,
        idle: TIMEOUT,
        limit: usize::MAX,
        large: None,
        trusted: false,
    }
}

/// How an answer begins: what is more, or does not come in time, is left, and the connection with it.
async fn beginning(open: &mut Open, limit: Duration) -> String {
    let mut bytes = Vec::new();
    let read = async {
        while bytes.len() <= ANSWER_BYTES_MAX {
            let Ok(Some(chunk)) = open.next().await else { return };
            let room = (ANSWER_BYTES_MAX + 1).saturating_sub(bytes.len());
            bytes.extend(chunk.as_ref().iter().take(room));
        }
    };
    let _ = tokio::time::timeout(limit, read).await;
    bytes.truncate(ANSWER_BYTES_MAX);
    let text = String::from_utf8_lossy(&bytes).replace('\0', "\u{fffd}");
    text.trim_end_matches('\u{fffd}').to_owned()
}
