//! Random crash schedules: workers that vanish at arbitrary points, again and
//! again, until the runs are done. A short form runs with the tests; the full
//! one with `CAPX_SCHEDULES=2000 cargo test --release --test it schedules`.

use std::time::Duration;

use capx_core::domain::address::Rules;
use capx_core::domain::run::RunStatus;
use capx_core::engine::{Engine, Waker};
use capx_core::store::{self, PoolKind};
use capx_workers::adapters::Providers;
use capx_workers::egress::Egress;
use capx_workers::{Hands, Worker, WorkerConfig};
use serde_json::json;
use tokio_util::sync::CancellationToken;

use crate::harness::witness::Witness;
use crate::harness::{Db, Seeded, eventually};

/// Schedules with the tests.
const SHORT: usize = 24;
/// Schedules under way at once.
const TOGETHER: usize = 4;
const RUNS: usize = 4;
const LEASE: Duration = Duration::from_millis(300);

/// A worker in a runtime of its own, which can be taken away from it at any
/// await: its connections break, its lease runs out, nobody says goodbye.
struct Mortal {
    runtime: Option<tokio::runtime::Runtime>,
}

impl Mortal {
    fn start(db: &Db) -> Self {
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().unwrap();
        let (url, files) = (db.url.clone(), db.files.clone());
        runtime.spawn(async move {
            let pool = store::pool(&url, PoolKind::Queue, 5).unwrap();
            let egress = Egress::new(Rules::default().with_loopback()).unwrap();
            let providers = Providers::offline();
            let config =
                WorkerConfig { slots: 4, lease: LEASE, poll: Duration::from_millis(100), ..WorkerConfig::default() };
            let claims = store::pool(&url, PoolKind::Claims, 1).unwrap();
            let engine = Engine::new(pool.clone()).with_claims(claims).with_waker(Waker::start(&url));
            let worker = Worker::new(engine, &url, config, Hands::new(egress, files, providers)).listening(pool);
            worker.run(CancellationToken::new()).await.unwrap();
        });
        Self { runtime: Some(runtime) }
    }
}

impl Drop for Mortal {
    fn drop(&mut self) {
        if let Some(runtime) = self.runtime.take() {
            runtime.shutdown_background();
        }
    }
}

/// A playbook, and what a run of it must come to.
#[derive(Default)]
struct Drawn {
    steps: String,
    /// Ends of steps that are told, those of called runs too.
    ends: i64,
    /// Rows of steps that are done.
    rows: i64,
    items: i64,
    effects: usize,
}

/// What the drawn playbooks call.
const CALLED: &str = "name: called
steps:
  - {id: only, action: http.request, params: {method: POST, url: 'URL/called'}, retry: {initial: 10ms}}
";

/// Steps of all kinds, one after another or as a graph, now and then with a loop.
fn draw(random: &mut Seeded, url: &str) -> Drawn {
    let mut drawn = Drawn::default();
    let graph = random.below(3) == 0;
    let count = 2 + random.below(4);
    for i in 0..count {
        let needs = match random.below(3) {
            _ if !graph => String::new(),
            0 => ", needs: []".to_owned(),
            _ if i == 0 => ", needs: []".to_owned(),
            _ => format!(", needs: [s{}]", random.below(i)),
        };
        let call =
            format!("action: http.request, params: {{method: POST, url: '{url}/s{i}'}}, retry: {{initial: 10ms}}");
        let what = match random.below(7) {
            0 | 1 => {
                drawn.effects += 1;
                call
            }
            2 => format!("role: a, action: think, params: {{i: {i}}}"),
            3 => {
                let items = 1 + random.below(6);
                drawn.items += items as i64;
                drawn.effects += items as usize;
                let list: Vec<String> = (0..items).map(|item| item.to_string()).collect();
                format!("for_each: [{}], max_parallel: {}, {call}", list.join(", "), 1 + random.below(3))
            }
            4 => "sleep: 5ms".to_owned(),
            5 => {
                drawn.effects += 1;
                drawn.ends += 1;
                drawn.rows += 1;
                "playbook: called".to_owned()
            }
            _ => {
                drawn.effects += 1;
                format!("{call}, rubric: {{tone: 0.5, judge: a}}")
            }
        };
        drawn.steps += &format!("  - {{id: s{i}, {what}{needs}}}\n");
        drawn.ends += 1;
        drawn.rows += 1;
    }
    if !graph && random.below(2) == 0 {
        drawn.steps +=
            &format!("  - {{id: again, action: http.request, params: {{method: POST, url: '{url}/again'}}}}\n");
        drawn.steps += "  - {goto: again, max_retries: 2}\n";
        drawn.effects += 3;
        drawn.ends += 3;
        // The jump has a row, too.
        drawn.rows += 2;
    }
    drawn
}

