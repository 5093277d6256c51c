//! The one small language of conditions and templates: `if:`, `${…}`, `{{…}}`.
//!
//! Pure and total: it has no loops, no clock and no names but those that its
//! scope gives it, so that an expression always ends and always says the same
//! (hazard S11). What it knows:
//!
//! - literals: `null`, `true`, `false`, `12`, `0.5`, `'text'`, `"text"`, `[1, 2]`
//! - paths: `inputs.topic`, `steps.draft.output.items[0]`, `item['a name']`. A
//!   name may hold `-`, so a minus needs a space in front
//! - `or` `||`, `and` `&&`, `not` `!`, `==` `!=` `<` `<=` `>` `>=`, `in`, `??`,
//!   `+` `-` `*` `/` `%`, parentheses
//! - functions, see [`functions`], called as `len(x)` or as `x | len`
//!
//! What is not there is an error, but for the left side of `??` and the argument
//! of `defined` and `default`. As a condition, `null`, `false`, `0` and whatever
//! is empty count as false.

use std::borrow::Cow;
use std::fmt;

use serde_json::Value;

mod eval;
pub mod functions;
mod parse;

pub(super) use parse::parse_prefix;
pub use parse::{parse, parse_reference};

/// How deep an expression may be nested.
pub const DEPTH_MAX: usize = 64;
/// How deep the tree of an expression may be, chains such as `a + b + c` included.
pub const TREE_DEPTH_MAX: usize = 128;
/// Of how many parts an expression may consist.
pub const NODES_MAX: usize = 1_000;
/// What an expression may make, in bytes of JSON.
pub const RESULT_BYTES_MAX: usize = 1024 * 1024;
/// What may be read for it, in bytes of JSON: a tenth of a second's work, or so.
pub const READ_BYTES_MAX: usize = 64 * 1024 * 1024;

/// What the evaluation of expressions may still take.
#[derive(Debug)]
pub struct Budget {
    made: usize,
    read: usize,
}

impl Default for Budget {
    fn default() -> Self {
        Self { made: RESULT_BYTES_MAX, read: READ_BYTES_MAX }
    }
}

impl Budget {
    /// Pays for what is made; `what` is named when that is too much.
    pub fn make(&mut self, bytes: usize, what: impl std::fmt::Display) -> Result<(), EvalError> {
        self.made = self.made.checked_sub(bytes).ok_or_else(|| EvalError::Large(what.to_string()))?;
        Ok(())
    }

    /// Pays for what is looked through.
    pub fn read(&mut self, bytes: usize) -> Result<(), EvalError> {
        self.read = self.read.checked_sub(bytes).ok_or(EvalError::Long)?;
        Ok(())
    }

    /// The next expression may make as much again; what is read counts on.
    pub fn renew(&mut self) -> &mut Self {
        self.made = RESULT_BYTES_MAX;
        self
    }
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
                Segment::Name(name) if is_name(name) => write!(f, ".{name}")?,
                Segment::Name(name) => write!(f, "['{name}']")?,
                Segment::Index(index) => write!(f, "[{index}]")?,
            }
        }
        Ok(())
    }
}

