//! What the operator turns besides queues, and what is done for all: limits, redrives, pauses with
//! their reasons, retention.

use capx_core::domain::run::RunStatus;
use capx_core::engine::upkeep;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Db, SHORT_LEASE, eventually};

const STEP: &str = "name: p\nsteps:\n  - {id: a, action: transform, params: {v: 1}}\n";

#[tokio::test(flavor = "multi_thread")]
async fn dead_letters_are_grouped_and_tried_again_at_a_rate_with_their_checkpoints() {
    let db = Db::new().await;
    let api = db.api().await;
    let _workers = [db.worker(SHORT_LEASE), db.worker(SHORT_LEASE)];
    let witness = Witness::start(&[400; 6]).await;
    let yaml = "name: c\nsteps:\n  - {id: a, action: transform, params: {n: '${inputs.n / inputs.zero}'}}\n";
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, yaml).await;
    let call = format!(
        "name: d\nsteps: [{{id: a, action: http.request, params: {{method: POST, url: '{}/x'}}}}]\n",
        witness.url
    );
    let other = db.playbook(company, &call).await;
    for _ in 0..6 {
        let run = db.start(company, other, json!({})).await;
        db.until(company, run, RunStatus::Failed).await;
    }
    for n in 0..2 {
        let run = db.start(company, playbook, json!({"n": n, "zero": 0})).await;
        db.until(company, run, RunStatus::Failed).await;
    }
    let (_, groups) = api.get("/v1/dead-letters/groups").await;
    let counts: Vec<i64> = groups["data"].as_array().unwrap().iter().map(|g| g["count"].as_i64().unwrap()).collect();
    assert_eq!(counts, [6, 2], "{groups}");
    let fingerprint = groups["data"][0]["fingerprint"].as_str().unwrap();
    let (_, of_group) = api.get(&format!("/v1/dead-letters?fingerprint={fingerprint}")).await;
    assert_eq!(of_group["data"].as_array().unwrap().len(), 6);
    for bad in [json!({"rate": 0}), json!({"rate": 201}), json!({}), json!({"rate": 1, "reason": "odd"})] {
        assert_eq!(api.post("/v1/dead-letters/redrives", bad.clone()).await.0, 400, "{bad}");
    }
    let body = json!({"rate": 2, "fingerprint": fingerprint});
    let (status, made) = api.post("/v1/dead-letters/redrives", body).await;
    assert_eq!((status, &made["data"]["status"]), (201, &json!("running")), "{made}");
    let path = format!("/v1/dead-letters/redrives/{}", made["data"]["id"].as_str().unwrap());
    let seen = std::sync::Mutex::new(Vec::new());
    eventually("the redrive to be done", || async {
        let shown = api.get(&path).await.1["data"].clone();
        seen.lock().unwrap().push(shown["retried"].as_i64().unwrap());
        shown["status"] == "done"
    })
    .await;
    let mut seen = seen.into_inner().unwrap();
    seen.dedup();
    assert!(seen.windows(2).all(|pair| pair[1] - pair[0] <= 4) && seen.last() == Some(&6), "at a rate: {seen:?}");
    assert_eq!(api.post(&format!("{path}/cancel"), json!({})).await.0, 409, "it is done");
    assert_eq!(api.get("/v1/dead-letters/redrives/rdr_x").await.0, 404);
    // What is not dead is not tried again.
    let (status, none) = api.post("/v1/dead-letters/dl_00000000000000000000000000/retry", json!({})).await;
    assert_eq!((status, &none["error"]["code"]), (404, &json!("not_found")), "{none}");
    // The other side takes them now.
    eventually("all of the group to have ended well", || async {
        db.count("select count(*) from runs where status = 'completed'").await == 6
    })
    .await;
    assert_eq!(api.get("/v1/dead-letters/groups").await.1["data"].as_array().unwrap().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_paused_says_by_whom_and_why_over_restarts() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a", "b"], "claude", json!({})).await;
    eventually("the agents", || async { db.count("select count(*) from agents where status = 'active'").await == 2 })
        .await;
    let playbook = db.playbook(company, STEP).await;
    let base = format!("/v1/companies/{company}");
    assert_eq!(api.get("/v1/pauses").await.1["data"], json!([]));
    let long = json!({"reason": "x".repeat(1_001)});
    assert_eq!(api.post(&format!("{base}/pause"), long).await.0, 400);
    for (path, why) in [
        ("/agents/a/pause", "on leave"),
        (&format!("/playbooks/{playbook}/pause") as &str, "wrong prices"),
        ("/pause", "an incident"),
    ] {
        let (status, answer) = api.post(&format!("{base}{path}"), json!({"reason": why})).await;
        assert_eq!(status, 200, "{answer}");
    }
    // A second pause does not take the first one's word.
    api.post(&format!("{base}/pause"), json!({"reason": "again"})).await;
    let another = db.api().await;
    let (_, list) = another.get(&format!("/v1/pauses?company_id={company}")).await;
    let told: Vec<(&str, &str)> = list["data"]
        .as_array()
        .unwrap()
        .iter()
        .map(|pause| (pause["kind"].as_str().unwrap(), pause["reason"].as_str().unwrap()))
        .collect();
    assert_eq!(told, [("playbook", "wrong prices"), ("company", "an incident"), ("agent", "on leave")], "{list}");
    for pause in list["data"].as_array().unwrap() {
        assert!(pause["paused_by"].as_str().unwrap().starts_with("key_") && pause["paused_at"].is_string(), "{pause}");
    }
    for path in ["/agents/a/resume", &format!("/playbooks/{playbook}/resume"), "/resume"] {
        assert_eq!(api.post(&format!("{base}{path}"), json!({})).await.0, 200);
    }
    assert_eq!(api.get("/v1/pauses").await.1["data"], json!([]));
    assert_eq!(db.count("select count(*) from pauses").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_companys_limits_hold_over_all_workers() {
    let db = Db::new().await;
    let api = db.api().await;
    let witness = Witness::start(&[]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let other = db.company(&["a"], "claude", json!({})).await;
    let call = format!(
        "name: c\nsteps: [{{id: a, action: http.request, params: {{method: POST, url: '{}'}}}}]\n",
        witness.url
    );
    let limit = json!({"company_id": company, "max_concurrency": 3});
    for (path, body, status) in [
        ("/v1/queues/stepz/limits", limit.clone(), 404),
        ("/v1/queues/steps/limits", json!({"company_id": "co_x", "max_concurrency": 3}), 404),
        ("/v1/queues/steps/limits", json!({"company_id": company, "max_concurrency": 0}), 400),
        ("/v1/queues/steps/limits", json!({"company_id": company, "rate_limit": -1}), 400),
        ("/v1/queues/steps/limits", limit, 200),
    ] {
        let (told, answer) = api.post(path, body).await;
        assert_eq!(told, status, "{path}: {answer}");
    }
    let (_, list) = api.get("/v1/queues/steps/limits").await;
    assert_eq!(list["data"], json!([{"company_id": company, "max_concurrency": 3, "rate_limit": null}]));
    witness.hold(true);
    let _workers = [db.worker(SHORT_LEASE), db.worker(SHORT_LEASE), db.worker(SHORT_LEASE)];
    let (playbook, free) = (db.playbook(company, &call).await, db.playbook(other, &call).await);
    let mut runs = Vec::new();
    for _ in 0..12 {
        runs.push(db.start(company, playbook, json!({})).await);
    }
    for _ in 0..5 {
        db.start(other, free, json!({})).await;
    }
    // Three of the one, all of the other; nobody ever sees a fourth.
    eventually("eight calls", || async { witness.held_calls() == 8 }).await;
    for _ in 0..20 {
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        assert_eq!(witness.held_calls(), 8);
    }
    witness.hold(false);
    for run in runs {
        db.until(company, run, RunStatus::Completed).await;
    }
    api.post("/v1/queues/steps/limits", json!({"company_id": company})).await;
    assert_eq!(api.get("/v1/queues/steps/limits").await.1["data"], json!([]));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_over_goes_in_time_and_what_is_not_stays_whatever_its_age() {
    let db = Db::new().await;
    let api = db.api().await;
    let worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, STEP).await;
    let waiting = db.playbook(company, "name: w\nsteps:\n  - {wait_for: {event: go, timeout: 400d}}\n").await;
    let failing =
        db.playbook(company, "name: f\nsteps:\n  - {id: a, action: transform, params: {n: '${inputs.n / 0}'}}\n").await;
    let (old, young) = (db.start(company, playbook, json!({})).await, db.start(company, playbook, json!({})).await);
    let asleep = db.start(company, waiting, json!({})).await;
    let failed = db.start(company, failing, json!({"n": 1})).await;
    for run in [old, young] {
        db.until(company, run, RunStatus::Completed).await;
    }
    db.until(company, asleep, RunStatus::Suspended).await;
    db.until(company, failed, RunStatus::Failed).await;
    worker.stop().await;
    let (_, kept) = api.get("/v1/retention").await;
    assert_eq!((&kept["data"]["runs"], &kept["data"]["failed_runs"]), (&json!(30), &json!(90)), "{kept}");
    for (field, wrong) in [("runs", 2), ("activity", 0), ("deliveries", -1), ("failed_runs", 40_000)] {
        let (status, answer) = api.send("PATCH", "/v1/retention", Some(json!({field: wrong}))).await;
        assert_eq!((status, answer["error"]["fields"][0]["field"].as_str()), (400, Some(field)), "{answer}");
    }
    assert_eq!(api.get("/v1/retention").await.1["data"], kept["data"], "nothing changed");
    assert_eq!(api.send("PATCH", "/v1/retention", Some(json!({"runs": 10}))).await.0, 200);
    // All but one are as if they had been there for forty days: their ids are their times.
    let past = (chrono::Utc::now() - chrono::Duration::days(40)).timestamp_millis() as u128;
    let aged = |id: uuid::Uuid| uuid::Uuid::from_u128((past << 80) | (id.as_u128() & ((1 << 80) - 1)));
    for run in [old, asleep, failed] {
        for (table, column) in [
            ("runs", "id"),
            ("run_steps", "run_id"),
            ("events", "run_id"),
            ("waits", "run_id"),
            ("jobs", "ref_id"),
            ("dead_letters", "ref_id"),
        ] {
            let sql = format!(
                "set session_replication_role = replica;
                 update {table} set {column} = '{}' where {column} = '{}'; reset session_replication_role",
                aged(run.0),
                run.0
            );
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&db.pool).await.unwrap();
        }
    }
    let statuses = async || -> Vec<String> {
        sqlx::query_scalar("select status from runs order by status, id").fetch_all(&db.pool).await.unwrap()
    };
    let ended = format!(
        "set session_replication_role = replica; update runs set ended_at = now() - interval '40 days'
         where id <> '{}' and ended_at is not null; reset session_replication_role",
        young.0
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(ended)).execute(&db.pool).await.unwrap();
    assert_eq!(statuses().await, ["completed", "completed", "failed", "suspended"]);
    upkeep::all(&db.engine).await.unwrap();
    assert_eq!(statuses().await, ["completed", "failed", "suspended"], "the old one is gone, with all that is its");
    let orphans = "select (select count(*) from run_steps s where not exists (select from runs r where r.id = s.run_id))
        + (select count(*) from events e where e.run_id is not null and not exists (select from runs r where r.id = e.run_id))";
    assert_eq!(db.count(orphans).await, 0);
    assert_eq!(db.count("select count(*) from waits").await, 1, "who waits goes on waiting");
    // A failed one is kept for longer.
    api.send("PATCH", "/v1/retention", Some(json!({"failed_runs": 30}))).await;
    upkeep::all(&db.engine).await.unwrap();
    assert_eq!(statuses().await, ["completed", "suspended"]);
    assert_eq!(db.count("select count(*) from dead_letters").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_part_of_the_upkeep_that_fails_holds_up_no_other_and_says_so() {
    let db = Db::new().await;
    let worker = db.worker(SHORT_LEASE);
    eventually("the parts to be known", || async {
        db.count("select count(*) from upkeep where done_at is not null").await >= 10
    })
    .await;
    worker.stop().await;
    sqlx::raw_sql("alter table hook_calls rename to hook_calls_gone; update upkeep set due_at = now(), done_at = null")
        .execute(&db.pool)
        .await
        .unwrap();
    assert_eq!(upkeep::round(&db.engine).await.unwrap(), 1, "one part");
    assert_eq!(db.count("select count(*) from upkeep where error like '%hook_calls%' and part = 'prune'").await, 1);
    assert_eq!(db.count("select count(*) from upkeep where done_at is null").await, 1, "all others are done");
    // Each part is one worker's at a time: nothing is due any more.
    assert_eq!(upkeep::round(&db.engine).await.unwrap(), 0);
    sqlx::raw_sql("alter table hook_calls_gone rename to hook_calls; update upkeep set due_at = now()")
        .execute(&db.pool)
        .await
        .unwrap();
    upkeep::round(&db.engine).await.unwrap();
    assert_eq!(db.count("select count(*) from upkeep where error is not null").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn queues_tell_their_rates_and_workers_what_they_run() {
    let db = Db::new().await;
    let api = db.api().await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let call = format!(
        "name: c\nsteps: [{{id: a, action: http.request, params: {{method: POST, url: '{}'}}}}]\n",
        witness.url
    );
    let playbook = db.playbook(company, &call).await;
    let run = db.start(company, playbook, json!({})).await;
    eventually("the call", || async { witness.held_calls() == 1 }).await;
    eventually("the worker's step", || async {
        api.get("/v1/workers").await.1["data"][0]["running"] == json!({"step": 1})
    })
    .await;
    let worker: Value = api.get("/v1/workers").await.1["data"][0].clone();
    let path = format!("/v1/jobs?worker_id={}", worker["id"].as_str().unwrap());
    assert_eq!(api.get(&path).await.1["data"][0]["run_id"], json!(run));
    assert_eq!(api.get("/v1/jobs?worker_id=x").await.0, 404);
    witness.hold(false);
    db.until(company, run, RunStatus::Completed).await;
    eventually("a count", || async {
        db.count("select count(*) from queue_counts where queue = 'steps' and done > 0").await == 1
    })
    .await;
    sqlx::query("update queue_counts set minute = minute - interval '1 minute', done = 600")
        .execute(&db.pool)
        .await
        .unwrap();
    let (_, queues) = api.get("/v1/queues").await;
    let steps = queues["data"].as_array().unwrap().iter().find(|queue| queue["name"] == "steps").unwrap();
    assert_eq!((steps["rate_5m"].as_f64(), steps["rate_1h"].as_f64()), (Some(2.0), Some(0.167)), "{steps}");
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_less_urgent_has_its_turn_by_age() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let insert = "insert into jobs (queue, kind, company_id, priority, state, due_at)
                  select 'bench', 'noop', $1, p, 'ready', now() - interval '2 minutes' from unnest($2::smallint[]) p";
    sqlx::query(insert).bind(company.0).bind(vec![-1i16, 0, 1, 2]).execute(&db.pool).await.unwrap();
    sqlx::query(insert).bind(company.0).bind(vec![2i16]).execute(&db.pool).await.unwrap();
    sqlx::query("update jobs set due_at = now() where id = (select max(id) from jobs)")
        .execute(&db.pool)
        .await
        .unwrap();
    let priorities = async || -> Vec<i16> {
        sqlx::query_scalar("select priority from jobs where queue = 'bench' order by id")
            .fetch_all(&db.pool)
            .await
            .unwrap()
    };
    upkeep::all(&db.engine).await.unwrap();
    assert_eq!(priorities().await, [-1, -1, 0, 1, 2], "a step each; who has just come waits");
    upkeep::all(&db.engine).await.unwrap();
    assert_eq!(priorities().await, [-1, -1, -1, 0, 2]);

    let api = db.api().await;
    let playbook = db.playbook(company, STEP).await;
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/run");
    for priority in ["low", "normal", "high"] {
        assert_eq!(api.post(&path, json!({"priority": priority})).await.0, 201);
    }
    let (status, wrong) = api.post(&path, json!({"priority": "urgent"})).await;
    assert_eq!((status, &wrong["error"]["fields"][0]["field"]), (400, &json!("priority")), "{wrong}");
    let of_runs: Vec<i16> = sqlx::query_scalar("select priority from jobs where kind = 'step' order by id")
        .fetch_all(&db.pool)
        .await
        .unwrap();
    assert_eq!(of_runs, [1, 0, -1]);
}

/// The names of metrics in a text.
fn metrics_in(text: &str) -> std::collections::BTreeSet<String> {
    let parts = text.split(|c: char| !(c.is_ascii_lowercase() || c.is_ascii_digit() || c == '_'));
    parts.filter(|part| part.starts_with("capx_") && part.len() > 8).map(str::to_owned).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn every_metric_is_documented_and_the_fleets_gauges_are_read() {
    let root = std::path::Path::new(env!("CARGO_MANIFEST_DIR"));
    let (mut waiting, mut code) = (vec![root.join("src"), root.join("workers/src")], String::new());
    while let Some(directory) = waiting.pop() {
        for entry in std::fs::read_dir(directory).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                waiting.push(path);
            } else {
                let text = std::fs::read_to_string(&path).unwrap();
                let quoted =
                    |line: &str| line.split('"').skip(1).step_by(2).map(str::to_owned).collect::<Vec<_>>().join(" ");
                let lines = text.lines().filter(|line| line.contains("metrics::") || line.contains("of(\"capx_"));
                code.extend(lines.map(quoted).flat_map(|names| [names, " ".to_owned()]));
            }
        }
    }
    let page = metrics_in(&std::fs::read_to_string(root.join("docs/operations.md")).unwrap());
    assert!(!page.is_empty());
    assert_eq!(metrics_in(&code), page);
    let alerts = metrics_in(&std::fs::read_to_string(root.join("docs/alerts.yml")).unwrap());
    assert!(alerts.len() > 5 && alerts.is_subset(&page), "{alerts:?}");

    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, STEP).await;
    db.start(company, playbook, json!({})).await;
    // Whoever has it: vacuum and streams wait for it.
    let mut held = db.pool.begin().await.unwrap();
    sqlx::query("set transaction isolation level repeatable read").execute(&mut *held).await.unwrap();
    sqlx::query("select count(*) from runs").execute(&mut *held).await.unwrap();
    eventually("the oldest transaction to be seen", || async {
        capx_core::store::fleet::gauges(&db.engine.pool).await.unwrap().oldest_snapshot_s > 0.05
    })
    .await;
    held.rollback().await.unwrap();
    // Read at most every five seconds, for all who scrape this process.
    eventually("the gauges", || async {
        let text = api.client.get(format!("{}/metrics", api.base)).send().await.unwrap().text().await.unwrap();
        ["capx_queue_ready{queue=\"steps\"} 1", "capx_fleet_workers 0", "capx_dead_letters 0", "capx_upkeep_failing 0"]
            .iter()
            .all(|line| text.contains(line))
    })
    .await;
}
