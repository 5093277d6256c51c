//! Whole processes that die at named points, at once and without a goodbye:
//! whatever they were doing, others bring it to the same end.

use std::io::Read;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::failpoint;
use serde_json::json;

use crate::harness::witness::Witness;
use crate::harness::{Db, eventually};

/// A `capx` process; killed when dropped.
struct Process {
    child: Child,
}

impl Process {
    fn start(db: &Db, args: &[&str], failpoints: &str) -> Self {
        let child = Command::new(env!("CARGO_BIN_EXE_capx"))
            .args(args)
            .env("CAPX_DATABASE_URL", &db.url)
            .env("CAPX_LEASE", "600ms")
            .env("CAPX_FAILPOINTS", failpoints)
            .env("CAPX_OFFLINE_MODEL", "1")
            .env("CAPX_EGRESS_ALLOW", "127.0.0.0/8")
            .env("CAPX_ALLOW_UNSAFE_DATABASE", "1")
            .env("CAPX_WORKSPACE", &db.files)
            .env("CAPX_LOG", "info")
            .env("CAPX_LOG_FORMAT", "json")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        Self { child }
    }

    fn worker(db: &Db, failpoints: &str) -> Self {
        Self::start(db, &["worker", "--concurrency", "8"], failpoints)
    }

    /// Kills it, and asserts that it was at a point before.
    fn was_at(mut self, point: &str) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains(&format!("failpoint fired: {point}")), "{point} was not reached:\n{said}");
    }

    /// Waits until it has died at its point, and asserts that it was there.
    async fn dies_at(mut self, point: &str) {
        eventually("the process to die", || {
            let ended = self.child.try_wait().unwrap().is_some();
            async move { ended }
        })
        .await;
        let mut said = String::new();
        self.child.stderr.take().unwrap().read_to_string(&mut said).unwrap();
        assert!(said.contains(&format!("failpoint fired: {point}")), "{point} was not reached:\n{said}");
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A run with two effects and something between them.
async fn effects(db: &Db, witness: &Witness, name: &str) -> (CompanyId, RunId) {
    let company = db.company(&["a"], "claude", json!({})).await;
    let call = |id: &str| {
        format!(
            "  - {{id: {id}, action: http.request, params: {{method: POST, url: '{}'}}, retry: {{max_attempts: 3, initial: 20ms}}}}\n",
            witness.url
        )
    };
    let yaml = format!(
        "name: {name}\nsteps:\n{}  - {{id: mid, action: transform, params: {{v: '${{steps.first.output.status}}'}}}}\n{}",
        call("first"),
        call("last")
    );
    let playbook = db.playbook(company, &yaml).await;
    (company, db.start(company, playbook, json!({})).await)
}

/// The run is whole: every step once, each effect under one key.
async fn assert_whole(db: &Db, witness: &Witness, company: CompanyId, run: RunId, point: &str) {
    db.until(company, run, RunStatus::Completed).await;
    assert_eq!(witness.calls().len(), 2, "{point}: one key an effect: {:?}", witness.calls());
    let completed: i64 =
        sqlx::query_scalar("select count(*) from events where run_id = $1 and event = 'step.completed'")
            .bind(run.0)
            .fetch_one(&db.pool)
            .await
            .unwrap();
    assert_eq!(completed, 3, "{point}: a step completed twice or never");
    db.assert_nothing_stranded().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_may_die_at_every_point_of_its_way() {
    let points = [
        "claim.before",
        "claim.after_commit",
        "load.before",
        "attempt.before_handler",
        "attempt.after_handler",
        "commit.before",
        "commit.after",
    ];
    for point in points {
        assert!(failpoint::POINTS.contains(&point));
        let db = Db::new().await;
        let witness = Witness::start(&[]).await;
        let (company, run) = effects(&db, &witness, "crash").await;
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        assert_whole(&db, &witness, company, run, point).await;
        if point == "commit.after" {
            assert!(witness.calls().values().all(|calls| *calls == 1), "what was committed was done again");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn whoever_takes_over_may_die_too() {
    for point in ["sweep.before", "sweep.after_commit"] {
        let db = Db::new().await;
        let witness = Witness::start(&[]).await;
        let (company, run) = effects(&db, &witness, "takeover").await;
        Process::worker(&db, "attempt.after_handler=kill@1").dies_at("attempt.after_handler").await;
        Process::worker(&db, &format!("{point}=kill@1")).dies_at(point).await;
        let _survivor = Process::worker(&db, "");
        assert_whole(&db, &witness, company, run, point).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn lost_answers_of_the_database_lose_and_double_nothing() {
    // The answers to commits, and to a claim: found again, and given back.
    for (point, hit) in [("commit.before", 2), ("commit.after", 2), ("claim.after_commit", 1)] {
        let db = Db::new().await;
        let witness = Witness::start(&[]).await;
        let (company, run) = effects(&db, &witness, "lost").await;
        // The commit fails, or it lands and only its answer is lost.
        let worker = Process::worker(&db, &format!("{point}=fail@{hit}"));
        assert_whole(&db, &witness, company, run, point).await;
        assert!(witness.calls().values().all(|calls| *calls == 1), "{point}: {:?}", witness.calls());
        worker.was_at(point);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_api_process_may_die_before_and_after_its_commit() {
    for (point, runs) in [("start.before_commit", 0), ("start.after_commit", 1)] {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, "name: x\nsteps: [{id: a, action: transform}]\n").await;
        let key = db.key(&["*"]).await;
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let api = Process::start(&db, &["api", "--bind", &format!("127.0.0.1:{port}")], &format!("{point}=kill@1"));
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let base = format!("http://127.0.0.1:{port}");
        eventually("the API", || async {
            client.get(format!("{base}/readyz")).send().await.is_ok_and(|r| r.status().is_success())
        })
        .await;
        let answer = client
            .post(format!("{base}/v1/companies/{company}/playbooks/{playbook}/run"))
            .bearer_auth(&key)
            .send()
            .await;
        assert!(answer.is_err(), "{point}: the process answered");
        api.dies_at(point).await;
        let count: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&db.pool).await.unwrap();
        assert_eq!(count, runs, "{point}");
        let _worker = Process::worker(&db, "");
        eventually("every accepted run to end", || async {
            db.count("select count(*) from runs where status <> 'completed'").await == 0
        })
        .await;
        db.assert_nothing_stranded().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn an_approval_survives_the_death_of_its_process() {
    for (point, approved) in [("approve.before_commit", false), ("approve.after_commit", true)] {
        let db = Db::new().await;
        let company = db.company(&["a"], "claude", json!({})).await;
        let playbook = db.playbook(company, "name: g\nsteps: [{id: a, action: transform, approval: required}]\n").await;
        let run = db.start(company, playbook, json!({})).await;
        let id: uuid::Uuid = sqlx::query_scalar("select id from approvals").fetch_one(&db.pool).await.unwrap();
        let id = capx_core::domain::ids::ApprovalId(id);
        let key = db.key(&["*"]).await;
        let port = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let bind = format!("127.0.0.1:{port}");
        let api = Process::start(&db, &["api", "--bind", &bind], &format!("{point}=kill@1"));
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        let ready = format!("http://{bind}/readyz");
        let approve = format!("http://{bind}/v1/approvals/{id}/approve");
        eventually("the API", || async { client.get(&ready).send().await.is_ok_and(|r| r.status().is_success()) })
            .await;
        assert!(client.post(&approve).bearer_auth(&key).send().await.is_err());
        api.dies_at(point).await;
        let status = db.run(company, run).await.status;
        assert_eq!(status, if approved { RunStatus::Running } else { RunStatus::Suspended }, "{point}");
        // The client does what clients do: it asks again.
        let _api = Process::start(&db, &["api", "--bind", &bind], "");
        eventually("the approval", || async {
            client.post(&approve).bearer_auth(&key).send().await.is_ok_and(|r| r.status().is_success())
        })
        .await;
        let _worker = Process::worker(&db, "");
        db.until(company, run, RunStatus::Completed).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_job_that_kills_its_worker_is_quarantined_and_harms_no_other() {
    let db = Db::new().await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let poison = db.playbook(company, "name: poison\nsteps: [{id: a, action: transform}]\n").await;
    let run = db.start(company, poison, json!({})).await;
    // Each of these workers dies with the poison in its hands.
    for _ in 0..3 {
        Process::worker(&db, "attempt.before_handler=kill@1").dies_at("attempt.before_handler").await;
    }
    let good = db.playbook(company, "name: good\nsteps: [{id: a, action: transform}]\n").await;
    // This one would die as well; quarantine keeps the poison from it.
    let _worker = Process::worker(&db, "");
    let row = db.until(company, run, RunStatus::Failed).await;
    let error = row.error.unwrap();
    assert_eq!(error["code"], "crash", "{error}");
    assert!(error["message"].as_str().unwrap().contains("quarantine"), "{error}");
    assert_eq!(db.count("select count(*) from dead_letters where reason = 'quarantined' and crash_count = 3").await, 1);
    let run = db.start(company, good, json!({})).await;
    db.until(company, run, RunStatus::Completed).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn killing_everything_changes_no_result() {
    let db = Db::new().await;
    let witness = Witness::start(&[]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let steps: String = (0..6)
        .map(|i| {
            format!(
                "  - {{id: s{i}, action: http.request, params: {{url: '{}/{i}'}}, retry: {{initial: 20ms}}}}\n",
                witness.url
            )
        })
        .collect();
    let playbook = db.playbook(company, &format!("name: six\nsteps:\n{steps}")).await;
    let mut all = Vec::new();
    for _ in 0..20 {
        all.push(db.start(company, playbook, json!({})).await);
    }
    for _ in 0..4 {
        let (a, b) = (Process::worker(&db, ""), Process::worker(&db, ""));
        eventually("a worker", || async {
            db.count("select count(*) from worker_sessions where ended_at is null").await > 0
        })
        .await;
        tokio::time::sleep(Duration::from_millis(40)).await;
        // SIGKILL, both at once.
        drop((a, b));
    }
    let _survivor = Process::worker(&db, "");
    for run in all {
        db.until(company, run, RunStatus::Completed).await;
    }
    assert_eq!(witness.calls().len(), 120);
    assert_eq!(db.count("select count(*) from events where event = 'step.completed'").await, 120);
    assert!(db.count("select count(*) from worker_sessions where state = 'dead'").await > 0, "nobody was found dead");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_worker_that_was_frozen_past_its_lease_overwrites_nothing() {
    use rustix::process::{Pid, Signal, kill_process};
    let db = Db::new().await;
    let witness = Witness::start(&[]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let steps: String = (0..8)
        .map(|i| {
            format!(
                "  - {{id: s{i}, action: http.request, params: {{url: '{}/{i}'}}, retry: {{initial: 20ms}}}}\n",
                witness.url
            )
        })
        .collect();
    let playbook = db.playbook(company, &format!("name: eight\nsteps:\n{steps}")).await;
    let mut all = Vec::new();
    for _ in 0..20 {
        all.push(db.start(company, playbook, json!({})).await);
    }
    let frozen = Process::worker(&db, "");
    eventually("work in its hands", || async {
        db.count("select count(*) from jobs where state = 'running'").await > 0
    })
    .await;
    let pid = Pid::from_raw(i32::try_from(frozen.child.id()).unwrap()).unwrap();
    // Several times, so that it thaws in the midst of others' work and of its
    // own next session's.
    let mut other = None;
    for _ in 0..3 {
        kill_process(pid, Signal::STOP).unwrap();
        let dead = db.count("select count(*) from worker_sessions where state = 'dead'").await;
        other = Some(Process::worker(&db, ""));
        let more_work: Vec<RunId> = vec![db.start(company, playbook, json!({})).await];
        all.extend(more_work);
        eventually("the frozen one to be found dead", || async {
            db.count("select count(*) from worker_sessions where state = 'dead'").await > dead
        })
        .await;
        kill_process(pid, Signal::CONT).unwrap();
        all.push(db.start(company, playbook, json!({})).await);
        eventually("a new session of its own", || async {
            db.count("select count(*) from worker_sessions where ended_at is null").await >= 2
        })
        .await;
    }
    let runs = all.len() as i64;
    for run in all {
        db.until(company, run, RunStatus::Completed).await;
    }
    drop(other);
    assert_eq!(db.count("select count(*) from events where event = 'step.completed'").await, runs * 8);
    assert_eq!(db.count("select count(*) from run_steps where status = 'completed'").await, runs * 8);
    assert_eq!(witness.calls().len() as i64, runs * 8);
    db.assert_nothing_stranded().await;
}
