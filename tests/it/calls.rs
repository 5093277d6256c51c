//! Steps that are done by runs of other playbooks: what those come to, what wakes
//! their callers, and what a retry or a cancellation makes of both.

use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};

async fn shown(api: &Api, company: CompanyId, playbook: PlaybookId, run: RunId) -> Value {
    api.get(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}")).await.1["data"].clone()
}

async fn until_idle(db: &Db) {
    eventually("every job to be done", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    db.assert_nothing_stranded().await;
}

/// Calls outside, and says what it was given.
fn child(witness: &Witness, path: &str) -> String {
    format!(
        "name: child
inputs: {{n: integer}}
steps:
  - {{id: first, action: http.request, params: {{method: POST, url: '{0}/first'}}}}
  - {{id: call, action: http.request, params: {{method: POST, url: '{0}{path}'}}, retry: 1}}
output: {{twice: '${{inputs.n * 2}}', path: '${{steps.call.output.body.path}}'}}
",
        witness.url
    )
}

const PARENT: &str = "name: parent
steps:
  - {id: before, action: transform, params: {n: 21}}
  - {id: call, playbook: child, params: {n: '${steps.before.n}'}}
  - {id: after, action: transform, params: {got: '${steps.call.output.twice}'}}
output: ${steps.after.got}
";

#[tokio::test(flavor = "multi_thread")]
async fn a_run_of_another_playbook_does_a_step() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let (status, body) =
        api.post(&format!("/v1/companies/{company}/playbooks"), json!({"name": "parent", "yaml": PARENT})).await;
    assert_eq!(status, 201, "{body}");
    assert!(body["data"]["warnings"][0].as_str().unwrap().contains("no playbook `child` yet"), "{body}");
    let parent: PlaybookId = body["data"]["id"].as_str().unwrap().parse().unwrap();
    let called = db.playbook(company, &child(&witness, "/call")).await;
    witness.hold(true);
    let run = db.start(company, parent, json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    eventually("a call", || async { witness.held_calls() == 1 }).await;
    let told = shown(&api, company, parent, run).await;
    assert_eq!((&told["status"], &told["steps"][1]["status"]), (&json!("running"), &json!("running")), "{told}");
    let id: RunId = told["steps"][1]["child_run_id"].as_str().unwrap().parse().unwrap();
    assert_eq!(shown(&api, company, called, id).await["parent_run_id"], json!(run));
    witness.hold(false);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!(42)));
    assert_eq!(db.run(company, id).await.status, RunStatus::Completed);
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_of_the_called_is_one_of_the_caller_and_a_retry_lets_both_go_on() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[200, 400]).await;
    db.playbook(company, &child(&witness, "/call")).await;
    let parent = db.playbook(company, PARENT).await;
    let _worker = db.worker(SHORT_LEASE);
    let run = db.start(company, parent, json!({})).await;
    let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    let message = error["message"].as_str().unwrap();
    assert!(message.contains("of `child` failed at `call`"), "{error}");
    assert_eq!((&error["step"], &error["code"]), (&json!("call"), &json!("invalid")), "{error}");
    until_idle(&db).await;
    let before = shown(&api, company, parent, run).await["steps"][1]["child_run_id"].clone();
    let retry = format!("/v1/companies/{company}/playbooks/{parent}/runs/{run}/retry");
    assert_eq!(api.post(&retry, json!({})).await.0, 200);
    assert_eq!(db.until(company, run, RunStatus::Completed).await.output, Some(json!(42)));
    // The same run went on where it had failed.
    assert_eq!(shown(&api, company, parent, run).await["steps"][1]["child_run_id"], before);
    let calls = witness.calls();
    assert_eq!((calls.len(), calls.values().sum::<u32>()), (2, 3), "{calls:?}");
    until_idle(&db).await;
    assert_eq!(db.count("select count(*) from dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_called_fails_the_step_with_the_reason() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    let parent = db.playbook(company, PARENT).await;
    let failed = async |playbook| {
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Failed).await.error.unwrap()["message"].as_str().unwrap().to_owned()
    };
    assert_eq!(failed(parent).await, "there is no playbook `child`");
    let yaml = "name: child\ninputs: {n: string}\nsteps: [{action: transform}]\n";
    db.playbook(company, yaml).await;
    let message = failed(parent).await;
    assert!(message.starts_with("`child` cannot be run: params.n:"), "{message}");
    sqlx::query("update playbooks set status = 'archived' where name = 'child'").execute(&db.pool).await.unwrap();
    let message = failed(parent).await;
    assert!(message.contains("the playbook is archived"), "{message}");
    // Runs call each other eight deep, and no deeper.
    let yaml = "name: deep
inputs: {n: {type: integer, default: 0}}
steps:
  - {id: down, if: 'true', playbook: deep, params: {n: '${inputs.n + 1}'}}
";
    let deep = db.playbook(company, yaml).await;
    let message = failed(deep).await;
    assert!(message.contains("more than 8 deep"), "{message}");
    assert_eq!(db.count("select count(*) from runs where depth = 8").await, 1);
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_caller_cancels_what_it_has_called() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    db.playbook(company, "name: child\nsteps: [{id: nap, sleep: 1h}]\n").await;
    let yaml = "name: parent
steps:
  - {id: one, needs: [], playbook: child}
  - {id: many, needs: [], for_each: [1, 2, 3], max_parallel: 2, playbook: child}
";
    let parent = db.playbook(company, yaml).await;
    let run = db.start(company, parent, json!({})).await;
    eventually("three runs that sleep", || async {
        db.count("select count(*) from runs where called and status = 'suspended'").await == 3
    })
    .await;
    let path = format!("/v1/companies/{company}/playbooks/{parent}/runs/{run}/cancel");
    let (status, body) = api.post(&path, json!({})).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!(db.count("select count(*) from runs where status = 'cancelled'").await, 4);
    until_idle(&db).await;
    // Of the called alone, it fails the step.
    let parent = db.playbook(company, "name: other\nsteps: [{id: one, playbook: child}]\n").await;
    let run = db.start(company, parent, json!({})).await;
    eventually("a run that sleeps", || async {
        db.count("select count(*) from runs where called and status = 'suspended'").await == 1
    })
    .await;
    let called = db.playbook(company, "name: child\nsteps: [{id: nap, sleep: 1h}]\n").await;
    let id = shown(&api, company, parent, run).await["steps"][0]["child_run_id"].as_str().unwrap().to_owned();
    let path = format!("/v1/companies/{company}/playbooks/{called}/runs/{id}/cancel");
    assert_eq!(api.post(&path, json!({})).await.0, 200);
    let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    assert!(error["message"].as_str().unwrap().contains("was cancelled"), "{error}");
    until_idle(&db).await;
}

