//! The one way in which a playbook is written: every dialect's names become
//! the same ones, short forms are written out, keys stand in one order. Places
//! stay as they were, so that a comment finds its line again.

use std::collections::HashSet;

use super::keys;
use super::load::free_id;
use super::model::InputKind;
use super::problem::Pos;
use super::yaml::{Key, Kind, Node};
use crate::domain::duration;

const TRIGGER_TYPES: &[(&str, &str)] = &[("scheduled", "schedule"), ("event-driven", "event")];

/// The canonical form of a tree that loads as a playbook.
pub fn canonical(root: &Node) -> Node {
    let mut top = entries(root);
    rename(&mut top, keys::TOP);
    trigger(&mut top);
    if let Some(inputs) = value_mut(&mut top, "inputs") {
        each_entry(inputs, input);
    }
    if let Some(rule) = value_mut(&mut top, "concurrency") {
        match rule.kind {
            Kind::Int(_) => written_out(rule, "limit"),
            _ => written_out(rule, "key"),
        }
        let mut inner = entries(rule);
        order(&mut inner, keys::CONCURRENCY);
        rule.kind = Kind::Map(inner);
    }
    if let Some(execution) = value_mut(&mut top, "execution") {
        written_out(execution, "mode");
        let mut inner = entries(execution);
        order(&mut inner, keys::EXECUTION);
        execution.kind = Kind::Map(inner);
    }
    let mut taken = HashSet::new();
    for list in ["steps", "finally"] {
        if let Some(Node { kind: Kind::Seq(items), .. }) = value_mut(&mut top, list) {
            items.iter_mut().for_each(|item| *item = step(item, &mut taken));
        }
    }
    order(&mut top, keys::TOP);
    Node { at: root.at, kind: Kind::Map(top) }
}

type Entries = Vec<(Key, Node)>;

/// The keys of a map that have a value: one without counts as absent.
fn entries(node: &Node) -> Entries {
    match &node.kind {
        Kind::Map(entries) => entries.iter().filter(|(_, node)| !matches!(node.kind, Kind::Null)).cloned().collect(),
        _ => Vec::new(),
    }
}

/// Gives keys their one name; of two that mean the same the first stays.
fn rename(entries: &mut Entries, table: &[keys::Key]) {
    for (key, _) in entries.iter_mut() {
        let same_as = table.iter().find(|other| other.name == key.text).and_then(|other| other.same_as);
        // What belongs into another map is no mere name.
        if let Some(name) = same_as.filter(|name| !name.contains('.')) {
            key.text = name.to_owned();
        }
    }
    let mut seen = HashSet::new();
    entries.retain(|(key, _)| seen.insert(key.text.clone()));
}

fn order(entries: &mut Entries, table: &[keys::Key]) {
    entries.sort_by_key(|(key, _)| table.iter().position(|other| other.name == key.text).unwrap_or(table.len()));
}

fn value_mut<'a>(entries: &'a mut Entries, name: &str) -> Option<&'a mut Node> {
    entries.iter_mut().find(|(key, _)| key.text == name).map(|(_, node)| node)
}

fn take(entries: &mut Entries, name: &str) -> Option<(Key, Node)> {
    let at = entries.iter().position(|(key, _)| key.text == name)?;
    Some(entries.remove(at))
}

fn each_entry(node: &mut Node, change: impl Fn(&mut Node)) {
    if let Kind::Map(entries) = &mut node.kind {
        entries.iter_mut().for_each(|(_, node)| change(node));
    }
}

/// Of what nobody has written.
const NOWHERE: Pos = Pos { line: 0, column: 0 };

fn text(at: Pos, text: &str) -> Node {
    Node { at, kind: Kind::Str(text.to_owned()) }
}

fn key(at: Pos, text: &str) -> Key {
    Key { at, text: text.to_owned() }
}

/// `trigger: scheduled` beside `schedule: …`, and `schedule` alone, as one map;
/// a manual trigger is none.
fn trigger(top: &mut Entries) {
    let schedule = take(top, "schedule");
    let catch_up = take(top, "catch_up");
    let Some((name, node)) = take(top, "trigger").or_else(|| {
        let (key, _) = schedule.as_ref()?;
        Some((Key { at: key.at, text: "trigger".into() }, Node { at: key.at, kind: Kind::Map(Vec::new()) }))
    }) else {
        return;
    };
    let mut inner = entries(&node);
    if let Kind::Str(word) = &node.kind {
        inner.push((key(node.at, "type"), text(node.at, word.trim())));
    }
    rename(&mut inner, keys::TRIGGER);
    if let Some(schedule) = schedule
        && value_mut(&mut inner, "schedule").is_none()
    {
        inner.push(schedule);
    }
    if let Some(catch_up) = catch_up
        && value_mut(&mut inner, "catch_up").is_none()
    {
        inner.push(catch_up);
    }
    if let Some(jitter) = value_mut(&mut inner, "jitter") {
        duration_of(jitter);
    }
    let at = inner.first().map_or(node.at, |(key, _)| key.at);
    if value_mut(&mut inner, "type").is_none() {
        inner.push((key(at, "type"), text(at, "schedule")));
    }
    if let Some(Node { kind: Kind::Str(word), .. }) = value_mut(&mut inner, "type") {
        if let Some((_, known)) = TRIGGER_TYPES.iter().find(|(other, _)| other == word) {
            *word = (*known).to_owned();
        }
        if word == "manual" {
            return;
        }
    }
    order(&mut inner, keys::TRIGGER);
    top.push((name, Node { at: node.at, kind: Kind::Map(inner) }));
}

