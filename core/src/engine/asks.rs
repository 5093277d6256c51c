//! A person's word about whole tasks: who is asked and until when, as the company's policy says,
//! what is decided where nobody answers, and what stands in the audit log of it.

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{Engine, EngineError, tasks};
use crate::domain::audit::Entry;
use crate::domain::digest::{hex, sha256};
use crate::domain::event::{APPROVAL_ESCALATED, APPROVAL_REMINDER, Event};
use crate::domain::governance::Policy;
use crate::domain::ids::{AgentId, CompanyId, TaskId};
use crate::domain::task::Change;
use crate::store::tasks::TaskRow;
use crate::store::{asks, audit, events, tenants};

/// The rule by which people are asked about tasks.
const RULE: &str = "governance.mode";

/// Exactly what is decided about a task.
pub fn context(row: &TaskRow) -> Value {
    json!({
        "title": row.title, "description": row.description, "priority": row.priority, "metadata": row.metadata,
        "agent_id": row.agent_id.map(AgentId), "needs": row.needs.iter().copied().map(TaskId).collect::<Vec<_>>(),
    })
}

/// SHA-256 of that.
pub fn digest(row: &TaskRow) -> [u8; 32] {
    sha256(context(row).to_string())
}

/// Asks about a task, as the policy says now.
pub(super) async fn ask(tx: &mut PgConnection, company: CompanyId, task: TaskId) -> Result<(), EngineError> {
    let row = tenants::company_by_id(tx, company).await?.ok_or(EngineError::NotFound("company"))?;
    let policy = Policy::of(row.governance.as_ref(), &row.config);
    Ok(asks::insert(tx, (company, task), &policy.approval(RULE), policy.escalates_after()).await?)
}

/// What somebody says about a task.
#[derive(Debug, Clone, Copy)]
pub struct Said<'a> {
    /// By which key; `system`, where nobody has.
    pub by: &'a str,
    /// In words.
    pub words: Option<&'a str>,
    /// The digest of what they have seen, where they say so.
    pub shown: Option<&'a str>,
}

/// Holds what a person says to what they have seen, and to its time. Under the task's lock.
pub(super) async fn may_be_said(tx: &mut PgConnection, row: &TaskRow, said: Said<'_>) -> Result<(), EngineError> {
    if said.shown.is_some_and(|shown| shown != hex(&digest(row))) {
        let message = "what would be done is not what `digest` stands for; look at it again";
        return Err(EngineError::Conflict(message.into()));
    }
    if said.by != "system" && asks::is_over(tx, CompanyId(row.company_id), row.task()).await? {
        return Err(EngineError::Conflict("the approval's time is over".into()));
    }
    Ok(())
}

/// Notes what was decided about a task that waited for it, and by whom.
pub(super) async fn decided(
    tx: &mut PgConnection,
    row: &TaskRow,
    change: Change,
    said: Said<'_>,
) -> Result<(), EngineError> {
    let Said { by, words, .. } = said;
    let company = CompanyId(row.company_id);
    asks::decided(tx, company, row.task(), by).await?;
    if !matches!(change, Change::Approve | Change::Reject) {
        return Ok(());
    }
    let told = json!({
        "task_id": row.task(), "title": row.title, "agent_id": row.agent_id.map(AgentId),
        "decision": change.participle(), "words": words, "digest": hex(&digest(row)),
    });
    audit::append(tx, company, &Entry::new("approval.resolved", by, told)).await?;
    Ok(())
}

/// Reminds people of tasks that wait for them, and decides about those of which nobody has in
/// time.
pub async fn look(engine: &Engine) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    for reminder in asks::take_reminders(&mut tx).await? {
        let told = json!({
            "approval_id": TaskId(reminder.task), "task_id": TaskId(reminder.task), "percent": reminder.percent,
            "expires_at": reminder.expires_at, "reviewers": reminder.reviewers,
        });
        let name = if reminder.escalated { APPROVAL_ESCALATED } else { APPROVAL_REMINDER };
        events::append(&mut *tx, reminder.company, &[Event::new(name, told)]).await?;
    }
    tx.commit().await?;
    for (company, task) in asks::expired(&engine.pool).await? {
        expire(engine, company, task).await?;
    }
    Ok(())
}

async fn expire(engine: &Engine, company: CompanyId, task: TaskId) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    // As whoever decides about it does: the task first.
    match tasks::lock(&mut tx, company, task).await {
        Ok(_) | Err(EngineError::NotFound(_)) => {}
        Err(error) => return Err(error),
    }
    let Some(what) = asks::lock_expired(&mut tx, company, task).await? else { return Ok(()) };
    let (change, words) = match what.as_str() {
        "escalate" => {
            asks::escalate(&mut tx, company, task).await?;
            let told = json!({"approval_id": task, "task_id": task});
            events::append(&mut *tx, company, &[Event::new(APPROVAL_ESCALATED, told)]).await?;
            return Ok(tx.commit().await?);
        }
        "approve" => (Change::Approve, "nobody decided in time; it is approved by the company's rule"),
        _ => (Change::Reject, "nobody decided in time"),
    };
    let said = Said { by: "system", words: Some(words), shown: None };
    match tasks::change(engine, &mut tx, (company, task), change, said).await {
        Ok(_) => {}
        // It is over for another reason: nobody needs to decide.
        Err(EngineError::Conflict(_) | EngineError::NotFound(_)) => {
            asks::decided(&mut tx, company, task, "system").await?;
        }
        Err(error) => return Err(error),
    }
    tx.commit().await?;
    engine.waker.wake();
    Ok(())
}
