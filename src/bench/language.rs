//! The playbook language: how long authors wait for a check, and runs for a
//! condition. Nothing of it asks the database.

use std::borrow::Cow;
use std::fmt::Write as _;
use std::hint::black_box;
use std::time::{Duration, Instant};

use capx_core::domain::playbook;
use capx_core::domain::playbook::expr::{self, Budget, Reference, Scope};
use serde_json::{Value, json};

use super::Bench;
use super::latency::percentile;
use super::report::{Report, Target};

/// Steps of the playbook that is checked.
const STEPS: usize = 100;
/// A condition such as authors write.
const CONDITION: &str = "steps.review.output.score < 0.8 and not ('draft' in inputs.tags) and len(inputs.topic) > 3";

pub(super) fn run(bench: &Bench, report: &mut Report) -> anyhow::Result<()> {
    let text = large();
    let wrong = |problems: Vec<playbook::Problem>| anyhow::anyhow!("{}", problems[0]);
    playbook::load(&text).map_err(wrong)?;
    let mut took: Vec<Duration> = (0..bench.amount(500))
        .map(|_| {
            let began = Instant::now();
            let _ = black_box(playbook::load(black_box(&text)));
            began.elapsed()
        })
        .collect();
    report.add("language", "parse and check 100 steps, p50", percentile(&mut took, 0.5), "ms");
    let p99 = percentile(&mut took, 0.99);
    report.add("language", "parse and check 100 steps, p99", p99, "ms").target(Target::AtMost(10.0));

    let expr = expr::parse(CONDITION).map_err(anyhow::Error::msg)?;
    let scope = Names(json!({
        "steps": {"review": {"output": {"score": 0.7}}},
        "inputs": {"tags": ["final", "long"], "topic": "tides"},
    }));
    let rounds = bench.amount(1_000_000);
    let began = Instant::now();
    for _ in 0..rounds {
        let _ = black_box(expr.eval(black_box(&scope), &mut Budget::default()).map(Cow::into_owned));
    }
    let each = began.elapsed().as_secs_f64() * 1e6 / rounds as f64;
    report.add("language", "a condition of three parts", each, "us").target(Target::AtMost(5.0));
    Ok(())
}

struct Names(Value);

impl Scope for Names {
    fn lookup(&self, reference: &Reference) -> Option<(&Value, usize)> {
        self.0.get(reference.name(0)?).map(|value| (value, 1))
    }
}

/// A playbook of a hundred steps that use all of the language.
fn large() -> String {
    let mut text = String::from("name: large\ninputs: {topic: {type: string, default: tides}}\nsteps:\n");
    text.push_str("  - {id: s0, action: transform, params: {topic: '${inputs.topic}'}}\n");
    for at in 1..STEPS {
        let before = at - 1;
        let _ = writeln!(
            text,
            "  - id: s{at}\n    role: writer\n    action: write\n    if: steps.s{before}.score ?? 1 > 0.5\n    params:\n      text: 'about {{{{ inputs.topic | upper }}}}: ${{steps.s{before}.output}}'\n      tags: [one, two, '${{inputs.topic}}']\n    retry: {{max_attempts: 3, initial: 2s}}\n    timeout: 5m"
        );
    }
    text
}
