//! What agents do inside their company: tasks for others, messages, playbooks, memory. Each
//! deed is done once, whoever dies over it.

use capx_core::domain::ids::CompanyId;
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

fn agent(role: &str, script: Value) -> Value {
    json!({"role": role, "adapter": "claude", "instructions": "x", "config": {"script": script}})
}

fn call(name: &str, input: Value) -> Value {
    json!({"tool_calls": [{"name": name, "input": input}]})
}

async fn company(api: &Api, agents: Value) -> CompanyId {
    api.company(json!({"name": "c", "agents": agents})).await
}

const STEP: &str = "name: w\nsteps:\n  - {id: do, role: a, action: work}\noutput: ${steps.do.output}\n";

#[tokio::test(flavor = "multi_thread")]
async fn agents_give_each_other_work_and_hand_on_what_came_of_it() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let lead = json!({"work": [
        call("create_task", json!({"title": "find", "role": "b", "priority": "high"})),
        call("send_message", json!({"to": "b", "body": "mind the prices"})),
        call("run_playbook", json!({"playbook": "other", "params": {"x": 5}})),
        call("list_tasks", json!({})),
        call("create_task", json!({"title": "nobody", "role": "zz"})),
        {"output": {"ok": true}},
    ]});
    let doer = json!({"task": {"found": 42}, "heartbeat": {"read": true}});
    let company = company(&api, json!([agent("a", lead), agent("b", doer)])).await;
    db.playbook(company, "name: other\ninputs: {x: integer}\nsteps:\n  - {id: t, action: transform, params: {x: '${inputs.x}'}}\noutput: ${steps.t.output}\n").await;
    let playbook = db.playbook(company, STEP).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    let path = format!("/v1/companies/{company}/tasks");
    eventually("the task to be done", || async { api.get(&path).await.1["data"][0]["status"] == "completed" }).await;
    let (_, tasks) = api.get(&path).await;
    let task = &tasks["data"][0];
    assert_eq!(
        (&task["title"], &task["result"]["found"], tasks["data"].as_array().unwrap().len()),
        (&json!("find"), &json!(42), 1)
    );
    assert!(task["created_by"].as_str().unwrap().starts_with("ag_"), "{task}");
    // Who was written to has read it, with the task or in a beat of its own.
    eventually("the message to be read", || async {
        db.count("select count(*) from messages where read_at is not null").await == 1
    })
    .await;
    let told: Vec<Value> = sqlx::query_scalar("select params from runs where params -> 'messages' -> 0 is not null")
        .fetch_all(&db.pool)
        .await
        .unwrap();
    assert_eq!(told[0]["messages"][0]["text"], "mind the prices", "{told:?}");
    assert_eq!(told[0]["messages"][0]["from"], "a");
    eventually("the playbook to have run", || async {
        db.count("select count(*) from runs where output ->> 'x' = '5' and status = 'completed'").await == 1
    })
    .await;
    let results: Vec<String> =
        sqlx::query_scalar("select response ->> 'content' from journal where call > 0 and run_id = $1 order by turn")
            .bind(run.0)
            .fetch_all(&db.pool)
            .await
            .unwrap();
    assert!(results[4].contains("no agent of the company has the role `zz`; there are a, b"), "{results:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_remembered_outlives_runs_instructions_and_restarts() {
    let db = Db::new().await;
    let api = db.api().await;
    let script = json!({
        "learn": [
            call("memory_write", json!({"key": "price", "value": {"apples": 3}})),
            call("memory_write", json!({"key": "price", "value": {"apples": 4}})),
            call("memory_write", json!({"key": "rule", "value": "never on Sundays", "scope": "company"})),
            {"output": {}},
        ],
        "use": [
            call("memory_read", json!({"key": "price"})),
            call("memory_search", json!({"query": "sundays"})),
            call("memory_write", json!({"key": "k", "value": 1, "scope": "everybody"})),
            {"output": {}},
        ],
    });
    let company = {
        let worker = db.worker(SHORT_LEASE);
        let company = company(&api, json!([agent("a", script), agent("b", json!({}))])).await;
        let playbook = db.playbook(company, &STEP.replace("work", "learn")).await;
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Completed).await;
        worker.stop().await;
        company
    };
    let patch = json!({"instructions": "Something else altogether."});
    assert_eq!(api.send("PATCH", &format!("/v1/companies/{company}/agents/a"), Some(patch)).await.0, 200);
    let _worker = db.worker(SHORT_LEASE);
    let playbook = db.playbook(company, &STEP.replace("work", "use").replace("name: w", "name: u")).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    let results: Vec<String> =
        sqlx::query_scalar("select response ->> 'content' from journal where call > 0 and run_id = $1 order by turn")
            .bind(run.0)
            .fetch_all(&db.pool)
            .await
            .unwrap();
    assert!(results[0].contains(r#""apples":4"#) && results[0].contains(r#""version":2"#), "{results:?}");
    assert!(results[1].contains("never on Sundays"), "{results:?}");
    assert!(results[2].contains("/scope"), "{results:?}");
    // What it was told at its beginning, and what it looked up, with the versions.
    let (_, feed) = api.get(&format!("/v1/companies/{company}/activity?limit=200")).await;
    let read: Vec<(String, i64, String)> = feed["data"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|event| event["event"] == "memory.read" && event["data"]["run_id"] == json!(run))
        .flat_map(|event| event["data"]["read"].as_array().unwrap().clone())
        .map(|read| {
            let text = |name: &str| read[name].as_str().unwrap().to_owned();
            (text("key"), read["version"].as_i64().unwrap(), text("scope"))
        })
        .collect();
    let price = || ("price".to_owned(), 2, "agent".to_owned());
    let rule = || ("rule".to_owned(), 1, "company".to_owned());
    assert_eq!(read, [rule(), price(), price(), rule()], "{feed}");
    // As a person sees it.
    let memory = format!("/v1/companies/{company}/agents/a/memory");
    let (status, shown) = api.get(&memory).await;
    assert_eq!(
        (status, &shown["data"][0]["key"], &shown["data"][0]["value"]["apples"]),
        (200, &json!("price"), &json!(4)),
        "{shown}"
    );
    let (_, shown) = api.get(&format!("{memory}?search=apples")).await;
    assert_eq!(shown["data"].as_array().unwrap().len(), 1, "{shown}");
    let (_, versions) = api.get(&format!("{memory}/price")).await;
    assert_eq!(versions["data"]["versions"][1]["value"]["apples"], 3, "{versions}");
    assert!(versions["data"]["run_id"].as_str().unwrap().starts_with("run_"), "what has written it is visible");
    let (_, shown) = api.get(&format!("/v1/companies/{company}/memory")).await;
    assert_eq!(shown["data"][0]["key"], "rule", "{shown}");
    let (status, put) = api.post(&memory, json!({"key": "price", "value": 5})).await;
    assert_eq!((status, &put["data"]["version"]), (200, &json!(3)), "{put}");
    assert_eq!(api.send("DELETE", &format!("{memory}/price"), None).await.0, 200);
    assert_eq!(api.get(&format!("{memory}/price")).await.0, 404);
    let (status, answer) = api.post(&memory, json!({"key": "k".repeat(201), "value": null})).await;
    assert_eq!((status, answer["error"]["fields"].as_array().unwrap().len()), (400, 2), "{answer}");
    let (status, answer) = api.post(&memory, json!({"key": "big", "value": "x".repeat(70_000)})).await;
    assert_eq!((status, &answer["error"]["fields"][0]["field"]), (400, &json!("value")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_deed_is_done_once_whoever_dies_over_it() {
    let db = Db::new().await;
    let api = db.api().await;
    let lead = json!({"work": [
        call("create_task", json!({"title": "t", "role": "b"})),
        call("send_message", json!({"channel": "general", "body": "hello"})),
        call("run_playbook", json!({"playbook": "other"})),
        call("memory_write", json!({"key": "k", "value": 1})),
        {"output": {}},
    ]});
    let company = {
        let _worker = db.worker(SHORT_LEASE);
        company(&api, json!([agent("a", lead), agent("b", json!({}))])).await
    };
    api.post(&format!("/v1/companies/{company}/agents/b/pause"), json!({})).await;
    db.playbook(company, "name: other\nsteps:\n  - {id: t, action: transform}\n").await;
    let playbook = db.playbook(company, STEP).await;
    let run = db.start(company, playbook, json!({})).await;
    // Over each of them, when it is done and nobody has written so.
    for _ in 0..4 {
        Process::worker(&db, "agent.call_made=kill@1,commit.after=sleep:10").dies_at("agent.call_made").await;
        // Deaths of one step in a row are counted until it comes on.
        sqlx::query("update jobs set crash_count = 0 where kind = 'step'").execute(&db.pool).await.unwrap();
    }
    let _worker = db.worker(SHORT_LEASE);
    db.until(company, run, RunStatus::Completed).await;
    for (what, sql) in [
        ("tasks", "select count(*) from tasks"),
        ("messages", "select count(*) from messages"),
        ("runs", "select count(*) from runs where trigger = 'agent'"),
        ("memories", "select count(*) from memories"),
    ] {
        let count: i64 = sqlx::query_scalar(sql).fetch_one(&db.pool).await.unwrap();
        assert_eq!(count, 1, "{what}");
    }
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn steps_do_the_same_without_a_model() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let company = company(&api, json!([agent("strategist", json!({}))])).await;
    let yaml = "name: hello-world\nversion: 1\nsteps:\n  - id: greet\n    agent: strategist\n    tool: send_message\n    with: { channel: general, body: Hello }\n  - id: keep\n    tool: memory.write\n    with: { key: greeted, value: '${steps.greet.output.message_id}', scope: company }\n  - id: look\n    tool: memory.read\n    with: { key: greeted }\n  - id: search\n    tool: web_search\n    with: { query: prices }\n    on_failure: continue\noutput: ${steps.look.output.value}\n";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let done = db.until(company, run, RunStatus::Completed).await;
    assert!(done.output.unwrap().as_str().unwrap().starts_with("msg_"));
    let errors: Vec<Value> =
        sqlx::query_scalar("select error from run_steps where status = 'failed'").fetch_all(&db.pool).await.unwrap();
    assert!(errors[0]["message"].as_str().unwrap().contains("CAPX_SEARCH_URL"), "{errors:?}");
}
