//! YAML read into a tree that remembers where everything stands, so that a
//! later check ("no such step") can point at a line and column.
//!
//! Scalars are strict: `NO`, `012` and `1_000` stay text. One document, no
//! duplicate keys, no tags that build values, few anchors, bounded size,
//! depth and nodes (hazard S10).

use std::fmt;

use serde::Deserialize;
use serde::de::{MapAccess, SeqAccess, Visitor};
use serde_json::Value;
use serde_saphyr::Spanned;

use super::problem::{Pos, Problem};
use super::{YAML_BYTES_MAX, YAML_DEPTH_MAX, YAML_NODES_MAX};

/// A value and its place.
#[derive(Debug, Clone)]
pub struct Node {
    /// Where it begins.
    pub at: Pos,
    /// What it is.
    pub kind: Kind,
}

/// What a node can be.
#[derive(Debug, Clone)]
pub enum Kind {
    /// Nothing.
    Null,
    /// `true` or `false`.
    Bool(bool),
    /// A whole number.
    Int(i64),
    /// Any other number.
    Float(f64),
    /// Text.
    Str(String),
    /// A list.
    Seq(Vec<Node>),
    /// A map in the order written.
    Map(Vec<(Key, Node)>),
}

/// A key of a map and its place.
#[derive(Debug, Clone)]
pub struct Key {
    /// Where it stands.
    pub at: Pos,
    /// Its text.
    pub text: String,
}

impl Node {
    /// Its kind in words, for "expected …, found …".
    pub fn describe(&self) -> &'static str {
        match self.kind {
            Kind::Null => "nothing",
            Kind::Bool(_) => "a boolean",
            Kind::Int(_) | Kind::Float(_) => "a number",
            Kind::Str(_) => "text",
            Kind::Seq(_) => "a list",
            Kind::Map(_) => "a map",
        }
    }

    /// The value under a key, when it is a map and has it.
    pub fn get(&self, key: &str) -> Option<&Node> {
        match &self.kind {
            Kind::Map(entries) => entries.iter().find(|(k, _)| k.text == key).map(|(_, v)| v),
            _ => None,
        }
    }

    /// Its entries, when it is a map.
    pub fn entries(&self) -> &[(Key, Node)] {
        match &self.kind {
            Kind::Map(entries) => entries,
            _ => &[],
        }
    }

    /// The same value without places.
    pub fn to_json(&self) -> Value {
        match &self.kind {
            Kind::Null => Value::Null,
            Kind::Bool(b) => Value::Bool(*b),
            Kind::Int(n) => Value::from(*n),
            Kind::Float(n) => Value::from(*n),
            Kind::Str(s) => Value::String(s.clone()),
            Kind::Seq(items) => Value::Array(items.iter().map(Node::to_json).collect()),
            Kind::Map(entries) => Value::Object(entries.iter().map(|(k, v)| (k.text.clone(), v.to_json())).collect()),
        }
    }
}

fn pos(location: serde_saphyr::Location) -> Pos {
    Pos { line: location.line(), column: location.column() }
}

impl<'de> Deserialize<'de> for Kind {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_any(KindVisitor)
    }
}

struct KindVisitor;

