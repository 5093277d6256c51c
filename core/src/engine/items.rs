//! Attempts at items of a step that is done for a list, decided one by one. Their
//! lanes go on with other items, which the commit hands them.

use super::advance::Finished;
use super::claim::StepWork;
use crate::domain::outcome::{Failure, Outcome};
use crate::domain::plan::{Item, ItemDecision};
use crate::store::StoreError;
use crate::store::fans::{ItemCommit, ItemEnd};
use crate::store::jobs::{ClaimedJob, Lease};

/// A decided attempt at an item, and what its worker has in hand.
#[derive(Debug)]
pub struct DecidedItem {
    /// Under the attempt's lease.
    pub commit: ItemCommit,
    job: ClaimedJob,
    work: Box<StepWork>,
}

/// One attempt: pure. `draw` in `[0, 1)` is the jitter; `stay` lets the lane stay
/// with this worker.
pub fn decide(finished: Finished, item: i32, stay: bool, draw: f64) -> DecidedItem {
    let Finished { job, work, outcome, booked, took } = finished;
    let at = usize::try_from(job.step).unwrap_or(usize::MAX);
    let declared = work.context.playbook.step(at).and_then(|step| step.output.as_ref());
    let (outcome, output) = super::advance::storable_outcome(outcome, declared);
    let tries = u32::try_from(job.attempt).unwrap_or(0);
    let decision = match work.context.playbook.step(at) {
        Some(step) => work.context.decide_item(step, tries, &outcome, draw),
        None => ItemDecision::Failed,
    };
    let stay = stay && work.may_stay();
    let error = |failure: Option<&Failure>| {
        serde_json::json!({
            "code": failure.map(|f| f.class.as_str()), "message": failure.map(|f| f.message.as_str()),
            "item": item, "attempt": job.attempt,
        })
        .to_string()
    };
    let failure = match &outcome {
        Outcome::Failed { failure, .. } => Some(failure),
        _ => None,
    };
    let end = match decision {
        ItemDecision::Done => ItemEnd::Over { result: Ok(output.unwrap_or_else(|| "null".into())), stay },
        ItemDecision::Failed => ItemEnd::Over { result: Err(error(failure)), stay },
        ItemDecision::Retry { delay, charged } => {
            ItemEnd::Again { delay, attempt: if charged { job.attempt } else { (job.attempt - 1).max(0) } }
        }
    };
    let commit = ItemCommit {
        lease: job.lease,
        company: job.company,
        run: work.context.run,
        step: job.step,
        item,
        end,
        agent: work.agent(at).map(|agent| agent.agent),
        attempt: job.attempt,
        took,
        cost: outcome.cost().without(booked),
        booked,
    };
    DecidedItem { commit, job, work }
}

impl DecidedItem {
    /// It is tried again after a while.
    pub fn is_later(&self) -> bool {
        matches!(self.commit.end, ItemEnd::Again { delay, .. } if !delay.is_zero())
    }

    /// It may be tried at once, by whoever takes it.
    pub fn is_given_back(&self) -> bool {
        matches!(self.commit.end, ItemEnd::Again { delay, .. } if delay.is_zero())
    }

    /// The lane may stay with this worker.
    pub fn may_go_on(&self) -> bool {
        matches!(self.commit.end, ItemEnd::Over { stay: true, .. })
    }

    /// What this worker goes on with, once that is written.
    pub fn next(mut self, item: i32) -> Option<(ClaimedJob, Box<StepWork>)> {
        let ItemEnd::Over { stay: true, .. } = self.commit.end else { return None };
        let index = usize::try_from(item).ok()?;
        self.work.chain += 1;
        self.work.context.child = None;
        self.work.context.item = self.work.context.item.map(|now| Item::new(index, now.list));
        let lease = Lease { epoch: self.job.lease.epoch + 1, ..self.job.lease };
        let job = ClaimedJob { lease, item: Some(item), attempt: 1, crash_count: 0, ..self.job };
        Some((job, self.work))
    }

    /// The failure that takes the place of a result the database refuses.
    pub fn unstorable(mut self, error: &StoreError) -> Self {
        let failure = Failure::invalid(format!("the result could not be stored: {error}"));
        let told = serde_json::json!({"code": "invalid", "message": failure.message, "item": self.commit.item});
        self.commit.end = ItemEnd::Over { result: Err(told.to_string()), stay: false };
        self
    }
}
