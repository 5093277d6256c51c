//! Work that gave up: seen with its evidence, and tried again.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::ids::{CompanyId, DeadLetterId, DeliveryId, RunId, WebhookId};
use capx_core::engine::dead_letters::{self as engine, LETTERS_MAX};
use capx_core::store::dead_letters::{self, About, GroupRow, Letter, LetterFilter, LetterRow};
use serde::{Deserialize, Serialize};
use serde_json::Value;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit, one_of};
use crate::api::reply::{All, Many, One, Time, cursor, id_cursor, page};
use crate::api::{ApiError, Shared, openapi};

/// Why work gave up.
pub(super) const REASONS: &[&str] = &["exhausted", "invalid", "quarantined"];

fn reasons() -> utoipa::openapi::schema::Object {
    openapi::names(REASONS)
}

pub(super) fn reason_or_null() -> utoipa::openapi::schema::Object {
    openapi::names_or_null(REASONS, "Those that gave up for this.")
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::OpsRead, 1, routes!(list))
        .with(Scope::OpsRead, 1, routes!(groups))
        .with(Scope::OpsWrite, 2, routes!(retry))
        .with(Scope::OpsWrite, 2, routes!(retry_many))
}

/// Work that gave up.
#[derive(Debug, Serialize, ToSchema)]
struct DeadLetter {
    /// `dl_…`
    #[schema(value_type = String)]
    id: DeadLetterId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// The run that it was about.
    #[schema(required, value_type = Option<String>)]
    run_id: Option<RunId>,
    /// The webhook that it was for, of a delivery.
    #[schema(required, value_type = Option<String>)]
    webhook_id: Option<WebhookId>,
    /// The delivery that it was.
    #[schema(required, value_type = Option<String>)]
    delivery_id: Option<DeliveryId>,
    queue: String,
    /// `step` or `delivery`.
    kind: String,
    /// The same over all that failed for the same reason.
    fingerprint: String,
    /// The step's place, from 0.
    step_index: i32,
    /// `exhausted`: out of tries. `invalid`: not worth another. `quarantined`:
    /// its workers died under it.
    reason: String,
    /// Tries charged.
    attempts: i32,
    /// Deaths of workers.
    crashes: i32,
    /// What went wrong last.
    #[schema(value_type = Object)]
    error: Value,
    created_at: Time,
}

impl From<LetterRow> for DeadLetter {
    fn from(row: LetterRow) -> Self {
        Self {
            id: DeadLetterId(row.id),
            company_id: CompanyId(row.company_id),
            run_id: row.ref_id.filter(|_| row.kind == "step").map(RunId),
            webhook_id: row.webhook_id.map(WebhookId),
            delivery_id: row.ref_id.filter(|_| row.webhook_id.is_some()).map(DeliveryId),
            fingerprint: row.fingerprint,
            queue: row.queue,
            kind: row.kind,
            step_index: row.step,
            reason: row.reason,
            attempts: row.attempt,
            crashes: row.crash_count,
            error: row.error,
            created_at: Time(row.created_at),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct LettersQuery {
    /// `co_…`
    company_id: Option<String>,
    /// `exhausted`, `invalid` or `quarantined`.
    #[param(schema_with = reasons, required = false)]
    reason: Option<String>,
    /// Of one group.
    fingerprint: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

/// List dead letters
///
/// Steps and deliveries that gave up, newest first, with the evidence. They go when
/// they are retried.
#[utoipa::path(get, path = "/dead-letters", tag = "Operations", params(LettersQuery),
    responses((status = 200, description = "A page.", body = Many<DeadLetter>)))]
async fn list(State(state): Shared, caller: Caller, Query(query): Query<LettersQuery>) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let reason = one_of("reason", query.reason.as_deref(), REASONS)?;
    let beyond = cursor(query.cursor.as_deref())?;
    let mut tx = caller.read(&state).await?;
    let company = match query.company_id.as_deref() {
        Some(id) => Some(caller.company_id(&mut tx, id).await?),
        None => caller.company,
    };
    let filter = LetterFilter { company, reason, fingerprint: query.fingerprint.as_deref(), beyond, before: None };
    let rows = dead_letters::letters(&mut tx, caller.account, filter, limit + 1).await?;
    caller.list(page(rows, limit, |row| id_cursor(row.id), DeadLetter::from))
}

/// Dead letters that failed for the same reason.
#[derive(Debug, Serialize, ToSchema)]
struct DeadLetterGroup {
    /// What `fingerprint` filters take.
    fingerprint: String,
    /// `step` or `delivery`.
    kind: String,
    count: i64,
    /// What went wrong with the last of them.
    #[schema(value_type = Object)]
    error: Value,
    /// When the first of them gave up.
    first_at: Time,
    /// When the last one did.
    last_at: Time,
}

impl From<GroupRow> for DeadLetterGroup {
    fn from(row: GroupRow) -> Self {
        Self {
            fingerprint: row.fingerprint,
            kind: row.kind,
            count: row.count,
            error: row.error,
            first_at: Time(row.first_at),
            last_at: Time(row.last_at),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct GroupsQuery {
    /// `co_…`
    company_id: Option<String>,
}

/// List groups of dead letters
///
/// By why they failed: numbers, ids and quoted words of an error's message left out. The
/// hundred largest of the last 10,000 dead letters, the largest first.
#[utoipa::path(get, path = "/dead-letters/groups", tag = "Operations", params(GroupsQuery),
    responses((status = 200, description = "The groups.", body = All<DeadLetterGroup>)))]
async fn groups(State(state): Shared, caller: Caller, Query(query): Query<GroupsQuery>) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = match query.company_id.as_deref() {
        Some(id) => Some(caller.company_id(&mut tx, id).await?),
        None => caller.company,
    };
    let rows = dead_letters::groups(&mut tx, caller.account, company).await?;
    caller.all(rows.into_iter().map(DeadLetterGroup::from).collect())
}

/// A dead letter that is tried again.
#[derive(Debug, Serialize, ToSchema)]
struct Retried {
    #[schema(value_type = String)]
    id: DeadLetterId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// The run that goes on.
    #[schema(required, value_type = Option<String>)]
    run_id: Option<RunId>,
    /// The delivery that is sent again.
    #[schema(required, value_type = Option<String>)]
    delivery_id: Option<DeliveryId>,
    /// Always true.
    retried: bool,
}

impl From<Letter> for Retried {
    fn from(letter: Letter) -> Self {
        let (run_id, delivery_id) = match letter.about {
            About::Run(run) => (Some(run), None),
            About::Delivery(_, delivery) => (None, Some(delivery)),
        };
        Self { id: letter.id, company_id: letter.company, run_id, delivery_id, retried: true }
    }
}

/// Retry a dead letter
///
/// Its run goes on at the step that gave up, as by the run's own `retry`; its event is sent again,
/// as by the delivery's own `redeliver`.
#[utoipa::path(post, path = "/dead-letters/{letter}/retry", tag = "Operations",
    params(("letter" = String, Path, description = "`dl_…`")),
    responses((status = 200, description = "It is tried again.", body = One<Retried>)))]
