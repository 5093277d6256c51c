//! The yardstick: the same durable work as bare SQL in large batches, with no
//! engine, no handlers, no fairness and no recovery around it.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use sqlx::postgres::PgListener;
use sqlx::{Connection, PgConnection};
use uuid::Uuid;

use super::Bench;
use super::latency::IDLE_AGAIN;

/// Jobs of one batch.
const BATCH: i64 = 500;

/// Jobs a second: a batch leased by one statement and deleted by another.
pub(super) async fn jobs(bench: &Bench, count: usize, connections: usize) -> anyhow::Result<f64> {
    bench.reset().await?;
    bench.enqueue_noops(count, std::time::Duration::ZERO).await?;
    sqlx::raw_sql("vacuum analyze jobs").execute(&bench.pool).await?;
    let began = Instant::now();
    let mut tasks = Vec::new();
    for session in 0..connections {
        let mut connection = connect(bench).await?;
        tasks.push(tokio::spawn(async move {
            loop {
                let ids: Vec<i64> = sqlx::query_scalar(
                    "update jobs set state = 'running', lease_epoch = lease_epoch + 1, attempt = attempt + 1,
                            session_id = $1, deadline_at = now() + interval '1 hour'
                     where id = any (array(select id from jobs where state = 'ready' and queue = 'bench'
                                           order by queue, flow_id, priority, id
                                           limit $2 for update skip locked))
                     returning id",
                )
                .bind(session as i64)
                .bind(BATCH)
                .fetch_all(&mut connection)
                .await?;
                if ids.is_empty() {
                    return anyhow::Ok(());
                }
                sqlx::query("delete from jobs where id = any ($1)").bind(&ids).execute(&mut connection).await?;
            }
        }));
    }
    for task in tasks {
        task.await??;
    }
    Ok(count as f64 / began.elapsed().as_secs_f64())
}

/// Steps a second, in runs of three: each step's job row moved on, its
/// checkpoint and its event, the run's counter; at the end the run closed.
pub(super) async fn steps(bench: &Bench, runs: usize, connections: usize) -> anyhow::Result<f64> {
    bench.reset().await?;
    let playbook = bench.three_steps().await?;
    let started =
        capx_core::engine::start::start_many(&bench.engine, bench.company, playbook, runs, super::no_params())
            .await
            .map_err(|e| anyhow::anyhow!("{e:?}"))?;
    sqlx::raw_sql("vacuum analyze jobs").execute(&bench.pool).await?;
    let began = Instant::now();
    let done = Arc::new(AtomicUsize::new(0));
    let mut tasks = Vec::new();
    for session in 0..connections {
        let mut connection = connect(bench).await?;
        let (company, done) = (bench.company.0, Arc::clone(&done));
        tasks.push(tokio::spawn(async move {
            while run_batch(&mut connection, session as i64, company, &done).await? {}
            anyhow::Ok(())
        }));
    }
    for task in tasks {
        task.await??;
    }
    anyhow::ensure!(done.load(Relaxed) == started.len() * 3, "the yardstick lost steps");
    Ok(done.load(Relaxed) as f64 / began.elapsed().as_secs_f64())
}

