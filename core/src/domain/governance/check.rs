//! What is wrong with a policy, in words for whoever has sent it: a rule with a slip in it
//! would guard nothing.

use serde_json::{Map, Value};

use crate::domain::duration;
use crate::domain::playbook::model::OnTimeout;
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::tool::{self, same_name};

/// The keys of a policy.
const KEYS: &[&str] =
    &["mode", "spend_cap", "approval_required", "kill_switch", "approval", "spend_caps", "execution_policy"];
const APPROVAL: &[&str] =
    &["required", "auto_approve_below", "escalation_timeout", "timeout", "on_timeout", "reviewers"];
const EXECUTION: &[&str] =
    &["allowed_tools", "blocked_tools", "allowed_hosts", "max_concurrent_agents", "max_task_duration"];
const CAPS: &[&str] = &["per_agent", "per_company", "action"];
const CAP: &[&str] = &["daily", "monthly"];
const KILL_SWITCH: &[&str] = &["enabled", "preserve_state", "rollback_side_effects"];

/// Fields and what is wrong with them.
type Problems = Vec<(String, String)>;

/// Everything that is wrong with a policy; paths begin with `path`.
pub fn problems(path: &str, policy: &Value) -> Problems {
    let mut problems = Problems::new();
    match policy {
        Value::String(mode) => check_mode(path, mode, &mut problems),
        Value::Object(policy) => check(path, policy, &mut problems),
        _ => wrong(&mut problems, path, "must be a mode (human_in_loop, autonomous) or an object"),
    }
    problems
}

fn wrong(problems: &mut Problems, path: impl Into<String>, message: impl Into<String>) {
    problems.push((path.into(), message.into()));
}

fn check_mode(path: &str, mode: &str, problems: &mut Problems) {
    if !["human_in_loop", "autonomous"].contains(&mode) {
        wrong(problems, path, "must be human_in_loop or autonomous");
    }
}

fn check(path: &str, policy: &Map<String, Value>, problems: &mut Problems) {
    keys(path, policy, KEYS, problems);
    if let Some(mode) = policy.get("mode") {
        check_mode(&format!("{path}.mode"), mode.as_str().unwrap_or_default(), problems);
    }
    amount(path, policy, "spend_cap", "an amount in USD, 0 or more", problems);
    yes_or_names(path, policy, "approval_required", problems);
    if let Some((path, approval)) = map(path, policy, "approval", APPROVAL, problems) {
        yes_or_names(&path, approval, "required", problems);
        amount(&path, approval, "auto_approve_below", "credits, 0 or more", problems);
        for name in ["escalation_timeout", "timeout"] {
            span(&path, approval, name, problems);
        }
        names(&path, approval, "reviewers", problems);
        let rule = approval.get("on_timeout").map(|rule| rule.as_str().unwrap_or_default());
        if rule.is_some_and(|rule| OnTimeout::from_name(rule).is_none()) {
            wrong(problems, format!("{path}.on_timeout"), "must be reject, approve or escalate");
        }
    }
    if let Some((path, caps)) = map(path, policy, "spend_caps", CAPS, problems) {
        for scope in ["per_agent", "per_company"] {
            if let Some((path, cap)) = map(&path, caps, scope, CAP, problems) {
                for period in CAP {
                    amount(&path, cap, period, "an amount in USD, 0 or more", problems);
                }
            }
        }
        if caps.get("action").is_some_and(|action| action != "pause") {
            wrong(problems, format!("{path}.action"), "must be `pause`: that is what is done at a cap");
        }
    }
    if let Some((path, rules)) = map(path, policy, "execution_policy", EXECUTION, problems) {
        for list in ["allowed_tools", "blocked_tools"] {
            tools(&path, rules, list, problems);
        }
        names(&path, rules, "allowed_hosts", problems);
        span(&path, rules, "max_task_duration", problems);
        if rules.get("max_concurrent_agents").is_some_and(|n| n.as_i64().is_none_or(|n| n < 1)) {
            wrong(problems, format!("{path}.max_concurrent_agents"), "must be a whole number, 1 or more");
        }
    }
    match policy.get("kill_switch") {
        None | Some(Value::Bool(_) | Value::Null) => {}
        Some(_) => {
            if let Some((path, switch)) = map(path, policy, "kill_switch", KILL_SWITCH, problems) {
                for (name, value) in switch {
                    if !value.is_boolean() {
                        wrong(problems, format!("{path}.{name}"), "must be true or false");
                    }
                }
            }
        }
    }
}

fn keys(path: &str, given: &Map<String, Value>, known: &[&str], problems: &mut Problems) {
    for name in given.keys().filter(|name| !known.contains(&name.as_str())) {
        let hint = did_you_mean(name, known.iter().copied());
        let hint = hint.unwrap_or_else(|| format!("it takes {}", known.join(", ")));
        wrong(problems, format!("{path}.{name}"), format!("unknown field; {hint}"));
    }
}

