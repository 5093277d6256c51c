//! Every construct of the language under the crash walk: a worker dies, or loses an
//! answer, at each commit of a run, and others bring the run to the same end; what
//! is done is done once, each effect under one key. `CAPX_WALK=full` dies at every
//! point of the way, else at some.

use capx_core::domain::run::RunStatus;
use futures_util::stream::{self, StreamExt as _};
use serde_json::{Value, json};

use crate::harness::witness::Witness;
use crate::harness::{Db, SHORT_LEASE, eventually};
use crate::process::Process;

/// A construct, what its run ends with, and the calls that it makes.
struct Construct {
    name: &'static str,
    yaml: &'static str,
    ends: RunStatus,
    calls: usize,
    /// How many calls there may be beside another, which a death takes along.
    beside: u32,
}

const CONSTRUCTS: &[Construct] = &[
    Construct {
        name: "loop",
        yaml: "
steps:
  - {id: draft, action: http.request, params: {method: POST, url: 'URL/draft'}}
  - {if: 'steps.draft.output.status == 200', goto: draft, max_retries: 2}
  - {id: left, if: 'false', action: http.request, params: {method: POST, url: 'URL/left'}}
  - {id: nap, sleep: 20ms}
  - {id: sent, action: http.request, params: {method: POST, url: 'URL/refused'}, on_failure: continue}
output: {draft: '${steps.draft.output.body.path}', sent: '${steps.sent.error.code}'}
",
        ends: RunStatus::Completed,
        calls: 4,
        beside: 0,
    },
    Construct {
        name: "list",
        yaml: "
steps:
  - {id: each, for_each: [1, 2, 3, 4], max_parallel: 2, action: http.request, params: {method: POST, url: 'URL/${item}'}}
output: '${len(steps.each.output)}'
",
        ends: RunStatus::Completed,
        calls: 4,
        beside: 1,
    },
    Construct {
        name: "closing",
        yaml: "
steps:
  - {id: reserve, action: http.request, params: {method: POST, url: 'URL/reserve'}, compensate: {action: http.request, params: {method: POST, url: 'URL/release'}}}
  - {id: charge, action: http.request, params: {method: POST, url: 'URL/charge'}, compensate: {action: http.request, params: {method: POST, url: 'URL/refund'}}}
  - {id: ship, action: http.request, params: {method: POST, url: 'URL/refused'}}
finally:
  - {id: report, action: http.request, params: {method: POST, url: 'URL/report/${run.status}'}}
",
        ends: RunStatus::Failed,
        calls: 6,
        beside: 0,
    },
    Construct {
        name: "graph",
        yaml: "
steps:
  - {id: a, needs: [], action: http.request, params: {method: POST, url: 'URL/a'}}
  - {id: b, needs: [], action: http.request, params: {method: POST, url: 'URL/b'}}
  - {id: nap, needs: [], sleep: 30ms}
  - {id: off, needs: a, if: 'false', action: http.request, params: {method: POST, url: 'URL/off'}}
  - {id: each, needs: [a, nap], for_each: [1, 2], max_parallel: 2, action: http.request, params: {method: POST, url: 'URL/each'}}
  - {id: end, needs: [b, each, off], action: http.request, params: {method: POST, url: 'URL/end'}}
output: '${steps.end.output.body.path}'
",
        ends: RunStatus::Completed,
        calls: 5,
        beside: 2,
    },
    Construct {
        name: "graph that fails",
        yaml: "
steps:
  - {id: a, needs: [], action: http.request, params: {method: POST, url: 'URL/a'}, compensate: {action: http.request, params: {method: POST, url: 'URL/undo'}}}
  - {id: b, needs: [a], action: http.request, params: {method: POST, url: 'URL/refused'}}
  - {id: wait, needs: [a], wait_for: never}
finally:
  - {id: report, action: http.request, params: {method: POST, url: 'URL/report/${run.status}'}}
",
        ends: RunStatus::Failed,
        calls: 4,
        beside: 1,
    },
    Construct {
        name: "calls",
        yaml: "
steps:
  - {id: a, action: http.request, params: {method: POST, url: 'URL/a'}}
  - {id: call, playbook: called, params: {n: 1}}
  - {id: each, for_each: [2, 3], max_parallel: 2, playbook: called, params: {n: '${item}'}}
output: '${steps.each.output[1].path}'
",
        ends: RunStatus::Completed,
        calls: 4,
        beside: 1,
    },
    Construct {
        name: "rubric",
        yaml: "
steps:
  - {id: good, action: http.request, params: {method: POST, url: 'URL/good'}, rubric: {tone: 0.5, is: {check: 'steps.good.output.status == 200'}, judge: a}}
  - {id: bad, action: http.request, params: {method: POST, url: 'URL/bad'}, on_failure: continue, rubric: {max_retries: 1, never: {check: 'false'}}}
output: {score: '${steps.good.score}', bad: '${steps.bad.error.code}'}
rubric: {max_cost: 1}
",
        ends: RunStatus::Completed,
        calls: 3,
        beside: 0,
    },
    Construct {
        name: "what may fail",
        yaml: "
steps:
  - {id: each, for_each: [1, refused, 3], min_success: 2, on_item_failure: continue, max_parallel: 2, action: http.request, params: {method: POST, url: 'URL/${item}'}}
  - {id: wait, wait_for: {event: never, timeout: 20ms}, on_failure: continue}
  - {id: gate, action: http.request, params: {method: POST, url: 'URL/gate'}, approval: {timeout: 20ms, on_timeout: approve}}
output: {done: '${steps.each.output[2].body.path}', failed: '${steps.each.output[1]}', why: '${steps.wait.error.code}'}
",
        ends: RunStatus::Completed,
        calls: 4,
        beside: 1,
    },
    Construct {
        name: "large",
        yaml: "
steps:
  - {id: a, action: transform, params: {t: 0123456789abcdef0123456789abcdef0123456789abcdef0123456789abcdef}}
  - {id: b, action: transform, params: {t: '${steps.a.output.t}${steps.a.output.t}${steps.a.output.t}${steps.a.output.t}${steps.a.output.t}${steps.a.output.t}${steps.a.output.t}${steps.a.output.t}'}}
  - {id: c, action: transform, params: {t: '${steps.b.output.t}${steps.b.output.t}${steps.b.output.t}${steps.b.output.t}${steps.b.output.t}${steps.b.output.t}${steps.b.output.t}${steps.b.output.t}'}}
  - {id: d, action: transform, params: {t: '${steps.c.output.t}${steps.c.output.t}${steps.c.output.t}${steps.c.output.t}${steps.c.output.t}${steps.c.output.t}${steps.c.output.t}${steps.c.output.t}'}}
  - {id: e, action: transform, params: {t: '${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}'}}
  - {id: each, for_each: [1, 2, 3, 4, 5, 6, 7, 8, 9], max_parallel: 2, action: transform, params: {t: '${steps.d.output.t}'}}
  - {id: sent, action: http.request, params: {method: POST, url: 'URL/large', body: '${steps.e.output.t}'}}
output: {e: '${steps.e.output.t}', each: '${steps.each.output}', all: ['${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}${steps.d.output.t}', '${steps.d.output.t}']}
",
        ends: RunStatus::Completed,
        calls: 1,
        beside: 0,
    },
];

