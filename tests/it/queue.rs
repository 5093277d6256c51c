//! The queue: fair claims, fences, timers, and what becomes of the dead.

use std::collections::HashMap;
use std::time::Duration;

use capx_core::domain::ids::CompanyId;
use capx_core::engine::claim::{self, ClaimCursor};
use capx_core::engine::signals;
use capx_core::store::jobs::{self, Enqueued, Lease, NewJob, Settle, Turn, kind, queue};
use capx_core::store::sessions::{self, NewSession};
use serde_json::Value;
use sqlx::Arguments;
use sqlx::postgres::{PgArguments, PgConnection};
use uuid::Uuid;

use crate::harness::{Db, Seeded, eventually};

macro_rules! arguments {
    ($($value:expr),*) => {{
        let mut given = PgArguments::default();
        $(given.add($value).unwrap();)*
        given
    }};
}

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

fn turns() -> Vec<Turn> {
    vec![Turn::first(queue::BENCH)]
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
    let claimed = jobs::claim(&db.pool, session, &turns(), 30).await.unwrap().jobs;
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
    let mut cursor = ClaimCursor::new(&queues());
    let mut seen = std::collections::HashSet::new();
    let mut urgent = None;
    while seen.len() < 1_001 {
        let jobs = claim::claim(&db.engine, session, &mut cursor, 64).await.unwrap();
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
    let stale = jobs::claim(&db.pool, dead, &turns(), 1).await.unwrap().jobs.remove(0);
    // Its session is silent: it is declared dead, the job taken back.
    tokio::time::sleep(Duration::from_millis(5)).await;
    assert_eq!(sessions::bury(&db.pool).await.unwrap(), [dead]);
    assert_eq!(jobs::reclaim(&db.pool, Duration::ZERO).await.unwrap().len(), 1);
    // A dead session takes nothing and is not renewed.
    jobs::promote(&db.pool).await.unwrap();
    assert!(jobs::claim(&db.pool, dead, &turns(), 1).await.unwrap().jobs.is_empty());
    let mut connection = sessions::connect(&db.url).await.unwrap();
    assert_eq!(sessions::beat(&mut connection, dead, false).await.unwrap(), sessions::Beat::Dead);
    let alive = session(&db, LONG).await;
    let fresh = jobs::claim(&db.pool, alive, &turns(), 1).await.unwrap().jobs.remove(0);
    assert_eq!((fresh.lease.job, fresh.attempt, fresh.crash_count), (stale.lease.job, 1, 1));
    assert!(fresh.lease.epoch > stale.lease.epoch);
    let settle = |lease: Lease| Settle { lease, again_after: None, charged: true };
    assert!(jobs::settle(&db.pool, &[settle(stale.lease)]).await.unwrap().is_empty());
    assert_eq!(jobs::settle(&db.pool, &[settle(fresh.lease)]).await.unwrap(), [fresh.lease.job]);
    assert_eq!(db.count("select count(*) from jobs where kind <> 'heartbeat'").await, 0);
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
    assert!(jobs::claim(&db.pool, session, &turns(), 1).await.unwrap().jobs.is_empty());
    let outlook = jobs::look(&db.pool, &queues()).await.unwrap();
    assert!(!outlook.ready && outlook.next_due_s.is_some_and(|s| s > 0.0));
    eventually("the timer", || async { jobs::promote(&db.pool).await.unwrap() == 1 }).await;
    assert!(jobs::look(&db.pool, &queues()).await.unwrap().ready);
    assert_eq!(jobs::claim(&db.pool, session, &turns(), 1).await.unwrap().jobs.len(), 1);
}

/// Claims against a model: random jobs of random companies, queues and
/// priorities, taken in random amounts.
#[tokio::test(flavor = "multi_thread")]
async fn claims_are_fair_in_order_and_leave_nothing() {
    let db = Db::new().await;
    let session = session(&db, LONG).await;
    for seed in 0..20 {
        let mut random = Seeded(seed);
        let companies: Vec<Uuid> = (0..1 + random.below(6)).map(|_| Uuid::now_v7()).collect();
        let turns = [Turn::first(queue::BENCH), Turn::first(queue::STEPS), Turn::first(queue::SYSTEM)];
        let mut waiting: HashMap<(String, Uuid), Vec<(i16, i64)>> = HashMap::new();
        for _ in 0..random.below(120) {
            let queue = [queue::BENCH, queue::STEPS, queue::SYSTEM][random.below(3) as usize];
            let company = companies[random.below(companies.len() as u64) as usize];
            let priority = random.below(3) as i16 - 1;
            let job = NewJob { priority, ..NewJob::new(queue, kind::NOOP, CompanyId(company)) };
            let Enqueued::New(id) = jobs::enqueue(&db.pool, &job).await.unwrap() else { panic!("new") };
            waiting.entry((queue.to_owned(), company)).or_default().push((priority, id));
        }
        waiting.values_mut().for_each(|jobs| jobs.sort_unstable());
        let mut served: Vec<(String, Uuid)> = Vec::new();
        while !waiting.is_empty() {
            let room = 1 + random.below(40) as i64;
            let claimed = jobs::claim(&db.pool, session, &turns, room).await.unwrap().jobs;
            let open = waiting.len();
            let left: usize = waiting.values().map(Vec::len).sum();
            let mut taken: HashMap<(String, Uuid), Vec<(i16, i64)>> = HashMap::new();
            for job in claimed {
                taken.entry((job.queue, job.company.0)).or_default().push((job.priority, job.lease.job));
            }
            let share = (room as usize).div_ceil(open);
            // Nobody gets more than a share, and who has work gets some as
            // long as there is room.
            assert!(taken.values().all(|jobs| jobs.len() <= share), "seed {seed}: more than a share of {share}");
            let total: usize = taken.values().map(Vec::len).sum();
            assert!(total > 0 && total <= room as usize, "seed {seed}: {total} of {left}");
            if room as usize >= open * share {
                assert_eq!(taken.len(), open, "seed {seed}: somebody got nothing");
            }
            for (tenant, mut jobs) in taken {
                jobs.sort_unstable();
                let all = waiting.get_mut(&tenant).unwrap();
                // What is taken is what comes first.
                assert_eq!(all.drain(..jobs.len()).collect::<Vec<_>>(), jobs, "seed {seed}");
                if all.is_empty() {
                    waiting.remove(&tenant);
                    served.push(tenant);
                }
            }
        }
        assert!(jobs::claim(&db.pool, session, &turns, 10).await.unwrap().jobs.is_empty());
    }
}

/// With room for one job at a time, as in a worker full of long work, every
/// company and every queue has its turn.
#[tokio::test(flavor = "multi_thread")]
async fn a_full_worker_serves_everybody_in_turn() {
    let db = Db::new().await;
    let session = session(&db, LONG).await;
    let companies: Vec<CompanyId> = (0..80).map(|_| CompanyId::new()).collect();
    let mut waiting = 0;
    for company in &companies {
        for (queue, count) in [(queue::STEPS, 5), (queue::SYSTEM, 1)] {
            for _ in 0..count {
                jobs::enqueue(&db.pool, &NewJob::new(queue, kind::NOOP, *company)).await.unwrap();
                waiting += 1;
            }
        }
    }
    let mut cursor = ClaimCursor::new(&[queue::STEPS.to_owned(), queue::SYSTEM.to_owned()]);
    let mut served: HashMap<(String, Uuid), usize> = HashMap::new();
    let mut taken = 0;
    let mut looks = 0;
    while taken < waiting {
        looks += 1;
        assert!(looks < 2 * waiting, "{taken} of {waiting} after {looks} looks");
        for job in claim::claim(&db.engine, session, &mut cursor, 1).await.unwrap() {
            *served.entry((job.queue, job.company.0)).or_default() += 1;
            taken += 1;
        }
        if taken == 2 * companies.len() {
            // Two queues in turn: by now each company was served in each.
            assert_eq!(served.len(), 2 * companies.len(), "{served:?}");
        }
    }
}

/// In a backlog a look that had room for everybody is gone on from, however
/// small the worker: else each of its claims would walk all that is dead.
#[tokio::test(flavor = "multi_thread")]
async fn a_small_worker_goes_on_in_a_backlog() {
    let db = Db::new().await;
    let session = session(&db, LONG).await;
    let mut companies: Vec<CompanyId> = (0..3).map(|_| CompanyId::new()).collect();
    companies.sort_by_key(|company| company.0);
    for company in &companies {
        let all = vec![NewJob::new(queue::STEPS, kind::NOOP, *company); 40];
        jobs::enqueue_many(&db.pool, &all).await.unwrap();
    }
    let mut cursor = ClaimCursor::new(&[queue::STEPS.to_owned()]);
    for _ in 0..19 {
        let claimed = claim::claim(&db.engine, session, &mut cursor, 6).await.unwrap();
        for company in &companies {
            assert_eq!(claimed.iter().filter(|job| job.company == *company).count(), 2);
        }
        assert!(cursor.has_more());
    }
}

/// Whoever comes last in a lap, or happens to be served when little room is
/// left, does not get the worker to itself.
#[tokio::test(flavor = "multi_thread")]
async fn deep_backlogs_share_a_small_worker_lap_after_lap() {
    for (first, room) in [(1, 1), (2, 2), (8, 1)] {
        let db = Db::new().await;
        let session = session(&db, LONG).await;
        let companies: Vec<CompanyId> = (0..4).map(|_| CompanyId::new()).collect();
        for company in &companies {
            let all = vec![NewJob::new(queue::STEPS, kind::NOOP, *company); 100];
            jobs::enqueue_many(&db.pool, &all).await.unwrap();
        }
        let mut cursor = ClaimCursor::new(&[queue::STEPS.to_owned()]);
        let mut served: HashMap<CompanyId, usize> = HashMap::new();
        let mut next = first;
        while served.values().sum::<usize>() < 80 {
            for job in claim::claim(&db.engine, session, &mut cursor, next).await.unwrap() {
                *served.entry(job.company).or_default() += 1;
            }
            next = room;
        }
        let (least, most) = (served.values().min().unwrap(), served.values().max().unwrap());
        assert!(served.len() == 4 && most - least <= 4, "room {first}, then {room}: {served:?}");
    }
}

/// Those whose own limits hold them back, more of them than a look comes to, hide nobody behind
/// them, however busy another queue keeps a worker that has room for one job.
#[tokio::test(flavor = "multi_thread")]
async fn who_is_held_back_hides_nobody_behind() {
    let db = Db::new().await;
    let session = session(&db, LONG).await;
    let mut companies: Vec<CompanyId> = (0..70).map(|_| CompanyId::new()).collect();
    companies.sort_by_key(|company| company.0);
    let (held, last) = companies.split_at(69);
    let job = |queue, company: &CompanyId| NewJob::new(queue, kind::NOOP, *company);
    let mut jobs: Vec<NewJob> = companies.iter().map(|company| job(queue::STEPS, company)).collect();
    jobs.extend((0..3).flat_map(|n| vec![job("bench", &companies[n]); 100]));
    jobs::enqueue_many(&db.pool, &jobs).await.unwrap();
    let held: Vec<Uuid> = held.iter().map(|company| company.0).collect();
    let sql = "insert into flows (queue, company_id, open_until)
        select 'steps', c, now() + interval '1 hour' from unnest($1::uuid[]) c";
    sqlx::query(sql).bind(held).execute(&db.pool).await.unwrap();
    let mut cursor = ClaimCursor::new(&[queue::STEPS.to_owned(), "bench".to_owned()]);
    for looks in 1.. {
        let claimed = claim::claim(&db.engine, session, &mut cursor, 1).await.unwrap();
        assert_eq!(claimed.len(), 1, "there is enough to do");
        if claimed[0].queue == queue::STEPS {
            assert_eq!(claimed[0].company, last[0]);
            break;
        }
        assert!(looks < 20, "it is still not its turn");
    }
}

/// The statements that every worker sends all the time, in a table that holds
/// much else: by index, and little of it.
#[tokio::test(flavor = "multi_thread")]
async fn the_hot_statements_read_little_however_much_waits() {
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
    let mut connection = db.pool.acquire().await.unwrap();
    let claim = include_str!("../../core/src/store/sql/claim.sql");
    // 32 rows, each found, locked, updated and put into two indexes.
    let given = arguments![session, queues(), vec![Uuid::nil()], 64, 32_i64, 10_000_i64];
    reads(&mut connection, "claim", claim, 1_000, given).await;
    let claim_on = include_str!("../../core/src/store/sql/claim_on.sql");
    let given = arguments![session, queues(), vec![company.0], vec![0_i16], vec![5_000_i64], 32_i64, 10_000_i64, 1_i64];
    reads(&mut connection, "claim_on", claim_on, 1_000, given).await;
    // Nobody is dead: it looks at what runs, 64 rows.
    let reclaim = include_str!("../../core/src/store/sql/reclaim.sql");
    reads(&mut connection, "reclaim", reclaim, 400, arguments![1_000_i64, 500.0_f64, 2_i16]).await;
    reads(&mut connection, "look", &statement("look"), 60, arguments![queues()]).await;
    reads(&mut connection, "promote", &statement("promote"), 30, arguments![1_000_i64]).await;
    let held: Vec<i64> =
        sqlx::query_scalar("select id from jobs where state = 'running'").fetch_all(&mut *connection).await.unwrap();
    let give_back = statement("give_back_unknown");
    reads(&mut connection, "give_back_unknown", &give_back, 200, arguments![session, held]).await;
}

/// The text of a statement of `store::jobs`, without sqlx's annotations.
fn statement(function: &str) -> String {
    let source = include_str!("../../core/src/store/jobs.rs");
    let from = source.find(&format!("pub async fn {function}(")).unwrap();
    let query = source[from..].find("sqlx::query!(").unwrap() + from;
    let (before, text) = source[query..].split_once('"').unwrap();
    let end = text.find(if before.ends_with("r#") { "\"#," } else { "\",\n" }).unwrap();
    text[..end].replace("!\"", "\"")
}

/// Runs a statement and asserts how it was carried out.
async fn reads(connection: &mut PgConnection, name: &str, sql: &str, buffers_max: i64, given: PgArguments) {
    let sql = format!("explain (analyze, buffers, format json) {sql}");
    let plan: Value = sqlx::query_scalar_with(sqlx::AssertSqlSafe(sql), given).fetch_one(connection).await.unwrap();
    let plan = &plan[0]["Plan"];
    assert!(!scans_jobs(plan), "{name}: {plan}");
    let read = plan["Shared Hit Blocks"].as_i64().unwrap() + plan["Shared Read Blocks"].as_i64().unwrap();
    assert!(read < buffers_max, "{name} read {read} buffers: {plan}");
}

fn scans_jobs(plan: &Value) -> bool {
    (plan["Node Type"] == "Seq Scan" && plan["Relation Name"] == "jobs")
        || plan["Plans"].as_array().is_some_and(|inner| inner.iter().any(scans_jobs))
}

/// Whatever a worker sends, no table that grows is read from end to end: also
/// not by a plan that was made while the table held next to nothing.
#[tokio::test(flavor = "multi_thread")]
async fn no_statement_of_a_worker_walks_a_table() {
    let db = Db::new().await;
    db.invents_events();
    let company = db.company(&["a"], "claude", serde_json::json!({})).await;
    let yaml = "name: p\nsteps:\n  - {id: a, action: transform, params: {v: 1}}\n  - {id: b, action: transform, params: {v: '${steps.a.output}'}}\n  - {id: c, action: transform, approval: {timeout: 50ms, on_timeout: approve}}\n  - {id: n, action: transform, params: {n: '${(steps.n.n ?? 0) + 1}'}, on_failure: continue}\n  - {goto: n, if: steps.n.n < 2, max_retries: 3}\n  - {sleep: 5ms}\n  - {id: e, for_each: [1, 2, 3], max_parallel: 2, action: transform, params: {n: '${item}'}}\n  - {id: w, wait_for: {event: go, match: {go: true}}}\n";
    let playbook = db.playbook(company, yaml).await;
    let one = async || {
        let run = db.start(company, playbook, serde_json::json!({})).await;
        let data = serde_json::json!({"go": true});
        let event = signals::Send { run: None, name: "go", data: &data, client_id: None };
        let mut tx = db.pool.begin().await.unwrap();
        signals::send(&mut tx, company, &event).await.unwrap();
        tx.commit().await.unwrap();
        db.until(company, run, capx_core::domain::run::RunStatus::Completed).await;
        // One that waits already is found by the event.
        let run = db.start(company, playbook, serde_json::json!({})).await;
        eventually("the run to wait", || async {
            db.run(company, run).await.waiting_on.is_some_and(|waiting| waiting[0]["type"] == "event")
        })
        .await;
        let mut tx = db.pool.begin().await.unwrap();
        signals::send(&mut tx, company, &event).await.unwrap();
        tx.commit().await.unwrap();
        db.until(company, run, capx_core::domain::run::RunStatus::Completed).await;
    };
    let worker = db.worker(crate::harness::SHORT_LEASE);
    one().await;
    worker.stop().await;
    let tables = db.with_months(&TABLES).await;
    for table in &tables {
        // Left alone from here on: autovacuum would have plans made anew.
        for sql in [format!("alter table {table} set (autovacuum_enabled = off)"), format!("vacuum analyze {table}")] {
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&db.pool).await.unwrap();
        }
    }
    // This one's plans are made now, and kept.
    let worker = db.worker(crate::harness::SHORT_LEASE);
    one().await;
    grow(&db, company).await;
    for _ in 0..GROWN_RUNS {
        one().await;
    }
    worker.stop().await;
    eventually("the server's counters", || async {
        db.count("select n_tup_ins from pg_stat_user_tables where relname = 'run_steps'").await
            >= 2 * 8 * i64::from(GROWN_RUNS) + GROWN_BY
    })
    .await;
    // No row by a scan; by an index fewer than one walk would read.
    let read: Vec<(String, i64, i64)> = sqlx::query_as(
        "select relname::text, seq_tup_read, 1 from pg_stat_user_tables where relname = any ($1)
         union all
         select indexrelname::text, idx_tup_read, $2 from pg_stat_user_indexes where relname = any ($1)",
    )
    .bind(&tables)
    .bind(GROWN_BY)
    .fetch_all(&db.pool)
    .await
    .unwrap();
    assert!(read.len() > 2 * tables.len());
    let walked: Vec<_> = read.iter().filter(|(_, rows, limit)| rows >= limit).collect();
    assert!(walked.is_empty(), "{walked:?}");
}

