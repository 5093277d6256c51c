//! From text to an [`Expr`], by precedence; nesting and size are bounded while
//! reading, so that no text can exhaust the stack.

use serde_json::{Number, Value};

use super::functions::Function;
use super::{DEPTH_MAX, Expr, NODES_MAX, Op, Reference, Segment, TREE_DEPTH_MAX};
use crate::domain::playbook::problem::did_you_mean;

/// Reads a whole text as one expression, with or without `${…}` around it. The
/// error is a sentence.
pub fn parse(text: &str) -> Result<Expr, String> {
    let inner = text.trim();
    // A condition may be written as a template of one expression.
    for (open, close) in [("${", "}"), ("{{", "}}")] {
        if let Some(body) = inner.strip_prefix(open)
            && let Ok((expr, used)) = parse_prefix(body, close)
            && body.len() == used + close.len()
        {
            return Ok(expr);
        }
    }
    let mut parser = Parser::new(inner);
    let expr = parser.expression(0)?;
    parser.spaces();
    if parser.rest.is_empty() { shallow(expr) } else { Err(parser.unexpected()) }
}

/// A chain such as `a + b + c` nests, too: what is evaluated later by recursion
/// must fit the stack of every thread.
fn shallow(expr: Expr) -> Result<Expr, String> {
    if depth(&expr) > TREE_DEPTH_MAX {
        return Err(format!("the expression has a chain of more than {TREE_DEPTH_MAX} parts"));
    }
    Ok(expr)
}

fn depth(expr: &Expr) -> usize {
    1 + match expr {
        Expr::Literal(_) | Expr::Path(_) => 0,
        Expr::Not(inner) | Expr::Negative(inner) => depth(inner),
        Expr::Index(a, b) | Expr::Binary(_, a, b) => depth(a).max(depth(b)),
        Expr::List(items) | Expr::Call(_, items) => items.iter().map(depth).max().unwrap_or(0),
    }
}

/// Reads the expression that a text begins with, up to `close`; says how many
/// bytes it took, `close` not counted.
pub(in crate::domain::playbook) fn parse_prefix(text: &str, close: &str) -> Result<(Expr, usize), String> {
    let mut parser = Parser::new(text);
    if text.trim_start().starts_with(close) {
        return Err("there is nothing between the braces; write a path such as inputs.topic".into());
    }
    let expr = parser.expression(0)?;
    parser.spaces();
    if !parser.rest.starts_with(close) {
        return Err(match parser.rest {
            "" => format!("`{}` has no closing `{close}`", excerpt(text)),
            _ => parser.unexpected(),
        });
    }
    Ok((shallow(expr)?, text.len() - parser.rest.len()))
}

/// Reads a path and nothing else.
pub fn parse_reference(text: &str) -> Result<Reference, String> {
    match parse(text)? {
        Expr::Path(reference) => Ok(reference),
        _ => Err(format!("`{}` is no path such as steps.draft.output", excerpt(text))),
    }
}

fn excerpt(text: &str) -> String {
    let mut short: String = text.chars().take(40).collect();
    if short.len() < text.len() {
        short.push('…');
    }
    short
}

struct Parser<'a> {
    whole: &'a str,
    rest: &'a str,
    nodes: usize,
}

/// What binds how strongly, from the weakest; `not` stands between `and` and
/// the comparisons.
const OPERATORS: &[(u8, &str, Op)] = &[
    (1, "or", Op::Or),
    (1, "||", Op::Or),
    (2, "and", Op::And),
    (2, "&&", Op::And),
    (4, "==", Op::Equal),
    (4, "!=", Op::Unequal),
    (4, "<=", Op::LessOrEqual),
    (4, ">=", Op::GreaterOrEqual),
    (4, "<", Op::Less),
    (4, ">", Op::Greater),
    (4, "in", Op::In),
    (5, "??", Op::Else),
    (6, "+", Op::Add),
    (6, "-", Op::Subtract),
    (7, "*", Op::Multiply),
    (7, "/", Op::Divide),
    (7, "%", Op::Remainder),
];
const NOT: u8 = 3;
const COMPARISON: u8 = 4;
const NEGATIVE: u8 = 8;

fn is_name_char(c: char) -> bool {
    c.is_ascii_alphanumeric() || c == '_'
}

impl<'a> Parser<'a> {
    fn new(text: &'a str) -> Self {
        Self { whole: text, rest: text, nodes: 0 }
    }

    fn spaces(&mut self) {
        self.rest = self.rest.trim_start();
    }

    fn unexpected(&self) -> String {
        match self.rest.chars().next() {
            None => format!("`{}` ends too early", excerpt(self.whole)),
            Some('=') => "`=` compares nothing; write `==`".to_owned(),
            Some(_) => format!("unexpected `{}` in `{}`", excerpt(self.rest), excerpt(self.whole)),
        }
    }

    /// One more part of the expression.
    fn node(&mut self, expr: Expr) -> Result<Expr, String> {
        self.nodes += 1;
        if self.nodes > NODES_MAX {
            return Err(format!("the expression has more than {NODES_MAX} parts"));
        }
        Ok(expr)
    }