/// When a step is handed to another run.
pub const CALL: &[&str] = &["call.before_commit", "call.after_commit"];

/// What the constructs call.
const CALLED: &str = "name: called
inputs: {n: integer}
steps:
  - {id: call, action: http.request, params: {method: POST, url: 'URL/called/${inputs.n}'}}
output: {path: '${steps.call.output.body.path}'}
";

/// A run's output, where it failed, and its steps with what they said.
type End = (Option<Value>, Option<String>, Vec<(i32, String, Option<Value>)>);

/// All that a run comes to, as far as it does not depend on who did it when.
async fn came_to(db: &Db, run: uuid::Uuid) -> End {
    let (output, error): (Option<Value>, Option<Value>) =
        sqlx::query_as("select output, error from runs where id = $1").bind(run).fetch_one(&db.pool).await.unwrap();
    let steps: Vec<(i32, String, Option<Value>)> =
        sqlx::query_as("select step, status, output from run_steps where run_id = $1 order by step")
            .bind(run)
            .fetch_all(&db.pool)
            .await
            .unwrap();
    // An answer's headers hold the time of day.
    let plain = |output: Option<Value>| {
        output.map(|mut output| {
            if let Some(output) = output.as_object_mut() {
                output.remove("headers");
            }
            if let Some(items) = output.as_array_mut() {
                items.iter_mut().filter_map(Value::as_object_mut).for_each(|item| drop(item.remove("headers")));
            }
            output
        })
    };
    let steps = steps.into_iter().map(|(step, status, output)| (step, status, plain(output))).collect();
    (output, error.map(|error| error["step"].to_string()), steps)
}

struct Walked {
    came_to: End,
    paths: Vec<String>,
    calls: u32,
    /// Events that tell of the end of a step.
    ends: i64,
}

