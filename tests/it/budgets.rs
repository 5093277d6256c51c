//! Money: no call is begun that could pass a cap, whoever dies over it, and all that counts
//! says the same.

use std::time::Duration;

use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::engine::spending;
use capx_workers::adapters::Providers;
use serde_json::{Value, json};

use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::process::Process;
use crate::provider::{Provider, Says, Trouble};

const STEP: &str = "name: work\nsteps:\n  - {id: do, role: a, action: research}\n";
const CLAUDE_TURN: i64 = 1_001 * 3_000 + 37 * 15_000 + 11 * 300 + 7 * 3_750;

/// The spending that each kind of row counts, which must be the same; and what is reserved.
async fn balances(db: &Db, company: CompanyId) -> (i64, i64) {
    let sums: Vec<(String, Option<i64>)> = sqlx::query_as(
        "select 'ledger', sum(nanos)::bigint from ledger where company_id = $1
         union all select 'runs', sum(cost_nanos)::bigint from runs where company_id = $1
         union all select 'steps', sum(cost_nanos)::bigint from run_steps where company_id = $1
         union all select 'journal', sum(cost_nanos)::bigint from journal where company_id = $1
         union all select scope || period, sum(spent_nanos)::bigint from budgets where company_id = $1 group by scope, period",
    )
    .bind(company.0)
    .fetch_all(&db.pool)
    .await
    .unwrap();
    let spent = sums[0].1.unwrap_or(0);
    assert!(sums.iter().all(|(_, sum)| sum.unwrap_or(0) == spent), "{sums:?}");
    let reserved: Vec<(String, i64)> = sqlx::query_as(
        "select scope || period, sum(reserved_nanos)::bigint from budgets where company_id = $1 group by scope, period
         union all select 'journal', coalesce(sum(reserved_nanos), 0)::bigint from journal where company_id = $1",
    )
    .bind(company.0)
    .fetch_all(&db.pool)
    .await
    .unwrap();
    let held = reserved[0].1;
    assert!(reserved.iter().all(|(_, sum)| *sum == held), "{reserved:?}");
    (spent, held)
}

async fn events(db: &Db, company: CompanyId, name: &str) -> Vec<Value> {
    sqlx::query_scalar("select data from events where company_id = $1 and event = $2 order by xid, id")
        .bind(company.0)
        .bind(name)
        .fetch_all(&db.pool)
        .await
        .unwrap()
}

async fn agent(api: &Api, company: CompanyId) -> Value {
    api.get(&format!("/v1/companies/{company}/agents/a")).await.1["data"].clone()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_stops_before_its_cap_says_so_and_goes_on_when_that_is_raised() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    // A turn may cost some 5,000 tokens read and 200 said, as far as anybody can know before.
    let body = json!({"name": "c", "agents": [{"role": "a", "adapter": "claude", "instructions": "Work.",
        "config": {"budget_limit_daily": 0.04, "max_tokens": 200, "tools": ["file_read"]}}]});
    let company = api.company(body).await;
    let playbook = db.playbook(company, STEP).await;
    let mut runs: Vec<RunId> = Vec::new();
    for _ in 0..20 {
        let run = db.start(company, playbook, json!({})).await;
        runs.push(run);
        eventually("the run to end, or its agent to be paused", || async {
            db.run(company, run).await.status == RunStatus::Completed
                || agent(&api, company).await["status"] == "paused"
        })
        .await;
        if agent(&api, company).await["status"] == "paused" {
            break;
        }
    }
    let shown = agent(&api, company).await;
    assert_eq!(shown["paused_reason"], "the agent's config.budget_limit_daily of 0.04 USD is used up", "{shown}");
    assert!(shown["paused_until"].as_str().unwrap().ends_with("T00:00:00Z"), "{shown}");
    let (spent, reserved) = balances(&db, company).await;
    assert!(spent <= 40_000_000 && spent > 20_000_000 && reserved == 0, "spent {spent}, reserved {reserved}");
    assert_eq!(spent % CLAUDE_TURN, 0);
    assert_eq!(shown["used"], spent / 10_000_000);
    let told: Vec<i64> =
        events(&db, company, "costs.threshold_reached").await.iter().map(|e| e["percent"].as_i64().unwrap()).collect();
    assert!(!told.is_empty() && told.is_sorted() && told[0] == 50, "{told:?}");
    // Other work of it waits too, and costs no try.
    let waits = db.start(company, playbook, json!({})).await;
    tokio::time::sleep(Duration::from_millis(300)).await;
    let last = *runs.last().unwrap();
    for run in [waits, last] {
        assert_eq!(db.run(company, run).await.status, RunStatus::Running);
    }
    let calls = provider.seen().len();
    let (status, raised) = api
        .send("PATCH", &format!("/v1/companies/{company}/agents/a"), Some(json!({"config": {"budget_limit_daily": 5}})))
        .await;
    assert_eq!((status, &raised["data"]["status"]), (200, &json!("active")));
    for run in [waits, last] {
        db.until(company, run, RunStatus::Completed).await;
    }
    assert_eq!(provider.seen().len(), calls + 2, "nothing was asked for while there was no money");
    balances(&db, company).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_period_brings_new_money() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    let body = json!({"name": "c", "config": {"timezone": "Asia/Tokyo"}, "governance": {"spend_caps": {"per_company": {"daily": 0.001}}},
        "agents": [{"role": "a", "adapter": "claude", "instructions": "Work."}]});
    let company = api.company(body).await;
    let playbook = db.playbook(company, STEP).await;
    let run = db.start(company, playbook, json!({})).await;
    eventually("the agent to be paused", || async { agent(&api, company).await["status"] == "paused" }).await;
    let shown = agent(&api, company).await;
    assert!(shown["paused_until"].as_str().unwrap().ends_with("T15:00:00Z"), "midnight in Tokyo: {shown}");
    assert!(provider.seen().is_empty());
    // The night passes: what is due is due, and the cap was raised without a word to the agents.
    sqlx::query("update companies set governance = '{}' where id = $1")
        .bind(company.0)
        .execute(&db.pool)
        .await
        .unwrap();
    sqlx::query("update agents set paused_until = now()").execute(&db.pool).await.unwrap();
    let moved = sqlx::query("update jobs set due_at = now() where kind = 'resume'").execute(&db.pool).await.unwrap();
    assert_eq!(moved.rows_affected(), 1);
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(agent(&api, company).await["status"], "active");
}