const TABLES: [&str; 12] = [
    "jobs",
    "runs",
    "run_steps",
    "run_fans",
    "run_items",
    "events",
    "approvals",
    "playbook_versions",
    "triggers",
    "signals",
    "signals_taken",
    "waits",
];
const GROWN_RUNS: u32 = 10;
const GROWN_BY: i64 = 5_000;

/// As many old rows in each table as a look that walks it would show.
async fn grow(db: &Db, company: CompanyId) {
    for table in [
        "insert into runs (company_id, id, playbook_id, version_id, job_id, status, trigger, params, ended_at)
         select $1, gen_random_uuid(), gen_random_uuid(), gen_random_uuid(), -n, 'completed', 'api', '{}', now()
         from generate_series(1, $2) n",
        "insert into run_steps (company_id, run_id, step, status)
         select $1, gen_random_uuid(), 0, 'completed' from generate_series(1, $2)",
        "insert into run_fans (company_id, run_id, step, round, job_id, items, begun, size, failures_max, lanes)
         select $1, gen_random_uuid(), 0, 0, -n, 1, 1, 1, 0, 0 from generate_series(1, $2) n",
        "insert into run_items (company_id, run_id, step, item, round, status, attempt, duration_ms, ended_at)
         select $1, gen_random_uuid(), 0, 0, 0, 'completed', 1, 0, now() from generate_series(1, $2)",
        "insert into triggers (company_id, playbook_id, kind, event)
         select $1, gen_random_uuid(), 'event', 'other' from generate_series(1, $2)",
        "insert into events (company_id, id, event, data)
         select $1, gen_random_uuid(), 'test', '{}' from generate_series(1, $2)",
        "insert into playbook_versions (company_id, id, playbook_id, version, yaml, content_hash)
         select $1, gen_random_uuid(), gen_random_uuid(), 1, '', '' from generate_series(1, $2)",
        "insert into approvals (company_id, id, run_id, step, job_id, status, action, playbook, step_name, context,
             digest, expires_at, decided_at)
         select $1, gen_random_uuid(), gen_random_uuid(), 0, -1, 'approved', '', '', '', '{}', '', now(), now()
         from generate_series(1, $2)",
        "insert into signals (company_id, id, name, data, received_at)
         select $1, gen_random_uuid(), case n % 2 when 0 then 'go' else 'other' end, '{}', now() - interval '1 hour'
         from generate_series(1, $2) n",
        "insert into signals_taken (company_id, run_id, signal_id)
         select $1, gen_random_uuid(), gen_random_uuid() from generate_series(1, $2)",
        // Of runs that are no more; a company's own id marks them.
        "insert into waits (company_id, run_id, step, job_id, name, match)
         select $1, $1, n, -1, 'other', '{}' from generate_series(1, $2) n",
        "insert into jobs (queue, kind, company_id, state, due_at)
         select 'later', 'test', $1, 'scheduled', now() + interval '1 day' from generate_series(1, $2)",
    ] {
        sqlx::query(table).bind(company.0).bind(GROWN_BY).execute(&db.pool).await.unwrap();
    }
}
