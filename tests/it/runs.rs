//! Runs: what their steps do, how they fail, and that what is done stays
//! done.

use std::time::Duration;

use axum::routing::any;
use capx_core::domain::run::{RunEvent, RunStatus, next};
use capx_core::store::{events, runs};
use serde_json::json;

use crate::harness::witness::Witness;
use crate::harness::{Db, SHORT_LEASE, eventually};

const WEEKLY: &str = include_str!("../../playbooks/weekly-market-report.yml");
const HELLO: &str = include_str!("../../playbooks/hello.yml");

#[tokio::test(flavor = "multi_thread")]
async fn the_weekly_market_report_runs_as_it_is_written() {
    let db = Db::new().await;
    let company = db.company(&["researcher", "writer"], "claude", json!({})).await;
    let playbook = db.playbook(company, WEEKLY).await;
    let worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({"topic": "AI infrastructure", "depth": "deep"})).await;
    db.until(company, run, RunStatus::Completed).await;
    let steps = runs::steps(&db.pool, company, run).await.unwrap();
    assert_eq!(steps.len(), 2);
    for step in &steps {
        assert_eq!(step.status, "completed");
        assert!(step.agent.is_some());
        assert_eq!(step.output.as_ref().unwrap()["simulated"], true);
    }
    // A run's parameters override those of the step.
    assert_eq!(steps[0].output.as_ref().unwrap()["params"], json!({"depth": "deep", "topic": "AI infrastructure"}));
    let names: Vec<String> =
        events::of_run(&db.pool, company, run, 0, 100).await.unwrap().into_iter().map(|e| e.event).collect();
    assert_eq!(
        names,
        ["playbook.started", "step.completed", "step.completed", "rubric.evaluated", "playbook.completed"]
    );
    assert_eq!(db.count("select count(*) from jobs where queue = 'steps'").await, 0);
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn data_flows_between_steps_into_a_file_and_the_output() {
    let db = Db::new().await;
    let company = db.company(&["researcher"], "claude", json!({"script": {"research": {"text": "tides turn"}}})).await;
    let playbook = db.playbook(company, HELLO).await;
    let _worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({"topic": "tides"})).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    let output = row.output.unwrap();
    assert_eq!(output["path"], "summary.json");
    let file = db.files.join(company.to_string()).join(run.to_string()).join("summary.json");
    let written: serde_json::Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    assert_eq!(written, json!({"said": "tides turn", "title": "About tides"}));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_put_into_a_url_leads_nowhere_else() {
    let db = Db::new().await;
    let witness = Witness::start(&[]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = format!(
        "name: x\ninputs: {{name: string}}\nsteps:\n  \
         - {{id: a, action: http.request, params: {{url: '{0}/users/${{inputs.name}}/mail'}}, on_failure: continue, \
         compensate: {{action: http.request, params: {{url: '{0}/undo/${{inputs.name}}'}}}}}}\n  \
         - {{id: b, action: file.read, params: {{path: none}}}}\n",
        witness.url
    );
    let playbook = db.playbook(company, &yaml).await;
    let _worker = db.worker(SHORT_LEASE);
    for name in ["../admin?x=1#", "..", "ü b"] {
        let run = db.start(company, playbook, json!({"name": name})).await;
        db.until(company, run, RunStatus::Failed).await;
    }
    let mut paths = witness.paths();
    paths.sort_unstable();
    let (one, two) = ("..%2Fadmin%3Fx%3D1%23", "%C3%BC%20b");
    let users = [format!("/users/{two}/mail"), format!("/users/{one}/mail")];
    assert_eq!(paths, [format!("/undo/{two}"), format!("/undo/{one}"), users[0].clone(), users[1].clone()]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_is_repeated_with_the_same_key_until_it_works() {
    let db = Db::new().await;
    let witness = Witness::start(&[503, 500]).await;
    let company = db.company(&["caller"], "custom", json!({"endpoint": witness.url})).await;
    let yaml = format!(
        "name: calls\nsteps:\n  - {{id: tool, action: http.request, params: {{method: POST, url: '{0}/a', body: {{n: 1}}, headers: {{Idempotency-Key: mine}}}}, retry: {{max_attempts: 3, initial: 20ms}}}}\n  - {{id: agent, role: caller, action: think}}\n",
        witness.url
    );
    let playbook = db.playbook(company, &yaml).await;
    let _worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    let mut counts: Vec<u32> = witness.calls().into_values().collect();
    counts.sort_unstable();
    assert_eq!(counts, [1, 3], "two effects, one of them tried three times: {:?}", witness.calls());
    assert!(!witness.calls().contains_key("mine") && !witness.calls().contains_key("none"));
    assert_eq!(row.cost.to_usd(), 0.25);
    let steps = runs::steps(&db.pool, company, run).await.unwrap();
    assert_eq!(steps[0].attempt, 3);
    assert_eq!(steps[0].output.as_ref().unwrap()["body"]["output"]["ok"], true);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_step_out_of_tries_fails_its_run_with_the_reason() {
    let db = Db::new().await;
    let witness = Witness::start(&[500; 10]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let _worker = db.worker(SHORT_LEASE);
    let cases = [
        (
            format!(
                "{{action: http.request, params: {{url: '{}'}}, retry: {{max_attempts: 2, initial: 10ms}}}}",
                witness.url
            ),
            "transient",
            "exhausted",
            2,
        ),
        ("{action: http.request, params: {url: 'http://169.254.169.254/'}}".into(), "governance", "invalid", 1),
        ("{action: file.read, params: {path: ../../etc/passwd}}".into(), "invalid", "invalid", 1),
        ("{action: transform, params: {v: '${inputs.nothing}'}}".into(), "invalid", "invalid", 1),
        ("{role: nobody, action: dance}".into(), "invalid", "invalid", 1),
    ];
    for (at, (step, class, reason, attempts)) in cases.iter().enumerate() {
        let playbook =
            db.playbook(company, &format!("name: fails-{at}\nsteps:\n  - {step}\n  - {{action: transform}}\n")).await;
        let run = db.start(company, playbook, json!({})).await;
        let row = db.until(company, run, RunStatus::Failed).await;
        let error = row.error.unwrap();
        assert_eq!(error["code"], *class, "{error}");
        assert!(!error["message"].as_str().unwrap().is_empty());
        let steps = runs::steps(&db.pool, company, run).await.unwrap();
        assert_eq!((steps.len(), steps[0].attempt), (1, *attempts), "{error}");
        let letter: (String,) = sqlx::query_as("select reason from dead_letters where ref_id = $1")
            .bind(run.0)
            .fetch_one(&db.pool)
            .await
            .unwrap();
        assert_eq!(letter.0, *reason);
    }
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_stored_fails_the_step_and_never_sticks() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    // What comes from outside: an endpoint's answers, to an agent's call and to
    // a tool's.
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    let json = [("content-type", "application/json")];
    let router = axum::Router::new()
        .route("/dear", any(move || async move { (json, r#"{"output": 1, "cost": 9000000000}"#) }))
        .route("/nul", any(move || async move { (json, r#"{"output": {"text": "a\u0000b"}}"#) }))
        .route(
            "/huge",
            any(move || async move { (json, format!(r#"{{"output": "{}"}}"#, "x".repeat(10 * 1024 * 1024))) }),
        )
        .route(
            "/deep",
            any(move || async move { (json, format!(r#"{{"output": {}1{}}}"#, "[".repeat(100), "]".repeat(100))) }),
        );
    tokio::spawn(async move { axum::serve(listener, router).await });
    for (path, says) in [("nul", "NUL"), ("huge", "larger than"), ("deep", "deeper than")] {
        let company = db.company(&["n"], "custom", json!({"endpoint": format!("{url}/{path}")})).await;
        for step in
            ["role: n, action: say".to_owned(), format!("action: http.request, params: {{url: '{url}/{path}'}}")]
        {
            let name = format!("{path}-{}", step.len());
            let playbook = db.playbook(company, &format!("name: {name}\nsteps:\n  - {{{step}}}\n")).await;
            let run = db.start(company, playbook, json!({})).await;
            if step.contains("http.request") {
                // What a tool is answered becomes an artifact, or text.
                db.until(company, run, RunStatus::Completed).await;
                continue;
            }
            let row = db.until(company, run, RunStatus::Failed).await;
            let message = row.error.unwrap()["message"].as_str().unwrap().to_owned();
            assert!(message.contains(says), "{path}, {step}: {message}");
        }
    }
    // More than money can be.
    let company = db.company(&["n"], "custom", json!({"endpoint": format!("{url}/dear")})).await;
    let playbook = db.playbook(company, "name: dear\nsteps:\n  - {role: n, action: say}\n").await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Failed).await;
    assert!(row.error.unwrap()["message"].as_str().unwrap().contains("is no amount from 0 to 10000 USD"));
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_attempt_ends_at_its_timeout_and_a_long_one_is_seen() {
    let db = Db::new().await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // Accepts, and never answers.
    tokio::spawn(async move {
        let mut open = Vec::new();
        while let Ok(stream) = listener.accept().await {
            open.push(stream);
        }
    });
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db
        .playbook(
            company,
            &format!(
                "name: slow\nsteps:\n  - {{action: http.request, params: {{url: '{url}'}}, timeout: 900ms, retry: 1}}\n"
            ),
        )
        .await;
    let _worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, json!({})).await;
    eventually("the step to be shown as running", || async {
        runs::steps(&db.pool, company, run).await.unwrap().first().is_some_and(|s| s.status == "running")
    })
    .await;
    let row = db.until(company, run, RunStatus::Failed).await;
    assert_eq!(row.error.unwrap()["code"], "timeout");
    let names: Vec<String> =
        events::of_run(&db.pool, company, run, 0, 100).await.unwrap().into_iter().map(|e| e.event).collect();
    assert_eq!(names, ["playbook.started", "step.started", "step.failed", "playbook.failed"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn workers_that_come_and_go_in_order_repeat_and_charge_nothing() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let steps: String = (0..40).map(|i| format!("  - {{id: s{i}, action: transform, params: {{i: {i}}}}}\n")).collect();
    let playbook = db.playbook(company, &format!("name: many\nsteps:\n{steps}")).await;
    let mut runs_started = Vec::new();
    for _ in 0..20 {
        runs_started.push(db.start(company, playbook, json!({})).await);
    }
    // Workers that come and go while the runs are under way.
    for _ in 0..5 {
        let worker = db.worker(SHORT_LEASE);
        tokio::time::sleep(std::time::Duration::from_millis(30)).await;
        worker.stop().await;
        assert_eq!(db.count("select count(*) from jobs where state = 'running'").await, 0);
    }
    let _worker = db.worker(SHORT_LEASE);
    for run in runs_started {
        db.until(company, run, RunStatus::Completed).await;
    }
    // Nothing ran twice: each step has one completion, at its first try.
    assert_eq!(db.count("select count(*) from events where event = 'step.completed'").await, 800);
    assert_eq!(db.count("select count(*) from run_steps where attempt <> 1").await, 0);
}

/// The trigger refuses exactly what the table does not allow.
#[tokio::test(flavor = "multi_thread")]
async fn the_database_knows_the_same_transitions() {
    let db = Db::new().await;
    for from in RunStatus::ALL {
        for to in RunStatus::ALL {
            let allowed = (from == to && !from.is_terminal())
                || RunEvent::ALL.iter().any(|event| next(*from, *event) == Some(*to));
            let run = uuid::Uuid::now_v7();
            sqlx::query(
                "insert into runs (company_id, id, playbook_id, version_id, job_id, status, trigger, params, waiting_on, ended_at)
                 values ($1, $1, $1, $1, 1, $2, 'manual', '{}', case when $2 = 'suspended' then '[]'::jsonb end,
                         case when $3 then now() end)",
            )
            .bind(run)
            .bind(from.as_str())
            .bind(from.is_terminal())
            .execute(&db.pool)
            .await
            .unwrap();
            let changed = sqlx::query(
                "update runs set status = $2, waiting_on = case when $2 = 'suspended' then '[]'::jsonb end,
                     ended_at = case when $3 then now() end
                 where id = $1",
            )
            .bind(run)
            .bind(to.as_str())
            .bind(to.is_terminal())
            .execute(&db.pool)
            .await;
            assert_eq!(changed.is_ok(), allowed, "{from:?} -> {to:?}: {changed:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_may_be_slow_but_not_silent() {
    use axum::body::{Body, Bytes};
    let db = Db::new().await;
    let company = db.company(&["n"], "claude", json!({})).await;
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    // A piece each 100 ms, of 40; or one, and then nothing for ever.
    let pieces = |count: usize, forever: bool| {
        let (sender, receiver) = tokio::sync::mpsc::channel::<Result<Bytes, std::io::Error>>(1);
        tokio::spawn(async move {
            for _ in 0..count {
                let _ = sender.send(Ok(Bytes::from_static(b"piece "))).await;
                tokio::time::sleep(Duration::from_millis(100)).await;
            }
            if forever {
                std::future::pending::<()>().await;
            }
        });
        let stream =
            futures_util::stream::unfold(receiver, |mut receiver| async { Some((receiver.recv().await?, receiver)) });
        Body::from_stream(stream)
    };
    let router = axum::Router::new()
        .route("/slow", any(move || async move { pieces(40, false) }))
        .route("/silent", any(move || async move { pieces(1, true) }));
    tokio::spawn(async move { axum::serve(listener, router).await });
    let _worker = db.worker(SHORT_LEASE);
    let step = |path: &str| {
        format!(
            "name: {path}\nsteps:\n  - {{action: http.request, params: {{url: '{url}/{path}'}}, timeout: {{idle: 2s}}, retry: 1}}\n"
        )
    };
    let silent = db.playbook(company, &step("silent")).await;
    let run = db.start(company, silent, json!({})).await;
    let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
    assert_eq!(error["code"], json!("timeout"));
    assert_eq!(error["message"], json!("nothing came for 2s, the limit of `timeout.idle`"));
    let slow = db.playbook(company, &step("slow")).await;
    let run = db.start(company, slow, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
}
