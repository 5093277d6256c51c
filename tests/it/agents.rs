//! Agents at work: turns of a model that are paid for once, tools that it asks for, and
//! whatever its provider does to it.

use std::time::Duration;

use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::run::RunStatus;
use serde_json::{Value, json};

use crate::harness::{Db, Running, SHORT_LEASE, eventually};
use crate::process::Process;
use crate::provider::{API_KEY, Provider, Says, Trouble, USED};

const STEP: &str = "name: work\nsteps:\n  - {id: do, role: a, action: research, params: {topic: tea}, retry: {max_attempts: 3, initial: 20ms}}\n";
/// What a turn of the fixture costs, by the list prices of the two default models.
const CLAUDE_TURN: i64 = (1_001 * 3_000 + 37 * 15_000 + 11 * 300 + 7 * 3_750) as i64;
const GPT_TURN: i64 = (1_001 * 2_500 + 37 * 10_000 + 11 * 1_250) as i64;

async fn begin(db: &Db, adapter: &str, config: Value) -> (CompanyId, RunId) {
    let company = db.company(&["a"], adapter, config).await;
    let playbook = db.playbook(company, STEP).await;
    (company, db.start(company, playbook, json!({})).await)
}

fn worker(db: &Db, provider: &Provider) -> Running {
    db.worker_with(SHORT_LEASE, provider.providers())
}

/// The output, or the error's message, of the one step.
async fn outcome(db: &Db, run: RunId) -> Value {
    let row: (Option<Value>, Option<Value>) = sqlx::query_as("select output, error from run_steps where run_id = $1")
        .bind(run.0)
        .fetch_one(&db.pool)
        .await
        .unwrap();
    row.0.or(row.1).unwrap_or_default()
}

/// What was spent, by the run, its step, the ledger and the journal: always the same.
async fn spent(db: &Db, run: RunId) -> i64 {
    let sums: Vec<i64> = sqlx::query_scalar(
        "select cost_nanos from runs where id = $1
         union all select sum(cost_nanos)::bigint from run_steps where run_id = $1
         union all select coalesce(sum(nanos), 0)::bigint from ledger where run_id = $1
         union all select coalesce(sum(cost_nanos), 0)::bigint from journal where run_id = $1",
    )
    .bind(run.0)
    .fetch_all(&db.pool)
    .await
    .unwrap();
    assert!(sums.windows(2).all(|pair| pair[0] == pair[1]), "run, step, ledger and journal: {sums:?}");
    sums[0]
}

