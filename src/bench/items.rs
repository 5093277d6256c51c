//! Items of `for_each` a second, beside steps of short runs in the same minutes;
//! and what a step costs in a long run.

use std::time::Instant;

use capx_core::engine::start;
use capx_core::store::jobs::queue;
use serde_json::{Map, json};

use super::report::{Report, Target};
use super::{Bench, Running, no_params};

/// Of one list.
const ITEMS: usize = 10_000;
/// Steps of all the runs of a measurement together, or a tenth of them.
const STEPS: usize = 60_000;

const EACH: &str = "name: each
inputs: {list: array}
steps:
  - id: each
    for_each: ${inputs.list}
    max_items: 10000
    max_parallel: 1000
    action: transform
    params: {n: '${item}'}
";

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let steps = bench.amount(STEPS);
    let short = rate(bench, report, 3, steps).await?;
    let fan = fans(bench, report, bench.amount(10)).await?;
    let again = rate(bench, report, 3, steps).await?;
    let best = short.max(again);
    report.add("items", "steps of runs of 3", best, "steps/s");
    report.add("items", "items of one list of 10,000", fan, "items/s").limit(best);
    report.add("items", "items, share of steps", fan / best, "").target(Target::AtLeast(0.4));
    // Enough of them that no commit waits for more to come, and as many rows.
    let ten = rate(bench, report, 10, steps * 10).await?;
    let thousand = rate(bench, report, 1_000, steps * 10).await?;
    report.add("items", "steps of runs of 10", ten, "steps/s");
    report.add("items", "steps of runs of 1,000", thousand, "steps/s").limit(ten);
    report.add("items", "long runs, share of short ones", thousand / ten, "").target(Target::AtLeast(0.8));
    Ok(())
}

/// Steps a second of runs of some length.
async fn rate(bench: &Bench, report: &Report, length: usize, steps: usize) -> anyhow::Result<f64> {
    bench.reset().await?;
    let playbook = bench.steps(length).await?;
    let runs = steps / length;
    let running = Running::start(bench.worker(&[queue::STEPS], bench.slots).await?);
    bench.await_workers(1).await?;
    let bar = report.progress(&format!("items: runs of {length} steps"), 1);
    let began = Instant::now();
    let started = start::start_many(&bench.engine, bench.company, playbook, runs, no_params()).await;
    started.map_err(|e| anyhow::anyhow!("{e:?}"))?;
    bench.until_drained().await?;
    let rate = (runs * length) as f64 / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    running.stop().await;
    let done: i64 =
        sqlx::query_scalar("select count(*) from run_steps where status = 'completed'").fetch_one(&bench.pool).await?;
    anyhow::ensure!(done == (runs * length) as i64, "not every step is done: {done}");
    Ok(rate)
}

/// Items a second, one list after the other.
async fn fans(bench: &Bench, report: &Report, lists: usize) -> anyhow::Result<f64> {
    bench.reset().await?;
    let playbook = bench.playbook(EACH).await?;
    let running = Running::start(bench.worker(&[queue::STEPS], bench.slots).await?);
    bench.await_workers(1).await?;
    let params = Map::from_iter([("list".to_owned(), json!((0..ITEMS).collect::<Vec<_>>()))]);
    let bar = report.progress("items: lists of 10,000", lists as u64);
    let began = Instant::now();
    for _ in 0..lists {
        let started = start::start_many(&bench.engine, bench.company, playbook, 1, params.clone()).await;
        started.map_err(|e| anyhow::anyhow!("{e:?}"))?;
        bench.until_drained().await?;
        bar.inc(1);
    }
    let rate = (lists * ITEMS) as f64 / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    running.stop().await;
    let done: i64 =
        sqlx::query_scalar("select count(*) from run_items where status = 'completed'").fetch_one(&bench.pool).await?;
    let runs: i64 =
        sqlx::query_scalar("select count(*) from runs where status = 'completed'").fetch_one(&bench.pool).await?;
    anyhow::ensure!((done, runs) == ((lists * ITEMS) as i64, lists as i64), "not every item is done: {done} {runs}");
    Ok(rate)
}
