//! Processes that die at named points, at once and without a goodbye:
//! whatever they were doing, others bring it to the same end. Every point of
//! the program is walked; a new one without its test fails the last test here.

use capx_core::domain::ids::{ApprovalId, CompanyId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::failpoint;
use rustix::process::Signal;
use serde_json::json;

use crate::harness::witness::Witness;
use crate::harness::{Db, eventually};
use crate::process::{Process, api, free_address};

/// On the way of a run whose first call fails once.
const WORKER: &[&str] = &[
    "session.opened",
    "claim.before",
    "claim.after_commit",
    "load.before",
    "attempt.before_handler",
    "attempt.after_handler",
    "commit.before",
    "commit.after",
    "settle.before",
    "settle.after",
    "promote.before",
    "promote.after",
];
/// When a dead worker's jobs are taken over.
const TAKEOVER: &[&str] = &["sweep.before", "sweep.buried", "sweep.after_commit"];
/// At the end of a stopping worker.
const DRAIN: &[&str] = &["session.before_end"];
/// In an API process; how many runs there are afterwards.
const START: &[(&str, i64)] = &[("start.before_commit", 0), ("start.after_commit", 1)];
/// In an API process; whether the gate is open afterwards.
const APPROVE: &[(&str, bool)] = &[("command.before_commit", false), ("command.after_commit", true)];
/// When a gate decides itself.
const EXPIRE: &[&str] = &["expire.before_commit", "expire.after_commit"];

/// A run with two effects and something between them.
async fn effects(db: &Db, witness: &Witness, name: &str) -> (CompanyId, RunId) {
    let company = db.company(&["a"], "claude", json!({})).await;
    let call = |id: &str| {
        format!(
            "  - {{id: {id}, action: http.request, params: {{method: POST, url: '{}'}}, retry: {{max_attempts: 3, initial: 20ms}}}}\n",
            witness.url
        )
    };
    let yaml = format!(
        "name: {name}\nsteps:\n{}  - {{id: mid, action: transform, params: {{v: '${{steps.first.output.status}}'}}}}\n{}",
        call("first"),
        call("last")
    );
    let playbook = db.playbook(company, &yaml).await;
    (company, db.start(company, playbook, json!({})).await)
}

/// The run is whole: every step once, each effect under one key.
async fn assert_whole(db: &Db, witness: &Witness, company: CompanyId, run: RunId, point: &str) {
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(witness.calls().len(), 2, "{point}: one key an effect: {:?}", witness.calls());
    let completed: i64 =
        sqlx::query_scalar("select count(*) from events where run_id = $1 and event = 'step.completed'")
            .bind(run.0)
            .fetch_one(&db.pool)
            .await
            .unwrap();
    assert_eq!(completed, 3, "{point}: a step completed twice or never");
    eventually("every job to be done", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_die_at_every_point_of_its_way() {
    for point in WORKER {
        let db = Db::new().await;
        let witness = Witness::start(&[503]).await;
        let (company, run) = effects(&db, &witness, "crash").await;
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        assert_whole(&db, &witness, company, run, point).await;
        if *point == "commit.after" {
            let calls: u32 = witness.calls().values().sum();
            assert_eq!(calls, 3, "what was committed was done again");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_takes_over_may_die_too() {
    for point in TAKEOVER {
        let db = Db::new().await;
        let witness = Witness::start(&[]).await;
        let (company, run) = effects(&db, &witness, "takeover").await;
        Process::worker(&db, "attempt.after_handler=kill@1").dies_at("attempt.after_handler").await;
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        assert_whole(&db, &witness, company, run, point).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopping_worker_may_die_before_it_has_said_goodbye() {
    for point in DRAIN {
        let db = Db::new().await;
        let witness = Witness::start(&[]).await;
        let (company, run) = effects(&db, &witness, "drain").await;
        let worker = Process::worker(&db, &format!("{point}=kill@1"));
        eventually("a session", || async {
            db.count("select count(*) from worker_sessions where ended_at is null").await == 1
        })
        .await;
        worker.signal(Signal::TERM);
        worker.dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        assert_whole(&db, &witness, company, run, point).await;
        eventually("the dead one to be found", || async {
            db.count("select count(*) from worker_sessions where state = 'dead'").await == 1
        })
        .await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_of_the_database_lose_and_double_nothing() {
    // The answers to commits, and to a claim: found again, and given back.
    for (point, hit) in [("commit.before", 2), ("commit.after", 2), ("claim.after_commit", 1)] {
        let db = Db::new().await;
        let witness = Witness::start(&[]).await;
        let (company, run) = effects(&db, &witness, "lost").await;
        // The commit fails, or it lands and only its answer is lost.
        let worker = Process::worker(&db, &format!("{point}=fail@{hit}"));
        assert_whole(&db, &witness, company, run, point).await;
        assert!(witness.calls().values().all(|calls| *calls == 1), "{point}: {:?}", witness.calls());
        worker.was_at(point);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_process_may_die_before_and_after_its_commit() {
    for (point, runs) in START {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, "name: x\nsteps: [{id: a, action: transform}]\n").await;
        let key = db.key(&["*"]).await;
        let bind = free_address();
        let (process, client) = api(&db, &bind, &format!("{point}=kill@1")).await;
        let answer = client
            .post(format!("http://{bind}/v1/companies/{company}/playbooks/{playbook}/run"))
            .bearer_auth(&key)
            .send()
            .await;
        assert!(answer.is_err(), "{point}: the process answered");
        process.dies_at(point).await;
        let count: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&db.pool).await.unwrap();
        assert_eq!(count, *runs, "{point}");
        let _worker = Process::worker(&db, "");
        eventually("every accepted run to end", || async {
            db.count("select count(*) from runs where status <> 'completed'").await == 0
        })
        .await;
        db.assert_nothing_stranded().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_start_whose_answer_is_lost_is_found_again() {
    for point in ["start.before_commit", "start.after_commit"] {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, "name: x\nsteps: [{id: a, action: transform}]\n").await;
        let key = db.key(&["*"]).await;
        let bind = free_address();
        let (process, client) = api(&db, &bind, &format!("{point}=fail@1")).await;
        let run = format!("http://{bind}/v1/companies/{company}/playbooks/{playbook}/run");
        let answer = client.post(run).bearer_auth(&key).send().await.unwrap();
        assert_eq!(answer.status(), 201, "{point}");
        let body: serde_json::Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        assert!(body["data"]["started_at"].is_string(), "{point}: {body}");
        assert_eq!(db.count("select count(*) from runs").await, 1, "{point}");
        process.was_at(point);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_survives_the_death_of_its_process() {
    for (point, approved) in APPROVE {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, "name: g\nsteps: [{id: a, action: transform, approval: required}]\n").await;
        let run = db.start(company, playbook, json!({})).await;
        let id: uuid::Uuid = sqlx::query_scalar("select id from approvals").fetch_one(&db.pool).await.unwrap();
        let key = db.key(&["*"]).await;
        let bind = free_address();
        let approve = format!("http://{bind}/v1/approvals/{}/approve", ApprovalId(id));
        let (process, client) = api(&db, &bind, &format!("{point}=kill@1")).await;
        assert!(client.post(&approve).bearer_auth(&key).send().await.is_err());
        process.dies_at(point).await;
        let status = db.run(company, run).await.status;
        assert_eq!(status, if *approved { RunStatus::Running } else { RunStatus::Suspended }, "{point}");
        // The client does what clients do: it asks again.
        let (_api, client) = api(&db, &bind, "").await;
        eventually("the approval", || async {
            client.post(&approve).bearer_auth(&key).send().await.is_ok_and(|r| r.status().is_success())
        })
        .await;
        let _worker = Process::worker(&db, "");
        db.until(company, run, RunStatus::Completed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_decides_itself_though_its_worker_dies_over_it() {
    for point in EXPIRE {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let yaml = "name: g\nsteps: [{id: a, action: transform, approval: {timeout: 50ms, on_timeout: approve}}]\n";
        let playbook = db.playbook(company, yaml).await;
        let run = db.start(company, playbook, json!({})).await;
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        db.until(company, run, RunStatus::Completed).await;
        assert_eq!(db.count("select count(*) from events where event = 'approval.resolved'").await, 1, "{point}");
        db.assert_nothing_stranded().await;
    }
}

#[test]
fn every_point_has_its_death() {
    let mut walked: Vec<&str> = [
        WORKER,
        TAKEOVER,
        DRAIN,
        EXPIRE,
        crate::triggers::FIRE,
        crate::walk::CALL,
        crate::concurrency::ADMIT,
        crate::agents::POINTS,
        crate::agents::LEFT,
        crate::heartbeats::POINTS,
        crate::deliveries::POINTS,
    ]
    .concat();
    walked.extend(crate::artifacts::KEPT.iter().map(|(point, _)| point));
    walked.extend(START.iter().map(|(point, _)| point));
    walked.extend(APPROVE.iter().map(|(point, _)| point));
    walked.sort_unstable();
    walked.dedup();
    let mut all = failpoint::POINTS.to_vec();
    all.sort_unstable();
    assert_eq!(walked, all);
}
