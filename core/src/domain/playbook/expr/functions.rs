//! The functions of the language: each total, each bounded by what it is given.

use std::borrow::Cow;

use serde_json::{Number, Value};

use super::{EvalError, eval, kind_of};
use crate::domain::storable;

macro_rules! functions {
    ($($(#[$doc:meta])* $variant:ident $name:literal $least:literal..=$most:literal $usage:literal,)+) => {
        /// A function.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Function { $($(#[$doc])* $variant,)+ }

        impl Function {
            /// All of them.
            pub const ALL: &[Self] = &[$(Self::$variant,)+];

            /// Its name.
            pub fn name(self) -> &'static str {
                match self { $(Self::$variant => $name,)+ }
            }

            /// How many arguments it takes, at least and at most.
            pub fn arity(self) -> (usize, usize) {
                match self { $(Self::$variant => ($least, $most),)+ }
            }

            /// How it is written.
            pub fn usage(self) -> &'static str {
                match self { $(Self::$variant => $usage,)+ }
            }
        }
    };
}

functions! {
    /// Whether there is such a value.
    Defined "defined" 1..=1 "defined(x)",
    /// The value, or another where it is missing or null.
    Default "default" 2..=2 "default(x, other)",
    /// How many characters, items or keys.
    Len "len" 1..=1 "len(x)",
    /// Whether a text, list or map holds something.
    Contains "contains" 2..=2 "contains(x, part)",
    /// Whether a text begins with another.
    StartsWith "starts_with" 2..=2 "starts_with(text, part)",
    /// Whether a text ends with another.
    EndsWith "ends_with" 2..=2 "ends_with(text, part)",
    /// In small letters.
    Lower "lower" 1..=1 "lower(text)",
    /// In capital letters.
    Upper "upper" 1..=1 "upper(text)",
    /// Without spaces at both ends.
    Trim "trim" 1..=1 "trim(text)",
    /// Every occurrence replaced.
    Replace "replace" 3..=3 "replace(text, old, new)",
    /// A text taken apart.
    Split "split" 2..=2 "split(text, separator)",
    /// A list of texts and numbers as one text.
    Join "join" 1..=2 "join(list, separator)",
    /// The first item.
    First "first" 1..=1 "first(list)",
    /// The last item.
    Last "last" 1..=1 "last(list)",
    /// A part of a list or a text, from one place to before another.
    Slice "slice" 2..=3 "slice(x, from, to)",
    /// A map's keys.
    Keys "keys" 1..=1 "keys(map)",
    /// A map's values.
    Values "values" 1..=1 "values(map)",
    /// The field of each item.
    Pluck "pluck" 2..=2 "pluck(list, name)",
    /// The sum of a list of numbers.
    Sum "sum" 1..=1 "sum(list)",
    /// The least of a list, or of two.
    Min "min" 1..=2 "min(a, b)",
    /// The greatest of a list, or of two.
    Max "max" 1..=2 "max(a, b)",
    /// To so many places behind the point.
    Round "round" 1..=2 "round(number, places)",
    /// As text.
    Text "text" 1..=1 "text(x)",
    /// As a number.
    Number "number" 1..=1 "number(x)",
    /// As JSON.
    Json "json" 1..=1 "json(x)",
    /// Out of JSON.
    FromJson "from_json" 1..=1 "from_json(text)",
}

impl Function {
    /// From its name.
    pub fn from_name(name: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|function| function.name() == name)
    }
}

type Result<T> = std::result::Result<T, EvalError>;

fn wrong<T>(function: Function, value: &Value, wanted: &str) -> Result<T> {
    Err(EvalError::Type(format!("{} takes {wanted}, not {}", function.usage(), kind_of(value))))
}

