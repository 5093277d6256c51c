//! What an agent's `config` may say. What it bounds is checked here, so that no limit is left out
//! silently because it is written wrongly.

use capx_core::domain::agent::conversation::{SAME_CALLS, TURNS_MAX};
use capx_core::domain::duration;
use capx_core::engine::FieldProblem;
use serde_json::{Map, Value};

/// Everything wrong with it. What an adapter takes besides is its own business.
pub(super) fn problems(path: &str, config: &Map<String, Value>) -> Vec<FieldProblem> {
    let wrong =
        |(name, value): (&String, &Value)| Some(FieldProblem::new(format!("{path}.{name}"), problem(name, value)?));
    let mut problems: Vec<_> = config.iter().filter_map(wrong).collect();
    if config.contains_key("heartbeat") && config.contains_key("heartbeat_interval") {
        problems.push(FieldProblem::new(
            format!("{path}.heartbeat"),
            "means the same as `heartbeat_interval`; send one of them",
        ));
    }
    problems
}

fn problem(name: &str, value: &Value) -> Option<String> {
    let names = || value.as_array().is_some_and(|names| names.iter().all(Value::is_string));
    let within = |least: u64, most: u64| value.as_u64().is_some_and(|n| (least..=most).contains(&n));
    let (fine, must) = match name {
        "heartbeat_interval" => (within(1, u64::MAX), "whole seconds, 1 or more".to_owned()),
        "budget_limit_daily" | "max_cost" => {
            (value.as_f64().is_some_and(|usd| usd >= 0.0), "an amount in USD, 0 or more".to_owned())
        }
        "tools" => (names(), "a list of names".to_owned()),
        "allowed_hosts" => (names(), "a list of hosts, e.g. [\"api.example.com\", \"*.example.org\"]".to_owned()),
        "endpoint" => (value.is_string(), "a URL".to_owned()),
        "max_tokens" => (within(1, u64::MAX), "a whole number, 1 or more".to_owned()),
        "breaker" => (within(0, u64::MAX), "a whole number, 0 or more".to_owned()),
        "max_turns" => (within(1, TURNS_MAX.into()), format!("a whole number from 1 to {TURNS_MAX}")),
        "max_same_calls" => {
            let (least, most) = (*SAME_CALLS.start(), *SAME_CALLS.end());
            (within(least.into(), most.into()), format!("a whole number from {least} to {most}"))
        }
        "timeout" => {
            let span = value.as_str().is_some_and(|text| duration::parse(text.trim()).is_ok());
            (span, "a span of time, e.g. \"90s\"".to_owned())
        }
        "on_unknown" => (["retry", "review"].iter().any(|way| value == way), "`retry` or `review`".to_owned()),
        "fallback" => {
            let models = value.as_array().is_some_and(|models| models.iter().all(Value::is_object));
            (models, "a list of {adapter?, model?, on?}".to_owned())
        }
        _ => return None,
    };
    (!fine).then(|| format!("must be {must}"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn a_limit_that_is_written_wrongly_is_no_missing_limit() {
        let wrong = json!({
            "heartbeat_interval": 0, "budget_limit_daily": -1, "max_cost": "1", "tools": "all", "allowed_hosts": 3,
            "endpoint": 1, "max_tokens": 0, "breaker": -1, "max_turns": 501, "max_same_calls": 1, "timeout": "soon",
            "fallback": {"model": "x"}, "on_unknown": "fail",
        });
        let wrong = wrong.as_object().expect("an object");
        assert_eq!(problems("config", wrong).len(), wrong.len());
        let fine = json!({
            "heartbeat_interval": 1, "budget_limit_daily": 0, "max_cost": 0.5, "tools": [], "allowed_hosts": ["x"],
            "endpoint": "http://x/", "max_tokens": 1, "breaker": 0, "max_turns": 500, "max_same_calls": 2,
            "timeout": "90s", "on_unknown": "review", "fallback": [{"model": "x"}], "temperature": "its own business",
        });
        let problems = problems("config", fine.as_object().expect("an object"));
        assert!(problems.is_empty(), "{problems:?}");
    }
}
