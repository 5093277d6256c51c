//! Ten thousand agents that beat: how many idle beats a second there can be, and, with time
//! compressed thirty times, whether any is missed, doubled or late.

use std::time::{Duration, Instant};

use capx_core::store::jobs::queue;

use super::report::{Report, Target};
use super::{Bench, Running};

const AGENTS: usize = 10_000;
/// 300 seconds, thirty times as fast.
const INTERVAL_S: i64 = 10;
/// How often each agent is to beat while it is watched.
const ROUNDS: i64 = 4;

/// The beats as the queue sees them: each was due, and was put off until the next.
const WATCH: &str = "
create unlogged table bench_beats (agent_id uuid, due_at timestamptz, planned timestamptz, at timestamptz);
create function bench_beat() returns trigger language plpgsql security definer as $$
begin
    insert into bench_beats
    select new.ref_id, old.due_at, (select beat_at from agents a where a.company_id = new.company_id and a.id = new.ref_id),
        clock_timestamp();
    return null;
end $$;
create trigger bench_beat after update on jobs for each row
    when (old.kind = 'heartbeat' and old.state = 'running' and new.state = 'scheduled') execute function bench_beat();
";
const UNWATCH: &str = "
drop trigger if exists bench_beat on jobs; drop function if exists bench_beat(); drop table if exists bench_beats;
delete from jobs where kind = 'heartbeat'; delete from agents where role like 'bench-%'; truncate events;
";

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let agents = bench.amount(AGENTS);
    let rate = rate(bench, report, agents).await?;
    report.add("beats", "idle beats of 10,000 agents", rate, "beats/s").target(Target::AtLeast(5_000.0));
    punctuality(bench, report, agents).await?;
    sqlx::raw_sql(UNWATCH).execute(&bench.pool).await?;
    bench.reset().await
}

/// Agents that beat every so often; the first beat of each comes at a random moment of that.
async fn agents(bench: &Bench, count: usize, interval_s: i64) -> anyhow::Result<()> {
    bench.reset().await?;
    sqlx::raw_sql(UNWATCH).execute(&bench.pool).await?;
    sqlx::query(
        "with agent as (
             insert into agents (company_id, id, role, adapter, instructions, config, status, beat_at)
             select $1, gen_random_uuid(), 'bench-' || n, 'claude', 'Beat.', jsonb_build_object('heartbeat_interval', $3::bigint),
                 'active', now() + random() * $3 * interval '1 second'
             from generate_series(1, $2) n
             returning id, beat_at
         )
         insert into jobs (queue, kind, company_id, ref_id, state, due_at, unique_key)
         select 'system', 'heartbeat', $1, id, 'scheduled', beat_at, 'heartbeat:' || id from agent",
    )
    .bind(bench.company.0)
    .bind(i32::try_from(count)?)
    .bind(interval_s)
    .execute(&bench.pool)
    .await?;
    sqlx::raw_sql("vacuum analyze agents").execute(&bench.pool).await?;
    sqlx::raw_sql("vacuum analyze jobs").execute(&bench.pool).await?;
    Ok(())
}

async fn beaten(bench: &Bench) -> anyhow::Result<i64> {
    let sum = "select coalesce(sum(heartbeat_count), 0)::bigint from agents where role like 'bench-%'";
    Ok(sqlx::query_scalar(sum).fetch_one(&bench.pool).await?)
}

/// Beats a second where more are due than can be.
async fn rate(bench: &Bench, report: &Report, count: usize) -> anyhow::Result<f64> {
    agents(bench, count, 1).await?;
    let running = Running::start(bench.worker(&[queue::SYSTEM], bench.slots).await?);
    bench.await_workers(1).await?;
    let bar = report.progress("beats: as many as can be", 1);
    // Past its beginning.
    tokio::time::sleep(Duration::from_secs(2)).await;
    let (began, before) = (Instant::now(), beaten(bench).await?);
    tokio::time::sleep(Duration::from_secs(10)).await;
    let rate = (beaten(bench).await? - before) as f64 / began.elapsed().as_secs_f64();
    bar.finish_and_clear();
    running.stop().await;
    Ok(rate)
}

/// Whether every beat that was planned came, once, and when.
async fn punctuality(bench: &Bench, report: &mut Report, count: usize) -> anyhow::Result<()> {
    agents(bench, count, INTERVAL_S).await?;
    sqlx::raw_sql(WATCH).execute(&bench.pool).await?;
    let running = Running::start(bench.worker(&[queue::SYSTEM], bench.slots).await?);
    bench.await_workers(1).await?;
    let bar = report.progress("beats: thirty times as fast", ROUNDS as u64);
    for _ in 0..ROUNDS {
        tokio::time::sleep(Duration::from_secs(INTERVAL_S as u64)).await;
        bar.inc(1);
    }
    bar.finish_and_clear();
    running.stop().await;
    // Each beat has planned the one after it: they are as far from each other as they should
    // be, and as many as fit between the first and the last.
    let (beats, missed, doubled): (i64, i64, i64) = sqlx::query_as(
        "select sum(beats)::bigint, sum(planned - apart)::bigint, sum(beats - apart)::bigint from (
             select agent_id, count(*) as beats, count(distinct planned) as apart,
                 round(extract(epoch from max(planned) - min(planned)) / $1)::bigint + 1 as planned
             from bench_beats group by agent_id
         ) a",
    )
    .bind(INTERVAL_S)
    .fetch_one(&bench.pool)
    .await?;
    let silent: i64 =
        sqlx::query_scalar("select count(*) from agents where role like 'bench-%' and heartbeat_count < $1")
            .bind(ROUNDS - 1)
            .fetch_one(&bench.pool)
            .await?;
    let (p50, p99): (f64, f64) = sqlx::query_as(
        "select percentile_cont(0.5) within group (order by late)::float8, percentile_cont(0.99) within group (order by late)::float8
         from (select extract(epoch from at - due_at) * 1000 as late from bench_beats) l",
    )
    .fetch_one(&bench.pool)
    .await?;
    report.add("beats", "beats that were watched", beats as f64, "beats");
    report.add("beats", "beats missed", (missed + silent) as f64, "beats").target(Target::AtMost(0.0));
    report.add("beats", "beats doubled", doubled as f64, "beats").target(Target::AtMost(0.0));
    report.add("beats", "how late a beat is, p50", p50, "ms");
    report.add("beats", "how late a beat is, p99", p99, "ms").target(Target::AtMost(1_000.0));
    Ok(())
}
