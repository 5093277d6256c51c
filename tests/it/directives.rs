//! The AI cofounder: a directive becomes tasks for others, within its budget, and a report when
//! all of them are over. And what stops an agent that gets nowhere.

use capx_core::domain::ids::CompanyId;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::provider::{Provider, Says};

fn call(name: &str, input: Value) -> Value {
    json!({"tool_calls": [{"name": name, "input": input}]})
}

async fn company(api: &Api, agents: Value) -> CompanyId {
    api.company(json!({"name": "c", "agents": agents})).await
}

async fn tasks(api: &Api, company: CompanyId) -> Vec<Value> {
    api.get(&format!("/v1/companies/{company}/tasks?limit=100")).await.1["data"].as_array().unwrap().clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directive_becomes_tasks_and_a_report() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    // What the strategist says is the same for each of its tasks: the second time it finds the
    // tasks given already, by their calls' keys of another task, and gives them once more.
    let plan = json!([
        call("create_task", json!({"title": "research", "role": "researcher"})),
        call("create_task", json!({"title": "write", "role": "writer"})),
        {"output": {"plan": ["research", "write"]}},
    ]);
    let agents = json!([
        {"role": "strategist", "adapter": "claude", "config": {"script": {"task": plan}}},
        {"role": "researcher", "adapter": "claude", "instructions": "x", "config": {"script": {"task": {"found": 1}}}},
        {"role": "writer", "adapter": "claude", "instructions": "x", "config": {"script": {"task": {"text": "t"}}}},
    ]);
    let company = company(&api, agents).await;
    let body = json!({"objective": "Sell more tea", "budget": 500});
    let (status, made) = api.post(&format!("/v1/companies/{company}/directives"), body).await;
    assert_eq!(status, 201, "{made}");
    let directive = made["data"]["id"].as_str().unwrap().to_owned();
    eventually("the report to be written", || async {
        tasks(&api, company)
            .await
            .iter()
            .any(|task| task["title"] == "Report: Sell more tea" && task["status"] == "completed")
    })
    .await;
    let all = tasks(&api, company).await;
    let report = all.iter().find(|task| task["title"] == "Report: Sell more tea").unwrap();
    assert_eq!(report["metadata"]["report_of"], json!(directive));
    let told = report["metadata"]["tasks"].as_array().unwrap();
    assert_eq!(told.len(), 2, "{report}");
    assert!(told.iter().all(|task| task["status"] == "completed"), "{report}");
    assert_eq!(all.iter().filter(|task| task["title"] == "Report: Sell more tea").count(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn all_that_is_done_for_a_directive_counts_against_its_budget() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    // Each call costs 0.25 USD, as its endpoint says: 25 credits.
    let config = json!({"endpoint": format!("{}/custom", provider.url), "max_cost": 0.25});
    let agents = json!([{"role": "strategist", "adapter": "custom", "config": config}]);
    let company = company(&api, agents).await;
    let (_, made) =
        api.post(&format!("/v1/companies/{company}/directives"), json!({"objective": "x", "budget": 60})).await;
    let directive = made["data"]["id"].as_str().unwrap().to_owned();
    let done = |id: String| {
        let api = &api;
        async move {
            let path = format!("/v1/companies/{company}/tasks/{id}");
            eventually("the task to end", || async {
                ["completed", "failed"].contains(&api.get(&path).await.1["data"]["status"].as_str().unwrap())
            })
            .await;
            api.get(&path).await.1["data"].clone()
        }
    };
    assert_eq!(done(directive.clone()).await["status"], "completed");
    // Two more in its course: there is money for one.
    let mut ends = Vec::new();
    for _ in 0..2 {
        let (_, made) = api.post(&format!("/v1/companies/{company}/tasks"), json!({"title": "child"})).await;
        let id = made["data"]["id"].as_str().unwrap().to_owned();
        let uuid: capx_core::domain::ids::TaskId = id.parse().unwrap();
        let root: capx_core::domain::ids::TaskId = directive.parse().unwrap();
        sqlx::query("update tasks set root_id = $2, parent_id = $2 where id = $1")
            .bind(uuid.0)
            .bind(root.0)
            .execute(&db.pool)
            .await
            .unwrap();
        ends.push(done(id).await);
    }
    assert_eq!((&ends[0]["status"], &ends[1]["status"]), (&json!("completed"), &json!("failed")), "{ends:?}");
    assert!(ends[1]["error"]["message"].as_str().unwrap().contains("the directive's budget of 0.6 USD"), "{ends:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn runs_that_are_begun_for_a_directive_count_for_it_too() {
    let db = Db::new().await;
    let run = json!({"playbook": "outer"});
    let provider = Provider::start(vec![Says::Asks(vec![("run_playbook", run)]), Says::Words("done")]).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    let config = json!({"endpoint": format!("{}/custom", provider.url), "max_cost": 0.25});
    let agents = json!([{"role": "strategist", "adapter": "custom", "config": config}]);
    let company = company(&api, agents).await;
    // It begins a run, which calls another one, in which an agent works.
    db.playbook(company, "name: inner\nsteps:\n  - {id: do, role: strategist, action: work}\n").await;
    db.playbook(company, "name: outer\nsteps:\n  - {id: call, playbook: inner}\n").await;
    let (_, made) =
        api.post(&format!("/v1/companies/{company}/directives"), json!({"objective": "x", "budget": 500})).await;
    assert!(made["data"]["id"].is_string(), "{made}");
    // Each inner run begins another outer one, up to the depth that there is.
    let told = "select count(*) from journal where response::text like '%begin each other more than%'";
    eventually("the depth to be refused", || async { db.count(told).await == 1 }).await;
    eventually("all to end", || async { db.count("select count(*) from runs where ended_at is null").await == 0 })
        .await;
    let spent = db.count("select coalesce(sum(nanos), 0)::bigint from ledger").await;
    assert!(spent > 1_500_000_000, "{spent}");
    let counted = db.count("select sum(spent_nanos)::bigint from budgets where scope = 'directive'").await;
    assert_eq!(counted, spent);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_whose_beats_cost_and_change_nothing_is_stopped() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("nothing to do")]).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    let config = json!({"endpoint": format!("{}/custom", provider.url), "heartbeat_interval": 1, "heartbeat_always": true, "breaker": 3});
    let company =
        company(&api, json!([{"role": "a", "adapter": "custom", "instructions": "x", "config": config}])).await;
    let path = format!("/v1/companies/{company}/agents/a");
    eventually("the agent to be stopped", || async { api.get(&path).await.1["data"]["status"] == "paused" }).await;
    let shown = api.get(&path).await.1["data"].clone();
    assert!(
        shown["paused_reason"].as_str().unwrap().starts_with("3 beats in a row have cost money and changed nothing"),
        "{shown}"
    );
    assert_eq!(provider.seen().len(), 3);
    let told: Vec<Value> =
        sqlx::query_scalar("select data from events where event = 'agent.state_changed' and data ? 'evidence'")
            .fetch_all(&db.pool)
            .await
            .unwrap();
    assert_eq!(told[0]["evidence"]["beats"], 3, "{told:?}");
}
