//! The owner's own endpoint: one POST a turn. It answers with the step's output, or asks for
//! tools and is called again with what they gave.

use std::time::Duration;

use capx_core::domain::agent::message::{Block, Message, Reply, Stop, ToolResult, Usage};
use capx_core::domain::money::{COST_USD_MAX, Nanos};
use capx_core::domain::outcome::Failure;
use capx_core::store::agents::AgentRow;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{ANSWER_BYTES_MAX, Adapter, Answered, Ask, Payment, Trouble};
use crate::egress::{Call, Egress, Unanswered};

/// The time of one turn when the agent's `config.timeout` names none.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
struct Told {
    output: Option<Value>,
    tool_calls: Option<Vec<Asked>>,
    cost: Option<f64>,
    usage: Option<UsageTold>,
    #[serde(default)]
    memory: Option<Map<String, Value>>,
}

#[derive(Debug, Deserialize)]
struct Asked {
    id: String,
    name: String,
    #[serde(default)]
    input: Value,
}

#[derive(Debug, Deserialize)]
struct UsageTold {
    #[serde(default)]
    input_tokens: i64,
    #[serde(default)]
    output_tokens: i64,
    cost_usd: Option<f64>,
}

/// The adapter of any endpoint.
#[derive(Debug)]
pub(super) struct Custom;

impl Adapter for Custom {
    fn turn<'a>(&'a self, egress: &'a Egress, ask: &'a Ask<'a>) -> BoxFuture<'a, Result<Answered, Trouble>> {
        turn(egress, ask).boxed()
    }

    fn default_model(&self) -> &'static str {
        "custom"
    }

    fn default_timeout(&self) -> Duration {
        TIMEOUT
    }

    fn payment(&self) -> Payment {
        Payment::Told
    }
}

/// The address that an agent's endpoint has.
pub(super) fn endpoint(agent: &AgentRow) -> Result<&str, Failure> {
    let endpoint = agent.config.get("endpoint").and_then(Value::as_str);
    endpoint.ok_or_else(|| Failure::invalid(format!("the agent `{}` has no `config.endpoint`", agent.role)))
}

fn body(ask: &Ask<'_>) -> Value {
    let agent = ask.agent;
    let model = (ask.model != Custom.default_model()).then_some(ask.model);
    let mut body = json!({
        "company_id": ask.task.company, "run_id": ask.task.run, "step": ask.task.step, "action": ask.task.action,
        "params": ask.task.params,
        "agent": {"id": agent.agent, "role": agent.role, "model": model},
        "instructions": agent.instructions,
        "memory": ask.task.memory,
        // The task itself is in the fields above.
        "messages": ask.messages.iter().skip(1).flat_map(message).collect::<Vec<_>>(),
        "tools": ask.tools.iter().map(|tool| json!({
            "name": tool.name, "description": tool.description, "input_schema": tool.schema,
        })).collect::<Vec<_>>(),
        "idempotency_key": ask.key,
        "deadline": ask.timeout.as_secs(),
    });
    if let Some(feedback) = ask.task.feedback {
        body["feedback"] = feedback.clone();
    }
    body
}

fn message(message: &Message) -> Vec<Value> {
    match message {
        Message::User(text) => vec![json!({"role": "user", "content": text})],
        Message::Assistant(content) => {
            let call = |block: &Block| match block {
                Block::ToolUse { id, name, input } => Some(json!({"id": id, "name": name, "input": input})),
                _ => None,
            };
            let calls: Vec<Value> = content.iter().filter_map(call).collect();
            vec![json!({"role": "assistant", "tool_calls": calls})]
        }
        Message::Results(results) => results
            .iter()
            .map(|ToolResult { id, name, content, is_error }| {
                json!({"role": "tool", "tool_call_id": id, "name": name, "content": content, "is_error": is_error})
            })
            .collect(),
    }
}

