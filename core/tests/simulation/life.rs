//! What a worker does, event by event: `workers/src/runtime` without its
//! threads and channels.

use std::rc::Rc;
use std::time::Duration;

use capx_core::domain::digest;
use capx_core::domain::money::Nanos;
use capx_core::domain::outcome::{ErrorClass, Failure, Outcome};
use capx_core::domain::plan::{CRASHES_MAX, SUSPECT_CRASHES};
use capx_core::domain::playbook::model::OnTimeout;
use capx_core::engine::advance::{self, Finished};
use capx_core::store::jobs::{ClaimedJob, kind};

use crate::database::{Asker, LEASE, ms, run_of};
use crate::worker::{Answer, Attempt, Life, Request, Worker, outcome};
use crate::world::{Event, World};

const BEAT: u64 = LEASE / 6;
/// The worker gives up after this long without a renewal.
const FENCED_OFF: u64 = LEASE * 8 / 10;
const POLL: u64 = 700;
/// How often what a session holds is compared with what is in hand.
const COMPARE: u64 = 5_000;
/// A gate's end that could not be written is tried again after this long.
const SYSTEM_DELAY: u64 = 2_000;

impl World {
    pub fn rise(&mut self, worker: usize) {
        self.workers[worker].alive = true;
        let life = Life { worker, life: self.workers[worker].life };
        self.open_session(life);
        self.after(BEAT, Event::Beat(life));
        self.after(BEAT, Event::Sweep(life));
    }

    /// The session is new; what is still in hand keeps the old one.
    fn open_session(&mut self, life: Life) {
        let session = self.db.open_session();
        let worker = &mut self.workers[life.worker];
        (worker.session, worker.renewed, worker.compared) = (session, self.db.now, Some(self.db.now));
        self.after(0, Event::Look(life));
    }

    pub fn die(&mut self, worker: usize) {
        if !self.workers[worker].alive || self.calm() {
            return;
        }
        self.saw("deaths", 1);
        let life = self.workers[worker].life + 1;
        self.workers[worker] = Worker { life, ..Worker::default() };
        let later = self.random.between(50, LEASE);
        self.after(later, Event::Rise(worker));
    }

    pub fn beat(&mut self, life: Life) {
        let now = self.db.now;
        let worker = &self.workers[life.worker];
        let (session, fenced_off) = (worker.session, now - worker.renewed > FENCED_OFF);
        let unheard = self.chance(15);
        if fenced_off || (!unheard && !self.db.beat(session)) {
            self.open_session(life);
        } else if !unheard {
            self.workers[life.worker].renewed = now;
        }
        self.after(BEAT, Event::Beat(life));
    }

    pub fn sweep(&mut self, life: Life) {
        let buried = self.db.bury();
        self.saw("sessions buried", buried);
        for (id, job) in self.db.reclaim() {
            self.saw("jobs taken back", 1);
            let session = job.session.expect("it was held");
            let holder = self.workers.iter().find(|worker| worker.alive && worker.session == session);
            let forgotten = holder.is_some_and(|worker| !worker.in_hand(session).contains(&id));
            self.saw("jobs not known to their holder until the deadline", forgotten.into());
        }
        let next = self.random.between(BEAT / 2, BEAT * 2);
        self.after(next, Event::Sweep(life));
    }

    pub fn look(&mut self, life: Life) {
        self.db.promote();
        let worker = &self.workers[life.worker];
        let session = worker.session;
        if worker.compared.is_none_or(|at| self.db.now - at >= COMPARE) {
            let in_hand = worker.in_hand(session);
            self.send(life, Request::GiveBackUnknown { session, in_hand });
        } else {
            self.claim(life, session);
        }
    }

    fn claim(&mut self, life: Life, session: i64) {
        let room = self.random.between(1, 3) as usize;
        self.send(life, Request::Claim { session, room });
    }

