//! Which tools there are for a model: by what names, for what arguments, and what may be
//! done when nobody knows what came of a call.

use std::borrow::Cow;
use std::sync::{Arc, LazyLock};

use jsonschema::Validator;
use serde_json::{Value, json};

use capx_core::domain::digest::{hex, sha256};
use capx_core::domain::tool;

use super::{CODE_EXECUTE, EVALUATE, FILE_READ, FILE_WRITE, HTTP_REQUEST, SHELL_RUN, WEB_SEARCH};

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
    pub name: Cow<'static, str>,
    /// Other names of the same.
    pub aliases: &'static [&'static str],
    /// What it does, for a model.
    pub description: Cow<'static, str>,
    /// What to do where its outcome is unknown.
    pub on_unknown: OnUnknown,
    /// The JSON Schema of its arguments.
    pub schema: Value,
    validator: Validator,
}

static TOOLS: LazyLock<Vec<Arc<Tool>>> = LazyLock::new(|| {
    vec![
        tool(
            HTTP_REQUEST,
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
            "Reads a file of the workspace and gives {path, content, bytes}.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["path"],
                "properties": {"path": {"type": "string", "minLength": 1, "description": "relative to the workspace"}},
            }),
        ),
        tool(
            FILE_WRITE,
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
        tool(
            WEB_SEARCH,
            "Searches the web and gives {results: [{title, url, text}]}.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["query"],
                "properties": {
                    "query": {"type": "string", "minLength": 1, "maxLength": 1000},
                    "count": {"type": "integer", "minimum": 1, "maximum": 20},
                },
            }),
        ),
        tool(
            SHELL_RUN,
            "Runs a command in a sandbox without a network, in a copy of the workspace whose changes are kept, and gives {exit_code, stdout, stderr, files, removed}. An exit code but 0 is an error.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["command"],
                "properties": {
                    "command": {"description": "text for sh, or a program and its arguments", "oneOf": [
                        {"type": "string", "minLength": 1},
                        {"type": "array", "minItems": 1, "maxItems": 256, "items": {"type": "string"}},
                    ]},
                    "stdin": {"type": "string"},
                },
            }),
        ),
        tool(
            CODE_EXECUTE,
            "Runs code in a sandbox without a network, in a copy of the workspace whose changes are kept, and gives {exit_code, stdout, stderr, files, removed}. An exit code but 0 is an error.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["code"],
                "properties": {
                    "language": {"enum": ["python", "sh"], "description": "python when left out"},
                    "code": {"type": "string", "minLength": 1},
                    "stdin": {"type": "string"},
                },
            }),
        ),
        tool(
            "create_task",
            "Gives somebody in the company a task and gives {task_id, status}. It is done later, by an agent of that role; without one, by whoever has least to do.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["title"],
                "properties": {
                    "title": {"type": "string", "minLength": 1, "maxLength": 500},
                    "description": {"type": "string", "description": "all that it takes to do it, and what is expected of it"},
                    "role": {"type": "string", "description": "whose work it is"},
                    "priority": {"enum": ["low", "medium", "high", "critical"]},
                    "needs": {"type": "array", "maxItems": 20, "items": {"type": "string"}, "description": "ids of tasks that must be completed before; their results are handed on"},
                    "metadata": {"type": "object"},
                },
            }),
        ),
        tool(
            "list_tasks",
            "Shows how the company's tasks stand, the newest first.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false,
                "properties": {"status": {"type": "string"}, "role": {"type": "string"}},
            }),
        ),
        tool(
            "send_message",
            "Writes to an agent (`to`, a role), who reads it at once, or into a channel for people.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["body"],
                "properties": {"to": {"type": "string"}, "channel": {"type": "string"}, "body": {"type": "string", "minLength": 1}},
            }),
        ),
        tool(
            "run_playbook",
            "Starts a run of a playbook of the company and gives {run_id, status}; it goes on by itself.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["playbook"],
                "properties": {"playbook": {"type": "string", "minLength": 1}, "params": {"type": "object"}},
            }),
        ),
        tool(
            "memory.read",
            "Gives what is remembered under a key, or the keys where none is named.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false,
                "properties": {"key": {"type": "string"}, "scope": {"enum": ["agent", "company"]}},
            }),
        ),
        tool(
            "memory.search",
            "Finds what is remembered by its words.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["query"],
                "properties": {"query": {"type": "string", "minLength": 1}, "scope": {"enum": ["agent", "company"]}},
            }),
        ),
        tool(
            "memory.write",
            "Remembers a value under a key over all your work; null forgets it. The scope `company` is read by all agents.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["key", "value"],
                "properties": {
                    "key": {"type": "string", "minLength": 1, "maxLength": 200}, "value": {},
                    "scope": {"enum": ["agent", "company"]},
                },
            }),
        ),
        tool(
            EVALUATE,
            "Computes how far a value meets criteria, each an expression over `output`, such as `len(output.title) < 60`.",
            OnUnknown::Again,
            json!({
                "type": "object", "additionalProperties": false, "required": ["output", "checks"],
                "properties": {
                    "output": {},
                    "checks": {"type": "array", "minItems": 1, "maxItems": 50, "items": {
                        "type": "object", "additionalProperties": false, "required": ["check"],
                        "properties": {"name": {"type": "string"}, "check": {"type": "string"}, "weight": {"type": "number"}, "threshold": {"type": "number"}},
                    }},
                },
            }),
        ),
    ]
});

