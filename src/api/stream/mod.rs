//! Server-sent events: the log as it grows, resumable at any event, without a
//! gap and without a repeat, whichever process answers (hazard H4).
//!
//! A subscriber reads the log itself until it has caught up with the process's
//! one reader ([`hub`]), and then receives from it. One that falls behind reads
//! the log again. One that does not take what it is sent is cut.

use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes};
use axum::http::header::{CACHE_CONTROL, CONTENT_TYPE};
use axum::http::{HeaderMap, HeaderName, HeaderValue};
use axum::response::Response;
use capx_core::domain::ids::{AgentId, CompanyId, EventId, RunId};
use capx_core::store::events::{self, FeedFilter, FeedRow, Place};
use capx_core::store::tenants;
use chrono::{DateTime, Utc};
use futures_util::StreamExt as _;
use sqlx::PgConnection;
use tokio::sync::broadcast::error::RecvError;
use tokio::sync::{broadcast, mpsc};
use tokio::time::Instant;
use uuid::Uuid;

pub mod hub;

use super::auth::Caller;
use super::routes::activity::read_place;
use super::{ApiError, ApiState};
use hub::{Frame, Topic, render};

/// A comment is sent this long after the last event.
const COMMENT: Duration = Duration::from_secs(15);
/// A reader that has not taken an event for this long is cut.
const SLOW: Duration = Duration::from_secs(30);
/// How often a stream looks whether its key is still good.
const KEY_CHECK: Duration = Duration::from_secs(2);
/// Frames that wait for the socket.
const FRAMES_MAX: usize = 32;
/// Events of one read while catching up.
const PAGE: i64 = 500;
/// Companies of an account that are caught up with, the newest.
const COMPANIES_MAX: i64 = 500;
/// A run's stream ends with one of these.
const LAST: &[&str] = &["playbook.completed", "playbook.failed", "playbook.cancelled"];

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

    fn shows(&self, frame: &Frame) -> bool {
        self.agent.is_none_or(|agent| frame.agent == Some(agent))
            && self.kind.is_none_or(|kind| frame.kind == kind)
            && self.run.is_none_or(|run| frame.run == Some(run))
    }

    async fn companies(&self, tx: &mut PgConnection, caller: &Caller) -> Result<Vec<Uuid>, ApiError> {
        match self.topic {
            Topic::Company(company) => Ok(vec![company.0]),
            Topic::Account(_) => Ok(tenants::company_ids(tx, caller.account, caller.company, COMPANIES_MAX).await?),
        }
    }
}

const LAST_EVENT_ID: HeaderName = HeaderName::from_static("last-event-id");

/// Where a stream begins: behind the event or the cursor that is named.
async fn beginning(
    tx: &mut PgConnection,
    caller: &Caller,
    filter: &Filter,
    headers: &HeaderMap,
    cursor: Option<&str>,
) -> Result<Option<Place>, ApiError> {
    let Some(given) = headers.get(LAST_EVENT_ID) else { return read_place(cursor) };
    let event: EventId =
        given.to_str().ok().and_then(|id| id.trim().parse().ok()).ok_or(ApiError::NotFound("event"))?;
    let companies = filter.companies(&mut *tx, caller).await?;
    let place = events::place_of(tx, &companies, event).await?;
    Ok(Some(place.ok_or(ApiError::NotFound("event"))?))
}

/// The position behind all that a filter's `since` leaves out is found by the
/// reads themselves: they begin at the log's first event.
const FIRST: Place = Place { xid: 0, id: Uuid::nil() };

/// Answers with a stream.
pub async fn open(
    state: &Arc<ApiState>,
    caller: Caller,
    filter: Filter,
    headers: &HeaderMap,
    cursor: Option<&str>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(state).await?;
    let begin = beginning(&mut tx, &caller, &filter, headers, cursor).await?;
    let now = events::mark_of_now(&mut tx).await?;
    drop(tx);
    let begin = begin.or(filter.since.map(|_| FIRST)).unwrap_or(now);
    let _ = caller.permit.charge(caller.credits);
    let (out, frames) = mpsc::channel::<Bytes>(FRAMES_MAX);
    let reader = Reader::new(state, caller, filter, begin, out);
    tokio::spawn(reader.run(now));
    Ok(answer(frames))
}

