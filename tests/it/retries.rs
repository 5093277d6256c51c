//! A failed run goes on where it failed; any run is played again.

use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::store::{events, runs};
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE};

fn base(company: CompanyId, playbook: PlaybookId, run: RunId) -> String {
    format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}")
}

async fn names(db: &Db, company: CompanyId, run: RunId) -> Vec<String> {
    events::of_run(&db.pool, company, run, 0, 100).await.unwrap().into_iter().map(|e| e.event).collect()
}

fn statuses(run: &Value) -> Vec<&str> {
    run["data"]["steps"].as_array().unwrap().iter().map(|step| step["status"].as_str().unwrap()).collect()
}

/// A step that calls outside between two that do not.
fn calling(witness: &Witness) -> String {
    format!(
        "name: calling\nsteps:\n  - {{id: a, action: transform, params: {{n: '${{inputs.n}}'}}}}\n  - {{id: call, action: http.request, params: {{method: POST, url: '{}/x', body: {{n: '${{steps.a.output.n}}'}}}}}}\n  - {{id: c, action: transform, params: {{n: '${{steps.a.output.n}}'}}}}\ninputs: {{n: {{type: integer}}}}\noutput: '${{steps.c.output.n}}'\n",
        witness.url
    )
}

async fn counted(db: &Db) -> (i64, i64) {
    let sum = "select (sum(ended))::bigint from (select ended::bigint from run_totals union all select ended from run_deltas) t";
    (db.count(sum).await, db.count("select count(*) from dead_letters").await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failed_run_goes_on_at_its_failed_step() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[400]).await;
    let playbook = db.playbook(company, &calling(&witness)).await;
    let run = db.start(company, playbook, json!({"n": 7})).await;
    db.until(company, run, RunStatus::Failed).await;
    assert_eq!(counted(&db).await, (1, 1));

    let path = base(company, playbook, run);
    let (status, answer) = api.post(&format!("{path}/retry"), json!({})).await;
    assert_eq!(status, 200, "{answer}");
    assert_eq!((&answer["data"]["completed_at"], statuses(&answer)[0]), (&Value::Null, "completed"));
    assert!(answer["data"]["error"].is_null());
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!(7)));
    // What was done was not done again, and what failed kept its key.
    let calls = witness.calls();
    assert_eq!((calls.len(), calls.values().sum::<u32>()), (1, 2), "{calls:?}");
    let told = names(&db, company, run).await;
    let wanted = [
        "playbook.started",
        "step.completed",
        "step.failed",
        "playbook.failed",
        "playbook.resumed",
        "step.completed",
        "step.completed",
        "playbook.completed",
    ];
    let told: Vec<_> = told.iter().filter(|name| *name != "step.started").collect();
    assert_eq!(told, wanted.iter().collect::<Vec<_>>());
    // It has ended once, and nothing lies about.
    assert_eq!(counted(&db).await, (1, 0));
    let (status, answer) = api.post(&format!("{path}/retry"), json!({})).await;
    assert_eq!(status, 409, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("the run is completed"));
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_that_was_refused_is_asked_for_again_and_one_that_was_opened_is_not() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[400]).await;
    let yaml = calling(&witness).replace("action: http.request", "approval: required, action: http.request");
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({"n": 1})).await;
    let path = base(company, playbook, run);
    let asked = async || {
        db.until(company, run, RunStatus::Suspended).await;
        let (_, answer) = api.get(&path).await;
        answer["data"]["waiting_on"][0]["id"].as_str().unwrap().to_owned()
    };
    let first = asked().await;
    let (status, _) = api.post(&format!("/v1/approvals/{first}/reject"), json!({"feedback": "not yet"})).await;
    assert_eq!(status, 200);
    db.until(company, run, RunStatus::Failed).await;
    // Nothing is retried while the company is halted.
    assert_eq!(api.post(&format!("/v1/companies/{company}/pause"), json!({})).await.0, 200);
    assert_eq!(api.post(&format!("{path}/retry"), json!({})).await.0, 409);
    assert_eq!(api.post(&format!("/v1/companies/{company}/resume"), json!({})).await.0, 200);

    let (status, answer) = api.post(&format!("{path}/retry"), json!({})).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("suspended")), "{answer}");
    assert_eq!(statuses(&answer), ["completed", "pending_approval", "pending"]);
    let second = asked().await;
    assert_ne!(first, second);
    let (_, shown) = api.get(&format!("/v1/approvals/{second}")).await;
    assert_eq!(shown["data"]["context"]["params"]["body"], json!({"n": 1}));
    // The old word stays what it was.
    let (_, old) = api.get(&format!("/v1/approvals/{first}")).await;
    assert_eq!(old["data"]["status"], "rejected");
    assert_eq!(api.post(&format!("/v1/approvals/{second}/approve"), json!({})).await.0, 200);

    // The call fails; the next retry does not ask again.
    db.until(company, run, RunStatus::Failed).await;
    assert_eq!(api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(db.count("select count(*) from approvals").await, 2);
    db.assert_nothing_stranded().await;
}

