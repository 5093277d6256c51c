//! One reader of the log for all streams of a process: it reads what is new for
//! whoever is subscribed, renders it once, and hands it to all of them.

use std::collections::HashMap;
use std::io::Write as _;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use axum::body::Bytes;
use capx_core::domain::ids::{AccountId, AgentId, CompanyId, RunId};
use capx_core::store::events::{self, FeedRow, Place};
use capx_core::store::{StoreError, agents};
use sqlx::{PgConnection, PgPool};
use tokio::sync::{Notify, broadcast};
use uuid::Uuid;

use super::Filter;
use crate::api::routes::activity::{Activity, agent_of};

/// Between two looks while anybody is subscribed.
const POLL: Duration = Duration::from_millis(100);
/// After a look that failed.
const POLL_FAILED: Duration = Duration::from_secs(1);
/// Events of one topic in one look.
const LOOK_MAX: i64 = 500;
/// Batches that a subscriber may be behind before it reads the log itself.
const BEHIND_MAX: usize = 16;
/// Topics of one statement.
const TOPICS_MAX: usize = 256;

/// What is followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Topic {
    /// A company's log.
    Company(CompanyId),
    /// The logs of all companies of an account.
    Account(AccountId),
}

impl Topic {
    fn id(self) -> Uuid {
        match self {
            Self::Company(id) => id.0,
            Self::Account(id) => id.0,
        }
    }
}

/// Where an event stands in a batch, and what it is about.
#[derive(Debug)]
struct Frame {
    place: Place,
    run: Option<RunId>,
    agent: Option<AgentId>,
    kind: &'static str,
    /// Its bytes end here; they begin where those before it end.
    end: usize,
}

/// Events as they go out, in the order of the log: rendered once, and shared by
/// all who are sent them.
#[derive(Debug)]
pub struct Batch {
    bytes: Bytes,
    frames: Vec<Frame>,
}

impl Batch {
    /// Renders events, looking the roles of their agents up.
    pub async fn render(executor: &mut PgConnection, rows: Vec<FeedRow>) -> Result<Self, StoreError> {
        let mut about: Vec<_> = rows.iter().filter_map(|row| Some((row.company, agent_of(row)?))).collect();
        about.sort_unstable();
        about.dedup();
        let roles: HashMap<AgentId, String> = match about.is_empty() {
            true => HashMap::new(),
            false => agents::roles(executor, &about).await?.into_iter().collect(),
        };
        let mut bytes = Vec::new();
        let mut frames = Vec::with_capacity(rows.len());
        for row in rows {
            let (place, run, agent, id) = (row.place, row.event.run, agent_of(&row), row.event.id);
            let activity = Activity::new(row, &roles);
            let kind = activity.kind();
            // Writing to memory does not fail, nor does an activity that was read as one.
            let _ = write!(bytes, "id: {id}\nevent: {kind}\ndata: ");
            let _ = serde_json::to_writer(&mut bytes, &activity);
            bytes.extend_from_slice(b"\n\n");
            frames.push(Frame { place, run, agent, kind, end: bytes.len() });
        }
        Ok(Self { bytes: bytes.into(), frames })
    }

    /// How many events.
    pub(super) fn len(&self) -> usize {
        self.frames.len()
    }

    /// Where the last one stands.
    pub fn last(&self) -> Option<Place> {
        self.frames.last().map(|frame| frame.place)
    }

    /// What a filter shows of the events behind a place: neighbours in one piece.
    pub fn shown(&self, filter: &Filter, after: Place) -> Vec<Bytes> {
        let mut pieces: Vec<std::ops::Range<usize>> = Vec::new();
        let mut start = 0;
        for frame in &self.frames {
            let piece = std::mem::replace(&mut start, frame.end)..frame.end;
            if frame.place <= after || !filter.shows(frame.agent, frame.kind, frame.run) {
                continue;
            }
            match pieces.last_mut() {
                Some(last) if last.end == piece.start => last.end = piece.end,
                _ => pieces.push(piece),
            }
        }
        pieces.into_iter().map(|piece| self.bytes.slice(piece)).collect()
    }
}

#[derive(Debug)]
struct Followed {
    /// Everything up to here was sent.
    position: Place,
    sender: broadcast::Sender<Arc<Batch>>,
}

#[derive(Debug)]
struct Inner {
    pool: PgPool,
    topics: Mutex<HashMap<Topic, Followed>>,
    subscribed: Notify,
}

