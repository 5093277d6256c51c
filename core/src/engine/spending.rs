//! Calls that cost money: reserved before they are made, settled after. One transaction
//! each, which decides under the locks of all that counts what is spent.
//!
//! Locks go job, provider's gate, budgets (company, agent, directive, playbook, run, step), the
//! call, agent, run.

use std::time::Duration;

use chrono::{DateTime, NaiveDate};
use serde_json::{Value, json};
use sqlx::{PgConnection, Postgres, Transaction};
use uuid::Uuid;

use super::{Engine, EngineError};
use crate::domain::budget::{self, Account, Admission, Balance, Cap, Estimate, Said, Scope, Spender, ends_us, passed};
use crate::domain::company::works;
use crate::domain::event::{AGENT_STATE_CHANGED, COSTS_THRESHOLD_REACHED, Event};
use crate::domain::governance::{Action, Policy};
use crate::domain::ids::{AgentId, CompanyId};
use crate::domain::money::Nanos;
use crate::domain::outcome::{ErrorClass, Failure};
use crate::failpoint;
use crate::store::acting::Standing;
use crate::store::budgets::{Change, Facts};
use crate::store::jobs::{NewJob, kind, queue};
use crate::store::journal::{Begun, Booking, End, Ended, Place, Work};
use crate::store::provider_gates::{self, Enter};
use crate::store::{agents, beats, budgets, events, jobs, journal};

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
    /// Who is asked, where they know by the key that it is the same.
    pub payer: Option<String>,
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
    /// Not before a while: others may need the money, or its company is paused.
    Wait(Duration),
    /// Not before its agent goes on: the job waits for that, and is no longer the worker's.
    Held,
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
    /// Its company is paused or stopped, or the playbook was stopped at once.
    Halted,
    /// It was stopped at once, or its money is used up.
    AgentHalted,
    /// It never will.
    Never(&'a str),
}

/// An agent that a person has paused ends what it is at; one that was stopped for a reason, or
/// killed, does not.
pub(super) fn may_act(standing: &Standing) -> Acts<'_> {
    match standing.agent_status.as_str() {
        _ if standing.killed || !works(&standing.company_status) => Acts::Halted,
        "paused" if standing.stopped => Acts::AgentHalted,
        status @ ("removed" | "errored") => Acts::Never(status),
        _ => Acts::Yes,
    }
}

/// Who spends, by the facts.
fn spender(work: &Work, facts: &Facts, (day, month): (NaiveDate, NaiveDate), directive: Option<Uuid>) -> Spender {
    Spender {
        company: work.company.0,
        agent: Some(work.agent.0),
        directive,
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
        directive: facts.directive.map(|(_, budget)| budget::credits(budget)),
        playbook_month: turn.playbook_cap,
        run: turn.run_cap,
        step: turn.step_cap,
    }
}

fn changes(accounts: &[Account], spent: i64, reserved: i64) -> Vec<Change> {
    accounts.iter().map(|account| Change { account: *account, spent, reserved }).collect()
}

/// The most that a call may cost by the word of the agent's owner.
fn max_cost(facts: &Facts) -> Option<Nanos> {
    facts.agent_config.get("max_cost").and_then(Value::as_f64).and_then(Nanos::from_usd)
}

/// What a call is taken to cost: what its owner says, the dearest so far, or a guess. That one
/// has cost nothing says nothing about the next.
fn estimate(price: Price, facts: &Facts, dearest: Option<Nanos>) -> Estimate {
    match price {
        Price::AtMost(most) => Estimate::AtMost(most),
        Price::Afterwards => match (max_cost(facts), dearest) {
            (Some(named), dearest) => Estimate::AtMost(named.max(dearest.unwrap_or(Nanos::ZERO))),
            (None, Some(dearest)) if dearest > Nanos::ZERO => Estimate::AtMost(dearest),
            (None, _) => Estimate::Guess(budget::CALL_GUESS),
        },
    }
}

/// What is settled of a call that was begun before.
#[derive(Debug, Clone, Copy, Default)]
struct Settled {
    /// Booked just now; less than nothing takes it back.
    booked: Nanos,
    /// What stays booked and may be taken back.
    kept: Nanos,
}

