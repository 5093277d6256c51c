//! Heartbeats. An agent has one job that is due at its next beat. Whoever claims it looks,
//! for nothing, whether there is anything to do; if not, the beat is over. Else the agent
//! works by a run of a playbook that is our own, one task after another, and its job waits
//! for that run, as a step waits for a run that it calls. So an agent has at most one beat
//! under way, and what a task needs - leases, retries, gates, budgets - is what a step has.
//!
//! Locks go heartbeat's job, agent, tasks.

use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use sqlx::PgConnection;

use super::start::{self, Decided};
use super::{Engine, EngineError, repeating, tasks};
use crate::domain::company::works;
use crate::domain::digest::sha256;
use crate::domain::event::{AGENT_STATE_CHANGED, Event, HEARTBEAT_FIRED};
use crate::domain::governance::Policy;
use crate::domain::heartbeat::{BEAT_MAX, ITEMS_MAX, Next, Plan, SAME_BEATS_MAX, SOON, brief, brief_value};
use crate::domain::ids::{AgentId, CompanyId, PlaybookId, TaskId};
use crate::domain::money::Nanos;
use crate::failpoint;
use crate::store::agents;
use crate::store::beats::{self, Beating, Done, Idle, Look};
use crate::store::events;
use crate::store::jobs::{self, ClaimedJob, Settle};
use crate::store::playbooks::{self, NewPlaybook};
use crate::store::tasks::{self as store_tasks, TaskRow};

/// A heartbeat that waits for a run looks by itself after this, should it be forgotten.
const LOOK: Duration = Duration::from_secs(60);
/// One that has nobody to beat for yet looks again after this.
const NOT_READY: Duration = Duration::from_secs(1);
/// One whose company has as many agents at work as may be.
const CROWDED: Duration = Duration::from_secs(5);
/// Messages that an agent reads at once.
const MESSAGES_MAX: i64 = 50;

/// What is to be done about a heartbeat.
#[derive(Debug)]
pub enum Beat {
    /// Nothing is to do: it is counted, or only put off.
    Idle(Box<Idle>),
    /// Something is.
    Works,
    /// Its agent gets ready.
    Later(Duration),
    /// Its agent is gone.
    Over,
}

fn time(us: i64) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(us).unwrap_or_default()
}

/// Looks at the agents of many heartbeats at once.
pub async fn look(engine: &Engine, jobs: &[&ClaimedJob]) -> Result<Vec<(i64, Beat)>, EngineError> {
    let agents: Vec<_> = jobs.iter().filter_map(|job| Some((job.company, AgentId(job.ref_id?)))).collect();
    let looks = beats::look(&engine.pool, &agents).await?;
    let of = |job: &ClaimedJob| looks.iter().find(|look| Some(look.agent.0) == job.ref_id);
    Ok(jobs
        .iter()
        .map(|job| (job.lease.job, of(job).map_or(Beat::Over, |look| decide(job, look, rand::random()))))
        .collect())
}

fn decide(job: &ClaimedJob, look: &Look, draw: f64) -> Beat {
    let at_work = works(&look.company_status);
    match look.status.as_str() {
        "removed" if look.began.is_none() && !look.has_ended => return Beat::Over,
        "initializing" => return Beat::Later(NOT_READY),
        "active" if look.company_status == "provisioning" => return Beat::Later(NOT_READY),
        _ => {}
    }
    let beats = look.status == "active" && at_work;
    let asks = look.has_work || thinks(&look.config);
    if look.has_ended || look.began.is_some() || (beats && asks) {
        return Beat::Works;
    }
    let planned = look.planned.map(|at| at.timestamp_micros());
    let Next { planned_us, delay } = Plan::of(&look.config, look.zone.as_deref()).next(planned, look.now_us, draw);
    Beat::Idle(Box::new(Idle {
        lease: job.lease,
        company: job.company,
        agent: look.agent,
        woken: job.step,
        beats,
        planned: time(planned_us),
        // The job of an agent that rests is needed again when that is over, and then woken.
        delay: delay.max(Duration::from_millis(1)),
        event: fired(look.agent, (0, 0, 0.0), &look.wakes),
    }))
}

/// Whether the agent's model is asked even where there is nothing to do.
fn thinks(config: &Value) -> bool {
    config["heartbeat_always"] == true
}

fn fired(agent: AgentId, (items, actions, cost): (i32, i32, f64), reasons: &Value) -> Event {
    let data = json!({"agent_id": agent, "actions": actions, "items": items, "cost": cost, "reasons": reasons});
    Event::new(HEARTBEAT_FIRED, data)
}

/// A heartbeat in which there is something to do: writes down what has come of the agent's
/// tasks, and lets it begin the next one, or ends the beat. One transaction, which settles
/// the job.
pub async fn work(engine: &Engine, job: &ClaimedJob, agent: AgentId) -> Result<(), EngineError> {
    repeating(|| work_once(engine, job, agent)).await?;
    engine.waker.wake();
    Ok(())
}

