//! `capx bench`: what the engine does on this machine, beside what bare SQL
//! does in the same run, so that each figure is also a ratio.
//!
//! Against `CAPX_DATABASE_URL` (a scratch database: it writes into the tables)
//! or a private server of its own with durable settings.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{AccountId, CompanyId, PlaybookId};
use capx_core::engine::playbooks::CreatePlaybook;
use capx_core::engine::{Engine, Waker, playbooks};
use capx_core::store::tenants::NewCompany;
use capx_core::store::{self, PoolKind, tenants};
use capx_workers::adapters::Providers;
use capx_workers::egress::Egress;
use capx_workers::{Hands, Worker, WorkerConfig};
use clap::{Args, ValueEnum};
use serde_json::{Map, Value, json};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::dev::postgres::{Binaries, Options, Server};
use crate::out;

mod api;
mod backlog;
mod beats;
mod enqueue;
mod history;
mod hostile;
mod idle;
mod items;
mod jobs;
mod language;
mod latency;
mod limit;
mod report;
mod sleeping;
mod steps;
mod webhooks;

use report::Report;

/// What can be measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub enum What {
    /// No-op jobs a second, with one and two worker processes.
    Jobs,
    /// Durable no-op steps a second, in runs of three steps.
    Steps,
    /// Items of `for_each`, and steps of long runs, beside those of short ones.
    Items,
    /// Enqueues a second, single from 16 tasks and in bulk.
    Enqueue,
    /// From enqueue to the handler's start on an idle worker.
    Latency,
    /// Rate and claim latency with a million other jobs.
    Backlog,
    /// Pick-ups and lists with ten million finished runs, looks at the queues with a million jobs.
    History,
    /// Heartbeats of ten thousand agents that have nothing to do.
    Beats,
    /// What a million sleeping runs take up, and cost others.
    Sleeping,
    /// What an idle worker costs.
    Idle,
    /// Events on their way to webhooks: the rate, beside a dead one, after an outage.
    Webhooks,
    /// The REST API: requests, run starts, streams.
    Api,
    /// The playbook language: checks and conditions.
    Language,
    /// All of them.
    All,
}

/// `capx bench`.
#[derive(Debug, Args)]
pub struct BenchArgs {
    /// What to measure.
    #[arg(value_enum, default_value = "all")]
    pub what: What,
    /// A scratch database; without one, a private server is started.
    #[arg(long, env = "CAPX_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Where the private server lives; removed afterwards.
    #[arg(long)]
    pub data_dir: Option<PathBuf>,
    /// One JSON object instead of a table.
    #[arg(long)]
    pub json: bool,
    /// A tenth of the work, for a quick look.
    #[arg(long)]
    pub quick: bool,
    /// How often everything is measured, in turns, since a machine drifts; of
    /// each figure the median is shown.
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u32).range(1..=99))]
    pub passes: u32,
    /// Attempts at once in a worker process.
    #[arg(long, default_value_t = 256)]
    pub slots: usize,
}

/// What the benchmarks share.
pub(crate) struct Bench {
    pub url: String,
    pub pool: PgPool,
    pub engine: Engine,
    pub company: CompanyId,
    pub slots: usize,
    pub quick: bool,
    pub quiet: bool,
    /// The server is our own.
    pub private: bool,
    _server: Option<Scratch>,
}

/// A private server whose directory goes with it.
struct Scratch {
    server: Option<Server>,
    directory: PathBuf,
}

