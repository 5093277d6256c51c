//! Requests from outside: signed by the playbook's secret, or nothing is started.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use capx_core::domain::ids::CompanyId;
use capx_core::domain::webhook;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};

const YAML: &str = "name: paid\ntrigger: {type: webhook, event: order.paid}\nsteps:\n  - {id: keep, action: transform, params: {order: '${inputs.event}'}}\noutput: ${steps.keep.order}\n";

fn secret(text: &Value) -> Vec<u8> {
    let text = text.as_str().unwrap_or_else(|| panic!("no secret: {text}"));
    STANDARD.decode(text.strip_prefix("whsec_").unwrap()).unwrap()
}

/// The database's time, in seconds.
async fn now(db: &Db) -> i64 {
    db.count("select extract(epoch from clock_timestamp())::bigint").await
}

struct Sender<'a> {
    api: &'a Api,
    url: String,
}

impl<'a> Sender<'a> {
    fn new(api: &'a Api, company: CompanyId, event: &str) -> Self {
        Self { api, url: format!("{}/v1/companies/{company}/hooks/{event}", api.base) }
    }

    async fn send(&self, headers: &[(&str, &str)], body: impl Into<reqwest::Body>) -> (u16, Value) {
        let mut request = self.api.client.post(&self.url).body(body);
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        let response = request.send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap_or_default())
    }

    async fn signed(&self, secret: &[u8], id: &str, at: i64, body: &str) -> (u16, Value) {
        let (signature, at) = (webhook::sign(&[secret], id, at, body.as_bytes()), at.to_string());
        let headers = [("webhook-id", id), ("webhook-timestamp", &at), ("webhook-signature", &signature)];
        self.send(&headers, body.to_owned()).await
    }
}

async fn playbook(api: &Api, company: CompanyId, yaml: &str) -> Value {
    let (status, made) = api.post(&format!("/v1/companies/{company}/playbooks"), json!({"yaml": yaml})).await;
    assert_eq!(status, 201, "{made}");
    made["data"].clone()
}