    pub fn hears(&mut self, life: Life, answer: Answer) {
        match answer {
            Answer::GivenBack(session, given) => {
                let worker = &mut self.workers[life.worker];
                if worker.session == session {
                    worker.compared = given.map(|()| self.db.now);
                }
                self.claim(life, session);
            }
            Answer::Claimed(session, jobs) => self.claimed(life, session, jobs),
            Answer::Committed(id, held) => self.committed(life, id, held),
            Answer::Held(id, Some(holder)) => {
                let landed = self.workers[life.worker].attempts.get(&id).is_some_and(|a| a.has_landed(holder));
                self.answered(life, id, landed);
            }
            Answer::Held(id, None) => self.again(life, id),
            Answer::Expired(id, Some(applied)) => {
                self.saw("gates decided already", (!applied).into());
                self.workers[life.worker].attempts.remove(&id);
            }
            Answer::Expired(id, None) => self.settle(life, id, Some(SYSTEM_DELAY)),
            Answer::Settled(id, Some(())) => drop(self.workers[life.worker].attempts.remove(&id)),
            Answer::Settled(id, None) => {
                let again = self.workers[life.worker].attempts[&id].job.kind == kind::GATE_TIMEOUT;
                self.settle(life, id, again.then_some(SYSTEM_DELAY));
            }
        }
    }

    fn claimed(&mut self, life: Life, session: i64, jobs: Option<Vec<ClaimedJob>>) {
        let worker = &mut self.workers[life.worker];
        if worker.session == session {
            worker.compared = worker.compared.filter(|_| jobs.is_some());
            let pause = if jobs.as_ref().is_some_and(|jobs| jobs.is_empty()) { POLL } else { POLL / 10 };
            self.after(pause, Event::Look(life));
        }
        for job in jobs.unwrap_or_default() {
            if self.workers[life.worker].holds(job.lease) {
                self.saw("claims undone and made again", 1);
                continue;
            }
            let work = (job.kind == kind::STEP).then(|| self.db.load(&job)).flatten();
            self.begin(life, Attempt::new(job, work));
        }
    }

    fn begin(&mut self, life: Life, mut attempt: Attempt) {
        self.attempts += 1;
        let id = self.attempts;
        let job = attempt.job.clone();
        let quarantined = attempt.work.as_ref().map(|_| job.crash_count >= CRASHES_MAX);
        if quarantined.is_some() && job.crash_count == SUSPECT_CRASHES && !self.db.charge_suspect(job.lease) {
            // Its lease is gone, so there is nothing to give back.
            return;
        }
        let timeout = ms(job.timeout);
        attempt.hangs = self.chance(3);
        let takes = if attempt.hangs { timeout } else { self.random.between(5, 1_500) };
        self.workers[life.worker].attempts.insert(id, attempt);
        match quarantined {
            None if job.kind == kind::GATE_TIMEOUT => self.send(life, Request::Expire(id, job)),
            // Its run is not running: the job only needs to go.
            None => self.settle(life, id, None),
            Some(true) => self.after(1, Event::Ends(life, id)),
            Some(false) => {
                let reach = self.random.below(takes);
                self.after(reach, Event::Effect(life, id));
                self.after(takes, Event::Ends(life, id));
            }
        }
    }

    pub fn effect(&mut self, life: Life, id: u64) {
        // A worker that thaws may come to the handler's end first.
        let worker = &mut self.workers[life.worker];
        let Some(attempt) = worker.attempts.get_mut(&id).filter(|attempt| !attempt.reached && attempt.work.is_some())
        else {
            return;
        };
        attempt.reached = true;
        let at = (run_of(&attempt.job), attempt.job.step);
        let context = &attempt.work.as_ref().expect("a step").context;
        let key = digest::idempotency_key(context.run, &context.playbook.steps[at.1 as usize].id, 0, None);
        if attempt.job.crash_count >= CRASHES_MAX {
            self.db.broken = Some(format!("{at:?} is tried after {} deaths", attempt.job.crash_count));
        }
        *self.witness.entry(key).or_default() += 1;
        if self.poison == Some(at) && self.chance(90) {
            self.die(life.worker);
        }
    }

