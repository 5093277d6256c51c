//! What is wrong with a playbook, said so that its author can mend it.

use std::fmt;

use serde::Serialize;

/// A place in the text, both counted from 1.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize)]
pub struct Pos {
    /// The line.
    pub line: u64,
    /// The column, in characters.
    pub column: u64,
}

/// One problem: where, what, and what to do about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Problem {
    /// Where it stands.
    #[serde(flatten)]
    pub at: Pos,
    /// The dotted path of the key, e.g. `steps.1.timeout`; empty for the file.
    pub path: String,
    /// The cause.
    pub message: String,
    /// What was probably meant, or what to write instead.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub suggestion: Option<String>,
    /// Not wrong yet: it will fail at run time unless something changes.
    pub warning: bool,
}

impl Problem {
    /// An error.
    pub fn error(at: Pos, path: impl Into<String>, message: impl Into<String>) -> Self {
        Self { at, path: path.into(), message: message.into(), suggestion: None, warning: false }
    }

    /// With a suggestion, when there is one.
    #[must_use]
    pub fn suggest(mut self, suggestion: Option<String>) -> Self {
        self.suggestion = suggestion;
        self
    }

    /// The offending line with a caret under the column; of a long line, what lies
    /// around it.
    pub fn excerpt(&self, text: &str) -> Option<String> {
        let line = text.lines().nth(usize::try_from(self.at.line).ok()?.checked_sub(1)?)?;
        let column = usize::try_from(self.at.column).ok()?.checked_sub(1)?.min(line.chars().count());
        let (line, before) = around(line, column);
        let number = self.at.line.to_string();
        Some(format!("{number} | {line}\n{} | {}^", " ".repeat(number.len()), " ".repeat(before)))
    }
}

/// How much of a line is shown, in characters.
const EXCERPT_CHARS: usize = 160;

/// The part of a line around a column, and the column in it.
fn around(line: &str, column: usize) -> (String, usize) {
    let chars = line.chars().count();
    if chars <= EXCERPT_CHARS {
        return (line.to_owned(), column);
    }
    let from = column.saturating_sub(EXCERPT_CHARS / 2).min(chars - EXCERPT_CHARS);
    let shown: String = line.chars().skip(from).take(EXCERPT_CHARS).collect();
    let (start, before) = if from > 0 { ("…", column - from + 1) } else { ("", column) };
    let end = if from + EXCERPT_CHARS < chars { "…" } else { "" };
    (format!("{start}{shown}{end}"), before)
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: ", self.at.line, self.at.column)?;
        if !self.path.is_empty() {
            write!(f, "{}: ", self.path)?;
        }
        f.write_str(&self.message)?;
        if let Some(suggestion) = &self.suggestion {
            write!(f, "; {suggestion}")?;
        }
        Ok(())
    }
}

/// `did you mean …?` for the nearest of the known words, when one is near.
pub fn did_you_mean<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<String> {
    nearest(word, known).map(|near| format!("did you mean `{near}`?"))
}

/// A longer word is no slip of a known one, in characters.
const NEAR_CHARS_MAX: usize = 100;

/// The nearest of the known words, when one is near enough to be meant.
pub fn nearest<'a>(word: &str, known: impl IntoIterator<Item = &'a str>) -> Option<&'a str> {
    let word_chars = word.chars().count();
    if word_chars > NEAR_CHARS_MAX {
        return None;
    }
    known
        .into_iter()
        // Before the distance is computed, which takes the product of both.
        .filter(|candidate| candidate.chars().count().abs_diff(word_chars) * 3 <= word_chars.max(3))
        .map(|candidate| (strsim::damerau_levenshtein(word, candidate), candidate))
        // A third of the word may differ, and never all of it, so that short
        // words do not match all.
        .filter(|(distance, _)| *distance > 0 && *distance < word_chars && *distance * 3 <= word_chars.max(3))
        .min_by_key(|(distance, _)| *distance)
        .map(|(_, candidate)| candidate)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suggests_only_what_is_near() {
        let known = ["timeout", "retry", "params"];
        assert_eq!(did_you_mean("timout", known).as_deref(), Some("did you mean `timeout`?"));
        assert_eq!(did_you_mean("colour", known), None);
        assert_eq!(did_you_mean("id", known), None);
        assert_eq!(did_you_mean("b", ["a"]), None);
    }

    #[test]
    fn the_caret_stands_under_the_column() {
        let problem = Problem::error(Pos { line: 2, column: 3 }, "a", "bad");
        assert_eq!(problem.excerpt("x: 1\n  y: 2\n").as_deref(), Some("2 |   y: 2\n  |   ^"));
        // Of a long line, what lies around it.
        let text = format!("{}!{}", "ä".repeat(5_000), "b".repeat(5_000));
        let excerpt = Problem::error(Pos { line: 1, column: 5_001 }, "a", "bad").excerpt(&text).expect("a line");
        let (line, caret) = excerpt.split_once('\n').expect("two lines");
        assert_eq!(line.chars().position(|c| c == '!'), caret.chars().position(|c| c == '^'));
        assert!(line.chars().count() < 200 && line.ends_with('…'));
    }
}
