//! The settings that server processes share, and the worker process.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, bail};
use capx_core::domain::address::Rules;
use capx_core::domain::agent::price::Prices;
use capx_core::domain::duration;
use capx_core::domain::secret::seal::Keys;
use capx_core::engine::secrets::Keyring;
use capx_core::engine::{Engine, Waker};
use capx_core::store::{self, PoolKind, SchemaState};
use capx_workers::adapters::{ANTHROPIC_BASE_URL, Account, OPENAI_BASE_URL, Offline, Providers};
use capx_workers::egress::Egress;
use capx_workers::mcp::McpServers;
use capx_workers::sandbox::Sandbox;
use capx_workers::tools::Search;
use capx_workers::{Hands, Worker, WorkerConfig};
use clap::Args;
use metrics_exporter_prometheus::{PrometheusBuilder, PrometheusHandle};
use sqlx::PgPool;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use crate::api::admission::{Admission, FAILURES_MAX};
use crate::api::peer::TrustedProxies;
use crate::api::stream::hub::Hub;
use crate::api::{self, ApiState, Limits, server};

/// Where runs keep their files when nothing else is said.
pub const WORKSPACE: &str = ".capx/workspaces";

/// Where the database is.
#[derive(Debug, Clone, Args)]
pub struct DatabaseArgs {
    /// The database, e.g. postgres://user:password@host/name.
    #[arg(long, env = "CAPX_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
}

impl DatabaseArgs {
    /// The address, from the flag, `CAPX_DATABASE_URL` or `DATABASE_URL`.
    pub fn url(&self) -> anyhow::Result<String> {
        self.database_url
            .clone()
            .or_else(|| std::env::var("DATABASE_URL").ok())
            .filter(|url| !url.is_empty())
            .context("no database: set CAPX_DATABASE_URL, or pass --database-url postgres://user:password@host/name")
    }
}

/// How a worker works.
#[derive(Debug, Clone, Args)]
pub struct WorkerArgs {
    /// The queues to serve, parted by commas; all of them by default.
    #[arg(long, value_delimiter = ',')]
    pub queues: Vec<String>,
    /// Attempts at once.
    #[arg(long, default_value_t = 64, value_parser = clap::value_parser!(u32).range(1..=10_000))]
    pub concurrency: u32,
    /// How long a worker lives without a beat; its jobs are others' after it.
    #[arg(long, env = "CAPX_LEASE", default_value = "30s", value_parser = parse_lease)]
    pub lease: Duration,
    /// How long attempts may go on after a stop was asked for.
    #[arg(long, env = "CAPX_DRAIN", default_value = "120s", value_parser = parse_duration)]
    pub drain: Duration,
    /// How long a call of the database may go unanswered: then its connection
    /// is dead without knowing it, and the worker ends to be started again.
    #[arg(long, env = "CAPX_UNANSWERED", default_value = "180s", value_parser = parse_duration)]
    pub unanswered: Duration,
    /// Where runs keep their files; workers on several machines must share it.
    #[arg(long, env = "CAPX_WORKSPACE", default_value = WORKSPACE)]
    pub workspace: PathBuf,
    /// Let `shell.run` and `code.execute` run programs, each in a sandbox. A worker does not
    /// start where the machine cannot hold one.
    #[arg(long, env = "CAPX_ALLOW_PROGRAMS", value_parser = clap::builder::FalseyValueParser::new(), default_value_t = false, action = clap::ArgAction::SetTrue)]
    pub allow_programs: bool,
}

/// Reads a duration flag.
pub fn parse_duration(text: &str) -> Result<Duration, String> {
    duration::parse(text).map_err(|error| error.to_string())
}

fn parse_lease(text: &str) -> Result<Duration, String> {
    let lease = parse_duration(text)?;
    if lease < Duration::from_millis(300) || lease > Duration::from_secs(3_600) {
        return Err("a lease is from 300ms to 1h".into());
    }
    Ok(lease)
}

impl WorkerArgs {
    /// As the runtime takes it.
    pub fn config(&self) -> WorkerConfig {
        let mut config = WorkerConfig {
            slots: self.concurrency as usize,
            lease: self.lease,
            drain: self.drain,
            unanswered: self.unanswered,
            ..WorkerConfig::default()
        };
        if !self.queues.is_empty() {
            config.queues.clone_from(&self.queues);
        }
        config
    }