    fn take(&mut self, token: &str) -> bool {
        self.spaces();
        match self.rest.strip_prefix(token) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    /// A word of the language, which must not be the beginning of a name.
    fn take_word(&mut self, word: &str) -> bool {
        self.spaces();
        let Some(rest) = self.rest.strip_prefix(word) else { return false };
        if rest.starts_with(|c| is_name_char(c) || c == '-') {
            return false;
        }
        self.rest = rest;
        true
    }

    fn expect(&mut self, token: &str) -> Result<(), String> {
        if self.take(token) { Ok(()) } else { Err(self.unexpected()) }
    }

    fn expression(&mut self, depth: usize) -> Result<Expr, String> {
        self.binary(0, depth)
    }

    fn operator(&mut self, weakest: u8) -> Option<(u8, Op)> {
        self.spaces();
        let &(strength, text, op) = OPERATORS.iter().find(|(strength, text, _)| {
            let Some(rest) = self.rest.strip_prefix(text) else { return false };
            let word = text.starts_with(char::is_alphabetic);
            *strength >= weakest && !(word && rest.starts_with(|c| is_name_char(c) || c == '-'))
        })?;
        self.rest = &self.rest[text.len()..];
        Some((strength, op))
    }

    fn binary(&mut self, weakest: u8, depth: usize) -> Result<Expr, String> {
        if depth > DEPTH_MAX {
            return Err(format!("the expression is nested deeper than {DEPTH_MAX} levels"));
        }
        let mut left = self.unary(weakest, depth)?;
        let mut compared = false;
        while let Some((strength, op)) = self.operator(weakest) {
            if strength == COMPARISON && std::mem::replace(&mut compared, true) {
                return Err("comparisons do not chain; join them by `and`".into());
            }
            let right = self.binary(strength + 1, depth + 1)?;
            left = self.node(Expr::Binary(op, Box::new(left), Box::new(right)))?;
        }
        Ok(left)
    }

    fn unary(&mut self, weakest: u8, depth: usize) -> Result<Expr, String> {
        self.spaces();
        let not = self.take_word("not") || (!self.rest.starts_with("!=") && self.take("!"));
        if not {
            if weakest > NOT {
                // `a == not b` reads oddly, and `-not a` not at all.
                return Err("put `not` in front of the comparison, or in parentheses".into());
            }
            let inner = self.binary(NOT, depth + 1)?;
            return self.node(Expr::Not(Box::new(inner)));
        }
        if self.rest.starts_with('-') && !self.rest[1..].starts_with(|c: char| c.is_ascii_digit()) {
            self.rest = &self.rest[1..];
            let inner = self.binary(NEGATIVE, depth + 1)?;
            return self.node(Expr::Negative(Box::new(inner)));
        }
        let value = self.primary(depth)?;
        self.filters(value, depth)
    }

    /// `x | f`, `x | f(y)`.
    fn filters(&mut self, mut value: Expr, depth: usize) -> Result<Expr, String> {
        loop {
            self.spaces();
            if !self.rest.starts_with('|') || self.rest.starts_with("||") {
                return Ok(value);
            }
            self.rest = &self.rest[1..];
            self.spaces();
            let name = self.name()?;
            let mut arguments = vec![value];
            if self.take("(") {
                arguments.extend(self.list(")", depth)?);
            }
            value = self.call(name, arguments)?;
        }
    }

    fn name(&mut self) -> Result<&'a str, String> {
        let end = self.rest.find(|c| !is_name_char(c)).unwrap_or(self.rest.len());
        if end == 0 {
            return Err(self.unexpected());
        }
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        Ok(name)
    }

    fn call(&mut self, name: &str, arguments: Vec<Expr>) -> Result<Expr, String> {
        let function = Function::from_name(name).ok_or_else(|| {
            let known = Function::ALL.iter().map(|function| function.name());
            let near = did_you_mean(name, known.clone())
                .unwrap_or_else(|| format!("the functions are {}", known.collect::<Vec<_>>().join(", ")));
            format!("there is no function `{name}`; {near}")
        })?;
        let (least, most) = function.arity();
        if !(least..=most).contains(&arguments.len()) {
            return Err(format!("`{name}` is written {}", function.usage()));
        }
        self.node(Expr::Call(function, arguments))
    }

    /// Expressions parted by commas, up to `close`, which is taken too.
    fn list(&mut self, close: &str, depth: usize) -> Result<Vec<Expr>, String> {
        let mut items = Vec::new();
        if self.take(close) {
            return Ok(items);
        }
        loop {
            items.push(self.expression(depth + 1)?);
            if self.take(close) {
                return Ok(items);
            }
            self.expect(",")?;
        }
    }

