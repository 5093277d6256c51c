//! OpenAI's Chat Completions API with function calling, as its reference describes it:
//! `POST /chat/completions` under a base URL that others offer, too.

use std::time::Duration;

use capx_core::domain::agent::message::{Block, Message, Reply, Stop, Usage};
use capx_core::domain::outcome::{ErrorClass, Failure};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::provider::{self, Account, Assembly, malformed};
use super::{Adapter, Answered, Ask, Offer, Trouble};
use crate::egress::Egress;

/// Where OpenAI listens.
pub const BASE_URL: &str = "https://api.openai.com/v1";
/// The end of a stream.
const DONE: &str = "[DONE]";
/// How long everybody waits after a stream that says that there is too much to do.
const OVERLOADED: Duration = Duration::from_secs(5);

/// The adapter of an account.
#[derive(Debug)]
pub(super) struct OpenAi(pub Account);

impl Adapter for OpenAi {
    fn turn<'a>(&'a self, egress: &'a Egress, ask: &'a Ask<'a>) -> BoxFuture<'a, Result<Answered, Trouble>> {
        async move {
            let headers = vec![("authorization".to_owned(), format!("Bearer {}", self.0.key()))];
            let url = format!("{}/chat/completions", self.0.base());
            let reply = provider::post::<Streamed>(egress, ask, url, headers, &body(ask)).await?;
            Ok(Answered { reply, cost: None, memory: Map::new() })
        }
        .boxed()
    }

    fn default_model(&self) -> &'static str {
        "gpt-4o"
    }

    fn gate(&self) -> Option<String> {
        Some(format!("openai/{}", self.0.digest()))
    }
}

fn body(ask: &Ask<'_>) -> Value {
    let mut messages = vec![json!({"role": "system", "content": ask.system})];
    ask.messages.iter().for_each(|said| messages.extend(message(said)));
    let streams = ask.agent.config.get("stream").and_then(Value::as_bool).unwrap_or(true);
    let mut body = json!({"model": ask.model, "messages": messages, "stream": streams});
    // Models that reason refuse the older name, and other servers know no newer one.
    let limit = if reasons(ask.model) { "max_completion_tokens" } else { "max_tokens" };
    body[limit] = ask.max_tokens.into();
    if streams {
        body["stream_options"] = json!({"include_usage": true});
    }
    if !ask.tools.is_empty() {
        body["tools"] = ask.tools.iter().map(described).collect();
    }
    // The owner's own, as the API takes them.
    for name in ["temperature", "top_p", "reasoning_effort", "response_format", "seed"] {
        if let Some(value) = ask.agent.config.get(name) {
            body[name] = value.clone();
        }
    }
    body
}

fn reasons(model: &str) -> bool {
    model.starts_with("gpt-5")
        || model.starts_with("gpt-6")
        || model.strip_prefix('o').is_some_and(|rest| rest.starts_with(|c: char| c.is_ascii_digit()))
}

fn described(tool: &Offer<'_>) -> Value {
    let function = json!({"name": tool.name, "description": tool.description, "parameters": tool.schema});
    json!({"type": "function", "function": function})
}

fn message(message: &Message) -> Vec<Value> {
    match message {
        Message::User(text) => vec![json!({"role": "user", "content": text})],
        Message::Assistant(content) => {
            let (mut text, mut calls) = (String::new(), Vec::new());
            for block in content {
                match block {
                    Block::Text { text: part } => text.push_str(part),
                    Block::ToolUse { id, name, input } => {
                        let function = json!({"name": name, "arguments": input.to_string()});
                        calls.push(json!({"id": id, "type": "function", "function": function}));
                    }
                    Block::Other(_) => {}
                }
            }
            let mut said = json!({"role": "assistant", "content": text});
            if !calls.is_empty() {
                said["tool_calls"] = calls.into();
                if said["content"] == "" {
                    said["content"] = Value::Null;
                }
            }
            vec![said]
        }
        // There is no mark for an error here: the words say it.
        Message::Results(results) => results
            .iter()
            .map(|result| json!({"role": "tool", "tool_call_id": result.id, "content": result.content}))
            .collect(),
    }
}

#[derive(Debug, Deserialize)]
struct UsageTold {
    prompt_tokens: u64,
    completion_tokens: u64,
    prompt_tokens_details: Option<PromptDetails>,
}

#[derive(Debug, Deserialize)]
struct PromptDetails {
    cached_tokens: Option<u64>,
}

impl UsageTold {
    /// Cached tokens are among those of the prompt, those of reasoning among those of the
    /// completion.
    fn usage(&self) -> Usage {
        let cached = self.prompt_tokens_details.as_ref().and_then(|told| told.cached_tokens).unwrap_or(0);
        let cache_read = cached.min(self.prompt_tokens);
        Usage { input: self.prompt_tokens - cache_read, output: self.completion_tokens, cache_read, ..Usage::default() }
    }
}

#[derive(Debug, Deserialize)]
struct Whole {
    id: Option<String>,
    model: String,
    choices: Vec<Choice>,
    usage: Option<UsageTold>,
}

