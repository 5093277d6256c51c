//! What a value must be: of an input, and of what a step says. A part of JSON Schema,
//! in its words.

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value};

use super::model::InputKind;
use crate::domain::artifact::Artifact;

/// So many problems of one value are told.
const PROBLEMS_MAX: usize = 20;
/// How large a compiled pattern may be, in bytes: matching takes time linear in the
/// text, whatever the pattern, but a compiled one can be huge.
pub const PATTERN_BYTES_MAX: usize = 64 * 1024;
/// How many choices are told.
const CHOICES_TOLD: usize = 10;

/// What a value must be.
#[derive(Debug, Clone)]
pub struct Shape {
    /// Its type.
    pub kind: InputKind,
    /// It is one of these.
    pub choices: Option<Vec<Value>>,
    /// A number is at least this, a text has at least so many characters, a list so
    /// many items.
    pub min: Option<f64>,
    /// The same, at most.
    pub max: Option<f64>,
    /// A text matches it, somewhere.
    pub pattern: Option<Regex>,
    /// Each item of a list.
    pub items: Option<Box<Shape>>,
    /// What a map holds, among others; whether it must.
    pub fields: Option<Vec<(String, Shape, bool)>>,
}

impl PartialEq for Shape {
    fn eq(&self, other: &Self) -> bool {
        let pattern = |shape: &Self| shape.pattern.as_ref().map(|pattern| pattern.as_str().to_owned());
        (self.kind, &self.choices, self.min, self.max, &self.items, &self.fields)
            == (other.kind, &other.choices, other.min, other.max, &other.items, &other.fields)
            && pattern(self) == pattern(other)
    }
}

/// Compiles a pattern within bounds; why not, in a sentence.
pub fn pattern(text: &str) -> Result<Regex, String> {
    let built = RegexBuilder::new(text).size_limit(PATTERN_BYTES_MAX).dfa_size_limit(PATTERN_BYTES_MAX).build();
    built.map_err(|error| match error {
        regex::Error::CompiledTooBig(_) => "is too large".to_owned(),
        error => {
            let said = error.to_string();
            let last = said.lines().last().unwrap_or_default().trim_start_matches("error: ");
            format!("is no pattern: {last}")
        }
    })
}

impl Shape {
    /// Anything of a type.
    pub fn of(kind: InputKind) -> Self {
        Self { kind, choices: None, min: None, max: None, pattern: None, items: None, fields: None }
    }

    /// What is wrong with a value: where in it, and a sentence. Empty when nothing is.
    pub fn problems(&self, value: &Value) -> Vec<(String, String)> {
        let mut problems = Vec::new();
        self.check(value, &mut String::new(), &mut problems);
        problems
    }

    /// The same in one sentence.
    pub fn problem(&self, value: &Value) -> Option<String> {
        let problems = self.problems(value);
        let told = problems.iter().map(|(path, message)| match path.as_str() {
            "" => message.clone(),
            path => format!("`{path}` {message}"),
        });
        (!problems.is_empty()).then(|| told.collect::<Vec<_>>().join("; "))
    }

    fn check(&self, value: &Value, path: &mut String, problems: &mut Vec<(String, String)>) {
        // What was too large to be kept inline is as good as what it stands for.
        if problems.len() >= PROBLEMS_MAX || Artifact::of(value).is_some() {
            return;
        }
        if !self.kind.holds(value) {
            problems.push((path.clone(), format!("must be of type {}", self.kind.as_str())));
            return;
        }
        if let Some(choices) = self.choices.as_ref().filter(|choices| !choices.contains(value)) {
            let told: Vec<String> = choices.iter().take(CHOICES_TOLD).map(Value::to_string).collect();
            let more = if choices.len() > CHOICES_TOLD { ", …" } else { "" };
            problems.push((path.clone(), format!("must be one of {}{more}", told.join(", "))));
        }
        problems.extend(self.bounds(value).map(|message| (path.clone(), message)));
        if let (Some(pattern), Some(text)) = (&self.pattern, value.as_str())
            && !pattern.is_match(text)
        {
            problems.push((path.clone(), format!("must match the pattern {pattern}")));
        }
        let whole = path.len();
        if let (Some(shape), Some(items)) = (&self.items, value.as_array()) {
            for (at, item) in items.iter().enumerate() {
                path.push_str(&format!("[{at}]"));
                shape.check(item, path, problems);
                path.truncate(whole);
            }
        }
        if let (Some(fields), Some(map)) = (&self.fields, value.as_object()) {
            for (name, shape, required) in fields {
                if whole > 0 {
                    path.push('.');
                }
                path.push_str(name);
                shape.field(map.get(name), *required, path, problems);
                path.truncate(whole);
            }
        }
    }

