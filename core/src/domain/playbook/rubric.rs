//! Rubrics: what a step's output must come up to, and the limits of a whole run.
//!
//! A criterion is computed by an expression, or graded: by the one who has done the
//! step, or by a judge. Pure: scores come in, a verdict comes out.

use std::collections::HashMap;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::expr::Expr;

/// How often a step is done anew for its rubric, when that says nothing.
pub const RETRIES: u32 = 2;
/// How often it may ask for that.
pub const RETRIES_MAX: u32 = 20;
/// How many criteria a rubric may have.
pub const CRITERIA_MAX: usize = 50;
/// What the agent is asked to do that grades.
pub const GRADE: &str = "rubric.grade";
/// How much of a judge's words is kept.
const FEEDBACK_CHARS_MAX: usize = 4_000;

/// What the output of a step must come up to.
#[derive(Debug, Clone)]
pub struct Rubric {
    /// In the order written.
    pub criteria: Vec<Criterion>,
    /// What the weighted score must come up to; below it a person decides.
    pub composite_threshold: Option<f64>,
    /// The role whose agent grades; the step's own without.
    pub judge: Option<String>,
    /// How often the step is done anew at most.
    pub max_retries: u32,
}

/// One thing that is asked of an output.
#[derive(Debug, Clone)]
pub struct Criterion {
    /// Its name.
    pub name: String,
    /// What it counts for in the weighted score.
    pub weight: f64,
    /// What its score must come up to, from 0 to 1.
    pub threshold: f64,
    /// What follows when it does not.
    pub on_fail: OnFail,
    /// For whoever grades.
    pub description: Option<String>,
    /// What computes it; it is graded without.
    pub check: Option<Expr>,
}

/// What follows when a criterion is not met.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum OnFail {
    /// The step is done anew, and told why.
    #[default]
    Retry,
    /// A person decides.
    Escalate,
    /// The step fails.
    Block,
}

impl OnFail {
    /// Name and rule.
    pub const NAMES: &'static [(&'static str, Self)] =
        &[("retry", Self::Retry), ("escalate", Self::Escalate), ("block", Self::Block)];

    /// Its name.
    pub fn as_str(self) -> &'static str {
        Self::NAMES.iter().find(|(_, rule)| *rule == self).map_or("retry", |(name, _)| name)
    }
}

/// What a judge says, or the one who has done the step.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Grades {
    /// By criterion, from 0 to 1.
    pub scores: HashMap<String, f64>,
    /// Why.
    pub feedback: Option<String>,
}

impl Grades {
    /// From `{scores: {tone: 0.9, depth: {score: 0.4, feedback: …}}, feedback: …}`; what
    /// is no score from 0 to 1 is none.
    pub fn of(said: &Value) -> Self {
        let text = |value: &Value| value.as_str().map(str::trim).filter(|text| !text.is_empty()).map(str::to_owned);
        let mut words: Vec<String> = said.get("feedback").and_then(text).into_iter().collect();
        let mut scores = HashMap::new();
        for (name, score) in said.get("scores").and_then(Value::as_object).into_iter().flatten() {
            let number = score.as_f64().or_else(|| score.get("score")?.as_f64());
            if let Some(number) = number.filter(|number| (0.0..=1.0).contains(number)) {
                scores.insert(name.clone(), number);
            }
            words.extend(score.get("feedback").and_then(text).map(|why| format!("{name}: {why}")));
        }
        let words: String = words.join("\n").chars().take(FEEDBACK_CHARS_MAX).collect();
        Self { scores, feedback: Some(words).filter(|words| !words.is_empty()) }
    }
}

/// What an output comes to by its rubric.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// The weighted score, from 0 to 1.
    pub score: f64,
    /// What follows; nothing where the output is good enough.
    pub fails: Option<OnFail>,
    /// The criteria, as they are told.
    pub criteria: Vec<Value>,
    /// Why, in the words of whoever graded.
    pub feedback: Option<String>,
}

impl Rubric {
    /// The criteria that are graded.
    pub fn graded(&self) -> impl Iterator<Item = &Criterion> {
        self.criteria.iter().filter(|criterion| criterion.check.is_none())
    }

