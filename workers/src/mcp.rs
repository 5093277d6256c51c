//! Tools that other programs offer by the Model Context Protocol: servers that the operator
//! names, with the companies that may use them, reached over HTTP or started by the worker and
//! spoken to over their pipes. Agents use those of their tools that they name, as
//! `mcp:server/tool` or `mcp:server/*`. Each company has connections, and programs, of its own.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::process::Stdio;
use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use capx_core::domain::ids::CompanyId;
use capx_core::domain::outcome::{ErrorClass, Failure};
use reqwest::Url;
use reqwest::header::{HeaderName, HeaderValue};
use rmcp::model::{CallToolRequest, CallToolRequestParams, CallToolResult, ClientRequest, ContentBlock, ServerResult};
use rmcp::service::{PeerRequestOptions, RequestHandle, RoleClient, RunningService, ServiceError, ServiceExt};
use rmcp::transport::streamable_http_client::StreamableHttpClientTransportConfig;
use rmcp::transport::{StreamableHttpClientTransport, TokioChildProcess};
use rustix::process::{Pid, Signal};
use serde::Deserialize;
use serde_json::{Map, Value, json};
use tokio::process::Command;
use tokio::sync::Mutex;

use crate::egress::{self, Egress};
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
/// A connection that nobody has used for so long is closed, and its program ended.
const IDLE_MAX: Duration = Duration::from_secs(300);
/// How long a server may take to hear that a call is cancelled.
const CANCEL_MAX: Duration = Duration::from_secs(5);
/// Connections of a worker to one server.
const CONNECTIONS_MAX: usize = 64;

/// The servers that there are, by their names.
#[derive(Debug, Default)]
pub struct McpServers {
    servers: BTreeMap<String, Server>,
}

#[derive(Debug)]
struct Server {
    entry: Entry,
    may: Companies,
    connections: std::sync::Mutex<HashMap<CompanyId, Slot>>,
}

/// A company's connection, held while it is made: whoever else of it wants one waits for the same.
type Slot = Arc<Mutex<Option<Arc<Connection>>>>;

/// Who may use a server.
#[derive(Debug)]
enum Companies {
    All,
    These(HashSet<CompanyId>),
}

#[derive(Debug)]
struct Connection {
    service: RunningService<RoleClient, ()>,
    tools: Vec<Arc<Tool>>,
    listed: Instant,
    /// The program that this worker has started for it.
    program: Option<Program>,
}

impl Connection {
    /// The other end is gone. (`is_closed` of the service tells of this end alone.)
    fn is_over(&self) -> bool {
        self.service.peer().is_transport_closed()
    }
}

impl Drop for Connection {
    fn drop(&mut self) {
        // One that is over already may have left its number to another.
        if self.is_over()
            && let Some(program) = self.program.take()
        {
            program.disarm();
        }
    }
}

/// The processes of a program, ended with this.
#[derive(Debug)]
struct Program(Option<Pid>);

impl Program {
    fn kill(&self) {
        if let Some(group) = self.0 {
            let _ = rustix::process::kill_process_group(group, Signal::KILL);
        }
    }

    /// It has ended by itself.
    fn disarm(mut self) {
        self.0 = None;
    }
}

impl Drop for Program {
    fn drop(&mut self) {
        self.kill();
    }
}

/// The file that names servers, in the form that other clients of the protocol read too, and who
/// may use them.
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
    /// Ids of companies, or `"*"` for all.
    companies: Option<Vec<String>>,
}

impl std::fmt::Debug for Entry {
    /// Without what may be secret.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Entry({:?}, {:?})", self.url, self.command)
    }
}