fn map<'a>(
    path: &str,
    of: &'a Map<String, Value>,
    name: &str,
    known: &[&str],
    problems: &mut Problems,
) -> Option<(String, &'a Map<String, Value>)> {
    let path = format!("{path}.{name}");
    match of.get(name)? {
        Value::Null => None,
        Value::Object(inner) => {
            keys(&path, inner, known, problems);
            Some((path, inner))
        }
        _ => {
            wrong(problems, path, format!("must be an object with {}", known.join(", ")));
            None
        }
    }
}

fn amount(path: &str, of: &Map<String, Value>, name: &str, what: &str, problems: &mut Problems) {
    if of.get(name).is_some_and(|value| !value.is_null() && !value.as_f64().is_some_and(|n| n >= 0.0)) {
        wrong(problems, format!("{path}.{name}"), format!("must be {what}"));
    }
}

fn span(path: &str, of: &Map<String, Value>, name: &str, problems: &mut Problems) {
    let read = of.get(name).filter(|value| !value.is_null());
    if let Some(Err(why)) = read.map(|value| duration::parse(value.as_str().unwrap_or_default().trim())) {
        wrong(problems, format!("{path}.{name}"), format!("must be a duration such as \"4h\": {why}"));
    }
}

fn names(path: &str, of: &Map<String, Value>, name: &str, problems: &mut Problems) {
    let fine = |value: &Value| value.as_array().is_some_and(|list| list.iter().all(Value::is_string));
    if of.get(name).is_some_and(|value| !value.is_null() && !fine(value)) {
        wrong(problems, format!("{path}.{name}"), "must be a list of names");
    }
}

fn yes_or_names(path: &str, of: &Map<String, Value>, name: &str, problems: &mut Problems) {
    let fine = |value: &Value| match value {
        Value::Bool(_) | Value::Null => true,
        Value::Array(list) => list.iter().all(Value::is_string),
        _ => false,
    };
    if of.get(name).is_some_and(|value| !fine(value)) {
        wrong(problems, format!("{path}.{name}"), "must be true, false or a list of actions");
    }
}

/// Names of tools: one that is nearly a tool's is a slip.
fn tools(path: &str, of: &Map<String, Value>, name: &str, problems: &mut Problems) {
    names(path, of, name, problems);
    let known: Vec<&str> = tool::TOOLS.iter().flat_map(|t| t.aliases.iter().copied().chain([t.name])).collect();
    let given = of.get(name).and_then(Value::as_array).into_iter().flatten().filter_map(Value::as_str);
    for (at, given) in given.enumerate() {
        let is_known = known.iter().any(|tool| same_name(tool, given));
        if !is_known && let Some(near) = did_you_mean(given, known.iter().copied()) {
            wrong(problems, format!("{path}.{name}.{at}"), format!("there is no tool `{given}`; {near}"));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn the_policies_of_the_documents_are_fine() {
        for policy in [
            json!("human_in_loop"),
            json!({"spend_cap": 500, "approval_required": ["publish", "outbound-email"], "kill_switch": true}),
            json!({
                "approval": {"required": true, "auto_approve_below": 10, "escalation_timeout": "4h", "reviewers": ["founder", "admin"]},
                "spend_caps": {"per_agent": {"daily": 50, "monthly": 500}, "per_company": {"daily": 200, "monthly": 2000}, "action": "pause"},
                "kill_switch": {"enabled": true, "preserve_state": true, "rollback_side_effects": true},
                "execution_policy": {
                    "allowed_tools": ["llm.prompt", "file.read", "file.write", "http.request"], "blocked_tools": ["shell.run"],
                    "max_concurrent_agents": 4, "max_task_duration": "30m",
                },
            }),
        ] {
            assert_eq!(problems("governance", &policy), Problems::new());
        }
    }

    #[test]
    fn a_slip_is_told_with_its_place() {
        let policy = json!({
            "aproval": {}, "approval": {"required": 3, "escalation_timeout": "soon", "on_timeout": "maybe"},
            "spend_caps": {"per_agent": {"daily": -1}, "action": "warn"},
            "execution_policy": {"blocked_tools": ["shell.rum", "crm/delete"], "max_concurrent_agents": 0},
            "kill_switch": "on",
        });
        let fields: Vec<String> = problems("g", &policy).into_iter().map(|(field, _)| field).collect();
        assert_eq!(
            fields,
            [
                "g.aproval",
                "g.approval.required",
                "g.approval.escalation_timeout",
                "g.approval.on_timeout",
                "g.spend_caps.per_agent.daily",
                "g.spend_caps.action",
                "g.execution_policy.blocked_tools.0",
                "g.execution_policy.max_concurrent_agents",
                "g.kill_switch",
            ]
        );
        assert_eq!(problems("g", &json!("robot")).len(), 1);
        assert_eq!(problems("g", &json!(7)).len(), 1);
    }
}
