//! How much this worker has in hand, and how much more it may take.
//!
//! A slot is held while a handler runs. Beyond its free slots a worker claims
//! only as far ahead as it will get within [`AHEAD`], judged by what it has
//! just been finishing: much for work of microseconds, nothing for work of
//! minutes, so that no job waits here that another worker could run.

use std::collections::HashSet;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capx_core::store::jobs::Lease;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore};

/// How far ahead a worker claims, in time.
const AHEAD: Duration = Duration::from_millis(15);
/// The most jobs claimed ahead.
const AHEAD_MAX: usize = 768;
/// Outcomes that may wait for their commit before claims pause.
const UNCOMMITTED_MAX: usize = 1_536;
/// Events on their way to webhooks at once. They wait for others and for nothing here, so they take
/// no slots: one that does not answer holds up no step.
const WIRES: usize = 512;
/// An event that finds none of them free comes back after about this long.
const NO_WIRE: Duration = Duration::from_millis(500);
/// A claimed job that has got no slot by then is given back.
pub(super) const UNSTARTED_MAX: Duration = Duration::from_millis(500);
/// A suspect that finds another one at work comes back after about this long.
const SUSPECT_DELAY: Duration = Duration::from_secs(1);
/// A suspect that has lived for so long makes place for the next: what kills
/// its worker mostly does so at once, and a suspect may have hours to work.
pub(super) const SUSPECT_ALONE: Duration = Duration::from_secs(10);

/// What a worker has in hand.
#[derive(Debug)]
pub(crate) struct Load {
    slots: usize,
    free: Arc<Semaphore>,
    /// The one place for a suspect: who kills the worker next must not take
    /// others with it that one more death would put into quarantine.
    suspects: Arc<Semaphore>,
    wires: Arc<Semaphore>,
    /// Claimed, and its handler has not ended.
    unfinished: AtomicUsize,
    /// Ended, and not yet written.
    uncommitted: AtomicUsize,
    /// The leases in hand, as they were claimed.
    leases: Mutex<HashSet<Lease>>,
    /// Handlers ended so far.
    finished: AtomicU64,
    changed: Notify,
}

/// A job in hand; letting go of it tells the load.
#[derive(Debug)]
pub(crate) struct Held {
    load: Arc<Load>,
    lease: Lease,
    phase: Phase,
}

/// How far a job in hand has got.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    Unfinished,
    /// It waits for somebody else's answer, and takes no room.
    OnWire,
    Uncommitted,
}

impl Load {
    pub(super) fn new(slots: usize) -> Self {
        Self {
            slots,
            free: Arc::new(Semaphore::new(slots)),
            suspects: Arc::new(Semaphore::new(1)),
            wires: Arc::new(Semaphore::new(WIRES)),
            unfinished: AtomicUsize::new(0),
            uncommitted: AtomicUsize::new(0),
            leases: Mutex::new(HashSet::new()),
            finished: AtomicU64::new(0),
            changed: Notify::new(),
        }
    }

    /// Takes a job in hand; `None` when this very lease is in hand already,
    /// since its claim was undone by a crash of the server and made again. A
    /// job that we have just given back may come under a new lease before the
    /// old one is let go of.
    pub(super) fn hold(self: &Arc<Self>, lease: Lease) -> Option<Held> {
        if !self.lock().insert(lease) {
            return None;
        }
        self.unfinished.fetch_add(1, Relaxed);
        Some(Held { load: Arc::clone(self), lease, phase: Phase::Unfinished })
    }

    /// The jobs in hand.
    pub(super) fn in_hand(&self) -> Vec<i64> {
        self.lock().iter().map(|lease| lease.job).collect()
    }

    fn lock(&self) -> MutexGuard<'_, HashSet<Lease>> {
        self.leases.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many jobs may be claimed now.
    pub(super) fn room(&self, ahead: usize) -> usize {
        if self.uncommitted.load(Relaxed) >= UNCOMMITTED_MAX {
            return 0;
        }
        (self.slots + ahead).saturating_sub(self.unfinished.load(Relaxed))
    }

    /// Waits until something is let go of.
    pub(super) async fn changed(&self) {
        self.changed.notified().await;
    }

    /// Waits until nothing is in hand.
    pub(super) async fn until_empty(&self) {
        while !self.lock().is_empty() {
            // Bounded, since the claimer may have taken the one notice.
            let _ = tokio::time::timeout(Duration::from_millis(20), self.changed.notified()).await;
        }
    }

    /// Leave to send an event, or how long it should stay away: who waited here would take the room of
    /// others.
    pub(super) fn wire(&self) -> Result<OwnedSemaphorePermit, Duration> {
        let wire = Arc::clone(&self.wires).try_acquire_owned();
        wire.map_err(|_| NO_WIRE.mul_f64(rand::random_range(0.5..1.5)))
    }

    /// A slot for a handler, or how long the job should stay away when none
    /// came free in time.
    pub(super) async fn slot(&self, suspect: bool) -> Result<Slot, Duration> {
        let alone = match suspect.then(|| Arc::clone(&self.suspects).try_acquire_owned()).transpose() {
            Ok(alone) => alone,
            Err(_) => return Err(SUSPECT_DELAY.mul_f64(rand::random_range(0.5..1.5))),
        };
        let slot = match Arc::clone(&self.free).try_acquire_owned() {
            Ok(slot) => slot,
            Err(_) => match tokio::time::timeout(UNSTARTED_MAX, Arc::clone(&self.free).acquire_owned()).await {
                Ok(Ok(slot)) => slot,
                _ => return Err(Duration::ZERO),
            },
        };
        Ok(Slot { _slot: slot, alone })
    }
}

