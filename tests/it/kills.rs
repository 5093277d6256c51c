//! The kill switch: after its answer no call starts any more within a second, anywhere in the
//! fleet, calls under way are cut, and what was stopped goes on when it is lifted.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use axum::Router;
use axum::extract::State;
use axum::routing::any;
use capx_core::domain::ids::CompanyId;
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::{Db, SHORT_LEASE, eventually};
use crate::process::Process;

/// An outside that notes when it is called, and whose answers take their time.
#[derive(Clone, Default)]
struct Outside {
    url: String,
    calls: Arc<Mutex<Vec<Instant>>>,
    open: Arc<AtomicUsize>,
    takes: Duration,
}

struct Open(Arc<AtomicUsize>);

impl Drop for Open {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Outside {
    async fn start(takes: Duration) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let outside = Self { url: format!("http://{}", listener.local_addr().unwrap()), takes, ..Self::default() };
        let router = Router::new().route("/agent", any(agent)).route("/tool", any(tool)).with_state(outside.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        outside
    }

    async fn called(&self) {
        self.calls.lock().unwrap().push(Instant::now());
        self.open.fetch_add(1, Ordering::SeqCst);
        // Should the caller go away, this is dropped.
        let _open = Open(Arc::clone(&self.open));
        tokio::time::sleep(self.takes).await;
    }

    fn count(&self) -> usize {
        self.calls.lock().unwrap().len()
    }