    fn field(&self, value: Option<&Value>, required: bool, path: &mut String, problems: &mut Vec<(String, String)>) {
        match value {
            Some(Value::Null) if !required => {}
            Some(value) => self.check(value, path, problems),
            None if required => problems.push((path.clone(), "is missing".into())),
            None => {}
        }
    }

    fn bounds(&self, value: &Value) -> Option<String> {
        let (size, what) = match value {
            Value::Number(number) => (number.as_f64()?, ""),
            Value::String(text) => (text.chars().count() as f64, " characters long"),
            Value::Array(items) => (items.len() as f64, " items long"),
            _ => return None,
        };
        let told = |bound: f64, word: &str| Some(format!("must be at {word} {bound}{what}"));
        match (self.min, self.max) {
            (Some(min), _) if size < min => told(min, "least"),
            (_, Some(max)) if size > max => told(max, "most"),
            _ => None,
        }
    }

    /// As answers show it: JSON Schema.
    pub fn to_json(&self) -> Value {
        let mut map = Map::new();
        map.insert("type".into(), self.kind.as_str().into());
        let number = |number: f64| serde_json::Number::from_f64(number).map_or(Value::Null, Value::Number);
        let entries = [
            ("enum", self.choices.clone().map(Value::Array)),
            ("min", self.min.map(number)),
            ("max", self.max.map(number)),
            ("pattern", self.pattern.as_ref().map(|pattern| pattern.as_str().into())),
            ("items", self.items.as_ref().map(|shape| shape.to_json())),
        ];
        map.extend(entries.into_iter().filter_map(|(name, value)| Some((name.to_owned(), value?))));
        Value::Object(map)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::domain::playbook;
    use serde_json::json;

    fn shape(yaml: &str) -> Shape {
        let text = format!("name: x\ninputs: {{v: {yaml}}}\nsteps: [{{action: transform}}]\n");
        let mut loaded = playbook::load(&text).unwrap_or_else(|problems| panic!("{problems:?}"));
        loaded.inputs.remove(0).shape
    }

    #[test]
    fn values_are_held_to_what_is_declared() {
        for (yaml, good, bad, said) in [
            ("{type: string, enum: [a, b]}", json!("a"), json!("c"), r#"must be one of "a", "b""#),
            ("{type: integer, min: 1, max: 10}", json!(10), json!(11), "must be at most 10"),
            ("{type: number, min: 0.5}", json!(0.5), json!(0.4), "must be at least 0.5"),
            ("{type: string, max: 2}", json!("üü"), json!("abc"), "must be at most 2 characters long"),
            ("{type: array, min: 1, items: string}", json!(["a"]), json!([]), "must be at least 1 items long"),
            ("{type: array, items: string}", json!([]), json!(["a", 1]), "`[1]` must be of type string"),
            ("{type: string, pattern: '^[a-z]+$'}", json!("abc"), json!("a1"), "must match the pattern ^[a-z]+$"),
            (
                "{type: object, properties: {id: {type: string, required: true}, n: {type: array, items: {type: object, properties: {k: integer}}}}}",
                json!({"id": "x", "n": [{"k": 1}, {}], "more": 1}),
                json!({"n": [{"k": "1"}]}),
                "`id` is missing; `n[0].k` must be of type integer",
            ),
        ] {
            let shape = shape(yaml);
            assert_eq!(shape.problem(&good), None, "{yaml}");
            assert_eq!(shape.problem(&bad).as_deref(), Some(said), "{yaml}");
        }
    }

    #[test]
    fn patterns_take_linear_time_and_bounded_memory() {
        let shape = shape("{type: string, pattern: '^(a+)+$'}");
        let long = format!("{}b", "a".repeat(100_000));
        assert!(shape.problem(&json!(long)).is_some());
        assert!(pattern("(a{1000}){1000}").expect_err("too large").contains("too large"));
        assert!(pattern("(").expect_err("open").contains("unclosed group"));
    }
}
