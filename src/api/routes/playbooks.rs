//! Playbooks: create, check, list, get, change, versions.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{CompanyId, PlaybookId};
use capx_core::domain::playbook::{self, Playbook as Model, diff};
use capx_core::domain::webhook;
use capx_core::engine::FieldProblem;
use capx_core::engine::playbooks as engine;
use capx_core::engine::playbooks::CreatePlaybook;
use capx_core::store::pauses;
use capx_core::store::playbooks::{self, Filter, PlaybookRow};
use capx_core::store::{hooks, triggers, usage};
use chrono::{DateTime, Utc};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgConnection;
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use super::companies::Deleted;
use super::pauses::PauseBody;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Body, Check, Nothing, Path, Query, Several, limit, one_of};
use crate::api::command::Command;
use crate::api::reply::{Many, One, Page, Time, cursor, id_cursor, page};
use crate::api::{ApiError, Shared, openapi};

const NAME_CHARS_MAX: usize = 200;
const DESCRIPTION_CHARS_MAX: usize = 10_000;
const TAGS_MAX: usize = 20;
const TAG_CHARS_MAX: usize = 64;
/// What a filter by status may name.
const STATUSES: &[&str] = &["active", "paused", "archived"];

fn statuses() -> utoipa::openapi::schema::Object {
    openapi::names(STATUSES)
}

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes
        .with(Scope::PlaybooksWrite, 3, routes!(create))
        .with(Scope::PlaybooksRead, 1, routes!(list))
        .with(Scope::PlaybooksRead, 1, routes!(list_of_account))
        .with(Scope::PlaybooksRead, 1, routes!(validate))
        .with(Scope::PlaybooksRead, 1, routes!(one))
        .with(Scope::PlaybooksRead, 1, routes!(one_of_account))
        .with(Scope::PlaybooksWrite, 2, routes!(update))
        .with(Scope::PlaybooksWrite, 1, routes!(delete))
        .with(Scope::PlaybooksWrite, 2, routes!(pause))
        .with(Scope::PlaybooksWrite, 2, routes!(kill))
        .with(Scope::PlaybooksWrite, 2, routes!(resume))
        .with(Scope::PlaybooksWrite, 2, routes!(archive))
        .with(Scope::PlaybooksRead, 1, routes!(versions))
        .with(Scope::PlaybooksRead, 1, routes!(version))
        .with(Scope::PlaybooksRead, 1, routes!(diff_versions))
        .with(Scope::PlaybooksWrite, 2, routes!(rollback))
}

/// A playbook to be, or a new version of one.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct CreatePlaybookBody {
    /// Unique within the company; by default the name in the YAML.
    #[schema(min_length = 1, max_length = 200)]
    name: Option<String>,
    /// For people.
    #[schema(max_length = 10_000)]
    description: Option<String>,
    /// The definition.
    yaml: String,
    /// For filters.
    #[serde(default)]
    #[schema(max_items = 20)]
    tags: Vec<String>,
}

/// Changes of a playbook; what is left out stays.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct UpdatePlaybookBody {
    /// Unique within the company.
    #[schema(min_length = 1, max_length = 200)]
    name: Option<String>,
    /// For people.
    #[schema(max_length = 10_000)]
    description: Option<String>,
    /// Another definition: a new version. Runs keep the one they began with.
    yaml: Option<String>,
    /// For filters; replaces those that it has.
    #[schema(max_items = 20)]
    tags: Option<Vec<String>>,
}

/// Where to go back to.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct RollbackBody {
    /// The number of the version whose definition is to be the current one again.
    #[schema(minimum = 1)]
    version: i32,
}

/// A definition to be checked.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
struct ValidateBody {
    /// The definition.
    yaml: String,
}

/// A definition that is in order.
#[derive(Debug, Serialize, ToSchema)]
struct Validated {
    /// Always true: what is not in order is a 400 with every fault.
    valid: bool,
    name: String,
    step_count: usize,
    steps: Vec<Step>,
    trigger: Value,
    /// What its author may want to know.
    warnings: Vec<String>,
}

/// A step of a definition.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Step {
    id: String,
    #[schema(required)]
    role: Option<String>,
    action: String,
}

