//! Rate and claim latency while a million other jobs are ready, or lie in the
//! future.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use capx_core::engine::claim::{self, ClaimCursor};
use capx_core::store::jobs::{self, Turn, queue};
use capx_core::store::sessions::{self, NewSession};
use capx_core::store::{self, PoolKind};

use super::latency::percentile;
use super::report::{Report, Target};
use super::{Bench, Running};

const FUTURE: Duration = Duration::from_secs(24 * 3600);

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let count = bench.amount(200_000);
    let others = bench.amount(1_000_000);
    let bar = report.progress("backlog", 3);
    // Without, with, with, without: a machine drifts.
    let before = rate(bench, count, 0, Duration::ZERO).await?;
    let first = rate(bench, count, others, Duration::ZERO).await?;
    let second = rate(bench, count, others, Duration::ZERO).await?;
    bar.inc(1);
    let ready_claims = claims(bench).await?;
    let after = rate(bench, count, 0, Duration::ZERO).await?;
    let (alone, ready) = (0.5 * (before + after), 0.5 * (first + second));
    bar.inc(1);
    let future = rate(bench, count, others, FUTURE).await?;
    let future_claims = claims_after_refill(bench, others).await?;
    bar.finish_and_clear();
    report.add("backlog", "jobs/s without others", alone, "jobs/s");
    report.add("backlog", "jobs/s with 1,000,000 ready", ready, "jobs/s").limit(alone);
    report.add("backlog", "share of the rate without", ready / alone, "").target(Target::AtLeast(0.95));
    report.add("backlog", "jobs/s with 1,000,000 future", future, "jobs/s").limit(alone);
    let most = Target::AtMost(5.0);
    report.add("backlog", "claim of 32 among ready, p99", ready_claims.p99, "ms").target(most);
    report.add("backlog", "of them a full look, p99", ready_claims.full_look_p99, "ms");
    report.add("backlog", "claim of 32 among future, p99", future_claims.p99, "ms").target(most);
    Ok(())
}

/// The rate over the first `count` jobs while `others` stay behind them.
async fn rate(bench: &Bench, count: usize, others: usize, delay: Duration) -> anyhow::Result<f64> {
    bench.reset().await?;
    let first = if delay.is_zero() { others } else { 0 };
    if !delay.is_zero() {
        bench.enqueue_noops(others, delay).await?;
    }
    bench.enqueue_noops(count + first, Duration::ZERO).await?;
    sqlx::raw_sql("vacuum analyze jobs").execute(&bench.pool).await?;
    let worker = bench.worker(&[queue::BENCH], bench.slots).await?;
    let counters = worker.counters();
    let began = Instant::now();
    let running = Running::start(worker);
    while counters.committed.load(Relaxed) < count as u64 {
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
    let rate = counters.committed.load(Relaxed) as f64 / began.elapsed().as_secs_f64();
    running.stop().await;
    Ok(rate)
}

/// In milliseconds.
struct Claims {
    /// Of all claims, as a worker makes them.
    p99: f64,
    /// Of those that begin at the head of the queue, past what is dead.
    full_look_p99: f64,
}

/// Claims of 32 with whatever is in the table.
async fn claims(bench: &Bench) -> anyhow::Result<Claims> {
    let queues = vec![queue::BENCH.to_owned()];
    let session = sessions::open(
        &bench.pool,
        &NewSession { worker: "bench", version: "0", queues: &queues, slots: 32, lease: Duration::from_secs(3600) },
    )
    .await?;
    let engine = bench.engine.clone().with_claims(store::pool(&bench.url, PoolKind::Claims, 1)?);
    let mut cursor = ClaimCursor::new(&queues);
    let (mut took, mut looks) = (Vec::new(), Vec::new());
    for _ in 0..1_000 {
        let began = Instant::now();
        let claimed = claim::claim(&engine, session, &mut cursor, 32).await?;
        took.push(began.elapsed());
        anyhow::ensure!(!claimed.is_empty(), "nothing left to claim");
    }
    for _ in 0..200 {
        let began = Instant::now();
        let claimed = jobs::claim(&engine.claims, session, &[Turn::first(queue::BENCH)], 32).await?;
        looks.push(began.elapsed());
        anyhow::ensure!(!claimed.jobs.is_empty(), "nothing left to claim");
    }
    Ok(Claims { p99: percentile(&mut took, 0.99), full_look_p99: percentile(&mut looks, 0.99) })
}

async fn claims_after_refill(bench: &Bench, others: usize) -> anyhow::Result<Claims> {
    bench.reset().await?;
    bench.enqueue_noops(others, FUTURE).await?;
    bench.enqueue_noops(40_000, Duration::ZERO).await?;
    claims(bench).await
}
