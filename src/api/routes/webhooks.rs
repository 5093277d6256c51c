//! Webhooks: register, list, get, change, rotate the secret, delete. What they are told: [`super::deliveries`].

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::event::{NAMES, pattern_problem};
use capx_core::domain::flow::BEARS_MAX;
use capx_core::domain::ids::{CompanyId, WebhookId};
use capx_core::domain::webhook;
use capx_core::engine::FieldProblem;
use capx_core::store::webhooks::{self as store, Change, Limits, NewWebhook, Owner, WEBHOOKS_MAX, WebhookRow};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::companies::Deleted;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit};
use crate::api::reply::{Many, One, Time, cursor, id_cursor, page};
use crate::api::{ApiError, Shared, openapi};

const URL_CHARS_MAX: usize = 2_048;
const EVENTS_MAX: usize = 50;
const DESCRIPTION_CHARS_MAX: usize = 1_000;
const STATUSES: &[&str] = &["active", "disabled"];

fn status_or_null() -> utoipa::openapi::schema::Object {
    openapi::names_or_null(STATUSES, "Whether it is sent to.")
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::WebhooksRead, 1, routes!(list))
        .with(Scope::WebhooksWrite, 2, routes!(create))
        .with(Scope::WebhooksRead, 1, routes!(one))
        .with(Scope::WebhooksWrite, 2, routes!(update))
        .with(Scope::WebhooksWrite, 2, routes!(rotate))
        .with(Scope::WebhooksWrite, 1, routes!(delete))
}

/// A webhook to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateWebhookBody {
    /// Where to: `https://…`.
    #[schema(min_length = 1, max_length = 2_048)]
    url: String,
    /// Names of events such as `playbook.failed`, families such as `step.*`, or
    /// `*` for everything.
    #[schema(min_items = 1, max_items = 50)]
    events: Vec<String>,
    /// `co_…`: only what happens in this company.
    company_id: Option<String>,
    /// For people.
    #[schema(max_length = 1_000)]
    description: Option<String>,
    /// Events of one run, and those of a company that belong to none, one after another: each
    /// waits until the one before it was taken, or given up.
    ordered: Option<bool>,
    /// So many a second at the most.
    #[schema(minimum = 0.01, maximum = 10_000)]
    rate_limit: Option<f64>,
    /// So many at once at the most; without, as many as its answers allow.
    #[schema(minimum = 1, maximum = 256)]
    max_concurrency: Option<i32>,
}

/// Changes of a webhook; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UpdateWebhookBody {
    /// Where to.
    #[schema(min_length = 1, max_length = 2_048)]
    url: Option<String>,
    /// Names of events, families, or `*`; replaces those that it has.
    #[schema(min_items = 1, max_items = 50)]
    events: Option<Vec<String>>,
    /// For people.
    #[schema(max_length = 1_000)]
    description: Option<String>,
    #[schema(schema_with = status_or_null, required = false)]
    status: Option<String>,
    /// Whether its events about one thing go one after another; of events from now on.
    ordered: Option<bool>,
    /// So many a second at the most; 0 takes the limit away.
    #[schema(minimum = 0, maximum = 10_000)]
    rate_limit: Option<f64>,
    /// So many at once at the most; 0 takes the limit away.
    #[schema(minimum = 0, maximum = 256)]
    max_concurrency: Option<i32>,
}

/// A webhook.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Webhook {
    /// `wh_…`
    #[schema(value_type = String)]
    id: WebhookId,
    url: String,
    events: Vec<String>,
    #[schema(required, value_type = Option<String>)]
    company_id: Option<CompanyId>,
    #[schema(required)]
    description: Option<String>,
    /// `active` or `disabled`.
    status: String,
    /// Why it is disabled.
    #[schema(required)]
    disabled_reason: Option<String>,
    ordered: bool,
    #[schema(required)]
    rate_limit: Option<f64>,
    #[schema(required)]
    max_concurrency: Option<i32>,
    /// Nothing has worked since then.
    #[schema(required)]
    failing_since: Option<Time>,
    /// Nothing is sent until then, since nothing works; then one event is, to see.
    #[schema(required)]
    paused_until: Option<Time>,
    created_at: Time,
    updated_at: Time,
}

/// A webhook with its secret.
#[derive(Debug, Serialize, ToSchema)]
struct SecretWebhook {
    #[serde(flatten)]
    webhook: Webhook,
    /// `whsec_…`, this once: null where the request is answered again.
    #[schema(required)]
    secret: Option<String>,
}

impl From<WebhookRow> for Webhook {
    fn from(row: WebhookRow) -> Self {
        Self {
            id: WebhookId(row.id),
            url: row.url,
            events: row.events,
            company_id: row.company_id.map(CompanyId),
            description: row.description,
            status: row.status,
            disabled_reason: row.disabled_reason,
            ordered: row.ordered,
            rate_limit: row.rate,
            max_concurrency: row.max_running,
            failing_since: row.failing_since.map(Time),
            paused_until: row.open_until.map(Time),
            created_at: Time(row.created_at),
            updated_at: Time(row.updated_at),
        }
    }
}