/// The answer that carries what is sent.
fn answer(frames: mpsc::Receiver<Bytes>) -> Response {
    let body = futures_util::stream::unfold(frames, |mut frames| async move {
        let frame = frames.recv().await?;
        Some((Ok::<_, std::convert::Infallible>(frame), frames))
    });
    let mut response = Response::new(Body::from_stream(body.boxed()));
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-cache"));
    // Proxies that gather answers would hold the stream up.
    headers.insert("x-accel-buffering", HeaderValue::from_static("no"));
    response
}

struct Reader {
    state: Arc<ApiState>,
    caller: Caller,
    filter: Filter,
    /// Everything up to here was sent, or is not shown.
    place: Place,
    out: mpsc::Sender<Bytes>,
    comment: Instant,
    key_check: Instant,
}

type Received = broadcast::Receiver<Arc<Frame>>;

/// The stream is over: its client, its key or its process is.
struct Over;

impl Reader {
    fn new(state: &Arc<ApiState>, caller: Caller, filter: Filter, place: Place, out: mpsc::Sender<Bytes>) -> Self {
        let now = Instant::now();
        let (comment, key_check) = (now + COMMENT, now + KEY_CHECK);
        Self { state: Arc::clone(state), caller, filter, place, out, comment, key_check }
    }

    async fn run(mut self, now: Place) {
        // Sent at once: a client knows by it that it is connected.
        if self.send(Bytes::from_static(b": capx\n\n")).await.is_err() {
            return;
        }
        let (mut received, mut live) = self.state.hub.subscribe(self.filter.topic, now);
        loop {
            if self.catch_up(live).await.is_err() {
                return;
            }
            match self.follow(&mut received).await {
                Ok(()) => {
                    // Too far behind: the log has it all.
                    live = self.state.hub.position(self.filter.topic).unwrap_or(self.place);
                }
                Err(Over) => return,
            }
        }
    }

    /// Reads the log up to where the process's reader has got to.
    async fn catch_up(&mut self, live: Place) -> Result<(), Over> {
        while self.place < live {
            let page = match self.page().await {
                Ok(page) => page,
                Err(error) => {
                    tracing::debug!(?error, "a stream could not catch up; its client may resume it");
                    return Err(Over);
                }
            };
            let whole = page.len() < PAGE as usize;
            for frame in page {
                if frame.place > live {
                    self.place = live;
                    return Ok(());
                }
                self.place = frame.place;
                if self.filter.shows(&frame) {
                    self.send(frame.bytes).await?;
                }
            }
            if whole {
                self.place = live;
            }
        }
        Ok(())
    }

    async fn page(&self) -> Result<Vec<Frame>, ApiError> {
        let mut tx = self.caller.read(&self.state).await?;
        let companies = self.filter.companies(&mut tx, &self.caller).await?;
        let filter = FeedFilter {
            companies: &companies,
            agent: self.filter.agent,
            since: self.filter.since,
            after: Some(self.place),
            ..FeedFilter::default()
        };
        let rows = events::feed(&mut tx, filter, false, PAGE).await?;
        Ok(render(&mut tx, rows).await?)
    }

    /// Sends on what the process's reader hands out, until it is too far behind.
    async fn follow(&mut self, received: &mut Received) -> Result<(), Over> {
        while let Some(frame) = self.told(received).await? {
            if frame.place > self.place {
                self.place = frame.place;
                if self.filter.shows(&frame) {
                    self.send(frame.bytes.clone()).await?;
                }
            }
        }
        Ok(())
    }

