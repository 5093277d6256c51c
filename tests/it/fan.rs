//! Steps that are done for each item of a list: each item once, so many at once,
//! whoever dies over them.

use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

/// Calls outside for each item, and says what it got.
fn calling(witness: &Witness, more: &str) -> String {
    format!(
        "name: each
inputs: {{list: array}}
steps:
  - {{id: list, action: transform, params: {{of: '${{inputs.list}}'}}}}
  - id: call
    for_each: ${{steps.list.of}}
    action: http.request
    params: {{method: POST, url: '{}/x', body: {{item: '${{item}}', place: '${{index}}'}}}}
    retry: {{max_attempts: 3, initial: 20ms}}
{more}
  - {{id: last, action: transform, params: {{all: '${{len(steps.call.output)}}'}}}}
output: {{all: '${{steps.last.all}}', first: '${{steps.call.output[0]}}'}}
",
        witness.url
    )
}

fn numbers(n: u32) -> Value {
    json!({"list": (0..n).collect::<Vec<_>>()})
}

async fn shown(api: &Api, company: CompanyId, playbook: PlaybookId, run: RunId) -> Value {
    api.get(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}")).await.1["data"].clone()
}

async fn until_idle(db: &Db) {
    eventually("every job to be done", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn items_are_done_each_once_and_their_outputs_stand_in_order() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: squares
steps:
  - {id: square, for_each: [1, 2, 3, 4, 5], max_parallel: 3, action: transform, params: {n: '${item * item}', at: '${index}'}}
output: ${steps.square.output}
";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let row = db.until(company, run, RunStatus::Completed).await;
    let squares: Vec<Value> = (1..6).map(|n| json!({"n": n * n, "at": n - 1})).collect();
    assert_eq!(row.output, Some(Value::Array(squares)));
    let told = shown(&api, company, playbook, run).await;
    let counts = json!({"total": 5, "completed": 5, "failed": 0, "running": 0});
    assert_eq!((&told["steps"][0]["items"], &told["steps"][0]["status"]), (&counts, &json!("completed")), "{told}");
    // One after another, where nothing else is said.
    let yaml = yaml.replace("max_parallel: 3, ", "").replace("squares", "serial");
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    let order: Vec<i32> = sqlx::query_scalar("select item from run_items where run_id = $1 order by ended_at")
        .bind(run.0)
        .fetch_all(&db.pool)
        .await
        .unwrap();
    assert_eq!(order, [0, 1, 2, 3, 4]);
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn no_more_items_are_under_way_than_it_says() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let playbook = db.playbook(company, &calling(&witness, "    max_parallel: 4")).await;
    let run = db.start(company, playbook, numbers(12)).await;
    let _worker = db.worker(SHORT_LEASE);
    eventually("four calls", || async { witness.held_calls() == 4 }).await;
    let told = shown(&api, company, playbook, run).await;
    let step = &told["steps"][1];
    assert_eq!(
        (&step["status"], &step["items"]["running"], &step["items"]["total"]),
        (&json!("running"), &json!(4), &json!(12)),
        "{told}"
    );
    assert_eq!(step.get("next_attempt_at"), None, "{told}");
    assert_eq!(witness.calls().len(), 4);
    witness.hold(false);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output.unwrap()["all"], json!(12));
    assert_eq!((witness.calls().len(), witness.calls().values().sum::<u32>()), (12, 12));
    until_idle(&db).await;
}