    /// What attempts can reach, from the environment.
    pub fn hands(&self, dev: bool) -> anyhow::Result<Hands> {
        let rules = egress_rules(dev)?;
        let egress = Egress::new(rules).map_err(anyhow::Error::msg)?;
        // What this process runs, even where its file has been replaced since.
        let sandbox = self.allow_programs.then(|| Sandbox::new("/proc/self/exe"));
        Ok(Hands::new(egress, &self.workspace, providers(dev)?)
            .searching(search()?)
            .running(sandbox)
            .with_mcp(mcp(dev)?))
    }
}

/// Where the web is searched, from `CAPX_SEARCH_URL`, and `CAPX_SEARCH_KEY` in the form
/// `header: value`.
fn search() -> anyhow::Result<Option<Search>> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let Some(url) = set("CAPX_SEARCH_URL") else { return Ok(None) };
    let parsed = reqwest::Url::parse(&url).with_context(|| format!("CAPX_SEARCH_URL: {url}"))?;
    anyhow::ensure!(matches!(parsed.scheme(), "http" | "https"), "CAPX_SEARCH_URL: {url} is no http or https address");
    let key = set("CAPX_SEARCH_KEY").map(|key| {
        let (name, value) = key.split_once(':').context("CAPX_SEARCH_KEY is written as `header: value`")?;
        Ok::<_, anyhow::Error>((name.trim().to_owned(), value.trim().to_owned()))
    });
    Ok(Some(Search { url: parsed, key: key.transpose()? }))
}

/// The servers whose tools agents may use, from the file that `CAPX_MCP` names.
fn mcp(dev: bool) -> anyhow::Result<McpServers> {
    let Some(path) = std::env::var_os("CAPX_MCP").filter(|path| !path.is_empty()) else {
        return Ok(McpServers::default());
    };
    let shown = PathBuf::from(&path).display().to_string();
    let text = std::fs::read_to_string(&path).with_context(|| format!("CAPX_MCP: {shown}"))?;
    McpServers::read(&text, dev).map_err(|why| anyhow::anyhow!("CAPX_MCP: {shown}: {why}"))
}

/// Which models may be asked, from the environment, by the names that the providers' own
/// clients use; and what they cost.
fn providers(dev: bool) -> anyhow::Result<Providers> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    let account = |key: &str, base: &str, default: &str| -> anyhow::Result<Option<Account>> {
        let Some(secret) = set(key) else { return Ok(None) };
        let url = set(base).unwrap_or_else(|| default.to_owned());
        let parsed = reqwest::Url::parse(&url).with_context(|| format!("{base}: {url}"))?;
        anyhow::ensure!(matches!(parsed.scheme(), "http" | "https"), "{base}: {url} is no http or https address");
        Ok(Some(Account::new(secret, &url)))
    };
    let offline = match set("CAPX_OFFLINE_MODEL").as_deref() {
        Some("1") => Offline::Always,
        _ if dev => Offline::WithoutKey,
        _ => Offline::Never,
    };
    let prices = match set("CAPX_PRICES") {
        None => Prices::list(),
        Some(path) => {
            let own = std::fs::read_to_string(&path).with_context(|| format!("CAPX_PRICES: {path}"))?;
            Prices::with(&own).map_err(|error| anyhow::anyhow!("CAPX_PRICES: {path}: {error}"))?
        }
    };
    Ok(Providers {
        offline,
        anthropic: account("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", ANTHROPIC_BASE_URL)?,
        openai: account("OPENAI_API_KEY", "OPENAI_BASE_URL", OPENAI_BASE_URL)?,
        prices,
    })
}

/// Which addresses may be reached from here, from the environment; a developer's
/// own machine too.
pub fn egress_rules(dev: bool) -> anyhow::Result<Rules> {
    let rules = Rules::parse(&std::env::var("CAPX_EGRESS_ALLOW").unwrap_or_default()).map_err(anyhow::Error::msg)?;
    Ok(if dev { rules.with_loopback() } else { rules })
}

