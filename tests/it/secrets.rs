//! Secrets: sealed at rest, given to tools, and found nowhere else.

use std::sync::{Arc, Mutex};

use axum::body::Bytes;
use axum::extract::State;
use axum::http::{HeaderMap, StatusCode, Uri};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, STANDARD_NO_PAD};
use capx_core::domain::digest::hex;
use capx_core::domain::ids::{ApprovalId, CompanyId};
use capx_core::domain::run::RunStatus;
use capx_core::domain::secret::seal::{Keys, new_key};
use capx_core::engine::gates::Verdict;
use capx_core::engine::secrets::reseal;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

/// What no place may show: with something of all that is escaped somewhere.
const CANARY: &str = "cAnary/\"+\\é &%9f3k";
const PIN: &str = "7391846205";

/// Each form in which a secret would be found.
fn forms() -> Vec<String> {
    let url = |text: &str| form_urlencoded::byte_serialize(text.as_bytes()).collect::<String>();
    let json = |text: &str| Value::from(text).to_string().trim_matches('"').to_owned();
    let inside = |before: &str| {
        let text = STANDARD_NO_PAD.encode(format!("{before}{CANARY}"));
        // What stands before it, and its last character, are others' as well.
        text[(before.len() * 8).div_ceil(6)..text.len() - 1].to_owned()
    };
    let mut forms = vec![
        CANARY.to_owned(),
        PIN.to_owned(),
        json(CANARY),
        json(&json(CANARY)),
        url(CANARY),
        url(CANARY).replace('+', "%20"),
        hex(CANARY.as_bytes()),
        STANDARD_NO_PAD.encode(PIN),
        // A part of it, which no escape touches.
        "cAnary".to_owned(),
    ];
    forms.extend(["", "a", "ab"].map(inside));
    forms.into_iter().map(|form| form.to_lowercase()).collect()
}

fn assert_clean(place: &str, text: &str) {
    let lower = text.to_lowercase();
    for form in forms() {
        if let Some(at) = lower.find(&form) {
            let (from, to) = (lower.floor_char_boundary(at.saturating_sub(120)), lower.ceil_char_boundary(at + 120));
            panic!("{place} holds `{form}`: …{}…", &lower[from..to]);
        }
    }
}

/// What a server was told, and which says it all again in every form.
#[derive(Clone, Default)]
struct Echo {
    told: Arc<Mutex<Vec<String>>>,
    url: String,
}

impl Echo {
    async fn start() -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let echo = Self { url: format!("http://{}", listener.local_addr().unwrap()), ..Self::default() };
        let router = axum::Router::new().fallback(axum::routing::any(say)).with_state(echo.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        echo
    }

    fn told(&self) -> Vec<String> {
        self.told.lock().unwrap().clone()
    }
}

