//! What one stream sends next.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Bytes;
use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::store::events::{self, EventRow, FeedFilter, FeedRow, Place};
use capx_core::store::runs;
use sqlx::PgConnection;
use tokio::sync::broadcast;
use tokio::sync::broadcast::error::RecvError;
use tokio::task::JoinHandle;
use tokio::time::Instant;

use super::hub::Batch;
use super::{FIRST, Filter};
use crate::api::auth::Caller;
use crate::api::{ApiError, ApiState};

/// A comment is sent this long after the last event.
const COMMENT: Duration = Duration::from_secs(15);
/// How often a stream looks whether its key is still good.
const KEY_CHECK: Duration = Duration::from_secs(2);
/// Events of one read while catching up.
const PAGE: i64 = 500;
/// How often in a row a stream tries to read the log before it gives up, and how
/// long it waits in between: it outlives a database that is busy for a moment.
const READ_TRIES: u32 = 5;
const READ_PAUSE: Duration = Duration::from_millis(500);

/// Where a stream's events come from.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// A topic's log.
    Log {
        /// Everything up to here was sent, or is not shown.
        place: Place,
        /// What is behind this will be received.
        live: Place,
    },
    /// A run's events, by their number.
    Run {
        company: CompanyId,
        run: RunId,
        /// The number of the last that was sent.
        after: i64,
        /// There may be more.
        ahead: bool,
    },
}

/// The stream is over: its key, its run or its process is.
#[derive(Debug)]
struct Over;

/// One stream.
pub(super) struct Reader {
    state: Arc<ApiState>,
    caller: Arc<Caller>,
    filter: Arc<Filter>,
    source: Source,
    received: broadcast::Receiver<Arc<Batch>>,
    /// What is to be sent next.
    pieces: VecDeque<Bytes>,
    over: bool,
    /// Reads that failed in a row.
    failures: u32,
    comment: Instant,
    key_check: Instant,
}

impl Reader {
    /// A stream of a topic; `now` is where the topic begins if nobody follows
    /// it so far, `source` is told behind which place events will be received.
    pub(super) fn new(
        state: &Arc<ApiState>,
        caller: Caller,
        filter: Filter,
        now: Place,
        source: impl FnOnce(Place) -> Source,
    ) -> Self {
        let (received, live) = state.hub.subscribe(filter.topic, now);
        let at = Instant::now();
        Self {
            state: Arc::clone(state),
            caller: Arc::new(caller),
            filter: Arc::new(filter),
            source: source(live),
            received,
            // Sent at once: a client knows by it that it is connected.
            pieces: [Bytes::from_static(b": capx\n\n")].into(),
            over: false,
            failures: 0,
            comment: at + COMMENT,
            key_check: at + KEY_CHECK,
        }
    }

