//! What each event carries, as JSON Schema: read from a table that people read too.
//!
//! Fields may be added to an event; whatever would break who reads it is another event, or another
//! version of all of them.

use serde_json::{Map, Value, json};

/// The version of all shapes; raised when one of them changes so that readers break.
pub const VERSION: u32 = 1;

const TABLE: &str = include_str!("shapes.txt");
/// An id after its prefix: 26 characters of Crockford's base32, the first below 8.
const ID: &str = "_[0-7][0-9a-hjkmnp-tv-z]{25}$";

/// The line that names an event, parted from what it means.
fn heading(line: &'static str) -> Option<(&'static str, &'static str)> {
    let is_field = line.starts_with([' ', '#']) || line.is_empty();
    (!is_field).then(|| line.split_once(" - ").unwrap_or((line, "")))
}

/// The lines of an event's fields, and of those that may come with any.
fn fields(event: &str) -> Vec<&'static str> {
    let (mut here, mut named) = (false, false);
    let mut found = Vec::new();
    for line in TABLE.lines().filter(|line| !line.starts_with('#')) {
        match heading(line) {
            // Events that follow each other hold the same.
            Some((name, _)) => (here, named) = ((here && named) || name == event || name == "*", true),
            None => {
                named = false;
                found.extend(Some(line).filter(|line| here && !line.is_empty()));
            }
        }
    }
    found
}

/// What an event means, in a sentence.
pub fn meaning(event: &str) -> &'static str {
    TABLE.lines().filter_map(heading).find(|(name, _)| *name == event).map_or("", |(_, meaning)| meaning)
}

/// The schema of an event's `data`; `None` where there is no such event.
pub fn data(event: &str) -> Option<Value> {
    let (mut properties, mut required) = (Map::new(), Vec::new());
    let mut own = 0;
    for line in fields(event) {
        let (field, meaning) = line.trim().split_once(" - ")?;
        let (name, kind) = field.split_once(": ")?;
        let mut schema = typed(kind)?;
        schema.insert("description".into(), json!(meaning));
        match name.strip_suffix('?') {
            Some(name) => {
                properties.insert(name.into(), Value::Object(schema));
            }
            None => {
                required.push(name);
                properties.insert(name.into(), Value::Object(schema));
            }
        }
        own += 1;
    }
    // What may come with any is none of its own.
    (own > 1).then(|| json!({"type": "object", "properties": properties, "required": required}))
}

/// The schema of a type, as the table writes it.
fn typed(kind: &str) -> Option<Map<String, Value>> {
    let (kind, null) = kind.strip_suffix(" | null").map_or((kind, false), |kind| (kind, true));
    let mut schema = match kind {
        "any" => json!({}),
        "string" | "integer" | "number" | "boolean" | "object" | "array" => json!({"type": kind}),
        "time" => json!({"type": "string", "format": "date-time"}),
        "date" => json!({"type": "string", "format": "date"}),
        "usd" => json!({"type": "number", "minimum": 0}),
        _ if kind.starts_with('[') => {
            let items = typed(kind.trim_matches(['[', ']']))?;
            json!({"type": "array", "items": items})
        }
        _ if kind.ends_with('_') => {
            let prefixes: Vec<&str> = kind.split(' ').filter_map(|prefix| prefix.strip_suffix('_')).collect();
            json!({"type": "string", "pattern": format!("^({}){ID}", prefixes.join("|"))})
        }
        _ => json!({"type": "string", "enum": kind.split('|').collect::<Vec<_>>()}),
    };
    if null {
        let one = schema.get("type").cloned()?;
        schema["type"] = json!([one, "null"]);
        if let Some(values) = schema.get_mut("enum").and_then(Value::as_array_mut) {
            values.push(Value::Null);
        }
    }
    schema.as_object().cloned()
}

/// The schema of what a webhook is sent of an event.
pub fn body(event: &str) -> Option<Value> {
    let data = data(event)?;
    Some(json!({
        "type": "object",
        "required": ["id", "type", "company_id", "timestamp", "data"],
        "properties": {
            "id": {"type": "string", "pattern": format!("^evt{ID}"), "description": "The `webhook-id` of every try."},
            "type": {"type": "string", "const": event},
            "company_id": {"type": "string", "pattern": format!("^co{ID}"), "description": "Where it happened."},
            "timestamp": {"type": "string", "format": "date-time", "description": "When."},
            "data": data,
        },
    }))
}

#[cfg(test)]
mod tests {
    use super::super::NAMES;
    use super::*;
    use crate::domain::delivery::TEST;

    #[test]
    fn every_event_has_a_shape_and_every_line_is_one() {
        for name in NAMES.iter().copied().chain([TEST]) {
            let body = body(name).unwrap_or_else(|| panic!("{name} has no shape"));
            assert_eq!(body["properties"]["type"]["const"], name);
        }
        assert_eq!(data("nothing.of.it"), None);
        for line in TABLE.lines().filter(|line| line.starts_with("  ")) {
            let kind = line.split_once(": ").and_then(|(_, rest)| rest.split_once(" - ")).map(|(kind, _)| kind);
            assert!(kind.and_then(typed).is_some(), "{line}");
        }
        let headings = TABLE.lines().filter_map(heading);
        let named: Vec<&str> = headings.map(|(name, _)| name).filter(|name| *name != "*").collect();
        assert!(named.iter().all(|name| meaning(name).ends_with('.')));
        assert!(data("task.created").is_some_and(|data| data["properties"]["title"].is_object()));
        assert!(data("company.created").is_some_and(|data| data["properties"].get("title").is_none()));
        assert!(named.iter().all(|name| NAMES.contains(name) || *name == TEST), "{named:?}");
        assert_eq!(named.len(), NAMES.len() + 1);
    }

    #[test]
    fn types_are_what_the_table_says() {
        let data = data("step.failed").expect("a shape");
        let of = |name: &str| data["properties"][name].clone();
        assert_eq!(of("retry_in_ms")["type"], json!(["integer", "null"]));
        assert_eq!(of("code")["enum"][0], "transient");
        assert!(of("approval_id")["pattern"].as_str().is_some_and(|pattern| pattern.starts_with("^(apr)_")));
        let required = data["required"].as_array().expect("a list");
        assert!(required.contains(&json!("step")) && !required.contains(&json!("goes_on")));
    }
}