fn tool_loop() -> Vec<Says> {
    vec![
        Says::Asks(vec![("file_write", json!({"path": "notes.txt", "content": "green tea"}))]),
        Says::Asks(vec![("file_read", json!({"path": "notes.txt"})), ("file_read", json!({"path": "gone.txt"}))]),
        Says::Words(r#"{"found": "green tea"}"#),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_model_uses_tools_until_it_answers_and_each_turn_is_paid_to_the_nano_dollar() {
    assert_eq!(USED, [1_001, 37, 11, 7], "as the prices above are computed");
    let provider = Provider::start(tool_loop()).await;
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    for (adapter, turn, model) in [("claude", CLAUDE_TURN, "claude-sonnet-4-6"), ("gpt", GPT_TURN, "gpt-4o")] {
        for stream in [true, false] {
            let (company, run) = begin(&db, adapter, json!({"stream": stream})).await;
            db.until(company, run, RunStatus::Completed).await;
            assert_eq!(outcome(&db, run).await, json!({"found": "green tea"}), "{adapter}");
            assert_eq!(spent(&db, run).await, 3 * turn, "{adapter}, stream {stream}");
            let models: Vec<String> = sqlx::query_scalar("select distinct model from ledger where run_id = $1")
                .bind(run.0)
                .fetch_all(&db.pool)
                .await
                .unwrap();
            assert_eq!(models, [model]);
        }
    }
    // What the tools gave, and what they could not, was told to the model.
    let last = provider.seen().last().unwrap().body.to_string();
    assert!(last.contains("green tea") && last.contains("gone.txt"), "{last}");
    assert!(provider.seen().iter().all(|seen| seen.path.starts_with("/v1/")));
    assert_eq!(provider.seen().len(), 12);
    let keys = provider.keys();
    assert!(keys.len() == 12 && keys.values().all(|times| *times == 1), "a key a turn");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_of_the_owners_may_use_tools_too() {
    let provider = Provider::start(tool_loop()).await;
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    let (company, run) = begin(&db, "custom", json!({"endpoint": format!("{}/custom", provider.url)})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(spent(&db, run).await, 750_000_000);
    let last = provider.seen().last().unwrap().body.clone();
    let told: Vec<_> =
        last["messages"].as_array().unwrap().iter().map(|message| message["role"].as_str().unwrap()).collect();
    assert_eq!(told, ["assistant", "tool", "assistant", "tool", "tool"]);
    assert_eq!(last["params"], json!({"topic": "tea"}));
    assert!(last["messages"][4]["is_error"].as_bool().unwrap());
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_provider_refuses_is_waited_for_or_told() {
    let busy = r#"{"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}"#;
    let quota = r#"{"error": {"message": "You exceeded your current quota", "type": "insufficient_quota", "code": "insufficient_quota"}}"#;
    let cases: [(&str, Trouble, Option<&str>); 12] = [
        ("claude", Trouble::Refuses(429, &[("retry-after", "1")], busy), None),
        (
            "claude",
            Trouble::Refuses(
                529,
                &[("retry-after", "0")],
                r#"{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}"#,
            ),
            None,
        ),
        ("gpt", Trouble::Refuses(429, &[("x-ratelimit-reset-requests", "20ms")], busy), None),
        ("gpt", Trouble::Refuses(500, &[], "{}"), None),
        ("claude", Trouble::BreaksOff, None),
        ("gpt", Trouble::Refuses(429, &[], quota), Some("You exceeded your current quota")),
        (
            "claude",
            Trouble::Refuses(
                401,
                &[],
                r#"{"error": {"type": "authentication_error", "message": "invalid x-api-key"}}"#,
            ),
            Some("invalid x-api-key"),
        ),
        ("claude", Trouble::Raw("application/json", "{\"content\": ["), Some("cannot be read")),
        ("gpt", Trouble::Raw("text/event-stream", "data: {\"choices\": 3}\n\n"), Some("cannot be read")),
        (
            "claude",
            Trouble::Raw(
                "application/json",
                r#"{"model": "m", "content": [], "usage": {"input_tokens": -1, "output_tokens": 1}}"#,
            ),
            Some("cannot be read"),
        ),
        ("gpt", Trouble::Endless(1 << 20, Duration::ZERO), Some("larger than")),
        (
            "custom",
            Trouble::Raw("application/json", r#"{"output": 1, "usage": {"input_tokens": -5}}"#),
            Some("negative"),
        ),
    ];
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    for (adapter, trouble, told) in cases {
        provider.troubled(&[trouble]);
        let (company, run) = begin(&db, adapter, json!({"endpoint": format!("{}/custom", provider.url)})).await;
        let wanted = if told.is_some() { RunStatus::Failed } else { RunStatus::Completed };
        db.until(company, run, wanted).await;
        let outcome = outcome(&db, run).await;
        match told {
            Some(told) => assert!(outcome["message"].as_str().is_some_and(|said| said.contains(told)), "{outcome}"),
            None => assert_eq!(outcome, json!({"text": "done"})),
        }
        spent(&db, run).await;
    }
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_endpoint_that_drips_ends_at_its_time() {
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    for adapter in ["claude", "custom"] {
        provider.troubled(&vec![Trouble::Endless(1, Duration::from_millis(50)); 3]);
        let config = json!({"endpoint": format!("{}/custom", provider.url), "timeout": "300ms"});
        let (company, run) = begin(&db, adapter, config).await;
        db.until(company, run, RunStatus::Failed).await;
        let outcome = outcome(&db, run).await;
        assert_eq!(outcome["code"], "timeout", "{outcome}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn wrong_arguments_are_told_to_the_model_and_not_for_ever() {
    let wrong = || Says::Asks(vec![("file_read", json!({"pth": "a"}))]);
    let provider = Provider::start(vec![
        wrong(),
        Says::Garbles("file_read", "{\"path\": "),
        Says::Asks(vec![("fly", json!({}))]),
        Says::Words("done"),
    ])
    .await;
    let db = Db::new().await;
    {
        let _worker = worker(&db, &provider);
        // Anthropic's stream with broken JSON in it is no answer at all; OpenAI gives a text.
        let (company, run) = begin(&db, "gpt", json!({})).await;
        db.until(company, run, RunStatus::Completed).await;
        let last = provider.seen().last().unwrap().body.to_string();
        for told in ["pth", "there is no tool `fly`; you have http_request, file_read, file_write"] {
            assert!(last.contains(told), "{last}");
        }
    }
    let stubborn = Provider::start((0..20).map(|_| wrong()).collect()).await;
    let db = Db::new().await;
    let _worker = worker(&db, &stubborn);
    let (company, run) = begin(&db, "claude", json!({})).await;
    db.until(company, run, RunStatus::Failed).await;
    let outcome = outcome(&db, run).await;
    assert!(outcome["message"].as_str().unwrap().contains("5 turns in a row"), "{outcome}");
    assert_eq!(stubborn.seen().len(), 5);
}

#[tokio::test(flavor = "multi_thread")]
async fn limits_end_what_would_not_end_itself() {
    let endless =
        Provider::start((0..20).map(|_| Says::Asks(vec![("file_read", json!({"path": "a"}))])).collect()).await;
    let cut = Provider::start(vec![Says::Stops("I was about to")]).await;
    let fine = Provider::start(vec![Says::Words("done")]).await;
    let db = Db::new().await;
    for (provider, config, told) in [
        (&endless, json!({"max_turns": 3}), "no answer after 3 turns"),
        (&cut, json!({"max_tokens": 5}), "max_tokens"),
        (&fine, json!({"model": "x"}), ""),
    ] {
        let worker = worker(&db, provider);
        let (company, run) = begin(&db, "claude", config).await;
        if told.is_empty() {
            db.until(company, run, RunStatus::Completed).await;
        } else {
            db.until(company, run, RunStatus::Failed).await;
            let outcome = outcome(&db, run).await;
            assert!(outcome["message"].as_str().unwrap().contains(told), "{outcome}");
        }
        // The next one's work is not for this one's provider.
        worker.stop().await;
    }
    assert_eq!(cut.seen()[0].body["max_tokens"], 5);
    // A model that nobody can name the price of is not asked.
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, &STEP.replace("role: a,", "role: a, model: claude-next,")).await;
    let run = db.start(company, playbook, json!({})).await;
    let _worker = worker(&db, &fine);
    db.until(company, run, RunStatus::Failed).await;
    let outcome = outcome(&db, run).await;
    assert!(outcome["message"].as_str().unwrap().contains("CAPX_PRICES"), "{outcome}");
    assert_eq!(fine.seen().len(), 1);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_goes_on_with_what_was_paid_for() {
    let provider = Provider::start(tool_loop()).await;
    let broken = Trouble::Refuses(500, &[], "{}");
    provider.troubled(&[Trouble::Nothing, Trouble::Nothing, broken.clone(), broken]);
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    let (company, run) = begin(&db, "claude", json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!((provider.seen().len(), provider.keys().len()), (5, 3), "only the third turn was asked for again");
    assert_eq!(spent(&db, run).await, 3 * CLAUDE_TURN);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_retry_after_an_answer_that_is_no_good_asks_anew() {
    let provider = Provider::start(vec![Says::Stops("I was about to")]).await;
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, &STEP.replace("initial: 20ms", "initial: 20ms, on: [invalid]")).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Failed).await;
    assert_eq!((provider.seen().len(), provider.keys().len()), (3, 3), "each try is another question");
    assert_eq!(spent(&db, run).await, 3 * CLAUDE_TURN);
}

#[tokio::test(flavor = "multi_thread")]
#[ignore = "needs the providers' clients from PyPI: .ci/sdks runs it"]
async fn the_official_clients_read_the_fixture() {
    let provider = Provider::start(tool_loop()).await;
    // Of 3 turns in two ways with two clients; what the fixture refuses comes by itself.
    let before = vec![Trouble::Nothing; 15];
    provider.troubled(&before);
    let busy = r#"{"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}"#;
    let overloaded = r#"{"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}}"#;
    let quota = r#"{"error": {"message": "no money", "type": "insufficient_quota", "code": "insufficient_quota"}}"#;
    provider.troubled(&[
        Trouble::Refuses(429, &[("retry-after", "7")], busy),
        Trouble::Refuses(529, &[], overloaded),
        Trouble::Refuses(429, &[], quota),
    ]);
    let python = std::env::var("CAPX_SDK_PYTHON").expect("CAPX_SDK_PYTHON");
    let (url, script) = (provider.url.clone(), concat!(env!("CARGO_MANIFEST_DIR"), "/.ci/sdks.py"));
    let run = move || std::process::Command::new(python).args([script, &url, API_KEY]).output().unwrap();
    let done = tokio::task::spawn_blocking(run).await.unwrap();
    assert!(
        done.status.success(),
        "{}{}",
        String::from_utf8_lossy(&done.stdout),
        String::from_utf8_lossy(&done.stderr)
    );
    assert_eq!(provider.seen().len(), 18);
}

/// Where it may die over leaving a turn to a person.
pub const LEFT: &[&str] = &["agent.turn_left"];
/// Where a worker may die over an agent's call.
pub const POINTS: &[&str] = &[
    "agent.turn_begun",
    "agent.turn_answered",
    "agent.turn_stored",
    "agent.call_begun",
    "agent.call_made",
    "agent.call_stored",
];

/// Three turns with three calls of tools.
fn three_turns() -> Vec<Says> {
    vec![
        Says::Asks(vec![("file_write", json!({"path": "a", "content": "1"})), ("file_read", json!({"path": "a"}))]),
        Says::Asks(vec![("file_write", json!({"path": "b", "content": "2"}))]),
        Says::Words("done"),
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_dies_over_a_call_no_stored_answer_is_bought_again() {
    for point in POINTS {
        for hit in 1..=3 {
            let provider = Provider::start(three_turns()).await;
            let db = Db::new().await;
            let (company, run) = begin(&db, "claude", json!({})).await;
            let order = format!("{point}=kill@{hit}");
            let environment = provider.environment();
            let mut environment: Vec<(&str, &str)> =
                environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
            environment.push(("CAPX_FAILPOINTS", &order));
            let args = &["worker", "--concurrency", "8"];
            Process::start_with(&db, args, &environment).dies_at(point).await;
            environment.pop();
            let _other = Process::start_with(&db, args, &environment);
            db.until(company, run, RunStatus::Completed).await;
            // An answer that came and could not be stored any more is asked for again, under
            // its key; any other only once.
            let keys = provider.keys();
            assert_eq!(keys.len(), 3, "{point}@{hit}: a key a turn");
            let again = u32::from(*point == "agent.turn_answered");
            let calls: u32 = keys.values().sum();
            assert_eq!(calls, 3 + again, "{point}@{hit}: {keys:?}");
            // What nobody has heard of is booked besides, at its worst.
            let unheard = db.count("select coalesce(sum(nanos), 0)::bigint from ledger where unheard").await;
            assert_eq!(unheard > 0, ["agent.turn_begun", "agent.turn_answered"].contains(point), "{point}@{hit}");
            assert_eq!(spent(&db, run).await, 3 * CLAUDE_TURN + unheard, "{point}@{hit}");
            let results: i64 = db.count("select count(*) from journal where state = 'done'").await;
            assert_eq!(results, 6, "{point}@{hit}: three turns and three calls");
            db.assert_nothing_stranded().await;
        }
    }
}

/// With every point: no call is made twice before a person has let it be.
#[tokio::test(flavor = "multi_thread")]
async fn an_owner_who_would_rather_wait_pays_for_nothing_twice() {
    for point in POINTS {
        let provider = Provider::start(three_turns()).await;
        let db = Db::new().await;
        let (company, run) = begin(&db, "claude", json!({"on_unknown": "review"})).await;
        let order = format!("{point}=kill@2");
        let environment = provider.environment();
        let mut environment: Vec<(&str, &str)> =
            environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
        environment.push(("CAPX_FAILPOINTS", &order));
        let args = &["worker", "--concurrency", "8"];
        Process::start_with(&db, args, &environment).dies_at(point).await;
        environment.pop();
        let _other = Process::start_with(&db, args, &environment);
        let unknown = ["agent.turn_begun", "agent.turn_answered"].contains(point);
        if unknown {
            let failed = db.until(company, run, RunStatus::Failed).await;
            let message = failed.error.unwrap()["message"].as_str().unwrap().to_owned();
            assert!(message.contains("retry the run to ask it again"), "{point}: {message}");
        } else {
            db.until(company, run, RunStatus::Completed).await;
        }
        assert!(provider.keys().values().all(|times| *times == 1), "{point}: {:?}", provider.keys());
        if unknown {
            let mut tx = db.engine.pool.begin().await.unwrap();
            capx_core::engine::retry::retry_run(&db.engine, &mut tx, company, run, "test").await.unwrap();
            tx.commit().await.unwrap();
            db.until(company, run, RunStatus::Completed).await;
        }
        let unheard = db.count("select coalesce(sum(nanos), 0)::bigint from ledger where unheard").await;
        assert_eq!((unheard > 0, spent(&db, run).await), (unknown, 3 * CLAUDE_TURN + unheard), "{point}");
        let of_journal = "select sum(cost_nanos)::bigint from journal";
        assert_eq!(db.count(of_journal).await, 3 * CLAUDE_TURN + unheard, "{point}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_breaks_off_is_left_to_such_an_owner_too() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    provider.troubled(&[Trouble::BreaksOff]);
    let config = json!({"on_unknown": "review", "fallback": [{"adapter": "gpt", "on": ["outage"]}]});
    let (company, run) = begin(&db, "claude", config).await;
    let _worker = worker(&db, &provider);
    let failed = db.until(company, run, RunStatus::Failed).await;
    assert!(format!("{:?}", failed.error).contains("retry the run to ask it again"), "{:?}", failed.error);
    assert_eq!(provider.seen().len(), 1, "neither it nor another was asked again");
    let mut tx = db.engine.pool.begin().await.unwrap();
    capx_core::engine::retry::retry_run(&db.engine, &mut tx, company, run, "test").await.unwrap();
    tx.commit().await.unwrap();
    db.engine.waker.wake();
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(provider.seen().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_dies_over_leaving_a_turn_to_a_person_leaves_it_all_the_same() {
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let db = Db::new().await;
    let (company, run) = begin(&db, "claude", json!({"on_unknown": "review"})).await;
    let environment = provider.environment();
    let environment: Vec<(&str, &str)> = environment.iter().map(|(name, value)| (*name, value.as_str())).collect();
    let args = &["worker", "--concurrency", "8"];
    for point in ["agent.turn_answered", LEFT[0]] {
        let order = format!("{point}=kill@1");
        let mut environment = environment.clone();
        environment.push(("CAPX_FAILPOINTS", &order));
        Process::start_with(&db, args, &environment).dies_at(point).await;
    }
    let _other = Process::start_with(&db, args, &environment);
    db.until(company, run, RunStatus::Failed).await;
    assert_eq!(provider.seen().len(), 1);
    let unheard = db.count("select count(*) from ledger where unheard").await;
    assert_eq!(unheard, 1, "it is booked once");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_cannot_work_says_why_and_begins_nothing_until_it_is_mended() {
    let db = Db::new().await;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    provider.troubled(&[Trouble::Refuses(401, &[], r#"{"error": "no such key"}"#)]);
    let _worker = worker(&db, &provider);
    let api = db.api().await;
    let config = json!({"endpoint": format!("{}/custom", provider.url), "max_cost": 0.25});
    let agent = json!({"role": "a", "adapter": "custom", "instructions": "x", "config": config});
    let company = api.company(json!({"name": "c", "agents": [agent]})).await;
    let playbook = db.playbook(company, STEP).await;
    let run = db.start(company, playbook, json!({})).await;
    db.until(company, run, RunStatus::Failed).await;
    let path = format!("/v1/companies/{company}/agents/a");
    let shown = api.get(&path).await.1["data"].clone();
    assert_eq!(shown["status"], "errored", "{shown}");
    assert!(shown["error"].as_str().unwrap().contains("401"), "{shown}");
    let told = "select count(*) from events where event = 'agent.state_changed' and data ->> 'to' = 'errored'";
    assert_eq!(db.count(told).await, 1);
    // It asks nobody any more.
    let next = db.start(company, playbook, json!({})).await;
    let failed = db.until(company, next, RunStatus::Failed).await;
    assert!(format!("{:?}", failed.error).contains("the agent `a` is errored"), "{:?}", failed.error);
    assert_eq!(provider.seen().len(), 1);
    // Mended, it goes on.
    assert_eq!(api.post(&format!("{path}/resume"), json!({})).await.0, 200);
    let next = db.start(company, playbook, json!({})).await;
    db.until(company, next, RunStatus::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_refusal_closes_the_provider_for_all_and_one_probe_opens_it() {
    let busy = r#"{"type": "error", "error": {"type": "rate_limit_error", "message": "slow down"}}"#;
    let provider = Provider::start(vec![Says::Words("done")]).await;
    provider.troubled(&[
        Trouble::Refuses(429, &[("retry-after", "2")], busy),
        // The probe is refused, too.
        Trouble::Refuses(529, &[("retry-after", "1")], busy),
    ]);
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let playbook = db.playbook(company, STEP).await;
    // The first is refused before any other asks.
    let first = db.start(company, playbook, json!({})).await;
    let _workers = [worker(&db, &provider), worker(&db, &provider)];
    eventually("the gate to close", || async { db.count("select count(*) from provider_gates").await == 1 }).await;
    let mut runs = vec![first];
    for _ in 0..20 {
        runs.push(db.start(company, playbook, json!({})).await);
    }
    eventually("the others to wait", || async {
        db.count("select count(*) from jobs where kind = 'step' and state = 'scheduled' and attempt = 0").await == 21
    })
    .await;
    assert_eq!(provider.seen().len(), 1, "nobody else has asked");
    for run in &runs {
        db.until(company, *run, RunStatus::Completed).await;
    }
    assert_eq!(provider.seen().len(), 23, "two were refused, one of them a probe, and each was answered once");
    assert_eq!(db.count("select count(*) from run_steps where attempt <> 1").await, 0, "no try was charged for it");
    assert_eq!(db.count("select count(*) from provider_gates").await, 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn another_model_stands_in_where_the_owner_says_so() {
    let poor = r#"{"error": {"message": "You exceeded your quota", "code": "insufficient_quota"}}"#;
    let down = r#"{"type": "error", "error": {"type": "api_error", "message": "down"}}"#;
    for (trouble, on, model) in [
        (Trouble::Refuses(429, &[], poor), json!(["quota"]), Some("gpt-4o")),
        (Trouble::Refuses(500, &[], down), json!(["outage"]), Some("gpt-4o")),
        (Trouble::Refuses(429, &[("retry-after", "60")], down), json!(["outage"]), Some("gpt-4o")),
        (Trouble::Refuses(429, &[], poor), json!(["outage"]), None),
    ] {
        let provider = Provider::start(vec![Says::Words("done")]).await;
        provider.troubled(std::slice::from_ref(&trouble));
        let db = Db::new().await;
        let _worker = worker(&db, &provider);
        let (company, run) = begin(&db, "claude", json!({"fallback": [{"adapter": "gpt", "on": on}]})).await;
        match model {
            Some(model) => {
                db.until(company, run, RunStatus::Completed).await;
                let paid: Vec<String> =
                    sqlx::query_scalar("select model from ledger").fetch_all(&db.pool).await.unwrap();
                assert_eq!(paid, [model]);
                assert_eq!(spent(&db, run).await, GPT_TURN);
            }
            None => {
                db.until(company, run, RunStatus::Failed).await;
            }
        }
    }
    // No money for the one, and enough for the other.
    let provider = Provider::start(vec![Says::Words("done")]).await;
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    let cheap = json!({"fallback": [{"adapter": "gpt", "model": "gpt-4o-mini", "on": ["budget"]}], "budget_limit_daily": 0.01, "max_tokens": 100, "tools": []});
    let (company, run) = begin(&db, "claude", cheap).await;
    db.until(company, run, RunStatus::Completed).await;
    let paid: Vec<String> = sqlx::query_scalar("select model from ledger").fetch_all(&db.pool).await.unwrap();
    assert_eq!(paid, ["gpt-4o-mini"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_agent_that_goes_round_in_circles_is_stopped_with_the_evidence() {
    let turns = (0..30).map(|_| Says::Asks(vec![("file_read", json!({"path": "gone"}))])).collect();
    let provider = Provider::start(turns).await;
    let db = Db::new().await;
    let _worker = worker(&db, &provider);
    let (company, run) = begin(&db, "claude", json!({})).await;
    let failed = db.until(company, run, RunStatus::Failed).await;
    assert!(failed.error.unwrap()["message"].as_str().unwrap().contains("the same 8 times: "));
    assert_eq!(provider.seen().len(), 8);
    let (status, by): (String, String) =
        sqlx::query_as("select status, paused_by from agents").fetch_one(&db.pool).await.unwrap();
    assert_eq!((status.as_str(), by.as_str()), ("paused", "breaker"));
}