async fn replayed(api: &Api, path: &str, body: Value) -> RunId {
    let (status, answer) = api.post(&format!("{path}/replay"), body).await;
    assert_eq!(status, 201, "{answer}");
    answer["data"]["run_id"].as_str().unwrap().parse().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_keeps_what_was_done_before_its_step() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let playbook = db.playbook(company, &calling(&witness)).await;
    let run = db.start(company, playbook, json!({"n": 3})).await;
    db.until(company, run, RunStatus::Completed).await;
    // A later version is nothing to it.
    db.playbook(company, "name: calling\nsteps: [{id: z, action: transform}]\n").await;
    let path = base(company, playbook, run);

    let whole = replayed(&api, &path, json!({})).await;
    let last = replayed(&api, &path, json!({"from_step": "c", "params": {"n": 5}})).await;
    let forked = replayed(&api, &path, json!({"from_step": 0, "inputs": {"n": 9}})).await;
    for (run, output) in [(whole, 3), (last, 3), (forked, 9)] {
        let row = db.until(company, run, RunStatus::Completed).await;
        assert_eq!((row.output, row.replay_of.is_some()), (Some(json!(output)), true));
    }
    // `c` alone ran again for the second: three calls, each of its own run.
    assert_eq!(witness.calls().len(), 3, "{:?}", witness.calls());
    let (_, shown) = api.get(&base(company, playbook, last)).await;
    assert_eq!(
        (shown["data"]["replay_of"].as_str(), statuses(&shown)),
        (Some(run.to_string().as_str()), vec!["completed"; 3])
    );
    assert_eq!(names(&db, company, last).await.iter().filter(|name| *name == "step.completed").count(), 1);
    let row = runs::get(&db.pool, company, last).await.unwrap().unwrap();
    assert_eq!(row.params, json!({"n": 5}));

    for (body, field, said) in [
        (json!({"from_step": "cc"}), "from_step", "did you mean `c`?"),
        (json!({"from_step": 3}), "from_step", "3 steps"),
        (json!({"from_step": true}), "from_step", "a step's id"),
        (json!({"params": {"n": "x"}}), "params.n", "integer"),
        (json!({"params": {}, "inputs": {}}), "inputs", "one of them"),
    ] {
        let (status, answer) = api.post(&format!("{path}/replay"), body.clone()).await;
        let told = &answer["error"]["fields"][0];
        assert_eq!((status, told["field"].as_str()), (400, Some(field)), "{body}: {answer}");
        assert!(told["message"].as_str().unwrap().contains(said), "{answer}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn nothing_is_replayed_from_behind_what_is_not_done() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[400]).await;
    let playbook = db.playbook(company, &calling(&witness)).await;
    let run = db.start(company, playbook, json!({"n": 3})).await;
    db.until(company, run, RunStatus::Failed).await;
    let path = base(company, playbook, run);
    let (status, answer) = api.post(&format!("{path}/replay"), json!({"from_step": "c"})).await;
    assert_eq!(status, 409, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("`call`"), "{answer}");
    let again = replayed(&api, &path, json!({"from_step": "call"})).await;
    db.until(company, again, RunStatus::Completed).await;
    // The old run stays as it ended.
    assert_eq!(db.run(company, run).await.status, RunStatus::Failed);
    db.assert_nothing_stranded().await;
}