/// Runs a construct, with a worker that meets a fault; whether it did.
async fn walk(construct: &Construct, fault: Option<(&str, &str, u32)>) -> (Walked, bool) {
    let db = Db::new().await;
    let witness = Witness::start(&[]).await;
    let company = db.company(&["a"], "claude", json!({})).await;
    let yaml = format!("name: {}{}", construct.name, construct.yaml.replace("URL", &witness.url));
    db.playbook(company, &CALLED.replace("URL", &witness.url)).await;
    let playbook = db.playbook(company, &yaml).await;
    let run = db.start(company, playbook, json!({})).await;
    let points = fault.map(|(point, what, hit)| format!("{point}={what}@{hit}")).unwrap_or_default();
    let mut worker = Process::worker(&db, &points);
    let mut survivor = None;
    eventually("the run to end, or its worker", || {
        let died = worker.child.try_wait().unwrap().is_some();
        let db = &db;
        async move { died || db.run(company, run).await.status.is_terminal() }
    })
    .await;
    if worker.child.try_wait().unwrap().is_some() {
        survivor = Some(db.worker(SHORT_LEASE));
    }
    db.until(company, run, construct.ends).await;
    // It may die over the last commit, and leave behind what else it had in hand.
    let idle = async || db.count("select count(*) from jobs where kind <> 'heartbeat'").await == 0;
    eventually("every job to be done, or its worker", || {
        let died = survivor.is_none() && worker.child.try_wait().unwrap().is_some();
        async move { died || idle().await }
    })
    .await;
    if !idle().await && survivor.is_none() {
        survivor = Some(db.worker(SHORT_LEASE));
    }
    eventually("every job to be done", idle).await;
    db.assert_nothing_stranded().await;
    drop(survivor);
    let ends = db.count("select count(*) from events where event in ('step.completed', 'step.failed')").await;
    let calls = witness.calls();
    let mut paths = witness.paths();
    paths.sort_unstable();
    let walked = Walked { came_to: came_to(&db, run.0).await, paths, calls: calls.values().sum(), ends };
    let met = fault.is_none_or(|(point, ..)| worker.met(point));
    (walked, met)
}

/// Walks one construct: a fault at each of its points, until the run is over before.
async fn survives(construct: &Construct, full: bool) {
    let (clean, _) = walk(construct, None).await;
    let calls = u32::try_from(construct.calls).unwrap();
    assert_eq!((clean.paths.len(), clean.calls), (construct.calls, calls), "{}: {:?}", construct.name, clean.paths);
    let mut died = 0;
    let faults: &[(&str, &str)] = if full {
        &[
            ("commit.before", "kill"),
            ("commit.after", "kill"),
            ("commit.before", "fail"),
            ("commit.after", "fail"),
            ("attempt.before_handler", "kill"),
            ("attempt.after_handler", "kill"),
            ("claim.after_commit", "kill"),
            ("load.before", "kill"),
        ]
    } else {
        &[("commit.after", "kill"), ("commit.after", "fail"), ("attempt.after_handler", "kill")]
    };
    let calling = CALL.iter().filter(|_| construct.yaml.contains("playbook:")).map(|point| (*point, "kill"));
    for (point, what) in faults.iter().copied().chain(calling) {
        // Until the run is over before its worker comes to the point.
        for hit in (1..).step_by(if full { 1 } else { 3 }) {
            let at = format!("{}: {what} at {point} {hit}", construct.name);
            let (walked, met) = walk(construct, Some((point, what, hit))).await;
            assert_eq!(walked.came_to, clean.came_to, "{at}");
            assert_eq!(walked.paths, clean.paths, "{at}: each effect under one key");
            assert_eq!(walked.ends, clean.ends, "{at}: a step was over twice, or never");
            // What a dead worker had in hand may be done again, nothing that was over.
            let again = match (point, what) {
                ("commit.after", "kill") => construct.beside,
                ("commit.after", _) => 0,
                _ => construct.beside + 1,
            };
            assert!(walked.calls <= calls + again, "{at}: {} calls, of {calls}", walked.calls);
            if !met {
                break;
            }
            died += 1;
        }
    }
    assert!(died >= 3, "{}: {died} faults", construct.name);
    println!("{}: {died} faults", construct.name);
}

#[tokio::test(flavor = "multi_thread")]
async fn every_construct_ends_the_same_whoever_dies_over_it() {
    let full = std::env::var("CAPX_WALK").is_ok_and(|walk| walk == "full");
    let only = std::env::var("CAPX_WALK_ONLY").ok();
    let constructs = CONSTRUCTS.iter().filter(|c| only.as_deref().is_none_or(|only| only == c.name));
    // Most of a walk is waiting, for leases above all.
    let walks = constructs.map(|construct| survives(construct, full));
    stream::iter(walks).buffer_unordered(3).collect::<()>().await;
}
