//! The beat: the session's lease, renewed from an OS thread of its own with a
//! runtime and a connection of its own, so that no work can starve it
//! (hazard H9).
//!
//! It fences the worker off before anybody else may take its jobs: when the
//! last renewal that succeeded was *sent* longer ago than 0.8 of the lease,
//! by a clock that also counts a suspended host, the session is given up.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use capx_core::store::sessions::{self, Beat as Heard};
use sqlx::PgConnection;
use tokio_util::sync::CancellationToken;

use super::Shared;

/// The beat is this part of the lease.
const BEATS_A_LEASE: u32 = 6;
/// The worker gives up after this share of the lease without a renewal.
const FENCE_SHARE: f64 = 0.8;

/// Time since boot, host suspension included.
pub(super) fn boot_time() -> Duration {
    #[cfg(target_os = "linux")]
    let clock = rustix::time::ClockId::Boottime;
    #[cfg(not(target_os = "linux"))]
    let clock = rustix::time::ClockId::Monotonic;
    let now = rustix::time::clock_gettime(clock);
    Duration::new(now.tv_sec.try_into().unwrap_or(0), now.tv_nsec.try_into().unwrap_or(0))
}

/// Starts the beat; it ends with `over`, or by cancelling `shared.lost`.
pub(super) fn spawn(
    url: &str,
    shared: &Arc<Shared>,
    renewed: Duration,
    over: CancellationToken,
) -> std::thread::JoinHandle<()> {
    let url = url.to_owned();
    let shared = Arc::clone(shared);
    std::thread::Builder::new()
        .name("capx-beat".into())
        .spawn(move || {
            // However this thread ends, nobody beats for the session then.
            let _lost = shared.lost.clone().drop_guard();
            let Ok(runtime) = tokio::runtime::Builder::new_current_thread().enable_all().build() else {
                tracing::error!("the beat has no runtime; the session is given up");
                shared.lost.cancel();
                return;
            };
            runtime.block_on(Beat { url, shared, connection: None, renewed }.run(over));
        })
        .unwrap_or_else(|error| {
            tracing::error!(%error, "the beat has no thread");
            std::thread::spawn(|| ())
        })
}

struct Beat {
    url: String,
    shared: Arc<Shared>,
    connection: Option<PgConnection>,
    renewed: Duration,
}

impl Beat {
    async fn run(mut self, over: CancellationToken) {
        let lease = self.shared.config.lease;
        let interval = lease / BEATS_A_LEASE;
        let fence = lease.mul_f64(FENCE_SHARE);
        loop {
            let left = (self.renewed + fence).saturating_sub(boot_time());
            if left.is_zero() {
                tracing::warn!(session.id = self.shared.session, "no renewal in time; the worker fences itself off");
                self.shared.lost.cancel();
                return;
            }
            tokio::select! {
                () = over.cancelled() => return,
                () = tokio::time::sleep(interval.min(left)) => {}
            }
            let sent = boot_time();
            match tokio::time::timeout(interval * 2, self.beat()).await {
                Ok(Ok(heard @ (Heard::Renewed | Heard::Drain))) => {
                    self.renewed = sent;
                    if heard == Heard::Drain && !self.shared.drain.is_cancelled() {
                        tracing::info!(session.id = self.shared.session, "the worker drains");
                        self.shared.drain.cancel();
                    }
                }
                // It has just ended in order.
                Ok(Ok(Heard::Dead)) if over.is_cancelled() => return,
                Ok(Ok(Heard::Dead)) => {
                    tracing::warn!(session.id = self.shared.session, "the session has been declared dead");
                    self.shared.lost.cancel();
                    return;
                }
                Ok(Err(error)) => {
                    tracing::warn!(%error, session.id = self.shared.session, "a beat failed");
                    self.connection = None;
                }
                // The connection may be half-way through a statement: drop it.
                Err(_) => self.connection = None,
            }
        }
    }

    async fn beat(&mut self) -> Result<Heard, capx_core::store::StoreError> {
        let mut connection = match self.connection.take() {
            Some(connection) => connection,
            None => sessions::connect(&self.url).await?,
        };
        let draining = self.shared.draining.load(Ordering::Relaxed);
        let heard = sessions::beat(&mut connection, self.shared.session, draining).await?;
        self.connection = Some(connection);
        Ok(heard)
    }
}
