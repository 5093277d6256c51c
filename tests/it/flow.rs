//! Control flow: conditions, loops, pauses, failures that are gone past; each
//! durable, each step's effect once a round.

use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::store::runs;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

async fn shown(api: &Api, company: CompanyId, playbook: PlaybookId, run: RunId) -> Value {
    api.get(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}")).await.1["data"].clone()
}

fn statuses(run: &Value) -> Vec<&str> {
    run["steps"].as_array().unwrap().iter().map(|step| step["status"].as_str().unwrap()).collect()
}

/// Calls outside, round after round, until the count is high enough.
fn looping(witness: &Witness, rounds: u32) -> String {
    format!(
        "name: loop
steps:
  - {{id: count, action: transform, params: {{n: '${{(steps.count.n ?? 0) + 1}}'}}}}
  - {{id: call, action: http.request, params: {{method: POST, url: '{}/x', body: {{n: '${{steps.count.n}}'}}}}, retry: {{max_attempts: 5, initial: 20ms}}}}
  - {{id: odd, action: transform, if: 'steps.count.n % 2 == 1', params: {{n: '${{steps.count.n}}'}}}}
  - {{if: 'steps.count.n < {rounds}', goto: count, max_retries: 50}}
output: '${{steps.count.n}}'
",
        witness.url
    )
}

#[tokio::test(flavor = "multi_thread")]
async fn a_loop_takes_each_round_once_and_ends() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let playbook = db.playbook(company, &looping(&witness, 4)).await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!(4)));
    // Each round's call has a key of its own, and was made once.
    let calls = witness.calls();
    assert_eq!((calls.len(), calls.values().sum::<u32>()), (4, 4), "{calls:?}");
    let run = shown(&api, company, playbook, run).await;
    assert_eq!(statuses(&run), ["completed", "completed", "skipped", "completed"], "the last round was even");
    assert_eq!((&run["steps"][3]["attempts"], &run["steps"][2]["output"]), (&json!(3), &Value::Null));
    assert_eq!(
        db.count("select count(*) from events where event = 'step.completed' and data ->> 'step' = 'call'").await,
        4
    );
    db.assert_nothing_stranded().await;
}