/// A playbook that was made.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct CreatedPlaybook {
    /// `pb_…`
    #[schema(value_type = String)]
    id: PlaybookId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    name: String,
    #[schema(required)]
    description: Option<String>,
    /// `active`, `paused` or `archived`.
    status: String,
    version: i32,
    step_count: usize,
    tags: Vec<String>,
    /// What starts runs, e.g. `{"type": "schedule", "schedule": "0 9 * * MON"}`;
    /// null for one that is only run by hand.
    trigger: Value,
    created_at: Time,
    /// `whsec_…`, this once: what signs the requests that start it, where a webhook does.
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook_secret: Option<String>,
    /// What will fail at run time unless something changes.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    warnings: Vec<String>,
}

/// A playbook in a list.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct PlaybookItem {
    /// `pb_…`
    #[schema(value_type = String)]
    id: PlaybookId,
    #[schema(value_type = String)]
    company_id: CompanyId,
    name: String,
    /// `active`, `paused` or `archived`.
    status: String,
    version: i32,
    step_count: usize,
    #[schema(required)]
    last_run_at: Option<Time>,
    run_count: i64,
    tags: Vec<String>,
}

/// A playbook.
#[derive(Debug, Clone, Serialize, ToSchema)]
struct Playbook {
    #[serde(flatten)]
    item: PlaybookItem,
    #[schema(required)]
    description: Option<String>,
    yaml: String,
    steps: Vec<Step>,
    #[schema(required)]
    trigger: Option<Value>,
    #[schema(required)]
    rubric: Option<Value>,
    /// What a run cost on average, in USD.
    avg_run_cost: f64,
    /// How long a run took on average, in seconds.
    avg_run_duration: i64,
    /// When it is planned to start by itself.
    #[schema(required)]
    next_run_at: Option<Time>,
    /// `whsec_…`, once: what signs the requests that start it, where a webhook does since this change.
    #[serde(skip_serializing_if = "Option::is_none")]
    webhook_secret: Option<String>,
    created_at: Time,
    updated_at: Time,
}

/// A stored playbook was checked when it came; one that no longer loads is
/// shown without its parts.
fn read(yaml: &str) -> Option<Model> {
    playbook::load(yaml).ok()
}

fn steps(model: &Model) -> Vec<Step> {
    let of = |step: &playbook::Step| Step { id: step.id.clone(), role: step.role.clone(), action: step.action.clone() };
    model.steps.iter().map(of).collect()
}

impl PlaybookItem {
    fn new(row: &PlaybookRow) -> Self {
        Self {
            id: row.playbook,
            company_id: row.company,
            name: row.name.clone(),
            status: row.status.clone(),
            version: row.version,
            step_count: usize::try_from(row.step_count).unwrap_or(0),
            last_run_at: row.last_run_at.map(Time),
            run_count: row.run_count,
            tags: row.tags.clone(),
        }
    }
}

impl Playbook {
    fn new(row: PlaybookRow, next_run_at: Option<DateTime<Utc>>) -> Self {
        let model = read(&row.yaml);
        Self {
            item: PlaybookItem::new(&row),
            description: row.description,
            steps: model.as_ref().map(steps).unwrap_or_default(),
            trigger: model.as_ref().map(|model| model.trigger.to_json()),
            rubric: model.and_then(|model| model.rubric),
            yaml: row.yaml,
            avg_run_cost: row.avg_run_cost.to_usd(),
            avg_run_duration: row.avg_run_duration_s,
            next_run_at: next_run_at.map(Time),
            webhook_secret: None,
            created_at: Time(row.created_at),
            updated_at: Time(row.updated_at),
        }
    }
}

fn problems(name: Option<&str>, description: Option<&str>, tags: &[String]) -> Vec<FieldProblem> {
    let mut problems = Vec::new();
    if name.is_some_and(|name| name.trim().is_empty() || name.chars().count() > NAME_CHARS_MAX) {
        problems.push(FieldProblem::new("name", format!("must be 1 to {NAME_CHARS_MAX} characters")));
    }
    if description.is_some_and(|text| text.chars().count() > DESCRIPTION_CHARS_MAX) {
        problems.push(FieldProblem::new("description", format!("must be at most {DESCRIPTION_CHARS_MAX} characters")));
    }
    if tags.len() > TAGS_MAX || tags.iter().any(|tag| tag.is_empty() || tag.chars().count() > TAG_CHARS_MAX) {
        problems.push(FieldProblem::new("tags", format!("at most {TAGS_MAX}, each 1 to {TAG_CHARS_MAX} characters")));
    }
    problems
}

impl Check for CreatePlaybookBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        problems(self.name.as_deref(), self.description.as_deref(), &self.tags)
    }
}

impl Check for UpdatePlaybookBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        problems(self.name.as_deref(), self.description.as_deref(), self.tags.as_deref().unwrap_or_default())
    }
}

