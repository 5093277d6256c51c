//! How much of a queue a company may have at once, and a second.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::ids::CompanyId;
use capx_core::engine::FieldProblem;
use capx_core::store::flows::{self, LimitRow};
use capx_core::store::jobs::queue::WEBHOOKS;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::Routes;
use super::fleet::{known, operation, operator};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Path};
use crate::api::reply::{All, One};
use crate::api::{ApiError, Shared};

const AT_ONCE_MAX: i32 = 100_000;
const RATE_MAX: f64 = 1_000_000.0;
const RATE_MIN: f64 = 0.01;

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::OpsRead, 1, routes!(list)).with(Scope::OpsWrite, 2, routes!(set))
}

/// How much of a queue a company may have; without either it has no limit.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct LimitBody {
    /// `co_…`
    company_id: String,
    /// So many attempts at once.
    #[schema(minimum = 1, maximum = 100_000)]
    max_concurrency: Option<i32>,
    /// So many are claimed a second; a worker goes on with a run for a few steps without another claim.
    #[schema(minimum = 0.01, maximum = 1_000_000)]
    rate_limit: Option<f64>,
}

impl Check for LimitBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        if self.max_concurrency.is_some_and(|most| !(1..=AT_ONCE_MAX).contains(&most)) {
            problems.push(FieldProblem::new("max_concurrency", format!("must be from 1 to {AT_ONCE_MAX}")));
        }
        if self.rate_limit.is_some_and(|rate| !(RATE_MIN..=RATE_MAX).contains(&rate)) {
            problems.push(FieldProblem::new("rate_limit", format!("must be from {RATE_MIN} to {RATE_MAX} a second")));
        }
        problems
    }
}

/// How much of a queue a company may have.
#[derive(Debug, Serialize, ToSchema)]
struct QueueLimit {
    #[schema(value_type = String)]
    company_id: CompanyId,
    #[schema(required)]
    max_concurrency: Option<i32>,
    #[schema(required)]
    rate_limit: Option<f64>,
}

impl From<LimitRow> for QueueLimit {
    fn from(row: LimitRow) -> Self {
        Self { company_id: CompanyId(row.company_id), max_concurrency: row.max_running, rate_limit: row.rate }
    }
}

/// List a queue's limits
///
/// For the account that runs the server.
#[utoipa::path(get, path = "/queues/{queue}/limits", tag = "Operations",
    params(("queue" = String, Path, description = "The queue's name.")),
    responses((status = 200, description = "The first thousand.", body = All<QueueLimit>)))]
async fn list(State(state): Shared, caller: Caller, Path(queue): Path<String>) -> Result<Response, ApiError> {
    operator(&caller, &mut *caller.read(&state).await?).await?;
    let mut connection = state.engine.pool.acquire().await.map_err(capx_core::store::StoreError::from)?;
    known(&mut connection, &queue).await?;
    let rows = flows::limits(&mut connection, &queue).await?;
    caller.all(rows.into_iter().map(QueueLimit::from).collect())
}

/// Limit a company in a queue
///
/// Enforced where jobs are claimed, over all workers. For the account that runs the server.
#[utoipa::path(post, path = "/queues/{queue}/limits", tag = "Operations", request_body = LimitBody,
    params(("queue" = String, Path, description = "The queue's name.")),
    responses((status = 200, description = "What holds from now on.", body = One<QueueLimit>)))]
async fn set(
    State(state): Shared,
    caller: Caller,
    Path(queue): Path<String>,
    Body { body, digest }: Body<LimitBody>,
) -> Result<Response, ApiError> {
    let company: CompanyId = body.company_id.parse().map_err(|_| ApiError::NotFound("company"))?;
    let mut command = operation(&caller, &state, digest).await?;
    known(command.tx(), &queue).await?;
    if queue == WEBHOOKS {
        return Err(ApiError::Conflict(
            "deliveries are limited by their webhook: PATCH its max_concurrency and rate_limit".to_owned(),
        ));
    }
    if !flows::set(command.tx(), &queue, company, body.max_concurrency, body.rate_limit).await? {
        return Err(ApiError::NotFound("company"));
    }
    command.wake();
    let (max_concurrency, rate_limit) = (body.max_concurrency, body.rate_limit);
    command.finish(StatusCode::OK, QueueLimit { company_id: company, max_concurrency, rate_limit }).await
}