    /// What an output comes to. `scores` has one for each criterion; of those that are
    /// not met the strictest rule counts.
    pub fn evaluate(&self, scores: &HashMap<String, f64>, feedback: Option<String>) -> Evaluation {
        let (mut sum, mut weights, mut fails, mut criteria) = (0.0, 0.0, None, Vec::new());
        for criterion in &self.criteria {
            let score = scores.get(&criterion.name).copied().unwrap_or(0.0);
            let passed = score >= criterion.threshold;
            if !passed {
                fails = fails.max(Some(criterion.on_fail));
            }
            sum += criterion.weight * score;
            weights += criterion.weight;
            criteria.push(json!({
                "name": criterion.name, "score": score, "threshold": criterion.threshold,
                "weight": criterion.weight, "passed": passed, "on_fail": criterion.on_fail.as_str(),
            }));
        }
        // Of sums of floats nobody wants to see the last digits.
        let score = if weights > 0.0 { (sum / weights * 1e6).round() / 1e6 } else { 1.0 };
        if fails.is_none() && self.composite_threshold.is_some_and(|threshold| score < threshold) {
            fails = Some(OnFail::Escalate);
        }
        Evaluation { score, fails, criteria, feedback }
    }

    /// What a judge is asked.
    pub fn question(&self) -> Value {
        let asked = self.graded().map(|criterion| {
            let mut asked = json!({"name": criterion.name, "threshold": criterion.threshold});
            if let Some(description) = &criterion.description {
                asked["description"] = description.as_str().into();
            }
            asked
        });
        asked.collect()
    }
}

impl Evaluation {
    /// As it is stored and told. `decision` is `pass`, `retry`, `escalate` or `block`, and
    /// `reject` after a person has said no.
    pub fn to_json(&self, decision: &str, draft: u32, composite_threshold: Option<f64>) -> Value {
        let mut told = Map::new();
        told.insert("score".into(), self.score.into());
        told.insert("passed".into(), (decision == "pass").into());
        told.insert("decision".into(), decision.into());
        told.insert("draft".into(), draft.into());
        told.insert("criteria".into(), self.criteria.clone().into());
        if let Some(threshold) = composite_threshold {
            told.insert("composite_threshold".into(), threshold.into());
        }
        if let Some(feedback) = &self.feedback {
            told.insert("feedback".into(), feedback.as_str().into());
        }
        told.into()
    }

    /// What it lacks, in a sentence's end.
    pub fn lacks(&self, composite_threshold: Option<f64>) -> String {
        let missed: Vec<String> = self
            .criteria
            .iter()
            .filter(|criterion| criterion["passed"] == json!(false))
            .map(|criterion| {
                let name = criterion["name"].as_str().unwrap_or_default();
                format!("{name} is {} where {} is asked", criterion["score"], criterion["threshold"])
            })
            .collect();
        match (missed.is_empty(), composite_threshold) {
            (true, Some(threshold)) => format!("the score is {} where {threshold} is asked", self.score),
            _ => missed.join(", "),
        }
    }
}

/// A limit of a whole run.
#[derive(Debug, Clone, PartialEq)]
pub struct Limit {
    /// As written: `max_cost`.
    pub name: String,
    /// What is measured.
    pub measure: Measure,
    /// It is the most there may be; else the least.
    pub is_max: bool,
    /// How much: USD, seconds, or what the outputs count.
    pub value: f64,
}

/// What a limit is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Measure {
    /// What the run has cost, in USD.
    Cost,
    /// How long it has taken, in seconds.
    Duration,
    /// What the run's output says under this name, or the last step that says it: a
    /// number, or how many there are in a list or map.
    Said(String),
}

impl Limit {
    /// What is measured under the name of a limit, and whether it is the most.
    pub fn of(name: &str) -> Option<(Measure, bool)> {
        let (measure, is_max) = match (name.strip_prefix("max_"), name.strip_prefix("min_")) {
            (Some(measure), _) => (measure, true),
            (None, Some(measure)) => (measure, false),
            (None, None) => return None,
        };
        let measure = match measure {
            "" => return None,
            "cost" => Measure::Cost,
            "duration" => Measure::Duration,
            said => Measure::Said(said.to_owned()),
        };
        Some((measure, is_max))
    }

    /// Whether what was measured holds to it.
    pub fn holds(&self, measured: f64) -> bool {
        if self.is_max { measured <= self.value } else { measured >= self.value }
    }

    /// How it and what was measured are told; what nobody has said is neither held nor
    /// broken.
    pub fn told(&self, measured: Option<f64>) -> Value {
        json!({
            "name": self.name, "limit": self.value, "value": measured,
            "passed": measured.map(|measured| self.holds(measured)),
        })
    }
}