/// A worker dies at every point of its way, in the midst of the items.
#[tokio::test(flavor = "multi_thread")]
async fn items_go_on_where_their_worker_died() {
    let points = [
        ("claim.before", 3),
        ("claim.after_commit", 2),
        ("load.before", 2),
        ("attempt.before_handler", 5),
        ("attempt.after_handler", 5),
        // The run's own commits are the first two, that of the fan the second.
        ("commit.before", 2),
        ("commit.after", 2),
        ("commit.before", 3),
        ("commit.after", 3),
        ("commit.before", 4),
        ("commit.after", 4),
    ];
    // One lane has fewer ways to die.
    let alone = points.iter().filter(|(_, hit)| *hit == 3).map(|point| (1, *point));
    for (parallel, (point, hit)) in points.iter().map(|point| (3, *point)).chain(alone) {
        let db = Db::new().await;
        let witness = Witness::start(&[503]).await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, &calling(&witness, &format!("    max_parallel: {parallel}"))).await;
        let run = db.start(company, playbook, numbers(7)).await;
        Process::worker(&db, &format!("{point}=kill@{hit}")).dies_at(point).await;
        let done = db.count("select count(*) from run_items where status = 'completed'").await;
        let before = witness.calls();
        let _survivor = db.worker(SHORT_LEASE);
        let row = db.until(company, run, RunStatus::Completed).await;
        assert_eq!(row.output.unwrap()["all"], json!(7), "{point} {hit}");
        let calls = witness.calls();
        assert_eq!(calls.len(), 7, "{point} {hit}: one key an item: {calls:?}");
        let again: u32 = before.iter().map(|(key, count)| calls[key] - count).sum();
        let begun = u32::try_from(before.len()).unwrap();
        assert!(again + u32::try_from(done).unwrap() <= begun + 1, "{point} {hit}: what was done was done again");
        assert_eq!(db.count("select count(*) from events where event = 'step.completed'").await, 3, "{point} {hit}");
        until_idle(&db).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_lose_and_double_no_item() {
    for parallel in [1, 3] {
        for (point, hit) in
            [("commit.before", 2), ("commit.after", 2), ("commit.before", 3), ("commit.after", 3), ("commit.after", 5)]
        {
            let db = Db::new().await;
            let witness = Witness::start(&[]).await;
            let company = db.company(&["a"], "claude", json!({})).await;
            let playbook = db.playbook(company, &calling(&witness, &format!("    max_parallel: {parallel}"))).await;
            let run = db.start(company, playbook, numbers(9)).await;
            let worker = Process::worker(&db, &format!("{point}=fail@{hit}"));
            db.until(company, run, RunStatus::Completed).await;
            let calls = witness.calls();
            assert_eq!((calls.len(), calls.values().sum::<u32>()), (9, 9), "{point} {hit}: {calls:?}");
            // Before its worker is gone, which may hold other work.
            until_idle(&db).await;
            worker.was_at(point);
        }
    }
}

/// For odd items an expression has no value, and they fail.
const ODD: &str = "name: odd
inputs: {list: array}
steps:
  - id: each
    for_each: ${inputs.list}
    action: transform
    params: {n: '${inputs.list[item % 2 * 1000]}'}
MORE
  - {id: after, action: transform, params: {got: '${steps.each.output}'}}
output: ${steps.after.got}
";

fn odd(more: &str) -> String {
    ODD.replace("MORE", more)
}

#[tokio::test(flavor = "multi_thread")]
async fn failed_items_fail_the_step_or_not_as_its_author_says() {
    let db = Db::new().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let cases = [
        // How many items, what is said, how it ends, how many were tried.
        (6, "", RunStatus::Failed, 2),
        (6, "    on_item_failure: continue", RunStatus::Completed, 6),
        (6, "    min_success: 3", RunStatus::Completed, 6),
        (6, "    min_success: 50%", RunStatus::Completed, 6),
        (6, "    min_success: 5", RunStatus::Failed, 4),
        (6, "    min_success: 5\n    on_item_failure: continue", RunStatus::Failed, 6),
        (1, "    min_success: 5", RunStatus::Completed, 1),
        (0, "", RunStatus::Completed, 0),
    ];
    for (case, (items, more, end, tried)) in cases.into_iter().enumerate() {
        let yaml = odd(more).replace("name: odd", &format!("name: odd{case}"));
        let playbook = db.playbook(company, &yaml).await;
        let run = db.start(company, playbook, numbers(items)).await;
        let row = db.until(company, run, end).await;
        let count: i64 = sqlx::query_scalar("select count(*) from run_items where run_id = $1")
            .bind(run.0)
            .fetch_one(&db.pool)
            .await
            .unwrap();
        assert_eq!(count, tried, "{more}: {:?}", row.error);
        if end == RunStatus::Failed {
            let error = row.error.unwrap();
            assert_eq!(error["step"], json!("each"), "{error}");
            let message = error["message"].as_str().unwrap();
            assert!(message.contains("items failed") && message.contains("item 1: "), "{message}");
        } else {
            let wanted: Vec<Value> =
                (0..items).map(|n| if n % 2 == 0 { json!({"n": 0}) } else { Value::Null }).collect();
            assert_eq!(row.output, Some(Value::Array(wanted)), "{more}");
        }
    }
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_does_what_failed_and_nothing_again() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    // Not worth another try; twice the second item is refused.
    let witness = Witness::start(&[]).await;
    let refusing = Witness::start(&[400, 400]).await;
    let yaml = "name: refused
inputs: {list: array}
steps:
  - {id: call, for_each: '${inputs.list}', action: http.request, params: {method: POST, url: '${item.url}'}}
output: ${len(steps.call.output)}
";
    let list: Vec<Value> = (0..8).map(|n| json!({"url": if n == 3 { &refusing.url } else { &witness.url }})).collect();
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({"list": list})).await;
    let retry = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/retry");
    for _ in 0..2 {
        db.until(company, run, RunStatus::Failed).await;
        assert_eq!(witness.calls().len(), 3, "the ones before it");
        let (status, body) = api.post(&retry, json!({})).await;
        assert_eq!(status, 200, "{body}");
    }
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output, Some(json!(8)));
    assert_eq!((witness.calls().len(), witness.calls().values().sum::<u32>()), (7, 7), "{:?}", witness.calls());
    assert_eq!(refusing.calls().values().collect::<Vec<_>>(), [&3], "one key over all tries");
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn each_round_of_a_loop_has_its_items() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let yaml = format!(
        "name: rounds
steps:
  - {{id: count, action: transform, params: {{n: '${{(steps.count.n ?? 0) + 1}}'}}}}
  - {{id: call, for_each: [a, b], max_parallel: 2, action: http.request, params: {{method: POST, url: '{}', body: {{i: '${{item}}'}}}}}}
  - {{if: 'steps.count.n < 3', goto: count, max_retries: 5}}
output: ${{len(steps.call.output)}}
",
        witness.url
    );
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    Process::worker(&db, "attempt.after_handler=kill@5").dies_at("attempt.after_handler").await;
    let _worker = db.worker(SHORT_LEASE);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!((row.output, witness.calls().len()), (Some(json!(2)), 6), "{:?}", witness.calls());
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_and_a_pause_hold_for_the_items() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let playbook = db.playbook(company, &calling(&witness, "    max_parallel: 3")).await;
    witness.hold(true);
    let _worker = db.worker(SHORT_LEASE);
    let run = db.start(company, playbook, numbers(200)).await;
    eventually("three calls", || async { witness.held_calls() == 3 }).await;
    // Those under way end, no others begin.
    assert_eq!(api.post(&format!("/v1/companies/{company}/pause"), json!({})).await.0, 200);
    witness.hold(false);
    eventually("the lanes to be parked", || async {
        db.count("select count(*) from jobs where kind = 'item' and due_at = 'infinity'").await == 3
    })
    .await;
    let jobs = api.get(&format!("/v1/jobs?company_id={company}&kind=item")).await.1;
    assert_eq!(jobs["data"][0]["run_id"], json!(run), "{jobs}");
    let calls = witness.calls().len();
    assert!(calls < 200, "{calls}");
    witness.hold(true);
    let held = witness.held_calls();
    assert_eq!(api.post(&format!("/v1/companies/{company}/resume"), json!({})).await.0, 200);
    eventually("three more calls", || async { witness.held_calls() == held + 3 }).await;
    let cancel = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/cancel");
    let (status, body) = api.post(&cancel, json!({})).await;
    assert_eq!(status, 200, "{body}");
    witness.hold(false);
    db.until(company, run, RunStatus::Cancelled).await;
    until_idle(&db).await;
    assert_eq!(witness.calls().len(), calls + 3, "an item began after the cancel");
}