impl McpServers {
    /// From a file's text: `{"mcpServers": {name: {url, headers?} | {command, args?, env?}}}`, each
    /// with `companies: [id, …]` or `["*"]`: who may use it. Where it does not say, nobody may, or
    /// everybody, as on a developer's own machine (`open`).
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn read(text: &str, open: bool) -> Result<Self, String> {
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
            let may = may(&name, &entry, open)?;
            servers.insert(name, Server { entry, may, connections: std::sync::Mutex::default() });
        }
        Ok(Self { servers })
    }

    /// The tools of those that an agent names; of none, where it names none.
    ///
    /// # Errors
    /// Where there is no such server, or it does not answer.
    pub async fn offered(
        &self,
        egress: &Egress,
        company: CompanyId,
        names: Option<&Vec<Value>>,
    ) -> Result<Vec<Arc<Tool>>, Failure> {
        let mut offered: Vec<Arc<Tool>> = Vec::new();
        for pattern in names.into_iter().flatten().filter_map(Value::as_str).filter(|name| name.starts_with(PREFIX)) {
            let (server, _) = parts(pattern)?;
            let connection = self.connected(egress, company, server).await?;
            for tool in &connection.tools {
                let known = offered.iter().any(|other| other.name == tool.name);
                if !known && matches(pattern, &tool.name) {
                    offered.push(Arc::clone(tool));
                }
            }
        }
        Ok(offered)
    }

    /// What a call of a tool reaches, as lists of hosts name it: the server's host, or
    /// `mcp:server` for a program.
    pub fn host(&self, tool: &str) -> Option<String> {
        let (name, _) = parts(tool).ok()?;
        let host = self.servers.get(name).and_then(|server| egress::host_of(server.entry.url.as_deref()?));
        Some(host.unwrap_or_else(|| format!("{PREFIX}{name}")))
    }

    /// Calls a tool, `mcp:server/tool`. The server is told the call's key as
    /// `_meta.idempotencyKey`, and that it is cancelled, where it takes too long or whoever makes it
    /// is stopped; a program is ended then.
    ///
    /// # Errors
    /// The server's own, where it answers with one; what happened on the way.
    pub async fn call(
        &self,
        egress: &Egress,
        company: CompanyId,
        (name, params): (&str, Map<String, Value>),
        (key, time): (&str, Duration),
    ) -> Result<Value, Failure> {
        let (server, tool) = parts(name)?;
        let connection = self.connected(egress, company, server).await?;
        let mut params = CallToolRequestParams::new(tool.to_owned()).with_arguments(params);
        let meta = serde_json::from_value(json!({"idempotencyKey": key}));
        params.meta = meta.map_err(|error| Failure::invalid(error.to_string()))?;
        let request = ClientRequest::CallToolRequest(CallToolRequest::new(params));
        let slot = self.slot(company, server)?;
        let broken = |error: &dyn std::fmt::Display| Failure::transient(format!("the MCP server `{server}`: {error}"));
        // It may have done what it was asked all the same.
        let unheard =
            |why: &str| Failure::new(ErrorClass::Timeout, format!("the MCP server `{server}` did not answer: {why}"));
        let sent = connection.service.peer().send_cancellable_request(request, PeerRequestOptions::no_options());
        let handle = match sent.await {
            Ok(handle) => handle,
            Err(error) => {
                forget(&slot, &connection).await;
                return Err(broken(&error));
            }
        };
        let mut open = OpenCall { handle: Some(handle), connection, slot };
        let answer = tokio::time::timeout(time, open.answer()).await;
        match answer {
            Ok(Some(Ok(ServerResult::CallToolResult(result)))) => output(&result),
            Ok(Some(Ok(_))) => Err(broken(&"it has answered with something else")),
            Ok(Some(Err(ServiceError::McpError(error)))) => {
                Err(Failure::invalid(format!("the MCP server `{server}`: {}", error.message)))
            }
            Ok(Some(Err(error))) => {
                forget(&open.slot, &open.connection).await;
                Err(unheard(&error.to_string()))
            }
            Ok(None) => {
                forget(&open.slot, &open.connection).await;
                Err(unheard("it has ended"))
            }
            Err(_) => Err(unheard(&format!("not within {time:?}"))),
        }
    }

    fn server(&self, company: CompanyId, name: &str) -> Result<&Server, Failure> {
        let may = |server: &Server| match &server.may {
            Companies::All => true,
            Companies::These(companies) => companies.contains(&company),
        };
        self.servers.get(name).filter(|server| may(server)).ok_or_else(|| {
            let known: Vec<&str> =
                self.servers.iter().filter(|(_, server)| may(server)).map(|(name, _)| name.as_str()).collect();
            Failure::invalid(match known.is_empty() {
                true => format!(
                    "there is no MCP server `{name}` for this company: the operator names servers and their `companies` in the file of CAPX_MCP on the workers"
                ),
                false => format!("there is no MCP server `{name}` for this company; there are {}", known.join(", ")),
            })
        })
    }

    /// Where a company's connection to a server stands.
    fn slot(&self, company: CompanyId, name: &str) -> Result<Slot, Failure> {
        let server = self.server(company, name)?;
        let mut slots = server.connections.lock().unwrap_or_else(PoisonError::into_inner);
        // Those that are in nobody's hands, and of no use for long; where there are too many, any.
        let unused = |slot: &Slot, for_long: Duration| {
            let unused = |c: &Arc<Connection>| Arc::strong_count(c) == 1 && c.listed.elapsed() >= for_long;
            Arc::strong_count(slot) == 1 && slot.try_lock().is_ok_and(|held| held.as_ref().is_none_or(unused))
        };
        slots.retain(|of, slot| *of == company || !unused(slot, IDLE_MAX));
        if slots.len() >= CONNECTIONS_MAX && !slots.contains_key(&company) {
            slots.retain(|_, slot| !unused(slot, Duration::ZERO));
        }
        if slots.len() >= CONNECTIONS_MAX && !slots.contains_key(&company) {
            return Err(Failure::transient(format!(
                "{CONNECTIONS_MAX} companies use the MCP server `{name}` on this worker; it is tried again"
            )));
        }
        Ok(Arc::clone(slots.entry(company).or_default()))
    }

    async fn connected(&self, egress: &Egress, company: CompanyId, name: &str) -> Result<Arc<Connection>, Failure> {
        let (server, slot) = (self.server(company, name)?, self.slot(company, name)?);
        let mut held = slot.lock().await;
        if let Some(connection) = held.as_ref()
            && !connection.is_over()
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
}