impl Check for RollbackBody {}
impl Check for ValidateBody {}

/// Create a playbook
///
/// It is checked, and may be run at once. An existing name in the same company
/// is its next version when the text changed, and nothing new when it did not.
#[utoipa::path(post, path = "/companies/{company}/playbooks", tag = "Playbooks", request_body = CreatePlaybookBody,
    params(("company" = String, Path, description = "`co_…`")),
    responses((status = 201, description = "The playbook, or its new version.", body = One<CreatedPlaybook>),
        (status = 200, description = "Nothing is new.", body = One<CreatedPlaybook>)))]
async fn create(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Body { body, digest }: Body<CreatePlaybookBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let request = CreatePlaybook { name: body.name, description: body.description, yaml: body.yaml, tags: body.tags };
    let created = engine::create_in(command.tx(), company, &request).await?;
    let row = find(command.tx(), company, &created.upserted.playbook.to_string()).await?;
    let secret = secret_of(command.tx(), company, row.playbook).await?;
    let shown = CreatedPlaybook {
        webhook_secret: secret,
        id: row.playbook,
        company_id: company,
        name: row.name,
        description: row.description,
        status: row.status,
        version: created.upserted.version,
        step_count: created.playbook.steps.len(),
        tags: row.tags,
        trigger: created.playbook.trigger.to_json(),
        created_at: Time(row.created_at),
        warnings: created.warnings,
    };
    let status = if created.upserted.changed { StatusCode::CREATED } else { StatusCode::OK };
    let kept = CreatedPlaybook { webhook_secret: None, ..shown.clone() };
    command.finish_with_secret(status, shown, kept).await
}

/// What signs the requests that start a playbook, for whoever sees it first.
async fn secret_of(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
) -> Result<Option<String>, ApiError> {
    let secret = hooks::show(tx, company, playbook).await?;
    let secret = secret.and_then(|secret| webhook::Secret::try_from(secret).ok());
    Ok(secret.map(|secret| webhook::written(&secret)))
}

/// Check a definition
///
/// Stores nothing; tells every fault at once.
#[utoipa::path(post, path = "/playbooks/validate", tag = "Playbooks", request_body = ValidateBody,
    responses((status = 200, description = "It is in order.", body = One<Validated>)))]
async fn validate(caller: Caller, Body { body, .. }: Body<ValidateBody>) -> Result<Response, ApiError> {
    let (model, warnings) = engine::check(&body.yaml)?;
    caller.figures(Validated {
        valid: true,
        step_count: model.steps.len(),
        steps: steps(&model),
        trigger: model.trigger.to_json(),
        name: model.name,
        warnings,
    })
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// The one of this name.
    name: Option<String>,
    /// `active`, `paused` or `archived`.
    #[param(schema_with = statuses, required = false)]
    status: Option<String>,
    /// Those that have this tag; given several times, those that have all.
    #[param(value_type = Option<Vec<String>>, style = Form, explode)]
    tag: Option<Several>,
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(schema_with = openapi::id_cursor, required = false)]
    cursor: Option<String>,
}

async fn listed(
    tx: &mut PgConnection,
    caller: &Caller,
    company: Option<CompanyId>,
    query: ListQuery,
) -> Result<Page<PlaybookItem>, ApiError> {
    let limit = limit(query.limit, 25, 100)?;
    let tags = query.tag.unwrap_or_default().0;
    let filter = Filter {
        account: Some(caller.account),
        company,
        name: query.name.as_deref(),
        status: one_of("status", query.status.as_deref(), STATUSES)?,
        tags: &tags,
        before: cursor(query.cursor.as_deref())?,
        ..Filter::default()
    };
    let mut rows = playbooks::list(&mut *tx, &filter, limit + 1).await?;
    usage::add_run_totals(tx, &mut rows).await?;
    Ok(page(rows, limit, |row| id_cursor(row.playbook.0), |row| PlaybookItem::new(&row)))
}

/// List playbooks
///
/// Of a company, newest first.
#[utoipa::path(get, path = "/companies/{company}/playbooks", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ListQuery),
    responses((status = 200, description = "A page.", body = Many<PlaybookItem>)))]
async fn list(
    State(state): Shared,
    caller: Caller,
    Path(company): Path<String>,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let page = listed(&mut tx, &caller, Some(company), query).await?;
    caller.list(page)
}

