//! One private server for all tests of this process, a database for each,
//! and waiting for conditions instead of times.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::time::{Duration, Instant};

use capx::api::{ApiState, Limits};
use capx::dev::postgres::{Binaries, Options, Server};
use capx::{keys, serve};
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{AccountId, AgentId, ApprovalId, CompanyId, PlaybookId, RunId};
use capx_core::domain::run::RunStatus;
use capx_core::domain::secret::seal;
use capx_core::engine::gates::{Verdict, decide};
use capx_core::engine::playbooks::CreatePlaybook;
use capx_core::engine::secrets::Keyring;
use capx_core::engine::tenants::CreateCompany;
use capx_core::engine::{Engine, EngineError, Waker, playbooks, start, tenants as companies};
use capx_core::store::agents::NewAgent;
use capx_core::store::approvals::ApprovalRow;
use capx_core::store::runs::RunRow;
use capx_core::store::{self, PoolKind, runs, tenants};
use capx_workers::adapters::Providers;
use capx_workers::egress::Egress;
use capx_workers::mcp::McpServers;
use capx_workers::sandbox::Sandbox;
use capx_workers::{Hands, Worker, WorkerConfig};
use metrics_exporter_prometheus::PrometheusHandle;
use serde_json::{Map, Value, json};
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;

use crate::contract;
use crate::proxy::Proxy;

/// The longest that any test waits for a condition.
pub const PATIENCE: Duration = Duration::from_secs(90);
/// A lease that lets a death be noticed soon.
pub const SHORT_LEASE: Duration = Duration::from_millis(1_500);

/// Where this process keeps its files.
pub fn scratch() -> PathBuf {
    std::env::temp_dir().join(format!("capx-it-{}", std::process::id()))
}

/// Leftovers of test processes that are gone.
fn sweep_leftovers() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        let Some(pid) = name.strip_prefix("capx-it-") else { continue };
        if !Path::new("/proc").join(pid).exists() {
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

fn server() -> &'static Server {
    static SERVER: OnceLock<Server> = OnceLock::new();
    SERVER.get_or_init(|| {
        sweep_leftovers();
        let directory = scratch();
        std::fs::create_dir_all(&directory).unwrap();
        use std::os::unix::fs::PermissionsExt;
        std::fs::set_permissions(&directory, std::fs::Permissions::from_mode(0o755)).unwrap();
        let cache = capx::dev::fetch::bin(&directory);
        let mut found = Binaries::on_this_machine(&cache).unwrap();
        if found.is_empty() {
            found.push(capx::dev::fetch::fetch(&directory).unwrap());
        }
        // No test pulls the plug of the machine, so no test needs fsync.
        let settings = vec!["fsync=off".into(), "max_connections=400".into(), "autovacuum_naptime=5s".into()];
        Server::start(&found, &Options { directory, settings }).unwrap()
    })
}

/// Runs one statement on the server's own database.
async fn on_server(sql: String) {
    use sqlx::Connection;
    let mut connection = sqlx::PgConnection::connect(&server().url_of("postgres")).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&mut connection).await.unwrap();
}

/// A test's own database, migrated.
pub struct Db {
    pub url: String,
    pub pool: PgPool,
    pub engine: Engine,
    pub account: AccountId,
    pub files: PathBuf,
    /// The file of the keys that seal its secrets.
    pub keys: PathBuf,
    /// It holds events that never happened, and that look like it.
    invents: AtomicBool,
}

impl Drop for Db {
    /// Whatever a test was about: what has happened was told as the document says.
    fn drop(&mut self) {
        if std::thread::panicking() || self.invents.load(Ordering::Relaxed) {
            return;
        }
        let url = self.url.clone();
        let checked = std::thread::spawn(move || {
            tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
                use sqlx::Connection;
                let mut connection = sqlx::PgConnection::connect(&url).await.unwrap();
                let told: Vec<(String, Value)> =
                    sqlx::query_as("select distinct on (event, data) event, data from events limit 5000")
                        .fetch_all(&mut connection)
                        .await
                        .unwrap_or_default();
                told.iter().for_each(|(name, data)| contract::check_event(name, data));
                // No index over the months of events can say so.
                let twice: i64 = sqlx::query_scalar(
                    "select count(*) from (
                         select from events where run_id is not null group by company_id, run_id, seq having count(*) > 1
                     ) t",
                )
                .fetch_one(&mut connection)
                .await
                .unwrap_or_default();
                assert_eq!(twice, 0, "a number was given to two events of a run");
            });
        });
        assert!(checked.join().is_ok(), "an event is other than documented");
    }
}

