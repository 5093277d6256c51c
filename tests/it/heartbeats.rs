//! Heartbeats: what agents find to do they do, once, whoever dies over it; beats are neither
//! missed nor piled up, and cost nothing where there is nothing to do.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use axum::Router;
use axum::routing::post;
use capx_core::domain::ids::CompanyId;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

async fn company(api: &Api, agents: Value, more: Value) -> CompanyId {
    let mut body = json!({"name": "c", "agents": agents});
    body.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    api.company(body).await
}

async fn task(api: &Api, company: CompanyId, body: Value) -> String {
    let (status, made) = api.post(&format!("/v1/companies/{company}/tasks"), body).await;
    assert_eq!(status, 201, "{made}");
    made["data"]["id"].as_str().unwrap().to_owned()
}

async fn shown(api: &Api, company: CompanyId, task: &str) -> Value {
    api.get(&format!("/v1/companies/{company}/tasks/{task}")).await.1["data"].clone()
}

async fn becomes(api: &Api, company: CompanyId, task: &str, status: &str) -> Value {
    eventually("a task to be so", || async {
        let shown = shown(api, company, task).await;
        assert!(
            shown["status"] == status || !["failed", "completed"].contains(&shown["status"].as_str().unwrap()),
            "{shown}"
        );
        shown["status"] == status
    })
    .await;
    shown(api, company, task).await
}

