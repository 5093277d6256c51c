use super::*;
use crate::domain::playbook;
use proptest::prelude::*;
use serde_json::json;

fn context(yaml: &str, inputs: Value) -> RunContext {
    let playbook = Arc::new(playbook::load(yaml).expect("loads"));
    RunContext::new(CompanyId::new(), PlaybookId::new(), RunId::new(), playbook, Arc::new(inputs))
}

fn on(next: Next) -> Decision {
    Decision::Advance(Walk { passed: Vec::new(), next })
}

fn place_of(next: &Next) -> Option<usize> {
    match next {
        Next::Step(step) | Next::Sleep { step, .. } => Some(*step),
        Next::Gate(gate) => Some(gate.step),
        Next::End { .. } | Next::Closed | Next::Junction => None,
    }
}

const THREE: &str = "name: x\nsteps:\n  - {id: a, role: w, action: t, retry: {max_attempts: 3, jitter: false}}\n  - {id: b, role: w, action: t, params: {v: '${steps.a.output.n}'}}\n  - {id: c, role: w, action: t, params: {v: 1}, approval: required}\noutput: '${steps.b.output}'\n";

#[test]
fn steps_follow_one_another_to_the_end() {
    let mut run = context(THREE, json!({}));
    let done = |v| Outcome::done(json!({"n": v}));
    assert_eq!(run.decide(0, 1, &done(7), 0.0), on(Next::Step(1)));
    let step = run.playbook.steps[1].clone();
    assert_eq!(run.params(&step), Ok(json!({"v": 7}).as_object().cloned().expect("a map")));
    let Decision::Advance(Walk { next: Next::Gate(gate), .. }) = run.decide(1, 1, &done(8), 0.0) else {
        panic!("a gate stands before c")
    };
    assert_eq!(gate.context["params"], json!({"v": 1}));
    assert_eq!(run.decide(2, 1, &done(9), 0.0), on(Next::End { output: Some(json!({"n": 8})) }));
    // Only what is still referred to is carried along.
    assert_eq!(run.outputs.keys().collect::<Vec<_>>(), [&1]);
}

#[test]
fn run_parameters_override_where_no_inputs_are_declared() {
    let run = context(
        "name: x\nsteps:\n  - {role: w, action: t, params: {topic: a, depth: b}}\n",
        json!({"topic": "z", "extra": 1}),
    );
    let params = run.params(&run.playbook.steps[0]).expect("renders");
    assert_eq!(Value::Object(params), json!({"topic": "z", "depth": "b"}));
}

#[test]
fn classes_decide_about_retries() {
    let mut run = context(THREE, json!({}));
    let failed = |class| Outcome::failed(Failure::new(class, "x"));
    assert_eq!(
        run.decide(0, 2, &failed(ErrorClass::Transient), 0.0),
        Decision::Retry { delay: Duration::from_secs(2), charged: true }
    );
    assert_eq!(run.decide(0, 3, &failed(ErrorClass::Transient), 0.0), Decision::Fail { reason: DeadReason::Exhausted });
    assert_eq!(run.decide(0, 1, &failed(ErrorClass::Invalid), 0.0), Decision::Fail { reason: DeadReason::Invalid });
    assert_eq!(run.decide(0, 1, &failed(ErrorClass::Crash), 0.0), Decision::Fail { reason: DeadReason::Quarantined });
    let mut asked = Failure::new(ErrorClass::RateLimited, "slow down");
    asked.retry_after = Some(Duration::from_secs(99_999_999));
    assert_eq!(
        run.decide(0, 3, &Outcome::failed(asked.clone()), 0.0),
        Decision::Retry { delay: RETRY_AFTER_MAX, charged: false }
    );
    asked.retry_after = Some(Duration::ZERO);
    let hurried = Outcome::failed(asked);
    assert!(!matches!(run.decide(0, 3, &hurried, 0.0), Decision::Retry { charged: false, .. }));
}

proptest! {
    /// However the attempts fall out, a run ends: tries are bounded, and
    /// each success moves it on by exactly one step.
    #[test]
    fn every_run_ends_within_its_tries(fates in prop::collection::vec(0u8..3, 200)) {
        let mut run = context(THREE, json!({}));
        let (mut step, mut attempt, mut ended) = (0usize, 0u32, false);
        for fate in fates {
            attempt += 1;
            let outcome = match fate {
                0 => Outcome::done(json!({"n": 1})),
                1 => Outcome::failed(Failure::new(ErrorClass::Transient, "x")),
                _ => Outcome::failed(Failure::new(ErrorClass::Timeout, "x")),
            };
            match run.decide(step, attempt, &outcome, 0.5) {
                Decision::Advance(Walk { next: Next::End { .. }, .. }) => { prop_assert_eq!(step, 2); ended = true; break }
                Decision::Advance(walk) => {
                    let next = place_of(&walk.next).expect("a step");
                    prop_assert_eq!(next, step + 1);
                    (step, attempt) = (next, 0);
                }
                Decision::GoPast(_) | Decision::Wait { .. } | Decision::Fan(_) => prop_assert!(false),
                Decision::Fail { .. } => { ended = true; break }
                Decision::Retry { .. } => prop_assert!(attempt < run.playbook.steps[step].retry.max_attempts),
                Decision::Release { .. } => prop_assert!(false),
            }
        }
        prop_assert!(ended);
    }
}

