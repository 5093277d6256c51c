//! What starts a run, besides a person.

use std::time::Duration;

use super::step::duration_of;
use super::{Fields, Loader};
use crate::domain::event::is_event_name;
use crate::domain::playbook::keys;
use crate::domain::playbook::model::Trigger;
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::playbook::yaml::{Kind, Node};
use crate::domain::schedule::{CATCH_UP_MAX, CatchUp, Gap, JITTER_MAX, Overlap, Schedule, ScheduleSpec};

const WORDS: &[&str] = &["schedule", "scheduled", "manual", "webhook", "event", "event-driven"];

/// `trigger` as a map, as a word beside `schedule`, or not at all.
pub(super) fn trigger(loader: &mut Loader, top: &Fields<'_>) -> Option<Trigger> {
    let catch_up = top.get("catch_up");
    let Some(node) = top.get("trigger") else {
        return match top.get("schedule") {
            Some(cron) => schedule(loader, cron, None, catch_up, "schedule"),
            None => {
                without_schedule(loader, catch_up);
                Some(Trigger::Manual)
            }
        };
    };
    match &node.kind {
        Kind::Str(word) => of_word(loader, word, node, top, catch_up),
        Kind::Map(_) => {
            let fields = Fields::open(loader, node, "trigger", keys::TRIGGER, &[])?;
            let catch_up = fields.get("catch_up").or(catch_up);
            match fields.get("type").map(|n| &n.kind) {
                Some(Kind::Str(word)) => of_word(loader, word, node, &fields, catch_up),
                None => of_word(loader, "schedule", node, &fields, catch_up),
                Some(_) => {
                    loader.error(node.at, "trigger.type", "expected text");
                    None
                }
            }
        }
        _ => {
            let found = node.describe();
            loader.error(node.at, "trigger", format!("expected a map or a word, found {found}"));
            None
        }
    }
}

fn without_schedule(loader: &mut Loader, catch_up: Option<&Node>) {
    if let Some(node) = catch_up {
        loader.error(node.at, "catch_up", "belongs to a `schedule`");
    }
}

fn without_match(loader: &mut Loader, fields: &Fields<'_>) {
    if let Some(node) = fields.get("match") {
        loader.error(node.at, "trigger.match", "belongs to a trigger of type `event`");
    }
}

/// What the event's data must hold. Nothing is known yet that could be put in.
fn matching(loader: &mut Loader, fields: &Fields<'_>) -> serde_json::Value {
    let Some(node) = fields.get("match") else { return serde_json::Value::Null };
    if !matches!(node.kind, Kind::Map(_)) {
        let found = node.describe();
        let message = format!("expected a map of what the event's data holds, found {found}");
        loader.error(node.at, "trigger.match", message);
    }
    if loader.template(node, "trigger.match").uses().is_empty() {
        return node.to_json();
    }
    let hint = Some("write the value itself, or `if` on the first step".to_owned());
    loader.suggest(node.at, "trigger.match", "nothing can be put in before a run begins".into(), hint);
    serde_json::Value::Null
}

fn of_word(
    loader: &mut Loader,
    word: &str,
    node: &Node,
    fields: &Fields<'_>,
    catch_up: Option<&Node>,
) -> Option<Trigger> {
    if !["schedule", "scheduled"].contains(&word) {
        without_schedule(loader, catch_up);
    }
    if !["event", "event-driven", "webhook"].contains(&word) {
        without_match(loader, fields);
    }
    match word {
        "manual" => Some(Trigger::Manual),
        "schedule" | "scheduled" => match fields.one_of(loader, &["schedule", "cron"]) {
            Some(cron) => schedule(loader, cron, Some(fields), catch_up, "trigger"),
            None => {
                let hint = Some("write a cron expression such as '0 9 * * MON'".to_owned());
                loader.suggest(node.at, "trigger", "a scheduled trigger needs a `schedule`".into(), hint);
                None
            }
        },
        "webhook" | "event" | "event-driven" => {
            let Some(at) = fields.get("event") else {
                loader.error(node.at, "trigger", format!("a trigger of type `{word}` needs an `event`"));
                return None;
            };
            let event = loader.text(at, "trigger.event")?;
            if !is_event_name(&event) {
                let message = format!("`{event}` cannot be an event's name");
                let hint = Some("use up to 200 letters, digits, `.`, `_`, `-`, `:` and `/`".to_owned());
                loader.suggest(at.at, "trigger.event", message, hint);
                return None;
            }
            if word == "webhook" {
                without_match(loader, fields);
                return Some(Trigger::Webhook { event });
            }
            Some(Trigger::Event { event, matching: matching(loader, fields) })
        }
        other => {
            let near = did_you_mean(other, WORDS.iter().copied());
            loader.suggest(node.at, "trigger", format!("unknown trigger `{other}`"), near);
            None
        }
    }
}

