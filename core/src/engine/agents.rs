//! Agents are paused, go on, are removed and woken.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::json;
use sqlx::PgConnection;

use super::{Engine, EngineError};
use crate::domain::company::works;
use crate::domain::event::{AGENT_STATE_CHANGED, Event};
use crate::domain::heartbeat::SOON;
use crate::domain::ids::{AgentId, CompanyId};
use crate::store::agents::{self, AgentRow};
use crate::store::{beats, events, jobs, tasks};

/// What is asked of an agent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It begins nothing until it is resumed.
    Pause,
    /// The same, in the middle of what it does.
    Kill,
    /// It goes on.
    Resume,
    /// It is gone; what it did stays.
    Remove,
}

impl Change {
    fn target(self) -> &'static str {
        match self {
            Self::Pause | Self::Kill => "paused",
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
    beats::lock(tx, company, agent).await?;
    let (status, since) = agents::lock_agent(tx, company, agent).await?.ok_or(EngineError::NotFound("agent"))?;
    let target = change.target();
    if status == target && change != Change::Kill {
        return Ok(since);
    }
    if status == "removed" {
        return Err(EngineError::Conflict("the agent was removed; what it did can still be read".into()));
    }
    if status == "initializing" && change != Change::Remove {
        return Err(EngineError::Conflict("the agent is initializing; try again in a moment".into()));
    }
    let at = agents::set_agent_status(tx, company, agent, target, change == Change::Kill).await?;
    if target != "paused" {
        // What waited for it goes on, or is told that it is gone.
        jobs::unhold(tx, company, agent).await?;
    }
    match change {
        Change::Resume => beats::wake(tx, company, agent, "resumed", Duration::ZERO).await?,
        Change::Remove => {
            // Somebody else does what it has not begun.
            let other = tasks::least_busy_agent(tx, company).await?;
            if tasks::hand_over(tx, company, agent, other).await?
                && let Some(other) = other
            {
                beats::wake(tx, company, other, "task", SOON).await?;
            }
        }
        Change::Pause | Change::Kill => {}
    }
    let happened = Event::new(
        AGENT_STATE_CHANGED,
        json!({"agent_id": agent, "from": status, "to": target, "error": null, "killed": change == Change::Kill}),
    );
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
    // One that gets ready has no heartbeat yet.
    beats::begin(tx, agent.company, agent.agent, None, Duration::ZERO).await?;
    beats::wake(tx, agent.company, agent.agent, "woken", Duration::ZERO).await?;
    Ok(beats::begins(tx, agent.company, agent.agent).await?)
}

/// Stops an agent that goes round in circles, with the evidence.
pub async fn break_off(engine: &Engine, company: CompanyId, agent: AgentId, why: &str) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    if agents::break_off(&mut tx, company, agent, why).await? {
        let told = json!({
            "agent_id": agent, "from": "active", "to": "paused", "error": null, "reason": why, "evidence": {"call": why},
        });
        events::append(&mut *tx, company, &[Event::new(AGENT_STATE_CHANGED, told)]).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// An agent cannot work before somebody mends something: its endpoint lets it in no more, say. It
/// says so, and begins nothing until it is resumed.
pub async fn fail(engine: &Engine, company: CompanyId, agent: AgentId, why: &str) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    if agents::fail(&mut tx, company, agent, why).await? {
        let told = json!({"agent_id": agent, "from": "active", "to": "errored", "error": why});
        events::append(&mut *tx, company, &[Event::new(AGENT_STATE_CHANGED, told)]).await?;
    }
    tx.commit().await?;
    Ok(())
}

/// The period may be over in which an agent's money was used up; how long it is until then, where
/// it is not.
pub async fn period_over(engine: &Engine, company: CompanyId, agent: AgentId) -> Result<Option<Duration>, EngineError> {
    let mut tx = engine.pool.begin().await?;
    reconsider(&mut tx, company, Some(agent), true).await?;
    let left = agents::paused_for_ms(&mut tx, company, agent).await?;
    tx.commit().await?;
    engine.waker.wake();
    Ok(left.map(|ms| Duration::from_millis(ms.unsigned_abs())))
}

/// Whoever's period is over goes on, whatever has become of the job that was to see to it.
pub async fn periods_over(engine: &Engine) -> Result<(), EngineError> {
    for (company, agent) in agents::overdue(&engine.pool).await? {
        period_over(engine, company, agent).await?;
    }
    Ok(())
}
