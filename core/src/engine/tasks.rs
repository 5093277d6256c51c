//! Tasks are made, changed and decided.

use std::time::Duration;

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::asks::{self, Said};
use super::cancel::cancel_run;
use super::{Engine, EngineError};
use crate::domain::company::works;
use crate::domain::event::{
    Event, TASK_CANCELLED, TASK_COMPLETED, TASK_CREATED, TASK_FAILED, TASK_STARTED, TASK_UPDATED,
};
use crate::domain::governance::Policy;
use crate::domain::heartbeat::SOON;
use crate::domain::ids::{AgentId, CompanyId, RunId, TaskId};
use crate::domain::task::{Change, Verdict, is_over};
use crate::store::tasks::{NewTask, TaskChanges, TaskFilter, TaskRow};
use crate::store::tenants::CompanyRow;
use crate::store::{beats, events, tasks};

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
    /// What must be completed before it begins.
    pub needs: Vec<TaskId>,
    /// The agent that makes it.
    pub by: Option<AgentId>,
    /// The call that makes it, once.
    pub call: Option<String>,
    /// The task in whose course it is made.
    pub parent: Option<TaskId>,
}

/// Makes a task. Where a person has the last word, it waits for that.
pub async fn create(tx: &mut PgConnection, company: &CompanyRow, request: &CreateTask) -> Result<TaskRow, EngineError> {
    if !works(&company.status) {
        return Err(EngineError::Conflict(format!("the company is {}; resume it to give it tasks", company.status)));
    }
    may_need(tx, company.company, &request.needs).await?;
    let human_in_loop = Policy::of(company.governance.as_ref(), &company.config).human_in_loop;
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
        status: if human_in_loop { "pending_approval" } else { "pending" },
        priority: &request.priority,
        metadata: &request.metadata,
        needs: &request.needs,
        by: request.by,
        call: request.call.as_deref(),
        parent: request.parent,
    };
    if let Some(agent) = agent {
        beats::lock(tx, company.company, agent).await?;
    }
    tasks::insert(tx, &new).await?;
    if human_in_loop {
        asks::ask(tx, company.company, task).await?;
    }
    let row = find(tx, company.company, task).await?;
    tell(tx, &row, TASK_CREATED, None).await?;
    wake(tx, &row).await?;
    Ok(row)
}

/// Tasks that another one needs must be there, and must not have failed.
async fn may_need(tx: &mut PgConnection, company: CompanyId, needs: &[TaskId]) -> Result<(), EngineError> {
    if needs.len() > NEEDS_MAX {
        return Err(EngineError::Conflict(format!("a task needs at most {NEEDS_MAX} others")));
    }
    for need in needs {
        let filter = TaskFilter { task: Some(*need), ..TaskFilter::default() };
        let row = tasks::list(tx, company, filter, 1).await?.pop();
        match row.map(|row| row.status).as_deref() {
            None => return Err(EngineError::Conflict(format!("there is no task {need} to be needed"))),
            Some(status @ ("failed" | "rejected" | "cancelled")) => {
                return Err(EngineError::Conflict(format!("the task {need} is {status}: nothing can wait for it")));
            }
            Some(_) => {}
        }
    }
    Ok(())
}

/// The agent of a task that may begin looks at it at once.
async fn wake(tx: &mut PgConnection, row: &TaskRow) -> Result<(), EngineError> {
    if let (Some(agent), "pending") = (row.agent_id, row.status.as_str()) {
        beats::wake(tx, CompanyId(row.company_id), AgentId(agent), "task", SOON).await?;
    }
    Ok(())
}

/// A task was begun by its agent.
pub(super) async fn begun(tx: &mut PgConnection, row: &TaskRow, run: RunId) -> Result<(), EngineError> {
    let data = json!({
        "task_id": row.task(), "agent_id": row.agent_id.map(AgentId), "title": row.title, "status": "in_progress",
        "run_id": run,
    });
    events::append(&mut *tx, CompanyId(row.company_id), &[Event::new(TASK_STARTED, data)]).await?;
    Ok(())
}

/// A task has ended, by its run: those who have waited for it go on, or end with it.
pub(super) async fn ended(tx: &mut PgConnection, row: &TaskRow) -> Result<(), EngineError> {
    let event = match row.status.as_str() {
        "completed" => TASK_COMPLETED,
        "cancelled" => TASK_CANCELLED,
        _ => TASK_FAILED,
    };
    tell(tx, row, event, None).await?;
    after(tx, row).await?;
    report(tx, row).await
}

