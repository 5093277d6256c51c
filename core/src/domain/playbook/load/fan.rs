//! `for_each` and what belongs to it.

use super::{Fields, Loader};
use crate::domain::playbook::model::{Fan, ITEMS_MAX, ITEMS_MAX_MAX, MinSuccess, PARALLEL_MAX};
use crate::domain::playbook::problem::did_you_mean;
use crate::domain::playbook::template::Template;
use crate::domain::playbook::yaml::{Kind, Node};

const COMPANIONS: &[&str] = &["max_parallel", "max_items", "min_success", "on_item_failure"];

/// The list that a step is done for, if there is one.
pub(super) fn fan(loader: &mut Loader, fields: &Fields<'_>, path: &str) -> Option<Fan> {
    let Some(node) = fields.get("for_each") else {
        for key in COMPANIONS {
            if let Some(node) = fields.get(key) {
                loader.error(node.at, format!("{path}.{key}"), "belongs to a `for_each`");
            }
        }
        return None;
    };
    let list_path = format!("{path}.for_each");
    let items = loader.template(node, &list_path);
    let items_max = number(loader, fields, "max_items", path, ITEMS_MAX_MAX).unwrap_or(ITEMS_MAX);
    match (&items, &node.kind) {
        (Template::Expr(_), _) => {}
        (_, Kind::Seq(list)) if list.len() > items_max as usize => {
            loader.error(node.at, list_path, format!("{} items, over the limit of {items_max}", list.len()));
        }
        (_, Kind::Seq(_)) => {}
        _ => {
            let hint = Some("write `for_each: ${steps.search.output}`, or the items as a list".to_owned());
            loader.suggest(node.at, &list_path, "expected a list or one `${…}` that gives one".into(), hint);
        }
    }
    let goes_on = match fields.get("on_item_failure").map(|n| (n, &n.kind)) {
        None => false,
        Some((_, Kind::Str(word))) if word == "abort" => false,
        Some((_, Kind::Str(word))) if word == "continue" => true,
        Some((node, _)) => {
            let near = if let Kind::Str(word) = &node.kind { did_you_mean(word, ["abort", "continue"]) } else { None };
            loader.suggest(node.at, &format!("{path}.on_item_failure"), "expected `abort` or `continue`".into(), near);
            false
        }
    };
    let min_success = fields.get("min_success").and_then(|n| min_success(loader, n, &format!("{path}.min_success")));
    let all = if goes_on { MinSuccess::Count(0) } else { MinSuccess::Percent(100) };
    Some(Fan {
        items,
        parallel: number(loader, fields, "max_parallel", path, PARALLEL_MAX).unwrap_or(1),
        items_max,
        min_success: min_success.unwrap_or(all),
        goes_on,
    })
}

fn number(loader: &mut Loader, fields: &Fields<'_>, key: &str, path: &str, max: u32) -> Option<u32> {
    let node = fields.get(key)?;
    match node.kind {
        Kind::Int(n) if (1..=i64::from(max)).contains(&n) => u32::try_from(n).ok(),
        _ => {
            loader.error(node.at, format!("{path}.{key}"), format!("expected a number from 1 to {max}"));
            None
        }
    }
}

fn min_success(loader: &mut Loader, node: &Node, path: &str) -> Option<MinSuccess> {
    let percent = |text: &str| text.trim().strip_suffix('%')?.trim().parse().ok().filter(|n| *n <= 100);
    let found = match &node.kind {
        Kind::Int(n) => u32::try_from(*n).ok().map(MinSuccess::Count),
        Kind::Str(text) => percent(text).map(MinSuccess::Percent),
        _ => None,
    };
    if found.is_none() {
        loader.error(node.at, path, "expected a number of items, or a share such as 80%");
    }
    found
}
