//! The canonical form of a playbook as text: every dialect becomes one, in one
//! layout, and comments stay with what they stand at.

use std::collections::HashMap;
use std::fmt::Write as _;

use super::YAML_BYTES_MAX;
use super::canonical::canonical;
use super::comments::{self, Comment};
use super::problem::{Pos, Problem};
use super::yaml::{self, Kind, Node};

/// A short list or map stands in one line of at most so many characters.
const LINE_MAX: usize = 100;
const INDENT: usize = 2;
/// Maps that are written out, however short.
const WRITTEN_OUT: &[&str] = &["params", "inputs", "steps", "finally", "rubric"];
/// Plain words that some reader of YAML takes for something else.
const WORDS: &[&str] = &["null", "true", "false", "yes", "no", "on", "off", "y", "n", "~"];

/// The canonical text of a playbook that is in order, or what is wrong with it.
pub fn format(text: &str) -> Result<String, Vec<Problem>> {
    super::read(text)?;
    let root = canonical(&yaml::read(text).map_err(|problem| vec![problem])?);
    let mut writer = Writer { text: String::new(), notes: Notes::of(&root, text) };
    writer.map_entries(&root, 0, "");
    // Whatever stood at something that is not written any more is not lost.
    let notes = std::mem::take(&mut writer.notes);
    let mut left: Vec<(Pos, Vec<String>)> = notes.above.into_iter().chain(notes.beside).collect();
    left.sort_by_key(|(at, _)| (at.line, at.column));
    for comment in left.into_iter().flat_map(|(_, comments)| comments).chain(notes.last) {
        let _ = writeln!(writer.text, "{comment}");
    }
    if writer.text.len() > YAML_BYTES_MAX {
        let message = format!("written out it is {} bytes, over the limit of {YAML_BYTES_MAX}", writer.text.len());
        return Err(vec![Problem::error(root.at, "", message)]);
    }
    Ok(writer.text)
}

/// The comments of a text, by the place of what they stand at.
#[derive(Default)]
struct Notes {
    /// On lines of their own, above it.
    above: HashMap<Pos, Vec<String>>,
    /// Behind it, on its line.
    beside: HashMap<Pos, Vec<String>>,
    /// At the end of the text.
    last: Vec<String>,
    /// Places with an empty line before them.
    apart: Vec<Pos>,
}

impl Notes {
    fn of(root: &Node, text: &str) -> Self {
        let mut places = Vec::new();
        collect(root, &mut places);
        places.sort_by_key(|at| (at.line, at.column));
        places.dedup();
        let mut notes = Self::default();
        for Comment { line, own_line, text } in comments::find(text) {
            let beside = places.iter().find(|at| at.line == line && !own_line);
            let below = places.iter().find(|at| at.line > line);
            match (beside, below) {
                (Some(at), _) => notes.beside.entry(*at).or_default().push(text),
                (None, Some(at)) => notes.above.entry(*at).or_default().push(text),
                (None, None) => notes.last.push(text),
            }
        }
        let lines: Vec<&str> = text.lines().collect();
        let line =
            |number: u64| usize::try_from(number).ok().and_then(|n| lines.get(n.checked_sub(1)?)).map(|l| l.trim());
        notes.apart = places
            .into_iter()
            .filter(|at| {
                let above = (1..at.line).rev().find(|number| line(*number).is_none_or(|text| !text.starts_with('#')));
                above.and_then(line) == Some("")
            })
            .collect();
        notes
    }

    fn at(&self, at: Pos) -> bool {
        self.above.contains_key(&at) || self.beside.contains_key(&at)
    }
}

/// The places at which something begins that is written.
fn collect(node: &Node, places: &mut Vec<Pos>) {
    match &node.kind {
        Kind::Map(entries) => entries.iter().for_each(|(key, value)| {
            places.push(key.at);
            collect(value, places);
        }),
        Kind::Seq(items) => items.iter().for_each(|item| {
            places.push(item.at);
            collect(item, places);
        }),
        _ => {}
    }
}

struct Writer {
    text: String,
    notes: Notes,
}

impl Writer {
    fn indent(&mut self, by: usize) {
        self.text.extend(std::iter::repeat_n(' ', by));
    }

