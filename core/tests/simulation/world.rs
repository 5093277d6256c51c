//! The world around the database: workers, a network that loses and delays,
//! people at the gates, faults, and the order in which all that happens.

use std::collections::BTreeMap;
use std::sync::Arc;

use capx_core::domain::digest;
use capx_core::domain::ids::RunId;
use capx_core::domain::playbook::Playbook;
use capx_core::domain::run::StepStatus;
use capx_core::engine::advance::Decided;
use uuid::Uuid;

use crate::check::{Checker, Claimant};
use crate::database::{Asker, Database, Fence, LEASE};
use crate::random::Random;
use crate::worker::{Answer, Life, Request, Worker};

/// When the last fault may happen; from then on everything goes well.
pub const FAULTS_END: u64 = 20_000;
/// A run that is open by then is stuck.
const PATIENCE: u64 = 600_000;
/// How long stragglers may try to write after the last run's end.
const AFTERMATH: u64 = 2_000;
const WORKERS: usize = 3;
const RUNS: u64 = 3;

/// How often what happened, in a schedule or a campaign of them.
pub type Seen = BTreeMap<&'static str, u32>;

#[derive(Debug)]
pub enum Event {
    Beat(Life),
    Look(Life),
    Sweep(Life),
    /// A handler reaches the world outside.
    Effect(Life, u64),
    Ends(Life, u64),
    Repeat(Life, u64),
    /// A request reaches the server; whether its answer will come.
    Arrives(Life, Request, bool),
    Hears(Life, Answer),
    Person(usize),
    Die(usize),
    Rise(usize),
    Freeze(usize),
    Crash,
}

impl Event {
    fn life(&self) -> Option<Life> {
        match self {
            Self::Beat(life) | Self::Look(life) | Self::Sweep(life) | Self::Hears(life, _) => Some(*life),
            Self::Effect(life, _) | Self::Ends(life, _) | Self::Repeat(life, _) => Some(*life),
            _ => None,
        }
    }
}

pub struct World {
    pub db: Database,
    pub random: Random,
    pub seen: Seen,
    pub workers: Vec<Worker>,
    /// What the world outside has seen: calls by their key.
    pub witness: BTreeMap<String, u32>,
    /// A step that kills whoever tries it, at times.
    pub poison: Option<(usize, i32)>,
    /// How many there were: their numbers.
    pub attempts: u64,
    /// What is to happen, by time and then in the order it was made.
    queue: BTreeMap<(u64, u64), Event>,
    queued: u64,
    checker: Checker,
    trace: Option<Vec<String>>,
}

impl World {
    pub fn new(seed: u64, fence: Fence, playbooks: &[Arc<Playbook>]) -> Self {
        let mut world = Self {
            db: Database::new(fence),
            random: Random(seed),
            seen: Seen::new(),
            workers: (0..WORKERS).map(|_| Worker::default()).collect(),
            witness: BTreeMap::new(),
            poison: None,
            attempts: 0,
            queue: BTreeMap::new(),
            queued: 0,
            checker: Checker::default(),
            trace: None,
        };
        for _ in 0..RUNS {
            let run = world.db.runs.len();
            let at = world.random.below(playbooks.len() as u64) as usize;
            world.db.start(&playbooks[at]);
            world.people(run);
        }
        if world.random.percent(30) {
            world.poison = Some((world.random.below(RUNS) as usize, world.random.below(3) as i32));
        }
        for worker in 0..WORKERS {
            world.after(worker as u64, Event::Rise(worker));
        }
        world.plan_faults();
        world
    }

    /// The same, keeping a trace of what happens.
    pub fn traced(mut self) -> Self {
        self.trace = Some(Vec::new());
        self
    }

    pub fn into_trace(self) -> Vec<String> {
        self.trace.unwrap_or_default()
    }

