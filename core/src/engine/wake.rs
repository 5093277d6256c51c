//! Hints that wake idle workers. Polling is the truth; a hint only makes it
//! sooner, so it may be lost, doubled or late.
//!
//! No `NOTIFY` in a business transaction: one with a pending notice takes a
//! lock of the whole cluster and keeps commits from grouping (hazard H7).
//! Instead it is sent after the commit: the first at once, over the connection
//! that has just committed where there is one, then at most one every
//! [`SPACING`] by the process's own sender.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use sqlx::pool::PoolConnection;
use sqlx::postgres::PgListener;
use sqlx::{Connection, PgConnection, PgPool, Postgres};
use tokio::sync::{Notify, mpsc};
use tokio::time::Instant;

use crate::store::{PoolKind, StoreError, connect_options};

/// The channel of the hints; they carry nothing.
pub const CHANNEL: &str = "capx_jobs";
/// The least time between two hints of a process.
const SPACING: Duration = Duration::from_millis(2);
/// How long to leave a database alone that refused a connection.
const RECONNECT: Duration = Duration::from_millis(500);

/// Tells workers that there is work. Cheap to clone.
#[derive(Debug, Clone)]
pub struct Waker {
    /// A place for one hint: more say no more.
    pending: Option<mpsc::Sender<()>>,
    sent: Arc<Sent>,
}

/// When the process has sent its last hint.
#[derive(Debug, Default)]
struct Sent(Mutex<Option<Instant>>);

impl Sent {
    /// Takes the turn to send a hint, or says when the next one comes.
    fn take_turn(&self) -> Result<(), Instant> {
        let mut last = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        match last.map(|at| at + SPACING) {
            Some(next) if next > now => Err(next),
            _ => {
                *last = Some(now);
                Ok(())
            }
        }
    }
}

impl Waker {
    /// One that tells nobody.
    pub fn silent() -> Self {
        Self { pending: None, sent: Arc::default() }
    }

    /// Starts the process's one sender of hints; it ends with the last clone.
    pub fn start(url: &str) -> Self {
        let (pending, mut wanted) = mpsc::channel(1);
        let (url, sent) = (url.to_owned(), Arc::<Sent>::default());
        let waker = Self { pending: Some(pending), sent: Arc::clone(&sent) };
        tokio::spawn(async move {
            while let Err(error) = send_hints(&url, &mut wanted, &sent).await {
                tracing::debug!(%error, "the sender of hints reconnects");
                tokio::time::sleep(RECONNECT).await;
            }
        });
        waker
    }

    /// Something was committed that a worker can take.
    pub fn wake(&self) {
        if let Some(pending) = &self.pending {
            let _ = pending.try_send(());
        }
    }

    /// The same over the connection that has just committed: it is awake, the
    /// sender's own would have to be woken first.
    pub fn wake_over(&self, mut connection: PoolConnection<Postgres>) {
        if self.pending.is_none() {
            return;
        }
        if self.sent.take_turn().is_err() {
            return self.wake();
        }
        let waker = self.clone();
        tokio::spawn(async move {
            if let Err(error) = notify(&mut connection).await {
                tracing::debug!(%error, "a hint goes to the sender of hints");
                waker.wake();
            }
        });
    }
}

async fn notify(connection: &mut PgConnection) -> Result<(), sqlx::Error> {
    sqlx::query("select pg_notify($1, '')").bind(CHANNEL).execute(connection).await.map(drop)
}

async fn send_hints(url: &str, wanted: &mut mpsc::Receiver<()>, sent: &Sent) -> Result<(), StoreError> {
    let mut connection = PgConnection::connect_with(&connect_options(url, PoolKind::Queue)?).await?;
    while wanted.recv().await.is_some() {
        while let Err(next) = sent.take_turn() {
            tokio::time::sleep_until(next).await;
        }
        // A hint writes nothing that anybody waits for the disk for.
        notify(&mut connection).await?;
    }
    Ok(())
}

/// Listens for hints and passes them on, for as long as the receiver lives;
/// after every (re)connect it passes one on by itself, since it may have
/// missed any number.
pub async fn listen(pool: PgPool, heard: Arc<Notify>) {
    loop {
        match PgListener::connect_with(&pool).await {
            Err(error) => tracing::debug!(%error, "the listener reconnects"),
            Ok(mut listener) => {
                // A broken connection is an error here, not a silent
                // reconnect: we must poll after it.
                listener.eager_reconnect(false);
                if listener.listen(CHANNEL).await.is_ok() {
                    heard.notify_one();
                    while let Ok(Some(_)) = listener.try_recv().await {
                        heard.notify_one();
                    }
                }
            }
        }
        tokio::time::sleep(RECONNECT).await;
    }
}