#[tokio::test(flavor = "multi_thread")]
async fn two_hundred_agents_share_money_for_fifty_calls_whoever_dies() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    // Each call costs 0.25 USD, as its endpoint says.
    let config = json!({"endpoint": format!("{}/custom", provider.url), "max_cost": 0.25});
    let company = db.company(&["a"], "custom", config.clone()).await;
    sqlx::query("update companies set config = '{\"budget_limit_daily\": 12.5}' where id = $1")
        .bind(company.0)
        .execute(&db.pool)
        .await
        .unwrap();
    // 200 of them, each with a run of its own: more than a request may name.
    sqlx::query(
        "insert into agents (company_id, id, role, adapter, instructions, config, status)
         select $1, gen_random_uuid(), 'a' || n, 'custom', 'Work.', $2, 'active' from generate_series(1, 199) n",
    )
    .bind(company.0)
    .bind(&config)
    .execute(&db.pool)
    .await
    .unwrap();
    let playbook = db.playbook(company, STEP).await;
    let mut playbooks = vec![playbook];
    for n in 1..200 {
        playbooks.push(
            db.playbook(
                company,
                &STEP.replace("role: a", &format!("role: a{n}")).replace("name: work", &format!("name: work{n}")),
            )
            .await,
        );
    }
    for playbook in playbooks {
        db.start(company, playbook, json!({})).await;
    }
    // Workers die at every point of a call, one after another, and each is replaced.
    let points = ["agent.turn_begun", "agent.turn_answered", "agent.turn_stored", "commit.before", "commit.after"];
    let args = &["worker", "--concurrency", "8"];
    let mut deaths = 0;
    for (round, point) in points.iter().cycle().enumerate() {
        let order = format!("{point}=kill@{}", 2 + round % 3);
        let mut worker = Process::start_with(&db, args, &[("CAPX_FAILPOINTS", &order)]);
        let mut dead = false;
        eventually("the worker to die, or nearly all to be done", || {
            dead = worker.child.try_wait().unwrap().is_some();
            // Those that three workers have died over come no further before people look.
            let done = db.count("select count(*) from runs where status in ('completed', 'failed')");
            async move { dead || done.await > 40 }
        })
        .await;
        let (spent, reserved) = balances(&db, company).await;
        assert!(spent + reserved <= 12_500_000_000, "round {round}: spent {spent}, reserved {reserved}");
        if !dead {
            break;
        }
        assert!(worker.said().contains("failpoint fired"), "{point}");
        deaths += 1;
    }
    assert!(deaths >= 5, "each point was met");
    let _workers =
        [db.worker_with(SHORT_LEASE, Providers::offline()), db.worker_with(SHORT_LEASE, Providers::offline())];
    // A job that three workers have died over is left to people, with the money that its call
    // may have cost; the others wait for money.
    eventually("fifty calls", || async {
        // Time passes.
        long_ago(&db).await;
        db.count("select count(*) from journal where state = 'done' or reserved_nanos + kept_nanos > 0").await == 50
            && db.count("select count(*) from jobs where kind = 'step' and held_for is null").await == 0
    })
    .await;
    // What nobody heard of may have reached the other side or not.
    let keys = provider.keys();
    let unheard = db.count("select count(*) from journal where reserved_nanos + kept_nanos > 0").await;
    assert!(keys.len() as i64 <= 50 && keys.len() as i64 >= 50 - unheard, "exactly fifty were admitted");
    assert!(keys.values().all(|times| *times <= 3), "a call that was asked for again was the same: {keys:?}");
    let (spent, held) = balances(&db, company).await;
    assert_eq!(spent + held, 12_500_000_000, "to the last nano-dollar");
    // People look, and have the runs go on that were put into quarantine.
    let failed: Vec<uuid::Uuid> =
        sqlx::query_scalar("select id from runs where status = 'failed'").fetch_all(&db.pool).await.unwrap();
    for run in failed {
        let mut tx = db.engine.pool.begin().await.unwrap();
        capx_core::engine::retry::retry_run(&db.engine, &mut tx, company, RunId(run), "test").await.unwrap();
        tx.commit().await.unwrap();
    }
    db.engine.waker.wake();
    eventually("all fifty to be heard of", || async {
        db.count("select count(*) from journal where state = 'done'").await == 50
            && db.count("select count(*) from jobs where kind = 'step' and held_for is null").await == 0
    })
    .await;
    assert_eq!(provider.keys().len(), 50);
    assert_eq!(balances(&db, company).await, (12_500_000_000, 0), "the money is spent, to the last nano-dollar");
}

