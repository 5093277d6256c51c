//! Webhooks: registered strictly, their secret shown once.

use capx_core::store::tenants;
use serde_json::{Value, json};

use crate::harness::{Api, Db};

fn hook(url: &str) -> Value {
    json!({"url": url, "events": ["playbook.failed", "approval.*"], "description": "pager"})
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_is_registered_changed_and_deleted() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let mut body = hook("https://example.com/capx");
    body["company_id"] = json!(company);
    let (status, made) = api.post("/v1/webhooks", body).await;
    assert_eq!((status, &made["data"]["status"]), (201, &json!("active")), "{made}");
    let secret = made["data"]["secret"].as_str().unwrap();
    assert!(secret.starts_with("whsec_") && secret.len() == 6 + 44, "{secret}");
    let path = format!("/v1/webhooks/{}", made["data"]["id"].as_str().unwrap());
    let (_, shown) = api.get(&path).await;
    assert!(shown["data"].get("secret").is_none(), "shown once");
    assert_eq!((&shown["data"]["company_id"], &shown["data"]["disabled_reason"]), (&json!(company), &Value::Null));
    assert_eq!(api.get("/v1/webhooks").await.1["data"][0], shown["data"]);

    let (_, changed) = api.send("PATCH", &path, Some(json!({"events": ["*"], "status": "disabled"}))).await;
    let data = &changed["data"];
    assert_eq!((&data["status"], &data["disabled_reason"]), (&json!("disabled"), &json!("disabled by hand")), "{data}");
    assert_eq!((&data["events"], &data["description"]), (&json!(["*"]), &json!("pager")), "only what is given changes");
    let (_, changed) = api.send("PATCH", &path, Some(json!({"status": "active"}))).await;
    assert_eq!(changed["data"]["disabled_reason"], Value::Null);

    let (_, rotated) = api.post(&format!("{path}/rotate-secret"), json!({})).await;
    assert_ne!(rotated["data"]["secret"], made["data"]["secret"]);
    let both =
        "select count(*) from webhooks where old_secret is not null and old_secret_until > now() + interval '23 hours'";
    assert_eq!(db.count(both).await, 1, "the old one signs for a while");
    assert_eq!(api.send("DELETE", &path, None).await.1["data"]["deleted"], true);
    assert_eq!(api.get(&path).await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_no_webhook_is_refused_with_all_that_is_wrong() {
    let db = Db::new().await;
    let api = db.api().await;
    let wrong = async |api: &Api, body: Value| -> String {
        let (status, answer) = api.post("/v1/webhooks", body).await;
        assert_eq!(status, 400, "{answer}");
        answer["error"]["fields"].to_string()
    };
    for (url, said) in [
        ("", "is no URL"),
        ("example.com", "is no URL"),
        ("ftp://example.com/", "the scheme `ftp` is not allowed"),
        ("http://example.com/", "must be https"),
        ("https://user:pw@example.com/", "credentials"),
        ("https://10.0.0.1/", "CAPX_EGRESS_ALLOW"),
        ("https://169.254.169.254/latest", "CAPX_EGRESS_ALLOW"),
        ("https://[::ffff:127.0.0.1]/", "CAPX_EGRESS_ALLOW"),
        ("https://2130706433/", "CAPX_EGRESS_ALLOW"),
        ("http://localhost:1/", "must be https"),
    ] {
        let told = wrong(&api, hook(url)).await;
        assert!(told.contains(said), "{url}: {told}");
    }
    let all =
        wrong(&api, json!({"url": "nowhere", "events": ["step.faild", "x"], "description": "y".repeat(1_001)})).await;
    for said in ["is no URL", "did you mean `step.failed`?", "events.1", "at most 1000 characters"] {
        assert!(all.contains(said), "{all}");
    }
    assert!(wrong(&api, json!({"url": "https://example.com/", "events": []})).await.contains("1 to 50 events"));
    assert!(wrong(&api, json!({"uri": "https://example.com/"})).await.contains("did you mean `url`?"));
    assert_eq!(db.count("select count(*) from webhooks").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_is_ones_own_and_one_of_not_too_many() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let other = tenants::account(&db.pool, "other", "enterprise").await.unwrap();
    let key = capx::keys::make(&db.pool, other, None, "o", true, &["*".into()]).await.unwrap();
    let stranger = api.with(&key.key);
    let mut body = hook("https://example.com/");
    body["company_id"] = json!(company);
    assert_eq!(stranger.post("/v1/webhooks", body.clone()).await.0, 404, "another's company");
    // A key that is bound to a company registers for it alone.
    let bound = capx::keys::make(&db.pool, db.account, Some(company), "b", true, &["*".into()]).await.unwrap();
    let (_, made) = api.with(&bound.key).post("/v1/webhooks", hook("https://example.com/")).await;
    assert_eq!(made["data"]["company_id"], json!(company), "{made}");
    let all =
        futures_util::future::join_all((0..105).map(|_| stranger.post("/v1/webhooks", hook("https://example.com/"))))
            .await;
    let made = all.iter().filter(|(status, _)| *status == 201).count();
    assert_eq!((made, all.iter().filter(|(status, _)| *status == 409).count()), (100, 5));
    // The same request again is told of the same webhook, but not of its secret.
    let key = [("idempotency-key", "once")];
    let text = hook("https://example.com/x").to_string();
    let first: Value = api.raw("POST", "/v1/webhooks", &key, Some(&text)).await.json().await.unwrap();
    let again: Value = api.raw("POST", "/v1/webhooks", &key, Some(&text)).await.json().await.unwrap();
    assert_eq!(first["data"]["id"], again["data"]["id"]);
    assert!(first["data"]["secret"].is_string() && again["data"]["secret"].is_null());
}
