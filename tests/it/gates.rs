//! Gates: a run that waits for a person holds nothing, and one word counts.

use std::time::Duration;

use capx_core::domain::ids::{ApprovalId, CompanyId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::engine::EngineError;
use capx_core::engine::gates::Verdict;
use capx_core::store::approvals;
use capx_core::store::{events, runs};
use serde_json::json;

use crate::harness::{Db, SHORT_LEASE, eventually};

fn gated(approval: &str) -> String {
    format!(
        "name: gated\nsteps:\n  - {{id: draft, action: transform, params: {{text: hi}}}}\n  - {{id: publish, action: transform, params: {{text: '${{steps.draft.output.text}}'}}, approval: {approval}}}\n  - {{id: after, action: transform}}\n"
    )
}

async fn pending(db: &Db, company: CompanyId, run: RunId) -> ApprovalId {
    let id = sqlx::query_scalar("select id from approvals where company_id = $1 and run_id = $2");
    ApprovalId(id.bind(company.0).bind(run.0).fetch_one(&db.pool).await.unwrap())
}

fn yes() -> Verdict {
    Verdict::Approve { note: Some("fine".into()), params: None }
}

fn no() -> Verdict {
    Verdict::Reject { feedback: "too short".into() }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_suspends_the_run_and_approval_lets_it_go_on() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, &gated("required")).await;
    let worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Suspended).await;
    // Nothing is held: one timer, due in a day, no lease.
    let job = runs::job(&db.pool, company, run).await.unwrap().unwrap();
    assert_eq!((job.kind.as_str(), job.state.as_str()), ("gate_timeout", "scheduled"));
    assert_eq!(db.count("select count(*) from jobs where queue = 'steps' and state = 'running'").await, 0);
    // A word is kept even while no worker runs.
    worker.stop().await;
    let id = pending(&db, company, run).await;
    let decided = db.decide(id, &yes()).await.unwrap();
    assert_eq!((decided.status.as_str(), decided.note.as_deref()), ("approved", Some("fine")));
    assert_eq!(decided.context["params"], json!({"text": "hi"}), "what was shown");
    let _worker = db.worker(SHORT_LEASE);
    db.until(company, run, RunStatus::Completed).await;
    // The same word again changes nothing, the other one is too late.
    assert!(db.decide(id, &yes()).await.is_ok());
    let late = db.decide(id, &no()).await;
    assert!(matches!(late, Err(EngineError::Conflict(said)) if said.contains("was approved already")));
    let names: Vec<String> =
        events::of_run(&db.pool, company, run, 0, 100).await.unwrap().into_iter().map(|e| e.event).collect();
    assert_eq!(
        names,
        [
            "playbook.started",
            "step.completed",
            "approval.requested",
            "playbook.suspended",
            "approval.resolved",
            "playbook.resumed",
            "step.completed",
            "step.completed",
            "playbook.completed"
        ]
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rejection_fails_the_run_with_the_feedback() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    // The gate may also stand before the first step.
    let playbook =
        db.playbook(company, "name: first\nsteps:\n  - {id: go, action: transform, approval: required}\n").await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Suspended).await;
    let id = pending(&db, company, run).await;
    db.decide(id, &no()).await.unwrap();
    let row = db.until(company, run, RunStatus::Failed).await;
    assert_eq!(row.error.unwrap()["feedback"], "too short");
    let steps = runs::steps(&db.pool, company, run).await.unwrap();
    assert_eq!(steps[0].status, "failed");
    assert_eq!(db.count("select count(*) from jobs where queue = 'steps'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_that_nobody_opens_decides_itself() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    for (rule, status) in [("reject", RunStatus::Failed), ("approve", RunStatus::Completed)] {
        let yaml = gated(&format!("{{timeout: 100ms, on_timeout: {rule}}}")).replace("gated", rule);
        let playbook = db.playbook(company, &yaml).await;
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, status).await;
        let id = pending(&db, company, run).await;
        let late = db.decide(id, &no()).await;
        assert!(matches!(late, Err(EngineError::Conflict(_))), "{rule}");
    }
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_words_at_once_one_counts_and_all_are_told_which() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    for round in 0..25 {
        // The gate's own end falls into the middle of it.
        let yaml = gated("{timeout: 60ms}").replace("gated", &format!("race-{round}"));
        let playbook = db.playbook(company, &yaml).await;
        let run = db.start(company, playbook, json!({})).await;
        db.until_left(company, run, RunStatus::Running).await;
        let id = pending(&db, company, run).await;
        tokio::time::sleep(Duration::from_millis(round * 3)).await;
        let words: Vec<Verdict> = (0..8).map(|i| if i % 2 == 0 { yes() } else { no() }).collect();
        let told = futures_util::future::join_all(words.iter().map(|word| db.decide(id, word))).await;
        let truth = approvals::get(&db.pool, db.account, Some(company), id).await.unwrap().unwrap().status;
        for (word, told) in words.iter().zip(told) {
            let agrees = matches!(
                (word, truth.as_str()),
                (Verdict::Approve { .. }, "approved") | (Verdict::Reject { .. }, "rejected")
            );
            assert_eq!(told.is_ok(), agrees, "{truth}: {told:?}");
        }
        let wanted = if truth == "approved" { RunStatus::Completed } else { RunStatus::Failed };
        db.until(company, run, wanted).await;
        let resolved = events::of_run(&db.pool, company, run, 0, 100).await.unwrap();
        assert_eq!(resolved.iter().filter(|e| e.event == "approval.resolved").count(), 1);
    }
    db.assert_nothing_stranded().await;
}

