//! `concurrency`: how many runs may be under way at once.

use super::{Fields, Loader, Place};
use crate::domain::playbook::keys;
use crate::domain::playbook::model::{CONCURRENCY_MAX, Concurrency, OnConflict};
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::playbook::yaml::{Kind, Node};

/// `concurrency: 1`, a key alone, or a map.
pub(super) fn concurrency(loader: &mut Loader, node: &Node) -> Option<Concurrency> {
    let mut rule = Concurrency { key: None, limit: 1, on_conflict: OnConflict::default() };
    match &node.kind {
        Kind::Int(_) => rule.limit = limit(loader, node, "concurrency")?,
        Kind::Str(_) => rule.key = key(loader, node, "concurrency"),
        _ => {
            let fields = Fields::open(loader, node, "concurrency", keys::CONCURRENCY, &[])?;
            rule.key = fields.get("key").and_then(|node| key(loader, node, "concurrency.key"));
            if let Some(node) = fields.get("limit") {
                rule.limit = limit(loader, node, "concurrency.limit").unwrap_or(1);
            }
            if let Some(node) = fields.get("on_conflict") {
                rule.on_conflict = on_conflict(loader, node).unwrap_or_default();
            }
        }
    }
    Some(rule)
}

/// It is made when a run starts: no step has said anything yet.
fn key(loader: &mut Loader, node: &Node, path: &str) -> Option<crate::domain::playbook::template::Template> {
    loader.text(node, path)?;
    loader.place = Place::Start;
    let template = loader.template(node, path);
    loader.place = Place::End;
    Some(template)
}

fn limit(loader: &mut Loader, node: &Node, path: &str) -> Option<u32> {
    match node.kind {
        Kind::Int(n) if (1..=i64::from(CONCURRENCY_MAX)).contains(&n) => u32::try_from(n).ok(),
        _ => {
            loader.error(node.at, path, format!("expected a number from 1 to {CONCURRENCY_MAX}"));
            None
        }
    }
}

fn on_conflict(loader: &mut Loader, node: &Node) -> Option<OnConflict> {
    let path = "concurrency.on_conflict";
    let word = loader.text(node, path)?;
    let found = OnConflict::NAMES.iter().find(|(name, _)| *name == word).map(|(_, rule)| *rule);
    if found.is_none() {
        let names = OnConflict::NAMES.iter().map(|(name, _)| *name);
        let all: Vec<&str> = names.clone().collect();
        let hint = did_you_mean(&word, names).or_else(|| Some(format!("use {}", all.join(", "))));
        loader.suggest(node.at, path, format!("unknown rule `{word}`"), hint);
    }
    found
}