impl<'de> Visitor<'de> for KindVisitor {
    type Value = Kind;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("a YAML value")
    }

    fn visit_bool<E>(self, value: bool) -> Result<Kind, E> {
        Ok(Kind::Bool(value))
    }

    fn visit_i64<E>(self, value: i64) -> Result<Kind, E> {
        Ok(Kind::Int(value))
    }

    fn visit_u64<E: serde::de::Error>(self, value: u64) -> Result<Kind, E> {
        i64::try_from(value).map(Kind::Int).map_err(|_| E::custom("a number over 9223372036854775807"))
    }

    fn visit_f64<E>(self, value: f64) -> Result<Kind, E> {
        Ok(Kind::Float(value))
    }

    fn visit_str<E: serde::de::Error>(self, value: &str) -> Result<Kind, E> {
        if value.contains('\0') {
            return Err(E::custom("a NUL character, which cannot be stored"));
        }
        Ok(Kind::Str(value.to_owned()))
    }

    fn visit_unit<E>(self) -> Result<Kind, E> {
        Ok(Kind::Null)
    }

    fn visit_none<E>(self) -> Result<Kind, E> {
        Ok(Kind::Null)
    }

    fn visit_some<D: serde::Deserializer<'de>>(self, deserializer: D) -> Result<Kind, D::Error> {
        Kind::deserialize(deserializer)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut access: A) -> Result<Kind, A::Error> {
        let mut items = Vec::new();
        while let Some(item) = access.next_element::<Spanned<Kind>>()? {
            items.push(Node { at: pos(item.referenced), kind: item.value });
        }
        Ok(Kind::Seq(items))
    }

    fn visit_map<A: MapAccess<'de>>(self, mut access: A) -> Result<Kind, A::Error> {
        let mut entries = Vec::new();
        while let Some(key) = access.next_key::<Spanned<String>>()? {
            let value = access.next_value::<Spanned<Kind>>()?;
            entries.push((
                Key { at: pos(key.referenced), text: key.value },
                Node { at: pos(value.referenced), kind: value.value },
            ));
        }
        Ok(Kind::Map(entries))
    }
}

fn options() -> serde_saphyr::Options {
    serde_saphyr::options! {
        budget: serde_saphyr::budget! {
            max_reader_input_bytes: Some(YAML_BYTES_MAX),
            max_events: YAML_NODES_MAX * 4,
            max_aliases: 32,
            max_anchors: 32,
            max_depth: YAML_DEPTH_MAX,
            max_documents: 1,
            max_nodes: YAML_NODES_MAX,
            max_total_scalar_bytes: YAML_BYTES_MAX * 2,
            flow_nesting_limit: YAML_DEPTH_MAX,
        },
        duplicate_keys: serde_saphyr::DuplicateKeyPolicy::Error,
        strict_booleans: true,
        leading_zero_numbers_as_strings: true,
        underscored_numbers_as_strings: true,
        legacy_octal_numbers: false,
        with_snippet: false,
    }
}

/// Reads a text into a tree, or says where it is no YAML.
pub fn read(text: &str) -> Result<Node, Problem> {
    let start = Pos { line: 1, column: 1 };
    if text.len() > YAML_BYTES_MAX {
        return Err(Problem::error(
            start,
            "",
            format!("the playbook is {} bytes, over the limit of {YAML_BYTES_MAX}", text.len()),
        ));
    }
    if let Some(line) = text.lines().position(|line| line.contains('\0')) {
        let at = Pos { line: line as u64 + 1, column: 1 };
        return Err(Problem::error(at, "", "the text holds a NUL character"));
    }
    // To YAML the end of a line, to nothing else any more: all that counts lines would
    // count others. `lines` has taken those before a line feed away.
    if let Some(line) = text.lines().position(|line| line.contains('\r')) {
        let at = Pos { line: line as u64 + 1, column: 1 };
        let hint = Some("end lines with a line feed; in a quoted text, write `\\r`".to_owned());
        return Err(Problem::error(at, "", "a carriage return stands alone").suggest(hint));
    }
    serde_saphyr::from_str_with_options::<Spanned<Kind>>(text, options())
        .map(|node| Node { at: pos(node.referenced), kind: node.value })
        .map_err(|error| {
            let at = error.location().map_or(start, pos);
            Problem::error(at, "", yaml_message(&error)).suggest(yaml_hint(&error, text, at))
        })
}

