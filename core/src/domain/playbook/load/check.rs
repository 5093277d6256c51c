//! Checks over the whole playbook: references lead somewhere, schedules fire.

use super::step::Read;
use serde_json::{Map, Value};

use super::{Loader, Place, Use, graph, secrets};
use crate::domain::playbook::expr::Reference;
use crate::domain::playbook::model::{InputSpec, Step, StepKind, Trigger};
use crate::domain::playbook::problem::{Pos, Problem, did_you_mean, nearest};

/// What each item of a `for_each` has.
const OF_AN_ITEM: &[&str] = &["item", "index"];
const ROOTS: &[&str] = &["inputs", "steps", "run"];
/// What `run.…` holds.
const RUN_FIELDS: &[&str] = &["id", "playbook", "company_id"];
/// What it holds besides when its steps are over.
const RUN_FIELDS_AT_LAST: &[&str] = &["status", "error"];

pub(super) fn references(
    loader: &mut Loader,
    steps: &[Read],
    finally: &[Read],
    inputs: &[InputSpec],
    named: &Map<String, Value>,
) {
    let loops: Vec<(usize, usize)> =
        steps.iter().enumerate().filter_map(|(at, read)| read.step.jumps_back_from(at)).collect();
    let graph = (graph::is_graph(steps) && !loader.partial).then(|| graph::before(steps));
    for of in std::mem::take(&mut loader.uses) {
        if of.reference.name(0) == Some(secrets::ROOT) {
            secrets::check(loader, &of, named);
            continue;
        }
        let Use { place, optional, each, at, path, reference, .. } = of;
        if OF_AN_ITEM.contains(&reference.name(0).unwrap_or_default()) {
            if !each {
                let hint = Some("only the `params` of a step with `for_each` have it".to_owned());
                loader.suggest(at, &path, format!("`${{{reference}}}`: there is no item here"), hint);
            }
            continue;
        }
        if loader.partial && reference.name(0) == Some("steps") {
            continue;
        }
        let before = match place {
            Place::Start => 0,
            Place::Step(index) => {
                // Inside a loop, what comes later may have been done the time before.
                let around = loops.iter().filter(|(first, end)| (*first..=*end).contains(&index)).map(|(_, end)| *end);
                around.max().unwrap_or(index)
            }
            Place::Graded(index) | Place::Undo(index) => index + 1,
            Place::Finally(_) | Place::End => steps.len(),
        };
        let finally = match place {
            Place::Finally(index) => &finally[..index.min(finally.len())],
            _ => &[],
        };
        let known = |index: usize| match (place, &graph) {
            (Place::Step(at), Some(before)) => before[at][index],
            (Place::Graded(at) | Place::Undo(at), Some(before)) => index == at || before[at][index],
            _ => index < before,
        };
        let sees = Sees {
            before: steps.iter().enumerate().filter(|(index, _)| known(*index)).map(|(_, read)| read).collect(),
            graph: graph.is_some(),
            optional,
            finally,
            all: steps,
            inputs,
            at_last: matches!(place, Place::Undo(_) | Place::Finally(_)),
            draft: if let Place::Graded(at) = place { steps.get(at) } else { None },
        };
        check(loader, &reference, at, &path, &sees);
    }
}

/// What can be looked up in a place.
struct Sees<'a> {
    before: Vec<&'a Read>,
    graph: bool,
    /// What is not there is no error.
    optional: bool,
    finally: &'a [Read],
    all: &'a [Read],
    inputs: &'a [InputSpec],
    /// The run's steps are over.
    at_last: bool,
    /// The step whose draft is graded.
    draft: Option<&'a Read>,
}

