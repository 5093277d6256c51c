//! The one task of a worker that takes jobs: as many as there are free slots,
//! in batches, fair between companies.

use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use capx_core::engine::claim::{self, ClaimCursor, Claimed};
use capx_core::store::jobs::{self, ClaimedJob};
use tokio::sync::mpsc;

use super::load::{Ahead, Held};
use super::{Assignment, Shared, pause};

/// The most jobs of one claim.
const CLAIM_MAX: usize = 1_024;
/// While there is a backlog, a claim waits up to this long for room, since a
/// claim of five costs nearly as much as one of five hundred.
const GATHER: Duration = Duration::from_millis(3);
/// How often what the session holds is compared with what is in hand: a claim
/// that was given up may take effect late, and nobody would know of its jobs.
const COMPARE: Duration = Duration::from_secs(10);

/// Claims until the worker stops.
pub(super) async fn run(shared: Arc<Shared>, assign: mpsc::UnboundedSender<Assignment>) {
    let mut cursor = ClaimCursor::new(&shared.config.queues);
    let mut ahead = Ahead::new();
    let mut failures = 0;
    // When what we hold was last compared; none after a claim that may have
    // committed without its answer.
    let mut compared = Some(Instant::now());
    // Nothing was found from the first flow on, as far as the claims have come.
    let mut empty_lap = false;
    while let Some(room) = room(&shared, &mut ahead, cursor.has_more(), &mut compared).await {
        if compared.is_none_or(|at| at.elapsed() >= COMPARE) {
            compared = give_back_unknown(&shared).await;
        }
        let began = Instant::now();
        let (from_first, went_on) = (cursor.is_full_look(), !cursor.is_look());
        let claimed = claim::claim(&shared.engine, shared.session, &mut cursor, room);
        let taken = match shared.watchdog.answer("a claim", claimed).await {
            Ok(jobs) => jobs,
            Err(error) => {
                failures += 1;
                tracing::warn!(%error, failures, "a claim failed");
                compared = None;
                if !pause(failures, &shared.stopping).await {
                    return;
                }
                continue;
            }
        };
        failures = 0;
        observe(&shared, taken.len(), began.elapsed());
        if taken.is_empty() {
            if let Some(until) = cursor.rests_until()
                && went_on
            {
                // Looks are slow: whoever is new waits for the next. There is no need of one where
                // the last found nothing, until somebody says so.
                let late = (!empty_lap).then_some(until);
                empty_lap = false;
                if !idle(&shared, &mut compared, late).await {
                    return;
                }
                continue;
            }
            // A look that came upon flows without room only may have ended before the last one.
            empty_lap |= from_first;
            if empty_lap && cursor.is_full_look() {
                empty_lap = false;
                if !idle(&shared, &mut compared, None).await {
                    return;
                }
            }
            continue;
        }
        empty_lap = false;
        let (jobs, held): (Vec<ClaimedJob>, Vec<Held>) =
            taken.into_iter().filter_map(|job| shared.load.hold(job.lease).map(|held| (job, held))).unzip();
        for (claimed, held) in load(&shared, jobs).await.into_iter().zip(held) {
            if assign.send(Assignment { claimed, held }).is_err() {
                return;
            }
        }
    }
}

/// Waits for room; `None` when the worker stops.
async fn room(shared: &Shared, ahead: &mut Ahead, backlog: bool, compared: &mut Option<Instant>) -> Option<usize> {
    let began = Instant::now();
    loop {
        if shared.stopping.is_cancelled() {
            return None;
        }
        let ahead = ahead.jobs(&shared.load);
        let room = shared.load.room(ahead).min(CLAIM_MAX);
        let wanted = CLAIM_MAX.min(shared.config.slots + ahead).div_ceil(2);
        if room >= wanted || (room > 0 && (!backlog || began.elapsed() >= GATHER)) {
            return Some(room);
        }
        if room > 0 {
            tokio::time::sleep(Duration::from_millis(1)).await;
            continue;
        }
        tokio::select! {
            () = shared.stopping.cancelled() => return None,
            () = shared.load.changed() => {}
            () = tokio::time::sleep(COMPARE) => *compared = give_back_unknown(shared).await,
        }
    }
}

/// Nothing to do: until a hint or the timers say otherwise, or until a time.
async fn idle(shared: &Shared, compared: &mut Option<Instant>, until: Option<Instant>) -> bool {
    let late = async {
        match until {
            Some(until) => tokio::time::sleep_until(until.into()).await,
            None => std::future::pending().await,
        }
    };
    tokio::pin!(late);
    loop {
        tokio::select! {
            () = shared.stopping.cancelled() => return false,
            () = shared.nudge.notified() => return true,
            () = &mut late => return true,
            () = tokio::time::sleep(COMPARE) => *compared = give_back_unknown(shared).await,
        }
    }
}

/// Gives back what the session holds and this worker does not know of. Only
/// here, where no claim is under way whose jobs are not in hand yet.
async fn give_back_unknown(shared: &Shared) -> Option<Instant> {
    let in_hand = shared.load.in_hand();
    let given_back = jobs::give_back_unknown(&shared.engine.pool, shared.session, &in_hand);
    match shared.watchdog.answer("giving back", given_back).await {
        Ok(0) => {}
        Ok(jobs) => tracing::warn!(jobs, session.id = shared.session, "gave back jobs of a claim that had no answer"),
        Err(error) => {
            tracing::debug!(%error, "what the session holds could not be compared");
            return None;
        }
    }
    Some(Instant::now())
}

/// What the jobs need, loaded for all at once; retried until it is there, as
/// the jobs are ours now.
async fn load(shared: &Shared, jobs: Vec<ClaimedJob>) -> Vec<Claimed> {
    let mut failures = 0;
    let mut waiting = jobs;
    loop {
        match shared.watchdog.answer("a load", claim::load(&shared.engine, waiting)).await {
            Ok(loaded) => return loaded,
            Err((error, jobs)) => {
                failures += 1;
                tracing::warn!(%error, failures, "claimed jobs could not be loaded");
                if !pause(failures, &shared.lost).await {
                    // Our session is dead; others take the jobs over.
                    return Vec::new();
                }
                waiting = jobs;
            }
        }
    }
}

fn observe(shared: &Shared, claimed: usize, took: Duration) {
    shared.counters.claims.fetch_add(1, Relaxed);
    shared.counters.claim_us.fetch_add(u64::try_from(took.as_micros()).unwrap_or(0), Relaxed);
    shared.counters.claimed.fetch_add(claimed as u64, Relaxed);
    metrics::counter!("capx_jobs_claimed_total").increment(claimed as u64);
    metrics::histogram!("capx_claim_seconds").record(took.as_secs_f64());
}
