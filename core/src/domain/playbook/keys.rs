//! The keys of the language: one table for the loader, the canonical form and
//! the schema for editors. The order of a table is that of the canonical form.

/// A key of a map.
#[derive(Debug)]
pub struct Key {
    /// As it is written.
    pub name: &'static str,
    /// The canonical name, where this is another dialect's.
    pub same_as: Option<&'static str>,
    /// For authors.
    pub doc: &'static str,
    /// Its JSON Schema.
    pub shape: &'static str,
}

const fn key(name: &'static str, doc: &'static str, shape: &'static str) -> Key {
    Key { name, same_as: None, doc, shape }
}

const fn other(name: &'static str, canonical: &'static str, shape: &'static str) -> Key {
    Key { name, same_as: Some(canonical), doc: "", shape }
}

/// The names of a table.
pub fn names(table: &[Key]) -> Vec<&'static str> {
    table.iter().map(|key| key.name).collect()
}

const TEXT: &str = r#"{"type": ["string", "number"]}"#;
const ANY: &str = "true";
const MAP: &str = r#"{"type": "object"}"#;
const YES_NO: &str = r#"{"type": "boolean"}"#;
const DURATION: &str = r##"{"$ref": "#/$defs/duration"}"##;
const TIMEOUT_SHAPE: &str = r##"{"anyOf": [{"$ref": "#/$defs/duration"}, {"$ref": "#/$defs/timeout"}]}"##;
const DURATION_OR_TEMPLATE: &str =
    r##"{"anyOf": [{"$ref": "#/$defs/duration"}, {"type": "string", "pattern": "\\$\\{|\\{\\{"}]}"##;
const CREDITS: &str = r#"{"type": "integer", "minimum": 0, "maximum": 1000000000}"#;
const TRIES: &str = r#"{"type": "integer", "minimum": 1, "maximum": 100}"#;

