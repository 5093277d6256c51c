//! The REST API: requests in, use cases of the engine, the documented
//! envelope out.
//!
//! [`server`] is the accept loop with its limits, [`request`] what every
//! request passes (an id, a task of its own, a log line), [`admission`] the
//! limits of accounts, [`auth`] who calls, [`body`], [`reply`] and [`error`]
//! how requests are read and answers told, [`command`] how something is
//! changed, [`stream`] server-sent events, [`openapi`] the document, [`routes`]
//! one file a resource.

use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::routing::get;
use capx_core::domain::address::Rules;
use capx_core::engine::Engine;
use metrics_exporter_prometheus::PrometheusHandle;
use sqlx::PgPool;
use tokio_util::sync::CancellationToken;
use utoipa_swagger_ui::{Config, SwaggerUi};

pub mod admission;
pub mod auth;
pub mod body;
pub mod command;
pub mod error;
mod health;
mod openapi;
pub mod peer;
mod period;
pub mod reply;
mod request;
mod routes;
pub mod server;
pub mod stream;

pub use error::ApiError;

use admission::Admission;
use peer::TrustedProxies;
use stream::hub::Hub;

/// The largest body of a request, in bytes.
pub const BODY_BYTES_MAX: usize = 1024 * 1024;

/// The longest address of a request, in bytes.
pub const URI_BYTES_MAX: usize = 8 * 1024;

/// How long a client may take to send the whole body of a request.
const BODY_TIME_MAX: Duration = Duration::from_secs(30);
/// How long a client waits for an answer at most: longer than the longest
/// `?wait` and the body's time.
const ANSWER_MAX: Duration = Duration::from_secs(100);
/// A request that has not ended by then never will: the server would have
/// cancelled its statements after 15 s each, so nobody is at the other end of
/// its connection.
const UNANSWERED_MAX: Duration = Duration::from_secs(180);

/// The times that a request is bounded by.
#[derive(Debug, Clone, Copy)]
pub struct Limits {
    /// For a client to send the whole body.
    pub body: Duration,
    /// For the answer; the request goes on.
    pub answer: Duration,
    /// For the request itself; the process ends.
    pub unanswered: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Self { body: BODY_TIME_MAX, answer: ANSWER_MAX, unanswered: UNANSWERED_MAX }
    }
}

/// What handlers share. Cheap to clone.
#[derive(Clone)]
pub struct ApiState {
    /// The use cases, over all tenants.
    pub engine: Engine,
    /// The database as tenants see it, see [`capx_core::store::tenancy`].
    pub tenants: PgPool,
    /// Keys, limits and credits.
    pub admission: Admission,
    /// The reader of the log for streams.
    pub hub: Hub,
    /// Which addresses webhooks may name.
    pub rules: Arc<Rules>,
    /// Whom to believe where a request comes from.
    pub proxies: TrustedProxies,
    /// The OpenAPI document, as JSON.
    pub document: Arc<str>,
    /// What `/metrics` shows.
    pub metrics: PrometheusHandle,
    /// The process winds down: not ready any more, and held answers end.
    pub stopping: CancellationToken,
    /// A request never ended; cancelled together with `stopping`.
    pub wedged: CancellationToken,
    /// What a request is bounded by.
    pub limits: Limits,
}

/// Every route, with what every request passes.
pub fn router(mut state: ApiState) -> Router {
    state.document = document(&state).to_string().into();
    let (v1, _) = v1(&state).finish();
    let docs = SwaggerUi::new("/docs").config(Config::from("/v1/openapi.json"));
    let routes = health_routes().merge(v1).merge(docs);
    let routes = routes
        .route("/v1/openapi.json", get(openapi::serve))
        .route("/v1/schemas/playbook.json", get(openapi::serve_schema));
    finish(state, routes)
}

/// The OpenAPI document of the API, the same in every process.
pub fn document(state: &ApiState) -> serde_json::Value {
    let mut document = serde_json::to_value(v1(state).finish().1).unwrap_or_default();
    openapi::optional_bodies(&mut document);
    openapi::plain_texts(&mut document);
    openapi::webhooks(&mut document);
    // Extensions have no order of their own.
    document.sort_all_objects();
    document
}

fn v1(state: &ApiState) -> openapi::Routes {
    let routes = openapi::Routes::new(Arc::new(state.clone()));
    let routes = routes::companies::routes(routes);
    let routes = routes::agents::routes(routes);
    let routes = routes::tasks::routes(routes);
    let routes = routes::activity::routes(routes);
    let routes = routes::costs::routes(routes);
    let routes = routes::exports::routes(routes);
    let routes = routes::keys::routes(routes);
    let routes = routes::playbooks::routes(routes);
    let routes = routes::runs::routes(routes);
    let routes = routes::run_changes::routes(routes);
    let routes = routes::run_items::routes(routes);
    let routes = routes::artifacts::routes(routes);
    let routes = routes::audit::routes(routes);
    let routes = routes::memory::routes(routes);
    let routes = routes::secrets::routes(routes);
    let routes = routes::signals::routes(routes);
    let routes = routes::webhooks::routes(routes);
    let routes = routes::deliveries::routes(routes);
    let routes = routes::hooks::routes(routes);
    let routes = routes::fleet::routes(routes);
    let routes = routes::dead_letters::routes(routes);
    let routes = routes::redrives::routes(routes);
    let routes = routes::retention::routes(routes);
    let routes = routes::flow_limits::routes(routes);
    let routes = routes::pauses::routes(routes);
    routes::approvals::routes(routes)
}

/// What an orchestrator and a scraper ask of a process that is no API.
pub fn health_router(state: ApiState) -> Router {
    finish(state, health_routes())
}

fn health_routes() -> Router<Arc<ApiState>> {
    Router::new()
        .route("/healthz", get(health::healthz))
        .route("/readyz", get(health::readyz))
        .route("/metrics", get(health::metrics))
}

fn finish(state: ApiState, routes: Router<Arc<ApiState>>) -> Router {
    let state = Arc::new(state);
    routes
        .fallback(error::no_such_route)
        .method_not_allowed_fallback(error::no_such_method)
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), request::pass))
        .layer(axum::middleware::from_fn_with_state(Arc::clone(&state), auth::tell_strangers))
        .with_state(state)
}

/// The state as handlers take it.
pub type Shared = axum::extract::State<Arc<ApiState>>;
