//! The one task of a worker that takes jobs: as many as there are free slots,
//! in batches, fair between companies.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use capx_core::engine::claim;
use tokio::sync::{OwnedSemaphorePermit, mpsc};
use uuid::Uuid;

use super::{Assignment, Shared, pause};

/// The most jobs of one claim.
const CLAIM_MAX: usize = 512;
/// While there is a backlog, a claim waits this long for slots to come free,
/// since a claim of five costs nearly as much as one of five hundred.
const GATHER: Duration = Duration::from_millis(2);

/// Claims until the worker stops.
pub(super) async fn run(shared: Arc<Shared>, assign: mpsc::UnboundedSender<Assignment>) {
    let mut after = Uuid::nil();
    let mut backlog = false;
    let mut failures = 0;
    loop {
        let Some(mut permits) = take_slots(&shared, backlog).await else { return };
        let room = permits.num_permits();
        let began = Instant::now();
        let claimed = claim::claim(
            &shared.engine,
            shared.session,
            &shared.config.queues,
            after,
            i64::try_from(room).unwrap_or(i64::MAX),
        )
        .await;
        let jobs = match claimed {
            Ok(jobs) => jobs,
            Err(error) => {
                drop(permits);
                failures += 1;
                tracing::warn!(%error, failures, "a claim failed");
                if !pause(failures, &shared.stopping).await {
                    return;
                }
                continue;
            }
        };
        failures = 0;
        observe(&shared, jobs.len(), began.elapsed());
        // Only a full claim says that there is more. The next one begins
        // after the last company served; a short one has seen all of them
        // that come after the cursor.
        let wrapped = after.is_nil();
        backlog = jobs.len() == room;
        after = match jobs.iter().map(|job| job.company.0).max() {
            Some(last) if backlog || jobs.len() * 2 > room => last,
            _ => Uuid::nil(),
        };
        if jobs.is_empty() {
            drop(permits);
            if wrapped && !idle(&shared).await {
                return;
            }
            continue;
        }
        for assignment in load(&shared, jobs, &mut permits).await {
            if assign.send(assignment).is_err() {
                return;
            }
        }
    }
}

/// Waits for free slots and takes them; `None` when the worker stops.
async fn take_slots(shared: &Shared, backlog: bool) -> Option<OwnedSemaphorePermit> {
    let first = tokio::select! {
        biased;
        () = shared.stopping.cancelled() => return None,
        permit = Arc::clone(&shared.slots).acquire_owned() => permit.ok()?,
    };
    let wanted = CLAIM_MAX.min(shared.config.slots.div_ceil(2));
    if backlog && shared.slots.available_permits() + 1 < wanted {
        tokio::time::sleep(GATHER).await;
    }
    let mut permits = first;
    let more = shared.slots.available_permits().min(CLAIM_MAX - 1);
    if more > 0
        && let Ok(rest) = Arc::clone(&shared.slots).try_acquire_many_owned(u32::try_from(more).unwrap_or(0))
    {
        permits.merge(rest);
    }
    Some(permits)
}

/// Nothing to do: until a hint or the timers say otherwise.
async fn idle(shared: &Shared) -> bool {
    tokio::select! {
        () = shared.stopping.cancelled() => false,
        () = shared.nudge.notified() => true,
    }
}

/// What the jobs need, loaded for all at once; retried until it is there, as
/// the jobs are ours now.
async fn load(
    shared: &Shared,
    jobs: Vec<capx_core::store::jobs::ClaimedJob>,
    permits: &mut OwnedSemaphorePermit,
) -> Vec<Assignment> {
    let mut failures = 0;
    let loaded = loop {
        match claim::load(&shared.engine, jobs.clone()).await {
            Ok(loaded) => break loaded,
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, failures, "claimed jobs could not be loaded");
                if !pause(failures, &shared.lost).await {
                    // Our session is dead; others take the jobs over.
                    return Vec::new();
                }
            }
        }
    };
    loaded
        .into_iter()
        .filter_map(|claimed| Some(Assignment { claimed, permit: permits.split(1)? }))
        .collect()
}

fn observe(shared: &Shared, claimed: usize, took: Duration) {
    shared.counters.claims.fetch_add(1, Relaxed);
    shared.counters.claim_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(0), Relaxed);
    shared.counters.claimed.fetch_add(claimed as u64, Relaxed);
    metrics::counter!("capx_jobs_claimed_total").increment(claimed as u64);
    metrics::histogram!("capx_claim_seconds").record(took.as_secs_f64());
}
