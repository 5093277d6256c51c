//! The API over HTTP: the documented requests work, and bad ones are told
//! what is wrong and change nothing.

use std::time::Duration;

use capx::api::Limits;
use capx_core::domain::ids::{CompanyId, RunId};
use serde_json::{Value, json};

use crate::harness::{Api, Db, PATIENCE, SHORT_LEASE, eventually};

const YAML: &str = "name: Weekly Market Report\ntrigger:\n  schedule: '0 9 * * MON'\nsteps:\n  - role: researcher\n    action: research\n    params:\n      topic: 'market trends'\n      depth: comprehensive\n  - role: writer\n    action: compile_report\n    params:\n      format: pdf\n      sections: [summary, data, recommendations]\nrubric:\n  min_sources: 5\n  max_cost: 5.00";

fn company_body() -> Value {
    json!({
        "name": "Research Division", "description": "Autonomous research and report generation",
        "config": {"governance": "human_in_loop", "budget_limit_daily": 50.00, "timezone": "America/New_York"},
        "agents": [
            {"role": "researcher", "adapter": "claude", "instructions": "Research topics and produce structured reports."},
            {"role": "writer", "adapter": "claude", "instructions": "Write."}
        ]
    })
}

async fn company(api: &Api) -> String {
    let (status, answer) = api.post("/v1/companies", company_body()).await;
    assert_eq!(status, 201, "{answer}");
    answer["data"]["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn the_documented_way_from_a_company_to_a_finished_run() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let (status, answer) = api.post("/v1/companies", company_body()).await;
    assert_eq!(status, 201);
    let data = &answer["data"];
    assert_eq!((&data["status"], &data["agent_count"]), (&json!("provisioning"), &json!(2)));
    assert_eq!(data["config"], company_body()["config"]);
    assert_eq!((&answer["success"], &answer["meta"]["credits_used"]), (&json!(true), &json!(5)));
    let co = data["id"].as_str().unwrap().to_owned();
    eventually("the company to run", || async {
        api.get(&format!("/v1/companies/{co}")).await.1["data"]["status"] == "running"
    })
    .await;

    let body = json!({
        "name": "Weekly Market Report",
        "description": "Research market trends and generate a structured PDF report every Monday.",
        "yaml": YAML, "tags": ["research", "weekly", "automated"]
    });
    let (status, answer) = api.post(&format!("/v1/companies/{co}/playbooks"), body.clone()).await;
    assert_eq!(status, 201, "{answer}");
    let pb = answer["data"].clone();
    assert_eq!(
        (&pb["status"], &pb["step_count"], &pb["tags"]),
        (&json!("active"), &json!(2), &json!(["research", "weekly", "automated"]))
    );
    assert_eq!(pb["trigger"], json!({"type": "schedule", "schedule": "0 9 * * MON"}));
    // The same again is the same playbook, and nothing new.
    let (status, again) = api.post(&format!("/v1/companies/{co}/playbooks"), body).await;
    assert_eq!((status, &again["data"]["id"]), (200, &pb["id"]));

    let path = format!("/v1/companies/{co}/playbooks/{}", pb["id"].as_str().unwrap());
    let params = json!({"topic": "AI infrastructure funding Q2 2026", "depth": "deep"});
    let (status, answer) = api.post(&format!("{path}/run"), json!({"params": params})).await;
    assert_eq!((status, &answer["data"]["status"], &answer["data"]["params"]), (201, &json!("running"), &params));
    let run = answer["data"]["run_id"].as_str().unwrap().to_owned();
    let (status, answer) = api.get(&format!("{path}/runs/{run}?wait=30")).await;
    let data = &answer["data"];
    assert_eq!((status, &data["status"]), (200, &json!("completed")), "{answer}");
    let steps = data["steps"].as_array().unwrap();
    assert_eq!(
        (steps.len(), &steps[1]["index"], &steps[1]["role"], &steps[1]["action"]),
        (2, &json!(1), &json!("writer"), &json!("compile_report"))
    );
    assert!(steps[0]["agent_id"].as_str().unwrap().starts_with("ag_"));
    for key in ["total_cost", "duration", "started_at", "completed_at"] {
        assert!(!data[key].is_null(), "{key}");
    }
    let (_, list) = api.get(&format!("{path}/runs?status=completed&limit=5")).await;
    assert_eq!((&list["data"][0]["run_id"], &list["meta"]["has_more"]), (&json!(run), &json!(false)));
    let (_, one) = api.get(&path).await;
    assert_eq!(
        (&one["data"]["run_count"], &one["data"]["rubric"]),
        (&json!(1), &json!({"min_sources": 5, "max_cost": 5.0}))
    );
    let (_, agents) = api.get(&format!("/v1/companies/{co}/agents?status=active")).await;
    assert_eq!(agents["data"].as_array().unwrap().len(), 2);
    assert_eq!(api.get(&format!("/v1/companies/{co}/agents/writer")).await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_catalogs_form_of_a_company_and_its_pages() {
    let db = Db::new().await;
    let api = db.api().await;
    let body = json!({
        "name": "acme-marketing", "template": "saas-agency",
        "governance": {"spend_cap": 500, "approval_required": ["publish", "outbound-email"], "kill_switch": true},
        "agents": [{"role": "strategist", "adapter": "claude", "model": "claude-sonnet-4-6", "budget": 200}]
    });
    let (status, answer) = api.post("/v1/companies", body.clone()).await;
    let data = &answer["data"];
    assert_eq!(
        (status, &data["governance"], &data["url"]),
        (201, &body["governance"], &json!("acme-marketing.capx.ai"))
    );
    let agent = &data["agents"][0];
    assert_eq!((&agent["status"], &agent["budget"], &agent["used"]), (&json!("initializing"), &json!(200), &json!(0)));
    for _ in 0..4 {
        company(&api).await;
    }
    let (_, first) = api.get("/v1/companies?limit=2").await;
    assert_eq!(first["meta"]["has_more"], true);
    let cursor = first["meta"]["cursor"].as_str().unwrap();
    let (_, second) = api.get(&format!("/v1/companies?limit=100&cursor={cursor}")).await;
    assert_eq!((second["data"].as_array().unwrap().len(), &second["meta"]["cursor"]), (3, &Value::Null));
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_requests_are_told_what_is_wrong_and_change_nothing() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = company(&api).await;
    let playbooks = format!("/v1/companies/{co}/playbooks");
    let before = db.count("select count(*) from companies").await;
    let field = |answer: &Value| answer["error"]["fields"][0]["field"].as_str().unwrap_or_default().to_owned();
    let said = |answer: &Value| answer["error"].to_string();

    // Wrong types and unknown fields, named by their path.
    for (body, wanted, hint) in [
        (json!({"name": 3, "agents": []}), "name", "must be a string, not integer"),
        (
            json!({"name": "x", "agents": [{"role": 1, "adapter": "claude"}]}),
            "agents.0.role",
            "must be a string, not integer",
        ),
        (json!({"name": "x", "agnts": []}), "agnts", "did you mean `agents`?"),
        (json!({"name": "x", "agents": []}), "agents", "at least one"),
        (
            json!({"name": "x", "agents": [{"role": "r", "adapter": "cloude", "instructions": "i"}]}),
            "agents.0.adapter",
            "use one of claude",
        ),
        (json!({"name": "x", "agents": [{"role": "r", "adapter": "claude"}]}), "agents.0.instructions", "required"),
        (
            json!({"name": "x", "config": {"timezone": "Mars/Olympus"}, "agents": [{"role": "r", "adapter": "claude", "instructions": "i"}]}),
            "config.timezone",
            "IANA",
        ),
    ] {
        let (status, answer) = api.post("/v1/companies", body).await;
        assert_eq!((status, field(&answer).as_str()), (400, wanted), "{answer}");
        assert_eq!(answer["error"]["code"], "invalid_request");
        assert!(said(&answer).contains(hint), "{answer}");
    }
    // A broken playbook: line, column, cause, suggestion.
    let broken = "name: x\nsteps:\n  - role: researcher\n    action: research\n    timout: 5s\n";
    let (status, answer) = api.post(&playbooks, json!({"yaml": broken})).await;
    assert_eq!((status, field(&answer).as_str()), (400, "yaml"));
    assert!(said(&answer).contains("5:5: steps.0.timout: unknown key `timout`; did you mean `timeout`?"), "{answer}");
    let (status, answer) = api.post(&playbooks, json!({"yaml": "name: [x\nsteps: {"})).await;
    assert!(status == 400 && said(&answer).contains("not valid YAML"), "{answer}");
    let (status, answer) = api.post(&playbooks, json!({"yaml": "name: x\nsteps: [{action: http.requst}]"})).await;
    assert!(status == 400 && said(&answer).contains("did you mean `http.request`?"), "{answer}");
    // A role that nobody has yet is a warning.
    let (status, answer) =
        api.post(&playbooks, json!({"yaml": "name: w\nsteps: [{role: reseacher, action: x}]"})).await;
    assert!(status == 201 && answer["data"]["warnings"].to_string().contains("did you mean `researcher`?"), "{answer}");

    // Not JSON, not an object, too deep, too large, the wrong type.
    let raw = |content: &'static str, kind: &'static str| {
        let request =
            api.client.post(format!("{}/v1/companies", api.base)).bearer_auth(&api.key).header("content-type", kind);
        async move { request.body(content).send().await.unwrap().status().as_u16() }
    };
    assert_eq!(raw("{nonsense", "application/json").await, 400);
    assert_eq!(raw("[1]", "application/json").await, 400);
    assert_eq!(raw("{\"name\": \"a\\u0000b\", \"agents\": []}", "application/json").await, 400);
    assert_eq!(raw("name=x", "application/x-www-form-urlencoded").await, 415);
    let large = format!("{{\"name\": \"{}\"}}", "x".repeat(1_100_000));
    let (status, answer) = api.post("/v1/companies", serde_json::from_str(&large).unwrap()).await;
    assert_eq!((status, &answer["error"]["code"]), (413, &json!("payload_too_large")));

    // Unknown ids, foreign forms of ids, unknown paths, wrong methods.
    for path in [
        format!("/v1/companies/{}", CompanyId::new()),
        "/v1/companies/nonsense".into(),
        format!("{playbooks}/pb_x"),
        format!("{playbooks}/{}/runs/{}", "pb_00000000000000000000000000", RunId::new()),
        "/v1/nothing".into(),
    ] {
        let (status, answer) = api.get(&path).await;
        assert_eq!((status, &answer["error"]["code"]), (404, &json!("not_found")), "{path}");
        assert!(answer["error"]["docs"].is_string() && answer["meta"]["request_id"].is_string());
    }
    assert_eq!(api.send("PUT", "/v1/companies", None).await.0, 405);
    for query in ["limit=0", "limit=101", "limit=x", "status=odd", "cursor=%20", "oops=1"] {
        assert_eq!(api.get(&format!("/v1/companies?{query}")).await.0, 400, "{query}");
    }
    assert_eq!(db.count("select count(*) from companies").await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_asked_for_their_scope_and_their_account() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = company(&api).await;
    let with = |key: &str| Api {
        base: api.base.clone(),
        key: key.to_owned(),
        client: api.client.clone(),
        served: None,
        _stop: tokio_util::sync::CancellationToken::new().drop_guard(),
    };
    for key in ["", "nonsense", "capx_sk_live_abc123"] {
        let (status, answer) = with(key).get("/v1/companies").await;
        assert_eq!((status, &answer["error"]["code"]), (401, &json!("unauthorized")), "{key}");
    }
    let reader = with(&db.key(&["companies:read"]).await);
    assert_eq!(reader.get(&format!("/v1/companies/{co}")).await.0, 200);
    let (status, answer) = reader.post("/v1/companies", company_body()).await;
    assert!(status == 403 && answer["error"]["message"].as_str().unwrap().contains("companies:write"), "{answer}");
    // Another account's key does not see it, and cannot tell that it exists.
    let stranger = capx_core::store::tenants::account(&db.pool, "stranger", "pro").await.unwrap();
    let made = capx::keys::make(&db.pool, stranger, None, "s", true, &["*".into()]).await.unwrap();
    let stranger = with(&made.key);
    for path in
        [format!("/v1/companies/{co}"), format!("/v1/companies/{co}/playbooks"), format!("/v1/companies/{co}/agents")]
    {
        assert_eq!(stranger.get(&path).await.0, 404, "{path}");
    }
    // A key that takes its place may do the same; the old one goes unless it is
    // kept for a while.
    let beside = capx::keys::rotate(&db.pool, made.id, true).await.unwrap();
    assert_eq!((stranger.get("/v1/companies").await.0, with(&beside.key).get("/v1/companies").await.0), (200, 200));
    let after = capx::keys::rotate(&db.pool, made.id, false).await.unwrap();
    assert_eq!(with(&after.key).get("/v1/companies").await.0, 200);
    eventually("the old key to be refused", || async { stranger.get("/v1/companies").await.0 == 401 }).await;
    assert!(capx::keys::rotate(&db.pool, made.id, false).await.is_err());
    assert!(capx_core::store::tenants::revoke_key(&db.pool, after.id).await.unwrap());
    let after = with(&after.key);
    eventually("the key to be refused", || async { after.get("/v1/companies").await.0 == 401 }).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_is_given_over_http() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let co = company(&api).await;
    let yaml = include_str!("../../playbooks/publish-with-approval.yml");
    let (_, pb) = api.post(&format!("/v1/companies/{co}/playbooks"), json!({"yaml": yaml})).await;
    let path = format!("/v1/companies/{co}/playbooks/{}", pb["data"]["id"].as_str().unwrap());
    let (status, answer) = api.post(&format!("{path}/run"), json!({"params": {}})).await;
    assert!(status == 400 && answer.to_string().contains("params.topic"), "{answer}");
    let (_, run) = api.post(&format!("{path}/run"), json!({"inputs": {"topic": "tides"}})).await;
    let run = format!("{path}/runs/{}", run["data"]["run_id"].as_str().unwrap());
    eventually("the gate", || async { api.get(&run).await.1["data"]["status"] == "suspended" }).await;
    let (_, answer) = api.get(&run).await;
    let waiting = &answer["data"]["waiting_on"][0];
    assert_eq!(
        (&waiting["type"], &answer["data"]["steps"][1]["status"]),
        (&json!("approval"), &json!("pending_approval"))
    );
    assert!(waiting["expires_at"].is_string() && waiting["since"].is_string());
    let id = waiting["id"].as_str().unwrap();
    let (_, list) = api.get("/v1/approvals?status=pending").await;
    assert_eq!(list["data"][0]["id"], *id);
    assert_eq!(api.post(&format!("/v1/approvals/{id}/reject"), json!({"feedback": " "})).await.0, 400);
    let (status, answer) = api.send("POST", &format!("/v1/approvals/{id}/approve"), None).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("approved")), "{answer}");
    assert_eq!(api.post(&format!("/v1/approvals/{id}/reject"), json!({"feedback": "no"})).await.0, 409);
    let (_, answer) = api.get(&format!("{run}?wait=30")).await;
    assert_eq!(answer["data"]["status"], "completed", "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_goes_away_leaves_nothing_half_done() {
    use tokio::io::AsyncWriteExt;
    let db = Db::new().await;
    let api = db.api().await;
    let body = company_body().to_string();
    let address = api.base.trim_start_matches("http://").to_owned();
    // Clients that go away ever later, until a good many have been answered by
    // nobody and yet served.
    const SERVED: i64 = 20;
    for i in 0..2_000_u64 {
        if i % 50 == 49 && db.count("select count(*) from companies").await >= SERVED {
            break;
        }
        let mut stream = tokio::net::TcpStream::connect(&address).await.unwrap();
        let request = format!(
            "POST /v1/companies HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            api.key,
            body.len()
        );
        stream.write_all(request.as_bytes()).await.unwrap();
        // Gone at some point of the handling.
        tokio::time::sleep(std::time::Duration::from_micros(i * 60)).await;
        drop(stream);
    }
    // Whatever was begun is whole: a company, its agents, its job.
    eventually("the handlers to end", || async {
        let open = db.count("select count(*) from pg_stat_activity where datname = current_database() and state like 'idle in transaction%'").await;
        open == 0
    })
    .await;
    assert!(db.count("select count(*) from companies").await >= SERVED, "too few requests were handled");
    let half = "select (select count(*) from companies) * 2 - (select count(*) from agents)
                + (select count(*) from companies) - (select count(*) from jobs where kind = 'provision')";
    assert_eq!(db.count(half).await, 0);
    // And the connections are fit for others.
    assert_eq!(api.get("/v1/companies").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_was_started_is_answered_even_when_it_cannot_be_shown() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = company(&api).await;
    let (_, pb) = api.post(&format!("/v1/companies/{co}/playbooks"), json!({"yaml": YAML})).await;
    let path = format!("/v1/companies/{co}/playbooks/{}", pb["data"]["id"].as_str().unwrap());
    // What shows a run reads its steps; what starts one does not.
    sqlx::raw_sql("alter table run_steps rename to away").execute(&db.pool).await.unwrap();
    let mut started = Vec::new();
    for wait in [0, 1] {
        let (status, answer) = api.post(&format!("{path}/run?wait={wait}"), json!({})).await;
        assert_eq!((status, &answer["data"]["status"]), (201, &json!("running")), "wait={wait}: {answer}");
        assert!(answer["data"]["started_at"].is_string(), "{answer}");
        started.push(answer["data"]["run_id"].as_str().unwrap().to_owned());
    }
    assert_eq!(api.get(&format!("{path}/runs/{}", started[0])).await.0, 500, "the fault did not happen");
    assert_eq!(db.count("select count(*) from runs").await, 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_answer_is_the_envelope() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = CompanyId::new();
    for (method, path, status, code) in [
        ("GET", "/", 404, "not_found"),
        ("GET", "/v1", 404, "not_found"),
        ("GET", "/v1/", 404, "not_found"),
        ("GET", "/v1/companies/", 404, "not_found"),
        ("GET", "/v1/companies//playbooks", 404, "not_found"),
        ("GET", "/v2/companies", 404, "not_found"),
        ("GET", "/v1/companies/%FF", 400, "invalid_request"),
        ("GET", "/v1/companies/%FF/playbooks", 400, "invalid_request"),
        ("GET", "/v1/companies/x/playbooks/%FF", 400, "invalid_request"),
        ("GET", "/v1/companies/x/agents/%C3", 400, "invalid_request"),
        ("GET", "/v1/companies/x/playbooks/y/runs/%FF", 400, "invalid_request"),
        ("POST", "/v1/companies/x/playbooks/%FF/run", 400, "invalid_request"),
        ("GET", "/v1/approvals/%FF", 400, "invalid_request"),
        ("GET", "/v1/companies/%00", 400, "invalid_request"),
        ("GET", "/v1/companies?limit=%FF", 400, "invalid_request"),
        ("PUT", "/v1/companies", 405, "method_not_allowed"),
        ("PUT", "/v1/companies/x", 405, "method_not_allowed"),
        ("GET", "/v1/companies/x/playbooks/y/run", 405, "method_not_allowed"),
        ("OPTIONS", "/v1/approvals", 405, "method_not_allowed"),
        ("BREW", "/v1/companies", 405, "method_not_allowed"),
        ("POST", "/healthz", 405, "method_not_allowed"),
        ("POST", "/metrics", 405, "method_not_allowed"),
    ] {
        let (given, answer) = api.send(method, path, None).await;
        assert_eq!((given, &answer["error"]["code"]), (status, &json!(code)), "{method} {path}: {answer}");
        assert_eq!(answer["success"], false, "{method} {path}");
        assert!(answer["error"]["message"].is_string() && answer["meta"]["request_id"].is_string(), "{method} {path}");
    }
    let (status, answer) = api.get(&format!("/v1/companies/{co}/%ZZ")).await;
    assert_eq!((status, &answer["error"]["code"]), (404, &json!("not_found")), "{answer}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_drips_is_not_waited_for() {
    use tokio::io::{AsyncReadExt, AsyncWriteExt};
    let db = Db::new().await;
    let api = db.api_within(Limits { body: Duration::from_millis(200), ..Limits::default() }).await;
    let stream = tokio::net::TcpStream::connect(api.base.trim_start_matches("http://")).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let head = format!(
        "POST /v1/companies HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\ncontent-length: 100000\r\n\r\n",
        api.key
    );
    // Never silent for long, and never done.
    let drip = tokio::spawn(async move {
        writer.write_all(head.as_bytes()).await.unwrap();
        while writer.write_all(b" ").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    });
    // Until the server closes: it does not wait for the rest. Drops that come
    // after that may be answered by a reset.
    let mut bytes = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, reader.read_to_end(&mut bytes)).await.expect("the server hangs up");
    let answer = String::from_utf8_lossy(&bytes);
    assert!(answer.starts_with("HTTP/1.1 408"), "{answer}");
    assert!(answer.contains(r#""code":"request_timeout""#) && answer.contains("send the request again"), "{answer}");
    assert!(answer.contains("x-request-id"), "{answer}");
    drip.await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_hangs_is_told_so_and_still_carried_out() {
    let db = Db::new().await;
    let api = db.api_within(Limits { answer: Duration::from_millis(300), ..Limits::default() }).await;
    let mut lock = db.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table companies").execute(&mut *lock).await.unwrap();
    let (status, answer) = api.post("/v1/companies", company_body()).await;
    assert_eq!((status, &answer["error"]["code"]), (503, &json!("unavailable")), "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("look before you send it again"), "{answer}");
    assert!(api.get("/metrics").await.1.as_str().unwrap().contains("capx_http_unanswered_total"));
    lock.commit().await.unwrap();
    eventually("the request to be carried out", || async { db.count("select count(*) from companies").await == 1 })
        .await;
    assert_eq!(api.get("/v1/companies").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_never_ends_ends_the_process() {
    let db = Db::new().await;
    let limits =
        Limits { answer: Duration::from_millis(100), unanswered: Duration::from_millis(400), ..Limits::default() };
    let mut api = db.api_within(limits).await;
    let mut lock = db.pool.begin().await.unwrap();
    sqlx::raw_sql("lock table companies").execute(&mut *lock).await.unwrap();
    // Even when the client has gone away.
    assert_eq!(api.get("/v1/companies").await.0, 503);
    let ended = tokio::time::timeout(PATIENCE, api.served.take().unwrap()).await.expect("the process ends");
    let said = ended.unwrap().expect_err("and says why").to_string();
    assert!(said.contains("start capx again"), "{said}");
}

#[tokio::test(flavor = "multi_thread")]
async fn health_is_told_without_a_key() {
    let db = Db::new().await;
    let api = db.api().await;
    assert_eq!(api.get("/healthz").await.1["status"], "ok");
    assert_eq!(api.get("/readyz").await.1["status"], "ready");
    let (status, text) = api.get("/metrics").await;
    assert!(status == 200 && text.as_str().unwrap().contains("capx_http_request_seconds"), "{text}");
}