/// Settles what a call holds that was begun before: free again where it is the very same call,
/// and booked at its worst where nobody will ever hear of it. What was booked so is taken back
/// where the same is asked under the same key: they count it once.
async fn settle(tx: &mut PgConnection, work: &Work, turn: &Turn, facts: &Facts) -> Result<Settled, EngineError> {
    let Some(before) = &facts.before else { return Ok(Settled::default()) };
    let call = before.call;
    let same_payer = before.payer == turn.payer;
    let settled = match () {
        () if same_payer && turn.payer.is_some() => Settled { booked: Nanos(-call.kept.0), kept: Nanos::ZERO },
        () if same_payer && before.unheard.as_ref() == Some(&turn.model) => {
            Settled { booked: Nanos::ZERO, kept: call.kept }
        }
        () => Settled { booked: call.reserved, kept: Nanos::ZERO },
    };
    if call.reserved > Nanos::ZERO || settled.booked.0 != 0 {
        let of_then = spender(work, facts, (before.day, before.month), before.directive);
        let changes = changes(&of_then.accounts(), settled.booked.0, -call.reserved.0);
        budgets::apply(tx, work.company, &changes).await?;
    }
    Ok(settled)
}

fn booking(work: &Work, model: &str, cost: Nanos, unheard: bool) -> Booking {
    Booking {
        company: work.company,
        run: work.run,
        step: work.step,
        agent: Some(work.agent),
        category: work.category.to_owned(),
        cost,
        model: Some(model.to_owned()),
        unheard,
        by: (work.lease.job, work.lease.epoch, work.attempt),
    }
}

