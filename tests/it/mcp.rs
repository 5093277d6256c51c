//! Agents use the tools of MCP servers, over HTTP and over pipes, held to schemas and
//! policies as any other.

use std::sync::{Arc, Mutex};

use axum::extract::State;
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::post;
use axum::{Json, Router};
use capx_core::domain::run::RunStatus;
use capx_workers::mcp::McpServers;
use serde_json::{Value, json};

use crate::harness::{Db, eventually};

/// What a server has been asked, with the header that it wants.
pub type Seen = Arc<Mutex<Vec<Value>>>;

/// A server of the streamable HTTP transport, which answers in JSON and knows a session.
pub async fn http_server() -> (String, Seen) {
    let seen = Seen::default();
    let router = Router::new().route("/mcp", post(answer)).with_state(Arc::clone(&seen));
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/mcp", listener.local_addr().unwrap());
    tokio::spawn(async move { axum::serve(listener, router).await });
    (url, seen)
}

async fn answer(State(seen): State<Seen>, headers: HeaderMap, Json(asked): Json<Value>) -> Response {
    if headers.get("authorization").is_none_or(|value| value != "Bearer open") {
        return StatusCode::UNAUTHORIZED.into_response();
    }
    let Some(id) = asked.get("id") else {
        if asked["method"] == "notifications/cancelled" {
            seen.lock().unwrap().push(asked.clone());
        }
        return StatusCode::ACCEPTED.into_response();
    };
    let result = match asked["method"].as_str().unwrap() {
        "initialize" => json!({
            "protocolVersion": asked["params"]["protocolVersion"], "capabilities": {"tools": {}},
            "serverInfo": {"name": "wiki", "version": "1"},
        }),
        "tools/list" => json!({"tools": [
            {"name": "look-up", "description": "Finds.", "annotations": {"readOnlyHint": true}, "inputSchema":
                {"type": "object", "required": ["q"], "properties": {"q": {"type": "string"}}, "additionalProperties": false}},
            {"name": "edit", "description": "Changes.", "inputSchema": {"type": "object"}},
            {"name": "hang", "description": "Takes for ever.", "inputSchema": {"type": "object"}},
            {"name": "broken", "description": "Fails.", "inputSchema": {"type": "object"}},
        ]}),
        "tools/call" => {
            seen.lock().unwrap().push(asked["params"].clone());
            match asked["params"]["name"].as_str().unwrap() {
                "hang" => std::future::pending().await,
                "look-up" => {
                    json!({"content": [{"type": "text", "text": "42 it is"}], "structuredContent": {"found": 42}})
                }
                "edit" => {
                    json!({"content": [{"type": "text", "text": "changed"}, {"type": "image", "data": "AA==", "mimeType": "image/png"}]})
                }
                _ => json!({"content": [{"type": "text", "text": "out of order"}], "isError": true}),
            }
        }
        _ => {
            return Json(json!({"jsonrpc": "2.0", "id": id, "error": {"code": -32601, "message": "unknown"}}))
                .into_response();
        }
    };
    let session = [("mcp-session-id", "s1"), ("content-type", "application/json")];
    (session, Json(json!({"jsonrpc": "2.0", "id": id, "result": result}))).into_response()
}

/// A server that is started and spoken to over its pipes.
const PIPED: &str = r#"
import json, os, subprocess, sys
for line in sys.stdin:
    asked = json.loads(line)
    if "id" not in asked:
        continue
    if asked["method"] == "initialize":
        result = {"protocolVersion": asked["params"]["protocolVersion"], "capabilities": {"tools": {}},
                  "serverInfo": {"name": "env", "version": "1"}}
    elif asked["method"] == "tools/list":
        result = {"tools": [{"name": "environment", "inputSchema": {"type": "object"}},
                            {"name": "hang", "inputSchema": {"type": "object"}},
                            {"name": "vanish", "inputSchema": {"type": "object"}},
                            {"name": "die", "annotations": {"idempotentHint": True}, "inputSchema": {"type": "object"}}]}
    elif asked["method"] == "tools/call":
        if asked["params"]["name"] in ("die", "vanish"):
            sys.exit(1)
        if asked["params"]["name"] == "hang":
            # It, and what it has started, write on as long as they live.
            beat = "while :; do date >> " + os.environ["BEATS"] + "; sleep 0.05; done"
            subprocess.run(["sh", "-c", beat])
        result = {"content": [{"type": "text", "text": " ".join(sorted(os.environ))}]}
    else:
        print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "error": {"code": -32601, "message": "unknown"}}), flush=True)
        continue
    print(json.dumps({"jsonrpc": "2.0", "id": asked["id"], "result": result}), flush=True)
"#;

fn call(name: &str, input: Value) -> Value {
    json!({"tool_calls": [{"name": name, "input": input}]})
}

const STEP: &str = "name: w\nsteps:\n  - {id: do, role: a, action: work}\noutput: ${steps.do.output}\n";

