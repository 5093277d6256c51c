//! The kill switch, as a worker feels it. Whoever is stopped at once - an agent, a playbook, a
//! company - has its attempts here ended within a moment, whatever they wait for, and none
//! begins that was claimed before. New claims see it by themselves.

use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering::Relaxed};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use capx_core::engine::claim::StepWork;
use capx_core::store::jobs::{ClaimedJob, Lease};
use capx_core::store::kills::{self, Subject};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::Shared;

/// How often a worker looks who was stopped, of those whom it works for: with the time that a
/// look and a call's start take, well within the second that is promised.
pub(super) const LOOK: Duration = Duration::from_millis(200);
/// Nothing begins when it has not been able to look for so long: those who were stopped a moment
/// after the last look are stopped within the second all the same.
pub(super) const BLIND: Duration = Duration::from_millis(600);
/// Whom it has worked for until now, it may work for next.
const RECENT: Duration = Duration::from_secs(2);

/// Whom this worker works for, and who of them was stopped.
#[derive(Debug)]
pub(crate) struct Kills {
    watched: Mutex<Watched>,
    any: AtomicBool,
    /// When it has last seen who was stopped.
    looked: watch::Sender<Instant>,
}

impl Default for Kills {
    fn default() -> Self {
        Self { watched: Mutex::default(), any: AtomicBool::default(), looked: watch::Sender::new(Instant::now()) }
    }
}

#[derive(Debug, Default)]
struct Watched {
    attempts: HashMap<Lease, (Vec<Subject>, CancellationToken)>,
    recent: HashMap<Subject, Instant>,
    killed: HashSet<Subject>,
}

/// An attempt that can be stopped.
#[derive(Debug)]
pub(super) struct Watch {
    kills: Arc<Kills>,
    lease: Lease,
    token: CancellationToken,
}

impl Watch {
    /// Waits until it is.
    pub(super) async fn killed(&self) {
        self.token.cancelled().await;
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        self.kills.lock().attempts.remove(&self.lease);
    }
}

/// Who stops an attempt by being stopped.
fn subjects(job: &ClaimedJob, work: &StepWork) -> Vec<Subject> {
    let mut subjects = vec![Subject::Company(job.company), Subject::Playbook(job.company, work.context.playbook_id)];
    let above = work.above.iter().flat_map(|above| above.iter());
    subjects.extend(above.map(|playbook| Subject::Playbook(job.company, *playbook)));
    if let Ok(step) = usize::try_from(job.step) {
        let agents = [work.agent(step), work.judge(step)].into_iter().flatten();
        subjects.extend(agents.map(|agent| Subject::Agent(job.company, agent.agent)));
    }
    subjects
}

impl Kills {
    fn lock(&self) -> MutexGuard<'_, Watched> {
        self.watched.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Waits until it is known whether an attempt was stopped a moment ago: at once, while the
    /// database answers; else for an answer to a question about it.
    pub(super) async fn seen(self: &Arc<Self>, job: &ClaimedJob, work: &StepWork) {
        if !self.is_blind() {
            return;
        }
        let _asked_about = self.watch(job, work);
        self.looked_after(Instant::now()).await;
    }

    fn is_blind(&self) -> bool {
        self.looked.borrow().elapsed() >= BLIND
    }

    async fn looked_after(&self, moment: Instant) {
        // It cannot be closed while we are.
        let _ = self.looked.subscribe().wait_for(|looked| *looked > moment).await;
    }

    /// Whether an attempt is not to begin, as far as this worker has heard.
    pub(super) fn forbid(&self, job: &ClaimedJob, work: &StepWork) -> bool {
        if !self.any.load(Relaxed) {
            return false;
        }
        let watched = self.lock();
        subjects(job, work).iter().any(|subject| watched.killed.contains(subject))
    }

    /// Watches over an attempt that is under way.
    pub(super) fn watch(self: &Arc<Self>, job: &ClaimedJob, work: &StepWork) -> Watch {
        let token = CancellationToken::new();
        let subjects = subjects(job, work);
        let now = Instant::now();
        let mut watched = self.lock();
        watched.recent.extend(subjects.iter().map(|subject| (*subject, now)));
        watched.attempts.insert(job.lease, (subjects, token.clone()));
        Watch { kills: Arc::clone(self), lease: job.lease, token }
    }

    /// Whom to ask about.
    fn watched(&self) -> Vec<Subject> {
        let mut watched = self.lock();
        let now = Instant::now();
        let current: Vec<Subject> =
            watched.attempts.values().flat_map(|(subjects, _)| subjects.iter().copied()).collect();
        watched.recent.extend(current.into_iter().map(|subject| (subject, now)));
        watched.recent.retain(|_, seen| now.duration_since(*seen) < RECENT);
        watched.recent.keys().copied().collect()
    }

    /// Stops what is to be stopped, as was asked at a moment.
    fn stop(&self, killed: HashSet<Subject>, asked: Instant) {
        let mut watched = self.lock();
        self.any.store(!killed.is_empty(), Relaxed);
        for (subjects, token) in watched.attempts.values() {
            if subjects.iter().any(|subject| killed.contains(subject)) {
                token.cancel();
            }
        }
        watched.killed = killed;
        drop(watched);
        self.looked.send_replace(asked);
    }
}

/// Looks, as long as the worker runs.
pub(super) async fn run(shared: Arc<Shared>, over: CancellationToken) {
    loop {
        tokio::select! {
            () = over.cancelled() => return,
            () = tokio::time::sleep(LOOK) => {}
        }
        let (asked, watched) = (Instant::now(), shared.kills.watched());
        if watched.is_empty() {
            // Whoever claims for them next looks for itself.
            shared.kills.stop(HashSet::new(), asked);
            continue;
        }
        match shared.watchdog.answer("a look at who was stopped", kills::killed(&shared.engine.pool, &watched)).await {
            Ok(killed) => shared.kills.stop(killed.into_iter().collect(), asked),
            Err(error) => tracing::debug!(%error, "who was stopped is not known"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn nothing_begins_while_nobody_knows_who_was_stopped() {
        let kills = Kills::default();
        assert!(!kills.is_blind());
        kills.looked.send_replace(Instant::now().checked_sub(BLIND).expect("a time before"));
        assert!(kills.is_blind());
        // A look that was asked for before says nothing about who came after it.
        let (before, now) = (Instant::now(), Instant::now());
        kills.stop(HashSet::new(), before);
        let waits = tokio::time::timeout(Duration::from_millis(50), kills.looked_after(now));
        assert!(waits.await.is_err(), "it begins, blind");
        tokio::join!(kills.looked_after(now), async {
            tokio::task::yield_now().await;
            kills.stop(HashSet::new(), Instant::now());
        });
        assert!(!kills.is_blind());
    }
}