    fn primary(&mut self, depth: usize) -> Result<Expr, String> {
        self.spaces();
        let Some(first) = self.rest.chars().next() else { return Err(self.unexpected()) };
        let value = match first {
            '(' => {
                self.rest = &self.rest[1..];
                let inner = self.expression(depth + 1)?;
                self.expect(")")?;
                inner
            }
            '[' => {
                self.rest = &self.rest[1..];
                let items = self.list("]", depth)?;
                self.node(Expr::List(items))?
            }
            '\'' | '"' => {
                let text = self.text(first)?;
                self.node(Expr::Literal(Value::String(text)))?
            }
            '-' | '0'..='9' => {
                let number = self.number()?;
                self.node(Expr::Literal(Value::Number(number)))?
            }
            '$' if self.rest.starts_with("${") => {
                self.rest = &self.rest[2..];
                let inner = self.expression(depth + 1)?;
                self.expect("}")?;
                inner
            }
            c if c.is_ascii_alphabetic() || c == '_' => return self.word(depth),
            _ => return Err(self.unexpected()),
        };
        self.subscripts(value, depth)
    }

    /// A path, a call, or one of the three words that are values.
    fn word(&mut self, depth: usize) -> Result<Expr, String> {
        for (word, value) in [("null", Value::Null), ("true", true.into()), ("false", false.into())] {
            if self.take_word(word) {
                return self.node(Expr::Literal(value));
            }
        }
        let name = self.path_name()?;
        if self.rest.starts_with('(') {
            self.rest = &self.rest[1..];
            let arguments = self.list(")", depth)?;
            let call = self.call(name, arguments)?;
            return self.subscripts(call, depth);
        }
        let path = self.node(Expr::Path(Reference(vec![Segment::Name(name.to_owned())])))?;
        self.subscripts(path, depth)
    }

    /// A name in a path: with `-` inside, which a minus therefore needs a space
    /// in front of.
    fn path_name(&mut self) -> Result<&'a str, String> {
        let mut end = 0;
        for (at, c) in self.rest.char_indices() {
            let joins = c == '-' && at > 0 && self.rest[at + 1..].starts_with(is_name_char);
            if !is_name_char(c) && !joins {
                break;
            }
            end = at + c.len_utf8();
        }
        if end == 0 {
            return Err(self.unexpected());
        }
        let (name, rest) = self.rest.split_at(end);
        self.rest = rest;
        Ok(name)
    }

    /// `.name`, `[0]`, `['name']`, `[expression]`.
    fn subscripts(&mut self, mut value: Expr, depth: usize) -> Result<Expr, String> {
        let mut levels = depth;
        loop {
            levels += 1;
            let inner = if let Some(rest) = self.rest.strip_prefix('.') {
                self.rest = rest;
                let name = self.path_name()?;
                Expr::Literal(Value::String(name.to_owned()))
            } else if let Some(rest) = self.rest.strip_prefix('[') {
                self.rest = rest;
                let inner = self.expression(depth + 1)?;
                self.expect("]")?;
                inner
            } else {
                return Ok(value);
            };
            value = match (value, inner) {
                (Expr::Path(mut path), Expr::Literal(Value::String(name))) => {
                    path.0.push(Segment::Name(name));
                    Expr::Path(path)
                }
                (Expr::Path(mut path), Expr::Literal(Value::Number(n))) if n.as_u64().is_some() => {
                    path.0.push(Segment::Index(n.as_u64().and_then(|n| usize::try_from(n).ok()).unwrap_or(usize::MAX)));
                    Expr::Path(path)
                }
                (value, inner) if levels <= DEPTH_MAX => Expr::Index(Box::new(value), Box::new(inner)),
                _ => return Err(format!("the expression is nested deeper than {DEPTH_MAX} levels")),
            };
            // A long path counts by its length.
            value = self.node(value)?;
        }
    }

    fn number(&mut self) -> Result<Number, String> {
        let body = |c: char| c.is_ascii_alphanumeric() || c == '.' || c == '_';
        let digits = self.rest.strip_prefix('-').unwrap_or(self.rest);
        let mut end = self.rest.len() - digits.len();
        let mut previous = ' ';
        for c in digits.chars() {
            // `1e-5`
            let sign = matches!(c, '-' | '+') && matches!(previous, 'e' | 'E');
            if !body(c) && !sign {
                break;
            }
            end += c.len_utf8();
            previous = c;
        }
        let (text, rest) = self.rest.split_at(end);
        self.rest = rest;
        serde_json::from_str(text).map_err(|_| format!("`{}` is no number", excerpt(text)))
    }

    /// Text in quotes; `\` keeps the next character, `\n` and `\t` are what they
    /// are everywhere.
    fn text(&mut self, quote: char) -> Result<String, String> {
        let mut text = String::new();
        let mut chars = self.rest.char_indices().skip(1);
        while let Some((at, c)) = chars.next() {
            match c {
                _ if c == quote => {
                    self.rest = &self.rest[at + 1..];
                    return Ok(text);
                }
                '\\' => match chars.next() {
                    Some((_, 'n')) => text.push('\n'),
                    Some((_, 't')) => text.push('\t'),
                    Some((_, kept)) => text.push(kept),
                    None => break,
                },
                _ => text.push(c),
            }
        }
        Err(format!("`{}` has no closing quote", excerpt(self.rest)))
    }
}
