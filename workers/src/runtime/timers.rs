//! What every worker does for all: looks at an idle queue, makes due timers
//! ready, declares silent sessions dead and takes back what they held.

use std::sync::atomic::Ordering::Relaxed;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use capx_core::engine::{sweep, upkeep};
use capx_core::failpoint;
use capx_core::store::{fleet, jobs};
use futures_util::FutureExt;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use super::{Shared, WorkerConfig, pause, vital};

/// Sweeps of a lease, besides those that a look calls for when it finds a
/// silent worker.
const SWEEPS_A_LEASE: u32 = 2;
/// A job whose worker died waits this part of a lease before its first
/// retake, doubling with each death.
const RETAKE_PART: u32 = 60;

/// Starts the look and the sweep.
pub(super) fn spawn(tasks: &TaskTracker, shared: &Arc<Shared>, over: CancellationToken) {
    tasks.spawn(vital(shared, "look", look(Arc::clone(shared), over.clone())));
    tasks.spawn(vital(shared, "sweep", sweeps(Arc::clone(shared), over.clone())));
    tasks.spawn(vital(shared, "upkeep", upkeeps(Arc::clone(shared), over)));
}

/// One cheap statement a poll interval, sooner when a timer is due sooner.
async fn look(shared: Arc<Shared>, over: CancellationToken) {
    let mut failures = 0;
    loop {
        let mut wait = jittered(shared.config.poll);
        match shared.watchdog.answer("a look", step(&shared)).await {
            Ok(next_due) => {
                failures = 0;
                wait = wait.min(next_due.unwrap_or(wait));
            }
            Err(error) => {
                failures += 1;
                *shared.out_of_reach.lock().unwrap_or_else(PoisonError::into_inner) = Some(Instant::now());
                tracing::debug!(%error, failures, "a look failed");
                if !pause(failures, &over).await {
                    return;
                }
            }
        }
        tokio::select! {
            () = over.cancelled() => return,
            () = shared.timer.notified() => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

async fn step(shared: &Shared) -> Result<Option<Duration>, capx_core::store::StoreError> {
    let outlook = jobs::look(&shared.engine.pool, &shared.config.queues).await?;
    shared.tells.store(outlook.tells, Relaxed);
    if outlook.redrives {
        shared.redrives.notify_one();
    }
    flush(shared).await;
    if outlook.silence {
        shared.silence.notify_one();
    }
    let mut ready = outlook.ready;
    let mut next_due = outlook.next_due_s;
    if next_due.is_some_and(|s| s <= 0.0) {
        failpoint::reach("promote.before").await;
        let promoted = jobs::promote(&shared.engine.pool).await?;
        failpoint::reach("promote.after").await;
        ready |= promoted > 0;
        // More may be due than one statement takes.
        next_due = (promoted == jobs::PROMOTE_MAX as u64).then_some(0.0);
    }
    if ready {
        shared.nudge.notify_one();
    }
    Ok(next_due.map(|s| Duration::from_secs_f64(s.clamp(0.0, 3_600.0))))
}

/// What is done for all from time to time: apart from the sweeps, which must not wait for it.
async fn upkeeps(shared: Arc<Shared>, over: CancellationToken) {
    let mut next = tokio::time::Instant::now() + jittered(shared.config.lease);
    loop {
        let (name, round) = tokio::select! {
            () = over.cancelled() => return,
            // However often the other one comes.
            () = tokio::time::sleep_until(next) => {
                next = tokio::time::Instant::now() + jittered(shared.config.lease);
                ("an upkeep", upkeep::round(&shared.engine).boxed())
            }
            () = shared.redrives.notified() => ("a redrive", upkeep::soon(&shared.engine).boxed()),
        };
        match shared.watchdog.answer(name, round).await {
            Ok(failed) => metrics::counter!("capx_upkeep_failures_total").increment(failed as u64),
            Err(error) => tracing::warn!(%error, "the upkeep waits"),
        }
    }
}

/// Adds what this worker has done to the counts of queues, now and then.
async fn flush(shared: &Shared) {
    let counts = shared.done.take();
    if !counts.is_empty()
        && let Err(error) = fleet::count(&shared.engine.pool, &counts).await
    {
        tracing::debug!(%error, "what was done was not counted");
    }
}

async fn sweeps(shared: Arc<Shared>, over: CancellationToken) {
    let lease = shared.config.lease;
    loop {
        tokio::select! {
            () = over.cancelled() => return,
            () = shared.silence.notified() => {}
            () = tokio::time::sleep(jittered(lease / SWEEPS_A_LEASE)) => {}
        }
        let swept = sweep::sweep(&shared.engine, retake_delay(&shared.config), may_bury(&shared));
        match shared.watchdog.answer("a sweep", swept).await {
            Ok(swept) if swept.reclaimed > 0 => {
                metrics::counter!("capx_jobs_reclaimed_total").increment(swept.reclaimed as u64);
                shared.timer.notify_one();
            }
            Ok(_) => {}
            Err(error) => tracing::debug!(%error, "a sweep failed"),
        }
    }
}

/// How long a job whose worker died once waits.
pub(super) fn retake_delay(config: &WorkerConfig) -> Duration {
    config.lease / RETAKE_PART
}

/// Whoever could not reach the database a moment ago does not judge by the
/// silence of others, who could not either: after an outage everybody gets a
/// lease to be heard again.
fn may_bury(shared: &Shared) -> bool {
    let out_of_reach = *shared.out_of_reach.lock().unwrap_or_else(PoisonError::into_inner);
    out_of_reach.is_none_or(|at| at.elapsed() >= shared.config.lease)
}

/// 75 to 125 % of an interval, so that workers do not march in step.
fn jittered(interval: Duration) -> Duration {
    interval.mul_f64(rand::random_range(0.75..1.25))
}
