//! `${…}` and `{{…}}` inside parameters, each an [`Expr`].
//!
//! Rendered in one pass: what is put in is never read again, so a value that
//! looks like a template stays a value (hazard S12). A text that is one
//! expression and nothing else keeps the value's JSON type; inside a longer
//! text a value is written out. Only what the scope knows exists, and what is
//! not there is an error. `$${` stands for a plain `${`, `{{ '{{' }}` for the
//! other form. What comes out is at most [`RENDERED_BYTES_MAX`], or a few
//! references to one large value could fill a worker's memory.

use std::borrow::Cow;

use serde_json::{Map, Value};

use super::expr::functions::written;
use super::expr::{Budget, EvalError, Expr, RESULT_BYTES_MAX, Reference, Scope, parse_prefix};
use super::url;
use crate::domain::storable::size_of;

/// A compiled value: what needs no work is kept as it is.
#[derive(Debug, Clone)]
pub enum Template {
    /// No expression inside.
    Plain(Value),
    /// Exactly one expression: keeps its type.
    Expr(Expr),
    /// Text with expressions inside.
    Text(Vec<Part>),
    /// The same, and a URL: see [`super::url`].
    Url(Vec<Part>),
    /// A list with expressions inside.
    List(Vec<Template>),
    /// A map with expressions inside its values.
    Map(Vec<(String, Template)>),
}

/// A piece of a text.
#[derive(Debug, Clone)]
pub enum Part {
    /// As written.
    Text(String),
    /// To be evaluated.
    Expr(Expr),
}

/// The most that the expressions of one template may put in, in bytes of JSON.
pub const RENDERED_BYTES_MAX: usize = RESULT_BYTES_MAX;