async fn told(db: &Db) -> Vec<String> {
    sqlx::query_scalar("select response ->> 'content' from journal where call > 0 order by turn")
        .fetch_all(&db.pool)
        .await
        .unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn agents_use_tools_of_servers_under_the_same_rules() {
    let db = Db::new().await;
    let (url, seen) = http_server().await;
    let file = json!({"mcpServers": {
        "wiki": {"url": url, "headers": {"Authorization": "Bearer open"}},
        "box": {"command": "python3", "args": ["-c", PIPED], "env": {"OWN": "1"}},
    }});
    let _worker = db.worker_with_mcp(McpServers::read(&file.to_string(), true).unwrap());
    let script = json!({"work": [
        call("mcp_wiki_look-up", json!({"q": "x"})),
        call("mcp_wiki_look-up", json!({"query": "x"})),
        call("mcp_wiki_broken", json!({})),
        call("mcp_box_environment", json!({})),
        call("mcp_box_die", json!({})),
        call("mcp_box_environment", json!({})),
        call("mcp_wiki_edit", json!({"page": 1})),
        call("http_request", json!({"url": "http://127.0.0.1:1/"})),
        {"output": {"done": true}},
    ]});
    let api = db.api().await;
    let agent = json!({"role": "a", "adapter": "claude", "instructions": "x",
        "config": {"script": script, "tools": ["mcp:wiki/*", "mcp:box/*"]}});
    let policy = json!({"approval_required": ["mcp:wiki/edit"]});
    let (_, made) = api.post("/v1/companies", json!({"name": "c", "governance": policy, "agents": [agent]})).await;
    let company = made["data"]["id"].as_str().unwrap().parse().unwrap();
    let playbook = db.playbook(company, STEP).await;
    let run = db.start(company, playbook, json!({})).await;
    let path = format!("/v1/companies/{company}/approvals?status=pending");
    eventually("a person to be asked", || async { api.get(&path).await.1["data"][0].is_object() }).await;
    let asked = api.get(&path).await.1["data"][0].clone();
    assert_eq!(asked["action_type"], "mcp:wiki/edit", "{asked}");
    let (status, _) = api.post(&format!("/v1/approvals/{}/approve", asked["id"].as_str().unwrap()), json!({})).await;
    assert_eq!(status, 200);
    let done = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(done.output.unwrap()["done"], true);
    let told = told(&db).await;
    assert!(told[0].contains("42"), "{told:?}");
    assert!(told[1].contains("the arguments of `mcp:wiki/look-up` are wrong"), "{told:?}");
    assert!(told[2].contains("out of order"), "{told:?}");
    assert!(told[3].contains("OWN") && told[3].contains("PATH"), "{told:?}");
    assert!(!told[3].contains("CARGO") && !told[3].contains("DATABASE"), "the worker's environment is shown: {told:?}");
    assert!(told[4].contains("the MCP server `box`"), "{told:?}");
    assert_eq!(told[5], told[3], "a server that ended is started again");
    assert!(told[6].contains("changed"), "{told:?}");
    assert!(told[7].contains("there is no tool"), "{told:?}");
    let seen = seen.lock().unwrap();
    let names: Vec<&str> = seen.iter().map(|params| params["name"].as_str().unwrap()).collect();
    assert_eq!(names, ["look-up", "broken", "edit"]);
    let keys: std::collections::HashSet<&str> =
        seen.iter().map(|params| params["_meta"]["idempotencyKey"].as_str().unwrap()).collect();
    assert_eq!(keys.len(), 3, "each call has a key of its own");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_not_there_fails_the_step_with_the_reason() {
    let db = Db::new().await;
    let file = json!({"mcpServers": {"gone": {"command": "no-such-program"}}});
    let _worker = db.worker_with_mcp(McpServers::read(&file.to_string(), true).unwrap());
    for (tools, why) in [
        ("mcp:other/*", "there is no MCP server `other` for this company; there are gone"),
        ("mcp:gone/*", "the MCP server `gone`: `no-such-program` does not start"),
        ("mcp:gone", "a tool of an MCP server is written as mcp:server/tool"),
    ] {
        let company = db.company(&["a"], "claude", json!({"tools": [tools]})).await;
        let playbook = db.playbook(company, STEP).await;
        let run = db.start(company, playbook, json!({})).await;
        let failed = db.until(company, run, RunStatus::Failed).await;
        assert!(format!("{:?}", failed.error).contains(why), "{:?}", failed.error);
    }
}

/// A company whose agent, under one role, calls one tool of a server.
async fn calls(db: &Db, tool: &str) -> (capx_core::domain::ids::CompanyId, capx_core::domain::ids::RunId) {
    let name = tool.replace([':', '/'], "_");
    let script = json!({"work": [call(&name, json!({})), {"output": {"done": true}}]});
    let company = db.company(&["a"], "claude", json!({"script": script, "tools": [tool]})).await;
    let playbook = db.playbook(company, STEP).await;
    (company, db.start(company, playbook, json!({})).await)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_is_there_for_the_companies_that_its_operator_names() {
    let db = Db::new().await;
    let script = json!({"work": [call("mcp_wiki_edit", json!({})), {"output": {"done": true}}]});
    let config = json!({"script": script, "tools": ["mcp:wiki/edit"]});
    let (mine, other) =
        (db.company(&["a"], "claude", config.clone()).await, db.company(&["a"], "claude", config).await);
    let (url, seen) = http_server().await;
    let entry = json!({"url": url, "headers": {"Authorization": "Bearer open"}, "companies": [mine]});
    let file = json!({"mcpServers": {"wiki": entry}}).to_string();
    let _worker = db.worker_with_mcp(McpServers::read(&file, false).unwrap());
    let other_run = db.start(other, db.playbook(other, STEP).await, json!({})).await;
    let failed = db.until(other, other_run, RunStatus::Failed).await;
    assert!(format!("{:?}", failed.error).contains("there is no MCP server `wiki` for this company"), "{failed:?}");
    assert!(seen.lock().unwrap().is_empty());
    let run = db.start(mine, db.playbook(mine, STEP).await, json!({})).await;
    db.until(mine, run, RunStatus::Completed).await;
    assert_eq!(seen.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn lists_of_hosts_bind_servers_too() {
    let db = Db::new().await;
    let (url, seen) = http_server().await;
    let wiki = json!({"url": url, "headers": {"Authorization": "Bearer open"}});
    let file = json!({"mcpServers": {"wiki": wiki, "box": {"command": "python3", "args": ["-c", PIPED]}}}).to_string();
    let _worker = db.worker_with_mcp(McpServers::read(&file, true).unwrap());
    for (tool, hosts, may) in [
        ("mcp:wiki/edit", json!(["api.example.com"]), false),
        ("mcp:wiki/edit", json!(["127.0.0.1"]), true),
        ("mcp:box/environment", json!(["127.0.0.1"]), false),
        ("mcp:box/environment", json!(["mcp:box"]), true),
    ] {
        let script = json!({"work": [call(&tool.replace([':', '/'], "_"), json!({})), {"output": {"done": true}}]});
        let company =
            db.company(&["a"], "claude", json!({"script": script, "tools": [tool], "allowed_hosts": hosts})).await;
        let run = db.start(company, db.playbook(company, STEP).await, json!({})).await;
        db.until(company, run, RunStatus::Completed).await;
        let told: String =
            sqlx::query_scalar("select response ->> 'content' from journal where call > 0 and run_id = $1")
                .bind(run.0)
                .fetch_one(&db.pool)
                .await
                .unwrap();
        assert_eq!(!told.contains("config.allowed_hosts forbids it"), may, "{tool} {hosts}: {told}");
    }
    assert_eq!(seen.lock().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_that_is_stopped_is_cancelled_at_its_server_and_a_program_ended() {
    let db = Db::new().await;
    let api = db.api().await;
    let (url, seen) = http_server().await;
    let beats = std::env::temp_dir().join(format!("capx-mcp-{}", uuid::Uuid::now_v7()));
    let wiki = json!({"url": url, "headers": {"Authorization": "Bearer open"}});
    let program = json!({"command": "python3", "args": ["-c", PIPED], "env": {"BEATS": beats}});
    let file = json!({"mcpServers": {"wiki": wiki, "box": program}}).to_string();
    let _worker = db.worker_with_mcp(McpServers::read(&file, true).unwrap());
    let length = || std::fs::metadata(&beats).map_or(0, |file| file.len());
    let (by_url, _) = calls(&db, "mcp:wiki/hang").await;
    let (by_pipe, _) = calls(&db, "mcp:box/hang").await;
    eventually("both calls", || async { seen.lock().unwrap().len() == 1 && length() > 0 }).await;
    for company in [by_url, by_pipe] {
        assert_eq!(api.post(&format!("/v1/companies/{company}/agents/a/kill"), json!({})).await.0, 200);
    }
    eventually("the server to be told", || async {
        seen.lock().unwrap().iter().any(|asked| asked["method"] == "notifications/cancelled")
    })
    .await;
    // What the program has started is gone with it: nothing is written any more.
    eventually("the program to end", || async {
        let before = length();
        tokio::time::sleep(std::time::Duration::from_millis(500)).await;
        length() == before
    })
    .await;
    let _ = std::fs::remove_file(&beats);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_of_which_nobody_knows_is_left_to_a_person_and_not_made_again() {
    let db = Db::new().await;
    let file = json!({"mcpServers": {"box": {"command": "python3", "args": ["-c", PIPED]}}}).to_string();
    let _worker = db.worker_with_mcp(McpServers::read(&file, true).unwrap());
    let (company, run) = calls(&db, "mcp:box/vanish").await;
    let failed = db.until(company, run, RunStatus::Failed).await;
    let error = failed.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(error.contains("nobody knows whether a call of `mcp:box/vanish` was made"), "{error}");
    // A person looks, and lets it go on: the model learns of it.
    let mut tx = db.engine.pool.begin().await.unwrap();
    capx_core::engine::retry::retry_run(&db.engine, &mut tx, company, run, "test").await.unwrap();
    tx.commit().await.unwrap();
    db.engine.waker.wake();
    db.until(company, run, RunStatus::Completed).await;
    let told = told(&db).await;
    assert_eq!(told.len(), 1, "{told:?}");
    assert!(told[0].contains("a person has looked at it"), "{told:?}");
}