impl Drop for Scratch {
    fn drop(&mut self) {
        drop(self.server.take());
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

/// Runs the benchmarks and prints what they measured.
pub async fn run(args: BenchArgs) -> anyhow::Result<()> {
    if let Some(input) = hostile::asked() {
        out::line(hostile::one(input)?);
        return Ok(());
    }
    let bench = Bench::prepare(&args).await?;
    let mut report = Report::new(&bench).await?;
    for _ in 0..args.passes {
        pass(&bench, &mut report, args.what).await?;
    }
    report.print(args.json);
    Ok(())
}

async fn pass(bench: &Bench, report: &mut Report, what: What) -> anyhow::Result<()> {
    let wants = |one: What| what == What::All || what == one;
    if wants(What::Jobs) {
        jobs::run(bench, report).await?;
    }
    if wants(What::Language) {
        language::run(bench, report)?;
        hostile::run(report).await?;
    }
    if wants(What::Steps) {
        steps::run(bench, report).await?;
    }
    if wants(What::Items) {
        items::run(bench, report).await?;
    }
    if wants(What::Enqueue) {
        enqueue::run(bench, report).await?;
    }
    if wants(What::Latency) {
        latency::run(bench, report).await?;
    }
    if wants(What::Backlog) {
        backlog::run(bench, report).await?;
    }
    if wants(What::History) {
        history::run(bench, report).await?;
    }
    if wants(What::Beats) {
        beats::run(bench, report).await?;
    }
    if wants(What::Sleeping) {
        sleeping::run(bench, report).await?;
    }
    if wants(What::Idle) {
        idle::run(bench, report).await?;
    }
    if wants(What::Webhooks) {
        webhooks::run(bench, report).await?;
    }
    if wants(What::Api) {
        api::run(bench, report).await?;
    }
    Ok(())
}

impl Bench {
    async fn prepare(args: &BenchArgs) -> anyhow::Result<Self> {
        let (url, server) = match &args.database_url {
            Some(url) => (url.clone(), None),
            None => {
                let scratch = private_server(args.data_dir.clone())?;
                let url = scratch.server.as_ref().map(Server::url).unwrap_or_default();
                (url, Some(scratch))
            }
        };
        let pool = store::pool(&url, PoolKind::Owner, 4)?;
        store::migrate(&pool).await.context("cannot migrate the database")?;
        let others: bool =
            sqlx::query_scalar("select exists (select from accounts where name <> 'bench')").fetch_one(&pool).await?;
        if others {
            bail!("the database holds somebody's work, which the benchmarks would clear away; give an empty one");
        }
        let weak = store::unsafe_settings(&pool).await?;
        if !weak.is_empty() {
            bail!("the server is not durable ({}): its figures would mean nothing", weak.join(", "));
        }
        let company = scratch_company(&pool).await?;
        Ok(Self {
            engine: Engine::new(store::pool(&url, PoolKind::Queue, 16)?).with_waker(Waker::start(&url)),
            url,
            pool,
            company,
            slots: args.slots,
            quick: args.quick,
            quiet: args.json,
            private: server.is_some(),
            _server: server,
        })
    }

    /// Switches autovacuum, where the server is ours to switch.
    pub(crate) async fn autovacuum(&self, on: bool) -> anyhow::Result<()> {
        if self.private {
            let switch = if on { "alter system reset autovacuum" } else { "alter system set autovacuum = off" };
            sqlx::raw_sql(switch).execute(&self.pool).await?;
            sqlx::raw_sql("select pg_reload_conf()").execute(&self.pool).await?;
        }
        Ok(())
    }

    /// The same bench over another database of the server.
    pub(crate) async fn at(&self, url: &str) -> anyhow::Result<Self> {
        let pool = store::pool(url, PoolKind::Owner, 2)?;
        store::migrate(&pool).await?;
        let company = scratch_company(&pool).await?;
        Ok(Self {
            engine: Engine::new(store::pool(url, PoolKind::Queue, 4)?).with_waker(Waker::start(url)),
            url: url.to_owned(),
            pool,
            company,
            slots: self.slots,
            quick: self.quick,
            quiet: self.quiet,
            private: self.private,
            _server: None,
        })
    }

    /// The full amount of work, or a tenth.
    pub(crate) fn amount(&self, full: usize) -> usize {
        if self.quick { full / 10 } else { full }
    }

    /// Clears the queue and lets the server settle, so that one benchmark
    /// does not pay for another's.
    pub(crate) async fn reset(&self) -> anyhow::Result<()> {
        sqlx::raw_sql("truncate jobs, runs, run_steps, run_fans, run_items, events, approvals, dead_letters, worker_sessions, run_deltas")
            .execute(&self.pool)
            .await?;
        sqlx::raw_sql("vacuum analyze jobs").execute(&self.pool).await?;
        sqlx::raw_sql("checkpoint").execute(&self.pool).await?;
        Ok(())
    }

    /// A worker of this process for some queues.
    pub(crate) async fn worker(&self, queues: &[&str], slots: usize) -> anyhow::Result<Worker> {
        self.worker_by(queues, slots, Rules::default()).await
    }

    /// The same under rules of its own for what goes out.
    pub(crate) async fn worker_by(&self, queues: &[&str], slots: usize, rules: Rules) -> anyhow::Result<Worker> {
        let pool = store::pool(&self.url, PoolKind::Queue, 6)?;
        let egress = Egress::new(rules).map_err(anyhow::Error::msg)?;
        let hands = Hands::new(egress, std::env::temp_dir(), Providers::default());
        let config =
            WorkerConfig { queues: queues.iter().map(|q| (*q).to_owned()).collect(), slots, ..WorkerConfig::default() };
        let engine = Engine::new(pool.clone())
            .with_claims(store::pool(&self.url, PoolKind::Claims, 1)?)
            .with_waker(Waker::start(&self.url));
        Ok(Worker::new(engine, &self.url, config, hands).listening(pool))
    }

    /// A worker process of its own, as an operator would start it.
    pub(crate) fn worker_process(&self, queues: &str) -> anyhow::Result<Process> {
        let child = std::process::Command::new(std::env::current_exe()?)
            .args(["worker", "--queues", queues, "--concurrency", &self.slots.to_string()])
            .env("CAPX_DATABASE_URL", &self.url)
            .env("CAPX_LOG", "warn")
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .context("cannot start a worker process")?;
        Ok(Process(child))
    }

    /// An API process of its own, as an operator would start it, and where it
    /// listens.
    pub(crate) async fn api_process(&self) -> anyhow::Result<(SocketAddr, Process)> {
        // Free a moment ago; whoever takes it meanwhile makes the start fail.
        let address = std::net::TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let child = std::process::Command::new(std::env::current_exe()?)
            .args(["api", "--bind", &address.to_string()])
            .env("CAPX_DATABASE_URL", &self.url)
            .env("CAPX_LOG", "warn")
            .stdin(std::process::Stdio::null())
            .stdout(std::process::Stdio::null())
            .spawn()
            .context("cannot start an API process")?;
        let process = Process(child);
        self.until(Duration::from_secs(20), "the API to start", || async {
            Ok(tokio::net::TcpStream::connect(address).await.is_ok())
        })
        .await?;
        Ok((address, process))
    }

    /// Waits until so many workers have sessions.
    pub(crate) async fn await_workers(&self, count: i64) -> anyhow::Result<()> {
        self.until(Duration::from_secs(20), "the workers to start", || async {
            let open: i64 = sqlx::query_scalar("select count(*) from worker_sessions where ended_at is null")
                .fetch_one(&self.pool)
                .await?;
            Ok(open >= count)
        })
        .await?;
        // They have a session; they listen a moment later.
        tokio::time::sleep(Duration::from_millis(300)).await;
        Ok(())
    }

    /// Waits for a condition.
    pub(crate) async fn until<F>(
        &self,
        patience: Duration,
        what: &str,
        mut done: impl FnMut() -> F,
    ) -> anyhow::Result<()>
    where
        F: Future<Output = anyhow::Result<bool>>,
    {
        let end = Instant::now() + patience;
        while !done().await? {
            if Instant::now() > end {
                bail!("waited {} s in vain for {what}", patience.as_secs());
            }
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        Ok(())
    }

    /// Waits until the queue is empty.
    pub(crate) async fn until_drained(&self) -> anyhow::Result<()> {
        self.until(Duration::from_secs(600), "the queue to drain", || async {
            let empty: bool = sqlx::query_scalar("select not exists (select from jobs where kind <> 'heartbeat')")
                .fetch_one(&self.pool)
                .await?;
            Ok(empty)
        })
        .await
    }

    /// Puts many no-op jobs into the queue, in one transaction.
    pub(crate) async fn enqueue_noops(&self, count: usize, delay: Duration) -> anyhow::Result<()> {
        use capx_core::store::jobs::{enqueue_bulk, kind, queue};
        let mut tx = self.pool.begin().await?;
        for start in (0..count).step_by(10_000) {
            let batch = 10_000.min(count - start);
            enqueue_bulk(&mut *tx, queue::BENCH, kind::NOOP, delay, &vec![self.company.0; batch], &vec![None; batch])
                .await?;
        }
        tx.commit().await?;
        Ok(())
    }

    /// The playbook of three steps that do nothing.
    pub(crate) async fn three_steps(&self) -> anyhow::Result<PlaybookId> {
        self.steps(3).await
    }

    /// A playbook of so many steps that do nothing.
    pub(crate) async fn steps(&self, steps: usize) -> anyhow::Result<PlaybookId> {
        let step = |n| format!("  - {{id: s{n}, action: transform, params: {{n: {n}}}}}\n");
        self.playbook(&format!("name: steps{steps}\nsteps:\n{}", (1..=steps).map(step).collect::<String>())).await
    }

    /// A playbook.
    pub(crate) async fn playbook(&self, yaml: &str) -> anyhow::Result<PlaybookId> {
        let request = CreatePlaybook { name: None, description: None, yaml: yaml.into(), tags: Vec::new() };
        let created =
            playbooks::create(&self.engine, self.company, &request).await.map_err(|e| anyhow::anyhow!("{e:?}"))?;
        Ok(created.upserted.playbook)
    }
}

/// A child process that does not outlive its owner.
pub(crate) struct Process(pub std::process::Child);

impl Drop for Process {
    fn drop(&mut self) {
        if let Some(pid) = rustix::process::Pid::from_raw(i32::try_from(self.0.id()).unwrap_or(0)) {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        }
        let _ = self.0.wait();
    }
}

/// Stops a worker of this process when dropped or asked.
pub(crate) struct Running {
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Running {
    pub(crate) fn start(worker: Worker) -> Self {
        let stop = CancellationToken::new();
        let token = stop.clone();
        let task = tokio::spawn(async move {
            let _ = worker.run(token).await;
        });
        Self { stop, task: Some(task) }
    }

    pub(crate) async fn stop(mut self) {
        self.stop.cancel();
        if let Some(task) = self.task.take() {
            let _ = task.await;
        }
    }
}

fn private_server(directory: Option<PathBuf>) -> anyhow::Result<Scratch> {
    let directory =
        directory.unwrap_or_else(|| std::env::temp_dir().join(format!("capx-bench-{}", std::process::id())));
    std::fs::create_dir_all(&directory)?;
    use std::os::unix::fs::PermissionsExt;
    std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755))?;
    let cache = crate::dev::fetch::bin(&directory);
    let mut found = Binaries::on_this_machine(&cache)?;
    if found.is_empty() {
        found.push(crate::dev::fetch::fetch(&directory)?);
    }
    let server = Server::start(&found, &Options { directory: directory.clone(), settings: Vec::new() })?;
    Ok(Scratch { server: Some(server), directory })
}

async fn scratch_company(pool: &PgPool) -> anyhow::Result<CompanyId> {
    let account: AccountId = tenants::account(pool, "bench", "enterprise").await?;
    let company = CompanyId::new();
    tenants::insert_company(
        pool,
        &NewCompany {
            company,
            account,
            name: "bench",
            description: None,
            config: &json!({}),
            template: None,
            governance: None,
        },
    )
    .await?;
    tenants::company_provisioned(pool, company).await?;
    Ok(company)
}

pub(crate) fn no_params() -> Map<String, Value> {
    Map::new()
}