#[derive(Debug, Deserialize)]
struct Choice {
    message: Said,
    finish_reason: Option<String>,
}

#[derive(Debug, Deserialize)]
struct Said {
    content: Option<String>,
    refusal: Option<String>,
    tool_calls: Option<Vec<Asked>>,
}

#[derive(Debug, Deserialize)]
struct Asked {
    id: String,
    function: Function,
}

#[derive(Debug, Default, Deserialize)]
struct Function {
    #[serde(default)]
    name: String,
    #[serde(default)]
    arguments: String,
}

fn stop(reason: Option<&str>, refused: bool) -> Stop {
    match reason {
        _ if refused => Stop::Refused,
        Some("tool_calls" | "function_call") => Stop::Tools,
        Some("length") => Stop::Length,
        Some("content_filter") => Stop::Refused,
        _ => Stop::End,
    }
}

/// The words and calls of a turn. Arguments are JSON in a text, which a model may get wrong:
/// it is told so by the tool, which refuses a text.
fn content(text: Option<String>, calls: Vec<Asked>) -> Vec<Block> {
    let text = text.filter(|text| !text.is_empty()).map(|text| Block::Text { text });
    let call = |asked: Asked| {
        let Function { name, arguments } = asked.function;
        let input = match arguments.trim() {
            "" => json!({}),
            _ => serde_json::from_str(&arguments).unwrap_or(Value::String(arguments)),
        };
        Block::ToolUse { id: asked.id, name, input }
    };
    text.into_iter().chain(calls.into_iter().map(call)).collect()
}

fn whole(body: &[u8]) -> Result<Reply, Trouble> {
    let Whole { id, model, choices, usage } = serde_json::from_slice(body).map_err(malformed)?;
    let choice = choices.into_iter().next().ok_or_else(|| malformed("it has no choices"))?;
    let Said { content: text, refusal, tool_calls } = choice.message;
    let stop = stop(choice.finish_reason.as_deref(), refusal.is_some());
    let content = content(text.or(refusal), tool_calls.unwrap_or_default());
    Ok(Reply { content, stop, usage: usage.map(|told| told.usage()), model, id, output: None, simulated: false })
}

/// What has come of a stream.
#[derive(Debug, Default)]
struct Streamed {
    id: Option<String>,
    model: String,
    text: String,
    refusal: String,
    calls: Vec<Asked>,
    reason: Option<String>,
    usage: Option<UsageTold>,
}

#[derive(Debug, Deserialize)]
struct Chunk {
    id: Option<String>,
    model: Option<String>,
    #[serde(default)]
    choices: Vec<ChunkChoice>,
    usage: Option<UsageTold>,
    error: Option<Told>,
}

#[derive(Debug, Deserialize)]
struct ChunkChoice {
    #[serde(default)]
    delta: Delta,
    finish_reason: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
struct Delta {
    content: Option<String>,
    refusal: Option<String>,
    #[serde(default)]
    tool_calls: Option<Vec<AskedPart>>,
}

#[derive(Debug, Deserialize)]
struct AskedPart {
    index: usize,
    id: Option<String>,
    #[serde(default)]
    function: Function,
}

#[derive(Debug, Deserialize)]
struct Told {
    message: String,
    #[serde(rename = "type")]
    kind: Option<String>,
}

impl Streamed {
    fn add(&mut self, part: AskedPart) -> Result<(), Trouble> {
        if part.index > self.calls.len() {
            return Err(malformed("a part of a call that never began"));
        }
        if part.index == self.calls.len() {
            let id = part.id.ok_or_else(|| malformed("a call without an id"))?;
            self.calls.push(Asked { id, function: part.function });
            return Ok(());
        }
        if let Some(call) = self.calls.get_mut(part.index) {
            call.function.name.push_str(&part.function.name);
            call.function.arguments.push_str(&part.function.arguments);
        }
        Ok(())
    }
}

impl Assembly for Streamed {
    fn take(&mut self, data: &str) -> Result<bool, Trouble> {
        if data == DONE {
            return Ok(true);
        }
        let chunk: Chunk = serde_json::from_str(data).map_err(malformed)?;
        if let Some(error) = chunk.error {
            let busy =
                error.kind.as_deref().is_some_and(|kind| kind.contains("rate_limit") || kind.contains("overloaded"));
            let class = if busy { ErrorClass::RateLimited } else { ErrorClass::Transient };
            let failure = Failure::new(class, format!("the provider broke off: {}", error.message));
            return Err(Trouble {
                failure,
                closed_for: busy.then_some(OVERLOADED),
                maybe_paid: true,
                quota: false,
                fatal: false,
            });
        }
        self.id = chunk.id.or(self.id.take());
        self.model = chunk.model.unwrap_or(std::mem::take(&mut self.model));
        self.usage = chunk.usage.or(self.usage.take());
        if let Some(choice) = chunk.choices.into_iter().next() {
            self.text.push_str(&choice.delta.content.unwrap_or_default());
            self.refusal.push_str(&choice.delta.refusal.unwrap_or_default());
            for part in choice.delta.tool_calls.unwrap_or_default() {
                self.add(part)?;
            }
            self.reason = choice.finish_reason.or(self.reason.take());
        }
        Ok(false)
    }