/// The keys that seal secrets: of the file CAPX_SECRETS_KEY_FILE, or in
/// CAPX_SECRETS_KEYS; none where neither is set.
pub fn keyring() -> anyhow::Result<Keyring> {
    let set = |name: &str| std::env::var(name).ok().filter(|value| !value.is_empty());
    match (set("CAPX_SECRETS_KEY_FILE"), set("CAPX_SECRETS_KEYS")) {
        (Some(path), _) => {
            Keyring::of_file(path.into()).map_err(|error| anyhow::anyhow!("CAPX_SECRETS_KEY_FILE: {error}"))
        }
        (None, Some(keys)) => Ok(Keyring::fixed(Keys::parse(&keys).context("CAPX_SECRETS_KEYS")?)),
        (None, None) => Ok(Keyring::default()),
    }
}

/// Seals all secrets with the first of the keys; how many there were, and its id.
pub async fn reseal(database: &DatabaseArgs) -> anyhow::Result<(u64, String)> {
    let keys = keyring()?.keys();
    let pool = store::pool(&database.url()?, PoolKind::Owner, 1)?;
    let done = capx_core::engine::secrets::reseal(&mut *pool.acquire().await?, &keys).await?;
    Ok((done, keys.first().unwrap_or_default().to_owned()))
}

/// Refuses a database that would lose what it has acknowledged, or whose
/// tables are older than this program.
pub async fn check_database(pool: &PgPool) -> anyhow::Result<()> {
    match store::schema_state(pool)
        .await
        .context("cannot reach the database; is it up, and is CAPX_DATABASE_URL right?")?
    {
        SchemaState::Current => {}
        SchemaState::Behind => bail!("the database's tables are older than this program; run `capx migrate` once"),
    }
    let weak = store::unsafe_settings(pool).await?;
    if !weak.is_empty() && std::env::var("CAPX_ALLOW_UNSAFE_DATABASE").is_err() {
        bail!(
            "the database would lose acknowledged work in a crash ({}); switch these settings on, or set CAPX_ALLOW_UNSAFE_DATABASE=1 for a scratch database",
            weak.join(", ")
        );
    }
    Ok(())
}

/// How many connections a worker needs: claims, commits, looks, a listener.
const WORKER_CONNECTIONS: u32 = 8;

/// A worker over a database.
pub async fn worker(url: &str, args: &WorkerArgs, keyring: Keyring, dev: bool) -> anyhow::Result<Worker> {
    let hands = args.hands(dev)?;
    if let Some(sandbox) = &hands.sandbox {
        let held = sandbox.probe().await;
        held.map_err(|failure| anyhow::anyhow!("--allow-programs: {}", failure.message))?;
    }
    let pool = store::pool(url, PoolKind::Queue, WORKER_CONNECTIONS)?;
    let waker = Waker::start(url);
    let claims = store::pool(url, PoolKind::Claims, 1)?;
    let engine = Engine::new(pool.clone()).with_claims(claims).with_waker(waker).with_keyring(keyring);
    Ok(Worker::new(engine, url, args.config(), hands).listening(pool))
}

/// Where the API listens.
pub const BIND: &str = "127.0.0.1:8080";
/// Connections of a worker for questions about its health.
const HEALTH_CONNECTIONS: u32 = 2;
/// Connections of the API to the database: for what tenants ask, for what is
/// done over all of them, and for their limits.
const API_CONNECTIONS: u32 = 16;
const SYSTEM_CONNECTIONS: u32 = 4;
const METER_CONNECTIONS: u32 = 2;

/// Lets the process have as many connections open as it may: what a shell gives
/// by default is fewer than an API takes.
pub fn raise_open_files() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    // Where that is not allowed, the old limit does until it is reached.
    let _ = setrlimit(Resource::Nofile, limit);
}

/// Takes the address, or says what to do when somebody else has it.
pub async fn listen(bind: &str) -> anyhow::Result<TcpListener> {
    TcpListener::bind(bind).await.map_err(|error| match error.kind() {
        std::io::ErrorKind::AddrInUse => {
            anyhow::anyhow!(
                "{bind} is taken by another program; choose another address, e.g. --bind 127.0.0.1:0 for any free port"
            )
        }
        _ => anyhow::anyhow!("cannot listen on {bind}: {error}; write an address and a port such as {BIND}"),
    })
}

/// The most connections that an API and some workers hold: each of them has a
/// sender of hints, a worker one more for claims and one for its beat.
pub fn connections(workers: u32) -> u32 {
    API_CONNECTIONS + SYSTEM_CONNECTIONS + METER_CONNECTIONS + 1 + workers * (WORKER_CONNECTIONS + 3)
}

