//! A run whose steps form a graph: which of them begin, by what has become of those
//! that they need. Each has a job of its own, a *node*; the run's own job comes to the
//! junction whenever one of them is over, and decides from what is stored.

use chrono::{DateTime, Utc};
use serde_json::{Value, json};

use super::{DeadReason, Letter, Next, RunContext};
use crate::domain::outcome::ErrorClass;
use crate::domain::playbook::expr::Budget;
use crate::domain::playbook::model::{OnFailure, Step, StepKind};
use crate::domain::run::StepStatus;

/// How a step stands that has begun.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Node {
    /// As its row says.
    pub status: StepStatus,
    /// When it was over.
    pub ended_at: Option<DateTime<Utc>>,
}

/// What a run does at the junction of its graph.
#[derive(Debug, Clone, PartialEq)]
pub struct Turn {
    /// Steps that are left out.
    pub skipped: Vec<usize>,
    /// Steps that begin: at once, behind a gate, or as a pause.
    pub begin: Vec<Next>,
    /// What then becomes of the run.
    pub then: Then,
}

/// What becomes of a run after a turn.
#[derive(Debug, Clone, PartialEq)]
pub enum Then {
    /// It goes on when one of its nodes is over.
    Wait,
    /// The same, and all of them wait for something outside.
    Suspend,
    /// It fails, once these wait no more that are not under way.
    Withdraw(Vec<usize>),
    /// All its steps are over.
    End {
        /// The run's own output.
        output: Option<Value>,
    },
    /// It fails at this step; none is under way any more.
    Fail(usize),
}

/// Whether a step that stands so waits for something outside.
fn waits_outside(step: &Step, status: StepStatus) -> bool {
    let pauses = matches!(step.kind, StepKind::Sleep(_) | StepKind::WaitFor(_));
    status == StepStatus::PendingApproval || (status == StepStatus::Waiting && pauses)
}

impl RunContext {
    /// Whether the run decides at its junction which steps begin.
    pub fn takes_turns(&self) -> bool {
        self.playbook.graph && self.ending.is_none()
    }

    /// Which steps begin, and what becomes of the run. Pure, and the same however
    /// often it is asked: what has begun does not begin again.
    pub fn turn(&mut self) -> Turn {
        let mut turn = Turn { skipped: Vec::new(), begin: Vec::new(), then: Then::Wait };
        if let Some(failed) = self.failed_node() {
            turn.then = self.end_with(Then::Fail(failed));
            return turn;
        }
        if self.is_over_limit() {
            turn.then = self.end_with(Then::End { output: None });
            return turn;
        }
        let mut begun = self.begin(&mut turn);
        begun.retain(|(at, status)| !self.is_over(*at, *status));
        turn.then = if begun.is_empty() {
            Then::End { output: self.output() }
        } else if begun.iter().all(|(at, status)| waits_outside(&self.playbook.steps[*at], *status)) {
            Then::Suspend
        } else {
            Then::Wait
        };
        turn
    }

    /// Lets steps begin until there is none left that may; all that have begun.
    fn begin(&mut self, turn: &mut Turn) -> Vec<(usize, StepStatus)> {
        let playbook = std::sync::Arc::clone(&self.playbook);
        let mut stands: Vec<Option<StepStatus>> =
            (0..playbook.steps.len()).map(|at| self.nodes.get(&at).map(|node| node.status)).collect();
        let mut budget = Budget::default();
        loop {
            let over = |at: &usize| stands[*at].is_some_and(|status| self.is_over(*at, status));
            let ready =
                (0..stands.len()).find(|at| stands[*at].is_none() && playbook.steps[*at].needs.iter().all(over));
            let Some(at) = ready else { break };
            let step = &playbook.steps[at];
            // One that gives no value is tried, and fails with the reason.
            if !self.holds_within(step, &mut budget).unwrap_or(true) {
                stands[at] = Some(StepStatus::Skipped);
                turn.skipped.push(at);
                continue;
            }
            let next = self.comes_to(at, step);
            stands[at] = Some(match next {
                Next::Gate(_) => StepStatus::PendingApproval,
                Next::Sleep { .. } => StepStatus::Waiting,
                _ => StepStatus::Pending,
            });
            turn.begin.push(next);
        }
        stands.into_iter().enumerate().filter_map(|(at, status)| Some((at, status?))).collect()
    }

