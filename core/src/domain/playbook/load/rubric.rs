//! `rubric` of a step, and of the whole playbook.

use super::flow;
use super::{Fields, Loader, Place};
use crate::domain::duration;
use crate::domain::playbook::keys;
use crate::domain::playbook::model::StepKind;
use crate::domain::playbook::problem::{Problem, did_you_mean};
use crate::domain::playbook::rubric::{
    CRITERIA_MAX, Criterion, Limit, Measure, OnFail, RETRIES, RETRIES_MAX, Rubric, seconds,
};
use crate::domain::playbook::yaml::{Kind, Node};

/// The rubric of a step: its criteria by name, and how they count together.
pub(super) fn rubric(
    loader: &mut Loader,
    fields: &Fields<'_>,
    kind: &StepKind,
    role: Option<&str>,
    path: &str,
) -> Option<Rubric> {
    let node = fields.get("rubric").filter(|_| matches!(kind, StepKind::Work))?;
    let path = format!("{path}.rubric");
    let Kind::Map(entries) = &node.kind else {
        let hint = Some("write each criterion with the score that is asked, such as `relevance: 0.8`".to_owned());
        loader.suggest(node.at, &path, format!("expected a map of criteria, found {}", node.describe()), hint);
        return None;
    };
    if fields.has("for_each") {
        let hint = Some("write the rubric on a step of a playbook that the items call".to_owned());
        loader.suggest(node.at, &path, "a step with `for_each` has none".into(), hint);
        return None;
    }
    let own = |name: &str| keys::RUBRIC.iter().any(|key| key.name == name);
    let composite_threshold = node.get("composite_threshold").filter(|node| !is_null(node));
    let composite_threshold =
        composite_threshold.and_then(|n| share(loader, n, &format!("{path}.composite_threshold")));
    let judge = node.get("judge").filter(|node| !is_null(node));
    let judge = judge.and_then(|n| loader.text(n, &format!("{path}.judge")));
    let judge = judge.map(|role| role.strip_prefix("agent.").map(str::to_owned).unwrap_or(role));
    let max_retries = match node.get("max_retries").map(|n| (&n.kind, n.at)) {
        None | Some((Kind::Null, _)) => RETRIES,
        Some((Kind::Int(n), _)) if (0..=i64::from(RETRIES_MAX)).contains(n) => u32::try_from(*n).unwrap_or(RETRIES),
        Some((_, at)) => {
            loader.error(at, format!("{path}.max_retries"), format!("expected a number from 0 to {RETRIES_MAX}"));
            RETRIES
        }
    };
    let named = entries.iter().filter(|(key, _)| !own(&key.text));
    if named.clone().count() > CRITERIA_MAX {
        loader.error(node.at, &path, format!("over the limit of {CRITERIA_MAX} criteria"));
        return None;
    }
    let read = |(key, node): &(_, Node)| criterion(loader, key, node, &path, composite_threshold.is_some());
    let criteria: Vec<Criterion> = named.filter_map(read).collect();
    let rubric = Rubric { criteria, composite_threshold, judge, max_retries };
    if entries.iter().all(|(key, _)| own(&key.text)) {
        loader.error(node.at, &path, "a rubric needs a criterion, such as `relevance: 0.8`");
    } else if rubric.graded().next().is_some() && rubric.judge.is_none() && role.is_none() {
        let hint = Some("name a `judge`, or compute it by a `check`".to_owned());
        loader.suggest(node.at, &path, "nobody grades: the step has no `role`".into(), hint);
    }
    Some(rubric)
}

fn is_null(node: &Node) -> bool {
    matches!(node.kind, Kind::Null)
}

