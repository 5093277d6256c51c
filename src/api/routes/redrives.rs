//! Dead letters are tried again at a rate.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{CompanyId, RedriveId};
use capx_core::engine::FieldProblem;
use capx_core::engine::redrives::RATE_MAX;
use capx_core::store::redrives::{self, NewRedrive, RedriveRow};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::Routes;
use super::dead_letters::{REASONS, reason_or_null};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, one_of};
use crate::api::reply::{One, Time};
use crate::api::{ApiError, Shared};

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::OpsWrite, 2, routes!(create)).with(Scope::OpsRead, 1, routes!(one)).with(
        Scope::OpsWrite,
        2,
        routes!(cancel),
    )
}

/// Which dead letters are tried again, and how fast.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RedriveBody {
    /// So many a second.
    #[schema(minimum = 1, maximum = 200)]
    rate: i32,
    /// `co_…`: of this company alone.
    company_id: Option<String>,
    #[schema(schema_with = reason_or_null, required = false)]
    reason: Option<String>,
    /// Of this group alone.
    fingerprint: Option<String>,
}

impl Check for RedriveBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let fits = (1..=RATE_MAX).contains(&self.rate);
        let wrong = (!fits).then(|| FieldProblem::new("rate", format!("must be from 1 to {RATE_MAX} a second")));
        wrong.into_iter().collect()
    }
}

/// Dead letters that are tried again, so many a second.
#[derive(Debug, Serialize, ToSchema)]
struct Redrive {
    /// `rdr_…`
    #[schema(value_type = String)]
    id: RedriveId,
    #[schema(required, value_type = Option<String>)]
    company_id: Option<CompanyId>,
    #[schema(required)]
    reason: Option<String>,
    #[schema(required)]
    fingerprint: Option<String>,
    rate: i32,
    /// `running`, `done` or `cancelled`.
    status: String,
    /// How many go on.
    retried: i64,
    /// How many stay.
    refused: i64,
    /// Why the last of those stays.
    #[schema(required)]
    last_refusal: Option<String>,
    created_at: Time,
    #[schema(required)]
    ended_at: Option<Time>,
}

impl From<RedriveRow> for Redrive {
    fn from(row: RedriveRow) -> Self {
        Self {
            id: RedriveId(row.id),
            company_id: row.company_id.map(CompanyId),
            reason: row.reason,
            fingerprint: row.fingerprint,
            rate: row.rate,
            status: row.status,
            retried: row.retried,
            refused: row.refused,
            last_refusal: row.last_refusal,
            created_at: Time(row.created_at),
            ended_at: row.ended_at.map(Time),
        }
    }
}

fn id(text: &str) -> Result<RedriveId, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound("redrive"))
}

/// Retry dead letters at a rate
///
/// Those that a filter picks and that are there now, oldest first, so many a second: their
/// runs go on with their checkpoints and what was approved, their events are sent again.
#[utoipa::path(post, path = "/dead-letters/redrives", tag = "Operations", request_body = RedriveBody,
    responses((status = 201, description = "It is under way.", body = One<Redrive>)))]
async fn create(
    State(state): Shared,
    caller: Caller,
    Body { body, digest }: Body<RedriveBody>,
) -> Result<Response, ApiError> {
    let reason = one_of("reason", body.reason.as_deref(), REASONS)?;
    let mut command = caller.command(&state, digest).await?;
    let company = match body.company_id.as_deref() {
        Some(id) => Some(caller.company_id(command.tx(), id).await?),
        None => caller.company,
    };
    let by = caller.key.to_string();
    let new = NewRedrive {
        id: RedriveId::new(),
        account: caller.account,
        company,
        reason,
        fingerprint: body.fingerprint.as_deref(),
        rate: body.rate,
        by: &by,
    };
    let row = redrives::insert(command.tx(), &new).await?.ok_or_else(|| {
        let most = redrives::RUNNING_MAX;
        ApiError::Conflict(format!("{most} redrives are under way already; wait for one, or cancel it"))
    })?;
    command.finish(StatusCode::CREATED, Redrive::from(row)).await
}

/// Get a redrive
#[utoipa::path(get, path = "/dead-letters/redrives/{redrive}", tag = "Operations",
    params(("redrive" = String, Path, description = "`rdr_…`")),
    responses((status = 200, description = "How far it is.", body = One<Redrive>), (status = 304, description = "Not changed.")))]
async fn one(State(state): Shared, caller: Caller, Path(redrive): Path<String>) -> Result<Response, ApiError> {
    let id = id(&redrive)?;
    let mut tx = caller.read(&state).await?;
    let row = redrives::get(&mut tx, caller.account, caller.company, id).await?;
    caller.one(&Redrive::from(row.ok_or(ApiError::NotFound("redrive"))?))
}

/// Cancel a redrive
///
/// What goes on already goes on.
#[utoipa::path(post, path = "/dead-letters/redrives/{redrive}/cancel", tag = "Operations",
    params(("redrive" = String, Path, description = "`rdr_…`")),
    responses((status = 200, description = "How far it has got.", body = One<Redrive>)))]
async fn cancel(
    State(state): Shared,
    caller: Caller,
    Path(redrive): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let id = id(&redrive)?;
    let mut command = caller.command(&state, digest).await?;
    let none = || ApiError::NotFound("redrive");
    let row = redrives::get(command.tx(), caller.account, caller.company, id).await?.ok_or_else(none)?;
    if row.status == "done" {
        return Err(ApiError::Conflict("the redrive is done".to_owned()));
    }
    redrives::end(command.tx(), id.0, "cancelled").await?;
    let row = redrives::get(command.tx(), caller.account, caller.company, id).await?.ok_or_else(none)?;
    command.finish(StatusCode::OK, Redrive::from(row)).await
}