/// A tool by the name that policies know it by, which brings its other names.
fn tool(name: &'static str, description: &'static str, on_unknown: OnUnknown, schema: Value) -> Arc<Tool> {
    let validator = jsonschema::validator_for(&schema);
    #[expect(clippy::expect_used, reason = "the schemas are ours, and a test makes them all")]
    let validator = validator.expect("a tool's schema");
    let aliases = tool::named(name).map_or(&[][..], |known| known.aliases);
    Arc::new(Tool { name: name.into(), aliases, description: description.into(), on_unknown, schema, validator })
}

/// The longest name that providers take, in characters (64 at both Anthropic and `OpenAI`).
const WIRE_NAME_MAX: usize = 64;

impl Tool {
    /// A tool of a server; nothing, where its schema is none.
    pub fn of_server(name: String, description: String, on_unknown: OnUnknown, schema: Value) -> Option<Self> {
        let validator = jsonschema::validator_for(&schema).ok()?;
        Some(Self { name: name.into(), aliases: &[], description: description.into(), on_unknown, schema, validator })
    }

    /// The name that a provider is given: nothing but letters, digits, `_` and `-`; the rest of
    /// one that is too long is a digest of it.
    pub fn wire_name(&self) -> String {
        let plain = |c: char| if c.is_ascii_alphanumeric() || c == '_' || c == '-' { c } else { '_' };
        let name: String = self.name.chars().map(plain).collect();
        if name.len() <= WIRE_NAME_MAX {
            return name;
        }
        let rest = hex(&sha256(self.name.as_bytes()));
        format!("{}_{}", &name[..WIRE_NAME_MAX - 9], &rest[..8])
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

/// The tools that an agent is offered: those that it names, or all; those that run programs
/// only where a worker may.
pub fn offered(names: Option<&Vec<Value>>, programs: bool) -> Vec<Arc<Tool>> {
    let named = |tool: &&Arc<Tool>| match names {
        None => true,
        Some(names) => names.iter().filter_map(Value::as_str).any(|name| tool.is_named(name)),
    };
    let may = |tool: &&Arc<Tool>| programs || ![SHELL_RUN, CODE_EXECUTE].contains(&&*tool.name);
    TOOLS.iter().filter(may).filter(named).cloned().collect()
}

/// One of them, by any of its names.
pub fn find<'a>(tools: &'a [Arc<Tool>], name: &str) -> Option<&'a Arc<Tool>> {
    tools.iter().find(|tool| tool.is_named(name))
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
        let tools = offered(None, true);
        assert_eq!(find(&tools, "file_read").map(|t| &*t.name), Some("file.read"));
        assert_eq!(find(&tools, "http.request").map(|t| t.wire_name()).as_deref(), Some("http_request"));
        let named = vec![json!("file_read"), json!("unheard_of")];
        assert_eq!(offered(Some(&named), true).iter().map(|t| &*t.name).collect::<Vec<_>>(), ["file.read"]);
        for tool in &tools {
            let names = tool.aliases.iter().copied().chain([&*tool.name]);
            for name in names {
                assert_eq!(tools.iter().filter(|other| other.is_named(name)).count(), 1, "{name}");
            }
        }
    }

    #[test]
    fn wrong_arguments_are_told_in_words() {
        let tools = offered(None, true);
        let write = find(&tools, "file.write").expect("a tool");
        assert_eq!(write.problem(&json!({"path": "a", "content": "b"})), None);
        let problem = write.problem(&json!({"path": 3, "contents": "b"})).expect("a problem");
        assert!(problem.contains("/path") && problem.contains("content"), "{problem}");
        assert!(write.problem(&json!("text")).is_some());
    }
}