/// The reader's handle. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Hub(Arc<Inner>);

impl Hub {
    /// One that nobody can subscribe to: of a process that serves its health only.
    pub fn silent(pool: PgPool) -> Self {
        Self(Arc::new(Inner { pool, topics: Mutex::default(), subscribed: Notify::new() }))
    }

    /// Starts the reader, over all tenants.
    pub fn start(pool: PgPool) -> Self {
        let hub = Self::silent(pool);
        let weak = Arc::downgrade(&hub.0);
        tokio::spawn(async move {
            loop {
                let Some(inner) = weak.upgrade() else { return };
                let pause = match inner.look().await {
                    Ok(Look::Idle) => {
                        // Ends with the last handle, at the latest a look later.
                        let _ = tokio::time::timeout(POLL_FAILED, inner.subscribed.notified()).await;
                        Duration::ZERO
                    }
                    Ok(Look::More) => Duration::ZERO,
                    Ok(Look::Done) => POLL,
                    Err(error) => {
                        tracing::debug!(%error, "the log could not be read for streams");
                        POLL_FAILED
                    }
                };
                drop(inner);
                tokio::time::sleep(pause).await;
            }
        });
        hub
    }

    /// Follows a topic: what comes after the returned place will be received.
    /// `now` is where a topic begins that nobody followed so far.
    pub fn subscribe(&self, topic: Topic, now: Place) -> (broadcast::Receiver<Arc<Batch>>, Place) {
        let mut topics = self.0.topics();
        let followed =
            topics.entry(topic).or_insert_with(|| Followed { position: now, sender: broadcast::channel(BEHIND_MAX).0 });
        let subscription = (followed.sender.subscribe(), followed.position);
        drop(topics);
        self.0.subscribed.notify_one();
        subscription
    }

    /// Up to where everything about a topic was sent.
    pub fn position(&self, topic: Topic) -> Option<Place> {
        self.0.topics().get(&topic).map(|followed| followed.position)
    }
}

enum Look {
    Idle,
    More,
    Done,
}

impl Inner {
    fn topics(&self) -> MutexGuard<'_, HashMap<Topic, Followed>> {
        self.topics.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn look(&self) -> Result<Look, StoreError> {
        let followed: Vec<(Topic, Place)> = {
            let mut topics = self.topics();
            topics.retain(|_, followed| followed.sender.receiver_count() > 0);
            topics.iter().map(|(topic, followed)| (*topic, followed.position)).collect()
        };
        if followed.is_empty() {
            return Ok(Look::Idle);
        }
        let mut more = false;
        for followed in followed.chunks(TOPICS_MAX) {
            more |= self.look_at(followed).await?;
        }
        Ok(if more { Look::More } else { Look::Done })
    }

    /// Sends on what is new of some topics; says whether there is more.
    async fn look_at(&self, followed: &[(Topic, Place)]) -> Result<bool, StoreError> {
        let (companies, accounts): (Vec<(Topic, Place)>, Vec<_>) =
            followed.iter().partition(|(topic, _)| matches!(topic, Topic::Company(_)));
        let places =
            |topics: Vec<(Topic, Place)>| topics.into_iter().map(|(t, place)| (t.id(), place)).collect::<Vec<_>>();
        let (mark, tailed) = events::tail(&self.pool, &places(companies), &places(accounts), LOOK_MAX).await?;
        let mut by_topic: HashMap<Uuid, Vec<FeedRow>> = HashMap::new();
        for tailed in tailed {
            by_topic.entry(tailed.topic).or_default().push(tailed.row);
        }
        let mut more = false;
        for (topic, _) in followed {
            let rows = by_topic.remove(&topic.id()).unwrap_or_default();
            let whole = rows.len() < LOOK_MAX as usize;
            more |= !whole;
            let batch = match rows.is_empty() {
                true => None,
                false => Some(Batch::render(&mut *self.pool.acquire().await?, rows).await?),
            };
            let mut topics = self.topics();
            let Some(followed) = topics.get_mut(topic) else { continue };
            if let Some(batch) = batch {
                followed.position = batch.last().unwrap_or(followed.position);
                // Whoever has gone away meanwhile misses nothing.
                let _ = followed.sender.send(Arc::new(batch));
            }
            if whole {
                followed.position = followed.position.max(Place { xid: mark, id: Uuid::nil() });
            }
        }
        Ok(more)
    }
}
