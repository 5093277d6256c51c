//! Keys, limits, idempotency and the walls between tenants.

use std::collections::HashSet;
use std::time::Duration;

use capx_core::domain::ids::{AccountId, CompanyId};
use capx_core::store::tenancy::{self, Plans, Tenant};
use capx_core::store::{self, PoolKind, tenants};
use serde_json::{Value, json};

use crate::contract;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};

const YAML: &str = "name: t\nsteps: [{id: a, action: transform, params: {x: 1}}]\n";

fn body() -> Value {
    json!({"name": "acme", "agents": [{"role": "writer", "adapter": "claude", "instructions": "Write."}]})
}

impl Api {
    /// The same client with another key.
    pub fn with(&self, key: &str) -> Api {
        Api {
            base: self.base.clone(),
            key: key.to_owned(),
            client: self.client.clone(),
            served: None,
            _stop: tokio_util::sync::CancellationToken::new().drop_guard(),
        }
    }

    pub async fn raw(
        &self,
        method: &str,
        path: &str,
        headers: &[(&str, &str)],
        body: Option<&str>,
    ) -> reqwest::Response {
        let mut request = self
            .client
            .request(method.parse().unwrap(), format!("{}{path}", self.base))
            .header("authorization", format!("Bearer {}", self.key));
        for (name, value) in headers {
            request = request.header(*name, *value);
        }
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_owned());
        }
        request.send().await.unwrap()
    }
}

async fn account(db: &Db, name: &str, tier: &str) -> (AccountId, String) {
    let account = tenants::account(&db.pool, name, tier).await.unwrap();
    let made = capx::keys::make(&db.pool, account, None, name, true, &["*".into()]).await.unwrap();
    (account, made.key)
}

