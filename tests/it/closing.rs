//! What closes a run: steps are undone in reverse order when it does not end well,
//! and what is done in any case is done, once, whoever cancels or refuses what.

use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};

fn call(id: &str, witness: &Witness, path: &str) -> String {
    format!("{{id: {id}, action: http.request, params: {{method: POST, url: '{}{path}'}}, retry: 2", witness.url)
}

fn undo(witness: &Witness, id: &str) -> String {
    format!(
        ", compensate: {{action: http.request, params: {{method: POST, url: '{}/undo/{id}', \
         body: {{of: '${{steps.{id}.output.body.path}}', why: '${{run.error.code}}'}}}}}}}}",
        witness.url
    )
}

/// Three steps that can be undone, a last one, and what is done in any case.
fn invoices(witness: &Witness, last: &str) -> String {
    let step = |id: &str| format!("  - {}{}\n", call(id, witness, &format!("/{id}")), undo(witness, id));
    format!(
        "name: invoices\nsteps:\n{}  - {{id: note, action: transform}}\n{}{last}\nfinally:\n  - {}}}\n  - {{id: told, action: transform, if: 'run.status == \"failed\"', params: {{why: '${{run.error.message}}'}}}}\noutput: {{charged: '${{steps.charge.output.status}}'}}\n",
        step("reserve"),
        step("charge"),
        call("report", witness, "/report/${run.status}"),
    )
}

async fn shown(api: &Api, company: CompanyId, playbook: PlaybookId, run: RunId) -> Value {
    api.get(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}")).await.1["data"].clone()
}

fn statuses(run: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    run["steps"].as_array().unwrap().iter().map(|step| (text(&step["id"]), text(&step["status"]))).collect()
}

