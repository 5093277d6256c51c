//! Starting runs.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use chrono::{DateTime, Utc};
use serde_json::{Map, Value, json};
use sqlx::{Connection, Executor, PgConnection, PgPool, Postgres};
use uuid::Uuid;

use super::advance::{passing, place, sleeping, told};
use super::batch::Batcher;
use super::gates::{approval_of, waiting_on};
use super::secrets;
use super::slots::{self, Entry};
use super::{Engine, EngineError, FieldProblem, Waker, repeating};
use crate::domain::company::works;
use crate::domain::event::{APPROVAL_REQUESTED, Event, PLAYBOOK_QUEUED, PLAYBOOK_STARTED, PLAYBOOK_SUSPENDED};
use crate::domain::governance::{Action, Policy};
use crate::domain::ids::{AccountId, ApprovalId, CompanyId, PlaybookId, RunId, VersionId};
use crate::domain::outcome::Failure;
use crate::domain::plan::{FAN_LOOK, JUNCTION, Next, RunContext};
use crate::domain::playbook::load::TOOLS;
use crate::domain::playbook::model::{Mode, STEP_TIMEOUT};
use crate::domain::playbook::{Playbook, inputs};
use crate::domain::run::RunStatus;
use crate::domain::storable;
use crate::failpoint;
use crate::store::jobs::kind;
use crate::store::runs::{NewRun, RunRow, StartedRun};
use crate::store::slots::Group;
use crate::store::steps::Passing;
use crate::store::{StoreError, approvals, playbooks, runs, slots as store_slots, steps};

/// The largest parameters of a run, in bytes of JSON.
pub const PARAMS_BYTES_MAX: usize = 1024 * 1024;
/// How many runs one statement of a bulk start makes.
pub const BULK_MAX: usize = 1_000;

/// A run that has begun.
#[derive(Debug, Clone)]
pub struct Started {
    /// Which.
    pub run: RunId,
    /// Its status: running, or suspended behind a first gate.
    pub status: RunStatus,
    /// Its parameters, defaults filled in.
    pub params: Value,
    /// When, by the database's clock.
    pub at: DateTime<Utc>,
}

/// Starts a run of a playbook's current version.
pub async fn start_run(
    engine: &Engine,
    company: CompanyId,
    playbook: PlaybookId,
    params: Map<String, Value>,
    trigger: &'static str,
) -> Result<Started, EngineError> {
    let mut tx = engine.pool.begin().await?;
    let new = match decide(engine, &mut tx, None, (company, playbook), params, trigger, None).await? {
        Decided::Known(run) => return Ok(run),
        Decided::New(new) => new,
    };
    if new.is_keyed() {
        let started = start_in(&mut tx, *new).await?;
        tx.commit().await?;
        engine.waker.wake();
        return Ok(started);
    }
    drop(tx);
    start_decided(engine, *new).await
}

/// Writes a start that is decided, together with those of others.
pub async fn start_decided(engine: &Engine, new: Prepared) -> Result<Started, EngineError> {
    let (run, status, params) = (new.run.run, new.run.status, new.context.inputs.as_ref().clone());
    let at = match &engine.starts {
        Some(starts) => starts.write(new).await?,
        None => {
            let times = insert(&engine.pool, &engine.waker, std::slice::from_ref(&new)).await?;
            times.into_iter().next().unwrap_or_default()
        }
    };
    Ok(Started { run, status, params, at })
}

/// Writes a start that is decided, in the caller's transaction, who wakes
/// workers after it.
pub async fn start_in(tx: &mut PgConnection, new: Prepared) -> Result<Started, EngineError> {
    let (run, status, params) = (new.run.run, new.run.status, new.context.inputs.as_ref().clone());
    let at = insert_batch(tx, std::slice::from_ref(&new)).await?.into_iter().next().unwrap_or_default();
    Ok(Started { run, status, params, at })
}

/// A start that is decided.
#[derive(Debug)]
pub enum Decided {
    /// A run is to be written; one with a key in the same transaction.
    New(Box<Prepared>),
    /// There is a run with the same key.
    Known(Started),
}

