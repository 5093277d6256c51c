//! Claiming: which jobs a worker takes, and what each attempt needs to begin,
//! loaded for all of them at once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use uuid::Uuid;

use super::{Engine, EngineError};
use crate::domain::company::works as works_on;
use crate::domain::event::{Event, PLAYBOOK_RESUMED};
use crate::domain::ids::{CompanyId, PlaybookId, RunId};
use crate::domain::plan::{Fanned, Item, RunContext};
use crate::domain::playbook::model::StepKind;
use crate::domain::run::StepStatus;
use crate::domain::storable::OUTPUT_BYTES_MAX;
use crate::failpoint;
use crate::store::agents::AgentRow;
use crate::store::fans::{self, ItemRow};
use crate::store::jobs::{self, ClaimedJob, Looked, Tenant, Turn, kind};
use crate::store::steps::LoadedRun;
use crate::store::{StoreError, agents, approvals, signals, steps};

/// A claimed job and what to do about it.
#[derive(Debug)]
pub struct Claimed {
    /// The job and its lease.
    pub job: ClaimedJob,
    /// What it is about.
    pub work: Work,
}

/// What a job is about.
#[derive(Debug)]
pub enum Work {
    /// An attempt at a step.
    Step(Box<StepWork>),
    /// The end of a gate's time.
    GateTimeout,
    /// A company's agents get ready.
    Provision,
    /// A step of a company that is halted: nothing begins.
    Halted {
        /// For good: the run is over.
        stopped: bool,
    },
    /// An agent beats.
    Heartbeat,
    /// An event goes to the runs that wait for it.
    Signal,
    /// A schedule fires.
    Schedule,
    /// What a deleted company held goes away.
    Purge,
    /// Nothing, durably.
    Noop,
    /// What it was for is over: the job only needs to go.
    Stale,
    /// This version does not know the kind: somebody else's.
    Unknown,
}

/// What an attempt at a step needs.
#[derive(Debug)]
pub struct StepWork {
    /// The run.
    pub context: RunContext,
    /// The live agents of its company, by role; empty when no step has one.
    pub agents: Arc<HashMap<String, AgentRow>>,
    /// How many steps this worker has done of the run in a row.
    pub chain: u32,
    /// When that chain began, for fairness only.
    pub chain_began: Instant,
}

/// How long a worker goes on from where its last claim ended, before it looks
/// at everything again. An urgent job that arrives in a backlog waits as long,
/// or as long as the two limits below say.
const FULL_LOOK: Duration = Duration::from_millis(100);
/// At least so many times as long as the look itself took, which walks all
/// that was claimed since the last vacuum: looks may not eat up the worker.
const FULL_LOOK_SPACING: u32 = 20;
/// But no longer than this: it may have taken long for another reason.
const FULL_LOOK_MAX: Duration = Duration::from_secs(1);
const COMPANIES_MAX: usize = jobs::COMPANIES_A_CLAIM as usize;

/// Where a worker's claims have got to.
///
/// Every claimed row leaves a dead entry at the head of the ready index until
/// it is vacuumed. A claim that began there each time would walk them all, so
/// in a backlog it goes on from the last row it took, company by company; a
/// full look every [`FULL_LOOK`], or later where looks take long, finds what has
/// come before that.
///
/// A look begins with the company after the one that was served last, in each
/// queue by itself, and with another queue each time: a worker with room for
/// one job serves everybody in turn.
#[derive(Debug)]
pub struct ClaimCursor {
    turns: Vec<Turn>,
    /// Where each company's work goes on, while there is more of it.
    tenants: Vec<Tenant>,
    /// When to look at everything again.
    look_again: Option<Instant>,
}

impl ClaimCursor {
    /// At the beginning of some queues.
    pub fn new(queues: &[String]) -> Self {
        let turns = queues.iter().map(|queue| Turn::first(queue)).collect();
        Self { turns, tenants: Vec::new(), look_again: None }
    }

    /// Whether the last claim left work behind.
    pub fn has_more(&self) -> bool {
        !self.tenants.is_empty()
    }

