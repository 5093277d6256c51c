//! Everything that is paused, by whom, and why.

use axum::extract::State;
use axum::response::Response;
use capx_core::domain::address::Rules;
use capx_core::domain::ids::{AgentId, CompanyId, PlaybookId};
use capx_core::engine::FieldProblem;
use capx_core::store::pauses::{self, PausedRow};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::routes;

use super::Routes;
use crate::api::auth::{Caller, Scope};
use crate::api::body::{Check, Query};
use crate::api::reply::{All, Time};
use crate::api::{ApiError, Shared};

const REASON_CHARS_MAX: usize = 1_000;

pub(in crate::api) fn routes(routes: Routes) -> Routes {
    routes.with(Scope::CompaniesRead, 1, routes!(list))
}

/// Why something is paused.
#[derive(Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct PauseBody {
    /// For people.
    #[schema(max_length = 1_000)]
    pub reason: Option<String>,
}

impl Check for PauseBody {
    fn problems(&self, _: &Rules) -> Vec<FieldProblem> {
        let long = self.reason.as_ref().is_some_and(|reason| reason.chars().count() > REASON_CHARS_MAX);
        let long = long.then(|| FieldProblem::new("reason", format!("must be at most {REASON_CHARS_MAX} characters")));
        long.into_iter().collect()
    }
}

/// Something that is paused.
#[derive(Debug, Serialize, ToSchema)]
struct Pause {
    /// `company`, `playbook` or `agent`.
    kind: String,
    /// `co_…`, `pb_…` or `ag_…`
    id: String,
    #[schema(value_type = String)]
    company_id: CompanyId,
    /// Its name; of an agent its role.
    name: String,
    /// The key that paused it, or `budget`, or what else did by itself.
    #[schema(required)]
    paused_by: Option<String>,
    #[schema(required)]
    reason: Option<String>,
    #[schema(required)]
    paused_at: Option<Time>,
}

impl From<PausedRow> for Pause {
    fn from(row: PausedRow) -> Self {
        let id = match row.kind.as_str() {
            "agent" => AgentId(row.id).to_string(),
            "playbook" => PlaybookId(row.id).to_string(),
            _ => CompanyId(row.id).to_string(),
        };
        Self {
            kind: row.kind,
            id,
            company_id: CompanyId(row.company_id),
            name: row.name,
            paused_by: row.paused_by,
            reason: row.reason,
            paused_at: row.since.map(Time),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[serde(deny_unknown_fields)]
#[into_params(parameter_in = Query)]
struct PausesQuery {
    /// `co_…`
    company_id: Option<String>,
}

/// List what is paused
///
/// Companies, playbooks and agents, with who paused them and why: by hand, by a budget, or since
/// they went round in circles. Paused queues are listed with the queues.
#[utoipa::path(get, path = "/pauses", tag = "Companies", params(PausesQuery),
    responses((status = 200, description = "The first thousand.", body = All<Pause>)))]
async fn list(State(state): Shared, caller: Caller, Query(query): Query<PausesQuery>) -> Result<Response, ApiError> {
    let mut tx = caller.read(&state).await?;
    let company = match query.company_id.as_deref() {
        Some(id) => Some(caller.company_id(&mut tx, id).await?),
        None => caller.company,
    };
    let rows = pauses::list(&mut tx, caller.account, company).await?;
    caller.all(rows.into_iter().map(Pause::from).collect())
}
