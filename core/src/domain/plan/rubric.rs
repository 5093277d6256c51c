//! What a step has said is a draft until it meets the step's rubric: it is graded, and
//! then taken, done anew, shown to a person, or given up. Each draft is kept before it
//! is graded, so that nobody pays twice for it.

use std::collections::HashMap;
use std::sync::Arc;

use serde_json::{Value, json};

use super::{Gate, RunContext};
use crate::domain::digest;
use crate::domain::outcome::{ErrorClass, Failure, Outcome};
use crate::domain::playbook::expr::Budget;
use crate::domain::playbook::model::Step;
use crate::domain::playbook::rubric::{Evaluation, Grades, Measure, OnFail, Rubric, counted, seconds};

/// How a step with a rubric stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stage {
    /// Its draft is to be graded.
    Drafted,
    /// Its draft was not good enough: it is to be done anew.
    Returned,
    /// Its draft waits for a person.
    Escalated,
    /// A person has taken the draft.
    Accepted,
    /// A person does not want the draft: the step fails.
    Rejected,
    /// Nobody has decided about the draft in time: the step fails.
    Expired,
    /// Its draft is good enough.
    Passed,
    /// It has given up.
    Blocked,
}

impl Stage {
    const NAMES: &'static [(&'static str, Self)] = &[
        ("drafted", Self::Drafted),
        ("returned", Self::Returned),
        ("escalated", Self::Escalated),
        ("accepted", Self::Accepted),
        ("rejected", Self::Rejected),
        ("expired", Self::Expired),
        ("passed", Self::Passed),
        ("blocked", Self::Blocked),
    ];

    /// The word in the table.
    pub fn as_str(self) -> &'static str {
        Self::NAMES.iter().find(|(_, stage)| *stage == self).map_or("drafted", |(name, _)| name)
    }

    /// From the word in the table.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::NAMES.iter().find(|(known, _)| *known == name).map(|(_, stage)| *stage)
    }
}

/// The last draft of a step.
#[derive(Debug, Clone, PartialEq)]
pub struct Draft {
    /// How it stands.
    pub stage: Stage,
    /// How many there were so far, this one included.
    pub count: u32,
    /// How often the step was done anew for them, since it began or was retried.
    pub returns: u32,
    /// What the step has said, as long as somebody is to look at it.
    pub output: Option<Value>,
    /// What it came to.
    pub evaluation: Option<Value>,
}

impl Draft {
    /// A person was asked about it, and it was not taken.
    pub fn is_turned_down(&self) -> bool {
        matches!(self.stage, Stage::Rejected | Stage::Expired)
    }
}

/// What has come of grading, besides the step's outcome.
#[derive(Debug, Clone, PartialEq)]
pub struct Graded {
    /// To be kept.
    pub draft: Draft,
    /// It was evaluated just now.
    pub is_news: bool,
    /// The step is not over yet.
    pub holds: Option<Hold>,
}

/// What a step comes to that is not over.
#[derive(Debug, Clone, PartialEq)]
pub enum Hold {
    /// It is attempted again at once: to grade the draft, or to make another.
    Again,
    /// A person decides.
    Ask(Box<Gate>),
}

impl RunContext {
    /// The draft that the attempt at hand is to grade.
    pub fn to_grade(&self) -> Option<&Draft> {
        self.draft.as_ref().filter(|draft| draft.stage == Stage::Drafted && draft.output.is_some())
    }

    /// The draft that a person decides about, or has.
    pub fn to_settle(&self) -> Option<&Draft> {
        let settled = |draft: &&Draft| matches!(draft.stage, Stage::Escalated | Stage::Accepted);
        self.draft.as_ref().filter(settled).filter(|draft| draft.output.is_some())
    }

    /// Why the last draft was returned, for whoever makes another.
    pub fn feedback(&self) -> Option<&Value> {
        let returned = |draft: &&Draft| matches!(draft.stage, Stage::Returned | Stage::Blocked);
        self.draft.as_ref().filter(returned)?.evaluation.as_ref()
    }

    /// How many drafts there were before the one that is made now, or graded.
    pub fn drafts_before(&self) -> u32 {
        self.draft.as_ref().map_or(0, |draft| draft.count - u32::from(draft.stage == Stage::Drafted))
    }

