//! Durable no-op steps a second: runs of three steps, each with its
//! checkpoint and its events.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use capx_core::engine::start;
use capx_core::store::jobs::queue;

use super::report::{Report, Target};
use super::{Bench, Running, limit, no_params};

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let runs = bench.amount(40_000);
    let bar = report.progress("steps: bare SQL", 2);
    let one = limit::steps(bench, runs, 1).await?;
    bar.inc(1);
    let two = limit::steps(bench, runs, 2).await?;
    bar.finish_and_clear();
    let best = one.max(two);
    let (single, start_rate) = one_process(bench, report, runs).await?;
    let double = processes(bench, runs, 2).await?;
    report.add("steps", "bare SQL, 1 connection", one, "steps/s");
    report.add("steps", "bare SQL, 2 connections", two, "steps/s");
    report.add("steps", "1 worker process", single, "steps/s").limit(best).target(Target::AtLeast(20_000.0));
    report.add("steps", "1 worker process, share of limit", single / best, "").target(Target::AtLeast(0.4));
    report.add("steps", "2 worker processes", double, "steps/s").limit(best);
    report.add("steps", "runs started in bulk", start_rate, "runs/s");
    Ok(())
}

async fn one_process(bench: &Bench, report: &Report, runs: usize) -> anyhow::Result<(f64, f64)> {
    bench.reset().await?;
    let playbook = bench.three_steps().await?;
    let worker = bench.worker(&[queue::STEPS], bench.slots).await?;
    let counters = worker.counters();
    let running = Running::start(worker);
    bench.await_workers(1).await?;
    let bar = report.progress("steps: 1 worker process", runs as u64 * 3);
    let starting = Instant::now();
    start::start_many(&bench.engine, bench.company, playbook, runs, no_params())
        .await
        .map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let start_rate = runs as f64 / starting.elapsed().as_secs_f64();
    let began = Instant::now();
    loop {
        let done = counters.committed.load(Relaxed);
        if done >= runs as u64 * 3 {
            break;
        }
        bar.set_position(done);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let rate = runs as f64 * 3.0 / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    running.stop().await;
    let completed: i64 =
        sqlx::query_scalar("select count(*) from runs where status = 'completed'").fetch_one(&bench.pool).await?;
    let checkpoints: i64 =
        sqlx::query_scalar("select count(*) from run_steps where status = 'completed'").fetch_one(&bench.pool).await?;
    let events: i64 = sqlx::query_scalar("select count(*) from events").fetch_one(&bench.pool).await?;
    let n = runs as i64;
    anyhow::ensure!(
        (completed, checkpoints, events) == (n, n * 3, n * 5),
        "not every run has its rows: {completed} {checkpoints} {events}"
    );
    Ok((rate, start_rate))
}

async fn processes(bench: &Bench, runs: usize, processes: usize) -> anyhow::Result<f64> {
    bench.reset().await?;
    let playbook = bench.three_steps().await?;
    let mut children = Vec::new();
    for _ in 0..processes {
        children.push(bench.worker_process(queue::STEPS)?);
    }
    bench.await_workers(processes as i64).await?;
    start::start_many(&bench.engine, bench.company, playbook, runs, no_params())
        .await
        .map_err(|e| anyhow::anyhow!("{e:?}"))?;
    let began = Instant::now();
    bench.until_drained().await?;
    Ok(runs as f64 * 3.0 / began.elapsed().as_secs_f64())
}
