//! `execution` and `budget`: how a playbook may be run, and what that may cost.

use super::{Fields, Loader};
use crate::domain::budget::credits;
use crate::domain::money::Nanos;
use crate::domain::playbook::keys;
use crate::domain::playbook::model::{Execution, Mode};
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::playbook::yaml::{Kind, Node};

/// The most that a budget may name, in credits: 10 million dollars.
const CREDITS_MAX: i64 = 1_000_000_000;

/// `execution: review`, or a map.
pub(super) fn execution(loader: &mut Loader, node: Option<&Node>) -> Execution {
    let Some(node) = node else { return Execution::default() };
    let mut execution = Execution::default();
    if matches!(node.kind, Kind::Str(_)) {
        execution.mode = mode(loader, node, "execution").unwrap_or_default();
        return execution;
    }
    let Some(fields) = Fields::open(loader, node, "execution", keys::EXECUTION, &[]) else { return execution };
    if let Some(node) = fields.get("mode") {
        execution.mode = mode(loader, node, "execution.mode").unwrap_or_default();
    }
    execution.spend_cap = fields.get("spend_cap").and_then(|node| usd(loader, node, "execution.spend_cap"));
    execution.notify = match fields.get("notify").map(|node| (node, &node.kind)) {
        None => Vec::new(),
        Some((_, Kind::Seq(items))) => items.iter().filter_map(|item| loader.text(item, "execution.notify")).collect(),
        Some((node, _)) => loader.text(node, "execution.notify").into_iter().collect(),
    };
    execution
}

fn mode(loader: &mut Loader, node: &Node, path: &str) -> Option<Mode> {
    let word = loader.text(node, path)?;
    let found = Mode::NAMES.iter().find(|(name, _)| *name == word).map(|(_, mode)| *mode);
    if found.is_none() {
        let names = Mode::NAMES.iter().map(|(name, _)| *name);
        let hint = did_you_mean(&word, names).or_else(|| Some("use auto, review or blocked".to_owned()));
        loader.suggest(node.at, path, format!("unknown mode `{word}`"), hint);
    }
    found
}

fn usd(loader: &mut Loader, node: &Node, path: &str) -> Option<Nanos> {
    let usd = node.to_json().as_f64().filter(|usd| (0.0..=1e7).contains(usd));
    if usd.is_none() {
        let found = node.describe();
        loader.error(node.at, path, format!("expected an amount in USD, 0 or more, found {found}"));
    }
    usd.map(|usd| Nanos((usd * 1e9).round() as i64))
}

/// Credits that something may cost.
pub(super) fn budget(loader: &mut Loader, node: &Node, path: &str) -> Option<Nanos> {
    match node.kind {
        Kind::Int(n) if (0..=CREDITS_MAX).contains(&n) => Some(credits(n)),
        _ => {
            let found = node.describe();
            let hint = Some("1 credit is 0.01 USD".to_owned());
            loader.suggest(node.at, path, format!("expected whole credits, 0 or more, found {found}"), hint);
            None
        }
    }
}