/// `topic: string` for short, `topic:` for anything.
fn input(node: &mut Node) {
    let at = node.at;
    match &mut node.kind {
        Kind::Null => node.kind = Kind::Map(vec![(key(at, "type"), text(at, InputKind::Any.as_str()))]),
        Kind::Str(word) => node.kind = Kind::Map(vec![(key(at, "type"), text(at, word.trim()))]),
        Kind::Map(entries) => {
            entries.retain(|(_, node)| !matches!(node.kind, Kind::Null));
            rename(entries, keys::INPUT);
            if let Some(items) = value_mut(entries, "items") {
                input(items);
            }
            if let Some(properties) = value_mut(entries, "properties") {
                each_entry(properties, input);
            }
            order(entries, keys::INPUT);
        }
        _ => {}
    }
}

fn step(node: &Node, taken: &mut HashSet<String>) -> Node {
    let mut step = entries(node);
    rename(&mut step, keys::STEP);
    let id = match value_mut(&mut step, "id").map(|id| &id.kind) {
        Some(Kind::Str(id)) => id.trim().to_owned(),
        Some(Kind::Int(id)) => id.to_string(),
        _ => {
            let named =
                step.iter().find(|(key, _)| ["goto", "sleep", "wait_for", "playbook"].contains(&key.text.as_str()));
            let action = step.iter().find(|(key, _)| key.text == "action").map(|(_, node)| &node.kind);
            match (named, action) {
                (Some((key, _)), _) => free_id(&key.text, taken),
                (None, Some(Kind::Str(action))) => free_id(action.trim(), taken),
                _ => free_id("step", taken),
            }
        }
    };
    // A given one keeps its place, for what stands beside it.
    let at = take(&mut step, "id").map_or(NOWHERE, |(key, _)| key.at);
    step.push((key(at, "id"), text(at, &id)));
    taken.insert(id);
    gate(&mut step);
    if let Some(undo) = value_mut(&mut step, "compensate") {
        written_out(undo, "action");
        let mut inner = entries(undo);
        rename(&mut inner, keys::COMPENSATE);
        details(&mut inner);
        order(&mut inner, keys::COMPENSATE);
        undo.kind = Kind::Map(inner);
    }
    if let Some(rubric) = value_mut(&mut step, "rubric") {
        each_entry(rubric, |criterion| {
            if matches!(criterion.kind, Kind::Map(_)) {
                let mut inner = entries(criterion);
                order(&mut inner, keys::CRITERION);
                criterion.kind = Kind::Map(inner);
            }
        });
    }
    if let Some(output) = value_mut(&mut step, "output") {
        each_entry(output, input);
    }
    if let Some(needs) = value_mut(&mut step, "needs")
        && !matches!(needs.kind, Kind::Seq(_))
    {
        needs.kind = Kind::Seq(vec![needs.clone()]);
    }
    details(&mut step);
    order(&mut step, keys::STEP);
    Node { at: node.at, kind: Kind::Map(step) }
}

/// A short form as the map that it stands for.
fn written_out(node: &mut Node, key_of: &str) {
    if !matches!(node.kind, Kind::Map(_)) {
        node.kind = Kind::Map(vec![(key(node.at, key_of), node.clone())]);
    }
}

/// What is written inside a step in several ways.
fn details(step: &mut Entries) {
    if let Some(Node { kind: Kind::Str(role), .. }) = value_mut(step, "role") {
        *role = role.trim().trim_start_matches("agent.").to_owned();
    }
    for (short, long) in [("retry", "max_attempts"), ("wait_for", "event")] {
        if let Some(node) = value_mut(step, short) {
            written_out(node, long);
        }
    }
    for (name, node) in step {
        match (name.text.as_str(), &mut node.kind) {
            ("timeout", Kind::Map(inner)) => {
                inner.retain(|(_, node)| !matches!(node.kind, Kind::Null));
                inner.iter_mut().for_each(|(_, node)| duration_of(node));
                order(inner, keys::TIMEOUT);
                if let [(key, hard)] = inner.as_slice()
                    && key.text == "hard"
                {
                    node.kind = hard.kind.clone();
                }
            }
            ("timeout" | "sleep", _) => duration_of(node),
            ("retry" | "wait_for" | "approval", Kind::Map(inner)) => {
                inner.retain(|(_, node)| !matches!(node.kind, Kind::Null));
                for (_, node) in inner.iter_mut().filter(|(key, _)| DURATIONS.contains(&key.text.as_str())) {
                    duration_of(node);
                }
            }
            _ => {}
        }
    }
}

/// Keys inside a step's maps that are durations.
const DURATIONS: &[&str] = &["timeout", "initial", "max"];

/// `approval: true` is `required`, `false` and `none` are nothing.
fn gate(step: &mut Entries) {
    let Some(node) = value_mut(step, "approval") else { return };
    match &node.kind {
        Kind::Bool(true) => node.kind = Kind::Str("required".into()),
        Kind::Bool(false) => drop(take(step, "approval")),
        Kind::Str(word) if word == "none" => drop(take(step, "approval")),
        Kind::Map(inner) if inner.iter().all(|(key, _)| key.text == "required") => {
            node.kind = Kind::Str("required".into());
        }
        _ => {}
    }
}

/// `60s` is `1m`.
fn duration_of(node: &mut Node) {
    if let Kind::Str(text) = &mut node.kind
        && let Ok(duration) = duration::parse(text.trim())
    {
        *text = duration::written(duration);
    }
}