type Said = (StatusCode, [(&'static str, String); 2], String);

async fn say(State(echo): State<Echo>, uri: Uri, headers: HeaderMap, body: Bytes) -> Said {
    let text = String::from_utf8_lossy(&body).into_owned();
    let authorization =
        headers.get("authorization").map(|value| String::from_utf8_lossy(value.as_bytes()).into_owned());
    echo.told.lock().unwrap().push(format!("{uri} {authorization:?} {text}"));
    if uri.path() == "/agent" {
        let told: Value = serde_json::from_slice(&body).unwrap();
        return (
            StatusCode::OK,
            [("content-type", "application/json".into()), ("x-none", String::new())],
            json!({"output": {"seen": told}}).to_string(),
        );
    }
    let again = json!({
        "uri": uri.to_string(), "body": text, "pin": PIN.parse::<u64>().unwrap(),
        "basic": STANDARD.encode(format!("user:{CANARY}")), "hex": hex(CANARY.as_bytes()),
        CANARY: [json!({"k": CANARY}).to_string()],
    });
    match uri.path() {
        // Kept apart.
        "/big" => (
            StatusCode::OK,
            [("content-type", "application/octet-stream".into()), ("x-none", String::new())],
            format!("{}{CANARY}{again}\0", "x".repeat(300_000)),
        ),
        // Cut in two by any excerpt of a few hundred characters.
        "/fails" => (
            StatusCode::INTERNAL_SERVER_ERROR,
            [("content-type", "text/plain".into()), ("x-none", String::new())],
            format!("{}{CANARY}{again}", "x".repeat(292)),
        ),
        _ => (
            StatusCode::OK,
            [("content-type", "application/json".into()), ("x-again", STANDARD.encode(CANARY))],
            again.to_string(),
        ),
    }
}

async fn set(api: &Api, company: CompanyId, name: &str, value: &str) -> (u16, Value) {
    api.post(&format!("/v1/companies/{company}/secrets"), json!({"name": name, "value": value})).await
}

/// All that the database holds, as text.
async fn all_rows(db: &Db) -> String {
    let tables: Vec<String> = sqlx::query_scalar(
        "select format('%I.%I', n.nspname, c.relname) from pg_class c join pg_namespace n on n.oid = c.relnamespace
         where c.relkind = 'r' and n.nspname not in ('pg_catalog', 'information_schema')",
    )
    .fetch_all(&db.pool)
    .await
    .unwrap();
    assert!(tables.len() > 20, "{tables:?}");
    let mut all = String::new();
    for table in tables {
        let rows = format!("select t::text from {table} t");
        let rows: Vec<String> = sqlx::query_scalar(sqlx::AssertSqlSafe(rows)).fetch_all(&db.pool).await.unwrap();
        all.extend(rows.into_iter().map(|row| format!("{table} {row}\n")));
    }
    all
}

#[tokio::test(flavor = "multi_thread")]
async fn no_place_shows_a_secret_that_a_tool_was_given() {
    let db = Db::new().await;
    let echo = Echo::start().await;
    let api = db.api().await;
    let worker_metrics = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().to_string();
    let mut worker = Process::start_with(&db, &["worker", "--bind", &worker_metrics], &[("CAPX_LOG", "trace")]);
    let company = db.company(&["writer"], "custom", json!({"endpoint": format!("{}/agent", echo.url)})).await;
    assert_eq!(set(&api, company, "TOKEN", CANARY).await.0, 201);
    let (status, body) = set(&api, company, "PIN", PIN).await;
    assert_eq!(status, 201);
    assert_clean("the answer", &body.to_string());
    let url = &echo.url;
    let yaml = format!(
        r#"
name: keeps-secrets
secrets: [TOKEN, PIN]
inputs: {{text: string, pad: string}}
steps:
  - id: call
    action: http.request
    params:
      method: post
      url: '{url}/ok?k=${{secrets.TOKEN}}'
      headers: {{authorization: 'Bearer ${{secrets.PIN}}'}}
      body: {{token: '${{secrets.TOKEN}}', text: 'a ${{secrets.TOKEN}} b', pin: '${{secrets.PIN}}'}}
  - {{id: kept, action: transform, params: {{said: '${{steps.call.output}}', own: '${{secrets.TOKEN}}', text: '${{inputs.text}}'}}}}
  - {{id: told, role: writer, action: write, params: {{said: '${{steps.kept.output}}'}}}}
  - {{id: each, for_each: [a, b], max_parallel: 2, action: http.request, params: {{method: post, url: '{url}/ok', body: '${{item}} ${{secrets.TOKEN}}'}}}}
  - {{id: fails, action: http.request, on_failure: continue, retry: {{max_attempts: 2, initial: 1ms}}, params: {{url: '{url}/fails', headers: {{x-token: '${{secrets.PIN}}'}}}}}}
  - {{id: away, action: http.request, on_failure: continue, retry: 1, params: {{url: 'http://127.0.0.1:1/${{secrets.TOKEN}}/x'}}}}
  - {{id: wrong, action: http.request, on_failure: continue, params: {{url: 'gopher://${{secrets.TOKEN}}', method: '${{secrets.TOKEN}}'}}}}
  - {{id: file, action: file.read, on_failure: continue, params: {{path: 'none/${{secrets.TOKEN}}'}}}}
  - {{id: big, action: http.request, params: {{url: '{url}/big', headers: {{x-token: '${{secrets.TOKEN}}'}}}}, on_failure: continue}}
  - {{id: big-pin, action: http.request, params: {{url: '{url}/big', headers: {{x-token: '${{secrets.PIN}}'}}}}}}
  - {{id: leave, action: file.write, params: {{path: left.txt, content: '${{secrets.TOKEN}} ${{inputs.pad}}'}}}}
  - {{id: find, action: file.read, params: {{path: left.txt}}}}
  - {{id: asked, approval: {{message: Really?}}, action: http.request, params: {{url: '{url}/ok?k=${{secrets.TOKEN}}'}}}}
  - {{id: end, action: http.request, params: {{url: '{url}/fails', headers: {{x-token: '${{secrets.PIN}}'}}}}, retry: 1}}
finally:
  - {{id: closes, action: http.request, params: {{url: '{url}/ok?k=${{secrets.TOKEN}}'}}}}
output: '${{steps}}'
"#
    )
    .replace("\noutput: '${steps}'\n", "\n");
    let playbook = db.playbook(company, &yaml).await;
    let text = "${secrets.TOKEN} {{ secrets.TOKEN }}";
    let run = db.start(company, playbook, json!({"text": text, "pad": "p".repeat(300_000)})).await;
    db.until(company, run, RunStatus::Suspended).await;
    let gate: ApprovalId = ApprovalId(
        sqlx::query_scalar("select id from approvals where status = 'pending'").fetch_one(&db.pool).await.unwrap(),
    );
    let (_, asked) = api.get(&format!("/v1/approvals/{gate}")).await;
    assert_eq!(asked["data"]["context"]["params"]["url"], json!(format!("{url}/ok?k=[secret TOKEN]")));
    db.decide(gate, &Verdict::Approve { note: None, params: None }).await.unwrap();
    let row = db.until(company, run, RunStatus::Failed).await;
    assert_eq!(row.error.as_ref().unwrap()["step"], json!("end"));
    // The tools were given what they need, in each place.
    let told = echo.told();
    let at = |text: &str| told.iter().filter(|told| !told.starts_with("/agent") && told.contains(text)).count();
    assert_eq!(at(&format!("Bearer {PIN}")), 1, "{told:?}");
    assert_eq!(at(&Value::from(CANARY).to_string()), 1, "{told:?}");
    assert_eq!(at(&format!("a {CANARY}")), 1, "{told:?}");
    assert!(at("/ok?k=") == 3 && at("/fails") == 3, "{told:?}");
    // And nobody else: what an agent was told is searched, too.
    let agent = told.iter().find(|told| told.starts_with("/agent")).unwrap();
    assert_clean("what the agent was told", agent);
    assert!(agent.contains("[secret TOKEN]"), "{agent}");
    let (_, shown) = api.get(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}")).await;
    let kept = &shown["data"]["steps"][1]["output"];
    assert_eq!((&kept["own"], &kept["text"]), (&json!("[secret TOKEN]"), &json!(text)), "one pass");
    let away = shown["data"]["steps"][5]["error"]["message"].as_str().unwrap();
    assert!(!away.is_empty());
    assert_clean("the run", &shown.to_string());
    assert_eq!(db.count("select count(*) from artifacts where bytes > 300000").await, 2, "an answer and a file");
    let rows = all_rows(&db).await;
    assert!(rows.contains("[secret PIN]") && rows.contains("company_secrets"));
    assert_clean("the database", &rows);
    for path in [
        format!("/v1/companies/{company}/activity?limit=200"),
        format!("/v1/companies/{company}/secrets"),
        format!("/v1/companies/{company}/approvals?status=approved"),
        format!("/v1/runs/{run}/items?step=each"),
        "/v1/dead-letters".to_owned(),
    ] {
        let (status, body) = api.get(&path).await;
        assert_eq!(status, 200, "{path}");
        assert_clean(&path, &body.to_string());
    }
    let stream = format!("{}/v1/companies/{company}/playbooks/{playbook}/runs/{run}/events", api.base);
    let stream = api.client.get(stream).header("accept", "text/event-stream").bearer_auth(&api.key);
    let stream = stream.send().await.unwrap().text().await.unwrap();
    assert!(stream.contains("playbook.failed"), "{stream}");
    assert_clean("the stream", &stream);
    for base in [api.base.clone(), format!("http://{worker_metrics}")] {
        let metrics = api.client.get(format!("{base}/metrics")).send().await.unwrap().text().await.unwrap();
        assert_clean("the metrics", &metrics);
    }
    let said = worker.said();
    assert!(said.contains("\"TRACE\""), "nothing was traced");
    assert_clean("the log", &said);
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_are_changed_while_all_is_running() {
    let db = Db::new().await;
    let (echo, api) = (Echo::start().await, db.api().await);
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let url = &echo.url;
    let yaml = format!(
        "name: x\nsecrets: [A, B]\nsteps:\n  - {{id: a, action: http.request, retry: {{max_attempts: 2, initial: 1ms}}, \
         params: {{url: '{url}/ok', method: post, body: '${{secrets.A}} ${{secrets.B}}'}}}}\n"
    );
    let playbook = db.playbook(company, &yaml).await;
    assert_eq!(set(&api, company, "A", "the first value").await.0, 201);
    let old = std::fs::read_to_string(&db.keys).unwrap();
    let new = new_key().unwrap();
    // The next one seals, and the old one opens.
    std::fs::write(&db.keys, format!("{new}\n{old}\n")).unwrap();
    assert_eq!(set(&api, company, "B", "the second value").await.0, 201);
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert!(echo.told()[0].ends_with("the first value the second value"), "{:?}", echo.told());
    // With all sealed anew, the old one goes.
    let keys = Keys::parse(&std::fs::read_to_string(&db.keys).unwrap()).unwrap();
    assert_eq!(reseal(&mut db.pool.acquire().await.unwrap(), &keys).await.unwrap(), 1);
    assert_eq!(reseal(&mut db.pool.acquire().await.unwrap(), &keys).await.unwrap(), 0);
    std::fs::write(&db.keys, &new).unwrap();
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    // A key that is lost is told, and what it sealed is not.
    std::fs::write(&db.keys, new_key().unwrap()).unwrap();
    let lost = db.worker(SHORT_LEASE);
    _worker.stop().await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Failed).await;
    let why = row.error.unwrap()["message"].as_str().unwrap().to_owned();
    assert!(why.contains("does not open") && why.contains("not among those that are configured"), "{why}");
    lost.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_without_its_secrets_does_not_begin() {
    let db = Db::new().await;
    let (echo, api) = (Echo::start().await, db.api().await);
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let path = format!("/v1/companies/{company}/secrets");
    for (body, field) in [
        (json!({"name": "1A", "value": "long enough"}), "name"),
        (json!({"name": "A", "value": "short"}), "value"),
        (json!({"name": "A", "value": "x".repeat(16 * 1024 + 1)}), "value"),
    ] {
        let (status, answer) = api.post(&path, body).await;
        assert_eq!((status, &answer["error"]["fields"][0]["field"]), (400, &json!(field)), "{answer}");
    }
    let yaml = format!(
        "name: x\nsecrets: TOKEN\nsteps:\n  - {{id: a, action: http.request, params: {{method: post, url: '{}/ok', body: '${{secrets.TOKEN}}'}}}}\n",
        echo.url
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = format!("/v1/companies/{company}/playbooks/{playbook}/run");
    let (status, answer) = api.post(&run, json!({})).await;
    assert_eq!(status, 400, "{answer}");
    let message = answer["error"]["message"].as_str().unwrap();
    assert!(message.contains("the company has no secret `TOKEN`; set it"), "{answer}");
    assert_eq!(set(&api, company, "TOKEN", "the first value").await.0, 201);
    assert_eq!(set(&api, company, "TOKEN", "the next value").await.0, 200);
    // Who starts a run has no say in where a secret goes.
    let elsewhere = Echo::start().await;
    let params = json!({"params": {"url": format!("{}/ok", elsewhere.url)}});
    let (status, answer) = api.post(&format!("{run}?wait=30"), params).await;
    assert!((200..300).contains(&status), "{answer}");
    eventually("the call", || async { !echo.told().is_empty() }).await;
    assert!(echo.told()[0].ends_with("the next value") && elsewhere.told().is_empty());
    // Others' secrets are not there.
    let stranger = Api { key: db.key(&["playbooks:read"]).await, ..db.api().await };
    assert_eq!(stranger.get(&path).await.0, 403);
    let (_, listed) = api.get(&path).await;
    assert_eq!(listed["data"].as_array().unwrap().len(), 1);
    let other = db.company(&["a"], "claude", json!({})).await;
    assert_eq!(api.get(&format!("/v1/companies/{other}/secrets")).await.1["data"], json!([]));
    assert_eq!(api.send("DELETE", &format!("/v1/companies/{other}/secrets/TOKEN"), None).await.0, 404);
    assert_eq!(api.send("DELETE", &format!("{path}/TOKEN"), None).await.0, 200);
    assert_eq!(api.post(&run, json!({})).await.0, 400);
    assert_eq!(db.count("select count(*) from company_secrets").await, 0);
}
