//! No-op jobs a second.

use std::sync::atomic::Ordering::Relaxed;
use std::time::{Duration, Instant};

use capx_core::store::jobs::queue;

use super::report::{Report, Target};
use super::{Bench, Running, limit};

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let count = bench.amount(300_000);
    let bar = report.progress("jobs: bare SQL", 2);
    let one = limit::jobs(bench, count, 1).await?;
    bar.inc(1);
    let two = limit::jobs(bench, count, 2).await?;
    bar.finish_and_clear();
    let best = one.max(two);
    let single = one_process(bench, report, count).await?;
    let limited = limited(bench, report, count).await?;
    let memory = memory_mib();
    let double = processes(bench, count, 2).await?;
    report.add("jobs", "bare SQL, 1 connection", one, "jobs/s");
    report.add("jobs", "bare SQL, 2 connections", two, "jobs/s");
    report.add("jobs", "1 worker process", single, "jobs/s").limit(best).target(Target::AtLeast(60_000.0));
    report.add("jobs", "1 worker process, share of limit", single / best, "").target(Target::AtLeast(0.5));
    report.add("jobs", "1 worker process, limits enforced", limited, "jobs/s").limit(best);
    report.add("jobs", "with limits, share of without", limited / single, "").target(Target::AtLeast(0.9));
    report.add("jobs", "2 worker processes", double, "jobs/s").limit(best);
    report.add("jobs", "memory of this process", memory, "MiB");
    Ok(())
}

/// A worker of this process, idle until one commit makes all the jobs ready.
pub(super) async fn one_process(bench: &Bench, report: &Report, count: usize) -> anyhow::Result<f64> {
    bench.reset().await?;
    let worker = bench.worker(&[queue::BENCH], bench.slots).await?;
    let counters = worker.counters();
    let running = Running::start(worker);
    bench.await_workers(1).await?;
    let bar = report.progress("jobs: 1 worker process", count as u64);
    bench.enqueue_noops(count, Duration::ZERO).await?;
    let began = Instant::now();
    bench.engine.waker.wake();
    loop {
        let done = counters.committed.load(Relaxed);
        if done >= count as u64 {
            break;
        }
        bar.set_position(done);
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let rate = count as f64 / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    running.stop().await;
    Ok(rate)
}

/// The same where the company is limited, by more than it has: what it costs to look.
async fn limited(bench: &Bench, report: &Report, count: usize) -> anyhow::Result<f64> {
    let limits = "insert into flows (queue, company_id, max_running, rate) values ('bench', $1, 1000000, 1000000000)";
    sqlx::query(limits).bind(bench.company.0).execute(&bench.pool).await?;
    let rate = one_process(bench, report, count).await;
    sqlx::query("delete from flows where queue = 'bench'").execute(&bench.pool).await?;
    rate
}

async fn processes(bench: &Bench, count: usize, processes: usize) -> anyhow::Result<f64> {
    bench.reset().await?;
    let mut children = Vec::new();
    for _ in 0..processes {
        children.push(bench.worker_process(queue::BENCH)?);
    }
    bench.await_workers(processes as i64).await?;
    bench.enqueue_noops(count, Duration::ZERO).await?;
    let began = Instant::now();
    bench.engine.waker.wake();
    bench.until_drained().await?;
    Ok(count as f64 / began.elapsed().as_secs_f64())
}

/// The most memory this process has had resident.
pub(super) fn memory_mib() -> f64 {
    memory_of("self")
}

/// The same of another process.
pub(super) fn memory_of(pid: &str) -> f64 {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
    let kib: f64 = status
        .lines()
        .find_map(|line| line.strip_prefix("VmHWM:"))
        .and_then(|rest| rest.split_whitespace().next()?.parse().ok())
        .unwrap_or(f64::NAN);
    kib / 1024.0
}
