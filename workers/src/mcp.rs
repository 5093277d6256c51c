//! Tools that other programs offer by the Model Context Protocol: servers that the operator
//! names, reached over HTTP or started by the worker and spoken to over their pipes. Agents
//! use those of their tools that they name, as `mcp:server/tool` or `mcp:server/*`.

use std::collections::{BTreeMap, HashMap};
use std::process::Stdio;
use std::sync::Arc;
use std::time::{Duration, Instant};

use capx_core::domain::outcome::{ErrorClass, Failure};
use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use rmcp::model::{CallToolRequestParams, CallToolResult, ContentBlock};
use rmcp::service::{RoleClient, RunningService, ServiceExt};
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::transport::{StreamableHttpClientTransport, TokioChildProcess};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::process::Command;
use tokio::sync::Mutex;

use crate::egress::Egress;
use crate::tools::registry::{OnUnknown, Tool};

/// What the name of such a tool begins with.
pub const PREFIX: &str = "mcp:";
/// The largest answer of a server, in bytes.
const ANSWER_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Tools of one server.
const TOOLS_MAX: usize = 128;
/// The longest description of one, in characters, and the largest schema, in bytes.
const DESCRIPTION_CHARS_MAX: usize = 2_000;
const SCHEMA_BYTES_MAX: usize = 32 * 1024;
/// How long a server may take to say what it offers.
const CONNECT_MAX: Duration = Duration::from_secs(20);
/// How long that holds.
const LISTED_FOR: Duration = Duration::from_secs(60);

/// The servers that there are, by their names.
#[derive(Debug, Default)]
pub struct McpServers {
    servers: BTreeMap<String, Server>,
}

#[derive(Debug)]
struct Server {
    entry: Entry,
    connection: Mutex<Option<Arc<Connection>>>,
}

#[derive(Debug)]
struct Connection {
    service: RunningService<RoleClient, ()>,
    tools: Vec<Arc<Tool>>,
    listed: Instant,
}

/// The file that names servers, in the form that other clients of the protocol read too.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Servers {
    mcp_servers: BTreeMap<String, Entry>,
}

#[derive(Clone, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    url: Option<String>,
    #[serde(default)]
    headers: BTreeMap<String, String>,
    command: Option<String>,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: BTreeMap<String, String>,
}

impl std::fmt::Debug for Entry {
    /// Without what may be secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Entry({:?}, {:?})", self.url, self.command)
    }
}