/// A worker dies at every point of its way, in the middle of a loop.
#[tokio::test(flavor = "multi_thread")]
async fn a_loop_goes_on_where_its_worker_died() {
    let db = Db::new().await;
    let points = [
        ("commit.before", 4),
        ("commit.after", 4),
        ("attempt.before_handler", 4),
        ("attempt.after_handler", 4),
        ("load.before", 1),
    ];
    for (point, hit) in points {
        let witness = Witness::start(&[]).await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, &looping(&witness, 3)).await;
        let run = db.start(company, playbook, json!({})).await;
        // In the second round, but for what comes once a claim.
        Process::worker(&db, &format!("{point}=kill@{hit}")).dies_at(point).await;
        let worker = db.worker(SHORT_LEASE);
        let row = db.until(company, run, RunStatus::Completed).await;
        assert_eq!(row.output, Some(json!(3)), "{point}");
        assert_eq!(witness.calls().len(), 3, "{point}: one key a round: {:?}", witness.calls());
        worker.stop().await;
    }
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_pause_holds_nothing_and_ends_by_itself() {
    let db = Db::new().await;
    let api = db.api().await;
    let worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: nap\ninputs: {for: string}\nsteps:\n  - {id: a, action: transform}\n  - {id: nap, sleep: '${inputs.for}'}\n  - {id: b, action: transform}\n";
    let playbook = db.playbook(company, yaml).await;
    let long = db.start(company, playbook, json!({"for": "365d"})).await;
    let short = db.start(company, playbook, json!({"for": "50ms"})).await;
    db.until(company, short, RunStatus::Completed).await;
    db.until(company, long, RunStatus::Suspended).await;
    let told = shown(&api, company, playbook, long).await;
    let waiting = &told["waiting_on"][0];
    assert_eq!((&waiting["type"], &waiting["id"]), (&json!("timer"), &json!("nap")), "{told}");
    let year: String = waiting["expires_at"].as_str().unwrap().chars().take(4).collect();
    let now: String = waiting["since"].as_str().unwrap().chars().take(4).collect();
    assert_eq!(year.parse::<i32>().unwrap(), now.parse::<i32>().unwrap() + 1);
    assert_eq!(statuses(&told), ["completed", "waiting", "pending"]);
    let job = runs::job(&db.pool, company, long).await.unwrap().unwrap();
    assert_eq!((job.kind.as_str(), job.state.as_str()), ("timer", "scheduled"));
    assert_eq!(db.count("select count(*) from jobs where state = 'running'").await, 0);
    // Its time comes; while its company is paused nothing goes on.
    let path = format!("/v1/companies/{company}");
    assert_eq!(api.post(&format!("{path}/pause"), json!({})).await.0, 200);
    sqlx::raw_sql("update jobs set due_at = now() where queue = 'steps'").execute(&db.pool).await.unwrap();
    eventually("the job to be parked", || async {
        db.count("select count(*) from jobs where due_at = 'infinity'").await == 1
    })
    .await;
    assert_eq!(db.run(company, long).await.status, RunStatus::Suspended);
    assert_eq!(api.post(&format!("{path}/resume"), json!({})).await.0, 200);
    db.until(company, long, RunStatus::Completed).await;
    let told: Vec<String> = sqlx::query_scalar("select event from events where run_id = $1 order by seq")
        .bind(long.0)
        .fetch_all(&db.pool)
        .await
        .unwrap();
    let wanted = [
        "playbook.started",
        "step.completed",
        "playbook.resumed",
        "step.completed",
        "step.completed",
        "playbook.completed",
    ];
    assert_eq!(told, wanted);
    // One that is cancelled leaves no timer behind; a first step may be a pause.
    let first = "name: first\nsteps: [{id: nap, sleep: 1h}]\n";
    let playbook = db.playbook(company, first).await;
    let run = db.start(company, playbook, json!({})).await;
    assert_eq!(db.run(company, run).await.status, RunStatus::Suspended);
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/cancel");
    assert_eq!(api.post(&path, json!({})).await.1["data"]["status"], "cancelled");
    assert_eq!(db.count("select count(*) from jobs where queue = 'steps'").await, 0);
    worker.stop().await;
    db.assert_nothing_stranded().await;
}