/// The parser's own words without the place, which we show ourselves.
fn yaml_message(error: &serde_saphyr::Error) -> String {
    let text = error.without_snippet().to_string();
    let text = text.split(" at line ").next().unwrap_or(&text);
    let text = text.strip_prefix("error: ").unwrap_or(text);
    // The parser's advice is for programmers.
    let text = text.split(", set ").next().unwrap_or(text);
    if let Some(limit) = text.strip_prefix("budget breached: ") {
        let limit = limit.split([' ', '{', '(']).next().unwrap_or_default();
        return match limit {
            "Documents" => "a file holds one playbook; what follows `---` is another document".into(),
            "Depth" | "FlowNesting" => format!("nested deeper than {YAML_DEPTH_MAX} levels"),
            "Anchors" | "Aliases" => "more than 32 anchors or aliases".into(),
            other => format!("the playbook is over a limit of size ({other})"),
        };
    }
    format!("not valid YAML: {text}")
}

/// The mistakes that people make most.
fn yaml_hint(error: &serde_saphyr::Error, text: &str, at: Pos) -> Option<String> {
    if error.to_string().contains("budget breached") {
        return None;
    }
    if error.to_string().contains("duplicate mapping key") {
        return Some("keep one of them".into());
    }
    let index = usize::try_from(at.line).ok()?.checked_sub(1)?;
    let near = text.lines().skip(index.saturating_sub(1)).take(2);
    for line in near {
        if line.trim_start_matches(' ').starts_with('\t') {
            return Some("indent with spaces, not tabs".into());
        }
        let value = line.split_once(": ").map(|(_, value)| value.trim());
        if value.is_some_and(|v| v.starts_with(['{', '[', '*', '&', '%', '@', '`']) || v.contains(": ")) {
            return Some("put the value in quotes".into());
        }
    }
    Some("check the indentation and the quotes of this line and the one above".into())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn remembers_places_and_order() {
        let node = read("b: 1\na:\n  - x\n  - {y: two}\n").expect("reads");
        assert_eq!(node.to_json().to_string(), r#"{"b":1,"a":["x",{"y":"two"}]}"#);
        let list = node.get("a").expect("a");
        let Kind::Seq(items) = &list.kind else { panic!("a list") };
        assert_eq!(items[1].at, Pos { line: 4, column: 5 });
        assert_eq!(items[1].get("y").expect("y").at, Pos { line: 4, column: 9 });
    }

    #[test]
    fn scalars_are_strict() {
        let node = read("a: NO\nb: 012\nc: 1_000\nd: yes\ne: true\nf: 5.00\ng:\nh: '5'\n").expect("reads");
        assert_eq!(
            node.to_json().to_string(),
            r#"{"a":"NO","b":"012","c":"1_000","d":"yes","e":true,"f":5.0,"g":null,"h":"5"}"#
        );
    }

    #[test]
    fn what_is_no_yaml_says_where() {
        let problem = read("name: x\nsteps:\n  - role: [a\n").expect_err("broken");
        assert!(problem.at.line >= 3, "{problem}");
        let problem = read("a: 1\na: 2\n").expect_err("a duplicate key");
        assert_eq!(problem.at.line, 2, "{problem}");
        let problem = read("a: 1\n---\nb: 2\n").expect_err("two documents");
        assert!(problem.to_string().contains("a file holds one playbook"), "{problem}");
    }

    #[test]
    fn bombs_are_refused_quickly() {
        let mut bomb = String::from("a0: &a0 [x,x,x,x,x,x,x,x,x]\n");
        for i in 1..9 {
            let refs = vec![format!("*a{}", i - 1); 9].join(",");
            bomb.push_str(&format!("a{i}: &a{i} [{refs}]\n"));
        }
        assert!(read(&bomb).is_err());
        assert!(read(&"[".repeat(100_000)).is_err());
        assert!(read(&format!("a: {}", "x".repeat(YAML_BYTES_MAX))).is_err());
        assert!(read("a: &a [*a]").is_err());
        assert!(read("a: \"x\0y\"").is_err());
        assert!(read(r#"a: "x\0y""#).is_err());
    }
}