    /// Whether the next claim looks at everything, from the first company.
    pub fn is_full_look(&self) -> bool {
        self.goes_on().is_none() && self.begins_with_first()
    }

    fn goes_on(&self) -> Option<&[Tenant]> {
        let fresh = self.look_again.is_some_and(|at| Instant::now() < at);
        (fresh && self.has_more()).then_some(&self.tenants)
    }

    /// Remembers how far a claim got: which companies gave their whole share
    /// and so have more, and whose turn is next. `tenants` of them had work, as
    /// far as the claim has looked.
    fn note(&mut self, jobs: &[ClaimedJob], room: usize, tenants: usize, full: bool) {
        let mut taken: HashMap<(&str, Uuid), (usize, i16, i64)> = HashMap::new();
        for job in jobs {
            let entry = taken.entry((job.queue.as_str(), job.company.0)).or_insert((0, i16::MIN, 0));
            let at = (job.priority, job.lease.job);
            *entry = if at > (entry.1, entry.2) { (entry.0 + 1, at.0, at.1) } else { (entry.0 + 1, entry.1, entry.2) };
        }
        let cut = jobs.len() >= room;
        // A look that had not room for everybody, or did not begin with the
        // first company, is no ground to go on with those who were served.
        let mut goes_on = true;
        if full {
            let all_seen = !cut || taken.len() >= tenants;
            let from_first = self.begins_with_first();
            self.next_turns(taken.keys().copied(), !all_seen);
            let whole = from_first && self.begins_with_first();
            goes_on = all_seen && (whole || room >= COMPANIES_MAX * self.turns.len());
        }
        let share = room.div_ceil(tenants.max(1));
        let mut going: Vec<Tenant> = Vec::new();
        if !full && cut {
            // There was not room for all of them: the others come first now.
            going.append(&mut self.tenants);
            going.retain(|tenant| !taken.contains_key(&(tenant.queue.as_str(), tenant.company)));
        }
        let more = taken.into_iter().filter(|(_, (count, ..))| goes_on && (*count >= share || cut));
        going.extend(more.map(|((queue, company), (_, priority, job))| Tenant {
            queue: queue.to_owned(),
            company,
            priority,
            job,
        }));
        self.tenants = going;
    }

    fn begins_with_first(&self) -> bool {
        self.turns.iter().all(|turn| turn.after.is_nil())
    }

    /// After a look: each queue goes on behind the last company that it served,
    /// unless the look came to the end of it.
    fn next_turns<'a>(&mut self, served: impl Iterator<Item = (&'a str, Uuid)>, cut: bool) {
        let mut last: HashMap<&str, (Uuid, usize)> = HashMap::new();
        for (queue, company) in served {
            let entry = last.entry(queue).or_insert((company, 0));
            *entry = (entry.0.max(company), entry.1 + 1);
        }
        for turn in &mut self.turns {
            turn.after = match last.get(turn.queue.as_str()) {
                Some((company, count)) if cut || *count >= COMPANIES_MAX => *company,
                // Cut off before its turn: it is still to come.
                None if cut => turn.after,
                _ => Uuid::nil(),
            };
        }
        if self.turns.len() > 1 {
            self.turns.rotate_left(1);
        }
    }
}

