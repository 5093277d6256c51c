//! Companies and agents come to be.

use std::collections::HashMap;

use chrono::{DateTime, Utc};
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{Engine, EngineError, beats, repeating};
use crate::domain::event::{AGENT_STATE_CHANGED, COMPANY_CREATED, COMPANY_STATUS_CHANGED, Event};
use crate::domain::ids::{AccountId, CompanyId};
use crate::store::agents::{AgentRow, NewAgent};
use crate::store::jobs::{NewJob, kind, queue};
use crate::store::tenants::NewCompany;
use crate::store::{StoreError, agents, events, jobs, tenants};

/// A request to create a company.
#[derive(Debug, Clone)]
pub struct CreateCompany {
    /// Display name.
    pub name: String,
    /// What it does.
    pub description: Option<String>,
    /// As sent.
    pub config: Value,
    /// The policy as sent.
    pub governance: Option<Value>,
    /// The template it came from.
    pub template: Option<String>,
    /// At least one.
    pub agents: Vec<NewAgent>,
}

/// Creates a company with its agents, and the job that gets them ready, in
/// one transaction.
pub async fn create_company(
    engine: &Engine,
    account: AccountId,
    request: &CreateCompany,
) -> Result<(CompanyId, DateTime<Utc>), EngineError> {
    let created = repeating(|| create_once(engine, account, request)).await?;
    engine.waker.wake();
    Ok(created)
}

async fn create_once(
    engine: &Engine,
    account: AccountId,
    request: &CreateCompany,
) -> Result<(CompanyId, DateTime<Utc>), EngineError> {
    let mut tx = engine.pool.begin().await?;
    let created = create_company_in(&mut tx, account, request).await?;
    tx.commit().await?;
    Ok(created)
}

/// The same in the caller's transaction, who wakes workers after it.
pub async fn create_company_in(
    tx: &mut PgConnection,
    account: AccountId,
    request: &CreateCompany,
) -> Result<(CompanyId, DateTime<Utc>), EngineError> {
    let company = CompanyId::new();
    let created_at = tenants::insert_company(
        &mut *tx,
        &NewCompany {
            company,
            account,
            name: &request.name,
            description: request.description.as_deref(),
            config: &request.config,
            template: request.template.as_deref(),
            governance: request.governance.as_ref(),
        },
    )
    .await?;
    for agent in &request.agents {
        insert_agent(tx, company, agent).await?;
    }
    let created = Event::new(COMPANY_CREATED, json!({"company_id": company, "name": request.name}));
    events::append(&mut *tx, company, &[created]).await?;
    jobs::enqueue(&mut *tx, &provision_job(company)).await?;
    Ok((company, created_at))
}

/// Agents of a company that are not removed, at most: workers read all of them
/// with its first run.
pub const AGENTS_MAX: i64 = 100;

/// Adds an agent to a company, and the job that gets it ready, in the caller's
/// transaction, who wakes workers after it.
pub async fn add_agent(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: &NewAgent,
) -> Result<DateTime<Utc>, EngineError> {
    // Under the company's lock, so that two at once do not both fit.
    tenants::lock_company(tx, company).await?.ok_or(EngineError::NotFound("company"))?;
    if agents::live(tx, company).await? >= AGENTS_MAX {
        return Err(EngineError::Conflict(format!("the company has {AGENTS_MAX} agents already; remove one first")));
    }
    let created_at = insert_agent(tx, company, agent).await?;
    jobs::enqueue(&mut *tx, &provision_job(company)).await?;
    Ok(created_at)
}

async fn insert_agent(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: &NewAgent,
) -> Result<DateTime<Utc>, EngineError> {
    agents::insert_agent(tx, company, agent).await.map_err(|error| match error {
        StoreError::Conflict { constraint } if constraint == "agents_live_role" => EngineError::Conflict(format!(
            "the company has an agent with the role `{}` already; remove it first or use another role",
            agent.role
        )),
        other => other.into(),
    })
}

/// No unique key: an agent added while an earlier provisioning is already
/// looking must get a look of its own.
fn provision_job(company: CompanyId) -> NewJob {
    NewJob { ref_id: Some(company.0), ..NewJob::new(queue::SYSTEM, kind::PROVISION, company) }
}

/// Gets a company's new agents ready: `check` says of each why it cannot
/// work, or nothing. Repeating it changes nothing.
pub async fn provision(
    engine: &Engine,
    company: CompanyId,
    check: impl Fn(&AgentRow) -> Option<String>,
) -> Result<(), EngineError> {
    let agents = agents::agents_of(&engine.pool, &[company.0]).await?;
    let verdicts: HashMap<_, _> =
        agents.iter().filter(|agent| agent.status == "initializing").map(|agent| (agent.agent, check(agent))).collect();
    let mut tx = engine.pool.begin().await?;
    let mut happened = Vec::new();
    for (agent, error) in &verdicts {
        if agents::agent_initialized(&mut *tx, company, *agent, error.as_deref()).await? {
            beats::start(&mut tx, company, *agent).await?;
            let status = if error.is_none() { "active" } else { "errored" };
            happened.push(Event::new(
                AGENT_STATE_CHANGED,
                json!({"agent_id": agent, "from": "initializing", "to": status, "error": error}),
            ));
        }
    }
    if tenants::company_provisioned(&mut *tx, company).await? {
        happened.push(Event::new(
            COMPANY_STATUS_CHANGED,
            json!({"company_id": company, "from": "provisioning", "to": "running"}),
        ));
    }
    if !happened.is_empty() {
        events::append(&mut *tx, company, &happened).await?;
    }
    tx.commit().await?;
    Ok(())
}
