//! The built-in model for trying playbooks without a provider: deterministic,
//! costs nothing, and says of every output that it is simulated.
//!
//! It follows a script where the agent has one: `config.script` maps an
//! action to its output.

use capx_core::domain::outcome::Outcome;
use capx_core::domain::playbook::rubric::GRADE;
use capx_core::store::agents::AgentRow;
use serde_json::{Value, json};

use crate::handlers::StepCall;

/// Nobody has looked at it: what is tried without a model goes on.
fn full_marks(call: &StepCall<'_>) -> Value {
    let asked = call.params.get("criteria").and_then(Value::as_array).into_iter().flatten();
    asked.filter_map(|criterion| Some((criterion["name"].as_str()?.to_owned(), Value::from(1.0)))).collect()
}

pub(super) fn answer(call: &StepCall<'_>, agent: &AgentRow) -> Outcome {
    let scripted = agent.config.get("script").and_then(|script| script.get(&call.step.action));
    let mut output = match scripted {
        Some(Value::Object(map)) => Value::Object(map.clone()),
        Some(Value::String(text)) => json!({"text": text}),
        Some(other) => json!({"value": other}),
        None if call.step.action == GRADE => json!({"scores": full_marks(call), "feedback": "simulated"}),
        None => json!({
            "text": format!("The {} carried out `{}` for the playbook {}.", agent.role, call.step.action, call.playbook),
            "params": call.params,
        }),
    };
    output["simulated"] = true.into();
    Outcome::done(output)
}
