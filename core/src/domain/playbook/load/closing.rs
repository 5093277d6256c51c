//! What is done when a run's steps are over: `compensate` of a step, which undoes it,
//! and `finally`, which is done in any case.

use std::collections::HashSet;

use super::step::{self, Read};
use super::{Fields, Loader, Place};
use crate::domain::playbook::keys;
use crate::domain::playbook::model::{OnFailure, Step, StepKind};
use crate::domain::playbook::yaml::{Kind, Node};

/// How many steps `finally` may have.
const FINALLY_MAX: usize = 100;
/// What a step of `finally` has not: it is done once, when all else is over, and
/// nobody is asked.
const NOT_FINALLY: &[&str] = &["needs", "for_each", "approval", "compensate", "rubric"];

/// `compensate: cancel_order`, or a map: what undoes a step once it is done.
pub(super) fn compensate(loader: &mut Loader, node: &Node, path: &str, id: &str, role: Option<&str>) -> Option<Step> {
    let path = format!("{path}.compensate");
    let Place::Step(of) = loader.place else { return None };
    loader.place = Place::Undo(of);
    let step = undoing(loader, node, &path, id, role);
    loader.place = Place::Step(of);
    step.map(|step| Step { undoes: Some(of), ..step })
}

fn undoing(loader: &mut Loader, node: &Node, path: &str, id: &str, role: Option<&str>) -> Option<Step> {
    let empty = Node { at: node.at, kind: Kind::Map(Vec::new()) };
    let short = matches!(node.kind, Kind::Str(_));
    let fields = Fields::open(loader, if short { &empty } else { node }, path, keys::COMPENSATE, &[])?;
    let Some(action_node) = (if short { Some(node) } else { fields.one_of(loader, &["action", "tool"]) }) else {
        loader.error(node.at, format!("{path}.action"), "what undoes a step needs an `action`");
        return None;
    };
    let action = loader.text(action_node, &format!("{path}.action"))?;
    // Whoever does a step undoes it.
    let role = step::role(loader, &fields, path).or_else(|| role.map(str::to_owned));
    step::check_action(loader, &action, action_node, role.is_some(), path);
    loader.to_tool = step::goes_to_tool(role.as_deref(), Some(&action));
    Some(step::how(loader, &fields, path, Some(&action)).step(format!("{id}.compensate"), role, action))
}

/// The steps of `finally`, in order.
pub(super) fn finally(loader: &mut Loader, node: Option<&Node>, taken: &mut HashSet<String>) -> Vec<Read> {
    let Some(node) = node else { return Vec::new() };
    let Kind::Seq(items) = &node.kind else {
        let found = node.describe();
        let hint = Some("begin each step with a dash".to_owned());
        loader.suggest(node.at, "finally", format!("expected a list, found {found}"), hint);
        return Vec::new();
    };
    if items.len() > FINALLY_MAX {
        loader.error(node.at, "finally", format!("{} steps, over the limit of {FINALLY_MAX}", items.len()));
        return Vec::new();
    }
    let mut steps = Vec::with_capacity(items.len());
    for (index, item) in items.iter().enumerate() {
        let path = format!("finally.{index}");
        loader.place = Place::Finally(index);
        let read = step::step(loader, item, &path, taken);
        for (key, value) in item.entries().iter().filter(|(key, _)| NOT_FINALLY.contains(&key.text.as_str())) {
            loader.error(value.at, format!("{path}.{}", key.text), "a step of `finally` has none");
        }
        if let Some(Read { step, at, .. }) = &read {
            if !matches!(step.kind, StepKind::Work) {
                loader.error(
                    *at,
                    &path,
                    "a step of `finally` has an `action`, and is no pause, jump or other playbook",
                );
            }
            if matches!(step.on_failure, OnFailure::Goto(_)) {
                loader.error(*at, format!("{path}.on_failure"), "expected `abort` or `continue`");
            }
        }
        steps.extend(read);
    }
    loader.place = Place::End;
    steps
}

/// The steps, and what closes a run: what undoes them, that of the last one first,
/// then what is done in any case. Each of the latter knows which of them look it up.
pub(super) fn join(steps: Vec<Read>, finally: Vec<Read>) -> (Vec<Step>, Vec<Step>) {
    let (steps, mut undo): (Vec<Step>, Vec<Option<Step>>) =
        steps.into_iter().map(|read| (read.step, read.undo)).unzip();
    undo.reverse();
    let mut closing: Vec<Step> = undo.into_iter().flatten().chain(finally.into_iter().map(|read| read.step)).collect();
    for at in 0..closing.len() {
        let names = |step: &Step| {
            step.references().iter().any(|r| r.name(0) == Some("steps") && r.name(1) == Some(&closing[at].id))
        };
        let last = closing.iter().rposition(names).map(|last| steps.len() + last);
        closing[at].last_use = last;
    }
    (steps, closing)
}
