//! Named events: clients send them, and runs that wait for them go on.

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{Engine, EngineError};
use crate::domain::event::{EVENT_RECEIVED, Event};
use crate::domain::ids::{CompanyId, RunId, SignalId};
use crate::store::jobs::{NewJob, kind, queue};
use crate::store::signals::{self, DELIVERED_MAX, NewSignal, SignalRow};
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
    if let Some(run) = send.run {
        let row = runs::get(&mut *tx, company, run).await?.ok_or(EngineError::NotFound("run"))?;
        if row.status.is_terminal() {
            return Err(EngineError::Conflict(format!("the run has {} already", row.status.as_str())));
        }
    }
    signals::lock(tx, company, send.name).await?;
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
        return Ok((known.ok_or(EngineError::NotFound("event"))?, false));
    };
    let told = json!({"signal_id": new.signal, "name": send.name, "run_id": send.run});
    events::append(&mut *tx, company, &[Event::new(EVENT_RECEIVED, told)]).await?;
    let job = NewJob { ref_id: Some(new.signal.0), ..NewJob::new(queue::SYSTEM, kind::SIGNAL, company) };
    jobs::enqueue(&mut *tx, &job).await?;
    Ok((row, true))
}

/// Hands an event to some of those that wait for it; true when there may be more.
pub async fn deliver(engine: &Engine, company: CompanyId, signal: SignalId) -> Result<bool, EngineError> {
    let delivered = signals::deliver(&engine.pool, company, signal).await?;
    if delivered > 0 {
        engine.waker.wake();
    }
    Ok(delivered == DELIVERED_MAX as usize)
}
