//! What agents, and steps, do inside their company: give tasks, write to each other, start
//! playbooks, remember. Each deed is one transaction under the lease of the job that does it,
//! and done once for each call, however often that is made.

use std::time::Duration;

use serde_json::{Map, Value, json};
use sqlx::PgConnection;
use uuid::Uuid;

use super::start::{self, Decided};
use super::tasks::{self, CreateTask};
use super::{Engine, EngineError, FieldProblem, repeating};
use crate::domain::event::{Event, MEMORY_READ, MEMORY_WRITTEN, MESSAGE_SENT};
use crate::domain::ids::{AgentId, CompanyId, PlaybookId, RunId, TaskId};
use crate::domain::outcome::Failure;
use crate::domain::plan::DEPTH_MAX;
use crate::domain::storable;
use crate::domain::task::PRIORITIES;
use crate::store::jobs::Lease;
use crate::store::memories::{self, Memory, NewMemory};
use crate::store::{agents, beats, children, events, jobs, messages, tasks as store_tasks, tenants};

/// The longest name of something remembered, in characters.
pub const KEY_CHARS_MAX: usize = 200;
/// The largest value that is remembered, in bytes of JSON.
pub const VALUE_BYTES_MAX: usize = 64 * 1024;
/// How many things somebody remembers.
pub const KEYS_MAX: i64 = 1_000;
/// How many versions of each are kept.
pub const VERSIONS_MAX: i32 = 10;
/// The longest message, in bytes.
pub const MESSAGE_BYTES_MAX: usize = 64 * 1024;
/// How many tasks of a company may be open that agents have made, and how many runs: whoever gives
/// work to others without end stops there.
pub const OPEN_MAX: i64 = 500;
/// What one look at tasks or memories gives.
const LIST_MAX: i64 = 100;

/// Who does something.
#[derive(Debug, Clone)]
pub struct Doer {
    /// The right to write.
    pub lease: Lease,
    /// Whose.
    pub company: CompanyId,
    /// In which run.
    pub run: RunId,
    /// Which agent, where it is one.
    pub agent: Option<AgentId>,
    /// The task in whose course it is.
    pub task: Option<TaskId>,
    /// The same whenever the call is repeated.
    pub key: String,
}

/// Does what a tool of the company is asked for.
pub async fn perform(engine: &Engine, doer: &Doer, tool: &str, params: &Map<String, Value>) -> Result<Value, Failure> {
    let done = repeating(|| once(engine, doer, tool, params)).await;
    match done {
        Ok(value) => {
            engine.waker.wake();
            Ok(value)
        }
        Err(EngineError::Store(error)) if error.is_passing() => {
            Err(Failure::transient(format!("the database did not answer: {error}")))
        }
        Err(EngineError::Invalid(fields)) => {
            let told: Vec<String> = fields.iter().map(|f| format!("{}: {}", f.field, f.message)).collect();
            Err(Failure::invalid(told.join("; ")))
        }
        Err(error) => Err(Failure::invalid(error.to_string())),
    }
}

async fn once(engine: &Engine, doer: &Doer, tool: &str, params: &Map<String, Value>) -> Result<Value, EngineError> {
    let mut tx = engine.pool.begin().await?;
    if !jobs::hold_lease(&mut tx, doer.lease).await? {
        return Err(EngineError::Conflict("the attempt is no longer this worker's".into()));
    }
    let done = match tool {
        "send_message" => send(&mut tx, doer, params).await?,
        "create_task" => give(&mut tx, doer, params).await?,
        "list_tasks" => list(&mut tx, doer, params).await?,
        "run_playbook" => run(engine, &mut tx, doer, params).await?,
        "memory.write" => remember(&mut tx, doer, params).await?,
        "memory.read" => recall(&mut tx, doer, params).await?,
        "memory.search" => search(&mut tx, doer, params).await?,
        other => return Err(EngineError::Conflict(format!("the tool `{other}` is not part of this version"))),
    };
    tx.commit().await?;
    Ok(done)
}

fn text<'a>(params: &'a Map<String, Value>, names: &[&str]) -> Option<&'a str> {
    names.iter().find_map(|name| params.get(*name)?.as_str()).map(str::trim).filter(|text| !text.is_empty())
}

fn need<'a>(params: &'a Map<String, Value>, names: &[&str]) -> Result<&'a str, EngineError> {
    text(params, names).ok_or_else(|| EngineError::Conflict(format!("`{}` is required", names[0])))
}

