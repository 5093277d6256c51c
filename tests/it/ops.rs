//! What operators see and repair.

use capx_core::domain::run::RunStatus;
use capx_core::store::tenants;
use serde_json::json;

use crate::harness::witness::Witness;
use crate::harness::{Db, SHORT_LEASE, eventually};

#[tokio::test(flavor = "multi_thread")]
async fn the_fleet_is_seen_by_whoever_runs_the_server() {
    let db = Db::new().await;
    let api = db.api().await;
    assert_eq!(api.get("/v1/workers").await.1["data"], json!([]));
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let first = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let call = format!(
        "name: c\nsteps: [{{id: a, action: http.request, params: {{method: POST, url: '{}'}}}}]\n",
        witness.url
    );
    let playbook = db.playbook(company, &call).await;
    let run = db.start(company, playbook, json!({})).await;
    eventually("the call", || async { witness.held_calls() == 1 }).await;
    // The company's provisioning may still be in hand, too.
    eventually("one job", || async { api.get("/v1/workers").await.1["data"][0]["jobs"] == 1 }).await;
    let (status, answer) = api.get("/v1/workers").await;
    let worker = &answer["data"][0];
    assert_eq!((status, &worker["status"]), (200, &json!("active")), "{answer}");
    assert_eq!(worker["lease"], json!(SHORT_LEASE.as_secs_f64()));
    assert!(worker["queues"].as_array().unwrap().contains(&json!("steps")));
    // Pages of one, newest first.
    let second = db.worker(SHORT_LEASE);
    eventually("two workers", || async { api.get("/v1/workers").await.1["data"].as_array().unwrap().len() == 2 }).await;
    let (_, page) = api.get("/v1/workers?limit=1").await;
    let cursor = page["meta"]["cursor"].as_str().unwrap();
    let (_, rest) = api.get(&format!("/v1/workers?limit=1&cursor={cursor}")).await;
    assert_eq!((&rest["data"][0]["id"], &rest["meta"]["has_more"]), (&worker["id"], &json!(false)));
    for bad in ["cursor=x", "cursor=-1", "cursor=0", "limit=0", "limit=201", "status=odd"] {
        assert_eq!(api.get(&format!("/v1/workers?{bad}")).await.0, 400, "{bad}");
    }
    witness.hold(false);
    db.until(company, run, RunStatus::Completed).await;
    first.stop().await;
    second.stop().await;
    assert_eq!(api.get("/v1/workers").await.1["data"], json!([]), "who has ended is none");
    // Another account has a key for everything, and still not for the fleet;
    // nor has a key that is bound to one company.
    let other = tenants::account(&db.pool, "tenant", "pro").await.unwrap();
    let tenant = capx::keys::make(&db.pool, other, None, "t", true, &["*".into()]).await.unwrap();
    let bound = capx::keys::make(&db.pool, db.account, Some(company), "b", true, &["*".into()]).await.unwrap();
    for key in [tenant.key, bound.key] {
        let (status, answer) = api.with(&key).get("/v1/workers").await;
        assert_eq!(status, 403, "{answer}");
        assert!(answer["error"]["message"].as_str().unwrap().contains("runs the server"));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_dead_letter_is_seen_with_its_evidence_and_retried() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[400]).await;
    let call = format!(
        "name: c\nsteps: [{{id: a, action: http.request, params: {{method: POST, url: '{}'}}}}]\n",
        witness.url
    );
    let playbook = db.playbook(company, &call).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Failed).await;
    let (_, answer) = api.get(&format!("/v1/dead-letters?reason=invalid&company_id={company}")).await;
    let letter = &answer["data"][0];
    assert_eq!(letter["run_id"], json!(run.to_string()), "{answer}");
    assert!(letter["error"]["message"].as_str().unwrap().contains("the answer was 400"));
    let path = format!("/v1/dead-letters/{}/retry", letter["id"].as_str().unwrap());
    let (status, answer) = api.post(&path, json!({})).await;
    assert_eq!((status, &answer["data"]["run_id"]), (200, &letter["run_id"]), "{answer}");
    db.until(company, run, RunStatus::Completed).await;
    // It is gone with its cause.
    assert_eq!(api.get("/v1/dead-letters").await.1["data"], json!([]));
    assert_eq!(api.post(&path, json!({})).await.0, 404);
    for bad in ["reason=odd", "cursor=x", "limit=101"] {
        assert_eq!(api.get(&format!("/v1/dead-letters?{bad}")).await.0, 400, "{bad}");
    }
    assert_eq!(api.get("/v1/dead-letters?company_id=co_x").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_retried_by_filter_and_one_that_cannot_be_holds_up_no_other() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let witness = Witness::start(&[400; 6]).await;
    let call = format!(
        "name: c\nsteps: [{{id: a, action: http.request, params: {{method: POST, url: '{}'}}}}]\n",
        witness.url
    );
    let mut runs = Vec::new();
    for _ in 0..2 {
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, &call).await;
        for _ in 0..3 {
            let run = db.start(company, playbook, json!({})).await;
            db.until(company, run, RunStatus::Failed).await;
            runs.push((company, run));
        }
    }
    // One company is paused: its letters stay, and say so.
    let (paused, running) = (runs[0].0, runs[3].0);
    assert_eq!(api.post(&format!("/v1/companies/{paused}/pause"), json!({})).await.0, 200);
    for bad in [json!({"reason": "odd"}), json!({"limit": 0}), json!({"limit": 201}), json!({"cursor": "x"})] {
        assert_eq!(api.post("/v1/dead-letters/retry", bad.clone()).await.0, 400, "{bad}");
    }
    assert_eq!(api.post("/v1/dead-letters/retry", json!({"company_id": "co_x"})).await.0, 404);
    let (status, none) = api.post("/v1/dead-letters/retry", json!({"reason": "quarantined"})).await;
    assert_eq!((status, &none["data"]), (200, &json!({"retried": [], "refused": [], "cursor": null})));
    // In pages, behind what was refused.
    let mut cursor = json!(null);
    let (mut retried, mut refused) = (0, 0);
    loop {
        let mut body = json!({"reason": "invalid", "limit": 2});
        if cursor.is_string() {
            body["cursor"] = cursor;
        }
        let (status, answer) = api.post("/v1/dead-letters/retry", body).await;
        assert_eq!(status, 200, "{answer}");
        retried += answer["data"]["retried"].as_array().unwrap().len();
        for one in answer["data"]["refused"].as_array().unwrap() {
            assert!(one["message"].as_str().unwrap().contains("the company is paused"), "{one}");
            refused += 1;
        }
        cursor = answer["data"]["cursor"].clone();
        if cursor.is_null() {
            break;
        }
    }
    assert_eq!((retried, refused), (3, 3));
    for (company, run) in &runs[3..] {
        db.until(*company, *run, RunStatus::Completed).await;
    }
    let (_, left) = api.get("/v1/dead-letters").await;
    assert_eq!(left["data"].as_array().unwrap().len(), 3);
    assert_eq!(api.get(&format!("/v1/dead-letters?company_id={running}")).await.1["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_queue_gives_nothing_until_it_is_resumed() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, "name: c\nsteps: [{id: a, action: transform}]\n").await;
    let worker = db.worker(SHORT_LEASE);
    assert_eq!(api.post("/v1/queues/stps/pause", json!({})).await.0, 404, "a slip pauses nothing");
    let (status, answer) = api.post("/v1/queues/steps/pause", json!({"reason": "the model is down"})).await;
    assert_eq!((status, &answer["data"]["paused"]), (200, &json!(true)), "{answer}");
    // The first word stays.
    let (_, again) = api.post("/v1/queues/steps/pause", json!({"reason": "another"})).await;
    assert_eq!(again["data"], answer["data"]);
    let runs = [db.start(company, playbook, json!({})).await, db.start(company, playbook, json!({})).await];
    // Other queues go on.
    let _other = db.company(&["b"], "claude", json!({})).await;
    eventually("its agents", || async {
        db.count("select count(*) from companies where status = 'running'").await == 2
    })
    .await;
    worker.stop().await;
    let worker = db.worker(SHORT_LEASE);
    eventually("a new worker", || async { api.get("/v1/workers").await.1["data"].as_array().unwrap().len() == 1 })
        .await;
    let (_, queues) = api.get("/v1/queues").await;
    let steps = queues["data"].as_array().unwrap().iter().find(|queue| queue["name"] == "steps").unwrap();
    assert_eq!(
        (&steps["depth"], &steps["running"], &steps["paused"]),
        (&json!(2), &json!(0), &json!(true)),
        "{queues}"
    );
    assert_eq!(steps["reason"], "the model is down");
    assert!(steps["oldest_age"].as_f64().is_some_and(|age| age >= 0.0), "{steps}");
    let (_, jobs) = api.get(&format!("/v1/jobs?company_id={company}&queue=steps&status=ready&kind=step")).await;
    let listed: Vec<&str> = jobs["data"].as_array().unwrap().iter().filter_map(|job| job["run_id"].as_str()).collect();
    assert_eq!(listed, [runs[1].to_string(), runs[0].to_string()], "newest first");
    let (_, page) = api.get("/v1/jobs?queue=steps&limit=1").await;
    let cursor = page["meta"]["cursor"].as_str().unwrap();
    let (_, rest) = api.get(&format!("/v1/jobs?queue=steps&limit=1&cursor={cursor}")).await;
    assert_eq!(rest["data"][0]["run_id"], json!(runs[0].to_string()));
    for bad in ["status=odd", "limit=0", "limit=201", "cursor=x", "cursor=0"] {
        assert_eq!(api.get(&format!("/v1/jobs?{bad}")).await.0, 400, "{bad}");
    }
    let (status, answer) = api.post("/v1/queues/steps/resume", json!({})).await;
    assert_eq!((status, &answer["data"]["paused"]), (200, &json!(false)), "{answer}");
    for run in runs {
        db.until(company, run, RunStatus::Completed).await;
    }
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_drains_when_it_is_told_to() {
    let db = Db::new().await;
    let api = db.api().await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let company = db.company(&["a"], "claude", json!({})).await;
    let call = format!(
        "name: c\nsteps: [{{id: a, action: http.request, params: {{method: POST, url: '{}'}}}}]\n",
        witness.url
    );
    let playbook = db.playbook(company, &call).await;
    let _worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({})).await;
    eventually("the call", || async { witness.held_calls() == 1 }).await;
    let (_, workers) = api.get("/v1/workers").await;
    let id = workers["data"][0]["id"].as_str().unwrap().to_owned();
    let (status, answer) = api.post(&format!("/v1/workers/{id}/drain"), json!({})).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("draining")), "{answer}");
    assert_eq!(api.post(&format!("/v1/workers/{id}/drain"), json!({})).await.0, 200, "twice is once");
    // It takes no more, and what it does is brought to its end.
    eventually("the claims to end", || async {
        db.count("select count(*) from worker_sessions where state = 'draining'").await == 1
    })
    .await;
    witness.hold(false);
    db.until(company, run, RunStatus::Completed).await;
    eventually("its end", || async { api.get("/v1/workers").await.1["data"] == json!([]) }).await;
    assert_eq!(witness.calls().values().sum::<u32>(), 1, "nothing was done twice");
    db.start(company, playbook, json!({})).await;
    let (status, answer) = api.post(&format!("/v1/workers/{id}/drain"), json!({})).await;
    assert_eq!(status, 409, "{answer}");
    for unknown in ["999999", "x", "-1"] {
        assert_eq!(api.post(&format!("/v1/workers/{unknown}/drain"), json!({})).await.0, 404, "{unknown}");
    }
    assert_eq!(db.count("select count(*) from jobs where state = 'ready'").await, 1, "nobody takes it");
    // Tenants have no hand in it.
    let other = tenants::account(&db.pool, "tenant", "pro").await.unwrap();
    let tenant = api.with(&capx::keys::make(&db.pool, other, None, "t", true, &["*".into()]).await.unwrap().key);
    assert_eq!(tenant.post(&format!("/v1/workers/{id}/drain"), json!({})).await.0, 403);
    assert_eq!(tenant.post("/v1/queues/steps/pause", json!({})).await.0, 403);
    assert_eq!(tenant.post("/v1/queues/steps/resume", json!({})).await.0, 403);
    assert_eq!(tenant.get("/v1/queues").await.0, 403);
    assert_eq!(tenant.get("/v1/jobs").await.0, 403);
}
