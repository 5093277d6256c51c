//! Steps that form a graph: each begins when those are over that it needs, beside
//! others; what waits, fails or is cancelled among them.

use capx_core::domain::ids::{ApprovalId, CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};

fn call(id: &str, witness: &Witness, path: &str, more: &str) -> String {
    format!(
        "  - {{id: {id}, action: http.request, params: {{method: POST, url: '{}{path}'}}, retry: 1{more}}}\n",
        witness.url
    )
}

async fn shown(api: &Api, company: CompanyId, playbook: PlaybookId, run: RunId) -> Value {
    api.get(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}")).await.1["data"].clone()
}

fn statuses(run: &Value) -> Vec<&str> {
    run["steps"].as_array().unwrap().iter().map(|step| step["status"].as_str().unwrap()).collect()
}

async fn until_idle(db: &Db) {
    eventually("every job to be done", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    db.assert_nothing_stranded().await;
}

/// Its workers have died each time that they came to it: the run ends, and says so.
#[tokio::test(flavor = "multi_thread")]
async fn a_junction_in_quarantine_fails_the_run() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let yaml = format!(
        "name: x\nsteps:\n{}{}  - {{id: g, action: transform, needs: [], approval: required}}\n  - {{id: w, wait_for: go, needs: []}}\n",
        call("a", &witness, "/a", ", needs: []"),
        call("b", &witness, "/b", ", needs: a")
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    eventually("a call", || async { witness.held_calls() == 1 }).await;
    eventually("others to wait beside it", || async {
        db.count("select (select count(*) from approvals where status = 'pending') + (select count(*) from waits)")
            .await
            == 2
    })
    .await;
    // Whoever takes it has been the third.
    let crashed = "create function crashed() returns trigger language plpgsql as $$
            begin new.crash_count := 3; return new; end $$;
        create trigger crashed before update on jobs for each row
            when (new.kind = 'step' and new.step < 0 and new.state = 'running') execute function crashed()";
    sqlx::raw_sql(crashed).execute(&db.pool).await.unwrap();
    witness.hold(false);
    let row = db.until(company, run, RunStatus::Failed).await;
    assert_eq!(row.error.unwrap()["code"], "crash");
    until_idle(&db).await;
    assert_eq!(db.count("select count(*) from dead_letters where reason = 'quarantined'").await, 1);
    assert_eq!(db.count("select count(*) from approvals where status = 'pending'").await, 0);
    assert_eq!(db.count("select count(*) from waits").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_run_beside_each_other_and_after_what_they_need() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let yaml = format!(
        "name: x\nsteps:\n{}{}{}{}  - {{id: end, needs: [join, left], action: transform, params: {{all: '${{steps.join.output.body.path}}'}}}}\noutput: ${{steps.end.all}}\n",
        call("a", &witness, "/a", ", needs: []"),
        call("b", &witness, "/b", ", needs: []"),
        call("join", &witness, "/join${steps.a.output.body.path}${steps.b.output.body.path}", ", needs: [a, b]"),
        call("left", &witness, "/left", ", needs: a, if: 'steps.a.output.status == 500'"),
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let worker = db.worker(SHORT_LEASE);
    eventually("two calls", || async { witness.held_calls() == 2 }).await;
    eventually("both to be shown", || async {
        statuses(&shown(&api, company, playbook, run).await) == ["running", "running", "pending", "pending", "pending"]
    })
    .await;
    witness.hold(false);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!("/join%2Fa%2Fb")));
    let told = shown(&api, company, playbook, run).await;
    assert_eq!(statuses(&told), ["completed", "completed", "completed", "skipped", "completed"], "{told}");
    assert_eq!(witness.calls().len(), 3);
    assert_eq!(db.count("select count(*) from events where event = 'step.skipped'").await, 1);
    until_idle(&db).await;
    drop(worker);
}

/// Two branches that wait for different things, in the words of the API.
#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_suspended_when_all_its_branches_wait() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    let yaml = "name: x
steps:
  - {id: gate, needs: [], action: transform, approval: required, params: {said: 1}}
  - {id: wait, needs: [], wait_for: {event: paid, timeout: 2h}}
  - {id: nap, needs: [], sleep: 1h}
  - {id: quick, needs: [], action: transform}
  - {id: end, needs: [gate, wait], action: transform, params: {of: '${steps.wait.output.n}'}}
output: ${steps.end.of}
";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Suspended).await;
    eventually("three waits", || async {
        shown(&api, company, playbook, run).await["waiting_on"].as_array().is_some_and(|waits| waits.len() == 3)
    })
    .await;
    let told = shown(&api, company, playbook, run).await;
    let waits = told["waiting_on"].as_array().unwrap();
    let kinds: Vec<&str> = waits.iter().map(|wait| wait["type"].as_str().unwrap()).collect();
    assert_eq!(kinds, ["approval", "event", "timer"], "{told}");
    assert_eq!((&waits[1]["id"], &waits[2]["id"]), (&json!("paid"), &json!("nap")));
    assert!(waits.iter().all(|wait| wait["expires_at"].is_string()), "{told}");
    assert_eq!(statuses(&told), ["pending_approval", "waiting", "waiting", "completed", "pending"], "{told}");
    // One after the other is answered; between them the run waits for the rest.
    let events = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/events");
    assert_eq!(api.post(&events, json!({"name": "paid", "data": {"n": 7}})).await.0, 201);
    eventually("two waits", || async {
        let told = shown(&api, company, playbook, run).await;
        told["status"] == "suspended" && told["waiting_on"].as_array().is_some_and(|waits| waits.len() == 2)
    })
    .await;
    let id: ApprovalId = waits[0]["id"].as_str().unwrap().parse().unwrap();
    let (status, body) = api.post(&format!("/v1/approvals/{id}/approve"), json!({})).await;
    assert_eq!(status, 200, "{body}");
    eventually("the end of one branch", || async {
        statuses(&shown(&api, company, playbook, run).await)[4] == "completed"
    })
    .await;
    sqlx::query("update jobs set due_at = now() where kind = 'timer'").execute(&db.pool).await.unwrap();
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!(7)));
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_lets_others_end_and_begins_no_more() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let yaml = format!(
        "name: x\nsteps:\n{}  - {{id: bad, needs: [], action: transform, params: {{x: '${{inputs.none}}'}}}}\n{}  - {{id: gate, needs: [], action: transform, approval: required, on_failure: continue}}\n  - {{id: nap, needs: [], wait_for: never}}\nfinally:\n  - {{id: told, action: transform, params: {{why: '${{run.error.step}}'}}}}\n",
        call("slow", &witness, "/slow", ", needs: []"),
        call("later", &witness, "/later", ", needs: [slow]"),
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    eventually("the failure, and what waits to be withdrawn", || async {
        let told = shown(&api, company, playbook, run).await;
        statuses(&told)[..5] == ["running", "failed", "pending", "cancelled", "cancelled"]
    })
    .await;
    assert_eq!(shown(&api, company, playbook, run).await["status"], "running", "something is under way");
    assert_eq!(db.count("select count(*) from approvals where status = 'cancelled'").await, 1);
    assert_eq!(db.count("select count(*) from waits").await, 0);
    witness.hold(false);
    let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    assert_eq!((&error["step"], &error["index"]), (&json!("bad"), &json!(1)), "{error}");
    let told = shown(&api, company, playbook, run).await;
    assert_eq!(statuses(&told), ["completed", "failed", "skipped", "cancelled", "cancelled", "completed"], "{told}");
    assert_eq!(witness.paths(), ["/slow"], "nothing began after the failure");
    until_idle(&db).await;
    assert_eq!(db.count("select count(*) from dead_letters").await, 1);
    // A retry keeps what is done, and comes to the rest again.
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}");
    assert_eq!(api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    let again = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    assert_eq!(again["step"], json!("bad"));
    assert_eq!(
        db.count("select count(*) from approvals where status = 'cancelled'").await,
        2,
        "it was asked for again"
    );
    assert_eq!(witness.calls().values().sum::<u32>(), 1 + u32::from(witness.paths().len() > 1));
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn branches_that_are_forgiven_and_those_that_are_refused() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    let yaml = "name: x
steps:
  - {id: bad, needs: [], action: transform, on_failure: continue, params: {x: '${inputs.none}'}}
  - {id: gate, needs: [], action: transform, approval: required, on_failure: continue}
  - {id: end, needs: [bad, gate], action: transform, params: {bad: '${steps.bad.error.code}', gate: '${steps.gate.error.code}'}}
output: ${steps.end.output}
";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Suspended).await;
    let (_, body) = api.get(&format!("/v1/companies/{company}/approvals?status=pending")).await;
    let id = body["data"][0]["id"].as_str().unwrap().to_owned();
    assert_eq!(api.post(&format!("/v1/approvals/{id}/reject"), json!({"feedback": "no"})).await.0, 200);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!({"bad": "invalid", "gate": "governance"})));
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_graph_leaves_nothing_behind() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let _worker = db.worker(SHORT_LEASE);
    for (name, closing) in [("plain", ""), ("closed", "finally:\n  - {id: told, action: transform}\n")] {
        witness.hold(true);
        let before = witness.held_calls();
        let yaml = format!(
            "name: {name}\nsteps:\n{}  - {{id: each, needs: [], for_each: [1, 2, 3], max_parallel: 2, action: http.request, params: {{url: '{}/e'}}}}\n  - {{id: gate, needs: [], action: transform, approval: required}}\n  - {{id: nap, needs: [], sleep: 1h}}\n  - {{id: wait, needs: [], wait_for: never}}\n{closing}",
            call("slow", &witness, "/slow", ", needs: []"),
            witness.url,
        );
        let playbook = db.playbook(company, &yaml).await;
        let run = db.start(company, playbook, json!({})).await;
        eventually("three calls", || async { witness.held_calls() == before + 3 }).await;
        eventually("a wait", || async { db.count("select count(*) from waits").await == 1 }).await;
        let (status, body) =
            api.post(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/cancel"), json!({})).await;
        assert_eq!(status, 200, "{body}");
        witness.hold(false);
        db.until(company, run, RunStatus::Cancelled).await;
        until_idle(&db).await;
        let told = shown(&api, company, playbook, run).await;
        assert!(statuses(&told)[..5].iter().all(|status| *status == "cancelled"), "{told}");
        assert_eq!(db.count("select count(*) from waits").await, 0);
        assert_eq!(db.count("select count(*) from approvals where status = 'pending'").await, 0);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_replay_of_a_graph_keeps_what_does_not_follow_from_its_step() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let _worker = db.worker(SHORT_LEASE);
    let yaml = format!(
        "name: x\nsteps:\n{}{}{}{}",
        call("a", &witness, "/a", ", needs: []"),
        call("b", &witness, "/b", ", needs: [a]"),
        call("c", &witness, "/c", ", needs: [a]"),
        call("d", &witness, "/d", ", needs: [b, c]"),
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    let replay = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/replay");
    let (status, body) = api.post(&replay, json!({"from_step": "b"})).await;
    assert_eq!(status, 201, "{body}");
    let again: RunId = body["data"]["run_id"].as_str().unwrap().parse().unwrap();
    db.until(company, again, RunStatus::Completed).await;
    let mut paths = witness.paths();
    assert_eq!(paths.split_off(4), ["/b", "/d"], "what does not follow from it stays");
    until_idle(&db).await;
}
