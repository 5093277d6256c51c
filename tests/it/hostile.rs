//! Bad input: each is told what is wrong, nothing is done, and the API serves
//! on.

use std::time::Duration;

use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

use crate::harness::{Api, Db, PATIENCE};

/// Bytes on a connection of their own; what comes back until the server closes.
async fn sent(api: &Api, bytes: &[u8], gone: bool) -> String {
    let mut stream = TcpStream::connect(api.base.trim_start_matches("http://")).await.unwrap();
    let _ = stream.write_all(bytes).await;
    if gone {
        let _ = stream.shutdown().await;
    }
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.expect("the server hangs up");
    String::from_utf8_lossy(&answer).into_owned()
}

fn head(api: &Api, more: &str) -> String {
    format!(
        "POST /v1/companies HTTP/1.1\r\nhost: x\r\nauthorization: Bearer {}\r\ncontent-type: application/json\r\n{more}\r\n",
        api.key
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_http_is_refused_and_harms_nobody() {
    let db = Db::new().await;
    let api = db.api().await;
    let body = r#"{"name": "x", "template": "default"}"#;
    let key = format!("authorization: Bearer {}\r\n", api.key);
    for (bytes, status, says) in [
        // Two of what may be there once.
        (format!("GET /v1/companies HTTP/1.1\r\nhost: x\r\nconnection: close\r\n{key}{key}\r\n"), 401, "more than one"),
        (format!("{}{body}", head(&api, "content-length: 36\r\ncontent-length: 5\r\n")), 400, ""),
        // Both ways to say where a body ends, and a wrong one.
        (format!("{}{body}", head(&api, "content-length: x\r\n")), 400, ""),
        // Less than was promised.
        (format!("{}{{\"name\":", head(&api, "content-length: 500\r\n")), 400, ""),
        // A chunk's size that is none.
        (format!("{}zz\r\n{body}\r\n0\r\n\r\n", head(&api, "transfer-encoding: chunked\r\n")), 400, ""),
        // Headers without an end.
        (format!("GET / HTTP/1.1\r\nx: {}", "y".repeat(64 * 1024)), 431, ""),
        ("\u{16}\u{3}\u{1}\u{2}\u{0}".repeat(40), 400, ""),
    ] {
        let gone = bytes.contains("content-length: 500");
        let answer = sent(&api, bytes.as_bytes(), gone).await;
        let told = gone && answer.is_empty() || answer.starts_with(&format!("HTTP/1.1 {status}"));
        assert!(told && answer.contains(says), "{status}: {answer}\n{}", &bytes[..bytes.len().min(200)]);
    }
    assert_eq!(db.count("select count(*) from companies").await, 0);
    assert_eq!(api.get("/v1/companies").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_without_an_end_is_cut_at_its_limit() {
    let db = Db::new().await;
    let api = db.api().await;
    let stream = TcpStream::connect(api.base.trim_start_matches("http://")).await.unwrap();
    let (mut reader, mut writer) = stream.into_split();
    let head = head(&api, "transfer-encoding: chunked\r\n");
    let endless = tokio::spawn(async move {
        writer.write_all(head.as_bytes()).await.unwrap();
        let chunk = format!("10000\r\n{}\r\n", " ".repeat(0x1_0000));
        let mut sent = 0_usize;
        while writer.write_all(chunk.as_bytes()).await.is_ok() {
            sent += chunk.len();
        }
        sent
    });
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, reader.read_to_end(&mut answer)).await.expect("the server hangs up");
    let sent = tokio::time::timeout(PATIENCE, endless).await.expect("the connection is cut").unwrap();
    let answer = String::from_utf8_lossy(&answer);
    assert!(answer.is_empty() || answer.starts_with("HTTP/1.1 413"), "{answer}");
    // Little more than the limit and what was under way.
    assert!(sent < 32 * 1024 * 1024, "{sent} bytes were taken");
    assert_eq!(api.get("/v1/companies").await.0, 200);
}

fn fields(answer: &Value) -> Vec<String> {
    let fields = answer["error"]["fields"].as_array().cloned().unwrap_or_default();
    fields.iter().map(|f| f["field"].as_str().unwrap_or_default().to_owned()).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_parameters_are_named() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["writer"], "claude", json!({})).await;
    let playbook = db.playbook(company, "name: p\nsteps: [{id: a, action: transform}]\n").await;
    let co = format!("/v1/companies/{company}");
    let lists = [
        "/v1/companies".to_owned(),
        "/v1/playbooks".into(),
        "/v1/approvals".into(),
        "/v1/activity".into(),
        "/v1/keys".into(),
        format!("{co}/agents"),
        format!("{co}/tasks"),
        format!("{co}/approvals"),
        format!("{co}/activity"),
        format!("{co}/playbooks"),
        format!("{co}/playbooks/{playbook}/runs"),
        format!("{co}/agents/writer/activity"),
    ];
    for list in &lists {
        assert_eq!(api.get(list).await.0, 200, "{list}");
        for (query, field) in [
            ("limit=-1", "limit"),
            ("limit=0", "limit"),
            ("limit=99999999999999999999", "limit"),
            ("limit=1&limit=2", "limit"),
            ("cursor=0190000000007000800000000000000", "cursor"),
            ("cursor=%27%20or%201%3D1", "cursor"),
            ("cursor=ffffffffffffffff-ffffffffffffffffffffffffffffffff", "cursor"),
            ("sort=name", "sort"),
        ] {
            let (status, answer) = api.get(&format!("{list}?{query}")).await;
            assert_eq!((status, fields(&answer)), (400, vec![field.to_owned()]), "{list}?{query}: {answer}");
        }
    }
    for (path, field) in [
        (format!("{co}/activity?since=2026-05-25&until=2026-05-01"), "until"),
        (format!("{co}/costs?since=2026-05-25&until=2026-05-01"), "until"),
        (format!("{co}/costs/daily?since=2026-05-25&until=2026-05-01"), "until"),
        (format!("{co}/costs/daily?timezone=Mars/Olympus"), "timezone"),
        (format!("{co}/costs/daily?timezone=../../etc/passwd"), "timezone"),
        (format!("{co}/costs/daily?since=9999-12-31T23:59:59Z"), "since"),
        (format!("{co}/activity?since=soon"), "since"),
        (format!("{co}/tasks?status=done"), "status"),
        (format!("{co}/tasks?agent_id=nobody"), ""),
        (format!("{co}/playbooks/{playbook}/runs?status=done"), "status"),
    ] {
        let (status, answer) = api.get(&path).await;
        match field {
            "" => assert_eq!(status, 404, "{path}: {answer}"),
            field => assert_eq!((status, fields(&answer)), (400, vec![field.to_owned()]), "{path}: {answer}"),
        }
    }
    // An id of another thing is no id of this one.
    for path in [
        format!("/v1/companies/{playbook}"),
        format!("/v1/companies/{}", company.to_string().replace("co_", "ag_")),
        format!("{co}/playbooks/{company}"),
        format!("{co}/tasks/{playbook}"),
        format!("{co}/agents/{company}"),
        format!("/v1/approvals/{company}"),
    ] {
        let (status, answer) = api.get(&path).await;
        assert_eq!((status, &answer["error"]["code"]), (404, &json!("not_found")), "{path}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bad_bodies_are_named_and_change_nothing() {
    let db = Db::new().await;
    let api = db.api().await;
    let many: String = (0..100_000).map(|n| format!("\"{n:x}\":1,")).collect();
    let deep = |levels: usize| format!("{}1{}", "{\"a\":".repeat(levels), "}".repeat(levels));
    for (body, kind, status, says) in [
        (format!("{{\"name\": \"x\", \"config\": {}}}", deep(64)), "application/json", 400, "nested deeper"),
        (format!("{{\"name\": \"x\", \"config\": {}}}", deep(100_000)), "application/json", 400, "nested deeper"),
        (format!("{{{many}\"name\": \"x\"}}"), "application/json", 400, "more than 50000 keys"),
        ("{\"name\": \"a\\u0000b\", \"template\": \"default\"}".into(), "application/json", 400, "NUL"),
        ("{\"name\": \"\\ud800\", \"template\": \"default\"}".into(), "application/json", 400, "not valid JSON"),
        ("{\"name\": 1e999, \"template\": \"default\"}".into(), "application/json", 400, ""),
        ("<x/>".into(), "application/xml", 415, "Content-Type: application/json"),
        ("{}".into(), "application/jsonp", 415, "Content-Type"),
    ] {
        let request = api.client.post(format!("{}/v1/companies", api.base)).bearer_auth(&api.key);
        let response = request.header("content-type", kind).body(body.clone()).send().await.unwrap();
        let (got, text) = (response.status().as_u16(), response.text().await.unwrap());
        assert!(got == status && text.contains(says), "{got}: {text}\n{}", &body[..body.len().min(80)]);
    }
    // Wrong methods are told the right ones.
    for (method, path, allowed) in
        [("PUT", "/v1/companies", "GET"), ("DELETE", "/v1/approvals", "GET"), ("GET", "/v1/playbooks/run", "POST")]
    {
        let request = api.client.request(method.parse().unwrap(), format!("{}{path}", api.base)).bearer_auth(&api.key);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 405, "{method} {path}");
        let allow = response.headers()["allow"].to_str().unwrap().to_owned();
        assert!(allow.contains(allowed), "{method} {path}: {allow}");
    }
    let (status, _) = api.get("/v1/companies/%00").await;
    assert_eq!(status, 400);
    let (status, answer) = api.get(&format!("/v1/companies?cursor={}", "x".repeat(9 * 1024))).await;
    assert_eq!((status, &answer["error"]["code"]), (414, &json!("uri_too_long")));
    assert_eq!(db.count("select count(*) from companies").await, 0);
    tokio::time::timeout(Duration::from_secs(30), api.get("/v1/companies")).await.expect("it serves on");
}
