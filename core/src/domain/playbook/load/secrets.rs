//! `secrets`: the names of what a company has sealed. Each goes to a tool as it is and
//! nowhere else, so that it can be taken out of what comes back.

use serde_json::{Map, Value};

use super::{Loader, Use};
use crate::domain::playbook::expr::{Expr, Reference};
use crate::domain::playbook::problem::{Pos, Problem, did_you_mean};
use crate::domain::playbook::template::{Part, Template};
use crate::domain::playbook::yaml::{Kind, Node};
use crate::domain::secret::{NAMED_MAX, mask, name_problem};

/// What stands before the name of one.
pub(super) const ROOT: &str = "secrets";

/// `secrets: [STRIPE_KEY]`, or one: each with what stands for it.
pub(super) fn secrets(loader: &mut Loader, node: Option<&Node>) -> Map<String, Value> {
    let mut named = Map::new();
    let Some(node) = node else { return named };
    let items = match &node.kind {
        Kind::Seq(items) => items.as_slice(),
        Kind::Str(_) => std::slice::from_ref(node),
        _ => {
            let hint = Some("write `secrets: [STRIPE_KEY]`; the values are set by `capx secret set`".to_owned());
            let found = node.describe();
            loader.suggest(node.at, ROOT, format!("expected a list of names, found {found}"), hint);
            return named;
        }
    };
    if items.len() > NAMED_MAX {
        loader.error(node.at, ROOT, format!("over the limit of {NAMED_MAX} secrets"));
    }
    for item in items {
        let Some(name) = loader.text(item, ROOT) else { continue };
        match name_problem(&name) {
            Some(problem) => loader.error(item.at, ROOT, format!("the name of a secret {problem}")),
            None if named.contains_key(&name) => loader.error(item.at, ROOT, format!("`{name}` stands here twice")),
            None => drop(named.insert(name.clone(), mask(&name).into())),
        }
    }
    named
}

/// What is made of a secret could not be told from other text any more.
pub(super) fn stand_alone(loader: &mut Loader, template: &Template, at: Pos, path: &str) {
    let parts: Vec<&Expr> = match template {
        Template::Expr(expr) => vec![expr],
        Template::Text(parts) => {
            parts.iter().filter_map(|part| if let Part::Expr(e) = part { Some(e) } else { None }).collect()
        }
        _ => Vec::new(),
    };
    for part in parts {
        let alone = matches!(part, Expr::Path(reference) if reference.0.len() == 2);
        let used = part.uses().into_iter().any(|(reference, _)| reference.name(0) == Some(ROOT));
        if used && !alone {
            let hint = Some("write `${secrets.NAME}`, by itself or inside a text".to_owned());
            loader.suggest(at, path, "a secret stands alone: nothing is made of it".into(), hint);
        }
    }
}

/// Whether a secret is one of the playbook's and goes to a tool.
pub(super) fn check(loader: &mut Loader, of: &Use, named: &Map<String, Value>) {
    let reference: &Reference = &of.reference;
    let name = reference.name(1).unwrap_or_default();
    let (message, hint) = if !of.to_tool {
        let hint = "write it into the `params` of a step whose action is a tool, and which has no `role`";
        (format!("`${{{reference}}}`: only a tool is given a secret"), Some(hint.to_owned()))
    } else if !named.contains_key(name) {
        let near = did_you_mean(name, named.keys().map(String::as_str));
        let hint = near.or_else(|| Some(format!("write `secrets: [{name}]` at the top")));
        (format!("`${{{reference}}}`: the playbook names no secret `{name}`"), hint)
    } else {
        return;
    };
    loader.suggest(of.at, &of.path, message, hint);
}

/// One that no step is given could be left out.
pub(super) fn unused(loader: &mut Loader, node: Option<&Node>, named: &Map<String, Value>) {
    let Some(node) = node else { return };
    let uses = &loader.uses;
    let used =
        |name: &str| uses.iter().any(|of| of.reference.name(0) == Some(ROOT) && of.reference.name(1) == Some(name));
    for name in named.keys().filter(|name| !used(name)).collect::<Vec<_>>() {
        let problem = Problem::error(node.at, ROOT, format!("no step is given the secret `{name}`"));
        loader.push(Problem {
            warning: true,
            ..problem.suggest(Some(format!("write `${{secrets.{name}}}`, or leave it out")))
        });
    }
}