/// Reserves what a turn may cost, and notes that it is to be asked for.
pub async fn begin(engine: &Engine, work: &Work, turn: &Turn) -> Result<Asked, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some(facts) = budgets::facts(&mut tx, work, turn.place).await? else { return Ok(Asked::Lost) };
    match may_act(&facts.standing) {
        Acts::Yes => {}
        // Its job is parked when it is claimed again.
        Acts::Halted => return Ok(Asked::Wait(Duration::ZERO)),
        Acts::AgentHalted => {
            return held(tx, work).await;
        }
        Acts::Never(status) => {
            return Ok(Asked::Refused(Failure::invalid(format!("the agent of the step is {status}"))));
        }
    }
    if let Some(before) = facts.before.as_ref().filter(|_| waits_for_person(&facts.agent_config, turn)) {
        if before.is_left {
            return Ok(Asked::Refused(left_to_person(&turn.model)));
        }
        if before.is_open {
            return leave_to_person(tx, work, turn, &facts).await;
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
    // A beat was let in when it began.
    if let Some(limit) = policy.agents_at_once.filter(|_| !facts.is_beat)
        && beats::others_at_work(&mut tx, work.company, work.agent).await? >= limit
    {
        return Ok(Asked::Wait(BUSY));
    }
    let (day, month) = budget::days(facts.now_us, zone(&facts));
    let directive = facts.directive.map(|(root, _)| root);
    let spender = spender(work, &facts, (day, month), directive);
    let accounts = spender.accounts();
    let settled = settle(&mut tx, work, turn, &facts).await?;
    let reserved = match admit(&mut tx, work, turn, &facts, &spender).await? {
        Admission::Admitted(reserved) => reserved,
        // What holds the money ends, and is booked at its worst where nobody hears of it.
        Admission::Busy(_) if !turn.has_cheaper => return Ok(Asked::Wait(BUSY)),
        Admission::Busy(_) | Admission::Capped(_) if turn.has_cheaper => return Ok(Asked::TooDear),
        Admission::Busy(cap) | Admission::Capped(cap) if cap.account.scope > Scope::Agent => {
            return Ok(Asked::Refused(used_up(&cap)));
        }
        Admission::Busy(cap) | Admission::Capped(cap) => {
            // Nothing of this holds: the call is not begun.
            tx.rollback().await?;
            return without_money(engine, work, turn, &cap).await;
        }
    };
    if reserved > Nanos::ZERO {
        budgets::apply(&mut tx, work.company, &changes(&accounts, 0, reserved.0)).await?;
    }
    let begun = Begun {
        fresh: turn.fresh,
        reserved,
        booked: settled.booked,
        kept: settled.kept,
        payer: turn.payer.clone(),
        before: facts.before.as_ref().map(|before| before.call),
        day: Some(day),
        month: Some(month),
        directive,
    };
    let noted = journal::begin(&mut *tx, work, turn.place, (&turn.model, &turn.key), &begun).await?;
    if noted.is_none() {
        return Ok(Asked::Lost);
    }
    if settled.booked.0 != 0 {
        journal::book(&mut *tx, &booking(work, &turn.model, settled.booked, true)).await?;
    }
    tx.commit().await?;
    Ok(Asked::Go)
}

/// Whether a person is to look before a model is asked again whose answer nobody has heard, and who
/// does not know the call by its key: the agent's owner would rather wait than pay twice.
pub fn waits_for_person(agent_config: &Value, turn: &Turn) -> bool {
    agent_config["on_unknown"] == "review" && turn.payer.is_none() && turn.price != Price::AtMost(Nanos::ZERO)
}

/// What the step fails with then.
pub fn left_to_person(model: &str) -> Failure {
    Failure::invalid(format!(
        "`{model}` was asked, and nobody knows what it said or cost; `config.on_unknown` leaves that to you: retry the run to ask it again"
    ))
}

/// Books the turn at its worst and leaves it to a person, who lets it be asked again by retrying the
/// run.
async fn leave_to_person(
    mut tx: Transaction<'_, Postgres>,
    work: &Work,
    turn: &Turn,
    facts: &Facts,
) -> Result<Asked, EngineError> {
    let settled = settle(&mut tx, work, turn, facts).await?;
    let before = facts.before.as_ref();
    let begun = Begun {
        fresh: turn.fresh,
        booked: settled.booked,
        before: before.map(|before| before.call),
        // It is found by them.
        day: before.map(|before| before.day),
        month: before.map(|before| before.month),
        directive: before.and_then(|before| before.directive),
        ..Begun::default()
    };
    if journal::begin(&mut *tx, work, turn.place, (&turn.model, &turn.key), &begun).await?.is_none() {
        return Ok(Asked::Lost);
    }
    let (failure, cost) = (left_to_person(&turn.model), Nanos::ZERO);
    let end = End { done: false, response: marked(&failure), cost, frees: true, unheard: false };
    journal::end(&mut *tx, work, turn.place, &end).await?;
    if settled.booked.0 != 0 {
        journal::book(&mut *tx, &booking(work, &turn.model, settled.booked, true)).await?;
    }
    tx.commit().await?;
    failpoint::reach("agent.turn_left").await;
    Ok(Asked::Refused(failure))
}

/// A turn that is left to a person says so, whoever comes to it next.
fn marked(failure: &Failure) -> Value {
    let mut response = json!(failure);
    response["left_to_person"] = true.into();
    response
}

/// The agent has no money left: it is paused, and the job waits for it.
async fn without_money(engine: &Engine, work: &Work, turn: &Turn, cap: &Cap) -> Result<Asked, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some(facts) = budgets::facts(&mut tx, work, turn.place).await? else { return Ok(Asked::Lost) };
    pause_at(&mut tx, work, &facts, cap).await?;
    held(tx, work).await
}

/// The job waits for its agent, unless that goes on already.
async fn held(mut tx: Transaction<'_, Postgres>, work: &Work) -> Result<Asked, EngineError> {
    let held = jobs::hold(&mut tx, work.lease, (work.company, work.agent), HELD).await?;
    tx.commit().await?;
    Ok(if held { Asked::Held } else { Asked::Wait(Duration::ZERO) })
}

/// Whether there is money for a turn, by all caps.
async fn admit(
    tx: &mut PgConnection,
    work: &Work,
    turn: &Turn,
    facts: &Facts,
    spender: &Spender,
) -> Result<Admission, EngineError> {
    // Nothing is counted of what costs nothing.
    if turn.price == Price::AtMost(Nanos::ZERO) {
        return Ok(Admission::Admitted(Nanos::ZERO));
    }
    let balances = budgets::apply(tx, work.company, &changes(&spender.accounts(), 0, 0)).await?;
    let dearest = match turn.price {
        // A call that has just ended may have told: what it cost is known by its locks.
        Price::Afterwards => agents::dearest_of(tx, work.company, work.agent).await?,
        Price::AtMost(_) => None,
    };
    let caps = said(facts, turn).caps(spender);
    // What was booked by nobody's answer is told of now.
    tell_thresholds(tx, work.company, &caps, &balances).await?;
    Ok(budget::admit(&caps, &balances, estimate(turn.price, facts, dearest)))
}