/// List available playbooks
///
/// Of all companies that the key may see, newest first.
#[utoipa::path(get, path = "/playbooks", tag = "Playbooks", params(ListQuery),
    responses((status = 200, description = "A page.", body = Many<PlaybookItem>)))]
async fn list_of_account(
    State(state): Shared,
    caller: Caller,
    Query(query): Query<ListQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let page = listed(&mut tx, &caller, caller.company, query).await?;
    caller.list(page)
}

/// A playbook of a company, or 404.
pub(super) async fn find(tx: &mut PgConnection, company: CompanyId, playbook: &str) -> Result<PlaybookRow, ApiError> {
    let playbook: PlaybookId = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    let filter = Filter { company: Some(company), playbook: Some(playbook), ..Filter::default() };
    playbooks::list(tx, &filter, 1).await?.pop().ok_or(ApiError::NotFound("playbook"))
}

/// When a playbook is planned to start by itself; one that is not active does not.
async fn next_run(tx: &mut PgConnection, row: &PlaybookRow) -> Result<Option<DateTime<Utc>>, ApiError> {
    if row.status != "active" {
        return Ok(None);
    }
    Ok(triggers::next_at(tx, row.company, row.playbook).await?)
}

/// A playbook with what its runs came to, and when it is planned to start.
async fn shown(tx: &mut PgConnection, row: PlaybookRow) -> Result<Playbook, ApiError> {
    let mut rows = [row];
    usage::add_run_totals(&mut *tx, &mut rows).await?;
    let [row] = rows;
    let next = next_run(tx, &row).await?;
    Ok(Playbook::new(row, next))
}

/// Get a playbook
#[utoipa::path(get, path = "/companies/{company}/playbooks/{playbook}", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "The playbook.", body = One<Playbook>), (status = 304, description = "Not changed.")))]
async fn one(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let row = find(&mut tx, company, &playbook).await?;
    caller.one(&shown(&mut tx, row).await?)
}

/// Get any playbook
///
/// The same by the playbook's id alone.
#[utoipa::path(get, path = "/playbooks/{playbook}", tag = "Playbooks",
    params(("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "The playbook.", body = One<Playbook>), (status = 304, description = "Not changed.")))]
async fn one_of_account(
    State(state): Shared,
    caller: Caller,
    Path(playbook): Path<String>,
) -> Result<Response, ApiError> {
    let playbook: PlaybookId = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    let mut tx = caller.read(&state).await?;
    let account = Some(caller.account);
    let filter = Filter { account, company: caller.company, playbook: Some(playbook), ..Filter::default() };
    let row = playbooks::list(&mut *tx, &filter, 1).await?.pop().ok_or(ApiError::NotFound("playbook"))?;
    caller.one(&shown(&mut tx, row).await?)
}

/// Update a playbook
///
/// A changed `yaml` is a new version; runs keep the one they began with.
#[utoipa::path(patch, path = "/companies/{company}/playbooks/{playbook}", tag = "Playbooks", request_body = UpdatePlaybookBody,
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "The playbook.", body = One<Playbook>)))]
async fn update(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Body { body, digest }: Body<UpdatePlaybookBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let row = find(command.tx(), company, &playbook).await?;
    let changes = engine::UpdatePlaybook {
        name: body.name.map(|name| name.trim().to_owned()),
        description: body.description,
        yaml: body.yaml,
        tags: body.tags,
    };
    changed(command, company, row.playbook, &changes).await
}

/// Changes a playbook, and answers with what it is then.
async fn changed(
    mut command: Command<'_>,
    company: CompanyId,
    playbook: PlaybookId,
    changes: &engine::UpdatePlaybook,
) -> Result<Response, ApiError> {
    engine::update(command.tx(), company, playbook, changes).await?;
    let row = find(command.tx(), company, &playbook.to_string()).await?;
    let secret = secret_of(command.tx(), company, playbook).await?;
    let shown = shown(command.tx(), row).await?;
    let kept = shown.clone();
    command.finish_with_secret(StatusCode::OK, Playbook { webhook_secret: secret, ..shown }, kept).await
}

/// Roll a playbook back
///
/// The definition of an earlier version is the current one again, as a new
/// version; what is current already stays. Runs keep the one they began with.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/rollback", tag = "Playbooks", request_body = RollbackBody,
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "The playbook.", body = One<Playbook>)))]
async fn rollback(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Body { body, digest }: Body<RollbackBody>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let row = find(command.tx(), company, &playbook).await?;
    let version = playbooks::version(command.tx(), company, row.playbook, body.version).await?;
    let version = version.ok_or_else(|| ApiError::field("version", "is no version of this playbook"))?;
    let changes = engine::UpdatePlaybook { name: None, description: None, yaml: Some(version.yaml), tags: None };
    changed(command, company, row.playbook, &changes).await
}

