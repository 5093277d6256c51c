//! Workers that die, freeze or stop in the midst of work: what becomes of
//! what they had in their hands.

use std::sync::Arc;
use std::time::Duration;

use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use rustix::process::Signal;
use serde_json::json;
use tokio::sync::Notify;

use crate::harness::witness::Witness;
use crate::harness::{Db, eventually};
use crate::process::Process;

/// An endpoint that answers after a while, and tells of every call of
/// `/poison`, which it never answers.
async fn slow_endpoint(after: Duration) -> (String, Arc<Notify>) {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let poisoned = Arc::new(Notify::new());
    let bite = Arc::clone(&poisoned);
    let router = axum::Router::new()
        .route(
            "/poison",
            axum::routing::any(async move || {
                bite.notify_one();
                std::future::pending::<()>().await;
            }),
        )
        .fallback(async move || {
            tokio::time::sleep(after).await;
            "{}"
        });
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, poisoned)
}

fn call(name: &str, url: &str) -> String {
    format!("name: {name}\nsteps: [{{id: a, action: http.request, params: {{url: '{url}'}}}}]\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_kills_its_workers_is_quarantined_and_takes_no_other_with_it() {
    let db = Db::new().await;
    let (url, poisoned) = slow_endpoint(Duration::from_millis(150)).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let innocent = db.playbook(company, &call("innocent", &url)).await;
    let poison = db.playbook(company, &call("poison", &format!("{url}/poison"))).await;
    let mut innocents = Vec::new();
    for _ in 0..6 {
        innocents.push(db.start(company, innocent, json!({})).await);
    }
    let poison = db.start(company, poison, json!({})).await;
    // Whoever calls the poison is killed with everything in its hands, and
    // whoever supervises workers starts another.
    let mut deaths = 0;
    let mut worker = Process::worker(&db, "");
    while db.run(company, poison).await.status == RunStatus::Running {
        let bitten = tokio::time::timeout(Duration::from_millis(50), poisoned.notified()).await.is_ok();
        if bitten {
            deaths += 1;
            drop(worker);
            if deaths == 1 {
                let blamed = db.count("select count(*) from jobs where state = 'running'").await;
                assert!(blamed > 1, "no innocent was in the same hands");
            }
            worker = Process::worker(&db, "");
        }
    }
    assert_eq!(deaths, 3);
    for run in innocents {
        db.until(company, run, RunStatus::Completed).await;
    }
    let row = db.until(company, poison, RunStatus::Failed).await;
    let error = row.error.unwrap();
    assert_eq!(error["code"], "crash", "{error}");
    assert!(error["message"].as_str().unwrap().contains("quarantine"), "{error}");
    assert_eq!(db.count("select count(*) from dead_letters").await, 1);
    assert_eq!(db.count("select count(*) from dead_letters where reason = 'quarantined' and crash_count = 3").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_hands_back_what_it_cannot_finish() {
    let db = Db::new().await;
    // Longer than any drain, the first time.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let first = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let router = axum::Router::new().fallback(async move || {
        if first.swap(false, std::sync::atomic::Ordering::Relaxed) {
            std::future::pending::<()>().await;
        }
        "{}"
    });
    tokio::spawn(async move { axum::serve(listener, router).await });
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, &call("long", &url)).await;
    let run = db.start(company, playbook, json!({})).await;
    let mut worker = Process::worker(&db, "");
    eventually("the step to be shown as running", || async {
        db.count("select count(*) from run_steps where status = 'running'").await == 1
    })
    .await;
    worker.signal(Signal::TERM);
    worker.ended().await;
    // In order: nothing is left to be found dead, and no try was charged.
    assert_eq!(db.count("select count(*) from worker_sessions where state = 'ended'").await, 1);
    assert_eq!(
        db.count(
            "select count(*) from jobs where kind = 'step' and state = 'ready' and attempt = 0 and crash_count = 0"
        )
        .await,
        1
    );
    let _other = Process::worker(&db, "");
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(db.count("select count(*) from run_steps where attempt = 1 and status = 'completed'").await, 1);
}