fn used_up(cap: &Cap) -> Failure {
    let limit = cap.limit.to_usd();
    Failure::new(
        ErrorClass::Governance,
        format!("{} of {limit} USD leaves no room for another call; raise it and retry the run", cap.rule),
    )
}

/// The agent is paused at a cap.
async fn pause_at(tx: &mut PgConnection, work: &Work, facts: &Facts, cap: &Cap) -> Result<(), EngineError> {
    let reason = format!("{} of {} USD is used up", cap.rule, cap.limit.to_usd());
    pause(tx, work, facts, (reason, Some(cap))).await
}

/// The agent is paused until its money's next period, or until somebody changes what it may spend.
async fn pause(
    tx: &mut PgConnection,
    work: &Work,
    facts: &Facts,
    (reason, cap): (String, Option<&Cap>),
) -> Result<(), EngineError> {
    let ends = |cap: &Cap| ends_us(cap.account.period, cap.account.starts, zone(facts));
    let until = cap.and_then(ends).and_then(DateTime::from_timestamp_micros);
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

/// The agent of a job is paused: the job waits until somebody lets it go on. False when it does
/// already.
pub async fn hold(engine: &Engine, work: &Work) -> Result<bool, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let held = jobs::hold(&mut tx, work.lease, (work.company, work.agent), HELD).await?;
    tx.commit().await?;
    Ok(held)
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
/// and tells of the thresholds that it passed. What it may have cost that nobody heard of is
/// booked at its worst, unless it is asked for again under its key. Says what was booked; nothing
/// when the attempt is no longer this worker's.
pub async fn end(engine: &Engine, work: &Work, turn: &Turn, came: &Came) -> Result<Option<Nanos>, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let Some(facts) = budgets::facts(&mut tx, work, turn.place).await? else { return Ok(None) };
    let Some(before) = facts.before.as_ref() else { return Ok(None) };
    if let Some(gate) = &turn.gate {
        match came {
            Came::Answer { .. } => provider_gates::open(&mut tx, gate).await?,
            Came::Trouble { closed_for: Some(closed), failure, .. } => {
                provider_gates::close(&mut tx, gate, *closed, &failure.message).await?;
            }
            Came::Trouble { .. } => provider_gates::unprobe(&mut tx, gate).await?,
        }
    }
    let spender = spender(work, &facts, (before.day, before.month), before.directive);
    let left = waits_for_person(&facts.agent_config, turn);
    let end = ended(turn, came, before.call.reserved, left);
    let (cost, freed) = (end.cost, if end.frees { before.call.reserved.0 } else { 0 });
    let mut balances = Vec::new();
    if freed != 0 || cost > Nanos::ZERO {
        balances = budgets::apply(&mut tx, work.company, &changes(&spender.accounts(), cost.0, -freed)).await?;
    }
    match journal::end(&mut *tx, work, turn.place, &end).await? {
        Ended::Now => {}
        Ended::Before => return Ok(Some(cost)),
        Ended::Lost => return Ok(None),
    }
    if cost > Nanos::ZERO {
        if turn.price == Price::Afterwards && !end.unheard {
            dearer(&mut tx, work, &facts, cost).await?;
        }
        tell(&mut tx, work, &facts, &said(&facts, turn).caps(&spender), &balances).await?;
        journal::book(&mut *tx, &booking(work, &turn.model, cost, end.unheard)).await?;
    }
    tx.commit().await?;
    Ok(Some(cost))
}

/// What is written down of a turn for which so much was reserved.
fn ended(turn: &Turn, came: &Came, reserved: Nanos, left: bool) -> End {
    let failed = |failure: &Failure| End {
        done: false,
        response: json!(failure),
        cost: Nanos::ZERO,
        frees: true,
        unheard: false,
    };
    match came {
        Came::Answer { response, cost } => {
            End { done: true, response: response.clone(), cost: *cost, frees: true, unheard: false }
        }
        Came::Trouble { failure, maybe_paid: false, .. } => failed(failure),
        // It is asked for again under its key, and settled then.
        Came::Trouble { failure, .. } if turn.payer.is_some() => End { frees: false, ..failed(failure) },
        Came::Trouble { failure, .. } => {
            let response = if left { marked(failure) } else { json!(failure) };
            End { response, cost: reserved, unheard: true, ..failed(failure) }
        }
    }
}

