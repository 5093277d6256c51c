//! Named events: clients send them, and runs that wait for them go on.

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{Engine, EngineError, triggers};
use crate::domain::event::{EVENT_RECEIVED, Event};
use crate::domain::ids::{CompanyId, RunId, SignalId};
use crate::store::jobs::{NewJob, kind, queue};
use crate::store::signals::{self, NewSignal, SignalRow};
use crate::store::{events, jobs, runs};

/// An event to be sent.
#[derive(Debug)]
pub struct Send<'a> {
    /// To this run alone.
    pub run: Option<RunId>,
    /// Its name.
    pub name: &'a str,
    /// What it says.
    pub data: &'a Value,
    /// The sender's own id: the same again changes nothing.
    pub client_id: Option<&'a str>,
}

/// Takes an event in the caller's transaction, who wakes workers after it: a job
/// hands it to whoever waits. False when the sender's id is known already, with
/// the event that it was.
pub async fn send(
    tx: &mut PgConnection,
    company: CompanyId,
    send: &Send<'_>,
) -> Result<(SignalRow, bool), EngineError> {
    signals::lock(tx, company, send.name).await?;
    if let Some(client_id) = send.client_id
        && let Some(known) = signals::by_client_id(tx, company, client_id).await?
    {
        return the_same(known, send).map(|known| (known, false));
    }
    if let Some(run) = send.run {
        let row = runs::get(&mut *tx, company, run).await?.ok_or(EngineError::NotFound("run"))?;
        if row.status.is_terminal() {
            return Err(EngineError::Conflict(format!("the run has {} already", row.status.as_str())));
        }
    }
    let new = NewSignal {
        signal: SignalId::new(),
        company,
        run: send.run,
        name: send.name,
        data: send.data,
        client_id: send.client_id,
    };
    let Some(row) = signals::insert(tx, &new).await? else {
        let known = signals::by_client_id(tx, company, send.client_id.unwrap_or_default()).await?;
        return the_same(known.ok_or(EngineError::NotFound("event"))?, send).map(|known| (known, false));
    };
    let told = json!({"signal_id": new.signal, "name": send.name, "run_id": send.run});
    events::append(&mut *tx, company, &[Event::new(EVENT_RECEIVED, told)]).await?;
    let job = NewJob { ref_id: Some(new.signal.0), ..NewJob::new(queue::SYSTEM, kind::SIGNAL, company) };
    jobs::enqueue(&mut *tx, &job).await?;
    Ok((row, true))
}

/// An id stands for one event.
fn the_same(known: SignalRow, send: &Send<'_>) -> Result<SignalRow, EngineError> {
    if known.name != send.name || known.run_id.map(RunId) != send.run {
        return Err(EngineError::Conflict("this `id` was used for another event; use a new one for each".into()));
    }
    Ok(known)
}

/// Hands an event to all who wait for it, and starts what it starts; false when
/// that is to be done later, as the company is paused.
pub async fn deliver(engine: &Engine, company: CompanyId, signal: SignalId) -> Result<bool, EngineError> {
    let mut after = Some(0);
    while let Some(job) = after {
        let delivered = signals::deliver(&engine.pool, company, signal, job).await?;
        if delivered.woken > 0 {
            engine.waker.wake();
        }
        after = delivered.more;
    }
    triggers::start_by_event(engine, company, signal).await
}
