//! Calls that cost money: reserved before they are made, settled after. One transaction
//! each, which decides under the locks of all that counts what is spent.
//!
//! Locks go job, budgets (company, agent, playbook, run, step), agent, run.

use std::time::Duration;

use chrono::{DateTime, NaiveDate};
use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{Engine, EngineError};
use crate::domain::budget::{self, Account, Admission, Balance, Cap, Estimate, Said, Scope, Spender, ends_us, passed};
use crate::domain::company::works;
use crate::domain::event::{AGENT_STATE_CHANGED, COSTS_THRESHOLD_REACHED, Event};
use crate::domain::governance::{Action, Policy};
use crate::domain::ids::{AgentId, CompanyId};
use crate::domain::money::Nanos;
use crate::domain::outcome::{ErrorClass, Failure};
use crate::store::budgets::{Change, Facts};
use crate::store::jobs::{NewJob, kind, queue};
use crate::store::journal::{Begun, End, Ended, Place, Work};
use crate::store::provider_gates::{self, Enter};
use crate::store::{agents, budgets, events, jobs, journal};

/// A job whose agent is paused is looked at again after this, should nobody wake it.
pub const HELD: Duration = Duration::from_secs(60);
/// Until a call that finds the money reserved by others is tried again.
pub const BUSY: Duration = Duration::from_secs(1);

/// What a call of a model costs, as far as that is known before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Price {
    /// Not more than this.
    AtMost(Nanos),
    /// Its endpoint says it afterwards.
    Afterwards,
}

/// A turn of a model that is to be asked for.
#[derive(Debug, Clone)]
pub struct Turn {
    /// Which.
    pub place: Place,
    /// Which model.
    pub model: String,
    /// What it carries, the same whenever it is repeated.
    pub key: String,
    /// The work is begun anew with it.
    pub fresh: bool,
    /// What it costs.
    pub price: Price,
    /// Whose refusals hold for everybody, where there is such a gate.
    pub gate: Option<String>,
    /// Another model may be asked, where there is no money for this one.
    pub has_cheaper: bool,
    /// The other side knows by the key that it is the same.
    pub keyed: bool,
    /// What one run of the playbook may cost,
    pub run_cap: Option<Nanos>,
    /// and this step of it.
    pub step_cap: Option<Nanos>,
    /// What all its runs may cost in a month.
    pub playbook_cap: Option<Nanos>,
}

/// Whether a turn may be asked for.
#[derive(Debug, Clone)]
pub enum Asked {
    /// It may.
    Go,
    /// Not before a while: others may need the money, or its agent or company is paused.
    Wait(Duration),
    /// Its provider takes nothing for so long.
    Closed(Duration),
    /// There is no money for this model.
    TooDear,
    /// It may not.
    Refused(Failure),
    /// The attempt is no longer this worker's.
    Lost,
}

/// Whether an agent may do anything now.
pub(super) enum Acts<'a> {
    /// It may.
    Yes,
    /// Its company is paused or stopped.
    CompanyHalted,
    /// It was stopped at once, or its money is used up.
    AgentHalted,
    /// It never will.
    Never(&'a str),
}

/// An agent that a person has paused ends what it is at; one that was stopped for a reason, or
/// killed, does not.
pub(super) fn may_act<'a>(company_status: &str, agent_status: &'a str, stopped: bool) -> Acts<'a> {
    match agent_status {
        _ if !works(company_status) => Acts::CompanyHalted,
        "paused" if stopped => Acts::AgentHalted,
        status @ ("removed" | "errored") => Acts::Never(status),
        _ => Acts::Yes,
    }
}

/// Who spends, by the facts.
fn spender(work: &Work, facts: &Facts, (day, month): (NaiveDate, NaiveDate)) -> Spender {
    Spender {
        company: work.company.0,
        agent: Some(work.agent.0),
        directive: facts.directive.map(|(root, _)| root),
        playbook: facts.playbook.0,
        run: work.run.0,
        step: work.step,
        day,
        month,
    }
}

