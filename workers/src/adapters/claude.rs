//! Anthropic's Messages API, as its reference describes it: `POST /v1/messages`, version
//! 2023-06-01. Answers are asked for as a stream, so that a long one is seen to move.

use capx_core::domain::agent::message::{Block, Message, Reply, Stop, ToolResult, Usage};
use capx_core::domain::agent::roles::built_in;
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::provider::{self, Account, Assembly, malformed};
use super::{Adapter, Answered, Ask, Offer, Trouble};
use crate::egress::Egress;
use capx_core::domain::outcome::{ErrorClass, Failure};
use std::time::Duration;

/// Where Anthropic listens.
pub const BASE_URL: &str = "https://api.anthropic.com";
const VERSION: &str = "2023-06-01";
/// How long everybody waits after a stream that says that the provider is overloaded.
const OVERLOADED: Duration = Duration::from_secs(5);

/// The adapter of an account.
#[derive(Debug)]
pub(super) struct Claude(pub Account);

impl Adapter for Claude {
    fn turn<'a>(&'a self, egress: &'a Egress, ask: &'a Ask<'a>) -> BoxFuture<'a, Result<Answered, Trouble>> {
        async move {
            let headers = vec![
                ("x-api-key".to_owned(), self.0.key().to_owned()),
                ("anthropic-version".to_owned(), VERSION.to_owned()),
            ];
            let url = format!("{}/v1/messages", self.0.base());
            let reply = provider::post::<Streamed>(egress, ask, url, headers, &body(ask)).await?;
            Ok(Answered { reply, cost: None, memory: Map::new() })
        }
        .boxed()
    }

    fn default_model(&self) -> &'static str {
        "claude-sonnet-4-6"
    }

    fn model_of(&self, role: &str) -> &'static str {
        built_in(role).map_or(self.default_model(), |role| role.model)
    }

    fn gate(&self) -> Option<String> {
        Some(format!("anthropic/{}", self.0.digest()))
    }
}

fn body(ask: &Ask<'_>) -> Value {
    let mut body = json!({
        "model": ask.model,
        "max_tokens": ask.max_tokens,
        // What stays the same over all turns is read from the cache from the second one on.
        "system": [{"type": "text", "text": ask.system, "cache_control": {"type": "ephemeral"}}],
        "messages": ask.messages.iter().map(message).collect::<Vec<_>>(),
        "stream": ask.agent.config.get("stream").and_then(Value::as_bool).unwrap_or(true),
    });
    if !ask.tools.is_empty() {
        body["tools"] = ask.tools.iter().map(described).collect();
    }
    // The owner's own, as the API takes them.
    for name in ["thinking", "temperature", "top_p", "top_k", "output_config"] {
        if let Some(value) = ask.agent.config.get(name) {
            body[name] = value.clone();
        }
    }
    body
}

fn described(tool: &Offer<'_>) -> Value {
    json!({"name": tool.name, "description": tool.description, "input_schema": tool.schema})
}

fn message(message: &Message) -> Value {
    match message {
        Message::User(text) => json!({"role": "user", "content": text}),
        Message::Assistant(content) => json!({"role": "assistant", "content": content}),
        Message::Results(results) => {
            let result = |result: &ToolResult| {
                json!({
                    "type": "tool_result", "tool_use_id": result.id, "content": result.content,
                    "is_error": result.is_error,
                })
            };
            json!({"role": "user", "content": results.iter().map(result).collect::<Vec<_>>()})
        }
    }
}

#[derive(Debug, Default, Deserialize)]
struct UsageTold {
    input_tokens: Option<u64>,
    output_tokens: Option<u64>,
    cache_read_input_tokens: Option<u64>,
    cache_creation_input_tokens: Option<u64>,
    cache_creation: Option<CacheCreation>,
}

#[derive(Debug, Deserialize)]
struct CacheCreation {
    #[serde(default)]
    ephemeral_1h_input_tokens: u64,
}

impl UsageTold {
    /// A later event tells more, or the same again.
    fn add(&mut self, later: Self) {
        let Self { input_tokens, output_tokens, cache_read_input_tokens, cache_creation_input_tokens, cache_creation } =
            later;
        self.input_tokens = input_tokens.or(self.input_tokens);
        self.output_tokens = output_tokens.or(self.output_tokens);
        self.cache_read_input_tokens = cache_read_input_tokens.or(self.cache_read_input_tokens);
        self.cache_creation_input_tokens = cache_creation_input_tokens.or(self.cache_creation_input_tokens);
        self.cache_creation = cache_creation.or(self.cache_creation.take());
    }