/// A call that a server has in hand. Dropped before it is answered, the server is told.
struct OpenCall {
    handle: Option<RequestHandle<RoleClient>>,
    connection: Arc<Connection>,
    slot: Slot,
}

impl OpenCall {
    /// What the server answers; nothing when it is gone.
    async fn answer(&mut self) -> Option<Result<ServerResult, ServiceError>> {
        let handle = self.handle.as_mut()?;
        let answer = (&mut handle.rx).await.ok();
        self.handle = None;
        answer
    }
}

impl Drop for OpenCall {
    fn drop(&mut self) {
        let Some(handle) = self.handle.take() else { return };
        let (connection, slot) = (Arc::clone(&self.connection), Arc::clone(&self.slot));
        tokio::spawn(async move {
            // Nobody can tell whether a program heeds what it is told: with it ends what others of the
            // company have it do, of which nobody knows then.
            if let Some(program) = connection.program.as_ref().filter(|_| !connection.is_over()) {
                program.kill();
                forget(&slot, &connection).await;
                return;
            }
            let told = handle.cancel(Some("whoever made the call was stopped".into()));
            if tokio::time::timeout(CANCEL_MAX, told).await.is_err() {
                tracing::debug!("a server was not told that a call is cancelled");
            }
        });
    }
}

/// The next call connects anew.
async fn forget(slot: &Slot, broken: &Arc<Connection>) {
    let mut held = slot.lock().await;
    if held.as_ref().is_some_and(|connection| Arc::ptr_eq(connection, broken)) {
        *held = None;
    }
}