async fn company(api: &Api) -> CompanyId {
    api.company(json!({"name": "c", "agents": [{"role": "a", "adapter": "claude", "instructions": "x"}]})).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_request_starts_its_playbook_once_and_the_secret_is_shown_once() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let company = company(&api).await;
    let made = playbook(&api, company, YAML).await;
    let key = secret(&made["webhook_secret"]);
    let path = format!("/v1/companies/{company}/playbooks");
    let (_, again) = api.post(&path, json!({"yaml": YAML})).await;
    assert!(again["data"].get("webhook_secret").is_none(), "{again}");
    let (_, shown) = api.get(&format!("{path}/{}", made["id"].as_str().unwrap())).await;
    assert!(!shown.to_string().contains("whsec_"), "{shown}");
    let sender = Sender::new(&api, company, "order.paid");
    let at = now(&db).await;
    let (status, taken) = sender.signed(&key, "msg_1", at, r#"{"n": 1}"#).await;
    assert_eq!(status, 202, "{taken}");
    assert!(taken["data"]["events"][0].as_str().unwrap().starts_with("sig_"), "{taken}");
    let done = "select count(*) from runs where status = 'completed' and trigger = 'webhook' and output = '{\"n\": 1}'";
    eventually("a run", || async { db.count(done).await == 1 }).await;
    // Its sender has not heard of that, and tries again, later: the same event.
    let (status, known) = sender.signed(&key, "msg_1", at + 1, r#"{"n": 1}"#).await;
    assert_eq!((status, &known["data"]), (202, &taken["data"]), "{known}");
    // Another one starts another run; what is no JSON is text.
    assert_eq!(sender.signed(&key, "msg_2", at, "hello\u{0}").await.0, 202);
    let text = "select count(*) from runs where status = 'completed' and output #>> '{}' like 'hello%'";
    eventually("the text", || async { db.count(text).await == 1 }).await;
    // As GitHub signs, over the body alone.
    let body = r#"{"action": "opened"}"#;
    let signature = webhook::sign_as_github(&key, body.as_bytes());
    for _ in 0..2 {
        assert_eq!(sender.send(&[("x-hub-signature-256", &signature)], body).await.0, 202);
    }
    eventually("GitHub's", || async { db.count("select count(*) from runs where status = 'completed'").await == 3 })
        .await;
    assert_eq!(db.count("select count(*) from runs").await, 3);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_replayed_stale_from_the_future_or_forged_starts_nothing() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let (company, other) = (company(&api).await, company(&api).await);
    let key = secret(&playbook(&api, company, YAML).await["webhook_secret"]);
    let sender = Sender::new(&api, company, "order.paid");
    let at = now(&db).await;
    assert_eq!(sender.signed(&key, "msg_1", at, "{}").await.0, 202);
    let (status, refused) = sender.signed(&key, "msg_1", at, "{}").await;
    assert_eq!(status, 401, "{refused}");
    assert!(refused["error"]["message"].as_str().unwrap().contains("was taken before"), "{refused}");
    for (id, key, at, why) in [
        ("msg_2", key.clone(), at - 400, "5 minutes ago"),
        ("msg_3", key.clone(), at + 400, "5 minutes ahead"),
        ("msg_4", vec![7; 32], at, "signature does not match"),
        ("msg_5", Vec::new(), at, "signature does not match"),
    ] {
        let (status, refused) = sender.signed(&key, id, at, "{}").await;
        assert_eq!(status, 401, "{refused}");
        assert!(refused["error"]["message"].as_str().unwrap().contains(why), "{refused}");
    }
    let at = at.to_string();
    let signature = webhook::sign(&[&key], "msg_6", at.parse().unwrap(), b"{}");
    for headers in [
        vec![],
        vec![("webhook-id", "msg_6"), ("webhook-timestamp", &at)],
        vec![("webhook-id", "msg_6"), ("webhook-timestamp", "soon"), ("webhook-signature", &signature)],
        vec![
            ("webhook-id", "msg_6"),
            ("webhook-id", "msg_7"),
            ("webhook-timestamp", &at),
            ("webhook-signature", &signature),
        ],
        vec![("x-hub-signature-256", "sha256=00")],
        vec![("authorization", &api.key)],
        vec![("webhook-id", "a.b"), ("webhook-timestamp", &at), ("webhook-signature", &signature)],
    ] {
        assert_eq!(sender.send(&headers, "{}").await.0, 401, "{headers:?}");
    }
    // Another body than the one that was signed.
    let headers = [("webhook-id", "msg_6"), ("webhook-timestamp", &at), ("webhook-signature", &signature)];
    assert_eq!(sender.send(&headers, "{} ").await.0, 401);
    // Fifty megabytes, before anything is looked at, or even taken.
    let request = format!(
        "POST {} HTTP/1.1\r\nhost: x\r\nwebhook-id: msg_6\r\nwebhook-timestamp: {at}\r\nwebhook-signature: {signature}\r\ncontent-length: 50000000\r\n\r\n",
        sender.url.trim_start_matches(&api.base)
    );
    let mut stream = tokio::net::TcpStream::connect(api.base.trim_start_matches("http://")).await.unwrap();
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = [0; 12];
    stream.read_exact(&mut answer).await.unwrap();
    assert_eq!(String::from_utf8_lossy(&answer), "HTTP/1.1 413");
    // Names that are none, of nobody, and another company's.
    for (company, event) in
        [(company, "order.lost"), (company, "a%20b"), (other, "order.paid"), (CompanyId::new(), "order.paid")]
    {
        assert_eq!(Sender::new(&api, company, event).send(&headers, "{}").await.0, 404, "{event}");
    }
    // Nor is it an event that a client may send.
    let path = format!("/v1/companies/{company}/events");
    for body in [json!({"name": "hook:x", "data": {}}), json!({"name": "x", "data": {}, "id": "hook:x:msg_1"})] {
        assert_eq!(api.post(&path, body).await.0, 400);
    }
    eventually("the one run", || async { db.count("select count(*) from runs where status = 'completed'").await == 1 })
        .await;
    assert_eq!(db.count("select count(*) from runs").await, 1);
    assert_eq!(db.count("select count(*) from signals").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn secrets_rotate_with_overlap_and_each_playbook_has_its_own() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let company = company(&api).await;
    let made = playbook(&api, company, YAML).await;
    let other = playbook(&api, company, &YAML.replace("name: paid", "name: other")).await;
    let (old, others) = (secret(&made["webhook_secret"]), secret(&other["webhook_secret"]));
    assert_ne!(old, others);
    let rotate = format!("/v1/companies/{company}/playbooks/{}/rotate-secret", made["id"].as_str().unwrap());
    let (status, rotated) = api.post(&rotate, json!({})).await;
    assert_eq!(status, 200, "{rotated}");
    let new = secret(&rotated["data"]["secret"]);
    let sender = Sender::new(&api, company, "order.paid");
    let at = now(&db).await;
    for (n, key) in [&old, &new, &others].into_iter().enumerate() {
        let (status, taken) = sender.signed(key, &format!("msg_{n}"), at, "{}").await;
        assert_eq!((status, taken["data"]["events"].as_array().unwrap().len()), (202, 1), "{taken}");
    }
    eventually("their runs", || async { db.count("select count(*) from runs where status = 'completed'").await == 3 })
        .await;
    for (playbook, runs) in [(&made, 2), (&other, 1)] {
        let (_, shown) =
            api.get(&format!("/v1/companies/{company}/playbooks/{}", playbook["id"].as_str().unwrap())).await;
        assert_eq!(shown["data"]["run_count"], runs, "{shown}");
    }
    // A day later the old one signs nothing any more.
    sqlx::query("update triggers set old_secret_until = now() where old_secret is not null")
        .execute(&db.pool)
        .await
        .unwrap();
    assert_eq!(sender.signed(&old, "msg_9", at, "{}").await.0, 401);
    // A new version keeps the secret; a playbook that is archived takes nothing.
    let path = format!("/v1/companies/{company}/playbooks/{}", made["id"].as_str().unwrap());
    let changed = json!({"yaml": YAML.replace("id: keep", "id: hold").replace("steps.keep", "steps.hold")});
    let (status, changed) = api.send("PATCH", &path, Some(changed)).await;
    assert_eq!((status, changed["data"].get("webhook_secret")), (200, None), "{changed}");
    assert_eq!(sender.signed(&new, "msg_10", at, "{}").await.0, 202);
    assert_eq!(api.post(&format!("{path}/archive"), json!({})).await.0, 200);
    assert_eq!(sender.signed(&new, "msg_11", at, "{}").await.0, 401);
    // It comes back with the secret that it had.
    assert_eq!(api.post(&format!("{path}/resume"), json!({})).await.0, 200);
    assert_eq!(sender.signed(&new, "msg_12", at, "{}").await.0, 202);
    // One from before there were secrets gets its first one.
    sqlx::query("update triggers set secret = null, old_secret = null, old_secret_until = null")
        .execute(&db.pool)
        .await
        .unwrap();
    assert_eq!(sender.signed(&new, "msg_13", at, "{}").await.0, 404);
    let (_, first) = api.post(&rotate, json!({})).await;
    assert_eq!(sender.signed(&secret(&first["data"]["secret"]), "msg_13", at, "{}").await.0, 202);
    let manual = playbook(&api, company, "name: m\nsteps:\n  - {id: a, action: transform, params: {}}\n").await;
    let rotate = format!("/v1/companies/{company}/playbooks/{}/rotate-secret", manual["id"].as_str().unwrap());
    assert_eq!(api.post(&rotate, json!({})).await.0, 409);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_comes_while_the_company_is_paused_starts_its_run_afterwards() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let company = company(&api).await;
    let key = secret(&playbook(&api, company, YAML).await["webhook_secret"]);
    assert_eq!(api.post(&format!("/v1/companies/{company}/pause"), json!({})).await.0, 200);
    let sender = Sender::new(&api, company, "order.paid");
    assert_eq!(sender.signed(&key, "msg_1", now(&db).await, "{}").await.0, 202);
    eventually("it to wait", || async { db.count("select count(*) from jobs where due_at = 'infinity'").await == 1 })
        .await;
    assert_eq!(db.count("select count(*) from runs").await, 0);
    assert_eq!(api.post(&format!("/v1/companies/{company}/resume"), json!({})).await.0, 200);
    eventually("its run", || async { db.count("select count(*) from runs where status = 'completed'").await == 1 })
        .await;
}
