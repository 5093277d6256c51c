//! `${inputs.x}` and `${steps.x.output.y[0]}` inside parameters.
//!
//! Rendered in one pass: what is put in is never read again, so a value that
//! looks like a template stays a value (hazard S12). A text that is one
//! reference and nothing else keeps the value's JSON type; inside a longer
//! text a value is written out. Only `inputs`, `steps` and `run` exist, and
//! what is not there is an error. `$${` stands for a plain `${`. What comes
//! out is at most [`RENDERED_BYTES_MAX`], or a few references to one large
//! value could fill a worker's memory.

use std::fmt;

use serde_json::{Map, Value};

use crate::domain::storable::size_of;

/// A compiled value: what needs no work is kept as it is.
#[derive(Debug, Clone)]
pub enum Template {
    /// No reference inside.
    Plain(Value),
    /// Exactly one reference: keeps its type.
    Ref(Reference),
    /// Text with references inside.
    Text(Vec<Part>),
    /// A list with references inside.
    List(Vec<Template>),
    /// A map with references inside its values.
    Map(Vec<(String, Template)>),
}

/// A piece of a text.
#[derive(Debug, Clone)]
pub enum Part {
    /// As written.
    Text(String),
    /// To be looked up.
    Ref(Reference),
}

/// A path such as `steps.draft.output.title`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reference(pub Vec<Segment>);

/// One part of a path.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Segment {
    /// `.name`
    Name(String),
    /// `[3]`
    Index(usize),
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (i, segment) in self.0.iter().enumerate() {
            match segment {
                Segment::Name(name) if i == 0 => f.write_str(name)?,
                Segment::Name(name) => write!(f, ".{name}")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

impl Reference {
    /// The name at a place of the path.
    pub fn name(&self, at: usize) -> Option<&str> {
        match self.0.get(at) {
            Some(Segment::Name(name)) => Some(name),
            _ => None,
        }
    }
}

/// What references are looked up in.
pub trait Scope {
    /// The value of the longest prefix that the scope knows and how many
    /// segments that took; `None` when there is nothing of the name.
    fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)>;
}

/// The most that the references of one template may put in, in bytes of JSON.
pub const RENDERED_BYTES_MAX: usize = 1024 * 1024;

/// Why a template gives no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum RenderError {
    /// A reference to what is not there.
    #[error("`${{{reference}}}` is not defined")]
    Undefined {
        /// The reference as written.
        reference: String,
    },
    /// More than [`RENDERED_BYTES_MAX`].
    #[error("what `${{{reference}}}` puts in makes it larger than {RENDERED_BYTES_MAX} bytes; pass less on, or a file")]
    Large {
        /// The reference that was too much.
        reference: String,
    },
}

/// Compiles a value; the error is a sentence about the first bad reference.
pub fn compile(value: &Value) -> Result<Template, String> {
    match value {
        Value::String(text) => compile_text(text),
        Value::Array(items) => {
            let items = items.iter().map(compile).collect::<Result<Vec<_>, _>>()?;
            if items.iter().all(|t| matches!(t, Template::Plain(_))) {
                return Ok(Template::Plain(value.clone()));
            }
            Ok(Template::List(items))
        }
        Value::Object(map) => {
            let entries =
                map.iter().map(|(key, item)| Ok((key.clone(), compile(item)?))).collect::<Result<Vec<_>, String>>()?;
            if entries.iter().all(|(_, t)| matches!(t, Template::Plain(_))) {
                // `$${` needs its dollar taken away even in a plain value.
                return Ok(Template::Plain(Value::Object(entries.into_iter().map(|(k, t)| (k, plain(t))).collect())));
            }
            Ok(Template::Map(entries))
        }
        other => Ok(Template::Plain(other.clone())),
    }
}

fn plain(template: Template) -> Value {
    match template {
        Template::Plain(value) => value,
        _ => Value::Null,
    }
}

