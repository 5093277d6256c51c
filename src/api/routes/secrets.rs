//! Secrets of a company: set, list, delete. What one is never comes back.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::secret::{SECRETS_MAX, VALUE_BYTES_MAX, name_problem, value_problem};
use capx_core::engine::FieldProblem;
use capx_core::engine::secrets::sealing;
use capx_core::store::secrets::{self as store, SecretRow};
use serde::{Deserialize, Serialize};
use utoipa::openapi::schema::{Object, ObjectBuilder, Type};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::companies::Deleted;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, limit};
use crate::api::reply::{Many, One, Time, page, wrong_cursor};
use crate::api::{ApiError, Shared};

const NAME_PATTERN: &str = "^[A-Za-z][A-Za-z0-9_]{0,63}$";

fn name_schema() -> Object {
    ObjectBuilder::new().schema_type(Type::String).pattern(Some(NAME_PATTERN)).build()
}

fn value_schema() -> Object {
    ObjectBuilder::new()
        .schema_type(Type::String)
        .min_length(Some(8))
        // In bytes of UTF-8, of which a character may have four.
        .max_length(Some(VALUE_BYTES_MAX / 4))
        .pattern(Some(r"^[^\u0000]*$"))
        .description(Some("8 bytes to 16 KiB of text. It is sealed at once, and never shown again."))
        .build()
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::CompaniesRead, 1, routes!(list)).with(Scope::CompaniesWrite, 2, routes!(set)).with(
        Scope::CompaniesWrite,
        1,
        routes!(delete),
    )
}

/// A secret to be set.
#[derive(Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct SetSecretBody {
    /// What playbooks call it.
    #[schema(schema_with = name_schema)]
    name: String,
    #[schema(schema_with = value_schema)]
    value: String,
}

impl Check for SetSecretBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let name = name_problem(&self.name).map(|problem| FieldProblem::new("name", problem));
        let value = value_problem(&self.value).map(|problem| FieldProblem::new("value", problem));
        name.into_iter().chain(value).collect()
    }
}

/// A secret, but for what it is.
#[derive(Debug, Serialize, ToSchema)]
struct SecretOf {
    name: String,
    /// The id of the key that it is sealed with.
    key_id: String,
    created_at: Time,
    updated_at: Time,
    /// `key_…`: the API key that has set it.
    updated_by: String,
}

impl From<SecretRow> for SecretOf {
    fn from(row: SecretRow) -> Self {
        Self {
            name: row.name,
            key_id: row.key_id,
            created_at: Time(row.created_at),
            updated_at: Time(row.updated_at),
            updated_by: row.updated_by,
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct SecretsQuery {
    /// Results of a page.
    #[param(minimum = 1, maximum = 200, default = 50)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = name_schema, required = false)]
    cursor: Option<String>,
}

/// List the secrets of a company
///
/// By name, and never what they are.
#[utoipa::path(get, path = "/companies/{company}/secrets", tag = "Companies",
    params(("company" = String, Path, description = "`co_…`"), SecretsQuery),
    responses((status = 200, description = "A page.", body = Many<SecretOf>)))]
async fn list(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<SecretsQuery>,
) -> Result<Response, ApiError> {
    let limit = limit(query.limit, 50, 200)?;
    if query.cursor.as_deref().is_some_and(|cursor| name_problem(cursor).is_some()) {
        return Err(wrong_cursor());
    }
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let rows = store::list(&mut tx, company, query.cursor.as_deref(), limit + 1).await?;
    caller.list(page(rows, limit, |row| row.name.clone(), SecretOf::from))
}

/// Set a secret
///
/// Under a new name, or in the place of what it was: runs that are under way are given
/// the new one when a worker next takes them. `${secrets.NAME}` gives it to a tool, in
/// playbooks that name it in `secrets`; wherever else it would be seen, `[secret NAME]`
/// stands.
#[utoipa::path(post, path = "/companies/{company}/secrets", tag = "Companies", request_body = SetSecretBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 201, description = "It is set.", body = One<SecretOf>),
        (status = 200, description = "It is set in the place of what it was.", body = One<SecretOf>)))]
async fn set(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<SetSecretBody>,
) -> Result<Response, ApiError> {
    // As they are now: what is sealed with a key that is about to go is lost.
    let keys = state.engine.keyring.latest().await;
    // Kept with the request's key, and no way to try out what the secret is.
    let mut command = caller.command(&state, keys.digest(digest).map_err(sealing)?).await?;
    let company = caller.company_row(command.tx(), &company).await?;
    if company.status == "stopped" {
        return Err(ApiError::Conflict("the company is stopped; nothing goes on in it".into()));
    }
    let company = company.company;
    let sealed = keys.seal(company, &body.name, &body.value).map_err(sealing)?;
    let (row, is_new) =
        store::put(command.tx(), company, &body.name, &sealed, &caller.key.to_string()).await?.ok_or_else(|| {
            ApiError::Conflict(format!("the company has {SECRETS_MAX} secrets already; delete one first"))
        })?;
    command.finish(if is_new { StatusCode::CREATED } else { StatusCode::OK }, SecretOf::from(row)).await
}

/// Delete a secret
///
/// Steps that would be given it fail from then on.
#[utoipa::path(delete, path = "/companies/{company}/secrets/{name}", tag = "Companies",
    params(("company" = String, Path, description = "`co_…`"), ("name" = String, Path, description = "Its name.")),
    responses((status = 200, description = "It is deleted.", body = One<Deleted<String>>)))]
async fn delete(
    State(state): Shared,
    caller: Caller,
    Path((company, name)): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    if !store::delete(command.tx(), company, &name).await? {
        return Err(ApiError::NotFound("secret"));
    }
    command.finish(StatusCode::OK, Deleted { id: name, deleted: true }).await
}