impl Db {
    pub async fn new() -> Self {
        // Brings the process's one TLS provider, which clients need too.
        let _ = Egress::new(Rules::default());
        static TEMPLATE: tokio::sync::OnceCell<()> = tokio::sync::OnceCell::const_new();
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        TEMPLATE
            .get_or_init(|| async {
                on_server("create database template_capx".into()).await;
                let pool = store::pool(&server().url_of("template_capx"), PoolKind::Owner, 1).unwrap();
                store::migrate(&pool).await.unwrap();
                pool.close().await;
            })
            .await;
        // One at a time: a template must have no other users.
        static TURN: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());
        let name = format!("t{}", NUMBER.fetch_add(1, Ordering::Relaxed));
        {
            let _turn = TURN.lock().await;
            on_server(format!("create database {name} template template_capx")).await;
        }
        let url = server().url_of(&name);
        let pool = store::pool(&url, PoolKind::Owner, 8).unwrap();
        let account = tenants::account(&pool, "tests", "enterprise").await.unwrap();
        // As a worker sees it, while `pool` may do what only the owner may.
        let keys = scratch().join(format!("keys-{name}"));
        std::fs::write(&keys, seal::new_key().unwrap()).unwrap();
        let engine = Engine::new(store::pool(&url, PoolKind::Queue, 8).unwrap()).with_waker(Waker::start(&url));
        let engine = engine.with_keyring(Keyring::of_file(keys.clone()).unwrap());
        let invents = AtomicBool::new(false);
        Self { files: scratch().join(format!("files-{name}")), url, pool, engine, account, keys, invents }
    }

    /// The same database by way of a proxy: for what is built from its
    /// address, not for the test's own looks.
    pub async fn behind_a_proxy(&self) -> (Self, Proxy) {
        let proxy = Proxy::start(server().port()).await;
        let database = self.url.rsplit('/').next().unwrap();
        let direct = server().tcp_url();
        let (user, _) = direct.rsplit_once('@').unwrap();
        let url = format!("{user}@127.0.0.1:{}/{database}", proxy.port);
        let (pool, engine, files) = (self.pool.clone(), self.engine.clone(), self.files.clone());
        let invents = AtomicBool::new(true);
        (Self { url, pool, engine, account: self.account, files, keys: self.keys.clone(), invents }, proxy)
    }

    /// This test writes events that look like none.
    pub fn invents_events(&self) {
        self.invents.store(true, Ordering::Relaxed);
    }

    /// A company with agents of some roles, by an adapter.
    pub async fn company(&self, roles: &[&str], adapter: &str, config: Value) -> CompanyId {
        let agents = roles
            .iter()
            .map(|role| NewAgent {
                agent: AgentId::new(),
                role: (*role).into(),
                adapter: adapter.into(),
                instructions: "Work.".into(),
                model: None,
                budget: None,
                config: config.clone(),
            })
            .collect();
        let request = CreateCompany {
            name: "test".into(),
            description: None,
            config: json!({}),
            governance: None,
            template: None,
            agents,
        };
        companies::create_company(&self.engine, self.account, &request).await.unwrap().0
    }

    pub async fn playbook(&self, company: CompanyId, yaml: &str) -> PlaybookId {
        let request = CreatePlaybook { name: None, description: None, yaml: yaml.into(), tags: Vec::new() };
        match playbooks::create(&self.engine, company, &request).await {
            Ok(created) => created.upserted.playbook,
            Err(error) => panic!("{error:?}"),
        }
    }

    pub async fn start(&self, company: CompanyId, playbook: PlaybookId, params: Value) -> RunId {
        let params: Map<String, Value> = params.as_object().cloned().unwrap();
        start::start_run(&self.engine, company, playbook, params, "manual").await.unwrap().run
    }

    pub async fn decide(&self, id: ApprovalId, verdict: &Verdict) -> Result<ApprovalRow, EngineError> {
        let mut tx = self.engine.pool.begin().await?;
        let decided = decide(&self.engine, &mut tx, self.account, None, id, "key_x", verdict).await?;
        tx.commit().await?;
        self.engine.waker.wake();
        Ok(decided)
    }

    pub async fn run(&self, company: CompanyId, run: RunId) -> RunRow {
        runs::get(&self.engine.pool, company, run).await.unwrap().unwrap()
    }

    /// Waits until a run has a status; a run that ends otherwise fails the
    /// test with the reason.
    pub async fn until(&self, company: CompanyId, run: RunId, wanted: RunStatus) -> RunRow {
        let end = Instant::now() + PATIENCE;
        loop {
            let row = self.run(company, run).await;
            if row.status == wanted {
                return row;
            }
            assert!(!row.status.is_terminal(), "{:?} instead of {wanted:?}: {:?}", row.status, row.error);
            assert!(Instant::now() < end, "{:?} instead of {wanted:?} in time", row.status);
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }

    /// Nothing may be left that nobody explains: every open run has a job.
    pub async fn assert_nothing_stranded(&self) {
        let mut connection = self.pool.acquire().await.unwrap();
        assert_eq!(runs::stranded(&mut connection).await.unwrap(), 0);
    }

    /// Tables and the months of those that are cut into months.
    pub async fn with_months(&self, tables: &[&str]) -> Vec<String> {
        sqlx::query_scalar(
            "select p.relid::regclass::text from unnest($1::text[]) t
             cross join lateral pg_partition_tree(t::regclass) p where p.isleaf
             union
             select c.oid::regclass::text from unnest($1::text[]) t join pg_class c on c.oid = t::regclass where c.relkind = 'r'",
        )
        .bind(tables)
        .fetch_all(&self.pool)
        .await
        .unwrap()
    }

    pub async fn count(&self, sql: &'static str) -> i64 {
        sqlx::query_scalar(sql).fetch_one(&self.pool).await.unwrap()
    }

    /// A worker of this process, offline model on, loopback allowed.
    pub fn worker(&self, lease: Duration) -> Running {
        self.worker_with(lease, Providers::offline())
    }

    /// The same with models of its own.
    pub fn worker_with(&self, lease: Duration, providers: Providers) -> Running {
        let egress = Egress::new(Rules::default().with_loopback()).unwrap();
        self.worker_by(lease, Hands::new(egress, &self.files, providers))
    }

    /// One that may run programs.
    pub fn worker_with_programs(&self, sandbox: Sandbox) -> Running {
        let egress = Egress::new(Rules::default().with_loopback()).unwrap();
        self.worker_by(SHORT_LEASE, Hands::new(egress, &self.files, Providers::offline()).running(Some(sandbox)))
    }

    /// One that knows MCP servers.
    pub fn worker_with_mcp(&self, servers: McpServers) -> Running {
        let egress = Egress::new(Rules::default().with_loopback()).unwrap();
        self.worker_by(SHORT_LEASE, Hands::new(egress, &self.files, Providers::offline()).with_mcp(servers))
    }

    fn worker_by(&self, lease: Duration, hands: Hands) -> Running {
        let pool = store::pool(&self.url, PoolKind::Queue, 6).unwrap();
        let config = WorkerConfig { slots: 16, lease, drain: Duration::from_secs(20), ..WorkerConfig::default() };
        let engine = Engine::new(pool.clone()).with_waker(Waker::start(&self.url)).with_keyring(self.keyring());
        let worker = Worker::new(engine, &self.url, config, hands).listening(pool);
        let stop = CancellationToken::new();
        let token = stop.clone();
        let task = tokio::spawn(async move {
            worker.run(token).await.unwrap();
        });
        Running { stop, task: Some(task) }
    }

    pub fn keyring(&self) -> Keyring {
        Keyring::of_file(self.keys.clone()).unwrap()
    }

    /// The API over this database, on a port of its own, with a key.
    pub async fn api(&self) -> Api {
        self.api_within(Limits::default()).await
    }

    /// The same with other limits.
    pub async fn api_within(&self, limits: Limits) -> Api {
        static METRICS: OnceLock<PrometheusHandle> = OnceLock::new();
        let metrics = METRICS.get_or_init(|| serve::metrics().unwrap()).clone();
        let stop = CancellationToken::new();
        let state = serve::api_state(&self.url, self.keyring(), metrics, stop.clone()).unwrap();
        let state = ApiState { limits, ..state };
        contract::know(&capx::api::document(&state).to_string());
        let listener = serve::listen("127.0.0.1:0").await.unwrap();
        let base = format!("http://{}", listener.local_addr().unwrap());
        let served = tokio::spawn(serve::api(listener, state));
        let key = self.key(&["*"]).await;
        let client = reqwest::Client::builder().no_proxy().build().unwrap();
        Api { base, key, client, served: Some(served), _stop: stop.drop_guard() }
    }

    pub async fn key(&self, scopes: &[&str]) -> String {
        self.key_named("test", scopes).await
    }

    pub async fn key_named(&self, name: &str, scopes: &[&str]) -> String {
        let scopes: Vec<String> = scopes.iter().map(|s| (*s).to_owned()).collect();
        keys::make(&self.pool, self.account, None, name, true, &scopes).await.unwrap().key
    }
}