const REVIEWED: &str = "name: x
steps:
  - {id: draft, role: w, action: t, params: {last: \"${steps.review.feedback ?? 'none'}\"}}
  - {id: review, role: w, action: t, params: {draft: '${steps.draft.output}'}}
  - {if: steps.review.score < 0.8, goto: draft, max_retries: 2}
  - {id: nap, sleep: '${inputs.nap}', if: inputs.nap}
  - {id: publish, role: w, action: t, params: {draft: '${steps.draft.output}'}, on_failure: continue}
  - {id: after, role: w, action: t, if: 'steps.publish.error', params: {why: '${steps.publish.error.message}'}}
output: ${steps.draft.output}
";

#[test]
fn a_loop_goes_on_until_it_is_good_or_used_up() {
    let mut run = context(REVIEWED, json!({"nap": null}));
    let said = |v: Value| Outcome::done(v);
    let round = |run: &mut RunContext, n: i64, score: f64| {
        assert_eq!(run.decide(0, 1, &said(json!({"n": n})), 0.0), on(Next::Step(1)));
        run.decide(1, 1, &said(json!({"score": score, "feedback": n})), 0.0)
    };
    let back = |jumps| {
        Decision::Advance(Walk { passed: vec![Passed::Jumped { step: 2, target: 0, jumps }], next: Next::Step(0) })
    };
    let keys = |run: &RunContext| digest::idempotency_key(run.run, "draft", run.round(), None);
    let first = keys(&run);
    assert_eq!(round(&mut run, 1, 0.5), back(1));
    // The second time, the first step knows what the review said, and its effects
    // are others.
    let draft = run.playbook.steps[0].clone();
    assert_eq!(run.params(&draft).expect("renders")["last"], json!(1));
    assert_ne!(keys(&run), first);
    assert_eq!(round(&mut run, 2, 0.5), back(2));
    // Not good, but used up: on, past the pause that nobody wants.
    let on_past = Decision::Advance(Walk { passed: vec![Passed::Skipped(3)], next: Next::Step(4) });
    assert_eq!(round(&mut run, 3, 0.5), on_past);
    let mut run = context(REVIEWED, json!({"nap": "2h"}));
    let sleeps = on(Next::Sleep { step: 3, delay: Duration::from_secs(7_200) });
    assert_eq!(round(&mut run, 1, 0.9), sleeps);
    assert_eq!(run.decide(3, 1, &said(Value::Null), 0.0), on(Next::Step(4)));
}

#[test]
fn a_step_that_may_fail_is_gone_past_and_asked_about() {
    let mut run = context(REVIEWED, json!({"nap": null}));
    Arc::make_mut(&mut run.outputs).insert(0, json!({"n": 1}));
    let failed = Outcome::failed(Failure::invalid("no printer"));
    assert_eq!(run.decide(4, 1, &failed, 0.0), Decision::GoPast(Walk { passed: Vec::new(), next: Next::Step(5) }));
    let after = run.playbook.steps[5].clone();
    assert_eq!(run.params(&after).expect("renders")["why"], json!("no printer"));
    assert_eq!(run.decide(5, 1, &Outcome::done(json!(1)), 0.0), on(Next::End { output: Some(json!({"n": 1})) }));
    // Where it has not failed, there is nothing to tell.
    let mut run = context(REVIEWED, json!({"nap": null}));
    Arc::make_mut(&mut run.outputs).insert(0, json!(1));
    let end = Walk { passed: vec![Passed::Skipped(5)], next: Next::End { output: Some(json!(1)) } };
    assert_eq!(run.decide(4, 1, &Outcome::done(json!(1)), 0.0), Decision::Advance(end));
}

#[test]
fn a_failure_may_lead_to_a_later_step() {
    let yaml = "name: x\nsteps:\n  - {id: a, role: w, action: t, on_failure: mop}\n  - {id: b, role: w, action: t}\n  - {id: mop, role: w, action: t}\n";
    let mut run = context(yaml, json!({}));
    let failed = Outcome::failed(Failure::invalid("x"));
    let past = Walk { passed: vec![Passed::Skipped(1)], next: Next::Step(2) };
    assert_eq!(run.decide(0, 1, &failed, 0.0), Decision::GoPast(past));
}

#[test]
fn what_is_no_step_is_not_gone_past() {
    let yaml =
        "name: x\nsteps:\n  - {id: a, role: w, action: t, needs: []}\n  - {id: b, role: w, action: t, needs: a}\n";
    let crash = Outcome::failed(Failure::new(ErrorClass::Crash, "gone"));
    let mut run = context(yaml, json!({}));
    assert_eq!(run.decide(0, 1, &crash, 0.0), Decision::GoPast(Walk { passed: Vec::new(), next: Next::Junction }));
    // The junction: nobody is behind it to say how the run ends.
    assert_eq!(run.decide(usize::MAX, 1, &crash, 0.0), Decision::Fail { reason: DeadReason::Quarantined });
}

#[test]
fn a_loop_in_which_nothing_is_done_goes_round_once() {
    let yaml = "name: x\nsteps:\n  - {id: a, action: transform, if: false}\n  - {goto: a, max_retries: 4900}\n  - {id: b, action: transform}\n";
    let mut run = context(yaml, json!({}));
    let walk = run.walk(0);
    let back = Passed::Jumped { step: 1, target: 0, jumps: 1 };
    assert_eq!(walk, Walk { passed: vec![Passed::Skipped(0), back, Passed::Skipped(0)], next: Next::Step(2) });
}

#[test]
fn a_jump_that_is_left_out_keeps_its_count() {
    let yaml = "name: x\nsteps:\n  - {id: a, role: w, action: t, on_failure: end}\n  - {id: b, role: w, action: t}\n  - {goto: b, max_retries: 3}\n  - {id: end, role: w, action: t}\n";
    let mut run = context(yaml, json!({}));
    run.jumps.insert(2, 3);
    Arc::make_mut(&mut run.outputs).insert(1, json!("old"));
    let failed = Outcome::failed(Failure::invalid("x"));
    let past = Walk { passed: vec![Passed::Skipped(1)], next: Next::Step(3) };
    assert_eq!(run.decide(0, 1, &failed, 0.0), Decision::GoPast(past));
    assert_eq!((run.round(), run.outputs.get(&1)), (3, None));
}

#[test]
fn what_gives_no_value_is_tried_and_says_why() {
    let yaml =
        "name: x\nsteps:\n  - {id: a, action: transform, if: inputs.n > 3}\n  - {id: s, sleep: '${inputs.pause}'}\n";
    let mut run = context(yaml, json!({"n": "x", "pause": true}));
    assert_eq!(run.walk(0), Walk { passed: Vec::new(), next: Next::Step(0) });
    let said = run.holds(&run.playbook.steps[0]).expect_err("no value").message;
    assert!(said.contains("text cannot be compared with a number"), "{said}");
    assert_eq!(run.walk(1).next, Next::Step(1));
    for (pause, wanted) in [
        (json!("90s"), Some(90.0)),
        (json!(0.5), Some(0.5)),
        (json!(-1), None),
        (json!("x"), None),
        (json!(1e18), None),
    ] {
        let mut run = context(yaml, json!({"n": 1, "pause": pause}));
        let delay = match run.walk(1).next {
            Next::Sleep { delay, .. } => Some(delay.as_secs_f64()),
            _ => None,
        };
        assert_eq!(delay, wanted, "{pause}");
    }
    // Past everything there is an end.
    let mut run = context("name: x\nsteps: [{id: a, action: transform, if: false}]\n", json!({}));
    assert_eq!(run.walk(0), Walk { passed: vec![Passed::Skipped(0)], next: Next::End { output: None } });
}

proptest! {
    /// Whatever loops there are and whatever the conditions say, a run ends within
    /// the limit of its steps.
    #[test]
    fn every_walk_ends(
        loops in prop::collection::vec((0usize..6, 0usize..6, 1u32..4), 0..4),
        flips in prop::collection::vec(any::<bool>(), 1..64),
    ) {
        let mut yaml = String::from("name: x\nsteps:\n");
        for at in 0..6 {
            let condition = if at > 0 { ", if: 'steps.s0.yes ?? true'" } else { "" };
            yaml.push_str(&format!("  - {{id: s{at}, action: transform{condition}}}\n"));
            for (from, to, max) in loops.iter().filter(|(from, to, _)| *from == at && to <= from) {
                yaml.push_str(&format!("  - {{goto: s{to}, if: 'steps.s{from}.yes ?? false', max_retries: {max}}}\n"));
            }
        }
        let mut run = context(&yaml, json!({}));
        let mut flips = flips.iter().cycle();
        let mut walk = run.walk(0);
        let mut taken = 0;
        while let Some(step) = place_of(&walk.next) {
            taken += 1;
            prop_assert!(taken < 1_000, "{yaml}");
            match run.decide(step, 1, &Outcome::done(json!({"yes": flips.next()})), 0.0) {
                Decision::Advance(next) => walk = next,
                other => prop_assert!(false, "{other:?}"),
            }
        }
    }
}