    fn whole(body: &[u8]) -> Result<Reply, Trouble> {
        whole(body)
    }

    fn finish(self) -> Result<Reply, Trouble> {
        let Self { id, model, text, refusal, calls, reason, usage } = self;
        let refused = !refusal.is_empty();
        let content = content(Some(if refused { refusal } else { text }), calls);
        let stop = stop(reason.as_deref(), refused);
        Ok(Reply { content, stop, usage: usage.map(|told| told.usage()), model, id, output: None, simulated: false })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_comes_to_the_same_as_the_whole() {
        let chunk = |choices: Value, usage: Value| json!({"id": "c1", "object": "chat.completion.chunk", "model": "gpt-4o-2024-08-06", "choices": choices, "usage": usage});
        let delta = |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "finish_reason": reason}]);
        let part = |part: Value| json!({"tool_calls": [part]});
        let usage = json!({"prompt_tokens": 25, "completion_tokens": 42, "total_tokens": 67,
            "prompt_tokens_details": {"cached_tokens": 5}, "completion_tokens_details": {"reasoning_tokens": 30}});
        let chunks = [
            chunk(delta(json!({"role": "assistant", "content": ""}), Value::Null), Value::Null),
            chunk(delta(json!({"content": "I "}), Value::Null), Value::Null),
            chunk(delta(json!({"content": "look."}), Value::Null), Value::Null),
            chunk(
                delta(
                    part(
                        json!({"index": 0, "id": "call_1", "type": "function", "function": {"name": "file_read", "arguments": ""}}),
                    ),
                    Value::Null,
                ),
                Value::Null,
            ),
            chunk(delta(part(json!({"index": 0, "function": {"arguments": "{\"path\":"}})), Value::Null), Value::Null),
            chunk(delta(part(json!({"index": 0, "function": {"arguments": " \"a.txt\"}"}})), Value::Null), Value::Null),
            chunk(
                delta(
                    part(
                        json!({"index": 1, "id": "call_2", "type": "function", "function": {"name": "odd", "arguments": "{no"}}),
                    ),
                    Value::Null,
                ),
                Value::Null,
            ),
            chunk(delta(json!({}), json!("tool_calls")), Value::Null),
            chunk(json!([]), usage.clone()),
        ];
        let mut streamed = Streamed::default();
        for chunk in chunks {
            assert!(!streamed.take(&chunk.to_string()).expect("a chunk"));
        }
        assert!(streamed.take(DONE).expect("the end"));
        let call = |id: &str, name: &str, arguments: &str| json!({"id": id, "type": "function", "function": {"name": name, "arguments": arguments}});
        let message = json!({
            "id": "c1", "object": "chat.completion", "model": "gpt-4o-2024-08-06", "usage": usage,
            "choices": [{"index": 0, "finish_reason": "tool_calls", "message": {"role": "assistant", "content": "I look.", "refusal": null,
                "tool_calls": [call("call_1", "file_read", r#"{"path": "a.txt"}"#), call("call_2", "odd", "{no")]}}],
        });
        let reply = whole(message.to_string().as_bytes()).expect("a reply");
        assert_eq!(streamed.finish().expect("a reply"), reply);
        assert_eq!(reply.usage, Some(Usage { input: 20, output: 42, cache_read: 5, ..Usage::default() }));
        let inputs: Vec<_> = reply.calls().map(|(.., input)| input.clone()).collect();
        assert_eq!(inputs, [json!({"path": "a.txt"}), json!("{no")], "what is no JSON is a text");
    }

    #[test]
    fn what_cannot_be_read_says_so() {
        for body in [
            "",
            "{",
            r#"{"model": "m", "choices": []}"#,
            r#"{"model": "m", "choices": [{"message": {}}], "usage": {"prompt_tokens": -1, "completion_tokens": 1}}"#,
        ] {
            let trouble = whole(body.as_bytes()).expect_err(body);
            assert!(trouble.failure.message.contains("cannot be read"), "{}", trouble.failure.message);
        }
        let mut streamed = Streamed::default();
        assert!(streamed.take(r#"{"choices": [{"delta": {"tool_calls": [{"index": 3, "id": "x"}]}}]}"#).is_err());
        assert!(
            streamed
                .take(r#"{"error": {"message": "no", "type": "rate_limit_error"}}"#)
                .expect_err("trouble")
                .closed_for
                .is_some()
        );
    }

    #[test]
    fn models_that_reason_have_another_limit() {
        for (model, it_does) in
            [("o3", true), ("o4-mini", true), ("gpt-5-mini", true), ("gpt-4o", false), ("ollama", false)]
        {
            assert_eq!(reasons(model), it_does, "{model}");
        }
    }
}