async fn events(db: &Db, name: &str) -> Vec<Value> {
    sqlx::query_scalar("select data from events where event = $1 order by xid, id")
        .bind(name)
        .fetch_all(&db.pool)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_does_its_tasks_the_most_urgent_first_and_says_what_came_of_them() {
    let db = Db::new().await;
    let api = db.api().await;
    let agents = json!([{"role": "writer", "adapter": "claude", "instructions": "Write."}]);
    let body = json!({"config": {"governance": "human_in_loop"}});
    // Nobody beats yet, so that all of them wait.
    let company = {
        let _worker = db.worker(SHORT_LEASE);
        company(&api, agents, body).await
    };
    let mut tasks = Vec::new();
    for (title, priority) in [("a", "low"), ("b", "critical"), ("c", "medium"), ("d", "critical")] {
        tasks.push(task(&api, company, json!({"title": title, "priority": priority, "metadata": {"k": title}})).await);
    }
    let _worker = db.worker(SHORT_LEASE);
    tokio::time::sleep(Duration::from_millis(500)).await;
    for task in &tasks {
        assert_eq!(shown(&api, company, task).await["status"], "pending_approval", "a person has the first word");
    }
    api.post(&format!("/v1/companies/{company}/pause"), json!({})).await;
    for task in &tasks {
        let (status, answer) = api.post(&format!("/v1/companies/{company}/tasks/{task}/approve"), json!({})).await;
        assert_eq!(status, 200, "{answer}");
    }
    api.post(&format!("/v1/companies/{company}/resume"), json!({})).await;
    api.post(&format!("/v1/companies/{company}/agents/writer/wake"), json!({})).await;
    for task in &tasks {
        let done = becomes(&api, company, task, "completed").await;
        assert!(done["result"]["text"].is_string() && done["run_id"].is_string(), "{done}");
        assert_eq!(done["result"]["simulated"], true);
        let run = done["run_id"].as_str().unwrap();
        let (status, run) = api.get(&format!("/v1/runs/{run}")).await;
        assert_eq!((status, &run["data"]["params"]["task"]["id"]), (200, &json!(task)), "{run}");
    }
    let begun: Vec<Value> = events(&db, "task.started").await.into_iter().map(|event| event["title"].clone()).collect();
    assert_eq!(begun, [json!("b"), json!("d"), json!("c"), json!("a")]);
    eventually("the beat to be over", || async { !events(&db, "heartbeat.fired").await.is_empty() }).await;
    let beats = events(&db, "heartbeat.fired").await;
    assert_eq!(beats.iter().map(|beat| beat["items"].as_i64().unwrap()).sum::<i64>(), 4, "{beats:?}");
    assert!(beats.iter().any(|beat| beat["reasons"].as_array().unwrap().contains(&json!("woken"))), "{beats:?}");
    // What agents do by is not among what authors wrote.
    let (_, list) = api.get(&format!("/v1/companies/{company}/playbooks")).await;
    assert_eq!(list["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_waits_for_those_that_it_needs_and_fails_with_them() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let script = json!({"task": {"found": 7}});
    let agents = json!([
        {"role": "a", "adapter": "claude", "instructions": "x", "config": {"script": script}},
        {"role": "b", "adapter": "claude", "instructions": "x"},
    ]);
    let company = company(&api, agents, json!({})).await;
    let pause = |role: &str| format!("/v1/companies/{company}/agents/{role}/pause");
    api.post(&pause("a"), json!({})).await;
    let first = task(&api, company, json!({"title": "first", "agent_id": "a"})).await;
    let second = task(&api, company, json!({"title": "second", "agent_id": "b", "needs": [first]})).await;
    let lost = task(&api, company, json!({"title": "lost", "agent_id": "a"})).await;
    let with_it = task(&api, company, json!({"title": "with it", "agent_id": "b", "needs": [lost]})).await;
    let behind = task(&api, company, json!({"title": "behind", "agent_id": "b", "needs": [with_it]})).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert_eq!(shown(&api, company, &second).await["status"], "pending");
    api.post(&format!("/v1/companies/{company}/tasks/{lost}/cancel"), json!({})).await;
    let failed = becomes(&api, company, &behind, "failed").await;
    assert_eq!(failed["error"]["message"], "a task that it needs is failed", "{failed}");
    assert_eq!(shown(&api, company, &with_it).await["status"], "failed");
    api.post(&format!("/v1/companies/{company}/agents/a/resume"), json!({})).await;
    let done = becomes(&api, company, &second, "completed").await;
    let (_, run) = api.get(&format!("/v1/runs/{}", done["run_id"].as_str().unwrap())).await;
    assert_eq!(run["data"]["params"]["task"]["needs"][0]["result"]["found"], 7, "{run}");
    // Mistakes.
    for (needs, field) in
        [(json!(["x"]), true), (json!([lost]), false), (json!(["tsk_00000000000000000000000000"]), false)]
    {
        let (status, answer) =
            api.post(&format!("/v1/companies/{company}/tasks"), json!({"title": "t", "needs": needs})).await;
        assert_eq!(status, if field { 400 } else { 409 }, "{answer}");
        if field {
            assert_eq!(answer["error"]["fields"][0]["field"], "needs.0");
        }
    }
}

/// An endpoint that takes its time, and knows how many callers it has at once.
async fn slow(takes: Duration) -> (String, Arc<AtomicUsize>, Arc<AtomicUsize>) {
    let (now, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let counts = (Arc::clone(&now), Arc::clone(&most));
    let handler = move || {
        let (now, most) = counts.clone();
        async move {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            tokio::time::sleep(takes).await;
            now.fetch_sub(1, Ordering::SeqCst);
            axum::Json(json!({"output": {"ok": true}, "cost": 0.01}))
        }
    };
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, Router::new().route("/", post(handler))).await });
    (url, now, most)
}

#[tokio::test(flavor = "multi_thread")]
async fn beats_that_take_longer_than_their_interval_do_not_pile_up() {
    no_beats_pile_up(Duration::from_millis(1_500), Duration::ZERO).await;
}

/// As long as the longest calls of models: nobody waits for that by default.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "takes five minutes"]
async fn beats_of_130_seconds_every_second_do_not_pile_up() {
    no_beats_pile_up(Duration::from_secs(130), Duration::from_secs(250)).await;
}

async fn no_beats_pile_up(takes: Duration, patience: Duration) {
    let db = Db::new().await;
    let _workers = [db.worker(SHORT_LEASE), db.worker(SHORT_LEASE)];
    let api = db.api().await;
    let (url, _, most) = slow(takes).await;
    let config = json!({"endpoint": url, "heartbeat_interval": 1, "timeout": "200s"});
    let company =
        company(&api, json!([{"role": "a", "adapter": "custom", "instructions": "x", "config": config}]), json!({}))
            .await;
    let tasks = [task(&api, company, json!({"title": "1"})).await, task(&api, company, json!({"title": "2"})).await];
    let done = || async {
        api.post(&format!("/v1/companies/{company}/agents/a/wake"), json!({})).await;
        let due = db.count("select count(*) from jobs where kind = 'heartbeat'").await;
        assert_eq!(due, 1, "one heartbeat, due or under way");
        assert!(db.count("select count(*) from runs where status in ('queued', 'running')").await <= 1);
        db.count("select count(*) from tasks where status = 'completed'").await == 2
    };
    let began = Instant::now();
    while began.elapsed() < patience && !done().await {
        tokio::time::sleep(Duration::from_millis(200)).await;
    }
    eventually("both to be done", done).await;
    assert_eq!(most.load(Ordering::SeqCst), 1, "an agent does one thing at a time");
    eventually("idle beats", || async { events(&db, "heartbeat.fired").await.len() >= 4 }).await;
    let beats = events(&db, "heartbeat.fired").await;
    assert_eq!(beats.iter().map(|beat| beat["items"].as_i64().unwrap()).sum::<i64>(), 2, "{beats:?}");
    assert_eq!(beats.iter().map(|beat| beat["cost"].as_f64().unwrap()).sum::<f64>(), 0.02, "{beats:?}");
    assert_eq!(shown(&api, company, &tasks[0]).await["cost"], 0.01);
    assert_eq!(db.count("select count(*) from runs").await, 2, "idle beats ask nobody");
    let agent = api.get(&format!("/v1/companies/{company}/agents/a")).await.1["data"].clone();
    assert!(agent["heartbeat_count"].as_i64().unwrap() >= 4, "{agent}");
}

/// Where a worker may die over a beat.
pub const POINTS: &[&str] = &["beat.before_commit", "beat.after_commit"];

#[tokio::test(flavor = "multi_thread")]
async fn no_task_is_lost_or_done_twice_whoever_dies_over_a_beat() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = {
        let _worker = db.worker(SHORT_LEASE);
        let agents = json!([{"role": "a", "adapter": "claude", "instructions": "x"}]);
        company(&api, agents, json!({})).await
    };
    let mut tasks = Vec::new();
    for n in 0..4 {
        tasks.push(task(&api, company, json!({"title": n.to_string()})).await);
    }
    for (hit, point) in [1, 2].into_iter().flat_map(|hit| POINTS.iter().map(move |point| (hit, point))) {
        Process::worker(&db, &format!("{point}=kill@{hit}")).dies_at(point).await;
    }
    let _worker = db.worker(SHORT_LEASE);
    for task in &tasks {
        becomes(&api, company, task, "completed").await;
    }
    assert_eq!(db.count("select count(*) from runs where params -> 'task' is not null").await, 4);
    assert_eq!(events(&db, "task.completed").await.len(), 4);
    assert_eq!(db.count("select count(*) from jobs where kind = 'heartbeat'").await, 1);
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_task_stops_and_a_removed_agents_tasks_are_anothers() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let (url, now, _) = slow(Duration::from_secs(20)).await;
    let agents = json!([
        {"role": "slow", "adapter": "custom", "instructions": "x", "config": {"endpoint": url}},
        {"role": "quick", "adapter": "claude", "instructions": "x"},
    ]);
    let company = company(&api, agents, json!({})).await;
    let first = task(&api, company, json!({"title": "first", "agent_id": "slow"})).await;
    let second = task(&api, company, json!({"title": "second", "agent_id": "slow"})).await;
    eventually("it to be called", || async { now.load(Ordering::SeqCst) == 1 }).await;
    let (status, answer) =
        api.send("PATCH", &format!("/v1/companies/{company}/tasks/{first}"), Some(json!({"agent_id": "quick"}))).await;
    assert_eq!(status, 409, "{answer}");
    let (status, _) = api.send("DELETE", &format!("/v1/companies/{company}/agents/slow"), None).await;
    assert_eq!(status, 200);
    becomes(&api, company, &second, "completed").await;
    let (status, answer) = api.post(&format!("/v1/companies/{company}/tasks/{first}/cancel"), json!({})).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("cancelled")));
    eventually("its heartbeat to be gone", || async {
        db.count("select count(*) from jobs where kind = 'heartbeat'").await == 1
            && db.count("select count(*) from runs where status = 'cancelled'").await == 1
    })
    .await;
}
