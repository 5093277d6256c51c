//! Hints that wake idle workers. Polling is the truth; a hint only makes it
//! sooner, so it may be lost, doubled or late.
//!
//! No `NOTIFY` in a business transaction: one with a pending notice takes a
//! lock of the whole cluster and keeps commits from grouping (hazard H7).
//! Instead one own connection a process sends it after the commit: the first
//! at once, then at most one every [`SPACING`].

use std::sync::Arc;
use std::time::Duration;

use sqlx::postgres::PgListener;
use sqlx::{Connection, PgConnection, PgPool};
use tokio::sync::{Notify, mpsc};

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
}

impl Waker {
    /// One that tells nobody.
    pub fn silent() -> Self {
        Self { pending: None }
    }

    /// Starts the process's one sender of hints; it ends with the last clone.
    pub fn start(url: &str) -> Self {
        let (pending, mut wanted) = mpsc::channel(1);
        let url = url.to_owned();
        tokio::spawn(async move {
            while let Err(error) = send_hints(&url, &mut wanted).await {
                tracing::debug!(%error, "the sender of hints reconnects");
                tokio::time::sleep(RECONNECT).await;
            }
        });
        Self { pending: Some(pending) }
    }

    /// Something was committed that a worker can take.
    pub fn wake(&self) {
        if let Some(pending) = &self.pending {
            let _ = pending.try_send(());
        }
    }
}

async fn send_hints(url: &str, wanted: &mut mpsc::Receiver<()>) -> Result<(), StoreError> {
    let options = connect_options(url, PoolKind::Queue)?;
    // A hint that a crash loses is no loss, so its commit need not be flushed.
    let options = options.options([("synchronous_commit", "off")]);
    let mut connection = PgConnection::connect_with(&options).await?;
    while wanted.recv().await.is_some() {
        sqlx::query("select pg_notify($1, '')").bind(CHANNEL).execute(&mut connection).await?;
        tokio::time::sleep(SPACING).await;
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
