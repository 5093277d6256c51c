//! Rubrics: what a step says is graded, kept, done anew, shown to a person or given
//! up, and a run holds to its limits; nobody pays twice for a draft.

use std::sync::{Arc, Mutex};

use axum::Json;
use axum::extract::State;
use axum::http::HeaderMap;
use axum::routing::post;
use capx_core::domain::ids::{ApprovalId, CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::engine::gates::Verdict;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};

/// What an agent was asked, with the key of the call.
type Asked = Arc<Mutex<Vec<(String, Value)>>>;

/// An agent that answers each action with what is next in its script, and with the last
/// of that for ever.
#[derive(Clone)]
struct Agent {
    script: Arc<Mutex<Value>>,
    asked: Asked,
    url: String,
}

impl Agent {
    async fn start(script: Value) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let agent = Self {
            script: Arc::new(Mutex::new(script)),
            asked: Asked::default(),
            url: format!("http://{}", listener.local_addr().unwrap()),
        };
        let router = axum::Router::new().fallback(post(answer)).with_state(agent.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        agent
    }

    /// The actions that it was asked for.
    fn actions(&self) -> Vec<String> {
        let asked = self.asked.lock().unwrap();
        asked.iter().map(|(_, body)| body["action"].as_str().unwrap().to_owned()).collect()
    }

    fn body(&self, at: usize) -> Value {
        self.asked.lock().unwrap()[at].1.clone()
    }
}

async fn answer(State(agent): State<Agent>, headers: HeaderMap, Json(body): Json<Value>) -> Json<Value> {
    let key = headers["idempotency-key"].to_str().unwrap().to_owned();
    let mut script = agent.script.lock().unwrap();
    let answers = script[body["action"].as_str().unwrap()].as_array_mut().expect("no answer for that");
    let answer = if answers.len() > 1 { answers.remove(0) } else { answers[0].clone() };
    agent.asked.lock().unwrap().push((key, body));
    Json(json!({"output": answer, "cost": 0.5}))
}

struct Stage {
    db: Db,
    api: Api,
    agent: Agent,
    company: CompanyId,
}

impl Stage {
    async fn new(script: Value) -> Self {
        let agent = Agent::start(script).await;
        let db = Db::new().await;
        let api = db.api().await;
        let company = db.company(&["writer", "editor"], "custom", json!({"endpoint": agent.url})).await;
        Self { db, api, agent, company }
    }

    async fn start(&self, yaml: &str) -> (PlaybookId, RunId) {
        let playbook = self.db.playbook(self.company, yaml).await;
        (playbook, self.db.start(self.company, playbook, json!({})).await)
    }

    async fn shown(&self, (playbook, run): (PlaybookId, RunId)) -> Value {
        let path = format!("/v1/companies/{}/playbooks/{playbook}/runs/{run}", self.company);
        self.api.get(&path).await.1["data"].clone()
    }

    /// The data of all events of a name.
    async fn events(&self, run: RunId, name: &str) -> Vec<Value> {
        let found = sqlx::query_scalar("select data from events where run_id = $1 and event = $2 order by seq");
        found.bind(run.0).bind(name).fetch_all(&self.db.pool).await.unwrap()
    }

    /// The time of the run's gate is over.
    async fn expire(&self, run: RunId) {
        let over = "update jobs set due_at = now() where kind = 'gate_timeout' and ref_id = $1";
        let over = sqlx::query(over).bind(run.0).execute(&self.db.pool).await.unwrap();
        assert_eq!(over.rows_affected(), 1);
    }

    async fn gate(&self, run: RunId) -> ApprovalId {
        let gate = sqlx::query_scalar("select id from approvals where run_id = $1 and status = 'pending'");
        ApprovalId(gate.bind(run.0).fetch_one(&self.db.pool).await.unwrap())
    }
}