#[tokio::test(flavor = "multi_thread")]
async fn one_gate_stands_before_all_items_and_shows_them() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: gated
inputs: {list: array}
steps:
  - {id: each, for_each: '${inputs.list}', action: transform, params: {n: '${item}'}, approval: required}
output: ${steps.each.output}
";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, numbers(3)).await;
    db.until(company, run, RunStatus::Suspended).await;
    let (_, body) = api.get("/v1/approvals").await;
    let gate = &body["data"][0];
    assert_eq!(
        (&gate["context"]["for_each"], &gate["context"]["params"]["n"]),
        (&json!([0, 1, 2]), &json!("${item}")),
        "{gate}"
    );
    let (status, _) = api.post(&format!("/v1/approvals/{}/approve", gate["id"].as_str().unwrap()), json!({})).await;
    assert_eq!(status, 200);
    db.until(company, run, RunStatus::Completed).await;
    // A list that is none is told as such.
    let run = db
        .start(
            company,
            db.playbook(
                company,
                &yaml.replace("gated", "none").replace(", approval: required", "").replace("array", "any"),
            )
            .await,
            json!({"list": "abc"}),
        )
        .await;
    let row = db.until(company, run, RunStatus::Failed).await;
    assert!(row.error.unwrap()["message"].as_str().unwrap().contains("for_each: must be a list, not"));
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn lanes_from_before_a_retry_do_not_count_for_the_new_ones() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    witness.hold(true);
    let _worker = db.worker(SHORT_LEASE);
    let playbook = db.playbook(company, &calling(&witness, "    max_parallel: 2")).await;
    let run = db.start(company, playbook, numbers(6)).await;
    eventually("two calls", || async { witness.held_calls() == 2 }).await;
    // The run fails while lanes are at work.
    let fails = "delete from jobs where item is null and kind = 'step';
         update run_steps set status = 'failed' where step = 1;
         update runs set status = 'failed', ended_at = now(), error = '{\"index\": 1}'";
    sqlx::raw_sql(fails).execute(&db.pool).await.unwrap();
    let retry = format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/retry");
    let (status, body) = api.post(&retry, json!({})).await;
    assert_eq!(status, 200, "{body}");
    eventually("two calls of the new lanes", || async { witness.held_calls() == 4 }).await;
    witness.hold(false);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output.unwrap()["all"], json!(6));
    assert_eq!(db.count("select completed::bigint from run_fans").await, 6, "each item counts once");
    assert_eq!((witness.calls().len(), witness.calls().values().sum::<u32>()), (6, 8), "one key an item");
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn items_of_lanes_that_were_lost_are_done_by_others() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let witness = Witness::start(&[]).await;
    let playbook = db.playbook(company, &calling(&witness, "    max_parallel: 2")).await;
    let run = db.start(company, playbook, numbers(5)).await;
    // Of the two lanes one has done an item.
    Process::worker(&db, "commit.after=kill@3").dies_at("commit.after").await;
    let done = db.count("select count(*) from run_items").await;
    assert!((1..5).contains(&done), "{done}");
    let lost = "delete from jobs where kind = 'item'; update jobs set due_at = now() where kind = 'step'";
    sqlx::raw_sql(lost).execute(&db.pool).await.unwrap();
    let _worker = db.worker(SHORT_LEASE);
    let row = db.until(company, run, RunStatus::Completed).await;
    assert_eq!(row.output.unwrap()["all"], json!(5));
    assert_eq!(witness.calls().len(), 5, "one key an item");
    until_idle(&db).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_list_is_shown_page_by_page_however_large_its_outputs_are() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    // 30 times 200 KiB are more than a page takes, and more than is kept together.
    let yaml = "name: large