fn is_name(text: &str) -> bool {
    !text.is_empty() && text.chars().all(|c| c.is_ascii_alphanumeric() || c == '_' || c == '-')
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

/// A parsed expression.
#[derive(Debug, Clone, PartialEq)]
pub enum Expr {
    /// As written.
    Literal(Value),
    /// `[a, b]`
    List(Vec<Expr>),
    /// To be looked up.
    Path(Reference),
    /// `a[b]`, where `b` is no literal, or `a` no path.
    Index(Box<Expr>, Box<Expr>),
    /// `not a`
    Not(Box<Expr>),
    /// `-a`
    Negative(Box<Expr>),
    /// `a op b`
    Binary(Op, Box<Expr>, Box<Expr>),
    /// `name(a, b)`
    Call(functions::Function, Vec<Expr>),
}

/// What stands between two parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[expect(missing_docs, reason = "named like what they are")]
pub enum Op {
    Or,
    And,
    Equal,
    Unequal,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    Else,
    Add,
    Subtract,
    Multiply,
    Divide,
    Remainder,
}

/// Why an expression gives no value.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EvalError {
    /// A reference to what is not there.
    #[error("`{0}` is not defined")]
    Undefined(String),
    /// Something that cannot be done with these values.
    #[error("{0}")]
    Type(String),
    /// More than [`READ_BYTES_MAX`].
    #[error("it reads more than {READ_BYTES_MAX} bytes; compare or count less at once")]
    Long,
    /// More than [`RESULT_BYTES_MAX`].
    #[error("`{0}` makes it larger than {RESULT_BYTES_MAX} bytes; pass less on, or a file")]
    Large(String),
}

impl Expr {
    /// Its value, within a budget.
    pub fn eval<'a>(&'a self, scope: &'a impl Scope, budget: &mut Budget) -> Result<Cow<'a, Value>, EvalError> {
        eval::eval(self, scope, budget)
    }

    /// Whether it holds, as a condition.
    pub fn holds(&self, scope: &impl Scope, budget: &mut Budget) -> Result<bool, EvalError> {
        self.eval(scope, budget).map(|value| is_true(&value))
    }

    /// Whether it is a secret, and nothing else.
    pub fn is_secret(&self) -> bool {
        matches!(self, Self::Path(reference) if reference.name(0) == Some("secrets"))
    }

    /// Whether a text that stands in it as such looks like a template.
    pub fn quotes_a_template(&self) -> bool {
        match self {
            Self::Literal(Value::String(text)) => text.contains("${") || text.contains("{{"),
            Self::Literal(_) | Self::Path(_) => false,
            Self::List(items) | Self::Call(_, items) => items.iter().any(Self::quotes_a_template),
            Self::Not(inner) | Self::Negative(inner) => inner.quotes_a_template(),
            Self::Index(a, b) | Self::Binary(_, a, b) => a.quotes_a_template() || b.quotes_a_template(),
        }
    }

    /// Every path inside.
    pub fn references(&self) -> Vec<&Reference> {
        self.uses().into_iter().map(|(reference, _)| reference).collect()
    }

    /// The same, and whether each may be of what is not there.
    pub fn uses(&self) -> Vec<(&Reference, bool)> {
        let mut found = Vec::new();
        self.collect(false, &mut found);
        found
    }

    fn collect<'a>(&'a self, optional: bool, found: &mut Vec<(&'a Reference, bool)>) {
        match self {
            Self::Literal(_) => {}
            Self::Path(reference) => found.push((reference, optional)),
            Self::Call(functions::Function::Defined | functions::Function::Default, items) => {
                items.iter().for_each(|item| item.collect(true, found));
            }
            Self::List(items) | Self::Call(_, items) => items.iter().for_each(|item| item.collect(optional, found)),
            Self::Not(inner) | Self::Negative(inner) => inner.collect(optional, found),
            Self::Binary(Op::Else, a, b) => {
                a.collect(true, found);
                b.collect(optional, found);
            }
            Self::Index(a, b) | Self::Binary(_, a, b) => {
                a.collect(optional, found);
                b.collect(optional, found);
            }
        }
    }
}

/// Whether a value counts as true.
pub fn is_true(value: &Value) -> bool {
    match value {
        Value::Null => false,
        Value::Bool(b) => *b,
        Value::Number(n) => n.as_f64() != Some(0.0),
        Value::String(s) => !s.is_empty(),
        Value::Array(items) => !items.is_empty(),
        Value::Object(map) => !map.is_empty(),
    }
}

/// A value's type, in words.
pub fn kind_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "text",
        Value::Array(_) => "a list",
        Value::Object(_) => "a map",
    }
}

#[cfg(test)]
mod tests;
