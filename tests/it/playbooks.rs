//! The playbooks of `playbooks/`, each run to its end as an author would: with the
//! events, approvals and failures that it is made for.

use std::collections::BTreeSet;

use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::engine::gates::Verdict;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, Running, SHORT_LEASE, eventually};

/// A company whose agents follow a script, and something to call.
struct Stage {
    db: Db,
    api: Api,
    witness: Witness,
    company: CompanyId,
    _worker: Running,
}

const ROLES: &[&str] = &["strategist", "writer", "researcher", "operator", "support", "sales"];

fn text(name: &str) -> String {
    std::fs::read_to_string(format!("playbooks/{name}.yml")).unwrap()
}

impl Stage {
    async fn new(script: Value) -> Self {
        let db = Db::new().await;
        let api = db.api().await;
        let company = db.company(ROLES, "claude", json!({"script": script})).await;
        let worker = db.worker(SHORT_LEASE);
        Self { api, witness: Witness::start(&[]).await, company, _worker: worker, db }
    }

    async fn start(&self, name: &str, mut params: Value) -> RunId {
        let text = text(name);
        if text.contains("base_url") {
            params["base_url"] = json!(self.witness.url);
        }
        let playbook = self.db.playbook(self.company, &text).await;
        self.db.start(self.company, playbook, params).await
    }

    /// Waits for the end of a run, and says what its steps have come to.
    async fn ends(&self, run: RunId, status: RunStatus) -> (Value, Vec<(String, String)>) {
        let row = self.db.until(self.company, run, status).await;
        let path = format!("/v1/companies/{}/playbooks/{}/runs/{run}", self.company, row.playbook);
        let told = self.api.get(&path).await.1["data"].clone();
        let of = |step: &Value, key: &str| step[key].as_str().unwrap().to_owned();
        let steps = told["steps"].as_array().unwrap().iter().map(|step| (of(step, "id"), of(step, "status"))).collect();
        eventually("every job to be done", || async {
            self.db.count("select count(*) from jobs where kind not in ('schedule', 'heartbeat')").await == 0
        })
        .await;
        (row.output.or(row.error).unwrap_or_default(), steps)
    }

    async fn completes(&self, run: RunId) -> (Value, Vec<(String, String)>) {
        self.ends(run, RunStatus::Completed).await
    }

    async fn approve(&self, run: RunId) {
        self.db.until(self.company, run, RunStatus::Suspended).await;
        let (_, body) = self.api.get(&format!("/v1/companies/{}/approvals?status=pending", self.company)).await;
        let id = body["data"][0]["id"].as_str().unwrap().parse().unwrap();
        self.db.decide(id, &Verdict::Approve { note: None, params: None }).await.unwrap();
    }

    async fn send(&self, name: &str, data: Value) {
        let path = format!("/v1/companies/{}/events", self.company);
        let (status, body) = self.api.post(&path, json!({"name": name, "data": data})).await;
        assert!(status < 300, "{body}");
    }

    /// The time of what waits is over.
    async fn time_passes(&self, run: RunId) {
        self.db.until(self.company, run, RunStatus::Suspended).await;
        sqlx::query("update jobs set due_at = now() where kind = 'timer'").execute(&self.db.pool).await.unwrap();
    }
}

fn status<'a>(steps: &'a [(String, String)], id: &str) -> &'a str {
    &steps.iter().find(|(step, _)| step == id).unwrap().1
}

/// Which of them have a test here; the demo's are run by its own.
const TESTED: &[&str] = &[
    "content-pipeline",
    "customer-onboarding",
    "fan-out-research",
    "human-hand-off",
    "incident-triage",
    "invoice-run",
    "lead-intake",
    "nightly-sync",
    "product-post",
    "quarterly-report",
    "release-train",
    "report-section",
    "hello",
    "publish-with-approval",
    "weekly-market-report",
];

