//! Claiming: which jobs a worker takes, and what each attempt needs to begin,
//! loaded for all of them at once.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use uuid::Uuid;

use super::beats::{self, Beat};
use super::deliveries::{self, Look, Sending};
use super::secrets::Opened;
use super::{Engine, EngineError, load};
use crate::domain::ids::{PlaybookId, RunId, WebhookId};
use crate::domain::plan::RunContext;
use crate::failpoint;
use crate::store::StoreError;
use crate::store::agents::AgentRow;
use crate::store::jobs::{self, ClaimedJob, Looked, Tenant, Turn, Walked, kind};

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
    /// A step of a playbook that was stopped at once.
    Killed,
    /// The junction of a run that is suspended.
    Idle,
    /// A run that waits for its turn.
    Queued,
    /// A run has ended, and others may begin.
    Slot,
    /// An agent beats.
    Heartbeat(Beat),
    /// An agent whose money was used up goes on.
    Resume,
    /// An event goes to the runs that wait for it.
    Signal,
    /// A schedule fires.
    Schedule,
    /// An event goes to a webhook.
    Delivery(Box<Sending>),
    /// A delivery whose webhook is disabled.
    Disabled(WebhookId),
    /// It has to wait for so long, at no cost.
    Wait(Duration),
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
    /// What its tools are given, where its playbook names secrets.
    pub secrets: Option<Opened>,
    /// The playbooks of the runs whose steps this one does, at any height.
    pub above: Option<Arc<Vec<PlaybookId>>>,
    /// The run's own job.
    pub run_job: i64,
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
/// A look that takes as long as this walks what is dead: somebody's old transaction keeps it from
/// being vacuumed (hazard H5). Until the next look is due, claims look on behind the last rows that
/// were taken, also where there was no more, and newcomers wait.
const SLOW_LOOK: Duration = Duration::from_millis(10);
/// What it takes to take a job, at the most.
const TAKE: Duration = Duration::from_micros(50);
const FLOWS_MAX: usize = jobs::FLOWS_A_CLAIM as usize;

/// Where a worker's claims have got to.
///
/// Every claimed row leaves a dead entry at the head of the ready index until
/// it is vacuumed. A claim that began there each time would walk them all, so
/// in a backlog it goes on from the last row it took, flow by flow; a
/// full look every [`FULL_LOOK`], or later where looks take long, finds what has
/// come before that. Without a backlog each claim is a full look, as long as looks are
/// quick.
///
/// A look begins with the flow after the one that was served last, in each
/// queue by itself, and with another queue each time: a worker with room for
/// one job serves everybody in turn.
#[derive(Debug)]
pub struct ClaimCursor {
    turns: Vec<Turn>,
    /// Where each flow's work goes on, while there is more of it.
    tenants: Vec<Tenant>,
    /// Where that of the others would, as long as looks are slow.
    quiet: Vec<Tenant>,
    /// When to look at everything again.
    look_again: Option<Instant>,
    /// Until then also where nothing was left behind: looks are slow.
    rests: bool,
}

impl ClaimCursor {
    /// At the beginning of some queues.
    pub fn new(queues: &[String]) -> Self {
        let turns = queues.iter().map(|queue| Turn::first(queue)).collect();
        Self { turns, tenants: Vec::new(), quiet: Vec::new(), look_again: None, rests: false }
    }

    /// Until when claims do not look at everything, although nothing was left behind; nothing
    /// as long as looks are quick.
    pub fn rests_until(&self) -> Option<Instant> {
        self.look_again.filter(|until| self.rests && Instant::now() < *until)
    }

    /// Whether the last claim left work behind.
    pub fn has_more(&self) -> bool {
        !self.tenants.is_empty()
    }

    /// Whether the next claim looks at everything, from the first flow.
    pub fn is_full_look(&self) -> bool {
        self.is_look() && self.begins_with_first()
    }

    /// Whether the next claim looks at everything, of whatever flow it begins.
    pub fn is_look(&self) -> bool {
        let fresh = self.look_again.is_some_and(|at| Instant::now() < at);
        !fresh || (self.tenants.is_empty() && self.quiet.is_empty())
    }