/// Who is named decides; when nobody did in time, anybody may, for as long again.
#[tokio::test(flavor = "multi_thread")]
async fn reviewers_decide_and_a_gate_that_they_leave_is_escalated() {
    let db = Db::new().await;
    let mut api = db.api().await;
    let owner = api.key.clone();
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    let clerk = db.key(&["approvals:write", "approvals:read"]).await;
    let anna = db.key_named("anna", &["approvals:write"]).await;
    let gate = "{reviewers: [founder, anna], timeout: 1h, on_timeout: escalate}";
    let playbook = db.playbook(company, &gated(gate)).await;
    let path = |id: ApprovalId| format!("/v1/approvals/{id}/approve");

    let waiting = async || {
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Suspended).await;
        (run, pending(&db, company, run).await)
    };
    for (key, status) in [(&clerk, 422), (&anna, 200)] {
        let (run, id) = waiting().await;
        api.key.clone_from(key);
        let (told, body) = api.post(&path(id), json!({})).await;
        assert_eq!(told, status, "{body}");
        if status == 200 {
            db.until(company, run, RunStatus::Completed).await;
            continue;
        }
        assert_eq!(body["error"]["message"], "only founder, anna may decide about this approval", "{body}");
        // Its time is over.
        let over = "update jobs set due_at = now() where kind = 'gate_timeout'";
        sqlx::query(over).execute(&db.pool).await.unwrap();
        eventually("the gate to be escalated", || async {
            db.count("select count(*) from events where event = 'approval.escalated'").await == 1
        })
        .await;
        let (told, shown) = api.get(&format!("/v1/approvals/{id}")).await;
        assert_eq!((told, &shown["data"]["status"]), (200, &json!("pending")), "{shown}");
        assert!(shown["data"]["escalated_at"].is_string(), "{shown}");
        assert_eq!(api.post(&path(id), json!({})).await.0, 200);
        db.until(company, run, RunStatus::Completed).await;
    }
    // Whoever may do everything is not locked out by a file.
    let (run, id) = waiting().await;
    api.key.clone_from(&owner);
    assert_eq!(api.post(&path(id), json!({})).await.0, 200);
    db.until(company, run, RunStatus::Completed).await;
    // A second time it ends as a gate does.
    let (run, _) = waiting().await;
    for _ in 0..2 {
        let times = db.count("select count(*) from events where event like 'approval.%'").await;
        sqlx::query("update jobs set due_at = now() where kind = 'gate_timeout'").execute(&db.pool).await.unwrap();
        eventually("the gate to go on", || async {
            db.count("select count(*) from events where event like 'approval.%'").await > times
        })
        .await;
    }
    db.until(company, run, RunStatus::Failed).await;
}
