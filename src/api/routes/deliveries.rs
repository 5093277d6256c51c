//! What became of the events that a webhook was to be told of, and telling it again.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::delivery::TEST;
use capx_core::domain::event::{NAMES, pattern_problem};
use capx_core::domain::ids::{CompanyId, DeliveryId, EventId, WebhookId};
use capx_core::domain::retention::Kept;
use capx_core::engine::deliveries::{self as engine, Resend, Which};
use capx_core::engine::{FieldProblem, upkeep};
use capx_core::store::deliveries::{self as store, AttemptRow, DeliveryFilter, DeliveryRow, NewDelivery, least_id};
use capx_core::store::webhooks::{self, WebhookRow};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::webhooks::{id, owner};
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Path, Query, limit, one_of};
use crate::api::period;
use crate::api::reply::{Many, One, Page, Time, cursor, id_cursor};
use crate::api::{ApiError, Shared, openapi};

const STATUSES: &[&str] = &["pending", "succeeded", "failed"];
const WHICH: &[&str] = &["failed", "missing", "all"];
/// Tries of a delivery that are shown.
const ATTEMPTS_MAX: i64 = 100;

fn statuses() -> utoipa::openapi::schema::Object {
    openapi::names(STATUSES)
}

fn which_or_null() -> utoipa::openapi::schema::Object {
    openapi::names_or_null(WHICH, "Which deliveries; `failed` without.")
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::WebhooksWrite, 2, routes!(test))
        .with(Scope::WebhooksRead, 1, routes!(list))
        .with(Scope::WebhooksRead, 1, routes!(one))
        .with(Scope::WebhooksWrite, 2, routes!(redeliver))
        .with(Scope::WebhooksWrite, 2, routes!(redeliver_many))
}

/// An event on its way to a webhook, or what became of it.
#[derive(Debug, Serialize, ToSchema)]
struct Delivery {
    /// `dlv_…`
    #[schema(value_type = String)]
    id: DeliveryId,
    #[schema(value_type = String)]
    webhook_id: WebhookId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// `evt_…`: the `webhook-id` of every try.
    #[schema(value_type = String)]
    event_id: EventId,
    /// The dotted name, e.g. `step.failed`.
    event: String,
    /// `pending`, `succeeded` or `failed`.
    status: String,
    /// Tries so far.
    attempts: i32,
    /// The status of the last answer; null where there was none.
    #[schema(required)]
    last_status: Option<i32>,
    /// What went wrong last.
    #[schema(required)]
    last_error: Option<String>,
    /// When it is tried next, while it is pending.
    #[schema(required)]
    next_attempt_at: Option<Time>,
    created_at: Time,
    #[schema(required)]
    ended_at: Option<Time>,
}

impl Delivery {
    fn new(webhook_id: WebhookId, row: DeliveryRow) -> Self {
        Self {
            id: DeliveryId(row.id),
            webhook_id,
            company_id: CompanyId(row.company_id),
            event_id: EventId(row.event_id),
            event: row.event,
            status: row.status,
            attempts: row.attempts,
            last_status: row.last_status,
            last_error: row.last_error,
            next_attempt_at: row.next_at.map(Time),
            created_at: Time(row.created_at),
            ended_at: row.ended_at.map(Time),
        }
    }
}

/// A try of a delivery.
#[derive(Debug, Serialize, ToSchema)]
struct DeliveryAttempt {
    /// From 1.
    number: i32,
    at: Time,
    /// Of the answer; null where there was none.
    #[schema(required)]
    status: Option<i32>,
    /// Milliseconds.
    latency_ms: i32,
    /// The first 2 KiB of the answer.
    #[schema(required)]
    answer: Option<String>,
    /// What went wrong.
    #[schema(required)]
    error: Option<String>,
}

impl From<AttemptRow> for DeliveryAttempt {
    fn from(row: AttemptRow) -> Self {
        Self {
            number: row.number,
            at: Time(row.at),
            status: row.status,
            latency_ms: row.latency_ms,
            answer: row.answer,
            error: row.error,
        }
    }
}

/// A delivery with its tries.
#[derive(Debug, Serialize, ToSchema)]
struct DeliveryWithAttempts {
    #[serde(flatten)]
    delivery: Delivery,
    /// The last hundred tries, oldest first.
    tries: Vec<DeliveryAttempt>,
}