async fn retry(
    State(state): Shared,
    caller: Caller,
    Path(letter): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let id: DeadLetterId = letter.parse().map_err(|_| ApiError::NotFound("dead letter"))?;
    let mut command = caller.command(&state, digest).await?;
    let letter = dead_letters::find(command.tx(), caller.account, caller.company, id)
        .await?
        .ok_or(ApiError::NotFound("dead letter"))?;
    engine::retry(&state.engine, command.tx(), &letter, &caller.key.to_string()).await?;
    command.wake();
    command.finish(StatusCode::OK, Retried::from(letter)).await
}

/// Which dead letters to retry.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RetryManyBody {
    /// `co_…`: of this company alone.
    company_id: Option<String>,
    #[schema(schema_with = reason_or_null, required = false)]
    reason: Option<String>,
    /// Of this group alone.
    fingerprint: Option<String>,
    /// How many at most.
    #[schema(minimum = 1, maximum = 200, default = 100)]
    limit: Option<i64>,
    /// `cursor` of the answer before, to go on behind what could not be retried.
    #[schema(pattern = "^[0-9a-f]{32}$")]
    cursor: Option<String>,
}

impl Check for RetryManyBody {}

/// Dead letters that are tried again.
#[derive(Debug, Serialize, ToSchema)]
struct RetriedMany {
    /// Those that are tried again.
    retried: Vec<Retried>,
    /// Those that stay, and why.
    refused: Vec<Refused>,
    /// Where to go on; null when the filter picks no more.
    #[schema(required)]
    cursor: Option<String>,
}

/// A dead letter that stays.
#[derive(Debug, Serialize, ToSchema)]
struct Refused {
    #[schema(value_type = String)]
    id: DeadLetterId,
    /// Why it is not tried again.
    message: String,
}

/// Retry dead letters
///
/// Those that a filter picks, oldest first: their runs go on at the steps that gave
/// up, their events are sent again. What cannot be retried stays and says why, and holds up no other.
#[utoipa::path(post, path = "/dead-letters/retry", tag = "Operations", request_body = RetryManyBody,
    responses((status = 200, description = "What became of them.", body = One<RetriedMany>)))]
async fn retry_many(
    State(state): Shared,
    caller: Caller,
    Body { body, digest }: Body<RetryManyBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let limit = limit(body.limit, LETTERS_MAX / 2, LETTERS_MAX)?;
    let reason = one_of("reason", body.reason.as_deref(), REASONS)?;
    let beyond = cursor(body.cursor.as_deref())?;
    let company = match body.company_id.as_deref() {
        Some(id) => Some(caller.company_id(command.tx(), id).await?),
        None => caller.company,
    };
    let filter = LetterFilter { company, reason, fingerprint: body.fingerprint.as_deref(), beyond, before: None };
    let by = caller.key.to_string();
    let done = engine::retry_many(&state.engine, command.tx(), caller.account, filter, limit, &by).await?;
    command.wake();
    let shown = RetriedMany {
        retried: done.retried.into_iter().map(Retried::from).collect(),
        refused: done.refused.into_iter().map(|(id, message)| Refused { id, message }).collect(),
        cursor: done.beyond.map(|id| id_cursor(id.0)),
    };
    command.finish(StatusCode::OK, shown).await
}