/// `relevance: 0.8`, or a map.
fn criterion(
    loader: &mut Loader,
    key: &crate::domain::playbook::yaml::Key,
    node: &Node,
    path: &str,
    composite: bool,
) -> Option<Criterion> {
    let name = key.text.clone();
    let path = format!("{path}.{name}");
    if name.is_empty() || name.len() > 64 || !name.chars().all(|c| c.is_ascii_alphanumeric() || "_-".contains(c)) {
        loader.error(key.at, &path, format!("`{name}` is no criterion's name; use up to 64 letters, digits, `_`, `-`"));
        return None;
    }
    let mut criterion = Criterion {
        name: name.clone(),
        weight: 1.0,
        threshold: 0.0,
        on_fail: OnFail::Retry,
        description: None,
        check: None,
    };
    if matches!(node.kind, Kind::Int(_) | Kind::Float(_)) && Limit::of(&name).is_some() && number(node) > Some(1.0) {
        let hint = Some("write it in the `rubric` of the playbook".to_owned());
        loader.suggest(node.at, &path, "a limit is one of the whole run".into(), hint);
        return None;
    }
    if matches!(node.kind, Kind::Seq(_)) {
        let hint = Some("name each criterion as a key of `rubric` itself, such as `tone: 0.8`".to_owned());
        loader.suggest(key.at, &path, "a criterion is no list".into(), hint);
        return None;
    }
    if !matches!(node.kind, Kind::Map(_)) {
        let near = did_you_mean(&name, keys::RUBRIC.iter().map(|key| key.name));
        if let (None, Some(near)) = (number(node), near) {
            loader.suggest(key.at, &path, format!("`{name}` has no score that is asked"), Some(near));
            return None;
        }
        criterion.threshold = share(loader, node, &path)?;
        return Some(criterion);
    }
    let fields = Fields::open(loader, node, &path, keys::CRITERION, &[])?;
    criterion.description = fields.get("description").and_then(|n| loader.text(n, &format!("{path}.description")));
    criterion.check = fields.get("check").and_then(|n| check(loader, n, &format!("{path}.check")));
    if let Some(n) = fields.get("weight") {
        match number(n).filter(|weight| *weight >= 0.0 && weight.is_finite()) {
            Some(weight) => criterion.weight = weight,
            None => loader.error(n.at, format!("{path}.weight"), "expected a number from 0"),
        }
    }
    match fields.get("threshold") {
        Some(n) => criterion.threshold = share(loader, n, &format!("{path}.threshold"))?,
        // What is computed holds or does not.
        None if criterion.check.is_some() => criterion.threshold = 1.0,
        None if composite || fields.has("check") => {}
        None => {
            let hint = Some("write the score that is asked, such as `threshold: 0.8`".to_owned());
            loader.suggest(node.at, &path, "a criterion needs a `threshold`".into(), hint);
        }
    }
    if let Some(n) = fields.get("on_fail") {
        let word = loader.text(n, &format!("{path}.on_fail"))?;
        match OnFail::NAMES.iter().find(|(name, _)| *name == word) {
            Some((_, rule)) => criterion.on_fail = *rule,
            None => {
                let near = did_you_mean(&word, OnFail::NAMES.iter().map(|(name, _)| *name));
                let path = format!("{path}.on_fail");
                loader.suggest(n.at, &path, "expected `retry`, `escalate` or `block`".into(), near);
            }
        }
    }
    Some(criterion)
}

/// What computes a criterion may look up what the step has just said.
fn check(loader: &mut Loader, node: &Node, path: &str) -> Option<crate::domain::playbook::expr::Expr> {
    let place = loader.place;
    if let Place::Step(index) = place {
        loader.place = Place::Graded(index);
    }
    let expr = flow::expression(loader, node, path);
    loader.place = place;
    expr
}

fn number(node: &Node) -> Option<f64> {
    match node.kind {
        Kind::Int(n) => Some(n as f64),
        Kind::Float(n) => Some(n),
        _ => None,
    }
}

/// A number from 0 to 1.
fn share(loader: &mut Loader, node: &Node, path: &str) -> Option<f64> {
    let found = number(node).filter(|n| (0.0..=1.0).contains(n));
    if found.is_none() {
        let percent = match &node.kind {
            Kind::Str(text) => text.strip_suffix('%').and_then(|text| text.trim().parse::<f64>().ok()),
            // Of ten or of a hundred, where that can be told.
            _ => number(node).filter(|n| *n > 10.0),
        };
        let percent = percent.filter(|n| (0.0..=100.0).contains(n));
        let hint = percent.map(|n| format!("write `{}`", n / 100.0));
        loader.suggest(node.at, path, format!("expected a score from 0 to 1, found {}", node.describe()), hint);
    }
    found
}

/// The limits of a whole run. What is no limit is told, and does nothing.
pub(super) fn limits(loader: &mut Loader, node: Option<&Node>) -> Vec<Limit> {
    let Some(node) = node else { return Vec::new() };
    let Kind::Map(entries) = &node.kind else {
        let found = node.describe();
        loader.error(node.at, "rubric", format!("expected a map of limits, found {found}"));
        return Vec::new();
    };
    if entries.len() > CRITERIA_MAX {
        loader.error(node.at, "rubric", format!("over the limit of {CRITERIA_MAX} limits"));
        return Vec::new();
    }
    let mut limits = Vec::new();
    for (key, node) in entries.iter().filter(|(_, node)| !is_null(node)) {
        let path = format!("rubric.{}", key.text);
        let Some((measure, is_max)) = Limit::of(&key.text) else {
            let hint =
                Some("limits begin with `min_` or `max_`; criteria belong into the `rubric` of a step".to_owned());
            let message = format!("`{}` is no limit of a run, and does nothing here", key.text);
            loader.push(Problem { warning: true, ..Problem::error(key.at, path, message).suggest(hint) });
            continue;
        };
        let value = match (&node.kind, &measure) {
            (Kind::Str(text), Measure::Duration) => duration::parse(text.trim()).ok().map(seconds),
            _ => number(node).filter(|n| n.is_finite() && *n >= 0.0),
        };
        match value {
            Some(value) => limits.push(Limit { name: key.text.clone(), measure, is_max, value }),
            None if measure == Measure::Duration => {
                loader.error(node.at, path, "expected a duration such as 30m, or seconds");
            }
            None => loader.error(node.at, path, format!("expected a number from 0, found {}", node.describe())),
        }
    }
    limits
}
