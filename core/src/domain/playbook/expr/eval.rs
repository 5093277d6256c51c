//! What an expression says, in the eyes of a scope.

use std::borrow::Cow;
use std::cmp::Ordering;

use serde_json::{Number, Value};

use super::functions::{self, Function};
use super::{Budget, EvalError, Expr, Op, Reference, Scope, Segment, is_true, kind_of};
use crate::domain::storable::size_of;

type Result<T> = std::result::Result<T, EvalError>;

/// The recursion is as deep as the parser allows.
pub(super) fn eval<'a>(expr: &'a Expr, scope: &'a impl Scope, budget: &mut Budget) -> Result<Cow<'a, Value>> {
    match expr {
        Expr::Literal(value) => Ok(Cow::Borrowed(value)),
        Expr::Path(reference) => resolve(reference, scope).map(Cow::Borrowed),
        Expr::List(items) => {
            let items = items.iter().map(|item| {
                let item = eval(item, scope, budget)?;
                // Before it is copied, or a few names of one large value fill the
                // memory.
                budget.make(size_of(&item), "[…]")?;
                Ok(item.into_owned())
            });
            Ok(Cow::Owned(Value::Array(items.collect::<Result<_>>()?)))
        }
        Expr::Index(value, index) => {
            let value = eval(value, scope, budget)?;
            let index = eval(index, scope, budget)?;
            subscript(value, &index)
        }
        Expr::Not(inner) => Ok(Cow::Owned(Value::Bool(!is_true(&*eval(inner, scope, budget)?)))),
        Expr::Negative(inner) => {
            let value = eval(inner, scope, budget)?;
            arithmetic(Op::Subtract, &Value::from(0), &value).map(Cow::Owned)
        }
        Expr::Binary(op, a, b) => binary(*op, a, b, scope, budget),
        Expr::Call(function, arguments) => call(*function, arguments, scope, budget),
    }
}

fn binary<'a>(op: Op, a: &'a Expr, b: &'a Expr, scope: &'a impl Scope, budget: &mut Budget) -> Result<Cow<'a, Value>> {
    let decided = match op {
        Op::Or => is_true(&*eval(a, scope, budget)?) || is_true(&*eval(b, scope, budget)?),
        Op::And => is_true(&*eval(a, scope, budget)?) && is_true(&*eval(b, scope, budget)?),
        Op::Else => {
            return match optional(a, scope, budget)? {
                Some(value) if !value.is_null() => Ok(value),
                _ => eval(b, scope, budget),
            };
        }
        _ => {
            let a = eval(a, scope, budget)?;
            let b = eval(b, scope, budget)?;
            budget.read(size_of(&a) + size_of(&b))?;
            match op {
                Op::Equal => equal(&a, &b),
                Op::Unequal => !equal(&a, &b),
                Op::In => functions::contains(&b, &a)?,
                Op::Less | Op::LessOrEqual | Op::Greater | Op::GreaterOrEqual => {
                    let order = compare(&a, &b)?;
                    match op {
                        Op::Less => order.is_lt(),
                        Op::LessOrEqual => order.is_le(),
                        Op::Greater => order.is_gt(),
                        _ => order.is_ge(),
                    }
                }
                Op::Add if !a.is_number() || !b.is_number() => {
                    budget.make(size_of(&a) + size_of(&b), "+")?;
                    return joined(&a, &b).map(Cow::Owned);
                }
                _ => return arithmetic(op, &a, &b).map(Cow::Owned),
            }
        }
    };
    Ok(Cow::Owned(Value::Bool(decided)))
}

/// A value that may be missing.
fn optional<'a>(expr: &'a Expr, scope: &'a impl Scope, budget: &mut Budget) -> Result<Option<Cow<'a, Value>>> {
    match eval(expr, scope, budget) {
        Ok(value) => Ok(Some(value)),
        Err(EvalError::Undefined(_)) => Ok(None),
        Err(error) => Err(error),
    }
}

fn call<'a>(
    function: Function,
    arguments: &'a [Expr],
    scope: &'a impl Scope,
    budget: &mut Budget,
) -> Result<Cow<'a, Value>> {
    match (function, arguments) {
        (Function::Defined, [value]) => Ok(Cow::Owned(Value::Bool(optional(value, scope, budget)?.is_some()))),
        (Function::Default, [value, other]) => match optional(value, scope, budget)? {
            Some(value) if !value.is_null() => Ok(value),
            _ => eval(other, scope, budget),
        },
        _ => {
            let values = arguments.iter().map(|argument| eval(argument, scope, budget)).collect::<Result<Vec<_>>>()?;
            for value in &values {
                budget.read(size_of(value))?;
            }
            owned(functions::apply(function, &values)?, budget, function.name())
        }
    }
}

/// A value that was made here, paid for.
fn owned<'a>(value: Value, budget: &mut Budget, what: &str) -> Result<Cow<'a, Value>> {
    budget.make(size_of(&value), what)?;
    Ok(Cow::Owned(value))
}