/// An agent by its role or id.
async fn agent(tx: &mut PgConnection, company: CompanyId, name: &str) -> Result<AgentId, EngineError> {
    let found = agents::agents_of(&mut *tx, &[company.0]).await?;
    let named = found.iter().find(|agent| agent.role == name || agent.agent.to_string() == name);
    named.map(|agent| agent.agent).ok_or_else(|| {
        let roles: Vec<&str> = found.iter().map(|agent| agent.role.as_str()).collect();
        EngineError::Conflict(format!("no agent of the company has the role `{name}`; there are {}", roles.join(", ")))
    })
}

async fn send(tx: &mut PgConnection, doer: &Doer, params: &Map<String, Value>) -> Result<Value, EngineError> {
    let body = need(params, &["body", "text", "message"])?;
    if body.len() > MESSAGE_BYTES_MAX {
        return Err(EngineError::Conflict(format!("a message has at most {MESSAGE_BYTES_MAX} bytes")));
    }
    let to = match text(params, &["to", "agent", "role"]) {
        Some(name) => Some(agent(tx, doer.company, name).await?),
        None => None,
    };
    let channel = text(params, &["channel"]);
    if to.is_none() && channel.is_none() {
        return Err(EngineError::Conflict("say `to` whom (a role), or in which `channel`".into()));
    }
    if let Some(to) = to {
        beats::lock(tx, doer.company, to).await?;
    }
    let new = messages::NewMessage {
        company: doer.company,
        to,
        channel,
        from: doer.agent,
        body,
        run: doer.run,
        call: &doer.key,
    };
    let (id, is_new) = messages::insert(tx, &new).await?;
    if is_new {
        let told = json!({
            "message_id": id, "to": to, "channel": channel, "agent_id": doer.agent, "run_id": doer.run,
            "text": body.chars().take(500).collect::<String>(),
        });
        events::append(&mut *tx, doer.company, &[Event::new(MESSAGE_SENT, told)]).await?;
        if let Some(to) = to {
            beats::wake(tx, doer.company, to, "message", Duration::ZERO).await?;
        }
    }
    Ok(json!({"message_id": id, "to": to, "channel": channel}))
}

async fn give(tx: &mut PgConnection, doer: &Doer, params: &Map<String, Value>) -> Result<Value, EngineError> {
    if let Some(known) = store_tasks::by_call(tx, doer.company, &doer.key).await? {
        return Ok(told(&known));
    }
    let title = need(params, &["title", "objective"])?;
    if title.chars().count() > 500 {
        return Err(EngineError::Conflict(
            "a title has at most 500 characters; put the rest into `description`".into(),
        ));
    }
    let company = tenants::company_by_id(tx, doer.company).await?.ok_or(EngineError::NotFound("company"))?;
    if store_tasks::open_by_agents(tx, doer.company).await? >= OPEN_MAX {
        return Err(EngineError::Conflict(format!(
            "{OPEN_MAX} tasks that agents have made are open; wait for some of them"
        )));
    }
    let to = match text(params, &["role", "agent", "agent_id", "assigned_to"]) {
        Some(name) => Some(agent(tx, doer.company, name.trim_start_matches("agent.")).await?),
        None => None,
    };
    let priority = text(params, &["priority"]).unwrap_or("medium");
    if !PRIORITIES.contains(&priority) {
        return Err(EngineError::Conflict(format!("`priority` is one of {}", PRIORITIES.join(", "))));
    }
    let needs = params.get("needs").and_then(Value::as_array).into_iter().flatten();
    let needs: Result<Vec<TaskId>, _> = needs.map(|id| id.as_str().unwrap_or_default().parse()).collect();
    let needs = needs.map_err(|_| EngineError::Conflict("`needs` is a list of ids of tasks, `tsk_…`".into()))?;
    let metadata = params.get("metadata").filter(|m| m.is_object()).cloned().unwrap_or_else(|| json!({}));
    let request = CreateTask {
        title: title.to_owned(),
        description: text(params, &["description", "instructions"]).map(str::to_owned),
        agent: to,
        priority: priority.to_owned(),
        metadata,
        needs,
        by: doer.agent,
        call: Some(doer.key.clone()),
        // What is done by a run that serves a directive does, too.
        parent: match doer.task {
            Some(task) => Some(task),
            None => children::root(tx, doer.company, doer.run).await?,
        },
    };
    let row = tasks::create(tx, &company, &request).await?;
    Ok(told(&row))
}

fn told(row: &store_tasks::TaskRow) -> Value {
    json!({
        "task_id": row.task(), "title": row.title, "status": row.status, "agent_id": row.agent_id.map(AgentId),
        "result": row.result, "error": row.error,
    })
}

