//! The tools that a step can run without a model: a file a tool.

use capx_core::domain::outcome::{Failure, Outcome};
use serde_json::{Map, Value};

use crate::handlers::{Hands, StepCall};

mod file;
mod http_request;
pub mod workspace;

/// Returns its rendered parameters; nothing else happens.
pub const TRANSFORM: &str = "transform";

/// Runs a registered tool.
pub async fn run(hands: &Hands, call: StepCall<'_>) -> Outcome {
    let done = match call.step.action.as_str() {
        TRANSFORM => Ok(Value::Object(call.params)),
        "http.request" => http_request::run(hands, call).await,
        "file.read" => file::read(hands, call).await,
        "file.write" => file::write(hands, call).await,
        other => Err(Failure::invalid(format!("the tool `{other}` is not part of this version"))),
    };
    match done {
        Ok(output) => Outcome::done(output),
        Err(failure) => Outcome::failed(failure),
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