async fn schedule(db: &Db, seed: u64) -> i64 {
    let mut random = Seeded(seed);
    let witness = Witness::start(&[]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let Drawn { steps, ends, rows, items, effects } = draw(&mut random, &witness.url);
    db.playbook(company, &CALLED.replace("URL", &witness.url)).await;
    let playbook = db.playbook(company, &format!("name: schedule-{seed}\nsteps:\n{steps}")).await;
    let mut runs = Vec::new();
    for _ in 0..RUNS {
        runs.push(db.start(company, playbook, json!({})).await);
    }
    for _ in 0..1 + random.below(3) {
        let sessions = db.count("select coalesce(max(id), 0) from worker_sessions").await;
        let mortal = Mortal::start(db);
        // Dead at its start now and then, else in the midst of work.
        if random.below(5) > 0 {
            eventually("its session", || async {
                db.count("select coalesce(max(id), 0) from worker_sessions").await > sessions
            })
            .await;
        }
        tokio::time::sleep(Duration::from_micros(random.below(30_000))).await;
        drop(mortal);
    }
    let survivor = Mortal::start(db);
    for run in &runs {
        db.until(company, *run, RunStatus::Completed).await;
    }
    drop(survivor);
    let found: (i64, i64, i64) = sqlx::query_as(
        "select (select count(*) from events where company_id = $1 and event = 'step.completed'),
                (select count(*) from run_steps where company_id = $1 and status = 'completed'),
                (select count(*) from run_items where company_id = $1 and status = 'completed')",
    )
    .bind(company.0)
    .fetch_one(&db.pool)
    .await
    .unwrap();
    let runs = RUNS as i64;
    let expected = (ends * runs, rows * runs, items * runs);
    assert_eq!(found, expected, "seed {seed}: a step or an item was lost or completed twice\n{steps}");
    assert_eq!(witness.calls().len(), effects * RUNS, "seed {seed}: one key an effect\n{steps}");
    i64::from(witness.calls().values().sum::<u32>()) - (effects * RUNS) as i64
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn random_crashes_lose_nothing_and_repeat_nothing_that_is_done() {
    let schedules: usize = std::env::var("CAPX_SCHEDULES").ok().and_then(|n| n.parse().ok()).unwrap_or(SHORT);
    let base: u64 = std::env::var("CAPX_SEED").ok().and_then(|n| n.parse().ok()).unwrap_or(1);
    let mut tasks = Vec::new();
    for lane in 0..TOGETHER {
        tasks.push(tokio::spawn(async move {
            let db = Db::new().await;
            let mut repeated = 0;
            for at in (lane..schedules).step_by(TOGETHER) {
                repeated += schedule(&db, base + at as u64).await;
            }
            db.assert_nothing_stranded().await;
            let deaths = db.count("select count(*) from worker_sessions where state = 'dead'").await;
            (deaths, repeated)
        }));
    }
    let (mut deaths, mut repeated) = (0, 0);
    for task in tasks {
        let (d, r) = task.await.unwrap();
        deaths += d;
        repeated += r;
    }
    // The faults happened: else this test has shown nothing.
    assert!(deaths > 0, "no worker was found dead");
    println!("{schedules} schedules, {deaths} dead sessions, {repeated} calls repeated under their key");
}
