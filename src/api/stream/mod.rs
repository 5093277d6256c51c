//! Server-sent events: the log as it grows, resumable at any event, without a
//! gap and without a repeat, whichever process answers (hazard H4).
//!
//! A stream ([`reader`]) reads the log itself until it has caught up with the
//! process's one reader ([`hub`]), and then receives from it. One that falls
//! behind reads the log again. The connection asks it for what comes next, so
//! that a client which takes nothing is sent nothing, and is cut with its
//! connection.

use std::convert::Infallible;
use std::sync::Arc;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue, StatusCode};
use axum::response::{IntoResponse as _, Response};
use capx_core::domain::ids::{AccountId, AgentId, CompanyId, EventId, RunId};
use capx_core::store::events::{self, Place};
use chrono::{DateTime, Utc};
use uuid::Uuid;

pub mod hub;
mod reader;

use super::auth::Caller;
use super::routes::activity::read_place;
use super::{ApiError, ApiState};
use hub::Topic;
use reader::{Reader, Source};

/// What a stream shows of its topic.
#[derive(Debug, Clone)]
pub struct Filter {
    /// What is followed.
    pub topic: Topic,
    /// Only about this agent.
    pub agent: Option<AgentId>,
    /// Only of this activity type.
    pub kind: Option<&'static str>,
    /// Only of this run.
    pub run: Option<RunId>,
    /// From this time on; else from now, or behind the event that was named.
    pub since: Option<DateTime<Utc>>,
}

impl Filter {
    /// Everything about a topic.
    pub fn all(topic: Topic) -> Self {
        Self { topic, agent: None, kind: None, run: None, since: None }
    }

    /// Whether an event is shown, by what it is about.
    fn shows(&self, agent: Option<AgentId>, kind: &str, run: Option<RunId>) -> bool {
        (self.agent.is_none() || self.agent == agent)
            && self.kind.is_none_or(|shown| shown == kind)
            && (self.run.is_none() || self.run == run)
    }

    /// Whose log is followed, and of which of its companies alone.
    fn scope(&self, caller: &Caller) -> (AccountId, Option<CompanyId>) {
        match self.topic {
            Topic::Company(company) => (caller.account, Some(company)),
            Topic::Account(_) => (caller.account, caller.company),
        }
    }
}

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// The event that a client has seen last.
fn last_event(headers: &HeaderMap) -> Result<Option<EventId>, ApiError> {
    let read = |given: &HeaderValue| given.to_str().ok().and_then(|id| id.trim().parse().ok());
    headers.get(LAST_EVENT_ID).map(|given| read(given).ok_or(ApiError::NotFound("event"))).transpose()
}

/// Before the log's first event.
const FIRST: Place = Place { xid: 0, id: Uuid::nil() };

/// Answers with a stream, from behind the event or the cursor that is named.
pub async fn open(
    state: &Arc<ApiState>,
    caller: Caller,
    filter: Filter,
    headers: &HeaderMap,
    cursor: Option<&str>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(state).await?;
    let named = match last_event(headers)? {
        None => read_place(cursor)?,
        Some(event) => {
            let (account, company) = filter.scope(&caller);
            let place = events::place_of(&mut tx, account, company, event).await?;
            Some(place.ok_or(ApiError::NotFound("event"))?)
        }
    };
    let now = events::mark_of_now(&mut tx).await?;
    drop(tx);
    let place = named.or(filter.since.map(|_| FIRST)).unwrap_or(now);
    let _ = caller.permit.charge(caller.credits);
    Ok(answer(Reader::new(state, caller, filter, now, |live| Source::Log { place, live })))
}

/// Answers with the stream of a run: its events by their number, which has no
/// gap; the company's log only says when to look. It ends with the run.
pub async fn open_run(
    state: &Arc<ApiState>,
    caller: Caller,
    company: CompanyId,
    run: RunId,
    headers: &HeaderMap,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(state).await?;
    let after = match last_event(headers)? {
        None => 0,
        Some(event) => events::number_of(&mut tx, company, run, event).await?.ok_or(ApiError::NotFound("event"))?,
    };
    if after > 0 && reader::is_told(&mut tx, company, run, after).await? {
        // By which a browser knows that it need not come back.
        return Ok(StatusCode::NO_CONTENT.into_response());
    }
    let now = events::mark_of_now(&mut tx).await?;
    drop(tx);
    let _ = caller.permit.charge(caller.credits);
    let filter = Filter { run: Some(run), ..Filter::all(Topic::Company(company)) };
    Ok(answer(Reader::new(state, caller, filter, now, |_| Source::Run { company, run, after, ahead: true })))
}

/// The answer that carries what a reader brings.
fn answer(reader: Reader) -> Response {
    let body = futures_util::stream::unfold(Box::new(reader), |mut reader| async move {
        let piece: Bytes = reader.next().await?;
        Some((Ok::<_, Infallible>(piece), reader))
    });
    let mut response = Response::new(Body::from_stream(body));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that gather answers would hold the stream up.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}