inputs: {text: string}
steps:
  - id: large
    for_each: [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 29]
    max_parallel: 4
    on_item_failure: continue
    action: transform
    params: {n: '${10 / (item - 7)}', text: '${inputs.text}'}
";
    let playbook = db.playbook(company, yaml).await;
    let run = db.start(company, playbook, json!({"text": "x".repeat(200 * 1024)})).await;
    db.until(company, run, RunStatus::Completed).await;
    let (mut places, mut pages, mut cursor) = (Vec::new(), 0, String::new());
    loop {
        let (status, body) = api.get(&format!("/v1/runs/{run}/items?limit=100{cursor}")).await;
        assert_eq!(status, 200, "{}", body["error"]);
        assert!(body.to_string().len() < 5 * 1024 * 1024);
        for item in body["data"].as_array().unwrap() {
            places.push(item["item"].as_i64().unwrap());
            let done = item["output"]["text"].as_str().is_some_and(|text| text.len() == 200 * 1024);
            assert_eq!(done, item["status"] == "completed");
        }
        pages += 1;
        if body["meta"]["has_more"] != json!(true) {
            break;
        }
        cursor = format!("&cursor={}", body["meta"]["cursor"].as_str().unwrap());
    }
    assert_eq!(places, (0..30).collect::<Vec<_>>());
    assert_eq!(pages, 2);
    let (_, failed) = api.get(&format!("/v1/runs/{run}/items?step=large&status=failed")).await;
    assert_eq!(failed["data"].as_array().unwrap().len(), 1);
    assert_eq!(failed["data"][0]["item"], json!(7));
    let (status, body) = api.get(&format!("/v1/runs/{run}/items?step=lagre")).await;
    assert_eq!(status, 400);
    assert!(body.to_string().contains("did you mean `large`"), "{body}");
}
