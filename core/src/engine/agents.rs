//! Agents are paused, go on, are removed and woken.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::PgConnection;

use super::{Engine, EngineError};
use crate::domain::company::works;
use crate::domain::event::{AGENT_STATE_CHANGED, Event, HEARTBEAT_FIRED};
use crate::domain::ids::{AgentId, CompanyId};
use crate::store::agents::{self, AgentRow};
use crate::store::jobs::{ClaimedJob, NewJob, Settle, kind, queue};
use crate::store::{events, jobs};

/// What is asked of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It begins nothing until it is resumed.
    Pause,
    /// It goes on.
    Resume,
    /// It is gone; what it did stays.
    Remove,
}

impl Change {
    fn target(self) -> &'static str {
        match self {
            Self::Pause => "paused",
            Self::Resume => "active",
            Self::Remove => "removed",
        }
    }
}

/// Changes an agent's status; says since when it has it. The same again changes
/// nothing.
pub async fn change(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    change: Change,
) -> Result<DateTime<Utc>, EngineError> {
    let (status, since) = agents::lock_agent(tx, company, agent).await?.ok_or(EngineError::NotFound("agent"))?;
    let target = change.target();
    if status == target {
        return Ok(since);
    }
    if status == "removed" {
        return Err(EngineError::Conflict("the agent was removed; what it did can still be read".into()));
    }
    if status == "initializing" && change != Change::Remove {
        return Err(EngineError::Conflict("the agent is initializing; try again in a moment".into()));
    }
    let at = agents::set_agent_status(tx, company, agent, target).await?;
    if target != "paused" {
        // What waited for it goes on, or is told that it is gone.
        jobs::unhold(tx, company, agent).await?;
    }
    let happened =
        Event::new(AGENT_STATE_CHANGED, json!({"agent_id": agent, "from": status, "to": target, "error": null}));
    events::append(&mut *tx, company, &[happened]).await?;
    Ok(at)
}

/// Agents whose money was used up go on, since somebody has changed what they may spend, or a
/// new period has begun: one, or all of a company. Where there still is none they are paused
/// again at their next call.
pub async fn reconsider(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: Option<AgentId>,
    only_due: bool,
) -> Result<(), EngineError> {
    for agent in agents::resume_for_money(tx, company, agent, only_due).await? {
        jobs::unhold(tx, company, agent).await?;
        let happened = Event::new(
            AGENT_STATE_CHANGED,
            json!({"agent_id": agent, "from": "paused", "to": "active", "error": null}),
        );
        events::append(&mut *tx, company, &[happened]).await?;
    }
    Ok(())
}

/// Lets an agent beat at once; says when that beat was asked for. While one is
/// due or under way, nothing is added.
pub async fn wake(tx: &mut PgConnection, company_status: &str, agent: &AgentRow) -> Result<DateTime<Utc>, EngineError> {
    if !works(company_status) {
        return Err(EngineError::Conflict(format!("the company is {company_status}; resume it to wake its agents")));
    }
    // One that initializes beats as soon as it is ready.
    if !["active", "initializing"].contains(&agent.status.as_str()) {
        return Err(EngineError::Conflict(match agent.status.as_str() {
            "errored" => format!(
                "the agent is errored ({}); mend that and resume it",
                agent.error.as_deref().unwrap_or("no reason")
            ),
            status => format!("the agent is {status}; resume it first"),
        }));
    }
    let beat = NewJob {
        ref_id: Some(agent.agent.0),
        unique_key: Some(format!("heartbeat:{}", agent.agent)),
        ..NewJob::new(queue::STEPS, kind::HEARTBEAT, agent.company)
    };
    jobs::enqueue(&mut *tx, &beat).await?;
    Ok(jobs::live_since(tx, agent.company, &format!("heartbeat:{}", agent.agent)).await?)
}

/// The period is over in which an agent's money was used up.
pub async fn period_over(engine: &Engine, company: CompanyId, agent: AgentId) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    reconsider(&mut tx, company, Some(agent), true).await?;
    tx.commit().await?;
    engine.waker.wake();
    Ok(())
}

/// Until an agent that was woken before it was ready is looked at again.
const NOT_READY: Duration = Duration::from_secs(1);

/// A beat, and the end of its job, in one transaction. An agent that is getting
/// ready beats later; one that is not active, or whose company is halted, does
/// not beat.
pub async fn beat(engine: &Engine, job: &ClaimedJob, agent: AgentId) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    let again_after = agents::gets_ready(&mut tx, job.company, agent).await?.then_some(NOT_READY);
    let done = Settle { lease: job.lease, again_after, charged: again_after.is_none() };
    if jobs::settle(&mut *tx, &[done]).await?.is_empty() {
        // The lease is gone: whoever has the job now beats.
        return Ok(());
    }
    if again_after.is_none() && agents::beat(&mut tx, job.company, agent).await? {
        let fired = Event::new(HEARTBEAT_FIRED, json!({"agent_id": agent, "actions": 0, "items": 0, "cost": 0.0}));
        events::append(&mut *tx, job.company, &[fired]).await?;
    }
    tx.commit().await?;
    Ok(())
}
