//! Tasks are made, changed and decided.

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::EngineError;
use crate::domain::company::works;
use crate::domain::event::{Event, TASK_CREATED, TASK_UPDATED};
use crate::domain::ids::{AgentId, CompanyId, TaskId};
use crate::domain::task::{Change, Verdict, is_over};
use crate::store::tasks::{NewTask, TaskChanges, TaskFilter, TaskRow};
use crate::store::tenants::CompanyRow;
use crate::store::{events, tasks};

/// A request to make a task.
#[derive(Debug)]
pub struct CreateTask {
    /// In short.
    pub title: String,
    /// In full.
    pub description: Option<String>,
    /// Who is to do it; else whoever has least to do.
    pub agent: Option<AgentId>,
    /// How urgent.
    pub priority: String,
    /// The client's own.
    pub metadata: Value,
}

/// Whether a person must approve what is to be done in a company.
fn human_in_loop(company: &CompanyRow) -> bool {
    let modes = [company.governance.as_ref(), company.config.get("governance")];
    let mode = modes.into_iter().flatten().find_map(|policy| match policy {
        Value::String(mode) => Some(mode.as_str()),
        Value::Object(policy) => policy.get("mode").and_then(Value::as_str),
        _ => None,
    });
    mode == Some("human_in_loop")
}

/// Makes a task. Where a person has the last word, it waits for that.
pub async fn create(tx: &mut PgConnection, company: &CompanyRow, request: &CreateTask) -> Result<TaskRow, EngineError> {
    if !works(&company.status) {
        return Err(EngineError::Conflict(format!("the company is {}; resume it to give it tasks", company.status)));
    }
    let task = TaskId::new();
    let agent = match request.agent {
        Some(agent) => Some(agent),
        None => tasks::least_busy_agent(tx, company.company).await?,
    };
    let new = NewTask {
        task,
        company: company.company,
        agent,
        title: &request.title,
        description: request.description.as_deref(),
        status: if human_in_loop(company) { "pending_approval" } else { "pending" },
        priority: &request.priority,
        metadata: &request.metadata,
    };
    tasks::insert(tx, &new).await?;
    let row = find(tx, company.company, task).await?;
    tell(tx, &row, TASK_CREATED, None).await?;
    Ok(row)
}

async fn find(tx: &mut PgConnection, company: CompanyId, task: TaskId) -> Result<TaskRow, EngineError> {
    let filter = TaskFilter { task: Some(task), ..TaskFilter::default() };
    tasks::list(tx, company, filter, 1).await?.pop().ok_or(EngineError::NotFound("task"))
}

async fn tell(
    tx: &mut PgConnection,
    row: &TaskRow,
    event: &'static str,
    feedback: Option<&str>,
) -> Result<(), EngineError> {
    let data = json!({
        "task_id": row.task(), "agent_id": row.agent_id.map(AgentId), "title": row.title, "status": row.status,
        "feedback": feedback,
    });
    events::append(&mut *tx, CompanyId(row.company_id), &[Event::new(event, data)]).await?;
    Ok(())
}

/// Decides about a task; the same again changes nothing.
pub async fn change(
    tx: &mut PgConnection,
    company: CompanyId,
    task: TaskId,
    change: Change,
    feedback: Option<&str>,
) -> Result<TaskRow, EngineError> {
    let row = tasks::lock(tx, company, task).await?.ok_or(EngineError::NotFound("task"))?;
    match change.decide(&row.status, row.approval.as_deref()) {
        Verdict::Stays => return Ok(row),
        Verdict::Refused => {
            let word = change.participle();
            return Err(EngineError::Conflict(format!("the task is {}; it cannot be {word}", row.status)));
        }
        Verdict::Becomes(next) => tasks::set_status(tx, &row, next, feedback).await?,
    }
    let row = find(tx, company, task).await?;
    tell(tx, &row, change.event(), feedback).await?;
    Ok(row)
}

/// Changes what a task is about, as long as it is not over.
pub async fn update(
    tx: &mut PgConnection,
    company: CompanyId,
    task: TaskId,
    changes: &TaskChanges<'_>,
) -> Result<TaskRow, EngineError> {
    let row = tasks::lock(tx, company, task).await?.ok_or(EngineError::NotFound("task"))?;
    if is_over(&row.status) {
        return Err(EngineError::Conflict(format!("the task is {}; it cannot be changed any more", row.status)));
    }
    tasks::update(tx, &row, changes).await?;
    let row = find(tx, company, task).await?;
    tell(tx, &row, TASK_UPDATED, None).await?;
    Ok(row)
}
