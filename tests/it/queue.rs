//! The queue: fair claims, fences, timers, and what becomes of the dead.

use std::collections::HashMap;
use std::time::Duration;

use capx_core::domain::ids::CompanyId;
use capx_core::engine::claim::{self, ClaimCursor};
use capx_core::store::jobs::{self, Enqueued, Lease, NewJob, Settle, kind, queue};
use capx_core::store::sessions::{self, NewSession};
use uuid::Uuid;

use crate::harness::Db;

async fn session(db: &Db, lease: Duration) -> i64 {
    let queues = vec![queue::BENCH.to_owned()];
    let new = NewSession { worker: "test", version: "0", queues: &queues, slots: 10, lease };
    sessions::open(&db.pool, &new).await.unwrap()
}

async fn fill(db: &Db, company: CompanyId, count: usize) {
    jobs::enqueue_bulk(&db.pool, queue::BENCH, kind::NOOP, Duration::ZERO, &vec![company.0; count], &vec![None; count])
        .await
        .unwrap();
}

fn queues() -> Vec<String> {
    vec![queue::BENCH.to_owned()]
}

const LONG: Duration = Duration::from_secs(600);

#[tokio::test(flavor = "multi_thread")]
async fn one_companys_thousands_do_not_hold_anothers_first() {
    let db = Db::new().await;
    let (busy, small, last) = (CompanyId::new(), CompanyId::new(), CompanyId::new());
    fill(&db, busy, 5_000).await;
    fill(&db, small, 1).await;
    fill(&db, last, 100).await;
    let session = session(&db, LONG).await;
    let claimed = jobs::claim(&db.pool, session, &queues(), Uuid::nil(), 30).await.unwrap();
    let mut by_company: HashMap<Uuid, usize> = HashMap::new();
    for job in &claimed {
        *by_company.entry(job.company.0).or_default() += 1;
    }
    assert_eq!(by_company[&small.0], 1);
    assert_eq!(by_company[&busy.0], 10);
    assert_eq!(by_company[&last.0], 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_goes_on_takes_every_job_once_and_the_urgent_in_time() {
    let db = Db::new().await;
    let company = CompanyId::new();
    fill(&db, company, 1_000).await;
    let session = session(&db, LONG).await;
    let mut cursor = ClaimCursor::default();
    let mut seen = std::collections::HashSet::new();
    let mut urgent = None;
    while seen.len() < 1_001 {
        let jobs = claim::claim(&db.engine, session, &queues(), &mut cursor, 64).await.unwrap();
        for job in &jobs {
            assert!(seen.insert(job.lease.job), "claimed twice");
        }
        if urgent.is_none() && seen.len() >= 200 {
            let job = NewJob { priority: -1, ..NewJob::new(queue::BENCH, kind::NOOP, company) };
            let Enqueued::New(id) = jobs::enqueue(&db.pool, &job).await.unwrap() else { panic!("new") };
            urgent = Some(id);
        }
        // Behind where the claims have got to, so only a full look finds it.
        if jobs.is_empty() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
    assert!(seen.contains(&urgent.unwrap()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_spent_lease_writes_nothing() {
    let db = Db::new().await;
    let company = CompanyId::new();
    fill(&db, company, 1).await;
    let dead = session(&db, Duration::from_millis(1)).await;
    let stale = jobs::claim(&db.pool, dead, &queues(), Uuid::nil(), 1).await.unwrap().remove(0);
    // Its session is silent: it is declared dead, the job taken back.
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(sessions::bury(&db.pool).await.unwrap(), [dead]);
    assert_eq!(jobs::reclaim(&db.pool, Duration::ZERO).await.unwrap().len(), 1);
    // A dead session takes nothing and is not renewed.
    jobs::promote(&db.pool).await.unwrap();
    assert!(jobs::claim(&db.pool, dead, &queues(), Uuid::nil(), 1).await.unwrap().is_empty());
    let mut connection = sessions::connect(&db.url).await.unwrap();
    assert!(!sessions::beat(&mut connection, dead, false).await.unwrap());
    let alive = session(&db, LONG).await;
    let fresh = jobs::claim(&db.pool, alive, &queues(), Uuid::nil(), 1).await.unwrap().remove(0);
    assert_eq!((fresh.lease.job, fresh.attempt, fresh.crash_count), (stale.lease.job, 1, 1));
    assert!(fresh.lease.epoch > stale.lease.epoch);
    let settle = |lease: Lease| Settle { lease, again_after: None, charged: true };
    assert!(jobs::settle(&db.pool, &[settle(stale.lease)]).await.unwrap().is_empty());
    assert_eq!(jobs::settle(&db.pool, &[settle(fresh.lease)]).await.unwrap(), [fresh.lease.job]);
    assert_eq!(db.count("select count(*) from jobs").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_unique_key_has_one_live_job_and_says_which() {
    let db = Db::new().await;
    let job = NewJob { unique_key: Some("k".into()), ..NewJob::new(queue::BENCH, kind::NOOP, CompanyId::new()) };
    let other = NewJob { company: CompanyId::new(), ..job.clone() };
    let Enqueued::New(first) = jobs::enqueue(&db.pool, &job).await.unwrap() else { panic!("new") };
    assert_eq!(jobs::enqueue(&db.pool, &job).await.unwrap(), Enqueued::Existing(first));
    assert!(matches!(jobs::enqueue(&db.pool, &other).await.unwrap(), Enqueued::New(_)));
    // Under contention each caller is told of the same one.
    let key = NewJob { unique_key: Some("c".into()), ..job };
    let all = futures_util::future::join_all((0..20).map(|_| jobs::enqueue(&db.pool, &key))).await;
    let ids: std::collections::HashSet<i64> = all
        .into_iter()
        .map(|outcome| match outcome.unwrap() {
            Enqueued::New(id) | Enqueued::Existing(id) => id,
        })
        .collect();
    assert_eq!(ids.len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_due_later_is_taken_later() {
    let db = Db::new().await;
    let job = NewJob { delay: Duration::from_millis(300), ..NewJob::new(queue::BENCH, kind::NOOP, CompanyId::new()) };
    jobs::enqueue(&db.pool, &job).await.unwrap();
    let session = session(&db, LONG).await;
    assert_eq!(jobs::promote(&db.pool).await.unwrap(), 0);
    assert!(jobs::claim(&db.pool, session, &queues(), Uuid::nil(), 1).await.unwrap().is_empty());
    let outlook = jobs::look(&db.pool, &queues()).await.unwrap();
    assert!(!outlook.ready && outlook.next_due_s.is_some_and(|s| s > 0.0));
    crate::harness::eventually("the timer", || async { jobs::promote(&db.pool).await.unwrap() == 1 }).await;
    assert!(jobs::look(&db.pool, &queues()).await.unwrap().ready);
    assert_eq!(jobs::claim(&db.pool, session, &queues(), Uuid::nil(), 1).await.unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_reads_little_however_much_waits() {
    let db = Db::new().await;
    let company = CompanyId::new();
    fill(&db, company, 10_000).await;
    sqlx::raw_sql(
        "insert into jobs (queue, kind, company_id, state, due_at)
         select 'bench', 'noop', gen_random_uuid(), 'scheduled', now() + interval '1 day' from generate_series(1, 50000);
         insert into jobs (queue, kind, company_id, state)
         select 'other', 'noop', gen_random_uuid(), 'ready' from generate_series(1, 50000)",
    )
    .execute(&db.pool)
    .await
    .unwrap();
    let session = session(&db, LONG).await;
    let sql = include_str!("../../core/src/store/sql/claim.sql");
    let mut connection = db.pool.acquire().await.unwrap();
    let plan: serde_json::Value =
        sqlx::query_scalar(sqlx::AssertSqlSafe(format!("explain (analyze, buffers, format json) {sql}")))
            .bind(session)
            .bind(queues())
            .bind(Uuid::nil())
            .bind(64)
            .bind(32_i64)
            .bind(10_000_i64)
            .fetch_one(&mut *connection)
            .await
            .unwrap();
    let text = plan.to_string();
    assert!(!text.contains("Seq Scan"), "{text}");
    let hit = plan[0]["Plan"]["Shared Hit Blocks"].as_i64().unwrap()
        + plan[0]["Plan"]["Shared Read Blocks"].as_i64().unwrap();
    // 32 rows, each found, locked, updated and put into two indexes.
    assert!(hit < 1_000, "{hit} buffers: {text}");
}