fn check(loader: &mut Loader, reference: &Reference, at: Pos, path: &str, sees: &Sees<'_>) {
    let Sees { inputs, all, at_last, .. } = *sees;
    let before = || sees.before.iter().copied().chain(sees.finally);
    let name = reference.name(1).unwrap_or_default();
    match reference.name(0).unwrap_or_default() {
        "inputs" => {
            // Without declared inputs a run may bring any.
            if !inputs.is_empty() && !inputs.iter().any(|input| input.name == name) {
                loader.suggest(
                    at,
                    path,
                    format!("`${{{reference}}}`: there is no input `{name}`"),
                    did_you_mean(name, inputs.iter().map(|input| input.name.as_str())),
                );
            }
        }
        "steps" => {
            if !before().any(|read| read.step.id == name) {
                let ids = before().map(|read| read.step.id.as_str());
                let there = all.iter().any(|read| read.step.id == name);
                let (message, hint) = match (there, sees.graph) {
                    (true, true) => (
                        format!("`${{{reference}}}`: this need not wait for the step `{name}`"),
                        Some(format!("add `{name}` to its `needs`")),
                    ),
                    (true, false) => (
                        format!("`${{{reference}}}`: the step `{name}` does not come before this one"),
                        did_you_mean(name, ids),
                    ),
                    (false, _) => (format!("`${{{reference}}}`: there is no step `{name}`"), did_you_mean(name, ids)),
                };
                loader.suggest(at, path, message, hint);
            } else if let Some((field, fields)) = before()
                .find(|read| read.step.id == name && !sees.optional)
                .and_then(|read| Some((reference, read.step.rubric.is_some(), says(&read.step)?)))
                .and_then(|(reference, graded, fields)| Some((undeclared(reference, graded, &fields)?, fields)))
            {
                let near = did_you_mean(field, fields.iter().map(String::as_str));
                let hint =
                    near.or_else(|| Some(format!("it says {}", fields.join(", "))).filter(|_| !fields.is_empty()));
                loader.suggest(at, path, format!("`${{{reference}}}`: the step `{name}` says no `{field}`"), hint);
            } else if let Some(field) = reference.name(2)
                // A field of the output may be called so, and be meant.
                && field != "outputs"
                && nearest(field, ["output"]).is_some()
            {
                let tail: String =
                    reference.to_string().split('.').skip(3).map(|segment| format!(".{segment}")).collect();
                loader.suggest(
                    at,
                    path,
                    format!("`${{{reference}}}`: a step shows its `output`"),
                    Some(format!("write `${{steps.{name}.output{tail}}}`")),
                );
            }
        }
        "run" => {
            let early = !at_last && RUN_FIELDS_AT_LAST.contains(&name);
            if early {
                let hint = Some("only `finally` and `compensate` can look it up".to_owned());
                loader.suggest(at, path, format!("`${{{reference}}}`: the run is not over here"), hint);
            } else if !RUN_FIELDS.contains(&name) && !RUN_FIELDS_AT_LAST.contains(&name) {
                let known: Vec<&str> = RUN_FIELDS.iter().chain(RUN_FIELDS_AT_LAST).copied().collect();
                let known = if at_last { known.join(", ") } else { RUN_FIELDS.join(", ") };
                loader.suggest(
                    at,
                    path,
                    format!("`${{{reference}}}`: a run has no `{name}`"),
                    Some(format!("it has {known}")),
                );
            }
        }
        other => loader.suggest(
            at,
            path,
            format!("`${{{reference}}}`: there is no `{other}`"),
            match sees.draft.filter(|_| other == "output") {
                Some(draft) => Some(format!("write `${{steps.{}.{reference}}}`", draft.step.id)),
                None => {
                    did_you_mean(other, ROOTS.iter().copied()).or_else(|| Some("begin with `inputs` or `steps`".into()))
                }
            },
        ),
    }
}

/// What the output of a step holds, where that is known: what it declares, or what its
/// tool gives. Of a list it is a list.
fn says(step: &Step) -> Option<Vec<String>> {
    let names = |names: &[&str]| Some(names.iter().map(|name| (*name).to_owned()).collect());
    if step.fan.is_some() || !matches!(step.kind, StepKind::Work | StepKind::Playbook(_)) {
        return None;
    }
    if let Some(fields) = step.output.as_ref().and_then(|shape| shape.fields.as_ref()) {
        return Some(fields.iter().map(|(name, ..)| name.clone()).collect());
    }
    match step.action.as_str() {
        "http.request" => names(&["status", "headers", "body"]),
        "file.read" => names(&["path", "content", "bytes"]),
        "file.write" => names(&["path", "bytes", "sha256"]),
        "transform" => Some(step.params.keys().cloned().collect()),
        _ => None,
    }
}

/// The field of a step's output that a reference looks up, where it is none of these.
fn undeclared<'a>(reference: &'a Reference, graded: bool, fields: &[String]) -> Option<&'a str> {
    let field = match reference.name(2)? {
        // What is known of any step, and of one that is graded.
        "error" => return None,
        "score" if graded => return None,
        "output" => reference.name(3)?,
        field => field,
    };
    // A slip in `output` itself is told as such.
    let slip = reference.name(2) != Some("output") && nearest(field, ["output"]).is_some();
    (!slip && !fields.iter().any(|known| known == field)).then_some(field)
}

/// A playbook that calls itself in any case never ends.
pub(super) fn calls_itself(loader: &mut Loader, name: Option<&str>, steps: &[Read]) {
    for (index, Read { step, at, .. }) in steps.iter().enumerate() {
        let itself = matches!(&step.kind, StepKind::Playbook(called) if Some(called.as_str()) == name);
        if itself && step.condition.is_none() && step.fan.is_none() {
            let hint = Some("write `if` on the step, so that it ends".to_owned());
            loader.suggest(
                *at,
                &format!("steps.{index}.playbook"),
                "the playbook would call itself for ever".into(),
                hint,
            );
        }
    }
}

/// What starts by itself has nobody to ask. It can be started by a person, too, so
/// that an input without a value is worth a warning and no more.
pub(super) fn unattended(loader: &mut Loader, trigger: Option<&Trigger>, inputs: &[InputSpec], at: Pos) {
    let brought = match trigger {
        None | Some(Trigger::Manual) => return,
        Some(Trigger::Schedule(_)) => None,
        Some(Trigger::Webhook { .. } | Trigger::Event { .. }) => Some("event"),
    };
    let lacks = |input: &&InputSpec| input.required && input.default.is_none() && Some(input.name.as_str()) != brought;
    for input in inputs.iter().filter(lacks) {
        let message = format!("nobody gives `{}` when a run starts by itself", input.name);
        let hint = Some(match brought {
            None => "give it a `default`".to_owned(),
            Some(_) => "give it a `default`, or take it from the input `event`".to_owned(),
        });
        let path = format!("inputs.{}", input.name);
        loader.push(Problem { warning: true, ..Problem::error(at, path, message).suggest(hint) });
    }
}