    fn usage(&self) -> Option<Usage> {
        let written = self.cache_creation_input_tokens.unwrap_or(0);
        let for_an_hour = self.cache_creation.as_ref().map_or(0, |told| told.ephemeral_1h_input_tokens).min(written);
        Some(Usage {
            input: self.input_tokens?,
            output: self.output_tokens?,
            cache_read: self.cache_read_input_tokens.unwrap_or(0),
            cache_write: written - for_an_hour,
            cache_write_1h: for_an_hour,
        })
    }
}

#[derive(Debug, Deserialize)]
struct Whole {
    id: Option<String>,
    model: String,
    content: Vec<Block>,
    stop_reason: Option<String>,
    usage: UsageTold,
}

fn stop(reason: Option<&str>) -> Stop {
    match reason {
        Some("tool_use") => Stop::Tools,
        Some("max_tokens" | "model_context_window_exceeded") => Stop::Length,
        Some("refusal") => Stop::Refused,
        Some("pause_turn") => Stop::Pause,
        _ => Stop::End,
    }
}

fn whole(body: &[u8]) -> Result<Reply, Trouble> {
    let Whole { id, model, content, stop_reason, usage } = serde_json::from_slice(body).map_err(malformed)?;
    Ok(Reply {
        content,
        stop: stop(stop_reason.as_deref()),
        usage: usage.usage(),
        model,
        id,
        output: None,
        simulated: false,
    })
}

/// What has come of a stream.
#[derive(Debug, Default)]
struct Streamed {
    id: Option<String>,
    model: String,
    blocks: Vec<Value>,
    /// The arguments of the tool that is being asked for, as JSON in the making.
    json: String,
    stop: Option<String>,
    usage: UsageTold,
}

#[derive(Debug, Deserialize)]
#[serde(tag = "type", rename_all = "snake_case")]
enum Event {
    MessageStart {
        message: Start,
    },
    ContentBlockStart {
        content_block: Value,
    },
    ContentBlockDelta {
        delta: Map<String, Value>,
    },
    ContentBlockStop,
    MessageDelta {
        delta: StopDelta,
        usage: Option<UsageTold>,
    },
    MessageStop,
    Error {
        error: Told,
    },
    // Such as `ping`; others may come, says the reference.
    #[serde(other)]
    Other,
}

#[derive(Debug, Deserialize)]
struct Start {
    id: Option<String>,
    model: String,
    usage: UsageTold,
}

#[derive(Debug, Deserialize)]
struct StopDelta {
    stop_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Told {
    #[serde(rename = "type")]
    kind: String,
    message: String,
}

impl Streamed {
    /// Adds what a delta brings to the block that is open.
    fn add(&mut self, delta: Map<String, Value>) -> Result<(), Trouble> {
        let block = self.blocks.last_mut().ok_or_else(|| malformed("a part of a block that never began"))?;
        for (name, part) in delta {
            match (name.as_str(), part) {
                ("type", _) => {}
                ("partial_json", Value::String(part)) => self.json.push_str(&part),
                // A citation is one of a list.
                ("citation", part) => match &mut block["citations"] {
                    Value::Array(list) => list.push(part),
                    other => *other = json!([part]),
                },
                // Text, thinking and signatures grow.
                (_, Value::String(part)) => match &mut block[&name] {
                    Value::String(so_far) => so_far.push_str(&part),
                    other => *other = part.into(),
                },
                (_, part) => block[&name] = part,
            }
        }
        Ok(())
    }
}

impl Assembly for Streamed {
    fn take(&mut self, data: &str) -> Result<bool, Trouble> {
        match serde_json::from_str(data).map_err(malformed)? {
            Event::MessageStart { message } => {
                (self.id, self.model) = (message.id, message.model);
                self.usage.add(message.usage);
            }
            Event::ContentBlockStart { content_block } => {
                self.json.clear();
                self.blocks.push(content_block);
            }
            Event::ContentBlockDelta { delta } => self.add(delta)?,
            Event::ContentBlockStop => {
                let json = std::mem::take(&mut self.json);
                if let (false, Some(block)) = (json.is_empty(), self.blocks.last_mut()) {
                    block["input"] = serde_json::from_str(&json).map_err(malformed)?;
                }
            }
            Event::MessageDelta { delta, usage } => {
                self.stop = delta.stop_reason.or(self.stop.take());
                self.usage.add(usage.unwrap_or_default());
            }
            Event::MessageStop => return Ok(true),
            Event::Error { error } => {
                let busy = matches!(error.kind.as_str(), "overloaded_error" | "rate_limit_error");
                let class = if busy { ErrorClass::RateLimited } else { ErrorClass::Transient };
                let mut failure = Failure::new(class, format!("the provider broke off: {}", error.message));
                let closed_for = busy.then_some(OVERLOADED);
                failure.retry_after = closed_for;
                return Err(Trouble { failure, closed_for, maybe_paid: true, quota: false, fatal: false });
            }
            Event::Other => {}
        }
        Ok(false)
    }