fn compile_text(text: &str) -> Result<Template, String> {
    if !text.contains("${") {
        return Ok(Template::Plain(Value::String(text.to_owned())));
    }
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some(at) = rest.find("${") {
        if rest[..at].ends_with('$') {
            literal.push_str(&rest[..at - 1]);
            literal.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        literal.push_str(&rest[..at]);
        let body = &rest[at + 2..];
        let end = body.find('}').ok_or_else(|| format!("`{}` has no closing brace", excerpt(&rest[at..])))?;
        let reference = parse_reference(body[..end].trim())?;
        if !literal.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut literal)));
        }
        parts.push(Part::Ref(reference));
        rest = &body[end + 1..];
    }
    literal.push_str(rest);
    if parts.is_empty() {
        return Ok(Template::Plain(Value::String(literal)));
    }
    if !literal.is_empty() {
        parts.push(Part::Text(literal));
    }
    match parts.as_slice() {
        [Part::Ref(reference)] => Ok(Template::Ref(reference.clone())),
        _ => Ok(Template::Text(parts)),
    }
}

fn excerpt(text: &str) -> String {
    text.chars().take(40).collect()
}

/// Reads a path; names are letters, digits, `_` and `-`.
pub fn parse_reference(text: &str) -> Result<Reference, String> {
    let bad = || {
        format!(
            "`${{{}}}` is no reference; write a path such as ${{inputs.topic}} or ${{steps.draft.output}}",
            excerpt(text)
        )
    };
    let mut segments = Vec::new();
    let mut rest = text;
    loop {
        let end = rest.find(|c: char| !(c.is_ascii_alphanumeric() || c == '_' || c == '-')).unwrap_or(rest.len());
        if end == 0 {
            return Err(bad());
        }
        segments.push(Segment::Name(rest[..end].to_owned()));
        rest = &rest[end..];
        while let Some(body) = rest.strip_prefix('[') {
            let (index, after) = body.split_once(']').ok_or_else(bad)?;
            segments.push(Segment::Index(index.parse().map_err(|_| bad())?));
            rest = after;
        }
        match rest.strip_prefix('.') {
            Some(next) => rest = next,
            None if rest.is_empty() => return Ok(Reference(segments)),
            None => return Err(bad()),
        }
    }
}

impl Template {
    /// Every reference inside.
    pub fn references(&self) -> Vec<&Reference> {
        let mut found = Vec::new();
        self.collect(&mut found);
        found
    }

    fn collect<'a>(&'a self, found: &mut Vec<&'a Reference>) {
        match self {
            Self::Plain(_) => {}
            Self::Ref(reference) => found.push(reference),
            Self::Text(parts) => found.extend(parts.iter().filter_map(|part| match part {
                Part::Ref(reference) => Some(reference),
                Part::Text(_) => None,
            })),
            Self::List(items) => items.iter().for_each(|item| item.collect(found)),
            Self::Map(entries) => entries.iter().for_each(|(_, item)| item.collect(found)),
        }
    }

    /// The value with every reference looked up.
    pub fn render(&self, scope: &impl Scope) -> Result<Value, RenderError> {
        let mut left = RENDERED_BYTES_MAX;
        self.render_within(scope, &mut left)
    }

    /// `left` is what references may still put in.
    fn render_within(&self, scope: &impl Scope, left: &mut usize) -> Result<Value, RenderError> {
        match self {
            Self::Plain(value) => Ok(value.clone()),
            Self::Ref(reference) => {
                let value = resolve(reference, scope)?;
                spend(left, size_of(value), reference)?;
                Ok(value.clone())
            }
            Self::Text(parts) => {
                let mut out = String::new();
                for part in parts {
                    match part {
                        Part::Text(text) => out.push_str(text),
                        Part::Ref(reference) => {
                            let value = resolve(reference, scope)?;
                            spend(left, size_of(value), reference)?;
                            match value {
                                Value::String(text) => out.push_str(text),
                                other => out.push_str(&other.to_string()),
                            }
                        }
                    }
                }
                Ok(Value::String(out))
            }
            Self::List(items) => {
                items.iter().map(|item| item.render_within(scope, left)).collect::<Result<_, _>>().map(Value::Array)
            }
            Self::Map(entries) => entries
                .iter()
                .map(|(key, item)| Ok((key.clone(), item.render_within(scope, left)?)))
                .collect::<Result<Map<_, _>, _>>()
                .map(Value::Object),
        }
    }
}