impl McpServers {
    /// From a file's text: `{"mcpServers": {name: {url, headers?} | {command, args?, env?}}}`.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(text: &str) -> Result<Self, String> {
        let read: Servers = serde_json::from_str(text).map_err(|error| error.to_string())?;
        let mut servers = BTreeMap::new();
        for (name, entry) in read.mcp_servers {
            let plain = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
            if name.is_empty() || name.len() > 40 || !name.chars().all(plain) {
                return Err(format!("`{name}`: a server's name has 1 to 40 letters, digits, - and _"));
            }
            match (&entry.url, &entry.command) {
                (Some(url), None) if is_http(url) => drop(headers(&entry)?),
                (None, Some(command)) if !command.is_empty() => {}
                _ => return Err(format!("`{name}` has either a `url` of http or https, or a `command`")),
            }
            servers.insert(name, Server { entry, connection: Mutex::default() });
        }
        Ok(Self { servers })
    }

    /// The tools of those that an agent names; of none, where it names none.
    ///
    /// # Errors
    /// Where there is no such server, or it does not answer.
    pub async fn offered(&self, egress: &Egress, names: Option<&Vec<Value>>) -> Result<Vec<Arc<Tool>>, Failure> {
        let mut offered: Vec<Arc<Tool>> = Vec::new();
        for pattern in names.into_iter().flatten().filter_map(Value::as_str).filter(|name| name.starts_with(PREFIX)) {
            let (server, _) = parts(pattern)?;
            let connection = self.connected(egress, server).await?;
            for tool in &connection.tools {
                let known = offered.iter().any(|other| other.name == tool.name);
                if !known && matches(pattern, &tool.name) {
                    offered.push(Arc::clone(tool));
                }
            }
        }
        Ok(offered)
    }

    /// Calls a tool, `mcp:server/tool`. The server is told the call's key as
    /// `_meta.idempotencyKey`.
    ///
    /// # Errors
    /// The server's own, where it answers with one; what happened on the way.
    pub async fn call(
        &self,
        egress: &Egress,
        name: &str,
        params: Map<String, Value>,
        (key, time): (&str, Duration),
    ) -> Result<Value, Failure> {
        let (server, tool) = parts(name)?;
        let connection = self.connected(egress, server).await?;
        let mut request = CallToolRequestParams::new(tool.to_owned()).with_arguments(params);
        let meta = serde_json::from_value(json!({"idempotencyKey": key}));
        request.meta = meta.map_err(|error| Failure::invalid(error.to_string()))?;
        let answer = tokio::time::timeout(time, connection.service.peer().call_tool(request));
        match answer.await {
            Ok(Ok(result)) => output(&result),
            Ok(Err(error)) => {
                self.forget(server, &connection).await;
                Err(Failure::transient(format!("the MCP server `{server}`: {error}")))
            }
            Err(_) => Err(Failure::new(
                ErrorClass::Timeout,
                format!("the MCP server `{server}` did not answer within {time:?}"),
            )),
        }
    }

    async fn connected(&self, egress: &Egress, name: &str) -> Result<Arc<Connection>, Failure> {
        let Some(server) = self.servers.get(name) else {
            let known: Vec<&str> = self.servers.keys().map(String::as_str).collect();
            return Err(Failure::invalid(match known.is_empty() {
                true => format!("there is no MCP server `{name}`: the operator names them in CAPX_MCP on the workers"),
                false => format!("there is no MCP server `{name}`; there are {}", known.join(", ")),
            }));
        };
        // Held while it connects: whoever else wants it waits for the same.
        let mut held = server.connection.lock().await;
        if let Some(connection) = held.as_ref()
            && !connection.service.is_closed()
            && connection.listed.elapsed() < LISTED_FOR
        {
            return Ok(Arc::clone(connection));
        }
        let opened = tokio::time::timeout(CONNECT_MAX, open(egress, name, &server.entry));
        let connection = opened
            .await
            .map_err(|_| Failure::transient(format!("the MCP server `{name}` did not answer in {CONNECT_MAX:?}")))?
            .map_err(|why| Failure::transient(format!("the MCP server `{name}`: {why}")))?;
        let connection = Arc::new(connection);
        *held = Some(Arc::clone(&connection));
        Ok(connection)
    }

    /// The next call connects anew.
    async fn forget(&self, name: &str, broken: &Arc<Connection>) {
        if let Some(server) = self.servers.get(name) {
            let mut held = server.connection.lock().await;
            if held.as_ref().is_some_and(|connection| Arc::ptr_eq(connection, broken)) {
                *held = None;
            }
        }
    }
}

fn is_http(url: &str) -> bool {
    Url::parse(url).is_ok_and(|url| matches!(url.scheme(), "http" | "https"))
}

/// `mcp:server/tool` in its parts.
fn parts(name: &str) -> Result<(&str, &str), Failure> {
    name.strip_prefix(PREFIX)
        .and_then(|name| name.split_once('/'))
        .filter(|(server, tool)| !server.is_empty() && !tool.is_empty())
        .ok_or_else(|| Failure::invalid(format!("`{name}`: a tool of an MCP server is written as mcp:server/tool")))
}

fn matches(pattern: &str, name: &str) -> bool {
    pattern == name || pattern.strip_suffix('*').is_some_and(|beginning| name.starts_with(beginning))
}

fn headers(entry: &Entry) -> Result<HashMap<HeaderName, HeaderValue>, String> {
    let header = |(name, value): (&String, &String)| {
        let named: HeaderName = name.parse().map_err(|_| format!("`{name}` is no name of a header"))?;
        let mut value = HeaderValue::from_str(value).map_err(|_| format!("the value of `{name}` is no header's"))?;
        value.set_sensitive(true);
        Ok((named, value))
    };
    entry.headers.iter().map(header).collect()
}