    /// What the run comes upon at a step that may begin.
    fn comes_to(&self, at: usize, step: &Step) -> Next {
        match &step.kind {
            StepKind::Sleep(pause) => self.pause(pause).map_or(Next::Step(at), |delay| Next::Sleep { step: at, delay }),
            StepKind::Work | StepKind::Playbook(_) if !self.opened.contains(&at) => {
                self.gate(at).map_or(Next::Step(at), Next::Gate)
            }
            _ => Next::Step(at),
        }
    }

    /// Whether nothing more comes of a step that stands so, and the run goes on.
    fn is_over(&self, at: usize, status: StepStatus) -> bool {
        match status {
            StepStatus::Completed | StepStatus::Skipped => true,
            StepStatus::Failed => self.playbook.steps[at].on_failure != OnFailure::Abort,
            _ => false,
        }
    }

    /// The first step that has failed and takes the run with it.
    fn failed_node(&self) -> Option<usize> {
        let failed = |(at, node): &(&usize, &Node)| {
            **at < self.playbook.steps.len() && node.status == StepStatus::Failed && !self.is_over(**at, node.status)
        };
        self.nodes.iter().filter(failed).min_by_key(|(at, node)| (node.ended_at, **at)).map(|(at, _)| *at)
    }

    /// What is under way is not lost: its result is kept, so that it need not be done
    /// again when the run is retried.
    fn end_with(&self, end: Then) -> Then {
        let under_way = |node: &Node| {
            !matches!(
                node.status,
                StepStatus::Completed | StepStatus::Failed | StepStatus::Skipped | StepStatus::Cancelled
            )
        };
        let open = self.nodes.iter().filter(|(at, node)| **at < self.playbook.steps.len() && under_way(node));
        let (waiting, running): (Vec<_>, Vec<_>) =
            open.partition(|(at, node)| waits_outside(&self.playbook.steps[**at], node.status));
        if !waiting.is_empty() {
            return Then::Withdraw(waiting.into_iter().map(|(at, _)| *at).collect());
        }
        if running.is_empty() { end } else { Then::Wait }
    }

