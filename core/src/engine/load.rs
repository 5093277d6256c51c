//! What the attempts at claimed steps need, loaded for all of them at once.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::Instant;

use serde_json::{Value, json};
use uuid::Uuid;

use super::claim::{StepWork, Work};
use super::{Engine, EngineError, secrets};
use crate::domain::company::works as works_on;
use crate::domain::event::{Event, PLAYBOOK_RESUMED};
use crate::domain::governance::Policy;
use crate::domain::ids::{ApprovalId, CompanyId, PlaybookId, RunId};
use crate::domain::plan::{Child, Draft, Fanned, Item, JUNCTION, Node, Refusal, RunContext, Stage};
use crate::domain::playbook::model::StepKind;
use crate::domain::run::{RunStatus, StepStatus};
use crate::domain::storable::OUTPUT_BYTES_MAX;
use crate::failpoint;
use crate::store::agents::AgentRow;
use crate::store::children::{self, Call};
use crate::store::fans::{self, ItemRow};
use crate::store::jobs::ClaimedJob;
use crate::store::steps::LoadedRun;
use crate::store::{agents, approvals, grades, nodes, signals, steps};

/// What attempts at steps need, by their jobs; one that is not there only needs to go.
pub(super) async fn steps(engine: &Engine, claimed: &[&ClaimedJob]) -> Result<HashMap<i64, Work>, EngineError> {
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
    let above = above(engine, &runs).await?;
    let stopped = |run: &LoadedRun| run.killed || above.get(&run.run.0).is_some_and(|above| above.killed);
    let (killed, runs): (Vec<_>, Vec<_>) = runs.into_iter().partition(stopped);
    let killed: HashSet<Uuid> = killed.into_iter().map(|run| run.run.0).collect();
    let wanted: Vec<(Uuid, Uuid)> = runs.iter().map(|run| (run.company.0, run.version)).collect();
    let plans = engine.plans.get(&engine.pool, &wanted).await?;
    let queued: HashSet<Uuid> = runs.iter().filter(|run| run.queued).map(|run| run.run.0).collect();
    let (mut run_jobs, mut suspended) = (HashMap::new(), HashSet::new());
    let mut contexts: HashMap<Uuid, RunContext> = runs
        .into_iter()
        .filter_map(|run| {
            let playbook = Arc::clone(plans.get(&run.version)?);
            run_jobs.insert(run.run.0, run.job);
            if run.waited {
                suspended.insert(run.run.0);
            }
            let inputs = Arc::new(run.params);
            let context = RunContext {
                // What we have written ourselves.
                ending: run.ending.and_then(|ending| serde_json::from_value(ending).ok()),
                closings: u32::try_from(run.closings).unwrap_or(0),
                called: run.called,
                spent: run.cost,
                bytes: run.bytes,
                age: run.age,
                policy: run.policy.map_or_else(Arc::default, |(own, config)| {
                    Arc::new(Policy::of(own.as_ref(), &json!({"governance": config})))
                }),
                reviewed: run.reviewed,
                ..RunContext::new(run.company, PlaybookId(run.playbook), run.run, playbook, inputs)
            };
            Some((run.run.0, context))
        })
        .collect();
    recount(engine, &mut contexts).await?;
    load_states(engine, claimed, &mut contexts).await?;
    load_outputs(engine, claimed, &mut contexts).await?;
    load_waits(engine, claimed, &mut contexts).await?;
    let mut drafts = load_grades(engine, &mut contexts).await?;
    let mut fans = load_fans(engine, claimed, &contexts).await?;
    let mut refusals = load_refusals(engine, claimed, &contexts, &drafts).await?;
    let mut children = load_children(engine, claimed, &contexts).await?;
    let secrets = secrets::load(engine, &contexts).await?;
    let lists = lists(claimed, &contexts);
    let agents = load_agents(engine, contexts.values()).await?;
    let none = Arc::new(HashMap::new());
    let now = Instant::now();
    // Lanes and nodes first: the run itself takes its context with it.
    let own = |job: &&&ClaimedJob| job.ref_id.and_then(|run| run_jobs.get(&run)) == Some(&job.lease.job);
    Ok(claimed
        .iter()
        .filter(|job| !own(job))
        .chain(claimed.iter().filter(own))
        .filter_map(|job| {
            let run = job.ref_id?;
            if let Some(stopped) = halted.get(&run) {
                return Some((job.lease.job, Work::Halted { stopped: *stopped }));
            }
            if killed.contains(&run) {
                return Some((job.lease.job, Work::Killed));
            }
            if queued.contains(&run) {
                return Some((job.lease.job, Work::Queued));
            }
            if job.step == JUNCTION && suspended.contains(&run) {
                // Whoever lets the run go on wakes it.
                return Some((job.lease.job, Work::Idle));
            }
            let run_job = *run_jobs.get(&run)?;
            let own = job.lease.job == run_job;
            let mut context = if own { contexts.remove(&run)? } else { contexts.get(&run)?.clone() };
            if !own && context.ending.is_some() {
                // The run's steps are over.
                return None;
            }
            let place = (run, job.step);
            match job.item {
                None => {
                    context.fanned = fans.remove(&place);
                    context.refused = refusals.remove(&place);
                    context.draft = drafts.remove(&place);
                }
                Some(item) => {
                    let list = lists.get(&place).map(Arc::clone).unwrap_or_default();
                    context.item = Some(Item::new(usize::try_from(item).ok()?, list));
                }
            }
            context.child = children.remove(&job.lease.job);
            let work = StepWork {
                run_job,
                agents: agents.get(&context.company).map_or_else(|| Arc::clone(&none), Arc::clone),
                secrets: secrets.get(&run).cloned(),
                above: above.get(&run).map(|above| Arc::clone(&above.playbooks)),
                context,
                chain: 0,
                chain_began: now,
            };
            Some((job.lease.job, Work::Step(Box::new(work))))
        })
        .collect())
}