/// Decides a start by what the caller may see: the transaction is its, as is the
/// account, where it is not the engine itself. Of the playbook's runs one has the
/// key: its own, where it makes one, else that of the caller.
pub async fn decide(
    engine: &Engine,
    connection: &mut PgConnection,
    account: Option<AccountId>,
    (company, playbook): (CompanyId, PlaybookId),
    params: Map<String, Value>,
    trigger: &'static str,
    key: Option<&str>,
) -> Result<Decided, EngineError> {
    let (version, policy) = may_start(&mut *connection, account, company, playbook).await?;
    let plan = plan_of(engine, &mut *connection, company, version).await?;
    may_run(&mut *connection, company, &plan).await?;
    policy_allows(&policy, &plan)?;
    let params = checked_params(&plan, params)?;
    let beginning = Beginning { policy, ..Beginning::default() };
    let new = prepare((company, playbook, version), plan, params, trigger, beginning);
    let wrong = |failure: Failure| EngineError::Invalid(vec![FieldProblem::new("idempotency_key", failure.message)]);
    let field = |failure: Failure| EngineError::Invalid(vec![FieldProblem::new("params", failure.message)]);
    let concurrency = new.context.concurrency_key().map_err(field)?;
    let own = new.context.idempotency_key().map_err(wrong)?.map(|own| format!("key:{own}"));
    let known = |run: RunRow| {
        let at = run.started_at.unwrap_or_default();
        Decided::Known(Started { run: run.run, status: run.status, params: run.params, at })
    };
    let mut new = new;
    if let Some(key) = own.or_else(|| key.map(str::to_owned)) {
        if let Some(run) = runs::by_key(&mut *connection, company, playbook, &key).await? {
            return Ok(known(run));
        }
        new = new.once(key);
    }
    if let Some(key) = concurrency {
        let plan = Arc::clone(&new.context.playbook);
        let Some(rule) = &plan.concurrency else { return Ok(Decided::New(Box::new(new))) };
        let group = Group { company, playbook, key: &key };
        match slots::enter(engine, &mut *connection, group, rule).await? {
            Entry::Begins => {}
            Entry::Waits => new = new.queued(),
            Entry::Is(run) => {
                let run = runs::get(&mut *connection, company, run).await?.ok_or(EngineError::NotFound("run"))?;
                return Ok(known(run));
            }
        }
        new.concurrency_key = Some(key);
    }
    Ok(Decided::New(Box::new(new)))
}

/// Whether runs of a playbook may be started now; its current version.
pub(super) async fn may_start(
    connection: &mut PgConnection,
    account: Option<AccountId>,
    company: CompanyId,
    playbook: PlaybookId,
) -> Result<(VersionId, Arc<Policy>), EngineError> {
    let found =
        playbooks::for_start(connection, account, company, playbook).await?.ok_or(EngineError::NotFound("playbook"))?;
    if found.status != "active" {
        return Err(EngineError::Conflict(format!("the playbook is {}; only an active one runs", found.status)));
    }
    if !works(&found.company_status) {
        return Err(EngineError::Conflict(format!(
            "the company is {}; {} to run playbooks",
            found.company_status,
            if found.company_status == "paused" { "resume it" } else { "make another one" }
        )));
    }
    Ok((found.version, found.policy))
}

/// Whether a playbook may be run at all: nothing is begun that a rule would stop half-way.
pub(super) fn policy_allows(policy: &Policy, plan: &Playbook) -> Result<(), EngineError> {
    if plan.execution.mode == Mode::Blocked {
        let why = "the playbook's execution.mode is `blocked`; change it to `auto` or `review` to run it";
        return Err(EngineError::Governance(why.to_owned()));
    }
    let steps = plan.steps.iter().chain(&plan.closing);
    for step in steps.filter(|step| TOOLS.contains(&step.action.as_str())) {
        if let Some(rule) = policy.forbids(&Action::of_tool(&step.action)) {
            let why = format!("step `{}` uses {}, which {rule} forbids", step.id, step.action);
            return Err(EngineError::Governance(why));
        }
    }
    Ok(())
}

