//! The built-in model for trying playbooks without a provider: deterministic,
//! costs nothing, and says of every output that it is simulated.
//!
//! It follows a script where the agent has one: `config.script` maps an
//! action to its output.

use capx_core::domain::outcome::Outcome;
use capx_core::store::agents::AgentRow;
use serde_json::{Value, json};

use crate::handlers::StepCall;

pub(super) fn answer(call: &StepCall<'_>, agent: &AgentRow) -> Outcome {
    let scripted = agent.config.get("script").and_then(|script| script.get(&call.step.action));
    let mut output = match scripted {
        Some(Value::Object(map)) => Value::Object(map.clone()),
        Some(Value::String(text)) => json!({"text": text}),
        Some(other) => json!({"value": other}),
        None => json!({
            "text": format!("The {} carried out `{}` for the playbook {}.", agent.role, call.step.action, call.playbook),
            "params": call.params,
        }),
    };
    output["simulated"] = true.into();
    Outcome::done(output)
}