async fn turn(egress: &Egress, ask: &Ask<'_>) -> Result<Answered, Trouble> {
    let headers = match ask.agent.config.get("headers") {
        Some(Value::Object(map)) => map.iter().filter_map(|(n, v)| Some((n.clone(), v.as_str()?.to_owned()))).collect(),
        _ => Vec::new(),
    };
    let call = Call {
        method: Method::POST,
        url: endpoint(ask.agent)?.to_owned(),
        headers,
        body: Some((body(ask).to_string().into_bytes(), "application/json".to_owned())),
        idempotency_key: ask.key.to_owned(),
        timeout: ask.timeout,
        idle: ask.idle,
        limit: ANSWER_BYTES_MAX,
        large: None,
        trusted: false,
    };
    let maybe = |failure: Failure| Trouble { failure, closed_for: None, maybe_paid: true, quota: false, fatal: false };
    let open = egress.open(call).await;
    let open = open.map_err(|Unanswered { failure, sent }| Trouble {
        failure,
        closed_for: None,
        maybe_paid: sent,
        quota: false,
        fatal: false,
    })?;
    let answer = open.whole().await.map_err(maybe)?;
    if let Some(failure) = answer.failure() {
        let fatal = matches!(answer.status, 401 | 403);
        return Err(Trouble { fatal, ..failure.into() });
    }
    answered(&answer.body, ask.model).map_err(maybe)
}

fn answered(body: &[u8], model: &str) -> Result<Answered, Failure> {
    let told: Told = serde_json::from_slice(body).map_err(|error| {
        Failure::invalid(format!(
            "the endpoint's answer is not the JSON of the contract, {{\"output\": …}} or {{\"tool_calls\": […]}}: {error}"
        ))
    })?;
    let (cost, usage) = paid(&told)?;
    let memory = told.memory.unwrap_or_default();
    let calls = told.tool_calls.unwrap_or_default();
    let stop = if calls.is_empty() { Stop::End } else { Stop::Tools };
    if calls.is_empty() && told.output.is_none() {
        return Err(Failure::invalid("the endpoint's answer has neither `output` nor `tool_calls`"));
    }
    let call = |Asked { id, name, input }| Block::ToolUse { id, name, input };
    let content = calls.into_iter().map(call).collect();
    let reply =
        Reply { content, stop, usage, model: model.to_owned(), id: None, output: told.output, simulated: false };
    Ok(Answered { reply, cost, memory })
}

/// What the endpoint says that it cost: `cost` wins over `usage`.
fn paid(told: &Told) -> Result<(Option<Nanos>, Option<Usage>), Failure> {
    let usage = match &told.usage {
        Some(UsageTold { input_tokens, output_tokens, .. }) => {
            let (Ok(input), Ok(output)) = (u64::try_from(*input_tokens), u64::try_from(*output_tokens)) else {
                return Err(Failure::invalid(format!(
                    "the endpoint's usage of {input_tokens} and {output_tokens} tokens is negative"
                )));
            };
            Some(Usage { input, output, ..Usage::default() })
        }
        None => None,
    };
    let usd = told.cost.or(told.usage.as_ref().and_then(|usage| usage.cost_usd));
    let nanos = |usd: f64| {
        Nanos::from_usd(usd).ok_or_else(|| {
            Failure::invalid(format!("the endpoint's cost {usd} is no amount from 0 to {COST_USD_MAX} USD"))
        })
    };
    Ok((usd.map(nanos).transpose()?, usage))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_gives_an_output_or_asks_for_tools() {
        let body = br#"{"output": "x", "cost": 0.5, "usage": {"cost_usd": 9}, "memory": {"k": 1}}"#;
        let Answered { reply, cost, memory } = answered(body, "custom").expect("an answer");
        assert_eq!(memory["k"], 1);
        assert_eq!((reply.output, reply.stop, cost), (Some(json!("x")), Stop::End, Some(Nanos(500_000_000))));
        let asks = br#"{"tool_calls": [{"id": "1", "name": "file_read", "input": {"path": "a"}}], "usage": {"input_tokens": 3}}"#;
        let Answered { reply, cost, .. } = answered(asks, "custom").expect("an answer");
        assert_eq!((reply.calls().count(), reply.stop.clone(), cost), (1, Stop::Tools, None));
        assert_eq!(reply.usage.map(|usage| usage.input), Some(3));
        for (body, why) in [
            ("{}", "neither"),
            ("<html>", "contract"),
            (r#"{"output": 1, "usage": {"input_tokens": -5}}"#, "negative"),
            (r#"{"output": 1, "cost": -5}"#, "-5"),
            (r#"{"tool_calls": [{"name": "x"}]}"#, "contract"),
        ] {
            let failure = answered(body.as_bytes(), "custom").expect_err(body);
            assert!(failure.message.contains(why), "{}", failure.message);
        }
    }
}