    fn whole(body: &[u8]) -> Result<Reply, Trouble> {
        whole(body)
    }

    fn finish(self) -> Result<Reply, Trouble> {
        let Self { id, model, blocks, stop: reason, usage, .. } = self;
        let content = blocks.into_iter().map(serde_json::from_value).collect::<Result<_, _>>().map_err(malformed)?;
        Ok(Reply {
            content,
            stop: stop(reason.as_deref()),
            usage: usage.usage(),
            model,
            id,
            output: None,
            simulated: false,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn streamed(events: &[Value]) -> Result<Reply, Trouble> {
        let mut assembly = Streamed::default();
        for event in events {
            if assembly.take(&event.to_string())? {
                return assembly.finish();
            }
        }
        panic!("no end");
    }

    #[test]
    fn a_stream_comes_to_the_same_as_the_whole() {
        let events = [
            json!({"type": "message_start", "message": {"id": "msg_1", "type": "message", "role": "assistant", "content": [],
                "model": "claude-sonnet-4-6", "stop_reason": null,
                "usage": {"input_tokens": 25, "output_tokens": 1, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 9,
                    "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 4}}}}),
            json!({"type": "content_block_start", "index": 0, "content_block": {"type": "thinking", "thinking": "", "signature": ""}}),
            json!({"type": "ping"}),
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "thinking_delta", "thinking": "Hm."}}),
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "signature_delta", "signature": "c2ln"}}),
            json!({"type": "content_block_stop", "index": 0}),
            json!({"type": "content_block_start", "index": 1, "content_block": {"type": "text", "text": ""}}),
            json!({"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "I "}}),
            json!({"type": "content_block_delta", "index": 1, "delta": {"type": "text_delta", "text": "look."}}),
            json!({"type": "content_block_stop", "index": 1}),
            json!({"type": "content_block_start", "index": 2, "content_block": {"type": "tool_use", "id": "toolu_1", "name": "file_read", "input": {}}}),
            json!({"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ""}}),
            json!({"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": "{\"path\": \"a"}}),
            json!({"type": "content_block_delta", "index": 2, "delta": {"type": "input_json_delta", "partial_json": ".txt\"}"}}),
            json!({"type": "content_block_stop", "index": 2}),
            json!({"type": "a_new_kind", "index": 2}),
            json!({"type": "message_delta", "delta": {"stop_reason": "tool_use", "stop_sequence": null}, "usage": {"output_tokens": 42}}),
            json!({"type": "message_stop"}),
        ];
        let message = json!({
            "id": "msg_1", "type": "message", "role": "assistant", "model": "claude-sonnet-4-6",
            "content": [
                {"type": "thinking", "thinking": "Hm.", "signature": "c2ln"},
                {"type": "text", "text": "I look."},
                {"type": "tool_use", "id": "toolu_1", "name": "file_read", "input": {"path": "a.txt"}},
            ],
            "stop_reason": "tool_use", "stop_sequence": null,
            "usage": {"input_tokens": 25, "output_tokens": 42, "cache_read_input_tokens": 7, "cache_creation_input_tokens": 9,
                "cache_creation": {"ephemeral_5m_input_tokens": 5, "ephemeral_1h_input_tokens": 4}},
        });
        let reply = whole(message.to_string().as_bytes()).expect("a reply");
        assert_eq!(streamed(&events).expect("a reply"), reply);
        let usage = Usage { input: 25, output: 42, cache_read: 7, cache_write: 5, cache_write_1h: 4 };
        assert_eq!((reply.stop.clone(), reply.usage), (Stop::Tools, Some(usage)));
        assert_eq!(message["content"], serde_json::to_value(&reply.content).expect("json"), "sent back as it came");
    }

    #[test]
    fn what_cannot_be_read_says_so() {
        for body in [
            "",
            "{",
            "[]",
            r#"{"content": []}"#,
            r#"{"model": "m", "content": [], "usage": {"input_tokens": -5, "output_tokens": 1}}"#,
        ] {
            let trouble = whole(body.as_bytes()).expect_err(body);
            assert!(
                trouble.maybe_paid && trouble.failure.message.contains("cannot be read"),
                "{}",
                trouble.failure.message
            );
        }
        let overloaded =
            streamed(&[json!({"type": "error", "error": {"type": "overloaded_error", "message": "Overloaded"}})]);
        assert_eq!(overloaded.expect_err("trouble").closed_for, Some(OVERLOADED));
        let lost = streamed(&[
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": "x"}}),
        ]);
        assert!(lost.is_err());
    }
}
