//! Which tools there are for a model: by what names, for what arguments, and what may be
//! done when nobody knows what came of a call.

use std::sync::LazyLock;

use jsonschema::Validator;
use serde_json::{Value, json};

use super::{FILE_READ, FILE_WRITE, HTTP_REQUEST};

/// How many wrong arguments are told at once.
const PROBLEMS_MAX: usize = 5;

/// What is done about a call of which nobody knows what came of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OnUnknown {
    /// It is made again: it only reads, or it carries its key.
    Again,
    /// A person looks at it.
    Review,
}

/// A tool.
#[derive(Debug)]
pub struct Tool {
    /// Its name in playbooks and policies.
    pub name: &'static str,
    /// Other names of the same.
    pub aliases: &'static [&'static str],
    /// What it does, for a model.
    pub description: &'static str,
    /// What to do where its outcome is unknown.
    pub on_unknown: OnUnknown,
    /// The JSON Schema of its arguments.
    pub schema: Value,
    validator: Validator,
}

static TOOLS: LazyLock<Vec<Tool>> = LazyLock::new(|| {
    vec![
        tool(
            HTTP_REQUEST,
            &["http_request", "fetch"],
            "Calls an http or https address and gives {status, headers, body}; a JSON body is parsed. A status of 400 or above is an error.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["url"],
                "properties": {
                    "method": {"type": "string", "description": "GET when left out"},
                    "url": {"type": "string", "minLength": 1},
                    "headers": {"type": "object", "additionalProperties": {"type": ["string", "number"]}},
                    "body": {"description": "text, or anything that is sent as JSON"},
                },
            }),
        ),
        tool(
            FILE_READ,
            &["file_read", "read_file"],
            "Reads a file of the workspace and gives {path, content, bytes}.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["path"],
                "properties": {"path": {"type": "string", "minLength": 1, "description": "relative to the workspace"}},
            }),
        ),
        tool(
            FILE_WRITE,
            &["file_write", "write_file", "write_code"],
            "Writes a file of the workspace, in the place of what was there, and gives {path, bytes, sha256}.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["path", "content"],
                "properties": {
                    "path": {"type": "string", "minLength": 1, "description": "relative to the workspace"},
                    "content": {"description": "text, or anything that is written as JSON"},
                },
            }),
        ),
    ]
});

fn tool(
    name: &'static str,
    aliases: &'static [&'static str],
    description: &'static str,
    on_unknown: OnUnknown,
    schema: Value,
) -> Tool {
    let validator = jsonschema::validator_for(&schema);
    #[expect(clippy::expect_used, reason = "the schemas are ours, and a test makes them all")]
    let validator = validator.expect("a tool's schema");
    Tool { name, aliases, description, on_unknown, schema, validator }
}

impl Tool {
    /// The name that a provider is given: nothing but letters, digits, `_` and `-`.
    pub fn wire_name(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' };
        self.name.chars().map(plain).collect()
    }

    fn is_named(&self, name: &str) -> bool {
        self.name == name || self.aliases.contains(&name) || self.wire_name() == name
    }

    /// What is wrong with arguments, in words for the model; nothing, where they are fine.
    pub fn problem(&self, input: &Value) -> Option<String> {
        let told: Vec<String> = self
            .validator
            .iter_errors(input)
            .take(PROBLEMS_MAX)
            .map(|error| match error.instance_path().to_string() {
                path if path.is_empty() => error.to_string(),
                path => format!("{path}: {error}"),
            })
            .collect();
        (!told.is_empty()).then(|| format!("the arguments of `{}` are wrong: {}", self.name, told.join("; ")))
    }
}

/// The tools that an agent is offered: those that it names, or all.
pub fn offered(names: Option<&Vec<Value>>) -> Vec<&'static Tool> {
    let named = |tool: &&Tool| match names {
        None => true,
        Some(names) => names.iter().filter_map(Value::as_str).any(|name| tool.is_named(name)),
    };
    TOOLS.iter().filter(named).collect()
}

/// One of them, by any of its names.
pub fn find<'a>(tools: &[&'a Tool], name: &str) -> Option<&'a Tool> {
    tools.iter().copied().find(|tool| tool.is_named(name))
}

/// Whether there is such a tool at all.
pub fn exists(name: &str) -> bool {
    TOOLS.iter().any(|tool| tool.is_named(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tools_go_by_any_of_their_names_and_each_name_is_of_one() {
        let tools = offered(None);
        assert_eq!(find(&tools, "file_read").map(|t| t.name), Some("file.read"));
        assert_eq!(find(&tools, "http.request").map(Tool::wire_name).as_deref(), Some("http_request"));
        let named = vec![json!("file_read"), json!("unheard_of")];
        assert_eq!(offered(Some(&named)).iter().map(|t| t.name).collect::<Vec<_>>(), ["file.read"]);
        for tool in &tools {
            let names = tool.aliases.iter().copied().chain([tool.name]);
            for name in names {
                assert_eq!(tools.iter().filter(|other| other.is_named(name)).count(), 1, "{name}");
            }
        }
    }

    #[test]
    fn wrong_arguments_are_told_in_words() {
        let tools = offered(None);
        let write = find(&tools, "file.write").expect("a tool");
        assert_eq!(write.problem(&json!({"path": "a", "content": "b"})), None);
        let problem = write.problem(&json!({"path": 3, "contents": "b"})).expect("a problem");
        assert!(problem.contains("/path") && problem.contains("content"), "{problem}");
        assert!(write.problem(&json!("text")).is_some());
    }
}
