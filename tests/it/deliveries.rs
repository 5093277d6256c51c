//! Events reach webhooks: signed, as often as it takes, and whatever the other side does.

use std::collections::{BTreeMap, HashSet};
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use capx_core::domain::delivery::SCHEDULE;
use capx_core::domain::event::Event;
use capx_core::domain::ids::CompanyId;
use capx_core::domain::webhook::Claim;
use capx_core::store::events;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;
use crate::receiver::{Call, Receiver};

const STEP: &str = "name: p\nsteps:\n  - {id: a, action: transform, params: {v: 1}}\n";

/// A webhook at a path of the receiver: its id and its secret.
async fn hook(db: &Db, api: &Api, url: &str, events: &[&str], more: Value) -> (String, Vec<u8>) {
    let mut body = json!({"url": "https://example.com/", "events": events});
    body.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap_or_default());
    let (status, made) = api.post("/v1/webhooks", body).await;
    assert_eq!(status, 201, "{made}");
    let id = made["data"]["id"].as_str().unwrap().to_owned();
    // The API allows nothing inside; the workers of these tests allow loopback.
    sqlx::query("update webhooks set url = $1 where url = 'https://example.com/'")
        .bind(url)
        .execute(&db.pool)
        .await
        .unwrap();
    let secret = made["data"]["secret"].as_str().unwrap().strip_prefix("whsec_").unwrap();
    (id, STANDARD.decode(secret).unwrap())
}

fn verified(call: &Call, secret: &[u8]) -> bool {
    let claim = Claim::Standard {
        id: call.id(),
        timestamp: &call.headers["webhook-timestamp"],
        signature: &call.headers["webhook-signature"],
    };
    let now = call.headers["webhook-timestamp"].parse().unwrap();
    claim.verify(&[secret], &call.body, now).is_ok()
}

/// So many events of a company that belong to no run.
async fn happen(db: &Db, company: CompanyId, count: usize) {
    db.invents_events();
    let events: Vec<Event> = (0..count).map(|n| Event::new("task.updated", json!({"n": n}))).collect();
    events::append(&db.pool, company, &events).await.unwrap();
}

/// Time passes: what waits for its next try is due. Says how long the longest wait was, in seconds.
async fn time_passes(db: &Db) -> f64 {
    let waited: Option<f64> = sqlx::query_scalar(
        "with due as (
             update jobs j set due_at = now() from jobs old
             where j.id = old.id and j.kind = 'delivery' and j.state = 'scheduled'
             returning extract(epoch from old.due_at - now())::float8 as waited
         )
         select max(waited) from due",
    )
    .fetch_one(&db.pool)
    .await
    .unwrap();
    waited.unwrap_or_default()
}

async fn deliveries(api: &Api, webhook: &str) -> Vec<Value> {
    api.get(&format!("/v1/webhooks/{webhook}/deliveries?limit=100")).await.1["data"].as_array().unwrap().clone()
}