/// When all is over that was made in the course of a directive, whoever took it reports on it.
async fn report(tx: &mut PgConnection, row: &TaskRow) -> Result<(), EngineError> {
    let company = CompanyId(row.company_id);
    let directive = match row.parent_id.map(TaskId) {
        Some(parent) => find(tx, company, parent).await?,
        None => row.clone(),
    };
    if directive.metadata["directive"] != true || directive.status != "completed" {
        return Ok(());
    }
    let children = tasks::children(tx, company, directive.task()).await?;
    if children.is_empty() || children.iter().any(|child| !is_over(&child.status)) {
        return Ok(());
    }
    let Some(agent) = directive.agent_id.map(AgentId) else { return Ok(()) };
    let key = format!("report:{}:{}", directive.task(), children.len());
    if tasks::by_call(tx, company, &key).await?.is_some() {
        return Ok(());
    }
    let short = |value: &Option<Value>| {
        value.as_ref().map(|value| value.to_string().chars().take(REPORTED_CHARS_MAX).collect::<String>())
    };
    let told: Vec<Value> = children
        .iter()
        .take(REPORTED_MAX)
        .map(|child| {
            json!({
                "id": child.task(), "title": child.title, "status": child.status, "result": short(&child.result),
                "error": short(&child.error), "cost": child.cost().to_usd(),
            })
        })
        .collect();
    let spent = tasks::cost_of_root(tx, company, directive.task()).await?;
    let metadata = json!({"report_of": directive.task(), "tasks": told, "spent": spent.to_usd()});
    let title: String = format!("Report: {}", directive.title).chars().take(500).collect();
    let report = TaskId::new();
    let new = NewTask {
        task: report,
        company,
        agent: Some(agent),
        title: &title,
        description: Some(
            "All tasks of your directive are over; how they ended stands in `metadata.tasks`. Report to whoever gave it: \
             what is done, what failed and why, and what a person has to decide.",
        ),
        status: "pending",
        priority: "high",
        metadata: &metadata,
        needs: &[],
        by: None,
        call: Some(&key),
        parent: None,
    };
    tasks::insert(tx, &new).await?;
    let row = find(tx, company, report).await?;
    tell(tx, &row, TASK_CREATED, None).await?;
    Ok(beats::wake(tx, company, agent, "report", Duration::ZERO).await?)
}

/// How many tasks a report is told of, and so much of what came of each.
const REPORTED_MAX: usize = 100;
const REPORTED_CHARS_MAX: usize = 400;

/// Those that need a task which is over look at their own again: they go on, or fail with
/// it.
async fn after(tx: &mut PgConnection, row: &TaskRow) -> Result<(), EngineError> {
    if is_over(&row.status) {
        let company = CompanyId(row.company_id);
        for agent in tasks::waiting_agents(tx, company, row.task()).await? {
            beats::wake(tx, company, agent, "task", Duration::ZERO).await?;
        }
    }
    Ok(())
}

/// The most tasks that one may need.
pub const NEEDS_MAX: usize = 20;

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
        "feedback": feedback, "cost": row.cost().to_usd(), "run_id": row.run(), "error": row.error,
    });
    events::append(&mut *tx, CompanyId(row.company_id), &[Event::new(event, data)]).await?;
    Ok(())
}

/// Decides about a task; the same again changes nothing.
pub async fn change(
    engine: &Engine,
    tx: &mut PgConnection,
    (company, task): (CompanyId, TaskId),
    change: Change,
    said: Said<'_>,
) -> Result<TaskRow, EngineError> {
    let (row, feedback) = (lock(tx, company, task).await?, said.words);
    if row.status == "pending_approval" && matches!(change, Change::Approve | Change::Reject) {
        asks::may_be_said(tx, &row, said).await?;
    }
    match change.decide(&row.status, row.approval.as_deref()) {
        Verdict::Stays => return Ok(row),
        Verdict::Refused => {
            let word = change.participle();
            return Err(EngineError::Conflict(format!("the task is {}; it cannot be {word}", row.status)));
        }
        Verdict::Becomes(next) => {
            tasks::set_status(tx, &row, next, feedback).await?;
            match (row.status.as_str(), next) {
                (_, "pending_approval") => asks::ask(tx, company, task).await?,
                ("pending_approval", _) => asks::decided(tx, &row, change, said).await?,
                _ => {}
            }
        }
    }
    if let (Change::Cancel, Some(run)) = (change, row.run()) {
        match cancel_run(engine, tx, company, run, "task").await {
            // It has ended by itself.
            Ok(()) | Err(EngineError::Conflict(_) | EngineError::NotFound(_)) => {}
            Err(error) => return Err(error),
        }
    }
    let row = find(tx, company, task).await?;
    tell(tx, &row, change.event(), feedback).await?;
    after(tx, &row).await?;
    wake(tx, &row).await?;
    Ok(row)
}

/// Locks a task, after the heartbeat of its agent.
pub(super) async fn lock(tx: &mut PgConnection, company: CompanyId, task: TaskId) -> Result<TaskRow, EngineError> {
    let row = find(tx, company, task).await?;
    if let Some(agent) = row.agent_id {
        beats::lock(tx, company, AgentId(agent)).await?;
    }
    tasks::lock(tx, company, task).await?.ok_or(EngineError::NotFound("task"))
}

/// Changes what a task is about, as long as it is not over.
pub async fn update(
    tx: &mut PgConnection,
    company: CompanyId,
    task: TaskId,
    changes: &TaskChanges<'_>,
) -> Result<TaskRow, EngineError> {
    let row = lock(tx, company, task).await?;
    if changes.agent.is_some_and(|agent| Some(agent.0) != row.agent_id) && row.status == "in_progress" {
        return Err(EngineError::Conflict("the task is in progress; cancel it to give it to another agent".into()));
    }
    if is_over(&row.status) {
        return Err(EngineError::Conflict(format!("the task is {}; it cannot be changed any more", row.status)));
    }
    tasks::update(tx, &row, changes).await?;
    let row = find(tx, company, task).await?;
    tell(tx, &row, TASK_UPDATED, None).await?;
    wake(tx, &row).await?;
    Ok(row)
}