async fn company(api: &Api) -> String {
    let (status, answer) = api.post("/v1/companies", body()).await;
    assert_eq!(status, 201, "{answer}");
    answer["data"]["id"].as_str().unwrap().to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_comes_again_is_answered_again_and_done_once() {
    let db = Db::new().await;
    let api = db.api().await;
    let key = [("idempotency-key", "order-1")];
    let text = body().to_string();
    let first = api.raw("POST", "/v1/companies", &key, Some(&text)).await;
    assert_eq!(first.status(), 201);
    assert!(!first.headers().contains_key("idempotent-replayed"));
    let first: Value = first.json().await.unwrap();
    let again = api.raw("POST", "/v1/companies", &key, Some(&text)).await;
    assert_eq!((again.status().as_u16(), &again.headers()["idempotent-replayed"]), (201, &"true".parse().unwrap()));
    assert_eq!(again.json::<Value>().await.unwrap(), first);
    assert_eq!(db.count("select count(*) from companies").await, 1);
    // The same key for something else.
    let other = text.replace("acme", "other");
    assert_eq!(api.raw("POST", "/v1/companies", &key, Some(&other)).await.status(), 409);
    // Another caller's key of the same name is another.
    let stranger = api.with(&account(&db, "stranger", "enterprise").await.1);
    assert_eq!(stranger.raw("POST", "/v1/companies", &key, Some(&text)).await.status(), 201);
    assert_eq!(db.count("select count(*) from companies").await, 2);
    // What failed is not kept: it may be mended and sent again.
    let key = [("idempotency-key", "order-2")];
    assert_eq!(api.raw("POST", "/v1/companies", &key, Some("{}")).await.status(), 400);
    assert_eq!(api.raw("POST", "/v1/companies", &key, Some(&text)).await.status(), 201);
    for wrong in ["", &"x".repeat(256)] {
        assert_eq!(api.raw("POST", "/v1/companies", &[("idempotency-key", wrong)], Some(&text)).await.status(), 400);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_that_come_at_once_with_one_key_one_is_carried_out() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = company(&api).await;
    let (_, pb) = api.post(&format!("/v1/companies/{co}/playbooks"), json!({"yaml": YAML})).await;
    let path = format!("/v1/companies/{co}/playbooks/{}/run", pb["data"]["id"].as_str().unwrap());
    let sent = (0..24).map(|_| api.raw("POST", &path, &[("idempotency-key", "once")], Some("{}")));
    let mut runs = HashSet::new();
    let mut told = [0, 0];
    for answer in futures_util::future::join_all(sent).await {
        match answer.status().as_u16() {
            201 => {
                told[0] += 1;
                runs.insert(answer.json::<Value>().await.unwrap()["data"]["run_id"].as_str().unwrap().to_owned());
            }
            409 => told[1] += 1,
            other => panic!("{other}"),
        }
    }
    assert!(told[0] >= 1 && runs.len() == 1, "{told:?} {runs:?}");
    assert_eq!(db.count("select count(*) from runs").await, 1);
    // Whoever was told to wait is answered now.
    assert_eq!(api.raw("POST", &path, &[("idempotency-key", "once")], Some("{}")).await.status(), 201);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_hold_over_all_processes_and_say_so() {
    let db = Db::new().await;
    let (one, two) = (db.api().await, db.api().await);
    let (account, key) = account(&db, "small", "starter").await;
    let (one, two) = (one.with(&key), two.with(&key));
    let mut good = 0;
    let mut refused = 0;
    for round in 0..100 {
        let api = if round % 2 == 0 { &one } else { &two };
        let answer = api.raw("GET", "/v1/companies", &[], None).await;
        assert_eq!(answer.headers()["x-ratelimit-limit"], "60");
        match answer.status().as_u16() {
            200 => good += 1,
            429 => {
                let wait: u64 = answer.headers()["retry-after"].to_str().unwrap().parse().unwrap();
                assert!((1..=60).contains(&wait), "{wait}");
                let answer: Value = answer.json().await.unwrap();
                assert_eq!(answer["error"]["code"], "rate_limit_exceeded");
                refused += 1;
            }
            other => panic!("{other}"),
        }
        if good >= 70 {
            break;
        }
        if refused > 0 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }
    // 10 a second, and what came back meanwhile: these hundred took some seconds.
    assert!(good >= 10 && refused > 0, "{good} good, {refused} refused");
    assert!(good < 70, "{good} good of 60 a minute");
    // Settled once nobody asks any more: the charges add up over the processes.
    eventually("the charges to be settled", || async {
        let left: i64 = sqlx::query_scalar("select credits from accounts where id = $1")
            .bind(account.0)
            .fetch_one(&db.pool)
            .await
            .unwrap();
        left == 10_000 - good
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_requests_are_open_at_once_than_the_tier_has() {
    let db = Db::new().await;
    let (one, two) = (db.api().await, db.api().await);
    let (_, key) = account(&db, "small", "starter").await;
    sqlx::raw_sql("update accounts set rate_per_minute = 60000, burst_per_second = 1000 where name = 'small'")
        .execute(&db.pool)
        .await
        .unwrap();
    let (one, two) = (one.with(&key), two.with(&key));
    let co = company(&one).await;
    let yaml = "name: g\nsteps: [{id: a, action: transform, approval: required}]\n";
    let (_, pb) = one.post(&format!("/v1/companies/{co}/playbooks"), json!({"yaml": yaml})).await;
    let path = format!("/v1/companies/{co}/playbooks/{}", pb["data"]["id"].as_str().unwrap());
    let (_, run) = one.post(&format!("{path}/run"), json!({})).await;
    let path = format!("{path}/runs/{}?wait=3", run["data"]["run_id"].as_str().unwrap());
    // Five wait for a run that does not end, over two processes.
    let held = async |api: &Api| api.raw("GET", &path, &[], None).await.status().as_u16();
    let waiting = futures_util::future::join_all([held(&one), held(&two), held(&one), held(&two), held(&one)]);
    let more = async {
        eventually("five to be open", || async {
            db.count(
                "select coalesce(sum((s.value ->> 0)::int), 0) from accounts a cross join jsonb_each(a.slots) s
                 where a.name = 'small'",
            )
            .await
                == 5
        })
        .await;
        [held(&two).await, held(&one).await]
    };
    let (waited, more) = tokio::join!(waiting, more);
    assert_eq!(waited, [200; 5]);
    assert_eq!(more, [429; 2]);
    assert_eq!(held(&two).await, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_guesses_keys_is_soon_refused_and_others_are_not() {
    let db = Db::new().await;
    let api = db.api().await;
    assert_eq!(api.get("/v1/companies").await.0, 200);
    let guesser = api.with("capx_sk_live_guess");
    let mut told = Vec::new();
    for _ in 0..40 {
        told.push(guesser.get("/v1/companies").await.0);
    }
    assert_eq!((told[0], *told.last().unwrap()), (401, 429), "{told:?}");
    // The same address with a key that is known.
    assert_eq!(api.get("/v1/companies").await.0, 200);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_key_is_refused_everywhere_within_moments() {
    let db = Db::new().await;
    let (one, two) = (db.api().await, db.api().await);
    let made = capx::keys::make(&db.pool, db.account, None, "k", true, &["*".into()]).await.unwrap();
    let (one, two) = (one.with(&made.key), two.with(&made.key));
    assert_eq!((one.get("/v1/companies").await.0, two.get("/v1/companies").await.0), (200, 200));
    assert!(tenants::revoke_key(&db.pool, made.id).await.unwrap());
    tokio::time::timeout(Duration::from_secs(5), async {
        while one.get("/v1/companies").await.0 != 401 || two.get("/v1/companies").await.0 != 401 {
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    })
    .await
    .expect("refused within 5 s");
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_first_wall_gone_the_second_one_holds() {
    let db = Db::new().await;
    let api = db.api().await;
    let (theirs, their_key) = account(&db, "theirs", "enterprise").await;
    let co = company(&api).await;
    let (_, pb) = api.post(&format!("/v1/companies/{co}/playbooks"), json!({"yaml": YAML})).await;
    let path = format!("/v1/companies/{co}/playbooks/{}/run", pb["data"]["id"].as_str().unwrap());
    assert_eq!(api.post(&path, json!({})).await.0, 201);
    let _ = company(&api.with(&their_key)).await;
    let pool = store::pool(&db.url, PoolKind::Tenants, 1).unwrap();
    let tables: Vec<String> = sqlx::query_scalar(
        "select c.relname::text from pg_class c join pg_attribute a on a.attrelid = c.oid
         where c.relkind in ('r', 'p') and not c.relispartition and c.relnamespace = 'public'::regnamespace and a.attname = 'company_id' and not a.attisdropped",
    )
    .fetch_all(&db.pool)
    .await
    .unwrap();
    assert!(tables.len() > 15, "{tables:?}");
    // A part of a table has no door, and nothing to be seen through one that somebody makes.
    let parts = "select count(*) from pg_class where relispartition and relkind = 'r'";
    let doors = "select count(*) from pg_class where relispartition and relkind = 'r'
        and has_table_privilege('capx_api', oid, 'select,insert,update,delete,truncate')";
    assert!(db.count(parts).await > 12);
    assert_eq!(db.count(doors).await, 0);
    let open = "select count(*) from pg_class where relispartition and relkind = 'r' and not relrowsecurity";
    assert_eq!(db.count(open).await, 0);
    let mine = tenancy::begin(&pool, Tenant { account: db.account, company: None }, Plans::Anew).await.unwrap();
    drop(mine);
    let company_of_mine: CompanyId = co.parse().unwrap();
    for table in tables.iter().map(String::as_str).chain(["companies"]) {
        // Every table has the wall, for its owner too.
        let (on, forced): (bool, bool) =
            sqlx::query_as("select relrowsecurity, relforcerowsecurity from pg_class where oid = $1::regclass")
                .bind(table)
                .fetch_one(&db.pool)
                .await
                .unwrap();
        assert!(on && forced, "{table} has no wall");
        // A query that forgets its tenant, by another account.
        let column = if table == "companies" { "id" } else { "company_id" };
        let sql = format!("select count(*) from {table} where {column} = $1");
        let mut tx = tenancy::begin(&pool, Tenant { account: theirs, company: None }, Plans::Anew).await.unwrap();
        let seen: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql.clone()))
            .bind(company_of_mine.0)
            .fetch_one(&mut *tx)
            .await
            .unwrap();
        assert_eq!(seen, 0, "{table}");
        let update = format!("update {table} set {column} = {column} where {column} = $1");
        match sqlx::query(sqlx::AssertSqlSafe(update)).bind(company_of_mine.0).execute(&mut *tx).await {
            Ok(done) => assert_eq!(done.rows_affected(), 0, "{table}"),
            // What is only ever added to is not theirs to change at all.
            Err(error) => {
                let code = error.as_database_error().and_then(|error| error.code().map(String::from));
                assert_eq!((table, code.as_deref()), ("audit", Some("42501")), "{error}");
            }
        }
        drop(tx);
        // And one that says nothing at all.
        let mut nobody = pool.begin().await.unwrap();
        let seen: i64 =
            sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).bind(company_of_mine.0).fetch_one(&mut *nobody).await.unwrap();
        assert_eq!(seen, 0, "{table}");
    }
    // The wall is not simply shut.
    let mut tx = tenancy::begin(&pool, Tenant { account: db.account, company: None }, Plans::Anew).await.unwrap();
    for table in ["companies", "agents", "playbooks", "runs", "events"] {
        let sql = format!("select count(*) from {table}");
        let seen: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(sql)).fetch_one(&mut *tx).await.unwrap();
        assert!(seen > 0, "{table}");
    }
    // Nor does it let anybody write what would be another's.
    let stolen = sqlx::query("insert into companies (id, account_id, name, status) values ($1, $2, 'x', 'running')")
        .bind(CompanyId::new().0)
        .bind(theirs.0)
        .execute(&mut *tx)
        .await;
    assert!(stolen.is_err());
}

/// Every operation with the ids of one account, asked by another account and
/// by keys that lack the scope.
#[tokio::test(flavor = "multi_thread")]
async fn no_operation_shows_or_changes_what_is_anothers() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let co = company(&api).await;
    let base = format!("/v1/companies/{co}");
    eventually("the agents to be ready", || async { api.get(&base).await.1["data"]["status"] == "running" }).await;
    let yaml = "name: g\nsteps: [{id: a, action: transform, approval: required}]\n";
    let (_, pb) = api.post(&format!("{base}/playbooks"), json!({"yaml": yaml})).await;
    let pb = pb["data"]["id"].as_str().unwrap();
    let (_, run) = api.post(&format!("{base}/playbooks/{pb}/run"), json!({})).await;
    let (_, list) = api.get("/v1/approvals").await;
    let (_, agents) = api.get(&format!("{base}/agents")).await;
    let (_, task) = api.post(&format!("{base}/tasks"), json!({"title": "t"})).await;
    let (_, key) = api.post("/v1/keys", json!({"name": "k"})).await;
    let (_, webhook) = api.post("/v1/webhooks", json!({"url": "https://example.com/", "events": ["*"]})).await;
    let yaml = "name: f\nsteps: [{id: a, action: file.read, params: {path: none}}]\n";
    let (_, failing) = api.post(&format!("{base}/playbooks"), json!({"yaml": yaml})).await;
    let failing = failing["data"]["id"].as_str().unwrap();
    api.post(&format!("{base}/playbooks/{failing}/run?wait=20"), json!({})).await;
    let (_, letters) = api.get("/v1/dead-letters").await;
    let of_webhook = format!("/v1/webhooks/{}", webhook["data"]["id"].as_str().unwrap());
    let (_, delivery) = api.post(&format!("{of_webhook}/test"), json!({})).await;
    let never = json!({"rate": 1, "fingerprint": "none"});
    let (_, redrive) = api.post("/v1/dead-letters/redrives", never).await;
    let ids = [
        ("{redrive}", redrive["data"]["id"].as_str().unwrap()),
        ("{webhook}", webhook["data"]["id"].as_str().unwrap()),
        ("{delivery}", delivery["data"]["id"].as_str().unwrap()),
        ("{letter}", letters["data"][0]["id"].as_str().unwrap()),
        ("{company}", co.as_str()),
        ("{playbook}", pb),
        ("{run}", run["data"]["run_id"].as_str().unwrap()),
        ("{approval}", list["data"][0]["id"].as_str().unwrap()),
        ("{agent}", agents["data"][0]["id"].as_str().unwrap()),
        ("{version}", "1"),
        ("{task}", task["data"]["id"].as_str().unwrap()),
        ("{key}", key["data"]["id"].as_str().unwrap()),
        ("{queue}", "steps"),
        ("{worker}", "1"),
        ("{name}", "TOKEN"),
        ("{artifact}", "0000000000000000000000000000000000000000000000000000000000000000"),
    ];
    let secret = json!({"name": "TOKEN", "value": "long enough"});
    assert_eq!(api.post(&format!("/v1/companies/{co}/secrets"), secret).await.0, 201);
    let (_, document) = api.get("/v1/openapi.json").await;
    let stranger = api.with(&account(&db, "stranger", "enterprise").await.1);
    let other_co = company(&stranger).await;
    let other = tenants::account(&db.pool, "stranger", "enterprise").await.unwrap();
    let company = Some(other_co.parse().unwrap());
    let bound = capx::keys::make(&db.pool, other, company, "bound", true, &["*".into()]).await.unwrap();
    let bound = api.with(&bound.key);
    let fingerprint = async || -> Vec<i64> {
        let mut counts = Vec::new();
        for sql in [
            "select count(*) from companies where status <> 'stopped'",
            "select count(*) from agents where status in ('active', 'initializing')",
            "select count(*) from playbooks where status = 'active'",
            "select count(*) from runs where status = 'suspended'",
            "select count(*) from approvals where status = 'pending'",
            "select count(*) from tasks where status = 'pending'",
            "select count(*) from api_keys where name = 'k' and revoked_at is null",
            "select count(*) from webhooks where secret is not null and old_secret is null",
            "select count(*) from triggers where old_secret is not null",
            "select count(*) from dead_letters",
            "select count(*) from signals",
            "select count(*) from queue_pauses",
            "select count(*) from company_secrets where name = 'TOKEN' and updated_at = created_at",
            "select count(*) from memories",
            "select count(*) from agents where paused_by is null",
            "select count(*) from deliveries where event = 'webhook.test'",
            "select count(*) from redrives where status <> 'cancelled'",
            "select count(*) from flows where company_id is not null",
            "select count(*) from retention",
        ] {
            counts.push(db.count(sql).await);
        }
        counts
    };
    let before = fingerprint().await;
    let body = |operation: &Value| {
        let name = operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].as_str().unwrap_or("");
        match name.rsplit('/').next().unwrap() {
            "AgentBody" => json!({"role": "x", "adapter": "claude", "instructions": "x"}),
            "CreatePlaybookBody" => json!({"yaml": YAML}),
            "CreateTaskBody" => json!({"title": "x"}),
            "DirectiveBody" => json!({"objective": "x"}),
            "RollbackBody" => json!({"version": 1}),
            "RejectBody" => json!({"feedback": "no"}),
            "EventBody" => json!({"name": "x"}),
            "RedeliverBody" => json!({"since": "2026-01-01T00:00:00Z", "status": "all"}),
            "RedriveBody" => json!({"rate": 1}),
            "LimitBody" => json!({"company_id": co, "max_concurrency": 1}),
            "RememberBody" => json!({"key": "k", "value": 1}),
            "SetSecretBody" => json!({"name": "X", "value": "long enough"}),
            "CreateWebhookBody" => json!({"url": "https://example.com/", "events": ["*"]}),
            _ => json!({}),
        }
    };
    let mut asked = 0;
    for (method, template, operation) in contract::operations(&document) {
        if template == contract::OPEN {
            continue;
        }
        let mut path = template.clone();
        for (name, id) in ids {
            path = path.replace(name, id);
        }
        assert!(!path.contains('{'), "no id for {path}");
        let body = (method != "GET").then(|| body(&operation));
        let scope = operation["x-scope"].as_str().unwrap();
        // Scopes: each key with every scope but the wanted one, and with none.
        let others: Vec<&str> =
            capx_core::domain::key::SCOPES.iter().copied().filter(|s| *s != scope && *s != "*").collect();
        for scopes in [others, Vec::new()] {
            let lacking = api.with(&db.key(&scopes).await);
            let (status, answer) = lacking.send(&method, &path, body.clone()).await;
            assert_eq!(status, 403, "{method} {path}: {answer}");
            assert!(answer["error"]["message"].as_str().unwrap().contains(scope), "{answer}");
        }
        if !template.contains('{') {
            continue;
        }
        // Tenants: another account, and a key that is bound to another company.
        for foreign in [&stranger, &bound] {
            let (status, answer) = foreign.send(&method, &path, body.clone()).await;
            // The server itself belongs to nobody but whoever runs it.
            let wanted = if ["queue", "worker"].iter().any(|it| template.contains(&format!("{{{it}}}"))) {
                (403, "forbidden")
            } else {
                (404, "not_found")
            };
            assert_eq!((status, answer["error"]["code"].as_str().unwrap()), wanted, "{method} {path}: {answer}");
            asked += 1;
        }
    }
    assert!(asked > 50, "{asked}");
    assert_eq!(fingerprint().await, before);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_company_rests_and_goes_on_and_a_stopped_one_ends() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let api = db.api().await;
    let co = company(&api).await;
    let base = format!("/v1/companies/{co}");
    eventually("the agents to be ready", || async { api.get(&base).await.1["data"]["status"] == "running" }).await;
    assert_eq!(api.send("DELETE", &base, None).await.0, 409);
    let yaml = "name: g\nsteps: [{id: a, action: transform, approval: required}, {id: b, action: transform}]\n";
    let (_, pb) = api.post(&format!("{base}/playbooks"), json!({"yaml": yaml})).await;
    let path = format!("{base}/playbooks/{}", pb["data"]["id"].as_str().unwrap());
    let (_, run) = api.post(&format!("{path}/run"), json!({})).await;
    let run = format!("{path}/runs/{}", run["data"]["run_id"].as_str().unwrap());
    let (status, answer) = api.post(&format!("{base}/pause"), json!({})).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("paused")), "{answer}");
    let paused_at = answer["data"]["paused_at"].clone();
    assert_eq!(api.post(&format!("{base}/pause"), json!({})).await.1["data"]["paused_at"], paused_at);
    assert_eq!(api.post(&format!("{path}/run"), json!({})).await.0, 409);
    assert_eq!(api.get(&format!("{base}/agents?status=paused")).await.1["data"].as_array().unwrap().len(), 1);
    assert_eq!(api.post(&format!("{base}/agents/writer/wake"), json!({})).await.0, 409);
    // Its gate may be opened; its step is then parked.
    let (_, list) = api.get("/v1/approvals?status=pending").await;
    let gate = list["data"][0]["id"].as_str().unwrap();
    assert_eq!(api.post(&format!("/v1/approvals/{gate}/approve"), json!({})).await.0, 200);
    eventually("the step to be parked", || async {
        db.count("select count(*) from jobs where due_at = 'infinity'").await == 1
    })
    .await;
    let (_, answer) = api.get(&run).await;
    assert_eq!(answer["data"]["status"], "suspended", "{answer}");
    assert_eq!(answer["data"]["waiting_on"][0]["type"], "company", "{answer}");
    assert_eq!(api.post(&format!("{base}/resume"), json!({})).await.1["data"]["status"], "running");
    let (_, answer) = api.get(&format!("{run}?wait=30")).await;
    assert_eq!(answer["data"]["status"], "completed", "{answer}");
    // Stopped: what is open ends, nothing begins, and it may be deleted.
    let (_, run) = api.post(&format!("{path}/run"), json!({})).await;
    let run = format!("{path}/runs/{}", run["data"]["run_id"].as_str().unwrap());
    assert_eq!(api.post(&format!("{base}/stop"), json!({})).await.1["data"]["status"], "stopped");
    assert_eq!(api.post(&format!("{base}/resume"), json!({})).await.0, 409);
    let (_, list) = api.get("/v1/approvals?status=pending").await;
    let gate = list["data"][0]["id"].as_str().unwrap();
    assert_eq!(api.post(&format!("/v1/approvals/{gate}/approve"), json!({})).await.0, 200);
    eventually("the run to be ended", || async { api.get(&run).await.1["data"]["status"] == "cancelled" }).await;
    assert_eq!(api.send("DELETE", &base, None).await.1["data"]["deleted"], true);
    assert_eq!(api.get(&base).await.0, 404);
    for sql in [
        "select count(*) from runs",
        "select count(*) from events",
        // The second purge is for what may still be written.
        "select count(*) from jobs where kind <> 'purge' or state <> 'scheduled'",
        "select count(*) from agents",
    ] {
        eventually("everything to go", || async { db.count(sql).await == 0 }).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_woken_agent_beats_once() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = company(&api).await;
    let wake = format!("/v1/companies/{co}/agents/writer/wake");
    let (status, first) = api.post(&wake, json!({})).await;
    assert_eq!(status, 200, "{first}");
    assert_eq!(
        api.post(&wake, json!({})).await.1["data"]["heartbeat_started_at"],
        first["data"]["heartbeat_started_at"]
    );
    assert_eq!(db.count("select count(*) from jobs where kind = 'heartbeat'").await, 1);
    let _worker = db.worker(SHORT_LEASE);
    let beats = format!("/v1/companies/{co}/agents/writer/heartbeats");
    eventually("the beat", || async { !api.get(&beats).await.1["data"].as_array().unwrap().is_empty() }).await;
    let (_, answer) = api.get(&beats).await;
    assert_eq!((answer["data"].as_array().unwrap().len(), &answer["data"][0]["type"]), (1, &json!("heartbeat")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rolled_back_playbook_is_a_new_version_of_the_old_text() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = company(&api).await;
    let (_, made) = api.post(&format!("/v1/companies/{co}/playbooks"), json!({"yaml": YAML})).await;
    let playbook = format!("/v1/companies/{co}/playbooks/{}", made["data"]["id"].as_str().unwrap());
    let changed = YAML.replace("x: 1", "x: 2");
    let (_, answer) = api.send("PATCH", &playbook, Some(json!({"yaml": changed}))).await;
    assert_eq!(answer["data"]["version"], 2, "{answer}");
    let back = format!("{playbook}/rollback");
    for _ in 0..2 {
        // The second time it is current already.
        let (status, answer) = api.post(&back, json!({"version": 1})).await;
        assert_eq!((status, &answer["data"]["version"], &answer["data"]["yaml"]), (200, &json!(3), &json!(YAML)));
    }
    let (status, answer) = api.post(&back, json!({"version": 9})).await;
    assert_eq!((status, &answer["error"]["fields"][0]["field"]), (400, &json!("version")));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_task_is_approved_by_its_id_and_never_around_a_person() {
    let db = Db::new().await;
    let api = db.api().await;
    let mut request = body();
    request["config"] = json!({"governance": "human_in_loop"});
    let (_, answer) = api.post("/v1/companies", request).await;
    let co = format!("/v1/companies/{}", answer["data"]["id"].as_str().unwrap());
    let make = async || {
        let (status, answer) = api.post(&format!("{co}/tasks"), json!({"title": "t", "priority": "high"})).await;
        assert_eq!((status, &answer["data"]["status"]), (201, &json!("pending_approval")), "{answer}");
        answer["data"]["id"].as_str().unwrap().to_owned()
    };
    let (first, second) = (make().await, make().await);
    for list in ["/v1/approvals".to_owned(), format!("{co}/approvals?status=pending")] {
        let (_, answer) = api.get(&list).await;
        let ids: Vec<&str> =
            answer["data"].as_array().unwrap().iter().map(|a| a["task_id"].as_str().unwrap()).collect();
        assert_eq!(ids, [&second, &first]);
        assert_eq!(
            (&answer["data"][0]["risk"], &answer["data"][0]["agent"]["role"]),
            (&json!("high"), &json!("writer"))
        );
    }
    let approval = |id: &str, word: &str| format!("/v1/approvals/{id}{word}");
    for _ in 0..2 {
        let (status, answer) = api.post(&approval(&first, "/approve"), json!({})).await;
        assert_eq!(
            (status, &answer["data"]["status"], &answer["data"]["id"]),
            (200, &json!("approved"), &json!(first))
        );
    }
    assert_eq!(api.post(&approval(&first, "/reject"), json!({"feedback": "no"})).await.0, 409);
    assert_eq!(api.get(&format!("{co}/tasks/{first}")).await.1["data"]["status"], "pending");
    // Called off and taken up again, it is still asked about.
    for (word, status, asked) in [("cancel", "cancelled", "cancelled"), ("retry", "pending_approval", "pending")] {
        let (_, answer) = api.post(&format!("{co}/tasks/{second}/{word}"), json!({})).await;
        assert_eq!(answer["data"]["status"], status, "{answer}");
        assert_eq!(api.get(&approval(&second, "")).await.1["data"]["status"], asked);
    }
    let (_, answer) = api.post(&approval(&second, "/reject"), json!({"feedback": "no"})).await;
    assert_eq!((&answer["data"]["status"], &answer["data"]["note"]), (&json!("rejected"), &json!("no")));
    assert_eq!(api.get(&format!("{co}/tasks/{second}")).await.1["data"]["status"], "rejected");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_is_cancelled_truthfully() {
    let db = Db::new().await;
    let api = db.api().await;
    let co = company(&api).await;
    let (_, pb) = api.post(&format!("/v1/companies/{co}/playbooks"), json!({"yaml": YAML})).await;
    let path = format!("/v1/companies/{co}/playbooks/{}", pb["data"]["id"].as_str().unwrap());
    let (_, run) = api.post("/v1/playbooks/run", json!({"playbook_id": pb["data"]["id"], "inputs": {}})).await;
    let run = format!("{path}/runs/{}", run["data"]["run_id"].as_str().unwrap());
    let (status, answer) = api.post(&format!("{run}/cancel"), json!({})).await;
    assert_eq!((status, &answer["data"]["status"]), (200, &json!("cancelled")), "{answer}");
    assert_eq!(api.post(&format!("{run}/cancel"), json!({})).await.0, 200);
    assert_eq!(db.count("select count(*) from jobs where kind = 'step'").await, 0);
    let _worker = db.worker(SHORT_LEASE);
    let (_, run) = api.post(&format!("{path}/run?wait=30"), json!({})).await;
    let run = format!("{path}/runs/{}", run["data"]["run_id"].as_str().unwrap());
    let (status, answer) = api.post(&format!("{run}/cancel"), json!({})).await;
    assert_eq!(status, 409, "{answer}");
    assert!(answer["error"]["message"].as_str().unwrap().contains("completed"), "{answer}");
    let (_, pb) = api.get(&path).await;
    assert_eq!((&pb["data"]["run_count"], &pb["data"]["step_count"]), (&json!(2), &json!(1)), "{pb}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_has_not_changed_is_not_sent_again() {
    let db = Db::new().await;
    let api = db.api().await;
    let path = format!("/v1/companies/{}", company(&api).await);
    let first = api.raw("GET", &path, &[], None).await;
    let tag = first.headers()["etag"].to_str().unwrap().to_owned();
    assert!(tag.starts_with("W/\""), "{tag}");
    let again = api.raw("GET", &path, &[("if-none-match", &tag)], None).await;
    assert_eq!(again.status(), 304);
    assert!(again.bytes().await.unwrap().is_empty());
    assert_eq!(
        api.send("PATCH", &path, Some(json!({"name": "new", "config": {"timezone": "Asia/Tokyo"}}))).await.0,
        200
    );
    let changed = api.raw("GET", &path, &[("if-none-match", &tag)], None).await;
    assert_eq!(changed.status(), 200);
    assert_eq!(changed.json::<Value>().await.unwrap()["data"]["config"]["timezone"], "Asia/Tokyo");
}
