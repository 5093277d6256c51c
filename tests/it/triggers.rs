//! Runs that start by themselves: each planned time and each event starts one,
//! whoever dies over it, and what was missed is made up for as its author said.

use capx_core::domain::ids::{CompanyId, PlaybookId, SignalId};
use capx_core::engine::{signals, triggers};
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;

/// In a worker that carries out a fire.
pub const FIRE: &[&str] = &["fire.before_start", "fire.before_commit", "fire.after_commit"];

const YEARLY: &str =
    "name: yearly\ntrigger: {type: schedule, schedule: '0 0 1 1 *'}\nsteps: [{id: a, action: transform}]\n";

/// Puts the planned fire of the one schedule into the past, as SQL says, and makes
/// its job due.
async fn missed_since(db: &Db, since: &str) {
    let sql = format!("update triggers set next_at = {since}; update jobs set due_at = now() where kind = 'schedule'");
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&db.pool).await.unwrap();
}

/// The schedule is planned for its next fire, and has one job that waits for it.
async fn assert_planned(db: &Db, what: &str) {
    eventually("the next fire to be planned", || async {
        db.count(
            "select count(*) from triggers t join jobs j on j.kind = 'schedule' and j.ref_id = t.playbook_id
             where t.next_at > now() and j.state = 'scheduled' and j.due_at = t.next_at",
        )
        .await
            == 1
    })
    .await;
    assert_eq!(db.count("select count(*) from jobs where kind = 'schedule'").await, 1, "{what}");
}

async fn keys(db: &Db) -> Vec<String> {
    sqlx::query_scalar("select dedup_key from runs order by dedup_key").fetch_all(&db.pool).await.unwrap()
}