async fn open(egress: &Egress, name: &str, entry: &Entry) -> Result<Connection, String> {
    let service = match (&entry.url, &entry.command) {
        (Some(url), _) => {
            let config = StreamableHttpClientTransportConfig::with_uri(url.clone())
                .custom_headers(headers(entry)?)
                .max_json_response_size(ANSWER_BYTES_MAX)
                .max_sse_event_size(ANSWER_BYTES_MAX)
                .max_error_response_size(64 * 1024);
            let transport = StreamableHttpClientTransport::with_client(egress.of_operator(), config);
            ().serve(transport).await.map_err(|error| error.to_string())?
        }
        (None, Some(command)) => {
            let mut started = Command::new(command);
            // The worker's own environment holds keys that are nobody else's.
            started.args(&entry.args).env_clear().kill_on_drop(true);
            let kept = ["PATH", "HOME", "LANG", "TMPDIR"];
            started.envs(kept.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
            started.envs(&entry.env);
            let (transport, _) = TokioChildProcess::builder(started)
                .stderr(Stdio::null())
                .spawn()
                .map_err(|error| format!("`{command}` does not start: {error}"))?;
            ().serve(transport).await.map_err(|error| error.to_string())?
        }
        (None, None) => return Err("it has no address".into()),
    };
    let listed = service.peer().list_all_tools().await.map_err(|error| error.to_string())?;
    let tools = listed.into_iter().take(TOOLS_MAX).filter_map(|tool| described(name, tool)).map(Arc::new).collect();
    Ok(Connection { service, tools, listed: Instant::now() })
}

/// A server's tool as agents are offered it; nothing, where it cannot be.
fn described(server: &str, tool: rmcp::model::Tool) -> Option<Tool> {
    let schema = Value::Object(Map::clone(&tool.input_schema));
    if schema.to_string().len() > SCHEMA_BYTES_MAX {
        tracing::warn!(server, tool = %tool.name, "the schema of a tool is too large; it is not offered");
        return None;
    }
    let hint = tool.annotations.unwrap_or_default();
    let again = hint.read_only_hint == Some(true) || hint.idempotent_hint == Some(true);
    let on_unknown = if again { OnUnknown::Again } else { OnUnknown::Review };
    let description = tool.description.unwrap_or_default().chars().take(DESCRIPTION_CHARS_MAX).collect();
    let made = Tool::of_server(format!("{PREFIX}{server}/{}", tool.name), description, on_unknown, schema);
    if made.is_none() {
        tracing::warn!(server, tool = %tool.name, "the schema of a tool is none; it is not offered");
    }
    made
}

/// What a model is told of an answer: its fields, or its text.
fn output(result: &CallToolResult) -> Result<Value, Failure> {
    let texts: Vec<&str> = result
        .content
        .iter()
        .map(|block| match block {
            ContentBlock::Text(text) => text.text.as_str(),
            _ => "[what is no text was left out]",
        })
        .collect();
    let text = texts.join("\n");
    match (result.is_error, &result.structured_content) {
        (Some(true), _) => Err(Failure::invalid(if text.is_empty() { "the tool failed".into() } else { text })),
        (_, Some(structured)) => Ok(structured.clone()),
        _ => Ok(json!({"text": text})),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn servers_are_read_and_what_is_wrong_is_told() {
        let good = r#"{"mcpServers": {"wiki": {"url": "https://wiki.example/mcp", "headers": {"Authorization": "Bearer x"}},
            "files": {"command": "files", "args": ["/srv"], "env": {"A": "b"}}}}"#;
        let servers = McpServers::read(good).expect("reads");
        assert_eq!(servers.servers.len(), 2);
        assert!(!format!("{servers:?}").contains("Bearer"), "a header is shown");
        for bad in [
            "{}",
            r#"{"mcpServers": {"a b": {"command": "x"}}}"#,
            r#"{"mcpServers": {"a": {}}}"#,
            r#"{"mcpServers": {"a": {"url": "ftp://x/"}}}"#,
            r#"{"mcpServers": {"a": {"url": "https://x/", "command": "y"}}}"#,
            r#"{"mcpServers": {"a": {"command": "y", "shell": true}}}"#,
            r#"{"mcpServers": {"a": {"url": "https://x/", "headers": {"a b": "c"}}}}"#,
        ] {
            assert!(McpServers::read(bad).is_err(), "{bad}");
        }
        assert!(
            matches("mcp:a/*", "mcp:a/x") && matches("mcp:a/get_*", "mcp:a/get_x") && !matches("mcp:a/x", "mcp:a/xy")
        );
        assert!(parts("mcp:a").is_err() && parts("mcp:/x").is_err());
    }
}
