//! What is sent to break the language: how long it takes to refuse it, and how much
//! memory. Each input has a process of its own, so that what one takes is not hidden
//! by what another has left.

use std::hint::black_box;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use capx_core::domain::playbook::expr::{Reference, Scope};
use capx_core::domain::playbook::{self, STEPS_MAX, YAML_BYTES_MAX, inputs, template};
use serde_json::{Map, Value, json};

use super::report::{Report, Target};

/// The most that one may take, in milliseconds and MiB.
const TIME_MAX: f64 = 50.0;
const MEMORY_MAX: f64 = 32.0;
/// The variable that says which input a process is for.
const INPUT: &str = "CAPX_BENCH_HOSTILE";

/// Takes every input in a process of its own.
pub(super) async fn run(report: &mut Report) -> anyhow::Result<()> {
    let (mut slowest, mut largest) = (0.0_f64, 0.0_f64);
    for (at, (name, _)) in INPUTS.iter().enumerate() {
        let output = tokio::process::Command::new(std::env::current_exe()?)
            .args(["bench", "language"])
            .env(INPUT, at.to_string())
            .output()
            .await?;
        ensure!(output.status.success(), "`{name}`: {}", String::from_utf8_lossy(&output.stderr));
        let took: Value = serde_json::from_slice(&output.stdout).with_context(|| format!("of `{name}`"))?;
        let figure = |key: &str| took[key].as_f64().with_context(|| format!("`{name}` has no {key}"));
        slowest = slowest.max(figure("ms")?);
        largest = largest.max(figure("mib")?);
    }
    report.add("language", "the slowest of 16 hostile inputs", slowest, "ms").target(Target::AtMost(TIME_MAX));
    report.add("language", "the largest of them", largest, "MiB").target(Target::AtMost(MEMORY_MAX));
    Ok(())
}

/// Which input this process is for, where it is for one.
pub(super) fn asked() -> Option<usize> {
    std::env::var(INPUT).ok()?.parse().ok()
}

/// Takes one input, and says what it took.
pub(super) fn one(at: usize) -> anyhow::Result<Value> {
    let (_, take) = INPUTS.get(at).context("there is no such input")?;
    let before = peak()?;
    let ms = take().as_secs_f64() * 1e3;
    Ok(json!({"ms": ms, "mib": (peak()? - before) as f64 / 1024.0}))
}

/// The most memory that this process has had, in KiB.
fn peak() -> anyhow::Result<i64> {
    let status = std::fs::read_to_string("/proc/self/status").context("memory is measured on Linux only")?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Makes an input, and takes it; says how long that was, without the making.
type Take = fn() -> Duration;

/// What is sent, by name.
const INPUTS: [(&str, Take); 16] = [
    ("a bomb of aliases", || {
        let mut text = String::from("a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n");
        for at in 1..30 {
            let before = format!("*a{}, ", at - 1).repeat(10);
            text.push_str(&format!("a{at}: &a{at} [{}]\n", before.trim_end_matches(", ")));
        }
        refused(&(text + "name: x\nsteps: *a29\n"))
    }),
    ("an anchor in itself", || refused("name: x\nsteps: &a [*a]\n")),
    ("a merge of itself", || refused("name: x\nsteps:\n  - &a {id: a, action: transform, <<: *a}\n")),
    ("20,000 nested lists", || refused(&format!("name: x\nsteps: {}{}", "[".repeat(20_000), "]".repeat(20_000)))),
    ("20,000 nested maps", || refused(&format!("name: x\nsteps: {}", "{a: ".repeat(20_000)))),
    ("a deep block", || {
        let lines: Vec<String> = (0..500).map(|depth| format!("{}a:\n", " ".repeat(depth))).collect();
        refused(&format!("name: x\nsteps:\n{}", lines.concat()))
    }),
    ("a text of 10 MB", || refused(&format!("name: x\nsteps:\n  - {{id: a, action: '{}'}}", "x".repeat(10_000_000)))),
    ("a text as large as may be", || {
        let text = "x".repeat(YAML_BYTES_MAX - 60);
        taken(&format!("name: x\nsteps:\n  - {{id: a, action: transform, params: {{a: {text}}}}}"))
    }),
    ("as many steps as go in", || {
        let steps: String =
            (0..STEPS_MAX).map(|n| format!("  - {{id: s{n}, action: transform, params: {{a: 1}}}}\n")).collect();
        taken(&format!("name: x\nsteps:\n{steps}"))
    }),
    ("nothing but faults", || {
        let steps: String =
            (0..4_900).map(|n| format!("  - {{id: s{n}, acton: transform, goto: nowhere{n}}}\n")).collect();
        refused(&format!("name: x\nsteps:\n{steps}"))
    }),
    ("types that YAML once had", || {
        taken("name: x\nsteps:\n  - {id: a, action: transform, params: {a: NO, b: 012, c: 1e3, d: 0b1}}\n")
    }),
    ("3,000 parentheses", || condition(&"(".repeat(3_000))),
    ("3,000 closed parentheses", || condition(&format!("{}1{}", "(".repeat(3_000), ")".repeat(3_000)))),
    ("a sum of 100,000", || condition(&["1"; 100_000].join(" + "))),
    ("a template in a value", || {
        let template = template::compile(&json!("{{ '{{secrets.x}}' }}")).expect("it compiles");
        let began = Instant::now();
        let rendered = template.render(&Nothing).expect("it is rendered");
        assert_eq!(rendered, json!("{{secrets.x}}"), "it was read twice");
        began.elapsed()
    }),
    ("(a+)+$", || {
        let text = "name: x\ninputs: {a: {type: string, pattern: '(a+)+$'}}\nsteps:\n  - {id: a, action: transform, params: {a: 1}}\n";
        let began = Instant::now();
        let playbook = playbook::load(text).expect("it loads");
        let given: Map<String, Value> = Map::from_iter([("a".to_owned(), json!("a".repeat(200_000) + "!"))]);
        assert!(inputs::resolve(&playbook, given).is_err());
        began.elapsed()
    }),
];

fn refused(text: &str) -> Duration {
    let began = Instant::now();
    assert!(black_box(playbook::read(text)).is_err(), "it was taken");
    began.elapsed()
}

fn taken(text: &str) -> Duration {
    let began = Instant::now();
    if let Err(problems) = black_box(playbook::read(text)) {
        panic!("it was refused: {}", problems[0]);
    }
    began.elapsed()
}

fn condition(text: &str) -> Duration {
    refused(&format!("name: x\nsteps:\n  - {{id: a, if: \"{text}\", action: transform, params: {{a: 1}}}}\n"))
}

struct Nothing;

impl Scope for Nothing {
    fn lookup(&self, _: &Reference) -> Option<(&Value, usize)> {
        None
    }
}
