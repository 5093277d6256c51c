//! The journal of an agent's work, for one attempt at it: every call is written down before
//! it is made, and what came of it before it is used.

use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use capx_core::domain::agent::conversation::{self, Called};
use capx_core::domain::agent::message::ToolResult;
use capx_core::domain::ids::{AgentId, RunId, TaskId};
use capx_core::domain::money::Nanos;
use capx_core::domain::outcome::Failure;
use capx_core::domain::storable;
use capx_core::engine::acting::{self, May};
use capx_core::engine::deeds::{self, Doer};
use capx_core::engine::spending::{self, Asked, Came, Turn};
use capx_core::engine::{Engine, EngineError, agents};
use capx_core::store::jobs::ClaimedJob;
use capx_core::store::journal::{self as store, Begun, End, Ended, Entry, Place, Work};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::deeds::Deeds;
use crate::runtime::Watchdog;

/// How often and after which pause a call is written down again when the database is away:
/// longer than most leases live.
const TRIES_MAX: u32 = 60;
const PAUSE: Duration = Duration::from_secs(1);
/// Things that one answer may remember.
const MEMORIES_MAX: usize = 100;

/// The journals of an attempt, which may work and grade.
#[derive(Debug)]
pub struct Journals<'a> {
    pub(crate) engine: &'a Engine,
    pub(crate) watchdog: &'a Watchdog,
    pub(crate) job: &'a ClaimedJob,
    pub(crate) run: RunId,
    /// What the attempt has spent, in nano-dollars; it is booked already.
    pub(crate) booked: AtomicI64,
    /// The job waits for its agent, and is no longer this worker's.
    pub(crate) held: AtomicBool,
}

/// The journal of a piece of work.
#[derive(Debug)]
pub struct Journal<'a> {
    of: &'a Journals<'a>,
    work: Work,
}