fn zone(facts: &Facts) -> Option<&str> {
    facts.config.get("timezone").and_then(Value::as_str)
}

fn said<'a>(facts: &'a Facts, turn: &Turn) -> Said<'a> {
    Said {
        config: Some(&facts.config),
        governance: facts.governance.as_ref(),
        agent_budget: facts.agent_budget,
        agent_config: Some(&facts.agent_config),
        directive: facts.directive.and_then(|(_, budget)| budget).map(budget::credits),
        playbook_month: turn.playbook_cap,
        run: turn.run_cap,
        step: turn.step_cap,
    }
}

fn changes(accounts: &[Account], spent: i64, reserved: i64) -> Vec<Change> {
    accounts.iter().map(|account| Change { account: *account, spent, reserved }).collect()
}

/// What a call is taken to cost: what its owner says, the dearest so far, or a guess.
fn estimate(price: Price, facts: &Facts) -> Estimate {
    let named = || facts.agent_config.get("max_cost").and_then(Value::as_f64).and_then(Nanos::from_usd);
    match price {
        Price::AtMost(most) => Estimate::AtMost(most),
        Price::Afterwards => match named().or(facts.dearest) {
            Some(most) => Estimate::AtMost(most),
            None => Estimate::Guess(budget::CALL_GUESS),
        },
    }
}

/// Reserves what a turn may cost, and notes that it is to be asked for.
pub async fn begin(engine: &Engine, work: &Work, turn: &Turn) -> Result<Asked, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some(facts) = budgets::facts(&mut tx, work, turn.place).await? else { return Ok(Asked::Lost) };
    match may_act(&facts.company_status, &facts.agent_status, facts.stopped) {
        Acts::Yes => {}
        // Its job is parked when it is claimed again.
        Acts::CompanyHalted => return Ok(Asked::Wait(Duration::ZERO)),
        Acts::AgentHalted => {
            jobs::hold(&mut tx, work.lease, work.agent).await?;
            tx.commit().await?;
            return Ok(Asked::Wait(HELD));
        }
        Acts::Never(status) => {
            return Ok(Asked::Refused(Failure::invalid(format!("the agent of the step is {status}"))));
        }
    }
    if let Some(gate) = &turn.gate
        && let Enter::Closed(wait) = provider_gates::enter(&mut tx, gate).await?
    {
        return Ok(Asked::Closed(wait));
    }
    let policy = Policy::of(facts.governance.as_ref(), &facts.config);
    if let Some(rule) = policy.forbids(&Action::of_tool("llm.prompt")) {
        return Ok(Asked::Refused(Failure::new(ErrorClass::Governance, format!("{rule} forbids to ask a model"))));
    }
    let (day, month) = budget::days(facts.now_us, zone(&facts));
    let spender = spender(work, &facts, (day, month));
    let accounts = spender.accounts();
    let caps = said(&facts, turn).caps(&spender);
    // What is known to be over, or to be the same call once more, is free again.
    let (mut kept, mut freed) = (Nanos::ZERO, None);
    if let Some(before) = facts.before.filter(|before| before.reserved > Nanos::ZERO) {
        match turn.keyed || before.unheard {
            true => freed = Some(before),
            false => kept = before.reserved,
        }
    }
    if let Some(before) = freed {
        let of_then = Spender { day: before.day, month: before.month, ..spender };
        budgets::apply(&mut tx, work.company, &changes(&of_then.accounts(), 0, -before.reserved.0)).await?;
    }
    let estimate = estimate(turn.price, &facts);
    let balances = match estimate {
        // Nothing is counted of what costs nothing.
        Estimate::AtMost(Nanos::ZERO) => Vec::new(),
        _ => budgets::apply(&mut tx, work.company, &changes(&accounts, 0, 0)).await?,
    };
    let reserved = match budget::admit(&caps, &balances, estimate) {
        Admission::Admitted(reserved) => reserved,
        Admission::Busy(_) if budgets::others_under_way(&mut tx, work).await? => return Ok(Asked::Wait(BUSY)),
        Admission::Busy(_) | Admission::Capped(_) if turn.has_cheaper => return Ok(Asked::TooDear),
        Admission::Busy(cap) | Admission::Capped(cap) if cap.account.scope > Scope::Agent => {
            return Ok(Asked::Refused(used_up(&cap)));
        }
        // What calls hold that nobody will hear of is as good as spent, until a person looks.
        Admission::Busy(cap) | Admission::Capped(cap) => {
            pause(&mut tx, work, &facts, &cap).await?;
            jobs::hold(&mut tx, work.lease, work.agent).await?;
            tx.commit().await?;
            return Ok(Asked::Wait(HELD));
        }
    };
    if reserved > Nanos::ZERO {
        budgets::apply(&mut tx, work.company, &changes(&accounts, 0, reserved.0)).await?;
    }
    let begun = Begun { fresh: turn.fresh, reserved, kept, day: Some(day), month: Some(month) };
    let noted = journal::begin(&mut *tx, work, turn.place, (&turn.model, &turn.key), &begun).await?;
    if noted.is_none() {
        return Ok(Asked::Lost);
    }
    tx.commit().await?;
    Ok(Asked::Go)
}