fn check_url(rules: &Rules, url: &str, problems: &mut Vec<FieldProblem>) {
    let wrong = if url.chars().count() > URL_CHARS_MAX {
        Some(format!("must be at most {URL_CHARS_MAX} characters"))
    } else {
        match rules.check(url) {
            Err(error) => Some(error.to_string()),
            Ok(url) if url.scheme() != "https" && !rules.allows_plain(&url) => {
                Some("must be https; plain http is spoken to networks of CAPX_EGRESS_ALLOW alone".into())
            }
            Ok(_) => None,
        }
    };
    problems.extend(wrong.map(|message| FieldProblem::new("url", message)));
}

fn check_events(events: &[String], problems: &mut Vec<FieldProblem>) {
    if events.is_empty() || events.len() > EVENTS_MAX {
        let message = format!("must name 1 to {EVENTS_MAX} events, of {}", NAMES.join(", "));
        problems.push(FieldProblem::new("events", message));
        return;
    }
    for (at, pattern) in events.iter().enumerate() {
        problems.extend(pattern_problem(pattern).map(|message| FieldProblem::new(format!("events.{at}"), message)));
    }
}

fn check_description(description: Option<&str>, problems: &mut Vec<FieldProblem>) {
    if description.is_some_and(|text| text.chars().count() > DESCRIPTION_CHARS_MAX) {
        let message = format!("must be at most {DESCRIPTION_CHARS_MAX} characters");
        problems.push(FieldProblem::new("description", message));
    }
}

/// The fastest that a webhook may ask for, in events a second, and the slowest.
const RATE_MAX: f64 = 10_000.0;
const RATE_MIN: f64 = 0.01;

/// Limits of a webhook; where `none` stands for none, it is allowed too.
fn check_limits(rate: Option<f64>, at_once: Option<i32>, none: bool, problems: &mut Vec<FieldProblem>) {
    let or = if none { "0 for none, or " } else { "" };
    let rate = rate.filter(|rate| !(none && *rate == 0.0));
    let at_once = at_once.filter(|at_once| !(none && *at_once == 0));
    if rate.is_some_and(|rate| !(RATE_MIN..=RATE_MAX).contains(&rate)) {
        problems.push(FieldProblem::new("rate_limit", format!("must be {or}from {RATE_MIN} to {RATE_MAX} a second")));
    }
    if at_once.is_some_and(|at_once| !(1..=BEARS_MAX).contains(&at_once)) {
        problems.push(FieldProblem::new("max_concurrency", format!("must be {or}from 1 to {BEARS_MAX}")));
    }
}

impl Check for CreateWebhookBody {
    fn problems(&self, rules: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        check_url(rules, &self.url, &mut problems);
        check_events(&self.events, &mut problems);
        check_description(self.description.as_deref(), &mut problems);
        check_limits(self.rate_limit, self.max_concurrency, false, &mut problems);
        problems
    }
}

impl Check for UpdateWebhookBody {
    fn problems(&self, rules: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        if let Some(url) = &self.url {
            check_url(rules, url, &mut problems);
        }
        if let Some(events) = &self.events {
            check_events(events, &mut problems);
        }
        check_description(self.description.as_deref(), &mut problems);
        check_limits(self.rate_limit, self.max_concurrency, true, &mut problems);
        if self.status.as_ref().is_some_and(|status| !STATUSES.contains(&status.as_str())) {
            problems.push(FieldProblem::new("status", format!("must be one of {}", STATUSES.join(", "))));
        }
        problems
    }
}

pub(super) fn owner(caller: &Caller) -> Owner {
    (caller.account, caller.company)
}

pub(super) fn id(text: &str) -> Result<WebhookId, ApiError> {
    text.parse().map_err(|_| ApiError::NotFound("webhook"))
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

/// List webhooks
///
/// Newest first.
#[utoipa::path(get, path = "/webhooks", tag = "Webhooks", params(ListQuery),
    responses((status = 200, description = "A page.", body = Many<Webhook>)))]
async fn list(State(state): Shared, caller: Caller, Query(query): Query<ListQuery>) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let before = cursor(query.cursor.as_deref())?;
    let mut tx = caller.read(&state).await?;
    let rows = store::list(&mut tx, owner(&caller), before, limit + 1).await?;
    caller.list(page(rows, limit, |row| id_cursor(row.id), Webhook::from))
}

/// Register a webhook
///
/// Its secret is shown this once. An account has at most a hundred webhooks.
/// What is sent is signed by the Standard Webhooks specification, and tried again after 5 s, 5 min,
/// 30 min, 2 h, 5 h, 10 h and 10 h unless it is answered with a 2xx within 15 s.
#[utoipa::path(post, path = "/webhooks", tag = "Webhooks", request_body = CreateWebhookBody,
    responses((status = 201, description = "The webhook.", body = One<SecretWebhook>)))]
