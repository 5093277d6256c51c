//! The tools that a step can run without a model, and that a model may ask for: a file a
//! tool.

use std::sync::Arc;
use std::time::Duration;

use capx_core::domain::agent::evaluate::evaluate;
use capx_core::domain::ids::{CompanyId, RunId};
use capx_core::domain::outcome::{Failure, Outcome};
use capx_core::domain::secret::Secrets;
use serde_json::{Map, Value};

use crate::artifacts::Artifacts;
use crate::deeds::Deeds;
use crate::handlers::Hands;
use crate::mcp;

mod file;
mod http_request;
mod program;
pub mod registry;
mod web_search;
pub mod workspace;

pub use web_search::Search;

/// One call of a tool.
#[derive(Debug)]
pub struct ToolCall<'a> {
    /// Whose.
    pub company: CompanyId,
    /// Of which run.
    pub run: RunId,
    /// Its arguments.
    pub params: Map<String, Value>,
    /// What its arguments may hold, to be taken out of answers before they are cut.
    pub secrets: Option<&'a Arc<Secrets>>,
    /// Where what is large is kept.
    pub artifacts: &'a Artifacts<'a>,
    /// By which it works inside the company.
    pub deeds: &'a Deeds,
    /// The same whenever the call is repeated.
    pub idempotency_key: String,
    /// How long is left.
    pub timeout: Duration,
    /// How long nothing may come of it.
    pub idle: Duration,
}

/// Returns its rendered parameters; nothing else happens.
pub const TRANSFORM: &str = "transform";
/// Calls an address.
pub const HTTP_REQUEST: &str = "http.request";
/// Reads a file of the workspace.
pub const FILE_READ: &str = "file.read";
/// Writes one.
pub const FILE_WRITE: &str = "file.write";
/// Searches the web.
pub const WEB_SEARCH: &str = "web_search";
/// Runs a command in the sandbox.
pub const SHELL_RUN: &str = "shell.run";
/// Runs code in the sandbox.
pub const CODE_EXECUTE: &str = "code.execute";
/// Those that work inside the company: tasks, messages, playbooks, memory.
const OF_THE_COMPANY: &[&str] =
    &["send_message", "create_task", "list_tasks", "run_playbook", "memory.read", "memory.search", "memory.write"];
/// Holds a value against criteria.
pub const EVALUATE: &str = "evaluate";

/// Runs a registered tool as a step.
pub async fn run(hands: &Hands, tool: &str, call: ToolCall<'_>) -> Outcome {
    match use_tool(hands, tool, call).await {
        Ok(output) => Outcome::done(output),
        Err(failure) => Outcome::failed(failure),
    }
}

/// Runs a registered tool.
pub async fn use_tool(hands: &Hands, tool: &str, call: ToolCall<'_>) -> Result<Value, Failure> {
    match tool {
        TRANSFORM => Ok(Value::Object(call.params)),
        HTTP_REQUEST => http_request::run(hands, call).await,
        FILE_READ => file::read(hands, call).await,
        FILE_WRITE => file::write(hands, call).await,
        WEB_SEARCH => web_search::run(hands, call).await,
        SHELL_RUN | CODE_EXECUTE => program::run(hands, tool, call).await,
        EVALUATE => evaluate(&call.params).map_err(Failure::invalid),
        tool if OF_THE_COMPANY.contains(&tool) => call.deeds.perform(tool, call.params, call.idempotency_key).await,
        tool if tool.starts_with(mcp::PREFIX) => {
            let time = (call.idempotency_key.as_str(), call.timeout);
            hands.mcp.call(&hands.egress, call.company, (tool, call.params), time).await
        }
        other => Err(Failure::invalid(format!("the tool `{other}` is not part of this version"))),
    }
}

/// Work that would hold up others, where it does not.
async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T, Failure> + Send + 'static) -> Result<T, Failure> {
    tokio::task::spawn_blocking(work)
        .await
        .unwrap_or_else(|error| Err(Failure::transient(format!("a task ended early: {error}"))))
}

/// A required text parameter.
fn text<'a>(params: &'a Map<String, Value>, name: &str) -> Result<&'a str, Failure> {
    match params.get(name) {
        Some(Value::String(text)) if !text.is_empty() => Ok(text),
        Some(Value::String(_)) => Err(Failure::invalid(format!("params.{name} is empty"))),
        Some(_) => Err(Failure::invalid(format!("params.{name} must be text"))),
        None => Err(Failure::invalid(format!("params.{name} is required"))),
    }
}

/// Refuses parameters that the tool does not know, since a mistyped one would
/// silently do nothing.
fn only(params: &Map<String, Value>, known: &[&str]) -> Result<(), Failure> {
    match params.keys().find(|name| !known.contains(&name.as_str())) {
        None => Ok(()),
        Some(name) => {
            let near = capx_core::domain::playbook::problem::did_you_mean(name, known.iter().copied());
            let hint = near.unwrap_or_else(|| format!("it takes {}", known.join(", ")));
            Err(Failure::invalid(format!("the tool has no parameter `{name}`; {hint}")))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    #[test]
    fn parameters_are_named_when_they_are_wrong() {
        let params = json!({"path": 3, "contnt": "x"});
        let params = params.as_object().expect("a map");
        assert_eq!(text(params, "path").expect_err("no text").message, "params.path must be text");
        assert_eq!(text(params, "url").expect_err("missing").message, "params.url is required");
        assert_eq!(
            only(params, &["path", "content"]).expect_err("unknown").message,
            "the tool has no parameter `contnt`; did you mean `content`?"
        );
    }
}