/// Whose steps a run does, at any height.
#[derive(Default)]
struct Above {
    playbooks: Arc<Vec<PlaybookId>>,
    /// One of them was stopped at once.
    killed: bool,
}

async fn above(engine: &Engine, runs: &[LoadedRun]) -> Result<HashMap<Uuid, Above>, EngineError> {
    let mut found: HashMap<Uuid, Above> = HashMap::new();
    let called: Vec<_> = runs.iter().filter(|run| run.called).map(|run| (run.company, run.run)).collect();
    if called.is_empty() {
        return Ok(found);
    }
    for (run, playbook, killed) in children::above(&engine.pool, &called).await? {
        let above = found.entry(run).or_default();
        Arc::make_mut(&mut above.playbooks).push(playbook);
        above.killed |= killed;
    }
    Ok(found)
}

/// What runs keep is counted up as they go, too high in a loop: exactly where it matters.
async fn recount(engine: &Engine, contexts: &mut HashMap<Uuid, RunContext>) -> Result<(), EngineError> {
    let near = contexts.values().filter(|context| context.is_nearly_full());
    let near: Vec<_> = near.map(|context| (context.company, context.run)).collect();
    if near.is_empty() {
        return Ok(());
    }
    for (run, bytes) in steps::recount(&engine.pool, &near).await? {
        if let Some(context) = contexts.get_mut(&run) {
            context.bytes = bytes;
        }
    }
    Ok(())
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
            (None, Err(_)) if context.takes_turns() => {
                context.playbook.needed_to_turn(|at| context.nodes.contains_key(&at))
            }
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
async fn load_states(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &mut HashMap<Uuid, RunContext>,
) -> Result<(), EngineError> {
    let at_junction = claimed.iter().filter(|job| job.step == JUNCTION);
    let turning: HashSet<Uuid> = at_junction.filter_map(|job| job.ref_id).collect();
    let told = |context: &&RunContext| {
        let at_junction = context.ending.is_some() || turning.contains(&context.run.0);
        context.playbook.jumps() || context.playbook.forgives() || at_junction
    };
    let wanted: Vec<_> = contexts.values().filter(told).map(|context| (context.company, context.run)).collect();
    if wanted.is_empty() {
        return Ok(());
    }
    let mut done: HashMap<Uuid, Vec<_>> = HashMap::new();
    for row in steps::load_states(&engine.pool, &wanted).await? {
        let (Some(context), Ok(step)) = (contexts.get_mut(&row.run), usize::try_from(row.step)) else { continue };
        let status = StepStatus::from_name(&row.status);
        // One that has no job and is not over was let begin anew by a retry.
        let over = |status| matches!(status, StepStatus::Completed | StepStatus::Failed | StepStatus::Skipped);
        if let Some(status) = status.filter(|status| row.job.is_some() || over(*status)) {
            context.nodes.insert(step, Node { status, ended_at: row.ended_at });
        }
        match status {
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
    load_waiting(engine, &turning, contexts).await?;
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

/// The runs that do steps of others, by the jobs that have waited for them.
async fn load_children(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &HashMap<Uuid, RunContext>,
) -> Result<HashMap<i64, Child>, EngineError> {
    let calls = claimed.iter().filter_map(|job| {
        let context = contexts.get(&job.ref_id?)?;
        let step = context.playbook.step(usize::try_from(job.step).ok()?)?;
        let round = i32::try_from(context.round()).unwrap_or(i32::MAX);
        let call = Call { run: context.run, step: job.step, item: job.item.unwrap_or(-1), round };
        let asks = matches!(step.kind, StepKind::Playbook(_)) && (step.fan.is_none() || job.item.is_some());
        asks.then_some((job.lease.job, (context.company, call, job.attempt)))
    });
    let (jobs, calls): (Vec<i64>, Vec<_>) = calls.unzip();
    if calls.is_empty() {
        return Ok(HashMap::new());
    }
    let rows = children::load(&engine.pool, &calls).await?.into_iter().filter_map(|row| {
        let job = usize::try_from(row.place - 1).ok().and_then(|at| jobs.get(at))?;
        let status = RunStatus::from_name(&row.status)?;
        Some((*job, Child { run: RunId(row.child), status, output: row.output, error: row.error }))
    });
    Ok(rows.collect())
}

/// What the nodes of runs wait for that are at their junction, and which gates were
/// opened before.
async fn load_waiting(
    engine: &Engine,
    turning: &HashSet<Uuid>,
    contexts: &mut HashMap<Uuid, RunContext>,
) -> Result<(), EngineError> {
    let turning = contexts.values().filter(|context| context.takes_turns() && turning.contains(&context.run.0));
    let runs: Vec<_> = turning.map(|context| (context.company, context.run)).collect();
    if runs.is_empty() {
        return Ok(());
    }
    for row in nodes::waiting(&engine.pool, &runs).await? {
        let (Some(context), Ok(step)) = (contexts.get_mut(&row.run), usize::try_from(row.step)) else { continue };
        let waiting = match (row.approval, row.event) {
            (Some(approval), _) => json!({"type": "approval", "id": ApprovalId(approval)}),
            (None, event) => json!({"type": "event", "id": event, "index": step}),
        };
        context.waiting.insert(step, waiting);
    }
    for (run, step) in nodes::opened(&engine.pool, &runs).await? {
        if let (Some(context), Ok(step)) = (contexts.get_mut(&run), usize::try_from(step)) {
            context.opened.insert(step);
        }
    }
    Ok(())
}

/// Which gates have stayed shut before steps, or about what they have said, where that is
/// not the end of the run.
async fn load_refusals(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &HashMap<Uuid, RunContext>,
    drafts: &HashMap<(Uuid, i32), Draft>,
) -> Result<HashMap<(Uuid, i32), Refusal>, EngineError> {
    let gated = claimed.iter().filter_map(|job| {
        let context = contexts.get(&job.ref_id?)?;
        let at = usize::try_from(job.step).ok()?;
        let step = context.playbook.step(at)?;
        let of_draft = match drafts.get(&(context.run.0, job.step)) {
            Some(draft) => draft.is_turned_down().then_some(true),
            None => context.may_be_asked_about(step).then_some(false),
        };
        let takes = context.playbook.takes_refusals(at);
        of_draft.filter(|_| takes).map(|of_draft| (context.company, context.run, job.step, of_draft))
    });
    let gated: Vec<_> = gated.collect();
    if gated.is_empty() {
        return Ok(HashMap::new());
    }
    Ok(approvals::refusals(&engine.pool, &gated).await?.into_iter().collect())
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

/// What steps with rubrics have said that are not over, by run and step, and what the
/// others came to.
async fn load_grades(
    engine: &Engine,
    contexts: &mut HashMap<Uuid, RunContext>,
) -> Result<HashMap<(Uuid, i32), Draft>, EngineError> {
    let graded = contexts.values().filter(|context| context.playbook.grades());
    let runs: Vec<_> = graded.map(|context| (context.company, context.run)).collect();
    if runs.is_empty() {
        return Ok(HashMap::new());
    }
    let mut drafts = HashMap::new();
    for row in grades::of_runs(&engine.pool, &runs).await? {
        let (Some(context), Ok(step)) = (contexts.get_mut(&row.run), usize::try_from(row.step)) else { continue };
        if let Some(evaluation) = &row.draft.evaluation {
            context.scores.insert(step, evaluation["score"].clone());
        }
        // In a loop, the step is done for the first time again.
        let this_round = i32::try_from(context.round()) == Ok(row.round);
        if this_round && row.draft.stage != Stage::Passed {
            drafts.insert((row.run, row.step), row.draft);
        }
    }
    Ok(drafts)
}

/// How the items stand of runs that wait for them, or have begun some.
async fn load_fans(
    engine: &Engine,
    claimed: &[&ClaimedJob],
    contexts: &HashMap<Uuid, RunContext>,
) -> Result<HashMap<(Uuid, i32), Fanned>, EngineError> {
    let fans = claimed.iter().filter(|job| job.item.is_none()).filter_map(|job| {
        let context = contexts.get(&job.ref_id?)?;
        context.playbook.step(usize::try_from(job.step).ok()?)?.fan.as_ref()?;
        Some((job.company, context.run, job.step))
    });
    let fans: Vec<_> = fans.collect();
    if fans.is_empty() {
        return Ok(HashMap::new());
    }
    let mut open = HashMap::new();
    for row in fans::load(&engine.pool, &fans).await? {
        open.insert((row.run, row.step), row);
    }
    let at_work = |(_, run, step): &(CompanyId, RunId, i32)| open.get(&(run.0, *step)).is_some_and(|fan| fan.live > 0);
    let idle: Vec<_> = fans.iter().copied().filter(|fan| !at_work(fan)).collect();
    let items = fans::load_items(&engine.pool, &idle, OUTPUT_BYTES_MAX).await?;
    let mut by_step: HashMap<(Uuid, i32), Vec<ItemRow>> = HashMap::new();
    for item in items {
        by_step.entry((item.run, item.step)).or_default().push(item);
    }
    let stand = fans.into_iter().filter_map(|(_, run, step)| {
        let place = (run.0, step);
        let round = i32::try_from(contexts.get(&run.0)?.round()).unwrap_or(i32::MAX);
        let mut items = by_step.remove(&place).unwrap_or_default();
        items.retain(|item| item.round == round);
        let stands = match open.get(&place).filter(|fan| fan.round == round) {
            Some(fan) if fan.live > 0 => Fanned::Open,
            Some(fan) if fan.lanes == 0 => fanned(fan.items, items),
            // Lanes were lost: others do what is left.
            Some(_) => begun(&items),
            None if items.is_empty() => return None,
            None => begun(&items),
        };
        Some((place, stands))
    });
    Ok(stand.collect())
}

fn begun(items: &[ItemRow]) -> Fanned {
    let bytes = items.iter().map(|item| item.bytes).sum();
    Fanned::Begun { done: items.iter().filter(|item| item.done).map(|item| item.item).collect(), bytes }
}

fn fanned(count: i32, items: Vec<ItemRow>) -> Fanned {
    let (mut outputs, mut failures) = (Vec::new(), Vec::new());
    let bytes = items.iter().map(|item| item.bytes).sum();
    for item in items {
        match item.done {
            true => outputs.push((item.item, item.output)),
            false => failures.push((item.item, item.error.unwrap_or_default())),
        }
    }
    Fanned::Over { items: u32::try_from(count).unwrap_or(0), outputs, failures, bytes }
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
/// that does not go on, since the lease of its job is gone, is left out. The junction
/// of a graph is no end of a wait.
async fn resume(engine: &Engine, claimed: &[&ClaimedJob], runs: &mut Vec<LoadedRun>) -> Result<(), EngineError> {
    let waited = |run: &&LoadedRun| run.waited && works_on(&run.company_status);
    let due: HashMap<Uuid, CompanyId> = runs.iter().filter(waited).map(|run| (run.run.0, run.company)).collect();
    let jobs = claimed.iter().filter(|job| job.step != JUNCTION).filter_map(|job| Some((job, job.ref_id?)));
    let jobs: Vec<_> = jobs.filter_map(|(job, run)| Some((job.lease, *due.get(&run)?, RunId(run)))).collect();
    if jobs.is_empty() {
        return Ok(());
    }
    let events: Vec<_> = jobs.iter().map(|_| Event::new(PLAYBOOK_RESUMED, json!({"after": "wait"}))).collect();
    let resumed = steps::resume(&engine.pool, &jobs, &events).await?;
    let asked: HashSet<Uuid> = jobs.iter().map(|(.., run)| run.0).collect();
    runs.retain(|run| !asked.contains(&run.run.0) || resumed.contains(&run.run.0));
    runs.iter_mut().filter(|run| asked.contains(&run.run.0)).for_each(|run| run.waited = false);
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
            steps.any(|step| step.role.is_some() || step.rubric.as_ref().is_some_and(|rubric| rubric.judge.is_some()))
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