/// The right to run a handler; free again when dropped.
#[derive(Debug)]
pub(super) struct Slot {
    _slot: OwnedSemaphorePermit,
    alone: Option<OwnedSemaphorePermit>,
}

impl Slot {
    /// Makes place for the next suspect after a while; never ends.
    pub(super) async fn share(&mut self) {
        if self.alone.is_some() {
            tokio::time::sleep(SUSPECT_ALONE).await;
            self.alone = None;
        }
        std::future::pending().await
    }
}

impl Held {
    /// Its handler has ended.
    pub(super) fn finish(&mut self) {
        self.load.finished.fetch_add(1, Relaxed);
        self.leave();
    }

    /// It waits for its commit, without having been worked on: that says
    /// nothing about how much this worker gets done.
    pub(super) fn leave(&mut self) {
        self.enter(Phase::Uncommitted);
    }

    /// It waits for somebody else's answer.
    pub(super) fn on_wire(&mut self) {
        self.enter(Phase::OnWire);
    }

    /// It goes on with another handler.
    pub(super) fn resume(&mut self) {
        self.enter(Phase::Unfinished);
    }

    fn enter(&mut self, phase: Phase) {
        if self.phase == phase {
            return;
        }
        if let Some(counter) = self.load.counter(phase) {
            counter.fetch_add(1, Relaxed);
        }
        if let Some(counter) = self.load.counter(self.phase) {
            counter.fetch_sub(1, Relaxed);
        }
        self.phase = phase;
        self.load.changed.notify_one();
    }
}

impl Load {
    fn counter(&self, phase: Phase) -> Option<&AtomicUsize> {
        match phase {
            Phase::Unfinished => Some(&self.unfinished),
            Phase::OnWire => None,
            Phase::Uncommitted => Some(&self.uncommitted),
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.load.lock().remove(&self.lease);
        if let Some(counter) = self.load.counter(self.phase) {
            counter.fetch_sub(1, Relaxed);
        }
        self.load.changed.notify_one();
    }
}

/// How far ahead to claim, from the rate of finished handlers.
#[derive(Debug)]
pub(super) struct Ahead {
    at: Instant,
    finished: u64,
    per_second: f64,
}

impl Ahead {
    pub(super) fn new() -> Self {
        Self { at: Instant::now(), finished: 0, per_second: 0.0 }
    }

    /// How many jobs beyond the free slots, by now.
    pub(super) fn jobs(&mut self, load: &Load) -> usize {
        let elapsed = self.at.elapsed();
        if elapsed >= Duration::from_millis(5) {
            let finished = load.finished.load(Relaxed);
            let rate = (finished - self.finished) as f64 / elapsed.as_secs_f64();
            self.per_second = 0.5 * self.per_second + 0.5 * rate;
            (self.at, self.finished) = (Instant::now(), finished);
        }
        ((self.per_second * AHEAD.as_secs_f64()) as usize).min(AHEAD_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_held_is_counted_through_its_phases() {
        let load = Arc::new(Load::new(2));
        let lease = |job, epoch| Lease { job, epoch, session: 1 };
        let (mut a, b) = (load.hold(lease(1, 1)).expect("new"), load.hold(lease(2, 1)).expect("new"));
        assert!(load.hold(lease(1, 1)).is_none());
        // Given back and claimed again, while the old lease is still in hand.
        drop(load.hold(lease(1, 3)).expect("a new lease"));
        assert_eq!((load.room(0), load.room(3)), (0, 3));
        a.finish();
        a.leave();
        assert_eq!((load.room(0), load.uncommitted.load(Relaxed)), (1, 1));
        a.resume();
        assert_eq!(load.room(0), 0);
        drop((a, b));
        load.until_empty().await;
        assert_eq!(load.room(0), 2);
    }

    #[tokio::test(start_paused = true)]
    async fn a_job_without_a_slot_is_given_back_in_time() {
        let load = Arc::new(Load::new(1));
        let taken = load.slot(false).await;
        assert!(taken.is_ok());
        assert_eq!(load.slot(false).await.err(), Some(Duration::ZERO));
        drop(taken);
        assert!(load.slot(false).await.is_ok());
    }

    #[tokio::test]
    async fn suspects_run_one_at_a_time_and_hold_up_nobody_else() {
        let load = Load::new(4);
        let suspect = load.slot(true).await;
        assert!(suspect.is_ok());
        assert!(load.slot(true).await.is_err_and(|delay| delay >= SUSPECT_DELAY / 2));
        assert!(load.slot(false).await.is_ok());
        drop(suspect);
        assert!(load.slot(true).await.is_ok());
    }

    #[tokio::test(start_paused = true)]
    async fn a_suspect_that_lives_makes_place_for_the_next() {
        let load = Load::new(4);
        let mut suspect = load.slot(true).await.expect("the place is free");
        let shared = tokio::time::timeout(SUSPECT_ALONE * 2, suspect.share()).await;
        assert!(shared.is_err(), "it never ends");
        assert!(load.slot(true).await.is_ok());
    }

    #[test]
    fn slow_work_is_not_claimed_ahead() {
        let load = Arc::new(Load::new(4));
        let mut ahead = Ahead::new();
        ahead.at = Instant::now() - Duration::from_secs(1);
        load.finished.store(10, Relaxed);
        assert_eq!(ahead.jobs(&load), 0);
        ahead.at = Instant::now() - Duration::from_millis(10);
        load.finished.store(1_010, Relaxed);
        assert!(ahead.jobs(&load) > 500);
    }
}