fn custom(provider: &Provider, max_cost: Option<f64>) -> Value {
    let mut config = json!({"endpoint": format!("{}/custom", provider.url)});
    if let Some(most) = max_cost {
        config["max_cost"] = json!(most);
    }
    config
}

/// An answer that drips on and on.
const NO_END: Trouble = Trouble::Endless(1, Duration::from_millis(100));
const FREE: &str = r#"{"output": "done", "cost": 0}"#;

#[tokio::test(flavor = "multi_thread")]
async fn that_a_call_has_cost_nothing_does_not_let_the_next_ones_pass_the_cap() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    provider.troubled(&[Trouble::Raw("application/json", FREE)]);
    let mut config = custom(&provider, None);
    config["budget_limit_daily"] = json!(0.4);
    let company = db.company(&["a"], "custom", config).await;
    let playbook = db.playbook(company, STEP).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(balances(&db, company).await, (0, 0));
    // Each of these costs 0.25: one is within the cap, a second passes it, if nothing is held
    // for the first.
    for _ in 0..10 {
        db.start(company, playbook, json!({})).await;
    }
    eventually("the agent to be paused", || async { agent(&api, company).await["status"] == "paused" }).await;
    assert_eq!(balances(&db, company).await, (250_000_000, 0));
    assert_eq!(provider.seen().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_call_above_what_its_owner_said_is_booked_and_the_agent_paused() {
    for most in [0.0, 0.1] {
        let db = Db::new().await;
        let provider = Provider::start(vec![Says::Words("done")]).await;
        let company = db.company(&["a"], "custom", custom(&provider, Some(most))).await;
        let playbook = db.playbook(company, STEP).await;
        let _worker = db.worker_with(SHORT_LEASE, provider.providers());
        let api = db.api().await;
        eventually("the agent", || async { agent(&api, company).await["status"] == "active" }).await;
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Completed).await;
        let shown = agent(&api, company).await;
        let reason = format!("a call has cost 0.25 USD, more than the agent's config.max_cost of {most}");
        assert_eq!((&shown["status"], &shown["paused_reason"]), (&json!("paused"), &json!(reason)), "{shown}");
        assert_eq!(balances(&db, company).await, (250_000_000, 0));
        // Its owner takes note, and it goes on.
        let path = format!("/v1/companies/{company}/agents/a");
        let (status, changed) = api.send("PATCH", &path, Some(json!({"config": {"max_cost": 0.25}}))).await;
        assert_eq!((status, &changed["data"]["status"]), (200, &json!("active")), "{changed}");
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Completed).await;
        assert_eq!(agent(&api, company).await["status"], "active");
    }
}

