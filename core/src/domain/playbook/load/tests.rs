use std::time::Duration;

use super::*;
use crate::domain::playbook::model::{OnFailure, OnTimeout, Pause, StepKind};

const WEEKLY: &str = "name: Weekly Market Report
trigger:
  schedule: '0 9 * * MON'
steps:
  - role: researcher
    action: research
    params:
      topic: 'market trends'
      depth: comprehensive
  - role: writer
    action: compile_report
    params:
      format: pdf
      sections: [summary, data, recommendations]
rubric:
  min_sources: 5
  max_cost: 5.00
";

fn problems(text: &str) -> Vec<String> {
    load(text).expect_err("has problems").iter().map(ToString::to_string).collect()
}

#[test]
fn the_api_dialect_loads_as_printed() {
    let playbook = load(WEEKLY).expect("loads");
    assert_eq!(playbook.name, "Weekly Market Report");
    let ids: Vec<_> = playbook.steps.iter().map(|s| s.id.as_str()).collect();
    assert_eq!(ids, ["research", "compile_report"]);
    assert_eq!(playbook.trigger.to_json(), serde_json::json!({"type": "schedule", "schedule": "0 9 * * MON"}));
    assert_eq!(playbook.rubric, Some(serde_json::json!({"min_sources": 5, "max_cost": 5.0})));
}

#[test]
fn the_guide_and_platform_dialects_are_the_same_model() {
    let guide = load("name: hello-world\nversion: 1\ntrigger: {type: scheduled, cron: '0 9 * * 1-5'}\nsteps:\n  - id: greet\n    agent: strategist\n    tool: send_message\n    with: { channel: general, body: hi }\n").expect("loads");
    assert_eq!(guide.steps[0].role.as_deref(), Some("strategist"));
    assert_eq!(guide.steps[0].action, "send_message");
    let (platform, warnings) = read("playbook: content\nversion: 3\ntrigger: scheduled\nschedule: '0 9 * * MON'\ninputs:\n  topic: { type: string, required: true }\n  tone: { type: string, default: professional }\nsteps:\n  - name: research\n    agent: strategist\n    tool: web-research\n    with: { query: '${inputs.topic}', depth: comprehensive }\n    rubric: { relevance: 0.8 }\n  - name: review\n    agent: strategist\n    tool: content-review\n    with: { draft: '${steps.research.output}' }\n    approval: required\n").expect("loads");
    assert_eq!(platform.inputs.len(), 2);
    let approval = platform.steps[1].approval.as_ref().expect("a gate");
    assert_eq!((approval.timeout, approval.on_timeout), (Duration::from_secs(86_400), OnTimeout::Reject));
    // Nobody gives the topic at nine on Mondays; a person may at other times.
    assert_eq!(warnings.iter().map(|w| w.path.as_str()).collect::<Vec<_>>(), ["inputs.topic"]);
}

#[test]
fn every_problem_is_told_at_once_with_its_place() {
    let found = problems(
        "nam: x\nsteps:\n  - role: writer\n    action: write\n    params: {a: '${steps.reserch.output}'}\n    timout: 5s\n  - id: b\n    action: http.requst\n    timeout: 5\n",
    );
    assert_eq!(
        found,
        [
            "1:1: nam: unknown key `nam`; did you mean `name`?",
            "1:1: name: a playbook needs a `name`",
            "5:17: steps.0.params.a: `${steps.reserch.output}`: there is no step `reserch`",
            "6:5: steps.0.timout: unknown key `timout`; did you mean `timeout`?",
            "8:13: steps.1.action: unknown tool `http.requst`; did you mean `http.request`?",
            "9:14: steps.1.timeout: `5` is not a duration; write a number and a unit, such as 100ms, 2s, 5m, 1h or 1d",
        ]
    );
}

