//! The journal of an agent's work, for one attempt at it: every call is written down before
//! it is made, and what came of it before it is used.

use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use capx_core::domain::agent::conversation::{Called, Turn};
use capx_core::domain::agent::message::{Reply, ToolResult};
use capx_core::domain::ids::{AgentId, RunId};
use capx_core::domain::money::Nanos;
use capx_core::domain::outcome::Failure;
use capx_core::domain::storable;
use capx_core::store::StoreError;
use capx_core::store::jobs::ClaimedJob;
use capx_core::store::journal::{self as store, End, Entry, Place, Work};
use chrono::NaiveDate;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use sqlx::PgPool;

use crate::runtime::Watchdog;

/// How often and after which pause a call is written down again when the database is away:
/// longer than most leases live.
const TRIES_MAX: u32 = 60;
const PAUSE: Duration = Duration::from_secs(1);

/// The journals of an attempt, which may work and grade.
#[derive(Debug)]
pub struct Journals<'a> {
    pub(crate) pool: &'a PgPool,
    pub(crate) watchdog: &'a Watchdog,
    pub(crate) job: &'a ClaimedJob,
    pub(crate) run: RunId,
    /// What the attempt has spent, in nano-dollars; it is booked already.
    pub(crate) booked: AtomicI64,
}

/// The journal of a piece of work.
#[derive(Debug)]
pub struct Journal<'a> {
    of: &'a Journals<'a>,
    work: Work,
}

impl Journals<'_> {
    /// What the attempt has spent so far.
    pub fn booked(&self) -> Nanos {
        Nanos(self.booked.load(Ordering::Relaxed))
    }

    /// That of the work with a key, which is the same over all tries of it.
    pub fn of(&self, key: &str, agent: AgentId, category: &'static str) -> Journal<'_> {
        let work = Work {
            lease: self.job.lease,
            company: self.job.company,
            run: self.run,
            step: self.job.step,
            attempt: self.job.attempt,
            agent: Some(agent),
            key: key.to_owned(),
            category,
        };
        Journal { of: self, work }
    }
}

/// What stands in a journal.
#[derive(Debug, Default)]
pub struct Written {
    /// The turns so far, with their calls.
    pub turns: Vec<Turn>,
    /// The number of the first of them.
    pub base: u32,
    /// An attempt before this one has made the last of them.
    pub of_another: bool,
}

/// A call's result as it is stored.
#[derive(Debug, Serialize, Deserialize)]
struct Stored {
    #[serde(flatten)]
    result: ToolResult,
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    refused: bool,
}

impl Journal<'_> {
    /// What was done so far.
    pub async fn read(&self) -> Result<Written, Failure> {
        let (pool, work) = (self.of.pool.clone(), self.work.clone());
        let entries = self.again("read", move || {
            let (pool, work) = (pool.clone(), work.clone());
            async move { store::load(&pool, &work).await }
        });
        written(entries.await?)
    }

    /// Notes that a call is to be made; says which day it is, for its price.
    pub async fn begin(&self, place: Place, name: &str, key: &str, fresh: bool) -> Result<NaiveDate, Failure> {
        let (pool, work) = (self.of.pool.clone(), self.work.clone());
        let (name, key) = (name.to_owned(), key.to_owned());
        let begun = self.again("begun", move || {
            let (pool, work, name, key) = (pool.clone(), work.clone(), name.clone(), key.clone());
            async move { store::begin(&pool, &work, place, (&name, &key), fresh).await }
        });
        begun.await?.ok_or_else(lost)
    }

    /// Writes down what a turn gave.
    pub async fn turn_ended(&self, turn: u32, reply: &Reply, cost: Nanos) -> Result<(), Failure> {
        let response = json!(reply);
        self.ended(Place { turn, call: 0 }, End { done: true, response, cost, model: Some(reply.model.clone()) }).await
    }

    /// Writes down why a turn did not come; it may be asked for again.
    pub async fn turn_failed(&self, turn: u32, failure: &Failure) -> Result<(), Failure> {
        let end = End { done: false, response: json!(failure), cost: Nanos::ZERO, model: None };
        self.ended(Place { turn, call: 0 }, end).await
    }

    /// Writes down what a call of a tool gave.
    pub async fn call_ended(&self, place: Place, result: &ToolResult, refused: bool) -> Result<(), Failure> {
        let response = json!(Stored { result: result.clone(), refused });
        self.ended(place, End { done: true, response, cost: Nanos::ZERO, model: None }).await
    }

    async fn ended(&self, place: Place, mut end: End) -> Result<(), Failure> {
        storable::without_nul(&mut end.response);
        let (pool, work, cost) = (self.of.pool.clone(), self.work.clone(), end.cost);
        let ended = self.again("ended", move || {
            let (pool, work, end) = (pool.clone(), work.clone(), end.clone());
            async move { store::end(&pool, &work, place, &end).await }
        });
        if !ended.await? {
            return Err(lost());
        }
        self.of.booked.fetch_add(cost.0, Ordering::Relaxed);
        Ok(())
    }

    /// A call of the database as a task of its own, so that none is dropped half-way, and
    /// again while the database is away: what was paid for is not lost for a moment without it.
    async fn again<T, F>(&self, what: &str, call: impl Fn() -> F + Send + 'static) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, StoreError>> + Send,
    {
        let watchdog = self.of.watchdog.clone();
        let tried = tokio::spawn(async move {
            let mut tries = 0;
            loop {
                match watchdog.answer("a journal", call()).await {
                    Err(error) if error.is_passing() && tries < TRIES_MAX => {
                        tracing::warn!(%error, "a journal waits for the database");
                        tries += 1;
                        tokio::time::sleep(PAUSE).await;
                    }
                    done => return done,
                }
            }
        });
        let trouble = |error: &dyn std::error::Error| {
            Failure::transient(format!("a call of the agent could not be {what} in its journal: {error}"))
        };
        tried.await.map_err(|error| trouble(&error))?.map_err(|error| trouble(&error))
    }
}

fn lost() -> Failure {
    Failure::transient("the attempt is no longer this worker's")
}

/// The turns of the work since it was last begun anew.
fn written(entries: Vec<Entry>) -> Result<Written, Failure> {
    let from = entries.iter().rposition(|entry| entry.fresh).unwrap_or(0);
    let entries = entries.get(from..).unwrap_or_default();
    let Some(first) = entries.first() else { return Ok(Written::default()) };
    let mut written = Written { base: first.place.turn, of_another: true, ..Written::default() };
    for entry in entries {
        written.of_another &= entry.of_another;
        let done = entry.state == "done";
        if entry.place.call == 0 {
            // One that is not over is asked for again.
            if done {
                let reply = read(entry.response.clone())?;
                written.turns.push(Turn { reply, calls: Vec::new() });
            }
            continue;
        }
        let Some(turn) = written.turns.last_mut() else { continue };
        let called = match done {
            true => {
                let Stored { result, refused } = read(entry.response.clone())?;
                Called::Done { result, refused }
            }
            false => Called::Begun,
        };
        turn.calls.push(Some(called));
    }
    Ok(written)
}

fn read<T: serde::de::DeserializeOwned>(response: Option<Value>) -> Result<T, Failure> {
    serde_json::from_value(response.unwrap_or_default())
        .map_err(|error| Failure::invalid(format!("the journal of the agent's work cannot be read: {error}")))
}
