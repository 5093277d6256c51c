use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn tree(text: &str) -> Value {
    canonical(&yaml::read(text).expect("reads")).to_json()
}

/// Means the same, and is left alone the next time.
fn check(text: &str) -> String {
    let formatted = format(text).unwrap_or_else(|problems| panic!("{problems:?}\n{text}"));
    let again = yaml::read(&formatted).unwrap_or_else(|problem| panic!("{problem}\n{formatted}"));
    assert_eq!(again.to_json(), tree(text), "{formatted}");
    let comments = |text: &str| {
        let mut found: Vec<String> = comments::find(text).into_iter().map(|comment| comment.text).collect();
        found.sort_unstable();
        found
    };
    assert_eq!(comments(&formatted), comments(text), "{formatted}");
    assert_eq!(format(&formatted).expect("loads"), formatted, "not left alone");
    formatted
}

const WRITTEN: &str = "# What it is for.
playbook: demo # called so
trigger: scheduled
schedule: '0 9 * * MON'

inputs:
  # Of what.
  topic: string
steps:
  # First
  # of all.
  - tool: transform   # no model
    with: {topic: '${inputs.topic}', note: \"it's # no comment\"}
    name: begin

  - {agent: writer, action: write, retry: 3, timeout: 120s} # in one line
  - id: last
    action: transform
    params:
      text: |
        one
        # two
      many: [one, two, # why
        three]
      more: [
        one, # this
        two,
        # that
        three
      ]
# The end.
";

const CANONICAL: &str = "# What it is for.
name: demo # called so
trigger: {type: schedule, schedule: '0 9 * * MON'}

inputs:
  # Of what.
  topic: {type: string}
steps:
  # First
  # of all.
  - id: begin
    action: transform # no model
    params:
      topic: ${inputs.topic}
      note: 'it''s # no comment'

  - id: write # in one line
    role: writer
    action: write
    timeout: 2m
    retry: {max_attempts: 3}
  - id: last
    action: transform
    params:
      text: |
        one
        # two
      many: [one, two, three] # why
      more:
        - one # this
        - two
        # that
        - three
# The end.
";

#[test]
fn one_form_with_every_comment_in_its_place() {
    assert_eq!(check(WRITTEN), CANONICAL);
}

#[test]
fn what_is_wrong_is_told_and_not_formatted() {
    assert!(!format("name: x\nsteps: []\n").expect_err("no steps").is_empty());
}

#[test]
fn texts_keep_every_character() {
    let texts = [
        "",
        " ",
        "a b",
        " lead",
        "trail ",
        "yes",
        "NO",
        "null",
        "~",
        "012",
        "1e3",
        "1_000",
        "0x1f",
        "-",
        "- a",
        "a: b",
        "a:",
        "a #b",
        "a#b",
        "#",
        "'",
        "\"",
        "it's",
        "a\nb",
        "a\nb\n",
        "a\n\nb\n",
        "\na",
        "a\n ",
        " a\nb",
        "a\tb",
        "\ta",
        "\u{85}",
        "\u{2028}",
        "\u{feff}",
        "ünï",
        "😀",
        "{{ 'x' }}",
        "[a]",
        "{a}",
        "a, b",
        "!x",
        "&x",
        "*x",
        "%x",
        "@x",
        "`x`",
        "|",
        ">",
        "?",
        "? x",
        "=",
        "<<",
        ".inf",
        "+1",
        "2026-01-01",
        "a\\b",
        "a\r\nb",
        "true",
        "a\n  b\nc",
        "---",
        "...",
    ];
    for text in texts {
        let yaml = json!({"name": "x", "steps": [
            {"id": "a", "action": "transform", "params": {"v": text, "deep": {"list": [text, [text]]}}},
        ]});
        let formatted = check(&yaml.to_string());
        assert_eq!(yaml::read(&formatted).expect("reads").to_json()["steps"][0]["params"], yaml["steps"][0]["params"]);
    }
}

fn value() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        (-1e9..1e9f64).prop_map(Value::from),
        "[ -~äß\n\t'\"#:{}\\[\\],&*!|>%@`$-]{0,24}"
            .prop_filter("a template", |t| !t.contains("${") && !t.contains("{{"))
            .prop_map(Value::from),
    ];
    leaf.prop_recursive(3, 24, 4, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
            prop::collection::btree_map("[a-zA-Z0-9 _'#:-]{1,12}", inner, 0..4)
                .prop_map(|map| Value::Object(map.into_iter().collect())),
        ]
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 300 } else { 5_000 }))]

    #[test]
    fn reading_what_was_written_gives_the_same(params in prop::collection::vec(value(), 1..4)) {
        let steps: Vec<Value> = params
            .into_iter()
            .enumerate()
            .map(|(n, value)| json!({"id": format!("s{n}"), "action": "transform", "params": {"v": value}}))
            .collect();
        check(&json!({"name": "x", "steps": steps}).to_string());
    }
}