    fn after(&self, moment: Instant) -> usize {
        self.calls.lock().unwrap().iter().filter(|at| **at > moment).count()
    }
}

async fn agent(State(outside): State<Outside>) -> axum::Json<Value> {
    outside.called().await;
    let url = format!("{}/tool", outside.url);
    axum::Json(json!({"tool_calls": [{"id": "c", "name": "http.request", "input": {"url": url}}], "cost": 0.001}))
}

async fn tool(State(outside): State<Outside>) -> axum::Json<Value> {
    outside.called().await;
    axum::Json(json!({"ok": true}))
}

async fn company(db: &Db, outside: &Outside) -> CompanyId {
    let config = json!({"endpoint": format!("{}/agent", outside.url), "max_turns": 500});
    db.company(&["a"], "custom", config).await
}

const STEP: &str = "name: w\nsteps:\n  - {id: do, role: a, action: work}\n";
const RUNS: usize = 200;

#[tokio::test(flavor = "multi_thread")]
async fn a_killed_company_makes_no_call_anywhere_a_second_later() {
    let db = Db::new().await;
    let outside = Outside::start(Duration::from_millis(300)).await;
    let company = company(&db, &outside).await;
    let workers: Vec<Process> = (0..4).map(|_| Process::start(&db, &["worker", "--concurrency", "64"], "")).collect();
    let api = db.api().await;
    eventually("the company to run", || async {
        db.count("select count(*) from agents where status = 'active'").await == 1
    })
    .await;
    let agents = db.playbook(company, STEP).await;
    let url = format!("{}/tool", outside.url);
    let calls: String =
        (0..200).map(|n| format!("  - {{id: c{n}, action: http.request, params: {{url: '{url}'}}}}\n")).collect();
    let tools = db.playbook(company, &format!("name: t\nsteps:\n{calls}")).await;
    for n in 0..RUNS {
        db.start(company, if n % 2 == 0 { agents } else { tools }, json!({})).await;
    }
    eventually("200 steps to run", || async {
        db.count("select count(distinct ref_id) from jobs where kind = 'step' and state = 'running'").await >= 200
            && outside.count() > 400
    })
    .await;
    let (status, answer) = api.post(&format!("/v1/companies/{company}/kill"), json!({})).await;
    let killed = Instant::now();
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("paused")), "{answer}");
    let under_way = outside.open.load(Ordering::SeqCst);
    tokio::time::sleep(Duration::from_secs(3)).await;
    assert!(under_way > 0, "the fault was there: calls were under way");
    assert_eq!(outside.after(killed + Duration::from_secs(1)), 0, "a call started later than a second");
    assert_eq!(outside.open.load(Ordering::SeqCst), 0, "calls under way were cut");
    assert_eq!(db.count("select count(*) from runs where status = 'running'").await, RUNS as i64, "the state is kept");
    // And it goes on.
    let before = outside.count();
    assert_eq!(api.post(&format!("/v1/companies/{company}/resume"), json!({})).await.0, 200);
    eventually("it to go on", || async { outside.count() > before + 200 }).await;
    db.assert_nothing_stranded().await;
    drop(workers);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_and_a_playbook_are_killed_alone() {
    let db = Db::new().await;
    let outside = Outside::start(Duration::from_millis(20)).await;
    let held = Outside::start(Duration::from_secs(30)).await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let company = company(&db, &held).await;
    let mine = db.playbook(company, STEP).await;
    let url = format!("{}/tool", held.url);
    let other = db
        .playbook(company, &format!("name: o\nsteps:\n  - {{id: c, action: http.request, params: {{url: '{url}'}}}}\n"))
        .await;
    let free = format!("{}/tool", outside.url);
    let third = db
        .playbook(
            company,
            &format!("name: f\nsteps:\n  - {{id: c, action: http.request, params: {{url: '{free}'}}}}\n"),
        )
        .await;
    let by_agent = db.start(company, mine, json!({})).await;
    let by_tool = db.start(company, other, json!({})).await;
    eventually("both to call", || async { held.open.load(Ordering::SeqCst) == 2 }).await;
    let (status, answer) = api.post(&format!("/v1/companies/{company}/agents/a/kill"), json!({})).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("paused")), "{answer}");
    eventually("the agent's call to be cut", || async { held.open.load(Ordering::SeqCst) == 1 }).await;
    let (status, answer) = api.post(&format!("/v1/companies/{company}/playbooks/{other}/kill"), json!({})).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("paused")), "{answer}");
    eventually("the other call to be cut", || async { held.open.load(Ordering::SeqCst) == 0 }).await;
    let (_, shown) = api.get(&format!("/v1/companies/{company}/agents/a")).await;
    assert_eq!(shown["data"]["paused_reason"], "it was stopped by its kill switch", "{shown}");
    // Others go on, and what was killed does not.
    let run = db.start(company, third, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!((held.open.load(Ordering::SeqCst), held.count()), (0, 2));
    // Each is let go on by itself.
    api.post(&format!("/v1/companies/{company}/agents/a/resume"), json!({})).await;
    eventually("the agent to call again", || async { held.open.load(Ordering::SeqCst) == 1 }).await;
    api.post(&format!("/v1/companies/{company}/playbooks/{other}/resume"), json!({})).await;
    eventually("the playbook to call again", || async { held.open.load(Ordering::SeqCst) == 2 }).await;
    for run in [by_agent, by_tool] {
        assert_eq!(db.run(company, run).await.status, RunStatus::Running);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_does_a_step_for_a_killed_playbook_stops_with_it() {
    let db = Db::new().await;
    let held = Outside::start(Duration::from_secs(30)).await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let company = company(&db, &held).await;
    let url = format!("{}/tool", held.url);
    let inner = format!("name: inner\nsteps:\n  - {{id: c, action: http.request, params: {{url: '{url}'}}}}\n");
    db.playbook(company, &inner).await;
    db.playbook(company, STEP).await;
    db.playbook(company, "name: middle\nsteps:\n  - {id: call, playbook: inner}\n").await;
    let yaml =
        "name: outer\nsteps:\n  - {id: call, needs: [], playbook: middle}\n  - {id: work, needs: [], playbook: w}\n";
    let outer = db.playbook(company, yaml).await;
    let run = db.start(company, outer, json!({})).await;
    eventually("both to call", || async { held.open.load(Ordering::SeqCst) == 2 }).await;
    let (status, _) = api.post(&format!("/v1/companies/{company}/playbooks/{outer}/kill"), json!({})).await;
    assert_eq!(status, 200);
    eventually("the calls to be cut", || async { held.open.load(Ordering::SeqCst) == 0 }).await;
    eventually("their jobs to be put off", || async {
        db.count("select count(*) from jobs where kind = 'step' and state = 'running'").await == 0
    })
    .await;
    assert_eq!(held.count(), 2);
    assert_eq!(db.run(company, run).await.status, RunStatus::Running);
    api.post(&format!("/v1/companies/{company}/playbooks/{outer}/resume"), json!({})).await;
    eventually("both to call again", || async { held.open.load(Ordering::SeqCst) == 2 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_tool_under_a_killed_agents_role_is_not_used() {
    let db = Db::new().await;
    let outside = Outside::start(Duration::ZERO).await;
    let company = company(&db, &outside).await;
    let step = format!(
        "name: t\nsteps:\n  - {{id: do, role: a, action: http.request, params: {{url: '{}/tool'}}}}\n",
        outside.url
    );
    let playbook = db.playbook(company, &step).await;
    let api = db.api().await;
    let agent = format!("/v1/companies/{company}/agents/a");
    let worker = db.worker(SHORT_LEASE);
    eventually("the agent to be ready", || async { api.get(&agent).await.1["data"]["status"] == "active" }).await;
    worker.stop().await;
    assert_eq!(api.post(&format!("{agent}/kill"), json!({})).await.0, 200);
    // Its first attempt is made by a worker that has never heard of the agent.
    let run = db.start(company, playbook, json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    eventually("the step to wait for its agent", || async {
        db.count("select count(*) from jobs where kind = 'step' and held_for is not null").await == 1
    })
    .await;
    assert_eq!((outside.count(), db.run(company, run).await.status), (0, RunStatus::Running));
    assert_eq!(api.post(&format!("{agent}/resume"), json!({})).await.0, 200);
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(outside.count(), 1);
}