async fn work_once(engine: &Engine, job: &ClaimedJob, agent: AgentId) -> Result<(), EngineError> {
    let (company, mut tx) = (job.company, engine.pool.begin().await?);
    let Some(mut beating) = beats::hold(&mut tx, job.lease, company, agent).await? else { return Ok(()) };
    settle_tasks(&mut tx, company, agent).await?;
    let under_way = |status: &str| matches!(status, "queued" | "running");
    let again = if beating.run.is_some() && beating.run_status.as_deref().is_some_and(under_way) {
        LOOK
    } else {
        if beating.run.is_some() {
            beats::left(&mut tx, company, agent).await?;
            beating.items += 1;
        }
        match begin(engine, &mut tx, company, agent, &beating).await? {
            Begun::Works => LOOK,
            Begun::Waits(delay) => delay,
            Begun::Nothing => end(&mut tx, company, agent, &beating).await?,
        }
    };
    failpoint::reach("beat.before_commit").await;
    let settled = Settle { lease: job.lease, again_after: Some(again), charged: false };
    if beating.status == "removed" && again != LOOK {
        jobs::settle(&mut *tx, &[Settle { again_after: None, ..settled }]).await?;
    } else {
        jobs::settle(&mut *tx, &[settled]).await?;
    }
    tx.commit().await?;
    failpoint::reach("beat.after_commit").await;
    Ok(())
}

