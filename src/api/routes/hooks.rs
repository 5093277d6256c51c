//! Requests from outside that start playbooks: signed, and without a key.

use axum::extract::{Request, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::Response;
use capx_core::domain::event::is_event_name;
use capx_core::domain::ids::{CompanyId, PlaybookId, SignalId};
use capx_core::domain::webhook::{self, Claim};
use capx_core::engine::hooks::{Taken, find, take};
use capx_core::store::hooks as store;
use serde::Serialize;
use tokio::sync::Semaphore;
use utoipa::ToSchema;
use utoipa_axum::routes;

use super::Routes;
use super::playbooks;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Nothing, Path, bytes};
use crate::api::reply::{One, Open, open};
use crate::api::{ApiError, Shared};

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.open(routes!(receive)).with(Scope::PlaybooksWrite, 2, routes!(rotate))
}

/// A request that was taken.
#[derive(Debug, Serialize, ToSchema)]
struct Received {
    /// The events that it has become, `sig_…`: one for each playbook that it starts.
    #[schema(value_type = Vec<String>)]
    events: Vec<SignalId>,
}

/// So many requests of strangers are held in memory at once.
const BODIES_MAX: usize = 32;
static BODIES: Semaphore = Semaphore::const_new(BODIES_MAX);

fn header<'a>(headers: &'a HeaderMap, name: &str) -> Option<&'a str> {
    let mut given = headers.get_all(name).iter();
    let one = given.next()?.to_str().ok();
    // Of two nobody knows which is meant.
    if given.next().is_some() { None } else { one }
}

fn claim(headers: &HeaderMap) -> Option<Claim<'_>> {
    if let Some(signature) = header(headers, "x-hub-signature-256") {
        return Some(Claim::GitHub { signature });
    }
    Some(Claim::Standard {
        id: header(headers, "webhook-id")?,
        timestamp: header(headers, "webhook-timestamp")?,
        signature: header(headers, "webhook-signature")?,
    })
}

const UNSIGNED: &str = "the request is not signed: send `webhook-id`, `webhook-timestamp` and `webhook-signature` (Standard Webhooks), or `x-hub-signature-256`";

/// Receive a webhook
///
/// Starts the playbooks whose trigger is a webhook of this name, and whose secret has signed the
/// request: as Standard Webhooks has it, or as GitHub does. Needs no key. The body is the run's
/// `inputs.event`. The same message again starts nothing.
#[utoipa::path(post, path = "/companies/{company}/hooks/{event}", tag = "Webhooks",
    request_body(content = String, content_type = "application/json", description = "Whatever the sender sends."),
    params(("company" = String, Path, description = "`co_…`"), ("event" = String, Path, description = "The name in the playbook's trigger.")),
    responses((status = 202, description = "It is taken.", body = Open<Received>)))]
async fn receive(
    State(state): Shared,
    Path((company, event)): Path<(String, String)>,
    headers: HeaderMap,
    request: Request,
) -> Result<Response, ApiError> {
    let company: CompanyId = company.parse().map_err(|_| ApiError::NotFound("webhook"))?;
    if !is_event_name(&event) {
        return Err(ApiError::NotFound("webhook"));
    }
    let claim = claim(&headers).ok_or(ApiError::Unauthorized(UNSIGNED))?;
    let found = find(&state.engine, company, &event).await?;
    if found.is_empty() {
        return Err(ApiError::NotFound("webhook"));
    }
    // Nothing of a body is taken before this, and not that of many at once.
    let _room = BODIES.try_acquire().map_err(|_| ApiError::Unavailable)?;
    let body = bytes(request, &state).await?;
    match take(&state.engine, &found, claim, &body).await? {
        Taken::Events(events) => open(StatusCode::ACCEPTED, Received { events }),
        Taken::Refused(why) => Err(ApiError::Unauthorized(why.as_str())),
    }
}

/// A playbook's secret for webhooks.
#[derive(Debug, Serialize, ToSchema)]
struct HookSecret {
    #[schema(value_type = String)]
    playbook_id: PlaybookId,
    /// `whsec_…`, this once: null where the request is answered again.
    #[schema(required)]
    secret: Option<String>,
}

/// Rotate the webhook secret of a playbook
///
/// One whose trigger is a webhook. The old secret signs for another 24 hours.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/rotate-secret", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "The new secret, shown once.", body = One<HookSecret>)))]
async fn rotate(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let row = playbooks::find(command.tx(), company, &playbook).await?;
    let secret = webhook::new_secret();
    if !store::rotate(command.tx(), company, row.playbook, &secret).await? {
        return Err(ApiError::Conflict(
            "the playbook is not started by a webhook: give it a `trigger` of that type".into(),
        ));
    }
    let shown = |secret| HookSecret { playbook_id: row.playbook, secret };
    command.finish_with_secret(StatusCode::OK, shown(Some(webhook::written(&secret))), shown(None)).await
}
