//! What anybody may send, mangled: a playbook, an expression, a template, a cron
//! expression. Whatever it says, it is read or refused; nothing panics, goes on for
//! ever, or means something else when it is written down.
//!
//! An input that is answered in a way that was not seen before is kept and mangled
//! further. In CI each target tries some thousands; `CAPX_FUZZ_SECONDS=600` goes on
//! that long, `CAPX_FUZZ_SEED` begins elsewhere. What fails is printed as it is.

#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a test, which says what it has tried")]

use std::collections::HashSet;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

use capx_core::domain::playbook::expr::{self, Budget, Reference, Scope};
use capx_core::domain::playbook::{self, Problem, diff, format, template};
use capx_core::domain::schedule::{Schedule, ScheduleSpec};
use jiff::Timestamp;
use rand::rngs::SmallRng;
use rand::seq::IndexedRandom;
use rand::{Rng, SeedableRng};
use serde_json::{Value, json};

/// Inputs of a target without `CAPX_FUZZ_SECONDS`.
const INPUTS: u64 = 20_000;
/// Inputs that are kept to be mangled further.
const KEPT_MAX: usize = 4_000;
/// Longer ones are cut: what is too large is refused before it is looked at.
const BYTES_MAX: usize = 20_000;

struct Fuzz {
    random: SmallRng,
    kept: Vec<String>,
    words: &'static [&'static str],
    seen: HashSet<u64>,
}

impl Fuzz {
    fn mangled(&mut self) -> String {
        let mut text = self.kept.choose(&mut self.random).cloned().unwrap_or_default().into_bytes();
        for _ in 0..self.random.random_range(1..6) {
            let at = self.random.random_range(0..=text.len());
            let to = (at + self.random.random_range(0..40)).min(text.len());
            match self.random.random_range(0..8) {
                0 => drop(text.drain(at..to)),
                1 => {
                    let part = text[at..to].to_vec();
                    let times = if self.random.random_bool(0.1) { 200 } else { 1 };
                    drop(text.splice(at..at, part.repeat(times)));
                }
                2 => {
                    let other = self.kept.choose(&mut self.random).map_or(&[][..], String::as_bytes);
                    let from = self.random.random_range(0..=other.len());
                    let until = (from + self.random.random_range(0..200)).min(other.len());
                    drop(text.splice(at..to, other[from..until].iter().copied()));
                }
                3 if at < text.len() => text[at] = self.random.random(),
                4 => lines(&mut text, &mut self.random),
                _ => {
                    let word = self.words.choose(&mut self.random).copied().unwrap_or_default();
                    drop(text.splice(at..if self.random.random_bool(0.5) { at } else { to }, word.bytes()));
                }
            }
        }
        text.truncate(BYTES_MAX);
        String::from_utf8_lossy(&text).into_owned()
    }

    /// Tries inputs; `target` says how one was answered.
    fn run(mut self, name: &str, target: impl Fn(&str) -> String) {
        let seconds: Option<u64> = std::env::var("CAPX_FUZZ_SECONDS").ok().map(|text| text.parse().unwrap());
        let until = seconds.map(|seconds| Instant::now() + Duration::from_secs(seconds));
        let (mut tried, mut slowest) = (0_u64, (Duration::ZERO, String::new()));
        for seed in self.kept.clone() {
            let answer = target(&seed);
            self.seen.insert(shape(&answer));
        }
        while until.map_or(tried < INPUTS, |until| Instant::now() < until) {
            let text = self.mangled();
            let began = Instant::now();
            let answer = catch_unwind(AssertUnwindSafe(|| target(&text)))
                .inspect_err(|_| println!("{name} fails, as its input number {tried}, with:\n{text:?}"))
                .unwrap_or_else(|panic| resume_unwind(panic));
            if began.elapsed() > slowest.0 {
                slowest = (began.elapsed(), text.clone());
            }
            if self.kept.len() < KEPT_MAX && self.seen.insert(shape(&answer)) {
                self.kept.push(text);
            }
            tried += 1;
        }
        let start: String = slowest.1.chars().take(200).collect();
        println!(
            "{name}: {tried} inputs, {} ways to answer, the slowest {:.2} ms: {start:?}",
            self.seen.len(),
            slowest.0.as_secs_f64() * 1e3
        );
        assert!(tried >= INPUTS.min(100) && self.seen.len() > 5, "{name} tried nothing");
    }
}

fn fuzz(kept: Vec<String>, words: &'static [&'static str]) -> Fuzz {
    let seed = std::env::var("CAPX_FUZZ_SEED").map_or(0, |text| text.parse().unwrap());
    Fuzz { random: SmallRng::seed_from_u64(seed), kept, words, seen: HashSet::new() }
}

/// Moves, doubles or indents a line.
fn lines(text: &mut Vec<u8>, random: &mut SmallRng) {
    let mut lines: Vec<Vec<u8>> = text.split(|byte| *byte == b'\n').map(<[u8]>::to_vec).collect();
    let (from, to) = (random.random_range(0..lines.len()), random.random_range(0..lines.len()));
    match random.random_range(0..3) {
        0 => lines.swap(from, to),
        1 => lines.insert(to, lines[from].clone()),
        _ => {
            let blanks = random.random_range(0..5);
            let word = lines[from].iter().position(|byte| *byte != b' ').unwrap_or(0);
            lines[from] = [vec![b' '; blanks], lines[from][word..].to_vec()].concat();
        }
    }
    *text = lines.join(&b'\n');
}

