//! A call of a tool by an agent, before it is made: whether the company allows it, whether a
//! person has to say so first, and what they have said. One transaction, under the lease of
//! the job, so that a word that was given a moment ago holds for the very next call.

use serde_json::{Value, json};
use sqlx::{Postgres, Transaction};

use super::spending::{self, HELD};
use super::{Engine, EngineError};
use crate::domain::audit::Entry;
use crate::domain::digest::sha256;
use crate::domain::governance::{Action, Policy, Verdict};
use crate::domain::ids::{CompanyId, RunId};
use crate::domain::plan::Gate;
use crate::store::journal::{self, Begun, End, Ended, Place, Work};
use crate::store::{acting, audit, jobs};

/// A call that is to be made.
#[derive(Debug, Clone)]
pub struct Call {
    /// Which.
    pub place: Place,
    /// The tool.
    pub tool: String,
    /// What it carries, the same whenever it is repeated.
    pub key: String,
    /// What a person is shown of it, besides the rule: playbook, step, role, tool and its
    /// arguments.
    pub context: Value,
    /// The host that it would reach, where it says so.
    pub host: Option<String>,
    /// Only these hosts, where the agent's owner has named them.
    pub hosts: Option<Vec<String>>,
}

/// Whether a call may be made.
#[derive(Debug, Clone)]
pub enum May {
    /// It may: it is noted.
    Go {
        /// The arguments that a person wants instead.
        edited: Option<Value>,
    },
    /// A person is asked first.
    Ask(Box<Gate>),
    /// It may not; in words for the model.
    Refused(String),
    /// Not before a while: its company is halted.
    Wait(std::time::Duration),
    /// Not before its agent goes on: the job waits for that, and is no longer the worker's.
    Held,
    /// The attempt is no longer this worker's.
    Lost,
}

/// Decides about a call, and notes it where it may be made.
pub async fn begin(engine: &Engine, work: &Work, call: &Call) -> Result<May, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some(facts) = acting::facts(&mut tx, work, &call.key).await? else { return Ok(May::Lost) };
    match spending::may_act(&facts.standing) {
        spending::Acts::Yes => {}
        spending::Acts::Halted => return Ok(May::Wait(std::time::Duration::ZERO)),
        spending::Acts::AgentHalted => {
            let held = jobs::hold(&mut tx, work.lease, (work.company, work.agent), HELD).await?;
            tx.commit().await?;
            return Ok(if held { May::Held } else { May::Wait(std::time::Duration::ZERO) });
        }
        spending::Acts::Never(status) => {
            return Ok(May::Refused(format!("you are {status}: nothing is done any more")));
        }
    }
    let policy = Policy::of(facts.governance.as_ref(), &facts.config);
    let verdict = decide(&policy, call);
    let edited = match verdict {
        Verdict::Allow => None,
        Verdict::Deny { rule } => {
            return Ok(May::Refused(deny(tx, work, call, &rule).await?));
        }
        Verdict::Ask { rule } => {
            let gate = gate(&policy, call, work.step, &rule);
            match facts.said.filter(|said| said.digest == gate.digest) {
                Some(said) if said.status == "approved" => said.edited,
                Some(said) if matches!(said.status.as_str(), "rejected" | "expired") => {
                    let words = said.note.map(|note| format!(": {note}")).unwrap_or_default();
                    return Ok(May::Refused(format!("a person was asked, and it was {}{words}", said.status)));
                }
                // Nobody was asked, or about something else.
                _ => return Ok(May::Ask(Box::new(gate))),
            }
        }
    };
    let begun = Begun::default();
    if journal::begin(&mut *tx, work, call.place, (&call.tool, &call.key), &begun).await?.is_none() {
        return Ok(May::Lost);
    }
    tx.commit().await?;
    Ok(May::Go { edited })
}

fn decide(policy: &Policy, call: &Call) -> Verdict {
    if let Some(host) = &call.host {
        if let Some(rule) = policy.forbids_host(host) {
            return Verdict::Deny { rule };
        }
        if call.hosts.as_ref().is_some_and(|hosts| !Policy::lists(hosts, host)) {
            return Verdict::Deny { rule: "the agent's config.allowed_hosts".to_owned() };
        }
    }
    policy.decide(&Action::of_tool(&call.tool))
}

/// How a person is asked about a call. What is shown is what is decided: its digest ties the
/// word to these arguments and no others.
fn gate(policy: &Policy, call: &Call, step: i32, rule: &str) -> Gate {
    let action = Action::of_tool(&call.tool);
    let mut context = call.context.clone();
    context["rule"] = rule.into();
    context["risk"] = action.risk().as_str().into();
    context["estimated_cost"] = (action.estimate.0 as f64 / crate::domain::budget::CREDIT as f64).into();
    let digest = sha256(context.to_string());
    Gate {
        step: usize::try_from(step).unwrap_or(usize::MAX),
        context,
        digest,
        approval: policy.approval(rule),
        call: Some(call.key.clone()),
    }
}

/// Why a call may not be made, whatever a person has said; noted in the audit log.
pub async fn forbids(engine: &Engine, work: &Work, call: &Call) -> Result<Option<String>, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some(facts) = acting::facts(&mut tx, work, &call.key).await? else {
        return Ok(Some("the attempt is no longer this worker's".to_owned()));
    };
    match decide(&Policy::of(facts.governance.as_ref(), &facts.config), call) {
        Verdict::Deny { rule } => Ok(Some(deny(tx, work, call, &rule).await?)),
        Verdict::Allow | Verdict::Ask { .. } => Ok(None),
    }
}

/// Notes that a call was denied; in words for the model.
async fn deny(mut tx: Transaction<'_, Postgres>, work: &Work, call: &Call, rule: &str) -> Result<String, EngineError> {
    let told = json!({"tool": call.tool, "rule": rule, "run_id": work.run, "params": call.context["params"]});
    audit::append(&mut tx, work.company, &Entry::new("call.denied", work.agent.to_string(), told)).await?;
    tx.commit().await?;
    Ok(format!("this is not allowed: {rule} forbids it"))
}

/// Notes that a rule has denied a tool to a step.
pub async fn denied(
    engine: &Engine,
    company: CompanyId,
    (run, step): (RunId, i32),
    (tool, rule): (&str, &str),
) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    let told = json!({"tool": tool, "rule": rule, "run_id": run, "step": step});
    audit::append(&mut tx, company, &Entry::new("call.denied", run.to_string(), told)).await?;
    tx.commit().await?;
    Ok(())
}

/// A call that was made.
#[derive(Debug, Clone)]
pub struct Made {
    /// The tool.
    pub tool: String,
    /// What it carried.
    pub key: String,
    /// SHA-256 of the arguments that were sent, in hexadecimal digits.
    pub sent: String,
    /// It has failed.
    pub failed: bool,
}

/// Writes down what came of a call; one that was made and has an effect stands in the audit log,
/// too.
pub async fn end(
    engine: &Engine,
    work: &Work,
    place: Place,
    end: &End,
    made: Option<&Made>,
) -> Result<Ended, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let ended = journal::end(&mut *tx, work, place, end).await?;
    if let Some(Made { tool, key, sent, failed }) = made.filter(|_| ended == Ended::Now)
        && Policy::has_effect(&Action::of_tool(tool))
    {
        let told = json!({
            "tool": tool, "run_id": work.run, "step": work.step, "call": key, "params_sha256": sent, "failed": failed,
        });
        audit::append(&mut tx, work.company, &Entry::new("call.made", work.agent.to_string(), told)).await?;
    }
    tx.commit().await?;
    Ok(ended)
}