    /// The outcome of an attempt at a step by its rubric; the same without one.
    pub fn grade(&mut self, at: usize, outcome: Outcome) -> (Outcome, Option<Graded>) {
        let playbook = Arc::clone(&self.playbook);
        let step = playbook.step(at);
        let Some((step, rubric)) = step.and_then(|step| Some((step, step.rubric.as_ref()?))) else {
            return (outcome, None);
        };
        let Outcome::Done { output, cost } = outcome else { return (outcome, None) };
        let (mut draft, grades, asked) = match self.draft.take() {
            Some(draft @ Draft { stage: Stage::Escalated | Stage::Accepted, .. }) => {
                return self.settle(at, step, draft);
            }
            Some(draft @ Draft { stage: Stage::Drafted, .. }) => (draft, Grades::of(&output), true),
            last => {
                // Who has done it may grade it at once, unless another one is to.
                let grades = if rubric.judge.is_none() { Grades::of(&output) } else { Grades::default() };
                let last = last.map_or((0, 0), |last| (last.count, last.returns));
                let draft = Draft {
                    stage: Stage::Drafted,
                    count: last.0 + 1,
                    returns: last.1,
                    output: Some(output),
                    evaluation: None,
                };
                (draft, grades, false)
            }
        };
        let done = |output: Value| Outcome::Done { output, cost };
        if let Some(missing) = rubric.graded().find(|criterion| !grades.scores.contains_key(&criterion.name)) {
            if !asked {
                return (done(Value::Null), Some(Graded { draft, is_news: false, holds: Some(Hold::Again) }));
            }
            let name = &missing.name;
            let message = format!(
                "whoever grades gave no score for `{name}`; the answer is {{\"scores\": {{\"{name}\": 0.8}}}}, from 0 to 1"
            );
            // A model may do better the next time.
            return (Outcome::Failed { failure: Failure::transient(message), cost }, None);
        }
        let output = draft.output.take().unwrap_or_default();
        let evaluation = self.evaluate(at, rubric, &output, grades);
        let told = |decision| Some(evaluation.to_json(decision, draft.count, rubric.composite_threshold));
        let graded = |draft, holds| Some(Graded { draft, is_news: true, holds });
        match evaluation.fails {
            None => {
                self.scores.insert(at, evaluation.score.into());
                let draft = Draft { stage: Stage::Passed, evaluation: told("pass"), ..draft };
                (done(output), graded(draft, None))
            }
            Some(OnFail::Retry) if draft.returns < rubric.max_retries => {
                let evaluation = told("retry");
                let draft = Draft { stage: Stage::Returned, returns: draft.returns + 1, evaluation, ..draft };
                (done(Value::Null), graded(draft, Some(Hold::Again)))
            }
            Some(OnFail::Escalate) => {
                let evaluation = told("escalate");
                let gate = self.escalation(at, step, &output, evaluation.as_ref());
                let draft = Draft { stage: Stage::Escalated, output: Some(output), evaluation, ..draft };
                (done(Value::Null), graded(draft, Some(Hold::Ask(Box::new(gate)))))
            }
            Some(OnFail::Retry | OnFail::Block) => {
                let drafts = if draft.count > 1 { format!(", after {} drafts", draft.count) } else { String::new() };
                let lacks = evaluation.lacks(rubric.composite_threshold);
                let message = format!("the output does not meet the step's rubric{drafts}: {lacks}");
                let failure = Failure::new(ErrorClass::Rubric, message);
                // Who retries the run allows as many again.
                let draft = Draft { stage: Stage::Blocked, returns: 0, evaluation: told("block"), ..draft };
                (Outcome::Failed { failure, cost }, graded(draft, None))
            }
        }
    }

    /// A draft that a person has taken is the step's output; about any other a person
    /// is asked again.
    fn settle(&mut self, at: usize, step: &Step, draft: Draft) -> (Outcome, Option<Graded>) {
        let output = draft.output.clone().unwrap_or_default();
        if draft.stage == Stage::Escalated {
            let gate = self.escalation(at, step, &output, draft.evaluation.as_ref());
            let holds = Some(Hold::Ask(Box::new(gate)));
            return (Outcome::done(Value::Null), Some(Graded { draft, is_news: false, holds }));
        }
        let score = draft.evaluation.as_ref().map(|evaluation| evaluation["score"].clone());
        self.scores.extend(score.map(|score| (at, score)));
        let draft = Draft { stage: Stage::Passed, output: None, ..draft };
        (Outcome::done(output), Some(Graded { draft, is_news: false, holds: None }))
    }