fn draft(rubric: &str) -> String {
    format!("name: x\nsteps:\n  - {{id: draft, role: writer, action: write, rubric: {{{rubric}}}}}\n")
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_is_made_again_with_what_it_lacked() {
    let stage = Stage::new(json!({
        "write": [{"text": "first"}, {"text": "second"}],
        "rubric.grade": [
            {"scores": {"tone": {"score": 0.5, "feedback": "too loud"}, "depth": 0.9}, "feedback": "nearly"},
            {"scores": {"tone": 0.9, "depth": 0.7}},
        ],
    }))
    .await;
    let _worker = stage.db.worker(SHORT_LEASE);
    let yaml = draft("tone: 0.8, depth: {threshold: 0.6, weight: 3, description: how far it goes}")
        + "output: {text: '${steps.draft.output.text}', score: '${steps.draft.score}'}\n";
    let run = stage.start(&yaml).await;
    let row = stage.db.until(stage.company, run.1, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!({"text": "second", "score": 0.75})));
    assert_eq!(stage.agent.actions(), ["write", "rubric.grade", "write", "rubric.grade"]);
    let asked = stage.agent.body(1)["params"].clone();
    assert_eq!((&asked["step"], &asked["output"]), (&json!("draft"), &json!({"text": "first"})));
    assert_eq!(
        asked["criteria"],
        json!([
            {"name": "tone", "threshold": 0.8},
            {"name": "depth", "threshold": 0.6, "description": "how far it goes"},
        ])
    );
    assert_eq!(stage.agent.body(0)["feedback"], Value::Null);
    let feedback = stage.agent.body(2)["feedback"].clone();
    assert_eq!((&feedback["decision"], &feedback["feedback"]), (&json!("retry"), &json!("nearly\ntone: too loud")));
    let keys: std::collections::HashSet<String> =
        stage.agent.asked.lock().unwrap().iter().map(|(key, _)| key.clone()).collect();
    assert_eq!(keys.len(), 4, "each draft and each grading has a key of its own");
    let shown = stage.shown(run).await;
    let step = &shown["steps"][0];
    assert_eq!((&step["score"], &step["output"]["text"], &step["cost"]), (&json!(0.75), &json!("second"), &json!(2.0)));
    assert_eq!((&step["rubric"]["passed"], &step["rubric"]["draft"]), (&json!(true), &json!(2)), "{step}");
    let told = stage.events(run.1, "rubric.evaluated").await;
    let decisions: Vec<&Value> = told.iter().map(|data| &data["decision"]).collect();
    assert_eq!(decisions, [&json!("retry"), &json!("pass")]);
    assert_eq!(stage.events(run.1, "step.completed").await[0]["score"], json!(0.75));
    stage.db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_computed_and_what_an_agent_says_of_itself_need_no_judge() {
    let stage = Stage::new(json!({
        "write": [{"title": "A title that is too long", "scores": {"tone": 0.9}}, {"title": "Short", "scores": {"tone": 0.9}}],
    }))
    .await;
    let _worker = stage.db.worker(SHORT_LEASE);
    let yaml = draft("tone: 0.8, short: {check: 'len(steps.draft.output.title) < 10'}");
    let run = stage.start(&yaml).await;
    stage.db.until(stage.company, run.1, RunStatus::Completed).await;
    assert_eq!(stage.agent.actions(), ["write", "write"]);
    // What it does not say it does not come up to.
    let yaml = draft("max_retries: 1, said: {check: 'steps.draft.output.nothing == 1'}");
    let run = stage.start(&yaml).await;
    let row = stage.db.until(stage.company, run.1, RunStatus::Failed).await;
    let error = row.error.unwrap();
    assert_eq!(error["code"], json!("rubric"));
    let message = error["message"].as_str().unwrap();
    assert_eq!(message, "the output does not meet the step's rubric, after 2 drafts: said is 0.0 where 1.0 is asked");
    let told = stage.shown(run).await["steps"][0]["rubric"].clone();
    assert!(told["feedback"].as_str().unwrap().contains("nothing"), "{told}");
    assert_eq!(stage.db.count("select count(*) from dead_letters").await, 1);
    // Who retries it allows as many drafts again, and they are told what was missing.
    let before = stage.agent.actions().len();
    let path = format!("/v1/companies/{}/playbooks/{}/runs/{}/retry", stage.company, run.0, run.1);
    assert_eq!(stage.api.post(&path, json!({})).await.0, 200);
    eventually("two more drafts", || async { stage.agent.actions().len() == before + 2 }).await;
    stage.db.until(stage.company, run.1, RunStatus::Failed).await;
    assert_eq!(stage.agent.body(before)["feedback"]["decision"], json!("block"));
    stage.db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_person_decides_about_what_is_below_the_composite_threshold() {
    let stage = Stage::new(json!({
        "write": [{"text": "so so"}],
        "rubric.grade": [{"scores": {"quality": 0.8, "voice": 0.7}}],
    }))
    .await;
    let worker = stage.db.worker(SHORT_LEASE);
    let rubric = "judge: editor, composite_threshold: 0.82, quality: {weight: 0.6}, voice: {weight: 0.4}";
    let graph = "  - {id: other, needs: [], action: transform}\n";
    for beside in ["", graph] {
        let yaml = draft(rubric) + beside + "output: '${steps.draft.score}'\n";
        let run = stage.start(&yaml).await;
        stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
        let gate = stage.gate(run.1).await;
        let (_, approval) = stage.api.get(&format!("/v1/approvals/{gate}")).await;
        let context = &approval["data"]["context"];
        assert_eq!((&context["output"]["text"], &context["rubric"]["score"]), (&json!("so so"), &json!(0.76)));
        assert_eq!(stage.shown(run).await["steps"][0]["status"], json!("pending_approval"));
        stage.db.decide(gate, &Verdict::Approve { note: None, params: None }).await.unwrap();
        let row = stage.db.until(stage.company, run.1, RunStatus::Completed).await;
        assert_eq!(row.output, Some(json!(0.76)));
        assert_eq!(stage.shown(run).await["steps"][0]["output"], json!({"text": "so so"}));
    }
    assert_eq!(stage.agent.actions(), ["write", "rubric.grade", "write", "rubric.grade"], "nothing is done again");
    // A refusal fails the step; whoever retries has another draft made, with what was said.
    let run = stage.start(&(draft(rubric) + "  - {id: after, action: transform}\n")).await;
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    let no = Verdict::Reject { feedback: "dull".into() };
    stage.db.decide(stage.gate(run.1).await, &no).await.unwrap();
    let row = stage.db.until(stage.company, run.1, RunStatus::Failed).await;
    assert!(row.error.unwrap()["message"].as_str().unwrap().contains("dull"));
    let path = format!("/v1/companies/{}/playbooks/{}/runs/{}", stage.company, run.0, run.1);
    assert_eq!(stage.shown(run).await["steps"][0]["rubric"]["decision"], json!("reject"));
    assert_eq!(stage.api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    assert_eq!(stage.agent.actions().len(), 8);
    assert_eq!(stage.agent.body(6)["feedback"]["feedback"], json!("dull"));
    // Where nobody decides, the same draft is asked about again.
    stage.expire(run.1).await;
    let row = stage.db.until(stage.company, run.1, RunStatus::Failed).await;
    assert!(row.error.unwrap()["message"].as_str().unwrap().contains("expired"));
    assert_eq!(stage.api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    // An accepted draft outlives everybody.
    worker.stop().await;
    stage.db.decide(stage.gate(run.1).await, &Verdict::Approve { note: None, params: None }).await.unwrap();
    let _worker = stage.db.worker(SHORT_LEASE);
    stage.db.until(stage.company, run.1, RunStatus::Completed).await;
    assert_eq!(stage.agent.actions().len(), 8, "nothing is done again");
    // A replay takes the score along.
    let (status, body) = stage.api.post(&format!("{path}/replay"), json!({"from_step": "after"})).await;
    assert_eq!(status, 201, "{body}");
    let again: RunId = body["data"]["run_id"].as_str().unwrap().parse().unwrap();
    stage.db.until(stage.company, again, RunStatus::Completed).await;
    assert_eq!(stage.shown((run.0, again)).await["steps"][0]["score"], json!(0.76));
    assert_eq!(stage.agent.actions().len(), 8);
    stage.db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_draft_that_was_turned_down_holds_nobody_up_who_comes_later() {
    let stage = Stage::new(json!({
        "write": [{"text": "so so"}, {"text": "better"}],
        "rubric.grade": [{"scores": {"quality": 0.5}}],
    }))
    .await;
    let _worker = stage.db.worker(SHORT_LEASE);
    // A loop comes by again, and makes another draft.
    let rubric = "judge: editor, quality: {threshold: 0.8, on_fail: escalate}";
    let yaml = draft(rubric).replace("rubric", "on_failure: continue, rubric")
        + "  - {id: again, goto: draft, if: steps.draft.error, max_retries: 2}\n"
        + "output: '${steps.draft.output.text}'\n";
    let run = stage.start(&yaml).await;
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    let first = stage.gate(run.1).await;
    stage.db.decide(first, &Verdict::Reject { feedback: "dull".into() }).await.unwrap();
    eventually("another gate", || async {
        let pending = "select count(*) from approvals where status = 'pending'";
        stage.db.count(pending).await == 1
    })
    .await;
    stage.db.decide(stage.gate(run.1).await, &Verdict::Approve { note: None, params: None }).await.unwrap();
    let row = stage.db.until(stage.company, run.1, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!("better")));
    assert_eq!(stage.agent.actions(), ["write", "rubric.grade", "write", "rubric.grade"]);
    // In a graph, whoever retries the run has another draft made; the gate before the
    // step, which was opened, stays open.
    let yaml = draft(rubric).replace("rubric", "needs: [], approval: required, rubric")
        + "  - {id: other, needs: [], action: transform}\n";
    let run = stage.start(&yaml).await;
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    stage.db.decide(stage.gate(run.1).await, &Verdict::Approve { note: None, params: None }).await.unwrap();
    let drafted = || async { stage.agent.actions().len() };
    eventually("a draft", || async { drafted().await == 6 }).await;
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    stage.db.decide(stage.gate(run.1).await, &Verdict::Reject { feedback: "flat".into() }).await.unwrap();
    stage.db.until(stage.company, run.1, RunStatus::Failed).await;
    let path = format!("/v1/companies/{}/playbooks/{}/runs/{}", stage.company, run.0, run.1);
    assert_eq!(stage.api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    eventually("another draft", || async { drafted().await == 8 }).await;
    assert_eq!(stage.agent.body(6)["feedback"]["feedback"], json!("flat"));
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    // Nobody decides in time: the same draft is asked about again.
    stage.expire(run.1).await;
    stage.db.until(stage.company, run.1, RunStatus::Failed).await;
    assert_eq!(stage.api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    stage.db.until(stage.company, run.1, RunStatus::Suspended).await;
    stage.db.decide(stage.gate(run.1).await, &Verdict::Approve { note: None, params: None }).await.unwrap();
    stage.db.until(stage.company, run.1, RunStatus::Completed).await;
    assert_eq!(drafted().await, 8);
    stage.db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_criterion_that_blocks_fails_the_step_and_the_strictest_counts() {
    let stage = Stage::new(json!({
        "write": [{"text": "wrong"}],
        "rubric.grade": [{"scores": {"tone": 0.1}}, {"scores": {"tone": 0.1, "accuracy": 0.5}}],
    }))
    .await;
    let _worker = stage.db.worker(SHORT_LEASE);
    let yaml = draft("tone: 0.8, accuracy: {threshold: 0.95, on_fail: block}")
        .replace("rubric", "on_failure: continue, retry: {initial: 1ms}, rubric")
        + "  - {id: told, action: transform, if: 'steps.draft.error.code == \"rubric\"', params: {why: '${steps.draft.error.message}'}}\n";
    let run = stage.start(&yaml).await;
    stage.db.until(stage.company, run.1, RunStatus::Completed).await;
    // A grading without a score is tried again, and the draft is not made again for it.
    assert_eq!(stage.agent.actions(), ["write", "rubric.grade", "rubric.grade"]);
    let shown = stage.shown(run).await;
    let why = shown["steps"][1]["output"]["why"].as_str().unwrap();
    assert!(why.ends_with("tone is 0.1 where 0.8 is asked, accuracy is 0.5 where 0.95 is asked"), "{shown}");
    assert_eq!(shown["steps"][0]["rubric"]["decision"], json!("block"));
    stage.db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_holds_to_its_limits() {
    let stage = Stage::new(json!({"write": [{"sources": [1, 2, 3]}]})).await;
    let _worker = stage.db.worker(SHORT_LEASE);
    let steps = "  - {id: a, role: writer, action: write}\n  - {id: b, role: writer, action: write}\n  - {id: c, role: writer, action: write}\n";
    let with = |limits: &str| format!("name: x\nsteps:\n{steps}rubric: {{{limits}}}\n");
    let run = stage.start(&with("min_sources: 3, max_cost: 1.5, min_words: 9, max_duration: 1h")).await;
    stage.db.until(stage.company, run.1, RunStatus::Completed).await;
    let told = stage.shown(run).await["rubric"].clone();
    assert_eq!((&told["score"], &told["passed"]), (&json!(1.0), &json!(true)), "{told}");
    assert_eq!(told["criteria"][0], json!({"name": "min_sources", "limit": 3.0, "value": 3.0, "passed": true}));
    // What nobody has said is neither held nor broken.
    assert_eq!(told["criteria"][2], json!({"name": "min_words", "limit": 9.0, "value": null, "passed": null}));
    assert_eq!(stage.events(run.1, "rubric.evaluated").await.len(), 1);
    // Its work is done, and it is told what it lacks.
    let run = stage.start(&with("min_sources: 4")).await;
    let row = stage.db.until(stage.company, run.1, RunStatus::Failed).await;
    let error = row.error.unwrap();
    assert_eq!(
        (error["code"].as_str(), error["message"].as_str()),
        (Some("rubric"), Some("the run does not meet its rubric: sources is 3, where at least 4 is asked"))
    );
    // Money that is spent is not spent on: it ends after the step that was too much.
    let closing = "finally:\n  - {id: told, action: transform, params: {why: '${run.error.code}'}}\n";
    let graph = with("max_cost: 0.75").replace("id: b", "id: b, needs: a");
    for (yaml, parallel) in [(with("max_cost: 0.75") + closing, false), (graph, true)] {
        let before = stage.agent.actions().len();
        let run = stage.start(&yaml).await;
        let row = stage.db.until(stage.company, run.1, RunStatus::Failed).await;
        assert!(row.error.unwrap()["message"].as_str().unwrap().contains("cost is 1, where at most 0.75 is asked"));
        assert_eq!(stage.agent.actions().len(), before + 2, "graph: {parallel}");
        let shown = stage.shown(run).await;
        assert_eq!(
            (&shown["steps"][1]["status"], &shown["steps"][2]["status"]),
            (&json!("completed"), &json!("skipped"))
        );
        assert_eq!(shown["rubric"]["passed"], json!(false));
        let path = format!("/v1/companies/{}/playbooks/{}/runs/{}/retry", stage.company, run.0, run.1);
        assert_eq!(stage.api.post(&path, json!({})).await.0, 409);
    }
    stage.db.assert_nothing_stranded().await;
}