/// A call whose cost is known only afterwards has cost something: more than one has before, or
/// than its owner has said that any does.
async fn dearer(tx: &mut PgConnection, work: &Work, facts: &Facts, cost: Nanos) -> Result<(), EngineError> {
    if facts.dearest.is_none_or(|dearest| cost > dearest) {
        agents::dearest(tx, work.company, work.agent, cost).await?;
    }
    let Some(most) = max_cost(facts).filter(|most| cost > *most) else { return Ok(()) };
    let reason =
        format!("a call has cost {} USD, more than the agent's config.max_cost of {}", cost.to_usd(), most.to_usd());
    pause(tx, work, facts, (reason, None)).await
}

/// How long a call holds money whose attempt is over, before that is booked at its worst: whoever
/// takes over from a dead worker is given time to repeat it.
pub const UNHEARD: Duration = Duration::from_secs(60);

/// Books what calls may have cost of which nobody will hear any more: their run was cancelled, or
/// has failed, or its agent was stopped over them.
pub async fn settle_unheard(engine: &Engine) -> Result<(), EngineError> {
    loop {
        let found = journal::unheard(&engine.pool, UNHEARD.as_secs().cast_signed()).await?;
        let mut settled = 0;
        for call in &found {
            settled += usize::from(settle_one(engine, call).await?);
        }
        if found.len() < journal::UNHEARD_MAX as usize || settled == 0 {
            return Ok(());
        }
    }
}

async fn settle_one(engine: &Engine, call: &journal::Unheard) -> Result<bool, EngineError> {
    let spender = Spender {
        company: call.company.0,
        agent: Some(call.agent.0),
        directive: call.directive,
        playbook: call.playbook.0,
        run: call.run.0,
        step: call.step,
        day: call.day,
        month: call.month,
    };
    let mut tx = engine.pool.begin().await?;
    let reserved = call.reserved;
    budgets::apply(&mut tx, call.company, &changes(&spender.accounts(), reserved.0, -reserved.0)).await?;
    if !journal::keep(&mut tx, call).await? {
        return Ok(false);
    }
    let booking = Booking {
        company: call.company,
        run: call.run,
        step: call.step,
        agent: Some(call.agent),
        category: call.category.clone(),
        cost: reserved,
        model: Some(call.name.clone()),
        unheard: true,
        by: call.by,
    };
    journal::book(&mut *tx, &booking).await?;
    tx.commit().await?;
    tracing::info!(run.id = %call.run, nanos = reserved.0, "booked a call of which nobody has heard");
    Ok(true)
}

/// Tells of thresholds, and pauses the agent where nothing is left.
async fn tell(
    tx: &mut PgConnection,
    work: &Work,
    facts: &Facts,
    caps: &[Cap],
    balances: &[Balance],
) -> Result<(), EngineError> {
    tell_thresholds(tx, work.company, caps, balances).await?;
    let spent_up = |cap: &&Cap| {
        let balance = balances.iter().find(|balance| balance.account == cap.account);
        cap.account.scope <= Scope::Agent && balance.is_some_and(|balance| balance.spent >= cap.limit)
    };
    match caps.iter().find(spent_up) {
        Some(cap) => pause_at(tx, work, facts, cap).await,
        None => Ok(()),
    }
}

/// Tells of thresholds, each once a period.
async fn tell_thresholds(
    tx: &mut PgConnection,
    company: CompanyId,
    caps: &[Cap],
    balances: &[Balance],
) -> Result<(), EngineError> {
    for cap in caps {
        let Some(balance) = balances.iter().find(|balance| balance.account == cap.account) else { continue };
        let percents: Vec<i16> = passed(cap, balance.spent, balance.told).collect();
        let told: Vec<Event> = percents.iter().map(|percent| threshold(company, cap, balance, *percent)).collect();
        if let Some(highest) = percents.last() {
            events::append(&mut *tx, company, &told).await?;
            budgets::told(tx, company, &cap.account, *highest).await?;
        }
    }
    Ok(())
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
