//! Requests from outside that start playbooks. One that is signed becomes an event like any other,
//! which a job hands to its playbook: so it is kept while the company is paused, and starts one run
//! however often its sender tries.

use serde_json::{Value, json};
use sqlx::PgConnection;

use super::{Engine, EngineError, FieldProblem, signals};
use crate::domain::ids::{CompanyId, PlaybookId, SignalId};
use crate::domain::storable;
use crate::domain::webhook::{Claim, Message, Refused};
use crate::store::hooks::{self, Hook};
use crate::store::signals as store_signals;

/// What the names of such events begin with: nobody else's do.
pub const PREFIX: &str = "hook:";

/// The event of a request that starts a playbook.
pub fn event_of(playbook: PlaybookId) -> String {
    format!("{PREFIX}{}", playbook.0)
}

/// What became of a request.
#[derive(Debug)]
pub enum Taken {
    /// It starts something, or has before; nothing is left of what was long ago.
    Events(Vec<SignalId>),
    /// It is not taken.
    Refused(Refused),
}

/// The playbooks that requests under a name start, as they are now.
pub async fn find(engine: &Engine, company: CompanyId, name: &str) -> Result<Found, EngineError> {
    let (now, hooks) = hooks::of(&engine.pool, company, name).await?;
    Ok(Found { company, now, hooks })
}

/// What a request may start.
#[derive(Debug)]
pub struct Found {
    company: CompanyId,
    now: i64,
    hooks: Vec<Hook>,
}

impl Found {
    /// Nothing.
    pub fn is_empty(&self) -> bool {
        self.hooks.is_empty()
    }
}

/// Takes a request: for all playbooks by whose secret it is signed.
pub async fn take(engine: &Engine, found: &Found, claim: Claim<'_>, body: &[u8]) -> Result<Taken, EngineError> {
    let mut refused = Refused::WrongSignature;
    let mut signed = Vec::new();
    // No connection is held over this: anybody may send anything.
    for hook in &found.hooks {
        let secrets: Vec<&[u8]> = hook.secrets.iter().map(Vec::as_slice).collect();
        match claim.verify(&secrets, body, found.now) {
            Ok(message) => signed.push((hook.playbook, message)),
            Err(why) => refused = why,
        }
    }
    if signed.is_empty() {
        return Ok(Taken::Refused(refused));
    }
    let (data, mut taken) = (read(body)?, Vec::new());
    let mut tx = engine.pool.begin().await?;
    for (playbook, message) in &signed {
        taken.push(pass_on(&mut tx, (found.company, *playbook), message, &data).await?);
    }
    if taken.iter().all(|one| matches!(one, Passed::Replayed)) {
        return Ok(Taken::Refused(Refused::Replayed));
    }
    tx.commit().await?;
    engine.waker.wake();
    let events = taken.into_iter().filter_map(|one| match one {
        Passed::On(signal) => Some(signal),
        Passed::Replayed | Passed::Before => None,
    });
    Ok(Taken::Events(events.collect()))
}

/// What became of a message for one playbook.
enum Passed {
    /// It is an event, and was perhaps before.
    On(SignalId),
    /// The very same try was taken before.
    Replayed,
    /// It was taken before, so long ago that its event is gone.
    Before,
}

async fn pass_on(
    tx: &mut PgConnection,
    (company, playbook): (CompanyId, PlaybookId),
    message: &Message,
    data: &Value,
) -> Result<Passed, EngineError> {
    let name = event_of(playbook);
    let client_id = format!("{name}:{}", message.id);
    let is_new = hooks::take(tx, (company, playbook), &message.id, message.sent_at.unwrap_or(0)).await?;
    match (is_new, message.sent_at) {
        (false, Some(_)) => return Ok(Passed::Replayed),
        (false, None) => {
            let known = store_signals::by_client_id(tx, company, &client_id).await?;
            return Ok(known.map_or(Passed::Before, |known| Passed::On(SignalId(known.id))));
        }
        (true, _) => {}
    }
    let send = signals::Send { run: None, name: &name, data, client_id: Some(&client_id) };
    let (row, _) = signals::send(tx, company, &send).await?;
    Ok(Passed::On(SignalId(row.id)))
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