async fn create(
    State(state): Shared,
    caller: Caller,
    Body { body, digest }: Body<CreateWebhookBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = match body.company_id.as_deref() {
        Some(id) => Some(caller.company_id(command.tx(), id).await?),
        None => caller.company,
    };
    let secret = webhook::new_secret();
    let new = NewWebhook {
        webhook: WebhookId::new(),
        account: caller.account,
        company,
        url: &body.url,
        events: &body.events,
        description: body.description.as_deref(),
        secret,
        ordered: body.ordered.unwrap_or(false),
        limits: Limits { rate: body.rate_limit, at_once: body.max_concurrency },
    };
    let row = store::insert(command.tx(), &new).await?.ok_or_else(|| {
        ApiError::Conflict(format!("the account has {WEBHOOKS_MAX} webhooks already; delete one first"))
    })?;
    let webhook = Webhook::from(row);
    let kept = SecretWebhook { webhook: webhook.clone(), secret: None };
    let shown = SecretWebhook { webhook, secret: Some(webhook::written(&secret)) };
    command.finish_with_secret(StatusCode::CREATED, shown, kept).await
}

/// Get a webhook
#[utoipa::path(get, path = "/webhooks/{webhook}", tag = "Webhooks",
    params(("webhook" = String, Path, description = "`wh_…`")),
    responses((status = 200, description = "The webhook.", body = One<Webhook>), (status = 304, description = "Not changed.")))]
async fn one(State(state): Shared, caller: Caller, Path(webhook): Path<String>) -> Result<Response, ApiError> {
    let id = id(&webhook)?;
    let mut tx = caller.read(&state).await?;
    let row = store::get(&mut tx, owner(&caller), id).await?.ok_or(ApiError::NotFound("webhook"))?;
    caller.one(&Webhook::from(row))
}

/// Update a webhook
///
/// Only what is given changes. While it is disabled, what was under way is kept and nothing is
/// added; `redeliver` with `missing` makes up for that.
#[utoipa::path(patch, path = "/webhooks/{webhook}", tag = "Webhooks", request_body = UpdateWebhookBody,
    params(("webhook" = String, Path, description = "`wh_…`")),
    responses((status = 200, description = "The webhook.", body = One<Webhook>)))]
async fn update(
    State(state): Shared,
    caller: Caller,
    Path(webhook): Path<String>,
    Body { body, digest }: Body<UpdateWebhookBody>,
) -> Result<Response, ApiError> {
    let id = id(&webhook)?;
    let change = Change {
        url: body.url.as_deref(),
        events: body.events.as_deref(),
        description: body.description.as_deref(),
        active: body.status.map(|status| status == "active"),
        ordered: body.ordered,
        rate: body.rate_limit.map(|rate| Some(rate).filter(|rate| *rate > 0.0)),
        at_once: body.max_concurrency.map(|most| Some(most).filter(|most| *most > 0)),
    };
    let mut command = caller.command(&state, digest).await?;
    let row = store::update(command.tx(), owner(&caller), id, &change).await?;
    let mut row = row.ok_or(ApiError::NotFound("webhook"))?;
    if change.active == Some(true) {
        store::unhold(command.tx(), id).await?;
        (row.failing_since, row.open_until) = (None, None);
        command.wake();
    }
    command.finish(StatusCode::OK, Webhook::from(row)).await
}

/// Rotate a webhook's secret
///
/// The new one is shown this once; the old one signs too for 24 hours.
#[utoipa::path(post, path = "/webhooks/{webhook}/rotate-secret", tag = "Webhooks",
    params(("webhook" = String, Path, description = "`wh_…`")),
    responses((status = 200, description = "The webhook.", body = One<SecretWebhook>)))]
async fn rotate(
    State(state): Shared,
    caller: Caller,
    Path(webhook): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let id = id(&webhook)?;
    let mut command = caller.command(&state, digest).await?;
    let secret = webhook::new_secret();
    let row = store::rotate(command.tx(), owner(&caller), id, secret).await?.ok_or(ApiError::NotFound("webhook"))?;
    let webhook = Webhook::from(row);
    let kept = SecretWebhook { webhook: webhook.clone(), secret: None };
    let shown = SecretWebhook { webhook, secret: Some(webhook::written(&secret)) };
    command.finish_with_secret(StatusCode::OK, shown, kept).await
}

/// Delete a webhook
#[utoipa::path(delete, path = "/webhooks/{webhook}", tag = "Webhooks",
    params(("webhook" = String, Path, description = "`wh_…`")),
    responses((status = 200, description = "It is deleted.", body = One<Deleted<String>>)))]
async fn delete(
    State(state): Shared,
    caller: Caller,
    Path(webhook): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let id = id(&webhook)?;
    let mut command = caller.command(&state, digest).await?;
    if !store::delete(command.tx(), owner(&caller), id).await? {
        return Err(ApiError::NotFound("webhook"));
    }
    command.finish(StatusCode::OK, Deleted { id, deleted: true }).await
}
