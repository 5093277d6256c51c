//! The built-in model for trying playbooks without a provider: deterministic,
//! costs nothing, and says of every output that it is simulated.
//!
//! It follows a script where the agent has one: `config.script` maps an action to its
//! output, or to a list of turns, each `{tool_calls: [{name, input}]}` or `{output}`.

use capx_core::domain::agent::message::{Block, Message, Reply, Stop};
use capx_core::domain::playbook::rubric::GRADE;
use futures_util::FutureExt;
use futures_util::future::{BoxFuture, ready};
use serde_json::{Map, Value, json};

use super::{Adapter, Answered, Ask, Payment, Trouble};
use crate::egress::Egress;

/// The adapter that stands in for a provider's.
#[derive(Debug)]
pub(super) struct OfflineModel;

impl Adapter for OfflineModel {
    fn turn<'a>(&'a self, _: &'a Egress, ask: &'a Ask<'a>) -> BoxFuture<'a, Result<Answered, Trouble>> {
        ready(Ok(Answered { reply: reply(ask), cost: None, memory: Map::new() })).boxed()
    }

    fn default_model(&self) -> &'static str {
        "offline"
    }

    fn payment(&self) -> Payment {
        Payment::Free
    }
}

/// Nobody has looked at it: what is tried without a model goes on.
fn full_marks(ask: &Ask<'_>) -> Value {
    let asked = ask.task.params.get("criteria").and_then(Value::as_array).into_iter().flatten();
    asked.filter_map(|criterion| Some((criterion["name"].as_str()?.to_owned(), Value::from(1.0)))).collect()
}

fn reply(ask: &Ask<'_>) -> Reply {
    let turn = ask.messages.iter().filter(|message| matches!(message, Message::Assistant(_))).count();
    let scripted = ask.agent.config.get("script").and_then(|script| script.get(ask.task.action));
    let said = |content: Vec<Block>, output: Option<Value>| Reply {
        stop: if content.is_empty() { Stop::End } else { Stop::Tools },
        content,
        usage: None,
        model: "offline".to_owned(),
        id: None,
        output,
        simulated: true,
    };
    let output = match scripted {
        Some(Value::Array(turns)) if turns.iter().all(is_turn) => {
            let calls = turns.get(turn).and_then(|turn| turn.get("tool_calls")).and_then(Value::as_array);
            if let Some(calls) = calls {
                return said(calls.iter().enumerate().map(|(at, call)| asked(turn, at, call)).collect(), None);
            }
            let last = || json!({"text": "The script has no more turns."});
            turns.get(turn).and_then(|turn| turn.get("output")).cloned().unwrap_or_else(last)
        }
        Some(output) => output.clone(),
        None if ask.task.action == GRADE => json!({"scores": full_marks(ask), "feedback": "simulated"}),
        None => json!({
            "text": format!("The {} carried out `{}` for the playbook {}.", ask.agent.role, ask.task.action, ask.task.playbook),
            "params": ask.task.params,
        }),
    };
    said(Vec::new(), Some(output))
}

fn is_turn(value: &Value) -> bool {
    value.get("tool_calls").is_some_and(Value::is_array) || value.get("output").is_some()
}

fn asked(turn: usize, at: usize, call: &Value) -> Block {
    Block::ToolUse {
        id: format!("call_{turn}_{at}"),
        name: call["name"].as_str().unwrap_or_default().to_owned(),
        input: call.get("input").cloned().unwrap_or_else(|| json!({})),
    }
}
