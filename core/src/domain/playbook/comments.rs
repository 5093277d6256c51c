//! Where the comments of a YAML text are, which its reader passes over.

/// A comment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Comment {
    /// Its line, from 1.
    pub line: u64,
    /// Nothing stands before it.
    pub own_line: bool,
    /// From its `#` on.
    pub text: String,
}

/// What a line begins in.
#[derive(Clone, Copy, PartialEq)]
enum Inside {
    Nothing,
    /// A text in these quotes.
    Quotes(char),
    /// A text of lines that are indented deeper than this.
    Block(usize),
}

/// The comments of a text that is valid YAML, in order.
pub(super) fn find(text: &str) -> Vec<Comment> {
    let mut found = Vec::new();
    let mut inside = Inside::Nothing;
    for (number, line) in (1..).zip(text.lines()) {
        let indent = line.len() - line.trim_start_matches(' ').len();
        if let Inside::Block(least) = inside {
            if line.trim().is_empty() || indent > least {
                continue;
            }
            inside = Inside::Nothing;
        }
        let (comment, after) = scan(line, inside);
        if let Some(at) = comment {
            let own_line = line[..at].trim().is_empty();
            found.push(Comment { line: number, own_line, text: line[at..].trim_end().to_owned() });
        }
        inside = after;
        if inside == Inside::Nothing && opens_block(&line[..comment.unwrap_or(line.len())]) {
            inside = Inside::Block(parent_indent(line, indent));
        }
    }
    found
}

/// Where the comment of a line begins, and what the next one begins in.
fn scan(line: &str, mut inside: Inside) -> (Option<usize>, Inside) {
    let mut before = ' ';
    let mut chars = line.char_indices().peekable();
    while let Some((at, c)) = chars.next() {
        match inside {
            Inside::Quotes('"') if c == '\\' => {
                let _ = chars.next();
            }
            Inside::Quotes('\'') if c == '\'' && chars.peek().is_some_and(|(_, next)| *next == '\'') => {
                let _ = chars.next();
            }
            Inside::Quotes(quote) if c == quote => inside = Inside::Nothing,
            Inside::Quotes(_) | Inside::Block(_) => {}
            Inside::Nothing if c == '#' && before.is_whitespace() => return (Some(at), inside),
            // Quotes open where a value may begin; inside a word they are letters.
            Inside::Nothing if ['"', '\''].contains(&c) && begins_value(&line[..at]) => inside = Inside::Quotes(c),
            Inside::Nothing => {}
        }
        before = c;
    }
    (None, inside)
}

/// Whether a value may begin behind this.
fn begins_value(before: &str) -> bool {
    let trimmed = before.trim_end();
    let apart = trimmed.len() < before.len();
    match trimmed.chars().next_back() {
        None => true,
        Some('[' | '{' | ',') => true,
        Some(':' | '-' | '?') => apart,
        // Behind an anchor or a tag.
        Some(_) => {
            apart && trimmed.rsplit([' ', ',', '[', '{']).next().is_some_and(|word| word.starts_with(['&', '!']))
        }
    }
}

/// Whether a line ends in the head of a text of many lines: `|`, `>-`, `|2+`.
fn opens_block(line: &str) -> bool {
    let Some(head) = line.split_whitespace().next_back() else { return false };
    let rest = head.strip_prefix(['|', '>']);
    rest.is_some_and(|rest| rest.len() <= 2 && rest.chars().all(|c| c.is_ascii_digit() || c == '-' || c == '+'))
        && begins_value(&line[..line.rfind(head).unwrap_or(0)])
}

/// How deep the key stands that a text belongs to, behind the dashes before it.
fn parent_indent(line: &str, indent: usize) -> usize {
    let mut at = indent;
    let mut rest = &line[indent..];
    while let Some(inner) = rest.strip_prefix("- ") {
        let trimmed = inner.trim_start_matches(' ');
        // A dash right before the head is the parent itself.
        if trimmed.starts_with(['|', '>']) {
            break;
        }
        at += rest.len() - trimmed.len();
        rest = trimmed;
    }
    at
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn comments_are_found_and_what_looks_like_one_is_not() {
        let text = "# top
name: a#b  # beside
url: 'http://x/#y' # after quotes
it: it's # not quoted
two: \"a \\\" # b\" #c
long: 'one
  # two' # three
text: |  # head
  # inside
   # deeper

# out
list:
  - >-
    # folded
  - key: |
      # literal
    other: x # seen
flow: {a: '#', b: \"# x\"} # end
";
        let found: Vec<(u64, String)> = find(text).into_iter().map(|c| (c.line, c.text)).collect();
        let wanted = [
            (1, "# top"),
            (2, "# beside"),
            (3, "# after quotes"),
            (4, "# not quoted"),
            (5, "#c"),
            (7, "# three"),
            (8, "# head"),
            (12, "# out"),
            (18, "# seen"),
            (19, "# end"),
        ];
        assert_eq!(found, wanted.map(|(line, text)| (line, text.to_owned())));
    }
}
