//! A million runs that sleep for a year: what they take up, and what they cost those
//! that work.

use std::time::{Duration, Instant};

use capx_core::engine::start;
use capx_core::store::jobs::queue;

use super::latency::{self, percentile};
use super::report::{Report, Target};
use super::{Bench, Running, no_params};

const YEAR: &str = "name: year
steps:
  - {sleep: 365d}
  - {action: transform}
";
/// Started in one transaction.
const BATCH: usize = 10_000;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let (runs, samples) = (bench.amount(1_000_000), bench.amount(2_000));
    bench.reset().await?;
    let playbook = bench.playbook(YEAR).await?;
    let working = bench.steps(3).await?;
    let before = size(bench).await?;
    let mut without = latency::samples(bench, report, samples).await?;
    let alone = rate(bench, working).await?;
    bench.reset().await?;
    let bar = report.progress("sleeping", runs as u64);
    let began = Instant::now();
    for _ in 0..runs / BATCH {
        let started = start::start_many(&bench.engine, bench.company, playbook, BATCH, no_params()).await;
        started.map_err(|e| anyhow::anyhow!("{e:?}"))?;
        bar.inc(BATCH as u64);
    }
    let starts = runs as f64 / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    sqlx::raw_sql("vacuum analyze").execute(&bench.pool).await?;
    sqlx::raw_sql("checkpoint").execute(&bench.pool).await?;
    let took = size(bench).await? - before;
    let mut with = latency::samples(bench, report, samples).await?;
    let beside = rate(bench, working).await?;
    let (asleep, held): (i64, i64) = sqlx::query_as(
        "select count(*) filter (where state = 'scheduled'), count(*) filter (where state = 'running') from jobs",
    )
    .fetch_one(&bench.pool)
    .await?;
    anyhow::ensure!(asleep == runs as i64, "{asleep} of {runs} runs sleep");
    let (p50, p99) = (percentile(&mut with, 0.5), percentile(&mut with, 0.99));
    let (p50_before, p99_before) = (percentile(&mut without, 0.5), percentile(&mut without, 0.99));
    let gib = took / 1024.0 / 1024.0 / 1024.0;
    // Of a quick look, what a million would take.
    let gib = gib * 1e6 / runs as f64;
    report.add("sleeping", "runs that fall asleep", starts, "runs/s");
    report.add("sleeping", "slots that a million hold", held as f64, "").target(Target::AtMost(0.0));
    report.add("sleeping", "what a million take up", gib, "GiB").target(Target::AtMost(1.0));
    report.add("sleeping", "enqueue to handler without, p50", p50_before, "ms");
    report.add("sleeping", "enqueue to handler beside them, p50", p50, "ms").limit(p50_before);
    report.add("sleeping", "enqueue to handler without, p99", p99_before, "ms");
    report.add("sleeping", "enqueue to handler beside them, p99", p99, "ms").limit(p99_before);
    report
        .add("sleeping", "latency beside them, share of that without", p50 / p50_before, "")
        .target(Target::AtMost(1.2));
    report.add("sleeping", "steps beside them", beside, "steps/s").limit(alone);
    report
        .add("sleeping", "steps beside them, share of those without", beside / alone, "")
        .target(Target::AtLeast(0.8));
    bench.reset().await
}

async fn size(bench: &Bench) -> anyhow::Result<f64> {
    let bytes: i64 = sqlx::query_scalar("select pg_database_size(current_database())").fetch_one(&bench.pool).await?;
    Ok(bytes as f64)
}

/// Steps a second of runs of three.
async fn rate(bench: &Bench, playbook: capx_core::domain::ids::PlaybookId) -> anyhow::Result<f64> {
    let runs = bench.amount(20_000);
    let running = Running::start(bench.worker(&[queue::STEPS], bench.slots).await?);
    bench.await_workers(1).await?;
    let began = Instant::now();
    let started = start::start_many(&bench.engine, bench.company, playbook, runs, no_params()).await;
    started.map_err(|e| anyhow::anyhow!("{e:?}"))?;
    bench
        .until(Duration::from_secs(600), "the steps to be done", || async {
            let open = "select exists (select from runs where playbook_id = $1 and ended_at is null)";
            let open: bool = sqlx::query_scalar(open).bind(playbook.0).fetch_one(&bench.pool).await?;
            Ok(!open)
        })
        .await?;
    let rate = (runs * 3) as f64 / began.elapsed().as_secs_f64();
    running.stop().await;
    Ok(rate)
}