/// For each item a run of its own; one that fails is gone on with by a retry.
#[tokio::test(flavor = "multi_thread")]
async fn each_item_may_be_a_run_of_its_own() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[200, 200, 200, 400]).await;
    db.playbook(company, &child(&witness, "/call")).await;
    let yaml = "name: parent
steps:
  - {id: each, for_each: [1, 2, 3, 4], max_parallel: 4, playbook: child, params: {n: '${item}'}}
output: ${steps.each.output}
";
    let parent = db.playbook(company, yaml).await;
    let run = db.start(company, parent, json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    db.until_left(company, run, RunStatus::Running).await;
    if db.run(company, run).await.status == RunStatus::Failed {
        let retry = format!("/v1/companies/{company}/playbooks/{parent}/runs/{run}/retry");
        assert_eq!(api.post(&retry, json!({})).await.0, 200);
    }
    let row = db.until(company, run, RunStatus::Completed).await;
    let twice: Vec<Value> = row.output.unwrap().as_array().unwrap().iter().map(|one| one["twice"].clone()).collect();
    assert_eq!(twice, [2, 4, 6, 8]);
    let calls = witness.calls();
    assert_eq!((calls.len(), calls.values().sum::<u32>()), (8, 9), "{calls:?}");
    assert_eq!(db.count("select count(*) from runs where called").await, 4);
    until_idle(&db).await;
}

/// With a key of its own, the called is the run that has it already.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_is_there_already_does_the_step() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: child
inputs: {n: integer}
idempotency_key: ${inputs.n}
steps: [{id: nap, sleep: '${inputs.n == 1 ? ''1ms'' : ''1h''}'}]
output: ${run.id}
"
    .replace("'${inputs.n == 1 ? ''1ms'' : ''1h''}'", "1h");
    let called = db.playbook(company, &yaml).await;
    let parent = db
        .playbook(
            company,
            "name: parent\nsteps: [{id: c, playbook: child, params: {n: 1}}]\noutput: ${steps.c.output}\n",
        )
        .await;
    let _worker = db.worker(SHORT_LEASE);
    let there = db.start(company, called, json!({"n": 1})).await;
    db.until(company, there, RunStatus::Suspended).await;
    let run = db.start(company, parent, json!({})).await;
    eventually("the step to be under way", || async {
        db.count("select count(*) from run_steps where status = 'running'").await == 1
    })
    .await;
    sqlx::query("update jobs set due_at = now() where kind = 'timer'").execute(&db.pool).await.unwrap();
    assert_eq!(db.until(company, run, RunStatus::Completed).await.output, Some(json!(there)));
    // Over already, it is the answer at once.
    let run = db.start(company, parent, json!({})).await;
    assert_eq!(db.until(company, run, RunStatus::Completed).await.output, Some(json!(there)));
    assert_eq!(db.count("select count(*) from runs").await, 3);
    until_idle(&db).await;
}
