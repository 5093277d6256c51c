//! What ten million finished runs cost those who work and those who look, and what it costs to look at
//! the queues while a million jobs wait.

use std::time::{Duration, Instant};

use capx_core::domain::ids::{CompanyId, PlaybookId};
use capx_core::domain::run::RunStatus;
use capx_core::store::jobs::{self, NewJob, kind, queue};
use capx_core::store::runs::RunFilter;
use capx_core::store::{self, PoolKind, fleet, runs};
use tokio::sync::mpsc;

use super::latency::{self, percentile};
use super::report::{Report, Target};
use super::{Bench, Running};

const RUNS: usize = 10_000_000;
const JOBS: usize = 1_000_000;
const COMPANIES: i64 = 1_000;
/// Runs of a page.
const PAGE: i64 = 25;
/// Lists that are read, and looks at the queues.
const LOOKS: usize = 500;
/// Those before them, which fill the cache.
const WARM_UP: usize = 50;

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let count = bench.amount(RUNS);
    bench.reset().await?;
    bench.three_steps().await?;
    few(bench).await?;
    let before = measured(bench, report).await?;
    let bar = report.progress("history: finished runs", (count / 500_000).max(1) as u64);
    for start in (0..count).step_by(500_000) {
        finished(bench, 500_000.min(count - start)).await?;
        bar.inc(1);
    }
    bar.finish_and_clear();
    sqlx::raw_sql("vacuum analyze runs").execute(&bench.pool).await?;
    sqlx::raw_sql("checkpoint").execute(&bench.pool).await?;
    let after = measured(bench, report).await?;
    report.add("history", "finished runs", count as f64, "runs");
    for ([alone, with, share], before, after) in [
        (["pick-up, p99", "pick-up, p99, with them", "pick-up, p99, share"], before.pick_up_ms, after.pick_up_ms),
        (["a page, p99", "a page, p99, with them", "a page, p99, share"], before.list_ms, after.list_ms),
        (
            ["a page of failed, p99", "a page of failed, p99, with them", "a page of failed, p99, share"],
            before.failed_ms,
            after.failed_ms,
        ),
    ] {
        report.add("history", alone, before, "ms");
        report.add("history", with, after, "ms");
        report.add("history", share, after / before, "").target(Target::AtMost(1.2));
    }
    stats(bench, report).await?;
    bench.reset().await
}

/// So many before, that a page of each list is full then, too.
async fn few(bench: &Bench) -> anyhow::Result<()> {
    finished(bench, 100 * PAGE as usize).await?;
    sqlx::raw_sql("vacuum analyze runs").execute(&bench.pool).await?;
    Ok(())
}

/// Runs that ended, spread over the last month, one of a hundred badly.
async fn finished(bench: &Bench, count: usize) -> anyhow::Result<()> {
    sqlx::query(
        "insert into runs (company_id, id, playbook_id, version_id, job_id, status, trigger, params, event_seq, started_at, ended_at)
         select $1, (lpad(to_hex((extract(epoch from at) * 1000)::bigint), 12, '0') || '7' || substr(md5(random()::text), 1, 19))::uuid,
             p.id, p.current_version_id, -1, case when n % 100 = 0 then 'failed' else 'completed' end, 'manual', '{}', 0, at, at
         from (select n, now() - random() * interval '30 days' as at from generate_series(1, $2) n) g
         cross join (select id, current_version_id from playbooks where company_id = $1 limit 1) p",
    )
    .bind(bench.company.0)
    .bind(i32::try_from(count)?)
    .execute(&bench.pool)
    .await?;
    Ok(())
}

struct Measured {
    pick_up_ms: f64,
    list_ms: f64,
    failed_ms: f64,
}

async fn measured(bench: &Bench, report: &Report) -> anyhow::Result<Measured> {
    let mut picked = latency::samples(bench, report, bench.amount(1_000)).await?;
    Ok(Measured {
        pick_up_ms: percentile(&mut picked, 0.99),
        list_ms: lists(bench, None).await?,
        failed_ms: lists(bench, Some(vec![RunStatus::Failed])).await?,
    })
}

/// A page of the playbook's runs, at the 99th percentile, in milliseconds.
async fn lists(bench: &Bench, statuses: Option<Vec<RunStatus>>) -> anyhow::Result<f64> {
    let playbook = sqlx::query_scalar("select id from playbooks where company_id = $1 limit 1");
    let playbook = PlaybookId(playbook.bind(bench.company.0).fetch_one(&bench.pool).await?);
    let filter = RunFilter { playbook, statuses, before: None };
    let pool = store::pool(&bench.url, PoolKind::Requests, 1)?;
    let mut took = Vec::with_capacity(LOOKS);
    for n in 0..LOOKS + WARM_UP {
        let began = Instant::now();
        let rows = runs::list(&pool, bench.company, &filter, PAGE).await?;
        took.extend((n >= WARM_UP).then(|| began.elapsed()));
        anyhow::ensure!(rows.len() == PAGE as usize, "{} runs are listed", rows.len());
    }
    Ok(percentile(&mut took, 0.99))
}

/// While a million jobs of one company wait, and others' beside them: what a look at the queues costs
/// that is made four times a second, and how long another company's first job waits.
async fn stats(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    bench.reset().await?;
    let jobs = bench.amount(JOBS);
    bench.enqueue_noops(jobs, Duration::ZERO).await?;
    let others = "insert into jobs (queue, kind, company_id, state)
                  select 'bench', 'noop', gen_random_uuid(), 'ready' from generate_series(1, $1)";
    sqlx::query(others).bind(COMPANIES).execute(&bench.pool).await?;
    sqlx::raw_sql("vacuum analyze jobs").execute(&bench.pool).await?;
    let pool = store::pool(&bench.url, PoolKind::Queue, 1)?;
    fleet::queues(&pool).await?;
    let mut took = Duration::ZERO;
    for _ in 0..LOOKS {
        let began = Instant::now();
        fleet::queues(&pool).await?;
        took += began.elapsed();
    }
    let mean_ms = took.as_secs_f64() * 1e3 / LOOKS as f64;
    report.add("history", "a look at the queues, a million jobs of 1,001 companies", mean_ms, "ms");
    report.add("history", "share of a core, four a second", mean_ms * 4.0 / 1e3, "").target(Target::AtMost(0.02));

    let (observer, mut starts) = mpsc::unbounded_channel();
    let running = Running::start(bench.worker(&[queue::BENCH], bench.slots).await?.observed_by(observer));
    bench.await_workers(1).await?;
    let mut firsts = Vec::new();
    for _ in 0..50 {
        let began = Instant::now();
        let job = NewJob::new(queue::BENCH, kind::NOOP, CompanyId::new());
        let id = jobs::enqueue(&bench.engine.pool, &job).await?.id();
        bench.engine.waker.wake();
        while let Some((started, at)) = starts.recv().await {
            if started == id {
                firsts.push(at.saturating_duration_since(began));
                break;
            }
        }
        let left: i64 =
            sqlx::query_scalar("select count(*) from (select from jobs where state = 'ready' limit 1000) j")
                .fetch_one(&bench.pool)
                .await?;
        if left < 1_000 {
            break;
        }
    }
    running.stop().await;
    report.add("history", "another company's first jobs beside a million", firsts.len() as f64, "jobs");
    report
        .add("history", "how long the longest of them waited", percentile(&mut firsts, 1.0), "ms")
        .target(Target::AtMost(1_000.0));
    Ok(())
}