/// Nothing is heard of calls that are under way for so long.
async fn long_ago(db: &Db) {
    sqlx::query("update journal set began_at = began_at - interval '2 minutes' where reserved_nanos > 0")
        .execute(&db.pool)
        .await
        .unwrap();
    spending::settle_unheard(&db.engine).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn what_nobody_hears_of_is_booked_at_its_worst_and_taken_back_when_it_is_heard_of() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    provider.troubled(&[NO_END, NO_END]);
    let company = db.company(&["a"], "custom", custom(&provider, Some(0.4))).await;
    let playbook = db.playbook(company, STEP).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    let run = db.start(company, playbook, json!({})).await;
    eventually("the call", || async { provider.seen().len() == 1 }).await;
    long_ago(&db).await;
    assert_eq!(balances(&db, company).await, (0, 400_000_000), "a call that is under way is left alone");
    let costs = || async { api.get(&format!("/v1/companies/{company}/costs")).await.1["data"].clone() };
    let shown = costs().await;
    assert_eq!((&shown["total"], &shown["reserved"], &shown["unheard"]), (&json!(0.0), &json!(0.4), &json!(0.0)));
    // Its agent is stopped over it.
    api.post(&format!("/v1/companies/{company}/agents/a/kill"), json!({})).await;
    eventually("the job to wait", || async {
        db.count("select count(*) from jobs where held_for is not null").await == 1
    })
    .await;
    long_ago(&db).await;
    assert_eq!(balances(&db, company).await, (400_000_000, 0));
    long_ago(&db).await;
    assert_eq!(balances(&db, company).await, (400_000_000, 0), "once");
    let shown = costs().await;
    assert_eq!((&shown["total"], &shown["reserved"], &shown["unheard"]), (&json!(0.4), &json!(0.0), &json!(0.4)));
    // It goes on, and the same call is answered under its key; the first try of it says nothing.
    api.post(&format!("/v1/companies/{company}/agents/a/resume"), json!({})).await;
    eventually("the call again", || async { provider.seen().len() == 2 }).await;
    assert_eq!(balances(&db, company).await, (0, 400_000_000), "it is held again, and not booked");
    api.post(&format!("/v1/companies/{company}/agents/a/kill"), json!({})).await;
    eventually("the job to wait", || async {
        db.count("select count(*) from jobs where held_for is not null").await == 1
    })
    .await;
    api.post(&format!("/v1/companies/{company}/agents/a/resume"), json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(balances(&db, company).await, (250_000_000, 0));
    assert_eq!(provider.keys().len(), 1);
    assert_eq!(db.count("select count(*) from ledger where unheard").await, 2, "booked, and taken back");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_run_keeps_no_money_apart() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    provider.troubled(&[NO_END]);
    let company = db.company(&["a"], "claude", json!({"max_tokens": 200})).await;
    let playbook = db.playbook(company, STEP).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    let run = db.start(company, playbook, json!({})).await;
    eventually("the call", || async { provider.seen().len() == 1 }).await;
    let held = balances(&db, company).await.1;
    assert!(held > 0);
    let (status, _) =
        api.post(&format!("/v1/companies/{company}/playbooks/{playbook}/runs/{run}/cancel"), json!({})).await;
    assert_eq!(status, 200);
    long_ago(&db).await;
    assert_eq!(balances(&db, company).await, (held, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn nodes_of_one_run_wait_for_each_others_money() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let mut config = custom(&provider, Some(0.4));
    // Each costs 0.25 and may cost 0.4: there is room for three, one after another.
    config["budget_limit_daily"] = json!(0.95);
    let company = db.company(&["a"], "custom", config).await;
    let yaml = "name: x\nsteps:\n  - {id: p, needs: [], role: a, action: work}\n  - {id: q, needs: [], role: a, action: work}\n  - {id: r, needs: [], role: a, action: work}\n";
    let playbook = db.playbook(company, yaml).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(balances(&db, company).await, (750_000_000, 0));
    assert!(events(&db, company, "agent.state_changed").await.iter().all(|event| event["to"] != "paused"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_resumption_waits_for_the_period_that_the_agent_is_paused_for_now() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let mut config = custom(&provider, Some(0.25));
    config["budget_limit_daily"] = json!(0.2);
    let company = db.company(&["a"], "custom", config).await;
    let playbook = db.playbook(company, STEP).await;
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    let api = db.api().await;
    let run = db.start(company, playbook, json!({})).await;
    eventually("the agent to be paused", || async { agent(&api, company).await["status"] == "paused" }).await;
    // The job comes too early, as it does when the time zone of the company has changed.
    let due = "update jobs set due_at = now() where kind = 'resume' and state = 'scheduled'";
    assert_eq!(sqlx::query(due).execute(&db.pool).await.unwrap().rows_affected(), 1);
    db.engine.waker.wake();
    eventually("it to wait again", || async {
        db.count("select count(*) from jobs where kind = 'resume' and state = 'scheduled' and due_at > now()").await
            == 1
    })
    .await;
    assert_eq!(agent(&api, company).await["status"], "paused");
    // The job is lost: upkeep sees to it.
    sqlx::query("delete from jobs where kind = 'resume'").execute(&db.pool).await.unwrap();
    sqlx::query("update agents set paused_until = now() - interval '1 minute', config = config - 'budget_limit_daily'")
        .execute(&db.pool)
        .await
        .unwrap();
    capx_core::engine::upkeep::all(&db.engine).await.unwrap();
    db.until(company, run, RunStatus::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_settled_before_a_call_that_is_not_made_is_settled_once() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let company = db.company(&["a"], "claude", json!({"max_tokens": 200})).await;
    let playbook = db.playbook(company, STEP).await;
    let api = db.api().await;
    let environment = provider.environment();
    let mut environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    environment.push(("CAPX_FAILPOINTS", "agent.turn_answered=kill@1"));
    let args = &["worker", "--concurrency", "8"];
    let worker = Process::start_with(&db, args, &environment);
    eventually("the agent", || async { agent(&api, company).await["status"] == "active" }).await;
    let run = db.start(company, playbook, json!({})).await;
    worker.dies_at("agent.turn_answered").await;
    let held = balances(&db, company).await.1;
    assert!(held > 0);
    // There is room for that call, and not for another one.
    sqlx::query("update agents set config = config || jsonb_build_object('budget_limit_daily', $1::float8)")
        .bind(held as f64 * 1.5 / 1e9)
        .execute(&db.pool)
        .await
        .unwrap();
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    eventually("the agent to be paused", || async { agent(&api, company).await["status"] == "paused" }).await;
    for _ in 0..2 {
        long_ago(&db).await;
        assert_eq!(balances(&db, company).await, (held, 0), "booked once");
    }
    let path = format!("/v1/companies/{company}/agents/a");
    assert_eq!(api.send("PATCH", &path, Some(json!({"config": {"budget_limit_daily": 5}}))).await.0, 200);
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(balances(&db, company).await, (held + CLAUDE_TURN, 0));
}

#[tokio::test(flavor = "multi_thread")]
async fn another_provider_that_answers_takes_nothing_back_of_the_first_ones_bill() {
    for (first, second) in [("custom", "claude"), ("claude", "custom")] {
        let db = Db::new().await;
        let provider = Provider::start(vec![Says::Words("done")]).await;
        provider.troubled(&[NO_END]);
        let mut config = custom(&provider, Some(0.25));
        config["timeout"] = json!("1s");
        config["max_tokens"] = json!(200);
        config["fallback"] = json!([{"adapter": second, "on": ["outage"]}]);
        let company = db.company(&["a"], first, config).await;
        let playbook = db.playbook(company, STEP).await;
        let _worker = db.worker_with(SHORT_LEASE, provider.providers());
        let run = db.start(company, playbook, json!({})).await;
        db.until(company, run, RunStatus::Completed).await;
        let (spent, held) = balances(&db, company).await;
        let unheard = db.count("select coalesce(sum(nanos), 0)::bigint from ledger where unheard").await;
        let answered = if second == "claude" { CLAUDE_TURN } else { 250_000_000 };
        assert!(unheard > 0, "{first}");
        assert_eq!((spent, held), (answered + unheard, 0), "{first}, then {second}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_waits_for_its_agent_is_not_taken_for_one_that_kills_workers() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let company = db.company(&["a"], "custom", custom(&provider, Some(0.25))).await;
    let api = db.api().await;
    let path = format!("/v1/companies/{company}/agents/a");
    let playbook = db.playbook(company, STEP).await;
    {
        let worker = db.worker_with(SHORT_LEASE, provider.providers());
        eventually("the agent", || async { agent(&api, company).await["status"] == "active" }).await;
        worker.stop().await;
    }
    assert_eq!(api.post(&format!("{path}/kill"), json!({})).await.0, 200);
    let run = db.start(company, playbook, json!({})).await;
    // Two workers have died over it.
    sqlx::query("update jobs set crash_count = 2 where kind = 'step'").execute(&db.pool).await.unwrap();
    let _worker = db.worker_with(SHORT_LEASE, provider.providers());
    eventually("the job to wait", || async {
        db.count("select count(*) from jobs where held_for is not null").await == 1
    })
    .await;
    assert_eq!(api.post(&format!("{path}/resume"), json!({})).await.0, 200);
    db.until(company, run, RunStatus::Completed).await;
}