    /// What is told of the step at which a run fails, and its dead letter; none where a
    /// person has said no.
    pub fn failed_with(&self, step: usize) -> (Value, Option<Letter>) {
        let error = self.failures.get(&step).cloned().unwrap_or_else(|| json!({"index": step}));
        let class = error["code"].as_str().and_then(ErrorClass::from_name);
        let attempt = error["attempt"].as_i64().and_then(|attempt| i32::try_from(attempt).ok()).unwrap_or(0);
        let retried =
            self.playbook.step(step).is_some_and(|step| class.is_some_and(|class| step.retry.on.contains(&class)));
        let reason = match class {
            Some(ErrorClass::Crash) => DeadReason::Quarantined,
            _ if retried => DeadReason::Exhausted,
            _ => DeadReason::Invalid,
        };
        let letter = error["approval_id"].is_null().then_some(Letter { reason, attempt, crash_count: 0 });
        (error, letter)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::{BTreeSet, HashMap};
    use std::sync::Arc;

    use proptest::prelude::*;

    use super::*;
    use crate::domain::ids::{CompanyId, PlaybookId, RunId};
    use crate::domain::playbook;

    fn context(yaml: &str) -> RunContext {
        let playbook = playbook::load(yaml).unwrap_or_else(|problems| panic!("{problems:?}\n{yaml}"));
        RunContext::new(CompanyId::new(), PlaybookId::new(), RunId::new(), Arc::new(playbook), Arc::new(json!({})))
    }

    fn place(next: &Next) -> usize {
        match next {
            Next::Step(step) | Next::Sleep { step, .. } => *step,
            Next::Gate(gate) => gate.step,
            Next::End { .. } | Next::Closed | Next::Junction => panic!("{next:?} is no beginning"),
        }
    }

    const DIAMOND: &str = "name: x
steps:
  - {id: a, action: transform}
  - {id: b, needs: [a], action: transform}
  - {id: c, needs: [a], sleep: 1h}
  - {id: d, needs: [b, c], action: transform}
  - {id: e, action: transform, approval: required}
";

    #[test]
    fn steps_begin_when_those_are_over_that_they_need() {
        let mut run = context(DIAMOND);
        assert_eq!(run.turn(), Turn { skipped: vec![], begin: vec![Next::Step(0)], then: Then::Wait });
        let over = |status| Node { status, ended_at: None };
        run.nodes.insert(0, over(StepStatus::Completed));
        let turn = run.turn();
        assert_eq!(turn.begin.iter().map(place).collect::<Vec<_>>(), [1, 2]);
        assert_eq!(turn.then, Then::Wait);
        run.nodes.insert(1, over(StepStatus::Completed));
        run.nodes.insert(2, over(StepStatus::Waiting));
        assert_eq!(run.turn(), Turn { skipped: vec![], begin: vec![], then: Then::Suspend });
        run.nodes.insert(2, over(StepStatus::Completed));
        run.nodes.insert(3, over(StepStatus::Completed));
        // Without a word, a step needs the one before it.
        assert!(matches!(run.turn(), Turn { begin, then: Then::Suspend, .. } if place(&begin[0]) == 4));
        run.opened.insert(4);
        assert_eq!(run.turn().begin, [Next::Step(4)]);
        run.nodes.insert(4, over(StepStatus::Skipped));
        assert_eq!(run.turn().then, Then::End { output: None });
    }

    #[test]
    fn a_run_fails_when_what_is_under_way_is_over() {
        let mut run = context(DIAMOND);
        let node = |status| Node { status, ended_at: None };
        run.nodes = HashMap::from([
            (0, node(StepStatus::Completed)),
            (1, node(StepStatus::Failed)),
            (2, node(StepStatus::Waiting)),
        ]);
        assert_eq!(run.turn(), Turn { skipped: vec![], begin: vec![], then: Then::Withdraw(vec![2]) });
        run.nodes.insert(2, node(StepStatus::Running));
        assert_eq!(run.turn().then, Then::Wait);
        run.nodes.insert(2, node(StepStatus::Cancelled));
        assert_eq!(run.turn().then, Then::Fail(1));
    }

    proptest! {
        /// Random graphs, whose nodes end in random order and in random ways: each step
        /// begins once, after all that it needs, and the run ends with none left over.
        #[test]
        fn every_step_begins_once_and_after_what_it_needs(
            edges in prop::collection::vec(prop::collection::vec(any::<prop::sample::Index>(), 0..4), 1..25),
            order in prop::collection::vec(any::<prop::sample::Index>(), 25),
            ends in prop::collection::vec(0..10u8, 25),
        ) {
            let mut yaml = String::from("name: x\nsteps:\n");
            let mut needs = Vec::new();
            for (at, edges) in edges.iter().enumerate() {
                let before: BTreeSet<usize> = if at == 0 { BTreeSet::new() } else { edges.iter().map(|e| e.index(at)).collect() };
                let names: Vec<String> = before.iter().map(|at| format!("s{at}")).collect();
                let condition = if ends[at] == 0 { ", if: 'false'" } else { "" };
                yaml += &format!("  - {{id: s{at}, action: transform, needs: [{}]{condition}}}\n", names.join(", "));
                needs.push(before);
            }
            let mut run = context(&yaml);
            let (mut open, mut over, mut failed) = (Vec::new(), BTreeSet::new(), false);
            let mut order = order.iter().cycle();
            loop {
                let turn = run.turn();
                let mut now: BTreeSet<usize> = over.clone();
                now.extend(&turn.skipped);
                for at in turn.skipped.iter().chain(turn.begin.iter().map(place).collect::<Vec<_>>().iter()) {
                    prop_assert!(!over.contains(at) && !open.contains(at), "s{} begins twice", at);
                    prop_assert!(needs[*at].is_subset(&now), "s{} begins too early", at);
                    prop_assert!(!failed, "s{} begins after a failure", at);
                }
                for at in &turn.skipped {
                    run.nodes.insert(*at, Node { status: StepStatus::Skipped, ended_at: None });
                    over.insert(*at);
                }
                for next in &turn.begin {
                    run.nodes.insert(place(next), Node { status: StepStatus::Running, ended_at: None });
                    open.push(place(next));
                }
                match turn.then {
                    Then::End { .. } => {
                        prop_assert!(open.is_empty() && over.len() == needs.len());
                        break;
                    }
                    Then::Fail(_) => {
                        prop_assert!(open.is_empty() && failed);
                        break;
                    }
                    other => prop_assert_eq!(other, Then::Wait),
                }
                prop_assert!(!open.is_empty(), "nothing is under way, and nothing begins");
                let at = open.swap_remove(order.next().expect("cycles").index(open.len()));
                let status = if ends[at] == 1 { StepStatus::Failed } else { StepStatus::Completed };
                failed |= status == StepStatus::Failed;
                over.insert(at);
                run.nodes.insert(at, Node { status, ended_at: None });
            }
        }
    }
}
