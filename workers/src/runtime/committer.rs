//! Outcomes, written together: whatever has come in while the last commit was
//! under way goes into the next one. Two lanes, so that the database and the
//! handlers do not wait for each other.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use capx_core::domain::delivery::Answer;
use capx_core::domain::outcome::Outcome;
use capx_core::domain::storable;
use capx_core::engine::advance::{self, Finished, Pending};
use capx_core::engine::deliveries::{self, Sent};
use capx_core::failpoint;
use capx_core::store::beats::{self, Idle};
use capx_core::store::jobs::{self, ClaimedJob, Settle};
use tokio::sync::{Mutex, mpsc};
use tokio_util::task::TaskTracker;

use super::load::Held;
use super::{Assignment, Shared, after_commit, pause, vital};

/// The most outcomes of one commit.
const COMMIT_MAX: usize = 1_024;
/// The most output of one commit, in bytes of JSON; it is there three times
/// while it is on its way.
const COMMIT_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Commits under way at once.
const LANES: usize = 2;

/// An attempt that is over.
pub(super) enum Attempted {
    /// At a step.
    Step(Finished, Held),
    /// At a delivery.
    Delivery(Sent, Held),
    /// Of another kind: done, or to be tried again.
    Plain(ClaimedJob, PlainOutcome, Held),
}

/// How a job that is not a step ended.
#[derive(Debug)]
pub(super) enum PlainOutcome {
    /// The row goes.
    Done,
    /// Again after this long.
    Again {
        /// The delay.
        delay: Duration,
        /// Whether the try counts.
        charged: bool,
    },
    /// An agent has beaten, and had nothing to do.
    Idle(Box<Idle>),
    /// Its own transaction has settled the job.
    Nothing,
}

/// Starts the lanes; they end when no attempt can come in any more.
pub(super) fn spawn(
    tasks: &TaskTracker,
    shared: &Arc<Shared>,
    finished: mpsc::UnboundedReceiver<Attempted>,
    assign: mpsc::UnboundedSender<Assignment>,
) {
    let finished = Arc::new(Mutex::new(finished));
    for _ in 0..LANES {
        tasks.spawn(vital(shared, "commit lane", lane(Arc::clone(shared), Arc::clone(&finished), assign.clone())));
    }
}

async fn lane(
    shared: Arc<Shared>,
    finished: Arc<Mutex<mpsc::UnboundedReceiver<Attempted>>>,
    assign: mpsc::UnboundedSender<Assignment>,
) {
    let mut batch = Vec::with_capacity(COMMIT_MAX);
    while gather(&mut *finished.lock().await, &mut batch).await {
        let mut steps = Vec::new();
        let mut helds = Vec::new();
        let mut plain = Vec::new();
        let (mut sent, mut sent_helds) = (Vec::new(), Vec::new());
        for attempted in batch.drain(..) {
            match attempted {
                Attempted::Step(finished, held) => {
                    steps.push(finished);
                    helds.push(held);
                }
                Attempted::Delivery(one, held) => {
                    sent.push(one);
                    sent_helds.push(held);
                }
                Attempted::Plain(job, outcome, held) => plain.push((job, outcome, held)),
            }
        }
        if !sent.is_empty() {
            deliver(&shared, &sent).await;
        }
        drop(sent_helds);
        let idle: Vec<Idle> = plain
            .iter()
            .filter_map(|(_, outcome, _)| match outcome {
                PlainOutcome::Idle(idle) => Some(idle.as_ref().clone()),
                _ => None,
            })
            .collect();
        if !idle.is_empty() {
            beat(&shared, &idle).await;
        }
        if !plain.is_empty() {
            settle(&shared, plain).await;
        }
        if !steps.is_empty() {
            commit(&shared, steps, helds, &assign).await;
        }
    }
}

/// Takes what has come in, as much as one commit should carry; false when
/// nothing can come any more.
async fn gather(finished: &mut mpsc::UnboundedReceiver<Attempted>, batch: &mut Vec<Attempted>) -> bool {
    let mut bytes = 0;
    let mut next = finished.recv().await;
    while let Some(attempted) = next {
        bytes += attempted.size();
        batch.push(attempted);
        if batch.len() >= COMMIT_MAX || bytes >= COMMIT_BYTES_MAX {
            break;
        }
        next = finished.try_recv().ok();
    }
    !batch.is_empty()
}

impl Attempted {
    /// About how many bytes of output it brings.
    fn size(&self) -> usize {
        match self {
            Self::Step(Finished { outcome: Outcome::Done { output, .. }, .. }, _) => storable::size_of(output),
            _ => 0,
        }
    }
}