fn used_up(cap: &Cap) -> Failure {
    let limit = cap.limit.to_usd();
    Failure::new(
        ErrorClass::Governance,
        format!("{} of {limit} USD leaves no room for another call; raise it and retry the run", cap.rule),
    )
}

/// The agent is paused until its money's next period, or until somebody raises the cap.
async fn pause(tx: &mut PgConnection, work: &Work, facts: &Facts, cap: &Cap) -> Result<(), EngineError> {
    let until = ends_us(cap.account.period, cap.account.starts, zone(facts)).and_then(DateTime::from_timestamp_micros);
    let reason = format!("{} of {} USD is used up", cap.rule, cap.limit.to_usd());
    if !agents::pause_for_money(tx, work.company, work.agent, &reason, until).await? {
        return Ok(());
    }
    let told = Event::new(
        AGENT_STATE_CHANGED,
        json!({"agent_id": work.agent, "from": "active", "to": "paused", "error": null, "reason": reason, "until": until}),
    );
    events::append(&mut *tx, work.company, &[told]).await?;
    if let Some(until) = until {
        let delay = u64::try_from(until.timestamp_micros() - facts.now_us).unwrap_or(0);
        let resume = NewJob {
            ref_id: Some(work.agent.0),
            // Not before it, by what a queue rounds off.
            delay: Duration::from_micros(delay) + Duration::from_millis(1),
            // A day and a month that begin together end apart: one job for each end.
            unique_key: Some(format!("resume:{}:{}", work.agent, until.timestamp_micros())),
            ..NewJob::new(queue::SYSTEM, kind::RESUME, work.company)
        };
        jobs::enqueue(&mut *tx, &resume).await?;
    }
    Ok(())
}

/// The agent of a job is paused: whoever lets it go on makes the job due.
pub async fn hold(engine: &Engine, work: &Work) -> Result<(), EngineError> {
    let mut tx = engine.pool.begin().await?;
    jobs::hold(&mut tx, work.lease, work.agent).await?;
    tx.commit().await?;
    Ok(())
}

/// What a turn has come to.
#[derive(Debug, Clone)]
pub enum Came {
    /// The model has answered, and this is what it cost.
    Answer {
        /// Its answer, as it is stored.
        response: Value,
        /// What it cost.
        cost: Nanos,
    },
    /// It has not; it may be asked again.
    Trouble {
        /// Why.
        failure: Failure,
        /// It may cost something all the same.
        maybe_paid: bool,
        /// Its provider takes nothing for so long, from anybody.
        closed_for: Option<Duration>,
    },
}