/// An answer without what differs from input to input: figures and what is quoted.
fn shape(answer: &str) -> u64 {
    let unquoted = answer.split(['`', '"', '\'']).step_by(2);
    let mut hasher = DefaultHasher::new();
    for part in unquoted {
        part.chars().filter(|c| !c.is_ascii_digit()).for_each(|c| c.hash(&mut hasher));
    }
    hasher.finish()
}

fn told(problems: &[Problem], text: &str) -> String {
    let lines = text.lines().count();
    problems
        .iter()
        .map(|problem| {
            assert!(problem.at.line <= lines as u64 + 1, "{problem} is said of a line that is not there");
            let _ = problem.excerpt(text);
            format!("{}\n", problem.message)
        })
        .collect()
}

fn read_all(directory: &str) -> Vec<String> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut files: Vec<_> = std::fs::read_dir(root.join(directory)).unwrap().map(|e| e.unwrap().path()).collect();
    files.sort();
    let texts = files.iter().filter(|path| path.extension().is_some_and(|e| e == "yml" || e == "yaml"));
    texts.map(|path| std::fs::read_to_string(path).unwrap()).filter(|text| text.len() <= BYTES_MAX).collect()
}

#[test]
fn any_text_is_a_playbook_or_is_refused() {
    let seeds = [read_all("playbooks"), read_all("tests/broken")].concat();
    assert!(seeds.len() > 50);
    let words: &[&str] = &[
        "name:",
        "steps:",
        "- ",
        "id: ",
        "role: ",
        "action: ",
        "params:",
        "if: ",
        "goto: ",
        "max_retries: 2",
        "needs: [a]",
        "for_each: ",
        "compensate:",
        "finally:",
        "approval: required",
        "trigger:",
        "schedule: '0 9 * * MON'",
        "inputs:",
        "output: ",
        "concurrency:",
        "retry:",
        "timeout: ",
        "&a",
        "*a",
        "<<: *a",
        "!!str ",
        "!x ",
        "%YAML 1.1\n",
        "---\n",
        "...\n",
        "? ",
        ": ",
        "|\n",
        ">-\n",
        "\t",
        "\u{feff}",
        "\u{2028}",
        "\0",
        "'",
        "\"",
        "#",
        "{",
        "}",
        "[",
        "]",
        ",",
        "null",
        "~",
        "NO",
        "012",
        "1e3",
        ".inf",
        "0x1f",
        "9223372036854775808",
        "-1",
        "${",
        "{{",
        "}}",
        "}",
        "${steps.a.output}",
        "{{ inputs.x }}",
        "\\u0000",
        "\r\n",
        "é",
        "😀",
    ];
    fuzz(seeds, words).run("playbooks", |text| match playbook::read(text) {
        Err(problems) => {
            assert!(!problems.is_empty(), "refused without a reason");
            told(&problems, text)
        }
        Ok((playbook, warnings)) => {
            let formatted = format::format(text).expect("what can be read can be written");
            assert_eq!(format::format(&formatted).expect("and read again"), formatted, "the canonical form is one");
            let changes = diff::diff(text, &formatted).expect("and compared");
            assert!(changes.is_empty(), "it means something else when it is written:\n{formatted}");
            format!("{}{:?}", told(&warnings, text), playbook.steps.iter().map(|s| s.kind.clone()).collect::<Vec<_>>())
        }
    });
}

struct Names(Value);

impl Scope for Names {
    fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)> {
        self.0.get(reference.name(0)?).map(|value| (value, 1))
    }
}

/// What must not be told by whoever does not ask for it.
const SECRET: &str = "correct horse";

fn names() -> Names {
    Names(json!({
        "inputs": {
            "topic": "tides", "n": 3, "f": 0.5, "list": [1, "two", null, [4]], "no": null, "on": true,
            "template": "${hidden.word} {{ hidden.word }} ${", "deep": {"a": {"b": {"c": "d"}}}, "long": "x".repeat(5_000),
        },
        "steps": {"draft": {"output": {"score": 0.7, "items": [{"id": 1}, {"id": 2}]}, "status": "completed"}},
        "item": {"a name": "b"}, "index": 0,
        "hidden": {"word": SECRET},
    }))
}

const EXPRESSIONS: &[&str] = &[
    "inputs.topic",
    "inputs.n * 2 + 1",
    "not inputs.on",
    "inputs.list[0]",
    "steps.draft.output.items[1].id",
    "item['a name']",
    "inputs.x ?? 'none'",
    "defined(inputs.x)",
    "default(inputs.no, 1)",
    "inputs.topic | upper",
    "len(inputs.list) > 2 and 'two' in inputs.list",
    "(1 + 2) * 3 == 9 || false",
    "-inputs.f % 2",
    "[1, [2], 'x']",
    "split(inputs.topic, 'i')",
    "join(inputs.list, ',')",
    "replace(inputs.topic, 't', 'd')",
    "inputs.n >= 3 && inputs.f < 1",
];