/// What the API needs of a database.
pub fn api_state(
    url: &str,
    keyring: Keyring,
    metrics: PrometheusHandle,
    stopping: CancellationToken,
) -> anyhow::Result<ApiState> {
    let pool = store::pool(url, PoolKind::Requests, SYSTEM_CONNECTIONS)?;
    let hub = Hub::start(pool.clone());
    let engine = Engine::new(pool).with_waker(Waker::start(url)).with_keyring(keyring).with_group_commit();
    let proxies = std::env::var("CAPX_TRUSTED_PROXIES").unwrap_or_default();
    Ok(ApiState {
        engine,
        tenants: store::pool(url, PoolKind::Tenants, API_CONNECTIONS)?,
        admission: Admission::start(store::pool(url, PoolKind::Meter, METER_CONNECTIONS)?, auth_failures()?),
        proxies: TrustedProxies::parse(&proxies).map_err(anyhow::Error::msg)?,
        rules: Arc::new(egress_rules(false)?),
        hub,
        document: Arc::from(""),
        metrics,
        stopping,
        wedged: CancellationToken::new(),
        limits: Limits::default(),
    })
}

/// How often a minute an address may fail to authenticate.
fn auth_failures() -> anyhow::Result<u32> {
    match std::env::var("CAPX_AUTH_FAILURES") {
        Ok(text) => text.parse().context("CAPX_AUTH_FAILURES is a number of failures a minute, such as 30"),
        Err(_) => Ok(FAILURES_MAX),
    }
}

/// Serves the API until it is stopped, or has a request that never ends.
pub async fn api(listener: TcpListener, state: ApiState) -> anyhow::Result<()> {
    let (stopping, wedged) = (state.stopping.clone(), state.wedged.clone());
    server::serve(listener, api::router(state), stopping).await;
    if wedged.is_cancelled() {
        bail!(
            "the database has stopped answering on an open connection; look at the network to it, and start capx again"
        );
    }
    Ok(())
}

/// Serves what an orchestrator and a scraper ask of a worker, beside it and as
/// long as it lives, its drain included. `stop` is the worker's: a request here
/// that never ends must not stop the work.
pub async fn health(url: &str, bind: &str, stop: &CancellationToken) -> anyhow::Result<()> {
    let listener = listen(bind).await?;
    tracing::info!(address = %listener.local_addr()?, "health and metrics are served");
    let pool = store::pool(url, PoolKind::Requests, HEALTH_CONNECTIONS)?;
    let state = ApiState {
        engine: Engine::new(pool.clone()),
        tenants: pool.clone(),
        admission: Admission::shut(pool.clone()),
        hub: Hub::silent(pool),
        proxies: TrustedProxies::default(),
        rules: Arc::default(),
        document: Arc::from(""),
        metrics: metrics()?,
        stopping: stop.child_token(),
        wedged: CancellationToken::new(),
        limits: Limits::default(),
    };
    tokio::spawn(server::serve(listener, api::health_router(state), CancellationToken::new()));
    Ok(())
}

/// The process's metrics, once a process.
pub fn metrics() -> anyhow::Result<PrometheusHandle> {
    // Histograms as buckets, from 100 µs to a minute.
    let buckets = [0.0001, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 5.0, 15.0, 60.0];
    let recorder = PrometheusBuilder::new().set_buckets(&buckets)?.build_recorder();
    let handle = recorder.handle();
    let upkeep = handle.clone();
    tokio::spawn(async move {
        // Folds what histograms have gathered; nobody may ever scrape.
        loop {
            tokio::time::sleep(Duration::from_secs(5)).await;
            upkeep.run_upkeep();
        }
    });
    metrics::set_global_recorder(recorder).map_err(|_| anyhow::anyhow!("the metrics were started twice"))?;
    Ok(handle)
}

/// Cancelled by SIGINT or SIGTERM.
pub fn stop_signal() -> anyhow::Result<CancellationToken> {
    use tokio::signal::unix::{SignalKind, signal};
    let stop = CancellationToken::new();
    let token = stop.clone();
    let mut interrupt = signal(SignalKind::interrupt())?;
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::spawn(async move {
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        token.cancel();
        // A second one means it.
        tokio::select! {
            _ = interrupt.recv() => {}
            _ = terminate.recv() => {}
        }
        std::process::exit(130);
    });
    Ok(stop)
}