    /// Where claims go on that are no looks; those that have little come first.
    fn places(&self) -> Vec<&Tenant> {
        self.quiet.iter().chain(&self.tenants).collect()
    }

    /// A look at everything has taken so long, and so many jobs.
    fn looked(&mut self, took: Duration, jobs: usize) {
        self.look_again = Some(Instant::now() + (took * FULL_LOOK_SPACING).clamp(FULL_LOOK, FULL_LOOK_MAX));
        self.rests = took >= SLOW_LOOK + TAKE * u32::try_from(jobs).unwrap_or(u32::MAX);
    }

    /// Remembers how far a claim got: which flows gave their whole share and so
    /// have more, and whose turn is next. `tenants` of them had work, as far as
    /// the claim has looked; `walked` says how far, after a look at everything.
    fn note(&mut self, jobs: &[ClaimedJob], room: usize, tenants: usize, walked: Option<&[Walked]>) {
        let mut taken: HashMap<(&str, Uuid), (usize, i16, i64)> = HashMap::new();
        for job in jobs {
            let entry = taken.entry((job.queue.as_str(), job.flow)).or_insert((0, i16::MIN, 0));
            let at = (job.priority, job.lease.job);
            *entry = if at > (entry.1, entry.2) { (entry.0 + 1, at.0, at.1) } else { (entry.0 + 1, entry.1, entry.2) };
        }
        let cut = jobs.len() >= room;
        // A look that had not room for everybody, or did not begin with the
        // first flow, is no ground to go on with those who were served.
        let mut goes_on = true;
        if let Some(walked) = walked {
            let all_seen = !cut || taken.len() >= tenants;
            let from_first = self.begins_with_first();
            self.next_turns(taken.keys().copied(), walked, !all_seen);
            let whole = from_first && self.begins_with_first();
            goes_on = all_seen && (whole || room >= FLOWS_MAX * self.turns.len());
            // Nor to rest: there are others that were not come to.
            self.rests &= all_seen && whole;
        }
        let share = room.div_ceil(tenants.max(1));
        let (mut going, mut quiet) = (Vec::new(), Vec::new());
        for ((queue, flow), (count, priority, job)) in &taken {
            let tenant = Tenant { queue: (*queue).to_owned(), flow: *flow, priority: *priority, job: *job };
            let has_more = goes_on && (*count >= share || cut);
            if has_more { going.push(tenant) } else { quiet.push(tenant) }
        }
        let is_taken = |tenant: &Tenant| taken.contains_key(&(tenant.queue.as_str(), tenant.flow));
        let left = std::mem::take(&mut self.tenants).into_iter().filter(|tenant| !is_taken(tenant));
        if walked.is_none() && cut {
            // There was not room for all of them: the others come first now.
            going.splice(0..0, left);
        } else {
            quiet.extend(left);
        }
        quiet.extend(std::mem::take(&mut self.quiet).into_iter().filter(|tenant| !is_taken(tenant)));
        quiet.truncate(if self.rests { FLOWS_MAX } else { 0 });
        (self.tenants, self.quiet) = (going, quiet);
    }

    fn begins_with_first(&self) -> bool {
        self.turns.iter().all(|turn| turn.after.is_nil())
    }

