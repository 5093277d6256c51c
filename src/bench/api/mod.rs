//! The REST API as clients find it: a process of its own with keys, limits and
//! a database, beside a bare router that answers the same bytes from memory.

use std::net::SocketAddr;
use std::time::Duration;

use anyhow::Context;
use axum::http::StatusCode;
use capx_core::domain::ids::{AccountId, PlaybookId};
use capx_core::engine::playbooks;
use capx_core::store::tenants;

use super::latency::percentile;
use super::report::{Report, Target};
use super::{Bench, Process};

mod client;
mod router;
mod streams;

use client::{Call, Connection};

/// Connections of the busy clients, and the keys that they show in turn.
const CONNECTIONS: usize = 64;
const KEYS: usize = 10;
/// Requests a second of the calm clients.
const CALM_RATE: usize = 500;

/// An API process, and what its clients know.
struct Stage {
    address: SocketAddr,
    keys: Vec<String>,
    get: String,
    start: String,
    api: Process,
}

pub(super) async fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    bench.reset().await?;
    let stage = Stage::prepare(bench).await?;
    // What one request answers, the router answers too.
    let (status, answer) = Connection::open(stage.address).await?.call(&stage.call(0, "GET", &stage.get)).await?;
    anyhow::ensure!(status == StatusCode::OK, "the API answered {status}");
    let router = router::Router::start(answer)?;

    requests(bench, report, &stage, router.address).await?;
    drop(router);
    streams::run(bench, report, &stage).await
}

/// Requests: calm ones by their latency, busy ones by their rate.
async fn requests(bench: &Bench, report: &mut Report, stage: &Stage, bare: SocketAddr) -> anyhow::Result<()> {
    let seconds = Duration::from_secs(bench.amount(10).max(2) as u64);
    let bar = report.progress("api: requests", 6);
    let get = |n| stage.call(n, "GET", &stage.get);
    let start = |n| stage.call(n, "POST", &stage.start);

    let limit = client::saturate(bare, CONNECTIONS, seconds, get).await?;
    bar.inc(1);
    let before = super::idle::transactions(bench).await?;
    let rate = client::saturate(stage.address, CONNECTIONS, seconds, get).await?;
    let transactions = super::idle::transactions(bench).await? - before;
    bar.inc(1);
    let requests = rate * seconds.as_secs_f64();
    report.add("api", "bare router, GETs", limit, "/s");
    report.add("api", "GETs, 64 connections, 10 keys", rate, "/s").limit(limit).target(Target::AtLeast(4_000.0));
    // The read is one transaction; the others are questions for keys, limits and credits.
    let asked = (transactions - requests).max(0.0) / requests;
    report.add("api", "round trips to admit one", asked, "").target(Target::AtMost(1.0));

    // Behind the busy ones, so that every connection to the database is open.
    let mut limit = client::pace(bare, CONNECTIONS, CALM_RATE, seconds, get).await?;
    bar.inc(1);
    let mut took = client::pace(stage.address, CONNECTIONS, CALM_RATE, seconds, get).await?;
    bar.inc(1);
    let (bare_p99, p99) = (percentile(&mut limit, 0.99), percentile(&mut took, 0.99));
    report.add("api", "bare router, 500 GETs/s, p99", bare_p99, "ms");
    report.add("api", "GET of a company, 500/s, p50", percentile(&mut took, 0.5), "ms");
    report.add("api", "GET of a company, 500/s, p99", p99, "ms").limit(bare_p99).target(Target::AtMost(5.0));

    let limit = client::saturate(bare, CONNECTIONS, seconds, start).await?;
    bar.inc(1);
    let rate = client::saturate(stage.address, CONNECTIONS, seconds, start).await?;
    bar.finish_and_clear();
    report.add("api", "bare router, POSTs", limit, "/s");
    report.add("api", "run starts, 64 connections", rate, "/s").limit(limit).target(Target::AtLeast(1_500.0));
    let runs: i64 = sqlx::query_scalar("select count(*) from runs").fetch_one(&bench.pool).await?;
    anyhow::ensure!(runs as f64 >= rate * seconds.as_secs_f64() * 0.99, "runs were acknowledged and are not there");
    bench.reset().await
}

impl Stage {
    async fn prepare(bench: &Bench) -> anyhow::Result<Self> {
        let account = tenants::account_of(&bench.pool, bench.company).await?.context("the scratch company is gone")?;
        let keys = keys(bench, account).await?;
        let playbook = playbook(bench).await?;
        let (address, api) = bench.api_process().await?;
        let company = bench.company;
        Ok(Self {
            address,
            keys,
            get: format!("/v1/companies/{company}"),
            start: format!("/v1/companies/{company}/playbooks/{playbook}/run"),
            api,
        })
    }

    /// The memory of the API process at its peak, in MiB.
    fn memory(&self) -> f64 {
        super::jobs::memory_of(&self.api.0.id().to_string())
    }

    /// The call of the nth client.
    fn call(&self, n: usize, method: &'static str, path: &str) -> Call {
        let key = self.keys[n % self.keys.len()].clone();
        let body = if method == "POST" { "{\"params\":{}}" } else { "" };
        Call { method, path: path.to_owned(), key, body }
    }
}

/// Keys of an account whose limits are no limit here.
async fn keys(bench: &Bench, account: AccountId) -> anyhow::Result<Vec<String>> {
    sqlx::query("update accounts set rate_per_minute = 1000000000, burst_per_second = 100000000, concurrent = 1000000 where id = $1")
        .bind(account.0)
        .execute(&bench.pool)
        .await?;
    let mut keys = Vec::with_capacity(KEYS);
    for _ in 0..KEYS {
        keys.push(crate::keys::make(&bench.pool, account, None, "bench", true, &["*".into()]).await?.key);
    }
    Ok(keys)
}

async fn playbook(bench: &Bench) -> anyhow::Result<PlaybookId> {
    let yaml = "name: started\nsteps: [{id: a, action: transform}]\n";
    let request = playbooks::CreatePlaybook { name: None, description: None, yaml: yaml.into(), tags: Vec::new() };
    let created =
        playbooks::create(&bench.engine, bench.company, &request).await.map_err(|e| anyhow::anyhow!("{e:?}"))?;
    Ok(created.upserted.playbook)
}