async fn commit(
    shared: &Arc<Shared>,
    finished: Vec<Finished>,
    helds: Vec<Held>,
    assign: &mpsc::UnboundedSender<Assignment>,
) {
    let began = Instant::now();
    let stay = !shared.stopping.is_cancelled();
    for finished in &finished {
        match finished.outcome {
            Outcome::Done { .. } => shared.done.add(&finished.job.queue, false),
            Outcome::Failed { .. } => shared.done.add(&finished.job.queue, true),
            _ => {}
        }
    }
    let mut result = shared.watchdog.answer("a commit", advance::commit(&shared.engine, finished, stay)).await;
    let mut failures = 0;
    let committed = loop {
        match result {
            Ok(committed) => break committed,
            Err((error, pending)) => {
                failures += 1;
                tracing::warn!(%error, failures, ?pending, "outcomes wait for the database");
                let pending: Pending = pending;
                if !pause(failures, &shared.lost).await {
                    // The session is dead and so are the leases: others run
                    // the steps again, with the same keys.
                    return;
                }
                result = shared.watchdog.answer("a commit", advance::commit_again(&shared.engine, pending)).await;
            }
        }
    };
    if shared.tells.load(Relaxed) {
        shared.nudge.notify_one();
    }
    metrics::histogram!("capx_commit_seconds").record(began.elapsed().as_secs_f64());
    metrics::counter!("capx_steps_committed_total").increment(committed.len() as u64);
    for (committed, held) in committed.into_iter().zip(helds) {
        after_commit(shared, committed, held, assign);
    }
}

/// Writes what came of deliveries.
async fn deliver(shared: &Shared, sent: &[Sent]) {
    let mut failures = 0;
    loop {
        match shared.watchdog.answer("deliveries", deliveries::commit(&shared.engine, sent)).await {
            Ok(held) => {
                shared.counters.committed.fetch_add(held.len() as u64, Relaxed);
                if failures == 0 {
                    shared.counters.lost.fetch_add((sent.len() - held.len()) as u64, Relaxed);
                }
                observe(sent);
                sent.iter().for_each(|sent| shared.done.add(&sent.job.queue, sent.error.is_some()));
                // Their webhooks have room again, and one that failed is due at a time of its own.
                shared.nudge.notify_one();
                shared.timer.notify_one();
                return;
            }
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, failures, deliveries = sent.len(), "deliveries wait for the database");
                if !pause(failures, &shared.lost).await {
                    return;
                }
            }
        }
    }
}

fn observe(sent: &[Sent]) {
    for sent in sent {
        let result = match sent.answer {
            Answer::Status(200..=299, _) => "succeeded",
            Answer::Status(..) => "refused",
            Answer::None => "unanswered",
            Answer::Refused => "forbidden",
        };
        metrics::counter!("capx_deliveries_total", "result" => result).increment(1);
        metrics::histogram!("capx_delivery_seconds").record(sent.took.as_secs_f64());
    }
}

/// Writes beats in which there was nothing to do.
async fn beat(shared: &Shared, idle: &[Idle]) {
    let mut failures = 0;
    loop {
        match shared.watchdog.answer("beats", beats::idle(&shared.engine.pool, idle)).await {
            Ok(beaten) => {
                beaten.iter().for_each(|_| shared.done.add(capx_core::store::jobs::queue::SYSTEM, false));
                metrics::counter!("capx_idle_beats_total").increment(beaten.len() as u64);
                shared.timer.notify_one();
                return;
            }
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, failures, beats = idle.len(), "beats wait for the database");
                if !pause(failures, &shared.lost).await {
                    return;
                }
            }
        }
    }
}

async fn settle(shared: &Shared, plain: Vec<(ClaimedJob, PlainOutcome, Held)>) {
    let items: Vec<Settle> = plain
        .iter()
        .filter_map(|(job, outcome, _)| {
            let (again_after, charged) = match outcome {
                PlainOutcome::Done => (None, true),
                PlainOutcome::Again { delay, charged } => (Some(*delay), *charged),
                PlainOutcome::Idle(_) | PlainOutcome::Nothing => return None,
            };
            Some(Settle { lease: job.lease, again_after, charged })
        })
        .collect();
    if items.is_empty() {
        return;
    }
    failpoint::reach("settle.before").await;
    let mut failures = 0;
    loop {
        match shared.watchdog.answer("a settlement", jobs::settle(&shared.engine.pool, &items)).await {
            Ok(settled) => {
                failpoint::reach("settle.after").await;
                for (job, outcome, _) in &plain {
                    match outcome {
                        PlainOutcome::Done => shared.done.add(&job.queue, false),
                        PlainOutcome::Again { charged: true, .. } => shared.done.add(&job.queue, true),
                        _ => {}
                    }
                }
                shared.counters.committed.fetch_add(settled.len() as u64, Relaxed);
                // What an earlier, unanswered try settled is not lost.
                if failures == 0 {
                    let lost = items.len().saturating_sub(settled.len());
                    shared.counters.lost.fetch_add(lost as u64, Relaxed);
                }
                metrics::counter!("capx_jobs_settled_total").increment(settled.len() as u64);
                if items.iter().any(|item| item.again_after.is_some()) {
                    shared.timer.notify_one();
                }
                return;
            }
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, failures, jobs = items.len(), "jobs wait to be settled");
                if !pause(failures, &shared.lost).await {
                    return;
                }
            }
        }
    }
}