/// What a value counts for a limit.
pub fn counted(value: &Value) -> Option<f64> {
    match value {
        Value::Number(number) => number.as_f64(),
        Value::Array(items) => Some(items.len() as f64),
        Value::Object(map) => Some(map.len() as f64),
        _ => None,
    }
}

/// A duration in seconds, as limits count it.
pub fn seconds(duration: Duration) -> f64 {
    (duration.as_secs_f64() * 1e3).round() / 1e3
}

#[cfg(test)]
mod tests {
    use super::*;

    fn criterion(name: &str, weight: f64, threshold: f64, on_fail: OnFail) -> Criterion {
        Criterion { name: name.into(), weight, threshold, on_fail, description: None, check: None }
    }

    /// The long form of the source pages.
    fn content() -> Rubric {
        let criteria = vec![
            criterion("quality", 0.35, 0.8, OnFail::Retry),
            criterion("brand_voice", 0.30, 0.9, OnFail::Escalate),
            criterion("originality", 0.20, 0.7, OnFail::Retry),
            criterion("accuracy", 0.15, 0.95, OnFail::Block),
        ];
        Rubric { criteria, composite_threshold: Some(0.82), judge: None, max_retries: RETRIES }
    }

    fn fails(scores: [f64; 4]) -> (f64, Option<OnFail>) {
        let names = ["quality", "brand_voice", "originality", "accuracy"];
        let scores = names.into_iter().map(str::to_owned).zip(scores).collect();
        let evaluation = content().evaluate(&scores, None);
        (evaluation.score, evaluation.fails)
    }

    #[test]
    fn of_criteria_that_are_not_met_the_strictest_rule_counts() {
        assert_eq!(fails([1.0, 1.0, 1.0, 1.0]), (1.0, None));
        assert_eq!(fails([0.79, 1.0, 1.0, 1.0]).1, Some(OnFail::Retry));
        assert_eq!(fails([0.79, 0.89, 1.0, 1.0]).1, Some(OnFail::Escalate));
        assert_eq!(fails([0.79, 0.89, 0.0, 0.94]).1, Some(OnFail::Block));
        // At the threshold it is met.
        assert_eq!(fails([0.8, 0.9, 0.7, 0.95]), (0.8325, None));
    }

    #[test]
    fn below_the_weighted_score_a_person_decides() {
        let mut rubric = content();
        rubric.criteria.iter_mut().for_each(|criterion| criterion.threshold = 0.0);
        let all = |score| {
            let scores = rubric.criteria.iter().map(|criterion| (criterion.name.clone(), score)).collect();
            rubric.evaluate(&scores, None)
        };
        assert_eq!(all(0.82).fails, None);
        let below = all(0.81);
        assert_eq!(below.fails, Some(OnFail::Escalate));
        assert_eq!(below.lacks(rubric.composite_threshold), "the score is 0.81 where 0.82 is asked");
    }

    #[test]
    fn grades_are_read_in_both_forms_and_nothing_else_is_one() {
        let said = json!({
            "scores": {"a": 0.5, "b": {"score": 1, "feedback": "fine"}, "c": 1.1, "d": "0.9", "e": {"score": -0.1}},
            "feedback": " shorter ",
        });
        let grades = Grades::of(&said);
        assert_eq!(grades.scores, HashMap::from([("a".to_owned(), 0.5), ("b".to_owned(), 1.0)]));
        assert_eq!(grades.feedback.as_deref(), Some("shorter\nb: fine"));
        assert_eq!(Grades::of(&json!({"text": "nine of ten"})), Grades::default());
    }

    #[test]
    fn limits_are_of_what_is_measured() {
        assert_eq!(Limit::of("max_cost"), Some((Measure::Cost, true)));
        assert_eq!(Limit::of("min_sources"), Some((Measure::Said("sources".into()), false)));
        assert_eq!((Limit::of("quality"), Limit::of("max_")), (None, None));
        let limit = Limit { name: "min_sources".into(), measure: Measure::Cost, is_max: false, value: 5.0 };
        assert_eq!((limit.holds(5.0), limit.holds(4.0)), (true, false));
        assert_eq!(limit.told(None)["passed"], Value::Null);
        assert_eq!(counted(&json!([1, 2])), Some(2.0));
    }
}