const PARTS: &[&str] = &[
    "(",
    ")",
    "[",
    "]",
    ".",
    ",",
    "|",
    "??",
    "==",
    "!=",
    "<=",
    ">=",
    "<",
    ">",
    "+",
    " - ",
    "*",
    "/",
    "%",
    "and ",
    "or ",
    "not ",
    "!",
    "&&",
    "||",
    " in ",
    "null",
    "true",
    "false",
    "0",
    "1e308",
    "9007199254740993",
    "-0",
    "0.1",
    "'",
    "\"",
    "\\",
    "inputs.",
    "steps.draft",
    "output",
    "item",
    "index",
    "inputs.long",
    "inputs.template",
    "len(",
    "upper",
    "lower",
    "trim",
    "default(",
    "defined(",
    "join(",
    "split(",
    "replace(",
    "json(",
    "sum(",
    "min(",
    "max(",
    "keys(",
    "round(",
    "range(",
    "repeat(",
    "\u{0}",
    "é",
    "😀",
    "${",
    "}",
    "{{",
    "}}",
    " ",
];

fn evaluated(outcome: Result<Value, impl std::fmt::Display>) -> String {
    match outcome {
        Ok(value) => {
            let text = value.to_string();
            assert!(text.len() <= 8 * template::RENDERED_BYTES_MAX, "{} bytes", text.len());
            format!("is {} {}", expr::kind_of(&value), text.len().ilog2())
        }
        Err(error) => error.to_string(),
    }
}

#[test]
fn any_text_is_an_expression_or_is_refused() {
    let seeds = EXPRESSIONS.iter().map(|text| (*text).to_owned()).collect();
    let scope = names();
    fuzz(seeds, PARTS).run("expressions", |text| match expr::parse(text) {
        Err(error) => error,
        Ok(expr) => {
            let _ = (expr.references(), expr.quotes_a_template());
            let holds = expr.holds(&scope, &mut Budget::default()).is_ok();
            let value = expr.eval(&scope, &mut Budget::default()).map(std::borrow::Cow::into_owned);
            assert_eq!(holds, value.is_ok(), "as a condition it is no other expression");
            evaluated(value)
        }
    });
}

#[test]
fn any_text_is_a_template_that_is_rendered_once() {
    let seeds =
        EXPRESSIONS.iter().flat_map(|e| [format!("${{{e}}}"), format!("about {{{{ {e} }}}}: ${{{e}}}")]).collect();
    let scope = names();
    fuzz(seeds, PARTS).run("templates", |text| {
        match template::compile(&json!({"one": text, "list": [text, 1, {"two": "${inputs.template}"}]})) {
            Err(error) => error,
            Ok(template) => {
                let rendered = template.render(&scope).map_err(|error| error.to_string());
                if let Ok(value) = &rendered
                    && !text.contains("hidden")
                {
                    assert!(!value.to_string().contains(SECRET), "what was put in was read again: {value}");
                }
                evaluated(rendered)
            }
        }
    });
}

#[test]
fn any_text_is_a_schedule_that_goes_on_or_is_refused() {
    let crons = [
        "0 9 * * MON",
        "*/5 * * * *",
        "@daily",
        "@hourly",
        "0 0 1,15 * *",
        "30 2 * * *",
        "0 0 29 2 *",
        "0 0 31 2 *",
        "5-10/2 0-3 * JAN-MAR 1-5",
        "0 12 L * *",
        "0 0 * * 5#2",
        "59 23 31 12 7",
        "* * * * *",
    ];
    let words: &[&str] = &[
        "*",
        "/",
        "-",
        ",",
        "0",
        "1",
        "7",
        "59",
        "60",
        "MON",
        "sun",
        "JAN",
        "L",
        "W",
        "#",
        "?",
        "@",
        "@yearly",
        "@reboot",
        " ",
        "  ",
        "999999999999",
        "-1",
        "é",
        "\n",
    ];
    let zones = ["UTC", "Australia/Lord_Howe", "Pacific/Apia", "Europe/Dublin", "Africa/Casablanca", "Nowhere/None"];
    let seeds = crons.iter().map(|cron| (*cron).to_owned()).collect();
    fuzz(seeds, words).run("schedules", |text| {
        let zone = zones[text.len() % zones.len()];
        let spec = ScheduleSpec { timezone: Some(zone.to_owned()), ..ScheduleSpec::new(text) };
        match Schedule::read(&spec) {
            Err(error) => error,
            Ok(schedule) => {
                let mut at = Timestamp::from_second(1_790_000_000).unwrap();
                for _ in 0..3 {
                    let Some(next) = schedule.next_after(at) else { return "ends".into() };
                    assert!(next > at, "a fire comes after the one before");
                    at = next;
                }
                text.chars().filter(|c| c.is_ascii_punctuation() || c.is_ascii_alphabetic()).collect()
            }
        }
    });
}