async fn list(tx: &mut PgConnection, doer: &Doer, params: &Map<String, Value>) -> Result<Value, EngineError> {
    let filter = store_tasks::TaskFilter {
        status: text(params, &["status"]),
        agent: match text(params, &["role", "agent"]) {
            Some(name) => Some(agent(tx, doer.company, name).await?),
            None => None,
        },
        ..store_tasks::TaskFilter::default()
    };
    let rows = store_tasks::list(tx, doer.company, filter, LIST_MAX).await?;
    Ok(json!({"tasks": rows.iter().map(told).collect::<Vec<_>>()}))
}

async fn run(
    engine: &Engine,
    tx: &mut PgConnection,
    doer: &Doer,
    params: &Map<String, Value>,
) -> Result<Value, EngineError> {
    let name = need(params, &["playbook", "name", "playbook_id"])?;
    let id = match name.parse::<PlaybookId>() {
        Ok(id) => id,
        Err(_) => children::playbook(tx, doer.company, name)
            .await?
            .ok_or_else(|| EngineError::Conflict(format!("there is no playbook `{name}`")))?,
    };
    let given = ["params", "inputs"].iter().find_map(|key| params.get(*key)?.as_object()).cloned().unwrap_or_default();
    let key = format!("call:{}", doer.key);
    let started = match start::decide(engine, &mut *tx, None, (doer.company, id), given, "agent", Some(&key)).await? {
        Decided::New(new) => {
            let depth = children::depth(tx, doer.company, doer.run).await?.unwrap_or(0) + 1;
            if depth > DEPTH_MAX {
                let message = format!("runs begin each other more than {DEPTH_MAX} deep");
                return Err(EngineError::Conflict(message));
            }
            if children::open_by_agents(tx, doer.company, OPEN_MAX).await? >= OPEN_MAX {
                let message = format!("{OPEN_MAX} runs that agents have begun are open; wait for some of them");
                return Err(EngineError::Conflict(message));
            }
            let started = start::start_in(&mut *tx, *new).await?;
            children::follow(tx, doer.company, (started.run, doer.run), depth).await?;
            started
        }
        Decided::Known(known) => known,
    };
    Ok(json!({"run_id": started.run, "playbook_id": id, "status": started.status.as_str()}))
}

/// Whose memory is meant: the agent's own, or that of all.
fn owner(doer: &Doer, params: &Map<String, Value>) -> Result<Uuid, EngineError> {
    match (text(params, &["scope"]), doer.agent) {
        (Some("company"), _) | (None, None) => Ok(doer.company.0),
        (None | Some("agent"), Some(agent)) => Ok(agent.0),
        (Some("agent"), None) => {
            Err(EngineError::Conflict("only agents have a memory of their own; use `scope: company`".into()))
        }
        (Some(other), _) => Err(EngineError::Conflict(format!("`scope` is `agent` or `company`, not `{other}`"))),
    }
}

async fn remember(tx: &mut PgConnection, doer: &Doer, params: &Map<String, Value>) -> Result<Value, EngineError> {
    let (key, owner) = (need(params, &["key"])?, owner(doer, params)?);
    let value = params.get("value").filter(|value| !value.is_null());
    let by = (doer.agent, Some(doer.run), Some(doer.key.as_str()));
    let version = write(tx, (doer.company, owner), key, value, by).await?;
    Ok(json!({"key": key, "version": version}))
}

/// Writes something into a memory; nothing for a value forgets it. The same call again writes
/// nothing.
pub async fn write(
    tx: &mut PgConnection,
    (company, owner): (CompanyId, Uuid),
    key: &str,
    value: Option<&Value>,
    (agent, run, call): (Option<AgentId>, Option<RunId>, Option<&str>),
) -> Result<i32, EngineError> {
    if key.trim().is_empty() || key.chars().count() > KEY_CHARS_MAX {
        let message = format!("must be 1 to {KEY_CHARS_MAX} characters");
        return Err(EngineError::Invalid(vec![FieldProblem::new("key", message)]));
    }
    if let Some(Err(why)) = value.map(|value| storable::to_json(value, VALUE_BYTES_MAX)) {
        return Err(EngineError::Invalid(vec![FieldProblem::new("value", why.to_string())]));
    }
    memories::lock(tx, owner).await?;
    if let Some(call) = call
        && let Some(version) = memories::by_call(tx, company, call).await?
    {
        return Ok(version);
    }
    let is_new = memories::get(&mut *tx, company, &[owner], key).await?.is_none();
    if is_new && value.is_some() && memories::count(tx, company, owner).await? >= KEYS_MAX {
        return Err(EngineError::Conflict(format!(
            "{KEYS_MAX} things are remembered already; forget some (`value: null`)"
        )));
    }
    let version =
        memories::write(tx, &NewMemory { company, owner, key, value, agent, run, call }, VERSIONS_MAX).await?;
    let told = json!({
        "key": key, "version": version, "scope": if owner == company.0 { "company" } else { "agent" },
        "agent_id": agent, "run_id": run, "forgotten": value.is_none(),
    });
    events::append(&mut *tx, company, &[Event::new(MEMORY_WRITTEN, told)]).await?;
    Ok(version)
}