    fn plan_faults(&mut self) {
        for _ in 0..self.random.between(2, 9) {
            let at = self.random.below(FAULTS_END);
            let worker = self.random.below(WORKERS as u64) as usize;
            let fault = match self.random.below(5) {
                0 | 1 => Event::Die(worker),
                2 | 3 => Event::Freeze(worker),
                _ => Event::Crash,
            };
            self.after(at, fault);
        }
    }

    pub fn saw(&mut self, what: &'static str, times: u32) {
        *self.seen.entry(what).or_default() += times;
    }

    /// Whether faults are over.
    pub fn calm(&self) -> bool {
        self.db.now >= FAULTS_END
    }

    pub fn chance(&mut self, percent: u64) -> bool {
        !self.calm() && self.random.percent(percent)
    }

    pub fn after(&mut self, delay: u64, event: Event) {
        self.queued += 1;
        self.queue.insert((self.db.now + delay, self.queued), event);
    }

    /// People who may have a word at a run's next gate, in time or too late.
    pub fn people(&mut self, run: usize) {
        for _ in 0..self.random.below(3) {
            let delay = self.random.between(100, 5_500);
            self.after(delay, Event::Person(run));
        }
    }

    /// Sends a request. Its answer may be lost, with or without its effect;
    /// and it may take effect after it was given up.
    pub fn send(&mut self, life: Life, request: Request) {
        let there = if self.chance(3) { self.random.below(16_000) } else { self.random.between(1, 20) };
        if !self.chance(12) {
            return self.after(there, Event::Arrives(life, request, true));
        }
        self.saw("answers lost", 1);
        let gives_up = self.random.between(1, 50);
        let unheard = Event::Hears(life, request.unanswered());
        match self.random.below(3) {
            0 => return self.after(gives_up, unheard),
            1 => self.after(gives_up, unheard),
            _ => self.after(there + gives_up, unheard),
        }
        self.after(there, Event::Arrives(life, request, false));
    }

    /// Goes on to the end, checking what must hold after every event.
    pub fn run(&mut self) -> Result<(), String> {
        let mut over = None;
        while let Some(((at, _), event)) = self.queue.pop_first() {
            self.db.now = at;
            if let Some(trace) = &mut self.trace {
                trace.push(format!("{at:>6} {event:?}"));
            }
            self.happen(event)?;
            let claimants = self.claimants();
            self.checker.check(&self.db, &claimants)?;
            if over.is_none() && self.db.runs.iter().all(|run| run.status.is_terminal()) {
                over = Some(at + AFTERMATH);
            }
            if over.is_some_and(|over| over < at) {
                return self.verdict();
            }
            if at > PATIENCE {
                return Err("a run is stuck".into());
            }
        }
        Err("nothing happens any more".into())
    }

    /// All that may still write under a lease, in hand or on its way.
    fn claimants(&self) -> Vec<Claimant> {
        let in_hand = self.workers.iter().flat_map(|worker| worker.attempts.values());
        let on_the_way = self.queue.values().filter_map(|event| match event {
            Event::Arrives(_, request, _) => request.claimant(),
            _ => None,
        });
        in_hand.map(|attempt| attempt.claimant()).chain(on_the_way).collect()
    }

    fn happen(&mut self, event: Event) -> Result<(), String> {
        if let Some(life) = event.life() {
            let worker = &self.workers[life.worker];
            if !worker.alive || worker.life != life.life {
                return Ok(());
            }
            if self.db.now < worker.frozen_until {
                // It goes on with whatever its threads come to first.
                let thaw = worker.frozen_until - self.db.now + self.random.below(200);
                self.after(thaw, event);
                return Ok(());
            }
        }
        match event {
            Event::Beat(life) => self.beat(life),
            Event::Look(life) => self.look(life),
            Event::Sweep(life) => self.sweep(life),
            Event::Effect(life, id) => self.effect(life, id),
            Event::Ends(life, id) => self.ends(life, id),
            Event::Repeat(life, id) => self.repeat(life, id),
            Event::Arrives(life, request, answered) => self.arrives(life, request, answered),
            Event::Hears(life, answer) => self.hears(life, answer),
            Event::Person(run) => self.person(run),
            Event::Die(worker) => self.die(worker),
            Event::Rise(worker) => self.rise(worker),
            Event::Freeze(worker) => {
                self.saw("freezes", 1);
                self.workers[worker].frozen_until = self.db.now + self.random.between(LEASE / 2, 2 * LEASE);
            }
            Event::Crash => self.crash(),
        }
        Ok(())
    }