    pub fn ends(&mut self, life: Life, id: u64) {
        if !self.workers[life.worker].attempts[&id].is_stopped() {
            self.effect(life, id);
        }
        if !self.workers[life.worker].alive {
            return;
        }
        let calm = self.calm();
        let stay = self.random.percent(75);
        let lost = self.random.percent(75);
        let worker = self.workers.get_mut(life.worker).expect("a worker");
        let attempt = worker.attempts.get_mut(&id).expect("an attempt in hand");
        let work = attempt.work.take().expect("a step");
        let outcome = if attempt.job.crash_count >= CRASHES_MAX {
            Outcome::failed(Failure::new(ErrorClass::Crash, "quarantined"))
        } else if lost && attempt.job.lease.session != worker.session {
            Outcome::Released { delay: Duration::ZERO }
        } else if attempt.hangs {
            Outcome::failed(Failure::new(ErrorClass::Timeout, "hung"))
        } else {
            outcome(&mut self.random, calm, attempt.job.step)
        };
        let finished = Finished { job: attempt.job.clone(), work, outcome, booked: Nanos::ZERO, took: Duration::ZERO };
        let decided = Rc::new(advance::decide(finished, stay, self.random.draw()));
        attempt.decided = Some(Rc::clone(&decided));
        self.send(life, Request::Commit(id, decided));
    }

    fn committed(&mut self, life: Life, id: u64, held: Option<bool>) {
        let attempt = self.workers[life.worker].attempts.get_mut(&id).expect("an attempt in hand");
        let (earlier, stays, job) = (attempt.maybe_landed, attempt.stays(), attempt.job.lease.job);
        match held {
            None => {
                attempt.maybe_landed = true;
                self.again(life, id);
            }
            // What is not ours any more needs no answer.
            Some(false) if earlier && stays => self.send(life, Request::Holder(id, job)),
            Some(held) => {
                self.saw("writes fenced off", (!held && !earlier).into());
                self.answered(life, id, held);
            }
        }
    }

    /// The commit of an attempt is answered: this worker goes on with its next
    /// step, or lets go.
    fn answered(&mut self, life: Life, id: u64, landed: bool) {
        let attempt = self.workers[life.worker].attempts.remove(&id).expect("an attempt in hand");
        self.saw("commits found landed", (landed && attempt.maybe_landed).into());
        if let Some(next) = attempt.next().filter(|_| landed) {
            self.begin(life, next);
        }
    }

    /// Later, unless the session is dead: then others run the step again.
    fn again(&mut self, life: Life, id: u64) {
        let pause = self.random.between(20, 500);
        self.after(pause, Event::Repeat(life, id));
    }

    pub fn repeat(&mut self, life: Life, id: u64) {
        let worker = &mut self.workers[life.worker];
        let attempt = &worker.attempts[&id];
        if attempt.job.lease.session != worker.session {
            worker.attempts.remove(&id);
            return;
        }
        let decided = Rc::clone(attempt.decided.as_ref().expect("a decided attempt"));
        self.send(life, Request::Commit(id, decided));
    }

    fn settle(&mut self, life: Life, id: u64, again_after: Option<u64>) {
        let job = self.workers[life.worker].attempts[&id].job.clone();
        self.send(life, Request::Settle(id, job, again_after));
    }

    /// `gates::expire`.
    pub fn expire(&mut self, job: &ClaimedJob) -> bool {
        let step = &self.db.runs[run_of(job)].playbook.steps[job.step as usize];
        let status = match step.approval.as_ref().map(|approval| approval.on_timeout) {
            Some(OnTimeout::Approve) => "approved",
            _ => "expired",
        };
        self.db.decide_gate(job.lease.job, Asker::Timer(job.lease), status)
    }
}