/// The worker that a pause has woken dies at once, at each of its points.
#[tokio::test(flavor = "multi_thread")]
async fn a_pause_that_is_over_stays_over() {
    let db = Db::new().await;
    for point in ["load.before", "attempt.before_handler", "commit.before", "commit.after"] {
        let company = db.company(&["a"], "claude", json!({})).await;
        let yaml = "name: nap\nsteps: [{id: nap, sleep: 40ms}, {id: b, action: transform}]\n";
        let playbook = db.playbook(company, yaml).await;
        let run = db.start(company, playbook, json!({})).await;
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let worker = db.worker(SHORT_LEASE);
        db.until(company, run, RunStatus::Completed).await;
        let naps = "select count(*) from events where event = 'step.completed' and data ->> 'step' = 'nap'";
        assert_eq!(
            db.count(naps).await,
            db.count("select count(*) from runs where status = 'completed'").await,
            "{point}"
        );
        worker.stop().await;
    }
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_failure_is_gone_past_where_the_playbook_says_so() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: f
steps:
  - {id: read, action: file.read, params: {path: none}, on_failure: continue}
  - {id: sorry, action: transform, if: steps.read.error, params: {why: '${steps.read.error.message}'}}
  - {id: again, action: file.read, params: {path: none}, on_failure: mop}
  - {id: never, action: transform}
  - {id: mop, action: transform, params: {why: '${steps.again.error.code}'}}
output: '${steps.sorry.why}, ${steps.mop.why}'
";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!("there is no file `none` in the run's workspace, invalid")));
    let told = shown(&api, company, playbook, run).await;
    assert_eq!(statuses(&told), ["failed", "completed", "failed", "skipped", "completed"]);
    assert!(told["error"].is_null() && told["steps"][0]["error"]["message"].is_string());
    assert_eq!(db.count("select count(*) from dead_letters").await, 0);
    // What happened is told with the step: that the run goes on, and past what.
    let past: Value =
        sqlx::query_scalar("select data from events where event = 'step.failed' and data ->> 'step' = 'again'")
            .fetch_one(&db.pool)
            .await
            .unwrap();
    assert_eq!((&past["goes_on"], &past["passed"]), (&json!(true), &json!([{"skipped": "never"}])));

    // A run that is left nothing to do ends well; one whose condition gives no
    // value fails and says so.
    let playbook = db
        .playbook(company, "name: n\ninputs: {n: any}\nsteps: [{id: a, action: transform, if: inputs.n > 3}]\n")
        .await;
    let run = db.start(company, playbook, json!({"n": 1})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(statuses(&shown(&api, company, playbook, run).await), ["skipped"]);
    let run = db.start(company, playbook, json!({"n": "x"})).await;
    let row = db.until(company, run, RunStatus::Failed).await;
    assert!(row.error.unwrap()["message"].as_str().unwrap().contains("if: text cannot be compared"));
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_gate_inside_a_loop_is_asked_for_each_time() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: g\nsteps:\n  - {id: n, action: transform, params: {n: '${(steps.n.n ?? 0) + 1}'}}\n  - {id: ask, action: transform, approval: required, params: {n: '${steps.n.n}'}}\n  - {goto: n, if: steps.n.n < 3, max_retries: 5}\n";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    for n in 1..=3 {
        eventually("the gate", || async {
            let (_, list) = api.get("/v1/approvals?status=pending").await;
            list["data"][0]["context"]["params"]["n"] == n
        })
        .await;
        let (_, list) = api.get("/v1/approvals?status=pending").await;
        let id = list["data"][0]["id"].as_str().unwrap();
        assert_eq!(api.post(&format!("/v1/approvals/{id}/approve"), json!({})).await.0, 200);
    }
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(db.count("select count(*) from approvals where status = 'approved'").await, 3);
    db.assert_nothing_stranded().await;
}

const PAID: &str = "name: paid
inputs: {order: integer}
steps:
  - {id: a, action: transform}
  - {id: wait, wait_for: {event: 'payment.received', match: {order: '${inputs.order}'}, timeout: 1h}}
  - {id: b, action: transform, params: {by: '${steps.wait.by}'}}
output: '${steps.b.by}'
";

