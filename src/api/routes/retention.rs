//! How long what is over is kept, on this server.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::retention::{DAYS_MAX, Kept};
use capx_core::engine::{FieldProblem, upkeep};
use capx_core::store::upkeep as store;
use serde::{Deserialize, Serialize};
use sqlx::PgConnection;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::Routes;
use super::fleet::{operation, operator};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check};
use crate::api::reply::One;
use crate::api::{ApiError, Shared};

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::OpsRead, 1, routes!(show)).with(Scope::OpsWrite, 2, routes!(change))
}

/// How long what is over is kept, in days. What is not over is kept, whatever its age; so are
/// the ledger and the audit log.
#[derive(Debug, Serialize, ToSchema)]
struct Retention {
    /// Runs that ended well, or were cancelled, with their steps, events and calls.
    runs: i32,
    /// Runs that failed.
    failed_runs: i32,
    /// Events that belong to no run.
    activity: i32,
    /// Deliveries that were taken.
    deliveries: i32,
    /// Deliveries that were given up.
    failed_deliveries: i32,
}

/// What is to be kept for how long; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RetentionBody {
    #[schema(minimum = 3, maximum = 36_500)]
    runs: Option<i32>,
    #[schema(minimum = 3, maximum = 36_500)]
    failed_runs: Option<i32>,
    #[schema(minimum = 7, maximum = 36_500)]
    activity: Option<i32>,
    #[schema(minimum = 3, maximum = 36_500)]
    deliveries: Option<i32>,
    #[schema(minimum = 3, maximum = 36_500)]
    failed_deliveries: Option<i32>,
}

impl RetentionBody {
    fn given(&self) -> impl Iterator<Item = (Kept, i32)> {
        let of = |kept: Kept| match kept {
            Kept::Runs => self.runs,
            Kept::FailedRuns => self.failed_runs,
            Kept::Activity => self.activity,
            Kept::Deliveries => self.deliveries,
            Kept::FailedDeliveries => self.failed_deliveries,
        };
        Kept::ALL.into_iter().filter_map(move |kept| Some((kept, of(kept)?)))
    }
}

impl Check for RetentionBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let wrong = |(kept, days): (Kept, i32)| {
            let least = kept.least_days();
            let message = format!("must be from {least} to {DAYS_MAX} days");
            (!(least..=DAYS_MAX).contains(&days)).then(|| FieldProblem::new(kept.as_str(), message))
        };
        self.given().filter_map(wrong).collect()
    }
}

async fn read(tx: &mut PgConnection) -> Result<Retention, ApiError> {
    let set = upkeep::retention(tx).await?;
    let of = |kept: Kept| set.get(&kept).copied().unwrap_or_else(|| kept.default_days());
    Ok(Retention {
        runs: of(Kept::Runs),
        failed_runs: of(Kept::FailedRuns),
        activity: of(Kept::Activity),
        deliveries: of(Kept::Deliveries),
        failed_deliveries: of(Kept::FailedDeliveries),
    })
}

/// Get the retention
///
/// For the account that runs the server.
#[utoipa::path(get, path = "/retention", tag = "Operations",
    responses((status = 200, description = "Days.", body = One<Retention>), (status = 304, description = "Not changed.")))]
async fn show(State(state): Shared, caller: Caller) -> Result<Response, ApiError> {
    operator(&caller, &mut *caller.read(&state).await?).await?;
    let mut connection = state.engine.pool.acquire().await.map_err(capx_core::store::StoreError::from)?;
    caller.one(&read(&mut connection).await?)
}

/// Change the retention
///
/// Only what is given changes; what is older goes within minutes. For the account that runs the
/// server.
#[utoipa::path(patch, path = "/retention", tag = "Operations", request_body = RetentionBody,
    responses((status = 200, description = "Days.", body = One<Retention>)))]
async fn change(
    State(state): Shared,
    caller: Caller,
    Body { body, digest }: Body<RetentionBody>,
) -> Result<Response, ApiError> {
    let mut command = operation(&caller, &state, digest).await?;
    for (kept, days) in body.given() {
        store::set_retention(command.tx(), kept, days, &caller.key.to_string()).await?;
    }
    let shown = read(command.tx()).await?;
    command.finish(StatusCode::OK, shown).await
}
