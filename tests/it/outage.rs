//! The database goes away for API and workers alike, while they are at work:
//! clients are told so, the work waits, and afterwards all of it is done, once.

use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use capx::serve::{self, WorkerArgs};
use capx_core::domain::ids::{CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::engine::secrets::Keyring;
use serde_json::{Value, json};
use tokio_util::sync::{CancellationToken, DropGuard};

use crate::harness::witness::Witness;
use crate::harness::{Api, Db, SHORT_LEASE, eventually};
use crate::proxy::Proxy;

/// Calls of each run.
const STEPS: i64 = 4;
/// How long the database is away, unless `CAPX_OUTAGE_SECONDS` says otherwise:
/// more than two short leases.
const SHORT: Duration = Duration::from_secs(4);

fn outage() -> Duration {
    std::env::var("CAPX_OUTAGE_SECONDS").ok().and_then(|s| s.parse().ok()).map_or(SHORT, Duration::from_secs)
}

/// A worker as the program makes it.
struct Working {
    task: tokio::task::JoinHandle<()>,
    stop: DropGuard,
    /// How often it was started again.
    restarts: Arc<AtomicUsize>,
}

impl Working {
    fn start(db: &Db, lease: Duration) -> Self {
        let args = WorkerArgs {
            queues: Vec::new(),
            concurrency: 16,
            lease,
            drain: Duration::from_secs(20),
            workspace: db.files.clone(),
            unanswered: Duration::from_secs(3),
            allow_programs: false,
        };
        let stop = CancellationToken::new();
        let restarts = Arc::new(AtomicUsize::new(0));
        let (token, count, url) = (stop.clone(), Arc::clone(&restarts), db.url.clone());
        // One that gives up is started again, as whoever supervises it would.
        let task = tokio::spawn(async move {
            while serve::worker(&url, &args, Keyring::default(), true).await.unwrap().run(token.clone()).await.is_err()
            {
                count.fetch_add(1, Relaxed);
            }
        });
        Self { task, stop: stop.drop_guard(), restarts }
    }

    async fn stop(self) {
        drop(self.stop);
        self.task.await.unwrap();
    }
}

/// What its clients were told.
#[derive(Default)]
struct Told {
    accepted: Mutex<Vec<RunId>>,
    refused: AtomicUsize,
}

/// How many clients there are.
const CLIENTS: usize = 4;

/// Clients that start runs, each one after the other, until told to stop.
struct Clients {
    told: Arc<Told>,
    stop: CancellationToken,
    tasks: tokio::task::JoinSet<()>,
}

impl Clients {
    fn start(api: &Api, company: CompanyId, playbook: PlaybookId) -> Self {
        let (told, stop) = (Arc::new(Told::default()), CancellationToken::new());
        let request = api
            .client
            .post(format!("{}/v1/companies/{company}/playbooks/{playbook}/run", api.base))
            .bearer_auth(&api.key);
        let mut tasks = tokio::task::JoinSet::new();
        for _ in 0..CLIENTS {
            tasks.spawn(ask(request.try_clone().unwrap(), Arc::clone(&told), stop.clone()));
        }
        Self { told, stop, tasks }
    }

    fn accepted(&self) -> usize {
        self.told.accepted.lock().unwrap().len()
    }

    async fn stop(mut self) -> Arc<Told> {
        self.stop.cancel();
        while let Some(ended) = self.tasks.join_next().await {
            ended.unwrap();
        }
        self.told
    }
}

/// Asks again and again, and takes nothing for an answer but a run, or a 503
/// as it is documented.
async fn ask(request: reqwest::RequestBuilder, told: Arc<Told>, stop: CancellationToken) {
    while !stop.is_cancelled() {
        let answer = request.try_clone().unwrap().send().await.unwrap();
        let (status, retry) = (answer.status().as_u16(), answer.headers().contains_key("retry-after"));
        let said: Value = serde_json::from_str(&answer.text().await.unwrap()).unwrap();
        if status == 201 {
            told.accepted.lock().unwrap().push(said["data"]["run_id"].as_str().unwrap().parse().unwrap());
        } else {
            assert!(status == 503 && retry && said["error"]["code"] == "unavailable", "{status}: {said}");
            told.refused.fetch_add(1, Relaxed);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
}

async fn playbook(db: &Db, witness: &Witness) -> (CompanyId, PlaybookId) {
    let company = db.company(&["a"], "claude", json!({})).await;
    let steps: String = (0..STEPS)
        .map(|i| format!("  - {{id: s{i}, action: http.request, params: {{method: POST, url: '{}'}}}}\n", witness.url))
        .collect();
    (company, db.playbook(company, &format!("name: outage\nsteps:\n{steps}")).await)
}

/// Every run there is has ended well, every step of it once.
async fn assert_whole(db: &Db, witness: &Witness, company: CompanyId, accepted: &[RunId]) {
    for run in accepted {
        db.until(company, *run, RunStatus::Completed).await;
    }
    // And those whose answer was lost.
    eventually("every run to end", || async {
        db.count("select count(*) from runs where status <> 'completed'").await == 0
    })
    .await;
    let runs = db.count("select count(*) from runs").await;
    assert_eq!(db.count("select count(*) from events where event = 'step.completed'").await, runs * STEPS);
    assert_eq!(db.count("select count(*) from run_steps where status = 'completed'").await, runs * STEPS);
    assert_eq!(witness.calls().len() as i64, runs * STEPS, "one key an effect");
    db.assert_nothing_stranded().await;
}

/// Waits until several handlers wait for the witness.
async fn handlers_under_way(witness: &Witness) {
    eventually("handlers under way", || std::future::ready(witness.held_calls() > 4)).await;
}

/// The database is away for a while; says how many sessions there were and
/// how many calls were made more than once.
async fn goes_away(lease: Duration, length: Duration) -> (i64, usize) {
    let db = Db::new().await;
    let (far, proxy) = db.behind_a_proxy().await;
    let witness = Witness::start(&[]).await;
    let (company, playbook) = playbook(&db, &witness).await;
    let api = far.api().await;
    let worker = Working::start(&far, lease);
    let clients = Clients::start(&api, company, playbook);
    eventually("work to flow", || async { db.count("select count(*) from runs where status = 'completed'").await > 5 })
        .await;
    // Cut in the middle of handlers, which end while the database is away.
    witness.hold(true);
    handlers_under_way(&witness).await;
    proxy.cut();
    let until = Instant::now() + length;
    let refused = clients.told.refused.load(Relaxed);
    witness.hold(false);
    let done = "select count(*) from run_steps where status = 'completed'";
    eventually("clients to be refused", || std::future::ready(clients.told.refused.load(Relaxed) > refused)).await;
    let reached = db.count(done).await;
    while Instant::now() < until {
        let (status, answer) = api.get("/v1/companies").await;
        assert_eq!((status, &answer["error"]["code"]), (503, &json!("unavailable")), "{answer}");
        let (status, answer) = api.get("/readyz").await;
        assert_eq!((status, &answer["reason"]), (503, &json!("the database is away")), "{answer}");
        assert_eq!(api.get("/healthz").await.0, 200);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(db.count(done).await, reached, "something went through the cut");
    assert!(!worker.task.is_finished(), "the worker did not wait");
    assert!(proxy.dropped() > 0 && clients.told.refused.load(Relaxed) > 0, "the fault did not happen");

    proxy.restore();
    eventually("the API to be ready", || async { api.get("/readyz").await.0 == 200 }).await;
    // Ready by one connection; others may still find out that theirs are dead.
    eventually("the API to answer", || async { api.get("/v1/companies").await.0 == 200 }).await;
    let accepted = clients.accepted();
    eventually("runs to be accepted again", || std::future::ready(clients.accepted() > accepted + 5)).await;
    let told = clients.stop().await;
    let accepted = told.accepted.lock().unwrap().clone();
    assert_whole(&db, &witness, company, &accepted).await;
    worker.stop().await;
    let sessions = db.count("select count(*) from worker_sessions").await;
    let repeated = witness.calls().values().filter(|calls| **calls > 1).count();
    println!(
        "{} runs, {sessions} sessions, {repeated} calls repeated, {} refused",
        accepted.len(),
        told.refused.load(Relaxed)
    );
    (sessions, repeated)
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_longer_than_the_lease_loses_and_doubles_nothing() {
    let (sessions, repeated) = goes_away(SHORT_LEASE, outage()).await;
    assert!(sessions > 1, "no session was lost");
    assert!(repeated > 0, "no attempt was interrupted");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_outage_shorter_than_the_lease_repeats_nothing() {
    let (sessions, repeated) = goes_away(outage() * 10, outage() / 4).await;
    assert_eq!((sessions, repeated), (1, 0), "outcomes did not wait for the database");
}

/// A worker in the middle of its work, behind a proxy.
async fn at_work() -> (Db, Proxy, Witness, CompanyId, PlaybookId, Working) {
    let db = Db::new().await;
    let (far, proxy) = db.behind_a_proxy().await;
    let witness = Witness::start(&[]).await;
    let (company, playbook) = playbook(&db, &witness).await;
    let worker = Working::start(&far, SHORT_LEASE);
    witness.hold(true);
    for _ in 0..20 {
        db.start(company, playbook, json!({})).await;
    }
    handlers_under_way(&witness).await;
    (db, proxy, witness, company, playbook, worker)
}

/// The same, cut off without anybody being told, for longer than its lease.
async fn partitioned() -> (Db, Proxy, Witness, CompanyId, PlaybookId, Working) {
    let (db, proxy, witness, company, playbook, worker) = at_work().await;
    proxy.silence();
    witness.hold(false);
    let silent = "select count(*) from worker_sessions where ended_at is null
                  and beat_at < clock_timestamp() - 1.5 * lease_ms * interval '1 millisecond'";
    eventually("its lease to be out", || async { db.count(silent).await == 1 }).await;
    (db, proxy, witness, company, playbook, worker)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_when_a_partition_breaks_its_connections() {
    let (db, proxy, witness, company, _, worker) = partitioned().await;
    assert!(db.count("select count(*) from runs where status <> 'completed'").await > 0, "the fault did not happen");
    proxy.cut();
    proxy.restore();
    assert_whole(&db, &witness, company, &[]).await;
    assert!(db.count("select count(*) from worker_sessions").await > 1, "no session was lost");
    worker.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn others_take_over_in_a_partition_and_what_comes_late_writes_nothing() {
    let (db, proxy, witness, company, playbook, far) = partitioned().await;
    let near = Working::start(&db, SHORT_LEASE);
    assert_whole(&db, &witness, company, &[]).await;
    // Now what was said into the silence arrives.
    proxy.restore();
    let active = "select count(*) from worker_sessions where state = 'active'";
    eventually("a new session of the far one", || async { db.count(active).await == 2 }).await;
    near.stop().await;
    let run = db.start(company, playbook, json!({})).await;
    assert_whole(&db, &witness, company, &[run]).await;
    far.stop().await;
}

// The beat reconnects and keeps the session alive, while claims and commits
// wait for ever on connections that nobody answers: the jobs are in hand, and
// nobody may take them over.
#[tokio::test(flavor = "multi_thread")]
async fn a_worker_goes_on_when_its_connections_are_dead_and_nobody_says_so() {
    let (db, proxy, witness, company, _, worker) = at_work().await;
    proxy.strand();
    witness.hold(false);
    assert_whole(&db, &witness, company, &[]).await;
    assert!(worker.restarts.load(Relaxed) > 0, "it went on by itself: the fault did not happen");
    worker.stop().await;
}
