//! What an idle worker costs, and how much memory a busy one takes.

use std::time::{Duration, Instant};

use anyhow::Context;
use capx_core::store::jobs::queue;

use super::Bench;
use super::jobs::memory_of;
use super::report::{Report, Target};

/// The database of this benchmark alone: the counters of the other would also
/// count the clearing up after the benchmarks before.
const DATABASE: &str = "capx_bench_idle";

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let drop = format!("drop database if exists {DATABASE} with (force)");
    sqlx::raw_sql(sqlx::AssertSqlSafe(drop.clone())).execute(&bench.pool).await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("create database {DATABASE}"))).execute(&bench.pool).await?;
    let (address, query) = bench.url.split_once('?').unwrap_or((&bench.url, ""));
    let (base, _) = address.rsplit_once('/').context("the database's address has no name")?;
    let fresh = bench.at(&format!("{base}/{DATABASE}?{query}")).await?;
    // On our own server nobody else commits: what is counted is the worker.
    fresh.autovacuum(false).await?;
    let measured = measure(&fresh, report).await;
    fresh.autovacuum(true).await?;
    fresh.engine.pool.close().await;
    fresh.pool.close().await;
    sqlx::raw_sql(sqlx::AssertSqlSafe(drop)).execute(&bench.pool).await?;
    measured
}

async fn measure(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let seconds = bench.amount(30).max(10) as u64;
    let bar = report.progress("idle", 2 * seconds);
    // What the server does by itself, and this counting; what came before is
    // counted after ten idle seconds at the latest.
    tokio::time::sleep(Duration::from_secs(12)).await;
    let without = transactions_a_second(bench, seconds, &bar).await?;
    let worker = bench.worker_process(queue::BENCH)?;
    bench.await_workers(1).await?;
    // Its start is over: every statement is prepared on its connections.
    tokio::time::sleep(Duration::from_secs(20)).await;
    let pid = worker.0.id();
    let (cpu, began) = (cpu_seconds(pid), Instant::now());
    let queries = transactions_a_second(bench, seconds, &bar).await? - without;
    let cpu = (cpu_seconds(pid) - cpu) / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    let count = bench.amount(300_000);
    bench.enqueue_noops(count, Duration::ZERO).await?;
    bench.engine.waker.wake();
    bench.until_drained().await?;
    let memory = memory_of(&pid.to_string());
    report.add("idle", "CPU of an idle worker", 100.0 * cpu, "% of a core").target(Target::AtMost(1.0));
    report.add("idle", "queries of an idle worker", queries, "/s").target(Target::AtMost(2.0));
    report.add("idle", "memory after a load, peak", memory, "MiB").target(Target::AtMost(64.0));
    Ok(())
}

async fn transactions_a_second(bench: &Bench, seconds: u64, bar: &indicatif::ProgressBar) -> anyhow::Result<f64> {
    let (before, began) = (transactions(bench).await?, Instant::now());
    for _ in 0..seconds {
        tokio::time::sleep(Duration::from_secs(1)).await;
        bar.inc(1);
    }
    Ok((transactions(bench).await? - before) / began.elapsed().as_secs_f64())
}

/// What a process has used of the processors, in seconds.
fn cpu_seconds(pid: u32) -> f64 {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks: f64 = [11, 12].iter().filter_map(|at| fields.get(*at)?.parse::<f64>().ok()).sum();
    ticks / rustix::param::clock_ticks_per_second() as f64
}

/// Transactions of this database so far: every statement of an idle worker
/// is one.
pub(super) async fn transactions(bench: &Bench) -> anyhow::Result<f64> {
    // The server's counters lag behind by up to a second.
    tokio::time::sleep(Duration::from_millis(1_500)).await;
    let count: i64 = sqlx::query_scalar("select xact_commit from pg_stat_database where datname = current_database()")
        .fetch_one(&bench.pool)
        .await?;
    Ok(count as f64)
}