fn shown(memory: &Memory, company: CompanyId) -> Value {
    json!({
        "key": memory.key, "value": memory.value, "version": memory.version, "written_at": memory.written_at,
        "scope": if memory.owner == company.0 { "company" } else { "agent" },
    })
}

/// The memories that somebody sees: its own first.
fn owners(doer: &Doer, params: &Map<String, Value>) -> Result<Vec<Uuid>, EngineError> {
    match text(params, &["scope"]) {
        Some(_) => Ok(vec![owner(doer, params)?]),
        None => Ok(doer.agent.map(|agent| agent.0).into_iter().chain([doer.company.0]).collect()),
    }
}

async fn recall(tx: &mut PgConnection, doer: &Doer, params: &Map<String, Value>) -> Result<Value, EngineError> {
    let owners = owners(doer, params)?;
    match text(params, &["key"]) {
        Some(key) => {
            let found = memories::get(&mut *tx, doer.company, &owners, key).await?;
            was_read(tx, doer.company, (doer.agent, doer.run), found.iter()).await?;
            Ok(found.map_or_else(|| json!({"key": key, "value": null}), |memory| shown(&memory, doer.company)))
        }
        None => {
            let found = memories::latest(&mut *tx, doer.company, &owners, LIST_MAX).await?;
            Ok(json!({"keys": found.iter().map(|memory| memory.key.as_str()).collect::<Vec<_>>()}))
        }
    }
}

async fn search(tx: &mut PgConnection, doer: &Doer, params: &Map<String, Value>) -> Result<Value, EngineError> {
    let words = need(params, &["query", "q"])?;
    let found = memories::search(&mut *tx, doer.company, &owners(doer, params)?, words, 20).await?;
    was_read(tx, doer.company, (doer.agent, doer.run), found.iter()).await?;
    Ok(json!({"found": found.iter().map(|memory| shown(memory, doer.company)).collect::<Vec<_>>()}))
}

/// Tells what of memories was read, and which versions of it.
async fn was_read(
    tx: &mut PgConnection,
    company: CompanyId,
    (agent, run): (Option<AgentId>, RunId),
    read: impl Iterator<Item = &Memory>,
) -> Result<(), EngineError> {
    let scope = |memory: &Memory| if memory.owner == company.0 { "company" } else { "agent" };
    let read: Vec<Value> =
        read.map(|memory| json!({"key": memory.key, "version": memory.version, "scope": scope(memory)})).collect();
    if !read.is_empty() {
        let told = json!({"agent_id": agent, "run_id": run, "read": read});
        events::append(&mut *tx, company, &[Event::new(MEMORY_READ, told)]).await?;
    }
    Ok(())
}

/// What an agent remembers that it is told at the beginning of its work: what was written
/// last, as much as fits.
pub async fn remembered(
    engine: &Engine,
    company: CompanyId,
    (agent, run): (AgentId, RunId),
) -> Result<Map<String, Value>, EngineError> {
    let mut left = TOLD_BYTES_MAX;
    let mut fits = |memory: &Memory| {
        let size = memory.key.len() + memory.value.as_ref().map_or(0, |value| value.to_string().len());
        left = left.checked_sub(size)?;
        Some(())
    };
    let found = memories::latest(&engine.pool, company, &[agent.0, company.0], LIST_MAX).await?;
    let found: Vec<Memory> = found.into_iter().map_while(|memory| fits(&memory).map(|()| memory)).collect();
    if !found.is_empty() {
        let mut tx = engine.pool.begin().await?;
        was_read(&mut tx, company, (Some(agent), run), found.iter()).await?;
        tx.commit().await?;
    }
    let mut told = Map::new();
    for memory in found {
        told.entry(memory.key).or_insert(memory.value.unwrap_or_default());
    }
    Ok(told)
}

/// So much of a memory is told with a task, in bytes; the rest is looked up.
const TOLD_BYTES_MAX: usize = 16 * 1024;