/// Writes down what has come of tasks whose runs have ended, and lets those know that have
/// waited for it.
async fn settle_tasks(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<(), EngineError> {
    for row in store_tasks::settle(tx, company, agent).await? {
        tasks::ended(tx, &row).await?;
    }
    loop {
        // What fails may be needed by others of its own.
        let lost = store_tasks::fail_hopeless(tx, company, agent).await?;
        if lost.is_empty() {
            return Ok(());
        }
        for row in lost {
            tasks::ended(tx, &row).await?;
        }
    }
}

/// What an agent has found to do.
enum Begun {
    /// It works by a run.
    Works,
    /// It has to wait.
    Waits(Duration),
    /// Nothing.
    Nothing,
}

async fn begin(
    engine: &Engine,
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    beating: &Beating,
) -> Result<Begun, EngineError> {
    if !may_beat(beating) || is_full(beating) {
        return Ok(Begun::Nothing);
    }
    let task = store_tasks::next(tx, company, agent).await?;
    let thinks = thinks(&beating.config) && beating.began_us.is_none();
    if task.is_none() && !thinks && !beats::has_messages(tx, company, agent).await? {
        return Ok(Begun::Nothing);
    }
    let policy = Policy::of(beating.governance.as_ref(), &beating.company_config);
    if let Some(limit) = policy.agents_at_once
        && beats::others_at_work(tx, company, agent).await? >= limit
    {
        return Ok(Begun::Waits(CROWDED));
    }
    let messages: Vec<Value> = beats::take_messages(tx, company, agent, MESSAGES_MAX)
        .await?
        .into_iter()
        .map(|m| json!({"from": m.from, "channel": m.channel, "text": brief(&m.body), "sent_at": m.at}))
        .collect();
    let reasons = if beating.began_us.is_none() { &beating.wakes } else { &beating.reasons };
    let mut params = Map::new();
    params.insert("messages".into(), messages.into());
    params.insert("reasons".into(), reasons.clone());
    if let Some(task) = &task {
        params.insert("task".into(), told(tx, company, task).await?);
    }
    let action = if task.is_some() { TASK } else { HEARTBEAT };
    let playbook = own_playbook(tx, company, &beating.role, action).await?;
    let decided = start::decide(engine, &mut *tx, None, (company, playbook), params, "heartbeat", None).await?;
    let run = match decided {
        Decided::New(new) => start::start_in(&mut *tx, *new).await?.run,
        Decided::Known(known) => known.run,
    };
    beats::works(tx, company, agent, run, task.as_ref().map(TaskRow::task)).await?;
    if let Some(task) = &task {
        tasks::begun(tx, task, run).await?;
    }
    Ok(Begun::Works)
}

/// A task as its agent is told of it.
async fn told(tx: &mut PgConnection, company: CompanyId, task: &TaskRow) -> Result<Value, EngineError> {
    let mut told = json!({
        "id": task.task(), "title": task.title, "description": task.description, "priority": task.priority,
        "metadata": task.metadata,
    });
    if let Some(feedback) = &task.feedback {
        told["feedback"] = feedback.as_str().into();
    }
    if !task.needs.is_empty() {
        let results = store_tasks::results(tx, company, &task.needs).await?;
        let results = results
            .into_iter()
            .map(|(id, title, result)| json!({"id": id, "title": title, "result": result.map(brief_value)}));
        told["needs"] = results.collect();
    }
    Ok(told)
}

/// The action of a run that does a task, and of one that looks around.
pub const TASK: &str = "task";
/// The same of a beat without a task.
pub const HEARTBEAT: &str = "heartbeat";

/// The playbook by which a role does something in its beats; made when it is needed first.
async fn own_playbook(
    tx: &mut PgConnection,
    company: CompanyId,
    role: &str,
    action: &str,
) -> Result<PlaybookId, EngineError> {
    let name = if action == TASK { format!("@{role}") } else { format!("@{role}:{action}") };
    let yaml = format!(
        "name: \"{name}\"\ninputs:\n  task: object\n  messages: array\n  reasons: array\nsteps:\n  - id: work\n    role: \
         \"{role}\"\n    action: {action}\n    params:\n      task: ${{inputs.task}}\n      messages: ${{inputs.messages}}\n      \
         reasons: ${{inputs.reasons}}\n    timeout: {{hard: 15m, idle: 10m}}\noutput: ${{steps.work.output}}\n"
    );
    let new = NewPlaybook {
        company,
        name: &name,
        description: Some("What the agent does in its heartbeats."),
        tags: &[],
        yaml: &yaml,
        hash: sha256(&yaml),
        step_count: 1,
    };
    Ok(playbooks::keep_builtin(tx, &new).await?)
}

/// The beat is over; says how long until the next one.
async fn end(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    beating: &Beating,
) -> Result<Duration, EngineError> {
    let zone = beating.company_config.get("timezone").and_then(Value::as_str);
    let planned = beating.planned.map(|at| at.timestamp_micros());
    let Next { planned_us, delay } = Plan::of(&beating.config, zone).next(planned, beating.now_us, rand::random());
    // What is left is the next beat's, which follows at once. Whatever it was woken for
    // meanwhile it has seen.
    let more = beating.began_us.is_some() && may_beat(beating) && is_full(beating);
    if beating.began_us.is_some() || may_beat(beating) {
        let done = beats::over(tx, company, agent, time(planned_us)).await?;
        let sums = (done.items, done.actions, done.cost.to_usd());
        events::append(&mut *tx, company, &[fired(agent, sums, &done.reasons)]).await?;
        if done.cost > Nanos::ZERO {
            watch_progress(tx, company, agent, beating, &done).await?;
        }
    }
    Ok(if more { Duration::ZERO } else { delay.max(Duration::from_millis(1)) })
}

/// Stops an agent whose beats cost something and change the same, or nothing, again and again;
/// with the evidence.
async fn watch_progress(
    tx: &mut PgConnection,
    company: CompanyId,
    agent: AgentId,
    beating: &Beating,
    done: &Done,
) -> Result<(), EngineError> {
    let began = beating.began_us.map(time).unwrap_or_default();
    let changed = beats::changed(tx, company, agent, began).await?;
    let digest = sha256(changed.to_string());
    let repeats = beats::note_change(tx, company, agent, &digest).await?;
    let max = beating.config["breaker"].as_i64().and_then(|max| i32::try_from(max).ok()).filter(|max| *max > 0);
    if repeats < max.unwrap_or(SAME_BEATS_MAX) || beating.status != "active" {
        return Ok(());
    }
    let what = if changed.as_array().is_some_and(Vec::is_empty) { "changed nothing" } else { "changed the same" };
    let reason =
        format!("{repeats} beats in a row have cost money and {what}; the last cost {} USD", done.cost.to_usd());
    if agents::break_off(tx, company, agent, &reason).await? {
        let told = json!({
            "agent_id": agent, "from": "active", "to": "paused", "error": null, "reason": reason,
            "evidence": {"beats": repeats, "changed": changed},
        });
        events::append(&mut *tx, company, &[Event::new(AGENT_STATE_CHANGED, told)]).await?;
    }
    Ok(())
}

fn may_beat(beating: &Beating) -> bool {
    beating.status == "active" && works(&beating.company_status)
}

/// Whether one beat has taken on as much as it may.
fn is_full(beating: &Beating) -> bool {
    let took = beating.began_us.map_or(0, |began| beating.now_us - began);
    beating.items >= ITEMS_MAX || took > i64::try_from(BEAT_MAX.as_micros()).unwrap_or(i64::MAX)
}

/// The task that a run does, by its parameters.
pub fn task_of(inputs: &Value) -> Option<TaskId> {
    inputs.pointer("/task/id")?.as_str()?.parse().ok()
}

/// An agent that has just got ready, or goes on, begins to beat; what waits for it does so at
/// once.
pub async fn start(tx: &mut PgConnection, company: CompanyId, agent: AgentId) -> Result<(), EngineError> {
    let Some(how) = beats::how(tx, company, agent).await? else { return Ok(()) };
    let Next { planned_us, delay } = Plan::of(&how.config, how.zone.as_deref()).next(None, how.now_us, rand::random());
    beats::begin(tx, company, agent, Some(time(planned_us)), delay).await?;
    store_tasks::adopt(tx, company, agent).await?;
    if store_tasks::next(tx, company, agent).await?.is_some() {
        beats::wake(tx, company, agent, "task", SOON).await?;
    }
    Ok(())
}