async fn run_batch(
    connection: &mut PgConnection,
    session: i64,
    company: Uuid,
    done: &AtomicUsize,
) -> anyhow::Result<bool> {
    let claimed: Vec<(i64, Uuid)> = sqlx::query_as(
        "update jobs set state = 'running', lease_epoch = lease_epoch + 1, attempt = 1, session_id = $1,
                deadline_at = now() + interval '1 hour'
         where id = any (array(select id from jobs where state = 'ready' and queue = 'steps'
                               order by queue, flow_id, priority, id limit $2 for update skip locked))
         returning id, ref_id",
    )
    .bind(session)
    .bind(BATCH)
    .fetch_all(&mut *connection)
    .await?;
    let (jobs, runs): (Vec<i64>, Vec<Uuid>) = claimed.into_iter().unzip();
    if jobs.is_empty() {
        return Ok(false);
    }
    for step in 0..3 {
        let last = step == 2;
        let job = if last {
            "delete from jobs where id = any ($1) and $3::integer is not null"
        } else {
            "update jobs set step = $3 + 1, lease_epoch = lease_epoch + 1 where id = any ($1)"
        };
        let run = if last {
            "event_seq = event_seq + 2, status = 'completed', ended_at = now()"
        } else {
            "event_seq = event_seq + 1"
        };
        let closing = if last {
            "union all select $4, u.other, u.run, $3 + 3, 'playbook.completed', '{\"step_count\": 3}'::jsonb from unnest($2::uuid[], $6::uuid[]) as u (run, other)"
        } else {
            ""
        };
        let sql = format!(
            "with job as ({job}),
                  run as (update runs set {run} where company_id = $4 and id = any ($2)),
                  step as (insert into run_steps (company_id, run_id, step, status, attempt, output, started_at, ended_at)
                           select $4, run, $3, 'completed', 1, '{{\"n\": 1}}', now(), now() from unnest($2::uuid[]) as u (run))
             insert into events (company_id, id, run_id, seq, event, data)
             select $4, u.event, u.run, $3 + 2, 'step.completed',
                    '{{\"step\": \"a\", \"index\": 0, \"action\": \"transform\", \"attempt\": 1, \"duration_ms\": 0}}'::jsonb
             from unnest($2::uuid[], $5::uuid[]) as u (run, event) {closing}"
        );
        let ids = |_: &Uuid| Uuid::now_v7();
        let mut query = sqlx::query(sqlx::AssertSqlSafe(sql))
            .bind(&jobs)
            .bind(&runs)
            .bind(step)
            .bind(company)
            .bind(runs.iter().map(ids).collect::<Vec<_>>());
        if last {
            query = query.bind(runs.iter().map(ids).collect::<Vec<_>>());
        }
        query.execute(&mut *connection).await?;
        done.fetch_add(runs.len(), Relaxed);
    }
    Ok(true)
}

/// From the insert's beginning to a claim's answer: each step of the way as
/// bare SQL on a connection that was idle, one after the other.
pub(super) async fn latency(bench: &Bench, samples: usize) -> anyhow::Result<Vec<Duration>> {
    bench.reset().await?;
    let (mut sender, mut claimer) = (connect(bench).await?, connect(bench).await?);
    sqlx::query("set synchronous_commit = off").execute(&mut claimer).await?;
    let mut listener = PgListener::connect(&bench.url).await?;
    listener.listen("capx_bench").await?;
    let mut took = Vec::with_capacity(samples);
    for _ in 0..samples {
        let began = Instant::now();
        sqlx::query("insert into jobs (queue, kind, company_id, state) values ('bench', 'noop', $1, 'ready')")
            .bind(bench.company.0)
            .execute(&mut sender)
            .await?;
        let hint = sqlx::query("select pg_notify('capx_bench', '')").execute(&mut sender);
        let (sent, heard) = tokio::join!(hint, listener.recv());
        sent?;
        heard?;
        let claimed = sqlx::query(
            "update jobs set state = 'running', lease_epoch = lease_epoch + 1, attempt = attempt + 1,
                    session_id = 1, deadline_at = now() + interval '1 hour'
             where id = (select id from jobs where state = 'ready' and queue = 'bench'
                         order by queue, flow_id, priority, id limit 1 for update skip locked)
             returning id",
        )
        .fetch_all(&mut claimer)
        .await?;
        anyhow::ensure!(claimed.len() == 1, "the yardstick lost a job");
        took.push(began.elapsed());
        tokio::time::sleep(IDLE_AGAIN).await;
    }
    Ok(took)
}

async fn connect(bench: &Bench) -> anyhow::Result<PgConnection> {
    let options = capx_core::store::connect_options(&bench.url, capx_core::store::PoolKind::Queue)?;
    Ok(PgConnection::connect_with(&options).await?)
}