#[test]
fn references_must_lead_to_what_comes_before() {
    let head = "name: x\ninputs: {topic: string}\nsteps:\n  - {id: a, role: w, action: t}\n  - {id: c, role: w, action: t, params: {v: '";
    let tail = "'}}\n  - {id: b, role: w, action: t}\n";
    for good in
        ["${steps.a}", "${steps.a.output}", "${steps.a.title}", "${steps.a.score > 0.5 and len(inputs.topic) < 9}"]
    {
        load(&format!("{head}{good}{tail}")).expect(good);
    }
    for (reference, expected) in [
        ("${inputs.topc}", "there is no input `topc`; did you mean `topic`?"),
        ("${steps.b.output}", "the step `b` does not come before this one"),
        ("${secret.x}", "there is no `secret`; begin with"),
        ("${secrets.x}", "only a tool is given a secret"),
        ("${steps.a.outptu.x}", "write `${steps.a.output.x}`"),
        ("${run.idd}", "a run has no `idd`"),
        ("${inputs.topic", "has no closing `}`"),
    ] {
        let found = problems(&format!("{head}{reference}{tail}"));
        assert!(found[0].contains(expected), "{reference}: {found:?}");
    }
}

#[test]
fn a_schedule_must_be_one_that_fires() {
    for (cron, expected) in [
        ("every monday 9am", "is no cron expression: five fields, found 3"),
        ("99 9 * * MON", "is no cron expression"),
        ("0 0 31 2 *", "never fires"),
    ] {
        let found = problems(&format!("name: x\ntrigger: {{schedule: '{cron}'}}\nsteps: [{{role: a, action: b}}]\n"));
        assert!(found[0].contains(expected), "{cron}: {found:?}");
    }
    for good in ["@daily", "@hourly", "@weekly", "0 9 * * 1-5", "*/15 * * JAN MON"] {
        load(&format!("name: x\ntrigger: {{schedule: '{good}'}}\nsteps: [{{role: a, action: b}}]\n")).expect(good);
    }
}

#[test]
fn retry_timeout_and_approval_are_read_and_bounded() {
    let text = "name: x\nsteps:\n  - role: a\n    action: b\n    timeout: 90s\n    retry: {max_attempts: 3, initial: 2s, max: 1m, backoff: constant, jitter: false, on: [transient]}\n    approval: {timeout: 4h, on_timeout: approve, message: look}\n";
    let step = load(text).expect("loads").steps.remove(0);
    assert_eq!(step.timeout, Duration::from_secs(90));
    assert_eq!(step.retry.max_attempts, 3);
    assert_eq!(step.retry.backoff.delay(5, 0.5), Duration::from_secs(2));
    assert_eq!(step.approval.expect("a gate").on_timeout, OnTimeout::Approve);
    for (key, expected) in [
        ("retry: 0", "a number from 1 to 100"),
        ("retry: {max_attempts: 1000}", "a number from 1 to 100"),
        ("retry: {on: [oops]}", "unknown error class `oops`"),
        ("approval: requierd", "did you mean `required`?"),
        ("timeout: 0s", "longer than nothing"),
        ("prompt: x", "does not carry out `prompt` yet"),
    ] {
        let found = problems(&format!("name: x\nsteps:\n  - role: a\n    action: b\n    {key}\n"));
        assert!(found[0].contains(expected), "{key}: {found:?}");
    }
}

#[test]
fn synonyms_must_agree_and_ids_be_unique() {
    let found = problems(
        "name: x\nsteps:\n  - {id: a, role: w, agent: v, action: t}\n  - {id: a, role: w, action: t}\n  - {id: 'a b', role: w, action: t}\n  - {action: dance}\n",
    );
    assert!(found[0].contains("`role` and `agent` mean the same"), "{found:?}");
    assert!(found[1].contains("another step is called `a`"), "{found:?}");
    assert!(found[2].contains("`a b` cannot be referred to"), "{found:?}");
    assert!(found[3].contains("needs a `role`"), "{found:?}");
}