    fn arrives(&mut self, life: Life, request: Request, answered: bool) {
        let answer = match request {
            Request::GiveBackUnknown { session, in_hand } => {
                let given = self.db.give_back_unknown(session, &in_hand);
                self.saw("unknown jobs given back", given);
                Answer::GivenBack(session, Some(()))
            }
            Request::Claim { session, room } => {
                let jobs = self.db.claim(session, room);
                // Most harm is done where somebody had the job before.
                let retaken = jobs.iter().any(|job| job.crash_count > 0);
                if !jobs.is_empty() && self.chance(if retaken { 40 } else { 5 }) {
                    let soon = self.random.below(30);
                    self.after(soon, Event::Crash);
                }
                Answer::Claimed(session, Some(jobs))
            }
            Request::Commit(id, decided) => Answer::Committed(id, Some(self.commit(&decided))),
            Request::Holder(id, job) => Answer::Held(id, Some(self.db.holder_of(job))),
            Request::Expire(id, job) => Answer::Expired(id, Some(self.expire(&job))),
            Request::Settle(id, job, again_after) => {
                self.db.settle(job.lease, again_after);
                Answer::Settled(id, Some(()))
            }
        };
        if answered {
            let back = self.random.between(1, 20);
            self.after(back, Event::Hears(life, answer));
        }
    }

    fn commit(&mut self, decided: &Decided) -> bool {
        let held = self.db.commit(decided);
        if held && decided.approval.is_some() {
            self.people(decided.commit.lease.job as usize);
        }
        if held && let Some(letter) = &decided.letter {
            self.saw(letter.reason, 1);
        }
        held
    }

    fn person(&mut self, run: usize) {
        let status = if self.random.percent(75) { "approved" } else { "rejected" };
        let waited = self.db.approvals.iter().any(|approval| approval.run == run);
        if !self.db.decide_gate(run as i64, Asker::Person, status) && waited {
            self.saw("gates decided already", 1);
        }
    }

    /// The server dies and is back: claims that were not on disk are undone,
    /// nothing that was under way is answered.
    fn crash(&mut self) {
        if self.calm() {
            return;
        }
        let undone = self.random.below(self.db.unflushed() as u64 + 1);
        self.db.crash(undone as usize);
        self.saw("claims undone", undone as u32);
        for (at, event) in std::mem::take(&mut self.queue) {
            let event = match event {
                Event::Arrives(life, request, true) => Event::Hears(life, request.unanswered()),
                Event::Arrives(..) => continue,
                Event::Hears(life, answer) => Event::Hears(life, answer.lost()),
                other => other,
            };
            self.queue.insert(at, event);
        }
    }

    /// At the end: what was done was seen outside, each effect under one key.
    fn verdict(&mut self) -> Result<(), String> {
        let mut calls = self.witness.clone();
        for (id, run) in self.db.runs.iter().enumerate() {
            for (at, step) in run.playbook.steps.iter().enumerate() {
                let seen =
                    calls.remove(&digest::idempotency_key(RunId(Uuid::from_u128(id as u128)), &step.id, 0, None));
                let row = self.db.steps.get(&(id, at as i32));
                if seen.is_none() && row.is_some_and(|row| row.status == StepStatus::Completed) {
                    return Err(format!("run {id} step {at}: completed, and nobody outside saw it"));
                }
                *self.seen.entry("effects repeated").or_default() += seen.map_or(0, |calls| calls - 1);
            }
            *self.seen.entry(run.status.as_str()).or_default() += 1;
        }
        if calls.is_empty() { Ok(()) } else { Err(format!("{} effects of no step", calls.len())) }
    }
}