/// Starts many runs of a playbook in one transaction, all with the same
/// parameters.
pub async fn start_many(
    engine: &Engine,
    company: CompanyId,
    playbook: PlaybookId,
    count: usize,
    params: Map<String, Value>,
) -> Result<Vec<RunId>, EngineError> {
    let found = playbooks::for_start(&engine.pool, None, company, playbook).await?;
    let version = found.ok_or(EngineError::NotFound("playbook"))?.version;
    let plan = plan_of(engine, &engine.pool, company, version).await?;
    let params = checked_params(&plan, params)?;
    let all: Vec<Prepared> = (0..count)
        .map(|_| {
            let plan = Arc::clone(&plan);
            prepare((company, playbook, version), plan, params.clone(), "manual", Beginning::default())
        })
        .collect();
    insert(&engine.pool, &engine.waker, &all).await?;
    Ok(all.iter().map(|new| new.run.run).collect())
}

pub(super) async fn plan_of(
    engine: &Engine,
    executor: impl Executor<'_, Database = Postgres>,
    company: CompanyId,
    version: VersionId,
) -> Result<Arc<Playbook>, EngineError> {
    engine
        .plans
        .get(executor, &[(company.0, version.0)])
        .await?
        .remove(&version.0)
        .ok_or_else(|| EngineError::Store(StoreError::Unreadable(format!("no version {version}"))))
}

/// A stored text that this version cannot read any more cannot be run, nor one whose
/// secrets are not there.
pub(super) async fn may_run(tx: &mut PgConnection, company: CompanyId, plan: &Playbook) -> Result<(), EngineError> {
    match &plan.unreadable {
        Some(reason) => Err(EngineError::Conflict(format!("{reason}; send a corrected version"))),
        None => secrets::has_all(tx, company, plan).await,
    }
}

pub(super) fn checked_params(plan: &Playbook, params: Map<String, Value>) -> Result<Value, EngineError> {
    let params = inputs::resolve(plan, params).map_err(|problems| {
        let fields = problems.into_iter().map(|p| FieldProblem::new(format!("params.{}", p.name), p.message));
        EngineError::Invalid(fields.collect())
    })?;
    let params = Value::Object(params);
    storable::to_json(&params, PARAMS_BYTES_MAX)
        .map_err(|error| EngineError::Invalid(vec![FieldProblem::new("params", error.to_string())]))?;
    Ok(params)
}

/// Starts of a process, committed together.
pub(super) type Starts = Batcher<Prepared, DateTime<Utc>>;

pub(super) fn group_commit(pool: PgPool, waker: Waker) -> Starts {
    Batcher::start(move |all: Arc<Vec<Prepared>>| {
        let (pool, waker) = (pool.clone(), waker.clone());
        async move {
            match insert(&pool, &waker, &all).await {
                Ok(times) => Ok(times),
                Err(EngineError::Store(error)) => Err(error),
                Err(other) => Err(StoreError::Unreadable(other.to_string())),
            }
        }
    })
}

/// A run whose start is decided.
#[derive(Debug)]
pub struct Prepared {
    run: NewRun,
    context: RunContext,
    passed: Passing,
    gate: Option<(ApprovalId, crate::domain::plan::Gate)>,
    /// What it has in common with others that are not to be under way at once.
    concurrency_key: Option<String>,
    /// The step that it begins with.
    begins: usize,
}

impl Prepared {
    /// Whether one statement writes it.
    fn is_plain(&self) -> bool {
        self.gate.is_none() && self.passed.is_empty() && self.concurrency_key.is_none()
    }

    /// The same, but for that it waits for its turn before it begins.
    fn queued(mut self) -> Self {
        let graph = self.context.playbook.graph;
        self.gate = None;
        self.passed = Passing::default();
        let data = self.run.events.first().map(|event| event.data.clone()).unwrap_or_default();
        self.run = NewRun {
            status: RunStatus::Queued,
            waiting_on: None,
            first_step: if graph { JUNCTION } else { place(self.begins) },
            job_kind: if graph { kind::STEP } else { kind::BEGIN },
            delay: FAN_LOOK,
            timeout: STEP_TIMEOUT,
            events: vec![Event::new(PLAYBOOK_QUEUED, data)],
            ..self.run
        };
        self
    }