/// Delete a playbook
///
/// One that has runs is archived instead; a 409 says so.
#[utoipa::path(delete, path = "/companies/{company}/playbooks/{playbook}", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "It is gone.", body = One<Deleted<String>>)))]
async fn delete(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    let mut command = caller.command(&state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let id = find(command.tx(), company, &playbook).await?.playbook;
    engine::delete(command.tx(), company, id).await?;
    command.finish(StatusCode::OK, Deleted { id, deleted: true }).await
}

/// A playbook whose status changed.
#[derive(Debug, Serialize, ToSchema)]
struct PlaybookStatus {
    #[schema(value_type = String)]
    id: PlaybookId,
    /// `active`, `paused` or `archived`.
    status: &'static str,
    updated_at: Time,
}

async fn set_status(
    state: &crate::api::ApiState,
    caller: &Caller,
    (company, playbook): (String, String),
    (digest, reason): ([u8; 32], Option<&str>),
    (status, killed): (&'static str, bool),
) -> Result<Response, ApiError> {
    let mut command = caller.command(state, digest).await?;
    let company = caller.company_id(command.tx(), &company).await?;
    let id = find(command.tx(), company, &playbook).await?.playbook;
    let at = engine::set_status(command.tx(), company, id, status, killed).await?;
    let paused = ("playbook", id.0);
    match status {
        "paused" => pauses::set(command.tx(), company, paused, &caller.key.to_string(), reason).await?,
        _ => pauses::clear(command.tx(), company, paused).await?,
    }
    let told = json!({"playbook_id": id, "status": status, "killed": killed, "reason": reason});
    command.audit(company, "playbook.status_changed", told).await?;
    command.wake();
    command.finish(StatusCode::OK, PlaybookStatus { id, status, updated_at: Time(at) }).await
}

/// Pause a playbook
///
/// Nothing starts a run of it until it is resumed; runs in flight go on.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/pause", tag = "Playbooks", request_body = PauseBody,
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "It is paused.", body = One<PlaybookStatus>)))]
async fn pause(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { body, digest }: Body<PauseBody>,
) -> Result<Response, ApiError> {
    set_status(&state, &caller, path, (digest, body.reason.as_deref()), ("paused", false)).await
}

/// Kill switch of a playbook
///
/// Its runs stop at once, calls that are under way included, and nothing starts one; the
/// state is kept, and `resume` lifts it.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/kill", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "It is paused.", body = One<PlaybookStatus>)))]
async fn kill(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    set_status(&state, &caller, path, (digest, None), ("paused", true)).await
}

/// Resume a playbook
///
/// One that is paused or archived may be run again.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/resume", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "It is active.", body = One<PlaybookStatus>)))]
async fn resume(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    set_status(&state, &caller, path, (digest, None), ("active", false)).await
}

/// Archive a playbook
///
/// It is kept with its runs, and is not run any more.
#[utoipa::path(post, path = "/companies/{company}/playbooks/{playbook}/archive", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`")),
    responses((status = 200, description = "It is archived.", body = One<PlaybookStatus>)))]
async fn archive(
    State(state): Shared,
    caller: Caller,
    Path(path): Path<(String, String)>,
    Body { digest, .. }: Body<Nothing>,
) -> Result<Response, ApiError> {
    set_status(&state, &caller, path, (digest, None), ("archived", false)).await
}

/// A version in a list.
#[derive(Debug, Serialize, ToSchema)]
struct VersionItem {
    version: i32,
    /// Whether runs that start now take it.
    current: bool,
    created_at: Time,
}

/// A version.
#[derive(Debug, Serialize, ToSchema)]
struct Version {
    #[serde(flatten)]
    item: VersionItem,
    yaml: String,
    steps: Vec<Step>,
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct VersionsQuery {
    /// Results of a page.
    #[param(minimum = 1, maximum = 100, default = 25)]
    limit: Option<i64>,
    /// `meta.cursor` of the page before.
    #[param(pattern = "^[1-9][0-9]{0,8}$")]
    cursor: Option<String>,
}

/// List a playbook's versions
///
/// Newest first.
#[utoipa::path(get, path = "/companies/{company}/playbooks/{playbook}/versions", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"), VersionsQuery),
    responses((status = 200, description = "A page.", body = Many<VersionItem>)))]
