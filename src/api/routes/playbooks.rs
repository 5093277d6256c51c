//! Playbooks: create, list, get.

use axum::extract::State;
use axum::http::StatusCode;
use axum::response::Response;
use axum::routing::get;
use capx_core::domain::ids::{CompanyId, PlaybookId};
use capx_core::domain::playbook::{self, Playbook};
use capx_core::engine::FieldProblem;
use capx_core::engine::playbooks::{CreatePlaybook, create as create_playbook};
use capx_core::store::playbooks::{self, Filter, PlaybookRow};
use serde::Deserialize;
use serde_json::{Value, json};

use super::Routes;
use crate::api::auth::{Caller, PlaybooksRead, PlaybooksWrite};
use crate::api::body::{Body, Params, Path, limit};
use crate::api::reply::{cursor, page, time};
use crate::api::{ApiError, ApiState, Shared};

const NAME_CHARS_MAX: usize = 200;
const TAGS_MAX: usize = 20;
const TAG_CHARS_MAX: usize = 64;

pub(in crate::api) fn routes() -> Routes {
    Routes::new()
        .route("/companies/{company}/playbooks", get(list).post(create))
        .route("/companies/{company}/playbooks/{playbook}", get(one))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct CreateBody {
    name: Option<String>,
    description: Option<String>,
    yaml: String,
    #[serde(default)]
    tags: Vec<String>,
}

async fn create(
    State(state): Shared,
    caller: Caller<PlaybooksWrite>,
    Path(company): Path<String>,
    Body(body): Body<CreateBody>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?;
    let mut problems = Vec::new();
    if let Some(name) = &body.name
        && (name.trim().is_empty() || name.chars().count() > NAME_CHARS_MAX)
    {
        problems.push(FieldProblem::new("name", format!("must be 1 to {NAME_CHARS_MAX} characters")));
    }
    if body.tags.len() > TAGS_MAX || body.tags.iter().any(|tag| tag.is_empty() || tag.chars().count() > TAG_CHARS_MAX) {
        problems.push(FieldProblem::new("tags", format!("at most {TAGS_MAX}, each 1 to {TAG_CHARS_MAX} characters")));
    }
    if !problems.is_empty() {
        return Err(ApiError::fields(problems));
    }
    let request = CreatePlaybook { name: body.name, description: body.description, yaml: body.yaml, tags: body.tags };
    let created = create_playbook(&state.engine, company.company, &request).await?;
    let row = find(&state, company.company, created.upserted.playbook).await?;
    let mut data = json!({
        "id": row.playbook, "company_id": company.company, "name": row.name, "description": row.description,
        "status": row.status, "version": created.upserted.version, "step_count": created.playbook.steps.len(),
        "tags": row.tags, "trigger": created.playbook.trigger.to_json(), "created_at": time(row.created_at),
    });
    if !created.warnings.is_empty() {
        data["warnings"] = created.warnings.into();
    }
    let status = if created.upserted.changed { StatusCode::CREATED } else { StatusCode::OK };
    caller.reply(&state, status, 3, data).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct ListParams {
    status: Option<String>,
    tag: Option<String>,
    limit: Option<i64>,
    cursor: Option<String>,
}

async fn list(
    State(state): Shared,
    caller: Caller<PlaybooksRead>,
    Path(company): Path<String>,
    Params(params): Params<ListParams>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?;
    let limit = limit(params.limit, 25, 100)?;
    let statuses = ["active", "paused", "archived"];
    if let Some(status) = params.status.as_deref()
        && !statuses.contains(&status)
    {
        return Err(ApiError::field("status", format!("must be one of {}", statuses.join(", "))));
    }
    let tags: Vec<String> = params.tag.into_iter().collect();
    let filter = Filter {
        status: params.status.as_deref(),
        tags: &tags,
        before: cursor(params.cursor.as_deref())?,
        ..Filter::default()
    };
    let rows = playbooks::list(&state.engine.pool, company.company, &filter, limit + 1).await?;
    let page = page(
        rows,
        limit,
        |row| row.playbook.0,
        |row| {
            json!({
                "id": row.playbook, "name": row.name, "status": row.status, "version": row.version,
                "step_count": read(&row).map_or(0, |p| p.steps.len()), "last_run_at": row.last_run_at.map(time),
                "run_count": row.run_count, "tags": row.tags,
            })
        },
    );
    caller.list(&state, page).await
}

async fn one(
    State(state): Shared,
    caller: Caller<PlaybooksRead>,
    Path((company, playbook)): Path<(String, String)>,
) -> Result<Response, ApiError> {
    let company = caller.company(&state, &company).await?;
    let id = playbook.parse().map_err(|_| ApiError::NotFound("playbook"))?;
    let row = find(&state, company.company, id).await?;
    let model = read(&row);
    let steps: Vec<Value> = model
        .iter()
        .flat_map(|model| &model.steps)
        .map(|step| json!({"id": step.id, "role": step.role, "action": step.action}))
        .collect();
    let data = json!({
        "id": row.playbook, "company_id": company.company, "name": row.name, "description": row.description,
        "status": row.status, "version": row.version, "yaml": row.yaml, "step_count": steps.len(), "steps": steps,
        "tags": row.tags,
        "trigger": model.as_ref().map(|m| m.trigger.to_json()),
        "rubric": model.as_ref().and_then(|m| m.rubric.clone()),
        "run_count": row.run_count, "avg_run_cost": row.avg_run_cost.to_usd(),
        "avg_run_duration": row.avg_run_duration_s, "last_run_at": row.last_run_at.map(time),
        "created_at": time(row.created_at),
    });
    caller.reply(&state, StatusCode::OK, 1, data).await
}

/// A stored playbook was checked when it came; one that no longer loads is
/// shown without its parts.
fn read(row: &PlaybookRow) -> Option<Playbook> {
    playbook::load(&row.yaml).ok()
}

/// A playbook of a company, or 404.
pub(super) async fn find(state: &ApiState, company: CompanyId, playbook: PlaybookId) -> Result<PlaybookRow, ApiError> {
    let filter = Filter { playbook: Some(playbook), ..Filter::default() };
    playbooks::list(&state.engine.pool, company, &filter, 1).await?.pop().ok_or(ApiError::NotFound("playbook"))
}
