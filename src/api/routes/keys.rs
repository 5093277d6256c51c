//! API keys: list, create, revoke.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{CompanyId, KeyId};
use capx_core::domain::key::{ApiKey, SCOPES};
use capx_core::domain::playbook::problem::did_you_mean;
use capx_core::engine::FieldProblem;
use capx_core::engine::keys as engine;
use capx_core::store::tenants::{self, ListedKey, NewKey};
use rand::Rng;
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::companies::Deleted;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit};
use crate::api::reply::{Many, One, Time, cursor, id_cursor, page};
use crate::api::{ApiError, Shared, openapi};

const NAME_CHARS_MAX: usize = 200;

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::Everything, 1, routes!(list)).with(Scope::Everything, 2, routes!(create)).with(
        Scope::Everything,
        1,
        routes!(revoke),
    )
}

/// A key to be.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreateKeyBody {
    /// For people, to tell keys apart.
    #[schema(min_length = 1, max_length = 200)]
    name: String,
    /// What it may do; everything by default.
    scopes: Option<Vec<String>>,
    /// `co_…`, to bind it to one company.
    company_id: Option<String>,
}

/// A key, masked.
#[derive(Debug, Serialize, ToSchema)]
struct KeyItem {
    /// `key_…`
    #[schema(value_type = String)]
    id: KeyId,
    name: String,
    /// The key's first and last characters.
    hint: String,
    scopes: Vec<String>,
    #[schema(required, value_type = Option<String>)]
    company_id: Option<CompanyId>,
    /// `active` or `revoked`.
    status: &'static str,
    created_at: Time,
}

/// A key that was made.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct CreatedKey {
    /// `key_…`
    #[schema(value_type = String)]
    id: KeyId,
    name: String,
    /// The key itself, this once: null where the request is answered again.
    #[schema(required)]
    key: Option<String>,
    /// The key's first and last characters.
    hint: String,
    scopes: Vec<String>,
    #[schema(required, value_type = Option<String>)]
    company_id: Option<CompanyId>,
}

impl KeyItem {
    fn new(row: ListedKey) -> Self {
        Self {
            id: row.key,
            name: row.name,
            hint: row.hint,
            scopes: row.scopes,
            company_id: row.company,
            status: if row.revoked { "revoked" } else { "active" },
            created_at: Time(row.created_at),
        }
    }
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

/// List API keys
///
/// Masked, newest first.
#[utoipa::path(get, path = "/keys", tag = "Keys", params(ListQuery),
    responses((status = 200, description = "A page.", body = Many<KeyItem>)))]
async fn list(State(state): Shared, caller: Caller, Query(query): Query<ListQuery>) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let before = cursor(query.cursor.as_deref())?;
    let mut tx = caller.read(&state).await?;
    let rows = tenants::keys_of(&mut tx, caller.account, caller.company, before, limit + 1).await?;
    caller.list(page(rows, limit, |row| id_cursor(row.key.0), KeyItem::new))
}

impl Check for CreateKeyBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let mut problems = Vec::new();
        if self.name.trim().is_empty() || self.name.chars().count() > NAME_CHARS_MAX {
            problems.push(FieldProblem::new("name", format!("must be 1 to {NAME_CHARS_MAX} characters")));
        }
        let scopes = self.scopes.as_deref();
        if scopes.is_some_and(<[String]>::is_empty) {
            problems.push(FieldProblem::new("scopes", "must name at least one; leave it out for all"));
        }
        let unknown = scopes.into_iter().flatten().enumerate().filter(|(_, scope)| !SCOPES.contains(&scope.as_str()));
        for (at, scope) in unknown.take(20) {
            let near = did_you_mean(scope, SCOPES.iter().copied());
            let near = near.unwrap_or_else(|| format!("use one of {}", SCOPES.join(", ")));
            problems.push(FieldProblem::new(format!("scopes.{at}"), format!("unknown scope; {near}")));
        }
        problems
    }
}

/// Create an API key
///
/// It is shown this once. A company has at most five active keys.
#[utoipa::path(post, path = "/keys", tag = "Keys", request_body = CreateKeyBody,
    responses((status = 201, description = "The key.", body = One<CreatedKey>)))]
async fn create(
    State(state): Shared,
    caller: Caller,
    Body { body, digest }: Body<CreateKeyBody>,
) -> Result<Response, ApiError> {
    let scopes = body.scopes.unwrap_or_else(|| vec!["*".to_owned()]);
    let mut command = caller.command(&state, digest).await?;
    let company = match body.company_id.as_deref() {
        Some(id) => Some(caller.company_id(command.tx(), id).await?),
        // A key that is bound makes keys that are.
        None => caller.company,
    };
    let live = caller.permit.key.live;
    let key = ApiKey::generate(live, |below| rand::rng().random_range(0..below));
    let (name, hint) = (body.name.trim().to_owned(), key.hint());
    let new =
        NewKey { account: caller.account, company, name: &name, hash: key.hash(), hint: &hint, live, scopes: &scopes };
    let id = engine::create(command.tx(), &new).await?;
    let kept = CreatedKey { id, name, key: None, hint, scopes, company_id: company };
    let shown = CreatedKey { key: Some(key.reveal().to_owned()), ..kept.clone() };
    command.finish_with_secret(StatusCode::CREATED, shown, kept).await
}

/// Revoke an API key
///
/// For good; every process refuses it within five seconds.
#[utoipa::path(delete, path = "/keys/{key}", tag = "Keys", params(("key" = String, Path, description = "`key_…`")),
    responses((status = 200, description = "It is revoked.", body = One<Deleted<String>>)))]
async fn revoke(
    State(state): Shared,
    caller: Caller,
    Path(key): Path<String>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let id: KeyId = key.parse().map_err(|_| ApiError::NotFound("key"))?;
    let mut command = caller.command(&state, digest).await?;
    if !tenants::revoke_key_of(command.tx(), caller.account, caller.company, id).await? {
        return Err(ApiError::NotFound("key"));
    }
    command.finish(StatusCode::OK, Deleted { id, deleted: true }).await
}