    /// What the approver of a draft is shown.
    fn escalation(&self, at: usize, step: &Step, output: &Value, evaluation: Option<&Value>) -> Gate {
        let approval = step.gate();
        let context = json!({
            "playbook": self.playbook.name,
            "step": step.id,
            "role": step.role,
            "action": step.action,
            "message": "the output does not meet the step's rubric; approve it as it is, or reject it",
            "output": output,
            "rubric": evaluation,
        });
        let digest = digest::sha256(context.to_string());
        Gate { step: at, context, digest, approval, call: None }
    }

    /// The output as what it comes to: what is computed, and what was graded.
    fn evaluate(&mut self, at: usize, rubric: &Rubric, output: &Value, grades: Grades) -> Evaluation {
        let Grades { mut scores, feedback } = grades;
        let mut words: Vec<String> = feedback.into_iter().collect();
        if rubric.criteria.iter().any(|criterion| criterion.check.is_some()) {
            let before = Arc::make_mut(&mut self.outputs).insert(at, output.clone());
            self.compute(rubric, &mut scores, &mut words);
            let outputs = Arc::make_mut(&mut self.outputs);
            match before {
                Some(before) => outputs.insert(at, before),
                None => outputs.remove(&at),
            };
        }
        rubric.evaluate(&scores, Some(words.join("\n")).filter(|words| !words.is_empty()))
    }

    fn compute(&self, rubric: &Rubric, scores: &mut HashMap<String, f64>, words: &mut Vec<String>) {
        let mut budget = Budget::default();
        for criterion in &rubric.criteria {
            let Some(check) = &criterion.check else { continue };
            let score = match check.eval(&self.scope(), budget.renew()).map(|value| value.into_owned()) {
                Ok(Value::Bool(holds)) => f64::from(u8::from(holds)),
                Ok(Value::Number(number)) => number.as_f64().unwrap_or(0.0).clamp(0.0, 1.0),
                Ok(other) => {
                    let found = crate::domain::playbook::expr::kind_of(&other);
                    words.push(format!("{}: the check gives {found}, not true, false or a number", criterion.name));
                    0.0
                }
                // What an output lacks it does not come up to.
                Err(error) => {
                    words.push(format!("{}: {error}", criterion.name));
                    0.0
                }
            };
            scores.insert(criterion.name.clone(), score);
        }
    }

    /// Whether the run has spent more already, or taken longer, than it may.
    pub fn is_over_limit(&self) -> bool {
        let measured = |measure: &Measure| match measure {
            Measure::Cost => Some(self.spent.to_usd()),
            Measure::Duration => Some(seconds(self.age)),
            Measure::Said(_) => None,
        };
        let limits = self.playbook.limits.iter().filter(|limit| limit.is_max);
        limits.filter_map(|limit| Some((limit, measured(&limit.measure)?))).any(|(limit, n)| !limit.holds(n))
    }

    /// How the run stands by its limits now that its steps are over, as it is told; what
    /// it says of the first that is broken. Nothing where it has none.
    pub fn limits(&self, output: Option<&Value>) -> Option<(Value, Result<(), Failure>)> {
        if self.playbook.limits.is_empty() {
            return None;
        }
        let said = |name: &str| {
            let last = (0..self.playbook.steps.len()).rev().filter_map(|at| self.outputs.get(&at)?.get(name));
            output.and_then(|output| output.get(name)).into_iter().chain(last).find_map(counted)
        };
        let (mut told, mut broken, mut held) = (Vec::new(), Vec::new(), 0);
        for limit in &self.playbook.limits {
            let measured = match &limit.measure {
                Measure::Cost => Some(self.spent.to_usd()),
                Measure::Duration => Some(seconds(self.age)),
                Measure::Said(name) => said(name),
            };
            match measured.map(|measured| (measured, limit.holds(measured))) {
                Some((measured, false)) => {
                    let least = if limit.is_max { "at most" } else { "at least" };
                    broken.push(format!("{} is {measured}, where {least} {} is asked", &limit.name[4..], limit.value));
                }
                Some((_, true)) => held += 1,
                None => {}
            }
            told.push(limit.told(measured));
        }
        let measured = held + broken.len();
        let score = if measured == 0 { 1.0 } else { held as f64 / measured as f64 };
        let decision = if broken.is_empty() { "pass" } else { "block" };
        let told =
            json!({"score": score, "passed": broken.is_empty(), "decision": decision, "criteria": Value::Array(told)});
        let kept = match broken.is_empty() {
            true => Ok(()),
            false => {
                let message = format!("the run does not meet its rubric: {}", broken.join("; "));
                Err(Failure::new(ErrorClass::Rubric, message))
            }
        };
        Some((told, kept))
    }
}
