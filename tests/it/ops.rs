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