async fn completed(db: &Db, runs: i64) {
    eventually("the runs to be completed", || async {
        db.count("select count(*) from runs where status = 'completed'").await == runs
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_fire_starts_one_run_though_its_worker_dies_over_it() {
    for point in FIRE {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        db.playbook(company, YEARLY).await;
        missed_since(&db, "date_trunc('year', now())").await;
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        completed(&db, 1).await;
        assert_planned(&db, point).await;
        assert_eq!(db.count("select count(*) from runs").await, 1, "{point}");
        db.assert_nothing_stranded().await;
    }
    // The answer to the commit is lost, and the fire is done again.
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    db.playbook(company, YEARLY).await;
    missed_since(&db, "date_trunc('year', now())").await;
    let worker = Process::worker(&db, "fire.before_commit=fail@1");
    completed(&db, 1).await;
    worker.was_at("fire.before_commit");
    assert_planned(&db, "lost").await;
    assert_eq!(db.count("select count(*) from runs").await, 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_missed_is_made_up_for_as_its_author_said() {
    for (policy, wanted) in [("none", 0), ("latest", 1), ("all(3)", 3)] {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let yaml = format!(
            "name: monthly\nschedule: '0 0 1 * *'\ncatch_up: {policy}\nsteps: [{{id: a, action: transform}}]\n"
        );
        db.playbook(company, &yaml).await;
        missed_since(&db, "date_trunc('month', now()) - interval '2 years'").await;
        let _worker = db.worker(SHORT_LEASE);
        assert_planned(&db, policy).await;
        completed(&db, wanted).await;
        let keys = keys(&db).await;
        assert_eq!(i64::try_from(keys.len()).unwrap(), wanted, "{policy}: {keys:?}");
        let months: Vec<String> = sqlx::query_scalar(
            "select to_char(date_trunc('month', now() at time zone 'utc') - n * interval '1 month', 'YYYY-MM-DD')
             from generate_series(0, $1 - 1) n order by 1",
        )
        .bind(i32::try_from(wanted).unwrap())
        .fetch_all(&db.pool)
        .await
        .unwrap();
        let wanted: Vec<String> = months.iter().map(|day| format!("at:{day}T00:00:00Z")).collect();
        assert_eq!(keys, wanted, "{policy}: the last ones");
        // A clock that goes back starts nothing twice.
        if policy == "latest" {
            missed_since(&db, "date_trunc('month', now())").await;
            assert_planned(&db, "again").await;
            assert_eq!(db.count("select count(*) from runs").await, 1);
        }
    }
}

async fn next_run(api: &Api, path: &str) -> Value {
    let (status, body) = api.get(path).await;
    assert_eq!(status, 200, "{body}");
    body["data"]["next_run_at"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_schedule_follows_its_playbook() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, YEARLY).await;
    let path = format!("/v1/companies/{company}/playbooks/{playbook}");
    let jobs = || db.count("select count(*) from jobs where kind = 'schedule'");
    let planned = next_run(&api, &path).await;
    assert!(planned.as_str().is_some_and(|at| at.ends_with("-01-01T00:00:00Z")), "{planned}");
    // Another edit leaves the planned fire where it is, were it late already.
    sqlx::raw_sql("update triggers set next_at = '2020-01-01'").execute(&db.pool).await.unwrap();
    let edit = |yaml: &str| json!({"yaml": yaml});
    let (status, body) = api.send("PATCH", &path, Some(edit(&YEARLY.replace("id: a", "id: b")))).await;
    assert_eq!((status, &body["data"]["next_run_at"]), (200, &json!("2020-01-01T00:00:00Z")), "{body}");
    // Another schedule is planned anew.
    let monthly = YEARLY.replace("0 0 1 1 *", "30 4 1 * *");
    let (_, body) = api.send("PATCH", &path, Some(edit(&monthly))).await;
    assert!(body["data"]["next_run_at"].as_str().is_some_and(|at| at.ends_with("-01T04:30:00Z")), "{body}");
    // A playbook that rests keeps its plan, and has nothing due.
    assert_eq!(api.post(&format!("{path}/pause"), json!({})).await.0, 200);
    assert_eq!((next_run(&api, &path).await, jobs().await), (Value::Null, 0));
    assert_eq!(api.post(&format!("{path}/resume"), json!({})).await.0, 200);
    assert_eq!(next_run(&api, &path).await, body["data"]["next_run_at"]);
    assert_eq!(jobs().await, 1);
    // One that is archived, or started by hand, has none.
    let (_, body) = api.send("PATCH", &path, Some(edit("name: yearly\nsteps: [{id: a, action: transform}]\n"))).await;
    assert_eq!((&body["data"]["next_run_at"], jobs().await), (&Value::Null, 0), "{body}");
    let (status, body) = api.post(&format!("{path}/rollback"), json!({"version": 1})).await;
    assert_eq!(status, 200, "{body}");
    assert_eq!((next_run(&api, &path).await, jobs().await), (planned, 1));
    let (status, _) = api.send("DELETE", &path, None).await;
    assert_eq!(status, 200);
    assert_eq!((db.count("select count(*) from triggers").await, jobs().await), (0, 0));
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_paused_company_fires_when_it_goes_on() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    db.playbook(company, YEARLY).await;
    let paid = "name: paid\ntrigger: {type: event, event: order.paid}\ninputs: {event: object}\nsteps: [{id: a, action: transform}]\noutput: '${inputs.event.total}'\n";
    db.playbook(company, paid).await;
    let path = format!("/v1/companies/{company}");
    assert_eq!(api.post(&format!("{path}/pause"), json!({})).await.0, 200);
    missed_since(&db, "case when kind = 'schedule' then date_trunc('year', now()) end").await;
    let sent = json!({"name": "order.paid", "data": {"total": 7}});
    let (status, body) = api.post(&format!("{path}/events"), sent).await;
    assert_eq!(status, 201, "{body}");
    let _worker = db.worker(SHORT_LEASE);
    eventually("both jobs to be parked", || async {
        db.count("select count(*) from jobs where due_at = 'infinity'").await == 2
    })
    .await;
    assert_eq!(db.count("select count(*) from runs").await, 0);
    assert_eq!(api.post(&format!("{path}/resume"), json!({})).await.0, 200);
    completed(&db, 2).await;
    assert_planned(&db, "resumed").await;
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_event_starts_one_run_of_each_playbook_that_waits_for_it() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let of = |name: &str, event: &str, inputs: &str| {
        format!(
            "name: {name}\ntrigger: {{type: event, event: {event}}}\ninputs: {inputs}\nsteps: [{{id: a, action: transform}}]\noutput: '${{inputs.event.total ?? 0}}'\n"
        )
    };
    let first = db.playbook(company, &of("first", "order.paid", "{event: object}")).await;
    let second = db.playbook(company, &of("second", "order.paid", "{event: {type: object, default: {}}}")).await;
    db.playbook(company, &of("other", "order.sent", "{event: object}")).await;
    // It takes text, and the event brings a map.
    let refuses = db.playbook(company, &of("refuses", "order.paid", "{event: string}").replace(".total", "")).await;
    let _worker = db.worker(SHORT_LEASE);
    let path = format!("/v1/companies/{company}/events");
    let sent = json!({"name": "order.paid", "data": {"total": 7}, "id": "evt-1"});
    let (status, body) = api.post(&path, sent.clone()).await;
    assert_eq!(status, 201, "{body}");
    assert_eq!(api.post(&path, sent).await.0, 200, "the same again");
    completed(&db, 2).await;
    let runs: Vec<(uuid::Uuid, Value, String)> =
        sqlx::query_as("select playbook_id, output, trigger from runs order by playbook_id")
            .fetch_all(&db.pool)
            .await
            .unwrap();
    let mut wanted = [first, second].map(|playbook| (playbook.0, json!(7), "event".to_owned())).to_vec();
    wanted.sort_by_key(|run| run.0);
    assert_eq!(runs, wanted);
    eventually("the refusal to be told", || async {
        db.count("select count(*) from events where event = 'playbook.skipped'").await == 1
    })
    .await;
    let told: Value = sqlx::query_scalar("select data from events where event = 'playbook.skipped'")
        .fetch_one(&db.pool)
        .await
        .unwrap();
    assert_eq!(told["playbook_id"], json!(refuses), "{told}");
    assert!(told["reason"].as_str().is_some_and(|reason| reason.contains("event")), "{told}");
    // Whoever hands it out again, as a worker does in a dead one's place.
    let signal: uuid::Uuid = sqlx::query_scalar("select id from signals").fetch_one(&db.pool).await.unwrap();
    eventually("the event to be handed out", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    let handed = [(); 4].map(|()| {
        let engine = db.engine.clone();
        tokio::spawn(async move { signals::deliver(&engine, company, SignalId(signal)).await.unwrap() })
    });
    for handed in handed {
        assert!(handed.await.unwrap());
    }
    assert_eq!(db.count("select count(*) from runs").await, 2);
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn playbooks_from_before_there_were_triggers_get_theirs() {
    let db = Db::new().await;
    let company: CompanyId = db.company(&["a"], "claude", json!({})).await;
    let _: PlaybookId = db.playbook(company, YEARLY).await;
    sqlx::raw_sql("update playbooks set triggers_of = null; delete from triggers; delete from jobs")
        .execute(&db.pool)
        .await
        .unwrap();
    triggers::catch_up(&db.engine).await.unwrap();
    assert_planned(&db, "caught up").await;
    triggers::catch_up(&db.engine).await.unwrap();
    assert_planned(&db, "once").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_all_runs_with_one_key_there_is_one() {
    let db = Db::new().await;
    let api = db.api().await;
    let _worker = db.worker(SHORT_LEASE);
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: invoice
idempotency_key: invoice-${inputs.number}
inputs: {number: any}
steps: [{id: a, action: transform}]
";
    let playbook = db.playbook(company, yaml).await;
    let run = format!("/v1/companies/{company}/playbooks/{playbook}/run");
    let starts = (0..20).map(|_| api.post(&run, json!({"params": {"number": 7}})));
    let answers = futures_util::future::join_all(starts).await;
    let created = answers.iter().filter(|(status, _)| *status == 201).count();
    let known = answers.iter().filter(|(status, _)| *status == 200).count();
    assert_eq!((created, known), (1, 19), "{answers:?}");
    let ids: std::collections::HashSet<&str> =
        answers.iter().map(|(_, body)| body["data"]["run_id"].as_str().unwrap()).collect();
    assert_eq!((ids.len(), db.count("select count(*) from runs").await), (1, 1));
    // Another value is another run; the answer of a known one can be waited for.
    assert_eq!(api.post(&run, json!({"params": {"number": "8"}})).await.0, 201);
    let (status, body) = api.post(&format!("{run}?wait=10"), json!({"params": {"number": 7}})).await;
    assert_eq!((status, &body["data"]["status"]), (200, &json!("completed")), "{body}");
    let (status, body) = api.post(&run, json!({"params": {"number": "x".repeat(300)}})).await;
    assert_eq!((status, &body["error"]["fields"][0]["field"]), (400, &json!("idempotency_key")), "{body}");
    assert_eq!(db.count("select count(*) from runs").await, 2);
}

/// Only what holds all that a trigger asks for starts a run.
#[tokio::test(flavor = "multi_thread")]
async fn an_event_starts_what_it_matches() {
    let db = Db::new().await;
    let api = db.api().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = "name: x
trigger: {type: event, event: order.paid, match: {status: open, lines: [{sku: a}]}}
steps: [{id: s, action: transform}]
output: ${inputs.event.n}
";
    db.playbook(company, yaml).await;
    let _worker = db.worker(SHORT_LEASE);
    let send = async |data: Value| {
        let path = format!("/v1/companies/{company}/events");
        let (status, body) = api.post(&path, json!({"name": "order.paid", "data": data})).await;
        assert!(status < 300, "{body}");
    };
    send(json!({"n": 1, "status": "open"})).await;
    send(json!({"n": 2, "status": "closed", "lines": [{"sku": "a"}]})).await;
    send(json!({"n": 3, "status": "open", "lines": [{"sku": "b"}, {"sku": "a", "count": 2}]})).await;
    eventually("a run", || async { db.count("select count(*) from runs where status = 'completed'").await == 1 }).await;
    eventually("every job to be done", || async {
        db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0
    })
    .await;
    let outputs: Vec<Value> = sqlx::query_scalar("select output from runs").fetch_all(&db.pool).await.unwrap();
    assert_eq!(outputs, [json!(3)]);
}