/// Takes up to `room` jobs for a session.
pub async fn claim(
    engine: &Engine,
    session: i64,
    cursor: &mut ClaimCursor,
    room: usize,
) -> Result<Vec<ClaimedJob>, EngineError> {
    if failpoint::reach("claim.before").await {
        return Ok(Vec::new());
    }
    let began = Instant::now();
    let limit = i64::try_from(room).unwrap_or(i64::MAX);
    let (Looked { jobs, tenants }, full) = match cursor.goes_on() {
        Some(tenants) => {
            let jobs = jobs::claim_on(&engine.claims, session, tenants, limit).await?;
            (Looked { jobs, tenants: tenants.len() }, false)
        }
        None => (jobs::claim(&engine.claims, session, &cursor.turns, limit).await?, true),
    };
    if !jobs.is_empty() && failpoint::reach("claim.after_commit").await {
        // As if the answer had been lost on its way.
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    cursor.note(&jobs, room, tenants, full);
    if full {
        cursor.look_again =
            Some(Instant::now() + (began.elapsed() * FULL_LOOK_SPACING).clamp(FULL_LOOK, FULL_LOOK_MAX));
    }
    Ok(jobs)
}

/// Jobs that are attempts at steps.
const STEPS: [&str; 3] = [kind::STEP, kind::TIMER, kind::ITEM];

/// Loads what claimed jobs need, set-based; gives them back with the error
/// when it cannot.
pub async fn load(engine: &Engine, claimed: Vec<ClaimedJob>) -> Result<Vec<Claimed>, (EngineError, Vec<ClaimedJob>)> {
    let is_step = |job: &&ClaimedJob| STEPS.contains(&job.kind.as_str());
    let steps: Vec<&ClaimedJob> = claimed.iter().filter(is_step).collect();
    let mut works: HashMap<i64, Work> = HashMap::new();
    if !steps.is_empty() {
        works = match load_steps(engine, &steps).await {
            Ok(works) => works,
            Err(error) => return Err((error, claimed)),
        };
    }
    Ok(claimed
        .into_iter()
        .map(|job| {
            let work = match job.kind.as_str() {
                kind::STEP | kind::TIMER | kind::ITEM => works.remove(&job.lease.job).unwrap_or(Work::Stale),
                kind::GATE_TIMEOUT => Work::GateTimeout,
                kind::PROVISION => Work::Provision,
                kind::HEARTBEAT => Work::Heartbeat,
                kind::SIGNAL => Work::Signal,
                kind::SCHEDULE => Work::Schedule,
                kind::PURGE => Work::Purge,
                kind::NOOP => Work::Noop,
                _ => Work::Unknown,
            };
            Claimed { job, work }
        })
        .collect())
}

async fn load_steps(engine: &Engine, claimed: &[&ClaimedJob]) -> Result<HashMap<i64, Work>, EngineError> {
    failpoint::reach("load.before").await;
    let (companies, run_ids): (Vec<Uuid>, Vec<Uuid>) =
        // Of a run with many lanes, once.
        claimed
            .iter()
            .filter_map(|job| Some((job.company.0, job.ref_id?)))
            .collect::<HashSet<_>>()
            .into_iter()
            .unzip();
    let mut runs = steps::load_runs(&engine.pool, &companies, &run_ids).await?;
    resume(engine, claimed, &mut runs).await?;
    let (runs, halted): (Vec<_>, Vec<_>) = runs.into_iter().partition(|run| works_on(&run.company_status));
    let halted: HashMap<Uuid, bool> =
        halted.into_iter().map(|run| (run.run.0, run.company_status == "stopped")).collect();
    let wanted: Vec<(Uuid, Uuid)> = runs.iter().map(|run| (run.company.0, run.version)).collect();
    let plans = engine.plans.get(&engine.pool, &wanted).await?;
    let mut contexts: HashMap<Uuid, RunContext> = runs
        .into_iter()
        .filter_map(|run| {
            let playbook = Arc::clone(plans.get(&run.version)?);
            let inputs = Arc::new(run.params);
            let context = RunContext {
                // What we have written ourselves.
                ending: run.ending.and_then(|ending| serde_json::from_value(ending).ok()),
                closings: u32::try_from(run.closings).unwrap_or(0),
                ..RunContext::new(run.company, PlaybookId(run.playbook), run.run, playbook, inputs)
            };
            Some((run.run.0, context))
        })
        .collect();
    load_outputs(engine, claimed, &mut contexts).await?;
    load_states(engine, &mut contexts).await?;
    load_waits(engine, claimed, &mut contexts).await?;
    load_fans(engine, claimed, &mut contexts).await?;
    load_refusals(engine, claimed, &mut contexts).await?;
    let lists = lists(claimed, &contexts);
    let agents = load_agents(engine, contexts.values()).await?;
    let none = Arc::new(HashMap::new());
    let now = Instant::now();
    // Lanes first: the run itself takes its context with it.
    let lanes = claimed.iter().filter(|job| job.item.is_some());
    Ok(lanes
        .chain(claimed.iter().filter(|job| job.item.is_none()))
        .filter_map(|job| {
            let run = job.ref_id?;
            if let Some(stopped) = halted.get(&run) {
                return Some((job.lease.job, Work::Halted { stopped: *stopped }));
            }
            let context = match job.item {
                None => contexts.remove(&run)?,
                Some(item) => {
                    let mut context = contexts.get(&run)?.clone();
                    let list = lists.get(&(run, job.step)).map(Arc::clone).unwrap_or_default();
                    context.item = Some(Item::new(usize::try_from(item).ok()?, list));
                    context
                }
            };
            let work = StepWork {
                agents: agents.get(&context.company).map_or_else(|| Arc::clone(&none), Arc::clone),
                context,
                chain: 0,
                chain_began: now,
            };
            Some((job.lease.job, Work::Step(Box::new(work))))
        })
        .collect())
}

/// Earlier outputs that the step at hand or a later one refers to.
async fn load_outputs(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &mut HashMap<Uuid, RunContext>,
) -> Result<(), EngineError> {
    let mut needed = Vec::new();
    for job in claimed {
        let Some(context) = job.ref_id.and_then(|run| contexts.get(&run)) else { continue };
        let steps = match (&context.ending, usize::try_from(job.step)) {
            (Some(_), _) => context.playbook.needed_to_close(),
            // Past all its steps there is the run's own output.
            (None, at) => context.playbook.needed_at(at.unwrap_or(context.playbook.steps.len())),
        };
        needed.extend(steps.into_iter().map(|step| (context.company, context.run, step)));
    }
    needed.sort_unstable_by_key(|(_, run, step)| (run.0, *step));
    needed.dedup();
    if needed.is_empty() {
        return Ok(());
    }
    for (run, step, output) in steps::load_outputs(&engine.pool, &needed).await? {
        if let (Some(context), Ok(step)) = (contexts.get_mut(&run), usize::try_from(step)) {
            Arc::make_mut(&mut context.outputs).insert(step, output);
        }
    }
    Ok(())
}

/// How often runs have jumped and what they went past, where their playbooks have
/// any of that.
async fn load_states(engine: &Engine, contexts: &mut HashMap<Uuid, RunContext>) -> Result<(), EngineError> {
    let told =
        |context: &&RunContext| context.playbook.jumps() || context.playbook.forgives() || context.ending.is_some();
    let wanted: Vec<_> = contexts.values().filter(told).map(|context| (context.company, context.run)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let mut done: HashMap<Uuid, Vec<_>> = HashMap::new();
    for row in steps::load_states(&engine.pool, &wanted).await? {
        let (Some(context), Ok(step)) = (contexts.get_mut(&row.run), usize::try_from(row.step)) else { continue };
        match StepStatus::from_name(&row.status) {
            Some(StepStatus::Completed) if step < context.playbook.steps.len() => {
                done.entry(row.run).or_default().push((row.ended_at, step));
            }
            Some(over @ (StepStatus::Completed | StepStatus::Failed | StepStatus::Skipped)) => {
                context.closed.insert(step, over);
            }
            _ => {}
        }
        match context.playbook.step(step).map(|step| &step.kind) {
            Some(StepKind::Goto { .. }) => {
                context.jumps.insert(step, u32::try_from(row.attempt).unwrap_or(0));
            }
            // In a loop, why it failed the time before stays until it is done.
            Some(_) if row.status != StepStatus::Completed.as_str() => {
                context.failures.extend(row.error.map(|error| (step, error)));
            }
            _ => {}
        }
    }
    for (run, mut done) in done {
        let Some(context) = contexts.get_mut(&run).filter(|context| context.ending.is_some()) else { continue };
        done.sort_unstable();
        let undone = |step: usize| {
            let undo = context.playbook.closing().find(|(_, closing)| closing.undoes == Some(step));
            undo.is_none_or(|(at, _)| context.closed.contains_key(&at))
        };
        context.undo = done.into_iter().map(|(_, step)| step).filter(|step| !undone(*step)).collect();
    }
    Ok(())
}

/// Which gates before steps have stayed shut, where that is not the end of the run.
async fn load_refusals(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &mut HashMap<Uuid, RunContext>,
) -> Result<(), EngineError> {
    let gated = claimed.iter().filter_map(|job| {
        let context = contexts.get(&job.ref_id?)?;
        let at = usize::try_from(job.step).ok()?;
        (context.playbook.step(at)?.approval.is_some() && context.playbook.takes_refusals(at)).then_some((
            context.company,
            context.run,
            job.step,
        ))
    });
    let gated: Vec<_> = gated.collect();
    if gated.is_empty() {
        return Ok(());
    }
    for (run, refusal) in approvals::refusals(&engine.pool, &gated).await? {
        if let Some(context) = contexts.get_mut(&run) {
            context.refused = Some(refusal);
        }
    }
    Ok(())
}

/// What has come for those that wait for an event.
async fn load_waits(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &mut HashMap<Uuid, RunContext>,
) -> Result<(), EngineError> {
    let waits = |job: &&&ClaimedJob| {
        let context = job.ref_id.and_then(|run| contexts.get(&run));
        let step = context.and_then(|context| context.playbook.step(usize::try_from(job.step).ok()?));
        matches!(step.map(|step| &step.kind), Some(StepKind::WaitFor(_)))
    };
    let runs: Vec<Uuid> = claimed.iter().filter(waits).filter_map(|job| job.ref_id).collect();
    if runs.is_empty() {
        return Ok(());
    }
    for row in signals::of_runs(&engine.pool, &runs).await? {
        if let (Some(context), Ok(step)) = (contexts.get_mut(&row.run), usize::try_from(row.step)) {
            context.waits.insert(step, row.data);
        }
    }
    Ok(())
}

/// How the items stand of runs that wait for them, or have begun some.
async fn load_fans(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &mut HashMap<Uuid, RunContext>,
) -> Result<(), EngineError> {
    let fans = claimed.iter().filter(|job| job.item.is_none()).filter_map(|job| {
        let context = contexts.get(&job.ref_id?)?;
        context.playbook.step(usize::try_from(job.step).ok()?)?.fan.as_ref()?;
        Some((job.company, context.run, job.step))
    });
    let fans: Vec<_> = fans.collect();
    if fans.is_empty() {
        return Ok(());
    }
    let mut open = HashMap::new();
    for row in fans::load(&engine.pool, &fans).await? {
        open.insert(row.run, row);
    }
    let idle: Vec<_> =
        fans.into_iter().filter(|(_, run, _)| open.get(&run.0).is_none_or(|fan| fan.lanes == 0)).collect();
    let items = fans::load_items(&engine.pool, &idle, OUTPUT_BYTES_MAX).await?;
    let mut by_run: HashMap<Uuid, Vec<ItemRow>> = HashMap::new();
    for item in items {
        by_run.entry(item.run).or_default().push(item);
    }
    for (run, context) in contexts {
        let round = i32::try_from(context.round()).unwrap_or(i32::MAX);
        let mut items = by_run.remove(run).unwrap_or_default();
        items.retain(|item| item.round == round);
        context.fanned = match open.get(run).filter(|fan| fan.round == round) {
            Some(fan) if fan.lanes > 0 => Some(Fanned::Open),
            Some(fan) => Some(fanned(fan.items, items)),
            None if items.is_empty() => None,
            None => Some(Fanned::Begun(items.iter().filter(|i| i.error.is_none()).map(|i| i.item).collect())),
        };
    }
    Ok(())
}

fn fanned(count: i32, items: Vec<ItemRow>) -> Fanned {
    let (mut outputs, mut failures) = (Vec::new(), Vec::new());
    for item in items {
        match item.error {
            Some(error) => failures.push((item.item, error)),
            None => outputs.push((item.item, item.output)),
        }
    }
    Fanned::Over { items: u32::try_from(count).unwrap_or(0), outputs, failures }
}

type Lists = HashMap<(Uuid, i32), Arc<Vec<Value>>>;

/// The lists that lanes go through, each made once. One that cannot be made again
/// has no items, so that an attempt fails with the reason.
fn lists(claimed: &[&ClaimedJob], contexts: &HashMap<Uuid, RunContext>) -> Lists {
    let mut lists = HashMap::new();
    for job in claimed.iter().filter(|job| job.item.is_some()) {
        let Some((run, context)) = job.ref_id.and_then(|run| Some((run, contexts.get(&run)?))) else { continue };
        let step = usize::try_from(job.step).ok().and_then(|at| context.playbook.step(at));
        let Some(fan) = step.and_then(|step| step.fan.as_ref()) else { continue };
        lists.entry((run, job.step)).or_insert_with(|| Arc::new(context.list(fan).unwrap_or_default()));
    }
    lists
}

/// Runs whose wait is over go on; of a company that is halted they wait on. A run
/// that does not go on, since the lease of its job is gone, is left out.
async fn resume(engine: &Engine, claimed: &[&ClaimedJob], runs: &mut Vec<LoadedRun>) -> Result<(), EngineError> {
    let waited = |run: &&LoadedRun| run.waited && works_on(&run.company_status);
    let due: HashMap<Uuid, CompanyId> = runs.iter().filter(waited).map(|run| (run.run.0, run.company)).collect();
    if due.is_empty() {
        return Ok(());
    }
    let jobs = claimed.iter().filter_map(|job| Some((job, job.ref_id?)));
    let jobs: Vec<_> = jobs.filter_map(|(job, run)| Some((job.lease, *due.get(&run)?, RunId(run)))).collect();
    let events: Vec<_> = jobs.iter().map(|_| Event::new(PLAYBOOK_RESUMED, json!({"after": "wait"}))).collect();
    let resumed = steps::resume(&engine.pool, &jobs, &events).await?;
    runs.retain(|run| !due.contains_key(&run.run.0) || resumed.contains(&run.run.0));
    Ok(())
}

type Agents = HashMap<CompanyId, Arc<HashMap<String, AgentRow>>>;

async fn load_agents<'a>(
    engine: &Engine,
    contexts: impl Iterator<Item = &'a RunContext>,
) -> Result<Agents, EngineError> {
    let mut companies: Vec<Uuid> = contexts
        .filter(|context| {
            let mut steps = context.playbook.steps.iter().chain(&context.playbook.closing);
            steps.any(|step| step.role.is_some())
        })
        .map(|context| context.company.0)
        .collect();
    companies.sort_unstable();
    companies.dedup();
    if companies.is_empty() {
        return Ok(HashMap::new());
    }
    let mut by_company: HashMap<CompanyId, HashMap<String, AgentRow>> = HashMap::new();
    for agent in agents::agents_of(&engine.pool, &companies).await? {
        by_company.entry(agent.company).or_default().insert(agent.role.clone(), agent);
    }
    Ok(by_company.into_iter().map(|(company, agents)| (company, Arc::new(agents))).collect())
}

/// How many steps of a run one worker does in a row before the run queues
/// again, and for how long, so that others get their turn.
const CHAIN_STEPS_MAX: u32 = 16;
const CHAIN_TIME_MAX: Duration = Duration::from_secs(1);
impl StepWork {
    /// Whether this worker may go on with the run, or the lane, itself.
    pub(super) fn may_stay(&self) -> bool {
        self.chain + 1 < CHAIN_STEPS_MAX && self.chain_began.elapsed() < CHAIN_TIME_MAX
    }

    /// The run's id.
    pub fn run(&self) -> RunId {
        self.context.run
    }

    /// The agent for a step's role, when there is one.
    pub fn agent(&self, step: usize) -> Option<&AgentRow> {
        let role = self.context.playbook.step(step)?.role.as_deref()?;
        self.agents.get(role)
    }
}