/// Of a playbook.
pub const TOP: &[Key] = &[
    key("name", "Unique within the company.", TEXT),
    other("playbook", "name", TEXT),
    key("version", "For people; the server counts versions itself.", r#"{"type": "integer", "minimum": 1}"#),
    key("description", "For people.", TEXT),
    key("tags", "For people.", r#"{"type": ["array", "string"]}"#),
    key("trigger", "What starts a run, besides a person.", r##"{"$ref": "#/$defs/trigger"}"##),
    other("schedule", "trigger.schedule", TEXT),
    other("catch_up", "trigger.catch_up", TEXT),
    key(
        "inputs",
        "What a run can be given, by name.",
        r##"{"type": "object", "maxProperties": 100, "additionalProperties": {"$ref": "#/$defs/input"}}"##,
    ),
    key("idempotency_key", "Of all runs one has what this comes to, such as `invoice-${inputs.number}`.", TEXT),
    key(
        "concurrency",
        "How many runs may be under way at once, of all or with the same key.",
        r##"{"anyOf": [{"type": "integer", "minimum": 1, "maximum": 10000}, {"type": "string"}, {"$ref": "#/$defs/concurrency"}]}"##,
    ),
    key(
        "execution",
        "How it may be run: `auto`, `review` holds it before its first step, `blocked` runs nothing.",
        r##"{"anyOf": [{"enum": ["auto", "review", "blocked"]}, {"$ref": "#/$defs/execution"}]}"##,
    ),
    key("budget", "Credits that one run may cost; 1 credit is 0.01 USD.", CREDITS),
    key(
        "secrets",
        "The company's secrets that `${secrets.NAME}` gives to tools.",
        r#"{"type": ["array", "string"], "maxItems": 20, "items": {"type": "string", "pattern": "^[A-Za-z][A-Za-z0-9_]{0,63}$"}}"#,
    ),
    key(
        "steps",
        "What is done, in this order.",
        r##"{"type": "array", "minItems": 1, "maxItems": 1000, "items": {"$ref": "#/$defs/step"}}"##,
    ),
    key(
        "finally",
        "What is done when the steps are over, however they ended.",
        r##"{"type": "array", "maxItems": 100, "items": {"$ref": "#/$defs/step"}}"##,
    ),
    key("output", "What the run's output is made of; may hold `${…}`.", ANY),
    key("rubric", "Limits of the whole run: `max_cost: 5.00`, `max_duration: 1h`, `min_sources: 5`.", MAP),
];

/// Of a step.
pub const STEP: &[Key] = &[
    key(
        "id",
        "What `steps.ID.output` refers to.",
        r#"{"type": ["string", "integer"], "pattern": "^[A-Za-z0-9_-]{1,64}$"}"#,
    ),
    other("name", "id", r#"{"type": ["string", "integer"], "pattern": "^[A-Za-z0-9_-]{1,64}$"}"#),
    key(
        "needs",
        "The steps that must be over; the one before it without. `[]` begins at once.",
        r##"{"anyOf": [{"type": "array", "items": {"type": ["string", "integer"]}}, {"type": ["string", "integer"]}]}"##,
    ),
    key("if", "The step is left out where this does not hold.", r#"{"type": ["string", "boolean"]}"#),
    key("role", "Whose work it is; a registered tool can do without.", TEXT),
    other("agent", "role", TEXT),
    key("action", "A tool's name, or what the role's agent is asked to do.", TEXT),
    other("tool", "action", TEXT),
    key("playbook", "A run of this other playbook does the step.", TEXT),
    key("goto", "The run goes on at this earlier step.", TEXT),
    key("max_retries", "How often a `goto` may jump.", r#"{"type": "integer", "minimum": 1, "maximum": 10000}"#),
    key("sleep", "The run goes on after this time.", DURATION_OR_TEMPLATE),
    key(
        "wait_for",
        "The run goes on when this event has come.",
        r##"{"anyOf": [{"type": "string"}, {"$ref": "#/$defs/wait_for"}]}"##,
    ),
    key(
        "for_each",
        "The step is done once for each item of this list; `${item}` and `${index}` say which.",
        r#"{"type": ["string", "array"]}"#,
    ),
    key(
        "max_parallel",
        "How many items at once; one after another without.",
        r#"{"type": "integer", "minimum": 1, "maximum": 1000}"#,
    ),
    key(
        "max_items",
        "The longest list that is taken; 1000 without.",
        r#"{"type": "integer", "minimum": 1, "maximum": 10000}"#,
    ),
    key(
        "min_success",
        "How many items must be done, as a number or a share such as 80%; all without.",
        r#"{"anyOf": [{"type": "integer", "minimum": 0}, {"type": "string", "pattern": "^[0-9]{1,3}%$"}]}"#,
    ),
    key(
        "on_item_failure",
        "`abort` begins no more items when too few can be done; `continue` tries them all.",
        r#"{"enum": ["abort", "continue"]}"#,
    ),
    key("params", "The arguments; may hold `${…}`.", MAP),
    other("with", "params", MAP),
    key("adapter", "Overrides the agent's adapter.", TEXT),
    key("model", "Overrides the agent's model.", TEXT),
    key("budget", "Credits that the step may cost; 1 credit is 0.01 USD.", CREDITS),
    key(
        "output",
        "What the step says, by name; what it does not hold to fails the step.",
        r##"{"type": "object", "maxProperties": 100, "additionalProperties": {"$ref": "#/$defs/shape"}}"##,
    ),
    key(
        "approval",
        "A person must say yes before the step is tried.",
        r##"{"anyOf": [{"enum": ["required", "none", true, false]}, {"$ref": "#/$defs/approval"}]}"##,
    ),
    key("timeout", "How long one attempt may take, and how long nothing may come of it.", TIMEOUT_SHAPE),
    key(
        "retry",
        "When and how often a failed attempt is made again.",
        r##"{"anyOf": [{"type": "integer", "minimum": 1, "maximum": 100}, {"$ref": "#/$defs/retry"}]}"##,
    ),
    key("on_failure", "`abort`, `continue`, or the id of a later step.", TEXT),
    key(
        "compensate",
        "What undoes the step when it is done and the run fails later.",
        r##"{"anyOf": [{"type": "string"}, {"$ref": "#/$defs/compensate"}]}"##,
    ),
    key("rubric", "What the output must come up to, by criterion.", r##"{"$ref": "#/$defs/rubric"}"##),
];

/// Of a trigger.
pub const TRIGGER: &[Key] = &[
    key(
        "type",
        "What starts a run; `schedule` where nothing is said.",
        r#"{"enum": ["schedule", "scheduled", "manual", "webhook", "event", "event-driven"]}"#,
    ),
    key("schedule", "Five cron fields, or `@hourly`, `@daily`, `@weekly`.", TEXT),
    other("cron", "schedule", TEXT),
    key("timezone", "An IANA zone such as Europe/Berlin; UTC without.", TEXT),
    key(
        "dst_gap",
        "Times that the zone leaves out: `shift` to the gap's end, or `skip`.",
        r#"{"enum": ["shift", "skip"]}"#,
    ),
    key(
        "dst_overlap",
        "Times that the zone has twice: the `first`, or `both`. Without, an hourly schedule goes on through both.",
        r#"{"enum": ["first", "both"]}"#,
    ),
    key("catch_up", "What was missed: `none`, `latest`, or `all(10)`. `latest` without.", TEXT),
    key("jitter", "Each run is late by a part of this, always the same.", DURATION),
    key("event", "The event's name.", TEXT),
    key("match", "What the event's data must hold.", MAP),
];

/// Of an input.
pub const INPUT: &[Key] = &[
    key("type", "What it must be.", r##"{"$ref": "#/$defs/type"}"##),
    key("enum", "It is one of these.", r#"{"type": "array", "minItems": 1}"#),
    key("min", "The least number, or the least length of a text or list.", r#"{"type": "number"}"#),
    other("minimum", "min", r#"{"type": "number"}"#),
    key("max", "The greatest number, or the greatest length of a text or list.", r#"{"type": "number"}"#),
    other("maximum", "max", r#"{"type": "number"}"#),
    key("pattern", "A text matches it.", r#"{"type": "string"}"#),
    key("items", "What each item of a list must be.", r##"{"$ref": "#/$defs/shape"}"##),
    key(
        "properties",
        "What a map holds, by name.",
        r##"{"type": "object", "maxProperties": 100, "additionalProperties": {"$ref": "#/$defs/shape"}}"##,
    ),
    key("required", "A run needs it.", YES_NO),
    key("default", "What it is when not given.", ANY),
    key("description", "For people.", TEXT),
];

/// Of what a value must be, inside an input or an output.
pub const SHAPE: &[Key] = &[
    key("type", "What it must be.", r##"{"$ref": "#/$defs/type"}"##),
    key("enum", "It is one of these.", r#"{"type": "array", "minItems": 1}"#),
    key("min", "The least number, or the least length of a text or list.", r#"{"type": "number"}"#),
    other("minimum", "min", r#"{"type": "number"}"#),
    key("max", "The greatest number, or the greatest length of a text or list.", r#"{"type": "number"}"#),
    other("maximum", "max", r#"{"type": "number"}"#),
    key("pattern", "A text matches it.", r#"{"type": "string"}"#),
    key("items", "What each item of a list must be.", r##"{"$ref": "#/$defs/shape"}"##),
    key(
        "properties",
        "What a map holds, by name.",
        r##"{"type": "object", "maxProperties": 100, "additionalProperties": {"$ref": "#/$defs/shape"}}"##,
    ),
    key("required", "It must be there.", YES_NO),
    key("description", "For people.", TEXT),
];

/// Of `retry`.
pub const RETRY: &[Key] = &[
    key("max_attempts", "Tries in all, the first included.", TRIES),
    key(
        "backoff",
        "`exponential`, `constant`, or a factor from 1.",
        r#"{"anyOf": [{"enum": ["exponential", "constant", "fixed"]}, {"type": "number", "minimum": 1}]}"#,
    ),
    key("initial", "The pause before the second try.", DURATION),
    key("max", "The longest pause.", DURATION),
    key("jitter", "Pauses are of random length up to that.", YES_NO),
    key(
        "on",
        "Which errors are worth another try.",
        r#"{"type": "array", "items": {"enum": ["transient", "rate_limited", "timeout", "invalid", "governance"]}}"#,
    ),
];

/// Of `concurrency`.
pub const CONCURRENCY: &[Key] = &[
    key("key", "What the runs have in common, such as `${inputs.customer}`; all are one group without.", TEXT),
    key("limit", "So many at once; 1 without.", r#"{"type": "integer", "minimum": 1, "maximum": 10000}"#),
    key(
        "on_conflict",
        "What becomes of one more: it waits, is refused, cancels the oldest, takes the place of those that wait, or is \
         the last that is there. `queue` without.",
        r#"{"enum": ["queue", "reject", "cancel_running", "replace_pending", "coalesce"]}"#,
    ),
];

/// Of `execution`.
pub const EXECUTION: &[Key] = &[
    key(
        "mode",
        "`review` asks a person before the first step, `blocked` refuses to run; `auto` without.",
        r#"{"enum": ["auto", "review", "blocked"]}"#,
    ),
    key("spend_cap", "USD that all its runs may cost in a month.", r#"{"type": "number", "minimum": 0}"#),
    key(
        "notify",
        "Who is told when a person is asked; named in the event.",
        r#"{"anyOf": [{"type": "string"}, {"type": "array", "maxItems": 50, "items": {"type": "string"}}]}"#,
    ),
];

/// Of `compensate`.
pub const COMPENSATE: &[Key] = &[
    key("role", "Whose work it is; the step's own without.", TEXT),
    other("agent", "role", TEXT),
    key("action", "A tool's name, or what the role's agent is asked to do.", TEXT),
    other("tool", "action", TEXT),
    key("params", "The arguments; may hold `${…}`, the step's own output too.", MAP),
    other("with", "params", MAP),
    key("adapter", "Overrides the agent's adapter.", TEXT),
    key("model", "Overrides the agent's model.", TEXT),
    key("timeout", "How long one attempt may take, and how long nothing may come of it.", TIMEOUT_SHAPE),
    key(
        "retry",
        "When and how often a failed attempt is made again.",
        r##"{"anyOf": [{"type": "integer", "minimum": 1, "maximum": 100}, {"$ref": "#/$defs/retry"}]}"##,
    ),
];

/// Of `approval`.
pub const APPROVAL: &[Key] = &[
    key("required", "Always true.", YES_NO),
    key("timeout", "When it is decided by itself; 24h without.", DURATION),
    key(
        "reviewers",
        "Who may decide: names or ids of keys. Whoever holds the scope without.",
        r#"{"anyOf": [{"type": "string"}, {"type": "array", "minItems": 1, "maxItems": 50, "items": {"type": "string"}}]}"#,
    ),
    key(
        "on_timeout",
        "What is decided then; `reject` without. `escalate` lets anybody decide, within as much time again.",
        r#"{"enum": ["reject", "approve", "escalate"]}"#,
    ),
    key("message", "What the approver reads.", TEXT),
];

/// Of `timeout`.
pub const TIMEOUT: &[Key] = &[
    key("hard", "How long one attempt may take; 1h without.", DURATION),
    key("idle", "How long nothing may come of it; as long as `hard` without.", DURATION),
];

/// Of a step's `rubric`, besides its criteria.
pub const RUBRIC: &[Key] = &[
    key(
        "composite_threshold",
        "What the weighted score must come up to; below it a person decides.",
        r#"{"type": "number", "minimum": 0, "maximum": 1}"#,
    ),
    key("judge", "The role whose agent grades; the step's own without.", TEXT),
    key(
        "max_retries",
        "How often the step is done anew at most; 2 without.",
        r#"{"type": "integer", "minimum": 0, "maximum": 20}"#,
    ),
];

/// Of a criterion.
pub const CRITERION: &[Key] = &[
    key("description", "For whoever grades.", TEXT),
    key("weight", "What it counts for in the weighted score; 1 without.", r#"{"type": "number", "minimum": 0}"#),
    key("threshold", "The score that is asked.", r#"{"type": "number", "minimum": 0, "maximum": 1}"#),
    key(
        "on_fail",
        "`retry` does the step anew and says why, `escalate` asks a person, `block` fails the step. `retry` without.",
        r#"{"enum": ["retry", "escalate", "block"]}"#,
    ),
    key(
        "check",
        "An expression that computes the score, such as `len(steps.draft.output.title) < 60`; graded without.",
        r#"{"type": ["string", "boolean"]}"#,
    ),
];

/// Of `wait_for`.
pub const WAIT_FOR: &[Key] = &[
    key("event", "The event's name; may hold `${…}`.", TEXT),
    key("match", "What the event's data must hold; may hold `${…}`.", MAP),
    key("timeout", "How long; then the step fails. 24h without.", DURATION),
];
