//! The owner's own endpoint: one POST a turn, and its answer is the step's
//! output.

use std::time::Duration;

use capx_core::domain::duration;
use capx_core::domain::money::{COST_USD_MAX, Nanos};
use capx_core::domain::outcome::{ErrorClass, Failure, Outcome};
use capx_core::store::agents::AgentRow;
use reqwest::Method;
use serde::Deserialize;
use serde_json::{Value, json};

use crate::egress::Call;
use crate::handlers::{Hands, StepCall};

/// The largest answer of an agent, in bytes: it is read as JSON.
pub const ANSWER_BYTES_MAX: usize = 10 * 1024 * 1024;
/// The time of one call when the agent's `config.timeout` names none.
const TIMEOUT: Duration = Duration::from_secs(60);

#[derive(Debug, Deserialize)]
struct Reply {
    output: Option<Value>,
    tool_calls: Option<Vec<Value>>,
    cost: Option<f64>,
    usage: Option<Usage>,
}

#[derive(Debug, Deserialize)]
struct Usage {
    cost_usd: Option<f64>,
}

pub(super) async fn ask(hands: &Hands, call: StepCall<'_>, agent: &AgentRow) -> Outcome {
    match turn(hands, call, agent).await {
        Ok(outcome) => outcome,
        Err(failure) => Outcome::failed(failure),
    }
}

async fn turn(hands: &Hands, call: StepCall<'_>, agent: &AgentRow) -> Result<Outcome, Failure> {
    let endpoint = agent
        .config
        .get("endpoint")
        .and_then(Value::as_str)
        .ok_or_else(|| Failure::invalid(format!("the agent `{}` has no `config.endpoint`", agent.role)))?;
    let timeout = match agent.config.get("timeout").and_then(Value::as_str) {
        None => TIMEOUT,
        Some(text) => duration::parse(text).map_err(|e| Failure::invalid(format!("config.timeout: {e}")))?,
    };
    let headers = match agent.config.get("headers") {
        Some(Value::Object(map)) => map.iter().filter_map(|(n, v)| Some((n.clone(), v.as_str()?.to_owned()))).collect(),
        _ => Vec::new(),
    };
    let left = call.timeout.saturating_sub(call.began.elapsed());
    let mut body = json!({
        "company_id": call.company, "run_id": call.run, "step": call.step.id, "action": call.step.action,
        "params": call.params,
        "agent": {"id": agent.agent, "role": agent.role, "model": call.step.model.as_deref().or(agent.model.as_deref())},
        "instructions": agent.instructions,
        "memory": {}, "messages": [], "tools": [],
        "idempotency_key": call.idempotency_key,
        "deadline": left.as_secs(),
    });
    if let Some(feedback) = call.feedback {
        body["feedback"] = feedback.clone();
    }
    let answer = hands
        .egress
        .call(Call {
            method: Method::POST,
            url: endpoint.to_owned(),
            headers,
            body: Some((body.to_string().into_bytes(), "application/json".to_owned())),
            idempotency_key: call.idempotency_key,
            timeout: timeout.min(left),
            idle: call.idle,
            limit: ANSWER_BYTES_MAX,
            large: None,
        })
        .await?;
    if let Some(failure) = answer.failure() {
        return Err(failure);
    }
    let reply: Reply = serde_json::from_slice(&answer.body).map_err(|error| {
        Failure::new(
            ErrorClass::Invalid,
            format!("the endpoint's answer is not the JSON of the contract, {{\"output\": …}}: {error}"),
        )
    })?;
    if reply.tool_calls.is_some_and(|calls| !calls.is_empty()) {
        return Err(Failure::invalid("the endpoint asks for tool calls, which this version does not carry out"));
    }
    let Some(output) = reply.output else {
        return Err(Failure::invalid("the endpoint's answer has no `output`"));
    };
    let usd = reply.cost.or(reply.usage.and_then(|usage| usage.cost_usd)).unwrap_or(0.0);
    let cost = Nanos::from_usd(usd).ok_or_else(|| {
        Failure::invalid(format!("the endpoint's cost {usd} is no amount from 0 to {COST_USD_MAX} USD"))
    })?;
    let output = match output {
        Value::Object(map) => Value::Object(map),
        Value::String(text) => json!({"text": text}),
        other => json!({"value": other}),
    };
    Ok(Outcome::Done { output, cost })
}