    /// What is sent next; `None` at the end.
    pub(super) async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.check().await.is_err() {
                return None;
            }
            if let Some(piece) = self.pieces.pop_front() {
                self.comment = Instant::now() + COMMENT;
                return Some(piece);
            }
            if self.over || self.more().await.is_err() {
                return None;
            }
        }
    }

    /// Whether the stream may go on.
    async fn check(&mut self) -> Result<(), Over> {
        if self.state.stopping.is_cancelled() {
            return Err(Over);
        }
        if Instant::now() < self.key_check {
            return Ok(());
        }
        let (state, caller) = (Arc::clone(&self.state), Arc::clone(&self.caller));
        let good = tokio::spawn(async move { state.admission.is_good(&caller.permit).await });
        self.key_check = Instant::now() + KEY_CHECK;
        if good.await.unwrap_or(false) { Ok(()) } else { Err(Over) }
    }

    /// Gets more to send, or waits until there may be more.
    async fn more(&mut self) -> Result<(), Over> {
        match self.source {
            Source::Log { place, live } if place < live => {
                let (state, caller, filter) =
                    (Arc::clone(&self.state), Arc::clone(&self.caller), Arc::clone(&self.filter));
                let read = tokio::spawn(async move { page(&state, &caller, &filter, place).await });
                let Some(page) = self.told_by(read).await? else { return Ok(()) };
                self.take(&page, place);
                let place = page.last().map_or(place, |last| last.max(place));
                let place = if page.len() < PAGE as usize { place.max(live) } else { place };
                self.source = Source::Log { place, live };
            }
            Source::Log { place, live } => match self.told().await? {
                Told::Nothing => {}
                Told::Batch(batch) => {
                    self.take(&batch, place);
                    self.source = Source::Log { place: batch.last().map_or(place, |last| last.max(place)), live };
                }
                // The log has it all.
                Told::Missed => {
                    let live = self.state.hub.position(self.filter.topic).unwrap_or(place);
                    self.source = Source::Log { place, live };
                }
            },
            Source::Run { company, run, after, ahead: true } => {
                let (state, caller) = (Arc::clone(&self.state), Arc::clone(&self.caller));
                let read = tokio::spawn(async move { numbered(&state, &caller, company, run, after).await });
                let Some(Numbered { batch, last, over }) = self.told_by(read).await? else { return Ok(()) };
                self.take(&batch, FIRST);
                self.over = over;
                let ahead = batch.len() == PAGE as usize;
                self.source = Source::Run { company, run, after: last, ahead };
            }
            Source::Run { company, run, after, ahead: false } => {
                let ahead = match self.told().await? {
                    Told::Nothing => false,
                    Told::Batch(batch) => !batch.shown(&self.filter, FIRST).is_empty(),
                    Told::Missed => true,
                };
                self.source = Source::Run { company, run, after, ahead };
            }
        }
        Ok(())
    }

    /// What a read has brought; `None` where it is to be tried again. It has a task
    /// of its own, so that a client that goes away drops no call half-way (hazard
    /// H6), and a stream that waits holds no memory for its reads.
    async fn told_by<T>(&mut self, read: JoinHandle<Result<T, ApiError>>) -> Result<Option<T>, Over> {
        match read.await {
            Ok(Ok(read)) => {
                self.failures = 0;
                return Ok(Some(read));
            }
            Ok(Err(ApiError::Unavailable)) if self.failures + 1 < READ_TRIES => self.failures += 1,
            failed => {
                let error = failed.map(Result::err);
                tracing::debug!(?error, "a stream could not read the log; its client may resume it");
                return Err(Over);
            }
        }
        tokio::select! {
            () = tokio::time::sleep(READ_PAUSE) => Ok(None),
            () = self.state.stopping.cancelled() => Err(Over),
        }
    }

    /// What is shown of a batch behind a place is to be sent.
    fn take(&mut self, batch: &Batch, after: Place) {
        self.pieces.extend(batch.shown(&self.filter, after));
    }

    /// What the process's reader hands out next. Meanwhile says that the stream
    /// is still here.
    async fn told(&mut self) -> Result<Told, Over> {
        tokio::select! {
            batch = self.received.recv() => match batch {
                Ok(batch) => Ok(Told::Batch(batch)),
                Err(RecvError::Lagged(_)) => Ok(Told::Missed),
                Err(RecvError::Closed) => Err(Over),
            },
            () = tokio::time::sleep_until(self.key_check) => Ok(Told::Nothing),
            () = tokio::time::sleep_until(self.comment) => {
                self.pieces.push_back(Bytes::from_static(b": still here\n\n"));
                Ok(Told::Nothing)
            }
            () = self.state.stopping.cancelled() => Err(Over),
        }
    }
}

/// What came of waiting.
enum Told {
    Nothing,
    Batch(Arc<Batch>),
    /// Too much to keep.
    Missed,
}

async fn page(state: &ApiState, caller: &Caller, filter: &Filter, after: Place) -> Result<Batch, ApiError> {
    let mut tx = caller.read(state).await?;
    let (account, company) = filter.scope(caller);
    let shown = FeedFilter {
        account,
        company,
        kinds: None,
        agent: filter.agent,
        since: filter.since,
        before: None,
        after: Some(after),
    };
    let rows = events::feed(&mut tx, shown, false, PAGE).await?;
    Ok(Batch::render(&mut tx, rows).await?)
}

/// Some events of a run.
struct Numbered {
    batch: Batch,
    /// The number of the last.
    last: i64,
    /// It was the run's last.
    over: bool,
}

async fn numbered(
    state: &ApiState,
    caller: &Caller,
    company: CompanyId,
    run: RunId,
    after: i64,
) -> Result<Numbered, ApiError> {
    let mut tx = caller.read(state).await?;
    let ended = has_ended(&mut tx, company, run).await?;
    let rows = events::of_run(&mut *tx, company, run, after, PAGE).await?;
    let over = ended && rows.len() < PAGE as usize;
    let last = rows.iter().filter_map(|row| row.seq).max().unwrap_or(after);
    // Its number is an event's place here, so that all are behind the first.
    let place = |row: &EventRow| Place { xid: row.seq.unwrap_or(0).unsigned_abs(), id: row.id.0 };
    let rows = rows.into_iter().map(|event| FeedRow { company, place: place(&event), event }).collect();
    Ok(Numbered { batch: Batch::render(&mut tx, rows).await?, last, over })
}

/// Whether a run has ended; then all its events are there, for whoever looks
/// after this.
async fn has_ended(tx: &mut PgConnection, company: CompanyId, run: RunId) -> Result<bool, ApiError> {
    let row = runs::get(tx, company, run).await?;
    Ok(row.is_none_or(|row| row.status.is_terminal()))
}

/// Whether a run has ended and nothing is behind an event of it.
pub(super) async fn is_told(
    tx: &mut PgConnection,
    company: CompanyId,
    run: RunId,
    after: i64,
) -> Result<bool, ApiError> {
    Ok(has_ended(tx, company, run).await? && events::of_run(tx, company, run, after, 1).await?.is_empty())
}