    /// The same, more or less urgent than others of its company: lower is earlier.
    #[must_use]
    pub fn with_priority(mut self, priority: i16) -> Self {
        self.run.priority = priority;
        self
    }

    /// The same, once for each key.
    fn once(mut self, key: String) -> Self {
        self.run.dedup_key = Some(key);
        self
    }

    /// Whether it is the only one of its playbook for something, and must be
    /// written in the transaction that has looked for others.
    pub fn is_keyed(&self) -> bool {
        self.run.dedup_key.is_some() || self.concurrency_key.is_some()
    }

    /// The group whose runs it waits for, where it does.
    pub(super) fn waits_for(&self) -> Option<&str> {
        self.concurrency_key.as_deref().filter(|_| self.run.status == RunStatus::Queued)
    }

    /// The run's id, chosen here.
    pub(super) fn run(&self) -> RunId {
        self.run.run
    }

    /// Whether a step of it has a rubric.
    pub(super) fn grades(&self) -> bool {
        self.context.playbook.grades()
    }
}

/// Where a run begins: at its first step, unless it plays another again.
#[derive(Debug, Default)]
pub(super) struct Beginning {
    pub step: usize,
    /// What the steps before it have left.
    pub outputs: HashMap<usize, Value>,
    /// Why those have failed that the old run went past.
    pub failures: HashMap<usize, Value>,
    /// What those came to by their rubrics.
    pub scores: HashMap<usize, Value>,
    pub replay_of: Option<RunId>,
    /// What the company allows.
    pub policy: Arc<Policy>,
}

/// Decides how a run begins: at work, or behind a first gate.
pub(super) fn prepare(
    (company, playbook, version): (CompanyId, PlaybookId, VersionId),
    plan: Arc<Playbook>,
    params: Value,
    trigger: &'static str,
    beginning: Beginning,
) -> Prepared {
    let text = params.to_string();
    let mut context = RunContext {
        outputs: Arc::new(beginning.outputs),
        failures: beginning.failures,
        scores: beginning.scores,
        policy: beginning.policy,
        ..RunContext::new(company, playbook, RunId::new(), plan, Arc::new(params))
    };
    let walk = context.begins_at(beginning.step);
    let passed = passing(&walk.passed);
    // Past everything there is nothing to do but to end, which is a job's, too.
    let (first, delay) = match &walk.next {
        Next::Step(step) => (place(*step), Duration::ZERO),
        Next::Gate(gate) => (place(gate.step), gate.approval.timeout),
        Next::Sleep { step, delay } => (place(*step), *delay),
        Next::End { .. } | Next::Closed | Next::Junction => (JUNCTION, Duration::ZERO),
    };
    let mut started = json!({"playbook_id": playbook, "playbook": context.playbook.name, "trigger": trigger});
    if let Some(of) = beginning.replay_of {
        started["replay_of"] = json!(of);
    }
    if let Some(told) = told(&context, &walk.passed) {
        started["passed"] = told;
    }
    let mut events = vec![Event::new(PLAYBOOK_STARTED, started)];
    let waits = match &walk.next {
        Next::Sleep { step, .. } => Some(sleeping(&context, *step)),
        _ => None,
    };
    let gate = match walk.next {
        Next::Gate(gate) => Some((ApprovalId::new(), gate)),
        _ => None,
    };
    let waits = match &gate {
        Some((id, gate)) => {
            events.push(Event::new(APPROVAL_REQUESTED, json!({"approval_id": id, "context": gate.context})));
            Some(waiting_on(*id))
        }
        None => waits,
    };
    // A pause is told with what comes before it: a run that sleeps is few rows.
    match (&waits, &gate) {
        (Some(waiting), Some(_)) => events.push(Event::new(PLAYBOOK_SUSPENDED, json!({"waiting_on": waiting}))),
        (Some(waiting), None) => events[0].data["sleeps"] = waiting[0]["id"].clone(),
        (None, _) => {}
    }
    let planned = usize::try_from(first).ok().and_then(|first| context.playbook.step(first));
    let timeout = planned.map_or(STEP_TIMEOUT, |step| step.timeout);
    let run = NewRun {
        company,
        run: context.run,
        playbook,
        version,
        status: if waits.is_some() { RunStatus::Suspended } else { RunStatus::Running },
        trigger,
        params: text,
        waiting_on: waits.as_ref().map(Value::to_string),
        first_step: first,
        replay_of: beginning.replay_of,
        dedup_key: None,
        priority: 0,
        job_kind: match (&gate, waits.is_some()) {
            (Some(_), _) => kind::GATE_TIMEOUT,
            (None, true) => kind::TIMER,
            (None, false) => kind::STEP,
        },
        delay,
        timeout,
        events,
    };
    Prepared { run, context, passed, gate, concurrency_key: None, begins: beginning.step }
}

