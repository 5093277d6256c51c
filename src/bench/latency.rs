//! From the enqueue call to the handler's start on an idle worker.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use capx_core::engine::enqueue::Enqueuer;
use capx_core::store::jobs::{Enqueued, NewJob, kind, queue};
use tokio::sync::mpsc;

use super::report::{Report, Target};
use super::{Bench, Running, limit};

/// After each sample everything is idle again: the next is not carried by the
/// momentum of the last.
pub(super) const IDLE_AGAIN: Duration = Duration::from_millis(4);
/// Jobs that are done while nobody may vacuum: hazard H5's 300 a second for ten minutes, and as many again.
const DEAD: usize = 360_000;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let samples = bench.amount(2_000);
    let bare = percentile(&mut limit::latency(bench, samples).await?, 0.5);
    bench.reset().await?;
    let (mut took, mut enqueue_took) = both(bench, report, samples).await?;
    let (p50, p95, p99) = (percentile(&mut took, 0.5), percentile(&mut took, 0.95), percentile(&mut took, 0.99));
    report.add("latency", "bare SQL: insert, hint and claim, p50", bare, "ms");
    report.add("latency", "enqueue to handler, p50", p50, "ms").limit(bare).target(Target::AtMost(1.5));
    report.add("latency", "enqueue to handler, p95", p95, "ms");
    report.add("latency", "enqueue to handler, p99", p99, "ms").target(Target::AtMost(4.0));
    report.add("latency", "of it the enqueue itself, p50", percentile(&mut enqueue_took, 0.5), "ms");
    held(bench, report, samples / 4).await
}

/// The same while somebody's old transaction keeps the jobs that were done since from being vacuumed.
async fn held(bench: &Bench, report: &mut Report, samples: usize) -> anyhow::Result<()> {
    bench.reset().await?;
    let mut old = bench.pool.begin().await?;
    sqlx::raw_sql("set transaction isolation level repeatable read; select count(*) from jobs")
        .execute(&mut *old)
        .await?;
    let done = bench.amount(DEAD);
    bench.enqueue_noops(done, Duration::ZERO).await?;
    let worker = bench.worker(&[queue::BENCH], bench.slots).await?;
    let counters = worker.counters();
    let running = Running::start(worker);
    while counters.committed.load(Relaxed) < done as u64 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    running.stop().await;
    let mut took = self::samples(bench, report, samples).await?;
    old.rollback().await?;
    report.add("latency", "dead jobs that nobody may vacuum", done as f64, "jobs");
    for (figure, share) in [("beside them, p50", 0.5), ("beside them, p90", 0.9), ("beside them, p99", 0.99)] {
        report.add("latency", figure, percentile(&mut took, share), "ms");
    }
    bench.reset().await
}

/// From enqueue to the handler's start, one after the other, beside whatever is there.
pub(super) async fn samples(bench: &Bench, report: &Report, samples: usize) -> anyhow::Result<Vec<Duration>> {
    both(bench, report, samples).await.map(|(took, _)| took)
}

/// The same, and what the enqueue took of it.
async fn both(bench: &Bench, report: &Report, samples: usize) -> anyhow::Result<(Vec<Duration>, Vec<Duration>)> {
    let (observer, mut starts) = mpsc::unbounded_channel();
    let worker = bench.worker(&[queue::BENCH], bench.slots).await?.observed_by(observer);
    let running = Running::start(worker);
    bench.await_workers(1).await?;
    let bar = report.progress("latency", samples as u64);
    let enqueuer = Enqueuer::start(bench.engine.pool.clone(), bench.engine.waker.clone());
    let job = NewJob::new(queue::BENCH, kind::NOOP, bench.company);
    let mut took = Vec::with_capacity(samples);
    let mut enqueue_took = Vec::with_capacity(samples);
    for _ in 0..samples {
        let began = Instant::now();
        let Enqueued::New(id) = enqueuer.enqueue(job.clone()).await? else { continue };
        enqueue_took.push(began.elapsed());
        while let Some((started, at)) = starts.recv().await {
            if started == id {
                took.push(at.saturating_duration_since(began));
                break;
            }
        }
        bar.inc(1);
        tokio::time::sleep(IDLE_AGAIN).await;
    }
    bar.finish_and_clear();
    running.stop().await;
    Ok((took, enqueue_took))
}

/// A percentile in milliseconds.
pub(super) fn percentile(samples: &mut [Duration], share: f64) -> f64 {
    samples.sort_unstable();
    let at = ((samples.len() as f64 * share) as usize).min(samples.len().saturating_sub(1));
    samples.get(at).map_or(f64::NAN, |d| d.as_secs_f64() * 1e3)
}