/// How soon a dead worker's jobs run again, with a short lease here; the
/// figure for the default lease is printed by
/// `CAPX_LEASE=30s cargo test --release --test it taken_over -- --nocapture`.
#[tokio::test(flavor = "multi_thread")]
async fn a_dead_workers_jobs_are_taken_over() {
    let db = Db::new().await;
    let (url, _) = slow_endpoint(Duration::from_secs(3_600)).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, &call("long", &url)).await;
    // Twelve workers with eight jobs each, that die at different moments.
    let mut victims = Vec::new();
    for _ in 0..12 {
        for _ in 0..8 {
            db.start(company, playbook, json!({})).await;
        }
        victims.push(Process::worker(&db, ""));
        let held = 8 * victims.len() as i64;
        eventually("them to be in its hands", || async {
            db.count("select count(*) from jobs where kind = 'step' and state = 'running'").await == held
        })
        .await;
    }
    sqlx::raw_sql("create table deaths (session_id bigint primary key, at timestamptz default clock_timestamp())")
        .execute(&db.pool)
        .await
        .unwrap();
    let _survivor = Process::start(&db, &["worker", "--concurrency", "200"], "");
    eventually("the survivor", || async {
        db.count("select count(*) from worker_sessions where ended_at is null").await == 13
    })
    .await;
    let sessions: Vec<i64> =
        sqlx::query_scalar("select id from worker_sessions order by id").fetch_all(&db.pool).await.unwrap();
    for (victim, session) in victims.into_iter().zip(&sessions) {
        drop(victim);
        sqlx::query("insert into deaths (session_id) values ($1)").bind(session).execute(&db.pool).await.unwrap();
        tokio::time::sleep(Duration::from_millis(90)).await;
    }
    // A retaken job is noted with the session it had before: by its count of
    // deaths, and its deadline says when it was claimed.
    eventually("every job to run again", || async {
        db.count("select count(*) from jobs where kind = 'step' and state = 'running' and crash_count = 1").await == 96
    })
    .await;
    let mut took: Vec<f64> = sqlx::query_scalar(
        "select extract(epoch from deadline_at - timeout_ms * interval '1 ms' - interval '10 s' - d.at)::float8
         from (select j.*, row_number() over (order by id) as n from jobs j where kind = 'step') j
         join (select d.*, row_number() over (order by session_id) as n from deaths d) d on d.n = (j.n - 1) / 8 + 1",
    )
    .fetch_all(&db.pool)
    .await
    .unwrap();
    took.sort_by(f64::total_cmp);
    println!(
        "running again after: median {:.2} s, p99 and longest {:.2} s, of {} jobs",
        took[48],
        took[95],
        took.len()
    );
    assert_eq!(db.count("select count(*) from worker_sessions where state = 'dead'").await, 12);
}

/// Twenty runs of so many calls, each of which the witness counts.
async fn twenty_runs(db: &Db, calls: usize) -> (Witness, CompanyId, PlaybookId, Vec<RunId>) {
    let witness = Witness::start(&[]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let steps: String = (0..calls)
        .map(|i| {
            format!(
                "  - {{id: s{i}, action: http.request, params: {{url: '{}/{i}'}}, retry: {{initial: 20ms}}}}\n",
                witness.url
            )
        })
        .collect();
    let playbook = db.playbook(company, &format!("name: calls\nsteps:\n{steps}")).await;
    let mut all = Vec::new();
    for _ in 0..20 {
        all.push(db.start(company, playbook, json!({})).await);
    }
    (witness, company, playbook, all)
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_everything_changes_no_result() {
    let db = Db::new().await;
    let (witness, company, _, all) = twenty_runs(&db, 6).await;
    for _ in 0..4 {
        let (a, b) = (Process::worker(&db, ""), Process::worker(&db, ""));
        eventually("a worker", || async {
            db.count("select count(*) from worker_sessions where ended_at is null").await > 0
        })
        .await;
        tokio::time::sleep(Duration::from_millis(40)).await;
        // SIGKILL, both at once.
        drop((a, b));
    }
    let _survivor = Process::worker(&db, "");
    for run in all {
        db.until(company, run, RunStatus::Completed).await;
    }
    assert_eq!(witness.calls().len(), 120);
    assert_eq!(db.count("select count(*) from events where event = 'step.completed'").await, 120);
    eventually("the dead to be found", || async {
        db.count("select count(*) from worker_sessions where state = 'dead'").await > 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_was_frozen_past_its_lease_overwrites_nothing() {
    let db = Db::new().await;
    let (witness, company, playbook, mut all) = twenty_runs(&db, 8).await;
    let frozen = Process::worker(&db, "");
    eventually("work in its hands", || async {
        db.count("select count(*) from jobs where state = 'running'").await > 0
    })
    .await;
    // Twice, so that it thaws in the midst of others' work and of its own next
    // session's; a third time, and what it holds could rightly be quarantined.
    let mut other = None;
    for _ in 0..2 {
        frozen.signal(Signal::STOP);
        let dead = db.count("select count(*) from worker_sessions where state = 'dead'").await;
        other = Some(Process::worker(&db, ""));
        let more_work: Vec<RunId> = vec![db.start(company, playbook, json!({})).await];
        all.extend(more_work);
        eventually("the frozen one to be found dead", || async {
            db.count("select count(*) from worker_sessions where state = 'dead'").await > dead
        })
        .await;
        frozen.signal(Signal::CONT);
        all.push(db.start(company, playbook, json!({})).await);
        eventually("a new session of its own", || async {
            db.count("select count(*) from worker_sessions where ended_at is null").await >= 2
        })
        .await;
    }
    let runs = all.len() as i64;
    for run in all {
        db.until(company, run, RunStatus::Completed).await;
    }
    drop(other);
    assert_eq!(db.count("select count(*) from events where event = 'step.completed'").await, runs * 8);
    assert_eq!(db.count("select count(*) from run_steps where status = 'completed'").await, runs * 8);
    assert_eq!(witness.calls().len() as i64, runs * 8);
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_tells_of_itself_where_it_is_told_to() {
    let db = Db::new().await;
    let bind = crate::process::free_address();
    let _worker = Process::start(&db, &["worker", "--bind", &bind], "");
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, "name: x\nsteps: [{id: a, action: transform}]\n").await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    for path in ["healthz", "readyz"] {
        assert!(client.get(format!("http://{bind}/{path}")).send().await.unwrap().status().is_success(), "{path}");
    }
    let metrics = client.get(format!("http://{bind}/metrics")).send().await.unwrap().text().await.unwrap();
    assert!(metrics.contains("capx_steps_committed_total 1"), "{metrics}");
    assert_eq!(client.get(format!("http://{bind}/v1/companies")).send().await.unwrap().status(), 404);
}
