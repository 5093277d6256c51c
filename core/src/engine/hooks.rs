//! Requests from outside that start playbooks. One that is signed becomes an event like any other,
//! which a job hands to its playbook: so it is kept while the company is paused, and starts one run
//! however often its sender tries.

use serde_json::{Value, json};

use super::{Engine, EngineError, FieldProblem, signals};
use crate::domain::ids::{CompanyId, PlaybookId, SignalId};
use crate::domain::storable;
use crate::domain::webhook::{Claim, Message, Refused};
use crate::store::hooks;

/// What the names of such events begin with: nobody else's do.
pub const PREFIX: &str = "hook:";

/// The event of a request that starts a playbook.
pub fn event_of(playbook: PlaybookId) -> String {
    format!("{PREFIX}{}", playbook.0)
}

/// What became of a request.
#[derive(Debug)]
pub enum Taken {
    /// It starts something, or has before.
    Events(Vec<SignalId>),
    /// No playbook is started by that name.
    NoHook,
    /// It is not taken.
    Refused(Refused),
}

/// Takes a request: all playbooks that it starts, by whose secret it is signed.
pub async fn take(
    engine: &Engine,
    company: CompanyId,
    name: &str,
    claim: Claim<'_>,
    body: &[u8],
) -> Result<Taken, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let (now, found) = hooks::of(&mut tx, company, name).await?;
    let mut refused = None;
    let mut taken = Vec::new();
    let mut data: Option<Value> = None;
    for hook in &found {
        let secrets: Vec<&[u8]> = hook.secrets.iter().map(Vec::as_slice).collect();
        match claim.verify(&secrets, body, now) {
            Ok(message) => {
                let data = match &mut data {
                    Some(data) => data,
                    none => none.insert(read(body)?),
                };
                match pass_on(&mut tx, (company, hook.playbook), &message, data).await? {
                    Some(signal) => taken.push(signal),
                    None => refused = Some(Refused::Replayed),
                }
            }
            Err(why) => refused = Some(why),
        }
    }
    match (taken.is_empty(), refused) {
        (false, _) => {
            tx.commit().await?;
            engine.waker.wake();
            Ok(Taken::Events(taken))
        }
        (true, Some(why)) => Ok(Taken::Refused(why)),
        (true, None) => Ok(Taken::NoHook),
    }
}

/// Its event for one playbook; nothing when the very same try was taken before.
async fn pass_on(
    tx: &mut sqlx::PgConnection,
    (company, playbook): (CompanyId, PlaybookId),
    message: &Message,
    data: &Value,
) -> Result<Option<SignalId>, EngineError> {
    if let Some(sent_at) = message.sent_at
        && !hooks::take(tx, (company, playbook), &message.id, sent_at).await?
    {
        return Ok(None);
    }
    let name = event_of(playbook);
    let client_id = format!("{name}:{}", message.id);
    let send = signals::Send { run: None, name: &name, data, client_id: Some(&client_id) };
    let (row, _) = signals::send(tx, company, &send).await?;
    Ok(Some(SignalId(row.id)))
}

/// A body as runs see it: JSON, or its text.
fn read(body: &[u8]) -> Result<Value, EngineError> {
    let mut data = serde_json::from_slice(body).unwrap_or_else(|_| json!(String::from_utf8_lossy(body)));
    storable::without_nul(&mut data);
    match storable::to_json(&data, storable::OUTPUT_BYTES_MAX) {
        Ok(_) => Ok(data),
        Err(error) => Err(EngineError::Invalid(vec![FieldProblem::new("body", error.to_string())])),
    }
}