    /// After a look: each queue goes on behind the last flow that it came to, unless
    /// that was the end of it; behind the last one that it served, where there was not
    /// room for all that it might have taken from.
    fn next_turns<'a>(&mut self, served: impl Iterator<Item = (&'a str, Uuid)>, walked: &[Walked], cut: bool) {
        let mut last: HashMap<&str, Uuid> = HashMap::new();
        for (queue, flow) in served {
            let entry = last.entry(queue).or_insert(flow);
            *entry = (*entry).max(flow);
        }
        for turn in &mut self.turns {
            let came = walked.iter().find(|walked| walked.queue == turn.queue);
            turn.after = match (last.get(turn.queue.as_str()), came) {
                (Some(served), _) if cut => *served,
                // Cut off before its turn: it is still to come, if any of it may be taken.
                (None, Some(walked)) if cut && walked.open > 0 => turn.after,
                (_, Some(walked)) if walked.flows >= FLOWS_MAX => walked.last,
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
    let full = cursor.is_look();
    let Looked { jobs, tenants, walked } = if full {
        jobs::claim(&engine.claims, session, &cursor.turns, limit).await?
    } else {
        let tenants = cursor.tenants.len().max(1);
        let jobs = jobs::claim_on(&engine.claims, session, &cursor.places(), tenants, limit).await?;
        Looked { jobs, tenants, walked: Vec::new() }
    };
    if !jobs.is_empty() && failpoint::reach("claim.after_commit").await {
        // As if the answer had been lost on its way.
        return Err(StoreError::Unavailable(sqlx::Error::PoolClosed).into());
    }
    if full {
        cursor.looked(began.elapsed(), jobs.len());
    }
    cursor.note(&jobs, room, tenants, full.then_some(&walked[..]));
    Ok(jobs)
}

/// Jobs that are attempts at steps.
const STEPS: [&str; 4] = [kind::STEP, kind::BEGIN, kind::TIMER, kind::ITEM];

/// Loads what claimed jobs need, set-based; gives them back with the error
/// when it cannot.
pub async fn load(engine: &Engine, claimed: Vec<ClaimedJob>) -> Result<Vec<Claimed>, (EngineError, Vec<ClaimedJob>)> {
    let is_step = |job: &&ClaimedJob| STEPS.contains(&job.kind.as_str());
    let steps: Vec<&ClaimedJob> = claimed.iter().filter(is_step).collect();
    let mut works: HashMap<i64, Work> = HashMap::new();
    if !steps.is_empty() {
        works = match load::steps(engine, &steps).await {
            Ok(works) => works,
            Err(error) => return Err((error, claimed)),
        };
    }
    let heartbeats: Vec<&ClaimedJob> = claimed.iter().filter(|job| job.kind == kind::HEARTBEAT).collect();
    if !heartbeats.is_empty() {
        match beats::look(engine, &heartbeats).await {
            Ok(beats) => works.extend(beats.into_iter().map(|(job, beat)| (job, Work::Heartbeat(beat)))),
            Err(error) => return Err((error, claimed)),
        }
    }
    let events: Vec<&ClaimedJob> = claimed.iter().filter(|job| job.kind == kind::DELIVERY).collect();
    if !events.is_empty() {
        match deliveries::look(engine, &events).await {
            Ok(looks) => works.extend(looks.into_iter().map(|(job, look)| {
                let work = match look {
                    Look::Send(sending) => Work::Delivery(sending),
                    Look::Wait(delay) => Work::Wait(delay),
                    Look::Disabled(webhook) => Work::Disabled(webhook),
                };
                (job, work)
            })),
            Err(error) => return Err((error, claimed)),
        }
    }
    Ok(claimed
        .into_iter()
        .map(|job| {
            let work = match job.kind.as_str() {
                kind::STEP | kind::BEGIN | kind::TIMER | kind::ITEM | kind::HEARTBEAT | kind::DELIVERY => {
                    works.remove(&job.lease.job).unwrap_or(Work::Stale)
                }
                kind::GATE_TIMEOUT => Work::GateTimeout,
                kind::PROVISION => Work::Provision,
                kind::RESUME => Work::Resume,
                kind::SIGNAL => Work::Signal,
                kind::SCHEDULE => Work::Schedule,
                kind::PURGE => Work::Purge,
                kind::SLOT => Work::Slot,
                kind::NOOP => Work::Noop,
                _ => Work::Unknown,
            };
            Claimed { job, work }
        })
        .collect())
}

/// How many steps of a run one worker does in a row before the run queues
/// again, and for how long, so that others get their turn.
const CHAIN_STEPS_MAX: u32 = 16;
const CHAIN_TIME_MAX: Duration = Duration::from_secs(1);
impl StepWork {
    /// Whether this worker may go on with the run, or the lane, itself.
    pub(super) fn may_stay(&self) -> bool {
        // Of a run that is nearly full the next one counts anew.
        !self.context.is_nearly_full()
            && self.chain + 1 < CHAIN_STEPS_MAX
            && self.chain_began.elapsed() < CHAIN_TIME_MAX
    }

    /// The run's own job, where a job is that of a step beside others.
    pub(super) fn node_of(&self, job: &ClaimedJob) -> Option<i64> {
        (job.lease.job != self.run_job && job.item.is_none()).then_some(self.run_job)
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

    /// The agent that grades a step, when there is one.
    pub fn judge(&self, step: usize) -> Option<&AgentRow> {
        let judge = self.context.playbook.step(step)?.rubric.as_ref()?.judge.as_deref();
        judge.map_or_else(|| self.agent(step), |role| self.agents.get(role))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::ids::CompanyId;
    use crate::store::jobs::Lease;

    fn taken(flow: Uuid, job: i64) -> ClaimedJob {
        ClaimedJob {
            lease: Lease { job, epoch: 1, session: 1 },
            queue: "steps".into(),
            kind: kind::NOOP.into(),
            company: CompanyId(flow),
            flow,
            ref_id: None,
            step: 0,
            item: None,
            priority: 0,
            attempt: 1,
            crash_count: 0,
            timeout: Duration::from_secs(1),
        }
    }

    fn places(cursor: &ClaimCursor) -> Vec<(Uuid, i64)> {
        let going = if cursor.is_look() { Vec::new() } else { cursor.places() };
        let mut places: Vec<_> = going.iter().map(|t| (t.flow, t.job)).collect();
        places.sort_unstable();
        places
    }

    #[test]
    fn while_looks_are_slow_claims_go_on_behind_what_was_taken() {
        let (a, b) = (Uuid::from_u128(1), Uuid::from_u128(2));
        let walked = [Walked { queue: "steps".into(), last: b, flows: 2, open: 2 }];
        let look = |took: Duration| {
            let mut cursor = ClaimCursor::new(&["steps".into()]);
            cursor.looked(took, 2);
            cursor.note(&[taken(a, 5), taken(b, 6)], 100, 2, Some(&walked));
            cursor
        };
        // As long as they are quick, each claim is one, or who has just come would wait.
        let quick = look(SLOW_LOOK / 2);
        assert!(quick.is_full_look() && !quick.has_more() && quick.rests_until().is_none());
        let mut slow = look(SLOW_LOOK + TAKE * 2);
        assert!(!slow.has_more() && slow.rests_until().is_some());
        assert_eq!(places(&slow), [(a, 5), (b, 6)]);
        // Nothing, then something of one of them: the other's place stays.
        slow.note(&[], 100, 2, None);
        slow.note(&[taken(b, 9)], 100, 2, None);
        assert_eq!(places(&slow), [(a, 5), (b, 9)]);
        // As much as there was room for: it has more, and the other is looked at all the same.
        slow.note(&[taken(b, 10), taken(b, 11)], 2, 2, None);
        assert!(slow.has_more());
        assert_eq!(places(&slow), [(a, 5), (b, 11)]);
        slow.note(&[], 100, 2, None);
        assert_eq!((slow.has_more(), places(&slow)), (false, vec![(a, 5), (b, 11)]));
        // Whoever had no room for all looks again, however long that takes: it is the others' turn.
        let mut small = ClaimCursor::new(&["steps".into()]);
        small.looked(SLOW_LOOK + TAKE, 1);
        small.note(&[taken(a, 5)], 1, 2, Some(&walked));
        assert!(small.is_look() && small.rests_until().is_none());
        // It is over with the time, and with a look that is quick.
        slow.looked(SLOW_LOOK / 2, 1);
        slow.note(&[taken(a, 12)], 100, 1, Some(&walked));
        assert!(slow.is_look() && slow.quiet.is_empty());
    }
}