    /// Comments above a place, and the empty line that parts it from what comes
    /// before.
    fn lead(&mut self, at: Pos, by: usize, may_part: bool) {
        if may_part && self.notes.apart.contains(&at) && !self.text.is_empty() {
            self.text.push('\n');
            self.notes.apart.retain(|apart| *apart != at);
        }
        for comment in self.notes.above.remove(&at).unwrap_or_default() {
            self.indent(by);
            let _ = writeln!(self.text, "{comment}");
        }
    }

    /// Comments beside a place, and the end of its line.
    fn end_line(&mut self, at: Pos) {
        for comment in self.notes.beside.remove(&at).unwrap_or_default() {
            let _ = write!(self.text, " {comment}");
        }
        self.text.push('\n');
    }

    /// The entries of a map, the first one where the line stands already when it is
    /// that of a list's item.
    fn map_entries(&mut self, node: &Node, by: usize, under: &str) {
        let Kind::Map(entries) = &node.kind else { return };
        for (number, (key, value)) in entries.iter().enumerate() {
            let in_line = under == "-" && number == 0;
            if !in_line {
                self.lead(key.at, by, by == 0);
                self.indent(by);
            }
            let _ = write!(self.text, "{}:", scalar(&key.text, false));
            self.value(value, key.at, by, &key.text);
        }
    }

    fn value(&mut self, node: &Node, at: Pos, by: usize, key: &str) {
        if let Some(short) = self.short(node, key, by) {
            let _ = write!(self.text, " {short}");
            return self.end_line(at);
        }
        match &node.kind {
            Kind::Map(_) => {
                self.end_line(at);
                self.map_entries(node, by + INDENT, key);
            }
            Kind::Seq(items) => {
                self.end_line(at);
                for item in items {
                    self.item(item, by + INDENT);
                }
            }
            Kind::Str(text) => {
                let body = text.strip_suffix('\n');
                let _ = write!(self.text, " |{}", if body.is_some() { "" } else { "-" });
                self.end_line(at);
                for line in body.unwrap_or(text).split('\n') {
                    if !line.is_empty() {
                        self.indent(by + INDENT);
                    }
                    let _ = writeln!(self.text, "{line}");
                }
            }
            _ => self.end_line(at),
        }
    }

    fn item(&mut self, item: &Node, by: usize) {
        self.lead(item.at, by, by == INDENT);
        self.indent(by);
        if let Some(short) = self.short(item, "", by).filter(|_| !matches!(item.kind, Kind::Map(_))) {
            let _ = write!(self.text, "- {short}");
            return self.end_line(item.at);
        }
        match &item.kind {
            Kind::Map(entries) if !entries.is_empty() => {
                // Its first entry may be another than the one written first: what
                // stands above that one comes before the dash.
                let first = entries[0].0.at;
                for comment in self.notes.above.remove(&first).unwrap_or_default() {
                    let _ = writeln!(self.text, "{comment}");
                    self.indent(by);
                }
                if !entries.iter().any(|(key, _)| key.at == item.at)
                    && let Some(beside) = self.notes.beside.remove(&item.at)
                {
                    self.notes.beside.entry(first).or_default().extend(beside);
                }
                self.text.push_str("- ");
                self.map_entries(item, by + INDENT, "-");
            }
            Kind::Map(_) => {
                self.text.push_str("- {}");
                self.end_line(item.at);
            }
            // A list in a list, or a long text: the dash stands where a key would.
            _ => {
                self.text.push('-');
                self.value(item, item.at, by, "");
            }
        }
    }

    /// A value that has room in its line.
    fn short(&self, node: &Node, key: &str, by: usize) -> Option<String> {
        match &node.kind {
            Kind::Map(entries) if !entries.is_empty() && (WRITTEN_OUT.contains(&key) || self.noted(node)) => None,
            Kind::Seq(items) if !items.is_empty() && (WRITTEN_OUT.contains(&key) || self.noted(node)) => None,
            Kind::Map(_) | Kind::Seq(_) => {
                let text = flow(node, 0)?;
                (by + key.len() + 2 + text.chars().count() <= LINE_MAX).then_some(text)
            }
            Kind::Str(text) if literal(text) => None,
            _ => Some(plain(node, false)),
        }
    }

