//! Runs that start by themselves: at a time, or by an event.
//!
//! There is no scheduler: a schedule's next fire is a job like any other, and
//! whoever claims it starts the run and plans the fire after it in one
//! transaction, under the job's lease. The planned time is the run's key, so that
//! one fire is one run, whoever dies when (hazard H11).

use chrono::{DateTime, Utc};
use jiff::Timestamp;
use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::start::{self, Decided};
use super::{Engine, EngineError};
use crate::domain::company::works;
use crate::domain::event::{self, Event, PLAYBOOK_SKIPPED};
use crate::domain::ids::{CompanyId, PlaybookId, SignalId, VersionId};
use crate::domain::playbook::{self, Playbook, Trigger};
use crate::domain::schedule::{Schedule, ScheduleSpec};
use crate::domain::webhook;
use crate::failpoint;
use crate::store::jobs::{self, ClaimedJob, Lease, Settle};
use crate::store::triggers::{self, ByEvent};
use crate::store::{StoreError, events, playbooks};

fn instant(at: DateTime<Utc>) -> Timestamp {
    Timestamp::from_microsecond(at.timestamp_micros()).unwrap_or_default()
}

fn time(at: Timestamp) -> DateTime<Utc> {
    DateTime::from_timestamp_micros(at.as_microsecond()).unwrap_or_default()
}

/// Sets what starts a playbook by what its current version says, in the caller's
/// transaction, which has changed it.
pub async fn sync(tx: &mut PgConnection, company: CompanyId, playbook: PlaybookId) -> Result<(), EngineError> {
    let Some(current) = triggers::lock(tx, company, playbook).await? else {
        return Ok(triggers::clear(tx, company, playbook).await?);
    };
    let trigger = playbook::load(&current.yaml).ok().map(|playbook| playbook.trigger);
    // What signs the requests of one that is archived is not forgotten: it may come back.
    let rests = |trigger: &Trigger| current.status != "archived" || matches!(trigger, Trigger::Webhook { .. });
    match trigger.filter(rests) {
        Some(Trigger::Schedule(spec)) => {
            schedule(tx, company, playbook, &spec, &current.status, instant(current.now)).await?;
        }
        Some(Trigger::Event { event, .. }) => {
            triggers::rest(tx, company, playbook).await?;
            triggers::set_event(tx, (company, playbook), "event", &event, None).await?;
        }
        Some(Trigger::Webhook { event }) => {
            triggers::rest(tx, company, playbook).await?;
            triggers::set_event(tx, (company, playbook), "webhook", &event, Some(&webhook::new_secret())).await?;
        }
        Some(Trigger::Manual) | None => triggers::clear(tx, company, playbook).await?,
    }
    triggers::note_version(tx, company, playbook, current.version).await?;
    Ok(())
}

async fn schedule(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    spec: &ScheduleSpec,
    status: &str,
    now: Timestamp,
) -> Result<(), EngineError> {
    let found = Schedule::read(spec).ok().and_then(|schedule| Some((schedule.next_after(now)?, schedule)));
    // It was checked when it came; a zone may have gone from the host since.
    let Some((next, schedule)) = found else { return Ok(triggers::clear(tx, company, playbook).await?) };
    let next = triggers::set_schedule(tx, company, playbook, &spec.to_json(), time(next)).await?;
    if status == "active" {
        triggers::plan(tx, company, playbook, next + schedule.delay(playbook.0.as_bytes())).await?;
    } else {
        triggers::rest(tx, company, playbook).await?;
    }
    Ok(())
}

/// Sets the triggers of playbooks that come from before there were any.
pub async fn catch_up(engine: &Engine) -> Result<(), EngineError> {
    for (company, playbook) in triggers::lagging(&engine.pool).await? {
        let mut tx = engine.pool.begin().await?;
        sync(&mut tx, company, playbook).await?;
        tx.commit().await?;
    }
    Ok(())
}