impl Journals<'_> {
    /// How it works inside the company, as an agent, in the course of a task.
    pub(crate) fn deeds(&self, agent: Option<AgentId>, task: Option<TaskId>) -> Deeds {
        let doer =
            Doer { lease: self.job.lease, company: self.job.company, run: self.run, agent, task, key: String::new() };
        Deeds { engine: self.engine.clone(), watchdog: self.watchdog.clone(), doer }
    }

    /// What the attempt has spent so far.
    pub fn booked(&self) -> Nanos {
        Nanos(self.booked.load(Ordering::Relaxed))
    }

    /// Notes in the audit log that a rule has denied a tool to the step.
    pub async fn denied(&self, tool: &str, rule: &str) -> Result<(), Failure> {
        let noted = acting::denied(self.engine, self.job.company, (self.run, self.job.step), (tool, rule));
        let noted = self.watchdog.answer("a denial", noted).await;
        noted.map_err(|error| {
            Failure::transient(format!("{rule} forbids this call, and that could not be noted: {error}"))
        })
    }

    /// That of the work with a key, which is the same over all tries of it.
    pub fn of(&self, key: &str, agent: AgentId, category: &'static str) -> Journal<'_> {
        let work = Work {
            lease: self.job.lease,
            company: self.job.company,
            run: self.run,
            step: self.job.step,
            attempt: self.job.attempt,
            agent,
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
    pub turns: Vec<conversation::Turn>,
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
        let (pool, work) = (self.of.engine.pool.clone(), self.work.clone());
        let entries = self.again("read", move || {
            let (pool, work) = (pool.clone(), work.clone());
            async move { Ok(store::load(&pool, &work).await?) }
        });
        written(entries.await?)
    }

    /// Reserves what a turn may cost and notes that it is to be asked for, if it may be.
    pub async fn turn_begins(&self, turn: &Turn) -> Result<Asked, Failure> {
        let (engine, work, turn) = (self.of.engine.clone(), self.work.clone(), turn.clone());
        let asked = self.again("begun", move || {
            let (engine, work, turn) = (engine.clone(), work.clone(), turn.clone());
            async move { spending::begin(&engine, &work, &turn).await }
        });
        let asked = asked.await?;
        self.of.held.fetch_or(matches!(asked, Asked::Held), Ordering::Relaxed);
        Ok(asked)
    }

    /// Writes down what a turn came to, and books what it cost.
    pub async fn turn_ended(&self, turn: &Turn, mut came: Came) -> Result<(), Failure> {
        if let Came::Answer { response, .. } = &mut came {
            storable::without_nul(response);
        }
        let (engine, work, turn) = (self.of.engine.clone(), self.work.clone(), turn.clone());
        let ended = self.again("ended", move || {
            let (engine, work, turn, came) = (engine.clone(), work.clone(), turn.clone(), came.clone());
            async move { spending::end(&engine, &work, &turn, &came).await }
        });
        let booked = ended.await?.ok_or_else(lost)?;
        self.of.booked.fetch_add(booked.0, Ordering::Relaxed);
        Ok(())
    }

    /// What the agent remembers, as much as it is told.
    pub async fn remembered(&self) -> Result<Map<String, Value>, Failure> {
        let (engine, work) = (self.of.engine.clone(), self.work.clone());
        self.again("begun", move || {
            let (engine, work) = (engine.clone(), work.clone());
            async move { deeds::remembered(&engine, work.company, (work.agent, work.run)).await }
        })
        .await
    }

    /// Remembers what an answer asks for, once for each key of it; what cannot be kept fails
    /// the turn with the reason.
    pub async fn remember(&self, key: &str, memory: &Map<String, Value>, by: &Deeds) -> Result<(), Failure> {
        if memory.len() > MEMORIES_MAX {
            return Err(Failure::invalid(format!(
                "an answer may remember {MEMORIES_MAX} things at once, not {}",
                memory.len()
            )));
        }
        for (name, value) in memory {
            let mut by = by.clone();
            by.doer.agent = Some(self.work.agent);
            let params = Map::from_iter([("key".into(), name.as_str().into()), ("value".into(), value.clone())]);
            by.perform("memory.write", params, format!("{key}/memory/{name}")).await?;
        }
        Ok(())
    }

    /// Notes that a tool is to be called, if it may be.
    pub async fn acts(&self, call: &acting::Call) -> Result<May, Failure> {
        let (engine, work, call) = (self.of.engine.clone(), self.work.clone(), call.clone());
        let may = self.again("begun", move || {
            let (engine, work, call) = (engine.clone(), work.clone(), call.clone());
            async move { acting::begin(&engine, &work, &call).await }
        });
        let may = may.await?;
        self.of.held.fetch_or(matches!(may, May::Held), Ordering::Relaxed);
        Ok(may)
    }

    /// Notes that a tool was asked for and is not called.
    pub async fn call_begins(&self, place: Place, name: &str, key: &str) -> Result<(), Failure> {
        let (pool, work) = (self.of.engine.pool.clone(), self.work.clone());
        let (name, key) = (name.to_owned(), key.to_owned());
        let begun = self.again("begun", move || {
            let (pool, work, name, key) = (pool.clone(), work.clone(), name.clone(), key.clone());
            async move { Ok(store::begin(&pool, &work, place, (&name, &key), &Begun::default()).await?) }
        });
        begun.await?.map(drop).ok_or_else(lost)
    }

    /// Why a call may not be made that a person has let through with other arguments.
    pub async fn forbids(&self, call: &acting::Call) -> Result<Option<String>, Failure> {
        let (engine, work, call) = (self.of.engine.clone(), self.work.clone(), call.clone());
        self.again("judged", move || {
            let (engine, work, call) = (engine.clone(), work.clone(), call.clone());
            async move { acting::forbids(&engine, &work, &call).await }
        })
        .await
    }

    /// Writes down what a call of a tool gave, with the digest of what was sent; nothing, where it
    /// was refused.
    pub async fn call_ended(
        &self,
        (place, tool, key): (Place, &str, &str),
        result: &ToolResult,
        sent: Option<&str>,
    ) -> Result<(), Failure> {
        let refused = sent.is_none();
        let mut response = json!(Stored { result: result.clone(), refused });
        storable::without_nul(&mut response);
        let end = End { done: true, response, cost: Nanos::ZERO, frees: true, unheard: false };
        let (engine, work, is_error) = (self.of.engine.clone(), self.work.clone(), result.is_error);
        let made = sent.map(|sent| acting::Made {
            tool: tool.to_owned(),
            key: key.to_owned(),
            sent: sent.to_owned(),
            failed: is_error,
        });
        let ended = self.again("ended", move || {
            let (engine, work, end) = (engine.clone(), work.clone(), end.clone());
            let made = made.clone();
            async move { acting::end(&engine, &work, place, &end, made.as_ref()).await }
        });
        match ended.await? {
            Ended::Now | Ended::Before => Ok(()),
            Ended::Lost => Err(lost()),
        }
    }

    /// Writes down that nobody knows what came of a call, and what the model is told of it when a
    /// person lets the work go on.
    pub async fn call_unheard(&self, place: Place, result: &ToolResult) -> Result<(), Failure> {
        let response = json!(Stored { result: result.clone(), refused: false });
        let end = End { done: false, response, cost: Nanos::ZERO, frees: true, unheard: false };
        // One of an attempt before this is this one's now.
        self.call_begins(place, &result.name, "").await?;
        let (engine, work) = (self.of.engine.clone(), self.work.clone());
        let ended = self.again("ended", move || {
            let (engine, work, end) = (engine.clone(), work.clone(), end.clone());
            async move { acting::end(&engine, &work, place, &end, None).await }
        });
        match ended.await? {
            Ended::Now | Ended::Before => Ok(()),
            Ended::Lost => Err(lost()),
        }
    }

    /// The agent goes round in circles: it is stopped until a person lets it go on.
    pub async fn break_off(&self, why: &str) -> Result<(), Failure> {
        let (engine, work, why) = (self.of.engine.clone(), self.work.clone(), why.to_owned());
        self.again("stopped", move || {
            let (engine, work, why) = (engine.clone(), work.clone(), why.clone());
            async move { agents::break_off(&engine, work.company, work.agent, &why).await }
        })
        .await
    }

    /// The agent cannot work before somebody mends something.
    pub async fn agent_fails(&self, why: &str) -> Result<(), Failure> {
        let (engine, work, why) = (self.of.engine.clone(), self.work.clone(), why.to_owned());
        self.again("stopped", move || {
            let (engine, work, why) = (engine.clone(), work.clone(), why.clone());
            async move { agents::fail(&engine, work.company, work.agent, &why).await }
        })
        .await
    }

    /// The agent is paused: its job waits, and is woken when it goes on.
    pub async fn hold(&self) -> Result<(), Failure> {
        let (engine, work) = (self.of.engine.clone(), self.work.clone());
        let held = self.again("held", move || {
            let (engine, work) = (engine.clone(), work.clone());
            async move { spending::hold(&engine, &work).await }
        });
        self.of.held.fetch_or(held.await?, Ordering::Relaxed);
        Ok(())
    }

    /// A call of the database as a task of its own, so that none is dropped half-way, and
    /// again while the database is away: what was paid for is not lost for a moment without it.
    async fn again<T, F>(&self, what: &str, call: impl Fn() -> F + Send + 'static) -> Result<T, Failure>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, EngineError>> + Send,
    {
        let watchdog = self.of.watchdog.clone();
        let tried = tokio::spawn(async move {
            let mut tries = 0;
            loop {
                match watchdog.answer("a journal", call()).await {
                    Err(EngineError::Store(error)) if error.is_passing() && tries < TRIES_MAX => {
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
                written.turns.push(conversation::Turn { reply, calls: Vec::new() });
            }
            continue;
        }
        let Some(turn) = written.turns.last_mut() else { continue };
        let called = match entry.state.as_str() {
            "begun" => Called::Begun,
            // Or failed: nobody knows what came of it, and a person has looked.
            _ => {
                let Stored { result, refused } = read(entry.response.clone())?;
                Called::Done { result, refused }
            }
        };
        turn.calls.push(Some(called));
    }
    Ok(written)
}

fn read<T: serde::de::DeserializeOwned>(response: Option<Value>) -> Result<T, Failure> {
    serde_json::from_value(response.unwrap_or_default())
        .map_err(|error| Failure::invalid(format!("the journal of the agent's work cannot be read: {error}")))
}
