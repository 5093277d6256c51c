//! A model provider on this machine, which speaks the wire formats of Anthropic's Messages
//! API and OpenAI's Chat Completions API, as strictly as they do: what they refuse it
//! refuses. The official clients of both read it (`the_official_clients_read_the_fixture`).
//!
//! What it says is a script: the nth turn of a conversation is the nth of the script, however
//! often and by whomever it is asked for.

use std::collections::HashMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{DefaultBodyLimit, State};
use axum::http::{HeaderMap, Response, StatusCode, Uri};
use axum::routing::post;
use capx_workers::adapters::{Account, Providers};
use futures_util::StreamExt;
use serde_json::{Value, json};

/// A turn of the script.
#[derive(Clone)]
pub enum Says {
    /// The end.
    Words(&'static str),
    /// Asks for tools: names as a provider knows them, and arguments.
    Asks(Vec<(&'static str, Value)>),
    /// Arguments that are no JSON, as models sometimes write them.
    Garbles(&'static str, &'static str),
    /// Stops at its limit of tokens.
    Stops(&'static str),
}

/// What goes wrong before the script is looked at, once each.
#[derive(Clone)]
pub enum Trouble {
    /// A refusal as the provider words it.
    Refuses(u16, &'static [(&'static str, &'static str)], &'static str),
    /// An answer that is none.
    Raw(&'static str, &'static str),
    /// An answer without an end, of so many bytes at once, so often a second.
    Endless(usize, Duration),
    /// Nothing does, this time.
    Nothing,
    /// A stream that breaks off.
    BreaksOff,
}

/// A request as it came.
#[derive(Clone, Debug)]
pub struct Seen {
    pub path: String,
    pub key: String,
    pub body: Value,
}

#[derive(Clone, Default)]
pub struct Provider {
    script: Arc<Vec<Says>>,
    troubles: Arc<Mutex<Vec<Trouble>>>,
    seen: Arc<Mutex<Vec<Seen>>>,
    pub url: String,
}

/// What each turn has used: read, said, read from a cache, written to one.
pub const USED: [u64; 4] = [1_001, 37, 11, 7];
pub const API_KEY: &str = "sk-fixture-0123456789";

impl Says {
    fn calls(&self) -> Vec<(&'static str, String)> {
        match self {
            Self::Asks(calls) => calls.iter().map(|(name, input)| (*name, input.to_string())).collect(),
            Self::Garbles(name, arguments) => vec![(*name, (*arguments).to_owned())],
            _ => Vec::new(),
        }
    }

    fn words(&self) -> &'static str {
        match self {
            Self::Words(words) | Self::Stops(words) => words,
            _ => "I look.",
        }
    }
}

impl Provider {
    pub async fn start(script: Vec<Says>) -> Self {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let url = format!("http://{}", listener.local_addr().unwrap());
        let provider = Self { script: Arc::new(script), url, ..Self::default() };
        let router = Router::new()
            .route("/v1/messages", post(messages))
            .route("/v1/chat/completions", post(completions))
            .route("/custom", post(custom))
            .layer(DefaultBodyLimit::max(64 << 20))
            .with_state(provider.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        provider
    }

    /// Goes wrong so, before anything else.
    pub fn troubled(&self, troubles: &[Trouble]) {
        self.troubles.lock().unwrap().extend(troubles.iter().cloned());
    }

    pub fn seen(&self) -> Vec<Seen> {
        self.seen.lock().unwrap().clone()
    }

    /// How often each key was called.
    pub fn keys(&self) -> HashMap<String, u32> {
        let mut keys = HashMap::new();
        for seen in self.seen() {
            *keys.entry(seen.key).or_default() += 1;
        }
        keys
    }

    /// As a worker knows it.
    pub fn providers(&self) -> Providers {
        Providers {
            anthropic: Some(Account::new(API_KEY, &self.url)),
            openai: Some(Account::new(API_KEY, &format!("{}/v1", self.url))),
            ..Providers::default()
        }
    }

    /// The same for a process.
    pub fn environment(&self) -> Vec<(&'static str, String)> {
        vec![
            ("CAPX_OFFLINE_MODEL", "0".into()),
            ("ANTHROPIC_API_KEY", API_KEY.into()),
            ("ANTHROPIC_BASE_URL", self.url.clone()),
            ("OPENAI_API_KEY", API_KEY.into()),
            ("OPENAI_BASE_URL", format!("{}/v1", self.url)),
        ]
    }

    fn note(&self, uri: &Uri, headers: &HeaderMap, body: &Value) -> Option<Trouble> {
        let key = headers.get("idempotency-key").and_then(|v| v.to_str().ok()).unwrap_or_default().to_owned();
        self.seen.lock().unwrap().push(Seen { path: uri.path().to_owned(), key, body: body.clone() });
        let mut troubles = self.troubles.lock().unwrap();
        let trouble = (!troubles.is_empty()).then(|| troubles.remove(0));
        trouble.filter(|trouble| !matches!(trouble, Trouble::Nothing))
    }

    fn turn(&self, body: &Value) -> (usize, Says) {
        let said = body["messages"].as_array().into_iter().flatten();
        let turn = said.filter(|message| message["role"] == "assistant").count();
        (turn, self.script.get(turn).cloned().unwrap_or(Says::Words("The script is over.")))
    }
}

fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Body>) -> Response<Body> {
    let mut response = Response::builder().status(StatusCode::from_u16(status).unwrap());
    if !headers.iter().any(|(name, _)| *name == "content-type") {
        response = response.header("content-type", "application/json");
    }
    for (name, value) in headers {
        response = response.header(*name, *value);
    }
    response.body(body.into()).unwrap()
}

fn events(events: Vec<String>) -> Response<Body> {
    // In small pieces, as a network brings them.
    let text = events.concat();
    let pieces: Vec<Result<String, std::io::Error>> =
        text.chars().collect::<Vec<_>>().chunks(37).map(|piece| Ok(piece.iter().collect())).collect();
    let stream = futures_util::stream::iter(pieces);
    answer(200, &[("content-type", "text/event-stream; charset=utf-8")], Body::from_stream(stream))
}

fn goes_wrong(trouble: Trouble) -> Response<Body> {
    match trouble {
        Trouble::Refuses(status, headers, body) => answer(status, headers, body),
        Trouble::Raw(kind, body) => answer(200, &[("content-type", kind)], body),
        Trouble::Nothing => answer(500, &[], ""),
        Trouble::BreaksOff => {
            let begin = "event: message_start\ndata: {\"type\": \"message_start\", \"message\": {\"id\": \"m\", \"model\": \"m\", \"usage\": {}}}\n\n";
            answer(200, &[("content-type", "text/event-stream")], begin)
        }
        Trouble::Endless(bytes, each) => {
            let stream = futures_util::stream::repeat(()).then(move |()| async move {
                tokio::time::sleep(each).await;
                Ok::<_, std::io::Error>(vec![b' '; bytes])
            });
            answer(200, &[], Body::from_stream(stream))
        }
    }
}

fn wrong(status: u16, kind: &str, message: &str) -> Response<Body> {
    answer(status, &[], json!({"type": "error", "error": {"type": kind, "message": message}}).to_string())
}

fn is_tool_name(name: &str) -> bool {
    (1..=64).contains(&name.len()) && name.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
}

/// What Anthropic would refuse of a request.
fn anthropic_problem(headers: &HeaderMap, body: &Value) -> Option<Response<Body>> {
    let invalid = |message: &str| Some(wrong(400, "invalid_request_error", message));
    // Either, says the reference; capx sends the first, the official client the second.
    let key = headers.get("x-api-key").is_some_and(|key| key == API_KEY);
    if !key && headers.get("authorization").is_none_or(|key| key != &format!("Bearer {API_KEY}")) {
        return Some(wrong(401, "authentication_error", "invalid x-api-key"));
    }
    // As in the table of versions; capx sends the first, the official client the second.
    let version = headers.get("anthropic-version").and_then(|version| version.to_str().ok());
    if !version.is_some_and(|version| ["2023-06-01", "2026-10-21"].contains(&version)) {
        return invalid("anthropic-version: header is required");
    }
    if body["max_tokens"].as_u64().is_none_or(|tokens| tokens == 0) || !body["model"].is_string() {
        return invalid("max_tokens, model: Field required");
    }
    if body["tools"].as_array().into_iter().flatten().any(|tool| {
        !is_tool_name(tool["name"].as_str().unwrap_or_default()) || tool["input_schema"]["type"] != "object"
    }) {
        return invalid("tools.0.name: String should match pattern '^[a-zA-Z0-9_-]{1,128}$'");
    }
    let messages = body["messages"].as_array().cloned().unwrap_or_default();
    if messages.first().is_none_or(|first| first["role"] != "user") {
        return invalid("messages: first message must use the \"user\" role");
    }
    let mut open: Vec<String> = Vec::new();
    for message in messages {
        let blocks = message["content"].as_array().cloned().unwrap_or_default();
        let ids = |kind: &str, field: &str| -> Vec<String> {
            let blocks = blocks.iter().filter(|block| block["type"] == kind);
            blocks.filter_map(|block| Some(block[field].as_str()?.to_owned())).collect()
        };
        if message["role"] == "user" {
            if ids("tool_result", "tool_use_id") != open {
                return invalid("messages: `tool_use` ids were found without `tool_result` blocks immediately after");
            }
            open.clear();
        } else {
            open = ids("tool_use", "id");
        }
        if message["content"].as_array().is_some_and(Vec::is_empty) {
            return invalid("messages: content must be non-empty");
        }
    }
    if open.is_empty() { None } else { invalid("messages: `tool_use` without `tool_result`") }
}

async fn messages(
    State(provider): State<Provider>,
    uri: Uri,
    headers: HeaderMap,
    axum::Json(body): axum::Json<Value>,
) -> Response<Body> {
    if let Some(trouble) = provider.note(&uri, &headers, &body) {
        return goes_wrong(trouble);
    }
    if let Some(refusal) = anthropic_problem(&headers, &body) {
        return refusal;
    }
    let (turn, says) = provider.turn(&body);
    let calls = says.calls();
    let id = |at: usize| format!("toolu_{turn}_{at}");
    let stop = match (&says, calls.is_empty()) {
        (Says::Stops(_), _) => "max_tokens",
        (_, true) => "end_turn",
        _ => "tool_use",
    };
    let [input, output, cached, written] = USED;
    let usage = json!({
        "input_tokens": input, "output_tokens": output, "cache_read_input_tokens": cached,
        "cache_creation_input_tokens": written,
        "cache_creation": {"ephemeral_5m_input_tokens": written, "ephemeral_1h_input_tokens": 0},
    });
    let message = |content: Vec<Value>, stop: Value, usage: &Value| {
        json!({
            "id": format!("msg_{turn}"), "type": "message", "role": "assistant", "model": body["model"],
            "content": content, "stop_reason": stop, "stop_sequence": null, "usage": usage,
        })
    };
    if body["stream"] != true {
        let mut content = vec![json!({"type": "text", "text": says.words()})];
        content.extend(calls.iter().enumerate().map(|(at, (name, input))| {
            let input: Value = serde_json::from_str(input).unwrap_or_else(|_| json!({}));
            json!({"type": "tool_use", "id": id(at), "name": name, "input": input})
        }));
        return answer(200, &[], message(content, stop.into(), &usage).to_string());
    }
    let event = |data: Value| format!("event: {}\ndata: {data}\n\n", data["type"].as_str().unwrap());
    let first = json!({"input_tokens": input, "output_tokens": 1, "cache_read_input_tokens": cached, "cache_creation_input_tokens": written});
    let mut all = vec![
        event(json!({"type": "message_start", "message": message(vec![], Value::Null, &first)})),
        event(json!({"type": "ping"})),
        event(json!({"type": "content_block_start", "index": 0, "content_block": {"type": "text", "text": ""}})),
    ];
    for word in says.words().split_inclusive(' ') {
        all.push(event(
            json!({"type": "content_block_delta", "index": 0, "delta": {"type": "text_delta", "text": word}}),
        ));
    }
    all.push(event(json!({"type": "content_block_stop", "index": 0})));
    for (at, (name, arguments)) in calls.iter().enumerate() {
        let index = at + 1;
        let block = json!({"type": "tool_use", "id": id(at), "name": name, "input": {}});
        all.push(event(json!({"type": "content_block_start", "index": index, "content_block": block})));
        let (one, two) = arguments.split_at(arguments.len() / 2);
        for part in ["", one, two] {
            let delta = json!({"type": "input_json_delta", "partial_json": part});
            all.push(event(json!({"type": "content_block_delta", "index": index, "delta": delta})));
        }
        all.push(event(json!({"type": "content_block_stop", "index": index})));
    }
    let delta = json!({"stop_reason": stop, "stop_sequence": null});
    all.push(event(json!({"type": "message_delta", "delta": delta, "usage": {"output_tokens": output}})));
    all.push(event(json!({"type": "message_stop"})));
    events(all)
}

/// What OpenAI would refuse of a request.
fn openai_problem(headers: &HeaderMap, body: &Value) -> Option<Response<Body>> {
    let invalid = |message: &str| Some(wrong(400, "invalid_request_error", message));
    if headers.get("authorization").is_none_or(|key| key != &format!("Bearer {API_KEY}")) {
        return Some(wrong(401, "invalid_api_key", "Incorrect API key provided"));
    }
    let tools = body["tools"].as_array().cloned().unwrap_or_default();
    let bad = |tool: &Value| {
        tool["type"] != "function" || !is_tool_name(tool["function"]["name"].as_str().unwrap_or_default())
    };
    if body.get("tools").is_some_and(|tools| tools == &json!([])) || tools.iter().any(bad) {
        return invalid("Invalid 'tools'");
    }
    let mut open: Vec<String> = Vec::new();
    for message in body["messages"].as_array().cloned().unwrap_or_default() {
        match message["role"].as_str() {
            Some("tool") => {
                let id = message["tool_call_id"].as_str().unwrap_or_default().to_owned();
                if !open.contains(&id) || !message["content"].is_string() {
                    return invalid(
                        "messages with role 'tool' must be a response to a preceeding message with 'tool_calls'",
                    );
                }
                open.retain(|other| *other != id);
            }
            Some("assistant") => {
                let calls = message["tool_calls"].as_array().cloned().unwrap_or_default();
                if calls.iter().any(|call| !call["function"]["arguments"].is_string()) {
                    return invalid("Invalid type for 'arguments': expected a string");
                }
                open = calls.iter().filter_map(|call| Some(call["id"].as_str()?.to_owned())).collect();
            }
            Some("system" | "user") if open.is_empty() => {}
            _ => return invalid("An assistant message with 'tool_calls' must be followed by tool messages"),
        }
    }
    if open.is_empty() { None } else { invalid("tool_call_ids did not have response messages") }
}

async fn completions(
    State(provider): State<Provider>,
    uri: Uri,
    headers: HeaderMap,
    axum::Json(body): axum::Json<Value>,
) -> Response<Body> {
    if let Some(trouble) = provider.note(&uri, &headers, &body) {
        return goes_wrong(trouble);
    }
    if let Some(refusal) = openai_problem(&headers, &body) {
        return refusal;
    }
    let (turn, says) = provider.turn(&body);
    let calls = says.calls();
    let call = |at: usize, (name, arguments): &(&str, String)| json!({"id": format!("call_{turn}_{at}"), "type": "function", "function": {"name": name, "arguments": arguments}});
    let reason = match (&says, calls.is_empty()) {
        (Says::Stops(_), _) => "length",
        (_, true) => "stop",
        _ => "tool_calls",
    };
    let [input, output, cached, _] = USED;
    let usage = json!({
        "prompt_tokens": input + cached, "completion_tokens": output, "total_tokens": input + cached + output,
        "prompt_tokens_details": {"cached_tokens": cached}, "completion_tokens_details": {"reasoning_tokens": 5},
    });
    let common = |object: &str| json!({"id": format!("chatcmpl-{turn}"), "object": object, "created": 1, "model": body["model"]});
    if body["stream"] != true {
        let mut whole = common("chat.completion");
        let mut message = json!({"role": "assistant", "content": says.words(), "refusal": null});
        if !calls.is_empty() {
            message["tool_calls"] = calls.iter().enumerate().map(|(at, asked)| call(at, asked)).collect();
        }
        whole["choices"] = json!([{"index": 0, "message": message, "logprobs": null, "finish_reason": reason}]);
        whole["usage"] = usage;
        return answer(200, &[], whole.to_string());
    }
    let chunk = |choices: Value, usage: Value| {
        let mut chunk = common("chat.completion.chunk");
        chunk["choices"] = choices;
        chunk["usage"] = usage;
        format!("data: {chunk}\n\n")
    };
    let delta =
        |delta: Value, reason: Value| json!([{"index": 0, "delta": delta, "logprobs": null, "finish_reason": reason}]);
    let mut all = vec![chunk(delta(json!({"role": "assistant", "content": ""}), Value::Null), Value::Null)];
    for word in says.words().split_inclusive(' ') {
        all.push(chunk(delta(json!({"content": word}), Value::Null), Value::Null));
    }
    for (at, asked) in calls.iter().enumerate() {
        let mut begins = call(at, &(asked.0, String::new()));
        begins["index"] = at.into();
        all.push(chunk(delta(json!({"tool_calls": [begins]}), Value::Null), Value::Null));
        let (one, two) = asked.1.split_at(asked.1.len() / 2);
        for part in [one, two] {
            let part = json!({"tool_calls": [{"index": at, "function": {"arguments": part}}]});
            all.push(chunk(delta(part, Value::Null), Value::Null));
        }
    }
    all.push(chunk(delta(json!({}), reason.into()), Value::Null));
    if body["stream_options"]["include_usage"] == true {
        all.push(chunk(json!([]), usage));
    }
    all.push("data: [DONE]\n\n".to_owned());
    events(all)
}

async fn custom(
    State(provider): State<Provider>,
    uri: Uri,
    headers: HeaderMap,
    axum::Json(body): axum::Json<Value>,
) -> Response<Body> {
    if let Some(trouble) = provider.note(&uri, &headers, &body) {
        return goes_wrong(trouble);
    }
    let (turn, says) = provider.turn(&body);
    let calls = says.calls();
    let call = |(at, (name, input)): (usize, &(&str, String))| {
        let input: Value = serde_json::from_str(input).unwrap_or_else(|_| json!({}));
        json!({"id": format!("c_{turn}_{at}"), "name": name, "input": input})
    };
    let reply = match calls.is_empty() {
        true => json!({"output": says.words(), "cost": 0.25}),
        false => {
            json!({"tool_calls": calls.iter().enumerate().map(call).collect::<Vec<_>>(), "usage": {"cost_usd": 0.25}})
        }
    };
    answer(200, &[], reply.to_string())
}
