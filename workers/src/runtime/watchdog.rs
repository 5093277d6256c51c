//! Calls of the database that are never answered.
//!
//! A network may swallow a connection without a word. The call that waits on
//! it cannot be dropped half-way (hazard H6), and the pool would not notice;
//! the worker would keep beating and do nothing. The server ends each
//! statement after a minute, so an answer that is this late will not come:
//! the worker gives up, its process ends, and whoever supervises it starts
//! another. Its jobs are others' when its lease is out.

use std::time::Duration;

use tokio_util::sync::CancellationToken;

/// The longest wait for an answer: some statements of a minute each.
pub(super) const UNANSWERED_MAX: Duration = Duration::from_secs(180);

/// Watches over calls. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Watchdog {
    limit: Duration,
    wedged: CancellationToken,
}

impl Watchdog {
    pub(super) fn new(limit: Duration) -> Self {
        Self { limit, wedged: CancellationToken::new() }
    }

    /// Waits for a call, however long; past the limit everybody is told.
    pub(crate) async fn answer<T>(&self, what: &'static str, call: impl Future<Output = T>) -> T {
        tokio::pin!(call);
        if let Ok(answer) = tokio::time::timeout(self.limit, &mut call).await {
            return answer;
        }
        tracing::error!(what, limit_s = self.limit.as_secs(), "the database has not answered; this worker gives up");
        self.wedged.cancel();
        call.await
    }

    /// Waits until something has gone unanswered.
    pub(super) async fn bitten(&self) {
        self.wedged.cancelled().await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test(start_paused = true)]
    async fn only_what_is_never_answered_is_told() {
        let dog = Watchdog::new(Duration::from_secs(2));
        assert_eq!(dog.answer("quick", async { 1 }).await, 1);
        assert!(!dog.wedged.is_cancelled());
        let watched = dog.clone();
        let stuck = tokio::spawn(async move { watched.answer("stuck", std::future::pending::<()>()).await });
        dog.bitten().await;
        assert!(!stuck.is_finished(), "the call was dropped half-way");
    }
}
