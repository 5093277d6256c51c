//! Runs of a playbook that are not to be under way at once: who waits, who is refused,
//! who goes, and that whoever waits begins when somebody has ended, however that was.

use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

/// When a run ends and others of its kind begin.
pub const ADMIT: &[&str] = &["admit.before_commit", "admit.after_commit"];

fn calling(witness: &Witness, rule: &str) -> String {
    format!(
        "name: x
inputs: {{n: {{type: integer, default: 0}}, of: {{default: a}}}}
concurrency: {rule}
steps:
  - {{id: skipped, if: 'false', action: transform}}
  - {{id: call, action: http.request, params: {{method: POST, url: '{}/${{inputs.n}}'}}}}
",
        witness.url
    )
}

async fn start(api: &Api, company: CompanyId, playbook: PlaybookId, params: Value) -> (u16, Value) {
    api.post(&format!("/v1/companies/{company}/playbooks/{playbook}/run"), json!({"params": params})).await
}

fn id(body: &Value) -> RunId {
    body["data"]["run_id"].as_str().unwrap_or_else(|| panic!("{body}")).parse().unwrap()
}

async fn until_idle(db: &Db) {
    eventually("every job to be done", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_wait_for_their_turn_and_begin_in_order() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let playbook = db.playbook(company, &calling(&witness, "{key: '${inputs.of}', limit: 2}")).await;
    let mut runs = Vec::new();
    for n in 0..6 {
        let (status, body) = start(&api, company, playbook, json!({"n": n})).await;
        assert_eq!(
            (status, &body["data"]["status"]),
            (201, &json!(if n < 2 { "running" } else { "queued" })),
            "{body}"
        );
        runs.push(id(&body));
    }
    // Of another group.
    let (_, other) = start(&api, company, playbook, json!({"n": 9, "of": "b"})).await;
    assert_eq!(other["data"]["status"], "running", "{other}");
    let _worker = db.worker(SHORT_LEASE);
    eventually("three calls", || async { witness.held_calls() == 3 }).await;
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{}", runs[2]);
    let told = api.get(&path).await.1["data"].clone();
    assert_eq!(
        (&told["status"], &told["waiting_on"][0]["type"], &told["waiting_on"][0]["id"]),
        (&json!("queued"), &json!("concurrency"), &json!("a")),
        "{told}"
    );
    // One that waits can be cancelled like any other.
    let (status, body) =
        api.post(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{}/cancel", runs[4]), json!({})).await;
    assert_eq!((status, &body["data"]["status"]), (200, &json!("cancelled")), "{body}");
    assert_eq!(witness.calls().len(), 3);
    witness.hold(false);
    for run in [0, 1, 2, 3, 5].map(|at| runs[at]) {
        db.until(company, run, RunStatus::Completed).await;
    }
    let order: Vec<RunId> = sqlx::query_scalar::<_, uuid::Uuid>(
        "select id from runs where status = 'completed' and concurrency_key = 'a' order by started_at",
    )
    .fetch_all(&db.pool)
    .await
    .unwrap()
    .into_iter()
    .map(RunId)
    .collect();
    assert_eq!(order[2..], [runs[2], runs[3], runs[5]]);
    until_idle(&db).await;
    assert_eq!(db.count("select count(*) from events where event = 'playbook.queued'").await, 4);
    assert_eq!(db.count("select count(*) from events where event = 'playbook.started'").await, 6);
}

#[tokio::test(flavor = "multi_thread")]
async fn one_more_is_refused_or_the_same_or_takes_the_place_of_others() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let _worker = db.worker(SHORT_LEASE);
    let named = async |rule: &str| {
        db.playbook(company, &calling(&witness, rule).replace("name: x", &format!("name: '{rule}'"))).await
    };
    let rejecting = named("{on_conflict: reject}").await;
    let first = id(&start(&api, company, rejecting, json!({})).await.1);
    let (status, body) = start(&api, company, rejecting, json!({})).await;
    assert_eq!(status, 409, "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("is under way"), "{body}");

    let coalescing = named("{on_conflict: coalesce}").await;
    let one = id(&start(&api, company, coalescing, json!({})).await.1);
    let (status, body) = start(&api, company, coalescing, json!({})).await;
    assert_eq!((status, id(&body)), (200, one), "{body}");

    let replacing = named("{on_conflict: replace_pending}").await;
    let running = id(&start(&api, company, replacing, json!({})).await.1);
    let pending = id(&start(&api, company, replacing, json!({})).await.1);
    let last = id(&start(&api, company, replacing, json!({})).await.1);
    assert_eq!(db.run(company, pending).await.status, RunStatus::Cancelled);
    assert_eq!(db.run(company, last).await.status, RunStatus::Queued);

    let cancelling = named("{on_conflict: cancel_running}").await;
    let old = id(&start(&api, company, cancelling, json!({})).await.1);
    let (_, body) = start(&api, company, cancelling, json!({})).await;
    assert_eq!(body["data"]["status"], "running", "{body}");
    assert_eq!(db.run(company, old).await.status, RunStatus::Cancelled);
    witness.hold(false);
    for run in [first, one, running, last, id(&body)] {
        db.until(company, run, RunStatus::Completed).await;
    }
    until_idle(&db).await;
}

/// Many at once, and a retry among them.
#[tokio::test(flavor = "multi_thread")]
async fn never_more_are_under_way_than_may_be() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[400]).await;
    let playbook = db.playbook(company, &calling(&witness, "2")).await;
    let failed = id(&start(&api, company, playbook, json!({"n": 99})).await.1);
    let _worker = db.worker(SHORT_LEASE);
    db.until(company, failed, RunStatus::Failed).await;
    witness.hold(true);
    let starts = (0..40).map(|n| start(&api, company, playbook, json!({"n": n})));
    let started = futures_util::future::join_all(starts).await;
    let statuses: Vec<&Value> = started.iter().map(|(_, body)| &body["data"]["status"]).collect();
    assert_eq!(statuses.iter().filter(|status| **status == "running").count(), 2, "{statuses:?}");
    eventually("two calls", || async { witness.held_calls() == 2 }).await;
    let retry = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{failed}/retry");
    let (status, body) = api.post(&retry, json!({})).await;
    assert_eq!(status, 409, "{body}");
    assert_eq!(db.count("select count(*) from runs where status = 'running'").await, 2);
    witness.hold(false);
    eventually("all to be done", || async {
        db.count("select count(*) from runs where status = 'completed'").await == 40
    })
    .await;
    // From what happened: how many were under way at each moment.
    let most: i64 = sqlx::query_scalar(
        "select max(n)::bigint from (
             select sum(d) over (order by at, d) as n from (
                 select started_at as at, 1 as d from runs where status = 'completed'
                 union all select ended_at, -1 from runs where status = 'completed') x) y",
    )
    .fetch_one(&db.pool)
    .await
    .unwrap();
    assert_eq!(most, 2);
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn those_that_wait_begin_whoever_dies_over_it() {
    for point in ADMIT {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let witness = Witness::start(&[]).await;
        let playbook = db.playbook(company, &calling(&witness, "1")).await;
        let runs =
            [db.start(company, playbook, json!({"n": 1})).await, db.start(company, playbook, json!({"n": 2})).await];
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        for run in runs {
            db.until(company, run, RunStatus::Completed).await;
        }
        assert_eq!(witness.calls().len(), 2, "{point}");
        until_idle(&db).await;
    }
}

/// A run that calls another of its own group would wait for itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_does_not_wait_for_itself() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: x\nconcurrency: 1\nsteps: [{id: c, if: 'true', playbook: x}]\n";
    let playbook = db.playbook(company, yaml).await;
    let _worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({})).await;
    let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    assert!(error["message"].as_str().unwrap().contains("would wait for one that waits for it"), "{error}");
    // Of another playbook, it waits its turn.
    db.playbook(company, "name: one\nconcurrency: 1\nsteps: [{id: nap, sleep: 20ms}]\n").await;
    let all = "name: all\nsteps: [{id: each, for_each: [1, 2, 3], max_parallel: 3, playbook: one}]\n";
    let all = db.playbook(company, all).await;
    let run = db.start(company, all, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    until_idle(&db).await;
}