#[tokio::test(flavor = "multi_thread")]
async fn an_event_wakes_whoever_waits_for_it() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, PAID).await;
    let mut waiting = Vec::new();
    for order in [1, 1, 2] {
        let run = db.start(company, playbook, json!({"order": order})).await;
        db.until(company, run, RunStatus::Suspended).await;
        waiting.push(run);
    }
    let told = shown(&api, company, playbook, waiting[0]).await;
    let on = &told["waiting_on"][0];
    assert_eq!((&on["type"], &on["id"]), (&json!("event"), &json!("payment.received")), "{told}");
    assert!(on["since"].is_string() && on["expires_at"].is_string());
    assert_eq!(statuses(&told), ["completed", "waiting", "pending"]);

    // Another name and other data wake nobody.
    let events = format!("/v1/companies/{company}/events");
    for body in [
        json!({"name": "payment.sent", "data": {"order": 1}}),
        json!({"name": "payment.received", "data": {"order": 3}}),
    ] {
        assert_eq!(api.post(&events, body).await.0, 201);
    }
    let body = json!({"name": "payment.received", "data": {"order": 1, "by": "card"}, "id": "pay-1"});
    let (status, first) = api.post(&events, body.clone()).await;
    assert_eq!(status, 201, "{first}");
    for run in &waiting[..2] {
        assert_eq!(db.until(company, *run, RunStatus::Completed).await.output, Some(json!("card")));
    }
    // The same again is the same, and wakes nobody who waits for another.
    let (status, again) = api.post(&events, body).await;
    assert_eq!((status, &again["data"]["id"]), (200, &first["data"]["id"]));
    assert_eq!(db.run(company, waiting[2]).await.status, RunStatus::Suspended);

    // An id stands for one event.
    assert_eq!(api.post(&events, json!({"name": "payment.sent", "id": "pay-1"})).await.0, 409);

    // To one run alone; one that has ended takes nothing.
    let path = |run: RunId| format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/events");
    let other = db.start(company, playbook, json!({"order": 2})).await;
    db.until(company, other, RunStatus::Suspended).await;
    let body = json!({"name": "payment.received", "data": {"order": 2, "by": "cash"}});
    assert_eq!(api.post(&path(waiting[2]), body.clone()).await.0, 201);
    assert_eq!(db.until(company, waiting[2], RunStatus::Completed).await.output, Some(json!("cash")));
    assert_eq!(api.post(&path(waiting[2]), body).await.0, 409);
    assert_eq!(db.run(company, other).await.status, RunStatus::Suspended);

    for (body, field) in [
        (json!({"name": "a b"}), "name"),
        (json!({"data": 1}), "name"),
        (json!({"name": "x", "id": ""}), "id"),
        (json!({"name": "x", "data": "y".repeat(300_000)}), "data"),
        (json!({"nam": "x"}), "nam"),
    ] {
        let (status, answer) = api.post(&events, body).await;
        assert_eq!((status, &answer["error"]["fields"][0]["field"]), (400, &json!(field)), "{answer}");
    }
    // Cancelled, it leaves nothing behind.
    let cancel = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{other}/cancel");
    assert_eq!(api.post(&cancel, json!({})).await.0, 200);
    assert_eq!(db.count("select count(*) from waits").await, 0);
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_that_came_just_before_counts_once() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml =
        "name: two\nsteps:\n  - {id: one, wait_for: ping}\n  - {id: two, wait_for: {event: ping, timeout: 300ms}}\n";
    let playbook = db.playbook(company, yaml).await;
    let events = format!("/v1/companies/{company}/events");
    // Before the run began it is nothing to it; after that, though nobody waits
    // yet, it is.
    assert_eq!(api.post(&events, json!({"name": "ping", "data": {"n": 1}})).await.0, 201);
    let run = db.start(company, playbook, json!({})).await;
    assert_eq!(api.post(&events, json!({"name": "ping", "data": [2]})).await.0, 201);
    let _worker = db.worker(SHORT_LEASE);
    // Once: the second wait runs out.
    let row = db.until(company, run, RunStatus::Failed).await;
    let error = row.error.unwrap();
    assert_eq!((&error["step"], &error["code"]), (&json!("two"), &json!("timeout")), "{error}");
    assert!(error["message"].as_str().unwrap().contains("no event `ping` came within 300ms"), "{error}");
    let steps = runs::steps(&db.pool, company, run).await.unwrap();
    assert_eq!(steps[0].output, Some(json!([2])), "what asks for nothing takes anything");
    // Retried, it waits again, and has another chance.
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}");
    assert_eq!(api.post(&format!("{path}/events"), json!({"name": "ping", "data": 1})).await.0, 409);
    assert_eq!(api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    assert_eq!(api.post(&format!("{path}/events"), json!({"name": "ping"})).await.0, 201);
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(db.count("select count(*) from waits").await, 0);
    db.assert_nothing_stranded().await;
}