/// The caller's webhook.
async fn find(tx: &mut PgConnection, caller: &Caller, webhook: &str) -> Result<(WebhookId, WebhookRow), ApiError> {
    let id = id(webhook)?;
    let row = webhooks::get(tx, owner(caller), id).await?.ok_or(ApiError::NotFound("webhook"))?;
    Ok((id, row))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DeliveriesQuery {
    /// `pending`, `succeeded` or `failed`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// A name such as `step.failed`, or a family such as `step.*`.
    event: Option<String>,
    /// Of events at this time or later.
    since: Option<String>,
    /// Of events before this time.
    until: Option<String>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

/// List a webhook's deliveries
///
/// By the time of their events, newest first. A page looks at 10,000 deliveries at most,
/// so that a filter may leave it short, or empty, with more to come.
#[utoipa::path(get, path = "/webhooks/{webhook}/deliveries", tag = "Webhooks",
    params(("webhook" = String, Path, description = "`wh_…`"), DeliveriesQuery),
    responses((status = 200, description = "A page.", body = Many<Delivery>)))]
async fn list(
    State(state): Shared,
    caller: Caller,
    Path(webhook): Path<String>,
    Query(query): Query<DeliveriesQuery>,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let status = one_of("status", query.status.as_deref(), STATUSES)?;
    let (since, until) = period::range(query.since.as_deref(), query.until.as_deref())?;
    let beyond = cursor(query.cursor.as_deref())?;
    if let Some(problem) = query.event.as_deref().filter(|event| *event != TEST).and_then(pattern_problem) {
        return Err(ApiError::field("event", problem));
    }
    let mut tx = caller.read(&state).await?;
    let (id, _) = find(&mut tx, &caller, &webhook).await?;
    let filter = DeliveryFilter {
        status,
        event: query.event.as_deref(),
        since: since.map(least_id),
        until: until.map(least_id),
        beyond,
    };
    let (rows, next) = store::list(&mut tx, id, filter, limit).await?;
    let data = rows.into_iter().map(|row| Delivery::new(id, row)).collect();
    caller.list(Page { data, cursor: next.map(id_cursor) })
}

/// Get a delivery
///
/// With its tries: the answers' status, the time they took, and how they begin.
#[utoipa::path(get, path = "/webhooks/{webhook}/deliveries/{delivery}", tag = "Webhooks",
    params(("webhook" = String, Path, description = "`wh_…`"), ("delivery" = String, Path, description = "`dlv_…`")),
    responses((status = 200, description = "The delivery.", body = One<DeliveryWithAttempts>), (status = 304, description = "Not changed.")))]
async fn one(
    State(state): Shared,
    caller: Caller,
    Path((webhook, delivery)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let delivery: DeliveryId = delivery.parse().map_err(|_| ApiError::NotFound("delivery"))?;
    let mut tx = caller.read(&state).await?;
    let (id, _) = find(&mut tx, &caller, &webhook).await?;
    let row = store::get(&mut tx, id, delivery).await?.ok_or(ApiError::NotFound("delivery"))?;
    let tries = store::attempts(&mut tx, id, delivery, ATTEMPTS_MAX).await?;
    let tries = tries.into_iter().map(DeliveryAttempt::from).collect();
    caller.one(&DeliveryWithAttempts { delivery: Delivery::new(id, row), tries })
}

/// What is sent as a test.
#[derive(Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct TestWebhookBody {
    /// The `type` that it has, e.g. `playbook.failed`; `webhook.test` without.
    event: Option<String>,
}

impl Check for TestWebhookBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let named = self.event.as_deref().filter(|event| *event != TEST);
        let problem = named.and_then(|event| match NAMES.contains(&event) {
            true => None,
            false => Some(pattern_problem(event).unwrap_or_else(|| "must be the name of one event".to_owned())),
        });
        problem.map(|message| FieldProblem::new("event", message)).into_iter().collect()
    }
}

fn active(row: &WebhookRow) -> Result<(), ApiError> {
    match row.status.as_str() {
        "active" => Ok(()),
        _ => Err(ApiError::Conflict(format!(
            "the webhook is disabled ({}); enable it first, by PATCH with status `active`",
            row.disabled_reason.as_deref().unwrap_or_default()
        ))),
    }
}

/// Send a test to a webhook
///
/// A delivery like any other, signed and tried again as they are, whose `data` is
/// `{"test": true}`. Its outcome shows under `deliveries`.
#[utoipa::path(post, path = "/webhooks/{webhook}/test", tag = "Webhooks", request_body = TestWebhookBody,
    params(("webhook" = String, Path, description = "`wh_…`")),
    responses((status = 201, description = "The delivery.", body = One<Delivery>)))]
async fn test(
    State(state): Shared,
    caller: Caller,
    Path(webhook): Path<String>,
    Body { body, digest }: Body<TestWebhookBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let (id, row) = find(command.tx(), &caller, &webhook).await?;
    active(&row)?;
    let company = match row.company_id {
        Some(company) => company,
        None => webhooks::a_company(command.tx(), caller.account).await?.ok_or_else(|| {
            ApiError::Conflict("a test is sent for one of the account's companies; create one first".to_owned())
        })?,
    };
    let data: Value = json!({"test": true});
    let new = NewDelivery {
        company: CompanyId(company),
        event: body.event.as_deref().unwrap_or(TEST),
        event_id: EventId::new().0,
        xid: None,
        data: Some(&data),
    };
    let (delivery, _) = store::insert(command.tx(), id, &new).await?;
    let row = store::get(command.tx(), id, delivery).await?.ok_or(ApiError::NotFound("delivery"))?;
    command.wake();
    command.finish(StatusCode::CREATED, Delivery::new(id, row)).await
}