async fn status_is(api: &Api, webhook: &str, status: &str) {
    eventually(status, || async {
        let all = deliveries(api, webhook).await;
        !all.is_empty() && all.iter().all(|delivery| delivery["status"] == status)
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_happens_is_told_to_whoever_asked_signed_and_once() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let other = db.company(&["a"], "claude", json!({})).await;
    let of_company = json!({"company_id": company});
    let (steps, key) = hook(&db, &api, &format!("{}/steps", receiver.url), &["step.*"], of_company).await;
    let (_all, all_key) = hook(&db, &api, &format!("{}/all", receiver.url), &["playbook.completed"], json!({})).await;
    for company in [company, other] {
        let playbook = db.playbook(company, STEP).await;
        db.start(company, playbook, json!({})).await;
    }
    eventually("both companies' ends", || async { receiver.calls_at("/all").len() == 2 }).await;
    eventually("the step", || async { receiver.calls_at("/steps").len() == 1 }).await;
    status_is(&api, &steps, "succeeded").await;
    let call = &receiver.calls_at("/steps")[0];
    assert!(verified(call, &key) && !verified(call, &all_key));
    assert_eq!(call.headers["content-type"], "application/json");
    let body = call.json();
    assert_eq!((&body["type"], &body["company_id"]), (&json!("step.completed"), &json!(company)), "{body}");
    assert_eq!((&body["id"], &body["data"]["step"]), (&json!(call.id()), &json!("a")));
    assert!(body["data"]["run_id"].as_str().unwrap().starts_with("run_"), "{body}");
    // What the activity log shows under the same id.
    let (_, log) = api.get(&format!("/v1/companies/{company}/activity?limit=50")).await;
    let found = log["data"].as_array().unwrap().iter().any(|event| event["id"] == body["id"]);
    assert!(found, "{log}");
    let shown = &deliveries(&api, &steps).await[0];
    assert_eq!((&shown["event_id"], &shown["attempts"], &shown["last_status"]), (&body["id"], &json!(1), &json!(200)));
    let path = format!("/v1/webhooks/{steps}/deliveries/{}", shown["id"].as_str().unwrap());
    let (_, one) = api.get(&path).await;
    assert_eq!((&one["data"]["tries"][0]["answer"], &one["data"]["tries"][0]["status"]), (&json!("ok"), &json!(200)));
    // Again by hand: the same id, signed anew.
    assert_eq!(api.post(&format!("{path}/redeliver"), json!({})).await.1["data"]["status"], "pending");
    eventually("it again", || async { receiver.calls_at("/steps").len() == 2 }).await;
    assert_eq!(receiver.calls_at("/steps")[1].id(), call.id());
    status_is(&api, &steps, "succeeded").await;
    assert_eq!(api.get(&path).await.1["data"]["attempts"], 2);
    assert_eq!(db.count("select count(*) from jobs where kind = 'delivery'").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_test_is_sent_and_secrets_rotate_with_overlap() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let (id, first) = hook(&db, &api, &format!("{}/x", receiver.url), &["approval.*"], json!({})).await;
    let path = format!("/v1/webhooks/{id}");
    let (status, told) = api.post(&format!("{path}/test"), json!({})).await;
    assert_eq!((status, told["error"]["message"].as_str().unwrap().contains("create one first")), (409, true));
    db.company(&["a"], "claude", json!({})).await;
    let (status, made) = api.post(&format!("{path}/test"), json!({"event": "approval.requested"})).await;
    assert_eq!((status, &made["data"]["status"]), (201, &json!("pending")), "{made}");
    let (status, wrong) = api.post(&format!("{path}/test"), json!({"event": "approval.requestd"})).await;
    assert!(status == 400 && wrong.to_string().contains("`approval.requested`"), "{wrong}");
    eventually("the test", || async { receiver.count() == 1 }).await;
    let call = &receiver.calls()[0];
    assert_eq!((&call.json()["type"], &call.json()["data"]), (&json!("approval.requested"), &json!({"test": true})));
    assert!(verified(call, &first));
    let (_, rotated) = api.post(&format!("{path}/rotate-secret"), json!({})).await;
    let second = rotated["data"]["secret"].as_str().unwrap().strip_prefix("whsec_").unwrap();
    let second = STANDARD.decode(second).unwrap();
    api.post(&format!("{path}/test"), json!({})).await;
    eventually("another", || async { receiver.count() == 2 }).await;
    let call = &receiver.calls()[1];
    assert_eq!(call.json()["type"], "webhook.test");
    assert!(verified(call, &first) && verified(call, &second), "both sign");
    sqlx::query("update webhooks set old_secret_until = now()").execute(&db.pool).await.unwrap();
    api.post(&format!("{path}/test"), json!({})).await;
    eventually("a third", || async { receiver.count() == 3 }).await;
    let call = &receiver.calls()[2];
    assert!(!verified(call, &first) && verified(call, &second), "the overlap is over");
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the libraries of PyPI and npm: .ci/signatures runs it"]
async fn two_independent_libraries_verify_what_is_sent() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let (id, first) = hook(&db, &api, &format!("{}/x", receiver.url), &["task.*"], json!({})).await;
    let first = format!("whsec_{}", STANDARD.encode(first));
    happen(&db, company, 2).await;
    eventually("the first two", || async { receiver.count() == 2 }).await;
    let (_, rotated) = api.post(&format!("/v1/webhooks/{id}/rotate-secret"), json!({})).await;
    let second = rotated["data"]["secret"].as_str().unwrap().to_owned();
    let text = Event::new("task.updated", json!({"title": "Grüße, “quoted” \u{1f600}\\ \"x\""}));
    events::append(&db.pool, company, &[text]).await.unwrap();
    eventually("one in the overlap", || async { receiver.count() == 3 }).await;
    let lines: Vec<String> = receiver
        .calls()
        .iter()
        .enumerate()
        .map(|(n, call)| {
            let secrets = if n < 2 { vec![&first] } else { vec![&first, &second] };
            let body = String::from_utf8(call.body.clone()).unwrap();
            json!({"headers": call.headers, "body": body, "secrets": secrets}).to_string()
        })
        .collect();
    let libraries = std::env::var("CAPX_SIGNATURES").expect("CAPX_SIGNATURES");
    let file = format!("{libraries}/calls");
    std::fs::write(&file, lines.join("\n")).unwrap();
    let script = concat!(env!("CARGO_MANIFEST_DIR"), "/.ci/signatures.py");
    for (program, script) in [
        (format!("{libraries}/venv/bin/python"), script.to_owned()),
        ("node".to_owned(), format!("{libraries}/signatures.mjs")),
    ] {
        let done = std::process::Command::new(&program).args([&script, &file]).output().unwrap();
        let (out, err) = (String::from_utf8_lossy(&done.stdout), String::from_utf8_lossy(&done.stderr));
        assert!(done.status.success() && out.trim() == "3", "{program}: {out}{err}");
    }
}

/// The schedule takes longer than a day: the clock of the jobs is moved instead.
#[tokio::test(flavor = "multi_thread")]
async fn what_fails_for_longer_than_a_day_is_tried_by_the_schedule_and_kept() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let (id, key) = hook(&db, &api, &format!("{}/switch", receiver.url), &["task.*"], json!({})).await;
    receiver.fail(true);
    happen(&db, company, 1).await;
    let mut total = 0.0;
    for (tries, wanted) in (1..).zip(SCHEDULE) {
        let settled = "select count(*) from jobs where kind = 'delivery' and state = 'scheduled' and attempt = ";
        let settled = format!("{settled}{tries}");
        eventually("the next try to be planned", || async {
            let planned: i64 =
                sqlx::query_scalar(sqlx::AssertSqlSafe(settled.clone())).fetch_one(&db.pool).await.unwrap();
            planned == 1
        })
        .await;
        let waited = time_passes(&db).await;
        let wanted = wanted.as_secs_f64();
        assert!(waited > wanted * 0.85 - 1.0 && waited < wanted * 1.11, "after try {tries}: {waited} s of {wanted} s");
        total += waited;
        // The breaker opens after five, for seconds of the real clock.
        sqlx::query("update flows set open_until = null").execute(&db.pool).await.unwrap();
    }
    assert!(total > 24.0 * 3600.0, "{total} s");
    status_is(&api, &id, "failed").await;
    let calls = receiver.calls();
    assert_eq!(calls.len(), SCHEDULE.len() + 1);
    assert!(calls.iter().all(|call| call.id() == calls[0].id() && call.body == calls[0].body && verified(call, &key)));
    let (_, letters) = api.get("/v1/dead-letters").await;
    let letter = &letters["data"][0];
    assert_eq!((&letter["kind"], &letter["reason"]), (&json!("delivery"), &json!("exhausted")), "{letters}");
    // Nothing is lost: it is there again, and goes once the other side is back.
    receiver.fail(false);
    let (status, retried) =
        api.post(&format!("/v1/dead-letters/{}/retry", letter["id"].as_str().unwrap()), json!({})).await;
    assert_eq!(status, 200, "{retried}");
    status_is(&api, &id, "succeeded").await;
    assert_eq!(receiver.calls().last().unwrap().id(), calls[0].id());
    assert_eq!(db.count("select count(*) from dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn whatever_the_other_side_does_is_handled_as_written() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let evil =
        ["/fail", "/no", "/later", "/redirect", "/drip", "/huge", "/reset", "/wrong-length", "/nonsense", "/gone"];
    let mut hooks = BTreeMap::new();
    for path in evil {
        hooks.insert(path, hook(&db, &api, &format!("{}{path}", receiver.url), &["task.*"], json!({})).await.0);
    }
    let inside = hook(&db, &api, "http://169.254.169.254/latest", &["task.*"], json!({})).await.0;
    let plain = hook(&db, &api, "http://example.com/", &["task.*"], json!({})).await.0;
    happen(&db, company, 1).await;
    let one = async |id: &str| -> Value {
        let all = deliveries(&api, id).await;
        assert_eq!(all.len(), 1, "{all:?}");
        all[0].clone()
    };
    for (path, id) in &hooks {
        eventually(path, || async { one(id).await["attempts"].as_i64() >= Some(1) }).await;
        let shown = one(id).await;
        let (status, said) = (shown["status"].as_str().unwrap(), shown["last_error"].as_str().unwrap_or_default());
        let wanted = match *path {
            // Its status is what counts.
            "/wrong-length" => ("succeeded", ""),
            "/gone" => ("failed", "410"),
            "/fail" => ("pending", "500"),
            "/no" => ("pending", "400"),
            "/later" => ("pending", "503"),
            "/redirect" => ("pending", "redirects are not followed"),
            "/drip" => ("pending", "no answer in time"),
            "/huge" => ("pending", "500"),
            _ => ("pending", ""),
        };
        assert_eq!(status, wanted.0, "{path}: {shown}");
        assert!(said.contains(wanted.1), "{path}: {shown}");
    }
    // What may not be reached is refused for good, and nothing of it is shown.
    for (id, said) in [(&inside, "not a public address"), (&plain, "plain http")] {
        eventually("a refusal", || async { one(id).await["status"] == "failed" }).await;
        let shown = one(id).await;
        assert!(shown["last_error"].as_str().unwrap().contains(said) && shown["last_status"].is_null(), "{shown}");
    }
    let later = one(&hooks["/later"]).await;
    let day = "select count(*) from jobs where kind = 'delivery' and due_at between now() + interval '23 hours' and now() + interval '24 hours'";
    assert_eq!(db.count(day).await, 1, "Retry-After is a day at the most: {later}");
    assert!(receiver.sent() < 16 * 1024 * 1024, "ten gigabytes are not read: {}", receiver.sent());
    let kept = "select count(*) from delivery_attempts where octet_length(answer) > 2048";
    assert_eq!(db.count(kept).await, 0);
    let answer = "select max(octet_length(answer))::bigint from delivery_attempts where answer like 'xx%'";
    assert_eq!(db.count(answer).await, 2048);
    let (_, gone) = api.get(&format!("/v1/webhooks/{}", hooks["/gone"])).await;
    assert_eq!(gone["data"]["status"], "disabled", "{gone}");
    assert!(gone["data"]["disabled_reason"].as_str().unwrap().contains("410"), "{gone}");
    assert_eq!(db.count("select count(*) from events where event = 'webhook.disabled'").await, 1);
    // Every one of them is told again, under the same id.
    let tries = receiver.count();
    time_passes(&db).await;
    eventually("second tries", || async { receiver.count() >= tries + 7 }).await;
    let ids: HashSet<String> = receiver.calls().iter().map(|call| call.id().to_owned()).collect();
    assert_eq!(ids.len(), 1, "one event, one id");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_webhook_that_fails_for_five_days_is_disabled_and_goes_on_where_it_was() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let (id, _) = hook(&db, &api, &format!("{}/switch", receiver.url), &["task.*"], json!({})).await;
    receiver.fail(true);
    happen(&db, company, 2).await;
    eventually("two tries", || async { receiver.count() == 2 }).await;
    eventually("it to be noted", || async {
        api.get(&format!("/v1/webhooks/{id}")).await.1["data"]["failing_since"].is_string()
    })
    .await;
    sqlx::query("update flows set failing_since = now() - interval '6 days'").execute(&db.pool).await.unwrap();
    time_passes(&db).await;
    let path = format!("/v1/webhooks/{id}");
    eventually("it to be disabled", || async { api.get(&path).await.1["data"]["status"] == "disabled" }).await;
    let reason = api.get(&path).await.1["data"]["disabled_reason"].clone();
    assert!(reason.as_str().unwrap().starts_with("nothing has worked for 5 days: the answer was 503"), "{reason}");
    let (status, refused) = api.post(&format!("{path}/test"), json!({})).await;
    assert!(status == 409 && refused.to_string().contains("enable it first"), "{refused}");
    // What is due meanwhile is held, what happens meanwhile is not added.
    eventually("both to be held", || async {
        time_passes(&db).await;
        db.count("select count(*) from jobs where kind = 'delivery' and held_for is not null").await == 2
    })
    .await;
    let tried = receiver.count();
    happen(&db, company, 3).await;
    assert_eq!(deliveries(&api, &id).await.len(), 2);
    receiver.fail(false);
    api.send("PATCH", &path, Some(json!({"status": "active"}))).await;
    status_is(&api, &id, "succeeded").await;
    assert_eq!(receiver.count(), tried + 2);
    // What was missed is made up for when somebody asks.
    let old = json!({"since": "2026-01-01T00:00:00Z", "status": "missing"});
    let (status, refused) = api.post(&format!("{path}/redeliver"), old).await;
    assert!(status == 400 && refused.to_string().contains("the last 30 days"), "{refused}");
    let yesterday = (chrono::Utc::now() - chrono::Duration::days(1)).format("%Y-%m-%d").to_string();
    let body = json!({"since": yesterday, "status": "missing", "limit": 1});
    let (mut made, mut cursor) = (0, Value::Null);
    loop {
        let mut body = body.clone();
        if cursor.is_string() {
            body["cursor"] = cursor;
        }
        let (status, part) = api.post(&format!("{path}/redeliver"), body).await;
        assert_eq!(status, 200, "{part}");
        made += part["data"]["count"].as_i64().unwrap();
        cursor = part["data"]["cursor"].clone();
        if cursor.is_null() {
            break;
        }
    }
    assert_eq!(made, 3);
    eventually("all of them", || async { receiver.count() == tried + 5 }).await;
    let (_, none) = api.post(&format!("{path}/redeliver"), json!({"since": "2026-01-01T00:00:00Z"})).await;
    assert_eq!(none["data"]["count"], 0, "nothing has failed for good");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_ordered_webhook_hears_of_one_thing_in_order() {
    let db = Db::new().await;
    let _workers = [db.worker(SHORT_LEASE), db.worker(SHORT_LEASE)];
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let other = db.company(&["a"], "claude", json!({})).await;
    let url = format!("{}/switch", receiver.url);
    let (id, _) = hook(&db, &api, &url, &["task.*"], json!({"ordered": true})).await;
    receiver.fail(true);
    for _ in 0..10 {
        happen(&db, company, 1).await;
        happen(&db, other, 1).await;
    }
    eventually("the first of each", || async { receiver.count() >= 2 }).await;
    assert_eq!(receiver.calls().iter().map(|call| call.id().to_owned()).collect::<HashSet<_>>().len(), 2);
    receiver.fail(false);
    time_passes(&db).await;
    status_is(&api, &id, "succeeded").await;
    for company in [company, other] {
        let told: Vec<String> = receiver
            .calls()
            .iter()
            .filter(|call| call.json()["company_id"] == json!(company))
            .map(|call| call.id().to_owned())
            .collect();
        let mut sorted = told.clone();
        sorted.sort_unstable();
        assert_eq!(told, sorted, "in order");
        assert_eq!(told.iter().collect::<HashSet<_>>().len(), 10);
    }
    assert_eq!(db.count("select count(*) from delivery_order").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_of_a_webhook_hold_and_a_dead_one_is_only_probed() {
    let db = Db::new().await;
    let _workers = [db.worker(SHORT_LEASE), db.worker(SHORT_LEASE)];
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let slow = format!("{}/slow", receiver.url);
    hook(&db, &api, &slow, &["task.*"], json!({"max_concurrency": 2})).await;
    let rated = format!("{}/rated", receiver.url);
    hook(&db, &api, &rated, &["task.*"], json!({"rate_limit": 5})).await;
    let dead = hook(&db, &api, "http://127.0.0.1:1/", &["task.*"], json!({})).await.0;
    happen(&db, company, 40).await;
    eventually("all of the slow one's", || async { receiver.calls_at("/slow").len() == 40 }).await;
    let calls = receiver.calls_at("/slow");
    for window in calls.windows(3) {
        // Each is answered after 200 ms: a third one begins once the first is over.
        assert!(window[2].at - window[0].at >= Duration::from_millis(195), "three at once");
    }
    let calls = receiver.calls_at("/rated");
    let first = calls[0].at;
    for (n, call) in calls.iter().enumerate() {
        let may = 5.0 + 5.0 * (call.at - first).as_secs_f64() + 1.5;
        assert!((n as f64) < may, "{n} after {:?}", call.at - first);
    }
    let (_, shown) = api.get(&format!("/v1/webhooks/{dead}")).await;
    assert!(shown["data"]["failing_since"].is_string(), "{shown}");
    let attempts = db
        .count(
            "select count(*) from delivery_attempts a join webhooks w on w.id = a.webhook_id where w.url like '%:1/'",
        )
        .await;
    assert!((5..25).contains(&attempts), "{attempts} tries of a dead one: eight at first, then probes");
}

/// Workers die each second under load, and every event is told.
#[tokio::test(flavor = "multi_thread")]
async fn whoever_dies_every_event_is_told() {
    // Longer by command: CAPX_KILLS=60.
    let kills: u32 = std::env::var("CAPX_KILLS").ok().and_then(|kills| kills.parse().ok()).unwrap_or(5);
    let db = Db::new().await;
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    // Each answer takes a while: there are always some under way.
    let (_, key) = hook(&db, &api, &format!("{}/slow", receiver.url), &["task.*"], json!({})).await;
    let args = &["worker", "--lease", "1500ms", "--concurrency", "32"];
    let mut workers = [Process::start(&db, args, ""), Process::start(&db, args, "")];
    let mut told = 0;
    for kill in 0..kills {
        for _ in 0..20 {
            happen(&db, company, 10).await;
            told += 10;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let at = kill as usize % 2;
        workers[at].signal(rustix::process::Signal::KILL);
        workers[at].ended().await;
        workers[at] = Process::start(&db, args, "");
    }
    eventually("all to be over", || async {
        db.count("select count(*) from deliveries where status <> 'succeeded'").await == 0
            && db.count("select count(*) from jobs where kind = 'delivery'").await == 0
    })
    .await;
    let calls = receiver.calls();
    let ids: HashSet<&str> = calls.iter().map(Call::id).collect();
    assert_eq!(ids.len(), told, "each at least once, unique by its id");
    assert!(calls.iter().all(|call| verified(call, &key)));
    assert!(calls.len() > told, "nobody died over a delivery");
    println!("{told} events, {} calls, {kills} kills", calls.len());
    assert_eq!(db.count("select count(*) from events e where event = 'task.updated'").await, told as i64);
}

pub const POINTS: &[&str] = &["delivery.sent", "delivery.before_commit", "delivery.after_commit"];

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_dies_at_any_point_of_a_delivery_loses_nothing() {
    for point in POINTS {
        let db = Db::new().await;
        let api = db.api().await;
        let receiver = Receiver::start().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let (id, _) = hook(&db, &api, &format!("{}/x", receiver.url), &["task.*"], json!({})).await;
        let args = &["worker", "--lease", "1500ms"];
        let order = format!("{point}=kill@1");
        let dying = Process::start(&db, args, &order);
        happen(&db, company, 3).await;
        dying.dies_at(point).await;
        let _worker = db.worker(SHORT_LEASE);
        status_is(&api, &id, "succeeded").await;
        let ids: HashSet<String> = receiver.calls().iter().map(|call| call.id().to_owned()).collect();
        assert_eq!(ids.len(), 3, "{point}");
        assert_eq!(db.count("select count(*) from jobs where kind = 'delivery'").await, 0, "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_webhook_was_not_told_yet_is_kept_whatever_its_age() {
    let db = Db::new().await;
    let worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let receiver = Receiver::start().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let (id, _) = hook(&db, &api, &format!("{}/switch", receiver.url), &["playbook.completed"], json!({})).await;
    // As a version registers it that knows of no flows.
    sqlx::query("delete from flows").execute(&db.pool).await.unwrap();
    receiver.fail(true);
    let playbook = db.playbook(company, STEP).await;
    let run = db.start(company, playbook, json!({})).await;
    eventually("a try", || async { receiver.count() == 1 }).await;
    eventually("the next try to be planned", || async { deliveries(&api, &id).await[0]["attempts"] == 1 }).await;
    worker.stop().await;
    let old = "set session_replication_role = replica; update runs set ended_at = now() - interval '1 year';
        update deliveries set created_at = now() - interval '1 year'; reset session_replication_role;";
    sqlx::raw_sql(old).execute(&db.pool).await.unwrap();
    // Its id says when it began; everything is older than nothing is kept.
    let forget = async || {
        let day = Duration::from_secs(24 * 3600);
        let past = capx_core::store::upkeep::forget_runs(&db.pool, None, day, day).await.unwrap();
        let now = "select count(*) from runs";
        (past.gone, db.count(now).await)
    };
    let born = format!(
        "set session_replication_role = replica;
         update runs set id = overlay(id::text placing '0190' from 1 for 4)::uuid where id = '{0}';
         update events set run_id = overlay(run_id::text placing '0190' from 1 for 4)::uuid where run_id = '{0}';
         reset session_replication_role;",
        run.0
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(born)).execute(&db.pool).await.unwrap();
    assert_eq!(forget().await, (0, 1), "its event is still to be told");
    receiver.fail(false);
    let worker = db.worker(SHORT_LEASE);
    eventually("it to be told", || async {
        time_passes(&db).await;
        deliveries(&api, &id).await[0]["status"] == "succeeded"
    })
    .await;
    worker.stop().await;
    assert_eq!(forget().await, (1, 0));
    // The delivery itself goes with its time; what is younger stays.
    let keep = Duration::from_secs(3600);
    let webhook: uuid::Uuid = sqlx::query_scalar("select id from webhooks").fetch_one(&db.pool).await.unwrap();
    let prune = async || capx_core::store::deliveries::prune(&db.pool, webhook, keep, keep).await.unwrap();
    assert_eq!(prune().await, 0);
    sqlx::raw_sql("delete from webhooks").execute(&db.pool).await.unwrap();
    assert_eq!(prune().await, 1, "a webhook that is gone leaves nothing");
    assert_eq!(db.count("select count(*) from delivery_attempts").await, 0);
}