fn resolve<'a>(reference: &Reference, scope: &'a impl Scope) -> Result<&'a Value> {
    let undefined = || EvalError::Undefined(reference.to_string());
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

fn subscript<'a>(value: Cow<'a, Value>, index: &Value) -> Result<Cow<'a, Value>> {
    fn at<'v>(value: &'v Value, index: &Value) -> Option<&'v Value> {
        match (value, index) {
            (Value::Array(items), Value::Number(n)) => items.get(usize::try_from(n.as_u64()?).ok()?),
            (Value::Object(map), Value::String(name)) => map.get(name),
            _ => None,
        }
    }
    let undefined = || EvalError::Undefined(format!("[{index}]"));
    match value {
        Cow::Borrowed(value) => at(value, index).map(Cow::Borrowed).ok_or_else(undefined),
        Cow::Owned(value) => at(&value, index).cloned().map(Cow::Owned).ok_or_else(undefined),
    }
}

/// Whether two values are the same, numbers by what they are worth.
pub(super) fn equal(a: &Value, b: &Value) -> bool {
    match (a, b) {
        (Value::Number(x), Value::Number(y)) => order(x, y) == Some(Ordering::Equal),
        (Value::Array(x), Value::Array(y)) => x.len() == y.len() && x.iter().zip(y).all(|(x, y)| equal(x, y)),
        (Value::Object(x), Value::Object(y)) => {
            x.len() == y.len() && x.iter().all(|(name, x)| y.get(name).is_some_and(|y| equal(x, y)))
        }
        _ => a == b,
    }
}

fn order(a: &Number, b: &Number) -> Option<Ordering> {
    match (whole(a), whole(b)) {
        (Some(a), Some(b)) => Some(a.cmp(&b)),
        _ => a.as_f64()?.partial_cmp(&b.as_f64()?),
    }
}

fn whole(n: &Number) -> Option<i128> {
    n.as_i64().map(i128::from).or_else(|| n.as_u64().map(i128::from))
}

pub(super) fn compare(a: &Value, b: &Value) -> Result<Ordering> {
    let order = match (a, b) {
        (Value::Number(a), Value::Number(b)) => order(a, b),
        (Value::String(a), Value::String(b)) => Some(a.cmp(b)),
        _ => None,
    };
    order.ok_or_else(|| EvalError::Type(format!("{} cannot be compared with {}", kind_of(a), kind_of(b))))
}

/// `+` of what are no numbers: texts and lists are joined.
fn joined(a: &Value, b: &Value) -> Result<Value> {
    match (a, b) {
        (Value::String(a), Value::String(b)) => Ok(Value::String(format!("{a}{b}"))),
        (Value::Array(a), Value::Array(b)) => Ok(Value::Array(a.iter().chain(b).cloned().collect())),
        (Value::String(_), _) | (_, Value::String(_)) => Err(EvalError::Type(format!(
            "{} and {} cannot be added; write it into the text by ${{…}}, or use text(x)",
            kind_of(a),
            kind_of(b)
        ))),
        _ => Err(EvalError::Type(format!("{} and {} cannot be added", kind_of(a), kind_of(b)))),
    }
}

/// The sum of two numbers.
pub(super) fn arithmetic_add(a: &Value, b: &Value) -> Result<Value> {
    arithmetic(Op::Add, a, b)
}

fn arithmetic(op: Op, a: &Value, b: &Value) -> Result<Value> {
    let (Value::Number(x), Value::Number(y)) = (a, b) else {
        let found = if a.is_number() { kind_of(b) } else { kind_of(a) };
        return Err(EvalError::Type(format!("cannot calculate with {found}")));
    };
    if matches!(op, Op::Divide | Op::Remainder) && y.as_f64() == Some(0.0) {
        return Err(EvalError::Type("division by zero".into()));
    }
    if let (Some(x), Some(y)) = (whole(x), whole(y)) {
        let exact = match op {
            Op::Add => Some(x + y),
            Op::Subtract => Some(x - y),
            // Of 65 bits each: the only one that may leave 128.
            Op::Multiply => Some(x.saturating_mul(y)),
            Op::Remainder => Some(x % y),
            _ => (x % y == 0).then(|| x / y),
        };
        if let Some(exact) = exact {
            return i64::try_from(exact)
                .map(Value::from)
                .or_else(|_| u64::try_from(exact).map(Value::from))
                .map_err(|_| EvalError::Type("the number is too large".into()));
        }
    }
    let (x, y) = (x.as_f64().unwrap_or(f64::NAN), y.as_f64().unwrap_or(f64::NAN));
    let value = match op {
        Op::Add => x + y,
        Op::Subtract => x - y,
        Op::Multiply => x * y,
        Op::Remainder => x % y,
        _ => x / y,
    };
    Number::from_f64(value).map(Value::Number).ok_or_else(|| EvalError::Type("the number is too large".into()))
}