/// Compiles a value; the error is a sentence about the first bad expression.
pub fn compile(value: &Value) -> Result<Template, String> {
    match value {
        Value::String(text) => compile_text(text),
        Value::Array(items) => Ok(Template::list(items.iter().map(compile).collect::<Result<_, _>>()?)),
        Value::Object(map) => {
            let entries = map.iter().map(|(key, item)| Ok((key.clone(), compile(item)?)));
            Ok(Template::map(entries.collect::<Result<_, String>>()?))
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

/// What opens an expression, and what closes it.
const BRACES: &[(&str, &str)] = &[("${", "}"), ("{{", "}}")];

/// The first opening of an expression: where, and how it opens and closes.
fn first_brace(text: &str) -> Option<(usize, &'static str, &'static str)> {
    let starts = text.match_indices(['$', '{']).map(|(at, _)| at);
    starts
        .flat_map(|at| BRACES.iter().map(move |(open, close)| (at, *open, *close)))
        .find(|(at, open, _)| text[*at..].starts_with(open))
}

fn compile_text(text: &str) -> Result<Template, String> {
    let mut parts = Vec::new();
    let mut literal = String::new();
    let mut rest = text;
    while let Some((at, open, close)) = first_brace(rest) {
        if open == "${" && rest[..at].ends_with('$') {
            literal.push_str(&rest[..at - 1]);
            literal.push_str("${");
            rest = &rest[at + 2..];
            continue;
        }
        literal.push_str(&rest[..at]);
        let body = &rest[at + open.len()..];
        let (expr, used) = parse_prefix(body, close)?;
        if !literal.is_empty() {
            parts.push(Part::Text(std::mem::take(&mut literal)));
        }
        parts.push(Part::Expr(expr));
        rest = &body[used + close.len()..];
    }
    literal.push_str(rest);
    if parts.is_empty() {
        return Ok(Template::Plain(Value::String(literal)));
    }
    if !literal.is_empty() {
        parts.push(Part::Text(literal));
    }
    match parts.as_slice() {
        [Part::Expr(expr)] => Ok(Template::Expr(expr.clone())),
        _ => Ok(Template::Text(parts)),
    }
}

impl Template {
    /// A list of templates; plain where all of them are.
    pub fn list(items: Vec<Self>) -> Self {
        if items.iter().all(|item| matches!(item, Self::Plain(_))) {
            return Self::Plain(items.into_iter().map(plain).collect());
        }
        Self::List(items)
    }

    /// A map of templates; plain where all of them are.
    pub fn map(entries: Vec<(String, Self)>) -> Self {
        if entries.iter().all(|(_, item)| matches!(item, Self::Plain(_))) {
            return Self::Plain(Value::Object(entries.into_iter().map(|(key, item)| (key, plain(item))).collect()));
        }
        Self::Map(entries)
    }

    /// A map of which one value is a URL.
    pub fn with_url(self, name: &str) -> Self {
        let Self::Map(entries) = self else { return self };
        let as_url = |(key, item): (String, Self)| match item {
            Self::Text(parts) if key == name => (key, Self::Url(parts)),
            other => (key, other),
        };
        Self::Map(entries.into_iter().map(as_url).collect())
    }

    /// Every reference inside.
    pub fn references(&self) -> Vec<&Reference> {
        self.uses().into_iter().map(|(reference, _)| reference).collect()
    }

    /// The same, and whether each may be of what is not there.
    pub fn uses(&self) -> Vec<(&Reference, bool)> {
        let mut found = Vec::new();
        self.collect(&mut found);
        found
    }

    fn collect<'a>(&'a self, found: &mut Vec<(&'a Reference, bool)>) {
        match self {
            Self::Plain(_) => {}
            Self::Expr(expr) => found.extend(expr.uses()),
            Self::Text(parts) | Self::Url(parts) => found.extend(parts.iter().flat_map(|part| match part {
                Part::Expr(expr) => expr.uses(),
                Part::Text(_) => Vec::new(),
            })),
            Self::List(items) => items.iter().for_each(|item| item.collect(found)),
            Self::Map(entries) => entries.iter().for_each(|(_, item)| item.collect(found)),
        }
    }

    /// The value with every expression evaluated.
    pub fn render(&self, scope: &impl Scope) -> Result<Value, EvalError> {
        self.render_within(scope, &mut Budget::default())
    }

    fn render_within(&self, scope: &impl Scope, budget: &mut Budget) -> Result<Value, EvalError> {
        match self {
            Self::Plain(value) => Ok(value.clone()),
            Self::Expr(expr) => {
                let value = put_in(expr, scope, budget)?;
                Ok(value.into_owned())
            }
            Self::Text(parts) | Self::Url(parts) => {
                let is_url = matches!(self, Self::Url(_));
                let mut out = String::new();
                for part in parts {
                    match part {
                        Part::Text(text) => out.push_str(text),
                        Part::Expr(expr) => {
                            let value = put_in(expr, scope, budget)?;
                            // Whoever has set a secret has a say in the whole of it.
                            match is_url && !expr.is_secret() {
                                true => url::put(&mut out, &written(&value))?,
                                false => out.push_str(&written(&value)),
                            }
                        }
                    }
                }
                if is_url {
                    url::check(&out)?;
                }
                Ok(Value::String(out))
            }
            Self::List(items) => {
                items.iter().map(|item| item.render_within(scope, budget)).collect::<Result<_, _>>().map(Value::Array)
            }
            Self::Map(entries) => entries
                .iter()
                .map(|(key, item)| Ok((key.clone(), item.render_within(scope, budget)?)))
                .collect::<Result<Map<_, _>, _>>()
                .map(Value::Object),
        }
    }
}

/// The value of an expression, paid for: what a function made is paid already.
fn put_in<'a>(expr: &'a Expr, scope: &'a impl Scope, budget: &mut Budget) -> Result<Cow<'a, Value>, EvalError> {
    let value = expr.eval(scope, budget)?;
    if let Cow::Borrowed(borrowed) = &value {
        let name = expr.references().first().map_or_else(|| "the expression".into(), ToString::to_string);
        budget.make(size_of(borrowed), name)?;
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
        assert_eq!(render(json!("${inputs.topik}"), json!({})), Err("`inputs.topik` is not defined".into()));
        assert_eq!(render(json!("${env.HOME}"), json!({})), Err("`env.HOME` is not defined".into()));
        for bad in ["${", "${}", "${a b}", "${a.}", "${a[1}", "${a()}", "{{ a }", "{{", "{{ x | y }}"] {
            assert!(compile(&json!(bad)).is_err(), "{bad}");
        }
    }

    #[test]
    fn only_the_url_of_a_map_is_one() {
        let params = json!({"url": "http://x/${inputs.a}?q=${inputs.a}", "body": "<${inputs.a}>", "in": {"url": "<${inputs.a}>"}});
        let render = |a: &str| compile(&params).expect("a map").with_url("url").render(&Inputs(json!({"a": a})));
        let expected =
            json!({"url": "http://x/a%2F%24%7Bb?q=a%2F%24%7Bb", "body": "<a/${b>", "in": {"url": "<a/${b>"}});
        assert_eq!(render("a/${b"), Ok(expected));
        assert!(render("..").is_err());
        for alone in ["http://x/a/..", "${inputs.a}"] {
            let template = compile(&json!({"url": alone})).expect("a map").with_url("url");
            let value = template.render(&Inputs(json!({"a": "http://x/a/.."})));
            assert_eq!(value, Ok(json!({"url": "http://x/a/.."})), "its author's, as it is");
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
        /// Whatever a value holds, in whichever form it is asked for, it comes out as it went in: nothing inside
        /// it is read as a template.
        #[test]
        fn a_value_is_never_read_again(text in ".*") {
            let template = json!({"a": "${inputs.x}", "b": "<${inputs.x}>", "c": "<{{ inputs.x }}{{ '{{' }}"});
            prop_assert_eq!(
                render(template, json!({"x": text.clone()})),
                Ok(json!({"a": text.clone(), "b": format!("<{text}>"), "c": format!("<{text}{{{{")}))
            );
        }

        #[test]
        fn any_text_compiles_or_says_why(text in ".*") {
            let _ = compile(&json!(text));
        }
    }
}
