//! Holding a value against criteria, by computing: what an agent can check without asking a
//! model.

use serde_json::{Map, Value, json};

use crate::domain::playbook::expr::{self, Budget, Reference, Scope};

/// How many criteria one call may name.
const CHECKS_MAX: usize = 50;

struct Under<'a> {
    output: &'a Value,
}

impl Scope for Under<'_> {
    fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)> {
        (reference.name(0)? == "output").then_some((self.output, 1))
    }
}

/// `{output, checks: [{name, check, weight?, threshold?}]}` -> `{score, passed, checks:
/// [{name, score, passed, error?}]}`. A check is an expression over `output`: true, false, or a
/// score from 0 to 1.
pub fn evaluate(params: &Map<String, Value>) -> Result<Value, String> {
    let output = params.get("output").ok_or("`output` is required")?;
    let checks = params.get("checks").and_then(Value::as_array).ok_or("`checks` is a list of {name, check}")?;
    if checks.is_empty() || checks.len() > CHECKS_MAX {
        return Err(format!("`checks` has 1 to {CHECKS_MAX} entries"));
    }
    let scope = Under { output };
    let mut budget = Budget::default();
    let (mut weights, mut sum, mut all_passed, mut told) = (0.0, 0.0, true, Vec::new());
    for (at, check) in checks.iter().enumerate() {
        let name = check["name"].as_str().map_or_else(|| (at + 1).to_string(), str::to_owned);
        let text = check["check"].as_str().ok_or_else(|| format!("`checks.{at}.check` is an expression"))?;
        let number =
            |key: &str, default: f64| check[key].as_f64().filter(|n| n.is_finite() && *n >= 0.0).unwrap_or(default);
        let (weight, threshold) = (number("weight", 1.0), number("threshold", 1.0).min(1.0));
        let parsed = expr::parse(text).map_err(|error| format!("`checks.{at}.check`: {error}"))?;
        let (score, error) = match parsed.eval(&scope, budget.renew()).map(|value| value.into_owned()) {
            Ok(Value::Bool(holds)) => (f64::from(u8::from(holds)), None),
            Ok(Value::Number(n)) => (n.as_f64().unwrap_or(0.0).clamp(0.0, 1.0), None),
            Ok(other) => (0.0, Some(format!("gives {}, not true, false or a number", expr::kind_of(&other)))),
            // What an output lacks it does not come up to.
            Err(error) => (0.0, Some(error.to_string())),
        };
        let passed = score >= threshold;
        all_passed &= passed;
        weights += weight;
        sum += weight * score;
        let mut one = json!({"name": name, "score": score, "passed": passed});
        if let Some(error) = error {
            one["error"] = error.into();
        }
        told.push(one);
    }
    let score = if weights > 0.0 { sum / weights } else { 0.0 };
    Ok(json!({"score": score, "passed": all_passed, "checks": told}))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(value: Value) -> Result<Value, String> {
        evaluate(value.as_object().expect("a map"))
    }

    #[test]
    fn scores_are_computed_and_weighed() {
        let told = of(json!({
            "output": {"title": "short", "sources": [1, 2, 3]},
            "checks": [
                {"name": "title", "check": "len(output.title) < 60"},
                {"name": "sources", "check": "len(output.sources) / 6", "threshold": 0.5, "weight": 3},
                {"name": "missing", "check": "output.nothing > 1", "weight": 0},
            ],
        }))
        .expect("told");
        assert_eq!(told["score"], 0.625);
        assert_eq!((&told["passed"], &told["checks"][1]["passed"]), (&json!(false), &json!(true)));
        assert!(told["checks"][2]["error"].is_string());
        for wrong in [json!({}), json!({"output": 1, "checks": []}), json!({"output": 1, "checks": [{"check": "("}]})] {
            assert!(of(wrong).is_err());
        }
    }
}