/// A worker that stops, and is waited for, on demand.
pub struct Running {
    stop: CancellationToken,
    task: Option<tokio::task::JoinHandle<()>>,
}

impl Running {
    pub async fn stop(mut self) {
        self.stop.cancel();
        self.task.take().unwrap().await.unwrap();
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// A client of a running API.
pub struct Api {
    pub base: String,
    pub key: String,
    pub client: reqwest::Client,
    /// How its process would end.
    pub served: Option<tokio::task::JoinHandle<anyhow::Result<()>>>,
    pub _stop: tokio_util::sync::DropGuard,
}

impl Api {
    pub async fn send(&self, method: &str, path: &str, body: Option<Value>) -> (u16, Value) {
        let mut request = self
            .client
            .request(method.parse().unwrap(), format!("{}{path}", self.base))
            .header("authorization", format!("Bearer {}", self.key));
        if let Some(body) = body {
            request = request.header("content-type", "application/json").body(body.to_string());
        }
        let response = request.send().await.unwrap();
        let status = response.status().as_u16();
        assert!(response.headers().contains_key("x-request-id"), "{method} {path}");
        for header in ["x-ratelimit-limit", "x-ratelimit-remaining", "x-ratelimit-reset"] {
            assert!(response.headers().contains_key(header), "{method} {path}: no {header}");
        }
        let text = response.text().await.unwrap();
        let answer = serde_json::from_str(&text).unwrap_or(Value::String(text));
        contract::check(method, path, status, &answer);
        (status, answer)
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        self.send("GET", path, None).await
    }

    /// Makes a company, and waits until it runs.
    pub async fn company(&self, body: Value) -> CompanyId {
        let (status, made) = self.post("/v1/companies", body).await;
        assert_eq!(status, 201, "{made}");
        let id = made["data"]["id"].as_str().unwrap();
        eventually("the company to run", || async {
            self.get(&format!("/v1/companies/{id}")).await.1["data"]["status"] == "running"
        })
        .await;
        id.parse().unwrap()
    }

    pub async fn post(&self, path: &str, body: Value) -> (u16, Value) {
        self.send("POST", path, Some(body)).await
    }
}

/// Waits for a condition.
pub async fn eventually<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let end = Instant::now() + PATIENCE;
    while !condition().await {
        assert!(Instant::now() < end, "waited in vain for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A small generator, so that a schedule can be run again from its seed.
pub struct Seeded(pub u64);

impl Seeded {
    pub fn below(&mut self, n: u64) -> u64 {
        // SplitMix64 (Steele, Lea, Flood 2014).
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (z ^ (z >> 31)) % n
    }
}

/// A sink outside of the system that counts effects by their key: it fails
/// as often as it is told to, and then answers, unless it is told to hold.
pub mod witness {
    use std::collections::HashMap;
    use std::sync::atomic::{AtomicUsize, Ordering::Relaxed};
    use std::sync::{Arc, Mutex};
    use std::time::Duration;

    use axum::Router;
    use axum::extract::State;
    use axum::http::{HeaderMap, StatusCode, Uri};
    use axum::routing::any;
    use tokio::sync::watch;

    #[derive(Clone, Default)]
    pub struct Witness {
        calls: Arc<Mutex<HashMap<String, u32>>>,
        paths: Arc<Mutex<Vec<String>>>,
        failures: Arc<Mutex<Vec<u16>>>,
        held: watch::Sender<bool>,
        held_calls: Arc<AtomicUsize>,
        pub url: String,
    }

    impl Witness {
        /// Starts one that first answers with the given statuses.
        pub async fn start(failures: &[u16]) -> Self {
            let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
            let witness = Self {
                failures: Arc::new(Mutex::new(failures.to_vec())),
                url: format!("http://{}", listener.local_addr().unwrap()),
                ..Self::default()
            };
            let router = Router::new().fallback(any(answer)).with_state(witness.clone());
            tokio::spawn(async move { axum::serve(listener, router).await });
            witness
        }

        /// Counts calls from now on, and answers none until told otherwise.
        pub fn hold(&self, held: bool) {
            self.held.send_replace(held);
        }

        /// How many calls have been held.
        pub fn held_calls(&self) -> usize {
            self.held_calls.load(Relaxed)
        }

        /// The paths that were called, each key once, in order.
        pub fn paths(&self) -> Vec<String> {
            self.paths.lock().unwrap().clone()
        }

        /// The calls by key.
        pub fn calls(&self) -> HashMap<String, u32> {
            self.calls.lock().unwrap().clone()
        }
    }

    async fn answer(
        State(witness): State<Witness>,
        uri: Uri,
        headers: HeaderMap,
    ) -> (StatusCode, [(&'static str, &'static str); 1], String) {
        let key = headers.get("idempotency-key").and_then(|v| v.to_str().ok()).unwrap_or("none").to_owned();
        let count = {
            let mut calls = witness.calls.lock().unwrap();
            let count = calls.entry(key).or_default();
            *count += 1;
            *count
        };
        if count == 1 {
            witness.paths.lock().unwrap().push(uri.path().to_owned());
        }
        // Long enough to be interrupted.
        tokio::time::sleep(Duration::from_millis(2)).await;
        if *witness.held.borrow() {
            witness.held_calls.fetch_add(1, Relaxed);
        }
        let _ = witness.held.subscribe().wait_for(|held| !held).await;
        let json = [("content-type", "application/json")];
        let mut told = witness.failures.lock().unwrap();
        let status = if told.is_empty() { 200 } else { told.remove(0) };
        if uri.path().starts_with("/refused") {
            (StatusCode::BAD_REQUEST, json, r#"{"error": "as the path says"}"#.to_owned())
        } else if status == 200 {
            (StatusCode::OK, json, format!(r#"{{"output": {{"ok": true}}, "cost": 0.25, "path": "{}"}}"#, uri.path()))
        } else {
            (StatusCode::from_u16(status).unwrap(), json, r#"{"error": "as told"}"#.to_owned())
        }
    }
}

impl Db {
    /// Waits until a run has left a status, whatever it has come to.
    pub async fn until_left(&self, company: CompanyId, run: RunId, status: RunStatus) {
        eventually("the run to go on", || async { self.run(company, run).await.status != status }).await;
    }
}