#[test]
fn every_playbook_has_its_test_and_no_problem() {
    let named = |entry: std::io::Result<std::fs::DirEntry>| {
        entry.unwrap().path().file_stem().unwrap().to_str().unwrap().to_owned()
    };
    let there: BTreeSet<String> = std::fs::read_dir("playbooks").unwrap().map(named).collect();
    assert_eq!(there, TESTED.iter().map(|name| (*name).to_owned()).collect());
    for name in there {
        let (_, warnings) = capx_core::domain::playbook::read(&text(&name)).unwrap_or_else(|e| panic!("{name}: {e:?}"));
        assert_eq!(warnings, [], "{name}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_simple_ones() {
    let stage = Stage::new(json!({})).await;
    let run = stage.start("hello", json!({"topic": "tides"})).await;
    let (output, _) = stage.completes(run).await;
    assert_eq!(output["path"], "summary.json");
    let run = stage.start("weekly-market-report", json!({})).await;
    stage.completes(run).await;
    let run = stage.start("publish-with-approval", json!({"topic": "tides"})).await;
    stage.approve(run).await;
    stage.completes(run).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn content_goes_round_until_it_is_good_or_may_not_again() {
    let stage = Stage::new(json!({"review_draft": {"score": 0.5, "feedback": "shorter"}})).await;
    let run = stage.start("content-pipeline", json!({})).await;
    stage.approve(run).await;
    let (output, _) = stage.completes(run).await;
    assert_eq!(output, json!({"path": "post.md", "score": 0.5}));
    let drafts = stage
        .db
        .count("select count(*) from events where event = 'step.completed' and data ->> 'step' = 'draft'")
        .await;
    assert_eq!(drafts, 3, "two rounds more, and no third");
    // One that is good at once goes round no more.
    let stage = Stage::new(json!({"review_draft": {"score": 0.9}})).await;
    let run = stage.start("content-pipeline", json!({"tone": "playful"})).await;
    stage.approve(run).await;
    let (_, steps) = stage.completes(run).await;
    assert_eq!(status(&steps, "draft"), "completed");
    assert_eq!(
        stage
            .db
            .count("select count(*) from events where event = 'step.completed' and data ->> 'step' = 'draft'")
            .await,
        1
    );
}

#[tokio::test(flavor = "multi_thread")]
async fn an_incident_is_resolved_or_escalated() {
    let stage = Stage::new(json!({"triage_incident": {"severity": "high"}})).await;
    stage.db.playbook(stage.company, &text("incident-triage")).await;
    stage.send("incident.opened", json!({"id": "I-1", "title": "down"})).await;
    eventually("a run", || async { stage.db.count("select count(*) from runs").await == 1 }).await;
    let run: uuid::Uuid = sqlx::query_scalar("select id from runs").fetch_one(&stage.db.pool).await.unwrap();
    let run = RunId(run);
    stage.db.until(stage.company, run, RunStatus::Suspended).await;
    stage.send("incident.resolved", json!({"id": "I-2"})).await;
    stage.send("incident.resolved", json!({"id": "I-1", "by": "restart"})).await;
    let (output, steps) = stage.completes(run).await;
    assert_eq!(output, json!({"severity": "high", "escalated": false}));
    assert_eq!(
        (status(&steps, "mend"), status(&steps, "closing"), status(&steps, "escalate")),
        ("completed", "completed", "skipped")
    );
    // The same incident again is the same run; another one lasts.
    let again = stage.start("incident-triage", json!({"event": {"id": "I-1"}})).await;
    assert_eq!(again, run);
    let run = stage.start("incident-triage", json!({"event": {"id": "I-3"}})).await;
    stage.time_passes(run).await;
    let (output, steps) = stage.completes(run).await;
    assert_eq!(output["escalated"], json!(true));
    assert_eq!((status(&steps, "resolved"), status(&steps, "closing")), ("failed", "skipped"));
}

#[tokio::test(flavor = "multi_thread")]
async fn an_invoice_is_booked_or_undone() {
    let stage = Stage::new(json!({})).await;
    let run = stage.start("invoice-run", json!({"invoice": "DE-1", "amount": 12.5})).await;
    let (output, _) = stage.completes(run).await;
    assert_eq!(output["invoice"], "DE-1");
    assert_eq!(stage.witness.paths(), ["/reserve", "/charge", "/book", "/ledger"]);
    // Under another name, a booking that is refused.
    let yaml = text("invoice-run").replace("/book", "/refused").replace("invoice-run", "refused-run");
    let playbook = stage.db.playbook(stage.company, &yaml).await;
    let params = json!({"invoice": "DE-2", "amount": 9, "base_url": stage.witness.url});
    let run = stage.db.start(stage.company, playbook, params).await;
    let (error, _) = stage.ends(run, RunStatus::Failed).await;
    assert_eq!(error["step"], "book");
    let paths = stage.witness.paths();
    assert_eq!(paths[4..], ["/reserve", "/charge", "/refused", "/refund", "/release", "/ledger"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn many_questions_are_asked_at_once() {
    let stage = Stage::new(json!({"answer": {"text": "42"}, "write_report": {"text": "All is 42."}})).await;
    let questions: Vec<String> = (0..30).map(|n| format!("question {n}")).collect();
    let run = stage.start("fan-out-research", json!({"questions": questions})).await;
    let (output, _) = stage.completes(run).await;
    assert_eq!(output, json!({"asked": 30, "report": "All is 42."}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_sync_goes_on_without_one_source_and_never_twice_at_once() {
    let stage = Stage::new(json!({})).await;
    stage.witness.hold(true);
    let run = stage.start("nightly-sync", json!({})).await;
    eventually("both sources to be read", || async { stage.witness.held_calls() == 2 }).await;
    assert_eq!(stage.start("nightly-sync", json!({})).await, run, "another one is the same");
    stage.witness.hold(false);
    let (output, _) = stage.completes(run).await;
    assert_eq!(output["complete"], json!(true));
    let yaml = text("nightly-sync").replace("/stock", "/refused").replace("nightly-sync", "partial-sync");
    let playbook = stage.db.playbook(stage.company, &yaml).await;
    let run = stage.db.start(stage.company, playbook, json!({"base_url": stage.witness.url})).await;
    let (output, steps) = stage.completes(run).await;
    assert_eq!((&output["complete"], status(&steps, "stock")), (&json!(false), "failed"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_goes_to_a_person_where_the_agent_is_unsure() {
    let stage = Stage::new(json!({"answer_customer": {"text": "Perhaps.", "confidence": 0.4}})).await;
    let params = json!({"ticket": "T-1", "question": "Why?"});
    let run = stage.start("human-hand-off", params.clone()).await;
    stage.db.until(stage.company, run, RunStatus::Suspended).await;
    stage.send("ticket.answered", json!({"ticket": "T-1", "text": "Because."})).await;
    assert_eq!(stage.completes(run).await.0, json!({"by_a_person": true}));
    let run = stage.start("human-hand-off", json!({"ticket": "T-2", "question": "Why?"})).await;
    stage.time_passes(run).await;
    let (output, steps) = stage.completes(run).await;
    assert_eq!((output, status(&steps, "person")), (json!({"by_a_person": false}), "failed"));
    let stage = Stage::new(json!({"answer_customer": {"text": "So.", "confidence": 0.9}})).await;
    let run = stage.start("human-hand-off", params).await;
    assert_eq!(status(&stage.completes(run).await.1, "person"), "skipped");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_customer_is_reminded_until_they_order() {
    let stage = Stage::new(json!({})).await;
    let run = stage.start("customer-onboarding", json!({"event": {"customer": "C-1"}})).await;
    stage.time_passes(run).await;
    eventually("a reminder", || async {
        stage
            .db
            .count("select count(*) from events where event = 'step.completed' and data ->> 'step' = 'reminder'")
            .await
            == 1
    })
    .await;
    stage.db.until(stage.company, run, RunStatus::Suspended).await;
    stage.send("order.placed", json!({"customer": "C-1"})).await;
    assert_eq!(stage.completes(run).await.0, json!({"ordered": true}));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_is_checked_approved_and_rolled_back() {
    let stage = Stage::new(json!({})).await;
    let run = stage.start("release-train", json!({"version": "1.2.3"})).await;
    stage.approve(run).await;
    stage.completes(run).await;
    let mut paths = stage.witness.paths();
    paths[..2].sort_unstable();
    assert_eq!(paths, ["/scan/1.2.3", "/test/1.2.3", "/deploy/europe/1.2.3", "/deploy/america/1.2.3"]);
    let yaml = text("release-train").replace("/deploy/america", "/refused").replace("release-train", "broken-train");
    let playbook = stage.db.playbook(stage.company, &yaml).await;
    let run = stage.db.start(stage.company, playbook, json!({"version": "2.0.0", "base_url": stage.witness.url})).await;
    stage.approve(run).await;
    let (error, steps) = stage.ends(run, RunStatus::Failed).await;
    assert_eq!((&error["step"], status(&steps, "note")), (&json!("america"), "completed"));
    assert_eq!(stage.witness.paths().last().map(String::as_str), Some("/rollback/europe"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_report_is_put_together_of_sections() {
    let stage = Stage::new(json!({"write_section": {"text": "Good."}, "bind_report": {"text": "All good."}})).await;
    stage.db.playbook(stage.company, &text("report-section")).await;
    let run = stage.start("quarterly-report", json!({"quarter": "2026-Q3"})).await;
    let (output, _) = stage.completes(run).await;
    assert_eq!(output, json!("report-2026-Q3.md"));
    assert_eq!(stage.db.count("select count(*) from runs where called and status = 'completed'").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_lead_is_checked_at_the_door() {
    let stage = Stage::new(json!({})).await;
    let playbook = stage.db.playbook(stage.company, &text("lead-intake")).await;
    let path = format!("/v1/companies/{}/playbooks/{playbook}/run", stage.company);
    let wrong = json!({"params": {"email": "nobody", "seats": 0, "tags": ["x", 1]}});
    let (code, body) = stage.api.post(&path, wrong).await;
    assert_eq!(code, 400, "{body}");
    let fields: Vec<&str> =
        body["error"]["fields"].as_array().unwrap().iter().map(|field| field["field"].as_str().unwrap()).collect();
    assert_eq!(fields, ["params.email", "params.seats", "params.tags", "params.company"]);
    let small = json!({"email": "a@example.com", "company": "A", "seats": 50, "tags": ["new"]});
    let run = stage.start("lead-intake", small).await;
    let (output, steps) = stage.completes(run).await;
    assert_eq!(
        (&output["large"], status(&steps, "offer"), status(&steps, "newsletter")),
        (&json!(false), "skipped", "completed")
    );
    let run = stage.start("lead-intake", json!({"email": "b@example.com", "company": "B", "seats": 900})).await;
    stage.approve(run).await;
    let (output, steps) = stage.completes(run).await;
    assert_eq!((&output["points"], status(&steps, "offer")), (&json!(80), "completed"));
}

/// What the guide prints can be copied.
#[test]
fn every_playbook_of_the_guide_is_in_order() {
    let mut found = 0;
    for entry in std::fs::read_dir("docs/guide").unwrap() {
        let path = entry.unwrap().path();
        let page = std::fs::read_to_string(&path).unwrap();
        for block in page.split("```yaml\n").skip(1) {
            let (text, _) = block.split_once("```").unwrap();
            let loaded = capx_core::domain::playbook::read(text);
            let (_, warnings) = loaded.unwrap_or_else(|problems| panic!("{}: {problems:?}", path.display()));
            assert_eq!(warnings, [], "{}", path.display());
            found += 1;
        }
    }
    assert!(found >= 14, "{found}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_post_goes_out_when_it_is_good_enough_or_a_person_says_so() {
    let scores = |voice: f64, accuracy: f64| {
        let scores = json!({"quality": 0.9, "brand_voice": voice, "originality": 0.8, "accuracy": accuracy});
        json!({"write_post": {"title": "Tides", "text": "They come and go."}, "rubric.grade": {"scores": scores}})
    };
    let stage = Stage::new(scores(0.95, 1.0)).await;
    let run = stage.start("product-post", json!({"product": "tides"})).await;
    let (output, _) = stage.completes(run).await;
    assert_eq!(output, json!({"path": "post.md", "score": 0.91}));
    // Its voice is another: a person takes it.
    let stage = Stage::new(scores(0.6, 1.0)).await;
    let run = stage.start("product-post", json!({"product": "tides"})).await;
    stage.approve(run).await;
    let (output, _) = stage.completes(run).await;
    assert_eq!(output["score"], json!(0.805));
    // What is wrong does not go out.
    let stage = Stage::new(scores(0.6, 0.5)).await;
    let run = stage.start("product-post", json!({"product": "tides"})).await;
    let (error, steps) = stage.ends(run, RunStatus::Failed).await;
    assert_eq!((&error["code"], status(&steps, "publish")), (&json!("rubric"), "skipped"));
}