/// Applies a function to as many values as it takes.
pub(super) fn apply(function: Function, values: &[Cow<'_, Value>]) -> Result<Value> {
    let value = |at: usize| -> &Value { values.get(at).map_or(&Value::Null, |value| &**value) };
    let text = |at: usize| match value(at) {
        Value::String(text) => Ok(text.as_str()),
        other => wrong(function, other, "text"),
    };
    let list = |at: usize| match value(at) {
        Value::Array(items) => Ok(items.as_slice()),
        other => wrong(function, other, "a list"),
    };
    let map = |at: usize| match value(at) {
        Value::Object(map) => Ok(map),
        other => wrong(function, other, "a map"),
    };
    Ok(match function {
        // Taken apart before, since their argument may be missing.
        Function::Defined => Value::Bool(true),
        Function::Default => value(0).clone(),
        Function::Len => Value::from(match value(0) {
            Value::String(text) => text.chars().count(),
            Value::Array(items) => items.len(),
            Value::Object(map) => map.len(),
            other => return wrong(function, other, "text, a list or a map"),
        }),
        Function::Contains => Value::Bool(contains(value(0), value(1))?),
        Function::StartsWith => Value::Bool(text(0)?.starts_with(text(1)?)),
        Function::EndsWith => Value::Bool(text(0)?.ends_with(text(1)?)),
        Function::Lower => Value::String(text(0)?.to_lowercase()),
        Function::Upper => Value::String(text(0)?.to_uppercase()),
        Function::Trim => Value::String(text(0)?.trim().to_owned()),
        Function::Replace => Value::String(replaced(text(0)?, text(1)?, text(2)?)?),
        Function::Split if text(1)?.is_empty() => {
            return Err(EvalError::Type("split(text, separator) needs a separator".into()));
        }
        Function::Split => text(0)?.split(text(1)?).map(Value::from).collect(),
        Function::Join => {
            let separator = if values.len() == 2 { text(1)? } else { ", " };
            Value::String(join(list(0)?, separator)?)
        }
        Function::First => list(0)?.first().cloned().ok_or_else(|| EvalError::Undefined("first item".into()))?,
        Function::Last => list(0)?.last().cloned().ok_or_else(|| EvalError::Undefined("last item".into()))?,
        Function::Slice => slice(value(0), value(1), values.get(2).map(|to| &**to))?,
        Function::Keys => map(0)?.keys().map(|name| Value::from(name.as_str())).collect(),
        Function::Values => map(0)?.values().cloned().collect(),
        Function::Pluck => {
            let name = text(1)?;
            let field = |item: &Value| item.get(name).cloned().unwrap_or(Value::Null);
            list(0)?.iter().map(field).collect()
        }
        Function::Sum => list(0)?.iter().try_fold(Value::from(0), |sum, item| eval::arithmetic_add(&sum, item))?,
        Function::Min | Function::Max => {
            let of_two;
            let items = if values.len() == 1 {
                list(0)?
            } else {
                of_two = [value(0).clone(), value(1).clone()];
                &of_two[..]
            };
            extreme(items, function == Function::Max)?
        }
        Function::Round => round(value(0), value(1))?,
        Function::Text => Value::String(written(value(0))),
        Function::Number => number(value(0))?,
        Function::Json => Value::String(value(0).to_string()),
        Function::FromJson => {
            let value: Value = serde_json::from_str(text(0)?)
                .map_err(|error| EvalError::Type(format!("the text is no JSON: {error}")))?;
            // The one way by which a NUL could come into being.
            storable::to_json(&value, usize::MAX).map_err(|error| EvalError::Type(format!("the JSON {error}")))?;
            value
        }
    })
}

/// A value as it is written into a text.
pub fn written(value: &Value) -> String {
    match value {
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// Whether a value holds another.
pub(super) fn contains(whole: &Value, part: &Value) -> Result<bool> {
    match (whole, part) {
        (Value::String(whole), Value::String(part)) => Ok(whole.contains(part.as_str())),
        (Value::Array(items), part) => Ok(items.iter().any(|item| eval::equal(item, part))),
        (Value::Object(map), Value::String(name)) => Ok(map.contains_key(name)),
        (Value::Null, _) => Ok(false),
        _ => Err(EvalError::Type(format!("{} holds no {}", kind_of(whole), kind_of(part).trim_start_matches("a ")))),
    }
}

/// How long a text may become before its size is even known to the budget.
fn replaced(text: &str, old: &str, new: &str) -> Result<String> {
    if old.is_empty() {
        return Err(EvalError::Type("replace(text, old, new) needs something to replace".into()));
    }
    let bytes = text.len() + text.matches(old).count() * new.len();
    if bytes > super::RESULT_BYTES_MAX {
        return Err(EvalError::Large("replace".into()));
    }
    Ok(text.replace(old, new))
}

fn join(items: &[Value], separator: &str) -> Result<String> {
    let mut out = String::new();
    for (at, item) in items.iter().enumerate() {
        if at > 0 {
            out.push_str(separator);
        }
        out.push_str(&written(item));
        if out.len() > super::RESULT_BYTES_MAX {
            return Err(EvalError::Large("join".into()));
        }
    }
    Ok(out)
}

fn slice(whole: &Value, from: &Value, to: Option<&Value>) -> Result<Value> {
    let place = |value: &Value, length: usize| match value.as_i64() {
        // From the end.
        Some(n) if n < 0 => Ok(length.saturating_sub(usize::try_from(n.unsigned_abs()).unwrap_or(usize::MAX))),
        Some(n) => Ok(usize::try_from(n).unwrap_or(usize::MAX).min(length)),
        None => wrong(Function::Slice, value, "whole numbers"),
    };
    let bounds = |length: usize| -> Result<(usize, usize)> {
        let from = place(from, length)?;
        let to = to.map_or(Ok(length), |to| place(to, length))?;
        Ok((from, to.max(from)))
    };
    match whole {
        Value::Array(items) => {
            let (from, to) = bounds(items.len())?;
            Ok(Value::Array(items[from..to].to_vec()))
        }
        Value::String(text) => {
            let (from, to) = bounds(text.chars().count())?;
            Ok(Value::String(text.chars().skip(from).take(to - from).collect()))
        }
        other => wrong(Function::Slice, other, "a list or text"),
    }
}

fn extreme(items: &[Value], greatest: bool) -> Result<Value> {
    let mut best = items.first().ok_or_else(|| EvalError::Undefined("item of an empty list".into()))?;
    for item in &items[1..] {
        let order = eval::compare(item, best)?;
        if if greatest { order.is_gt() } else { order.is_lt() } {
            best = item;
        }
    }
    // Of one item alone, too, only what has an order.
    eval::compare(best, best)?;
    Ok(best.clone())
}

fn round(value: &Value, places: &Value) -> Result<Value> {
    let places = match places {
        Value::Null => 0,
        other => other
            .as_i64()
            .filter(|n| (0..=15).contains(n))
            .ok_or_else(|| EvalError::Type("round(number, places) takes 0 to 15 places".into()))?,
    };
    let Value::Number(n) = value else { return wrong(Function::Round, value, "a number") };
    if !n.is_f64() {
        return Ok(value.clone());
    }
    let scale = 10f64.powi(i32::try_from(places).unwrap_or(0));
    let rounded = (n.as_f64().unwrap_or(0.0) * scale).round() / scale;
    if places == 0 && rounded.abs() < 9e15 {
        #[expect(clippy::cast_possible_truncation, reason = "whole, and below 2^53")]
        return Ok(Value::from(rounded as i64));
    }
    Ok(Number::from_f64(rounded).map_or_else(|| value.clone(), Value::Number))
}

fn number(value: &Value) -> Result<Value> {
    match value {
        Value::Number(_) => Ok(value.clone()),
        Value::Bool(b) => Ok(Value::from(u8::from(*b))),
        Value::String(text) => serde_json::from_str::<Number>(text.trim())
            .map(Value::Number)
            .map_err(|_| EvalError::Type("the text is no number".into())),
        other => wrong(Function::Number, other, "text or a number"),
    }
}