fn spend(left: &mut usize, bytes: usize, reference: &Reference) -> Result<(), RenderError> {
    *left = left.checked_sub(bytes).ok_or_else(|| RenderError::Large { reference: reference.to_string() })?;
    Ok(())
}

fn resolve<'a>(reference: &Reference, scope: &'a impl Scope) -> Result<&'a Value, RenderError> {
    let undefined = || RenderError::Undefined { reference: reference.to_string() };
    let (mut value, used) = scope.lookup(reference).ok_or_else(undefined)?;
    for segment in &reference.0[used..] {
        value = match segment {
            Segment::Name(name) => value.get(name),
            Segment::Index(index) => value.get(index),
        }
        .ok_or_else(undefined)?;
    }
    Ok(value)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use serde_json::json;

    struct Inputs(Value);

    impl Scope for Inputs {
        fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)> {
            (reference.name(0)? == "inputs").then_some((&self.0, 1))
        }
    }

    fn render(template: Value, inputs: Value) -> Result<Value, String> {
        compile(&template)?.render(&Inputs(inputs)).map_err(|e| e.to_string())
    }

    #[test]
    fn a_lone_reference_keeps_its_type_and_a_text_takes_it_in() {
        let inputs = json!({"n": 3, "list": [1, {"a": "x"}], "t": "hi"});
        assert_eq!(render(json!("${inputs.n}"), inputs.clone()), Ok(json!(3)));
        assert_eq!(render(json!({"v": ["${inputs.list[1].a}", true]}), inputs.clone()), Ok(json!({"v": ["x", true]})));
        assert_eq!(
            render(json!("${inputs.t}, ${ inputs.list }!"), inputs.clone()),
            Ok(json!("hi, [1,{\"a\":\"x\"}]!"))
        );
        assert_eq!(render(json!("cost: $5, $${inputs.n}"), inputs.clone()), Ok(json!("cost: $5, ${inputs.n}")));
        assert_eq!(render(json!({"a": "$${x}"}), inputs), Ok(json!({"a": "${x}"})));
    }

    #[test]
    fn what_is_not_there_is_an_error_that_names_it() {
        assert_eq!(render(json!("${inputs.topik}"), json!({})), Err("`${inputs.topik}` is not defined".into()));
        assert_eq!(render(json!("${env.HOME}"), json!({})), Err("`${env.HOME}` is not defined".into()));
        for bad in ["${", "${}", "${a b}", "${a.}", "${a[x]}", "${a[1}", "${a()}"] {
            assert!(compile(&json!(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn what_references_put_in_is_bounded() {
        let large = json!({"x": "y".repeat(RENDERED_BYTES_MAX / 3)});
        assert!(render(json!(["${inputs.x}", "${inputs.x}"]), large.clone()).is_ok());
        let error = render(json!(["${inputs.x}", {"a": "${inputs.x}${inputs.x}"}]), large);
        assert!(error.is_err_and(|e| e.contains("larger than 1048576 bytes")));
    }

    proptest! {
        /// Whatever a value holds, it comes out as it went in: nothing inside
        /// it is read as a template.
        #[test]
        fn a_value_is_never_read_again(text in ".*") {
            let template = json!({"a": "${inputs.x}", "b": "<${inputs.x}>"});
            prop_assert_eq!(
                render(template, json!({"x": text.clone()})),
                Ok(json!({"a": text.clone(), "b": format!("<{text}>")}))
            );
        }

        #[test]
        fn any_text_compiles_or_says_why(text in ".*") {
            if let Err(message) = compile(&json!(text)) {
                prop_assert!(message.contains('`'));
            }
        }
    }
}