/// Who may use a server, by its entry.
fn may(name: &str, entry: &Entry, open: bool) -> Result<Companies, String> {
    let Some(listed) = &entry.companies else {
        if !open {
            tracing::warn!(server = name, "an MCP server is nobody's: name its `companies`, or [\"*\"] for all");
        }
        return Ok(if open { Companies::All } else { Companies::These(HashSet::new()) });
    };
    if listed.iter().any(|company| company == "*") {
        return Ok(Companies::All);
    }
    let read = |id: &String| {
        id.parse().map_err(|_| format!("`{name}`: its companies are ids, `co_…`, or \"*\" for all, not `{id}`"))
    };
    Ok(Companies::These(listed.iter().map(read).collect::<Result<_, _>>()?))
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
    let mut program = None;
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
            started.args(&entry.args).env_clear().kill_on_drop(true).process_group(0);
            let kept = ["PATH", "HOME", "LANG", "TMPDIR"];
            started.envs(kept.iter().filter_map(|name| Some((name, std::env::var_os(name)?))));
            started.envs(&entry.env);
            let (transport, _) = TokioChildProcess::builder(started)
                .stderr(Stdio::null())
                .spawn()
                .map_err(|error| format!("`{command}` does not start: {error}"))?;
            program = Some(Program(transport.id().and_then(|id| Pid::from_raw(id.cast_signed()))));
            ().serve(transport).await.map_err(|error| error.to_string())?
        }
        (None, None) => return Err("it has no address".into()),
    };
    let listed = service.peer().list_all_tools().await.map_err(|error| error.to_string())?;
    let tools = listed.into_iter().take(TOOLS_MAX).filter_map(|tool| described(name, tool)).map(Arc::new).collect();
    Ok(Connection { service, tools, listed: Instant::now(), program })
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
        let servers = McpServers::read(good, true).expect("reads");
        assert_eq!(servers.servers.len(), 2);
        let hosts = (servers.host("mcp:wiki/x"), servers.host("mcp:files/x"));
        assert_eq!(hosts, (Some("wiki.example".into()), Some("mcp:files".into())));
        let (one, other) = (CompanyId::new(), CompanyId::new());
        assert!(servers.server(one, "wiki").is_ok(), "everybody's, where it is open");
        assert!(McpServers::read(good, false).expect("reads").server(one, "wiki").is_err(), "nobody's");
        let named = json!({"mcpServers": {"wiki": {"url": "https://wiki.example/", "companies": [one]}}});
        let named = McpServers::read(&named.to_string(), true).expect("reads");
        assert!(named.server(one, "wiki").is_ok() && named.server(other, "wiki").is_err());
        assert!(!format!("{servers:?}").contains("Bearer"), "a header is shown");
        for bad in [
            "{}",
            r#"{"mcpServers": {"a b": {"command": "x"}}}"#,
            r#"{"mcpServers": {"a": {}}}"#,
            r#"{"mcpServers": {"a": {"url": "ftp://x/"}}}"#,
            r#"{"mcpServers": {"a": {"url": "https://x/", "command": "y"}}}"#,
            r#"{"mcpServers": {"a": {"command": "y", "shell": true}}}"#,
            r#"{"mcpServers": {"a": {"url": "https://x/", "headers": {"a b": "c"}}}}"#,
            r#"{"mcpServers": {"a": {"url": "https://x/", "companies": ["me"]}}}"#,
        ] {
            assert!(McpServers::read(bad, true).is_err(), "{bad}");
        }
        assert!(
            matches("mcp:a/*", "mcp:a/x") && matches("mcp:a/get_*", "mcp:a/get_x") && !matches("mcp:a/x", "mcp:a/xy")
        );
        assert!(parts("mcp:a").is_err() && parts("mcp:/x").is_err());
    }
}