/// Send a delivery again
///
/// Under the same `webhook-id`. What waits for its next try is tried now; what is over
/// begins its schedule anew.
#[utoipa::path(post, path = "/webhooks/{webhook}/deliveries/{delivery}/redeliver", tag = "Webhooks",
    params(("webhook" = String, Path, description = "`wh_…`"), ("delivery" = String, Path, description = "`dlv_…`")),
    responses((status = 200, description = "The delivery.", body = One<Delivery>)))]
async fn redeliver(
    State(state): Shared,
    caller: Caller,
    Path((webhook, delivery)): Path<(String, String)>,
    Body { digest, .. }: Body<crate::api::body::Nothing>,
) -> Result<Response, ApiError> {
    let delivery: DeliveryId = delivery.parse().map_err(|_| ApiError::NotFound("delivery"))?;
    let mut command = caller.command(&state, digest).await?;
    let (id, row) = find(command.tx(), &caller, &webhook).await?;
    store::get(command.tx(), id, delivery).await?.ok_or(ApiError::NotFound("delivery"))?;
    active(&row)?;
    store::redeliver(command.tx(), id, &[delivery.0]).await?;
    let row = store::get(command.tx(), id, delivery).await?.ok_or(ApiError::NotFound("delivery"))?;
    command.wake();
    command.finish(StatusCode::OK, Delivery::new(id, row)).await
}

/// Which deliveries to send again.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RedeliverBody {
    /// Of events at this time or later.
    since: String,
    /// Of events before this time.
    until: Option<String>,
    #[schema(schema_with = which_or_null, required = false)]
    status: Option<String>,
    /// A name such as `step.failed`, or a family such as `step.*`.
    event: Option<String>,
    /// How many at most.
    #[schema(minimum = 1, maximum = 1_000, default = 500)]
    limit: Option<i64>,
    /// `cursor` of the answer before.
    #[schema(max_length = 100)]
    cursor: Option<String>,
}

impl Check for RedeliverBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let problem = self.event.as_deref().and_then(pattern_problem);
        problem.map(|message| FieldProblem::new("event", message)).into_iter().collect()
    }
}

/// Deliveries that are sent again.
#[derive(Debug, Serialize, ToSchema)]
struct Redelivered {
    /// How many.
    count: usize,
    /// Where to go on; null when the filter picks no more.
    #[schema(required)]
    cursor: Option<String>,
}

/// Send deliveries again
///
/// Of events from a time on: those that failed; those that are `missing`, since the webhook
/// was disabled or asked for other events then; or `all` that there are. Each under its own
/// `webhook-id`, as fast as the webhook bears it.
#[utoipa::path(post, path = "/webhooks/{webhook}/redeliver", tag = "Webhooks", request_body = RedeliverBody,
    params(("webhook" = String, Path, description = "`wh_…`")),
    responses((status = 200, description = "How many are sent again.", body = One<Redelivered>)))]
async fn redeliver_many(
    State(state): Shared,
    caller: Caller,
    Path(webhook): Path<String>,
    Body { body, digest }: Body<RedeliverBody>,
) -> Result<Response, ApiError> {
    let limit = limit(body.limit, 500, 1_000)?;
    let (since, until) = period::range(Some(&body.since), body.until.as_deref())?;
    let which = match one_of("status", body.status.as_deref(), WHICH)?.unwrap_or("failed") {
        "missing" => Which::Missing,
        "all" => Which::All,
        _ => Which::Failed,
    };
    let mut command = caller.command(&state, digest).await?;
    let (id, row) = find(command.tx(), &caller, &webhook).await?;
    active(&row)?;
    if which == Which::Missing {
        // Of what is older it is not known whether it was taken.
        let days = upkeep::retention(command.tx()).await?.get(&Kept::Deliveries).copied().unwrap_or_default();
        if since.is_some_and(|since| since < chrono::Utc::now() - chrono::Duration::days(days.into())) {
            let message = format!("must be in the last {days} days, for which deliveries are kept");
            return Err(ApiError::field("since", message));
        }
    }
    let resend = Resend {
        webhook: id,
        account: caller.account,
        company: row.company_id.map(CompanyId),
        patterns: &row.events,
        which,
        event: body.event.as_deref(),
        since,
        until,
        cursor: body.cursor.as_deref(),
        limit,
    };
    let (count, next) = engine::resend(command.tx(), &resend).await?;
    command.wake();
    command.finish(StatusCode::OK, Redelivered { count, cursor: next }).await
}