async fn versions(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Query(query): Query<VersionsQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let row = find(&mut tx, company, &playbook).await?;
    let limit = limit(query.limit, 25, 100)?;
    let before = match query.cursor.as_deref() {
        None => i32::MAX,
        Some(text) => text.parse().ok().filter(|n: &i32| *n > 0).ok_or_else(crate::api::reply::wrong_cursor)?,
    };
    let rows = playbooks::versions_of(&mut tx, company, row.playbook, before, limit + 1).await?;
    let show = |v: playbooks::VersionRow| VersionItem {
        version: v.version,
        current: v.version == row.version,
        created_at: Time(v.created_at),
    };
    caller.list(page(rows, limit, |v| v.version.to_string(), show))
}

/// Get a version of a playbook
#[utoipa::path(get, path = "/companies/{company}/playbooks/{playbook}/versions/{version}", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"),
        ("version" = i32, Path, description = "Its number.")),
    responses((status = 200, description = "The version.", body = One<Version>), (status = 304, description = "Not changed.")))]
async fn version(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook, version)): Path<(String, String, String)>,
) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let row = find(&mut tx, company, &playbook).await?;
    let number: i32 = version.parse().map_err(|_| ApiError::NotFound("version"))?;
    let found = playbooks::version(&mut tx, company, row.playbook, number).await?;
    let v = found.ok_or(ApiError::NotFound("version"))?;
    let item = VersionItem { version: v.version, current: v.version == row.version, created_at: Time(v.created_at) };
    let steps = read(&v.yaml).as_ref().map(steps).unwrap_or_default();
    caller.one(&Version { item, yaml: v.yaml, steps })
}

/// Which versions to compare.
#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct DiffQuery {
    /// The number of the earlier version; by default the one before `to`.
    #[param(minimum = 1)]
    from: Option<i64>,
    /// The number of the later version; by default the current one.
    #[param(minimum = 1)]
    to: Option<i64>,
}

/// A difference between two versions.
#[derive(Debug, Serialize, ToSchema)]
struct VersionChange {
    /// Where, e.g. `steps.draft.timeout`; a step is called by its id.
    path: String,
    /// `added`, `removed`, `changed`, or `moved` for a step in another place.
    #[schema(value_type = String)]
    kind: diff::Kind,
    /// What it was; of a step that moved, the step before it.
    from: Value,
    /// What it is; of a step that moved, the step before it.
    to: Value,
}

/// What two versions mean differently.
#[derive(Debug, Serialize, ToSchema)]
struct VersionDiff {
    from: i64,
    to: i64,
    /// Empty where they mean the same.
    changes: Vec<VersionChange>,
}

/// Compare two versions of a playbook
///
/// By meaning: dialect, comments, the order of keys and the way a value is written
/// do not count.
#[utoipa::path(get, path = "/companies/{company}/playbooks/{playbook}/diff", tag = "Playbooks",
    params(("company" = String, Path, description = "`co_…`"), ("playbook" = String, Path, description = "`pb_…`"), DiffQuery),
    responses((status = 200, description = "What differs.", body = One<VersionDiff>)))]
async fn diff_versions(
    State(state): Shared,
    caller: Caller,
    Path((company, playbook)): Path<(String, String)>,
    Query(query): Query<DiffQuery>,
) -> Result<Response, ApiError> {
    let mut tx = caller.look_up(&state).await?;
    let company = caller.company_id(&mut tx, &company).await?;
    let row = find(&mut tx, company, &playbook).await?;
    let to = query.to.unwrap_or_else(|| row.version.into());
    let from = query.from.unwrap_or(to - 1).max(1);
    let mut texts = Vec::with_capacity(2);
    for (field, number) in [("from", from), ("to", to)] {
        let unknown = || ApiError::field(field, format!("the playbook has no version {number}"));
        let number = i32::try_from(number).map_err(|_| unknown())?;
        let version = playbooks::version(&mut tx, company, row.playbook, number).await?;
        texts.push(version.ok_or_else(unknown)?.yaml);
    }
    drop(tx);
    let changes = diff::diff(&texts[0], &texts[1])
        .map_err(|_| ApiError::Conflict("one of the versions is in a form that this server no longer reads".into()))?;
    let shown =
        |change: diff::Change| VersionChange { path: change.path, kind: change.kind, from: change.from, to: change.to };
    caller.figures(VersionDiff { from, to, changes: changes.into_iter().map(shown).collect() })
}