    /// The next event that the process's reader hands out; `None` when some were
    /// missed. Meanwhile says that it is still here, and looks whether it may be.
    async fn told(&mut self, received: &mut Received) -> Result<Option<Arc<Frame>>, Over> {
        loop {
            tokio::select! {
                frame = received.recv() => return match frame {
                    Ok(frame) => Ok(Some(frame)),
                    Err(RecvError::Lagged(_)) => Ok(None),
                    Err(RecvError::Closed) => Err(Over),
                },
                () = tokio::time::sleep_until(self.key_check) => {
                    if !self.state.admission.is_good(&self.caller.permit).await {
                        return Err(Over);
                    }
                    self.key_check = Instant::now() + KEY_CHECK;
                }
                () = tokio::time::sleep_until(self.comment) => {
                    self.send(Bytes::from_static(b": still here\n\n")).await?;
                }
                () = self.out.closed() => return Err(Over),
                () = self.state.stopping.cancelled() => return Err(Over),
            }
        }
    }

    async fn send(&mut self, bytes: Bytes) -> Result<(), Over> {
        match tokio::time::timeout(SLOW, self.out.send(bytes)).await {
            Ok(Ok(())) => {
                self.comment = Instant::now() + COMMENT;
                Ok(())
            }
            Ok(Err(_)) => Err(Over),
            Err(_) => {
                tracing::debug!("a reader took nothing for {SLOW:?}; its stream is cut");
                Err(Over)
            }
        }
    }
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
    let after = match headers.get(LAST_EVENT_ID) {
        None => 0,
        Some(given) => {
            let id: Option<EventId> = given.to_str().ok().and_then(|id| id.trim().parse().ok());
            let event = id.ok_or(ApiError::NotFound("event"))?;
            events::number_of(&mut tx, company, run, event).await?.ok_or(ApiError::NotFound("event"))?
        }
    };
    let now = events::mark_of_now(&mut tx).await?;
    drop(tx);
    let _ = caller.permit.charge(caller.credits);
    let (out, frames) = mpsc::channel::<Bytes>(FRAMES_MAX);
    let filter = Filter { run: Some(run), ..Filter::all(Topic::Company(company)) };
    let reader = Reader::new(state, caller, filter, now, out);
    tokio::spawn(reader.run_of(company, run, after, now));
    Ok(answer(frames))
}

impl Reader {
    async fn run_of(mut self, company: CompanyId, run: RunId, mut after: i64, now: Place) {
        if self.send(Bytes::from_static(b": capx\n\n")).await.is_err() {
            return;
        }
        let (mut received, _) = self.state.hub.subscribe(self.filter.topic, now);
        loop {
            match self.numbered(company, run, after).await {
                Ok(rows) => {
                    for (seq, row) in rows {
                        after = seq;
                        let last = LAST.contains(&row.event.event.as_str());
                        let frame = match self.rendered(row).await {
                            Ok(frame) => frame,
                            Err(_) => return,
                        };
                        if self.send(frame).await.is_err() || last {
                            return;
                        }
                    }
                }
                Err(error) => {
                    tracing::debug!(?error, "a run's stream could not be read; its client may resume it");
                    return;
                }
            }
            if self.until_told(&mut received).await.is_err() {
                return;
            }
        }
    }

    async fn rendered(&self, row: FeedRow) -> Result<Bytes, ApiError> {
        let mut tx = self.caller.read(&self.state).await?;
        let frame = render(&mut tx, vec![row]).await?.pop().ok_or(ApiError::Internal)?;
        Ok(frame.bytes)
    }

    async fn numbered(&self, company: CompanyId, run: RunId, after: i64) -> Result<Vec<(i64, FeedRow)>, ApiError> {
        let mut tx = self.caller.read(&self.state).await?;
        let rows = events::of_run(&mut *tx, company, run, after, PAGE).await?;
        let place = FIRST;
        Ok(rows.into_iter().filter_map(|event| Some((event.seq?, FeedRow { company, place, event }))).collect())
    }

    /// Waits until the company's log says that the run has gone on.
    async fn until_told(&mut self, received: &mut Received) -> Result<(), Over> {
        while let Some(frame) = self.told(received).await? {
            if self.filter.shows(&frame) {
                break;
            }
        }
        Ok(())
    }
}