/// Settles a turn: writes down what came of it, books what it cost, frees what was reserved,
/// and tells of the thresholds that it passed. False when the attempt is no longer this
/// worker's.
pub async fn end(engine: &Engine, work: &Work, turn: &Turn, came: &Came) -> Result<bool, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some(facts) = budgets::facts(&mut tx, work, turn.place).await? else { return Ok(false) };
    let Some(before) = facts.before else { return Ok(false) };
    let spender = spender(work, &facts, (before.day, before.month));
    let (cost, frees) = match came {
        Came::Answer { cost, .. } => (*cost, true),
        Came::Trouble { maybe_paid, .. } => (Nanos::ZERO, !maybe_paid),
    };
    let freed = if frees { before.reserved.0 } else { 0 };
    let mut balances = Vec::new();
    if freed != 0 || cost > Nanos::ZERO {
        balances = budgets::apply(&mut tx, work.company, &changes(&spender.accounts(), cost.0, -freed)).await?;
    }
    if let Some(gate) = &turn.gate {
        match came {
            Came::Answer { .. } => provider_gates::open(&mut tx, gate).await?,
            Came::Trouble { closed_for: Some(closed), failure, .. } => {
                provider_gates::close(&mut tx, gate, *closed, &failure.message).await?;
            }
            Came::Trouble { .. } => {}
        }
    }
    let end = match came {
        Came::Answer { response, cost } => {
            End { done: true, response: response.clone(), cost: *cost, model: Some(turn.model.clone()), frees }
        }
        Came::Trouble { failure, .. } => {
            End { done: false, response: json!(failure), cost: Nanos::ZERO, model: None, frees }
        }
    };
    match journal::end(&mut *tx, work, turn.place, &end).await? {
        Ended::Now => {}
        Ended::Before => return Ok(true),
        Ended::Lost => return Ok(false),
    }
    if cost > Nanos::ZERO {
        if turn.price == Price::Afterwards && facts.dearest.is_none_or(|dearest| cost > dearest) {
            agents::dearest(&mut tx, work.company, work.agent, cost).await?;
        }
        tell(&mut tx, work, &facts, &said(&facts, turn).caps(&spender), &balances).await?;
    } else if turn.price == Price::Afterwards && facts.dearest.is_none() && matches!(came, Came::Answer { .. }) {
        agents::dearest(&mut tx, work.company, work.agent, cost).await?;
    }
    tx.commit().await?;
    Ok(true)
}

/// Tells of thresholds, each once a period, and pauses the agent where nothing is left.
async fn tell(
    tx: &mut PgConnection,
    work: &Work,
    facts: &Facts,
    caps: &[Cap],
    balances: &[Balance],
) -> Result<(), EngineError> {
    let mut spent_up = None;
    for cap in caps {
        let Some(balance) = balances.iter().find(|balance| balance.account == cap.account) else { continue };
        let percents: Vec<i16> = passed(cap, balance.spent, balance.told).collect();
        let told: Vec<Event> = percents.iter().map(|percent| threshold(work.company, cap, balance, *percent)).collect();
        if let Some(highest) = percents.last() {
            events::append(&mut *tx, work.company, &told).await?;
            budgets::told(tx, work.company, &cap.account, *highest).await?;
        }
        if cap.account.scope <= Scope::Agent && balance.spent >= cap.limit {
            spent_up = spent_up.or(Some(cap));
        }
    }
    match spent_up {
        Some(cap) => pause(tx, work, facts, cap).await,
        None => Ok(()),
    }
}

fn threshold(company: CompanyId, cap: &Cap, balance: &Balance, percent: i16) -> Event {
    let account = &cap.account;
    let agent = (account.scope == Scope::Agent).then_some(AgentId(account.id));
    Event::new(
        COSTS_THRESHOLD_REACHED,
        json!({
            "company_id": company, "agent_id": agent, "scope": account.scope.as_str(),
            "period": account.period.as_str(), "period_start": account.starts, "percent": percent,
            "spent": balance.spent.to_usd(), "limit": cap.limit.to_usd(), "rule": cap.rule,
        }),
    )
}
