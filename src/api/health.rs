//! Whether the process is up, whether it can serve, and what it counts.

use std::collections::BTreeSet;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::{IntoResponse, Response};
use capx_core::store::{self, SchemaState, StoreError, fleet};
use serde_json::json;
use sqlx::PgPool;

use super::{Shared, request};

pub(super) async fn healthz() -> Response {
    Json(json!({"status": "ok", "version": env!("CARGO_PKG_VERSION")})).into_response()
}

pub(super) async fn readyz(State(state): Shared) -> Response {
    let why = if state.stopping.is_cancelled() {
        Some("shutting down".to_owned())
    } else {
        match store::schema_state(&state.engine.pool).await {
            Ok(SchemaState::Current) => None,
            Ok(SchemaState::Behind) => Some("the database is not migrated; run `capx migrate`".to_owned()),
            Err(error) => {
                tracing::debug!(%error, request.id = request::current_id(), "not ready");
                Some("the database is away".to_owned())
            }
        }
    };
    match why {
        None => Json(json!({"status": "ready"})).into_response(),
        Some(why) => {
            (StatusCode::SERVICE_UNAVAILABLE, Json(json!({"status": "not ready", "reason": why}))).into_response()
        }
    }
}

pub(super) async fn metrics(State(state): Shared) -> String {
    if is_time() {
        match gauge(&state.engine.pool).await {
            Ok(()) => {}
            // The counters are worth having all the same.
            Err(error) => tracing::debug!(%error, "the fleet's gauges could not be read"),
        }
    }
    state.metrics.render()
}

/// The fleet's gauges are read no more often than this, however often somebody scrapes.
const READ: Duration = Duration::from_secs(5);

fn is_time() -> bool {
    static LAST: Mutex<Option<Instant>> = Mutex::new(None);
    let mut last = LAST.lock().unwrap_or_else(PoisonError::into_inner);
    let due = last.is_none_or(|at| at.elapsed() >= READ);
    if due {
        *last = Some(Instant::now());
    }
    due
}

/// Reads the fleet's gauges; `docs/operations.md` tells what they are.
async fn gauge(pool: &PgPool) -> Result<(), StoreError> {
    static SEEN: Mutex<BTreeSet<String>> = Mutex::new(BTreeSet::new());
    let queues = fleet::queues(pool).await?;
    {
        // Of those that are gone nothing is left.
        let mut seen = SEEN.lock().unwrap_or_else(PoisonError::into_inner);
        for gone in seen.iter().filter(|seen| !queues.iter().any(|queue| queue.queue == **seen)) {
            let of = |name: &'static str| metrics::gauge!(name, "queue" => gone.clone());
            ["capx_queue_ready", "capx_queue_running", "capx_queue_oldest_seconds", "capx_queue_paused"]
                .map(of)
                .iter()
                .for_each(|gauge| gauge.set(0.0));
        }
        seen.extend(queues.iter().map(|queue| queue.queue.clone()));
    }
    for queue in queues {
        let of = |name: &'static str| metrics::gauge!(name, "queue" => queue.queue.clone());
        of("capx_queue_ready").set(queue.ready as f64);
        of("capx_queue_running").set(queue.running as f64);
        of("capx_queue_oldest_seconds").set(queue.oldest_s.unwrap_or(0.0));
        of("capx_queue_paused").set(if queue.paused_at.is_some() { 1.0 } else { 0.0 });
    }
    let read = fleet::gauges(pool).await?;
    metrics::gauge!("capx_fleet_workers").set(read.workers as f64);
    metrics::gauge!("capx_dead_letters").set(read.dead_letters as f64);
    metrics::gauge!("capx_webhooks_failing").set(read.webhooks_failing as f64);
    metrics::gauge!("capx_webhooks_disabled").set(read.webhooks_disabled as f64);
    metrics::gauge!("capx_upkeep_failing").set(read.upkeep_failing as f64);
    metrics::gauge!("capx_oldest_snapshot_seconds").set(read.oldest_snapshot_s);
    Ok(())
}