/// Carries out the job of a schedule: starts what is due, plans what comes next,
/// and settles the job, in one transaction.
pub async fn fire(engine: &Engine, job: &ClaimedJob) -> Result<(), EngineError> {
    let Some(playbook) = job.ref_id.map(PlaybookId) else { return settle(engine, job.lease, None).await };
    let (company, mut tx) = (job.company, engine.pool.begin().await?);
    // The lease is gone: whoever has the job now sees to it.
    let Some(now) = triggers::hold(&mut tx, job.lease).await? else { return Ok(()) };
    let found = playbooks::for_start(&mut *tx, None, company, playbook).await?;
    let Some(found) = found.filter(|found| found.status == "active" && found.company_status != "stopped") else {
        drop(tx);
        return settle(engine, job.lease, None).await;
    };
    if !works(&found.company_status) {
        drop(tx);
        return settle(engine, job.lease, Some(jobs::PARKED)).await;
    }
    let plan = start::plan_of(engine, &mut *tx, company, found.version).await?;
    let (spec, next_at) = (spec_of(&plan), triggers::next_at(&mut *tx, company, playbook).await?);
    let (Some(schedule), Some(first)) = (spec.and_then(|spec| Schedule::read(spec).ok()), next_at.map(instant)) else {
        drop(tx);
        return settle(engine, job.lease, None).await;
    };
    failpoint::reach("fire.before_start").await;
    // A fire comes late by the schedule's part of its jitter.
    let delay = schedule.delay(playbook.0.as_bytes());
    let (due, next) = schedule.reach(first, instant(now - delay));
    for fire in &due {
        // The clock of the database may go back, as after a fail-over.
        let key = format!("at:{fire}");
        start_once(engine, &mut tx, (company, playbook), Map::new(), "schedule", &key).await?;
    }
    match next.map(time) {
        Some(next) => {
            triggers::fired(&mut tx, company, playbook, due.last().copied().map(time), next).await?;
            triggers::plan(&mut tx, company, playbook, next + delay).await?;
        }
        None => triggers::clear(&mut tx, company, playbook).await?,
    }
    if failpoint::reach("fire.before_commit").await {
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    tx.commit().await?;
    failpoint::reach("fire.after_commit").await;
    engine.waker.wake();
    Ok(())
}

fn spec_of(plan: &Playbook) -> Option<&ScheduleSpec> {
    match &plan.trigger {
        Trigger::Schedule(spec) => Some(spec),
        _ => None,
    }
}

async fn settle(engine: &Engine, lease: Lease, again_after: Option<std::time::Duration>) -> Result<(), EngineError> {
    jobs::settle(&engine.pool, &[Settle { lease, again_after, charged: false }]).await?;
    Ok(())
}

/// Starts a run that is the only one of its playbook with a key; what is refused is
/// told in the log.
async fn start_once(
    engine: &Engine,
    tx: &mut PgConnection,
    (company, playbook): (CompanyId, PlaybookId),
    params: Map<String, Value>,
    trigger: &'static str,
    key: &str,
) -> Result<(), EngineError> {
    match start::decide(engine, &mut *tx, None, (company, playbook), params, trigger, Some(key)).await {
        Ok(Decided::New(new)) => start::start_in(tx, *new).await.map(drop),
        Ok(Decided::Known(_)) => Ok(()),
        Err(refused @ (EngineError::Conflict(_) | EngineError::Governance(_) | EngineError::Invalid(_))) => {
            skipped(tx, company, playbook, key, &refused).await
        }
        Err(error) => Err(error),
    }
}

/// Nobody is there to be told, so the log is.
async fn skipped(
    tx: &mut PgConnection,
    company: CompanyId,
    playbook: PlaybookId,
    key: &str,
    why: &EngineError,
) -> Result<(), EngineError> {
    let reason = match why {
        EngineError::Invalid(fields) => {
            let fields: Vec<String> = fields.iter().map(|f| format!("{}: {}", f.field, f.message)).collect();
            fields.join("; ")
        }
        other => other.to_string(),
    };
    let told = json!({"playbook_id": playbook, "trigger": key, "reason": reason});
    events::append(tx, company, &[Event::new(PLAYBOOK_SKIPPED, told)]).await?;
    Ok(())
}

/// Starts the playbooks that wait for an event of this name, each once for each
/// event; false when the company is paused, and they are to be started later.
pub async fn start_by_event(engine: &Engine, company: CompanyId, signal: SignalId) -> Result<bool, EngineError> {
    let mut after = PlaybookId(Uuid::nil());
    loop {
        let all = triggers::started_by(&engine.pool, company, signal.0, after).await?;
        let Some(last) = all.last() else { return Ok(true) };
        after = last.playbook;
        for ByEvent { playbook, data, .. } in all.into_iter().filter(|one| !one.started) {
            let Some(found) = playbooks::for_start(&engine.pool, None, company, playbook).await? else { continue };
            match found.company_status.as_str() {
                "paused" => return Ok(false),
                "stopped" => return Ok(true),
                _ if found.status != "active" => continue,
                _ => start_by(engine, company, (playbook, found.version), signal, data).await?,
            }
        }
    }
}

async fn start_by(
    engine: &Engine,
    company: CompanyId,
    (playbook, version): (PlaybookId, VersionId),
    signal: SignalId,
    data: Value,
) -> Result<(), EngineError> {
    let plan = start::plan_of(engine, &engine.pool, company, version).await?;
    if let Trigger::Event { matching, .. } = &plan.trigger
        && !event::holds(&data, matching)
    {
        return Ok(());
    }
    let key = format!("event:{}", signal.0);
    let mut tx = engine.pool.begin().await?;
    let trigger = if matches!(plan.trigger, Trigger::Webhook { .. }) { "webhook" } else { "event" };
    start_once(engine, &mut tx, (company, playbook), params_of(&plan, data), trigger, &key).await?;
    tx.commit().await?;
    engine.waker.wake();
    Ok(())
}

/// What an event brings is the input `event`, where a playbook takes it.
fn params_of(plan: &Playbook, data: Value) -> Map<String, Value> {
    let takes = plan.inputs.is_empty() || plan.inputs.iter().any(|input| input.name == "event");
    let mut params = Map::new();
    if takes {
        params.insert("event".into(), data);
    }
    params
}