async fn until_idle(db: &Db) {
    eventually("every job to be done", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_run_is_undone_in_reverse_order_and_then_closed() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let yaml = invoices(&witness, &format!("  - {}}}", call("ship", &witness, "/refused/ship")));
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Failed).await;
    let called = ["/reserve", "/charge", "/refused/ship", "/undo/charge", "/undo/reserve", "/report/failed"];
    assert_eq!(witness.paths(), called);
    let error = row.error.unwrap();
    assert_eq!((&error["step"], &error["code"]), (&json!("ship"), &json!("invalid")), "{error}");
    let told = shown(&api, company, playbook, run).await;
    let closing = |id: &str| (id.to_owned(), "completed".to_owned());
    assert_eq!(
        statuses(&told)[4..],
        ["charge.compensate", "reserve.compensate", "report", "told"].map(closing),
        "{told}"
    );
    assert_eq!(told["steps"][4]["closes"], json!("compensate"));
    assert!(told["steps"][7]["output"]["why"].as_str().unwrap().contains("400"), "{told}");
    until_idle(&db).await;
    assert_eq!(db.count("select count(*) from dead_letters where step = 3").await, 1);
    // What is undone is not gone on from.
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}");
    let (status, body) = api.post(&format!("{path}/retry"), json!({})).await;
    assert_eq!(status, 409, "{body}");
    assert!(body["error"]["message"].as_str().unwrap().contains("was undone"), "{body}");
    let (status, body) = api.post(&format!("{path}/replay"), json!({"from_step": "note"})).await;
    assert_eq!(status, 409, "{body}");
    let (status, again) = api.post(&format!("{path}/replay"), json!({})).await;
    assert_eq!(status, 201, "{again}");
    let again: RunId = again["data"]["run_id"].as_str().unwrap().parse().unwrap();
    db.until(company, again, RunStatus::Failed).await;
    assert_eq!(witness.calls().len(), 2 * called.len(), "a new run has effects of its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ends_well_is_closed_and_not_undone() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let playbook = db.playbook(company, &invoices(&witness, "")).await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!({"charged": 200})));
    assert_eq!(witness.paths(), ["/reserve", "/charge", "/report/completed"]);
    let told = shown(&api, company, playbook, run).await;
    let last = ("told".to_owned(), "skipped".to_owned());
    assert_eq!(statuses(&told).last(), Some(&last), "{told}");
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_what_closes_a_run_is_one_of_the_run_and_is_retried() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[200, 503, 503]).await;
    let api = db.api().await;
    let yaml = format!(
        "name: x\nsteps:\n  - {}}}\nfinally:\n  - {}}}\n  - {}}}\n",
        call("work", &witness, "/work"),
        call("clean", &witness, "/clean").replace("retry: 2", "retry: {max_attempts: 2, initial: 10ms}"),
        call("tell", &witness, "/tell"),
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Failed).await;
    let error = row.error.unwrap();
    assert_eq!((&error["step"], &error["finally"]), (&json!("clean"), &json!(true)), "{error}");
    assert_eq!(witness.paths(), ["/work", "/clean", "/tell"], "one that fails does not hold up the others");
    assert_eq!(db.count("select count(*) from dead_letters").await, 1);
    let (status, body) =
        api.post(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/retry"), json!({})).await;
    assert_eq!(status, 200, "{body}");
    db.until(company, run, RunStatus::Completed).await;
    let calls = witness.calls();
    assert_eq!((calls.len(), calls.values().sum::<u32>()), (3, 5), "only what failed is done again: {calls:?}");
    until_idle(&db).await;
    assert_eq!(db.count("select count(*) from dead_letters").await, 0);
    // Forgiven, it is none.
    let witness = Witness::start(&[200, 400]).await;
    let yaml = format!(
        "name: y\nsteps:\n  - {}}}\nfinally:\n  - {}, on_failure: continue}}\n",
        call("work", &witness, "/work"),
        call("clean", &witness, "/clean"),
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_cannot_be_undone_is_told_and_the_others_are() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let yaml = invoices(&witness, &format!("  - {}}}", call("ship", &witness, "/refused/ship")))
        .replace("/undo/charge", "/refused/undo");
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    assert_eq!((&error["step"], &error["not_compensated"]), (&json!("ship"), &json!(["charge"])), "{error}");
    assert_eq!(witness.paths()[3..], ["/refused/undo", "/undo/reserve", "/report/failed"]);
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_goes_on_and_closes_once_more() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    // Refuses the first word only.
    let witness = Witness::start(&[400]).await;
    let yaml = format!(
        "name: x\nsteps:\n  - {}}}\nfinally:\n  - {}}}\n",
        call("work", &witness, "/work"),
        call("tell", &witness, "/tell/${run.status}"),
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Failed).await;
    let (status, body) =
        api.post(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/retry"), json!({})).await;
    assert_eq!(status, 200, "{body}");
    db.until(company, run, RunStatus::Completed).await;
    // The step's effect is the same one, what closes the run another.
    assert_eq!(witness.paths(), ["/work", "/tell/failed", "/tell/completed"]);
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_is_undone_and_closed_before_it_ends() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let _worker = db.worker(SHORT_LEASE);
    for (name, last) in
        [("gate", "  - {id: g, action: transform, approval: required}"), ("nap", "  - {id: g, sleep: 1h}")]
    {
        let before = witness.paths().len();
        let playbook =
            db.playbook(company, &invoices(&witness, last).replace("name: invoices", &format!("name: {name}"))).await;
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Suspended).await;
        let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}");
        let (status, body) = api.post(&format!("{path}/cancel"), json!({})).await;
        assert_eq!((status, &body["data"]["status"]), (200, &json!("running")), "{body}");
        db.until(company, run, RunStatus::Cancelled).await;
        assert_eq!(
            witness.paths()[before..],
            ["/reserve", "/charge", "/undo/charge", "/undo/reserve", "/report/cancelled"]
        );
        until_idle(&db).await;
    }
    // Once more ends it at once, whatever is under way.
    let playbook = db
        .playbook(company, &invoices(&witness, "  - {id: g, sleep: 1h}").replace("name: invoices", "name: twice"))
        .await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Suspended).await;
    witness.hold(true);
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}");
    assert_eq!(api.post(&format!("{path}/cancel"), json!({})).await.0, 200);
    eventually("something to be undone", || async { witness.held_calls() == 1 }).await;
    let (status, body) = api.post(&format!("{path}/cancel"), json!({})).await;
    assert_eq!((status, &body["data"]["status"]), (200, &json!("cancelled")), "{body}");
    witness.hold(false);
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_gate_is_a_failure_like_any_other() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let reject = async |company: CompanyId, playbook: PlaybookId| {
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Suspended).await;
        let (_, body) = api.get(&format!("/v1/companies/{company}/approvals?status=pending")).await;
        let id = body["data"][0]["id"].as_str().unwrap().to_owned();
        let (status, body) = api.post(&format!("/v1/approvals/{id}/reject"), json!({"feedback": "too dear"})).await;
        assert_eq!(status, 200, "{body}");
        run
    };
    // Past it, where its step says so.
    let yaml = "name: x
steps:
  - {id: g, action: transform, approval: required, on_failure: continue}
  - {id: after, action: transform, params: {why: '${steps.g.error.message}'}}
output: ${steps.after.why}
";
    let playbook = db.playbook(company, yaml).await;
    let run = reject(company, playbook).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!("the approval was rejected: too dear")));
    // Else the run is undone and closed.
    let witness = Witness::start(&[]).await;
    let playbook =
        db.playbook(company, &invoices(&witness, "  - {id: g, action: transform, approval: required}")).await;
    let run = reject(company, playbook).await;
    let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    assert_eq!((&error["code"], &error["feedback"]), (&json!("governance"), &json!("too dear")), "{error}");
    assert_eq!(witness.paths()[2..], ["/undo/charge", "/undo/reserve", "/report/failed"]);
    until_idle(&db).await;
    assert_eq!(db.count("select count(*) from dead_letters").await, 0, "a person's no is nothing to look into");
}
