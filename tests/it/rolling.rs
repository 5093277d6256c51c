//! Workers and APIs are stopped and started in turn, under load: nobody who tries again notices, and no
//! attempt is charged.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering::Relaxed};
use std::time::{Duration, Instant};

use rustix::process::Signal;
use serde_json::{Value, json};

use crate::harness::{Db, eventually};
use crate::process::{self, Process};
use crate::receiver::Receiver;

/// How long, and how often somebody is stopped: longer by command, `CAPX_ROLL_S=300 CAPX_ROLL_EVERY_S=20`.
fn seconds(name: &str, short: u64) -> Duration {
    Duration::from_secs(std::env::var(name).ok().and_then(|text| text.parse().ok()).unwrap_or(short))
}

/// A client that tries again, here and there, until it is answered.
async fn start(client: &reqwest::Client, addresses: &[String], key: &str, path: &str, n: usize) -> (String, usize) {
    for tries in 0..200 {
        let url = format!("http://{}{path}", addresses[(n + tries) % addresses.len()]);
        let call = client
            .post(url)
            .bearer_auth(key)
            .header("idempotency-key", format!("run-{n}"))
            .header("content-type", "application/json")
            .body("{}");
        if let Ok(response) = call.send().await
            && response.status().is_success()
            && let Ok(answer) = response.json::<Value>().await
        {
            return (answer["data"]["run_id"].as_str().unwrap().to_owned(), tries);
        }
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    panic!("run {n} was never answered");
}

#[tokio::test(flavor = "multi_thread")]
async fn restarts_in_turn_charge_nothing_and_fail_nobody_who_tries_again() {
    let db = Db::new().await;
    let receiver = Receiver::start().await;
    let (length, every) = (seconds("CAPX_ROLL_S", 15), seconds("CAPX_ROLL_EVERY_S", 2));
    let addresses = [process::free_address(), process::free_address()];
    let mut apis = Vec::new();
    for address in &addresses {
        apis.push(process::api(&db, address, "").await.0);
    }
    let args = &["worker", "--lease", "3s", "--concurrency", "32", "--drain", "10s"];
    let mut workers = [Process::start(&db, args, ""), Process::start(&db, args, "")];
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = format!(
        "name: p\nsteps:\n  - {{id: a, action: transform, params: {{v: 1}}}}\n  - {{id: b, action: http.request, params: {{method: POST, url: '{}/slow', body: {{v: 1}}}}}}\n  - {{id: c, action: transform, params: {{v: 2}}}}\n",
        receiver.url
    );
    let playbook = db.playbook(company, &yaml).await;
    let key = db.key(&["*"]).await;
    let path = format!("/v1/companies/{company}/playbooks/{playbook}/run");
    let (over, started, retried) =
        (Arc::<AtomicBool>::default(), Arc::<AtomicUsize>::default(), Arc::<AtomicUsize>::default());
    let load: Vec<_> = (0..4)
        .map(|client_no| {
            let (over, started, retried) = (Arc::clone(&over), Arc::clone(&started), Arc::clone(&retried));
            let (addresses, key, path) = (addresses.to_vec(), key.clone(), path.clone());
            tokio::spawn(async move {
                let client = reqwest::Client::builder().no_proxy().build().unwrap();
                let mut n = client_no;
                while !over.load(Relaxed) {
                    let (_, tries) = start(&client, &addresses, &key, &path, n).await;
                    retried.fetch_add(tries, Relaxed);
                    started.fetch_add(1, Relaxed);
                    n += 4;
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
            })
        })
        .collect();
    let began = Instant::now();
    let mut restarts = 0;
    while began.elapsed() < length {
        tokio::time::sleep(every).await;
        let at = restarts % 4;
        if at < 2 {
            workers[at].signal(Signal::TERM);
            workers[at].ended().await;
            workers[at] = Process::start(&db, args, "");
        } else {
            apis[at - 2].signal(Signal::TERM);
            apis[at - 2].ended().await;
            apis[at - 2] = process::api(&db, &addresses[at - 2], "").await.0;
        }
        restarts += 1;
    }
    over.store(true, Relaxed);
    for client in load {
        client.await.unwrap();
    }
    let runs = i64::try_from(started.load(Relaxed)).unwrap();
    eventually("all runs to end", || async {
        db.count("select count(*) from runs where status = 'completed'").await == runs
    })
    .await;
    assert_eq!(db.count("select count(*) from runs").await, runs, "each once, however often it was asked for");
    assert_eq!(db.count("select count(*) from run_steps where attempt > 1").await, 0, "no attempt is charged");
    let calls = i64::try_from(receiver.count()).unwrap();
    println!(
        "{restarts} restarts in {:?}: {runs} runs, {calls} calls, {} tries again, 0 failed, 0 charged",
        began.elapsed(),
        retried.load(Relaxed)
    );
    assert!(restarts >= 4 && runs > 20, "{restarts} restarts, {runs} runs");
}
