//! Enqueues a second, each its own transaction, and in bulk.

use std::time::{Duration, Instant};

use capx_core::engine::enqueue::Enqueuer;
use capx_core::store::jobs::{self, NewJob, kind, queue};

use super::Bench;
use super::report::{Report, Target};

/// Tasks that enqueue at once.
const TASKS: usize = 16;
/// Jobs of one bulk enqueue.
const BULK: usize = 1_000;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let single = single(bench).await?;
    let bulk = bulk(bench).await?;
    report.add("enqueue", "single, 16 tasks", single, "jobs/s").target(Target::AtLeast(15_000.0));
    report.add("enqueue", "bulk, 1,000 a statement", bulk, "jobs/s").target(Target::AtLeast(150_000.0));
    Ok(())
}

async fn single(bench: &Bench) -> anyhow::Result<f64> {
    bench.reset().await?;
    let each = bench.amount(50_000) / TASKS;
    let enqueuer = Enqueuer::start(bench.engine.pool.clone(), bench.engine.waker.clone());
    let company = bench.company;
    let began = Instant::now();
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let enqueuer = enqueuer.clone();
            tokio::spawn(async move {
                for _ in 0..each {
                    enqueuer.enqueue(NewJob::new(queue::BENCH, kind::NOOP, company)).await?;
                }
                anyhow::Ok(())
            })
        })
        .collect();
    for task in tasks {
        task.await??;
    }
    Ok((each * TASKS) as f64 / began.elapsed().as_secs_f64())
}

async fn bulk(bench: &Bench) -> anyhow::Result<f64> {
    bench.reset().await?;
    let count = bench.amount(500_000);
    let (companies, refs) = (vec![bench.company.0; BULK], vec![None; BULK]);
    let began = Instant::now();
    for _ in 0..count / BULK {
        jobs::enqueue_bulk(&bench.engine.pool, queue::BENCH, kind::NOOP, Duration::ZERO, &companies, &refs).await?;
    }
    Ok(count as f64 / began.elapsed().as_secs_f64())
}