/// How often a start is written again whose answer was lost.
const UNANSWERED_TRIES: u32 = 3;

/// Writes the runs; says when each began, in order. Their ids are chosen, so
/// that where an answer was lost, writing again finds what has landed unseen
/// (hazard H8): a client that is told of an error need not fear a second run,
/// unless the database stays away.
async fn insert(pool: &PgPool, waker: &Waker, all: &[Prepared]) -> Result<Vec<DateTime<Utc>>, EngineError> {
    let mut tries = 0;
    loop {
        match repeating(|| insert_once(pool, waker, all)).await {
            Err(EngineError::Store(StoreError::Conflict { constraint })) if tries > 0 && constraint == "runs_pkey" => {
                let ids: Vec<(CompanyId, RunId)> = all.iter().map(|p| (p.run.company, p.run.run)).collect();
                waker.wake();
                return Ok(runs::started_at(pool, &ids).await?);
            }
            Err(EngineError::Store(StoreError::Unavailable(error))) if tries < UNANSWERED_TRIES => {
                tries += 1;
                tracing::warn!(%error, tries, runs = all.len(), "a start had no answer and is written again");
                tokio::time::sleep(Duration::from_millis(100) * 2u32.pow(tries)).await;
            }
            other => return other,
        }
    }
}

async fn insert_once(pool: &PgPool, waker: &Waker, all: &[Prepared]) -> Result<Vec<DateTime<Utc>>, EngineError> {
    if failpoint::reach("start.before_commit").await {
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    let mut connection = pool.acquire().await.map_err(StoreError::from)?;
    let times = if all.len() <= BULK_MAX && all.iter().all(Prepared::is_plain) {
        // One statement is its own transaction.
        insert_batch(&mut connection, all).await?
    } else {
        let mut tx = connection.begin().await.map_err(StoreError::from)?;
        let mut times = Vec::with_capacity(all.len());
        for batch in all.chunks(BULK_MAX) {
            times.extend(insert_batch(&mut tx, batch).await?);
        }
        tx.commit().await?;
        times
    };
    if failpoint::reach("start.after_commit").await {
        // As if the answer had been lost on its way.
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    waker.wake_over(connection);
    Ok(times)
}

async fn insert_batch(connection: &mut PgConnection, batch: &[Prepared]) -> Result<Vec<DateTime<Utc>>, StoreError> {
    let new: Vec<NewRun> = batch.iter().map(|prepared| prepared.run.clone()).collect();
    let started = runs::start(&mut *connection, &new).await?;
    let started: HashMap<Uuid, StartedRun> = started.into_iter().map(|row| (row.run.0, row)).collect();
    let mut times = Vec::with_capacity(batch.len());
    for prepared in batch {
        let row = started.get(&prepared.run.run.0).ok_or(StoreError::Unavailable(sqlx::Error::RowNotFound))?;
        steps::pass(&mut *connection, prepared.run.company, prepared.run.run, &prepared.passed).await?;
        if let Some((id, gate)) = &prepared.gate {
            approvals::insert(&mut *connection, &approval_of(*id, gate, &prepared.context, row.job, None)).await?;
        }
        if let Some(key) = &prepared.concurrency_key {
            let group = Group { company: prepared.run.company, playbook: prepared.run.playbook, key };
            store_slots::join(&mut *connection, prepared.run.run, group).await?;
        }
        times.push(row.at);
    }
    Ok(times)
}