    /// Whether a comment stands inside.
    fn noted(&self, node: &Node) -> bool {
        let mut places = Vec::new();
        collect(node, &mut places);
        places.into_iter().any(|at| self.notes.at(at))
    }
}

/// A list or map in one line, of plain values or of such.
fn flow(node: &Node, depth: usize) -> Option<String> {
    match &node.kind {
        Kind::Seq(_) | Kind::Map(_) if depth > 1 => None,
        Kind::Seq(items) => {
            let items: Option<Vec<String>> = items.iter().map(|item| flow(item, depth + 1)).collect();
            Some(format!("[{}]", items?.join(", ")))
        }
        Kind::Map(entries) => {
            let entry = |(key, value): &(yaml::Key, Node)| {
                Some(format!("{}: {}", scalar(&key.text, true), flow(value, depth + 1)?))
            };
            let entries: Option<Vec<String>> = entries.iter().map(entry).collect();
            Some(format!("{{{}}}", entries?.join(", ")))
        }
        Kind::Str(text) if literal(text) => None,
        _ => Some(plain(node, true)),
    }
}

fn plain(node: &Node, in_flow: bool) -> String {
    match &node.kind {
        Kind::Bool(value) => value.to_string(),
        Kind::Int(value) => value.to_string(),
        Kind::Float(value) if value.is_nan() => ".nan".into(),
        Kind::Float(value) if value.is_infinite() => if *value > 0.0 { ".inf" } else { "-.inf" }.into(),
        Kind::Float(value) => serde_json::Value::from(*value).to_string(),
        Kind::Str(text) => scalar(text, in_flow),
        _ => "null".into(),
    }
}

/// Whether a text is written over several lines.
fn literal(text: &str) -> bool {
    let body = text.strip_suffix('\n').unwrap_or(text);
    let storable =
        |c: char| c == '\n' || (!c.is_control() && !matches!(c, '\u{85}' | '\u{2028}' | '\u{2029}' | '\u{feff}'));
    body.contains('\n')
        && !body.ends_with('\n')
        && !body.starts_with([' ', '\n'])
        && body.lines().all(|line| line.trim_end() == line)
        && text.chars().all(storable)
}

/// A text in one line, in quotes where it needs them.
fn scalar(text: &str, in_flow: bool) -> String {
    if text.chars().any(|c| c.is_control() || matches!(c, '\u{85}' | '\u{2028}' | '\u{2029}' | '\u{feff}')) {
        return quoted(text);
    }
    if is_plain(text, in_flow) { text.to_owned() } else { format!("'{}'", text.replace('\'', "''")) }
}

fn is_plain(text: &str, in_flow: bool) -> bool {
    let Some(first) = text.chars().next() else { return false };
    text.trim() == text
        && !"-?:,[]{}#&*!|>'\"%@`=<.+~".contains(first)
        && (!first.is_ascii_digit() || is_measure(text))
        && !text.contains(": ")
        && !text.contains(" #")
        && !text.ends_with(':')
        && !WORDS.contains(&text.to_ascii_lowercase().as_str())
        && !(in_flow && text.contains(['[', ']', '{', '}', ',', ':', '"', '\'']))
}

/// Such as `30s` or `80%`, which no reader takes for a number.
fn is_measure(text: &str) -> bool {
    let unit = text.trim_start_matches(|c: char| c.is_ascii_digit());
    ["ms", "s", "m", "h", "d", "%"].contains(&unit)
}

fn quoted(text: &str) -> String {
    let mut out = String::from("\"");
    for c in text.chars() {
        match c {
            '"' => out.push_str("\\\""),
            '\\' => out.push_str("\\\\"),
            '\n' => out.push_str("\\n"),
            '\r' => out.push_str("\\r"),
            '\t' => out.push_str("\\t"),
            c if c.is_control() || matches!(c, '\u{85}' | '\u{2028}' | '\u{2029}' | '\u{feff}') => {
                let _ = write!(out, "\\u{:04x}", u32::from(c));
            }
            c => out.push(c),
        }
    }
    out.push('"');
    out
}

#[cfg(test)]
mod tests;