/// Senders and runs that come to wait meet at every moment (hazard H12).
#[tokio::test(flavor = "multi_thread")]
async fn no_event_is_lost_between_sending_and_waiting() {
    let db = Db::new().await;
    let api = db.api().await;
    let _workers = [db.worker(SHORT_LEASE), db.worker(SHORT_LEASE)];
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: race\ninputs: {n: integer}\nsteps: [{id: a, action: transform}, {id: w, wait_for: {event: go, match: {n: '${inputs.n}'}, timeout: 20s}}]\n";
    let playbook = db.playbook(company, yaml).await;
    let events = format!("/v1/companies/{company}/events");
    let mut runs = Vec::new();
    for n in 0..120_u64 {
        let run = db.start(company, playbook, json!({"n": n})).await;
        runs.push(run);
        tokio::time::sleep(std::time::Duration::from_micros(n * 97 % 4_000)).await;
        assert_eq!(api.post(&events, json!({"name": "go", "data": {"n": n}})).await.0, 201);
    }
    for run in runs {
        db.until(company, run, RunStatus::Completed).await;
    }
    assert_eq!(db.count("select count(*) from signals_taken").await, 120);
    db.assert_nothing_stranded().await;
}

/// Whoever parks a run, or wakes it, dies at each of its points.
#[tokio::test(flavor = "multi_thread")]
async fn a_wait_survives_the_death_of_its_workers() {
    let db = Db::new().await;
    let api = db.api().await;
    for (point, hit) in [("commit.before", 2), ("commit.after", 2), ("load.before", 1), ("attempt.after_handler", 2)] {
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, PAID).await;
        let run = db.start(company, playbook, json!({"order": 1})).await;
        Process::worker(&db, &format!("{point}=kill@{hit}")).dies_at(point).await;
        let worker = db.worker(SHORT_LEASE);
        db.until(company, run, RunStatus::Suspended).await;
        worker.stop().await;
        let body = json!({"name": "payment.received", "data": {"order": 1, "by": point}});
        assert_eq!(api.post(&format!("/v1/companies/{company}/events"), body).await.0, 201);
        // It hands the event on, or takes up the run, and dies.
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let worker = db.worker(SHORT_LEASE);
        let row = db.until(company, run, RunStatus::Completed).await;
        assert_eq!(row.output, Some(json!(point)));
        worker.stop().await;
    }
    db.assert_nothing_stranded().await;
}

/// A failed round is retried and replayed with what the rounds before have said.
#[tokio::test(flavor = "multi_thread")]
async fn a_failed_round_is_retried_and_replayed() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[200, 400]).await;
    let playbook = db.playbook(company, &looping(&witness, 3)).await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Failed).await;
    assert_eq!(row.error.unwrap()["step"], "call");
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}");
    assert_eq!(api.post(&format!("{path}/retry"), json!({})).await.0, 200);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!(3)));
    // Three rounds, and the second one's call twice with one key.
    let calls = witness.calls();
    assert_eq!((calls.len(), calls.values().sum::<u32>()), (3, 4), "{calls:?}");
    let (status, answer) = api.post(&format!("{path}/replay"), json!({"from_step": "call"})).await;
    assert_eq!(status, 201, "{answer}");
    let again: RunId = answer["data"]["run_id"].as_str().unwrap().parse().unwrap();
    let row = db.until(company, again, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!(3)), "it begins with the count of the old run");
    db.assert_nothing_stranded().await;
}

/// What a step says is held to what it declares, each item of a list by itself.
#[tokio::test(flavor = "multi_thread")]
async fn a_step_that_does_not_say_what_it_declares_fails() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: x
inputs: {n: {min: 0, max: 9}, list: {default: [1, 2]}}
steps:
  - {id: one, action: transform, params: {n: '${inputs.n}'}, output: {n: {type: integer, max: 5, required: true}}}
  - {id: each, for_each: '${inputs.list}', action: transform, params: {v: '${item}'}, output: {v: integer}}
output: ${steps.one.n}
";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({"n": 3})).await;
    assert_eq!(db.until(company, run, RunStatus::Completed).await.output, Some(json!(3)));
    for (params, said) in [
        (json!({"n": 7}), "`n` must be at most 5"),
        (json!({"n": "x"}), "`n` must be of type integer"),
        (json!({"n": 1, "list": [1, "two"]}), "`v` must be of type integer"),
    ] {
        let run = db.start(company, playbook, params).await;
        let error = db.until(company, run, RunStatus::Failed).await.error.unwrap();
        assert!(error["message"].as_str().unwrap().contains(said), "{error}");
    }
}