fn schedule(
    loader: &mut Loader,
    node: &Node,
    fields: Option<&Fields<'_>>,
    catch_up: Option<&Node>,
    path: &str,
) -> Option<Trigger> {
    let mut spec = ScheduleSpec::new(&loader.text(node, path)?);
    if let Err(message) = Schedule::read(&spec) {
        let hint = Some("write five fields such as '0 9 * * MON', or @hourly, @daily, @weekly".to_owned());
        loader.suggest(node.at, path, message, hint);
        return None;
    }
    let get = |name: &str| fields.and_then(|fields| fields.get(name));
    if let Some(zone) = get("timezone") {
        let name = loader.text(zone, "trigger.timezone")?;
        if jiff::tz::TimeZone::get(&name).is_err() {
            let known: Vec<String> = jiff::tz::db().available().map(|name| name.to_string()).collect();
            let near = did_you_mean(&name, known.iter().map(String::as_str));
            let hint = near.or_else(|| Some("write an IANA name such as Europe/Berlin".to_owned()));
            loader.suggest(zone.at, "trigger.timezone", format!("there is no time zone `{name}`"), hint);
        }
        spec.timezone = Some(name);
    }
    if let Some(node) = get("dst_gap") {
        spec.gap = word_of(loader, node, "dst_gap", &[("shift", Gap::Shift), ("skip", Gap::Skip)])?;
    }
    if let Some(node) = get("dst_overlap") {
        let words = [("first", Overlap::First), ("both", Overlap::Both)];
        spec.overlap = Some(word_of(loader, node, "dst_overlap", &words)?);
    }
    if let Some(node) = catch_up {
        let text = loader.text(node, "catch_up")?;
        match CatchUp::parse(&text) {
            Some(catch_up) => spec.catch_up = catch_up,
            None => {
                let near = did_you_mean(&text, ["none", "latest", "all"]);
                let hint = near.or_else(|| Some(format!("write `none`, `latest`, or `all(10)`, up to {CATCH_UP_MAX}")));
                loader.suggest(node.at, "catch_up", format!("unknown catch-up `{text}`"), hint);
            }
        }
    }
    if let Some(node) = get("jitter") {
        spec.jitter = duration_of(loader, node, "trigger.jitter").unwrap_or(Duration::ZERO);
        if spec.jitter > JITTER_MAX {
            loader.error(node.at, "trigger.jitter", "is longer than a day");
        }
    }
    Some(Trigger::Schedule(spec))
}

fn word_of<T: Copy>(loader: &mut Loader, node: &Node, key: &str, words: &[(&str, T)]) -> Option<T> {
    let path = format!("trigger.{key}");
    let text = loader.text(node, &path)?;
    let found = words.iter().find(|(word, _)| *word == text).map(|(_, value)| *value);
    if found.is_none() {
        let known: Vec<&str> = words.iter().map(|(word, _)| *word).collect();
        let near = did_you_mean(&text, known.iter().copied());
        let hint = near.or_else(|| Some(format!("write `{}`", known.join("` or `"))));
        loader.suggest(node.at, &path, format!("unknown word `{text}`"), hint);
    }
    found
}