#[test]
fn conditions_jumps_and_pauses_are_read() {
    let text = "name: x\nsteps:\n  - {id: draft, role: w, action: t}\n  - {name: review, role: w, action: t, on_failure: continue}\n  - if: steps.review.score < 0.8\n    goto: draft\n    max_retries: 2\n  - {sleep: 2s, if: true}\n  - {id: nap, sleep: '{{ inputs.n }}'}\n  - {id: end, action: transform, on_failure: abort}\n";
    let steps = load(text).expect("loads").steps;
    let ids: Vec<_> = steps.iter().map(|step| (step.id.as_str(), step.action.as_str())).collect();
    assert_eq!(
        ids,
        [("draft", "t"), ("review", "t"), ("goto", "goto"), ("sleep", "sleep"), ("nap", "sleep"), ("end", "transform")]
    );
    assert!(matches!(steps[2].kind, StepKind::Goto { target: 0, jumps_max: 2 }));
    assert!(matches!(steps[3].kind, StepKind::Sleep(Pause::Fixed(d)) if d == Duration::from_secs(2)));
    assert_eq!((steps[1].on_failure, steps[5].on_failure), (OnFailure::Continue, OnFailure::Abort));
    // The review's word is needed as long as the loop may come again.
    assert_eq!(steps[1].last_use, Some(2));
}

#[test]
fn what_leads_nowhere_is_named() {
    let before = "name: x\nsteps:\n  - {id: a, action: transform}\n  - ";
    let after = "\n  - {id: z, action: transform}\n";
    for (step, expected) in [
        ("{goto: b, max_retries: 1}", "there is no step `b`"),
        ("{goto: z, max_retries: 1}", "`z` does not come before this step"),
        ("{goto: a}", "a `goto` without a limit may never end"),
        ("{goto: a, max_retries: 0}", "a number from 1 to 10000"),
        ("{goto: a, max_retries: 9000}", "over the limit of 10000 a run"),
        ("{goto: a, max_retries: 1, sleep: 2s}", "`goto` and `sleep` are two things"),
        ("{action: transform, goto: a, max_retries: 1}", "`action` and `goto` are two things"),
        ("{action: transform, max_retries: 2}", "write `retry: {max_attempts: 3}`"),
        ("{sleep: 5}", "`5` is not a duration"),
        ("{sleep: '${inputs.}'}", "unexpected `}`"),
        ("{wait_for: {timeout: 1h}}", "a wait needs the name of an `event`"),
        ("{wait_for: 'a b'}", "`a b` cannot be an event's name"),
        ("{wait_for: {event: x, timeout: 1}}", "`1` is not a duration"),
        ("{wait_for: {event: x, match: y}}", "expected a map of what the event's data holds"),
        ("{wait_for: {event: x, matches: y}}", "did you mean `match`?"),
        ("{wait_for: {event: 'x-${inputs.}'}}", "unexpected `}`"),
        ("{sleep: 1s, approval: required}", "belongs to a step with an `action`, not to a `sleep`"),
        ("{wait_for: x, role: w}", "not to a `wait_for`"),
        ("{goto: a, max_retries: 1, retry: 3}", "not to a `goto`"),
        ("{wait_for: x, sleep: 1s}", "`sleep` and `wait_for` are two things"),
        ("{action: transform, if: 'steps.zz.output == 1'}", "there is no step `zz`"),
        ("{action: transform, if: 'steps.z.output == 1'}", "does not come before this one"),
        ("{action: transform, if: 'a = 1'}", "write `==`"),
        ("{action: transform, if: '\"${steps.a.output}\" == \"x\"'}", "text in quotes is text"),
        ("{action: transform, if: [1]}", "expected text, found a list"),
        ("{action: transform, on_failure: contnue}", "did you mean `continue`?"),
        ("{id: b, action: transform, on_failure: a}", "`a` does not come after this step"),
        ("{id: b, action: transform, on_failure: b}", "`b` does not come after this step"),
    ] {
        let found = problems(&format!("{before}{step}{after}"));
        assert!(found.iter().any(|said| said.contains(expected)), "{step}: {found:?}");
    }
}
