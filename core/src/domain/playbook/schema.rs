//! The JSON Schema for editors, made from the tables of the keys. It knows what
//! a key may hold; what only the check knows (references, cycles, roles) is not
//! in it.

use serde_json::{Map, Value, json};

use super::keys::{self, Key};
use super::model::InputKind;

/// Where it is served.
const ID: &str = "/v1/schemas/playbook.json";

/// The schema, in draft 2020-12.
pub fn schema() -> Value {
    let kinds: Vec<&str> = InputKind::NAMES.iter().map(|(name, _)| *name).collect();
    let mut schema = of(keys::TOP);
    schema["required"] = json!(["steps"]);
    schema["anyOf"] = json!([{"required": ["name"]}, {"required": ["playbook"]}]);
    let mut whole = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "$id": ID,
        "title": "capx playbook",
    });
    if let (Value::Object(whole), Value::Object(schema)) = (&mut whole, schema) {
        whole.extend(schema);
    }
    whole["$defs"] = json!({
        "duration": {
            "description": "A number and a unit: 100ms, 2s, 5m, 1h, 1d.",
            "type": "string",
            "pattern": "^\\s*[0-9]+(ms|s|m|h|d)\\s*$",
        },
        "type": {"enum": kinds},
        "trigger": {"anyOf": [
            {"enum": ["schedule", "scheduled", "manual", "webhook", "event", "event-driven"]},
            of(keys::TRIGGER),
        ]},
        "input": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/type"}, of(keys::INPUT)]},
        "shape": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/type"}, of(keys::SHAPE)]},
        "step": of(keys::STEP),
        "retry": of(keys::RETRY),
        "compensate": of(keys::COMPENSATE),
        "concurrency": of(keys::CONCURRENCY),
        "execution": of(keys::EXECUTION),
        "approval": of(keys::APPROVAL),
        "wait_for": of(keys::WAIT_FOR),
        "timeout": of(keys::TIMEOUT),
        "rubric": rubric(),
    });
    whole
}

/// A map with the keys of a table and no others.
fn of(table: &[Key]) -> Value {
    let properties = table.iter().map(|key| (key.name.to_owned(), property(key))).collect::<Map<_, _>>();
    json!({"type": "object", "properties": properties, "additionalProperties": false})
}

/// Criteria by names of the author's own, beside the few keys that every rubric knows.
fn rubric() -> Value {
    let mut rubric = of(keys::RUBRIC);
    rubric["additionalProperties"] =
        json!({"anyOf": [{"type": "number", "minimum": 0, "maximum": 1}, of(keys::CRITERION)]});
    rubric
}

/// A key without a value counts as absent, whatever it may hold.
fn property(key: &Key) -> Value {
    let shape: Value = serde_json::from_str(key.shape).unwrap_or(Value::Bool(true));
    let doc = key.same_as.map_or_else(|| key.doc.to_owned(), |name| format!("The same as `{name}`."));
    match shape {
        Value::Bool(_) => json!({"description": doc}),
        shape => json!({"description": doc, "anyOf": [shape, {"type": "null"}]}),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_shape_is_json() {
        let tables = [
            keys::TOP,
            keys::STEP,
            keys::TRIGGER,
            keys::INPUT,
            keys::RETRY,
            keys::APPROVAL,
            keys::WAIT_FOR,
            keys::COMPENSATE,
            keys::CONCURRENCY,
            keys::SHAPE,
            keys::RUBRIC,
            keys::TIMEOUT,
            keys::CRITERION,
        ];
        for key in tables.into_iter().flatten() {
            serde_json::from_str::<Value>(key.shape).unwrap_or_else(|error| panic!("{}: {error}", key.name));
            assert_eq!(key.doc.is_empty(), key.same_as.is_some(), "{}", key.name);
        }
    }
}
